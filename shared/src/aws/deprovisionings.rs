//! Deprovisionings: items of table `tenants`, each beside its tenant's record, which it outlives. Those that
//! are not over are listed in a partition of their own, so that they are found without a search; the
//! table's stream brings each new entry of that list to the eraser at once.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::{AttributeValue, Delete, Put, TransactWriteItem};
use serde::{Deserialize, Serialize};

use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Item, StoreError, Table};
use crate::clock::Timestamp;
use crate::deprovisioning::{DeprovisioningId, Saga, Tombstone};
use crate::item_key::{self, PARTITION, SORT};
use crate::ledger::Record;
use crate::scope::{Bookkeeper, Erasure, Operator, Subject};
use crate::tenant::{Tenant, TenantId, TenantStatus};

/// How long whoever is at work on a deprovisioning is believed to be, since it last wrote to it. Every call
/// in between is shorter.
const HELD_S: i64 = 30;

/// The items.
#[derive(Clone, Debug)]
pub struct Deprovisionings(Table);

/// A deprovisioning that is at work, and nobody else's meanwhile.
#[derive(Debug)]
pub struct Hold {
    /// It.
    pub saga: Saga,
    erasure: Erasure,
}

impl Hold {
    /// The right to delete what its tenant has.
    pub const fn erasure(&self) -> &Erasure {
        &self.erasure
    }

    /// Whether it is still certain that nobody else has taken it.
    pub const fn holds(&self, now: Timestamp) -> bool {
        now.as_seconds() < self.saga.held_until_s
    }

    /// Whether it is time to say that it is still at work.
    pub const fn is_due(&self, now: Timestamp) -> bool {
        self.saga.held_until_s - now.as_seconds() < HELD_S / 2
    }
}

/// An entry of the list of those that are not over.
#[derive(Serialize, Deserialize)]
struct Open {
    id: DeprovisioningId,
}

impl Deprovisionings {
    /// In the table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// Begins to delete a tenant that was read as `was`: its record says so from now on, an epoch later, and
    /// the ledger says who wanted it. Brings the new record.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the tenant is gone, has changed since it was read, or is being deleted.
    pub async fn start(
        &self,
        _operator: &Operator,
        was: &Tenant,
        saga: &Saga,
        (ledger, record): (&Ledger, &Record),
    ) -> Result<(), StoreError> {
        let now = Tenant { status: TenantStatus::Deprovisioning, epoch: saga.epoch, ..was.clone() };
        if now.epoch != was.epoch + 1 || was.status == TenantStatus::Deprovisioning {
            return Err(StoreError::Conflict);
        }
        let disable = self.replacing(self.0.item(&now, item_key::TENANT)?, was.epoch)?;
        let mut open = self.0.plain_item(&Open { id: saga.id.clone() })?;
        open.extend(Self::open_key(&saga.tenant_id));
        let parts = vec![
            disable,
            self.0.put_new(self.item(saga)?)?,
            self.0.put_new(open)?,
            ledger.event_part(record)?,
        ];
        self.transact(&saga.tenant_id, parts).await
    }

