//! `POST /v1/audit/exports` and `GET /v1/audit/exports/{id}`: the objects of a period, as they are, with
//! what it takes to check them.
//!
//! The objects cannot change, so a bundle is no copy: its id says which period it is of and how far the
//! log went when it was made, and its links are made anew each time. So what is kept under an idempotency key is
//! the id: a repeat is answered with the same bundle, under links that have not ended.

use std::ops::ControlFlow;

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use shared::audit_log::{self, Head, ObjectHash, WireRecord};
use shared::aws::LINKS_HOLD;
use shared::clock::Timestamp;
use shared::error::ApiError;
use shared::idempotency::{IdempotencyKey, Stored};
use shared::item_key;
use shared::ledger::{Action, Record};
use shared::scope::TenantScope;
use shared::tenant::TenantId;
use shared::web;

use crate::cursor::Cursor;
use crate::scan::{self, Ended};
use crate::{Context, Period, unavailable};

/// Objects on one page of a bundle.
const PAGE: usize = 200;
/// The most records on a page that are not in the log yet.
const MOST_PENDING: usize = 1_000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    from: Option<String>,
    to: Option<String>,
}

/// What an export's id says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Export {
    /// Whose it is: to others there is no such export.
    #[serde(rename = "i")]
    tenant_id: TenantId,
    #[serde(rename = "f")]
    from: i64,
    #[serde(rename = "t")]
    to: i64,
    /// Lines that the log had.
    #[serde(rename = "l")]
    lines: u64,
}

