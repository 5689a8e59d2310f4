//! Faults: whatever breaks, the client gets a clean error object and the next request works.

use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::{Options, Stack, all_events};

const FACT: &str = "The lighthouse of Port Ellen was lit for the first time in 1832.";
const QUESTION: &str = "When was the lighthouse of Port Ellen lit for the first time?";

async fn stack(model_delay_ms: u64) -> (Stack, tests::Tenant) {
    let stack = Stack::start_with(Options { model_delay_ms, ..Default::default() }).await;
    let acme = stack.tenant("acme");
    acme.store("lighthouse", "Lighthouses", FACT).await;
    (stack, acme)
}

#[tokio::test]
async fn a_function_killed_in_the_middle_of_a_request_is_a_clean_error() {
    let (stack, acme) = stack(400).await;
    let asking = tokio::spawn({
        let acme = acme.clone();
        async move { acme.chat(json!({"message": QUESTION})).await }
    });
    // The model takes seconds for an answer; a second from now the function is in the middle of it.
    tokio::time::sleep(std::time::Duration::from_millis(1_000)).await;
    stack.kill("chat").await;
    let answer = asking.await.unwrap();
    answer.expect_error(503, "unavailable");
    let next = acme.ask(QUESTION).await;
    assert!(next["response"].as_str().unwrap().contains("1832"), "{next}");
}

#[tokio::test]
async fn a_function_killed_between_requests_is_not_noticed() {
    let (stack, acme) = stack(0).await;
    for function in ["chat", "ingestion", "authorizer", "provisioning"] {
        stack.kill(function).await;
    }
    acme.ask(QUESTION).await;
    acme.search("lighthouse", 3).await;
    stack.admin(reqwest::Method::GET, "/admin/tenants", None).await.expect_status(StatusCode::OK);
}

#[tokio::test]
async fn a_throttled_table_is_asked_again() {
    let (stack, acme) = stack(0).await;
    stack
        .dynamodb_faults(json!({"rules": [{"mode": "throttle", "table": "conversations", "times": 1}]}))
        .await;
    stack.forget_dynamodb_calls().await;
    acme.ask(QUESTION).await;
    let calls = stack.dynamodb_calls().await;
    let throttled: Vec<_> = calls.iter().filter(|call| call["error"] == "ThrottlingException").collect();
    assert_eq!(throttled.len(), 1, "{calls:?}");
    // The answer is settled and kept in one transaction.
    let [ledger, turns] = ["bulkhead-audit", "bulkhead-conversations"];
    assert_eq!(throttled[0]["tables"], json!([ledger, turns]));
    let settled = |call: &&Value| call["tables"] == json!([ledger, turns]) && call["error"].is_null();
    assert_eq!(calls.iter().filter(settled).count(), 1, "{calls:?}");

    // Nothing is left of what a test asked for.
    stack.dynamodb_faults(json!({"rules": [{"mode": "error"}]})).await;
    acme.chat(json!({"message": QUESTION})).await.expect_error(503, "unavailable");
    stack.clear_dynamodb_faults().await;
    acme.ask(QUESTION).await;
}

