use proptest::prelude::*;
use shared::ledger::Record;
use shared::meter::{Lease, Ticket};
use shared::tenant::TenantStatus;
use shared::units::{NanoUsd, Tokens};

use super::*;

/// In the middle of a month.
const NOW_S: i64 = 1_795_000_000;
const NOW: Timestamp = Timestamp::from_millis(NOW_S * 1_000);

fn months() -> [BillingMonth; 2] {
    let this = BillingMonth::of(NOW_S);
    [this.previous(), this]
}

fn lease(ticket: u64) -> Lease {
    format!("c.{NOW_S}.130.100.7000.r-{ticket}").parse().unwrap()
}

fn record(ticket: u64) -> Record {
    Record::aborted("acme".parse().unwrap(), &lease(ticket), Ticket(ticket), NOW)
}

/// Books in which requests begin, are recorded, billed and settled, as the functions do it.
#[derive(Clone, Debug)]
struct Books {
    meter: Meter,
    bill: Bill,
    ledger: BTreeMap<u64, Kept>,
}

impl Books {
    fn new() -> Self {
        let meter = Meter::new(TenantStatus::Active, 1, NOW);
        Self { meter, bill: Bill::default(), ledger: BTreeMap::new() }
    }

    /// With these tickets, all settled and billed.
    fn of(tickets: u64) -> Self {
        let mut books = Self::new();
        (1..=tickets).for_each(|ticket| {
            books.begin();
            books.record(ticket);
            books.bill(ticket);
            books.settle(ticket);
        });
        books
    }

    fn begin(&mut self) {
        self.meter.seq += 1;
        self.meter.leases.insert(lease(self.meter.seq), Ticket(self.meter.seq));
        self.meter.month_tokens += 100;
    }

    fn record(&mut self, ticket: u64) {
        let begun = self.meter.leases.values().any(|given| given.0 == ticket);
        if begun {
            let kept = Kept { record: record(ticket), pending: true };
            self.ledger.entry(ticket).or_insert(kept);
        }
    }

    fn bill(&mut self, ticket: u64) {
        if let Some(kept) = self.ledger.get_mut(&ticket).filter(|kept| kept.pending) {
            kept.pending = false;
            self.bill.add(&kept.record);
        }
    }

    fn settle(&mut self, ticket: u64) {
        if self.ledger.contains_key(&ticket) && self.meter.leases.remove(&lease(ticket)).is_some() {
            self.meter.month_cost += 7_000;
        }
    }

    fn step(&mut self, (what, ticket): (u8, u64)) {
        match what {
            0 => self.begin(),
            1 => self.record(ticket),
            2 => self.bill(ticket),
            _ => self.settle(ticket),
        }
    }

    fn standing(&self) -> Standing {
        (self.meter.clone(), self.bill.clone())
    }

    /// Read while nothing moves.
    fn judge(&self) -> Verdict {
        let mut reading = Reading::new(months(), NOW, self.standing());
        self.ledger.values().rev().for_each(|kept| reading.take(kept));
        reading.judge(&self.standing())
    }

    fn differs(&self, what: &str) {
        match self.judge() {
            Verdict::Differ(said) => assert!(said.contains(what), "{said}"),
            other => panic!("{other:?} where {what}"),
        }
    }
}

/// Reads books that change between any two records: `steps` are what happens, and where it is read.
fn read_amid(books: &mut Books, steps: &[(u8, u64)]) -> Verdict {
    let mut steps = steps.iter();
    let mut reading = Reading::new(months(), NOW, books.standing());
    if let Some(step) = steps.next() {
        books.step(*step);
    }
    // As a query does it: downwards, each record as it is when its turn comes.
    let mut next = books.ledger.last_key_value();
    while let Some((ticket, kept)) = next {
        reading.take(kept);
        let ticket = *ticket;
        for step in steps.by_ref().take(2) {
            books.step(*step);
        }
        next = books.ledger.range(..ticket).next_back();
    }
    for step in steps {
        books.step(*step);
    }
    reading.judge(&books.standing())
}

#[test]
fn books_that_agree() {
    assert_eq!(Books::of(0).judge(), Verdict::Agree);
    assert_eq!(Books::of(3).judge(), Verdict::Agree);
    let mut working = Books::of(3);
    working.begin();
    assert_eq!(working.judge(), Verdict::Agree, "a request in flight takes nothing from it");
    working.record(4);
    assert_eq!(working.judge(), Verdict::AtWork);
    working.bill(4);
    assert_eq!(working.judge(), Verdict::AtWork);
    working.settle(4);
    assert_eq!(working.judge(), Verdict::Agree);
}

