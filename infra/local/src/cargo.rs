//! Running cargo from a program that cargo runs.

use std::process::Command;

/// A `cargo` that sees the environment as a shell would.
///
/// `cargo run` and `cargo test` tell a program about its own package in variables. A cargo within them
/// would pass those on to build scripts, some of which watch them (that of `ring` does), and compile
/// half the dependencies again.
#[must_use]
pub fn command() -> Command {
    let mut command = Command::new(option_env!("CARGO").unwrap_or("cargo"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_")
            || text.starts_with("CARGO_BIN_")
            || text.starts_with("CARGO_MANIFEST_")
            || matches!(
                &*text,
                "CARGO" | "CARGO_CRATE_NAME" | "CARGO_MAKEFLAGS" | "CARGO_TARGET_TMPDIR" | "OUT_DIR"
            )
        {
            command.env_remove(&name);
        }
    }
    command
}
