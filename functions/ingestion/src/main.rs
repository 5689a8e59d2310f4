//! The ingestion function's binary: telemetry, context, run.

use std::convert::Infallible;
use std::sync::Arc;

use ingestion::{Context, handle, keep_to_itself};
use lambda_http::{Error, run, service_fn};
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    keep_to_itself()?;
    shared::telemetry::init()?;
    let close = |context: Arc<Context>| async move { context.close().await };
    let context = Box::pin(start::closing_context(Context::from_env(), close)).await?;
    run(service_fn(|request| {
        let context = Arc::clone(&context);
        async move { Ok::<_, Infallible>(handle(&context, request).await) }
    }))
    .await
}
