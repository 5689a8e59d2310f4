//! Table `audit`: the ledger. And the one transaction that settles a request: its record, its turn and
//! its idempotency record together. None of these items is written by anybody else, so nothing
//! contends for them.

use std::time::Duration;

use aws_config::SdkConfig;

use super::conversations::ConversationStore;
use super::idempotency::{Finished, IdempotencyStore};
use super::table::{Cancelled, Item, Page, StoreError, Table};
use crate::conversation::Turn;
use crate::item_key;
use crate::ledger::{Outcome, Record};
use crate::meter::Ticket;
use crate::random::{self, entropy};
use crate::retry::Backoff;
use crate::scope::{Subject, TenantScope};

/// Settling is worth waiting for: without it a request is charged at its bound.
const BACKOFF: Backoff =
    Backoff { attempts: 5, base: Duration::from_millis(40), cap: Duration::from_secs(1) };

/// The table.
#[derive(Clone, Debug)]
pub struct Ledger(Table);

/// What the ledger holds for a ticket once a record for it has been offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entered {
    /// The record that was offered.
    Ours,
    /// Another one, which was there first and stands.
    Theirs(Box<Record>),
}

/// What goes into the ledger's transaction beside the record.
#[derive(Debug, Default)]
pub struct Along<'a> {
    /// The turn of a conversation.
    pub turn: Option<(&'a ConversationStore, &'a Turn)>,
    /// The first result under an idempotency key.
    pub finished: Option<(&'a IdempotencyStore, Finished<'a>)>,
}

impl Ledger {
    /// The table of that name.
    pub fn new(config: &SdkConfig, table: String) -> Self {
        Self(Table::new(config, table))
    }

    fn item(&self, record: &Record, sort: &str) -> Result<Item, StoreError> {
        self.0.item(record, sort)
    }

    /// Enters the record of a settled request, with what goes along, all or nothing. Asked again after
    /// an answer was lost, it finds its own record and is content.
    ///
    /// # Errors
    /// If the table does not answer however often it is asked: then the record may be there or not.
    pub async fn settle(
        &self,
        scope: &TenantScope,
        ticket: Ticket,
        record: &Record,
        along: Along<'_>,
    ) -> Result<Entered, StoreError> {
        let mut along = along;
        let sort = item_key::ticket(ticket);
        let mut entered = None;
        let mut failed = 0;
        loop {
            let mut parts = Vec::new();
            let (mut record_at, mut turn_at, mut finished_at) = (None, None, None);
            if entered.is_none() {
                record_at = Some(parts.len());
                parts.push(self.0.put_new(self.item(record, &sort)?)?);
            }
            if let Some((store, turn)) = along.turn {
                turn_at = Some(parts.len());
                parts.push(store.new_part(scope, turn)?);
            }
            if let Some((store, finished)) = &along.finished {
                finished_at = Some(parts.len());
                parts.push(store.finished_part(scope, finished)?);
            }
            if parts.is_empty() {
                return Ok(entered.unwrap_or(Entered::Ours));
            }
            match self.0.transact(parts).await {
                Ok(()) => return Ok(entered.unwrap_or(Entered::Ours)),
                Err(Cancelled::Conditions(found)) => {
                    let mut found = found;
                    let mut take = |at: Option<usize>| found.get_mut(at?)?.take();
                    if let Some(there) = take(record_at) {
                        let there: Record = self.0.record(there)?;
                        let ours = there.request_id == record.request_id && there.outcome != Outcome::Aborted;
                        if ours {
                            return Ok(Entered::Ours);
                        }
                        // Too late: the lease had expired. What goes along is still worth keeping.
                        entered = Some(Entered::Theirs(Box::new(there)));
                    } else if take(turn_at).is_some() {
                        along.turn = None;
                    } else if take(finished_at).is_some() {
                        // The key has been given to another request meanwhile; it answers for it.
                        along.finished = None;
                    }
                }
                Err(Cancelled::Failed(error)) => failed = self.pause(failed, error).await?,
            }
        }
    }

    /// Enters the record of an expired lease, unless its request was settled after all.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn abort(&self, ticket: Ticket, record: &Record) -> Result<Entered, StoreError> {
        let sort = item_key::ticket(ticket);
        let mut failed = 0;
        loop {
            match self.0.transact(vec![self.0.put_new(self.item(record, &sort)?)?]).await {
                Ok(()) => return Ok(Entered::Ours),
                Err(Cancelled::Conditions(found)) => {
                    let there = found.into_iter().flatten().next().ok_or_else(|| self.0.missing())?;
                    return Ok(Entered::Theirs(Box::new(self.0.record(there)?)));
                }
                Err(Cancelled::Failed(error)) => failed = self.pause(failed, error).await?,
            }
        }
    }

    /// Enters an event.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn note(&self, record: &Record) -> Result<(), StoreError> {
        let sort = item_key::event(record.time, &random::base62(8, &mut entropy()));
        let item = self.item(record, &sort)?;
        let put = self.0.client.put_item().table_name(&self.0.name).set_item(Some(item));
        put.send().await.map_err(|e| self.0.failed(e))?;
        Ok(())
    }

    /// A page of the records of a tenant's tickets, the last number first, and where to go on.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn tickets(
        &self,
        subject: &impl Subject,
        after: Option<String>,
    ) -> Result<(Vec<Record>, Option<String>), StoreError> {
        let page = Page { prefix: item_key::TICKETS, newest_first: true, limit: 1_000, after };
        self.0.query(subject.tenant_id(), page).await
    }

    /// Waits before the next attempt, or gives up.
    async fn pause(&self, failed: u32, error: StoreError) -> Result<u32, StoreError> {
        let failed = failed + 1;
        let wait = BACKOFF.wait(failed, None, &mut entropy()).filter(|_| error.passes());
        let Some(wait) = wait else { return Err(error) };
        tracing::warn!(attempt = failed, "The ledger did not answer, trying again: {error}");
        tokio::time::sleep(wait).await;
        Ok(failed)
    }
}
