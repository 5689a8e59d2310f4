//! The audit export function's binary: telemetry, context, run.

use std::sync::Arc;

use audit_export::{Call, Context, handle};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let context = Box::pin(start::context(Context::from_env())).await?;
    run(service_fn(|event: LambdaEvent<Call>| {
        let context = Arc::clone(&context);
        async move { handle(&context, event.payload).await }
    }))
    .await
}
