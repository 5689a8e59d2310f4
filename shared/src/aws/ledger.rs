//! Table `audit`: the ledger. A record waits there, visible to the index `pending`, until the audit log
//! has it; its table forgets it long after. And the one transaction that settles a request: its record, its turn and
//! its idempotency record together. Of these items only the conversation, as it is listed, is written by anybody
//! else: by the user's other questions in it.

use std::time::Duration;

#[cfg(feature = "audit-log")]
use aws_sdk_dynamodb::types::Update;
use aws_sdk_dynamodb::types::{AttributeValue, KeysAndAttributes, TransactWriteItem};

use sha2::{Digest, Sha256};

use super::conversations::ConversationStore;
use super::idempotency::{Finished, IdempotencyStore};
use super::session::Access;
use super::table::{Cancelled, Item, Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::conversation::{Given, Turn};
use crate::error::ApiError;
use crate::item_key::{self, PARTITION, SORT};
use crate::ledger::{Outcome, Record};
use crate::meter::Ticket;
use crate::random::entropy;
use crate::retry::Backoff;
use crate::scope::{Bookkeeper, Subject, TenantScope, Ward};
use crate::sealing::DataKey;
use crate::tenant::TenantId;

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
    /// What is kept of the answer by its id. It enters with the turn, if there is one, or not at all.
    pub given: Option<(&'a ConversationStore, &'a Given)>,
    /// The first result under an idempotency key.
    pub finished: Option<(&'a IdempotencyStore, Finished<'a>)>,
    /// What seals both, where the tenant has a key of its own.
    pub seal: Option<&'a DataKey>,
}

/// A record as the ledger keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The record.
    pub record: Record,
    /// Whether it waits to be exported. One that does not is in the audit log and in the bill, both.
    pub pending: bool,
}

/// A record that has waited long to be exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overdue {
    /// Whose it is.
    pub tenant_id: TenantId,
    /// Its sort key.
    pub sort: String,
    /// When it was written.
    pub since: Timestamp,
}

/// How many records wait to be exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// All of them.
    pub all: u64,
    /// Those of tickets, which are on no bill yet.
    pub tickets: u64,
}

/// Where a list goes on.
#[derive(Clone, Debug)]
pub struct Place(Item);

