//! A function whose environment or secrets are not as they must be does not start, and says in one line
//! which of them it is. Every function, every variable that the template gives it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::handler::Handler;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use local::template::{Function, Template};
use serde_json::{Value, json};
use tests::{Options, Stack, binaries};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// How long a process may take to start or to end. Generous: this is no measurement.
const PATIENCE: Duration = Duration::from_secs(60);
/// Processes at once.
const AT_ONCE: usize = 8;
/// Read by the library that speaks to Lambda, which takes its absence for "no".
const NOT_OURS: &str = "AWS_LAMBDA_HTTP_IGNORE_STAGE_IN_PATH";
/// A text that no line may repeat: a secret is not told by being wrong.
const WRONG: &str = "a wrong secret";

/// Where no reranker is: that there is one is enough for a start.
const RERANKER: &str = "http://127.0.0.1:1";

type Environment = BTreeMap<String, String>;

/// The template with the parameters of a running stack.
fn template(stack: &Stack) -> Template {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let of = |name: &str| stack.ready()[name].as_str().unwrap().to_owned();
    let parameters = [
        ("QdrantCells", format!("default={}", of("qdrant_url"))),
        ("ModelUrl", of("model_url")),
        ("EmbeddingsUrl", of("embeddings_url")),
        ("RerankUrl", RERANKER.to_owned()),
    ];
    let parameters = parameters.map(|(name, value)| (name.to_owned(), value)).into();
    Template::load(&root.join("infra/template.yaml"), &parameters).unwrap()
}

/// A stack with all that is optional.
async fn stack() -> Stack {
    let parameters = vec![("RerankUrl", RERANKER.to_owned())];
    Stack::start_with(Options { parameters, ..Options::default() }).await
}

/// What Lambda and the stack put into a process's environment.
fn surroundings(stack: &Stack, function: &Function) -> Environment {
    let (ready, admin) = (stack.ready(), &stack.ready()["admin"]);
    let given = [
        ("AWS_ENDPOINT_URL_DYNAMODB", &ready["dynamodb_url"]),
        ("AWS_ENDPOINT_URL_S3", &ready["s3_url"]),
        ("AWS_ENDPOINT_URL_SECRETS_MANAGER", &ready["secrets_url"]),
        ("AWS_ENDPOINT_URL_STS", &ready["sts_url"]),
        ("AWS_ENDPOINT_URL_LAMBDA", &ready["lambda_url"]),
        ("AWS_ACCESS_KEY_ID", &admin["access_key_id"]),
        ("AWS_SECRET_ACCESS_KEY", &admin["secret_access_key"]),
        ("AWS_REGION", &admin["region"]),
    ];
    let given = given.map(|(name, value)| (name.to_owned(), value.as_str().unwrap().to_owned()));
    let lambdas = [
        ("AWS_LAMBDA_FUNCTION_NAME", function.name.clone()),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST".to_owned()),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", function.memory_mb.to_string()),
        ("AWS_LAMBDA_LOG_GROUP_NAME", "logs".to_owned()),
        ("AWS_LAMBDA_LOG_STREAM_NAME", "stream".to_owned()),
    ];
    let lambdas = lambdas.map(|(name, value)| (name.to_owned(), value));
    given.into_iter().chain(lambdas).chain(function.environment.clone()).collect()
}

/// How a process began.
#[derive(Debug, PartialEq)]
enum Start {
    /// It asked Lambda for its first invocation.
    Polled,
    /// It ended, well or not, and said this.
    Ended { well: bool, said: String },
}

