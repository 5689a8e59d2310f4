//! Questions and answers: `POST /v1/chat` and, in the form of OpenAI's clients, `POST /v1/chat/completions`, as
//! JSON or as server-sent events; and what users come back to: conversations, and what answers were worth.

mod answer;
mod body;
mod conversations;
mod feedback;
mod models;
mod openai;
mod question;
mod wire;

use std::sync::Arc;

use http::{HeaderValue, Method, Response, StatusCode, header};
use lambda_http::{Error, Request};
use reqwest::Url;
use shared::api_key::Permission;
use shared::aws::conversations::ConversationStore;
use shared::aws::data_keys::DataKeys;
use shared::aws::documents::DocumentStore;
use shared::aws::idempotency::IdempotencyStore;
use shared::aws::ledger::Ledger;
use shared::aws::secrets::TenantKeys;
use shared::aws::{self, secrets};
use shared::clock::Clock;
use shared::embeddings::EmbeddingsClient;
use shared::error::{ApiError, Code};
use shared::gate::Gate;
use shared::idempotency::{IdempotencyKey, Stored};
use shared::metrics::Ending;
use shared::model::ModelClient;
use shared::pricing::{self, EmbeddingPrices};
use shared::random::{Entropy, entropy};
use shared::retrieval::Retrieval;
use shared::scope::TenantScope;
use shared::tenant::{EmbeddingModel, ModelAccount};
use shared::valve::Valve;
use shared::vectors::Cells;
use shared::{env, outbound, roots, web};
use tracing::Instrument;

use answer::Time;
pub use body::ChatBody;
use body::Events;
use question::Question;
use wire::{Said, Speaker, Wire};

/// What the function works with.
pub struct Context {
    gate: Gate,
    ledger: Ledger,
    valve: Valve,
    conversations: ConversationStore,
    /// In which edition a document is found that is just changing.
    documents: DocumentStore,
    idempotency: IdempotencyStore,
    data_keys: DataKeys,
    cells: Cells,
    embeddings: EmbeddingsClient,
    embedding_prices: &'static EmbeddingPrices,
    retrieval: Retrieval,
    model: ModelClient,
    /// The keys of tenants that have accounts of their own.
    model_keys: TenantKeys,
    clock: Clock,
    entropy: Entropy,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable or secret is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let access = aws::Access::per_tenant(&aws::config()?)?;
        let tls = roots::outbound()?;
        let http = outbound::client(tls.clone())?;
        let embedding = EmbeddingModel {
            name: env::model("EMBEDDINGS_MODEL")?,
            dimensions: env::parsed("EMBEDDINGS_DIMENSIONS")?,
        };
        let embedding_prices = pricing::embedding_model(&embedding.name)
            .ok_or_else(|| format!("EMBEDDINGS_MODEL names {}, which has no price", embedding.name))?;
        let model_url: Url = env::parsed("MODEL_URL")?;
        let embeddings_url: Url = env::parsed("EMBEDDINGS_URL")?;
        let model_key = secrets::read(&access, "MODEL_KEY_SECRET").await?;
        let embeddings_key = secrets::read(&access, "EMBEDDINGS_KEY_SECRET").await?;
        let retrieval = Retrieval::from_env(&access, http.clone()).await?;
        let clock = Clock::system();
        let conversations = env::table("CONVERSATIONS_TABLE")?;
        Ok(Self {
            gate: Gate::from_env(&access, clock.clone())?,
            ledger: Ledger::new(&access, env::table("AUDIT_TABLE")?),
            valve: Valve::from_env(&access, clock.clone())?,
            idempotency: IdempotencyStore::new(&access, conversations.clone()),
            conversations: ConversationStore::new(&access, conversations),
            documents: DocumentStore::new(&access, env::table("DOCUMENTS_TABLE")?),
            data_keys: DataKeys::new(&access),
            cells: Cells::from_env("QDRANT_CELLS", tls)?,
            embeddings: EmbeddingsClient::new(http.clone(), &embeddings_url, embeddings_key, embedding),
            embedding_prices,
            retrieval,
            model: ModelClient::new(http, &model_url, model_key),
            model_keys: TenantKeys::from_env(&access, "TENANT_MODEL_KEYS")?,
            clock,
            entropy: entropy(),
        })
    }
}

impl Context {
    /// The model's client for a tenant: with the tenant's own key, if it has an account of its own.
    async fn model(&self, scope: &TenantScope) -> Result<ModelClient, ApiError> {
        match scope.model_account() {
            ModelAccount::Shared => Ok(self.model.clone()),
            ModelAccount::Own => match Box::pin(self.model_keys.of(scope)).await {
                Ok(key) => Ok(self.model.with_key(key)),
                Err(error) => {
                    tracing::error!(alert = "model_key_missing", tenant.id = %scope.tenant_id(), "{error}");
                    Err(ApiError::unavailable("the tenant's model account"))
                }
            },
        }
    }

    /// Writes down what is still only remembered: the process is about to end.
    pub async fn close(&self) {
        self.gate.close().await;
    }
}

