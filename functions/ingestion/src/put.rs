//! `POST /v1/documents`: one document or several. Each stands alone: a bad one is reported with its
//! reason, the others are stored.

use std::collections::HashSet;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use shared::aws::StoreError;
use shared::document::{ContentType, Document, DocumentStatus, derived_id};
use shared::error::{ApiError, Code};
use shared::gate::Need;
use shared::groups::{Groups, InvalidGroups};
use shared::ids::DocumentId;
use shared::meter::Work;
use shared::scope::TenantScope;
use shared::units::{NanoUsd, Tokens};
use shared::web;
use tokio::time::Instant;

use crate::Context;
use crate::extract::Charset;
use crate::extract::apart::MOST_TIME;
use crate::metered::{Metered, Shown};
use crate::store::{NotStored, Valid, store};

/// The most documents in one request.
const MOST_DOCUMENTS: usize = 100;
/// The longest content of one document, in bytes.
const MOST_CONTENT_BYTES: usize = 5 << 20;
/// The longest title and the longest source, in bytes.
const MOST_TITLE_BYTES: usize = 1_000;
/// The most notes, in bytes of JSON.
const MOST_METADATA_BYTES: usize = 16 << 10;
/// How many documents of a request are worked on at the same time.
const AT_ONCE: usize = 4;
/// How long the documents of a request are read, all together: longer than one may take, so that the slowest is told
/// that it is that, and so much shorter than API Gateway waits (29 s) that what was read is stored and each is answered.
const READING: Duration = Duration::from_secs(MOST_TIME.as_secs() + 3);

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
    groups: Option<Vec<String>>,
}

