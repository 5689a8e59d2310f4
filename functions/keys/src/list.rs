//! `GET /v1/keys`: what keys there are, never their secrets.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::Serialize;
use shared::api_key::{KeyId, KeyRecord, Permission};
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::network::Network;
use shared::scope::TenantScope;
use shared::web;

use crate::Context;

/// A key as its tenant sees it.
#[derive(Serialize)]
struct View {
    key_id: KeyId,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    scopes: Vec<&'static str>,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_used_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allowed_cidrs: Option<Vec<Network>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replaces: Option<KeyId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replaced_by: Option<KeyId>,
}

impl From<KeyRecord> for View {
    fn from(record: KeyRecord) -> Self {
        Self {
            key_id: record.key_id,
            name: record.name,
            scopes: record.permissions.into_iter().map(Permission::as_str).collect(),
            created_at: record.created_at.to_string(),
            expires_at: record.expires_at.map(|at| at.to_string()),
            last_used_at: record.last_used_at.map(|at| at.to_string()),
            allowed_cidrs: record.allowed_cidrs,
            replaces: record.replaces,
            replaced_by: record.replaced_by,
        }
    }
}

#[derive(Serialize)]
struct List {
    keys: Vec<View>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<KeyId>,
}

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    request: Request,
) -> Result<Response<Body>, ApiError> {
    let limit = web::page_size(&request)?;
    let after: Option<String> = web::query(&request, "cursor")?;
    context.gate.admit_read(scope).await?;
    let (keys, cursor) = context.keys.list(scope, limit, after.as_deref()).await?;
    let ids = keys.iter().map(|key| key.key_id.clone()).collect();
    let note = Record::event(scope, Action::KeysListed, Vec::new(), context.clock.now()).about(ids);
    context.ledger.note(&note).await?;
    Ok(web::reply(StatusCode::OK, &List { keys: keys.into_iter().map(View::from).collect(), cursor }))
}
