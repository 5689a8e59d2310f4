//! Takes the ledger's records into the audit log: objects of a bucket that nothing can change, chained
//! by hash; and adds them to their tenants' bills.
//!
//! The ledger's stream says which records are new; a schedule finds those whose news was lost. Either
//! way a record is taken in once, as [`shared::aws::chains`] explains.

mod export;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use aws_lambda_events::dynamodb::{Event, EventRecord};
use aws_lambda_events::streams::{DynamoDbBatchItemFailure, DynamoDbEventResponse};
use futures_util::StreamExt;
use lambda_runtime::Error;
use serde::{Deserialize, Serialize};
use shared::aws::audit_objects::AuditObjects;
use shared::aws::chains::Chains;
use shared::aws::ledger::Ledger;
use shared::aws::{self, StoreError};
use shared::clock::Clock;
use shared::item_key::{PARTITION, SORT};
use shared::metrics::{Line, Metric};
use shared::scope::{Bookkeeper, Subject};
use shared::tenant::TenantId;
use shared::{env, telemetry};

/// A record that has waited so long, in milliseconds, is not on its way any more: 10 minutes.
const OVERDUE_MS: i64 = 600_000;
/// Tenants whose records are exported at a time.
const TENANTS_AT_A_TIME: usize = 8;

/// What the function works with.
#[derive(Debug)]
pub struct Context {
    ledger: Ledger,
    chains: Chains,
    objects: AuditObjects,
    retention_days: u32,
    bookkeeper: Bookkeeper,
    clock: Clock,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config()?;
        let access = aws::Access::own(&config);
        #[expect(clippy::disallowed_methods, reason = "the table's stream drives this function")]
        let bookkeeper = Bookkeeper::driven_by_events();
        let ledger = Ledger::new(&access, env::table("AUDIT_TABLE")?);
        Ok(Self {
            chains: Chains::new(&access, env::table("USAGE_TABLE")?, ledger.clone()),
            ledger,
            objects: AuditObjects::new(&access, env::bucket("AUDIT_BUCKET")?),
            retention_days: env::parsed("AUDIT_RETENTION_DAYS")?,
            bookkeeper,
            clock: Clock::system(),
        })
    }
}

/// What the function is called with.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Call {
    /// By its schedule.
    Job {
        /// What to do.
        job: Job,
    },
    /// By the ledger's stream.
    Stream(Event),
}

/// What the schedule asks for.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Job {
    /// Export what the stream should have brought long ago. A stream forgets after 24 hours.
    CatchUp,
}

/// What is answered.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// To the schedule.
    Report(Report),
    /// To the stream: what has to be delivered again.
    Stream(DynamoDbEventResponse),
}

/// What was caught up on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Records that were overdue.
    pub overdue: usize,
    /// How many of them are exported now.
    pub exported: usize,
}

/// Does what is asked.
///
/// # Errors
/// If a store does not answer; what was exported until then stays so.
pub async fn handle(context: &Context, call: Call) -> Result<Answer, Error> {
    Ok(match call {
        Call::Job { job: Job::CatchUp } => Answer::Report(catch_up(context).await?),
        Call::Stream(event) => Answer::Stream(stream(context, event).await),
    })
}

/// Records of one tenant to export.
#[derive(Default)]
struct Batch {
    sorts: Vec<String>,
    /// Where the first of them stands in what the stream delivered.
    first: usize,
}

