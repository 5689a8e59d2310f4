//! The authorizer of uploads, as the function that reads them asks it: a function of its own, since it holds what
//! the reader of strangers' files must not, the vector store's key.

use std::sync::OnceLock;
use std::time::Duration;

use aws_sdk_lambda::config::timeout::TimeoutConfig;
use aws_sdk_lambda::primitives::Blob;
use aws_sdk_lambda::{Client, Config};
use aws_types::SdkConfig;

use crate::env::{self, EnvError};
use crate::upload::{Ruling, UploadPlace};

/// The function.
#[derive(Clone, Debug)]
pub struct UploadAuthorizer {
    config: Config,
    /// Made with the first call: no function waits for it at its start.
    client: OnceLock<Client>,
    function: String,
}

/// Why it could not be found out.
#[derive(Debug, thiserror::Error)]
pub enum NoRuling {
    /// Lambda did not answer, or refused.
    #[error("the authorizer of uploads could not be asked: {code}")]
    Unasked {
        /// Lambda's error code, or what kind of failure it was.
        code: String,
        /// The failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It answered with an error.
    #[error("the authorizer of uploads failed: {0}")]
    Failed(String),
    /// It answered with something else.
    #[error("the authorizer of uploads answered what is no ruling")]
    Malformed(#[from] serde_json::Error),
}

impl UploadAuthorizer {
    /// The function that `UPLOAD_AUTHORIZER` names.
    ///
    /// # Errors
    /// If the variable is absent or malformed; the error names it.
    pub fn from_env(config: &SdkConfig) -> Result<Self, EnvError> {
        let function = env::function("UPLOAD_AUTHORIZER")?;
        // As long as it may take; it changes nothing, so that it may be asked again.
        let timeouts = TimeoutConfig::builder()
            .operation_attempt_timeout(Duration::from_secs(11))
            .operation_timeout(Duration::from_secs(25))
            .build();
        let config = aws_sdk_lambda::config::Builder::from(config).timeout_config(timeouts).build();
        Ok(Self { config, client: OnceLock::new(), function })
    }

    /// What it says about the upload whose file is at `place`.
    ///
    /// # Errors
    /// [`NoRuling`].
    pub async fn ask(&self, place: &UploadPlace) -> Result<Ruling, NoRuling> {
        let client = self.client.get_or_init(|| Client::from_conf(self.config.clone()));
        let call = client.invoke().function_name(&self.function);
        let answer = call.payload(Blob::new(serde_json::to_vec(place)?)).send().await;
        let answer = answer.map_err(|error| NoRuling::Unasked {
            code: super::failure_code(&error),
            source: Box::new(error),
        })?;
        if let Some(kind) = answer.function_error {
            return Err(NoRuling::Failed(kind));
        }
        Ok(serde_json::from_slice(answer.payload.unwrap_or_else(|| Blob::new("")).as_ref())?)
    }
}
