//! What every AWS client is made of.

use std::time::Duration;

use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_sts::config::retry::RetryConfig;
use aws_sdk_sts::config::timeout::TimeoutConfig;
use aws_sdk_sts::config::{BehaviorVersion, IdentityCache, Region};
use aws_types::SdkConfig;
use aws_types::service_config::{LoadServiceConfig, ServiceConfigKey};

use super::connections::Connections;
use crate::env::{self, EnvError};
use crate::roots::RootsError;

/// Why no AWS client can be made.
#[derive(Debug, thiserror::Error)]
pub enum NoConfig {
    /// Lambda gives credentials and a region to every process.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// The connections cannot be made.
    #[error("connections to AWS cannot be made")]
    Connections(#[from] RootsError),
}

/// The configuration of every AWS client: credentials, region and endpoints from the environment, and
/// a bound on each call. DynamoDB answers in milliseconds; one that takes a second is better asked
/// again.
///
/// All clients, whosever credentials they use, have one pool of connections: a connection belongs to
/// nobody, since each call is signed by itself. What Lambda gives stands in the environment: AWS's own loader looks
/// at profiles and asks machines as well, which takes time at each start, and a megabyte of each program.
///
/// # Errors
/// [`NoConfig`].
pub fn config() -> Result<SdkConfig, NoConfig> {
    let credentials = Credentials::new(
        env::text("AWS_ACCESS_KEY_ID")?,
        env::text("AWS_SECRET_ACCESS_KEY")?,
        env::optional("AWS_SESSION_TOKEN"),
        // Lambda ends a process before they expire.
        None,
        "environment",
    );
    let mut config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(Connections::new()?)
        .credentials_provider(SharedCredentialsProvider::new(credentials))
        .identity_cache(IdentityCache::lazy().build())
        .region(Region::new(env::text("AWS_REGION")?))
        .service_config(Environment)
        .retry_config(RetryConfig::standard().with_max_attempts(3))
        .timeout_config(
            TimeoutConfig::builder()
                .operation_attempt_timeout(Duration::from_secs(2))
                .operation_timeout(Duration::from_secs(5))
                .build(),
        );
    config.set_use_fips(flag("AWS_USE_FIPS_ENDPOINT"));
    config.set_use_dual_stack(flag("AWS_USE_DUALSTACK_ENDPOINT"));
    Ok(config.build())
}

fn flag(name: &str) -> Option<bool> {
    env::optional(name).map(|value| value.eq_ignore_ascii_case("true"))
}

/// Settings of one service, such as `AWS_ENDPOINT_URL_DYNAMODB`, or of all.
/// <https://docs.aws.amazon.com/sdkref/latest/guide/feature-ss-endpoints.html>
#[derive(Debug)]
struct Environment;

impl LoadServiceConfig for Environment {
    fn load_config(&self, key: ServiceConfigKey<'_>) -> Option<String> {
        let service = key.service_id().replace(' ', "_").to_ascii_uppercase();
        env::optional(&format!("{}_{service}", key.env())).or_else(|| env::optional(key.env()))
    }
}
