//! Table `accounts`: what instances note about the model accounts they share, spread over a few items
//! for each account so that none is hot. Losing a note costs accuracy for seconds, and nothing else.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::{AttributeValue, KeysAndAttributes, ReturnValue};

use super::session::Access;
use super::table::{Item, StoreError, Table};
use crate::clock::Timestamp;
use crate::pressure::{Fill, Notes};

/// Items of an account.
pub const SHARDS: u32 = 8;
/// What the attribute of a call in flight begins with; its id follows.
const CALL: &str = "call_";

/// The table.
#[derive(Clone, Debug)]
pub struct AccountStore(Table);

/// One item: where an instance notes what it sees.
#[derive(Clone, Copy, Debug)]
pub struct Shard<'a> {
    /// The account.
    pub account: &'a str,
    /// Which of its items.
    pub shard: u32,
}

impl AccountStore {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// All notes about an account. Those of calls that must have ended are left out.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn read(&self, account: &str) -> Result<Vec<Notes>, StoreError> {
        let keys = (0..SHARDS).map(|shard| Self::key(Shard { account, shard })).collect();
        let wanted = KeysAndAttributes::builder().set_keys(Some(keys)).build();
        let wanted = wanted.map_err(|e| self.0.corrupt(e))?;
        let read = self.0.own_client().batch_get_item().request_items(&self.0.name, wanted);
        // What is throttled is left out: a shard's worth of notes, for a second.
        let answer = read.send().await.map_err(|e| self.0.failed(e))?;
        let items = answer.responses.and_then(|mut tables| tables.remove(&self.0.name));
        Ok(items.unwrap_or_default().iter().map(notes).collect())
    }

    /// Notes a call in flight, which ends by `ends_at_s`.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn begin(&self, shard: Shard<'_>, call: &str, ends_at_s: i64) -> Result<(), StoreError> {
        self.set(shard, [(format!("{CALL}{call}"), ends_at_s)]).await
    }

    /// Notes that a call has ended, and forgets calls that must have, where their instances could not.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn end(&self, shard: Shard<'_>, call: &str, now: Timestamp) -> Result<(), StoreError> {
        let left = self.remove(shard, vec![format!("{CALL}{call}")]).await?;
        let over = left.into_iter().filter(|(_, end)| *end <= now.as_seconds());
        let over: Vec<String> = over.map(|(name, _)| name).take(50).collect();
        if !over.is_empty() {
            self.remove(shard, over).await?;
        }
        Ok(())
    }

    /// Notes how full the account's own limits are.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn note_limits(
        &self,
        shard: Shard<'_>,
        fill: Fill,
        until: Timestamp,
    ) -> Result<(), StoreError> {
        let attributes =
            [("fill".to_owned(), i64::from(fill.0)), ("fill_until".to_owned(), until.as_millis())];
        self.set(shard, attributes).await
    }

    /// Notes that the service wants to be left alone.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn note_overloaded(&self, shard: Shard<'_>, until: Timestamp) -> Result<(), StoreError> {
        self.set(shard, [("overloaded_until".to_owned(), until.as_millis())]).await
    }

    fn key(shard: Shard<'_>) -> Item {
        // Each item a partition of its own.
        let name = format!("{}#{}", shard.account, shard.shard);
        HashMap::from([("shard".to_owned(), AttributeValue::S(name))])
    }

    async fn set<const N: usize>(
        &self,
        shard: Shard<'_>,
        attributes: [(String, i64); N],
    ) -> Result<(), StoreError> {
        let mut update =
            self.0.own_client().update_item().table_name(&self.0.name).set_key(Some(Self::key(shard)));
        let mut sets = Vec::new();
        for (place, (name, number)) in attributes.into_iter().enumerate() {
            update = update
                .expression_attribute_names(format!("#{place}"), name)
                .expression_attribute_values(format!(":{place}"), AttributeValue::N(number.to_string()));
            sets.push(format!("#{place} = :{place}"));
        }
        let update = update.update_expression(format!("SET {}", sets.join(", ")));
        update.send().await.map_err(|e| self.0.failed(e))?;
        Ok(())
    }

    /// Removes attributes and brings the calls that are left, with their ends.
    async fn remove(&self, shard: Shard<'_>, names: Vec<String>) -> Result<Vec<(String, i64)>, StoreError> {
        let mut update =
            self.0.own_client().update_item().table_name(&self.0.name).set_key(Some(Self::key(shard)));
        let mut removes = Vec::new();
        for (place, name) in names.into_iter().enumerate() {
            update = update.expression_attribute_names(format!("#{place}"), name);
            removes.push(format!("#{place}"));
        }
        let answer = update
            .update_expression(format!("REMOVE {}", removes.join(", ")))
            .return_values(ReturnValue::AllNew)
            .send()
            .await
            .map_err(|e| self.0.failed(e))?;
        let left = answer.attributes.unwrap_or_default();
        Ok(left.into_iter().filter_map(|(name, value)| Some((call(&name)?, number(&value)?))).collect())
    }
}

fn call(name: &str) -> Option<String> {
    name.starts_with(CALL).then(|| name.to_owned())
}

fn number(value: &AttributeValue) -> Option<i64> {
    value.as_n().ok()?.parse().ok()
}

fn notes(item: &Item) -> Notes {
    let get = |name: &str| item.get(name).and_then(number);
    let limits = get("fill").zip(get("fill_until"));
    Notes {
        calls: item
            .iter()
            .filter(|(name, _)| name.starts_with(CALL))
            .filter_map(|(_, v)| number(v))
            .collect(),
        limits: limits.map(|(fill, until)| {
            (Fill(u32::try_from(fill).unwrap_or(u32::MAX)), Timestamp::from_millis(until))
        }),
        overloaded_until: get("overloaded_until").map(Timestamp::from_millis),
    }
}
