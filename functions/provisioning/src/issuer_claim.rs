//! `/admin/issuer-claim`: whose the tokens of an issuer for an audience are, and an operator's word that they are
//! nobody's any more.
//!
//! Whoever registers a pair of names first has it, and no tenant can take it away. So if it was the wrong
//! tenant, or one that will not need it again, it takes an operator.

use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::Serialize;
use shared::aws::issuers::Claim;
use shared::error::{ApiError, Code};
use shared::ids::IssuerId;
use shared::issuer::{LONGEST_NAME, Provenance};
use shared::ledger::{Action, Record};
use shared::tenant::{TenantId, TenantStatus};
use shared::web;

use crate::{Context, being_deleted};

/// A claim as operators see it.
#[derive(Serialize)]
struct View<'a> {
    issuer: &'a str,
    audience: &'a str,
    tenant_id: &'a TenantId,
    #[serde(skip_serializing_if = "Option::is_none")]
    issuer_id: Option<&'a IssuerId>,
    since: String,
}

impl<'a> View<'a> {
    fn of(names: &'a Names, claim: &'a Claim) -> Self {
        Self {
            issuer: &names.issuer,
            audience: &names.audience,
            tenant_id: &claim.holder,
            issuer_id: claim.issuer_id.as_ref(),
            since: claim.since.to_string(),
        }
    }
}

/// What a token says of where it comes from and for whom it is.
struct Names {
    issuer: String,
    audience: String,
}

impl Names {
    fn of(request: &Request) -> Result<Self, ApiError> {
        let named = |name: &'static str| {
            let text: Option<String> = web::query(request, name)?;
            text.filter(|text| (1..=LONGEST_NAME).contains(&text.len())).ok_or_else(|| {
                ApiError::invalid(name, format!("{name} must be given, with 1 to {LONGEST_NAME} bytes"))
            })
        };
        Ok(Self { issuer: named("issuer")?, audience: named("audience")? })
    }

    fn provenance(&self) -> Provenance<'_> {
        Provenance { issuer: &self.issuer, audience: &self.audience }
    }
}

pub(crate) async fn show(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let names = Names::of(&request)?;
    let claim = context.issuers.held(&operator, names.provenance()).await?.ok_or_else(ApiError::not_found)?;
    let record =
        Record::operation(&operator, claim.holder.clone(), Action::IssuersRead, None, context.clock.now());
    context.ledger.note(&record.about(claim.issuer_id.iter().cloned().collect())).await?;
    Ok(web::reply(StatusCode::OK, &View::of(&names, &claim)))
}

pub(crate) async fn release(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let names = Names::of(&request)?;
    let holder: TenantId = web::query(&request, "tenant_id")?.ok_or_else(|| {
        ApiError::invalid("tenant_id", "tenant_id must name the tenant that the claim is taken from")
    })?;
    let claim = context.issuers.held(&operator, names.provenance()).await?;
    let ward = operator.ward(holder.clone());
    let Some(claim) = claim.filter(|claim| claim.holder == holder) else {
        // Released before, perhaps by somebody who stopped halfway.
        if context.tenants.get(&operator, &holder).await?.is_some() {
            context.reach(&ward).await?;
        }
        return Err(ApiError::not_found());
    };
    let tenant = context.tenants.get(&operator, &holder).await?.ok_or_else(|| {
        ApiError::new(Code::Conflict, format!("tenant `{holder}` is gone; its claims go with it"))
    })?;
    if tenant.status == TenantStatus::Deprovisioning {
        return Err(being_deleted(&holder));
    }
    let record =
        Record::operation(&operator, holder.clone(), Action::IssuerRemoved, None, context.clock.now());
    let record = record.about(claim.issuer_id.iter().cloned().collect());
    let noted = (&context.ledger, &record);
    Box::pin(context.issuers.release(&operator, names.provenance(), &claim, noted)).await?;
    context.reach(&ward).await?;
    tracing::info!(tenant.id = %holder, operator.arn = operator.arn(), "Issuer's claim released");
    Ok(web::reply(StatusCode::OK, &View::of(&names, &claim)))
}
