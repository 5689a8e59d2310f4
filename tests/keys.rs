//! Keys: made, bound to addresses, replaced, revoked, and never shown twice (I8, and what a cached
//! decision may hold).

#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use local::template::RouteAuth;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::clock::{Clock, Timestamp};
use tests::{Answer, Options, Stack, Tenant};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// How long something may take that only has to happen at all.
const PATIENCE: Duration = Duration::from_secs(60);

async fn stack() -> Stack {
    Stack::start_with(Options { no_seed: true, ..Options::default() }).await
}

/// A tenant whose limits are in nobody's way.
async fn tenant(stack: &Stack, id: &str) -> Tenant {
    let limits = json!({"requests_per_minute": 20_000, "max_concurrent": 200,
        "tokens_per_day": 1_000_000_000, "monthly_token_budget": 1_000_000_000});
    let body = json!({"tenant_id": id, "tier": "enterprise", "company_name": id, "limits": limits});
    stack.provision(body).await
}

/// The same tenant with a key that it makes.
async fn made(by: &Tenant, body: Value) -> Tenant {
    let answer = by.post("/v1/keys", &body).await.expect_status(StatusCode::CREATED).json();
    by.with_key(answer["api_key"].as_str().unwrap())
}

async fn keys(tenant: &Tenant) -> Vec<Value> {
    let answer = tenant.get("/v1/keys?limit=100").await.expect_status(StatusCode::OK).json();
    answer["keys"].as_array().unwrap().clone()
}

async fn listed(tenant: &Tenant, id: &str) -> Value {
    let found = keys(tenant).await.into_iter().find(|key| key["key_id"] == id);
    found.unwrap_or_else(|| panic!("no key {id}"))
}

fn revoke(id: &str) -> String {
    format!("/v1/keys/{id}")
}

async fn rotate(by: &Tenant, id: &str, body: Value) -> Answer {
    by.post(&format!("/v1/keys/{id}/rotate"), &body).await
}

fn in_seconds(seconds: i64) -> String {
    Clock::system().now().plus_millis(seconds * 1_000).to_string()
}

/// The key opens nothing any more.
#[track_caller]
fn invalid(answer: &Answer) {
    answer.expect_error(401, "invalid_key");
}

