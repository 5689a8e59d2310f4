//! The usual mistakes with tenants do not compile. Each file of `examples/` is some of them; above a line that does not
//! compile stands what the compiler says of it. What these types are for compiles: the examples in `scope` and the
//! functions.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

/// What is said of the lines of each file.
type Errors = BTreeMap<String, BTreeSet<(usize, String)>>;

/// What stands before what the compiler is to say of the next line.
const SAYS: &str = "//~ ";

#[test]
fn the_usual_mistakes_do_not_compile() {
    let (expected, found) = (expected(), found());
    assert!(expected.len() > 5 && expected.values().all(|lines| !lines.is_empty()), "{expected:#?}");
    assert_eq!(found, expected);
}

fn expected() -> Errors {
    let files = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).unwrap();
    let file = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        let lines = text.lines().enumerate();
        // Lines count from 1, and it is of the next one.
        lines
            .filter_map(|(at, line)| Some((at + 2, line.trim_start().strip_prefix(SAYS)?.to_owned())))
            .collect()
    };
    let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
    files.map(|entry| entry.unwrap().path()).map(|path| (name(&path), file(&path))).collect()
}

/// What the compiler says. It is asked with the selection that the tests are built with, so that it compiles nothing
/// else; what holds these files to a copy of the workspace would compile all their dependencies once more.
fn found() -> Errors {
    let mut cargo = local::cargo::command();
    cargo.args(["build", "--workspace", "--examples", "--features", "compile_fail/mistakes", "--keep-going"]);
    cargo.arg("--message-format=json").current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = cargo.output().unwrap();
    let mut found = Errors::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let said: Value = serde_json::from_str(line).unwrap();
        let target = &said["target"];
        let is_ours = target["kind"][0] == "example" && said["manifest_path"] == MANIFEST;
        if said["reason"] != "compiler-message" || !is_ours || said["message"]["level"] != "error" {
            continue;
        }
        let message = &said["message"];
        // The last of all only counts the others.
        let Some(code) = message["code"]["code"].as_str() else { continue };
        let says = format!("{code}: {}", message["message"].as_str().unwrap());
        let lines = found.entry(target["name"].as_str().unwrap().to_owned()).or_default();
        for span in message["spans"].as_array().unwrap() {
            if span["is_primary"] == true {
                let line = span["line_start"].as_u64().unwrap();
                lines.insert((usize::try_from(line).unwrap(), says.clone()));
            }
        }
    }
    assert!(!found.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    found
}

/// Whose messages are looked at.
const MANIFEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
