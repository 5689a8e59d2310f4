//! Secrets Manager: the keys of the services behind us, read once at a function's start, and those of
//! tenants that have accounts of their own.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::secrets_manager::{Failure, SecretsManager};
use super::session::Access;
use crate::env::{self, EnvError};
use crate::scope::{Erasure, Subject, TenantScope};
use crate::secret::Secret;
use crate::tenant::TenantId;

/// Why a function that needs a secret cannot start. Never holds the secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The environment does not say which.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// It could not be read.
    #[error("secret {id}, named by {variable}, cannot be read")]
    Unreadable {
        /// The variable that names it.
        variable: &'static str,
        /// Its id.
        id: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It cannot be a key.
    #[error("secret {id}, named by {variable}, is absent, empty or malformed")]
    Malformed {
        /// The variable that names it.
        variable: &'static str,
        /// Its id.
        id: String,
    },
}

/// The stage of what a secret is now.
const CURRENT: &str = "AWSCURRENT";
/// How long a tenant's key is remembered. One that is replaced is used until then.
const REMEMBERED: Duration = Duration::from_secs(300);
/// Keys remembered. An instance that sees more such tenants than this reads some of them again.
const MOST_REMEMBERED: usize = 256;

/// The keys of tenants' own accounts: one secret each, which the operator makes.
#[derive(Debug)]
pub struct TenantKeys {
    access: Access,
    prefix: String,
    known: Mutex<HashMap<TenantId, (Secret, Instant)>>,
}

impl TenantKeys {
    /// The secrets whose names begin with what stands in the environment variable `variable`; the
    /// tenant's id follows.
    ///
    /// # Errors
    /// If the variable is absent; the error names it.
    pub fn from_env(access: &Access, variable: &'static str) -> Result<Self, EnvError> {
        Ok(Self { access: access.clone(), prefix: env::secret_name(variable)?, known: Mutex::default() })
    }

    /// The name of a tenant's secret.
    pub fn name(&self, tenant: &TenantId) -> String {
        format!("{}{tenant}", self.prefix)
    }

    /// The key of the request's tenant.
    ///
    /// # Errors
    /// [`KeyError`].
    pub async fn of(&self, scope: &TenantScope) -> Result<Secret, KeyError> {
        let tenant = scope.tenant_id();
        let remembered = self.known().get(tenant).filter(|(_, at)| at.elapsed() < REMEMBERED).cloned();
        if let Some((key, _)) = remembered {
            return Ok(key);
        }
        let session = self.access.of(tenant);
        let key = secret(session.secrets(), &self.name(tenant), CURRENT).await;
        let key = key.map_err(|failure| KeyError::Unreadable(Box::new(failure)))?.ok_or(KeyError::Absent)?;
        let mut known = self.known();
        if known.len() >= MOST_REMEMBERED && !known.contains_key(tenant) {
            known.clear();
        }
        known.insert(tenant.clone(), (key.clone(), Instant::now()));
        Ok(key)
    }

