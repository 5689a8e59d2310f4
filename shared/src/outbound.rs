//! Calls to paid HTTP services: bounded in time, repeated only while nothing has been answered.

use std::time::Duration;

use http::StatusCode;
use reqwest::{RequestBuilder, Url};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use crate::error::{ApiError, Code};
use crate::random;
use crate::retry::Backoff;
use crate::roots::RootsError;
use crate::trace::{self, Trace};

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    /// The time was up.
    #[error("no answer within the time allowed")]
    Deadline,
    /// The service asks to come later, or says it is overloaded.
    #[error("the service is overloaded (HTTP {status})")]
    Overloaded {
        /// Its status.
        status: StatusCode,
        /// When to come again, if it said so.
        retry_after: Option<Duration>,
    },
    /// The service refused the request as it is: our mistake, or its configuration.
    #[error("the service refused the request (HTTP {status}, {kind})")]
    Refused {
        /// Its status.
        status: StatusCode,
        /// The error's kind as the service names it; never its message, which may quote the request.
        kind: String,
    },
    /// The service answered with an error of its own.
    #[error("the service failed (HTTP {0})")]
    Failed(StatusCode),
    /// The service could not be reached, or the connection broke.
    #[error("the service cannot be reached")]
    Connection(#[source] reqwest::Error),
    /// The service answered something that its protocol does not allow.
    #[error("the service answered something unexpected: {0}")]
    Malformed(String),
}

impl OutboundError {
    /// Whether the service is overloaded, and in how many milliseconds it wants to be asked again.
    pub fn overload(&self) -> Option<Option<u64>> {
        match self {
            Self::Overloaded { retry_after, .. } => {
                Some(retry_after.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)))
            }
            _ => None,
        }
    }

    /// Whether the service may have done, and may charge for, what it did not answer. A service that
    /// answers with an error charges nothing; one that was not reached did nothing.
    pub fn may_have_cost(&self) -> bool {
        match self {
            Self::Deadline | Self::Malformed(_) => true,
            Self::Connection(error) => !error.is_connect(),
            Self::Overloaded { .. } | Self::Refused { .. } | Self::Failed(_) => false,
        }
    }

    /// What the caller sees where `what` (such as "the model") failed. The failure itself is logged
    /// here, once.
    pub fn into_api(self, what: &'static str) -> ApiError {
        match &self {
            Self::Connection(source) => tracing::error!("{what}: {self}: {source}"),
            other => tracing::error!("{what}: {other}"),
        }
        match self {
            Self::Deadline => ApiError::new(
                Code::DeadlineExceeded,
                format!("{what} did not answer within the time allowed"),
            ),
            Self::Overloaded { retry_after, .. } => ApiError {
                retry_after_ms: retry_after.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
                ..ApiError::new(Code::ModelUnavailable, format!("{what} is overloaded; try again"))
            },
            Self::Refused { .. } | Self::Failed(_) | Self::Connection(_) | Self::Malformed(_) => {
                ApiError::new(Code::ModelUnavailable, format!("{what} failed; try again"))
            }
        }
    }
}

/// A client for all of a function's outbound calls; connections are kept between invocations. `tls` is that of
/// [`crate::roots::outbound`].
///
/// # Errors
/// If the client does not start.
pub fn client(tls: ClientConfig) -> Result<reqwest::Client, RootsError> {
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .connect_timeout(Duration::from_secs(3))
        // Below the idle time of the services' load balancers, so that a thawed function does not
        // write into a connection that is gone.
        .pool_idle_timeout(Duration::from_secs(30))
        .redirect(reqwest::redirect::Policy::none())
        .user_agent("bulkhead")
        .build()?;
    Ok(client)
}

/// How paid calls are repeated: only where the service has done nothing, so none is paid twice.
const BACKOFF: Backoff =
    Backoff { attempts: 3, base: Duration::from_millis(300), cap: Duration::from_secs(4) };

/// Sends what `request` builds until something other than a passing failure is answered, `deadline`
/// is reached or the attempts are used up. The answer's body is unread. The service is told where in a
/// `trace` it is called.
///
/// # Errors
/// [`OutboundError`], of the last attempt.
pub async fn send(
    request: impl Fn() -> RequestBuilder,
    trace: Option<&Trace>,
    deadline: Instant,
) -> Result<reqwest::Response, OutboundError> {
    let mut failed = 0;
    loop {
        let mut request = request();
        if let Some(trace) = trace {
            request = request.header(trace::HEADER, trace.header());
        }
        let (error, asked) = match timeout_at(deadline, request.send()).await {
            Err(_) => return Err(OutboundError::Deadline),
            Ok(Err(error)) => (OutboundError::Connection(error), None),
            Ok(Ok(response)) => match judge(response).await {
                Ok(response) => return Ok(response),
                Err(Verdict::Final(error)) => return Err(error),
                Err(Verdict::Passing(error, asked)) => (error, asked),
            },
        };
        if error.may_have_cost() {
            // A connection that broke once the request was on its way: what it asked for may be done,
            // and paid for, already.
            return Err(error);
        }
        failed += 1;
        let Some(wait) = BACKOFF.wait(failed, asked, &mut random::entropy()) else { return Err(error) };
        if Instant::now() + wait >= deadline {
            return Err(error);
        }
        tracing::warn!(
            attempt = failed,
            wait_ms = wait.as_millis() as u64,
            "Outbound call failed, trying again: {error}"
        );
        tokio::time::sleep(wait).await;
    }
}

