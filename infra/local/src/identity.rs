//! What a local stack knows of itself and keeps between runs: its keys and the tenants it made.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::serving::{replace_file, unique_id};
use crate::sigv4::Credentials;
use crate::template;

/// The file's name in the data directory. It holds secrets, so nobody else may read it.
const FILE: &str = "identity.json";

/// The stack's keys and tenants.
#[derive(Clone, Deserialize, Serialize)]
pub struct Identity {
    /// The operator's access key.
    pub admin: AdminKey,
    /// The vector store's root key.
    pub qdrant_root_key: String,
    /// What the tenants' keys for webhooks are made of.
    #[serde(default)]
    pub webhook_key: String,
    /// The tenants that the stack made by itself, with the keys that were shown once.
    pub tenants: Vec<SeededTenant>,
}

/// An access key.
#[derive(Clone, Deserialize, Serialize)]
pub struct AdminKey {
    /// The part that is sent.
    pub access_key_id: String,
    /// The part that is not.
    pub secret_access_key: String,
    /// The region it signs for.
    pub region: String,
}

/// A tenant that the stack made.
#[derive(Clone, Deserialize, Serialize)]
pub struct SeededTenant {
    /// The tenant.
    pub tenant_id: String,
    /// Its first key.
    pub api_key: String,
}

impl Identity {
    /// The identity kept in `data`, or a new one.
    ///
    /// # Errors
    /// If the file cannot be read or written, or is not one of these.
    pub fn open(data: &Path) -> io::Result<Self> {
        match std::fs::read(data.join(FILE)) {
            Ok(bytes) => {
                let mut identity: Self = serde_json::from_slice(&bytes)?;
                // Of a stack from before there were webhooks.
                if identity.webhook_key.is_empty() {
                    identity.webhook_key = format!("{}{}", unique_id(), unique_id());
                    identity.save(data)?;
                }
                Ok(identity)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let identity = Self {
                    admin: AdminKey::new("AKIALOCALOPERATOR"),
                    qdrant_root_key: format!("{}{}", unique_id(), unique_id()),
                    webhook_key: format!("{}{}", unique_id(), unique_id()),
                    tenants: Vec::new(),
                };
                identity.save(data)?;
                Ok(identity)
            }
            Err(error) => Err(error),
        }
    }

    /// Keeps the identity in `data`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, data: &Path) -> io::Result<()> {
        replace_file(&data.join(FILE), &serde_json::to_vec_pretty(self)?, 0o600)
    }
}

impl AdminKey {
    fn new(access_key_id: &str) -> Self {
        Self {
            access_key_id: access_key_id.to_owned(),
            secret_access_key: format!("{}{}", unique_id(), unique_id()),
            region: template::REGION.to_owned(),
        }
    }

    /// The key as the gateway knows it.
    pub fn credentials(&self) -> Credentials {
        Credentials {
            access_key_id: self.access_key_id.clone(),
            secret_access_key: self.secret_access_key.clone(),
            region: self.region.clone(),
            user_arn: format!("arn:aws:iam::{}:user/operator", template::ACCOUNT),
        }
    }
}
