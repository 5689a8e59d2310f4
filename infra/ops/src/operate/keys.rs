//! `keys`

use std::io::{BufRead, Write};

use http::Method;
use serde_json::{Map, Value};

use super::Console;
use crate::api::{Api, CallError};
use crate::command::{NewKey, put};

pub(super) async fn create<I: BufRead, O: Write, E: Write>(
    api: &Api,
    key: &NewKey,
    console: &mut Console<I, O, E>,
) -> Result<(), CallError> {
    let path = ["admin", "tenants", key.tenant.as_str(), "keys"];
    let reply = api.send(Method::POST, &path, Some(&body(key))).await?;
    console.object_with_key(&reply)
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
