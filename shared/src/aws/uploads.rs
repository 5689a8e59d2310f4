//! The documents' bucket: what tenants have uploaded, each below a prefix of its own.

use aws_sdk_s3::Client;
use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::operation::delete_object::{DeleteObjectError, DeleteObjectOutput};
use tokio::task::{JoinError, JoinSet};

use super::audit_objects::{ObjectError, failed, settings, unavailable};
use super::session::Access;
use crate::scope::{Erasure, Subject};

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

impl Uploads {
    /// The bucket of that name.
    pub fn new(access: &Access, bucket: String) -> Self {
        Self { access: access.clone(), bucket }
    }

    fn client(&self, erasure: &Erasure) -> Client {
        self.access.of(erasure.tenant_id()).s3(settings).clone()
    }

    /// How many versions and delete markers a page of a tenant's has. Brings where to go on, if there may be
    /// more.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub async fn count(&self, erasure: &Erasure, from: Onward) -> Result<(u64, Option<Onward>), ObjectError> {
        let (versions, next) = self.page(erasure, from).await?;
        Ok((versions.len() as u64, next))
    }

    /// Deletes a page of a tenant's versions and delete markers. Brings where to go on, if there may be more.
    ///
    /// # Errors
    /// [`ObjectError`]; what was deleted until then stays so.
    pub async fn delete(&self, erasure: &Erasure, from: Onward) -> Result<Option<Onward>, ObjectError> {
        let (versions, next) = self.page(erasure, from).await?;
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
        erasure: &Erasure,
        from: Onward,
    ) -> Result<(Vec<Version>, Option<Onward>), ObjectError> {
        let answer = self
            .client(erasure)
            .list_object_versions()
            .bucket(&self.bucket)
            .prefix(format!("tenant={}/", erasure.tenant_id()))
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

fn joined(bucket: &str, ended: Option<Result<Deleted, JoinError>>) -> Result<(), ObjectError> {
    match ended {
        None => Ok(()),
        Some(Ok(deleted)) => deleted.map(drop).map_err(|e| failed(bucket, e)),
        Some(Err(error)) => Err(unavailable(bucket, "cut off", error.into())),
    }
}
