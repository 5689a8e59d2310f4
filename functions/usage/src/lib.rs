//! What was used and what it cost: `GET /v1/usage` for a tenant, `GET /admin/usage` for operators.

mod view;

use http::{Method, Response, StatusCode, header};
use lambda_http::{Body, Error, Request};
use serde::Serialize;
use shared::api_key::Permission;
use shared::aws::meters::MeterStore;
use shared::aws::tenants::TenantStore;
use shared::aws::usage::UsageStore;
use shared::aws::{self, StoreError};
use shared::clock::Clock;
use shared::error::ApiError;
use shared::gate::Gate;
use shared::ledger::Action;
use shared::limits::Limits;
use shared::meter::{BillingMonth, Meter};
use shared::scope::{Subject, TenantScope};
use shared::tenant::{TenantId, TenantStatus};
use shared::usage::Bill;
use shared::{env, web};

use view::View;

/// What the function works with.
pub struct Context {
    gate: Gate,
    meters: MeterStore,
    tenants: TenantStore,
    usage: UsageStore,
    clock: Clock,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let access = aws::Access::from_env(&aws::config()?)?;
        let clock = Clock::system();
        Ok(Self {
            gate: Gate::from_env(&access, clock.clone())?,
            meters: MeterStore::new(&access, env::table("METERS_TABLE")?),
            tenants: TenantStore::new(&access, env::table("TENANTS_TABLE")?),
            usage: UsageStore::new(&access, env::table("USAGE_TABLE")?),
            clock,
        })
    }
}

impl Context {
    /// Writes down what is still only remembered: the process is about to end.
    pub async fn close(&self) {
        self.gate.close().await;
    }
}

/// Answers one request.
pub async fn handle(context: &Context, request: Request) -> Response<Body> {
    web::handle(request, &context.clock, async |request| match (request.method(), web::route(&request)) {
        (&Method::GET, "/v1/usage") => own(context, request).await,
        (&Method::GET, "/admin/usage") => all(context, request).await,
        _ => Err(ApiError::not_found()),
    })
    .await
}

async fn own(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let run = async |mut scope: TenantScope| {
        let month = month(context, &request)?;
        context.gate.admit_read(&mut scope).await?;
        let view = one(context, &scope, scope.limits(), month).await?;
        context.gate.note(&scope, Action::UsageRead, Vec::new()).await?;
        Ok(view)
    };
    let view = context.gate.enter(web::caller(&request)?, Permission::UsageRead, run).await?;
    Ok(if wants_csv(&request) { csv(&[view]) } else { web::reply(StatusCode::OK, &view) })
}

#[derive(Serialize)]
struct All {
    usage: Vec<View>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<TenantId>,
}

async fn all(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let month = month(context, &request)?;
    let limit = web::page_size(&request)?;
    let after: Option<String> = web::query(&request, "cursor")?;
    let (tenants, cursor) = context.tenants.list(&operator, limit.into(), after.as_deref()).await?;
    let mut usage = Vec::with_capacity(tenants.len());
    for tenant in tenants {
        let ward = operator.ward(tenant.tenant_id);
        let meter = match context.meters.read(&ward).await {
            // One that is being deleted may have lost its meter already.
            Err(StoreError::Missing { .. }) if tenant.status == TenantStatus::Deprovisioning => {
                Meter::new(tenant.status, tenant.epoch, context.clock.now())
            }
            read => read?,
        };
        let bill = context.usage.month(&ward, month).await?;
        usage.push(view(context, &ward, &tenant.limits, (month, &bill), &meter));
    }
    if !wants_csv(&request) {
        return Ok(web::reply(StatusCode::OK, &All { usage, cursor }));
    }
    let mut response = csv(&usage);
    // A table has no place for a cursor.
    if let Some(cursor) = cursor.and_then(|id| id.as_str().parse().ok()) {
        response.headers_mut().insert("x-next-cursor", cursor);
    }
    Ok(response)
}

/// One tenant's month, and where it stands now.
async fn one(
    context: &Context,
    subject: &impl Subject,
    limits: &Limits,
    month: BillingMonth,
) -> Result<View, ApiError> {
    let (bill, meter) = tokio::try_join!(context.usage.month(subject, month), context.meters.read(subject))?;
    Ok(view(context, subject, limits, (month, &bill), &meter))
}

fn view(
    context: &Context,
    subject: &impl Subject,
    limits: &Limits,
    (month, bill): (BillingMonth, &Bill),
    meter: &Meter,
) -> View {
    let standing = meter.standing(limits, context.clock.now());
    View::new(subject.tenant_id().clone(), month, bill, limits, &standing)
}

fn month(context: &Context, request: &Request) -> Result<BillingMonth, ApiError> {
    let month = web::query(request, "month")?;
    Ok(month.unwrap_or_else(|| BillingMonth::of(context.clock.now().as_seconds())))
}

fn wants_csv(request: &Request) -> bool {
    let accept = request.headers().get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.split(',').any(|part| part.trim().starts_with("text/csv")))
}

fn csv(views: &[View]) -> Response<Body> {
    let mut text = String::from(view::CSV_HEADER);
    views.iter().for_each(|view| view.write_csv(&mut text));
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static("text/csv; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, http::HeaderValue::from_static("no-store"));
    response
}
