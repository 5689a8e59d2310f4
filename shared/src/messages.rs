//! The request of Anthropic's Messages API, as far as a prompt needs it.
//!
//! <https://platform.claude.com/docs/en/api/messages>

use serde::{Deserialize, Serialize};

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MessagesRequest {
    /// The model.
    pub model: String,
    /// The most tokens of the answer.
    pub max_tokens: u64,
    /// The system prompt.
    pub system: Vec<ContentBlock>,
    /// The conversation, ending with the user's message.
    pub messages: Vec<Message>,
    /// Whether the answer comes as events.
    pub stream: bool,
}

/// Who says something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Role {
    User,
    Assistant,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: Vec<ContentBlock>,
}

/// A part of a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentBlock {
    /// Text.
    Text {
        /// The text.
        text: String,
        /// Whether everything up to here may be cached.
        #[serde(skip_serializing_if = "Option::is_none")]
        cache_control: Option<CacheControl>,
    },
    /// A passage that may be cited: the provider keeps it apart from what anybody says.
    SearchResult {
        /// Where it is from.
        source: String,
        /// The title of its document.
        title: String,
        /// Its text.
        content: Vec<ContentBlock>,
        /// Whether it may be cited.
        citations: Citations,
    },
}

impl ContentBlock {
    /// A block of text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text { text: text.into(), cache_control: None }
    }
}

/// A cache breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CacheControl {
    /// Kept for five minutes after its last use.
    Ephemeral,
}

/// Whether a passage may be cited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Citations {
    /// Whether it may.
    pub enabled: bool,
}
