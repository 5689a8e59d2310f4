//! What users come back to: their conversations, and what they say that answers are worth.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::{Answer, Options, Stack, Tenant, next_event};
use tokio::time::{Instant, sleep};

const LEAVE: &str =
    "Every employee has 25 days of paid annual leave. Up to 5 days may be carried over to March.";
/// How long the exporter may take. Generous: this is no measurement.
const PATIENCE: Duration = Duration::from_secs(60);

async fn stack() -> (Stack, Tenant) {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("handbook", "Staff handbook", LEAVE).await;
    (stack, acme)
}

fn path(asked: &Value) -> String {
    format!("/v1/conversations/{}", asked["conversation_id"].as_str().unwrap())
}

async fn go_on(tenant: &Tenant, asked: &Value, message: &str) -> Value {
    let body = json!({"message": message, "conversation_id": asked["conversation_id"]});
    tenant.chat(body).await.expect_status(StatusCode::OK).json()
}

/// All ids of a list, read in pages, and the pages' sizes.
async fn listed(tenant: &Tenant, query: &str) -> Vec<Value> {
    let (mut all, mut path) = (Vec::new(), format!("/v1/conversations?{query}"));
    loop {
        let page = tenant.get(&path).await.expect_status(StatusCode::OK).json();
        all.extend(page["conversations"].as_array().unwrap().iter().cloned());
        match page["cursor"].as_str() {
            Some(cursor) => path = format!("/v1/conversations?{query}&cursor={cursor}"),
            None => return all,
        }
    }
}

fn ids(listed: &[Value]) -> Vec<&Value> {
    listed.iter().map(|conversation| &conversation["id"]).collect()
}

/// What the table holds of conversations, by kind.
async fn kept(stack: &Stack) -> [usize; 3] {
    let count = async |prefix: &str| stack.items("conversations", "acme", prefix).await.len();
    [count("LIST#").await, count("CONV#").await, count("ANSWER#").await]
}

async fn events(stack: &Stack, action: &str) -> Vec<Value> {
    let events = stack.items("audit", "acme", "EVENT#").await;
    events.into_iter().filter(|event| event["action"] == action).collect()
}

#[tokio::test]
async fn a_users_conversations_are_listed_newest_first_and_nobody_elses() {
    let (stack, acme) = stack().await;
    let (ann, bob) = (acme.as_user("ann"), acme.as_user("bob#0"));
    let first = ann.ask("How many days of\nannual leave are there?").await;
    let second = ann.ask(&"A long question ".repeat(30)).await;
    let third = ann.ask("And a third?").await;
    let of_bob = bob.ask("What does bob want?").await;
    let nobodys = acme.ask("Who asks?").await;
    // The order is that of their beginnings; the last question shows.
    go_on(&ann, &first, "And how many may be carried over?").await;

    for query in ["limit=1", "limit=2", "limit=3", "limit=100"] {
        let listed = listed(&ann, query).await;
        let expected = [&third, &second, &first].map(|asked| &asked["conversation_id"]);
        assert_eq!(ids(&listed), expected, "{query}");
        assert_eq!(listed[2]["title"], "How many days of annual leave are there?");
        assert!(listed[1]["title"].as_str().unwrap().ends_with('…'), "{listed:?}");
        assert!(listed[2]["updated_at"].as_str() > listed[2]["created_at"].as_str(), "{listed:?}");
        assert!(listed.iter().all(|conversation| conversation["user"] == "ann"));
    }
    assert_eq!(ids(&listed(&bob, "limit=5").await), [&of_bob["conversation_id"]]);
    assert_eq!(ids(&listed(&acme, "limit=5").await), [&nobodys["conversation_id"]]);
    // The tenant's application may name the user in the address; a request may not name two.
    assert_eq!(ids(&listed(&acme, "user=bob%230").await), [&of_bob["conversation_id"]]);
    assert_eq!(listed(&ann, "user=ann").await.len(), 3);
    let refused = ann.get("/v1/conversations?user=bob%230").await.expect_error(400, "invalid_request");
    assert_eq!(refused["param"], "user");
    assert_eq!(listed(&acme, "user=nobody").await, Vec::<Value>::new());
    assert_eq!(listed(&stack.tenant("globex").as_user("ann"), "limit=5").await, Vec::<Value>::new());
    // Who lists is on record.
    let noted = events(&stack, "conversations_listed").await;
    assert!(noted.iter().any(|event| event["user_id"] == "ann"), "{noted:?}");

    for bad in ["limit=0", "limit=101", "cursor=", "cursor=x", "user=", "cursor=000000000000000.conv_x"] {
        ann.get(&format!("/v1/conversations?{bad}")).await.expect_error(400, "invalid_request");
    }
    stack.stop().await;
}

