//! `DELETE /admin/tenants/{id}` and `GET /admin/deprovisionings/{id}`.

use http::{Method, Response, StatusCode};
use lambda_http::{Body, Error, Request};
use serde::Serialize;
use shared::aws;
use shared::aws::StoreError;
use shared::aws::deprovisionings::Deprovisionings;
use shared::aws::ledger::Ledger;
use shared::aws::meters::MeterStore;
use shared::aws::tenants::TenantStore;
use shared::clock::{Clock, Timestamp};
use shared::deprovisioning::{Counts, DeprovisioningId, Progress, Receipt, Saga, Step, StepState};
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::random::{Entropy, entropy};
use shared::scope::Operator;
use shared::tenant::{TenantId, TenantStatus};
use shared::{env, web};

/// How often a tenant's record is read again because others change it.
const ATTEMPTS: u32 = 5;

/// What the function works with.
pub struct Context {
    tenants: TenantStore,
    meters: MeterStore,
    ledger: Ledger,
    deprovisionings: Deprovisionings,
    clock: Clock,
    entropy: Entropy,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config()?;
        let access = aws::Access::own(&config);
        let tenants = env::table("TENANTS_TABLE")?;
        Ok(Self {
            tenants: TenantStore::new(&access, tenants.clone()),
            deprovisionings: Deprovisionings::new(&access, tenants),
            meters: MeterStore::new(&access, env::table("METERS_TABLE")?),
            ledger: Ledger::new(&access, env::table("AUDIT_TABLE")?),
            clock: Clock::system(),
            entropy: entropy(),
        })
    }
}

/// Answers one request.
pub async fn handle(context: &Context, request: Request) -> Response<Body> {
    web::handle(request, &context.clock, async |request| match (request.method(), web::route(&request)) {
        (&Method::DELETE, "/admin/tenants/{id}") => begin(context, request).await,
        (&Method::GET, "/admin/deprovisionings/{id}") => show(context, request).await,
        _ => Err(ApiError::not_found()),
    })
    .await
}

#[derive(Serialize)]
struct Begun {
    deprovisioning_id: DeprovisioningId,
}

async fn begin(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let id: TenantId = web::path_id(&request, "id")?;
    let deprovisioning_id = begun(context, &operator, &id).await?;
    Ok(web::reply(StatusCode::ACCEPTED, &Begun { deprovisioning_id }))
}

/// The tenant's deprovisioning: begun now, begun before, or over.
async fn begun(context: &Context, operator: &Operator, id: &TenantId) -> Result<DeprovisioningId, ApiError> {
    for _ in 0..ATTEMPTS {
        // In this order: what is over left the list after its tombstone was there.
        if let Some(open) = context.deprovisionings.open_of(operator, id).await? {
            let saga = context.deprovisionings.get(operator, &open).await?.ok_or_else(ApiError::not_found)?;
            disable(context, operator, &saga).await?;
            return Ok(open);
        }
        let Some(tenant) = context.tenants.get(operator, id).await? else {
            let tombstone = context.tenants.tombstone(operator, id).await?;
            return Ok(tombstone.ok_or_else(ApiError::not_found)?.deprovisioning_id);
        };
        let now = context.clock.now();
        let saga = Saga::new(
            DeprovisioningId::new(id.clone(), &mut context.entropy.clone()),
            (operator.arn().to_owned(), operator.request_id().clone()),
            (tenant.cell.clone(), tenant.epoch + 1),
            now,
        );
        let record = Record::operation(operator, id.clone(), Action::TenantDeprovisioned, None, now);
        match context.deprovisionings.start(operator, &tenant, &saga, (&context.ledger, &record)).await {
            Ok(()) => {
                tracing::info!(
                    tenant.id = %id,
                    operator.arn = operator.arn(),
                    deprovisioning.id = %saga.id,
                    "Deprovisioning begun"
                );
                disable(context, operator, &saga).await?;
                return Ok(saga.id);
            }
            // It changed meanwhile, or somebody else has begun.
            Err(StoreError::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(StoreError::Conflict.into())
}

/// Lets the next admission know. The saga's first step does it again, so a failure here delays it only.
async fn disable(context: &Context, operator: &Operator, saga: &Saga) -> Result<(), ApiError> {
    let ward = operator.ward(saga.tenant_id.clone());
    match context.meters.set_standing(&ward, TenantStatus::Deprovisioning, saga.epoch).await {
        // The meter is gone: nothing is admitted without it.
        Ok(()) | Err(StoreError::Missing { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A deprovisioning as operators see it.
#[derive(Serialize)]
struct View {
    deprovisioning_id: DeprovisioningId,
    tenant_id: TenantId,
    status: &'static str,
    started_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    watched_until: Option<String>,
    steps: Vec<StepView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<Receipt>,
}

#[derive(Serialize)]
struct StepView {
    step: Step,
    state: StepState,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_at: Option<String>,
    #[serde(skip_serializing_if = "Counts::is_empty")]
    deleted: Counts,
}

impl From<Saga> for View {
    fn from(saga: Saga) -> Self {
        let text = |at: Timestamp| at.to_string();
        let step = |progress: Progress| StepView {
            step: progress.step,
            state: progress.state,
            started_at: progress.started_at.map(text),
            ended_at: progress.ended_at.map(text),
            deleted: progress.deleted,
        };
        Self {
            deprovisioning_id: saga.id,
            tenant_id: saga.tenant_id,
            status: if saga.receipt.is_some() { "completed" } else { "running" },
            started_at: text(saga.started_at),
            completed_at: saga.receipt.as_ref().map(|receipt| text(receipt.verified_at)),
            watched_until: saga.watched_until.map(text),
            steps: saga.steps.into_iter().map(step).collect(),
            receipt: saga.receipt,
        }
    }
}

async fn show(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let id: DeprovisioningId = web::path_id(&request, "id")?;
    let saga = context.deprovisionings.get(&operator, &id).await?.ok_or_else(ApiError::not_found)?;
    Ok(web::reply(StatusCode::OK, &View::from(saga)))
}
