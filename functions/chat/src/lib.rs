//! Questions and answers: `POST /v1/chat`, as JSON or as server-sent events.

mod answer;
mod body;
mod question;

use std::sync::Arc;

use http::{HeaderValue, Method, Response, StatusCode, header};
use lambda_http::{Error, Request};
use reqwest::Url;
use serde_json::json;
use shared::api_key::Permission;
use shared::aws::conversations::ConversationStore;
use shared::aws::{self, secrets};
use shared::clock::Clock;
use shared::embeddings::EmbeddingsClient;
use shared::error::ApiError;
use shared::model::ModelClient;
use shared::pricing::{self, EmbeddingPrices};
use shared::random::{Entropy, entropy};
use shared::tenant::EmbeddingModel;
use shared::vectors::Cells;
use shared::{env, outbound, web};
use tracing::Instrument;

pub use body::ChatBody;
use question::Question;

/// What the function works with.
pub struct Context {
    conversations: ConversationStore,
    cells: Cells,
    embeddings: EmbeddingsClient,
    embedding_prices: &'static EmbeddingPrices,
    model: ModelClient,
    clock: Clock,
    entropy: Entropy,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable or secret is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config().await;
        let http = outbound::client()?;
        let embedding = EmbeddingModel {
            name: env::text("EMBEDDINGS_MODEL")?,
            dimensions: env::parsed("EMBEDDINGS_DIMENSIONS")?,
        };
        let embedding_prices = pricing::embedding_model(&embedding.name)
            .ok_or_else(|| format!("EMBEDDINGS_MODEL names {}, which has no price", embedding.name))?;
        let model_url: Url = env::parsed("MODEL_URL")?;
        let embeddings_url: Url = env::parsed("EMBEDDINGS_URL")?;
        let (model_key, embeddings_key) = tokio::try_join!(
            secrets::read(&config, "MODEL_KEY_SECRET"),
            secrets::read(&config, "EMBEDDINGS_KEY_SECRET")
        )?;
        Ok(Self {
            conversations: ConversationStore::new(&config, env::text("CONVERSATIONS_TABLE")?),
            cells: env::parsed("QDRANT_CELLS")?,
            embeddings: EmbeddingsClient::new(http.clone(), &embeddings_url, embeddings_key, embedding),
            embedding_prices,
            model: ModelClient::new(http, &model_url, model_key),
            clock: Clock::system(),
            entropy: entropy(),
        })
    }
}

/// Answers one request.
pub async fn handle(context: Arc<Context>, request: Request) -> Response<ChatBody> {
    let clock = context.clock.clone();
    web::handle(request, &clock, async |request| {
        if (request.method(), web::route(&request)) != (&Method::POST, "/v1/chat") {
            return Err(ApiError::not_found());
        }
        chat(context, request).await
    })
    .await
}

async fn chat(context: Arc<Context>, request: Request) -> Result<Response<ChatBody>, ApiError> {
    let started = context.clock.now();
    let deadline = web::deadline(&request, &context.clock);
    let scope = web::tenant(&request, Permission::Chat, &context.clock)?;
    let question = Question::parse(web::json(&request)?, &scope)?;
    let stream = question.stream;
    let mut answering = answer::begin(&context, &scope, question, started, deadline).await?;
    if !stream {
        while answering.next_text().await?.is_some() {}
        let done = answering.settle(&context, &scope).await?;
        return Ok(web::reply(StatusCode::OK, &done));
    }

    let id = scope.request_id().clone();
    let (events, body) = ChatBody::stream();
    // A task of its own: whether or not the client stays, the answer is read to its end and kept.
    let task = async move {
        events.send("meta", &answering.meta());
        let outcome = async {
            while let Some(text) = answering.next_text().await? {
                events.send("delta", &json!({ "text": text }));
            }
            answering.settle(&context, &scope).await
        };
        match outcome.await {
            Ok(done) => events.send("done", &done),
            Err(error) => events.send("error", &error.body(&id)),
        }
    };
    tokio::spawn(task.instrument(tracing::Span::current()));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}
