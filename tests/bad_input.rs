//! Bad input: every one answers the error object, names what is wrong and changes nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::{Answer, Options, Stack, Tenant};

/// Posts bytes as they are.
async fn post_raw(tenant: &Tenant, path: &str, content_type: Option<&str>, body: &[u8]) -> Answer {
    let mut request = tenant.request(Method::POST, path).body(body.to_vec());
    if let Some(content_type) = content_type {
        request = request.header("content-type", content_type);
    }
    Answer::read(request.send().await.unwrap()).await
}

#[tokio::test]
async fn bad_bodies() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    for path in ["/v1/chat", "/v1/documents", "/v1/search", "/v1/chat/completions", "/v1/feedback"] {
        for body in [&b""[..], b"{", b"[1", b"nonsense", b"null", b"3", b"\"x\"", b"{}", b"{} trailing"] {
            let answer = post_raw(&acme, path, Some("application/json"), body).await;
            let error = answer.expect_error(400, "invalid_request");
            assert!(error["param"].is_string(), "{path} {body:?}: {error}");
        }
        let utf8 = post_raw(&acme, path, Some("application/json"), b"{\"message\":\"\xff\xfe\"}").await;
        utf8.expect_error(400, "invalid_request");
        for content_type in ["text/plain", "application/xml", "multipart/form-data"] {
            let answer = post_raw(&acme, path, Some(content_type), b"{}").await;
            answer.expect_error(415, "unsupported_content_type");
        }
        let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
        post_raw(&acme, path, Some("application/json"), deep.as_bytes())
            .await
            .expect_error(400, "invalid_request");
    }
    let huge = vec![b' '; 11 << 20];
    post_raw(&acme, "/v1/chat", Some("application/json"), &huge).await.expect_error(413, "too_large");
    assert_eq!(acme.get("/v1/documents").await.json()["documents"], json!([]));
}

#[tokio::test]
async fn bad_questions() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let foreign = stack.tenant("globex").ask("Hello?").await["conversation_id"].clone();
    let unknown = format!("conv_{}", "x".repeat(22));
    let cases: Vec<(Value, u16, &str, Option<&str>)> = vec![
        (json!({"message": ""}), 400, "invalid_request", Some("message")),
        (json!({"message": " \n\t "}), 400, "invalid_request", Some("message")),
        (json!({"message": 7}), 400, "invalid_request", Some("message")),
        (json!({"message": null}), 400, "invalid_request", Some("message")),
        (json!({"message": ["a"]}), 400, "invalid_request", Some("message")),
        (json!({"top_k": 3}), 400, "invalid_request", Some("message")),
        (json!({"message": "x", "colour": "red"}), 400, "invalid_request", Some("colour")),
        (json!({"message": "x".repeat(2 << 20)}), 413, "too_large", Some("message")),
        (json!({"message": "word ".repeat(40_000)}), 413, "too_large", Some("message")),
        (json!({"message": "x", "model": "gpt-2"}), 400, "invalid_request", Some("model")),
        (json!({"message": "x", "model": "claude-opus-4-6"}), 403, "model_not_allowed", Some("model")),
        (json!({"message": "x", "model": 4}), 400, "invalid_request", Some("model")),
        (json!({"message": "x", "max_tokens": 0}), 400, "invalid_request", Some("max_tokens")),
        (json!({"message": "x", "max_tokens": -1}), 400, "invalid_request", Some("max_tokens")),
        (json!({"message": "x", "max_tokens": 1.5}), 400, "invalid_request", Some("max_tokens")),
        (json!({"message": "x", "max_tokens": 10_000_000}), 400, "invalid_request", Some("max_tokens")),
        (json!({"message": "x", "top_k": 0}), 400, "invalid_request", Some("top_k")),
        (json!({"message": "x", "top_k": 1_000}), 400, "invalid_request", Some("top_k")),
        (json!({"message": "x", "top_k": "5"}), 400, "invalid_request", Some("top_k")),
        (json!({"message": "x", "stream": "yes"}), 400, "invalid_request", Some("stream")),
        (json!({"message": "x", "conversation_id": unknown}), 404, "not_found", None),
        (json!({"message": "x", "conversation_id": foreign}), 404, "not_found", None),
        (json!({"message": "x", "conversation_id": "../../tenant"}), 404, "not_found", None),
        (json!({"message": "x", "conversation_id": "c".repeat(10_000)}), 404, "not_found", None),
        (json!({"message": "x", "conversation_id": 5}), 400, "invalid_request", Some("conversation_id")),
    ];
    for (mut body, status, code, param) in cases {
        for stream in [false, true] {
            if stream && body.get("stream").is_none() {
                body["stream"] = true.into();
            }
            let error = acme.chat(body.clone()).await.expect_error(status, code);
            assert_eq!(error["param"].as_str(), param, "{error}");
        }
    }
    // A foreign conversation and one that never was cannot be told apart.
    let answers =
        [&foreign, &json!(unknown)].map(|id| acme.chat(json!({"message": "x", "conversation_id": id})));
    let mut texts = Vec::new();
    for answer in answers {
        texts.push(answer.await.json()["error"].clone());
    }
    assert_eq!(texts[0], texts[1]);
}

