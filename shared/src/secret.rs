//! Keys of services, kept from being printed.

use std::fmt;

/// A service's key. `Debug` hides it.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret's text.
    ///
    /// # Errors
    /// [`MalformedSecret`] if it is empty or could not be sent in a header.
    pub fn new(text: String) -> Result<Self, MalformedSecret> {
        let usable = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        if usable { Ok(Self(text)) } else { Err(MalformedSecret) }
    }

    /// The secret, for the request's header.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A secret that cannot be a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is empty or holds characters that no key has")]
pub struct MalformedSecret;
