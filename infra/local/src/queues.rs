//! SQS, as far as it is used: queues that S3 and Lambda send to, and that functions are invoked with.
//!
//! A queue that nobody reads is a file of JSON lines, as is every queue that messages of another end in. One that a
//! function is invoked with ([`Queues`]) has a file of what is in it, replaced with each change, so that a stack that
//! is killed goes on where it was: what was being worked on comes again once it is not hidden any more.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::future::Future;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use s3s::crypto::{Checksum as _, Md5};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{Notify, Semaphore, watch};

use crate::iam::{Caller, Callers, Intent};
use crate::lambda::{Invoke, InvokeError, uuid};
use crate::s3::ObjectEvent;
use crate::serving::{replace_file, unique_id};
use crate::template::{Bucket, Queue, QueueEvent, REGION, queue_arn};

/// How often a queue is looked at for messages that are not hidden any more. What is sent wakes it sooner.
const POLL: Duration = Duration::from_millis(100);
/// What S3 leaves of a key as it is, in a notification.
const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'_').remove(b'.').remove(b'*');

/// Puts a message into a queue that nobody reads; `directory` holds a file `<queue>.jsonl` for each.
///
/// # Errors
/// If the file cannot be written.
pub fn send(directory: &Path, queue: &str, message: &Value) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let mut file =
        File::options().create(true).append(true).open(directory.join(format!("{queue}.jsonl")))?;
    // In one write, so that a reader never sees half a line.
    file.write_all(format!("{message}\n").as_bytes())
}

/// A message as it waits, or is worked on.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Message {
    id: String,
    body: String,
    sent_ms: i64,
    first_received_ms: Option<i64>,
    receives: u32,
    /// Hidden until then.
    visible_at_ms: i64,
    /// How many are working on it: more than one, if it came again meanwhile.
    #[serde(skip)]
    at_work: u32,
}

/// The queues that functions are invoked with.
#[derive(Debug)]
pub struct Queues {
    directory: PathBuf,
    queues: BTreeMap<String, Held>,
}

#[derive(Debug)]
struct Held {
    queue: Queue,
    path: PathBuf,
    /// Whether there was a file: whoever sends to a new queue says so first.
    new: bool,
    messages: Mutex<Vec<Message>>,
    sent: Notify,
}

impl Held {
    fn messages(&self) -> MutexGuard<'_, Vec<Message>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, messages: &[Message]) -> io::Result<()> {
        replace_file(&self.path, &serde_json::to_vec(messages)?, 0o600)
    }
}

/// With which role Lambda reads a queue: the function's.
#[derive(Clone, Debug)]
pub struct Reader {
    /// The role.
    pub caller: Arc<Caller>,
    /// What remembers that it did.
    pub callers: Arc<Callers>,
}

impl Reader {
    /// Why the queue may not be read, if it may not.
    fn refused(&self, queue: &Queue) -> Option<String> {
        let intents = ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"];
        let intents = intents.map(|action| Intent::new(action, queue_arn(&queue.name)));
        self.callers.refused(&self.caller, &intents)
    }
}

/// Why a message is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no queue `{0}` that a function is invoked with")]
pub struct UnknownQueue(String);

