//! What is asked: the request's body, checked against the tenant's limits before anything is spent.

use serde::Deserialize;
use shared::conversation::{Exchange, MOST_TURNS};
use shared::error::{ApiError, Code};
use shared::ids::ConversationId;
use shared::pricing::{self, ChatModel};
use shared::prompt::{Refused, Screened, screen_message};
use shared::scope::TenantScope;
use shared::units::Tokens;

/// The longest message, in bytes. The tenant's context limit is usually reached before. With the
/// longest answer it stays within what one item of the store holds.
const MOST_MESSAGE_BYTES: usize = 100_000;
/// The longest answer that may be asked for, in tokens; whatever the model could do.
const MOST_ANSWER_TOKENS: u64 = 32_768;
/// Passages that are retrieved where the request does not say.
const DEFAULT_TOP_K: u32 = 6;
/// The most passages that can be asked for.
const MOST_TOP_K: u32 = 50;
/// The answer's length where the request does not say, if the tenant's context leaves room for it.
const DEFAULT_MAX_TOKENS: u64 = 2_048;

/// The body of `POST /v1/chat`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Body {
    message: String,
    conversation_id: Option<String>,
    model: Option<String>,
    max_tokens: Option<u64>,
    top_k: Option<u32>,
    #[serde(default)]
    pub(crate) stream: bool,
}

/// What is asked, by whichever body it was said.
#[derive(Debug)]
pub(crate) struct Asked {
    /// The message, and the field that holds it.
    pub(crate) message: String,
    pub(crate) message_param: &'static str,
    /// What the application says beforehand; may be empty.
    pub(crate) preface: String,
    /// What was said before, where the caller brings it along, newest first.
    pub(crate) history: Vec<Exchange>,
    /// The conversation, as the caller names it.
    pub(crate) conversation_id: Option<String>,
    /// Whether the answer becomes a turn of a conversation.
    pub(crate) keeps: bool,
    pub(crate) model: Option<String>,
    /// The longest answer, and the field that holds it.
    pub(crate) max_tokens: Option<u64>,
    pub(crate) max_tokens_param: &'static str,
    pub(crate) top_k: Option<u32>,
}

impl From<Body> for Asked {
    fn from(body: Body) -> Self {
        Self {
            message: body.message,
            message_param: "message",
            preface: String::new(),
            history: Vec::new(),
            conversation_id: body.conversation_id,
            keeps: true,
            model: body.model,
            max_tokens: body.max_tokens,
            max_tokens_param: "max_tokens",
            top_k: body.top_k,
        }
    }
}

/// A question that may be asked.
#[derive(Debug)]
pub(crate) struct Question {
    /// The message, after the tenant's injection policy.
    pub(crate) message: Screened,
    /// The field that holds it.
    pub(crate) message_param: &'static str,
    /// What the application says beforehand, after the tenant's injection policy.
    pub(crate) preface: String,
    /// What was said before, where the caller brings it along, newest first.
    pub(crate) history: Vec<Exchange>,
    /// The conversation it continues, if any.
    pub(crate) conversation: Option<ConversationId>,
    /// Whether the answer becomes a turn of a conversation.
    pub(crate) keeps: bool,
    /// The model's name.
    pub(crate) model_name: String,
    /// The model.
    pub(crate) model: &'static ChatModel,
    /// The longest answer, in tokens.
    pub(crate) max_tokens: u64,
    /// How many passages to retrieve.
    pub(crate) top_k: u32,
}

