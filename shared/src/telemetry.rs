//! Logs: JSON lines on standard output, as CloudWatch reads them.

use tracing::Level;
use tracing_subscriber::fmt::format::FmtSpan;

/// Starts logging at the level that `LOG_LEVEL` names, or at `info`.
///
/// Messages read alone; fields are dotted and carry their unit. Bodies, prompts, passages and keys are
/// never logged.
pub fn init() {
    let level = crate::env::parsed::<Level>("LOG_LEVEL").unwrap_or(Level::INFO);
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_span_events(FmtSpan::NONE)
        .with_max_level(level)
        .with_target(false)
        .init();
}
