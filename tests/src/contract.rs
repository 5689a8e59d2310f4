//! Holds answers to `infra/openapi.yaml`: what the document does not describe fails the test that got it.
//!
//! A request of the rig leaves with its response how it was asked: see [`Asking`].

use std::collections::HashMap;
use std::path::Path;
use std::sync::LazyLock;

use boon::{Compiler, Draft, SchemaIndex, Schemas};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Body, Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Map, Value, json};

/// The document.
pub static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root");
    let text = std::fs::read_to_string(root.join("infra/openapi.yaml")).expect("the contract");
    serde_yaml_ng::from_str(&text).expect("the contract is YAML")
});

/// The events of a streamed answer to `POST /v1/chat`, and their schemas.
const EVENTS: [(&str, &str); 4] =
    [("meta", "ChatMeta"), ("delta", "ChatDelta"), ("done", "ChatResponse"), ("error", "ErrorResponse")];
/// The headers that say what is left of a tenant's limits.
pub const RATE_LIMITS: [&str; 6] = [
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
];
/// Other headers that a client's program may act upon.
const TOLD: [&str; 3] = ["retry-after", "x-next-cursor", "x-should-retry"];
/// What ends a streamed answer to `POST /v1/chat/completions`.
const DONE: &str = "[DONE]";

/// A request whose answer is held to the document. A response does not know the method that it answers, so it
/// is written on it: see [`Asked`].
#[derive(Debug)]
pub struct Asking {
    request: RequestBuilder,
    asked: Option<Asked>,
}

/// What was asked for: a method and a path of the API.
#[derive(Clone, Debug)]
pub struct Asked {
    method: Method,
    path: String,
}

impl Asking {
    /// Of the API.
    pub fn new(http: &Client, method: Method, url: &str) -> Self {
        let path = reqwest::Url::parse(url).expect("a URL").path().to_owned();
        Self { request: http.request(method.clone(), url), asked: Some(Asked { method, path }) }
    }

    /// Of something else, which the document does not describe.
    pub fn elsewhere(http: &Client, method: Method, url: &str) -> Self {
        Self { request: http.request(method, url), asked: None }
    }

    fn with(self, change: impl FnOnce(RequestBuilder) -> RequestBuilder) -> Self {
        Self { request: change(self.request), asked: self.asked }
    }

    /// With one more header.
    #[must_use]
    pub fn header<K, V>(self, name: K, value: V) -> Self
    where
        HeaderName: TryFrom<K>,
        <HeaderName as TryFrom<K>>::Error: Into<http::Error>,
        HeaderValue: TryFrom<V>,
        <HeaderValue as TryFrom<V>>::Error: Into<http::Error>,
    {
        self.with(|request| request.header(name, value))
    }

    /// With a key.
    #[must_use]
    pub fn bearer_auth(self, key: &str) -> Self {
        self.with(|request| request.bearer_auth(key))
    }

    /// With a body of JSON.
    #[must_use]
    pub fn json(self, body: &Value) -> Self {
        self.with(|request| request.json(body))
    }

    /// With any body.
    #[must_use]
    pub fn body(self, body: impl Into<Body>) -> Self {
        self.with(|request| request.body(body))
    }

    /// The same once more, unless its body can be read once only.
    pub fn try_clone(&self) -> Option<Self> {
        Some(Self { request: self.request.try_clone()?, asked: self.asked.clone() })
    }

    /// Sends it.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn send(self) -> reqwest::Result<Response> {
        let mut response = self.request.send().await?;
        if let Some(asked) = self.asked {
            response.extensions_mut().insert(asked);
        }
        Ok(response)
    }
}

impl Asked {
    /// What a response answers, if its request came from the rig.
    pub fn by(response: &Response) -> Option<Self> {
        response.extensions().get().cloned()
    }

    /// Holds an answer to the document.
    ///
    /// # Panics
    /// If the document does not describe it.
    #[track_caller]
    pub fn check(&self, status: StatusCode, headers: &HeaderMap, body: &str) {
        let Self { method, path } = self;
        let content_type = headers.get(CONTENT_TYPE).map(|value| value.to_str().expect("a content type"));
        let found = problem(method.as_str(), path, status.as_u16(), content_type, body);
        assert_eq!(found, None, "{method} {path}: {status} {body}");
        let id = headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        assert!(!id.is_empty(), "{method} {path}: {status} has no x-request-id");
        // Whoever is answered is told what is left; whoever is refused may not have been known.
        if status.is_success() && path.starts_with("/v1/") {
            for name in RATE_LIMITS {
                assert!(headers.contains_key(name), "{method} {path}: {status} has no {name}");
            }
        }
        for name in headers.keys().map(|name| name.as_str()).filter(|name| TOLD.contains(name)) {
            let known = described(method.as_str(), path, status.as_u16(), name);
            assert!(known, "{method} {path}: {status} has {name}, which is not described");
        }
    }

    /// Holds an event of a stream to the document.
    ///
    /// # Panics
    /// If the document does not describe it.
    #[track_caller]
    pub fn check_event(&self, name: &str, data: &Value) {
        let found = misfit(&event(name), data);
        assert_eq!(found, None, "{} {name}: {data}", self.path);
    }

    /// Holds the data of a stream's event without a name to the document.
    ///
    /// # Panics
    /// If the document does not describe it.
    #[track_caller]
    pub fn check_line(&self, data: &str) {
        if data == DONE {
            return;
        }
        let data: Value = serde_json::from_str(data).expect("data is JSON");
        let schema = if data.get("error").is_some() { "ErrorResponse" } else { "CompletionChunk" };
        assert_eq!(misfit(&named(schema), &data), None, "{}: {data}", self.path);
    }
}

