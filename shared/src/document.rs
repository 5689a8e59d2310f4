//! Documents, as the tenant's index knows them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::clock::Timestamp;
use crate::groups::Groups;
use crate::ids::{DocumentId, UploadId};
use crate::limits::Limits;
use crate::tenant::TenantId;

/// Where a document stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DocumentStatus {
    /// Its file is awaited, or waits to be read.
    Pending,
    /// Being indexed.
    Processing,
    /// Found by searches.
    Ready,
    /// Could not be indexed.
    Failed,
}

/// The kinds of documents that can be ingested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContentType {
    /// Plain text.
    #[serde(rename = "text/plain")]
    Plain,
    /// CommonMark.
    #[serde(rename = "text/markdown")]
    Markdown,
    /// HTML.
    #[serde(rename = "text/html")]
    Html,
    /// Comma-separated values.
    #[serde(rename = "text/csv")]
    Csv,
    /// PDF.
    #[serde(rename = "application/pdf")]
    Pdf,
    /// Word's format since 2007.
    #[serde(rename = "application/vnd.openxmlformats-officedocument.wordprocessingml.document")]
    Docx,
}

impl ContentType {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Plain, Self::Markdown, Self::Html, Self::Csv, Self::Pdf, Self::Docx];

    /// Its media type.
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "text/plain",
            Self::Markdown => "text/markdown",
            Self::Html => "text/html",
            Self::Csv => "text/csv",
            Self::Pdf => "application/pdf",
            Self::Docx => "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
        }
    }

    /// The kind that a media type names, its parameters and case aside.
    pub fn parse(media_type: &str) -> Option<Self> {
        let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        Self::ALL.into_iter().find(|kind| kind.media_type() == essence)
    }
}

/// Of documents, the edition in which searches find each: none if in none, or if it is gone.
pub type Editions = BTreeMap<DocumentId, Option<Timestamp>>;

/// A document's record: an item of table `documents`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// The tenant.
    pub tenant_id: TenantId,
    /// The document.
    pub id: DocumentId,
    /// Grows by one with each change of content or groups.
    pub version: u64,
    /// Where it stands.
    pub status: DocumentStatus,
    /// How many passages it was cut into.
    pub chunks: u32,
    /// SHA-256 of everything that was sent but its groups, so that the same again is recognised.
    pub sha256: String,
    /// Its title.
    pub title: String,
    /// Where it came from; empty if the tenant did not say.
    #[serde(default)]
    pub source: String,
    /// What kind of text it is.
    pub content_type: ContentType,
    /// The tenant's own notes on it.
    #[serde(default, skip_serializing_if = "Map::is_empty", with = "as_text")]
    pub metadata: Map<String, Value>,
    /// Whose users find it; everybody's if there are none.
    #[serde(default, skip_serializing_if = "Groups::is_empty")]
    pub groups: Groups,
    /// When it was first sent.
    pub created_at: Timestamp,
    /// When its content last changed: its edition, if it is found in that.
    pub updated_at: Timestamp,
    /// The edition that searches find: the one before while this one is being indexed; none if none ever was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<Timestamp>,
    /// The upload that its content comes by, or came by last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<Awaited>,
    /// Until when whoever is at it may be at work: by then it has ended, or was cut off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_work_until: Option<Timestamp>,
    /// Why it has failed, in a sentence for its sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Drawn anew by each write of the record: of two writers one learns that it lost, and one that got no answer
    /// can do its write again.
    #[serde(default)]
    pub revision: u64,
}

/// What the sender of a document is told whose storing was cut off.
const CUT_OFF: &str = "storing it was cut off; send it again";

/// The upload that a document's content comes by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaited {
    /// The upload.
    pub upload_id: UploadId,
    /// From when on it is not awaited any more.
    pub until: Timestamp,
    /// Whether its content has been taken up: then the document's status is of that.
    #[serde(default)]
    pub taken: bool,
}

impl Document {
    /// Whether it may still be shown: it is not past its retention, and no file that never came.
    pub fn is_kept(&self, limits: &Limits, now: Timestamp) -> bool {
        let awaited = self.upload.as_ref().is_some_and(|awaited| now < awaited.until);
        // What waits for another attempt at its new content is found with the one before.
        let came = self.status != DocumentStatus::Pending || self.current.is_some() || awaited;
        came && self.updated_at > limits.retained_since(now)
    }

    /// Where it stands: where a new version is awaited, with that; and why, if it has failed.
    pub fn standing(&self, now: Timestamp) -> (DocumentStatus, Option<&str>) {
        let awaited = self.upload.as_ref().filter(|awaited| now < awaited.until);
        match (self.status, awaited) {
            (_, Some(awaited)) if !awaited.taken => (DocumentStatus::Pending, None),
            (DocumentStatus::Processing, awaited) if !self.is_at_work(now) => match awaited {
                // Its message comes again.
                Some(_) => (DocumentStatus::Pending, None),
                None => (DocumentStatus::Failed, Some(CUT_OFF)),
            },
            (DocumentStatus::Failed, _) => (DocumentStatus::Failed, self.reason.as_deref()),
            (status, _) => (status, None),
        }
    }

    /// Whether somebody may be storing or deleting it now.
    pub fn is_at_work(&self, now: Timestamp) -> bool {
        self.status == DocumentStatus::Processing && self.at_work_until.is_some_and(|until| now < until)
    }
}

impl Awaited {
    /// Whether a document of that status waits for that upload, or for what came by it to be stored.
    pub fn is_of(&self, id: &UploadId, status: DocumentStatus) -> bool {
        let over = matches!(status, DocumentStatus::Ready | DocumentStatus::Failed);
        self.upload_id == *id && !(self.taken && over)
    }
}

