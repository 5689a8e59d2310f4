//! Whose file that is: turns an upload that has come into the decision by which the function that reads it opens the
//! tenant's scope.
//!
//! The reader of files gets in by the same door as a request, and holds no more: a decision about one upload that is
//! under way, of a tenant at work, with tokens for that tenant's vectors alone. It alone may invoke this function.

use lambda_runtime::{Diagnostic, Error};
use shared::api_key::{Grants, Permission};
use shared::aws::secrets;
use shared::aws::tenants::TenantStore;
use shared::aws::upload_records::UploadRecords;
use shared::clock::Clock;
use shared::metrics::{Dimension, Line, Metric};
use shared::scope::{Decision, ForeignRecord};
use shared::secret::Secret;
use shared::tenant::TenantStatus;
use shared::upload::{Begun, Ruling, UploadPlace};
use shared::vector_token::{Access, mint};
use shared::{aws, env, telemetry};

/// What the function works with.
#[derive(Debug)]
pub struct Context {
    tenants: TenantStore,
    uploads: UploadRecords,
    vector_root_key: Secret,
    clock: Clock,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable or secret is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let access = aws::Access::own(&aws::config()?);
        Ok(Self {
            tenants: TenantStore::new(&access, env::table("TENANTS_TABLE")?),
            uploads: UploadRecords::new(&access, env::table("DOCUMENTS_TABLE")?),
            vector_root_key: secrets::read(&access, "QDRANT_ROOT_KEY_SECRET").await?,
            clock: Clock::system(),
        })
    }
}

/// Why there is no ruling. What it was is in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unruled {
    /// It could not be found out.
    #[error("the upload could not be looked up")]
    Unknown,
    /// A table answered with what is another's.
    #[error("the upload could not be looked up")]
    Foreign,
}

impl From<Unruled> for Diagnostic {
    fn from(unruled: Unruled) -> Self {
        Self { error_type: format!("{unruled:?}"), error_message: unruled.to_string() }
    }
}

/// Rules about one upload, and writes the one line that the log has of it.
///
/// # Errors
/// [`Unruled`].
pub async fn rule(context: &Context, place: UploadPlace) -> Result<Ruling, Unruled> {
    let started = context.clock.now();
    let ruling = Box::pin(look(context, &place)).await;
    let now = context.clock.now();
    let (outcome, failures) = match &ruling {
        Ok(Ruling::Scope { may_write: true, .. }) => ("allowed", &[][..]),
        Ok(Ruling::Scope { may_write: false, .. }) => ("refused", &[][..]),
        Ok(Ruling::Suspended) => ("suspended", &[][..]),
        Ok(Ruling::Over) => ("over", &[][..]),
        Err(Unruled::Unknown) => ("unknown", &[Metric::Failed][..]),
        Err(Unruled::Foreign) => ("unknown", &[Metric::Failed, Metric::IsolationAlerts][..]),
    };
    let line = Line::new("Upload checked", now)
        .with("tenant.id", place.tenant_id.as_str())
        .with("upload.id", place.upload_id.as_str())
        .with("outcome", outcome)
        .of(Dimension::Route, "upload_authorizer")
        .measure(Metric::Latency, now.millis_since(started));
    telemetry::emit(failures.iter().fold(line, |line, metric| line.measure(*metric, 1)));
    ruling
}

async fn look(context: &Context, place: &UploadPlace) -> Result<Ruling, Unruled> {
    let unknown = |error: &dyn std::error::Error| {
        tracing::error!("Upload look-up failed: {error}");
        Unruled::Unknown
    };
    let begun = context.uploads.begun(place).await.map_err(|e| unknown(&e))?.map_err(foreign)?;
    let Some(begun) = begun else { return Ok(Ruling::Over) };
    // The tenant first, as for a request: a key that is found was there at the epoch that was read, or later.
    let (tenant, grants) = context.tenants.uploader(&begun).await.map_err(|e| unknown(&e))?;
    let Some(tenant) = tenant else { return Ok(Ruling::Over) };
    match tenant.status {
        TenantStatus::Active => {}
        TenantStatus::Suspended => return Ok(Ruling::Suspended),
        TenantStatus::Provisioning | TenantStatus::Deprovisioning => return Ok(Ruling::Over),
    }
    let token = |access| {
        mint(&context.vector_root_key, &tenant.tenant_id, access, context.clock.now())
            .map_err(|e| unknown(&e))
    };
    let (read, write) = (token(Access::Read)?, token(Access::Write)?);
    let decision = Decision::uploaded(&begun, tenant, read, write).map_err(foreign)?;
    let fields = decision.to_upload_context(&begun).map_err(|e| unknown(&e))?;
    Ok(Ruling::Scope { context: fields, may_write: may_write(context, &begun, grants) })
}

/// Whether who began the upload may still write documents. A key that was revoked meanwhile admits nothing.
fn may_write(context: &Context, begun: &Begun, grants: Option<Grants>) -> bool {
    let now = context.clock.now();
    let may = grants.is_some_and(|grants| {
        grants.permissions.contains(&Permission::DocumentsWrite)
            && grants.expires_at.is_none_or(|at| now < at)
    });
    if !may {
        tracing::info!(key.id = %begun.upload().key_id, "The key that began an upload does not let it in any more");
    }
    may
}

fn foreign(error: ForeignRecord) -> Unruled {
    tracing::error!(alert = "isolation_alert", "Upload look-up answered with {error}");
    Unruled::Foreign
}
