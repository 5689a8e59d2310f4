//! `PATCH /admin/tenants/{id}`: what is named changes, everything else stays.
//!
//! The record first, an epoch later, and then the meter: from its next admission on, every request of the
//! tenant is decided by the new record. If the work stops in between, the same request again mends it,
//! since the meter is always brought up to the record, whether or not the record had to change.

use std::collections::BTreeSet;
use std::time::Duration;

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use rand::RngExt;
use serde::Deserialize;
use shared::aws::StoreError;
use shared::error::{ApiError, Code};
use shared::ledger::{Action, Record};
use shared::limits::{LimitChanges, LimitEdits, named};
use shared::scope::Operator;
use shared::tenant::{InjectionPolicy, ModelAccount, Tenant, TenantId, TenantStatus, Tier};
use shared::web;
use tokio::time::timeout_at;

use crate::attempt::{Attempt, check_cell};
use crate::{Context, View, being_deleted, not_reached, profile};

/// How often a change is made anew upon what others have changed meanwhile. Each round, one of them is done.
const ROUNDS: u32 = 12;

/// What a tenant can be made by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Switch {
    Active,
    Suspended,
}

/// `null` takes a webhook's address, a KMS key or a limit back; for what cannot be nothing, it is refused.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Changes {
    #[serde(default, deserialize_with = "named")]
    status: Option<Switch>,
    #[serde(default, deserialize_with = "named")]
    tier: Option<Tier>,
    #[serde(default, deserialize_with = "named")]
    limits: Option<LimitEdits>,
    #[serde(default, deserialize_with = "named")]
    company_name: Option<String>,
    #[serde(default, deserialize_with = "named")]
    assistant_name: Option<String>,
    #[serde(default, deserialize_with = "named")]
    instructions: Option<String>,
    #[serde(default, deserialize_with = "named")]
    injection_policy: Option<InjectionPolicy>,
    #[serde(default, deserialize_with = "named")]
    model_account: Option<ModelAccount>,
    #[serde(default, deserialize_with = "named")]
    kms_key_arn: Option<Option<String>>,
    #[serde(default, deserialize_with = "named")]
    webhook_url: Option<Option<String>>,
    #[serde(default, deserialize_with = "named")]
    cell: Option<String>,
}

pub(crate) async fn handle(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let id: TenantId = web::path_id(&request, "id")?;
    let changes: Changes = web::json(&request)?;
    changes.check()?;
    check_cell(context, changes.cell.as_deref())?;
    let was = context.tenants.get(&operator, &id).await?.ok_or_else(ApiError::not_found)?;
    if was.status == TenantStatus::Deprovisioning {
        return Err(being_deleted(&id));
    }
    let tenant = match &changes.cell {
        Some(cell) if *cell != was.cell => move_to(context, &operator, &id, &changes, cell).await?,
        _ => in_place(context, &operator, was, &changes).await?,
    };
    Ok(web::reply(StatusCode::OK, &View::from(tenant)))
}

