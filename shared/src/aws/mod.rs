//! The stores on AWS. The only importers of `aws_sdk_*`.

use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_config::environment::{EnvironmentVariableCredentialsProvider, EnvironmentVariableRegionProvider};
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
#[cfg(any(feature = "dynamodb", feature = "invoke", feature = "objects"))]
use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};
use connections::Connections;

#[cfg(feature = "dynamodb")]
pub mod accounts;
#[cfg(feature = "objects")]
pub mod audit_objects;
#[cfg(all(feature = "dynamodb", feature = "audit-log"))]
pub mod chains;
mod connections;
#[cfg(feature = "dynamodb")]
pub mod conversations;
#[cfg(feature = "dynamodb")]
pub mod data_keys;
#[cfg(feature = "dynamodb")]
pub mod deprovisionings;
#[cfg(feature = "dynamodb")]
pub mod documents;
#[cfg(feature = "dynamodb")]
pub mod erasure;
#[cfg(feature = "dynamodb")]
pub mod idempotency;
#[cfg(feature = "dynamodb")]
pub mod issuers;
#[cfg(feature = "dynamodb")]
pub mod keys;
#[cfg(feature = "dynamodb")]
pub mod ledger;
#[cfg(feature = "dynamodb")]
pub mod meters;
#[cfg(feature = "secrets")]
pub mod secrets;
mod session;
#[cfg(feature = "dynamodb")]
mod table;
#[cfg(feature = "dynamodb")]
pub mod tenants;
#[cfg(feature = "invoke")]
pub mod upload_authorizer;
#[cfg(feature = "dynamodb")]
pub mod upload_records;

#[cfg(feature = "objects")]
pub mod uploads;
#[cfg(feature = "dynamodb")]
pub mod usage;
#[cfg(all(feature = "dynamodb", feature = "webhooks"))]
pub mod webhooks;

pub use aws_config::SdkConfig;
pub use connections::NoConnections;
pub use session::{Access, LINKS_HOLD};
#[cfg(feature = "dynamodb")]
pub use table::StoreError;

/// The name of what went wrong with a call: the service's own, or what kept it from answering.
#[cfg(any(feature = "dynamodb", feature = "invoke", feature = "objects"))]
fn failure_code<E: ProvideErrorMetadata, R>(error: &SdkError<E, R>) -> String {
    match error {
        SdkError::TimeoutError(_) => "timeout",
        SdkError::DispatchFailure(_) => "unreachable",
        other => other.code().unwrap_or("unknown"),
    }
    .to_owned()
}

/// The configuration of every AWS client: credentials, region and endpoints from the environment, and
/// a bound on each call. DynamoDB answers in milliseconds; one that takes a second is better asked
/// again.
///
/// All clients, whosever credentials they use, have one pool of connections: a connection belongs to
/// nobody, since each call is signed by itself. Credentials and region are looked for in the environment
/// alone: to ask profiles, containers and machines as well takes clients of its own.
///
/// # Errors
/// [`NoConnections`].
pub async fn config() -> Result<SdkConfig, NoConnections> {
    let config = aws_config::defaults(BehaviorVersion::latest())
        .http_client(Connections::new()?)
        .credentials_provider(EnvironmentVariableCredentialsProvider::new())
        .region(EnvironmentVariableRegionProvider::new())
        .retry_config(RetryConfig::standard().with_max_attempts(3))
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(Duration::from_secs(1))
                .operation_attempt_timeout(Duration::from_secs(2))
                .operation_timeout(Duration::from_secs(5))
                .build(),
        );
    Ok(config.load().await)
}
