//! Tenants as operators make and change them: whole or not at all, at once, and where there is room.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use local::identity::Identity;
use local::template::RouteAuth;
use qdrant_client::Qdrant;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::contract::Asking;
use tests::{Answer, Options, Stack};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// A vector cluster beside the stack's own.
struct Cell {
    url: String,
    client: Qdrant,
    _directory: tempfile::TempDir,
}

impl Cell {
    async fn start(root_key: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let serving = local::qdrant::serve(
            listener,
            directory.path().to_owned(),
            root_key.to_owned(),
            local::serving::Traces::default(),
            std::future::pending(),
        );
        tokio::spawn(serving);
        let client = client(&url, root_key);
        Self { url, client, _directory: directory }
    }

    async fn collections(&self) -> Vec<String> {
        collections(&self.client).await
    }
}

fn client(url: &str, root_key: &str) -> Qdrant {
    Qdrant::from_url(url).api_key(root_key.to_owned()).skip_compatibility_check().build().unwrap()
}

async fn collections(client: &Qdrant) -> Vec<String> {
    let listed = client.list_collections().await.unwrap().collections;
    listed.into_iter().map(|collection| collection.name).collect()
}

/// What the stack's own cell holds.
async fn own_collections(stack: &Stack) -> Vec<String> {
    collections(&client(stack.ready()["qdrant_url"].as_str().unwrap(), &stack.qdrant_root_key())).await
}

async fn empty() -> Stack {
    Stack::start_with(Options { no_seed: true, ..Options::default() }).await
}

fn body(id: &str) -> Value {
    json!({"tenant_id": id, "tier": "professional", "company_name": id})
}

async fn create(stack: &Stack, body: &Value) -> Answer {
    stack.admin(Method::POST, "/admin/tenants", Some(body)).await
}

/// What the tables hold of a tenant.
async fn items(stack: &Stack, id: &str) -> Vec<String> {
    let items = stack.items("tenants", id, "").await;
    let mut names: Vec<String> = items.iter().map(|item| item["sk"].as_str().unwrap().to_owned()).collect();
    if !stack.meter_item(id).await.is_null() {
        names.push("meter".to_owned());
    }
    names
}

async fn actions(stack: &Stack, id: &str) -> Vec<Value> {
    let events = stack.items("audit", id, "EVENT#").await;
    events.into_iter().filter(|event| event["action"].as_str().unwrap().starts_with("tenant_")).collect()
}

#[tokio::test]
async fn of_twenty_who_make_the_same_tenant_one_does() {
    let stack = Arc::new(empty().await);
    let mut makers = JoinSet::new();
    for _ in 0..20 {
        let stack = Arc::clone(&stack);
        makers.spawn(async move { create(&stack, &body("acme")).await });
    }
    let answers = makers.join_all().await;
    let made: Vec<&Answer> = answers.iter().filter(|a| a.status == StatusCode::CREATED).collect();
    assert_eq!(made.len(), 1, "{answers:?}");
    for answer in answers.iter().filter(|a| a.status != StatusCode::CREATED) {
        answer.expect_error(409, "conflict");
    }
    assert_eq!(own_collections(&stack).await, ["tenant_acme"]);
    let held = items(&stack, "acme").await;
    assert_eq!(held.len(), 3, "a record, a key and a meter: {held:?}");
    assert!(!held.contains(&"CLAIM".to_owned()));
    assert_eq!(actions(&stack, "acme").await.len(), 1);
    let acme = stack.tenant_with_key("acme", made[0].json()["api_key"].as_str().unwrap());
    acme.store("d", "D", "The answer is 42.").await;
    create(&stack, &body("acme")).await.expect_error(409, "conflict");
    assert_eq!(acme.search("answer", 5).await.len(), 1);
}

