//! The gate: whatever costs something passes it, and is settled through it.
//!
//! An admission is one conditional write of the tenant's meter. Settling is the ledger first, then the
//! meter: whatever stops in between, the ledger has the charge, and whoever finds the lease expired
//! applies it. The decisions are [`crate::meter`]'s; here is their order, and what is done when a store
//! fails.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rand::RngExt;
use tokio::time::Instant;

use crate::api_key::{ApiKey, Permission, verify};
use crate::aws::idempotency::IdempotencyStore;
use crate::aws::ledger::{Along, Entered, Ledger};
use crate::aws::meters::{MeterStore, Written};
use crate::aws::tenants::TenantStore;
use crate::aws::{Access, StoreError};
use crate::breaker::Breaker;
use crate::clock::{Clock, Timestamp};
use crate::denials::Denials;
use crate::env::{self, EnvError};
use crate::error::{ApiError, Code};
use crate::idempotency::{IdempotencyKey, Stored};
use crate::ids::{DocumentId, IssuerId};
use crate::ledger::{Action, Asked, Denial, Entry, Record};
use crate::meter::{Asker, Charged, Ended, Lease, Limit, Meter, Refusal, Ticket, Want, Work, Write};
use crate::random::entropy;
use crate::retry::Backoff;
use crate::scope::{Caller, Evidence, Isolation, RequestNote, ScopeError, Subject, TenantScope, Ward};
use crate::tenant::{Tenant, TenantId, TenantStatus, Tier};
use crate::units::{NanoUsd, Tokens};
use crate::valve::Shed;

/// A request's lease outlives its deadline by this: twice the skew of two clocks, and the time to say
/// that there was none.
const GRACE: Duration = Duration::from_secs(8);
/// How often a write is tried against others before the request is told to come again.
const CONTENTION: u32 = 24;
/// How often a request's decision is made anew, where keys change one after the other.
const MOST_RENEWALS: u32 = 4;
/// Meters remembered. An instance that sees more tenants than this reads some of them again.
const REMEMBERED: usize = 512;
/// How often a waiting request looks whether there is room, at least and at most.
const LOOK_EVERY_MS: std::ops::Range<u64> = 40..120;
/// How the end of a lease is retried. What cannot be ended expires.
const BACKOFF: Backoff =
    Backoff { attempts: 4, base: Duration::from_millis(40), cap: Duration::from_secs(1) };

/// The meters and the ledger together: what keeps both in step.
#[derive(Clone, Debug)]
pub struct Books {
    meters: MeterStore,
    ledger: Ledger,
    clock: Clock,
}

/// The gate of a function. One for its lifetime: it remembers the meters it has seen.
pub struct Gate {
    books: Books,
    tenants: TenantStore,
    isolation: Isolation,
    known: Mutex<HashMap<TenantId, Meter>>,
    breaker: Mutex<Breaker>,
    denials: Denials,
}

/// What a request needs at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Tokens of every kind.
    pub tokens: Tokens,
    /// Their cost.
    pub cost: NanoUsd,
}

/// An admitted request. It has to be settled; one that is dropped is charged at its bound once its
/// lease expires.
#[derive(Debug)]
#[must_use]
pub struct Admission {
    lease: Lease,
    ticket: Ticket,
}

impl Admission {
    /// What is reserved for it.
    pub fn reserved(&self) -> Tokens {
        self.lease.tokens
    }

    const fn held(&self) -> (&Lease, Ticket) {
        (&self.lease, self.ticket)
    }
}

impl Tier {
    /// How long a request waits for one of the tenant's own to end, before it is refused.
    pub(crate) const fn patience(self) -> Duration {
        Duration::from_millis(match self {
            Self::Free => 0,
            Self::Starter => 500,
            Self::Professional => 2_000,
            Self::Enterprise => 5_000,
        })
    }
}

impl Books {
    /// Over these stores.
    pub const fn new(meters: MeterStore, ledger: Ledger, clock: Clock) -> Self {
        Self { meters, ledger, clock }
    }

