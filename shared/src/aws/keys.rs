//! The keys of a tenant: items of table `tenants`, beside the tenant's record.
//!
//! Whatever takes something away from a key (its revocation, its end after a replacement) moves the
//! epoch of the tenant's record on in the same transaction. Once the meter knows that epoch
//! ([`MeterStore::set_standing`](super::meters::MeterStore::set_standing)), no decision from before
//! admits anything.

use std::time::Duration;

use aws_sdk_dynamodb::types::{
    AttributeValue, ConditionCheck, Delete, ReturnValuesOnConditionCheckFailure, TransactWriteItem, Update,
};
use serde::{Deserialize, Serialize};

use super::idempotency::{Finished, IdempotencyStore};
use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Page, StoreError, Table};
use super::tenants::present;
use crate::api_key::{KeyId, KeyRecord, MOST_KEYS, VerifiedKey};
use crate::clock::Timestamp;
use crate::idempotency::IdempotencyKey;
use crate::item_key::{self, PARTITION};
use crate::ledger::Record;
use crate::random::entropy;
use crate::retry::Backoff;
use crate::scope::{Subject, TenantScope};
use crate::tenant::{TenantId, TenantStatus};

/// How often a change is tried against others that are made at the same time.
const CONTENTION: Backoff =
    Backoff { attempts: 12, base: Duration::from_millis(20), cap: Duration::from_millis(500) };
/// How often it is tried where the table does not answer, whose client has tried by itself already.
const BACKOFF: Backoff =
    Backoff { attempts: 3, base: Duration::from_millis(40), cap: Duration::from_secs(1) };
/// `last_used_at` is written again after so long.
const USED_EVERY_MS: i64 = 60_000;

/// The items.
#[derive(Clone, Debug)]
pub struct KeyStore(Table);

/// A key to be added, and what goes with it into the transaction.
#[derive(Debug)]
pub struct Addition<'a> {
    /// The key.
    pub key: &'a KeyRecord,
    /// The epoch of the tenant's record that this rests on.
    pub epoch: u64,
    /// The key that it replaces, and until when that one stays valid.
    pub replaces: Option<(&'a KeyId, Timestamp)>,
    /// The record of who did it.
    pub note: (&'a Ledger, &'a Record),
    /// The first result under an idempotency key, and the request whose it is.
    pub finished: Option<(&'a TenantScope, (&'a IdempotencyStore, Finished<'a>))>,
    /// An operator's idempotency key: no second key is made under it, as long as there is the tenant.
    pub once: Option<&'a IdempotencyKey>,
}

/// What became of an addition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Added {
    /// The key is there.
    Yes,
    /// The tenant's record is gone or has moved on from the epoch.
    Stale,
    /// The tenant has as many keys as it may.
    Full,
    /// The key that it was to replace is not there.
    Nothing,
    /// The key that it was to replace has been replaced before.
    Replaced,
    /// The idempotency key has been given to another request meanwhile; that one answers for it.
    Superseded,
    /// This key has been made under the operator's idempotency key before.
    Before(KeyId),
}

/// Whether a tenant may use the service at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TenantStanding {
    /// The tenant's standing.
    pub status: TenantStatus,
    /// Its epoch.
    pub epoch: u64,
}

/// What an operator's request has made.
#[derive(Serialize, Deserialize)]
struct Made {
    tenant_id: TenantId,
    key_id: KeyId,
}

/// How many keys, or issuers, were ever made: what two that are made at the same time collide in.
#[derive(Deserialize)]
struct Roster {
    made: u64,
}

impl KeyStore {
    /// In the table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// A page of a tenant's keys, by id, and the id to go on after if there are more.
    ///
    /// # Errors
    /// [`StoreError::InvalidCursor`] if `after` is no key's id; otherwise if the table does not answer or
    /// an item does not parse.
    pub async fn list(
        &self,
        subject: &impl Subject,
        limit: u16,
        after: Option<&str>,
    ) -> Result<(Vec<KeyRecord>, Option<KeyId>), StoreError> {
        let after: Option<KeyId> =
            after.map(str::parse).transpose().map_err(|_| StoreError::InvalidCursor)?;
        let after = after.as_ref().map(item_key::api_key);
        let page = Page { prefix: item_key::API_KEYS, newest_first: false, limit: limit.into(), after };
        let (keys, next) = self.0.query::<KeyRecord>(subject, page).await?;
        let next = next.and_then(|sort| sort.strip_prefix(item_key::API_KEYS)?.parse().ok());
        Ok((keys, next))
    }