#[tokio::test]
async fn bad_completions() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let long = "x".repeat(100_000);
    let with = |name: &str, value: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
        body[name] = value;
        body
    };
    let cases: Vec<(Value, u16, &str, &str)> = vec![
        (with("messages", json!("x")), 400, "invalid_request", "messages"),
        (with("messages", json!(null)), 400, "invalid_request", "messages"),
        (with("messages", json!([])), 400, "invalid_request", "messages"),
        (with("messages", json!(["x"])), 400, "invalid_request", "messages[0]"),
        (with("messages", json!([["user", "x"]])), 400, "invalid_request", "messages[0]"),
        (with("messages", json!([{"content": "x"}])), 400, "invalid_request", "messages[0].role"),
        (
            with("messages", json!([{"role": "root", "content": "x"}])),
            400,
            "invalid_request",
            "messages[0].role",
        ),
        (with("messages", json!([{"role": "user"}])), 400, "invalid_request", "messages[0].content"),
        (with("messages", json!([{"role": "user", "content": " "}])), 400, "invalid_request", "messages"),
        (
            with("messages", json!([{"role": "user", "content": [{"type": "text", "text": 7}]}])),
            400,
            "invalid_request",
            "messages[0].content[0].text",
        ),
        (
            with("messages", json!([{"role": "user", "content": "x".repeat(2 << 20)}])),
            413,
            "too_large",
            "messages",
        ),
        (with("model", json!(["claude"])), 400, "invalid_request", "model"),
        (with("model", json!("gpt-4o")), 400, "invalid_request", "model"),
        (with("model", json!("claude-opus-4-6")), 403, "model_not_allowed", "model"),
        (with("max_tokens", json!(0)), 400, "invalid_request", "max_tokens"),
        (with("max_completion_tokens", json!(10_000_000)), 400, "invalid_request", "max_completion_tokens"),
        (with("max_tokens", json!("7")), 400, "invalid_request", "max_tokens"),
        (with("max_completion_tokens", json!("7")), 400, "invalid_request", "max_completion_tokens"),
        (with("top_k", json!(0)), 400, "invalid_request", "top_k"),
        (with("top_k", json!("5")), 400, "invalid_request", "top_k"),
        (with("stream", json!("yes")), 400, "invalid_request", "stream"),
        (with("stream_options", json!({"include_usage": true})), 400, "invalid_request", "stream_options"),
        (with("stream_options", json!("x")), 400, "invalid_request", "stream_options"),
        (
            with("stream_options", json!({"include_usage": "yes"})),
            400,
            "invalid_request",
            "stream_options.include_usage",
        ),
        (with("tools", json!([])), 400, "invalid_request", "tools"),
        (with("stop", json!("\n")), 400, "invalid_request", "stop"),
        (with("conversation_id", json!("conv_x")), 400, "invalid_request", "conversation_id"),
        (with(&long, json!(1)), 400, "invalid_request", long.get(..64).unwrap()),
    ];
    for (body, status, code, param) in cases {
        let error = acme.post("/v1/chat/completions", &body).await.expect_error(status, code);
        assert_eq!(error["param"], param, "{error}");
        assert!(error["type"].is_string(), "{error}");
    }
    assert_eq!(stack.items("conversations", "acme", "").await, Vec::<Value>::new());
}

