//! The protocol of admission, checked exhaustively for small numbers: in whatever order instances act
//! and whatever fails, the invariants hold in every state. Protocols that are wrong on purpose show
//! that the check would find it.

#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "how much was explored is part of the result")]

mod explorer;
mod model;

use std::time::Instant;

use explorer::{Explored, explore};
use model::{Flaw, Job, Property, Setting, limits};

/// States that an exploration visits at most.
const MOST: usize = 4_000_000;

/// No limit is near, nothing happens, nothing fails.
fn setting() -> Setting {
    Setting {
        limits: limits(9, 9, 99, 99),
        start: "2026-11-24T12:00:00Z",
        jobs: Vec::new(),
        passes: &[],
        most_passes: 0,
        faults: 0,
        late: false,
        flaw: None,
        but: None,
    }
}

/// Requests against the limit of a minute.
fn at_the_window() -> Setting {
    Setting {
        limits: limits(2, 9, 99, 99),
        jobs: vec![Job::Read, Job::Work(4), Job::Work(4)],
        passes: &[1, 59, 60, 61],
        most_passes: 2,
        ..setting()
    }
}

/// Requests against one another and against the budgets of a day and a month, both of which end.
fn at_the_budget() -> Setting {
    Setting {
        limits: limits(9, 2, 9, 14),
        start: "2026-11-30T23:59:58Z",
        jobs: vec![Job::Work(4); 3],
        passes: &[1, 40],
        most_passes: 2,
        ..setting()
    }
}

/// Requests of which two steps fail, and a reconciler beside.
fn in_ruins() -> Setting {
    Setting {
        limits: limits(9, 2, 9, 14),
        jobs: vec![Job::Work(4), Job::Work(4), Job::Collect],
        passes: &[40],
        most_passes: 2,
        faults: 2,
        ..setting()
    }
}

/// A request that comes to need more than it reserved, and others.
fn in_need() -> Setting {
    Setting {
        limits: limits(9, 2, 9, 14),
        jobs: vec![Job::Extend(4, 5), Job::Work(4), Job::Collect],
        passes: &[36],
        most_passes: 1,
        faults: 1,
        ..setting()
    }
}

/// The same, as the month ends.
fn in_need_at_midnight() -> Setting {
    Setting {
        start: "2026-11-30T23:59:58Z",
        jobs: vec![Job::Extend(4, 5), Job::Work(4)],
        passes: &[1, 40],
        most_passes: 2,
        faults: 0,
        ..in_need()
    }
}

/// Messages that arrive after their senders have given them up and sent them again.
fn belated() -> Setting {
    Setting {
        jobs: vec![Job::Work(4), Job::Collect],
        passes: &[1, 40],
        most_passes: 2,
        faults: 2,
        late: true,
        ..setting()
    }
}

fn run(name: &str, setting: &Setting) -> Explored<Setting> {
    let begun = Instant::now();
    let explored = explore(setting, MOST);
    let Explored { states, steps, found } = &explored;
    println!("{name}: {states} states, {steps} steps, {:.1} s", begun.elapsed().as_secs_f64());
    if let Some((property, trace)) = found {
        println!("{name}: {property:?} does not hold: {trace:?}");
    }
    explored
}

fn holds(name: &str, setting: &Setting) {
    if let Some((property, trace)) = run(name, setting).found {
        panic!("{property:?} does not hold: {trace:?}");
    }
}

fn fails(name: &str, setting: &Setting, expected: Property) {
    let (property, trace) = run(name, setting).found.unwrap();
    assert_eq!(property, expected, "{trace:?}");
}

fn finds(flaw: Flaw, setting: Setting, expected: Property) {
    fails(&format!("{flaw:?}"), &Setting { flaw: Some(flaw), ..setting }, expected);
}

// --- the protocol

#[test]
fn no_minute_holds_more_requests_than_the_limit() {
    holds("at the window", &at_the_window());
}

#[test]
fn no_budget_is_overspent_as_day_and_month_end() {
    holds("at the budget", &at_the_budget());
}

#[test]
fn the_books_agree_whatever_fails() {
    holds("in ruins", &in_ruins());
}

#[test]
fn what_a_request_needs_more_is_charged_once() {
    holds("in need", &in_need());
    holds("in need at midnight", &in_need_at_midnight());
    let jobs = vec![Job::Extend(4, 5), Job::Extend(3, 6)];
    holds("both in need", &Setting { jobs, passes: &[1, 36], most_passes: 2, ..in_need() });
}

