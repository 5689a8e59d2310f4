//! `POST /v1/documents`: one document or several. Each stands alone: a bad one is reported with its
//! reason, the others are stored.

use std::collections::HashSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use shared::aws::StoreError;
use shared::chunk::{Chunk, chunk};
use shared::document::{ContentType, Document, DocumentStatus, derived_id, fingerprint};
use shared::error::{ApiError, Code};
use shared::gate::Need;
use shared::ids::DocumentId;
use shared::meter::Work;
use shared::scope::TenantScope;
use shared::units::{NanoUsd, Tokens};
use shared::vectors::NewPoint;
use shared::web;

use crate::metered::{Metered, Shown};
use crate::{Context, extract};

/// The most documents in one request.
const MOST_DOCUMENTS: usize = 100;
/// The longest content of one document, in bytes of text.
const MOST_CONTENT_BYTES: usize = 5 << 20;
/// The longest title and the longest source, in bytes.
const MOST_TITLE_BYTES: usize = 1_000;
/// The most notes, in bytes of JSON.
const MOST_METADATA_BYTES: usize = 16 << 10;
/// How many documents of a request are worked on at the same time.
const AT_ONCE: usize = 4;

/// The body, if it is not one document by itself.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Several {
    documents: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewDocument {
    id: Option<String>,
    title: String,
    #[serde(default)]
    source: String,
    content: Option<String>,
    content_base64: Option<String>,
    content_type: Option<String>,
    #[serde(default)]
    metadata: Map<String, Value>,
}

/// A document that may be stored.
struct Valid {
    id: DocumentId,
    title: String,
    source: String,
    content: String,
    content_type: ContentType,
    metadata: Map<String, Value>,
}

/// What became of one document, in the order in which they were sent.
#[derive(Serialize)]
#[serde(untagged)]
enum Outcome {
    Stored {
        id: DocumentId,
        version: u64,
        status: DocumentStatus,
        chunks: u32,
        sha256: String,
    },
    Failed {
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<String>,
        status: DocumentStatus,
        error: ApiError,
    },
}

#[derive(Serialize)]
struct Answer {
    documents: Vec<Outcome>,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let started = context.clock.now();
    let deadline = web::deadline(&request, &context.clock);
    let key = web::idempotency_key(&request, scope)?;
    let ends_at_s = web::ends_at_s(&request);
    let body: Value = web::json(&request)?;
    let several = body.get("documents").is_some();
    let documents = if several { web::value::<Several>(body)?.documents } else { vec![body] };
    drop(request);
    if documents.is_empty() {
        return Err(ApiError::invalid("documents", "documents is empty"));
    }
    if documents.len() > MOST_DOCUMENTS {
        let message = format!("{} documents at once are more than {MOST_DOCUMENTS}", documents.len());
        return Err(ApiError::new(Code::TooLarge, message).with_param("documents"));
    }
    let mut seen = HashSet::new();
    let mut checked: Vec<(usize, Option<String>, Result<Valid, ApiError>)> = documents
        .into_iter()
        .enumerate()
        .map(|(n, value)| {
            let id = value.get("id").and_then(Value::as_str).map(|id| id.chars().take(128).collect());
            let valid = validate(value).and_then(|valid| {
                if seen.insert(valid.id.clone()) {
                    Ok(valid)
                } else {
                    Err(ApiError::invalid("id", format!("`{}` occurs twice in this request", valid.id)))
                }
            });
            (n, id, valid)
        })
        .collect();
    // Where no document can be stored, the request as a whole is bad, for the first one's reason.
    if checked.iter().all(|(_, _, valid)| valid.is_err())
        && let (n, _, Err(error)) = checked.swap_remove(0)
    {
        return Err(placed(error, n));
    }
    let first = context.gate.first_result(scope, &context.idempotency, key.as_ref(), ends_at_s);
    if let Some(stored) = Box::pin(first).await? {
        return Ok(web::repeated(stored));
    }
    // Nothing is reserved yet: each document reserves what it needs once that is known.
    let need = Need { tokens: Tokens(0), cost: NanoUsd(0) };
    let (admission, _) = match context.gate.admit(scope, Work::Ingestion, |_| Ok(vec![need]), deadline).await
    {
        Ok(admitted) => admitted,
        Err(error) => {
            context.idempotency.give_back(scope, key.as_ref()).await;
            return Err(error);
        }
    };
    let mut metered = Metered::new(context, scope, admission, deadline);
    let result = match metered.sealed().await {
        Ok(()) => store_all(context, &metered, checked).await,
        Err(error) => Err(error),
    };
    let latency_ms = context.clock.now().millis_since(started);
    let stored = metered.settle(key.as_ref(), latency_ms, StatusCode::CREATED, result).await?;
    Ok(web::repeated(stored))
}

async fn store_all(
    context: &Context,
    metered: &Metered<'_>,
    checked: Vec<(usize, Option<String>, Result<Valid, ApiError>)>,
) -> Result<(Answer, Shown), ApiError> {
    let outcomes: Vec<(Option<String>, Result<Document, ApiError>)> = futures_util::stream::iter(checked)
        .map(|(n, id, valid)| async move {
            let stored = match valid {
                Ok(valid) => store(context, metered, valid).await,
                Err(error) => Err(error),
            };
            (id, stored.map_err(|error| placed(error, n)))
        })
        .buffered(AT_ONCE)
        .collect()
        .await;
    // Where nothing was stored, the request as a whole failed, for the first document's reason.
    if let Some((_, Err(error))) = outcomes.first()
        && outcomes.iter().all(|(_, stored)| stored.is_err())
    {
        return Err(error.clone());
    }
    let stored = outcomes.iter().filter_map(|(_, stored)| stored.as_ref().ok());
    let shown = Shown { documents: stored.map(|document| document.id.clone()).collect(), chunks: Vec::new() };
    let documents = outcomes.into_iter().map(|(id, stored)| Outcome::new(id, stored)).collect();
    Ok((Answer { documents }, shown))
}