/// Changes a record; one that somebody else changes at the same time is changed upon that.
async fn in_place(
    context: &Context,
    operator: &Operator,
    mut was: Tenant,
    changes: &Changes,
) -> Result<Tenant, ApiError> {
    for _ in 0..ROUNDS {
        let Changed { tenant, fields } = changes.applied(&was)?;
        if fields.contains("model_account") {
            profile::check_model_account(context, tenant.model_account, &tenant.tenant_id).await?;
        }
        if fields.contains("kms_key_arn") {
            profile::check_kms_key(context, operator, tenant.kms_key_arn.as_ref(), &tenant.tenant_id).await?;
        }
        if fields.is_empty() {
            reach(context, operator, &was).await?;
            let id = was.tenant_id.clone();
            let record = Record::operation(operator, id, Action::TenantRead, None, context.clock.now());
            context.ledger.note(&record).await?;
            return Ok(was);
        }
        let record = record(context, operator, &was, &tenant, fields);
        match context.tenants.change(operator, &was, &tenant, (&context.ledger, &record)).await {
            Ok(()) => {
                reach(context, operator, &tenant).await?;
                return Ok(tenant);
            }
            // Somebody else was faster; or it was done, and the answer was lost.
            Err(StoreError::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
        let wait = context.entropy.clone().random_range(0..50);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        was = context.tenants.get(operator, &was.tenant_id).await?.ok_or_else(ApiError::not_found)?;
    }
    Err(StoreError::Conflict.into())
}

/// Moves a tenant without passages to another cell, and changes what else is named along with it. It must
/// be switched off and have nothing in flight: then nobody writes where it was while it is made elsewhere.
async fn move_to(
    context: &Context,
    operator: &Operator,
    id: &TenantId,
    changes: &Changes,
    cell: &str,
) -> Result<Tenant, ApiError> {
    let mut attempt = Attempt::begin(context, operator, id).await?;
    let until = attempt.works_until();
    let moved = timeout_at(until, remake(context, operator, &mut attempt, id, changes, cell)).await;
    let tenant = attempt.conclude(moved).await?;
    reach(context, operator, &tenant).await?;
    attempt.finish().await;
    Ok(tenant)
}

async fn remake(
    context: &Context,
    operator: &Operator,
    attempt: &mut Attempt<'_>,
    id: &TenantId,
    changes: &Changes,
    cell: &str,
) -> Result<Tenant, ApiError> {
    let was = context.tenants.get(operator, id).await?.ok_or_else(ApiError::not_found)?;
    let Changed { mut tenant, mut fields } = changes.applied(&was)?;
    if fields.contains("model_account") {
        profile::check_model_account(context, tenant.model_account, id).await?;
    }
    if fields.contains("kms_key_arn") {
        profile::check_kms_key(context, operator, tenant.kms_key_arn.as_ref(), id).await?;
    }
    let refused = |message: String| ApiError::new(Code::Conflict, message).with_param("cell");
    let full = |passages: u64| {
        let from = &was.cell;
        refused(format!(
            "the tenant has {passages} passages in cell `{from}`, which a move would leave behind"
        ))
    };
    let passages = attempt.passages(&was.cell).await?;
    if passages > 0 {
        return Err(full(passages));
    }
    let meter = context.meters.read(&operator.ward(id.clone())).await?;
    let at_rest = was.status == TenantStatus::Suspended
        && meter.status == TenantStatus::Suspended
        && meter.leases.is_empty();
    if !at_rest {
        return Err(refused(
            "a tenant moves while it is suspended and has nothing in flight: suspend it, wait, move it"
                .into(),
        ));
    }
    // Again, now that nobody can add any.
    let passages = attempt.passages(&was.cell).await?;
    if passages > 0 {
        return Err(full(passages));
    }
    tenant.cell = attempt.house(Some(cell), &tenant.embedding).await?;
    tenant.epoch = was.epoch + 1;
    fields.insert("cell".to_owned());
    let record = record(context, operator, &was, &tenant, fields);
    attempt.relocate(&was, &tenant, &record).await?;
    Ok(tenant)
}

/// Lets a record reach the tenant's next admission.
async fn reach(context: &Context, operator: &Operator, tenant: &Tenant) -> Result<(), ApiError> {
    let ward = operator.ward(tenant.tenant_id.clone());
    context.meters.set_standing(&ward, tenant.status, tenant.epoch).await.map_err(not_reached)
}

fn record(
    context: &Context,
    operator: &Operator,
    was: &Tenant,
    tenant: &Tenant,
    fields: BTreeSet<String>,
) -> Record {
    let action = match (was.status, tenant.status) {
        (before, after) if before == after => Action::TenantChanged,
        (_, TenantStatus::Suspended) => Action::TenantSuspended,
        _ => Action::TenantRestored,
    };
    tracing::info!(
        tenant.id = %tenant.tenant_id,
        operator.arn = operator.arn(),
        epoch = tenant.epoch,
        "Tenant changes: {action:?}"
    );
    let mut record = Record::operation(operator, tenant.tenant_id.clone(), action, None, context.clock.now());
    record.changed = fields.into_iter().collect();
    record
}

/// A record as it is to become, and the names of what differs. Where nothing does, the epoch stays.
#[derive(Debug)]
struct Changed {
    tenant: Tenant,
    fields: BTreeSet<String>,
}

impl Changes {
    /// What can be said of them without the tenant.
    fn check(&self) -> Result<(), ApiError> {
        let Self { status, tier, limits, company_name, assistant_name, .. } = self;
        let Self { instructions, injection_policy, model_account, kms_key_arn, webhook_url, cell, .. } = self;
        let nothing = status.is_none()
            && tier.is_none()
            && limits.is_none()
            && company_name.is_none()
            && assistant_name.is_none()
            && instructions.is_none()
            && injection_policy.is_none()
            && model_account.is_none()
            && kms_key_arn.is_none()
            && webhook_url.is_none()
            && cell.is_none();
        if nothing {
            return Err(ApiError::invalid("body", "the body names nothing to change"));
        }
        if let Some(name) = company_name {
            profile::check_name("company_name", name)?;
        }
        if let Some(name) = assistant_name {
            profile::check_name("assistant_name", name)?;
        }
        if let Some(text) = instructions {
            profile::check_instructions(text)?;
        }
        profile::kms_key_arn(kms_key_arn.clone().flatten())?;
        profile::check_webhook_url(webhook_url.as_ref().and_then(Option::as_deref))
    }

    /// The record with these changes made. The cell is not among them: see [`move_to`].
    fn applied(&self, was: &Tenant) -> Result<Changed, ApiError> {
        if !matches!(was.status, TenantStatus::Active | TenantStatus::Suspended) {
            let message = "the tenant is neither active nor suspended, and is not changed by hand";
            return Err(ApiError::new(Code::Conflict, message).with_param("status"));
        }
        let mut tenant = was.clone();
        let mut fields = BTreeSet::new();
        let status = self.status.map(|switch| match switch {
            Switch::Active => TenantStatus::Active,
            Switch::Suspended => TenantStatus::Suspended,
        });
        set("status", &mut tenant.status, status, &mut fields);
        set("tier", &mut tenant.tier, self.tier, &mut fields);
        set("company_name", &mut tenant.company_name, self.company_name.clone(), &mut fields);
        set("assistant_name", &mut tenant.assistant_name, self.assistant_name.clone(), &mut fields);
        set("instructions", &mut tenant.instructions, self.instructions.clone(), &mut fields);
        set("injection_policy", &mut tenant.injection_policy, self.injection_policy, &mut fields);
        set("model_account", &mut tenant.model_account, self.model_account, &mut fields);
        let kms_key_arn = self.kms_key_arn.clone().map(profile::kms_key_arn).transpose()?;
        set("kms_key_arn", &mut tenant.kms_key_arn, kms_key_arn, &mut fields);
        profile::check_kms_tier(tenant.tier, tenant.kms_key_arn.as_ref())?;
        set("webhook_url", &mut tenant.webhook_url, self.webhook_url.clone(), &mut fields);
        // Limits that nobody spoke of stay what they are, whatever has become of the tiers meanwhile.
        if self.limits.is_some() || fields.contains("tier") {
            tenant.overrides = was.overrides.clone().edited(self.limits.clone().unwrap_or_default());
            tenant.limits = profile::limits(tenant.tier, tenant.overrides.clone())?;
            fields.extend(differing(&was.overrides, &tenant.overrides));
            if fields.is_empty() && tenant.limits != was.limits {
                fields.insert("limits".to_owned());
            }
        }
        tenant.epoch = was.epoch + u64::from(!fields.is_empty());
        Ok(Changed { tenant, fields })
    }
}

fn set<T: PartialEq>(name: &str, held: &mut T, change: Option<T>, fields: &mut BTreeSet<String>) {
    if let Some(value) = change.filter(|value| value != held) {
        *held = value;
        fields.insert(name.to_owned());
    }
}

/// The names of the limits that are set otherwise than before.
fn differing(was: &LimitChanges, now: &LimitChanges) -> BTreeSet<String> {
    let named = |changes: &LimitChanges| match serde_json::to_value(changes) {
        Ok(serde_json::Value::Object(limits)) => limits,
        _ => serde_json::Map::new(),
    };
    let (was, now) = (named(was), named(now));
    let names = was.keys().chain(now.keys()).filter(|name| was.get(*name) != now.get(*name));
    names.map(|name| format!("limits.{name}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use shared::clock::Timestamp;
    use shared::limits::Limits;
    use shared::tenant::EmbeddingModel;

    fn tenant() -> Tenant {
        let overrides = LimitChanges { tokens_per_day: Some(5), ..LimitChanges::default() };
        Tenant {
            tenant_id: "acme".parse().unwrap(),
            status: TenantStatus::Active,
            epoch: 3,
            tier: Tier::Free,
            company_name: "Acme".into(),
            assistant_name: "Ada".into(),
            instructions: String::new(),
            injection_policy: InjectionPolicy::Flag,
            limits: Limits::of_tier(Tier::Free).with(overrides.clone()).unwrap(),
            overrides,
            cell: "default".into(),
            embedding: EmbeddingModel { name: "m".into(), dimensions: 4 },
            model_account: ModelAccount::Shared,
            kms_key_arn: None,
            webhook_url: Some("https://a.example".into()),
            created_at: Timestamp::from_millis(0),
        }
    }

    const KEY: &str = "arn:aws:kms:us-east-1:000000000000:key/1b2c3d4e-0000-4000-8000-000000000000";

    fn applied(body: Value) -> Result<(Tenant, Vec<String>), ApiError> {
        let changes: Changes = web::value(body)?;
        changes.check()?;
        let Changed { tenant, fields } = changes.applied(&tenant())?;
        Ok((tenant, fields.into_iter().collect()))
    }

    #[test]
    fn what_is_named_changes_and_nothing_else() {
        let (now, fields) = applied(json!({"status": "suspended", "company_name": "Acme"})).unwrap();
        assert_eq!(fields, ["status"]);
        assert_eq!(now, Tenant { status: TenantStatus::Suspended, epoch: 4, ..tenant() });
        let (now, fields) = applied(json!({"webhook_url": null, "instructions": "Be brief."})).unwrap();
        assert_eq!(fields, ["instructions", "webhook_url"]);
        assert_eq!((now.webhook_url, now.epoch), (None, 4));
    }

    #[test]
    fn the_same_again_changes_nothing() {
        let same = json!({"status": "active", "tier": "free", "limits": {"tokens_per_day": 5}});
        assert_eq!(applied(same).unwrap(), (tenant(), Vec::new()));
    }

    #[test]
    fn a_tiers_limits_move_with_it_and_what_was_set_stays() {
        let (now, fields) = applied(json!({"tier": "enterprise"})).unwrap();
        assert_eq!(fields, ["tier"]);
        let enterprise = Limits::of_tier(Tier::Enterprise);
        assert_eq!(now.limits, Limits { tokens_per_day: 5, ..enterprise.clone() });
        let both = json!({"tier": "enterprise", "limits": {"tokens_per_day": null, "max_concurrent": 7}});
        let (now, fields) = applied(both).unwrap();
        assert_eq!(fields, ["limits.max_concurrent", "limits.tokens_per_day", "tier"]);
        assert_eq!(now.limits, Limits { max_concurrent: 7, ..enterprise });
    }

    #[test]
    fn a_kms_key_comes_and_goes_with_the_tier() {
        let (with, fields) = applied(json!({"tier": "enterprise", "kms_key_arn": KEY})).unwrap();
        assert_eq!(fields, ["kms_key_arn", "tier"]);
        assert_eq!(with.kms_key_arn.as_ref().unwrap().as_str(), KEY);
        let change = |body: Value| web::value::<Changes>(body).unwrap().applied(&with);
        let lower = change(json!({"tier": "professional"})).unwrap_err();
        assert_eq!(lower.param.as_deref(), Some("kms_key_arn"));
        let both = change(json!({"tier": "professional", "kms_key_arn": null})).unwrap();
        assert_eq!(both.tenant.kms_key_arn, None);
        assert!(change(json!({"kms_key_arn": KEY})).unwrap().fields.is_empty());
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (body, param) in [
            (json!({}), "body"),
            (json!({"status": "provisioning"}), "status"),
            (json!({"status": null}), "status"),
            (json!({"tier": null}), "tier"),
            (json!({"limits": null}), "limits"),
            (json!({"limits": {"tokens": 1}}), "limits.tokens"),
            (json!({"limits": {"max_concurrent": 201}}), "limits.max_concurrent"),
            (json!({"limits": {"max_concurrent": 1.5}}), "limits.max_concurrent"),
            (json!({"limits": {"allowed_models": []}}), "limits.allowed_models"),
            (json!({"limits": {"default_model": "claude-opus-4-6"}}), "limits.default_model"),
            (json!({"company_name": " "}), "company_name"),
            (json!({"webhook_url": "http://a.example"}), "webhook_url"),
            (json!({"kms_key_arn": "alias/acme"}), "kms_key_arn"),
            (json!({"kms_key_arn": KEY}), "kms_key_arn"),
            (json!({"kms_key_arn": KEY, "tier": "professional"}), "kms_key_arn"),
            (json!({"tenant_id": "globex"}), "tenant_id"),
            (json!({"epoch": 9}), "epoch"),
        ] {
            let error = applied(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn a_tenant_in_between_is_not_changed_by_hand() {
        let changes: Changes = web::value(json!({"status": "active"})).unwrap();
        let was = Tenant { status: TenantStatus::Provisioning, ..tenant() };
        assert_eq!(changes.applied(&was).unwrap_err().code, Code::Conflict);
    }
}
