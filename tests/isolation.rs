//! What keeps tenants and functions apart is the credential, not the code that holds it (I1).

#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use local::sigv4::Credentials;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tests::{Answer, Key, Options, Stack, Tenant};

const DENIED: &str = "AccessDeniedException";

/// The environment of a function's process: what code that runs in it can get hold of.
fn environment(stack: &Stack, function: &str) -> BTreeMap<String, String> {
    let found = stack.processes(function).into_values().next();
    found.unwrap_or_else(|| panic!("no process of {function}"))
}

fn pids(stack: &Stack, function: &str) -> BTreeSet<u32> {
    stack.processes(function).into_keys().collect()
}

fn signal(signal: &str, pid: u32) {
    let sent = std::process::Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Makes a request of the tenant's, with another's name in a header that Lambda itself knows.
async fn asks(tenant: &Tenant) {
    let answer = tenant.request(Method::GET, "/v1/usage").header("x-amz-tenant-id", "globex").send().await;
    assert_eq!(Answer::read(answer.unwrap()).await.status, StatusCode::OK, "{}", tenant.id);
}

/// The process that comes into being for a tenant's request.
async fn new_process(stack: &Stack, tenant: &Tenant) -> u32 {
    let before = pids(stack, "usage");
    asks(tenant).await;
    let after = pids(stack, "usage");
    let new: Vec<u32> = after.difference(&before).copied().collect();
    assert_eq!(new.len(), 1, "{before:?} {after:?}");
    new[0]
}

/// What a call is about, by the tenant that it names.
type Input<'a> = &'a dyn Fn(&str) -> Value;

/// A call made with somebody's key: the error, if there is one.
async fn call(stack: &Stack, key: &Key, operation: &str, input: &Value) -> Option<String> {
    let (service, target) = match operation {
        "GetSecretValue" => ("secretsmanager", format!("secretsmanager.{operation}")),
        _ => ("dynamodb", format!("DynamoDB_20120810.{operation}")),
    };
    let answer = stack.signed_by(key, service, &target, input).await;
    let refused = !answer.status.is_success();
    refused.then(|| answer.json()["__type"].as_str().unwrap().rsplit('#').next().unwrap().to_owned())
}

/// Lets every function run once.
async fn everything_runs(stack: &Stack) {
    let acme = stack.tenant("acme");
    acme.store("handbook", "Handbook", "Every employee has 25 days of paid annual leave.").await;
    acme.ask("How many days of leave?").await;
    acme.upload("notes", "text/plain", b"The notes say nothing.".to_vec()).await;
    acme.get("/v1/usage").await;
    acme.get("/v1/audit").await;
    acme.get("/v1/keys").await;
    stack.admin(Method::GET, "/admin/usage", None).await.expect_status(StatusCode::OK);
    stack.invoke("reconciler", json!({"job": "collect"})).await;
}

fn table_of(table: &str) -> Value {
    json!({"TableName": Stack::table(table)})
}

/// A call's input: a table and what else it takes.
fn on(table: &str, rest: Value) -> Value {
    let mut input = table_of(table);
    input.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    input
}

fn key_of(table: &str, tenant: &str) -> Value {
    match table {
        "meters" => json!({"tenant_id": {"S": tenant}}),
        _ => json!({"tenant_id": {"S": tenant}, "sk": {"S": "x"}}),
    }
}

fn get(table: &str, tenant: &str) -> Value {
    on(table, json!({"Key": key_of(table, tenant)}))
}

fn put(table: &str, tenant: &str) -> Value {
    on(table, json!({"Item": key_of(table, tenant)}))
}

fn query(table: &str, tenant: &str) -> Value {
    let values = json!({":t": {"S": tenant}});
    on(table, json!({"KeyConditionExpression": "tenant_id = :t", "ExpressionAttributeValues": values}))
}

/// An update of one attribute of an item of table `tenants`.
fn set(attribute: &str, tenant: &str) -> Value {
    on(
        "tenants",
        json!({"Key": key_of("tenants", tenant), "UpdateExpression": "SET #a = :v",
        "ExpressionAttributeNames": {"#a": attribute}, "ExpressionAttributeValues": {":v": {"N": "1"}}}),
    )
}

fn put_with(attribute: &str, tenant: &str) -> Value {
    let mut put = put("tenants", tenant);
    put["Item"][attribute] = json!({"S": "x"});
    put
}

fn secret(name: &str) -> Value {
    json!({"SecretId": format!("bulkhead/{name}")})
}

#[tokio::test]
async fn a_functions_key_opens_what_its_role_allows_and_nothing_else() {
    let stack = Stack::start().await;
    everything_runs(&stack).await;
    let in_transaction = |part: &str, table: &str| {
        let fields = if part == "Put" { put(table, "globex") } else { get(table, "globex") };
        json!({"TransactItems": [{part: fields}]})
    };
    let accounts = json!({"RequestItems": {Stack::table("accounts"): {"Keys": [{"shard": {"S": "x"}}]}}});
    // What each function may do, to show that the call itself is right; and what it may not. Those that act
    // for tenants touch nothing of any without a session.
    let cases = [
        ("chat", "BatchGetItem", accounts, true),
        ("chat", "GetSecretValue", secret("model/api-key"), true),
        ("chat", "GetSecretValue", secret("qdrant/root-key"), false),
        ("chat", "GetSecretValue", secret("model/tenants/acme"), false),
        ("chat", "GetItem", get("meters", "globex"), false),
        ("chat", "Query", query("conversations", "globex"), false),
        ("chat", "DeleteItem", get("meters", "globex"), false),
        ("chat", "Scan", table_of("tenants"), false),
        ("chat", "Scan", table_of("conversations"), false),
        ("chat", "PutItem", put("tenants", "globex"), false),
        ("chat", "Query", query("audit", "globex"), false),
        ("chat", "DeleteItem", get("audit", "globex"), false),
        ("chat", "TransactWriteItems", in_transaction("Delete", "audit"), false),
        ("chat", "TransactWriteItems", in_transaction("Put", "usage"), false),
        ("chat", "GetItem", get("documents", "globex"), false),
        ("chat", "ListTables", json!({}), false),
        ("ingestion", "GetSecretValue", secret("embeddings/api-key"), true),
        ("ingestion", "Query", query("documents", "globex"), false),
        ("ingestion", "GetSecretValue", secret("qdrant/root-key"), false),
        ("ingestion", "GetSecretValue", secret("model/api-key"), false),
        ("ingestion", "Query", query("conversations", "globex"), false),
        ("upload-ingestion", "GetSecretValue", secret("embeddings/api-key"), true),
        ("upload-ingestion", "GetSecretValue", secret("qdrant/root-key"), false),
        ("upload-ingestion", "GetItem", get("documents", "globex"), false),
        ("upload-ingestion", "GetItem", get("tenants", "globex"), false),
        ("upload-ingestion", "UpdateItem", get("meters", "globex"), false),
        ("upload-authorizer", "GetItem", get("documents", "globex"), true),
        ("upload-authorizer", "GetItem", get("tenants", "globex"), true),
        ("upload-authorizer", "GetSecretValue", secret("qdrant/root-key"), true),
        ("upload-authorizer", "GetSecretValue", secret("embeddings/api-key"), false),
        ("upload-authorizer", "PutItem", put("documents", "globex"), false),
        ("upload-authorizer", "Query", query("documents", "globex"), false),
        ("audit-log", "GetItem", get("meters", "globex"), false),
        ("audit-log", "GetItem", get("usage", "globex"), false),
        ("authorizer", "GetItem", get("tenants", "globex"), true),
        ("authorizer", "GetSecretValue", secret("qdrant/root-key"), true),
        ("authorizer", "PutItem", put("tenants", "globex"), false),
        ("authorizer", "Query", query("conversations", "globex"), false),
        ("authorizer", "UpdateItem", set("last_used_at", "globex"), true),
        ("authorizer", "UpdateItem", set("expires_at", "globex"), false),
        ("authorizer", "UpdateItem", set("limits", "globex"), false),
        ("keys", "GetItem", get("tenants", "globex"), false),
        ("keys", "UpdateItem", set("epoch", "globex"), false),
        ("usage", "Scan", table_of("tenants"), false),
        ("admin-usage", "Scan", table_of("tenants"), true),
        ("admin-usage", "Query", query("usage", "globex"), true),
        ("admin-usage", "UpdateItem", get("meters", "globex"), false),
        ("usage", "UpdateItem", get("usage", "globex"), false),
        ("usage", "Query", query("documents", "globex"), false),
        ("usage", "UpdateItem", get("meters", "globex"), false),
        ("reconciler", "Scan", table_of("meters"), true),
        ("reconciler", "Query", query("conversations", "globex"), false),
        ("reconciler", "DeleteItem", get("audit", "globex"), false),
    ];
    for (function, operation, input, may) in cases {
        let refused = call(&stack, &stack.own_key(function), operation, &input).await;
        let expected = (!may).then(|| DENIED.to_owned());
        assert_eq!(refused, expected, "{function}: {operation} {input}");
    }
    let bucket = stack.audit_bucket();
    let listed = stack.s3_as(&stack.own_key("audit-log")).list_object_versions().bucket(bucket).send().await;
    assert!(format!("{:?}", listed.unwrap_err()).contains("AccessDenied"));
}

#[tokio::test]
async fn a_session_opens_its_own_tenant_and_no_other() {
    let stack = Stack::start().await;
    everything_runs(&stack).await;
    let others =
        ["globex", "acme1", "acm", "ACME", "acme#", "*", "a?me", "${aws:PrincipalTag/tenant_id}", ""];
    let session = async |function: &str, role: &str| {
        stack.assume(&stack.own_key(function), role, &[("tenant_id", "acme")]).await.unwrap()
    };
    let transaction = |parts: &[(&str, Value)]| {
        let parts: Vec<Value> = parts.iter().map(|(part, fields)| json!({*part: fields})).collect();
        json!({"TransactItems": parts})
    };
    let (chat, ingestion) =
        (session("chat", "ChatTenantRole").await, session("ingestion", "IngestionTenantRole").await);
    let (usage, log) =
        (session("usage", "UsageTenantRole").await, session("audit-log", "AuditLogTenantRole").await);
    let keys = session("keys", "KeysTenantRole").await;
    let upload = session("upload-ingestion", "UploadIngestionTenantRole").await;
    let deletion = |ids: &[&str]| {
        let deletes = ids.iter().map(|id| json!({"DeleteRequest": {"Key": key_of("conversations", id)}}));
        json!({"RequestItems": {Stack::table("conversations"): deletes.collect::<Vec<_>>()}})
    };
    let cases: [(&Key, &str, Input<'_>); 22] = [
        (&upload, "GetItem", &|id| get("documents", id)),
        (&upload, "PutItem", &|id| put("documents", id)),
        (&upload, "UpdateItem", &|id| get("meters", id)),
        (&upload, "PutItem", &|id| put("audit", id)),
        (&keys, "GetItem", &|id| get("tenants", id)),
        (&keys, "PutItem", &|id| put_with("secret_hash", id)),
        (&keys, "UpdateItem", &|id| set("epoch", id)),
        (&chat, "GetItem", &|id| get("meters", id)),
        (&chat, "UpdateItem", &|id| get("meters", id)),
        (&chat, "GetItem", &|id| get("tenants", id)),
        (&chat, "PutItem", &|id| put("audit", id)),
        (&chat, "Query", &|id| query("conversations", id)),
        (&chat, "DeleteItem", &|id| get("conversations", id)),
        (&chat, "GetItem", &|id| get("conversations", id)),
        (&chat, "BatchWriteItem", &|id| deletion(&[id])),
        (&chat, "TransactWriteItems", &|id| transaction(&[("Put", put("audit", id))])),
        // The second of two parts is looked at as the first is.
        (&chat, "TransactWriteItems", &|id| {
            transaction(&[("Put", put("conversations", "acme")), ("Delete", get("conversations", id))])
        }),
        (&ingestion, "GetItem", &|id| get("documents", id)),
        (&ingestion, "Query", &|id| query("documents", id)),
        (&usage, "Query", &|id| query("usage", id)),
        (&log, "GetItem", &|id| get("usage", id)),
        (&log, "Query", &|id| {
            on(
                "audit",
                json!({"IndexName": "pending", "KeyConditionExpression": "tenant_id = :t",
            "ExpressionAttributeValues": {":t": {"S": id}}}),
            )
        }),
    ];
    for (key, operation, input) in cases {
        let own = call(&stack, key, operation, &input("acme")).await;
        // DynamoDB itself may find fault with a part that repeats an item; the policy does not.
        assert_ne!(own.as_deref(), Some(DENIED), "{operation} {}", input("acme"));
        for other in others {
            let refused = call(&stack, key, operation, &input(other)).await;
            assert_eq!(refused.as_deref(), Some(DENIED), "{operation} {}", input(other));
        }
    }
    // Whatever names no key, or hides it, or names others besides; and what the role has not.
    let hidden = json!({"KeyConditionExpression": "#n = :t", "ExpressionAttributeNames": {"#n": "tenant_id"},
        "ExpressionAttributeValues": {":t": {"S": "globex"}}});
    let batch = |table: &str, ids: &[&str]| {
        let keys: Vec<Value> = ids.iter().map(|id| key_of(table, id)).collect();
        json!({"RequestItems": {Stack::table(table): {"Keys": keys}}})
    };
    for (key, operation, input) in [
        (&chat, "Query", on("conversations", hidden)),
        (&chat, "Query", on("conversations", json!({"KeyConditionExpression": "x"}))),
        (&chat, "Query", table_of("conversations")),
        (&chat, "Scan", table_of("conversations")),
        (&chat, "GetItem", on("meters", json!({"Key": {}}))),
        (&chat, "BatchGetItem", batch("meters", &["acme"])),
        (&chat, "BatchWriteItem", deletion(&["acme", "globex"])),
        (&chat, "PutItem", put("tenants", "acme")),
        (&chat, "Query", query("documents", "acme")),
        (&chat, "DeleteItem", get("audit", "acme")),
        // Of a tenant's record, the function of the keys may write the epoch, and nothing that allows more.
        (&keys, "PutItem", put_with("limits", "acme")),
        (&keys, "PutItem", put_with("epoch", "acme")),
        (&keys, "UpdateItem", set("limits", "acme")),
        (&keys, "UpdateItem", set("status", "acme")),
        (&keys, "UpdateItem", set("permissions", "acme")),
        (&keys, "TransactWriteItems", transaction(&[("Update", set("limits", "acme"))])),
        (&keys, "Scan", table_of("tenants")),
        (&keys, "Query", query("conversations", "acme")),
        (&ingestion, "Query", query("conversations", "acme")),
        (&upload, "Query", query("documents", "acme")),
        (&upload, "GetItem", get("tenants", "acme")),
        (&upload, "PutItem", put("conversations", "acme")),
        (&usage, "UpdateItem", get("usage", "acme")),
        (&log, "Query", query("audit", "acme")),
    ] {
        assert_eq!(
            call(&stack, key, operation, &input).await.as_deref(),
            Some(DENIED),
            "{operation} {input}"
        );
    }
    // The key of a tenant's own model account, whether or not there is one.
    let own = call(&stack, &chat, "GetSecretValue", &secret("model/tenants/acme")).await;
    assert_eq!(own.as_deref(), Some("ResourceNotFoundException"));
    for other in ["model/tenants/globex", "model/tenants/acme1", "model/api-key", "qdrant/root-key"] {
        let refused = call(&stack, &chat, "GetSecretValue", &secret(other)).await;
        assert_eq!(refused.as_deref(), Some(DENIED), "{other}");
    }
    // Uploaded files, and links to put them, which can do no more than their signer.
    let files = stack.documents_bucket();
    for (key, reads) in [(&ingestion, false), (&upload, true)] {
        let s3 = stack.s3_as(key);
        for (prefix, own) in
            [("tenant=acme/", true), ("tenant=acme1/", false), ("tenant=globex/", false), ("", false)]
        {
            let name = format!("{prefix}uploads/some");
            let put = s3.put_object().bucket(&files).key(&name).body(b"x".to_vec().into()).send().await;
            assert_eq!(put.is_ok(), own, "{name}");
            let read = s3.get_object().bucket(&files).key(&name).send().await;
            assert_eq!(read.is_ok(), own && reads, "{name}");
            let listed = s3.list_object_versions().bucket(&files).prefix(prefix).send().await;
            assert_eq!(listed.is_ok(), own, "{name}");
        }
    }
    // The audit log's objects.
    let (s3, bucket) = (stack.s3_as(&log), stack.audit_bucket());
    let list = async |prefix: Option<&str>| {
        let listed =
            s3.list_object_versions().bucket(bucket).set_prefix(prefix.map(str::to_owned)).send().await;
        listed.map(drop).map_err(|error| format!("{error:?}"))
    };
    assert_eq!(list(Some("tenant=acme/")).await, Ok(()));
    for prefix in [None, Some(""), Some("tenant="), Some("tenant=acme"), Some("tenant=globex/")] {
        assert!(list(prefix).await.unwrap_err().contains("AccessDenied"), "{prefix:?}");
    }
    let read = async |key: &str| {
        format!("{:?}", s3.get_object().bucket(bucket).key(key).version_id("none").send().await)
    };
    assert!(read("tenant=acme/nothing").await.contains("NoSuch"));
    for key in ["tenant=globex/nothing", "tenant=acme1/nothing", "x/tenant=acme/nothing"] {
        assert!(read(key).await.contains("AccessDenied"), "{key}");
    }
}

#[tokio::test]
async fn a_session_is_given_to_the_right_function_for_one_tenant_and_ends() {
    let stack = Stack::start().await;
    everything_runs(&stack).await;
    let chat = stack.own_key("chat");
    let acme = ("tenant_id", "acme");
    assert!(stack.assume(&chat, "ChatTenantRole", &[acme]).await.is_ok());
    for (function, role, tags) in [
        ("chat", "ChatTenantRole", &[][..]),
        ("chat", "ChatTenantRole", &[acme, ("more", "x")]),
        ("chat", "ChatTenantRole", &[("tenant", "acme")]),
        ("chat", "IngestionTenantRole", &[acme]),
        ("chat", "NoRole", &[acme]),
        ("usage", "ChatTenantRole", &[acme]),
        ("authorizer", "ChatTenantRole", &[acme]),
        ("reconciler", "AuditLogTenantRole", &[acme]),
    ] {
        let refused = stack.assume(&stack.own_key(function), role, tags).await.unwrap_err();
        assert_eq!(refused, "AccessDenied", "{function} {role} {tags:?}");
    }
    // A session does not open another one.
    let session = stack.assume(&chat, "ChatTenantRole", &[acme]).await.unwrap();
    assert_eq!(
        stack.assume(&session, "ChatTenantRole", &[("tenant_id", "globex")]).await.unwrap_err(),
        "AccessDenied"
    );
    // Its key is nothing without its token, and nothing once it is over.
    let bare = Key { token: None, ..session.clone() };
    let other = Key { token: Some("x".into()), ..session.clone() };
    for key in [bare, other] {
        let refused = call(&stack, &key, "GetItem", &get("meters", "acme")).await;
        assert_eq!(refused.as_deref(), Some("UnrecognizedClientException"));
    }
    stack.steer_sts(json!({"lifetime_s": 1})).await;
    let short = stack.assume(&chat, "ChatTenantRole", &[acme]).await.unwrap();
    assert_eq!(call(&stack, &short, "GetItem", &get("meters", "acme")).await, None);
    tokio::time::sleep(std::time::Duration::from_millis(1_200)).await;
    let over = call(&stack, &short, "GetItem", &get("meters", "acme")).await;
    assert_eq!(over.as_deref(), Some("ExpiredTokenException"));
}

/// A session is asked for once, kept while it has long enough left, and without one nothing is answered (I8).
#[tokio::test]
async fn sessions_are_kept_renewed_and_missed() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("handbook", "Handbook", "Every employee has 25 days of paid annual leave.").await;
    acme.ask("How many days of leave?").await;
    let given = stack.sessions_given().await;
    for _ in 0..5 {
        acme.ask("How many days of leave?").await;
    }
    assert_eq!(stack.sessions_given().await, given, "a warm request asks for none");

    stack.steer_sts(json!({"outage": true})).await;
    acme.ask("How many days of leave?").await;
    stack.kill("chat").await;
    let refused = acme.chat(json!({"message": "How many days of leave?"})).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE, "{}", refused.text);
    assert_eq!(refused.json()["error"]["code"], "unavailable");

    // What is given now has less left than is wanted a second later: it is asked for anew.
    stack.steer_sts(json!({"lifetime_s": 1_201})).await;
    acme.ask("How many days of leave?").await;
    let given = stack.sessions_given().await;
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    acme.ask("How many days of leave?").await;
    let given = stack.sessions_given().await - given;
    assert!(given > 0, "a session that ends soon is replaced");

    // While STS is out, one that ends soon still serves, as long as it outlasts the longest request.
    stack.steer_sts(json!({"outage": true})).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    for _ in 0..3 {
        acme.ask("How many days of leave?").await;
    }
    assert!(stack.logs().contains("the session of before still serves"));
    stack.kill("chat").await;
    stack.steer_sts(json!({"lifetime_s": 303})).await;
    acme.ask("How many days of leave?").await;
    stack.steer_sts(json!({"outage": true})).await;
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    let refused = acme.chat(json!({"message": "How many days of leave?"})).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE, "{}", refused.text);
    stack.stop().await;
}

