//! `DELETE /admin/tenants/{id}/keys/{key_id}`: once it answers, the key admits nothing. For a key that is misused
//! while nobody of the tenant's answers.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::api_key::KeyId;
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::tenant::{TenantId, TenantStatus};
use shared::web;

use crate::{Context, being_deleted};

pub(crate) async fn handle(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let id: TenantId = web::path_id(&request, "id")?;
    let key_id: KeyId = web::path_id(&request, "key_id")?;
    let tenant = context.tenants.get(&operator, &id).await?.ok_or_else(ApiError::not_found)?;
    if tenant.status == TenantStatus::Deprovisioning {
        return Err(being_deleted(&id));
    }
    let ward = operator.ward(id.clone());
    let now = context.clock.now();
    let record = Record::operation(&operator, id.clone(), Action::KeyRevoked, None, now);
    let record = record.about(vec![key_id.clone()]);
    let was_there = Box::pin(context.keys.revoke(&ward, &key_id, (&context.ledger, &record))).await?;
    // Also where the key is gone already: whoever took it away may have stopped before this.
    context.reach(&ward).await?;
    if !was_there {
        return Err(ApiError::not_found());
    }
    tracing::info!(tenant.id = %id, key.revoked = %key_id, operator.arn = operator.arn(), "Key revoked");
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}
