//! Who may do what: the root key, or a token that names collections.
//!
//! As the real server decides with `jwt_rbac` on (its `claims.rs` and `rbac` modules): a token is
//! HS256 over the root key's bytes, and **one without `access` may do everything**, which is why
//! nobody here may ever mint such a token.

use std::collections::HashSet;

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Seconds by which a token's clock may differ.
const LEEWAY_SECONDS: u64 = 30;

/// What a call wants. Each call names one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs<'a> {
    /// Reading a collection's points.
    Read(&'a str),
    /// Writing a collection's points.
    Write(&'a str),
    /// Making, changing or dropping collections.
    Manage,
}

/// The server's key.
pub(super) struct Keys {
    root: String,
}

/// What a caller may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Everything.
    Manage,
    /// Reading everything.
    ReadAll,
    /// What is listed.
    Collections(Vec<CollectionAccess>),
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CollectionAccess {
    collection: String,
    access: Mode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Mode {
    #[serde(rename = "r")]
    Read,
    #[serde(rename = "rw")]
    ReadWrite,
}

#[derive(Deserialize)]
struct Claims {
    /// Not an `Option`: `null` must be a malformed claim, as it is to the real server, and not count
    /// as absent, which opens everything.
    #[serde(default = "unlimited")]
    access: AccessClaim,
    value_exists: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AccessClaim {
    Global(GlobalAccess),
    Collections(Vec<CollectionAccess>),
}

/// What a token without `access` may do.
fn unlimited() -> AccessClaim {
    AccessClaim::Global(GlobalAccess::Manage)
}

#[derive(Deserialize)]
enum GlobalAccess {
    #[serde(rename = "r")]
    Read,
    #[serde(rename = "m")]
    Manage,
}

impl Keys {
    pub(super) fn new(root: String) -> Self {
        Self { root }
    }

    /// Who is calling.
    pub(super) fn identify(&self, metadata: &MetadataMap) -> Result<Access, Status> {
        let text = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok());
        let presented = text("api-key")
            .or_else(|| text("authorization").and_then(|value| value.strip_prefix("Bearer ")))
            .ok_or_else(|| {
                Status::unauthenticated("Must provide an API key or an Authorization bearer token")
            })?;
        // Comparing digests tells nothing of where two keys differ.
        if Sha256::digest(presented) == Sha256::digest(&self.root) {
            return Ok(Access::Manage);
        }
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = LEEWAY_SECONDS;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        let key = DecodingKey::from_secret(self.root.as_bytes());
        let claims = jsonwebtoken::decode::<Claims>(presented, &key, &validation)
            .map_err(|error| Status::unauthenticated(format!("Invalid API key or JWT: {error}")))?
            .claims;
        if claims.value_exists.is_some() {
            return Err(Status::unauthenticated("the claim value_exists is not served by the local store"));
        }
        Ok(match claims.access {
            AccessClaim::Global(GlobalAccess::Manage) => Access::Manage,
            AccessClaim::Global(GlobalAccess::Read) => Access::ReadAll,
            AccessClaim::Collections(list) => {
                let mut named = HashSet::new();
                if !list.iter().all(|entry| named.insert(entry.collection.as_str())) {
                    return Err(Status::unauthenticated("access: a collection is named twice"));
                }
                Access::Collections(list)
            }
        })
    }
}

impl Access {
    /// Refuses what the caller may not do.
    pub(super) fn require(&self, needs: Needs<'_>) -> Result<(), Status> {
        let allowed = match (self, needs) {
            (Self::Manage, _) => true,
            (Self::ReadAll, Needs::Read(_)) => true,
            (Self::ReadAll, Needs::Write(_) | Needs::Manage) => false,
            (Self::Collections(list), Needs::Read(name)) => list.iter().any(|c| c.collection == name),
            (Self::Collections(list), Needs::Write(name)) => {
                list.iter().any(|c| c.collection == name && c.access == Mode::ReadWrite)
            }
            (Self::Collections(_), Needs::Manage) => false,
        };
        if allowed { Ok(()) } else { Err(Status::permission_denied("Forbidden: access denied by the token")) }
    }

    /// Whether the caller may know that a collection exists.
    pub(super) fn sees(&self, name: &str) -> bool {
        self.require(Needs::Read(name)).is_ok()
    }
}
