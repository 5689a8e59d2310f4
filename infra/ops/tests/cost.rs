//! `docs/cost.md` shows what the calculator says.

use std::fs;
use std::path::Path;

use clap::Parser;
use ops::command::Command;
use ops::cost;

#[test]
fn the_pages_tables_are_the_calculators() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let page = fs::read_to_string(root.join("docs/cost.md")).unwrap();
    let mut shown = 0;
    for block in page.split("```console\n$ ").skip(1) {
        let (typed, rest) = block.split_once('\n').unwrap();
        let (printed, _) = rest.split_once("```").unwrap();
        let Ok(Command::Cost(wanted)) = Command::try_parse_from(typed.split_whitespace()) else {
            panic!("{typed} is no calculation");
        };
        let mut out = Vec::new();
        cost::run(&wanted, &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(printed == out, "docs/cost.md does not show what `{typed}` says now:\n{out}");
        shown += 1;
    }
    assert!(shown >= 2, "{shown} calculations were found");
}

/// Every price has its line, with its source and what it is for.
#[test]
fn the_page_names_every_assumption() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let page = fs::read_to_string(root.join("docs/cost.md")).unwrap();
    let workload: serde_json::Value = serde_json::from_str(include_str!("../data/workload.json")).unwrap();
    for part in ["measured", "assumed"] {
        for (name, value) in workload.get(part).unwrap().as_object().unwrap() {
            if value.is_number() {
                let row = format!("| `{name}` | {value} |");
                assert!(page.contains(&row), "docs/cost.md has no row that begins with {row}");
            }
        }
    }
}
