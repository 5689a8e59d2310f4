//! The documents' bucket: what tenants have uploaded, each below a prefix of its own.

use std::collections::BTreeMap;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::RequestChecksumCalculation;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::delete_object::{DeleteObjectError, DeleteObjectOutput};
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::ServerSideEncryption;
use aws_types::SdkConfig;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, timeout_at};

use super::audit_objects::{ObjectError, failed, unavailable};
use super::data_keys::{DataKeyError, REFUSALS};
use super::failure_code;
use super::session::{Access, LINKS_HOLD, TENANT_TAG};
use crate::document::ContentType;
use crate::scope::{Erasure, Expired, Subject, TenantScope};
use crate::trace;
use crate::upload::{Upload, UploadPlace};

/// The bucket.
#[derive(Clone, Debug)]
pub struct Uploads {
    access: Access,
    bucket: String,
}

/// A version of an object, or a delete marker: its key, and which it is.
type Version = (String, Option<String>);
/// What comes of a deletion.
type Deleted = Result<DeleteObjectOutput, SdkError<DeleteObjectError>>;
/// Deletions under way at once.
const AT_ONCE: usize = 16;

/// Where a list goes on.
#[derive(Clone, Debug, Default)]
pub struct Onward {
    key: Option<String>,
    version: Option<String>,
}

/// What puts a file: the address, and the headers that have to be sent as they are. Whoever has it can put one file.
#[derive(Clone)]
pub struct Link {
    /// The address.
    pub url: String,
    /// The headers.
    pub headers: BTreeMap<String, String>,
}

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// There is no such file, or it is not as long as was announced.
    #[error("it is not the file that was announced")]
    NotAnnounced,
    /// KMS refuses the key that the file was put with.
    #[error(transparent)]
    Key(DataKeyError),
    /// The bucket did not answer, or not to the end.
    #[error(transparent)]
    Bucket(#[from] ObjectError),
}

/// A link is signed for what its user will send: there is no checksum to calculate before.
fn settings(config: &SdkConfig) -> aws_sdk_s3::Config {
    let settings = super::audit_objects::settings(config).to_builder();
    settings.request_checksum_calculation(RequestChecksumCalculation::WhenRequired).build()
}

impl Uploads {
    /// The bucket of that name.
    pub fn new(access: &Access, bucket: String) -> Self {
        Self { access: access.clone(), bucket }
    }

    fn client(&self, subject: &impl Subject) -> Client {
        self.access.of(subject.tenant_id()).s3(settings).clone()
    }

