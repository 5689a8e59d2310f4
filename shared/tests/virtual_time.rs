//! The meter in virtual time: instances whose clocks are up to 2 s off, each with its own memory.

use proptest::prelude::*;
use shared::clock::Timestamp;
use shared::limits::Limits;
use shared::meter::{Asker, Limit, Meter, Refusal, Want, Work, Write};
use shared::tenant::{TenantStatus, Tier};
use shared::units::{NanoUsd, Tokens};

/// How far a clock is off at most.
const SKEW_MS: i64 = 2_000;
/// In so much true time no more than the limit passes: 60 s less what two clocks are apart.
const WINDOW_MS: i64 = 60_000 - 2 * SKEW_MS;
/// After so much true time an admission is forgotten: 61 whole seconds and what two clocks are apart.
const FORGOTTEN_MS: i64 = 61_000 + 2 * SKEW_MS;
/// How often an attempt is made against others, as the gate has it.
const CONTENTION: usize = 24;

fn limits(requests_per_minute: u32) -> Limits {
    Limits { requests_per_minute, max_concurrent: 1_000, ..Limits::of_tier(Tier::Enterprise) }
}

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millis(1_795_521_600_000 + ms)
}

fn meter() -> Meter {
    Meter::new(TenantStatus::Active, 1, at(-10_000))
}

/// A function's instance.
struct Instance {
    skew_ms: i64,
    known: Option<Meter>,
}

impl Instance {
    const fn new(skew_ms: i64) -> Self {
        Self { skew_ms, known: None }
    }

    fn decide(&self, limits: &Limits, state: &Meter, now_ms: i64, want: &Want) -> Result<Write, Refusal> {
        state.admit(Asker { limits, epoch: 1, now: at(now_ms + self.skew_ms) }, want, &[])
    }

    /// An attempt that nobody else's comes in between of: on what is remembered, then on what is so.
    fn attempt(&mut self, limits: &Limits, meter: &mut Meter, now_ms: i64) -> Result<(), Refusal> {
        let mut state = self.known.take().unwrap_or_else(|| meter.clone());
        let result = loop {
            match self.decide(limits, &state, now_ms, &Want::Read) {
                Ok(write) if write.apply(meter).is_ok() => break Ok(()),
                Err(refusal) => break Err(refusal),
                // A decision on the present state holds.
                Ok(_) => assert_ne!(state, *meter),
            }
            state = meter.clone();
        };
        // Who is refused from memory learns nothing.
        self.known = Some(if result.is_ok() { meter.clone() } else { state });
        result
    }
}

/// How many of `admitted` lie in the `length_ms` up to `now_ms`, both ends included.
fn within(admitted: &[i64], now_ms: i64, length_ms: i64) -> usize {
    admitted.iter().filter(|ms| (now_ms - length_ms..=now_ms).contains(*ms)).count()
}

/// How far a clock is off: often as far as it may be.
fn skew() -> impl Strategy<Value = i64> {
    prop_oneof![Just(-SKEW_MS), Just(SKEW_MS), -SKEW_MS..=SKEW_MS]
}

/// Time until the next request, in milliseconds: bursts, a stream, and pauses around the window.
fn gap() -> impl Strategy<Value = i64> {
    prop_oneof![6 => 0..20_i64, 3 => 0..3_000_i64, 3 => 55_000..66_000_i64]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn skewed_clocks_neither_overshoot_nor_refuse_for_long(
        rpm in 1..9_u32,
        skews in prop::collection::vec(skew(), 1..5),
        requests in prop::collection::vec((gap(), any::<prop::sample::Index>()), 1..400),
    ) {
        let limits = limits(rpm);
        let mut meter = meter();
        let mut instances: Vec<Instance> = skews.into_iter().map(Instance::new).collect();
        let mut admitted = Vec::new();
        let mut now_ms = 0;
        for (gap, which) in requests {
            now_ms += gap;
            let place = which.index(instances.len());
            match instances[place].attempt(&limits, &mut meter, now_ms) {
                Ok(()) => {
                    admitted.push(now_ms);
                    prop_assert!(within(&admitted, now_ms, WINDOW_MS) <= rpm as usize);
                }
                Err(Refusal::Limit { limit: Limit::Requests, retry_at: Some(retry_at) }) => {
                    prop_assert!(within(&admitted, now_ms, FORGOTTEN_MS) >= rpm as usize);
                    // Nor is anybody told to wait for longer.
                    let oldest = admitted[admitted.len() - rpm as usize];
                    prop_assert!(retry_at <= at(oldest + FORGOTTEN_MS));
                }
                Err(other) => prop_assert!(false, "{:?}", other),
            }
        }
    }

    /// Attempts whose decisions and writes come in any order, from instances that know an old state.
    #[test]
    fn of_200_attempts_at_a_limit_of_50_exactly_50_pass(
        skews in prop::collection::vec(skew(), 1..5),
        order in prop::collection::vec(any::<prop::sample::Index>(), 4_000),
    ) {
        let limits = limits(50);
        let instances: Vec<Instance> = skews.into_iter().map(Instance::new).collect();
        let mut meter = meter();
        let old = meter.clone();
        // Each has a state it decides on, then a write on its way, until it knows.
        let mut waiting: Vec<Attempt> = (0..200)
            .map(|number| Attempt { number, tries: 0, state: old.clone(), write: None })
            .collect();
        let mut order = order.into_iter().cycle();
        let (mut passed, mut refused, mut most_tries) = (0, 0, 0);
        while !waiting.is_empty() {
            let place = order.next().unwrap().index(waiting.len());
            let attempt = &mut waiting[place];
            let instance = &instances[attempt.number % instances.len()];
            let Some(write) = attempt.write.take() else {
                let want = attempt.want();
                match instance.decide(&limits, &attempt.state, 0, &want) {
                    Ok(write) => attempt.write = Some(write),
                    Err(Refusal::Limit { limit: Limit::Requests, .. }) => {
                        refused += 1;
                        waiting.swap_remove(place);
                    }
                    Err(other) => prop_assert!(false, "{:?}", other),
                }
                continue;
            };
            attempt.tries += 1;
            most_tries = most_tries.max(attempt.tries);
            if write.apply(&mut meter).is_ok() {
                passed += 1;
                waiting.swap_remove(place);
            } else {
                attempt.state = meter.clone();
            }
        }
        prop_assert_eq!((passed, refused), (50, 150));
        prop_assert_eq!((meter.seq, meter.leases.len()), (50, 50));
        prop_assert!(most_tries <= CONTENTION, "{} tries", most_tries);
    }
}

