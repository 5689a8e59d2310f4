//! Table `usage`: the month's bill of each tenant. A record is added to it in the transaction that takes
//! it into the audit log ([`super::chains`]), and therefore once.

use std::collections::BTreeMap;

#[cfg(feature = "audit-log")]
use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem, Update};

use super::session::Access;
use super::table::{Page, StoreError, Table};
use crate::item_key::{self, SORT};
use crate::meter::BillingMonth;
use crate::scope::Subject;
#[cfg(feature = "audit-log")]
use crate::tenant::TenantId;
use crate::units::{NanoUsd, Tokens};
use crate::usage::{Bill, Histogram, Sums};

/// What the attributes that count durations are called before their bucket.
const LATENCY: &str = "latency_";

/// The table.
#[derive(Clone, Debug)]
pub struct UsageStore(Table);

impl UsageStore {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// The parts of a transaction that add `bill`, one for each of its lines.
    #[cfg(feature = "audit-log")]
    pub(super) fn additions(
        &self,
        ward: &crate::scope::Ward,
        bill: &Bill,
    ) -> Result<Vec<TransactWriteItem>, StoreError> {
        bill.0
            .iter()
            .map(|((month, model), sums)| self.addition(ward.tenant_id(), *month, model, sums))
            .collect()
    }

    #[cfg(feature = "audit-log")]
    fn addition(
        &self,
        tenant: &TenantId,
        month: BillingMonth,
        model: &str,
        sums: &Sums,
    ) -> Result<TransactWriteItem, StoreError> {
        let mut counts: Vec<(String, u64)> =
            sums.counters().map(|(name, count)| (name.to_owned(), count)).into();
        counts.extend(sums.latency.counts().iter().map(|(bucket, n)| (format!("{LATENCY}{bucket}"), *n)));
        let mut update = Update::builder()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(tenant, &item_key::usage_line(month, model))));
        let mut parts = Vec::new();
        for (place, (name, count)) in counts.into_iter().enumerate() {
            update = update
                .expression_attribute_names(format!("#{place}"), name)
                .expression_attribute_values(format!(":{place}"), AttributeValue::N(count.to_string()));
            parts.push(format!("#{place} :{place}"));
        }
        let update = update.update_expression(format!("ADD {}", parts.join(", ")));
        let update = update.build().map_err(|e| self.0.corrupt(e))?;
        Ok(TransactWriteItem::builder().update(update).build())
    }

    /// A tenant's bill of a month, as far as it has been added up.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn month(&self, subject: &impl Subject, month: BillingMonth) -> Result<Bill, StoreError> {
        let prefix = item_key::usage_month(month);
        let (mut bill, mut after) = (Bill::default(), None);
        loop {
            let page = Page { prefix: &prefix, newest_first: false, limit: 200, after };
            let (items, next) = self.0.items(subject, page).await?;
            for item in items {
                let item: BTreeMap<String, serde_json::Value> = self.0.record(item)?;
                let (model, sums) = self.line(&prefix, &item)?;
                bill.0.insert((month, model), sums);
            }
            after = next;
            if after.is_none() {
                return Ok(bill);
            }
        }
    }

    fn line(
        &self,
        prefix: &str,
        item: &BTreeMap<String, serde_json::Value>,
    ) -> Result<(String, Sums), StoreError> {
        let model = item.get(SORT).and_then(|sort| sort.as_str()?.strip_prefix(prefix));
        let model = model.ok_or_else(|| self.0.missing())?.to_owned();
        let number = |name: &str| match item.get(name) {
            None => Ok(0),
            Some(value) => value.as_u64().ok_or_else(|| self.0.missing()),
        };
        let mut sums = Sums {
            requests: number("requests")?,
            embedding_tokens: Tokens(number("embedding_tokens")?),
            unreported_tokens: Tokens(number("unreported_tokens")?),
            cost_nano_usd: NanoUsd(number("cost_nano_usd")?),
            feedback_up: number("feedback_up")?,
            feedback_down: number("feedback_down")?,
            ..Sums::default()
        };
        sums.usage.input_tokens = Tokens(number("input_tokens")?);
        sums.usage.output_tokens = Tokens(number("output_tokens")?);
        sums.usage.cache_read_input_tokens = Tokens(number("cache_read_input_tokens")?);
        sums.usage.cache_creation_input_tokens = Tokens(number("cache_creation_input_tokens")?);
        let buckets = item.keys().filter_map(|name| name.strip_prefix(LATENCY)?.parse::<u8>().ok());
        let mut counts = BTreeMap::new();
        for bucket in buckets {
            counts.insert(bucket, number(&format!("{LATENCY}{bucket}"))?);
        }
        sums.latency = Histogram::of(counts);
        Ok((model, sums))
    }
}
