//! The issuers that tenants trust: items of table `tenants`, beside the tenant's record; and whose tokens of
//! which names are: items of the same table, in partitions that are no tenant's.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::{AttributeValue, Delete, Put, TransactWriteItem, Update};
use serde::{Deserialize, Serialize};

use super::idempotency::{Finished, IdempotencyStore};
use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Item, Page, StoreError, Table};
use crate::ids::IssuerId;
use crate::issuer::{Issuer, MOST_ISSUERS, Provenance};
use crate::item_key::{self, PARTITION, SORT};
use crate::ledger::Record;
use crate::scope::TenantScope;
use crate::tenant::TenantId;

/// The items.
#[derive(Clone, Debug)]
pub struct IssuerStore(Table);

/// Whose tokens of one provenance are.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Claim {
    /// The tenant. It stays so when the issuer is removed: tokens that are still about must not become
    /// somebody else's.
    pub(super) holder: TenantId,
    /// The issuer's record, while there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) issuer_id: Option<IssuerId>,
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
        // More than there may be: of two who register at the same time, neither knows of the other.
        let limit = i32::try_from(2 * MOST_ISSUERS).unwrap_or(i32::MAX);
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
    /// result for repeats: all or none.
    ///
    /// # Errors
    /// If the table does not answer; then the issuer may be there or not.
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
        let holder = issuer.tenant_id.clone();
        let held = Claim { holder, issuer_id: Some(issuer.issuer_id.clone()) };
        let mut claim = self.0.plain_item(&held)?;
        claim.extend(claim_key(issuer.provenance()));
        let claim = Put::builder()
            .table_name(&self.0.name)
            .set_item(Some(claim))
            .condition_expression(
                "attribute_not_exists(#p) OR (holder = :t AND attribute_not_exists(issuer_id))",
            )
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_values(":t", AttributeValue::S(issuer.tenant_id.to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let tenant_id = &issuer.tenant_id;
        let note = Put::builder()
            .table_name(&self.0.name)
            .set_item(Some(self.0.item(&Note { tenant_id }, &item_key::claim_note(issuer.provenance()))?))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let mut parts = vec![
            TransactWriteItem::builder().put(claim).build(),
            // What is handed on is what the key may do now.
            self.0.at_epoch_part(&issuer.tenant_id, scope.epoch())?,
            self.0.put_new(self.0.item(issuer, &item_key::issuer(&issuer.issuer_id))?)?,
            TransactWriteItem::builder().put(note).build(),
            ledger.event_part(record)?,
        ];
        if let Some((store, finished)) = finished {
            parts.push(store.finished_part(scope, &finished)?);
        }
        match self.0.transact(&issuer.tenant_id, parts).await {
            Ok(()) => Ok(Registered::Yes),
            Err(Cancelled::Conditions(found)) => Ok(match found.get(1) {
                Some(Some(_)) => Registered::Stale,
                _ => Registered::Taken,
            }),
            Err(Cancelled::Failed(error)) => Err(error),
        }
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
}
