//! A model without a model: Anthropic's Messages interface, answered by quoting.
//!
//! It speaks the protocol (validation, citations, server-sent events, token counts, prompt caching,
//! errors) as a client sees it, and answers with the sentences of the given passages that share the
//! most with the question. It knows nothing else and says so. The `model` of its answers begins
//! with `offline-model:`, so nobody takes it for the model that was asked for.
//!
//! Tokens are those of [`crate::lexis::token_ends`], for input, output and the token counter alike.
//!
//! For tests, `POST /_faults` sets what goes wrong ([`Fault`]), and `GET /_requests?last=n` returns
//! the last requests, oldest first, as `[{"path", "api_key", "trace", "body"}]`.

mod answer;
mod cache;
mod faults;
mod request;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::net::TcpListener;

pub use self::answer::{Answer, AnswerBlock, Citation, answer};
pub use self::faults::Fault;
pub use self::request::{Block, Invalid, Message, Request, SearchResult};
use crate::serving::{TRACE_HEADER, unique_id};

const MAX_BODY: usize = 32 * 1024 * 1024;
const REMEMBERED: usize = 64;
const REMEMBERED_BYTES: usize = 64 * 1024 * 1024;
/// Announced in headers, not enforced.
const REQUESTS_PER_MINUTE: u64 = 4_000;
const TOKENS_PER_MINUTE: u64 = 4_000_000;

/// How the server behaves.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What the API keys that are let in begin with; any is, if absent. Each key is an account.
    pub api_key: Option<String>,
    /// A pause before each delta of a stream.
    pub delay_ms_per_delta: u64,
}

/// Serves the model until `shutdown` resolves. `now` ages the prompt cache.
pub async fn serve(
    listener: TcpListener,
    options: Options,
    now: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let model = Model {
        options,
        now: Box::new(now),
        cache: Mutex::default(),
        faults: faults::Faults::new(),
        seen: Mutex::default(),
        window: Mutex::default(),
    };
    let router = Router::new()
        .route("/v1/messages", post(messages))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/_faults", post(set_fault))
        .route("/_requests", get(requests))
        .fallback(|| async { Failure::new(404, "Not Found").response() })
        .layer(DefaultBodyLimit::disable())
        .with_state(Arc::new(model));
    crate::serving::serve(listener, router, shutdown).await
}

struct Model {
    options: Options,
    now: Box<dyn Fn() -> OffsetDateTime + Send + Sync>,
    cache: Mutex<cache::Cache>,
    faults: faults::Faults,
    seen: Mutex<Seen>,
    window: Mutex<Window>,
}

/// The last requests.
#[derive(Default)]
struct Seen {
    requests: VecDeque<(usize, Value)>,
    bytes: usize,
}

impl Seen {
    fn push(&mut self, path: &str, key: &str, trace: &str, body: &[u8]) {
        let parsed: Value =
            serde_json::from_slice(body).unwrap_or_else(|_| String::from_utf8_lossy(body).into());
        let request = json!({"path": path, "api_key": key, "trace": trace, "body": parsed});
        self.requests.push_back((body.len(), request));
        self.bytes += body.len();
        while self.requests.len() > REMEMBERED || (self.bytes > REMEMBERED_BYTES && self.requests.len() > 1) {
            if let Some((bytes, _)) = self.requests.pop_front() {
                self.bytes -= bytes;
            }
        }
    }
}

/// What was used in the current minute.
#[derive(Default)]
struct Window {
    minute: i64,
    requests: u64,
    tokens: u64,
}

/// An error in the interface's shape.
struct Failure {
    status: StatusCode,
    message: String,
    retry_after: Option<u64>,
}

impl Failure {
    fn new(status: u16, message: impl Into<String>) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, message: message.into(), retry_after: None }
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            402 => "billing_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            504 => "timeout_error",
            529 => "overloaded_error",
            400..500 => "invalid_request_error",
            _ => "api_error",
        }
    }

    fn response(self) -> Response {
        let id = format!("req_{}", unique_id());
        let error = json!({"type": self.kind(), "message": self.message});
        let body = json!({"type": "error", "error": error, "request_id": id});
        let mut response = (self.status, axum::Json(body)).into_response();
        set(response.headers_mut(), "request-id", &id);
        if let Some(seconds) = self.retry_after {
            set(response.headers_mut(), "retry-after", &seconds.to_string());
        }
        response
    }
}

impl From<Invalid> for Failure {
    fn from(Invalid(message): Invalid) -> Self {
        Self::new(400, message)
    }
}

fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

impl Model {
    /// What holds for every call: a key, a version, a size. Returns the key.
    fn admit(&self, path: &str, headers: &HeaderMap, body: &[u8]) -> Result<String, Failure> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let key = text("x-api-key");
        if key.is_empty() {
            return Err(Failure::new(401, "x-api-key header is required"));
        }
        if self.options.api_key.as_ref().is_some_and(|begins| !key.starts_with(begins.as_str())) {
            return Err(Failure::new(401, "invalid x-api-key"));
        }
        match text("anthropic-version") {
            "" => return Err(Failure::new(400, "anthropic-version: header is required")),
            "2023-06-01" | "2023-01-01" => {}
            other => {
                return Err(Failure::new(
                    400,
                    format!("anthropic-version: \"{other}\" is not a valid version"),
                ));
            }
        }
        if body.len() > MAX_BODY {
            return Err(Failure::new(413, "Request exceeds the maximum size"));
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(path, key, text(TRACE_HEADER), body);
        Ok(key.to_owned())
    }

