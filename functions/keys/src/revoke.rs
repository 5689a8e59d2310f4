//! `DELETE /v1/keys/{id}`: once it answers, the key admits nothing, whatever API Gateway has kept.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::api_key::KeyId;
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::scope::TenantScope;
use shared::web;

use crate::Context;

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let id: KeyId = web::path_id(&request, "id")?;
    context.gate.admit_read(scope).await?;
    let note = Record::event(scope, Action::KeyRevoked, Vec::new(), context.clock.now());
    let note = note.about(vec![id.clone()]);
    let was_there = Box::pin(context.keys.revoke(scope, &id, (&context.ledger, &note))).await?;
    // Also where the key is gone already: whoever took it away may have stopped before this.
    context.reach(scope).await?;
    if !was_there {
        return Err(ApiError::not_found());
    }
    tracing::info!(key.revoked = %id, "Key revoked");
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}
