//! What a tenant has in the tables, to be counted and deleted: by whoever holds its deprovisioning, and, as
//! far as it is past its retention, by whoever looks after that.

use std::collections::HashMap;

use aws_sdk_dynamodb::types::{AttributeValue, Delete, TransactWriteItem};

use super::documents::{failing, transact_with_fewer};
use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Item, Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::deprovisioning::{Counts, Store};
use crate::ids::DocumentId;
use crate::item_key::{self, PARTITION, SORT};
use crate::ledger::Record;
use crate::meter::Ticket;
use crate::scope::{Erasure, Expired, Operator, Subject};
use crate::tenant::TenantId;
use crate::upload::Upload;

/// The tables that hold something of a tenant which ends with it.
#[derive(Clone, Debug)]
pub struct TenantItems {
    tenants: Table,
    meters: Table,
    conversations: Table,
    documents: Table,
    webhooks: Table,
    bills: Table,
}

/// The names of the tables.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "each is the name of the table of that name")]
pub struct Names {
    pub tenants: String,
    pub meters: String,
    pub conversations: String,
    pub documents: String,
    pub webhooks: String,
    pub usage: String,
}

/// The most documents that are deleted, and named by one record, at once.
pub const MOST_AT_ONCE: usize = 50;

/// The kinds of items in table `conversations`.
const CONVERSATIONS: [Store; 4] =
    [Store::Conversations, Store::Turns, Store::Answers, Store::IdempotencyRecords];

/// Where to go on deleting.
#[derive(Clone, Debug, Default)]
pub struct Onward(Option<String>);

impl TenantItems {
    /// In these tables.
    pub fn new(access: &Access, names: Names) -> Self {
        let table = |name| Table::new(access, name);
        Self {
            tenants: table(names.tenants),
            meters: table(names.meters),
            conversations: table(names.conversations),
            documents: table(names.documents),
            webhooks: table(names.webhooks),
            bills: table(names.usage),
        }
    }

    /// What there is of the items of one kind. Partitions are looked at as a whole: whatever is in them and
    /// has no kind of its own counts with the last.
    const fn partition(&self, store: Store) -> Option<(&Table, &'static [Store])> {
        match store {
            Store::Conversations | Store::Turns | Store::Answers | Store::IdempotencyRecords => {
                Some((&self.conversations, &CONVERSATIONS))
            }
            Store::Documents => Some((&self.documents, &[Store::Documents])),
            Store::Webhooks => Some((&self.webhooks, &[Store::Webhooks])),
            Store::Keys | Store::Issuers | Store::Settings => {
                Some((&self.tenants, &[Store::Keys, Store::Issuers, Store::Settings]))
            }
            _ => None,
        }
    }

