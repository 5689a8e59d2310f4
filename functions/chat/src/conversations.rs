//! `GET /v1/conversations`, `GET` and `DELETE /v1/conversations/{id}`: a user's own, and nobody else's.

use http::{Response, StatusCode};
use lambda_http::Request;
use serde::Serialize;
use shared::conversation::{Citation, Conversation, Feedback, Turn};
use shared::error::ApiError;
use shared::ids::{ConversationId, MessageId, UserId};
use shared::ledger::{Action, Record};
use shared::pricing::Usage;
use shared::scope::TenantScope;
use shared::units::{NanoUsd, Tokens};
use shared::web;

use crate::{ChatBody, Context};

/// The most passages that one record names.
const MOST_NAMED: usize = 100;

/// A conversation as callers see it.
#[derive(Debug, Serialize)]
struct View {
    id: ConversationId,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<UserId>,
    title: String,
    created_at: String,
    updated_at: String,
}

impl From<Conversation> for View {
    fn from(conversation: Conversation) -> Self {
        Self {
            id: conversation.id,
            user: conversation.user_id,
            title: conversation.title,
            created_at: conversation.begun_at.to_string(),
            updated_at: conversation.updated_at.to_string(),
        }
    }
}

/// A turn as callers see it.
#[derive(Debug, Serialize)]
struct TurnView {
    id: MessageId,
    created_at: String,
    message: String,
    response: String,
    model: String,
    citations: Vec<Citation>,
    usage: UsageView,
    latency_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    feedback: Option<Feedback>,
}

#[derive(Debug, Serialize)]
struct UsageView {
    #[serde(flatten)]
    model: Usage,
    embedding_tokens: Tokens,
    cost_nano_usd: NanoUsd,
}

impl From<Turn> for TurnView {
    fn from(turn: Turn) -> Self {
        Self {
            id: turn.id,
            created_at: turn.asked_at.to_string(),
            message: turn.question,
            response: turn.answer,
            model: turn.model,
            citations: turn.citations,
            usage: UsageView {
                model: turn.usage,
                embedding_tokens: turn.embedding_tokens,
                cost_nano_usd: turn.cost_nano_usd,
            },
            latency_ms: turn.latency_ms,
            feedback: turn.feedback,
        }
    }
}

#[derive(Serialize)]
struct List {
    conversations: Vec<View>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

#[derive(Serialize)]
struct Whole {
    #[serde(flatten)]
    conversation: View,
    turns: Vec<TurnView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

pub(crate) async fn list(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<ChatBody>, ApiError> {
    let limit = web::page_size(&request)?;
    let after: Option<String> = web::query(&request, "cursor")?;
    if let Some(user) = web::query(&request, "user")? {
        scope.speak_for(user).map_err(|error| ApiError::from(error).with_param("user"))?;
    }
    context.gate.admit_read(scope).await?;
    let (conversations, cursor) =
        context.conversations.list(scope, limit, after.as_deref(), context.clock.now()).await?;
    context.gate.note(scope, Action::ConversationsListed, Vec::new()).await?;
    let conversations = conversations.into_iter().map(View::from).collect();
    Ok(web::reply(StatusCode::OK, &List { conversations, cursor }))
}

pub(crate) async fn one(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<ChatBody>, ApiError> {
    let id: ConversationId = web::path_id(&request, "id")?;
    let limit = web::page_size(&request)?;
    let after: Option<String> = web::query(&request, "cursor")?;
    context.gate.admit_read(scope).await?;
    let now = context.clock.now();
    let read = context.conversations.read(scope, &id, limit, after.as_deref(), now).await?;
    let (conversation, turns, cursor) = read.ok_or_else(ApiError::not_found)?;
    // Who was shown a passage is asked of the log: those that answers cite are shown again.
    let mut cited: Vec<_> = turns.iter().flat_map(|turn| &turn.citations).collect();
    cited.sort_unstable_by_key(|citation| &citation.chunk_id);
    cited.dedup_by_key(|citation| &citation.chunk_id);
    let mut named = cited.chunks(MOST_NAMED);
    let mut next = named.next();
    loop {
        let cited = next.unwrap_or_default();
        let chunks = cited.iter().map(|citation| citation.chunk_id.clone()).collect();
        let mut documents: Vec<_> = cited.iter().map(|citation| citation.document_id.clone()).collect();
        documents.sort_unstable();
        documents.dedup();
        context.ledger.note(&Record::shown_again(scope, &id, documents, chunks, now)).await?;
        next = named.next();
        if next.is_none() {
            break;
        }
    }
    let turns = turns.into_iter().map(TurnView::from).collect();
    Ok(web::reply(StatusCode::OK, &Whole { conversation: conversation.into(), turns, cursor }))
}

pub(crate) async fn delete(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<ChatBody>, ApiError> {
    let id: ConversationId = web::path_id(&request, "id")?;
    context.gate.admit_read(scope).await?;
    let now = context.clock.now();
    let record = Record::conversation_deleted(scope, &id, now);
    if !context.conversations.delete(scope, &id, &context.ledger, &record, now).await? {
        return Err(ApiError::not_found());
    }
    let mut response = Response::new(ChatBody::Whole(None));
    *response.status_mut() = StatusCode::NO_CONTENT;
    Ok(response)
}
