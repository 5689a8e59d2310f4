//! The meter against a naive log of every admission.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::tenant::Tier;

const START: i64 = 1_764_000_000;

fn limits(rpm: u32, day: u64, month: u64, concurrent: u32) -> Limits {
    Limits {
        requests_per_minute: rpm,
        tokens_per_day: day,
        monthly_token_budget: month,
        max_concurrent: concurrent,
        ..Limits::of_tier(Tier::Enterprise)
    }
}

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millis(START * 1_000 + ms)
}

fn meter() -> Meter {
    Meter::new(TenantStatus::Active, 1, at(0))
}

fn asker(limits: &Limits, now: Timestamp) -> Asker<'_> {
    Asker { limits, epoch: 1, now }
}

fn work(tokens: u64, request: &str) -> Want {
    Want::Work {
        work: Work::Chat,
        tokens: Tokens(tokens),
        cost: NanoUsd(tokens * 1_000),
        life_s: 130,
        request: request.into(),
    }
}

fn admit(meter: &mut Meter, limits: &Limits, now: Timestamp, want: &Want) -> Result<(), Refusal> {
    meter.admit(asker(limits, now), want, &[])?.apply(meter).unwrap();
    Ok(())
}

#[test]
fn the_limit_passes_and_not_one_more_until_retry_after() {
    let limits = limits(3, 0, 0, 0);
    let mut meter = meter();
    for ms in [500, 700, 30_000] {
        admit(&mut meter, &limits, at(ms), &Want::Read).unwrap();
    }
    let refused = admit(&mut meter, &limits, at(59_000), &Want::Read).unwrap_err();
    let Refusal::Limit { limit: Limit::Requests, retry_at: Some(retry_at) } = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(retry_at, at(61_000));
    assert!(admit(&mut meter, &limits, at(60_999), &Want::Read).is_err());
    admit(&mut meter, &limits, retry_at, &Want::Read).unwrap();
    admit(&mut meter, &limits, retry_at, &Want::Read).unwrap();
    assert!(admit(&mut meter, &limits, retry_at, &Want::Read).is_err());
}

#[test]
fn zero_is_zero_and_says_that_waiting_is_no_use() {
    let mut meter = meter();
    let never = |limit| Refusal::Limit { limit, retry_at: None };
    let refused = admit(&mut meter, &limits(0, 9, 9, 9), at(0), &Want::Read).unwrap_err();
    assert_eq!(refused, never(Limit::Requests));
    let refused = admit(&mut meter, &limits(9, 9, 9, 0), at(0), &work(1, "a")).unwrap_err();
    assert_eq!(refused, never(Limit::Concurrency));
    let refused = admit(&mut meter, &limits(9, 0, 9, 9), at(0), &work(1, "a")).unwrap_err();
    assert_eq!(refused, never(Limit::Day));
    let refused = admit(&mut meter, &limits(9, 9, 5, 9), at(0), &work(6, "a")).unwrap_err();
    assert_eq!(refused, never(Limit::Month));
}

#[test]
fn a_clock_that_lags_is_told_the_meters_own() {
    let limits = limits(2, 0, 0, 0);
    let mut meter = meter();
    admit(&mut meter, &limits, at(4_000), &Want::Read).unwrap();
    admit(&mut meter, &limits, at(0), &Want::Read).unwrap();
    assert_eq!(meter.bucket, START + 4);
    assert!(admit(&mut meter, &limits, at(60_000), &Want::Read).is_err());
    admit(&mut meter, &limits, at(65_000), &Want::Read).unwrap();
}

fn ended(lease: &Lease, ticket: Ticket, tokens: u64, cost: u64) -> Ended {
    let (tokens, cost) = (Tokens(tokens), NanoUsd(cost));
    let charge = Charged { day: lease.day(), month: lease.month(), tokens, cost };
    Ended { lease: lease.clone(), ticket, charge }
}

