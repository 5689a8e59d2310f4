//! Embedding under an admission: reserved before each call, for no more than the call can use, and
//! settled as one with the request.

use std::sync::Arc;

use http::StatusCode;
use serde::Serialize;
use shared::aws::ledger::Along;
use shared::clock::{Clock, Timestamp};
use shared::embeddings::EmbeddingsClient;
use shared::error::ApiError;
use shared::gate::{Admission, Need};
use shared::idempotency::{IdempotencyKey, Stored};
use shared::ids::DocumentId;
use shared::ledger::Entry;
use shared::retrieval::Reranked;
use shared::scope::TenantScope;
use shared::sealing::DataKey;
use shared::units::{NanoUsd, Tokens};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::Context;

/// An admitted request that embeds.
pub(crate) struct Metered<'a> {
    context: &'a Context,
    scope: &'a TenantScope,
    deadline: Instant,
    reads_until: Instant,
    held: Mutex<Held>,
    seal: Option<Arc<DataKey>>,
    reranked: Option<Reranked>,
}

struct Held {
    admission: Admission,
    /// What was used.
    spent: Tokens,
    /// What the calls under way can use.
    under_way: Tokens,
    estimated: bool,
}

/// What a request showed or stored.
#[derive(Default)]
pub(crate) struct Shown {
    pub(crate) documents: Vec<DocumentId>,
    pub(crate) chunks: Vec<String>,
}

impl<'a> Metered<'a> {
    pub(crate) fn new(
        context: &'a Context,
        scope: &'a TenantScope,
        admission: Admission,
        deadline: Instant,
    ) -> Self {
        let held = Held { admission, spent: Tokens(0), under_way: Tokens(0), estimated: false };
        let reads_until = deadline;
        Self { context, scope, deadline, reads_until, held: Mutex::new(held), seal: None, reranked: None }
    }

    /// Leaves time to store what was read: no document is read after `until`.
    pub(crate) fn reading_until(self, until: Instant) -> Self {
        Self { reads_until: self.deadline.min(until), ..self }
    }

    /// By when a document has to be read.
    pub(crate) const fn reads_until(&self) -> Instant {
        self.reads_until
    }

    /// Gets what is stored of the request sealed, where the tenant has a key of its own: before anything is spent.
    ///
    /// # Errors
    /// If there is no data key: then nothing can be stored.
    pub(crate) async fn sealed(&mut self) -> Result<(), ApiError> {
        self.seal = Box::pin(self.context.data_keys.of(self.scope)).await?;
        Ok(())
    }

    /// What seals what is stored, where the tenant has a key of its own.
    pub(crate) fn seal(&self) -> Option<&DataKey> {
        self.seal.as_deref()
    }

