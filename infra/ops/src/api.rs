//! The operators' routes, as this program calls them: signed with AWS keys, answered in the API's words.

use std::fmt;
use std::time::{Duration, SystemTime};

use aws_config::BehaviorVersion;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use http::{HeaderMap, Method, StatusCode, header};
use reqwest::redirect::Policy;
use reqwest::{Client, Url};
use serde::Deserialize;
use serde_json::{Map, Value};
use shared::cause;
use shared::clock::Clock;
use shared::idempotency;
use shared::one_line::OneLine;
use shared::random::{base62, entropy};

/// The variable that names the API where `--endpoint` does not.
pub const ENDPOINT: &str = "BULKHEAD_ENDPOINT";
/// The service in the scope of a signature.
const SERVICE: &str = "execute-api";
/// API Gateway answers within 29 seconds, whatever happens behind it.
const CONNECT: Duration = Duration::from_secs(5);
const WHOLE: Duration = Duration::from_secs(35);
/// Items of a page.
const PAGE: u32 = 100;

/// Why a command did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The API cannot be asked: no address, no keys, no region.
    #[error("{0}")]
    Setup(String),
    /// The tenant's id was not typed again.
    #[error("nothing was deleted: {0:?} is not the tenant's id, which has to be typed again, or --yes given")]
    Unconfirmed(String),
    /// The API answered with an error.
    #[error("{0}")]
    Answered(Refusal),
    /// The API did not answer. What was asked for may have been done.
    #[error("no answer from {endpoint}: {}", OneLine(problem))]
    Silent {
        /// Where it was asked.
        endpoint: String,
        /// What happened.
        problem: String,
    },
    /// What answered is not this API.
    #[error("{endpoint} answers what is not understood: {}", OneLine(problem))]
    Strange {
        /// Where it was asked.
        endpoint: String,
        /// What is wrong.
        problem: String,
    },
    /// The answer cannot be written.
    #[error("the output cannot be written: {0}")]
    Output(#[from] std::io::Error),
}

impl CallError {
    /// How the program exits with it: 1 if the API refuses, 2 if it was not asked, 3 if it fails or is
    /// not there, so that asking again may help.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setup(_) | Self::Unconfirmed(_) | Self::Output(_) => 2,
            Self::Answered(refusal) if !refusal.passes() => 1,
            Self::Answered(_) | Self::Silent { .. } | Self::Strange { .. } => 3,
        }
    }

    /// Whether asking again may help.
    pub(crate) fn passes(&self) -> bool {
        match self {
            Self::Answered(refusal) => refusal.passes(),
            Self::Silent { .. } => true,
            _ => false,
        }
    }
}

/// An error of the API, on one line.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    code: String,
    message: String,
    param: Option<String>,
    request_id: String,
}

impl Refusal {
    fn passes(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::TOO_MANY_REQUESTS
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, code, message, param, request_id } = self;
        write!(f, "{} {}: {}", status.as_u16(), OneLine(code), OneLine(message))?;
        if let Some(param) = param {
            write!(f, " [{}]", OneLine(param))?;
        }
        write!(f, " (request {})", OneLine(request_id))
    }
}

/// An error as the API writes it.
#[derive(Deserialize)]
struct Wire {
    error: WireError,
    #[serde(default)]
    request_id: String,
}

#[derive(Deserialize)]
struct WireError {
    code: String,
    message: String,
    param: Option<String>,
}

/// An answer: its text as it came.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) text: String,
    pub(crate) next_cursor: Option<String>,
    endpoint: String,
}

impl Reply {
    /// The object that it is.
    pub(crate) fn object(&self) -> Result<Map<String, Value>, CallError> {
        serde_json::from_str(&self.text).map_err(|error| self.strange(&error.to_string()))
    }

    pub(crate) fn strange(&self, problem: &str) -> CallError {
        CallError::Strange { endpoint: self.endpoint.clone(), problem: problem.to_owned() }
    }
}

/// The API of one deployment, spoken to as one operator.
pub struct Api {
    http: Client,
    endpoint: Url,
    region: String,
    keys: SharedCredentialsProvider,
    clock: Clock,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("endpoint", &self.endpoint.as_str()).finish_non_exhaustive()
    }
}