    /// The books that the environment describes: `METERS_TABLE` and `AUDIT_TABLE`.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub fn from_env(access: &Access, clock: Clock) -> Result<Self, EnvError> {
        let meters = MeterStore::new(access, env::table("METERS_TABLE")?);
        Ok(Self::new(meters, Ledger::new(access, env::table("AUDIT_TABLE")?), clock))
    }

    /// The meters.
    pub const fn meters(&self) -> &MeterStore {
        &self.meters
    }

    /// The ledger.
    pub const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What expired leases turned out to have used: what the ledger says, which is made to say
    /// something if it does not.
    async fn look_up(&self, subject: &impl Subject, state: &Meter) -> Result<Vec<Ended>, StoreError> {
        let now = self.clock.now();
        let mut collected = Vec::new();
        for (lease, ticket) in state.expired(now) {
            let record = Record::aborted(subject.tenant_id().clone(), &lease, ticket, now);
            let charge = match self.ledger.abort(ticket, &record).await? {
                Entered::Ours => {
                    tracing::warn!(
                        tenant.id = %subject.tenant_id(),
                        ticket = ticket.0,
                        request.aborted = lease.request,
                        tokens.reserved = lease.tokens.0,
                        "A request was never settled; it is charged at its bound"
                    );
                    record.charged()
                }
                Entered::Theirs(record) => record.charged(),
            };
            collected.push(Ended { lease, ticket, charge });
        }
        Ok(collected)
    }

    /// Collects every expired lease of a tenant, and says how many there were.
    ///
    /// # Errors
    /// If a store does not answer; what was collected stays so.
    pub async fn collect(&self, subject: &impl Subject, mut state: Meter) -> Result<usize, StoreError> {
        let mut count = 0;
        loop {
            let collected = self.look_up(subject, &state).await?;
            if collected.is_empty() {
                return Ok(count);
            }
            state = match self.meters.write(subject, &state.end(&collected)).await? {
                Written::Yes(state) => {
                    count += collected.len();
                    state
                }
                Written::No(state) => state,
            };
        }
    }

    /// Ends the lease of a ticket with what its request was charged. The ledger has it already, so a
    /// failure here only leaves the lease to whoever finds it expired.
    async fn release(
        &self,
        subject: &impl Subject,
        known: Option<Meter>,
        ticket: Ticket,
        charge: Charged,
    ) -> Option<Meter> {
        let mut failed = 0;
        let mut known = known.filter(|state| state.lease_of(ticket).is_some());
        loop {
            let outcome = async {
                let state = match known.take() {
                    Some(state) => state,
                    None => self.meters.read(subject).await?,
                };
                let Some(lease) = state.lease_of(ticket).cloned() else { return Ok(Written::Yes(state)) };
                self.meters.write(subject, &state.end(&[Ended { lease, ticket, charge }])).await
            };
            let error = match outcome.await {
                Ok(Written::Yes(state)) => return Some(state),
                Ok(Written::No(state)) => {
                    // It has ended, or moved; or day or month have turned.
                    known = Some(state);
                    continue;
                }
                Err(error) => error,
            };
            failed += 1;
            match BACKOFF.wait(failed, None, &mut entropy()) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => {
                    tracing::error!("A lease could not be ended and is left to expire: {error}");
                    return None;
                }
            }
        }
    }
}

/// Why an attempt admitted nothing.
enum Denied {
    Refused(Refusal),
    Failed(ApiError),
}

impl From<StoreError> for Denied {
    fn from(error: StoreError) -> Self {
        match error {
            // A tenant that is deleted has no meter, nor keys: which of the two it is, its record tells.
            StoreError::Missing { .. } => Self::Refused(Refusal::Stale),
            error => Self::Failed(error.into()),
        }
    }
}

impl Gate {
    /// A gate over these stores. `tenants` is asked where a decision has grown stale.
    pub fn new(books: Books, tenants: TenantStore, isolation: Isolation) -> Self {
        let denials = Denials::new(books.ledger.clone(), books.clock.clone());
        Self { books, tenants, isolation, known: Mutex::default(), breaker: Mutex::default(), denials }
    }

