//! Who a tenant is: its identifier, tier, standing and profile.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::limits::{LimitChanges, Limits};
use crate::sealing::KmsKeyArn;

/// A tenant's identifier: `^[a-z][a-z0-9-]{1,30}[a-z0-9]$` without `--`.
///
/// It is parsed, never cleaned, so two different texts are never the same tenant. It cannot hold
/// `_`, `=`, `/` or `#`, which therefore separate it safely in every name derived from it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TenantId(String);

/// A text that is no tenant identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a tenant id has 3 to 32 characters: lower-case letters, digits and single hyphens, \
     starting with a letter and ending with a letter or digit"
)]
pub struct InvalidTenantId;

impl TenantId {
    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the tenant's vector collection. Injective.
    pub fn collection(&self) -> String {
        format!("tenant_{}", self.0)
    }
}

impl FromStr for TenantId {
    type Err = InvalidTenantId;

    fn from_str(text: &str) -> Result<Self, InvalidTenantId> {
        let bytes = text.as_bytes();
        let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return Err(InvalidTenantId) };
        let well_formed = (3..=32).contains(&bytes.len())
            && first.is_ascii_lowercase()
            && *last != b'-'
            && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
            && !text.contains("--");
        if well_formed { Ok(Self(text.to_owned())) } else { Err(InvalidTenantId) }
    }
}

impl TryFrom<String> for TenantId {
    type Error = InvalidTenantId;
    fn try_from(text: String) -> Result<Self, InvalidTenantId> {
        text.parse()
    }
}

impl From<TenantId> for String {
    fn from(id: TenantId) -> Self {
        id.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a tenant pays for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// For trying it.
    Free,
    /// Small teams.
    Starter,
    /// Companies.
    Professional,
    /// Companies with terms of their own.
    Enterprise,
}

impl Tier {
    /// The tier's short name in an API key: a hint for people and scanners, never a permission.
    pub const fn tag(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Starter => "sta",
            Self::Professional => "pro",
            Self::Enterprise => "ent",
        }
    }
}

/// Whether a tenant may use the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TenantStatus {
    /// Being set up; not usable yet.
    Provisioning,
    /// In use.
    Active,
    /// Switched off by the operator.
    Suspended,
    /// Being deleted; not usable any more, and never again.
    Deprovisioning,
}

/// What to do with text that tries to give the model orders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InjectionPolicy {
    /// Note it and go on. The structure of the prompt already keeps the text from being obeyed.
    #[default]
    Flag,
    /// Blank the matched words.
    Redact,
    /// Refuse a user's message; leave out a passage.
    Refuse,
}

/// Whose account at the model's service a tenant's questions are put to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelAccount {
    /// The one that tenants share; as it fills, the lower tiers make room.
    #[default]
    Shared,
    /// The tenant's own. Its key is a secret that is named after the tenant; what others ask for does
    /// not touch it.
    Own,
}

/// The embedding model of a tenant's collection. A collection holds vectors of one model alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmbeddingModel {
    /// The model's name at the embeddings endpoint.
    pub name: String,
    /// The length of its vectors.
    pub dimensions: u32,
}

/// A tenant's record: item `CONFIG` of its partition in table `tenants`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    /// The tenant.
    pub tenant_id: TenantId,
    /// Its standing.
    pub status: TenantStatus,
    /// Grows with every change that must reach requests at once; a cached decision carries the epoch it
    /// was made in.
    pub epoch: u64,
    /// Its tier.
    pub tier: Tier,
    /// The company's name, as its assistant says it.
    pub company_name: String,
    /// The assistant's name.
    pub assistant_name: String,
    /// The tenant's own instructions to its assistant; empty if it has none.
    #[serde(default)]
    pub instructions: String,
    /// What to do with injected orders.
    #[serde(default)]
    pub injection_policy: InjectionPolicy,
    /// Every limit, resolved: nothing here means "unlimited".
    pub limits: Limits,
    /// Those of them that its operator set. The others are its tier's.
    #[serde(default)]
    pub overrides: LimitChanges,
    /// The vector cluster that holds its collection.
    pub cell: String,
    /// The embedding model of its collection.
    pub embedding: EmbeddingModel,
    /// Whose account answers it.
    #[serde(default)]
    pub model_account: ModelAccount,
    /// The KMS key that seals what its users write, if it has one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kms_key_arn: Option<KmsKeyArn>,
    /// Where it is told of its budgets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook_url: Option<String>,
    /// When it was provisioned.
    pub created_at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grammar() {
        for good in ["acme", "abc", "acme-1", "acme1", "a1-b2-c3", &format!("a{}", "b".repeat(31))] {
            assert!(good.parse::<TenantId>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "ab",
            "a",
            "1acme",
            "-acme",
            "acme-",
            "ac--me",
            "Acme",
            "ac_me",
            "ac me",
            "acme/",
            "ac#me",
            "acmé",
            "ас me",
            "аcme",
            "acme\n",
            "a.b",
            &"a".repeat(33),
        ] {
            assert_eq!(bad.parse::<TenantId>(), Err(InvalidTenantId), "{bad:?}");
        }
    }

    #[test]
    fn derived_names_are_injective() {
        let one: TenantId = "acme1".parse().unwrap();
        let other: TenantId = "acme-1".parse().unwrap();
        assert_ne!(one.collection(), other.collection());
    }

    #[test]
    fn serde_goes_through_the_parser() {
        assert!(serde_json::from_str::<TenantId>("\"ac--me\"").is_err());
        assert_eq!(serde_json::from_str::<TenantId>("\"acme\"").unwrap().as_str(), "acme");
    }
}
