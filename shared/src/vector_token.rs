//! Minting tokens that open one tenant's vector collection and nothing else.
//!
//! The store takes a token without an `access` list as full access, so the claims here cannot be
//! written without one. <https://qdrant.tech/documentation/guides/security/#granular-access-control-with-jwt>

use jsonwebtoken::{EncodingKey, Header};
use serde::Serialize;

use crate::clock::Timestamp;
use crate::scope::VectorToken;
use crate::secret::Secret;
use crate::tenant::TenantId;

/// How long a token lives: the authorizer's cache (300 s at the most) and the longest request
/// (120 s) after it, and a margin for skewed clocks.
pub const LIFETIME_SECONDS: i64 = 600;

/// What a token lets its bearer do with the collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Access {
    /// Search it.
    #[serde(rename = "r")]
    Read,
    /// Search it, and add, change and delete its points; never create, alter or drop a collection.
    #[serde(rename = "rw")]
    Write,
}

#[derive(Serialize)]
struct Claims {
    sub: String,
    exp: i64,
    access: [CollectionAccess; 1],
}

#[derive(Serialize)]
struct CollectionAccess {
    collection: String,
    access: Access,
}

/// Mints a token for `tenant`'s collection alone, signed with the cluster's root key.
///
/// # Errors
/// If signing fails.
pub fn mint(
    root_key: &Secret,
    tenant: &TenantId,
    access: Access,
    now: Timestamp,
) -> Result<VectorToken, jsonwebtoken::errors::Error> {
    let claims = Claims {
        sub: tenant.to_string(),
        exp: now.as_seconds() + LIFETIME_SECONDS,
        access: [CollectionAccess { collection: tenant.collection(), access }],
    };
    // The store's algorithm is HS256, with the bytes of its API key as the secret.
    let key = EncodingKey::from_secret(root_key.expose().as_bytes());
    jsonwebtoken::encode(&Header::default(), &claims, &key).map(VectorToken::new)
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{Algorithm, DecodingKey, Validation};

    use super::*;

    #[test]
    fn a_token_names_one_collection_and_ends() {
        let root = Secret::new("root-key".into()).unwrap();
        let now = Timestamp::from_millis(4_000_000_000_000);
        let token = mint(&root, &"acme-1".parse().unwrap(), Access::Read, now).unwrap();
        let claims = jsonwebtoken::decode::<serde_json::Value>(
            token.expose(),
            &DecodingKey::from_secret(b"root-key"),
            &Validation::new(Algorithm::HS256),
        )
        .unwrap()
        .claims;
        assert_eq!(
            claims,
            serde_json::json!({
                "sub": "acme-1", "exp": 4_000_000_600_i64,
                "access": [{"collection": "tenant_acme-1", "access": "r"}]
            })
        );
    }
}
