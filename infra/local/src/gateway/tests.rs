use std::path::Path as FilePath;
use std::time::Duration;

use aws_lambda_events::apigw::ApiGatewayProxyRequest;
use futures_util::StreamExt;
use http::Method;
use reqwest::{RequestBuilder, Response as Reply};
use serde_json::{Value, json};

use super::*;
use crate::lambda::tests::{options, programs};
use crate::template::Template;

/// The real template and its routes, with stand-ins for the functions' programs.
struct Stack {
    url: String,
    lambda: Arc<Lambda>,
    client: reqwest::Client,
    folder: tempfile::TempDir,
}

fn operator() -> Credentials {
    Credentials {
        access_key_id: "AKIDOPERATOR".into(),
        secret_access_key: "secret".into(),
        region: "us-east-1".into(),
        user_arn: "arn:aws:iam::000000000000:user/operator".into(),
    }
}

impl Stack {
    async fn new(change: impl FnOnce(&mut Template)) -> Self {
        Self::with("on", change).await
    }

    /// A stack in which tenants' processes are apart, or not.
    async fn with(isolation: &str, change: impl FnOnce(&mut Template)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        programs(folder.path(), &["authorizer", "chat", "ingestion", "provisioning"]);
        let path = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml");
        let overrides = [("QdrantCells", "default=http://127.0.0.1:1"), ("TenantIsolation", isolation)];
        let overrides = overrides.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut template = Template::load(&path, &overrides).unwrap();
        change(&mut template);
        let lambda = Lambda::start(template.functions, options(folder.path())).await.unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let served = Gateway::serve(
            listener,
            template.api,
            Arc::clone(&lambda),
            vec![operator()],
            Poison::default(),
            std::future::pending(),
        );
        tokio::spawn(served);
        Self { url, lambda, client: reqwest::Client::new(), folder }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    /// A tenant's request that makes the function do something.
    fn tenant(&self, path: &str, command: &str) -> RequestBuilder {
        self.request(Method::POST, path).header("authorization", "Bearer good").header("x-do", command)
    }

    async fn search(&self, key: &str) -> Reply {
        self.request(Method::POST, "/v1/search").header("authorization", key).send().await.unwrap()
    }

    fn signed(&self, method: Method, path: &str, at: time::OffsetDateTime) -> RequestBuilder {
        let url = format!("{}{path}", self.url);
        let mut request = self.client.request(method.clone(), &url);
        for (name, value) in sigv4::sign(sigv4::GATEWAY, &operator(), &method, &url, &[], b"", at).unwrap() {
            request = request.header(name, value);
        }
        request
    }
}

/// Checks the shape of an error of the gateway's own, and returns its code and message.
async fn refused(reply: Reply, status: u16) -> (String, String) {
    assert_eq!(reply.status(), status);
    let id = reply.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!(reply.headers()["x-amzn-requestid"], id.as_str());
    assert_eq!(reply.headers()["content-type"], "application/json");
    let body: Value = reply.json().await.unwrap();
    assert_eq!(body["request_id"], id.as_str());
    (
        body["error"]["code"].as_str().unwrap().to_owned(),
        body["error"]["message"].as_str().unwrap().to_owned(),
    )
}

async fn code(reply: Reply, status: u16) -> String {
    refused(reply, status).await.0
}

#[tokio::test]
async fn a_request_becomes_the_event_of_a_rest_api() {
    let stack = Stack::new(|_| {}).await;
    let reply = stack
        .request(Method::GET, "/v1/documents/a%2Fb%20c?x=1&x=2&y=%C3%A9+z")
        .header("authorization", "Bearer good")
        .header("x-user-id", "zoë")
        .header("x-amz-tenant-id", "globex")
        .header("x-forwarded-proto", "gopher")
        .body("{\"a\":1}")
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), 201);
    assert_eq!(reply.headers()["x-function"], "yes");
    assert_eq!(reply.headers()["x-amzn-remapped-content-length"], "1");
    let cookies: Vec<_> = reply.headers().get_all("set-cookie").iter().collect();
    assert_eq!(cookies, ["a=1", "b=2"]);
    let id = reply.headers()["x-request-id"].to_str().unwrap().to_owned();
    let event: Value = reply.json().await.unwrap();

    assert_eq!(event["resource"], "/v1/documents/{id}");
    assert_eq!(event["path"], "/v1/documents/a%2Fb%20c");
    assert_eq!(event["httpMethod"], "GET");
    assert_eq!(event["pathParameters"], json!({"id": "a/b c"}));
    assert_eq!(event["queryStringParameters"], json!({"x": "2", "y": "é z"}));
    assert_eq!(event["multiValueQueryStringParameters"]["x"], json!(["1", "2"]));
    assert_eq!(event["headers"]["x-user-id"], "zoë");
    assert_eq!(event["headers"]["x-forwarded-proto"], "http");
    assert_eq!(event["multiValueHeaders"]["x-amz-tenant-id"], json!(["globex"]));
    assert_eq!((&event["body"], &event["isBase64Encoded"]), (&json!("{\"a\":1}"), &json!(false)));
    let context = &event["requestContext"];
    assert_eq!(context["requestId"], id.as_str());
    assert_eq!(context["resourcePath"], "/v1/documents/{id}");
    assert_eq!(context["identity"]["sourceIp"], "127.0.0.1");
    assert!(context["identity"]["userArn"].is_null());
    let authorizer = context["authorizer"].as_object().unwrap();
    assert_eq!(authorizer["principalId"], "someone");
    assert_eq!((&authorizer["tenantId"], &authorizer["n"]), (&json!("acme"), &json!("1")));
    assert_eq!(authorizer["b"], "true");
    assert_eq!(
        authorizer["arn"],
        "arn:aws:execute-api:us-east-1:000000000000:local/live/GET/v1/documents/a%2Fb%20c"
    );
    assert!(authorizer["integrationLatency"].is_number());
    let typed: ApiGatewayProxyRequest = serde_json::from_value(event).unwrap();
    assert_eq!(typed.request_context.authorizer.fields["tenantId"], "acme");

    // Bytes that are no text stay what they are.
    let reply = stack.tenant("/v1/search", "proxy").body(vec![b'{', 0xff, b'}']).send().await.unwrap();
    let event: Value = reply.json().await.unwrap();
    assert_eq!((&event["body"], &event["isBase64Encoded"]), (&json!("e/99"), &json!(true)));
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn lambda_learns_the_tenant_from_what_the_authorizer_said_alone() {
    let on = Stack::new(|_| {}).await;
    let tenant = async |request: RequestBuilder| {
        let reply = request.send().await.unwrap();
        assert!(reply.status().is_success(), "{}", reply.status());
        reply.headers()["x-tenant"].to_str().unwrap().to_owned()
    };
    let forged = |request: RequestBuilder| {
        request
            .header("x-amz-tenant-id", "globex")
            .header("X-Amz-Tenant-Id", "globex2")
            .header("lambda-runtime-aws-tenant-id", "globex")
            .header("tenantId", "globex")
    };
    assert_eq!(tenant(on.tenant("/v1/search", "proxy")).await, "acme");
    assert_eq!(tenant(on.tenant("/v1/chat", "stream")).await, "acme");
    assert_eq!(tenant(forged(on.tenant("/v1/search?tenantId=globex", "proxy"))).await, "acme");
    assert_eq!(tenant(forged(on.tenant("/v1/chat", "stream"))).await, "acme");
    let now = serving::system_clock();
    assert_eq!(tenant(forged(on.signed(Method::GET, "/admin/tenants", now))).await, "");
    // Whom nobody has named is served by nobody, whatever the client says.
    let nameless = forged(on.request(Method::POST, "/v1/search").header("authorization", "Bearer nameless"));
    assert_eq!(code(nameless.send().await.unwrap(), 503).await, "unavailable");
    on.lambda.shutdown().await;

    let off = Stack::with("off", |_| {}).await;
    assert_eq!(tenant(forged(off.tenant("/v1/search", "proxy"))).await, "");
    assert_eq!(tenant(forged(off.tenant("/v1/chat", "stream"))).await, "");
    off.lambda.shutdown().await;
}

