//! Secrets Manager: the keys of the services behind us, read once at a function's start.

use aws_config::SdkConfig;
use aws_sdk_secretsmanager::Client;

use crate::env::{self, EnvError};
use crate::secret::Secret;

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

/// The secret whose id stands in the environment variable `variable`.
///
/// # Errors
/// [`SecretError`] says which variable and secret are at fault.
pub async fn read(config: &SdkConfig, variable: &'static str) -> Result<Secret, SecretError> {
    let id = env::text(variable)?;
    let answer = Client::new(config).get_secret_value().secret_id(&id).send().await;
    let value = answer.map_err(|source| SecretError::Unreadable {
        variable,
        id: id.clone(),
        source: Box::new(source),
    })?;
    let text = value.secret_string.unwrap_or_default();
    Secret::new(text).map_err(|_| SecretError::Malformed { variable, id })
}
