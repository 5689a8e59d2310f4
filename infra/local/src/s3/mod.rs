//! S3 on a directory: versions, Object Lock, conditional writes, checksums, multipart uploads.
//!
//! The protocol (routing, XML, Signature Version 4 in headers, chunks and query strings) is the
//! crate `s3s`; what is stored and what is refused is ours. An operation that is not implemented,
//! or an option of an operation that would change what is stored, is answered `NotImplemented`:
//! success is never pretended.
//!
//! Differences from AWS that a caller can meet: buckets have no policies of their own, only callers
//! have; listings of versions are complete as soon as a write has returned; a write is durable against
//! the end of the process but not synced against loss of power.

mod access;
mod body;
mod cors;
mod listing;
mod rules;
mod service;
mod sse;
mod store;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::error_handling::HandleError;
use http::StatusCode;
use s3s::auth::{S3Auth, SecretKey};
use s3s::service::S3ServiceBuilder;
use s3s::{HttpError, S3Result, s3_error};
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedSender;

use self::access::Policies;
use crate::iam::Callers;
use crate::kms::Kms;
use crate::template;

/// Why the server ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory could not be read or created, or a file in it is not what we wrote.
    #[error("cannot open the object store in {directory}")]
    Open {
        /// The directory.
        directory: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A bucket could not be set up.
    #[error("bucket {name} cannot be set up: {reason}")]
    Bucket {
        /// The bucket.
        name: String,
        /// What went wrong.
        reason: String,
    },
    /// The listener failed.
    #[error("cannot serve S3")]
    Serve(#[source] std::io::Error),
}

/// What the server is given.
#[derive(Debug)]
pub struct Options {
    /// Everything is kept under this directory; it is created if absent.
    pub directory: PathBuf,
    /// Who may sign requests, and what for.
    pub callers: Arc<Callers>,
    /// What makes data keys for objects, and opens them.
    pub kms: Arc<Kms>,
    /// Buckets that are there from the start, set up as the template says.
    pub buckets: Vec<template::Bucket>,
    /// Told of each object written or removed, after it has happened.
    pub events: Option<UnboundedSender<ObjectEvent>>,
}

/// An event in the terms of S3 event notifications.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectEvent {
    /// As in a notification: `ObjectCreated:Put`, `ObjectRemoved:DeleteMarkerCreated` and so on.
    pub name: &'static str,
    /// The bucket.
    pub bucket: String,
    /// The key as it is, not URL-encoded.
    pub key: String,
    /// The version, in buckets that keep versions.
    pub version_id: Option<String>,
    /// Bytes of the object; 0 for removals.
    pub size: u64,
    /// The object's entity tag without quotes; empty for removals.
    pub etag: String,
    /// When it happened.
    pub time: OffsetDateTime,
}

/// Serves S3 until `shutdown` resolves. `now` decides about retention and dates objects; request
/// signatures are checked against the machine's clock.
pub async fn serve(
    listener: TcpListener,
    options: Options,
    now: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let directory = options.directory;
    let opened = {
        let directory = directory.clone();
        tokio::task::spawn_blocking(move || store::Store::open(directory)).await
    };
    let store = opened
        .map_err(std::io::Error::other)
        .and_then(|result| result)
        .map_err(|source| Error::Open { directory, source })?;
    for bucket in &options.buckets {
        let set_up = store.set_up(bucket, now());
        set_up.map_err(|error| Error::Bucket { name: bucket.name.clone(), reason: error.to_string() })?;
    }
    let rules = options.buckets.into_iter().map(|bucket| (bucket.name, bucket.cors)).collect();
    let service = service::Service::new(Arc::new(store), options.kms, Arc::new(now), options.events);
    let mut builder = S3ServiceBuilder::new(service);
    builder.set_auth(Keys(Arc::clone(&options.callers)));
    builder.set_access(Policies(options.callers));
    let router = Router::new().fallback_service(HandleError::new(builder.build(), aborted));
    let router =
        router.layer(axum::middleware::from_fn_with_state(cors::Rules(Arc::new(rules)), cors::answer));
    crate::serving::serve(listener, router, shutdown).await.map_err(Error::Serve)
}

async fn aborted(error: HttpError) -> StatusCode {
    tracing::error!(error = ?error, "an S3 request could not be answered");
    StatusCode::INTERNAL_SERVER_ERROR
}

/// The callers' access keys.
struct Keys(Arc<Callers>);

#[async_trait::async_trait]
impl S3Auth for Keys {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        match self.0.by_key(access_key) {
            Some(caller) => Ok(SecretKey::from(caller.credentials.secret_access_key.as_str())),
            None => Err(s3_error!(
                InvalidAccessKeyId,
                "The AWS Access Key Id you provided does not exist in our records."
            )),
        }
    }
}
