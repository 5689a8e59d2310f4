//! Running cargo from a program that cargo runs.

use std::io;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

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

/// What cargo says of the workspace in a folder.
/// <https://doc.rust-lang.org/cargo/commands/cargo-metadata.html>
///
/// # Errors
/// If cargo does not run there, or says something else.
pub fn metadata(folder: &Path) -> io::Result<Value> {
    let output =
        command().args(["metadata", "--no-deps", "--format-version", "1"]).current_dir(folder).output()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The packages that are deployed, and the empty function's: where cargo-lambda finds them. Which are built together
/// decides on what is compiled in of the libraries that they share.
pub fn deployed(metadata: &Value) -> Vec<&str> {
    let packages = metadata.pointer("/metadata/lambda/build/packages").and_then(Value::as_array);
    packages.into_iter().flatten().filter_map(Value::as_str).collect()
}
