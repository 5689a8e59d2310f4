//! `/v1/issuers`: whom the tenant trusts to say who its users are.

pub(crate) mod list;
pub(crate) mod read;
pub(crate) mod register;
pub(crate) mod remove;

use serde::Serialize;
use shared::api_key::Permission;
use shared::ids::IssuerId;
use shared::issuer::{Issuer, KeySource};
use shared::network::Network;

/// An issuer as its tenant sees it.
#[derive(Serialize)]
struct View {
    issuer_id: IssuerId,
    issuer: String,
    audience: String,
    #[serde(flatten)]
    keys: KeySource,
    user_claim: String,
    groups_claim: String,
    scopes: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allowed_cidrs: Option<Vec<Network>>,
    created_at: String,
}

impl From<Issuer> for View {
    fn from(issuer: Issuer) -> Self {
        Self {
            issuer_id: issuer.issuer_id,
            issuer: issuer.issuer,
            audience: issuer.audience,
            keys: issuer.keys,
            user_claim: issuer.user_claim,
            groups_claim: issuer.groups_claim,
            scopes: issuer.grants.permissions.into_iter().map(Permission::as_str).collect(),
            expires_at: issuer.grants.expires_at.map(|at| at.to_string()),
            allowed_cidrs: issuer.grants.allowed_cidrs,
            created_at: issuer.created_at.to_string(),
        }
    }
}
