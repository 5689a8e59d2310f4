//! The answers, and the protocol over real HTTP.

use std::sync::atomic::{AtomicI64, Ordering};

use super::*;

fn result(title: &str, texts: &[&str]) -> Value {
    let texts: Vec<Value> = texts.iter().map(|text| json!({"type": "text", "text": text})).collect();
    let source = format!("doc:{title}");
    json!({"type": "search_result", "source": source, "title": title, "content": texts, "citations": {"enabled": true}})
}

fn text(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

fn handbook() -> Vec<Value> {
    vec![
        result("Dogs", &["Employees may bring dogs on Fridays. Dogs stay on a leash."]),
        result(
            "Vacation",
            &[
                "# Vacation",
                "Every employee is entitled to 28 days of paid vacation per year. Unused days expire in March. See Dr. Braun for exceptions.",
            ],
        ),
        result("Contract", &["The contract was signed by Ada Example on 3 May."]),
    ]
}

fn asking(question: &str) -> Value {
    let mut content = handbook();
    content.push(text(question));
    json!({"model": "claude-haiku-4-5", "max_tokens": 500, "messages": [{"role": "user", "content": content}]})
}

fn answered(request: &Value) -> Answer {
    answer(&Request::parse(request.to_string().as_bytes(), false).unwrap())
}

fn said(answer: &Answer) -> String {
    answer.blocks.iter().map(|block| block.text.as_str()).collect()
}

#[test]
fn the_best_sentence_is_quoted_and_cited() {
    let answer = answered(&asking("How many vacation days do employees have per year?"));
    let quote = answer.blocks.iter().find(|block| block.citation.is_some()).unwrap();
    assert_eq!(quote.text, "Every employee is entitled to 28 days of paid vacation per year.");
    let citation = quote.citation.as_ref().unwrap();
    assert_eq!((citation.search_result_index, citation.block_index), (1, 1));
    assert_eq!((citation.source.as_str(), citation.title.as_str()), ("doc:Vacation", "Vacation"));
    assert!(citation.cited_text.contains(&quote.text) && citation.cited_text.ends_with("exceptions."));
    assert_eq!(citation.json()["end_block_index"], 2);
    assert_eq!(answer.stop_reason, "end_turn");
    assert_eq!(
        answer.output_tokens,
        answer.blocks.iter().map(|block| crate::lexis::count_tokens(&block.text)).sum::<u64>()
    );
    let passages: std::collections::BTreeSet<_> =
        answer.blocks.iter().filter_map(|block| Some(block.citation.as_ref()?.search_result_index)).collect();
    assert!(passages.len() <= 3);
}

#[test]
fn what_is_not_there_is_not_answered() {
    // Nor is what shares a word with a passage that is about something else.
    for question in [
        "Which colour has the moon?",
        "How often does the space agency send employees to Mars?",
        "Which composer signed the score of the fifth symphony?",
    ] {
        let answer = answered(&asking(question));
        assert_eq!(said(&answer), "The documents I was given do not answer this question.", "{question}");
        assert!(answer.blocks.iter().all(|block| block.citation.is_none()));
    }
    let none = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello?"}]});
    assert!(said(&answered(&none)).starts_with("I was given no documents"));
}

#[test]
fn a_question_without_words_of_its_own_leans_on_the_one_before() {
    let mut request = asking("Tell me about the contract");
    let history =
        json!([{"role": "assistant", "content": "…"}, {"role": "user", "content": "And who was that?"}]);
    request["messages"].as_array_mut().unwrap().extend(history.as_array().unwrap().clone());
    assert!(said(&answered(&request)).contains("signed by Ada Example"));
}

#[test]
fn passages_in_plain_text_are_marked() {
    let prompt = "<passage-k7 id=\"P1\" title=\"Dogs\">\nDogs stay on a leash.\n</passage-k7>\n\
        <passage-k7 id=\"P2\">\nVacation is 28 days.\n</passage-x>\n<passage-k7 id=\"P3\">\nNo vacation in May.\n</passage-k7>\n\
        How long is the vacation?";
    let request = json!({"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": prompt}]});
    let answer = answered(&request);
    assert_eq!(answer.blocks.len(), 1);
    assert!(said(&answer).contains("Vacation is 28 days. [[P2]]"), "{}", said(&answer));
    assert!(!said(&answer).contains("[[P1]]"));
}

#[test]
fn limits_truly_cut() {
    let whole = answered(&asking("How many vacation days?"));
    for max in 1..whole.output_tokens {
        let mut request = asking("How many vacation days?");
        request["max_tokens"] = json!(max);
        let cut = answered(&request);
        assert_eq!((cut.stop_reason, cut.output_tokens), ("max_tokens", max));
        assert!(said(&whole).starts_with(&said(&cut)));
        assert_eq!(cut.blocks.iter().map(|block| crate::lexis::count_tokens(&block.text)).sum::<u64>(), max);
    }
    let mut request = asking("How many vacation days?");
    request["stop_sequences"] = json!(["paid"]);
    let stopped = answered(&request);
    assert_eq!((stopped.stop_reason, stopped.stop_sequence.as_deref()), ("stop_sequence", Some("paid")));
    assert!(said(&stopped).ends_with("28 days of "));
}

