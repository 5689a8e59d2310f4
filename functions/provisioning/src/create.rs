//! `POST /admin/tenants`: a tenant with its collection, its record and its first key.
//!
//! The claim first, then the collection, and then in one transaction the record, the key, the meter, the
//! ledger's record and the end of the claim. So there is a tenant with all that it needs or there is none,
//! whatever stops; who asks again finds out which. The key is shown to nobody twice: an answer that was
//! lost is mended with another key, not with a repeat, so this route knows no `Idempotency-Key`.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::{Deserialize, Serialize};
use shared::api_key::{ApiKey, KeyId, KeyRecord, Permission};
use shared::audit_log::tenant_prefix;
use shared::aws::StoreError;
use shared::deprovisioning::Tombstone;
use shared::error::{ApiError, Code};
use shared::ledger::{Action, Record};
use shared::limits::LimitChanges;
use shared::meter::Meter;
use shared::scope::Operator;
use shared::tenant::{InjectionPolicy, InvalidTenantId, ModelAccount, Tenant, TenantId, TenantStatus, Tier};
use shared::web;
use tokio::time::timeout_at;

use crate::attempt::{Attempt, check_cell};
use crate::{Context, View, profile};

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
    kms_key_arn: Option<String>,
    webhook_url: Option<String>,
    cell: Option<String>,
    /// Says that the id of a deleted tenant is meant to be used again.
    #[serde(default)]
    reuse_deleted_id: bool,
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
    let body: NewTenant = web::json(&request)?;
    let reuse = body.reuse_deleted_id;
    let (mut tenant, named) = validate(context, body)?;
    check_cell(context, named.as_deref())?;
    if context.tenants.get(&operator, &tenant.tenant_id).await?.is_some() {
        return Err(exists(&tenant.tenant_id));
    }
    let former = context.tenants.tombstone(&operator, &tenant.tenant_id).await?;
    if let Some(former) = &former {
        check_reuse(context, &operator, former, reuse).await?;
        // No decision about a key of the former tenant is as late, and no ticket is given twice.
        tenant.epoch = former.last_epoch + 1;
    }
    profile::check_model_account(context, tenant.model_account, &tenant.tenant_id).await?;
    profile::check_kms_key(context, &operator, tenant.kms_key_arn.as_ref(), &tenant.tenant_id).await?;

    let mut rng = context.entropy;
    let key = ApiKey::issue(tenant.tier, tenant.tenant_id.clone(), &mut rng);
    let mut attempt = Attempt::begin(context, &operator, &tenant.tenant_id).await?;
    let until = attempt.works_until();
    let work = make(context, &operator, &mut attempt, &mut tenant, named.as_deref(), (&key, former.as_ref()));
    let made = timeout_at(until, work).await;
    attempt.conclude(made).await?;
    tracing::info!(tenant.id = %tenant.tenant_id, operator.arn = operator.arn(), "Tenant provisioned");
    let created = Created {
        tenant: tenant.into(),
        key_id: key.key_id().clone(),
        api_key: key.expose(),
        scopes: Permission::ALL.map(Permission::as_str).to_vec(),
    };
    Ok(web::reply(StatusCode::CREATED, &created))
}

async fn make(
    context: &Context,
    operator: &Operator,
    attempt: &mut Attempt<'_>,
    tenant: &mut Tenant,
    named: Option<&str>,
    (key, former): (&ApiKey, Option<&Tombstone>),
) -> Result<(), ApiError> {
    // Again, now that nobody else can make it.
    if context.tenants.get(operator, &tenant.tenant_id).await?.is_some() {
        return Err(exists(&tenant.tenant_id));
    }
    tenant.cell = attempt.house(named, &tenant.embedding).await?;
    enter(context, operator, attempt, tenant, (key, former)).await
}

