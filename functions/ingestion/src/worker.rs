//! Reading files that were uploaded: driven by the queue that their bucket tells, and by no request.
//!
//! A file is a stranger's. So this function holds nothing but what the one upload takes that it is at: whose that is,
//! and the tokens of that tenant's collection, the authorizer of uploads says; the rest is the session's. Its work is
//! admitted, metered and settled like that of any request, in the name of whoever began the upload.
//!
//! A message may come twice, late or at the same time as itself: an upload is taken up by one at a time
//! ([`UploadRecords::claim`](shared::aws::upload_records::UploadRecords::claim)), for no longer than an invocation
//! takes, and is over once its record is gone. What is worth another try is left in the queue. The last time that a
//! message comes, a file that has cut off its reader before is not read again: the document is told that it has
//! failed, which such a file would not leave to be done.

use std::time::Duration;

use aws_lambda_events::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use http::StatusCode;
use lambda_http::Error;
use serde::Deserialize;
use serde_json::Value;
use shared::api_key::Permission;
use shared::aws::data_keys::DataKeyError;
use shared::aws::documents::Head;
use shared::aws::upload_authorizer::UploadAuthorizer;
use shared::aws::upload_records::{Claimed, Unopened};
use shared::aws::uploads::Unread;
use shared::aws::{self, StoreError};
use shared::clock::Timestamp;
use shared::env;
use shared::error::{ApiError, Code};
use shared::gate::Need;
use shared::meter::Work;
use shared::metrics::{Arrived, Ending};
use shared::scope::{Caller, RequestId, RequestNote, TenantScope};
use shared::trace::Trace;
use shared::units::{NanoUsd, Tokens};
use shared::upload::{Description, Ruling, Upload, UploadPlace};
use shared::web;
use tokio::time::Instant;

use crate::extract::Charset;
use crate::metered::{Metered, Shown};
use crate::store::{NotStored, Valid, forget, store};
use crate::upload::{close, unavailable};

/// What is kept of an invocation's time, to settle and to give back what could not be done.
const MARGIN: Duration = Duration::from_secs(10);
/// How much longer than the invocation a file is its reader's, in milliseconds: the skew of two clocks.
const CLAIM_MARGIN_MS: i64 = 5_000;
/// What its line of the log says instead of a request's method and route.
const ROUTE: (&str, &str) = ("PUT", "upload");
/// What a document says whose tenant's key KMS refused to the last.
const KEY_UNUSABLE: &str = "the tenant's KMS key could not be used; upload the file again once it can";

/// What the function works with.
pub struct Context {
    ingestion: crate::Context,
    authorizer: UploadAuthorizer,
    /// How often a message comes.
    attempts: u32,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable or secret is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config()?;
        Ok(Self {
            ingestion: crate::Context::of(&config).await?,
            authorizer: UploadAuthorizer::from_env(&config)?,
            attempts: env::parsed("UPLOAD_ATTEMPTS")?,
        })
    }

    /// Writes down what is still only remembered: the process is about to end.
    pub async fn close(&self) {
        self.ingestion.close().await;
    }
}

/// What Lambda says of an invocation.
pub struct Invocation {
    /// When it is ended.
    pub deadline: Timestamp,
    /// Where it is in its trace, and with it every file that it reads.
    pub trace: Option<Trace>,
}

/// Reads the files that messages tell of, one after the other, and says which messages have to come again.
pub async fn handle(context: &Context, event: SqsEvent, invocation: &Invocation) -> SqsBatchResponse {
    let mut response = SqsBatchResponse::default();
    for message in event.records {
        if !told(context, &message, invocation).await {
            let mut failure = BatchItemFailure::default();
            failure.item_identifier = message.message_id.unwrap_or_default();
            response.batch_item_failures.push(failure);
        }
    }
    response
}

/// What S3 sends. Its first message, that there will be others, has no records.
#[derive(Deserialize)]
struct Notification {
    #[serde(default, rename = "Records")]
    records: Vec<Told>,
}

#[derive(Deserialize)]
struct Told {
    s3: In,
}

#[derive(Deserialize)]
struct In {
    object: Put,
}

#[derive(Deserialize)]
struct Put {
    key: String,
    #[serde(default)]
    size: u64,
}

