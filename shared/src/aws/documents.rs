//! Table `documents`: what a tenant has handed in, and where it stands.

use aws_sdk_dynamodb::types::{AttributeValue, Delete, TransactWriteItem};
use serde::Deserialize;

use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::document::{self, Awaited, Document, DocumentStatus};
use crate::ids::{DocumentId, UploadId};
use crate::item_key;
use crate::ledger::Record;
use crate::scope::TenantScope;
use crate::sealing::DataKey;
use crate::tenant::TenantId;

/// What of a document's record its tenant's key seals. The passages, which are searched, lie in the tenant's cell.
const TEXT: [&str; 3] = ["title", "source", "metadata"];

/// The table.
#[derive(Clone, Debug)]
pub struct DocumentStore(Table);

/// A document that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct There {
    /// The upload that its content comes by, or came by last.
    pub upload: Option<UploadId>,
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
        let document: Option<Document> = self.0.opened(scope, item.into_iter().collect()).await?.pop();
        Ok(document.filter(|document| scope.owns(document.tenant_id.as_str(), "documents").is_ok()))
    }

    /// Whether there is such a document of the scope's tenant, and not past its retention. It is not opened: one
    /// whose key is gone can be deleted.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn there(
        &self,
        scope: &TenantScope,
        id: &DocumentId,
        now: Timestamp,
    ) -> Result<Option<There>, StoreError> {
        #[derive(Deserialize)]
        struct Head {
            tenant_id: TenantId,
            status: DocumentStatus,
            updated_at: Timestamp,
            upload: Option<Awaited>,
        }
        let head: Option<Head> = self.0.get(scope.tenant_id(), &item_key::document(id)).await?;
        let own = head.filter(|head| scope.owns(head.tenant_id.as_str(), "documents").is_ok());
        let kept = own.filter(|head| {
            document::is_kept(head.status, head.updated_at, head.upload.as_ref(), scope.limits(), now)
        });
        Ok(kept.map(|head| There { upload: head.upload.map(|awaited| awaited.upload_id) }))
    }

    /// Writes a document's record where it is still at `expected` (its version and whether it was
    /// there at all), so that of two writers one learns that it lost; sealed where the tenant has a key of its own.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if it is not, or if the record is another tenant's; otherwise if the
    /// table does not answer.
    pub async fn put(
        &self,
        scope: &TenantScope,
        document: &Document,
        expected: Option<&Document>,
        seal: Option<&DataKey>,
    ) -> Result<(), StoreError> {
        scope.owns(document.tenant_id.as_str(), "documents").map_err(|_| StoreError::Conflict)?;
        let sort = item_key::document(&document.id);
        let put = self
            .0
            .client(scope.tenant_id())
            .put_item()
            .table_name(&self.0.name)
            .set_item(Some(self.0.sealed_item(scope, document, &sort, &TEXT, seal)?));
        let put = match expected {
            None => put
                .condition_expression("attribute_not_exists(#p)")
                .expression_attribute_names("#p", item_key::PARTITION),
            Some(was) => put
                .condition_expression("version = :version AND updated_at = :updated")
                .expression_attribute_values(":version", AttributeValue::N(was.version.to_string()))
                .expression_attribute_values(
                    ":updated",
                    AttributeValue::N(was.updated_at.as_millis().to_string()),
                ),
        };
        put.send().await.map_err(|e| self.0.failed(e))?;
        Ok(())
    }

    /// Forgets a document, with the record that says so. One that is not there any more is none's to
    /// forget, and nothing is recorded.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn delete(
        &self,
        scope: &TenantScope,
        id: &DocumentId,
        ledger: &Ledger,
        record: &Record,
    ) -> Result<(), StoreError> {
        let delete = Delete::builder()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(scope.tenant_id(), &item_key::document(id))))
            .condition_expression("attribute_exists(#p)")
            .expression_attribute_names("#p", item_key::PARTITION)
            .build()
            .map_err(|e| self.0.corrupt(e))?;
        let parts = vec![TransactWriteItem::builder().delete(delete).build(), ledger.event_part(record)?];
        match self.0.transact(scope.tenant_id(), parts).await {
            Ok(()) | Err(Cancelled::Conditions(_)) => Ok(()),
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
