//! Issuers of tokens: whom a tenant trusts to say who its users are. Pure.
//!
//! A token names who issued it and for whom; that pair belongs to one tenant. What an issuer signs with is
//! registered with it or found at its address, as a JSON Web Key Set (RFC 7517). Only public keys of three
//! kinds count, and the kind decides the algorithm: what a token says of its algorithm is never believed.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::api_key::{Grants, Permission};
use crate::clock::Timestamp;
use crate::groups::Groups;
use crate::ids::{IssuerId, UserId};
use crate::tenant::TenantId;

/// Issuers of one tenant at most.
pub const MOST_ISSUERS: usize = 20;
/// Keys that are registered with an issuer at most.
pub const MOST_KEYS: usize = 16;
/// Keys of a set at an address at most.
pub const MOST_FETCHED: usize = 64;
/// The longest name of a key, in bytes.
pub const LONGEST_KEY_NAME: usize = 256;
/// The longest name of an issuer, an audience or an address, in bytes.
pub const LONGEST_NAME: usize = 512;
/// The bits that an RSA key may have: fewer are no longer safe, and more only cost time.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2_048..=4_096;

/// What a token may be let in to: all but `keys:write`. A user who could make keys, or issuers, would
/// outlive the token.
pub fn grantable(permission: Permission) -> bool {
    permission != Permission::KeysWrite
}

/// Who issued a token, and for whom. A pair belongs to one tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Provenance<'a> {
    /// The claim `iss`, compared as it is.
    pub issuer: &'a str,
    /// The claim `aud`, or one of them.
    pub audience: &'a str,
}

impl Provenance<'_> {
    /// A hash that no other pair has: the length keeps the two names apart.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update((self.issuer.len() as u64).to_be_bytes());
        hash.update(self.issuer.as_bytes());
        hash.update(self.audience.as_bytes());
        hex::encode(hash.finalize())
    }
}

/// An issuer's record: item `ISSUER#<id>` of its tenant's partition in table `tenants`. It is made and
/// removed, never changed: one that is registered again is another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issuer {
    /// The tenant.
    pub tenant_id: TenantId,
    /// The issuer.
    pub issuer_id: IssuerId,
    /// What its tokens say in `iss`.
    pub issuer: String,
    /// What its tokens say in `aud`.
    pub audience: String,
    /// What it signs with.
    pub keys: KeySource,
    /// The claim that names the user.
    pub user_claim: String,
    /// The claim that names the user's groups. One that was registered before there were groups names them as
    /// the default is.
    #[serde(default = "default_groups_claim")]
    pub groups_claim: String,
    /// What its tokens may do, from where and how long.
    pub grants: Grants,
    /// When it was registered.
    pub created_at: Timestamp,
}

/// The claim that names a user's groups where the issuer's registration does not say.
pub fn default_groups_claim() -> String {
    "groups".to_owned()
}

impl Issuer {
    /// The pair of names that its tokens carry.
    pub fn provenance(&self) -> Provenance<'_> {
        Provenance { issuer: &self.issuer, audience: &self.audience }
    }
}

/// Where an issuer's keys are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeySource {
    /// At its own address, where they may change.
    JwksUrl(JwksUrl),
    /// Here.
    Keys(Vec<PublicKey>),
}

/// A user for whom an issuer of the tenant has vouched. Only a verified token makes one, or the issuer's
/// record where one was made before.
#[derive(Clone, Debug)]
pub struct Vouched {
    pub(crate) tenant_id: TenantId,
    pub(crate) issuer_id: IssuerId,
    pub(crate) user_id: UserId,
    pub(crate) groups: Groups,
    pub(crate) grants: Grants,
}

impl Vouched {
    /// A user of these groups for whom `issuer` vouches until then, if its own end is not before.
    pub(crate) fn by(issuer: &Issuer, user_id: UserId, groups: Groups, ends: Timestamp) -> Self {
        let Grants { permissions, expires_at, allowed_cidrs } = issuer.grants.clone();
        Self {
            tenant_id: issuer.tenant_id.clone(),
            issuer_id: issuer.issuer_id.clone(),
            user_id,
            groups,
            grants: Grants {
                permissions: permissions.into_iter().filter(|permission| grantable(*permission)).collect(),
                expires_at: Some(expires_at.map_or(ends, |at| at.min(ends))),
                allowed_cidrs,
            },
        }
    }