/// Enters the tenant: from here on it exists, or it does not and never will by this attempt.
async fn enter(
    context: &Context,
    operator: &Operator,
    attempt: &mut Attempt<'_>,
    tenant: &Tenant,
    (key, former): (&ApiKey, Option<&Tombstone>),
) -> Result<(), ApiError> {
    let record = KeyRecord::new(key, Permission::ALL.into(), tenant.created_at, None);
    let mut meter = Meter::new(tenant.status, tenant.epoch, tenant.created_at);
    meter.seq = former.map_or(0, |former| former.last_ticket.0);
    let (id, key_id, now) = (tenant.tenant_id.clone(), key.key_id().clone(), context.clock.now());
    let done = Record::operation(operator, id, Action::TenantProvisioned, Some(key_id), now);
    let (meter, done) = ((&context.meters, &meter), (&context.ledger, &done));
    let entered =
        context.tenants.create(operator, &attempt.claim, (tenant, former), &record, meter, done).await;
    let Err(error) = entered else { return Ok(()) };
    let mut rng = context.entropy;
    match context.tenants.withdraw(&mut attempt.claim, &mut rng).await {
        Ok(()) if matches!(error, StoreError::Conflict) => Err(exists(&tenant.tenant_id)),
        Ok(()) => Err(error.into()),
        // It was done, and only the answer was lost; or somebody else has the claim.
        Err(StoreError::Conflict) => match context.tenants.claimed_by(key).await?.key {
            Some(_) => Ok(()),
            None => Err(error.into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// An id that was a tenant's is given again only to who says so, and only once nothing is kept under it that
/// the new tenant could take for its own, or be charged for: records of the audit log, and bills.
async fn check_reuse(
    context: &Context,
    operator: &Operator,
    former: &Tombstone,
    reuse: bool,
) -> Result<(), ApiError> {
    let Tombstone { tenant_id, deleted_at, deprovisioning_id, .. } = former;
    if !reuse {
        let message = format!(
            "tenant `{tenant_id}` was deleted at {deleted_at} ({deprovisioning_id}); its id is used again only \
             where `reuse_deleted_id` says so"
        );
        return Err(ApiError::new(Code::Conflict, message).with_param("tenant_id"));
    }
    let (ward, prefix) = (operator.ward(tenant_id.clone()), tenant_prefix(tenant_id));
    let (objects, _) = context.audit_objects.page(&ward, &prefix, None).await.map_err(|error| {
        tracing::error!("{error}");
        ApiError::unavailable("the audit log")
    })?;
    let kept = !objects.is_empty()
        || context.kept.any(operator, tenant_id).await?
        || context.deprovisionings.open_of(operator, tenant_id).await?.is_some();
    if kept {
        let message = format!(
            "records of the former tenant `{tenant_id}` are kept under this id; the receipt of \
             {deprovisioning_id} says until when. Choose another id"
        );
        return Err(ApiError::new(Code::Conflict, message).with_param("reuse_deleted_id"));
    }
    Ok(())
}

fn exists(id: &TenantId) -> ApiError {
    ApiError::new(
        Code::Conflict,
        format!("tenant `{id}` exists already; if the answer with its key was lost, make it another key"),
    )
}

/// The tenant that is wanted, but for its cell, and the cell that is named.
fn validate(context: &Context, body: NewTenant) -> Result<(Tenant, Option<String>), ApiError> {
    let tenant_id: TenantId =
        body.tenant_id.parse().map_err(|e: InvalidTenantId| ApiError::invalid("tenant_id", e.to_string()))?;
    let assistant_name = body.assistant_name.unwrap_or_else(|| "Assistant".to_owned());
    profile::check_name("company_name", &body.company_name)?;
    profile::check_name("assistant_name", &assistant_name)?;
    profile::check_instructions(&body.instructions)?;
    profile::check_webhook_url(body.webhook_url.as_deref())?;
    let kms_key_arn = profile::kms_key_arn(body.kms_key_arn)?;
    profile::check_kms_tier(body.tier, kms_key_arn.as_ref())?;
    let tenant = Tenant {
        tenant_id,
        status: TenantStatus::Active,
        epoch: 1,
        tier: body.tier,
        company_name: body.company_name,
        assistant_name,
        instructions: body.instructions,
        injection_policy: body.injection_policy,
        limits: profile::limits(body.tier, body.limits.clone())?,
        overrides: body.limits,
        cell: String::new(),
        embedding: context.embedding.clone(),
        model_account: body.model_account,
        kms_key_arn,
        webhook_url: body.webhook_url,
        created_at: context.clock.now(),
    };
    Ok((tenant, body.cell))
}
