//! The client of an OpenAI-compatible `/v1/embeddings` endpoint.
//!
//! <https://platform.openai.com/docs/api-reference/embeddings>

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::Url;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use tokio::time::Instant;

use crate::outbound::{self, OutboundError};
use crate::secret::Secret;
use crate::tenant::EmbeddingModel;
use crate::trace::Trace;
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

    /// How many of the first of `texts` go into one call of which at most `most` tokens are wanted, by
    /// the only bound that needs no call: a token is at least a byte. At least one, if there is one.
    pub fn fitting(texts: &[String], most: Tokens) -> usize {
        let (mut estimated, mut bytes) = (Tokens(0), Tokens(0));
        let fit = texts.iter().take(BATCH).take_while(|text| {
            estimated = estimated + Tokens::estimate(text);
            bytes = bytes + Tokens::most(text);
            estimated <= BATCH_TOKENS && bytes <= most
        });
        fit.count().max(1).min(texts.len())
    }

    /// Embeds texts that go into one call.
    ///
    /// # Errors
    /// [`OutboundError`], or if the answer does not fit the question.
    pub async fn embed(
        &self,
        input: &[String],
        trace: Option<&Trace>,
        deadline: Instant,
    ) -> Result<Embedded, OutboundError> {
        let request = WireRequest {
            input,
            model: &self.model.name,
            dimensions: self.model.dimensions,
            encoding_format: "base64",
        };
        let call = || self.http.post(self.url.clone()).bearer_auth(self.key.expose()).json(&request);
        self.check(input.len(), outbound::json(call, trace, deadline).await?)
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
            if embedding.iter().any(|number| !number.is_finite()) {
                return malformed(format!("vector {index} is not of numbers alone"));
            }
            match vectors.get_mut(index) {
                Some(slot) if slot.is_empty() => *slot = embedding,
                _ => return malformed(format!("vector {index} twice or out of range")),
            }
        }
        Ok(Embedded { vectors, tokens: Tokens(answer.usage.total_tokens) })
    }
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
    #[serde(deserialize_with = "vector")]
    embedding: Vec<f32>,
}

/// A vector: its numbers as they are in memory, little-endian and in base64, which is what is asked for: half as many
/// bytes, and quicker to read than to parse 1,536 decimal fractions. A service that ignores the wish sends fractions.
fn vector<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f32>, D::Error> {
    struct Numbers;

    impl<'de> Visitor<'de> for Numbers {
        type Value = Vec<f32>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("numbers, or 32-bit floats in base64")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<f32>, E> {
            let bytes = STANDARD.decode(text).map_err(E::custom)?;
            let (numbers, rest) = bytes.as_chunks();
            if !rest.is_empty() {
                return Err(E::invalid_length(bytes.len(), &self));
            }
            Ok(numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<Vec<f32>, A::Error> {
            let mut vector = Vec::new();
            while let Some(number) = numbers.next_element()? {
                vector.push(number);
            }
            Ok(vector)
        }
    }

    deserializer.deserialize_any(Numbers)
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
    fn a_vector_comes_in_either_form() {
        // 1.0 is 0x3f800000, and -2.5 is 0xc0200000.
        let base64 = r#"{"data":[{"index":0,"embedding":"AACAPwAAIMA="}],"usage":{"total_tokens":5}}"#;
        let decimal = r#"{"data":[{"index":0,"embedding":[1.0,-2.5]}],"usage":{"total_tokens":5}}"#;
        for form in [base64, decimal] {
            assert_eq!(client().check(1, answer(form)).unwrap().vectors, [[1.0, -2.5]]);
        }
        for malformed in ["AACAPw", "AACAPwAA", "AACAPwAAI!A="] {
            let text = base64.replace("AACAPwAAIMA=", malformed);
            assert!(serde_json::from_str::<WireAnswer>(&text).is_err(), "{malformed}");
        }
    }

    #[test]
    fn an_answer_that_does_not_fit_is_refused() {
        for bad in [
            r#"{"data":[{"index":0,"embedding":[1,2]}],"usage":{"total_tokens":5}}"#,
            r#"{"data":[{"index":0,"embedding":[1,2]},{"index":0,"embedding":[1,2]}],"usage":{"total_tokens":5}}"#,
            r#"{"data":[{"index":0,"embedding":[1,2]},{"index":7,"embedding":[1,2]}],"usage":{"total_tokens":5}}"#,
            r#"{"data":[{"index":0,"embedding":[1,2]},{"index":1,"embedding":[1,2,3]}],"usage":{"total_tokens":5}}"#,
            // The second number is infinite.
            r#"{"data":[{"index":0,"embedding":[1,2]},{"index":1,"embedding":"AACAPwAAgH8="}],"usage":{"total_tokens":5}}"#,
        ] {
            assert!(client().check(2, answer(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_call_respects_its_bounds_and_takes_at_least_one_text() {
        let texts: Vec<String> = (0..300).map(|_| "x".repeat(3_000)).collect();
        let fitting = |most| EmbeddingsClient::fitting(&texts, Tokens(most));
        assert_eq!(fitting(u64::MAX), 100);
        assert_eq!(fitting(9_000), 3);
        assert_eq!(fitting(0), 1);
        assert_eq!(EmbeddingsClient::fitting(&[], Tokens(9)), 0);
        let short: Vec<String> = (0..300).map(|_| "x".to_owned()).collect();
        assert_eq!(EmbeddingsClient::fitting(&short, Tokens(u64::MAX)), BATCH);
    }
}
