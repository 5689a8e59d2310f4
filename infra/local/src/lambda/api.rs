//! The Runtime API, over HTTP. Each process has its own base path, which says who is asking.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::instance::{Instance, Invocation};
use super::{InvokeError, MAX_PAYLOAD, Reply, Shared, lock};
use crate::serving;
use crate::template::{ACCOUNT, REGION};

/// What a streamed response for HTTP says it is.
const HTTP_RESPONSE: &str = "application/vnd.awslambda.http-integration-response";
/// How many chunks of a stream may wait for a slow reader.
const STREAM_BUFFER: usize = 64;

pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let stopped = Arc::clone(&shared);
    let router = Router::new()
        .route("/{instance}/2018-06-01/runtime/invocation/next", get(next))
        .route("/{instance}/2018-06-01/runtime/invocation/{id}/response", post(response))
        .route("/{instance}/2018-06-01/runtime/invocation/{id}/error", post(error))
        .route("/{instance}/2018-06-01/runtime/init/error", post(init_error))
        .route("/{instance}/2020-01-01/extension/register", post(register))
        .route("/{instance}/2020-01-01/extension/event/next", get(next_event))
        .with_state(shared);
    let served = serving::serve(listener, router, async move { stopped.stopped.notified().await }).await;
    if let Err(error) = served {
        tracing::error!("Runtime API ended: {error}");
    }
}

type Answer = Result<Response, StatusCode>;

fn instance(shared: &Shared, id: &str) -> Result<Arc<Instance>, StatusCode> {
    lock(&shared.instances).get(id).cloned().ok_or(StatusCode::GONE)
}

