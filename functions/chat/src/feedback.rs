//! `POST /v1/feedback`: what a user says that an answer is worth. Once for each answer.

use http::{Response, StatusCode};
use lambda_http::Request;
use serde::{Deserialize, Serialize};
use shared::aws::conversations::Rated;
use shared::conversation::{Feedback, Given, Rating};
use shared::error::{ApiError, Code};
use shared::idempotency::{IdempotencyKey, Stored};
use shared::ids::MessageId;
use shared::ledger::Record;
use shared::scope::TenantScope;
use shared::web;

use crate::{ChatBody, Context};

/// The longest comment, in characters.
const MOST_COMMENT_CHARS: usize = 4_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    id: String,
    rating: Rating,
    comment: Option<String>,
}

#[derive(Serialize)]
struct View<'a> {
    id: &'a MessageId,
    #[serde(flatten)]
    feedback: &'a Feedback,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<ChatBody>, ApiError> {
    let Body { id, rating, comment } = web::json(&request)?;
    if comment.as_ref().is_some_and(|comment| comment.chars().count() > MOST_COMMENT_CHARS) {
        let message = format!("comment is longer than {MOST_COMMENT_CHARS} characters");
        return Err(ApiError::new(Code::TooLarge, message).with_param("comment"));
    }
    // A text that cannot be an id is answered like an id that is nobody's.
    let id: MessageId = id.parse().map_err(|_| ApiError::not_found())?;
    let feedback = Feedback { rating, comment: comment.filter(|comment| !comment.trim().is_empty()) };
    let key = web::idempotency_key(&request, scope)?;
    let ends_at_s = web::ends_at_s(&request);
    let first = context.gate.first_result(scope, &context.idempotency, key.as_ref(), ends_at_s).await?;
    if let Some(stored) = first {
        return Ok(web::repeated(stored));
    }
    let kept = keep(context, scope, &id, &feedback, key.as_ref()).await;
    if kept.is_err() {
        context.idempotency.give_back(scope, key.as_ref()).await;
    }
    kept.map(web::repeated)
}

async fn keep(
    context: &Context,
    scope: &mut TenantScope,
    id: &MessageId,
    feedback: &Feedback,
    key: Option<&IdempotencyKey>,
) -> Result<Stored, ApiError> {
    context.gate.admit_read(scope).await?;
    let seal = context.data_keys.of(scope).await?;
    let now = context.clock.now();
    let body = serde_json::to_string(&View { id, feedback }).map_err(|error| {
        tracing::error!("Feedback does not serialise: {error}");
        ApiError::unavailable("the answer")
    })?;
    let stored = Stored { status: StatusCode::CREATED.as_u16(), body };
    let given = context.conversations.given(scope, id, now).await?.ok_or_else(ApiError::not_found)?;
    if let Some(before) = &given.feedback {
        return same(before, feedback, stored);
    }
    let Given { model, .. } = &given;
    let record = Record::rated(scope, id, model.clone(), feedback.rating, now);
    let noted = (&context.ledger, &record);
    let finished = key.map(|key| context.idempotency.finished(key, &stored, now));
    match context.conversations.rate(scope, &given, feedback, noted, finished, seal.as_deref()).await? {
        Rated::Yes => Ok(stored),
        Rated::No => {
            // Somebody was quicker, or it is gone.
            let given = context.conversations.given(scope, id, now).await?.ok_or_else(ApiError::not_found)?;
            same(&given.feedback.ok_or_else(ApiError::not_found)?, feedback, stored)
        }
        Rated::Superseded => Err(ApiError::superseded()),
    }
}

/// What was said before stands: the same again is answered alike, and anything else is refused.
fn same(before: &Feedback, now: &Feedback, stored: Stored) -> Result<Stored, ApiError> {
    if before == now {
        return Ok(stored);
    }
    Err(ApiError::new(Code::Conflict, "this answer has its rating already").with_param("id"))
}
