//! The operators' and auditors' program `bulkhead`: reads the audit log as it is stored.
//!
//! Its commands are functions of a [`Source`] and a writer. On a copy of the log they work on files
//! alone, without an account.

mod files;
mod s3;
pub mod show;
pub mod source;
pub mod verify;

pub use source::{Failure, Source};