/// As much of Lambda as a start sees: extensions are registered with this answer, and the first invocation never
/// comes. Says where it is, and when it is asked for that.
async fn lambda(registers: StatusCode) -> (String, impl Future<Output = ()>, AbortHandle) {
    let (polled, mut polls) = mpsc::unbounded_channel();
    let answer = async move |request: Request| -> Response {
        if request.uri().path().ends_with("/extension/register") {
            assert_eq!(request.headers()["content-type"], "application/json");
            let said = json!({"functionName": "f", "functionVersion": "$LATEST", "handler": "bootstrap"});
            return (registers, [("lambda-extension-identifier", "e")], axum::Json(said)).into_response();
        }
        if request.uri().path().ends_with("/invocation/next") {
            polled.send(()).unwrap();
        }
        std::future::pending().await
    };
    let (address, server) = serve(answer).await;
    (address, async move { polls.recv().await.unwrap() }, server)
}

/// Answers so whatever is asked. Says where.
async fn serve<T: 'static>(answer: impl Handler<T, ()>) -> (String, AbortHandle) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async { axum::serve(listener, Router::new().fallback(answer)).await.unwrap() });
    (address, server.abort_handle())
}

async fn start(function: &Function, environment: &Environment) -> Start {
    start_on(lambda(StatusCode::OK).await, function, environment).await
}

async fn start_on(
    lambda: (String, impl Future<Output = ()>, AbortHandle),
    function: &Function,
    environment: &Environment,
) -> Start {
    start_in(binaries(), lambda, function, environment).await
}

async fn start_in(
    folder: &Path,
    (address, polled, server): (String, impl Future<Output = ()>, AbortHandle),
    function: &Function,
    environment: &Environment,
) -> Start {
    let program = folder.join(&function.binary);
    let child = Command::new(program)
        .env_clear()
        .envs(environment)
        .env("AWS_LAMBDA_RUNTIME_API", address)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let begun = async {
        tokio::select! {
            () = polled => Start::Polled,
            output = child.wait_with_output() => {
                let output = output.unwrap();
                let said = [output.stdout, output.stderr].concat();
                Start::Ended { well: output.status.success(), said: String::from_utf8(said).unwrap() }
            }
        }
    };
    let start = tokio::time::timeout(PATIENCE, begun).await.unwrap();
    server.abort();
    start
}

/// Something that a variable must not hold. One that is not here is not in the test, and fails it.
fn malformed(variable: &str) -> &'static str {
    match variable {
        "AUDIT_RETENTION_DAYS"
        | "AUTHORIZER_CACHE_SECONDS"
        | "EMBEDDINGS_DIMENSIONS"
        | "MODEL_MAX_IN_FLIGHT"
        | "UPLOAD_ATTEMPTS" => "many",
        "EMBEDDINGS_MODEL" | "RERANK_MODEL" => "two words",
        "EMBEDDINGS_URL" | "MODEL_URL" | "RERANK_URL" => "nowhere",
        "ISSUER_REACH" | "WEBHOOK_RECEIVERS" => "everywhere",
        "LOG_LEVEL" => "loud",
        "METRICS_NAMESPACE" => "a namespace",
        "QDRANT_CELLS" => "default",
        "TENANT_ISOLATION" => "perhaps",
        "TENANT_MODEL_KEYS" | "TENANT_SECRETS" => "a secret?",
        "TENANT_ROLE_ARN" => "chat",
        "UPLOAD_AUTHORIZER" => "a function",
        name if name.ends_with("_TABLE") => "a table",
        name if name.ends_with("_BUCKET") => "A_Bucket",
        name if name.ends_with("_SECRET") => "a secret?",
        name => panic!("nothing malformed is known for {name}"),
    }
}

/// A function, a variable, and what stands in it, or that nothing does.
struct Case<'a> {
    function: &'a Function,
    variable: &'a str,
    value: Option<String>,
}

