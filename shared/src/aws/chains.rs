//! Where each tenant's audit log ends, and how it grows by an object: an item of table `usage`, beside
//! the bills that grow with it.
//!
//! An object is *intended* first: which records it holds is written down on the condition that the log
//! ends where it was believed to end and nothing else is intended. From then on the object is fixed,
//! and whoever finds the intention can complete it. Then the object is stored; and one transaction ends
//! the intention, moves the end of the log, takes each record out of those that wait and adds it to the
//! bill. So a record is in one object and on the bill once, however often and by however many it is
//! exported, and wherever they stop.

use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem, Update};
use serde::{Deserialize, Serialize};
use serde_dynamo::aws_sdk_dynamodb_1::to_attribute_value;

use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Item, StoreError, Table};
use super::usage::UsageStore;
use crate::audit_log::Head;
use crate::clock::Timestamp;
use crate::item_key;
use crate::scope::{Subject, Ward};
use crate::usage::Bill;

/// The most parts of a transaction.
pub const MOST_PARTS: usize = 100;

/// The ends of the logs.
#[derive(Clone, Debug)]
pub struct Chains {
    table: Table,
    usage: UsageStore,
    ledger: Ledger,
}

/// A tenant's log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Chain {
    /// Where it ends.
    #[serde(default)]
    pub head: Head,
    /// The object that follows, if one is on its way.
    #[serde(default)]
    pub intent: Option<Intent>,
}

/// An object on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The sort keys of its records, in its order.
    pub records: Vec<String>,
    /// Until when the store is to keep it.
    pub retain_until: Timestamp,
}

/// What an object changes when it is in the log.
#[derive(Debug)]
pub struct Growth<'a> {
    /// Where the log ended before.
    pub before: &'a Head,
    /// The object, as it was intended.
    pub intent: &'a Intent,
    /// Where the log ends now.
    pub after: &'a Head,
    /// What its records add to the bill.
    pub bill: &'a Bill,
    /// When the ledger's table may forget the records.
    pub expires_at_s: i64,
}

impl Growth<'_> {
    /// How many parts the transaction of so many records and bill lines has.
    pub const fn parts(records: usize, lines: usize) -> usize {
        1 + records + lines
    }
}

impl Chains {
    /// In the table of bills of that name, for that ledger.
    pub fn new(access: &Access, table: String, ledger: Ledger) -> Self {
        let usage = UsageStore::new(access, table.clone());
        Self { table: Table::new(access, table), usage, ledger }
    }

    /// A tenant's log.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn read(&self, subject: &impl Subject) -> Result<Chain, StoreError> {
        let item: Option<Item> = self.table.item_at(subject.tenant_id(), item_key::CHAIN).await?;
        item.map_or_else(|| Ok(Chain::default()), |item| self.table.own(subject, item))
    }

    /// Intends the object that follows `head`.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the log ends elsewhere by now, or another object is on its way.
    /// Otherwise if the table does not answer; then it may be intended.
    pub async fn intend(&self, ward: &Ward, head: &Head, intent: &Intent) -> Result<(), StoreError> {
        let value = |value: &dyn Fn() -> serde_dynamo::Result<AttributeValue>| {
            value().map_err(|e| self.table.corrupt(e))
        };
        let intent_value = value(&|| to_attribute_value(intent))?;
        let mut call = self
            .table
            .client(ward.tenant_id())
            .update_item()
            .table_name(&self.table.name)
            .set_key(Some(Table::key(ward.tenant_id(), item_key::CHAIN)))
            .update_expression("SET #i = :i")
            .expression_attribute_names("#i", "intent")
            .expression_attribute_names("#h", "head")
            .expression_attribute_values(":i", intent_value);
        // The same intention, written again because the answer was lost, holds as well.
        call = if *head == Head::default() {
            call.condition_expression("attribute_not_exists(#h) AND (attribute_not_exists(#i) OR #i = :i)")
        } else {
            call.condition_expression("#h = :h AND (attribute_not_exists(#i) OR #i = :i)")
                .expression_attribute_values(":h", value(&|| to_attribute_value(head))?)
        };
        call.send().await.map_err(|e| self.table.failed(e))?;
        Ok(())
    }

    /// Takes a stored object into the log, all that it changes or nothing.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if somebody else did. Otherwise if the table does not answer; then it
    /// may be done.
    pub async fn grow(&self, ward: &Ward, growth: &Growth<'_>) -> Result<(), StoreError> {
        let corrupt = |e| self.table.corrupt(e);
        let end = Update::builder()
            .table_name(&self.table.name)
            .set_key(Some(Table::key(ward.tenant_id(), item_key::CHAIN)))
            .update_expression("SET #h = :after REMOVE #i")
            .expression_attribute_names("#h", "head")
            .expression_attribute_names("#i", "intent")
            .expression_attribute_values(":after", to_attribute_value(growth.after).map_err(corrupt)?)
            .expression_attribute_values(":i", to_attribute_value(growth.intent).map_err(corrupt)?);
        let end = if *growth.before == Head::default() {
            end.condition_expression("#i = :i AND attribute_not_exists(#h)")
        } else {
            end.condition_expression("#i = :i AND #h = :before")
                .expression_attribute_values(":before", to_attribute_value(growth.before).map_err(corrupt)?)
        };
        let end = end.build().map_err(|e| self.table.corrupt(e))?;
        let mut parts = vec![TransactWriteItem::builder().update(end).build()];
        for sort in &growth.intent.records {
            parts.push(self.ledger.exported_part(ward, sort, growth.expires_at_s)?);
        }
        parts.extend(self.usage.additions(ward, growth.bill)?);
        match self.table.transact(ward.tenant_id(), parts).await {
            Ok(()) => Ok(()),
            Err(Cancelled::Conditions(_)) => Err(StoreError::Conflict),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }
}
