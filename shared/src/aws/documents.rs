//! Table `documents`: what a tenant has handed in, and where it stands.

use std::collections::BTreeSet;

use aws_sdk_dynamodb::operation::update_item::builders::UpdateItemFluentBuilder;
use aws_sdk_dynamodb::types::{AttributeValue, Delete, ReturnValue, TransactWriteItem, Update};
use futures_util::{StreamExt, TryStreamExt, stream};
use rand::RngExt;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Item, Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::document::{Awaited, Document, DocumentStatus, Editions};
use crate::error::{ApiError, Code};
use crate::ids::{DocumentId, UploadId};
use crate::item_key;
use crate::ledger::Record;
use crate::random::entropy;
use crate::scope::{Subject, TenantScope};
use crate::sealing::DataKey;
use crate::tenant::TenantId;

/// What of a document's record its tenant's key seals. The passages, which are searched, lie in the tenant's cell.
const TEXT: [&str; 3] = ["title", "source", "metadata"];

/// The attribute of how many documents there are.
const COUNT: &str = "documents";

/// How many records are asked for their editions at once.
const ASKED_AT_ONCE: usize = 16;

/// The table.
#[derive(Clone, Debug)]
pub struct DocumentStore(Table);

/// A document that was taken down, to be deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// What [`DocumentStore::delete`] expects.
    pub at: Timestamp,
    /// The upload that its content comes by, or came by last.
    pub upload: Option<UploadId>,
}

/// What a document's record says to whoever does not have its tenant's key, of where it stands.
#[derive(Clone, Debug, Deserialize)]
pub struct Head {
    tenant_id: TenantId,
    status: DocumentStatus,
    /// When its content last changed.
    pub updated_at: Timestamp,
    /// The upload that its content comes by, or came by last.
    pub upload: Option<Awaited>,
    #[serde(default)]
    revision: u64,
    data_key: Option<IgnoredAny>,
}

impl Head {
    /// Whether what it is called is sealed.
    pub const fn is_sealed(&self) -> bool {
        self.data_key.is_some()
    }

    /// Whether the document waits for that upload, or for what came by it to be stored.
    pub fn awaits(&self, id: &UploadId) -> bool {
        self.upload.as_ref().is_some_and(|awaited| awaited.is_of(id, self.status))
    }
}

/// Why a document's first record was not written.
#[derive(Debug, thiserror::Error)]
pub enum NotCreated {
    /// The tenant has as many documents as it may have.
    #[error("the tenant has as many documents as it may have")]
    Full,
    /// Anything else.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<NotCreated> for ApiError {
    fn from(error: NotCreated) -> Self {
        match error {
            NotCreated::Full => {
                let message = "the tenant has as many documents as max_documents allows; delete some first";
                Self { limit: Some("max_documents"), ..Self::new(Code::Conflict, message) }
            }
            NotCreated::Store(error) => error.into(),
        }
    }
}

/// A record's next revision.
fn revision() -> u64 {
    entropy().random()
}

/// The condition that a record is still of that revision, which is `:expected`, or as it is to be, `:written`: the client
/// repeats a write that was done and not answered. Records of earlier builds have none, which is read as 0.
const fn unchanged(revision: u64) -> &'static str {
    match revision {
        0 => {
            "(attribute_exists(updated_at) AND attribute_not_exists(revision)) OR revision IN (:expected, :written)"
        }
        _ => "revision IN (:expected, :written)",
    }
}

/// A part of a transaction that counts `documents` more, or fewer, of a tenant's.
fn counted(
    table: &Table,
    tenant: &TenantId,
    documents: i64,
    (condition, most): (&str, Option<u64>),
) -> Result<TransactWriteItem, StoreError> {
    let number = |number: String| AttributeValue::N(number);
    let update = Update::builder()
        .table_name(&table.name)
        .set_key(Some(Table::key(tenant, item_key::DOCUMENT_COUNT)))
        .update_expression("ADD #n :documents")
        .condition_expression(condition)
        .expression_attribute_names("#n", COUNT)
        .expression_attribute_values(":documents", number(documents.to_string()));
    let update = match most {
        Some(most) => update.expression_attribute_values(":most", number(most.to_string())),
        None => update,
    };
    Ok(TransactWriteItem::builder().update(update.build().map_err(|e| table.corrupt(e))?).build())
}

