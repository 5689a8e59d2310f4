//! Table `webhooks`: what tenants are told of their budgets. An item is a message on its way, and later
//! what keeps its threshold from being told twice.
//!
//! Whoever tries a message first puts off its next try, on the condition that nobody else has: so it is
//! tried by one at a time, and one who dies at it leaves it to be tried again.

use aws_sdk_dynamodb::types::AttributeValue;

use super::session::Access;
use super::table::{Item, Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::item_key::{self, PARTITION};
use crate::scope::{Bookkeeper, Subject, Ward};
use crate::webhook::{Message, Period, State};

/// The table.
#[derive(Clone, Debug)]
pub struct WebhookStore(Table);

/// Where a list goes on.
#[derive(Clone, Debug)]
pub struct Place(Item);

/// Some of the messages that are due.
#[derive(Debug)]
pub struct Due {
    /// The messages, each by itself: one that does not parse holds up no other.
    pub messages: Vec<Result<Message, StoreError>>,
    /// Where to go on.
    pub next: Option<Place>,
}

impl WebhookStore {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// The messages that were noted for a tenant's period.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn noted(&self, ward: &Ward, period: Period) -> Result<Vec<Message>, StoreError> {
        let prefix = item_key::webhooks(period);
        let page = Page { prefix: &prefix, newest_first: false, limit: 100, after: None };
        Ok(self.0.query(ward, page).await?.0)
    }

    /// Notes a message, unless one for its threshold was noted before; says whether it is noted now.
    ///
    /// # Errors
    /// If the table does not answer; then it may be noted.
    pub async fn note(&self, ward: &Ward, message: &Message) -> Result<bool, StoreError> {
        let item = self.0.item(message, &item_key::webhook(message.period, message.threshold_percent))?;
        let put = self
            .0
            .client(ward.tenant_id())
            .put_item()
            .table_name(&self.0.name)
            .set_item(Some(item))
            .condition_expression("attribute_not_exists(#p)")
            .expression_attribute_names("#p", PARTITION);
        match put.send().await.map_err(|e| self.0.failed(e)) {
            Ok(_) => Ok(true),
            Err(StoreError::Conflict) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A page of all tenants' messages that are due at `now`. What was noted in the last moments may be
    /// missing: the index follows its table.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn due(
        &self,
        _bookkeeper: &Bookkeeper,
        now: Timestamp,
        after: Option<Place>,
    ) -> Result<Due, StoreError> {
        let answer = self
            .0
            .own_client()
            .scan()
            .table_name(&self.0.name)
            .index_name(item_key::DUE_INDEX)
            .filter_expression("#d <= :now")
            .expression_attribute_names("#d", item_key::DUE)
            .expression_attribute_values(":now", number(now))
            .set_exclusive_start_key(after.map(|place| place.0))
            .send()
            .await
            .map_err(|e| self.0.failed(e))?;
        let messages = answer.items.unwrap_or_default().into_iter().map(|item| self.0.record(item));
        Ok(Due { messages: messages.collect(), next: answer.last_evaluated_key.map(Place) })
    }

    /// Begins a try of `message`, which is due again at `next` unless it ends before. None if somebody
    /// else has begun one.
    ///
    /// # Errors
    /// If the table does not answer; then it may have begun.
    pub async fn begin(
        &self,
        ward: &Ward,
        message: &Message,
        next: Timestamp,
    ) -> Result<Option<Message>, StoreError> {
        let begun = Message { attempts: message.attempts + 1, due_at: Some(next), ..message.clone() };
        let update = self
            .update(ward, message)
            .update_expression("SET #d = :next, #a = :begun")
            .condition_expression("#a = :a AND attribute_exists(#d)")
            .expression_attribute_names("#d", item_key::DUE)
            .expression_attribute_values(":next", number(next))
            .expression_attribute_values(":begun", AttributeValue::N(begun.attempts.to_string()));
        match update.send().await.map_err(|e| self.0.failed(e)) {
            Ok(_) => Ok(Some(begun)),
            Err(StoreError::Conflict) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes down why a try failed that was begun as `message`. If another has begun meanwhile, it is left
    /// to that one.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn failed(&self, ward: &Ward, message: &Message, error: &str) -> Result<(), StoreError> {
        let update = self
            .update(ward, message)
            .update_expression("SET #e = :e")
            .condition_expression("#a = :a")
            .expression_attribute_names("#e", "last_error")
            .expression_attribute_values(":e", AttributeValue::S(error.to_owned()));
        self.unless_overtaken(update.send().await.map_err(|e| self.0.failed(e)))
    }

    /// Ends a message that was begun as `message`: it is not tried again.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn end(
        &self,
        ward: &Ward,
        message: &Message,
        state: State,
        error: Option<&str>,
    ) -> Result<(), StoreError> {
        let state =
            serde_dynamo::aws_sdk_dynamodb_1::to_attribute_value(state).map_err(|e| self.0.corrupt(e))?;
        let update = self
            .update(ward, message)
            .condition_expression("#a = :a")
            .expression_attribute_names("#s", "state")
            .expression_attribute_names("#d", item_key::DUE)
            .expression_attribute_names("#e", "last_error")
            .expression_attribute_values(":s", state);
        let update = match error {
            None => update.update_expression("SET #s = :s REMOVE #d, #e"),
            Some(error) => update
                .update_expression("SET #s = :s, #e = :e REMOVE #d")
                .expression_attribute_values(":e", AttributeValue::S(error.to_owned())),
        };
        self.unless_overtaken(update.send().await.map_err(|e| self.0.failed(e)))
    }

    /// A write of a message that is as often tried as `message` says.
    fn update(
        &self,
        ward: &Ward,
        message: &Message,
    ) -> aws_sdk_dynamodb::operation::update_item::builders::UpdateItemFluentBuilder {
        let sort = item_key::webhook(message.period, message.threshold_percent);
        self.0
            .client(ward.tenant_id())
            .update_item()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(ward.tenant_id(), &sort)))
            .expression_attribute_names("#a", "attempts")
            .expression_attribute_values(":a", AttributeValue::N(message.attempts.to_string()))
    }

    fn unless_overtaken<T>(&self, written: Result<T, StoreError>) -> Result<(), StoreError> {
        match written {
            Ok(_) | Err(StoreError::Conflict) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn number(at: Timestamp) -> AttributeValue {
    AttributeValue::N(at.as_millis().to_string())
}
