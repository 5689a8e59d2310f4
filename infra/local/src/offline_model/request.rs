//! A Messages request: read, validated as the real interface does, and cut into what is counted.

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use crate::lexis::count_tokens;

/// What every message costs besides its text.
const MESSAGE_OVERHEAD: u64 = 3;
const MAX_BREAKPOINTS: usize = 4;
const FIELDS: &[&str] = &[
    "cache_control",
    "max_tokens",
    "messages",
    "metadata",
    "model",
    "output_config",
    "service_tier",
    "stop_sequences",
    "stream",
    "system",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
];

/// The request cannot be answered; the text says why, in the interface's own manner.
#[derive(Debug, PartialEq, Eq)]
pub struct Invalid(pub String);

fn invalid<T>(message: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid(message.into()))
}

/// A valid request.
#[derive(Debug, Clone)]
pub struct Request {
    /// The model that was asked for.
    pub model: String,
    /// The most tokens the answer may have.
    pub max_tokens: u64,
    /// Answer as server-sent events?
    pub stream: bool,
    /// Texts that end the answer.
    pub stop_sequences: Vec<String>,
    /// The conversation, oldest message first; the last is the user's.
    pub messages: Vec<Message>,
    pub(super) units: Vec<Unit>,
}

/// A message of the conversation.
#[derive(Debug, Clone)]
pub struct Message {
    /// Whether the user said it, not the assistant.
    pub from_user: bool,
    /// What it consists of.
    pub blocks: Vec<Block>,
}

/// The part of a content block that matters here.
#[derive(Debug, Clone)]
pub enum Block {
    /// Text.
    Text(String),
    /// A search result.
    SearchResult(SearchResult),
    /// Something the offline model does not read.
    Other,
}

/// A passage as a content block.
#[derive(Debug, Clone)]
pub struct SearchResult {
    /// Where it is from.
    pub source: String,
    /// Its title.
    pub title: String,
    /// Its texts; citations refer to them by number.
    pub texts: Vec<String>,
    /// Whether citations are asked for.
    pub citations: bool,
}

/// How long a prompt prefix stays cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ttl {
    FiveMinutes,
    Hour,
}

/// A piece of the prompt, in the order in which prefixes are cached.
#[derive(Debug, Clone)]
pub(super) struct Unit {
    pub(super) digest: [u8; 32],
    pub(super) tokens: u64,
    pub(super) breakpoint: Option<Ttl>,
}

impl Request {
    /// Reads a request. `counting` is for the token counter, which takes no `max_tokens`.
    pub fn parse(body: &[u8], counting: bool) -> Result<Self, Invalid> {
        let body = match serde_json::from_slice(body) {
            Ok(Value::Object(body)) => body,
            Ok(_) => return invalid("Input should be an object"),
            Err(error) => return invalid(format!("The request body is not valid JSON: {error}")),
        };
        if let Some(field) = body.keys().find(|field| !FIELDS.contains(&field.as_str())) {
            return invalid(format!("{field}: Extra inputs are not permitted"));
        }
        let model = match body.get("model") {
            Some(Value::String(model)) if !model.is_empty() => model.clone(),
            Some(Value::String(_)) => return invalid("model: String should have at least 1 character"),
            Some(_) => return invalid("model: Input should be a valid string"),
            None => return invalid("model: Field required"),
        };
        let max_tokens = match body.get("max_tokens").map(Value::as_i64) {
            None if counting => 0,
            None => return invalid("max_tokens: Field required"),
            Some(None) => return invalid("max_tokens: Input should be a valid integer"),
            Some(Some(max)) => match u64::try_from(max) {
                Ok(max) if max > 0 => max,
                _ => return invalid("max_tokens: Input should be greater than or equal to 1"),
            },
        };
        let stream = match body.get("stream") {
            None => false,
            Some(Value::Bool(stream)) => *stream,
            Some(_) => return invalid("stream: Input should be a valid boolean"),
        };
        check_sampling(&body)?;
        check_unsupported(&body)?;
        let mut units = Vec::new();
        for tool in array(body.get("tools"), "tools")? {
            let tokens = count_tokens(&tool.to_string());
            units.push(unit("tool", tool, tokens, "tools")?);
        }
        system(body.get("system"), &mut units)?;
        let messages = messages(body.get("messages"), &mut units)?;
        if let Some(control) = body.get("cache_control").filter(|control| !control.is_null())
            && let Some(last) = units.last_mut()
        {
            // Automatic caching: as if it stood on the last block.
            last.breakpoint = Some(ttl(control, "cache_control")?);
        }
        let breakpoints = units.iter().filter(|unit| unit.breakpoint.is_some()).count();
        if breakpoints > MAX_BREAKPOINTS {
            return invalid(format!(
                "A maximum of {MAX_BREAKPOINTS} blocks with cache_control may be provided. Found {breakpoints}."
            ));
        }
        Ok(Self { model, max_tokens, stream, stop_sequences: stop_sequences(&body)?, messages, units })
    }