/// It is admitted, and charged, see below. But within the limits.
#[test]
fn what_arrives_late_is_held_to_the_limits() {
    let limits = limits(2, 2, 9, 14);
    let jobs = vec![Job::Work(4), Job::Work(4)];
    let but = Some(Property::OneTicket);
    let start = "2026-11-30T23:59:58Z";
    holds("belated", &Setting { limits, start, jobs, passes: &[1], faults: 1, but, ..belated() });
}

/// `cargo test -p shared --test protocol -- --ignored --nocapture`
#[test]
#[ignore = "two minutes, and gigabytes of memory"]
fn the_books_agree_whatever_fails_among_more() {
    holds("at the budget, failing", &Setting { faults: 1, ..at_the_budget() });
    let jobs = vec![Job::Read, Job::Work(4), Job::Work(4), Job::Work(4)];
    holds("at the window, four", &Setting { jobs, passes: &[59, 61], ..at_the_window() });
    holds("in ruins, three failures", &Setting { faults: 3, ..in_ruins() });
}

/// A lease that an extension moved into a new month, without anybody being told, is charged where its
/// record says.
#[test]
fn an_extension_whose_answers_are_all_lost_is_charged_once() {
    holds("a moved lease", &Setting { faults: 1, ..in_need_at_midnight() });
}

/// A first attempt that arrives after the second has been answered, and settled, admits again: nobody
/// knows, and the bound is charged. No condition on the meter can tell it from a new request, and it is
/// within the limits; whatever is lost besides, each ticket is charged once.
#[test]
fn what_arrives_late_is_charged_once() {
    fails("admitted twice", &belated(), Property::OneTicket);
    holds("nothing else", &Setting { but: Some(Property::OneTicket), ..belated() });
}

// --- wrong on purpose

#[test]
fn finds_a_lease_that_ends_before_its_record_is_written() {
    finds(Flaw::MeterFirst, in_ruins(), Property::LedgerFirst);
}

#[test]
fn finds_an_abort_that_does_not_look() {
    finds(Flaw::AbortWithoutLook, in_ruins(), Property::OneRecord);
}

#[test]
fn finds_an_abort_without_a_record() {
    finds(Flaw::AbortWithoutRecord, in_ruins(), Property::LedgerFirst);
}

#[test]
fn finds_an_abort_for_free() {
    finds(Flaw::AbortForFree, in_ruins(), Property::Paid);
}

#[test]
fn finds_a_late_settle_that_insists_on_its_own_charge() {
    finds(Flaw::OwnCharge, in_ruins(), Property::LedgerFirst);
}

#[test]
fn finds_a_lease_that_ends_twice() {
    finds(Flaw::EndWithoutLease, in_ruins(), Property::ChargedOnce);
}

#[test]
fn finds_an_end_of_another_tickets_lease() {
    let setting = Setting { but: Some(Property::OneTicket), ..belated() };
    finds(Flaw::EndAnyTicket, setting, Property::ChargedOnce);
}

#[test]
fn finds_a_moved_lease_that_is_charged_where_it_is() {
    finds(Flaw::ChargeWhereItIs, Setting { faults: 1, ..in_need_at_midnight() }, Property::Totals);
}

#[test]
fn finds_a_charge_to_the_wrong_day() {
    finds(Flaw::EndInAnyPeriod, at_the_budget(), Property::Totals);
}

#[test]
fn finds_an_admission_in_a_second_that_has_passed() {
    finds(Flaw::AdmitInAnySecond, at_the_window(), Property::Window);
}

#[test]
fn finds_one_too_many_at_once() {
    let limits = limits(9, 1, 99, 99);
    finds(Flaw::AdmitAnyNumber, Setting { limits, ..at_the_budget() }, Property::Concurrency);
}

#[test]
fn finds_an_overspent_budget() {
    let limits = limits(9, 9, 9, 14);
    finds(Flaw::AdmitAnyTokens, Setting { limits, ..at_the_budget() }, Property::Budget);
}

#[test]
fn finds_a_window_of_60_buckets() {
    finds(Flaw::ShortWindow, at_the_window(), Property::Window);
}

#[test]
fn finds_work_after_the_deadline() {
    finds(Flaw::NoDeadline, in_need(), Property::Paid);
}