/// Whatever step it stops at, the tenant is there whole or not at all, and the same request again makes it.
#[tokio::test]
async fn who_is_killed_at_any_step_can_ask_again() {
    let stack = empty().await;
    let put = |contains: &'static str| ("PutItem", contains);
    let steps = [
        ("kill_before", put("CLAIM"), 0),
        ("kill_after", put("CLAIM"), 0),
        ("kill_before", put("CLAIM"), 1),
        ("kill_after", put("CLAIM"), 1),
        ("kill_before", ("TransactWriteItems", ""), 0),
        ("kill_after", ("TransactWriteItems", ""), 0),
    ];
    for (n, (mode, (operation, contains), skip)) in steps.into_iter().enumerate() {
        let id = format!("tenant-{n}");
        let rule = json!({"mode": mode, "operation": operation, "table": "tenants", "contains": contains,
            "skip": skip, "times": 1, "function": "provisioning"});
        stack.dynamodb_faults(json!({"rules": [rule]})).await;
        let answer = create(&stack, &body(&id)).await;
        assert!(answer.status.is_server_error(), "{n}: {} {}", answer.status, answer.text);
        stack.clear_dynamodb_faults().await;
        let held = items(&stack, &id).await;
        let whole = held.iter().filter(|name| *name != "CLAIM").count();
        assert!(whole == 0 || whole == 3, "{n}: {held:?}");
    }
    // The claims of those that were killed end by themselves.
    for n in 0..steps.len() {
        let id = format!("tenant-{n}");
        let began = tokio::time::Instant::now();
        loop {
            let answer = create(&stack, &body(&id)).await;
            if answer.status == StatusCode::CREATED {
                let tenant = stack.tenant_with_key(&id, answer.json()["api_key"].as_str().unwrap());
                tenant.store("d", "D", "The answer is 42.").await;
                break;
            }
            if items(&stack, &id).await.len() == 3 {
                // It was made, and nobody was told. That it exists is said now.
                assert!(answer.expect_error(409, "conflict")["message"].as_str().unwrap().contains("exists"));
                break;
            }
            assert!(
                answer.status == StatusCode::CONFLICT || answer.status.is_server_error(),
                "{}",
                answer.text
            );
            assert!(began.elapsed() < Duration::from_secs(60), "{id}: {}", answer.text);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let held = items(&stack, &id).await;
        assert!(held.len() == 3 && !held.contains(&"CLAIM".to_owned()), "{held:?}");
    }
    assert_eq!(own_collections(&stack).await.len(), steps.len());
}

/// What fails is taken back at once; what only seemed to fail is done.
#[tokio::test]
async fn whatever_the_tables_do_nothing_is_half_made() {
    let stack = empty().await;
    for mode in ["throttle", "error", "conflict", "hang", "lost_answer", "lost_answer_error"] {
        for times in [1, 9] {
            let id = format!("{}-{times}", mode.replace('_', "-"));
            let rule =
                json!({"mode": mode, "operation": "TransactWriteItems", "table": "tenants", "times": times});
            stack.dynamodb_faults(json!({"rules": [rule]})).await;
            let answer = create(&stack, &body(&id)).await;
            stack.clear_dynamodb_faults().await;
            let (held, there) = (items(&stack, &id).await, own_collections(&stack).await);
            let there = there.contains(&format!("tenant_{id}"));
            if answer.status == StatusCode::CREATED {
                assert_eq!((held.len(), there), (3, true), "{id}: {held:?}");
                let tenant = stack.tenant_with_key(&id, answer.json()["api_key"].as_str().unwrap());
                tenant.store("d", "D", "The answer is 42.").await;
            } else {
                assert_eq!((held.len(), there), (0, false), "{id}: {} {held:?}", answer.text);
                create(&stack, &body(&id)).await.expect_status(StatusCode::CREATED);
            }
        }
    }
}

#[tokio::test]
async fn a_collection_with_passages_is_never_anothers_and_never_removed() {
    let stack = empty().await;
    let acme = stack.provision(body("acme")).await;
    acme.store("d", "D", "The answer is 42.").await;
    // Deleted past the functions, and not wholly.
    for sort in items(&stack, "acme").await {
        let (table, key) = match sort.as_str() {
            "meter" => ("meters", json!({"tenant_id": {"S": "acme"}})),
            sort => ("tenants", json!({"tenant_id": {"S": "acme"}, "sk": {"S": sort}})),
        };
        stack.dynamodb("DeleteItem", table, json!({"Key": key})).await;
    }
    let error = create(&stack, &body("acme")).await.expect_error(409, "conflict");
    assert_eq!(error["param"], "cell", "{error}");
    assert_eq!(own_collections(&stack).await, ["tenant_acme"]);
    assert_eq!(items(&stack, "acme").await, Vec::<String>::new());
}

#[tokio::test]
async fn a_suspended_tenant_is_admitted_to_nothing_and_a_restored_one_to_everything() {
    let limits = json!({"requests_per_minute": 20_000, "max_concurrent": 200});
    let stack = Arc::new(empty().await);
    let mut wanted = body("acme");
    wanted["limits"] = limits;
    let acme = stack.provision(wanted).await;
    acme.store("d", "D", "The answer is 42.").await;
    let (suspended, end) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (before, after) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for n in 0..8 {
        let (acme, suspended, end) = (acme.clone(), Arc::clone(&suspended), Arc::clone(&end));
        let (before, after) = (Arc::clone(&before), Arc::clone(&after));
        clients.spawn(async move {
            while !end.load(Ordering::SeqCst) {
                let sent_after = suspended.load(Ordering::SeqCst);
                let answer = match n % 4 {
                    0 => acme.chat(json!({"message": "What is the answer?"})).await,
                    1 => acme.post("/v1/search", &json!({"query": "answer"})).await,
                    2 => acme.get("/v1/documents").await,
                    _ => acme.get("/v1/usage").await,
                };
                if sent_after {
                    after.fetch_add(1, Ordering::SeqCst);
                    answer.expect_error(403, "tenant_suspended");
                } else if answer.status == StatusCode::OK {
                    before.fetch_add(1, Ordering::SeqCst);
                } else {
                    answer.expect_error(403, "tenant_suspended");
                }
            }
        });
    }
    while before.load(Ordering::SeqCst) < 40 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stack.change_tenant("acme", json!({"status": "suspended"})).await;
    suspended.store(true, Ordering::SeqCst);
    while after.load(Ordering::SeqCst) < 80 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    end.store(true, Ordering::SeqCst);
    clients.join_all().await;
    acme.delete("/v1/documents/d").await.expect_error(403, "tenant_suspended");
    acme.get("/v1/audit").await.expect_error(403, "tenant_suspended");
    acme.post("/v1/documents", &json!({"title": "t", "content": "c"}))
        .await
        .expect_error(403, "tenant_suspended");

    stack.change_tenant("acme", json!({"status": "active"})).await;
    // What is cached says otherwise; it is looked at again.
    acme.ask("What is the answer?").await;
    acme.store("e", "E", "The question is not known.").await;
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);

    // A decision that was first made while the tenant was off, too.
    let globex = stack.provision(body("globex")).await;
    stack.change_tenant("globex", json!({"status": "suspended"})).await;
    globex.get("/v1/documents").await.expect_error(403, "tenant_suspended");
    stack.change_tenant("globex", json!({"status": "active"})).await;
    globex.store("d", "D", "The answer is 42.").await;

    let events = actions(&stack, "acme").await;
    let shown: Vec<(&str, &Value)> =
        events.iter().map(|e| (e["action"].as_str().unwrap(), &e["changed"])).collect();
    let status = json!(["status"]);
    assert_eq!(
        shown,
        [("tenant_provisioned", &Value::Null), ("tenant_suspended", &status), ("tenant_restored", &status)]
    );
}

