//! Conversations: turns, each a question and its answer; and what users say that answers are worth.

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::ids::{ConversationId, DocumentId, MessageId, UserId};
use crate::limits::Limits;
use crate::pricing::Usage;
use crate::tenant::TenantId;
use crate::units::{NanoUsd, Tokens};

/// The most turns that are read back of a conversation; the prompt's token budget cuts earlier.
pub const MOST_TURNS: usize = 50;
/// The longest title, in characters.
const MOST_TITLE_CHARS: usize = 80;

/// A passage that an answer cites. It was retrieved for that very request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Citation {
    /// The passage.
    pub chunk_id: String,
    /// Its document.
    pub document_id: DocumentId,
    /// The document's title.
    pub title: String,
    /// Where the document came from, as the tenant said; empty if it did not.
    pub source: String,
}

/// Something that was asked, and what was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// What was asked.
    pub question: String,
    /// What was answered.
    pub answer: String,
}

impl From<Turn> for Exchange {
    fn from(turn: Turn) -> Self {
        Self { question: turn.question, answer: turn.answer }
    }
}

/// A conversation as it is listed: an item of table `conversations`. What was said is in its turns; this says
/// whose they are and how they began. It enters with the first turn, and each further one moves it on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversation {
    /// The tenant.
    pub tenant_id: TenantId,
    /// The conversation.
    pub id: ConversationId,
    /// The tenant's user whose it is; none if the tenant names no users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    /// What it is about: how its first question begins.
    pub title: String,
    /// When its first question was asked.
    pub begun_at: Timestamp,
    /// When its last question was asked.
    pub updated_at: Timestamp,
    /// Whether it is being deleted: then it is as if it were not, and no turn is added.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleting: bool,
    /// When it is gone, as of a turn: that of its last.
    pub expires_at_s: i64,
}

impl Conversation {
    /// The conversation that begins with that turn.
    pub fn begun_by(turn: &Turn) -> Self {
        Self {
            tenant_id: turn.tenant_id.clone(),
            id: turn.conversation_id.clone(),
            user_id: turn.user_id.clone(),
            title: title(&turn.question),
            begun_at: turn.begun_at,
            updated_at: turn.asked_at,
            deleting: false,
            expires_at_s: turn.expires_at_s,
        }
    }

    /// Whether it may still be shown.
    pub fn is_kept(&self, limits: &Limits, now: Timestamp) -> bool {
        let retained = self.expires_at_s > now.as_seconds() && self.updated_at > limits.retained_since(now);
        retained && !self.deleting
    }
}

/// How a question begins, in one line.
fn title(question: &str) -> String {
    let mut title = String::new();
    for word in question.split_whitespace() {
        let room = MOST_TITLE_CHARS.saturating_sub(title.chars().count() + usize::from(!title.is_empty()));
        if word.chars().count() > room {
            if title.is_empty() {
                title.extend(word.chars().take(room.saturating_sub(1)));
            }
            title.push('…');
            break;
        }
        if !title.is_empty() {
            title.push(' ');
        }
        title.push_str(word);
    }
    title
}

/// What a user says that an answer is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rating {
    /// It helped.
    Up,
    /// It did not.
    Down,
}

/// What a user has said of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feedback {
    /// What it is worth.
    pub rating: Rating,
    /// Why, in the user's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

/// An answer that was given, as its user may come back to it by its id alone: an item of table
/// `conversations`. It holds nothing that was said but what its user has said of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// The tenant.
    pub tenant_id: TenantId,
    /// The answer.
    pub id: MessageId,
    /// The tenant's user to whom it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    /// The conversation whose turn it is, if it is one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversation_id: Option<ConversationId>,
    /// When it was asked for.
    pub asked_at: Timestamp,
    /// The model that was asked.
    pub model: String,
    /// What the user has said of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feedback: Option<Feedback>,
    /// When it is gone, as of a turn.
    pub expires_at_s: i64,
}

impl Given {
    /// Whether it may still be shown, as a turn's is.
    pub fn is_kept(&self, limits: &Limits, now: Timestamp) -> bool {
        self.expires_at_s > now.as_seconds() && self.asked_at > limits.retained_since(now)
    }
}

/// One turn: an item of table `conversations`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// The tenant.
    pub tenant_id: TenantId,
    /// The conversation.
    pub conversation_id: ConversationId,
    /// The answer.
    pub id: MessageId,
    /// The tenant's user whose conversation it is; none if the tenant names no users.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    /// When the conversation's first question was asked: of the first turn, when this was.
    pub begun_at: Timestamp,
    /// When it was asked. Each turn is later than the first.
    pub asked_at: Timestamp,
    /// What was asked, after the tenant's injection policy.
    pub question: String,
    /// What was answered.
    pub answer: String,
    /// What the answer cites.
    pub citations: Vec<Citation>,
    /// The model that was asked.
    pub model: String,
    /// What the model used.
    pub usage: Usage,
    /// What embedding the question used.
    pub embedding_tokens: Tokens,
    /// What it all cost.
    pub cost_nano_usd: NanoUsd,
    /// How long it took, in milliseconds.
    pub latency_ms: u64,
    /// The injection patterns that were found, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub injection: Vec<String>,
    /// The hash of the request's idempotency key, under which the answer is kept once more for repeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency: Option<String>,
    /// What the user has said of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feedback: Option<Feedback>,
    /// When it is gone: seconds since the epoch, for DynamoDB's TTL (the template names the attribute).
    /// Readers look at it too, because TTL deletes days late; and at the limit as it is now.
    pub expires_at_s: i64,
}

impl Turn {
    /// Whether it may still be shown: within the retention of the day it was written, and within that of
    /// today.
    pub fn is_kept(&self, limits: &Limits, now: Timestamp) -> bool {
        self.expires_at_s > now.as_seconds() && self.asked_at > limits.retained_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_is_the_beginning_of_a_question_in_one_line() {
        assert_eq!(title(" How many\n\tdays? "), "How many days?");
        assert_eq!(title(""), "");
        let words = title(&"word ".repeat(40));
        assert_eq!(words, format!("{}…", "word ".repeat(16).trim_end()));
        let one = title(&"ü".repeat(500));
        assert_eq!(one.chars().count(), MOST_TITLE_CHARS);
    }
}
