//! Tokens of a tenant's users: JSON Web Tokens (RFC 7519), signed (RFC 7515). Pure.
//!
//! A token is read strictly and believed late. Its names lead to the issuer's record; that record's keys,
//! each for its own algorithm alone, tell whether it is genuine; only then do its claims count. `jsonwebtoken`
//! does the cryptography. What RFC 8725 warns of is refused here, in this order: size, shape, header, time.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm as Signature, DecodingKey, crypto};
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::clock::Timestamp;
use crate::groups::Groups;
use crate::ids::UserId;
use crate::issuer::{
    Algorithm, Issuer, LONGEST_KEY_NAME, LONGEST_NAME, Material, Provenance, PublicKey, Vouched,
};
use crate::tenant::TenantStatus;

/// The longest token, in bytes: what fits API Gateway's headers beside the others.
pub const LONGEST_TOKEN: usize = 8_192;
/// Audiences that one token may name at most.
const MOST_AUDIENCES: usize = 4;
/// How far the issuer's clock may differ from ours, in seconds.
pub const LEEWAY_S: i64 = 60;
/// The last second of the year 9999: a token that ends later has no honest issuer.
const LAST_S: i64 = 253_402_300_799;
/// What a token says it is, where it says so. Others that an issuer signs (a logout, an event, a proof of
/// possession) let nobody in, though the signature is as good.
const TYPES: [&str; 3] = ["jwt", "at+jwt", "application/at+jwt"];

/// A token that lets nobody in. It says nothing more, so that an answer made of it tells nothing either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid token")]
pub struct InvalidToken;

/// A token as presented. It proves nothing until [`verify`] has seen it. `Debug` hides it.
pub struct PresentedToken {
    header: Header,
    claims: Claims,
    issuer: String,
    audiences: Vec<String>,
    /// Header and claims, as they were signed.
    message: String,
    signature: String,
}

/// The header's members that matter. One that is there twice is refused with the token.
#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    typ: Option<String>,
    /// Extensions that have to be understood: none are.
    #[serde(default)]
    crit: Option<IgnoredAny>,
}

/// The claims. One that is there twice is refused with the token: which of the two an issuer meant, and which
/// another reader believes, nobody knows.
struct Claims(BTreeMap<String, Value>);

impl<'de> Deserialize<'de> for Claims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Once;

        impl<'de> Visitor<'de> for Once {
            type Value = Claims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("claims")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Claims, A::Error> {
                let mut claims = BTreeMap::new();
                while let Some((name, value)) = map.next_entry()? {
                    if claims.insert(name, value).is_some() {
                        return Err(serde::de::Error::custom("a claim is there twice"));
                    }
                }
                Ok(Claims(claims))
            }
        }

        deserializer.deserialize_map(Once)
    }
}

impl Claims {
    fn text(&self, name: &str) -> Result<&str, InvalidToken> {
        self.0.get(name).and_then(Value::as_str).ok_or(InvalidToken)
    }

    /// A claim that is an instant, in whole seconds. RFC 7519 lets it have a fraction, which is cut.
    fn seconds(&self, name: &str) -> Result<Option<i64>, InvalidToken> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        let whole = value.as_i64().or_else(|| {
            let seconds = value.as_f64().filter(|_| value.is_f64())?;
            (0.0..=LAST_S as f64).contains(&seconds).then_some(seconds as i64)
        });
        whole.filter(|s| (0..=LAST_S).contains(s)).map(Some).ok_or(InvalidToken)
    }

    fn audiences(&self) -> Result<Vec<String>, InvalidToken> {
        let all: Vec<&str> = match self.0.get("aud") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(all)) => {
                all.iter().map(Value::as_str).collect::<Option<_>>().ok_or(InvalidToken)?
            }
            _ => return Err(InvalidToken),
        };
        let bounded = (1..=MOST_AUDIENCES).contains(&all.len())
            && all.iter().all(|one| (1..=LONGEST_NAME).contains(&one.len()));
        if bounded { Ok(all.into_iter().map(str::to_owned).collect()) } else { Err(InvalidToken) }
    }
}