    /// The request's tenant.
    pub(crate) const fn scope(&self) -> &'a TenantScope {
        self.scope
    }

    /// By when the request has to be answered.
    pub(crate) const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// By when whatever the request does has ended.
    pub(crate) fn ends_by(&self) -> Timestamp {
        ends_by(&self.context.clock, self.deadline)
    }

    /// Reserves the least that a document's texts are likely to take, so that one that cannot fit into what is left is
    /// refused before any of it is paid for.
    ///
    /// # Errors
    /// The refusal that the caller is to see.
    pub(crate) async fn plan(&self, texts: impl Iterator<Item = Tokens> + Send) -> Result<(), ApiError> {
        let planned: Tokens = texts.sum();
        let mut held = self.held.lock().await;
        let total = held.spent + held.under_way + planned;
        self.extend(&mut held, total).await
    }

    /// Has at least so much reserved.
    async fn extend(&self, held: &mut Held, total: Tokens) -> Result<(), ApiError> {
        if total > held.admission.reserved() {
            let need = Need { tokens: total, cost: self.cost(total) };
            self.context.gate.extend(self.scope, &mut held.admission, need).await?;
        }
        Ok(())
    }

    /// Notes a call of the reranker, to be charged with the request.
    pub(crate) fn note_reranked(&mut self, reranked: Reranked) {
        self.reranked = Some(reranked);
    }

    /// Vectors of `texts`, in their order.
    ///
    /// # Errors
    /// The refusal or failure that the caller is to see.
    pub(crate) async fn embed(&self, texts: &[String]) -> Result<Vec<Vec<f32>>, ApiError> {
        let trace = self.scope.note().trace();
        let mut vectors = Vec::with_capacity(texts.len());
        let mut rest = texts;
        while !rest.is_empty() {
            let (batch, after) = rest.split_at(self.reserve(rest).await?);
            let bound = most(batch);
            let answer = self.context.embeddings.embed(batch, trace.as_ref(), self.deadline).await;
            let mut held = self.held.lock().await;
            held.under_way = held.under_way.saturating_sub(bound);
            match answer {
                Ok(embedded) => {
                    held.spent = held.spent + embedded.tokens;
                    vectors.extend(embedded.vectors);
                }
                Err(error) => {
                    if error.may_have_cost() {
                        held.spent = held.spent + bound;
                        held.estimated = true;
                    }
                    return Err(error.into_api("the embedding model"));
                }
            }
            rest = after;
        }
        Ok(vectors)
    }

    /// Reserves a call for the first of `texts`, and says for how many. Where the budget nears its end,
    /// calls get smaller: a bound is several times what is used in the end, and must not be what
    /// refuses.
    async fn reserve(&self, texts: &[String]) -> Result<usize, ApiError> {
        let mut held = self.held.lock().await;
        let needed = held.spent + held.under_way;
        let slack = held.admission.reserved().saturating_sub(needed);
        let left = self.scope.note().standing().map_or(Tokens(0), |s| s.day_remaining.min(s.month_remaining));
        let count = EmbeddingsClient::fitting(texts, left + slack);
        let bound = texts.get(..count).map_or(Tokens(0), most);
        self.extend(&mut held, needed + bound).await?;
        held.under_way = held.under_way + bound;
        Ok(count)
    }

    fn cost(&self, tokens: Tokens) -> NanoUsd {
        self.context.embedding_prices.cost(tokens, self.context.clock.now())
    }

    /// Settles the request with its result, which a repeat under `key` will be given again.
    ///
    /// # Errors
    /// Those of `result`, or of settling.
    pub(crate) async fn settle<T: Serialize>(
        self,
        key: Option<&IdempotencyKey>,
        latency_ms: u64,
        status: StatusCode,
        result: Result<(T, Shown), ApiError>,
    ) -> Result<Stored, ApiError> {
        let Self { context, scope, held, seal, reranked, .. } = self;
        let Held { admission, spent, estimated, .. } = held.into_inner();
        let embedding = Some((context.embeddings.model().name.clone(), spent));
        let mut entry = Entry { embedding, estimated, latency_ms, ..Entry::default() };
        if let Some(reranked) = reranked {
            entry.rerank = Some(reranked.model);
            entry.estimated |= reranked.estimated;
        }
        let settled = match result {
            Ok((answer, shown)) => {
                entry.documents = shown.documents;
                entry.documents.sort_unstable();
                entry.documents.dedup();
                entry.chunks = shown.chunks;
                let body = serde_json::to_string(&answer).map_err(|error| {
                    tracing::error!("An answer does not serialise: {error}");
                    ApiError::unavailable("the answer")
                })?;
                let stored = Stored { status: status.as_u16(), body };
                let now = context.clock.now();
                let finished = key.map(|key| context.idempotency.finished(key, &stored, now));
                let record = context.gate.draft(scope, &admission, entry);
                let along = Along { finished, seal: seal.as_deref(), ..Along::default() };
                context.gate.settle(scope, admission, record, along).await.map(|_| stored)
            }
            Err(error) => {
                entry.error = Some(error.code);
                let record = context.gate.draft(scope, &admission, entry);
                if let Err(second) = context.gate.settle(scope, admission, record, Along::default()).await {
                    tracing::error!("A failed request could not be settled: {second}");
                }
                Err(error)
            }
        };
        if settled.is_err() {
            context.idempotency.give_back(scope, key).await;
        }
        settled
    }
}

/// How much longer than its deadline an invocation may live, in milliseconds: what it keeps to settle, and the skew of
/// two clocks.
const AFTERWARDS_MS: u64 = 30_000;

/// By when an invocation has ended that has to have answered by `deadline`, or was cut off.
pub(crate) fn ends_by(clock: &Clock, deadline: Instant) -> Timestamp {
    let left =
        u64::try_from(deadline.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(u64::MAX);
    clock.now().plus_millis(i64::try_from(left.saturating_add(AFTERWARDS_MS)).unwrap_or(i64::MAX))
}

/// The most tokens of texts.
fn most(texts: &[String]) -> Tokens {
    texts.iter().map(|text| Tokens::most(text)).sum()
}
