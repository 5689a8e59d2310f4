//! Table `meters`: one item per tenant, written conditionally and never in a transaction. (DynamoDB
//! refuses a plain write of an item that a transaction is at work on.)
//!
//! As every store, it takes whoever may touch a tenant's items, and no id:
//!
//! ```
//! # use shared::{aws::meters::MeterStore, scope::TenantScope};
//! async fn read(store: &MeterStore, scope: &TenantScope) -> bool {
//!     store.read(scope).await.is_ok()
//! }
//! ```

use std::time::Duration;

use aws_sdk_dynamodb::operation::update_item::UpdateItemError;
use aws_sdk_dynamodb::types::{
    AttributeValue, ReturnValue, ReturnValuesOnConditionCheckFailure, TransactWriteItem,
};

use super::session::Access;
use super::table::{Item, StoreError, Table};
use crate::item_key::PARTITION;
use crate::meter::{Lease, Meter, Replacement, Ticket, Write};
use crate::random::entropy;
use crate::retry::Backoff;
use crate::scope::Subject;
use crate::tenant::{TenantId, TenantStatus};

/// How a tenant's standing is said again where the table does not answer.
const STANDING: Backoff =
    Backoff { attempts: 4, base: Duration::from_millis(40), cap: Duration::from_secs(1) };

/// The table.
#[derive(Clone, Debug)]
pub struct MeterStore(Table);

/// What became of a conditional write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// It took place; the item is now this.
    Yes(Meter),
    /// Its condition did not hold; the item is this.
    No(Meter),
}

/// Some of the meters.
#[derive(Debug)]
pub struct MeterPage {
    /// The tenants and their meters.
    pub meters: Vec<(TenantId, Result<Meter, StoreError>)>,
    /// The tenant after whom the next page begins, if there is one.
    pub next: Option<TenantId>,
}

impl MeterStore {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// The part of a transaction that adds a new tenant's meter.
    pub(super) fn new_part(&self, tenant: &TenantId, meter: &Meter) -> Result<TransactWriteItem, StoreError> {
        let mut item = self.0.plain_item(meter)?;
        item.insert(PARTITION.to_owned(), AttributeValue::S(tenant.to_string()));
        self.0.put_new(item)
    }

    /// A tenant's meter as it is.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if there is none, or another's is answered; otherwise if the table does not answer or the item
    /// does not parse.
    pub async fn read(&self, subject: &impl Subject) -> Result<Meter, StoreError> {
        let answer = self
            .0
            .client(subject.tenant_id())
            .get_item()
            .table_name(&self.0.name)
            .key(PARTITION, AttributeValue::S(subject.tenant_id().to_string()))
            .consistent_read(true)
            .send()
            .await
            .map_err(|e| self.0.failed(e))?;
        self.0.own(subject, answer.item.ok_or_else(|| self.0.missing())?)
    }

    /// Makes a conditional write, in one round trip. Made again after its answer was lost, it does
    /// nothing: the lease that it gave, replaced or ended makes its condition fail.
    ///
    /// # Errors
    /// If the table does not answer, in which case it may have taken place; or as
    /// [`MeterStore::read`].
    pub async fn write(&self, subject: &impl Subject, write: &Write) -> Result<Written, StoreError> {
        let expression = Expression::of(write);
        let answer = self
            .0
            .client(subject.tenant_id())
            .update_item()
            .table_name(&self.0.name)
            .key(PARTITION, AttributeValue::S(subject.tenant_id().to_string()))
            .update_expression(expression.update())
            .condition_expression(expression.conditions.join(" AND "))
            .set_expression_attribute_names(Some(expression.names))
            .set_expression_attribute_values(Some(expression.values).filter(|values| !values.is_empty()))
            .return_values(ReturnValue::AllNew)
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
            .send()
            .await;
        let error = match answer {
            Ok(answer) => {
                let item = answer.attributes.ok_or_else(|| self.0.missing())?;
                return Ok(Written::Yes(self.0.own(subject, item)?));
            }
            Err(error) => error,
        };
        match error.as_service_error() {
            Some(UpdateItemError::ConditionalCheckFailedException(failed)) => {
                let item = failed.item.clone().ok_or_else(|| self.0.missing())?;
                Ok(Written::No(self.0.own(subject, item)?))
            }
            _ => Err(self.0.failed(error)),
        }
    }

