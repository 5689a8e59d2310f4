//! Tenants with a KMS key of their own: what they write rests sealed, opens for nobody else, and is as available as
//! the key is.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::{Answer, Key, Options, Stack, Tenant, put_file, until};

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

/// What is uploaded as a file: its word is in nothing else.
const FILE: &str = "Every taradiddle has 31 days of unpaid leave.";

fn new_file(id: &str) -> Value {
    json!({"id": id, "title": format!("{TITLE} {id}"), "source": format!("{NOTE}.txt"), "metadata": {"note": NOTE},
        "content_type": "text/plain", "size_bytes": FILE.len()})
}

fn rated(answer: &Value, comment: &str) -> Value {
    json!({"id": answer["id"], "rating": "up", "comment": comment})
}

/// Lets no file be read, or lets them.
async fn may_read(stack: &Stack, may: bool) {
    let tokens = if may { 1_000_000 } else { 0 };
    stack.change_tenant("acme", json!({"limits": {"tokens_per_day": tokens}})).await;
}

/// Begins the upload of [`FILE`], and puts it while nobody may read it.
async fn left_waiting(stack: &Stack, acme: &Tenant, id: &str) {
    may_read(stack, false).await;
    let begun = acme.begin_upload(&new_file(id)).await;
    assert_eq!(put_file(&begun, FILE).await.0, StatusCode::OK);
    until("the attempt", async || {
        let uploads = stack.items("documents", "acme", "UPLOAD#").await;
        let left = |upload: &Value| {
            upload["document_id"] == id && upload["attempts"] == 1 && upload["claimed_until"].is_null()
        };
        uploads.iter().any(left).then_some(())
    })
    .await;
    stack.upload_attempts(1).await;
}

async fn document(stack: &Stack, id: &str) -> Value {
    stack.items("documents", "acme", &format!("DOC#{id}")).await[0].clone()
}

#[tokio::test]
async fn a_file_waits_sealed_and_is_found() {
    let stack = stack().await;
    let arn = stack.create_kms_key().await;
    let acme = with_key(&stack, "acme", &arn).await;
    stack.take_kms_calls().await;
    left_waiting(&stack, &acme, "f").await;
    let head = stack.s3().list_object_versions().bucket(stack.documents_bucket()).send().await.unwrap();
    let [version] = head.versions() else { panic!("{head:?}") };
    let key = version.key().unwrap();
    assert_eq!(version.size(), Some(FILE.len() as i64));
    let head = stack.s3().head_object().bucket(stack.documents_bucket()).key(key).send().await.unwrap();
    assert_eq!(head.ssekms_key_id(), Some(&*arn));
    let records = stack.items("documents", "acme", "").await;
    let sealed: Vec<_> = records.iter().filter(|item| item["data_key"]["arn"] == *arn).collect();
    assert_eq!(sealed.len(), 2, "the upload and its document: {records:?}");
    let data = stack.data();
    for word in ["taradiddle", TITLE, NOTE] {
        assert_eq!(holding(&data, word), Vec::<String>::new(), "{word}");
    }
    let pending = acme.get("/v1/documents/f").await.json();
    assert_eq!((&pending["status"], &pending["source"]), (&json!("pending"), &new_file("f")["source"]));

    may_read(&stack, true).await;
    stack.unhide_messages("uploads").await;
    let ready = acme.read_upload("f").await;
    for field in ["title", "source", "metadata"] {
        assert_eq!((&ready["status"], &ready[field]), (&json!("ready"), &new_file("f")[field]));
    }
    assert!(acme.search("taradiddle", 3).await[0]["text"].as_str().unwrap().contains("31 days"));
    for word in ["taradiddle", TITLE, NOTE] {
        assert_eq!(holding(&data, word), Vec::<String>::new(), "{word}");
    }
    // S3 has asked as the one who has signed the link, and as the one who reads: each time for that file of that tenant.
    let calls = stack.take_kms_calls().await;
    let of_the_file = json!({"tenant_id": "acme", "aws:s3:arn": format!("arn:aws:s3:::{}/{key}", stack.documents_bucket())});
    let of_the_file: Vec<&Value> = calls.iter().filter(|call| call["context"] == of_the_file).collect();
    let did = |operation: &str, role: &str| {
        let by = |call: &&&Value| {
            call["operation"] == operation && call["caller"].as_str().unwrap().contains(role)
        };
        of_the_file.iter().filter(by).count()
    };
    assert_eq!(did("GenerateDataKey", "bulkhead-IngestionTenantRole"), 1, "{calls:?}");
    assert!(did("Decrypt", "bulkhead-UploadIngestionTenantRole") > 0, "{calls:?}");
    // What stands in the file's place until the link ends is empty, and under no key.
    stack.uploads_end("acme").await;
    let head = stack.s3().head_object().bucket(stack.documents_bucket()).key(key).send().await.unwrap();
    assert_eq!((head.content_length(), head.ssekms_key_id()), (Some(0), None));
    stack.stop().await;
}

