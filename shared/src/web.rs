//! Requests from API Gateway and answers to it: what every HTTP function has in common.

use std::str::FromStr;
use std::time::Duration;

use aws_lambda_events::apigw::ApiGatewayProxyRequestContext;
use http::{HeaderValue, Response, StatusCode, header};
use lambda_http::request::RequestContext;
use lambda_http::{Body, Request, RequestExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::clock::{Clock, Timestamp};
use crate::error::{ApiError, Code};
use crate::groups::Groups;
use crate::idempotency::{self, IdempotencyKey, Stored};
use crate::ids::UserId;
use crate::meter::{Remaining, Standing};
use crate::metrics::{Arrived, Ending};
use crate::scope::{Caller, Operator, RequestId, RequestNote, ScopeError, TenantScope};
use crate::telemetry;

/// The header that carries a request's id.
pub const REQUEST_ID: &str = "x-request-id";

/// The header by which OpenAI's clients let themselves be told whether to repeat a request.
const SHOULD_RETRY: &str = "x-should-retry";

/// The longest that a client is expected to wait before it repeats a request by itself.
const MOST_RETRY_AFTER_S: u64 = 60;

/// Kept free at the end of an invocation, so that there is time to answer that there was none.
const MARGIN: Duration = Duration::from_millis(1_500);

/// What API Gateway says of a request.
pub fn context(request: &Request) -> Option<&ApiGatewayProxyRequestContext> {
    match request.request_context_ref() {
        Some(RequestContext::ApiGatewayV1(context)) => Some(context),
        _ => None,
    }
}

/// The request's id.
pub fn request_id(request: &Request) -> RequestId {
    RequestId::from(context(request).and_then(|c| c.request_id.clone()).unwrap_or_default())
}

/// The route that API Gateway matched, such as `/v1/documents/{id}`.
pub fn route(request: &Request) -> &str {
    context(request).and_then(|c| c.resource_path.as_deref()).unwrap_or_default()
}

/// The tenant whose process this is, where Lambda keeps tenants' processes apart. The client has no part in
/// it: API Gateway maps it from what the authorizer found out.
fn process(request: &Request) -> Option<&str> {
    request.lambda_context_ref()?.tenant_id.as_deref()
}

/// A request as it has come.
fn arrived(request: &Request, at: Timestamp) -> Arrived {
    let trace = request.lambda_context_ref().and_then(|context| context.xray_trace_id.as_deref());
    Arrived {
        request_id: request_id(request),
        method: request.method().to_string(),
        route: route(request).to_owned(),
        trace: trace.and_then(|text| text.parse().ok()),
        at,
    }
}

/// What is noted of a request.
fn note(request: &Request) -> RequestNote {
    request.extensions().get::<RequestNote>().cloned().unwrap_or_default()
}

/// Who sends a tenant's request.
///
/// # Errors
/// The refusal that the caller is to see.
pub fn caller(request: &Request) -> Result<Caller, ApiError> {
    let context = context(request).ok_or_else(|| ApiError::new(Code::InvalidKey, "not a valid API key"))?;
    let note = note(request);
    let caller = Caller::of(context, request.headers(), process(request), note.clone())?;
    note.measure(|m| m.caller = Some((caller.tenant_id().clone(), caller.credential().clone())));
    let span = tracing::Span::current();
    span.record("tenant.id", caller.tenant_id().as_str());
    span.record("key.id", caller.credential().as_str());
    Ok(caller)
}

/// Opens the control plane for an operator's request.
///
/// # Errors
/// The refusal that the caller is to see.
pub fn operator(request: &Request) -> Result<Operator, ApiError> {
    let context = context(request)
        .ok_or_else(|| ApiError::new(Code::InvalidKey, "the request is not signed by an operator"))?;
    let operator = Operator::open(context, process(request));
    if let Err(ScopeError::Misdelivered) = operator {
        note(request).measure(|measured| measured.isolation_alerts += 1);
    }
    Ok(operator?.traced(note(request).trace()))
}

/// By when the request must be answered: Lambda's deadline, less a margin to answer in.
pub fn deadline(request: &Request, clock: &Clock) -> Instant {
    let ends_ms = request.lambda_context_ref().map_or(0, |context| context.deadline);
    let now_ms = u64::try_from(clock.now().as_millis()).unwrap_or(0);
    Instant::now() + Duration::from_millis(ends_ms.saturating_sub(now_ms)).saturating_sub(MARGIN)
}

/// The second in which Lambda ends the invocation, and with it whatever it has not finished.
pub fn ends_at_s(request: &Request) -> i64 {
    let ends_ms = request.lambda_context_ref().map_or(0, |context| context.deadline);
    i64::try_from(ends_ms.div_ceil(1_000)).unwrap_or(i64::MAX)
}

/// The request's JSON body.
///
/// # Errors
/// 415 if it says that it is something else, 400 if it is not UTF-8, not JSON or not of the shape
/// wanted; the error names the field.
pub fn json<T: DeserializeOwned>(request: &Request) -> Result<T, ApiError> {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let essence = content_type.map(|value| {
        value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
    });
    if essence.is_some_and(|essence| essence != "application/json") {
        return Err(ApiError::new(Code::UnsupportedContentType, "the body must be application/json"));
    }
    let text = match request.body() {
        Body::Empty => "",
        Body::Text(text) => text,
        Body::Binary(bytes) => {
            std::str::from_utf8(bytes).map_err(|_| ApiError::invalid("body", "the body is not UTF-8 text"))?
        }
        _ => return Err(ApiError::invalid("body", "the body cannot be read")),
    };
    // serde would take a list of an object's fields' values for the object.
    if text.trim_ascii_start().starts_with('[') {
        return Err(ApiError::invalid("body", "the body must be a JSON object"));
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value: T = serde_path_to_error::deserialize(&mut deserializer).map_err(|e| misshapen(e, "body"))?;
    deserializer.end().map_err(|error| ApiError::invalid("body", error.to_string()))?;
    Ok(value)
}

/// The route with its parameters filled in: what a request is about, however it is spelled.
fn place(request: &Request) -> String {
    let mut place = route(request).to_owned();
    if let Some(parameters) = request.path_parameters_ref() {
        for (name, value) in parameters.iter() {
            place = place.replace(&format!("{{{name}}}"), value);
        }
    }
    place
}

/// The request's idempotency key, if it has one.
///
/// # Errors
/// 400 if the header holds none.
pub fn idempotency_key(request: &Request, scope: &TenantScope) -> Result<Option<IdempotencyKey>, ApiError> {
    idempotency_key_of(request, scope.user_id(), scope.groups())
}

/// As [`idempotency_key`], of an operator's request.
///
/// # Errors
/// 400 if the header holds none.
pub fn operators_idempotency_key(
    request: &Request,
    _operator: &Operator,
) -> Result<Option<IdempotencyKey>, ApiError> {
    idempotency_key_of(request, None, &Groups::default())
}

fn idempotency_key_of(
    request: &Request,
    user: Option<&UserId>,
    groups: &Groups,
) -> Result<Option<IdempotencyKey>, ApiError> {
    let Some(text) = request.headers().get(idempotency::HEADER) else { return Ok(None) };
    let body: &[u8] = match request.body() {
        Body::Text(text) => text.as_bytes(),
        Body::Binary(bytes) => bytes,
        _ => &[],
    };
    IdempotencyKey::new(text.as_bytes(), &place(request), user, groups, body)
        .map(Some)
        .map_err(|e| ApiError::invalid("Idempotency-Key", e.to_string()))
}

/// A first result, once more.
pub fn repeated<B: From<String>>(stored: Stored) -> Response<B> {
    let status = StatusCode::from_u16(stored.status).unwrap_or(StatusCode::OK);
    json_response(status, stored.body)
}

/// A part of a JSON body that was taken apart before.
///
/// # Errors
/// 400 if it is not of the shape wanted; the error names the field.
pub fn value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|e| misshapen(e, ""))
}

