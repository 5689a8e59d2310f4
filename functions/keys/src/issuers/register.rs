//! `POST /v1/issuers`: from now on the tokens of that issuer, for that audience, name the tenant's users.

use std::collections::BTreeSet;

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::Deserialize;
use serde_json::Value;
use shared::api_key::{Grants, Permission};
use shared::aws::issuers::Registered;
use shared::error::{ApiError, Code};
use shared::idempotency::{IdempotencyKey, Stored};
use shared::ids::IssuerId;
use shared::issuer::{
    Issuer, JwksUrl, KeySource, LONGEST_NAME, MOST_ISSUERS, MOST_KEYS, PublicKey, Reach,
    default_groups_claim, grantable,
};
use shared::ledger::{Action, Record};
use shared::new_key::within;
use shared::scope::TenantScope;
use shared::web;

use super::View;
use crate::{Context, ROUNDS};

/// The longest name of a claim. Some are addresses.
const LONGEST_CLAIM: usize = 128;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewIssuer {
    issuer: String,
    audience: String,
    jwks_url: Option<String>,
    keys: Option<Vec<Value>>,
    user_claim: Option<String>,
    groups_claim: Option<String>,
    scopes: Option<Vec<Permission>>,
}

/// An issuer that may be registered, by whoever may do as much.
#[derive(Debug)]
struct Valid {
    issuer: String,
    audience: String,
    keys: KeySource,
    user_claim: String,
    groups_claim: String,
    scopes: Option<BTreeSet<Permission>>,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let key = web::idempotency_key(&request, scope)?;
    let ends_at_s = web::ends_at_s(&request);
    let valid = validate(web::json(&request)?, context.issuer_reach)?;
    valid.grants(scope.grants())?;
    let first = context.gate.first_result(scope, &context.idempotency, key.as_ref(), ends_at_s);
    if let Some(stored) = Box::pin(first).await? {
        return Ok(web::repeated(stored));
    }
    let registered = Box::pin(register(context, scope, key.as_ref(), valid)).await;
    if registered.is_err() {
        context.idempotency.give_back(scope, key.as_ref()).await;
    }
    registered.map(web::repeated)
}

async fn register(
    context: &Context,
    scope: &mut TenantScope,
    key: Option<&IdempotencyKey>,
    valid: Valid,
) -> Result<Stored, ApiError> {
    context.gate.admit_read(scope).await?;
    for _ in 0..ROUNDS {
        // What is handed on is what the key may do now, not what it could when a decision was kept.
        context.gate.renew(scope).await?;
        let now = context.clock.now();
        let issuer = Issuer {
            tenant_id: scope.tenant_id().clone(),
            issuer_id: IssuerId::new(&mut context.entropy.clone()),
            issuer: valid.issuer.clone(),
            audience: valid.audience.clone(),
            keys: valid.keys.clone(),
            user_claim: valid.user_claim.clone(),
            groups_claim: valid.groups_claim.clone(),
            grants: valid.grants(scope.grants())?,
            created_at: now,
        };
        let note = Record::event(scope, Action::IssuerRegistered, Vec::new(), now);
        let note = note.about(vec![issuer.issuer_id.clone()]);
        let body = serde_json::to_string(&View::from(issuer.clone())).map_err(|error| {
            tracing::error!("An answer does not serialise: {error}");
            ApiError::unavailable("the answer")
        })?;
        let stored = Stored { status: StatusCode::CREATED.as_u16(), body };
        let finished = key.map(|key| context.idempotency.finished(key, &stored, now));
        match context.issuers.register(scope, &issuer, (&context.ledger, &note), finished).await? {
            Registered::Yes => {
                tracing::info!(issuer.id = %issuer.issuer_id, "Issuer registered");
                return Ok(stored);
            }
            Registered::Stale => {}
            Registered::Full => {
                let message = format!("a tenant has at most {MOST_ISSUERS} issuers; remove one first");
                return Err(ApiError::new(Code::Conflict, message));
            }
            Registered::Superseded => return Err(ApiError::superseded()),
            // Whose they are is nobody's business.
            Registered::Taken => {
                let message = "tokens of this issuer for this audience are registered already";
                return Err(ApiError::new(Code::Conflict, message).with_param("issuer"));
            }
        }
    }
    Err(ApiError::unavailable("the tenant's present state"))
}

impl Valid {
    /// What the tokens may do: no more than the key that registers their issuer, from nowhere else, and no
    /// longer.
    fn grants(&self, most: &Grants) -> Result<Grants, ApiError> {
        let permissions = match &self.scopes {
            Some(scopes) => scopes.clone(),
            // What tokens cannot hold, they are not given.
            None => most.permissions.iter().copied().filter(|scope| grantable(*scope)).collect(),
        };
        if permissions.is_empty() {
            let message = "scopes must name at least one scope: tokens could do nothing";
            return Err(ApiError::invalid("scopes", message));
        }
        let grants = Grants { permissions, ..most.clone() };
        within(most, &grants)?;
        Ok(grants)
    }
}