#[tokio::test]
async fn a_process_serves_one_tenant() {
    let stack = Stack::start().await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    let of_acme = new_process(&stack, &acme).await;
    let of_globex = new_process(&stack, &globex).await;
    for tenant in [&acme, &globex, &globex, &acme] {
        asks(tenant).await;
    }
    assert_eq!(pids(&stack, "usage"), BTreeSet::from([of_acme, of_globex]));

    // Whose it is, seen from outside: stopped, it keeps its tenant waiting and nobody else.
    signal("-STOP", of_acme);
    let waiting = {
        let acme = acme.clone();
        tokio::spawn(async move { asks(&acme).await })
    };
    for _ in 0..3 {
        asks(&globex).await;
    }
    assert!(!waiting.is_finished(), "acme was served by another process");
    assert_eq!(pids(&stack, "usage"), BTreeSet::from([of_acme, of_globex]));
    signal("-CONT", of_acme);
    waiting.await.unwrap();

    // One that dies at work is replaced for its tenant alone.
    signal("-STOP", of_acme);
    let lost = {
        let acme = acme.clone();
        tokio::spawn(async move { acme.get("/v1/usage").await.status })
    };
    asks(&globex).await;
    signal("-KILL", of_acme);
    lost.await.unwrap();
    asks(&acme).await;
    asks(&globex).await;
    let now = pids(&stack, "usage");
    let next = *now.difference(&BTreeSet::from([of_globex])).next().unwrap();
    assert_eq!(now, BTreeSet::from([next, of_globex]));
    assert_ne!(next, of_acme);

    // Operators are nobody's tenant, and have processes that serve no tenant.
    stack.admin(Method::GET, "/admin/usage", None).await.expect_status(StatusCode::OK);
    assert_eq!(pids(&stack, "usage"), BTreeSet::from([next, of_globex]));
    assert_eq!(pids(&stack, "admin-usage").len(), 1);
    stack.stop().await;
}