#[test]
fn a_budget_is_reserved_settled_and_free_again_the_next_day() {
    let limits = limits(100, 1_000, 10_000, 10);
    let mut meter = meter();
    admit(&mut meter, &limits, at(0), &work(600, "a")).unwrap();
    let soon = Refusal::Limit { limit: Limit::Day, retry_at: Some(at(1_000)) };
    assert_eq!(admit(&mut meter, &limits, at(0), &work(600, "b")).unwrap_err(), soon);
    let lease = meter.leases.keys().next().unwrap().clone();
    assert_eq!(lease.to_string().parse::<Lease>().unwrap(), lease);
    let ended = [ended(&lease, Ticket(1), 500, 7)];
    meter.end(&ended).apply(&mut meter).unwrap();
    assert_eq!((meter.day_tokens, meter.month_tokens, meter.month_cost), (500, 500, 7));
    assert_eq!(meter.end(&ended).apply(&mut meter), Err(ConditionFailed));

    let refused = admit(&mut meter, &limits, at(0), &work(501, "b")).unwrap_err();
    let Refusal::Limit { limit: Limit::Day, retry_at: Some(midnight) } = refused else { panic!() };
    assert_eq!(midnight.to_string(), "2025-11-25T00:00:00.000Z");
    admit(&mut meter, &limits, midnight, &work(501, "b")).unwrap();
    assert_eq!((meter.day_tokens, meter.month_tokens), (501, 1_001));
}

#[test]
fn a_request_across_midnight_is_charged_to_the_day_it_began() {
    let limits = limits(100, 1_000, 10_000, 10);
    // The last second of a month.
    let eve = Timestamp::parse("2026-11-30T23:59:59Z").unwrap();
    let mut meter = Meter::new(TenantStatus::Active, 1, eve);
    admit(&mut meter, &limits, eve, &work(900, "old")).unwrap();
    let old = meter.leases.keys().next().unwrap().clone();
    let morning = eve.plus_millis(1_000);
    admit(&mut meter, &limits, morning, &work(900, "new")).unwrap();
    assert_eq!(
        (meter.day_tokens, meter.month_tokens, meter.month.to_string().as_str()),
        (900, 900, "2026-12")
    );
    meter.end(&[ended(&old, Ticket(1), 5, 5)]).apply(&mut meter).unwrap();
    assert_eq!((meter.day_tokens, meter.month_tokens, meter.month_cost), (900, 900, 0));
    assert_eq!(old.month().to_string(), "2026-11");
}

#[test]
fn an_expired_lease_is_collected_by_the_next_admission() {
    let limits = limits(100, 1_000, 10_000, 1);
    let mut meter = meter();
    admit(&mut meter, &limits, at(0), &work(600, "a")).unwrap();
    assert!(admit(&mut meter, &limits, at(129_999), &work(600, "b")).is_err());
    let now = at(130_000);
    let expired = meter.expired(now);
    assert_eq!(expired.len(), 1);
    let collected = [ended(&expired[0].0, expired[0].1, 600, 600_000)];
    let write = meter.admit(asker(&limits, now), &work(400, "b"), &collected).unwrap();
    write.apply(&mut meter).unwrap();
    assert_eq!((meter.day_tokens, meter.month_cost, meter.seq, meter.leases.len()), (1_000, 600_000, 2, 1));
}

/// The lease of the same name that a belated message was given belongs to another ticket.
#[test]
fn a_lease_ends_and_moves_under_its_own_ticket_alone() {
    let limits = limits(100, 1_000, 10_000, 10);
    let mut meter = meter();
    let write = meter.admit(asker(&limits, at(0)), &work(10, "a"), &[]).unwrap();
    write.apply(&mut meter).unwrap();
    let lease = meter.lease_of(Ticket(1)).unwrap().clone();
    let end = meter.end(&[ended(&lease, Ticket(1), 5, 5)]);
    let (extend, _) =
        meter.extend(asker(&limits, at(0)), (&lease, Ticket(1)), Tokens(20), NanoUsd(1)).unwrap();
    end.apply(&mut meter).unwrap();
    write.apply(&mut meter).unwrap();
    assert_eq!(meter.lease_of(Ticket(2)), Some(&lease));
    assert_eq!(end.apply(&mut meter), Err(ConditionFailed));
    assert_eq!(extend.apply(&mut meter), Err(ConditionFailed));
}

