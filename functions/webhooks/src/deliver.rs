//! Trying to deliver a message.

use shared::aws::StoreError;
use shared::ledger::Record;
use shared::scope::Ward;
use shared::secret::Secret;
use shared::webhook::{self, Message, SigningKey, State};

use crate::Context;
use crate::receiver::Answer;

/// What became of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Became {
    /// The receiver has the message.
    Delivered,
    /// It is tried again.
    Failed,
    /// It is not tried again.
    Ended,
    /// It has been tried for its whole time.
    GivenUp,
    /// Somebody else is at it.
    Others,
    /// The stores did not answer. It is tried again.
    Unread,
    /// There was no time.
    Left,
}

/// Tries to deliver one message to its tenant's receiver, as it is named now.
pub(crate) async fn deliver(context: &Context, roots: &[Secret], message: Message) -> Became {
    let ward = context.bookkeeper.of(message.tenant_id.clone());
    match try_once(context, roots, &ward, &message).await {
        Ok(became) => became,
        Err(error) => {
            tracing::error!(
                tenant.id = %message.tenant_id,
                error = &error as &dyn std::error::Error,
                "The stores do not say what became of a message; it is tried again"
            );
            Became::Unread
        }
    }
}

async fn try_once(
    context: &Context,
    roots: &[Secret],
    ward: &Ward,
    message: &Message,
) -> Result<Became, StoreError> {
    let now = context.clock.now();
    let next = message.next_try(now, &mut context.entropy.clone());
    // The last try is begun like any other: one that dies at it is found again, and given up then.
    let over = now.millis_since(message.time) >= webhook::TRIED_FOR_MS;
    let until = next.unwrap_or_else(|| now.plus_millis(60_000));
    let Some(message) = context.messages.begin(ward, message, until).await? else {
        return Ok(Became::Others);
    };
    if over {
        return give_up(context, ward, &message, message.last_error.as_deref().unwrap_or("unknown")).await;
    }
    let Some(tenant) = context.tenants.of(ward).await? else {
        context.messages.end(ward, &message, State::Dropped, Some("the tenant is gone")).await?;
        return Ok(Became::Ended);
    };
    let Some(url) = &tenant.webhook_url else {
        context.messages.end(ward, &message, State::Dropped, Some("no address is named")).await?;
        return Ok(Became::Ended);
    };
    let keys: Vec<SigningKey> = roots.iter().map(|root| SigningKey::of(root, &tenant)).collect();
    let body = message.body();
    let signature = webhook::signature(&keys, &body, context.clock.now());
    match context.sender.send(url, body, signature).await {
        Answer::Taken => {
            // The ledger first: if it does not answer, the message is delivered again, and both are on record.
            record(context, &message, true).await?;
            context.messages.end(ward, &message, State::Delivered, None).await?;
            Ok(Became::Delivered)
        }
        Answer::Unwanted => {
            record(context, &message, false).await?;
            context.messages.end(ward, &message, State::Unwanted, Some("HTTP 410")).await?;
            tracing::info!(tenant.id = %message.tenant_id, "A tenant's receiver wants no message (HTTP 410)");
            Ok(Became::Ended)
        }
        Answer::Failed(error) if next.is_some() => {
            context.messages.failed(ward, &message, &error).await?;
            tracing::warn!(
                tenant.id = %message.tenant_id,
                attempts = message.attempts,
                "A tenant's receiver did not take a message: {error}"
            );
            Ok(Became::Failed)
        }
        Answer::Failed(error) => give_up(context, ward, &message, &error).await,
    }
}

async fn give_up(
    context: &Context,
    ward: &Ward,
    message: &Message,
    error: &str,
) -> Result<Became, StoreError> {
    record(context, message, false).await?;
    context.messages.end(ward, message, State::GivenUp, Some(error)).await?;
    // Its receiver's doing, and nothing that operators are woken for.
    tracing::warn!(
        tenant.id = %message.tenant_id,
        attempts = message.attempts,
        "A tenant could not be told of its budget for a day: {error}"
    );
    Ok(Became::GivenUp)
}

async fn record(context: &Context, message: &Message, delivered: bool) -> Result<(), StoreError> {
    let (tenant_id, limit) = (message.tenant_id.clone(), message.period.limit());
    let record = Record::webhook(tenant_id, &message.id, limit, delivered, context.clock.now());
    context.ledger.note(&record).await
}
