//! Table `tenants`: who a tenant is, and its keys.

use aws_sdk_dynamodb::operation::scan::ScanOutput;
use aws_sdk_dynamodb::types::{AttributeValue, Delete, Put, TransactWriteItem};
use rand::CryptoRng;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::issuers;
use super::ledger::Ledger;
use super::meters::MeterStore;
use super::session::Access;
use super::table::{Cancelled, Item, StoreError, Table};
use crate::api_key::{ApiKey, Grants, KeyRecord};
use crate::clock::Timestamp;
use crate::credential::CredentialId;
use crate::deprovisioning::Tombstone;
use crate::ids::IssuerId;
use crate::issuer::{Issuer, Provenance};
use crate::item_key::{self, PARTITION, SORT};
use crate::ledger::Record;
use crate::meter::Meter;
use crate::placement::Claim;
use crate::random;
use crate::scope::{Bookkeeper, Operator, Subject, Ward};
use crate::tenant::{Tenant, TenantId, TenantStatus};
use crate::upload::{Begun, Upload};

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

/// What stands under [`item_key::TENANT`]: a tenant, or what is left of one.
enum Config {
    Tenant(Box<Tenant>),
    Tombstone(Tombstone),
}

impl Config {
    fn tenant(self) -> Option<Tenant> {
        match self {
            Self::Tenant(tenant) => Some(*tenant),
            Self::Tombstone(_) => None,
        }
    }
}

/// A tenant's record as it is; none if the tenant is gone.
pub(super) async fn present(table: &Table, tenant: &TenantId) -> Result<Option<Tenant>, StoreError> {
    let config: Option<Config> = table.get(tenant, item_key::TENANT).await?;
    Ok(config.and_then(Config::tenant))
}

impl<'de> Deserialize<'de> for Config {
    /// By the one attribute that a tenant never has: so that what does not parse as either says why.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = serde_json::Map::deserialize(deserializer)?;
        let gone = fields.contains_key("deleted_at");
        let fields = serde_json::Value::Object(fields);
        if gone {
            return serde_json::from_value(fields).map(Self::Tombstone).map_err(D::Error::custom);
        }
        let tenant = serde_json::from_value(fields).map_err(D::Error::custom)?;
        Ok(Self::Tenant(Box::new(tenant)))
    }
}

/// Where a list of tenants goes on.
#[derive(Clone, Debug)]
pub struct TenantPlace(Item);

impl TenantPlace {
    /// Somewhere among them: whoever may not come to the end begins elsewhere each time.
    pub fn anywhere(rng: &mut impl CryptoRng) -> Self {
        let text = |text: &str| AttributeValue::S(text.to_owned());
        let somebody = text(&random::base62(8, rng).to_lowercase());
        Self(Item::from([(PARTITION.to_owned(), somebody), (SORT.to_owned(), text(item_key::TENANT))]))
    }
}

impl Claimed {
    /// The books of the tenant that the key names, if there is one: a key that turns out not to be
    /// valid is written down there.
    pub fn ward(&self) -> Option<Ward> {
        self.tenant.as_ref().map(Ward::of)
    }
}

/// What a token's names lead to: nothing of the token is proven until it is verified.
#[derive(Debug)]
pub struct Addressed {
    /// The tenant's record.
    pub tenant: Option<Tenant>,
    /// The issuer's record.
    pub issuer: Option<Issuer>,
    /// The books of other tenants to whose issuers its names lead too, and who have claimed them later.
    pub others: Vec<Ward>,
}

