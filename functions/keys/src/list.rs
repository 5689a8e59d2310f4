//! `GET /v1/keys`: what keys there are, never their secrets.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::new_key::KeyList;
use shared::scope::TenantScope;
use shared::web;

use crate::Context;

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let limit = web::page_size(&request)?;
    let after: Option<String> = web::query(&request, "cursor")?;
    context.gate.admit_read(scope).await?;
    let (keys, cursor) = context.keys.list(scope, limit, after.as_deref()).await?;
    let ids = keys.iter().map(|key| key.key_id.clone()).collect();
    let note = Record::event(scope, Action::KeysListed, Vec::new(), context.clock.now()).about(ids);
    context.ledger.note(&note).await?;
    Ok(web::reply(StatusCode::OK, &KeyList::new(keys, cursor)))
}