/// The id of a document whose sender chose none: the same document sent again is the same document.
pub fn derived_id(title: &str, source: &str, content: &[u8]) -> DocumentId {
    let digest = hex::encode(fingerprint(&[title.as_bytes(), source.as_bytes(), content]));
    let text = format!("doc_{}", digest.get(..32).unwrap_or(&digest));
    #[expect(clippy::expect_used, reason = "`doc_` and hexadecimal digits are a document id")]
    text.parse().expect("well-formed")
}

/// SHA-256 of `parts` in order, each led by its length, so that no two lists collide.
pub fn fingerprint(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// JSON as a text: the table has fewer numbers than JSON, and fewer levels.
pub(crate) mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de, ser};
    use serde_json::{Map, Value};

    pub(crate) fn serialize<S: Serializer>(map: &Map<String, Value>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&serde_json::to_string(map).map_err(ser::Error::custom)?)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Map<String, Value>, D::Error> {
        serde_json::from_str(&String::deserialize(from)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_derived_id_depends_on_every_part_and_on_where_it_ends() {
        let id = derived_id("a", "b", b"c");
        assert_eq!(id, derived_id("a", "b", b"c"));
        for other in [derived_id("ab", "", b"c"), derived_id("a", "bc", b""), derived_id("", "ab", b"c")] {
            assert_ne!(id, other);
        }
    }

    #[test]
    fn metadata_is_kept_as_a_text_whatever_it_holds() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Held(#[serde(with = "as_text")] Map<String, Value>);
        let held = |text: &str| Held(serde_json::from_str(text).unwrap());
        let deep = format!(r#"{{"deep":{}1{}}}"#, "[".repeat(60), "]".repeat(60));
        // Numbers beyond the table's 38 digits and exponents, its levels, and what it has no type for.
        for text in
            ["{}", r#"{"":null,"n":[1e300,5e-300,18446744073709551615,-9223372036854775808,1.0]}"#, &deep]
        {
            let stored = serde_json::to_value(held(text)).unwrap();
            assert!(stored.is_string(), "{stored}");
            assert_eq!(serde_json::from_value::<Held>(stored).unwrap(), held(text));
        }
        for bad in [json!("[]"), json!("{"), json!({})] {
            assert!(serde_json::from_value::<Held>(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_document_stands_as_the_version_that_was_sent_last() {
        let limits = Limits::of_tier(crate::tenant::Tier::Free);
        let at = |ms: i64| Timestamp::from_millis(1_790_000_000_000 + ms);
        let upload_id: UploadId = "upl_0123456789012345678901".parse().unwrap();
        let awaited = |taken| Some(Awaited { upload_id: upload_id.clone(), until: at(10), taken });
        let document = |status, upload| Document {
            tenant_id: "acme".parse().unwrap(),
            id: "x".parse().unwrap(),
            version: 0,
            status,
            chunks: 0,
            sha256: String::new(),
            title: "X".into(),
            source: String::new(),
            content_type: ContentType::Plain,
            metadata: Map::new(),
            groups: Groups::default(),
            created_at: at(0),
            updated_at: at(0),
            current: None,
            upload,
            at_work_until: Some(at(5)),
            reason: Some("Why.".to_owned()),
            revision: 1,
        };
        use DocumentStatus::{Failed, Pending, Processing, Ready};
        for (status, upload, before, after, awaits) in [
            (Ready, None, Some(Ready), Some(Ready), false),
            // A new version is awaited, and does not come.
            (Ready, awaited(false), Some(Pending), Some(Ready), true),
            (Failed, awaited(false), Some(Pending), Some(Failed), true),
            // It came.
            (Processing, awaited(true), Some(Processing), Some(Failed), true),
            (Pending, awaited(true), Some(Pending), None, true),
            (Ready, awaited(true), Some(Ready), Some(Ready), false),
            (Failed, awaited(true), Some(Failed), Some(Failed), false),
            // There was none before.
            (Pending, awaited(false), Some(Pending), None, true),
            (Pending, None, None, None, false),
            // Whoever stored it was cut off.
            (Processing, None, Some(Processing), Some(Failed), false),
        ] {
            let document = document(status, upload);
            let shown = |now| document.is_kept(&limits, now).then(|| document.standing(now).0);
            assert_eq!((shown(at(4)), shown(at(10))), (before, after), "{document:?}");
            let is_of = |id: &UploadId| document.upload.as_ref().is_some_and(|a| a.is_of(id, status));
            assert_eq!(is_of(&upload_id), awaits, "{document:?}");
            assert!(!is_of(&"upl_x123456789012345678901".parse().unwrap()));
            // Why one failed is nothing that another standing is about.
            for now in [at(4), at(10)] {
                let (standing, reason) = document.standing(now);
                assert_eq!(reason.is_some(), standing == Failed, "{document:?}");
            }
        }
        // A file that cut off its reader is read again; a document that is found is there, whatever is awaited.
        let between = document(Processing, awaited(true));
        assert_eq!(between.standing(at(5)), (Pending, None));
        let found = Document { current: Some(at(0)), ..document(Pending, awaited(true)) };
        assert!(found.is_kept(&limits, at(10)));
    }

    #[test]
    fn media_types() {
        assert_eq!(ContentType::parse("Text/HTML; charset=utf-8"), Some(ContentType::Html));
        assert_eq!(ContentType::parse("application/zip"), None);
        for kind in ContentType::ALL {
            assert_eq!(ContentType::parse(kind.media_type()), Some(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.media_type());
        }
    }
}
