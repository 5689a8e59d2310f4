//! Idempotency keys: a repeated request answers the first result and costs nothing. Pure;
//! [`crate::aws::idempotency`] keeps the results.
//!
//! <https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/>

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::groups::Groups;
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
    /// must never see another's answer. The groups for which it asks are part of the request: the same key for
    /// others is a contradiction, like another body, so that nobody is shown again what they may find no more.
    ///
    /// # Errors
    /// [`InvalidKey`].
    pub fn new(
        text: &[u8],
        route: &str,
        user: Option<&UserId>,
        groups: &Groups,
        body: &[u8],
    ) -> Result<Self, InvalidKey> {
        if !(1..=255).contains(&text.len()) || !text.iter().all(u8::is_ascii_graphic) {
            return Err(InvalidKey);
        }
        let user = user.map_or("", UserId::as_str);
        let hash = digest([route.as_bytes(), user.as_bytes(), text]);
        let fingerprint = digest([body].into_iter().chain(groups.parts().map(str::as_bytes)));
        Ok(Self { hash, fingerprint })
    }

    /// What names the key's item: a hash, for the key is the caller's text.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The hash of what was asked: the body, and for which groups.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// A hash of `parts` in order, each led by its length, so that no two lists share one.
fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_one_users_for_one_route() {
        let user = |name: &str| name.parse::<UserId>().unwrap();
        let key = |text: &str, route, user: Option<&UserId>| {
            let key = IdempotencyKey::new(text.as_bytes(), route, user, &Groups::default(), b"{}");
            key.unwrap().hash().to_owned()
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
    fn the_same_key_for_other_groups_is_another_request() {
        let key = |header: &'static str, body: &[u8]| {
            let groups = Groups::asserted([&http::HeaderValue::from_static(header)]).unwrap();
            IdempotencyKey::new(b"k", "/v1/chat", None, &groups, body).unwrap()
        };
        let keys =
            [key("", b"{}"), key("hr", b"{}"), key("hr,legal", b"{}"), key("", b"{}hr"), key("hr", b"{ }")];
        let distinct: std::collections::BTreeSet<_> = keys.iter().map(|key| key.fingerprint()).collect();
        assert_eq!(distinct.len(), keys.len());
        assert!(keys.iter().all(|key| key.hash() == keys[0].hash()), "so that the contradiction is seen");
        assert_eq!(key("legal,hr", b"{}"), keys[2]);
    }

    #[test]
    fn a_header_that_is_no_key_is_refused() {
        for bad in ["", "a b", "é", &"x".repeat(256)] {
            assert_eq!(
                IdempotencyKey::new(bad.as_bytes(), "/", None, &Groups::default(), b""),
                Err(InvalidKey),
                "{bad}"
            );
        }
    }
}
