//! Who is asking: turns the `Authorization` header into a decision that API Gateway caches and hands
//! to every other function.

pub mod uploads;

use std::collections::BTreeSet;
use std::time::Duration;

use aws_lambda_events::apigw::{
    ApiGatewayCustomAuthorizerPolicy, ApiGatewayCustomAuthorizerRequestTypeRequest,
    ApiGatewayCustomAuthorizerResponse,
};
use aws_lambda_events::iam::{IamPolicyEffect, IamPolicyStatement};
use lambda_runtime::{Diagnostic, Error};
use serde_json::Value;
use shared::api_key::{ApiKey, InvalidKey, Permission, VerifiedKey, verify};
use shared::aws::keys::KeyStore;
use shared::aws::ledger::Ledger;
use shared::aws::secrets;
use shared::aws::tenants::TenantStore;
use shared::clock::{Clock, Timestamp};
use shared::credential::CredentialId;
use shared::denials::Denials;
use shared::error::Code;
use shared::issuer::KeySource;
use shared::jwt::{self, InvalidToken, PresentedToken};
use shared::key_sets::KeySets;
use shared::ledger::{Asked, Denial};
use shared::metrics::{Dimension, Line, Metric};
use shared::scope::{Decision, ForeignRecord, Presented, Subject as _, VectorToken, Ward};
use shared::secret::Secret;
use shared::tenant::Tenant;
use shared::vector_token::{Access, mint};
use shared::{aws, env, telemetry};

/// How long a request waits for the note that its key was used.
const NOTE_WITHIN: Duration = Duration::from_millis(300);

/// What the authorizer works with. It alone of the functions on a request's path holds the vector
/// store's root key.
#[derive(Debug)]
pub struct Context {
    tenants: TenantStore,
    keys: KeyStore,
    denials: Denials,
    key_sets: KeySets,
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
        let clock = Clock::system();
        Ok(Self {
            tenants: TenantStore::new(&access, env::table("TENANTS_TABLE")?),
            keys: KeyStore::new(&access, env::table("TENANTS_TABLE")?),
            denials: Denials::new(Ledger::new(&access, env::table("AUDIT_TABLE")?), clock.clone()),
            key_sets: KeySets::new(env::parsed("ISSUER_REACH")?, clock.clone()),
            vector_root_key: secrets::read(&access, "QDRANT_ROOT_KEY_SECRET").await?,
            clock,
        })
    }
}

impl Context {
    /// Writes down what is still only remembered: the process is about to end.
    pub async fn close(&self) {
        self.denials.close().await;
    }
}

/// Why a request goes no further.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The key or token is not valid. API Gateway answers 401 to this very text.
    #[error("Unauthorized")]
    Unauthorized,
    /// It could not be found out. API Gateway answers with its authorizer failure.
    #[error("the key or token could not be checked")]
    Unknown,
    /// A store answered with what is another's. To the caller it is the same.
    #[error("the key or token could not be checked")]
    Foreign,
}

impl From<InvalidKey> for Refusal {
    fn from(_: InvalidKey) -> Self {
        Self::Unauthorized
    }
}

impl From<InvalidToken> for Refusal {
    fn from(_: InvalidToken) -> Self {
        Self::Unauthorized
    }
}

impl From<Refusal> for Diagnostic {
    fn from(refusal: Refusal) -> Self {
        Self { error_type: format!("{refusal:?}"), error_message: refusal.to_string() }
    }
}

/// Decides about one request, and writes the one line that the log has of it. The answer holds nothing that
/// depends on more than the key or token, because API Gateway gives the same answer to every request with it,
/// on every route, for minutes.
///
/// # Errors
/// [`Refusal`].
pub async fn authorize(
    context: &Context,
    event: ApiGatewayCustomAuthorizerRequestTypeRequest,
) -> Result<ApiGatewayCustomAuthorizerResponse<Value>, Refusal> {
    let started = context.clock.now();
    let decision = Box::pin(decide(context, &event)).await;
    let now = context.clock.now();
    let whose = decision.as_ref().ok().map(|d| (d.tenant_id().to_string(), d.credential().to_string()));
    let (tenant, key) = whose.unzip();
    let (outcome, failures) = match &decision {
        Ok(_) => ("allowed", &[][..]),
        Err(Refusal::Unauthorized) => ("refused", &[][..]),
        Err(Refusal::Unknown) => ("unknown", &[Metric::Failed][..]),
        Err(Refusal::Foreign) => ("unknown", &[Metric::Failed, Metric::IsolationAlerts][..]),
    };
    let line = Line::new("Credential checked", now)
        .with("request.id", event.request_context.request_id.as_deref())
        .with("tenant.id", tenant)
        .with("key.id", key)
        .with("outcome", outcome)
        .of(Dimension::Route, "authorizer")
        .measure(Metric::Latency, now.millis_since(started));
    telemetry::emit(failures.iter().fold(line, |line, metric| line.measure(*metric, 1)));
    let decision = decision?;
    let principal = format!("{}/{}", decision.tenant_id(), decision.credential());
    let fields = decision.to_context().map_err(|error| {
        tracing::error!("Decision does not serialise: {error}");
        Refusal::Unknown
    })?;
    Ok(allow(principal, &event, Value::Object(fields.into_iter().collect())))
}

