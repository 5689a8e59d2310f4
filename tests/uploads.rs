//! Files that tenants upload: by a link that is good for one, read by a function that nobody calls.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::presigning::PresigningConfig;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::{Answer, Stack, Tenant, client, put_file, until};
use tokio::time::sleep;

fn new(id: &str, file: &[u8]) -> Value {
    json!({"id": id, "title": format!("The {id}"), "content_type": "text/plain", "size_bytes": file.len()})
}

async fn status(tenant: &Tenant, id: &str) -> String {
    let document = tenant.get(&format!("/v1/documents/{id}")).await.expect_status(StatusCode::OK).json();
    document["status"].as_str().unwrap().to_owned()
}

/// What of a tenant's uploads is still under way.
async fn under_way(stack: &Stack, tenant: &Tenant) -> Vec<Value> {
    stack.items("documents", &tenant.id, "UPLOAD#").await
}

/// Waits until nothing of the tenant's uploads is under way, and nothing of a file is left.
async fn over(stack: &Stack, tenant: &Tenant) {
    stack.uploads_end(&tenant.id).await;
    assert!(stack.file_sizes(&tenant.id).await.iter().all(|size| *size == 0));
}

/// The tenant's records of that action.
async fn records(stack: &Stack, tenant: &Tenant, action: &str) -> Vec<Value> {
    let mut records = stack.items("audit", &tenant.id, "").await;
    records.retain(|record| record["action"] == action);
    records
}

/// Lets messages come again, and claims of those who were cut off be over.
async fn next_attempt(stack: &Stack, tenant: &Tenant) {
    for upload in under_way(stack, tenant).await {
        if upload["claimed_until"].is_number() {
            // Unless it has ended meanwhile.
            let update = json!({"TableName": Stack::table("documents"), "Key": upload_key(tenant, &upload),
                "UpdateExpression": "SET claimed_until = :v", "ConditionExpression": "attribute_exists(sk)",
                "ExpressionAttributeValues": {":v": {"N": "1"}}});
            stack.signed_by(&stack.operator(), "dynamodb", "DynamoDB_20120810.UpdateItem", &update).await;
        }
    }
    stack.unhide_messages("uploads").await;
}

fn upload_key(tenant: &Tenant, upload: &Value) -> Value {
    json!({"tenant_id": {"S": tenant.id}, "sk": {"S": upload["sk"]}})
}

/// Waits until a message was received so often, and whoever received it has died.
async fn killed(stack: &Stack, times: u64) {
    stack.upload_attempts(times).await;
    until("the reader's death", async || stack.processes("upload-ingestion").is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_file_is_uploaded_read_and_found() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme").as_user("ann");
    let file = b"The vault opens at 7:15 on weekdays.".to_vec();
    let mut body = new("vault", &file);
    body["source"] = "https://acme.example/vault".into();
    body["metadata"] = json!({"team": "safes"});
    let begun = acme.begin_upload(&body).await;
    assert_eq!(begun["document_id"], "vault");
    assert_eq!(begun["headers"]["content-type"], "text/plain");
    assert_eq!(begun["headers"]["if-none-match"], "*");
    // It is there from the beginning on, and awaits its file.
    let pending = acme.get("/v1/documents/vault").await.json();
    assert_eq!(
        (&pending["status"], &pending["version"], &pending["chunks"]),
        (&json!("pending"), &json!(0), &json!(0))
    );
    assert_eq!(pending["title"], "The vault");
    assert_eq!(acme.get("/v1/documents").await.json()["documents"][0]["status"], "pending");

    let (put, answer) = put_file(&begun, file).await;
    assert_eq!(put, StatusCode::OK, "{answer}");
    let ready = acme.read_upload("vault").await;
    assert_eq!(
        (&ready["status"], &ready["version"], &ready["chunks"]),
        (&json!("ready"), &json!(1), &json!(1))
    );
    assert_eq!((&ready["source"], &ready["metadata"]), (&body["source"], &body["metadata"]));
    assert_eq!(ready["sha256"].as_str().unwrap().len(), 64);
    assert!(acme.search("When does the vault open?", 3).await[0]["text"].as_str().unwrap().contains("7:15"));
    over(&stack, &acme).await;

    // It is on record and paid for in the name of whoever began it.
    let (begun, stored) =
        (records(&stack, &acme, "upload_begun").await, records(&stack, &acme, "document_ingested").await);
    assert_eq!((begun.len(), stored.len()), (1, 1));
    for record in begun.iter().chain(&stored) {
        assert_eq!((&record["key_id"], &record["user_id"]), (&json!(acme.key_id()), &json!("ann")));
        assert_eq!(record["documents"], json!(["vault"]));
        assert_eq!(record["request_id"], begun[0]["request_id"]);
    }
    assert!(stored[0]["embedding_tokens"].as_u64().unwrap() > 0 && stored[0]["ticket"].is_number());

    // A new version: the old one is found until the new one is.
    let file = b"The vault opens at 9:45 on weekdays.".to_vec();
    let begun = acme.begin_upload(&new("vault", &file)).await;
    let pending = acme.get("/v1/documents/vault").await.json();
    assert_eq!((&pending["status"], &pending["version"]), (&json!("pending"), &json!(1)));
    assert!(acme.search("When does the vault open?", 3).await[0]["text"].as_str().unwrap().contains("7:15"));
    assert_eq!(put_file(&begun, file).await.0, StatusCode::OK);
    let ready = acme.read_upload("vault").await;
    assert_eq!((&ready["status"], &ready["version"]), (&json!("ready"), &json!(2)));
    let found = acme.search("When does the vault open?", 3).await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0]["text"].as_str().unwrap().contains("9:45"));
    over(&stack, &acme).await;

    // The same again is the same version, and what was uploaded is sent again without a file.
    let file = b"The vault opens at 9:45 on weekdays.".to_vec();
    let same = acme.upload("vault", "text/plain", file).await;
    assert_eq!((&same["status"], &same["version"]), (&json!("ready"), &json!(3)));
    acme.store("vault", "vault", "The vault is closed.").await;
    assert_eq!(status(&acme, "vault").await, "ready");
    // One that has no id of its own gets one.
    let nameless = json!({"title": "Nameless", "content_type": "text/markdown", "size_bytes": 6});
    let begun = acme.begin_upload(&nameless).await;
    assert_eq!(put_file(&begun, "# Here").await.0, StatusCode::OK);
    let id = begun["document_id"].as_str().unwrap();
    assert!(id.starts_with("doc_"), "{id}");
    acme.read_upload(id).await;
    over(&stack, &acme).await;
    stack.stop().await;
}