#[tokio::test]
async fn a_key_is_made_listed_and_does_what_it_may() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let end = in_seconds(86_400);
    let body = json!({"name": "site", "scopes": ["chat", "usage:read"], "expires_at": end,
        "allowed_cidrs": ["127.0.0.0/8", "::ffff:10.0.0.0/104"]});
    let answer = acme.post("/v1/keys", &body).await.expect_status(StatusCode::CREATED).json();
    assert_eq!(answer["scopes"], json!(["chat", "usage:read"]));
    assert_eq!(answer["allowed_cidrs"], json!(["127.0.0.0/8", "10.0.0.0/8"]));
    assert_eq!((&answer["name"], &answer["expires_at"]), (&json!("site"), &json!(end)));
    let site = acme.with_key(answer["api_key"].as_str().unwrap());
    assert_eq!(site.key_id(), answer["key_id"].as_str().unwrap());
    site.get("/v1/usage").await.expect_status(StatusCode::OK);
    site.get("/v1/documents").await.expect_error(403, "insufficient_scope");
    site.get("/v1/keys").await.expect_error(403, "insufficient_scope");

    let shown = listed(&acme, site.key_id()).await;
    let names: BTreeSet<&str> = shown.as_object().unwrap().keys().map(String::as_str).collect();
    let expected =
        ["key_id", "name", "scopes", "created_at", "expires_at", "last_used_at", "allowed_cidrs"].into();
    assert_eq!(names, expected, "{shown}");

    // Pages, by id.
    for _ in 0..4 {
        made(&acme, json!({"scopes": ["chat"]})).await;
    }
    let (mut ids, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = acme.get(&format!("/v1/keys?limit=2{cursor}")).await.expect_status(StatusCode::OK).json();
        let page_ids = page["keys"].as_array().unwrap().iter().map(|key| key["key_id"].as_str().unwrap());
        ids.extend(page_ids.map(str::to_owned));
        match page["cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert!(ids.is_sorted() && ids.len() == 6, "{ids:?}");
    stack.stop().await;
}

#[tokio::test]
async fn no_key_makes_one_that_may_do_more_than_itself() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let end = in_seconds(3_600);
    let clerk = made(
        &acme,
        json!({"scopes": ["keys:write", "chat"], "expires_at": end, "allowed_cidrs": ["127.0.0.0/8"]}),
    )
    .await;
    for (body, param) in [
        (json!({"scopes": ["audit:read"]}), "scopes"),
        (json!({"scopes": ["chat", "documents:write"]}), "scopes"),
        (json!({"expires_at": in_seconds(7_200)}), "expires_at"),
        (json!({"allowed_cidrs": ["0.0.0.0/0"]}), "allowed_cidrs"),
        (json!({"allowed_cidrs": ["127.0.0.1", "::1"]}), "allowed_cidrs"),
    ] {
        let error = clerk.post("/v1/keys", &body).await.expect_error(403, "insufficient_scope");
        assert_eq!(error["param"], param, "{body}");
    }
    // To replace a stronger key would be to get hold of it.
    let stronger = rotate(&clerk, acme.key_id(), json!({})).await;
    assert_eq!(stronger.expect_error(403, "insufficient_scope")["param"], "scopes");
    let own = clerk.post("/v1/keys", &json!({})).await.expect_status(StatusCode::CREATED).json();
    assert_eq!(own["scopes"], json!(["chat", "keys:write"]));
    assert_eq!((&own["expires_at"], &own["allowed_cidrs"]), (&json!(end), &json!(["127.0.0.0/8"])));
    stack.stop().await;
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name_and_changes_nothing() {
    let stack = stack().await;
    let (acme, globex) = (tenant(&stack, "acme").await, tenant(&stack, "globex").await);
    let bodies = [
        (json!({"scopes": ["admin"]}), "scopes[0]"),
        (json!({"scopes": ["chat", 7]}), "scopes[1]"),
        (json!({"scopes": []}), "scopes"),
        (json!({"scopes": "chat"}), "scopes"),
        (json!({"name": ""}), "name"),
        (json!({"name": "a\nb"}), "name"),
        (json!({"name": "x".repeat(101)}), "name"),
        (json!({"expires_at": "tomorrow"}), "expires_at"),
        (json!({"expires_at": 1_900_000_000}), "expires_at"),
        (json!({"expires_at": "2020-01-01T00:00:00Z"}), "expires_at"),
        (json!({"expires_at": "9999-12-31T23:59:59Z"}), "expires_at"),
        (json!({"expires_at": "2027-13-01T00:00:00Z"}), "expires_at"),
        (json!({"allowed_cidrs": []}), "allowed_cidrs"),
        (json!({"allowed_cidrs": ["10.0.0.0/33"]}), "allowed_cidrs[0]"),
        (json!({"allowed_cidrs": ["10.0.0.0/8", "10.0.0.1/8"]}), "allowed_cidrs[1]"),
        (json!({"allowed_cidrs": ["example.com"]}), "allowed_cidrs[0]"),
        (json!({"allowed_cidrs": vec!["10.0.0.0/8"; 17]}), "allowed_cidrs"),
        (json!({"allowed_cidrs": "10.0.0.0/8"}), "allowed_cidrs"),
        (json!({"secret": "mine"}), "secret"),
        (json!({"tenant_id": "globex"}), "tenant_id"),
        (json!([]), "body"),
        (Value::Null, "body"),
    ];
    for (body, param) in &bodies {
        let answers = [
            acme.post("/v1/keys", body).await,
            stack.admin(Method::POST, "/admin/tenants/acme/keys", Some(body)).await,
        ];
        for answer in answers {
            assert_eq!(answer.expect_error(400, "invalid_request")["param"], *param, "{body}");
        }
    }
    for grace in [json!(-1), json!(604_801), json!("1h"), json!(1.5), json!(u64::MAX)] {
        let answer = rotate(&acme, acme.key_id(), json!({"grace_seconds": grace})).await;
        assert_eq!(answer.expect_error(400, "invalid_request")["param"], "grace_seconds", "{grace}");
    }
    let answer = rotate(&acme, acme.key_id(), json!({"grace": 1})).await;
    assert_eq!(answer.expect_error(400, "invalid_request")["param"], "grace");
    acme.get("/v1/keys?cursor=KEY%23x").await.expect_error(400, "invalid_request");
    acme.get("/v1/keys?limit=0").await.expect_error(400, "invalid_request");

    // What is another's is as if it were not.
    let absent = "0".repeat(12);
    for id in [globex.key_id(), &absent, "CONFIG", "..%2FCONFIG", "%23"] {
        let told = [acme.delete(&revoke(id)).await, rotate(&acme, id, json!({})).await];
        for answer in told {
            let error = answer.expect_error(404, "not_found");
            assert_eq!(error["message"], "no such thing, or it is not yours", "{id}");
        }
    }
    for unknown in ["nobody", "acme1"] {
        let path = format!("/admin/tenants/{unknown}/keys");
        stack.admin(Method::POST, &path, Some(&json!({}))).await.expect_error(404, "not_found");
    }
    globex.get("/v1/keys").await.expect_status(StatusCode::OK);
    assert_eq!(keys(&acme).await.len(), 1);
    stack.stop().await;
}

#[tokio::test]
async fn a_repeat_makes_no_second_key_and_shows_no_secret() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let post = async |path: &str, name: &str, body: Value| {
        let request = acme.request(Method::POST, path).header("idempotency-key", name).json(&body);
        Answer::read(request.send().await.unwrap()).await
    };
    let first = post("/v1/keys", "one", json!({"scopes": ["chat"]})).await.expect_status(StatusCode::CREATED);
    let id = first.json()["key_id"].as_str().unwrap().to_owned();
    let again = post("/v1/keys", "one", json!({"scopes": ["chat"]})).await;
    let error = again.expect_error(409, "conflict");
    assert_eq!(error["param"], "Idempotency-Key");
    assert!(
        error["message"].as_str().unwrap().contains(&id) && !again.text.contains("ten_"),
        "{}",
        again.text
    );
    let other = post("/v1/keys", "one", json!({"scopes": ["usage:read"]})).await;
    assert_eq!(other.expect_error(400, "invalid_request")["param"], "Idempotency-Key");
    assert_eq!(keys(&acme).await.len(), 2);

    // The key that is replaced is part of what is asked.
    let path = |id: &str| format!("/v1/keys/{id}/rotate");
    post(&path(&id), "two", json!({})).await.expect_status(StatusCode::CREATED);
    post(&path(&id), "two", json!({})).await.expect_error(409, "conflict");
    post(&path(acme.key_id()), "two", json!({})).await.expect_status(StatusCode::CREATED);
    assert_eq!(keys(&acme).await.len(), 4);
    stack.stop().await;
}

