//! The end of a tenant (I7): deprovisioning ends with a receipt and nothing left, whatever crashes and
//! whoever is still at work; and what is past its retention is gone.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::string_slice,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says how far it came"
)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::clock::Clock;
use tests::tokens::Signer;
use tests::{Options, Stack, Tenant, next_event};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// How long a deprovisioning may take. Generous: this is no measurement.
const PATIENCE: Duration = Duration::from_secs(90);
/// The tables that hold something of a tenant.
const TABLES: [&str; 7] = ["tenants", "meters", "conversations", "documents", "webhooks", "usage", "audit"];

async fn stack(model_delay_ms: u64) -> Stack {
    let parameters = vec![("AuthorizerCacheSeconds", "2".to_owned())];
    Stack::start_with(Options { model_delay_ms, parameters, no_seed: true, ..Options::default() }).await
}

async fn tenant(stack: &Stack, id: &str) -> Tenant {
    let limits = json!({"requests_per_minute": 20_000, "max_concurrent": 200,
        "tokens_per_day": 1_000_000_000_u64, "monthly_token_budget": 10_000_000_000_u64});
    let body = json!({"tenant_id": id, "tier": "enterprise", "company_name": id, "limits": limits});
    stack.provision(body).await
}

/// Asks for a tenant's deletion.
async fn delete(stack: &Stack, id: &str) -> String {
    let answer = stack.admin(Method::DELETE, &format!("/admin/tenants/{id}"), None).await;
    let answer = answer.expect_status(StatusCode::ACCEPTED).json();
    answer["deprovisioning_id"].as_str().unwrap().to_owned()
}

async fn show(stack: &Stack, id: &str) -> Value {
    let answer = stack.admin(Method::GET, &format!("/admin/deprovisionings/{id}"), None).await;
    answer.expect_status(StatusCode::OK).json()
}

/// Waits for the receipt, which nobody but the table's stream and the schedule brings about.
async fn completed(stack: &Stack, id: &str) -> Value {
    let began = Instant::now();
    loop {
        let view = show(stack, id).await;
        if view["status"] == "completed" {
            return view;
        }
        assert!(began.elapsed() < PATIENCE, "{view:#}\n{}", stack.logs());
        sleep(Duration::from_millis(200)).await;
    }
}

/// The receipt's count of each store that had anything; a fresh look has found all of them empty.
fn deleted(view: &Value) -> BTreeMap<String, u64> {
    let stores = view["receipt"]["stores"].as_array().unwrap();
    assert!(stores.iter().all(|store| store["found"] == 0), "{view:#}");
    let counts =
        stores.iter().map(|s| (s["store"].as_str().unwrap().to_owned(), s["deleted"].as_u64().unwrap()));
    counts.filter(|(_, count)| *count > 0).collect()
}

/// All items of a table, as plain JSON.
async fn scan(stack: &Stack, table: &str) -> Vec<Value> {
    let (mut items, mut start) = (Vec::new(), Value::Null);
    loop {
        let mut call = json!({"ConsistentRead": true});
        if !start.is_null() {
            call["ExclusiveStartKey"] = start;
        }
        let page = stack.dynamodb("Scan", table, call).await;
        items.extend(page["Items"].as_array().unwrap().iter().map(tests::plain_item));
        start = page["LastEvaluatedKey"].clone();
        if start.is_null() {
            return items;
        }
    }
}

fn bucket(stack: &Stack) -> String {
    stack.audit_bucket().replace("-audit-", "-documents-")
}

/// The versions and delete markers of the documents' bucket: keys.
async fn versions(stack: &Stack) -> Vec<String> {
    let listed = stack.s3().list_object_versions().bucket(bucket(stack)).send().await.unwrap();
    let versions = listed.versions().iter().filter_map(|v| v.key());
    let markers = listed.delete_markers().iter().filter_map(|m| m.key());
    versions.chain(markers).map(str::to_owned).collect()
}

async fn secrets(stack: &Stack) -> Vec<String> {
    let list = json!({"IncludePlannedDeletion": true});
    let target = "secretsmanager.ListSecrets";
    let answer = stack.signed_by(&stack.operator(), "secretsmanager", target, &list).await.json();
    let names = answer["SecretList"].as_array().unwrap().iter().map(|s| s["Name"].as_str().unwrap());
    names.map(str::to_owned).collect()
}

/// Whether a text holds an id as a whole word: other tenants' ids begin alike.
fn names(text: &str, id: &str) -> bool {
    text.match_indices(id).any(|(at, _)| {
        let apart = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '-');
        apart(text[..at].chars().next_back()) && apart(text[at + id.len()..].chars().next())
    })
}

/// Of the bucket's keys and the secrets, those that are a tenant's.
async fn objects_and_secrets(stack: &Stack, id: &str) -> Vec<String> {
    let objects = versions(stack).await.into_iter().filter(|key| key.starts_with(&format!("tenant={id}/")));
    let mut all: Vec<String> = objects.collect();
    let (below, key) = (format!("bulkhead/tenant/{id}/"), format!("bulkhead/model/tenants/{id}"));
    all.extend(secrets(stack).await.into_iter().filter(|name| name.starts_with(&below) || *name == key));
    all
}

/// A look past the functions: whatever names the tenant, and where, but for what is kept.
async fn left(stack: &Stack, id: &str) -> Vec<String> {
    let mut left = Vec::new();
    for table in TABLES {
        for item in scan(stack, table).await {
            let sort = item["sk"].as_str().unwrap_or_default();
            let kept = match table {
                "audit" | "usage" => true,
                "tenants" => {
                    item["tenant_id"] == "DEPROVISIONING"
                        || sort.starts_with("DEPROVISIONING#")
                        || (sort == "CONFIG" && item.get("deleted_at").is_some())
                }
                _ => false,
            };
            if !kept && names(&item.to_string(), id) {
                left.push(format!("{table}: {item}"));
            }
        }
    }
    let collections = stack.qdrant().list_collections().await.unwrap().collections;
    left.extend(collections.into_iter().map(|c| c.name).filter(|name| *name == format!("tenant_{id}")));
    left.extend(objects_and_secrets(stack, id).await);
    left
}

