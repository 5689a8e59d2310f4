//! `POST /v1/search`.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use shared::error::{ApiError, Code};
use shared::gate::Need;
use shared::ids::DocumentId;
use shared::meter::Work;
use shared::retrieval::Wanted;
use shared::scope::TenantScope;
use shared::units::Tokens;
use shared::web;

use crate::Context;
use crate::metered::{Metered, Shown};

/// The longest query, in bytes: within what embedding models take, whatever the script.
const MOST_QUERY_BYTES: usize = 8_000;
const DEFAULT_TOP_K: u32 = 10;
const MOST_TOP_K: u32 = 100;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Search {
    query: String,
    top_k: Option<u32>,
}

#[derive(Serialize)]
struct Found {
    hits: Vec<View>,
}

#[derive(Serialize)]
struct View {
    chunk_id: String,
    document_id: DocumentId,
    title: String,
    source: String,
    text: String,
    score: f32,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let started = context.clock.now();
    let deadline = web::deadline(&request, &context.clock);
    let Search { query, top_k } = web::json(&request)?;
    if query.trim().is_empty() {
        return Err(ApiError::invalid("query", "query is empty"));
    }
    if query.len() > MOST_QUERY_BYTES {
        let message = format!("query is longer than {MOST_QUERY_BYTES} bytes");
        return Err(ApiError::new(Code::TooLarge, message).with_param("query"));
    }
    let top_k = top_k.unwrap_or(DEFAULT_TOP_K);
    if !(1..=MOST_TOP_K).contains(&top_k) {
        return Err(ApiError::invalid("top_k", format!("top_k must be between 1 and {MOST_TOP_K}")));
    }
    let key = web::idempotency_key(&request, scope)?;
    let ends_at_s = web::ends_at_s(&request);
    let first = context.gate.first_result(scope, &context.idempotency, key.as_ref(), ends_at_s);
    if let Some(stored) = Box::pin(first).await? {
        return Ok(web::repeated(stored));
    }
    // Exactly what the call can use, so that nothing has to be reserved on the way.
    let tokens = Tokens::most(&query);
    let cost = context.embedding_prices.cost(tokens, started) + context.retrieval.most_cost(started);
    let need = Need { tokens, cost };
    let (admission, _) = match context.gate.admit(scope, Work::Search, |_| Ok(vec![need]), deadline).await {
        Ok(admitted) => admitted,
        Err(error) => {
            context.idempotency.give_back(scope, key.as_ref()).await;
            return Err(error);
        }
    };
    let mut metered = Metered::new(context, scope, admission, deadline);
    // Without a key for a repeat, nothing of it is stored.
    let sealed = if key.is_some() { metered.sealed().await } else { Ok(()) };
    let found = match sealed {
        Ok(()) => find(context, &mut metered, query, top_k).await,
        Err(error) => Err(error),
    };
    let latency_ms = context.clock.now().millis_since(started);
    let stored = metered.settle(key.as_ref(), latency_ms, StatusCode::OK, found).await?;
    Ok(web::repeated(stored))
}

async fn find(
    context: &Context,
    metered: &mut Metered<'_>,
    query: String,
    top_k: u32,
) -> Result<(Found, Shown), ApiError> {
    let collection = context.cells.read(metered.scope(), context.embeddings.model())?;
    let texts = [query];
    let vector = metered.embed(&texts).await?.into_iter().next().unwrap_or_default();
    let [query] = texts;
    let (now, deadline) = (context.clock.now(), metered.deadline());
    let wanted = Wanted { text: &query, vector, top_k, now, deadline };
    let found =
        Box::pin(context.retrieval.find(metered.scope(), &collection, &context.documents, wanted)).await?;
    let hits = found.hits;
    if let Some(reranked) = found.reranked {
        metered.note_reranked(reranked);
    }
    let shown = Shown {
        documents: hits.iter().map(|hit| hit.document_id.clone()).collect(),
        chunks: hits.iter().map(|hit| hit.chunk_id.clone()).collect(),
    };
    let hits = hits
        .into_iter()
        .map(|hit| View {
            chunk_id: hit.chunk_id,
            document_id: hit.document_id,
            title: hit.title,
            source: hit.source,
            text: hit.text,
            score: hit.score,
        })
        .collect();
    Ok((Found { hits }, shown))
}
