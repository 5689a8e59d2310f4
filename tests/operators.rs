//! The operators' program against a running stack: what `docs/operations.md` tells people to type.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;
use tests::Stack;

/// Runs the program, which must succeed, and returns what it printed.
async fn well(stack: &Stack, arguments: &[&str]) -> String {
    let output = stack.bulkhead(arguments).await;
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{arguments:?}: {out}{err}");
    out
}

/// The same, with the API's objects.
async fn object(stack: &Stack, arguments: &[&str]) -> Value {
    let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&well(stack, &arguments).await).unwrap()
}

/// A refusal's exit code and line.
async fn refused(stack: &Stack, arguments: &[&str]) -> (i32, String) {
    let output = stack.bulkhead(arguments).await;
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

const NEW: [&str; 9] = [
    "tenants",
    "create",
    "initech",
    "--tier",
    "starter",
    "--company-name",
    "Initech",
    "--limit",
    "max_concurrent=3",
];

#[tokio::test]
async fn a_tenant_is_made_shown_and_listed_and_its_usage_told() {
    let stack = Stack::start().await;
    let made = object(&stack, &NEW).await;
    let tenant = stack.tenant_with_key("initech", made["api_key"].as_str().unwrap());
    tenant.store("handbook", "Handbook", "Every employee has 25 days of annual leave.").await;
    tenant.ask("How many days of annual leave are there?").await;

    let (code, line) = refused(&stack, &NEW).await;
    assert_eq!((code, line.lines().count()), (1, 1), "{line}");
    assert!(line.starts_with("error: 409 conflict: ") && line.contains("(request "), "{line}");

    let shown = well(&stack, &["tenants", "show", "initech"]).await;
    assert!(shown.starts_with("tenant_id ") && shown.contains("limits.max_concurrent"), "{shown}");
    assert_eq!(object(&stack, &["tenants", "show", "initech"]).await["limits"]["max_concurrent"], 3);
    let list = well(&stack, &["tenants", "list"]).await;
    let names: Vec<&str> = list.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(names.len(), 4, "{list}");
    assert!(["tenant", "acme", "globex", "initech"].iter().all(|name| names.contains(name)), "{list}");
    let (code, line) = refused(&stack, &["tenants", "show", "nobody"]).await;
    assert!(code == 1 && line.starts_with("error: 404 not_found"), "{line}");

    let bill = async || {
        let usage = object(&stack, &["usage"]).await;
        let all = usage["usage"].as_array().unwrap().clone();
        all.into_iter().find(|tenant| tenant["tenant_id"] == "initech").unwrap()
    };
    // The bill follows the ledger's stream.
    let arrives = async {
        while bill().await["requests"] != 2 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), arrives).await.unwrap();
    let table = well(&stack, &["usage"]).await;
    assert!(table.lines().any(|line| line.starts_with("initech")), "{table}");
    let csv = well(&stack, &["usage", "--csv"]).await;
    assert!(csv.starts_with("tenant_id,month,model,") && csv.contains("\r\ninitech,"), "{csv}");
    let month = bill().await["month"].as_str().unwrap().to_owned();
    assert_eq!(object(&stack, &["usage", "--month", "2020-01"]).await["usage"][0]["requests"], 0);
    assert!(well(&stack, &["usage", "--month", &month, "--csv"]).await.contains("initech"));
}

// --- What follows needs the routes that change tenants, make keys and delete.

#[tokio::test]
async fn set_holds_for_the_next_request() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.search("leave", 1).await;
    let changed = object(&stack, &["tenants", "set", "acme", "--limit", "requests_per_minute=0"]).await;
    assert_eq!(changed["limits"]["requests_per_minute"], 0);
    acme.get("/v1/documents").await.expect_error(429, "rate_limit_exceeded");
    well(&stack, &["tenants", "set", "acme", "--tier", "enterprise", "--limit", "requests_per_minute=tier"])
        .await;
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);
    let (code, line) = refused(&stack, &["tenants", "set", "acme", "--limit", "default_model=nothing"]).await;
    assert!(code == 1 && line.starts_with("error: 400 invalid_request"), "{line}");
}

#[tokio::test]
async fn a_raised_limit_holds_for_the_next_request_of_one_that_was_refused() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    well(&stack, &["tenants", "set", "acme", "--limit", "requests_per_minute=3"]).await;
    for _ in 0..3 {
        acme.get("/v1/documents").await.expect_status(StatusCode::OK);
    }
    acme.get("/v1/documents").await.expect_error(429, "rate_limit_exceeded");
    well(&stack, &["tenants", "set", "acme", "--limit", "requests_per_minute=100"]).await;
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);
}

#[tokio::test]
async fn suspend_and_restore_hold_for_the_next_request() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);
    assert_eq!(object(&stack, &["tenants", "suspend", "acme"]).await["status"], "suspended");
    acme.get("/v1/documents").await.expect_error(403, "tenant_suspended");
    stack.tenant("globex").get("/v1/documents").await.expect_status(StatusCode::OK);
    assert_eq!(object(&stack, &["tenants", "restore", "acme"]).await["status"], "active");
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);
}

#[tokio::test]
async fn keys_create_makes_a_key_that_may_do_what_was_said() {
    let stack = Stack::start().await;
    let made =
        object(&stack, &["keys", "create", "acme", "--name", "reader", "--scope", "documents:read"]).await;
    let acme = stack.tenant_with_key("acme", made["api_key"].as_str().unwrap());
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);
    acme.get("/v1/usage").await.expect_error(403, "insufficient_scope");
    let (code, line) = refused(&stack, &["keys", "create", "nobody"]).await;
    assert!(code == 1 && line.starts_with("error: 404 not_found"), "{line}");
    let (code, line) = refused(&stack, &["keys", "create", "acme", "--cidr", "nowhere"]).await;
    assert!(code == 1 && line.contains("allowed_cidrs"), "{line}");
}

#[tokio::test]
async fn delete_and_watch_end_with_the_receipt() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("handbook", "Handbook", "Every employee has 25 days of annual leave.").await;
    let (code, line) = refused(&stack, &["tenants", "delete", "acme"]).await;
    assert!(code == 2 && line.contains("nothing was deleted"), "nobody typed the id: {line}");
    acme.get("/v1/documents").await.expect_status(StatusCode::OK);

    let watched = well(&stack, &["tenants", "delete", "acme", "--yes", "--watch"]).await;
    assert!(watched.contains("disable") && watched.contains("receipt of "), "{watched}");
    assert_ne!(acme.get("/v1/documents").await.status, StatusCode::OK);
    // Asked again, it says which deletion that was.
    let begun = object(&stack, &["tenants", "delete", "acme", "--yes"]).await;
    let id = begun["deprovisioning_id"].as_str().unwrap();
    let view = object(&stack, &["deprovisioning", "show", id]).await;
    assert_eq!((&view["status"], &view["tenant_id"]), (&"completed".into(), &"acme".into()), "{view}");
    let stores = view["receipt"]["stores"].as_array().unwrap();
    assert!(stores.iter().all(|store| store["found"] == 0), "{view}");
    let documents = stores.iter().find(|store| store["store"] == "documents").unwrap();
    assert_eq!(documents["deleted"], 1, "{view}");
    let watched = object(&stack, &["deprovisioning", "watch", id]).await;
    assert_eq!(watched["receipt"], view["receipt"]);
    stack.tenant("globex").get("/v1/documents").await.expect_status(StatusCode::OK);
}