#[tokio::test]
async fn a_link_takes_no_file_that_is_not_sealed_with_the_tenants_key_for_the_tenant() {
    let stack = stack().await;
    let (arn, other) = (stack.create_kms_key().await, stack.create_kms_key().await);
    let (acme, globex) = (with_key(&stack, "acme", &arn).await, with_key(&stack, "globex", &arn).await);
    let begun = acme.begin_upload(&new_file("f")).await;
    let sse = "x-amz-server-side-encryption";
    let (key, context) = (format!("{sse}-aws-kms-key-id"), format!("{sse}-context"));
    assert_eq!((&begun["headers"][sse], &begun["headers"][&key]), (&json!("aws:kms"), &json!(arn)));
    for (header, value) in [
        (sse, None),
        (sse, Some("AES256")),
        (&*key, None),
        (&*key, Some(other.as_str())),
        (&*context, None),
        (&*context, Some("eyJ0ZW5hbnRfaWQiOiJnbG9iZXgifQ==")),
    ] {
        let mut changed = begun.clone();
        changed["headers"].as_object_mut().unwrap().remove(header);
        if let Some(value) = value {
            changed["headers"][header] = value.into();
        }
        let (status, answer) = put_file(&changed, FILE).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{header} {value:?}: {answer}");
    }
    let mut bare = begun.clone();
    bare["headers"].as_object_mut().unwrap().retain(|name, _| !name.starts_with(sse));
    assert_eq!(put_file(&bare, FILE).await.0, StatusCode::FORBIDDEN);
    // Nor does a link without a key take one: what is not signed is not sent.
    let plain = stack.provision(body("plain")).await.begin_upload(&new_file("f")).await;
    assert!(!plain["headers"].to_string().contains(sse), "{plain}");
    let mut more = plain.clone();
    more["headers"][sse] = "aws:kms".into();
    more["headers"][&key] = other.clone().into();
    assert_eq!(put_file(&more, FILE).await.0, StatusCode::FORBIDDEN);
    let listed = stack.s3().list_object_versions().bucket(stack.documents_bucket()).send().await.unwrap();
    assert_eq!(listed.versions().len(), 0);

    // The sessions' own policies: a file's data key is of the session's tenant, or there is none.
    let own = stack.own_key("ingestion");
    let session = stack.assume(&own, "IngestionTenantRole", &[("tenant_id", "acme")]);
    let session = session.await.unwrap();
    let put = async |context: Option<&str>| {
        let put = stack.s3_as(&session).put_object().bucket(stack.documents_bucket());
        let put =
            put.key("tenant=acme/uploads/x").server_side_encryption("aws:kms".into()).ssekms_key_id(&arn);
        let put = put
            .set_ssekms_encryption_context(context.map(str::to_owned))
            .body(FILE.as_bytes().to_vec().into());
        put.send().await.map_err(|error| format!("{:?}", error.into_service_error()))
    };
    for context in [None, Some("eyJ0ZW5hbnRfaWQiOiJnbG9iZXgifQ==")] {
        let refused = put(context).await.unwrap_err();
        assert!(refused.contains("AccessDenied") && refused.contains("kms:GenerateDataKey"), "{refused}");
    }
    put(begun["headers"][&context].as_str()).await.unwrap();
    // Nor does one read what is another's: not where that lies, nor if it lay among its own.
    globex.upload("g", "text/plain", b"Of globex's own.".to_vec()).await;
    let reader = stack.own_key("upload-ingestion");
    let session =
        stack.assume(&reader, "UploadIngestionTenantRole", &[("tenant_id", "globex")]).await.unwrap();
    let bucket = stack.documents_bucket();
    let astray = stack.s3().put_object().bucket(&bucket).key("tenant=globex/uploads/x");
    let astray = astray.server_side_encryption("aws:kms".into()).ssekms_key_id(&arn);
    let astray = astray.set_ssekms_encryption_context(begun["headers"][&context].as_str().map(str::to_owned));
    astray.body(FILE.as_bytes().to_vec().into()).send().await.unwrap();
    for (key, lacks) in
        [("tenant=acme/uploads/x", "s3:GetObject"), ("tenant=globex/uploads/x", "kms:Decrypt")]
    {
        let read = stack.s3_as(&session).get_object().bucket(&bucket).key(key).send().await;
        let refused = format!("{:?}", read.unwrap_err().into_service_error());
        assert!(refused.contains("AccessDenied") && refused.contains(lacks), "{key}: {refused}");
    }
}

