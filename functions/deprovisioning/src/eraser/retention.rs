//! What is past its retention: no reader is shown it any more, and once a day it is deleted. It counts from
//! the tenant's limit as it is then, so that a lowered one applies to what was written before.

use futures_util::StreamExt;
use lambda_runtime::Error;
use serde::Serialize;
use shared::aws::StoreError;
use shared::aws::erasure::Onward;
use shared::ids::DocumentId;
use shared::ledger::Record;
use shared::scope::{Expired, RequestId};
use shared::tenant::{Tenant, TenantStatus};
use shared::vectors::VectorError;
use tokio::time::Instant;

use super::{AT_ONCE, Context};

/// The most documents that one record names, as of a request that stores them.
const MOST_NAMED: usize = 100;
/// What the records of such deletions say where others name a request.
const REQUEST: &str = "retention";

/// What was deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Retained {
    /// Tenants looked at.
    pub tenants: u64,
    /// Documents deleted, with their passages.
    pub documents: u64,
    /// Turns deleted.
    pub turns: u64,
    /// Tenants for whom something failed, or there was no time. It is an alarm.
    pub left: u64,
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Vectors(#[from] VectorError),
}

/// Deletes what is past its retention, of every tenant.
pub(super) async fn run(context: &Context, until: Instant) -> Result<Retained, Error> {
    let mut all = Retained::default();
    let mut after = None;
    loop {
        let (tenants, next) = context.tenants.page(&context.bookkeeper, after).await?;
        let mut looked = futures_util::stream::iter(tenants)
            .filter(|tenant| std::future::ready(tenant.status != TenantStatus::Deprovisioning))
            .map(async |tenant: Tenant| {
                let deleting = Box::pin(tenant_of(context, &tenant));
                let done = tokio::time::timeout_at(until, deleting).await;
                let failed = match done {
                    Ok(Ok((documents, turns))) => return Some((documents, turns)),
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "no time was left".to_owned(),
                };
                tracing::error!(
                    alert = "retention_behind",
                    tenant.id = %tenant.tenant_id,
                    "What is past its retention is left for tomorrow: {failed}"
                );
                None
            })
            .buffer_unordered(AT_ONCE);
        while let Some(done) = looked.next().await {
            all.tenants += 1;
            match done {
                Some((documents, turns)) => {
                    all.documents += documents;
                    all.turns += turns;
                }
                None => all.left += 1,
            }
        }
        after = next;
        if after.is_none() {
            break;
        }
    }
    let Retained { tenants, documents, turns, left } = all;
    tracing::info!(tenants, documents, turns, left, "Retention looked after");
    Ok(all)
}

/// Deletes one tenant's: how many documents and turns.
async fn tenant_of(context: &Context, tenant: &Tenant) -> Result<(u64, u64), Failed> {
    let expired = context.bookkeeper.expired(tenant, context.clock.now());
    // The passages first, as where a document is deleted: a crash in between leaves a document without
    // passages, which goes tomorrow, never passages that nothing names.
    context.cells.delete_expired(&expired, &context.vector_root_key, &tenant.cell).await?;
    let (mut documents, mut from) = (0, Some(Onward::default()));
    while let Some(place) = from {
        let (page, next) = context.items.expired_documents(&expired, place).await?;
        let mut page = page.into_iter().peekable();
        while page.peek().is_some() {
            let some = page.by_ref().take(MOST_NAMED).collect();
            let deleted = context.items.delete_expired_documents(&expired, some).await?;
            documents += deleted.len() as u64;
            note(context, &expired, deleted).await?;
        }
        from = next;
    }
    let (mut turns, mut from) = (0, Some(Onward::default()));
    while let Some(place) = from {
        let (deleted, next) = context.items.delete_expired_turns(&expired, place).await?;
        turns += deleted;
        from = next;
    }
    Ok((documents, turns))
}

async fn note(context: &Context, expired: &Expired, documents: Vec<DocumentId>) -> Result<(), StoreError> {
    if documents.is_empty() {
        return Ok(());
    }
    let request = RequestId::from(REQUEST.to_owned());
    let record = Record::expired(expired, documents, request, context.clock.now());
    context.books.ledger().note(&record).await
}
