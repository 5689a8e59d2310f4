//! The client of an OpenAI-compatible `/v1/embeddings` endpoint.
//!
//! <https://platform.openai.com/docs/api-reference/embeddings>

use reqwest::Url;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::outbound::{self, OutboundError};
use crate::secret::Secret;
use crate::tenant::EmbeddingModel;
use crate::units::Tokens;

/// Texts in one call; the service takes 2,048, but fewer keep a repeated call cheap.
const BATCH: usize = 128;
/// Estimated tokens in one call; the service takes 300,000.
const BATCH_TOKENS: Tokens = Tokens(100_000);

/// The client. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EmbeddingsClient {
    http: reqwest::Client,
    url: Url,
    key: Secret,
    model: EmbeddingModel,
}

/// Vectors, in the order of their texts, and the tokens they took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Embedded {
    /// The vectors.
    pub vectors: Vec<Vec<f32>>,
    /// The tokens that the service counted.
    pub tokens: Tokens,
}

impl EmbeddingsClient {
    /// A client of the service at `base`, such as `https://api.openai.com`, that uses `model` alone.
    pub fn new(http: reqwest::Client, base: &Url, key: Secret, model: EmbeddingModel) -> Self {
        Self { http, url: outbound::joined(base, "v1/embeddings"), key, model }
    }

    /// The model whose vectors this client makes.
    pub fn model(&self) -> &EmbeddingModel {
        &self.model
    }

    /// Embeds `texts`, in as many calls as the service's limits ask for.
    ///
    /// # Errors
    /// [`OutboundError`] of the first call that fails, or if the answer does not fit the question.
    pub async fn embed(&self, texts: &[String], deadline: Instant) -> Result<Embedded, OutboundError> {
        let mut all = Embedded::default();
        for batch in batches(texts) {
            let one = self.embed_batch(batch, deadline).await?;
            all.vectors.extend(one.vectors);
            all.tokens = all.tokens + one.tokens;
        }
        Ok(all)
    }

    async fn embed_batch(&self, input: &[String], deadline: Instant) -> Result<Embedded, OutboundError> {
        let request = WireRequest {
            input,
            model: &self.model.name,
            dimensions: self.model.dimensions,
            encoding_format: "float",
        };
        let response = outbound::send(
            || self.http.post(self.url.clone()).bearer_auth(self.key.expose()).json(&request),
            deadline,
        )
        .await?;
        let answer: WireAnswer = match timeout_at(deadline, response.json()).await {
            Err(_) => return Err(OutboundError::Deadline),
            Ok(answer) => answer.map_err(OutboundError::Connection)?,
        };
        self.check(input.len(), answer)
    }

    /// Puts the vectors in the order of their texts, and refuses an answer that lacks one or has one
    /// of another length than the collection's.
    fn check(&self, texts: usize, answer: WireAnswer) -> Result<Embedded, OutboundError> {
        let malformed = |what: String| Err(OutboundError::Malformed(what));
        if answer.data.len() != texts {
            return malformed(format!("{} vectors for {texts} texts", answer.data.len()));
        }
        let mut vectors = vec![Vec::new(); texts];
        for WireEmbedding { index, embedding } in answer.data {
            if embedding.len() != self.model.dimensions as usize {
                return malformed(format!(
                    "a vector of {} dimensions instead of {}",
                    embedding.len(),
                    self.model.dimensions
                ));
            }
            match vectors.get_mut(index) {
                Some(slot) if slot.is_empty() => *slot = embedding,
                _ => return malformed(format!("vector {index} twice or out of range")),
            }
        }
        Ok(Embedded { vectors, tokens: Tokens(answer.usage.total_tokens) })
    }
}

/// Cuts `texts` into runs that the service takes in one call.
fn batches(texts: &[String]) -> Vec<&[String]> {
    let mut batches = Vec::new();
    let mut rest = texts;
    while !rest.is_empty() {
        let mut tokens = Tokens(0);
        let fit = rest
            .iter()
            .take(BATCH)
            .take_while(|text| {
                tokens = tokens + Tokens::estimate(text);
                tokens <= BATCH_TOKENS
            })
            .count();
        // A single text over the bound goes alone; the service says what it thinks of it.
        let (batch, after) = rest.split_at(fit.max(1));
        batches.push(batch);
        rest = after;
    }
    batches
}

#[derive(Serialize)]
struct WireRequest<'a> {
    input: &'a [String],
    model: &'a str,
    dimensions: u32,
    encoding_format: &'static str,
}

#[derive(Deserialize)]
struct WireAnswer {
    data: Vec<WireEmbedding>,
    usage: WireUsage,
}

#[derive(Deserialize)]
struct WireEmbedding {
    index: usize,
    embedding: Vec<f32>,
}

#[derive(Deserialize)]
struct WireUsage {
    total_tokens: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> EmbeddingsClient {
        EmbeddingsClient::new(
            reqwest::Client::new(),
            &"http://127.0.0.1:1".parse().unwrap(),
            Secret::new("k".into()).unwrap(),
            EmbeddingModel { name: "m".into(), dimensions: 2 },
        )
    }

    fn answer(json: &str) -> WireAnswer {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn vectors_come_in_the_order_of_their_texts() {
        let swapped = r#"{"data":[{"index":1,"embedding":[3,4]},{"index":0,"embedding":[1,2]}],"usage":{"total_tokens":5}}"#;
        let embedded = client().check(2, answer(swapped)).unwrap();
        assert_eq!(embedded, Embedded { vectors: vec![vec![1.0, 2.0], vec![3.0, 4.0]], tokens: Tokens(5) });
    }

    #[test]
    fn an_answer_that_does_not_fit_is_refused() {
        for bad in [
            r#"{"data":[{"index":0,"embedding":[1,2]}],"usage":{"total_tokens":5}}"#,
            r#"{"data":[{"index":0,"embedding":[1,2]},{"index":0,"embedding":[1,2]}],"usage":{"total_tokens":5}}"#,
            r#"{"data":[{"index":0,"embedding":[1,2]},{"index":7,"embedding":[1,2]}],"usage":{"total_tokens":5}}"#,
            r#"{"data":[{"index":0,"embedding":[1,2]},{"index":1,"embedding":[1,2,3]}],"usage":{"total_tokens":5}}"#,
        ] {
            assert!(client().check(2, answer(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn batches_respect_both_bounds_and_lose_nothing() {
        let texts: Vec<String> = (0..300).map(|n| "x".repeat(if n == 7 { 400_000 } else { 3_000 })).collect();
        let batches = batches(&texts);
        assert_eq!(batches.concat(), texts);
        assert!(batches.iter().all(|b| b.len() <= BATCH));
        assert!(batches.iter().any(|b| b.len() == 1));
    }
}
