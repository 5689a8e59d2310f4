//! The environment, read once at a function's start.

use std::str::FromStr;

/// Why a function cannot start. The message names the variable and never holds a secret.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    /// The variable is absent or empty.
    #[error("environment variable {0} is not set")]
    Missing(&'static str),
    /// The variable holds something else than what is wanted.
    #[error("environment variable {name} is malformed: {reason}")]
    Malformed {
        /// The variable.
        name: &'static str,
        /// What was wanted.
        reason: String,
    },
}

/// The value of `name`.
///
/// # Errors
/// If it is unset, empty or not UTF-8.
pub fn text(name: &'static str) -> Result<String, EnvError> {
    #[expect(clippy::disallowed_methods, reason = "the one place where the environment is read")]
    let value = std::env::var(name);
    value.ok().filter(|v| !v.is_empty()).ok_or(EnvError::Missing(name))
}

/// The value of `name`, parsed.
///
/// # Errors
/// If it is unset, or does not parse.
pub fn parsed<T>(name: &'static str) -> Result<T, EnvError>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    text(name)?.parse().map_err(|e: T::Err| EnvError::Malformed { name, reason: e.to_string() })
}
