//! The program as it is run: what it prints of logs in folders, and how it exits.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use shared::audit_log::{Head, Object, WireRecord, object, tenant_prefix};
use shared::audit_verify::RETENTION_DAYS;
use shared::clock::Timestamp;
use shared::item_key;
use shared::ledger::{Asked, Denial, Outcome, Record};
use shared::meter::{Lease, Limit, Ticket};
use shared::tenant::TenantId;
use tempfile::TempDir;

/// 2026-11-18, 22 o'clock.
const START: i64 = 1_795_039_200_000;
const HOUR_MS: i64 = 3_600_000;
const USER: &str = "=O'Brien \"x\"\n\u{1b}[2Jü\u{202e}";

fn record(tenant: &TenantId, ticket: u64, at: Timestamp) -> WireRecord {
    let lease: Lease = format!("c.1795000000.130.5000.70001.r-{ticket}").parse().unwrap();
    let ticket = Ticket(ticket);
    let mut record = Record::aborted(tenant.clone(), &lease, ticket, at);
    if ticket.0.is_multiple_of(2) {
        record.outcome = Outcome::Ok;
        record.user_id = Some(USER.parse().unwrap());
        record.documents = vec!["guide.md".parse().unwrap()];
        record.chunks = vec![format!("guide.md:{}", ticket.0), "=1".into()];
    }
    WireRecord::new(item_key::ticket(ticket), record)
}

/// A tenant's log, written below `root`: so many objects of three records, one for each hour, the first
/// with an event too.
fn write_log(root: &Path, tenant: &str, objects: u64) -> Vec<PathBuf> {
    let tenant: TenantId = tenant.parse().unwrap();
    let mut head = Head::default();
    let mut paths = Vec::new();
    for n in 0..objects {
        let at = Timestamp::from_millis(START + i64::try_from(n).unwrap() * HOUR_MS);
        let mut records: Vec<_> = (1..=3).map(|i| record(&tenant, n * 3 + i, at)).collect();
        if n == 0 {
            let asked = Asked { request_id: "r".to_owned().into(), key_id: None, user_id: None };
            let refused = Record::denied(tenant.clone(), Denial::Limit(Limit::Requests), 9, at, asked);
            records.push(WireRecord::new(item_key::event(at, "a"), refused));
        }
        let Object { key, bytes, head: next } = object(&head, records, at.plus_days(RETENTION_DAYS)).unwrap();
        head = next;
        let path = root.join(key);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        paths.push(path);
    }
    fs::write(root.join(tenant_prefix(&tenant)).join("head.json"), serde_json::to_vec(&head).unwrap())
        .unwrap();
    paths
}

fn bucket() -> (TempDir, Vec<PathBuf>) {
    let root = tempfile::tempdir().unwrap();
    let paths = write_log(root.path(), "acme", 4);
    write_log(root.path(), "globex", 1);
    (root, paths)
}

fn bulkhead(arguments: &[&str]) -> Output {
    // Nothing of a cloud account may be needed, or used.
    Command::new(env!("CARGO_BIN_EXE_bulkhead")).env_clear().args(arguments).output().unwrap()
}