#[tokio::test]
async fn a_conversation_is_read_as_it_went_and_the_log_knows_what_was_shown() {
    let (stack, acme) = stack().await;
    let ann = acme.as_user("ann");
    let first = ann.ask("How many days of annual leave are there?").await;
    let mut answers = vec![first.clone()];
    for question in ["How many days of leave may be carried over?", "What of the moon?"] {
        answers.push(go_on(&ann, &first, question).await);
    }
    let whole = ann.get(&path(&first)).await.expect_status(StatusCode::OK).json();
    assert_eq!(whole["id"], first["conversation_id"]);
    assert_eq!(whole["title"], "How many days of annual leave are there?");
    let turns = whole["turns"].as_array().unwrap();
    for (turn, answer) in turns.iter().zip(&answers) {
        for field in ["id", "response", "citations", "usage", "latency_ms"] {
            assert_eq!(turn[field], answer[field], "{field}");
        }
    }
    assert_eq!(turns[1]["message"], "How many days of leave may be carried over?");
    let mut paged = Vec::new();
    let mut next = format!("{}?limit=1", path(&first));
    loop {
        let page = ann.get(&next).await.expect_status(StatusCode::OK).json();
        paged.extend(page["turns"].as_array().unwrap().iter().cloned());
        let Some(cursor) = page["cursor"].as_str() else { break };
        next = format!("{}?limit=1&cursor={cursor}", path(&first));
    }
    assert_eq!(&paged, turns);
    // Who was shown a passage is asked of the log.
    let noted = events(&stack, "conversation_read").await;
    let chunk = &first["citations"][0]["chunk_id"];
    assert_eq!(noted[0]["subject"], first["conversation_id"]);
    assert_eq!((&noted[0]["documents"], &noted[0]["chunks"]), (&json!(["handbook"]), &json!([chunk])));
    assert_eq!(noted[0]["user_id"], "ann");

    for other in [acme.as_user("bob"), acme.clone(), stack.tenant("globex").as_user("ann")] {
        other.get(&path(&first)).await.expect_error(404, "not_found");
        other.delete(&path(&first)).await.expect_error(404, "not_found");
    }
    for id in ["x", "conv_", "conv_0123456789012345678901", "%2e%2e", "conv_%23"] {
        ann.get(&format!("/v1/conversations/{id}")).await.expect_error(404, "not_found");
        ann.delete(&format!("/v1/conversations/{id}")).await.expect_error(404, "not_found");
    }
    ann.get(&format!("{}?limit=0", path(&first))).await.expect_error(400, "invalid_request");
    ann.get(&format!("{}?cursor=7", path(&first))).await.expect_error(400, "invalid_request");
    stack.stop().await;
}

#[tokio::test]
async fn a_deleted_conversation_leaves_nothing() {
    let (stack, acme) = stack().await;
    let stays = acme.ask("How many days of annual leave are there?").await;
    let gone = acme.ask("How many days may be carried over?").await;
    for n in 0..30 {
        go_on(&acme, &gone, &format!("And what else, for the {n}th time?")).await;
    }
    let keyed = async |body: &Value| {
        let request = acme.request(Method::POST, "/v1/chat").header("idempotency-key", "k");
        Answer::read(request.json(body).send().await.unwrap()).await
    };
    let once = json!({"message": "KEYED: how many days?", "conversation_id": gone["conversation_id"]});
    let first = keyed(&once).await.expect_status(StatusCode::OK);
    assert_eq!(first.text, keyed(&once).await.text);
    let rated = json!({"id": gone["id"], "rating": "down", "comment": "COMMENT"});
    acme.post("/v1/feedback", &rated).await.expect_status(StatusCode::CREATED);
    assert_eq!(kept(&stack).await, [2, 33, 33]);
    acme.delete(&path(&gone)).await.expect_status(StatusCode::NO_CONTENT);
    assert_eq!(kept(&stack).await, [1, 1, 1]);
    let left = Value::from(stack.items("conversations", "acme", "").await).to_string();
    for word in ["COMMENT", "KEYED", gone["id"].as_str().unwrap(), gone["conversation_id"].as_str().unwrap()]
    {
        assert!(!left.contains(word), "{word}: {left}");
    }
    keyed(&once).await.expect_error(404, "not_found");
    acme.get(&path(&gone)).await.expect_error(404, "not_found");
    acme.delete(&path(&gone)).await.expect_error(404, "not_found");
    acme.post("/v1/feedback", &rated).await.expect_error(404, "not_found");
    let more = json!({"message": "And?", "conversation_id": gone["conversation_id"]});
    acme.chat(more).await.expect_error(404, "not_found");
    assert_eq!(ids(&listed(&acme, "limit=5").await), [&stays["conversation_id"]]);
    go_on(&acme, &stays, "And?").await;
    let noted = events(&stack, "conversation_deleted").await;
    assert_eq!((noted.len(), &noted[0]["subject"]), (1, &gone["conversation_id"]));
    stack.stop().await;
}