impl Queues {
    /// Those among `queues`, with what is in them; `directory` holds a file `<queue>.json` for each.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn open(directory: &Path, queues: impl IntoIterator<Item = Queue>) -> io::Result<Arc<Self>> {
        std::fs::create_dir_all(directory)?;
        let open = |queue: Queue| {
            let path = directory.join(format!("{}.json", queue.name));
            let (new, messages) = match std::fs::read(&path) {
                Ok(bytes) => (false, serde_json::from_slice(&bytes)?),
                Err(error) if error.kind() == io::ErrorKind::NotFound => (true, Vec::new()),
                Err(error) => return Err(error),
            };
            let name = queue.name.clone();
            Ok((name, Held { queue, path, new, messages: Mutex::new(messages), sent: Notify::new() }))
        };
        let queues = queues.into_iter().map(open).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self { directory: directory.to_owned(), queues }))
    }

    fn held(&self, queue: &str) -> Result<&Held, UnknownQueue> {
        self.queues.get(queue).ok_or_else(|| UnknownQueue(queue.to_owned()))
    }

    /// Puts a message into a queue, whoever reads it or nobody.
    ///
    /// # Errors
    /// If it cannot be kept.
    pub fn send(&self, queue: &str, body: String, now: OffsetDateTime) -> io::Result<()> {
        let Ok(held) = self.held(queue) else {
            let message = serde_json::from_str(&body).unwrap_or(Value::String(body));
            return send(&self.directory, queue, &message);
        };
        let now_ms = millis(now);
        let mut messages = held.messages();
        messages.push(Message {
            id: uuid(&unique_id()),
            body,
            sent_ms: now_ms,
            first_received_ms: None,
            receives: 0,
            visible_at_ms: now_ms,
            at_work: 0,
        });
        held.keep(&messages)?;
        held.sent.notify_waiters();
        Ok(())
    }

    /// What is in a queue: for each message its body, how often it was received, whether it is hidden, and whether somebody
    /// is working on it.
    ///
    /// # Errors
    /// [`UnknownQueue`].
    pub fn show(&self, queue: &str, now: OffsetDateTime) -> Result<Value, UnknownQueue> {
        let now_ms = millis(now);
        let messages = self.held(queue)?.messages();
        let show = |message: &Message| {
            json!({ "id": message.id, "body": message.body, "receives": message.receives,
                "hidden": message.visible_at_ms > now_ms, "at_work": message.at_work > 0 })
        };
        Ok(messages.iter().map(show).collect())
    }

    /// Lets all hidden messages of a queue be received at once, also those that are worked on.
    ///
    /// # Errors
    /// [`UnknownQueue`].
    pub fn unhide(&self, queue: &str, now: OffsetDateTime) -> Result<(), UnknownQueue> {
        let held = self.held(queue)?;
        held.messages().iter_mut().for_each(|m| m.visible_at_ms = m.visible_at_ms.min(millis(now)));
        held.sent.notify_waiters();
        Ok(())
    }

    /// Receives messages: they are hidden for a while, and who was received too often ends elsewhere.
    fn receive(&self, held: &Held, most: usize, now: OffsetDateTime) -> io::Result<Vec<Message>> {
        let now_ms = millis(now);
        let hidden_until =
            now_ms.saturating_add(i64::try_from(held.queue.visibility.as_millis()).unwrap_or(0));
        let mut messages = held.messages();
        if let Some(redrive) = &held.queue.redrive {
            let ends = |m: &Message| m.visible_at_ms <= now_ms && m.receives >= redrive.max_receives;
            let ended: Vec<Message> = messages.extract_if(.., |message| ends(message)).collect();
            for message in ended {
                tracing::warn!(queue = held.queue.name, "A message was received too often");
                let body = serde_json::from_str(&message.body).unwrap_or(Value::String(message.body));
                send(&self.directory, &redrive.queue, &body)?;
            }
        }
        let mut received = Vec::new();
        for message in messages.iter_mut().filter(|m| m.visible_at_ms <= now_ms).take(most) {
            message.receives += 1;
            message.first_received_ms.get_or_insert(now_ms);
            message.visible_at_ms = hidden_until;
            message.at_work += 1;
            received.push(message.clone());
        }
        if !received.is_empty() {
            held.keep(&messages)?;
        }
        Ok(received)
    }

    /// Somebody has worked on messages, and is done with some of them.
    fn end(&self, held: &Held, worked_on: &HashSet<String>, done: &HashSet<String>) -> io::Result<()> {
        let mut messages = held.messages();
        messages.retain(|message| !done.contains(&message.id));
        for message in messages.iter_mut().filter(|message| worked_on.contains(&message.id)) {
            message.at_work = message.at_work.saturating_sub(1);
        }
        held.keep(&messages)
    }

    /// Sends what happens in buckets to the queues that are told of it, until `shutdown` resolves. A queue that is
    /// new is told of the notifications first, as S3 does it.
    ///
    /// # Errors
    /// If a message cannot be kept.
    pub async fn tell(
        self: Arc<Self>,
        buckets: Vec<Bucket>,
        mut events: UnboundedReceiver<ObjectEvent>,
        now: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        for bucket in &buckets {
            for notification in &bucket.notifications {
                if self.held(&notification.queue).is_ok_and(|held| held.new) {
                    self.send(&notification.queue, test_event(bucket, now()).to_string(), now())?;
                }
            }
        }
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let event = tokio::select! {
                () = &mut shutdown => return Ok(()),
                event = events.recv() => event,
            };
            // The bucket's server has ended, and with it the stack.
            let Some(event) = event else { return Ok(()) };
            let told = buckets.iter().filter(|bucket| bucket.name == event.bucket);
            for notification in told.flat_map(|bucket| &bucket.notifications) {
                if notification.tells(event.name) {
                    let body = notification_of(&event, &notification.id).to_string();
                    self.send(&notification.queue, body, now())?;
                }
            }
        }
    }

    /// Invokes a function with a queue's messages until `shutdown` resolves. A message is deleted once the function
    /// has not failed it; otherwise it comes again when it is not hidden any more.
    ///
    /// # Errors
    /// If the queue cannot be kept; a function that fails is none.
    pub async fn deliver(
        self: Arc<Self>,
        event: QueueEvent,
        reader: Reader,
        invoke: Invoke,
        now: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let stop = watch::Sender::new(false);
        let polling = Arc::clone(&self).poll(event, reader, invoke, now, stop.subscribe());
        let mut polling = std::pin::pin!(polling);
        tokio::select! {
            ended = &mut polling => ended,
            () = shutdown => {
                // What the function is working on is waited for; the stack limits how long.
                stop.send_replace(true);
                polling.await
            }
        }
    }

    async fn poll(
        self: Arc<Self>,
        event: QueueEvent,
        reader: Reader,
        invoke: Invoke,
        now: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
        mut stop: watch::Receiver<bool>,
    ) -> io::Result<()> {
        let room = Arc::new(Semaphore::new(event.concurrency));
        let event = Arc::new(event);
        let held = self.held(&event.queue.name).map_err(io::Error::other)?;
        let mut at_work = tokio::task::JoinSet::new();
        if let Some(message) = reader.refused(&event.queue) {
            tracing::error!("SQS refused a function's mapping: {message}");
            // As long as the stack runs the policy is what it is.
            let _ = stop.wait_for(|stop| *stop).await;
        }
        while !*stop.borrow() {
            let sent = held.sent.notified();
            let place = Arc::clone(&room).acquire_owned().await.map_err(io::Error::other)?;
            let messages = self.receive(held, event.batch_size, now())?;
            if messages.is_empty() {
                drop(place);
                tokio::select! {
                    () = sent => {}
                    () = tokio::time::sleep(POLL) => {}
                    // An error means that the sender is gone, and with it the stack.
                    _ = stop.wait_for(|stop| *stop) => {}
                    Some(ended) = at_work.join_next() => ended.map_err(io::Error::other)??,
                }
                continue;
            }
            let (queues, invoke, event) = (Arc::clone(&self), Arc::clone(&invoke), Arc::clone(&event));
            at_work.spawn(async move {
                let ids = messages.iter().map(|message| message.id.clone()).collect();
                let done = batch(&event, &invoke, &ids, messages).await;
                drop(place);
                queues.end(queues.held(&event.queue.name).map_err(io::Error::other)?, &ids, &done)
            });
        }
        while let Some(ended) = at_work.join_next().await {
            ended.map_err(io::Error::other)??;
        }
        Ok(())
    }
}

