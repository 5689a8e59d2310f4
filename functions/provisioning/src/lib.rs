//! The operators' control plane: tenants are made, changed and looked up here.

mod attempt;
mod change;
mod create;
mod issuer_claim;
mod keys;
mod profile;
mod read;
mod webhook_secret;

use http::{Method, Response};
use lambda_http::{Body, Error, Request};
use serde::Serialize;
use shared::aws::audit_objects::AuditObjects;
use shared::aws::data_keys::DataKeys;
use shared::aws::deprovisionings::Deprovisionings;
use shared::aws::erasure::KeptRecords;
use shared::aws::issuers::IssuerStore;
use shared::aws::keys::KeyStore;
use shared::aws::ledger::Ledger;
use shared::aws::meters::MeterStore;
use shared::aws::secrets::{TenantKeys, WebhookRoot};
use shared::aws::tenants::TenantStore;
use shared::aws::{self, StoreError, secrets};
use shared::clock::Clock;
use shared::error::{ApiError, Code};
use shared::limits::{LimitChanges, Limits};
use shared::random::{Entropy, entropy};
use shared::scope::Ward;
use shared::sealing::KmsKeyArn;
use shared::secret::Secret;
use shared::tenant::{EmbeddingModel, InjectionPolicy, ModelAccount, Tenant, TenantId, TenantStatus, Tier};
use shared::vectors::Cells;
use shared::{env, roots, web};

/// What the function works with.
pub struct Context {
    tenants: TenantStore,
    keys: KeyStore,
    issuers: IssuerStore,
    deprovisionings: Deprovisionings,
    kept: KeptRecords,
    audit_objects: AuditObjects,
    meters: MeterStore,
    ledger: Ledger,
    cells: Cells,
    vector_root_key: Secret,
    model_keys: TenantKeys,
    data_keys: DataKeys,
    webhook_root: WebhookRoot,
    embedding: EmbeddingModel,
    clock: Clock,
    entropy: Entropy,
}

impl Context {
    /// The context that the environment describes.
    ///
    /// # Errors
    /// If a variable or secret is absent or malformed; the error names it.
    pub async fn from_env() -> Result<Self, Error> {
        let access = aws::Access::own(&aws::config()?);
        let vector_root_key = secrets::read(&access, "QDRANT_ROOT_KEY_SECRET").await?;
        let webhook_root = WebhookRoot::from_env(&access, "WEBHOOK_KEY_SECRET").await?;
        Ok(Self {
            tenants: TenantStore::new(&access, env::table("TENANTS_TABLE")?),
            keys: KeyStore::new(&access, env::table("TENANTS_TABLE")?),
            issuers: IssuerStore::new(&access, env::table("TENANTS_TABLE")?),
            deprovisionings: Deprovisionings::new(&access, env::table("TENANTS_TABLE")?),
            kept: KeptRecords::new(&access, env::table("AUDIT_TABLE")?, env::table("USAGE_TABLE")?),
            audit_objects: AuditObjects::new(&access, env::bucket("AUDIT_BUCKET")?),
            meters: MeterStore::new(&access, env::table("METERS_TABLE")?),
            ledger: Ledger::new(&access, env::table("AUDIT_TABLE")?),
            cells: Cells::from_env("QDRANT_CELLS", roots::outbound()?)?,
            vector_root_key,
            model_keys: TenantKeys::from_env(&access, "TENANT_MODEL_KEYS")?,
            data_keys: DataKeys::new(&access),
            webhook_root,
            embedding: EmbeddingModel {
                name: env::model("EMBEDDINGS_MODEL")?,
                dimensions: env::parsed("EMBEDDINGS_DIMENSIONS")?,
            },
            clock: Clock::system(),
            entropy: entropy(),
        })
    }
}

/// Answers one request.
pub async fn handle(context: &Context, request: Request) -> Response<Body> {
    web::handle(request, &context.clock, async |request| match (request.method(), web::route(&request)) {
        (&Method::POST, "/admin/tenants") => create::handle(context, request).await,
        (&Method::GET, "/admin/tenants") => read::list(context, request).await,
        (&Method::GET, "/admin/tenants/{id}") => read::one(context, request).await,
        (&Method::GET, "/admin/tenants/{id}/keys") => keys::list::handle(context, request).await,
        (&Method::POST, "/admin/tenants/{id}/keys") => keys::create::handle(context, request).await,
        (&Method::DELETE, "/admin/tenants/{id}/keys/{key_id}") => {
            keys::revoke::handle(context, request).await
        }
        (&Method::GET, "/admin/issuer-claim") => issuer_claim::show(context, request).await,
        (&Method::DELETE, "/admin/issuer-claim") => issuer_claim::release(context, request).await,
        (&Method::PATCH, "/admin/tenants/{id}") => change::handle(context, request).await,
        (&Method::GET, "/admin/tenants/{id}/webhook-secret") => {
            webhook_secret::handle(context, request).await
        }
        _ => Err(ApiError::not_found()),
    })
    .await
}

impl Context {
    /// Lets what a tenant's record says now reach its next admission: from here on, no decision from before
    /// admits anything.
    async fn reach(&self, ward: &Ward) -> Result<(), ApiError> {
        let reached = async {
            let now = self.keys.standing(ward).await?;
            self.meters.set_standing(ward, now.status, now.epoch).await
        };
        reached.await.map_err(not_reached)
    }
}

/// What is on record holds for nobody until the meter knows.
fn not_reached(error: StoreError) -> ApiError {
    tracing::error!("A change is on record and has not reached the meter: {error}");
    let message = "the change is on record and may not hold yet; send the request again";
    ApiError::new(Code::Unavailable, message)
}

/// The refusal to change a tenant that is being deleted.
fn being_deleted(id: &TenantId) -> ApiError {
    ApiError::new(Code::Conflict, format!("tenant `{id}` is being deleted; nothing of it changes any more"))
}

/// A tenant as operators see it.
#[derive(Debug, Serialize)]
struct View {
    tenant_id: TenantId,
    status: TenantStatus,
    tier: Tier,
    company_name: String,
    assistant_name: String,
    instructions: String,
    injection_policy: InjectionPolicy,
    limits: Limits,
    overrides: LimitChanges,
    cell: String,
    embedding: EmbeddingModel,
    model_account: ModelAccount,
    #[serde(skip_serializing_if = "Option::is_none")]
    kms_key_arn: Option<KmsKeyArn>,
    #[serde(skip_serializing_if = "Option::is_none")]
    webhook_url: Option<String>,
    created_at: String,
}

impl From<Tenant> for View {
    fn from(tenant: Tenant) -> Self {
        Self {
            tenant_id: tenant.tenant_id,
            status: tenant.status,
            tier: tenant.tier,
            company_name: tenant.company_name,
            assistant_name: tenant.assistant_name,
            instructions: tenant.instructions,
            injection_policy: tenant.injection_policy,
            limits: tenant.limits,
            overrides: tenant.overrides,
            cell: tenant.cell,
            embedding: tenant.embedding,
            model_account: tenant.model_account,
            kms_key_arn: tenant.kms_key_arn,
            webhook_url: tenant.webhook_url,
            created_at: tenant.created_at.to_string(),
        }
    }
}