impl Ledger {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// A record as an item, which waits to be exported.
    fn item(&self, record: &Record, sort: &str) -> Result<Item, StoreError> {
        let mut item = self.0.item(record, sort)?;
        let pending = item_key::pending(record.time, sort);
        item.insert(item_key::PENDING.to_owned(), AttributeValue::S(pending));
        Ok(item)
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
            let (mut record_at, mut finished_at) = (None, None);
            if entered.is_none() {
                record_at = Some(parts.len());
                parts.push(self.0.put_new(self.item(record, &sort)?)?);
            }
            let first = parts.len();
            if let Some((store, turn)) = along.turn {
                parts.extend(store.turn_parts(scope, turn, along.seal)?);
            }
            if let Some((store, given)) = along.given {
                parts.push(store.given_part(scope, given)?);
            }
            let turn_at = first..parts.len();
            if let Some((store, finished)) = &along.finished {
                finished_at = Some(parts.len());
                parts.push(store.finished_part(scope, finished, along.seal)?);
            }
            if parts.is_empty() {
                return Ok(entered.unwrap_or(Entered::Ours));
            }
            match self.0.transact(scope.tenant_id(), parts).await {
                Ok(()) => return Ok(entered.unwrap_or(Entered::Ours)),
                Err(Cancelled::Conditions(found)) => {
                    let mut found = found;
                    let mut take = |at: Option<usize>| found.get_mut(at?)?.take();
                    if let Some(there) = take(record_at) {
                        let there: Record = self.0.own(scope, there)?;
                        let ours = there.request_id == record.request_id && there.outcome != Outcome::Aborted;
                        if ours {
                            return Ok(Entered::Ours);
                        }
                        // Too late: the lease had expired. A turn enters with its ticket's record or not at
                        // all: once every ticket has its record, none can appear any more, however late.
                        (along.turn, along.given) = (None, None);
                        entered = Some(Entered::Theirs(Box::new(there)));
                    } else if turn_at.into_iter().any(|at| take(Some(at)).is_some()) {
                        // The conversation has been deleted meanwhile, and nothing of it is to be kept.
                        along = Along::default();
                    } else if take(finished_at).is_some() {
                        // The key has been given to another request meanwhile; it answers for it.
                        along.finished = None;
                    }
                }
                // Such as an answer too long for an item. The charge is known, and must be on record.
                Err(Cancelled::Failed(error))
                    if !error.passes()
                        && (along.turn.is_some() || along.given.is_some() || along.finished.is_some()) =>
                {
                    tracing::error!(
                        alert = "turn_not_kept",
                        ticket = ticket.0,
                        "What goes along with a record cannot be kept: {error}"
                    );
                    along = Along::default();
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
            let parts = vec![self.0.put_new(self.item(record, &sort)?)?];
            match self.0.transact(&record.tenant_id, parts).await {
                Ok(()) => return Ok(Entered::Ours),
                Err(Cancelled::Conditions(found)) => {
                    let there = found.into_iter().flatten().next().ok_or_else(|| self.0.missing())?;
                    let there: Record = self.0.record(there)?;
                    if there.tenant_id != record.tenant_id {
                        return Err(self.0.missing());
                    }
                    return Ok(Entered::Theirs(Box::new(there)));
                }
                Err(Cancelled::Failed(error)) => failed = self.pause(failed, error).await?,
            }
        }
    }

    /// Enters an event. The same record, entered again, is the same event.
    ///
    /// # Errors
    /// If the table does not answer however often it is asked: then the record may be there or not.
    pub async fn note(&self, record: &Record) -> Result<(), StoreError> {
        let mut failed = 0;
        let item = self.event(record)?;
        loop {
            let put = self
                .0
                .client(&record.tenant_id)
                .put_item()
                .table_name(&self.0.name)
                .set_item(Some(item.clone()))
                .condition_expression("attribute_not_exists(#p)")
                .expression_attribute_names("#p", PARTITION);
            match put.send().await.map_err(|e| self.0.failed(e)) {
                // It is there already, and perhaps exported.
                Ok(_) | Err(StoreError::Conflict) => return Ok(()),
                Err(error) => failed = self.pause(failed, error).await?,
            }
        }
    }

    /// Enters an event, and the first result of its request if that has an idempotency key: both or neither.
    ///
    /// # Errors
    /// [`ApiError::superseded`] if the key has been given to another request meanwhile; otherwise if the table does not
    /// answer however often it is asked: then both may be there or not.
    pub async fn note_finished(
        &self,
        scope: &TenantScope,
        record: &Record,
        finished: Option<(&IdempotencyStore, Finished<'_>)>,
        seal: Option<&DataKey>,
    ) -> Result<(), ApiError> {
        let Some((store, finished)) = finished else { return Ok(self.note(record).await?) };
        let mut failed = 0;
        loop {
            let parts = vec![self.event_part(record)?, store.finished_part(scope, &finished, seal)?];
            match self.0.transact(scope.tenant_id(), parts).await {
                Ok(()) => return Ok(()),
                // The event was there, and the key still this request's: an answer to it was lost.
                Err(Cancelled::Conditions(found)) if matches!(found.get(1), Some(None)) => return Ok(()),
                Err(Cancelled::Conditions(_)) => return Err(ApiError::superseded()),
                Err(Cancelled::Failed(error)) => failed = self.pause(failed, error).await?,
            }
        }
    }

    fn event(&self, record: &Record) -> Result<Item, StoreError> {
        let content = serde_json::to_vec(record).map_err(|e| self.0.corrupt(e))?;
        let hash = hex::encode(Sha256::digest(content));
        self.item(record, &item_key::event(record.time, hash.get(..16).unwrap_or(&hash)))
    }

    /// The part of a transaction that enters an event.
    pub(super) fn event_part(&self, record: &Record) -> Result<TransactWriteItem, StoreError> {
        self.0.put_new(self.event(record)?)
    }

    /// A page of the records of a tenant's tickets, the last number first, and where to go on.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn tickets(
        &self,
        subject: &impl Subject,
        after: Option<String>,
    ) -> Result<(Vec<Kept>, Option<String>), StoreError> {
        let page = Page { prefix: item_key::TICKETS, newest_first: true, limit: 1_000, after };
        let (items, next) = self.0.items(subject, page).await?;
        let kept = |item: Item| {
            let pending = item.contains_key(item_key::PENDING);
            Ok(Kept { record: self.0.record(item)?, pending })
        };
        Ok((items.into_iter().map(kept).collect::<Result<_, StoreError>>()?, next))
    }

    /// Whether a limit has refused requests of a tenant since `since`. Of very many events in that time,
    /// only the last are looked at.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn has_refused(
        &self,
        subject: &impl Subject,
        limit: &str,
        since: Timestamp,
    ) -> Result<bool, StoreError> {
        let page = Page { prefix: item_key::EVENTS, newest_first: true, limit: 500, after: None };
        let (events, _): (Vec<Record>, _) = self.0.query(subject, page).await?;
        let mut of_late = events.iter().take_while(|event| event.time >= since);
        Ok(of_late.any(|event| event.outcome == Outcome::Refused && event.limit.as_deref() == Some(limit)))
    }

