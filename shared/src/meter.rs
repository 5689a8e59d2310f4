//! The meter: one item per tenant that every admission goes through. Here is its arithmetic, pure.
//!
//! A decision is taken on the state last known and comes out as a [`Write`]: a condition and its
//! effects, as data. [`crate::aws::meters`] says it in DynamoDB's words, [`Write::apply`] says what it
//! means; the tests, the exhaustive model and the benchmark run on the latter, and a test shows that
//! both agree. Since every write is conditional on what the decision rested on, a decision on a state
//! that has passed changes nothing.
//!
//! The window: admissions are counted in whole seconds. An admission in second `s` is allowed if those
//! of `s` and of the 60 seconds before are fewer than the limit; any 60 s touch at most these 61, so no
//! 60 s hold more than the limit. The clock is the item's own: the latest second that anybody has
//! shown it. It never goes back.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use time::{Month, OffsetDateTime};

use crate::clock::Timestamp;
use crate::limits::Limits;
use crate::tenant::TenantStatus;
use crate::units::{NanoUsd, Tokens};

/// Seconds before the current one that count towards the limit of a minute.
const PAST_SECONDS: usize = 60;
/// Leases that one write collects. The others wait for the next one; an expression has its bounds.
pub const MOST_COLLECTED: usize = 8;
/// What a caller is told where room comes as soon as any request in flight ends.
const SOON_MS: u64 = 1_000;

/// A UTC day: days since the Unix epoch; written `2026-11-24`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Day(i64);

impl Day {
    /// The day of a second.
    pub const fn of(second: i64) -> Self {
        Self(second.div_euclid(86_400))
    }

    /// The first second of the next day.
    const fn end(self) -> i64 {
        self.0.saturating_add(1).saturating_mul(86_400)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let date = at_second(self.0.saturating_mul(86_400)).to_datetime();
        write!(f, "{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day())
    }
}

/// A text that is no day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a day is written yyyy-mm-dd")]
pub struct InvalidDay;

impl FromStr for Day {
    type Err = InvalidDay;

    fn from_str(text: &str) -> Result<Self, InvalidDay> {
        let start = Timestamp::parse(&format!("{text}T00:00:00Z")).map_err(|_| InvalidDay)?;
        Ok(Self::of(start.as_seconds()))
    }
}

/// A UTC calendar month, as `202611`; written `2026-11`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BillingMonth(u32);

/// A text that is no month.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a month is written yyyy-mm")]
pub struct InvalidMonth;

impl BillingMonth {
    /// The month of a second.
    pub fn of(second: i64) -> Self {
        let date = Timestamp::from_millis(second.saturating_mul(1_000)).to_datetime();
        Self(u32::try_from(date.year()).unwrap_or(0) * 100 + u32::from(u8::from(date.month())))
    }

    /// The month before.
    #[must_use]
    pub const fn previous(self) -> Self {
        if self.0 % 100 == 1 { Self(self.0 - 100 + 11) } else { Self(self.0 - 1) }
    }

    /// The first second of the next month.
    fn end(self) -> i64 {
        let (year, month) = (self.0 / 100, self.0 % 100);
        let (year, month) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
        let first = || {
            let month = Month::try_from(u8::try_from(month).ok()?).ok()?;
            time::Date::from_calendar_date(i32::try_from(year).ok()?, month, 1).ok()
        };
        first().map_or(i64::MAX, |date| OffsetDateTime::new_utc(date, time::Time::MIDNIGHT).unix_timestamp())
    }
}

impl fmt::Display for BillingMonth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.0 / 100, self.0 % 100)
    }
}

impl FromStr for BillingMonth {
    type Err = InvalidMonth;

    fn from_str(text: &str) -> Result<Self, InvalidMonth> {
        let (year, month) = text.split_once('-').ok_or(InvalidMonth)?;
        let digits = |text: &str, len| {
            let plain = text.len() == len && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u32>().ok().filter(|_| plain).ok_or(InvalidMonth)
        };
        let (year, month) = (digits(year, 4)?, digits(month, 2)?);
        if (1..=12).contains(&month) { Ok(Self(year * 100 + month)) } else { Err(InvalidMonth) }
    }
}

/// The number of an admission: 1, 2, 3 … for each tenant, without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ticket(pub u64);

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What an admission is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// A question to the model.
    Chat,
    /// A search.
    Search,
    /// Documents to store.
    Ingestion,
}