#[tokio::test]
async fn a_link_takes_one_file_once_as_it_was_announced() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let file = b"Ten bytes.".to_vec();
    let begun = acme.begin_upload(&new("file", &file)).await;
    let url = begun["url"].as_str().unwrap();
    for part in ["X-Amz-Expires=900", "content-length%3Bcontent-type%3Bhost%3Bif-none-match"] {
        assert!(url.contains(part), "{part}: {url}");
    }
    let put = async |url: &str, kind: Option<&str>, condition: Option<&str>, file: &[u8]| {
        let mut put = client().put(url).body(file.to_vec());
        if let Some(kind) = kind {
            put = put.header("content-type", kind);
        }
        if let Some(condition) = condition {
            put = put.header("if-none-match", condition);
        }
        let answer = put.send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let (kind, once) = (Some("text/plain"), Some("*"));
    let elsewhere =
        url.replacen("tenant%3Dacme", "tenant%3Dglobex", 1).replacen("tenant=acme", "tenant=globex", 1);
    assert_ne!(elsewhere, url);
    let beside = url.replacen("/uploads/upl_", "/uploads/upl_0", 1);
    for (what, (status, answer)) in [
        ("shorter", put(url, kind, once, b"NineBytes").await),
        ("longer", put(url, kind, once, b"Eleven bytes").await),
        ("nothing", put(url, kind, once, b"").await),
        ("another kind", put(url, Some("text/html"), once, &file).await),
        ("no kind", put(url, None, once, &file).await),
        ("over another", put(url, kind, None, &file).await),
        ("over a certain one", put(url, kind, Some("\"x\""), &file).await),
        ("another tenant's", put(&elsewhere, kind, once, &file).await),
        ("another key", put(&beside, kind, once, &file).await),
        ("for longer", put(&url.replace("X-Amz-Expires=900", "X-Amz-Expires=9000"), kind, once, &file).await),
    ] {
        assert_eq!(status, 403, "{what}: {answer}");
    }
    assert_eq!(put(url, kind, once, &file).await.0, 200);
    // A link that was used is used up, before its file is read and after it.
    assert_eq!(put(url, kind, once, &file).await.0, 412);
    acme.read_upload("file").await;
    over(&stack, &acme).await;
    assert_eq!(put(url, kind, once, &file).await.0, 412);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(acme.get("/v1/documents/file").await.json()["version"], 1);

    // Late, and for another tenant: what the very session that signs links can sign.
    let ingestion = stack.own_key("ingestion");
    let session = stack.assume(&ingestion, "IngestionTenantRole", &[("tenant_id", "acme")]);
    let session = session.await.unwrap();
    let signed = async |ago: u64, key: &str| {
        let start = SystemTime::from(local::serving::system_clock()) - Duration::from_secs(ago);
        let config = PresigningConfig::builder().start_time(start).expires_in(Duration::from_secs(900));
        let put = stack.s3_as(&session).put_object().bucket(stack.documents_bucket()).key(key);
        let put = put.content_length(4).content_type("text/plain").if_none_match("*");
        put.presigned(config.build().unwrap()).await.unwrap().uri().to_owned()
    };
    let own = "tenant=acme/uploads/upl_0123456789012345678901";
    let other = own.replace("acme", "globex");
    let (late, foreign) = (signed(901, own).await, signed(0, &other).await);
    let (status, answer) = put(&late, kind, once, b"late").await;
    assert_eq!(status, 403, "{answer}");
    let (status, answer) = put(&foreign, kind, once, b"late").await;
    assert!(status == 403 && answer.contains("AccessDenied"), "{answer}");
    // In time it is taken; but nobody has begun such an upload, so nobody reads it.
    assert_eq!(put(&signed(0, own).await, kind, once, b"late").await.0, 200);
    until("the message's end", async || stack.queue("uploads").await.is_empty().then_some(())).await;
    assert_eq!(acme.get("/v1/documents").await.json()["documents"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn what_cannot_be_uploaded_is_refused_by_name_and_changes_nothing() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let base = json!({"title": "T", "content_type": "text/plain", "size_bytes": 10});
    let with = |field: &str, value: Value| {
        let mut body = base.clone();
        body[field] = value;
        body
    };
    for (body, status, code, param) in [
        (with("size_bytes", json!(0)), 400, "invalid_request", "size_bytes"),
        (with("size_bytes", json!(-1)), 400, "invalid_request", "size_bytes"),
        (with("size_bytes", json!("10")), 400, "invalid_request", "size_bytes"),
        (with("size_bytes", json!(1.5)), 400, "invalid_request", "size_bytes"),
        (with("size_bytes", json!(52_428_801)), 413, "too_large", "size_bytes"),
        (with("title", json!("")), 400, "invalid_request", "title"),
        (with("title", json!("x".repeat(1_001))), 400, "invalid_request", "title"),
        (with("source", json!("x".repeat(1_001))), 400, "invalid_request", "source"),
        (with("content_type", json!("image/png")), 415, "unsupported_content_type", "content_type"),
        (with("content_type", json!("")), 415, "unsupported_content_type", "content_type"),
        (with("id", json!("a/b")), 400, "invalid_request", "id"),
        (with("id", json!("")), 400, "invalid_request", "id"),
        (with("metadata", json!({"x": "y".repeat(16_384)})), 413, "too_large", "metadata"),
        (with("metadata", json!([])), 400, "invalid_request", "metadata"),
        (with("content", json!("Hello")), 400, "invalid_request", "content"),
        (json!({"title": "T", "size_bytes": 1}), 400, "invalid_request", "content_type"),
        (json!({"title": "T", "content_type": "text/plain"}), 400, "invalid_request", "size_bytes"),
        (json!([]), 400, "invalid_request", "body"),
    ] {
        let error = acme.post("/v1/uploads", &body).await.expect_error(status, code);
        assert_eq!(error["param"], param, "{body}");
    }
    let long = acme.request(Method::POST, "/v1/uploads").header("content-type", "application/json");
    let long = long.body(vec![b' '; 6 << 20]).send().await.unwrap();
    Answer::read(long).await.expect_error(413, "too_large");
    let reader = acme.post("/v1/keys", &json!({"scopes": ["documents:read"]})).await.json();
    let reader = acme.with_key(reader["api_key"].as_str().unwrap());
    reader.post("/v1/uploads", &base).await.expect_error(403, "insufficient_scope");
    assert_eq!(acme.get("/v1/documents").await.json()["documents"], json!([]));
    let left = stack.items("documents", "acme", "").await;
    assert!(left.iter().all(|item| item["sk"] == "COUNT" && item["documents"] == 0), "{left:?}");
    stack.stop().await;
}

#[tokio::test]
async fn a_file_takes_its_invocations_trace_to_the_embeddings_and_the_vectors() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.upload("vault", "text/plain", b"The vault opens at 7:15.".to_vec()).await;
    over(&stack, &acme).await;
    let trace = until("the line of the file", async || {
        let logs = stack.logs();
        let mut lines = logs.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let line = lines.find(|line| line["http.route"] == "upload")?;
        Some(line["trace.id"].as_str().expect("a trace").to_owned())
    })
    .await;
    let address = |name: &str| stack.ready()[name].as_str().unwrap();
    for url in [
        format!("{}/_requests", address("embeddings_url")),
        format!("{}/qdrant/traces", address("control_url")),
    ] {
        let seen: Value = client().get(&url).send().await.unwrap().json().await.unwrap();
        let told = |call: &Value| call.to_string().contains(&format!("Root={trace}"));
        assert!(seen.as_array().unwrap().iter().any(told), "{url} was not told of {trace}: {seen}");
    }
    stack.stop().await;
}

#[tokio::test]
async fn of_two_messages_the_bad_one_alone_comes_again() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    // Its file waits, as the tenant may spend nothing, so that its message is known.
    stack.change_tenant(&acme.id, json!({"limits": {"tokens_per_day": 0}})).await;
    let begun = acme.begin_upload(&new("good", b"Good.")).await;
    assert_eq!(put_file(&begun, "Good.").await.0, StatusCode::OK);
    stack.upload_attempts(1).await;
    let body = stack.queue("uploads").await[0]["body"].clone();
    stack.change_tenant(&acme.id, json!({"limits": {"tokens_per_day": 1_000_000}})).await;
    let record = |id: &str, body: &Value| {
        json!({"messageId": id, "receiptHandle": id, "body": body, "attributes": {"ApproximateReceiveCount": "1"},
            "messageAttributes": {}, "eventSource": "aws:sqs"})
    };
    let nonsense = Value::from("nonsense");
    for ids in [["bad", "good"], ["good", "bad"]] {
        let records = ids.map(|id| record(id, if id == "good" { &body } else { &nonsense }));
        let answer = stack.invoke("upload_ingestion", json!({"Records": records})).await;
        assert_eq!(answer["batchItemFailures"], json!([{"itemIdentifier": "bad"}]), "{ids:?}");
    }
    assert_eq!(acme.read_upload("good").await["status"], "ready");
    assert_eq!(records(&stack, &acme, "document_ingested").await.len(), 2);
    stack.stop().await;
}

