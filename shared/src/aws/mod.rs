//! The stores on AWS. The only importers of `aws_sdk_*`.

#[cfg(any(feature = "dynamodb", feature = "invoke", feature = "objects", feature = "secrets"))]
use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};

#[cfg(feature = "dynamodb")]
pub mod accounts;
#[cfg(feature = "objects")]
pub mod audit_objects;
#[cfg(all(feature = "dynamodb", feature = "audit-log"))]
pub mod chains;
mod config;
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
#[cfg(feature = "secrets")]
mod secrets_manager;
mod session;
#[cfg(feature = "dynamodb")]
mod table;
#[cfg(feature = "dynamodb")]
pub mod tenants;
#[cfg(feature = "invoke")]
pub mod upload_authorizer;
#[cfg(feature = "dynamodb")]
pub mod upload_records;

#[cfg(all(feature = "dynamodb", feature = "objects"))]
pub mod uploads;
#[cfg(feature = "dynamodb")]
pub mod usage;
#[cfg(all(feature = "dynamodb", feature = "webhooks"))]
pub mod webhooks;

pub use aws_types::SdkConfig;
pub use config::{NoConfig, config};
pub use session::{Access, LINKS_HOLD};
#[cfg(feature = "dynamodb")]
pub use table::StoreError;

/// The name of what went wrong with a call: the service's own, or what kept it from answering.
#[cfg(any(feature = "dynamodb", feature = "invoke", feature = "objects", feature = "secrets"))]
fn failure_code<E: ProvideErrorMetadata, R>(error: &SdkError<E, R>) -> String {
    match error {
        SdkError::TimeoutError(_) => "timeout",
        SdkError::DispatchFailure(_) => "unreachable",
        other => other.code().unwrap_or("unknown"),
    }
    .to_owned()
}
