//! Whether a tenant's ledger, bill and meter agree, while the tenant goes on working. Pure.
//!
//! The books are read one after the other: meter and bill, then the ledger record by record, then meter
//! and bill again. All three only grow within a month, the ledger is written first, and a record is
//! billed in the transaction that marks it exported. Therefore, line by line and number by number:
//!
//! - the bill before ≤ the exported records ≤ the bill after;
//! - what the meter has settled before ≤ all records, and all records that are not in flight after
//!   ≤ what it has settled after;
//! - a ticket given before has a record, or was in flight before.
//!
//! What users say of answers is on the bill without a ticket, and is left out.
//!
//! Where the tenant rests the two sides meet, and the books must be equal.

use std::collections::{BTreeMap, BTreeSet};

use shared::aws::ledger::Kept;
use shared::clock::Timestamp;
use shared::meter::{BillingMonth, Meter};
use shared::usage::{Bill, Sums};

/// A record that waits longer to be exported, in milliseconds, is a difference: the bill follows the
/// ledger within seconds, and what was missed is looked for every few minutes.
const OVERDUE_MS: u64 = 3_600_000;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// They agree.
    Agree,
    /// Nothing is wrong, as far as can be seen beside the work that went on.
    AtWork,
    /// They do not, and it says where.
    Differ(String),
}

/// A tenant's meter, and its bill of both months.
pub(crate) type Standing = (Meter, Bill);

/// A tenant's books, being read.
#[derive(Debug)]
pub(crate) struct Reading {
    months: [BillingMonth; 2],
    now: Timestamp,
    meter: Meter,
    bill: Bill,
    all: Bill,
    exported: Bill,
    overdue: Option<String>,
    /// Records that may be in flight after, each a bill of its own: by ticket.
    recent: BTreeMap<u64, Bill>,
    tickets: Tickets,
}

impl Reading {
    /// Of the books of `months`, of which `before` was read first.
    pub(crate) fn new(months: [BillingMonth; 2], now: Timestamp, before: Standing) -> Self {
        let (meter, bill) = (before.0, before.1.charged());
        let tickets = Tickets::new(&meter);
        let (all, exported) = (Bill::default(), Bill::default());
        Self { months, now, meter, bill, all, exported, overdue: None, recent: BTreeMap::new(), tickets }
    }

    /// Takes a record of the ledger, the last ticket first.
    pub(crate) fn take(&mut self, Kept { record, pending }: &Kept) {
        let Some(ticket) = record.ticket else { return };
        let judged = self.months.contains(&record.month);
        self.tickets.take(ticket.0, judged);
        if !judged {
            return;
        }
        self.all.add(record);
        if self.tickets.is_recent(ticket.0) {
            self.recent.entry(ticket.0).or_default().add(record);
        }
        if !pending {
            self.exported.add(record);
        } else if self.now.millis_since(record.time) > OVERDUE_MS {
            self.overdue = Some(format!("ticket {ticket} has waited since {} to be billed", record.time));
        }
    }

    /// Whether all that is left is older than what is judged, once a page has ended with this.
    pub(crate) fn is_done_with(&self, page: &[Kept]) -> bool {
        !page.is_empty() && page.iter().all(|kept| kept.record.month < self.months[0])
    }

    /// The verdict, once meter and bill were read again.
    pub(crate) fn judge(mut self, after: &Standing) -> Verdict {
        let after = &(after.0.clone(), after.1.charged());
        self.all = self.all.charged();
        self.exported = self.exported.charged();
        let found = (self.completeness(after).and_then(|()| self.bill(after)))
            .and_then(|bill| Ok(self.meter(after)? && bill));
        match found {
            Ok(true) => Verdict::Agree,
            Ok(false) => Verdict::AtWork,
            Err(what) => Verdict::Differ(what),
        }
    }

    fn completeness(&self, (meter, _): &Standing) -> Result<(), String> {
        if let Some(ticket) = self.tickets.missing {
            return Err(format!("ticket {ticket} has no record in the ledger"));
        }
        if self.tickets.newest > meter.seq {
            let (newest, seq) = (self.tickets.newest, meter.seq);
            return Err(format!("the ledger has a record of ticket {newest}, and the meter gave {seq}"));
        }
        self.overdue.clone().map_or(Ok(()), Err)
    }

