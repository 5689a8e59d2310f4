//! Requests that were turned away, on their way into the ledger.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::timeout;

use crate::aws::ledger::Ledger;
use crate::clock::Clock;
use crate::ledger::{Asked, Denial, Record};
use crate::scope::{Subject, Ward};
use crate::tally::Tally;
use crate::tenant::TenantId;

/// How long a request is held up at most by what has to be written down. What is not there by then is
/// written with a later request, or when the process ends.
const PATIENCE: Duration = Duration::from_millis(500);

/// The denials of one function's process.
#[derive(Debug)]
pub struct Denials {
    ledger: Ledger,
    clock: Clock,
    tally: Mutex<Tally>,
}

impl Denials {
    /// Those that go into this ledger.
    pub fn new(ledger: Ledger, clock: Clock) -> Self {
        Self { ledger, clock, tally: Mutex::default() }
    }

    /// Counts a request that is turned away, and writes down what is due of its tenant: the first of its
    /// kind at once, a flood as few records with exact counts.
    pub async fn deny(&self, ward: &Ward, denial: Denial, asked: Asked) {
        self.tally(|tally| tally.count(ward.tenant_id(), denial, asked));
        self.write_down(Some(ward.tenant_id())).await;
    }

    /// Writes down what is due of every tenant. It runs beside a request's own work, never before it: no
    /// tenant waits for what another has done.
    pub async fn catch_up(&self) {
        self.write_down(None).await;
    }

    /// Writes down what is still only remembered: the process is about to end.
    pub async fn close(&self) {
        for record in self.tally(|tally| tally.drain(self.clock.now())) {
            self.enter(&record).await;
        }
    }

    async fn write_down(&self, of: Option<&TenantId>) {
        let due = self.tally(|tally| tally.due(of, self.clock.now()));
        let all = async {
            for record in &due {
                self.enter(record).await;
            }
        };
        if timeout(PATIENCE, all).await.is_err() {
            tracing::warn!("Denials could not be written down yet: the ledger takes too long");
        }
    }

    async fn enter(&self, record: &Record) {
        match Box::pin(self.ledger.note(record)).await {
            Ok(()) => self.tally(|tally| tally.entered(record)),
            Err(error) => tracing::error!("Denials could not be written down yet: {error}"),
        }
    }

    fn tally<T>(&self, with: impl FnOnce(&mut Tally) -> T) -> T {
        with(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