    /// The gate that the environment describes: `METERS_TABLE`, `AUDIT_TABLE`, `TENANTS_TABLE` and
    /// `TENANT_ISOLATION`.
    ///
    /// # Errors
    /// If a variable is absent or malformed; the error names it.
    pub fn from_env(access: &Access, clock: Clock) -> Result<Self, EnvError> {
        let tenants = TenantStore::new(access, env::table("TENANTS_TABLE")?);
        Ok(Self::new(Books::from_env(access, clock)?, tenants, env::parsed("TENANT_ISOLATION")?))
    }

    /// Claims a request's idempotency key, if it has one, and brings the first result if the request is a
    /// repeat. The key is the request's until `ends_at_s`, when Lambda ends it.
    ///
    /// # Errors
    /// The refusal that the caller is to see.
    pub async fn first_result(
        &self,
        scope: &mut TenantScope,
        store: &IdempotencyStore,
        key: Option<&IdempotencyKey>,
        ends_at_s: i64,
    ) -> Result<Option<Stored>, ApiError> {
        let Some(key) = key else { return Ok(None) };
        let now = self.books.clock.now();
        // What is refused from memory costs nothing, with a key or without.
        if let Some((limit, retry_at)) = self.breaker(|b| b.open(scope.tenant_id(), None, now)) {
            return Err(self.refused(scope, limit, Some(retry_at)).await);
        }
        let until_s = ends_at_s.saturating_add(GRACE.as_secs() as i64);
        let first = store.begin(scope, key, until_s, now).await?;
        if first.is_some() {
            self.recheck(scope).await?;
        }
        Ok(first)
    }

    /// Admits a request that reads: it counts towards `requests_per_minute`, and nothing else.
    ///
    /// # Errors
    /// The refusal that the caller is to see.
    pub async fn admit_read(&self, scope: &mut TenantScope) -> Result<(), ApiError> {
        Box::pin(self.pass(scope, |_| Ok(vec![Want::Read]), Instant::now())).await.map(drop)
    }

    /// Admits a request that will be settled by `deadline`, with the first of its needs that there is
    /// room for, and says which. Waits for one of the tenant's own requests to end, as its tier allows.
    /// `needs` is asked again if the tenant's record turns out to have changed: what was allowed before
    /// may not be now.
    ///
    /// # Errors
    /// The refusal that the caller is to see, or that of `needs`. A refused request has cost nothing.
    pub async fn admit(
        &self,
        scope: &mut TenantScope,
        work: Work,
        mut needs: impl FnMut(&TenantScope) -> Result<Vec<Need>, ApiError>,
        deadline: Instant,
    ) -> Result<(Admission, usize), ApiError> {
        let life = deadline.saturating_duration_since(Instant::now()) + GRACE;
        let life_s = u32::try_from(life.as_secs()).unwrap_or(u32::MAX);
        let wants = |scope: &TenantScope| {
            let want = |Need { tokens, cost }| {
                let request = scope.request_id().to_string();
                Want::Work { work, tokens, cost, life_s, request }
            };
            Ok(needs(scope)?.into_iter().map(want).collect())
        };
        let admitted = Box::pin(self.pass(scope, wants, deadline)).await?;
        admitted.ok_or_else(|| ApiError::unavailable("the meter"))
    }