impl Work {
    const fn letter(self) -> char {
        match self {
            Self::Chat => 'c',
            Self::Search => 's',
            Self::Ingestion => 'i',
        }
    }
}

/// What an admitted request holds until it is settled: a key of the item's map `leases`, whose value
/// is the request's ticket. The key says all that whoever finds it expired needs to know.
///
/// Written `<work>.<admitted at>.<lives for>.<tokens>.<nano-dollars>.<request>`, seconds and integers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Lease {
    /// What it is for.
    pub work: Work,
    /// The second of the meter's clock in which it was admitted. Its day and month are charged.
    pub admitted_at_s: i64,
    /// Seconds until it expires.
    pub life_s: u32,
    /// The most tokens that the request can use.
    pub tokens: Tokens,
    /// The most that these can cost.
    pub cost: NanoUsd,
    /// The request.
    pub request: String,
}

/// A text that is no lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a lease of the meter does not parse")]
pub struct InvalidLease;

impl Lease {
    /// The first second in which it has expired.
    pub const fn expires_at_s(&self) -> i64 {
        self.admitted_at_s.saturating_add(self.life_s as i64)
    }

    /// The day that is charged.
    pub const fn day(&self) -> Day {
        Day::of(self.admitted_at_s)
    }

    /// The month that is charged.
    pub fn month(&self) -> BillingMonth {
        BillingMonth::of(self.admitted_at_s)
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { work, admitted_at_s, life_s, tokens, cost, request } = self;
        write!(f, "{}.{admitted_at_s}.{life_s}.{}.{}.{request}", work.letter(), tokens.0, cost.0)
    }
}

impl FromStr for Lease {
    type Err = InvalidLease;

    fn from_str(text: &str) -> Result<Self, InvalidLease> {
        fn number<T: FromStr>(text: Option<&str>) -> Result<T, InvalidLease> {
            text.and_then(|text| text.parse().ok()).ok_or(InvalidLease)
        }
        let mut parts = text.splitn(6, '.');
        let work = match parts.next() {
            Some("c") => Work::Chat,
            Some("s") => Work::Search,
            Some("i") => Work::Ingestion,
            _ => return Err(InvalidLease),
        };
        Ok(Self {
            work,
            admitted_at_s: number(parts.next())?,
            life_s: number(parts.next())?,
            tokens: Tokens(number(parts.next())?),
            cost: NanoUsd(number(parts.next())?),
            request: parts.next().filter(|id| !id.is_empty()).ok_or(InvalidLease)?.to_owned(),
        })
    }
}

impl TryFrom<String> for Lease {
    type Error = InvalidLease;
    fn try_from(text: String) -> Result<Self, InvalidLease> {
        text.parse()
    }
}

impl From<Lease> for String {
    fn from(lease: Lease) -> Self {
        lease.to_string()
    }
}

/// Admissions in each of the 60 seconds before the current one, the latest first. Written as numbers
/// between commas, without the zeros at the end: an idle tenant's is empty, a busy one's 120 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Past(Vec<u32>);

/// A text that is no list of counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the counts of the meter do not parse")]
pub struct InvalidPast;

impl Past {
    /// All of them.
    fn sum(&self) -> u64 {
        self.0.iter().copied().map(u64::from).sum()
    }

    /// As it looks `seconds` later, where `n` were admitted in what was the current second.
    fn turned(&self, n: u32, seconds: u64) -> Self {
        let gap = usize::try_from(seconds.saturating_sub(1)).unwrap_or(usize::MAX).min(PAST_SECONDS);
        let mut counts = vec![0; gap];
        counts.push(n);
        counts.extend(&self.0);
        counts.truncate(PAST_SECONDS);
        while counts.last() == Some(&0) {
            counts.pop();
        }
        Self(counts)
    }

    /// How many seconds later the counts before the then current second are fewer than `most`, if the
    /// current second stays at `n`. `most` must be positive.
    fn seconds_until_below(&self, n: u32, most: u64) -> u64 {
        let mut left = self.sum() + u64::from(n);
        // The oldest leave first: the count at place i leaves 60 - i seconds from now, n after 61.
        for (place, count) in self.0.iter().enumerate().rev() {
            left -= u64::from(*count);
            if left < most {
                return (PAST_SECONDS - place) as u64;
            }
        }
        PAST_SECONDS as u64 + 1
    }
}