/// The event that API Gateway makes of a request to this route.
fn event(method: &str, path: &str, headers: Value) -> Value {
    json!({
        "resource": path, "path": path, "httpMethod": method, "headers": headers, "multiValueHeaders": {},
        "queryStringParameters": null, "multiValueQueryStringParameters": null, "pathParameters": null,
        "stageVariables": null, "body": null, "isBase64Encoded": false,
        "requestContext": {
            "accountId": "000000000000", "apiId": "local", "httpMethod": method, "path": path,
            "protocol": "HTTP/1.1", "requestId": "r-1", "resourceId": "local", "resourcePath": path,
            "stage": "live", "identity": {"sourceIp": "127.0.0.1"},
        },
    })
}

/// What the authorizer says of a tenant's key.
async fn decision(stack: &Stack, tenant: &Tenant) -> Value {
    let authorization = json!({"authorization": format!("Bearer {}", tenant.key)});
    let mut asked = event("GET", "/v1/usage", authorization);
    asked["type"] = "REQUEST".into();
    asked["methodArn"] = "arn:aws:execute-api:us-east-1:000000000000:local/live/GET/v1/usage".into();
    stack.invoke("authorizer", asked).await["context"].clone()
}

fn alerts(stack: &Stack) -> usize {
    stack.logs().matches("isolation_alert").count()
}

