//! The chat function's binary: telemetry, context, run.

use std::convert::Infallible;
use std::sync::Arc;

use chat::{Context, handle};
use lambda_http::{Error, run_with_streaming_response, service_fn};
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let close = |context: Arc<Context>| async move { context.close().await };
    let context = Box::pin(start::closing_context(Context::from_env(), close)).await?;
    run_with_streaming_response(service_fn(|request| {
        let context = Arc::clone(&context);
        async move { Ok::<_, Infallible>(handle(context, request).await) }
    }))
    .await
}