    /// Counts a page of what a tenant has in the table of `store`, all kinds of it, by a consistent read.
    /// Brings where to go on, if there may be more.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn count(
        &self,
        erasure: &Erasure,
        store: Store,
        from: Onward,
    ) -> Result<(Counts, Option<Onward>), StoreError> {
        let tenant = erasure.tenant_id();
        if store == Store::Meters {
            return Ok((Counts::from([(store, u64::from(self.meter(tenant).await?.is_some()))]), None));
        }
        let Some((table, kinds)) = self.partition(store) else { return Ok((Counts::new(), None)) };
        let mut counts: Counts = kinds.iter().map(|kind| (*kind, 0)).collect();
        let (sorts, next) = table.keys(tenant, "", from.0).await?;
        // How many documents there are is none itself; it is written with one alone, and deleted with them.
        let counted = |sort: &&String| ends_with_the_tenant(sort) && *sort != item_key::DOCUMENT_COUNT;
        for sort in sorts.iter().filter(counted) {
            *counts.entry(kind(kinds, sort)).or_default() += 1;
        }
        Ok((counts, next.map(|sort| Onward(Some(sort)))))
    }

    /// Deletes a page of what a tenant has in the table of `store`, all kinds of it. Brings where to go on, if
    /// there may be more.
    ///
    /// # Errors
    /// If the table does not answer; what was deleted until then stays so.
    pub async fn delete(
        &self,
        erasure: &Erasure,
        store: Store,
        from: Onward,
    ) -> Result<Option<Onward>, StoreError> {
        let tenant = erasure.tenant_id();
        let Some((table, _)) = self.partition(store) else { return Ok(None) };
        let (mut sorts, next) = table.keys(tenant, "", from.0).await?;
        sorts.retain(|sort| ends_with_the_tenant(sort));
        // A claim is in no tenant's partition, and is found by its note there: so it goes first.
        if store == Store::Keys {
            for digest in sorts.iter().filter_map(|sort| sort.strip_prefix(item_key::CLAIMS)) {
                self.delete_claim(tenant, digest).await?;
            }
        }
        table.delete_all(tenant, &sorts).await?;
        Ok(next.map(|sort| Onward(Some(sort))))
    }

    /// Deletes the claim that a note is of, if it is still this tenant's.
    async fn delete_claim(&self, tenant: &TenantId, digest: &str) -> Result<(), StoreError> {
        let key: Item = HashMap::from([
            (PARTITION.to_owned(), AttributeValue::S(format!("{}{digest}", item_key::ISSUER_CLAIMS))),
            (SORT.to_owned(), AttributeValue::S(item_key::ISSUER_CLAIM.to_owned())),
        ]);
        let delete = self
            .tenants
            .own_client()
            .delete_item()
            .table_name(&self.tenants.name)
            .set_key(Some(key))
            .condition_expression("#h = :t")
            .expression_attribute_names("#h", item_key::CLAIM_HOLDER)
            .expression_attribute_values(":t", AttributeValue::S(tenant.to_string()));
        match delete.send().await.map_err(|e| self.tenants.failed(e)) {
            // It is not there, or another's.
            Ok(_) | Err(StoreError::Conflict) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn meter(&self, tenant: &TenantId) -> Result<Option<Item>, StoreError> {
        let call = self.meters.client(tenant).get_item().table_name(&self.meters.name);
        let call = call.set_key(Some(Self::meter_key(tenant))).consistent_read(true);
        Ok(call.send().await.map_err(|e| self.meters.failed(e))?.item)
    }

    fn meter_key(tenant: &TenantId) -> Item {
        HashMap::from([(PARTITION.to_owned(), AttributeValue::S(tenant.to_string()))])
    }

    /// The last ticket that a tenant's meter gave, if there is a meter.
    ///
    /// # Errors
    /// If the table does not answer or the meter does not parse.
    pub async fn last_ticket(&self, erasure: &Erasure) -> Result<Option<Ticket>, StoreError> {
        let meter = self.meter(erasure.tenant_id()).await?;
        let meter: Option<crate::meter::Meter> = meter.map(|item| self.meters.record(item)).transpose()?;
        Ok(meter.map(|meter| Ticket(meter.seq)))
    }

    /// Deletes a tenant's meter, which gives no more tickets and waits for none.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if it still does either. Otherwise if the table does not answer.
    pub async fn delete_meter(&self, erasure: &Erasure) -> Result<(), StoreError> {
        let delete = self
            .meters
            .client(erasure.tenant_id())
            .delete_item()
            .table_name(&self.meters.name)
            .set_key(Some(Self::meter_key(erasure.tenant_id())))
            .condition_expression("attribute_not_exists(#p) OR (#s = :gone AND size(#l) = :none)")
            .expression_attribute_names("#p", PARTITION)
            .expression_attribute_names("#s", "status")
            .expression_attribute_names("#l", "leases")
            .expression_attribute_values(":gone", AttributeValue::S("deprovisioning".to_owned()))
            .expression_attribute_values(":none", AttributeValue::N("0".to_owned()));
        delete.send().await.map_err(|e| self.meters.failed(e))?;
        Ok(())
    }

    /// Lets the table forget a tenant's bills, and where its audit log ends, at `expires_at_s`. Says how many
    /// lines the bills have.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn expire_bills(&self, erasure: &Erasure, expires_at_s: i64) -> Result<u64, StoreError> {
        let (mut lines, mut after) = (0, None);
        loop {
            let (sorts, next) = self.bills.keys(erasure.tenant_id(), "", after).await?;
            for sort in &sorts {
                let update = self
                    .bills
                    .client(erasure.tenant_id())
                    .update_item()
                    .table_name(&self.bills.name)
                    .set_key(Some(Table::key(erasure.tenant_id(), sort)))
                    .update_expression("SET #e = :e")
                    .expression_attribute_names("#e", "expires_at_s")
                    .expression_attribute_values(":e", AttributeValue::N(expires_at_s.to_string()));
                update.send().await.map_err(|e| self.bills.failed(e))?;
                lines += u64::from(sort.starts_with(item_key::USAGE));
            }
            after = next;
            if after.is_none() {
                return Ok(lines);
            }
        }
    }

    /// A page of the documents that are past their retention, and where to go on. One that does not say how
    /// old it is is an alarm, and hinders no other.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn expired_documents(
        &self,
        expired: &Expired,
        from: Onward,
    ) -> Result<(Vec<DocumentId>, Option<Onward>), StoreError> {
        let page = Page { prefix: item_key::DOCUMENTS, newest_first: false, limit: 500, after: from.0 };
        let (old, next) = self.documents.older(expired, page, "updated_at").await?;
        let ids = old.iter().filter_map(|sort| sort.strip_prefix(item_key::DOCUMENTS)?.parse().ok());
        Ok((ids.collect(), next.map(|sort| Onward(Some(sort)))))
    }

    /// Deletes documents that are past their retention, at most [`MOST_AT_ONCE`], and enters the record of
    /// that into the ledger: all of it or nothing. Says whether it did; if not, one of them is gone or was
    /// stored anew meanwhile.
    ///
    /// # Errors
    /// If a table does not answer; then it may be done.
    pub async fn delete_expired_documents(
        &self,
        expired: &Expired,
        documents: &[DocumentId],
        (ledger, record): (&Ledger, &Record),
    ) -> Result<bool, StoreError> {
        let mut parts = vec![ledger.event_part(record)?];
        for id in documents {
            let until = AttributeValue::N(expired.until().as_millis().to_string());
            let delete = Delete::builder()
                .table_name(&self.documents.name)
                .set_key(Some(Table::key(expired.tenant_id(), &item_key::document(id))))
                .condition_expression("#u <= :until")
                .expression_attribute_names("#u", "updated_at")
                .expression_attribute_values(":until", until)
                .build()
                .map_err(|e| self.documents.corrupt(e))?;
            parts.push(TransactWriteItem::builder().delete(delete).build());
        }
        match transact_with_fewer(&self.documents, expired.tenant_id(), documents.len(), parts).await {
            Ok(()) => Ok(true),
            Err(Cancelled::Conditions(_)) => Ok(false),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    /// Forgets a document that awaits an upload which was never made, if it has no other content, and enters the
    /// record of that into the ledger: both or neither. Says whether it did.
    ///
    /// # Errors
    /// If a table does not answer; then it may be done.
    pub async fn delete_unmade(
        &self,
        expired: &Expired,
        upload: &Upload,
        (ledger, record): (&Ledger, &Record),
    ) -> Result<bool, StoreError> {
        let delete = Delete::builder()
            .table_name(&self.documents.name)
            .set_key(Some(Table::key(expired.tenant_id(), &item_key::document(&upload.document_id))))
            // What is found in an earlier edition is not forgotten with a file that never came.
            .condition_expression("#s = :pending AND #u.#i = :id AND attribute_not_exists(#c)")
            .expression_attribute_names("#c", "current")
            .expression_attribute_names("#s", "status")
            .expression_attribute_names("#u", "upload")
            .expression_attribute_names("#i", "upload_id")
            .expression_attribute_values(":pending", AttributeValue::S("pending".to_owned()))
            .expression_attribute_values(":id", AttributeValue::S(upload.upload_id.to_string()))
            .build()
            .map_err(|e| self.documents.corrupt(e))?;
        let parts = vec![TransactWriteItem::builder().delete(delete).build(), ledger.event_part(record)?];
        match transact_with_fewer(&self.documents, expired.tenant_id(), 1, parts).await {
            Ok(()) => Ok(true),
            Err(Cancelled::Conditions(_)) => Ok(false),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    /// Lets a document fail whose file came and was never read, if it still awaits that. Says whether it did.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn fail_unread(
        &self,
        expired: &Expired,
        upload: &Upload,
        reason: &str,
    ) -> Result<bool, StoreError> {
        let text = |text: &str| AttributeValue::S(text.to_owned());
        let update = failing(&self.documents, expired, &upload.document_id, reason.to_owned())
            .condition_expression("#u.#i = :id AND (#u.#t = :false OR #s = :pending OR #s = :processing)")
            .expression_attribute_names("#i", "upload_id")
            .expression_attribute_values(":pending", text("pending"))
            .expression_attribute_values(":processing", text("processing"))
            .expression_attribute_values(":id", text(upload.upload_id.as_str()))
            .expression_attribute_values(":false", AttributeValue::Bool(false));
        match update.send().await.map_err(|e| self.documents.failed(e)) {
            Ok(_) => Ok(true),
            Err(StoreError::Conflict) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes the turns of a page that are past their retention. Brings how many, and where to go on.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn delete_expired_turns(
        &self,
        expired: &Expired,
        from: Onward,
    ) -> Result<(u64, Option<Onward>), StoreError> {
        self.delete_expired(expired, item_key::TURNS, "asked_at", from).await
    }

    /// As [`TenantItems::delete_expired_turns`], of conversations as they are listed.
    ///
    /// # Errors
    /// As there.
    pub async fn delete_expired_conversations(
        &self,
        expired: &Expired,
        from: Onward,
    ) -> Result<(u64, Option<Onward>), StoreError> {
        self.delete_expired(expired, item_key::CONVERSATIONS, "updated_at", from).await
    }

    /// As [`TenantItems::delete_expired_turns`], of what is kept of answers by their ids.
    ///
    /// # Errors
    /// As there.
    pub async fn delete_expired_answers(
        &self,
        expired: &Expired,
        from: Onward,
    ) -> Result<(u64, Option<Onward>), StoreError> {
        self.delete_expired(expired, item_key::ANSWERS, "asked_at", from).await
    }

    /// Deletes the items of a page of table `conversations` whose time, in attribute `at`, is past the
    /// retention.
    async fn delete_expired(
        &self,
        expired: &Expired,
        prefix: &str,
        at: &str,
        from: Onward,
    ) -> Result<(u64, Option<Onward>), StoreError> {
        let page = Page { prefix, newest_first: false, limit: 500, after: from.0 };
        let (old, next) = self.conversations.older(expired, page, at).await?;
        self.conversations.delete_all(expired.tenant_id(), &old).await?;
        Ok((old.len() as u64, next.map(|sort| Onward(Some(sort)))))
    }
}

impl Table {
    /// Of a page of a tenant's items, the sort keys of those whose time, in attribute `at`, is past their
    /// retention; and where to go on. Nothing else of the items is brought.
    async fn older(
        &self,
        expired: &Expired,
        page: Page<'_>,
        at: &str,
    ) -> Result<(Vec<String>, Option<String>), StoreError> {
        let mut old = Vec::new();
        let (items, next) = self.projected(expired, page, at).await?;
        for item in items {
            let sort = item.get(SORT).and_then(|sort| sort.as_s().ok());
            let time = item.get(at).and_then(|at| at.as_n().ok()?.parse().ok());
            match (sort, time) {
                (Some(sort), Some(ms)) if Timestamp::from_millis(ms) <= expired.until() => {
                    old.push(sort.clone());
                }
                (Some(_), Some(_)) => {}
                _ => tracing::error!(
                    alert = "record_unread",
                    tenant.id = %expired.tenant_id(),
                    table = self.name,
                    "An item does not say how old it is, and is never past its retention"
                ),
            }
        }
        Ok((old, next))
    }
}

/// What is kept of tenants that are deleted.
#[derive(Clone, Debug)]
pub struct KeptRecords {
    ledger: Table,
    bills: Table,
}

impl KeptRecords {
    /// In the tables of those names.
    pub fn new(access: &Access, ledger: String, bills: String) -> Self {
        Self { ledger: Table::new(access, ledger), bills: Table::new(access, bills) }
    }

    /// Whether anything is kept under a tenant's id.
    ///
    /// # Errors
    /// If a table does not answer.
    pub async fn any(&self, _operator: &Operator, tenant: &TenantId) -> Result<bool, StoreError> {
        let (records, _) = self.ledger.keys(tenant, "", None).await?;
        let (lines, _) = self.bills.keys(tenant, "", None).await?;
        Ok(!records.is_empty() || !lines.is_empty())
    }
}

/// Whether an item ends with its tenant. The tenant's record and its deprovisionings do not: the one becomes
/// the tombstone, the others say how.
fn ends_with_the_tenant(sort: &str) -> bool {
    sort != item_key::TENANT && !sort.starts_with(item_key::DEPROVISIONINGS)
}

/// Of these kinds of items, the one that is kept under that sort key.
fn kind(kinds: &[Store], sort: &str) -> Store {
    let starts = |kind: Store| match kind {
        Store::Conversations => sort.starts_with(item_key::CONVERSATIONS),
        Store::Turns => sort.starts_with(item_key::TURNS),
        Store::Answers => sort.starts_with(item_key::ANSWERS),
        Store::Keys => sort.starts_with(item_key::API_KEYS),
        Store::Issuers => sort.starts_with(item_key::ISSUERS) || sort.starts_with(item_key::CLAIMS),
        _ => true,
    };
    kinds.iter().copied().find(|kind| starts(*kind)).unwrap_or(Store::Settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_in_a_partition_has_a_kind() {
        let tenants = [Store::Keys, Store::Issuers, Store::Settings];
        for (sort, expected) in [
            ("KEY#abc", Store::Keys),
            ("ISSUER#x", Store::Issuers),
            ("CLAIM#x", Store::Issuers),
            ("CLAIM", Store::Settings),
            ("WEBHOOK", Store::Settings),
            ("KEYS", Store::Settings),
        ] {
            assert_eq!(kind(&tenants, sort), expected);
            assert!(ends_with_the_tenant(sort));
        }
        assert_eq!(kind(&CONVERSATIONS, "LIST#x#1#y"), Store::Conversations);
        assert_eq!(kind(&CONVERSATIONS, "CONV#x#1#y"), Store::Turns);
        assert_eq!(kind(&CONVERSATIONS, "ANSWER#x"), Store::Answers);
        assert_eq!(kind(&CONVERSATIONS, "IDEM#x"), Store::IdempotencyRecords);
        assert!(!ends_with_the_tenant("CONFIG") && !ends_with_the_tenant("DEPROVISIONING#x"));
    }
}
