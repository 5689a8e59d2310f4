//! `infra/openapi.yaml` by itself: what it says of every route, and to API Gateway, which no linter reads.
//! That answers are as it says, every test of the rig checks: `tests::contract`.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::string_slice,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::error::Code;
use tests::Answer;
use tests::contract::{Asking, DOCUMENT, RATE_LIMITS, event, misfit, problem, resolved};
use tokio::net::TcpListener;

/// What API Gateway takes as a method of a path.
const METHODS: [&str; 5] = ["delete", "get", "patch", "post", "put"];

/// Every operation: its method, its path, and itself.
fn operations() -> Vec<(&'static str, &'static str, &'static Value)> {
    let paths = DOCUMENT["paths"].as_object().unwrap();
    let of = |(path, item): (&'static String, &'static Value)| {
        let fields = item.as_object().unwrap().iter();
        let operations = fields.filter(|(name, _)| *name != "parameters");
        operations.map(|(method, operation)| (method.as_str(), path.as_str(), operation)).collect::<Vec<_>>()
    };
    let all: Vec<_> = paths.iter().flat_map(of).collect();
    assert!(all.iter().all(|(method, ..)| METHODS.contains(method)));
    all
}

/// What calls the model or the embeddings for an answer.
const ASKS_A_MODEL: [&str; 4] =
    ["post /v1/documents", "post /v1/search", "post /v1/chat", "post /v1/chat/completions"];

fn is_operators(path: &str) -> bool {
    path.starts_with("/admin/")
}

#[test]
fn every_operation_says_who_may_what_goes_in_what_comes_out_and_what_can_go_wrong() {
    let mut ids = BTreeSet::new();
    for (method, path, operation) in operations() {
        let at = format!("{method} {path}");
        assert!(ids.insert(operation["operationId"].as_str().unwrap()), "{at}");
        assert!(operation["summary"].as_str().is_some_and(|summary| !summary.is_empty()), "{at}");
        let scheme = if is_operators(path) { "sigv4" } else { "tenant" };
        assert_eq!(operation["security"], json!([{ scheme: [] }]), "{at}");

        // Whose request it is, and for which of the tenant's users, is looked at on every route of a tenant.
        let declares = |name: &str| {
            let reference = json!({"$ref": format!("#/components/parameters/{name}")});
            operation["parameters"].as_array().is_some_and(|all| all.contains(&reference))
        };
        for name in ["UserId", "UserGroups"] {
            assert_eq!(declares(name), !is_operators(path), "{at}: {name}");
        }

        // What is in braces is a parameter, and nothing else is.
        let named: BTreeSet<&str> =
            path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')).collect();
        let item = &DOCUMENT["paths"][path];
        let both = [&item["parameters"], &operation["parameters"]];
        let parameters = both.iter().filter_map(|all| all.as_array()).flatten().map(resolved);
        let in_path = parameters.filter(|parameter| parameter["in"] == "path");
        let declared: BTreeSet<&str> = in_path
            .map(|parameter| {
                assert_eq!(parameter["required"], true, "{at}");
                parameter["name"].as_str().unwrap()
            })
            .collect();
        assert_eq!(declared, named, "{at}");

        if let Some(body) = operation.get("requestBody") {
            let media = &body["content"]["application/json"];
            assert_eq!(misfit(&media["schema"], &media["example"]), None, "{at}: the request's example");
        }
        let responses = operation["responses"].as_object().unwrap();
        let good = responses.keys().filter(|status| status.starts_with('2')).count();
        assert_eq!(good, 1, "{at}");
        // What the function or API Gateway may answer on any route.
        for status in ["400", "401", "403", "413", "429", "503", "504"] {
            assert!(responses.contains_key(status), "{at} lacks {status}");
        }
        // Without a signature, it is as if there were no such route.
        if is_operators(path) {
            assert!(responses.contains_key("404"), "{at} lacks 404");
        }
        if ASKS_A_MODEL.contains(&&*at) {
            assert!(responses.contains_key("502"), "{at} lacks 502");
        }
        if operation.get("requestBody").is_some() {
            assert!(responses.contains_key("415"), "{at} lacks 415");
        }
        // Whatever changes something may find that somebody else does.
        if method != "get" {
            assert!(responses.contains_key("409"), "{at} lacks 409");
        }
        for (status, response) in responses {
            let at = format!("{at} {status}");
            let response = resolved(response);
            assert!(response["description"].is_string(), "{at}");
            assert!(response["headers"].get("x-request-id").is_some(), "{at} lacks x-request-id");
            for name in RATE_LIMITS {
                let wanted = status.starts_with('2') && !is_operators(path);
                assert!(!wanted || response["headers"].get(name).is_some(), "{at} lacks {name}");
            }
            let Some(content) = response.get("content") else {
                assert_eq!(status, "204", "{at}");
                continue;
            };
            for (kind, media) in content.as_object().unwrap() {
                let example = &media["example"];
                match kind.as_str() {
                    "text/csv" => {
                        assert!(example.as_str().is_some_and(|table| table.lines().count() > 1), "{at}")
                    }
                    _ => assert_eq!(misfit(&media["schema"], example), None, "{at}: the example of {kind}"),
                }
                if kind == "text/event-stream" {
                    let data: Value = serde_json::from_str(example["data"].as_str().unwrap()).unwrap();
                    let schema = match example["event"].as_str() {
                        Some(name) => event(name),
                        None => json!({"$ref": "#/components/schemas/CompletionChunk"}),
                    };
                    assert_eq!(misfit(&schema, &data), None, "{at}: the example of an event");
                }
            }
            let media = &content["application/json"];
            let schema = media["schema"]["$ref"].as_str();
            let errors = schema == Some("#/components/schemas/ErrorResponse");
            assert_eq!(errors, !status.starts_with('2'), "{at}");
            if errors {
                let code: Code = serde_json::from_value(media["example"]["error"]["code"].clone()).unwrap();
                assert_eq!(code.status().as_str(), status, "{at}: the example's code has another status");
            }
        }
    }
}

