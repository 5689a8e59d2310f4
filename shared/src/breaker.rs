//! A function's memory of tenants that keep on past their limits: they are refused without asking the
//! meter. Pure.

use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::meter::Limit;
use crate::tenant::TenantId;

/// Refusals in a row after which a tenant is refused from memory.
const TRIPS_AFTER: u32 = 5;
/// How long at most, in milliseconds. Budgets may be raised and requests may end in the meantime.
const COOL_DOWN_MS: i64 = 5_000;
/// Tenants remembered. Beyond that, those whose time is over are forgotten, and then all.
const REMEMBERED: usize = 512;

/// The memory of one function's process.
#[derive(Debug, Default)]
pub struct Breaker {
    tenants: HashMap<TenantId, Refusals>,
}

#[derive(Debug, Default)]
struct Refusals {
    in_a_row: u32,
    open: Option<Open>,
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
    /// The limit by which a tenant is refused from memory, and when there may be room; nothing if the
    /// meter has to be asked.
    pub fn open(&mut self, tenant: &TenantId, now: Timestamp) -> Option<(Limit, Timestamp)> {
        let refusals = self.tenants.get_mut(tenant)?;
        refusals.open = refusals.open.filter(|open| now < open.until);
        refusals.open.map(|open| (open.limit, open.retry_at))
    }

    /// Notes that the meter refused a request of the tenant.
    pub fn refused(&mut self, tenant: &TenantId, limit: Limit, retry_at: Option<Timestamp>, now: Timestamp) {
        if self.tenants.len() >= REMEMBERED && !self.tenants.contains_key(tenant) {
            self.tenants.retain(|_, refusals| refusals.open.is_some_and(|open| now < open.until));
            if self.tenants.len() >= REMEMBERED {
                self.tenants.clear();
            }
        }
        let refusals = self.tenants.entry(tenant.clone()).or_default();
        refusals.in_a_row += 1;
        if refusals.in_a_row >= TRIPS_AFTER
            && let Some(retry_at) = retry_at
        {
            let until = retry_at.min(now.plus_millis(COOL_DOWN_MS));
            refusals.open = Some(Open { limit, retry_at, until });
        }
    }

    /// Notes that a request of the tenant was admitted.
    pub fn passed(&mut self, tenant: &TenantId) {
        self.tenants.remove(tenant);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millis(1_790_000_000_000 + ms)
    }

    #[test]
    fn who_keeps_on_is_refused_from_memory_for_a_while() {
        let (mut breaker, acme) = (Breaker::default(), "acme".parse().unwrap());
        for n in 0..4 {
            breaker.refused(&acme, Limit::Requests, Some(at(40_000)), at(n));
            assert_eq!(breaker.open(&acme, at(n)), None);
        }
        breaker.refused(&acme, Limit::Requests, Some(at(40_000)), at(4));
        // It is told when there is room, and the meter is asked again long before.
        assert_eq!(breaker.open(&acme, at(5_003)), Some((Limit::Requests, at(40_000))));
        assert_eq!(breaker.open(&acme, at(5_004)), None);
        assert_eq!(breaker.open(&"globex".parse().unwrap(), at(5)), None);
        breaker.refused(&acme, Limit::Requests, Some(at(5_100)), at(5_005));
        assert!(breaker.open(&acme, at(5_099)).is_some());
        assert_eq!(breaker.open(&acme, at(5_100)), None, "never longer than until there is room");
    }

    #[test]
    fn one_that_passes_begins_anew() {
        let (mut breaker, acme) = (Breaker::default(), "acme".parse().unwrap());
        (0..5).for_each(|n| breaker.refused(&acme, Limit::Concurrency, Some(at(1_000)), at(n)));
        breaker.passed(&acme);
        assert_eq!(breaker.open(&acme, at(5)), None);
        breaker.refused(&acme, Limit::Concurrency, Some(at(1_000)), at(6));
        assert_eq!(breaker.open(&acme, at(7)), None);
        // What there will never be room for is not a matter of time.
        (0..9).for_each(|n| breaker.refused(&acme, Limit::Day, None, at(n)));
        assert_eq!(breaker.open(&acme, at(9)), None);
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut breaker = Breaker::default();
        for n in 0..5_000 {
            breaker.refused(&format!("t-{n}").parse().unwrap(), Limit::Day, None, at(n));
        }
        assert!(breaker.tenants.len() <= REMEMBERED);
    }
}