    async fn pass(
        &self,
        scope: &mut TenantScope,
        mut asked: impl FnMut(&TenantScope) -> Result<Vec<Want>, ApiError>,
        deadline: Instant,
    ) -> Result<Option<(Admission, usize)>, ApiError> {
        let patience = (Instant::now() + scope.tier().patience()).min(deadline);
        let mut wants = asked(scope)?;
        let now = self.books.clock.now();
        if let Some((limit, retry_at)) = self.breaker(|b| b.open(scope.tenant_id(), least(&wants), now)) {
            return Err(self.refused(scope, limit, Some(retry_at)).await);
        }
        let mut renewals = 0;
        loop {
            let mut refusal = Refusal::Inactive;
            for (place, want) in wants.iter().enumerate() {
                match self.attempt(scope, want).await {
                    Ok(admission) => {
                        self.breaker(|b| b.passed(scope.tenant_id()));
                        scope.note().measure(|measured| measured.admitted = true);
                        return Ok(admission.map(|admission| (admission, place)));
                    }
                    Err(Denied::Failed(error)) => return Err(error),
                    Err(Denied::Refused(refused)) => refusal = refused,
                }
                if !matches!(refusal, Refusal::Limit { limit: Limit::Day | Limit::Month, .. }) {
                    break;
                }
            }
            match refusal {
                Refusal::Stale if renewals < MOST_RENEWALS => {
                    self.renew(scope).await?;
                    renewals += 1;
                    wants = asked(scope)?;
                }
                Refusal::Stale => return Err(ApiError::unavailable("the tenant's present state")),
                Refusal::Inactive => return Err(ScopeError::Suspended.into()),
                Refusal::Limit { limit: Limit::Concurrency, retry_at: Some(_) }
                    if Instant::now() < patience =>
                {
                    let wait = Duration::from_millis(entropy().random_range(LOOK_EVERY_MS));
                    tokio::time::sleep_until((Instant::now() + wait).min(patience)).await;
                }
                Refusal::Limit { limit, retry_at } => {
                    let now = self.books.clock.now();
                    self.breaker(|b| b.refused(scope.tenant_id(), limit, least(&wants), retry_at, now));
                    return Err(self.refused(scope, limit, retry_at).await);
                }
            }
        }
    }

    /// One admission, or a refusal that is certain: on the present state, whatever was remembered.
    async fn attempt(&self, scope: &TenantScope, want: &Want) -> Result<Option<Admission>, Denied> {
        let mut known = self.known(scope.tenant_id()).map(|state| (state, false));
        for round in 0..CONTENTION {
            let (state, fresh) = match known.take() {
                Some(known) => known,
                None => (self.books.meters.read(scope).await?, true),
            };
            let now = self.books.clock.now();
            if !fresh && !state.expired(now).is_empty() {
                // Others may have settled it; only the present state is worth a look into the ledger.
                continue;
            }
            let collected = self.books.look_up(scope, &state).await?;
            match state.admit(self.asker(scope, now), want, &collected) {
                Ok(write) => {
                    let (state, written) = match self.books.meters.write(scope, &write).await {
                        Ok(Written::Yes(state)) => (state, true),
                        Ok(Written::No(state)) => (state, false),
                        Err(error) => {
                            return self.admitted_after_all(scope, &write).await.ok_or(error.into());
                        }
                    };
                    self.remember(scope, &state);
                    match &write.gives {
                        None if written => return Ok(None),
                        None => {}
                        // A lease that is there although the write did nothing is that of the same
                        // write, whose answer was lost.
                        Some(lease) => {
                            if let Some(ticket) = state.leases.get(lease) {
                                return Ok(Some(Admission { lease: lease.clone(), ticket: *ticket }));
                            }
                        }
                    }
                    known = Some((state, true));
                }
                Err(refusal) => {
                    if !collected.is_empty() {
                        // So that whoever asks next does not look them up again.
                        self.books.meters.write(scope, &state.end(&collected)).await?;
                        continue;
                    }
                    // What is remembered may be from before the tenant's limits were raised, and they hold from
                    // the next request on. A flood is not asked for: the breaker answers it.
                    if fresh {
                        self.remember(scope, &state);
                        return Err(Denied::Refused(refusal));
                    }
                }
            }
            self.yield_to_others(round).await;
        }
        Err(Denied::Failed(ApiError::unavailable("the meter")))
    }

    /// The admission that a write made although no answer to it came, if a look at the meter shows it.
    async fn admitted_after_all(&self, scope: &TenantScope, write: &Write) -> Option<Option<Admission>> {
        let lease = write.gives.clone()?;
        let state = self.books.meters.read(scope).await.ok()?;
        let ticket = *state.leases.get(&lease)?;
        self.remember(scope, &state);
        Some(Some(Admission { lease, ticket }))
    }

