//! `GET /v1/audit`: records by time, user, action, document and passage, the oldest first.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use http::{Response, StatusCode};
use lambda_http::{Body, Request, RequestExt};
use serde::Serialize;
use shared::audit_filter::Filter;
use shared::audit_log::{Line, WireRecord};
use shared::error::ApiError;
use shared::item_key;
use shared::ledger::Action;
use shared::scope::TenantScope;
use shared::web;

use crate::cursor::Cursor;
use crate::scan::{self, Ended};
use crate::{Context, Period};

/// The parameters that there are.
const PARAMETERS: [&str; 8] = ["from", "to", "user", "action", "document", "chunk", "cursor", "limit"];

#[derive(Serialize)]
struct List {
    records: Vec<WireRecord>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let deadline = context.deadline(&request);
    let parameters = request.query_string_parameters_ref();
    let unknown = parameters.and_then(|all| all.iter().find(|(name, _)| !PARAMETERS.contains(name)));
    if let Some((name, _)) = unknown {
        let message = format!("there is no filter of that name; there are {}", PARAMETERS.join(", "));
        return Err(ApiError::invalid(name, message));
    }
    let text = |name| web::query::<String>(&request, name);
    let period = Period::of(text("from")?.as_deref(), text("to")?.as_deref(), context.clock.now())?;
    let action = text("action")?.map(|name| action(&name)).transpose()?;
    let filter = Filter {
        from: Some(period.from),
        to: Some(period.to),
        user: web::query(&request, "user")?,
        action,
        document: web::query(&request, "document")?,
        chunk: text("chunk")?,
    };
    let limit = usize::from(web::page_size(&request)?);
    let cursor = text("cursor")?.map(|text| Cursor::read(&text, scope.tenant_id())).transpose()?;
    context.gate.admit_read(scope).await?;
    let list = list(context, scope, period, &filter, limit, cursor.unwrap_or_default(), deadline).await?;
    context.gate.note(scope, Action::AuditRead, Vec::new()).await?;
    Ok(web::reply(StatusCode::OK, &list))
}

fn action(name: &str) -> Result<Action, ApiError> {
    serde_json::from_value(name.into()).map_err(|_| ApiError::invalid("action", "there is no such action"))
}

async fn list(
    context: &Context,
    scope: &TenantScope,
    period: Period,
    filter: &Filter,
    limit: usize,
    cursor: Cursor,
    deadline: tokio::time::Instant,
) -> Result<List, ApiError> {
    // Before the log: what leaves those that wait is in the log from then on.
    let mut pending = pending(context, scope, filter, cursor.pending.as_deref(), limit + 1).await?;
    let sieve = filter.sieve();
    let mut records: Vec<WireRecord> = Vec::new();
    let mut reached = Cursor { pending: None, ..cursor.clone() };
    let ended = scan::objects(context, scope, period, cursor.key.as_deref(), deadline, |first, bytes| {
        let passed = if cursor.key.as_ref() == Some(&first.key) { cursor.lines } else { 0 };
        let mut damage = None;
        let mut lines = 0;
        let flow = scan::lines(first, &bytes, &sieve, |number, text| {
            lines = number + 1;
            let line: Line = match serde_json::from_str(text) {
                Ok(line) => line,
                Err(error) => {
                    damage = Some(scan::damaged(first, &error.to_string()));
                    return ControlFlow::Break(());
                }
            };
            let place = item_key::pending(line.record.time, &line.record.id);
            pending.remove(&place);
            // Those that were shown while they waited are not shown again.
            let shown = number < passed || cursor.pending.as_ref().is_some_and(|last| place <= *last);
            if shown
                || scope.owns(line.record.tenant_id.as_str(), "the audit log").is_err()
                || !filter.matches(&line.record)
            {
                return ControlFlow::Continue(());
            }
            records.push(line.record);
            if records.len() >= limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(damage) = damage {
            return Err(damage);
        }
        reached.key = Some(first.key.clone());
        reached.lines = if flow.is_break() { lines } else { usize::MAX };
        Ok(flow)
    })
    .await?;
    let mut more = match ended {
        Ended::AtTheEnd => false,
        Ended::Before(key) => {
            if reached.key.as_ref() != Some(&key) {
                (reached.key, reached.lines) = (Some(key), 0);
            }
            reached.pending.clone_from(&cursor.pending);
            true
        }
    };
    if !more {
        let room = limit - records.len();
        more = pending.len() > room;
        reached.pending = pending.keys().take(room).next_back().cloned().or(cursor.pending);
        records.extend(pending.into_values().take(room));
    }
    let cursor = more.then(|| reached.write(scope.tenant_id()));
    Ok(List { records, cursor })
}

/// Records that are not in the log yet, by their place among them: at most `most` that are wanted.
async fn pending(
    context: &Context,
    scope: &TenantScope,
    filter: &Filter,
    after: Option<&str>,
    most: usize,
) -> Result<BTreeMap<String, WireRecord>, ApiError> {
    const PAGE: usize = 500;
    let mut found = BTreeMap::new();
    let mut from = after.map_or_else(
        || filter.from.map_or_else(String::new, |from| item_key::pending(from, "")),
        ToOwned::to_owned,
    );
    loop {
        let page = context.ledger.pending(scope, &from, PAGE as i32).await?;
        let full = page.len() >= PAGE;
        for (sort, record) in page {
            let place = item_key::pending(record.time, &sort);
            from.clone_from(&place);
            let record = WireRecord::new(sort, record);
            if filter.matches(&record) {
                found.insert(place, record);
            }
        }
        if !full || found.len() >= most {
            return Ok(found);
        }
    }
}
