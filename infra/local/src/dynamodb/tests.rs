//! Over real HTTP against the real tables, with the SDK that the functions use.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::config::retry::RetryConfig;
use aws_sdk_dynamodb::config::timeout::TimeoutConfig;
use aws_sdk_dynamodb::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_dynamodb::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::types::{AttributeValue, Put, TransactWriteItem};

use super::*;
use crate::iam::{Caller, Callers, Policy};
use crate::sigv4;
use crate::template::KeyAttribute;

fn table() -> Table {
    Table {
        logical_id: "Notes".into(),
        name: "bulkhead-notes".into(),
        hash_key: KeyAttribute { name: "pk".into(), kind: "S".into() },
        range_key: None,
        indexes: Vec::new(),
        ttl_attribute: None,
        stream_view: None,
    }
}

/// An operator, and a function that may put notes and nothing else.
fn callers() -> Arc<Callers> {
    let key = |id: &str, arn: &str| sigv4::Credentials {
        access_key_id: id.into(),
        secret_access_key: "secret".into(),
        region: "us-east-1".into(),
        user_arn: arn.into(),
    };
    let policy = Policy::parse(&json!({"Version": "2012-10-17", "Statement": {
        "Effect": "Allow", "Action": "dynamodb:PutItem",
        "Resource": "arn:aws:dynamodb:us-east-1:000000000000:table/bulkhead-notes",
        "Condition": {"StringLike": {"dynamodb:LeadingKeys": "acme*"}}}}));
    let role = key("ROLE", "arn:aws:sts::0:assumed-role/chat");
    let function = Caller::in_role(role, "arn:aws:iam::0:role/function".into(), vec![policy.unwrap()]);
    Arc::new(Callers::new(vec![Caller::operator(key("AKID", "arn:aws:iam::0:user/operator")), function]))
}

struct Stand {
    client: Client,
    front: Arc<Front>,
    /// How often the function was killed, and what the table held then.
    killed: Arc<AtomicUsize>,
    _folder: tempfile::TempDir,
}

type PutResult = Result<aws_sdk_dynamodb::operation::put_item::PutItemOutput, SdkError<PutItemError>>;

impl Stand {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tables = [table()];
        let database = open(&folder.path().join("tables.sqlite"), &tables).unwrap();
        let killed = Arc::new(AtomicUsize::new(0));
        let kill: Kill = {
            let (killed, database) = (Arc::clone(&killed), database.clone());
            Arc::new(move |function| {
                assert_eq!(function, "chat");
                let held =
                    database.scan(request(json!({"TableName": "bulkhead-notes"})).unwrap()).unwrap().count;
                killed.store(100 + held, Ordering::SeqCst);
                Box::pin(std::future::ready(()))
            })
        };
        let front = Front::new(&tables, callers(), vec!["chat".into()], kill);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(serve(listener, database, Arc::clone(&front), std::future::pending()));
        let timeouts = TimeoutConfig::builder().operation_timeout(Duration::from_millis(700)).build();
        let config = aws_sdk_dynamodb::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .endpoint_url(url)
            .region(Region::new("us-east-1"))
            .credentials_provider(Credentials::new("AKID", "secret", None, None, "test"))
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            .build();
        Self { client: Client::from_conf(config), front, killed, _folder: folder }
    }

    fn faults(&self, rule: Value) {
        self.front.set_faults(json!({"rules": [rule]}).to_string().as_bytes()).unwrap();
        self.front.forget_calls();
    }

    async fn put(&self, key: &str) -> PutResult {
        let key = AttributeValue::S(key.to_owned());
        self.client.put_item().table_name("bulkhead-notes").item("pk", key).send().await
    }

    async fn holds(&self, key: &str) -> bool {
        let key = AttributeValue::S(key.to_owned());
        let got = self.client.get_item().table_name("bulkhead-notes").key("pk", key).send().await;
        got.unwrap().item.is_some()
    }

    fn calls(&self) -> Vec<Value> {
        let calls = self.front.calls_after(0);
        calls.iter().map(|call| serde_json::to_value(call).unwrap()).collect()
    }
}