/// Answers one request.
pub async fn handle(context: Arc<Context>, request: Request) -> Response<ChatBody> {
    let clock = context.clock.clone();
    web::handle(request, &clock, async |request| match (request.method(), web::route(&request)) {
        (&Method::POST, "/v1/chat" | wire::COMPLETIONS) => chat(context, request).await,
        (&Method::GET, "/v1/models") => context.run(request, models::handle).await,
        (&Method::GET, "/v1/conversations") => context.run(request, conversations::list).await,
        (&Method::GET, "/v1/conversations/{id}") => context.run(request, conversations::one).await,
        (&Method::DELETE, "/v1/conversations/{id}") => context.run(request, conversations::delete).await,
        (&Method::POST, "/v1/feedback") => context.run(request, feedback::handle).await,
        _ => Err(ApiError::not_found()),
    })
    .await
}

impl Context {
    /// Handles a request that is no question.
    async fn run(
        &self,
        request: Request,
        handler: impl AsyncFnOnce(&Self, &mut TenantScope, Request) -> Result<Response<ChatBody>, ApiError>,
    ) -> Result<Response<ChatBody>, ApiError> {
        let caller = web::caller(&request)?;
        let run = async |mut scope: TenantScope| handler(self, &mut scope, request).await;
        self.gate.enter(caller, Permission::Chat, run).await
    }
}

async fn chat(context: Arc<Context>, request: Request) -> Result<Response<ChatBody>, ApiError> {
    let prepared = async |mut scope: TenantScope| Ok((prepare(&context, &mut scope, &request).await?, scope));
    let (prepared, scope) = context.gate.enter(web::caller(&request)?, Permission::Chat, prepared).await?;
    let (Begun { answer, wire, stream }, key) = match prepared {
        Prepared::Answering(begun, key) => (begun, key),
        Prepared::Answered(response) => return Ok(response),
    };
    if !stream {
        let stored = finish(&context, &scope, *answer, wire, key, |_| {}).await?;
        return Ok(web::repeated(stored));
    }
    let (events, response) = streamed();
    scope.note().hold();
    // A task of its own: whether or not the client stays, the answer is read to its end and settled.
    let task = async move {
        let speaker = Speaker::begin(wire, events, &answer.meta());
        let finished = finish(&context, &scope, *answer, wire, key, |text| speaker.text(text)).await;
        // Before the last event, after which Lambda may stop the process.
        let error = finished.as_ref().err().map(|error| error.code);
        web::conclude(scope.note(), Ending { status: StatusCode::OK, error }, &context.clock);
        match finished {
            Ok(stored) => speaker.end(&stored),
            Err(error) => speaker.fail(&error, scope.request_id()),
        }
    };
    tokio::spawn(task.instrument(tracing::Span::current()));
    Ok(response)
}

/// A request that has passed everything that can be refused before the first word.
enum Prepared {
    Answering(Begun, Option<IdempotencyKey>),
    /// It repeats one that has its answer.
    Answered(Response<ChatBody>),
}

struct Begun {
    answer: Box<answer::Answering>,
    wire: Wire,
    stream: bool,
}

async fn prepare(
    context: &Context,
    scope: &mut TenantScope,
    request: &Request,
) -> Result<Prepared, ApiError> {
    let started = context.clock.now();
    let time = Time { deadline: web::deadline(request, &context.clock), ends_at_s: web::ends_at_s(request) };
    let Said { asked, wire, stream } = wire::read(request)?;
    let question = match Question::parse(&asked, scope) {
        // What is allowed now may not have been when the decision was made that API Gateway has kept.
        Err(error) if error.code == Code::ModelNotAllowed => {
            context.gate.recheck(scope).await?;
            Question::parse(&asked, scope)?
        }
        parsed => parsed?,
    };
    let key = web::idempotency_key(request, scope)?;
    let first = context.gate.first_result(scope, &context.idempotency, key.as_ref(), time.ends_at_s);
    if let Some(stored) = Box::pin(first).await? {
        return Ok(Prepared::Answered(if stream { again(wire, &stored)? } else { web::repeated(stored) }));
    }
    match answer::begin(context, scope, &asked, question, started, time).await {
        Ok(answer) => Ok(Prepared::Answering(Begun { answer: Box::new(answer), wire, stream }, key)),
        Err(error) => {
            context.idempotency.give_back(scope, key.as_ref()).await;
            Err(error)
        }
    }
}

/// Reads an answer to its end and settles it.
async fn finish(
    context: &Context,
    scope: &TenantScope,
    mut answer: answer::Answering,
    wire: Wire,
    key: Option<IdempotencyKey>,
    show: impl FnMut(&str),
) -> Result<Stored, ApiError> {
    let read = answer.read(context, scope, show).await;
    let settled = answer.settle(context, scope, wire, read, key.as_ref()).await;
    if settled.is_err() {
        context.idempotency.give_back(scope, key.as_ref()).await;
    }
    context.gate.look_back(scope).await;
    settled
}

fn streamed() -> (Events, Response<ChatBody>) {
    let (events, body) = ChatBody::stream();
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    (events, response)
}

/// A first answer, streamed once more.
fn again(wire: Wire, stored: &Stored) -> Result<Response<ChatBody>, ApiError> {
    let (meta, text) = wire.told(stored).map_err(|error| {
        tracing::error!("A kept answer does not parse: {error}");
        ApiError::unavailable("the first answer")
    })?;
    let (events, response) = streamed();
    let speaker = Speaker::begin(wire, events, &meta);
    speaker.text(&text);
    speaker.end(stored);
    Ok(response)
}
