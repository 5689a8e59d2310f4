//! The protocol between function instances, a tenant's meter and its ledger, as [`shared::gate`] does
//! it, over the real decisions of [`shared::meter`].
//!
//! One step is one message to a store and what its answer leads to. Between any two of them anything
//! else may happen: another request's step, time passing, a failure. The stores do what DynamoDB does:
//! each message takes place whole and at once, or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use shared::clock::Timestamp;
use shared::limits::Limits;
use shared::meter::{Asker, Charged, Ended, Lease, Limit, Meter, Past, Refusal, Ticket, Want, Work, Write};
use shared::tenant::{TenantStatus, Tier};
use shared::units::{NanoUsd, Tokens};

use crate::explorer::Protocol;

/// How long a request may take.
const DEADLINE_MS: i64 = 30_000;
/// Seconds that a lease lives longer than its request may take, as [`shared::gate`] has it.
const GRACE_S: u32 = 8;
/// Seconds that a lease lives.
const LIFE_S: u32 = 30 + GRACE_S;
/// How long a write of the meter is sent again, as [`shared::aws::config`] has it.
const ATTEMPTS_MS: i64 = 5_000;
/// How far from true time the clocks of the two instances are, and that of the reconciler.
const SKEW_MS: [i64; 3] = [2_000, -2_000, 0];
/// Where the reconciler runs. It remembers nothing.
const RECONCILER: usize = 2;
/// What a request uses of the tokens that it reserves, unless it extends.
const USED: u64 = 1;

/// What someone is out to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// To read: it counts, and is nothing else.
    Read,
    /// To use up to so many tokens.
    Work(u64),
    /// The same, and to use up to so many others once it has been admitted.
    Extend(u64, u64),
    /// To collect what has expired.
    Collect,
}

/// A way to get the protocol wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// The lease ends before the record is in the ledger.
    MeterFirst,
    /// The record of an aborted request replaces what the ledger has.
    AbortWithoutLook,
    /// An expired lease is collected without a record.
    AbortWithoutRecord,
    /// An aborted request is charged nothing.
    AbortForFree,
    /// A late settle applies its own charge, not that of the record that stands.
    OwnCharge,
    /// Ending a lease does not depend on its being there.
    EndWithoutLease,
    /// Ending a lease does not depend on its ticket.
    EndAnyTicket,
    /// A lease that an extension has moved is charged to the day that it has moved to.
    ChargeWhereItIs,
    /// Ending a lease does not depend on the day and month that it was decided in.
    EndInAnyPeriod,
    /// An admission does not depend on the second that it was decided in.
    AdmitInAnySecond,
    /// An admission does not depend on how many leases there are.
    AdmitAnyNumber,
    /// An admission does not depend on what the day and the month hold.
    AdmitAnyTokens,
    /// 60 buckets instead of 61.
    ShortWindow,
    /// A request goes on after its deadline.
    NoDeadline,
}

/// What holds in every state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Property {
    /// I2: settled and reserved tokens are within the day's and the month's limit, by the meter's count
    /// and by the ledger's.
    Budget,
    /// I3: any 60 s of the meter's clock hold no more admissions than the limit.
    Window,
    /// The meter's clock does not go back.
    Clock,
    /// No more are in flight than may be.
    Concurrency,
    /// I4: once all leases have expired and are collected, each ticket has its record.
    Complete,
    /// A record once written stands.
    OneRecord,
    /// A lease ends with the charge that its own ticket's record says.
    LedgerFirst,
    /// No ticket is charged to the meter twice.
    ChargedOnce,
    /// I5: once all leases have expired and are collected, the meter's totals are the ledger's.
    Totals,
    /// Nobody is charged less than was used.
    Paid,
    /// A request is admitted at most once.
    OneTicket,
}

/// What is explored, and within which bounds.
#[derive(Clone, Debug)]
pub struct Setting {
    pub limits: Limits,
    /// True time at first.
    pub start: &'static str,
    pub jobs: Vec<Job>,
    /// Seconds that can pass at once, and how often they do.
    pub passes: &'static [i64],
    pub most_passes: u8,
    /// How often something fails.
    pub faults: u8,
    /// Whether a message whose answer was given up on may arrive later still.
    pub late: bool,
    pub flaw: Option<Flaw>,
    /// A property that is not looked at.
    pub but: Option<Property>,
}