async fn begin_once(tenant: &Tenant, body: &Value, key: &str) -> Answer {
    let request = tenant.request(Method::POST, "/v1/uploads").header("idempotency-key", key).json(body);
    Answer::read(request.send().await.unwrap()).await
}

#[tokio::test]
async fn a_repeat_begins_no_second_upload_and_its_link_works() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme").as_user("ann");
    let file = b"The vault opens at 7:15.".to_vec();
    // Without an id, so that a second upload would be a second document.
    let body = json!({"title": "Vault", "content_type": "text/plain", "size_bytes": file.len()});
    let begun = async || begin_once(&acme, &body, "key").await.expect_status(StatusCode::CREATED).json();
    let first = begun().await;
    // Signatures are of a second: this one is another.
    sleep(Duration::from_millis(1_100)).await;
    let again = begun().await;
    for same in ["document_id", "headers", "expires_at"] {
        assert_eq!(again[same], first[same]);
    }
    assert_ne!(again["url"], first["url"]);
    assert_eq!(under_way(&stack, &acme).await.len(), 1);
    assert_eq!(stack.items("documents", "acme", "DOC#").await.len(), 1);
    // The link itself is kept nowhere: whoever reads the table could put the file.
    let kept = stack.items("conversations", "acme", "IDEM#").await;
    assert!(kept.len() == 1 && !kept[0].to_string().contains("X-Amz"), "{kept:?}");
    let mut other = body.clone();
    other["title"] = "Another".into();
    let refused = begin_once(&acme, &other, "key").await.expect_error(400, "invalid_request");
    assert_eq!(refused["param"], "Idempotency-Key");

    assert_eq!(put_file(&again, file).await.0, StatusCode::OK);
    let id = first["document_id"].as_str().unwrap();
    assert_eq!(acme.read_upload(id).await["status"], "ready");
    over(&stack, &acme).await;
    assert_eq!(begun().await["document_id"], id);
    assert_eq!(records(&stack, &acme, "upload_begun").await.len(), 1);
    // In another's hands it is another key.
    let theirs = begin_once(&acme.as_user("bob"), &body, "key").await.expect_status(StatusCode::CREATED);
    assert_ne!(theirs.json()["document_id"], id);

    // What was refused has begun nothing, and may be tried again under its key.
    stack.change_tenant("acme", json!({"limits": {"max_documents": 2}})).await;
    begin_once(&acme, &body, "full").await.expect_error(409, "conflict");
    stack.change_tenant("acme", json!({"limits": {"max_documents": 3}})).await;
    begin_once(&acme, &body, "full").await.expect_status(StatusCode::CREATED);

    // Its link has ended: no second document of what may have been sent already.
    let before = stack.items("documents", "acme", "DOC#").await.len();
    for item in stack.items("conversations", "acme", "IDEM#").await {
        let mut kept: Value = serde_json::from_str(item["result"]["body"].as_str().unwrap()).unwrap();
        kept["expires_at"] = 1.into();
        let key = json!({"tenant_id": {"S": "acme"}, "sk": {"S": item["sk"]}});
        stack.edit("conversations", key, &["result", "body"], json!({"S": kept.to_string()})).await;
    }
    let ended = begin_once(&acme, &body, "key").await.expect_error(409, "conflict");
    assert_eq!(ended["param"], "Idempotency-Key");
    assert!(ended["message"].as_str().unwrap().contains(id), "{ended}");
    assert_eq!(stack.items("documents", "acme", "DOC#").await.len(), before);
    stack.stop().await;
}

