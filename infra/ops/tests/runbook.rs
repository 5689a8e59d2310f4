//! `docs/operations.md` is typed by people in a hurry: its commands must exist, and whatever can raise an
//! alarm must be in it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use ops::command::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

fn page() -> String {
    fs::read_to_string(root().join("docs/operations.md")).unwrap()
}

/// A command's words as a shell would part them, up to where its output goes.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    for c in line.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            '>' | '|' if !quoted => break,
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The rest of each piece that begins so, up to where `ends` says.
fn after<'a>(text: &'a str, start: &'a str, ends: fn(char) -> bool) -> impl Iterator<Item = &'a str> {
    text.split(start).skip(1).map(move |rest| rest.split(ends).next().unwrap())
}

#[test]
fn the_pages_commands_are_commands() {
    let page = page();
    let typed = after(&page, "\n$ bulkhead ", |c| c == '\n');
    let inline = after(&page, "`bulkhead ", |c| c == '`').filter(|line| line.contains(' '));
    let mut parsed = 0;
    for line in typed.chain(inline).filter(|line| !line.contains('…')) {
        // What is named beside the text is the beginning of a command.
        if ["audit show", "audit verify"].contains(&line) {
            continue;
        }
        let words = std::iter::once("bulkhead".to_owned()).chain(words(line));
        if let Err(error) = Command::try_parse_from(words) {
            panic!("bulkhead {line}: {error}");
        }
        parsed += 1;
    }
    assert!(parsed > 20, "{parsed} commands were found");
}

fn sources(folder: &Path, found: &mut String) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn every_alert_and_every_alarm_has_its_entry() {
    let (page, mut code) = (page(), String::new());
    ["functions", "shared"].iter().for_each(|folder| sources(&root().join(folder), &mut code));
    let alerts: Vec<&str> = after(&code, "alert = \"", |c| c == '"').collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    let template = fs::read_to_string(root().join("infra/template.yaml")).unwrap();
    let alarms: Vec<&str> = template
        .lines()
        .filter_map(|line| line.strip_prefix("  ")?.strip_suffix("Alarm:"))
        .filter(|name| !name.starts_with(' '))
        .collect();
    assert!(alarms.len() >= 3, "{alarms:?}");
    for alert in alerts {
        assert!(page.contains(&format!("| `{alert}` |")), "the alert `{alert}` is not in docs/operations.md");
    }
    for alarm in alarms {
        assert!(page.contains(&format!("| `{alarm}Alarm` |")), "{alarm}Alarm is not in docs/operations.md");
        // Its description ends with a link, which leads there.
        assert!(page.contains(&format!("<a id=\"{alarm}Alarm\"></a>")), "{alarm}Alarm has no anchor");
        let link = format!(" ${{RunbookUrl}}#{alarm}Alarm\"\n");
        assert!(template.contains(&link), "{alarm}Alarm does not link to its entry");
    }
}
