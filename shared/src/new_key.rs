//! A key that somebody asks for: what the body says, held against what the asker may hand on; and how keys are
//! answered. Pure.

use serde::{Deserialize, Serialize};

use crate::api_key::{ApiKey, Beyond, Grants, KeyId, KeyRecord, Permission};
use crate::clock::Timestamp;
use crate::error::{ApiError, Code};
use crate::network::{InvalidNetwork, Network};

/// The longest name, in bytes.
const MOST_NAME_BYTES: usize = 100;
/// The most networks of a key: they travel in the authorizer's context, which API Gateway bounds.
const MOST_NETWORKS: usize = 16;
/// The longest life of a key that has an end at all, in days: ten years.
const MOST_DAYS: u32 = 3_653;

/// The body of a request for a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    name: Option<String>,
    scopes: Option<Vec<Permission>>,
    expires_at: Option<String>,
    allowed_cidrs: Option<Vec<String>>,
}

impl NewKey {
    /// The key's name and what it may do: what the body says, and as `most` where it says nothing.
    ///
    /// # Errors
    /// 400 for what cannot be, 403 for what goes beyond `most`; either names the field.
    pub fn granted(self, most: &Grants, now: Timestamp) -> Result<(Option<String>, Grants), ApiError> {
        if let Some(name) = &self.name
            && (name.trim().is_empty() || name.len() > MOST_NAME_BYTES || name.chars().any(char::is_control))
        {
            let message = format!("name must be one line of 1 to {MOST_NAME_BYTES} bytes");
            return Err(ApiError::invalid("name", message));
        }
        if self.scopes.as_ref().is_some_and(Vec::is_empty) {
            return Err(ApiError::invalid("scopes", "scopes must name at least one scope"));
        }
        let grants = Grants {
            permissions: self
                .scopes
                .map_or_else(|| most.permissions.clone(), |scopes| scopes.into_iter().collect()),
            expires_at: match self.expires_at {
                Some(text) => Some(expiry(&text, now)?),
                None => most.expires_at,
            },
            allowed_cidrs: match self.allowed_cidrs {
                Some(texts) => Some(networks(&texts)?),
                None => most.allowed_cidrs.clone(),
            },
        };
        within(most, &grants)?;
        Ok((self.name, grants))
    }
}

/// Makes sure that a key does not go beyond the one that makes or replaces it.
///
/// # Errors
/// 403; it names the field.
pub fn within(most: &Grants, grants: &Grants) -> Result<(), ApiError> {
    let (param, message) = match most.cover(grants) {
        Ok(()) => return Ok(()),
        Err(Beyond::Permission(lacks)) => {
            ("scopes", format!("this key lacks the scope `{}`, so it cannot grant it", lacks.as_str()))
        }
        Err(Beyond::Life) => {
            ("expires_at", "this key expires, so it cannot make or replace one that lives longer".to_owned())
        }
        Err(Beyond::Addresses) => (
            "allowed_cidrs",
            "this key is bound to networks, so it cannot make or replace one for others".to_owned(),
        ),
    };
    Err(ApiError::new(Code::InsufficientScope, message).with_param(param))
}

fn expiry(text: &str, now: Timestamp) -> Result<Timestamp, ApiError> {
    let invalid = |message: &str| ApiError::invalid("expires_at", message);
    let at = Timestamp::parse(text)
        .map_err(|_| invalid("expires_at must be an instant such as 2027-03-01T09:30:00Z"))?;
    if at <= now {
        return Err(invalid("expires_at must lie in the future"));
    }
    if at > now.plus_days(MOST_DAYS) {
        return Err(invalid("expires_at must lie within ten years; leave it out for a key without an end"));
    }
    Ok(at)
}

fn networks(texts: &[String]) -> Result<Vec<Network>, ApiError> {
    if texts.is_empty() || texts.len() > MOST_NETWORKS {
        let message = format!(
            "allowed_cidrs must name 1 to {MOST_NETWORKS} networks; leave it out for a key of any address"
        );
        return Err(ApiError::invalid("allowed_cidrs", message));
    }
    let network = |(place, text): (usize, &String)| {
        text.parse().map_err(|error: InvalidNetwork| {
            ApiError::invalid(format!("allowed_cidrs[{place}]"), error.to_string())
        })
    };
    texts.iter().enumerate().map(network).collect()
}

/// What of a new key is answered: the one place where its secret is shown.
#[derive(Serialize)]
pub struct CreatedKey {
    key_id: KeyId,
    api_key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    scopes: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allowed_cidrs: Option<Vec<Network>>,
}