/// All of `parts` or none, and with them so many documents fewer. Where there is no count any more, the tenant is being
/// deleted: whoever is still at it does not make one anew, which would outlive the tenant.
pub(super) async fn transact_with_fewer(
    table: &Table,
    tenant: &TenantId,
    documents: usize,
    parts: Vec<TransactWriteItem>,
) -> Result<(), Cancelled> {
    let fewer = i64::try_from(documents).map_or(0, |n| -n);
    let mut all = parts.clone();
    all.push(counted(table, tenant, fewer, ("attribute_exists(#n)", None)).map_err(Cancelled::Failed)?);
    match table.transact_among_others(tenant, all).await {
        Err(Cancelled::Conditions(failed))
            if failed.iter().position(Option::is_some) == Some(parts.len()) =>
        {
            table.transact_among_others(tenant, parts).await
        }
        done => done,
    }
}

/// The update by which a document fails whose upload came to nothing, without the condition on which it does. Its names
/// `#s`, `#u` and `#t` and its value `:written` are there for that.
pub(super) fn failing(
    table: &Table,
    subject: &impl Subject,
    id: &DocumentId,
    reason: String,
) -> UpdateItemFluentBuilder {
    table
        .client(subject.tenant_id())
        .update_item()
        .table_name(&table.name)
        .set_key(Some(Table::key(subject.tenant_id(), &item_key::document(id))))
        .update_expression(
            "SET #s = :failed, #r = :reason, #u.#t = :true, revision = :written REMOVE at_work_until",
        )
        .expression_attribute_names("#s", "status")
        .expression_attribute_names("#r", "reason")
        .expression_attribute_names("#u", "upload")
        .expression_attribute_names("#t", "taken")
        .expression_attribute_values(":failed", AttributeValue::S("failed".to_owned()))
        .expression_attribute_values(":reason", AttributeValue::S(reason))
        .expression_attribute_values(":true", AttributeValue::Bool(true))
        .expression_attribute_values(":written", AttributeValue::N(revision().to_string()))
}

impl DocumentStore {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// A document of the scope's tenant, if it is not past its retention.
    ///
    /// # Errors
    /// As [`DocumentStore::stored`].
    pub async fn get(
        &self,
        scope: &TenantScope,
        id: &DocumentId,
        now: Timestamp,
    ) -> Result<Option<Document>, StoreError> {
        let document = self.stored(scope, id).await?;
        Ok(document.filter(|document| document.is_kept(scope.limits(), now)))
    }