/// Whoever repeats a tenant's request that makes something may say that it is the same one.
#[test]
fn every_post_of_a_tenant_takes_an_idempotency_key() {
    let posts =
        operations().into_iter().filter(|(method, path, _)| *method == "post" && path.starts_with("/v1/"));
    let posts: Vec<_> = posts.collect();
    assert!(posts.len() >= 9, "{posts:?}");
    for (_, path, operation) in posts {
        let parameters = operation["parameters"].as_array().unwrap();
        let key = json!({"$ref": "#/components/parameters/IdempotencyKey"});
        assert!(parameters.contains(&key), "POST {path} does not declare Idempotency-Key");
    }
}

#[test]
fn schemas_are_closed() {
    // What a tenant or a standard decides on.
    const OPEN: [&str; 8] = [
        "CompletionMessage",
        "CompletionRequest",
        "CompletionRequest.properties.stream_options",
        "NewDocument.properties.metadata",
        "NewUpload.properties.metadata",
        "Document.properties.metadata",
        "NewIssuer.properties.keys.items",
        "Issuer.properties.keys.items",
    ];
    fn walk(at: &str, schema: &Value, open: &mut Vec<String>) {
        if let Some(fields) = schema.as_object() {
            if fields.get("type").is_some_and(|kind| kind == "object")
                && fields.get("additionalProperties").is_none_or(|others| *others == true)
            {
                open.push(at.to_owned());
            }
            fields.iter().for_each(|(name, value)| walk(&format!("{at}.{name}"), value, open));
        }
        schema.as_array().into_iter().flatten().for_each(|value| walk(at, value, open));
    }
    let mut open = Vec::new();
    for (name, schema) in DOCUMENT["components"]["schemas"].as_object().unwrap() {
        walk(name, schema, &mut open);
    }
    let expected: BTreeSet<String> = OPEN.map(str::to_owned).into();
    assert_eq!(open.into_iter().collect::<BTreeSet<_>>(), expected);
}

#[test]
fn every_component_is_used() {
    fn walk<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
        if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
            found.insert(reference);
        }
        value.as_object().into_iter().flatten().for_each(|(_, value)| walk(value, found));
        value.as_array().into_iter().flatten().for_each(|value| walk(value, found));
    }
    // The bodies of webhooks and the events of streams: no answer has them.
    const SENT: [&str; 4] = ["BudgetThreshold", "ChatMeta", "ChatDelta", "CompletionChunk"];
    let mut used = BTreeSet::new();
    walk(&DOCUMENT, &mut used);
    for kind in ["schemas", "responses", "parameters"] {
        for name in DOCUMENT["components"][kind].as_object().unwrap().keys() {
            let reference = format!("#/components/{kind}/{name}");
            assert!(used.contains(&*reference) || SENT.contains(&name.as_str()), "{reference}");
        }
    }
}

