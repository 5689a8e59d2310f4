//! Real tables, a function that is a closure.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::*;
use crate::event_pattern::Pattern;
use crate::serving::system_clock;
use crate::sigv4::Credentials;
use crate::template::{KeyAttribute, Table};

/// Who may do everything.
fn nobody() -> Credentials {
    let (access_key_id, secret_access_key) = ("AKID".to_owned(), "secret".to_owned());
    Credentials { access_key_id, secret_access_key, region: REGION.to_owned(), user_arn: String::new() }
}

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn mapping() -> StreamEvent {
    StreamEvent {
        name: "Changes".into(),
        table: "notes".into(),
        stream_arn: "arn:aws:dynamodb:us-east-1:000000000000:table/notes/stream/label".into(),
        starting_position: StartingPosition::TrimHorizon,
        batch_size: 100,
        window: Duration::ZERO,
        max_retries: None,
        max_age: None,
        bisect: false,
        reports_item_failures: false,
        on_failure: None,
        filters: Vec::new(),
    }
}

struct Stand {
    folder: tempfile::TempDir,
    database: Database,
    written: watch::Sender<u64>,
}

/// A running mapping.
struct Running {
    /// The batches that the function was invoked with.
    batches: mpsc::UnboundedReceiver<Value>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), Error>>,
}

/// The keys of a batch's records.
fn keys(event: &Value) -> Vec<String> {
    let records = event["Records"].as_array().unwrap();
    records.iter().map(|record| record["dynamodb"]["Keys"]["pk"]["S"].as_str().unwrap().to_owned()).collect()
}

impl Running {
    async fn batch(&mut self) -> Value {
        tokio::time::timeout(PATIENCE, self.batches.recv()).await.unwrap().unwrap()
    }

    async fn keys(&mut self) -> Vec<String> {
        keys(&self.batch().await)
    }

    async fn stop(mut self) {
        self.stop.send(()).unwrap();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
        assert!(self.batches.try_recv().is_err(), "the function was invoked once more");
    }
}