/// Starts each function as the case says; what was not refused as it must be.
async fn not_refused(stack: &Stack, cases: Vec<Case<'_>>) -> Vec<String> {
    let one = async |Case { function, variable, value }: Case<'_>| {
        let mut environment = surroundings(stack, function);
        match value.clone() {
            Some(value) => environment.insert(variable.to_owned(), value),
            None => environment.remove(variable),
        };
        let at = format!("{} with {variable} {value:?}", function.logical_id);
        match start(function, &environment).await {
            Start::Ended { well: false, said }
                if said.lines().count() == 1 && said.contains(variable) && !said.contains(WRONG) =>
            {
                None
            }
            other => Some(format!("{at}: {other:?}")),
        }
    };
    let failed: Vec<Option<String>> =
        futures_util::stream::iter(cases).map(one).buffer_unordered(AT_ONCE).collect().await;
    failed.into_iter().flatten().collect()
}

#[tokio::test]
async fn a_function_starts_with_what_the_template_gives_it_and_with_nothing_less() {
    let stack = stack().await;
    let template = template(&stack);
    for function in &template.functions {
        let started = start(function, &surroundings(&stack, function)).await;
        assert_eq!(started, Start::Polled, "{}", function.logical_id);
    }
    let mut cases = Vec::new();
    for function in &template.functions {
        for variable in function.environment.keys().filter(|name| *name != NOT_OURS) {
            for value in [None, Some(""), Some(malformed(variable))] {
                cases.push(Case { function, variable, value: value.map(str::to_owned) });
            }
        }
    }
    assert!(cases.len() > 250, "{}", cases.len());
    assert_eq!(not_refused(&stack, cases).await, Vec::<String>::new());
    stack.stop().await;
}

#[tokio::test]
async fn a_function_whose_secret_is_absent_empty_or_malformed_does_not_start() {
    let stack = stack().await;
    let template = template(&stack);
    // As CloudFormation makes it, before an operator has put a value.
    let empty: Value = json!({"Name": "bulkhead/test/empty"});
    let made =
        stack.signed_by(&stack.operator(), "secretsmanager", "secretsmanager.CreateSecret", &empty).await;
    assert!(made.status.is_success(), "{}", made.text);
    stack.create_secret("bulkhead/test/wrong", &format!("{WRONG}\n")).await;
    let mut cases = Vec::new();
    for function in &template.functions {
        for variable in function.environment.keys().filter(|name| name.ends_with("_SECRET")) {
            for name in ["absent", "empty", "wrong"] {
                cases.push(Case { function, variable, value: Some(format!("bulkhead/test/{name}")) });
            }
        }
    }
    assert!(cases.len() >= 21, "{}", cases.len());
    assert_eq!(not_refused(&stack, cases).await, Vec::<String>::new());
    stack.stop().await;
}

/// A function that has something to write down before its end has to be told of it.
#[tokio::test]
async fn a_function_that_would_not_be_told_of_its_end_does_not_start() {
    let stack = stack().await;
    let template = template(&stack);
    let mut refused = Vec::new();
    for function in &template.functions {
        let lambda = lambda(StatusCode::FORBIDDEN).await;
        match start_on(lambda, function, &surroundings(&stack, function)).await {
            Start::Polled => {}
            Start::Ended { well: false, said }
                if said.lines().count() == 1 && said.contains("403 Forbidden") =>
            {
                refused.push(function.binary.as_str());
            }
            other => panic!("{}: {other:?}", function.logical_id),
        }
    }
    refused.sort_unstable();
    refused.dedup();
    assert_eq!(refused, ["audit", "authorizer", "chat", "ingestion", "keys", "upload_ingestion", "usage"]);
    stack.stop().await;
}

/// What reads documents is a program beside the function's, or in a layer.
#[tokio::test]
async fn a_function_that_reads_documents_does_not_start_without_what_reads_them() {
    let stack = stack().await;
    let template = template(&stack);
    // On the same disk: a copy could not be started while another test's new process still had it open.
    let alone = tempfile::tempdir_in(binaries()).unwrap();
    let mut refused = Vec::new();
    for function in &template.functions {
        let program = alone.path().join(&function.binary);
        if !program.exists() {
            std::fs::hard_link(binaries().join(&function.binary), program).unwrap();
        }
        let lambda = lambda(StatusCode::OK).await;
        match start_in(alone.path(), lambda, function, &surroundings(&stack, function)).await {
            Start::Polled => {}
            Start::Ended { well: false, said }
                if said.lines().count() == 1 && said.contains("document_reader") =>
            {
                refused.push(&function.logical_id);
            }
            other => panic!("{}: {other:?}", function.logical_id),
        }
    }
    let layered = template.functions.iter().filter(|function| !function.layers.is_empty());
    assert_eq!(refused, layered.map(|function| &function.logical_id).collect::<Vec<_>>());
    assert_eq!(refused.len(), 2);
    stack.stop().await;
}