    /// A key of the scope's tenant.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn get(&self, scope: &TenantScope, id: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
        let key: Option<KeyRecord> = self.0.get(scope.tenant_id(), &item_key::api_key(id)).await?;
        Ok(key.filter(|key| scope.owns(key.tenant_id.as_str(), "tenants").is_ok()))
    }

    /// What the tenant's record says at present.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if there is none; otherwise as [`KeyStore::get`].
    pub async fn standing(&self, subject: &impl Subject) -> Result<TenantStanding, StoreError> {
        let tenant = present(&self.0, subject.tenant_id()).await?.ok_or_else(|| self.0.missing())?;
        Ok(TenantStanding { status: tenant.status, epoch: tenant.epoch })
    }

    /// Adds a key, and ends the one that it replaces: all or nothing, and never more than the tenant may
    /// have, however many are added at once. Where there are as many, one that has expired gives way.
    ///
    /// # Errors
    /// If the table does not answer however often it is asked: then the key may be there or not.
    pub async fn add(&self, subject: &impl Subject, addition: &Addition<'_>) -> Result<Added, StoreError> {
        let tenant = subject.tenant_id();
        let mut failed = 0;
        loop {
            // The roster first: if it still stands when the key is added, the keys that are counted after
            // it are all there are.
            let made = self.0.made(tenant, item_key::KEYS).await?;
            let page = Page {
                prefix: item_key::API_KEYS,
                newest_first: false,
                limit: i32::from(MOST_KEYS) + 1,
                after: None,
            };
            let (keys, _) = self.0.query::<KeyRecord>(subject, page).await?;
            if keys.iter().any(|key| is_same(key, addition.key)) {
                // An answer was lost.
                return Ok(Added::Yes);
            }
            let gives_way = if keys.len() < usize::from(MOST_KEYS) {
                None
            } else {
                let now = addition.key.created_at;
                let expired = keys.iter().filter(|key| key.expires_at.is_some_and(|at| at <= now));
                match expired.min_by_key(|key| key.expires_at) {
                    Some(expired) => Some(expired),
                    None => return Ok(Added::Full),
                }
            };
            let parts = Parts::of(&self.0, tenant, addition, made, gives_way)?;
            match self.0.transact(tenant, parts.all).await {
                Ok(()) => return Ok(Added::Yes),
                Err(Cancelled::Conditions(found)) => {
                    let found = |at: Option<usize>| found.get(at?)?.as_ref();
                    if let Some(there) = found(Some(parts.key)) {
                        let there: KeyRecord = self.0.record(there.clone())?;
                        return if is_same(&there, addition.key) {
                            Ok(Added::Yes)
                        } else {
                            Err(StoreError::Conflict)
                        };
                    }
                    if let Some(made) = found(parts.once) {
                        let made: Made = self.0.record(made.clone())?;
                        return Ok(Added::Before(made.key_id));
                    }
                    if found(Some(parts.tenant)).is_some() {
                        return Ok(Added::Stale);
                    }
                    if let Some(there) = found(parts.replaced) {
                        let gone = there.is_empty();
                        return Ok(if gone { Added::Nothing } else { Added::Replaced });
                    }
                    if found(parts.finished).is_some() {
                        return Ok(Added::Superseded);
                    }
                    // Another key was made meanwhile, or the one that was to give way is gone.
                    failed = pause(failed, StoreError::Conflict).await?;
                }
                Err(Cancelled::Failed(error)) => failed = pause(failed, error).await?,
            }
        }
    }

    /// Takes a key away and moves the tenant's epoch on, with the record of who did it. Says whether the
    /// key was there.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if there is no such tenant; otherwise if the table does not answer however
    /// often it is asked: then the key may be there or not.
    pub async fn revoke(
        &self,
        subject: &impl Subject,
        id: &KeyId,
        (ledger, record): (&Ledger, &Record),
    ) -> Result<bool, StoreError> {
        let tenant = subject.tenant_id();
        let (mut failed, mut unknown) = (0, false);
        loop {
            let delete = Delete::builder()
                .table_name(&self.0.name)
                .set_key(Some(Table::key(tenant, &item_key::api_key(id))))
                .condition_expression("attribute_exists(#p)")
                .expression_attribute_names("#p", PARTITION)
                .build()
                .map_err(|e| self.0.corrupt(e))?;
            let parts = vec![
                TransactWriteItem::builder().delete(delete).build(),
                self.0.epoch_part(tenant, None)?,
                ledger.event_part(record)?,
            ];
            match self.0.transact(tenant, parts).await {
                Ok(()) => return Ok(true),
                // Gone; and if an answer to this very call was lost, by this very call.
                Err(Cancelled::Conditions(found)) if found.first().is_some_and(Option::is_some) => {
                    return Ok(unknown);
                }
                Err(Cancelled::Conditions(_)) => return Err(self.0.missing()),
                Err(Cancelled::Failed(error)) => {
                    failed = pause(failed, error).await?;
                    unknown = true;
                }
            }
        }
    }

    /// Notes that a key was used, at most once a minute. It is not there to be relied upon: whoever
    /// cannot write it goes on.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn note_used(&self, key: &VerifiedKey, now: Timestamp) -> Result<(), StoreError> {
        let record = key.record();
        let before = now.plus_millis(-USED_EVERY_MS);
        if record.last_used_at.is_some_and(|at| at > before) {
            return Ok(());
        }
        let number = |at: Timestamp| AttributeValue::N(at.as_millis().to_string());
        let update = self
            .0
            .client(&record.tenant_id)
            .update_item()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(&record.tenant_id, &item_key::api_key(&record.key_id))))
            .update_expression("SET #u = :now")
            // A key that was revoked meanwhile does not come back by this.
            .condition_expression("attribute_exists(#p) AND (attribute_not_exists(#u) OR #u <= :before)")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#u", "last_used_at")
            .expression_attribute_values(":now", number(now))
            .expression_attribute_values(":before", number(before));
        match update.send().await.map_err(|e| self.0.failed(e)) {
            Ok(_) | Err(StoreError::Conflict) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Waits before the next attempt, or gives up.
pub(super) async fn pause(failed: u32, error: StoreError) -> Result<u32, StoreError> {
    let failed = failed + 1;
    let policy = match &error {
        StoreError::Conflict => Some(CONTENTION),
        StoreError::Unavailable { code, .. } if code == "TransactionCanceledException" => Some(CONTENTION),
        error => error.passes().then_some(BACKOFF),
    };
    let wait = policy.and_then(|policy| policy.wait(failed, None, &mut entropy()));
    let Some(wait) = wait else { return Err(error) };
    tokio::time::sleep(wait).await;
    Ok(failed)
}

/// Whether it is the key that was to be added: a secret is made once.
fn is_same(there: &KeyRecord, key: &KeyRecord) -> bool {
    there.key_id == key.key_id && there.secret_hash == key.secret_hash
}

/// The parts of an addition's transaction, and where those are whose conditions are told apart.
struct Parts {
    all: Vec<TransactWriteItem>,
    key: usize,
    tenant: usize,
    replaced: Option<usize>,
    finished: Option<usize>,
    once: Option<usize>,
}

impl Parts {
    fn of(
        table: &Table,
        tenant: &TenantId,
        addition: &Addition<'_>,
        made: u64,
        gives_way: Option<&KeyRecord>,
    ) -> Result<Self, StoreError> {
        let Addition { key, epoch, replaces, note: (ledger, record), finished, once } = addition;
        if key.tenant_id != *tenant {
            return Err(StoreError::Conflict);
        }
        let mut all = vec![
            table.put_new(table.item(key, &item_key::api_key(&key.key_id))?)?,
            // What is taken from the key that is replaced must reach the decisions about it.
            match replaces {
                Some(_) => table.epoch_part(tenant, Some(*epoch))?,
                None => table.at_epoch_part(tenant, *epoch)?,
            },
            table.roster_part(tenant, item_key::KEYS, made)?,
            ledger.event_part(record)?,
        ];
        let mut add = |part| {
            all.push(part);
            all.len() - 1
        };
        let replaced = match replaces {
            Some((old, until)) => Some(add(table.replaced_part(tenant, old, &key.key_id, *until)?)),
            None => None,
        };
        if let Some(expired) = gives_way {
            add(table.expired_part(tenant, expired)?);
        }
        let finished = match finished {
            Some((scope, (store, finished))) => Some(add(store.finished_part(scope, finished, None)?)),
            None => None,
        };
        let once = match once {
            Some(once) => {
                let made = Made { tenant_id: tenant.clone(), key_id: key.key_id.clone() };
                Some(add(table.put_new(table.item(&made, &item_key::made(once.hash()))?)?))
            }
            None => None,
        };
        Ok(Self { all, key: 0, tenant: 1, replaced, finished, once })
    }
}

impl Table {
    /// Moves the tenant's epoch on; from `epoch`, if that is given.
    pub(super) fn epoch_part(
        &self,
        tenant: &TenantId,
        epoch: Option<u64>,
    ) -> Result<TransactWriteItem, StoreError> {
        let update = Update::builder()
            .table_name(&self.name)
            .set_key(Some(Self::key(tenant, item_key::TENANT)))
            .update_expression("SET #e = #e + :one")
            .expression_attribute_names("#e", "epoch")
            .expression_attribute_values(":one", AttributeValue::N("1".to_owned()))
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld);
        let update = match epoch {
            None => update.condition_expression("attribute_exists(#e)"),
            Some(epoch) => update
                .condition_expression("#e = :was")
                .expression_attribute_values(":was", AttributeValue::N(epoch.to_string())),
        };
        let update = update.build().map_err(|e| self.corrupt(e))?;
        Ok(TransactWriteItem::builder().update(update).build())
    }

    /// Makes sure that the tenant's record is still at that epoch.
    pub(super) fn at_epoch_part(
        &self,
        tenant: &TenantId,
        epoch: u64,
    ) -> Result<TransactWriteItem, StoreError> {
        let check = ConditionCheck::builder()
            .table_name(&self.name)
            .set_key(Some(Self::key(tenant, item_key::TENANT)))
            .condition_expression("#e = :was")
            .expression_attribute_names("#e", "epoch")
            .expression_attribute_values(":was", AttributeValue::N(epoch.to_string()))
            .build()
            .map_err(|e| self.corrupt(e))?;
        Ok(TransactWriteItem::builder().condition_check(check).build())
    }

    /// How many were ever made, by the roster of that name.
    pub(super) async fn made(&self, tenant: &TenantId, roster: &str) -> Result<u64, StoreError> {
        let roster: Option<Roster> = self.get(tenant, roster).await?;
        Ok(roster.map_or(0, |roster| roster.made))
    }

    /// Counts one more in that roster, if `made` were made so far.
    pub(super) fn roster_part(
        &self,
        tenant: &TenantId,
        roster: &str,
        made: u64,
    ) -> Result<TransactWriteItem, StoreError> {
        let update = Update::builder()
            .table_name(&self.name)
            .set_key(Some(Self::key(tenant, roster)))
            .update_expression("SET #m = :next")
            .expression_attribute_names("#m", "made")
            .expression_attribute_values(":next", AttributeValue::N((made + 1).to_string()));
        let update = match made {
            0 => update.condition_expression("attribute_not_exists(#m)"),
            _ => update
                .condition_expression("#m = :made")
                .expression_attribute_values(":made", AttributeValue::N(made.to_string())),
        };
        Ok(TransactWriteItem::builder().update(update.build().map_err(|e| self.corrupt(e))?).build())
    }

    /// Ends a key at `until`, since `by` has taken its place. It must be there, and in its place still.
    fn replaced_part(
        &self,
        tenant: &TenantId,
        old: &KeyId,
        by: &KeyId,
        until: Timestamp,
    ) -> Result<TransactWriteItem, StoreError> {
        let update = Update::builder()
            .table_name(&self.name)
            .set_key(Some(Self::key(tenant, &item_key::api_key(old))))
            .update_expression("SET #x = :until, #b = :by")
            .condition_expression("attribute_exists(#p) AND attribute_not_exists(#b)")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#x", "expires_at")
            .expression_attribute_names("#b", "replaced_by")
            .expression_attribute_values(":until", AttributeValue::N(until.as_millis().to_string()))
            .expression_attribute_values(":by", AttributeValue::S(by.to_string()))
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
            .build()
            .map_err(|e| self.corrupt(e))?;
        Ok(TransactWriteItem::builder().update(update).build())
    }

    /// Forgets a key that has expired.
    fn expired_part(&self, tenant: &TenantId, expired: &KeyRecord) -> Result<TransactWriteItem, StoreError> {
        let at = expired.expires_at.map_or(0, Timestamp::as_millis);
        let delete = Delete::builder()
            .table_name(&self.name)
            .set_key(Some(Self::key(tenant, &item_key::api_key(&expired.key_id))))
            .condition_expression("#x = :at")
            .expression_attribute_names("#x", "expires_at")
            .expression_attribute_values(":at", AttributeValue::N(at.to_string()))
            .build()
            .map_err(|e| self.corrupt(e))?;
        Ok(TransactWriteItem::builder().delete(delete).build())
    }
}
