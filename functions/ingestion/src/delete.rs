//! `DELETE /v1/documents/{id}`: once it answers, no search finds the document, and of a file that it came by, or was
//! to come by, nothing is left.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::aws::StoreError;
use shared::error::ApiError;
use shared::ids::DocumentId;
use shared::ledger::{Action, Record};
use shared::scope::TenantScope;
use shared::web;

use crate::Context;
use crate::metered::ends_by;
use crate::upload::close;

/// How often a deletion begins anew because the document was stored again meanwhile.
const MOST_ATTEMPTS: u32 = 5;

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let id: DocumentId = web::path_id(&request, "id")?;
    context.gate.admit_read(scope).await?;
    let collection = context.cells.write(scope, context.embeddings.model())?;
    let ends_by = ends_by(&context.clock, web::deadline(&request, &context.clock));
    for attempt in 0..MOST_ATTEMPTS {
        // Whoever is storing the document has lost it from here on, so nothing of it is found once its passages are
        // gone. The record goes last: a crash in between leaves one whose deletion can be repeated, never passages that
        // nothing names.
        let taken = context.documents.take_down(scope, &id, context.clock.now(), ends_by).await?;
        let Some(taken) = taken else {
            if attempt == 0 {
                return Err(ApiError::not_found());
            }
            break;
        };
        // Of whoever stores it anew, and is not cut off, nothing is taken away.
        collection.delete_before(&id, taken.at).await?;
        if let Some(upload_id) = taken.upload {
            close(context, scope, &upload_id).await?;
        }
        let record = Record::event(scope, Action::DocumentDeleted, vec![id.clone()], context.clock.now());
        match context.documents.delete(scope, &id, taken.at, &context.ledger, &record).await {
            Ok(()) => break,
            Err(StoreError::Conflict) if attempt + 1 < MOST_ATTEMPTS => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}