async fn next(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Answer {
    let instance = instance(&shared, &id)?;
    let invocation = instance.next().await;
    let function = instance.pool.function();
    let deadline = serving::system_clock() + instance.pool.timeout();
    let deadline_ms = deadline.unix_timestamp_nanos() / 1_000_000;
    let trace = invocation.id.replace('-', "");
    let (time, unique) = trace.split_at_checked(8).unwrap_or_default();
    let mut response = Response::builder();
    if let Some(tenant) = &invocation.tenant {
        response = response.header("lambda-runtime-aws-tenant-id", tenant);
    }
    response
        .header("content-type", "application/json")
        .header("lambda-runtime-aws-request-id", &invocation.id)
        .header("lambda-runtime-deadline-ms", deadline_ms.to_string())
        .header(
            "lambda-runtime-invoked-function-arn",
            format!("arn:aws:lambda:{REGION}:{ACCOUNT}:function:{}", function.name),
        )
        .header("lambda-runtime-trace-id", format!("Root=1-{time}-{unique};Sampled=0"))
        .body(Body::from(invocation.payload.clone()))
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

/// Registers an extension within the function's process. That a process has one is why Lambda says
/// SIGTERM before it ends it; here every process is told.
///
/// <https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html>
async fn register(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Answer {
    let instance = instance(&shared, &id)?;
    let function = instance.pool.function();
    let said = json!({
        "functionName": function.name,
        "functionVersion": "$LATEST",
        "handler": "bootstrap",
        "accountId": ACCOUNT,
    });
    Response::builder()
        .header("content-type", "application/json")
        .header("lambda-extension-identifier", id)
        .body(Body::from(said.to_string()))
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

/// An extension that subscribes to nothing waits for as long as its process lives.
async fn next_event(State(shared): State<Arc<Shared>>, Path(id): Path<String>) -> Answer {
    instance(&shared, &id)?.gone().await;
    Err(StatusCode::GONE)
}

/// Finds what is answered. 410 for an answer that nobody waits for: late, twice, or someone else's.
fn answered(
    shared: &Shared,
    instance_id: &str,
    id: &str,
) -> Result<(Arc<Instance>, Arc<Invocation>), StatusCode> {
    let instance = instance(shared, instance_id)?;
    let invocation = instance.answer(id).ok_or(StatusCode::GONE)?;
    Ok((instance, invocation))
}

async fn response(
    State(shared): State<Arc<Shared>>,
    Path((instance, id)): Path<(String, String)>,
    request: Request,
) -> Answer {
    let (_, invocation) = answered(&shared, &instance, &id)?;
    let (parts, body) = request.into_parts();
    let streaming = header(&parts.headers, "lambda-runtime-function-response-mode") == "streaming";
    // On its own: a connection that breaks drops this handler, but the invocation must still end.
    let task = tokio::spawn(async move {
        if streaming {
            let http = header(&parts.headers, "content-type") == HTTP_RESPONSE;
            stream(&invocation, http, body).await
        } else {
            buffer(&invocation, body).await
        }
    });
    Ok(task.await.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR).into_response())
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

async fn buffer(invocation: &Invocation, body: Body) -> StatusCode {
    let (status, result) = match collect(body).await {
        Ok(Some(payload)) => (StatusCode::ACCEPTED, Ok(Reply::Buffered(payload))),
        Ok(None) => (StatusCode::PAYLOAD_TOO_LARGE, Err(InvokeError::ResponseTooLarge)),
        Err(error) => {
            let error = InvokeError::Crashed(format!("its response broke off: {error}"));
            (StatusCode::BAD_REQUEST, Err(error))
        }
    };
    invocation.end().await;
    invocation.reply(result);
    status
}

/// The whole body; `None` if it is too large, in which case it has still been read to its end.
async fn collect(mut body: Body) -> Result<Option<Bytes>, axum::Error> {
    let mut collected = BytesMut::new();
    let mut fits = true;
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            fits = fits && collected.len().saturating_add(data.len()) <= MAX_PAYLOAD;
            if fits {
                collected.extend_from_slice(&data);
            }
        }
    }
    Ok(fits.then(|| collected.freeze()))
}

/// Hands on what comes. A caller that has gone away does not stop the function: the rest is read.
async fn stream(invocation: &Invocation, http: bool, mut body: Body) -> StatusCode {
    let (sender, receiver) = mpsc::channel(STREAM_BUFFER);
    invocation.reply(Ok(Reply::Streaming { http, body: receiver }));
    while let Some(frame) = body.frame().await {
        let item = match frame {
            Ok(frame) => match frame.into_data() {
                Ok(data) => Ok(data),
                Err(frame) => match frame.into_trailers().ok().as_ref().and_then(failure) {
                    Some(error) => Err(error),
                    None => continue,
                },
            },
            Err(error) => Err(InvokeError::Crashed(format!("its response broke off: {error}"))),
        };
        let broken = item.is_err();
        let _ = sender.send(item).await;
        if broken {
            break;
        }
    }
    // Before the sender is dropped, by which the reader learns of the end.
    invocation.end().await;
    StatusCode::ACCEPTED
}

/// The error that a function reports after its response has begun.
fn failure(trailers: &HeaderMap) -> Option<InvokeError> {
    let kind = header(trailers, "lambda-runtime-function-error-type");
    (!kind.is_empty()).then(|| InvokeError::Function {
        kind: kind.to_owned(),
        message: header(trailers, "lambda-runtime-function-error-body").to_owned(),
    })
}

/// How a function describes an error.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Diagnostic {
    error_type: String,
    error_message: String,
}

impl Diagnostic {
    fn parse(body: &[u8]) -> Self {
        serde_json::from_slice(body).unwrap_or_else(|_| Self {
            error_type: "Unknown".to_owned(),
            error_message: String::from_utf8_lossy(body).into_owned(),
        })
    }
}

async fn error(
    State(shared): State<Arc<Shared>>,
    Path((instance, id)): Path<(String, String)>,
    body: Bytes,
) -> Answer {
    let (_, invocation) = answered(&shared, &instance, &id)?;
    let Diagnostic { error_type: kind, error_message: message } = Diagnostic::parse(&body);
    // On its own, as a response is.
    let task = tokio::spawn(async move {
        invocation.end().await;
        invocation.reply(Err(InvokeError::Function { kind, message }));
    });
    drop(task.await);
    Ok(StatusCode::ACCEPTED.into_response())
}

async fn init_error(State(shared): State<Arc<Shared>>, Path(id): Path<String>, body: Bytes) -> Answer {
    let instance = instance(&shared, &id)?;
    let Diagnostic { error_type, error_message } = Diagnostic::parse(&body);
    instance.init_failed(format!("{error_type}: {error_message}"));
    Ok(StatusCode::ACCEPTED.into_response())
}