    /// The issuer.
    pub const fn issuer_id(&self) -> &IssuerId {
        &self.issuer_id
    }

    /// What the token may do.
    pub const fn permissions(&self) -> &BTreeSet<Permission> {
        &self.grants.permissions
    }
}

/// An algorithm that tokens may be signed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// RSA PKCS #1 1.5 with SHA-256.
    Rs256,
    /// ECDSA on P-256 with SHA-256.
    Es256,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// Its name in a token's header.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Es256 => "ES256",
            Self::EdDsa => "EdDSA",
        }
    }
}

/// A public key, as a JSON Web Key. Whatever else the key said is not kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Jwk", into = "Jwk")]
pub struct PublicKey {
    /// Its name.
    pub kid: Option<String>,
    /// The key itself.
    pub material: Material,
}

/// The numbers of a key, in base64url.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of RFC 7518 are the documentation")]
pub enum Material {
    Rsa { n: String, e: String },
    P256 { x: String, y: String },
    Ed25519 { x: String },
}

impl PublicKey {
    /// The one algorithm that it verifies.
    pub const fn algorithm(&self) -> Algorithm {
        match self.material {
            Material::Rsa { .. } => Algorithm::Rs256,
            Material::P256 { .. } => Algorithm::Es256,
            Material::Ed25519 { .. } => Algorithm::EdDsa,
        }
    }
}

/// Why a key cannot be used. It never quotes the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableKey {
    /// Whoever verifies with it can sign with it.
    #[error("is a symmetric key (`kty` is `oct`): whoever verifies with it could also sign with it")]
    Symmetric,
    /// Its private half is in it.
    #[error("holds a private key, which is a secret no longer: replace it, and register the public half")]
    Private,
    /// It is of no kind that is known.
    #[error("is none of RSA, EC on the curve P-256, and OKP on the curve Ed25519")]
    Kind,
    /// It says that it is for another algorithm.
    #[error("has an `alg` other than RS256, ES256 and EdDSA, or not that of its `kty`")]
    Algorithm,
    /// It says that it is for something else.
    #[error("is not for signatures: `use` is not `sig`, or `key_ops` is without `verify`")]
    Purpose,
    /// Its name cannot be one.
    #[error("has a `kid` that is empty or longer than 256 bytes")]
    Name,
    /// An RSA key has too few bits, or too many.
    #[error("is an RSA key of less than 2048 or more than 4096 bits")]
    Size,
    /// A number is missing, is not base64url, or has not the length that it has to have.
    #[error("lacks `{0}`, or `{0}` is not base64url of the right length")]
    Number(&'static str),
}

/// A JSON Web Key as it is written. Private members are looked for and never read.
#[derive(Default, Serialize, Deserialize)]
struct Jwk {
    kty: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kid: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alg: Option<String>,
    #[serde(default, rename = "use", skip_serializing_if = "Option::is_none")]
    purpose: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_ops: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crv: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    n: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    e: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    x: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    y: Option<String>,
    #[serde(default, skip_serializing)]
    k: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    d: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    p: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    q: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    dp: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    dq: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    qi: Option<IgnoredAny>,
    #[serde(default, skip_serializing)]
    oth: Option<IgnoredAny>,
}

impl TryFrom<Jwk> for PublicKey {
    type Error = UnusableKey;

    fn try_from(jwk: Jwk) -> Result<Self, UnusableKey> {
        if jwk.kty == "oct" || jwk.k.is_some() {
            return Err(UnusableKey::Symmetric);
        }
        let private = [&jwk.d, &jwk.p, &jwk.q, &jwk.dp, &jwk.dq, &jwk.qi, &jwk.oth];
        if private.iter().any(|member| member.is_some()) {
            return Err(UnusableKey::Private);
        }
        if jwk.kid.as_ref().is_some_and(|kid| kid.is_empty() || kid.len() > LONGEST_KEY_NAME) {
            return Err(UnusableKey::Name);
        }
        let material = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => {
                let (n, bytes) = number("n", jwk.n)?;
                let zeros: usize = bytes.iter().take_while(|byte| **byte == 0).count();
                let first = bytes.get(zeros).map_or(8, |byte| byte.leading_zeros() as usize);
                if !RSA_BITS.contains(&((bytes.len() - zeros) * 8).saturating_sub(first)) {
                    return Err(UnusableKey::Size);
                }
                let (e, bytes) = number("e", jwk.e)?;
                if !(1..=8).contains(&bytes.len()) {
                    return Err(UnusableKey::Number("e"));
                }
                Material::Rsa { n, e }
            }
            ("EC", Some("P-256")) => {
                Material::P256 { x: coordinate("x", jwk.x)?, y: coordinate("y", jwk.y)? }
            }
            ("OKP", Some("Ed25519")) => Material::Ed25519 { x: coordinate("x", jwk.x)? },
            _ => return Err(UnusableKey::Kind),
        };
        let key = Self { kid: jwk.kid, material };
        if jwk.alg.is_some_and(|alg| alg != key.algorithm().as_str()) {
            return Err(UnusableKey::Algorithm);
        }
        let verifies = jwk.key_ops.is_none_or(|ops| ops.iter().any(|op| op == "verify"));
        if !verifies || jwk.purpose.is_some_and(|purpose| purpose != "sig") {
            return Err(UnusableKey::Purpose);
        }
        Ok(key)
    }
}