/// Nobody was told that the lease has moved, so its record is of the month before.
#[test]
fn a_lease_that_moved_is_charged_where_its_record_says() {
    let limits = limits(100, 1_000, 10_000, 10);
    let eve = Timestamp::parse("2026-11-30T23:59:59Z").unwrap();
    let mut meter = Meter::new(TenantStatus::Active, 1, eve);
    admit(&mut meter, &limits, eve, &work(400, "a")).unwrap();
    let lease = meter.lease_of(Ticket(1)).unwrap().clone();
    let morning = eve.plus_millis(1_000);
    admit(&mut meter, &limits, morning, &work(100, "b")).unwrap();
    let (write, moved) =
        meter.extend(asker(&limits, morning), (&lease, Ticket(1)), Tokens(700), NanoUsd(1)).unwrap();
    write.apply(&mut meter).unwrap();
    assert_eq!((meter.day_tokens, meter.month_tokens), (800, 800));
    assert_eq!(meter.lease_of(Ticket(1)), Some(&moved));
    let charge = ended(&lease, Ticket(1), 5, 5).charge;
    meter.end(&[Ended { lease: moved, ticket: Ticket(1), charge }]).apply(&mut meter).unwrap();
    assert_eq!((meter.day_tokens, meter.month_tokens, meter.month_cost), (100, 100, 0));
}

#[test]
fn an_extension_keeps_the_ticket_and_the_budget() {
    let limits = limits(100, 1_000, 10_000, 10);
    let mut meter = meter();
    admit(&mut meter, &limits, at(0), &work(10, "a")).unwrap();
    admit(&mut meter, &limits, at(0), &work(500, "b")).unwrap();
    let lease = meter.leases.keys().find(|l| l.request == "a").unwrap().clone();
    assert!(meter.extend(asker(&limits, at(5)), (&lease, Ticket(1)), Tokens(501), NanoUsd(1)).is_err());
    let held = (&lease, Ticket(1));
    let (write, longer) = meter.extend(asker(&limits, at(5)), held, Tokens(500), NanoUsd(1)).unwrap();
    write.apply(&mut meter).unwrap();
    assert_eq!((meter.day_tokens, meter.leases[&longer]), (1_000, Ticket(1)));
    assert!(!meter.leases.contains_key(&lease));
}

#[test]
fn stale_decisions_and_inactive_tenants_are_told_apart() {
    let limits = limits(9, 9, 9, 9);
    let mut meter = meter();
    meter.epoch = 2;
    assert_eq!(admit(&mut meter, &limits, at(0), &Want::Read), Err(Refusal::Stale));
    meter.status = TenantStatus::Suspended;
    assert_eq!(admit(&mut meter, &limits, at(0), &Want::Read), Err(Refusal::Inactive));
}

#[test]
fn malformed_parts_of_an_item_do_not_parse() {
    for bad in ["", "c", "x.1.2.3.4.r", "c.1.2.3.4.", "c.1.2.-3.4.r", "c.1.2.3.r"] {
        assert!(bad.parse::<Lease>().is_err(), "{bad}");
    }
    for bad in ["a", "1,,2", "1,-1", &["1"; 61].join(",")] {
        assert!(Past::try_from(bad.to_owned()).is_err(), "{bad}");
    }
    for bad in ["2026-13", "2026-00", "2026-1", "26-01", "2026/01", "+026-01"] {
        assert!(bad.parse::<BillingMonth>().is_err(), "{bad}");
    }
    let january: BillingMonth = "2026-01".parse().unwrap();
    assert_eq!(january.previous().to_string(), "2025-12");
}

#[test]
fn the_standing_says_what_is_left_and_when_it_is_whole_again() {
    let limits = limits(5, 1_000, 300, 9);
    let mut meter = meter();
    admit(&mut meter, &limits, at(200), &work(100, "a")).unwrap();
    let standing = meter.standing(&limits, at(10_250));
    assert_eq!(standing.requests, Remaining { limit: 5, remaining: 4, reset_ms: 50_750 });
    assert_eq!((standing.tokens.limit, standing.tokens.remaining, standing.in_flight), (300, 200, 1));
    assert_eq!(standing.day_remaining, Tokens(900));
}

