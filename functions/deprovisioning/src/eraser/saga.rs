//! One deprovisioning: what is done at each step.

use std::collections::BTreeSet;
use std::time::Duration;

use shared::aws::LINKS_HOLD;
use shared::aws::StoreError;
use shared::aws::audit_objects::ObjectError;
use shared::aws::deprovisionings::Hold;
use shared::aws::erasure;
use shared::aws::secrets::SecretsFailed;
use shared::aws::uploads;
use shared::clock::Timestamp;
use shared::deprovisioning::{Counts, DeprovisioningId, Kept, KeptWhat, Saga, Step, StepState, Store};
use shared::ledger::Record;
use shared::tenant::TenantStatus;
use shared::vectors::VectorError;
use tokio::time::Instant;

use super::Context;

/// One that has no receipt by then is an alarm: an hour.
const LATE_MS: u64 = 3_600_000;
/// How often it is looked whether what was admitted has ended.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// The longest that a request is under way which API Gateway has let in, and by how much two clocks differ.
const LONGEST_REQUEST_S: i64 = 120 + 8;
/// How long nothing may be seen to wait for the audit log, before it is believed that nothing does: the index
/// that says so follows its table, within a second as a rule.
const QUIET_MS: u64 = 2_000;
/// How far point-in-time recovery goes back, in days, and the tables that have it and are emptied: tenants,
/// meters, conversations, documents, webhooks.
const BACKUPS: (u32, u64) = (35, 5);

/// How far a deprovisioning came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Came {
    /// To its receipt. The stores are looked at once more later.
    Watched,
    /// To its end.
    Closed,
    /// Nowhere: somebody else is at it.
    Held,
    /// Not yet to its receipt, and there is no more time.
    Waiting,
}

/// What came of deleting what a step deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deleted {
    /// It is done.
    All,
    /// An earlier step has to be done again.
    Reopened,
    /// There is no more time.
    NoTime,
}

