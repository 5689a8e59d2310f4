//! A function's memory of tenants that keep on past their limits: they are refused without asking the
//! meter. Pure.

use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::meter::Limit;
use crate::tenant::TenantId;
use crate::units::Tokens;

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
    /// The fewest tokens that did not fit, where it is a matter of tokens.
    need: Tokens,
    /// When there may be room, as the meter said.
    retry_at: Timestamp,
    /// Until when that is believed.
    until: Timestamp,
}

impl Open {
    /// Whether a request of that need would be refused, too: one that only reads by the number of
    /// requests alone, and one that needs less than what did not fit perhaps not.
    fn bars(&self, need: Option<Tokens>) -> bool {
        match self.limit {
            Limit::Requests => true,
            Limit::Concurrency | Limit::Account => need.is_some(),
            Limit::Day | Limit::Month => need.is_some_and(|need| need >= self.need),
        }
    }
}

impl Breaker {
    /// The limit by which a tenant's request that `need`s so much, or only reads, is refused from memory,
    /// and when there may be room; nothing if the meter has to be asked.
    pub fn open(
        &mut self,
        tenant: &TenantId,
        need: Option<Tokens>,
        now: Timestamp,
    ) -> Option<(Limit, Timestamp)> {
        let refusals = self.tenants.get_mut(tenant)?;
        refusals.open = refusals.open.filter(|open| now < open.until);
        refusals.open.filter(|open| open.bars(need)).map(|open| (open.limit, open.retry_at))
    }

    /// Notes that the meter refused a request of the tenant.
    pub fn refused(
        &mut self,
        tenant: &TenantId,
        limit: Limit,
        need: Option<Tokens>,
        retry_at: Option<Timestamp>,
        now: Timestamp,
    ) {
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
            let need = need.unwrap_or_default();
            refusals.open = Some(Open { limit, need, retry_at, until });
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

    const NEED: Option<Tokens> = Some(Tokens(100));

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millis(1_790_000_000_000 + ms)
    }

    #[test]
    fn who_keeps_on_is_refused_from_memory_for_a_while() {
        let (mut breaker, acme) = (Breaker::default(), "acme".parse().unwrap());
        for n in 0..4 {
            breaker.refused(&acme, Limit::Requests, None, Some(at(40_000)), at(n));
            assert_eq!(breaker.open(&acme, NEED, at(n)), None);
        }
        breaker.refused(&acme, Limit::Requests, None, Some(at(40_000)), at(4));
        // It is told when there is room, and the meter is asked again long before.
        assert_eq!(breaker.open(&acme, NEED, at(5_003)), Some((Limit::Requests, at(40_000))));
        assert_eq!(breaker.open(&acme, NEED, at(5_004)), None);
        assert_eq!(breaker.open(&"globex".parse().unwrap(), NEED, at(5)), None);
        breaker.refused(&acme, Limit::Requests, None, Some(at(5_100)), at(5_005));
        assert!(breaker.open(&acme, NEED, at(5_099)).is_some());
        assert_eq!(breaker.open(&acme, NEED, at(5_100)), None, "never longer than until there is room");
    }

    #[test]
    fn one_that_passes_begins_anew() {
        let (mut breaker, acme) = (Breaker::default(), "acme".parse().unwrap());
        (0..5).for_each(|n| breaker.refused(&acme, Limit::Concurrency, NEED, Some(at(1_000)), at(n)));
        breaker.passed(&acme);
        assert_eq!(breaker.open(&acme, NEED, at(5)), None);
        breaker.refused(&acme, Limit::Concurrency, NEED, Some(at(1_000)), at(6));
        assert_eq!(breaker.open(&acme, NEED, at(7)), None);
        // What there will never be room for is not a matter of time.
        (0..9).for_each(|n| breaker.refused(&acme, Limit::Day, NEED, None, at(n)));
        assert_eq!(breaker.open(&acme, NEED, at(9)), None);
    }

    #[test]
    fn only_what_would_not_fit_either_is_refused_from_memory() {
        for (limit, reads, smaller) in
            [(Limit::Requests, true, true), (Limit::Concurrency, false, true), (Limit::Day, false, false)]
        {
            let (mut breaker, acme) = (Breaker::default(), "acme".parse().unwrap());
            (0..5).for_each(|n| breaker.refused(&acme, limit, NEED, Some(at(1_000)), at(n)));
            assert!(breaker.open(&acme, NEED, at(5)).is_some());
            assert_eq!(breaker.open(&acme, None, at(5)).is_some(), reads, "{limit:?}");
            assert_eq!(breaker.open(&acme, Some(Tokens(99)), at(5)).is_some(), smaller, "{limit:?}");
        }
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut breaker = Breaker::default();
        for n in 0..5_000 {
            breaker.refused(&format!("t-{n}").parse().unwrap(), Limit::Day, NEED, None, at(n));
        }
        assert!(breaker.tenants.len() <= REMEMBERED);
    }
}