async fn decide(
    context: &Context,
    event: &ApiGatewayCustomAuthorizerRequestTypeRequest,
) -> Result<Decision, Refusal> {
    let presented = presented(event)?;
    let decide = async {
        match &presented {
            Credential::Key(key) => by_key(context, key, event).await,
            Credential::Token(token) => Box::pin(by_token(context, token, event)).await,
        }
    };
    let (decision, ()) = tokio::join!(decide, context.denials.catch_up());
    decision
}

async fn by_key(
    context: &Context,
    presented: &ApiKey,
    event: &ApiGatewayCustomAuthorizerRequestTypeRequest,
) -> Result<Decision, Refusal> {
    let claimed = context.tenants.claimed_by(presented).await.map_err(|error| {
        tracing::error!("Key look-up failed: {error}");
        Refusal::Unknown
    })?;
    let now = context.clock.now();
    let (ward, known) = (claimed.ward(), claimed.key.is_some());
    let key = match verify(presented, claimed.key, claimed.tenant.as_ref().map(|t| t.status), now) {
        Ok(key) => key,
        Err(invalid) => {
            let key_id = known.then(|| presented.key_id().clone().into());
            deny(context, event, ward, Code::InvalidKey, key_id).await;
            return Err(invalid.into());
        }
    };
    let tenant = claimed.tenant.ok_or(Refusal::Unauthorized)?;
    note_used(context, &key, now).await;
    let (read, write) = tokens(context, &tenant, &key.record().permissions)?;
    Decision::new(&key, about(event), tenant, read, write).map_err(foreign)
}

async fn by_token(
    context: &Context,
    presented: &PresentedToken,
    event: &ApiGatewayCustomAuthorizerRequestTypeRequest,
) -> Result<Decision, Refusal> {
    let addressed = context.tenants.addressed_by(&presented.provenances()).await.map_err(|error| {
        tracing::error!("Issuer look-up failed: {error}");
        Refusal::Unknown
    })?;
    let addressed = addressed.ok_or(Refusal::Unauthorized)?;
    let ward = addressed.ward();
    let (Some(tenant), Some(issuer)) = (addressed.tenant, addressed.issuer) else {
        deny(context, event, ward, Code::InvalidKey, None).await;
        return Err(Refusal::Unauthorized);
    };
    let checked = async {
        // What no signature could make valid is not worth a look at the issuer's keys.
        presented.plausible(&issuer, context.clock.now())?;
        let fetched;
        let keys = match &issuer.keys {
            KeySource::Keys(keys) => keys,
            KeySource::JwksUrl(url) => {
                fetched = context.key_sets.at(&tenant, url, presented.key_name()).await.map_err(|error| {
                    tracing::warn!(tenant.id = %tenant.tenant_id, "Token could not be checked: {error}");
                    Refusal::Unknown
                })?;
                &fetched[..]
            }
        };
        let now = context.clock.now();
        Ok::<_, Refusal>(jwt::verify(presented, &issuer, keys, Some(tenant.status), now)?)
    };
    let user = match checked.await {
        Ok(user) => user,
        Err(refusal) => {
            let code = match refusal {
                Refusal::Unauthorized => Code::InvalidKey,
                Refusal::Unknown | Refusal::Foreign => Code::Unavailable,
            };
            deny(context, event, ward, code, Some(issuer.issuer_id.into())).await;
            return Err(refusal);
        }
    };
    // It is genuine, and not theirs: that they claim its names too is on their record, so that they learn of it.
    for other in addressed.others {
        tracing::warn!(tenant.id = %other.tenant_id(), "A token is for another's audience too, who was first");
        deny(context, event, Some(other), Code::InvalidKey, None).await;
    }
    let (read, write) = tokens(context, &tenant, user.permissions())?;
    Decision::vouched(&user, about(event), tenant, read, write).map_err(foreign)
}

/// Puts a refusal on record. A tenant that is none has no ledger.
async fn deny(
    context: &Context,
    event: &ApiGatewayCustomAuthorizerRequestTypeRequest,
    ward: Option<Ward>,
    code: Code,
    key_id: Option<CredentialId>,
) {
    let request_id = event.request_context.request_id.clone().unwrap_or_default().into();
    if let Some(ward) = ward {
        let asked = Asked { request_id, key_id, user_id: None };
        context.denials.deny(&ward, Denial::Auth(code), asked).await;
    }
}

