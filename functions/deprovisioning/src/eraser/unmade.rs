//! Uploads that nobody awaits any more: their links have ended, and the queue has given them up. Once an hour they
//! are forgotten, and so are the documents that were to come of them.

use futures_util::StreamExt;
use lambda_runtime::Error;
use serde::Serialize;
use shared::aws::StoreError;
use shared::aws::audit_objects::ObjectError;
use shared::ledger::Record;
use shared::scope::{Expired, RequestId};
use shared::tenant::{Tenant, TenantStatus};
use shared::upload::Upload;
use tokio::time::Instant;

use super::{AT_ONCE, Context};

/// What the records of such deletions say where others name a request.
const REQUEST: &str = "uploads";
/// What a document is told whose file came.
const UNREAD: &str = "the file could not be read in time; upload it again";

/// What was forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unmade {
    /// Uploads whose files never came.
    pub unmade: u64,
    /// Uploads whose files came and were never read.
    pub unread: u64,
    /// Tenants for whom something failed, or there was no time. The next hour has it again.
    pub left: u64,
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Bucket(#[from] ObjectError),
}

/// Looks after the uploads of every tenant.
pub(super) async fn run(context: &Context, until: Instant) -> Result<Unmade, Error> {
    let (mut all, mut after) = (Unmade::default(), None);
    loop {
        let (tenants, next) = context.tenants.page(&context.bookkeeper, after).await?;
        let mut looked = futures_util::stream::iter(tenants)
            .filter(|tenant| std::future::ready(tenant.status != TenantStatus::Deprovisioning))
            .map(async |tenant: Tenant| {
                let looking = Box::pin(tenant_of(context, &tenant));
                let failed = match tokio::time::timeout_at(until, looking).await {
                    Ok(Ok(done)) => return done,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "no time was left".to_owned(),
                };
                tracing::warn!(tenant.id = %tenant.tenant_id, "Uploads are left for the next hour: {failed}");
                Unmade { left: 1, ..Unmade::default() }
            })
            .buffer_unordered(AT_ONCE);
        while let Some(done) = looked.next().await {
            all.unmade += done.unmade;
            all.unread += done.unread;
            all.left += done.left;
        }
        after = next;
        if after.is_none() {
            break;
        }
    }
    let Unmade { unmade, unread, left } = all;
    tracing::info!(unmade, unread, left, "Uploads looked after");
    Ok(all)
}

async fn tenant_of(context: &Context, tenant: &Tenant) -> Result<Unmade, Failed> {
    let now = context.clock.now();
    let expired = context.bookkeeper.expired(tenant, now);
    let (mut done, mut after) = (Unmade::default(), None);
    loop {
        let (uploads, next) = context.upload_records.overdue(&expired, after, now).await?;
        for upload in &uploads {
            if forget(context, &expired, upload).await? {
                done.unread += 1;
            } else {
                done.unmade += 1;
            }
        }
        after = next;
        if after.is_none() {
            return Ok(done);
        }
    }
}

/// Forgets one, and says whether its file had come. The record goes last, so that what a crash leaves is found again.
async fn forget(context: &Context, expired: &Expired, upload: &Upload) -> Result<bool, Failed> {
    let came = context.uploads.expire(expired, &upload.place()).await? || upload.attempts > 0;
    if came {
        if context.items.fail_unread(expired, upload, UNREAD).await? {
            tracing::error!(
                alert = "upload_unread",
                tenant.id = %upload.tenant_id,
                document.id = %upload.document_id,
                "A file that was uploaded was never read"
            );
        }
    } else {
        let request = RequestId::from(REQUEST.to_owned());
        let record = Record::expired(expired, vec![upload.document_id.clone()], request, context.clock.now());
        context.items.delete_unmade(expired, upload, (context.books.ledger(), &record)).await?;
    }
    context.upload_records.expire(expired, &upload.upload_id).await?;
    Ok(came)
}
