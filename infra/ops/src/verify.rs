//! `audit verify`: is every log complete and unaltered?

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};

use shared::audit_verify::{Anchor, Finding, InvalidAnchor, Rules, Summary, Verifier};
use shared::tenant::TenantId;

use crate::source::{Failure, Source};

/// What the logs are held to.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// For how many days after its last record an object must be kept.
    pub retention_days: u32,
    /// What logs were in an earlier run.
    pub since: BTreeMap<TenantId, Anchor>,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What is wrong with the logs.
    pub findings: u64,
    /// Logs that could not be checked to their end.
    pub unchecked: u64,
}

/// Reads what `--since` is given: states as an earlier run printed them, or `@` and the name of a file
/// with some in it, such as that run's whole output.
///
/// # Errors
/// If something given is no such state, or two of them are of one tenant.
pub fn since(given: &[String]) -> Result<BTreeMap<TenantId, Anchor>, Failure> {
    let place = |text: &str, error: InvalidAnchor| Failure::Place(format!("--since {text:?}: {error}"));
    let mut anchors: Vec<Anchor> = Vec::new();
    for text in given {
        let Some(file) = text.strip_prefix('@') else {
            anchors.push(text.parse().map_err(|error| place(text, error))?);
            continue;
        };
        let content = fs::read_to_string(file).map_err(Failure::read(file))?;
        let before = anchors.len();
        anchors.extend(content.split_whitespace().filter_map(|word| word.parse().ok()));
        // A file without any would check nothing, and say nothing of it.
        if anchors.len() == before {
            return Err(place(text, InvalidAnchor));
        }
    }
    let mut by_tenant = BTreeMap::new();
    for anchor in anchors {
        if let Some(other) = by_tenant.insert(anchor.tenant.clone(), anchor.clone())
            && other != anchor
        {
            return Err(Failure::Place(format!("--since names {} twice", anchor.tenant)));
        }
    }
    Ok(by_tenant)
}

/// Verifies every log of a source: a line for each finding, and then one for each tenant. A log that
/// cannot be read does not keep the others from being verified.
///
/// # Errors
/// If nothing can be verified, or nothing said.
pub fn run(
    source: &Source,
    options: &Options,
    out: &mut impl Write,
    problem: &mut impl FnMut(&Failure),
) -> Result<Verdict, Failure> {
    let mut tenants: BTreeSet<TenantId> = source.tenants()?.into_iter().collect();
    // A log that was there and is gone is found too.
    let gone = |tenant: &&TenantId| source.only().is_none_or(|only| only == *tenant);
    tenants.extend(options.since.keys().filter(gone).cloned());
    if tenants.is_empty() {
        return Err(Failure::Place("there are no logs in it".into()));
    }
    let mut verdict = Verdict::default();
    let mut summaries = Vec::new();
    for tenant in tenants {
        match verify(source, options, tenant, out, &mut verdict.findings) {
            Ok(summary) => summaries.push(summary),
            Err(Failure::Output(error)) => return Err(error.into()),
            Err(failure) => {
                verdict.unchecked += 1;
                problem(&failure);
            }
        }
    }
    for summary in summaries {
        writeln!(out, "{summary}")?;
    }
    Ok(verdict)
}

fn verify(
    source: &Source,
    options: &Options,
    tenant: TenantId,
    out: &mut impl Write,
    findings: &mut u64,
) -> Result<Summary, Failure> {
    let log = source.log(&tenant)?;
    let rules = Rules { retention_days: options.retention_days, since: options.since.get(&tenant).cloned() };
    let mut verifier = Verifier::new(tenant, rules);
    let mut written: io::Result<()> = Ok(());
    let mut report = |finding: Finding| {
        *findings += 1;
        if written.is_ok() {
            written = writeln!(out, "{finding}");
        }
    };
    for (name, object) in source.objects(log.objects.iter()) {
        let (kept, bytes) = object?;
        verifier.object(&name.key, kept, bytes, &mut report).map_err(Failure::read(&name.key))?;
    }
    let summary = verifier.finish(log.head.as_deref(), &mut report);
    written?;
    Ok(summary)
}