impl From<PublicKey> for Jwk {
    fn from(key: PublicKey) -> Self {
        let jwk = Self { alg: Some(key.algorithm().as_str().to_owned()), kid: key.kid, ..Self::default() };
        let text = |text: &str| Some(text.to_owned());
        match key.material {
            Material::Rsa { n, e } => Self { kty: "RSA".to_owned(), n: Some(n), e: Some(e), ..jwk },
            Material::P256 { x, y } => {
                Self { kty: "EC".to_owned(), crv: text("P-256"), x: Some(x), y: Some(y), ..jwk }
            }
            Material::Ed25519 { x } => {
                Self { kty: "OKP".to_owned(), crv: text("Ed25519"), x: Some(x), ..jwk }
            }
        }
    }
}

fn number(name: &'static str, text: Option<String>) -> Result<(String, Vec<u8>), UnusableKey> {
    let text = text.filter(|text| text.len() <= 1_024).ok_or(UnusableKey::Number(name))?;
    let bytes = URL_SAFE_NO_PAD.decode(&text).map_err(|_| UnusableKey::Number(name))?;
    Ok((text, bytes))
}

fn coordinate(name: &'static str, text: Option<String>) -> Result<String, UnusableKey> {
    let (text, bytes) = number(name, text)?;
    if bytes.len() == 32 { Ok(text) } else { Err(UnusableKey::Number(name)) }
}

/// A set that cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not a JSON Web Key Set of at most 64 keys")]
pub struct MalformedKeySet;

/// The keys of a set as an issuer publishes it. Those that are for something else, or of another kind, are
/// left out, as RFC 7517 (section 5) asks.
///
/// # Errors
/// [`MalformedKeySet`].
pub fn published(set: &[u8]) -> Result<Vec<PublicKey>, MalformedKeySet> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(set).map_err(|_| MalformedKeySet)?;
    if set.keys.len() > MOST_FETCHED {
        return Err(MalformedKeySet);
    }
    Ok(set.keys.into_iter().filter_map(|key| serde_json::from_value(key).ok()).collect())
}

/// How far an issuer's address may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// On the public internet, by HTTPS.
    Internet,
    /// In private networks too, and by plain HTTP on this very machine.
    Private,
}

impl FromStr for Reach {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "internet" => Ok(Self::Internet),
            "private" => Ok(Self::Private),
            _ => Err("must be `internet` or `private`"),
        }
    }
}

/// The address of a key set: `https://<host>[:<port>]/…`, without a user, a fragment or anything that two
/// parsers could read in two ways. Where its name leads is looked at when it is asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JwksUrl(String);

/// A text that is no address of a key set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUrl {
    /// It is not written as one.
    #[error("must be an address of at most 512 characters: https://, a host name, and a path")]
    Malformed,
    /// It lies where nothing may be asked.
    #[error("must be an https address on the public internet, named by its host name")]
    OutOfReach,
}

impl JwksUrl {
    /// The address, as it was registered.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its host: what of it may be logged.
    pub fn host(&self) -> &str {
        self.parts().map_or("", |(_, host)| host)
    }

