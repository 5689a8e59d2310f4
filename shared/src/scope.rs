//! Whose request this is: a [`TenantScope`] or an [`Operator`], neither of which can be made up.
//!
//! The authorizer turns a [`VerifiedKey`] or a [`Vouched`] user into a [`Decision`]; API Gateway carries it, outside the
//! caller's reach, into the function's event; there [`Caller::of`] reads it back and
//! [`TenantScope::open`] checks what a cached decision cannot know. Every store call of a tenant takes the
//! scope, so code that has not come this way cannot name a tenant's data.
//!
//! What it is for compiles:
//!
//! ```
//! # use shared::scope::{Subject, TenantScope};
//! # use shared::tenant::TenantId;
//! fn whose(scope: &TenantScope) -> &TenantId {
//!     scope.tenant_id()
//! }
//! fn books(of: &impl Subject) -> &TenantId {
//!     of.tenant_id()
//! }
//! fn both(scope: &TenantScope) -> bool {
//!     whose(scope) == books(scope)
//! }
//! ```
//!
//! The usual mistakes do not: `tests/compile_fail`.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lambda_events::apigw::ApiGatewayProxyRequestContext;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::api_key::{ApiKey, Grants, Permission, VerifiedKey};
use crate::clock::Timestamp;
use crate::credential::CredentialId;
use crate::error::{ApiError, Code};
use crate::groups::{Groups, InvalidGroup};
use crate::ids::{IssuerId, UserId};
use crate::issuer::{Issuer, Vouched};
use crate::ledger::Asked;
use crate::limits::Limits;
use crate::meter::Standing;
use crate::metrics::{self, Arrived, Ending, Line, Measured};
use crate::sealing::KmsKeyArn;
use crate::tenant::{EmbeddingModel, InjectionPolicy, ModelAccount, Tenant, TenantId, TenantStatus, Tier};
use crate::trace::Trace;
use crate::upload::{Begun, UploadPlace};

/// The header in which a tenant names its own user.
pub const USER_HEADER: &str = "x-user-id";
/// The header in which a tenant names its user's groups.
pub const GROUPS_HEADER: &str = "x-user-groups";
/// The authorizer context's value that holds the decision.
const DECISION: &str = "decision";
/// Those that name the request and the user that began an upload.
const REQUEST: &str = "requestId";
const USER: &str = "userId";

/// The id that API Gateway gave a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(String);

impl From<String> for RequestId {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A bearer token for one tenant's vector collection. `Debug` hides it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VectorToken(String);

impl VectorToken {
    /// Wraps a token just minted, or the cluster's own key on the control plane.
    pub fn new(token: String) -> Self {
        Self(token)
    }

    /// The token, for the request's metadata.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for VectorToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VectorToken(…)")
    }
}

/// What a tenant's assistant is told of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// The company's name.
    pub company_name: String,
    /// The assistant's name.
    pub assistant_name: String,
    /// The tenant's own instructions; may be empty.
    pub instructions: String,
    /// What to do with injected orders.
    pub injection_policy: InjectionPolicy,
}

/// What an `Authorization` header presents, as a hash: by it a decision is known to be about this very key or
/// token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Presented(String);

impl Presented {
    /// What this header presents, however its scheme is written.
    pub fn by(authorization: &str) -> Self {
        let credential = authorization.split_once(' ').map_or(authorization, |(_, credential)| credential);
        Self(URL_SAFE_NO_PAD.encode(Sha256::digest(credential.trim().as_bytes())))
    }
}

/// What was proven of whoever asks, by key or by token.
struct Proof {
    presented: Presented,
    credential: CredentialId,
    user_id: Option<UserId>,
    groups: Groups,
    grants: Grants,
}

/// What the authorizer found out about a key or a token, as API Gateway caches it. It holds only what depends
/// on that, since it is cached by that alone and for every route.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Decision {
    tenant_id: TenantId,
    status: TenantStatus,
    epoch: u64,
    tier: Tier,
    /// What it is about.
    presented: Presented,
    credential: CredentialId,
    /// The user for whom the token's issuer vouches. Keys have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user_id: Option<UserId>,
    /// The groups of which the token's issuer says that the user is. Keys have none.
    #[serde(default, skip_serializing_if = "Groups::is_empty")]
    groups: Groups,
    grants: Grants,
    profile: Profile,
    limits: Limits,
    cell: String,
    embedding: EmbeddingModel,
    model_account: ModelAccount,
    /// Here, so that whoever writes need not look it up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kms_key_arn: Option<KmsKeyArn>,
    vector_read: VectorToken,
    vector_write: Option<VectorToken>,
    /// Whether it is about an upload that has come, and not about a request. Whoever needs it anew asks again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    of_upload: bool,
}

impl Decision {
    /// The decision for a verified key of `tenant` that was `presented`, with the vector tokens minted for it.
    ///
    /// # Errors
    /// [`ForeignRecord`] if the tenant's record is not that of the key's tenant.
    pub fn new(
        key: &VerifiedKey,
        presented: Presented,
        tenant: Tenant,
        vector_read: VectorToken,
        vector_write: Option<VectorToken>,
    ) -> Result<Self, ForeignRecord> {
        let record = key.record();
        if record.tenant_id != tenant.tenant_id {
            return Err(ForeignRecord);
        }
        let proof = Proof {
            presented,
            credential: record.key_id.clone().into(),
            user_id: None,
            groups: Groups::default(),
            grants: record.grants(),
        };
        Ok(Self::of(proof, tenant, vector_read, vector_write))
    }

    /// The decision for a user of `tenant` for whom one of its issuers vouches by the token that was `presented`,
    /// with the vector tokens minted for it.
    ///
    /// # Errors
    /// [`ForeignRecord`] if the tenant's record is not that of the issuer's tenant.
    pub fn vouched(
        user: &Vouched,
        presented: Presented,
        tenant: Tenant,
        vector_read: VectorToken,
        vector_write: Option<VectorToken>,
    ) -> Result<Self, ForeignRecord> {
        if user.tenant_id != tenant.tenant_id {
            return Err(ForeignRecord);
        }
        let proof = Proof {
            presented,
            credential: user.issuer_id.clone().into(),
            user_id: Some(user.user_id.clone()),
            groups: user.groups.clone(),
            grants: user.grants.clone(),
        };
        Ok(Self::of(proof, tenant, vector_read, vector_write))
    }

    /// The decision for an upload that was begun for `tenant`, with the vector tokens minted for it: to write that
    /// tenant's documents, in the name of whoever began it. From where that was, was checked then.
    ///
    /// # Errors
    /// [`ForeignRecord`] if the tenant's record is not that of the upload's tenant.
    pub fn uploaded(
        begun: &Begun,
        tenant: Tenant,
        vector_read: VectorToken,
        vector_write: VectorToken,
    ) -> Result<Self, ForeignRecord> {
        let upload = begun.upload();
        if upload.tenant_id != tenant.tenant_id {
            return Err(ForeignRecord);
        }
        let proof = Proof {
            presented: Presented::by(&upload.place().to_string()),
            credential: upload.key_id.clone(),
            user_id: None,
            groups: Groups::default(),
            grants: Grants {
                permissions: [Permission::DocumentsWrite].into(),
                expires_at: None,
                allowed_cidrs: None,
            },
        };
        Ok(Self { of_upload: true, ..Self::of(proof, tenant, vector_read, Some(vector_write)) })
    }

