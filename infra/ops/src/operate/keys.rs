//! `keys`

use std::io::{BufRead, Write};

use http::Method;
use serde_json::{Map, Value};
use shared::tenant::TenantId;

use super::Console;
use crate::api::{Api, CallError};
use crate::command::{KeysCommand, NewKey, put};
use crate::table::{Table, field};

fn of(tenant: &TenantId) -> [&str; 4] {
    ["admin", "tenants", tenant.as_str(), "keys"]
}

pub(super) async fn run<I: BufRead, O: Write, E: Write>(
    api: &Api,
    command: KeysCommand,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    match command {
        KeysCommand::Create(key) => {
            let reply = api.send_once(Method::POST, &of(&key.tenant), &body(&key)).await?;
            console.object_with_key(&reply)
        }
        KeysCommand::List { tenant } => list(api, &tenant, console).await,
        KeysCommand::Revoke { tenant, key } => {
            let [admin, tenants, id, keys] = of(&tenant);
            api.send(Method::DELETE, &[admin, tenants, id, keys, key.as_str()], None).await?;
            console.say(&format!("The key {key} of {tenant} is revoked."))
        }
    }
}

async fn list<I: BufRead, O: Write, E: Write>(
    api: &Api,
    tenant: &TenantId,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let keys = api.all(&of(tenant), &[], "keys").await?;
    if console.json {
        return console.list_json("keys", keys);
    }
    let mut table = Table::new(["key", "name", "created", "last used", "expires", "scopes"]);
    for key in &keys {
        table.row(
            ["key_id", "name", "created_at", "last_used_at", "expires_at", "scopes"].map(|n| field(key, n)),
        );
    }
    Ok(table.write(&mut console.out)?)
}

fn body(key: &NewKey) -> Value {
    let mut fields = Map::new();
    put(&mut fields, "name", key.name.clone());
    put(&mut fields, "expires_at", key.expires_at.map(|at| at.to_string()));
    for (name, values) in [("scopes", &key.scopes), ("allowed_cidrs", &key.cidrs)] {
        if !values.is_empty() {
            fields.insert(name.into(), values.clone().into());
        }
    }
    fields.into()
}
