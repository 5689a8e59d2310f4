//! Idempotency keys: a repeated request answers the first result and costs nothing. Pure;
//! [`crate::aws::idempotency`] keeps the results.
//!
//! <https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/>

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::ids::UserId;

/// The header that carries a key.
pub const HEADER: &str = "idempotency-key";

/// A key, with what it was sent along with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    hash: String,
    fingerprint: String,
}

/// A header that holds no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the header Idempotency-Key must be 1 to 255 visible ASCII characters")]
pub struct InvalidKey;

/// A result, as it is answered again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The answer's status.
    pub status: u16,
    /// The answer's body: JSON.
    pub body: String,
}

impl IdempotencyKey {
    /// The key `text` of a request of `user` to `route` with that body. Users do not share keys: one
    /// must never see another's answer.
    ///
    /// # Errors
    /// [`InvalidKey`].
    pub fn new(text: &[u8], route: &str, user: Option<&UserId>, body: &[u8]) -> Result<Self, InvalidKey> {
        if !(1..=255).contains(&text.len()) || !text.iter().all(u8::is_ascii_graphic) {
            return Err(InvalidKey);
        }
        let mut hash = Sha256::new();
        let user = user.map_or("", UserId::as_str);
        for part in [route.as_bytes(), user.as_bytes(), text] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        Ok(Self { hash: hex::encode(hash.finalize()), fingerprint: hex::encode(Sha256::digest(body)) })
    }

    /// What names the key's item: a hash, for the key is the caller's text.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The hash of the body.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_one_users_for_one_route() {
        let user = |name: &str| name.parse::<UserId>().unwrap();
        let key = |text: &str, route, user: Option<&UserId>| {
            IdempotencyKey::new(text.as_bytes(), route, user, b"{}").unwrap().hash().to_owned()
        };
        let (ann, bob) = (user("ann"), user("bob"));
        let hashes = [
            key("k", "/v1/chat", Some(&ann)),
            key("k", "/v1/chat", Some(&bob)),
            key("k", "/v1/chat", None),
            key("k", "/v1/search", Some(&ann)),
            key("kann", "/v1/chat", None),
        ];
        let distinct: std::collections::BTreeSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), hashes.len());
    }

    #[test]
    fn a_header_that_is_no_key_is_refused() {
        for bad in ["", "a b", "é", &"x".repeat(256)] {
            assert_eq!(IdempotencyKey::new(bad.as_bytes(), "/", None, b""), Err(InvalidKey), "{bad}");
        }
    }
}
