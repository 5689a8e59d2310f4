//! The deprovisioning function's binary: telemetry, context, run.

use std::convert::Infallible;
use std::sync::Arc;

use deprovisioning::routes::{Context, handle};
use lambda_http::{Error, run, service_fn};
use shared::start;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    shared::telemetry::init()?;
    let context = Box::pin(start::context(Context::from_env())).await?;
    run(service_fn(|request| {
        let context = Arc::clone(&context);
        async move { Ok::<_, Infallible>(handle(&context, request).await) }
    }))
    .await
}
