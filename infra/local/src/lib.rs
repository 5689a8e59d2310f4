//! The local stack: small servers that speak the protocols of the cloud services the functions use.

mod aws_json;
pub mod cargo;
pub mod control;
pub mod dynamodb;
pub mod event_pattern;
pub mod gateway;
pub mod iam;
pub mod identity;
pub mod kms;
pub mod lambda;
pub mod lexis;
pub mod offline_embeddings;
pub mod offline_model;
pub mod qdrant;
pub mod queues;
pub mod s3;
pub mod schedules;
pub mod secrets;
pub mod serving;
pub mod sigv4;
pub mod stack;
pub mod streams;
pub mod sts;
pub mod template;