#[tokio::test]
async fn a_file_whose_key_is_off_is_tried_and_fails_and_says_so() {
    let stack = stack().await;
    let arn = stack.create_kms_key().await;
    let acme = with_key(&stack, "acme", &arn).await;
    // With what its reader remembers of the key, S3 refuses; without, KMS does.
    for (n, warm) in [true, false].into_iter().enumerate() {
        let id = format!("f{n}");
        left_waiting(&stack, &acme, &id).await;
        stack.kms("DisableKey", json!({"KeyId": arn})).await;
        if !warm {
            stack.kill("upload_ingestion").await;
        }
        may_read(&stack, true).await;
        for times in 2..=8 {
            assert_eq!(document(&stack, &id).await["status"], "pending", "{times}");
            stack.unhide_messages("uploads").await;
            if times < 8 {
                stack.upload_attempts(times).await;
            }
        }
        let failed = until("the end", async || {
            Some(document(&stack, &id).await).filter(|document| document["status"] == "failed")
        })
        .await;
        assert!(failed["reason"].as_str().unwrap().contains("KMS key could not be used"), "{failed}");
        assert_eq!(failed["data_key"]["arn"], *arn);
        stack.uploads_end("acme").await;
        // It is the tenant's to see to, and nobody's alarm.
        until("the message's end", async || stack.queue("uploads").await.is_empty().then_some(())).await;
        assert_eq!(stack.queue_messages("upload-failures"), Vec::<Value>::new());
        // What it is called opens again with the key, and so does its next file.
        stack.kms("EnableKey", json!({"KeyId": arn})).await;
        let shown = acme.get(&format!("/v1/documents/{id}")).await.expect_status(StatusCode::OK).json();
        assert_eq!((&shown["status"], &shown["reason"]), (&json!("failed"), &failed["reason"]));
        assert_eq!(shown["title"], new_file(&id)["title"]);
        let begun = acme.begin_upload(&new_file(&id)).await;
        assert_eq!(put_file(&begun, FILE).await.0, StatusCode::OK);
        until("the file", async || {
            Some(document(&stack, &id).await).filter(|document| document["status"] == "ready")
        })
        .await;
    }
    assert!(stack.logs().contains("KMS.DisabledException"));
    // A KMS that does not answer is ours to see to.
    left_waiting(&stack, &acme, "outage").await;
    for times in 2..8 {
        stack.unhide_messages("uploads").await;
        stack.upload_attempts(times).await;
    }
    may_read(&stack, true).await;
    stack.kill("upload_ingestion").await;
    stack.kms_outage(true).await;
    stack.unhide_messages("uploads").await;
    let failed = until("the end", async || {
        Some(document(&stack, "outage").await).filter(|document| document["status"] == "failed")
    })
    .await;
    let reason = failed["reason"].as_str().unwrap();
    assert!(reason.contains("key service cannot be reached") && !reason.contains("KMS key"), "{failed}");
    stack.kms_outage(false).await;
    until("the dead letter", async || {
        stack.unhide_messages("uploads").await;
        (stack.queue_messages("upload-failures").len() == 1).then_some(())
    })
    .await;
    // A link whose key goes off takes no file.
    let begun = acme.begin_upload(&new_file("late")).await;
    stack.kms("DisableKey", json!({"KeyId": arn})).await;
    let (status, answer) = put_file(&begun, FILE).await;
    assert!(status == StatusCode::BAD_REQUEST && answer.contains("KMS.DisabledException"), "{answer}");
    // What holds nothing yet is begun anew under another key, although nobody can tell any more what it was called.
    let other = stack.create_kms_key().await;
    stack.change_tenant("acme", json!({"kms_key_arn": other})).await;
    stack.kill("ingestion").await;
    refused(&acme.get("/v1/documents").await);
    for id in ["outage", "late"] {
        refused(&acme.get(&format!("/v1/documents/{id}")).await);
        let begun = acme.begin_upload(&new_file(id)).await;
        assert_eq!(put_file(&begun, FILE).await.0, StatusCode::OK);
        assert_eq!(acme.read_upload(id).await["title"], new_file(id)["title"]);
        assert_eq!(document(&stack, id).await["data_key"]["arn"], *other);
    }
    // What holds something keeps it.
    refused(&acme.post("/v1/uploads", &new_file("f0")).await);
    stack.stop().await;
}

