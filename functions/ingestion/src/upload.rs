//! `POST /v1/uploads`: a document whose file its sender puts into the bucket, by a link that is good for one file.
//! What becomes of the file is `worker`'s.

use std::collections::BTreeMap;

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use shared::aws::LINKS_HOLD;
use shared::aws::audit_objects::ObjectError;
use shared::clock::Timestamp;
use shared::document::{Document, DocumentStatus};
use shared::error::{ApiError, Code};
use shared::ids::{DocumentId, UploadId};
use shared::ledger::Action;
use shared::random::entropy;
use shared::scope::TenantScope;
use shared::upload::{MOST_BYTES, Upload, UploadPlace};
use shared::web;

use crate::Context;
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

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let asked: NewUpload = web::json(&request)?;
    check_description(&asked.title, &asked.source, &asked.metadata)?;
    let groups = groups(asked.groups)?;
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
    let document_id = match asked.id {
        Some(id) => id.parse().map_err(|e: shared::ids::InvalidId| ApiError::invalid("id", e.to_string()))?,
        None => DocumentId::new(&mut entropy()),
    };
    context.gate.admit_read(scope).await?;
    // Its file would lie in the bucket as it is, where all else that it wrote is sealed.
    if scope.kms_key().is_some() {
        let message = "files cannot be uploaded for a tenant with a KMS key of its own, since they would not be \
                       sealed with it; send the content to POST /v1/documents";
        return Err(ApiError::new(Code::InvalidRequest, message));
    }
    let now = context.clock.now();
    let who = scope.asked();
    let upload = Upload {
        tenant_id: scope.tenant_id().clone(),
        upload_id: UploadId::new(&mut entropy()),
        document_id,
        title: asked.title,
        source: asked.source,
        metadata: asked.metadata,
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
    let known = context.documents.stored(scope, &upload.document_id).await?;
    // Whoever stores it now would lose what it has begun.
    if known.as_ref().is_some_and(|known| known.is_at_work(now)) {
        let message = format!("`{}` is being stored right now; try again", upload.document_id);
        return Err(ApiError::new(Code::Conflict, message).with_param("id"));
    }
    // A crash until the document awaits the file leaves a record that is forgotten by itself.
    let link = context.uploads.link(scope, &upload).await.map_err(unavailable)?;
    context.upload_records.begin(scope, &upload).await?;
    let document = awaiting(known.as_ref().filter(|d| d.is_kept(scope.limits(), now)), &upload, now);
    let mut document = Document { version: known.as_ref().map_or(0, |known| known.version), ..document };
    let awaited = match &known {
        Some(known) => context.documents.put(scope, &mut document, known, None).await.map_err(ApiError::from),
        None => context.documents.create(scope, &mut document, None).await.map_err(ApiError::from),
    };
    if let Err(error) = awaited {
        if let Err(second) = context.upload_records.end(scope, &upload.upload_id).await {
            tracing::warn!(upload.id = %upload.upload_id, "An upload that was not begun is left for later: {second}");
        }
        return Err(error);
    }
    supersede(context, scope, known.as_ref()).await;
    context.gate.note(scope, Action::UploadBegun, vec![upload.document_id.clone()]).await?;
    let begun = Begun {
        document_id: upload.document_id,
        url: link.url,
        headers: link.headers,
        expires_at: upload.expires_at.to_string(),
    };
    Ok(web::reply(StatusCode::CREATED, &begun))
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
fn awaiting(known: Option<&Document>, upload: &Upload, now: Timestamp) -> Document {
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
            title: upload.title.clone(),
            source: upload.source.clone(),
            content_type: upload.content_type,
            metadata: upload.metadata.clone(),
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
