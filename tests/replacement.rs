//! Documents that are replaced and deleted while they are searched: every search sees exactly one version, whole,
//! whatever happens at the same time and whatever crashes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use qdrant_client::qdrant::{Condition, CountPointsBuilder, Filter};
use rand::RngExt;
use reqwest::StatusCode;
use serde_json::{Value, json};
use shared::random::entropy;
use tests::{Answer, Stack, Tenant, put_file, until};
use tokio::task::JoinSet;

/// The passages of each version, one of which changes with none of the others.
const PASSAGES: usize = 6;

async fn provision(stack: &Stack) -> Tenant {
    let limits = json!({"requests_per_minute": 20_000, "max_concurrent": 200, "tokens_per_day": 1_000_000_000_u64,
        "monthly_token_budget": 1_000_000_000_u64, "max_documents": 1_000});
    stack
        .provision(
            json!({"tenant_id": "busy", "tier": "enterprise", "company_name": "Busy", "limits": limits}),
        )
        .await
}

/// A document of sections, each of which says its version, but for one that never changes.
fn handbook(version: u64) -> String {
    let mut text = String::new();
    for section in 0..PASSAGES {
        let says = if section == 0 { "always".to_owned() } else { format!("version{version}") };
        let filler =
            "The harbour office keeps its rules for berths, cranes and pilots in this handbook. ".repeat(16);
        text.push_str(&format!(
            "# Rules of section {section}\n\nThese harbour rules are {says}. {filler}\n\n"
        ));
    }
    text
}

async fn put(tenant: &Tenant, title: &str, content: &str) -> Answer {
    let document =
        json!({"id": "rules", "title": title, "content": content, "content_type": "text/markdown"});
    tenant.post("/v1/documents", &document).await
}

/// The versions that the passages of `hits` say, and how many there are.
fn versions(hits: &[Value]) -> (BTreeSet<u64>, usize) {
    let words = |hit: &Value| {
        let text = hit["text"].as_str().unwrap().to_owned();
        let word = text
            .split_whitespace()
            .find_map(|word| word.strip_prefix("version")?.strip_suffix('.')?.parse().ok());
        word.unwrap_or(u64::MAX)
    };
    let hits: Vec<u64> = hits.iter().filter(|hit| hit["document_id"] == "rules").map(words).collect();
    (hits.iter().copied().filter(|version| *version < u64::MAX).collect(), hits.len())
}

/// The points that the vector store holds of the document.
async fn points(stack: &Stack) -> u64 {
    let filter = Filter::must([Condition::matches("document_id", "rules".to_owned())]);
    let count = CountPointsBuilder::new("tenant_busy").filter(filter).exact(true);
    stack.qdrant().count(count).await.unwrap().result.unwrap().count
}

/// Clients that search until they are told to stop, and hold what each search sees to what was true meanwhile.
struct Searchers {
    stop: Arc<AtomicBool>,
    /// The version that was last answered for, and the last that was sent.
    answered: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
    tasks: JoinSet<u64>,
}