impl Outcome {
    fn new(id: Option<String>, stored: Result<Document, ApiError>) -> Self {
        match stored {
            Ok(document) => Self::Stored {
                id: document.id,
                version: document.version,
                status: document.status,
                chunks: document.chunks,
                sha256: document.sha256,
            },
            Err(error) => Self::Failed { id, status: DocumentStatus::Failed, error },
        }
    }
}

/// The same error, said of the `n`th document.
fn placed(mut error: ApiError, n: usize) -> ApiError {
    error.param = Some(match error.param {
        Some(param) => format!("documents[{n}].{param}"),
        None => format!("documents[{n}]"),
    });
    error
}

fn validate(value: Value) -> Result<Valid, ApiError> {
    let document: NewDocument = web::value(value)?;
    let text = |name: &'static str, text: &str, least: usize| {
        if text.trim().len() < least || text.len() > MOST_TITLE_BYTES {
            return Err(ApiError::invalid(
                name,
                format!("{name} must have {least} to {MOST_TITLE_BYTES} bytes"),
            ));
        }
        Ok(())
    };
    text("title", &document.title, 1)?;
    text("source", &document.source, 0)?;
    let metadata_bytes = serde_json::to_string(&document.metadata).map_or(usize::MAX, |json| json.len());
    if metadata_bytes > MOST_METADATA_BYTES {
        let message = format!("metadata is longer than {MOST_METADATA_BYTES} bytes");
        return Err(ApiError::new(Code::TooLarge, message).with_param("metadata"));
    }
    let content_type = match &document.content_type {
        None => ContentType::Plain,
        Some(media_type) => ContentType::parse(media_type).ok_or_else(|| {
            let message = "content_type must be text/plain, text/markdown or text/html";
            ApiError::new(Code::UnsupportedContentType, message).with_param("content_type")
        })?,
    };
    let (param, content) = match (document.content, document.content_base64) {
        (Some(content), None) => ("content", content),
        (None, Some(encoded)) => {
            let bytes = STANDARD
                .decode(encoded)
                .map_err(|error| ApiError::invalid("content_base64", format!("not base64: {error}")))?;
            let text = String::from_utf8(bytes)
                .map_err(|_| ApiError::invalid("content_base64", "the content is not UTF-8 text"))?;
            ("content_base64", text)
        }
        _ => return Err(ApiError::invalid("content", "give either content or content_base64")),
    };
    if content.trim().is_empty() {
        return Err(ApiError::invalid(param, format!("{param} is empty")));
    }
    if content.len() > MOST_CONTENT_BYTES {
        let message = format!("{param} is longer than {MOST_CONTENT_BYTES} bytes");
        return Err(ApiError::new(Code::TooLarge, message).with_param(param));
    }
    let id = match document.id {
        Some(id) => id.parse().map_err(|e: shared::ids::InvalidId| ApiError::invalid("id", e.to_string()))?,
        None => derived_id(&document.title, &document.source, &content),
    };
    Ok(Valid {
        id,
        title: document.title,
        source: document.source,
        content,
        content_type,
        metadata: document.metadata,
    })
}

/// Stores one document: its record as `processing`, its passages, its record as `ready`. The same
/// content again changes nothing; a crash anywhere is mended by sending it again.
async fn store(context: &Context, metered: &Metered<'_>, valid: Valid) -> Result<Document, ApiError> {
    let scope = metered.scope();
    let sha256 = hex::encode(digest(&valid));
    let known = context.documents.stored(scope, &valid.id).await?;
    if let Some(known) = &known
        && known.is_kept(scope.limits(), context.clock.now())
        && known.sha256 == sha256
        && known.status == DocumentStatus::Ready
    {
        return Ok(known.clone());
    }
    let chunks = chunk(&valid.id, &extract::blocks(&valid.content, valid.content_type));
    if chunks.is_empty() {
        return Err(ApiError::invalid("content", "the document holds no text"));
    }
    let now = context.clock.now();
    // The same content again is the same version, even where an earlier attempt did not end.
    let version = known.as_ref().map_or(1, |d| if d.sha256 == sha256 { d.version } else { d.version + 1 });
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
        created_at: known.as_ref().map_or(now, |d| d.created_at),
        updated_at: now,
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
            document.status = DocumentStatus::Failed;
            if let Err(second) =
                context.documents.put(scope, &document, Some(&processing), metered.seal()).await
            {
                tracing::warn!(document.id = %document.id, "Document stays marked as processing: {second}");
            }
            Err(error)
        }
    }
}

/// Somebody else changed the document while its passages were stored. If it was deleted, they must
/// not stay behind: what has been deleted is found by nobody.
async fn overtaken(context: &Context, scope: &TenantScope, id: &DocumentId) -> Result<(), ApiError> {
    if context.documents.stored(scope, id).await?.is_none() {
        context.cells.write(scope, context.embeddings.model())?.delete_document(id).await?;
    }
    Ok(())
}

/// Everything that makes a document what it is.
fn digest(valid: &Valid) -> [u8; 32] {
    let content_type = serde_json::to_string(&valid.content_type).unwrap_or_default();
    let metadata = serde_json::to_string(&valid.metadata).unwrap_or_default();
    fingerprint(&[&valid.title, &valid.source, &valid.content, &content_type, &metadata])
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
    collection.upsert(&document.id, document.updated_at, points).await?;
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
