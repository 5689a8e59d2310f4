//! Tenants with a KMS key of their own: what they write rests sealed, opens for nobody else, and is as available as
//! the key is.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use local::sigv4::Credentials;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::{Answer, Key, Options, Stack, Tenant};

/// Words that are in nothing but what users, the model and documents say.
const ASKED: &str = "quizzacious";
const TITLE: &str = "Flibbertigibbet";
const PASSAGE: &str = "snollygoster";
const NOTE: &str = "widdershins";
const ALL: [&str; 4] = [ASKED, TITLE, PASSAGE, NOTE];

async fn stack() -> Stack {
    let parameters = vec![("AuthorizerCacheSeconds", "300".to_owned())];
    Stack::start_with(Options { parameters, no_seed: true, ..Options::default() }).await
}

fn body(id: &str) -> Value {
    json!({"tenant_id": id, "tier": "enterprise", "company_name": id})
}

async fn with_key(stack: &Stack, id: &str, arn: &str) -> Tenant {
    let mut body = body(id);
    body["kms_key_arn"] = arn.into();
    stack.provision(body).await
}

async fn store(tenant: &Tenant) {
    let document = json!({"id": "d", "title": format!("{TITLE} handbook"), "source": format!("{NOTE}.txt"),
        "metadata": {"note": NOTE}, "content": format!("Every {PASSAGE} has 25 days of paid annual leave.")});
    tenant.post("/v1/documents", &document).await.expect_status(StatusCode::CREATED);
}

fn question() -> String {
    format!("How many days of leave has a {ASKED} employee?")
}

async fn repeatable(tenant: &Tenant, path: &str, key: &str, body: Value) -> Answer {
    let request = tenant.request(Method::POST, path).header("idempotency-key", key).json(&body);
    Answer::read(request.send().await.unwrap()).await.expect_status(StatusCode::OK)
}

/// Asks for a stream and reads it whole.
async fn streamed(tenant: &Tenant, body: Value) -> String {
    let response = tenant.open_stream(body).await;
    assert_eq!(response.status(), StatusCode::OK);
    let text = response.text().await.unwrap();
    // The process is at rest a moment later; before, the next request would meet a new one.
    tokio::time::sleep(Duration::from_millis(300)).await;
    text
}

/// The files below a directory, apart from those of the vector store, that hold a word.
fn holding(directory: &Path, word: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("qdrant") {
            found.extend(holding(&path, word));
        } else if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            if bytes.windows(word.len()).any(|window| window.eq_ignore_ascii_case(word.as_bytes())) {
                found.push(path.display().to_string());
            }
        }
    }
    found
}

fn operations(calls: &[Value]) -> Vec<&str> {
    calls.iter().map(|call| call["operation"].as_str().unwrap()).collect()
}

fn of_turns(items: &[Value]) -> Vec<bool> {
    items.iter().map(|item| item.get("data_key").is_some()).collect()
}

async fn turns(stack: &Stack, id: &str) -> Vec<Value> {
    stack.items("conversations", id, "CONV#").await
}

