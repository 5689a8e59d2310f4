//! `DELETE /v1/documents/{id}`: once it answers, no search finds the document, and of a file that it came by, or was
//! to come by, nothing is left.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::error::ApiError;
use shared::ids::DocumentId;
use shared::ledger::{Action, Record};
use shared::scope::TenantScope;
use shared::upload::UploadPlace;
use shared::web;

use crate::Context;
use crate::upload::unavailable;

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let id: DocumentId = web::path_id(&request, "id")?;
    context.gate.admit_read(scope).await?;
    let there = context.documents.there(scope, &id, context.clock.now()).await?;
    let there = there.ok_or_else(ApiError::not_found)?;
    // The passages first: a crash in between leaves a record whose deletion can be repeated, never
    // passages that nothing names.
    let collection = context.cells.write(scope, context.embeddings.model())?;
    collection.delete_document(&id).await?;
    if let Some(upload_id) = there.upload {
        let place = UploadPlace { tenant_id: scope.tenant_id().clone(), upload_id };
        context.uploads.close(scope, &place).await.map_err(unavailable)?;
        context.upload_records.end(scope, &place.upload_id).await?;
    }
    let record = Record::event(scope, Action::DocumentDeleted, vec![id.clone()], context.clock.now());
    context.documents.delete(scope, &id, &context.ledger, &record).await?;
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}