#[tokio::test]
async fn bad_searches() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    for (body, status, code, param) in [
        (json!({"query": ""}), 400, "invalid_request", "query"),
        (json!({"query": {}}), 400, "invalid_request", "query"),
        (json!({"query": "q".repeat(9_000)}), 413, "too_large", "query"),
        (json!({"query": "x", "top_k": 101}), 400, "invalid_request", "top_k"),
        (json!({"query": "x", "tenant_id": "globex"}), 400, "invalid_request", "tenant_id"),
    ] {
        let error = acme.post("/v1/search", &body).await.expect_error(status, code);
        assert_eq!(error["param"], param, "{error}");
    }
}

#[tokio::test]
async fn metadata_is_any_json_and_comes_back_as_it_was() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let mut deep = json!("the end");
    for _ in 0..60 {
        deep = json!([deep]);
    }
    let metadata = json!({"": "", "large": [1e300, u64::MAX, i64::MIN], "small": 5e-300, "one": 1.0,
        "deep": deep, "null": null, "set": [1, 1, "1"]});
    let document = json!({"id": "d", "title": "t", "content": "A document.", "metadata": metadata});
    let stored = acme.post("/v1/documents", &document).await.expect_status(StatusCode::CREATED).json();
    assert_eq!(stored["documents"][0]["status"], "ready", "{stored}");
    let read = acme.get("/v1/documents/d").await.expect_status(StatusCode::OK).json();
    assert_eq!(read["metadata"], metadata);
    stack.stop().await;
}