impl Api {
    /// The API at that address, with the keys and the region that AWS tools would use here.
    ///
    /// # Errors
    /// If it has no address that secrets may be sent to, or there is no region or no key.
    pub async fn open(endpoint: Option<&str>) -> Result<Self, CallError> {
        let endpoint = parse_endpoint(endpoint)?;
        let config = aws_config::defaults(BehaviorVersion::latest()).load().await;
        let region = config.region().ok_or_else(|| {
            CallError::Setup("no region is set: AWS_REGION or the profile's `region` names it".into())
        })?;
        let keys = config.credentials_provider().ok_or_else(|| no_keys("none is configured"))?;
        let http = Client::builder()
            .connect_timeout(CONNECT)
            .timeout(WHOLE)
            // A signature is for one address; what another says is no answer of this API.
            .redirect(Policy::none())
            .build()
            .map_err(|error| CallError::Setup(cause::told(&error)))?;
        Ok(Self { http, endpoint, region: region.to_string(), keys, clock: Clock::system() })
    }

    pub(crate) async fn get(&self, path: &[&str], query: &[(&str, String)]) -> Result<Reply, CallError> {
        self.call(Method::GET, path, query, "application/json", None, None).await
    }

    pub(crate) async fn get_csv(&self, path: &[&str], query: &[(&str, String)]) -> Result<Reply, CallError> {
        self.call(Method::GET, path, query, "text/csv", None, None).await
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &[&str],
        body: Option<&Value>,
    ) -> Result<Reply, CallError> {
        self.call(method, path, &[], "application/json", body, None).await
    }

    pub(crate) async fn delete(&self, path: &[&str], query: &[(&str, String)]) -> Result<Reply, CallError> {
        self.call(Method::DELETE, path, query, "application/json", None, None).await
    }

    /// As [`Api::send`], for what must not be done twice however often the request arrives.
    pub(crate) async fn send_once(
        &self,
        method: Method,
        path: &[&str],
        body: &Value,
    ) -> Result<Reply, CallError> {
        let once = base62(22, &mut entropy());
        self.call(method, path, &[], "application/json", Some(body), Some(&once)).await
    }

    /// All pages of a list.
    pub(crate) async fn all(
        &self,
        path: &[&str],
        query: &[(&str, String)],
        plural: &str,
    ) -> Result<Vec<Value>, CallError> {
        let mut found = Vec::new();
        let mut cursor = None;
        loop {
            let query = page(query, cursor);
            let reply = self.get(path, &query).await?;
            let mut object = reply.object()?;
            let Some(Value::Array(items)) = object.remove(plural) else {
                return Err(reply.strange(&format!("a list without `{plural}`")));
            };
            found.extend(items);
            cursor = object.get("cursor").and_then(Value::as_str).map(str::to_owned);
            if cursor.is_none() {
                return Ok(found);
            }
        }
    }

    async fn call(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, String)],
        accept: &'static str,
        body: Option<&Value>,
        once: Option<&str>,
    ) -> Result<Reply, CallError> {
        let mut url = self.endpoint.clone();
        // Each is a segment of its own, whatever it holds; the stage before them stays.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut request = self.http.request(method.clone(), url.clone()).header(header::ACCEPT, accept);
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(once) = once {
            request = request.header(idempotency::HEADER, once);
        }
        for (name, value) in self.signature(&method, &url, body.as_bytes(), once).await? {
            request = request.header(name, value);
        }
        let silent = |error: reqwest::Error| CallError::Silent {
            endpoint: self.endpoint.to_string(),
            problem: cause::told(&error.without_url()),
        };
        let response = request.body(body).send().await.map_err(silent)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let text = response.text().await.map_err(silent)?;
        if status.is_success() {
            let next_cursor = of(&headers, "x-next-cursor");
            return Ok(Reply { text, next_cursor, endpoint: self.endpoint.to_string() });
        }
        Err(CallError::Answered(refusal(status, &headers, &text)))
    }

    /// The headers that sign a request.
    async fn signature(
        &self,
        method: &Method,
        url: &Url,
        body: &[u8],
        once: Option<&str>,
    ) -> Result<Vec<(String, String)>, CallError> {
        let keys = self.keys.provide_credentials().await.map_err(|error| no_keys(&cause::told(&error)))?;
        let identity = keys.into();
        let now = u64::try_from(self.clock.now().as_millis()).unwrap_or(0);
        let unsigned = |error: &(dyn std::error::Error + 'static)| {
            CallError::Setup(format!("the request cannot be signed: {}", cause::told(error)))
        };
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name(SERVICE)
            .time(SystemTime::UNIX_EPOCH + Duration::from_millis(now))
            .settings(SigningSettings::default())
            .build()
            .map_err(|error| unsigned(&error))?
            .into();
        // Signed, so that nobody can send it again under another.
        let headers = once.into_iter().map(|once| (idempotency::HEADER, once));
        let request = SignableRequest::new(method.as_str(), url.as_str(), headers, SignableBody::Bytes(body))
            .map_err(|error| unsigned(&error))?;
        let (instructions, _) = sign(request, &params).map_err(|error| unsigned(&error))?.into_parts();
        Ok(instructions.headers().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }
}

