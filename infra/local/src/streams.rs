//! Event source mappings: a table's stream, read in batches, and a function invoked with them.
//!
//! As Lambda does it: with the function's role; each change at least once, in order; a batch that fails holds up the stream until
//! it succeeds, is halved down to the record that fails, or is given up. How far the stream has been
//! read is kept in a file and moves only behind what is done, so that a stack that is killed begins
//! where it has to. How often a batch has failed is not kept.

mod batch;

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dynoxide::Database;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use self::batch::{Batch, Next, Record};
use crate::iam::{Caller, Callers, Intent};
use crate::lambda::{Invoke, InvokeError, uuid};
use crate::queues;
use crate::serving::{replace_file, unique_id};
use crate::template::{REGION, StartingPosition, StreamEvent, queue_arn};

/// How often an idle stream is looked at. Writes that pass the front wake it sooner.
const POLL: Duration = Duration::from_millis(100);
/// The longest that a batch is waited for to fill. Less than a template may say: here nobody saves by it.
const MAX_WINDOW: Duration = Duration::from_secs(1);
/// After a failure the next try waits this long, doubled each time.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// What reading a stream takes.
const READING: [&str; 4] =
    ["dynamodb:DescribeStream", "dynamodb:GetRecords", "dynamodb:GetShardIterator", "dynamodb:ListStreams"];
/// The most that one read of a stream gives.
const MAX_READ: usize = 1_000;

/// One stream that one function is invoked with.
pub struct Mapping {
    /// What is read and how.
    pub stream: StreamEvent,
    /// The function's ARN.
    pub function_arn: String,
    /// The function.
    pub invoke: Invoke,
    /// The file that says how far the stream is read.
    pub position: PathBuf,
    /// The folder of the queues.
    pub queues: PathBuf,
    /// The function's role, which Lambda reads the stream and sends to queues with.
    pub caller: Arc<Caller>,
    /// What remembers that it did.
    pub callers: Arc<Callers>,
}

/// Why a stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tables' server refuses.
    #[error("the stream cannot be read: {0}")]
    Read(String),
    /// The position or a message for a queue cannot be kept.
    #[error("{path} cannot be used: {source}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How far a stream is read.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Position {
    /// The sequence number of the last record that is done with.
    after: Option<String>,
}

/// Reads the stream until `shutdown` resolves. `written` wakes it; `now` says how old records are.
///
/// # Errors
/// [`Error`]; a function that fails is none.
pub async fn run(
    mapping: Mapping,
    database: Database,
    written: watch::Receiver<u64>,
    now: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let stop = watch::Sender::new(false);
    let poller = Poller { mapping, database, written, stop: stop.subscribe(), now };
    let mut polling = std::pin::pin!(poller.poll());
    tokio::select! {
        ended = &mut polling => ended,
        () = shutdown => {
            // What the function is working on is waited for; the stack limits how long.
            stop.send_replace(true);
            polling.await
        }
    }
}

struct Poller<N> {
    mapping: Mapping,
    database: Database,
    written: watch::Receiver<u64>,
    stop: watch::Receiver<bool>,
    now: N,
}

impl<N: Fn() -> OffsetDateTime> Poller<N> {
    async fn poll(mut self) -> Result<(), Error> {
        let intents = READING.map(|action| Intent::new(action, &*self.mapping.stream.stream_arn));
        if let Some(message) = self.mapping.callers.refused(&self.mapping.caller, &intents) {
            tracing::error!("DynamoDB Streams refused a function's mapping: {message}");
            // As long as the stack runs the policy is what it is.
            let _ = self.stop.clone().wait_for(|stop| *stop).await;
        }
        let size = self.mapping.stream.batch_size.min(MAX_READ);
        let mut position = self.first_position().await?;
        while !self.stopping() {
            self.written.mark_unchanged();
            let mut records = self.read(&position, size).await?;
            if !records.is_empty() && records.len() < size && !self.mapping.stream.window.is_zero() {
                self.pause(self.mapping.stream.window.min(MAX_WINDOW)).await;
                records = self.read(&position, size).await?;
            }
            let Some(last) = records.last().map(|record| record.sequence.clone()) else {
                self.idle().await;
                continue;
            };
            let filters = &self.mapping.stream.filters;
            records.retain(|record| {
                filters.is_empty() || filters.iter().any(|filter| filter.matches(&record.event))
            });
            if !self.deliver(records).await? {
                break;
            }
            // Those that were filtered out are done with, too.
            position = Position { after: Some(last) };
            self.keep(&position)?;
        }
        Ok(())
    }