/// Invokes the function with a batch, and says which messages are done with.
async fn batch(
    event: &QueueEvent,
    invoke: &Invoke,
    ids: &HashSet<String>,
    messages: Vec<Message>,
) -> HashSet<String> {
    let records: Vec<Value> = messages.iter().map(|message| record(message, &event.queue.name)).collect();
    let result = invoke(json!({ "Records": records }).to_string().into()).await;
    let failed = failed(&result, ids, event.reports_item_failures);
    match &result {
        _ if failed.is_empty() => {}
        Err(InvokeError::Closing) => {}
        Err(error) => tracing::warn!(queue = event.queue.name, "A batch of a queue failed: {error}"),
        Ok(_) => tracing::warn!(queue = event.queue.name, "A message of a queue failed in its function"),
    }
    ids - &failed
}

/// Which messages of a batch failed. As with Lambda, an answer that names none that was sent fails them all.
/// <https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html>
fn failed(
    result: &Result<Bytes, InvokeError>,
    sent: &HashSet<String>,
    reports_item_failures: bool,
) -> HashSet<String> {
    let Ok(payload) = result else { return sent.clone() };
    if !reports_item_failures {
        return HashSet::new();
    }
    let answer: Value = serde_json::from_slice(payload).unwrap_or_default();
    let failures = match answer.get("batchItemFailures") {
        None | Some(Value::Null) => return HashSet::new(),
        Some(Value::Array(failures)) => failures,
        Some(_) => return sent.clone(),
    };
    let id = |failure: &Value| failure.get("itemIdentifier")?.as_str().map(str::to_owned);
    let failures: Option<HashSet<String>> = failures.iter().map(id).collect();
    failures.filter(|failures| failures.is_subset(sent)).unwrap_or_else(|| sent.clone())
}