const PDF: &str = "application/pdf";
const DOCX: &str = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";

fn sample(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("samples").join(name)).unwrap()
}

#[tokio::test]
async fn files_of_every_kind_are_read_or_say_why_not() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    for (id, kind, file) in [
        ("pdf", PDF, sample("ghostscript.pdf")),
        ("docx", DOCX, sample("handbook.docx")),
        ("html", "text/html", sample("handbook.html")),
        ("csv", "text/csv", sample("allowances.csv")),
    ] {
        let ready = acme.upload(id, kind, file).await;
        assert_eq!((&ready["status"], &ready["content_type"]), (&json!("ready"), &json!(kind)), "{ready}");
        let hits = acme.search("What is the hotel limit in Norway?", 100).await;
        assert!(hits.iter().any(|hit| hit["document_id"] == id), "{id}");
    }
    // Said to be in a charset, it is read in that; the bucket is told the kind alone.
    let said = json!({"id": "said", "title": "Said", "content_type": "text/plain; charset=iso-8859-5",
        "size_bytes": 6});
    let begun = acme.begin_upload(&said).await;
    assert_eq!(put_file(&begun, b"\xbc\xde\xe1\xda\xd2\xd0".to_vec()).await.0, StatusCode::OK);
    assert_eq!(acme.read_upload("said").await["status"], "ready");
    let hits = acme.search("\u{41c}\u{43e}\u{441}\u{43a}\u{432}\u{430}", 100).await;
    assert!(hits.iter().any(|hit| hit["text"] == "\u{41c}\u{43e}\u{441}\u{43a}\u{432}\u{430}"), "{hits:?}");
    let (pdf, docx) = (sample("ghostscript.pdf"), sample("handbook.docx"));
    for (id, kind, file, why) in [
        ("encrypted", PDF, sample("encrypted.pdf"), "encrypted"),
        ("cut", PDF, pdf[..pdf.len() / 2].to_vec(), "cut off"),
        ("other", DOCX, pdf, "a PDF file"),
        ("zip", "text/plain", docx, "a ZIP archive"),
    ] {
        let failed = acme.upload(id, kind, file).await;
        assert_eq!(failed["status"], "failed", "{id}: {failed}");
        assert!(failed["reason"].as_str().unwrap().contains(why), "{id}: {failed}");
    }
    over(&stack, &acme).await;
    stack.stop().await;
}

