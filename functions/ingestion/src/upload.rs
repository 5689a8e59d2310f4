//! `POST /v1/uploads`: a document whose file its sender puts into the bucket, by a link that is good for one file.
//! What becomes of the file is `worker`'s.

use std::collections::BTreeMap;
use std::time::Duration;

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use shared::aws::audit_objects::ObjectError;
use shared::aws::documents::NotCreated;
use shared::aws::{LINKS_HOLD, StoreError};
use shared::clock::Timestamp;
use shared::document::{ContentType, Document, DocumentStatus};
use shared::error::{ApiError, Code};
use shared::groups::Groups;
use shared::idempotency::{IdempotencyKey, Stored};
use shared::ids::{DocumentId, UploadId};
use shared::ledger::{Action, Record};
use shared::random::entropy;
use shared::scope::TenantScope;
use shared::upload::{Description, MOST_BYTES, Upload, UploadPlace};
use shared::web;

use crate::Context;
use crate::extract::Charset;
use crate::put::{charset, check_description, content_type, groups};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewUpload {
    id: Option<String>,
    title: String,
    #[serde(default)]
    source: String,
    content_type: String,
    size_bytes: u64,
    #[serde(default)]
    metadata: Map<String, Value>,
    groups: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Begun {
    document_id: DocumentId,
    url: String,
    headers: BTreeMap<String, String>,
    expires_at: String,
}

/// What is kept of an upload for repeats of its request: all that its link says, and not the link, which whoever reads
/// it could use. It is signed anew.
#[derive(Serialize, Deserialize)]
struct First {
    document_id: DocumentId,
    upload_id: UploadId,
    content_type: ContentType,
    size_bytes: u64,
    expires_at: Timestamp,
}

/// An upload as it was asked for, and found to be one.
struct Wanted {
    document_id: DocumentId,
    asked: NewUpload,
    groups: Groups,
    content_type: ContentType,
    charset: Option<Charset>,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let wanted = wanted(web::json(&request)?)?;
    let key = web::idempotency_key(&request, scope)?;
    let ends_at_s = web::ends_at_s(&request);
    let first = context.gate.first_result(scope, &context.idempotency, key.as_ref(), ends_at_s);
    let first = match Box::pin(first).await? {
        Some(stored) => again(context, &stored)?,
        None => {
            let begun = Box::pin(begin(context, scope, key.as_ref(), wanted)).await;
            if begun.is_err() {
                context.idempotency.give_back(scope, key.as_ref()).await;
            }
            begun?
        }
    };
    Ok(web::reply(StatusCode::CREATED, &linked(context, scope, first).await?))
}

fn wanted(mut asked: NewUpload) -> Result<Wanted, ApiError> {
    check_description(&asked.title, &asked.source, &asked.metadata)?;
    let groups = groups(asked.groups.take())?;
    let charset = charset(&asked.content_type)?;
    let content_type = content_type(&asked.content_type)?;
    match asked.size_bytes {
        1..=MOST_BYTES => {}
        0 => return Err(ApiError::invalid("size_bytes", "size_bytes is 0: an empty file holds no text")),
        _ => {
            let message = format!("size_bytes is more than {MOST_BYTES}");
            return Err(ApiError::new(Code::TooLarge, message).with_param("size_bytes"));
        }
    }
    let document_id = match asked.id.take() {
        Some(id) => id.parse().map_err(|e: shared::ids::InvalidId| ApiError::invalid("id", e.to_string()))?,
        None => DocumentId::new(&mut entropy()),
    };
    Ok(Wanted { document_id, asked, groups, content_type, charset })
}

/// What the first request of a key has begun, as long as its link holds: to begin another would make a second document
/// of one that was sent twice.
fn again(context: &Context, stored: &Stored) -> Result<First, ApiError> {
    let first: First = serde_json::from_str(&stored.body).map_err(|error| {
        tracing::error!("A first result does not parse: {error}");
        ApiError::unavailable("the first result")
    })?;
    if holds(&first, context.clock.now()).is_some() {
        return Ok(first);
    }
    let message = format!(
        "the upload of `{}` was begun with this Idempotency-Key, and its link ended at {}; begin another with \
         another key",
        first.document_id, first.expires_at
    );
    Err(ApiError::new(Code::Conflict, message).with_param("Idempotency-Key"))
}

/// How long an upload's link still holds: signatures know seconds.
fn holds(first: &First, now: Timestamp) -> Option<Duration> {
    let left = Duration::from_secs(first.expires_at.millis_since(now).div_ceil(1_000));
    (!left.is_zero()).then_some(left)
}

async fn linked(context: &Context, scope: &TenantScope, first: First) -> Result<Begun, ApiError> {
    let left = holds(&first, context.clock.now()).ok_or_else(|| ApiError::unavailable("the link"))?;
    let place = UploadPlace { tenant_id: scope.tenant_id().clone(), upload_id: first.upload_id };
    let link = context.uploads.link(scope, &place, (first.content_type, first.size_bytes), left);
    let link = link.await.map_err(unavailable)?;
    Ok(Begun {
        document_id: first.document_id,
        url: link.url,
        headers: link.headers,
        expires_at: first.expires_at.to_string(),
    })
}

async fn begin(
    context: &Context,
    scope: &mut TenantScope,
    key: Option<&IdempotencyKey>,
    wanted: Wanted,
) -> Result<First, ApiError> {
    let Wanted { document_id, asked, groups, content_type, charset } = wanted;
    context.gate.admit_read(scope).await?;
    // Without it nothing could be stored, nor would S3 take the file.
    let seal = Box::pin(context.data_keys.of(scope)).await?;
    let now = context.clock.now();
    let who = scope.asked();
    let upload = Upload {
        tenant_id: scope.tenant_id().clone(),
        upload_id: UploadId::new(&mut entropy()),
        document_id,
        groups,
        content_type,
        charset: charset.map(|charset| charset.name().to_owned()),
        size_bytes: asked.size_bytes,
        key_id: scope.credential().clone(),
        user_id: who.user_id,
        request_id: who.request_id,
        created_at: now,
        expires_at: now.plus_millis(i64::try_from(LINKS_HOLD.as_millis()).unwrap_or(i64::MAX)),
        attempts: 0,
        claimed_until: None,
    };
    let description = Description { title: asked.title, source: asked.source, metadata: asked.metadata };
    let known = context.documents.to_await(scope, &upload.document_id).await?;
    // Whoever stores it now would lose what it has begun.
    if known.as_ref().is_some_and(|known| known.is_at_work(now)) {
        let message = format!("`{}` is being stored right now; try again", upload.document_id);
        return Err(ApiError::new(Code::Conflict, message).with_param("id"));
    }
    // A crash until the document awaits the file leaves a record that is forgotten by itself.
    context.upload_records.begin(scope, &upload, &description, seal.as_deref()).await?;
    let kept = known.as_ref().filter(|d| d.is_kept(scope.limits(), now));
    let document = awaiting(kept, &upload, description, now);
    let mut document = Document { version: known.as_ref().map_or(0, |known| known.version), ..document };
    let awaited = match &known {
        Some(known) => {
            let put = context.documents.put(scope, &mut document, known, seal.as_deref()).await;
            put.map_err(NotCreated::Store)
        }
        None => context.documents.create(scope, &mut document, seal.as_deref()).await,
    };
    if let Err(error) = awaited {
        // What was not answered may have been done: then its record finds it.
        let undone = matches!(error, NotCreated::Full | NotCreated::Store(StoreError::Conflict));
        if undone && let Err(second) = context.upload_records.end(scope, &upload.upload_id).await {
            tracing::warn!(upload.id = %upload.upload_id, "An upload that was not begun is left for later: {second}");
        }
        return Err(error.into());
    }
    supersede(context, scope, known.as_ref()).await;
    let first = First {
        document_id: upload.document_id,
        upload_id: upload.upload_id,
        content_type: upload.content_type,
        size_bytes: upload.size_bytes,
        expires_at: upload.expires_at,
    };
    let record = Record::event(scope, Action::UploadBegun, vec![first.document_id.clone()], now);
    let body = serde_json::to_string(&first).map_err(|error| {
        tracing::error!("An upload does not serialise: {error}");
        ApiError::unavailable("the answer")
    })?;
    let stored = Stored { status: StatusCode::CREATED.as_u16(), body };
    let finished = key.map(|key| context.idempotency.finished(key, &stored, now));
    context.ledger.note_finished(scope, &record, finished, seal.as_deref()).await?;
    Ok(first)
}

/// Takes away what is left of an upload: its file for good, and then its record, so that a crash between leaves what is
/// found again.
///
/// # Errors
/// What the caller is to see; some of it may be done.
pub(crate) async fn close(
    context: &Context,
    scope: &TenantScope,
    upload_id: &UploadId,
) -> Result<(), ApiError> {
    let place = UploadPlace { tenant_id: scope.tenant_id().clone(), upload_id: upload_id.clone() };
    context.uploads.close(scope, &place).await.map_err(unavailable)?;
    Ok(context.upload_records.end(scope, upload_id).await?)
}

/// Takes away the file that the document awaited before it was sent again. What cannot be taken away now is when it
/// is to be read, or in a while.
pub(crate) async fn supersede(context: &Context, scope: &TenantScope, known: Option<&Document>) {
    let awaited = known.and_then(|known| known.upload.as_ref()).filter(|awaited| !awaited.taken);
    if let Some(awaited) = awaited
        && let Err(error) = close(context, scope, &awaited.upload_id).await
    {
        tracing::warn!(upload.id = %awaited.upload_id, "A file that nobody awaits is left for later: {error}");
    }
}

/// The document as it awaits its file: what it holds until then stays as it is, and is found.
fn awaiting(known: Option<&Document>, upload: &Upload, description: Description, now: Timestamp) -> Document {
    let upload_ref = Some(upload.awaited());
    match known {
        Some(known) if known.version > 0 => Document { upload: upload_ref, ..known.clone() },
        _ => Document {
            tenant_id: upload.tenant_id.clone(),
            id: upload.document_id.clone(),
            version: 0,
            status: DocumentStatus::Pending,
            chunks: 0,
            sha256: String::new(),
            title: description.title,
            source: description.source,
            content_type: upload.content_type,
            metadata: description.metadata,
            groups: upload.groups.clone(),
            created_at: known.map_or(now, |known| known.created_at),
            updated_at: now,
            current: None,
            upload: upload_ref,
            at_work_until: None,
            reason: None,
            revision: 0,
        },
    }
}

/// What the caller sees where the bucket does not answer. The failure itself is logged here, once.
pub(crate) fn unavailable(error: ObjectError) -> ApiError {
    tracing::error!(error = &error as &dyn std::error::Error, "The documents' bucket does not answer");
    ApiError::unavailable("the bucket of uploads")
}
