//! Whether a tenant's ledger, bill and meter agree. Pure.

use std::collections::BTreeSet;

use shared::ledger::Record;
use shared::meter::{BillingMonth, Meter};
use shared::usage::{Bill, Sums};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// They agree.
    Agree,
    /// The tenant was at work meanwhile: no verdict.
    AtWork,
    /// Nothing moves, and the bill lacks what the ledger has. It follows within seconds, or never.
    Behind(String),
    /// They do not, and it says where.
    Differ(String),
}

/// A tenant's books, read one after the other.
#[derive(Debug)]
pub(crate) struct Reading {
    months: [BillingMonth; 2],
    before: (Meter, Bill),
    after: Option<(Meter, Bill)>,
    ledger: Bill,
    /// Tokens that the ledger charges to the present month.
    tokens: u64,
    tickets: BTreeSet<u64>,
}

impl Reading {
    pub(crate) fn new(months: [BillingMonth; 2], meter: Meter, bill: Bill) -> Self {
        Self {
            months,
            before: (meter, bill),
            after: None,
            ledger: Bill::default(),
            tokens: 0,
            tickets: BTreeSet::new(),
        }
    }

    pub(crate) fn take(&mut self, record: &Record) {
        let Some(ticket) = record.ticket else { return };
        if self.months.contains(&record.month) {
            self.tickets.insert(ticket.0);
            self.ledger.add(record);
        }
        if record.month == self.months[1] {
            self.tokens += record.charged().tokens.0;
        }
    }

    pub(crate) fn end(mut self, meter: Meter, bill: Bill) -> Self {
        self.after = Some((meter, bill));
        self
    }

    pub(crate) fn judge(&self) -> Verdict {
        let (meter, bill) = &self.before;
        // Completeness does not need stillness: a ticket of before is in the ledger by now, or was
        // and still is in flight.
        let in_flight: BTreeSet<u64> = meter.leases.values().map(|ticket| ticket.0).collect();
        if let Some(first) = self.tickets.first() {
            let missing = (*first..=meter.seq).find(|t| !self.tickets.contains(t) && !in_flight.contains(t));
            if let Some(ticket) = missing {
                return Verdict::Differ(format!("ticket {ticket} has no record in the ledger"));
            }
        } else if meter.seq > 0 && meter.month == self.months[1] && meter.month_cost > 0 {
            return Verdict::Differ("the meter has charges and the ledger has no records".to_owned());
        }
        if self.after.as_ref() != Some(&self.before) {
            return Verdict::AtWork;
        }
        for month in self.months {
            let (billed, recorded) = (bill.month(month), self.ledger.month(month));
            if billed != recorded {
                let what =
                    format!("{month}: the bill says {}, the ledger {}", said(&billed), said(&recorded));
                let behind = billed.requests < recorded.requests;
                return if behind { Verdict::Behind(what) } else { Verdict::Differ(what) };
            }
        }
        if bill != &self.ledger {
            return Verdict::Differ("the bill and the ledger agree in sum, but not by model".to_owned());
        }
        if !meter.leases.is_empty() {
            return Verdict::AtWork;
        }
        let recorded = self.ledger.month(self.months[1]);
        if meter.month == self.months[1]
            && (meter.month_tokens, meter.month_cost) != (self.tokens, recorded.cost_nano_usd.0)
        {
            return Verdict::Differ(format!(
                "{}: the meter says {} tokens and {} nano-dollars, the ledger {} and {}",
                meter.month, meter.month_tokens, meter.month_cost, self.tokens, recorded.cost_nano_usd.0
            ));
        }
        Verdict::Agree
    }
}

fn said(sums: &Sums) -> String {
    format!("{} requests at {} nano-dollars", sums.requests, sums.cost_nano_usd.0)
}

#[cfg(test)]
mod tests {
    use shared::clock::Timestamp;
    use shared::meter::{Lease, Ticket};
    use shared::tenant::TenantStatus;

    use super::*;

    const NOW_S: i64 = 1_795_000_000;

    fn record(ticket: u64) -> Record {
        let lease: Lease = format!("c.{NOW_S}.130.100.7000.r-{ticket}").parse().unwrap();
        Record::aborted(
            "acme".parse().unwrap(),
            &lease,
            Ticket(ticket),
            Timestamp::from_millis(NOW_S * 1_000),
        )
    }

    fn books(tickets: &[u64]) -> (Meter, Bill) {
        let mut meter = Meter::new(TenantStatus::Active, 1, Timestamp::from_millis(NOW_S * 1_000));
        let mut bill = Bill::default();
        for ticket in tickets {
            bill.add(&record(*ticket));
            meter.seq = *ticket;
            meter.month_tokens += 100;
            meter.month_cost += 7_000;
        }
        (meter, bill)
    }

    fn judge(books: (Meter, Bill), recorded: &[u64]) -> Verdict {
        let this = BillingMonth::of(NOW_S);
        let mut reading = Reading::new([this.previous(), this], books.0.clone(), books.1.clone());
        recorded.iter().for_each(|ticket| reading.take(&record(*ticket)));
        reading.end(books.0, books.1).judge()
    }

    #[test]
    fn books_that_agree() {
        assert_eq!(judge(books(&[]), &[]), Verdict::Agree);
        assert_eq!(judge(books(&[1, 2, 3]), &[3, 2, 1]), Verdict::Agree);
    }

    #[test]
    fn a_bill_that_has_not_caught_up_is_told_apart() {
        let mut behind = books(&[1, 2]);
        behind.0 = books(&[1, 2, 3]).0;
        assert!(matches!(judge(behind, &[1, 2, 3]), Verdict::Behind(_)));
    }

    #[test]
    fn every_kind_of_difference_is_named() {
        let differs = |books, recorded: &[u64], what: &str| match judge(books, recorded) {
            Verdict::Differ(said) => assert!(said.contains(what), "{said}"),
            other => panic!("{other:?}"),
        };
        differs(books(&[1, 2, 3]), &[1, 3], "ticket 2");
        differs(books(&[1, 2, 3]), &[1, 2], "ticket 3");
        let mut twice = books(&[1, 2]);
        twice.1.add(&record(2));
        differs(twice, &[1, 2], "the bill says 3 requests");
        let mut dearer = books(&[1, 2]);
        dearer.1.0.values_mut().next().unwrap().cost_nano_usd.0 += 1;
        differs(dearer, &[1, 2], "14001 nano-dollars");
        let mut meter = books(&[1, 2]);
        meter.0.month_cost -= 1;
        differs(meter, &[1, 2], "the meter says");
    }
}
