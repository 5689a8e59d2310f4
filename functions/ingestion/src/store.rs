//! Storing one document under an admission: its record as `processing`, its passages, its record as `ready`.
//! For whoever has the bytes: the request that carries them, or the file that was uploaded.

use std::collections::HashSet;

use serde_json::{Map, Value};
use shared::aws::StoreError;
use shared::chunk::{Chunk, chunk};
use shared::document::{Awaited, ContentType, Document, DocumentStatus, fingerprint};
use shared::error::ApiError;
use shared::groups::Groups;
use shared::ids::{DocumentId, UploadId};
use shared::scope::TenantScope;
use shared::vectors::NewPoint;

use crate::Context;
use crate::extract::{self, Unreadable};
use crate::metered::Metered;
use crate::regroup::regroup;

/// A document that may be stored, as far as can be told without reading its content.
pub(crate) struct Valid {
    pub(crate) id: DocumentId,
    /// 1 to 1,000 bytes.
    pub(crate) title: String,
    /// At most 1,000 bytes.
    pub(crate) source: String,
    /// The file, as it is.
    pub(crate) content: Vec<u8>,
    pub(crate) content_type: ContentType,
    pub(crate) metadata: Map<String, Value>,
    pub(crate) groups: Groups,
    /// The upload that it came by, if it was one: then it is stored only where the document still awaits that.
    pub(crate) upload: Option<UploadId>,
}

/// Why a document was not stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotStored {
    /// Its content cannot be read: to try again would change nothing.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    /// The document awaits its upload no more: it was deleted, or sent again.
    #[error("the document does not await this upload any more")]
    NotAwaited,
    /// Something around it refused or failed, as its sender is to see it. Some of it is worth another try.
    #[error(transparent)]
    Failed(#[from] ApiError),
}

impl From<StoreError> for NotStored {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}

/// Stores one document: its record as `processing`, its passages, its record as `ready`. The same
/// content again changes nothing; a crash anywhere is mended by sending it again.
///
/// # Errors
/// [`NotStored::Unreadable`] if nothing can be made of the content; otherwise what refused or failed.
pub(crate) async fn store(
    context: &Context,
    metered: &Metered<'_>,
    valid: Valid,
) -> Result<Document, NotStored> {
    let scope = metered.scope();
    let sha256 = hex::encode(digest(&valid));
    let known = context.documents.stored(scope, &valid.id).await?;
    let upload = taken(valid.upload.as_ref(), known.as_ref())?;
    if let Some(known) = &known
        && known.is_kept(scope.limits(), context.clock.now())
        && known.sha256 == sha256
        && known.status == DocumentStatus::Ready
    {
        let mut document = known.clone();
        if upload.is_some() {
            document = Document { upload, ..document };
            context.documents.put(scope, &document, Some(known), metered.seal()).await?;
        }
        if document.groups == valid.groups {
            return Ok(document);
        }
        return Ok(regroup(context, metered, &document, valid.groups).await?);
    }
    let chunks = chunk(&valid.id, &extract::blocks(&valid.content, valid.content_type)?);
    if chunks.is_empty() {
        return Err(Unreadable::Empty.into());
    }
    let now = context.clock.now();
    // The same again is the same version, even where an earlier attempt did not end.
    let same = |d: &Document| d.sha256 == sha256 && d.groups == valid.groups;
    let version = known.as_ref().map_or(1, |d| if same(d) { d.version } else { d.version + 1 });
    let mut document = Document {
        tenant_id: scope.tenant_id().clone(),
        id: valid.id,
        version,
        status: DocumentStatus::Processing,
        chunks: u32::try_from(chunks.len()).unwrap_or(u32::MAX),
        sha256,
        title: valid.title,
        source: valid.source,
        content_type: valid.content_type,
        metadata: valid.metadata,
        groups: valid.groups,
        created_at: known.as_ref().map_or(now, |d| d.created_at),
        updated_at: now,
        upload,
        reason: None,
    };
    context.documents.put(scope, &document, known.as_ref(), metered.seal()).await?;
    match index(context, metered, &document, chunks).await {
        Ok(()) => {
            let processing = document.clone();
            document.status = DocumentStatus::Ready;
            match context.documents.put(scope, &document, Some(&processing), metered.seal()).await {
                Ok(()) => Ok(document),
                Err(StoreError::Conflict) => {
                    overtaken(context, scope, &document.id).await?;
                    Err(StoreError::Conflict.into())
                }
                Err(error) => Err(error.into()),
            }
        }
        Err(error) => {
            let processing = document.clone();
            // What was uploaded is tried again, or given up, by whoever reads it.
            document.status = match document.upload {
                Some(_) => DocumentStatus::Pending,
                None => DocumentStatus::Failed,
            };
            if let Err(second) =
                context.documents.put(scope, &document, Some(&processing), metered.seal()).await
            {
                tracing::warn!(document.id = %document.id, "Document stays marked as processing: {second}");
            }
            Err(error.into())
        }
    }
}

