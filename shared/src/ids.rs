//! Identifiers that callers send back to us. Each is parsed once; a text that is none of ours is
//! answered like one that does not exist.

use std::fmt;
use std::str::FromStr;

use rand::CryptoRng;
use serde::{Deserialize, Serialize};

use crate::random;

/// A text that cannot be the identifier it is given as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidId(&'static str);

impl InvalidId {
    pub(crate) const fn new(wanted: &'static str) -> Self {
        Self(wanted)
    }
}

/// Declares an identifier: a private string whose only door is its parser.
macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $wanted:literal, $well_formed:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let well_formed: fn(&str) -> bool = $well_formed;
                if well_formed(text) { Ok(Self(text.to_owned())) } else { Err(InvalidId($wanted)) }
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

identifier!(
    /// A conversation: `conv_` and 22 base-62 characters, 131 random bits, so that none is guessed.
    ConversationId,
    "a conversation id is one that an answer gave",
    |text| text.strip_prefix("conv_").is_some_and(|tail| random::is_base62(tail, 22))
);

impl ConversationId {
    /// A new conversation's id.
    pub fn new(rng: &mut impl CryptoRng) -> Self {
        Self(format!("conv_{}", random::base62(22, rng)))
    }
}

identifier!(
    /// An answer: `msg_` and 22 base-62 characters.
    MessageId,
    "a message id is one that an answer gave",
    |text| text.strip_prefix("msg_").is_some_and(|tail| random::is_base62(tail, 22))
);

impl MessageId {
    /// A new answer's id.
    pub fn new(rng: &mut impl CryptoRng) -> Self {
        Self(format!("msg_{}", random::base62(22, rng)))
    }
}

identifier!(
    /// A registered issuer of tokens: `iss_` and 12 base-62 characters. No key id looks like it.
    IssuerId,
    "an issuer id is one that an answer gave",
    |text| text.strip_prefix("iss_").is_some_and(|tail| random::is_base62(tail, 12))
);

impl IssuerId {
    /// A new issuer's id.
    pub fn new(rng: &mut impl CryptoRng) -> Self {
        Self(format!("iss_{}", random::base62(12, rng)))
    }
}

identifier!(
    /// A document's id, the tenant's own choice: 1 to 128 of `A-Z a-z 0-9 . _ -`.
    DocumentId,
    "a document id has 1 to 128 characters of A-Z, a-z, 0-9, '.', '_' and '-'",
    |text| (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
);

impl DocumentId {
    /// The id of a document whose content is not known yet.
    pub fn new(rng: &mut impl CryptoRng) -> Self {
        Self(format!("doc_{}", random::base62(22, rng)))
    }
}

identifier!(
    /// An upload: `upl_` and 22 base-62 characters, 131 random bits, so that no object's key is guessed.
    UploadId,
    "an upload id is `upl_` and 22 characters of A-Z, a-z and 0-9",
    |text| text.strip_prefix("upl_").is_some_and(|tail| random::is_base62(tail, 22))
);

impl UploadId {
    /// A new upload's id.
    pub fn new(rng: &mut impl CryptoRng) -> Self {
        Self(format!("upl_{}", random::base62(22, rng)))
    }
}

identifier!(
    /// A tenant's own user, as the tenant names it: any text of 1 to 256 bytes, kept exactly. It never
    /// holds U+FFFD, which is what something on the way puts for bytes that are no text: two users
    /// must not become one.
    UserId,
    "a user id has 1 to 256 bytes of UTF-8",
    |text| (1..=256).contains(&text.len()) && !text.contains(char::REPLACEMENT_CHARACTER)
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_ids_parse_and_differ() {
        let mut rng = random::entropy();
        let (one, other) = (ConversationId::new(&mut rng), ConversationId::new(&mut rng));
        assert_ne!(one, other);
        assert_eq!(one.as_str().parse::<ConversationId>().unwrap(), one);
        assert!(MessageId::new(&mut rng).as_str().parse::<ConversationId>().is_err());
    }

    #[test]
    fn document_ids_are_bounded_and_plain() {
        assert!("README.md".parse::<DocumentId>().is_ok());
        assert!("x".repeat(128).parse::<DocumentId>().is_ok());
        for bad in ["", "a/b", "a:b", "a#b", "ü", "a b", &"x".repeat(129)] {
            assert!(bad.parse::<DocumentId>().is_err(), "{bad:?}");
        }
    }
}