#[tokio::test]
async fn an_overloaded_model_is_asked_again_and_then_reported() {
    let (stack, acme) = stack(0).await;
    stack.model_fault(json!({"mode": "status", "status": 529, "count": 1})).await;
    acme.ask(QUESTION).await;
    stack.model_fault(json!({"mode": "status", "status": 529, "count": 10})).await;
    acme.chat(json!({"message": QUESTION})).await.expect_error(502, "model_unavailable");
    // Asked to wait longer than it is worth: passed on at once, with the time to wait.
    stack.model_fault(json!({"mode": "status", "status": 429, "count": 1, "retry_after": 30})).await;
    let answer = acme.chat(json!({"message": QUESTION, "stream": true})).await;
    assert_eq!(answer.expect_error(502, "model_unavailable")["retry_after_ms"], 30_000);
    assert_eq!(answer.headers["retry-after"], "30");
    // The account is full: whoever can be asked to wait for it waits, and is told so.
    stack.model_fault(json!({"mode": "none"})).await;
    let refused = acme.chat(json!({"message": QUESTION})).await.expect_error(503, "unavailable");
    assert_eq!(refused["limit"], "model_account");
    stack.tenant("globex").ask(QUESTION).await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_ends_in_an_error_and_is_not_kept() {
    let (stack, acme) = stack(0).await;
    let first = acme.ask(QUESTION).await;
    let again = json!({"message": QUESTION, "conversation_id": first["conversation_id"]});
    for mode in ["cut_after_deltas", "error_event_after_deltas"] {
        stack.model_fault(json!({"mode": mode, "n": 2, "count": 1})).await;
        acme.chat(again.clone()).await.expect_error(502, "model_unavailable");
        stack.model_fault(json!({"mode": mode, "n": 2, "count": 1})).await;
        let events = all_events(acme.open_stream(again.clone()).await).await;
        let last = events.last().unwrap();
        assert_eq!((events[0].name.as_str(), last.name.as_str()), ("meta", "error"));
        assert_eq!(last.data["error"]["code"], "model_unavailable");
        assert!(events.iter().any(|e| e.name == "delta"), "what came before the fault was shown");
    }
    stack.model_fault(json!({"mode": "none"})).await;
    acme.chat(again).await.expect_status(StatusCode::OK);
    let messages = stack.last_model_request().await["messages"].as_array().unwrap().len();
    assert_eq!(messages, 3, "broken answers are no part of the conversation");
}

/// What is asked on the way has the request's own time, and the answer comes before Lambda ends the function.
#[tokio::test]
async fn a_service_that_hangs_is_said_before_the_time_is_over() {
    const LIMIT_MS: u64 = 6_000;
    let (stack, acme) = stack(0).await;
    acme.ask(QUESTION).await;
    stack.limit_time("chat", LIMIT_MS).await;
    let limit = std::time::Duration::from_millis(LIMIT_MS);
    stack.model_fault(json!({"mode": "hang", "n": 0})).await;
    let began = std::time::Instant::now();
    acme.chat(json!({"message": QUESTION})).await.expect_error(504, "deadline_exceeded");
    let took = began.elapsed();
    assert!(took > limit / 2 && took < limit, "it was answered after {took:?}");
    // Once a stream has begun, the same is its last event.
    stack.model_fault(json!({"mode": "hang", "n": 2})).await;
    let events = all_events(acme.open_stream(json!({"message": QUESTION})).await).await;
    let last = events.last().unwrap();
    assert_eq!((last.name.as_str(), &last.data["error"]["code"]), ("error", &json!("deadline_exceeded")));
    stack.model_fault(json!({"mode": "none"})).await;
    acme.ask(QUESTION).await;
    stack.stop().await;

    // Embeddings that take a request and never answer it.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((connection, _)) = silent.accept().await {
            held.push(connection);
        }
    });
    let embeddings = tests::Embeddings {
        url,
        key: "some-key".to_owned(),
        model: "text-embedding-3-small".to_owned(),
        dimensions: 1_536,
    };
    let stack = Stack::start_with(Options { embeddings: Some(embeddings), ..Options::default() }).await;
    stack.limit_time("ingestion", LIMIT_MS).await;
    let acme = stack.tenant("acme");
    acme.post("/v1/search", &json!({"query": "x"})).await.expect_error(504, "deadline_exceeded");
}

#[tokio::test]
async fn a_client_that_hangs_up_does_not_stop_the_answer() {
    let (_stack, acme) = stack(100).await;
    let mut response = acme.open_stream(json!({"message": QUESTION})).await;
    let mut buffer = Vec::new();
    let meta = tests::next_event(&mut response, &mut buffer).await.unwrap();
    drop(response);
    // The answer is read to its end all the same, and the conversation holds it.
    let conversation = meta.data["conversation_id"].clone();
    let go_on = json!({"message": "And then?", "conversation_id": conversation});
    let mut tries = 0;
    loop {
        let answer = acme.chat(go_on.clone()).await;
        tries += 1;
        if answer.status == StatusCode::OK {
            break;
        }
        answer.expect_error(404, "not_found");
        assert!(tries < 60, "the answer was never kept");
        tokio::time::sleep(std::time::Duration::from_millis(250)).await;
    }
}

#[tokio::test]
async fn a_taken_port_and_a_used_directory_are_said_in_one_sentence() {
    let (stack, _) = stack(0).await;
    let data = tempfile::tempdir().unwrap();
    let port = stack.url().rsplit(':').next().unwrap();
    let said = tests::run_local(&["--port", port, "--data", data.path().to_str().unwrap()]).await;
    assert!(said.contains(&format!("port {port} cannot be used")), "{said}");
    assert!(
        said.contains("--port") && said.lines().filter(|l| l.starts_with("error:")).count() == 1,
        "{said}"
    );
    let said = tests::run_local(&["--port", "0", "--data", stack.data().to_str().unwrap()]).await;
    assert!(said.contains("another stack is running on"), "{said}");
}

#[tokio::test]
async fn a_stack_leaves_no_process_behind() {
    let (stack, _) = stack(0).await;
    let children = stack.children();
    assert!(children.len() >= 2, "{children:?}");
    assert!(stack.stop().await.success());
    for pid in children {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
    }
}