#[tokio::test]
async fn an_operators_request_makes_one_key_however_often_it_is_sent() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let operator = stack.operator();
    let path = "/admin/tenants/acme/keys";
    let send = async |name: Option<&str>, body: Value| {
        let request = stack.signed_before(&operator, Duration::ZERO, Method::POST, path, &body);
        let request = name.into_iter().fold(request, |request, name| request.header("idempotency-key", name));
        Answer::read(request.send().await.unwrap()).await
    };
    let first = send(Some("one"), json!({})).await.expect_status(StatusCode::CREATED).json();
    let id = first["key_id"].as_str().unwrap();
    // Also once the key is gone: what was sent before must not open the tenant again.
    for gone in [false, true] {
        if gone {
            acme.delete(&revoke(id)).await.expect_status(StatusCode::NO_CONTENT);
        }
        let again = send(Some("one"), json!({})).await;
        let error = again.expect_error(409, "conflict");
        assert_eq!(error["param"], "Idempotency-Key");
        assert!(error["message"].as_str().unwrap().contains(id) && !again.text.contains("ten_"));
    }
    assert_eq!(keys(&acme).await.len(), 1);
    send(Some("two"), json!({})).await.expect_status(StatusCode::CREATED);
    send(None, json!({})).await.expect_status(StatusCode::CREATED);
    for bad in ["", "a b"] {
        let error = send(Some(bad), json!({})).await.expect_error(400, "invalid_request");
        assert_eq!(error["param"], "Idempotency-Key", "{bad:?}");
    }
    let mut racing = JoinSet::new();
    let stack = Arc::new(stack);
    for _ in 0..8 {
        let stack = Arc::clone(&stack);
        racing.spawn(async move {
            let request =
                stack.signed_before(&stack.operator(), Duration::ZERO, Method::POST, path, &json!({}));
            Answer::read(request.header("idempotency-key", "race").send().await.unwrap())
                .await
                .status
                .as_u16()
        });
    }
    let statuses = racing.join_all().await;
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 1, "{statuses:?}");
    assert_eq!(keys(&acme).await.len(), 4);
}

#[tokio::test]
async fn an_operator_lists_and_revokes_what_a_tenant_cannot() {
    let stack = stack().await;
    let (acme, globex) = (tenant(&stack, "acme").await, tenant(&stack, "globex").await);
    let leaked = made(&acme, json!({"name": "site"})).await;
    leaked.get("/v1/usage").await.expect_status(StatusCode::OK);
    let path = "/admin/tenants/acme/keys";
    let page = stack.admin(Method::GET, &format!("{path}?limit=1"), None).await;
    let page = page.expect_status(StatusCode::OK).json();
    let rest = format!("{path}?cursor={}", page["cursor"].as_str().unwrap());
    let rest = stack.admin(Method::GET, &rest, None).await.expect_status(StatusCode::OK).json();
    let shown = [&page, &rest].map(|page| page["keys"].as_array().unwrap().clone()).concat();
    assert_eq!(shown, keys(&acme).await);
    assert!(!json!(shown).to_string().contains("secret"), "{shown:?}");
    for query in ["limit=0", "limit=101", "limit=x", "cursor=KEY%23x"] {
        let answer = stack.admin(Method::GET, &format!("{path}?{query}"), None).await;
        answer.expect_error(400, "invalid_request");
    }

    let of = |tenant: &str, id: &str| format!("/admin/tenants/{tenant}/keys/{id}");
    for (tenant, id) in
        [("acme", globex.key_id()), ("acme", "000000000000"), ("acme", "CONFIG"), ("nobody", leaked.key_id())]
    {
        stack.admin(Method::DELETE, &of(tenant, id), None).await.expect_error(404, "not_found");
    }
    stack.admin(Method::GET, "/admin/tenants/nobody/keys", None).await.expect_error(404, "not_found");
    globex.get("/v1/usage").await.expect_status(StatusCode::OK);
    // A revocation that died halfway is finished by its repeat.
    stack
        .dynamodb_faults(
            json!({"rules": [{"mode": "kill_before", "operation": "UpdateItem", "table": "meters",
            "contains": "SET #s = :s, #e = :e", "times": 1, "function": "provisioning"}]}),
        )
        .await;
    let killed = stack.admin(Method::DELETE, &of("acme", leaked.key_id()), None).await;
    stack.clear_dynamodb_faults().await;
    assert!(killed.status.is_server_error(), "{}", killed.text);
    leaked.get("/v1/usage").await.expect_status(StatusCode::OK);
    stack.admin(Method::DELETE, &of("acme", leaked.key_id()), None).await.expect_error(404, "not_found");
    invalid(&leaked.get("/v1/usage").await);
    // And by the program, which says so.
    let other = made(&acme, json!({})).await;
    other.get("/v1/usage").await.expect_status(StatusCode::OK);
    let listed = stack.bulkhead(&["keys", "list", "acme"]).await;
    assert!(String::from_utf8(listed.stdout).unwrap().contains(other.key_id()));
    let revoked = stack.bulkhead(&["keys", "revoke", "acme", other.key_id()]).await;
    assert!(revoked.status.success(), "{revoked:?}");
    invalid(&other.get("/v1/usage").await);
    assert!(!stack.bulkhead(&["keys", "revoke", "acme", other.key_id()]).await.status.success());
    let events = stack.items("audit", "acme", "EVENT#").await;
    let by_operator =
        |action: &str| events.iter().filter(|e| e["action"] == action && e["operator"].is_string()).count();
    assert_eq!(by_operator("key_revoked"), 2);
    assert!(by_operator("keys_listed") >= 3);
    stack.stop().await;
}