#[derive(Serialize)]
struct Bundle {
    export_id: String,
    status: &'static str,
    from: String,
    to: String,
    expires_at: String,
    manifest: Manifest,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

#[derive(Serialize)]
struct Manifest {
    objects: Vec<Entry>,
    /// Where the whole log ends.
    head: Head,
    /// Records of the period that are in no object yet.
    pending: Vec<WireRecord>,
}

/// An object: what to fetch, and its place in the chain.
#[derive(Serialize)]
struct Entry {
    key: String,
    url: String,
    object: u64,
    first_position: u64,
    last_position: u64,
    sha256: ObjectHash,
    previous: ObjectHash,
    bytes: usize,
}

pub(crate) async fn make(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let wanted: Wanted = web::json(&request)?;
    let period = Period::of(wanted.from.as_deref(), wanted.to.as_deref(), context.clock.now())?;
    let key = web::idempotency_key(&request, scope)?;
    let ends_at_s = web::ends_at_s(&request);
    let first = context.gate.first_result(scope, &context.idempotency, key.as_ref(), ends_at_s).await?;
    if let Some(first) = first {
        let export = own(scope, &first.body).ok_or_else(|| {
            tracing::error!("What is kept under an idempotency key is no export of its tenant");
            ApiError::unavailable("the export")
        })?;
        // It is read anew, and counts as the reading that it is.
        let bundle = Box::pin(read_anew(context, scope, &request, &export, Cursor::default())).await?;
        return Ok(web::reply(StatusCode::CREATED, &bundle));
    }
    let made = Box::pin(make_first(context, scope, &request, period, key.as_ref())).await;
    if made.is_err() {
        context.idempotency.give_back(scope, key.as_ref()).await;
    }
    Ok(web::reply(StatusCode::CREATED, &made?))
}

async fn make_first(
    context: &Context,
    scope: &mut TenantScope,
    request: &Request,
    period: Period,
    key: Option<&IdempotencyKey>,
) -> Result<Bundle, ApiError> {
    context.gate.admit_read(scope).await?;
    let head = context.chains.read(scope).await?.head;
    let (from, to) = (period.from.as_millis(), period.to.as_millis());
    let export = Export { tenant_id: scope.tenant_id().clone(), from, to, lines: head.lines };
    let bundle = bundle(context, scope, request, &export, Cursor::default()).await?;
    let now = context.clock.now();
    let record = Record::event(scope, Action::AuditExported, Vec::new(), now);
    let stored = Stored { status: StatusCode::CREATED.as_u16(), body: bundle.export_id.clone() };
    let finished = key.map(|key| context.idempotency.finished(key, &stored, now));
    context.ledger.note_finished(scope, &record, finished, None).await?;
    Ok(bundle)
}

pub(crate) async fn again(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let id: String = web::path_id(&request, "id")?;
    let export = own(scope, &id).ok_or_else(ApiError::not_found)?;
    let cursor: Option<String> = web::query(&request, "cursor")?;
    let cursor = cursor.map(|text| Cursor::read(&text, scope.tenant_id())).transpose()?;
    let bundle = read_anew(context, scope, &request, &export, cursor.unwrap_or_default()).await?;
    Ok(web::reply(StatusCode::OK, &bundle))
}

/// A bundle that was made before.
async fn read_anew(
    context: &Context,
    scope: &mut TenantScope,
    request: &Request,
    export: &Export,
    cursor: Cursor,
) -> Result<Bundle, ApiError> {
    context.gate.admit_read(scope).await?;
    let bundle = bundle(context, scope, request, export, cursor).await?;
    context.gate.note(scope, Action::AuditExported, Vec::new()).await?;
    Ok(bundle)
}

fn write(export: &Export) -> String {
    format!("exp_{}", serde_json::to_vec(export).map(hex::encode).unwrap_or_default())
}

fn read(id: &str) -> Option<Export> {
    serde_json::from_slice(&hex::decode(id.strip_prefix("exp_")?).ok()?).ok()
}

/// The export of that id, if it is this tenant's.
fn own(scope: &TenantScope, id: &str) -> Option<Export> {
    read(id).filter(|export| export.tenant_id == *scope.tenant_id())
}

async fn bundle(
    context: &Context,
    scope: &TenantScope,
    request: &Request,
    export: &Export,
    cursor: Cursor,
) -> Result<Bundle, ApiError> {
    let deadline = context.deadline(request);
    let (from, to) = (Timestamp::from_millis(export.from), Timestamp::from_millis(export.to));
    let period = Period { from, to };
    let mut found = Vec::new();
    let ended = scan::objects(context, scope, period, cursor.key.as_deref(), deadline, |first, bytes| {
        if found.len() >= PAGE {
            return Ok(ControlFlow::Break(()));
        }
        let (lines, head) =
            audit_log::read(&bytes).map_err(|error| scan::damaged(first, &error.to_string()))?;
        // A link shows all of an object: one with a line of another tenant is shown to nobody.
        if lines.iter().any(|line| scope.owns(line.record.tenant_id.as_str(), "the audit log").is_err()) {
            return Ok(ControlFlow::Continue(()));
        }
        // What was added since is no part of it; nor is an object of which nothing is in the period.
        let inside = |line: &audit_log::Line| from <= line.record.time && line.record.time < to;
        if let Some(start) = lines.first().filter(|start| start.position <= export.lines)
            && lines.iter().any(inside)
        {
            found.push((first.clone(), start.clone(), head, bytes.len()));
        }
        Ok(ControlFlow::Continue(()))
    })
    .await?;
    let mut objects = Vec::new();
    for (first, start, head, bytes) in found {
        let url = context.objects.link(scope, &first).await.map_err(unavailable)?;
        objects.push(Entry {
            key: first.key,
            url,
            object: head.objects,
            first_position: start.position,
            last_position: head.lines,
            sha256: head.last,
            previous: start.previous,
            bytes,
        });
    }
    let (cursor, pending) = match ended {
        Ended::AtTheEnd => (None, pending(context, scope, period).await?),
        Ended::Before(key) => {
            let cursor = Cursor { key: Some(key), ..Cursor::default() };
            (Some(cursor.write(scope.tenant_id())), Vec::new())
        }
    };
    let expires_at = context.clock.now().plus_millis(LINKS_HOLD.as_millis() as i64);
    Ok(Bundle {
        export_id: write(export),
        status: "ready",
        from: from.to_string(),
        to: to.to_string(),
        expires_at: expires_at.to_string(),
        manifest: Manifest { objects, head: context.chains.read(scope).await?.head, pending },
        cursor,
    })
}

async fn pending(
    context: &Context,
    scope: &TenantScope,
    period: Period,
) -> Result<Vec<WireRecord>, ApiError> {
    let from = item_key::pending(period.from, "");
    let page = context.ledger.pending(scope, &from, MOST_PENDING as i32).await?;
    let inside = page.into_iter().filter(|(_, record)| record.time < period.to);
    Ok(inside.map(|(sort, record)| WireRecord::new(sort, record)).collect())
}
