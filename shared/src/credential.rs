//! What a request is let in by, named: an API key, or a token of an issuer that the tenant has registered.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::api_key::{InvalidKey, KeyId};
use crate::ids::IssuerId;

/// The name of a credential, as records and logs have it. Not secret. A key's id and an issuer's cannot be
/// taken for one another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CredentialId {
    /// An API key. Whoever holds it says who its user is.
    Key(KeyId),
    /// A token of this issuer, which vouches for the user.
    Issuer(IssuerId),
}

impl CredentialId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Key(id) => id.as_str(),
            Self::Issuer(id) => id.as_str(),
        }
    }
}

impl fmt::Display for CredentialId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CredentialId {
    type Err = InvalidKey;
    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        text.parse().map(Self::Issuer).or_else(|_| text.parse().map(Self::Key))
    }
}

impl TryFrom<String> for CredentialId {
    type Error = InvalidKey;
    fn try_from(text: String) -> Result<Self, InvalidKey> {
        text.parse()
    }
}

impl From<CredentialId> for String {
    fn from(id: CredentialId) -> Self {
        match id {
            CredentialId::Key(id) => id.into(),
            CredentialId::Issuer(id) => id.into(),
        }
    }
}

impl From<KeyId> for CredentialId {
    fn from(id: KeyId) -> Self {
        Self::Key(id)
    }
}

impl From<IssuerId> for CredentialId {
    fn from(id: IssuerId) -> Self {
        Self::Issuer(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::entropy;

    #[test]
    fn a_name_is_that_of_a_key_or_of_an_issuer() {
        let issuer = IssuerId::new(&mut entropy());
        let named: CredentialId = issuer.as_str().parse().unwrap();
        assert_eq!(named, CredentialId::Issuer(issuer));
        let key: CredentialId = "jXFJrgf0gPBn".parse().unwrap();
        assert!(matches!(key, CredentialId::Key(_)));
        assert_eq!(serde_json::to_string(&key).unwrap(), r#""jXFJrgf0gPBn""#);
        for bad in ["", "iss_", "iss_short", "jwt:iss_jXFJrgf0gPBn"] {
            assert!(bad.parse::<CredentialId>().is_err(), "{bad}");
        }
    }
}
