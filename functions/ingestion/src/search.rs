//! `POST /v1/search`.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use shared::api_key::Permission;
use shared::error::{ApiError, Code};
use shared::ids::DocumentId;
use shared::web;

use crate::Context;

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

pub(crate) async fn handle(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let deadline = web::deadline(&request, &context.clock);
    let scope = web::tenant(&request, Permission::Chat, &context.clock)?;
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
    let collection = context.cells.read(&scope, context.embeddings.model())?;
    let texts = [query];
    let embedded =
        context.embeddings.embed(&texts, deadline).await.map_err(|e| e.into_api("the embedding model"))?;
    let [query] = texts;
    let vector = embedded.vectors.into_iter().next().unwrap_or_default();
    let hits = collection.search(&query, vector, top_k).await?;
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
    Ok(web::reply(StatusCode::OK, &Found { hits }))
}
