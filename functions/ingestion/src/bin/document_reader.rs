//! The program that reads one document, for the functions: see `extract::apart`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ingestion::read_document(std::env::args())
}