struct Server {
    url: String,
    minutes: Arc<AtomicI64>,
}

impl Server {
    async fn start(options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let minutes = Arc::new(AtomicI64::new(0));
        let clock = Arc::clone(&minutes);
        let now = move || OffsetDateTime::UNIX_EPOCH + time::Duration::minutes(clock.load(Ordering::SeqCst));
        tokio::spawn(serve(listener, options, now, std::future::pending()));
        Self { url, minutes }
    }

    async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        reqwest::Client::new()
            .post(format!("{}{path}", self.url))
            .header("x-api-key", "key")
            .header("anthropic-version", "2023-06-01")
            .body(body.to_string())
            .send()
            .await
            .unwrap()
    }

    async fn ask(&self, body: &Value) -> Value {
        self.post("/v1/messages", body).await.json().await.unwrap()
    }

    async fn fault(&self, fault: Value) {
        assert_eq!(self.post("/_faults", &fault).await.status(), 204);
    }
}

fn events(body: &str) -> Vec<(String, Value)> {
    let event = |part: &str| {
        let (name, data) = part.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        (name.to_owned(), data)
    };
    body.split("\n\n").filter(|part| !part.is_empty()).map(event).collect()
}

#[tokio::test]
async fn a_stream_adds_up_to_the_json_answer() {
    let server = Server::start(Options::default()).await;
    let mut request = asking("How many vacation days do employees have, and who signed the contract?");
    let whole = server.ask(&request).await;
    assert_eq!(whole["model"], "offline-model:claude-haiku-4-5");
    request["stream"] = json!(true);
    let response = server.post("/v1/messages", &request).await;
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    assert!(response.headers()["request-id"].to_str().unwrap().starts_with("req_"));
    assert_eq!(response.headers()["anthropic-ratelimit-requests-remaining"], "3998");
    let events = events(&response.text().await.unwrap());

    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    let block = ["content_block_start", "content_block_delta", "content_block_stop"];
    let mut expected =
        vec!["message_start", "content_block_start", "ping", "content_block_delta", "content_block_stop"];
    for _ in 1..whole["content"].as_array().unwrap().len() {
        expected.extend(block);
    }
    expected.extend(["message_delta", "message_stop"]);
    assert_eq!(names, expected);

    let mut message = events[0].1["message"].clone();
    for (name, event) in &events {
        let index = event["index"].as_u64().unwrap_or_default() as usize;
        match name.as_str() {
            "content_block_start" => {
                assert_eq!(message["content"].as_array().unwrap().len(), index);
                message["content"].as_array_mut().unwrap().push(event["content_block"].clone());
            }
            "content_block_delta" => {
                let block = &mut message["content"][index];
                match event["delta"]["type"].as_str().unwrap() {
                    "text_delta" => {
                        let text = format!(
                            "{}{}",
                            block["text"].as_str().unwrap(),
                            event["delta"]["text"].as_str().unwrap()
                        );
                        block["text"] = json!(text);
                    }
                    "citations_delta" => {
                        block["citations"].as_array_mut().unwrap().push(event["delta"]["citation"].clone())
                    }
                    other => panic!("{other}"),
                }
            }
            "message_delta" => {
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["usage"] = event["usage"].clone();
            }
            _ => {}
        }
    }
    message["id"] = whole["id"].clone();
    assert_eq!(message, whole);

    let mut counting = request.clone();
    counting.as_object_mut().unwrap().remove("max_tokens");
    counting.as_object_mut().unwrap().remove("stream");
    let counted: Value = server.post("/v1/messages/count_tokens", &counting).await.json().await.unwrap();
    assert_eq!(counted["input_tokens"], whole["usage"]["input_tokens"]);

    let seen: Value =
        reqwest::get(format!("{}/_requests?last=2", server.url)).await.unwrap().json().await.unwrap();
    assert_eq!(seen[0], json!({"path": "/v1/messages", "api_key": "key", "trace": "", "body": request}));
    assert_eq!(seen[1]["path"], "/v1/messages/count_tokens");
}