#[tokio::test]
async fn a_change_holds_from_the_next_request_on() {
    let stack = empty().await;
    let acme = stack.provision(json!({"tenant_id": "acme", "tier": "free", "company_name": "Acme"})).await;
    let opus = || json!({"message": "x", "model": "claude-opus-4-6"});
    acme.chat(opus()).await.expect_error(403, "model_not_allowed");
    let now =
        stack.patch_tenant("acme", json!({"tier": "enterprise", "limits": {"max_concurrent": 3}})).await;
    let now = now.expect_status(StatusCode::OK).json();
    assert_eq!((&now["tier"], &now["overrides"]), (&json!("enterprise"), &json!({"max_concurrent": 3})));
    acme.chat(opus()).await.expect_status(StatusCode::OK);
    stack.change_tenant("acme", json!({"limits": {"requests_per_minute": 0}})).await;
    let refused = acme.get("/v1/documents").await.expect_error(429, "rate_limit_exceeded");
    assert_eq!(refused["limit"], "requests_per_minute");
    let taken_back = json!({"limits": {"requests_per_minute": null}, "tier": "professional"});
    let now = stack.patch_tenant("acme", taken_back).await.expect_status(StatusCode::OK).json();
    assert_eq!(now["overrides"], json!({"max_concurrent": 3}));
    assert_eq!(now["limits"]["max_concurrent"], 3);
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);

    // Own accounts need their secret, in a change as at the beginning.
    let own = json!({"model_account": "own"});
    let error = stack.patch_tenant("acme", own.clone()).await.expect_error(400, "invalid_request");
    assert_eq!(error["param"], "model_account");
    stack.create_secret("bulkhead/model/tenants/acme", "offline").await;
    stack.change_tenant("acme", own).await;

    // The same again changes nothing.
    let epoch = stack.meter_item("acme").await["epoch"].clone();
    stack.change_tenant("acme", json!({"tier": "professional"})).await;
    assert_eq!(stack.meter_item("acme").await["epoch"], epoch);
}

