//! The client of Anthropic's Messages API.
//!
//! Answers are always taken as a stream, whether the caller wants one or not: there is one way to read
//! an answer, and a long one keeps its connection alive. A call is repeated only before its first byte.
//!
//! <https://platform.claude.com/docs/en/build-with-claude/streaming>

use std::pin::Pin;
use std::time::Duration;

use eventsource_stream::{Event, Eventsource};
use futures_util::{Stream, StreamExt};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use crate::messages::{ContentBlock, Message, MessagesRequest};
use crate::outbound::{self, OutboundError};
use crate::pressure::{self, Fill};
use crate::pricing::Usage;
use crate::secret::Secret;
use crate::trace::Trace;
use crate::units::Tokens;

/// The longest silence within an answer; the service sends pings in between.
const SILENCE: Duration = Duration::from_secs(45);

/// The client. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ModelClient {
    http: reqwest::Client,
    url: Url,
    count_url: Url,
    key: Secret,
}

/// What an answer brings, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelEvent {
    /// More text.
    Text(String),
    /// A citation of the passage at that place in the prompt.
    Citation {
        /// The passage's place.
        passage: usize,
    },
}

/// An answer on its way.
pub struct Answer {
    events: Pin<Box<dyn Stream<Item = Result<Event, OutboundError>> + Send>>,
    deadline: Instant,
    model: String,
    fill: Option<Fill>,
    usage: Usage,
    /// Whether the service has reported the input.
    started: bool,
    stop_reason: Option<String>,
    complete: bool,
}

impl ModelClient {
    /// A client of the service at `base`, such as `https://api.anthropic.com`.
    pub fn new(http: reqwest::Client, base: &Url, key: Secret) -> Self {
        let url = |path| outbound::joined(base, path);
        Self { http, url: url("v1/messages"), count_url: url("v1/messages/count_tokens"), key }
    }

    fn post(&self, url: &Url) -> reqwest::RequestBuilder {
        let request = self.http.post(url.clone());
        request.header("x-api-key", self.key.expose()).header("anthropic-version", "2023-06-01")
    }

    /// The same service, with another account's key.
    #[must_use]
    pub fn with_key(&self, key: Secret) -> Self {
        Self { key, ..self.clone() }
    }

    /// How many tokens of input the service counts in `request`. Costs nothing.
    ///
    /// <https://platform.claude.com/docs/en/build-with-claude/token-counting>
    ///
    /// # Errors
    /// [`OutboundError`] if it does not say.
    pub async fn count(
        &self,
        request: &MessagesRequest,
        trace: Option<&Trace>,
        deadline: Instant,
    ) -> Result<Tokens, OutboundError> {
        let body =
            WireCountRequest { model: &request.model, system: &request.system, messages: &request.messages };
        let call = || self.post(&self.count_url).json(&body);
        let counted: WireCount = outbound::json(call, trace, deadline).await?;
        Ok(Tokens(counted.input_tokens))
    }

    /// Asks, and returns once the service has begun to answer: it has said which model answers.
    ///
    /// # Errors
    /// [`OutboundError`] if it does not.
    pub async fn ask(
        &self,
        request: &MessagesRequest,
        trace: Option<&Trace>,
        deadline: Instant,
    ) -> Result<Answer, OutboundError> {
        let response = outbound::send(|| self.post(&self.url).json(request), trace, deadline).await?;
        let fill = pressure::fill_of(response.headers());
        let events = response.bytes_stream().eventsource().map(|event| {
            event.map_err(|error| match error {
                eventsource_stream::EventStreamError::Transport(error) => OutboundError::Connection(error),
                other => OutboundError::Malformed(other.to_string()),
            })
        });
        let mut answer = Answer {
            events: Box::pin(events),
            deadline,
            model: request.model.clone(),
            fill,
            usage: Usage::default(),
            started: false,
            stop_reason: None,
            complete: false,
        };
        while !answer.started {
            let data = answer.data().await?;
            if answer.take(&data)?.is_some() || answer.complete {
                return Err(OutboundError::Malformed("the answer has no beginning".into()));
            }
        }
        Ok(answer)
    }
}