#[tokio::test]
async fn a_replacement_that_died_halfway_is_finished_by_its_repeat() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    for name in [None, Some("once")] {
        let old = made(&acme, json!({})).await;
        old.get("/v1/usage").await.expect_status(StatusCode::OK);
        let replace = async || {
            let path = format!("/v1/keys/{}/rotate", old.key_id());
            let request = acme.request(Method::POST, &path).json(&json!({"grace_seconds": 0}));
            let request =
                name.into_iter().fold(request, |request, name| request.header("idempotency-key", name));
            Answer::read(request.send().await.unwrap()).await
        };
        stack
            .dynamodb_faults(json!({"rules": [{"mode": "kill_before", "operation": "UpdateItem",
                "table": "meters", "contains": "SET #s = :s, #e = :e", "times": 1, "function": "keys"}]}))
            .await;
        let killed = replace().await;
        stack.clear_dynamodb_faults().await;
        assert!(killed.status.is_server_error(), "{}", killed.text);
        assert!(listed(&acme, old.key_id()).await["replaced_by"].is_string());
        // Nothing was promised: its decision is cached, and the meter does not know better.
        old.get("/v1/usage").await.expect_status(StatusCode::OK);
        replace().await.expect_error(409, "conflict");
        invalid(&old.get("/v1/usage").await);
    }
    // A meter that fails for a moment is asked again.
    let old = made(&acme, json!({})).await;
    old.get("/v1/usage").await.expect_status(StatusCode::OK);
    stack
        .dynamodb_faults(json!({"rules": [{"mode": "throttle", "operation": "UpdateItem", "table": "meters",
            "contains": "SET #s = :s, #e = :e", "times": 5}]}))
        .await;
    let answer = rotate(&acme, old.key_id(), json!({"grace_seconds": 0})).await;
    stack.clear_dynamodb_faults().await;
    answer.expect_status(StatusCode::CREATED);
    invalid(&old.get("/v1/usage").await);
    stack.stop().await;
}

#[tokio::test]
async fn a_tenant_has_no_more_keys_than_it_may_however_many_are_made_at_once() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    made(&acme, json!({"scopes": ["chat"], "expires_at": in_seconds(3)})).await;
    for _ in 2..45 {
        made(&acme, json!({"scopes": ["chat"]})).await;
    }
    let mut running = JoinSet::new();
    for _ in 0..24 {
        let acme = acme.clone();
        running
            .spawn(async move { acme.post("/v1/keys", &json!({"scopes": ["chat"]})).await.status.as_u16() });
    }
    let statuses = running.join_all().await;
    let count = keys(&acme).await.len();
    let created = statuses.iter().filter(|status| **status == 201).count();
    assert!(statuses.iter().all(|status| [201, 409, 503].contains(status)), "{statuses:?}");
    assert!((46..=50).contains(&count), "{count} keys");
    // One of them may have taken the place of the one that has expired.
    assert!(created == count - 45 || created == count - 44, "{created} made, {count} there: {statuses:?}");
    sleep(Duration::from_secs(3)).await;
    let full = loop {
        let answer = acme.post("/v1/keys", &json!({"scopes": ["chat"]})).await;
        if answer.status != StatusCode::CREATED {
            break answer;
        }
    };
    assert!(full.expect_error(409, "conflict")["message"].as_str().unwrap().contains("50"), "{}", full.text);
    let now = Clock::system().now();
    let all = keys(&acme).await;
    assert_eq!(all.len(), 50);
    let live =
        |key: &&Value| key["expires_at"].as_str().is_none_or(|end| Timestamp::parse(end).unwrap() > now);
    assert_eq!(all.iter().filter(live).count(), 50, "what has expired gives way");
    rotate(&acme, acme.key_id(), json!({})).await.expect_error(409, "conflict");
    stack.stop().await;
}

#[tokio::test]
async fn a_key_opens_from_its_networks_alone() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let here = acme.at("127.0.0.2".parse().unwrap());
    let there = acme.at("127.0.0.3".parse().unwrap());
    for (networks, inside, outside) in [
        (json!(["127.0.0.2"]), &here, &there),
        (json!(["10.0.0.0/8", "127.0.0.2/31"]), &there, &acme),
        (json!(["::ffff:127.0.0.2"]), &here, &there),
        (json!(["2001:db8::/32", "::ffff:127.0.0.3/128"]), &there, &here),
    ] {
        let key = made(&acme, json!({"allowed_cidrs": networks})).await.key;
        let (inside, outside) = (inside.with_key(&key), outside.with_key(&key));
        // The decision is cached by whoever comes first; each is held against its own address.
        for _ in 0..2 {
            outside.get("/v1/usage").await.expect_error(403, "ip_not_allowed");
            inside.get("/v1/usage").await.expect_status(StatusCode::OK);
        }
        let forged = outside.request(Method::GET, "/v1/usage").header("x-forwarded-for", "127.0.0.2");
        let forged = forged.header("x-real-ip", "127.0.0.2").header("forwarded", "for=127.0.0.3");
        Answer::read(forged.send().await.unwrap()).await.expect_error(403, "ip_not_allowed");
        let ask = json!({"message": "Hello?", "stream": true});
        outside.chat(ask).await.expect_error(403, "ip_not_allowed");
        let denied = stack
            .items("audit", "acme", "EVENT#")
            .await
            .into_iter()
            .any(|record| record["action"] == "auth_denied" && record["error"] == "ip_not_allowed");
        assert!(denied, "no denial is on record");
    }
    let six = made(&acme, json!({"allowed_cidrs": ["::/0"]})).await;
    six.get("/v1/usage").await.expect_error(403, "ip_not_allowed");

    // Addresses that no test can have: what API Gateway would say of them, to the same binary.
    let key = made(&acme, json!({"allowed_cidrs": ["2001:db8::/32", "203.0.113.0/24"]})).await.key;
    let authorized = json!({
        "type": "REQUEST", "methodArn": "arn:aws:execute-api:us-east-1:000000000000:local/live/GET/v1/usage",
        "headers": {"authorization": format!("Bearer {key}")}, "requestContext": {"requestId": "r-1"},
    });
    let decision = stack.invoke("authorizer", authorized).await["context"].clone();
    for (address, status) in [
        ("2001:db8::7", 200),
        ("2001:db9::7", 403),
        ("203.0.113.7", 200),
        ("::ffff:203.0.113.7", 200),
        ("::ffff:203.0.114.7", 403),
        ("", 403),
    ] {
        let event = json!({
            "resource": "/v1/usage", "path": "/v1/usage", "httpMethod": "GET",
            "headers": {"authorization": format!("Bearer {key}"), "x-forwarded-for": "203.0.113.7"},
            "multiValueHeaders": {"authorization": [format!("Bearer {key}")], "x-forwarded-for": ["203.0.113.7"]},
            "queryStringParameters": null, "multiValueQueryStringParameters": null,
            "pathParameters": null, "stageVariables": null, "body": null, "isBase64Encoded": false,
            "requestContext": {"requestId": "r-2", "accountId": "000000000000", "apiId": "local",
                "stage": "live", "resourceId": "x", "resourcePath": "/v1/usage", "httpMethod": "GET",
                "path": "/v1/usage", "protocol": "HTTP/1.1", "identity": {"sourceIp": address},
                "authorizer": decision},
        });
        let answer = stack.invoke_for(Some("acme"), "bulkhead-usage", event).await;
        assert_eq!(answer.json()["statusCode"], status, "{address}");
    }
    stack.stop().await;
}