/// Limits of requests in 60 s, requests at once, and tokens in a day and in a month.
pub fn limits(requests_per_minute: u32, max_concurrent: u32, day: u64, month: u64) -> Limits {
    Limits {
        requests_per_minute,
        max_concurrent,
        tokens_per_day: day,
        monthly_token_budget: month,
        ..Limits::of_tier(Tier::Enterprise)
    }
}

/// What the ledger says of a ticket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Entry {
    request: String,
    aborted: bool,
    charge: Charged,
}

/// What is sent to a store.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Message {
    Meter(Rc<Write>, Vec<Ended>),
    Ledger(Ticket, Entry),
}

/// What a store answers.
enum Answer {
    /// Whether the write took place. The meter as it then is comes with it.
    Meter(bool),
    /// The record that was there first.
    Ledger(Option<Entry>),
}

/// An admitted request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Admission {
    lease: Lease,
    ticket: Ticket,
    used: u64,
    may_extend: bool,
}

/// How far someone has got.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Before,
    /// Looks expired leases up, one after the other.
    Looking {
        state: Rc<Meter>,
        now: Timestamp,
        found: Vec<Ended>,
    },
    /// Writes the meter: an admission, or the end of expired leases.
    Writing {
        since_ms: i64,
        write: Rc<Write>,
        ends: Vec<Ended>,
    },
    Admitted(Admission),
    Extending {
        since_ms: i64,
        admission: Admission,
        write: Rc<Write>,
        longer: Lease,
    },
    /// The record is in the ledger, or will be if the meter goes first; the lease is to end.
    Ending {
        state: Option<Rc<Meter>>,
        admission: Admission,
        charge: Charged,
    },
    /// Only where the meter goes first.
    Recording(Admission),
    Over,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Process {
    instance: usize,
    stage: Stage,
    /// When it ends if it has not been admitted until then, in true time.
    ends_ms: Option<i64>,
    /// The ticket and what was used, whether or not anybody lives to tell.
    used: Option<(Ticket, u64)>,
}

/// Everything there is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    now_ms: i64,
    meter: Rc<Meter>,
    ledger: Rc<BTreeMap<Ticket, Entry>>,
    known: [Option<Rc<Meter>>; 3],
    processes: Vec<Process>,
    /// Messages that nobody waits for any more.
    late: Vec<Message>,
    passes: u8,
    faults: u8,
    /// The second of each admission. Nobody in the protocol sees it.
    admitted: Vec<i64>,
    /// The tickets that the meter was charged for. Nobody sees it.
    charged: BTreeSet<Ticket>,
    violated: Option<Property>,
}

/// What can happen. Numbers are those of the jobs, by their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Someone begins, on an instance.
    Begin(usize, usize),
    /// The next message is sent and answered.
    Next(usize),
    /// The request sets out to use more than it reserved.
    Extend(usize),
    /// Seconds pass.
    Pass(i64),
    /// The message takes place, its answer is lost; it is sent again.
    AnswerLost(usize),
    /// The message takes place, its answer is lost, and its sender has tried often enough.
    AnswerLostForGood(usize),
    /// No message gets through, and its sender has tried often enough.
    NotSent(usize),
    /// The sender has waited long enough, and not got to sending.
    TimedOut(usize),
    /// The message is on its way for long; it is sent again meanwhile.
    Delayed(usize),
    /// A delayed message arrives.
    Arrives(usize),
    /// The instance ends, and what it remembers with it.
    Crash(usize),
}

impl Protocol for Setting {
    type State = World;
    type Step = Step;
    type Property = Property;

    fn initial(&self) -> World {
        #[expect(clippy::unwrap_used, reason = "a test's constant")]
        let start = Timestamp::parse(self.start).unwrap();
        let process = |job: &Job| Process {
            instance: if *job == Job::Collect { RECONCILER } else { 0 },
            stage: Stage::Before,
            ends_ms: None,
            used: None,
        };
        World {
            now_ms: start.as_seconds() * 1_000,
            meter: Rc::new(Meter::new(TenantStatus::Active, 1, start)),
            ledger: Rc::default(),
            known: [const { None }; 3],
            processes: self.jobs.iter().map(process).collect(),
            late: Vec::new(),
            passes: self.most_passes,
            faults: self.faults,
            admitted: Vec::new(),
            charged: BTreeSet::new(),
            violated: None,
        }
    }