    /// Changes what is reserved for an admitted request.
    ///
    /// # Errors
    /// The refusal that the caller is to see; then what was reserved before still is.
    pub async fn extend(
        &self,
        scope: &TenantScope,
        admission: &mut Admission,
        need: Need,
    ) -> Result<(), ApiError> {
        let mut known = self.known(scope.tenant_id()).map(|state| (state, false));
        for round in 0..CONTENTION {
            let (state, fresh) = match known.take() {
                Some(known) => known,
                None => (self.books.meters.read(scope).await?, true),
            };
            let now = self.books.clock.now();
            match state.extend(self.asker(scope, now), admission.held(), need.tokens, need.cost) {
                Ok((write, lease)) => {
                    let (state, written) = match self.books.meters.write(scope, &write).await? {
                        Written::Yes(state) => (state, true),
                        Written::No(state) => (state, false),
                    };
                    self.remember(scope, &state);
                    if written || state.leases.get(&lease) == Some(&admission.ticket) {
                        admission.lease = lease;
                        return Ok(());
                    }
                    known = Some((state, true));
                }
                Err(Refusal::Limit { limit, retry_at }) if fresh => {
                    self.remember(scope, &state);
                    return Err(self.refused(scope, limit, retry_at).await);
                }
                Err(_) if fresh => return Err(ApiError::unavailable("the request's admission")),
                Err(_) => {}
            }
            self.yield_to_others(round).await;
        }
        Err(ApiError::unavailable("the meter"))
    }

    /// The record of an admitted request that did what `entry` says, priced as of its admission.
    pub fn draft(&self, scope: &TenantScope, admission: &Admission, entry: Entry) -> Record {
        Record::settled(scope, &admission.lease, admission.ticket, entry, self.books.clock.now())
    }

    /// Settles an admitted request: its record and what goes `along` enter the ledger, then its lease
    /// ends. Returns the record that stands.
    ///
    /// # Errors
    /// If the ledger does not answer: then it is unknown whether the record is in it.
    pub async fn settle(
        &self,
        scope: &TenantScope,
        admission: Admission,
        record: Record,
        along: Along<'_>,
    ) -> Result<Record, ApiError> {
        let Admission { lease, ticket } = admission;
        let record = match Box::pin(self.books.ledger.settle(scope, ticket, &record, along)).await? {
            Entered::Ours => record,
            Entered::Theirs(theirs) => {
                tracing::warn!(ticket = ticket.0, "The request was settled too late; its bound was charged");
                *theirs
            }
        };
        scope.note().measure(|measured| measured.charged = Some((&record).into()));
        let charge = record.charged();
        if charge.tokens > lease.tokens {
            tracing::error!(
                alert = "reservation_exceeded",
                tokens.reserved = lease.tokens.0,
                tokens.charged = charge.tokens.0,
                "A request used more than was reserved for it"
            );
        }
        let known = self.known(scope.tenant_id());
        let release = Box::pin(self.books.release(scope, known, ticket, charge));
        if let Some(state) = release.await {
            self.remember(scope, &state);
        }
        Ok(record)
    }

    /// The refusal of a request that makes room at the model account for those of higher tiers.
    pub async fn shed(&self, scope: &TenantScope, shed: Shed) -> ApiError {
        let now = self.books.clock.now();
        scope.note().measure(|measured| measured.refused_by = Some(Limit::Account));
        self.denials.deny(&scope.ward(), Denial::Limit(Limit::Account), scope.asked()).await;
        ApiError {
            limit: Some(Limit::Account.name()),
            retry_after_ms: Some(shed.retry_at.millis_since(now).max(1)),
            ..ApiError::new(Code::Unavailable, "the model is in great demand; requests of this tier wait")
        }
    }