/// Everything of a tenant that must stay as it is when another is deleted.
async fn belongings(stack: &Stack, id: &str) -> Vec<Value> {
    let mut all = Vec::new();
    for table in ["tenants", "conversations", "documents", "webhooks"] {
        let items = scan(stack, table).await;
        let own = items.into_iter().filter(|i| i["tenant_id"] == id || i["holder"] == id);
        all.extend(own);
    }
    all.sort_by_key(|item| (item["tenant_id"].to_string(), item["sk"].to_string()));
    let collection = stack.qdrant().collection_info(format!("tenant_{id}")).await.unwrap();
    all.push(collection.result.unwrap().points_count.into());
    all.extend(objects_and_secrets(stack, id).await.into_iter().map(Value::from));
    all
}

/// Gives a tenant something in every store.
async fn furnish(stack: &Stack, tenant: &Tenant) {
    let id = &tenant.id;
    for document in ["handbook", "lease", "menu"] {
        tenant.store(document, document, &format!("The {document} of {id} says 25 days.")).await;
    }
    for n in 0..4 {
        let asked = tenant
            .request(Method::POST, "/v1/chat")
            .header("idempotency-key", format!("key-{n}"))
            .json(&json!({"message": "How many days?"}));
        assert_eq!(asked.send().await.unwrap().status(), StatusCode::OK);
    }
    tenant.post("/v1/keys", &json!({"scopes": ["chat"]})).await.expect_status(StatusCode::CREATED);
    // One issuer stays; one that is removed leaves its claim.
    for (name, stays) in [("login", true), ("old", false)] {
        let issuer = json!({"issuer": format!("https://{name}.{id}.example"), "audience": id,
            "keys": [Signer::ed25519("k").public()]});
        let issuer = tenant.post("/v1/issuers", &issuer).await.expect_status(StatusCode::CREATED).json();
        if !stays {
            let path = format!("/v1/issuers/{}", issuer["issuer_id"].as_str().unwrap());
            tenant.delete(&path).await.expect_status(StatusCode::NO_CONTENT);
        }
    }
    for (key, times) in [("a/one.txt", 3), ("two.txt", 1)] {
        let key = format!("tenant={id}/{key}");
        for n in 0..times {
            let put = stack.s3().put_object().bucket(bucket(stack)).key(&key);
            put.body(ByteStream::from(vec![n; 10])).send().await.unwrap();
        }
        stack.s3().delete_object().bucket(bucket(stack)).key(&key).send().await.unwrap();
    }
    stack.create_secret(&format!("bulkhead/tenant/{id}/hook"), "s").await;
    stack.create_secret(&format!("bulkhead/model/tenants/{id}"), "k").await;
}

/// What a receipt has to count of [`furnish`]'s belongings.
fn furnished() -> BTreeMap<String, u64> {
    [
        ("collections", 1),
        ("passages", 3),
        ("conversations", 4),
        ("turns", 4),
        ("answers", 4),
        ("idempotency_records", 4),
        ("documents", 3),
        // Four versions and two delete markers.
        ("uploads", 6),
        ("secrets", 2),
        ("keys", 2),
        // An issuer, and the notes of two claims.
        ("issuers", 3),
        // How many keys, and how many issuers, were ever made.
        ("settings", 2),
        ("meters", 1),
    ]
    .map(|(store, count)| (store.to_owned(), count))
    .into()
}

#[tokio::test]
async fn a_tenant_is_deleted_with_all_that_it_had_and_nobody_else() {
    let stack = stack(0).await;
    let acme = tenant(&stack, "acme").await;
    let others = [tenant(&stack, "acme1").await, tenant(&stack, "acme-1").await];
    for tenant in [&acme, &others[0], &others[1]] {
        furnish(&stack, tenant).await;
    }
    let mut before = Vec::new();
    for other in &others {
        before.push(belongings(&stack, &other.id).await);
    }
    let conversation = acme.ask("How many days?").await["conversation_id"].clone();

    let id = delete(&stack, "acme").await;
    // From here on nothing is admitted, by whatever a gateway remembers.
    for path in ["/v1/chat", "/v1/search", "/v1/documents"] {
        let body = match path {
            "/v1/chat" => json!({"message": "x", "conversation_id": conversation}),
            "/v1/search" => json!({"query": "x"}),
            _ => json!({"id": "late", "title": "t", "content": "c"}),
        };
        let status = acme.post(path, &body).await.status;
        assert!(matches!(status.as_u16(), 401 | 403), "{path}: {status}");
    }
    assert_eq!(delete(&stack, "acme").await, id);
    let view = completed(&stack, &id).await;
    let mut expected = furnished();
    for store in ["conversations", "turns", "answers"] {
        *expected.get_mut(store).unwrap() += 1;
    }
    assert_eq!(deleted(&view), expected, "{view:#}");
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    assert_eq!(delete(&stack, "acme").await, id);
    for (other, before) in others.iter().zip(before) {
        assert_eq!(belongings(&stack, &other.id).await, before);
        other.ask("How many days?").await;
    }
    // Its key is nobody's, however it is remembered; its id is nobody's either.
    acme.chat(json!({"message": "x"})).await.expect_error(401, "invalid_key");
    stack.admin(Method::GET, "/admin/tenants/acme", None).await.expect_error(404, "not_found");
    let listed = stack.admin(Method::GET, "/admin/tenants", None).await.expect_status(StatusCode::OK).text;
    assert!(!listed.contains("\"acme\"") && listed.contains("\"acme-1\""), "{listed}");
    stack.admin(Method::GET, "/admin/usage", None).await.expect_status(StatusCode::OK);

    // The receipt is in the log, locked, and the verifier finds the log whole.
    let kept = view["receipt"]["kept"].as_array().unwrap();
    assert!(kept.iter().any(|k| k["what"] == "audit_records" && k["until"].is_string()), "{kept:?}");
    assert!(kept.iter().any(|k| k["what"] == "bill_lines" && k["count"].as_u64() > Some(0)), "{kept:?}");
    assert!(kept.iter().any(|k| k["what"] == "table_backups" && k["until"].is_string()), "{kept:?}");
    let record = exported(&stack, "acme").await;
    assert_eq!(record["receipt"], view["receipt"]);
    assert!(record["operator"].as_str().unwrap().starts_with("arn:"), "{record}");
    let verified = stack.bulkhead(&["audit", "verify", &format!("s3://{}", stack.audit_bucket())]).await;
    let said = String::from_utf8_lossy(&verified.stdout).into_owned();
    assert!(verified.status.success() && said.contains("acme: healthy"), "{said}");
    // The books' keeper and the ledger's exporter do without a meter and a record.
    let report = stack.invoke("reconciler", json!({"job": "verify"})).await;
    assert_eq!((&report["differences"], &report["unread"]), (&json!([]), &json!(0)), "{report}");
    stack.invoke("audit_export", json!({"job": "catch_up"})).await;
    let logs = stack.logs();
    let alert = logs.lines().find(|line| line.contains("\"alert\""));
    assert_eq!(alert, None);
    stack.stop().await;
}

