//! Telling tenants of their budgets, on a schedule: what their meters have crossed is noted, once for each
//! threshold, and what is noted is delivered, or tried again until its time is over.

mod deliver;
mod note;
mod receiver;

use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use lambda_runtime::Error;
use serde::{Deserialize, Serialize};
use shared::aws::ledger::Ledger;
use shared::aws::meters::MeterStore;
use shared::aws::secrets::WebhookRoot;
use shared::aws::tenants::TenantStore;
use shared::aws::webhooks::WebhookStore;
use shared::aws::{self, StoreError};
use shared::clock::{Clock, Timestamp};
use shared::env;
use shared::random::{Entropy, entropy};
use shared::scope::Bookkeeper;
use tokio::time::Instant;

use deliver::Became;
use receiver::Sender;

/// Tenants looked at, and messages delivered, at the same time: one that is slow holds up no other.
const AT_ONCE: usize = 64;
/// What is kept of the function's time: nothing is begun that would not end in it.
const MARGIN: Duration = Duration::from_secs(15);

/// What the function works with.
#[derive(Debug)]
pub struct Context {
    meters: MeterStore,
    tenants: TenantStore,
    ledger: Ledger,
    messages: WebhookStore,
    root: WebhookRoot,
    sender: Sender,
    bookkeeper: Bookkeeper,
    clock: Clock,
    entropy: Entropy,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config()?;
        let access = aws::Access::own(&config);
        #[expect(clippy::disallowed_methods, reason = "a schedule drives this function")]
        let bookkeeper = Bookkeeper::driven_by_events();
        Ok(Self {
            meters: MeterStore::new(&access, env::table("METERS_TABLE")?),
            tenants: TenantStore::new(&access, env::table("TENANTS_TABLE")?),
            ledger: Ledger::new(&access, env::table("AUDIT_TABLE")?),
            messages: WebhookStore::new(&access, env::table("WEBHOOKS_TABLE")?),
            root: WebhookRoot::from_env(&access, "WEBHOOK_KEY_SECRET").await?,
            sender: Sender::new(env::parsed("WEBHOOK_RECEIVERS")?)?,
            bookkeeper,
            clock: Clock::system(),
            entropy: entropy(),
        })
    }
}

/// The input of the schedule: there is nothing to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tick {}

/// What was done.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Tenants there are.
    pub tenants: u64,
    /// Messages noted.
    pub noted: u64,
    /// Tenants whose budgets could not be looked at. The next run looks again.
    pub unread: u64,
    /// Messages delivered.
    pub delivered: u64,
    /// Tries that failed and are made again.
    pub failed: u64,
    /// Messages that are not tried again.
    pub ended: u64,
    /// Of these, those that have been tried for their whole time.
    pub given_up: u64,
    /// What there was no time for. The next run goes on with it.
    pub left: u64,
}

/// Notes and delivers, and stops in time before `deadline`. What cannot be done for one tenant hinders no
/// other.
///
/// # Errors
/// If meters or messages cannot be listed, or the secret cannot be read; what was done until then stays
/// done, and the schedule comes again.
pub async fn handle(context: &Context, deadline: Timestamp) -> Result<Report, Error> {
    let left = Duration::from_millis(deadline.millis_since(context.clock.now()));
    let until = Instant::now() + left.saturating_sub(MARGIN);
    let mut report = Report::default();
    Box::pin(note_all(context, until, &mut report)).await?;
    Box::pin(deliver_all(context, until, &mut report)).await?;
    if report.left > 0 {
        tracing::error!(alert = "webhooks_left", "No time was left for {} tenants or messages", report.left);
    }
    tracing::info!(
        tenants = report.tenants,
        noted = report.noted,
        unread = report.unread,
        delivered = report.delivered,
        failed = report.failed,
        ended = report.ended,
        given_up = report.given_up,
        "Webhooks looked after"
    );
    Ok(report)
}

async fn note_all(context: &Context, until: Instant, report: &mut Report) -> Result<(), StoreError> {
    let mut after = None;
    loop {
        let page = context.meters.page(&context.bookkeeper, after).await?;
        let mut tenants = stream::iter(page.meters)
            .map(async |(tenant, meter)| {
                let noting = Box::pin(note::note(context, context.bookkeeper.of(tenant.clone()), meter));
                (tenant, tokio::time::timeout_at(until, noting).await)
            })
            .buffer_unordered(AT_ONCE);
        while let Some((tenant_id, noted)) = tenants.next().await {
            report.tenants += 1;
            match noted {
                Ok(Ok(noted)) => report.noted += noted,
                Ok(Err(error)) => {
                    report.unread += 1;
                    unread(&error, &tenant_id);
                }
                Err(_) => report.left += 1,
            }
        }
        after = page.next;
        if after.is_none() {
            return Ok(());
        }
    }
}

/// A failure that passes is mended by the next run; any other hides thresholds until somebody looks.
fn unread(error: &StoreError, tenant_id: &shared::tenant::TenantId) {
    if error.passes() {
        tracing::warn!(tenant.id = %tenant_id, "A tenant's budgets are left for the next time: {error}");
    } else {
        tracing::error!(
            alert = "webhooks_unread",
            tenant.id = %tenant_id,
            error = error as &dyn std::error::Error,
            "A tenant's budgets or messages cannot be read"
        );
    }
}

async fn deliver_all(context: &Context, until: Instant, report: &mut Report) -> Result<(), Error> {
    let mut roots = None;
    let mut after = None;
    loop {
        let page = context.messages.due(&context.bookkeeper, context.clock.now(), after).await?;
        // Read where there is something to sign alone.
        if roots.is_none() && !page.messages.is_empty() {
            roots = Some(context.root.current_and_previous().await?);
        }
        let roots = roots.as_deref().unwrap_or_default();
        let mut tries = stream::iter(page.messages)
            .map(async |message| match message {
                Ok(_) if Instant::now() >= until => Became::Left,
                Ok(message) => Box::pin(deliver::deliver(context, roots, message)).await,
                Err(error) => {
                    tracing::error!(
                        alert = "webhooks_unread",
                        error = &error as &dyn std::error::Error,
                        "A message to a tenant cannot be read"
                    );
                    Became::Unread
                }
            })
            .buffer_unordered(AT_ONCE);
        while let Some(became) = tries.next().await {
            match became {
                Became::Delivered => report.delivered += 1,
                Became::Failed => report.failed += 1,
                Became::Ended => report.ended += 1,
                Became::GivenUp => {
                    report.ended += 1;
                    report.given_up += 1;
                }
                Became::Unread => report.unread += 1,
                Became::Left => report.left += 1,
                Became::Others => {}
            }
        }
        after = page.next;
        if after.is_none() {
            return Ok(());
        }
    }
}