/// What a function prints is in the log soon after its answer.
async fn wait_for_alerts(stack: &Stack, expected: usize) {
    for _ in 0..500 {
        if alerts(stack) >= expected {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(alerts(stack), expected);
}

/// Should API Gateway or Lambda ever deliver a request to another tenant's process, it refuses.
#[tokio::test]
async fn a_request_in_anothers_process_is_refused_and_raises_the_alarm() {
    let stack = Stack::start().await;
    let authorization = format!("Bearer {}", stack.tenant("acme").key);
    let headers = json!({"x-amz-tenant-id": "globex", "authorization": authorization});
    let mut own = event("GET", "/v1/usage", headers);
    own["requestContext"]["authorizer"] = decision(&stack, &stack.tenant("acme")).await;
    let answered = stack.invoke_for(Some("acme"), "bulkhead-usage", own.clone()).await.json();
    assert_eq!(answered["statusCode"], 200, "{answered}");
    assert_eq!(alerts(&stack), 0);

    stack.forget_dynamodb_calls().await;
    let refused = stack.invoke_for(Some("globex"), "bulkhead-usage", own.clone()).await.json();
    assert_eq!(refused["statusCode"], 503, "{refused}");
    assert_eq!(stack.dynamodb_calls().await, Vec::<Value>::new(), "it has touched something");
    wait_for_alerts(&stack, 1).await;

    // What an operator sees is all tenants'.
    let mut operators = event("GET", "/admin/usage", json!({}));
    operators["requestContext"]["identity"]["userArn"] = "arn:aws:iam::000000000000:user/operator".into();
    let refused = stack.invoke_for(Some("acme"), "bulkhead-usage", operators.clone()).await.json();
    assert_eq!(refused["statusCode"], 503, "{refused}");
    wait_for_alerts(&stack, 2).await;
    let answered = stack.invoke_for(None, "bulkhead-admin-usage", operators).await.json();
    assert_eq!(answered["statusCode"], 200, "{answered}");

    // Lambda itself takes no request without a tenant, nor one of a tenant where none is expected.
    let nobodys = stack.invoke_for(None, "bulkhead-usage", own.clone()).await;
    assert_eq!(nobodys.status, StatusCode::BAD_REQUEST, "{}", nobodys.text);
    let named = stack.invoke_for(Some("acme"), "bulkhead-admin-usage", own).await;
    assert_eq!(named.status, StatusCode::BAD_REQUEST, "{}", named.text);
    stack.stop().await;
}

/// Everything else holds where the mode is off.
#[tokio::test]
async fn without_tenant_isolation_tenants_share_a_process_and_nothing_else() {
    let parameters = vec![("TenantIsolation", "off".to_owned())];
    let stack = Stack::start_with(Options { parameters, ..Options::default() }).await;
    let (acme, globex) = (stack.tenant("acme"), stack.tenant("globex"));
    acme.store("handbook", "Handbook", "Every employee has 25 days of paid annual leave.").await;
    globex.store("handbook", "Handbook", "Every employee has 30 days of paid annual leave.").await;
    for (tenant, days) in [(&acme, "25"), (&globex, "30")] {
        let answer = tenant.ask("How many days of annual leave does an employee have?").await;
        assert!(answer["response"].as_str().unwrap().contains(days), "{answer}");
        asks(tenant).await;
        asks(tenant).await;
    }
    for function in ["usage", "chat", "ingestion"] {
        assert_eq!(pids(&stack, function).len(), 1, "{function}");
    }
    assert!(!stack.logs().contains("isolation_alert"));

    let headers = json!({"authorization": format!("Bearer {}", acme.key)});
    let mut own = event("GET", "/v1/usage", headers);
    own["requestContext"]["authorizer"] = decision(&stack, &acme).await;
    let answered = stack.invoke_for(None, "bulkhead-usage", own).await.json();
    assert_eq!(answered["statusCode"], 200, "{answered}");
    stack.stop().await;
}
