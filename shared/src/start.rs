//! How a function's process begins, and what it does before its end.

use std::sync::Arc;

use http::{HeaderValue, Request};
use http_body_util::BodyExt;
use lambda_runtime::Error;
use lambda_runtime_api_client::PooledClient;
use lambda_runtime_api_client::body::Body;
use tokio::signal::unix::{SignalKind, signal};

use crate::telemetry::CannotStart;

/// What the extension is called by which Lambda knows that this process is to be told of its end.
const EXTENSION: &str = "bulkhead";
/// What Lambda calls the extension.
const IDENTIFIER: &str = "lambda-extension-identifier";

/// What a function works with.
///
/// # Errors
/// The one line that says why it cannot start.
pub async fn context<C>(made: impl Future<Output = Result<C, Error>>) -> Result<Arc<C>, CannotStart> {
    made.await.map(Arc::new).map_err(CannotStart::new)
}

/// What a function works with that has something to write down before its process ends: `close` does so.
///
/// Lambda tells a process of its end if it has an extension, and that takes a call, as do the secrets of the
/// context: both are asked for at once.
///
/// # Errors
/// The one line that says why it cannot start.
pub async fn closing_context<C, F>(
    made: impl Future<Output = Result<C, Error>>,
    close: impl FnOnce(Arc<C>) -> F + Send + 'static,
) -> Result<Arc<C>, CannotStart>
where
    C: Send + Sync + 'static,
    F: Future<Output = ()> + Send,
{
    let mut ends = signal(SignalKind::terminate()).map_err(CannotStart::new)?;
    let (made, extension) = tokio::select! {
        both = async { tokio::join!(context(made), Extension::registered()) } => both,
        // There is nothing to write down yet.
        _ = ends.recv() => std::process::exit(0),
    };
    let (made, extension) = (made?, extension.map_err(CannotStart::new)?);
    tokio::spawn(extension.wait());
    let closing = Arc::clone(&made);
    tokio::spawn(async move {
        ends.recv().await;
        close(closing).await;
        std::process::exit(0);
    });
    Ok(made)
}

/// Why a process would not be told of its end.
#[derive(Debug, thiserror::Error)]
enum NotRegistered {
    #[error("Lambda's Extensions API cannot be asked")]
    Unreachable(#[source] Error),
    #[error("Lambda's Extensions API answers {0}")]
    Refused(http::StatusCode),
    #[error("Lambda's Extensions API names no extension")]
    Unnamed,
}

/// An extension within this process that asks for no events. That there is one is why Lambda sends a signal before it
/// ends the process, and then waits for a moment.
/// <https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html>
struct Extension {
    api: PooledClient,
    identifier: HeaderValue,
}

impl Extension {
    async fn registered() -> Result<Self, NotRegistered> {
        let api = PooledClient::builder().build();
        let request = Request::post("/2020-01-01/extension/register")
            .header("lambda-extension-name", EXTENSION)
            .header("content-type", "application/json")
            .body(Body::from(r#"{"events":[]}"#))
            .map_err(|error| NotRegistered::Unreachable(error.into()))?;
        let answer = api.call(request).await.map_err(NotRegistered::Unreachable)?;
        if !answer.status().is_success() {
            return Err(NotRegistered::Refused(answer.status()));
        }
        let identifier = answer.headers().get(IDENTIFIER).cloned().ok_or(NotRegistered::Unnamed)?;
        // Read to its end, so that the connection serves once more.
        answer.into_body().collect().await.map_err(|error| NotRegistered::Unreachable(error.into()))?;
        Ok(Self { api, identifier })
    }

    /// Asks for an event, of which there is none. Lambda waits until all extensions have asked before it sends the
    /// process anything.
    async fn wait(self) {
        let next = Request::get("/2020-01-01/extension/event/next").header(IDENTIFIER, self.identifier);
        let answer = match next.body(Body::empty()) {
            Ok(next) => self.api.call(next).await.map(|answer| answer.status().to_string()),
            Err(error) => Err(error.into()),
        };
        let answer = answer.unwrap_or_else(|error| error.to_string());
        tracing::warn!("An extension without events is not left to wait for one: {answer}");
    }
}