/// Reads what one message tells of. False if it has to come again.
async fn told(context: &Context, message: &SqsMessage, invocation: &Invocation) -> bool {
    let body = message.body.as_deref().unwrap_or_default();
    let notification: Notification = match serde_json::from_str(body) {
        Ok(notification) => notification,
        Err(error) => {
            tracing::error!(
                alert = "poison_record",
                "A message of the uploads' queue is none of S3's: {error}"
            );
            return false;
        }
    };
    let received = message.attributes.get("ApproximateReceiveCount").and_then(|count| count.parse().ok());
    let last = received.is_some_and(|received: u32| received >= context.attempts);
    let mut done = true;
    for Told { s3: In { object } } in notification.records {
        // An empty one stands where a file was read, or given up.
        if object.size == 0 {
            continue;
        }
        let Some(place) = place(&object.key) else {
            tracing::warn!("An object of the documents' bucket is no upload; it is left alone");
            continue;
        };
        done &= Box::pin(read(context, &place, last, invocation)).await;
    }
    done
}

/// The upload whose file is under a key as S3's messages write it.
fn place(key: &str) -> Option<UploadPlace> {
    let key = key.replace('+', " ");
    percent_encoding::percent_decode_str(&key).decode_utf8().ok()?.parse().ok()
}

/// What became of a file.
enum Came {
    /// Nothing is left to be done.
    Over,
    /// It is to be tried again.
    Again,
}

/// Reads one file. False if it has to be tried again.
async fn read(context: &Context, place: &UploadPlace, last: bool, invocation: &Invocation) -> bool {
    let fields = match context.authorizer.ask(place).await {
        Ok(Ruling::Scope { context: fields, may_write }) => (fields, may_write),
        Ok(Ruling::Over) => return true,
        Ok(Ruling::Suspended) => return false,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "An upload is left for later");
            return false;
        }
    };
    let (fields, may_write) = fields;
    let clock = &context.ingestion.clock;
    let request_id =
        RequestId::from(fields.get("requestId").and_then(Value::as_str).unwrap_or_default().to_owned());
    let (method, route) = ROUTE;
    let arrived = Arrived {
        request_id,
        method: method.to_owned(),
        route: route.to_owned(),
        trace: invocation.trace.clone(),
        at: clock.now(),
    };
    let note = RequestNote::of(arrived);
    let came = match Caller::of_upload(&fields, place, note.clone()) {
        Ok(caller) => {
            note.measure(|m| m.caller = Some((caller.tenant_id().clone(), caller.credential().clone())));
            let work = async |scope: TenantScope| {
                let reading =
                    Reading { context, place, may_write, last, deadline: invocation.deadline, scope };
                Box::pin(reading.run()).await
            };
            context.ingestion.gate.enter(caller, Permission::DocumentsWrite, work).await
        }
        Err(error) => Err(error.into()),
    };
    let error = came.as_ref().err().map(|error| error.code);
    let status = error.map_or(StatusCode::OK, Code::status);
    web::conclude(&note, Ending { status, error }, clock);
    match came {
        Ok(Came::Over) => true,
        Ok(Came::Again) => false,
        // The key has ended; what was left to do about the file is done.
        Err(error) => !may_write && error.code == Code::InvalidKey,
    }
}

/// What keeps a file from being stored for now.
struct Hindered {
    error: ApiError,
    /// Whether it is the tenant's own key: KMS refuses it. A KMS that does not answer is an outage like others.
    key: bool,
}

impl From<ApiError> for Hindered {
    fn from(error: ApiError) -> Self {
        Self { error, key: false }
    }
}

impl From<StoreError> for Hindered {
    fn from(error: StoreError) -> Self {
        let key = matches!(error, StoreError::DataKey(DataKeyError::Refused { .. }));
        Self { error: error.into(), key }
    }
}

/// One attempt at one file.
struct Reading<'a> {
    context: &'a Context,
    place: &'a UploadPlace,
    may_write: bool,
    last: bool,
    deadline: Timestamp,
    scope: TenantScope,
}