#[tokio::test]
async fn a_bad_document_is_named_and_the_others_are_stored() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let bad: Vec<(Value, &str, &str)> = vec![
        (json!({"id": "a/b", "title": "t", "content": "c"}), "invalid_request", "id"),
        (json!({"id": "x".repeat(129), "title": "t", "content": "c"}), "invalid_request", "id"),
        (json!({"id": "good", "title": "t", "content": "twice"}), "invalid_request", "id"),
        (json!({"title": "", "content": "c"}), "invalid_request", "title"),
        (json!({"title": "t".repeat(1_001), "content": "c"}), "invalid_request", "title"),
        (json!({"content": "c"}), "invalid_request", "title"),
        (json!({"title": "t"}), "invalid_request", "content"),
        (json!({"title": "t", "content": "c", "content_base64": "Yw=="}), "invalid_request", "content"),
        (json!({"title": "t", "content": "   "}), "invalid_request", "content"),
        (json!({"title": "t", "content": 7}), "invalid_request", "content"),
        (json!({"title": "t", "content_base64": "%%%"}), "invalid_request", "content_base64"),
        (json!({"title": "t", "content_base64": "//79"}), "invalid_request", "content_base64"),
        (
            json!({"title": "t", "content": "c", "content_type": "image/png"}),
            "unsupported_content_type",
            "content_type",
        ),
        (
            json!({"title": "t", "content": "<!-- only a comment -->", "content_type": "text/html"}),
            "invalid_request",
            "content",
        ),
        (json!({"title": "t", "content": "c", "owner": "x"}), "invalid_request", "owner"),
        (json!({"title": "t", "content": "c", "groups": []}), "invalid_request", "groups"),
        (json!({"title": "t", "content": "c", "groups": "hr"}), "invalid_request", "groups"),
        (json!({"title": "t", "content": "c", "groups": vec!["g"; 51]}), "invalid_request", "groups"),
        (json!({"title": "t", "content": "c", "groups": ["hr", "*"]}), "invalid_request", "groups[1]"),
        (json!({"title": "t", "content": "c", "groups": ["hr", 7]}), "invalid_request", "groups[1]"),
        (json!({"title": "t", "content": "c", "groups": ["a,b"]}), "invalid_request", "groups[0]"),
        (json!({"title": "t", "content": "c", "groups": [" hr"]}), "invalid_request", "groups[0]"),
        (json!({"title": "t", "content": "c", "groups": ["x".repeat(65)]}), "invalid_request", "groups[0]"),
        (json!("just text"), "invalid_request", ""),
    ];
    let mut documents = vec![json!({"id": "good", "title": "Good", "content": "A good document."})];
    documents.extend(bad.iter().map(|(document, ..)| document.clone()));
    documents.push(json!({"id": "last", "title": "Last", "content_base64": "QSBnb29kIG9uZSB0b28u", "content_type": "Text/Plain; charset=utf-8"}));

    let answer = acme.post("/v1/documents", &json!({"documents": documents})).await;
    let outcomes = answer.expect_status(StatusCode::CREATED).json()["documents"].as_array().unwrap().clone();
    assert_eq!(outcomes.len(), documents.len());
    assert_eq!(
        (&outcomes[0]["status"], &outcomes.last().unwrap()["status"]),
        (&json!("ready"), &json!("ready"))
    );
    for (n, ((document, code, param), outcome)) in bad.iter().zip(&outcomes[1..]).enumerate() {
        assert_eq!(outcome["status"], "failed", "{document}");
        assert_eq!(outcome["error"]["code"], *code, "{document}: {outcome}");
        let expected = format!("documents[{}]{}{param}", n + 1, if param.is_empty() { "" } else { "." });
        assert_eq!(outcome["error"]["param"], expected, "{document}: {outcome}");
    }
    let listed = acme.get("/v1/documents").await.json();
    let ids: Vec<&str> =
        listed["documents"].as_array().unwrap().iter().map(|d| d["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["good", "last"]);
    // Where nothing can be stored, the request as a whole is refused.
    for (document, code, param) in &bad {
        if document["id"] != "good" {
            let answer = acme.post("/v1/documents", document).await;
            let status = if *code == "invalid_request" { 400 } else { 415 };
            let error = answer.expect_error(status, code);
            // The field that was sent: there is no list.
            assert_eq!(error["param"], if param.is_empty() { "body" } else { param }, "{document}: {error}");
        }
    }
    let none = acme.post("/v1/documents", &json!({"documents": []})).await;
    assert_eq!(none.expect_error(400, "invalid_request")["param"], "documents");
    let many = vec![json!({"title": "t", "content": "c"}); 101];
    acme.post("/v1/documents", &json!({"documents": many})).await.expect_error(413, "too_large");
}

#[tokio::test]
async fn bad_pages_paths_and_routes() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    for query in ["limit=0", "limit=101", "limit=x", "limit=-1", "cursor=a%2Fb", "cursor="] {
        acme.get(&format!("/v1/documents?{query}")).await.expect_error(400, "invalid_request");
    }
    for id in ["%2e%2e%2fglobex", "a%00b", "a%2Fb", &"x".repeat(300), "%F0%9F%92%A9", "DOC%23x"] {
        acme.get(&format!("/v1/documents/{id}")).await.expect_error(404, "not_found");
        acme.delete(&format!("/v1/documents/{id}")).await.expect_error(404, "not_found");
    }
    acme.get("/v1/documents/%ff").await.expect_error(400, "invalid_request");
    for (method, path) in [
        (Method::GET, "/v1/nothing"),
        (Method::GET, "/"),
        (Method::GET, "/v1/chat"),
        (Method::PUT, "/v1/documents"),
        (Method::PATCH, "/v1/documents/x"),
        (Method::DELETE, "/v1/documents"),
        (Method::OPTIONS, "/v1/chat"),
        (Method::POST, "/v1/chat/"),
        (Method::POST, "/V1/CHAT"),
    ] {
        let answer = Answer::read(acme.request(method.clone(), path).send().await.unwrap()).await;
        assert!(
            (400..500).contains(&answer.status.as_u16()),
            "{method} {path}: {} {}",
            answer.status,
            answer.text
        );
        answer.expect_error(answer.status.as_u16(), "not_found");
    }
}

