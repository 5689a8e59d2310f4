//! `POST /v1/keys`: a key that may do no more than the one that makes it.

use http::Response;
use lambda_http::{Body, Request};
use shared::api_key::{ApiKey, Grants, KeyRecord};
use shared::clock::Timestamp;
use shared::error::ApiError;
use shared::new_key::NewKey;
use shared::scope::TenantScope;
use shared::web;

use crate::{Ask, Context, Wanted};

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let body: NewKey = web::json(&request)?;
    // What nobody could be granted is refused before anything is asked.
    body.clone().granted(&Grants::all(), context.clock.now())?;
    context.make(scope, &request, &Ask::New(body)).await
}

pub(crate) fn wanted(
    context: &Context,
    scope: &TenantScope,
    body: &NewKey,
    now: Timestamp,
) -> Result<Wanted, ApiError> {
    let (name, grants) = body.clone().granted(scope.grants(), now)?;
    let mut rng = context.entropy;
    let key = ApiKey::issue(scope.tier(), scope.tenant_id().clone(), &mut rng);
    let record = KeyRecord::granted(&key, grants, name, now);
    Ok(Wanted { key, record, replaces: None })
}
