//! `POST /v1/keys/{id}/rotate`: a new key in the place of an old one, which stays valid for a while.

use http::Response;
use lambda_http::{Body, Request};
use serde::Deserialize;
use shared::api_key::{ApiKey, KeyId, KeyRecord};
use shared::clock::Timestamp;
use shared::error::ApiError;
use shared::new_key;
use shared::scope::TenantScope;
use shared::web;

use crate::{Ask, Context, Wanted, replaced};

/// How long the old key stays valid, if the body does not say: a day.
const GRACE_S: u32 = 86_400;
/// The longest that it may: a week.
const MOST_GRACE_S: u32 = 604_800;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rotation {
    grace_seconds: Option<u32>,
}

/// Which key is to be replaced, and how long it stays valid then.
pub(crate) struct Replacement {
    id: KeyId,
    grace_s: u32,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let id: KeyId = web::path_id(&request, "id")?;
    let body: Rotation = match request.body() {
        Body::Empty => Rotation::default(),
        _ => web::json(&request)?,
    };
    let grace_s = body.grace_seconds.unwrap_or(GRACE_S);
    if grace_s > MOST_GRACE_S {
        let message = format!("grace_seconds must be between 0 and {MOST_GRACE_S}");
        return Err(ApiError::invalid("grace_seconds", message));
    }
    let ask = Ask::Replacement(Replacement { id, grace_s });
    context.make(scope, &request, &ask).await
}

pub(crate) async fn wanted(
    context: &Context,
    scope: &TenantScope,
    Replacement { id, grace_s }: &Replacement,
    now: Timestamp,
) -> Result<Wanted, ApiError> {
    let old = context.keys.get(scope, id).await?.ok_or_else(ApiError::not_found)?;
    if old.replaced_by.is_some() {
        // Whoever replaced it may have stopped before this.
        context.reach(scope).await?;
        return Err(replaced());
    }
    if old.expires_at.is_some_and(|at| at <= now) {
        return Err(ApiError::invalid("id", "this key has expired; make a new one"));
    }
    new_key::within(scope.grants(), &old.grants())?;
    let mut rng = context.entropy;
    let key = ApiKey::issue(scope.tier(), scope.tenant_id().clone(), &mut rng);
    let mut record = KeyRecord::granted(&key, old.grants(), old.name, now);
    record.replaces = Some(old.key_id.clone());
    let until = now.plus_millis(i64::from(*grace_s) * 1_000);
    let until = old.expires_at.map_or(until, |at| at.min(until));
    Ok(Wanted { key, record, replaces: Some((old.key_id, until)) })
}
