//! The binary of the function that reads uploaded files: telemetry, context, run.

use std::sync::Arc;

use ingestion::worker::{Context, handle};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::clock::Timestamp;
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let close = |context: Arc<Context>| async move { context.close().await };
    let context = start::closing_context(Context::from_env(), close).await?;
    run(service_fn(|event: LambdaEvent<_>| {
        let context = Arc::clone(&context);
        let deadline = Timestamp::from_millis(i64::try_from(event.context.deadline).unwrap_or(i64::MAX));
        async move { Ok::<_, Error>(handle(&context, event.payload, deadline).await) }
    }))
    .await
}