/// Something that happens to a meter.
#[derive(Clone, Debug)]
enum Step {
    Ask { skew_ms: i64, tokens: u64 },
    Settle { which: usize, share: u64 },
    Wait { ms: i64 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (-2_000..2_000i64, 0..400u64).prop_map(|(skew_ms, tokens)| Step::Ask { skew_ms, tokens }),
        3 => (any::<usize>(), 0..=100u64).prop_map(|(which, share)| Step::Settle { which, share }),
        4 => prop_oneof![0..1_500i64, 0..90_000i64, 80_000_000..90_000_000i64]
            .prop_map(|ms| Step::Wait { ms }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Machines with clocks apart by up to 4 s ask, settle and vanish. A log of what was admitted
    /// says: never more than the limits, and no refusal without need.
    #[test]
    fn no_limit_is_overshot_and_none_refuses_without_need(
        rpm in 0..12u32, concurrent in 0..5u32, day in 0..2_000u64, steps in prop::collection::vec(step(), 1..250)
    ) {
        let limits = limits(rpm, day, day * 2, concurrent);
        let mut meter = meter();
        let mut now = 0;
        let mut admitted: Vec<i64> = Vec::new();
        let mut used: BTreeMap<Day, u64> = BTreeMap::new();
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Wait { ms } => now += ms,
                Step::Settle { which, share } => {
                    let leases: Vec<_> = meter.leases.clone().into_iter().collect();
                    if leases.is_empty() { continue }
                    let (lease, ticket) = leases[which % leases.len()].clone();
                    let tokens = lease.tokens.0 * share / 100;
                    meter.end(&[ended(&lease, ticket, tokens, tokens)]).apply(&mut meter).unwrap();
                    *used.entry(lease.day()).or_default() += tokens;
                }
                Step::Ask { skew_ms, tokens } => {
                    let clock = at(now + skew_ms);
                    let collected: Vec<Ended> = meter.expired(clock).into_iter()
                        .map(|(lease, ticket)| ended(&lease, ticket, lease.tokens.0, lease.cost.0))
                        .collect();
                    let second = meter.second(clock);
                    let in_window = |admitted: &[i64], second: i64| {
                        admitted.iter().filter(|s| **s > second - 61).count()
                    };
                    match meter.admit(asker(&limits, clock), &work(tokens, &n.to_string()), &collected) {
                        Ok(write) => {
                            write.apply(&mut meter).unwrap();
                            for c in &collected {
                                *used.entry(c.lease.day()).or_default() += c.charge.tokens.0;
                            }
                            admitted.push(second);
                            prop_assert!(in_window(&admitted, second) <= rpm as usize);
                            prop_assert!(meter.leases.len() <= concurrent as usize);
                            prop_assert_eq!(meter.seq as usize, admitted.len());
                        }
                        Err(Refusal::Limit { limit: Limit::Requests, retry_at }) => {
                            prop_assert!(in_window(&admitted, second) >= rpm as usize);
                            if let Some(retry_at) = retry_at {
                                prop_assert!(in_window(&admitted, retry_at.as_seconds() - 1) >= rpm as usize);
                                prop_assert!(in_window(&admitted, retry_at.as_seconds()) < rpm as usize);
                            }
                        }
                        Err(Refusal::Limit { limit: Limit::Concurrency, .. }) => {
                            prop_assert_eq!(meter.leases.len() - collected.len(), concurrent as usize);
                        }
                        Err(Refusal::Limit { .. }) => {
                            let today = Day::of(second);
                            let month = BillingMonth::of(second);
                            let reserved = |of: &dyn Fn(&Lease) -> bool| meter.leases.keys()
                                .filter(|l| of(l)).map(|l| l.tokens.0).sum::<u64>();
                            let day_sum = used.get(&today).copied().unwrap_or(0)
                                + reserved(&|l| l.day() == today);
                            let month_sum = used.iter()
                                .filter(|(d, _)| BillingMonth::of(d.0 * 86_400) == month)
                                .map(|(_, t)| t).sum::<u64>() + reserved(&|l| l.month() == month);
                            prop_assert!(day_sum + tokens > day || month_sum + tokens > day * 2);
                        }
                        Err(other) => prop_assert!(false, "{:?}", other),
                    }
                }
            }
            let reserved: u64 =
                meter.leases.keys().filter(|l| l.day() == meter.day).map(|l| l.tokens.0).sum();
            prop_assert_eq!(meter.day_tokens, used.get(&meter.day).copied().unwrap_or(0) + reserved);
            prop_assert!(meter.day_tokens <= day && meter.month_tokens <= day * 2);
            prop_assert!(meter.past.sum() + u64::from(meter.n) <= u64::from(rpm));
        }
    }
}
