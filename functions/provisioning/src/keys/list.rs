//! `GET /admin/tenants/{id}/keys`: what keys a tenant has, never their secrets.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::new_key::KeyList;
use shared::tenant::TenantId;
use shared::web;

use crate::Context;

pub(crate) async fn handle(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let id: TenantId = web::path_id(&request, "id")?;
    let limit = web::page_size(&request)?;
    let after: Option<String> = web::query(&request, "cursor")?;
    context.tenants.get(&operator, &id).await?.ok_or_else(ApiError::not_found)?;
    let ward = operator.ward(id.clone());
    let (keys, cursor) = context.keys.list(&ward, limit, after.as_deref()).await?;
    let ids = keys.iter().map(|key| key.key_id.clone()).collect();
    let record = Record::operation(&operator, id, Action::KeysListed, None, context.clock.now()).about(ids);
    context.ledger.note(&record).await?;
    Ok(web::reply(StatusCode::OK, &KeyList::new(keys, cursor)))
}
