//! The binary of the authorizer of uploads: telemetry, context, run.

use std::sync::Arc;

use authorizer::uploads::{Context, rule};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let context = Box::pin(start::context(Context::from_env())).await?;
    run(service_fn(|event: LambdaEvent<_>| {
        let context = Arc::clone(&context);
        async move { rule(&context, event.payload).await }
    }))
    .await
}