    fn next(&self, world: &World) -> Vec<(Step, World)> {
        let mut next = Vec::new();
        let mut take = |step, with: &dyn Fn(&mut Run<'_>)| {
            let mut run = Run { setting: self, world: world.clone() };
            with(&mut run);
            run.forget();
            next.push((step, run.world));
        };
        for (p, process) in world.processes.iter().enumerate() {
            match &process.stage {
                Stage::Over => continue,
                Stage::Before => {
                    // Equals begin in order: which of them does makes no difference.
                    let equal = |o: usize| {
                        self.jobs.get(o) == self.jobs.get(p) && world.processes[o].stage == Stage::Before
                    };
                    if !(0..p).any(equal) {
                        let collects = process.instance == RECONCILER;
                        let instances = if collects { RECONCILER..RECONCILER + 1 } else { 0..RECONCILER };
                        for i in instances {
                            take(Step::Begin(p, i), &|run| run.begin(p, i));
                        }
                    }
                    continue;
                }
                Stage::Admitted(admission) if admission.may_extend && self.in_time(world, p, admission) => {
                    take(Step::Extend(p), &|run| run.extend(p, &admission.clone()));
                }
                _ => {}
            }
            let attempted = match process.stage {
                Stage::Writing { since_ms, .. } | Stage::Extending { since_ms, .. } => since_ms,
                _ => world.now_ms,
            };
            let ends_ms = process.ends_ms.unwrap_or(i64::MAX).min(attempted + ATTEMPTS_MS);
            if ends_ms < world.now_ms {
                take(Step::TimedOut(p), &|run| run.give_up(p));
                continue;
            }
            take(Step::Next(p), &|run| run.next(p));
            if world.faults == 0 {
                continue;
            }
            take(Step::AnswerLost(p), &|run| run.fault(|run| run.send(p)));
            take(Step::AnswerLostForGood(p), &|run| {
                run.fault(|run| {
                    run.send(p);
                    run.give_up(p);
                });
            });
            take(Step::NotSent(p), &|run| run.fault(|run| run.give_up(p)));
            take(Step::Crash(p), &|run| {
                run.fault(|run| {
                    let instance = run.world.processes[p].instance;
                    run.world.known[instance] = None;
                    run.stage(p, Stage::Over);
                });
            });
            if self.late {
                take(Step::Delayed(p), &|run| {
                    run.fault(|run| {
                        let message = run.message(p);
                        run.world.late.push(message);
                        run.sent(p);
                    });
                });
            }
        }
        for place in 0..world.late.len() {
            take(Step::Arrives(place), &|run| {
                let message = run.world.late.remove(place);
                run.deliver(&message);
            });
        }
        if world.passes > 0 {
            for seconds in self.passes {
                take(Step::Pass(*seconds), &|run| {
                    run.world.passes -= 1;
                    run.world.now_ms += seconds * 1_000;
                });
            }
        }
        next
    }

    fn violated(&self, world: &World) -> Option<Property> {
        let now = |world: &World| {
            let (meter, limits) = (&world.meter, &self.limits);
            if world.violated.is_some() {
                return world.violated;
            }
            if meter.leases.len() > limits.max_concurrent as usize {
                return Some(Property::Concurrency);
            }
            let in_window =
                |from: i64| world.admitted.iter().filter(move |s| (from..=from + 60).contains(*s));
            let most = limits.requests_per_minute as usize;
            if world.admitted.iter().any(|from| in_window(*from).count() > most) {
                return Some(Property::Window);
            }
            if meter.day_tokens > limits.tokens_per_day || meter.month_tokens > limits.monthly_token_budget {
                return Some(Property::Budget);
            }
            None
        };
        let found = now(world).or_else(|| {
            // What if everybody vanished now? Whoever comes later collects what they left.
            let mut rest = Run { setting: self, world: world.clone() };
            let spent = rest.spent();
            rest.collect_all();
            spent.or_else(|| now(&rest.world)).or_else(|| rest.books())
        });
        found.filter(|property| self.but != Some(*property))
    }

