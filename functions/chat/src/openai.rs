//! `POST /v1/chat/completions`: the same question and the same answer, in the words of OpenAI's clients.
//!
//! The client brings what was said before along, so nothing is kept of it as a conversation. All that it
//! says is data: its system messages set no rules. What is not supported is refused by name, unless its
//! value asks for nothing that is not done anyway.
//!
//! <https://platform.openai.com/docs/api-reference/chat>

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use shared::conversation::{Citation, Exchange};
use shared::error::ApiError;
use shared::ids::MessageId;
use shared::units::{NanoUsd, Tokens};

use crate::answer::Done;
use crate::question::Asked;

/// The body.
#[derive(Debug, Deserialize)]
pub(crate) struct Body {
    messages: Vec<Message>,
    model: Option<String>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    /// Passages to retrieve: ours.
    top_k: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: Role,
    #[serde(default)]
    content: Value,
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
}

impl Body {
    /// Whether the answer comes as events.
    pub(crate) fn streams(&self) -> bool {
        self.stream == Some(true)
    }

    /// Whether the events end with what was used.
    pub(crate) fn includes_usage(&self) -> bool {
        self.stream_options.as_ref().is_some_and(|options| options.include_usage == Some(true))
    }

    /// What is asked.
    ///
    /// # Errors
    /// The refusal of what is not supported, or makes no question; it names the field.
    pub(crate) fn asked(self) -> Result<Asked, ApiError> {
        for (name, value) in &self.others {
            supported(name, name, value)?;
        }
        match &self.stream_options {
            Some(_) if self.stream != Some(true) => {
                let message = "stream_options is for streams alone: set stream";
                return Err(ApiError::invalid("stream_options", message));
            }
            Some(options) => {
                for (name, value) in &options.others {
                    supported(&format!("stream_options.{name}"), name, value)?;
                }
            }
            None => {}
        }
        let (max_tokens, max_tokens_param) = match (self.max_completion_tokens, self.max_tokens) {
            (Some(one), Some(other)) if one != other => {
                let message = "max_tokens is the former name of max_completion_tokens; they differ";
                return Err(ApiError::invalid("max_tokens", message));
            }
            (None, max_tokens) => (max_tokens, "max_tokens"),
            (max_tokens, _) => (max_tokens, "max_completion_tokens"),
        };
        let Said { message, preface, history } = said(&self.messages)?;
        Ok(Asked {
            message,
            message_param: "messages",
            preface,
            history,
            conversation_id: None,
            keeps: false,
            model: self.model,
            max_tokens,
            max_tokens_param,
            top_k: self.top_k,
        })
    }
}

/// Makes sure that a parameter which is not known, or known and not supported, asks for nothing.
fn supported(param: &str, name: &str, value: &Value) -> Result<(), ApiError> {
    let is = |number: f64| value.as_f64() == Some(number);
    let asks_for_nothing = value.is_null()
        || match name {
            "n" | "temperature" | "top_p" => is(1.0),
            "frequency_penalty" | "presence_penalty" => is(0.0),
            "logprobs" | "store" | "include_obfuscation" => *value == false,
            "modalities" => *value == json!(["text"]),
            "response_format" => *value == json!({"type": "text"}),
            "tool_choice" => *value == "none",
            "service_tier" => *value == "auto" || *value == "default",
            _ => false,
        };
    if asks_for_nothing {
        return Ok(());
    }
    let shown: String = param.chars().take(64).collect();
    let instead = match name {
        "user" | "safety_identifier" => ": name the user in the header X-User-Id",
        "store" => ": POST /v1/chat keeps conversations",
        "conversation_id" => ": messages hold the conversation here, and POST /v1/chat keeps one",
        _ => "",
    };
    Err(ApiError::invalid(shown.clone(), format!("`{shown}` is not supported here{instead}")))
}

/// What messages come to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    message: String,
    preface: String,
    /// Newest first.
    history: Vec<Exchange>,
}

fn said(messages: &[Message]) -> Result<Said, ApiError> {
    let mut said = Said::default();
    let mut exchanges: Vec<Exchange> = Vec::new();
    let mut asked_last = false;
    for (n, message) in messages.iter().enumerate() {
        let text = message.text(n)?;
        match message.role {
            Role::System | Role::Developer => add(&mut said.preface, &text),
            // Nobody has asked anything yet.
            Role::Assistant if exchanges.is_empty() => add(&mut said.preface, &text),
            Role::Assistant => {
                asked_last = false;
                if let Some(exchange) = exchanges.last_mut() {
                    add(&mut exchange.answer, &text);
                }
            }
            Role::User => {
                match exchanges.last_mut().filter(|_| asked_last) {
                    Some(exchange) => add(&mut exchange.question, &text),
                    None => exchanges.push(Exchange { question: text, answer: String::new() }),
                }
                asked_last = true;
            }
        }
    }
    match exchanges.pop() {
        Some(Exchange { question, .. }) if asked_last => said.message = question,
        _ => return Err(ApiError::invalid("messages", "messages must end with what the user asks")),
    }
    exchanges.reverse();
    said.history = exchanges;
    Ok(said)
}

