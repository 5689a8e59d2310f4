//! A function's memory of requests that were turned away: a flood of them becomes few records with exact
//! counts. Pure.

use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::ledger::{Asked, Denial, Record};
use crate::tenant::TenantId;

/// How long denials are gathered before they are written down, in milliseconds.
const GATHERED_MS: u64 = 5_000;
/// How many are gathered at most.
const GATHERED: u64 = 500;

/// The memory of one function's process.
#[derive(Debug, Default)]
pub struct Tally(HashMap<(TenantId, Denial), Gathered>);

#[derive(Debug)]
struct Gathered {
    count: u64,
    /// Since when; what was just written down stays with none, so that the next is gathered.
    since: Timestamp,
    last: Asked,
    /// What is on its way into the ledger. It stays as it is until it is known to be there, so that
    /// writing it again changes nothing.
    record: Option<Record>,
}

impl Gathered {
    fn take(&mut self, tenant: &TenantId, denial: Denial, now: Timestamp) -> Record {
        let record = Record::denied(tenant.clone(), denial, self.count, now, self.last.clone());
        (self.count, self.since) = (0, now);
        record
    }
}

impl Tally {
    /// Counts a denial.
    pub fn count(&mut self, tenant: &TenantId, denial: Denial, asked: Asked) {
        // The first of its kind is due at once.
        let since = Timestamp::from_millis(0);
        let first = || Gathered { count: 0, since, last: asked.clone(), record: None };
        let gathered = self.0.entry((tenant.clone(), denial)).or_insert_with(first);
        gathered.count += 1;
        gathered.last = asked;
    }

    /// What has to be written down now, of one tenant or of all. It is due until it is [`Tally::entered`].
    pub fn due(&mut self, of: Option<&TenantId>, now: Timestamp) -> Vec<Record> {
        let mut due = Vec::new();
        self.0.retain(|(tenant, denial), gathered| {
            if of.is_some_and(|of| of != tenant) {
                return true;
            }
            let old = now.millis_since(gathered.since) >= GATHERED_MS;
            if gathered.record.is_none() && gathered.count > 0 && (old || gathered.count >= GATHERED) {
                gathered.record = Some(gathered.take(tenant, *denial, now));
            }
            due.extend(gathered.record.clone());
            !(old && gathered.count == 0 && gathered.record.is_none())
        });
        due
    }

    /// A record is in the ledger.
    pub fn entered(&mut self, record: &Record) {
        let written = self.0.values_mut().find(|gathered| gathered.record.as_ref() == Some(record));
        if let Some(gathered) = written {
            gathered.record = None;
        }
    }

    /// All that is not known to be in the ledger, however short it has waited. It is forgotten here.
    pub fn drain(&mut self, now: Timestamp) -> Vec<Record> {
        let mut all = Vec::new();
        for ((tenant, denial), mut gathered) in self.0.drain() {
            all.extend(gathered.record.take());
            if gathered.count > 0 {
                all.push(gathered.take(&tenant, denial, now));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::error::Code;
    use crate::meter::Limit;
    use crate::scope::RequestId;

    /// A ledger in which equal records are one.
    #[derive(Default)]
    struct Written(BTreeSet<String>, HashMap<(TenantId, String), u64>);

    impl Written {
        fn note(&mut self, record: &Record) {
            if self.0.insert(serde_json::to_string(record).unwrap()) {
                let kind = (record.tenant_id.clone(), format!("{:?}", record.action));
                *self.1.entry(kind).or_default() += record.count;
                assert_eq!(record.user_id.is_some(), record.count == 1, "of many it names no one");
            }
        }
    }

    #[test]
    fn a_flood_becomes_few_records_with_exact_counts() {
        let tenants: [TenantId; 2] = ["acme".parse().unwrap(), "globex".parse().unwrap()];
        let asked = |n: i64| Asked {
            request_id: RequestId::from(n.to_string()),
            key_id: None,
            user_id: Some("ann".parse().unwrap()),
        };
        let denials = [Denial::Limit(Limit::Requests), Denial::Auth(Code::InvalidKey), Denial::Injection];
        let (mut tally, mut written) = (Tally::default(), Written::default());
        // 10 a second for a minute, of each kind and of two tenants. Now and then the ledger fails, or
        // its answer is lost.
        for n in 0..600 {
            let now = Timestamp::from_millis(1_790_000_000_000 + n * 100);
            for tenant in &tenants {
                denials.iter().for_each(|denial| tally.count(tenant, *denial, asked(n)));
            }
            let of = (n % 5 == 0).then_some(&tenants[0]);
            for record in tally.due(of, now) {
                assert!(of.is_none_or(|of| *of == record.tenant_id));
                if n % 7 != 3 {
                    written.note(&record);
                }
                if n % 7 < 3 {
                    tally.entered(&record);
                }
            }
        }
        // Those that are left, when the process ends.
        let end = Timestamp::from_millis(1_790_000_100_000);
        tally.drain(end).iter().for_each(|record| written.note(record));
        assert!(tally.drain(end).is_empty());
        assert_eq!(written.1.len(), 6);
        assert!(written.1.values().all(|count| *count == 600), "{:?}", written.1);
        assert!(written.0.len() < 6 * 20, "{} records", written.0.len());
    }

    #[test]
    fn who_has_gone_is_forgotten() {
        let (mut tally, acme) = (Tally::default(), "acme".parse().unwrap());
        let at = |s: i64| Timestamp::from_millis((1_790_000_000 + s) * 1_000);
        let asked = Asked { request_id: RequestId::from("r".to_owned()), key_id: None, user_id: None };
        tally.count(&acme, Denial::Injection, asked);
        let due = tally.due(None, at(0));
        assert_eq!((due.len(), tally.due(None, at(60))), (1, due.clone()), "until it is entered");
        tally.entered(&due[0]);
        assert!(tally.due(None, at(65)).is_empty() && tally.0.is_empty());
    }
}