#[tokio::test]
async fn an_upload_counts_as_a_document_from_the_beginning_on() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    stack.change_tenant(&acme.id, json!({"limits": {"max_documents": 2}})).await;
    acme.store("first", "First", "The first.").await;
    acme.begin_upload(&new("second", b"Second.")).await;
    let third = acme.post("/v1/uploads", &new("third", b"Third.")).await.expect_error(409, "conflict");
    assert_eq!(third["limit"], "max_documents");
    // A new version is none more; what is deleted, or never came, is one less.
    acme.begin_upload(&new("first", b"First.")).await;
    acme.delete("/v1/documents/first").await.expect_status(StatusCode::NO_CONTENT);
    acme.begin_upload(&new("third", b"Third.")).await;
    acme.post("/v1/uploads", &new("fourth", b"Fourth")).await.expect_error(409, "conflict");
    long_ago(&stack, &acme, "third").await;
    assert_eq!(stack.invoke("eraser", json!({"job": "uploads"})).await["unmade"], 1);
    acme.begin_upload(&new("fourth", b"Fourth")).await;
    // Of those that were refused nothing is left.
    let left: Vec<Value> = under_way(&stack, &acme).await;
    let left: BTreeSet<&str> = left.iter().map(|upload| upload["document_id"].as_str().unwrap()).collect();
    assert_eq!(left, BTreeSet::from(["fourth", "second"]));
    stack.stop().await;
}

#[tokio::test]
async fn a_file_that_cannot_be_read_says_why_and_hinders_no_other() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("known", "known", "It says 25 days.").await;
    let failed = acme.upload("empty", "text/plain", b" \n\t ".to_vec()).await;
    assert_eq!((&failed["status"], &failed["version"]), (&json!("failed"), &json!(0)));
    assert!(failed["reason"].as_str().unwrap().contains("no text"), "{failed}");
    // What was there before stays.
    let failed = acme.upload("known", "text/plain", b"  ".to_vec()).await;
    assert_eq!((&failed["status"], &failed["version"]), (&json!("failed"), &json!(1)));
    assert_eq!(acme.search("How many days?", 3).await.len(), 1);
    let ready = acme.upload("known", "text/plain", b"It says 26 days.".to_vec()).await;
    assert_eq!((&ready["status"], &ready["reason"]), (&json!("ready"), &Value::Null));
    over(&stack, &acme).await;
    // Each attempt is on record, the failed ones as such.
    let records = records(&stack, &acme, "document_ingested").await;
    let outcomes: Vec<&str> = records.iter().map(|record| record["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["ok", "failed", "failed", "ok"]);
    // What is no notification of S3's ends among the dead letters; what names no upload, nowhere.
    stack.send_message("uploads", "nonsense").await;
    let other = json!({"Records": [{"s3": {"object": {"key": "some/other", "size": 5}}}]});
    stack.send_message("uploads", &other.to_string()).await;
    for times in 1..=8 {
        stack.upload_attempts(times).await;
        stack.unhide_messages("uploads").await;
    }
    until("the dead letter", async || (stack.queue_messages("upload-failures").len() == 1).then_some(()))
        .await;
    assert_eq!(stack.queue_messages("upload-failures"), [json!("nonsense")]);
    assert!(stack.queue("uploads").await.is_empty());
    stack.stop().await;
}

#[tokio::test]
async fn whoever_dies_at_whatever_step_a_file_is_read_once() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    stack.change_tenant(&acme.id, json!({"limits": {"requests_per_minute": 20_000}})).await;
    let (function, documents) = ("upload_ingestion", "documents");
    let rule = |mode: &str, operation: &str, table: &str, skip: u32| {
        json!({"rules": [{"mode": mode, "function": function, "operation": operation, "table": table,
            "skip": skip, "times": 1}]})
    };
    let settling = |mode: &str| {
        let mut rules = rule(mode, "TransactWriteItems", "audit", 0);
        // The export's own transactions are others.
        rules["rules"][0]["contains"] = "document_ingested".into();
        rules
    };
    let steps = [
        // Taking it up; the record as `processing`, in its new edition, and as `ready`; the ledger; its end.
        rule("kill_before", "UpdateItem", documents, 0),
        rule("kill_after", "UpdateItem", documents, 0),
        rule("kill_before", "PutItem", documents, 0),
        rule("kill_after", "PutItem", documents, 0),
        rule("kill_before", "PutItem", documents, 1),
        rule("kill_after", "PutItem", documents, 1),
        rule("kill_before", "PutItem", documents, 2),
        rule("kill_after", "PutItem", documents, 2),
        settling("kill_before"),
        settling("kill_after"),
        rule("kill_before", "DeleteItem", documents, 0),
        rule("kill_after", "DeleteItem", documents, 0),
    ];
    for (n, step) in steps.iter().enumerate() {
        // The function's other stores are reached by then.
        acme.upload("warm", "text/plain", format!("Warm {n}.").into_bytes()).await;
        over(&stack, &acme).await;
        let (id, file) = (format!("doc{n}"), format!("Secret number {n} is {}.", n * 1_111).into_bytes());
        let begun = acme.begin_upload(&new(&id, &file)).await;
        stack.dynamodb_faults(step.clone()).await;
        assert_eq!(put_file(&begun, file).await.0, StatusCode::OK);
        killed(&stack, 1).await;
        stack.clear_dynamodb_faults().await;
        until("the second attempt's end", async || {
            next_attempt(&stack, &acme).await;
            sleep(Duration::from_millis(200)).await;
            stack.queue("uploads").await.is_empty().then_some(())
        })
        .await;
        let ready = acme.read_upload(&id).await;
        assert_eq!(
            (&ready["status"], &ready["version"], &ready["chunks"]),
            (&json!("ready"), &json!(1), &json!(1)),
            "{step}"
        );
        over(&stack, &acme).await;
        let found = acme.search(&format!("Secret number {n}"), 50).await;
        let own = found.iter().filter(|hit| hit["document_id"] == *id).count();
        assert_eq!(own, 1, "{step}");
    }
    assert_eq!(stack.queue_messages("upload-failures"), Vec::<Value>::new());
}

