//! `docs/deploy.md` is followed once, by someone who has never done it: whatever it names must exist.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use ops::command::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The names of a section of the template: what stands two spaces in.
fn section(template: &str, name: &str) -> BTreeSet<String> {
    let (_, rest) = template.split_once(&format!("\n{name}:\n")).unwrap();
    let lines = rest.lines().take_while(|line| line.is_empty() || line.starts_with([' ', '#']));
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split_once(':'));
    let plain = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric());
    names.filter(|(name, _)| plain(name)).map(|(name, _)| name.to_owned()).collect()
}

/// What stands between back quotes, outside of the examples.
fn quoted(page: &str) -> Vec<String> {
    let text: String = page.split("```").step_by(2).collect();
    text.split('`')
        .skip(1)
        .step_by(2)
        .map(|quoted| quoted.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

/// The commands of the examples.
fn typed(page: &str) -> Vec<&str> {
    page.lines().filter_map(|line| line.strip_prefix("$ ")).flat_map(|line| line.split(" && ")).collect()
}

#[test]
fn parameters_resources_and_outputs_are_the_templates() {
    let (page, template) = (read("docs/deploy.md"), read("infra/template.yaml"));
    let mut named = 0;
    let known: BTreeSet<String> = ["Parameters", "Resources", "Outputs"]
        .into_iter()
        .flat_map(|part| section(&template, part))
        .collect();
    assert!(known.len() > 60, "{known:?}");
    for quoted in quoted(&page) {
        let name: String = quoted.chars().take_while(char::is_ascii_alphanumeric).collect();
        // Names of the template are written like this; `AWS::Partition` is AWS's own.
        let ours = name.starts_with(|c: char| c.is_ascii_uppercase())
            && name.chars().any(|c| c.is_ascii_lowercase());
        if !ours || quoted.contains('.') {
            continue;
        }
        assert!(known.contains(&name), "`{quoted}`: the template has no {name}");
        named += 1;
    }
    assert!(named > 20, "{named} names were found");
    let quoted = quoted(&page);
    for parameter in section(&template, "Parameters") {
        assert!(quoted.contains(&parameter), "{parameter} is not explained");
    }
}

#[test]
fn commands_are_commands_and_environments_are_environments() {
    let (page, samconfig) = (read("docs/deploy.md"), read("samconfig.toml"));
    let quoted = quoted(&page);
    let inline = quoted.iter().map(String::as_str).filter(|text| text.contains(' '));
    let mut seen = [0, 0];
    for line in typed(&page).into_iter().chain(inline) {
        if let Some(rest) = line.strip_prefix("bulkhead ") {
            // What is named beside the text is the beginning of a command.
            if rest == "deprovisioning show" {
                continue;
            }
            let words = rest.replace("'Acme Corporation'", "Acme");
            let words = std::iter::once("bulkhead").chain(words.split_whitespace());
            if let Err(error) = Command::try_parse_from(words) {
                panic!("{line}: {error}");
            }
            seen[0] += 1;
        } else if let Some(rest) = line.strip_prefix("sam ") {
            let what = rest.split_whitespace().next().unwrap();
            assert!(["build", "delete", "deploy", "validate"].contains(&what), "{line}");
            if let Some((_, environment)) = rest.split_once("--config-env ") {
                assert!(samconfig.contains(&format!("[{environment}.deploy.parameters]")), "{line}");
            }
            seen[1] += 1;
        }
    }
    assert!(seen[0] >= 4 && seen[1] >= 6, "{seen:?} commands were found");
}

#[test]
fn secrets_and_links_are_there() {
    let (page, template) = (read("docs/deploy.md"), read("infra/template.yaml"));
    let secrets = page.split("--secret-id bulkhead-dev/").skip(1).map(|rest| rest.split(' ').next().unwrap());
    let mut put = 0;
    for secret in secrets {
        assert!(
            template.contains(&format!("Name: !Sub \"${{AWS::StackName}}/{secret}\"")),
            "there is no {secret}"
        );
        put += 1;
    }
    assert_eq!(
        put,
        template.matches("Type: AWS::SecretsManager::Secret").count(),
        "every secret gets its value"
    );
    for link in page.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
        assert!(
            link.starts_with("https://") || root().join("docs").join(link).is_file(),
            "{link} leads nowhere"
        );
    }
}

/// What an environment overrides are parameters, and its values are allowed.
#[test]
fn environments_set_what_there_is() {
    let (samconfig, template) = (read("samconfig.toml"), read("infra/template.yaml"));
    let parameters = section(&template, "Parameters");
    let sets: Vec<&str> = samconfig
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.split_once('='))
        .map(|(name, _)| name)
        .collect();
    assert!(sets.len() > 8, "{sets:?}");
    for name in sets {
        assert!(parameters.contains(name), "samconfig.toml sets {name}, which is no parameter");
    }
    // Alarms link to where the runbook is read: in no environment to a name that nobody has decided on.
    let runbooks = samconfig.lines().filter(|line| line.trim().starts_with("\"RunbookUrl=https://"));
    assert_eq!(runbooks.count(), samconfig.matches(".deploy.parameters]").count());
    let of = |environment: &str| -> Vec<String> {
        let lines = samconfig
            .lines()
            .skip_while(|line| *line != format!("[{environment}.deploy.parameters]"))
            .skip(1);
        lines
            .take_while(|line| !line.starts_with('['))
            .filter(|line| !line.starts_with('#'))
            .map(str::to_owned)
            .collect()
    };
    let named = |environment| of(environment).into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>();
    assert_eq!(named("default"), named("dev"), "what is deployed where none is named is dev");
}

/// `sam deploy` takes what `sam build` made only where nothing names it a template: not its own section, and not
/// `global`, which every command obeys.
#[test]
fn what_is_deployed_is_what_was_built() {
    let samconfig = read("samconfig.toml");
    let mut sections: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut at = "";
    for line in samconfig.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|name| name.strip_suffix(".parameters]")) {
            at = name;
            sections.entry(at).or_default();
        } else if let Some((name, _)) = line.split_once(" = ") {
            sections.entry(at).or_default().push(name);
        }
    }
    let environments: BTreeSet<&str> =
        sections.keys().filter_map(|section| section.split_once('.')).map(|(name, _)| name).collect();
    assert_eq!(environments, BTreeSet::from(["default", "dev", "prod", "staging"]));
    for environment in environments {
        for command in ["build", "validate"] {
            let names = sections.get(&*format!("{environment}.{command}"));
            assert!(names.is_some_and(|names| names.contains(&"template_file")), "{environment} {command}");
        }
    }
    for (section, names) in &sections {
        if !section.ends_with(".build") && !section.ends_with(".validate") {
            let named = names.iter().find(|name| ["template_file", "template", "t"].contains(name));
            assert_eq!(named, None, "[{section}.parameters] names a template");
        }
    }
}

/// Cargo compiles into a library what any of the packages asks for that are built together. So those are told that are
/// deployed, and the one that does nothing, which they are measured against.
#[test]
fn what_is_deployed_is_built_without_what_tests_ask_for() {
    let said = local::cargo::metadata(&root()).unwrap();
    let told: BTreeSet<&str> = local::cargo::deployed(&said).into_iter().collect();
    let functions = root().join("functions");
    let there: BTreeSet<&str> = said["packages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|package| Path::new(package["manifest_path"].as_str().unwrap()).starts_with(&functions))
        .map(|package| package["name"].as_str().unwrap())
        .chain(["empty_function"])
        .collect();
    assert_eq!(told, there);
}