    fn describe(&self, world: &World) -> String {
        world.to_string()
    }
}

impl Setting {
    fn clock(&self, world: &World, instance: usize) -> Timestamp {
        Timestamp::from_millis(world.now_ms + SKEW_MS[instance])
    }

    /// Whether a request is within its deadline, by its own clock.
    fn in_time(&self, world: &World, p: usize, admission: &Admission) -> bool {
        let now = self.clock(world, world.processes[p].instance);
        self.flaw == Some(Flaw::NoDeadline)
            || now.as_seconds() < admission.lease.expires_at_s() - i64::from(GRACE_S)
    }
}

/// A world in which something happens.
struct Run<'a> {
    setting: &'a Setting,
    world: World,
}

impl Run<'_> {
    fn flawed(&self, flaw: Flaw) -> bool {
        self.setting.flaw == Some(flaw)
    }

    fn clock(&self, p: usize) -> Timestamp {
        self.setting.clock(&self.world, self.world.processes[p].instance)
    }

    fn fault(&mut self, with: impl FnOnce(&mut Self)) {
        self.world.faults -= 1;
        with(self);
    }

    fn known(&self, p: usize) -> Option<Rc<Meter>> {
        self.world.known[self.world.processes[p].instance].clone()
    }

    /// Forgets what makes no difference any more: what is remembered where nobody will ask.
    fn forget(&mut self) {
        let processes = &mut self.world.processes;
        for process in processes.iter_mut().filter(|process| process.stage == Stage::Over) {
            process.instance = RECONCILER;
        }
        let to_come = processes.iter().any(|process| process.stage == Stage::Before);
        for (instance, known) in self.world.known.iter_mut().enumerate() {
            if !to_come && processes.iter().all(|process| process.instance != instance) {
                *known = None;
            }
        }
    }

    /// What an instance learnt with its last answer.
    fn remember(&mut self, p: usize, state: &Rc<Meter>) {
        let instance = self.world.processes[p].instance;
        if instance != RECONCILER {
            self.world.known[instance] = Some(Rc::clone(state));
        }
    }

    fn stage(&mut self, p: usize, stage: Stage) {
        if matches!(stage, Stage::Admitted(_) | Stage::Over) {
            self.world.processes[p].ends_ms = None;
        }
        self.world.processes[p].stage = stage;
    }

    // --- admission, as `Gate::attempt`, and collection, as `Books::collect`

    fn begin(&mut self, p: usize, instance: usize) {
        self.world.processes[p].instance = instance;
        if instance != RECONCILER {
            self.world.processes[p].ends_ms = Some(self.world.now_ms + DEADLINE_MS);
        }
        let now = self.clock(p);
        if let Some(state) = self.known(p).filter(|state| state.expired(now).is_empty()) {
            match self.admit(p, &state, now, &[]) {
                Some(Ok(write)) => {
                    let stage = self.writing(write, Vec::new());
                    return self.stage(p, stage);
                }
                Some(Err(Refusal::Limit { limit: Limit::Requests, .. })) => {
                    return self.stage(p, Stage::Over);
                }
                _ => {}
            }
        }
        let present = Rc::clone(&self.world.meter);
        self.decide(p, &present);
    }

    /// Decides on a state just learnt.
    fn decide(&mut self, p: usize, state: &Rc<Meter>) {
        let now = self.clock(p);
        if state.expired(now).is_empty() {
            self.conclude(p, state, now, Vec::new());
        } else {
            self.stage(p, Stage::Looking { state: Rc::clone(state), now, found: Vec::new() });
        }
    }

    /// Decides on a state whose expired leases have all been looked up.
    fn conclude(&mut self, p: usize, state: &Rc<Meter>, now: Timestamp, ends: Vec<Ended>) {
        let write = match self.admit(p, state, now, &ends) {
            Some(Ok(write)) => write,
            Some(Err(_)) => {
                self.remember(p, state);
                return self.stage(p, Stage::Over);
            }
            None if ends.is_empty() => return self.stage(p, Stage::Over),
            None => self.ending(state, &ends),
        };
        let stage = self.writing(write, ends);
        self.stage(p, stage);
    }

    /// The decision about what a process is to be admitted for, if it is.
    fn admit(
        &self,
        p: usize,
        state: &Meter,
        now: Timestamp,
        collected: &[Ended],
    ) -> Option<Result<Write, Refusal>> {
        let want = match self.setting.jobs[p] {
            Job::Collect => return None,
            Job::Read => Want::Read,
            Job::Work(tokens) | Job::Extend(tokens, _) => Want::Work {
                work: Work::Chat,
                tokens: Tokens(tokens),
                cost: cost(tokens),
                life_s: LIFE_S,
                request: request(p),
            },
        };
        let asker = Asker { limits: &self.setting.limits, epoch: 1, now };
        let mut seen = state.clone();
        if self.flawed(Flaw::ShortWindow) {
            // As if what was admitted 60 seconds ago did not count any more.
            let gap = usize::try_from(state.second(now) - state.bucket).unwrap_or_default();
            if gap == 60 {
                seen.n = 0;
            }
            let past = String::from(state.past.clone());
            let kept: Vec<&str> = past.split(',').take(59_usize.saturating_sub(gap)).collect();
            seen.past = Past::try_from(kept.join(",")).unwrap_or_default();
        }
        Some(seen.admit(asker, &want, collected).map(|mut write| {
            write.n_is = write.n_is.map(|_| state.n);
            if self.flawed(Flaw::AdmitInAnySecond) {
                write.bucket = None;
            }
            if self.flawed(Flaw::AdmitAnyNumber) {
                write.leases_below = None;
            }
            if self.flawed(Flaw::AdmitAnyTokens) {
                (write.day_at_most, write.month_at_most) = (None, None);
            }
            write
        }))
    }

    fn writing(&self, write: Write, ends: Vec<Ended>) -> Stage {
        Stage::Writing { since_ms: self.world.now_ms, write: Rc::new(write), ends }
    }

    // --- extension, as `Gate::extend`

    fn extend(&mut self, p: usize, admission: &Admission) {
        let remembered = self.known(p).and_then(|state| self.extended(p, admission, &state));
        let present = || self.extended(p, admission, &self.world.meter);
        let stage = remembered.or_else(present).unwrap_or_else(|| not_extended(admission));
        self.stage(p, stage);
    }

    fn extended(&self, p: usize, admission: &Admission, state: &Meter) -> Option<Stage> {
        let Job::Extend(_, tokens) = self.setting.jobs[p] else { return None };
        let asker = Asker { limits: &self.setting.limits, epoch: 1, now: self.clock(p) };
        let held = (&admission.lease, admission.ticket);
        let (write, longer) = state.extend(asker, held, Tokens(tokens), cost(tokens)).ok()?;
        let since_ms = self.world.now_ms;
        Some(Stage::Extending { since_ms, admission: admission.clone(), write: Rc::new(write), longer })
    }

    // --- one message after the other

    fn next(&mut self, p: usize) {
        let message = self.message(p);
        let answer = self.deliver(&message);
        self.answered(p, &answer);
    }

    /// Sends the next message, and gets no answer.
    fn send(&mut self, p: usize) {
        let message = self.message(p);
        self.deliver(&message);
        self.sent(p);
    }

    /// Once a request has set out to settle, it does nothing else.
    fn sent(&mut self, p: usize) {
        if let Stage::Admitted(admission) = &mut self.world.processes[p].stage {
            admission.may_extend = false;
        }
    }

    /// What a process sends next.
    fn message(&self, p: usize) -> Message {
        match &self.world.processes[p].stage {
            Stage::Before | Stage::Over => unreachable!("nothing is sent then"),
            Stage::Looking { state, now, found } => {
                let (lease, ticket) = state.expired(*now).swap_remove(found.len());
                Message::Ledger(ticket, self.aborted(&lease))
            }
            Stage::Writing { write, ends, .. } => Message::Meter(Rc::clone(write), ends.clone()),
            Stage::Extending { write, .. } => Message::Meter(Rc::clone(write), Vec::new()),
            Stage::Admitted(admission) if self.flawed(Flaw::MeterFirst) => {
                self.end(self.known(p), admission, charge(&admission.lease, admission.used))
            }
            Stage::Admitted(admission) | Stage::Recording(admission) => {
                Message::Ledger(admission.ticket, settled(admission))
            }
            Stage::Ending { state, admission, charge } => {
                self.end(state.clone().or_else(|| self.known(p)), admission, *charge)
            }
        }
    }

    /// As `Books::release`. Where it finds the ticket's lease gone, it is told so by the answer.
    fn end(&self, known: Option<Rc<Meter>>, admission: &Admission, charge: Charged) -> Message {
        let known = known.filter(|state| state.lease_of(admission.ticket).is_some());
        let state = known.unwrap_or_else(|| Rc::clone(&self.world.meter));
        let lease = state.lease_of(admission.ticket).unwrap_or(&admission.lease).clone();
        let ended = vec![Ended { lease, ticket: admission.ticket, charge }];
        let mut write = self.ending(&state, &ended);
        if self.flawed(Flaw::EndInAnyPeriod) {
            write.period = None;
        }
        Message::Meter(Rc::new(write), ended)
    }

    /// The write that ends leases.
    fn ending(&self, state: &Meter, ended: &[Ended]) -> Write {
        let mut ended = ended.to_vec();
        if self.flawed(Flaw::ChargeWhereItIs) {
            for Ended { lease, charge, .. } in &mut ended {
                (charge.day, charge.month) = (lease.day(), lease.month());
            }
        }
        state.end(&ended)
    }

    /// As `Record::aborted`.
    fn aborted(&self, lease: &Lease) -> Entry {
        let bound = if self.flawed(Flaw::AbortForFree) { 0 } else { lease.tokens.0 };
        Entry { request: lease.request.clone(), aborted: true, charge: charge(lease, bound) }
    }

    /// What a store does with a message.
    fn deliver(&mut self, message: &Message) -> Answer {
        match message {
            Message::Ledger(ticket, entry) => {
                if entry.aborted && self.flawed(Flaw::AbortWithoutRecord) {
                    return Answer::Ledger(None);
                }
                let there = self.world.ledger.get(ticket).cloned();
                let replaces = entry.aborted && self.flawed(Flaw::AbortWithoutLook);
                if there.is_none() || replaces {
                    Rc::make_mut(&mut self.world.ledger).insert(*ticket, entry.clone());
                }
                if replaces && there.as_ref().is_some_and(|there| there != entry) {
                    self.violation(Property::OneRecord);
                }
                Answer::Ledger(there.filter(|_| !replaces))
            }
            Message::Meter(write, ends) => {
                let mut write = Write::clone(write);
                let mut meter = Meter::clone(&self.world.meter);
                if self.flawed(Flaw::EndWithoutLease) {
                    write.ends.retain(|(lease, _)| meter.leases.contains_key(lease));
                }
                if self.flawed(Flaw::EndAnyTicket) {
                    for (lease, ticket) in &mut write.ends {
                        *ticket = meter.leases.get(lease).copied().unwrap_or(*ticket);
                    }
                }
                let written = write.apply(&mut meter).is_ok();
                if written {
                    ends.iter().for_each(|end| self.charged(end));
                    if meter.bucket < self.world.meter.bucket {
                        self.violation(Property::Clock);
                    }
                    if write.counts {
                        self.world.admitted.push(meter.bucket);
                    }
                    self.world.meter = Rc::new(meter);
                }
                Answer::Meter(written)
            }
        }
    }

    /// Watches the end of a lease.
    fn charged(&mut self, Ended { lease, ticket, charge }: &Ended) {
        if !self.world.charged.insert(*ticket) {
            self.violation(Property::ChargedOnce);
        }
        let of_the_ticket = self.world.meter.leases.get(lease) == Some(ticket);
        let recorded = self.world.ledger.get(ticket).map(|entry| &entry.charge);
        if !of_the_ticket || recorded != Some(charge) {
            self.violation(Property::LedgerFirst);
        }
    }

    fn violation(&mut self, property: Property) {
        self.world.violated.get_or_insert(property);
    }

    /// What a process does with the answer to its message.
    fn answered(&mut self, p: usize, answer: &Answer) {
        let meter = Rc::clone(&self.world.meter);
        let (there, written) = match answer {
            Answer::Ledger(there) => (there.as_ref(), false),
            Answer::Meter(written) => (None, *written),
        };
        match self.world.processes[p].stage.clone() {
            Stage::Before | Stage::Over => {}
            Stage::Looking { state, now, mut found } => {
                let expired = state.expired(now);
                let (lease, ticket) = expired[found.len()].clone();
                let charge = there.map_or_else(|| self.aborted(&lease).charge, |there| there.charge);
                found.push(Ended { lease, ticket, charge });
                if found.len() < expired.len() {
                    self.stage(p, Stage::Looking { state, now, found });
                } else {
                    self.conclude(p, &state, now, found);
                }
            }
            Stage::Writing { write, .. } => self.written(p, &write, written, &meter),
            Stage::Extending { mut admission, longer, .. } => {
                self.remember(p, &meter);
                if meter.leases.get(&longer) == Some(&admission.ticket) {
                    admission.lease = longer;
                    if self.setting.in_time(&self.world, p, &admission) {
                        admission.used = admission.lease.tokens.0;
                        self.world.processes[p].used = Some((admission.ticket, admission.used));
                    }
                    self.stage(p, not_extended(&admission));
                } else {
                    let stage = self.extended(p, &admission, &meter);
                    self.stage(p, stage.unwrap_or_else(|| not_extended(&admission)));
                }
            }
            Stage::Admitted(admission) if self.flawed(Flaw::MeterFirst) => {
                self.remember(p, &meter);
                if !meter.leases.contains_key(&admission.lease) {
                    self.stage(p, Stage::Recording(admission));
                }
            }
            Stage::Admitted(admission) => {
                let theirs = there.filter(|there| there.aborted || there.request != request(p));
                let stands = theirs.filter(|_| !self.flawed(Flaw::OwnCharge)).map(|theirs| theirs.charge);
                let charge = stands.unwrap_or_else(|| charge(&admission.lease, admission.used));
                self.stage(p, Stage::Ending { state: None, admission, charge });
            }
            Stage::Ending { admission, charge, .. } => {
                let any = self.flawed(Flaw::EndAnyTicket) && meter.leases.contains_key(&admission.lease);
                if any || meter.lease_of(admission.ticket).is_some() {
                    self.stage(p, Stage::Ending { state: Some(meter), admission, charge });
                } else {
                    self.remember(p, &meter);
                    self.stage(p, Stage::Over);
                }
            }
            Stage::Recording(_) => self.stage(p, Stage::Over),
        }
    }

    /// The answer to an admission, or to a collection.
    fn written(&mut self, p: usize, write: &Write, written: bool, meter: &Rc<Meter>) {
        self.remember(p, meter);
        let ticket = write.gives.as_ref().and_then(|lease| Some((lease, meter.leases.get(lease)?)));
        if let Some((lease, ticket)) = ticket {
            let may_extend = matches!(self.setting.jobs[p], Job::Extend(..));
            let (lease, ticket) = (lease.clone(), *ticket);
            self.world.processes[p].used = Some((ticket, USED));
            self.stage(p, Stage::Admitted(Admission { lease, ticket, used: USED, may_extend }));
        } else if written && self.setting.jobs[p] == Job::Read {
            self.stage(p, Stage::Over);
        } else {
            self.decide(p, meter);
        }
    }

    /// A process has tried often enough.
    fn give_up(&mut self, p: usize) {
        let stage = match &self.world.processes[p].stage {
            // What was reserved before is taken to be.
            Stage::Extending { admission, .. } => not_extended(admission),
            _ => Stage::Over,
        };
        self.stage(p, stage);
    }

    // --- what is left

    /// Whether the ledger and what is in flight are within the limits, whatever the meter says.
    fn spent(&self) -> Option<Property> {
        let (meter, ledger) = (&self.world.meter, &self.world.ledger);
        let in_flight = meter.leases.iter().filter(|(_, ticket)| !ledger.contains_key(ticket));
        let in_flight = in_flight.map(|(lease, _)| (lease.day(), lease.month(), lease.tokens.0));
        let recorded =
            ledger.values().map(|entry| (entry.charge.day, entry.charge.month, entry.charge.tokens.0));
        let (mut days, mut months) = (BTreeMap::new(), BTreeMap::new());
        for (day, month, tokens) in in_flight.chain(recorded) {
            *days.entry(day).or_default() += tokens;
            *months.entry(month).or_default() += tokens;
        }
        let over = days.values().any(|held: &u64| *held > self.setting.limits.tokens_per_day)
            || months.values().any(|held: &u64| *held > self.setting.limits.monthly_token_budget);
        over.then_some(Property::Budget)
    }

    /// Collects every lease, as the reconciler does once all have expired.
    fn collect_all(&mut self) {
        let Some(last) = self.world.meter.leases.keys().map(Lease::expires_at_s).max() else { return };
        let now = Timestamp::from_millis(last * 1_000);
        let mut ends = Vec::new();
        for (lease, ticket) in self.world.meter.expired(now) {
            let entry = self.aborted(&lease);
            let Answer::Ledger(there) = self.deliver(&Message::Ledger(ticket, entry.clone())) else { return };
            let charge = there.map_or(entry.charge, |there| there.charge);
            ends.push(Ended { lease, ticket, charge });
        }
        let write = self.ending(&self.world.meter, &ends);
        self.deliver(&Message::Meter(Rc::new(write), ends));
    }

    /// Whether the books agree when nothing is in flight.
    fn books(&self) -> Option<Property> {
        let World { meter, ledger, .. } = &self.world;
        if !ledger.keys().copied().eq((1..=meter.seq).map(Ticket)) || !meter.leases.is_empty() {
            return Some(Property::Complete);
        }
        let sum = |of: &dyn Fn(&Entry) -> bool| {
            let charges = ledger.values().filter(|entry| of(entry)).map(|entry| entry.charge);
            charges.fold((0, 0), |sum, c| (sum.0 + c.tokens.0, sum.1 + c.cost.0))
        };
        let (day, _) = sum(&|entry| entry.charge.day == meter.day);
        let month = sum(&|entry| entry.charge.month == meter.month);
        if day != meter.day_tokens || month != (meter.month_tokens, meter.month_cost) {
            return Some(Property::Totals);
        }
        let used = self.world.processes.iter().filter_map(|process| process.used);
        let mut charges = used.map(|(ticket, used)| (used, ledger.get(&ticket).map(|e| e.charge.tokens.0)));
        if charges.any(|(used, charged)| charged < Some(used)) {
            return Some(Property::Paid);
        }
        let requests: BTreeSet<&str> = ledger.values().map(|entry| entry.request.as_str()).collect();
        (requests.len() < ledger.len()).then_some(Property::OneTicket)
    }
}

