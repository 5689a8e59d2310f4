//! Noting what a tenant's budgets have crossed.

use shared::aws::StoreError;
use shared::meter::{BillingMonth, Meter};
use shared::scope::Ward;
use shared::tenant::TenantStatus;
use shared::webhook::{Budget, Message, NEARLY_USED_UP, THRESHOLDS};

use crate::Context;

/// How long a refusal is taken for a sign that a budget is used up: several runs of the schedule.
const OF_LATE_MS: i64 = 600_000;

/// Notes what the tenant's meter has crossed and nobody has noted, and says how much that is.
///
/// A tenant that names no receiver is told nothing, later neither: a threshold that it crosses once it does
/// is the first.
pub(crate) async fn note(
    context: &Context,
    ward: Ward,
    meter: Result<Meter, StoreError>,
) -> Result<u64, StoreError> {
    let meter = meter?;
    let now = context.clock.now();
    // One without use this month has crossed nothing; its record is not read.
    if meter.month_tokens == 0 || meter.month != BillingMonth::of(now.as_seconds()) {
        return Ok(0);
    }
    let Some(tenant) = context.tenants.of(&ward).await? else { return Ok(0) };
    if tenant.webhook_url.is_none() || tenant.status != TenantStatus::Active {
        return Ok(0);
    }
    let mut noted = 0;
    for budget in Budget::of(&meter, &tenant.limits, now) {
        if budget.crossed(false).next().is_none() {
            continue;
        }
        let before = context.messages.noted(&ward, budget.period).await?;
        let told = |percent| before.iter().any(|message| message.threshold_percent == percent);
        if THRESHOLDS.into_iter().all(told) {
            continue;
        }
        let refused = budget.has_reached(NEARLY_USED_UP)
            && context.ledger.has_refused(&ward, budget.period.limit(), now.plus_millis(-OF_LATE_MS)).await?;
        for percent in budget.crossed(refused).filter(|percent| !told(*percent)) {
            let message = Message::new(&tenant, budget, percent, now);
            noted += u64::from(context.messages.note(&ward, &message).await?);
        }
    }
    Ok(noted)
}