#[tokio::test]
async fn a_file_that_cuts_off_each_reader_is_given_up_and_says_so() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.upload("warm", "text/plain", b"Warm.".to_vec()).await;
    let begun = acme.begin_upload(&new("poison", b"Poison.")).await;
    let rule = json!({"mode": "kill_after", "function": "upload_ingestion", "operation": "PutItem",
        "table": "documents", "contains": "poison"});
    stack.dynamodb_faults(json!({"rules": [rule]})).await;
    assert_eq!(put_file(&begun, "Poison.").await.0, StatusCode::OK);
    for times in 1..8 {
        killed(&stack, times).await;
        if times == 7 {
            stack.clear_dynamodb_faults().await;
        }
        next_attempt(&stack, &acme).await;
    }
    let failed = acme.read_upload("poison").await;
    assert!(failed["reason"].as_str().unwrap().contains("cut off"), "{failed}");
    over(&stack, &acme).await;
    stack.unhide_messages("uploads").await;
    until("the dead letter", async || (stack.queue_messages("upload-failures").len() == 1).then_some(()))
        .await;
    // Others are read meanwhile and after it.
    acme.upload("fine", "text/plain", b"Fine.".to_vec()).await;
}

#[tokio::test]
async fn a_message_that_comes_again_changes_nothing() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    // The file waits in the queue, as its message does.
    stack.change_tenant(&acme.id, json!({"limits": {"tokens_per_day": 0}})).await;
    let begun = acme.begin_upload(&new("twice", b"Twice told.")).await;
    assert_eq!(put_file(&begun, "Twice told.").await.0, StatusCode::OK);
    stack.upload_attempts(1).await;
    let body = stack.queue("uploads").await[0]["body"].as_str().unwrap().to_owned();
    stack.change_tenant(&acme.id, json!({"limits": {"tokens_per_day": 1_000_000}})).await;
    for _ in 0..5 {
        stack.send_message("uploads", &body).await;
    }
    stack.unhide_messages("uploads").await;
    acme.read_upload("twice").await;
    until("all messages' end", async || {
        stack.unhide_messages("uploads").await;
        stack.queue("uploads").await.is_empty().then_some(())
    })
    .await;
    over(&stack, &acme).await;
    let stored = records(&stack, &acme, "document_ingested").await;
    let paid = stored.iter().filter(|record| record["embedding_tokens"].as_u64() > Some(0)).count();
    assert_eq!(paid, 1, "{stored:#?}");
    assert_eq!(acme.get("/v1/documents/twice").await.json()["version"], 1);
    // Long after it was read, too.
    stack.send_message("uploads", &body).await;
    until("the message's end", async || stack.queue("uploads").await.is_empty().then_some(())).await;
    assert_eq!(records(&stack, &acme, "document_ingested").await.len(), stored.len());
    stack.stop().await;
}

#[tokio::test]
async fn a_limit_lets_a_file_wait_and_fail_in_the_end() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let limit = async |tokens: u64| {
        stack.change_tenant(&acme.id, json!({"limits": {"tokens_per_day": tokens}})).await;
    };
    limit(0).await;
    let begun = acme.begin_upload(&new("waits", b"It waits.")).await;
    assert_eq!(put_file(&begun, "It waits.").await.0, StatusCode::OK);
    stack.upload_attempts(1).await;
    assert_eq!(status(&acme, "waits").await, "pending");
    limit(1_000_000).await;
    stack.unhide_messages("uploads").await;
    assert_eq!(acme.read_upload("waits").await["status"], "ready");
    over(&stack, &acme).await;

    limit(0).await;
    let begun = acme.begin_upload(&new("fails", b"It fails.")).await;
    assert_eq!(put_file(&begun, "It fails.").await.0, StatusCode::OK);
    for times in 1..8 {
        stack.upload_attempts(times).await;
        assert_eq!(status(&acme, "fails").await, "pending");
        stack.unhide_messages("uploads").await;
    }
    let failed = acme.read_upload("fails").await;
    assert!(failed["reason"].as_str().unwrap().contains("tokens_per_day"), "{failed}");
    over(&stack, &acme).await;
    // It is the tenant's to see to, and nobody's alarm.
    assert_eq!(stack.queue_messages("upload-failures"), Vec::<Value>::new());
    stack.stop().await;
}