    /// Checks that it may be registered.
    ///
    /// # Errors
    /// [`InvalidUrl::OutOfReach`].
    pub fn within(self, reach: Reach) -> Result<Self, InvalidUrl> {
        let (secure, host) = self.parts().ok_or(InvalidUrl::Malformed)?;
        // As in a browser: a name that ends in a number is an address.
        let last = host.rsplit('.').next().unwrap_or_default();
        let numeric = last.bytes().all(|b| b.is_ascii_digit()) || last.starts_with("0x");
        let here = matches!(host, "127.0.0.1" | "localhost");
        let single = !host.contains('.');
        match reach {
            Reach::Internet if secure && !numeric && !single => Ok(self),
            Reach::Private if secure || here => Ok(self),
            _ => Err(InvalidUrl::OutOfReach),
        }
    }

    /// Whether it is asked by HTTPS, and its host.
    fn parts(&self) -> Option<(bool, &str)> {
        let (secure, rest) = match self.0.strip_prefix("https://") {
            Some(rest) => (true, rest),
            None => (false, self.0.strip_prefix("http://")?),
        };
        let authority = rest.split(['/', '?']).next()?;
        let (host, port) = authority.split_once(':').map_or((authority, None), |(h, p)| (h, Some(p)));
        let label = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        let named = host.len() <= 253 && host.split('.').all(label);
        let ported = port.is_none_or(|p| !p.starts_with('0') && p.parse::<u16>().is_ok());
        (named && ported).then_some((secure, host))
    }
}

impl FromStr for JwksUrl {
    type Err = InvalidUrl;
    fn from_str(text: &str) -> Result<Self, InvalidUrl> {
        let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'\\' | b'#' | b'"' | b'<' | b'>');
        let url = Self(text.to_owned());
        if text.len() <= LONGEST_NAME && text.bytes().all(plain) && url.parts().is_some() {
            Ok(url)
        } else {
            Err(InvalidUrl::Malformed)
        }
    }
}

impl TryFrom<String> for JwksUrl {
    type Error = InvalidUrl;
    fn try_from(text: String) -> Result<Self, InvalidUrl> {
        text.parse()
    }
}

impl From<JwksUrl> for String {
    fn from(url: JwksUrl) -> Self {
        url.0
    }
}

