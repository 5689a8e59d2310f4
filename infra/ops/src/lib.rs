//! The operators' and auditors' program `bulkhead`: asks the operators' routes, and reads the audit log as
//! it is stored.
//!
//! Its commands on the log are functions of a [`Source`] and a writer. On a copy of the log they work on
//! files alone, without an account.

pub mod api;
pub mod command;
pub mod cost;
mod files;
pub mod operate;
mod s3;
pub mod show;
pub mod source;
mod table;
pub mod verify;

pub use source::{Failure, Source};