#[tokio::test]
async fn a_tenant_that_is_suspended_meanwhile_gets_nothing_read() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let begun = acme.begin_upload(&new("late", b"Late.")).await;
    stack.change_tenant(&acme.id, json!({"status": "suspended"})).await;
    assert_eq!(put_file(&begun, "Late.").await.0, StatusCode::OK);
    stack.upload_attempts(1).await;
    assert_eq!(stack.items("documents", "acme", "DOC#").await[0]["status"], "pending");
    stack.change_tenant(&acme.id, json!({"status": "active"})).await;
    stack.unhide_messages("uploads").await;
    assert_eq!(acme.read_upload("late").await["status"], "ready");
    over(&stack, &acme).await;

    // One that stays so: the message ends among the dead letters, and the document says that its file was not read.
    let begun = acme.begin_upload(&new("never", b"Never.")).await;
    stack.change_tenant(&acme.id, json!({"status": "suspended"})).await;
    assert_eq!(put_file(&begun, "Never.").await.0, StatusCode::OK);
    for times in 1..=8 {
        stack.upload_attempts(times).await;
        stack.unhide_messages("uploads").await;
    }
    until("the dead letter", async || (stack.queue_messages("upload-failures").len() == 1).then_some(()))
        .await;
    stack.change_tenant(&acme.id, json!({"status": "active"})).await;
    assert_eq!(status(&acme, "never").await, "pending");
    long_ago(&stack, &acme, "never").await;
    stack.invoke("eraser", json!({"job": "uploads"})).await;
    let failed = acme.get("/v1/documents/never").await.expect_status(StatusCode::OK).json();
    assert_eq!(failed["status"], "failed");
    assert!(failed["reason"].as_str().unwrap().contains("upload it again"), "{failed}");
    assert!(under_way(&stack, &acme).await.is_empty());
}

/// Lets an upload have been begun so long ago that nobody awaits it any more.
async fn long_ago(stack: &Stack, tenant: &Tenant, id: &str) {
    for upload in under_way(stack, tenant).await.iter().filter(|upload| upload["document_id"] == id) {
        let once = json!({"N": "1"});
        stack.edit("documents", upload_key(tenant, upload), &["expires_at"], once.clone()).await;
        let document = json!({"tenant_id": {"S": tenant.id}, "sk": {"S": format!("DOC#{id}")}});
        stack.edit("documents", document, &["upload", "until"], once).await;
    }
}

#[tokio::test]
async fn an_upload_that_is_never_made_is_forgotten() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("known", "known", "It says 25 days.").await;
    for id in ["never", "known"] {
        acme.begin_upload(&new(id, b"Never.")).await;
    }
    // Not before its time.
    assert_eq!(stack.invoke("eraser", json!({"job": "uploads"})).await["unmade"], 0);
    assert_eq!(status(&acme, "never").await, "pending");
    assert_eq!(status(&acme, "known").await, "pending");
    for id in ["never", "known"] {
        long_ago(&stack, &acme, id).await;
    }
    acme.get("/v1/documents/never").await.expect_error(404, "not_found");
    acme.delete("/v1/documents/never").await.expect_error(404, "not_found");
    assert_eq!(status(&acme, "known").await, "ready");
    assert_eq!(acme.get("/v1/documents").await.json()["documents"].as_array().unwrap().len(), 1);
    assert_eq!(
        stack.invoke("eraser", json!({"job": "uploads"})).await,
        json!({"unmade": 2, "unread": 0, "left": 0})
    );
    assert!(under_way(&stack, &acme).await.is_empty());
    let left = stack.items("documents", "acme", "DOC#").await;
    assert_eq!(left.len(), 1);
    assert_eq!(records(&stack, &acme, "document_expired").await.len(), 1);
    assert_eq!(acme.search("How many days?", 3).await.len(), 1);
    stack.stop().await;
}

