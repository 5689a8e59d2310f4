//! `bulkhead`: what operators and auditors do from a terminal.

#![expect(clippy::print_stderr, reason = "this program speaks to a person at a terminal")]

use std::io::{self, BufWriter, ErrorKind};
use std::process::ExitCode;

use clap::Parser;
use ops::api::CallError;
use ops::command::{Audit, Command, Show, Verify};
use ops::{Failure, Source, cost, operate, show, verify};
use shared::audit_filter::Filter;
use tokio::runtime::Builder;

/// Something was found, or something could not be shown.
const FOUND: u8 = 1;
/// It could not be done.
const FAILED: u8 = 2;

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Audit(Audit::Verify(arguments)) => verify(&arguments),
        Command::Audit(Audit::Show(arguments)) => show(*arguments),
        Command::Cost(wanted) => {
            cost::run(&wanted, &mut io::stdout().lock()).map(|()| ExitCode::SUCCESS).map_err(Failure::Output)
        }
        command => return operate(command),
    };
    result.unwrap_or_else(|failure| {
        // Whoever closed the pipe wants to read no more.
        if !matches!(&failure, Failure::Output(error) if error.kind() == ErrorKind::BrokenPipe) {
            eprintln!("error: {failure}");
        }
        ExitCode::from(FAILED)
    })
}

fn operate(command: Command) -> ExitCode {
    let result = Builder::new_current_thread().enable_all().build().map_err(CallError::from);
    let result = result.and_then(|runtime| {
        let (input, out) = (io::stdin().lock(), io::stdout().lock());
        runtime.block_on(operate::run(command, input, out, io::stderr()))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(&error, CallError::Output(error) if error.kind() == ErrorKind::BrokenPipe) {
                eprintln!("error: {error}");
            }
            ExitCode::from(error.exit_code())
        }
    }
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