#[tokio::test]
async fn an_answer_on_its_way_adds_nothing_to_a_deleted_conversation() {
    let stack = Stack::start_with(Options { model_delay_ms: 100, ..Options::default() }).await;
    let acme = stack.tenant("acme");
    acme.store("handbook", "Staff handbook", LEAVE).await;
    let asked = acme.ask("How many days of annual leave are there?").await;
    let more =
        json!({"message": "How many days of leave are there?", "conversation_id": asked["conversation_id"]});
    let mut response = acme.open_stream(more).await;
    let mut buffer = Vec::new();
    assert_eq!(next_event(&mut response, &mut buffer).await.unwrap().name, "meta");
    acme.delete(&path(&asked)).await.expect_status(StatusCode::NO_CONTENT);
    let mut last = Value::Null;
    while let Some(event) = next_event(&mut response, &mut buffer).await {
        assert_ne!(event.name, "error", "{event:?}");
        last = event.data;
    }
    assert!(last["response"].as_str().unwrap().contains("25 days"), "{last}");
    assert_eq!(kept(&stack).await, [0, 0, 0]);
    // It is on record and charged all the same.
    let tickets = stack.items("audit", "acme", "TICKET#").await;
    assert_eq!(tickets.last().unwrap()["cost_nano_usd"], last["usage"]["cost_nano_usd"]);
    stack.stop().await;
}

#[tokio::test]
async fn a_deletion_that_broke_off_shows_nothing_and_is_gone_on_with() {
    let (stack, acme) = stack().await;
    let asked = acme.ask("How many days of annual leave are there?").await;
    go_on(&acme, &asked, "And?").await;
    let fault = json!({"mode": "error", "table": "conversations", "operation": "BatchWriteItem"});
    stack.dynamodb_faults(json!({"rules": [fault]})).await;
    acme.delete(&path(&asked)).await.expect_error(503, "unavailable");
    stack.clear_dynamodb_faults().await;
    assert_eq!(kept(&stack).await, [1, 2, 2]);
    let titles = Value::from(stack.items("conversations", "acme", "LIST#").await).to_string();
    assert!(!titles.contains("annual leave"), "{titles}");
    acme.get(&path(&asked)).await.expect_error(404, "not_found");
    let more = json!({"message": "And?", "conversation_id": asked["conversation_id"]});
    acme.chat(more).await.expect_error(404, "not_found");
    assert_eq!(listed(&acme, "limit=5").await, Vec::<Value>::new());
    acme.delete(&path(&asked)).await.expect_status(StatusCode::NO_CONTENT);
    assert_eq!(kept(&stack).await, [0, 0, 0]);
    stack.stop().await;
}

#[tokio::test]
async fn a_conversations_history_is_capped_in_tokens() {
    let stack = Stack::start_with(Options { no_seed: true, ..Options::default() }).await;
    let limits = json!({"max_context_tokens": 4_000, "requests_per_minute": 100});
    let body = json!({"tenant_id": "small", "tier": "free", "company_name": "Small", "limits": limits});
    let tenant = stack.provision(body).await;
    let asked = tenant.ask("question-first").await;
    for n in 0..12 {
        go_on(&tenant, &asked, &format!("question-{n} {}", "word ".repeat(100))).await;
    }
    go_on(&tenant, &asked, "And?").await;
    let sent = stack.last_model_request().await["messages"].to_string();
    assert!(sent.contains("question-11") && !sent.contains("question-5"), "{sent}");
    // A third of the context, at three bytes a token.
    assert!(sent.len() < 4_000 + 1_000, "{} bytes", sent.len());
    stack.stop().await;
}

async fn rate(tenant: &Tenant, id: &Value, rating: &str) -> Answer {
    tenant.post("/v1/feedback", &json!({"id": id, "rating": rating})).await
}