    /// Lets a caller in to what needs `permission`, and runs its request. Whatever comes of it, the
    /// tenant's standing is noted for the headers; unless this is not the tenant's own process, which
    /// touches nothing of the tenant's.
    ///
    /// # Errors
    /// Why it is not let in; or those of `run`.
    pub async fn enter<T>(
        &self,
        caller: Caller,
        permission: Permission,
        run: impl AsyncFnOnce(TenantScope) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let (ward, limits, note) = (caller.ward(), caller.limits().clone(), caller.note().clone());
        let asked = caller.asked();
        // Before anything of the tenant's is touched.
        caller.delivered(self.isolation)?;
        let work = async {
            let mut caller = caller;
            if caller.is_suspended() {
                // Switched on again it is let in at once, whatever API Gateway has kept.
                let (evidence, tenant) = self.present(&ward, caller.issuer_id(), caller.presented()).await?;
                caller.renew(&evidence, tenant)?;
            }
            match TenantScope::open(caller, permission, self.isolation, self.books.clock.now()) {
                // Boxed: what is nested in it is deep, and the compiler has its limits.
                Ok(scope) => Box::pin(run(scope)).await,
                Err(error) => Err(error.into()),
            }
        };
        let (result, ()) = tokio::join!(work, self.denials.catch_up());
        if let Err(error) = &result
            && let Some(denial) = Denial::of(error.code)
        {
            self.denials.deny(&ward, denial, asked.clone()).await;
        }
        self.alarm(&ward, &note, asked).await;
        if note.standing().is_none() {
            let known = match self.known(ward.tenant_id()) {
                Some(state) => Ok(state),
                None => self.books.meters.read(&ward).await,
            };
            match known {
                Ok(state) => note.set_standing(state.standing(&limits, self.books.clock.now())),
                Err(error) => tracing::warn!("The answer lacks its rate-limit headers: {error}"),
            }
        }
        result
    }

    /// Enters into the ledger what of other tenants has been met since a request was let in: for work that
    /// goes on after [`Gate::enter`] has answered.
    pub async fn look_back(&self, scope: &TenantScope) {
        self.alarm(&scope.ward(), scope.note(), scope.asked()).await;
    }

    async fn alarm(&self, ward: &Ward, note: &RequestNote, asked: Asked) {
        let foreign = note.take_foreign();
        if foreign == 0 {
            return;
        }
        let now = self.books.clock.now();
        let record = Record::isolation_alert(ward.tenant_id().clone(), foreign, now, asked);
        if let Err(error) = self.books.ledger.note(&record).await {
            tracing::error!("An isolation alert could not be entered into the ledger: {error}");
        }
    }