#[tokio::test]
async fn changes_at_the_same_time_are_all_made() {
    let stack = Arc::new(empty().await);
    stack.provision(body("acme")).await;
    let changes = [
        json!({"company_name": "Acme & Co"}),
        json!({"assistant_name": "Ada"}),
        json!({"instructions": "Be brief."}),
        json!({"injection_policy": "refuse"}),
        json!({"webhook_url": "https://acme.example/hook"}),
        json!({"limits": {"max_documents": 7}}),
        json!({"status": "suspended"}),
    ];
    let mut running = JoinSet::new();
    for change in changes.clone() {
        let stack = Arc::clone(&stack);
        running.spawn(async move { stack.patch_tenant("acme", change).await.expect_status(StatusCode::OK) });
    }
    running.join_all().await;
    let now = stack.admin(Method::GET, "/admin/tenants/acme", None).await.json();
    for change in &changes[..5] {
        for (field, value) in change.as_object().unwrap() {
            assert_eq!(now[field], *value, "{now}");
        }
    }
    assert_eq!((&now["status"], &now["limits"]["max_documents"]), (&json!("suspended"), &json!(7)));
    let meter = stack.meter_item("acme").await;
    assert_eq!(meter["status"]["S"], "suspended");
    assert_eq!(meter["epoch"]["N"], "8");
}

#[tokio::test]
async fn a_change_that_was_cut_off_is_mended_by_the_same_again() {
    let stack = empty().await;
    let acme = stack.provision(body("acme")).await;
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);
    let cut_off = json!({"mode": "kill_before", "operation": "UpdateItem", "table": "meters",
        "contains": "#e <= :e", "times": 1, "function": "provisioning"});
    stack.dynamodb_faults(json!({"rules": [cut_off]})).await;
    let answer = stack.patch_tenant("acme", json!({"status": "suspended"})).await;
    assert!(answer.status.is_server_error(), "{}", answer.text);
    stack.clear_dynamodb_faults().await;
    assert_eq!(stack.meter_item("acme").await["epoch"]["N"], "1");
    let began = tokio::time::Instant::now();
    while stack.patch_tenant("acme", json!({"status": "suspended"})).await.status != StatusCode::OK {
        assert!(began.elapsed() < Duration::from_secs(60));
    }
    acme.get("/v1/documents").await.expect_error(403, "tenant_suspended");
    assert_eq!(stack.meter_item("acme").await["epoch"]["N"], "2");
    let suspended = actions(&stack, "acme").await;
    assert_eq!(suspended.iter().filter(|e| e["action"] == "tenant_suspended").count(), 1);
}

