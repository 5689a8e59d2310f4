//! How a function's process begins, and what it does before its end.

use std::sync::{Arc, OnceLock};

use lambda_runtime::Error;

use crate::telemetry::CannotStart;

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
    let known = Arc::new(OnceLock::<Arc<C>>::new());
    let closing = Arc::clone(&known);
    let end = || async move {
        if let Some(context) = closing.get() {
            close(Arc::clone(context)).await;
        }
    };
    let (made, ()) = tokio::join!(context(made), lambda_runtime::spawn_graceful_shutdown_handler(end));
    made.map(|made| Arc::clone(known.get_or_init(|| made)))
}