#[tokio::test]
async fn bad_keys() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let http = tests::client();
    let chat = async |authorization: Option<&str>| {
        let mut request = http.post(format!("{}/v1/chat", stack.url())).json(&json!({"message": "x"}));
        if let Some(value) = authorization {
            request = request.header("authorization", value);
        }
        Answer::read(request.send().await.unwrap()).await
    };
    chat(None).await.expect_error(401, "invalid_key");
    let key = acme.key.clone();
    let changed = |at: usize| {
        let mut bytes = key.clone().into_bytes();
        bytes[at] = if bytes[at] == b'x' { b'y' } else { b'x' };
        String::from_utf8(bytes).unwrap()
    };
    let other = stack.tenant("globex").key;
    let wrong = [
        String::new(),
        "Bearer".into(),
        "Bearer x".into(),
        key.clone(),
        format!("Basic {key}"),
        format!("Bearer {}", changed(key.len() - 1)),
        format!("Bearer {}", changed(key.len() - 20)),
        format!("Bearer {}", changed(9)),
        format!("Bearer {}", key.replace("acme", "globex")),
        format!("Bearer {}", other.replace("globex", "acme")),
        format!("Bearer {key}{key}"),
        format!("Bearer {}", "x".repeat(5_000)),
    ];
    for value in &wrong {
        chat(Some(value)).await.expect_error(401, "invalid_key");
    }
    // A well-formed key of a secret that was never issued, for a tenant that exists and one that does not.
    for tenant in ["acme", "nobody"] {
        let key = shared::api_key::ApiKey::issue(
            shared::tenant::Tier::Professional,
            tenant.parse().unwrap(),
            &mut shared::random::entropy(),
        );
        chat(Some(&format!("Bearer {}", key.expose()))).await.expect_error(401, "invalid_key");
    }
    chat(Some(&format!("Bearer {key}"))).await.expect_status(StatusCode::OK);
    for user in [&b""[..], b"\xff", &[b'u'; 257][..]] {
        let value = reqwest::header::HeaderValue::from_bytes(user).unwrap();
        let request =
            acme.request(Method::POST, "/v1/chat").header("x-user-id", value).json(&json!({"message": "x"}));
        let answer = Answer::read(request.send().await.unwrap()).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{user:?}: {}", answer.text);
        assert_eq!(answer.expect_error(400, "invalid_request")["param"], "X-User-Id");
    }
}