    /// Lets a tenant's standing reach its very next admission: from now on only decisions of that epoch
    /// or later admit, and only while `status` is active. Said again it changes nothing, and a later
    /// epoch stays; so it is said again where the table does not answer, since without it a change is on
    /// record and holds for nobody.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if the tenant has no meter; otherwise if the table does not answer however
    /// often it is asked.
    pub async fn set_standing(
        &self,
        subject: &impl Subject,
        status: TenantStatus,
        epoch: u64,
    ) -> Result<(), StoreError> {
        let mut failed = 0;
        loop {
            let Err(error) = self.try_standing(subject, status, epoch).await else { return Ok(()) };
            failed += 1;
            match STANDING.wait(failed, None, &mut entropy()).filter(|_| error.passes()) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(error),
            }
        }
    }

    async fn try_standing(
        &self,
        subject: &impl Subject,
        status: TenantStatus,
        epoch: u64,
    ) -> Result<(), StoreError> {
        let status =
            serde_dynamo::aws_sdk_dynamodb_1::to_attribute_value(status).map_err(|e| self.0.corrupt(e))?;
        let answer = self
            .0
            .client(subject.tenant_id())
            .update_item()
            .table_name(&self.0.name)
            .key(PARTITION, AttributeValue::S(subject.tenant_id().to_string()))
            .update_expression("SET #s = :s, #e = :e")
            .condition_expression("attribute_exists(#p) AND #e <= :e")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#s", "status")
            .expression_attribute_names("#e", "epoch")
            .expression_attribute_values(":s", status)
            .expression_attribute_values(":e", AttributeValue::N(epoch.to_string()))
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
            .send()
            .await;
        let Err(error) = answer else { return Ok(()) };
        match error.as_service_error() {
            Some(UpdateItemError::ConditionalCheckFailedException(failed)) => {
                failed.item.as_ref().map(|_| ()).ok_or_else(|| self.0.missing())
            }
            _ => Err(self.0.failed(error)),
        }
    }

    /// A page of all tenants' meters, each by itself: one that does not parse hides no other. And where
    /// to go on. For the function that keeps the books.
    ///
    /// # Errors
    /// If the table does not answer, or holds an item that is no tenant's.
    pub async fn page(
        &self,
        _bookkeeper: &crate::scope::Bookkeeper,
        after: Option<TenantId>,
    ) -> Result<MeterPage, StoreError> {
        let start = after.map(|id| Item::from([(PARTITION.to_owned(), AttributeValue::S(id.to_string()))]));
        let answer = self
            .0
            .own_client()
            .scan()
            .table_name(&self.0.name)
            .set_exclusive_start_key(start)
            .consistent_read(true)
            .send()
            .await
            .map_err(|e| self.0.failed(e))?;
        let id = |item: &Item| item.get(PARTITION)?.as_s().ok()?.parse::<TenantId>().ok();
        let next = answer.last_evaluated_key.as_ref().and_then(id);
        let mut meters = Vec::new();
        for item in answer.items.unwrap_or_default() {
            let tenant = id(&item).ok_or_else(|| self.0.missing())?;
            meters.push((tenant, self.0.record(item)));
        }
        Ok(MeterPage { meters, next })
    }
}

/// A [`Write`] in DynamoDB's words.
#[derive(Default)]
struct Expression {
    conditions: Vec<String>,
    sets: Vec<String>,
    removes: Vec<String>,
    names: std::collections::HashMap<String, String>,
    values: Item,
}

