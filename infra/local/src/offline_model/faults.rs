//! Faults that a test asks for.

use std::sync::{Mutex, PoisonError};

use serde::Deserialize;

/// What goes wrong. `count` bounds how often; without it, until the mode is changed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// Nothing.
    None,
    /// Requests are answered with this status.
    Status {
        /// The status.
        status: u16,
        /// How often.
        count: Option<u64>,
        /// Seconds in the `retry-after` header.
        retry_after: Option<u64>,
    },
    /// The connection is dropped behind the n-th delta.
    CutAfterDeltas {
        /// Deltas that still arrive.
        n: usize,
        /// How often.
        count: Option<u64>,
    },
    /// An `error` event follows the n-th delta and ends the stream.
    ErrorEventAfterDeltas {
        /// Deltas that still arrive.
        #[serde(default)]
        n: usize,
        /// How often.
        count: Option<u64>,
    },
    /// No answer comes; with `n`, none behind the n-th delta.
    Hang {
        /// Deltas that still arrive; without it not even the response's head does.
        n: Option<usize>,
        /// How often.
        count: Option<u64>,
    },
}

impl Fault {
    fn count(&mut self) -> Option<&mut u64> {
        match self {
            Self::None => None,
            Self::Status { count, .. }
            | Self::CutAfterDeltas { count, .. }
            | Self::ErrorEventAfterDeltas { count, .. }
            | Self::Hang { count, .. } => count.as_mut(),
        }
    }
}

pub(super) struct Faults(Mutex<Fault>);

impl Faults {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Fault::None))
    }

    pub(super) fn set(&self, fault: Fault) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// The fault of the next request.
    pub(super) fn next(&self) -> Fault {
        let mut fault = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = fault.count() {
            if *count == 0 {
                *fault = Fault::None;
            } else {
                *count -= 1;
            }
        }
        fault.clone()
    }
}