#[tokio::test]
async fn an_expired_key_opens_nothing_whatever_is_cached() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let short = made(&acme, json!({"expires_at": in_seconds(4)})).await;
    short.get("/v1/usage").await.expect_status(StatusCode::OK);
    sleep(Duration::from_secs(5)).await;
    invalid(&short.get("/v1/usage").await);
    invalid(&short.chat(json!({"message": "Hello?"})).await);
    let answer = rotate(&acme, short.key_id(), json!({})).await;
    assert_eq!(answer.expect_error(400, "invalid_request")["param"], "id");
    stack.stop().await;
}

#[tokio::test]
async fn a_replaced_key_is_valid_for_its_grace_and_not_longer() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let old =
        made(&acme, json!({"name": "site", "scopes": ["usage:read"], "allowed_cidrs": ["127.0.0.0/8"]}))
            .await;
    old.get("/v1/usage").await.expect_status(StatusCode::OK);
    let answer = rotate(&acme, old.key_id(), json!({"grace_seconds": 4})).await;
    let answered = Instant::now();
    let new = answer.expect_status(StatusCode::CREATED).json();
    assert_eq!((&new["scopes"], &new["name"]), (&json!(["usage:read"]), &json!("site")));
    assert_eq!(new["allowed_cidrs"], json!(["127.0.0.0/8"]));
    let new = acme.with_key(new["api_key"].as_str().unwrap());
    for key in [&old, &new] {
        key.get("/v1/usage").await.expect_status(StatusCode::OK);
    }
    let (was, is) = (listed(&acme, old.key_id()).await, listed(&acme, new.key_id()).await);
    assert_eq!((&was["replaced_by"], &is["replaces"]), (&json!(new.key_id()), &json!(old.key_id())));
    assert!(was["expires_at"].is_string() && is.get("expires_at").is_none(), "{was} {is}");
    rotate(&acme, old.key_id(), json!({})).await.expect_error(409, "conflict");
    // The decision from before the replacement knew of no end.
    tokio::time::sleep_until(answered + Duration::from_secs(4)).await;
    invalid(&old.get("/v1/usage").await);
    new.get("/v1/usage").await.expect_status(StatusCode::OK);

    // No grace: at once, though its decision is cached. And a day, if nothing is said.
    let answer = rotate(&acme, new.key_id(), json!({"grace_seconds": 0})).await;
    let newest = acme.with_key(answer.expect_status(StatusCode::CREATED).json()["api_key"].as_str().unwrap());
    invalid(&new.get("/v1/usage").await);
    let before = Clock::system().now();
    let bare =
        acme.request(Method::POST, &format!("/v1/keys/{}/rotate", newest.key_id())).send().await.unwrap();
    Answer::read(bare).await.expect_status(StatusCode::CREATED);
    let ends = listed(&acme, newest.key_id()).await["expires_at"].as_str().unwrap().to_owned();
    let day = Timestamp::parse(&ends).unwrap().millis_since(before);
    assert!((86_400_000..86_460_000).contains(&day), "{day}");
    // A key that replaces itself goes on for its grace, and its end is never put off.
    let brief = made(&acme, json!({"expires_at": in_seconds(3_600)})).await;
    rotate(&brief, brief.key_id(), json!({})).await.expect_status(StatusCode::CREATED);
    let ends = listed(&acme, brief.key_id()).await["expires_at"].as_str().unwrap().to_owned();
    assert!(Timestamp::parse(&ends).unwrap() <= before.plus_millis(3_660_000), "{ends}");
    stack.stop().await;
}

/// The tenant routes of the contract, each with a request that would be let in.
fn tenant_routes() -> Vec<(Method, String, Value)> {
    let template = tests::template();
    let routes = template.api.routes.iter().filter(|route| route.auth != RouteAuth::Iam);
    let request = |method: String, path: String| {
        let body = match (method.as_str(), path.as_str()) {
            ("POST", "/v1/documents") => json!({"title": "t", "content": "c"}),
            ("POST", "/v1/uploads") => json!({"title": "t", "content_type": "text/plain", "size_bytes": 1}),
            ("POST", "/v1/search") => json!({"query": "q"}),
            ("POST", "/v1/chat") => json!({"message": "m", "stream": true}),
            ("POST", "/v1/chat/completions") => json!({"model": "claude-haiku-4-5-20251001",
                "messages": [{"role": "user", "content": "m"}]}),
            ("POST", "/v1/feedback") => json!({"id": format!("msg_{}", "0".repeat(22)), "rating": "up"}),
            ("POST", "/v1/issuers") => json!({"issuer": "https://login.acme.example", "audience": "bulkhead",
                "jwks_url": "https://login.acme.example/keys"}),
            ("POST", _) => json!({}),
            _ => Value::Null,
        };
        let id = match path.split('/').nth(2) {
            Some("keys") => "000000000000".to_owned(),
            Some("issuers") => "iss_000000000000".to_owned(),
            Some("conversations") => format!("conv_{}", "0".repeat(22)),
            _ => "x".to_owned(),
        };
        (method.parse().unwrap(), path.replace("{id}", &id), body)
    };
    routes.map(|route| request(route.method.to_string(), route.path.to_string())).collect()
}