    fn of(proof: Proof, tenant: Tenant, vector_read: VectorToken, vector_write: Option<VectorToken>) -> Self {
        Self {
            tenant_id: tenant.tenant_id,
            status: tenant.status,
            epoch: tenant.epoch,
            tier: tenant.tier,
            presented: proof.presented,
            credential: proof.credential,
            user_id: proof.user_id,
            groups: proof.groups,
            grants: proof.grants,
            profile: Profile {
                company_name: tenant.company_name,
                assistant_name: tenant.assistant_name,
                instructions: tenant.instructions,
                injection_policy: tenant.injection_policy,
            },
            limits: tenant.limits,
            cell: tenant.cell,
            embedding: tenant.embedding,
            model_account: tenant.model_account,
            kms_key_arn: tenant.kms_key_arn,
            vector_read,
            vector_write,
            of_upload: false,
        }
    }

    /// The tenant.
    pub const fn tenant_id(&self) -> &TenantId {
        &self.tenant_id
    }

    /// The key, or the issuer of the token.
    pub const fn credential(&self) -> &CredentialId {
        &self.credential
    }

    /// The decision about the same key or issuer, made anew. The vector tokens stay; and of a token its user,
    /// that user's groups and its end, since its signature needs no second look.
    fn anew(&self, evidence: &Evidence, tenant: Tenant) -> Result<Self, ScopeError> {
        let (read, write) = (self.vector_read.clone(), self.vector_write.clone());
        let presented = self.presented.clone();
        if tenant.tenant_id != self.tenant_id || evidence.credential() != self.credential {
            return Err(ScopeError::Unauthorized);
        }
        let decision = match evidence {
            Evidence::Key(key) => Self::new(key, presented, tenant, read, write),
            Evidence::Issuer(issuer) => {
                let (Some(user_id), Some(ends)) = (self.user_id.clone(), self.grants.expires_at) else {
                    return Err(ScopeError::Unauthorized);
                };
                let user = Vouched::by(issuer, user_id, self.groups.clone(), ends);
                Self::vouched(&user, presented, tenant, read, write)
            }
        };
        decision.map_err(|ForeignRecord| ScopeError::Unauthorized)
    }

    /// The issuer, if a token was presented.
    fn issuer_id(&self) -> Option<&IssuerId> {
        match &self.credential {
            CredentialId::Issuer(issuer_id) => Some(issuer_id),
            CredentialId::Key(_) => None,
        }
    }

    /// The authorizer's context: flat, as API Gateway demands. `tenantId` and `keyId` stand apart for
    /// access logs and parameter mappings; functions read the decision alone.
    ///
    /// # Errors
    /// If the decision does not serialise, which a test rules out.
    pub fn to_context(&self) -> Result<HashMap<String, Value>, serde_json::Error> {
        Ok(HashMap::from([
            ("tenantId".to_owned(), self.tenant_id.to_string().into()),
            ("keyId".to_owned(), self.credential.to_string().into()),
            (DECISION.to_owned(), serde_json::to_string(self)?.into()),
        ]))
    }

    /// As [`Decision::to_context`], for an upload: with the request and the user that began it.
    ///
    /// # Errors
    /// As there.
    pub fn to_upload_context(&self, begun: &Begun) -> Result<HashMap<String, Value>, serde_json::Error> {
        let mut context = self.to_context()?;
        context.insert(REQUEST.to_owned(), begun.upload().request_id.to_string().into());
        if let Some(user) = &begun.upload().user_id {
            context.insert(USER.to_owned(), user.to_string().into());
        }
        Ok(context)
    }

    fn from_context(context: &HashMap<String, Value>) -> Option<Self> {
        serde_json::from_str(context.get(DECISION)?.as_str()?).ok()
    }

    /// Whether it lets a request in that needs `permission` and comes from `source`.
    fn lets_in(
        &self,
        permission: Permission,
        source: Option<IpAddr>,
        now: Timestamp,
    ) -> Result<(), ScopeError> {
        if self.grants.expires_at.is_some_and(|at| at <= now) {
            return Err(ScopeError::KeyExpired);
        }
        if !self.grants.allow(source) {
            return Err(ScopeError::AddressNotAllowed);
        }
        match self.status {
            TenantStatus::Active => {}
            TenantStatus::Suspended => return Err(ScopeError::Suspended),
            TenantStatus::Provisioning | TenantStatus::Deprovisioning => {
                return Err(ScopeError::Unauthorized);
            }
        }
        if !self.grants.permissions.contains(&permission) {
            return Err(ScopeError::Lacks(permission));
        }
        Ok(())
    }
}

/// Whether the tenants' processes are apart, as `template.yaml` has it: then a process of a function that
/// tenants' requests reach serves one tenant alone, whose id Lambda names with each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Each process is a tenant's.
    On,
    /// A process is nobody's in particular, and Lambda names no tenant.
    Off,
}

impl FromStr for Isolation {
    type Err = UnknownIsolation;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(UnknownIsolation),
        }
    }
}

/// A text that is neither `on` nor `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is neither `on` nor `off`")]
pub struct UnknownIsolation;

/// What a decision that is made anew rests on: the present record of the key, or of the token's issuer.
#[derive(Debug)]
pub enum Evidence {
    /// The key, verified again.
    Key(VerifiedKey),
    /// The issuer, which is still trusted.
    Issuer(Issuer),
}

impl Evidence {
    fn credential(&self) -> CredentialId {
        match self {
            Self::Key(key) => CredentialId::Key(key.record().key_id.clone()),
            Self::Issuer(issuer) => CredentialId::Issuer(issuer.issuer_id.clone()),
        }
    }
}

/// A record of one tenant where another's was expected. It must never happen; whoever meets it drops
/// the record and raises the alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a record of another tenant")]
pub struct ForeignRecord;

/// A request with a recognised key, before it is let in to anything.
#[derive(Debug)]
pub struct Caller {
    decision: Decision,
    user: Option<http::HeaderValue>,
    groups: Vec<http::HeaderValue>,
    presented: Option<ApiKey>,
    source: Option<IpAddr>,
    process: Option<String>,
    request_id: RequestId,
    note: RequestNote,
}