#[tokio::test]
async fn a_key_is_refused_from_the_moment_it_expires_though_its_decision_is_cached() {
    let stack = Stack::start().await;
    let mut rng = shared::random::entropy();
    let now = shared::clock::Clock::system().now();
    let mut issue = async |expires_in_ms: i64| {
        let key = shared::api_key::ApiKey::issue(
            shared::tenant::Tier::Professional,
            "acme".parse().unwrap(),
            &mut rng,
        );
        let item = json!({
            "tenant_id": {"S": "acme"},
            "sk": {"S": shared::item_key::api_key(key.key_id())},
            "key_id": {"S": key.key_id().as_str()},
            "secret_hash": {"S": String::from(key.secret_hash())},
            "permissions": {"L": [{"S": "chat"}]},
            "created_at": {"N": now.as_millis().to_string()},
            "expires_at": {"N": now.plus_millis(expires_in_ms).as_millis().to_string()},
        });
        stack.put_item("tenants", item).await;
        stack.tenant_with_key("acme", &key.expose())
    };
    let expired = issue(-1).await;
    expired.chat(json!({"message": "x"})).await.expect_error(401, "invalid_key");
    let expiring = issue(4_000).await;
    expiring.ask("x").await;
    // It may chat and nothing else, whatever the cached decision was first made for.
    expiring.get("/v1/documents").await.expect_error(403, "insufficient_scope");
    while shared::clock::Clock::system().now() <= now.plus_millis(4_000) {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    expiring.chat(json!({"message": "x"})).await.expect_error(401, "invalid_key");
}

#[tokio::test]
async fn bad_tenants() {
    let stack = Stack::start_with(Options { no_seed: true, ..Default::default() }).await;
    let good = || json!({"tenant_id": "acme", "tier": "free", "company_name": "Acme"});
    let with = |name: &str, value: Value| {
        let mut body = good();
        body[name] = value;
        body
    };
    for (body, param) in [
        (with("tenant_id", json!("ac--me")), "tenant_id"),
        (with("tenant_id", json!("Acme")), "tenant_id"),
        (with("tenant_id", json!("аcme")), "tenant_id"),
        (with("tenant_id", json!("a")), "tenant_id"),
        (with("tenant_id", json!(7)), "tenant_id"),
        (with("tier", json!("gold")), "tier"),
        (with("company_name", json!("")), "company_name"),
        (with("company_name", json!("two\nlines")), "company_name"),
        (with("assistant_name", json!("x".repeat(101))), "assistant_name"),
        (with("limits", json!({"tokens_per_day": -1})), "limits.tokens_per_day"),
        (with("limits", json!({"tokens_per_day": u64::MAX})), "limits.tokens_per_day"),
        (with("limits", json!({"requests": 1})), "limits.requests"),
        (with("limits", json!({"allowed_models": ["gpt-2"]})), "limits.allowed_models"),
        (with("limits", json!({"default_model": "claude-opus-4-6"})), "limits.default_model"),
        (with("injection_policy", json!("ask")), "injection_policy"),
        (with("webhook_url", json!("ftp://x")), "webhook_url"),
        (with("colour", json!("red")), "colour"),
        (with("tenant_id", json!("acme\u{200b}")), "tenant_id"),
        (with("tenant_id", json!("ａｃｍｅ")), "tenant_id"),
        (with("tenant_id", json!("a".repeat(33))), "tenant_id"),
        (with("tier", json!(null)), "tier"),
        (with("limits", json!({"requests_per_minute": 4_294_967_296_u64})), "limits.requests_per_minute"),
        (with("limits", json!({"max_concurrent": 1.5})), "limits.max_concurrent"),
        (with("limits", json!({"allowed_models": []})), "limits.allowed_models"),
        (with("limits", json!([1])), "limits"),
        (with("model_account", json!("own")), "model_account"),
        (with("cell", json!("nowhere")), "cell"),
        (with("cell", json!(7)), "cell"),
        (with("status", json!("suspended")), "status"),
        (with("epoch", json!(9)), "epoch"),
        (json!({"tier": "free", "company_name": "Acme"}), "tenant_id"),
        (json!({"tenant_id": "acme", "company_name": "Acme"}), "tier"),
        (json!({"tenant_id": "acme", "tier": "free"}), "company_name"),
    ] {
        let answer = stack.admin(Method::POST, "/admin/tenants", Some(&body)).await;
        let error = answer.expect_error(400, "invalid_request");
        assert_eq!(error["param"], param, "{error}");
    }
    let long = with("instructions", json!("x".repeat(2_001)));
    stack.admin(Method::POST, "/admin/tenants", Some(&long)).await.expect_error(413, "too_large");
    let all = stack.admin(Method::GET, "/admin/tenants", None).await.json();
    assert_eq!(all["tenants"], json!([]));
    assert_eq!(stack.items("tenants", "acme", "").await, Vec::<Value>::new(), "something is half made");
    assert!(stack.meter_item("acme").await.is_null());
    let store = qdrant_client::Qdrant::from_url(stack.ready()["qdrant_url"].as_str().unwrap())
        .api_key(stack.qdrant_root_key())
        .skip_compatibility_check()
        .build()
        .unwrap();
    assert!(store.list_collections().await.unwrap().collections.is_empty(), "a collection is left");

    // Unsigned, there is no such door; with a tenant's key it stays shut.
    let tenant = stack.provision(good()).await;
    let unsigned = tests::client().get(format!("{}/admin/tenants", stack.url())).send().await.unwrap();
    Answer::read(unsigned).await.expect_error(404, "not_found");
    tenant.get("/admin/tenants").await.expect_error(401, "invalid_key");
}
