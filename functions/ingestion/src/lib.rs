//! A tenant's documents: adding, replacing, reading, deleting and searching them.

mod delete;
mod extract;
mod put;
mod read;
mod search;

use http::{Method, Response};
use lambda_http::{Body, Error, Request};
use reqwest::Url;
use shared::aws::documents::DocumentStore;
use shared::aws::{self, secrets};
use shared::clock::Clock;
use shared::embeddings::EmbeddingsClient;
use shared::error::ApiError;
use shared::pricing;
use shared::tenant::EmbeddingModel;
use shared::vectors::Cells;
use shared::{env, outbound, web};

/// What the function works with.
pub struct Context {
    documents: DocumentStore,
    cells: Cells,
    embeddings: EmbeddingsClient,
    clock: Clock,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable or secret is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config().await;
        let embedding = EmbeddingModel {
            name: env::text("EMBEDDINGS_MODEL")?,
            dimensions: env::parsed("EMBEDDINGS_DIMENSIONS")?,
        };
        if pricing::embedding_model(&embedding.name).is_none() {
            return Err(format!("EMBEDDINGS_MODEL names {}, which has no price", embedding.name).into());
        }
        let url: Url = env::parsed("EMBEDDINGS_URL")?;
        let key = secrets::read(&config, "EMBEDDINGS_KEY_SECRET").await?;
        Ok(Self {
            documents: DocumentStore::new(&config, env::text("DOCUMENTS_TABLE")?),
            cells: env::parsed("QDRANT_CELLS")?,
            embeddings: EmbeddingsClient::new(outbound::client()?, &url, key, embedding),
            clock: Clock::system(),
        })
    }
}

/// Answers one request.
pub async fn handle(context: &Context, request: Request) -> Response<Body> {
    web::handle(request, &context.clock, async |request| match (request.method(), web::route(&request)) {
        (&Method::POST, "/v1/documents") => put::handle(context, request).await,
        (&Method::GET, "/v1/documents") => read::list(context, request).await,
        (&Method::GET, "/v1/documents/{id}") => read::one(context, request).await,
        (&Method::DELETE, "/v1/documents/{id}") => delete::handle(context, request).await,
        (&Method::POST, "/v1/search") => search::handle(context, request).await,
        _ => Err(ApiError::not_found()),
    })
    .await
}
