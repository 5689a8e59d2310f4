//! The issuers that tenants trust: items of table `tenants`, beside the tenant's record; and whose tokens of
//! which names are: items of the same table, in partitions that are no tenant's.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::{AttributeValue, Delete, Put, TransactWriteItem, Update};
use serde::{Deserialize, Serialize};

use super::idempotency::{Finished, IdempotencyStore};
use super::keys::pause;
use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Item, Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::ids::IssuerId;
use crate::issuer::{Issuer, MOST_ISSUERS, Provenance};
use crate::item_key::{self, PARTITION, SORT};
use crate::ledger::Record;
use crate::scope::{Operator, Subject, TenantScope};
use crate::tenant::TenantId;

/// The items.
#[derive(Clone, Debug)]
pub struct IssuerStore(Table);

/// Whose tokens of one provenance are.
#[derive(Clone, Debug, Deserialize)]
pub struct Claim {
    /// The tenant. It stays so when the issuer is removed: tokens that are still about must not become
    /// somebody else's.
    pub holder: TenantId,
    /// The issuer's record, while there is one.
    #[serde(default)]
    pub issuer_id: Option<IssuerId>,
    /// Since when the tenant has held it, whatever issuers came and went. Of several claims that a token leads
    /// to, the earliest counts.
    pub since: Timestamp,
}

/// That a tenant has a claim: the item's key says which.
#[derive(Serialize)]
struct Note<'a> {
    tenant_id: &'a TenantId,
}

/// What became of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// The issuer is there.
    Yes,
    /// The tenant's record has moved on from the request's epoch.
    Stale,
    /// The names are another tenant's, now or once, or an issuer's that this one has registered.
    Taken,
    /// The tenant has as many issuers as it may.
    Full,
    /// The idempotency key has been given to another request meanwhile; that one answers for it.
    Superseded,
}

/// Reads whose tokens of that provenance are.
pub(super) async fn claim(table: &Table, provenance: Provenance<'_>) -> Result<Option<Claim>, StoreError> {
    let answer = table
        .own_client()
        .get_item()
        .table_name(&table.name)
        .set_key(Some(claim_key(provenance)))
        .consistent_read(true)
        .send()
        .await
        .map_err(|e| table.failed(e))?;
    answer.item.map(|item| table.record(item)).transpose()
}

fn claim_key(provenance: Provenance<'_>) -> Item {
    HashMap::from([
        (PARTITION.to_owned(), AttributeValue::S(item_key::claim(provenance))),
        (SORT.to_owned(), AttributeValue::S(item_key::ISSUER_CLAIM.to_owned())),
    ])
}