impl TryFrom<String> for Past {
    type Error = InvalidPast;

    fn try_from(text: String) -> Result<Self, InvalidPast> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let counts: Result<Vec<u32>, _> = text.split(',').map(str::parse).collect();
        counts.ok().filter(|counts| counts.len() <= PAST_SECONDS).map(Self).ok_or(InvalidPast)
    }
}

impl From<Past> for String {
    fn from(past: Past) -> Self {
        let counts: Vec<String> = past.0.iter().map(u32::to_string).collect();
        counts.join(",")
    }
}

/// A tenant's item of table `meters`. Under a kilobyte, and therefore one write unit, up to a dozen
/// requests in flight.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Meter {
    /// Whether anything is admitted at all.
    pub status: TenantStatus,
    /// The epoch of the tenant's record that this item knows of. A decision made in an earlier one is
    /// not acted upon.
    pub epoch: u64,
    /// The last ticket.
    pub seq: u64,
    /// The current second.
    pub bucket: i64,
    /// Admissions in it.
    pub n: u32,
    /// Admissions in the seconds before.
    pub past: Past,
    /// The current day.
    pub day: Day,
    /// Tokens settled and reserved of it.
    pub day_tokens: u64,
    /// The current month.
    pub month: BillingMonth,
    /// Tokens settled and reserved of it.
    pub month_tokens: u64,
    /// Nano-dollars settled of it.
    pub month_cost: u64,
    /// What is in flight.
    pub leases: BTreeMap<Lease, Ticket>,
}

/// What a tenant asks to be admitted for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// To read. It counts as a request, and is nothing else.
    Read,
    /// To use tokens and money: it gets a lease and a ticket.
    Work {
        /// What for.
        work: Work,
        /// The most tokens.
        tokens: Tokens,
        /// The most that they cost.
        cost: NanoUsd,
        /// Seconds within which it is settled, or has failed.
        life_s: u32,
        /// The request.
        request: String,
    },
}

/// Who asks, and when.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// The tenant's limits.
    pub limits: &'a Limits,
    /// The epoch of the decision that the limits are from.
    pub epoch: u64,
    /// The asking machine's clock.
    pub now: Timestamp,
}

/// Which limit refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Limit {
    /// `requests_per_minute`
    Requests,
    /// `max_concurrent`
    Concurrency,
    /// `tokens_per_day`
    Day,
    /// `monthly_token_budget`
    Month,
    /// The model account, which tenants share. Not the meter's, and of no tenant.
    Account,
}

impl Limit {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Requests, Self::Concurrency, Self::Day, Self::Month, Self::Account];

    /// Its name, as in [`Limits`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests_per_minute",
            Self::Concurrency => "max_concurrent",
            Self::Day => "tokens_per_day",
            Self::Month => "monthly_token_budget",
            Self::Account => "model_account",
        }
    }
}

/// Why nothing is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The tenant is not active.
    Inactive,
    /// The decision is from an earlier epoch than the meter knows.
    Stale,
    /// A limit.
    Limit {
        /// Which.
        limit: Limit,
        /// When there may be room, as an instant of the meter's clock; none if there never is.
        retry_at: Option<Timestamp>,
    },
}

/// A lease that ends, and what its request turned out to have used: what its ticket's record says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ended {
    /// The lease.
    pub lease: Lease,
    /// Its ticket. A write that arrives late may have given a lease of the same name to another.
    pub ticket: Ticket,
    /// What is charged for it.
    pub charge: Charged,
}

/// What is charged for a request in the end, and to when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Charged {
    /// The day: that of the lease when its record was written.
    pub day: Day,
    /// The month.
    pub month: BillingMonth,
    /// Tokens of every kind.
    pub tokens: Tokens,
    /// Their cost.
    pub cost: NanoUsd,
}

