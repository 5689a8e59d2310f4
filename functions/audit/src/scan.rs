//! Reads a tenant's objects in the order of their keys, several at a time, and shows their lines.

use std::ops::ControlFlow;

use futures_util::StreamExt;
use shared::audit_filter::Sieve;
use shared::audit_log::{day_prefix, raw_lines, tenant_prefix};
use shared::aws::audit_objects::First;
use shared::error::ApiError;
use shared::scope::Subject;
use tokio::time::Instant;

use crate::{Context, Period, unavailable};

/// Objects that are fetched at a time.
pub(crate) const AHEAD: usize = 16;

/// How a scan ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// There is no more.
    AtTheEnd,
    /// It was told to, or its time was up, before this object.
    Before(String),
}

/// Shows `see` the objects of a period: each with its bytes, in the order of their keys. Begins with
/// `start`, if there is one.
///
/// # Errors
/// If the bucket does not answer, or `see` fails.
pub(crate) async fn objects(
    context: &Context,
    subject: &impl Subject,
    period: Period,
    start: Option<&str>,
    deadline: Instant,
    mut see: impl FnMut(&First, Vec<u8>) -> Result<ControlFlow<()>, ApiError>,
) -> Result<Ended, ApiError> {
    let tenant = subject.tenant_id();
    let prefix = tenant_prefix(tenant);
    // A day's objects hold that day's records alone. No key equals the prefix of its day.
    let last_day = day_prefix(tenant, period.to.plus_millis(-1));
    let mut after = Some(day_prefix(tenant, period.from));
    if let Some(start) = start {
        let first = context.objects.first(subject, start).await.map_err(unavailable)?;
        after = Some(start.to_owned());
        if let Some(first) = first {
            let bytes = context.objects.read(subject, &first).await.map_err(unavailable)?;
            if see(&first, bytes)?.is_break() {
                return Ok(Ended::Before(first.key));
            }
        }
    }
    while let Some(marker) = after {
        let page = context.objects.page(subject, &prefix, Some(marker)).await.map_err(unavailable)?;
        let (mut found, mut next) = page;
        let before = found.len();
        found.retain(|first| first.key.as_str() < last_day.as_str() || first.key.starts_with(&last_day));
        if found.len() < before {
            next = None;
        }
        let reads = found.into_iter().map(async |first| {
            let bytes = context.objects.read(subject, &first).await;
            (first, bytes)
        });
        let mut reads = std::pin::pin!(futures_util::stream::iter(reads).buffered(AHEAD));
        while let Some((first, bytes)) = reads.next().await {
            if Instant::now() >= deadline || see(&first, bytes.map_err(unavailable)?)?.is_break() {
                return Ok(Ended::Before(first.key));
            }
        }
        after = next;
    }
    Ok(Ended::AtTheEnd)
}

/// Shows `see` the lines of an object that `sieve` lets through, each with its number from 0.
///
/// # Errors
/// If the object cannot be read.
pub(crate) fn lines(
    first: &First,
    bytes: &[u8],
    sieve: &Sieve,
    mut see: impl FnMut(usize, &str) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, ApiError> {
    for (number, line) in raw_lines(bytes).enumerate() {
        let line = line.map_err(|error| damaged(first, &error.to_string()))?;
        if sieve.lets_through(&line) && see(number, &line).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// What is answered where the log is damaged: nothing is left out in silence.
pub(crate) fn damaged(first: &First, problem: &str) -> ApiError {
    tracing::error!(alert = "chain_broken", object.key = first.key, "{problem}");
    ApiError::unavailable("a part of the audit log")
}
