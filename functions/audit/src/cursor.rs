//! Where a list of records goes on.

use serde::{Deserialize, Serialize};
use shared::audit_log::tenant_prefix;
use shared::error::ApiError;
use shared::tenant::TenantId;

/// How far a list has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Cursor {
    /// The object of the log that was reached.
    #[serde(rename = "k", default, skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
    /// How many of its lines were passed.
    #[serde(rename = "l", default)]
    pub(crate) lines: usize,
    /// The last of those that are not in the log yet, if any of them were shown.
    #[serde(rename = "p", default, skip_serializing_if = "Option::is_none")]
    pub(crate) pending: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    #[serde(rename = "t")]
    tenant: TenantId,
    #[serde(flatten)]
    cursor: Cursor,
}

impl Cursor {
    /// The cursor as callers carry it.
    pub(crate) fn write(self, tenant: &TenantId) -> String {
        let sealed = Sealed { tenant: tenant.clone(), cursor: self };
        serde_json::to_vec(&sealed).map(hex::encode).unwrap_or_default()
    }

    /// The cursor that a caller brings back.
    ///
    /// # Errors
    /// 400 if it is none of this tenant's lists.
    pub(crate) fn read(text: &str, tenant: &TenantId) -> Result<Self, ApiError> {
        let invalid = || ApiError::invalid("cursor", "cursor is none that a list gave");
        let bytes = hex::decode(text).map_err(|_| invalid())?;
        let Sealed { tenant: whose, cursor } = serde_json::from_slice(&bytes).map_err(|_| invalid())?;
        let prefix = tenant_prefix(tenant);
        let own = whose == *tenant && cursor.key.as_ref().is_none_or(|key| key.starts_with(&prefix));
        own.then_some(cursor).ok_or_else(invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_its_tenants_own() {
        let (acme, globex): (TenantId, TenantId) = ("acme".parse().unwrap(), "globex".parse().unwrap());
        let cursor = Cursor { key: Some("tenant=acme/x".into()), lines: 3, pending: None };
        let text = cursor.clone().write(&acme);
        assert_eq!(Cursor::read(&text, &acme).unwrap(), cursor);
        assert!(Cursor::read(&text, &globex).is_err());
        // One that names no object yet.
        assert!(Cursor::read(&Cursor::default().write(&acme), &globex).is_err());
        let forged = Cursor { key: Some("tenant=globex/x".into()), ..cursor }.write(&acme);
        assert!(Cursor::read(&forged, &acme).is_err());
        for bad in ["", "zz", "7b7d", &hex::encode(r#"{"t":"acme","l":-1}"#), &"7b".repeat(5_000)] {
            assert!(Cursor::read(bad, &acme).is_err(), "{bad}");
        }
    }
}
