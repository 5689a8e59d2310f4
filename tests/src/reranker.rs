//! A reranker that does as it is told.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};

/// How it behaves.
#[derive(Clone, Debug)]
pub enum Behaviour {
    /// Documents that hold this text come first.
    Prefers(&'static str),
    /// It answers this.
    Answers(u16, Value),
    /// It takes too long.
    Sleeps,
}

/// A reranker, and what it was asked.
#[derive(Clone, Debug)]
pub struct Reranker {
    behaviour: Arc<Mutex<Behaviour>>,
    asked: Arc<Mutex<Vec<Value>>>,
    traces: Arc<Mutex<Vec<String>>>,
}

impl Reranker {
    /// One that prefers documents with `reeds`, and its address.
    ///
    /// # Panics
    /// If there is no port for it.
    pub async fn start() -> (Self, String) {
        let behaviour = Arc::new(Mutex::new(Behaviour::Prefers("reeds")));
        let reranker = Self { behaviour, asked: Arc::default(), traces: Arc::default() };
        let router = Router::new().route("/v1/rerank", post(rerank)).with_state(reranker.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, router).await });
        (reranker, url)
    }

    /// How it is to behave from now on.
    pub fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap_or_else(PoisonError::into_inner) = behaviour;
    }

    /// What it was asked since this was asked last.
    pub fn take_asked(&self) -> Vec<Value> {
        std::mem::take(&mut self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where in traces it was asked.
    pub fn traces(&self) -> Vec<String> {
        self.traces.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn rerank(State(reranker): State<Reranker>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    assert_eq!(headers["authorization"], "Bearer offline");
    let trace = headers.get(shared::trace::HEADER).and_then(|trace| trace.to_str().ok()).unwrap_or_default();
    reranker.traces.lock().unwrap_or_else(PoisonError::into_inner).push(trace.to_owned());
    reranker.asked.lock().unwrap_or_else(PoisonError::into_inner).push(body.clone());
    let behaviour = reranker.behaviour.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match behaviour {
        Behaviour::Prefers(text) => {
            let documents = body["documents"].as_array().expect("documents").iter().enumerate();
            let score = |document: &Value| {
                if document.as_str().is_some_and(|document| document.contains(text)) { 0.9 } else { 0.1 }
            };
            let results: Vec<Value> = documents
                .map(|(index, document)| json!({"index": index, "relevance_score": score(document)}))
                .collect();
            Json(json!({"id": "r", "results": results, "meta": {"billed_units": {"search_units": 1}}}))
                .into_response()
        }
        Behaviour::Answers(status, body) => {
            (StatusCode::from_u16(status).expect("a status"), Json(body)).into_response()
        }
        Behaviour::Sleeps => {
            tokio::time::sleep(Duration::from_secs(30)).await;
            StatusCode::OK.into_response()
        }
    }
}
