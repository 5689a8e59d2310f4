//! Conversations: turns, each a question and its answer.

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::ids::{ConversationId, DocumentId, MessageId, UserId};
use crate::limits::Limits;
use crate::pricing::Usage;
use crate::tenant::TenantId;
use crate::units::{NanoUsd, Tokens};

/// The most turns that are read back of a conversation; the prompt's token budget cuts earlier.
pub const MOST_TURNS: usize = 50;

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

/// One turn: an item of table `conversations`. A conversation is the turns that share its id; it has
/// no item of its own, so a turn is written without touching anything that another might write.
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
    /// When it was asked.
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