#[tokio::test]
async fn calls_pass_and_are_remembered_with_what_they_consumed() {
    let stand = Stand::new().await;
    let put = stand.put("a").await.unwrap();
    assert_eq!(put.consumed_capacity.unwrap().capacity_units, Some(1.0), "asked for on the way");
    assert!(stand.holds("a").await);
    let again = stand.client.put_item().table_name("bulkhead-notes");
    let again =
        again.item("pk", AttributeValue::S("a".into())).condition_expression("attribute_not_exists(pk)");
    let refused = again.send().await.unwrap_err().into_service_error();
    assert!(refused.is_conditional_check_failed_exception());
    assert_eq!(
        stand.calls(),
        [
            json!({"n": 1, "caller": "arn:aws:iam::0:user/operator", "operation": "PutItem", "tables": ["bulkhead-notes"], "keys": ["a"],
                "error": null, "fault": null, "consumed": {"bulkhead-notes": 1.0}}),
            json!({"n": 2, "caller": "arn:aws:iam::0:user/operator", "operation": "GetItem", "tables": ["bulkhead-notes"], "keys": ["a"],
                "error": null, "fault": null, "consumed": {"bulkhead-notes": 0.5}}),
            json!({"n": 3, "caller": "arn:aws:iam::0:user/operator", "operation": "PutItem", "tables": ["bulkhead-notes"], "keys": ["a"],
                "error": "ConditionalCheckFailedException", "fault": null, "consumed": {}}),
        ]
    );
    let numbers = |after| stand.front.calls_after(after).iter().map(|call| call.n).collect::<Vec<_>>();
    assert_eq!(numbers(1), [2, 3]);
    stand.front.forget_calls();
    assert_eq!(numbers(0), [0_u64; 0]);
    stand.put("b").await.unwrap();
    assert_eq!(numbers(0), [4]);
}

#[tokio::test]
async fn policies_decide_and_a_signature_is_needed() {
    let stand = Stand::new().await;
    let with = |id: &str, secret: &str| {
        let credentials = Credentials::new(id, secret, Some("token".into()), None, "test");
        let config = stand.client.config().to_builder().credentials_provider(credentials).build();
        Client::from_conf(config)
    };
    let put = async |client: &Client, key: &str| {
        let put = client.put_item().table_name("bulkhead-notes").item("pk", AttributeValue::S(key.into()));
        put.send().await.map_err(|refused| refused.code().unwrap().to_owned())
    };
    let function = with("ROLE", "secret");
    put(&function, "acme-1").await.unwrap();
    assert_eq!(put(&function, "globex-1").await.unwrap_err(), "AccessDeniedException");
    let key = || AttributeValue::S("acme-1".into());
    let got = function.get_item().table_name("bulkhead-notes").key("pk", key()).send().await;
    assert_eq!(got.unwrap_err().code(), Some("AccessDeniedException"));
    // A transaction is what its parts are, each of them.
    let part = |key: &str| {
        let put = Put::builder().table_name("bulkhead-notes").item("pk", AttributeValue::S(key.into()));
        TransactWriteItem::builder().put(put.build().unwrap()).build()
    };
    let both = function.transact_write_items().transact_items(part("acme-2")).transact_items(part("other"));
    assert_eq!(both.send().await.unwrap_err().code(), Some("AccessDeniedException"));
    let one = function.transact_write_items().transact_items(part("acme-2"));
    one.send().await.unwrap();
    assert!(stand.holds("acme-2").await && !stand.holds("other").await && !stand.holds("globex-1").await);

    let refused = async |id, secret| put(&with(id, secret), "acme-3").await.unwrap_err();
    assert_eq!(refused("NOBODY", "secret").await, "UnrecognizedClientException");
    assert_eq!(refused("AKID", "guessed").await, "InvalidSignatureException");
    let last = stand.calls().pop().unwrap();
    assert_eq!(
        (&last["operation"], &last["error"]),
        (&json!("PutItem"), &json!("InvalidSignatureException"))
    );
}

#[tokio::test]
async fn a_refused_call_is_not_done_and_the_sdk_reads_why() {
    let stand = Stand::new().await;
    let modes = [
        ("throttle", "ThrottlingException", 400),
        ("error", "InternalServerError", 500),
        ("conflict", "TransactionConflictException", 400),
    ];
    for (mode, code, status) in modes {
        stand.faults(json!({"mode": mode, "operation": "PutItem", "table": "notes", "times": 1}));
        let error = stand.put(mode).await.unwrap_err();
        assert_eq!(error.raw_response().unwrap().status().as_u16(), status);
        let error = error.into_service_error();
        assert_eq!(error.code(), Some(code));
        assert!(!error.message().unwrap().is_empty());
        assert!(
            match mode {
                "throttle" => error.is_throttling_exception(),
                "error" => error.is_internal_server_error(),
                _ => error.is_transaction_conflict_exception(),
            },
            "{error:?}"
        );
        assert!(!stand.holds(mode).await);
        let call = &stand.calls()[0];
        assert_eq!((&call["error"], &call["fault"]), (&json!(code), &json!(mode)));
        stand.put(mode).await.unwrap();
    }
}

