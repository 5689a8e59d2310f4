//! SQS, as far as it is used: queues that are only written to, each a file of JSON lines.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use serde_json::Value;

/// Puts a message into a queue; `directory` holds a file `<queue>.jsonl` for each.
///
/// # Errors
/// If the file cannot be written.
pub fn send(directory: &Path, queue: &str, message: &Value) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let mut file =
        File::options().create(true).append(true).open(directory.join(format!("{queue}.jsonl")))?;
    // In one write, so that a reader never sees half a line.
    file.write_all(format!("{message}\n").as_bytes())
}