/// The record of the deletion, as the audit log's objects have it: one.
async fn exported(stack: &Stack, id: &str) -> Value {
    let s3 = format!("s3://{}", stack.audit_bucket());
    let began = Instant::now();
    loop {
        let show = ["audit", "show", &s3, "--tenant", id, "--action", "TENANT_DELETED", "--format", "json"];
        let shown = stack.bulkhead(&show).await;
        let lines = String::from_utf8_lossy(&shown.stdout).into_owned();
        if !lines.trim().is_empty() {
            let records: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(records.len(), 1, "{lines}");
            return records[0].clone();
        }
        let error = String::from_utf8_lossy(&shown.stderr).into_owned();
        assert!(began.elapsed() < PATIENCE, "no receipt in the log: {error}");
        sleep(Duration::from_millis(200)).await;
    }
}

/// Sets an attribute of a deprovisioning, past the functions: as if time had passed.
async fn set(stack: &Stack, id: &str, attribute: &str, to: i64) {
    let (tenant, tail) = id.strip_prefix("dep_").unwrap().rsplit_once('_').unwrap();
    let key = json!({"tenant_id": {"S": tenant}, "sk": {"S": format!("DEPROVISIONING#{tail}")}});
    stack.edit("tenants", key, &[attribute], json!({"N": to.to_string()})).await;
}

#[tokio::test]
async fn an_id_is_given_again_only_on_purpose_and_when_nothing_is_kept_under_it() {
    let folder = tempfile::tempdir().unwrap();
    let start = async || {
        let parameters = vec![("AuthorizerCacheSeconds", "2".to_owned())];
        let data = Some(folder.path().to_owned());
        Stack::start_with(Options { parameters, no_seed: true, data, ..Options::default() }).await
    };
    let stack = start().await;
    let acme = tenant(&stack, "acme").await;
    furnish(&stack, &acme).await;
    let seq = async |stack: &Stack| {
        let seq = stack.meter_item("acme").await["seq"]["N"].as_str().unwrap().to_owned();
        seq.parse::<u64>().unwrap()
    };
    let last = seq(&stack).await;
    let id = delete(&stack, "acme").await;
    completed(&stack, &id).await;
    exported(&stack, "acme").await;
    let mut body = json!({"tenant_id": "acme", "tier": "free", "company_name": "New"});
    let make =
        async |stack: &Stack, body: &Value| stack.admin(Method::POST, "/admin/tenants", Some(body)).await;
    assert_eq!(make(&stack, &body).await.expect_error(409, "conflict")["param"], "tenant_id");
    body["reuse_deleted_id"] = true.into();
    let refused = make(&stack, &body).await.expect_error(409, "conflict");
    assert_eq!(refused["param"], "reuse_deleted_id", "{refused}");

    // Years later: the log and the bills are gone, one after the other, and whatever a gateway remembers.
    let bucket = stack.data().join("s3/buckets").join(stack.audit_bucket()).join("keys");
    assert!(stack.stop().await.success());
    std::fs::remove_dir_all(&bucket).unwrap();
    std::fs::create_dir(&bucket).unwrap();
    let stack = start().await;
    make(&stack, &body).await.expect_error(409, "conflict");
    for table in ["audit", "usage"] {
        for item in scan(&stack, table).await {
            let key = json!({"Key": {"tenant_id": {"S": item["tenant_id"]}, "sk": {"S": item["sk"]}}});
            stack.dynamodb("DeleteItem", table, key).await;
        }
    }
    make(&stack, &body).await.expect_error(409, "conflict");
    set(&stack, &id, "watched_until", 1).await;
    let report = stack.invoke("eraser", json!({"job": "deprovision"})).await;
    assert_eq!(report["closed"], 1, "{report}");
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    let made = make(&stack, &body).await.expect_status(StatusCode::CREATED).json();
    let new = stack.tenant_with_key("acme", made["api_key"].as_str().unwrap());
    let old = stack.tenant_with_key("acme", &acme.key);
    old.chat(json!({"message": "x"})).await.expect_error(401, "invalid_key");
    assert_eq!(new.get("/v1/documents").await.json()["documents"], json!([]));
    assert_eq!(new.search("days", 10).await, Vec::<Value>::new());
    // Tickets go on, so that none is given twice.
    assert_eq!(seq(&stack).await, last + 1);
    // The old deletion is still told of, and the new tenant can be deleted as well.
    assert_eq!(show(&stack, &id).await["status"], "completed");
    let again = delete(&stack, "acme").await;
    assert_ne!(again, id);
    completed(&stack, &again).await;
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    stack.stop().await;
}

