//! `GET /v1/documents` and `GET /v1/documents/{id}`.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::Serialize;
use serde_json::{Map, Value};
use shared::clock::Timestamp;
use shared::document::{ContentType, Document, DocumentStatus};
use shared::error::{ApiError, Code};
use shared::groups::Groups;
use shared::ids::DocumentId;
use shared::ledger::Action;
use shared::scope::TenantScope;
use shared::web;

use crate::Context;

/// A document as callers see it.
#[derive(Debug, Serialize)]
pub(crate) struct View {
    id: DocumentId,
    version: u64,
    status: DocumentStatus,
    chunks: u32,
    sha256: String,
    title: String,
    source: String,
    content_type: ContentType,
    #[serde(skip_serializing_if = "Map::is_empty")]
    metadata: Map<String, Value>,
    #[serde(skip_serializing_if = "Groups::is_empty")]
    groups: Groups,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    created_at: String,
    updated_at: String,
}

impl View {
    fn of(document: Document, now: Timestamp) -> Self {
        let (status, reason) = document.standing(now);
        let reason = reason.map(str::to_owned);
        Self {
            id: document.id,
            version: document.version,
            status,
            reason,
            chunks: document.chunks,
            sha256: document.sha256,
            title: document.title,
            source: document.source,
            content_type: document.content_type,
            metadata: document.metadata,
            groups: document.groups,
            created_at: document.created_at.to_string(),
            updated_at: document.updated_at.to_string(),
        }
    }
}

/// Documents that are looked at at once, at least.
const LEAST_PAGE: u16 = 500;
/// How long documents are looked for, in milliseconds: API Gateway waits for 29 seconds.
const MOST_TIME_MS: i64 = 20_000;

#[derive(Serialize)]
struct List {
    documents: Vec<View>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<DocumentId>,
}

pub(crate) async fn list(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let limit = web::page_size(&request)?;
    let after: Option<String> = web::query(&request, "cursor")?;
    context.gate.admit_read(scope).await?;
    let now = context.clock.now();
    let (documents, cursor) = readable(context, scope, limit, after, now).await?;
    let ids = documents.iter().map(|document| document.id.clone()).collect();
    context.gate.note(scope, Action::DocumentsListed, ids).await?;
    let documents = documents.into_iter().map(|document| View::of(document, now)).collect();
    Ok(web::reply(StatusCode::OK, &List { documents, cursor }))
}

/// A page of the documents that the caller may read, and the id to go on after if there are more of these. What it may
/// not read shows nowhere: no id of it, no page that is shorter for it, and no cursor that leads to nothing but it.
async fn readable(
    context: &Context,
    scope: &TenantScope,
    limit: u16,
    mut after: Option<String>,
    now: Timestamp,
) -> Result<(Vec<Document>, Option<DocumentId>), ApiError> {
    let most = usize::from(limit);
    let deadline = now.plus_millis(MOST_TIME_MS);
    // One more than is shown tells whether there are more; of many that the caller may not read, many at once.
    let page_size = (limit + 1).max(LEAST_PAGE);
    let mut readable: Vec<Document> = Vec::new();
    loop {
        if context.clock.now() >= deadline {
            let message =
                "the documents that you may read are too far apart among others; ask for each by its id";
            return Err(ApiError::new(Code::DeadlineExceeded, message));
        }
        let (page, next) = context.documents.list(scope, page_size, after.as_deref(), now).await?;
        readable.extend(page.into_iter().filter(|document| scope.may_read(&document.groups)));
        if readable.len() > most {
            readable.truncate(most);
            let last = readable.last().map(|document| document.id.clone());
            return Ok((readable, last));
        }
        let Some(next) = next else { return Ok((readable, None)) };
        after = Some(next.to_string());
    }
}

pub(crate) async fn one(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let id: DocumentId = web::path_id(&request, "id")?;
    context.gate.admit_read(scope).await?;
    let now = context.clock.now();
    let document = context.documents.get(scope, &id, now).await?;
    let document = document.filter(|document| scope.may_read(&document.groups));
    let document = document.ok_or_else(ApiError::not_found)?;
    context.gate.note(scope, Action::DocumentRead, vec![id]).await?;
    Ok(web::reply(StatusCode::OK, &View::of(document, now)))
}
