//! Keeping the books straight, on a schedule: what nobody settled is collected, and ledger, bill and
//! meter are held against one another. A difference is an alarm, and is never repaired here.

mod compare;

use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use lambda_runtime::Error;
use serde::{Deserialize, Serialize};
use shared::aws::usage::UsageStore;
use shared::aws::{self, StoreError};
use shared::clock::{Clock, Timestamp};
use shared::gate::Books;
use shared::meter::{BillingMonth, Meter};
use shared::metrics::{Line, Metric};
use shared::scope::{Bookkeeper, Subject};
use shared::tenant::TenantId;
use shared::{env, telemetry};

use compare::{Reading, Verdict};

/// How often a tenant at work is looked at, in the hope that it rests for a moment.
const LOOKS: u32 = 3;
/// How long in between: the bill follows the ledger within about a second.
const BETWEEN: Duration = Duration::from_secs(1);
/// Tenants looked after at the same time.
const AT_ONCE: usize = 32;
/// What is kept of the function's time, to list the tenants that are left and to report.
const MARGIN: Duration = Duration::from_secs(60);

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
        let config = aws::config()?;
        let access = aws::Access::own(&config);
        #[expect(clippy::disallowed_methods, reason = "schedules drive this function")]
        let bookkeeper = Bookkeeper::driven_by_events();
        let clock = Clock::system();
        Ok(Self {
            books: Books::from_env(&access, clock.clone())?,
            usage: UsageStore::new(&access, env::table("USAGE_TABLE")?),
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

impl Job {
    const fn name(self) -> &'static str {
        match self {
            Self::Collect => "collect",
            Self::Verify => "verify",
        }
    }
}

/// What was done and found.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Tenants there are.
    pub tenants: u64,
    /// Leases that were open when the tenants were listed.
    pub open: u64,
    /// Leases collected.
    pub collected: usize,
    /// Tenants whose books agree.
    pub agree: u64,
    /// Tenants that never held still: nothing is wrong as far as it can be seen meanwhile.
    pub at_work: u64,
    /// Tenants whose books differ, and where.
    pub differences: Vec<Difference>,
    /// Tenants whose books could not be read. Each is an alarm.
    pub unread: u64,
    /// Tenants for whom there was no time. It is an alarm.
    pub unchecked: u64,
}

/// A difference between books that must agree.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The tenant.
    pub tenant_id: TenantId,
    /// What differs.
    pub what: String,
}

/// What became of one tenant.
enum Done {
    Collected(usize),
    Verified(Verdict),
    /// It was deleted since the list was made.
    Gone,
    Unread,
    Unchecked,
}