/// Adds a paragraph.
fn add(text: &mut String, paragraph: &str) {
    if !(text.is_empty() || paragraph.is_empty()) {
        text.push_str("\n\n");
    }
    text.push_str(paragraph);
}

impl Message {
    /// Its text, where it has nothing else; it is the `n`th.
    fn text(&self, n: usize) -> Result<String, ApiError> {
        for (name, value) in &self.others {
            // What an answer of ours carries comes back where a client sends that answer along.
            if self.role == Role::Assistant && matches!(name.as_str(), "annotations" | "citations") {
                continue;
            }
            supported(&format!("messages[{n}].{name}"), name, value)?;
        }
        match &self.content {
            Value::Null if self.role == Role::Assistant => Ok(String::new()),
            Value::String(text) => Ok(text.clone()),
            Value::Array(parts) => {
                let parts = parts
                    .iter()
                    .enumerate()
                    .map(|(p, part)| text_part(&format!("messages[{n}].content[{p}]"), part));
                parts.collect()
            }
            _ => Err(ApiError::invalid(
                format!("messages[{n}].content"),
                "content must be text, or a list of parts of text",
            )),
        }
    }
}

/// The text of a part, which must be one of text.
fn text_part<'a>(param: &str, part: &'a Value) -> Result<&'a str, ApiError> {
    if part["type"] != "text" {
        let message = "the only type of part that is supported is `text`";
        return Err(ApiError::invalid(format!("{param}.type"), message));
    }
    part["text"].as_str().ok_or_else(|| ApiError::invalid(format!("{param}.text"), "text must be a string"))
}

