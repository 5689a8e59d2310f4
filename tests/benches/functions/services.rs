//! A model and an embeddings service that take no time: each answer is made beforehand.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// Pieces of an answer, of about three tokens each.
const DELTAS: usize = 60;
/// The length of a vector: that of `text-embedding-3-small`.
pub const DIMENSIONS: u32 = 1_536;

struct Made {
    stream: Bytes,
    vector: Vec<f32>,
    /// The vector in base64.
    packed: String,
}

/// Starts both on one port and returns their address.
pub async fn start() -> String {
    let number = |n| ((n * 7_919 % 1_009) as f32 - 504.0) / 12_000.0;
    let vector: Vec<f32> = (0..DIMENSIONS).map(number).collect();
    let packed = STANDARD.encode(vector.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>());
    let made = Arc::new(Made { stream: stream().into(), vector, packed });
    let router = Router::new()
        .route(
            "/v1/messages",
            post(async |State(made): State<Arc<Made>>| -> Response {
                ([(header::CONTENT_TYPE, "text/event-stream")], made.stream.clone()).into_response()
            }),
        )
        .route("/v1/messages/count_tokens", post(async || axum::Json(json!({"input_tokens": 900}))))
        .route("/v1/embeddings", post(embeddings))
        .with_state(made);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

async fn embeddings(
    State(made): State<Arc<Made>>,
    axum::Json(request): axum::Json<Value>,
) -> axum::Json<Value> {
    let texts = request["input"].as_array().map_or(1, Vec::len);
    let vector = if request["encoding_format"] == "base64" { json!(made.packed) } else { json!(made.vector) };
    let data: Vec<Value> =
        (0..texts).map(|index| json!({"object": "embedding", "index": index, "embedding": vector})).collect();
    let usage = json!({"prompt_tokens": 8 * texts, "total_tokens": 8 * texts});
    axum::Json(json!({"object": "list", "model": request["model"], "data": data, "usage": usage}))
}

/// An answer as a stream of events.
fn stream() -> String {
    let usage = json!({"input_tokens": 900, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1});
    let mut events = vec![
        json!({"type": "message_start", "message": {
            "id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "claude-sonnet-4-6",
            "stop_reason": null, "stop_sequence": null, "usage": usage,
        }}),
        json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
    ];
    for _ in 0..DELTAS {
        let delta = json!({"type": "text_delta", "text": "of annual leave, "});
        events.push(json!({"type": "content_block_delta", "index": 0, "delta": delta}));
    }
    events.extend([
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": null},
               "usage": {"output_tokens": 3 * DELTAS}}),
        json!({"type": "message_stop"}),
    ]);
    events
        .iter()
        .map(|event| format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap()))
        .collect()
}