#[tokio::test]
async fn prefixes_are_written_once_and_read_for_five_minutes() {
    let server = Server::start(Options::default()).await;
    let long = "rule ".repeat(1_100);
    let request = |question: &str| {
        json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": question}],
            "system": [{"type": "text", "text": long, "cache_control": {"type": "ephemeral"}}]})
    };
    let usage = |answer: Value| {
        let usage = &answer["usage"];
        ["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"]
            .map(|field| usage[field].as_u64().unwrap())
    };
    let first = usage(server.ask(&request("One?")).await);
    assert_eq!(first, [5, 1_100, 0]);
    server.minutes.store(4, Ordering::SeqCst);
    assert_eq!(usage(server.ask(&request("Two more?")).await), [6, 0, 1_100]);
    // Reading refreshed it; then it runs out.
    server.minutes.store(8, Ordering::SeqCst);
    assert_eq!(usage(server.ask(&request("One?")).await), [5, 0, 1_100]);
    server.minutes.store(14, Ordering::SeqCst);
    assert_eq!(usage(server.ask(&request("One?")).await), first);
    let mut short = request("One?");
    short["system"][0]["text"] = json!("rule ".repeat(1_000));
    assert_eq!(usage(server.ask(&short).await), [1_005, 0, 0]);
}

#[tokio::test]
async fn bad_requests_are_refused_as_the_real_one_refuses() {
    let server = Server::start(Options::default()).await;
    let with = |field: &str, value: Value| {
        let mut request = asking("What?");
        match value {
            Value::Null => drop(request.as_object_mut().unwrap().remove(field)),
            value => request[field] = value,
        }
        request
    };
    for (request, begins) in [
        (with("messages", json!([])), "messages: at least one"),
        (with("messages", Value::Null), "messages: Field required"),
        (with("messages", json!([{"role": "robot", "content": "x"}])), "messages.0.role"),
        (
            with("messages", json!([{"role": "user", "content": []}])),
            "messages.0: user messages must have non-empty",
        ),
        (
            with(
                "messages",
                json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]),
            ),
            "This model does not support",
        ),
        (
            with("messages", json!([{"role": "user", "content": [{"type": "video"}]}])),
            "messages.0.content.0: Input tag",
        ),
        (with("max_tokens", json!(0)), "max_tokens"),
        (with("max_tokens", Value::Null), "max_tokens: Field required"),
        (with("model", Value::Null), "model: Field required"),
        (with("temprature", json!(1)), "temprature: Extra inputs"),
    ] {
        let response = server.post("/v1/messages", &request).await;
        let status = response.status();
        let answer: Value = response.json().await.unwrap();
        assert_eq!(
            (status.as_u16(), &answer["error"]["type"]),
            (400, &json!("invalid_request_error")),
            "{answer}"
        );
        assert!(answer["error"]["message"].as_str().unwrap().starts_with(begins), "{answer}");
        assert_eq!(answer["type"], "error");
    }
    let bare = reqwest::Client::new().post(format!("{}/v1/messages", server.url)).body("{}");
    assert_eq!(bare.try_clone().unwrap().send().await.unwrap().status(), 401);
    assert_eq!(bare.header("x-api-key", "k").send().await.unwrap().status(), 400);
    let strict = Server::start(Options { api_key: Some("other".to_owned()), ..Options::default() }).await;
    assert_eq!(strict.post("/v1/messages", &asking("What?")).await.status(), 401);
}

#[tokio::test]
async fn faults_strike_where_they_are_asked_to() {
    let server = Server::start(Options::default()).await;
    let mut request = asking("How many vacation days?");
    server.fault(json!({"mode": "status", "status": 529, "count": 2, "retry_after": 7})).await;
    for _ in 0..2 {
        let response = server.post("/v1/messages", &request).await;
        assert_eq!(
            (response.status().as_u16(), &response.headers()["retry-after"]),
            (529, &HeaderValue::from_static("7"))
        );
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["type"], "overloaded_error");
    }
    assert_eq!(server.post("/v1/messages", &request).await.status(), 200);

    request["stream"] = json!(true);
    server.fault(json!({"mode": "cut_after_deltas", "n": 3})).await;
    let mut response = server.post("/v1/messages", &request).await;
    let mut body = Vec::new();
    let error = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => panic!("the stream ended as if it were whole"),
            Err(error) => break error,
        }
    };
    assert!(error.is_body() || error.is_decode() || error.is_request(), "{error:?}");
    let got = events(&String::from_utf8(body).unwrap());
    assert_eq!(got.iter().filter(|(name, _)| name == "content_block_delta").count(), 3);

    server.fault(json!({"mode": "error_event_after_deltas", "n": 1})).await;
    let got = events(&server.post("/v1/messages", &request).await.text().await.unwrap());
    assert_eq!(got.last().unwrap().1["error"]["type"], "overloaded_error");

    server.fault(json!({"mode": "hang"})).await;
    let hung = tokio::time::timeout(Duration::from_millis(100), server.post("/v1/messages", &request)).await;
    assert!(hung.is_err());
    server.fault(json!({"mode": "none"})).await;
    assert!(server.post("/v1/messages", &request).await.text().await.unwrap().contains("message_stop"));
    assert_eq!(server.post("/_faults", &json!({"mode": "other"})).await.status(), 400);
}
