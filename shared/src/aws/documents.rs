//! Table `documents`: what a tenant has handed in, and where it stands.

use aws_sdk_dynamodb::types::{AttributeValue, Delete, TransactWriteItem};

use super::ledger::Ledger;
use super::session::Access;
use super::table::{Cancelled, Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::document::Document;
use crate::ids::DocumentId;
use crate::item_key;
use crate::ledger::Record;
use crate::scope::TenantScope;

/// The table.
#[derive(Clone, Debug)]
pub struct DocumentStore(Table);

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
        let document: Option<Document> = self.0.get(scope.tenant_id(), &item_key::document(id)).await?;
        Ok(document.filter(|document| scope.owns(document.tenant_id.as_str(), "documents").is_ok()))
    }

    /// Writes a document's record where it is still at `expected` (its version and whether it was
    /// there at all), so that of two writers one learns that it lost.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if it is not, or if the record is another tenant's; otherwise if the
    /// table does not answer.
    pub async fn put(
        &self,
        scope: &TenantScope,
        document: &Document,
        expected: Option<&Document>,
    ) -> Result<(), StoreError> {
        scope.owns(document.tenant_id.as_str(), "documents").map_err(|_| StoreError::Conflict)?;
        let put = self
            .0
            .client(scope.tenant_id())
            .put_item()
            .table_name(&self.0.name)
            .set_item(Some(self.0.item(document, &item_key::document(&document.id))?));
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
        let (mut documents, next) = self.0.query::<Document>(scope, page).await?;
        documents.retain(|document| document.is_kept(scope.limits(), now));
        let next = next.and_then(|sort| sort.strip_prefix(item_key::DOCUMENTS)?.parse().ok());
        Ok((documents, next))
    }
}