/// An attempt among many at once.
struct Attempt {
    number: usize,
    tries: usize,
    state: Meter,
    write: Option<Write>,
}

impl Attempt {
    fn want(&self) -> Want {
        Want::Work {
            work: Work::Chat,
            tokens: Tokens(10),
            cost: NanoUsd(10),
            life_s: 38,
            request: format!("r{}", self.number),
        }
    }
}

/// Admits as many as it can at an instant of true time.
fn burst(instance: &mut Instance, limits: &Limits, meter: &mut Meter, now_ms: i64) -> usize {
    (0..200).filter(|_| instance.attempt(limits, meter, now_ms).is_ok()).count()
}

#[test]
fn a_burst_is_followed_by_none_for_a_minute_and_by_another_within_a_second_of_it() {
    let limits = limits(50);
    for begun_ms in [0, 1, 100, 500, 900, 999] {
        let (mut meter, mut instance) = (meter(), Instance::new(0));
        let mut passed = |ms: i64| burst(&mut instance, &limits, &mut meter, begun_ms + ms);
        assert_eq!(passed(0), 50);
        assert_eq!(passed(59_900), 0);
        assert_eq!(passed(60_000), 0);
        // The next second but 60 begins up to a second later.
        let due_ms = 61_000 - begun_ms;
        assert_eq!(passed(60_100), if due_ms <= 60_100 { 50 } else { 0 });
        assert_eq!(passed(due_ms - 1), 0);
        assert_eq!(passed(due_ms), if due_ms <= 60_100 { 0 } else { 50 });
        assert_eq!(passed(due_ms + 59_900), 0);
    }
}

#[test]
fn a_burst_seen_by_clocks_at_odds_is_still_one_burst() {
    let limits = limits(50);
    for (first, second) in [(SKEW_MS, -SKEW_MS), (-SKEW_MS, SKEW_MS)] {
        let mut meter = meter();
        let (mut one, mut other) = (Instance::new(first), Instance::new(second));
        assert_eq!(burst(&mut one, &limits, &mut meter, 0), 50);
        assert_eq!(burst(&mut other, &limits, &mut meter, 0), 0);
        assert_eq!(burst(&mut other, &limits, &mut meter, WINDOW_MS), 0);
        // Whichever clock is slow, it is due by then.
        assert_eq!(burst(&mut other, &limits, &mut meter, FORGOTTEN_MS), 50);
    }
}

#[test]
fn who_waits_as_told_is_admitted() {
    let limits = limits(3);
    let (mut meter, mut instance) = (meter(), Instance::new(0));
    for ms in [0, 20_300, 40_700] {
        instance.attempt(&limits, &mut meter, ms).unwrap();
    }
    for (asked_ms, due_ms) in [(41_000, 61_000), (61_001, 81_000), (81_001, 101_000)] {
        let refusal = instance.attempt(&limits, &mut meter, asked_ms).unwrap_err();
        let Refusal::Limit { limit: Limit::Requests, retry_at: Some(retry_at) } = refusal else {
            panic!("{refusal:?}")
        };
        assert_eq!(retry_at, at(due_ms));
        instance.attempt(&limits, &mut meter, due_ms).unwrap();
    }
}
