//! The authorizer's binary: telemetry, context, run.

use std::sync::Arc;

use authorizer::{Context, authorize};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::telemetry::CannotStart;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let context = Arc::new(Context::from_env().await.map_err(CannotStart::new)?);
    let closing = Arc::clone(&context);
    lambda_runtime::spawn_graceful_shutdown_handler(|| async move { closing.close().await }).await;
    run(service_fn(|event: LambdaEvent<_>| {
        let context = Arc::clone(&context);
        async move { authorize(&context, event.payload).await }
    }))
    .await
}
