//! Uploads: files that tenants put into the documents' bucket themselves, by a link that was signed for them.
//! Pure; [`crate::aws::upload_records`] keeps the records, [`crate::aws::uploads`] signs, reads and deletes.
//!
//! An upload is a record of its own beside the document's: a link stays good for minutes, whatever becomes of the
//! document meanwhile. As long as there is a record, the file may come, or is to be read; what comes without one is
//! nobody's.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::clock::Timestamp;
use crate::credential::CredentialId;
use crate::document::{Awaited, ContentType, as_text};
use crate::groups::Groups;
use crate::ids::{DocumentId, InvalidId, UploadId, UserId};
use crate::scope::RequestId;
use crate::tenant::TenantId;

/// The longest file, in bytes.
pub const MOST_BYTES: u64 = 50 << 20;
/// How long after its link a file that has come is still tried, in milliseconds: longer than the queue tries it.
const TRIED_FOR_MS: i64 = 3_600_000;

/// An upload that was begun: an item of table `documents`, but for its [`Description`]. So what decides about an upload
/// or forgets it needs no key of its tenant's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// The tenant.
    pub tenant_id: TenantId,
    /// The upload.
    pub upload_id: UploadId,
    /// The document whose content it is to be.
    pub document_id: DocumentId,
    /// Who of the tenant's users may find it.
    #[serde(default, skip_serializing_if = "Groups::is_empty")]
    pub groups: Groups,
    /// What kind of file was announced.
    pub content_type: ContentType,
    /// What its text was announced to be in, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub charset: Option<String>,
    /// How long it was announced to be, in bytes.
    pub size_bytes: u64,
    /// Who began it.
    pub key_id: CredentialId,
    /// For which user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    /// By which request.
    pub request_id: RequestId,
    /// When it was begun.
    pub created_at: Timestamp,
    /// When its link ends.
    pub expires_at: Timestamp,
    /// How often somebody has begun to read the file.
    pub attempts: u32,
    /// Until when the one who reads it now has it. One that is past was cut off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claimed_until: Option<Timestamp>,
}

impl Upload {
    /// Where the file is.
    pub fn place(&self) -> UploadPlace {
        UploadPlace { tenant_id: self.tenant_id.clone(), upload_id: self.upload_id.clone() }
    }

    /// From when on nobody waits for it any more.
    pub fn awaited_until(&self) -> Timestamp {
        self.expires_at.plus_millis(TRIED_FOR_MS)
    }

    /// What its document says of it.
    pub fn awaited(&self) -> Awaited {
        Awaited { upload_id: self.upload_id.clone(), until: self.awaited_until(), taken: false }
    }

    /// Whether somebody reads it now.
    pub fn is_claimed(&self, now: Timestamp) -> bool {
        self.claimed_until.is_some_and(|until| now < until)
    }
}

/// What the document of an upload is called, as whoever began it has written: in the same item, and sealed there where
/// the tenant has a key of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The document's title.
    pub title: String,
    /// Where it came from; may be empty.
    #[serde(default)]
    pub source: String,
    /// The tenant's own notes on it.
    #[serde(default, skip_serializing_if = "Map::is_empty", with = "as_text")]
    pub metadata: Map<String, Value>,
}

/// The object of an upload: `tenant=<tenant>/uploads/<upload>`. Nothing is proven by one: whoever can put an object
/// chooses its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadPlace {
    /// Whose it is.
    pub tenant_id: TenantId,
    /// Which it is.
    pub upload_id: UploadId,
}

impl fmt::Display for UploadPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tenant={}/uploads/{}", self.tenant_id, self.upload_id)
    }
}

impl FromStr for UploadPlace {
    type Err = InvalidId;

    /// Reads the object's key.
    fn from_str(key: &str) -> Result<Self, InvalidId> {
        let wrong = InvalidId::new("an upload's key is tenant=<tenant>/uploads/<upload>");
        let (tenant, upload) =
            key.strip_prefix("tenant=").and_then(|rest| rest.split_once("/uploads/")).ok_or(wrong)?;
        Ok(Self { tenant_id: tenant.parse().map_err(|_| wrong)?, upload_id: upload.parse()? })
    }
}

/// An upload that the table holds: what a decision about it may rest on. [`crate::aws::upload_records`] gives it,
/// and nobody else can make one up.
#[derive(Debug)]
pub struct Begun(Upload);

impl Begun {
    /// The upload as it was read.
    #[cfg(feature = "dynamodb")]
    pub(crate) const fn of(upload: Upload) -> Self {
        Self(upload)
    }

    /// The upload.
    pub const fn upload(&self) -> &Upload {
        &self.0
    }
}

/// What the authorizer of uploads finds out about one whose file has come.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ruling", rename_all = "snake_case")]
pub enum Ruling {
    /// It is under way, of a tenant at work: as the authorizer of requests says it, in a flat context.
    Scope {
        /// The context.
        context: HashMap<String, Value>,
        /// Whether the key or issuer that began it may still write documents. If not, all that is left to do is to
        /// say so and to delete the file.
        may_write: bool,
    },
    /// The tenant is switched off. It may be on again.
    Suspended,
    /// It is over, or its tenant is gone.
    Over,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::entropy;

    #[test]
    fn an_objects_key_is_one_upload_of_one_tenant() {
        let upload_id = UploadId::new(&mut entropy());
        let place = UploadPlace { tenant_id: "acme-1".parse().unwrap(), upload_id: upload_id.clone() };
        assert_eq!(place.to_string(), format!("tenant=acme-1/uploads/{upload_id}"));
        assert_eq!(place.to_string().parse::<UploadPlace>().unwrap(), place);
        for bad in [
            String::new(),
            upload_id.to_string(),
            format!("tenant=acme-1/{upload_id}"),
            format!("tenant=acme-1/uploads/{upload_id}/"),
            format!("tenant=acme-1/uploads/x/uploads/{upload_id}"),
            format!("tenant=ACME/uploads/{upload_id}"),
            format!("tenant=acme--1/uploads/{upload_id}"),
            format!("/tenant=acme-1/uploads/{upload_id}"),
            "tenant=acme-1/uploads/upl_short".to_owned(),
        ] {
            assert!(bad.parse::<UploadPlace>().is_err(), "{bad}");
        }
    }
}
