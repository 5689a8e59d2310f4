//! What keeps tenants and functions apart is the credential, not the code that holds it (I1).

#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tests::Stack;

/// The environment of a function's process: what code that runs in it can get hold of.
fn environment(stack: &Stack, function: &str) -> BTreeMap<String, String> {
    let name = ("AWS_LAMBDA_FUNCTION_NAME".to_owned(), format!("bulkhead-{function}"));
    let environments = stack.children().into_iter().filter_map(|pid| {
        let bytes = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        let pairs = bytes.split(|byte| *byte == 0).filter_map(|pair| std::str::from_utf8(pair).ok());
        let split =
            |pair: &str| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        Some(pairs.filter_map(split).collect::<BTreeMap<_, _>>())
    });
    let mut found = environments.filter(|environment| environment.get(&name.0) == Some(&name.1));
    found.next().unwrap_or_else(|| panic!("no process of {function}"))
}

/// A call made with a function's own key, as whoever broke into it would make it: the error, if it is
/// refused.
async fn call(
    stack: &Stack,
    key: &local::sigv4::Credentials,
    operation: &str,
    input: &Value,
) -> Option<String> {
    let (service, target) = match operation {
        "GetSecretValue" => ("secretsmanager", format!("secretsmanager.{operation}")),
        _ => ("dynamodb", format!("DynamoDB_20120810.{operation}")),
    };
    let answer = stack.signed_by(key, service, &target, input).await;
    let refused = !answer.status.is_success();
    refused.then(|| answer.json()["__type"].as_str().unwrap().rsplit('#').next().unwrap().to_owned())
}

#[tokio::test]
async fn a_functions_key_opens_what_its_role_allows_and_nothing_else() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.store("handbook", "Handbook", "Every employee has 25 days of paid annual leave.").await;
    acme.ask("How many days of leave?").await;
    acme.get("/v1/usage").await;
    stack.invoke("reconciler", json!({"job": "collect"})).await;

    let key = json!({"tenant_id": {"S": "globex"}});
    let of = |table: &str| json!({"TableName": Stack::table(table), "Key": key});
    let item = |table: &str| json!({"TableName": Stack::table(table), "Key": {"tenant_id": {"S": "globex"}, "sk": {"S": "x"}}});
    let put = |table: &str| json!({"TableName": Stack::table(table), "Item": {"tenant_id": {"S": "globex"}, "sk": {"S": "x"}}});
    let query = |table: &str| {
        json!({"TableName": Stack::table(table), "KeyConditionExpression": "tenant_id = :t",
            "ExpressionAttributeValues": {":t": {"S": "globex"}}})
    };
    let scan = |table: &str| json!({"TableName": Stack::table(table)});
    let in_transaction = |part: &str, table: &str| {
        let fields = if part == "Put" { put(table) } else { item(table) };
        json!({"TransactItems": [{part: fields}]})
    };
    let secret = |name: &str| json!({"SecretId": format!("bulkhead/{name}")});
    // What each function may do, to show that the call itself is right; and what it may not.
    let cases = [
        ("chat", "GetItem", of("meters"), true),
        ("chat", "Query", query("conversations"), true),
        ("chat", "GetSecretValue", secret("model/api-key"), true),
        ("chat", "GetSecretValue", secret("qdrant/root-key"), false),
        ("chat", "DeleteItem", of("meters"), false),
        ("chat", "Scan", scan("tenants"), false),
        ("chat", "Scan", scan("conversations"), false),
        ("chat", "PutItem", put("tenants"), false),
        ("chat", "Query", query("audit"), false),
        ("chat", "DeleteItem", item("audit"), false),
        ("chat", "TransactWriteItems", in_transaction("Delete", "audit"), false),
        ("chat", "TransactWriteItems", in_transaction("Put", "usage"), false),
        ("chat", "GetItem", item("documents"), false),
        ("chat", "ListTables", json!({}), false),
        ("ingestion", "Query", query("documents"), true),
        ("ingestion", "GetSecretValue", secret("qdrant/root-key"), false),
        ("ingestion", "GetSecretValue", secret("model/api-key"), false),
        ("ingestion", "Query", query("conversations"), false),
        ("authorizer", "GetItem", item("tenants"), true),
        ("authorizer", "GetSecretValue", secret("qdrant/root-key"), true),
        ("authorizer", "PutItem", put("tenants"), false),
        ("authorizer", "Query", query("conversations"), false),
        ("usage", "Query", query("usage"), true),
        ("usage", "UpdateItem", item("usage"), false),
        ("usage", "Query", query("documents"), false),
        ("reconciler", "Scan", scan("meters"), true),
        ("reconciler", "Query", query("conversations"), false),
        ("reconciler", "DeleteItem", item("audit"), false),
    ];
    for (function, operation, input, may) in cases {
        let environment = environment(&stack, function);
        let key = local::sigv4::Credentials {
            access_key_id: environment["AWS_ACCESS_KEY_ID"].clone(),
            secret_access_key: environment["AWS_SECRET_ACCESS_KEY"].clone(),
            region: environment["AWS_REGION"].clone(),
            user_arn: String::new(),
        };
        let refused = call(&stack, &key, operation, &input).await;
        let expected = (!may).then(|| "AccessDeniedException".to_owned());
        assert_eq!(refused, expected, "{function}: {operation} {input}");
    }
}
