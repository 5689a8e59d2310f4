//! One DynamoDB table, spoken to in items of one tenant.
//!
//! Private to the stores: they build keys with [`crate::item_key`] and take scopes; nothing outside
//! can name a partition.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError;
use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::{
    AttributeValue, DeleteRequest, Put, ReturnValuesOnConditionCheckFailure, TransactWriteItem, WriteRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_dynamo::aws_sdk_dynamodb_1::{from_item, to_item};
use serde_json::{Map, Value};

use super::data_keys::{self, DataKeyError};
use super::session::Access;
use crate::error::{ApiError, Code};
use crate::item_key::{DATA_KEY, PARTITION, SORT};
use crate::random::entropy;
use crate::retry::Backoff;
use crate::scope::{ForeignRecord, Subject, TenantScope};
use crate::sealing::{DataKey, Place, SealError, WrappedKey};
use crate::tenant::TenantId;

/// Why a store gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The condition of a write did not hold: somebody else was there first.
    #[error("the item is not in the state that the write expects")]
    Conflict,
    /// A list was to go on from something that is no place in it.
    #[error("the cursor is none that a list gave")]
    InvalidCursor,
    /// An item that has to be there is not.
    #[error("table {table} lacks an item that has to be there")]
    Missing {
        /// The table.
        table: String,
    },
    /// An item does not parse. It is never guessed at.
    #[error("an item of table {table} does not parse")]
    Corrupt {
        /// The table.
        table: String,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The table did not answer, or refused. Whether a write took place is unknown.
    #[error("table {table} did not answer: {code}")]
    Unavailable {
        /// The table.
        table: String,
        /// AWS's error code, or what kind of failure it was.
        code: String,
        /// The failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What the item holds is sealed, and there is no data key for it.
    #[error(transparent)]
    DataKey(#[from] DataKeyError),
}

impl StoreError {
    /// Whether the same call may be made again in the hope of an answer.
    pub fn passes(&self) -> bool {
        matches!(self, Self::Unavailable { code, .. } if code != "ValidationException"
            && code != "AccessDeniedException" && code != "ResourceNotFoundException")
    }

    /// Whether a transaction met another one at one of its items, and has done nothing.
    fn is_collision(&self) -> bool {
        matches!(self, Self::Unavailable { code, .. } if code == "TransactionCanceledException")
    }
}

/// How often a transaction is tried against others.
const COLLISIONS: Backoff =
    Backoff { attempts: 12, base: Duration::from_millis(20), cap: Duration::from_millis(500) };

/// Why a transaction did not take place.
pub(super) enum Cancelled {
    /// Conditions did not hold: for each part, the item it found, if its condition failed.
    Conditions(Vec<Option<Item>>),
    /// Anything else. Whether it took place is unknown.
    Failed(StoreError),
}

impl From<StoreError> for ApiError {
    /// What the caller sees. The failure itself is logged here, once.
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict => Self::new(
                Code::Conflict,
                "somebody else changed it at the same time; read it again and repeat",
            ),
            StoreError::InvalidCursor => Self::invalid("cursor", "cursor is none that a list gave"),
            StoreError::Missing { .. } => {
                tracing::error!("{error}");
                Self::unavailable("the store")
            }
            StoreError::Corrupt { ref source, .. } | StoreError::Unavailable { ref source, .. } => {
                tracing::error!("{error}: {source}");
                Self::unavailable("the store")
            }
            StoreError::DataKey(error) => error.into(),
        }
    }
}

pub(super) type Item = HashMap<String, AttributeValue>;

/// A data key as it lies beside what it has sealed: the key that opens it, and what KMS made of it.
pub(super) fn wrapped_value(wrapped: &WrappedKey) -> AttributeValue {
    AttributeValue::M(HashMap::from([
        ("arn".to_owned(), AttributeValue::S(wrapped.arn.to_string())),
        ("wrapped".to_owned(), AttributeValue::B(Blob::new(wrapped.bytes.clone()))),
    ]))
}

fn wrapped_key(value: &AttributeValue) -> Option<WrappedKey> {
    let fields = value.as_m().ok()?;
    let arn = fields.get("arn")?.as_s().ok()?.parse().ok()?;
    let bytes = fields.get("wrapped")?.as_b().ok()?.as_ref().to_vec();
    Some(WrappedKey { arn, bytes })
}

#[derive(Clone, Debug)]
pub(super) struct Table {
    access: Access,
    pub(super) name: String,
}

/// A page of a query: what to read, and how.
pub(super) struct Page<'a> {
    /// The items' sort keys start with this.
    pub(super) prefix: &'a str,
    /// Whether the last come first.
    pub(super) newest_first: bool,
    /// At most so many.
    pub(super) limit: i32,
    /// Only those after this sort key.
    pub(super) after: Option<String>,
}