impl Caller {
    /// Who asks, from what API Gateway put into the event. Nothing that the caller wrote takes part,
    /// except the user's name and groups, which are only assertions. `process` is the tenant whose process this is,
    /// as Lambda says.
    ///
    /// # Errors
    /// [`ScopeError::Unauthorized`]; [`ScopeError::ForeignDecision`], with the alarm raised, if the
    /// decision is about another key or token than the one presented.
    pub fn of(
        context: &ApiGatewayProxyRequestContext,
        headers: &http::HeaderMap,
        process: Option<&str>,
        note: RequestNote,
    ) -> Result<Self, ScopeError> {
        let authorization = headers.get(http::header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let decision = Decision::from_context(&context.authorizer.fields).ok_or(ScopeError::Unauthorized)?;
        let presented = authorization.and_then(|value| ApiKey::from_authorization(value).ok());
        // One rule for keys and tokens, which needs to understand neither.
        let other =
            authorization.map(Presented::by).as_ref() != Some(&decision.presented) || decision.of_upload;
        if other {
            tracing::error!(
                alert = "isolation_alert",
                presented.tenant = presented.as_ref().map(|key| key.claimed_tenant().as_str()),
                "the gateway answered a key or token with the decision about another; the request is refused"
            );
            note.measure(|measured| measured.isolation_alerts += 1);
            return Err(ScopeError::ForeignDecision);
        }
        Ok(Self {
            decision,
            user: headers.get(USER_HEADER).cloned(),
            groups: headers.get_all(GROUPS_HEADER).iter().cloned().collect(),
            presented,
            // The connection's own address: what a header says of it, the caller may have written.
            source: context.identity.source_ip.as_deref().and_then(|text| text.parse().ok()),
            process: process.map(str::to_owned),
            request_id: RequestId(context.request_id.clone().unwrap_or_default()),
            note,
        })
    }

    /// Who began an upload that has come, from what the authorizer of uploads answered about it; `place` is where
    /// the file is.
    ///
    /// # Errors
    /// [`ScopeError::Unauthorized`]; [`ScopeError::ForeignDecision`], with the alarm raised, if the decision is
    /// about another upload, or another tenant.
    pub fn of_upload(
        context: &HashMap<String, Value>,
        place: &UploadPlace,
        note: RequestNote,
    ) -> Result<Self, ScopeError> {
        let mut decision = Decision::from_context(context).ok_or(ScopeError::Unauthorized)?;
        let own = decision.of_upload
            && decision.tenant_id == place.tenant_id
            && decision.presented == Presented::by(&place.to_string());
        if !own {
            tracing::error!(
                alert = "isolation_alert",
                tenant.id = %place.tenant_id,
                "an upload was answered with the decision about another; it is left alone"
            );
            note.measure(|measured| measured.isolation_alerts += 1);
            return Err(ScopeError::ForeignDecision);
        }
        let text = |name: &str| context.get(name).and_then(Value::as_str);
        decision.user_id =
            text(USER).map(UserId::from_str).transpose().map_err(|_| ScopeError::InvalidUser)?;
        Ok(Self {
            decision,
            user: None,
            groups: Vec::new(),
            presented: None,
            source: None,
            process: None,
            request_id: RequestId(text(REQUEST).unwrap_or_default().to_owned()),
            note,
        })
    }

    /// Makes sure that the request has come to a process that is its tenant's own, where processes are.
    ///
    /// # Errors
    /// [`ScopeError::Misdelivered`], with an alarm.
    pub fn delivered(&self, isolation: Isolation) -> Result<(), ScopeError> {
        let own = match isolation {
            Isolation::On => Some(self.decision.tenant_id.as_str()),
            Isolation::Off => None,
        };
        if self.process.as_deref() != own {
            tracing::error!(
                alert = "isolation_alert",
                tenant.id = %self.decision.tenant_id,
                process.tenant = self.process,
                "A request has come to a process that is not its tenant's own; it is refused"
            );
            self.note.measure(|measured| measured.isolation_alerts += 1);
            return Err(ScopeError::Misdelivered);
        }
        Ok(())
    }

    /// The tenant.
    pub fn tenant_id(&self) -> &TenantId {
        &self.decision.tenant_id
    }

    /// The key that was presented, or the issuer of the token that was.
    pub fn credential(&self) -> &CredentialId {
        &self.decision.credential
    }

    /// The tenant's limits.
    pub fn limits(&self) -> &Limits {
        &self.decision.limits
    }

    /// What is noted of the request.
    pub fn note(&self) -> &RequestNote {
        &self.note
    }

    /// Who asks.
    pub fn asked(&self) -> Asked {
        let asserted = || self.user.as_ref().and_then(|value| value.to_str().ok()?.parse().ok());
        Asked {
            request_id: self.request_id.clone(),
            key_id: Some(self.credential().clone()),
            user_id: self.decision.user_id.clone().or_else(asserted),
        }
    }

    /// Whether the decision was made while the tenant was switched off. It may be on again.
    pub fn is_suspended(&self) -> bool {
        self.decision.status == TenantStatus::Suspended
    }

    /// The key that the request presents.
    pub fn presented(&self) -> Option<&ApiKey> {
        self.presented.as_ref()
    }

    /// The issuer of the token that the request presents.
    pub fn issuer_id(&self) -> Option<&IssuerId> {
        self.decision.issuer_id()
    }

    /// Takes a new decision in the place of the one that API Gateway had kept, as [`TenantScope::renew`]
    /// does. What it allows is still to be seen.
    ///
    /// # Errors
    /// [`ScopeError::Unauthorized`] if it is about another key.
    pub fn renew(&mut self, evidence: &Evidence, tenant: Tenant) -> Result<(), ScopeError> {
        self.decision = self.decision.anew(evidence, tenant)?;
        Ok(())
    }

    /// The tenant's books, whether or not the caller is let in to anything else.
    pub fn ward(&self) -> Ward {
        Ward(self.decision.tenant_id.clone())
    }
}

/// One tenant's request: the only key to that tenant's data. It is not `Clone`, cannot be serialised,
/// and has no public constructor but [`TenantScope::open`].
#[derive(Debug)]
pub struct TenantScope {
    decision: Decision,
    permission: Permission,
    presented: Option<ApiKey>,
    source: Option<IpAddr>,
    user_id: Option<UserId>,
    groups: Groups,
    /// Whether it asks for a user whose groups are known, rather than for the tenant's application.
    held_to_groups: bool,
    request_id: RequestId,
    note: RequestNote,
}

/// What is noted of a request on its way: the tenant's standing, for the headers of its answer; records of
/// other tenants, for the ledger; and what is measured, for its line of the log.
#[derive(Clone, Debug, Default)]
pub struct RequestNote(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    standing: Option<Standing>,
    foreign: u64,
    arrived: Option<Arrived>,
    measured: Measured,
    /// How many more than one have to conclude the request.
    held: u32,
    ending: Option<Ending>,
}

impl RequestNote {
    /// Of a request that has just come.
    pub fn of(arrived: Arrived) -> Self {
        Self(Arc::new(Mutex::new(Noted { arrived: Some(arrived), ..Noted::default() })))
    }

    /// The request's place in a trace, to tell the services that are called for it.
    pub fn trace(&self) -> Option<Trace> {
        self.noted().arrived.as_ref()?.trace.clone()
    }

    /// Notes what is measured of the request.
    pub fn measure(&self, with: impl FnOnce(&mut Measured)) {
        with(&mut self.noted().measured);
    }

    /// The request does not end with the head of its answer: one more has to conclude it.
    pub fn hold(&self) {
        self.noted().held += 1;
    }

    /// One of those who work on the request is done with it; whoever is last gets its line. An error of any
    /// of them is the request's.
    #[must_use]
    pub fn conclude(&self, ending: Ending, now: Timestamp) -> Option<Line> {
        let mut noted = self.noted();
        let ending = match noted.ending {
            Some(Ending { status, error }) => Ending { status, error: error.or(ending.error) },
            None => ending,
        };
        noted.ending = Some(ending);
        if noted.held > 0 {
            noted.held -= 1;
            return None;
        }
        noted.measured.isolation_alerts += noted.foreign;
        let arrived = noted.arrived.take()?;
        Some(metrics::line(&arrived, &noted.measured, ending, now))
    }

    /// Notes the tenant's standing; the latest holds.
    pub fn set_standing(&self, standing: Standing) {
        self.noted().standing = Some(standing);
    }

    /// The standing that was noted last.
    pub fn standing(&self) -> Option<Standing> {
        self.noted().standing
    }