    /// The tokens of the whole prompt.
    #[must_use]
    pub fn input_tokens(&self) -> u64 {
        self.units.iter().map(|unit| unit.tokens).sum()
    }
}

fn check_sampling(body: &Map<String, Value>) -> Result<(), Invalid> {
    for field in ["temperature", "top_p"] {
        match body.get(field) {
            None | Some(Value::Null) => {}
            Some(value) if value.as_f64().is_some_and(|value| (0.0..=1.0).contains(&value)) => {}
            Some(_) => return invalid(format!("{field}: Input should be a number between 0 and 1")),
        }
    }
    match body.get("top_k") {
        None | Some(Value::Null) => Ok(()),
        Some(value) if value.as_u64().is_some() => Ok(()),
        Some(_) => invalid("top_k: Input should be a valid integer"),
    }
}

/// What would change the answer's form and is not done here must not pass as done.
fn check_unsupported(body: &Map<String, Value>) -> Result<(), Invalid> {
    let choice = body.get("tool_choice").and_then(|choice| choice.get("type")).and_then(Value::as_str);
    if matches!(choice, Some("any" | "tool")) {
        return invalid("tool_choice: the offline model does not call tools");
    }
    if body
        .get("output_config")
        .is_some_and(|config| config.get("format").is_some_and(|format| !format.is_null()))
    {
        return invalid("output_config.format: the offline model does not write structured output");
    }
    Ok(())
}

fn array<'a>(value: Option<&'a Value>, name: &str) -> Result<&'a [Value], Invalid> {
    match value {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(values)) => Ok(values),
        Some(_) => invalid(format!("{name}: Input should be a valid list")),
    }
}

fn stop_sequences(body: &Map<String, Value>) -> Result<Vec<String>, Invalid> {
    let sequences =
        array(body.get("stop_sequences"), "stop_sequences")?.iter().map(|sequence| match sequence {
            Value::String(sequence) if !sequence.trim().is_empty() => Ok(sequence.clone()),
            Value::String(_) => invalid("stop_sequences: each stop sequence must contain non-whitespace"),
            _ => invalid("stop_sequences: Input should be a valid string"),
        });
    sequences.collect()
}

fn ttl(control: &Value, at: &str) -> Result<Ttl, Invalid> {
    if control.get("type").and_then(Value::as_str) != Some("ephemeral") {
        return invalid(format!("{at}.cache_control.type: Input should be 'ephemeral'"));
    }
    match control.get("ttl").map(Value::as_str) {
        None | Some(Some("5m")) => Ok(Ttl::FiveMinutes),
        Some(Some("1h")) => Ok(Ttl::Hour),
        Some(_) => invalid(format!("{at}.cache_control.ttl: Input should be '5m' or '1h'")),
    }
}

/// The unit of a block; its digest leaves out where the breakpoints are.
fn unit(kind: &str, block: &Value, tokens: u64, at: &str) -> Result<Unit, Invalid> {
    let breakpoint = match block.get("cache_control") {
        None | Some(Value::Null) => None,
        Some(control) => Some(ttl(control, at)?),
    };
    let mut bare = block.clone();
    if let Value::Object(fields) = &mut bare {
        fields.remove("cache_control");
    }
    let digest =
        Sha256::new().chain_update(kind).chain_update([0]).chain_update(bare.to_string()).finalize().into();
    Ok(Unit { digest, tokens, breakpoint })
}

fn text_of<'a>(block: &'a Value, field: &str, at: &str) -> Result<&'a str, Invalid> {
    match block.get(field) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => invalid(format!("{at}.{field}: Input should be a valid string")),
        None => invalid(format!("{at}.{field}: Field required")),
    }
}

fn system(system: Option<&Value>, units: &mut Vec<Unit>) -> Result<(), Invalid> {
    match system {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(text)) => {
            let block = serde_json::json!({"type": "text", "text": text});
            units.push(unit("system", &block, count_tokens(text), "system")?);
            Ok(())
        }
        Some(Value::Array(blocks)) => {
            for (n, block) in blocks.iter().enumerate() {
                let at = format!("system.{n}");
                if block.get("type").and_then(Value::as_str) != Some("text") {
                    return invalid(format!("{at}.type: Input should be 'text'"));
                }
                let text = text_of(block, "text", &at)?;
                if text.is_empty() {
                    return invalid("system: text content blocks must be non-empty");
                }
                units.push(unit("system", block, count_tokens(text), &at)?);
            }
            Ok(())
        }
        Some(_) => invalid("system: Input should be a valid string or list"),
    }
}