    fn stopping(&self) -> bool {
        *self.stop.borrow()
    }

    /// Waits, unless the stack ends.
    async fn pause(&self, time: Duration) {
        let mut stop = self.stop.clone();
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            // An error means that the sender is gone, and with it the stack.
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }

    async fn idle(&self) {
        let mut written = self.written.clone();
        tokio::select! {
            () = self.pause(POLL) => {}
            Ok(()) = written.changed() => {}
        }
    }

    /// Invokes the function with these records until all are done or given up. False if the stack ends
    /// first.
    async fn deliver(&self, records: Vec<Record>) -> Result<bool, Error> {
        let mapping = &self.mapping.stream;
        let mut batches = batch::batches(records);
        let mut failed_in_a_row = 0_u32;
        while let Some(mut batch) = batches.pop_front() {
            if self.stopping() {
                return Ok(false);
            }
            let expired = batch.split_expired(mapping, (self.now)().unix_timestamp());
            if !expired.is_empty() {
                self.give_up(
                    &Batch { records: expired, failures: batch.failures },
                    "RecordAgeExceeded",
                    None,
                )?;
            }
            if batch.records.is_empty() {
                continue;
            }
            let result = (self.mapping.invoke)(batch.event()).await;
            if matches!(result, Err(InvokeError::Closing)) {
                return Ok(false);
            }
            let Some(from) = batch::failed_from(&result, &batch, mapping) else {
                failed_in_a_row = 0;
                self.done(&batch.records)?;
                continue;
            };
            let error = result.err();
            let function = &self.mapping.function_arn;
            match &error {
                Some(error) => {
                    tracing::warn!(function.arn = %function, "A batch of a stream failed: {error}")
                }
                None => {
                    tracing::warn!(function.arn = %function, "A record of a stream failed in its function")
                }
            }
            self.done(batch.records.get(..from).unwrap_or_default())?;
            match batch::after_failure(batch, from, mapping) {
                Next::Again(again) => {
                    again.into_iter().rev().for_each(|batch| batches.push_front(batch));
                    let backoff = FIRST_BACKOFF.saturating_mul(1 << failed_in_a_row.min(10)).min(MAX_BACKOFF);
                    failed_in_a_row = failed_in_a_row.saturating_add(1);
                    self.pause(backoff).await;
                }
                Next::GiveUp(batch) => {
                    failed_in_a_row = 0;
                    self.give_up(&batch, "RetryAttemptsExhausted", error.as_ref())?;
                }
            }
        }
        Ok(true)
    }

    fn done(&self, records: &[Record]) -> Result<(), Error> {
        match records.last() {
            Some(last) => self.keep(&Position { after: Some(last.sequence.clone()) }),
            None => Ok(()),
        }
    }

    /// Tells the queue of records that are not tried any more, in the words that Lambda has for it.
    fn give_up(&self, batch: &Batch, condition: &str, error: Option<&InvokeError>) -> Result<(), Error> {
        let arn = &self.mapping.function_arn;
        tracing::error!(function.arn = %arn, "{} records of a stream are given up: {condition}", batch.records.len());
        let (first, last) = (batch.records.first(), batch.records.last());
        let (Some(queue), Some(first), Some(last)) = (&self.mapping.stream.on_failure, first, last) else {
            return self.done(&batch.records);
        };
        let at = |seconds| rfc3339(OffsetDateTime::from_unix_timestamp(seconds).ok());
        let mut message = json!({
            "version": "1.0",
            "timestamp": rfc3339(Some((self.now)())),
            "requestContext": {
                "requestId": uuid(&unique_id()),
                "functionArn": arn,
                "condition": condition,
                "approximateInvokeCount": batch.failures,
            },
            "DDBStreamBatchInfo": {
                "shardId": shard(&self.mapping.stream.table),
                "startSequenceNumber": first.sequence,
                "endSequenceNumber": last.sequence,
                "approximateArrivalOfFirstRecord": at(first.created_s),
                "approximateArrivalOfLastRecord": at(last.created_s),
                "batchSize": batch.records.len(),
                "streamArn": self.mapping.stream.stream_arn,
            },
        });
        if let (Some(fields), true) = (message.as_object_mut(), batch.failures > 0) {
            let mut context = json!({ "statusCode": 200, "executedVersion": "$LATEST" });
            if let (Some(context), Some(_)) = (context.as_object_mut(), error) {
                context.insert("functionError".to_owned(), "Unhandled".into());
            }
            fields.insert("responseContext".to_owned(), context);
        }
        let sending = Intent::new("sqs:SendMessage", queue_arn(queue));
        match self.mapping.callers.refused(&self.mapping.caller, &[sending]) {
            Some(message) => tracing::warn!("SQS refused SendMessage: {message}"),
            None => queues::send(&self.mapping.queues, queue, &message)
                .map_err(|source| Error::File { path: self.mapping.queues.clone(), source })?,
        }
        self.done(&batch.records)
    }