/// Does one job for all tenants, and stops in time before `deadline`. What cannot be done for one tenant
/// hinders no other.
///
/// # Errors
/// If the tenants cannot be listed; what was done until then stays done, and the schedule comes again.
pub async fn handle(context: &Context, job: Job, deadline: Timestamp) -> Result<Report, Error> {
    let left = deadline.as_millis().saturating_sub(context.clock.now().as_millis());
    let left = Duration::from_millis(u64::try_from(left).unwrap_or(0)).saturating_sub(MARGIN);
    let until = tokio::time::Instant::now() + left;
    let mut report = Report::default();
    let mut after = None;
    loop {
        let page = context.books.meters().page(&context.bookkeeper, after).await?;
        let leases =
            page.meters.iter().filter_map(|(_, meter)| Some(meter.as_ref().ok()?.leases.len() as u64));
        report.open += leases.sum::<u64>();
        let mut tenants = stream::iter(page.meters)
            .map(async |(tenant, meter)| {
                let looking = Box::pin(look_after(context, job, &tenant, meter));
                let done = tokio::time::timeout_at(until, looking).await.unwrap_or(Done::Unchecked);
                (tenant, done)
            })
            .buffer_unordered(AT_ONCE);
        while let Some((tenant_id, done)) = tenants.next().await {
            report.tenants += 1;
            match done {
                Done::Collected(leases) => report.collected += leases,
                Done::Verified(Verdict::Agree) => report.agree += 1,
                Done::Verified(Verdict::AtWork) => report.at_work += 1,
                Done::Verified(Verdict::Differ(what)) => {
                    report.differences.push(Difference { tenant_id, what });
                }
                Done::Gone => report.tenants -= 1,
                Done::Unread => report.unread += 1,
                Done::Unchecked => report.unchecked += 1,
            }
        }
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    if report.unchecked > 0 {
        let Report { tenants, unchecked, .. } = report;
        tracing::error!(
            alert = "books_unchecked",
            ?job,
            "No time was left for {unchecked} of {tenants} tenants"
        );
    }
    let line = Line::new("Books looked after", context.clock.now())
        .with("job", job.name())
        .with("tenants", report.tenants)
        .with("at_work", report.at_work)
        .with("differences", report.differences.len())
        .with("unread", report.unread);
    telemetry::emit(match job {
        Job::Collect => line
            .measure(Metric::OpenTickets, report.open.saturating_sub(report.collected as u64))
            .measure(Metric::AbortedTickets, report.collected as u64),
        Job::Verify => line,
    });
    Ok(report)
}

/// Does the job for one tenant.
async fn look_after(
    context: &Context,
    job: Job,
    tenant_id: &TenantId,
    meter: Result<Meter, StoreError>,
) -> Done {
    let ward = context.bookkeeper.of(tenant_id.clone());
    let done = async {
        let meter = meter?;
        match job {
            Job::Collect if meter.leases.is_empty() => Ok(Done::Collected(0)),
            Job::Collect => context.books.collect(&ward, meter).await.map(Done::Collected),
            Job::Verify => verify(context, &ward).await.map(Done::Verified),
        }
    };
    match done.await {
        Ok(done) => {
            if let Done::Verified(Verdict::Differ(what)) = &done {
                tracing::error!(alert = "books_differ", tenant.id = %tenant_id, "{what}");
            }
            done
        }
        Err(StoreError::Missing { .. }) if is_gone(context, &ward).await => Done::Gone,
        // A minute later it is tried again.
        Err(error) if job == Job::Collect && error.passes() => {
            tracing::warn!(tenant.id = %tenant_id, "Leases are left for the next time: {error}");
            Done::Unread
        }
        Err(error) => {
            tracing::error!(
                alert = "books_unread",
                tenant.id = %tenant_id,
                error = &error as &dyn std::error::Error,
                "The books cannot be read"
            );
            Done::Unread
        }
    }
}

/// Whether the meter that was listed is not there any more: its tenant was deleted.
async fn is_gone(context: &Context, ward: &impl Subject) -> bool {
    matches!(context.books.meters().read(ward).await, Err(StoreError::Missing { .. }))
}

/// Looks at one tenant's books, and again if the tenant was at work and looking is cheap.
async fn verify(context: &Context, ward: &impl Subject) -> Result<Verdict, StoreError> {
    let mut looks = 0;
    loop {
        let (verdict, cheap) = Box::pin(read(context, ward)).await?;
        looks += 1;
        if verdict != Verdict::AtWork || !cheap || looks == LOOKS {
            return Ok(verdict);
        }
        tokio::time::sleep(BETWEEN).await;
    }
}

/// Reads a tenant's books and judges them; also says whether that took one page of the ledger.
async fn read(context: &Context, ward: &impl Subject) -> Result<(Verdict, bool), StoreError> {
    let now = context.clock.now();
    let this = BillingMonth::of(now.as_seconds());
    let months = [this.previous(), this];
    let standing = async || {
        let (meter, mut bill, this) = tokio::try_join!(
            context.books.meters().read(ward),
            context.usage.month(ward, months[0]),
            context.usage.month(ward, months[1])
        )?;
        bill.0.extend(this.0);
        Ok::<_, StoreError>((meter, bill))
    };
    let mut reading = Reading::new(months, now, Box::pin(standing()).await?);
    let (mut after, mut pages) = (None, 0);
    loop {
        let (records, next) = context.books.ledger().tickets(ward, after).await?;
        pages += 1;
        records.iter().for_each(|record| reading.take(record));
        after = next;
        if after.is_none() || reading.is_done_with(&records) {
            break;
        }
    }
    Ok((reading.judge(&Box::pin(standing()).await?), pages == 1))
}
