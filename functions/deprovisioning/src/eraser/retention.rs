//! What is past its retention: no reader is shown it any more, and once a day it is deleted. It counts from
//! the tenant's limit as it is then, so that a lowered one applies to what was written before.

use futures_util::StreamExt;
use lambda_runtime::Error;
use serde::Serialize;
use shared::aws::StoreError;
use shared::aws::erasure::{MOST_AT_ONCE, Onward};
use shared::aws::tenants::TenantPlace;
use shared::ids::DocumentId;
use shared::ledger::Record;
use shared::random::entropy;
use shared::scope::{Expired, RequestId};
use shared::tenant::{Tenant, TenantStatus};
use shared::vectors::VectorError;
use tokio::time::Instant;

use super::{AT_ONCE, Context};

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

/// Deletes what is past its retention, of every tenant. It begins somewhere among them, so that when time is
/// up it is not the same ones every day for whom there was none.
pub(super) async fn run(context: &Context, until: Instant) -> Result<Retained, Error> {
    let mut all = Retained::default();
    let (mut after, mut first, mut again) = (Some(TenantPlace::anywhere(&mut entropy())), None, false);
    loop {
        let (tenants, next) = context.tenants.page(&context.bookkeeper, after).await?;
        // From the beginning, as far as where it began.
        let ends = tenants.iter().position(|tenant| again && Some(&tenant.tenant_id) == first.as_ref());
        first = first.or_else(|| tenants.first().map(|tenant| tenant.tenant_id.clone()));
        let mut looked = futures_util::stream::iter(tenants.into_iter().take(ends.unwrap_or(usize::MAX)))
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
        if ends.is_some() || (after.is_none() && again) {
            break;
        }
        again |= after.is_none();
    }
    let Retained { tenants, documents, turns, left } = all;
    tracing::info!(tenants, documents, turns, left, "Retention looked after");
    Ok(all)
}

/// Deletes one tenant's: how many documents and turns.
async fn tenant_of(context: &Context, tenant: &Tenant) -> Result<(u64, u64), Failed> {
    let expired = context.bookkeeper.expired(tenant, context.clock.now());
    // What fails for the documents keeps no turn.
    let (documents, turns) = tokio::join!(documents(context, &expired, tenant), turns(context, &expired));
    Ok((documents?, turns?))
}

async fn documents(context: &Context, expired: &Expired, tenant: &Tenant) -> Result<u64, Failed> {
    // The passages first, as where a document is deleted: a crash in between leaves a document without
    // passages, which goes tomorrow, never passages that nothing names.
    context.cells.delete_expired(expired, &context.vector_root_key, &tenant.cell).await?;
    let (mut documents, mut from) = (0, Some(Onward::default()));
    while let Some(place) = from {
        let (page, next) = context.items.expired_documents(expired, place).await?;
        for some in page.chunks(MOST_AT_ONCE) {
            if delete(context, expired, some).await? {
                documents += some.len() as u64;
                continue;
            }
            // One of them is gone or was stored anew: the others still go.
            for one in some {
                documents += u64::from(delete(context, expired, std::slice::from_ref(one)).await?);
            }
        }
        from = next;
    }
    Ok(documents)
}

/// Deletes documents, and says so on record: both or neither.
async fn delete(context: &Context, expired: &Expired, some: &[DocumentId]) -> Result<bool, StoreError> {
    let request = RequestId::from(REQUEST.to_owned());
    let record = Record::expired(expired, some.to_vec(), request, context.clock.now());
    let noted = (context.books.ledger(), &record);
    context.items.delete_expired_documents(expired, some, noted).await
}

async fn turns(context: &Context, expired: &Expired) -> Result<u64, Failed> {
    let (mut turns, mut from) = (0, Some(Onward::default()));
    while let Some(place) = from {
        let (deleted, next) = context.items.delete_expired_turns(expired, place).await?;
        turns += deleted;
        from = next;
    }
    // The conversations after their turns: what is left by a crash goes tomorrow.
    let mut from = Some(Onward::default());
    while let Some(place) = from {
        from = context.items.delete_expired_conversations(expired, place).await?.1;
    }
    let mut from = Some(Onward::default());
    while let Some(place) = from {
        from = context.items.delete_expired_answers(expired, place).await?.1;
    }
    Ok(turns)
}