#[tokio::test]
async fn a_cancelled_transaction_names_the_conflict_in_its_first_part() {
    let stand = Stand::new().await;
    stand.faults(json!({"mode": "cancel_conflict", "times": 1}));
    let put = |key: &str| {
        let item = [("pk".to_owned(), AttributeValue::S(key.to_owned()))].into();
        let put = Put::builder().table_name("bulkhead-notes").set_item(Some(item)).build().unwrap();
        TransactWriteItem::builder().put(put).build()
    };
    let transaction =
        stand.client.transact_write_items().set_transact_items(Some(["a", "b", "c"].map(put).to_vec()));
    let error = transaction.clone().send().await.unwrap_err().into_service_error();
    let aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError::TransactionCanceledException(
        error,
    ) = error
    else {
        panic!("{error:?}");
    };
    assert!(error.message().unwrap().contains("[TransactionConflict, None, None]"));
    let codes: Vec<_> = error.cancellation_reasons().iter().map(|reason| reason.code().unwrap()).collect();
    assert_eq!(codes, ["TransactionConflict", "None", "None"]);
    assert!(!stand.holds("a").await);
    transaction.send().await.unwrap();
    assert!(stand.holds("c").await);
    assert_eq!(stand.calls().last().unwrap()["consumed"], json!({"bulkhead-notes": 0.5}));
    assert_eq!(stand.calls()[2]["consumed"], json!({"bulkhead-notes": 6.0}));
}

#[tokio::test]
async fn an_answer_is_lost_before_or_after_the_call_is_done() {
    let stand = Stand::new().await;
    // The mode, whether the call is done, how the connection ends.
    let modes = [
        ("hang", false, "timeout"),
        ("lost_answer", true, "dispatch"),
        ("lost_answer_error", true, "InternalServerError"),
        ("kill_before", false, "dispatch"),
        ("kill_after", true, "dispatch"),
    ];
    let mut held = 0;
    for (mode, done, ending) in modes {
        let mut rule = json!({"mode": mode, "contains": mode, "operation": "PutItem"});
        if mode.starts_with("kill") {
            rule["function"] = "chat".into();
        }
        stand.faults(rule);
        let error = stand.put(mode).await.unwrap_err();
        let seen = match &error {
            SdkError::TimeoutError(_) => "timeout",
            SdkError::DispatchFailure(_) => "dispatch",
            error => error.code().unwrap(),
        };
        assert_eq!(seen, ending, "{mode}: {error:?}");
        assert_eq!(stand.holds(mode).await, done, "{mode}");
        held += usize::from(done);
        let call = &stand.calls()[0];
        assert_eq!((&call["fault"], &call["error"]), (&json!(mode), &Value::Null));
        assert_eq!(call["consumed"].as_object().unwrap().len(), usize::from(done), "{mode}");
        stand.put("unharmed").await.unwrap();
        if mode == "hang" {
            held += 1;
        }
        if mode.starts_with("kill") {
            assert_eq!(stand.killed.swap(0, Ordering::SeqCst), 100 + held, "{mode}");
        }
    }
}

#[tokio::test]
async fn a_delayed_call_is_done_later() {
    let stand = Stand::new().await;
    stand.faults(json!({"mode": "delay", "delay_ms": 300, "times": 1}));
    let begun = Instant::now();
    stand.put("a").await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert!(stand.holds("a").await);
    stand.faults(json!({"mode": "throttle"}));
    stand.front.clear_faults();
    stand.put("b").await.unwrap();
}

#[tokio::test]
async fn a_call_whose_client_has_gone_is_done_and_remembered() {
    let stand = Stand::new().await;
    // Longer than the client's patience.
    stand.faults(json!({"mode": "delay", "delay_ms": 1_000, "times": 1}));
    assert!(matches!(stand.put("a").await.unwrap_err(), SdkError::TimeoutError(_)));
    for _ in 0..500 {
        if !stand.calls().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(stand.holds("a").await);
    assert_eq!(stand.calls()[0]["consumed"], json!({"bulkhead-notes": 1.0}));
    let seen: BTreeMap<_, _> = stand.calls().iter().map(|c| (c["operation"].to_string(), ())).collect();
    assert_eq!(seen.len(), 2);
}