#[test]
fn every_kind_of_difference_is_named() {
    let broken = |change: fn(&mut Books), what: &str| {
        let mut books = Books::of(5);
        change(&mut books);
        books.differs(what);
    };
    fn line(books: &mut Books) -> &mut Sums {
        books.bill.0.values_mut().next().unwrap()
    }
    broken(|b| drop(b.ledger.remove(&2)), "ticket 2 has no record");
    broken(|b| drop(b.ledger.remove(&5)), "ticket 5 has no record");
    broken(|b| b.ledger.clear(), "the bill says 5, the ledger 0");
    broken(|b| b.meter.seq = 4, "a record of ticket 5");
    broken(|b| b.bill.add(&record(2)), "requests: the bill says 6, the ledger 5");
    broken(|b| b.bill.0.clear(), "requests: the bill says 0, the ledger 5");
    broken(
        |b| line(b).cost_nano_usd = NanoUsd(35_001),
        "cost_nano_usd: the bill says 35001, the ledger 35000",
    );
    broken(
        |b| line(b).unreported_tokens = Tokens(499),
        "unreported_tokens: the bill says 499, the ledger 500",
    );
    broken(|b| line(b).latency = shared::usage::Histogram::of([(3, 1)].into()), DURATIONS);
    broken(|b| b.meter.month_cost -= 1, "the meter says 500 tokens and 34999 nano-dollars, the ledger 500");
    broken(|b| b.meter.month_tokens += 1, "the meter says 501 tokens");
    broken(|b| b.meter.month_tokens = 0, "the meter says 0 tokens");
    let mut overdue = Books::of(2);
    overdue.begin();
    overdue.record(3);
    overdue.ledger.get_mut(&3).unwrap().record.time = NOW.plus_millis(-3_600_001);
    overdue.differs("ticket 3 has waited since");
    let mut lacking = Books::of(1);
    lacking.begin();
    lacking.meter.month_tokens = 99;
    lacking.differs("the meter reserves 100 tokens and has counted 99");
}

#[test]
fn what_the_ledger_may_have_forgotten_is_not_missed() {
    let mut books = Books::of(5);
    for ticket in [1, 3] {
        books.ledger.get_mut(&ticket).unwrap().record.month = months()[0].previous();
    }
    books.ledger.remove(&2);
    let mut reading = Reading::new(months(), NOW, books.standing());
    books.ledger.values().rev().for_each(|kept| reading.take(kept));
    assert_eq!(reading.tickets.missing, None);
    let page: Vec<Kept> = books.ledger.values().take(1).cloned().collect();
    assert!(reading.is_done_with(&page) && !reading.is_done_with(&[]));
    assert!(!reading.is_done_with(&books.ledger.values().cloned().collect::<Vec<_>>()));
}

proptest! {
    #[test]
    fn work_amid_the_reading_is_no_difference(
        before in prop::collection::vec((0_u8..4, 1_u64..20), 0..60),
        amid in prop::collection::vec((0_u8..4, 1_u64..20), 0..60),
    ) {
        let mut books = Books::new();
        before.into_iter().for_each(|step| books.step(step));
        let verdict = read_amid(&mut books, &amid);
        prop_assert!(!matches!(verdict, Verdict::Differ(_)), "{verdict:?}");
    }

    #[test]
    fn what_is_wrong_by_more_than_the_work_amid_the_reading_is_found(
        settled in 8_u64..20,
        amid in prop::collection::vec((0_u8..4, 1_u64..20), 0..20),
        kind in 0_u8..5,
    ) {
        let mut books = Books::of(settled);
        match kind {
            0 => drop(books.ledger.remove(&(settled / 2))),
            1 => (0..7).for_each(|_| books.bill.add(&record(1))),
            2 => books.bill = Bill::default(),
            3 => books.meter.month_cost += 21 * 7_000,
            _ => books.meter.month_tokens -= settled * 100,
        }
        let verdict = read_amid(&mut books, &amid);
        prop_assert!(matches!(verdict, Verdict::Differ(_)), "{verdict:?}");
    }
}
