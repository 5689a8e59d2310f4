//! Embeddings without a model: OpenAI's `POST /v1/embeddings`, computed from the letters.
//!
//! Texts that share words, neighbouring words or parts of words come out near each other; meaning
//! beyond that is not seen. Features are hashed into the dimensions with a sign, weighted with the
//! square root of their count, and the vector is normalised to length 1. The same text gives the
//! same vector on every machine: the hash is fixed, and only operations that IEEE 754 defines to
//! the last bit are used, in a fixed order.
//!
//! For tests, `GET /_requests` returns the last requests, oldest first, as `[{"trace"}]`.

use std::future::Future;
use std::io;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use unicode_normalization::UnicodeNormalization as _;

use crate::lexis::{count_tokens, is_stop_word, stem, words};
use crate::serving::{TRACE_HEADER, Traces};

/// The model's name in answers, whatever was asked for.
pub const MODEL: &str = "offline-embeddings";
const DEFAULT_DIMENSIONS: usize = 512;
const MAX_INPUTS: usize = 2_048;
const MAX_INPUT_TOKENS: u64 = 8_192;
const MAX_REQUEST_TOKENS: u64 = 300_000;
const MAX_BODY: usize = 32 * 1024 * 1024;

/// Serves embeddings until `shutdown` resolves.
pub async fn serve(
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/embeddings", post(embeddings))
        .route("/_requests", get(requests))
        .fallback(|| async { refusal(StatusCode::NOT_FOUND, "Invalid URL", None, None) })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Traces::default());
    crate::serving::serve(listener, router, shutdown).await
}

/// The unit vector of a text. `dimensions` below 1 count as 1.
#[must_use]
pub fn embed(text: &str, dimensions: usize) -> Vec<f32> {
    let mut features = features(text);
    features.sort_unstable_by_key(|(hash, _)| *hash);
    let mut vector = vec![0.0_f32; dimensions.max(1)];
    let buckets = vector.len() as u64;
    let mut add = |hash: u64, weight: f32| {
        // The top bit is the sign, the others the place.
        let place = usize::try_from((hash & (u64::MAX >> 1)) % buckets).unwrap_or_default();
        if let Some(value) = vector.get_mut(place) {
            *value += if hash >> 63 == 0 { weight } else { -weight };
        }
    };
    for same in features.chunk_by(|(left, _), (right, _)| left == right) {
        if let Some((hash, weight)) = same.first() {
            add(*hash, weight * (same.len() as f32).sqrt());
        }
    }
    let norm = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|value| *value /= norm);
    } else {
        // No letters at all, or an unlikely cancellation: still a point of its own.
        let place = usize::try_from(hash(&[text.as_bytes()]) % buckets).unwrap_or_default();
        if let Some(value) = vector.get_mut(place) {
            *value = 1.0;
        }
    }
    vector
}

/// The hashed features of a text, repeated as often as they occur.
fn features(text: &str) -> Vec<(u64, f32)> {
    /// A word says most, then two in a row; the parts of a word share one word's weight.
    const WORD: f32 = 1.0;
    const PAIR: f32 = 0.6;
    const PARTS: f32 = 0.8;
    const STOP_WORD: f32 = 0.1;

    let normal: String = text.nfkc().collect();
    let mut features = Vec::with_capacity(normal.len() * 3);
    let mut previous: Option<String> = None;
    // Boundary marks around each word; where each character starts in them.
    let mut marked = String::new();
    let mut starts = Vec::new();
    for word in words(&normal) {
        let importance = if is_stop_word(&word) { STOP_WORD } else { 1.0 };
        let stem = stem(&word);
        features.push((hash(&[b"w", stem.as_bytes()]), WORD * importance));
        if let Some(previous) = &previous {
            features.push((hash(&[b"b", previous.as_bytes(), b" ", stem.as_bytes()]), PAIR * importance));
        }
        marked.clear();
        marked.push('^');
        marked.push_str(&word);
        marked.push('$');
        starts.clear();
        starts.extend(marked.char_indices().map(|(start, _)| start));
        starts.push(marked.len());
        let characters = starts.len() - 1;
        let parts: usize = (3..=5).map(|length: usize| (characters + 1).saturating_sub(length)).sum();
        let weight = PARTS * importance / (parts.max(1) as f32).sqrt();
        for length in 3..=5 {
            for ends in starts.windows(length + 1) {
                if let (Some(start), Some(end)) = (ends.first(), ends.last())
                    && let Some(part) = marked.as_bytes().get(*start..*end)
                {
                    features.push((hash(&[b"c", part]), weight));
                }
            }
        }
        previous = Some(stem);
    }
    features
}

