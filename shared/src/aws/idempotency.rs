//! Idempotency keys: items of table `conversations`, since they hold answers and share their fate. A
//! key is claimed before anything is spent, and its first result enters the ledger's transaction.

use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types::{AttributeValue, Put, ReturnValuesOnConditionCheckFailure, TransactWriteItem};
use serde::{Deserialize, Serialize};

use super::session::Access;
use super::table::{Item, StoreError, Table};
use crate::clock::Timestamp;
use crate::error::{ApiError, Code};
use crate::idempotency::{IdempotencyKey, Stored};
use crate::item_key::{self, PARTITION};
use crate::scope::{ForeignRecord, TenantScope};
use crate::sealing::DataKey;
use crate::tenant::TenantId;

/// How long a result is kept for repeats: 24 hours.
const KEPT_S: i64 = 86_400;

/// The items.
#[derive(Clone, Debug)]
pub struct IdempotencyStore {
    table: Table,
    /// What of an item its tenant's key seals.
    text: &'static [&'static str],
}

/// What a request finds when it claims its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// It is the first.
    First,
    /// It repeats a request that has its result.
    Repeat(Stored),
    /// It repeats a request that is under way.
    Running,
    /// The key was used for another request.
    OtherRequest,
}

/// A first result.
#[derive(Debug)]
pub struct Finished<'a> {
    /// The key.
    pub key: &'a IdempotencyKey,
    /// The result.
    pub stored: &'a Stored,
    /// Now.
    pub now: Timestamp,
}

/// An item: a claim, and the result once there is one.
#[derive(Serialize, Deserialize)]
struct Claim {
    tenant_id: TenantId,
    /// The request that holds the key.
    owner: String,
    /// The hash of what was asked.
    fingerprint: String,
    /// Until when the owner is believed to be at work.
    until_s: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    result: Option<Stored>,
    expires_at_s: i64,
}

