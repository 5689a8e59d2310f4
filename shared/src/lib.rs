//! Bulkhead's domain: identity, limits, prices, prompts, and the stores behind them.
//!
//! Modules without a feature are pure: values in, values out, no clock, no network. A feature adds
//! what one function needs and another does not, so that each binary links only its own share.
//! [`aws`] is the only module that imports `aws_sdk_*`.

#[cfg(test)]
mod answering;
pub mod api_key;
#[cfg(feature = "audit-log")]
pub mod audit_filter;
#[cfg(feature = "audit-log")]
pub mod audit_log;
#[cfg(feature = "audit-log")]
pub mod audit_verify;
pub mod breaker;
pub mod cause;
#[cfg(feature = "chunk")]
pub mod chunk;
pub mod clock;
pub mod conversation;
pub mod credential;
pub mod deprovisioning;
pub mod document;
pub mod env;
pub mod error;
pub mod groups;
pub mod idempotency;
pub mod ids;
pub mod internet;
pub mod issuer;
pub mod item_key;
pub mod ledger;
pub mod limits;
#[cfg(any(feature = "model", feature = "prompt"))]
pub mod messages;
pub mod meter;
pub mod metrics;
pub mod network;
pub mod new_key;
pub mod one_line;
pub mod placement;
pub mod pressure;
pub mod pricing;
pub mod random;
pub mod ranking;
pub mod roots;
pub mod scope;
pub mod sealing;
pub mod secret;
pub mod tally;
pub mod telemetry;
pub mod tenant;
pub mod trace;
pub mod units;
pub mod upload;
pub mod usage;

#[cfg(any(feature = "dynamodb", feature = "secrets"))]
pub mod aws;
#[cfg(any(feature = "dynamodb", feature = "secrets", feature = "vectors"))]
mod connector;
#[cfg(feature = "dynamodb")]
pub mod denials;
#[cfg(feature = "retrieval")]
pub mod editions;
#[cfg(feature = "embeddings")]
pub mod embeddings;
#[cfg(feature = "dynamodb")]
pub mod gate;
#[cfg(feature = "vectors")]
mod grpc;
#[cfg(feature = "prompt")]
pub mod injection;
#[cfg(feature = "tokens")]
pub mod jwt;
#[cfg(feature = "key-sets")]
pub mod key_sets;
#[cfg(feature = "model")]
pub mod model;
#[cfg(feature = "outbound")]
pub mod outbound;
#[cfg(feature = "prompt")]
pub mod prompt;
#[cfg(feature = "retrieval")]
pub mod rerank;
#[cfg(feature = "retrieval")]
pub mod retrieval;
#[cfg(any(feature = "dynamodb", feature = "outbound", feature = "vectors"))]
pub mod retry;
#[cfg(feature = "start")]
pub mod start;
#[cfg(feature = "dynamodb")]
pub mod valve;
#[cfg(feature = "vector-tokens")]
pub mod vector_token;
#[cfg(feature = "vectors")]
pub mod vectors;
#[cfg(feature = "web")]
pub mod web;
#[cfg(feature = "webhooks")]
pub mod webhook;