/// FNV-1a, 64 bits, and a final mix: FNV's low bits alone are too regular for a remainder.
fn hash(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in *part {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

// --- HTTP

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Embedding>,
    model: &'static str,
    usage: Usage,
}

#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Floats(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: u64,
    total_tokens: u64,
}

struct Request {
    inputs: Vec<String>,
    dimensions: usize,
    base64: bool,
    tokens: u64,
}

#[derive(Debug)]
struct Invalid {
    message: String,
    param: &'static str,
}

async fn requests(State(traces): State<Traces>) -> Response {
    let requests: Vec<Value> = traces.all().into_iter().map(|trace| json!({ "trace": trace })).collect();
    axum::Json(requests).into_response()
}

async fn embeddings(State(traces): State<Traces>, headers: HeaderMap, body: Bytes) -> Response {
    let trace = headers.get(TRACE_HEADER).and_then(|value| value.to_str().ok());
    traces.note(trace.unwrap_or_default());
    let authorization = headers.get(http::header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key =
        authorization.and_then(|value| value.strip_prefix("Bearer ")).map(str::trim).unwrap_or_default();
    if key.is_empty() {
        let message = "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).";
        return refusal(StatusCode::UNAUTHORIZED, message, None, Some("invalid_api_key"));
    }
    let request = match parse(&body) {
        Ok(request) => request,
        Err(Invalid { message, param }) => {
            return refusal(StatusCode::BAD_REQUEST, &message, Some(param), None);
        }
    };
    // Up to some hundred milliseconds of arithmetic: not on a thread that serves connections.
    let answered = tokio::task::spawn_blocking(move || answer(request)).await;
    match answered {
        Ok(list) => axum::Json(list).into_response(),
        Err(error) => {
            tracing::error!(error = %error, "an embedding could not be computed");
            refusal(StatusCode::INTERNAL_SERVER_ERROR, "The server had an error", None, None)
        }
    }
}

fn answer(request: Request) -> List {
    let vectors = request.inputs.iter().map(|input| embed(input, request.dimensions));
    let data = vectors
        .enumerate()
        .map(|(index, vector)| Embedding {
            object: "embedding",
            index,
            embedding: if request.base64 {
                Vector::Base64(
                    STANDARD.encode(vector.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>()),
                )
            } else {
                Vector::Floats(vector)
            },
        })
        .collect();
    let usage = Usage { prompt_tokens: request.tokens, total_tokens: request.tokens };
    List { object: "list", data, model: MODEL, usage }
}

fn parse(body: &[u8]) -> Result<Request, Invalid> {
    let invalid = |param, message: &str| Invalid { message: message.to_owned(), param };
    let body: Value = serde_json::from_slice(body)
        .map_err(|_| invalid("body", "We could not parse the JSON body of your request."))?;
    if body.get("model").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err(invalid("model", "you must provide a model parameter"));
    }
    let inputs: Vec<String> = match body.get("input") {
        Some(Value::String(input)) => vec![input.clone()],
        Some(Value::Array(inputs)) => {
            inputs.iter().map(|input| input.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or_else(
                || {
                    invalid(
                        "input",
                        "'input' must be a string or an array of strings; tokens are not supported offline.",
                    )
                },
            )?
        }
        _ => return Err(invalid("input", "'input' must be a string or an array of strings.")),
    };
    if inputs.is_empty() || inputs.len() > MAX_INPUTS {
        return Err(invalid("input", "'input' must have between 1 and 2048 elements."));
    }
    let mut tokens = 0;
    for input in &inputs {
        if input.is_empty() {
            return Err(invalid("input", "'input' cannot be an empty string."));
        }
        let count = count_tokens(input);
        if count > MAX_INPUT_TOKENS {
            return Err(Invalid {
                message: format!(
                    "This model's maximum context length is {MAX_INPUT_TOKENS} tokens, however you requested {count} tokens."
                ),
                param: "input",
            });
        }
        tokens += count;
    }
    if tokens > MAX_REQUEST_TOKENS {
        return Err(Invalid {
            message: format!("Requested {tokens} tokens, max {MAX_REQUEST_TOKENS} tokens per request"),
            param: "input",
        });
    }
    let dimensions = match body.get("dimensions") {
        None | Some(Value::Null) => DEFAULT_DIMENSIONS,
        Some(value) => value
            .as_u64()
            .and_then(|value| usize::try_from(value).ok())
            .filter(|value| (64..=4096).contains(value))
            .ok_or_else(|| invalid("dimensions", "'dimensions' must be an integer between 64 and 4096."))?,
    };
    let base64 = match body.get("encoding_format").map(Value::as_str) {
        None | Some(Some("float")) => false,
        Some(Some("base64")) => true,
        Some(_) => return Err(invalid("encoding_format", "'encoding_format' must be 'float' or 'base64'.")),
    };
    Ok(Request { inputs, dimensions, base64, tokens })
}

fn refusal(status: StatusCode, message: &str, param: Option<&str>, code: Option<&str>) -> Response {
    let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
    let body = json!({"error": {"message": message, "type": kind, "param": param, "code": code}});
    (status, axum::Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cosine(left: &str, right: &str) -> f32 {
        embed(left, 512).iter().zip(embed(right, 512)).map(|(left, right)| left * right).sum()
    }

    #[test]
    fn near_text_is_nearer_than_unrelated_text() {
        let question = "How many vacation days do employees get?";
        let answer = "Every employee is entitled to 28 days of paid vacation per year.";
        let unrelated = "The firewall drops packets that match no rule of the list.";
        let also = "Employees may bring their dogs to the office on Fridays.";
        assert!(cosine(question, answer) > cosine(question, also));
        assert!(cosine(question, also) > cosine(question, unrelated));
        assert!(cosine(question, unrelated) < 0.1);
        assert!(cosine("kubernetes deployment", "kubernets deployments") > 0.5);
        assert!((cosine(answer, answer) - 1.0).abs() < 1e-5);
        assert!(cosine("ﬁle Größe", "FILE GRÖßE") > 0.99);
    }

    #[test]
    fn vectors_do_not_change_between_releases() {
        // A stored collection must stay searchable: if this changes, so must the model's name.
        assert_eq!(hash(&[b"w", b"audit"]), hash(&[b"waudit"]));
        let vector = embed("audit", 64);
        let places: Vec<usize> =
            vector.iter().enumerate().filter(|(_, value)| **value != 0.0).map(|(n, _)| n).collect();
        assert_eq!(places, [2, 13, 15, 21, 29, 40, 41, 45, 51, 54, 57]);
    }

    #[test]
    fn every_text_has_a_direction() {
        for text in [" ", "!?", "…", "😀"] {
            let norm: f32 = embed(text, 64).iter().map(|value| value * value).sum();
            assert!((norm - 1.0).abs() < 1e-5, "{text:?}");
        }
    }

    async fn start() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1/embeddings", listener.local_addr().unwrap());
        tokio::spawn(serve(listener, std::future::pending()));
        url
    }

    async fn post(url: &str, body: &Value) -> (u16, Value) {
        let request = reqwest::Client::new().post(url).bearer_auth("key").body(body.to_string());
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    #[tokio::test]
    async fn both_encodings_say_the_same() {
        let url = start().await;
        let (status, floats) =
            post(&url, &json!({"model": "m", "input": ["one text", "another"], "dimensions": 64})).await;
        assert_eq!(status, 200);
        assert_eq!(floats["model"], MODEL);
        assert_eq!(floats["usage"], json!({"prompt_tokens": 4, "total_tokens": 4}));
        assert_eq!(floats["data"][1]["index"], 1);
        let (_, encoded) = post(
            &url,
            &json!({"model": "m", "input": "one text", "dimensions": 64, "encoding_format": "base64"}),
        )
        .await;
        let bytes = STANDARD.decode(encoded["data"][0]["embedding"].as_str().unwrap()).unwrap();
        let decoded: Vec<f32> =
            bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
        assert_eq!(decoded, embed("one text", 64));
        let as_json: Vec<f32> = floats["data"][0]["embedding"]
            .as_array()
            .unwrap()
            .iter()
            .map(|value| value.as_f64().unwrap() as f32)
            .collect();
        assert_eq!(as_json, decoded);
        let (_, default) = post(&url, &json!({"model": "m", "input": "x"})).await;
        assert_eq!(default["data"][0]["embedding"].as_array().unwrap().len(), 512);
    }

    #[tokio::test]
    async fn limits_are_refused_in_openais_shape() {
        let url = start().await;
        let long = "word ".repeat(8_193);
        let many = vec!["word ".repeat(8_000); 38];
        for (body, param) in [
            (json!({"model": "m", "input": ""}), "input"),
            (json!({"model": "m", "input": []}), "input"),
            (json!({"model": "m", "input": [[1, 2]]}), "input"),
            (json!({"model": "m", "input": vec!["x"; 2_049]}), "input"),
            (json!({"model": "m", "input": long}), "input"),
            (json!({"model": "m", "input": many}), "input"),
            (json!({"model": "m", "input": "x", "dimensions": 63}), "dimensions"),
            (json!({"model": "m", "input": "x", "encoding_format": "int8"}), "encoding_format"),
            (json!({"input": "x"}), "model"),
        ] {
            let (status, answer) = post(&url, &body).await;
            assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{answer}");
            assert_eq!(answer["error"]["type"], "invalid_request_error");
        }
        let response = reqwest::Client::new().post(&url).body("{}").send().await.unwrap();
        assert_eq!(response.status(), 401);
    }
}
