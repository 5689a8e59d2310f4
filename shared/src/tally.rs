//! A function's memory of requests that were turned away: a flood of them becomes few records with exact
//! counts. Pure.

use std::collections::HashMap;

use crate::clock::Timestamp;
use crate::ledger::{Asked, Denial, Record};
use crate::scope::{Subject, Ward};
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
    ward: Ward,
    count: u64,
    /// Since when; what was just written down stays with none, so that the next is gathered.
    since: Timestamp,
    last: Asked,
}

/// Denials to write down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    ward: Ward,
    denial: Denial,
    count: u64,
    last: Asked,
}

impl Due {
    /// Their record.
    pub fn record(&self, now: Timestamp) -> Record {
        Record::denied(self.ward.tenant_id().clone(), self.denial, self.count, now, self.last.clone())
    }
}

impl Tally {
    /// Counts a denial.
    pub fn count(&mut self, ward: Ward, denial: Denial, asked: Asked) {
        // The first of its kind is due at once.
        let since = Timestamp::from_millis(0);
        let key = (ward.tenant_id().clone(), denial);
        let gathered =
            self.0.entry(key).or_insert_with(|| Gathered { ward, count: 0, since, last: asked.clone() });
        gathered.count += 1;
        gathered.last = asked;
    }

    /// What has to be written down now. It is taken off.
    pub fn due(&mut self, now: Timestamp) -> Vec<Due> {
        let mut due = Vec::new();
        self.0.retain(|(_, denial), gathered| {
            let old = now.millis_since(gathered.since) >= GATHERED_MS;
            if gathered.count > 0 && (old || gathered.count >= GATHERED) {
                let (ward, last) = (gathered.ward.clone(), gathered.last.clone());
                due.push(Due { ward, denial: *denial, count: gathered.count, last });
                (gathered.count, gathered.since) = (0, now);
                return true;
            }
            !(old && gathered.count == 0)
        });
        due
    }

    /// All that has not been written down. It is taken off.
    pub fn drain(&mut self) -> Vec<Due> {
        let all = self.0.drain().filter(|(_, gathered)| gathered.count > 0);
        all.map(|((_, denial), Gathered { ward, count, last, .. })| Due { ward, denial, count, last })
            .collect()
    }

    /// Takes back what could not be written down.
    pub fn not_written(&mut self, due: Due, now: Timestamp) {
        let Due { ward, denial, count, last } = due;
        let key = (ward.tenant_id().clone(), denial);
        self.0.entry(key).or_insert(Gathered { ward, count: 0, since: now, last }).count += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use crate::meter::Limit;
    use crate::scope::RequestId;

    #[test]
    fn a_flood_becomes_few_records_with_exact_counts() {
        let ward = |id: &str| Ward::named(id.parse().unwrap());
        let asked = |n: i64| Asked {
            request_id: RequestId::from(n.to_string()),
            key_id: None,
            user_id: Some("ann".parse().unwrap()),
        };
        let denials = [Denial::Limit(Limit::Requests), Denial::Auth(Code::InvalidKey), Denial::Injection];
        let mut tally = Tally::default();
        let mut written = HashMap::new();
        let (mut records, mut failures) = (0, 0);
        let mut write = |tally: &mut Tally, now: Timestamp, fails: bool| {
            for due in tally.due(now) {
                if fails {
                    failures += 1;
                    tally.not_written(due, now);
                    continue;
                }
                let record = due.record(now);
                assert_eq!(record.user_id.is_some(), record.count == 1, "of many it names no one");
                *written.entry((record.tenant_id, record.action)).or_insert(0) += record.count;
                records += 1;
            }
        };
        // 10 a second for a minute, of each kind and of two tenants; the ledger fails now and then.
        for n in 0..600 {
            let now = Timestamp::from_millis(1_790_000_000_000 + n * 100);
            for id in ["acme", "globex"] {
                denials.iter().for_each(|denial| tally.count(ward(id), *denial, asked(n)));
            }
            write(&mut tally, now, n % 7 == 3);
        }
        // Those that are left, when the process ends.
        let mut last = Tally::default();
        for due in tally.drain() {
            last.not_written(due, Timestamp::from_millis(0));
        }
        assert!(tally.drain().is_empty());
        write(&mut last, Timestamp::from_millis(1_790_000_100_000), false);
        assert_eq!(written.len(), 6);
        assert!(written.values().all(|count| *count == 600), "{written:?}");
        assert!(records < 6 * 20 && failures > 0, "{records} records, {failures} failures");
        assert!(last.due(Timestamp::from_millis(1_790_000_200_000)).is_empty() && last.0.is_empty());
    }
}
