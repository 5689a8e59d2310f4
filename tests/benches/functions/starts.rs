//! How long a function takes from the start of its process until it asks for its first event, beside one
//! that does nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use local::template::Function;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::{EMPTY, setting, template};

/// A start that takes this long is none.
const PATIENCE: Duration = Duration::from_secs(20);
/// How many times as long as the empty function another may take.
const LIMIT: f64 = 2.0;

/// Where the AWS clients look for the addresses of their services.
const ENDPOINTS: [&str; 4] = [
    "AWS_ENDPOINT_URL_DYNAMODB",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL_SECRETS_MANAGER",
    "AWS_ENDPOINT_URL_STS",
];

type Polled = mpsc::UnboundedSender<Instant>;

/// All that a function asks before its first event: the Runtime API and Secrets Manager, both in no time.
async fn answer(State(polled): State<Arc<Polled>>, request: Request) -> Response {
    match request.uri().path() {
        "/2018-06-01/runtime/invocation/next" => {
            polled.send(Instant::now()).unwrap();
            std::future::pending().await
        }
        "/2020-01-01/extension/register" => {
            let said = json!({"functionName": "f", "functionVersion": "$LATEST", "handler": "bootstrap"});
            ([("lambda-extension-identifier", "e")], axum::Json(said)).into_response()
        }
        "/2020-01-01/extension/event/next" => std::future::pending().await,
        "/" if request.headers().contains_key("x-amz-target") => {
            axum::Json(json!({"Name": "s", "SecretString": "some-secret-that-is-long-enough"}))
                .into_response()
        }
        other => (StatusCode::NOT_FOUND, format!("nobody answers {other}")).into_response(),
    }
}

/// Starts a program once.
async fn start(
    program: &Path,
    environment: &[(&str, String)],
    polls: &mut mpsc::UnboundedReceiver<Instant>,
) -> Duration {
    let mut command = Command::new(program);
    command.env_clear().envs(environment.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let began = Instant::now();
    let mut child = command.spawn().unwrap();
    let polled = tokio::time::timeout(PATIENCE, polls.recv()).await;
    // It may have ended by itself.
    drop(child.kill());
    let output = child.wait_with_output().unwrap();
    let Ok(Some(polled)) = polled else {
        panic!("{}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    };
    polled - began
}

fn environment(function: Option<&Function>, address: &str) -> Vec<(&'static str, String)> {
    let name = function.map_or(EMPTY, |function| &function.name);
    let memory = function.map_or(256, |function| function.memory_mb);
    let mut all = vec![
        ("AWS_LAMBDA_RUNTIME_API", address.to_owned()),
        ("AWS_LAMBDA_FUNCTION_NAME", name.to_owned()),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", memory.to_string()),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST".to_owned()),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "ASIAEXAMPLE".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
        ("AWS_SESSION_TOKEN", "token".to_owned()),
    ];
    all.extend(ENDPOINTS.map(|name| (name, address.to_owned())));
    all
}

pub async fn measure(programs: &Path) {
    let (polled, mut polls) = mpsc::unbounded_channel();
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().fallback(answer).with_state(Arc::new(polled));
    let server = tokio::spawn(async move { axum::serve(listener, router).await });

    let functions = template(&address).functions;
    let started: Vec<(&str, _, _)> = std::iter::once((EMPTY, EMPTY, environment(None, &address)))
        .chain(functions.iter().map(|function| {
            let mut variables = environment(Some(function), &address);
            let own = function.environment.iter();
            variables.extend(own.map(|(name, value)| (&*name.clone().leak(), value.clone())));
            (&*function.logical_id, &*function.binary, variables)
        }))
        .collect();
    let runs = setting("STARTS", 41);
    let mut took: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for _ in 0..runs {
        for (name, program, environment) in &started {
            let one = start(&programs.join(program), environment, &mut polls).await;
            took.entry(name).or_default().push(one);
        }
    }
    server.abort();

    let median = |name: &str| {
        let mut all = took[name].clone();
        all.sort_unstable();
        let at = |q: f64| all[((all.len() - 1) as f64 * q).round() as usize].as_secs_f64() * 1_000.0;
        (at(0.5), at(0.1), at(0.9))
    };
    let (empty, ..) = median(EMPTY);
    println!(
        "\nStart of the process to its first poll of the Runtime API, {runs} times in turn; secrets are answered at once"
    );
    println!("{:<20} {:>10} {:>8} {:>8} {:>10}   limit {LIMIT:.1}", "", "median ms", "p10", "p90", "× empty");
    for (name, ..) in &started {
        let (middle, low, high) = median(name);
        let ratio = middle / empty;
        let verdict = if ratio > LIMIT { "over" } else { "" };
        println!("{name:<20} {middle:>10.2} {low:>8.2} {high:>8.2} {ratio:>10.2}   {verdict}");
    }
}
