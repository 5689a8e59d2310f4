//! The ledger's stream: each record is added to its tenant's bill, exactly once.
//!
//! The stream delivers at least once and, for one tenant, in order. How far a tenant's records have
//! been added is kept in the same transaction as the sums, so a record that comes again adds nothing.

use std::collections::BTreeMap;

use aws_lambda_events::dynamodb::{Event, EventRecord};
use aws_lambda_events::streams::{DynamoDbBatchItemFailure, DynamoDbEventResponse};
use lambda_runtime::Error;
use shared::aws::usage::{MOST_LINES, UsageStore};
use shared::aws::{self, StoreError};
use shared::env;
use shared::ledger::Record;
use shared::scope::{Bookkeeper, Subject, Ward};
use shared::tenant::TenantId;
use shared::usage::{Bill, SequenceNumber};

/// How often a tenant's additions are tried against another that adds for the same tenant.
const ATTEMPTS: u32 = 5;

/// What the function works with.
#[derive(Debug)]
pub struct Context {
    usage: UsageStore,
    bookkeeper: Bookkeeper,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config().await;
        #[expect(clippy::disallowed_methods, reason = "the table's stream drives this function")]
        let bookkeeper = Bookkeeper::driven_by_events();
        Ok(Self { usage: UsageStore::new(&config, env::text("USAGE_TABLE")?), bookkeeper })
    }
}

/// A record and its place in the stream.
struct Placed {
    place: SequenceNumber,
    record: Record,
}

/// Adds a batch to the bills. What could not be added is reported, and comes again.
pub async fn handle(context: &Context, event: Event) -> DynamoDbEventResponse {
    let mut tenants: BTreeMap<TenantId, Vec<Placed>> = BTreeMap::new();
    let mut failed: Vec<SequenceNumber> = Vec::new();
    let mut response = DynamoDbEventResponse::default();
    for record in event.records {
        match read(record) {
            Ok(Some(placed)) => tenants.entry(placed.record.tenant_id.clone()).or_default().push(placed),
            Ok(None) => {}
            Err(place) => failed.extend(place),
        }
    }
    for (tenant, records) in tenants {
        let ward = context.bookkeeper.of(tenant);
        if let Err(error) = add(context, &ward, &records).await {
            tracing::error!(tenant.id = %ward.tenant_id(), "Records could not be added up yet: {error}");
            failed.extend(records.into_iter().next().map(|first| first.place));
        }
    }
    // Lambda delivers again from the lowest of them on; what is after it and was added is passed over.
    if let Some(lowest) = failed.into_iter().min() {
        let mut failure = DynamoDbBatchItemFailure::default();
        failure.item_identifier = Some(lowest.to_string());
        response.batch_item_failures = vec![failure];
    }
    response
}

/// The ledger's record in an event; nothing if the event is of another kind. An item that does not
/// parse is never passed over: it is reported by its place.
fn read(event: EventRecord) -> Result<Option<Placed>, Option<SequenceNumber>> {
    if event.event_name != "INSERT" {
        return Ok(None);
    }
    let place = event.change.sequence_number.as_deref().and_then(SequenceNumber::parse);
    match (serde_dynamo::from_item::<_, Record>(event.change.new_image), place) {
        (Ok(record), Some(place)) => Ok(Some(Placed { place, record })),
        (Ok(_), None) => {
            tracing::error!(alert = "poison_record", "A record of the stream has no place");
            Err(None)
        }
        (Err(error), place) => {
            tracing::error!(alert = "poison_record", "A record of the stream does not parse: {error}");
            Err(place)
        }
    }
}

async fn add(context: &Context, ward: &Ward, records: &[Placed]) -> Result<(), StoreError> {
    let mut attempt = 0;
    loop {
        let from = context.usage.checkpoint(ward).await?;
        let mut bill = Bill::default();
        let mut through = None;
        for Placed { place, record } in records.iter().filter(|r| from.as_ref().is_none_or(|f| r.place > *f))
        {
            bill.add(record);
            through = Some(place);
            if bill.0.len() >= MOST_LINES {
                break;
            }
        }
        let Some(through) = through else { return Ok(()) };
        match context.usage.add(ward, &bill, from.as_ref(), through).await {
            Ok(()) if records.last().is_none_or(|last| last.place <= *through) => return Ok(()),
            Ok(()) => {}
            Err(StoreError::Conflict) if attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(error),
        }
    }
}