impl Reading<'_> {
    async fn run(mut self) -> Result<Came, ApiError> {
        let ingestion = &self.context.ingestion;
        let now = ingestion.clock.now();
        let until = self.deadline.plus_millis(CLAIM_MARGIN_MS);
        let claimed = ingestion.upload_records.claim(&self.scope, &self.place.upload_id, now, until).await?;
        let (upload, unopened, cut_off) = match claimed {
            Claimed::Ours { upload, unopened, cut_off } => (*upload, unopened, cut_off),
            Claimed::Theirs => return Ok(Came::Again),
            Claimed::Over => return Ok(Came::Over),
        };
        let came = Box::pin(self.attempt(&upload, unopened, cut_off)).await;
        // A key that has ended has ended for good.
        let again = match &came {
            Ok(came) => matches!(came, Came::Again),
            Err(error) => self.may_write || error.code != Code::InvalidKey,
        };
        if again
            && let Err(error) = self.context.ingestion.upload_records.give_back(&self.scope, &upload).await
        {
            tracing::warn!(upload.id = %upload.upload_id, "An upload waits until its claim is over: {error}");
        }
        came
    }

    async fn attempt(
        &mut self,
        upload: &Upload,
        unopened: Unopened,
        cut_off: bool,
    ) -> Result<Came, ApiError> {
        let ingestion = &self.context.ingestion;
        // It was read before, or the document was deleted or sent again since.
        let Some(document) = self.awaiting(upload).await? else { return self.end(upload).await };
        if !self.may_write {
            let reason = "the key by which the upload was begun may not write documents any more";
            self.fail(upload, document, reason.to_owned()).await?;
            return Err(ApiError::new(Code::InvalidKey, "not a valid API key or token"));
        }
        if self.last && cut_off {
            let reason = "the file could not be read: each attempt was cut off";
            self.fail(upload, document, reason.to_owned()).await?;
            tracing::error!(document.id = %upload.document_id, "A file cut off whoever read it; it is given up");
            return Ok(Came::Again);
        }
        // The file's link was signed with the tenant's key of then, or at a repeat of its request with a later one.
        let sealed = unopened.is_sealed() || self.scope.kms_key().is_some();
        let description = match self.describe(upload, unopened, &document).await {
            Ok(description) => description,
            Err(error) => return self.retry(upload, error.into()).await,
        };
        let left = self.deadline.millis_since(ingestion.clock.now());
        let deadline = Instant::now() + Duration::from_millis(left).saturating_sub(MARGIN);
        let file = match ingestion.uploads.read(&self.scope, (upload, sealed), deadline).await {
            Ok(file) => file,
            Err(Unread::NotAnnounced) => {
                return self.fail(upload, document, Unread::NotAnnounced.to_string()).await;
            }
            Err(Unread::Key(error)) => return self.retry(upload, StoreError::from(error).into()).await,
            Err(Unread::Bucket(error)) => return self.retry(upload, unavailable(error).into()).await,
        };
        match Box::pin(self.store(upload, description, file, deadline)).await {
            Ok(()) | Err(NotStored::NotAwaited) => self.end(upload).await,
            Err(NotStored::Unreadable(reason)) => {
                let Some(document) = self.awaiting(upload).await? else { return self.end(upload).await };
                self.fail(upload, document, reason.to_string()).await
            }
            Err(NotStored::Failed(error)) => self.retry(upload, error.into()).await,
        }
    }

    /// What the document is called. From then on all data keys are at hand that storing it takes: so a key that is off
    /// shows before anything is admitted, and as what it is.
    async fn describe(
        &self,
        upload: &Upload,
        unopened: Unopened,
        document: &Head,
    ) -> Result<Description, StoreError> {
        let ingestion = &self.context.ingestion;
        let description = Box::pin(ingestion.upload_records.describe(&self.scope, unopened)).await?;
        // An attempt before this may have sealed it, with another key.
        if document.is_sealed() {
            Box::pin(ingestion.documents.stored(&self.scope, &upload.document_id)).await?;
        }
        Box::pin(ingestion.data_keys.of(&self.scope)).await?;
        Ok(description)
    }

    /// Stores the file as the document's content, admitted and settled.
    async fn store(
        &mut self,
        upload: &Upload,
        description: Description,
        file: Vec<u8>,
        deadline: Instant,
    ) -> Result<(), NotStored> {
        let ingestion = &self.context.ingestion;
        let started = ingestion.clock.now();
        let need = Need { tokens: Tokens(0), cost: NanoUsd(0) };
        let admitted = ingestion.gate.admit(&mut self.scope, Work::Ingestion, |_| Ok(vec![need]), deadline);
        let (admission, _) = admitted.await?;
        let mut metered = Metered::new(ingestion, &self.scope, admission, deadline);
        let stored = match metered.sealed().await {
            Ok(()) => store(ingestion, &metered, valid(upload, description, file)).await,
            Err(error) => Err(error.into()),
        };
        let latency_ms = ingestion.clock.now().millis_since(started);
        let (result, failure) = match stored {
            Ok(document) => {
                let shown = Shown { documents: vec![document.id], ..Shown::default() };
                (Ok(((), shown)), None)
            }
            Err(failure) => {
                let error = match &failure {
                    NotStored::Unreadable(reason) => reason.clone().into(),
                    NotStored::NotAwaited => ApiError::not_found(),
                    NotStored::Failed(error) => error.clone(),
                };
                (Err(error), Some(failure))
            }
        };
        let settled = metered.settle(None, latency_ms, StatusCode::CREATED, result).await;
        match failure {
            Some(failure) => Err(failure),
            None => settled.map(drop).map_err(NotStored::Failed),
        }
    }

    /// Something around the file refused or failed: it is tried again, unless it was tried often enough. Then the document
    /// says why.
    async fn retry(&self, upload: &Upload, Hindered { error, key }: Hindered) -> Result<Came, ApiError> {
        if self.last
            && let Some(document) = self.awaiting(upload).await?
        {
            let reason = if key { KEY_UNUSABLE } else { &error.message };
            self.fail(upload, document, reason.to_owned()).await?;
            // What a limit or the tenant's own key refused is the tenant's to see to; anything else is ours, and stays in
            // the dead letters.
            return if key || error.limit.is_some() { Ok(Came::Over) } else { Err(error) };
        }
        Err(error)
    }

    /// Where the document stands, if it still awaits this upload.
    async fn awaiting(&self, upload: &Upload) -> Result<Option<Head>, ApiError> {
        let document = self.context.ingestion.documents.head(&self.scope, &upload.document_id).await?;
        Ok(document.filter(|document| document.awaits(&upload.upload_id)))
    }

    /// The document has failed, and says why. The file goes. None of it takes the tenant's key, which may be why.
    async fn fail(&self, upload: &Upload, document: Head, reason: String) -> Result<Came, ApiError> {
        let ingestion = &self.context.ingestion;
        match ingestion.documents.fail(&self.scope, &upload.document_id, &document, reason).await {
            Ok(()) => {
                // What attempts have left for a next one, which there is none of.
                if document.upload.is_some_and(|awaited| awaited.taken) {
                    forget(ingestion, &self.scope, &upload.document_id, document.updated_at).await;
                }
                self.end(upload).await
            }
            // It was deleted, or sent again: by another file, or by this one's link anew.
            Err(StoreError::Conflict) => match self.awaiting(upload).await? {
                Some(_) => Ok(Came::Again),
                None => self.end(upload).await,
            },
            Err(error) => Err(error.into()),
        }
    }

    /// The upload is over.
    async fn end(&self, upload: &Upload) -> Result<Came, ApiError> {
        close(&self.context.ingestion, &self.scope, &upload.upload_id).await?;
        Ok(Came::Over)
    }
}

/// The document as its file makes it.
fn valid(upload: &Upload, description: Description, file: Vec<u8>) -> Valid {
    Valid {
        id: upload.document_id.clone(),
        title: description.title,
        source: description.source,
        content: file,
        content_type: upload.content_type,
        charset: upload.charset.as_deref().and_then(Charset::parse),
        metadata: description.metadata,
        groups: upload.groups.clone(),
        upload: Some(upload.upload_id.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_s3_writes_them() {
        let upload = "upl_0123456789abcdefABCDEF";
        let read = place(&format!("tenant%3Dacme-1/uploads/{upload}")).unwrap();
        assert_eq!((read.tenant_id.as_str(), read.upload_id.as_str()), ("acme-1", upload));
        for bad in
            ["", "x", "tenant%3Dacme-1/uploads/x", "tenant%3Dac+me/uploads/upl_0123456789abcdefABCDEF", "%FF"]
        {
            assert!(place(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn what_s3_sends_first_tells_of_nothing() {
        let first = r#"{"Service":"Amazon S3","Event":"s3:TestEvent","Bucket":"b"}"#;
        assert!(serde_json::from_str::<Notification>(first).unwrap().records.is_empty());
        assert!(serde_json::from_str::<Notification>("nonsense").is_err());
    }
}