#[tokio::test]
async fn what_is_no_tenant_or_deprovisioning_is_not_found_and_what_is_being_deleted_is_not_changed() {
    let stack = stack(0).await;
    tenant(&stack, "acme").await;
    for id in ["nobody", "ACME", "acme%20", "acme1", "ac--me", "%D0%B0cme", "DEPROVISIONING"] {
        let answer = stack.admin(Method::DELETE, &format!("/admin/tenants/{id}"), None).await;
        answer.expect_error(404, "not_found");
    }
    for id in ["nobody", "acme", "dep_acme_0000000000000000000000", "dep_acme_x", "dep__x"] {
        let answer = stack.admin(Method::GET, &format!("/admin/deprovisionings/{id}"), None).await;
        answer.expect_error(404, "not_found");
    }
    // None of it began anything.
    assert!(scan(&stack, "tenants").await.iter().all(|item| item["tenant_id"] == "acme"));
    let id = delete(&stack, "acme").await;
    for (method, path, body) in [
        (Method::PATCH, "/admin/tenants/acme", json!({"status": "active"})),
        (Method::PATCH, "/admin/tenants/acme", json!({"tier": "free"})),
        (Method::POST, "/admin/tenants/acme/keys", json!({})),
        (Method::POST, "/admin/tenants", json!({"tenant_id": "acme", "tier": "free", "company_name": "x"})),
    ] {
        let answer = stack.admin(method, path, Some(&body)).await;
        // It may be gone by then.
        assert!(matches!(answer.status.as_u16(), 404 | 409), "{path}: {}", answer.text);
    }
    completed(&stack, &id).await;
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    stack.stop().await;
}

// ---- what is under way

#[tokio::test]
async fn what_is_under_way_ends_is_charged_and_is_deleted() {
    let stack = stack(60).await;
    let acme = tenant(&stack, "acme").await;
    acme.store("handbook", "Handbook", "Every employee has 25 days of paid annual leave.").await;
    let mut stream = acme.open_stream(json!({"message": "How many days of leave?"})).await;
    let mut buffer = Vec::new();
    next_event(&mut stream, &mut buffer).await.unwrap();
    let id = delete(&stack, "acme").await;
    let mut last = String::new();
    while let Some(event) = next_event(&mut stream, &mut buffer).await {
        last = event.name;
    }
    assert_eq!(last, "done");
    let view = completed(&stack, &id).await;
    assert_eq!(deleted(&view)["turns"], 1);
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    charged_once(&stack, "acme").await;
    stack.stop().await;
}

