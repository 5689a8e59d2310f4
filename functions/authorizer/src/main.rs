//! The authorizer's binary: telemetry, context, run.

use std::sync::Arc;

use authorizer::{Context, authorize};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init();
    let context = Arc::new(Context::from_env().await?);
    run(service_fn(|event: LambdaEvent<_>| {
        let context = Arc::clone(&context);
        async move { authorize(&context, event.payload).await }
    }))
    .await
}
