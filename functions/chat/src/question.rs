//! What is asked: the request's body, checked against the tenant's limits before anything is spent.

use serde::Deserialize;
use shared::error::{ApiError, Code};
use shared::ids::ConversationId;
use shared::pricing::{self, ChatModel};
use shared::prompt::{Screened, screen_message};
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
    stream: bool,
}

/// A question that may be asked.
#[derive(Debug)]
pub(crate) struct Question {
    /// The message, after the tenant's injection policy.
    pub(crate) message: Screened,
    /// The conversation it continues, if any.
    pub(crate) conversation: Option<ConversationId>,
    /// The model's name.
    pub(crate) model_name: String,
    /// The model.
    pub(crate) model: &'static ChatModel,
    /// The longest answer, in tokens.
    pub(crate) max_tokens: u64,
    /// How many passages to retrieve.
    pub(crate) top_k: u32,
    /// Whether the answer comes as events.
    pub(crate) stream: bool,
}

impl Question {
    /// Checks a request's body.
    ///
    /// # Errors
    /// The refusal that the caller is to see; it names the field.
    pub(crate) fn parse(body: &Body, scope: &TenantScope) -> Result<Self, ApiError> {
        if body.message.trim().is_empty() {
            return Err(ApiError::invalid("message", "message is empty"));
        }
        if body.message.len() > MOST_MESSAGE_BYTES {
            let message = format!("message is longer than {MOST_MESSAGE_BYTES} bytes");
            return Err(ApiError::new(Code::TooLarge, message).with_param("message"));
        }
        // A text that cannot be an id is answered like an id that is nobody's.
        let conversation = body.conversation_id.as_ref();
        let conversation = conversation.map(|id| id.parse().map_err(|_| ApiError::not_found()));
        let limits = scope.limits();
        let model_name = body.model.clone().unwrap_or_else(|| limits.default_model.clone());
        let model = pricing::chat_model(&model_name).ok_or_else(|| {
            ApiError::invalid("model", format!("there is no model `{}`", shown(&model_name)))
        })?;
        if !limits.allowed_models.contains(&model_name) {
            let message = format!("this tenant may not use the model `{model_name}`");
            return Err(ApiError::new(Code::ModelNotAllowed, message).with_param("model"));
        }
        let most = model.max_output_tokens.min(MOST_ANSWER_TOKENS).min(limits.max_context_tokens / 2);
        let max_tokens = match body.max_tokens {
            None => DEFAULT_MAX_TOKENS.min(limits.max_context_tokens / 4).min(most),
            Some(n) if (1..=most).contains(&n) => n,
            Some(_) => {
                return Err(ApiError::invalid(
                    "max_tokens",
                    format!("max_tokens must be between 1 and {most}"),
                ));
            }
        };
        // Before anything is spent on it. What the rest of the prompt needs is known, and refused, later.
        let needs = Tokens::estimate(&body.message) + Tokens(max_tokens);
        if needs > Tokens(limits.max_context_tokens) {
            let message = format!(
                "message and answer need about {} tokens; this tenant's context has {}",
                needs.0, limits.max_context_tokens
            );
            return Err(ApiError::new(Code::TooLarge, message).with_param("message"));
        }
        let top_k = match body.top_k {
            None => DEFAULT_TOP_K,
            Some(n) if (1..=MOST_TOP_K).contains(&n) => n,
            Some(_) => {
                return Err(ApiError::invalid("top_k", format!("top_k must be between 1 and {MOST_TOP_K}")));
            }
        };
        let message = screen_message(&body.message, scope.profile().injection_policy).map_err(|refused| {
            ApiError::new(Code::InjectionRefused, refused.to_string()).with_param("message")
        })?;
        Ok(Self {
            message,
            conversation: conversation.transpose()?,
            model_name,
            model,
            max_tokens,
            top_k,
            stream: body.stream,
        })
    }
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
