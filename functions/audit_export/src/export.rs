//! Exports one tenant's records, object by object.

use std::sync::atomic::{AtomicU64, Ordering};

use shared::audit_log::{self, Head, Object, ObjectHash, Unreadable, WireRecord};
use shared::aws::StoreError;
use shared::aws::audit_objects::ObjectError;
use shared::aws::chains::{Growth, Intent, MOST_PARTS};
use shared::clock::Timestamp;
use shared::ledger::Record;
use shared::scope::{Subject, Ward};
use shared::usage::Bill;

use crate::Context;

/// The most records that are looked at together.
const MOST_READ: usize = 90;
/// The most bytes that an object's records may have, before they are packed; but always one record.
const MOST_BYTES: usize = 4 << 20;
/// How often an object is tried against others who export for the same tenant.
const ATTEMPTS: u32 = 8;
/// How long the ledger's table keeps a record that is in the audit log, in days: the months that the
/// books are compared in, and some more.
const KEPT_DAYS: u32 = 100;
const HOUR_MS: i64 = 3_600_000;

/// Why records could not be exported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The object that is there is not the one that was intended.
    #[error("object {key} is not the one that follows: {problem}")]
    Stranger { key: String, problem: String },
    #[error("an object cannot be packed: {0}")]
    Pack(#[from] std::io::Error),
    /// A record of the ledger does not parse. The others are exported.
    #[error("record {sort} of the ledger does not parse")]
    Poison { sort: String },
    #[error("others export for the same tenant all the time")]
    Contended,
}

/// Exports those of a tenant's records that wait for it. `lag_ms` is raised to how long any of them has
/// waited, whatever becomes of the others.
pub(crate) async fn run(
    context: &Context,
    ward: &Ward,
    sorts: &[String],
    lag_ms: &AtomicU64,
) -> Result<(), ExportError> {
    let mut poison = None;
    for sorts in sorts.chunks(MOST_READ) {
        let mut attempts = 0;
        loop {
            // In this order: what waits after the log's end was read, and is intended before that end
            // has moved, is in no object.
            let chain = context.chains.read(ward).await?;
            if let Some(intent) = chain.intent {
                // Somebody stopped here, or is at it. Either way it can be done.
                match complete(context, ward, &chain.head, &intent, None, lag_ms).await {
                    Err(ExportError::Store(StoreError::Conflict)) => {}
                    completed => completed?,
                }
                attempts += 1;
                if attempts > ATTEMPTS {
                    return Err(ExportError::Contended);
                }
                continue;
            }
            let mut waiting = Vec::new();
            for (sort, record) in context.ledger.pending_of(ward, sorts).await? {
                match record {
                    Ok(record) => waiting.push((sort, record)),
                    Err(error) => {
                        let tenant = ward.tenant_id();
                        tracing::error!(alert = "poison_record", tenant.id = %tenant, sort, "{error}");
                        poison = Some(sort);
                    }
                }
            }
            waiting.sort_by(|(sort, record), (other_sort, other)| {
                (record.time, sort).cmp(&(other.time, other_sort))
            });
            waiting.truncate(fitting(&waiting));
            if waiting.is_empty() {
                break;
            }
            let until = context.clock.now().plus_days(context.retention_days).as_seconds();
            let intent = Intent {
                records: waiting.iter().map(|(sort, _)| sort.clone()).collect(),
                retain_until: Timestamp::from_millis(until * 1_000),
            };
            let done = match context.chains.intend(ward, &chain.head, &intent).await {
                Ok(()) => complete(context, ward, &chain.head, &intent, Some(waiting), lag_ms).await,
                Err(error) => Err(error.into()),
            };
            match done {
                Ok(()) => attempts = 0,
                Err(ExportError::Store(StoreError::Conflict)) if attempts < ATTEMPTS => attempts += 1,
                Err(error) => return Err(error),
            }
        }
    }
    poison.map_or(Ok(()), |sort| Err(ExportError::Poison { sort }))
}

