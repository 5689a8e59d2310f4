//! What becomes of a batch: read from its result, decided by the mapping's limits. Pure.

use std::collections::VecDeque;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::lambda::{InvokeError, MAX_PAYLOAD};
use crate::template::StreamEvent;

/// One change of a table, as the function gets it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    /// Its place in the stream.
    pub sequence: String,
    /// When it happened, in seconds since the epoch.
    pub created_s: i64,
    /// The record of the event.
    pub event: Value,
}

/// Records that are tried together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Batch {
    /// Never none.
    pub records: Vec<Record>,
    /// How often it has failed; being halved is no failure.
    pub failures: u32,
}

impl Batch {
    /// The event that the function is invoked with.
    pub(super) fn event(&self) -> Bytes {
        let records: Vec<&Value> = self.records.iter().map(|record| &record.event).collect();
        json!({ "Records": records }).to_string().into()
    }

    /// Takes off the records that are too old to be tried.
    pub(super) fn split_expired(&mut self, mapping: &StreamEvent, now_s: i64) -> Vec<Record> {
        let Some(limit) = mapping.max_age else { return Vec::new() };
        let limit_s = i64::try_from(limit.as_secs()).unwrap_or(i64::MAX);
        let expired = self.records.iter().take_while(|record| now_s - record.created_s > limit_s).count();
        self.records.drain(..expired).collect()
    }
}

/// The batches that records are tried in: none larger than an invocation may be.
pub(super) fn batches(records: Vec<Record>) -> VecDeque<Batch> {
    // The frame around the records, and a comma for each.
    const FRAME: usize = 64;
    let mut batches: VecDeque<Batch> = VecDeque::new();
    let mut size = FRAME;
    for record in records {
        let length = record.event.to_string().len() + 1;
        match batches.back_mut() {
            Some(batch) if size + length <= MAX_PAYLOAD => {
                size += length;
                batch.records.push(record);
            }
            _ => {
                size = FRAME + length;
                batches.push_back(Batch { records: vec![record], failures: 0 });
            }
        }
    }
    batches
}

/// The index of the first record that failed; `None` if all went well.
pub(super) fn failed_from(
    result: &Result<Bytes, InvokeError>,
    batch: &Batch,
    mapping: &StreamEvent,
) -> Option<usize> {
    let Ok(payload) = result else { return Some(0) };
    if !mapping.reports_item_failures {
        return None;
    }
    let answer: Value = serde_json::from_slice(payload).unwrap_or_default();
    let failures = match answer.get("batchItemFailures") {
        None | Some(Value::Null) => return None,
        Some(Value::Array(failures)) => failures,
        // As with Lambda, what does not name records that were sent fails them all.
        Some(_) => return Some(0),
    };
    let index = |failure: &Value| {
        let sequence = failure.get("itemIdentifier")?.as_str()?;
        batch.records.iter().position(|record| record.sequence == sequence)
    };
    failures.iter().map(|failure| index(failure).unwrap_or(0)).min()
}

/// What follows a failure.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// These are tried, in this order.
    Again(Vec<Batch>),
    /// It has been tried often enough.
    GiveUp(Batch),
}

/// What follows when a batch has failed from its `from`th record on.
pub(super) fn after_failure(mut batch: Batch, from: usize, mapping: &StreamEvent) -> Next {
    if from > 0 {
        // What came before is done; what is left begins with another record, so it counts anew.
        batch.records.drain(..from.min(batch.records.len()));
        return Next::Again(vec![Batch { failures: 0, ..batch }]);
    }
    if mapping.bisect && batch.records.len() > 1 {
        let rest = batch.records.split_off(batch.records.len() / 2);
        let failures = batch.failures;
        return Next::Again(vec![batch, Batch { records: rest, failures }]);
    }
    batch.failures = batch.failures.saturating_add(1);
    match mapping.max_retries {
        Some(most) if batch.failures > most => Next::GiveUp(batch),
        _ => Next::Again(vec![batch]),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::streams::tests::mapping;

    fn batch(names: &str, failures: u32) -> Batch {
        let record = |name: char| Record { sequence: name.into(), created_s: 100, event: json!({}) };
        Batch { records: names.chars().map(record).collect(), failures }
    }

    #[test]
    fn the_first_failed_record_is_found_as_lambda_finds_it() {
        let reporting = StreamEvent { reports_item_failures: true, ..mapping() };
        let from = |answer: &str| failed_from(&Ok(answer.to_owned().into()), &batch("abc", 0), &reporting);
        for fine in ["", "null", "{}", r#"{"batchItemFailures":[]}"#, r#"{"batchItemFailures":null}"#] {
            assert_eq!(from(fine), None, "{fine}");
        }
        let failures = |names: &[&str]| {
            let failures: Vec<_> = names.iter().map(|name| json!({"itemIdentifier": name})).collect();
            json!({ "batchItemFailures": failures }).to_string()
        };
        assert_eq!(from(&failures(&["c", "b"])), Some(1));
        for all in [&failures(&["c", "x"]), &failures(&[""]), r#"{"batchItemFailures":[{"id":"c"}]}"#] {
            assert_eq!(from(all), Some(0), "{all}");
        }
        let silent = mapping();
        assert_eq!(failed_from(&Ok(failures(&["b"]).into()), &batch("abc", 0), &silent), None);
        assert_eq!(failed_from(&Err(InvokeError::Closing), &batch("abc", 0), &silent), Some(0));
    }

    #[test]
    fn a_failed_batch_is_tried_again_in_parts_and_given_up_in_the_end() {
        let limited = StreamEvent { max_retries: Some(1), ..mapping() };
        let again = |batches| Next::Again(batches);
        assert_eq!(after_failure(batch("abc", 0), 0, &limited), again(vec![batch("abc", 1)]));
        assert_eq!(after_failure(batch("abc", 1), 0, &limited), Next::GiveUp(batch("abc", 2)));
        assert_eq!(after_failure(batch("abc", 1), 1, &limited), again(vec![batch("bc", 0)]));
        assert_eq!(after_failure(batch("abc", 9), 0, &mapping()), again(vec![batch("abc", 10)]));
        let halving = StreamEvent { bisect: true, ..limited };
        assert_eq!(after_failure(batch("abc", 1), 0, &halving), again(vec![batch("a", 1), batch("bc", 1)]));
        assert_eq!(after_failure(batch("a", 1), 0, &halving), Next::GiveUp(batch("a", 2)));
    }

    #[test]
    fn records_are_cut_off_by_age_and_by_size() {
        let aged = StreamEvent { max_age: Some(Duration::from_secs(60)), ..mapping() };
        let mut old = batch("abc", 0);
        old.records[2].created_s = 200;
        assert_eq!(old.clone().split_expired(&aged, 160), []);
        assert_eq!(old.clone().split_expired(&mapping(), 1_000), []);
        assert_eq!(old.split_expired(&aged, 161).len(), 2);
        assert_eq!(old.records.len(), 1);

        let mut large = batch("abc", 0).records;
        large[1].event = json!("x".repeat(MAX_PAYLOAD / 2));
        large[2].event = json!("x".repeat(MAX_PAYLOAD / 2));
        let sizes: Vec<_> =
            batches(large).iter().map(|batch| (batch.records.len(), batch.event().len())).collect();
        assert_eq!(sizes.iter().map(|(records, _)| *records).collect::<Vec<_>>(), [2, 1]);
        assert!(sizes.iter().all(|(_, size)| *size <= MAX_PAYLOAD));
        assert!(batches(Vec::new()).is_empty());
    }
}
