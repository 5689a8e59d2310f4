//! `GET /admin/tenants/{id}/webhook-secret`: the key that the tenant's receiver checks signatures with.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::Serialize;
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::tenant::TenantId;
use shared::web;
use shared::webhook::SigningKey;

use crate::Context;

#[derive(Serialize)]
struct Shown<'a> {
    tenant_id: &'a TenantId,
    webhook_secret: &'a str,
}

pub(crate) async fn handle(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let id: TenantId = web::path_id(&request, "id")?;
    let tenant = context.tenants.get(&operator, &id).await?.ok_or_else(ApiError::not_found)?;
    let root = context.webhook_root.current().await.map_err(|error| {
        tracing::error!("{error}");
        ApiError::unavailable("the secret of webhooks")
    })?;
    // Whoever has seen it is on record before it is shown.
    let record =
        Record::operation(&operator, id.clone(), Action::WebhookSecretRead, None, context.clock.now());
    context.ledger.note(&record).await?;
    let key = SigningKey::of(&root, &tenant);
    Ok(web::reply(StatusCode::OK, &Shown { tenant_id: &id, webhook_secret: key.expose() }))
}