#[tokio::test]
async fn the_authorizer_decides_and_its_decision_is_kept_by_the_header_alone() {
    let stack = Stack::new(|_| {}).await;
    let missing = stack.request(Method::POST, "/v1/search").send().await.unwrap();
    assert_eq!(code(missing, 401).await, "invalid_key");
    assert_eq!(code(stack.search("").await, 401).await, "invalid_key");
    let twice = stack.request(Method::POST, "/v1/search");
    let twice = twice.header("authorization", "Bearer good").header("authorization", "Bearer good");
    assert_eq!(code(twice.send().await.unwrap(), 401).await, "invalid_key");
    assert_eq!(stack.lambda.instances("authorizer"), 0, "it is not asked about nothing");

    let calls = async |path: &str| {
        let event: Value = stack.tenant(path, "proxy").send().await.unwrap().json().await.unwrap();
        event["requestContext"]["authorizer"]["calls"].clone()
    };
    assert_eq!(calls("/v1/search").await, "1");
    assert_eq!(calls("/v1/documents").await, "1", "one decision for every route");

    assert_eq!(code(stack.search("Bearer unknown").await, 401).await, "invalid_key");
    assert_eq!(code(stack.search("Bearer denied").await, 403).await, "insufficient_scope");
    assert_eq!(code(stack.search("Bearer object").await, 503).await, "unavailable");
    assert_eq!(code(stack.search("Bearer broken").await, 503).await, "unavailable");
    assert_eq!(code(stack.search("Bearer crash").await, 503).await, "unavailable");

    // The kept policy is held against each route.
    assert_eq!(stack.search("Bearer narrow").await.status(), 201);
    let elsewhere = stack.request(Method::POST, "/v1/documents").header("authorization", "Bearer narrow");
    assert_eq!(code(elsewhere.send().await.unwrap(), 403).await, "insufficient_scope");
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn without_a_cache_every_request_asks_the_authorizer() {
    let stack = Stack::new(|template| {
        template.api.authorizers.values_mut().for_each(|authorizer| authorizer.ttl = Duration::ZERO);
    })
    .await;
    for expected in ["1", "2"] {
        let event: Value = stack.tenant("/v1/search", "proxy").send().await.unwrap().json().await.unwrap();
        assert_eq!(event["requestContext"]["authorizer"]["calls"], expected);
    }
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let stack = Stack::new(|_| {}).await;
    for path in [
        "/",
        "/v1",
        "/v1/search/",
        "/v1/documents/",
        "/live/v1/search",
        "/v1/documents/a/b",
        "/_local/health",
    ] {
        let reply = stack.request(Method::POST, path).send().await.unwrap();
        assert_eq!(code(reply, 404).await, "not_found", "{path}");
    }
    for method in [Method::OPTIONS, Method::PUT, Method::TRACE] {
        let reply = stack.request(method, "/v1/search").send().await.unwrap();
        assert_eq!(code(reply, 404).await, "not_found");
    }
    let head = stack.request(Method::HEAD, "/v1/documents").send().await.unwrap();
    assert_eq!(head.status(), 404);
    let undecodable = stack.request(Method::GET, "/v1/documents/%ff").send().await.unwrap();
    assert_eq!(code(undecodable, 400).await, "invalid_request");
}

#[tokio::test]
async fn requests_have_a_size_and_a_rate() {
    let stack = Stack::new(|_| {}).await;
    let over = stack.tenant("/v1/search", "proxy").body(vec![b'a'; MAX_BODY + 1]).send().await.unwrap();
    assert_eq!(code(over, 413).await, "too_large");
    // It passes the gateway, and is too much for the function.
    let event = stack.tenant("/v1/search", "proxy").body(vec![b'a'; 7 * 1024 * 1024]).send().await.unwrap();
    assert_eq!(code(event, 413).await, "too_large");

    let slow =
        Stack::new(|template| template.api.throttle = Some(Throttle { rate: 0.001, burst: 1.0 })).await;
    assert_eq!(slow.request(Method::GET, "/").send().await.unwrap().status(), 404);
    let reply = slow.request(Method::GET, "/").send().await.unwrap();
    assert_eq!(reply.headers()["retry-after"], "1");
    assert_eq!(code(reply, 429).await, "rate_limit_exceeded");
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn a_function_that_fails_is_not_the_clients_fault() {
    let stack = Stack::new(|template| {
        for route in &mut template.api.routes {
            if route.path == "/v1/documents" {
                route.timeout = Duration::from_millis(1_500);
            }
        }
    })
    .await;
    let answer = async |command: &str| stack.tenant("/v1/search", command).send().await.unwrap();
    for command in [
        "fail",
        "crash",
        "large",
        "raw {}",
        "raw \"text\"",
        r#"raw {"statusCode":"many"}"#,
        r#"raw {"statusCode":200,"body":{}}"#,
        r#"raw {"statusCode":200,"cookies":[]}"#,
        r#"raw {"statusCode":42}"#,
        r#"raw {"statusCode":200,"headers":{"a":[]}}"#,
    ] {
        assert_eq!(code(answer(command).await, 503).await, "unavailable", "{command}");
    }
    let ok = answer(r#"raw {"statusCode":"204"}"#).await;
    assert_eq!(ok.status(), 204);
    let reply = stack.tenant("/v1/documents", "sleep 60000").send().await.unwrap();
    assert_eq!(code(reply, 504).await, "deadline_exceeded");
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn a_streamed_route_passes_on_what_comes() {
    let stack = Stack::new(|_| {}).await;
    let reply = stack.tenant("/v1/chat", "stream").send().await.unwrap();
    assert_eq!(reply.status(), 200);
    assert_eq!(reply.headers()["content-type"], "text/event-stream");
    assert_eq!(reply.headers()["set-cookie"], "c=3");
    assert!(reply.headers().contains_key("x-request-id"));
    let mut chunks = reply.bytes_stream();
    let started = std::time::Instant::now();
    assert_eq!(chunks.next().await.unwrap().unwrap(), "one");
    assert!(started.elapsed() < Duration::from_millis(150), "it came with the others");
    assert_eq!(chunks.next().await.unwrap().unwrap(), "two");
    assert_eq!(chunks.next().await.unwrap().unwrap(), "three");
    assert!(chunks.next().await.is_none());

    // What the route and the function do must go together, as in API Gateway.
    assert_eq!(code(stack.tenant("/v1/chat", "proxy").send().await.unwrap(), 503).await, "unavailable");
    let bodiless = stack.tenant("/v1/search", "stream").send().await.unwrap();
    assert_eq!(bodiless.status(), 200);
    assert_eq!(bodiless.headers()["content-type"], "text/event-stream");
    assert_eq!(bodiless.text().await.unwrap(), "");
    assert_eq!(code(stack.tenant("/v1/chat", "crash").send().await.unwrap(), 503).await, "unavailable");

    let mut cut = stack.tenant("/v1/chat", "stream crash").send().await.unwrap().bytes_stream();
    assert_eq!(cut.next().await.unwrap().unwrap(), "one");
    assert!(cut.next().await.unwrap().is_err(), "a stream that broke off does not look complete");

    let marker = stack.folder.path().join("marker");
    let reply = stack.tenant("/v1/chat", &format!("stream {}", marker.display())).send().await.unwrap();
    drop(reply);
    for _ in 0..500 {
        if marker.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(marker.exists(), "the function ends its work though the client has gone");
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn operator_routes_take_signed_requests_alone() {
    let stack = Stack::new(|_| {}).await;
    let now = serving::system_clock();
    let reply = stack.signed(Method::GET, "/admin/tenants/acme?x=%2F", now).send().await.unwrap();
    assert_eq!(reply.status(), 201);
    let event: Value = reply.json().await.unwrap();
    let identity = &event["requestContext"]["identity"];
    assert_eq!(identity["userArn"], "arn:aws:iam::000000000000:user/operator");
    assert_eq!(identity["accessKey"], "AKIDOPERATOR");
    assert!(event["requestContext"].get("authorizer").is_none());

    let unsigned = stack.request(Method::GET, "/admin/tenants").send().await.unwrap();
    assert_eq!(code(unsigned, 404).await, "not_found");
    let key = stack.request(Method::GET, "/admin/tenants").header("authorization", "Bearer good");
    let (code, message) = refused(key.send().await.unwrap(), 401).await;
    assert_eq!(code, "invalid_key");
    assert!(message.contains("not a complete"), "{message}");
    let late =
        stack.signed(Method::GET, "/admin/tenants", now - time::Duration::minutes(6)).send().await.unwrap();
    let (code, message) = refused(late, 401).await;
    assert!(code == "invalid_key" && message.contains("expired"), "{message}");
    let changed = stack.signed(Method::GET, "/admin/tenants", now).body("other").send().await.unwrap();
    let (code, message) = refused(changed, 401).await;
    assert!(code == "invalid_key" && message.contains("does not match"), "{message}");
    stack.lambda.shutdown().await;
}
