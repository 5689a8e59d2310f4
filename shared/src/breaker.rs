//! A function's memory of refusals: a tenant that keeps on past its limits is refused without asking
//! the meter, and floods of refusals become few records with exact counts. Pure.

use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::meter::Limit;
use crate::scope::{Subject, TenantScope, Ward};
use crate::tenant::TenantId;

/// Refusals in a row after which a tenant is refused from memory.
const TRIPS_AFTER: u32 = 5;
/// How long at most, in milliseconds. Budgets may be raised and requests may end in the meantime.
const COOL_DOWN_MS: i64 = 5_000;
/// How long refusals are gathered before they are written down, in milliseconds.
const GATHERED_MS: u64 = 5_000;
/// How many are gathered at most.
const GATHERED: u64 = 500;

/// The memory of one function's process.
#[derive(Debug, Default)]
pub struct Breaker {
    tenants: HashMap<TenantId, Refusals>,
}

#[derive(Debug)]
struct Refusals {
    ward: Ward,
    in_a_row: u32,
    open: Option<Open>,
    /// By limit: how many, and since when. A limit that was just written down stays with none.
    gathered: HashMap<Limit, (u64, Timestamp)>,
}

/// What a tenant is refused by without being asked for.
#[derive(Clone, Copy, Debug)]
struct Open {
    limit: Limit,
    /// When there may be room, as the meter said.
    retry_at: Timestamp,
    /// Until when that is believed.
    until: Timestamp,
}

impl Breaker {
    /// The limit by which a tenant is refused from memory, and when there may be room; nothing if it
    /// has to be asked.
    pub fn open(&mut self, tenant: &TenantId, now: Timestamp) -> Option<(Limit, Timestamp)> {
        let refusals = self.tenants.get_mut(tenant)?;
        refusals.open = refusals.open.filter(|open| now < open.until);
        refusals.open.map(|open| (open.limit, open.retry_at))
    }

    /// Counts a refusal.
    pub fn refused(
        &mut self,
        scope: &TenantScope,
        limit: Limit,
        retry_at: Option<Timestamp>,
        from_memory: bool,
        now: Timestamp,
    ) {
        let refusals = self.tenants.entry(scope.tenant_id().clone()).or_insert_with(|| Refusals {
            ward: scope.ward(),
            in_a_row: 0,
            open: None,
            gathered: HashMap::new(),
        });
        // The first of its kind is due at once.
        let gathered = refusals.gathered.entry(limit).or_insert((0, Timestamp::from_millis(0)));
        gathered.0 += 1;
        if !from_memory {
            refusals.in_a_row += 1;
            if refusals.in_a_row >= TRIPS_AFTER
                && let Some(retry_at) = retry_at
            {
                let until = retry_at.min(now.plus_millis(COOL_DOWN_MS));
                refusals.open = Some(Open { limit, retry_at, until });
            }
        }
    }

    /// Notes that a request of the tenant was admitted.
    pub fn passed(&mut self, tenant: &TenantId) {
        if let Some(refusals) = self.tenants.get_mut(tenant) {
            (refusals.in_a_row, refusals.open) = (0, None);
        }
    }

    /// Refusals to write down now: the limit, how many, and whose. They are taken off.
    pub fn due(&mut self, now: Timestamp) -> Vec<(Limit, u64, Ward)> {
        let mut due = Vec::new();
        self.tenants.retain(|_, refusals| {
            refusals.gathered.retain(|limit, (count, since)| {
                let old = now.millis_since(*since) >= GATHERED_MS;
                if *count > 0 && (old || *count >= GATHERED) {
                    due.push((*limit, *count, refusals.ward.clone()));
                    (*count, *since) = (0, now);
                    return true;
                }
                !(old && *count == 0)
            });
            refusals.in_a_row > 0 || !refusals.gathered.is_empty()
        });
        due
    }

    /// Takes back refusals that could not be written down.
    pub fn not_written(&mut self, ward: &Ward, limit: Limit, count: u64, now: Timestamp) {
        if let Some(refusals) = self.tenants.get_mut(ward.tenant_id()) {
            refusals.gathered.entry(limit).or_insert((0, now)).0 += count;
        }
    }
}
