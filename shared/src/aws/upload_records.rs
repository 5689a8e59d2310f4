//! Table `documents`: the uploads that are under way, each from the moment that its link is given until its file is
//! read or given up.

use aws_sdk_dynamodb::types::AttributeValue;
use serde::Serialize;

use super::session::Access;
use super::table::{Item, Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::ids::UploadId;
use crate::item_key;
use crate::scope::{Expired, ForeignRecord, Subject, TenantScope};
use crate::sealing::DataKey;
use crate::upload::{Begun, Description, Upload, UploadPlace};

/// What of an upload's record its tenant's key seals: what its document is called.
const TEXT: [&str; 3] = ["title", "source", "metadata"];

/// The attributes of who reads the file, and how often somebody has begun to.
const CLAIMED: &str = "claimed_until";
const ATTEMPTS: &str = "attempts";

/// The table.
#[derive(Clone, Debug)]
pub struct UploadRecords(Table);

/// An upload's record as it is stored: what it says of its document may be sealed.
#[derive(Debug)]
pub struct Unopened(Item);

impl Unopened {
    /// Whether it is sealed.
    pub fn is_sealed(&self) -> bool {
        self.0.contains_key(item_key::DATA_KEY)
    }
}

/// All that a record holds.
#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    upload: &'a Upload,
    #[serde(flatten)]
    description: &'a Description,
}

/// What comes of taking an upload up.
#[derive(Debug)]
pub enum Claimed {
    /// It is the caller's until then. What the record said before tells whether an earlier attempt was cut off.
    Ours {
        /// As it is now.
        upload: Box<Upload>,
        /// What its document is called, for [`UploadRecords::describe`].
        unopened: Unopened,
        /// Whether the attempt before this ended without a word.
        cut_off: bool,
    },
    /// Somebody else is at it.
    Theirs,
    /// It is over.
    Over,
}

impl UploadRecords {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// Adds an upload; what it says of its document is sealed where the tenant has a key of its own.
    ///
    /// # Errors
    /// If the table does not answer, or the record is another tenant's.
    pub async fn begin(
        &self,
        scope: &TenantScope,
        upload: &Upload,
        description: &Description,
        seal: Option<&DataKey>,
    ) -> Result<(), StoreError> {
        scope.owns(upload.tenant_id.as_str(), "documents").map_err(|_| StoreError::Conflict)?;
        let sort = item_key::upload(&upload.upload_id);
        let whole = Whole { upload, description };
        let put = self
            .0
            .client(scope.tenant_id())
            .put_item()
            .table_name(&self.0.name)
            .set_item(Some(self.0.sealed_item(scope, &whole, &sort, &TEXT, seal)?))
            .condition_expression("attribute_not_exists(#p)")
            .expression_attribute_names("#p", item_key::PARTITION);
        put.send().await.map_err(|e| self.0.failed(e))?;
        Ok(())
    }