/// How many of these records one object takes: those of one hour, as many as one transaction can.
fn fitting(records: &[(String, Record)]) -> usize {
    let hour = |record: &Record| record.time.as_millis().div_euclid(HOUR_MS);
    let mut bill = Bill::default();
    let mut bytes = 0;
    records
        .iter()
        .enumerate()
        .take_while(|(place, (_, record))| {
            bill.add(record);
            bytes += record.chunks.iter().map(String::len).sum::<usize>() + record.documents.len() * 64;
            let same_hour = records.first().is_some_and(|(_, first)| hour(first) == hour(record));
            let fits = Growth::parts(place + 1, bill.0.len()) <= MOST_PARTS && bytes <= MOST_BYTES;
            same_hour && (fits || *place == 0)
        })
        .count()
}

/// Completes an intended object: stores it and takes it into the log. `records` are its records, unless
/// somebody else intended it.
async fn complete(
    context: &Context,
    ward: &Ward,
    before: &Head,
    intent: &Intent,
    records: Option<Vec<(String, Record)>>,
    lag_ms: &AtomicU64,
) -> Result<(), ExportError> {
    let resumed = records.is_none();
    let records = match records {
        Some(records) => records,
        None => intended(context, ward, intent).await?,
    };
    let mut bill = Bill::default();
    records.iter().for_each(|(_, record)| bill.add(record));
    let oldest = records.iter().map(|(_, record)| record.time).min();
    let wire: Vec<_> = records.into_iter().map(|(sort, record)| WireRecord::new(sort, record)).collect();
    let Object { key, bytes, head } = audit_log::object(before, wire, intent.retain_until)?;
    // Whoever stopped may have stored it; then what is there counts, whatever is put over it.
    let there = if resumed { context.objects.first(ward, &key).await? } else { None };
    let stored = there.is_none() && context.objects.put(ward, &key, bytes, intent.retain_until).await?;
    let after = if stored { head } else { adopted(context, ward, &key, before, intent).await? };
    // Before the log grows: it never ends where no file says so.
    context.objects.put_head(ward, &after, intent.retain_until).await?;
    let expires_at_s = context.clock.now().plus_days(KEPT_DAYS).as_seconds();
    let growth = Growth { before, intent, after: &after, bill: &bill, expires_at_s };
    context.chains.grow(ward, &growth).await?;
    if let Some(oldest) = oldest {
        lag_ms.fetch_max(context.clock.now().millis_since(oldest), Ordering::Relaxed);
    }
    tracing::info!(
        tenant.id = %ward.tenant_id(),
        object.key = key,
        object.number = after.objects,
        records = intent.records.len(),
        "Object stored"
    );
    Ok(())
}

/// The records of an object that somebody else intended, in its order.
async fn intended(
    context: &Context,
    ward: &Ward,
    intent: &Intent,
) -> Result<Vec<(String, Record)>, ExportError> {
    let mut found = std::collections::HashMap::new();
    for (sort, record) in context.ledger.pending_of(ward, &intent.records).await? {
        found.insert(sort, record?);
    }
    // If one does not wait any more, the object was taken into the log meanwhile.
    let records = intent.records.iter().map(|sort| Some((sort.clone(), found.remove(sort)?)));
    records.collect::<Option<_>>().ok_or(ExportError::Store(StoreError::Conflict))
}

/// Where the log ends after an object that is there already.
async fn adopted(
    context: &Context,
    ward: &Ward,
    key: &str,
    before: &Head,
    intent: &Intent,
) -> Result<Head, ExportError> {
    let stranger = |problem: String| {
        tracing::error!(alert = "chain_broken", tenant.id = %ward.tenant_id(), object.key = key, "{problem}");
        ExportError::Stranger { key: key.to_owned(), problem }
    };
    let first = context.objects.first(ward, key).await?;
    let first = first.ok_or_else(|| stranger("it is there and it is not".to_owned()))?;
    let bytes = context.objects.read(ward, &first).await?;
    let (lines, head) = audit_log::read(&bytes).map_err(|error: Unreadable| stranger(error.to_string()))?;
    let follows = lines.iter().zip(before.lines + 1..).all(|(line, position)| {
        line.position == position && line.object == before.objects + 1 && line.previous == before.last
    });
    let same = lines.iter().map(|line| &line.record.id).eq(&intent.records);
    if !follows || !same || head.last != ObjectHash::of(&bytes) {
        return Err(stranger("it holds something else than what was intended".to_owned()));
    }
    Ok(head)
}
