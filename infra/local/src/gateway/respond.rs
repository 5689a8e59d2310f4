//! What the gateway answers: a function's response, or its own.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::event::Exchange;
use crate::lambda::{self, Prelude, StreamingResponse};
use crate::template::Api;

/// How long a stream may be silent.
const STREAM_IDLE: Duration = Duration::from_secs(300);
/// Headers that are the gateway's own: a function's go out under another name.
const REMAPPED: [&str; 9] = [
    "connection",
    "content-length",
    "date",
    "keep-alive",
    "server",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "www-authenticate",
];

/// The cases in which the gateway answers by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Unauthorized,
    AccessDenied,
    MissingAuthenticationToken,
    InvalidSignature,
    AuthorizerFailure,
    AuthorizerConfigurationError,
    ApiConfigurationError,
    RequestTooLarge,
    Throttled,
    IntegrationTimeout,
    BadRequest,
    FunctionFailure,
    MalformedStream,
    Unavailable,
}

impl Kind {
    /// The response type, the status unless the template sets another, and API Gateway's own words.
    fn defaults(self) -> (&'static str, StatusCode, &'static str) {
        const INTERNAL: &str = "Internal server error";
        match self {
            Self::Unauthorized => ("UNAUTHORIZED", StatusCode::UNAUTHORIZED, "Unauthorized"),
            Self::AccessDenied => {
                ("ACCESS_DENIED", StatusCode::FORBIDDEN, "User is not authorized to access this resource")
            }
            Self::MissingAuthenticationToken => {
                ("MISSING_AUTHENTICATION_TOKEN", StatusCode::FORBIDDEN, "Missing Authentication Token")
            }
            Self::InvalidSignature => {
                ("INVALID_SIGNATURE", StatusCode::FORBIDDEN, "The signature is not valid")
            }
            Self::AuthorizerFailure => ("AUTHORIZER_FAILURE", StatusCode::INTERNAL_SERVER_ERROR, INTERNAL),
            Self::AuthorizerConfigurationError => {
                ("AUTHORIZER_CONFIGURATION_ERROR", StatusCode::INTERNAL_SERVER_ERROR, INTERNAL)
            }
            Self::ApiConfigurationError => {
                ("API_CONFIGURATION_ERROR", StatusCode::INTERNAL_SERVER_ERROR, INTERNAL)
            }
            Self::RequestTooLarge => ("REQUEST_TOO_LARGE", StatusCode::PAYLOAD_TOO_LARGE, "Request Too Long"),
            Self::Throttled => ("THROTTLED", StatusCode::TOO_MANY_REQUESTS, "Too Many Requests"),
            Self::IntegrationTimeout => {
                ("INTEGRATION_TIMEOUT", StatusCode::GATEWAY_TIMEOUT, "Endpoint request timed out")
            }
            Self::BadRequest => ("DEFAULT_4XX", StatusCode::BAD_REQUEST, "Bad Request"),
            Self::FunctionFailure => ("DEFAULT_5XX", StatusCode::BAD_GATEWAY, INTERNAL),
            Self::MalformedStream => ("DEFAULT_5XX", StatusCode::INTERNAL_SERVER_ERROR, INTERNAL),
            Self::Unavailable => ("DEFAULT_5XX", StatusCode::SERVICE_UNAVAILABLE, INTERNAL),
        }
    }
}

/// An answer of the gateway's own.
#[derive(Debug)]
pub(super) struct Failure {
    kind: Kind,
    message: Option<String>,
}

impl From<Kind> for Failure {
    fn from(kind: Kind) -> Self {
        Self { kind, message: None }
    }
}

impl Failure {
    pub(super) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: Some(message.into()) }
    }

    /// The response, as the template words it.
    pub(super) fn render(&self, api: &Api, exchange: &Exchange) -> Response {
        let (name, status, own_words) = self.kind.defaults();
        let message = self.message.as_deref().unwrap_or(own_words);
        let context = |path: &str| match path {
            "requestId" | "extendedRequestId" => exchange.request_id.clone(),
            "error.message" => message.to_owned(),
            "error.messageString" => Value::from(message).to_string(),
            "error.responseType" => name.to_owned(),
            "httpMethod" => exchange.method.to_string(),
            "stage" => api.stage.clone(),
            _ => String::new(),
        };
        let fallback = if status.is_client_error() { "DEFAULT_4XX" } else { "DEFAULT_5XX" };
        let declared = api.gateway_responses.get(name).or_else(|| api.gateway_responses.get(fallback));

        let body = declared.and_then(|d| d.body.as_deref()).map(|body| substitute(body, context));
        let mut response =
            Response::new(Body::from(body.unwrap_or_else(|| json!({ "message": message }).to_string())));
        let set = declared.and_then(|d| d.status).and_then(|status| StatusCode::from_u16(status).ok());
        *response.status_mut() = set.unwrap_or(status);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, source) in declared.iter().flat_map(|d| &d.headers) {
            let value = match source.strip_prefix("context.") {
                Some(path) => context(path),
                None => source.trim_matches('\'').to_owned(),
            };
            append(headers, name, &value);
        }
        response
    }
}

