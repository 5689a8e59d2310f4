//! `GET /admin/tenants` and `GET /admin/tenants/{id}`.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::Serialize;
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::tenant::TenantId;
use shared::web;

use crate::{Context, View};

#[derive(Serialize)]
struct List {
    tenants: Vec<View>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<TenantId>,
}

pub(crate) async fn list(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let limit = web::page_size(&request)?;
    let after: Option<String> = web::query(&request, "cursor")?;
    let (tenants, cursor) = context.tenants.list(&operator, limit.into(), after.as_deref()).await?;
    let tenants = tenants.into_iter().map(View::from).collect();
    Ok(web::reply(StatusCode::OK, &List { tenants, cursor }))
}

pub(crate) async fn one(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let id: TenantId = web::path_id(&request, "id")?;
    let tenant = context.tenants.get(&operator, &id).await?.ok_or_else(ApiError::not_found)?;
    let record = Record::operation(&operator, id, Action::TenantRead, None, context.clock.now());
    context.ledger.note(&record).await?;
    Ok(web::reply(StatusCode::OK, &View::from(tenant)))
}