impl Table {
    pub(super) fn new(access: &Access, name: String) -> Self {
        Self { access: access.clone(), name }
    }

    /// The client that acts for a tenant.
    pub(super) fn client(&self, tenant: &TenantId) -> Client {
        self.access.of(tenant).dynamodb().clone()
    }

    /// The client of the function's own role: for what crosses tenants, or is none's.
    pub(super) fn own_client(&self) -> Client {
        self.access.own_role().dynamodb().clone()
    }

    pub(super) fn key(tenant: &TenantId, sort: &str) -> Item {
        HashMap::from([
            (PARTITION.to_owned(), AttributeValue::S(tenant.to_string())),
            (SORT.to_owned(), AttributeValue::S(sort.to_owned())),
        ])
    }

    /// A record as an item: its own attributes and its sort key. The record carries its tenant.
    pub(super) fn item(&self, record: &impl Serialize, sort: &str) -> Result<Item, StoreError> {
        let mut item = self.plain_item(record)?;
        item.insert(SORT.to_owned(), AttributeValue::S(sort.to_owned()));
        Ok(item)
    }

    /// A record as an item, without a sort key.
    pub(super) fn plain_item(&self, record: &impl Serialize) -> Result<Item, StoreError> {
        to_item(record).map_err(|e| self.corrupt(e))
    }

    /// A record as an item in which nobody reads the attributes `text` without the tenant's key, if it has one.
    /// Such a tenant's text is sealed or not stored at all.
    pub(super) fn sealed_item(
        &self,
        scope: &TenantScope,
        record: &impl Serialize,
        sort: &str,
        text: &[&str],
        seal: Option<&DataKey>,
    ) -> Result<Item, StoreError> {
        let Some(arn) = scope.kms_key() else { return self.item(record, sort) };
        let key =
            seal.filter(|key| key.wrapped().arn == *arn).ok_or_else(|| self.corrupt(SealError::Seal))?;
        let fields = serde_json::to_value(record).map_err(|e| self.corrupt(e))?;
        let Value::Object(mut fields) = fields else { return Err(self.corrupt(SealError::Seal)) };
        let mut sealed = Item::new();
        for attribute in text {
            if let Some(value) = fields.remove(*attribute) {
                let value = self.sealed_value(scope, (sort, attribute), &value, key)?;
                sealed.insert((*attribute).to_owned(), value);
            }
        }
        let mut item = self.item(&fields, sort)?;
        item.extend(sealed);
        item.insert(DATA_KEY.to_owned(), wrapped_value(key.wrapped()));
        Ok(item)
    }

    /// A value for an attribute of an item, as nobody reads it without the tenant's key.
    pub(super) fn sealed_value(
        &self,
        scope: &TenantScope,
        (sort, attribute): (&str, &str),
        value: &impl Serialize,
        key: &DataKey,
    ) -> Result<AttributeValue, StoreError> {
        let value = serde_json::to_value(value).map_err(|e| self.corrupt(e))?;
        let place = Place { tenant: scope.tenant_id(), sort, attribute };
        let bytes = key.seal(place, &value, &mut entropy()).map_err(|e| self.corrupt(e))?;
        Ok(AttributeValue::B(Blob::new(bytes)))
    }

    /// The data key that lies beside an item, if one does: what is sealed in that item opens with no other.
    pub(super) async fn data_key_beside(
        &self,
        scope: &TenantScope,
        sort: &str,
    ) -> Result<Option<Arc<DataKey>>, StoreError> {
        let answer = self
            .client(scope.tenant_id())
            .get_item()
            .table_name(&self.name)
            .set_key(Some(Self::key(scope.tenant_id(), sort)))
            .projection_expression("#k")
            .expression_attribute_names("#k", DATA_KEY)
            .consistent_read(true)
            .send()
            .await
            .map_err(|e| self.failed(e))?;
        let Some(lies) = answer.item.and_then(|mut item| item.remove(DATA_KEY)) else { return Ok(None) };
        let wrapped = wrapped_key(&lies).ok_or_else(|| self.corrupt(SealError::Seal))?;
        let mut keys = data_keys::opened_all(&self.access, scope.tenant_id(), vec![wrapped.clone()]).await?;
        Ok(Some(keys.remove(&wrapped).ok_or_else(|| self.corrupt(SealError::Seal))?))
    }