/// Puts values in for `$context.<path>`.
fn substitute(template: &str, value: impl Fn(&str) -> String) -> String {
    const MARK: &str = "$context.";
    let mut result = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once(MARK) {
        result.push_str(before);
        let end =
            after.find(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '_')).unwrap_or(after.len());
        let (path, tail) = after.split_at_checked(end).unwrap_or((after, ""));
        let named = path.trim_end_matches('.');
        result.push_str(&value(named));
        result.push_str(path.strip_prefix(named).unwrap_or_default());
        rest = tail;
    }
    result.push_str(rest);
    result
}

/// What a function returns for a buffered route.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ProxyResponse {
    status_code: Value,
    #[serde(default)]
    headers: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    multi_value_headers: Option<BTreeMap<String, Vec<Value>>>,
    #[serde(default)]
    body: Option<String>,
    #[serde(default)]
    is_base64_encoded: Option<bool>,
}

/// The response of a buffered route.
pub(super) fn buffered(response: &lambda::Response) -> Result<Response, Failure> {
    if response.streamed {
        // API Gateway reads the prelude and nothing else.
        let prelude = response.prelude().map_err(malformed)?;
        return begin(&prelude, Body::empty());
    }
    let parsed: ProxyResponse = serde_json::from_slice(&response.payload).map_err(malformed)?;
    if parsed.is_base64_encoded == Some(true) {
        tracing::warn!(
            "Function answered in base64, which stays as it is: the API has no binary media types"
        );
    }
    let status = text(&parsed.status_code).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| malformed("statusCode is not a number"))?;
    let mut head = Prelude {
        status_code: status,
        headers: BTreeMap::new(),
        multi_value_headers: BTreeMap::new(),
        cookies: Vec::new(),
    };
    let value = |value: &Value| text(value).ok_or_else(|| malformed("a header is not text"));
    for (name, values) in parsed.multi_value_headers.iter().flatten() {
        let values = values.iter().map(value).collect::<Result<_, _>>()?;
        head.multi_value_headers.insert(name.to_ascii_lowercase(), values);
    }
    for (name, single) in parsed.headers.iter().flatten() {
        head.headers.insert(name.to_ascii_lowercase(), value(single)?);
    }
    begin(&head, Body::from(parsed.body.unwrap_or_default()))
}

/// The response of a streamed route. It is cut off at `deadline`, or after a long silence.
pub(super) fn streamed(response: StreamingResponse, deadline: Instant) -> Result<Response, Failure> {
    let StreamingResponse { prelude, body } = response;
    let chunks = stream::unfold(Some(body), move |body| async move {
        let mut body = body?;
        let until = deadline.min(Instant::now() + STREAM_IDLE);
        match tokio::time::timeout_at(until, body.recv()).await {
            Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some(body))),
            Ok(Some(Err(error))) => {
                tracing::warn!("Stream broke off: {error}");
                Some((Err(io::Error::other(error)), None))
            }
            Ok(None) => None,
            Err(_) => {
                tracing::warn!("Stream took too long and is cut off");
                Some((Err(io::Error::from(io::ErrorKind::TimedOut)), None))
            }
        }
    });
    begin(&prelude, Body::from_stream(chunks))
}

fn begin(prelude: &Prelude, body: Body) -> Result<Response, Failure> {
    let status = StatusCode::from_u16(prelude.status_code).ok().filter(|status| !status.is_informational());
    let mut response = Response::new(body);
    *response.status_mut() = status.ok_or_else(|| malformed("the status is not one"))?;
    let headers = response.headers_mut();
    for (name, values) in &prelude.multi_value_headers {
        values.iter().for_each(|value| append(headers, name, value));
    }
    for (name, value) in &prelude.headers {
        // Several values take the place of the one.
        if !prelude.multi_value_headers.keys().any(|several| several.eq_ignore_ascii_case(name)) {
            append(headers, name, value);
        }
    }
    prelude.cookies.iter().for_each(|cookie| append(headers, "set-cookie", cookie));
    headers.entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Adds a header; one that cannot be sent is left out, as API Gateway does.
fn append(headers: &mut HeaderMap, name: &str, value: &str) {
    let lower = name.to_ascii_lowercase();
    let name = if REMAPPED.contains(&lower.as_str()) { format!("x-amzn-remapped-{lower}") } else { lower };
    match (HeaderName::try_from(name), HeaderValue::from_str(value)) {
        (Ok(name), Ok(value)) => {
            headers.append(name, value);
        }
        _ => tracing::warn!("A response header cannot be sent and is left out"),
    }
}

/// Adds the request's id under both of its names.
pub(super) fn identified(mut response: Response, request_id: &str) -> Response {
    if let Ok(id) = HeaderValue::from_str(request_id) {
        response.headers_mut().entry("x-request-id").or_insert(id.clone());
        response.headers_mut().insert("x-amzn-requestid", id);
    }
    response
}

fn malformed(problem: impl std::fmt::Display) -> Failure {
    tracing::error!("Function's response is malformed: {problem}");
    Kind::FunctionFailure.into()
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_take_values_of_the_context() {
        let value = |path: &str| format!("<{path}>");
        assert_eq!(
            substitute(r#"{"a":"$context.requestId","b":$context.error.messageString}"#, value),
            r#"{"a":"<requestId>","b":<error.messageString>}"#
        );
        assert_eq!(substitute("$context.requestId. End $context.", value), "<requestId>. End <>");
    }
}