    fn now(&self) -> OffsetDateTime {
        (self.now)().to_offset(time::UtcOffset::UTC)
    }

    /// Counts a request in the current minute and writes where that leaves the limits.
    fn announce_limits(&self, headers: &mut HeaderMap, tokens: u64) {
        let now = self.now();
        let minute = now.unix_timestamp().div_euclid(60);
        let (requests, tokens) = {
            let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
            if window.minute != minute {
                *window = Window { minute, ..Window::default() };
            }
            window.requests += 1;
            window.tokens += tokens;
            (window.requests, window.tokens)
        };
        let reset = OffsetDateTime::from_unix_timestamp((minute + 1) * 60)
            .ok()
            .and_then(|at| at.format(&Rfc3339).ok());
        let reset = reset.unwrap_or_default();
        set(headers, "anthropic-ratelimit-requests-limit", &REQUESTS_PER_MINUTE.to_string());
        set(
            headers,
            "anthropic-ratelimit-requests-remaining",
            &REQUESTS_PER_MINUTE.saturating_sub(requests).to_string(),
        );
        set(headers, "anthropic-ratelimit-requests-reset", &reset);
        set(headers, "anthropic-ratelimit-tokens-limit", &TOKENS_PER_MINUTE.to_string());
        set(
            headers,
            "anthropic-ratelimit-tokens-remaining",
            &TOKENS_PER_MINUTE.saturating_sub(tokens).to_string(),
        );
        set(headers, "anthropic-ratelimit-tokens-reset", &reset);
    }
}

async fn set_fault(State(model): State<Arc<Model>>, body: Bytes) -> Response {
    match serde_json::from_slice(&body) {
        Ok(fault) => {
            model.faults.set(fault);
            StatusCode::NO_CONTENT.into_response()
        }
        Err(error) => Failure::new(400, error.to_string()).response(),
    }
}

#[derive(Deserialize)]
struct Last {
    last: Option<usize>,
}

async fn requests(State(model): State<Arc<Model>>, Query(Last { last }): Query<Last>) -> Response {
    let seen = model.seen.lock().unwrap_or_else(PoisonError::into_inner);
    let skip = seen.requests.len().saturating_sub(last.unwrap_or(REMEMBERED));
    let last: Vec<&Value> = seen.requests.iter().skip(skip).map(|(_, request)| request).collect();
    axum::Json(last).into_response()
}

async fn count_tokens(State(model): State<Arc<Model>>, headers: HeaderMap, body: Bytes) -> Response {
    let counted = model
        .admit("/v1/messages/count_tokens", &headers, &body)
        .and_then(|_| Ok(Request::parse(&body, true)?.input_tokens()));
    match counted {
        Ok(tokens) => {
            let mut response = axum::Json(json!({"input_tokens": tokens})).into_response();
            set(response.headers_mut(), "request-id", &format!("req_{}", unique_id()));
            response
        }
        Err(failure) => failure.response(),
    }
}

async fn messages(State(model): State<Arc<Model>>, headers: HeaderMap, body: Bytes) -> Response {
    let key = match model.admit("/v1/messages", &headers, &body) {
        Ok(key) => key,
        Err(failure) => return failure.response(),
    };
    let request = match Request::parse(&body, false) {
        Ok(request) => request,
        Err(invalid) => return Failure::from(invalid).response(),
    };
    let fault = model.faults.next();
    match fault {
        Fault::Status { status, retry_after, .. } => {
            return Failure { retry_after, ..Failure::new(status, "A fault that was asked for") }.response();
        }
        Fault::Hang { n: None, .. } => return std::future::pending().await,
        Fault::Hang { .. } if !request.stream => return std::future::pending().await,
        Fault::ErrorEventAfterDeltas { .. } if !request.stream => {
            return Failure::new(529, "Overloaded").response();
        }
        _ => {}
    }
    let input =
        model.cache.lock().unwrap_or_else(PoisonError::into_inner).account(&key, &request, model.now());
    let answer = answer(&request);
    let reply = Reply {
        id: format!("msg_{}", unique_id()),
        model: format!("offline-model:{}", request.model),
        input,
        answer,
    };
    let tokens = input.total() + reply.answer.output_tokens;
    let mut response = if request.stream {
        let delay = Duration::from_millis(model.options.delay_ms_per_delta);
        let mut response = Response::new(Body::from_stream(played(reply.events(), delay, fault)));
        set(response.headers_mut(), "content-type", "text/event-stream; charset=utf-8");
        set(response.headers_mut(), "cache-control", "no-cache");
        response
    } else if let Fault::CutAfterDeltas { .. } = fault {
        let mut response = Response::new(Body::from_stream(stream::iter([
            Ok(Bytes::from_static(b"{\"id\":")),
            Err(io::Error::from(io::ErrorKind::ConnectionReset)),
        ])));
        set(response.headers_mut(), "content-type", "application/json");
        response
    } else {
        axum::Json(reply.json()).into_response()
    };
    set(response.headers_mut(), "request-id", &format!("req_{}", unique_id()));
    model.announce_limits(response.headers_mut(), tokens);
    response
}