/// Why a deprovisioning did not go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failed {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Objects(#[from] ObjectError),
    #[error(transparent)]
    Secrets(#[from] SecretsFailed),
    #[error(transparent)]
    Vectors(#[from] VectorError),
    /// It took so long that somebody else may have taken it.
    #[error("it was not certain any more that nobody else is at it")]
    Lapsed,
}

/// Goes on with a deprovisioning, until it is over, has to wait, or time is up.
pub(super) async fn go_on(context: &Context, id: &DeprovisioningId, until: Instant) -> Result<Came, Failed> {
    let taken = context.deprovisionings.take(&context.bookkeeper, id, context.clock.now()).await?;
    let Some(mut hold) = taken else { return Ok(Came::Held) };
    let came = work(context, &mut hold, until).await;
    let late =
        hold.saga.receipt.is_none() && context.clock.now().millis_since(hold.saga.started_at) > LATE_MS;
    if late {
        tracing::error!(
            alert = "deprovisioning_late",
            tenant.id = %id.tenant_id(),
            deprovisioning.id = %id,
            step = ?hold.saga.next().map(|progress| progress.step),
            "A deprovisioning has not ended within an hour"
        );
    }
    match came {
        Ok(Came::Closed) => {
            context.deprovisionings.close(hold).await?;
            tracing::info!(tenant.id = %id.tenant_id(), deprovisioning.id = %id, "Deprovisioning closed");
            Ok(Came::Closed)
        }
        // What was not written down is not known to have been done, and is done again.
        Err(Failed::Store(StoreError::Conflict)) => Ok(Came::Held),
        came => {
            if let Err(error) = context.deprovisionings.leave(hold).await {
                tracing::warn!(deprovisioning.id = %id, "A deprovisioning is held until it lapses: {error}");
            }
            came
        }
    }
}

async fn work(context: &Context, hold: &mut Hold, until: Instant) -> Result<Came, Failed> {
    loop {
        if Instant::now() >= until {
            let watched = hold.saga.receipt.is_some();
            return Ok(if watched { Came::Watched } else { Came::Waiting });
        }
        let Some((step, state)) = hold.saga.next().map(|progress| (progress.step, progress.state)) else {
            if hold.saga.watched_until.is_some_and(|until| context.clock.now() < until) {
                return Ok(Came::Watched);
            }
            if !looked(context, hold).await? {
                // Lines that a late record has added go with the others.
                if let Some(until) = kept_until(&hold.saga) {
                    context.items.expire_bills(hold.erasure(), until.as_seconds()).await?;
                }
                return Ok(Came::Closed);
            }
            continue;
        };
        match step {
            Step::Disable => {
                hold.saga.begin(step, &Counts::new(), context.clock.now());
                disable(context, hold).await?;
            }
            Step::Drain => {
                if state == StepState::Pending {
                    // It may take as long as a request: whoever watches sees it begin.
                    hold.saga.begin(step, &Counts::new(), context.clock.now());
                    save(context, hold).await?;
                }
                if !drain(context, hold, until).await? {
                    return Ok(Came::Waiting);
                }
            }
            Step::Verify => {
                if looked(context, hold).await? {
                    // Somebody was still at it.
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                continue;
            }
            Step::Receipt => {
                conclude(context, hold).await?;
                continue;
            }
            step => {
                if state == StepState::Pending {
                    // Counted, and the count written down, before anything is deleted.
                    let found = count(context, hold, step).await?;
                    // Whatever fails is asked before anything is changed: what is in hand is written down
                    // when this ends.
                    let last = match step {
                        Step::Meter => context.items.last_ticket(hold.erasure()).await?,
                        _ => None,
                    };
                    hold.saga.begin(step, &found, context.clock.now());
                    hold.saga.last_ticket = last.unwrap_or(hold.saga.last_ticket);
                    save(context, hold).await?;
                }
                match delete(context, hold, step, until).await? {
                    Deleted::All => {}
                    Deleted::Reopened => continue,
                    Deleted::NoTime => return Ok(Came::Waiting),
                }
            }
        }
        hold.saga.end(step, context.clock.now());
        save(context, hold).await?;
        tracing::info!(tenant.id = %hold.saga.tenant_id, ?step, "Step done");
    }
}

/// From here on, nothing is admitted.
async fn disable(context: &Context, hold: &Hold) -> Result<(), Failed> {
    let meters = context.books.meters();
    let set = meters.set_standing(hold.erasure(), TenantStatus::Deprovisioning, hold.saga.epoch);
    match set.await {
        Ok(()) | Err(StoreError::Missing { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits until what was admitted has ended: each ticket has its record then, and its charge is on the bill.
/// So nobody writes for the tenant any more. A request holds its lease for longer than Lambda lets it live;
/// and a turn enters with the record of its ticket or not at all. Says whether that is so. Records without a
/// ticket are on no bill, and are not waited for: there may always be one more.
async fn drain(context: &Context, hold: &mut Hold, until: Instant) -> Result<bool, Failed> {
    let mut quiet_since: Option<Timestamp> = None;
    loop {
        let now = context.clock.now();
        let ended = match context.books.meters().read(hold.erasure()).await {
            Ok(meter) if meter.leases.is_empty() => true,
            Ok(meter) => {
                context.books.collect(hold.erasure(), meter).await?;
                false
            }
            Err(StoreError::Missing { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        let quiet = ended && context.books.ledger().waiting(hold.erasure()).await?.tickets == 0;
        quiet_since = quiet.then(|| quiet_since.unwrap_or(now));
        if quiet_since.is_some_and(|since| now.millis_since(since) >= QUIET_MS) {
            return Ok(true);
        }
        if Instant::now() + LOOK_EVERY >= until {
            return Ok(false);
        }
        keep(context, hold).await?;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What there is to delete at a step, page by page: it may be much, and nobody else is to begin meanwhile.
async fn count(context: &Context, hold: &mut Hold, step: Step) -> Result<Counts, Failed> {
    Ok(match step {
        Step::Vectors => {
            let mut found = Counts::from([(Store::Collections, 0), (Store::Passages, 0)]);
            for cell in cells(context, hold) {
                keep(context, hold).await?;
                let counted = context.cells.count(hold.erasure(), &context.vector_root_key, &cell).await?;
                if let Some(passages) = counted {
                    *found.entry(Store::Collections).or_default() += 1;
                    *found.entry(Store::Passages).or_default() += passages;
                }
            }
            found
        }
        Step::Conversations => count_items(context, hold, Store::Turns).await?,
        Step::Documents => count_items(context, hold, Store::Documents).await?,
        Step::Uploads => {
            let (mut count, mut from) = (0, Some(uploads::Onward::default()));
            while let Some(place) = from {
                keep(context, hold).await?;
                let (some, next) = context.uploads.count(hold.erasure(), place).await?;
                count += some;
                from = next;
            }
            Counts::from([(Store::Uploads, count)])
        }
        Step::Secrets => {
            Counts::from([(Store::Secrets, context.secrets.names(hold.erasure()).await?.len() as u64)])
        }
        Step::Keys => {
            let mut found = count_items(context, hold, Store::Keys).await?;
            found.extend(count_items(context, hold, Store::Webhooks).await?);
            found
        }
        Step::Meter => count_items(context, hold, Store::Meters).await?,
        Step::Disable | Step::Drain | Step::Verify | Step::Receipt => Counts::new(),
    })
}

async fn count_items(context: &Context, hold: &mut Hold, store: Store) -> Result<Counts, Failed> {
    let (mut counts, mut from) = (Counts::new(), Some(erasure::Onward::default()));
    while let Some(place) = from {
        keep(context, hold).await?;
        let (some, next) = context.items.count(hold.erasure(), store, place).await?;
        for (store, count) in some {
            *counts.entry(store).or_default() += count;
        }
        from = next;
    }
    Ok(counts)
}

/// Deletes all that a step deletes.
async fn delete(context: &Context, hold: &mut Hold, step: Step, until: Instant) -> Result<Deleted, Failed> {
    match step {
        Step::Vectors => {
            for cell in cells(context, hold) {
                keep(context, hold).await?;
                context.cells.drop_collection(hold.erasure(), &context.vector_root_key, &cell).await?;
            }
            Ok(Deleted::All)
        }
        Step::Conversations => delete_items(context, hold, Store::Turns, until).await,
        Step::Documents => delete_items(context, hold, Store::Documents, until).await,
        Step::Uploads => {
            let mut from = Some(uploads::Onward::default());
            while let Some(place) = from {
                if Instant::now() >= until {
                    return Ok(Deleted::NoTime);
                }
                keep(context, hold).await?;
                from = context.uploads.delete(hold.erasure(), place).await?;
            }
            Ok(Deleted::All)
        }
        Step::Secrets => {
            context.secrets.delete(hold.erasure()).await?;
            // They are deleted in the background, and listed until then: counted again they would be more
            // than there were.
            while !context.secrets.names(hold.erasure()).await?.is_empty() {
                if Instant::now() + LOOK_EVERY >= until {
                    return Ok(Deleted::NoTime);
                }
                keep(context, hold).await?;
                tokio::time::sleep(LOOK_EVERY).await;
                context.secrets.delete(hold.erasure()).await?;
            }
            Ok(Deleted::All)
        }
        Step::Keys => match delete_items(context, hold, Store::Keys, until).await? {
            Deleted::All => delete_items(context, hold, Store::Webhooks, until).await,
            other => Ok(other),
        },
        Step::Meter => match context.items.delete_meter(hold.erasure()).await {
            Ok(()) => Ok(Deleted::All),
            Err(StoreError::Conflict) => {
                tracing::error!(
                    alert = "meter_in_use",
                    tenant.id = %hold.saga.tenant_id,
                    "A meter that is to be deleted is in use"
                );
                hold.saga.reopen(Step::Disable);
                hold.saga.reopen(Step::Drain);
                save(context, hold).await?;
                Ok(Deleted::Reopened)
            }
            Err(error) => Err(error.into()),
        },
        Step::Disable | Step::Drain | Step::Verify | Step::Receipt => Ok(Deleted::All),
    }
}

/// Where there may be a collection of the tenant: where its record says, and wherever else one was made for
/// a move that did not come to its end.
fn cells(context: &Context, hold: &Hold) -> BTreeSet<String> {
    context.cells.names().chain([hold.saga.cell.as_str()]).map(str::to_owned).collect()
}

async fn delete_items(
    context: &Context,
    hold: &mut Hold,
    store: Store,
    until: Instant,
) -> Result<Deleted, Failed> {
    let mut from = Some(erasure::Onward::default());
    while let Some(place) = from {
        if Instant::now() >= until {
            return Ok(Deleted::NoTime);
        }
        keep(context, hold).await?;
        from = context.items.delete(hold.erasure(), store, place).await?;
    }
    Ok(Deleted::All)
}

/// Takes a fresh look into every store. Says whether anything was there: then it is deleted, and looked for
/// again.
async fn looked(context: &Context, hold: &mut Hold) -> Result<bool, Failed> {
    const LOOKS: [Step; 7] = [
        Step::Vectors,
        Step::Conversations,
        Step::Documents,
        Step::Uploads,
        Step::Secrets,
        Step::Keys,
        Step::Meter,
    ];
    let mut found = Counts::new();
    for step in LOOKS {
        keep(context, hold).await?;
        found.extend(count(context, hold, step).await?);
    }
    let late = hold.saga.receipt.is_some();
    if found.values().any(|count| *count > 0) {
        let tenant = &hold.saga.tenant_id;
        if late {
            tracing::error!(alert = "written_late", tenant.id = %tenant, ?found, "Something was written after the receipt");
        } else {
            tracing::warn!(tenant.id = %tenant, ?found, "A fresh look found what is not deleted yet");
        }
    }
    let left = hold.saga.looked(&found, context.clock.now());
    save(context, hold).await?;
    Ok(left)
}

/// Writes the receipt; if the last look is too long ago, has it taken again first.
async fn conclude(context: &Context, hold: &mut Hold) -> Result<(), Failed> {
    let erasure = hold.erasure();
    let until = context.clock.now().plus_days(context.audit_retention_days);
    let bills = context.items.expire_bills(erasure, until.as_seconds()).await?;
    let head = context.chains.read(erasure).await?.head;
    let waiting = context.books.ledger().waiting(erasure).await?.all;
    let epoch = context.deprovisionings.present_epoch(erasure).await?.max(hold.saga.epoch);
    let now = context.clock.now();
    let (days, tables) = BACKUPS;
    let kept = vec![
        // With the one that this receipt is in.
        Kept { what: KeptWhat::AuditRecords, count: head.lines + waiting + 1, until: Some(until) },
        Kept { what: KeptWhat::BillLines, count: bills, until: Some(until) },
        Kept { what: KeptWhat::TableBackups, count: tables, until: Some(now.plus_days(days)) },
        Kept { what: KeptWhat::Tombstone, count: 1, until: None },
    ];
    let Some(receipt) = hold.saga.receipt(kept, now) else {
        hold.saga.reopen(Step::Verify);
        return save(context, hold).await;
    };
    // Only what the transaction has made true is held to be so: what is held is written down if it fails.
    let mut concluded = hold.saga.clone();
    concluded.begin(Step::Receipt, &Counts::new(), now);
    concluded.end(Step::Receipt, now);
    concluded.receipt = Some(receipt.clone());
    concluded.watched_until = Some(watched_until(context, now));
    let record = Record::deleted(&concluded, receipt);
    let tombstone = concluded.tombstone(epoch, now);
    let done = (context.books.ledger(), &record);
    context.deprovisionings.conclude(hold, concluded, &tombstone, done, now).await?;
    let Saga { id, tenant_id, .. } = &hold.saga;
    tracing::info!(tenant.id = %tenant_id, deprovisioning.id = %id, "Tenant deleted");
    Ok(())
}

/// Until when the bills are kept, as the receipt says.
fn kept_until(saga: &Saga) -> Option<Timestamp> {
    let kept = &saga.receipt.as_ref()?.kept;
    kept.iter().find(|kept| kept.what == KeptWhat::BillLines)?.until
}

/// Until when API Gateway may let requests in by a decision that it remembers, or a file be put by a link that was
/// given before, and they be under way.
fn watched_until(context: &Context, now: Timestamp) -> Timestamp {
    let links_hold_s = i64::try_from(LINKS_HOLD.as_secs()).unwrap_or(i64::MAX);
    let seconds = i64::from(context.authorizer_cache_s).max(links_hold_s).saturating_add(LONGEST_REQUEST_S);
    now.plus_millis(seconds.saturating_mul(1_000))
}

/// Makes sure that nobody else is at it, and says so to others in time.
async fn keep(context: &Context, hold: &mut Hold) -> Result<(), Failed> {
    let now = context.clock.now();
    if !hold.holds(now) {
        return Err(Failed::Lapsed);
    }
    if hold.is_due(now) { save(context, hold).await } else { Ok(()) }
}

async fn save(context: &Context, hold: &mut Hold) -> Result<(), Failed> {
    Ok(context.deprovisionings.save(hold, context.clock.now()).await?)
}
