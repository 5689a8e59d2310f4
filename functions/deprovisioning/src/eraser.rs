//! What deletes: driven by a schedule and by the table that lists what is to be done, and by no request.

mod retention;
mod saga;
mod unmade;

use std::time::Duration;

use futures_util::StreamExt;
use lambda_runtime::Error;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use shared::aws::chains::Chains;
use shared::aws::deprovisionings::Deprovisionings;
use shared::aws::erasure::{Names, TenantItems};
use shared::aws::secrets::TenantSecrets;
use shared::aws::tenants::TenantStore;
use shared::aws::upload_records::UploadRecords;
use shared::aws::uploads::Uploads;
use shared::aws::{self, secrets};
use shared::clock::{Clock, Timestamp};
use shared::deprovisioning::DeprovisioningId;
use shared::gate::Books;
use shared::scope::Bookkeeper;
use shared::secret::Secret;
use shared::vectors::Cells;
use shared::{env, roots};
use tokio::time::Instant;

use retention::Retained;
use saga::Came;
use unmade::Unmade;

/// Tenants looked after at the same time.
const AT_ONCE: usize = 8;
/// What is kept of the function's time, to end what it is at.
const MARGIN: Duration = Duration::from_secs(30);

/// What the function works with.
pub struct Context {
    deprovisionings: Deprovisionings,
    tenants: TenantStore,
    items: TenantItems,
    books: Books,
    chains: Chains,
    uploads: Uploads,
    upload_records: UploadRecords,
    secrets: TenantSecrets,
    cells: Cells,
    vector_root_key: Secret,
    audit_retention_days: u32,
    authorizer_cache_s: u32,
    bookkeeper: Bookkeeper,
    clock: Clock,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable or secret is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let access = aws::Access::own(&aws::config()?);
        #[expect(clippy::disallowed_methods, reason = "a schedule and a table's stream drive this function")]
        let bookkeeper = Bookkeeper::driven_by_events();
        let clock = Clock::system();
        let names = Names {
            tenants: env::table("TENANTS_TABLE")?,
            meters: env::table("METERS_TABLE")?,
            conversations: env::table("CONVERSATIONS_TABLE")?,
            documents: env::table("DOCUMENTS_TABLE")?,
            webhooks: env::table("WEBHOOKS_TABLE")?,
            usage: env::table("USAGE_TABLE")?,
        };
        let books = Books::from_env(&access, clock.clone())?;
        Ok(Self {
            deprovisionings: Deprovisionings::new(&access, names.tenants.clone()),
            tenants: TenantStore::new(&access, names.tenants.clone()),
            chains: Chains::new(&access, names.usage.clone(), books.ledger().clone()),
            upload_records: UploadRecords::new(&access, names.documents.clone()),
            items: TenantItems::new(&access, names),
            books,
            uploads: Uploads::new(&access, env::bucket("DOCUMENTS_BUCKET")?),
            secrets: TenantSecrets::from_env(&access, "TENANT_SECRETS", "TENANT_MODEL_KEYS")?,
            cells: Cells::from_env("QDRANT_CELLS", roots::outbound()?)?,
            vector_root_key: secrets::read(&access, "QDRANT_ROOT_KEY_SECRET").await?,
            audit_retention_days: env::parsed("AUDIT_RETENTION_DAYS")?,
            authorizer_cache_s: env::parsed("AUTHORIZER_CACHE_SECONDS")?,
            bookkeeper,
            clock,
        })
    }
}

/// What the function is called with.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Call {
    /// By a schedule.
    Job {
        /// What to do.
        job: Job,
    },
    /// By the table's stream: something new is to be done. What, the table says.
    Stream {
        /// The records.
        #[serde(rename = "Records")]
        records: IgnoredAny,
    },
}

/// What a schedule asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Job {
    /// Go on with the deprovisionings that are not over.
    Deprovision,
    /// Delete what is past its retention.
    Retain,
    /// Forget uploads that nobody awaits any more.
    Uploads,
}

/// What came of it.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Report {
    /// Of the deprovisionings.
    Deprovisioned(Deprovisioned),
    /// Of retention.
    Retained(Retained),
    /// Of uploads.
    Unmade(Unmade),
}

/// How many deprovisionings came how far.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Deprovisioned {
    /// That are not over, at the beginning.
    pub open: u64,
    /// That have their receipt and wait for the last look.
    pub watched: u64,
    /// That are over.
    pub closed: u64,
    /// That somebody else is at.
    pub held: u64,
    /// For which there was no more time, or that wait for requests to end.
    pub waiting: u64,
    /// That failed at something, and are tried again.
    pub failed: u64,
}

/// Does what is asked, and stops in time before `deadline`. What fails for one tenant hinders no other.
///
/// # Errors
/// If the list of what is to be done cannot be read; what was done until then stays done, and the schedule
/// comes again.
pub async fn handle(context: &Context, call: Call, deadline: Timestamp) -> Result<Report, Error> {
    let left = deadline.as_millis().saturating_sub(context.clock.now().as_millis());
    let left = Duration::from_millis(u64::try_from(left).unwrap_or(0)).saturating_sub(MARGIN);
    let until = Instant::now() + left;
    Ok(match call {
        Call::Job { job: Job::Retain } => Report::Retained(retention::run(context, until).await?),
        Call::Job { job: Job::Uploads } => Report::Unmade(unmade::run(context, until).await?),
        Call::Job { job: Job::Deprovision } | Call::Stream { .. } => {
            Report::Deprovisioned(deprovision(context, until).await?)
        }
    })
}

async fn deprovision(context: &Context, until: Instant) -> Result<Deprovisioned, Error> {
    let mut report = Deprovisioned::default();
    let mut after = None;
    loop {
        let (ids, next) = context.deprovisionings.open(&context.bookkeeper, after).await?;
        let mut came = futures_util::stream::iter(ids)
            .map(async |id: DeprovisioningId| {
                let came = Box::pin(saga::go_on(context, &id, until)).await;
                came.map_err(|error| {
                    tracing::warn!(
                        tenant.id = %id.tenant_id(),
                        deprovisioning.id = %id,
                        error = &error as &dyn std::error::Error,
                        "A deprovisioning failed at something and is tried again"
                    );
                })
            })
            .buffer_unordered(AT_ONCE);
        while let Some(came) = came.next().await {
            report.open += 1;
            *match came {
                Ok(Came::Watched) => &mut report.watched,
                Ok(Came::Closed) => &mut report.closed,
                Ok(Came::Held) => &mut report.held,
                Ok(Came::Waiting) => &mut report.waiting,
                Err(()) => &mut report.failed,
            } += 1;
        }
        after = next;
        if after.is_none() {
            break;
        }
    }
    if report.open > 0 {
        tracing::info!(
            open = report.open,
            watched = report.watched,
            closed = report.closed,
            held = report.held,
            waiting = report.waiting,
            failed = report.failed,
            "Deprovisionings looked after"
        );
    }
    Ok(report)
}