impl IssuerStore {
    /// In the table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// All issuers of a tenant; there are few.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn list(&self, scope: &TenantScope) -> Result<Vec<Issuer>, StoreError> {
        // One more than there may be.
        let limit = i32::try_from(MOST_ISSUERS + 1).unwrap_or(i32::MAX);
        let page = Page { prefix: item_key::ISSUERS, newest_first: false, limit, after: None };
        Ok(self.0.query(scope, page).await?.0)
    }

    /// An issuer of a tenant.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn get(&self, scope: &TenantScope, id: &IssuerId) -> Result<Option<Issuer>, StoreError> {
        let issuer: Option<Issuer> = self.0.get(scope.tenant_id(), &item_key::issuer(id)).await?;
        Ok(issuer.filter(|issuer| scope.owns(issuer.tenant_id.as_str(), "tenants").is_ok()))
    }

    /// Registers an issuer and claims its tokens' names for the tenant, with the record of who did it and the
    /// result for repeats: all or none, and never more than the tenant may have, however many are registered at
    /// once.
    ///
    /// # Errors
    /// If the table does not answer however often it is asked; then the issuer may be there or not.
    pub async fn register(
        &self,
        scope: &TenantScope,
        issuer: &Issuer,
        (ledger, record): (&Ledger, &Record),
        finished: Option<(&IdempotencyStore, Finished<'_>)>,
    ) -> Result<Registered, StoreError> {
        if scope.owns(issuer.tenant_id.as_str(), "the request").is_err() {
            return Err(StoreError::Conflict);
        }
        let mut failed = 0;
        loop {
            // The roster first: if it still stands when the issuer is added, those that are counted after it are
            // all there are.
            let made = self.0.made(scope.tenant_id(), item_key::ISSUERS_MADE).await?;
            let issuers = self.list(scope).await?;
            if issuers.iter().any(|there| there.issuer_id == issuer.issuer_id) {
                // An answer was lost.
                return Ok(Registered::Yes);
            }
            if issuers.len() >= MOST_ISSUERS {
                return Ok(Registered::Full);
            }
            let parts = self.registration(scope, issuer, made, (ledger, record), finished.as_ref())?;
            match self.0.transact(&issuer.tenant_id, parts).await {
                Ok(()) => return Ok(Registered::Yes),
                Err(Cancelled::Conditions(found)) => {
                    let [claim, epoch, _, roster, _, _, finished] =
                        std::array::from_fn(|part| found.get(part).is_some_and(Option::is_some));
                    if epoch {
                        return Ok(Registered::Stale);
                    }
                    if claim {
                        return Ok(Registered::Taken);
                    }
                    if finished {
                        return Ok(Registered::Superseded);
                    }
                    if !roster {
                        return Err(StoreError::Conflict);
                    }
                    // Another was registered meanwhile.
                    failed = pause(failed, StoreError::Conflict).await?;
                }
                Err(Cancelled::Failed(error)) => failed = pause(failed, error).await?,
            }
        }
    }

    /// The parts of a registration: the claim, the epoch, the issuer, the roster, the claim's note, the record
    /// and the result, in this order.
    fn registration(
        &self,
        scope: &TenantScope,
        issuer: &Issuer,
        made: u64,
        (ledger, record): (&Ledger, &Record),
        finished: Option<&(&IdempotencyStore, Finished<'_>)>,
    ) -> Result<Vec<TransactWriteItem>, StoreError> {
        let since = issuer.created_at.as_millis();
        let claim = Update::builder()
            .table_name(&self.0.name)
            .set_key(Some(claim_key(issuer.provenance())))
            .update_expression("SET holder = :t, issuer_id = :i, since = if_not_exists(since, :now)")
            .condition_expression(
                "attribute_not_exists(#p) OR (holder = :t AND attribute_not_exists(issuer_id))",
            )
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_values(":t", AttributeValue::S(issuer.tenant_id.to_string()))
            .expression_attribute_values(":i", AttributeValue::S(issuer.issuer_id.to_string()))
            .expression_attribute_values(":now", AttributeValue::N(since.to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let tenant_id = &issuer.tenant_id;
        let note = Put::builder()
            .table_name(&self.0.name)
            .set_item(Some(self.0.item(&Note { tenant_id }, &item_key::claim_note(issuer.provenance()))?))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let mut parts = vec![
            TransactWriteItem::builder().update(claim).build(),
            // What is handed on is what the key may do now.
            self.0.at_epoch_part(&issuer.tenant_id, scope.epoch())?,
            self.0.put_new(self.0.item(issuer, &item_key::issuer(&issuer.issuer_id))?)?,
            self.0.roster_part(&issuer.tenant_id, item_key::ISSUERS_MADE, made)?,
            TransactWriteItem::builder().put(note).build(),
            ledger.event_part(record)?,
        ];
        if let Some((store, finished)) = finished {
            parts.push(store.finished_part(scope, finished, None)?);
        }
        Ok(parts)
    }

    /// Removes an issuer, with the record of who did it, and moves the tenant's epoch on. The names stay the
    /// tenant's. Says whether it was there.
    ///
    /// # Errors
    /// If the table does not answer; then the issuer may be there or not.
    pub async fn remove(
        &self,
        scope: &TenantScope,
        issuer: &Issuer,
        (ledger, record): (&Ledger, &Record),
    ) -> Result<bool, StoreError> {
        let tenant_id = scope.tenant_id();
        let gone = Delete::builder()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(tenant_id, &item_key::issuer(&issuer.issuer_id))))
            .condition_expression("attribute_exists(#p)")
            .expression_attribute_names("#p", PARTITION)
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let vacated = Update::builder()
            .table_name(&self.0.name)
            .set_key(Some(claim_key(issuer.provenance())))
            .update_expression("REMOVE issuer_id")
            .condition_expression("holder = :t AND issuer_id = :i")
            .expression_attribute_values(":t", AttributeValue::S(tenant_id.to_string()))
            .expression_attribute_values(":i", AttributeValue::S(issuer.issuer_id.to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let parts = vec![
            TransactWriteItem::builder().delete(gone).build(),
            TransactWriteItem::builder().update(vacated).build(),
            self.0.epoch_part(tenant_id, None)?,
            ledger.event_part(record)?,
        ];
        match self.0.transact(tenant_id, parts).await {
            Ok(()) => Ok(true),
            Err(Cancelled::Conditions(_)) => Ok(false),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    /// Who holds the claim to tokens of that provenance.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn held(
        &self,
        _operator: &Operator,
        provenance: Provenance<'_>,
    ) -> Result<Option<Claim>, StoreError> {
        claim(&self.0, provenance).await
    }

    /// Frees a claim on an operator's word, with the record of it: its issuer is removed if there is one, its
    /// holder's epoch moves on, and the names are whoever's registers them next.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the claim is not as it was read any more, or its holder is gone; otherwise if
    /// the table does not answer.
    pub async fn release(
        &self,
        operator: &Operator,
        provenance: Provenance<'_>,
        claim: &Claim,
        (ledger, record): (&Ledger, &Record),
    ) -> Result<(), StoreError> {
        let ward = operator.ward(claim.holder.clone());
        let tenant_id = ward.tenant_id();
        let freed = Delete::builder()
            .table_name(&self.0.name)
            .set_key(Some(claim_key(provenance)))
            .expression_attribute_values(":t", AttributeValue::S(tenant_id.to_string()));
        let freed = match &claim.issuer_id {
            None => freed.condition_expression("holder = :t AND attribute_not_exists(issuer_id)"),
            Some(id) => freed
                .condition_expression("holder = :t AND issuer_id = :i")
                .expression_attribute_values(":i", AttributeValue::S(id.to_string())),
        };
        let own = |sort: &str| {
            let delete =
                Delete::builder().table_name(&self.0.name).set_key(Some(Table::key(tenant_id, sort))).build();
            delete
                .map(|delete| TransactWriteItem::builder().delete(delete).build())
                .map_err(|e| self.0.corrupt(e))
        };
        let freed = freed.build().map_err(|e| self.0.corrupt(e))?;
        let mut parts = vec![
            TransactWriteItem::builder().delete(freed).build(),
            own(&item_key::claim_note(provenance))?,
            self.0.epoch_part(tenant_id, None)?,
            ledger.event_part(record)?,
        ];
        if let Some(id) = &claim.issuer_id {
            parts.push(own(&item_key::issuer(id))?);
        }
        match self.0.transact(tenant_id, parts).await {
            Ok(()) => Ok(()),
            Err(Cancelled::Conditions(_)) => Err(StoreError::Conflict),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }
}