/// Names the field that does not fit; `whole` is the name of the value itself.
fn misshapen(error: serde_path_to_error::Error<serde_json::Error>, whole: &str) -> ApiError {
    let path = error.path().to_string();
    // Where the text ends too early, the place within is not known: then it is what is around it.
    let path = if path == "?" { "." } else { path.trim_end_matches(".?") };
    let message = error.into_inner().to_string();
    // A field that is missing or unknown has no path of its own, but serde's message quotes it.
    let quoted = message.split('`').nth(1).filter(|_| message.contains(" field `"));
    let param = match (path, quoted) {
        (".", Some(field)) => field.to_owned(),
        (".", None) => whole.to_owned(),
        (path, Some(field)) if !path.ends_with(field) => format!("{path}.{field}"),
        (path, _) => path.to_owned(),
    };
    ApiError {
        param: Some(param).filter(|param| !param.is_empty()),
        ..ApiError::new(Code::InvalidRequest, message)
    }
}

/// An identifier of the path. One that cannot be is like one that is not there.
///
/// # Errors
/// 404.
pub fn path_id<T: FromStr>(request: &Request, name: &str) -> Result<T, ApiError> {
    let parameters = request.path_parameters_ref();
    parameters.and_then(|p| p.first(name)).and_then(|text| text.parse().ok()).ok_or_else(ApiError::not_found)
}