async fn send(tenant: &Tenant, (method, path, body): &(Method, String, Value)) -> Answer {
    let mut request = tenant.request(method.clone(), path);
    if !body.is_null() {
        request = request.json(body);
    }
    Answer::read(request.send().await.unwrap()).await
}

#[tokio::test]
async fn a_revoked_key_opens_no_route_though_its_decision_is_cached() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let routes = tenant_routes();
    assert!(routes.len() >= 14, "{routes:?}");
    let key = made(&acme, json!({})).await;
    key.get("/v1/usage").await.expect_status(StatusCode::OK);
    let headers = key.request(Method::POST, "/v1/chat").header("idempotency-key", "k");
    let first = headers.try_clone().unwrap().json(&json!({"message": "Hello?"})).send().await.unwrap();
    Answer::read(first).await.expect_status(StatusCode::OK);
    acme.delete(&revoke(key.key_id())).await.expect_status(StatusCode::NO_CONTENT);
    for route in &routes {
        let answer = send(&key, route).await;
        // An identifier that cannot be is none before anything else is asked.
        if !(route.1.contains("/exports/x") && answer.status == StatusCode::NOT_FOUND) {
            invalid(&answer);
        }
    }
    let repeat = headers.json(&json!({"message": "Hello?"})).send().await.unwrap();
    invalid(&Answer::read(repeat).await);
    acme.delete(&revoke(key.key_id())).await.expect_error(404, "not_found");
    // A key may revoke itself, and the others go on.
    let own = made(&acme, json!({})).await;
    own.delete(&revoke(own.key_id())).await.expect_status(StatusCode::NO_CONTENT);
    invalid(&own.get("/v1/usage").await);
    acme.get("/v1/usage").await.expect_status(StatusCode::OK);
    stack.stop().await;
}

/// What the issue asks for: nothing is admitted once the revocation has answered, at 50 requests a
/// second from many processes, streams and reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_admitted_after_a_revocation_has_answered() {
    const ROUNDS: usize = 4;
    const EVERY: Duration = Duration::from_millis(20);
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    acme.store("handbook", "Handbook", "Every employee has 25 days of paid annual leave.").await;
    let requests: Vec<(Method, String, Value)> = [
        (Method::GET, "/v1/documents", Value::Null),
        (Method::GET, "/v1/usage", Value::Null),
        (Method::POST, "/v1/chat", json!({"message": "How many days?", "stream": true})),
        (Method::GET, "/v1/keys", Value::Null),
        (Method::POST, "/v1/search", json!({"query": "days of leave"})),
        (Method::GET, "/v1/documents/handbook", Value::Null),
    ]
    .map(|(method, path, body)| (method, path.to_owned(), body))
    .into();
    let requests = Arc::new(requests);
    let (mut before, mut after) = (0, 0);
    for round in 0..ROUNDS {
        let key = made(&acme, json!({})).await;
        for request in requests.iter() {
            send(&key, request).await.expect_status(StatusCode::OK);
        }
        let done = Arc::new(AtomicBool::new(false));
        let load = tokio::spawn({
            let (key, requests, done) = (key.clone(), Arc::clone(&requests), Arc::clone(&done));
            async move {
                let mut tick = tokio::time::interval(EVERY);
                let mut running = JoinSet::new();
                for n in 0.. {
                    tick.tick().await;
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let (key, requests) = (key.clone(), Arc::clone(&requests));
                    running.spawn(async move {
                        let sent = Instant::now();
                        let answer = send(&key, &requests[n % requests.len()]).await;
                        (sent, answer.status, answer.text)
                    });
                }
                running.join_all().await
            }
        });
        sleep(Duration::from_millis(1_500)).await;
        acme.delete(&revoke(key.key_id())).await.expect_status(StatusCode::NO_CONTENT);
        let answered = Instant::now();
        let answered_at = Clock::system().now();
        // The last time for longer than what follows allows for.
        let after_ms = if round + 1 == ROUNDS { 8_000 } else { 2_000 };
        sleep(Duration::from_millis(after_ms)).await;
        done.store(true, Ordering::Relaxed);
        for (sent, status, text) in load.await.unwrap() {
            if sent < answered {
                before += usize::from(status == StatusCode::OK);
                continue;
            }
            after += 1;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "round {round}: {text}");
        }
        // The ledger agrees: nothing that the key was admitted for lies after the answer, by more than what a
        // request that was under way takes to end.
        let id = key.key_id();
        let (mut tickets, mut events) = (0, 0);
        for (kind, count) in [("TICKET#", &mut tickets), ("EVENT#", &mut events)] {
            for record in stack.items("audit", "acme", kind).await {
                let late = record["time"].as_i64().unwrap() > answered_at.as_millis() + 5_000;
                let admitted = record["key_id"] == id && record["outcome"] == "ok";
                *count += usize::from(admitted);
                assert!(!(late && admitted), "{record}");
            }
        }
        assert!(tickets > 0 && events > 0, "{tickets} tickets and {events} events");
    }
    eprintln!("{before} requests admitted before the revocations answered, 0 of {after} after");
    assert!(before > 50 * ROUNDS && after > 50 * ROUNDS, "{before} before, {after} after");
    stack.stop().await;
}