    /// The position that was kept; on the first start, the one that the mapping says.
    async fn first_position(&self) -> Result<Position, Error> {
        let path = &self.mapping.position;
        match std::fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| Error::File { path: path.clone(), source: error.into() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let after = match self.mapping.stream.starting_position {
                    StartingPosition::TrimHorizon => None,
                    StartingPosition::Latest => self.newest().await?,
                };
                let position = Position { after };
                self.keep(&position)?;
                Ok(position)
            }
            Err(source) => Err(Error::File { path: path.clone(), source }),
        }
    }

    fn keep(&self, position: &Position) -> Result<(), Error> {
        let path = &self.mapping.position;
        let keep = || {
            path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
            replace_file(path, &serde_json::to_vec(position)?, 0o600)
        };
        keep().map_err(|source| Error::File { path: path.clone(), source })
    }

    async fn newest(&self) -> Result<Option<String>, Error> {
        let describe = json!({ "StreamArn": self.mapping.stream.stream_arn });
        let described =
            self.call(move |database| database.describe_stream(request(describe)?).map_err(refused)).await?;
        let shards = described.stream_description.shards;
        Ok(shards.into_iter().next().and_then(|shard| shard.sequence_number_range.ending_sequence_number))
    }

    /// The next records.
    async fn read(&self, position: &Position, limit: usize) -> Result<Vec<Record>, Error> {
        let stream = &self.mapping.stream;
        let mut ask = json!({
            "StreamArn": stream.stream_arn,
            "ShardId": shard(&stream.table),
            "ShardIteratorType": "TRIM_HORIZON",
        });
        if let (Some(after), Some(fields)) = (&position.after, ask.as_object_mut()) {
            fields.insert("ShardIteratorType".to_owned(), "AFTER_SEQUENCE_NUMBER".into());
            fields.insert("SequenceNumber".to_owned(), after.as_str().into());
        }
        let read = self.call(move |database| {
            let iterator = database.get_shard_iterator(request(ask)?).map_err(refused)?.shard_iterator;
            let read = json!({ "ShardIterator": iterator, "Limit": limit });
            let read = database.get_records(request(read)?).map_err(refused)?;
            read.records.iter().map(|record| serde_json::to_value(record).map_err(refused)).collect()
        });
        let records: Vec<Value> = read.await?;
        Ok(records.into_iter().map(|event| record(event, &stream.stream_arn)).collect())
    }

    /// Runs something on the database, which blocks.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Database) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let database = self.database.clone();
        tokio::task::spawn_blocking(move || call(&database)).await.map_err(refused)?
    }
}

/// A record as a function gets it: the server's own, with the ARN, and from where the stack pretends to be.
fn record(mut event: Value, stream_arn: &str) -> Record {
    if let Some(fields) = event.as_object_mut() {
        fields.insert("awsRegion".to_owned(), REGION.into());
        fields.insert("eventSourceARN".to_owned(), stream_arn.into());
    }
    let sequence = event.pointer("/dynamodb/SequenceNumber").and_then(Value::as_str).unwrap_or_default();
    let created = event.pointer("/dynamodb/ApproximateCreationDateTime").and_then(Value::as_f64);
    // Whole seconds, which a float holds exactly.
    Record { sequence: sequence.to_owned(), created_s: created.unwrap_or_default() as i64, event }
}

/// The one shard of a table's stream.
fn shard(table: &str) -> String {
    dynoxide::streams::shard_id(table)
}

/// To the millisecond, as Lambda writes it.
fn rfc3339(time: Option<OffsetDateTime>) -> Option<String> {
    let time = time?;
    time.replace_millisecond(time.millisecond()).unwrap_or(time).format(&Rfc3339).ok()
}

fn request<T: DeserializeOwned>(value: Value) -> Result<T, Error> {
    serde_json::from_value(value).map_err(refused)
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::Read(error.to_string())
}

#[cfg(test)]
pub(crate) mod tests;
