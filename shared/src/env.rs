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
    optional(name).ok_or(EnvError::Missing(name))
}

/// The value of `name`, if it is set, not empty and UTF-8.
pub fn optional(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "the one place where the environment is read")]
    let value = std::env::var(name);
    value.ok().filter(|v| !v.is_empty())
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

/// The name of a DynamoDB table.
///
/// # Errors
/// If the variable is unset, or no table can be called that.
pub fn table(name: &'static str) -> Result<String, EnvError> {
    let wanted = "wanted is a table's name, 3 to 255 letters, digits, `-`, `_` and `.`";
    shaped(name, wanted, |text| {
        (3..=255).contains(&text.len()) && only(text, |c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    })
}

/// The name of an S3 bucket.
///
/// # Errors
/// If the variable is unset, or no bucket can be called that.
pub fn bucket(name: &'static str) -> Result<String, EnvError> {
    let wanted = "wanted is a bucket's name, 3 to 63 lower-case letters, digits, `-` and `.`";
    shaped(name, wanted, |text| {
        let ends = text.starts_with(['-', '.']) || text.ends_with(['-', '.']);
        let plain = only(text, |c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c));
        (3..=63).contains(&text.len()) && plain && !ends
    })
}

/// The name of a secret, or what names of secrets begin with.
///
/// # Errors
/// If the variable is unset, or no secret can be called that.
pub fn secret_name(name: &'static str) -> Result<String, EnvError> {
    let wanted = "wanted is a secret's name, at most 512 letters, digits, and `/_+=.@-`";
    shaped(name, wanted, |text| {
        text.len() <= 512 && only(text, |c| c.is_ascii_alphanumeric() || "/_+=.@-".contains(c))
    })
}

/// The ARN of a role.
///
/// # Errors
/// If the variable is unset, or holds something else.
pub fn role_arn(name: &'static str) -> Result<String, EnvError> {
    shaped(name, "wanted is a role's ARN, arn:aws:iam::<account>:role/<name>", |text| {
        let mut parts = text.splitn(6, ':');
        let [arn, partition, service, region, account, resource] =
            [(); 6].map(|()| parts.next().unwrap_or(""));
        (arn, service, region) == ("arn", "iam", "")
            && partition.starts_with("aws")
            && account.len() == 12
            && only(account, |c| c.is_ascii_digit())
            && resource.strip_prefix("role/").is_some_and(|role| !role.is_empty() && !role.contains(' '))
    })
}

/// The name of a function.
///
/// # Errors
/// If the variable is unset, or no function can be called that.
pub fn function(name: &'static str) -> Result<String, EnvError> {
    let wanted = "wanted is a function's name, at most 64 letters, digits, `-` and `_`";
    shaped(name, wanted, |text| {
        text.len() <= 64 && only(text, |c| c.is_ascii_alphanumeric() || "-_".contains(c))
    })
}

/// A namespace of metrics.
///
/// # Errors
/// If the variable is unset, or no namespace can be called that.
pub fn namespace(name: &'static str) -> Result<String, EnvError> {
    let wanted = "wanted is a namespace of metrics, at most 255 letters, digits, and `._/#:-`";
    shaped(name, wanted, |text| {
        text.len() <= 255 && only(text, |c| c.is_ascii_alphanumeric() || "._/#:-".contains(c))
    })
}

/// The name of a model.
///
/// # Errors
/// If the variable is unset, or no model is called that.
pub fn model(name: &'static str) -> Result<String, EnvError> {
    shaped(name, "wanted is a model's name, letters, digits, and `._:/-`", |text| {
        text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && only(text, |c| c.is_ascii_alphanumeric() || "._:/-".contains(c))
    })
}

fn shaped(name: &'static str, wanted: &str, fits: impl Fn(&str) -> bool) -> Result<String, EnvError> {
    let text = text(name)?;
    if fits(&text) { Ok(text) } else { Err(EnvError::Malformed { name, reason: wanted.to_owned() }) }
}

fn only(text: &str, allowed: impl Fn(char) -> bool) -> bool {
    text.chars().all(allowed)
}
