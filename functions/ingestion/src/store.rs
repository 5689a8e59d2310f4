//! Storing one document under an admission: its record as `processing`, its passages, its record as `ready`.
//! For whoever has the bytes: the request that carries them, or the file that was uploaded.

use serde_json::{Map, Value};
use shared::aws::StoreError;
use shared::aws::documents::NotCreated;
use shared::chunk::{Chunk, chunk};
use shared::clock::Timestamp;
use shared::document::{Awaited, ContentType, Document, DocumentStatus, fingerprint};
use shared::error::ApiError;
use shared::groups::Groups;
use shared::ids::{DocumentId, UploadId};
use shared::scope::TenantScope;
use shared::units::Tokens;
use shared::vectors::{Collection, NewPoint, Stored, VectorError};

use crate::Context;
use crate::extract::apart::Failed;
use crate::extract::{Charset, Unreadable};
use crate::metered::Metered;
use crate::regroup::regroup;
use crate::upload::supersede;

/// How many passages are embedded and stored at once: their vectors are all that is held of them.
const AT_ONCE: usize = 256;

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
    /// What its text is said to be in, if that is said.
    pub(crate) charset: Option<Charset>,
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

impl From<Failed> for NotStored {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Unreadable(reason) => Self::Unreadable(reason),
            Failed::Elsewhere(error) => Self::Failed(error),
        }
    }
}

impl From<NotCreated> for NotStored {
    fn from(error: NotCreated) -> Self {
        Self::Failed(error.into())
    }
}

impl From<StoreError> for NotStored {
    fn from(error: StoreError) -> Self {
        Self::Failed(error.into())
    }
}

/// Stores one document: its record as `processing`, its passages, its record as `ready`. The same content again changes
/// nothing; a crash anywhere is mended by sending it again, and until then the earlier content is found.
///
/// # Errors
/// [`NotStored::Unreadable`] if nothing can be made of the content; otherwise what refused or failed.
pub(crate) async fn store(
    context: &Context,
    metered: &Metered<'_>,
    mut valid: Valid,
) -> Result<Document, NotStored> {
    let scope = metered.scope();
    let sha256 = hex::encode(digest(&valid));
    let known = context.documents.stored(scope, &valid.id).await?;
    taken(valid.upload.as_ref(), known.as_ref())?;
    if let Some(document) = held(context, metered, &valid, known.as_ref(), &sha256).await? {
        return Ok(document);
    }
    let content = std::mem::take(&mut valid.content);
    let read = context.reader.blocks(content, valid.content_type, valid.charset, metered.reads_until());
    let blocks = read.await?;
    let chunks = chunk(&valid.id, &blocks);
    drop(blocks);
    if chunks.is_empty() {
        return Err(Unreadable::Empty.into());
    }
    // To read it has taken a while, in which somebody else may have stored it.
    let known = context.documents.stored(scope, &valid.id).await?;
    let upload = taken(valid.upload.as_ref(), known.as_ref())?;
    if let Some(document) = held(context, metered, &valid, known.as_ref(), &sha256).await? {
        return Ok(document);
    }
    let failed = failed(&valid);
    let now = context.clock.now();
    // Later than every edition before, whatever the clocks say.
    let now = known.as_ref().map_or(now, |d| now.max(d.updated_at.plus_millis(1)));
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
        current: known.as_ref().and_then(|d| d.current),
        upload,
        at_work_until: Some(metered.ends_by()),
        reason: None,
        revision: 0,
    };
    match &known {
        Some(known) => context.documents.put(scope, &mut document, known, metered.seal()).await?,
        None => context.documents.create(scope, &mut document, metered.seal()).await?,
    }
    if document.upload.is_none() {
        supersede(context, scope, known.as_ref()).await;
    }
    match index(context, metered, &mut document, chunks).await {
        Ok(()) => Ok(document),
        Err(Lost::Overtaken) => {
            forget(context, scope, &document.id, document.updated_at).await;
            Err(StoreError::Conflict.into())
        }
        // Whether it is found shows by itself: its sender is told to try again.
        Err(Lost::Unanswered(error)) => Err(error.into()),
        Err(Lost::Failed(error)) => {
            // What is found is not said to have failed: to store it again ends what is left to do.
            if document.current != Some(document.updated_at) {
                fail(context, metered, document, failed).await;
            }
            Err(error.into())
        }
    }
}

