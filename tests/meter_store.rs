//! What the meter's store does is what the meter's arithmetic says: a [`Write`] put to the table, in its
//! words, has the effect of [`Write::apply`], or none where its condition does not hold. The model of the
//! protocol and the property tests run on the latter, and rest on this.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, and prints its seed"
)]

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use shared::aws::meters::{MeterStore, Written};
use shared::clock::Timestamp;
use shared::env;
use shared::limits::Limits;
use shared::meter::{Asker, Charged, Ended, Lease, Meter, Ticket, Want, Work, Write};
use shared::random::entropy;
use shared::scope::{Bookkeeper, Subject};
use shared::tenant::{TenantStatus, Tier};
use shared::units::{NanoUsd, Tokens};
use tests::{Options, Stack};

/// Writes of one run.
const WRITES: usize = 3_000;

/// A tenant's meter, in its table and as the arithmetic has it.
struct Meters<S> {
    store: MeterStore,
    ward: S,
    expected: Option<Meter>,
}

impl<S: Subject> Meters<S> {
    async fn present(&mut self) -> Meter {
        match &self.expected {
            Some(state) => state.clone(),
            None => self.expected.insert(self.store.read(&self.ward).await.unwrap()).clone(),
        }
    }

    /// Makes a write in both, which must agree about it and about what there is then. Says whether it
    /// took place.
    async fn put(&mut self, write: &Write) -> bool {
        let mut expected = self.present().await;
        let applied = write.apply(&mut expected).is_ok();
        let written = self.store.write(&self.ward, write).await.unwrap();
        self.expected = Some(expected.clone());
        let there = if applied { Written::Yes(expected) } else { Written::No(expected) };
        assert_eq!(written, there, "{write:?}");
        applied
    }
}

/// The end of a lease whose request used so many percent of what it had reserved.
fn ended(lease: &Lease, ticket: Ticket, percent: u64) -> Ended {
    let tokens = Tokens(lease.tokens.0 * percent / 100);
    let charge = Charged { day: lease.day(), month: lease.month(), tokens, cost: NanoUsd(tokens.0 * 7) };
    Ended { lease: lease.clone(), ticket, charge }
}

/// A decision of some kind on a state.
fn decide(state: &Meter, limits: &Limits, now: Timestamp, n: usize, rng: &mut StdRng) -> Option<Write> {
    // Now and then from an epoch that has passed, or that the meter does not know of yet.
    let epoch = state.epoch.saturating_add_signed(rng.random_range(-1..=1));
    let asker = Asker { limits, epoch, now };
    let some = (rng.random_range(0..8), rng.random_range(0..=100));
    let lease = state.leases.iter().nth(some.0);
    match rng.random_range(0..10) {
        0 => state.admit(asker, &Want::Read, &[]).ok(),
        1..=4 => {
            let tokens = rng.random_range(0..2_000);
            let want = Want::Work {
                work: [Work::Chat, Work::Search, Work::Ingestion][n % 3],
                tokens: Tokens(tokens),
                cost: NanoUsd(tokens * 7),
                life_s: 38,
                request: format!("r-{n}.\"{}\"", n % 7),
            };
            let expired = state.expired(now);
            let collected: Vec<Ended> = expired.iter().map(|(l, t)| ended(l, *t, some.1)).collect();
            state.admit(asker, &want, &collected).ok()
        }
        5..=7 => lease.map(|(lease, ticket)| state.end(&[ended(lease, *ticket, some.1)])),
        _ => {
            let (lease, ticket) = lease?;
            let tokens = rng.random_range(0..3_000);
            let held = (lease, *ticket);
            state.extend(asker, held, Tokens(tokens), NanoUsd(tokens * 7)).ok().map(|(write, _)| write)
        }
    }
}

#[tokio::test]
async fn the_store_does_what_the_arithmetic_says() {
    let seed: u64 = env::parsed("SEED").unwrap_or_else(|_| entropy().random());
    eprintln!("SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let stack = Stack::start_with(Options { no_seed: true, ..Options::default() }).await;
    stack.provision(json!({"tenant_id": "acme", "tier": "professional", "company_name": "acme"})).await;
    let store = MeterStore::new(&stack.tables_access().await, Stack::table("meters"));
    #[expect(clippy::disallowed_methods, reason = "the test stands for what keeps the books")]
    let ward = Bookkeeper::driven_by_events().of("acme".parse().unwrap());

    let limits = Limits {
        requests_per_minute: 40,
        max_concurrent: 6,
        tokens_per_day: 30_000,
        monthly_token_budget: 200_000,
        ..Limits::of_tier(Tier::Professional)
    };
    let mut meters = Meters { store, ward, expected: None };
    let mut now = meters.present().await.now();

    // A lease of the same name is another ticket's, once a belated admission has arrived.
    let first = meters.present().await;
    let want = Want::Work {
        work: Work::Chat,
        tokens: Tokens(10),
        cost: NanoUsd(70),
        life_s: 38,
        request: "belated".to_owned(),
    };
    let admission = first.admit(Asker { limits: &limits, epoch: first.epoch, now }, &want, &[]).unwrap();
    assert!(meters.put(&admission).await);
    let state = meters.present().await;
    let (lease, ticket) = state.leases.first_key_value().unwrap();
    let asker = Asker { limits: &limits, epoch: state.epoch, now };
    let (extension, _) = state.extend(asker, (lease, *ticket), Tokens(20), NanoUsd(140)).unwrap();
    let end = state.end(&[ended(lease, *ticket, 50)]);
    assert!(meters.put(&end).await && !meters.put(&end).await);
    // Where the second is still the same; otherwise it does not arrive at all.
    if meters.put(&admission).await {
        assert!(!meters.put(&end).await && !meters.put(&extension).await);
    }

    let (mut earlier, mut states) = (vec![admission, extension, end], vec![meters.present().await]);
    let (mut held, mut failed) = (0, 0);
    for n in 0..WRITES {
        // Mostly no time passes or a little, sometimes so much that a day or a month ends.
        now = now.plus_millis(match rng.random_range(0..30) {
            0 => rng.random_range(0..40) * 3_600_000,
            1..=9 => rng.random_range(0..30_000),
            _ => 0,
        });
        // A decision on the present state, on one that has passed, or one that arrives again.
        let present = meters.present().await;
        let state = match rng.random_range(0..6) {
            0 => &states[rng.random_range(0..states.len())],
            _ => &present,
        };
        let write = match rng.random_range(0..6) {
            0 => earlier.get(earlier.len() - 1 - rng.random_range(0..earlier.len().min(6))).cloned(),
            1 => earlier.get(rng.random_range(0..earlier.len())).cloned(),
            _ => decide(state, &limits, now, n, &mut rng),
        };
        let Some(write) = write else { continue };
        *(if meters.put(&write).await { &mut held } else { &mut failed }) += 1;
        earlier.push(write);
        states.push(meters.present().await);
    }
    eprintln!("{held} writes took place, {failed} did not");
    assert!(held > 100 && failed > 100, "{held}, {failed}");
    assert_eq!(meters.present().await.status, TenantStatus::Active);
}