/// A document of the request.
struct Checked {
    /// Its place in the list; a bare one has none.
    n: Option<usize>,
    /// What it calls itself, be it an id or not.
    id: Option<String>,
    /// The document, and the field that its content came in.
    valid: Result<(Valid, &'static str), ApiError>,
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
    let reads_until = Instant::now() + READING;
    let deadline = web::deadline(&request, &context.clock);
    let key = web::idempotency_key(&request, scope)?;
    let ends_at_s = web::ends_at_s(&request);
    let body: Map<String, Value> = web::json(&request)?;
    let (several, body) = (body.contains_key("documents"), Value::Object(body));
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
    let mut checked: Vec<Checked> = documents
        .into_iter()
        .enumerate()
        .map(|(n, value)| {
            let id = value.get("id").and_then(Value::as_str).map(|id| id.chars().take(128).collect());
            let valid = validate(value).and_then(|(valid, param)| {
                if seen.insert(valid.id.clone()) {
                    Ok((valid, param))
                } else {
                    Err(ApiError::invalid("id", format!("`{}` occurs twice in this request", valid.id)))
                }
            });
            Checked { n: several.then_some(n), id, valid }
        })
        .collect();
    // Where no document can be stored, the request as a whole is bad, for the first one's reason.
    if checked.iter().all(|checked| checked.valid.is_err())
        && let Checked { n, valid: Err(error), .. } = checked.swap_remove(0)
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
    let mut metered = Metered::new(context, scope, admission, deadline).reading_until(reads_until);
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
    checked: Vec<Checked>,
) -> Result<(Answer, Shown), ApiError> {
    let outcomes: Vec<(Option<String>, Result<Document, ApiError>)> = futures_util::stream::iter(checked)
        .map(|Checked { n, id, valid }| async move {
            let stored = match valid {
                Ok((valid, param)) => store(context, metered, valid).await.map_err(|error| match error {
                    NotStored::Unreadable(reason) => ApiError::from(reason).with_param(param),
                    NotStored::NotAwaited => StoreError::Conflict.into(),
                    NotStored::Failed(error) => error,
                }),
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

/// The same error, said of the `n`th document of a list.
fn placed(mut error: ApiError, n: Option<usize>) -> ApiError {
    let Some(n) = n else { return error };
    error.param = Some(match error.param {
        Some(param) => format!("documents[{n}].{param}"),
        None => format!("documents[{n}]"),
    });
    error
}

/// The document, and the field that its content came in.
fn validate(value: Value) -> Result<(Valid, &'static str), ApiError> {
    let mut document: NewDocument = web::value(value)?;
    check_description(&document.title, &document.source, &document.metadata)?;
    let groups = groups(document.groups.take())?;
    let content_type = document.content_type.as_deref().map_or(Ok(ContentType::Plain), content_type)?;
    let charset = document.content_type.as_deref().map_or(Ok(None), charset)?;
    let (param, charset, content) = match (document.content.take(), document.content_base64.take()) {
        // JSON has decoded it, whatever it was in before.
        (Some(content), None) => ("content", Some(Charset::UTF_8), content.into_bytes()),
        (None, Some(encoded)) => {
            let bytes = STANDARD
                .decode(encoded)
                .map_err(|error| ApiError::invalid("content_base64", format!("not base64: {error}")))?;
            ("content_base64", charset, bytes)
        }
        _ => return Err(ApiError::invalid("content", "give either content or content_base64")),
    };
    if content.trim_ascii().is_empty() {
        return Err(ApiError::invalid(param, format!("{param} is empty")));
    }
    if content.len() > MOST_CONTENT_BYTES {
        let message = format!("{param} is longer than {MOST_CONTENT_BYTES} bytes");
        return Err(ApiError::new(Code::TooLarge, message).with_param(param));
    }
    let id = match document.id.take() {
        Some(id) => id.parse().map_err(|e: shared::ids::InvalidId| ApiError::invalid("id", e.to_string()))?,
        None => derived_id(&document.title, &document.source, &content),
    };
    let NewDocument { title, source, metadata, .. } = document;
    Ok((Valid { id, title, source, content, content_type, charset, metadata, groups, upload: None }, param))
}

/// Whether a document may be described so.
///
/// # Errors
/// The error that names the field.
pub(crate) fn check_description(
    title: &str,
    source: &str,
    metadata: &Map<String, Value>,
) -> Result<(), ApiError> {
    let text = |name: &'static str, text: &str, least: usize| {
        if text.trim().len() < least || text.len() > MOST_TITLE_BYTES {
            return Err(ApiError::invalid(
                name,
                format!("{name} must have {least} to {MOST_TITLE_BYTES} bytes"),
            ));
        }
        Ok(())
    };
    text("title", title, 1)?;
    text("source", source, 0)?;
    let metadata_bytes = serde_json::to_string(metadata).map_or(usize::MAX, |json| json.len());
    if metadata_bytes > MOST_METADATA_BYTES {
        let message = format!("metadata is longer than {MOST_METADATA_BYTES} bytes");
        return Err(ApiError::new(Code::TooLarge, message).with_param("metadata"));
    }
    Ok(())
}

/// The kind of content that a media type names.
///
/// # Errors
/// 415 if it is none that is ingested.
pub(crate) fn content_type(media_type: &str) -> Result<ContentType, ApiError> {
    ContentType::parse(media_type).ok_or_else(|| {
        let known = ContentType::ALL.map(ContentType::media_type).join(", ");
        unsupported(format!("content_type must be one of {known}"))
    })
}

/// Who of the tenant's users may find a document.
///
/// # Errors
/// The error that names the field.
pub(crate) fn groups(names: Option<Vec<String>>) -> Result<Groups, ApiError> {
    Groups::of_document(names).map_err(|error| match error {
        InvalidGroups::Name(n) => ApiError::invalid(format!("groups[{n}]"), error.to_string()),
        InvalidGroups::Empty | InvalidGroups::TooMany => ApiError::invalid("groups", error.to_string()),
    })
}

/// The charset that a media type names, if it names one.
pub(crate) fn charset(media_type: &str) -> Result<Option<Charset>, ApiError> {
    let named = media_type.split(';').skip(1).find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("charset").then(|| value.trim().trim_matches('"'))
    });
    let Some(label) = named else { return Ok(None) };
    let label: String = label.chars().take(40).collect();
    let known = Charset::parse(&label);
    known
        .map(Some)
        .ok_or_else(|| unsupported(format!("content_type names the charset `{label}`, which nobody knows")))
}

fn unsupported(message: String) -> ApiError {
    ApiError::new(Code::UnsupportedContentType, message).with_param("content_type")
}