#[test]
fn what_is_not_described_is_found() {
    let json = Some("application/json");
    let hits = r#"{"hits":[]}"#;
    let search = |status, kind, body| problem("POST", "/v1/search", status, kind, body);
    assert_eq!(search(200, json, hits), None);
    assert_eq!(search(200, Some("application/json; charset=utf-8"), hits), None);
    for (status, kind, body, why) in [
        (201, json, hits, "201 is not described"),
        (200, Some("text/html"), hits, "`text/html` is not described"),
        (200, None, hits, "`` is not described"),
        (200, json, "hits", "expected value"),
        (200, json, "{}", "hits"),
        (200, json, r#"{"hits":[],"more":1}"#, "more"),
        (200, json, r#"{"hits":[{"chunk_id":"x"}]}"#, "/hits/0"),
        (404, json, hits, "404 is not described"),
    ] {
        let found = search(status, kind, body);
        assert!(
            found.as_ref().is_some_and(|found| found.contains(why)),
            "{status} {kind:?} {body}: {found:?}"
        );
    }
    let error =
        r#"{"error":{"code":"not_found","type":"invalid_request_error","message":"no"},"request_id":"r"}"#;
    assert_eq!(problem("GET", "/v1/documents/x", 404, json, error), None);
    assert_eq!(problem("GET", "/nowhere", 404, json, error), None);
    assert!(problem("GET", "/nowhere", 404, json, r#"{"message":"Forbidden"}"#).is_some());
    assert!(problem("GET", "/v1/documents/x", 404, json, &error.replace("not_found", "nope")).is_some());
    assert_eq!(problem("DELETE", "/v1/documents/x", 204, None, ""), None);
    assert!(problem("DELETE", "/v1/documents/x", 204, None, "gone").is_some());
    // Where two paths fit, the one without a variable counts.
    assert!(problem("GET", "/v1/audit/exports", 404, json, error).is_none());
}

/// The rig's requests leave with their answers how they were asked; whatever reads an answer holds it to that.
#[tokio::test]
async fn an_answer_that_is_not_described_fails_whoever_reads_it() {
    async fn read(asking: Asking) -> Answer {
        Answer::read(asking.send().await.unwrap()).await
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/search", listener.local_addr().unwrap());
    let answer = async |method: Method, asked: HeaderMap| {
        let hits = if method == "POST" { json!({"hits": []}) } else { json!({"hits": "none"}) };
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", HeaderValue::from_static("r"));
        if !asked.contains_key("bare") {
            headers.extend(
                RATE_LIMITS.map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1"))),
            );
        }
        (headers, axum::Json(hits))
    };
    let routes = axum::Router::new().route("/v1/search", axum::routing::any(answer));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let http = tests::client();
    read(Asking::new(&http, Method::POST, &url)).await;
    read(Asking::elsewhere(&http, Method::PUT, &url)).await;
    let undescribed = tokio::spawn(read(Asking::new(&http, Method::PUT, &url)));
    let bare = tokio::spawn(read(Asking::new(&http, Method::POST, &url).header("bare", "1")));
    for (asking, why) in
        [(undescribed, "PUT /v1/search: 200 OK"), (bare, "200 OK has no x-ratelimit-limit-requests")]
    {
        let panic = asking.await.unwrap_err().into_panic();
        let said = panic.downcast_ref::<String>().unwrap();
        assert!(said.contains(why), "{said}");
    }
}

/// What no linter reads: <https://docs.aws.amazon.com/apigateway/latest/developerguide/api-gateway-swagger-extensions.html>
#[test]
fn what_the_document_says_to_api_gateway() {
    let (buffered, streamed) =
        ("2015-03-31/functions/{}/invocations", "2021-11-15/functions/{}/response-streaming-invocations");
    let lambda = "arn:${AWS::Partition}:apigateway:${AWS::Region}:lambda:path/";
    let mut functions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let events = |operation: &'static Value| {
        let content = resolved(&operation["responses"]["200"]).get("content");
        content.is_some_and(|content| content.get("text/event-stream").is_some())
    };
    let function = |operation: &'static Value| {
        let uri = operation["x-amazon-apigateway-integration"]["uri"]["Fn::Sub"].as_str().unwrap();
        uri.split("/functions/${").nth(1).and_then(|rest| rest.split(".Arn}").next()).unwrap()
    };
    // A function that streams does so whatever it is asked: its program answers in no other way.
    let all = operations().into_iter();
    let streaming: BTreeSet<&str> =
        all.filter(|&(.., operation)| events(operation)).map(|(.., operation)| function(operation)).collect();
    assert_eq!(streaming, BTreeSet::from(["Chat"]));
    for (method, path, operation) in operations() {
        let at = format!("{method} {path}");
        let integration = operation["x-amazon-apigateway-integration"].as_object().unwrap();
        assert_eq!(integration["type"], "aws_proxy", "{at}");
        assert_eq!(integration["httpMethod"], "POST", "{at}: how Lambda is invoked");
        let streams = streaming.contains(function(operation));
        let mode = integration.get("responseTransferMode");
        assert_eq!(mode, streams.then(|| json!("STREAM")).as_ref(), "{at}");
        // Just under the function's own limit for what takes long; what is not streamed has at most API Gateway's
        // 29 s.
        let timeout_ms =
            if events(operation) || at == "delete /v1/conversations/{id}" { 115_000 } else { 29_000 };
        assert_eq!(integration["timeoutInMillis"], timeout_ms, "{at}");
        let uri = integration["uri"]["Fn::Sub"].as_str().unwrap();
        let rest = uri.strip_prefix(lambda).unwrap_or_else(|| panic!("{at}: {uri}"));
        let (start, end) = (rest.find("${").unwrap(), rest.find('}').unwrap());
        let shape = format!("{}{{}}{}", &rest[..start], &rest[end + 1..]);
        assert_eq!(shape, if streams { streamed } else { buffered }, "{at}");
        assert_eq!(rest[start + 2..end].strip_suffix(".Arn"), Some(function(operation)), "{at}");
        functions.entry(function(operation)).or_default().insert(if is_operators(path) {
            "sigv4"
        } else {
            "tenant"
        });

        // A tenant's request tells Lambda whose it is, by what the authorizer found out. An operator's is nobody's.
        let parameters = integration.get("requestParameters");
        let isolated = json!({"Fn::If": [
            "TenantIsolated",
            {"integration.request.header.X-Amz-Tenant-Id": "context.authorizer.tenantId"},
            {"Ref": "AWS::NoValue"},
        ]});
        assert_eq!(parameters, (!is_operators(path)).then_some(&isolated), "{at}");

        let known =
            ["type", "httpMethod", "timeoutInMillis", "uri", "requestParameters", "responseTransferMode"];
        let unknown = integration.keys().find(|name| !known.contains(&name.as_str()));
        assert_eq!(unknown, None, "{at}");
        let extensions = operation.as_object().unwrap().keys().filter(|name| name.starts_with("x-"));
        assert_eq!(extensions.collect::<Vec<_>>(), ["x-amazon-apigateway-integration"], "{at}");
    }
    // No function serves both tenants and operators.
    assert!(functions.values().all(|schemes| schemes.len() == 1), "{functions:?}");

    let schemes = &DOCUMENT["components"]["securitySchemes"];
    assert_eq!(schemes.as_object().unwrap().len(), 2);
    for scheme in ["tenant", "sigv4"] {
        assert_eq!(schemes[scheme]["type"], "apiKey");
        assert_eq!(schemes[scheme]["in"], "header");
        assert_eq!(schemes[scheme]["name"], "Authorization");
    }
    assert_eq!(schemes["sigv4"]["x-amazon-apigateway-authtype"], "awsSigv4");
    assert_eq!(schemes["sigv4"].get("x-amazon-apigateway-authorizer"), None);
    assert_eq!(schemes["tenant"]["x-amazon-apigateway-authtype"], "custom");
    assert_eq!(
        schemes["tenant"]["x-amazon-apigateway-authorizer"],
        json!({
            "type": "request",
            "identitySource": "method.request.header.Authorization",
            "authorizerResultTtlInSeconds": {"Ref": "AuthorizerCacheSeconds"},
            "authorizerUri": {"Fn::Sub": format!("{lambda}{}", buffered.replace("{}", "${Authorizer.Arn}"))},
        })
    );
    // The functions check what comes in, and say which field is wrong. API Gateway would not.
    assert_eq!(DOCUMENT.get("x-amazon-apigateway-request-validator"), None);
    assert_eq!(DOCUMENT.get("x-amazon-apigateway-request-validators"), None);
}

/// <https://docs.aws.amazon.com/apigateway/latest/developerguide/supported-gateway-response-types.html>
#[test]
fn what_api_gateway_answers_by_itself_is_the_contracts_error() {
    // The status is the code's, so that a client finds the same of both whoever answers.
    let expected: BTreeMap<&str, Code> = [
        ("ACCESS_DENIED", Code::InsufficientScope),
        ("AUTHORIZER_CONFIGURATION_ERROR", Code::Unavailable),
        ("AUTHORIZER_FAILURE", Code::Unavailable),
        ("BAD_REQUEST_BODY", Code::InvalidRequest),
        ("BAD_REQUEST_PARAMETERS", Code::InvalidRequest),
        ("DEFAULT_4XX", Code::InvalidRequest),
        ("DEFAULT_5XX", Code::Unavailable),
        ("EXPIRED_TOKEN", Code::InvalidKey),
        ("INTEGRATION_FAILURE", Code::Unavailable),
        ("INTEGRATION_TIMEOUT", Code::DeadlineExceeded),
        ("INVALID_API_KEY", Code::InvalidKey),
        ("INVALID_SIGNATURE", Code::InvalidKey),
        ("MISSING_AUTHENTICATION_TOKEN", Code::NotFound),
        ("QUOTA_EXCEEDED", Code::RateLimitExceeded),
        ("REQUEST_TOO_LARGE", Code::TooLarge),
        ("RESOURCE_NOT_FOUND", Code::NotFound),
        ("THROTTLED", Code::RateLimitExceeded),
        ("UNAUTHORIZED", Code::InvalidKey),
        ("UNSUPPORTED_MEDIA_TYPE", Code::UnsupportedContentType),
        ("WAF_FILTERED", Code::InvalidRequest),
    ]
    .into();
    let declared = DOCUMENT["x-amazon-apigateway-gateway-responses"].as_object().unwrap();
    // Whatever is not here, such as an API_CONFIGURATION_ERROR, falls to one of the defaults.
    let kinds: BTreeSet<&str> = declared.keys().map(String::as_str).collect();
    assert_eq!(kinds, expected.keys().copied().collect::<BTreeSet<_>>());
    for (kind, code) in expected {
        let response = &declared[kind];
        assert_eq!(response["statusCode"], code.status().as_u16(), "{kind}");
        assert_eq!(
            response["responseParameters"]["gatewayresponse.header.x-request-id"], "context.requestId",
            "{kind}"
        );
        let templates = response["responseTemplates"].as_object().unwrap();
        assert_eq!(templates.keys().collect::<Vec<_>>(), ["application/json"], "{kind}");
        let body = templates["application/json"].as_str().unwrap();
        // The gateway's own words come quoted; its request's id does not.
        let body = body
            .replace("$context.error.messageString", "\"Forbidden\"")
            .replace("$context.requestId", "8d7e3b1c");
        assert!(!body.contains('$'), "{kind}: {body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["error"]["code"], json!(code), "{kind}");
        assert_eq!(body["error"]["type"], code.family(), "{kind}");
        // Who is told to come again is told when, in both ways.
        let wait_s = response["responseParameters"].get("gatewayresponse.header.retry-after");
        let wait_s = wait_s.map(|wait| wait.as_str().unwrap().trim_matches('\'').parse::<u64>().unwrap());
        assert_eq!(wait_s.is_some(), code.status() == StatusCode::TOO_MANY_REQUESTS, "{kind}");
        assert_eq!(body["error"]["retry_after_ms"].as_u64(), wait_s.map(|wait| wait * 1_000), "{kind}");
        assert_eq!(misfit(&json!({"$ref": "#/components/schemas/ErrorResponse"}), &body), None, "{kind}");
    }
}