impl Stand {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let table = Table {
            logical_id: "Notes".into(),
            name: "notes".into(),
            hash_key: KeyAttribute { name: "pk".into(), kind: "S".into() },
            range_key: None,
            indexes: Vec::new(),
            ttl_attribute: None,
            stream_view: Some("NEW_IMAGE".into()),
        };
        let database = crate::dynamodb::open(&folder.path().join("tables.sqlite"), &[table]).unwrap();
        Self { folder, database, written: watch::Sender::new(0) }
    }

    fn put(&self, keys: &str) {
        for key in keys.chars() {
            let item = json!({"pk": {"S": key.to_string()}, "n": {"N": "7"}});
            let put = json!({"TableName": "notes", "Item": item});
            self.database.put_item(request(put).unwrap()).unwrap();
        }
        self.written.send_modify(|calls| *calls += 1);
    }

    /// Runs the mapping with a function that answers this, in turn, and then nothing.
    fn run(&self, stream: StreamEvent, answers: Vec<Result<&'static str, &'static str>>) -> Running {
        let answers = Mutex::new(VecDeque::from(answers));
        self.run_with(stream, move |_| {
            let answer = answers.lock().unwrap().pop_front().unwrap_or(Ok(""));
            answer.map(Bytes::from).map_err(|why| InvokeError::Crashed(why.into()))
        })
    }

    fn run_with(
        &self,
        stream: StreamEvent,
        answer: impl Fn(&Value) -> Result<Bytes, InvokeError> + Send + Sync + 'static,
    ) -> Running {
        let (seen, batches) = mpsc::unbounded_channel();
        let invoke: Invoke = Arc::new(move |payload| {
            let event = serde_json::from_slice(&payload).unwrap();
            let result = answer(&event);
            let _ = seen.send(event);
            Box::pin(std::future::ready(result))
        });
        self.start(stream, invoke, batches)
    }

    fn start(&self, stream: StreamEvent, invoke: Invoke, batches: mpsc::UnboundedReceiver<Value>) -> Running {
        let mapping = Mapping {
            stream,
            function_arn: "arn:aws:lambda:us-east-1:000000000000:function:f".into(),
            invoke,
            position: self.folder.path().join("streams/f.json"),
            queues: self.queues(),
            caller: Arc::new(Caller::operator(nobody())),
            callers: Arc::default(),
        };
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let run = run(mapping, self.database.clone(), self.written.subscribe(), system_clock, shutdown);
        Running { batches, stop, task: tokio::spawn(run) }
    }

    fn queues(&self) -> PathBuf {
        self.folder.path().join("queues")
    }

    async fn position(&self, wanted: impl Fn(Option<&str>) -> bool) -> Option<String> {
        let path = self.folder.path().join("streams/f.json");
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Ok(text) = std::fs::read(&path) {
                let position: Position = serde_json::from_slice(&text).unwrap();
                if wanted(position.after.as_deref()) {
                    return position.after;
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the position is not reached");
    }
}

fn sequence(batch: &Value, index: usize) -> String {
    batch["Records"][index]["dynamodb"]["SequenceNumber"].as_str().unwrap().to_owned()
}

fn messages(folder: &Path, queue: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder.join(format!("{queue}.jsonl"))).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn a_function_gets_changes_as_from_aws() {
    let stand = Stand::new();
    let mut running = stand.run(mapping(), Vec::new());
    stand.put("a");
    let batch = running.batch().await;
    let event: aws_lambda_events::dynamodb::Event = serde_json::from_value(batch.clone()).unwrap();
    let record = &event.records[0];
    assert_eq!((record.event_name.as_str(), record.aws_region.as_str()), ("INSERT", "us-east-1"));
    assert_eq!(record.event_source.as_deref(), Some("aws:dynamodb"));
    assert_eq!(record.event_source_arn, Some(mapping().stream_arn));
    assert!(!record.event_id.is_empty());
    let age = system_clock().unix_timestamp() - record.change.approximate_creation_date_time.timestamp();
    assert!((0..60).contains(&age), "{age}");
    assert!(record.change.size_bytes > 0);
    let raw = &batch["Records"][0]["dynamodb"];
    assert_eq!(raw["Keys"], json!({"pk": {"S": "a"}}));
    assert_eq!(raw["NewImage"], json!({"pk": {"S": "a"}, "n": {"N": "7"}}));
    assert_eq!(raw["StreamViewType"], "NEW_IMAGE");
    assert!(record.change.sequence_number.as_ref().unwrap().len() >= 21);
    running.stop().await;
}

#[tokio::test]
async fn records_come_once_in_order_and_in_batches_also_after_a_restart() {
    let stand = Stand::new();
    stand.put("abc");
    let two = StreamEvent { batch_size: 2, ..mapping() };
    let mut running = stand.run(two.clone(), Vec::new());
    assert_eq!(running.keys().await, ["a", "b"]);
    let last = running.batch().await;
    assert_eq!(keys(&last), ["c"]);
    stand.position(|after| after == Some(&sequence(&last, 0))).await;
    running.stop().await;
    stand.put("d");
    let mut running = stand.run(two, Vec::new());
    assert_eq!(running.keys().await, ["d"]);
    running.stop().await;
}

#[tokio::test]
async fn the_latest_position_is_the_one_of_the_first_start() {
    let stand = Stand::new();
    stand.put("a");
    let latest = StreamEvent { starting_position: StartingPosition::Latest, ..mapping() };
    let running = stand.run(latest.clone(), Vec::new());
    stand.position(|after| after.is_some()).await;
    running.stop().await;
    stand.put("b");
    let mut running = stand.run(latest, Vec::new());
    assert_eq!(running.keys().await, ["b"]);
    running.stop().await;
}

#[tokio::test]
async fn filtered_records_are_passed_over_for_good() {
    let stand = Stand::new();
    let filter = |key: &str| {
        let pattern =
            json!({"eventName": ["INSERT"], "dynamodb": {"Keys": {"pk": {"S": [{"prefix": key}]}}}});
        Pattern::parse(&pattern).unwrap()
    };
    let picky = StreamEvent { filters: vec![filter("b"), filter("c")], ..mapping() };
    stand.put("abbc");
    stand.put("x");
    let mut running = stand.run(picky, Vec::new());
    assert_eq!(running.keys().await, ["b", "c"], "the second b changes nothing that it inserted");
    running.stop().await;
    let mut running = stand.run(mapping(), Vec::new());
    stand.put("y");
    assert_eq!(running.keys().await, ["y"]);
    running.stop().await;
}

#[tokio::test]
async fn a_failed_batch_is_tried_again_before_what_comes_after_it() {
    let stand = Stand::new();
    stand.put("ab");
    let one = StreamEvent { batch_size: 1, ..mapping() };
    let mut running = stand.run(one, vec![Err("crash"), Err("crash")]);
    for wanted in ["a", "a", "a", "b"] {
        assert_eq!(running.keys().await, [wanted]);
    }
    running.stop().await;
}

#[tokio::test]
async fn a_stack_that_ends_during_an_invocation_invokes_again() {
    let stand = Stand::new();
    stand.put("ab");
    let (seen, batches) = mpsc::unbounded_channel();
    let begun = Arc::new(Notify::new());
    let invoke: Invoke = {
        let begun = Arc::clone(&begun);
        Arc::new(move |_| {
            begun.notify_one();
            Box::pin(std::future::pending())
        })
    };
    let running = stand.start(mapping(), invoke, batches);
    begun.notified().await;
    running.task.abort();
    drop(seen);
    assert_eq!(stand.position(|after| after.is_none()).await, None);
    let mut running = stand.run(mapping(), Vec::new());
    assert_eq!(running.keys().await, ["a", "b"]);
    running.stop().await;
}

#[tokio::test]
async fn the_record_that_fails_is_found_and_given_up_and_the_others_are_done() {
    for reports in [true, false] {
        let stand = Stand::new();
        stand.put("abcde");
        let stream = StreamEvent {
            bisect: true,
            max_retries: Some(1),
            reports_item_failures: reports,
            on_failure: Some("failed".into()),
            ..mapping()
        };
        let mut running = stand.run_with(stream, move |event| {
            match (keys(event).iter().position(|key| key == "d"), reports) {
                (None, _) => Ok(Bytes::new()),
                (Some(_), false) => Err(InvokeError::Crashed("d".into())),
                (Some(index), true) => {
                    let failure = json!({"itemIdentifier": sequence(event, index)});
                    Ok(json!({"batchItemFailures": [failure]}).to_string().into())
                }
            }
        });
        let (mut tries, mut last) = (Vec::new(), Value::Null);
        while tries.last().is_none_or(|keys: &Vec<String>| !keys.contains(&"e".to_owned()) || keys.len() > 1)
        {
            last = running.batch().await;
            tries.push(keys(&last));
        }
        let tries: Vec<String> = tries.iter().map(|keys| keys.concat()).collect();
        let expected: &[&str] = match reports {
            true => &["abcde", "de", "d", "d", "e"],
            false => &["abcde", "ab", "cde", "c", "de", "d", "d", "e"],
        };
        assert_eq!(tries, expected);
        stand.position(|after| after == Some(&sequence(&last, 0))).await;
        running.stop().await;

        let messages = messages(&stand.queues(), "failed");
        let [message] = messages.as_slice() else { panic!("{messages:?}") };
        assert_eq!(message["requestContext"]["condition"], "RetryAttemptsExhausted");
        assert_eq!(message["requestContext"]["approximateInvokeCount"], 2);
        assert_eq!(message["responseContext"].get("functionError").is_some(), !reports);
        let info = &message["DDBStreamBatchInfo"];
        assert_eq!((&info["batchSize"], &info["streamArn"]), (&json!(1), &json!(mapping().stream_arn)));
        assert_eq!(info["startSequenceNumber"], info["endSequenceNumber"]);
    }
}

#[tokio::test]
async fn a_record_that_is_too_old_is_given_up_untried() {
    let stand = Stand::new();
    stand.put("a");
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    let stream =
        StreamEvent { max_age: Some(Duration::from_secs(1)), on_failure: Some("old".into()), ..mapping() };
    let mut running = stand.run(stream, Vec::new());
    stand.position(|after| after.is_some()).await;
    stand.put("b");
    assert_eq!(running.keys().await, ["b"]);
    running.stop().await;
    let messages = messages(&stand.queues(), "old");
    assert_eq!(messages.len(), 1);
    assert_eq!(messages[0]["requestContext"]["condition"], "RecordAgeExceeded");
    assert!(messages[0].get("responseContext").is_none());
}
