use std::collections::VecDeque;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::iam::Policy;
use crate::serving::system_clock;
use crate::sigv4::Credentials;
use crate::template::{Notification, Redrive};

fn work() -> Queue {
    Queue {
        logical_id: "Work".to_owned(),
        name: "work".to_owned(),
        visibility: Duration::from_millis(300),
        redrive: Some(Redrive { queue: "dead".to_owned(), max_receives: 3 }),
    }
}

/// A role that may read the queue.
fn reader() -> Reader {
    let credentials = Credentials {
        access_key_id: "AKID".to_owned(),
        secret_access_key: "secret".to_owned(),
        region: REGION.to_owned(),
        user_arn: "arn:aws:sts::0:assumed-role/reader".to_owned(),
    };
    let allow = json!({"Version": "2012-10-17", "Statement": [{"Effect": "Allow",
        "Action": ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"],
        "Resource": queue_arn("work")}]});
    let policies = vec![Policy::parse(&allow).unwrap()];
    let caller = Arc::new(Caller::in_role(credentials, "reader".to_owned(), policies));
    Reader { caller, callers: Arc::default() }
}

fn event() -> QueueEvent {
    QueueEvent {
        name: "Queue".to_owned(),
        queue: work(),
        batch_size: 10,
        concurrency: 2,
        reports_item_failures: true,
    }
}

/// A function that answers what it is told to, in turn, and keeps what it was invoked with.
fn function(answers: Vec<&'static str>) -> (Invoke, Arc<Mutex<Vec<Value>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (kept, answers) = (Arc::clone(&seen), Mutex::new(VecDeque::from(answers)));
    let invoke: Invoke = Arc::new(move |payload: Bytes| {
        let event: Value = serde_json::from_slice(&payload).unwrap();
        let answer = answers.lock().unwrap().pop_front().unwrap_or("{}");
        let failing = |n: usize| json!({"itemIdentifier": event["Records"][n]["messageId"]});
        let answer = match answer {
            "crash" => Err(InvokeError::Crashed(String::new())),
            "first" => Ok(json!({"batchItemFailures": [failing(0)]}).to_string().into()),
            other => Ok(other.into()),
        };
        kept.lock().unwrap().push(event);
        std::future::ready(answer).boxed()
    });
    (invoke, seen)
}

async fn until(what: impl Fn() -> bool) {
    for _ in 0..400 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not come about");
}

