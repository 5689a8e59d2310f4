//! Table `conversations`: the turns of a tenant's users.

use aws_sdk_dynamodb::types::TransactWriteItem;

use super::session::Access;
use super::table::{Page, StoreError, Table};
use crate::clock::Timestamp;
use crate::conversation::{MOST_TURNS, Turn};
use crate::ids::ConversationId;
use crate::item_key;
use crate::scope::TenantScope;
use crate::sealing::DataKey;

/// What of a turn its tenant's key seals: what users and the model have written, and titles.
const TEXT: [&str; 3] = ["question", "answer", "citations"];

/// The table.
#[derive(Clone, Debug)]
pub struct ConversationStore(Table);

impl ConversationStore {
    /// The table of that name.
    pub fn new(access: &Access, table: String) -> Self {
        Self(Table::new(access, table))
    }

    /// The latest turns of a conversation of the scope's tenant and user, newest first; none if there
    /// is no such conversation, it is another user's, or all of it is past its retention.
    ///
    /// # Errors
    /// If the table does not answer or an item does not parse.
    pub async fn history(
        &self,
        scope: &TenantScope,
        conversation: &ConversationId,
        now: Timestamp,
    ) -> Result<Vec<Turn>, StoreError> {
        let page = Page {
            prefix: &item_key::turns(conversation),
            newest_first: true,
            limit: i32::try_from(MOST_TURNS).unwrap_or(i32::MAX),
            after: None,
        };
        let (items, _) = self.0.items(scope, page).await?;
        let mut turns: Vec<Turn> = self.0.opened(scope, items).await?;
        turns.retain(|turn| turn.user_id.as_ref() == scope.user_id() && turn.is_kept(scope.limits(), now));
        Ok(turns)
    }

    /// The part of a transaction that adds a turn, sealed where the tenant has a key of its own. It must carry
    /// the scope's tenant.
    pub(super) fn new_part(
        &self,
        scope: &TenantScope,
        turn: &Turn,
        seal: Option<&DataKey>,
    ) -> Result<TransactWriteItem, StoreError> {
        scope.owns(turn.tenant_id.as_str(), "conversations").map_err(|_| StoreError::Conflict)?;
        let sort = item_key::turn(&turn.conversation_id, turn.asked_at, &turn.id);
        self.0.put_new(self.0.sealed_item(scope, turn, &sort, &TEXT, seal)?)
    }
}