fn messages(given: Option<&Value>, units: &mut Vec<Unit>) -> Result<Vec<Message>, Invalid> {
    let given = match given {
        Some(Value::Array(given)) if !given.is_empty() => given,
        Some(Value::Array(_)) => return invalid("messages: at least one message is required"),
        Some(_) => return invalid("messages: Input should be a valid list"),
        None => return invalid("messages: Field required"),
    };
    let mut messages = Vec::with_capacity(given.len());
    for (n, message) in given.iter().enumerate() {
        let at = format!("messages.{n}");
        let role = text_of(message, "role", &at)?;
        let from_user = match role {
            "user" => true,
            "assistant" => false,
            _ => return invalid(format!("{at}.role: Input should be 'user' or 'assistant'")),
        };
        let first = units.len();
        let blocks = match message.get("content") {
            None => return invalid(format!("{at}.content: Field required")),
            Some(Value::String(text)) if text.is_empty() => {
                return invalid(format!("{at}: {role} messages must have non-empty content"));
            }
            Some(Value::String(text)) => {
                let block = serde_json::json!({"type": "text", "text": text});
                units.push(unit(role, &block, count_tokens(text), &at)?);
                vec![Block::Text(text.clone())]
            }
            Some(Value::Array(blocks)) if blocks.is_empty() => {
                return invalid(format!("{at}: {role} messages must have non-empty content"));
            }
            Some(Value::Array(blocks)) => {
                let mut read = Vec::with_capacity(blocks.len());
                for (n, block) in blocks.iter().enumerate() {
                    let at = format!("{at}.content.{n}");
                    let before = read.len();
                    content(block, &at, &mut read)?;
                    let new = read.get(before..).unwrap_or_default();
                    units.push(unit(role, block, tokens(new, block), &at)?);
                }
                read
            }
            Some(_) => return invalid(format!("{at}.content: Input should be a valid string or list")),
        };
        if let Some(unit) = units.get_mut(first) {
            unit.tokens += MESSAGE_OVERHEAD;
        }
        messages.push(Message { from_user, blocks });
    }
    if messages.first().is_some_and(|message| !message.from_user) {
        return invalid("messages: first message must use the \"user\" role");
    }
    if messages.last().is_some_and(|message| !message.from_user) {
        return invalid(
            "This model does not support assistant message prefill. The conversation must end with a user message.",
        );
    }
    let mut citing = messages.iter().flat_map(|message| &message.blocks).filter_map(|block| match block {
        Block::SearchResult(result) => Some(result.citations),
        _ => None,
    });
    if let Some(first) = citing.next()
        && citing.any(|citations| citations != first)
    {
        return invalid("messages: citations must be enabled for all search results or for none");
    }
    Ok(messages)
}

/// Reads one content block; a tool's result may contain several.
fn content(block: &Value, at: &str, read: &mut Vec<Block>) -> Result<(), Invalid> {
    match text_of(block, "type", at)? {
        "text" => {
            let text = text_of(block, "text", at)?;
            if text.is_empty() {
                return invalid("messages: text content blocks must be non-empty");
            }
            read.push(Block::Text(text.to_owned()));
        }
        "search_result" => {
            let mut texts = Vec::new();
            let Some(Value::Array(contents)) = block.get("content") else {
                return invalid(format!("{at}.content: Input should be a valid list"));
            };
            for (n, content) in contents.iter().enumerate() {
                let at = format!("{at}.content.{n}");
                if content.get("type").and_then(Value::as_str) != Some("text") {
                    return invalid(format!("{at}.type: Input should be 'text'"));
                }
                texts.push(text_of(content, "text", &at)?.to_owned());
            }
            if texts.is_empty() {
                return invalid(format!("{at}.content: search results must have at least one text"));
            }
            read.push(Block::SearchResult(SearchResult {
                source: text_of(block, "source", at)?.to_owned(),
                title: text_of(block, "title", at)?.to_owned(),
                texts,
                citations: block
                    .get("citations")
                    .and_then(|citations| citations.get("enabled"))
                    .and_then(Value::as_bool)
                    .unwrap_or(false),
            }));
        }
        "tool_result" => {
            read.push(Block::Other);
            if let Some(Value::Array(contents)) = block.get("content") {
                for (n, inner) in contents.iter().enumerate() {
                    content(inner, &format!("{at}.content.{n}"), read)?;
                }
            }
        }
        "tool_use" | "thinking" | "redacted_thinking" => read.push(Block::Other),
        kind @ ("image" | "document") => {
            return invalid(format!("{at}.type: the offline model reads no {kind} blocks"));
        }
        kind => {
            return invalid(format!(
                "{at}: Input tag '{kind}' found using 'type' does not match any of the expected tags"
            ));
        }
    }
    Ok(())
}

fn tokens(blocks: &[Block], whole: &Value) -> u64 {
    if blocks.iter().any(|block| matches!(block, Block::Other)) {
        return count_tokens(&whole.to_string());
    }
    let of = |block: &Block| match block {
        Block::Text(text) => count_tokens(text),
        Block::SearchResult(result) => {
            let texts: u64 = result.texts.iter().map(|text| count_tokens(text)).sum();
            count_tokens(&result.source) + count_tokens(&result.title) + texts
        }
        Block::Other => 0,
    };
    blocks.iter().map(of).sum()
}
