//! The webhooks function's binary: telemetry, context, run.

use std::sync::Arc;

use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::clock::Timestamp;
use shared::start;
use webhooks::{Context, Tick, handle};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let context = Box::pin(start::context(Context::from_env())).await?;
    run(service_fn(|event: LambdaEvent<Tick>| {
        let context = Arc::clone(&context);
        let deadline = Timestamp::from_millis(i64::try_from(event.context.deadline).unwrap_or(i64::MAX));
        async move { handle(&context, deadline).await }
    }))
    .await
}
