//! Other groups for a document whose content is as it was: its passages keep their vectors, so nothing is
//! embedded again.

use shared::aws::StoreError;
use shared::document::{Document, DocumentStatus};
use shared::error::ApiError;
use shared::groups::Groups;

use crate::Context;
use crate::metered::Metered;

/// How often what was overtaken is held against what holds now.
const ROUNDS: usize = 5;

/// Gives a document that is `known` other groups, as a new version of it: its record as `processing`, its
/// passages, its record as `ready`, or as `failed`, what it is where that fails. Its retention goes on. A crash anywhere is mended by sending it again.
pub(crate) async fn regroup(
    context: &Context,
    metered: &Metered<'_>,
    known: &Document,
    groups: Groups,
    failed: DocumentStatus,
) -> Result<Document, ApiError> {
    let (scope, seal) = (metered.scope(), metered.seal());
    let mut document =
        Document { version: known.version + 1, status: DocumentStatus::Processing, groups, ..known.clone() };
    context.documents.put(scope, &document, known, seal).await?;
    let processing = document.clone();
    let collection = context.cells.write(scope, context.embeddings.model())?;
    let done = collection.set_groups(&document.id, &document.groups).await;
    document.status = if done.is_ok() { DocumentStatus::Ready } else { failed };
    match (done, context.documents.put(scope, &document, &processing, seal).await) {
        (Ok(()), Ok(())) => {
            tracing::info!(
                document.id = %document.id,
                document.version = document.version,
                "Document has other groups"
            );
            Ok(document)
        }
        // Whatever this request did to the passages may have come after what the later one did.
        (_, Err(StoreError::Conflict)) => {
            overtaken(context, metered, document).await?;
            Err(StoreError::Conflict.into())
        }
        (Ok(()), Err(error)) => Err(error.into()),
        (Err(error), stored) => {
            if let Err(second) = stored {
                tracing::warn!(document.id = %document.id, "Document stays marked as processing: {second}");
            }
            Err(error.into())
        }
    }
}

/// Gives the passages the groups that the record has by now, until it has had them from before to after.
async fn overtaken(context: &Context, metered: &Metered<'_>, ours: Document) -> Result<(), ApiError> {
    let scope = metered.scope();
    let collection = context.cells.write(scope, context.embeddings.model())?;
    let mut given = ours.groups;
    for _ in 0..ROUNDS {
        let Some(now) = context.documents.stored(scope, &ours.id).await? else {
            collection.delete_document(&ours.id).await?;
            return Ok(());
        };
        if now.groups == given {
            return Ok(());
        }
        collection.set_groups(&ours.id, &now.groups).await?;
        given = now.groups;
    }
    Ok(())
}