#[tokio::test]
async fn tenants_are_placed_where_there_is_room_and_nowhere_else() {
    let data = tempfile::tempdir().unwrap();
    let root_key = Identity::open(data.path()).unwrap().qdrant_root_key;
    let (small, large) = (Cell::start(&root_key).await, Cell::start(&root_key).await);
    let (closed, own) = (Cell::start(&root_key).await, Cell::start(&root_key).await);
    // It takes connections and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cells = format!(
        "closed={};state=closed,large={};capacity=6,own={};tenant=hooli;capacity=1,silent=http://{},small={};capacity=2",
        closed.url,
        large.url,
        own.url,
        silent.local_addr().unwrap(),
        small.url,
    );
    let options = Options {
        no_seed: true,
        data: Some(data.path().to_owned()),
        parameters: vec![("QdrantCells", cells)],
        ..Options::default()
    };
    let stack = Arc::new(Stack::start_with(options).await);
    let named = |id: &str, cell: &str| {
        let mut body = body(id);
        body["cell"] = cell.into();
        body
    };
    let unknown = create(&stack, &named("acme", "medium")).await.expect_error(400, "invalid_request");
    assert_eq!(unknown["param"], "cell");
    for (cell, why) in [("closed", "closed"), ("own", "another")] {
        let error = create(&stack, &named("acme", cell)).await.expect_error(409, "conflict");
        assert_eq!(error["param"], "cell");
        assert!(error["message"].as_str().unwrap().contains(why), "{error}");
    }
    let error = create(&stack, &named("acme", "silent")).await.expect_error(503, "unavailable");
    assert!(error["message"].as_str().unwrap().contains("does not answer"), "{error}");
    assert_eq!(items(&stack, "acme").await, Vec::<String>::new());

    // The one that is kept for it is its own, without its being named; nobody else gets there.
    let hooli = create(&stack, &body("hooli")).await.expect_status(StatusCode::CREATED).json();
    assert_eq!(hooli["cell"], "own");
    let acme = create(&stack, &body("acme")).await.expect_status(StatusCode::CREATED).json();
    assert_eq!(acme["cell"], "large", "where there is the most room");
    let acme = stack.tenant_with_key("acme", acme["api_key"].as_str().unwrap());
    let globex = create(&stack, &named("globex", "small")).await.expect_status(StatusCode::CREATED).json();
    assert_eq!(globex["cell"], "small");

    // Twelve at the same time for the six places that are left: whoever is told 201 has one.
    let mut makers = JoinSet::new();
    for n in 0..12 {
        let stack = Arc::clone(&stack);
        makers.spawn(async move { create(&stack, &body(&format!("rush-{n}"))).await });
    }
    let answers = makers.join_all().await;
    let made = answers.iter().filter(|answer| answer.status == StatusCode::CREATED).count();
    for answer in answers.iter().filter(|answer| answer.status != StatusCode::CREATED) {
        answer.expect_error(503, "unavailable");
    }
    let (in_large, in_small) = (large.collections().await.len(), small.collections().await.len());
    assert!(in_large <= 6 && in_small <= 2, "{in_large} {in_small}");
    assert_eq!(in_large + in_small, made + 2);
    let mut n = 0;
    while large.collections().await.len() + small.collections().await.len() < 8 {
        create(&stack, &body(&format!("late-{n}"))).await.expect_status(StatusCode::CREATED);
        n += 1;
    }
    let error = create(&stack, &body("umbrella")).await.expect_error(503, "unavailable");
    for word in ["`large` is full", "`small` is full", "`closed` is closed", "`silent` does not answer"] {
        assert!(error["message"].as_str().unwrap().contains(word), "{error}");
    }
    assert_eq!(items(&stack, "umbrella").await, Vec::<String>::new());
    assert!(closed.collections().await.is_empty() && own.collections().await == ["tenant_hooli"]);

    // A move: of a tenant that is at rest and has no passages.
    acme.store("d", "D", "The answer is 42.").await;
    let to_closed = || json!({"cell": "closed"});
    let error = stack.patch_tenant("acme", json!({"cell": "small"})).await.expect_error(409, "conflict");
    assert!(error["message"].as_str().unwrap().contains("1 passages"), "{error}");
    acme.delete("/v1/documents/d").await.expect_status(StatusCode::NO_CONTENT);
    let error = stack.patch_tenant("acme", json!({"cell": "small"})).await.expect_error(409, "conflict");
    assert!(error["message"].as_str().unwrap().contains("suspend"), "{error}");
    stack.change_tenant("acme", json!({"status": "suspended"})).await;
    let error = stack.patch_tenant("acme", json!({"cell": "small"})).await.expect_error(409, "conflict");
    assert!(error["message"].as_str().unwrap().contains("full"), "{error}");
    stack.patch_tenant("acme", to_closed()).await.expect_error(409, "conflict");
    assert_eq!(large.collections().await.len(), 6);
}