    /// The records under these sort keys that wait to be exported, at most 100; of one that does not
    /// parse, why. The others are exported, or there are none.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn pending_of(
        &self,
        ward: &Ward,
        sorts: &[String],
    ) -> Result<Vec<(String, Result<Record, StoreError>)>, StoreError> {
        let mut keys: Vec<Item> = sorts.iter().map(|sort| Table::key(ward.tenant_id(), sort)).collect();
        let (mut found, mut failed) = (Vec::new(), 0);
        while !keys.is_empty() {
            let wanted = KeysAndAttributes::builder()
                .set_keys(Some(std::mem::take(&mut keys)))
                .consistent_read(true)
                .build()
                .map_err(|e| self.0.corrupt(e))?;
            let call = self.0.client(ward.tenant_id()).batch_get_item().request_items(&self.0.name, wanted);
            let answer = call.send().await.map_err(|e| self.0.failed(e))?;
            let items = answer.responses.and_then(|mut tables| tables.remove(&self.0.name));
            for item in items.unwrap_or_default() {
                if !item.contains_key(item_key::PENDING) || self.0.look(ward, &item).is_err() {
                    continue;
                }
                let sort = item.get(SORT).and_then(|sort| sort.as_s().ok().cloned());
                found.push((sort.ok_or_else(|| self.0.missing())?, self.0.record(item)));
            }
            let left = answer.unprocessed_keys.and_then(|mut tables| tables.remove(&self.0.name));
            if let Some(left) = left {
                keys = left.keys;
                failed = self.pause(failed, self.0.missing_answer("unprocessed keys")).await?;
            }
        }
        Ok(found)
    }

    /// A page of all tenants' records that wait to be exported since before `before`: whose they are,
    /// their sort keys and when they were written; and where to go on.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn overdue(
        &self,
        _bookkeeper: &Bookkeeper,
        before: Timestamp,
        after: Option<Place>,
    ) -> Result<(Vec<Overdue>, Option<Place>), StoreError> {
        let answer = self
            .0
            .own_client()
            .scan()
            .table_name(&self.0.name)
            .index_name(item_key::PENDING_INDEX)
            .projection_expression("#t, #s, #p")
            .filter_expression("#p < :before")
            .expression_attribute_names("#t", PARTITION)
            .expression_attribute_names("#s", SORT)
            .expression_attribute_names("#p", item_key::PENDING)
            .expression_attribute_values(":before", AttributeValue::S(item_key::pending(before, "")))
            .set_exclusive_start_key(after.map(|place| place.0))
            .send()
            .await
            .map_err(|e| self.0.failed(e))?;
        let text = |item: &Item, name: &str| item.get(name).and_then(|value| value.as_s().ok().cloned());
        let overdue = answer.items.unwrap_or_default().into_iter().map(|item| {
            let since = text(&item, item_key::PENDING)?.split('#').next()?.parse().ok()?;
            Some(Overdue {
                tenant_id: text(&item, PARTITION)?.parse().ok()?,
                sort: text(&item, SORT)?,
                since: Timestamp::from_millis(since),
            })
        });
        let overdue = overdue.collect::<Option<_>>().ok_or_else(|| self.0.missing())?;
        Ok((overdue, answer.last_evaluated_key.map(Place)))
    }

    /// A tenant's records that wait to be exported, the oldest first, with their sort keys: at most
    /// `limit`, and those after `from`, a text that [`item_key::pending`] makes. What was written in the
    /// last moments may be missing: the index follows its table.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn pending(
        &self,
        subject: &impl Subject,
        from: &str,
        limit: i32,
    ) -> Result<Vec<(String, Record)>, StoreError> {
        let answer = self
            .0
            .client(subject.tenant_id())
            .query()
            .table_name(&self.0.name)
            .index_name(item_key::PENDING_INDEX)
            .key_condition_expression("#t = :t AND #p > :from")
            .expression_attribute_names("#t", PARTITION)
            .expression_attribute_names("#p", item_key::PENDING)
            .expression_attribute_values(":t", AttributeValue::S(subject.tenant_id().to_string()))
            .expression_attribute_values(":from", AttributeValue::S(from.to_owned()))
            .limit(limit)
            .send()
            .await
            .map_err(|e| self.0.failed(e))?;
        let own = |item: &Item| self.0.look(subject, item).is_ok();
        let records = answer.items.unwrap_or_default().into_iter().filter(own).map(|item| {
            let sort = item.get(SORT).and_then(|sort| sort.as_s().ok().cloned());
            Ok((sort.ok_or_else(|| self.0.missing())?, self.0.record(item)?))
        });
        records.collect()
    }

    /// How many of a tenant's records wait to be exported, whatever they hold: one that does not parse waits
    /// as well. As [`Ledger::pending`], what was written in the last moments may be missing.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn waiting(&self, subject: &impl Subject) -> Result<Waiting, StoreError> {
        let (mut waiting, mut after) = (Waiting::default(), None);
        loop {
            let answer = self
                .0
                .client(subject.tenant_id())
                .query()
                .table_name(&self.0.name)
                .index_name(item_key::PENDING_INDEX)
                .key_condition_expression("#t = :t")
                .projection_expression("#s")
                .expression_attribute_names("#t", PARTITION)
                .expression_attribute_names("#s", SORT)
                .expression_attribute_values(":t", AttributeValue::S(subject.tenant_id().to_string()))
                .set_exclusive_start_key(after)
                .send()
                .await
                .map_err(|e| self.0.failed(e))?;
            for item in answer.items.unwrap_or_default() {
                let sort = item.get(SORT).and_then(|sort| sort.as_s().ok());
                waiting.all += 1;
                waiting.tickets += u64::from(sort.is_some_and(|sort| sort.starts_with(item_key::TICKETS)));
            }
            after = answer.last_evaluated_key;
            if after.is_none() {
                return Ok(waiting);
            }
        }
    }

    /// The part of a transaction that takes a record out of those that wait, and lets the table forget
    /// it at `expires_at_s`. It must wait.
    #[cfg(feature = "audit-log")]
    pub(super) fn exported_part(
        &self,
        ward: &Ward,
        sort: &str,
        expires_at_s: i64,
    ) -> Result<TransactWriteItem, StoreError> {
        let update = Update::builder()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(ward.tenant_id(), sort)))
            .update_expression("SET #e = :e REMOVE #p")
            .condition_expression("attribute_exists(#p)")
            .expression_attribute_names("#e", "expires_at_s")
            .expression_attribute_names("#p", item_key::PENDING)
            .expression_attribute_values(":e", AttributeValue::N(expires_at_s.to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        Ok(TransactWriteItem::builder().update(update).build())
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