/// A parameter of the query string, if it is there.
///
/// # Errors
/// 400 if it does not parse.
pub fn query<T: FromStr>(request: &Request, name: &'static str) -> Result<Option<T>, ApiError> {
    let parameters = request.query_string_parameters_ref();
    let value = parameters.and_then(|p| p.first(name)).map(str::parse);
    value.transpose().map_err(|_| ApiError::invalid(name, format!("{name} is malformed")))
}

/// The size of a page that the query asks for: `limit`, 1 to 100, 20 if it does not say.
///
/// # Errors
/// 400 if it is anything else.
pub fn page_size(request: &Request) -> Result<u16, ApiError> {
    match query::<u16>(request, "limit")? {
        None => Ok(20),
        Some(limit @ 1..=100) => Ok(limit),
        Some(_) => Err(ApiError::invalid("limit", "limit must be between 1 and 100")),
    }
}

/// An answer of that status with `value` as its JSON body.
pub fn reply<B: From<String>>(status: StatusCode, value: &impl Serialize) -> Response<B> {
    let text = match serde_json::to_string(value) {
        Ok(text) => text,
        Err(error) => {
            tracing::error!("An answer does not serialise: {error}");
            let failure = ApiError::unavailable("the answer");
            return reply(failure.code.status(), &failure);
        }
    };
    json_response(status, text)
}

fn json_response<B: From<String>>(status: StatusCode, text: String) -> Response<B> {
    let mut response = Response::new(B::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The headers that say what is left, by the names and in the form that OpenAI's clients know: a
/// duration such as `1h2m3s` or `250ms`.
fn say_standing(standing: &Standing, headers: &mut http::HeaderMap) {
    let mut say = |name: &'static str, value: String| {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(name, value);
        }
    };
    let Remaining { limit, remaining, reset_ms } = standing.requests;
    say("x-ratelimit-limit-requests", limit.to_string());
    say("x-ratelimit-remaining-requests", remaining.to_string());
    say("x-ratelimit-reset-requests", duration(reset_ms));
    let Remaining { limit, remaining, reset_ms } = standing.tokens;
    say("x-ratelimit-limit-tokens", limit.to_string());
    say("x-ratelimit-remaining-tokens", remaining.to_string());
    say("x-ratelimit-reset-tokens", duration(reset_ms));
}

fn duration(ms: u64) -> String {
    if ms < 1_000 {
        return format!("{ms}ms");
    }
    let seconds = ms.div_ceil(1_000);
    let (hours, minutes, seconds) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

/// One of those who work on a request is done with it; the last one writes its line.
pub fn conclude(note: &RequestNote, ending: Ending, clock: &Clock) {
    if let Some(line) = note.conclude(ending, clock.now()) {
        telemetry::emit(line);
    }
}

/// Runs one request: answers an error in the common shape, stamps the request's id, and writes the
/// one line that the log has of it; unless it goes on ([`RequestNote::hold`]), when whoever ends it does.
pub async fn handle<B: From<String>>(
    mut request: Request,
    clock: &Clock,
    run: impl AsyncFnOnce(Request) -> Result<Response<B>, ApiError>,
) -> Response<B> {
    use tracing::Instrument;

    let id = request_id(&request);
    let note = RequestNote::of(arrived(&request, clock.now()));
    request.extensions_mut().insert(note.clone());
    let span = tracing::info_span!(
        "request",
        request.id = %id,
        http.method = %request.method(),
        http.route = route(&request),
        tenant.id = tracing::field::Empty,
        key.id = tracing::field::Empty,
    );
    async {
        // Boxed, and so are what is nested deepest: the runtime moves this future about.
        let result = Box::pin(run(request)).await;
        let error = result.as_ref().err().map(|error| error.code);
        let mut response = match result {
            Ok(response) => response,
            Err(error) => {
                let status = error.code.status();
                let mut response = reply(status, &error.body(&id));
                let wait_s = error.retry_after_ms.map(|ms| ms.div_ceil(1_000));
                if let Some(seconds) = wait_s {
                    response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
                }
                // OpenAI's clients repeat by themselves what was answered 429: in vain, where it stays so.
                if status == StatusCode::TOO_MANY_REQUESTS && wait_s.is_none_or(|s| s > MOST_RETRY_AFTER_S) {
                    response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
                }
                response
            }
        };
        if let Some(standing) = note.standing() {
            say_standing(&standing, response.headers_mut());
        }
        if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        conclude(&note, Ending { status: response.status(), error }, clock);
        response
    }
    .instrument(span)
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        for (ms, text) in [
            (0, "0ms"),
            (999, "999ms"),
            (1_000, "1s"),
            (59_001, "1m0s"),
            (61_000, "1m1s"),
            (3_600_000, "1h0m0s"),
            (90_061_000, "25h1m1s"),
        ] {
            assert_eq!(duration(ms), text);
        }
    }
}
