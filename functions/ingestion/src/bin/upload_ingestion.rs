//! The binary of the function that reads uploaded files: telemetry, context, run.

use std::sync::Arc;

use ingestion::keep_to_itself;
use ingestion::worker::{Context, Invocation, handle};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::clock::Timestamp;
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    keep_to_itself()?;
    shared::telemetry::init()?;
    let close = |context: Arc<Context>| async move { context.close().await };
    let context = Box::pin(start::closing_context(Context::from_env(), close)).await?;
    run(service_fn(|event: LambdaEvent<_>| {
        let context = Arc::clone(&context);
        let invocation = Invocation {
            deadline: Timestamp::from_millis(i64::try_from(event.context.deadline).unwrap_or(i64::MAX)),
            trace: event.context.xray_trace_id.as_deref().and_then(|text| text.parse().ok()),
        };
        async move { Ok::<_, Error>(handle(&context, event.payload, &invocation).await) }
    }))
    .await
}
