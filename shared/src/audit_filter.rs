//! Which records of the audit log somebody wants to see. Pure.

use crate::audit_log::WireRecord;
use crate::clock::Timestamp;
use crate::ids::{DocumentId, UserId};
use crate::ledger::Action;

/// A choice of records: those that fit all that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Not before this instant.
    pub from: Option<Timestamp>,
    /// Before this instant.
    pub to: Option<Timestamp>,
    /// Of this user.
    pub user: Option<UserId>,
    /// This was done.
    pub action: Option<Action>,
    /// This document was shown, stored or deleted.
    pub document: Option<DocumentId>,
    /// This passage was shown.
    pub chunk: Option<String>,
}

impl Filter {
    /// Whether a record is wanted.
    pub fn matches(&self, record: &WireRecord) -> bool {
        self.from.is_none_or(|from| from <= record.time)
            && self.to.is_none_or(|to| record.time < to)
            && self.user.as_ref().is_none_or(|user| record.user_id.as_ref() == Some(user))
            && self.action.is_none_or(|action| record.action == action)
            && self.document.as_ref().is_none_or(|document| record.documents.contains(document))
            && self.chunk.as_ref().is_none_or(|chunk| record.chunks.contains(chunk))
    }

    /// What every line that holds a wanted record contains. Looking for it spares most lines from being
    /// parsed.
    ///
    /// # Errors
    /// If a text does not serialise, which none is known to do.
    pub fn needles(&self) -> serde_json::Result<Vec<String>> {
        let user = self.user.as_ref().map(serde_json::to_string);
        let document = self.document.as_ref().map(serde_json::to_string);
        let chunk = self.chunk.as_ref().map(serde_json::to_string);
        let action = self.action.as_ref().map(serde_json::to_string);
        [user, document, chunk, action].into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Record;
    use crate::meter::{Lease, Ticket};

    #[test]
    fn a_wanted_line_holds_the_needles() {
        let lease: Lease = "c.1795000000.130.5000.70000.r-1".parse().unwrap();
        let now = Timestamp::parse("2026-11-18T10:00:00.123Z").unwrap();
        let mut record = Record::aborted("acme".parse().unwrap(), &lease, Ticket(1), now);
        record.user_id = Some("O'Brien \"quoted\"\nsecond line \u{2028} ü".parse().unwrap());
        record.chunks = vec!["doc:0".into()];
        record.documents = vec!["doc".parse().unwrap()];
        let filter = Filter {
            from: Some(now),
            to: Some(now.plus_millis(1)),
            user: record.user_id.clone(),
            action: Some(Action::LlmCall),
            document: Some("doc".parse().unwrap()),
            chunk: Some("doc:0".into()),
        };
        let record = WireRecord::new("x".into(), record);
        let line = serde_json::to_string(&record).unwrap();
        let needles = filter.needles().unwrap();
        assert!(needles.len() == 4 && needles.iter().all(|needle| line.contains(needle)), "{needles:?}");
        assert!(filter.matches(&record));
        let others = [
            Filter { from: Some(now.plus_millis(1)), ..filter.clone() },
            Filter { to: Some(now), ..filter.clone() },
            Filter { user: Some("ann".parse().unwrap()), ..filter.clone() },
            Filter { action: Some(Action::DocumentAccess), ..filter.clone() },
            Filter { document: Some("do".parse().unwrap()), ..filter.clone() },
            Filter { chunk: Some("doc:1".into()), ..filter.clone() },
        ];
        assert!(others.iter().all(|other| !other.matches(&record)));
    }
}