fn verify(arguments: &[&str]) -> (i32, String, String) {
    let output = bulkhead(&[&["audit", "verify"], arguments].concat());
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn show(arguments: &[&str]) -> String {
    let output = bulkhead(&[&["audit", "show"], arguments].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_healthy_bucket_has_a_line_for_each_tenant() {
    let (root, _) = bucket();
    let (code, out, err) = verify(&[text(root.path())]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("acme: healthy, 4 objects, 13 records from 2026-11-18T22:00:00.000Z to"));
    assert!(lines[1].starts_with("globex: healthy, 1 object, 4 records"), "{out}");
    assert_eq!(lines.len(), 2);
}

#[test]
fn one_tenants_prefix_is_verified_wherever_it_lies() {
    let (root, _) = bucket();
    let (code, out, _) = verify(&[text(&root.path().join("tenant=acme"))]);
    assert_eq!((code, out.lines().count()), (0, 1));
    let copy = root.path().join("copy");
    fs::rename(root.path().join("tenant=acme"), &copy).unwrap();
    let (code, out, _) = verify(&[text(&copy)]);
    assert_eq!(code, 0, "{out}");
    assert!(out.starts_with("acme: healthy"), "its records say whose it is: {out}");
}

/// What is done to a log, and how.
type Damage = (&'static str, fn(&[PathBuf]));

#[test]
fn each_damage_is_named_by_its_object() {
    let damage: [Damage; 6] = [
        ("a byte changed", |paths| {
            let mut bytes = fs::read(&paths[1]).unwrap();
            bytes[4] ^= 1;
            fs::write(&paths[1], bytes).unwrap();
        }),
        ("cut short", |paths| {
            let bytes = fs::read(&paths[1]).unwrap();
            fs::write(&paths[1], &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("emptied", |paths| fs::write(&paths[1], "").unwrap()),
        ("removed", |paths| fs::remove_file(&paths[1]).unwrap()),
        ("swapped", |paths| {
            let (one, two) = (fs::read(&paths[1]).unwrap(), fs::read(&paths[2]).unwrap());
            fs::write(&paths[1], two).unwrap();
            fs::write(&paths[2], one).unwrap();
        }),
        ("replaced", |paths| fs::copy(&paths[0], &paths[1]).map(drop).unwrap()),
    ];
    for (what, damage) in damage {
        let (root, paths) = bucket();
        damage(&paths);
        let (code, out, err) = verify(&[text(root.path())]);
        assert_eq!((code, err.as_str()), (1, ""), "{what}: {out}");
        let file = paths[1].file_name().unwrap().to_str().unwrap();
        assert!(out.lines().any(|line| line.contains(file)), "{what}: {out}");
        assert!(out.contains("globex: healthy"), "{what}: {out}");
    }
}

#[test]
fn an_earlier_runs_output_tells_what_the_log_alone_does_not() {
    let (root, paths) = bucket();
    let (_, before, _) = verify(&[text(root.path())]);
    let file = root.path().join("before.txt");
    fs::write(&file, &before).unwrap();
    let since = format!("@{}", file.display());
    assert_eq!(verify(&[text(root.path()), "--since", &since]).0, 0);
    fs::remove_file(&paths[3]).unwrap();
    write_log(root.path(), "acme", 3);
    assert_eq!(verify(&[text(root.path())]).0, 0, "an older head was put back");
    let anchor = before.lines().next().unwrap().rsplit(' ').next().unwrap();
    for since in [&since, anchor] {
        let (code, out, _) = verify(&[text(root.path()), "--since", since]);
        assert_eq!(code, 1, "{out}");
        assert!(out.starts_with("tenant=acme/: this is not the log of the earlier run"), "{out}");
    }
    fs::remove_dir_all(root.path().join("tenant=globex")).unwrap();
    let (code, out, _) = verify(&[text(root.path()), "--since", &since]);
    assert!(code == 1 && out.contains("tenant=globex/: this is not the log"), "a whole log is gone: {out}");
}

#[test]
fn retention_is_held_to_what_is_asked_for() {
    let (root, _) = bucket();
    let (code, out, _) = verify(&[text(root.path()), "--retention-days", "3650"]);
    assert_eq!(code, 1);
    assert!(out.contains("it is kept until 2033-11-18T22:00:00.000Z only"), "{out}");
}

#[test]
fn what_cannot_be_checked_is_no_healthy_log() {
    let root = tempfile::tempdir().unwrap();
    let missing = root.path().join("missing");
    let state = "acme:1";
    let empty = text(root.path());
    for arguments in [vec![text(&missing)], vec![empty], vec![empty, "--since", state], vec!["s3://"], vec![]]
    {
        let (code, out, err) = verify(&arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}");
        assert!(err.starts_with("error: "), "{err}");
    }
    let (root, paths) = bucket();
    fs::remove_file(&paths[1]).unwrap();
    std::os::unix::fs::symlink(&missing, &paths[1]).unwrap();
    let (code, out, err) = verify(&[text(root.path())]);
    assert_eq!(code, 2);
    assert!(out.contains("globex: healthy") && err.contains("cannot be read"), "{out}{err}");
}

#[test]
fn a_record_is_a_line_whatever_the_user_is_called() {
    let (root, _) = bucket();
    let out = show(&[text(root.path()), "--tenant", "acme"]);
    assert_eq!(out.lines().count(), 13);
    assert!(!out.chars().any(|c| c.is_control() && c != '\n'), "{out:?}");
    assert_eq!(
        out.lines().nth(1).unwrap(),
        "2026-11-18T22:00:00.000Z  acme  llm_call  ok  ticket 2  \
         user \"=O'Brien \\\"x\\\"\\n\\u{1b}[2Jü\\u{202e}\"  5000 tokens at most  $0.000070001  \
         documents \"guide.md\"  chunks \"guide.md:2\",\"=1\""
    );
    assert_eq!(
        out.lines().nth(3).unwrap(),
        "2026-11-18T22:00:00.000Z  acme  rate_limited  refused requests_per_minute  9 times"
    );
}

#[test]
fn csv_is_exact_and_no_formula() {
    let (root, _) = bucket();
    let out = show(&[text(root.path()), "--tenant", "acme", "--user", USER, "--format", "csv"]);
    let mut reader = csv::Reader::from_reader(out.as_bytes());
    let headers = reader.headers().unwrap().clone();
    let rows: Vec<csv::StringRecord> = reader.records().collect::<Result<_, _>>().unwrap();
    assert_eq!(rows.len(), 6);
    let cell = |name: &str| &rows[0][headers.iter().position(|header| header == name).unwrap()];
    assert_eq!(cell("user_id"), format!("'{USER}"));
    assert_eq!(cell("chunks"), "guide.md:2\n=1");
    assert_eq!((cell("cost_nano_usd"), cell("cost_usd")), ("70001", "0.000070001"));
    assert!(out.contains("\r\n"), "lines end as RFC 4180 has it");
}

#[test]
fn json_is_the_lines_as_they_are_and_filters_choose() {
    let (root, paths) = bucket();
    let place = text(root.path());
    let out = show(&[place, "--format", "json"]);
    let first = shared::audit_log::raw_lines(fs::File::open(&paths[0]).unwrap()).next().unwrap().unwrap();
    assert!(out.starts_with(&first));
    for (filter, lines) in [
        (vec![], 17),
        (vec!["--tenant", "globex"], 4),
        (vec!["--chunk", "guide.md:2"], 2),
        (vec!["--document", "guide.md"], 7),
        (vec!["--action", "rate_limited"], 2),
        (vec!["--from", "2026-11-19"], 6),
        (vec!["--to", "2026-11-19"], 11),
        (vec!["--from", "2026-11-18T22:00:00.001Z", "--to", "2026-11-18T23:00:00.001Z"], 3),
        (vec!["--user", "nobody"], 0),
    ] {
        let out = show(&[&[place, "--format", "json"], filter.as_slice()].concat());
        assert_eq!(out.lines().count(), lines, "{filter:?}");
    }
    for wrong in [["--action", "x"], ["--from", "soon"], ["--document", "a/b"], ["--tenant", "A"]] {
        let output = bulkhead(&["audit", "show", place, wrong[0], wrong[1]]);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
    let inverted = bulkhead(&["audit", "show", place, "--from", "2026-11-19", "--to", "2026-11-18"]);
    assert_eq!(inverted.status.code(), Some(2));
}

#[test]
fn what_can_be_read_of_a_damaged_log_is_shown() {
    let (root, paths) = bucket();
    fs::write(&paths[1], "none").unwrap();
    let output = bulkhead(&["audit", "show", text(root.path()), "--tenant", "acme"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), 10);
    assert!(
        String::from_utf8(output.stderr).unwrap().contains("000000000005.ndjson.gz: it cannot be unpacked")
    );
}
