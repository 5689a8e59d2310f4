//! The eraser's binary: telemetry, context, run.

use std::sync::Arc;

use deprovisioning::eraser::{Call, Context, handle};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::clock::Timestamp;
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let context = Box::pin(start::context(Context::from_env())).await?;
    run(service_fn(|event: LambdaEvent<Call>| {
        let context = Arc::clone(&context);
        let deadline = Timestamp::from_millis(i64::try_from(event.context.deadline).unwrap_or(i64::MAX));
        async move { handle(&context, event.payload, deadline).await }
    }))
    .await
}
