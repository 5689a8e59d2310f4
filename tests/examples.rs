//! The examples for client developers (`docs/examples`) do what they say: each against the stack, as somebody would run it,
//! for a tenant that has just made as many requests as it may in a minute.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use local::serving::system_clock;
use serde_json::json;
use tests::{Stack, binaries};
use tokio::process::Command;

const HANDBOOK: &str = "# Staff handbook\n\n## Leave\n\nEvery employee has 25 days of paid annual leave a year.\n\n\
    ## Carrying over\n\nUp to five days may be carried over to March.\n";
/// The most requests in a minute, and how many seconds ago they were made.
const MOST: u32 = 600;
const AGO_S: u64 = 55;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Runs a program to its end and returns what it said.
async fn said(program: &mut Command) -> (String, String) {
    let output = program.kill_on_drop(true).output().await.unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{program:?}: {}", said.concat());
    let [out, errors] = said;
    (out, errors)
}

/// Runs an example whose first request is refused for some seconds, and expects of it what all of them do.
async fn check(language: &str, mut program: Command) {
    let stack = Stack::start().await;
    let limits = json!({"requests_per_minute": MOST, "tokens_per_day": 1_000_000});
    let busy = json!({"tenant_id": "busy", "tier": "free", "company_name": "Busy", "limits": limits});
    let busy = stack.provision(busy).await;
    let then = SystemTime::from(system_clock()).duration_since(UNIX_EPOCH).unwrap().as_secs() - AGO_S;
    for (name, value) in [("bucket", then), ("n", MOST.into())] {
        let meter = json!({"tenant_id": {"S": "busy"}});
        stack.edit("meters", meter, &[name], json!({"N": value.to_string()})).await;
    }

    let folder = tempfile::tempdir().unwrap();
    let handbook = folder.path().join("handbook.md");
    std::fs::write(&handbook, HANDBOOK).unwrap();
    program.arg(&handbook).env("BULKHEAD_URL", stack.url()).env("BULKHEAD_KEY", &busy.key);
    let (out, errors) = said(&mut program).await;

    let (rest, cost) = out.trim_end().rsplit_once("\ncost: ").unwrap();
    let (rest, stream) = rest.split_once("\nstream: ").unwrap();
    let lines: Vec<&str> = rest.lines().collect();
    let [stored, answer, cited] = lines[..] else { panic!("{language}: {out}") };
    assert_eq!(stored, "stored handbook version 1: ready", "{language}");
    assert!(answer.starts_with("answer: According to the documents: "), "{language}: {answer}");
    assert!(answer.contains("25 days of paid annual leave"), "{language}: {answer}");
    assert_eq!(cited, "cited: handbook", "{language}");
    assert!(stream.starts_with("According to the documents: "), "{language}: {stream}");
    assert!(stream.contains("five days may be carried over"), "{language}: {stream}");
    let cost = cost.strip_suffix(" nano-dollars").unwrap();
    assert!(cost.parse::<u64>().unwrap() > 0, "{language}: {cost}");
    // It was refused, and came again when it was told to. curl does so without a word.
    let events = stack.items("audit", "busy", "EVENT#").await;
    assert!(events.iter().any(|event| event["action"] == "rate_limited"), "{language}: {events:?}");
    let told = errors.contains("429 rate_limit_exceeded: again in ");
    assert!(told || language == "curl", "{language}: {errors}");
    // The file went past the API, by a link.
    assert_eq!(events.iter().filter(|event| event["action"] == "upload_begun").count(), 1, "{language}");
    // What was asked is charged once, whatever was repeated.
    let calls = stack.items("audit", "busy", "TICKET#").await;
    let of = |action: &str| calls.iter().filter(|call| call["action"] == action).count();
    assert_eq!((of("llm_call"), of("document_ingested")), (2, 1), "{language}: {calls:?}");

    // What no waiting helps against is not waited for. curl sees no difference, and gives up after two minutes.
    if language != "curl" {
        let limits = json!({"requests_per_minute": 0});
        let never = json!({"tenant_id": "never", "tier": "free", "company_name": "Never", "limits": limits});
        let never = stack.provision(never).await;
        let output = program.env("BULKHEAD_KEY", &never.key).output().await.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains("rate_limit_exceeded"), "{language}: {errors}");
        assert!(!errors.contains("again in"), "{language}: {errors}");
    }
    stack.stop().await;
}

#[tokio::test]
async fn python() {
    let mut program = Command::new("python3");
    program.arg(root().join("docs/examples/bulkhead.py"));
    check("python", program).await;
}

#[tokio::test]
async fn typescript() {
    let (source, built) = (root().join("docs/examples"), root().join("target/examples"));
    std::fs::create_dir_all(&built).unwrap();
    let package = std::fs::read(source.join("package.json")).unwrap();
    let installed = built.join("installed.json");
    // What is there already, in these versions, is not installed again.
    if std::fs::read(&installed).ok().as_ref() != Some(&package) {
        std::fs::write(built.join("package.json"), &package).unwrap();
        said(
            Command::new("npm").args(["install", "--silent", "--no-audit", "--no-fund"]).current_dir(&built),
        )
        .await;
        std::fs::write(&installed, &package).unwrap();
    }
    // A module finds its packages beside itself.
    std::fs::copy(source.join("bulkhead.ts"), built.join("bulkhead.ts")).unwrap();
    let compile =
        ["--no-install", "tsc", "--strict", "--target", "es2022", "--module", "nodenext", "bulkhead.ts"];
    said(Command::new("npx").args(compile).current_dir(&built)).await;
    let mut program = Command::new("node");
    program.arg(built.join("bulkhead.js"));
    check("typescript", program).await;
}

#[tokio::test]
async fn curl() {
    check("curl", Command::new(root().join("docs/examples/bulkhead.sh"))).await;
}

#[tokio::test]
async fn rust() {
    // Built with everything else.
    let built = binaries().join("rust-client");
    check("rust", Command::new(built)).await;
}