impl PresentedToken {
    /// The token that an `Authorization` header presents, if what it presents is one rather than a key: keys
    /// have no dots.
    pub fn is_in(header: &str) -> bool {
        header.contains('.')
    }

    /// The token that an `Authorization` header presents as a bearer token.
    ///
    /// # Errors
    /// [`InvalidToken`] if it presents none that could ever be valid.
    pub fn from_authorization(header: &str) -> Result<Self, InvalidToken> {
        let (scheme, token) = header.split_once(' ').ok_or(InvalidToken)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(InvalidToken);
        }
        let token = token.trim();
        if token.len() > LONGEST_TOKEN {
            return Err(InvalidToken);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(InvalidToken)?;
        let (head, body) = message.split_once('.').ok_or(InvalidToken)?;
        let header: Header = part(head)?;
        let typed = header.typ.as_ref().is_none_or(|typ| TYPES.iter().any(|t| typ.eq_ignore_ascii_case(t)));
        let named = header.kid.as_ref().is_none_or(|kid| (1..=LONGEST_KEY_NAME).contains(&kid.len()));
        if header.crit.is_some() || !typed || !named {
            return Err(InvalidToken);
        }
        let claims: Claims = part(body)?;
        let issuer = claims.text("iss")?.to_owned();
        if !(1..=LONGEST_NAME).contains(&issuer.len()) {
            return Err(InvalidToken);
        }
        Ok(Self {
            audiences: claims.audiences()?,
            header,
            claims,
            issuer,
            message: message.to_owned(),
            signature: signature.to_owned(),
        })
    }

    /// Who is said to have issued it, and for whom. Unproven.
    pub fn provenances(&self) -> Vec<Provenance<'_>> {
        self.audiences.iter().map(|audience| Provenance { issuer: &self.issuer, audience }).collect()
    }

    /// The name of the key that it says it is signed with.
    pub fn key_name(&self) -> Option<&str> {
        self.header.kid.as_deref()
    }

    /// Whether it could be a token of that issuer now, if it is genuine: everything but the signature.
    ///
    /// # Errors
    /// [`InvalidToken`].
    pub fn plausible(&self, issuer: &Issuer, now: Timestamp) -> Result<Plausible, InvalidToken> {
        if !self.provenances().contains(&issuer.provenance()) {
            return Err(InvalidToken);
        }
        // Of a token that is bound to a key of its bearer, the bearer alone proves nothing.
        if self.claims.0.contains_key("cnf") {
            return Err(InvalidToken);
        }
        let now_s = now.as_seconds();
        let ends_s = self.claims.seconds("exp")?.ok_or(InvalidToken)?.saturating_add(LEEWAY_S);
        let begun = |at: Option<i64>| at.is_none_or(|at| at <= now_s.saturating_add(LEEWAY_S));
        if now_s >= ends_s || !begun(self.claims.seconds("nbf")?) || !begun(self.claims.seconds("iat")?) {
            return Err(InvalidToken);
        }
        // An address that nobody has checked is whoever's claims it.
        if issuer.user_claim == "email" && self.claims.0.get("email_verified") != Some(&Value::Bool(true)) {
            return Err(InvalidToken);
        }
        let user_id = self.claims.text(&issuer.user_claim)?.parse().map_err(|_| InvalidToken)?;
        let groups = Groups::claimed(self.claims.0.get(&issuer.groups_claim)).map_err(|_| InvalidToken)?;
        Ok(Plausible { user_id, groups, expires_at: Timestamp::from_millis(ends_s.saturating_mul(1_000)) })
    }

    /// The key that it is to be held against: the one of that name or, where it names none, the only one.
    /// The key's own algorithm must be the one that the header says.
    fn key<'k>(&self, keys: &'k [PublicKey]) -> Result<&'k PublicKey, InvalidToken> {
        let mut named = keys.iter().filter(|key| match &self.header.kid {
            Some(kid) => key.kid.as_ref() == Some(kid),
            None => keys.len() == 1,
        });
        let (Some(key), None) = (named.next(), named.next()) else { return Err(InvalidToken) };
        if key.algorithm().as_str() == self.header.alg { Ok(key) } else { Err(InvalidToken) }
    }
}