/// A conditional write of the item: all of it or nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Write {
    /// The tenant is active, and its epoch at most this.
    pub active_in: Option<u64>,
    /// The current second is this one.
    pub bucket: Option<i64>,
    /// Admissions in the current second are exactly so many.
    pub n_is: Option<u32>,
    /// Admissions in the current second are fewer than this.
    pub n_below: Option<u64>,
    /// Leases are fewer than this.
    pub leases_below: Option<u32>,
    /// The day's tokens are at most this.
    pub day_at_most: Option<u64>,
    /// The month's tokens are at most this.
    pub month_at_most: Option<u64>,
    /// The day and month are these, as the changes of their tokens below expect.
    pub period: Option<(Day, BillingMonth)>,
    /// The clock moves on.
    pub turn: Option<Turn>,
    /// One more admission in the current second.
    pub counts: bool,
    /// A lease to give, with the next ticket. It must not be there.
    pub gives: Option<Lease>,
    /// A lease that takes another's place and ticket.
    pub replaces: Option<Replacement>,
    /// Leases to end. Each must be there, under its ticket.
    pub ends: Vec<(Lease, Ticket)>,
    /// Added to the day's tokens.
    pub day_tokens: i64,
    /// Added to the month's tokens.
    pub month_tokens: i64,
    /// Added to the month's cost.
    pub month_cost: u64,
}

/// A lease takes another's place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replacement {
    /// The lease, which must be there under this ticket.
    pub old: Lease,
    /// The ticket, which stays.
    pub ticket: Ticket,
    /// The lease that is there then, and must not be before, unless it is the same.
    pub new: Lease,
}

/// The clock moves on to another second.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Turn {
    /// That second.
    pub bucket: i64,
    /// The admissions before it.
    pub past: Past,
    /// The day that begins with it, if one does: its tokens start at none.
    pub day: Option<Day>,
    /// The month that begins with it, if one does: its tokens and cost start at none.
    pub month: Option<BillingMonth>,
}

/// A write's condition does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the meter is not in the state that the write expects")]
pub struct ConditionFailed;

impl Meter {
    /// A new tenant's meter, as of `now`.
    pub fn new(status: TenantStatus, epoch: u64, now: Timestamp) -> Self {
        let bucket = now.as_seconds();
        Self {
            status,
            epoch,
            seq: 0,
            bucket,
            n: 0,
            past: Past::default(),
            day: Day::of(bucket),
            day_tokens: 0,
            month: BillingMonth::of(bucket),
            month_tokens: 0,
            month_cost: 0,
            leases: BTreeMap::new(),
        }
    }

    /// The second of the meter's clock, once a machine has shown it `now`.
    pub fn second(&self, now: Timestamp) -> i64 {
        self.bucket.max(now.as_seconds())
    }

    /// The meter's own clock: the beginning of its current second.
    pub const fn now(&self) -> Timestamp {
        at_second(self.bucket)
    }

    /// The instant of the meter's clock, once a machine has shown it `now`.
    fn instant(&self, now: Timestamp) -> Timestamp {
        now.max(at_second(self.bucket))
    }

    /// Leases whose time is up, with their tickets; at most as many as one write collects. They have
    /// to be looked up in the ledger before they are collected.
    pub fn expired(&self, now: Timestamp) -> Vec<(Lease, Ticket)> {
        let second = self.second(now);
        let expired = self.leases.iter().filter(|(lease, _)| lease.expires_at_s() <= second);
        expired.take(MOST_COLLECTED).map(|(lease, ticket)| (lease.clone(), *ticket)).collect()
    }

    /// What is in flight of the current day and of the current month.
    fn reserved(&self) -> (u64, u64) {
        let sum = |of: &dyn Fn(&Lease) -> bool| {
            self.leases.keys().filter(|lease| of(lease)).map(|lease| lease.tokens.0).sum()
        };
        (sum(&|lease| lease.day() == self.day), sum(&|lease| lease.month() == self.month))
    }

    /// The item as it looks to somebody whose clock says `now`: turned, with nothing admitted since.
    fn turned(&self, now: Timestamp) -> (Self, Option<Turn>) {
        let second = self.second(now);
        if second == self.bucket {
            return (self.clone(), None);
        }
        let (day, month) = (Day::of(second), BillingMonth::of(second));
        let turn = Turn {
            bucket: second,
            past: self.past.turned(self.n, second.abs_diff(self.bucket)),
            day: (day != self.day).then_some(day),
            month: (month != self.month).then_some(month),
        };
        let mut turned = self.clone();
        turned.turn(&turn);
        (turned, Some(turn))
    }

