//! `docs/cost.md` shows what the calculator says.

use std::fs;
use std::path::Path;

use clap::Parser;
use ops::command::Command;
use ops::cost;
use shared::meter::Limit;
use shared::metrics::{Dimension, Metric};

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

/// What CloudWatch charges for is counted in the template, the contract and the functions' own list of metrics.
#[test]
fn what_is_watched_is_what_is_charged() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let workload: serde_json::Value = serde_json::from_str(&read("infra/ops/data/workload.json")).unwrap();
    let said = |name: &str| workload["measured"][name].as_u64().unwrap() as usize;
    let template = read("infra/template.yaml");
    let of_alarms =
        |line: &&str| ["      MetricName: ", "          MetricStat:"].iter().any(|p| line.starts_with(p));
    assert_eq!(said("alarm_metrics"), template.lines().filter(of_alarms).count());
    assert_eq!(said("tables"), template.matches("Type: AWS::DynamoDB::Table\n").count());

    let methods = ["    delete:", "    get:", "    patch:", "    post:", "    put:"];
    let openapi = read("infra/openapi.yaml");
    let operations = openapi.lines().filter(|line| methods.contains(line)).count();
    // Beside the routes: the authorizer, that of uploads, and a file that was put.
    let routes = operations + 3;
    let (streamed, limits) = (openapi.matches("            text/event-stream:\n").count(), Limit::ALL.len());
    let series = Metric::ALL.iter().map(|metric| match metric.dimensions() {
        [[Dimension::Route]] if *metric == Metric::TimeToFirstByte => streamed,
        [[Dimension::Route]] => routes,
        [[Dimension::Limit]] => limits,
        sets => sets.len(),
    });
    // And lines with `alert`, which a filter counts.
    assert_eq!(said("metric_series"), series.sum::<usize>() + 1);
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

/// The page says of each function what it has and why.
#[test]
fn the_page_has_every_functions_memory_and_time() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let (page, template) = (read("docs/cost.md"), read("infra/template.yaml"));
    let number = |block: &str, name: &str| -> Option<u64> {
        let line = block.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "))?;
        line.parse().ok()
    };
    let (globals, resources) = template.split_once("\nResources:\n").unwrap();
    let usual = number(globals, "MemorySize").unwrap();
    let mut functions = 0;
    for block in resources.split("\n\n").filter(|block| block.contains("Type: AWS::Serverless::Function")) {
        let name = block.lines().find_map(|line| line.strip_prefix("  ")?.strip_suffix(':')).unwrap();
        let (memory, time) =
            (number(block, "MemorySize").unwrap_or(usual), number(block, "Timeout").unwrap());
        let row = format!("| `{name}` | {memory} | {time} | ");
        assert!(page.contains(&row), "docs/cost.md has no row that begins with {row}");
        functions += 1;
    }
    assert!(functions >= 16, "{functions} functions were found");
}