impl Searchers {
    fn start(tenant: &Tenant, count: usize, version: u64) -> Self {
        let (answered, sent) = (Arc::new(AtomicU64::new(version)), Arc::new(AtomicU64::new(version)));
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for n in 0..count {
            let (tenant, stop) = (tenant.clone(), Arc::clone(&stop));
            let (answered, sent) = (Arc::clone(&answered), Arc::clone(&sent));
            tasks.spawn(async move {
                let mut searches = 0;
                while !stop.load(Ordering::SeqCst) {
                    let least = answered.load(Ordering::SeqCst);
                    // By words that all versions have, and by words of one alone.
                    let query = match n % 2 {
                        0 => "harbour rules of the sections".to_owned(),
                        _ => format!("harbour rules version{least}"),
                    };
                    let hits = tenant.search(&query, 50).await;
                    let most = sent.load(Ordering::SeqCst);
                    let (seen, passages) = versions(&hits);
                    assert_eq!(seen.len(), 1, "a search sees versions {seen:?} between {least} and {most}");
                    assert!(seen.iter().all(|v| (least..=most).contains(v)), "{seen:?}: {least} to {most}");
                    assert_eq!(passages, PASSAGES, "of version {seen:?}");
                    searches += 1;
                }
                searches
            });
        }
        Self { stop, answered, sent, tasks }
    }

    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.tasks.join_all().await.into_iter().sum()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_search_sees_one_version_while_a_document_is_replaced_a_hundred_times() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    put(&busy, "Rules", &handbook(0)).await.expect_status(StatusCode::CREATED);
    let searchers = Searchers::start(&busy, 20, 0);
    for version in 1..=100 {
        searchers.sent.store(version, Ordering::SeqCst);
        let stored = put(&busy, "Rules", &handbook(version)).await.expect_status(StatusCode::CREATED).json();
        assert_eq!(stored["documents"][0]["version"], version + 1, "{stored}");
        searchers.answered.store(version, Ordering::SeqCst);
    }
    let searches = searchers.stop().await;
    println!("{searches} searches while a document was replaced 100 times, each of one version");
    assert!(searches > 200);
    assert_eq!(points(&stack).await, PASSAGES as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_crashes_every_search_sees_one_version_and_the_next_attempt_mends_it() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    put(&busy, "Rules", &handbook(0)).await.expect_status(StatusCode::CREATED);
    let (mut known, mut crashes) = (0, 0);
    for version in 1..=25 {
        let attempt = {
            let busy = busy.clone();
            tokio::spawn(async move { put(&busy, "Rules", &handbook(version)).await.status })
        };
        tokio::time::sleep(Duration::from_millis(entropy().random_range(1..60))).await;
        stack.kill("ingestion").await;
        crashes += u32::from(attempt.await.unwrap() != StatusCode::CREATED);
        let mut last = None;
        for query in
            ["harbour rules of the sections", &format!("version{version}"), &format!("version{known}")]
        {
            let (seen, passages) = versions(&busy.search(query, 50).await);
            assert_eq!((seen.len(), passages), (1, PASSAGES), "{seen:?} after {known} and {version}");
            assert!(seen.is_subset(&[known, version].into()), "{seen:?} after {known} and {version}");
            assert!(
                last.as_ref().is_none_or(|last| *last == seen),
                "one search sees {last:?}, the next {seen:?}"
            );
            last = Some(seen);
        }
        // Now and then somebody tries again.
        if version % 3 == 0 {
            let stored =
                put(&busy, "Rules", &handbook(version)).await.expect_status(StatusCode::CREATED).json();
            assert_eq!(stored["documents"][0]["status"], "ready");
            assert_eq!(points(&stack).await, PASSAGES as u64);
        }
        let (seen, _) = versions(&busy.search("harbour rules", 50).await);
        known = seen.into_iter().next().unwrap();
    }
    println!("{crashes} of 25 replacements crashed");
    assert!(crashes > 0);
    busy.delete("/v1/documents/rules").await.expect_status(StatusCode::NO_CONTENT);
    assert_eq!(points(&stack).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_stores_and_deletes_at_once_leaves_what_the_last_one_was_told() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    for round in 0..6u64 {
        let mut writers = JoinSet::new();
        for n in 0..10u64 {
            let busy = busy.clone();
            writers.spawn(async move {
                if n % 5 == 4 {
                    busy.delete("/v1/documents/rules").await.status
                } else {
                    put(&busy, "Rules", &handbook(round * 100 + n)).await.status
                }
            });
        }
        for status in writers.join_all().await {
            let expected =
                [StatusCode::CREATED, StatusCode::CONFLICT, StatusCode::NO_CONTENT, StatusCode::NOT_FOUND];
            assert!(expected.contains(&status), "{status}");
        }
        // What is found is what the record says: one version, whole, or nothing.
        let (seen, passages) = versions(&busy.search("harbour rules", 50).await);
        let record = busy.get("/v1/documents/rules").await;
        let status =
            if record.status == StatusCode::OK { record.json()["status"].clone() } else { Value::Null };
        match status.as_str() {
            None => assert_eq!((seen.len(), passages), (0, 0), "{seen:?}"),
            Some("ready") => assert_eq!((seen.len(), passages), (1, PASSAGES), "{seen:?}"),
            Some(_) => {
                assert!((seen.len(), passages) == (1, PASSAGES) || passages == 0, "{seen:?}, {passages}")
            }
        }
        put(&busy, "Rules", &handbook(1_000 + round)).await.expect_status(StatusCode::CREATED);
        assert_eq!(versions(&busy.search("harbour rules", 50).await), ([1_000 + round].into(), PASSAGES));
        assert_eq!(points(&stack).await, PASSAGES as u64);
    }
    busy.delete("/v1/documents/rules").await.expect_status(StatusCode::NO_CONTENT);
    assert_eq!(versions(&busy.search("harbour rules", 50).await), (BTreeSet::new(), 0));
    assert_eq!(points(&stack).await, 0);
}

#[tokio::test]
async fn only_what_changed_is_embedded_again() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    let tokens = async || {
        let records = stack.items("audit", "busy", "TICKET#").await;
        records.iter().filter_map(|record| record["embedding_tokens"].as_u64()).sum::<u64>()
    };
    put(&busy, "Rules", &handbook(1)).await.expect_status(StatusCode::CREATED);
    let all = tokens().await;
    assert!(all > 500, "{all}");
    // The same again is nothing.
    put(&busy, "Rules", &handbook(1)).await.expect_status(StatusCode::CREATED);
    assert_eq!(tokens().await, all);
    // One section, which is about a sixth.
    let one = handbook(1).replacen("version1", "version2", 1);
    put(&busy, "Rules", &one).await.expect_status(StatusCode::CREATED);
    let more = tokens().await - all;
    assert!(more > 0 && more * 4 < all, "{more} of {all}");
    // What is not searched by is not embedded.
    let noted = json!({"id": "rules", "title": "Rules", "content": one, "content_type": "text/markdown", "metadata": {"a": 1}});
    let stored = busy.post("/v1/documents", &noted).await.expect_status(StatusCode::CREATED).json();
    assert_eq!(stored["documents"][0]["version"], 3);
    assert_eq!(tokens().await, all + more);
    // The title is searched by, with each passage.
    put(&busy, "Harbour rules", &one).await.expect_status(StatusCode::CREATED);
    assert!(tokens().await - all - more >= all);
    assert_eq!(versions(&busy.search("harbour rules", 50).await).1, PASSAGES);
}

/// Delays writes of the document's record.
fn delayed(contains: &str, skip: u32, delay_ms: u32) -> Value {
    json!({"mode": "delay", "operation": "PutItem", "table": "documents", "contains": contains, "skip": skip,
        "times": 1, "delay_ms": delay_ms})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_comes_late_puts_nothing_back() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    // The second is about to write what it knows of the first, which has ended meanwhile.
    stack.dynamodb_faults(json!({"rules": [delayed("First", 1, 1_500), delayed("Second", 0, 4_000)]})).await;
    let writer = |title: &'static str, version, after| {
        let busy = busy.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(after)).await;
            put(&busy, title, &handbook(version)).await.status
        })
    };
    let (first, second) = (writer("First", 1, 0), writer("Second", 2, 600));
    assert_eq!(first.await.unwrap(), StatusCode::CREATED);
    let searchers = Searchers::start(&busy, 2, 1);
    assert_eq!(second.await.unwrap(), StatusCode::CONFLICT);
    assert!(searchers.stop().await > 0);
    stack.clear_dynamodb_faults().await;
    assert_eq!(busy.get("/v1/documents/rules").await.json()["status"], "ready");
    assert_eq!(points(&stack).await, PASSAGES as u64);

    // A write that was done and not answered is done.
    stack
        .dynamodb_faults(json!({"rules": [{"mode": "lost_answer", "operation": "PutItem", "table": "documents", "times": 2}]}))
        .await;
    put(&busy, "Third", &handbook(3)).await.expect_status(StatusCode::CREATED);
    assert_eq!(versions(&busy.search("harbour rules", 50).await), ([3].into(), PASSAGES));

    // One that is never answered may be done too: what it made current is there.
    let unanswered = json!({"mode": "lost_answer", "operation": "PutItem", "table": "documents",
        "contains": "\"current\"", "skip": 1, "times": 20});
    stack.dynamodb_faults(json!({"rules": [unanswered]})).await;
    put(&busy, "Fourth", &handbook(4)).await.expect_error(503, "unavailable");
    stack.clear_dynamodb_faults().await;
    assert_eq!(versions(&busy.search("harbour rules", 50).await), ([4].into(), PASSAGES));
    put(&busy, "Fourth", &handbook(4)).await.expect_status(StatusCode::CREATED);
    assert_eq!(versions(&busy.search("harbour rules", 50).await), ([4].into(), PASSAGES));
    assert_eq!(points(&stack).await, PASSAGES as u64);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_uploads_the_later_one_wins_and_what_is_sent_since_ends_both() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    put(&busy, "Rules", &handbook(0)).await.expect_status(StatusCode::CREATED);
    let upload = |content: &str| json!({"id": "rules", "title": "Rules", "content_type": "text/markdown", "size_bytes": content.len()});
    // The first one's reader is about to take the document up when the second begins.
    let (one, two) = (handbook(1), handbook(2));
    stack.dynamodb_faults(json!({"rules": [delayed(r#""taken":{"BOOL":true}"#, 0, 3_000)]})).await;
    let first = busy.begin_upload(&upload(&one)).await;
    assert_eq!(put_file(&first, one).await.0, StatusCode::OK);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let second = busy.begin_upload(&upload(&two)).await;
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    stack.clear_dynamodb_faults().await;
    assert_eq!(put_file(&second, two).await.0, StatusCode::OK);
    until("the second upload's end", async || {
        let (seen, passages) = versions(&busy.search("harbour rules", 50).await);
        assert_eq!((seen.len(), passages), (1, PASSAGES), "{seen:?}");
        seen.contains(&2).then_some(())
    })
    .await;

    // What is sent for readers of one group is not everybody's again by a file that was announced before.
    let three = handbook(3);
    let third = busy.begin_upload(&upload(&three)).await;
    let mut narrow =
        json!({"id": "rules", "title": "Rules", "content": handbook(2), "content_type": "text/markdown"});
    narrow["groups"] = json!(["pilots"]);
    busy.post("/v1/documents", &narrow).await.expect_status(StatusCode::CREATED);
    assert_eq!(put_file(&third, three).await.0, StatusCode::PRECONDITION_FAILED);
    let pilots = busy.in_groups("pilots");
    assert_eq!(versions(&pilots.search("harbour rules", 50).await), ([2].into(), PASSAGES));
    assert_eq!(versions(&busy.in_groups("").search("harbour rules", 50).await), (BTreeSet::new(), 0));
    assert_eq!(pilots.get("/v1/documents/rules").await.json()["status"], "ready");
    stack.stop().await;
}

#[tokio::test]
async fn a_document_whose_storing_was_cut_off_says_so_and_keeps_no_file_out() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    let rule = json!({"mode": "kill_after", "operation": "PutItem", "table": "documents", "function": "ingestion", "times": 1});
    put(&busy, "Rules", &handbook(0)).await.expect_status(StatusCode::CREATED);
    stack.dynamodb_faults(json!({"rules": [rule]})).await;
    assert_ne!(put(&busy, "Rules", &handbook(1)).await.status, StatusCode::CREATED);
    stack.clear_dynamodb_faults().await;
    let document = async || busy.get("/v1/documents/rules").await.expect_status(StatusCode::OK).json();
    assert_eq!(document().await["status"], "processing");
    let upload = json!({"id": "rules", "title": "Rules", "content_type": "text/markdown", "size_bytes": 9});
    busy.post("/v1/uploads", &upload).await.expect_error(409, "conflict");
    // The time is over in which whoever was at it could be.
    let key = json!({"tenant_id": {"S": "busy"}, "sk": {"S": "DOC#rules"}});
    stack.edit("documents", key, &["at_work_until"], json!({"N": "1"})).await;
    let failed = document().await;
    assert_eq!(failed["status"], "failed");
    assert!(failed["reason"].as_str().unwrap().contains("send it again"), "{failed}");
    assert_eq!(versions(&busy.search("harbour rules", 50).await), ([0].into(), PASSAGES));
    busy.begin_upload(&upload).await;
    assert_eq!(document().await["status"], "pending");
    put(&busy, "Rules", &handbook(2)).await.expect_status(StatusCode::CREATED);
    assert_eq!(document().await["status"], "ready");
    assert_eq!(points(&stack).await, PASSAGES as u64);
    stack.stop().await;
}

#[tokio::test]
async fn what_does_not_fit_into_the_budget_is_refused_before_any_of_it_is_paid_for() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    stack.change_tenant("busy", json!({"limits": {"tokens_per_day": 3_000}})).await;
    let large: String = (0..20).map(handbook).collect();
    assert!(large.len() > 60_000);
    put(&busy, "Rules", &large).await.expect_error(429, "token_budget_exceeded");
    let used = busy.get("/v1/usage").await.expect_status(StatusCode::OK).json();
    assert_eq!(used["embedding_tokens"].as_u64().unwrap_or(0), 0, "{used}");
    assert_eq!(points(&stack).await, 0);
    // What does fit is stored.
    put(&busy, "Rules", "# Rules\n\nThese harbour rules are version1.")
        .await
        .expect_status(StatusCode::CREATED);
    stack.stop().await;
}

#[tokio::test]
async fn what_an_attempt_at_a_file_has_paid_for_is_not_paid_for_by_the_next() {
    let stack = Stack::start().await;
    let busy = provision(&stack).await;
    let content = handbook(1);
    let upload = json!({"id": "rules", "title": "Rules", "content_type": "text/markdown", "size_bytes": content.len()});
    // It dies where it makes the new edition the current one: all of it is embedded then.
    let rule = json!({"mode": "kill_before", "operation": "PutItem", "table": "documents",
        "function": "upload_ingestion", "contains": "\"current\"", "times": 1});
    stack.dynamodb_faults(json!({"rules": [rule]})).await;
    let begun = busy.begin_upload(&upload).await;
    assert_eq!(put_file(&begun, content).await.0, StatusCode::OK);
    until("the reader's death", async || {
        (points(&stack).await == PASSAGES as u64 && stack.processes("upload-ingestion").is_empty())
            .then_some(())
    })
    .await;
    stack.clear_dynamodb_faults().await;
    for upload in stack.items("documents", "busy", "UPLOAD#").await {
        let key = json!({"tenant_id": {"S": "busy"}, "sk": {"S": upload["sk"]}});
        stack.edit("documents", key, &["claimed_until"], json!({"N": "1"})).await;
    }
    stack.unhide_messages("uploads").await;
    assert_eq!(busy.read_upload("rules").await["status"], "ready");
    let records = stack.items("audit", "busy", "TICKET#").await;
    let stored = records.iter().find(|record| record["action"] == "document_ingested").unwrap();
    assert_eq!(stored["embedding_tokens"].as_u64().unwrap_or(0), 0, "{stored}");
    assert_eq!(versions(&busy.search("harbour rules", 50).await), ([1].into(), PASSAGES));
    assert_eq!(points(&stack).await, PASSAGES as u64);
    stack.stop().await;
}
