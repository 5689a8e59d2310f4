//! API keys: how they are made, written, recognised and checked.
//!
//! `ten_<tier>_<tenant>_<key id>_<secret><checksum>`: the tenant and key id tell the authorizer which
//! single item to read; the checksum lets a scanner or a typo be told without a look-up; only a hash
//! of the secret is stored.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use rand::CryptoRng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::clock::Timestamp;
use crate::network::Network;
use crate::random;
use crate::tenant::{TenantId, TenantStatus, Tier};

/// The most keys of a tenant, expired ones that nobody has deleted included.
pub const MOST_KEYS: u16 = 50;

/// Characters of a key id: 71 bits, unique within a tenant.
const KEY_ID_LEN: usize = 12;
/// Characters of a secret: 43 base-62 digits hold 256 bits.
const SECRET_LEN: usize = 43;
/// Characters of a checksum: a CRC-32 in base 62.
const CHECKSUM_LEN: usize = 6;
/// The longest text that can be a key: the fixed parts and a tenant id of 32 characters.
const MAX_LEN: usize = "ten_free__".len() + 32 + KEY_ID_LEN + 1 + SECRET_LEN + CHECKSUM_LEN;

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Permission {
    /// Ask, search, and read one's conversations.
    #[serde(rename = "chat")]
    Chat,
    /// List and read documents.
    #[serde(rename = "documents:read")]
    DocumentsRead,
    /// Add, replace and delete documents.
    #[serde(rename = "documents:write")]
    DocumentsWrite,
    /// Read usage and cost.
    #[serde(rename = "usage:read")]
    UsageRead,
    /// Read the audit log.
    #[serde(rename = "audit:read")]
    AuditRead,
    /// Make, rotate and revoke keys.
    #[serde(rename = "keys:write")]
    KeysWrite,
}

impl Permission {
    /// Every permission: what a tenant's first key holds.
    pub const ALL: [Self; 6] = [
        Self::Chat,
        Self::DocumentsRead,
        Self::DocumentsWrite,
        Self::UsageRead,
        Self::AuditRead,
        Self::KeysWrite,
    ];

    /// The permission's name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::DocumentsRead => "documents:read",
            Self::DocumentsWrite => "documents:write",
            Self::UsageRead => "usage:read",
            Self::AuditRead => "audit:read",
            Self::KeysWrite => "keys:write",
        }
    }
}

/// A key's name within its tenant. Not secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId(String);

impl KeyId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for KeyId {
    type Err = InvalidKey;
    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        if random::is_base62(text, KEY_ID_LEN) { Ok(Self(text.to_owned())) } else { Err(InvalidKey) }
    }
}

impl TryFrom<String> for KeyId {
    type Error = InvalidKey;
    fn try_from(text: String) -> Result<Self, InvalidKey> {
        text.parse()
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> Self {
        id.0
    }
}

/// A text that is no API key. It says nothing more, so that an answer made of it tells nothing either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid API key")]
pub struct InvalidKey;

/// An API key as presented or just issued. It proves nothing until [`verify`] has compared it with
/// what is stored. `Debug` hides the secret, and there is no `Display`.
#[derive(Clone)]
pub struct ApiKey {
    tier: Tier,
    tenant_id: TenantId,
    key_id: KeyId,
    secret: String,
}

impl ApiKey {
    /// A new key for `tenant_id`, its id and secret drawn from `rng`.
    pub fn issue(tier: Tier, tenant_id: TenantId, rng: &mut impl CryptoRng) -> Self {
        let key_id = KeyId(random::base62(KEY_ID_LEN, rng));
        let secret = random::base62(SECRET_LEN, rng);
        Self { tier, tenant_id, key_id, secret }
    }

    /// The key that an `Authorization` header presents as a bearer token.
    ///
    /// # Errors
    /// [`InvalidKey`] if it presents none.
    pub fn from_authorization(header: &str) -> Result<Self, InvalidKey> {
        let (scheme, key) = header.split_once(' ').ok_or(InvalidKey)?;
        if scheme.eq_ignore_ascii_case("bearer") { key.trim().parse() } else { Err(InvalidKey) }
    }