/// What a document is where it cannot be stored: what was uploaded is tried again, or given up, by whoever reads it.
fn failed(valid: &Valid) -> DocumentStatus {
    if valid.upload.is_some() { DocumentStatus::Pending } else { DocumentStatus::Failed }
}

/// The document, where it is known to hold that content: it is given its groups, and awaits no other file.
async fn held(
    context: &Context,
    metered: &Metered<'_>,
    valid: &Valid,
    known: Option<&Document>,
    sha256: &str,
) -> Result<Option<Document>, NotStored> {
    let scope = metered.scope();
    let holds = |known: &&Document| {
        known.sha256 == sha256
            && known.status == DocumentStatus::Ready
            && known.current == Some(known.updated_at)
            && known.is_kept(scope.limits(), context.clock.now())
    };
    let Some(known) = known.filter(holds) else { return Ok(None) };
    let upload = match taken(valid.upload.as_ref(), Some(known))? {
        Some(taken) => Some(taken),
        // What was to come is older than what is sent now.
        None => known.upload.clone().filter(|awaited| awaited.taken),
    };
    let mut document = Document { upload, groups: valid.groups.clone(), ..known.clone() };
    if document == *known {
        return Ok(Some(document));
    }
    if document.groups == known.groups {
        context.documents.put(scope, &mut document, known, metered.seal()).await?;
    } else {
        document = regroup(context, metered, known, document, failed(valid)).await?;
    }
    if valid.upload.is_none() {
        supersede(context, scope, Some(known)).await;
    }
    Ok(Some(document))
}

/// Says of a document that its new edition could not be made. What was stored of that waits for the next attempt, whose
/// vectors it has, or goes where nobody is bound to make one.
async fn fail(context: &Context, metered: &Metered<'_>, document: Document, failed: DocumentStatus) {
    let processing = document;
    let mut document = Document { status: failed, at_work_until: None, ..processing.clone() };
    let stored = context.documents.put(metered.scope(), &mut document, &processing, metered.seal()).await;
    if let Err(error) = &stored {
        tracing::warn!(document.id = %document.id, "Document stays marked as processing: {error}");
    }
    if failed == DocumentStatus::Failed || matches!(stored, Err(StoreError::Conflict)) {
        forget(context, metered.scope(), &document.id, document.updated_at).await;
    }
}

/// Takes away what was stored of a document's edition that nobody is to find. One that its record calls the current one
/// stays: the write that made it so may have been done and not answered.
pub(crate) async fn forget(context: &Context, scope: &TenantScope, id: &DocumentId, edition: Timestamp) {
    let forgotten = async {
        let current = context.documents.editions(scope, [id.clone()].into()).await?;
        if current.get(id) == Some(&Some(edition)) {
            return Ok(());
        }
        let collection = context.cells.write(scope, context.embeddings.model())?;
        Ok::<_, ApiError>(collection.delete_edition(id, edition).await?)
    };
    if let Err(error) = forgotten.await {
        tracing::warn!(document.id = %id, "Passages stay behind unseen: {error}");
    }
}

/// What the document says of its upload from here on, if it came by one.
fn taken(upload: Option<&UploadId>, known: Option<&Document>) -> Result<Option<Awaited>, NotStored> {
    let Some(id) = upload else { return Ok(None) };
    let awaited = known.and_then(|known| known.upload.clone()).filter(|awaited| awaited.upload_id == *id);
    awaited.map(|awaited| Some(Awaited { taken: true, ..awaited })).ok_or(NotStored::NotAwaited)
}

/// Everything that makes a document what it is, but for whom it is.
fn digest(valid: &Valid) -> [u8; 32] {
    let mut content_type = serde_json::to_string(&valid.content_type).unwrap_or_default();
    if let Some(charset) = valid.charset.filter(|charset| *charset != Charset::UTF_8) {
        content_type.push_str(charset.name());
    }
    let metadata = serde_json::to_string(&valid.metadata).unwrap_or_default();
    let (title, source) = (valid.title.as_bytes(), valid.source.as_bytes());
    fingerprint(&[title, source, &valid.content, content_type.as_bytes(), metadata.as_bytes()])
}

