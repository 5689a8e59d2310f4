//! Other groups for a document whose content is as it was: its passages keep their vectors, so nothing is
//! embedded again.

use shared::document::{Document, DocumentStatus};
use shared::error::ApiError;

use crate::Context;
use crate::metered::Metered;

/// Writes a document that is `known` as one of other groups, a new version of it: its record as `processing`, its
/// passages, its record as `ready`, or as `failed`, what it is where that fails. Its retention goes on. A crash anywhere
/// is mended by sending it again.
///
/// The passages are those of the edition that is known. Whoever replaces the document meanwhile makes another, and gives
/// that its groups; this request learns that it lost.
///
/// # Errors
/// What refused or failed; that somebody else has changed the document meanwhile, too.
pub(crate) async fn regroup(
    context: &Context,
    metered: &Metered<'_>,
    known: &Document,
    mut document: Document,
    failed: DocumentStatus,
) -> Result<Document, ApiError> {
    let (scope, seal) = (metered.scope(), metered.seal());
    document.version = known.version + 1;
    document.status = DocumentStatus::Processing;
    document.at_work_until = Some(metered.ends_by());
    context.documents.put(scope, &mut document, known, seal).await?;
    let processing = document.clone();
    let collection = context.cells.write(scope, context.embeddings.model())?;
    let done = collection.set_groups(&document.id, known.updated_at, &document.groups).await;
    document.status = if done.is_ok() { DocumentStatus::Ready } else { failed };
    document.at_work_until = None;
    let stored = context.documents.put(scope, &mut document, &processing, seal).await;
    if let Err(error) = done {
        if let Err(second) = stored {
            tracing::warn!(document.id = %document.id, "Document stays marked as processing: {second}");
        }
        return Err(error.into());
    }
    stored?;
    tracing::info!(
        document.id = %document.id,
        document.version = document.version,
        "Document has other groups"
    );
    Ok(document)
}
