//! `GET /v1/issuers/{id}`.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::error::ApiError;
use shared::ids::IssuerId;
use shared::ledger::Action;
use shared::scope::TenantScope;
use shared::web;

use super::View;
use crate::Context;

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let id: IssuerId = web::path_id(&request, "id")?;
    context.gate.admit_read(scope).await?;
    let issuer = context.issuers.get(scope, &id).await?.ok_or_else(ApiError::not_found)?;
    context.gate.note(scope, Action::IssuersRead, Vec::new()).await?;
    Ok(web::reply(StatusCode::OK, &View::from(issuer)))
}