#[tokio::test]
async fn an_empty_tenant_moves_and_leaves_nothing_behind() {
    let data = tempfile::tempdir().unwrap();
    let root_key = Identity::open(data.path()).unwrap().qdrant_root_key;
    let (a, b) = (Cell::start(&root_key).await, Cell::start(&root_key).await);
    let options = Options {
        no_seed: true,
        data: Some(data.path().to_owned()),
        parameters: vec![("QdrantCells", format!("a={},b={}", a.url, b.url))],
        ..Options::default()
    };
    let stack = Stack::start_with(options).await;
    let acme = stack.provision(body("acme")).await;
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);
    assert_eq!(a.collections().await, ["tenant_acme"]);
    stack.change_tenant("acme", json!({"status": "suspended"})).await;
    let moved = stack.patch_tenant("acme", json!({"cell": "b", "status": "active"})).await;
    assert_eq!(moved.expect_status(StatusCode::OK).json()["cell"], "b");
    assert!(a.collections().await.is_empty());
    acme.store("d", "D", "The answer is 42.").await;
    assert_eq!(acme.search("answer", 5).await.len(), 1);
    assert_eq!(b.collections().await, ["tenant_acme"]);
    assert!(!items(&stack, "acme").await.contains(&"CLAIM".to_owned()));
    let last = actions(&stack, "acme").await.pop().unwrap();
    assert_eq!((&last["action"], &last["changed"]), (&json!("tenant_restored"), &json!(["cell", "status"])));
}

/// The operators' routes of the contract, about a tenant `acme`.
fn operators_routes() -> Vec<(Method, String)> {
    let template = tests::template();
    let routes = template.api.routes.iter().filter(|route| route.auth == RouteAuth::Iam);
    let filled = |path: &str| {
        let id = if path.contains("deprovisionings") { "dep_acme_0000000000000000000000" } else { "acme" };
        path.replace("{id}", id).replace("{key_id}", "000000000000")
    };
    routes.map(|route| (route.method.clone(), filled(&route.path))).collect()
}