/// A message as a function gets it.
/// <https://docs.aws.amazon.com/lambda/latest/dg/with-sqs.html>
fn record(message: &Message, queue: &str) -> Value {
    json!({
        "messageId": message.id,
        "receiptHandle": unique_id(),
        "body": message.body,
        "attributes": {
            "ApproximateReceiveCount": message.receives.to_string(),
            "SentTimestamp": message.sent_ms.to_string(),
            "SenderId": "AIDASSYFHUBOBT7F4XT75",
            "ApproximateFirstReceiveTimestamp": message.first_received_ms.unwrap_or_default().to_string(),
        },
        "messageAttributes": {},
        "md5OfBody": hex::encode(Md5::checksum(message.body.as_bytes())),
        "eventSource": "aws:sqs",
        "eventSourceARN": queue_arn(queue),
        "awsRegion": REGION,
    })
}

/// What S3 sends of an event.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html>
fn notification_of(event: &ObjectEvent, configuration: &str) -> Value {
    let mut object = json!({
        "key": utf8_percent_encode(&event.key, KEPT).to_string().replace("%20", "+"),
        "sequencer": format!("{:016X}", event.time.unix_timestamp_nanos()),
    });
    if let Some(fields) = object.as_object_mut() {
        if event.name.starts_with("ObjectCreated:") {
            fields.insert("size".to_owned(), event.size.into());
            fields.insert("eTag".to_owned(), event.etag.as_str().into());
        }
        if let Some(version) = &event.version_id {
            fields.insert("versionId".to_owned(), version.as_str().into());
        }
    }
    json!({ "Records": [{
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": REGION,
        "eventTime": event.time.format(&Rfc3339).unwrap_or_default(),
        "eventName": event.name,
        "userIdentity": { "principalId": "AWS:local" },
        "requestParameters": { "sourceIPAddress": "127.0.0.1" },
        "responseElements": { "x-amz-request-id": unique_id(), "x-amz-id-2": unique_id() },
        "s3": {
            "s3SchemaVersion": "1.0",
            "configurationId": configuration,
            "bucket": {
                "name": event.bucket,
                "ownerIdentity": { "principalId": "local" },
                "arn": format!("arn:aws:s3:::{}", event.bucket),
            },
            "object": object,
        },
    }] })
}

/// What S3 sends once notifications are set up.
fn test_event(bucket: &Bucket, now: OffsetDateTime) -> Value {
    json!({
        "Service": "Amazon S3",
        "Event": "s3:TestEvent",
        "Time": now.format(&Rfc3339).unwrap_or_default(),
        "Bucket": bucket.name,
        "RequestId": unique_id(),
        "HostId": unique_id(),
    })
}

fn millis(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