/// A query for a page of a list.
pub(crate) fn page<'a>(query: &[(&'a str, String)], cursor: Option<String>) -> Vec<(&'a str, String)> {
    let mut query = query.to_vec();
    query.push(("limit", PAGE.to_string()));
    query.extend(cursor.map(|cursor| ("cursor", cursor)));
    query
}

fn parse_endpoint(text: Option<&str>) -> Result<Url, CallError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        let message = format!(
            "where is the API? --endpoint or {ENDPOINT} says so: the stack's output ApiUrl, or \
             http://127.0.0.1:9000 for the local stack"
        );
        return Err(CallError::Setup(message));
    };
    let wrong = |why: &str| CallError::Setup(format!("{:?} is no address of an API: {why}", OneLine(text)));
    let url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
    let near = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
    match url.scheme() {
        "https" => {}
        "http" if near => {}
        "http" => return Err(wrong("without TLS only this machine is spoken to, since keys are sent back")),
        _ => return Err(wrong("it begins with https://")),
    }
    if url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() {
        return Err(wrong("it is a host, and the stage if there is one"));
    }
    Ok(url)
}

fn no_keys(why: &str) -> CallError {
    CallError::Setup(format!("no AWS keys: {}", OneLine(why)))
}

fn of(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// The API's error, or what can be told of another's.
fn refusal(status: StatusCode, headers: &HeaderMap, text: &str) -> Refusal {
    let from_header = || {
        of(headers, "x-request-id").or_else(|| of(headers, "x-amzn-requestid")).unwrap_or("unknown".into())
    };
    match serde_json::from_str(text) {
        Ok(Wire { error: WireError { code, message, param }, request_id }) => {
            let request_id = if request_id.is_empty() { from_header() } else { request_id };
            Refusal { status, code, message, param, request_id }
        }
        Err(_) => Refusal {
            status,
            code: "unknown".into(),
            message: text.chars().take(200).collect(),
            param: None,
            request_id: from_header(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_travel_openly_on_this_machine_alone() {
        for good in
            ["https://x.execute-api.eu-west-1.amazonaws.com/live", "http://127.0.0.1:9000", "http://[::1]:1/"]
        {
            assert!(parse_endpoint(Some(good)).is_ok(), "{good}");
        }
        for bad in ["http://example.com", "ftp://127.0.0.1", "acme", "https://a@b.c", "https://b.c?x=1"] {
            let error = parse_endpoint(Some(bad)).unwrap_err();
            assert_eq!((error.exit_code(), error.to_string().contains(bad)), (2, true), "{error}");
        }
        assert!(parse_endpoint(None).unwrap_err().to_string().contains(ENDPOINT));
    }

    #[test]
    fn an_error_is_one_line_whatever_it_says() {
        let body = r#"{"error":{"code":"conflict","message":"a\nb","param":"cell"},"request_id":"r-1"}"#;
        let shown = refusal(StatusCode::CONFLICT, &HeaderMap::new(), body).to_string();
        assert_eq!(shown, r"409 conflict: a\nb [cell] (request r-1)");
        let mut headers = HeaderMap::new();
        headers.insert("x-amzn-requestid", "r-2".parse().unwrap());
        let other = refusal(StatusCode::BAD_GATEWAY, &headers, "<html>\u{1b}[2J");
        assert_eq!(other.to_string(), r"502 unknown: <html>\u{1b}[2J (request r-2)");
        assert_eq!(CallError::Answered(other).exit_code(), 3);
    }
}