#[tokio::test]
async fn a_document_that_is_deleted_leaves_nothing_of_its_file() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    // Before its file has come: the link takes none any more.
    let begun = acme.begin_upload(&new("early", b"Early.")).await;
    acme.delete("/v1/documents/early").await.expect_status(StatusCode::NO_CONTENT);
    assert_eq!(put_file(&begun, "Early.").await.0, StatusCode::PRECONDITION_FAILED);
    acme.get("/v1/documents/early").await.expect_error(404, "not_found");
    over(&stack, &acme).await;
    // Nor does one that is begun anew, or sent in the place of its file.
    let first = acme.begin_upload(&new("anew", b"First.")).await;
    let second = acme.begin_upload(&new("anew", b"Second")).await;
    assert_eq!(put_file(&first, "First.").await.0, StatusCode::PRECONDITION_FAILED);
    acme.store("anew", "anew", "Sent.").await;
    assert_eq!(put_file(&second, "Second").await.0, StatusCode::PRECONDITION_FAILED);
    over(&stack, &acme).await;
    acme.delete("/v1/documents/anew").await.expect_status(StatusCode::NO_CONTENT);
    // While its file waits to be read.
    stack.change_tenant(&acme.id, json!({"limits": {"tokens_per_day": 0}})).await;
    let begun = acme.begin_upload(&new("waiting", b"Waiting.")).await;
    assert_eq!(put_file(&begun, "Waiting.").await.0, StatusCode::OK);
    stack.upload_attempts(1).await;
    assert!(stack.file_sizes(&acme.id).await.contains(&8));
    acme.delete("/v1/documents/waiting").await.expect_status(StatusCode::NO_CONTENT);
    assert!(stack.file_sizes(&acme.id).await.iter().all(|size| *size == 0));
    stack.change_tenant(&acme.id, json!({"limits": {"tokens_per_day": 1_000_000}})).await;
    stack.unhide_messages("uploads").await;
    until("the message's end", async || stack.queue("uploads").await.is_empty().then_some(())).await;
    acme.get("/v1/documents/waiting").await.expect_error(404, "not_found");
    // While it is read: what its reader has stored by then is found by nobody.
    let hold = json!({"mode": "delay", "delay_ms": 1_500, "operation": "PutItem", "table": "documents",
        "contains": "\"ready\"", "times": 1});
    let begun = acme.begin_upload(&new("reading", b"The reading room.")).await;
    stack.dynamodb_faults(json!({"rules": [hold]})).await;
    assert_eq!(put_file(&begun, "The reading room.").await.0, StatusCode::OK);
    until("the reading", async || (status(&acme, "reading").await == "processing").then_some(())).await;
    acme.delete("/v1/documents/reading").await.expect_status(StatusCode::NO_CONTENT);
    until("the message's end", async || {
        next_attempt(&stack, &acme).await;
        stack.queue("uploads").await.is_empty().then_some(())
    })
    .await;
    stack.clear_dynamodb_faults().await;
    over(&stack, &acme).await;
    acme.get("/v1/documents/reading").await.expect_error(404, "not_found");
    assert_eq!(acme.search("reading room", 5).await, Vec::<Value>::new());
    // After it.
    acme.upload("read", "text/plain", b"Read.".to_vec()).await;
    acme.delete("/v1/documents/read").await.expect_status(StatusCode::NO_CONTENT);
    assert!(stack.file_sizes(&acme.id).await.iter().all(|size| *size == 0));
    // The count of documents stays, and is of none.
    let left = stack.items("documents", "acme", "").await;
    assert!(left.iter().all(|item| item["sk"] == "COUNT" && item["documents"] == 0), "{left:?}");
    stack.stop().await;
}

#[tokio::test]
async fn a_file_whose_key_is_revoked_meanwhile_is_not_read() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    let made = acme.post("/v1/keys", &json!({"scopes": ["documents:write", "documents:read"]})).await.json();
    let other = acme.with_key(made["api_key"].as_str().unwrap());
    let begun = other.begin_upload(&new("revoked", b"Revoked.")).await;
    let path = format!("/v1/keys/{}", made["key_id"].as_str().unwrap());
    acme.delete(&path).await.expect_status(StatusCode::NO_CONTENT);
    assert_eq!(put_file(&begun, "Revoked.").await.0, StatusCode::OK);
    let failed = acme.read_upload("revoked").await;
    assert!(failed["reason"].as_str().unwrap().contains("key"), "{failed}");
    over(&stack, &acme).await;
    until("the message's end", async || stack.queue("uploads").await.is_empty().then_some(())).await;
    let denied = records(&stack, &acme, "auth_denied").await;
    assert!(denied.iter().any(|record| record["key_id"] == made["key_id"]), "{denied:?}");
    assert_eq!(records(&stack, &acme, "document_ingested").await, Vec::<Value>::new());
    stack.stop().await;
}

#[tokio::test]
async fn nobody_sees_or_ends_anothers_upload() {
    let stack = Stack::start().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    let begun = acme.begin_upload(&new("shared", b"Of acme's own.")).await;
    globex.get("/v1/documents/shared").await.expect_error(404, "not_found");
    globex.delete("/v1/documents/shared").await.expect_error(404, "not_found");
    // The same id is another document.
    let theirs = globex.begin_upload(&new("shared", b"Of globex's.")).await;
    assert_eq!(put_file(&begun, "Of acme's own.").await.0, StatusCode::OK);
    assert_eq!(acme.read_upload("shared").await["status"], "ready");
    assert_eq!(status(&globex, "shared").await, "pending");
    assert_eq!(put_file(&theirs, "Of globex's.").await.0, StatusCode::OK);
    assert_eq!(globex.read_upload("shared").await["status"], "ready");
    assert_eq!(acme.search("Whose is it?", 5).await.len(), 1);
    assert!(globex.search("Whose is it?", 5).await[0]["text"].as_str().unwrap().contains("globex"));
    // Whoever forges a message gets nothing read that was not begun, and nobody else's.
    let upload = "upl_0123456789012345678901";
    for tenant in ["acme", "globex", "nobody"] {
        let key = format!("tenant%3D{tenant}/uploads/{upload}");
        let body = json!({"Records": [{"s3": {"object": {"key": key, "size": 5}}}]});
        stack.send_message("uploads", &body.to_string()).await;
    }
    until("all messages' end", async || stack.queue("uploads").await.is_empty().then_some(())).await;
    over(&stack, &acme).await;
    over(&stack, &globex).await;
    stack.stop().await;
}