    /// The whole key, secret included: for the one answer that shows it.
    pub fn expose(&self) -> String {
        let body = self.body();
        let checksum = checksum(&body);
        body + &checksum
    }

    /// The tenant that the key names. Unproven until verified.
    pub fn claimed_tenant(&self) -> &TenantId {
        &self.tenant_id
    }

    /// The key's id.
    pub fn key_id(&self) -> &KeyId {
        &self.key_id
    }

    /// What is stored in place of the secret.
    pub fn secret_hash(&self) -> SecretHash {
        SecretHash(Sha256::digest(self.secret.as_bytes()).into())
    }

    fn body(&self) -> String {
        format!("ten_{}_{}_{}_{}", self.tier.tag(), self.tenant_id, self.key_id, self.secret)
    }
}

impl FromStr for ApiKey {
    type Err = InvalidKey;

    /// Parses and checks the checksum; looks nothing up.
    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        if text.len() > MAX_LEN || !text.is_ascii() {
            return Err(InvalidKey);
        }
        let parts: Vec<&str> = text.split('_').collect();
        let &["ten", tag, tenant, key_id, tail] = parts.as_slice() else { return Err(InvalidKey) };
        let tier = [Tier::Free, Tier::Starter, Tier::Professional, Tier::Enterprise]
            .into_iter()
            .find(|tier| tier.tag() == tag)
            .ok_or(InvalidKey)?;
        if !random::is_base62(tail, SECRET_LEN + CHECKSUM_LEN) {
            return Err(InvalidKey);
        }
        let (secret, _) = tail.split_at_checked(SECRET_LEN).ok_or(InvalidKey)?;
        let key = Self {
            tier,
            tenant_id: tenant.parse().map_err(|_| InvalidKey)?,
            key_id: key_id.parse()?,
            secret: secret.to_owned(),
        };
        if key.expose() == text { Ok(key) } else { Err(InvalidKey) }
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey(ten_{}_{}_{}_…)", self.tier.tag(), self.tenant_id, self.key_id)
    }
}

fn checksum(body: &str) -> String {
    random::base62_u32(crc32fast::hash(body.as_bytes()))
}

/// The SHA-256 of a key's secret. A secret has 256 random bits, so a slow hash would add nothing.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl TryFrom<String> for SecretHash {
    type Error = InvalidKey;
    fn try_from(text: String) -> Result<Self, InvalidKey> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| InvalidKey)?;
        Ok(Self(bytes))
    }
}

impl From<SecretHash> for String {
    fn from(hash: SecretHash) -> Self {
        hex::encode(hash.0)
    }
}

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash(…)")
    }
}

/// A key's record: item `KEY#<key id>` of its tenant's partition in table `tenants`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// The tenant.
    pub tenant_id: TenantId,
    /// The key.
    pub key_id: KeyId,
    /// The hash of its secret.
    pub secret_hash: SecretHash,
    /// What it may do.
    pub permissions: BTreeSet<Permission>,
    /// When it was issued.
    pub created_at: Timestamp,
    /// From when on it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// From where it may be used; from anywhere if there is no list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_cidrs: Option<Vec<Network>>,
    /// What its tenant calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// When the authorizer last recognised it, to the minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    /// The key whose place it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaces: Option<KeyId>,
    /// The key that took its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replaced_by: Option<KeyId>,
}

/// What a key may do, from where and how long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// What it may do.
    pub permissions: BTreeSet<Permission>,
    /// From when on it is refused.
    pub expires_at: Option<Timestamp>,
    /// From where it may be used; from anywhere if there is no list.
    pub allowed_cidrs: Option<Vec<Network>>,
}

/// In what grants go beyond others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beyond {
    /// A permission that the others lack.
    Permission(Permission),
    /// A longer life.
    Life,
    /// Addresses that the others leave out.
    Addresses,
}

impl Grants {
    /// Everything, from anywhere, for ever: what an operator may grant.
    pub fn all() -> Self {
        Self { permissions: Permission::ALL.into(), expires_at: None, allowed_cidrs: None }
    }