    /// Makes sure that a caller who is answered without an admission would be let in now, whatever API
    /// Gateway has kept: a first result is shown again to nobody who has been shut out since.
    ///
    /// # Errors
    /// The refusal that the caller is to see.
    pub async fn recheck(&self, scope: &mut TenantScope) -> Result<(), ApiError> {
        let state = match self.books.meters.read(scope).await {
            Ok(state) => state,
            Err(error @ StoreError::Missing { .. }) => {
                self.renew(scope).await?;
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        };
        self.remember(scope, &state);
        if state.status != TenantStatus::Active {
            return Err(ScopeError::Suspended.into());
        }
        if scope.epoch() < state.epoch { self.renew(scope).await } else { Ok(()) }
    }

    /// Reads the present records of the tenant and of the key, or the token's issuer, and decides anew: for
    /// what must not rest on a decision that API Gateway has kept.
    ///
    /// # Errors
    /// The refusal that the caller is to see.
    pub async fn renew(&self, scope: &mut TenantScope) -> Result<(), ApiError> {
        if scope.is_of_upload() {
            return Err(ApiError::unavailable("the tenant's present state"));
        }
        let epoch = scope.epoch();
        let (evidence, tenant) = self.present(scope, scope.issuer_id(), scope.presented()).await?;
        scope.renew(&evidence, tenant, self.books.clock.now())?;
        if epoch < scope.epoch() {
            tracing::info!(epoch = scope.epoch(), "A stale decision was made anew");
        }
        Ok(())
    }

    /// The present records of the key that a request presents, or of its token's issuer, and of the tenant.
    async fn present(
        &self,
        subject: &impl Subject,
        issuer: Option<&IssuerId>,
        presented: Option<&ApiKey>,
    ) -> Result<(Evidence, Tenant), ApiError> {
        let invalid = || ApiError::new(Code::InvalidKey, "not a valid API key or token");
        if let Some(issuer) = issuer {
            let (tenant, issuer) = self.tenants.issued_by(subject, issuer).await?;
            return Ok((Evidence::Issuer(issuer.ok_or_else(invalid)?), tenant.ok_or_else(invalid)?));
        }
        let presented = presented.ok_or_else(invalid)?;
        let claimed = self.tenants.claimed_by(presented).await?;
        let status = claimed.tenant.as_ref().map(|tenant| tenant.status);
        let key = verify(presented, claimed.key, status, self.books.clock.now()).map_err(|_| invalid())?;
        Ok((Evidence::Key(key), claimed.tenant.ok_or_else(invalid)?))
    }

    /// The refusal by a limit, as the caller sees it; counted, and written down when it is due.
    async fn refused(&self, scope: &TenantScope, limit: Limit, retry_at: Option<Timestamp>) -> ApiError {
        let now = self.books.clock.now();
        scope.note().measure(|measured| measured.refused_by = Some(limit));
        self.denials.deny(&scope.ward(), Denial::Limit(limit), scope.asked()).await;
        let code = match limit {
            Limit::Requests | Limit::Account => Code::RateLimitExceeded,
            Limit::Concurrency => Code::ConcurrencyLimitExceeded,
            Limit::Day | Limit::Month => Code::TokenBudgetExceeded,
        };
        let limits = scope.limits();
        let value = match limit {
            Limit::Requests => u64::from(limits.requests_per_minute),
            Limit::Concurrency => u64::from(limits.max_concurrent),
            Limit::Day => limits.tokens_per_day,
            Limit::Month => limits.monthly_token_budget,
            Limit::Account => 0,
        };
        let message = match retry_at {
            Some(_) => format!("the tenant's limit {} of {value} is reached", limit.name()),
            None => format!("the request does not fit the tenant's limit {} of {value}", limit.name()),
        };
        // On the meter's clock, which may be ahead of this machine's.
        let seen = self.known(scope.tenant_id()).map_or(now, |state| now.max(state.now()));
        ApiError {
            limit: Some(limit.name()),
            retry_after_ms: retry_at.map(|at| at.millis_since(seen).max(1)),
            ..ApiError::new(code, message)
        }
    }

    /// Writes down what is still only remembered: the process is about to end.
    pub async fn close(&self) {
        self.denials.close().await;
    }

    /// Enters what a tenant does into the ledger, where it costs nothing and has no ticket. Whoever is
    /// shown something is on record before.
    ///
    /// # Errors
    /// If the ledger does not answer.
    pub async fn note(
        &self,
        scope: &TenantScope,
        action: Action,
        documents: Vec<DocumentId>,
    ) -> Result<(), ApiError> {
        let record = Record::event(scope, action, documents, self.books.clock.now());
        Ok(self.books.ledger.note(&record).await?)
    }

    fn asker<'a>(&self, scope: &'a TenantScope, now: Timestamp) -> Asker<'a> {
        Asker { limits: scope.limits(), epoch: scope.epoch(), now }
    }

    fn known(&self, tenant: &TenantId) -> Option<Meter> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(tenant).cloned()
    }

    fn remember(&self, scope: &TenantScope, state: &Meter) {
        scope.note().set_standing(state.standing(scope.limits(), self.books.clock.now()));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED && !known.contains_key(scope.tenant_id()) {
            known.clear();
        }
        known.insert(scope.tenant_id().clone(), state.clone());
    }

    fn breaker<T>(&self, with: impl FnOnce(&mut Breaker) -> T) -> T {
        with(&mut self.breaker.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The first rounds at once: losing to another means that the state is known now.
    async fn yield_to_others(&self, round: u32) {
        if round >= 2 {
            let wait = entropy().random_range(0..=u64::from(round.min(10)) * 3);
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
    }
}

/// The fewest tokens that a request can do with; none if it only reads.
fn least(wants: &[Want]) -> Option<Tokens> {
    let tokens = |want: &Want| match want {
        Want::Read => None,
        Want::Work { tokens, .. } => Some(*tokens),
    };
    wants.iter().filter_map(tokens).min()
}