    fn turn(&mut self, turn: &Turn) {
        self.bucket = turn.bucket;
        self.n = 0;
        self.past = turn.past.clone();
        if let Some(day) = turn.day {
            (self.day, self.day_tokens) = (day, 0);
        }
        if let Some(month) = turn.month {
            (self.month, self.month_tokens, self.month_cost) = (month, 0, 0);
        }
    }

    /// Decides about an admission on this state: the write that makes it, or why there is none. The
    /// write also turns the clock and collects leases, as far as they are `collected`.
    ///
    /// # Errors
    /// [`Refusal`]. It is certain only if this state is the present one, except for
    /// [`Limit::Requests`]: admissions are never taken back, so a refusal by their number stays right
    /// until its `retry_at`.
    pub fn admit(&self, asker: Asker<'_>, want: &Want, collected: &[Ended]) -> Result<Write, Refusal> {
        let Asker { limits, epoch, now } = asker;
        if self.status != TenantStatus::Active {
            return Err(Refusal::Inactive);
        }
        if epoch < self.epoch {
            return Err(Refusal::Stale);
        }
        let (mut state, turn) = self.turned(now);
        let mut write = Write {
            active_in: Some(epoch),
            bucket: Some(self.bucket),
            n_is: turn.is_some().then_some(self.n),
            counts: true,
            turn,
            ..Write::default()
        };
        write.collect(&mut state, collected);

        let most = u64::from(limits.requests_per_minute);
        let room = most.saturating_sub(state.past.sum());
        if u64::from(state.n) >= room {
            let wait = (most > 0).then(|| state.past.seconds_until_below(state.n, most));
            let retry_at = wait.map(|seconds| at_second(state.bucket + i64::try_from(seconds).unwrap_or(61)));
            return Err(Refusal::Limit { limit: Limit::Requests, retry_at });
        }
        if write.turn.is_none() {
            write.n_below = Some(room);
        }
        let Want::Work { work, tokens, cost, life_s, request } = want else { return Ok(write) };

        if state.leases.len() >= limits.max_concurrent as usize {
            let soon = state.instant(now).plus_millis(SOON_MS as i64);
            let retry_at = (limits.max_concurrent > 0).then_some(soon);
            return Err(Refusal::Limit { limit: Limit::Concurrency, retry_at });
        }
        // The write's own changes take place after its condition, which sees the leases to be ended.
        write.leases_below = Some(limits.max_concurrent.saturating_add(write.ends.len() as u32));
        let (day_change, month_change) = (write.day_tokens, write.month_tokens);
        let budget = state.budget(limits, tokens.0, now)?;
        write.day_at_most =
            write.turn.as_ref().is_none_or(|t| t.day.is_none()).then(|| less(budget.0, day_change));
        write.month_at_most =
            write.turn.as_ref().is_none_or(|t| t.month.is_none()).then(|| less(budget.1, month_change));
        let added = i64::try_from(tokens.0).unwrap_or(i64::MAX);
        write.day_tokens = day_change.saturating_add(added);
        write.month_tokens = month_change.saturating_add(added);
        write.gives = Some(Lease {
            work: *work,
            admitted_at_s: state.bucket,
            life_s: *life_s,
            tokens: *tokens,
            cost: *cost,
            request: request.clone(),
        });
        Ok(write)
    }

    /// Decides about a lease that needs `tokens` and `cost` instead of what it holds. One that was
    /// admitted on an earlier day moves to the present one: the earlier day's total is closed.
    ///
    /// # Errors
    /// [`Refusal`]; [`Refusal::Stale`] if the lease is gone or has expired.
    pub fn extend(
        &self,
        asker: Asker<'_>,
        (lease, ticket): (&Lease, Ticket),
        tokens: Tokens,
        cost: NanoUsd,
    ) -> Result<(Write, Lease), Refusal> {
        if self.leases.get(lease) != Some(&ticket) || lease.expires_at_s() <= self.second(asker.now) {
            return Err(Refusal::Stale);
        }
        let (same_day, same_month) = (lease.day() == self.day, lease.month() == self.month);
        let mut longer = Lease { tokens, cost, ..lease.clone() };
        if !same_day {
            let left = lease.expires_at_s().saturating_sub(self.bucket).max(0);
            longer.admitted_at_s = self.bucket;
            longer.life_s = u32::try_from(left).unwrap_or(u32::MAX);
        }
        let held = |same: bool| if same { lease.tokens.0 } else { 0 };
        let mut without = self.clone();
        without.day_tokens = without.day_tokens.saturating_sub(held(same_day));
        without.month_tokens = without.month_tokens.saturating_sub(held(same_month));
        without.leases.remove(lease);
        let budget = without.budget(asker.limits, tokens.0, asker.now)?;
        let change = |same: bool| difference(tokens.0, held(same));
        let write = Write {
            period: Some((self.day, self.month)),
            day_at_most: Some(budget.0.saturating_add(held(same_day))),
            month_at_most: Some(budget.1.saturating_add(held(same_month))),
            replaces: Some(Replacement { old: lease.clone(), ticket, new: longer.clone() }),
            day_tokens: change(same_day),
            month_tokens: change(same_month),
            ..Write::default()
        };
        Ok((write, longer))
    }