    /// A link under which anybody can put a file there for as long as it `holds`, [`super::LINKS_HOLD`] at most: of the
    /// kind and length that were announced, and only where there is none yet; encrypted with the tenant's own key, if it
    /// has one. All that is in the signature, so that S3 refuses everything else.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn link(
        &self,
        scope: &TenantScope,
        place: &UploadPlace,
        (content_type, size_bytes): (ContentType, u64),
        holds: Duration,
    ) -> Result<Link, ObjectError> {
        let key = of(scope, place)?;
        let config = PresigningConfig::expires_in(holds.min(LINKS_HOLD));
        let config = config.map_err(|e| unavailable(&self.bucket, "no such period", e.into()))?;
        let length =
            i64::try_from(size_bytes).map_err(|e| unavailable(&self.bucket, "no such length", e.into()))?;
        let put = self
            .client(scope)
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .content_length(length)
            .content_type(content_type.media_type())
            .if_none_match("*");
        let put = match scope.kms_key() {
            // S3 asks KMS for the data key as the one who has signed, and again as whoever reads the file: so it is bound
            // to the tenant like all others of it, and the tenant roles' policies hold for it.
            Some(key) => put
                .server_side_encryption(ServerSideEncryption::AwsKms)
                .ssekms_key_id(key.as_str())
                .ssekms_encryption_context(context(scope)),
            None => put,
        };
        let signed = put.presigned(config).await.map_err(|e| failed(&self.bucket, e))?;
        // The SDK tells S3 where this request is in its trace. The file's sender is in none of ours.
        let own = signed.headers().filter(|(name, _)| !name.eq_ignore_ascii_case(trace::HEADER));
        let headers = own.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Ok(Link { url: signed.uri().to_owned(), headers: headers.collect() })
    }

    /// The file, if it is as long as was announced. No more of it is held than that. It may be `sealed` with a key of
    /// KMS: then S3 may refuse because of that.
    ///
    /// # Errors
    /// [`Unread`].
    pub async fn read(
        &self,
        scope: &TenantScope,
        (upload, sealed): (&Upload, bool),
        deadline: Instant,
    ) -> Result<Vec<u8>, Unread> {
        let key = of(scope, &upload.place())?;
        let answer = self.client(scope).get_object().bucket(&self.bucket).key(key).send().await;
        let answer = match answer {
            Err(error) if error.as_service_error().is_some_and(|error| error.is_no_such_key()) => {
                return Err(Unread::NotAnnounced);
            }
            Err(error) if sealed && refuses_key(error.code(), error.message()) => {
                let code = failure_code(&error);
                return Err(Unread::Key(DataKeyError::Refused { code, source: Box::new(error) }));
            }
            answer => answer.map_err(|e| failed(&self.bucket, e))?,
        };
        let announced = usize::try_from(upload.size_bytes).unwrap_or(usize::MAX);
        if answer.content_length.and_then(|length| usize::try_from(length).ok()) != Some(announced) {
            return Err(Unread::NotAnnounced);
        }
        let mut body = answer.body;
        let mut file = Vec::with_capacity(announced);
        loop {
            let next = timeout_at(deadline, body.try_next()).await;
            let next = next.map_err(|e| unavailable(&self.bucket, "timeout", e.into()))?;
            match next.map_err(|e| unavailable(&self.bucket, "cut off", e.into()))? {
                Some(bytes) if file.len() + bytes.len() <= announced => file.extend_from_slice(&bytes),
                Some(_) => return Err(Unread::NotAnnounced),
                None if file.len() == announced => return Ok(file),
                None => return Err(Unread::NotAnnounced),
            }
        }
    }

    /// Takes a file away in all its versions, for good: in its place is an empty one, so that nobody can put a file
    /// by the same link any more. The bucket forgets that by itself when the link has ended.
    ///
    /// # Errors
    /// [`ObjectError`]; some of it may be done.
    pub async fn close(&self, scope: &TenantScope, place: &UploadPlace) -> Result<(), ObjectError> {
        let key = of(scope, place)?;
        let empty = self.client(scope).put_object().bucket(&self.bucket).key(&key);
        let kept =
            empty.body(ByteStream::from_static(b"")).send().await.map_err(|e| failed(&self.bucket, e))?;
        self.delete_versions(scope, &key, kept.version_id.as_deref()).await.map(drop)
    }

    /// Takes a file away whose upload nobody awaits any more, and says whether there was one.
    ///
    /// # Errors
    /// [`ObjectError`]; some of it may be done.
    pub async fn expire(&self, expired: &Expired, place: &UploadPlace) -> Result<bool, ObjectError> {
        let key = of(expired, place)?;
        Ok(self.delete_versions(expired, &key, None).await? > 0)
    }

    /// Deletes the versions of one object but for the one that is kept, and says how many.
    async fn delete_versions(
        &self,
        subject: &impl Subject,
        key: &str,
        kept: Option<&str>,
    ) -> Result<usize, ObjectError> {
        let (mut count, mut from) = (0, Some(Onward::default()));
        while let Some(place) = from {
            let (versions, next) = self.page(subject, key, place).await?;
            for (of, version) in versions {
                if of != key || version.as_deref() == kept {
                    continue;
                }
                let call = self.client(subject).delete_object().bucket(&self.bucket).key(key);
                call.set_version_id(version).send().await.map_err(|e| failed(&self.bucket, e))?;
                count += 1;
            }
            from = next;
        }
        Ok(count)
    }

    /// How many versions and delete markers a page of a tenant's has. Brings where to go on, if there may be
    /// more.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn count(&self, erasure: &Erasure, from: Onward) -> Result<(u64, Option<Onward>), ObjectError> {
        let (versions, next) = self.page(erasure, &prefix(erasure), from).await?;
        Ok((versions.len() as u64, next))
    }

    /// Deletes a page of a tenant's versions and delete markers. Brings where to go on, if there may be more.
    ///
    /// # Errors
    /// [`ObjectError`]; what was deleted until then stays so.
    pub async fn delete(&self, erasure: &Erasure, from: Onward) -> Result<Option<Onward>, ObjectError> {
        let (versions, next) = self.page(erasure, &prefix(erasure), from).await?;
        let client = self.client(erasure);
        let mut deletions = JoinSet::new();
        for (key, version) in versions {
            if deletions.len() >= AT_ONCE {
                joined(&self.bucket, deletions.join_next().await)?;
            }
            let call = client.delete_object().bucket(&self.bucket).key(key).set_version_id(version);
            deletions.spawn(async move { call.send().await });
        }
        while !deletions.is_empty() {
            joined(&self.bucket, deletions.join_next().await)?;
        }
        Ok(next)
    }

    async fn page(
        &self,
        subject: &impl Subject,
        prefix: &str,
        from: Onward,
    ) -> Result<(Vec<Version>, Option<Onward>), ObjectError> {
        let answer = self
            .client(subject)
            .list_object_versions()
            .bucket(&self.bucket)
            .prefix(prefix)
            .set_key_marker(from.key)
            .set_version_id_marker(from.version)
            .send()
            .await
            .map_err(|e| failed(&self.bucket, e))?;
        let versions = answer.versions.unwrap_or_default().into_iter().map(|v| (v.key, v.version_id));
        let markers = answer.delete_markers.unwrap_or_default().into_iter().map(|m| (m.key, m.version_id));
        let all = versions.chain(markers).filter_map(|(key, version)| Some((key?, version)));
        let next = (answer.is_truncated == Some(true))
            .then_some(Onward { key: answer.next_key_marker, version: answer.next_version_id_marker });
        Ok((all.collect(), next))
    }
}

