//! `POST /admin/tenants`: a tenant with its collection, its record and its first key.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use shared::api_key::{ApiKey, KeyId, KeyRecord, Permission};
use shared::aws::StoreError;
use shared::error::{ApiError, Code};
use shared::ledger::{Action, Record};
use shared::limits::{LimitChanges, Limits};
use shared::meter::Meter;
use shared::scope::Operator;
use shared::tenant::{InjectionPolicy, InvalidTenantId, ModelAccount, Tenant, TenantId, TenantStatus, Tier};
use shared::web;

use crate::{Context, View};

/// The longest instructions: they travel in the authorizer's context, which API Gateway bounds.
const MOST_INSTRUCTIONS_BYTES: usize = 2_000;
/// The longest name of a company or assistant.
const MOST_NAME_BYTES: usize = 100;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewTenant {
    tenant_id: String,
    tier: Tier,
    company_name: String,
    assistant_name: Option<String>,
    #[serde(default)]
    instructions: String,
    #[serde(default)]
    limits: LimitChanges,
    #[serde(default)]
    injection_policy: InjectionPolicy,
    #[serde(default)]
    model_account: ModelAccount,
    webhook_url: Option<String>,
}

#[derive(Serialize)]
struct Created {
    #[serde(flatten)]
    tenant: View,
    key_id: KeyId,
    /// Shown here once, and stored nowhere.
    api_key: String,
    scopes: Vec<&'static str>,
}

pub(crate) async fn handle(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let tenant = validate(context, web::json(&request)?)?;
    let mut rng = context.entropy;
    let key = ApiKey::issue(tenant.tier, tenant.tenant_id.clone(), &mut rng);
    let record = KeyRecord::new(&key, Permission::ALL.into(), tenant.created_at, None);

    let exists = || ApiError::new(Code::Conflict, format!("tenant `{}` exists already", tenant.tenant_id));
    if context.tenants.get(&operator, &tenant.tenant_id).await?.is_some() {
        return Err(exists());
    }
    if tenant.model_account == ModelAccount::Own {
        let there = context.model_keys.there_is_one_of(&tenant.tenant_id).await.map_err(|error| {
            tracing::error!("{error}");
            ApiError::unavailable("the secret of the tenant's model account")
        })?;
        if !there {
            let name = context.model_keys.name(&tenant.tenant_id);
            let message = format!("there is no secret `{name}` with the key of the tenant's own account");
            return Err(ApiError::invalid("model_account", message));
        }
    }
    // The collection first, and the record with the key last: until the record stands, the tenant does
    // not exist, and whatever stopped the work is mended by asking again.
    make_collection(context, &operator, &tenant).await?;
    let meter = Meter::new(tenant.status, tenant.epoch, tenant.created_at);
    let (id, key_id) = (tenant.tenant_id.clone(), key.key_id().clone());
    let done = Record::operation(&operator, id, Action::TenantProvisioned, Some(key_id), context.clock.now());
    let (meter, done) = ((&context.meters, &meter), (&context.ledger, &done));
    match context.tenants.create(&operator, &tenant, &record, meter, done).await {
        Ok(()) => {}
        // Somebody else was faster; the collection is theirs now.
        Err(StoreError::Conflict) => return Err(exists()),
        Err(error) => return Err(error.into()),
    }
    tracing::info!(tenant.id = %tenant.tenant_id, operator.arn = operator.arn(), "Tenant provisioned");
    let created = Created {
        tenant: tenant.into(),
        key_id: key.key_id().clone(),
        api_key: key.expose(),
        scopes: Permission::ALL.map(Permission::as_str).to_vec(),
    };
    Ok(web::reply(StatusCode::CREATED, &created))
}

async fn make_collection(context: &Context, operator: &Operator, tenant: &Tenant) -> Result<(), ApiError> {
    let made = context.cells.create_collection(
        operator,
        &context.vector_root_key,
        &tenant.cell,
        &tenant.tenant_id,
        &tenant.embedding,
    );
    Ok(made.await?)
}

fn validate(context: &Context, body: NewTenant) -> Result<Tenant, ApiError> {
    let tenant_id: TenantId =
        body.tenant_id.parse().map_err(|e: InvalidTenantId| ApiError::invalid("tenant_id", e.to_string()))?;
    let assistant_name = body.assistant_name.unwrap_or_else(|| "Assistant".to_owned());
    for (param, name) in [("company_name", &body.company_name), ("assistant_name", &assistant_name)] {
        // They stand in the system prompt: one line, and no longer than a name.
        if name.trim().is_empty() || name.len() > MOST_NAME_BYTES || name.chars().any(char::is_control) {
            let message = format!("{param} must be one line of 1 to {MOST_NAME_BYTES} bytes");
            return Err(ApiError::invalid(param, message));
        }
    }
    if body.instructions.len() > MOST_INSTRUCTIONS_BYTES {
        let message = format!("instructions are longer than {MOST_INSTRUCTIONS_BYTES} bytes");
        return Err(ApiError::new(Code::TooLarge, message).with_param("instructions"));
    }
    if let Some(url) = &body.webhook_url
        && !(url.starts_with("https://") && url.len() <= 2_000 && url.parse::<http::Uri>().is_ok())
    {
        return Err(ApiError::invalid(
            "webhook_url",
            "webhook_url must be an https URL of at most 2000 bytes",
        ));
    }
    let limits = Limits::of_tier(body.tier)
        .with(body.limits)
        .map_err(|e| ApiError::invalid(format!("limits.{}", e.field), e.to_string()))?;
    let cell = context.cells.place().ok_or_else(|| ApiError::unavailable("a vector cell"))?;
    Ok(Tenant {
        tenant_id,
        status: TenantStatus::Active,
        epoch: 1,
        tier: body.tier,
        company_name: body.company_name,
        assistant_name,
        instructions: body.instructions,
        injection_policy: body.injection_policy,
        limits,
        cell: cell.to_owned(),
        embedding: context.embedding.clone(),
        model_account: body.model_account,
        webhook_url: body.webhook_url,
        created_at: context.clock.now(),
    })
}
