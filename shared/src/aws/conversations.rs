//! Table `conversations`: what a tenant's users and its assistant have said to each other.

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem, Update};

use super::idempotency::{Finished, IdempotencyStore};
use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Item, Page, StoreError, Table, wrapped_value};
use crate::clock::Timestamp;
use crate::conversation::{Conversation, Feedback, Given, MOST_TURNS, Turn};
use crate::ids::{ConversationId, MessageId};
use crate::item_key::{self, PARTITION, SORT};
use crate::ledger::Record;
use crate::scope::TenantScope;
use crate::sealing::{DataKey, SealError};

/// What a user has said of an answer: of its turn, and of the answer by its id.
const FEEDBACK: &str = "feedback";

/// What of a turn its tenant's key seals: what users and the model have written, and titles.
const TEXT: [&str; 5] = ["question", "answer", "citations", "title", FEEDBACK];

/// Turns that are deleted at a time.
const TURNS_AT_ONCE: i32 = 500;

/// The table.
#[derive(Clone, Debug)]
pub struct ConversationStore(Table);

/// What became of what a user says of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rated {
    /// It is kept.
    Yes,
    /// There is no such answer, or something was said of it before.
    No,
    /// The idempotency key is another request's now.
    Superseded,
}

impl ConversationStore {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// The latest turns of a conversation of the scope's tenant and user, newest first; none if there
    /// is no such conversation, it is another user's, it is deleted, or all of it is past its retention.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn history(
        &self,
        scope: &TenantScope,
        conversation: &ConversationId,
        now: Timestamp,
    ) -> Result<Vec<Turn>, StoreError> {
        let page = Page {
            prefix: &item_key::turns(conversation),
            newest_first: true,
            limit: i32::try_from(MOST_TURNS).unwrap_or(i32::MAX),
            after: None,
        };
        let (turns, _) = self.turns_of(scope, page, now).await?;
        let Some(latest) = turns.first() else { return Ok(turns) };
        let listed = self.listed(scope, latest).await?;
        Ok(if listed.is_some_and(|listed| !listed.deleting) { turns } else { Vec::new() })
    }

    /// A page of a user's own turns that are within their retention, and the sort key to go on after.
    async fn turns_of(
        &self,
        scope: &TenantScope,
        page: Page<'_>,
        now: Timestamp,
    ) -> Result<(Vec<Turn>, Option<String>), StoreError> {
        let (items, next) = self.0.items(scope, page).await?;
        let mut turns: Vec<Turn> = self.0.opened(scope, items).await?;
        turns.retain(|turn| turn.user_id.as_ref() == scope.user_id() && turn.is_kept(scope.limits(), now));
        Ok((turns, next))
    }

    /// The last turn of a user's own conversation, whose turns start with `prefix`, if it is within its
    /// retention.
    async fn latest(
        &self,
        scope: &TenantScope,
        prefix: &str,
        now: Timestamp,
    ) -> Result<Option<Turn>, StoreError> {
        let page = Page { prefix, newest_first: true, limit: 1, after: None };
        Ok(self.turns_of(scope, page, now).await?.0.pop())
    }

    /// The conversation of a turn, as it is listed, be it on its way to be deleted.
    async fn listed(&self, scope: &TenantScope, turn: &Turn) -> Result<Option<Conversation>, StoreError> {
        let sort = listed_at(turn);
        let Some(item) = self.0.item_at(scope.tenant_id(), &sort).await? else { return Ok(None) };
        Ok(self
            .0
            .opened(scope, vec![item])
            .await?
            .pop()
            .filter(|listed: &Conversation| scope.owns(listed.tenant_id.as_str(), "conversations").is_ok()))
    }

    /// A conversation of the scope's tenant and user: as it is listed, with a page of its turns, oldest
    /// first, and what to go on after if there are more.
    ///
    /// # Errors
    /// [`StoreError::InvalidCursor`] if `after` is no place in it; otherwise if the table does not answer or
    /// an item does not parse.
    pub async fn read(
        &self,
        scope: &TenantScope,
        conversation: &ConversationId,
        limit: u16,
        after: Option<&str>,
        now: Timestamp,
    ) -> Result<Option<(Conversation, Vec<Turn>, Option<String>)>, StoreError> {
        let prefix = item_key::turns(conversation);
        let after = place(&prefix, after)?;
        let Some(latest) = self.latest(scope, &prefix, now).await? else { return Ok(None) };
        let listed = self.listed(scope, &latest).await?.filter(|listed| listed.is_kept(scope.limits(), now));
        let Some(listed) = listed else { return Ok(None) };
        let page = Page { prefix: &prefix, newest_first: false, limit: i32::from(limit), after };
        let (turns, next) = self.turns_of(scope, page, now).await?;
        let next = next.and_then(|sort| Some(sort.strip_prefix(&prefix)?.replace('#', ".")));
        Ok(Some((listed, turns, next)))
    }

    /// A page of the conversations of the scope's tenant and user, the last begun first, and what to go on
    /// after if there are more.
    ///
    /// # Errors
    /// As [`ConversationStore::read`].
    pub async fn list(
        &self,
        scope: &TenantScope,
        limit: u16,
        after: Option<&str>,
        now: Timestamp,
    ) -> Result<(Vec<Conversation>, Option<String>), StoreError> {
        let prefix = item_key::conversations(scope.user_id());
        let after = place(&prefix, after)?;
        let page = Page { prefix: &prefix, newest_first: true, limit: i32::from(limit), after };
        let (items, next) = self.0.items(scope, page).await?;
        let mut listed: Vec<Conversation> = self.0.opened(scope, items).await?;
        listed.retain(|one| one.user_id.as_ref() == scope.user_id() && one.is_kept(scope.limits(), now));
        let next = next.and_then(|sort| Some(sort.strip_prefix(&prefix)?.replace('#', ".")));
        Ok((listed, next))
    }

    /// Deletes a conversation of the scope's tenant and user with all its turns, what was said of its
    /// answers, and what is kept of these for repeats; says whether there was one. First, with the record that says so, it is made known that it is
    /// being deleted: from then on it is shown to nobody, and no turn that is on its way enters any more. So
    /// the turns that are found then are all there ever will be; and whoever comes again after a crash goes
    /// on.
    ///
    /// # Errors
    /// If the table does not answer; then it may be there still, for nobody to see but who deletes it.
    pub async fn delete(
        &self,
        scope: &TenantScope,
        conversation: &ConversationId,
        ledger: &Ledger,
        record: &Record,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let tenant = scope.tenant_id();
        let prefix = item_key::turns(conversation);
        let Some(latest) = self.latest(scope, &prefix, now).await? else { return Ok(false) };
        let listed = listed_at(&latest);
        let mark = Update::builder()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(tenant, &listed)))
            .update_expression("SET #d = :yes, #t = :none")
            .condition_expression("attribute_exists(#p)")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#d", "deleting")
            .expression_attribute_names("#t", "title")
            .expression_attribute_values(":yes", AttributeValue::Bool(true))
            .expression_attribute_values(":none", AttributeValue::S(String::new()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let parts = vec![TransactWriteItem::builder().update(mark).build(), ledger.event_part(record)?];
        match self.0.transact(tenant, parts).await {
            Ok(()) => {}
            // Somebody else has just deleted it.
            Err(Cancelled::Conditions(_)) => return Ok(false),
            Err(Cancelled::Failed(error)) => return Err(error),
        }
        let mut after = None;
        loop {
            let page = Page { prefix: &prefix, newest_first: false, limit: TURNS_AT_ONCE, after };
            let (turns, next) = self.0.items(scope, page).await?;
            let mut sorts = Vec::new();
            for turn in &turns {
                let text = |name: &str| turn.get(name).and_then(|value| value.as_s().ok());
                sorts.extend(text("idempotency").map(|hash| item_key::idempotency(hash)));
                sorts.extend(text("id").and_then(|id| id.parse().ok()).map(|id| item_key::answer(&id)));
            }
            // A turn last of what is its own: by it all of that is found again.
            self.0.delete_all(tenant, &sorts).await?;
            let sort = |turn: &Item| turn.get(SORT).and_then(|sort| sort.as_s().ok().cloned());
            let turns: Option<Vec<String>> = turns.iter().map(sort).collect();
            self.0.delete_all(tenant, &turns.ok_or_else(|| self.0.missing())?).await?;
            after = next;
            if after.is_none() {
                break;
            }
        }
        self.0.delete_all(tenant, &[listed]).await?;
        Ok(true)
    }

    /// An answer that the scope's tenant gave to its user, by its id.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn given(
        &self,
        scope: &TenantScope,
        id: &MessageId,
        now: Timestamp,
    ) -> Result<Option<Given>, StoreError> {
        let item = self.0.item_at(scope.tenant_id(), &item_key::answer(id)).await?;
        let given: Option<Given> = self.0.opened(scope, item.into_iter().collect()).await?.pop();
        Ok(given.filter(|given| {
            scope.owns(given.tenant_id.as_str(), "conversations").is_ok()
                && given.user_id.as_ref() == scope.user_id()
                && given.is_kept(scope.limits(), now)
        }))
    }

    /// Keeps what a user says of an answer, with the record that says so, if nothing was said before; sealed where the
    /// tenant has a key of its own.
    ///
    /// # Errors
    /// [`StoreError::DataKey`] if what was said before is sealed with a key that cannot be used any more; otherwise if the
    /// table does not answer.
    pub async fn rate(
        &self,
        scope: &TenantScope,
        given: &Given,
        feedback: &Feedback,
        (ledger, record): (&Ledger, &Record),
        finished: Option<(&IdempotencyStore, Finished<'_>)>,
        seal: Option<&DataKey>,
    ) -> Result<Rated, StoreError> {
        scope.owns(given.tenant_id.as_str(), "conversations").map_err(|_| StoreError::Conflict)?;
        let turn = given.conversation_id.as_ref();
        let turn = turn.map(|conversation| item_key::turn(conversation, given.asked_at, &given.id));
        let seal_with = match scope.kms_key() {
            Some(_) => Some(seal.ok_or_else(|| self.0.corrupt(SealError::Seal))?),
            None => None,
        };
        // A turn may have a data key of its own. Beside an answer by its id there is none before its user has said something.
        let of_turn = match (&turn, seal_with) {
            (Some(turn), Some(_)) => self.0.data_key_beside(scope, turn).await?,
            _ => None,
        };
        let items = std::iter::once((item_key::answer(&given.id), None));
        let mut parts = Vec::new();
        for (sort, known) in items.chain(turn.map(|turn| (turn, of_turn.as_deref()))) {
            let (value, new_key) = match seal_with {
                Some(seal) => {
                    let new = known.is_none().then(|| wrapped_value(seal.wrapped()));
                    let key = known.unwrap_or(seal);
                    (self.0.sealed_value(scope, (&sort, FEEDBACK), feedback, key)?, new)
                }
                None => (serde_dynamo::to_attribute_value(feedback).map_err(|e| self.0.corrupt(e))?, None),
            };
            let update = Update::builder()
                .table_name(&self.0.name)
                .set_key(Some(Table::key(scope.tenant_id(), &sort)))
                .expression_attribute_names("#p", PARTITION)
                .expression_attribute_names("#f", FEEDBACK)
                .expression_attribute_values(":f", value);
            let update = match new_key {
                Some(new_key) => update
                    .update_expression("SET #f = :f, #k = :k")
                    .condition_expression(
                        "attribute_exists(#p) AND attribute_not_exists(#f) AND attribute_not_exists(#k)",
                    )
                    .expression_attribute_names("#k", item_key::DATA_KEY)
                    .expression_attribute_values(":k", new_key),
                None => update
                    .update_expression("SET #f = :f")
                    .condition_expression("attribute_exists(#p) AND attribute_not_exists(#f)"),
            };
            let update = update.build().map_err(|e| self.0.corrupt(e))?;
            parts.push(TransactWriteItem::builder().update(update).build());
        }
        let ours = parts.len();
        parts.push(ledger.event_part(record)?);
        if let Some((store, finished)) = &finished {
            parts.push(store.finished_part(scope, finished, seal)?);
        }
        match self.0.transact(scope.tenant_id(), parts).await {
            Ok(()) => Ok(Rated::Yes),
            Err(Cancelled::Conditions(found)) => {
                Ok(if found.iter().take(ours).any(Option::is_some) { Rated::No } else { Rated::Superseded })
            }
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    /// The parts of a transaction that add a turn: the first makes its conversation known, and a further one
    /// enters only while that is there and is not being deleted. It must carry the scope's tenant.
    pub(super) fn turn_parts(
        &self,
        scope: &TenantScope,
        turn: &Turn,
        seal: Option<&DataKey>,
    ) -> Result<[TransactWriteItem; 2], StoreError> {
        scope.owns(turn.tenant_id.as_str(), "conversations").map_err(|_| StoreError::Conflict)?;
        let sort = item_key::turn(&turn.conversation_id, turn.asked_at, &turn.id);
        let added = self.0.put_new(self.0.sealed_item(scope, turn, &sort, &TEXT, seal)?)?;
        let listed = listed_at(turn);
        if turn.begun_at == turn.asked_at {
            let begun = Conversation::begun_by(turn);
            return Ok([added, self.0.put_new(self.0.sealed_item(scope, &begun, &listed, &TEXT, seal)?)?]);
        }
        let moved = Update::builder()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(scope.tenant_id(), &listed)))
            .update_expression("SET #u = :u, #e = :e")
            .condition_expression("attribute_exists(#p) AND attribute_not_exists(#d)")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#d", "deleting")
            .expression_attribute_names("#u", "updated_at")
            .expression_attribute_names("#e", "expires_at_s")
            .expression_attribute_values(":u", AttributeValue::N(turn.asked_at.as_millis().to_string()))
            .expression_attribute_values(":e", AttributeValue::N(turn.expires_at_s.to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        Ok([added, TransactWriteItem::builder().update(moved).build()])
    }

    /// The part of a transaction that keeps an answer by its id. It must carry the scope's tenant.
    pub(super) fn given_part(
        &self,
        scope: &TenantScope,
        given: &Given,
    ) -> Result<TransactWriteItem, StoreError> {
        scope.owns(given.tenant_id.as_str(), "conversations").map_err(|_| StoreError::Conflict)?;
        self.0.put_new(self.0.item(given, &item_key::answer(&given.id))?)
    }
}

/// Where the conversation of a turn is listed.
fn listed_at(turn: &Turn) -> String {
    item_key::conversation(turn.user_id.as_ref(), turn.begun_at, &turn.conversation_id)
}

/// The place in a list that a cursor names: what follows the list's own prefix in a sort key, as it may stand in
/// an address.
fn place(prefix: &str, cursor: Option<&str>) -> Result<Option<String>, StoreError> {
    let well_formed = |text: &str| {
        let parts = text.split_once('.');
        parts.is_some_and(|(at, id)| {
            at.len() == 15
                && at.bytes().all(|b| b.is_ascii_digit())
                && (id.parse::<ConversationId>().is_ok() || id.parse::<MessageId>().is_ok())
        })
    };
    match cursor {
        None => Ok(None),
        Some(text) if well_formed(text) => Ok(Some(format!("{prefix}{}", text.replacen('.', "#", 1)))),
        Some(_) => Err(StoreError::InvalidCursor),
    }
}