/// The tokens for the tenant's vectors: to read, and to write for who may.
fn tokens(
    context: &Context,
    tenant: &Tenant,
    permissions: &BTreeSet<Permission>,
) -> Result<(VectorToken, Option<VectorToken>), Refusal> {
    let token = |access| {
        mint(&context.vector_root_key, &tenant.tenant_id, access, context.clock.now()).map_err(|error| {
            tracing::error!("Vector token could not be minted: {error}");
            Refusal::Unknown
        })
    };
    // Also for a tenant that is switched off: it is refused with it, and once it is on again the decision is
    // made anew without the authorizer.
    let writes = permissions.contains(&Permission::DocumentsWrite);
    Ok((token(Access::Read)?, if writes { Some(token(Access::Write)?) } else { None }))
}

fn foreign(error: ForeignRecord) -> Refusal {
    tracing::error!(alert = "isolation_alert", "Credential look-up answered with {error}");
    Refusal::Foreign
}

/// Notes that the key is in use. API Gateway asks once for each time that it keeps a decision, so this is
/// as fine as that; nobody waits long for it, and nothing fails with it.
async fn note_used(context: &Context, key: &VerifiedKey, now: Timestamp) {
    let noted = tokio::time::timeout(NOTE_WITHIN, context.keys.note_used(key, now)).await;
    match noted {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!("The use of a key could not be noted: {error}"),
        Err(_) => tracing::warn!("The use of a key could not be noted in time"),
    }
}

/// What a request presents.
enum Credential {
    Key(ApiKey),
    Token(PresentedToken),
}

fn authorization(event: &ApiGatewayCustomAuthorizerRequestTypeRequest) -> Option<&str> {
    event.headers.get("authorization").and_then(|value| value.to_str().ok())
}

fn presented(event: &ApiGatewayCustomAuthorizerRequestTypeRequest) -> Result<Credential, Refusal> {
    let header = authorization(event).ok_or(Refusal::Unauthorized)?;
    if PresentedToken::is_in(header) {
        Ok(Credential::Token(PresentedToken::from_authorization(header)?))
    } else {
        Ok(Credential::Key(ApiKey::from_authorization(header)?))
    }
}

/// What the decision is about: the functions hold it against what they are presented.
fn about(event: &ApiGatewayCustomAuthorizerRequestTypeRequest) -> Presented {
    Presented::by(authorization(event).unwrap_or_default())
}

/// Allows every tenant route of the stage, since the answer is cached for all of them. Each function
/// checks the key's scope itself; operator routes have no authorizer, so nothing here opens them.
fn allow(
    principal: String,
    event: &ApiGatewayCustomAuthorizerRequestTypeRequest,
    context: Value,
) -> ApiGatewayCustomAuthorizerResponse<Value> {
    let method = event.method_arn.as_deref().unwrap_or_default();
    // arn:aws:execute-api:<region>:<account>:<api>/<stage>/<method>/<path>
    let stage: Vec<&str> = method.splitn(3, '/').take(2).collect();
    let mut statement = IamPolicyStatement::default();
    statement.action = vec!["execute-api:Invoke".to_owned()];
    statement.effect = IamPolicyEffect::Allow;
    statement.resource = vec![format!("{}/*/v1/*", stage.join("/"))];
    let mut policy = ApiGatewayCustomAuthorizerPolicy::default();
    policy.version = Some("2012-10-17".to_owned());
    policy.statement = vec![statement];
    let mut response = ApiGatewayCustomAuthorizerResponse::default();
    response.principal_id = Some(principal);
    response.policy_document = policy;
    response.context = context;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(authorization: Option<&str>) -> ApiGatewayCustomAuthorizerRequestTypeRequest {
        let mut event = ApiGatewayCustomAuthorizerRequestTypeRequest::default();
        event.method_arn = Some("arn:aws:execute-api:eu-west-1:123456789012:abc/v1/POST/v1/chat".into());
        if let Some(value) = authorization {
            event.headers.insert("authorization", value.parse().unwrap());
        }
        event
    }

    #[test]
    fn only_a_well_formed_bearer_key_is_looked_up() {
        for bad in [
            None,
            Some(""),
            Some("Bearer"),
            Some("Bearer x"),
            Some("Basic eDp5"),
            Some("ten_pro_acme_x_y"),
            Some("Bearer a.b.c"),
        ] {
            assert!(presented(&event(bad)).is_err(), "{bad:?}");
        }
        let key = ApiKey::issue(
            shared::tenant::Tier::Free,
            "acme".parse().unwrap(),
            &mut shared::random::entropy(),
        );
        assert!(presented(&event(Some(&format!("bearer {}", key.expose())))).is_ok());
    }

    #[test]
    fn the_policy_covers_the_tenant_routes_of_the_stage_alone() {
        let response = allow("p".into(), &event(None), Value::Null);
        assert_eq!(
            response.policy_document.statement[0].resource,
            ["arn:aws:execute-api:eu-west-1:123456789012:abc/v1/*/v1/*"]
        );
    }

    #[test]
    fn a_refusal_says_what_api_gateway_wants_to_read() {
        assert_eq!(Diagnostic::from(Refusal::Unauthorized).error_message, "Unauthorized");
        assert_ne!(Diagnostic::from(Refusal::Unknown).error_message, "Unauthorized");
    }
}
