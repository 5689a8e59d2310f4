//! The chat function's binary: telemetry, context, run.

use std::convert::Infallible;
use std::sync::Arc;

use chat::{Context, handle};
use lambda_http::{Error, run_with_streaming_response, service_fn};
use shared::telemetry::CannotStart;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let context = Arc::new(Context::from_env().await.map_err(CannotStart::new)?);
    let closing = Arc::clone(&context);
    lambda_runtime::spawn_graceful_shutdown_handler(|| async move { closing.close().await }).await;
    run_with_streaming_response(service_fn(|request| {
        let context = Arc::clone(&context);
        async move { Ok::<_, Infallible>(handle(context, request).await) }
    }))
    .await
}
