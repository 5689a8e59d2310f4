//! The audit log's bucket: objects that are put once and locked, and read by their first version,
//! whatever was put over them or marks them deleted.

use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{ChecksumAlgorithm, ObjectLockMode};
use aws_types::SdkConfig;

use super::session::{Access, LINKS_HOLD};
use crate::audit_log::{HEAD, Head, tenant_prefix};
use crate::audit_verify::Kept;
use crate::clock::Timestamp;
use crate::scope::{Subject, Ward};

/// The bucket.
#[derive(Clone, Debug)]
pub struct AuditObjects {
    access: Access,
    bucket: String,
}

/// Why the bucket gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// It did not answer, or refused. Whether an object was put is unknown.
    #[error("bucket {bucket} did not answer: {code}")]
    Unavailable {
        /// The bucket.
        bucket: String,
        /// S3's error code, or what kind of failure it was.
        code: String,
        /// The failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A key that is none of the tenant's was named. It must never happen.
    #[error("a key of another tenant")]
    Foreign,
}

/// An object's first version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct First {
    /// The object's key.
    pub key: String,
    /// The version.
    pub version: String,
}

impl AuditObjects {
    /// The bucket of that name.
    pub fn new(access: &Access, bucket: String) -> Self {
        Self { access: access.clone(), bucket }
    }

    fn client(&self, subject: &impl Subject) -> Client {
        self.access.of(subject.tenant_id()).s3(settings).clone()
    }

    /// Puts an object that is not there, locked until `retain_until`. Says whether it did; if not, there
    /// is one.
    ///
    /// # Errors
    /// [`ObjectError`]; then it may be there.
    pub async fn put(
        &self,
        ward: &Ward,
        key: &str,
        bytes: Vec<u8>,
        retain_until: Timestamp,
    ) -> Result<bool, ObjectError> {
        own(ward, key)?;
        let put = self
            .client(ward)
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .body(ByteStream::from(bytes))
            .content_type("application/gzip")
            .if_none_match("*")
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .object_lock_mode(ObjectLockMode::Compliance)
            .object_lock_retain_until_date(DateTime::from_millis(retain_until.as_millis()));
        match put.send().await {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some("PreconditionFailed") => Ok(false),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Puts the file that says where the log ends.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn put_head(
        &self,
        ward: &Ward,
        head: &Head,
        retain_until: Timestamp,
    ) -> Result<(), ObjectError> {
        let text = serde_json::to_vec(head).map_err(|e| self.unavailable("unserialisable", e.into()))?;
        self.client(ward)
            .put_object()
            .bucket(&self.bucket)
            .key(format!("{}{HEAD}", tenant_prefix(ward.tenant_id())))
            .body(ByteStream::from(text))
            .content_type("application/json")
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .object_lock_mode(ObjectLockMode::Compliance)
            .object_lock_retain_until_date(DateTime::from_millis(retain_until.as_millis()))
            .send()
            .await
            .map_err(|e| self.failed(e))?;
        Ok(())
    }

    /// The first version of the object under exactly this key, if there ever was one.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn first(&self, subject: &impl Subject, key: &str) -> Result<Option<First>, ObjectError> {
        let (found, _) = self.page(subject, key, None).await?;
        Ok(found.into_iter().find(|first| first.key == key))
    }

    /// A page of a tenant's objects whose keys begin with `prefix`, in the order of their keys, and the
    /// key to go on after.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn page(
        &self,
        subject: &impl Subject,
        prefix: &str,
        after: Option<String>,
    ) -> Result<(Vec<First>, Option<String>), ObjectError> {
        own(subject, prefix)?;
        let answer = self
            .client(subject)
            .list_object_versions()
            .bucket(&self.bucket)
            .prefix(prefix)
            .set_key_marker(after)
            .send()
            .await
            .map_err(|e| self.failed(e))?;
        let mut found: Vec<First> = Vec::new();
        // Of each key the latest come first, so that the last one seen is the first there was.
        for version in answer.versions() {
            let (Some(key), Some(id)) = (version.key(), version.version_id()) else { continue };
            let first = First { key: key.to_owned(), version: id.to_owned() };
            match found.last_mut() {
                Some(last) if last.key == key => *last = first,
                _ => found.push(first),
            }
        }
        let mut next = answer.next_key_marker.filter(|_| answer.is_truncated == Some(true));
        // A page may end between the versions of a key. That key is left to the next page, unless it
        // is all that this one has.
        if let Some(marker) = &next
            && found.len() > 1
            && found.last().is_some_and(|last| last.key == *marker)
        {
            found.pop();
            next = found.last().map(|last| last.key.clone());
        }
        Ok((found, next))
    }