impl Addressed {
    /// The books of the tenant whose issuer the token names, if there is one: a token that turns out not to
    /// be valid is written down there.
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
        let tenant = present(&self.0, tenant_id).await?;
        let key = self.0.get(tenant_id, &item_key::api_key(presented.key_id())).await?;
        Ok(Claimed { tenant, key })
    }

    /// Reads whose tokens of these provenances are, and then what that tenant has on record of the issuer.
    /// Where there are several claims, the earliest that has an issuer decides alone: so nobody can take
    /// tokens away, or spoil them, by a claim that is made later.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn addressed_by(
        &self,
        provenances: &[Provenance<'_>],
    ) -> Result<Option<Addressed>, StoreError> {
        let mut claims = Vec::new();
        for provenance in provenances {
            let Some(found) = issuers::claim(&self.0, *provenance).await? else { continue };
            let Some(issuer_id) = found.issuer_id else { continue };
            claims.push((found.since, issuer_id, found.holder));
        }
        claims.sort();
        let mut claims = claims.into_iter();
        let Some((_, issuer_id, holder)) = claims.next() else { return Ok(None) };
        let (tenant, issuer) = self.trusted(&holder, &issuer_id).await?;
        let mut others: Vec<Ward> = Vec::new();
        for (_, _, other) in claims.filter(|(_, _, other)| *other != holder) {
            let other = present(&self.0, &other).await?.as_ref().map(Ward::of);
            others.extend(other.filter(|other| !others.contains(other)));
        }
        Ok(Some(Addressed { tenant, issuer, others }))
    }

    /// The present records of a request's tenant and of the issuer of its token.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn issued_by(
        &self,
        subject: &impl Subject,
        issuer_id: &IssuerId,
    ) -> Result<(Option<Tenant>, Option<Issuer>), StoreError> {
        self.trusted(subject.tenant_id(), issuer_id).await
    }

    /// Reads the tenant of an upload, and then what the key or issuer that began it may do now; nothing, if it is
    /// not there any more.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn uploader(&self, begun: &Begun) -> Result<(Option<Tenant>, Option<Grants>), StoreError> {
        let Upload { tenant_id, key_id, .. } = begun.upload();
        match key_id {
            CredentialId::Issuer(issuer_id) => {
                let (tenant, issuer) = self.trusted(tenant_id, issuer_id).await?;
                Ok((tenant, issuer.map(|issuer| issuer.grants)))
            }
            CredentialId::Key(key_id) => {
                let tenant = present(&self.0, tenant_id).await?;
                let key: Option<KeyRecord> = self.0.get(tenant_id, &item_key::api_key(key_id)).await?;
                Ok((tenant, key.map(|key| key.grants())))
            }
        }
    }

    /// The tenant first: if the issuer is removed in between, it is not there, or what was read of the tenant
    /// is of an epoch that admits nothing any more.
    async fn trusted(
        &self,
        tenant_id: &TenantId,
        issuer_id: &IssuerId,
    ) -> Result<(Option<Tenant>, Option<Issuer>), StoreError> {
        let tenant = present(&self.0, tenant_id).await?;
        Ok((tenant, self.0.get(tenant_id, &item_key::issuer(issuer_id)).await?))
    }

    /// Adds a tenant, its first key, its meter and the record that an operator did, and ends the claim
    /// under which its collection was made: all or none. `former` is the tombstone of the id, if there is one.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the tenant exists, or the claim is not held any more. Otherwise if the
    /// table does not answer; then it may be done, until [`TenantStore::withdraw`] has ruled that out.
    pub async fn create(
        &self,
        _operator: &Operator,
        claim: &Claim,
        (tenant, former): (&Tenant, Option<&Tombstone>),
        key: &KeyRecord,
        (meters, meter): (&MeterStore, &Meter),
        (ledger, record): (&Ledger, &Record),
    ) -> Result<(), StoreError> {
        let end = Delete::builder()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(&claim.tenant_id, item_key::CLAIM)))
            .condition_expression("#a = :a")
            .expression_attribute_names("#a", "attempt")
            .expression_attribute_values(":a", AttributeValue::S(claim.attempt.clone()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let parts = vec![
            self.record_part(tenant, former)?,
            self.0.put_new(self.0.item(key, &item_key::api_key(&key.key_id))?)?,
            meters.new_part(&tenant.tenant_id, meter)?,
            ledger.event_part(record)?,
            TransactWriteItem::builder().delete(end).build(),
        ];
        self.all(&tenant.tenant_id, parts).await
    }

    /// The part of a transaction that adds a tenant's record: where there is none, or in the place of the
    /// tombstone of the `former` one.
    fn record_part(
        &self,
        tenant: &Tenant,
        former: Option<&Tombstone>,
    ) -> Result<TransactWriteItem, StoreError> {
        let item = self.0.item(tenant, item_key::TENANT)?;
        let Some(former) = former else { return self.0.put_new(item) };
        let put = Put::builder()
            .table_name(&self.0.name)
            .set_item(Some(item))
            .condition_expression("#d = :d")
            .expression_attribute_names("#d", "deprovisioning_id")
            .expression_attribute_values(":d", AttributeValue::S(former.deprovisioning_id.to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        Ok(TransactWriteItem::builder().put(put).build())
    }

    async fn all(&self, tenant: &TenantId, parts: Vec<TransactWriteItem>) -> Result<(), StoreError> {
        match self.0.transact(tenant, parts).await {
            Ok(()) => Ok(()),
            Err(Cancelled::Conditions(_)) => Err(StoreError::Conflict),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    /// Takes the claim to a tenant's collections.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if somebody else holds it.
    pub async fn claim(
        &self,
        _operator: &Operator,
        tenant: &TenantId,
        now: Timestamp,
        rng: &mut impl CryptoRng,
    ) -> Result<Claim, StoreError> {
        let earlier: Option<Claim> = self.0.get(tenant, item_key::CLAIM).await?;
        let claim = Claim::after(earlier.as_ref(), tenant.clone(), now, rng).ok_or(StoreError::Conflict)?;
        self.put_claim(&claim, earlier.as_ref().map(|earlier| earlier.attempt.as_str())).await?;
        Ok(claim)
    }

    /// Writes down that there may be a collection in `cell` too, which is said before it is made.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the claim is not held any more.
    pub async fn claim_cell(&self, claim: &mut Claim, cell: &str) -> Result<(), StoreError> {
        if !claim.cells.insert(cell.to_owned()) {
            return Ok(());
        }
        self.put_claim(claim, Some(&claim.attempt)).await
    }

    /// Makes sure that nothing which was to be written under this claim is written from now on, however
    /// late it arrives. The claim is still held, under another name.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if it is not held any more: then what was to be written is written, or
    /// somebody else holds it.
    pub async fn withdraw(&self, claim: &mut Claim, rng: &mut impl CryptoRng) -> Result<(), StoreError> {
        let renamed = claim.renamed(rng);
        self.put_claim(&renamed, Some(&claim.attempt)).await?;
        *claim = renamed;
        Ok(())
    }

    /// Ends a claim, if it is still held.
    ///
    /// # Errors
    /// If the table does not answer. The claim ends by itself in a while.
    pub async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        let ended = self
            .0
            .client(&claim.tenant_id)
            .delete_item()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(&claim.tenant_id, item_key::CLAIM)))
            .condition_expression("#a = :a")
            .expression_attribute_names("#a", "attempt")
            .expression_attribute_values(":a", AttributeValue::S(claim.attempt.clone()))
            .send()
            .await;
        match ended.map_err(|e| self.0.failed(e)) {
            Ok(_) | Err(StoreError::Conflict) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Puts a claim where there is none, or that of the attempt `before`. Written again because the answer
    /// was lost, it finds itself.
    async fn put_claim(&self, claim: &Claim, before: Option<&str>) -> Result<(), StoreError> {
        let mut put = self
            .0
            .client(&claim.tenant_id)
            .put_item()
            .table_name(&self.0.name)
            .set_item(Some(self.0.item(claim, item_key::CLAIM)?))
            .expression_attribute_names("#a", "attempt")
            .expression_attribute_values(":a", AttributeValue::S(claim.attempt.clone()));
        put = match before {
            Some(before) => put
                .condition_expression("#a = :b OR #a = :a")
                .expression_attribute_values(":b", AttributeValue::S(before.to_owned())),
            None => put
                .condition_expression("attribute_not_exists(#p) OR #a = :a")
                .expression_attribute_names("#p", PARTITION),
        };
        put.send().await.map_err(|e| self.0.failed(e))?;
        Ok(())
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
        let parts = vec![self.changed_part(was, now)?, ledger.event_part(record)?];
        self.all(&now.tenant_id, parts).await
    }

    /// As [`TenantStore::change`], where the collection moves to another cell. The claim under which it
    /// was made there must still be held, and is `left` from then on: under another name, with the cells
    /// that are to be cleared now.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] also if the claim is not held any more. Otherwise if the table does not
    /// answer; then it may be done, until [`TenantStore::withdraw`] has ruled that out.
    pub async fn relocate(
        &self,
        _operator: &Operator,
        claim: &Claim,
        left: &Claim,
        was: &Tenant,
        now: &Tenant,
        (ledger, record): (&Ledger, &Record),
    ) -> Result<(), StoreError> {
        let held = Put::builder()
            .table_name(&self.0.name)
            .set_item(Some(self.0.item(left, item_key::CLAIM)?))
            .condition_expression("#a = :a")
            .expression_attribute_names("#a", "attempt")
            .expression_attribute_values(":a", AttributeValue::S(claim.attempt.clone()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let held = TransactWriteItem::builder().put(held).build();
        self.all(&now.tenant_id, vec![self.changed_part(was, now)?, ledger.event_part(record)?, held]).await
    }

    fn changed_part(&self, was: &Tenant, now: &Tenant) -> Result<TransactWriteItem, StoreError> {
        // One that is being deleted does not come back.
        if now.tenant_id != was.tenant_id
            || now.epoch != was.epoch + 1
            || was.status == TenantStatus::Deprovisioning
        {
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
        Ok(TransactWriteItem::builder().put(put).build())
    }

    /// The record of a tenant whose books are kept.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn of(&self, ward: &Ward) -> Result<Option<Tenant>, StoreError> {
        present(&self.0, ward.tenant_id()).await
    }

    /// A tenant's record.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn get(&self, operator: &Operator, tenant: &TenantId) -> Result<Option<Tenant>, StoreError> {
        Ok(self.config(operator, tenant).await?.and_then(Config::tenant))
    }

    /// What is left of a deleted tenant, if there was one of that id and none is now.
    ///
    /// # Errors
    /// As [`TenantStore::get`].
    pub async fn tombstone(
        &self,
        operator: &Operator,
        tenant: &TenantId,
    ) -> Result<Option<Tombstone>, StoreError> {
        Ok(match self.config(operator, tenant).await? {
            Some(Config::Tombstone(tombstone)) => Some(tombstone),
            _ => None,
        })
    }

    async fn config(&self, operator: &Operator, tenant: &TenantId) -> Result<Option<Config>, StoreError> {
        let item = self.0.item_at(tenant, item_key::TENANT).await?;
        item.map(|item| self.0.own(&operator.ward(tenant.clone()), item)).transpose()
    }

    /// Some of the tenants, and where to go on: for a function that no caller reaches. A record that does
    /// not parse is an alarm, and hides no other.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn page(
        &self,
        _bookkeeper: &Bookkeeper,
        after: Option<TenantPlace>,
    ) -> Result<(Vec<Tenant>, Option<TenantPlace>), StoreError> {
        let page = self.scan(after.map(|place| place.0)).await?;
        let tenants = page.items.unwrap_or_default().into_iter().filter_map(|item| {
            let tenant = self.0.record(item);
            if let Err(error) = &tenant {
                tracing::error!(alert = "record_unread", "A tenant's record cannot be read: {error}");
            }
            tenant.ok()
        });
        Ok((tenants.collect(), page.last_evaluated_key.map(TenantPlace)))
    }

    /// A page of the records of tenants.
    async fn scan(&self, start: Option<Item>) -> Result<ScanOutput, StoreError> {
        self.0
            .own_client()
            .scan()
            .table_name(&self.0.name)
            .filter_expression("#s = :config AND attribute_not_exists(#d)")
            .expression_attribute_names("#s", SORT)
            .expression_attribute_names("#d", "deleted_at")
            .expression_attribute_values(":config", AttributeValue::S(item_key::TENANT.to_owned()))
            .set_exclusive_start_key(start)
            .send()
            .await
            .map_err(|e| self.0.failed(e))
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
            let page = self.scan(start).await?;
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