impl CreatedKey {
    /// The answer about a key and its record.
    pub fn new(key: &ApiKey, record: KeyRecord) -> Self {
        Self {
            key_id: record.key_id,
            api_key: key.expose(),
            name: record.name,
            scopes: record.permissions.into_iter().map(Permission::as_str).collect(),
            expires_at: record.expires_at.map(|at| at.to_string()),
            allowed_cidrs: record.allowed_cidrs,
        }
    }
}

/// A key as it is listed: all of it but its secret.
#[derive(Serialize)]
struct KeyView {
    key_id: KeyId,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    scopes: Vec<&'static str>,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_used_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allowed_cidrs: Option<Vec<Network>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replaces: Option<KeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replaced_by: Option<KeyId>,
}

impl From<KeyRecord> for KeyView {
    fn from(record: KeyRecord) -> Self {
        Self {
            key_id: record.key_id,
            name: record.name,
            scopes: record.permissions.into_iter().map(Permission::as_str).collect(),
            created_at: record.created_at.to_string(),
            expires_at: record.expires_at.map(|at| at.to_string()),
            last_used_at: record.last_used_at.map(|at| at.to_string()),
            allowed_cidrs: record.allowed_cidrs,
            replaces: record.replaces,
            replaced_by: record.replaced_by,
        }
    }
}

/// A page of a tenant's keys.
#[derive(Serialize)]
pub struct KeyList {
    keys: Vec<KeyView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<KeyId>,
}

impl KeyList {
    /// The answer with these keys, and where to go on if there are more.
    pub fn new(keys: Vec<KeyRecord>, cursor: Option<KeyId>) -> Self {
        Self { keys: keys.into_iter().map(KeyView::from).collect(), cursor }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_790_000_000_000);

    fn granted(body: &str, most: &Grants) -> Result<(Option<String>, Grants), ApiError> {
        serde_json::from_str::<NewKey>(body).unwrap().granted(most, NOW)
    }

    #[test]
    fn what_the_body_leaves_out_is_as_the_maker_has_it() {
        let most = Grants {
            permissions: [Permission::Chat, Permission::KeysWrite].into(),
            expires_at: Some(NOW.plus_days(9)),
            allowed_cidrs: Some(vec!["10.0.0.0/8".parse().unwrap()]),
        };
        assert_eq!(granted("{}", &most).unwrap(), (None, most.clone()));
        let body = r#"{"name":"site","scopes":["chat","chat"],"allowed_cidrs":["10.1.0.0/16"]}"#;
        let (name, grants) = granted(body, &most).unwrap();
        assert_eq!(name.as_deref(), Some("site"));
        assert_eq!(grants.permissions, [Permission::Chat].into());
        assert_eq!(grants.allowed_cidrs, Some(vec!["10.1.0.0/16".parse().unwrap()]));
        assert_eq!(granted("{}", &Grants::all()).unwrap().1, Grants::all());
    }

    #[test]
    fn what_cannot_be_or_goes_beyond_is_named() {
        let many = format!(r#"{{"allowed_cidrs":[{}]}}"#, vec![r#""10.0.0.0/8""#; 17].join(","));
        let long = format!(r#"{{"name":"{}"}}"#, "x".repeat(101));
        for (body, param) in [
            (r#"{"name":""}"#, "name"),
            (r#"{"name":"a\nb"}"#, "name"),
            (long.as_str(), "name"),
            (r#"{"scopes":[]}"#, "scopes"),
            (r#"{"expires_at":"tomorrow"}"#, "expires_at"),
            (r#"{"expires_at":"2026-01-01T00:00:00Z"}"#, "expires_at"),
            (r#"{"expires_at":"9999-12-31T23:59:59Z"}"#, "expires_at"),
            (r#"{"allowed_cidrs":[]}"#, "allowed_cidrs"),
            (r#"{"allowed_cidrs":["10.0.0.0/8","10.0.0.1/8"]}"#, "allowed_cidrs[1]"),
            (many.as_str(), "allowed_cidrs"),
        ] {
            let error = granted(body, &Grants::all()).unwrap_err();
            assert_eq!((error.code, error.param.as_deref()), (Code::InvalidRequest, Some(param)), "{body}");
        }
        let most = Grants { permissions: [Permission::KeysWrite].into(), ..Grants::all() };
        let error = granted(r#"{"scopes":["audit:read"]}"#, &most).unwrap_err();
        assert_eq!((error.code, error.param.as_deref()), (Code::InsufficientScope, Some("scopes")));
    }
}
