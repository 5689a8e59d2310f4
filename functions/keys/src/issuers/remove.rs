//! `DELETE /v1/issuers/{id}`: its tokens let nobody in any more, whatever API Gateway has kept.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::error::ApiError;
use shared::ids::IssuerId;
use shared::ledger::{Action, Record};
use shared::scope::TenantScope;
use shared::web;

use crate::Context;

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let id: IssuerId = web::path_id(&request, "id")?;
    context.gate.admit_read(scope).await?;
    let issuer = context.issuers.get(scope, &id).await?;
    let removed = match &issuer {
        Some(issuer) => {
            let note = Record::event(scope, Action::IssuerRemoved, Vec::new(), context.clock.now());
            let note = note.about(vec![id.clone()]);
            Box::pin(context.issuers.remove(scope, issuer, (&context.ledger, &note))).await?
        }
        None => false,
    };
    // Also where the issuer is gone already: whoever removed it may have stopped before this.
    context.reach(scope).await?;
    if !removed {
        return Err(ApiError::not_found());
    }
    tracing::info!(issuer.id = %id, "Issuer removed");
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}