/// A file is read with the key that it was put with, and its document sealed with what the tenant has by then.
#[tokio::test]
async fn a_key_that_changes_while_a_file_waits_is_no_matter() {
    let stack = stack().await;
    let (one, two) = (stack.create_kms_key().await, stack.create_kms_key().await);
    let acme = with_key(&stack, "acme", &one).await;
    for (n, (then, sealed)) in
        [(json!(two), json!(two)), (Value::Null, Value::Null), (json!(one), json!(one))]
            .into_iter()
            .enumerate()
    {
        let id = format!("f{n}");
        left_waiting(&stack, &acme, &id).await;
        stack.change_tenant("acme", json!({"kms_key_arn": then})).await;
        may_read(&stack, true).await;
        stack.unhide_messages("uploads").await;
        let ready = acme.read_upload(&id).await;
        assert_eq!((&ready["status"], &ready["title"]), (&json!("ready"), &new_file(&id)["title"]));
        assert_eq!(document(&stack, &id).await["data_key"]["arn"], sealed);
    }
    stack.stop().await;
}

/// A repeat of a request answers a link of its own, sealed and opened again from what was kept of the first.
#[tokio::test]
async fn a_repeat_of_an_upload_is_the_same_upload() {
    let stack = stack().await;
    let acme = with_key(&stack, "acme", &stack.create_kms_key().await).await;
    let begin = async || {
        let request = acme.request(Method::POST, "/v1/uploads").header("idempotency-key", "k");
        let answer = Answer::read(request.json(&new_file("f")).send().await.unwrap()).await;
        answer.expect_status(StatusCode::CREATED).json()
    };
    let (first, again) = (begin().await, begin().await);
    let key = "x-amz-server-side-encryption-aws-kms-key-id";
    assert_eq!((&first["document_id"], &first["headers"]), (&again["document_id"], &again["headers"]));
    assert_eq!(stack.items("documents", "acme", "UPLOAD#").await.len(), 1);
    assert!(stack.items("conversations", "acme", "IDEM#").await[0]["data_key"].is_object());
    // Under another key it is the same still, and what its new link puts is under that.
    let two = stack.create_kms_key().await;
    stack.change_tenant("acme", json!({"kms_key_arn": two})).await;
    let later = begin().await;
    assert_eq!(later["document_id"], first["document_id"]);
    assert_eq!((&later["headers"][key], first["headers"][key] != later["headers"][key]), (&json!(two), true));
    assert_eq!(stack.items("documents", "acme", "UPLOAD#").await.len(), 1);
    assert_eq!(put_file(&later, FILE).await.0, StatusCode::OK);
    assert_eq!(acme.read_upload("f").await["status"], "ready");
    assert_eq!(document(&stack, "f").await["data_key"]["arn"], *two);
    // Nobody's key is asked to forget what never came.
    let arn = stack.items("tenants", "acme", "CONFIG").await[0]["kms_key_arn"].clone();
    acme.begin_upload(&new_file("never")).await;
    stack.kms("ScheduleKeyDeletion", json!({"KeyId": arn})).await;
    let upload = stack.items("documents", "acme", "UPLOAD#").await[0]["sk"].clone();
    let key = |sort: Value| json!({"tenant_id": {"S": "acme"}, "sk": {"S": sort}});
    stack.edit("documents", key(upload), &["expires_at"], json!({"N": "1"})).await;
    stack.edit("documents", key(json!("DOC#never")), &["upload", "until"], json!({"N": "1"})).await;
    assert_eq!(stack.invoke("eraser", json!({"job": "uploads"})).await["unmade"], 1);
    assert_eq!(stack.items("documents", "acme", "UPLOAD#").await, Vec::<Value>::new());
    assert_eq!(stack.items("documents", "acme", "DOC#never").await, Vec::<Value>::new());
    stack.stop().await;
}