    /// A document of the scope's tenant as it is stored, be it past its retention: for whoever replaces it.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn stored(&self, scope: &TenantScope, id: &DocumentId) -> Result<Option<Document>, StoreError> {
        let item = self.0.item_at(scope.tenant_id(), &item_key::document(id)).await?;
        self.opened(scope, item).await
    }

    async fn opened(&self, scope: &TenantScope, item: Option<Item>) -> Result<Option<Document>, StoreError> {
        let document: Option<Document> = self.0.opened(scope, item.into_iter().collect()).await?.pop();
        Ok(document.filter(|document| scope.owns(document.tenant_id.as_str(), "documents").is_ok()))
    }

    /// As [`DocumentStore::stored`], for whoever lets it await a file. Of one that holds nothing yet nothing stays, what it
    /// is called neither: that is empty then if it is sealed, and takes no key, which may be gone.
    ///
    /// # Errors
    /// As there.
    pub async fn to_await(
        &self,
        scope: &TenantScope,
        id: &DocumentId,
    ) -> Result<Option<Document>, StoreError> {
        let Some(mut item) = self.0.item_at(scope.tenant_id(), &item_key::document(id)).await? else {
            return Ok(None);
        };
        let holds_nothing = item.get("version").is_some_and(|version| version.as_n().is_ok_and(|n| n == "0"));
        if holds_nothing && item.remove(item_key::DATA_KEY).is_some() {
            item.retain(|attribute, _| !TEXT.contains(&attribute.as_str()));
            item.insert("title".to_owned(), AttributeValue::S(String::new()));
        }
        self.opened(scope, Some(item)).await
    }

    /// As [`DocumentStore::stored`], without what may be sealed: it takes no key.
    ///
    /// # Errors
    /// As there.
    pub async fn head(&self, scope: &TenantScope, id: &DocumentId) -> Result<Option<Head>, StoreError> {
        let head: Option<Head> = self.0.get(scope.tenant_id(), &item_key::document(id)).await?;
        Ok(head.filter(|head| scope.owns(head.tenant_id.as_str(), "documents").is_ok()))
    }

    /// Lets a document fail whose upload came to nothing, where it still stands as `expected`. It says so without the
    /// tenant's key: what is sealed of it stays as it is.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if it does not; otherwise if the table does not answer.
    pub async fn fail(
        &self,
        scope: &TenantScope,
        id: &DocumentId,
        expected: &Head,
        reason: String,
    ) -> Result<(), StoreError> {
        let update = failing(&self.0, scope, id, reason)
            .condition_expression(unchanged(expected.revision))
            .expression_attribute_values(":expected", AttributeValue::N(expected.revision.to_string()));
        update.send().await.map_err(|e| self.0.failed(e))?;
        Ok(())
    }

    /// The editions in which searches find these documents: one attribute of each record, and of no other moment.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn editions(
        &self,
        scope: &TenantScope,
        ids: BTreeSet<DocumentId>,
    ) -> Result<Editions, StoreError> {
        #[derive(Deserialize)]
        struct Found {
            tenant_id: TenantId,
            current: Option<Timestamp>,
        }
        let found = stream::iter(ids).map(async |id| {
            let found: Option<Found> = self.0.get(scope.tenant_id(), &item_key::document(&id)).await?;
            let own = found.filter(|found| scope.owns(found.tenant_id.as_str(), "documents").is_ok());
            Ok((id, own.and_then(|found| found.current)))
        });
        found.buffer_unordered(ASKED_AT_ONCE).try_collect().await
    }

    /// Takes a document up for its deletion, which ends by `until`: it is found in no edition from then on, and whoever
    /// is replacing it has lost. Brings what [`DocumentStore::delete`] expects; none if there is no such document, or it
    /// is past its retention.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn take_down(
        &self,
        scope: &TenantScope,
        id: &DocumentId,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Option<Taken>, StoreError> {
        let past = scope.limits().retained_since(now);
        let taken = self
            .0
            .client(scope.tenant_id())
            .update_item()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(scope.tenant_id(), &item_key::document(id))))
            // As `Document::is_kept`: neither past its retention, nor a file that never came.
            .condition_expression(
                "updated_at > :past AND (#s <> :pending OR attribute_exists(#c) OR #w.#e > :now)",
            )
            // Another edition than any that is being written.
            .update_expression(
                "SET updated_at = updated_at + :one, #s = :s, at_work_until = :u, revision = :r REMOVE #c",
            )
            .expression_attribute_values(":u", AttributeValue::N(until.as_millis().to_string()))
            .expression_attribute_values(":r", AttributeValue::N(revision().to_string()))
            .expression_attribute_names("#s", "status")
            .expression_attribute_names("#c", "current")
            .expression_attribute_names("#w", "upload")
            .expression_attribute_names("#e", "until")
            .expression_attribute_values(":s", AttributeValue::S("processing".to_owned()))
            .expression_attribute_values(":pending", AttributeValue::S("pending".to_owned()))
            .expression_attribute_values(":one", AttributeValue::N("1".to_owned()))
            .expression_attribute_values(":now", AttributeValue::N(now.as_millis().to_string()))
            .expression_attribute_values(":past", AttributeValue::N(past.as_millis().to_string()))
            .return_values(ReturnValue::AllNew)
            .send()
            .await;
        let item = match taken.map_err(|e| self.0.failed(e)) {
            Ok(taken) => taken.attributes.unwrap_or_default(),
            Err(StoreError::Conflict) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Head { tenant_id, updated_at, upload, .. } = self.0.record(item)?;
        if scope.owns(tenant_id.as_str(), "documents").is_err() {
            return Ok(None);
        }
        Ok(Some(Taken { at: updated_at, upload: upload.map(|awaited| awaited.upload_id) }))
    }

    /// Writes a document's first record, and counts it: the tenant has no more documents than `max_documents` then,
    /// however many are stored at once. One that is past its retention counts until it is deleted.
    ///
    /// # Errors
    /// [`NotCreated::Full`] if the tenant has so many; [`StoreError::Conflict`] if the document is there; otherwise as
    /// [`DocumentStore::put`].
    pub async fn create(
        &self,
        scope: &TenantScope,
        document: &mut Document,
        seal: Option<&DataKey>,
    ) -> Result<(), NotCreated> {
        document.revision = revision();
        scope.owns(document.tenant_id.as_str(), "documents").map_err(|_| StoreError::Conflict)?;
        let most = scope.limits().max_documents;
        if most == 0 {
            return Err(NotCreated::Full);
        }
        let sort = item_key::document(&document.id);
        let item = self.0.sealed_item(scope, &*document, &sort, &TEXT, seal)?;
        let room = ("attribute_not_exists(#n) OR #n < :most", Some(most));
        let parts = vec![self.0.put_new(item)?, counted(&self.0, scope.tenant_id(), 1, room)?];
        match self.0.transact_among_others(scope.tenant_id(), parts).await {
            Ok(()) => Ok(()),
            Err(Cancelled::Conditions(failed)) if matches!(failed.first(), Some(Some(_))) => {
                Err(StoreError::Conflict.into())
            }
            Err(Cancelled::Conditions(_)) => Err(NotCreated::Full),
            Err(Cancelled::Failed(error)) => Err(error.into()),
        }
    }

    /// Writes a document's record where it is still as `expected`, so that of two writers one learns that it lost;
    /// sealed where the tenant has a key of its own. The document has its new revision then.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if it is not, or if the record is another tenant's; otherwise if the
    /// table does not answer.
    pub async fn put(
        &self,
        scope: &TenantScope,
        document: &mut Document,
        expected: &Document,
        seal: Option<&DataKey>,
    ) -> Result<(), StoreError> {
        document.revision = revision();
        scope.owns(document.tenant_id.as_str(), "documents").map_err(|_| StoreError::Conflict)?;
        let sort = item_key::document(&document.id);
        let put = self
            .0
            .client(scope.tenant_id())
            .put_item()
            .table_name(&self.0.name)
            .set_item(Some(self.0.sealed_item(scope, &*document, &sort, &TEXT, seal)?))
            .condition_expression(unchanged(expected.revision))
            .expression_attribute_values(":expected", AttributeValue::N(expected.revision.to_string()))
            .expression_attribute_values(":written", AttributeValue::N(document.revision.to_string()));
        put.send().await.map_err(|e| self.0.failed(e))?;
        Ok(())
    }

    /// Forgets a document that was `taken` down, with the record that says so. One that is not there any more is
    /// none's to forget, and nothing is recorded.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if somebody stored it anew meanwhile, or it is gone; otherwise if the table does not
    /// answer.
    pub async fn delete(
        &self,
        scope: &TenantScope,
        id: &DocumentId,
        taken: Timestamp,
        ledger: &Ledger,
        record: &Record,
    ) -> Result<(), StoreError> {
        let delete = Delete::builder()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(scope.tenant_id(), &item_key::document(id))))
            .condition_expression("updated_at = :taken")
            .expression_attribute_values(":taken", AttributeValue::N(taken.as_millis().to_string()))
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let parts = vec![TransactWriteItem::builder().delete(delete).build(), ledger.event_part(record)?];
        match transact_with_fewer(&self.0, scope.tenant_id(), 1, parts).await {
            Ok(()) => Ok(()),
            Err(Cancelled::Conditions(_)) => Err(StoreError::Conflict),
            Err(Cancelled::Failed(error)) => Err(error),
        }
    }

    /// A page of the tenant's documents by id, without those past their retention, and the id to go on
    /// after if there are more.
    ///
    /// # Errors
    /// [`StoreError::InvalidCursor`] if `after` is no document id; otherwise as [`DocumentStore::stored`].
    pub async fn list(
        &self,
        scope: &TenantScope,
        limit: u16,
        after: Option<&str>,
        now: Timestamp,
    ) -> Result<(Vec<Document>, Option<DocumentId>), StoreError> {
        let after: Option<DocumentId> =
            after.map(str::parse).transpose().map_err(|_| StoreError::InvalidCursor)?;
        let page = Page {
            prefix: item_key::DOCUMENTS,
            newest_first: false,
            limit: i32::from(limit),
            after: after.as_ref().map(item_key::document),
        };
        let (items, next) = self.0.items(scope, page).await?;
        let mut documents: Vec<Document> = self.0.opened(scope, items).await?;
        documents.retain(|document| document.is_kept(scope.limits(), now));
        let next = next.and_then(|sort| sort.strip_prefix(item_key::DOCUMENTS)?.parse().ok());
        Ok((documents, next))
    }
}