    /// The deprovisioning of a tenant that is not over, if there is one.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn open_of(
        &self,
        _operator: &Operator,
        tenant: &TenantId,
    ) -> Result<Option<DeprovisioningId>, StoreError> {
        let answer = self
            .0
            .own_client()
            .get_item()
            .table_name(&self.0.name)
            .set_key(Some(Self::open_key(tenant)))
            .consistent_read(true)
            .send()
            .await
            .map_err(|e| self.0.failed(e))?;
        let open: Option<Open> = answer.item.map(|item| self.0.record(item)).transpose()?;
        Ok(open.map(|open| open.id))
    }

    /// A deprovisioning.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn get(&self, _operator: &Operator, id: &DeprovisioningId) -> Result<Option<Saga>, StoreError> {
        self.0.get(id.tenant_id(), &item_key::deprovisioning(id)).await
    }

    /// A page of those that are not over, and the tenant to go on after if there are more.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn open(
        &self,
        _bookkeeper: &Bookkeeper,
        after: Option<TenantId>,
    ) -> Result<(Vec<DeprovisioningId>, Option<TenantId>), StoreError> {
        let answer = self
            .0
            .own_client()
            .query()
            .table_name(&self.0.name)
            .key_condition_expression("#p = :p")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_values(":p", AttributeValue::S(item_key::OPEN_DEPROVISIONINGS.to_owned()))
            .set_exclusive_start_key(after.as_ref().map(Self::open_key))
            .consistent_read(true)
            .send()
            .await
            .map_err(|e| self.0.failed(e))?;
        let next = answer.last_evaluated_key.and_then(|key| key.get(SORT)?.as_s().ok()?.parse().ok());
        let open = answer.items.unwrap_or_default().into_iter();
        let ids = open.map(|item| self.0.record::<Open>(item).map(|open| open.id));
        Ok((ids.collect::<Result<_, _>>()?, next))
    }

    /// Takes a deprovisioning to work on it; none if somebody is at it, or it is over.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn take(
        &self,
        _bookkeeper: &Bookkeeper,
        id: &DeprovisioningId,
        now: Timestamp,
    ) -> Result<Option<Hold>, StoreError> {
        let saga: Option<Saga> = self.0.get(id.tenant_id(), &item_key::deprovisioning(id)).await?;
        let Some(saga) = saga.filter(|saga| !saga.closed && saga.held_until_s <= now.as_seconds()) else {
            return Ok(None);
        };
        let erasure = Erasure::of(&saga);
        let mut hold = Hold { saga, erasure };
        match self.save(&mut hold, now).await {
            Ok(()) => Ok(Some(hold)),
            Err(StoreError::Conflict) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes down how far a deprovisioning has come, and that it is still at work.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if somebody else has taken it meanwhile. Otherwise if the table does not
    /// answer; then it may be written, and has to be taken anew.
    pub async fn save(&self, hold: &mut Hold, now: Timestamp) -> Result<(), StoreError> {
        self.write(hold, now.as_seconds() + HELD_S).await
    }

    /// Writes down how far it has come, and leaves it to whoever comes next.
    ///
    /// # Errors
    /// As [`Deprovisionings::save`].
    pub async fn leave(&self, mut hold: Hold) -> Result<(), StoreError> {
        self.write(&mut hold, 0).await
    }

    async fn write(&self, hold: &mut Hold, held_until_s: i64) -> Result<(), StoreError> {
        let saga = Saga { held_until_s, revision: hold.saga.revision + 1, ..hold.saga.clone() };
        let was = hold.saga.revision;
        let put = self
            .0
            .own_client()
            .put_item()
            .table_name(&self.0.name)
            .set_item(Some(self.item(&saga)?))
            .condition_expression("#r = :r")
            .expression_attribute_names("#r", "revision")
            .expression_attribute_values(":r", AttributeValue::N(was.to_string()));
        put.send().await.map_err(|e| self.0.failed(e))?;
        hold.saga = saga;
        Ok(())
    }

    /// The epoch of a tenant's record as it is now: somebody who had been let in before may have raised it
    /// since.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if there is no record; otherwise if the table does not answer.
    pub async fn present_epoch(&self, erasure: &Erasure) -> Result<u64, StoreError> {
        #[derive(Deserialize)]
        struct Present {
            epoch: u64,
        }
        let present: Option<Present> = self.0.get(erasure.tenant_id(), item_key::TENANT).await?;
        present.map(|present| present.epoch).ok_or_else(|| self.0.missing())
    }

    /// Puts the tombstone in the place of the tenant's record, which has to be of the tombstone's epoch, and
    /// the receipt into the deprovisioning, as `concluded` has it, and, as the tenant's last record, into the
    /// ledger: all or nothing.
    ///
    /// # Errors
    /// As [`Deprovisionings::save`]; then what is held is as it was.
    pub async fn conclude(
        &self,
        hold: &mut Hold,
        concluded: Saga,
        tombstone: &Tombstone,
        (ledger, record): (&Ledger, &Record),
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let was = hold.saga.revision;
        let held_until_s = now.as_seconds() + HELD_S;
        let saga = Saga { held_until_s, revision: was + 1, ..concluded };
        let put = self.put_where(self.item(&saga)?, "revision", was)?;
        let bury = self.replacing(self.0.item(tombstone, item_key::TENANT)?, tombstone.last_epoch)?;
        self.transact(&saga.tenant_id, vec![put, bury, ledger.event_part(record)?]).await?;
        hold.saga = saga;
        Ok(())
    }

    /// Ends a deprovisioning: nothing is left to do, not even to look once more.
    ///
    /// # Errors
    /// As [`Deprovisionings::save`].
    pub async fn close(&self, hold: Hold) -> Result<(), StoreError> {
        let was = hold.saga.revision;
        let saga = Saga { closed: true, held_until_s: 0, revision: was + 1, ..hold.saga };
        let put = self.put_where(self.item(&saga)?, "revision", was)?;
        let delete = Delete::builder()
            .table_name(&self.0.name)
            .set_key(Some(Self::open_key(&saga.tenant_id)))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        self.transact(&saga.tenant_id, vec![put, TransactWriteItem::builder().delete(delete).build()]).await
    }

    fn item(&self, saga: &Saga) -> Result<Item, StoreError> {
        self.0.item(saga, &item_key::deprovisioning(&saga.id))
    }

    /// The part of a transaction that puts a tenant's record in the place of that of epoch `was`.
    fn replacing(&self, item: Item, was: u64) -> Result<TransactWriteItem, StoreError> {
        self.put_where(item, "epoch", was)
    }

    fn put_where(&self, item: Item, attribute: &str, is: u64) -> Result<TransactWriteItem, StoreError> {
        let put = Put::builder()
            .table_name(&self.0.name)
            .set_item(Some(item))
            .condition_expression("#a = :a")
            .expression_attribute_names("#a", attribute)
            .expression_attribute_values(":a", AttributeValue::N(is.to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        Ok(TransactWriteItem::builder().put(put).build())
    }

    async fn transact(&self, tenant: &TenantId, parts: Vec<TransactWriteItem>) -> Result<(), StoreError> {
        // Somebody who had been let in before may be writing to the tenant's record.
        match self.0.transact_among_others(tenant, parts).await {
            Ok(()) => Ok(()),
            Err(Cancelled::Conditions(_)) => Err(StoreError::Conflict),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    fn open_key(tenant: &TenantId) -> Item {
        HashMap::from([
            (PARTITION.to_owned(), AttributeValue::S(item_key::OPEN_DEPROVISIONINGS.to_owned())),
            (SORT.to_owned(), AttributeValue::S(tenant.to_string())),
        ])
    }
}
