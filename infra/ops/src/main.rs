//! `bulkhead`: what operators and auditors do from a terminal.

#![expect(clippy::print_stderr, reason = "this program speaks to a person at a terminal")]

use std::io::{self, BufWriter, ErrorKind};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use ops::show::{self, Format};
use ops::{Failure, Source, verify};
use shared::audit_filter::Filter;
use shared::audit_verify::RETENTION_DAYS;
use shared::clock::Timestamp;
use shared::ids::{DocumentId, UserId};
use shared::ledger::Action;
use shared::tenant::TenantId;

/// Something was found, or something could not be shown.
const FOUND: u8 = 1;
/// It could not be done.
const FAILED: u8 = 2;

/// Bulkhead's operators' program.
#[derive(Debug, Parser)]
#[command(name = "bulkhead")]
enum Command {
    /// Read the audit log
    #[command(subcommand)]
    Audit(Audit),
}

#[derive(Debug, Subcommand)]
enum Audit {
    /// Tell whether the log is complete and unaltered: a line for each finding, and one for each tenant.
    /// Exits with 0 if all is well, 1 if something was found, 2 if something could not be checked
    Verify(Verify),
    /// Show records
    Show(Box<Show>),
}

#[derive(Debug, Args)]
struct Verify {
    /// A copy of the bucket or of one tenant's prefix, or s3://<bucket>[/tenant=<id>]
    place: String,
    /// What a log was in an earlier run, as that run printed it after `head`, which this one must go on
    /// from; or @<file> with that run's output. May be repeated
    #[arg(long)]
    since: Vec<String>,
    /// For how many days after its last record an object must be kept
    #[arg(long, default_value_t = RETENTION_DAYS)]
    retention_days: u32,
}

#[derive(Debug, Args)]
struct Show {
    /// A copy of the bucket or of one tenant's prefix, or s3://<bucket>[/tenant=<id>]
    place: String,
    /// Of this tenant alone
    #[arg(long)]
    tenant: Option<TenantId>,
    /// Written at this instant or later: RFC 3339, or a day, which begins at midnight UTC
    #[arg(long, value_parser = instant)]
    from: Option<Timestamp>,
    /// Written before this instant
    #[arg(long, value_parser = instant)]
    to: Option<Timestamp>,
    /// Of this user
    #[arg(long)]
    user: Option<UserId>,
    /// Of this action, such as llm_call
    #[arg(long, value_parser = action)]
    action: Option<Action>,
    /// Showed or stored this document
    #[arg(long)]
    document: Option<DocumentId>,
    /// Showed this passage
    #[arg(long)]
    chunk: Option<String>,
    /// How to show them
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

fn instant(text: &str) -> Result<Timestamp, String> {
    let day = format!("{text}T00:00:00Z");
    let parsed = Timestamp::parse(text).or_else(|_| Timestamp::parse(&day));
    parsed.map_err(|_| "an instant is written 2026-03-01T00:00:00Z, or 2026-03-01".to_owned())
}

fn action(text: &str) -> Result<Action, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Audit(Audit::Verify(arguments)) => verify(&arguments),
        Command::Audit(Audit::Show(arguments)) => show(*arguments),
    };
    result.unwrap_or_else(|failure| {
        // Whoever closed the pipe wants to read no more.
        if !matches!(&failure, Failure::Output(error) if error.kind() == ErrorKind::BrokenPipe) {
            eprintln!("error: {failure}");
        }
        ExitCode::from(FAILED)
    })
}

fn verify(arguments: &Verify) -> Result<ExitCode, Failure> {
    let since = verify::since(&arguments.since)?;
    let options = verify::Options { retention_days: arguments.retention_days, since };
    let source = Source::open(&arguments.place)?;
    let mut problem = |failure: &Failure| eprintln!("error: {failure}");
    // Findings are few, and each should be seen as it is made.
    let verdict = verify::run(&source, &options, &mut io::stdout().lock(), &mut problem)?;
    Ok(match verdict {
        verify::Verdict { unchecked: 1.., .. } => ExitCode::from(FAILED),
        verify::Verdict { findings: 1.., .. } => ExitCode::from(FOUND),
        verify::Verdict { .. } => ExitCode::SUCCESS,
    })
}

fn show(arguments: Show) -> Result<ExitCode, Failure> {
    let Show { place, tenant, from, to, user, action, document, chunk, format } = arguments;
    if let (Some(from), Some(to)) = (from, to)
        && to <= from
    {
        return Err(Failure::Place(format!("--to {to} is not after --from {from}")));
    }
    let filter = Filter { from, to, user, action, document, chunk };
    let source = Source::open(&place)?;
    let mut problem = |what: &dyn std::fmt::Display| eprintln!("error: {what}");
    let out = BufWriter::with_capacity(1 << 16, io::stdout().lock());
    let unread = show::run(&source, tenant.as_ref(), &filter, format, out, &mut problem)?;
    Ok(if unread == 0 { ExitCode::SUCCESS } else { ExitCode::from(FOUND) })
}