    /// Whether a request from `source` comes from where it may. An address that is not known lies in no
    /// network.
    pub fn allow(&self, source: Option<IpAddr>) -> bool {
        let lies_in = |networks: &Vec<Network>| {
            source.is_some_and(|address| networks.iter().any(|network| network.holds(address)))
        };
        self.allowed_cidrs.as_ref().is_none_or(lies_in)
    }

    /// Makes sure that these grants include `others`.
    ///
    /// # Errors
    /// [`Beyond`]: in what they do not.
    pub fn cover(&self, others: &Self) -> Result<(), Beyond> {
        if let Some(lacks) = others.permissions.difference(&self.permissions).next() {
            return Err(Beyond::Permission(*lacks));
        }
        if self.expires_at.is_some_and(|ends| others.expires_at.is_none_or(|theirs| theirs > ends)) {
            return Err(Beyond::Life);
        }
        let covered = |own: &Vec<Network>, network| own.iter().any(|one| one.covers(network));
        match (&self.allowed_cidrs, &others.allowed_cidrs) {
            (None, _) => Ok(()),
            (Some(own), Some(theirs)) if theirs.iter().all(|network| covered(own, network)) => Ok(()),
            (Some(_), _) => Err(Beyond::Addresses),
        }
    }
}

impl KeyRecord {
    /// The record of a key just issued that has these grants.
    pub fn granted(key: &ApiKey, grants: Grants, name: Option<String>, created_at: Timestamp) -> Self {
        let Grants { permissions, expires_at, allowed_cidrs } = grants;
        Self { allowed_cidrs, name, ..Self::new(key, permissions, created_at, expires_at) }
    }

    /// What the key may do.
    pub fn grants(&self) -> Grants {
        Grants {
            permissions: self.permissions.clone(),
            expires_at: self.expires_at,
            allowed_cidrs: self.allowed_cidrs.clone(),
        }
    }

    /// The record of a key just issued.
    pub fn new(
        key: &ApiKey,
        permissions: BTreeSet<Permission>,
        created_at: Timestamp,
        expires_at: Option<Timestamp>,
    ) -> Self {
        Self {
            tenant_id: key.tenant_id.clone(),
            key_id: key.key_id.clone(),
            secret_hash: key.secret_hash(),
            permissions,
            created_at,
            expires_at,
            allowed_cidrs: None,
            name: None,
            last_used_at: None,
            replaces: None,
            replaced_by: None,
        }
    }
}

/// Proof that a presented key is the one on record. Only [`verify`] makes it.
#[derive(Clone, Debug)]
pub struct VerifiedKey {
    record: KeyRecord,
}

impl VerifiedKey {
    /// The record of the key that was presented.
    pub fn record(&self) -> &KeyRecord {
        &self.record
    }
}

