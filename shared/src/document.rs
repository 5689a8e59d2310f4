//! Documents, as the tenant's index knows them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::clock::Timestamp;
use crate::groups::Groups;
use crate::ids::DocumentId;
use crate::limits::Limits;
use crate::tenant::TenantId;

/// Where a document stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DocumentStatus {
    /// Being indexed.
    Processing,
    /// Found by searches.
    Ready,
    /// Could not be indexed.
    Failed,
}

/// The kinds of text that can be ingested.
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
}

impl ContentType {
    /// The kind that a media type names, its parameters and case aside.
    pub fn parse(media_type: &str) -> Option<Self> {
        let essence = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match essence.as_str() {
            "text/plain" => Some(Self::Plain),
            "text/markdown" => Some(Self::Markdown),
            "text/html" => Some(Self::Html),
            _ => None,
        }
    }
}

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
    /// When its content last changed.
    pub updated_at: Timestamp,
}

impl Document {
    /// Whether it may still be shown.
    pub fn is_kept(&self, limits: &Limits, now: Timestamp) -> bool {
        self.updated_at > limits.retained_since(now)
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
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de, ser};
    use serde_json::{Map, Value};

    pub(super) fn serialize<S: Serializer>(map: &Map<String, Value>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&serde_json::to_string(map).map_err(ser::Error::custom)?)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Map<String, Value>, D::Error> {
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
    fn media_types() {
        assert_eq!(ContentType::parse("Text/HTML; charset=utf-8"), Some(ContentType::Html));
        assert_eq!(ContentType::parse("application/pdf"), None);
    }
}