impl Answer {
    /// The next part of the answer; `None` at its end.
    ///
    /// # Errors
    /// [`OutboundError`] if the answer breaks off.
    pub async fn next(&mut self) -> Result<Option<ModelEvent>, OutboundError> {
        while !self.complete {
            let data = self.data().await?;
            if let Some(event) = self.take(&data)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    /// The data of the service's next event.
    async fn data(&mut self) -> Result<String, OutboundError> {
        let patience = self.deadline.min(Instant::now() + SILENCE);
        match timeout_at(patience, self.events.next()).await {
            Err(_) => Err(OutboundError::Deadline),
            Ok(None) => Err(OutboundError::Malformed("the answer broke off".into())),
            Ok(Some(event)) => Ok(event?.data),
        }
    }

    /// The model that answers, as the service names it.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// How full the account's own limits are, if the service says.
    pub fn fill(&self) -> Option<Fill> {
        self.fill
    }

    /// What the answer used, and whether any of it is a bound: where the service has not said, because
    /// the answer broke off, `input` and `output` are what it can be at most.
    pub fn usage(&self, input: Tokens, output: Tokens) -> (Usage, bool) {
        let mut usage = self.usage;
        if !self.started {
            usage.input_tokens = input;
        }
        if self.stop_reason.is_none() {
            usage.output_tokens = output;
        }
        (usage, !self.started || self.stop_reason.is_none())
    }

    /// Why the answer ended, if it did.
    pub fn stop_reason(&self) -> Option<&str> {
        self.stop_reason.as_deref()
    }

    fn take(&mut self, data: &str) -> Result<Option<ModelEvent>, OutboundError> {
        let event: WireEvent =
            serde_json::from_str(data).map_err(|e| OutboundError::Malformed(format!("event: {e}")))?;
        match event {
            WireEvent::MessageStart { message } => {
                self.model = message.model;
                self.started = true;
                self.count(message.usage);
            }
            WireEvent::ContentBlockDelta { delta: Delta::Text { text } } => {
                return Ok(Some(ModelEvent::Text(text)));
            }
            WireEvent::ContentBlockDelta {
                delta: Delta::Citation { citation: WireCitation { search_result_index: Some(passage) } },
            } => return Ok(Some(ModelEvent::Citation { passage })),
            WireEvent::MessageDelta { delta, usage } => {
                self.stop_reason = delta.stop_reason;
                self.count(usage);
            }
            WireEvent::MessageStop => self.complete = true,
            WireEvent::Error { error } => {
                return Err(match error.kind.as_str() {
                    "overloaded_error" | "rate_limit_error" => OutboundError::Overloaded {
                        status: http::StatusCode::TOO_MANY_REQUESTS,
                        retry_after: None,
                    },
                    _ => OutboundError::Failed(http::StatusCode::INTERNAL_SERVER_ERROR),
                });
            }
            WireEvent::ContentBlockDelta { .. } | WireEvent::Other => {}
        }
        Ok(None)
    }

    /// Counts are cumulative: of each kind the last one reported holds.
    fn count(&mut self, wire: WireUsage) {
        let keep = |slot: &mut Tokens, count: Option<u64>| *slot = count.map_or(*slot, Tokens);
        keep(&mut self.usage.input_tokens, wire.input_tokens);
        keep(&mut self.usage.output_tokens, wire.output_tokens);
        keep(&mut self.usage.cache_read_input_tokens, wire.cache_read_input_tokens);
        keep(&mut self.usage.cache_creation_input_tokens, wire.cache_creation_input_tokens);
    }
}

#[derive(Serialize)]
struct WireCountRequest<'a> {
    model: &'a str,
    system: &'a [ContentBlock],
    messages: &'a [Message],
}

#[derive(Deserialize)]
struct WireCount {
    input_tokens: u64,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum WireEvent {
    MessageStart {
        message: WireMessage,
    },
    ContentBlockDelta {
        delta: Delta,
    },
    MessageDelta {
        delta: WireEnd,
        #[serde(default)]
        usage: WireUsage,
    },
    MessageStop,
    Error {
        error: WireError,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct WireMessage {
    model: String,
    #[serde(default)]
    usage: WireUsage,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Delta {
    #[serde(rename = "text_delta")]
    Text { text: String },
    #[serde(rename = "citations_delta")]
    Citation { citation: WireCitation },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct WireCitation {
    search_result_index: Option<usize>,
}

#[derive(Deserialize)]
struct WireEnd {
    stop_reason: Option<String>,
}

#[derive(Deserialize)]
struct WireError {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Default, Deserialize)]
struct WireUsage {
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(events: &[&str]) -> Answer {
        let events: Vec<_> =
            events.iter().map(|data| Ok(Event { data: (*data).to_owned(), ..Default::default() })).collect();
        Answer {
            events: Box::pin(futures_util::stream::iter(events)),
            deadline: Instant::now() + Duration::from_secs(5),
            model: "asked".into(),
            fill: None,
            usage: Usage::default(),
            started: false,
            stop_reason: None,
            complete: false,
        }
    }

    #[tokio::test]
    async fn counts_are_cumulative_and_unknown_events_are_passed_over() {
        let mut answer = answer(&[
            r#"{"type":"message_start","message":{"model":"m","usage":{"input_tokens":10,"cache_read_input_tokens":5,"output_tokens":1}}}"#,
            r#"{"type":"ping"}"#,
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hi"}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"?"}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"citations_delta","citation":{"type":"search_result_location","search_result_index":2}}}"#,
            r#"{"type":"content_block_stop","index":0}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":7}}"#,
            r#"{"type":"message_stop"}"#,
        ]);
        assert_eq!(answer.next().await.unwrap(), Some(ModelEvent::Text("Hi".into())));
        assert_eq!(answer.next().await.unwrap(), Some(ModelEvent::Citation { passage: 2 }));
        assert_eq!(answer.next().await.unwrap(), None);
        assert_eq!(answer.next().await.unwrap(), None);
        let (usage, bound) = answer.usage(Tokens(99), Tokens(99));
        assert!(!bound);
        assert_eq!(
            (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens),
            (Tokens(10), Tokens(5), Tokens(7))
        );
        assert_eq!((answer.model(), answer.stop_reason()), ("m", Some("end_turn")));
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_an_error() {
        let mut broken = answer(&[
            r#"{"type":"message_start","message":{"model":"m","usage":{"input_tokens":10,"output_tokens":1}}}"#,
        ]);
        let (usage, bound) = broken.usage(Tokens(99), Tokens(77));
        assert_eq!((usage.input_tokens, usage.output_tokens, bound), (Tokens(99), Tokens(77), true));
        assert!(broken.next().await.is_err());
        let (usage, bound) = broken.usage(Tokens(99), Tokens(77));
        assert_eq!((usage.input_tokens, usage.output_tokens, bound), (Tokens(10), Tokens(77), true));
        assert!(answer(&[r#"{"type":"ping"}"#]).next().await.is_err());
        assert!(answer(&["not json"]).next().await.is_err());
        let overloaded = r#"{"type":"error","error":{"type":"overloaded_error","message":"x"}}"#;
        assert!(matches!(answer(&[overloaded]).next().await, Err(OutboundError::Overloaded { .. })));
    }
}