#[tokio::test]
async fn what_is_no_request_of_an_operator_is_refused_by_name_and_does_nothing() {
    let stack = empty().await;
    stack.provision(body("acme")).await;
    let before = items(&stack, "acme").await;
    for (method, path) in operators_routes() {
        if method == Method::POST || method == Method::PATCH {
            for raw in [&b"{"[..], b"", b"null", b"[]", b"\"x\"", b"7", b"\xff\xfe", b"{\"a\":\"\xff\"}"] {
                let answer = stack.admin_raw(method.clone(), &path, raw.to_vec()).await;
                assert_eq!(answer.expect_error(400, "invalid_request")["param"], "body", "{path}: {raw:?}");
            }
            let unknown = json!({"colour": "red"}).to_string();
            let answer = stack.admin_raw(method.clone(), &path, unknown.into_bytes()).await;
            assert_eq!(answer.expect_error(400, "invalid_request")["param"], "colour", "{path}");
        }
    }
    for (path, param) in [
        ("/admin/tenants?limit=0", "limit"),
        ("/admin/tenants?limit=-1", "limit"),
        ("/admin/tenants?limit=101", "limit"),
        ("/admin/tenants?limit=ten", "limit"),
        ("/admin/tenants?cursor=ACME", "cursor"),
        ("/admin/tenants?cursor=a%23b", "cursor"),
        ("/admin/tenants/acme/keys?limit=1e2", "limit"),
        ("/admin/tenants/acme/keys?cursor=x", "cursor"),
        ("/admin/usage?month=2026-13", "month"),
        ("/admin/usage?month=now", "month"),
        ("/admin/usage?limit=0", "limit"),
        ("/admin/audit/verify", "tenant_id"),
        ("/admin/audit/verify?tenant_id=ACME", "tenant_id"),
        ("/admin/issuer-claim", "issuer"),
    ] {
        let answer = stack.admin(Method::GET, path, None).await;
        assert_eq!(answer.expect_error(400, "invalid_request")["param"], param, "{path}");
    }
    assert_eq!(items(&stack, "acme").await, before);
}