    /// How many records of other tenants the stores have answered with since this was last asked.
    pub fn take_foreign(&self) -> u64 {
        std::mem::take(&mut self.noted().foreign)
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who may touch the items of one tenant in the stores: its own request, or a function that
/// keeps its books. Nobody else can be made one.
pub trait Subject: sealed::Sealed + Sync {
    /// The tenant.
    fn tenant_id(&self) -> &TenantId;

    /// Whether something read from a store belongs to this tenant: the second look.
    ///
    /// # Errors
    /// [`ForeignRecord`] if it does not. Then the alarm is raised; of a request it is also noted for
    /// the ledger.
    fn owns(&self, tenant_id: &str, store: &str) -> Result<(), ForeignRecord> {
        if tenant_id == self.tenant_id().as_str() {
            return Ok(());
        }
        tracing::error!(
            alert = "isolation_alert",
            tenant.id = %self.tenant_id(),
            "{store} answered with a record of another tenant; it is dropped"
        );
        Err(ForeignRecord)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::TenantScope {}
    impl Sealed for super::Ward {}
    impl Sealed for super::Erasure {}
    impl Sealed for super::Expired {}
}

impl Subject for TenantScope {
    fn tenant_id(&self) -> &TenantId {
        &self.decision.tenant_id
    }

    fn owns(&self, tenant_id: &str, store: &str) -> Result<(), ForeignRecord> {
        self.ward().owns(tenant_id, store).inspect_err(|ForeignRecord| self.note.noted().foreign += 1)
    }
}

/// One tenant's books, without a request: what is left to write down once requests are gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ward(TenantId);

impl Ward {
    /// The books of a tenant that was looked up.
    pub(crate) fn of(tenant: &Tenant) -> Self {
        Self(tenant.tenant_id.clone())
    }
}

impl Subject for Ward {
    fn tenant_id(&self) -> &TenantId {
        &self.0
    }
}

/// A tenant that is being deprovisioned, for whoever holds its deprovisioning: the right to delete all that
/// it has. [`crate::aws::deprovisionings`] gives it, and nobody else can be made one.
#[derive(Debug)]
pub struct Erasure(Ward);

impl Erasure {
    /// Of the tenant whose deprovisioning is held.
    #[cfg(feature = "dynamodb")]
    pub(crate) fn of(saga: &crate::deprovisioning::Saga) -> Self {
        Self(Ward(saga.tenant_id.clone()))
    }

    /// The tenant's books.
    pub const fn ward(&self) -> &Ward {
        &self.0
    }
}

impl Subject for Erasure {
    fn tenant_id(&self) -> &TenantId {
        &self.0.0
    }
}

/// What of a tenant is past its retention: the right to delete what is as old as that, and nothing later.
#[derive(Debug)]
pub struct Expired {
    ward: Ward,
    until: Timestamp,
}

impl Expired {
    /// The last instant that is past the retention.
    pub const fn until(&self) -> Timestamp {
        self.until
    }

    /// The tenant's books.
    pub const fn ward(&self) -> &Ward {
        &self.ward
    }
}

impl Subject for Expired {
    fn tenant_id(&self) -> &TenantId {
        &self.ward.0
    }
}

/// A function that no caller reaches, driven by a stream or a schedule: it keeps every tenant's books.
/// Its role in `template.yaml` bounds what it can do with that.
#[derive(Debug)]
pub struct Bookkeeper(());

impl Bookkeeper {
    /// For the `Context` of such a function alone; `clippy.toml` bans it elsewhere.
    pub const fn driven_by_events() -> Self {
        Self(())
    }

    /// The books of one tenant.
    pub const fn of(&self, tenant_id: TenantId) -> Ward {
        Ward(tenant_id)
    }

    /// What is past the retention that the tenant's record says now.
    pub fn expired(&self, tenant: &Tenant, now: Timestamp) -> Expired {
        Expired { ward: Ward::of(tenant), until: tenant.limits.retained_since(now) }
    }
}

/// Why a request with a recognised key is refused all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// The request has come to a process that is not its tenant's own.
    #[error("the request cannot be handed to the tenant's own process right now; nothing was changed")]
    Misdelivered,
    /// The event did not come through the authorizer.
    #[error("the request carries no authorizer decision")]
    Unauthorized,
    /// The decision is about another key or token than the one that was presented. It must never happen.
    #[error("not a valid API key or token")]
    ForeignDecision,
    /// The key or token has expired since the decision was cached.
    #[error("not a valid API key or token")]
    KeyExpired,
    /// The key may not be used from where the request comes from.
    #[error("this key may not be used from this address")]
    AddressNotAllowed,
    /// The tenant is switched off.
    #[error("the tenant is suspended; its operator can say why")]
    Suspended,
    /// The key lacks a permission.
    #[error("this key lacks the scope `{}`", .0.as_str())]
    Lacks(Permission),
    /// The user's name cannot be used.
    #[error("the header X-User-Id must be UTF-8 text of 1 to 256 bytes")]
    InvalidUser,
    /// The user's groups cannot be used.
    #[error(
        "the header X-User-Groups must name at most {} groups, separated by commas; {InvalidGroup}",
        crate::groups::MOST_GROUPS
    )]
    InvalidGroups,
    /// The token does not vouch for all of the groups.
    #[error(
        "the header X-User-Groups names a group that the token does not; beside a token it can only leave out some"
    )]
    OtherGroups,
    /// The token is another user's.
    #[error("the header X-User-Id names another user than the token; leave it out")]
    OtherUser,
}

impl From<ScopeError> for ApiError {
    fn from(error: ScopeError) -> Self {
        let code = match error {
            ScopeError::Unauthorized | ScopeError::ForeignDecision | ScopeError::KeyExpired => {
                Code::InvalidKey
            }
            ScopeError::AddressNotAllowed => Code::IpNotAllowed,
            ScopeError::Suspended => Code::TenantSuspended,
            ScopeError::Misdelivered => Code::Unavailable,
            ScopeError::Lacks(_) => Code::InsufficientScope,
            ScopeError::InvalidUser | ScopeError::OtherUser => {
                return Self::invalid("X-User-Id", error.to_string());
            }
            ScopeError::InvalidGroups | ScopeError::OtherGroups => {
                return Self::invalid("X-User-Groups", error.to_string());
            }
        };
        Self::new(code, error.to_string())
    }
}

impl TenantScope {
    /// Opens the scope of a caller's request that needs `permission`.
    ///
    /// # Errors
    /// [`ScopeError`]; everything a cached decision cannot know is checked here, on each request.
    pub fn open(
        caller: Caller,
        permission: Permission,
        isolation: Isolation,
        now: Timestamp,
    ) -> Result<Self, ScopeError> {
        caller.delivered(isolation)?;
        let Caller { decision, user, groups, presented, source, process: _, request_id, note } = caller;
        decision.lets_in(permission, source, now)?;
        let user_id = user
            .map(|value| {
                std::str::from_utf8(value.as_bytes())
                    .ok()
                    .and_then(|text| UserId::from_str(text).ok())
                    .ok_or(ScopeError::InvalidUser)
            })
            .transpose()?;
        // What is verified is never overridden by what is asserted.
        let user_id = match (decision.user_id.clone(), user_id) {
            (Some(verified), Some(asserted)) if verified != asserted => return Err(ScopeError::OtherUser),
            (verified, asserted) => verified.or(asserted),
        };
        let asserted = if groups.is_empty() {
            None
        } else {
            Some(Groups::asserted(&groups).map_err(|InvalidGroup| ScopeError::InvalidGroups)?)
        };
        let vouched = decision.issuer_id().map(|_| decision.groups.clone());
        if let (Some(vouched), Some(asserted)) = (&vouched, &asserted)
            && !asserted.are_among(vouched)
        {
            return Err(ScopeError::OtherGroups);
        }
        let groups = asserted.or(vouched);
        Ok(Self {
            decision,
            permission,
            presented,
            source,
            user_id,
            held_to_groups: groups.is_some(),
            groups: groups.unwrap_or_default(),
            request_id,
            note,
        })
    }

    /// The key that the request presents: to verify it again where the decision about it has grown
    /// stale.
    pub fn presented(&self) -> Option<&ApiKey> {
        self.presented.as_ref()
    }

