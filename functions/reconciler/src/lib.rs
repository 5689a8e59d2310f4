//! Keeping the books straight, on a schedule: what nobody settled is collected, and ledger, bill and
//! meter are held against one another. A difference is an alarm, and is never repaired here.

mod compare;

use std::time::Duration;

use lambda_runtime::Error;
use serde::{Deserialize, Serialize};
use shared::aws::usage::UsageStore;
use shared::aws::{self, StoreError};
use shared::clock::Clock;
use shared::env;
use shared::gate::Books;
use shared::meter::BillingMonth;
use shared::scope::{Bookkeeper, Subject};
use shared::tenant::TenantId;

use compare::{Reading, Verdict};

/// How often a tenant at work is looked at until it holds still.
const LOOKS: u32 = 5;
/// How long in between: the bill follows the ledger within about a second.
const BETWEEN: Duration = Duration::from_secs(2);

/// What the function works with.
#[derive(Debug)]
pub struct Context {
    books: Books,
    usage: UsageStore,
    bookkeeper: Bookkeeper,
    clock: Clock,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config().await;
        #[expect(clippy::disallowed_methods, reason = "schedules drive this function")]
        let bookkeeper = Bookkeeper::driven_by_events();
        let clock = Clock::system();
        Ok(Self {
            books: Books::from_env(&config, clock.clone())?,
            usage: UsageStore::new(&config, env::text("USAGE_TABLE")?),
            bookkeeper,
            clock,
        })
    }
}

/// What is to be done: the input of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub enum Job {
    /// Collect expired leases.
    Collect,
    /// Hold ledger, bill and meter against one another.
    Verify,
}

/// What was done and found.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Tenants looked at.
    pub tenants: u64,
    /// Leases collected.
    pub collected: usize,
    /// Tenants whose books agree.
    pub agree: u64,
    /// Tenants that never held still; they are looked at again the next time.
    pub at_work: u64,
    /// Tenants whose books differ, and where.
    pub differences: Vec<Difference>,
}

/// A difference between books that must agree.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The tenant.
    pub tenant_id: TenantId,
    /// What differs.
    pub what: String,
}

/// Does one job for all tenants.
///
/// # Errors
/// If a store does not answer; what was done until then stays done, and the schedule comes again.
pub async fn handle(context: &Context, job: Job) -> Result<Report, Error> {
    let mut report = Report::default();
    let mut after = None;
    loop {
        let (meters, next) = context.books.meters().page(&context.bookkeeper, after).await?;
        for (tenant, meter) in meters {
            report.tenants += 1;
            let ward = context.bookkeeper.of(tenant);
            match job {
                Job::Collect if meter.leases.is_empty() => {}
                Job::Collect => report.collected += context.books.collect(&ward, meter).await?,
                Job::Verify => match verify(context, &ward).await? {
                    Verdict::Agree => report.agree += 1,
                    Verdict::AtWork => report.at_work += 1,
                    Verdict::Behind(what) | Verdict::Differ(what) => {
                        let tenant_id = ward.tenant_id().clone();
                        tracing::error!(alert = "books_differ", tenant.id = %tenant_id, "{what}");
                        report.differences.push(Difference { tenant_id, what });
                    }
                },
            }
        }
        after = next;
        if after.is_none() {
            break;
        }
    }
    tracing::info!(
        job = ?job,
        tenants = report.tenants,
        collected = report.collected,
        at_work = report.at_work,
        differences = report.differences.len(),
        "Books looked after"
    );
    Ok(report)
}

/// Looks at one tenant's books until they hold still.
async fn verify(context: &Context, ward: &impl Subject) -> Result<Verdict, StoreError> {
    let this = BillingMonth::of(context.clock.now().as_seconds());
    let months = [this.previous(), this];
    let mut last = Verdict::AtWork;
    for look in 0..LOOKS {
        if look > 0 {
            tokio::time::sleep(BETWEEN).await;
        }
        last = Box::pin(read(context, ward, months)).await?.judge();
        if !matches!(last, Verdict::AtWork | Verdict::Behind(_)) {
            break;
        }
    }
    Ok(last)
}

/// Reads a tenant's books: the meter and the bill before and after the ledger, so that it shows whether
/// anything moved in between.
async fn read(
    context: &Context,
    ward: &impl Subject,
    months: [BillingMonth; 2],
) -> Result<Reading, StoreError> {
    let bill = async || {
        let (mut last, this) =
            tokio::try_join!(context.usage.month(ward, months[0]), context.usage.month(ward, months[1]))?;
        last.0.extend(this.0);
        Ok::<_, StoreError>(last)
    };
    let (meter_before, bill_before) = tokio::try_join!(context.books.meters().read(ward), bill())?;
    let mut reading = Reading::new(months, meter_before, bill_before);
    let mut after = None;
    loop {
        let (records, next) = context.books.ledger().tickets(ward, after).await?;
        // Tickets are given in the order of their months.
        let done = records.iter().any(|record| record.month < months[0]);
        records.iter().for_each(|record| reading.take(record));
        after = next;
        if done || after.is_none() {
            break;
        }
    }
    let (meter_after, bill_after) = tokio::try_join!(context.books.meters().read(ward), bill())?;
    Ok(reading.end(meter_after, bill_after))
}