#[tokio::test]
async fn a_revocation_that_died_halfway_is_finished_by_its_repeat() {
    let stack = stack().await;
    let acme = tenant(&stack, "acme").await;
    let standing = "SET #s = :s, #e = :e";
    for (mode, operation, table, contains, gone, stale) in [
        ("kill_before", "TransactWriteItems", "tenants", "KEY#", false, false),
        ("kill_after", "TransactWriteItems", "tenants", "KEY#", true, false),
        ("kill_before", "UpdateItem", "meters", standing, true, false),
        ("kill_after", "UpdateItem", "meters", standing, true, true),
    ] {
        let key = made(&acme, json!({})).await;
        key.get("/v1/usage").await.expect_status(StatusCode::OK);
        stack
            .dynamodb_faults(json!({"rules": [{"mode": mode, "operation": operation, "table": table,
                "contains": contains, "times": 1, "function": "keys"}]}))
            .await;
        let killed = acme.delete(&revoke(key.key_id())).await;
        stack.clear_dynamodb_faults().await;
        assert!(killed.status.is_server_error(), "{mode} {operation}: {} {}", killed.status, killed.text);
        let there = stack.items("tenants", "acme", &format!("KEY#{}", key.key_id())).await;
        assert_eq!(there.is_empty(), gone, "{mode} {operation}");
        // Nothing was promised, and what is cached still admits unless the meter knows already.
        let meanwhile = key.get("/v1/usage").await;
        assert_eq!(
            meanwhile.status == StatusCode::UNAUTHORIZED,
            stale,
            "{mode} {operation}: {}",
            meanwhile.text
        );
        let repeat = acme.delete(&revoke(key.key_id())).await;
        let expected = if gone { StatusCode::NOT_FOUND } else { StatusCode::NO_CONTENT };
        assert_eq!(repeat.status, expected, "{mode} {operation}: {}", repeat.text);
        invalid(&key.get("/v1/usage").await);
        // It is on record once, as what took the key away.
        let revoked =
            stack.items("audit", "acme", "EVENT#").await.into_iter().filter(|record| {
                record["action"] == "key_revoked" && record["keys"] == json!([key.key_id()])
            });
        assert_eq!(revoked.count(), 1, "{mode} {operation}");
    }
    // Tables that fail, conflict or lose their answers.
    for mode in ["throttle", "cancel_conflict", "lost_answer_error"] {
        let key = made(&acme, json!({})).await;
        key.get("/v1/usage").await.expect_status(StatusCode::OK);
        stack
            .dynamodb_faults(json!({"rules": [{"mode": mode, "operation": "TransactWriteItems",
                "table": "tenants", "times": 2}]}))
            .await;
        let answer = acme.delete(&revoke(key.key_id())).await;
        stack.clear_dynamodb_faults().await;
        assert_eq!(answer.status, StatusCode::NO_CONTENT, "{mode}: {}", answer.text);
        invalid(&key.get("/v1/usage").await);
        stack
            .dynamodb_faults(json!({"rules": [{"mode": mode, "operation": "TransactWriteItems",
                "table": "tenants", "times": 2}]}))
            .await;
        let count = keys(&acme).await.len();
        let key = made(&acme, json!({})).await;
        stack.clear_dynamodb_faults().await;
        key.get("/v1/usage").await.expect_status(StatusCode::OK);
        assert_eq!(keys(&acme).await.len(), count + 1, "{mode}");
    }
    stack.stop().await;
}

#[tokio::test]
async fn the_last_use_is_noted_once_a_minute_and_fails_nothing() {
    let options = Options {
        no_seed: true,
        parameters: vec![("AuthorizerCacheSeconds", "0".to_owned())],
        ..Options::default()
    };
    let stack = Stack::start_with(options).await;
    let acme = tenant(&stack, "acme").await;
    acme.get("/v1/usage").await.expect_status(StatusCode::OK);
    let key = made(&acme, json!({"scopes": ["usage:read"]})).await;
    assert!(listed(&acme, key.key_id()).await.get("last_used_at").is_none());
    stack.forget_dynamodb_calls().await;
    let before = Clock::system().now();
    for _ in 0..5 {
        key.get("/v1/usage").await.expect_status(StatusCode::OK);
    }
    let notes = stack.dynamodb_calls().await.into_iter().filter(|call| {
        call["operation"] == "UpdateItem" && call["tables"].to_string().contains("bulkhead-tenants")
    });
    assert_eq!(notes.count(), 1);
    let used = listed(&acme, key.key_id()).await["last_used_at"].as_str().unwrap().to_owned();
    let used = Timestamp::parse(&used).unwrap();
    assert!(used >= before.plus_millis(-1) && used <= Clock::system().now(), "{used}");
    // A key that has not been noted yet, and a table that takes no notes.
    for mode in ["throttle", "error", "hang"] {
        let key = made(&acme, json!({"scopes": ["usage:read"]})).await;
        stack
            .dynamodb_faults(
                json!({"rules": [{"mode": mode, "operation": "UpdateItem", "table": "tenants"}]}),
            )
            .await;
        let began = Instant::now();
        key.get("/v1/usage").await.expect_status(StatusCode::OK);
        assert!(began.elapsed() < PATIENCE);
        stack.clear_dynamodb_faults().await;
    }
    // A key that is revoked while its use is being noted does not come back.
    let key = made(&acme, json!({})).await;
    stack
        .dynamodb_faults(json!({"rules": [{"mode": "delay", "delay_ms": 1_500, "operation": "UpdateItem",
            "table": "tenants", "times": 1}]}))
        .await;
    let using = tokio::spawn({
        let key = key.clone();
        async move { key.get("/v1/usage").await }
    });
    sleep(Duration::from_millis(500)).await;
    acme.delete(&revoke(key.key_id())).await.expect_status(StatusCode::NO_CONTENT);
    using.await.unwrap();
    sleep(Duration::from_millis(2_000)).await;
    stack.clear_dynamodb_faults().await;
    invalid(&key.get("/v1/usage").await);
    assert!(stack.items("tenants", "acme", &format!("KEY#{}", key.key_id())).await.is_empty());
    stack.stop().await;
}