/// Exports what the stream delivered. What could not be exported is reported, and comes again.
async fn stream(context: &Context, event: Event) -> DynamoDbEventResponse {
    let mut tenants: BTreeMap<TenantId, Batch> = BTreeMap::new();
    let mut failed: Vec<usize> = Vec::new();
    let places: Vec<Option<String>> =
        event.records.iter().map(|record| record.change.sequence_number.clone()).collect();
    for (place, record) in event.records.into_iter().enumerate().filter(|(_, r)| r.event_name == "INSERT") {
        match key(record) {
            Some((tenant, sort)) => {
                let batch = tenants.entry(tenant).or_default();
                if batch.sorts.is_empty() {
                    batch.first = place;
                }
                batch.sorts.push(sort);
            }
            None => {
                tracing::error!(alert = "poison_record", "A record of the stream has no key of the ledger");
                failed.push(place);
            }
        }
    }
    let lag_ms = AtomicU64::new(0);
    failed.extend(export_all(context, tenants, &lag_ms).await.into_iter().map(|batch| batch.first));
    let line = Line::new("Records exported", context.clock.now())
        .with("records", places.len())
        .with("failed_batches", failed.len());
    // Where none was exported, none was waited for.
    telemetry::emit(match lag_ms.into_inner() {
        0 => line,
        lag_ms => line.measure(Metric::ExportLag, lag_ms),
    });
    // Lambda delivers again from the lowest of them on; what is after it and was exported is passed over.
    let mut response = DynamoDbEventResponse::default();
    if let Some(lowest) = failed.into_iter().min() {
        let mut failure = DynamoDbBatchItemFailure::default();
        failure.item_identifier = places.into_iter().nth(lowest).flatten();
        response.batch_item_failures = vec![failure];
    }
    response
}

/// The key of the ledger's item that an event is about.
fn key(record: EventRecord) -> Option<(TenantId, String)> {
    #[derive(Deserialize)]
    struct Key {
        #[serde(rename = "tenant_id")]
        tenant: TenantId,
        #[serde(rename = "sk")]
        sort: String,
    }
    const _: () = assert!(PARTITION.len() == "tenant_id".len() && SORT.len() == "sk".len());
    let key: Key = serde_dynamo::from_item(record.change.keys).ok()?;
    Some((key.tenant, key.sort))
}

/// Exports batches, and returns those that failed.
async fn export_all(context: &Context, tenants: BTreeMap<TenantId, Batch>, lag_ms: &AtomicU64) -> Vec<Batch> {
    let exports = tenants.into_iter().map(async |(tenant, batch)| {
        let ward = context.bookkeeper.of(tenant);
        let exported = Box::pin(export::run(context, &ward, &batch.sorts, lag_ms)).await;
        exported.map_err(|error| {
            let tenant = ward.tenant_id();
            tracing::error!(tenant.id = %tenant, "Records could not be exported yet: {error}");
            batch
        })
    });
    futures_util::stream::iter(exports)
        .buffer_unordered(TENANTS_AT_A_TIME)
        .filter_map(async |exported| exported.err())
        .collect()
        .await
}

/// Exports what has waited too long.
async fn catch_up(context: &Context) -> Result<Report, StoreError> {
    let before = context.clock.now().plus_millis(-OVERDUE_MS);
    let (mut report, mut after) = (Report::default(), None);
    let now = context.clock.now();
    let lag_ms = AtomicU64::new(0);
    loop {
        let (overdue, next) = context.ledger.overdue(&context.bookkeeper, before, after).await?;
        if let Some(oldest) = overdue.iter().map(|record| record.since).min() {
            // Also of what cannot be exported now either.
            lag_ms.fetch_max(now.millis_since(oldest), Ordering::Relaxed);
            tracing::error!(
                alert = "export_behind",
                records = overdue.len(),
                oldest = %oldest,
                "Records of the ledger have waited too long for the audit log"
            );
        }
        let mut tenants: BTreeMap<TenantId, Batch> = BTreeMap::new();
        report.overdue += overdue.len();
        for record in overdue {
            tenants.entry(record.tenant_id).or_default().sorts.push(record.sort);
        }
        let failed = export_all(context, tenants, &lag_ms).await;
        report.exported = report.overdue - failed.iter().map(|batch| batch.sorts.len()).sum::<usize>();
        after = next;
        if after.is_none() {
            break;
        }
    }
    // Also that nothing waits: who never says anything may not run.
    telemetry::emit(
        Line::new("Caught up", context.clock.now())
            .with("overdue", report.overdue)
            .with("exported", report.exported)
            .measure(Metric::ExportLag, lag_ms.into_inner()),
    );
    Ok(report)
}