    /// Whether a tenant has a secret. What it holds is not read.
    ///
    /// # Errors
    /// [`KeyError::Unreadable`].
    pub async fn there_is_one_of(&self, tenant: &TenantId) -> Result<bool, KeyError> {
        let (session, asked) = (self.access.of(tenant), json!({"SecretId": self.name(tenant)}));
        match session.secrets().call("DescribeSecret", &asked).await {
            Ok(found) => Ok(found.get("DeletedDate").is_none_or(Value::is_null)),
            Err(failure) if failure.is_not_found() => Ok(false),
            Err(failure) => Err(KeyError::Unreadable(Box::new(failure))),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<TenantId, (Secret, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The secrets of tenants' own: those below a prefix for each tenant, and the keys of their accounts.
#[derive(Clone, Debug)]
pub struct TenantSecrets {
    access: Access,
    /// Before the tenant's id and a `/`.
    below: String,
    /// Before the tenant's id.
    model_keys: String,
}

/// Why secrets could not be listed or deleted.
#[derive(Debug, thiserror::Error)]
#[error("the tenant's secrets cannot be {what}")]
pub struct SecretsFailed {
    what: &'static str,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl TenantSecrets {
    /// The secrets whose names begin with what stands in the environment variables `below` and `model_keys`.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub fn from_env(
        access: &Access,
        below: &'static str,
        model_keys: &'static str,
    ) -> Result<Self, EnvError> {
        let (below, model_keys) = (env::secret_name(below)?, env::secret_name(model_keys)?);
        Ok(Self { access: access.clone(), below, model_keys })
    }

    /// The names of a tenant's secrets, those included that wait to be deleted.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub async fn names(&self, erasure: &Erasure) -> Result<Vec<String>, SecretsFailed> {
        let tenant = erasure.tenant_id();
        let session = self.access.of(tenant);
        let (below, model_key) = (format!("{}{tenant}/", self.below), format!("{}{tenant}", self.model_keys));
        let mut names = Vec::new();
        for prefix in [&below, &model_key] {
            let mut asked = Map::new();
            asked.insert("Filters".to_owned(), json!([{"Key": "name", "Values": [prefix]}]));
            asked.insert("IncludePlannedDeletion".to_owned(), true.into());
            loop {
                let page = session.secrets().call("ListSecrets", &asked.clone().into()).await;
                let page = page.map_err(|e| SecretsFailed { what: "listed", source: e.into() })?;
                let listed = page.get("SecretList").and_then(Value::as_array).into_iter().flatten();
                let found = listed.filter_map(|secret| secret.get("Name")?.as_str());
                // A prefix finds those of tenants whose ids begin alike, and is not exact about case.
                let ours = found.filter(|name| name.starts_with(&below) || **name == *model_key);
                names.extend(ours.map(str::to_owned));
                let Some(token) = page.get("NextToken").and_then(Value::as_str) else { break };
                asked.insert("NextToken".to_owned(), token.into());
            }
        }
        Ok(names)
    }

    /// Deletes a tenant's secrets, without a way back.
    ///
    /// # Errors
    /// If they cannot be listed or deleted; what was deleted until then stays so.
    pub async fn delete(&self, erasure: &Erasure) -> Result<(), SecretsFailed> {
        let session = self.access.of(erasure.tenant_id());
        for name in self.names(erasure).await? {
            let asked = json!({"SecretId": name, "ForceDeleteWithoutRecovery": true});
            match session.secrets().call("DeleteSecret", &asked).await {
                Ok(_) => {}
                Err(failure) if failure.is_not_found() => {}
                Err(failure) => return Err(SecretsFailed { what: "deleted", source: failure.into() }),
            }
        }
        Ok(())
    }
}

/// The secret that the tenants' keys for webhooks are made of. It is read whenever it is needed, so that
/// one that is replaced holds at once.
#[cfg(feature = "webhooks")]
#[derive(Debug)]
pub struct WebhookRoot {
    access: Access,
    variable: &'static str,
    id: String,
}

#[cfg(feature = "webhooks")]
impl WebhookRoot {
    /// The secret whose id stands in the environment variable `variable`. It is read once, so that a function
    /// without it does not start.
    ///
    /// # Errors
    /// [`SecretError`] says which variable and secret are at fault.
    pub async fn from_env(access: &Access, variable: &'static str) -> Result<Self, SecretError> {
        let root = Self { access: access.clone(), variable, id: env::secret_name(variable)? };
        root.current().await?;
        Ok(root)
    }

    /// The secret as it is now.
    ///
    /// # Errors
    /// [`SecretError`].
    pub async fn current(&self) -> Result<Secret, SecretError> {
        let malformed = || SecretError::Malformed { variable: self.variable, id: self.id.clone() };
        self.stage(CURRENT).await?.ok_or_else(malformed)
    }

    /// The secret as it is, and as it was before it was last replaced, if the operator keeps that.
    ///
    /// # Errors
    /// [`SecretError`].
    pub async fn current_and_previous(&self) -> Result<Vec<Secret>, SecretError> {
        let mut all = vec![self.current().await?];
        all.extend(self.stage("AWSPREVIOUS").await?);
        Ok(all)
    }

    async fn stage(&self, stage: &str) -> Result<Option<Secret>, SecretError> {
        own(&self.access, self.variable, &self.id, stage).await
    }
}

/// Why there is no key of a tenant's account. Never holds the key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// There is none, or it is empty.
    #[error("the key of the tenant's own account is absent or malformed")]
    Absent,
    /// It could not be read.
    #[error("the key of the tenant's own account cannot be read")]
    Unreadable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The secret whose id stands in the environment variable `variable`, read in the function's own role. Who needs
/// several reads one after the other, over one connection: another takes longer to make than an answer takes.
///
/// # Errors
/// [`SecretError`] says which variable and secret are at fault.
pub async fn read(access: &Access, variable: &'static str) -> Result<Secret, SecretError> {
    let id = env::secret_name(variable)?;
    own(access, variable, &id, CURRENT).await?.ok_or(SecretError::Malformed { variable, id })
}

/// As [`secret`], in the function's own role; `variable` names it.
async fn own(
    access: &Access,
    variable: &'static str,
    id: &str,
    stage: &str,
) -> Result<Option<Secret>, SecretError> {
    let session = access.own_role();
    let read = secret(session.secrets(), id, stage).await;
    read.map_err(|failure| SecretError::Unreadable { variable, id: id.to_owned(), source: Box::new(failure) })
}

/// A secret in one of its stages; none if there is no such secret, or if it cannot be a key.
async fn secret(secrets: &SecretsManager, id: &str, stage: &str) -> Result<Option<Secret>, Failure> {
    match secrets.call("GetSecretValue", &json!({"SecretId": id, "VersionStage": stage})).await {
        Ok(answer) => {
            let text = answer.get("SecretString").and_then(Value::as_str);
            Ok(text.and_then(|text| Secret::new(text.to_owned()).ok()))
        }
        Err(failure) if failure.is_not_found() => Ok(None),
        Err(failure) => Err(failure),
    }
}
