//! The two forms in which an answer is given: ours, and that of OpenAI's clients. What is done for it is the
//! same.

use lambda_http::Request;
use serde::Deserialize;
use serde_json::json;
use shared::error::ApiError;
use shared::idempotency::Stored;
use shared::scope::RequestId;
use shared::web;

use crate::answer::{Done, Meta};
use crate::body::Events;
use crate::openai::{self, Chunks, Completion};
use crate::question::{self, Asked};

/// The route of the second form.
pub(crate) const COMPLETIONS: &str = "/v1/chat/completions";

/// A form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    /// Ours.
    Own,
    /// OpenAI's.
    OpenAi {
        /// Whether a stream ends with what was used.
        include_usage: bool,
    },
}

/// What a request says.
pub(crate) struct Said {
    pub(crate) asked: Asked,
    pub(crate) wire: Wire,
    /// Whether the answer comes as events.
    pub(crate) stream: bool,
}

/// Reads a request in the form of its route.
///
/// # Errors
/// The refusal that the caller is to see; it names the field.
pub(crate) fn read(request: &Request) -> Result<Said, ApiError> {
    if web::route(request) == COMPLETIONS {
        let body: openai::Body = web::json(request)?;
        let (stream, include_usage) = (body.streams(), body.includes_usage());
        return Ok(Said { asked: body.asked()?, wire: Wire::OpenAi { include_usage }, stream });
    }
    let body: question::Body = web::json(request)?;
    let stream = body.stream;
    Ok(Said { asked: body.into(), wire: Wire::Own, stream })
}

impl Wire {
    /// The whole answer.
    ///
    /// # Errors
    /// If it does not serialise.
    pub(crate) fn write(self, done: &Done) -> serde_json::Result<String> {
        match self {
            Self::Own => serde_json::to_string(done),
            Self::OpenAi { .. } => serde_json::to_string(&Completion::from(done)),
        }
    }

    /// What a whole answer said: how it began, and its text.
    ///
    /// # Errors
    /// If it is none.
    pub(crate) fn told(self, stored: &Stored) -> serde_json::Result<(Meta, String)> {
        #[derive(Deserialize)]
        struct Told {
            #[serde(flatten)]
            meta: Meta,
            response: String,
        }
        match self {
            Self::Own => {
                let told: Told = serde_json::from_str(&stored.body)?;
                Ok((told.meta, told.response))
            }
            Self::OpenAi { .. } => {
                let told: Completion = serde_json::from_str(&stored.body)?;
                let text = told.content().to_owned();
                let meta = Meta {
                    id: told.id,
                    conversation_id: None,
                    model: told.model,
                    documents_retrieved: told.documents_retrieved,
                    created_s: told.created,
                };
                Ok((meta, text))
            }
        }
    }
}

/// Whoever tells an answer as it comes.
pub(crate) struct Speaker {
    events: Events,
    /// What is told in OpenAI's form.
    chunks: Option<Chunks>,
}

impl Speaker {
    /// Begins to tell.
    pub(crate) fn begin(wire: Wire, events: Events, meta: &Meta) -> Self {
        let chunks = match wire {
            Wire::Own => {
                events.send("meta", meta);
                None
            }
            Wire::OpenAi { include_usage } => {
                let (id, model) = (meta.id.clone(), meta.model.clone());
                let chunks = Chunks::new(id, meta.created_s, model, include_usage);
                events.send_data(&chunks.begin());
                Some(chunks)
            }
        };
        Self { events, chunks }
    }

    /// Tells more.
    pub(crate) fn text(&self, text: &str) {
        match &self.chunks {
            None => self.events.send("delta", &json!({ "text": text })),
            Some(chunks) => self.events.send_data(&chunks.text(text)),
        }
    }

    /// Ends, with the whole answer.
    pub(crate) fn end(&self, stored: &Stored) {
        let Some(chunks) = &self.chunks else { return self.events.send_json("done", &stored.body) };
        match serde_json::from_str(&stored.body) {
            Ok(done) => chunks.end(&done).iter().for_each(|event| self.events.send_data(event)),
            Err(error) => tracing::error!("An answer does not parse: {error}"),
        }
        self.events.send_line("[DONE]");
    }

    /// Ends with an error.
    pub(crate) fn fail(&self, error: &ApiError, request_id: &RequestId) {
        let error = error.body(request_id);
        match &self.chunks {
            None => self.events.send("error", &error),
            Some(_) => self.events.send_data(&error),
        }
    }
}
