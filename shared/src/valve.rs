//! The valve before a model account that tenants share: as the account fills, requests of the lower
//! tiers wait and are refused first. Nothing is known of a tenant's own account here, and nothing of
//! it waits.
//!
//! What instances know of the account is noted in a table, read at most once a second each. It is a
//! measure to act on, not an account to settle: if the table does not answer, requests go on.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt;
use tokio::time::{Instant, timeout};

use crate::aws::accounts::{AccountStore, SHARDS, Shard};
use crate::aws::{Access, StoreError};
use crate::clock::{Clock, Timestamp};
use crate::env::{self, EnvError};
use crate::pressure::{self, Account, Fill, Notes};
use crate::random::{base62, entropy};
use crate::tenant::{ModelAccount, Tier};

/// The account that tenants share.
const SHARED: &str = "shared";
/// How old what is known may be, in milliseconds.
const READ_EVERY_MS: u64 = 1_000;
/// How often a waiting request looks again.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a request waits for the table. It goes on without.
const PATIENCE: Duration = Duration::from_millis(300);
/// A note about limits is worth a write from this fill on.
const WORTH_NOTING: Fill = Fill(600);

/// The valve of one instance.
#[derive(Debug)]
pub struct Valve {
    accounts: AccountStore,
    ceiling: Option<u32>,
    shard: u32,
    clock: Clock,
    known: Mutex<(Timestamp, Account)>,
}

/// A call in flight, as it is noted.
#[derive(Debug, Default)]
pub struct Call(Option<String>);

/// The account is too full for a request of its tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shed {
    /// When to come again.
    pub retry_at: Timestamp,
}

impl Valve {
    /// The valve that the environment describes: `ACCOUNTS_TABLE`, and `MODEL_MAX_IN_FLIGHT`, where 0
    /// means that calls in flight are neither bounded nor counted.
    ///
    /// # Errors
    /// If a variable is absent or malformed; the error names it.
    pub fn from_env(access: &Access, clock: Clock) -> Result<Self, EnvError> {
        let ceiling: u32 = env::parsed("MODEL_MAX_IN_FLIGHT")?;
        Ok(Self {
            accounts: AccountStore::new(access, env::table("ACCOUNTS_TABLE")?),
            ceiling: Some(ceiling).filter(|ceiling| *ceiling > 0),
            shard: entropy().random_range(0..SHARDS),
            clock,
            known: Mutex::new((Timestamp::from_millis(0), Account::default())),
        })
    }

    /// Lets a request of `tier` by, at once or as soon as there is room within the tier's patience.
    ///
    /// # Errors
    /// [`Shed`] if there is not.
    pub async fn pass(&self, account: ModelAccount, tier: Tier, deadline: Instant) -> Result<(), Shed> {
        if account == ModelAccount::Own {
            return Ok(());
        }
        let patience = (Instant::now() + tier.patience()).min(deadline);
        loop {
            let account = self.account().await;
            let now = self.clock.now();
            if account.fill(now) < tier.goes_ahead_below() {
                return Ok(());
            }
            if Instant::now() >= patience {
                return match tier {
                    Tier::Enterprise => Ok(()),
                    _ => {
                        let soon = now.plus_millis(1_000);
                        Err(Shed { retry_at: account.overloaded_until(now).map_or(soon, |at| at.max(soon)) })
                    }
                };
            }
            tokio::time::sleep_until((Instant::now() + LOOK_EVERY).min(patience)).await;
        }
    }

    /// Notes that a call begins, which ends by `ends_at_s`.
    pub async fn begin(&self, account: ModelAccount, ends_at_s: i64) -> Call {
        if account == ModelAccount::Own || self.ceiling.is_none() {
            return Call(None);
        }
        let id = base62(10, &mut entropy());
        let noted = bounded(self.accounts.begin(self.place(), &id, ends_at_s)).await;
        self.learn(noted.map(|()| Notes { calls: vec![ends_at_s], ..Notes::default() }));
        Call(Some(id))
    }

    /// Notes that a call has ended.
    pub async fn end(&self, call: Call) {
        let Call(Some(id)) = call else { return };
        if let Err(error) = bounded(self.accounts.end(self.place(), &id, self.clock.now())).await {
            tracing::warn!("The end of a model call could not be noted; it lapses by itself: {error}");
        }
    }

    /// Notes what an answer of the service says about its limits.
    pub async fn note_limits(&self, account: ModelAccount, fill: Option<Fill>) {
        let worth_noting = |fill: &Fill| account == ModelAccount::Shared && *fill >= WORTH_NOTING;
        let Some(fill) = fill.filter(worth_noting) else { return };
        let until = pressure::believed_until(self.clock.now());
        let noted = bounded(self.accounts.note_limits(self.place(), fill, until)).await;
        self.learn(noted.map(|()| Notes { limits: Some((fill, until)), ..Notes::default() }));
    }

    /// Notes that the service says it is overloaded.
    pub async fn note_overloaded(&self, account: ModelAccount, retry_after_ms: Option<u64>) {
        if account == ModelAccount::Own {
            return;
        }
        let until = pressure::left_alone_until(self.clock.now(), retry_after_ms);
        let noted = bounded(self.accounts.note_overloaded(self.place(), until)).await;
        self.learn(noted.map(|()| Notes { overloaded_until: Some(until), ..Notes::default() }));
    }

    const fn place(&self) -> Shard<'_> {
        Shard { account: SHARED, shard: self.shard }
    }

    /// What is known of the account, a second old at most.
    async fn account(&self) -> Account {
        let now = self.clock.now();
        let known = {
            let mut known = self.known();
            let fresh = now.millis_since(known.0) < READ_EVERY_MS;
            // Whoever reads says so first, so that others do not.
            known.0 = if fresh { known.0 } else { now };
            fresh.then(|| known.1.clone())
        };
        if let Some(known) = known {
            return known;
        }
        match bounded(self.accounts.read(SHARED)).await {
            Ok(notes) => {
                let account = Account { notes, ceiling: self.ceiling };
                self.known().1 = account.clone();
                account
            }
            Err(error) => {
                tracing::warn!("The pressure on the model account is unknown: {error}");
                Account::default()
            }
        }
    }

    /// Takes in what this instance has noted, without waiting for the next reading.
    fn learn(&self, noted: Result<Notes, NoAnswer>) {
        match noted {
            Ok(notes) => {
                let mut known = self.known();
                known.1.ceiling = self.ceiling;
                known.1.notes.push(notes);
            }
            Err(error) => tracing::warn!("A note about the model account was lost: {error}"),
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, (Timestamp, Account)> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The table did not answer, or not in time.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("{0}")]
    Failed(#[from] StoreError),
    #[error("the table takes too long")]
    Late(#[from] tokio::time::error::Elapsed),
}

async fn bounded<T>(call: impl Future<Output = Result<T, StoreError>>) -> Result<T, NoAnswer> {
    // Boxed: a future of the SDK is large, and a request holds several.
    Ok(timeout(PATIENCE, Box::pin(call)).await??)
}