    /// The upload that a file's key names, if it is under way: for the one function that decides about uploads.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn begun(
        &self,
        place: &UploadPlace,
    ) -> Result<Result<Option<Begun>, ForeignRecord>, StoreError> {
        let upload: Option<Upload> =
            self.0.get(&place.tenant_id, &item_key::upload(&place.upload_id)).await?;
        Ok(match upload {
            Some(upload) if upload.place() != *place => Err(ForeignRecord),
            upload => Ok(upload.map(Begun::of)),
        })
    }

    /// Takes an upload up, until `until`: of any number who try at once, one does. It takes no key of the tenant's, so
    /// that of an upload whose key is off somebody can say so.
    ///
    /// # Errors
    /// If the table does not answer or the item does not parse.
    pub async fn claim(
        &self,
        scope: &TenantScope,
        id: &UploadId,
        now: Timestamp,
        until: Timestamp,
    ) -> Result<Claimed, StoreError> {
        let sort = item_key::upload(id);
        let Some(item) = self.0.item_at(scope.tenant_id(), &sort).await? else { return Ok(Claimed::Over) };
        let known: Upload = self.0.own(scope, item.clone())?;
        if known.is_claimed(now) {
            return Ok(Claimed::Theirs);
        }
        let number = |number: i64| AttributeValue::N(number.to_string());
        let update = self
            .0
            .client(scope.tenant_id())
            .update_item()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(scope.tenant_id(), &sort)))
            // Each attempt counts, so that nobody takes up what another has taken up since it was read.
            .update_expression("SET #c = :until, #a = :next")
            .condition_expression("#a = :was")
            .expression_attribute_names("#c", CLAIMED)
            .expression_attribute_names("#a", ATTEMPTS)
            .expression_attribute_values(":until", number(until.as_millis()))
            .expression_attribute_values(":was", number(known.attempts.into()))
            .expression_attribute_values(":next", number(i64::from(known.attempts) + 1));
        match update.send().await.map_err(|e| self.0.failed(e)) {
            Ok(_) => {}
            Err(StoreError::Conflict) => return Ok(Claimed::Theirs),
            Err(error) => return Err(error),
        }
        let cut_off = known.claimed_until.is_some();
        let upload = Upload { attempts: known.attempts + 1, claimed_until: Some(until), ..known };
        Ok(Claimed::Ours { upload: Box::new(upload), unopened: Unopened(item), cut_off })
    }

    /// What an upload that was taken up says of its document.
    ///
    /// # Errors
    /// [`StoreError::DataKey`] if it is sealed and its key cannot be used; otherwise if it does not parse.
    pub async fn describe(
        &self,
        scope: &TenantScope,
        Unopened(item): Unopened,
    ) -> Result<Description, StoreError> {
        self.0.opened_one(scope, item).await
    }

    /// Gives an upload back that was taken up and could not be brought to its end: whoever comes next need not wait.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn give_back(&self, scope: &TenantScope, upload: &Upload) -> Result<(), StoreError> {
        let update = self
            .0
            .client(scope.tenant_id())
            .update_item()
            .table_name(&self.0.name)
            .set_key(Some(Table::key(scope.tenant_id(), &item_key::upload(&upload.upload_id))))
            .update_expression("REMOVE #c")
            .condition_expression("#a = :was")
            .expression_attribute_names("#c", CLAIMED)
            .expression_attribute_names("#a", ATTEMPTS)
            .expression_attribute_values(":was", AttributeValue::N(upload.attempts.to_string()));
        match update.send().await.map_err(|e| self.0.failed(e)) {
            // It is another's by now, or over.
            Ok(_) | Err(StoreError::Conflict) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Forgets an upload: its file is read or given up, and gone.
    ///
    /// # Errors
    /// If the table does not answer.
    pub async fn end(&self, scope: &TenantScope, id: &UploadId) -> Result<(), StoreError> {
        self.forget(scope, id).await
    }

    /// A page of a tenant's uploads that are not awaited any more at `now`, and where to go on.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn overdue(
        &self,
        expired: &Expired,
        after: Option<UploadId>,
        now: Timestamp,
    ) -> Result<(Vec<Upload>, Option<UploadId>), StoreError> {
        let page = Page {
            prefix: item_key::UPLOADS,
            newest_first: false,
            limit: 500,
            after: after.as_ref().map(item_key::upload),
        };
        let (mut uploads, next): (Vec<Upload>, _) = self.0.query(expired, page).await?;
        uploads.retain(|upload| upload.awaited_until() <= now && !upload.is_claimed(now));
        Ok((uploads, next.and_then(|sort| sort.strip_prefix(item_key::UPLOADS)?.parse().ok())))
    }

    /// As [`UploadRecords::end`], of one whose time is over.
    ///
    /// # Errors
    /// As there.
    pub async fn expire(&self, expired: &Expired, id: &UploadId) -> Result<(), StoreError> {
        self.forget(expired, id).await
    }

    async fn forget(&self, subject: &impl Subject, id: &UploadId) -> Result<(), StoreError> {
        let delete = self.0.client(subject.tenant_id()).delete_item().table_name(&self.0.name);
        let key = Table::key(subject.tenant_id(), &item_key::upload(id));
        delete.set_key(Some(key)).send().await.map_err(|e| self.0.failed(e))?;
        Ok(())
    }
}
