//! Schedules: functions that are invoked at a steady rate, the first time one interval after the start.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::{Instant, MissedTickBehavior};

use crate::lambda::{Invoke, InvokeError, uuid};
use crate::serving::unique_id;
use crate::template::{ACCOUNT, REGION, ScheduleEvent};

/// After a failed invocation the next try waits this long, doubled each time.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(60);

/// Invokes the function until `shutdown` resolves. A function that takes longer than the interval
/// misses invocations.
///
/// # Errors
/// Never: a function that fails is no reason to end.
pub async fn run(
    schedule: ScheduleEvent,
    invoke: Invoke,
    now: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Infallible> {
    let ticking = async {
        let mut ticks = tokio::time::interval_at(Instant::now() + schedule.every, schedule.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let event = schedule.input.clone().unwrap_or_else(|| event(&schedule, now()));
            if attempt(&schedule, &invoke, &event).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = shutdown => {}
        // The functions end before their callers are asked to.
        () = ticking => {}
    }
    Ok(())
}

/// Invokes until it succeeds or has been tried often enough. An error if the stack ends.
async fn attempt(schedule: &ScheduleEvent, invoke: &Invoke, event: &Value) -> Result<(), InvokeError> {
    let mut backoff = FIRST_BACKOFF;
    for attempt in 0..=schedule.max_retries {
        match invoke(event.to_string().into()).await {
            Ok(_) => break,
            Err(InvokeError::Closing) => return Err(InvokeError::Closing),
            Err(error) => {
                tracing::warn!(schedule.name = %schedule.name, attempt, "A scheduled invocation failed: {error}");
            }
        }
        if attempt < schedule.max_retries {
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }
    Ok(())
}

/// What a schedule without an input of its own sends.
fn event(schedule: &ScheduleEvent, due: OffsetDateTime) -> Value {
    let (source, arn) = &schedule.source;
    json!({
        "version": "0",
        "id": uuid(&unique_id()),
        "detail-type": "Scheduled Event",
        "source": source,
        "account": ACCOUNT,
        "time": due.replace_nanosecond(0).unwrap_or(due).format(&Rfc3339).unwrap_or_default(),
        "region": REGION,
        "resources": [arn],
        // EventBridge Scheduler sends text here, EventBridge's rules send a map.
        "detail": if *source == "aws.events" { json!({}) } else { json!("{}") },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use bytes::Bytes;
    use time::macros::datetime;

    use super::*;

    /// What a function was invoked with, and when.
    type Seen = Arc<Mutex<Vec<(Duration, Value)>>>;

    /// Runs a schedule for a while against a function that first fails `failures` times.
    async fn ran(schedule: ScheduleEvent, failures: usize, time: Duration) -> Vec<(Duration, Value)> {
        let seen = Seen::default();
        let begun = Instant::now();
        let invoke: Invoke = {
            let seen = Arc::clone(&seen);
            Arc::new(move |payload: Bytes| {
                let mut seen = seen.lock().unwrap();
                seen.push((begun.elapsed(), serde_json::from_slice(&payload).unwrap()));
                let crashed = Err(InvokeError::Crashed("it did".into()));
                let result = if seen.len() <= failures { crashed } else { Ok(Bytes::new()) };
                Box::pin(std::future::ready(result))
            })
        };
        let Ok(()) =
            run(schedule, invoke, || datetime!(2026-02-03 04:05:06.7 UTC), tokio::time::sleep(time)).await;
        let seen = seen.lock().unwrap();
        seen.clone()
    }

    fn schedule(every_ms: u64, input: Option<Value>) -> ScheduleEvent {
        ScheduleEvent {
            name: "Often".into(),
            every: Duration::from_millis(every_ms),
            input,
            source: ("aws.scheduler", "arn:aws:scheduler:::schedule/default/x".into()),
            max_retries: 1,
        }
    }

    #[tokio::test]
    async fn a_function_is_invoked_at_the_rate_and_not_at_the_start() {
        let seen = ran(schedule(200, None), 0, Duration::from_millis(700)).await;
        assert!((1..=3).contains(&seen.len()), "{seen:?}");
        assert!(seen[0].0 >= Duration::from_millis(200), "{seen:?}");
        let event = &seen[0].1;
        assert_eq!(
            (&event["source"], &event["detail-type"]),
            (&json!("aws.scheduler"), &json!("Scheduled Event"))
        );
        assert_eq!(event["time"], "2026-02-03T04:05:06Z");
        assert_eq!(event["detail"], "{}");
    }

    #[tokio::test]
    async fn a_failed_invocation_is_repeated_as_it_was() {
        let seen = ran(schedule(100, None), 1, Duration::from_millis(750)).await;
        assert!(seen.len() >= 2, "{seen:?}");
        // An event has an id of its own: the second is the first once more, and not the next one due.
        assert_eq!(seen[0].1, seen[1].1);
        assert!(seen[1].0 - seen[0].0 >= FIRST_BACKOFF, "{seen:?}");
        let input = json!({"task": "sweep"});
        let seen = ran(schedule(100, Some(input.clone())), 0, Duration::from_millis(250)).await;
        assert!(!seen.is_empty() && seen.iter().all(|(_, event)| *event == input), "{seen:?}");
    }
}