fn not_extended(admission: &Admission) -> Stage {
    Stage::Admitted(Admission { may_extend: false, ..admission.clone() })
}

/// As `Record::settled`: what the request itself says.
fn settled(admission: &Admission) -> Entry {
    let lease = &admission.lease;
    Entry { request: lease.request.clone(), aborted: false, charge: charge(lease, admission.used) }
}

/// As `Record::charged`.
fn charge(lease: &Lease, tokens: u64) -> Charged {
    Charged { day: lease.day(), month: lease.month(), tokens: Tokens(tokens), cost: cost(tokens) }
}

const fn cost(tokens: u64) -> NanoUsd {
    NanoUsd(tokens * 1_000)
}

fn request(p: usize) -> String {
    format!("r{p}")
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Meter { seq, bucket, n, past, day_tokens, month_tokens, leases, .. } = &*self.meter;
        let time = |ms| Timestamp::from_millis(ms).to_string();
        let seconds = |text: String| text.get(11..19).unwrap_or_default().to_owned();
        write!(f, "{} meter {}", seconds(time(self.now_ms)), seconds(time(bucket * 1_000)))?;
        let past = String::from(past.clone());
        for (place, count) in past.split(',').enumerate().filter(|(_, count)| !["", "0"].contains(count)) {
            write!(f, " {count} {} s ago", place + 1)?;
        }
        write!(f, " n={n} day={day_tokens} month={month_tokens} seq={seq}")?;
        for (lease, ticket) in leases {
            write!(f, " {}#{ticket}:{}", lease.request, lease.tokens.0)?;
        }
        write!(f, "; ledger")?;
        for (ticket, entry) in self.ledger.iter() {
            let aborted = if entry.aborted { " aborted" } else { "" };
            write!(f, " #{ticket}:{} {}{aborted}", entry.charge.tokens.0, entry.charge.month)?;
        }
        Ok(())
    }
}