/// Everything that a tenant does is stored, and nothing of it in the clear; what it does warm asks KMS nothing, and a
/// tenant without a key never asks.
#[tokio::test]
async fn nothing_that_is_written_rests_in_the_clear() {
    let stack = stack().await;
    let arn = stack.create_kms_key().await;
    let (acme, plain) = (with_key(&stack, "acme", &arn).await, stack.provision(body("plain")).await);
    assert_eq!(operations(&stack.take_kms_calls().await), ["GenerateDataKeyWithoutPlaintext"]);
    let shown = stack.admin(Method::GET, "/admin/tenants/acme", None).await.json();
    assert_eq!(shown["kms_key_arn"], *arn);

    store(&acme).await;
    let first = acme.ask(&question()).await;
    let calls = stack.take_kms_calls().await;
    assert_eq!(operations(&calls), ["GenerateDataKey", "GenerateDataKey"], "one for each process");
    for call in &calls {
        assert_eq!((&call["key"], &call["context"]), (&json!(arn), &json!({"tenant_id": "acme"})));
    }

    // Warm, and everything works as ever: the history, streams, repeats as JSON and as a stream.
    let id = &first["conversation_id"];
    let again = json!({"message": format!("And how many days of leave has a {ASKED} manager?"), "conversation_id": id});
    acme.chat(again.clone()).await.expect_status(StatusCode::OK);
    assert!(stack.last_model_request().await.to_string().contains(&question()));
    assert!(streamed(&acme, again.clone()).await.contains(PASSAGE));
    let once = repeatable(&acme, "/v1/chat", "one", again.clone()).await;
    let twice = repeatable(&acme, "/v1/chat", "one", again.clone()).await;
    assert!(once.text.contains(PASSAGE));
    assert_eq!(once.text, twice.text);
    let mut stream = again.clone();
    stream["stream"] = true.into();
    let request = acme.request(Method::POST, "/v1/chat").header("idempotency-key", "three");
    let first_time = Answer::read(request.json(&stream).send().await.unwrap()).await;
    let request = acme.request(Method::POST, "/v1/chat").header("idempotency-key", "three");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let repeated = Answer::read(request.json(&stream).send().await.unwrap()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(repeated.text.contains(PASSAGE), "{}", repeated.text);
    let done = |text: &str| text.rsplit_once("event: done").unwrap().1.to_owned();
    assert_eq!(done(&first_time.text), done(&repeated.text));
    let searched = json!({"query": ASKED, "top_k": 3});
    let found = repeatable(&acme, "/v1/search", "two", searched.clone()).await;
    assert!(found.text.contains(PASSAGE) && found.text.contains(TITLE));
    assert_eq!(repeatable(&acme, "/v1/search", "two", searched).await.text, found.text);
    for path in ["/v1/documents", "/v1/documents/d"] {
        let read = acme.get(path).await.expect_status(StatusCode::OK);
        assert!(read.text.contains(TITLE) && read.text.contains(NOTE), "{}", read.text);
    }
    store(&acme).await;
    assert_eq!(stack.take_kms_calls().await, Vec::<Value>::new(), "a warm conversation asks KMS for nothing");

    // Cold: each data key is opened once, and what is written then gets one of its own.
    stack.kill("chat").await;
    acme.chat(again).await.expect_status(StatusCode::OK);
    assert_eq!(operations(&stack.take_kms_calls().await), ["GenerateDataKey", "Decrypt"]);

    store(&plain).await;
    let asked = plain.ask(&question()).await;
    plain
        .chat(json!({"message": "And?", "conversation_id": asked["conversation_id"]}))
        .await
        .expect_status(StatusCode::OK);
    assert_eq!(stack.take_kms_calls().await, Vec::<Value>::new(), "a tenant without a key asks for nothing");

    let sealed = [
        turns(&stack, "acme").await,
        stack.items("conversations", "acme", "IDEM#").await,
        stack.items("documents", "acme", "DOC#").await,
    ];
    assert_eq!(sealed.each_ref().map(Vec::len), [6, 3, 1]);
    for item in sealed.iter().flatten() {
        assert_eq!(item["data_key"]["arn"], *arn, "{item}");
        let text = item.to_string();
        assert!(!ALL.iter().any(|word| text.contains(word)), "{text}");
    }
    // The same words of the other tenant are where they can be read, so that they would be found.
    let plain = stack.items("documents", "plain", "DOC#").await[0].to_string();
    assert!(plain.contains(TITLE) && plain.contains(NOTE), "{plain}");
    let turns = json!(turns(&stack, "plain").await).to_string();
    assert!(turns.contains(ASKED) && turns.contains(PASSAGE), "{turns}");
    stack.stop().await;
}

/// The very files, with no tenant about that might have put the words there.
#[tokio::test]
async fn no_file_but_the_vector_stores_holds_a_word_of_it() {
    let stack = stack().await;
    let arn = stack.create_kms_key().await;
    let acme = with_key(&stack, "acme", &arn).await;
    store(&acme).await;
    let asked = json!({"message": question()});
    repeatable(&acme, "/v1/chat", "one", asked.clone()).await;
    assert!(streamed(&acme, asked).await.contains(PASSAGE));
    stack.kill("chat").await;
    let data = stack.data();
    for word in ALL {
        assert_eq!(holding(&data, word), Vec::<String>::new(), "{word}");
    }
    assert_ne!(holding(&data, "acme"), Vec::<String>::new(), "the search finds what there is");
    stack.stop().await;
}

fn refused(answer: &Answer) {
    let error = answer.expect_error(503, "unavailable");
    assert!(error["message"].as_str().unwrap().contains("the tenant's key service"), "{error}");
}

/// I8: without its key nothing of the tenant's is answered, and nothing is stored otherwise.
#[tokio::test]
async fn a_key_that_is_off_refuses_and_leaves_nothing_half_written() {
    let stack = stack().await;
    let arn = stack.create_kms_key().await;
    let (acme, plain) = (with_key(&stack, "acme", &arn).await, stack.provision(body("plain")).await);
    store(&acme).await;
    let first = acme.ask(&question()).await;
    let again = json!({"message": "And?", "conversation_id": first["conversation_id"]});
    repeatable(&acme, "/v1/chat", "before", again.clone()).await;
    let written = async || {
        let conversations = stack.items("conversations", "acme", "").await;
        (conversations, stack.items("documents", "acme", "").await)
    };
    let before = written().await;
    for outage in [false, true] {
        if outage {
            stack.kms_outage(true).await;
        } else {
            stack.kms("DisableKey", json!({"KeyId": arn})).await;
        }
        // What is remembered of a key holds for five minutes; a process that is new remembers nothing.
        stack.kill("chat").await;
        stack.kill("ingestion").await;
        let calls = stack.model_calls().await;
        refused(&acme.chat(json!({"message": question()})).await);
        refused(&acme.chat(again.clone()).await);
        refused(&Answer::read(acme.open_stream(again.clone()).await).await);
        refused(&acme.post("/v1/documents", &json!({"id": "e", "title": "E", "content": "E e."})).await);
        refused(&acme.get("/v1/documents").await);
        for key in ["before", "after"] {
            let request = acme.request(Method::POST, "/v1/chat").header("idempotency-key", key).json(&again);
            refused(&Answer::read(request.send().await.unwrap()).await);
        }
        assert_eq!(stack.model_calls().await, calls, "nothing is asked of the model that cannot be kept");
        assert_eq!(written().await, before);
        assert_eq!(stack.meter_item("acme").await["leases"]["M"], json!({}));
        // What stores nothing goes on, and so do others.
        acme.search(ASKED, 3).await;
        plain.ask(&question()).await;
        if outage {
            stack.kms_outage(false).await;
        } else {
            stack.kms("EnableKey", json!({"KeyId": arn})).await;
        }
    }
    assert!(stack.logs().contains("tenant_key_unusable"));
    acme.chat(again.clone()).await.expect_status(StatusCode::OK);
    repeatable(&acme, "/v1/chat", "before", again.clone()).await;
    repeatable(&acme, "/v1/chat", "after", again).await;
    acme.get("/v1/documents/d").await.expect_status(StatusCode::OK);
    stack.stop().await;
}

/// Each item names the key that sealed it, so keys come, change and go, and what was written stays readable.
#[tokio::test]
async fn a_key_that_is_set_later_seals_what_is_written_from_then_on() {
    let stack = stack().await;
    let (one, two) = (stack.create_kms_key().await, stack.create_kms_key().await);
    let acme = stack.provision(body("acme")).await;
    store(&acme).await;
    let first = acme.ask("The first question?").await;
    let next = |message: &str| json!({"message": message, "conversation_id": first["conversation_id"]});
    for (change, message) in [
        (json!(one), "The second question?"),
        (json!(two), "The third question?"),
        (Value::Null, "The fourth?"),
    ] {
        stack.change_tenant("acme", json!({"kms_key_arn": change})).await;
        // The very next request, whatever API Gateway remembers.
        acme.chat(next(message)).await.expect_status(StatusCode::OK);
        assert!(stack.last_model_request().await.to_string().contains("The first question?"));
    }
    let items = turns(&stack, "acme").await;
    assert_eq!(of_turns(&items), [false, true, true, false]);
    assert_eq!((&items[1]["data_key"]["arn"], &items[2]["data_key"]["arn"]), (&json!(one), &json!(two)));
    stack.kill("chat").await;
    acme.chat(next("The fifth?")).await.expect_status(StatusCode::OK);
    let prompt = stack.last_model_request().await.to_string();
    for message in ["The first question?", "The second question?", "The third question?", "The fourth?"] {
        assert!(prompt.contains(message), "{message}: {prompt}");
    }
    // As long as KMS lets: then that conversation is closed, and others go on.
    stack.kms("ScheduleKeyDeletion", json!({"KeyId": one})).await;
    stack.kill("chat").await;
    refused(&acme.chat(next("The sixth?")).await);
    acme.ask("Another?").await;
    // A document that was stored before has its name sealed once it is stored again.
    stack.change_tenant("acme", json!({"kms_key_arn": two})).await;
    acme.store("d", TITLE, "Something else altogether.").await;
    assert!(!stack.items("documents", "acme", "DOC#").await[0].to_string().contains(TITLE));
    assert!(acme.get("/v1/documents/d").await.text.contains(TITLE));
    stack.stop().await;
}

/// What deletes needs no key: nothing of a tenant's stays because its key is gone.
#[tokio::test]
async fn what_a_lost_key_has_sealed_is_deleted_all_the_same() {
    let stack = stack().await;
    let arn = stack.create_kms_key().await;
    let acme = with_key(&stack, "acme", &arn).await;
    store(&acme).await;
    acme.store("e", TITLE, "Another one.").await;
    repeatable(&acme, "/v1/chat", "one", json!({"message": question()})).await;
    stack.kms("ScheduleKeyDeletion", json!({"KeyId": arn})).await;
    for function in ["chat", "ingestion"] {
        stack.kill(function).await;
    }
    refused(&acme.get("/v1/documents/d").await);
    acme.delete("/v1/documents/d").await.expect_status(StatusCode::NO_CONTENT);
    acme.delete("/v1/documents/d").await.expect_error(404, "not_found");

    stack.change_tenant("acme", json!({"limits": {"data_retention_days": 0}})).await;
    let report = stack.invoke("eraser", json!({"job": "retain"})).await;
    let counted = (&report["documents"], &report["turns"], &report["left"]);
    assert_eq!(counted, (&json!(1), &json!(1), &json!(0)), "{report}");

    let begun = stack.admin(Method::DELETE, "/admin/tenants/acme", None).await;
    let begun = begun.expect_status(StatusCode::ACCEPTED).json();
    let path = format!("/admin/deprovisionings/{}", begun["deprovisioning_id"].as_str().unwrap());
    let mut view = Value::Null;
    for _ in 0..450 {
        view = stack.admin(Method::GET, &path, None).await.json();
        if view["status"] == "completed" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(view["status"], "completed", "{view:#}");
    assert_eq!(stack.items("conversations", "acme", "").await, Vec::<Value>::new());
    stack.stop().await;
}

#[tokio::test]
async fn a_key_that_cannot_be_used_is_refused_and_nothing_is_half_made() {
    let stack = stack().await;
    let (off, good) = (stack.create_kms_key().await, stack.create_kms_key().await);
    stack.kms("DisableKey", json!({"KeyId": off})).await;
    let unknown = "arn:aws:kms:us-east-1:000000000000:key/00000000-0000-4000-8000-000000000000";
    let elsewhere = good.replace("us-east-1", "eu-west-1");
    let bad = [&off, unknown, &elsewhere, "alias/acme", "", "arn:aws:s3:::acme", "acme", " "];
    for arn in bad.map(Value::from).into_iter().chain([json!(7), json!({"arn": good}), json!([good])]) {
        let mut new = body("acme");
        new["kms_key_arn"] = arn.clone();
        let answer = stack.admin(Method::POST, "/admin/tenants", Some(&new)).await;
        let error = answer.expect_error(400, "invalid_request");
        assert_eq!(error["param"], "kms_key_arn", "{arn}: {error}");
    }
    for tier in ["free", "starter", "professional"] {
        let new = json!({"tenant_id": "acme", "tier": tier, "company_name": "A", "kms_key_arn": good});
        let answer = stack.admin(Method::POST, "/admin/tenants", Some(&new)).await;
        assert_eq!(answer.expect_error(400, "invalid_request")["param"], "kms_key_arn");
    }
    let mut new = body("acme");
    new["kms_key_arn"] = good.clone().into();
    stack.kms_outage(true).await;
    refused(&stack.admin(Method::POST, "/admin/tenants", Some(&new)).await);
    stack.kms_outage(false).await;
    stack.admin(Method::GET, "/admin/tenants/acme", None).await.expect_error(404, "not_found");
    assert_eq!(stack.items("tenants", "acme", "").await, Vec::<Value>::new());
    assert!(!stack.qdrant().collection_exists("tenant_acme").await.unwrap());

    let acme = stack.provision(new).await;
    let record = stack.items("tenants", "acme", "CONFIG").await;
    for arn in [json!(off), json!(unknown), json!("alias/acme"), json!(7)] {
        let answer = stack.patch_tenant("acme", json!({"kms_key_arn": arn, "company_name": "Other"})).await;
        assert_eq!(answer.expect_error(400, "invalid_request")["param"], "kms_key_arn", "{arn}");
    }
    let other = stack.create_kms_key().await;
    stack.kms_outage(true).await;
    refused(&stack.patch_tenant("acme", json!({"kms_key_arn": other})).await);
    stack.kms_outage(false).await;
    // The key does not stay without the tier, and goes along with it.
    let lower = stack.patch_tenant("acme", json!({"tier": "professional"})).await;
    assert_eq!(lower.expect_error(400, "invalid_request")["param"], "kms_key_arn");
    assert_eq!(stack.items("tenants", "acme", "CONFIG").await, record);
    // The same again is no change, and is not tried.
    stack.take_kms_calls().await;
    stack.change_tenant("acme", json!({"kms_key_arn": good})).await;
    assert_eq!(stack.take_kms_calls().await, Vec::<Value>::new());
    let both = json!({"tier": "professional", "kms_key_arn": null});
    let now = stack.patch_tenant("acme", both).await.expect_status(StatusCode::OK).json();
    assert_eq!((now.get("kms_key_arn"), &now["tier"]), (None, &json!("professional")));
    acme.ask(&question()).await;
    assert_eq!(of_turns(&turns(&stack, "acme").await), [false]);
}

/// What an item's text lies under, as it is stored.
async fn raw_turn(stack: &Stack, id: &str) -> Value {
    let query = json!({"KeyConditionExpression": "tenant_id = :t AND begins_with(sk, :p)",
        "ExpressionAttributeValues": {":t": {"S": id}, ":p": {"S": "CONV#"}}});
    stack.dynamodb("Query", "conversations", query).await["Items"][0].clone()
}

/// I1: the credential itself opens no other tenant's data keys, whoever uses it, and no text opens but where it was
/// sealed.
#[tokio::test]
async fn a_session_opens_no_other_tenants_data_keys() {
    let stack = stack().await;
    // Even under one key: what parts them is what their data keys are bound to.
    let arn = stack.create_kms_key().await;
    let (acme, globex) = (with_key(&stack, "acme", &arn).await, with_key(&stack, "globex", &arn).await);
    for tenant in [&acme, &globex] {
        store(tenant).await;
        tenant.ask(&question()).await;
        tenant.get("/v1/usage").await;
    }
    let (mine, theirs) = (raw_turn(&stack, "acme").await, raw_turn(&stack, "globex").await);
    let blob = |item: &Value| item["data_key"]["M"]["wrapped"]["B"].clone();
    let decrypt = async |key: &Key, item: &Value, context: Value| {
        let input = json!({"CiphertextBlob": blob(item), "KeyId": arn, "EncryptionContext": context});
        let answer = stack.signed_by(key, "kms", "TrentService.Decrypt", &input).await;
        (!answer.status.is_success()).then(|| answer.json()["__type"].as_str().unwrap().to_owned())
    };
    let generate = async |key: &Key, context: Value| {
        let input = json!({"KeyId": arn, "KeySpec": "AES_256", "EncryptionContext": context});
        let answer = stack.signed_by(key, "kms", "TrentService.GenerateDataKey", &input).await;
        (!answer.status.is_success()).then(|| answer.json()["__type"].as_str().unwrap().to_owned())
    };
    let context = |id: &str| json!({"tenant_id": id});
    let denied = Some("AccessDeniedException".to_owned());
    for (function, role) in [("chat", "ChatTenantRole"), ("ingestion", "IngestionTenantRole")] {
        let own = stack.own_key(function);
        let session = stack.assume(&own, role, &[("tenant_id", "acme")]).await.unwrap();
        assert_eq!(decrypt(&session, &mine, context("acme")).await, None, "{function}");
        assert_eq!(generate(&session, context("acme")).await, None, "{function}");
        let foreign = Some("InvalidCiphertextException".to_owned());
        assert_eq!(decrypt(&session, &theirs, context("acme")).await, foreign, "{function}");
        for other in [context("globex"), json!({}), json!({"tenant": "acme"}), context("acme1")] {
            assert_eq!(decrypt(&session, &theirs, other.clone()).await, denied, "{function} {other}");
            assert_eq!(decrypt(&session, &mine, other.clone()).await, denied, "{function} {other}");
            assert_eq!(generate(&session, other.clone()).await, denied, "{function} {other}");
        }
        assert_eq!(decrypt(&own, &mine, context("acme")).await, denied, "{function} without a session");
    }
    let usage = stack.assume(&stack.own_key("usage"), "UsageTenantRole", &[("tenant_id", "acme")]).await;
    assert_eq!(decrypt(&usage.unwrap(), &mine, context("acme")).await, denied);
    for function in ["authorizer", "provisioning"] {
        assert_eq!(decrypt(&stack.own_key(function), &mine, context("acme")).await, denied, "{function}");
    }

    // Brought into another tenant's partition, or into another place of the same, a text does not open there.
    let conversation = acme.ask("Hello?").await["conversation_id"].clone();
    let sort = |id: &Value| format!("CONV#{}#001790000000000#msg_x", id.as_str().unwrap());
    for (item, tenant) in [(&theirs, "acme"), (&mine, "acme")] {
        let mut moved = item.clone();
        moved["tenant_id"] = json!({"S": tenant});
        moved["conversation_id"] = json!({"S": conversation});
        moved["sk"] = json!({"S": sort(&conversation)});
        stack.put_item("conversations", moved).await;
        let answer = acme.chat(json!({"message": "And?", "conversation_id": conversation})).await;
        answer.expect_error(503, "unavailable");
    }
    let logs = stack.logs();
    assert!(!ALL.iter().any(|word| logs.contains(word)), "no text is in a log");
}