    /// Takes a new decision, made from the present records of the tenant and the key, in place of the
    /// one that API Gateway had kept. The vector tokens stay: they open this tenant's collection and
    /// nothing else, and a key that lost a permission is refused here.
    ///
    /// # Errors
    /// [`ScopeError`], as [`TenantScope::open`].
    pub fn renew(&mut self, evidence: &Evidence, tenant: Tenant, now: Timestamp) -> Result<(), ScopeError> {
        let decision = self.decision.anew(evidence, tenant)?;
        decision.lets_in(self.permission, self.source, now)?;
        self.decision = decision;
        Ok(())
    }

    /// The issuer of the token that was presented, if it was one.
    pub fn issuer_id(&self) -> Option<&IssuerId> {
        self.decision.issuer_id()
    }

    /// Whether this is the work on an upload. There is nothing to make its decision anew from here.
    pub fn is_of_upload(&self) -> bool {
        self.decision.of_upload
    }

    /// What the key or token may do: no more may be handed on in this request.
    pub fn grants(&self) -> &Grants {
        &self.decision.grants
    }

    /// The epoch of the decision about the key.
    pub fn epoch(&self) -> u64 {
        self.decision.epoch
    }

    /// What is noted of the request.
    pub fn note(&self) -> &RequestNote {
        &self.note
    }

    /// Who asks.
    pub fn asked(&self) -> Asked {
        Asked {
            request_id: self.request_id.clone(),
            key_id: Some(self.credential().clone()),
            user_id: self.user_id.clone(),
        }
    }

    /// The tenant's books beyond this request.
    pub fn ward(&self) -> Ward {
        Ward(self.decision.tenant_id.clone())
    }

    /// The tenant.
    pub fn tenant_id(&self) -> &TenantId {
        &self.decision.tenant_id
    }

    /// The tenant's own user, if the tenant named one or a token did.
    pub fn user_id(&self) -> Option<&UserId> {
        self.user_id.as_ref()
    }

    /// The groups of the user for whom the request asks; none if neither a token nor the tenant named any.
    /// They bound what a search finds.
    pub const fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Whether the record of a document of these groups may be read. A key that names no groups is the tenant's
    /// application itself, which manages all documents; whoever names some, and every token's user, reads
    /// what a search of theirs could find.
    pub fn may_read(&self, document: &Groups) -> bool {
        !self.held_to_groups || document.open_to(&self.groups)
    }

    /// The second look at a passage's readers: one that the request's user may not find is dropped by
    /// whoever asks, and the alarm raised, since the store was told.
    pub fn finds<'a>(&self, readers: impl IntoIterator<Item = &'a str>) -> bool {
        let found = self.groups.finds(readers);
        if !found {
            tracing::error!(
                alert = "group_alert",
                tenant.id = %self.tenant_id(),
                "The vector store answered with a passage that is not the user's to find; it is dropped"
            );
        }
        found
    }

    /// Takes the user that a parameter names, as if the header had: where that or a token names another, the
    /// request contradicts itself.
    ///
    /// # Errors
    /// [`ScopeError::OtherUser`].
    pub fn speak_for(&mut self, user: UserId) -> Result<(), ScopeError> {
        if self.user_id.get_or_insert_with(|| user.clone()) == &user {
            Ok(())
        } else {
            Err(ScopeError::OtherUser)
        }
    }

    /// The key that was presented, or the issuer of the token that was.
    pub fn credential(&self) -> &CredentialId {
        &self.decision.credential
    }

    /// The request.
    pub fn request_id(&self) -> &RequestId {
        &self.request_id
    }

    /// The tenant's tier.
    pub fn tier(&self) -> Tier {
        self.decision.tier
    }

    /// The tenant's limits.
    pub fn limits(&self) -> &Limits {
        &self.decision.limits
    }

    /// The tenant's assistant.
    pub fn profile(&self) -> &Profile {
        &self.decision.profile
    }

    /// The vector cluster that holds the tenant's collection.
    pub fn cell(&self) -> &str {
        &self.decision.cell
    }

    /// The embedding model of the tenant's collection.
    pub fn embedding(&self) -> &EmbeddingModel {
        &self.decision.embedding
    }

    /// Whose account at the model's service its questions are put to.
    pub fn model_account(&self) -> ModelAccount {
        self.decision.model_account
    }

    /// The KMS key that seals what is written, if the tenant has one of its own.
    pub fn kms_key(&self) -> Option<&KmsKeyArn> {
        self.decision.kms_key_arn.as_ref()
    }

    /// The token that reads the tenant's collection.
    pub fn vector_read(&self) -> &VectorToken {
        &self.decision.vector_read
    }

    /// The token that writes the tenant's collection; only keys that may write documents have one.
    pub fn vector_write(&self) -> Option<&VectorToken> {
        self.decision.vector_write.as_ref()
    }

    /// The second look, [`Subject::owns`].
    ///
    /// # Errors
    /// [`ForeignRecord`].
    pub fn owns(&self, tenant_id: &str, store: &str) -> Result<(), ForeignRecord> {
        Subject::owns(self, tenant_id, store)
    }
}

/// An operator, known to AWS IAM: the only key to the control plane.
#[derive(Debug)]
pub struct Operator {
    arn: String,
    request_id: RequestId,
    trace: Option<Trace>,
}

impl Operator {
    /// The operator whose signature API Gateway verified. `process` is the tenant whose process this is,
    /// as Lambda says: where there is one, no operator is let in, for what he sees is all tenants'.
    ///
    /// # Errors
    /// [`ScopeError::Unauthorized`] if the route was not signed; [`ScopeError::Misdelivered`].
    pub fn open(context: &ApiGatewayProxyRequestContext, process: Option<&str>) -> Result<Self, ScopeError> {
        if process.is_some() {
            tracing::error!(
                alert = "isolation_alert",
                process.tenant = process,
                "An operator's request has come to a tenant's process; it is refused"
            );
            return Err(ScopeError::Misdelivered);
        }
        let arn = context.identity.user_arn.clone().filter(|arn| !arn.is_empty());
        let request_id = RequestId(context.request_id.clone().unwrap_or_default());
        arn.map(|arn| Self { arn, request_id, trace: None }).ok_or(ScopeError::Unauthorized)
    }

    /// The same, at that place in a trace.
    #[must_use]
    pub fn traced(self, trace: Option<Trace>) -> Self {
        Self { trace, ..self }
    }

    /// Where in a trace the request is.
    pub const fn trace(&self) -> Option<&Trace> {
        self.trace.as_ref()
    }

    /// The request.
    pub const fn request_id(&self) -> &RequestId {
        &self.request_id
    }

    /// One tenant's books.
    pub const fn ward(&self, tenant_id: TenantId) -> Ward {
        Ward(tenant_id)
    }