/// Why a document was taken up and its new edition is not found.
enum Lost {
    /// Somebody else has replaced or deleted it meanwhile.
    Overtaken,
    /// The write that makes it found was not answered: it may be done.
    Unanswered(ApiError),
    /// Something failed.
    Failed(ApiError),
}

impl From<ApiError> for Lost {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

impl From<StoreError> for Lost {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict => Self::Overtaken,
            error => Self::Failed(error.into()),
        }
    }
}

impl From<VectorError> for Lost {
    fn from(error: VectorError) -> Self {
        Self::Failed(error.into())
    }
}

/// Stores a document's passages as an edition of their own, makes it the current one, and takes the earlier ones away:
/// `shared::editions` says what that is to searches. Vectors of what earlier editions have too are taken from there.
/// Where it has failed, the document says in `current` whether its new edition is found.
async fn index(
    context: &Context,
    metered: &Metered<'_>,
    document: &mut Document,
    chunks: Vec<Chunk>,
) -> Result<(), Lost> {
    let (scope, edition) = (metered.scope(), document.updated_at);
    let collection = context.cells.write(scope, context.embeddings.model())?;
    upsert(metered, &collection, document, chunks).await?;
    collection.supersede(&document.id, edition).await?;
    let processing = document.clone();
    let mut found = Document { current: Some(edition), ..processing.clone() };
    match context.documents.put(scope, &mut found, &processing, metered.seal()).await {
        Ok(()) => *document = found,
        Err(StoreError::Conflict) => return Err(Lost::Overtaken),
        Err(error) => return Err(Lost::Unanswered(error.into())),
    }
    collection.delete_before(&document.id, edition).await?;
    collection.settle(&document.id, edition).await?;
    let mut ready = Document { status: DocumentStatus::Ready, at_work_until: None, ..document.clone() };
    match context.documents.put(scope, &mut ready, document, metered.seal()).await {
        // In the second case somebody has taken it up since: it was this edition that they replace.
        Ok(()) | Err(StoreError::Conflict) => *document = ready,
        Err(error) => return Err(error.into()),
    }
    tracing::info!(
        document.id = %document.id,
        document.version = document.version,
        document.chunks = document.chunks,
        "Document indexed"
    );
    Ok(())
}

/// Stores the passages, embedding those whose vectors are not there already.
async fn upsert(
    metered: &Metered<'_>,
    collection: &Collection<'_>,
    document: &Document,
    chunks: Vec<Chunk>,
) -> Result<(), ApiError> {
    // Earlier attempts count too: what they have paid for is not paid for again. A new document had none.
    let stored = match document.created_at == document.updated_at {
        true => Stored::default(),
        false => collection.stored(&document.id).await?,
    };
    let unknown = chunks.iter().map(|chunk| searchable(document, chunk)).filter(|text| !stored.has(text));
    metered.plan(unknown.map(|text| Tokens::least(&text))).await?;
    let mut chunks = chunks.into_iter().peekable();
    while chunks.peek().is_some() {
        let batch: Vec<Chunk> = chunks.by_ref().take(AT_ONCE).collect();
        let searchable: Vec<String> = batch.iter().map(|chunk| searchable(document, chunk)).collect();
        let known = collection.vectors(&stored, &searchable).await?;
        let new: Vec<String> = searchable
            .iter()
            .zip(&known)
            .filter(|(_, known)| known.is_none())
            .map(|(text, _)| text.clone())
            .collect();
        let mut new = metered.embed(&new).await?.into_iter();
        let points =
            batch.into_iter().zip(searchable).zip(known).map(|((chunk, searchable), known)| NewPoint {
                chunk_id: chunk.id,
                index: chunk.index,
                title: document.title.clone(),
                source: document.source.clone(),
                text: chunk.text,
                searchable,
                vector: known.or_else(|| new.next()).unwrap_or_default(),
            });
        collection.upsert(&document.id, &document.groups, document.updated_at, points.collect()).await?;
    }
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