impl fmt::Display for JwksUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rsa(bits: usize) -> Value {
        let mut n = vec![0xff; bits / 8];
        n[0] = 0x80;
        json!({"kty": "RSA", "kid": "r", "n": URL_SAFE_NO_PAD.encode(n), "e": "AQAB"})
    }

    fn ec() -> Value {
        let number = URL_SAFE_NO_PAD.encode([7; 32]);
        json!({"kty": "EC", "crv": "P-256", "kid": "e", "x": number, "y": number})
    }

    fn ed() -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode([7; 32])})
    }

    fn with(mut key: Value, name: &str, value: impl Into<Value>) -> Value {
        key[name] = value.into();
        key
    }

    fn parsed(key: Value) -> Result<PublicKey, String> {
        serde_json::from_value(key).map_err(|error| error.to_string())
    }

    #[test]
    fn public_keys_of_three_kinds_are_taken_and_written_as_they_came() {
        for (key, algorithm) in
            [(rsa(2_048), "RS256"), (rsa(4_096), "RS256"), (ec(), "ES256"), (ed(), "EdDSA")]
        {
            let read = parsed(with(key.clone(), "use", "sig")).unwrap();
            assert_eq!(read.algorithm().as_str(), algorithm);
            assert_eq!(serde_json::to_value(&read).unwrap(), with(key, "alg", algorithm));
            assert_eq!(parsed(serde_json::to_value(&read).unwrap()).unwrap(), read);
        }
    }

    #[test]
    fn every_other_key_is_refused_by_what_it_is() {
        let short = URL_SAFE_NO_PAD.encode([7; 31]);
        for (key, why) in [
            (json!({"kty": "oct", "k": "c2VjcmV0"}), UnusableKey::Symmetric),
            (with(rsa(2_048), "k", "c2VjcmV0"), UnusableKey::Symmetric),
            (with(rsa(2_048), "d", "c2VjcmV0"), UnusableKey::Private),
            (with(rsa(2_048), "p", 1), UnusableKey::Private),
            (with(rsa(2_048), "oth", json!([])), UnusableKey::Private),
            (with(ec(), "d", "c2VjcmV0"), UnusableKey::Private),
            (with(ed(), "d", "c2VjcmV0"), UnusableKey::Private),
            (with(ec(), "crv", "P-384"), UnusableKey::Kind),
            (with(ed(), "crv", "X25519"), UnusableKey::Kind),
            (with(ed(), "crv", "Ed448"), UnusableKey::Kind),
            (json!({"kty": "rsa"}), UnusableKey::Kind),
            (with(rsa(2_048), "alg", "PS256"), UnusableKey::Algorithm),
            (with(rsa(2_048), "alg", "HS256"), UnusableKey::Algorithm),
            (with(ec(), "alg", "RS256"), UnusableKey::Algorithm),
            (with(rsa(2_048), "use", "enc"), UnusableKey::Purpose),
            (with(ec(), "key_ops", json!(["sign"])), UnusableKey::Purpose),
            (with(ec(), "kid", ""), UnusableKey::Name),
            (with(ec(), "kid", "k".repeat(257)), UnusableKey::Name),
            (rsa(1_024), UnusableKey::Size),
            (rsa(2_040), UnusableKey::Size),
            (rsa(4_104), UnusableKey::Size),
            (with(rsa(2_048), "e", ""), UnusableKey::Number("e")),
            (with(rsa(2_048), "n", "a+b="), UnusableKey::Number("n")),
            (with(ec(), "x", short.clone()), UnusableKey::Number("x")),
            (with(ec(), "y", Value::Null), UnusableKey::Number("y")),
            (with(ed(), "x", short), UnusableKey::Number("x")),
        ] {
            assert_eq!(parsed(key.clone()).unwrap_err(), why.to_string(), "{key}");
        }
    }

    #[test]
    fn of_a_published_set_the_keys_that_count_are_taken() {
        let set = json!({"keys": [rsa(2_048), with(rsa(2_048), "use", "enc"), {"kty": "oct", "k": "c2Vj"}, {}, 7, ec()]});
        let keys = published(set.to_string().as_bytes()).unwrap();
        assert_eq!(
            keys.iter().map(|key| key.algorithm()).collect::<Vec<_>>(),
            [Algorithm::Rs256, Algorithm::Es256]
        );
        let many = json!({"keys": vec![json!({}); MOST_FETCHED + 1]});
        for bad in ["", "[]", "{}", r#"{"keys":{}}"#, "<html>", &many.to_string()] {
            assert_eq!(published(bad.as_bytes()), Err(MalformedKeySet), "{bad}");
        }
    }

    #[test]
    fn no_two_pairs_share_a_hash_by_being_cut_elsewhere() {
        let digest = |issuer, audience| Provenance { issuer, audience }.digest();
        assert_ne!(digest("ab", "c"), digest("a", "bc"));
        assert_ne!(digest("", "abc"), digest("abc", ""));
        assert_eq!(digest("a", "b").len(), 64);
    }

    #[test]
    fn an_address_has_one_reading() {
        let at = |text: &str, reach| text.parse::<JwksUrl>().and_then(|url| url.within(reach));
        for good in [
            "https://login.example.com/keys",
            "https://login.example.com:8443/a/b?c=d",
            "https://a-1.example.com",
        ] {
            assert_eq!(at(good, Reach::Internet).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "https://",
            "https:///keys",
            "ftp://example.com/keys",
            "https://user@example.com/keys",
            "https://example.com@evil.example/keys",
            "https://example.com\\@evil.example/keys",
            "https://example.com/keys#x",
            "https://exa mple.com/",
            "https://example..com/",
            "https://EXAMPLE.com/",
            "https://exämple.com/",
            "https://[::1]/keys",
            "https://example.com:0/",
            "https://example.com:65536/",
            "https://example.com:/",
            "https://example.com%2eevil.example/",
            &format!("https://example.com/{}", "x".repeat(500)),
        ] {
            assert_eq!(at(bad, Reach::Private), Err(InvalidUrl::Malformed), "{bad}");
        }
        for far in [
            "http://login.example.com/keys",
            "https://127.0.0.1/keys",
            "https://169.254.169.254/latest/meta-data",
            "https://2130706433/",
            "https://0x7f.1/",
            "https://127.1/",
            "https://localhost/",
            "https://metadata/",
            "http://127.0.0.1:8080/keys",
        ] {
            assert_eq!(at(far, Reach::Internet), Err(InvalidUrl::OutOfReach), "{far}");
        }
        assert!(at("http://127.0.0.1:8080/keys", Reach::Private).is_ok());
        assert!(at("https://10.0.0.1/keys", Reach::Private).is_ok());
        assert_eq!(at("http://10.0.0.1/keys", Reach::Private), Err(InvalidUrl::OutOfReach));
    }
}