/// What a file's data key is bound to, beside the object's own name: as S3 takes it, JSON in base64.
fn context(subject: &impl Subject) -> String {
    STANDARD.encode(json!({TENANT_TAG: subject.tenant_id().as_str()}).to_string())
}

/// Whether S3 refuses an encrypted file because KMS refuses its key: it hands on what KMS says of that, as
/// `KMS.DisabledException`, with 400. Where the caller may not use the key it is S3's own refusal, in one of several
/// wordings, or in none; one that is about S3 itself names the action. Whatever else S3 answers, what KMS says when it is
/// overloaded included, is an outage.
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html#ErrorCodeList>
fn refuses_key(code: Option<&str>, message: Option<&str>) -> bool {
    match code {
        // An action follows a blank; in a resource's name, `arn:aws:s3:::`, there is a colon before.
        Some("AccessDenied") => !message.is_some_and(|message| message.contains(" s3:")),
        Some(code) => code.strip_prefix("KMS.").is_some_and(|code| REFUSALS.contains(&code)),
        None => false,
    }
}

/// What all keys of a tenant's begin with.
fn prefix(subject: &impl Subject) -> String {
    format!("tenant={}/", subject.tenant_id())
}

/// The key of a file, if it is the subject's: the second look.
fn of(subject: &impl Subject, place: &UploadPlace) -> Result<String, ObjectError> {
    if place.tenant_id == *subject.tenant_id() { Ok(place.to_string()) } else { Err(ObjectError::Foreign) }
}

fn joined(bucket: &str, ended: Option<Result<Deleted, JoinError>>) -> Result<(), ObjectError> {
    match ended {
        None => Ok(()),
        Some(Ok(deleted)) => deleted.map(drop).map_err(|e| failed(bucket, e)),
        Some(Err(error)) => Err(unavailable(bucket, "cut off", error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_refused_is_told_from_a_bucket_that_is() {
        let session = "User: arn:aws:sts::123456789012:assumed-role/bulkhead-UploadIngestionTenantRole/acme";
        let because = "because no identity-based policy allows the";
        let denied = |message: &str| refuses_key(Some("AccessDenied"), Some(message));
        for message in [
            "Access Denied",
            "The ciphertext refers to a customer master key that does not exist, does not exist in this region, or you are not allowed to access",
            &format!(
                "{session} is not authorized to perform: kms:Decrypt on resource: \
                 arn:aws:kms:us-east-1:111122223333:key/1b2c3d4e-0000-4000-8000-000000000000 {because} kms:Decrypt action"
            ),
            &format!(
                "{session} is not authorized to perform: kms:Decrypt on this resource because the resource does not \
                 exist in this Region, no resource-based policies allow access, or a resource-based policy explicitly \
                 denies access"
            ),
            "arn:aws:s3:::bulkhead-documents/tenant=acme/uploads/x cannot be opened",
        ] {
            assert!(denied(message), "{message}");
        }
        for action in ["s3:GetObject", "s3:ListBucket"] {
            let message = format!(
                "{session} is not authorized to perform: {action} on resource: \
                 \"arn:aws:s3:::bulkhead-documents/tenant=acme/uploads/x\" {because} {action} action"
            );
            assert!(!denied(&message), "{message}");
        }
        assert!(refuses_key(Some("AccessDenied"), None));
        for code in ["KMS.DisabledException", "KMS.KMSInvalidStateException", "KMS.NotFoundException"] {
            assert!(refuses_key(Some(code), Some("arn:aws:kms:… is disabled.")), "{code}");
        }
        for code in [
            "KMS.ThrottlingException",
            "KMS.KMSInternalException",
            "KMS.DependencyTimeoutException",
            "KMS.",
            "DisabledException",
            "ServiceUnavailable",
            "NoSuchBucket",
        ] {
            assert!(!refuses_key(Some(code), Some("Access Denied")), "{code}");
        }
        assert!(!refuses_key(None, Some("Access Denied")));
    }
}