/// An answer on its way out.
struct Reply {
    id: String,
    model: String,
    input: cache::Input,
    answer: Answer,
}

/// One server-sent event.
struct Event {
    name: &'static str,
    data: Value,
}

impl Reply {
    fn usage(&self, output_tokens: u64) -> Value {
        json!({
            "input_tokens": self.input.fresh,
            "cache_creation_input_tokens": self.input.written_5m + self.input.written_1h,
            "cache_read_input_tokens": self.input.read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": self.input.written_5m,
                "ephemeral_1h_input_tokens": self.input.written_1h,
            },
            "output_tokens": output_tokens,
            "service_tier": "standard",
        })
    }

    fn message(&self, content: Value, stop: (Value, Value), output_tokens: u64) -> Value {
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": stop.0,
            "stop_sequence": stop.1,
            "usage": self.usage(output_tokens),
        })
    }

    fn json(&self) -> Value {
        let content = self
            .answer
            .blocks
            .iter()
            .map(|block| match &block.citation {
                Some(citation) => json!({"type": "text", "text": block.text, "citations": [citation.json()]}),
                None => json!({"type": "text", "text": block.text}),
            })
            .collect();
        let stop = (json!(self.answer.stop_reason), json!(self.answer.stop_sequence));
        self.message(content, stop, self.answer.output_tokens)
    }

    /// The same answer as a stream.
    fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut push = |name, data: Value| events.push(Event { name, data });
        let begun = self.message(json!([]), (Value::Null, Value::Null), 1);
        push("message_start", json!({"type": "message_start", "message": begun}));
        for (index, block) in self.answer.blocks.iter().enumerate() {
            let empty = match block.citation {
                Some(_) => json!({"type": "text", "text": "", "citations": []}),
                None => json!({"type": "text", "text": ""}),
            };
            push(
                "content_block_start",
                json!({"type": "content_block_start", "index": index, "content_block": empty}),
            );
            if index == 0 {
                push("ping", json!({"type": "ping"}));
            }
            let mut delta = |delta: Value| {
                push(
                    "content_block_delta",
                    json!({"type": "content_block_delta", "index": index, "delta": delta}),
                )
            };
            for piece in block.text.split_inclusive(char::is_whitespace) {
                delta(json!({"type": "text_delta", "text": piece}));
            }
            if let Some(citation) = &block.citation {
                delta(json!({"type": "citations_delta", "citation": citation.json()}));
            }
            push("content_block_stop", json!({"type": "content_block_stop", "index": index}));
        }
        let stop =
            json!({"stop_reason": self.answer.stop_reason, "stop_sequence": self.answer.stop_sequence});
        let usage = self.usage(self.answer.output_tokens);
        push("message_delta", json!({"type": "message_delta", "delta": stop, "usage": usage}));
        push("message_stop", json!({"type": "message_stop"}));
        events
    }
}

/// Plays events as a body, in their time and with the fault.
fn played(
    events: Vec<Event>,
    delay: Duration,
    fault: Fault,
) -> impl stream::Stream<Item = io::Result<Bytes>> + Send + 'static {
    struct Play {
        events: std::vec::IntoIter<Event>,
        deltas: usize,
        over: bool,
    }
    let play = Play { events: events.into_iter(), deltas: 0, over: false };
    stream::unfold((play, fault), move |(mut play, fault)| async move {
        if play.over {
            return None;
        }
        let event = play.events.next()?;
        let is_delta = event.name == "content_block_delta";
        // A fault strikes where the delta behind the last good one would come, or at the end.
        if is_delta || event.name == "message_delta" {
            let strikes = |n: usize| play.deltas >= n || !is_delta;
            match fault {
                Fault::CutAfterDeltas { n, .. } if strikes(n) => {
                    // What was sent must leave before the connection does.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    play.over = true;
                    return Some((Err(io::ErrorKind::ConnectionReset.into()), (play, fault)));
                }
                Fault::ErrorEventAfterDeltas { n, .. } if strikes(n) => {
                    play.over = true;
                    let error = json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}});
                    return Some((Ok(encode("error", &error)), (play, fault)));
                }
                Fault::Hang { n: Some(n), .. } if strikes(n) => std::future::pending().await,
                _ => {}
            }
        }
        if is_delta {
            play.deltas += 1;
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
        }
        Some((Ok(encode(event.name, &event.data)), (play, fault)))
    })
}

fn encode(name: &str, data: &Value) -> Bytes {
    format!("event: {name}\ndata: {data}\n\n").into()
}