    /// Items as records, opened where they are sealed: each with the data key that lies beside it, whatever key
    /// the tenant has by now. One that is sealed and another tenant's is dropped, with the alarm.
    pub(super) async fn opened<T: DeserializeOwned>(
        &self,
        scope: &TenantScope,
        mut items: Vec<Item>,
    ) -> Result<Vec<T>, StoreError> {
        items.retain(|item| !item.contains_key(DATA_KEY) || self.look(scope, item).is_ok());
        let wrapped: HashSet<WrappedKey> =
            items.iter().filter_map(|item| item.get(DATA_KEY)).filter_map(wrapped_key).collect();
        let mut keys = HashMap::new();
        if !wrapped.is_empty() {
            let wrapped = wrapped.into_iter().collect();
            keys = data_keys::opened_all(&self.access, scope.tenant_id(), wrapped).await?;
        }
        items.into_iter().map(|item| self.opened_with(scope, item, &keys)).collect()
    }

    /// As [`Table::opened`], of one item.
    pub(super) async fn opened_one<T: DeserializeOwned>(
        &self,
        scope: &TenantScope,
        item: Item,
    ) -> Result<T, StoreError> {
        self.opened(scope, vec![item]).await?.pop().ok_or_else(|| self.missing())
    }

    fn opened_with<T: DeserializeOwned>(
        &self,
        scope: &TenantScope,
        mut item: Item,
        keys: &HashMap<WrappedKey, Arc<DataKey>>,
    ) -> Result<T, StoreError> {
        let unopened = || self.corrupt(SealError::Open);
        let Some(wrapped) = item.remove(DATA_KEY) else { return self.record(item) };
        let key = wrapped_key(&wrapped).and_then(|wrapped| keys.get(&wrapped)).ok_or_else(unopened)?;
        let sort = item.get(SORT).and_then(|sort| sort.as_s().ok().cloned()).ok_or_else(unopened)?;
        let (mut open, mut plain) = (Vec::new(), Item::new());
        for (attribute, value) in item {
            match value {
                AttributeValue::B(sealed) => {
                    let place = Place { tenant: scope.tenant_id(), sort: &sort, attribute: &attribute };
                    let value = key.open(place, sealed.as_ref()).map_err(|e| self.corrupt(e))?;
                    open.push((attribute, value));
                }
                value => {
                    plain.insert(attribute, value);
                }
            }
        }
        let mut fields: Map<String, Value> = self.record(plain)?;
        fields.extend(open);
        serde_json::from_value(Value::Object(fields)).map_err(|e| self.corrupt(e))
    }

    pub(super) fn missing(&self) -> StoreError {
        StoreError::Missing { table: self.name.clone() }
    }

    /// The table answered, but not for all of what it was asked.
    pub(super) fn missing_answer(&self, what: &'static str) -> StoreError {
        StoreError::Unavailable { table: self.name.clone(), code: what.to_owned(), source: what.into() }
    }

    pub(super) fn record<T: DeserializeOwned>(&self, item: Item) -> Result<T, StoreError> {
        from_item(item).map_err(|e| self.corrupt(e))
    }

    /// An item as a record, if it is the subject's: the second look at what has to be there. Another's
    /// is as if there were none.
    pub(super) fn own<T: DeserializeOwned>(
        &self,
        subject: &impl Subject,
        item: Item,
    ) -> Result<T, StoreError> {
        self.look(subject, &item).map_err(|ForeignRecord| self.missing())?;
        self.record(item)
    }

    /// The second look at an item: whose partition it is of.
    pub(super) fn look(&self, subject: &impl Subject, item: &Item) -> Result<(), ForeignRecord> {
        let partition = item.get(PARTITION).and_then(|value| value.as_s().ok());
        subject.owns(partition.map_or("", String::as_str), &self.name)
    }

