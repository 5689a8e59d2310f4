//! A tenant's audit log: for the tenant who did what, and who was shown what; for operators, as a function
//! of its own, whether it is complete and unaltered.

mod cursor;
mod export;
mod read;
mod scan;
mod verify;

use std::time::Duration;

use http::{Method, Response};
use lambda_http::{Body, Error, Request};
use shared::api_key::Permission;
use shared::aws::audit_objects::{AuditObjects, ObjectError};
use shared::aws::chains::Chains;
use shared::aws::idempotency::IdempotencyStore;
use shared::aws::ledger::Ledger;
use shared::aws::tenants::TenantStore;
use shared::aws::{self};
use shared::clock::{Clock, Timestamp};
use shared::error::ApiError;
use shared::gate::Gate;
use shared::scope::TenantScope;
use shared::{env, web};
use tokio::time::Instant;

/// What the function works with.
pub struct Context {
    gate: Gate,
    ledger: Ledger,
    chains: Chains,
    objects: AuditObjects,
    tenants: TenantStore,
    idempotency: IdempotencyStore,
    retention_days: u32,
    clock: Clock,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable is absent; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let config = aws::config()?;
        let access = aws::Access::from_env(&config)?;
        let clock = Clock::system();
        let ledger = Ledger::new(&access, env::table("AUDIT_TABLE")?);
        Ok(Self {
            gate: Gate::from_env(&access, clock.clone())?,
            chains: Chains::new(&access, env::table("USAGE_TABLE")?, ledger.clone()),
            ledger,
            objects: AuditObjects::new(&access, env::bucket("AUDIT_BUCKET")?),
            tenants: TenantStore::new(&access, env::table("TENANTS_TABLE")?),
            idempotency: IdempotencyStore::of_names(&access, env::table("CONVERSATIONS_TABLE")?),
            retention_days: env::parsed("AUDIT_RETENTION_DAYS")?,
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
        (&Method::GET, "/v1/audit") => context.run(request, read::handle).await,
        (&Method::POST, "/v1/audit/exports") => context.run(request, export::make).await,
        (&Method::GET, "/v1/audit/exports/{id}") => context.run(request, export::again).await,
        (&Method::GET, "/admin/audit/verify") => verify::handle(context, request).await,
        _ => Err(ApiError::not_found()),
    })
    .await
}

impl Context {
    /// Until when the log is read for a request.
    fn deadline(&self, request: &Request) -> Instant {
        web::deadline(request, &self.clock) - MARGIN
    }

    async fn run(
        &self,
        request: Request,
        handler: impl AsyncFnOnce(&Self, &mut TenantScope, Request) -> Result<Response<Body>, ApiError>,
    ) -> Result<Response<Body>, ApiError> {
        let caller = web::caller(&request)?;
        let run = async |mut scope: TenantScope| handler(self, &mut scope, request).await;
        self.gate.enter(caller, Permission::AuditRead, run).await
    }
}

/// Kept free at the end of a request, to answer with what was found until then.
const MARGIN: Duration = Duration::from_secs(4);
/// The longest period that is read at once, in days.
const MOST_DAYS: u32 = 366;
/// The period where a request does not say, in days.
const DEFAULT_DAYS: i64 = 30;
const DAY_MS: i64 = 86_400_000;

/// A period of time, from its first instant to before its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Period {
    from: Timestamp,
    to: Timestamp,
}

impl Period {
    /// The period between two instants or days that a request names; a day that ends it is part of it.
    ///
    /// # Errors
    /// The refusal that the caller is to see; it names the field.
    fn of(from: Option<&str>, to: Option<&str>, now: Timestamp) -> Result<Self, ApiError> {
        let to = to.map(|text| instant("to", text)).transpose()?;
        let to = match to {
            None => now.plus_millis(1),
            Some((at, true)) => at.plus_millis(DAY_MS),
            Some((at, false)) => at,
        };
        let from = from.map(|text| instant("from", text)).transpose()?;
        let from = from.map_or(to.plus_millis(-DEFAULT_DAYS * DAY_MS), |(at, _)| at);
        if from >= to {
            return Err(ApiError::invalid("from", "from must be before to"));
        }
        if from.plus_days(MOST_DAYS) < to {
            let message = format!("from and to are more than {MOST_DAYS} days apart; ask for parts of it");
            return Err(ApiError::invalid("from", message));
        }
        Ok(Self { from, to })
    }
}

/// An instant as RFC 3339 writes it, or the beginning of a day; and whether it is a day.
fn instant(name: &'static str, text: &str) -> Result<(Timestamp, bool), ApiError> {
    let day = text.len() == 10;
    let whole = if day { format!("{text}T00:00:00Z") } else { text.to_owned() };
    let at = Timestamp::parse(&whole).map_err(|_| {
        let message = format!("{name} must be an instant such as 2026-03-01T09:30:00Z, or a day");
        ApiError::invalid(name, message)
    })?;
    Ok((at, day))
}

/// What the caller sees of a bucket that does not answer.
fn unavailable(error: ObjectError) -> ApiError {
    tracing::error!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
    ApiError::unavailable("the audit log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_is_checked() {
        let now = Timestamp::parse("2026-11-24T12:00:00Z").unwrap();
        let at = |text| Timestamp::parse(text).unwrap();
        let of = |from, to| Period::of(from, to, now);
        let march = of(Some("2026-03-01"), Some("2026-03-31")).unwrap();
        assert_eq!(march, Period { from: at("2026-03-01T00:00:00Z"), to: at("2026-04-01T00:00:00Z") });
        let last = of(None, None).unwrap();
        assert!(last.to > now && last.from == last.to.plus_millis(-30 * DAY_MS));
        for (from, to, field) in [
            (Some("yesterday"), None, "from"),
            (None, Some("2026-13-01"), "to"),
            (Some("2026-03-02"), Some("2026-03-01"), "from"),
            (Some("2026-03-01T00:00:00Z"), Some("2026-03-01T00:00:00Z"), "from"),
            (Some("2020-01-01"), Some("2026-03-01"), "from"),
            (Some(""), None, "from"),
        ] {
            assert_eq!(of(from, to).unwrap_err().param.as_deref(), Some(field), "{from:?} {to:?}");
        }
    }
}