fn bodies(event: &Value) -> Vec<String> {
    let records = event["Records"].as_array().unwrap().iter();
    records.map(|record| record["body"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_message_comes_again_until_it_succeeds_and_ends_elsewhere_if_it_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let queues = Queues::open(folder.path(), [work()]).unwrap();
    for body in ["\"a\"", "\"b\""] {
        queues.send("work", body.to_owned(), system_clock()).unwrap();
    }
    let (invoke, seen) = function(vec!["first", "crash", "first"]);
    let (stop, stopped) = oneshot::channel::<()>();
    let delivering = Arc::clone(&queues)
        .deliver(event(), reader(), invoke, system_clock, async move { drop(stopped.await) });
    let delivering = tokio::spawn(delivering);
    until(|| folder.path().join("dead.jsonl").exists()).await;
    let seen = seen.lock().unwrap().clone();
    assert_eq!(bodies(&seen[0]), ["\"a\"", "\"b\""]);
    assert_eq!(seen[1..].iter().map(bodies).collect::<Vec<_>>(), [["\"a\""], ["\"a\""]]);
    let counts =
        seen.iter().map(|event| event["Records"][0]["attributes"]["ApproximateReceiveCount"].clone());
    assert_eq!(counts.collect::<Vec<_>>(), ["1", "2", "3"]);
    assert_eq!(std::fs::read_to_string(folder.path().join("dead.jsonl")).unwrap(), "\"a\"\n");
    assert_eq!(queues.show("work", system_clock()).unwrap(), json!([]));
    stop.send(()).unwrap();
    delivering.await.unwrap().unwrap();
    // What is in a queue outlives the stack.
    queues.send("work", "\"c\"".to_owned(), system_clock()).unwrap();
    drop(queues);
    let again = Queues::open(folder.path(), [work()]).unwrap();
    assert_eq!(again.show("work", system_clock()).unwrap()[0]["body"], "\"c\"");
    assert!(again.show("dead", system_clock()).is_err());
}

#[tokio::test]
async fn a_hidden_message_can_be_had_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let slow = Queue { visibility: Duration::from_secs(600), ..work() };
    let queues = Queues::open(folder.path(), [slow]).unwrap();
    queues.send("work", "1".to_owned(), system_clock()).unwrap();
    let (invoke, seen) = function(vec!["crash"]);
    tokio::spawn(Arc::clone(&queues).deliver(
        event(),
        reader(),
        invoke,
        system_clock,
        std::future::pending(),
    ));
    until(|| seen.lock().unwrap().len() == 1).await;
    let shown = || queues.show("work", system_clock()).unwrap()[0].clone();
    until(|| shown()["at_work"] == false).await;
    assert_eq!((&shown()["hidden"], &shown()["receives"]), (&true.into(), &1.into()));
    queues.unhide("work", system_clock()).unwrap();
    until(|| seen.lock().unwrap().len() == 2).await;
}

#[test]
fn an_answer_that_names_what_was_not_sent_fails_all() {
    let sent: HashSet<String> = ["a", "b"].map(str::to_owned).into();
    let of = |answer: &str| failed(&Ok(answer.to_owned().into()), &sent, true);
    for fine in ["", "null", "{}", r#"{"batchItemFailures":[]}"#, r#"{"batchItemFailures":null}"#] {
        assert!(of(fine).is_empty(), "{fine}");
    }
    assert_eq!(of(r#"{"batchItemFailures":[{"itemIdentifier":"b"}]}"#), HashSet::from(["b".to_owned()]));
    for all in [
        r#"{"batchItemFailures":[{"itemIdentifier":"x"}]}"#,
        r#"{"batchItemFailures":[{"itemIdentifier":""}]}"#,
        r#"{"batchItemFailures":[{}]}"#,
        r#"{"batchItemFailures":1}"#,
    ] {
        assert_eq!(of(all), sent, "{all}");
    }
    assert!(failed(&Ok("nonsense".into()), &sent, false).is_empty());
    assert_eq!(failed(&Err(InvokeError::Waited), &sent, false), sent);
}

#[tokio::test]
async fn a_bucket_tells_what_its_notifications_name() {
    let folder = tempfile::tempdir().unwrap();
    let queues = Queues::open(folder.path(), [work()]).unwrap();
    let bucket = Bucket {
        logical_id: "Files".to_owned(),
        name: "files".to_owned(),
        versioned: true,
        object_lock: false,
        default_retention: None,
        notifications: vec![Notification {
            id: "Files-0".to_owned(),
            event: "s3:ObjectCreated:*".to_owned(),
            queue: "work".to_owned(),
        }],
        cors: Vec::new(),
    };
    let (events, told) = mpsc::unbounded_channel();
    tokio::spawn(Arc::clone(&queues).tell(vec![bucket], told, system_clock, std::future::pending()));
    let event = ObjectEvent {
        name: "ObjectCreated:Put",
        bucket: "files".to_owned(),
        key: "tenant=acme/a b+ü".to_owned(),
        version_id: Some("v1".to_owned()),
        size: 7,
        etag: "e".to_owned(),
        time: system_clock(),
    };
    events.send(event.clone()).unwrap();
    events.send(ObjectEvent { name: "ObjectRemoved:Delete", ..event.clone() }).unwrap();
    events.send(ObjectEvent { bucket: "others".to_owned(), ..event }).unwrap();
    until(|| queues.show("work", system_clock()).unwrap().as_array().unwrap().len() == 2).await;
    let shown = queues.show("work", system_clock()).unwrap();
    let body = |n: usize| serde_json::from_str::<Value>(shown[n]["body"].as_str().unwrap()).unwrap();
    assert_eq!(body(0)["Event"], "s3:TestEvent");
    let record = body(1)["Records"][0].clone();
    assert_eq!(record["eventName"], "ObjectCreated:Put");
    assert_eq!(record["s3"]["bucket"]["name"], "files");
    assert_eq!(record["s3"]["object"]["key"], "tenant%3Dacme/a+b%2B%C3%BC");
    assert_eq!(record["s3"]["object"]["size"], 7);
    assert_eq!(record["s3"]["object"]["versionId"], "v1");
}
