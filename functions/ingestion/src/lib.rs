//! A tenant's documents: adding, replacing, reading, deleting and searching them.

mod delete;
mod extract;
mod metered;
mod put;
mod read;
mod regroup;
mod search;
mod store;
mod upload;
pub mod worker;

use http::{Method, Response};
use lambda_http::{Body, Error, Request};
use reqwest::Url;
use shared::api_key::Permission::{self, Chat, DocumentsRead, DocumentsWrite};
use shared::aws::data_keys::DataKeys;
use shared::aws::documents::DocumentStore;
use shared::aws::idempotency::IdempotencyStore;
use shared::aws::ledger::Ledger;
use shared::aws::upload_records::UploadRecords;
use shared::aws::uploads::Uploads;
use shared::aws::{self, SdkConfig, secrets};
use shared::clock::Clock;
use shared::embeddings::EmbeddingsClient;
use shared::error::ApiError;
use shared::gate::Gate;
use shared::pricing::{self, EmbeddingPrices};
use shared::retrieval::Retrieval;
use shared::scope::TenantScope;
use shared::tenant::EmbeddingModel;
use shared::vectors::Cells;
use shared::{env, outbound, roots, web};

use crate::extract::apart::Reader;

pub use extract::apart::{keep_to_itself, read_document};
#[doc(hidden)]
pub use extract::fuzz;

/// What the function works with.
pub struct Context {
    gate: Gate,
    ledger: Ledger,
    idempotency: IdempotencyStore,
    documents: DocumentStore,
    upload_records: UploadRecords,
    uploads: Uploads,
    reader: Reader,
    data_keys: DataKeys,
    cells: Cells,
    embeddings: EmbeddingsClient,
    embedding_prices: &'static EmbeddingPrices,
    retrieval: Retrieval,
    clock: Clock,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable or secret is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        Self::of(&aws::config()?).await
    }

    /// As [`Context::from_env`], over connections that there are already.
    async fn of(config: &SdkConfig) -> Result<Self, Error> {
        let reader = Reader::find()?;
        let access = aws::Access::per_tenant(config)?;
        let embedding = EmbeddingModel {
            name: env::model("EMBEDDINGS_MODEL")?,
            dimensions: env::parsed("EMBEDDINGS_DIMENSIONS")?,
        };
        let embedding_prices = pricing::embedding_model(&embedding.name)
            .ok_or_else(|| format!("EMBEDDINGS_MODEL names {}, which has no price", embedding.name))?;
        let url: Url = env::parsed("EMBEDDINGS_URL")?;
        let (clock, tls) = (Clock::system(), roots::outbound()?);
        let http = outbound::client(tls.clone())?;
        let key = secrets::read(&access, "EMBEDDINGS_KEY_SECRET").await?;
        let retrieval = Retrieval::from_env(&access, http.clone()).await?;
        Ok(Self {
            gate: Gate::from_env(&access, clock.clone())?,
            ledger: Ledger::new(&access, env::table("AUDIT_TABLE")?),
            idempotency: IdempotencyStore::new(&access, env::table("CONVERSATIONS_TABLE")?),
            documents: DocumentStore::new(&access, env::table("DOCUMENTS_TABLE")?),
            upload_records: UploadRecords::new(&access, env::table("DOCUMENTS_TABLE")?),
            uploads: Uploads::new(&access, env::bucket("DOCUMENTS_BUCKET")?),
            reader,
            data_keys: DataKeys::new(&access),
            cells: Cells::from_env("QDRANT_CELLS", tls)?,
            embeddings: EmbeddingsClient::new(http, &url, key, embedding),
            embedding_prices,
            retrieval,
            clock,
        })
    }
}

impl Context {
    /// Writes down what is still only remembered: the process is about to end.
    pub async fn close(&self) {
        self.gate.close().await;
    }
}

/// Answers one request.
pub async fn handle(context: &Context, request: Request) -> Response<Body> {
    web::handle(request, &context.clock, async |request| match (request.method(), web::route(&request)) {
        (&Method::POST, "/v1/documents") => context.run(request, DocumentsWrite, put::handle).await,
        (&Method::GET, "/v1/documents") => context.run(request, DocumentsRead, read::list).await,
        (&Method::GET, "/v1/documents/{id}") => context.run(request, DocumentsRead, read::one).await,
        (&Method::DELETE, "/v1/documents/{id}") => context.run(request, DocumentsWrite, delete::handle).await,
        (&Method::POST, "/v1/uploads") => context.run(request, DocumentsWrite, upload::handle).await,
        (&Method::POST, "/v1/search") => context.run(request, Chat, search::handle).await,
        _ => Err(ApiError::not_found()),
    })
    .await
}

impl Context {
    /// Handles a request that needs `permission`.
    async fn run(
        &self,
        request: Request,
        permission: Permission,
        handler: impl AsyncFnOnce(&Self, &mut TenantScope, Request) -> Result<Response<Body>, ApiError>,
    ) -> Result<Response<Body>, ApiError> {
        let caller = web::caller(&request)?;
        let run = async |mut scope: TenantScope| handler(self, &mut scope, request).await;
        self.gate.enter(caller, permission, run).await
    }
}
