//! The calls of late, for tests that count them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

/// How many calls are remembered.
const CAPACITY: usize = 100_000;

/// One call that has come to its end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Entry {
    /// Its number, from 1, in the order in which calls ended.
    pub n: u64,
    /// Who made it, as IAM names them; nobody, if it was refused.
    pub caller: String,
    /// The operation, such as `PutItem`.
    pub operation: String,
    /// The tables it named.
    pub tables: Vec<String>,
    /// The partition keys it named, as far as they are known.
    pub keys: Vec<String>,
    /// The code that it was, or with a lost answer would have been, refused with.
    pub error: Option<String>,
    /// The fault that was put upon it.
    pub fault: Option<&'static str>,
    /// The capacity units it consumed, by table.
    pub consumed: BTreeMap<String, f64>,
}

/// The latest calls, oldest first.
#[derive(Debug, Default)]
pub(super) struct Journal(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    last: u64,
    entries: VecDeque<Entry>,
}

impl Journal {
    /// Remembers a call and gives it its number.
    pub(super) fn push(&self, mut entry: Entry) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.last += 1;
        entry.n = ring.last;
        if ring.entries.len() == CAPACITY {
            ring.entries.pop_front();
        }
        ring.entries.push_back(entry);
    }

    /// The calls numbered higher than `n`.
    pub(super) fn after(&self, n: u64) -> Vec<Entry> {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.entries.iter().skip_while(|entry| entry.n <= n).cloned().collect()
    }

    /// Forgets all calls; numbers go on.
    pub(super) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entries.clear();
    }
}
