//! The money adds up (I5): what the ledger says, the bill says, and the meter.

#![expect(clippy::indexing_slicing, clippy::expect_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::{Stack, Tenant, plain_item};

async fn job(stack: &Stack, job: &str) -> Value {
    stack.invoke("reconciler", json!({ "job": job })).await
}

/// Mixed work of one tenant, eleven tickets: answers, a stream, searches, a document and a failure.
async fn work(stack: &Stack, tenant: &Tenant) {
    tenant.store("leave", "Leave", "You have 25 days of annual leave a year.").await;
    for n in 0..4 {
        tenant.ask(&format!("How many days of leave? {n}")).await;
        tenant.search("days of leave", 3).await;
    }
    let body = json!({"message": "How many days of leave?", "model": "claude-haiku-4-5-20251001"});
    let events = tests::all_events(tenant.open_stream(body).await).await;
    assert_eq!(events.last().map(|e| e.name.as_str()), Some("done"));
    stack.model_fault(json!({"mode": "cut_after_deltas", "n": 2, "count": 1})).await;
    tenant.chat(json!({"message": "How many days of leave?"})).await.expect_error(502, "model_unavailable");
}

/// Waits until the bill has that many requests.
async fn billed(tenant: &Tenant, requests: u64) -> Value {
    let began = Instant::now();
    loop {
        let usage = tenant.get("/v1/usage").await.expect_status(StatusCode::OK).json();
        if usage["requests"] == requests {
            return usage;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "the bill does not catch up: {usage}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn sum(records: &[Value], field: &str) -> u64 {
    records.iter().map(|r| r.pointer(field).and_then(Value::as_u64).expect(field)).sum()
}

#[tokio::test]
async fn the_sum_of_the_ledger_is_the_bill_and_the_meter() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    work(&stack, &acme).await;
    let records = stack.items("audit", "acme", "TICKET#").await;
    let tickets: Vec<u64> = records.iter().map(|r| r["ticket"].as_u64().unwrap()).collect();
    assert_eq!(tickets, (1..=11).collect::<Vec<u64>>());
    let usage = billed(&acme, 11).await;
    for field in ["embedding_tokens", "unreported_tokens", "cost_nano_usd"] {
        assert_eq!(usage[field], sum(&records, &format!("/{field}")), "{field}");
    }
    for field in ["input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"] {
        assert_eq!(usage[field], sum(&records, &format!("/usage/{field}")), "{field}");
    }
    let models = usage["models"].as_object().unwrap();
    assert_eq!(models.len(), 3, "{usage}");
    let by_model: u64 = models.values().map(|m| m["cost_nano_usd"].as_u64().unwrap()).sum();
    assert_eq!(usage["cost_nano_usd"], by_model);
    let meter = plain_item(&stack.meter_item("acme").await);
    assert_eq!(meter["month_cost"], usage["cost_nano_usd"]);
    let cut = records.iter().find(|r| r["error"] == "model_unavailable").expect("the answer that was cut");
    assert_eq!((&cut["estimated"], &cut["usage"]["output_tokens"]), (&json!(true), &json!(2048)));

    // As a table, for a tenant and for the operator, and refused where it cannot be.
    let csv = acme.request(Method::GET, "/v1/usage").header("accept", "text/csv").send().await.unwrap();
    assert_eq!(csv.headers()["content-type"], "text/csv; charset=utf-8");
    let csv = csv.text().await.unwrap();
    assert_eq!(csv.lines().count(), 4, "{csv}");
    let cost = |line: &str| line.split(',').nth(10).unwrap().parse::<u64>().unwrap();
    assert_eq!(usage["cost_nano_usd"], csv.lines().skip(1).map(cost).sum::<u64>());
    let all = stack.admin(Method::GET, "/admin/usage", None).await.expect_status(StatusCode::OK).json();
    let mine = all["usage"].as_array().unwrap().iter().find(|u| u["tenant_id"] == "acme").unwrap();
    assert_eq!(mine["cost_nano_usd"], usage["cost_nano_usd"]);
    acme.get("/v1/usage?month=2026-13").await.expect_error(400, "invalid_request");
    let empty = acme.get("/v1/usage?month=2020-01").await.expect_status(StatusCode::OK).json();
    assert_eq!((&empty["requests"], &empty["latency_ms"]["p99"]), (&json!(0), &Value::Null));

    let report = job(&stack, "verify").await;
    assert_eq!((&report["agree"], &report["differences"]), (&json!(2), &json!([])), "{report}");
    stack.stop().await;
}

#[tokio::test]
async fn a_difference_between_books_is_an_alarm_and_is_not_repaired() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    work(&stack, &acme).await;
    billed(&acme, 11).await;
    let records = stack.items("audit", "acme", "TICKET#").await;
    let line = stack.items("usage", "acme", "USAGE#").await[0]["sk"].as_str().unwrap().to_owned();
    let difference = async |what: &str| {
        let report = job(&stack, "verify").await;
        let said = report["differences"][0]["what"].as_str().unwrap_or_default().to_owned();
        assert!(said.contains(what), "{report}");
    };
    let add = async |by: i64| {
        let update = json!({
            "Key": {"tenant_id": {"S": "acme"}, "sk": {"S": line}},
            "UpdateExpression": "ADD cost_nano_usd :by",
            "ExpressionAttributeValues": {":by": {"N": by.to_string()}},
        });
        stack.dynamodb("UpdateItem", "usage", update).await;
    };
    add(1).await;
    difference("cost_nano_usd: the bill says").await;
    difference("cost_nano_usd: the bill says").await;
    assert!(stack.logs().contains(r#""alert":"books_differ""#));
    add(-1).await;
    assert_eq!(job(&stack, "verify").await["differences"], json!([]));

    // A record that vanishes from the ledger leaves a gap in the tickets.
    let key = json!({"tenant_id": {"S": "acme"}, "sk": {"S": records[4]["sk"]}});
    stack.dynamodb("DeleteItem", "audit", json!({ "Key": key })).await;
    difference("ticket 5 has no record").await;
    stack.stop().await;
}

#[tokio::test]
async fn books_that_cannot_be_read_hide_no_others() {
    let stack = Stack::start().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    work(&stack, &acme).await;
    billed(&acme, 11).await;
    globex.store("leave", "Leave", "You have 25 days of annual leave a year.").await;
    billed(&globex, 1).await;
    let set_seq = async |tenant: &str, value: Value| {
        let update = json!({
            "Key": {"tenant_id": {"S": tenant}},
            "UpdateExpression": "SET seq = :to",
            "ExpressionAttributeValues": {":to": value},
        });
        stack.dynamodb("UpdateItem", "meters", update).await;
    };
    for broken in ["acme", "globex"] {
        let seq = stack.meter_item(broken).await["seq"].clone();
        set_seq(broken, json!({"S": "eleven"})).await;
        for (asked, agree) in [("verify", 1), ("collect", 0)] {
            let report = job(&stack, asked).await;
            assert_eq!((&report["tenants"], &report["unread"]), (&json!(2), &json!(1)), "{report}");
            assert_eq!((&report["agree"], &report["differences"]), (&json!(agree), &json!([])), "{report}");
        }
        set_seq(broken, seq).await;
    }
    assert!(stack.logs().contains(r#""alert":"books_unread""#));
    assert_eq!(job(&stack, "verify").await["agree"], 2);

    // A table that does not answer for one tenant's books is an alarm too, and goes by.
    let rule = json!({"mode": "error", "operation": "Query", "table": "usage", "times": 100});
    stack.dynamodb_faults(json!({"seed": 1, "rules": [rule]})).await;
    let report = job(&stack, "verify").await;
    assert_eq!((&report["unread"], &report["agree"]), (&json!(2), &json!(0)), "{report}");
    stack.clear_dynamodb_faults().await;
    assert_eq!(job(&stack, "verify").await["agree"], 2);
    stack.stop().await;
}

#[tokio::test]
async fn a_record_that_is_delivered_again_is_billed_once() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    // The consumer dies behind its transaction, its answer is lost, it is refused for a conflict, and
    // dies before: each time the stream delivers again.
    let rule =
        |mode: &str| json!({"mode": mode, "operation": "TransactWriteItems", "table": "usage", "times": 2});
    let mut rules: Vec<Value> =
        ["kill_after", "lost_answer", "cancel_conflict", "kill_before"].map(rule).to_vec();
    rules[0]["function"] = "audit_export".into();
    rules[3]["function"] = "audit_export".into();
    stack.dynamodb_faults(json!({"seed": 1, "rules": rules})).await;
    work(&stack, &acme).await;
    let mut requests = 11;
    let struck = async || stack.dynamodb_calls().await.iter().filter(|call| !call["fault"].is_null()).count();
    while struck().await < 8 {
        assert!(requests < 40, "{} faults", struck().await);
        acme.ask("How many days of leave?").await;
        requests += 1;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    billed(&acme, requests).await;
    stack.clear_dynamodb_faults().await;
    let report = job(&stack, "verify").await;
    assert_eq!((&report["agree"], &report["differences"]), (&json!(2), &json!([])), "{report}");
    assert_eq!(stack.queue_messages("ledger-failures"), Vec::<Value>::new());
    stack.stop().await;
}

#[tokio::test]
async fn what_nobody_settles_is_collected_and_charged_at_its_bound() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("leave", "Leave", "You have 25 days of annual leave a year.").await;
    stack.model_fault(json!({"mode": "hang", "count": 1})).await;
    let asking = tokio::spawn({
        let acme = acme.clone();
        async move { acme.chat(json!({"message": "How many days?"})).await }
    });
    let lease = loop {
        let meter = plain_item(&stack.meter_item("acme").await);
        let leases = meter["leases"].as_object().unwrap().clone();
        if let Some((lease, ticket)) = leases.into_iter().next() {
            assert_eq!(ticket, 2);
            break lease;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    stack.kill("chat").await;
    assert!(asking.await.unwrap().status.is_server_error());
    assert_eq!(job(&stack, "collect").await["collected"], 0, "its time is not over");

    // Its time is over: as if it had been admitted ten minutes ago.
    let mut parts: Vec<String> = lease.split('.').map(str::to_owned).collect();
    parts[1] = (parts[1].parse::<i64>().unwrap() - 600).to_string();
    let (old, tokens, cost) = (parts.join("."), parts[3].clone(), parts[4].clone());
    let update = json!({
        "Key": {"tenant_id": {"S": "acme"}},
        "UpdateExpression": "SET leases.#old = leases.#new REMOVE leases.#new",
        "ExpressionAttributeNames": {"#old": old, "#new": lease},
    });
    stack.dynamodb("UpdateItem", "meters", update).await;
    assert_eq!(job(&stack, "collect").await["collected"], 1);
    assert_eq!(job(&stack, "collect").await["collected"], 0);
    let records = stack.items("audit", "acme", "TICKET#").await;
    let aborted = &records[1];
    assert_eq!((&aborted["outcome"], &aborted["action"]), (&json!("aborted"), &json!("llm_call")));
    assert_eq!(aborted["unreported_tokens"].to_string(), tokens);
    assert_eq!(aborted["cost_nano_usd"].to_string(), cost);
    let usage = billed(&acme, 2).await;
    assert_eq!(usage["models"]["unreported"]["unreported_tokens"].to_string(), tokens);
    assert_eq!(job(&stack, "verify").await["differences"], json!([]));
    stack.stop().await;
}