    /// An object's bytes.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn read(&self, subject: &impl Subject, first: &First) -> Result<Vec<u8>, ObjectError> {
        Ok(self.read_kept(subject, first).await?.1)
    }

    /// How long the bucket keeps an object, and its bytes. To whoever lacks the permission
    /// `s3:GetObjectRetention` every object seems unlocked.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn read_kept(
        &self,
        subject: &impl Subject,
        first: &First,
    ) -> Result<(Kept, Vec<u8>), ObjectError> {
        own(subject, &first.key)?;
        let call = self.client(subject).get_object().bucket(&self.bucket).key(&first.key);
        let answer = call.version_id(&first.version).send().await.map_err(|e| self.failed(e))?;
        let locked = answer.object_lock_mode == Some(ObjectLockMode::Compliance);
        let until = answer.object_lock_retain_until_date.filter(|_| locked);
        let until = until.and_then(|until| until.to_millis().ok());
        let kept = until.map_or(Kept::Unlocked, |ms| Kept::Until(Timestamp::from_millis(ms)));
        let bytes = answer.body.collect().await.map_err(|e| self.unavailable("cut off", e.into()))?;
        Ok((kept, bytes.to_vec()))
    }

    /// A link under which anybody can fetch an object for [`LINKS_HOLD`].
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn link(&self, subject: &impl Subject, first: &First) -> Result<String, ObjectError> {
        own(subject, &first.key)?;
        let config = PresigningConfig::expires_in(LINKS_HOLD);
        let config = config.map_err(|e| self.unavailable("no such period", e.into()))?;
        let call =
            self.client(subject).get_object().bucket(&self.bucket).key(&first.key).version_id(&first.version);
        let signed = call.presigned(config).await.map_err(|e| self.failed(e))?;
        Ok(signed.uri().to_owned())
    }

    fn failed<E, R>(&self, error: SdkError<E, R>) -> ObjectError
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
        R: std::fmt::Debug + Send + Sync + 'static,
    {
        failed(&self.bucket, error)
    }

    fn unavailable(&self, code: &str, source: Box<dyn std::error::Error + Send + Sync>) -> ObjectError {
        unavailable(&self.bucket, code, source)
    }
}

/// A call of a bucket that failed.
pub(super) fn failed<E, R>(bucket: &str, error: SdkError<E, R>) -> ObjectError
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    R: std::fmt::Debug + Send + Sync + 'static,
{
    let code = super::failure_code(&error);
    unavailable(bucket, &code, error.into())
}

pub(super) fn unavailable(
    bucket: &str,
    code: &str,
    source: Box<dyn std::error::Error + Send + Sync>,
) -> ObjectError {
    ObjectError::Unavailable { bucket: bucket.to_owned(), code: code.to_owned(), source }
}

/// An object of some 100 kB takes longer than an item, and more than one attempt costs nothing.
pub(super) fn settings(config: &SdkConfig) -> aws_sdk_s3::Config {
    aws_sdk_s3::config::Builder::from(config)
        .retry_config(RetryConfig::standard().with_max_attempts(4))
        .timeout_config(
            TimeoutConfig::builder()
                .operation_attempt_timeout(Duration::from_secs(5))
                .operation_timeout(Duration::from_secs(15))
                .build(),
        )
        .build()
}

/// Whether a key or prefix is one of the tenant's: the second look.
fn own(subject: &impl Subject, key: &str) -> Result<(), ObjectError> {
    if key.starts_with(&tenant_prefix(subject.tenant_id())) { Ok(()) } else { Err(ObjectError::Foreign) }
}
