//! The month's bill: what records add up to, line by line. Pure; [`crate::aws::usage`] keeps the lines.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ledger::{Line, Record};
use crate::meter::BillingMonth;
use crate::pricing::Usage;
use crate::units::{NanoUsd, Tokens};

/// A line: one month's sums of one model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums {
    /// Requests; one that used two models counts on the first's line.
    pub requests: u64,
    /// Tokens of the model, by kind.
    #[serde(flatten)]
    pub usage: Usage,
    /// Tokens of the embedding model.
    pub embedding_tokens: Tokens,
    /// Tokens that nobody reported, charged at their bound.
    pub unreported_tokens: Tokens,
    /// What they cost.
    pub cost_nano_usd: NanoUsd,
    /// Answers of which users said that they helped.
    pub feedback_up: u64,
    /// Answers of which users said that they did not.
    pub feedback_down: u64,
    /// How long the line's requests took.
    #[serde(skip)]
    pub latency: Histogram,
}

impl Sums {
    /// Adds a record's line.
    fn add(&mut self, line: &Line<'_>) {
        self.requests += line.requests;
        self.usage = self.usage + line.usage;
        self.embedding_tokens = self.embedding_tokens + line.embedding_tokens;
        self.unreported_tokens = self.unreported_tokens + line.unreported_tokens;
        self.cost_nano_usd = self.cost_nano_usd + line.cost;
        let (up, down) = line.feedback;
        self.feedback_up += up;
        self.feedback_down += down;
        if let Some(ms) = line.latency_ms {
            self.latency.add(ms);
        }
    }

    /// What is counted, beside durations, by name.
    pub const fn counters(&self) -> [(&'static str, u64); 10] {
        [
            ("requests", self.requests),
            ("input_tokens", self.usage.input_tokens.0),
            ("output_tokens", self.usage.output_tokens.0),
            ("cache_read_input_tokens", self.usage.cache_read_input_tokens.0),
            ("cache_creation_input_tokens", self.usage.cache_creation_input_tokens.0),
            ("embedding_tokens", self.embedding_tokens.0),
            ("unreported_tokens", self.unreported_tokens.0),
            ("cost_nano_usd", self.cost_nano_usd.0),
            ("feedback_up", self.feedback_up),
            ("feedback_down", self.feedback_down),
        ]
    }

    /// Adds another line's sums.
    pub fn merge(&mut self, other: &Self) {
        self.requests += other.requests;
        self.usage = self.usage + other.usage;
        self.embedding_tokens = self.embedding_tokens + other.embedding_tokens;
        self.unreported_tokens = self.unreported_tokens + other.unreported_tokens;
        self.cost_nano_usd = self.cost_nano_usd + other.cost_nano_usd;
        self.feedback_up += other.feedback_up;
        self.feedback_down += other.feedback_down;
        self.latency.merge(&other.latency);
    }
}

/// A bill, or a part of it: sums by month and model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bill(pub BTreeMap<(BillingMonth, String), Sums>);

impl Bill {
    /// Adds a record.
    pub fn add(&mut self, record: &Record) {
        for line in record.lines() {
            self.0.entry((record.month, line.model.to_owned())).or_default().add(&line);
        }
    }

    /// What of it is charged for: without what users say of answers, which has no ticket.
    #[must_use]
    pub fn charged(&self) -> Self {
        let charged = |sums: &Sums| Sums { feedback_up: 0, feedback_down: 0, ..sums.clone() };
        let lines = self.0.iter().map(|(line, sums)| (line.clone(), charged(sums)));
        Self(lines.filter(|(_, sums)| *sums != Sums::default()).collect())
    }

    /// All of a month.
    pub fn month(&self, month: BillingMonth) -> Sums {
        let mut all = Sums::default();
        self.0.iter().filter(|((m, _), _)| *m == month).for_each(|(_, sums)| all.merge(sums));
        all
    }
}

/// Counts of durations in buckets that grow by a quarter of a doubling: whatever is read out of it is
/// at most 19 % above the truth, and never below. Counts add up, which is why the bill can keep it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram(BTreeMap<u8, u64>);

/// Buckets in a doubling.
const PER_DOUBLING: f64 = 4.0;

impl Histogram {
    /// A histogram of these counts by bucket.
    pub const fn of(counts: BTreeMap<u8, u64>) -> Self {
        Self(counts)
    }

    /// The counts by bucket.
    pub const fn counts(&self) -> &BTreeMap<u8, u64> {
        &self.0
    }

    fn add(&mut self, ms: u64) {
        // 2^(200/4) ms is longer than anything runs.
        let place = ((ms.max(1) as f64).log2() * PER_DOUBLING).ceil().clamp(0.0, 200.0);
        *self.0.entry(place as u8).or_default() += 1;
    }

    fn merge(&mut self, other: &Self) {
        for (bucket, count) in &other.0 {
            *self.0.entry(*bucket).or_default() += count;
        }
    }

    /// The duration, in milliseconds, that a share `q` of all do not exceed; nothing of nothing.
    pub fn quantile(&self, q: f64) -> Option<u64> {
        let total: u64 = self.0.values().sum();
        let rank = ((total as f64 * q).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (bucket, count) in &self.0 {
            seen += count;
            if seen >= rank {
                return Some((f64::from(*bucket) / PER_DOUBLING).exp2().floor() as u64);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_never_below_the_truth_and_little_above() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        (1..=1_000).for_each(|ms| histogram.add(ms));
        for (q, truth) in [(0.5, 500.0), (0.9, 900.0), (0.99, 990.0), (1.0, 1_000.0)] {
            let read = histogram.quantile(q).unwrap() as f64;
            assert!((truth - 1.0..truth * 1.19).contains(&read), "{q}: {read}");
        }
        histogram.add(0);
        histogram.add(u64::MAX);
        assert!(histogram.quantile(1.0).is_some());
    }
}
