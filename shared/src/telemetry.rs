//! Logs: JSON lines on standard output, as CloudWatch reads them.

use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Our own crates.
const OWN: [&str; 10] = [
    "audit",
    "audit_export",
    "authorizer",
    "chat",
    "ingestion",
    "keys",
    "provisioning",
    "reconciler",
    "shared",
    "usage",
];

/// Starts logging at the level that `LOG_LEVEL` names, or at `info`. Other people's crates are never
/// heard below `info`: there they tell what goes over the wire, keys and answers included.
///
/// Messages read alone; fields are dotted and carry their unit. Bodies, prompts, passages and keys are
/// never logged.
pub fn init() {
    let level = crate::env::parsed::<Level>("LOG_LEVEL").unwrap_or(Level::INFO);
    let others = level.min(Level::INFO);
    let targets = Targets::new().with_default(others).with_targets(OWN.map(|own| (own, level)));
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_span_events(FmtSpan::NONE)
        .with_max_level(level)
        .with_target(false)
        .finish()
        .with(targets)
        .init();
}