/// What a user says of an answer is sealed like the answer, wherever it is kept, and shown again.
#[tokio::test]
async fn what_users_say_of_answers_is_sealed_and_shown() {
    const SAID: &str = "Collywobbles";
    let stack = stack().await;
    let (one, two) = (stack.create_kms_key().await, stack.create_kms_key().await);
    let acme = with_key(&stack, "acme", &one).await;
    store(&acme).await;
    let before = async |change: Value| stack.change_tenant("acme", json!({"kms_key_arn": change})).await;
    // Turns of one key and rated with another, of none and rated with one, and of one and rated with none.
    let same = acme.ask(&question()).await;
    let older = acme.ask(&question()).await;
    let completion = json!({"messages": [{"role": "user", "content": question()}]});
    let alone = acme.post("/v1/chat/completions", &completion).await.expect_status(StatusCode::OK).json();
    let keyless = acme.ask(&question()).await;
    before(Value::Null).await;
    let plain = acme.ask("In the clear?").await;
    before(json!(one)).await;
    let said = |n: u32| format!("{SAID} {n}.");
    let rate = async |answer: &Value, n: u32| {
        let body = rated(answer, &said(n));
        for key in [Some(n.to_string()), Some(n.to_string()), None] {
            let request = acme.request(Method::POST, "/v1/feedback");
            let request =
                key.iter().fold(request, |request, key| request.header("idempotency-key", key.as_str()));
            let answer = Answer::read(request.json(&body).send().await.unwrap()).await;
            assert_eq!(answer.expect_status(StatusCode::CREATED).json(), body);
        }
        acme.post("/v1/feedback", &rated(answer, "Another.")).await.expect_error(409, "conflict");
    };
    rate(&same, 1).await;
    rate(&alone, 2).await;
    rate(&plain, 3).await;
    before(json!(two)).await;
    rate(&older, 4).await;
    for process in ["warm", "cold"] {
        for (answer, n) in [(&same, 1), (&plain, 3), (&older, 4)] {
            let path = format!("/v1/conversations/{}", answer["conversation_id"].as_str().unwrap());
            let whole = acme.get(&path).await.expect_status(StatusCode::OK).json();
            let shown = &whole["turns"][0];
            assert_eq!(shown["feedback"], json!({"rating": "up", "comment": said(n)}), "{process} {n}");
            assert_eq!(shown["response"], answer["response"]);
        }
        rate(&alone, 2).await;
        stack.kill("chat").await;
    }
    assert_eq!(holding(&stack.data(), SAID), Vec::<String>::new());
    for item in stack.items("conversations", "acme", "ANSWER#").await {
        if item["id"] == keyless["id"] {
            continue;
        }
        assert!(item["feedback"].is_string() && item["data_key"].is_object(), "{item}");
    }
    // Written in the clear, it would be found.
    before(Value::Null).await;
    for process in ["cold", "warm"] {
        rate(&keyless, 5).await;
        let path = format!("/v1/conversations/{}", keyless["conversation_id"].as_str().unwrap());
        let whole = acme.get(&path).await.expect_status(StatusCode::OK).json();
        let shown = &whole["turns"][0];
        assert_eq!(shown["feedback"], json!({"rating": "up", "comment": said(5)}), "{process}");
        assert_eq!(shown["response"], keyless["response"]);
    }
    assert_ne!(holding(&stack.data(), SAID), Vec::<String>::new());

    // What is sealed with a key that is gone gets nothing said of it any more: nothing of it is half written.
    before(json!(two)).await;
    let lost = acme.ask(&question()).await;
    before(json!(one)).await;
    stack.kms("ScheduleKeyDeletion", json!({"KeyId": two})).await;
    stack.kill("chat").await;
    let written = async || stack.items("conversations", "acme", "").await;
    let was = written().await;
    refused(&acme.post("/v1/feedback", &rated(&lost, SAID)).await);
    assert_eq!(written().await, was);
    stack.stop().await;
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
        refused(&acme.post("/v1/uploads", &new_file("f")).await);
        refused(&acme.post("/v1/feedback", &rated(&first, "Splendid.")).await);
        assert_eq!(
            stack
                .s3()
                .list_object_versions()
                .bucket(stack.documents_bucket())
                .send()
                .await
                .unwrap()
                .versions()
                .len(),
            0
        );
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
    for id in ["deleted", "unread", "waiting"] {
        left_waiting(&stack, &acme, id).await;
    }
    stack.kms("ScheduleKeyDeletion", json!({"KeyId": arn})).await;
    for function in ["chat", "ingestion", "upload_ingestion"] {
        stack.kill(function).await;
    }
    for id in ["d", "deleted"] {
        let path = format!("/v1/documents/{id}");
        refused(&acme.get(&path).await);
        acme.delete(&path).await.expect_status(StatusCode::NO_CONTENT);
        acme.delete(&path).await.expect_error(404, "not_found");
    }
    // A file goes with its document, and with whoever looks after what nobody has read.
    let long = FILE.len() as i64;
    assert_eq!(stack.file_sizes("acme").await, [0, long, long]);
    let uploads = stack.items("documents", "acme", "UPLOAD#").await;
    let unread = uploads.iter().find(|upload| upload["document_id"] == "unread").unwrap();
    let key = json!({"tenant_id": {"S": "acme"}, "sk": {"S": unread["sk"]}});
    stack.edit("documents", key, &["expires_at"], json!({"N": "1"})).await;
    let report = stack.invoke("eraser", json!({"job": "uploads"})).await;
    assert_eq!((&report["unread"], &report["unmade"]), (&json!(1), &json!(0)), "{report}");
    let failed = document(&stack, "unread").await;
    assert_eq!((&failed["status"], &failed["data_key"]["arn"]), (&json!("failed"), &json!(arn)));
    assert!(failed["reason"].as_str().unwrap().contains("upload it again"), "{failed}");
    assert_eq!(stack.file_sizes("acme").await, [0, long]);

    stack.change_tenant("acme", json!({"limits": {"data_retention_days": 0}})).await;
    let report = stack.invoke("eraser", json!({"job": "retain"})).await;
    let counted = (&report["documents"], &report["turns"], &report["left"]);
    assert_eq!(counted, (&json!(3), &json!(1), &json!(0)), "{report}");

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
    assert_eq!(stack.items("documents", "acme", "").await, Vec::<Value>::new());
    assert_eq!(stack.file_sizes("acme").await, Vec::<i64>::new());
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