impl IdempotencyStore {
    /// In the table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self { table: Table::new(access, table), text: &["result"] }
    }

    /// In the table of that name, of a function whose answers hold nothing that users or the model have written:
    /// they are sealed for nobody.
    pub fn of_names(access: &Access, table: String) -> Self {
        Self { table: Table::new(access, table), text: &[] }
    }

    fn claim_item(
        &self,
        scope: &TenantScope,
        key: &IdempotencyKey,
        until_s: i64,
        (result, seal): (Option<&Stored>, Option<&DataKey>),
        now: Timestamp,
    ) -> Result<Item, StoreError> {
        let claim = Claim {
            tenant_id: scope.tenant_id().clone(),
            owner: scope.request_id().to_string(),
            fingerprint: key.fingerprint().to_owned(),
            until_s,
            result: result.cloned(),
            expires_at_s: now.as_seconds() + KEPT_S,
        };
        let sort = item_key::idempotency(key.hash());
        if result.is_none() || self.text.is_empty() {
            return self.table.item(&claim, &sort);
        }
        self.table.sealed_item(scope, &claim, &sort, self.text, seal)
    }

    /// Begins a request that may be a repeat: brings the first result, if there is one.
    ///
    /// # Errors
    /// What the caller is to see: 409 while the first request runs, 400 if the key was another's.
    pub async fn begin(
        &self,
        scope: &TenantScope,
        key: &IdempotencyKey,
        until_s: i64,
        now: Timestamp,
    ) -> Result<Option<Stored>, ApiError> {
        match Box::pin(self.claim(scope, key, until_s, now)).await? {
            Claimed::First => Ok(None),
            Claimed::Repeat(stored) => Ok(Some(stored)),
            Claimed::Running => {
                let message = "a request with this Idempotency-Key is under way; its result is not there yet";
                Err(ApiError { retry_after_ms: Some(1_000), ..ApiError::new(Code::Conflict, message) }
                    .with_param("Idempotency-Key"))
            }
            Claimed::OtherRequest => Err(ApiError::invalid(
                "Idempotency-Key",
                "this Idempotency-Key was used for a request with another body, or for other groups",
            )),
        }
    }

    /// Claims the key for this request, which will have ended by `until_s`. A claim whose request has
    /// vanished is taken over then.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn claim(
        &self,
        scope: &TenantScope,
        key: &IdempotencyKey,
        until_s: i64,
        now: Timestamp,
    ) -> Result<Claimed, StoreError> {
        let owner = scope.request_id().to_string();
        let answer = self
            .table
            .client(scope.tenant_id())
            .put_item()
            .table_name(&self.table.name)
            .set_item(Some(self.claim_item(scope, key, until_s, (None, None), now)?))
            .condition_expression(
                "attribute_not_exists(#p) OR #e <= :now \
                 OR (attribute_not_exists(#r) AND #f = :fingerprint AND (#u <= :now OR #o = :owner))",
            )
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#e", "expires_at_s")
            .expression_attribute_names("#r", "result")
            .expression_attribute_names("#f", "fingerprint")
            .expression_attribute_names("#u", "until_s")
            .expression_attribute_names("#o", "owner")
            .expression_attribute_values(":now", AttributeValue::N(now.as_seconds().to_string()))
            .expression_attribute_values(":fingerprint", AttributeValue::S(key.fingerprint().to_owned()))
            .expression_attribute_values(":owner", AttributeValue::S(owner))
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
            .send()
            .await;
        let error = match answer {
            Ok(_) => return Ok(Claimed::First),
            Err(error) => error,
        };
        let item = match error.as_service_error() {
            Some(PutItemError::ConditionalCheckFailedException(failed)) => failed.item.clone(),
            // At this moment a transaction writes the item: that in which the first request settles.
            Some(PutItemError::TransactionConflictException(_)) => return Ok(Claimed::Running),
            _ => return Err(self.table.failed(error)),
        };
        let item = item.ok_or_else(|| self.table.missing())?;
        self.table.look(scope, &item).map_err(|ForeignRecord| self.table.missing())?;
        let there: Claim = self.table.opened_one(scope, item).await?;
        Ok(match there.result {
            _ if there.fingerprint != key.fingerprint() => Claimed::OtherRequest,
            Some(result) => Claimed::Repeat(result),
            None => Claimed::Running,
        })
    }

    /// [`IdempotencyStore::release`], where nothing more can be done about a failure: then the claim
    /// lapses when its request's time is over.
    pub async fn give_back(&self, scope: &TenantScope, key: Option<&IdempotencyKey>) {
        if let Some(key) = key
            && let Err(error) = self.release(scope, key).await
        {
            tracing::warn!("An idempotency key could not be given back: {error}");
        }
    }

    /// A first result, as it enters the ledger's transaction.
    pub const fn finished<'a>(
        &'a self,
        key: &'a IdempotencyKey,
        stored: &'a Stored,
        now: Timestamp,
    ) -> (&'a Self, Finished<'a>) {
        (self, Finished { key, stored, now })
    }

    /// Gives the key back, so that a repeat is a new attempt: nothing came of this one.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn release(&self, scope: &TenantScope, key: &IdempotencyKey) -> Result<(), StoreError> {
        let answer = self
            .table
            .client(scope.tenant_id())
            .delete_item()
            .table_name(&self.table.name)
            .set_key(Some(Table::key(scope.tenant_id(), &item_key::idempotency(key.hash()))))
            .condition_expression("#o = :owner AND attribute_not_exists(#r)")
            .expression_attribute_names("#o", "owner")
            .expression_attribute_names("#r", "result")
            .expression_attribute_values(":owner", AttributeValue::S(scope.request_id().to_string()))
            .send()
            .await;
        match answer.map_err(|e| self.table.failed(e)) {
            Ok(_) | Err(StoreError::Conflict) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The part of a transaction that keeps the first result, if the key is still this request's; sealed where the
    /// tenant has a key of its own.
    pub(super) fn finished_part(
        &self,
        scope: &TenantScope,
        finished: &Finished<'_>,
        seal: Option<&DataKey>,
    ) -> Result<TransactWriteItem, StoreError> {
        let Finished { key, stored, now } = finished;
        let item = self.claim_item(scope, key, now.as_seconds(), (Some(stored), seal), *now)?;
        let put = Put::builder()
            .table_name(&self.table.name)
            .set_item(Some(item))
            .condition_expression("#o = :owner")
            .expression_attribute_names("#o", "owner")
            .expression_attribute_values(":owner", AttributeValue::S(scope.request_id().to_string()))
            .build()
            .map_err(|e| self.table.corrupt(e))?;
        Ok(TransactWriteItem::builder().put(put).build())
    }
}
