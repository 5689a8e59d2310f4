//! The stores on AWS. The only importers of `aws_sdk_*`.

use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, SdkConfig};

#[cfg(feature = "dynamodb")]
pub mod accounts;
#[cfg(feature = "objects")]
pub mod audit_objects;
#[cfg(all(feature = "dynamodb", feature = "audit-log"))]
pub mod chains;
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

#[cfg(feature = "objects")]
pub mod uploads;
#[cfg(feature = "dynamodb")]
pub mod usage;
#[cfg(all(feature = "dynamodb", feature = "webhooks"))]
pub mod webhooks;

pub use session::{Access, LINKS_HOLD};
#[cfg(feature = "dynamodb")]
pub use table::StoreError;

/// The configuration of every AWS client: credentials, region and endpoints from the environment, and
/// a bound on each call. DynamoDB answers in milliseconds; one that takes a second is better asked
/// again.
pub async fn config() -> SdkConfig {
    aws_config::defaults(BehaviorVersion::latest())
        .retry_config(RetryConfig::standard().with_max_attempts(3))
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(Duration::from_secs(1))
                .operation_attempt_timeout(Duration::from_secs(2))
                .operation_timeout(Duration::from_secs(5))
                .build(),
        )
        .load()
        .await
}
