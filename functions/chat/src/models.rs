//! `GET /v1/models`: the models that the tenant may ask for, as OpenAI's clients list them.

use http::{Response, StatusCode};
use lambda_http::Request;
use serde_json::json;
use shared::error::ApiError;
use shared::ledger::Action;
use shared::pricing;
use shared::scope::TenantScope;
use shared::web;

use crate::{ChatBody, Context};

pub(crate) async fn handle(
    context: &Context,
    scope: &mut TenantScope,
    _request: Request,
) -> Result<Response<ChatBody>, ApiError> {
    context.gate.admit_read(scope).await?;
    context.gate.note(scope, Action::ModelsListed, Vec::new()).await?;
    let model = |name: &String| {
        let created = pricing::chat_model(name)?.since_s();
        Some(json!({"id": name, "object": "model", "created": created, "owned_by": "anthropic"}))
    };
    let models: Vec<_> = scope.limits().allowed_models.iter().filter_map(model).collect();
    Ok(web::reply(StatusCode::OK, &json!({"object": "list", "data": models})))
}