    /// The most that day and month may hold for `need` more to fit.
    fn budget(&self, limits: &Limits, need: u64, now: Timestamp) -> Result<(u64, u64), Refusal> {
        let (day_reserved, month_reserved) = self.reserved();
        let room = |limit, most: u64, held: u64, reserved: u64, end: i64| match most.checked_sub(need) {
            Some(room) if held <= room => Ok(room),
            Some(room) => {
                // What is in flight mostly uses less than it reserves.
                let soon = held.saturating_sub(reserved) <= room;
                let retry_at =
                    if soon { self.instant(now).plus_millis(SOON_MS as i64) } else { at_second(end) };
                Err(Refusal::Limit { limit, retry_at: Some(retry_at) })
            }
            None => Err(Refusal::Limit { limit, retry_at: None }),
        };
        Ok((
            room(Limit::Day, limits.tokens_per_day, self.day_tokens, day_reserved, self.day.end())?,
            room(
                Limit::Month,
                limits.monthly_token_budget,
                self.month_tokens,
                month_reserved,
                self.month.end(),
            )?,
        ))
    }

    /// The lease that a ticket holds, as long as its request is in flight. An extension may have moved it
    /// without anybody being told.
    pub fn lease_of(&self, ticket: Ticket) -> Option<&Lease> {
        self.leases.iter().find(|(_, holds)| **holds == ticket).map(|(lease, _)| lease)
    }

    /// The write that ends leases, and does nothing else. Whoever comes second finds them gone, and
    /// changes nothing.
    pub fn end(&self, ended: &[Ended]) -> Write {
        let mut write = Write { period: Some((self.day, self.month)), ..Write::default() };
        write.collect(&mut self.clone(), ended);
        write
    }

    /// What is left to a tenant, as it is told.
    pub fn standing(&self, limits: &Limits, now: Timestamp) -> Standing {
        let (state, _) = self.turned(now);
        let instant = state.instant(now);
        let most = u64::from(limits.requests_per_minute);
        let used = state.past.sum() + u64::from(state.n);
        // Nothing counts any more once the latest admission has left the window.
        let latest =
            if state.n > 0 { Some(0) } else { state.past.0.iter().position(|n| *n > 0).map(|p| p + 1) };
        let full_again = latest.map_or(instant, |ago| at_second(state.bucket + 61 - ago as i64));
        let day = (limits.tokens_per_day, state.day_tokens, state.day.end());
        let month = (limits.monthly_token_budget, state.month_tokens, state.month.end());
        let left = |budget: (u64, u64, i64)| budget.0.saturating_sub(budget.1);
        let tighter = if left(month) < left(day) { month } else { day };
        Standing {
            requests: Remaining {
                limit: most,
                remaining: most.saturating_sub(used),
                reset_ms: full_again.millis_since(instant),
            },
            tokens: Remaining {
                limit: tighter.0,
                remaining: left(tighter),
                reset_ms: at_second(tighter.2).millis_since(instant),
            },
            day_remaining: Tokens(left(day)),
            month_remaining: Tokens(left(month)),
            in_flight: state.leases.len() as u64,
        }
    }
}

/// What is left to a tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Of a minute's requests.
    pub requests: Remaining,
    /// Of the day's or the month's tokens, whichever has less left.
    pub tokens: Remaining,
    /// Of the day's tokens.
    pub day_remaining: Tokens,
    /// Of the month's tokens.
    pub month_remaining: Tokens,
    /// Requests in flight.
    pub in_flight: u64,
}