/// What the document says of its upload from here on, if it came by one.
fn taken(upload: Option<&UploadId>, known: Option<&Document>) -> Result<Option<Awaited>, NotStored> {
    let Some(id) = upload else { return Ok(None) };
    let awaited = known.and_then(|known| known.upload.clone()).filter(|awaited| awaited.upload_id == *id);
    awaited.map(|awaited| Some(Awaited { taken: true, ..awaited })).ok_or(NotStored::NotAwaited)
}

/// Somebody else changed the document while its passages were stored. If it was deleted, they must
/// not stay behind: what has been deleted is found by nobody.
async fn overtaken(context: &Context, scope: &TenantScope, id: &DocumentId) -> Result<(), ApiError> {
    if context.documents.stored(scope, id).await?.is_none() {
        context.cells.write(scope, context.embeddings.model())?.delete_document(id).await?;
    }
    Ok(())
}

/// Everything that makes a document what it is, but for whom it is.
fn digest(valid: &Valid) -> [u8; 32] {
    let content_type = serde_json::to_string(&valid.content_type).unwrap_or_default();
    let metadata = serde_json::to_string(&valid.metadata).unwrap_or_default();
    let (title, source) = (valid.title.as_bytes(), valid.source.as_bytes());
    fingerprint(&[title, source, &valid.content, content_type.as_bytes(), metadata.as_bytes()])
}

/// Embeds and stores a document's passages, then takes away those of its earlier version that are
/// passages no more.
async fn index(
    context: &Context,
    metered: &Metered<'_>,
    document: &Document,
    chunks: Vec<Chunk>,
) -> Result<(), ApiError> {
    let collection = context.cells.write(metered.scope(), context.embeddings.model())?;
    let stale: Vec<String> = {
        let now: HashSet<&str> = chunks.iter().map(|c| c.id.as_str()).collect();
        let stored = collection.chunk_ids(&document.id).await?;
        stored.into_iter().filter(|id| !now.contains(id.as_str())).collect()
    };
    let searchable: Vec<String> = chunks.iter().map(|c| searchable(document, c)).collect();
    let vectors = metered.embed(&searchable).await?;
    let points = chunks
        .into_iter()
        .zip(searchable)
        .zip(vectors)
        .map(|((chunk, searchable), vector)| NewPoint {
            chunk_id: chunk.id,
            index: chunk.index,
            title: document.title.clone(),
            source: document.source.clone(),
            text: chunk.text,
            searchable,
            vector,
        })
        .collect();
    collection.upsert(&document.id, &document.groups, document.updated_at, points).await?;
    collection.delete_chunks(&stale).await?;
    tracing::info!(
        document.id = %document.id,
        document.version = document.version,
        document.chunks = document.chunks,
        "Document indexed"
    );
    Ok(())
}

/// A passage as it is searched: with its document's title and the headings above it, so that a passage
/// that does not repeat its subject is found by it.
fn searchable(document: &Document, chunk: &Chunk) -> String {
    let mut text = document.title.clone();
    if !chunk.heading.is_empty() && chunk.heading != document.title {
        text.push('\n');
        text.push_str(&chunk.heading);
    }
    text.push_str("\n\n");
    text.push_str(&chunk.text);
    text
}