/// The JSON that is answered to what `request` builds, as by [`send`], read by `deadline` too.
///
/// # Errors
/// [`OutboundError`]; [`OutboundError::Connection`] too if it is no such JSON.
pub(crate) async fn json<T: DeserializeOwned>(
    request: impl Fn() -> RequestBuilder,
    trace: Option<&Trace>,
    deadline: Instant,
) -> Result<T, OutboundError> {
    let response = send(request, trace, deadline).await?;
    let read = timeout_at(deadline, response.json()).await.map_err(|_| OutboundError::Deadline)?;
    read.map_err(OutboundError::Connection)
}

/// `path` below `base`, whether or not `base` ends with a slash.
pub(crate) fn joined(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    url.set_path(&format!("{}/{path}", base.path().trim_end_matches('/')));
    url
}

enum Verdict {
    Final(OutboundError),
    Passing(OutboundError, Option<Duration>),
}

async fn judge(response: reqwest::Response) -> Result<reqwest::Response, Verdict> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok());
    let number = |name| header(name).and_then(|v| v.parse::<u32>().ok());
    let retry_after = number("retry-after-ms")
        .map(|ms| Duration::from_millis(ms.into()))
        .or_else(|| number("retry-after").map(|s| Duration::from_secs(s.into())));
    let passing = match header("x-should-retry") {
        Some("true") => true,
        Some("false") => false,
        _ => matches!(status.as_u16(), 408 | 409 | 429 | 500..),
    };
    let error = match status.as_u16() {
        429 | 503 | 529 => OutboundError::Overloaded { status, retry_after },
        500.. => OutboundError::Failed(status),
        _ => OutboundError::Refused { status, kind: kind(response).await },
    };
    Err(if passing { Verdict::Passing(error, retry_after) } else { Verdict::Final(error) })
}

/// The error's kind in an answer of the shape `{"error":{"type":…}}`, which these services share.
async fn kind(response: reqwest::Response) -> String {
    let body: serde_json::Value = response.json().await.unwrap_or_default();
    let kind = body.pointer("/error/type").and_then(|v| v.as_str()).unwrap_or("unknown");
    kind.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answering;

    #[test]
    fn a_base_may_have_a_path() {
        let url = |base: &str| joined(&base.parse().unwrap(), "v1/messages").to_string();
        assert_eq!(url("https://h"), "https://h/v1/messages");
        assert_eq!(url("https://h/proxy/"), "https://h/proxy/v1/messages");
    }

    /// As [`answering::service`].
    async fn service(answers: Vec<Option<&str>>) -> (Url, tokio::task::JoinHandle<usize>) {
        let answers = answers.into_iter().map(|answer| answer.map(str::to_owned)).collect();
        let (address, came) = answering::service(answers).await;
        (address.parse().unwrap(), came)
    }

    async fn send_to(url: &Url) -> Result<reqwest::Response, OutboundError> {
        let client = client(crate::roots::outbound().unwrap()).unwrap();
        send(|| client.post(url.clone()).body("{}"), None, Instant::now() + Duration::from_secs(10)).await
    }

    #[tokio::test]
    async fn what_may_have_cost_is_not_asked_for_again() {
        const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        const BUSY: &str = "HTTP/1.1 529 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        // The connection breaks once the request is on its way.
        let (url, came) = service(vec![None, Some(OK)]).await;
        let error = send_to(&url).await.unwrap_err();
        assert!(matches!(error, OutboundError::Connection(_)) && error.may_have_cost(), "{error}");
        assert_eq!(came.await.unwrap(), 1);
        // A service that says that it did nothing is asked again.
        let (url, came) = service(vec![Some(BUSY), Some(OK)]).await;
        assert!(send_to(&url).await.unwrap().status().is_success());
        assert_eq!(came.await.unwrap(), 2);
        // Nobody was there to do anything.
        let (url, came) = service(Vec::new()).await;
        assert_eq!(came.await.unwrap(), 0);
        assert!(!send_to(&url).await.unwrap_err().may_have_cost());
    }
}
