//! Which records of the audit log are asked for. Pure.
//!
//! Most lines of a log are none that is asked for, and parsing one takes far longer than reading it. So
//! a [`Sieve`] first looks at the line as it stands, and only what it lets through is parsed and put to
//! [`Filter::matches`], which alone decides.

use memchr::memmem::{self, Finder};

use crate::audit_log::{WireRecord, day_prefix};
use crate::clock::Timestamp;
use crate::ids::{DocumentId, UserId};
use crate::ledger::Action;

/// What a record must be. What is `None` does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Written at this instant or later.
    pub from: Option<Timestamp>,
    /// Written before this instant.
    pub to: Option<Timestamp>,
    /// Of this user.
    pub user: Option<UserId>,
    /// Of this action.
    pub action: Option<Action>,
    /// Showed or stored this document.
    pub document: Option<DocumentId>,
    /// Showed this passage.
    pub chunk: Option<String>,
}

impl Filter {
    /// Whether it asks for this record.
    pub fn matches(&self, record: &WireRecord) -> bool {
        self.from.is_none_or(|from| from <= record.time)
            && self.to.is_none_or(|to| record.time < to)
            && (self.user.is_none() || self.user == record.user_id)
            && self.action.is_none_or(|action| action == record.action)
            && self.document.as_ref().is_none_or(|document| record.documents.contains(document))
            && self.chunk.as_ref().is_none_or(|chunk| record.chunks.contains(chunk))
    }

    /// Whether the object of this key can hold a record that is asked for: it is filed under its day.
    /// A key that names no day is not judged.
    pub fn may_be_in(&self, key: &str) -> bool {
        let Some((start, _)) = key.split_once('/') else { return true };
        let Some(tenant) = start.strip_prefix("tenant=").and_then(|id| id.parse().ok()) else { return true };
        let folder = key.rsplit_once('/').map_or("", |(folder, _)| folder);
        // Names of days sort as days do, until the year 10000.
        let day = |at| day_prefix(&tenant, at);
        folder.len() + 1 != day(Timestamp::from_millis(0)).len()
            || self.from.is_none_or(|from| *day(from).trim_end_matches('/') <= *folder)
                && self.to.is_none_or(|to| *folder <= *day(to.plus_millis(-1)).trim_end_matches('/'))
    }

    /// What to look for in lines before they are parsed.
    pub fn sieve(&self) -> Sieve {
        // A line of this log is what serde_json writes, so a value stands in it as serde_json writes it.
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let mut needles = Vec::new();
        if let Some(user) = &self.user {
            needles.push(format!("\"user_id\":{}", quoted(user.as_str())));
        }
        if let Some(action) = self.action.and_then(|action| serde_json::to_string(&action).ok()) {
            needles.push(format!("\"action\":{action}"));
        }
        needles.extend(self.document.as_ref().map(|document| quoted(document.as_str())));
        needles.extend(self.chunk.as_deref().map(quoted));
        Sieve {
            needles: needles.iter().map(|needle| Finder::new(needle).into_owned()).collect(),
            from: self.from.map(|from| from.to_string()),
            to: self.to.map(|to| to.to_string()),
        }
    }
}

/// What every line that a [`Filter`] asks for holds.
#[derive(Clone, Debug)]
pub struct Sieve {
    needles: Vec<Finder<'static>>,
    from: Option<String>,
    to: Option<String>,
}

impl Sieve {
    /// Whether a line can be one that is asked for. It may be wrong to say yes, never to say no.
    pub fn lets_through(&self, line: &str) -> bool {
        self.in_time(line) && self.needles.iter().all(|needle| needle.find(line.as_bytes()).is_some())
    }

