//! The local stack: small servers that speak the protocols of the cloud services the functions use.

pub mod s3;
pub mod secrets;
pub mod serving;