/// The schema of the data of a streamed answer's event of that name.
///
/// # Panics
/// If there is no such event.
pub fn event(name: &str) -> Value {
    let schema = EVENTS.iter().find(|(event, _)| *event == name).map(|(_, schema)| *schema);
    named(schema.expect("an event of the contract"))
}

/// A reference to a schema.
fn named(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

/// What of an answer the document does not describe; nothing if it does.
pub fn problem(
    method: &str,
    path: &str,
    status: u16,
    content_type: Option<&str>,
    body: &str,
) -> Option<String> {
    let Some(operation) = operation(method, path) else {
        // No route: API Gateway's own answer.
        let error = serde_json::from_str(body).unwrap_or_default();
        return misfit(&json!({ "$ref": "#/components/schemas/ErrorResponse" }), &error);
    };
    let Some(response) = operation["responses"].get(status.to_string()) else {
        return Some(format!("{status} is not described"));
    };
    let content = resolved(response).get("content");
    if content.is_none() {
        return (!body.is_empty()).then(|| "a body where none is described".to_owned());
    }
    let essence = content_type.and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
    let Some(media) = content.and_then(|content| content.get(essence)) else {
        return Some(format!("the content type `{essence}` is not described"));
    };
    if essence == "text/csv" {
        // The example's first line is every table's.
        let example = media["example"].as_str().unwrap_or_default();
        let differs = body.lines().next() != example.lines().next();
        return differs.then(|| "the table's columns are not those of its example".to_owned());
    }
    if essence != "application/json" {
        return None;
    }
    match serde_json::from_str(body) {
        Ok(value) => misfit(&media["schema"], &value),
        Err(error) => Some(error.to_string()),
    }
}

/// Whether the document says that such an answer has that header. Where there is no route, none is expected but what
/// API Gateway's own answers say.
fn described(method: &str, path: &str, status: u16, header: &str) -> bool {
    let Some(operation) = operation(method, path) else { return true };
    let response = operation["responses"].get(status.to_string());
    response.is_some_and(|response| resolved(response)["headers"].get(header).is_some())
}

/// The operation that a request is one of.
fn operation(method: &str, path: &str) -> Option<&'static Value> {
    let segments: Vec<&str> = path.split('/').collect();
    let fits = |template: &str| {
        let wanted: Vec<&str> = template.split('/').collect();
        wanted.len() == segments.len()
            && wanted.iter().zip(&segments).all(|(wanted, segment)| {
                wanted == segment || (wanted.starts_with('{') && !segment.is_empty())
            })
    };
    let paths = DOCUMENT["paths"].as_object()?;
    // As API Gateway does: the one with the fewest variables.
    let fitting = paths.iter().filter(|(template, _)| fits(template));
    let (_, item) = fitting.min_by_key(|(template, _)| template.matches('{').count())?;
    item.get(method.to_ascii_lowercase())
}

/// What a reference means.
pub fn resolved(value: &'static Value) -> &'static Value {
    match value.get("$ref").and_then(Value::as_str) {
        Some(reference) => DOCUMENT.pointer(reference.trim_start_matches('#')).expect("what is referred to"),
        None => value,
    }
}

/// Why a value does not fit a schema of the document, which is named by a reference.
pub fn misfit(schema: &Value, value: &Value) -> Option<String> {
    static COMPILED: LazyLock<(Schemas, HashMap<String, SchemaIndex>)> = LazyLock::new(compiled);
    let (schemas, named) = &*COMPILED;
    let schema = named[schema["$ref"].as_str().expect("a named schema")];
    schemas.validate(value, schema).err().map(|error| error.to_string())
}

/// The document's schemas, by the references to them. Nothing is fetched.
fn compiled() -> (Schemas, HashMap<String, SchemaIndex>) {
    const RESOURCE: &str = "contract:/openapi.json";
    let (mut compiler, mut schemas) = (Compiler::new(), Schemas::new());
    compiler.set_default_draft(Draft::V2020_12);
    compiler.enable_format_assertions();
    compiler.add_resource(RESOURCE, json_schema(&DOCUMENT)).expect("a document");
    let names = DOCUMENT["components"]["schemas"].as_object().expect("schemas").keys();
    let references = names.map(|name| format!("#/components/schemas/{name}"));
    let named = references.map(|reference| {
        let schema = compiler.compile(&format!("{RESOURCE}{reference}"), &mut schemas).expect("a schema");
        (reference, schema)
    });
    let named = named.collect();
    (schemas, named)
}

/// A schema of OpenAPI 3.0 as JSON Schema: it says `nullable` where the other has a type `null`.
fn json_schema(schema: &Value) -> Value {
    match schema {
        Value::Object(fields) => {
            let mut out: Map<String, Value> =
                fields.iter().map(|(name, value)| (name.clone(), json_schema(value))).collect();
            if out.remove("nullable").is_none_or(|nullable| nullable != true) {
                return out.into();
            }
            match out.remove("type") {
                Some(kind) => {
                    out.insert("type".to_owned(), json!([kind, "null"]));
                    out.into()
                }
                None => json!({"anyOf": [out, {"type": "null"}]}),
            }
        }
        Value::Array(all) => all.iter().map(json_schema).collect(),
        other => other.clone(),
    }
}