/// The bill is what the ledger says, and the ledger has each ticket once.
async fn charged_once(stack: &Stack, id: &str) {
    let tickets = stack.items("audit", id, "TICKET#").await;
    let bill = stack.items("usage", id, "USAGE#").await;
    let sum = |items: &[Value]| items.iter().map(|i| i["cost_nano_usd"].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum(&bill), sum(&tickets), "{bill:?}");
    assert!(bill.iter().all(|line| line["expires_at_s"].is_i64()), "{bill:?}");
    let numbers: Vec<u64> = tickets.iter().map(|t| t["ticket"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_request_that_settles_too_late_leaves_no_turn_behind() {
    let stack = stack(0).await;
    let acme = tenant(&stack, "acme").await;
    // Its settling does not arrive for a while, as if its process stood still.
    let rule = json!({"mode": "hang", "operation": "TransactWriteItems", "table": "conversations",
        "contains": "\"acme\"", "times": 3});
    stack.dynamodb_faults(json!({"rules": [rule]})).await;
    let late = tokio::spawn({
        let acme = acme.clone();
        async move { acme.chat(json!({"message": "Hello?"})).await }
    });
    let began = Instant::now();
    let leases = loop {
        let item = stack.meter_item("acme").await;
        let leases = item["leases"]["M"].as_object().unwrap().clone();
        // It answers nothing before its caller has given up.
        if began.elapsed() > Duration::from_millis(1_000) && !leases.is_empty() {
            break leases;
        }
        assert!(began.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(leases.len(), 1);
    let id = delete(&stack, "acme").await;
    // Its lease is over although it is not: two clocks differ by more than they may.
    let expired: serde_json::Map<String, Value> = leases
        .iter()
        .map(|(lease, ticket)| {
            let lease = shared::meter::Lease { life_s: 0, ..lease.parse().unwrap() };
            (lease.to_string(), ticket.clone())
        })
        .collect();
    let update = json!({"Key": {"tenant_id": {"S": "acme"}}, "UpdateExpression": "SET leases = :new",
        "ExpressionAttributeValues": {":new": {"M": expired}}});
    stack.dynamodb("UpdateItem", "meters", update).await;
    let view = completed(&stack, &id).await;
    assert_eq!(deleted(&view).get("turns"), None);
    assert!(!late.is_finished(), "it was not late");
    let answer = late.await.unwrap();
    assert!(answer.status == StatusCode::OK || answer.status.is_server_error(), "{}", answer.text);
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    let tickets = stack.items("audit", "acme", "TICKET#").await;
    assert_eq!((tickets.len(), &tickets[0]["outcome"]), (1, &json!("aborted")), "{tickets:?}");
    stack.stop().await;
}

#[tokio::test]
async fn two_at_it_do_no_more_than_one() {
    let stack = Arc::new(stack(0).await);
    let acme = tenant(&stack, "acme").await;
    furnish(&stack, &acme).await;
    let id = delete(&stack, "acme").await;
    let mut runs = JoinSet::new();
    for _ in 0..4 {
        let stack = Arc::clone(&stack);
        runs.spawn(async move { stack.invoke("eraser", json!({"job": "deprovision"})).await });
    }
    runs.join_all().await;
    let view = completed(&stack, &id).await;
    assert_eq!(deleted(&view), furnished());
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    exported(&stack, "acme").await;
}

#[tokio::test]
async fn what_is_written_after_the_receipt_is_found_and_raises_the_alarm() {
    let stack = stack(0).await;
    tenant(&stack, "acme").await;
    let id = delete(&stack, "acme").await;
    completed(&stack, &id).await;
    // What a decision that a gateway remembers might let in, if its process died at the wrong moment.
    let item = json!({"tenant_id": {"S": "acme"}, "sk": {"S": "IDEM#late"}});
    stack.put_item("conversations", item).await;
    set(&stack, &id, "watched_until", 1).await;
    let report = stack.invoke("eraser", json!({"job": "deprovision"})).await;
    assert_eq!(report["closed"], 1, "{report}");
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    assert!(stack.logs().contains("written_late"));
    let rest = stack.invoke("eraser", json!({"job": "deprovision"})).await;
    assert_eq!(rest["open"], 0, "{rest}");
}

#[tokio::test]
async fn a_deletion_that_does_not_end_within_an_hour_is_an_alarm() {
    let stack = stack(0).await;
    let acme = tenant(&stack, "acme").await;
    acme.ask("Hello?").await;
    // Its meter cannot be read.
    let rule = json!({"mode": "error", "operation": "GetItem", "table": "meters", "contains": "\"acme\""});
    stack.dynamodb_faults(json!({"rules": [rule]})).await;
    let id = delete(&stack, "acme").await;
    sleep(Duration::from_secs(2)).await;
    stack.invoke("eraser", json!({"job": "deprovision"})).await;
    assert!(!stack.logs().contains("deprovisioning_late"));
    // Others go on meanwhile.
    let other = tenant(&stack, "other").await;
    other.ask("Hello?").await;
    completed(&stack, &delete(&stack, "other").await).await;
    set(&stack, &id, "started_at", 1).await;
    set(&stack, &id, "held_until_s", 0).await;
    stack.invoke("eraser", json!({"job": "deprovision"})).await;
    assert!(stack.logs().contains("deprovisioning_late"));
    stack.clear_dynamodb_faults().await;
    set(&stack, &id, "held_until_s", 0).await;
    stack.invoke("eraser", json!({"job": "deprovision"})).await;
    completed(&stack, &id).await;
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
}

// ---- crashes

/// Where the eraser is killed: operation, table, a part of the request, and how many such calls pass before.
type Point = (&'static str, &'static str, &'static str, u64);

const SAGA: &str = "DEPROVISIONING#";
/// Each step, by calls that it makes. A deprovisioning writes down how far it is when it is taken, once for
/// the first step, and twice for each that follows: when it begins and when it is done.
const POINTS: [(&str, &[Point]); 11] = [
    ("disable", &[("UpdateItem", "meters", "deprovisioning", 1), ("PutItem", "tenants", SAGA, 1)]),
    ("drain", &[("Query", "audit", "pending", 0), ("PutItem", "tenants", SAGA, 2)]),
    ("vectors", &[("PutItem", "tenants", SAGA, 4), ("PutItem", "tenants", SAGA, 5)]),
    ("conversations", &[("PutItem", "tenants", SAGA, 6), ("BatchWriteItem", "conversations", "", 0)]),
    ("documents", &[("PutItem", "tenants", SAGA, 8), ("BatchWriteItem", "documents", "", 0)]),
    ("uploads", &[("PutItem", "tenants", SAGA, 10), ("PutItem", "tenants", SAGA, 11)]),
    ("secrets", &[("PutItem", "tenants", SAGA, 12), ("PutItem", "tenants", SAGA, 13)]),
    ("keys", &[("DeleteItem", "tenants", "issuer#", 0), ("BatchWriteItem", "tenants", "", 0)]),
    ("meter", &[("DeleteItem", "meters", "", 0), ("PutItem", "tenants", SAGA, 17)]),
    ("verify", &[("PutItem", "tenants", SAGA, 18)]),
    (
        "receipt",
        &[("UpdateItem", "usage", "expires_at_s", 0), ("TransactWriteItems", "tenants", "TENANT_DELETED", 0)],
    ),
];

/// A client that goes on, whatever it is answered. Returns what it was given although it had sent it after
/// the tenant was disabled.
async fn at_work(client: usize, tenant: Tenant, gone: Arc<AtomicBool>, stop: Arc<AtomicBool>) -> Vec<String> {
    let (mut admitted, mut round) = (Vec::new(), 0);
    while !stop.load(Ordering::SeqCst) {
        round += 1;
        let was_gone = gone.load(Ordering::SeqCst);
        let (path, body) = match client {
            0 => ("/v1/chat", json!({"message": "How many days?"})),
            1 => ("/v1/chat", json!({"message": "How many days?", "stream": true})),
            _ => {
                let content = format!("Round {round} says 25 days.");
                ("/v1/documents", json!({"id": format!("d{round}"), "title": "t", "content": content}))
            }
        };
        let answer = tenant.post(path, &body).await;
        if was_gone {
            if answer.status.is_success() {
                admitted.push(answer.text);
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
    admitted
}

/// Deletes tenants of one stack that are at work, and kills the eraser once in each, at each step in turn.
async fn crashes(runs: Range<usize>) {
    let stack = Arc::new(stack(5).await);
    for n in runs {
        let (step, points) = POINTS[n % POINTS.len()];
        let turn = n / POINTS.len();
        let (operation, table, contains, skip) = points[turn % points.len()];
        let mode = if (turn / points.len() + n).is_multiple_of(2) { "kill_before" } else { "kill_after" };
        let what = format!("run {n}, {step}: {mode} {operation} of {table}, {contains:?}, after {skip}");
        let id = format!("t{n:04}");
        let acme = tenant(&stack, &id).await;
        furnish(&stack, &acme).await;
        let (stop, gone) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let mut clients = JoinSet::new();
        for client in 0..3 {
            clients.spawn(at_work(client, acme.clone(), Arc::clone(&gone), Arc::clone(&stop)));
        }
        sleep(Duration::from_millis(100)).await;
        let rule = json!({"mode": mode, "operation": operation, "table": table, "contains": contains,
            "function": "eraser", "skip": skip, "times": 1});
        stack.forget_dynamodb_calls().await;
        stack.dynamodb_faults(json!({"rules": [rule]})).await;
        let deprovisioning = delete(&stack, &id).await;
        gone.store(true, Ordering::SeqCst);
        let began = Instant::now();
        let mut killed = false;
        let view = loop {
            if !killed && stack.dynamodb_calls().await.iter().any(|call| !call["fault"].is_null()) {
                killed = true;
                // Whoever held it is dead; nobody takes it while it is believed to live.
                set(&stack, &deprovisioning, "held_until_s", 0).await;
            }
            let view = show(&stack, &deprovisioning).await;
            if view["status"] == "completed" {
                break view;
            }
            if killed {
                stack.invoke_for(None, "eraser", json!({"job": "deprovision"})).await;
            }
            assert!(began.elapsed() < PATIENCE, "{what}\n{view:#}");
            sleep(Duration::from_millis(50)).await;
        };
        assert!(stack.dynamodb_calls().await.iter().any(|call| !call["fault"].is_null()), "no death: {what}");
        stop.store(true, Ordering::SeqCst);
        for admitted in clients.join_all().await {
            assert_eq!(admitted, Vec::<String>::new(), "{what}");
        }
        stack.clear_dynamodb_faults().await;
        let counts = deleted(&view);
        for (store, least) in furnished() {
            assert!(counts.get(&store).is_some_and(|c| *c >= least), "{what}: {store} of {counts:?}");
        }
        for exact in ["collections", "uploads", "secrets", "keys", "issuers", "settings", "meters"] {
            assert_eq!(counts[exact], furnished()[exact], "{what}: {exact}");
        }
        assert_eq!(left(&stack, &id).await, Vec::<String>::new(), "{what}");
        assert_eq!(exported(&stack, &id).await["receipt"], view["receipt"], "{what}");
        charged_once(&stack, &id).await;
        if (n + 1) % POINTS.len() == 0 {
            eprintln!("deletion {} is over, the eraser killed once in each", n + 1);
        }
    }
    assert!(!stack.logs().contains("written_late"));
}

#[tokio::test]
async fn a_crash_at_any_step_ends_with_the_receipt_all_the_same() {
    crashes(0..POINTS.len()).await;
}

#[tokio::test]
#[ignore = "takes a quarter of an hour: `cargo test --test deprovisioning fifty -- --ignored --nocapture`"]
async fn fifty_crashes_at_each_step_leave_nothing() {
    // A deletion mostly waits, so several stacks are at it at once.
    let each = 10 * POINTS.len();
    join_all((0..5).map(|stack| crashes(stack * each..(stack + 1) * each))).await;
}

/// What a store refuses for a while, in the place of the call that is meant: mode, call, and how often.
const REFUSED: [(&str, Point, u64); 11] = [
    ("cancel_conflict", ("TransactWriteItems", "tenants", "TENANT_DELETED", 0), 20),
    ("error", ("TransactWriteItems", "tenants", "TENANT_DELETED", 0), 20),
    ("throttle", ("TransactWriteItems", "tenants", "TENANT_DELETED", 0), 20),
    ("error", ("PutItem", "tenants", SAGA, 9), 9),
    // Of these one is the last ticket's, when the meter is about to go.
    ("error", ("GetItem", "meters", "", 5), 9),
    ("error", ("GetItem", "meters", "", 6), 9),
    ("error", ("GetItem", "meters", "", 7), 9),
    ("error", ("Query", "audit", "pending", 2), 9),
    ("error", ("BatchWriteItem", "conversations", "", 0), 9),
    ("error", ("DeleteItem", "meters", "", 0), 9),
    ("error", ("UpdateItem", "usage", "expires_at_s", 0), 9),
];

#[tokio::test]
async fn whatever_a_store_refuses_for_a_while_the_end_is_the_same() {
    let stack = stack(5).await;
    for (n, (mode, (operation, table, contains, skip), times)) in REFUSED.into_iter().enumerate() {
        let what = format!("{mode} {operation} of {table}, {contains:?}, after {skip}");
        let id = format!("r{n:04}");
        let acme = tenant(&stack, &id).await;
        furnish(&stack, &acme).await;
        let rule = json!({"mode": mode, "operation": operation, "table": table, "contains": contains,
            "skip": skip, "times": times});
        stack.forget_dynamodb_calls().await;
        stack.dynamodb_faults(json!({"rules": [rule]})).await;
        let deprovisioning = delete(&stack, &id).await;
        let began = Instant::now();
        let view = loop {
            let view = show(&stack, &deprovisioning).await;
            if view["status"] == "completed" {
                break view;
            }
            stack.invoke_for(None, "eraser", json!({"job": "deprovision"})).await;
            assert!(began.elapsed() < PATIENCE, "{what}\n{view:#}");
            sleep(Duration::from_millis(50)).await;
        };
        assert!(stack.dynamodb_calls().await.iter().any(|call| !call["fault"].is_null()), "no fault: {what}");
        stack.clear_dynamodb_faults().await;
        assert_eq!(deleted(&view), furnished(), "{what}");
        assert_eq!(left(&stack, &id).await, Vec::<String>::new(), "{what}");
        assert_eq!(exported(&stack, &id).await["receipt"], view["receipt"], "{what}");
        let tickets = stack.items("audit", &id, "TICKET#").await.len();
        let tombstone = &stack.items("tenants", &id, "CONFIG").await[0];
        assert_eq!(tombstone["last_ticket"], tickets, "{what}: {tombstone}");
        assert!(tombstone.get("company_name").is_none(), "{what}: {tombstone}");
    }
}

// ---- size

#[tokio::test]
#[ignore = "a measurement: `cargo test --test deprovisioning thousand -- --ignored --nocapture`"]
async fn ten_thousand_documents_and_five_thousand_conversations_go_in_bounded_memory() {
    use qdrant_client::qdrant::{NamedVectors, PointStruct, UpsertPointsBuilder};

    let stack = stack(0).await;
    tenant(&stack, "acme").await;
    let filler = "x".repeat(600);
    let write = async |table: &str, sorts: Vec<String>| {
        for batch in sorts.chunks(25) {
            let puts: Vec<Value> = batch
                .iter()
                .map(|sort| {
                    let item = json!({"tenant_id": {"S": "acme"}, "sk": {"S": sort}, "text": {"S": filler}});
                    json!({"PutRequest": {"Item": item}})
                })
                .collect();
            let call = json!({"RequestItems": {Stack::table(table): puts}});
            let target = "DynamoDB_20120810.BatchWriteItem";
            let answer = stack.signed_by(&stack.operator(), "dynamodb", target, &call).await;
            assert!(answer.status.is_success(), "{}", answer.text);
        }
    };
    write("documents", (0..10_000).map(|n| format!("DOC#d{n:05}")).collect()).await;
    let turns = (0..5_000).flat_map(|n| (0..2).map(move |turn| format!("CONV#c{n:05}#{turn}#m")));
    write("conversations", turns.collect()).await;
    let store = stack.qdrant();
    for batch in 0..20_u64 {
        let points: Vec<PointStruct> = (0..500)
            .map(|n| {
                let vector = NamedVectors::default().add_vector("dense", vec![0.1_f32; 512]);
                let payload: qdrant_client::Payload = json!({"tenant_id": "acme"}).try_into().unwrap();
                PointStruct::new(batch * 500 + n, vector, payload)
            })
            .collect();
        store.upsert_points(UpsertPointsBuilder::new("tenant_acme", points).wait(true)).await.unwrap();
    }
    let began = Instant::now();
    let id = delete(&stack, "acme").await;
    let view = completed(&stack, &id).await;
    let memory = stack.most_memory("eraser");
    eprintln!("{:.1} s, {memory:?} kB: {:?}", began.elapsed().as_secs_f64(), deleted(&view));
    assert_eq!((deleted(&view)["documents"], deleted(&view)["turns"]), (10_000, 10_000));
    assert_eq!(left(&stack, "acme").await, Vec::<String>::new());
    // Far below the 256 MB that it has.
    assert!(memory.iter().all(|kilobytes| *kilobytes < 128 << 10), "{memory:?}");
}

// ---- retention

async fn retention_days(stack: &Stack, id: &str, days: u32) {
    stack.change_tenant(id, json!({"limits": {"data_retention_days": days}})).await;
}

/// The documents that a search finds.
async fn found(tenant: &Tenant, query: &str) -> Vec<String> {
    let hits = tenant.search(query, 10).await;
    let mut found: Vec<String> =
        hits.iter().map(|hit| hit["document_id"].as_str().unwrap().to_owned()).collect();
    found.sort();
    found
}

#[tokio::test]
async fn what_is_past_its_retention_is_gone_at_once_and_deleted_by_the_daily_job() {
    let stack = stack(0).await;
    let (acme, other) = (tenant(&stack, "acme").await, tenant(&stack, "acme-1").await);
    for tenant in [&acme, &other] {
        tenant.store("heron", "Heron", "The heron nests in the reeds.").await;
    }
    let asked = acme.ask("Where does the heron nest?").await;
    let old = json!({"message": "And the stork?", "conversation_id": asked["conversation_id"]});
    acme.chat(old.clone()).await.expect_status(StatusCode::OK);
    let young = acme.ask("Where does the heron nest?").await;
    let young = json!({"message": "And?", "conversation_id": young["conversation_id"]});
    // The one was two days ago, the other just now.
    let of_old = json!({"id": asked["id"], "rating": "up"});
    let (now, day) = (Clock::system().now().as_millis(), 86_400_000);
    age_conversation(&stack, "acme", old["conversation_id"].as_str().unwrap(), now - 2 * day).await;
    age_document(&stack, "acme", "heron", now - 2 * day).await;
    acme.store("stork", "Stork", "The stork nests on the roof, the heron said.").await;
    assert_eq!(found(&acme, "heron stork nests").await, ["heron", "stork"]);
    acme.get("/v1/documents/heron").await.expect_status(StatusCode::OK);

    // A lower limit holds for what was there before, at once, and for readers of every kind.
    retention_days(&stack, "acme", 1).await;
    acme.chat(old.clone()).await.expect_error(404, "not_found");
    acme.chat(young.clone()).await.expect_status(StatusCode::OK);
    let path = |asked: &Value| format!("/v1/conversations/{}", asked["conversation_id"].as_str().unwrap());
    acme.get(&path(&old)).await.expect_error(404, "not_found");
    acme.delete(&path(&old)).await.expect_error(404, "not_found");
    acme.post("/v1/feedback", &of_old).await.expect_error(404, "not_found");
    acme.get(&path(&young)).await.expect_status(StatusCode::OK);
    let listed = acme.get("/v1/conversations").await.json();
    let ids: Vec<&Value> = listed["conversations"].as_array().unwrap().iter().map(|c| &c["id"]).collect();
    assert_eq!(ids, [&young["conversation_id"]]);
    assert_eq!(found(&acme, "heron stork nests").await, ["stork"]);
    acme.get("/v1/documents/heron").await.expect_error(404, "not_found");
    acme.delete("/v1/documents/heron").await.expect_error(404, "not_found");
    let listed = acme.get("/v1/documents").await.json();
    assert_eq!(listed["documents"].as_array().unwrap().len(), 1, "{listed}");
    let answer = acme.ask("Where does the heron nest?").await.to_string();
    assert!(!answer.contains("reeds"), "{answer}");
    assert_eq!(found(&other, "heron nests").await, ["heron"]);

    let report = stack.invoke("eraser", json!({"job": "retain"})).await;
    let counted = (&report["documents"], &report["turns"], &report["left"]);
    assert_eq!(counted, (&json!(1), &json!(2), &json!(0)), "{report}");
    assert_eq!(stack.items("documents", "acme", "DOC#").await.len(), 1);
    let is_old = |turn: &Value| turn["asked_at"].as_i64().unwrap() < now - day;
    let turns = stack.items("conversations", "acme", "CONV#").await;
    assert!(!turns.is_empty() && !turns.iter().any(is_old));
    let answers = stack.items("conversations", "acme", "ANSWER#").await;
    assert!(answers.len() == turns.len() && !answers.iter().any(is_old), "{answers:?}");
    assert_eq!(stack.items("conversations", "acme", "LIST#").await.len(), 2);
    let passages = stack.qdrant().collection_info("tenant_acme").await.unwrap().result.unwrap().points_count;
    assert_eq!(passages, Some(1));
    let events = stack.items("audit", "acme", "EVENT#").await;
    let expired: Vec<_> = events.iter().filter(|e| e["action"] == "document_expired").collect();
    assert_eq!((expired.len(), &expired[0]["documents"]), (1, &json!(["heron"])));
    assert_eq!(stack.items("documents", "acme-1", "DOC#").await.len(), 1);
    // Sent again, it is there again.
    acme.store("heron", "Heron", "The heron nests in the reeds.").await;
    assert_eq!(found(&acme, "heron stork nests").await, ["heron", "stork"]);

    // Nothing is kept where nothing is to be: at once, and then for good.
    retention_days(&stack, "acme", 0).await;
    assert_eq!(found(&acme, "heron stork nests").await, Vec::<String>::new());
    acme.chat(young).await.expect_error(404, "not_found");
    let report = stack.invoke("eraser", json!({"job": "retain"})).await;
    assert_eq!(report["documents"], 2, "{report}");
    assert_eq!(found(&other, "heron nests").await, ["heron"]);
    stack.stop().await;
}

#[tokio::test]
async fn a_document_past_its_retention_is_stored_anew_even_if_nothing_of_it_changed() {
    let stack = stack(0).await;
    let acme = tenant(&stack, "acme").await;
    let first = acme.store("heron", "Heron", "The heron nests in the reeds.").await;
    age_document(&stack, "acme", "heron", Clock::system().now().as_millis() - 400 * 86_400_000).await;
    acme.get("/v1/documents/heron").await.expect_error(404, "not_found");
    let again = acme.store("heron", "Heron", "The heron nests in the reeds.").await;
    assert_eq!(first["sha256"], again["sha256"]);
    acme.get("/v1/documents/heron").await.expect_status(StatusCode::OK);
    assert_eq!(found(&acme, "heron").await, ["heron"]);
    stack.stop().await;
}

/// Makes all turns of a conversation as old as that, past the functions.
async fn age_conversation(stack: &Stack, id: &str, conversation: &str, asked_at: i64) {
    let query = json!({"KeyConditionExpression": "tenant_id = :t AND begins_with(sk, :p)",
        "ExpressionAttributeValues": {":t": {"S": id}, ":p": {"S": format!("CONV#{conversation}#")}}});
    let turns = stack.dynamodb("Query", "conversations", query).await["Items"].clone();
    for (n, mut turn) in turns.as_array().unwrap().iter().cloned().enumerate() {
        let (sort, asked_at) = (turn["sk"]["S"].as_str().unwrap().to_owned(), asked_at + n as i64);
        let message = sort.rsplit('#').next().unwrap();
        turn["sk"] = json!({"S": format!("CONV#{conversation}#{asked_at:015}#{message}")});
        turn["asked_at"] = json!({"N": asked_at.to_string()});
        let key = json!({"Key": {"tenant_id": {"S": id}, "sk": {"S": sort}}});
        stack.dynamodb("DeleteItem", "conversations", key).await;
        stack.put_item("conversations", turn).await;
        let set = |sort: String, attribute: &str| {
            json!({"Key": {"tenant_id": {"S": id}, "sk": {"S": sort}},
                "UpdateExpression": "SET #a = :at", "ExpressionAttributeNames": {"#a": attribute},
                "ExpressionAttributeValues": {":at": {"N": asked_at.to_string()}}})
        };
        let answer = set(format!("ANSWER#{message}"), "asked_at");
        stack.dynamodb("UpdateItem", "conversations", answer).await;
        for listed in stack.items("conversations", id, "LIST#").await {
            if listed["id"] == conversation {
                let listed = set(listed["sk"].as_str().unwrap().to_owned(), "updated_at");
                stack.dynamodb("UpdateItem", "conversations", listed).await;
            }
        }
    }
}

/// Makes a document and its passages as old as that, past the functions.
async fn age_document(stack: &Stack, id: &str, document: &str, at: i64) {
    use qdrant_client::qdrant::{
        Condition, Document, Filter, NamedVectors, PointStruct, ScrollPointsBuilder, UpsertPointsBuilder,
        Vector,
    };

    let update = json!({
        "Key": {"tenant_id": {"S": id}, "sk": {"S": format!("DOC#{document}")}},
        "UpdateExpression": "SET updated_at = :at",
        "ExpressionAttributeValues": {":at": {"N": at.to_string()}},
    });
    stack.dynamodb("UpdateItem", "documents", update).await;
    let (store, collection) = (stack.qdrant(), format!("tenant_{id}"));
    let of = Filter::must([Condition::matches("document_id", document.to_owned())]);
    let scroll = ScrollPointsBuilder::new(&collection).filter(of).limit(100).with_payload(true);
    let points = store.scroll(scroll).await.unwrap().result.into_iter().map(|mut point| {
        let text = point.payload["text"].as_str().unwrap().clone();
        let words = Document { text, model: "qdrant/bm25".into(), ..Default::default() };
        let vectors = NamedVectors::default()
            .add_vector("dense", vec![0.1_f32; 512])
            .add_vector("sparse", Vector::from(words));
        point.payload.insert("stored_at_ms".to_owned(), at.into());
        PointStruct::new(point.id.unwrap(), vectors, point.payload)
    });
    let points: Vec<PointStruct> = points.collect();
    assert!(!points.is_empty());
    store.upsert_points(UpsertPointsBuilder::new(&collection, points).wait(true)).await.unwrap();
}
