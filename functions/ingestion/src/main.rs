//! The ingestion function's binary: telemetry, context, run. Started once more by itself, it reads a document.

use std::convert::Infallible;
use std::process::ExitCode;
use std::sync::Arc;

use ingestion::{Context, asked, handle, keep_to_itself};
use lambda_http::{Error, run, service_fn};
use shared::start;

fn main() -> Result<ExitCode, Error> {
    match asked(std::env::args()) {
        Some(code) => Ok(code),
        None => serve().map(|()| ExitCode::SUCCESS),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn serve() -> Result<(), Error> {
    keep_to_itself()?;
    shared::telemetry::init()?;
    let close = |context: Arc<Context>| async move { context.close().await };
    let context = Box::pin(start::closing_context(Context::from_env(), close)).await?;
    run(service_fn(|request| {
        let context = Arc::clone(&context);
        async move { Ok::<_, Infallible>(handle(&context, request).await) }
    }))
    .await
}