    /// Instants are written so that text order is time order.
    fn in_time(&self, line: &str) -> bool {
        const TIME: &[u8] = b"\"time\":\"";
        if self.from.is_none() && self.to.is_none() {
            return true;
        }
        let at = memmem::find(line.as_bytes(), TIME).map(|at| at + TIME.len());
        let Some(time) = at.and_then(|at| line.get(at..at + "2026-01-01T00:00:00.000Z".len())) else {
            return true;
        };
        self.from.as_deref().is_none_or(|from| from <= time) && self.to.as_deref().is_none_or(|to| time < to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit_log::{Head, object, raw_lines};
    use crate::ledger::Record;
    use crate::meter::{Lease, Ticket};
    use proptest::prelude::*;

    const START: i64 = 1_772_323_200_000; // 2026-03-01

    fn record(user: Option<String>, action: Action, chunk: &str, at: Timestamp) -> WireRecord {
        let lease: Lease = "c.1795000000.130.5000.70000.r-1".parse().unwrap();
        let mut record = Record::aborted("acme".parse().unwrap(), &lease, Ticket(1), at);
        record.user_id = user.and_then(|user| user.parse().ok());
        record.action = action;
        record.chunks = vec![chunk.to_owned(), "other:1".to_owned()];
        record.documents = vec!["other".parse().unwrap(), "doc.1".parse().unwrap()];
        WireRecord::new("TICKET#000000000001".to_owned(), record)
    }

    #[test]
    fn each_filter_asks_for_its_own() {
        let at = Timestamp::from_millis(START);
        let it = record(Some("O'Brien\n\"x\"".into()), Action::LlmCall, "doc:0", at);
        let all = Filter::default();
        let filters = [
            (Filter { from: Some(at), ..all.clone() }, true),
            (Filter { from: Some(at.plus_millis(1)), ..all.clone() }, false),
            (Filter { to: Some(at), ..all.clone() }, false),
            (Filter { to: Some(at.plus_millis(1)), ..all.clone() }, true),
            (Filter { user: it.user_id.clone(), ..all.clone() }, true),
            (Filter { user: Some("O'Brien".parse().unwrap()), ..all.clone() }, false),
            (Filter { action: Some(Action::LlmCall), ..all.clone() }, true),
            (Filter { action: Some(Action::RateLimited), ..all.clone() }, false),
            (Filter { document: Some("doc.1".parse().unwrap()), ..all.clone() }, true),
            (Filter { document: Some("doc".parse().unwrap()), ..all.clone() }, false),
            (Filter { chunk: Some("doc:0".into()), ..all.clone() }, true),
            (Filter { chunk: Some("doc:".into()), ..all.clone() }, false),
            (all, true),
        ];
        let bytes = object(&Head::default(), vec![it.clone()], at).unwrap().bytes;
        let line = raw_lines(bytes.as_slice()).next().unwrap().unwrap();
        for (filter, asked) in filters {
            assert_eq!(filter.matches(&it), asked, "{filter:?}");
            assert_eq!(filter.sieve().lets_through(&line), asked, "{filter:?}");
        }
    }

    #[test]
    fn days_that_are_not_asked_for_are_passed_over() {
        let day = |text: &str| Timestamp::parse(text).unwrap();
        let march = Filter {
            from: Some(day("2026-03-02T12:00:00Z")),
            to: Some(day("2026-04-01T00:00:00Z")),
            ..Filter::default()
        };
        let within = |day: &str| march.may_be_in(&format!("tenant=acme/{day}/000000000001.ndjson.gz"));
        assert!(!within("year=2026/month=03/day=01"));
        assert!(within("year=2026/month=03/day=02"));
        assert!(within("year=2026/month=03/day=31"));
        assert!(!within("year=2026/month=04/day=01"));
        assert!(within("odd"), "a key that names no day is read");
    }

    proptest! {
        #[test]
        fn what_matches_is_let_through(
            user in proptest::option::of("[\\PC\u{0}-\u{1f}\"\\\\]{1,8}"),
            chunk in any::<String>(),
            offset in -2i64..3,
            action in prop_oneof![Just(Action::LlmCall), Just(Action::RateLimited)],
        ) {
            let at = Timestamp::from_millis(START + offset);
            let it = record(user, action, &chunk, at);
            let filter = Filter {
                from: Some(Timestamp::from_millis(START)),
                to: Some(Timestamp::from_millis(START + 2)),
                user: it.user_id.clone(),
                action: Some(Action::LlmCall),
                document: None,
                chunk: Some(chunk),
            };
            let bytes = object(&Head::default(), vec![it.clone()], at).unwrap().bytes;
            let line = raw_lines(bytes.as_slice()).next().unwrap().unwrap();
            prop_assert_eq!(filter.matches(&it), (0..2).contains(&offset) && action == Action::LlmCall);
            prop_assert!(!filter.matches(&it) || filter.sieve().lets_through(&line));
        }
    }
}