/// Every file below a folder that holds one of these texts.
fn files_that_hold(folder: &Path, texts: &[String], found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            files_that_hold(&entry.path(), texts, found);
            continue;
        }
        let bytes = std::fs::read(entry.path()).unwrap_or_default();
        let holds = |text: &String| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        if texts.iter().any(holds) {
            found.push(entry.path().display().to_string());
        }
    }
}

#[tokio::test]
async fn a_secret_is_shown_once_and_is_nowhere_else() {
    let stack = Stack::start_with(Options { no_seed: true, ..Options::default() }).await;
    let acme = tenant(&stack, "acme").await;
    let with_key = |key: &Value| acme.with_key(key["api_key"].as_str().unwrap());
    let request = acme.request(Method::POST, "/v1/keys").header("idempotency-key", "k").json(&json!({}));
    let first = Answer::read(request.try_clone().unwrap().send().await.unwrap()).await;
    let one = with_key(&first.expect_status(StatusCode::CREATED).json());
    Answer::read(request.send().await.unwrap()).await.expect_error(409, "conflict");
    let answer = rotate(&acme, one.key_id(), json!({"grace_seconds": 3_600})).await;
    let two = with_key(&answer.expect_status(StatusCode::CREATED).json());
    let operator = stack.admin(Method::POST, "/admin/tenants/acme/keys", Some(&json!({}))).await;
    let three = with_key(&operator.expect_status(StatusCode::CREATED).json());
    for key in [&one, &two, &three] {
        key.store("handbook", "Handbook", "Every employee has 25 days of leave.").await;
        key.ask("How many days?").await;
        key.get("/v1/documents/none").await.expect_error(404, "not_found");
        key.get("/v1/keys").await.expect_status(StatusCode::OK);
        key.post("/v1/keys", &json!({"name": ""})).await.expect_error(400, "invalid_request");
    }
    three.delete(&revoke(three.key_id())).await.expect_status(StatusCode::NO_CONTENT);
    invalid(&three.get("/v1/usage").await);
    stack
        .dynamodb_faults(json!({"rules": [{"mode": "error", "operation": "TransactWriteItems",
        "table": "tenants", "times": 9}]}))
        .await;
    acme.post("/v1/keys", &json!({})).await.expect_error(503, "unavailable");
    stack.clear_dynamodb_faults().await;

    // What was done is on record, by whom and to which key.
    let began = Instant::now();
    let records = loop {
        let records = stack.items("audit", "acme", "EVENT#").await;
        if records.iter().all(|record| record.get("pending").is_none()) {
            break records;
        }
        assert!(began.elapsed() < PATIENCE, "records wait too long");
        sleep(Duration::from_millis(100)).await;
    };
    let of = |action: &str| -> Vec<&Value> { records.iter().filter(|r| r["action"] == action).collect() };
    let created = of("key_created");
    assert_eq!(created.len(), 2);
    assert!(created.iter().any(|r| r["keys"] == json!([one.key_id()]) && r["key_id"] == acme.key_id()));
    let by_operator = |r: &&&Value| r["keys"] == json!([three.key_id()]) && r["operator"].is_string();
    assert_eq!(created.iter().filter(by_operator).count(), 1);
    assert_eq!(of("key_rotated").len(), 1);
    assert_eq!(of("key_rotated")[0]["keys"], json!([one.key_id(), two.key_id()]));
    assert_eq!(of("key_revoked").len(), 1);
    assert_eq!(of("key_revoked")[0]["keys"], json!([three.key_id()]));
    assert!(!of("keys_listed").is_empty());
    let shown = acme.get("/v1/audit?action=key_rotated").await.expect_status(StatusCode::OK).json();
    assert_eq!(shown["records"][0]["keys"], json!([one.key_id(), two.key_id()]));

    let secrets: Vec<String> =
        [&acme, &one, &two, &three].map(|t| t.key.rsplit('_').next().unwrap().to_owned()).into();
    // What is found where it must be proves that the search finds.
    assert!(secrets.iter().all(|secret| secret.len() == 49));
    let hold = |what: &str, text: &str| {
        for secret in &secrets {
            // The secret without its checksum, and its second half alone.
            for part in [secret.get(..43), secret.get(20..43)] {
                assert!(!text.contains(part.unwrap()), "{what} holds a secret");
            }
        }
    };
    hold("a log", &stack.logs());
    assert!(stack.logs().contains(one.key_id()));
    for table in ["tenants", "meters", "audit", "conversations", "documents", "usage", "accounts"] {
        let all = stack.dynamodb("Scan", table, json!({})).await;
        assert!(all.get("LastEvaluatedKey").is_none());
        hold(table, &all.to_string());
    }
    let s3 = stack.s3();
    let objects = s3.list_objects_v2().bucket(stack.audit_bucket()).send().await.unwrap();
    let mut lines = 0;
    for object in objects.contents() {
        let key = object.key().unwrap();
        let body = s3.get_object().bucket(stack.audit_bucket()).key(key).send().await.unwrap();
        let bytes = body.body.collect().await.unwrap().into_bytes();
        if key.ends_with(".gz") {
            for line in shared::audit_log::read(&bytes).unwrap().0 {
                lines += 1;
                hold(key, &serde_json::to_string(&line).unwrap());
            }
        } else {
            hold(key, &String::from_utf8_lossy(&bytes));
        }
    }
    assert!(lines > 10, "the audit log holds {lines} lines");
    let mut found = Vec::new();
    let parts: Vec<String> = secrets.iter().map(|secret| secret.get(..43).unwrap().to_owned()).collect();
    files_that_hold(&stack.data(), &parts, &mut found);
    assert_eq!(found, Vec::<String>::new());
    files_that_hold(&stack.data(), &[one.key_id().to_owned()], &mut found);
    assert!(!found.is_empty(), "the search finds nothing");
    stack.stop().await;
}
