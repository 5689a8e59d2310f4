//! The binary of the function that reads uploaded files: telemetry, context, run. Started once more by itself, it reads
//! a document.

use std::process::ExitCode;
use std::sync::Arc;

use ingestion::worker::{Context, Invocation, handle};
use ingestion::{asked, keep_to_itself};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use shared::clock::Timestamp;
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