    /// The operator's ARN.
    pub fn arn(&self) -> &str {
        &self.arn
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::api_key::{ApiKey, KeyRecord, verify};
    use crate::document::ContentType;
    use crate::ids::UploadId;
    use crate::issuer::KeySource;
    use crate::limits::LimitChanges;
    use crate::random::entropy;
    use crate::upload::Upload;

    const NOW: Timestamp = Timestamp::from_millis(1_790_000_000_000);
    /// What the tests' decisions are about.
    const PRESENTED: &str = "Bearer presented";

    fn headers() -> http::HeaderMap {
        http::HeaderMap::from_iter([(http::header::AUTHORIZATION, PRESENTED.parse().unwrap())])
    }

    fn tenant(id: &str, status: TenantStatus) -> Tenant {
        Tenant {
            tenant_id: id.parse().unwrap(),
            status,
            epoch: 3,
            tier: Tier::Free,
            company_name: "Acme \"&\" Co".into(),
            assistant_name: "Ada".into(),
            instructions: String::new(),
            injection_policy: InjectionPolicy::Flag,
            limits: Limits::of_tier(Tier::Free),
            overrides: LimitChanges::default(),
            cell: "default".into(),
            embedding: EmbeddingModel { name: "m".into(), dimensions: 4 },
            model_account: ModelAccount::Shared,
            kms_key_arn: None,
            webhook_url: None,
            created_at: NOW,
        }
    }

    fn context(
        status: TenantStatus,
        permissions: &[Permission],
        expires: Option<i64>,
    ) -> ApiGatewayProxyRequestContext {
        let tenant = tenant("acme", status);
        let key = ApiKey::issue(Tier::Free, tenant.tenant_id.clone(), &mut entropy());
        let record = KeyRecord::new(
            &key,
            permissions.iter().copied().collect(),
            NOW,
            expires.map(|ms| NOW.plus_millis(ms)),
        );
        let verified = verify(&key, Some(record), Some(status), NOW).unwrap();
        let token = || VectorToken::new("jwt-secret".into());
        let decision = Decision::new(&verified, Presented::by(PRESENTED), tenant, token(), None).unwrap();
        let mut context = ApiGatewayProxyRequestContext::default();
        context.request_id = Some("r-1".into());
        context.authorizer.fields = decision.to_context().unwrap();
        context
    }

    /// An upload that was begun with some key of the tenant's, by a user.
    fn begun(tenant: &str) -> Begun {
        let key = ApiKey::issue(Tier::Free, tenant.parse().unwrap(), &mut entropy());
        Begun::of(Upload {
            tenant_id: tenant.parse().unwrap(),
            upload_id: UploadId::new(&mut entropy()),
            document_id: "handbook".parse().unwrap(),
            groups: Groups::default(),
            content_type: ContentType::Plain,
            charset: None,
            size_bytes: 9,
            key_id: key.key_id().clone().into(),
            user_id: Some("ann\nof \u{fc}".parse().unwrap()),
            request_id: "r-7".to_owned().into(),
            created_at: NOW,
            expires_at: NOW.plus_millis(900_000),
            attempts: 0,
            claimed_until: None,
        })
    }

    fn ruled(begun: &Begun, status: TenantStatus) -> HashMap<String, Value> {
        let token = || VectorToken::new("jwt-secret".into());
        let tenant = tenant(begun.upload().tenant_id.as_str(), status);
        let decision = Decision::uploaded(begun, tenant, token(), token()).unwrap();
        decision.to_upload_context(begun).unwrap()
    }

    #[test]
    fn an_upload_opens_its_own_tenants_scope_to_write_documents_and_nothing_else() {
        let begun = begun("acme");
        let (upload, place) = (begun.upload(), begun.upload().place());
        let context = ruled(&begun, TenantStatus::Active);
        let open = |permission| {
            let caller = Caller::of_upload(&context, &place, RequestNote::default())?;
            TenantScope::open(caller, permission, Isolation::Off, NOW)
        };
        let scope = open(Permission::DocumentsWrite).unwrap();
        assert_eq!(scope.tenant_id().as_str(), "acme");
        assert_eq!((scope.credential(), scope.user_id()), (&upload.key_id, upload.user_id.as_ref()));
        assert_eq!(scope.request_id(), &upload.request_id);
        assert!(scope.is_of_upload() && scope.vector_write().is_some());
        for other in Permission::ALL.into_iter().filter(|p| *p != Permission::DocumentsWrite) {
            assert_eq!(open(other).unwrap_err(), ScopeError::Lacks(other));
        }
        // Neither another upload's, nor another tenant's, nor a request's.
        let other = self::begun("acme");
        let foreign = UploadPlace { tenant_id: "globex".parse().unwrap(), ..place.clone() };
        for place in [other.upload().place(), foreign] {
            let note = RequestNote::default();
            let refused = Caller::of_upload(&context, &place, note.clone()).unwrap_err();
            assert_eq!(refused, ScopeError::ForeignDecision);
            assert_eq!(note.noted().measured.isolation_alerts, 1);
        }
        let request = self::context(TenantStatus::Active, &[Permission::DocumentsWrite], None);
        let as_upload = Caller::of_upload(&request.authorizer.fields, &place, RequestNote::default());
        assert_eq!(as_upload.unwrap_err(), ScopeError::ForeignDecision);
        let mut as_request = ApiGatewayProxyRequestContext::default();
        as_request.authorizer.fields = context.clone();
        let authorization = format!("Bearer {place}").parse().unwrap();
        let headers = http::HeaderMap::from_iter([(http::header::AUTHORIZATION, authorization)]);
        let as_request = Caller::of(&as_request, &headers, None, RequestNote::default());
        assert_eq!(as_request.unwrap_err(), ScopeError::ForeignDecision);
        // A tenant that is not at work, and a record that is another's.
        let suspended = ruled(&begun, TenantStatus::Suspended);
        let caller = Caller::of_upload(&suspended, &place, RequestNote::default()).unwrap();
        let refused = TenantScope::open(caller, Permission::DocumentsWrite, Isolation::Off, NOW).unwrap_err();
        assert_eq!(refused, ScopeError::Suspended);
        let token = || VectorToken::new("jwt-secret".into());
        let another = tenant("globex", TenantStatus::Active);
        assert!(Decision::uploaded(&begun, another, token(), token()).is_err());
    }

    #[test]
    fn a_list_of_networks_holds_for_the_address_that_the_gateway_saw() {
        let tenant = tenant("acme", TenantStatus::Active);
        let key = ApiKey::issue(Tier::Free, tenant.tenant_id.clone(), &mut entropy());
        let networks = vec!["203.0.113.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        let grants = Grants { allowed_cidrs: Some(networks), ..Grants::all() };
        let verified =
            verify(&key, Some(KeyRecord::granted(&key, grants, None, NOW)), Some(tenant.status), NOW)
                .unwrap();
        let token = VectorToken::new("jwt-secret".into());
        let decision = Decision::new(&verified, Presented::by(PRESENTED), tenant, token, None).unwrap();
        let mut context = ApiGatewayProxyRequestContext::default();
        context.authorizer.fields = decision.to_context().unwrap();
        let mut headers = headers();
        headers.insert("x-forwarded-for", "203.0.113.7".parse().unwrap());
        let mut from = |address: Option<&str>| {
            context.identity.source_ip = address.map(str::to_owned);
            let caller = Caller::of(&context, &headers, None, RequestNote::default()).unwrap();
            TenantScope::open(caller, Permission::Chat, Isolation::Off, NOW).map(drop)
        };
        for inside in ["203.0.113.7", "::ffff:203.0.113.7", "2001:db8::7"] {
            assert_eq!(from(Some(inside)), Ok(()), "{inside}");
        }
        for outside in
            [Some("203.0.114.7"), Some("2001:db9::"), Some("::1"), Some("203.0.113.7:80"), Some(""), None]
        {
            assert_eq!(from(outside), Err(ScopeError::AddressNotAllowed), "{outside:?}");
        }
    }

    fn open(context: &ApiGatewayProxyRequestContext, at: Timestamp) -> Result<TenantScope, ScopeError> {
        open_in(context, Some("acme"), Isolation::On, at)
    }

    fn open_in(
        context: &ApiGatewayProxyRequestContext,
        process: Option<&str>,
        isolation: Isolation,
        at: Timestamp,
    ) -> Result<TenantScope, ScopeError> {
        let caller = Caller::of(context, &headers(), process, RequestNote::default())?;
        TenantScope::open(caller, Permission::Chat, isolation, at)
    }

    #[test]
    fn a_decision_travels_through_the_gateway() {
        let scope = open(&context(TenantStatus::Active, &[Permission::Chat], None), NOW).unwrap();
        assert_eq!(scope.tenant_id().as_str(), "acme");
        assert_eq!(scope.profile().company_name, "Acme \"&\" Co");
        assert!(scope.vector_write().is_none());
        assert!(!format!("{scope:?}").contains("jwt-secret"));
    }

    #[test]
    fn what_a_cached_decision_cannot_know_is_checked_on_each_request() {
        let chat = &[Permission::Chat];
        let refused = |context, at| open(&context, at).unwrap_err();
        assert_eq!(refused(ApiGatewayProxyRequestContext::default(), NOW), ScopeError::Unauthorized);
        assert_eq!(refused(context(TenantStatus::Suspended, chat, None), NOW), ScopeError::Suspended);
        assert_eq!(
            refused(context(TenantStatus::Active, &[Permission::UsageRead], None), NOW),
            ScopeError::Lacks(Permission::Chat)
        );
        // One made while the tenant was switched off is made anew, and then lets in.
        let suspended = context(TenantStatus::Suspended, chat, None);
        let mut caller = Caller::of(&suspended, &headers(), None, RequestNote::default()).unwrap();
        assert!(caller.is_suspended());
        let key = ApiKey::issue(Tier::Free, "acme".parse().unwrap(), &mut entropy());
        let record = KeyRecord::new(&key, BTreeSet::from([Permission::Chat]), NOW, None);
        let other = verify(&key, Some(record), Some(TenantStatus::Active), NOW).unwrap();
        let active = tenant("acme", TenantStatus::Active);
        assert_eq!(caller.renew(&Evidence::Key(other), active).unwrap_err(), ScopeError::Unauthorized);
        assert!(caller.is_suspended());
        let expiring = context(TenantStatus::Active, chat, Some(10));
        assert!(open(&expiring, NOW.plus_millis(9)).is_ok());
        assert_eq!(refused(expiring, NOW.plus_millis(10)), ScopeError::KeyExpired);
    }

    #[test]
    fn a_scope_opens_in_its_tenants_own_process_alone() {
        let context = context(TenantStatus::Active, &[Permission::Chat], None);
        let with = |process, isolation| open_in(&context, process, isolation, NOW).map(|_| ());
        assert_eq!(with(Some("acme"), Isolation::On), Ok(()));
        for other in [None, Some(""), Some("globex"), Some("acme1"), Some("ACME"), Some("acme ")] {
            assert_eq!(with(other, Isolation::On), Err(ScopeError::Misdelivered), "{other:?}");
        }
        assert_eq!(with(None, Isolation::Off), Ok(()));
        // Lambda names nobody where the mode is off: template and environment contradict each other.
        assert_eq!(with(Some("acme"), Isolation::Off), Err(ScopeError::Misdelivered));
        assert_eq!(ApiError::from(ScopeError::Misdelivered).code.status(), 503);

        assert_eq!("on".parse(), Ok(Isolation::On));
        assert_eq!("off".parse(), Ok(Isolation::Off));
        for unclear in ["", "On", "true", "0", "off "] {
            assert_eq!(unclear.parse::<Isolation>(), Err(UnknownIsolation), "{unclear}");
        }
    }

    #[test]
    fn a_decision_about_another_key_opens_nothing() {
        let context = context(TenantStatus::Active, &[Permission::Chat], None);
        let presenting = |authorization: &str| {
            let mut headers = headers();
            headers.insert(http::header::AUTHORIZATION, authorization.parse().unwrap());
            Caller::of(&context, &headers, None, RequestNote::default()).map(drop)
        };
        for tenant in ["acme", "acme-1", "globex"] {
            let other = ApiKey::issue(Tier::Free, tenant.parse().unwrap(), &mut entropy());
            let refused = presenting(&format!("Bearer {}", other.expose()));
            assert_eq!(refused, Err(ScopeError::ForeignDecision), "{tenant}");
        }
        for other in ["Bearer header.claims.signature", "Bearer presented2", "Bearer", ""] {
            assert_eq!(presenting(other), Err(ScopeError::ForeignDecision), "{other}");
        }
        assert_eq!(presenting("bearer  presented "), Ok(()), "the same, however it is written");
        let none = Caller::of(&context, &http::HeaderMap::new(), None, RequestNote::default());
        assert_eq!(none.map(drop), Err(ScopeError::ForeignDecision));
    }

    #[test]
    fn the_user_is_text_of_bounded_length() {
        let context = context(TenantStatus::Active, &[Permission::Chat], None);
        let with = |value: &[u8]| {
            let mut headers = headers();
            headers.insert(USER_HEADER, http::HeaderValue::from_bytes(value).unwrap());
            let caller = Caller::of(&context, &headers, None, RequestNote::default()).unwrap();
            TenantScope::open(caller, Permission::Chat, Isolation::Off, NOW)
        };
        assert_eq!(with("zoë".as_bytes()).unwrap().user_id().unwrap().as_str(), "zoë");
        for bad in [&b""[..], &b"\xff"[..], &[b'x'; 257][..]] {
            assert_eq!(with(bad).unwrap_err(), ScopeError::InvalidUser);
        }
    }

    fn issuer(id: &str, permissions: &[Permission]) -> Issuer {
        Issuer {
            tenant_id: "acme".parse().unwrap(),
            issuer_id: id.parse().unwrap(),
            issuer: "https://login.acme.example".into(),
            audience: "bulkhead".into(),
            keys: KeySource::Keys(Vec::new()),
            user_claim: "sub".into(),
            groups_claim: "groups".into(),
            grants: Grants { permissions: permissions.iter().copied().collect(), ..Grants::all() },
            created_at: NOW,
        }
    }

    fn groups(names: &[&str]) -> Groups {
        Groups::claimed(Some(&Value::from(names.to_vec()))).unwrap()
    }

    fn vouched(issuer: &Issuer, asserted: Option<&str>) -> Result<TenantScope, ScopeError> {
        vouched_with(issuer, asserted.map(|user| (USER_HEADER, user)))
    }

    fn vouched_with(
        issuer: &Issuer,
        header: Option<(&'static str, &str)>,
    ) -> Result<TenantScope, ScopeError> {
        let user = Vouched::by(issuer, "ann".parse().unwrap(), groups(&["hr", "legal"]), NOW.plus_millis(10));
        let token = VectorToken::new("jwt-secret".into());
        let decision = Decision::vouched(
            &user,
            Presented::by(PRESENTED),
            tenant("acme", TenantStatus::Active),
            token,
            None,
        )
        .unwrap();
        let mut context = ApiGatewayProxyRequestContext::default();
        context.authorizer.fields = decision.to_context().unwrap();
        let mut headers = headers();
        header.map(|(name, value)| headers.insert(name, value.parse().unwrap()));
        let caller = Caller::of(&context, &headers, None, RequestNote::default()).unwrap();
        assert_eq!(caller.asked().user_id.unwrap().as_str(), "ann");
        TenantScope::open(caller, Permission::Chat, Isolation::Off, NOW)
    }

    #[test]
    fn a_verified_user_is_never_overridden() {
        let issuer = issuer("iss_0123456789ab", &[Permission::Chat]);
        for same in [None, Some("ann")] {
            assert_eq!(vouched(&issuer, same).unwrap().user_id().unwrap().as_str(), "ann");
        }
        for other in ["bob", "Ann", "ann\u{fffd}"] {
            let error = vouched(&issuer, Some(other)).unwrap_err();
            assert!(matches!(error, ScopeError::OtherUser | ScopeError::InvalidUser), "{other}");
        }
        let none = Vouched::by(&issuer, "ann".parse().unwrap(), Groups::default(), NOW);
        let other = tenant("acme1", TenantStatus::Active);
        let token = VectorToken::new(String::new());
        assert_eq!(
            Decision::vouched(&none, Presented::by(PRESENTED), other, token, None).unwrap_err(),
            ForeignRecord
        );
    }

    #[test]
    fn groups_beside_a_token_leave_out_some_and_add_none() {
        let issuer = issuer("iss_0123456789ab", &[Permission::Chat]);
        let with = |header: Option<&str>| vouched_with(&issuer, header.map(|value| (GROUPS_HEADER, value)));
        for (header, expected) in [
            (None, &["hr", "legal"][..]),
            (Some("legal, hr"), &["hr", "legal"]),
            (Some("hr"), &["hr"]),
            (Some(""), &[]),
        ] {
            let mut scope = with(header).unwrap();
            assert_eq!(scope.groups(), &groups(expected), "{header:?}");
            assert_eq!(scope.may_read(&groups(&["legal"])), expected.contains(&"legal"));
            // They are the same once the decision was made anew.
            let active = tenant("acme", TenantStatus::Active);
            scope.renew(&Evidence::Issuer(issuer.clone()), active, NOW).unwrap();
            assert_eq!(scope.groups(), &groups(expected), "{header:?}");
            assert_eq!(scope.decision.groups, groups(&["hr", "legal"]));
        }
        for wider in ["finance", "hr,finance", "HR"] {
            assert_eq!(with(Some(wider)).unwrap_err(), ScopeError::OtherGroups, "{wider}");
        }
        assert_eq!(with(Some("*")).unwrap_err(), ScopeError::InvalidGroups);
        assert!(!format!("{:?}", with(None).unwrap()).contains("legal"));
    }

    /// A scope of tenant `acme` whose request names these groups.
    pub(crate) fn in_groups(groups: &'static str) -> TenantScope {
        let mut headers = headers();
        headers.insert(GROUPS_HEADER, http::HeaderValue::from_static(groups));
        let context = context(TenantStatus::Active, &[Permission::Chat], None);
        let caller = Caller::of(&context, &headers, None, RequestNote::default()).unwrap();
        TenantScope::open(caller, Permission::Chat, Isolation::Off, NOW).unwrap()
    }

    #[test]
    fn groups_beside_a_key_are_what_the_tenant_asserts() {
        let context = context(TenantStatus::Active, &[Permission::Chat], None);
        let with = |lines: &[&str]| {
            let mut headers = headers();
            for line in lines {
                headers.append(GROUPS_HEADER, line.parse().unwrap());
            }
            let caller = Caller::of(&context, &headers, None, RequestNote::default()).unwrap();
            TenantScope::open(caller, Permission::Chat, Isolation::Off, NOW)
        };
        assert_eq!(with(&["hr", "legal"]).unwrap().groups(), &groups(&["hr", "legal"]));
        let (application, user) = (with(&[]).unwrap(), with(&[""]).unwrap());
        for scope in [&application, &user] {
            assert!(scope.groups().is_empty());
            assert!(scope.finds(["*"]) && !scope.finds(["hr"]) && !scope.finds([]));
        }
        // The application manages documents that no search of its own finds.
        assert!(application.may_read(&groups(&["hr"])) && !user.may_read(&groups(&["hr"])));
        for bad in ["*", "hr,", "hr,,legal"] {
            let error = ApiError::from(with(&[bad]).unwrap_err());
            assert_eq!(error.param.as_deref(), Some("X-User-Groups"), "{bad}");
            assert!(!error.message.contains("legal"), "{}", error.message);
        }
    }

    #[test]
    fn a_stale_decision_about_a_token_needs_the_issuer_as_it_was() {
        let chat = issuer("iss_0123456789ab", &[Permission::Chat, Permission::KeysWrite]);
        let renew = |issuer: &Issuer, id, status, at| {
            let mut scope = vouched(&chat, None).unwrap();
            scope.renew(&Evidence::Issuer(issuer.clone()), tenant(id, status), at)?;
            // Nobody keeps a token's user by renewing it, nor gets a permission that tokens cannot have.
            assert_eq!(scope.user_id().unwrap().as_str(), "ann");
            assert_eq!(scope.grants().permissions, [Permission::Chat].into());
            assert_eq!(scope.grants().expires_at, Some(NOW.plus_millis(10)));
            Ok(())
        };
        let active = TenantStatus::Active;
        assert_eq!(renew(&chat, "acme", active, NOW), Ok(()));
        assert_eq!(renew(&chat, "acme", active, NOW.plus_millis(10)), Err(ScopeError::KeyExpired));
        assert_eq!(renew(&chat, "acme", TenantStatus::Suspended, NOW), Err(ScopeError::Suspended));
        assert_eq!(renew(&chat, "acme1", active, NOW), Err(ScopeError::Unauthorized));
        let other = issuer("iss_0123456789ac", &[Permission::Chat]);
        assert_eq!(renew(&other, "acme", active, NOW), Err(ScopeError::Unauthorized));
        let less = issuer("iss_0123456789ab", &[Permission::UsageRead]);
        assert_eq!(renew(&less, "acme", active, NOW), Err(ScopeError::Lacks(Permission::Chat)));
        // A key's decision is not renewed as a token's.
        let mut scope = open(&context(active, &[Permission::Chat], None), NOW).unwrap();
        let error = scope.renew(&Evidence::Issuer(chat), tenant("acme", active), NOW).unwrap_err();
        assert_eq!(error, ScopeError::Unauthorized);
    }

    #[test]
    fn a_key_never_opens_another_tenants_record() {
        let key = ApiKey::issue(Tier::Free, "acme1".parse().unwrap(), &mut entropy());
        let record = KeyRecord::new(&key, BTreeSet::new(), NOW, None);
        let verified = verify(&key, Some(record), Some(TenantStatus::Active), NOW).unwrap();
        let other = tenant("acme-1", TenantStatus::Active);
        let token = VectorToken::new(String::new());
        assert_eq!(
            Decision::new(&verified, Presented::by(PRESENTED), other, token, None).unwrap_err(),
            ForeignRecord
        );
    }

    #[test]
    fn an_operator_is_one_whom_iam_named() {
        let mut context = ApiGatewayProxyRequestContext::default();
        assert!(Operator::open(&context, None).is_err());
        context.identity.user_arn = Some(String::new());
        assert!(Operator::open(&context, None).is_err());
        context.identity.user_arn = Some("arn:aws:iam::1:user/op".into());
        assert_eq!(Operator::open(&context, None).unwrap().arn(), "arn:aws:iam::1:user/op");
        let in_a_tenants = Operator::open(&context, Some("acme"));
        assert_eq!(in_a_tenants.unwrap_err(), ScopeError::Misdelivered);
    }

    #[test]
    fn whoever_is_last_concludes_a_request_and_an_error_of_any_is_its_own() {
        let note = || {
            RequestNote::of(Arrived {
                request_id: RequestId::from("r-1".to_owned()),
                method: "POST".to_owned(),
                route: "/v1/chat".to_owned(),
                trace: None,
                at: Timestamp::from_millis(0),
            })
        };
        let ok = Ending { status: http::StatusCode::OK, error: None };
        let failed = Ending { error: Some(Code::ModelUnavailable), ..ok };
        let now = Timestamp::from_millis(5);
        let alone = note();
        assert!(alone.conclude(ok, now).is_some() && alone.conclude(ok, now).is_none());
        for (first, second) in [(ok, failed), (failed, ok)] {
            let both = note();
            both.hold();
            assert!(both.conclude(first, now).is_none());
            let line = both.conclude(second, now).unwrap().render("n");
            assert!(line.contains("model_unavailable") && line.contains("\"Failed\":1"), "{line}");
        }
    }
}
