//! Table `tenants`: who a tenant is, and its keys.

use aws_sdk_dynamodb::types::{AttributeValue, Put, TransactWriteItem};

use super::ledger::Ledger;
use super::meters::MeterStore;
use super::session::Access;
use super::table::{Cancelled, Item, StoreError, Table};
use crate::api_key::{ApiKey, KeyRecord};
use crate::item_key;
use crate::ledger::Record;
use crate::meter::Meter;
use crate::scope::{Operator, Ward};
use crate::tenant::{Tenant, TenantId};

/// The table. Tenants themselves have no access to it: only the authorizer, which looks up what a
/// presented key names, and the control plane.
#[derive(Clone, Debug)]
pub struct TenantStore(Table);

/// What a presented key names: nothing of it is proven until it is verified.
#[derive(Debug)]
pub struct Claimed {
    /// The tenant's record.
    pub tenant: Option<Tenant>,
    /// The key's record.
    pub key: Option<KeyRecord>,
}

impl Claimed {
    /// The books of the tenant that the key names, if there is one: a key that turns out not to be
    /// valid is written down there.
    pub fn ward(&self) -> Option<Ward> {
        self.tenant.as_ref().map(Ward::of)
    }
}

impl TenantStore {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// Reads the two items that a presented key names: the tenant's first, and only then the key's. A
    /// revocation takes the key away and moves the epoch on in one transaction; so a key that is found was
    /// there at the epoch that was read, or later, and a decision about one that is revoked is never of
    /// the epoch that its revocation began.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn claimed_by(&self, presented: &ApiKey) -> Result<Claimed, StoreError> {
        let tenant_id = presented.claimed_tenant();
        let tenant = self.0.get(tenant_id, item_key::TENANT).await?;
        let key = self.0.get(tenant_id, &item_key::api_key(presented.key_id())).await?;
        Ok(Claimed { tenant, key })
    }

    /// Adds a tenant, its first key, its meter and the record that an operator did: all or none.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the tenant exists.
    pub async fn create(
        &self,
        _operator: &Operator,
        tenant: &Tenant,
        key: &KeyRecord,
        (meters, meter): (&MeterStore, &Meter),
        (ledger, record): (&Ledger, &Record),
    ) -> Result<(), StoreError> {
        let parts = vec![
            self.0.put_new(self.0.item(tenant, item_key::TENANT)?)?,
            self.0.put_new(self.0.item(key, &item_key::api_key(&key.key_id))?)?,
            meters.new_part(&tenant.tenant_id, meter)?,
            ledger.event_part(record)?,
        ];
        match self.0.transact(&tenant.tenant_id, parts).await {
            Ok(()) => Ok(()),
            Err(Cancelled::Conditions(_)) => Err(StoreError::Conflict),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    /// Puts a tenant's record in the place of the one that was read as `was`, with the record of who did
    /// it. The new one has to be an epoch later; [`MeterStore::set_standing`] then lets it reach the next
    /// admission.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the tenant is gone or has changed since it was read.
    pub async fn change(
        &self,
        _operator: &Operator,
        was: &Tenant,
        now: &Tenant,
        (ledger, record): (&Ledger, &Record),
    ) -> Result<(), StoreError> {
        if now.tenant_id != was.tenant_id || now.epoch != was.epoch + 1 {
            return Err(StoreError::Conflict);
        }
        let put = Put::builder()
            .table_name(&self.0.name)
            .set_item(Some(self.0.item(now, item_key::TENANT)?))
            .condition_expression("#e = :e")
            .expression_attribute_names("#e", "epoch")
            .expression_attribute_values(":e", AttributeValue::N(was.epoch.to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let parts = vec![TransactWriteItem::builder().put(put).build(), ledger.event_part(record)?];
        match self.0.transact(&now.tenant_id, parts).await {
            Ok(()) => Ok(()),
            Err(Cancelled::Conditions(_)) => Err(StoreError::Conflict),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    /// A tenant's record.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn get(&self, _operator: &Operator, tenant: &TenantId) -> Result<Option<Tenant>, StoreError> {
        self.0.get(tenant, item_key::TENANT).await
    }

    /// A page of all tenants, in no order, and where to go on. The one scan of the system: for
    /// operators alone.
    ///
    /// # Errors
    /// [`StoreError::InvalidCursor`] if `after` is no tenant id; otherwise as [`TenantStore::get`].
    pub async fn list(
        &self,
        _operator: &Operator,
        limit: usize,
        after: Option<&str>,
    ) -> Result<(Vec<Tenant>, Option<TenantId>), StoreError> {
        let mut start: Option<Item> = match after {
            Some(text) => {
                let tenant: TenantId = text.parse().map_err(|_| StoreError::InvalidCursor)?;
                Some(Table::key(&tenant, item_key::TENANT))
            }
            None => None,
        };
        let mut tenants: Vec<Tenant> = Vec::new();
        loop {
            let page = self
                .0
                .own_client()
                .scan()
                .table_name(&self.0.name)
                .filter_expression("#s = :config")
                .expression_attribute_names("#s", item_key::SORT)
                .expression_attribute_values(":config", AttributeValue::S(item_key::TENANT.to_owned()))
                .set_exclusive_start_key(start)
                .send()
                .await
                .map_err(|e| self.0.failed(e))?;
            for item in page.items.unwrap_or_default() {
                tenants.push(self.0.record(item)?);
            }
            start = page.last_evaluated_key;
            if start.is_none() || tenants.len() > limit {
                break;
            }
        }
        let more = tenants.len() > limit;
        tenants.truncate(limit);
        // A scan goes on behind the last one that was answered, wherever its own page ended.
        let next = if more { tenants.last().map(|t| t.tenant_id.clone()) } else { None };
        Ok((tenants, next))
    }
}