#[tokio::test]
async fn a_signature_opens_what_it_was_made_for_for_five_minutes() {
    let stack = empty().await;
    let operator = stack.operator();
    let soon = Duration::from_secs(0);
    let send = async |request: Asking| Answer::read(request.send().await.unwrap()).await;
    let late = Duration::from_secs(301);
    let routes = operators_routes();
    assert!(routes.len() >= 14, "{routes:?}");
    for (method, path) in routes {
        let wanted = match method.as_str() {
            "POST" if path == "/admin/tenants" => body("acme"),
            "PATCH" => json!({"status": "suspended"}),
            "POST" => json!({}),
            _ => Value::Null,
        };
        let signed = |key, ago| stack.signed_before(key, ago, method.clone(), &path, &wanted);
        send(signed(&operator, late)).await.expect_error(403, "invalid_key");
        let mut other = operator.clone();
        other.credentials.secret_access_key.push('x');
        send(signed(&other, soon)).await.expect_error(403, "invalid_key");
        let mut stranger = operator.clone();
        stranger.credentials.access_key_id = "AKIANOBODY".into();
        send(signed(&stranger, soon)).await.expect_error(403, "invalid_key");
        let mut elsewhere = operator.clone();
        elsewhere.credentials.region = "mars-north-1".into();
        send(signed(&elsewhere, soon)).await.expect_error(403, "invalid_key");
        // Signed, and then changed.
        let changed = signed(&operator, soon).body(r#"{"tenant_id":"evil"}"#);
        send(changed).await.expect_error(403, "invalid_key");
        let unsigned = Asking::new(&tests::client(), method.clone(), &format!("{}{path}", stack.url()));
        send(unsigned.body(wanted.to_string())).await.expect_error(404, "not_found");
    }
    assert_eq!(items(&stack, "acme").await, Vec::<String>::new());

    // Sent again while it holds, a request is let in again, as on AWS, and does nothing more.
    let making = stack.signed_before(&operator, soon, Method::POST, "/admin/tenants", &body("acme"));
    let replay = making.try_clone().unwrap();
    send(making).await.expect_status(StatusCode::CREATED);
    send(replay).await.expect_error(409, "conflict");
    let suspend = json!({"status": "suspended"});
    let change = stack.signed_before(&operator, soon, Method::PATCH, "/admin/tenants/acme", &suspend);
    let replay = change.try_clone().unwrap();
    send(change).await.expect_status(StatusCode::OK);
    send(replay).await.expect_status(StatusCode::OK);
    assert_eq!(stack.meter_item("acme").await["epoch"]["N"], "2");
    let events = actions(&stack, "acme").await;
    assert_eq!(events.iter().filter(|e| e["action"] == "tenant_suspended").count(), 1);
}

#[tokio::test]
async fn bad_changes_name_the_field_and_change_nothing() {
    let stack = empty().await;
    stack.provision(body("acme1")).await;
    let before = stack.items("tenants", "acme1", "").await;
    for (change, param) in [
        (json!({}), "body"),
        (json!([]), "body"),
        (json!("suspended"), "body"),
        (json!({"status": "deleted"}), "status"),
        (json!({"status": "provisioning"}), "status"),
        (json!({"status": null}), "status"),
        (json!({"status": ["active"]}), "status"),
        (json!({"tier": "gold"}), "tier"),
        (json!({"limits": {"tokens_per_day": -1}}), "limits.tokens_per_day"),
        (json!({"limits": {"tokens_per_day": 1e30}}), "limits.tokens_per_day"),
        (json!({"limits": {"requests_per_minute": 4_294_967_296_u64}}), "limits.requests_per_minute"),
        (json!({"limits": {"requests_per_minute": "60"}}), "limits.requests_per_minute"),
        (json!({"limits": {"max_concurrent": 201}}), "limits.max_concurrent"),
        (json!({"limits": {"requests": 1}}), "limits.requests"),
        (json!({"limits": {"allowed_models": []}}), "limits.allowed_models"),
        (json!({"limits": {"allowed_models": ["gpt-2"]}}), "limits.allowed_models"),
        (json!({"limits": {"allowed_models": vec!["claude-haiku-4-5"; 20_000]}}), "limits.allowed_models"),
        (
            json!({"limits": {"allowed_models": ["claude-haiku-4-5-20251001"], "default_model": "claude-opus-4-6"}}),
            "limits.default_model",
        ),
        (json!({"company_name": ""}), "company_name"),
        (json!({"assistant_name": "two\nlines"}), "assistant_name"),
        (json!({"webhook_url": "https://"}), "webhook_url"),
        (json!({"injection_policy": "ask"}), "injection_policy"),
        (json!({"model_account": "own"}), "model_account"),
        (json!({"cell": "nowhere"}), "cell"),
        (json!({"cell": "../default"}), "cell"),
        (json!({"tenant_id": "globex"}), "tenant_id"),
        (json!({"epoch": 99}), "epoch"),
        (json!({"status": "suspended", "tier": "gold"}), "tier"),
    ] {
        let error = stack.patch_tenant("acme1", change.clone()).await.expect_error(400, "invalid_request");
        assert_eq!(error["param"], param, "{change}: {error}");
    }
    for raw in [
        &b""[..],
        b"{",
        b"{\"status\":\"active\"",
        b"\xff",
        b"{\"status\":\"active\",\"status\":\"suspended\"}",
    ] {
        let answer = stack.admin_raw(Method::PATCH, "/admin/tenants/acme1", raw.to_vec()).await;
        answer.expect_error(400, "invalid_request");
    }
    // What only looks like a tenant's id is none.
    for id in [
        "acme",
        "acmel",
        "acme-1",
        "Acme1",
        "acme1%20",
        "%D0%B0cme1",
        "acme1%00",
        "acme1%23",
        "tenant_acme1",
        "x",
    ] {
        for (method, change) in [(Method::PATCH, Some(json!({"status": "suspended"}))), (Method::GET, None)] {
            let answer = stack.admin(method, &format!("/admin/tenants/{id}"), change.as_ref()).await;
            answer.expect_error(404, "not_found");
        }
    }
    assert_eq!(stack.items("tenants", "acme1", "").await, before);
    assert_eq!(stack.meter_item("acme1").await["epoch"]["N"], "1");
    assert_eq!(own_collections(&stack).await, ["tenant_acme1"]);
}