/// The whole answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Completion {
    pub(crate) id: MessageId,
    object: String,
    pub(crate) created: i64,
    pub(crate) model: String,
    choices: [Choice; 1],
    usage: Used,
    citations: Vec<Citation>,
    latency_ms: u64,
    pub(crate) documents_retrieved: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Choice {
    index: u32,
    message: Answered,
    logprobs: Value,
    finish_reason: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Answered {
    role: String,
    content: String,
    refusal: Value,
    annotations: Vec<Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Used {
    prompt_tokens: Tokens,
    completion_tokens: Tokens,
    total_tokens: Tokens,
    prompt_tokens_details: Details,
    embedding_tokens: Tokens,
    cost_nano_usd: NanoUsd,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Details {
    cached_tokens: Tokens,
}

impl From<&Done> for Completion {
    fn from(done: &Done) -> Self {
        let usage = done.usage.model;
        let cached = usage.cache_read_input_tokens;
        let prompt_tokens = usage.input_tokens + usage.cache_creation_input_tokens + cached;
        let length = done.response.chars().count();
        let answered = Answered {
            role: "assistant".to_owned(),
            content: done.response.clone(),
            refusal: Value::Null,
            annotations: done.citations.iter().map(|citation| annotation(citation, length)).collect(),
        };
        let choice = Choice {
            index: 0,
            message: answered,
            logprobs: Value::Null,
            finish_reason: finish_reason(done.stop_reason.as_deref()).to_owned(),
        };
        Self {
            id: done.id.clone(),
            object: "chat.completion".to_owned(),
            created: done.created_s,
            model: done.model.clone(),
            choices: [choice],
            usage: Used {
                prompt_tokens,
                completion_tokens: usage.output_tokens,
                total_tokens: prompt_tokens + usage.output_tokens,
                prompt_tokens_details: Details { cached_tokens: cached },
                embedding_tokens: done.usage.embedding_tokens,
                cost_nano_usd: done.usage.cost_nano_usd,
            },
            citations: done.citations.clone(),
            latency_ms: done.latency_ms,
            documents_retrieved: done.documents_retrieved,
        }
    }
}

/// A citation as these clients know them. It is of the answer as a whole; and a document that came from no
/// address is found at ours.
fn annotation(citation: &Citation, length: usize) -> Value {
    let url = match citation.source.as_str() {
        "" => format!("/v1/documents/{}", citation.document_id),
        source => source.to_owned(),
    };
    json!({
        "type": "url_citation",
        "url_citation": {"start_index": 0, "end_index": length, "title": citation.title, "url": url},
    })
}

fn finish_reason(stop_reason: Option<&str>) -> &'static str {
    match stop_reason {
        Some("max_tokens" | "model_context_window_exceeded") => "length",
        Some("refusal") => "content_filter",
        _ => "stop",
    }
}

impl Completion {
    /// Its text.
    pub(crate) fn content(&self) -> &str {
        let [choice] = &self.choices;
        &choice.message.content
    }
}

/// What each event of a stream repeats.
#[derive(Clone, Debug)]
pub(crate) struct Chunks {
    id: MessageId,
    created: i64,
    model: String,
    include_usage: bool,
}

impl Chunks {
    pub(crate) fn new(id: MessageId, created: i64, model: String, include_usage: bool) -> Self {
        Self { id, created, model, include_usage }
    }

    /// A chunk, and what stands beside its choices. Each says `usage` if that was asked for: most of them that
    /// it is not known yet.
    fn chunk(&self, choices: Value, beside: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
        let usage = self.include_usage.then_some(("usage", Value::Null));
        let fields = [
            ("id", json!(self.id)),
            ("object", json!("chat.completion.chunk")),
            ("created", json!(self.created)),
            ("model", json!(self.model)),
            ("choices", choices),
        ];
        fields.into_iter().chain(usage).chain(beside).map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn delta(&self, delta: Value) -> Value {
        self.chunk(json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]), [])
    }

    /// The first event.
    pub(crate) fn begin(&self) -> Value {
        self.delta(json!({"role": "assistant", "content": ""}))
    }

    /// More text.
    pub(crate) fn text(&self, text: &str) -> Value {
        self.delta(json!({"content": text}))
    }

    /// The last events: why it ended, with what it cites; and what it used, if that was asked for.
    pub(crate) fn end(&self, done: &Completion) -> Vec<Value> {
        let [Choice { message, finish_reason, .. }] = &done.choices;
        let mut delta = Map::new();
        if !message.annotations.is_empty() {
            delta.insert("annotations".to_owned(), message.annotations.clone().into());
        }
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason});
        let last = self.chunk(json!([choice]), [("citations", json!(done.citations))]);
        let used = self.include_usage.then(|| self.chunk(json!([]), [("usage", json!(done.usage))]));
        std::iter::once(last).chain(used).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(body: Value) -> Result<Asked, ApiError> {
        serde_json::from_value::<Body>(body).unwrap().asked()
    }

    fn exchange(question: &str, answer: &str) -> Exchange {
        Exchange { question: question.into(), answer: answer.into() }
    }

    #[test]
    fn messages_become_a_question_and_what_was_said_before() {
        let asked = asked(json!({"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": "Welcome!"},
            {"role": "user", "content": "One?"},
            {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "two?"}]},
            {"role": "assistant", "content": "1", "refusal": null, "annotations": [{}], "tool_calls": null},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": null},
            {"role": "user", "content": "Four?"},
            {"role": "developer", "content": "In rhyme."},
        ]}))
        .unwrap();
        assert_eq!(asked.message, "Four?");
        assert_eq!(asked.preface, "Be brief.\n\nWelcome!\n\nIn rhyme.");
        assert_eq!(asked.history, [exchange("Three?", ""), exchange("One?\n\nAnd two?", "1\n\n2")]);
        assert!(!asked.keeps);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let with = |name: &str, value: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
            body[name] = value;
            asked(body).map(drop).map_err(|error| error.param.unwrap())
        };
        for name in
            ["tools", "functions", "stop", "seed", "user", "conversation_id", "logit_bias", "nonsense"]
        {
            assert_eq!(with(name, json!([])), Err(name.to_owned()));
            assert_eq!(with(name, Value::Null), Ok(()));
        }
        for (name, nothing, something) in [
            ("n", json!(1), json!(2)),
            ("temperature", json!(1.0), json!(0.7)),
            ("presence_penalty", json!(0), json!(0.5)),
            ("store", json!(false), json!(true)),
            ("response_format", json!({"type": "text"}), json!({"type": "json_object"})),
            ("stream_options", Value::Null, json!({"include_usage": true})),
        ] {
            assert_eq!(with(name, nothing), Ok(()), "{name}");
            assert_eq!(with(name, something), Err(name.to_owned()));
        }
        let messages = |messages: Value| asked(json!({"messages": messages})).unwrap_err().param.unwrap();
        assert_eq!(messages(json!([])), "messages");
        assert_eq!(messages(json!([{"role": "system", "content": "x"}])), "messages");
        let answered = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]);
        assert_eq!(messages(answered), "messages");
        assert_eq!(messages(json!([{"role": "user", "content": 7}])), "messages[0].content");
        assert_eq!(messages(json!([{"role": "user", "content": "x", "name": "n"}])), "messages[0].name");
        let image =
            json!([{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url"}]}]);
        assert_eq!(messages(image), "messages[0].content[1].type");
    }
}