    /// Whether bill and ledger are equal; or where they cannot become so.
    fn bill(&self, (_, after): &Standing) -> Result<bool, String> {
        let zero = Sums::default();
        let lines: BTreeSet<_> = self.bill.0.keys().chain(self.exported.0.keys()).collect();
        for line in lines.into_iter().filter(|(month, _)| self.months.contains(month)) {
            let of = |bill: &Bill| bill.0.get(line).unwrap_or(&zero).clone();
            let (least, exported, most) = (of(&self.bill), of(&self.exported), of(after));
            let (month, model) = line;
            for (billed, excess) in [(&least, excess(&least, &exported)), (&most, excess(&exported, &most))] {
                if let Some(name) = excess {
                    let (billed, recorded) = (number(billed, name), number(&exported, name));
                    return Err(format!(
                        "{month}, {model}, {name}: the bill says {billed}, the ledger {recorded}"
                    ));
                }
            }
        }
        Ok(&self.bill == after && self.all == self.exported && self.bill == self.exported)
    }

    /// Whether meter and ledger are equal; or where they cannot become so. The meter knows one month.
    fn meter(&self, (after, _): &Standing) -> Result<bool, String> {
        let month = self.meter.month;
        if !self.months.contains(&month) {
            return Ok(true);
        }
        let charged = |bill: &Bill| {
            let sums = bill.month(month);
            let tokens = sums.usage.total() + sums.embedding_tokens + sums.unreported_tokens;
            (tokens.0, sums.cost_nano_usd.0)
        };
        let exceeds = |one: (u64, u64), other: (u64, u64)| one.0 > other.0 || one.1 > other.1;
        let differ = |settled: (u64, u64), recorded: (u64, u64)| {
            format!(
                "{month}: the meter says {} tokens and {} nano-dollars, the ledger {} and {}",
                settled.0, settled.1, recorded.0, recorded.1
            )
        };
        let (least, all) = (settled(&self.meter)?, charged(&self.all));
        if exceeds(least, all) {
            return Err(differ(least, all));
        }
        if after.month != month {
            return Ok(false);
        }
        let mut ended = all;
        for ticket in after.leases.values() {
            let (tokens, cost) = self.recent.get(&ticket.0).map_or((0, 0), charged);
            ended = (ended.0.saturating_sub(tokens), ended.1.saturating_sub(cost));
        }
        let most = settled(after)?;
        if exceeds(ended, most) {
            return Err(differ(most, ended));
        }
        Ok(least == all && all == most)
    }
}

/// The first number, by name, in which a line is more than another.
fn excess(line: &Sums, other: &Sums) -> Option<&'static str> {
    let counts = |sums: &Sums, bucket| sums.latency.counts().get(bucket).copied().unwrap_or(0);
    let longer = || line.latency.counts().keys().any(|bucket| counts(line, bucket) > counts(other, bucket));
    let mut pairs = line.counters().into_iter().zip(other.counters());
    let found = pairs.find(|((_, one), (_, other))| one > other).map(|((name, _), _)| name);
    found.or_else(|| longer().then_some(DURATIONS))
}

/// What the counts of durations are called.
const DURATIONS: &str = "durations";

fn number(line: &Sums, name: &str) -> u64 {
    let counted = line.counters().into_iter().find(|(counter, _)| *counter == name);
    counted.map_or_else(|| line.latency.counts().values().sum(), |(_, number)| number)
}

/// What a meter has settled of its month: tokens and nano-dollars.
fn settled(meter: &Meter) -> Result<(u64, u64), String> {
    let reserved: u64 =
        meter.leases.keys().filter(|lease| lease.month() == meter.month).map(|lease| lease.tokens.0).sum();
    let tokens = meter.month_tokens.checked_sub(reserved).ok_or_else(|| {
        format!("the meter reserves {reserved} tokens and has counted {}", meter.month_tokens)
    })?;
    Ok((tokens, meter.month_cost))
}

/// Whether each ticket has a record, from the first that is judged on. The memory it takes does not grow.
#[derive(Debug)]
struct Tickets {
    in_flight: BTreeSet<u64>,
    /// The last ticket given before.
    seq: u64,
    /// The ticket that is due next, on the way down.
    due: u64,
    /// The lowest ticket so far without a record.
    gap: Option<u64>,
    /// The same, above one that is judged. Of older ones the ledger may have forgotten some.
    missing: Option<u64>,
    newest: u64,
}

impl Tickets {
    fn new(meter: &Meter) -> Self {
        let in_flight = meter.leases.values().map(|ticket| ticket.0).collect();
        Self { in_flight, seq: meter.seq, due: meter.seq, gap: None, missing: None, newest: 0 }
    }

    fn take(&mut self, ticket: u64, judged: bool) {
        self.newest = self.newest.max(ticket);
        if ticket <= self.due {
            let lowest = (ticket + 1..=self.due).find(|ticket| !self.in_flight.contains(ticket));
            self.gap = lowest.or(self.gap);
            self.due = ticket.saturating_sub(1);
        }
        if judged {
            self.missing = self.gap;
        }
    }

    /// Whether a request may have been in flight since.
    fn is_recent(&self, ticket: u64) -> bool {
        ticket > self.seq || self.in_flight.contains(&ticket)
    }
}

#[cfg(test)]
mod tests;
