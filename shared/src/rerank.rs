//! The client of a reranker: `POST /v1/rerank` as Cohere and Jina have it, and servers that one runs oneself.
//!
//! It reads a question and passages together and says how well each fits: better than ranks that were made
//! of each by itself, and dearer, so it sees only the best of those.
//!
//! <https://docs.cohere.com/reference/rerank>

use std::time::Duration;

use reqwest::Url;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::outbound::{self, OutboundError};
use crate::pricing::RerankPrices;
use crate::secret::Secret;
use crate::trace::Trace;

/// How long a search waits for it: an order that is there is better than a better one that comes too late.
const WITHIN: Duration = Duration::from_secs(3);

/// The client.
#[derive(Clone, Debug)]
pub struct Reranker {
    http: reqwest::Client,
    url: Url,
    key: Secret,
    model: String,
    prices: &'static RerankPrices,
}

impl Reranker {
    /// A client of the service at `base`, such as `https://api.cohere.com`, that asks `model` alone, at these
    /// prices.
    pub fn new(
        http: reqwest::Client,
        base: &Url,
        key: Secret,
        model: String,
        prices: &'static RerankPrices,
    ) -> Self {
        Self { http, url: outbound::joined(base, "v1/rerank"), key, model, prices }
    }

    /// The model that is asked.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// What its calls cost.
    pub const fn prices(&self) -> &'static RerankPrices {
        self.prices
    }

    /// The documents' places, best first, each with its score.
    ///
    /// # Errors
    /// [`OutboundError`], or if the answer does not fit the question.
    pub async fn rank(
        &self,
        query: &str,
        documents: &[String],
        trace: Option<&Trace>,
        deadline: Instant,
    ) -> Result<Vec<(usize, f32)>, OutboundError> {
        let deadline = deadline.min(Instant::now() + WITHIN);
        let request = WireRequest { model: &self.model, query, documents, top_n: documents.len() };
        let call = || self.http.post(self.url.clone()).bearer_auth(self.key.expose()).json(&request);
        ranked(documents.len(), outbound::json(call, trace, deadline).await?)
    }
}

/// Refuses an answer that leaves a document out, names one twice, or gives no comparable score; and does not
/// rely on the order.
fn ranked(documents: usize, answer: WireAnswer) -> Result<Vec<(usize, f32)>, OutboundError> {
    let mut ranked: Vec<(usize, f32)> =
        answer.results.into_iter().map(|result| (result.index, result.relevance_score)).collect();
    let mut places: Vec<usize> = ranked.iter().map(|(index, _)| *index).collect();
    places.sort_unstable();
    if !places.into_iter().eq(0..documents) || ranked.iter().any(|(_, score)| !score.is_finite()) {
        return Err(OutboundError::Malformed(format!("an order that is not one of {documents} documents")));
    }
    ranked.sort_by(|(left, a), (right, b)| b.total_cmp(a).then(left.cmp(right)));
    Ok(ranked)
}

#[derive(Serialize)]
struct WireRequest<'a> {
    model: &'a str,
    query: &'a str,
    documents: &'a [String],
    top_n: usize,
}

#[derive(Deserialize)]
struct WireAnswer {
    results: Vec<WireResult>,
}

#[derive(Deserialize)]
struct WireResult {
    index: usize,
    relevance_score: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(documents: usize, json: &str) -> Result<Vec<(usize, f32)>, String> {
        ranked(documents, serde_json::from_str(json).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_scores_make_the_order_and_ties_keep_theirs() {
        let answer = r#"{"id":"x","results":[{"index":1,"relevance_score":0.2,"document":{"text":"b"}},
            {"index":2,"relevance_score":0.9},{"index":0,"relevance_score":0.2}],"meta":{}}"#;
        assert_eq!(order(3, answer), Ok(vec![(2, 0.9), (0, 0.2), (1, 0.2)]));
        assert_eq!(order(0, r#"{"results":[]}"#), Ok(Vec::new()));
    }

    #[test]
    fn an_answer_that_does_not_fit_is_refused() {
        for bad in [
            r#"{"results":[{"index":0,"relevance_score":0.2}]}"#,
            r#"{"results":[{"index":0,"relevance_score":0.2},{"index":0,"relevance_score":0.1}]}"#,
            r#"{"results":[{"index":0,"relevance_score":0.2},{"index":2,"relevance_score":0.1}]}"#,
            r#"{"results":[{"index":0,"relevance_score":1e39},{"index":1,"relevance_score":0.1}]}"#,
        ] {
            assert!(order(2, bad).is_err(), "{bad}");
        }
    }
}
