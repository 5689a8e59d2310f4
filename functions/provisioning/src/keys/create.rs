//! `POST /admin/tenants/{id}/keys`: a key for a tenant that has lost its own, or never had the right one.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use shared::api_key::{ApiKey, Grants, KeyRecord, MOST_KEYS};
use shared::aws::keys::{Added, Addition};
use shared::error::{ApiError, Code};
use shared::ledger::{Action, Record};
use shared::new_key::{CreatedKey, NewKey};
use shared::tenant::{TenantId, TenantStatus};
use shared::web;

use crate::{Context, being_deleted};

/// How often a key is made again on a tenant's record that has moved on meanwhile.
const ROUNDS: u32 = 4;

pub(crate) async fn handle(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let id: TenantId = web::path_id(&request, "id")?;
    let body: NewKey = web::json(&request)?;
    let once = web::operators_idempotency_key(&request, &operator)?;
    for _ in 0..ROUNDS {
        let tenant = context.tenants.get(&operator, &id).await?.ok_or_else(ApiError::not_found)?;
        if tenant.status == TenantStatus::Deprovisioning {
            return Err(being_deleted(&id));
        }
        let now = context.clock.now();
        let (name, grants) = body.clone().granted(&Grants::all(), now)?;
        let mut rng = context.entropy;
        let key = ApiKey::issue(tenant.tier, id.clone(), &mut rng);
        let record = KeyRecord::granted(&key, grants, name, now);
        let key_id = key.key_id().clone();
        let done = Record::operation(&operator, id.clone(), Action::KeyCreated, Some(key_id.clone()), now)
            .about(vec![key_id]);
        let addition = Addition {
            key: &record,
            epoch: tenant.epoch,
            replaces: None,
            note: (&context.ledger, &done),
            finished: None,
            once: once.as_ref(),
        };
        let ward = operator.ward(id.clone());
        match Box::pin(context.keys.add(&ward, &addition)).await? {
            Added::Yes => {
                tracing::info!(tenant.id = %id, key.made = %key.key_id(), operator.arn = operator.arn(), "Key made");
                return Ok(web::reply(StatusCode::CREATED, &CreatedKey::new(&key, record)));
            }
            Added::Full => {
                let message = format!("the tenant has {MOST_KEYS} keys, which is the most");
                return Err(ApiError::new(Code::Conflict, message));
            }
            Added::Before(made) => {
                let message = format!(
                    "this request has made the key `{made}` already; its secret was shown once and is kept \
                     nowhere. If the answer was lost, revoke that key and make another"
                );
                return Err(ApiError::new(Code::Conflict, message).with_param("Idempotency-Key"));
            }
            Added::Stale | Added::Nothing | Added::Replaced | Added::Superseded => {}
        }
    }
    Err(ApiError::unavailable("the tenant's present state"))
}
