//! `tenants`

use std::io::{BufRead, Write};

use http::Method;
use serde_json::{Map, Value};
use shared::tenant::TenantId;

use super::{Console, deprovisioning};
use crate::api::{Api, CallError};
use crate::command::{Create, Set, TenantsCommand, name, put};
use crate::table::{Table, field};

const TENANTS: [&str; 2] = ["admin", "tenants"];

fn of(tenant: &TenantId) -> [&str; 3] {
    ["admin", "tenants", tenant.as_str()]
}

pub(super) async fn run<I: BufRead, O: Write, E: Write>(
    api: &Api,
    command: TenantsCommand,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    match command {
        TenantsCommand::List => list(api, console).await,
        TenantsCommand::Show { tenant } => console.object(&api.get(&of(&tenant), &[]).await?),
        TenantsCommand::Create(create) => {
            let reply = api.send(Method::POST, &TENANTS, Some(&creation(&create))).await?;
            console.object_with_key(&reply)
        }
        TenantsCommand::Set(set) => change(api, &set.tenant, changes(&set), console).await,
        TenantsCommand::Suspend { tenant } => change(api, &tenant, status("suspended"), console).await,
        TenantsCommand::Restore { tenant } => change(api, &tenant, status("active"), console).await,
        TenantsCommand::WebhookSecret { tenant } => {
            let path = ["admin", "tenants", tenant.as_str(), "webhook-secret"];
            console.object(&api.get(&path, &[]).await?)
        }
        TenantsCommand::Delete { tenant, yes, watch } => {
            if !yes {
                confirm(&tenant, console)?;
            }
            delete(api, &tenant, watch, console).await
        }
    }
}

async fn list<I: BufRead, O: Write, E: Write>(
    api: &Api,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let tenants = api.all(&TENANTS, &[], "tenants").await?;
    if console.json {
        return console.list_json("tenants", tenants);
    }
    let mut table = Table::new(["tenant", "tier", "status", "cell", "created", "company"]);
    for tenant in &tenants {
        table.row(
            ["tenant_id", "tier", "status", "cell", "created_at", "company_name"].map(|n| field(tenant, n)),
        );
    }
    Ok(table.write(&mut console.out)?)
}

fn creation(create: &Create) -> Value {
    let mut fields = create.profile.fields();
    put(&mut fields, "tenant_id", Some(create.tenant.to_string()));
    put(&mut fields, "tier", Some(name(create.tier)));
    put(&mut fields, "company_name", Some(create.company_name.clone()));
    put(&mut fields, "webhook_url", create.webhook_url.clone());
    if create.reuse_deleted_id {
        fields.insert("reuse_deleted_id".into(), true.into());
    }
    put(&mut fields, "kms_key_arn", create.kms_key_arn.clone());
    fields.into()
}

fn changes(set: &Set) -> Value {
    let mut fields = set.profile.fields();
    put(&mut fields, "tier", set.tier.map(name));
    put(&mut fields, "company_name", set.company_name.clone());
    put(&mut fields, "webhook_url", set.webhook_url.clone());
    if set.no_webhook {
        fields.insert("webhook_url".into(), Value::Null);
    }
    put(&mut fields, "kms_key_arn", set.kms_key_arn.clone());
    if set.no_kms_key {
        fields.insert("kms_key_arn".into(), Value::Null);
    }
    fields.into()
}

fn status(status: &str) -> Value {
    let mut fields = Map::new();
    put(&mut fields, "status", Some(status.to_owned()));
    fields.into()
}

async fn change<I: BufRead, O: Write, E: Write>(
    api: &Api,
    tenant: &TenantId,
    changes: Value,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let reply = api.send(Method::PATCH, &of(tenant), Some(&changes)).await?;
    console.object(&reply)
}

/// Has the id typed again: what follows cannot be taken back.
fn confirm<I: BufRead, O: Write, E: Write>(
    tenant: &TenantId,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    console.say(&format!(
        "This deletes {tenant} for good: its documents, passages, conversations, keys and secrets."
    ))?;
    let typed = console.ask("Type its id again:")?;
    if typed == tenant.as_str() { Ok(()) } else { Err(CallError::Unconfirmed(typed)) }
}

async fn delete<I: BufRead, O: Write, E: Write>(
    api: &Api,
    tenant: &TenantId,
    watch: bool,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let reply = api.send(Method::DELETE, &of(tenant), None).await?;
    if !watch {
        return console.object(&reply);
    }
    let begun = reply.object()?;
    let id = begun.get("deprovisioning_id").and_then(Value::as_str);
    let id = id.ok_or_else(|| reply.strange("a deletion without `deprovisioning_id`"))?;
    // It goes on without us, and is found again by this.
    console.say(&format!("Deprovisioning {id}"))?;
    deprovisioning::watch(api, id, console).await
}