impl Expression {
    fn of(write: &Write) -> Self {
        let mut e = Self::default();
        let item = e.name(PARTITION);
        e.conditions.push(format!("attribute_exists({item})"));
        if let Some(epoch) = write.active_in {
            let (status, active) =
                (e.name("status"), e.value("active", AttributeValue::S("active".to_owned())));
            e.conditions.push(format!("{status} = {active}"));
            e.compare("epoch", "<=", epoch);
        }
        if let Some(bucket) = write.bucket {
            e.compare("bucket", "=", bucket);
        }
        if let Some(n) = write.n_is {
            e.compare("n", "=", n);
        }
        if let Some(most) = write.n_below {
            e.compare("n", "<", most);
        }
        if let Some(most) = write.day_at_most {
            e.compare("day_tokens", "<=", most);
        }
        if let Some(most) = write.month_at_most {
            e.compare("month_tokens", "<=", most);
        }
        if let Some((day, month)) = write.period {
            e.compare("day", "=", number(&day));
            e.compare("month", "=", number(&month));
        }
        if let Some(most) = write.leases_below {
            let leases = e.name("leases");
            let most = e.value("leases_below", AttributeValue::N(most.to_string()));
            e.conditions.push(format!("size({leases}) < {most}"));
        }

        let starts = |begins: bool| if begins { None } else { Some("+") };
        if let Some(turn) = &write.turn {
            e.set("bucket", AttributeValue::N(turn.bucket.to_string()));
            e.set("past", AttributeValue::S(turn.past.clone().into()));
            e.set("n", AttributeValue::N(u8::from(write.counts).to_string()));
            if let Some(day) = turn.day {
                e.set("day", AttributeValue::N(number(&day)));
            }
            if let Some(month) = turn.month {
                e.set("month", AttributeValue::N(number(&month)));
            }
        } else if write.counts {
            e.change("n", Some("+"), 1);
        }
        let turn = write.turn.as_ref();
        let (new_day, new_month) =
            (turn.is_some_and(|t| t.day.is_some()), turn.is_some_and(|t| t.month.is_some()));
        e.change("day_tokens", starts(new_day), write.day_tokens);
        e.change("month_tokens", starts(new_month), write.month_tokens);
        e.change("month_cost", starts(new_month), i64::try_from(write.month_cost).unwrap_or(i64::MAX));

        if let Some(lease) = &write.gives {
            let place = e.lease("given", lease);
            let (seq, one) = (e.name("seq"), e.value("one", AttributeValue::N("1".to_owned())));
            e.conditions.push(format!("attribute_not_exists({place})"));
            // Both right-hand sides see the ticket before.
            e.sets.push(format!("{place} = {seq} + {one}"));
            e.sets.push(format!("{seq} = {seq} + {one}"));
        }
        if let Some(Replacement { old, ticket, new }) = &write.replaces {
            let old_place = e.held("old", old, *ticket);
            if old != new {
                let new_place = e.lease("new", new);
                e.conditions.push(format!("attribute_not_exists({new_place})"));
                e.sets.push(format!("{new_place} = {old_place}"));
                e.removes.push(old_place);
            }
        }
        for (n, (lease, ticket)) in write.ends.iter().enumerate() {
            let place = e.held(&format!("ended{n}"), lease, *ticket);
            e.removes.push(place);
        }
        e
    }

    fn update(&self) -> String {
        let clause = |word: &str, parts: &[String]| match parts {
            [] => String::new(),
            parts => format!("{word} {} ", parts.join(", ")),
        };
        clause("SET", &self.sets) + &clause("REMOVE", &self.removes)
    }

    /// Every attribute goes by a placeholder: many are reserved words.
    fn name(&mut self, attribute: &str) -> String {
        let name = format!("#{attribute}");
        self.names.insert(name.clone(), attribute.to_owned());
        name
    }

    fn value(&mut self, label: &str, value: AttributeValue) -> String {
        let name = format!(":{label}");
        self.values.insert(name.clone(), value);
        name
    }

    fn lease(&mut self, label: &str, lease: &Lease) -> String {
        let name = format!("#{label}");
        self.names.insert(name.clone(), lease.to_string());
        format!("{}.{name}", self.name("leases"))
    }

    /// The place of a lease that has to be there, under this ticket.
    fn held(&mut self, label: &str, lease: &Lease, ticket: Ticket) -> String {
        let place = self.lease(label, lease);
        let ticket = self.value(label, AttributeValue::N(ticket.to_string()));
        self.conditions.push(format!("{place} = {ticket}"));
        place
    }

    fn compare(&mut self, attribute: &str, operator: &str, with: impl ToString) {
        let name = self.name(attribute);
        let label = format!("{attribute}_{}", self.values.len());
        let value = self.value(&label, AttributeValue::N(with.to_string()));
        self.conditions.push(format!("{name} {operator} {value}"));
    }

    fn set(&mut self, attribute: &str, to: AttributeValue) {
        let (name, value) = (self.name(attribute), self.value(&format!("{attribute}_to"), to));
        self.sets.push(format!("{name} = {value}"));
    }

    /// Adds `change` to a number, or sets it to it.
    fn change(&mut self, attribute: &str, operator: Option<&str>, change: i64) {
        match operator {
            Some(_) if change == 0 => {}
            Some(operator) => {
                let name = self.name(attribute);
                let by = self.value(&format!("{attribute}_by"), AttributeValue::N(change.to_string()));
                self.sets.push(format!("{name} = {name} {operator} {by}"));
            }
            None => self.set(attribute, AttributeValue::N(change.to_string())),
        }
    }
}

/// A day or month as the item holds it.
fn number(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