    /// A part of a transaction that adds `item`, which must not be there; if it is, the failure brings
    /// it along.
    pub(super) fn put_new(&self, item: Item) -> Result<TransactWriteItem, StoreError> {
        let put = Put::builder()
            .table_name(&self.name)
            .set_item(Some(item))
            .condition_expression("attribute_not_exists(#p)")
            .expression_attribute_names("#p", PARTITION)
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
            .build()
            .map_err(|e| self.corrupt(e))?;
        Ok(TransactWriteItem::builder().put(put).build())
    }

    /// All of `parts` or none; they are items of one tenant.
    pub(super) async fn transact(
        &self,
        tenant: &TenantId,
        parts: Vec<TransactWriteItem>,
    ) -> Result<(), Cancelled> {
        let sent = self.client(tenant).transact_write_items().set_transact_items(Some(parts)).send().await;
        let error = match sent {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        if let Some(TransactWriteItemsError::TransactionCanceledException(cancelled)) =
            error.as_service_error()
        {
            let reasons = cancelled.cancellation_reasons();
            let failed = |reason: &aws_sdk_dynamodb::types::CancellationReason| {
                reason.code() == Some("ConditionalCheckFailed")
            };
            if reasons.iter().any(failed) {
                let parts = reasons.iter().map(|r| failed(r).then(|| r.item().cloned().unwrap_or_default()));
                return Err(Cancelled::Conditions(parts.collect()));
            }
        }
        Err(Cancelled::Failed(self.failed(error)))
    }

    /// As [`Table::transact`], where others write some of these items too, so that two of them collide: then nothing has
    /// happened, and it is tried again.
    pub(super) async fn transact_among_others(
        &self,
        tenant: &TenantId,
        parts: Vec<TransactWriteItem>,
    ) -> Result<(), Cancelled> {
        let mut failed = 0;
        loop {
            let error = match self.transact(tenant, parts.clone()).await {
                Err(Cancelled::Failed(error)) => error,
                done => return done,
            };
            failed += 1;
            match COLLISIONS.wait(failed, None, &mut entropy()).filter(|_| error.is_collision()) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(Cancelled::Failed(error)),
            }
        }
    }

    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        tenant: &TenantId,
        sort: &str,
    ) -> Result<Option<T>, StoreError> {
        self.item_at(tenant, sort).await?.map(|item| self.record(item)).transpose()
    }

    /// As [`Table::get`], with everything that the item holds.
    pub(super) async fn item_at(&self, tenant: &TenantId, sort: &str) -> Result<Option<Item>, StoreError> {
        let answer = self
            .client(tenant)
            .get_item()
            .table_name(&self.name)
            .set_key(Some(Self::key(tenant, sort)))
            .consistent_read(true)
            .send()
            .await
            .map_err(|e| self.failed(e))?;
        Ok(answer.item)
    }

    /// A page of one tenant's records, and the sort key to go on after if there are more. What is another's
    /// is not among them.
    pub(super) async fn query<T: DeserializeOwned>(
        &self,
        subject: &impl Subject,
        page: Page<'_>,
    ) -> Result<(Vec<T>, Option<String>), StoreError> {
        let (items, next) = self.items(subject, page).await?;
        let records = items.into_iter().map(|item| self.record(item));
        Ok((records.collect::<Result<_, _>>()?, next))
    }

    /// As [`Table::query`], with everything that the items hold.
    pub(super) async fn items(
        &self,
        subject: &impl Subject,
        page: Page<'_>,
    ) -> Result<(Vec<Item>, Option<String>), StoreError> {
        self.page(subject, self.paged(subject.tenant_id(), page)).await
    }

    /// As [`Table::items`], with the keys and one attribute of each alone.
    pub(super) async fn projected(
        &self,
        subject: &impl Subject,
        page: Page<'_>,
        attribute: &str,
    ) -> Result<(Vec<Item>, Option<String>), StoreError> {
        let query = self.paged(subject.tenant_id(), page).projection_expression("#p, #s, #a");
        self.page(subject, query.expression_attribute_names("#a", attribute)).await
    }

    fn paged(&self, tenant: &TenantId, page: Page<'_>) -> QueryFluentBuilder {
        self.client(tenant)
            .query()
            .table_name(&self.name)
            .key_condition_expression("#p = :p AND begins_with(#s, :s)")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#s", SORT)
            .expression_attribute_values(":p", AttributeValue::S(tenant.to_string()))
            .expression_attribute_values(":s", AttributeValue::S(page.prefix.to_owned()))
            .scan_index_forward(!page.newest_first)
            .limit(page.limit)
            .set_exclusive_start_key(page.after.map(|sort| Self::key(tenant, &sort)))
            .consistent_read(true)
    }

    async fn page(
        &self,
        subject: &impl Subject,
        query: QueryFluentBuilder,
    ) -> Result<(Vec<Item>, Option<String>), StoreError> {
        let answer = query.send().await.map_err(|e| self.failed(e))?;
        let next = answer.last_evaluated_key.and_then(|key| key.get(SORT)?.as_s().ok().cloned());
        let mut items = answer.items.unwrap_or_default();
        items.retain(|item| self.look(subject, item).is_ok());
        Ok((items, next))
    }

    /// The keys of a page of one tenant's items, and the sort key to go on after if there are more. An
    /// empty `prefix` is all of them.
    pub(super) async fn keys(
        &self,
        tenant: &TenantId,
        prefix: &str,
        after: Option<String>,
    ) -> Result<(Vec<String>, Option<String>), StoreError> {
        let mut query = self
            .client(tenant)
            .query()
            .table_name(&self.name)
            .projection_expression("#s")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#s", SORT)
            .expression_attribute_values(":p", AttributeValue::S(tenant.to_string()))
            .set_exclusive_start_key(after.map(|sort| Self::key(tenant, &sort)))
            .consistent_read(true);
        query = if prefix.is_empty() {
            query.key_condition_expression("#p = :p")
        } else {
            query
                .key_condition_expression("#p = :p AND begins_with(#s, :s)")
                .expression_attribute_values(":s", AttributeValue::S(prefix.to_owned()))
        };
        let answer = query.send().await.map_err(|e| self.failed(e))?;
        let sort = |item: &Item| item.get(SORT).and_then(|sort| sort.as_s().ok().cloned());
        let keys = answer.items.unwrap_or_default().iter().map(sort).collect::<Option<_>>();
        let next = answer.last_evaluated_key.and_then(|key| sort(&key));
        Ok((keys.ok_or_else(|| self.missing())?, next))
    }

    /// Deletes items of one tenant. Those that are not there are none's to delete.
    pub(super) async fn delete_all(&self, tenant: &TenantId, sorts: &[String]) -> Result<(), StoreError> {
        /// The most of one call.
        const BATCH: usize = 25;
        const BACKOFF: Backoff =
            Backoff { attempts: 8, base: Duration::from_millis(50), cap: Duration::from_secs(1) };
        for batch in sorts.chunks(BATCH) {
            let request = |sort: &String| {
                let delete = DeleteRequest::builder().set_key(Some(Self::key(tenant, sort))).build();
                delete.map(|delete| WriteRequest::builder().delete_request(delete).build())
            };
            let mut left: Vec<WriteRequest> =
                batch.iter().map(request).collect::<Result<_, _>>().map_err(|e| self.corrupt(e))?;
            let mut failed = 0;
            while !left.is_empty() {
                let call = self.client(tenant).batch_write_item().request_items(&self.name, left);
                let answer = call.send().await.map_err(|e| self.failed(e))?;
                let unprocessed = answer.unprocessed_items.and_then(|mut tables| tables.remove(&self.name));
                left = unprocessed.unwrap_or_default();
                if !left.is_empty() {
                    failed += 1;
                    let wait = BACKOFF.wait(failed, None, &mut entropy());
                    tokio::time::sleep(wait.ok_or_else(|| self.missing_answer("unprocessed items"))?).await;
                }
            }
        }
        Ok(())
    }

    pub(super) fn corrupt(&self, error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
        StoreError::Corrupt { table: self.name.clone(), source: Box::new(error) }
    }

    /// Tells a failed condition from everything else.
    pub(super) fn failed<E, R>(&self, error: SdkError<E, R>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
        R: std::fmt::Debug + Send + Sync + 'static,
    {
        let code = super::failure_code(&error);
        match code.as_str() {
            "ConditionalCheckFailedException" => StoreError::Conflict,
            _ => StoreError::Unavailable { table: self.name.clone(), code, source: Box::new(error) },
        }
    }
}
