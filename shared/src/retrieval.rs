//! From a question and its vector to the passages that are shown for it: found by both methods, put in order by a
//! reranker where there is one, and not all of one document.

use reqwest::Url;
use tokio::time::Instant;

use crate::aws::documents::DocumentStore;
use crate::aws::{Access, secrets};
use crate::clock::Timestamp;
use crate::error::ApiError;
use crate::ranking::{MOST_OF_ONE, diverse};
use crate::rerank::Reranker;
use crate::scope::TenantScope;
use crate::units::NanoUsd;
use crate::vectors::{CANDIDATES, Collection, Hit};
use crate::{editions, env, pricing};

/// How many times as many passages are looked at as are wanted, so that there are some of other documents.
const LOOKED_AT: u32 = 3;

/// How passages are chosen.
#[derive(Clone, Debug, Default)]
pub struct Retrieval {
    reranker: Option<Reranker>,
}

/// What is asked for.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// The question, as it is searched.
    pub text: &'a str,
    /// Its vector.
    pub vector: Vec<f32>,
    /// The most passages.
    pub top_k: u32,
    /// The present.
    pub now: Timestamp,
    /// By when the request has to be answered.
    pub deadline: Instant,
}

/// What was found.
#[derive(Debug, PartialEq)]
pub struct Found {
    /// The passages, best first.
    pub hits: Vec<Hit>,
    /// The reranker's call, if there was one that is charged.
    pub reranked: Option<Reranked>,
}

/// A call of the reranker that is charged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reranked {
    /// Its model.
    pub model: String,
    /// Whether nobody knows that it was done: it was not answered.
    pub estimated: bool,
}

impl Retrieval {
    /// As the environment describes it: with a reranker if `RERANK_URL`, `RERANK_MODEL` and `RERANK_KEY_SECRET` are
    /// there, without if none of them is.
    ///
    /// # Errors
    /// If only some are there, if one or the secret is malformed, or if the model has no price; the error names the
    /// variable.
    pub async fn from_env(
        access: &Access,
        http: reqwest::Client,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        if ["RERANK_URL", "RERANK_MODEL", "RERANK_KEY_SECRET"]
            .into_iter()
            .all(|name| env::text(name).is_err())
        {
            return Ok(Self::default());
        }
        let base: Url = env::parsed("RERANK_URL")?;
        let model = env::model("RERANK_MODEL")?;
        let prices = pricing::rerank_model(&model)
            .ok_or_else(|| format!("RERANK_MODEL names {model}, which has no price"))?;
        let key = secrets::read(access, "RERANK_KEY_SECRET").await?;
        Ok(Self { reranker: Some(Reranker::new(http, &base, key, model, prices)) })
    }

    /// What finding passages costs at most at the prices in force at `at`, beside the question's vector.
    pub fn most_cost(&self, at: Timestamp) -> NanoUsd {
        self.reranker.as_ref().map_or(NanoUsd(0), |reranker| reranker.prices().cost(at))
    }

    /// The passages to show.
    ///
    /// # Errors
    /// If a store fails. Without the reranker the order is that of the search, and the failure is
    /// counted.
    pub async fn find(
        &self,
        scope: &TenantScope,
        collection: &Collection<'_>,
        documents: &DocumentStore,
        wanted: Wanted<'_>,
    ) -> Result<Found, ApiError> {
        let Wanted { text, vector, top_k, now, deadline } = wanted;
        let candidates = match &self.reranker {
            Some(_) => CANDIDATES,
            None => CANDIDATES.min(top_k.saturating_mul(LOOKED_AT)),
        };
        let most = candidates.max(top_k);
        let mut hits = editions::search(collection, documents, scope, (text, vector), most, now).await?;
        let mut reranked = None;
        if let Some(reranker) = self.reranker.as_ref().filter(|_| hits.len() > 1) {
            (hits, reranked) = reorder(scope, reranker, text, hits, deadline).await;
        }
        let top = usize::try_from(top_k).unwrap_or(usize::MAX);
        let hits = diverse(hits, |hit| hit.document_id.clone(), MOST_OF_ONE, top);
        Ok(Found { hits, reranked })
    }
}

/// The hits in the reranker's order, with its scores; as they were if it has none.
async fn reorder(
    scope: &TenantScope,
    reranker: &Reranker,
    text: &str,
    hits: Vec<Hit>,
    deadline: Instant,
) -> (Vec<Hit>, Option<Reranked>) {
    let documents: Vec<String> = hits.iter().map(|hit| format!("{}\n\n{}", hit.title, hit.text)).collect();
    let charged = |estimated| Some(Reranked { model: reranker.model().to_owned(), estimated });
    match reranker.rank(text, &documents, scope.note().trace().as_ref(), deadline).await {
        Ok(order) => {
            let mut hits: Vec<Option<Hit>> = hits.into_iter().map(Some).collect();
            let ordered = order.into_iter().filter_map(|(place, score)| {
                let hit = hits.get_mut(place)?.take()?;
                Some(Hit { score, ..hit })
            });
            (ordered.collect(), charged(false))
        }
        Err(error) => {
            scope.note().measure(|measured| measured.rerank_failures += 1);
            tracing::warn!("The reranker gave no order, the search's own holds: {error}");
            (hits, if error.may_have_cost() { charged(true) } else { None })
        }
    }
}