fn validate(new: NewIssuer, reach: Reach) -> Result<Valid, ApiError> {
    named("issuer", &new.issuer, LONGEST_NAME)?;
    named("audience", &new.audience, LONGEST_NAME)?;
    let user_claim = new.user_claim.unwrap_or_else(|| "sub".to_owned());
    named("user_claim", &user_claim, LONGEST_CLAIM)?;
    let groups_claim = new.groups_claim.unwrap_or_else(default_groups_claim);
    named("groups_claim", &groups_claim, LONGEST_CLAIM)?;
    let keys = match (new.jwks_url, new.keys) {
        (Some(url), None) => {
            let url = url.parse::<JwksUrl>().and_then(|url| url.within(reach));
            let invalid = |error| ApiError::invalid("jwks_url", format!("jwks_url {error}"));
            KeySource::JwksUrl(url.map_err(invalid)?)
        }
        (None, Some(keys)) => KeySource::Keys(public(keys)?),
        _ => {
            let message = "say where the issuer's keys are: either `jwks_url` or `keys`";
            return Err(ApiError::invalid("jwks_url", message));
        }
    };
    for (n, scope) in new.scopes.iter().flatten().enumerate() {
        if !grantable(*scope) {
            let message =
                format!("`{}` is for keys alone: whom a token lets in could make a key", scope.as_str());
            return Err(ApiError::invalid(format!("scopes[{n}]"), message));
        }
    }
    let scopes = new.scopes.map(|scopes| scopes.into_iter().collect());
    Ok(Valid { issuer: new.issuer, audience: new.audience, keys, user_claim, groups_claim, scopes })
}

fn named(param: &'static str, text: &str, longest: usize) -> Result<(), ApiError> {
    if (1..=longest).contains(&text.len()) && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ApiError::invalid(param, format!("{param} must have 1 to {longest} bytes and no control characters")))
}

fn public(keys: Vec<Value>) -> Result<Vec<PublicKey>, ApiError> {
    if !(1..=MOST_KEYS).contains(&keys.len()) {
        return Err(ApiError::invalid("keys", format!("keys must hold 1 to {MOST_KEYS} keys")));
    }
    let mut public: Vec<PublicKey> = Vec::with_capacity(keys.len());
    let several = keys.len() > 1;
    for (n, key) in keys.into_iter().enumerate() {
        let param = format!("keys[{n}]");
        let key: PublicKey = serde_json::from_value(key)
            .map_err(|error| ApiError::invalid(param.clone(), format!("{param} {error}")))?;
        if several && key.kid.is_none() {
            let message = format!("{param} has no `kid`: of several keys, tokens have to name theirs");
            return Err(ApiError::invalid(param, message));
        }
        if public.iter().any(|other| other.kid == key.kid) {
            return Err(ApiError::invalid(param.clone(), format!("{param} has the `kid` of another")));
        }
        public.push(key);
    }
    Ok(public)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ed(kid: Option<&str>) -> Value {
        let mut key = json!({"kty": "OKP", "crv": "Ed25519", "x": "A".repeat(43)});
        if let Some(kid) = kid {
            key["kid"] = kid.into();
        }
        key
    }

    fn new() -> Value {
        json!({"issuer": "https://login.acme.example", "audience": "bulkhead", "keys": [ed(None)]})
    }

    fn with(mut body: Value, name: &str, value: impl Into<Value>) -> Value {
        body[name] = value.into();
        body
    }

    fn check(body: Value, held: &[Permission]) -> Result<(Valid, Grants), ApiError> {
        let held = Grants { permissions: held.iter().copied().collect(), ..Grants::all() };
        let valid = validate(serde_json::from_value(body).unwrap(), Reach::Internet)?;
        let grants = valid.grants(&held)?;
        Ok((valid, grants))
    }

    #[test]
    fn what_is_left_out_is_as_narrow_as_the_key() {
        let (valid, grants) = check(new(), &[Permission::Chat, Permission::KeysWrite]).unwrap();
        assert_eq!((valid.user_claim.as_str(), grants.permissions), ("sub", [Permission::Chat].into()));
        assert_eq!(valid.groups_claim, "groups");
        assert!(check(new(), &[Permission::KeysWrite]).is_err());
    }

    #[test]
    fn bad_fields_are_named() {
        let url = |url: &str| {
            let mut body = with(new(), "jwks_url", url);
            body.as_object_mut().unwrap().remove("keys");
            body
        };
        assert!(check(url("https://login.acme.example/keys"), &Permission::ALL).is_ok());
        let private = with(ed(None), "d", "c2VjcmV0");
        for (body, param) in [
            (with(new(), "issuer", ""), "issuer"),
            (with(new(), "issuer", "x".repeat(513)), "issuer"),
            (with(new(), "audience", "a\nb"), "audience"),
            (with(new(), "user_claim", ""), "user_claim"),
            (with(new(), "groups_claim", ""), "groups_claim"),
            (with(new(), "groups_claim", "x".repeat(129)), "groups_claim"),
            (with(new(), "jwks_url", "https://login.acme.example/keys"), "jwks_url"),
            (with(new(), "keys", Value::Null), "jwks_url"),
            (url("http://login.acme.example/keys"), "jwks_url"),
            (url("https://169.254.169.254/keys"), "jwks_url"),
            (with(new(), "keys", json!([])), "keys"),
            (with(new(), "keys", vec![ed(None); MOST_KEYS + 1]), "keys"),
            (with(new(), "keys", json!([ed(Some("a")), ed(None)])), "keys[1]"),
            (with(new(), "keys", json!([ed(Some("a")), ed(Some("a"))])), "keys[1]"),
            (with(new(), "keys", json!([ed(Some("a")), 7])), "keys[1]"),
            (with(new(), "keys", json!([private])), "keys[0]"),
            (with(new(), "keys", json!([{"kty": "oct", "k": "c2VjcmV0"}])), "keys[0]"),
            (with(new(), "scopes", json!([])), "scopes"),
            (with(new(), "scopes", json!(["chat", "keys:write"])), "scopes[1]"),
            (with(new(), "scopes", json!(["chat", "usage:read"])), "scopes"),
        ] {
            let error = check(body.clone(), &[Permission::Chat, Permission::KeysWrite]).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
            assert!(!error.message.contains("c2VjcmV0"), "{}", error.message);
        }
    }
}
