//! What the small services that speak AWS's JSON protocol share: parameters, errors, and how they are answered.
//! <https://smithy.io/2.0/aws/protocols/aws-json-1_1-protocol.html>

use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::serving::unique_id;

/// An error in a service's terms.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// Its name.
    pub(crate) kind: &'static str,
    /// What it says.
    pub(crate) message: String,
}

pub(crate) fn refuse(kind: &'static str, message: impl Into<String>) -> Refusal {
    Refusal { kind, message: message.into() }
}

/// What is answered to a call. A refusal is the caller's fault, but for the one that the service calls
/// `internal`.
pub(crate) fn reply(answered: Result<Value, Refusal>, internal: &str) -> Response {
    let (status, body) = match answered {
        Ok(body) => (StatusCode::OK, body),
        Err(Refusal { kind, message }) => {
            let status =
                if kind == internal { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::BAD_REQUEST };
            // Services differ in how they write it; clients read either.
            (status, json!({"__type": kind, "Message": message, "message": message}))
        }
    };
    let mut response = (status, body.to_string()).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-amz-json-1.1"));
    if let Ok(id) = HeaderValue::from_str(&unique_id()) {
        headers.insert("x-amzn-requestid", id);
    }
    response
}

/// A call's parameters. Those that are never asked for are refused at the end.
pub(crate) struct Input(Map<String, Value>);

impl Input {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Refusal> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(input)) => Ok(Self(input)),
            _ => Err(refuse("SerializationException", "The request body is not a JSON object.")),
        }
    }

    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, Refusal> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|_| refuse("SerializationException", format!("{name} has the wrong type."))),
        }
    }

    /// Refuses, with the error that the service calls `kind`, what was not asked for.
    pub(crate) fn end(self, kind: &'static str, service: &str) -> Result<(), Refusal> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some((name, _)) => {
                Err(refuse(kind, format!("{name} is not implemented by the local {service}.")))
            }
        }
    }
}
