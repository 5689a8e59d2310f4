//! The authorizer's binary: telemetry, context, run.

use std::sync::Arc;

use authorizer::{Context, authorize};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let close = |context: Arc<Context>| async move { context.close().await };
    let context = Box::pin(start::closing_context(Context::from_env(), close)).await?;
    run(service_fn(|event: LambdaEvent<_>| {
        let context = Arc::clone(&context);
        async move { authorize(&context, event.payload).await }
    }))
    .await
}