/// What Secrets Manager does in the place of an answer.
#[derive(Clone, Copy)]
enum Fault {
    /// It fails.
    Fails,
    /// It has too much to do.
    Throttles,
    /// It refuses the caller.
    Refuses,
    /// It says nothing.
    Hangs,
}

/// Secrets Manager behind faults, each for one call, and how many calls came. Says where it is.
async fn faulty(stack: &Stack, faults: &[Fault]) -> (String, Arc<AtomicUsize>, AbortHandle) {
    let real = stack.ready()["secrets_url"].as_str().unwrap().to_owned();
    let (faults, calls) = (faults.to_vec(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&calls);
    let refusal = |kind: &str| (StatusCode::BAD_REQUEST, axum::Json(json!({"__type": kind}))).into_response();
    let answer = async move |request: Request| -> Response {
        match faults.get(counted.fetch_add(1, SeqCst)) {
            Some(Fault::Fails) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            Some(Fault::Throttles) => refusal("ThrottlingException"),
            Some(Fault::Refuses) => refusal("AccessDeniedException"),
            Some(Fault::Hangs) => std::future::pending().await,
            None => {
                let (parts, body) = request.into_parts();
                let body = axum::body::to_bytes(body, 1 << 16).await.unwrap();
                let forwarded = reqwest::Client::new().post(&real).headers(parts.headers).body(body);
                let answer = forwarded.send().await.unwrap();
                (answer.status(), answer.bytes().await.unwrap()).into_response()
            }
        }
    };
    let (address, server) = serve(answer).await;
    (format!("http://{address}"), calls, server)
}

#[tokio::test]
async fn a_secret_is_asked_for_again_where_that_may_help_and_not_for_ever() {
    use Fault::{Fails, Hangs, Refuses, Throttles};

    let stack = stack().await;
    let template = template(&stack);
    let reads = |function: &&Function| function.environment.keys().any(|name| name.ends_with("_SECRET"));
    let (mut one, mut several) = (0, 0);
    for function in template.functions.iter().filter(reads) {
        let begun = async |faults: &[Fault]| {
            let (address, calls, server) = faulty(&stack, faults).await;
            let mut environment = surroundings(&stack, function);
            environment.insert("AWS_ENDPOINT_URL_SECRETS_MANAGER".to_owned(), address);
            let began = start(function, &environment).await;
            server.abort();
            (began, calls.load(SeqCst))
        };
        let (began, least) = begun(&[]).await;
        assert_eq!(began, Start::Polled, "{}", function.logical_id);
        if least == 1 {
            one += 1
        } else {
            several += 1
        }
        let (began, calls) = begun(&[Fails, Throttles]).await;
        assert_eq!((began, calls), (Start::Polled, least + 2), "{}", function.logical_id);
        for (faults, most) in [(&[Refuses; 9][..], least), (&[Hangs; 9], least * 3)] {
            let (began, calls) = begun(faults).await;
            let Start::Ended { well: false, said } = &began else {
                panic!("{}: {began:?}", function.logical_id)
            };
            assert!(said.lines().count() == 1 && said.contains("_SECRET"), "{}: {said}", function.logical_id);
            assert!(calls <= most, "{}: {calls} calls", function.logical_id);
        }
    }
    assert_eq!((one, several), (5, 3));
    stack.stop().await;
}