impl Question {
    /// Checks what is asked.
    ///
    /// # Errors
    /// The refusal that the caller is to see; it names the field.
    pub(crate) fn parse(asked: &Asked, scope: &TenantScope) -> Result<Self, ApiError> {
        let param = asked.message_param;
        if asked.message.trim().is_empty() {
            return Err(ApiError::invalid(param, "the message is empty"));
        }
        if asked.message.len() + asked.preface.len() > MOST_MESSAGE_BYTES {
            let message = format!("the message is longer than {MOST_MESSAGE_BYTES} bytes");
            return Err(ApiError::new(Code::TooLarge, message).with_param(param));
        }
        // A text that cannot be an id is answered like an id that is nobody's.
        let conversation = asked.conversation_id.as_ref();
        let conversation = conversation.map(|id| id.parse().map_err(|_| ApiError::not_found()));
        let limits = scope.limits();
        let model_name = asked.model.clone().unwrap_or_else(|| limits.default_model.clone());
        let model = pricing::chat_model(&model_name).ok_or_else(|| {
            ApiError::invalid("model", format!("there is no model `{}`", shown(&model_name)))
        })?;
        if !limits.allowed_models.contains(&model_name) {
            let message = format!("this tenant may not use the model `{model_name}`");
            return Err(ApiError::new(Code::ModelNotAllowed, message).with_param("model"));
        }
        let most = model.max_output_tokens.min(MOST_ANSWER_TOKENS).min(limits.max_context_tokens / 2);
        let max_tokens = match asked.max_tokens {
            None => DEFAULT_MAX_TOKENS.min(limits.max_context_tokens / 4).min(most),
            Some(n) if (1..=most).contains(&n) => n,
            Some(_) => {
                let field = asked.max_tokens_param;
                return Err(ApiError::invalid(field, format!("{field} must be between 1 and {most}")));
            }
        };
        // Before anything is spent on it. What the rest of the prompt needs is known, and refused, later.
        let needs = Tokens::estimate(&asked.message) + Tokens::estimate(&asked.preface) + Tokens(max_tokens);
        if needs > Tokens(limits.max_context_tokens) {
            let message = format!(
                "message and answer need about {} tokens; this tenant's context has {}",
                needs.0, limits.max_context_tokens
            );
            return Err(ApiError::new(Code::TooLarge, message).with_param(param));
        }
        let top_k = match asked.top_k {
            None => DEFAULT_TOP_K,
            Some(n) if (1..=MOST_TOP_K).contains(&n) => n,
            Some(_) => {
                return Err(ApiError::invalid("top_k", format!("top_k must be between 1 and {MOST_TOP_K}")));
            }
        };
        let mut screen = Screen { scope, param, injection: Vec::new() };
        let text = screen.text(&asked.message)?;
        let preface = screen.text(&asked.preface)?;
        let mut history = Vec::new();
        for Exchange { question, answer } in recent(&asked.history, limits.max_context_tokens) {
            history.push(Exchange { question: screen.text(question)?, answer: screen.text(answer)? });
        }
        screen.injection.sort_unstable();
        screen.injection.dedup();
        Ok(Self {
            message: Screened { text, injection: screen.injection },
            message_param: param,
            preface,
            history,
            conversation: conversation.transpose()?,
            keeps: asked.keeps,
            model_name,
            model,
            max_tokens,
            top_k,
        })
    }
}

/// Looks at what a caller says as the tenant's policy says, and gathers what it finds.
struct Screen<'a> {
    scope: &'a TenantScope,
    param: &'static str,
    injection: Vec<String>,
}

impl Screen<'_> {
    fn text(&mut self, text: &str) -> Result<String, ApiError> {
        let screened = screen_message(text, self.scope.profile().injection_policy);
        let Screened { text, injection } = screened.map_err(|refused: Refused| {
            ApiError::new(Code::InjectionRefused, refused.to_string()).with_param(self.param)
        })?;
        self.injection.extend(injection);
        Ok(text)
    }
}

/// What of a history, newest first, is worth a look: no more than the prompt could hold.
fn recent(history: &[Exchange], max_context_tokens: u64) -> impl Iterator<Item = &Exchange> {
    let mut room = max_context_tokens;
    history.iter().take(MOST_TURNS).take_while(move |exchange| {
        let needs = Tokens::estimate(&exchange.question) + Tokens::estimate(&exchange.answer);
        let fits = needs.0 <= room;
        room = room.saturating_sub(needs.0);
        fits
    })
}

/// What is searched for a message: all of it, or of a long one its beginning and its end, where people
/// put what they ask. Within what embedding models take, since a token is at least a byte.
pub(crate) fn searched(message: &str) -> String {
    const MOST_BYTES: usize = 8_000;
    if message.len() <= MOST_BYTES {
        return message.to_owned();
    }
    let head = message.floor_char_boundary(MOST_BYTES / 2);
    let tail = message.ceil_char_boundary(message.len() - MOST_BYTES / 2);
    let (head, tail) = (message.get(..head), message.get(tail..));
    format!("{}\n{}", head.unwrap_or_default(), tail.unwrap_or_default())
}

/// A caller's word as an error repeats it: short.
fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_searched_by_its_ends() {
        assert_eq!(searched("short"), "short");
        let long = format!("begins é{}é ends", "x".repeat(20_000));
        let searched = searched(&long);
        assert!(searched.starts_with("begins é") && searched.ends_with("é ends"));
        assert!(searched.len() <= 8_001);
    }
}
