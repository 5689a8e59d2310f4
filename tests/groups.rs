//! Document groups: within a tenant, who of its users finds what.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::tokens::{Signer, claims};
use tests::{Stack, Tenant, all_events};

const QUESTION: &str = "What is the salary band of a senior engineer?";

/// Stores a document of these groups; of everybody's if there are none.
async fn store(tenant: &Tenant, id: &str, content: &str, groups: &[&str]) -> Value {
    let mut document = json!({"id": id, "title": id, "content": content});
    if !groups.is_empty() {
        document["groups"] = json!(groups);
    }
    let answer = tenant.post("/v1/documents", &document).await.expect_status(StatusCode::CREATED).json();
    assert_eq!(answer["documents"][0]["status"], "ready", "{answer}");
    answer["documents"][0].clone()
}

/// Three documents on the same subject: everybody's, and those of two groups.
async fn library(tenant: &Tenant) {
    store(tenant, "open", "Salary bands are agreed with the works council every January.", &[]).await;
    store(tenant, "hr", "The salary band of a senior engineer is 71,300 to 84,900 euros.", &["hr"]).await;
    store(
        tenant,
        "board",
        "The salary band of a senior engineer costs us 4.3 million euros a year.",
        &["board", "audit committee"],
    )
    .await;
}

fn ids(list: &Value) -> Vec<&str> {
    let mut ids: Vec<&str> =
        list.as_array().unwrap().iter().map(|item| item["document_id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// What this user's searches find, and whether an answer, streamed or not, and in either form, was made of the
/// same documents.
async fn found(stack: &Stack, user: &Tenant) -> Vec<String> {
    let hits = Value::from(user.search(QUESTION, 50).await);
    let found: Vec<String> = ids(&hits).into_iter().map(str::to_owned).collect();
    let secrets = [("hr", "71,300"), ("board", "4.3 million")];
    let check = |asked: &Value, answer: &str| {
        for (document, secret) in secrets {
            let known = found.iter().any(|id| id == document);
            assert_eq!(asked.to_string().contains(secret), known, "{document} in what the model was told");
            assert!(known || !answer.contains(secret), "{document} in {answer}");
        }
    };
    let answer = user.ask(QUESTION).await;
    check(&stack.last_model_request().await, &answer.to_string());
    let events = all_events(user.open_stream(json!({"message": QUESTION})).await).await;
    check(&stack.last_model_request().await, &format!("{events:?}"));
    let body = json!({"model": "claude-sonnet-4-6", "messages": [{"role": "user", "content": QUESTION}]});
    let completion = user.post("/v1/chat/completions", &body).await.expect_status(StatusCode::OK);
    check(&stack.last_model_request().await, &completion.text);
    found
}

#[tokio::test]
async fn a_document_of_a_group_is_found_by_its_users_alone() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    library(&acme).await;
    for (groups, expected) in [
        (None, &["open"][..]),
        (Some(""), &["open"]),
        (Some("hr"), &["hr", "open"]),
        (Some("audit committee"), &["board", "open"]),
        (Some("sales, board ,hr"), &["board", "hr", "open"]),
        (Some("HR,h,hr2,boar"), &["open"]),
    ] {
        let user = groups.map_or_else(|| acme.clone(), |groups| acme.in_groups(groups));
        assert_eq!(found(&stack, &user).await, expected, "{groups:?}");
    }
    // The best that they may find, not what is left of the best: the store was asked for it.
    for groups in ["", "sales"] {
        let hits = acme.in_groups(groups).search("The salary band of a senior engineer is 71,300", 1).await;
        assert_eq!(ids(&hits.into()), ["open"]);
    }
    // Another tenant's groups of that name are others.
    let globex = stack.tenant("globex");
    assert!(globex.in_groups("hr,board").search(QUESTION, 50).await.is_empty());
    let logs = stack.logs();
    assert!(!logs.contains("_alert"), "the second look had nothing to drop");
    for name in ["audit committee", "sales", "hr2"] {
        assert!(!logs.contains(name), "a group's name is in a log");
    }
    stack.stop().await;
}

#[tokio::test]
async fn other_groups_hold_at_once_and_embed_nothing() {
    let stack = Stack::start().await;
    // Its limits are wide enough for all these requests.
    let globex = stack.tenant("globex");
    library(&globex).await;
    let content = "The salary band of a senior engineer is 71,300 to 84,900 euros.";
    let spent = async || globex.get("/v1/usage").await.json()["embedding_tokens"].as_u64().unwrap();
    let before = spent().await;
    let known = globex.get("/v1/documents/hr").await.json();
    let mut version = 1;
    for n in 0..20 {
        let (new, old) = if n % 2 == 0 { ("legal", "hr") } else { ("hr", "legal") };
        let stored = store(&globex, "hr", content, &[new]).await;
        version += 1;
        assert_eq!(stored["version"], version);
        let sees = async |group: &str| {
            let hits = globex.in_groups(group).search(QUESTION, 50).await;
            ids(&hits.into()).contains(&"hr")
        };
        assert!(sees(new).await && !sees(old).await, "{n}");
    }
    // The same again is nothing new, and no groups at all are everybody's.
    assert_eq!(store(&globex, "hr", content, &["hr"]).await["version"], version);
    store(&globex, "hr", content, &[]).await;
    assert!(ids(&globex.search(QUESTION, 50).await.into()).contains(&"hr"));
    let now = globex.get("/v1/documents/hr").await.json();
    assert_eq!((&now["groups"], &now["version"]), (&Value::Null, &json!(version + 1)));
    for field in ["sha256", "chunks", "created_at", "updated_at"] {
        assert_eq!(now[field], known[field], "its content is as old as it was");
    }
    // Searches embed their question; documents were not embedded again.
    let question = u64::try_from(QUESTION.len()).unwrap();
    let records = stack.items("audit", "globex", "TICKET#").await;
    let ingested = records.iter().filter(|record| record["action"] == "document_ingested");
    let embedded: Vec<u64> = ingested.map(|r| r["embedding_tokens"].as_u64().unwrap_or(0)).collect();
    assert_eq!(embedded.iter().filter(|tokens| **tokens > 0).count(), 3, "{embedded:?}");
    assert!(spent().await - before <= 41 * question);
    // With other content too, the groups are those that were sent with it.
    store(&globex, "hr", "The salary band of a senior engineer is secret.", &["legal"]).await;
    assert!(!ids(&globex.in_groups("hr").search(QUESTION, 50).await.into()).contains(&"hr"));
    assert!(ids(&globex.in_groups("legal").search(QUESTION, 50).await.into()).contains(&"hr"));
    stack.stop().await;
}

#[tokio::test]
async fn a_tokens_groups_are_its_issuers_to_name() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    library(&acme).await;
    let signer = Signer::p256("p");
    for (audience, claim) in [("plain", Value::Null), ("named", json!("https://acme.example/teams"))] {
        let mut issuer = json!({"issuer": "https://login.acme.example", "audience": audience,
            "keys": [signer.public()], "scopes": ["chat", "documents:read", "documents:write"]});
        issuer["groups_claim"] = claim.clone();
        let answer = acme.post("/v1/issuers", &issuer).await.expect_status(StatusCode::CREATED).json();
        assert_eq!(answer["groups_claim"], claim.as_str().unwrap_or("groups"));
    }
    let token = |audience: &str, groups: Value| {
        let mut claims = claims("https://login.acme.example", audience, "ann");
        claims["groups"] = groups.clone();
        claims["https://acme.example/teams"] = json!(["board"]);
        stack.tenant_with_key("acme", &signer.token(&claims))
    };
    let both = token("plain", json!(["hr", "board", "a group, which no document can have"]));
    assert_eq!(found(&stack, &both).await, ["board", "hr", "open"]);
    assert_eq!(found(&stack, &token("plain", json!("hr"))).await, ["hr", "open"]);
    assert_eq!(found(&stack, &token("plain", json!(null))).await, ["open"]);
    assert_eq!(found(&stack, &token("named", json!(["hr"]))).await, ["board", "open"]);
    // A header beside a token leaves out some, and adds none.
    assert_eq!(found(&stack, &both.in_groups("hr")).await, ["hr", "open"]);
    assert_eq!(found(&stack, &both.in_groups("")).await, ["open"]);
    for wider in ["hr,sales", "sales", "Hr"] {
        let answer = both.in_groups(wider).post("/v1/search", &json!({"query": "x"})).await;
        let error = answer.expect_error(400, "invalid_request");
        assert_eq!(error["param"], "X-User-Groups");
        assert!(!error["message"].as_str().unwrap().contains("sales"), "{error}");
    }
    // The decision about the token is kept for every route; what a header says is not in it.
    assert_eq!(found(&stack, &both).await, ["board", "hr", "open"]);
    // What is no list of groups, or too long a one, lets nobody in.
    let many: Vec<String> = (0..51).map(|n| format!("g{n}")).collect();
    for bad in [json!(7), json!([1]), json!({"hr": true}), json!(many)] {
        token("plain", bad).post("/v1/search", &json!({"query": "x"})).await.expect_error(401, "invalid_key");
    }

    // Records of documents: a token's user reads what a search could find, and so does whoever names groups;
    // a key by itself is the tenant's application.
    let listed = async |who: &Tenant| {
        let list = who.get("/v1/documents").await.expect_status(StatusCode::OK).json();
        let ids = list["documents"].as_array().unwrap().iter();
        ids.map(|document| document["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let hers = token("plain", json!(["hr"]));
    for (who, expected) in [
        (&acme, &["board", "hr", "open"][..]),
        (&acme.in_groups("board"), &["board", "open"]),
        (&acme.in_groups(""), &["open"]),
        (&hers, &["hr", "open"]),
        (&hers.in_groups(""), &["open"]),
        (&token("plain", json!([])), &["open"]),
    ] {
        assert_eq!(listed(who).await, expected);
        for id in ["board", "hr", "open"] {
            let answer = who.get(&format!("/v1/documents/{id}")).await;
            if expected.contains(&id) {
                answer.expect_status(StatusCode::OK);
            } else {
                answer.expect_error(404, "not_found");
            }
        }
    }
    let board = acme.get("/v1/documents/board").await.json();
    assert_eq!(board["groups"], json!(["audit committee", "board"]));
    stack.stop().await;
}

#[tokio::test]
async fn a_repeat_for_other_groups_is_refused_and_what_was_said_stays_said() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    library(&acme).await;
    let ask = async |who: &Tenant, path: &str, body: &Value| {
        let request = who.request(Method::POST, path).header("idempotency-key", "once").json(body);
        tests::Answer::read(request.send().await.unwrap()).await
    };
    for (path, body) in [
        ("/v1/search", json!({"query": QUESTION})),
        ("/v1/chat", json!({"message": QUESTION})),
        (
            "/v1/chat/completions",
            json!({"model": "claude-sonnet-4-6", "messages": [{"role": "user", "content": QUESTION}]}),
        ),
    ] {
        for who in [acme.clone(), acme.as_user("ann")] {
            let first = ask(&who.in_groups("hr,board"), path, &body).await.expect_status(StatusCode::OK);
            assert!(first.text.contains("71,300"), "{}", first.text);
            let again = ask(&who.in_groups("board, hr"), path, &body).await.expect_status(StatusCode::OK);
            assert_eq!(again.text, first.text);
            for other in [who.clone(), who.in_groups("hr"), who.in_groups("hr,board,sales")] {
                let refused = ask(&other, path, &body).await;
                assert_eq!(refused.expect_error(400, "invalid_request")["param"], "Idempotency-Key");
                assert!(!refused.text.contains("71,300"), "{}", refused.text);
            }
        }
    }

    // Whoever leaves a group keeps the answers that were given before, and is given none of it anew.
    let ann = acme.as_user("ann");
    let answer = ann.in_groups("hr").ask(QUESTION).await;
    assert!(answer["response"].as_str().unwrap().contains("71,300"), "{answer}");
    let path = format!("/v1/conversations/{}", answer["conversation_id"].as_str().unwrap());
    assert!(ann.get(&path).await.expect_status(StatusCode::OK).text.contains("71,300"));
    let goes_on = json!({"message": QUESTION, "conversation_id": answer["conversation_id"]});
    let later = ann.chat(goes_on.clone()).await.expect_status(StatusCode::OK).json();
    assert_eq!(ids(&later["citations"]), ["open"], "{later}");
    // The conversation is hers, whatever groups somebody else is of.
    acme.as_user("bob").in_groups("hr").chat(goes_on).await.expect_error(404, "not_found");
    stack.stop().await;
}

#[tokio::test]
async fn bad_groups_are_refused_on_every_route() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let long = "x".repeat(65);
    let many = (0..51).map(|n| format!("g{n}")).collect::<Vec<_>>().join(",");
    for bad in ["*", "hr,", ",", "hr,,board", &long, &many] {
        for (method, path) in [
            (Method::POST, "/v1/search"),
            (Method::POST, "/v1/chat"),
            (Method::POST, "/v1/documents"),
            (Method::GET, "/v1/documents"),
            (Method::GET, "/v1/usage"),
        ] {
            let answer = acme.in_groups(bad).request(method, path).json(&json!({})).send().await.unwrap();
            let error = tests::Answer::read(answer).await.expect_error(400, "invalid_request");
            assert_eq!(error["param"], "X-User-Groups", "{path}");
        }
    }
    assert!(acme.in_groups("büro,works council").search("x", 1).await.is_empty());
    stack.stop().await;
}
