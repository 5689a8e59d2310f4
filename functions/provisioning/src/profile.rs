//! What a tenant's record may say of its assistant and its accounts, whether it is made or changed.

use shared::aws::data_keys::DataKeyError;
use shared::error::{ApiError, Code};
use shared::limits::{InvalidLimit, LimitChanges, Limits};
use shared::scope::Operator;
use shared::sealing::{InvalidKmsKeyArn, KmsKeyArn};
use shared::tenant::{ModelAccount, TenantId, Tier};

use crate::Context;

/// The longest instructions: they travel in the authorizer's context, which API Gateway bounds.
const MOST_INSTRUCTIONS_BYTES: usize = 2_000;
/// The longest name of a company or assistant.
const MOST_NAME_BYTES: usize = 100;
/// The longest address.
const MOST_URL_BYTES: usize = 2_000;

/// Names stand in the system prompt: one line, and no longer than a name.
pub(crate) fn check_name(param: &'static str, name: &str) -> Result<(), ApiError> {
    if name.trim().is_empty() || name.len() > MOST_NAME_BYTES || name.chars().any(char::is_control) {
        let message = format!("{param} must be one line of 1 to {MOST_NAME_BYTES} bytes");
        return Err(ApiError::invalid(param, message));
    }
    Ok(())
}

pub(crate) fn check_instructions(instructions: &str) -> Result<(), ApiError> {
    if instructions.len() > MOST_INSTRUCTIONS_BYTES {
        let message = format!("instructions are longer than {MOST_INSTRUCTIONS_BYTES} bytes");
        return Err(ApiError::new(Code::TooLarge, message).with_param("instructions"));
    }
    Ok(())
}

pub(crate) fn check_webhook_url(url: Option<&str>) -> Result<(), ApiError> {
    let fits = |url: &str| {
        url.starts_with("https://") && url.len() <= MOST_URL_BYTES && url.parse::<http::Uri>().is_ok()
    };
    if url.is_none_or(fits) {
        return Ok(());
    }
    let message = format!("webhook_url must be an https URL of at most {MOST_URL_BYTES} bytes");
    Err(ApiError::invalid("webhook_url", message))
}

/// The limits of a tier with an operator's changes to them.
pub(crate) fn limits(tier: Tier, overrides: LimitChanges) -> Result<Limits, ApiError> {
    let invalid = |e: InvalidLimit| ApiError::invalid(format!("limits.{}", e.field), e.to_string());
    Limits::of_tier(tier).with(overrides).map_err(invalid)
}

/// A tenant with an account of its own has a secret with the account's key, made by its operator.
pub(crate) async fn check_model_account(
    context: &Context,
    account: ModelAccount,
    tenant: &TenantId,
) -> Result<(), ApiError> {
    if account == ModelAccount::Shared {
        return Ok(());
    }
    let there = context.model_keys.there_is_one_of(tenant).await.map_err(|error| {
        tracing::error!("{error}");
        ApiError::unavailable("the secret of the tenant's model account")
    })?;
    if there {
        return Ok(());
    }
    let name = context.model_keys.name(tenant);
    let message = format!("there is no secret `{name}` with the key of the tenant's own account");
    Err(ApiError::invalid("model_account", message))
}

/// The ARN that a body gives.
pub(crate) fn kms_key_arn(arn: Option<String>) -> Result<Option<KmsKeyArn>, ApiError> {
    let invalid = |e: InvalidKmsKeyArn| ApiError::invalid("kms_key_arn", format!("kms_key_arn: {e}"));
    arn.map(|arn| arn.parse().map_err(invalid)).transpose()
}

/// A key of its own comes with the tier, and does not stay without it.
pub(crate) fn check_kms_tier(tier: Tier, arn: Option<&KmsKeyArn>) -> Result<(), ApiError> {
    if arn.is_none() || tier == Tier::Enterprise {
        return Ok(());
    }
    let message = "only tenants of the tier enterprise have a KMS key of their own; take it away with null";
    Err(ApiError::invalid("kms_key_arn", message))
}

/// A key that a tenant is to have is tried: with one that cannot be used, nothing could be stored.
pub(crate) async fn check_kms_key(
    context: &Context,
    operator: &Operator,
    arn: Option<&KmsKeyArn>,
    tenant: &TenantId,
) -> Result<(), ApiError> {
    let Some(arn) = arn else { return Ok(()) };
    match Box::pin(context.data_keys.try_key(operator, tenant, arn)).await {
        Ok(()) => Ok(()),
        Err(DataKeyError::Refused { code, .. }) => {
            let message = format!("the KMS key `{arn}` cannot be used by this deployment: {code}");
            Err(ApiError::invalid("kms_key_arn", message))
        }
        Err(error) => {
            tracing::error!("A tenant's KMS key could not be tried: {error}");
            Err(ApiError::unavailable("the tenant's key service"))
        }
    }
}