/// Compares a presented key with the record that its tenant and key id named.
///
/// # Errors
/// [`InvalidKey`] if there is no record, the secret differs or the key has expired: the caller cannot
/// tell which. The secret is compared in constant time.
pub fn verify(
    presented: &ApiKey,
    record: Option<KeyRecord>,
    status: Option<TenantStatus>,
    now: Timestamp,
) -> Result<VerifiedKey, InvalidKey> {
    let record = record.ok_or(InvalidKey)?;
    let same_key = record.tenant_id == presented.tenant_id && record.key_id == presented.key_id;
    let live = record.expires_at.is_none_or(|at| now < at);
    // A tenant that is not set up yet has no keys; a suspended one is told so after it is recognised.
    let known = matches!(status, Some(TenantStatus::Active | TenantStatus::Suspended));
    if record.secret_hash.matches(&presented.secret_hash()) && same_key && live && known {
        Ok(VerifiedKey { record })
    } else {
        Err(InvalidKey)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_790_000_000_000);

    fn issued() -> ApiKey {
        ApiKey::issue(Tier::Professional, "acme-1".parse().unwrap(), &mut random::entropy())
    }

    fn record(key: &ApiKey, expires_at: Option<Timestamp>) -> KeyRecord {
        KeyRecord::new(key, Permission::ALL.into(), NOW, expires_at)
    }

    #[test]
    fn a_key_survives_being_written_and_read() {
        let key = issued();
        let text = key.expose();
        assert!(text.starts_with("ten_pro_acme-1_"), "{text}");
        let read: ApiKey = text.parse().unwrap();
        assert_eq!(read.expose(), text);
        assert!(verify(&read, Some(record(&key, None)), Some(TenantStatus::Active), NOW).is_ok());
    }

    #[test]
    fn any_changed_character_is_caught_without_a_look_up() {
        let text = issued().expose();
        for (i, was) in text.char_indices() {
            for with in ['0', 'z', '_', 'é'] {
                if with != was {
                    let mut changed = text.clone();
                    changed.replace_range(i..=i, &with.to_string());
                    assert!(changed.parse::<ApiKey>().is_err(), "{changed}");
                }
            }
        }
        for bad in
            ["", "ten", "ten_pro_acme", &format!("{text} "), text.get(1..).unwrap(), &text.to_uppercase()]
        {
            assert!(bad.parse::<ApiKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_right_secret_in_time_of_a_known_tenant_is_verified() {
        let key = issued();
        let other = issued();
        let active = Some(TenantStatus::Active);
        assert!(verify(&key, None, active, NOW).is_err());
        assert!(verify(&key, Some(record(&other, None)), active, NOW).is_err());
        let stolen_id = KeyRecord { secret_hash: other.secret_hash(), ..record(&key, None) };
        assert!(verify(&key, Some(stolen_id), active, NOW).is_err());
        assert!(verify(&key, Some(record(&key, Some(NOW))), active, NOW).is_err());
        assert!(verify(&key, Some(record(&key, Some(NOW.plus_millis(1)))), active, NOW).is_ok());
        assert!(verify(&key, Some(record(&key, None)), None, NOW).is_err());
        assert!(verify(&key, Some(record(&key, None)), Some(TenantStatus::Provisioning), NOW).is_err());
    }

    #[test]
    fn grants_cover_what_does_not_go_beyond_them() {
        let grants =
            |permissions: &[Permission], expires_ms: Option<i64>, networks: Option<&[&str]>| Grants {
                permissions: permissions.iter().copied().collect(),
                expires_at: expires_ms.map(Timestamp::from_millis),
                allowed_cidrs: networks.map(|all| all.iter().map(|text| text.parse().unwrap()).collect()),
            };
        let chat = &[Permission::Chat][..];
        let bound = grants(&[Permission::Chat, Permission::KeysWrite], Some(9), Some(&["10.0.0.0/8", "::1"]));
        assert_eq!(Grants::all().cover(&bound), Ok(()));
        assert_eq!(bound.cover(&bound), Ok(()));
        assert_eq!(bound.cover(&grants(chat, Some(8), Some(&["10.1.0.0/16"]))), Ok(()));
        let audit = grants(&[Permission::AuditRead], Some(8), Some(&["::1"]));
        assert_eq!(bound.cover(&audit), Err(Beyond::Permission(Permission::AuditRead)));
        assert_eq!(bound.cover(&grants(chat, Some(10), Some(&["::1"]))), Err(Beyond::Life));
        assert_eq!(bound.cover(&grants(chat, None, Some(&["::1"]))), Err(Beyond::Life));
        assert_eq!(bound.cover(&grants(chat, Some(9), None)), Err(Beyond::Addresses));
        assert_eq!(bound.cover(&grants(chat, Some(9), Some(&["::1", "11.0.0.0/8"]))), Err(Beyond::Addresses));
    }

    #[test]
    fn a_list_lets_in_what_it_names_and_an_empty_one_nobody() {
        let grants = |networks: Option<Vec<Network>>| Grants { allowed_cidrs: networks, ..Grants::all() };
        let (inside, outside) = ("10.1.1.1".parse().ok(), "11.1.1.1".parse().ok());
        let ten = grants(Some(vec!["10.0.0.0/8".parse().unwrap()]));
        assert!(ten.allow(inside) && !ten.allow(outside) && !ten.allow(None));
        assert!(!grants(Some(Vec::new())).allow(inside));
        assert!(grants(None).allow(None));
    }

    #[test]
    fn nothing_printed_holds_the_secret() {
        let key = issued();
        let shown = format!("{key:?} {:?}", record(&key, None));
        assert!(!shown.contains(&key.secret), "{shown}");
        assert!(!shown.contains(&String::from(key.secret_hash())), "{shown}");
    }
}