impl fmt::Debug for PresentedToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresentedToken(…)")
    }
}

/// What a token says that could be true.
#[derive(Debug)]
pub struct Plausible {
    user_id: UserId,
    groups: Groups,
    expires_at: Timestamp,
}

/// A part of a token: JSON in base64url, without padding.
fn part<T: DeserializeOwned>(text: &str) -> Result<T, InvalidToken> {
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| InvalidToken)?;
    serde_json::from_slice(&bytes).map_err(|_| InvalidToken)
}

/// Holds a token against the record of the issuer that its names led to, and that issuer's keys.
///
/// # Errors
/// [`InvalidToken`], whatever it was.
pub fn verify(
    token: &PresentedToken,
    issuer: &Issuer,
    keys: &[PublicKey],
    status: Option<TenantStatus>,
    now: Timestamp,
) -> Result<Vouched, InvalidToken> {
    let said = token.plausible(issuer, now)?;
    let key = token.key(keys)?;
    // A tenant that is not set up yet has no users; a suspended one is told so after they are recognised.
    let known = matches!(status, Some(TenantStatus::Active | TenantStatus::Suspended));
    let decoding = match &key.material {
        Material::Rsa { n, e } => DecodingKey::from_rsa_components(n, e),
        Material::P256 { x, y } => DecodingKey::from_ec_components(x, y),
        Material::Ed25519 { x } => DecodingKey::from_ed_components(x),
    };
    let algorithm = match key.algorithm() {
        Algorithm::Rs256 => Signature::RS256,
        Algorithm::Es256 => Signature::ES256,
        Algorithm::EdDsa => Signature::EdDSA,
    };
    let decoding = decoding.map_err(|_| InvalidToken)?;
    match crypto::verify(&token.signature, token.message.as_bytes(), &decoding, algorithm) {
        Ok(true) if known => Ok(Vouched::by(issuer, said.user_id, said.groups, said.expires_at)),
        _ => Err(InvalidToken),
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
        RsaPublicKeyComponents,
    };
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::api_key::{Grants, Permission};
    use crate::issuer::KeySource;

    const NOW: Timestamp = Timestamp::from_millis(1_790_000_000_500);
    const NOW_S: i64 = 1_790_000_000;

    enum Pair {
        Rsa(RsaKeyPair),
        P256(EcdsaKeyPair),
        Ed25519(Ed25519KeyPair),
    }

    impl Pair {
        fn all() -> [Self; 3] {
            let p256 = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING);
            [
                Self::Rsa(RsaKeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap()),
                Self::P256(p256.unwrap()),
                Self::Ed25519(Ed25519KeyPair::generate().unwrap()),
            ]
        }

        fn alg(&self) -> &'static str {
            match self {
                Self::Rsa(_) => "RS256",
                Self::P256(_) => "ES256",
                Self::Ed25519(_) => "EdDSA",
            }
        }

        fn public(&self, kid: Option<&str>) -> PublicKey {
            let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
            let material = match self {
                Self::Rsa(pair) => {
                    let public = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
                    Material::Rsa { n: text(&public.n), e: text(&public.e) }
                }
                Self::P256(pair) => {
                    let point = pair.public_key().as_ref();
                    Material::P256 { x: text(&point[1..33]), y: text(&point[33..]) }
                }
                Self::Ed25519(pair) => Material::Ed25519 { x: text(pair.public_key().as_ref()) },
            };
            PublicKey { kid: kid.map(str::to_owned), material }
        }

        fn sign(&self, message: &str) -> Vec<u8> {
            let (rng, message) = (SystemRandom::new(), message.as_bytes());
            match self {
                Self::Rsa(pair) => {
                    let mut signature = vec![0; pair.public_modulus_len()];
                    pair.sign(&RSA_PKCS1_SHA256, &rng, message, &mut signature).unwrap();
                    signature
                }
                Self::P256(pair) => pair.sign(&rng, message).unwrap().as_ref().to_vec(),
                Self::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
            }
        }

        fn token(&self, header: &str, claims: &str) -> String {
            let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
            let signature = URL_SAFE_NO_PAD.encode(self.sign(&message));
            format!("{message}.{signature}")
        }
    }

    fn issuer(user_claim: &str) -> Issuer {
        Issuer {
            tenant_id: "acme".parse().unwrap(),
            issuer_id: "iss_0123456789ab".parse().unwrap(),
            issuer: "https://login.acme.example/".into(),
            audience: "bulkhead".into(),
            keys: KeySource::Keys(Vec::new()),
            user_claim: user_claim.into(),
            groups_claim: "groups".into(),
            grants: Grants { permissions: [Permission::Chat].into(), ..Grants::all() },
            created_at: NOW,
        }
    }

    fn claims() -> Value {
        json!({"iss": "https://login.acme.example/", "aud": "bulkhead", "sub": "ann", "exp": NOW_S + 300})
    }

    fn with(mut claims: Value, name: &str, value: impl Into<Value>) -> Value {
        claims[name] = value.into();
        claims
    }

    fn check(token: &str, issuer: &Issuer, keys: &[PublicKey]) -> Result<Vouched, InvalidToken> {
        let token = PresentedToken::from_authorization(&format!("Bearer {token}"))?;
        verify(&token, issuer, keys, Some(TenantStatus::Active), NOW)
    }

    #[test]
    fn each_algorithm_vouches_for_the_user_until_the_token_ends() {
        for pair in Pair::all() {
            let token =
                pair.token(&json!({"alg": pair.alg(), "kid": "k"}).to_string(), &claims().to_string());
            let vouched = check(&token, &issuer("sub"), &[pair.public(Some("k"))]).unwrap();
            assert_eq!(vouched.user_id.as_str(), "ann");
            assert_eq!(vouched.grants.expires_at.unwrap().as_seconds(), NOW_S + 300 + LEEWAY_S);
            // And none of its characters can be another.
            for (n, c) in token.char_indices().step_by(7) {
                let mut changed = token.clone();
                changed.replace_range(n..=n, if c == 'A' { "B" } else { "A" });
                assert!(check(&changed, &issuer("sub"), &[pair.public(Some("k"))]).is_err(), "{changed}");
            }
        }
    }

    #[test]
    fn the_key_decides_the_algorithm() {
        let [rsa, p256, ed] = Pair::all();
        let keys = [rsa.public(Some("r")), p256.public(Some("p")), ed.public(Some("e"))];
        let text = claims().to_string();
        for (pair, alg, kid) in [
            (&rsa, "ES256", "r"),
            (&rsa, "RS256", "p"),
            (&p256, "RS256", "p"),
            (&ed, "ES256", "p"),
            (&rsa, "RS512", "r"),
            (&rsa, "PS256", "r"),
            (&rsa, "HS256", "r"),
            (&rsa, "rs256", "r"),
            (&rsa, "none", "r"),
            (&rsa, "", "r"),
            (&rsa, "RS256", "R"),
            (&rsa, "RS256", "other"),
        ] {
            let token = pair.token(&json!({"alg": alg, "kid": kid}).to_string(), &text);
            assert!(check(&token, &issuer("sub"), &keys).is_err(), "{alg} {kid}");
        }
        // Nobody's signature, under every name of it.
        for alg in ["none", "None", "NONE", "RS256"] {
            let header = URL_SAFE_NO_PAD.encode(json!({"alg": alg, "kid": "r"}).to_string());
            let token = format!("{header}.{}.", URL_SAFE_NO_PAD.encode(&text));
            assert!(check(&token, &issuer("sub"), &keys).is_err(), "{alg}");
        }
        // A secret that everybody knows: the public key, in the forms in which it may be at hand.
        let Material::Rsa { n, .. } = &keys[0].material else { panic!() };
        for secret in [n.clone().into_bytes(), URL_SAFE_NO_PAD.decode(n).unwrap()] {
            let message = format!(
                "{}.{}",
                URL_SAFE_NO_PAD.encode(json!({"alg": "HS256", "kid": "r"}).to_string()),
                URL_SAFE_NO_PAD.encode(&text)
            );
            let secret = jsonwebtoken::EncodingKey::from_secret(&secret);
            let signature = crypto::sign(message.as_bytes(), &secret, Signature::HS256).unwrap();
            assert!(check(&format!("{message}.{signature}"), &issuer("sub"), &keys).is_err());
        }
    }

    #[test]
    fn without_a_name_the_only_key_is_meant() {
        let [rsa, _, ed] = Pair::all();
        let token = ed.token(r#"{"alg":"EdDSA"}"#, &claims().to_string());
        assert!(check(&token, &issuer("sub"), &[ed.public(None)]).is_ok());
        assert!(check(&token, &issuer("sub"), &[ed.public(Some("k"))]).is_ok());
        assert!(check(&token, &issuer("sub"), &[ed.public(None), rsa.public(None)]).is_err());
        assert!(check(&token, &issuer("sub"), &[]).is_err());
        let named = ed.token(r#"{"alg":"EdDSA","kid":"k"}"#, &claims().to_string());
        assert!(check(&named, &issuer("sub"), &[ed.public(None)]).is_err());
        assert!(check(&named, &issuer("sub"), &[ed.public(Some("k")), ed.public(Some("k"))]).is_err());
    }

    #[test]
    fn a_header_has_nothing_that_is_not_understood() {
        let [_, _, ed] = Pair::all();
        for (header, good) in [
            (r#"{"alg":"EdDSA","typ":"JWT"}"#, true),
            (r#"{"alg":"EdDSA","typ":"at+jwt"}"#, true),
            (r#"{"alg":"EdDSA","x5t":"abc","jku":"https://evil.example/keys"}"#, true),
            (r#"{"alg":"EdDSA","typ":"logout+jwt"}"#, false),
            (r#"{"alg":"EdDSA","typ":"dpop+jwt"}"#, false),
            (r#"{"alg":"EdDSA","crit":["b64"],"b64":false}"#, false),
            (r#"{"alg":"EdDSA","crit":[]}"#, false),
            (r#"{"alg":"none","alg":"EdDSA"}"#, false),
            (r#"{"alg":"EdDSA","kid":"a","kid":"b"}"#, false),
            (r#"{"alg":"EdDSA","kid":""}"#, false),
            (r#"{"alg":["EdDSA"]}"#, false),
            (r#"{"kid":"k"}"#, false),
            (r#"[]"#, false),
            (r#"{"alg":"EdDSA"} "#, true),
            (r#"{"alg":"EdDSA"}{}"#, false),
            ("\u{feff}{\"alg\":\"EdDSA\"}", false),
        ] {
            let token = ed.token(header, &claims().to_string());
            assert_eq!(check(&token, &issuer("sub"), &[ed.public(None)]).is_ok(), good, "{header}");
        }
    }

    #[test]
    fn claims_are_of_this_issuer_for_this_audience_at_this_time() {
        let [_, _, ed] = Pair::all();
        for (claims, good) in [
            (with(claims(), "aud", json!(["other", "bulkhead"])), true),
            (with(claims(), "aud", json!(["bulkhead"])), true),
            (with(claims(), "aud", "other"), false),
            (with(claims(), "aud", "Bulkhead"), false),
            (with(claims(), "aud", "bulkhead "), false),
            (with(claims(), "aud", json!([])), false),
            (with(claims(), "aud", json!(["bulkhead", 7])), false),
            (with(claims(), "aud", json!(["a", "b", "c", "d", "bulkhead"])), false),
            (with(claims(), "aud", Value::Null), false),
            (with(claims(), "iss", "https://login.acme.example"), false),
            (with(claims(), "iss", "https://LOGIN.acme.example/"), false),
            (with(claims(), "iss", json!(["https://login.acme.example/"])), false),
            (with(claims(), "iss", Value::Null), false),
            (with(claims(), "exp", NOW_S - LEEWAY_S + 1), true),
            (with(claims(), "exp", NOW_S - LEEWAY_S), false),
            (with(claims(), "exp", (NOW_S + 1) as f64 + 0.5), true),
            (with(claims(), "exp", (NOW_S + 1).to_string()), false),
            (with(claims(), "exp", 1e300), false),
            (with(claims(), "exp", u64::MAX), false),
            (with(claims(), "exp", LAST_S), true),
            (with(claims(), "exp", LAST_S + 1), false),
            (with(claims(), "exp", -1), false),
            (with(claims(), "exp", Value::Null), false),
            (with(claims(), "nbf", NOW_S + LEEWAY_S), true),
            (with(claims(), "nbf", NOW_S + LEEWAY_S + 1), false),
            (with(claims(), "nbf", "soon"), false),
            (with(claims(), "iat", NOW_S + LEEWAY_S), true),
            (with(claims(), "iat", NOW_S + LEEWAY_S + 1), false),
            (with(claims(), "sub", ""), false),
            (with(claims(), "sub", "x".repeat(256)), true),
            (with(claims(), "sub", "x".repeat(257)), false),
            (with(claims(), "sub", "a\u{fffd}"), false),
            (with(claims(), "sub", 7), false),
            (with(claims(), "sub", Value::Null), false),
            (with(claims(), "cnf", json!({"jkt": "x"})), false),
        ] {
            let token = ed.token(r#"{"alg":"EdDSA"}"#, &claims.to_string());
            assert_eq!(check(&token, &issuer("sub"), &[ed.public(None)]).is_ok(), good, "{claims}");
        }
        let mut endless = claims();
        endless.as_object_mut().unwrap().remove("exp");
        let token = ed.token(r#"{"alg":"EdDSA"}"#, &endless.to_string());
        assert!(check(&token, &issuer("sub"), &[ed.public(None)]).is_err());
        let twice = claims().to_string().replacen('{', r#"{"sub":"bob","#, 1);
        let token = ed.token(r#"{"alg":"EdDSA"}"#, &twice);
        assert!(check(&token, &issuer("sub"), &[ed.public(None)]).is_err());
    }

    #[test]
    fn an_address_counts_once_it_is_verified() {
        let [_, _, ed] = Pair::all();
        let claims = with(claims(), "email", "ann@acme.example");
        for (said, good) in [
            (with(claims.clone(), "email_verified", true), true),
            (with(claims.clone(), "email_verified", "true"), false),
            (with(claims.clone(), "email_verified", false), false),
            (claims, false),
        ] {
            let token = ed.token(r#"{"alg":"EdDSA"}"#, &said.to_string());
            let vouched = check(&token, &issuer("email"), &[ed.public(None)]);
            assert_eq!(vouched.is_ok(), good, "{said}");
            assert!(vouched.is_err() || vouched.unwrap().user_id.as_str() == "ann@acme.example");
        }
    }

    #[test]
    fn a_tokens_groups_are_what_the_registered_claim_says() {
        let [_, _, ed] = Pair::all();
        let vouched = |claims: &Value, groups_claim: &str| {
            let token = ed.token(r#"{"alg":"EdDSA"}"#, &claims.to_string());
            let issuer = Issuer { groups_claim: groups_claim.into(), ..issuer("sub") };
            check(&token, &issuer, &[ed.public(None)]).map(|vouched| vouched.groups)
        };
        let groups = |names: &[&str]| {
            Groups::of_document(Some(names.iter().map(|name| (*name).to_owned()).collect())).unwrap()
        };
        let said = with(with(claims(), "groups", json!(["hr", "legal"])), "https://acme.example/teams", "hr");
        assert_eq!(vouched(&said, "groups"), Ok(groups(&["hr", "legal"])));
        assert_eq!(vouched(&said, "https://acme.example/teams"), Ok(groups(&["hr"])));
        assert_eq!(vouched(&said, "roles"), Ok(Groups::default()));
        assert_eq!(vouched(&claims(), "groups"), Ok(Groups::default()));
        for bad in [json!(7), json!([7]), json!({"hr": true}), json!([["hr"]])] {
            assert!(vouched(&with(claims(), "groups", bad.clone()), "groups").is_err(), "{bad}");
        }
        let many: Vec<String> = (0..=crate::groups::MOST_GROUPS).map(|n| n.to_string()).collect();
        assert!(vouched(&with(claims(), "groups", many), "groups").is_err());
    }

    #[test]
    fn only_a_tenant_that_is_set_up_has_users() {
        let [_, _, ed] = Pair::all();
        let text = ed.token(r#"{"alg":"EdDSA"}"#, &claims().to_string());
        let token = PresentedToken::from_authorization(&format!("bearer {text}")).unwrap();
        assert_eq!(format!("{token:?}"), "PresentedToken(…)");
        for (status, good) in [
            (Some(TenantStatus::Active), true),
            (Some(TenantStatus::Suspended), true),
            (Some(TenantStatus::Provisioning), false),
            (None, false),
        ] {
            assert_eq!(verify(&token, &issuer("sub"), &[ed.public(None)], status, NOW).is_ok(), good);
        }
    }

    #[test]
    fn size_and_shape_come_first() {
        let [_, _, ed] = Pair::all();
        let with_pad = |bytes: usize| {
            ed.token(r#"{"alg":"EdDSA"}"#, &with(claims(), "pad", "x".repeat(bytes)).to_string())
        };
        assert!(check(&with_pad(5_000), &issuer("sub"), &[ed.public(None)]).is_ok());
        assert!(check(&with_pad(20_000), &issuer("sub"), &[ed.public(None)]).is_err());
        let good = with_pad(0);
        let deep = ed.token(r#"{"alg":"EdDSA"}"#, &format!("{{\"a\":{}", "[".repeat(5_000)));
        for bad in [
            "",
            "..",
            "a.b",
            "a.b.c.d",
            &format!("{good}="),
            &format!("{good}.x"),
            &good.replacen('.', "..", 1),
            &good.replacen('.', ". ", 1),
            &format!("{}.", good.rsplit_once('.').unwrap().0),
            &deep,
        ] {
            assert!(check(bad, &issuer("sub"), &[ed.public(None)]).is_err(), "{bad}");
        }
        for header in ["", "Bearer", &good, &format!("Basic {good}"), &format!("Bearer Bearer {good}")] {
            assert!(PresentedToken::from_authorization(header).is_err(), "{header}");
        }
    }

    proptest! {
        #[test]
        fn nothing_random_is_a_token(text in "[ -~]{0,200}", parts in proptest::collection::vec("[A-Za-z0-9_-]{0,80}", 3)) {
            prop_assert!(check(&text, &issuer("sub"), &[]).is_err());
            prop_assert!(check(&parts.join("."), &issuer("sub"), &[]).is_err());
        }
    }
}
