//! Logs and metrics: JSON lines on standard output, as CloudWatch reads them.

use std::io::Write;
use std::sync::OnceLock;

use tracing::Level;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::cause;
use crate::env;
use crate::metrics::Line;

/// Where this process's metrics belong.
static NAMESPACE: OnceLock<String> = OnceLock::new();

/// Why a function cannot start: one line, which names the variable or the secret. `main` returns it, and so
/// it is printed.
pub struct CannotStart(String);

impl CannotStart {
    /// The reason with all of its own.
    pub fn new(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let line = cause::told(&*error.into());
        Self(line.replace(['\n', '\r'], " "))
    }
}

impl std::fmt::Debug for CannotStart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::fmt::Display for CannotStart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CannotStart {}

/// Starts logging at the level that `LOG_LEVEL` names, and measuring in the namespace that
/// `METRICS_NAMESPACE` names. Other people's crates are never heard below `info`: there they tell what goes
/// over the wire, keys and answers included.
///
/// Messages read alone; fields are dotted and carry their unit. Bodies, prompts, passages, keys and users'
/// names are never logged, nor is anything else that a caller wrote.
///
/// # Errors
/// If a variable is absent or malformed.
pub fn init() -> Result<(), CannotStart> {
    let level = env::parsed::<Level>("LOG_LEVEL").map_err(CannotStart::new)?;
    let namespace = env::namespace("METRICS_NAMESPACE").map_err(CannotStart::new)?;
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_span_events(FmtSpan::NONE)
        // Below that other people's crates write down what they send and receive.
        .with_max_level(level.min(Level::INFO))
        .with_target(false)
        .init();
    NAMESPACE.get_or_init(|| namespace);
    Ok(())
}

/// Writes a line, at whatever level is logged: metrics do not stop where the log is to be quiet. Before
/// [`init`], nothing is written.
pub fn emit(line: Line) {
    let Some(namespace) = NAMESPACE.get() else { return };
    let mut text = line.render(namespace);
    text.push('\n');
    // In one piece, so that no other line comes between. There is nobody to tell if it fails.
    drop(std::io::stdout().write_all(text.as_bytes()));
}