/// What is left of one limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining {
    /// The limit.
    pub limit: u64,
    /// What is left.
    pub remaining: u64,
    /// Milliseconds until all of it is there again.
    pub reset_ms: u64,
}

const fn at_second(second: i64) -> Timestamp {
    Timestamp::from_millis(second.saturating_mul(1_000))
}

fn difference(new: u64, old: u64) -> i64 {
    let gap = i64::try_from(new.abs_diff(old)).unwrap_or(i64::MAX);
    if new >= old { gap } else { -gap }
}

/// `bound` on a number, restated for the number before `change` is added to it.
const fn less(bound: u64, change: i64) -> u64 {
    if change < 0 {
        bound.saturating_add(change.unsigned_abs())
    } else {
        bound.saturating_sub(change.unsigned_abs())
    }
}

fn add(number: u64, change: i64) -> u64 {
    number.saturating_add_signed(change)
}

impl Write {
    /// Adds the end of leases to this write; `state` is the item as the write finds it, turned.
    fn collect(&mut self, state: &mut Meter, ended: &[Ended]) {
        for Ended { lease, ticket, charge } in ended {
            // A lease that moved without anybody being told holds tokens of one day, and is charged to
            // the one before, whose total is closed.
            let correction = |charged: bool, held: bool| {
                let of = |is: bool, tokens: Tokens| if is { tokens.0 } else { 0 };
                difference(of(charged, charge.tokens), of(held, lease.tokens))
            };
            let day = correction(charge.day == state.day, lease.day() == state.day);
            let month = correction(charge.month == state.month, lease.month() == state.month);
            self.day_tokens = self.day_tokens.saturating_add(day);
            state.day_tokens = add(state.day_tokens, day);
            self.month_tokens = self.month_tokens.saturating_add(month);
            state.month_tokens = add(state.month_tokens, month);
            if charge.month == state.month {
                self.month_cost = self.month_cost.saturating_add(charge.cost.0);
            }
            state.leases.remove(lease);
            self.ends.push((lease.clone(), *ticket));
        }
    }

    /// Whether the write's condition holds for `meter`.
    pub fn holds(&self, meter: &Meter) -> bool {
        let there = |lease: &Lease| meter.leases.contains_key(lease);
        let holds = |lease: &Lease, ticket: &Ticket| meter.leases.get(lease) == Some(ticket);
        self.active_in.is_none_or(|e| meter.status == TenantStatus::Active && meter.epoch <= e)
            && self.bucket.is_none_or(|b| meter.bucket == b)
            && self.n_is.is_none_or(|n| meter.n == n)
            && self.n_below.is_none_or(|most| u64::from(meter.n) < most)
            && self.leases_below.is_none_or(|most| meter.leases.len() < most as usize)
            && self.day_at_most.is_none_or(|most| meter.day_tokens <= most)
            && self.month_at_most.is_none_or(|most| meter.month_tokens <= most)
            && self.period.is_none_or(|(day, month)| meter.day == day && meter.month == month)
            && self.gives.as_ref().is_none_or(|lease| !there(lease))
            && self.replaces.as_ref().is_none_or(|Replacement { old, ticket, new }| {
                holds(old, ticket) && (old == new || !there(new))
            })
            && self.ends.iter().all(|(lease, ticket)| holds(lease, ticket))
    }

    /// What the write does.
    ///
    /// # Errors
    /// [`ConditionFailed`]; then it does nothing.
    pub fn apply(&self, meter: &mut Meter) -> Result<(), ConditionFailed> {
        if !self.holds(meter) {
            return Err(ConditionFailed);
        }
        if let Some(turn) = &self.turn {
            meter.turn(turn);
        }
        meter.n += u32::from(self.counts);
        meter.day_tokens = add(meter.day_tokens, self.day_tokens);
        meter.month_tokens = add(meter.month_tokens, self.month_tokens);
        meter.month_cost = meter.month_cost.saturating_add(self.month_cost);
        if let Some(lease) = &self.gives {
            meter.seq += 1;
            meter.leases.insert(lease.clone(), Ticket(meter.seq));
        }
        if let Some(Replacement { old, ticket, new }) = &self.replaces {
            meter.leases.remove(old);
            meter.leases.insert(new.clone(), *ticket);
        }
        for (lease, _) in &self.ends {
            meter.leases.remove(lease);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