#[tokio::test]
async fn feedback_is_kept_once_and_shows_in_usage_audit_and_conversation() {
    let (stack, acme) = stack().await;
    let ann = acme.as_user("ann");
    let liked = ann.ask("How many days of annual leave are there?").await;
    let disliked = ann.ask("How many days may be carried over?").await;
    let body = json!({"messages": [{"role": "user", "content": "How many days of leave are there?"}]});
    let completed = ann.post("/v1/chat/completions", &body).await.expect_status(StatusCode::OK).json();

    let up = json!({"id": liked["id"], "rating": "up", "comment": "It was right."});
    let answered = ann.post("/v1/feedback", &up).await.expect_status(StatusCode::CREATED);
    assert_eq!(answered.json(), up);
    assert_eq!(ann.post("/v1/feedback", &up).await.expect_status(StatusCode::CREATED).json(), up);
    let other = rate(&ann, &liked["id"], "down").await.expect_error(409, "conflict");
    assert_eq!(other["param"], "id");
    rate(&ann, &disliked["id"], "down").await.expect_status(StatusCode::CREATED);
    // An answer in OpenAI's form is an answer. What is said of it is counted in characters.
    let long = json!({"id": completed["id"], "rating": "up", "comment": "ж".repeat(4_000)});
    ann.post("/v1/feedback", &long).await.expect_status(StatusCode::CREATED);

    // Nobody else's answer is there to be rated.
    for tenant in [acme.as_user("bob"), acme.clone(), stack.tenant("globex").as_user("ann")] {
        rate(&tenant, &disliked["id"], "up").await.expect_error(404, "not_found");
    }
    for (body, status, code, param) in [
        (json!({"rating": "up"}), 400, "invalid_request", Some("id")),
        (json!({"id": 7, "rating": "up"}), 400, "invalid_request", Some("id")),
        (json!({"id": liked["id"]}), 400, "invalid_request", Some("rating")),
        (json!({"id": liked["id"], "rating": "great"}), 400, "invalid_request", Some("rating")),
        (json!({"id": liked["id"], "rating": "up", "stars": 5}), 400, "invalid_request", Some("stars")),
        (json!({"id": liked["id"], "rating": "up", "comment": 5}), 400, "invalid_request", Some("comment")),
        (
            json!({"id": liked["id"], "rating": "up", "comment": "ж".repeat(4_001)}),
            413,
            "too_large",
            Some("comment"),
        ),
        (json!({"id": "msg_x", "rating": "up"}), 404, "not_found", None),
        (json!({"id": format!("msg_{}", "x".repeat(22)), "rating": "up"}), 404, "not_found", None),
    ] {
        let error = ann.post("/v1/feedback", &body).await.expect_error(status, code);
        assert_eq!(error["param"].as_str(), param, "{body}: {error}");
    }

    // In the conversation, with the user's words; on record, without them.
    let whole = ann.get(&path(&liked)).await.expect_status(StatusCode::OK).json();
    assert_eq!(whole["turns"][0]["feedback"], json!({"rating": "up", "comment": "It was right."}));
    let ups = events(&stack, "feedback_up").await;
    let subjects: Vec<&Value> = ups.iter().map(|event| &event["subject"]).collect();
    assert_eq!(subjects, [&liked["id"], &completed["id"]]);
    assert!(!Value::from(ups.clone()).to_string().contains("It was right"), "{ups:?}");
    let mut ticket = stack.items("audit", "acme", "TICKET#").await.into_iter();
    let ticket = ticket.rfind(|record| record["subject"] == disliked["id"]);
    let down = events(&stack, "feedback_down").await;
    assert_eq!((down.len(), &down[0]["subject"]), (1, &ticket.unwrap()["subject"]));
    assert_eq!(down[0]["user_id"], "ann");

    // On the bill, once the log has it; and the books agree.
    let began = Instant::now();
    loop {
        let usage = acme.get("/v1/usage").await.expect_status(StatusCode::OK).json();
        let counts = |of: &Value| [of["feedback_up"].clone(), of["feedback_down"].clone()];
        if counts(&usage) == [2, 1] {
            let model = ups[0]["model"].as_str().unwrap();
            assert_eq!(counts(&usage["models"][model]), [2, 1], "{usage}");
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{usage}");
        sleep(Duration::from_secs(1)).await;
    }
    let csv = acme.request(Method::GET, "/v1/usage").header("accept", "text/csv").send().await.unwrap();
    let csv = csv.text().await.unwrap();
    assert!(csv.lines().next().unwrap().ends_with(",feedback_up,feedback_down"), "{csv}");
    assert!(csv.lines().any(|line| line.ends_with(",2,1")), "{csv}");
    let report = stack.invoke("reconciler", json!({"job": "verify"})).await;
    assert_eq!(report["differences"], json!([]), "{report}");
    stack.stop().await;
}

#[tokio::test]
async fn feedback_with_an_idempotency_key_is_one() {
    let (stack, acme) = stack().await;
    let asked = acme.ask("How many days of annual leave are there?").await;
    let send = async |body: Value| {
        let request = acme.request(Method::POST, "/v1/feedback").header("idempotency-key", "k");
        Answer::read(request.json(&body).send().await.unwrap()).await
    };
    let up = json!({"id": asked["id"], "rating": "up"});
    let first = send(up.clone()).await.expect_status(StatusCode::CREATED);
    let again = send(up).await.expect_status(StatusCode::CREATED);
    assert_eq!(first.text, again.text);
    send(json!({"id": asked["id"], "rating": "down"})).await.expect_error(400, "invalid_request");
    assert_eq!(events(&stack, "feedback_up").await.len(), 1);
    stack.stop().await;
}
