//! Qdrant's gRPC interface over Qdrant's own engine (`qdrant-edge`), in this process.
//!
//! What is served is served for real: named dense and sparse vectors, BM25 computed on the server,
//! fusion by rank, filters, payload indexes, and tokens as the real server checks them. Every other
//! call is answered `UNIMPLEMENTED` with its name. One directory holds one collection; what a write
//! has answered survives the process.

mod access;
mod convert;
mod service;
mod store;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use qdrant_client::qdrant::collections_server::CollectionsServer;
use qdrant_client::qdrant::points_server::PointsServer;
use qdrant_client::qdrant::qdrant_server::QdrantServer;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use access::Keys;
use service::Service;
use store::Store;

use crate::serving::Traces;

/// The largest message taken or sent: a write of a few hundred passages with their vectors.
const MOST_BYTES: usize = 64 << 20;

/// Why the server cannot start, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of the collections cannot be used.
    #[error("the directory of the vector collections cannot be used: {0}")]
    Directory(#[from] std::io::Error),
    /// The server failed.
    #[error("the vector server failed: {0}")]
    Server(#[from] tonic::transport::Error),
}

/// Serves Qdrant's gRPC interface until `shutdown` resolves. Collections live in `directory`, one
/// folder each; `root_key` opens everything and signs the tokens of single collections. Where in a trace
/// each call says to be is noted in `traces`.
///
/// # Errors
/// If the directory cannot be used or the server fails.
pub async fn serve(
    listener: TcpListener,
    directory: PathBuf,
    root_key: String,
    traces: Traces,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let service = Arc::new(Service::new(Store::open(directory)?, Keys::new(root_key), traces));
    Server::builder()
        .add_service(QdrantServer::from_arc(Arc::clone(&service)))
        .add_service(
            CollectionsServer::from_arc(Arc::clone(&service))
                .max_decoding_message_size(MOST_BYTES)
                .max_encoding_message_size(MOST_BYTES),
        )
        .add_service(
            PointsServer::from_arc(service)
                .max_decoding_message_size(MOST_BYTES)
                .max_encoding_message_size(MOST_BYTES),
        )
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), shutdown)
        .await?;
    Ok(())
}
