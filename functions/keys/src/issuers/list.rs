//! `GET /v1/issuers`.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::Serialize;
use shared::error::ApiError;
use shared::ledger::Action;
use shared::scope::TenantScope;
use shared::web;

use super::View;
use crate::Context;

/// All of them: there are few, so a page holds them.
#[derive(Serialize)]
struct List {
    issuers: Vec<View>,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    _request: Request,
) -> Result<Response<Body>, ApiError> {
    context.gate.admit_read(scope).await?;
    let issuers = context.issuers.list(scope).await?;
    context.gate.note(scope, Action::IssuersRead, Vec::new()).await?;
    Ok(web::reply(StatusCode::OK, &List { issuers: issuers.into_iter().map(View::from).collect() }))
}
