//! `GET /admin/audit/verify?tenant_id`: is a tenant's log complete and unaltered, by the same rules as the
//! offline verifier's. It knows more than that: where the log ends is asked of the table that the log grows
//! by, which nobody who can write to the bucket alone can put back.

use futures_util::StreamExt;
use http::{Response, StatusCode};
use lambda_http::{Body, Request};
use serde::Serialize;
use shared::audit_log::{HEAD, Head, tenant_prefix};
use shared::audit_verify::{Anchor, Finding, Rules, Verifier, in_order, position};
use shared::aws::audit_objects::First;
use shared::error::ApiError;
use shared::ledger::{Action, Record};
use shared::scope::{Subject, Ward};
use shared::tenant::TenantId;
use shared::web;
use tokio::time::Instant;

use crate::scan::AHEAD;
use crate::{Context, unavailable};

/// Findings that an answer tells; it counts the others.
const MOST_TOLD: usize = 100;

/// What a verification came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    /// Nothing is wrong.
    Healthy,
    /// Something is.
    Damaged,
    /// The log is longer than one request can read; of what was read the findings tell.
    Unfinished,
}

#[derive(Serialize)]
struct Verification {
    tenant_id: TenantId,
    status: Status,
    verified_at: String,
    /// How many of the log's objects were read, and how many there are.
    objects_read: usize,
    objects: usize,
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    log: Option<Log>,
    findings: Vec<Told>,
    findings_total: u64,
}

/// What is known of a log once it was read to its end.
#[derive(Serialize)]
struct Log {
    records: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    first: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<String>,
    highest_ticket: u64,
    open_tickets: u64,
    /// What `since` takes in a later verification.
    head: String,
}

#[derive(Serialize)]
struct Told {
    place: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<u64>,
    problem: String,
}

impl From<Finding> for Told {
    fn from(finding: Finding) -> Self {
        Self { place: finding.place, position: finding.position, problem: finding.fault.to_string() }
    }
}

pub(crate) async fn handle(context: &Context, request: Request) -> Result<Response<Body>, ApiError> {
    let operator = web::operator(&request)?;
    let tenant: Option<TenantId> = web::query(&request, "tenant_id")?;
    let tenant = tenant.ok_or_else(|| ApiError::invalid("tenant_id", "tenant_id is missing"))?;
    let since: Option<Anchor> = web::query(&request, "since")?;
    if since.as_ref().is_some_and(|since| since.tenant != tenant) {
        return Err(ApiError::invalid("since", "since is of another tenant's log"));
    }
    let deadline = context.deadline(&request);
    let ward = operator.ward(tenant.clone());
    // The log may grow meanwhile: where it ends is asked before its objects are listed.
    let head = context.chains.read(&ward).await?.head;
    let mut objects = list(context, &ward).await?;
    // A log outlives its tenant. Of what never was there is none.
    if objects.is_empty() && head == Head::default() && since.is_none() {
        context.tenants.get(&operator, &tenant).await?.ok_or_else(ApiError::not_found)?;
    }
    without_later(context, &ward, &head, &mut objects).await?;
    let rules = Rules { retention_days: context.retention_days, since };
    let verification = verify(context, &ward, rules, &head, objects, deadline).await?;
    let now = context.clock.now();
    if verification.status == Status::Damaged {
        let Verification { findings_total, findings, .. } = &verification;
        let first = findings.first().map(|told| format!("{}: {}", told.place, told.problem));
        tracing::error!(alert = "chain_broken", findings = findings_total, first, "An audit log is damaged");
    }
    let record = Record::operation(&operator, tenant, Action::AuditVerified, None, now);
    context.ledger.note(&record).await?;
    Ok(web::reply(StatusCode::OK, &verification))
}

/// The log's objects in the order of their positions; what has none comes first.
async fn list(context: &Context, ward: &Ward) -> Result<Vec<First>, ApiError> {
    let prefix = tenant_prefix(ward.tenant_id());
    let (mut objects, mut after) = (Vec::new(), None);
    loop {
        let (found, next) = context.objects.page(ward, &prefix, after).await.map_err(unavailable)?;
        objects.extend(found);
        after = next;
        if after.is_none() {
            break;
        }
    }
    objects.retain(|first| first.key != format!("{prefix}{HEAD}"));
    objects.sort_by(|a, b| in_order(&a.key, &b.key));
    Ok(objects)
}

/// Leaves out the objects that came after the log ended at `head`, unless one of them is none that the log
/// knows of: then all are looked at.
async fn without_later(
    context: &Context,
    ward: &Ward,
    head: &Head,
    objects: &mut Vec<First>,
) -> Result<(), ApiError> {
    let later = |objects: &[First], lines: u64| {
        objects.iter().filter(|first| position(&first.key).is_some_and(|at| at > lines)).count()
    };
    if later(objects, head.lines) == 0 {
        return Ok(());
    }
    let chain = context.chains.read(ward).await?;
    // One that is intended may be stored already.
    if later(objects, chain.head.lines) <= usize::from(chain.intent.is_some()) {
        objects.retain(|first| position(&first.key).is_none_or(|at| at <= head.lines));
    }
    Ok(())
}

async fn verify(
    context: &Context,
    ward: &Ward,
    rules: Rules,
    head: &Head,
    objects: Vec<First>,
    deadline: Instant,
) -> Result<Verification, ApiError> {
    let mut verifier = Verifier::new(ward.tenant_id().clone(), rules);
    let (mut findings, mut findings_total, mut objects_read) = (Vec::new(), 0_u64, 0);
    let mut report = |finding: Finding| {
        findings_total += 1;
        if findings.len() < MOST_TOLD {
            findings.push(Told::from(finding));
        }
    };
    let count = objects.len();
    let reads = objects.into_iter().map(async |first| {
        let read = context.objects.read_kept(ward, &first).await;
        (first, read)
    });
    let mut reads = std::pin::pin!(futures_util::stream::iter(reads).buffered(AHEAD));
    while Instant::now() < deadline
        && let Some((first, read)) = reads.next().await
    {
        let (kept, bytes) = read.map_err(unavailable)?;
        let read = verifier.object(&first.key, kept, bytes.as_slice(), &mut report);
        read.map_err(|_| ApiError::unavailable("a part of the audit log"))?;
        objects_read += 1;
    }
    let whole = objects_read == count;
    let log = if whole {
        let head = serde_json::to_vec(head).map_err(|_| ApiError::unavailable("the end of the audit log"))?;
        let summary = verifier.finish(Some(&head), &mut report);
        Some(Log {
            records: summary.records,
            first: summary.first.map(|at| at.to_string()),
            last: summary.last.map(|at| at.to_string()),
            highest_ticket: summary.highest_ticket,
            open_tickets: summary.open_tickets,
            head: summary.anchor().to_string(),
        })
    } else {
        None
    };
    let status = match (whole, findings_total) {
        (_, 1..) => Status::Damaged,
        (true, 0) => Status::Healthy,
        (false, 0) => Status::Unfinished,
    };
    Ok(Verification {
        tenant_id: ward.tenant_id().clone(),
        status,
        verified_at: context.clock.now().to_string(),
        objects_read,
        objects: count,
        log,
        findings,
        findings_total,
    })
}
