//! With whose credentials the stores are spoken to: the function's own, or those of a session that is
//! one tenant's alone.
//!
//! A function that acts for tenants has no access of its own to their data. For each tenant it assumes
//! the role that `TENANT_ROLE_ARN` names, tagged with the tenant's id, and the role's policies open that
//! tenant's partition keys, objects and secrets and nothing else. So a call that names another tenant is
//! refused by the store, whatever the code believed.
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/id_session-tags.html>

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider, future};
use aws_sdk_sts::config::IdentityCache;
use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sts::operation::assume_role::AssumeRoleError;
use aws_sdk_sts::types::Tag;
use aws_types::SdkConfig;

#[cfg(feature = "secrets")]
use super::secrets_manager::SecretsManager;
use crate::env::{self, EnvError};
use crate::tenant::TenantId;

/// The session tag that the role's policies compare partition keys, prefixes and names with.
pub const TENANT_TAG: &str = "tenant_id";
/// How long a session lasts: the most for a role that is assumed by a role.
const LIFETIME: Duration = Duration::from_secs(3_600);
/// A session with less than this left is replaced, so that whatever begins with one ends with it: the
/// longest request, and links that are given away ([`LINKS_HOLD`]).
const LEFT_AT_LEAST: Duration = Duration::from_secs(1_200);
/// With at least this left a session still serves while STS does not answer: the longest request and a margin.
/// Links that are given away then end earlier than they say.
const LEFT_IN_NEED: Duration = Duration::from_secs(300);
/// How long STS is waited for while there is a session that still serves, and for how long it is not asked again
/// once it has not answered.
const PATIENCE: Duration = Duration::from_secs(1);
const REST: Duration = Duration::from_secs(10);
/// How long a link may hold that is signed with a session.
pub const LINKS_HOLD: Duration = Duration::from_secs(900);
/// Sessions remembered. An instance that sees more tenants than this opens some of them again.
const REMEMBERED: usize = 512;

/// With whose credentials stores are spoken to.
#[derive(Clone)]
pub struct Access(Arc<Inner>);

struct Inner {
    own: Arc<Session>,
    role: Option<TenantRole>,
    known: Mutex<HashMap<TenantId, Arc<Session>>>,
}

struct TenantRole {
    /// Made with the first session: no function waits for it at its start.
    sts: OnceLock<aws_sdk_sts::Client>,
    arn: String,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Access").field(&self.0.role.as_ref().map(|role| &role.arn)).finish()
    }
}

impl Access {
    /// The function's own role: for the control plane and those who keep all tenants' books.
    pub fn own(config: &SdkConfig) -> Self {
        Self::new(config, None)
    }

    /// A session for each tenant, in the role that `TENANT_ROLE_ARN` names.
    ///
    /// # Errors
    /// If the variable is absent; the error names it.
    pub fn per_tenant(config: &SdkConfig) -> Result<Self, EnvError> {
        let role = TenantRole { sts: OnceLock::new(), arn: env::role_arn("TENANT_ROLE_ARN")? };
        Ok(Self::new(config, Some(role)))
    }

    /// The function's own role where `TENANT_ROLE_ARN` is `none`, a session for each tenant elsewhere: for a
    /// program that serves tenants under one name and operators under another.
    ///
    /// # Errors
    /// If the variable is absent; the error names it.
    pub fn from_env(config: &SdkConfig) -> Result<Self, EnvError> {
        if env::text("TENANT_ROLE_ARN")? == "none" { Ok(Self::own(config)) } else { Self::per_tenant(config) }
    }

    fn new(config: &SdkConfig, role: Option<TenantRole>) -> Self {
        let own = Arc::new(Session::new(config.clone()));
        Self(Arc::new(Inner { own, role, known: Mutex::default() }))
    }

    /// What acts for a tenant. Its credentials are fetched with its first call, and again shortly before
    /// they expire.
    pub(super) fn of(&self, tenant: &TenantId) -> Arc<Session> {
        let Some(role) = &self.0.role else { return self.own_role() };
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = known.get(tenant) {
            return Arc::clone(session);
        }
        if known.len() >= REMEMBERED
            && let Some(any) = known.keys().next().cloned()
        {
            known.remove(&any);
        }
        let session = Arc::new(Session::new(role.config(&self.0.own.config, tenant)));
        known.insert(tenant.clone(), Arc::clone(&session));
        session
    }

    /// The function's own role, for what is no tenant's.
    pub(super) fn own_role(&self) -> Arc<Session> {
        Arc::clone(&self.0.own)
    }
}

impl TenantRole {
    /// The function's configuration with the tenant's credentials, and a cache of its own for them.
    fn config(&self, own: &SdkConfig, tenant: &TenantId) -> SdkConfig {
        let credentials = TenantCredentials {
            sts: self.sts.get_or_init(|| aws_sdk_sts::Client::new(own)).clone(),
            role: self.arn.clone(),
            tenant: tenant.clone(),
            own: own.clone(),
            last: Mutex::default(),
        };
        own.to_builder()
            .credentials_provider(SharedCredentialsProvider::new(credentials))
            // The cache takes up to half off again at random, lest all instances ask at once.
            .identity_cache(IdentityCache::lazy().buffer_time(LEFT_AT_LEAST * 2).build())
            .build()
    }
}

/// One identity, and its clients.
pub(super) struct Session {
    config: SdkConfig,
    #[cfg(feature = "dynamodb")]
    pub(super) data_keys: super::data_keys::Remembered,
    #[cfg(feature = "dynamodb")]
    dynamodb: OnceLock<aws_sdk_dynamodb::Client>,
    #[cfg(feature = "data-keys")]
    kms: OnceLock<aws_sdk_kms::Client>,
    #[cfg(feature = "objects")]
    s3: OnceLock<aws_sdk_s3::Client>,
    #[cfg(feature = "secrets")]
    secrets: OnceLock<SecretsManager>,
}

impl Session {
    fn new(config: SdkConfig) -> Self {
        Self {
            config,
            #[cfg(feature = "dynamodb")]
            data_keys: super::data_keys::Remembered::default(),
            #[cfg(feature = "dynamodb")]
            dynamodb: OnceLock::new(),
            #[cfg(feature = "data-keys")]
            kms: OnceLock::new(),
            #[cfg(feature = "objects")]
            s3: OnceLock::new(),
            #[cfg(feature = "secrets")]
            secrets: OnceLock::new(),
        }
    }

    #[cfg(feature = "dynamodb")]
    pub(super) fn dynamodb(&self) -> &aws_sdk_dynamodb::Client {
        self.dynamodb.get_or_init(|| aws_sdk_dynamodb::Client::new(&self.config))
    }

    #[cfg(feature = "data-keys")]
    pub(super) fn kms(&self) -> &aws_sdk_kms::Client {
        self.kms.get_or_init(|| aws_sdk_kms::Client::new(&self.config))
    }

    #[cfg(feature = "objects")]
    pub(super) fn s3(&self, settings: fn(&SdkConfig) -> aws_sdk_s3::Config) -> &aws_sdk_s3::Client {
        self.s3.get_or_init(|| aws_sdk_s3::Client::from_conf(settings(&self.config)))
    }

    #[cfg(feature = "secrets")]
    pub(super) fn secrets(&self) -> &SecretsManager {
        self.secrets.get_or_init(|| SecretsManager::new(&self.config))
    }
}

/// Credentials of one tenant's session.
struct TenantCredentials {
    sts: aws_sdk_sts::Client,
    role: String,
    tenant: TenantId,
    /// The function's own configuration, which knows the time.
    own: SdkConfig,
    last: Mutex<Option<Last>>,
}

/// The credentials that were given last.
struct Last {
    credentials: Credentials,
    /// Until when STS is not asked, since it has not answered.
    rests_until: Option<SystemTime>,
}

impl fmt::Debug for TenantCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TenantCredentials").field("tenant", &self.tenant).finish_non_exhaustive()
    }
}

impl TenantCredentials {
    /// New credentials; those of before while STS does not answer and they still serve.
    async fn provide(&self) -> Result<Credentials, CredentialsError> {
        let Some((last, rests)) = self.last() else { return self.renew().await };
        if rests {
            return Ok(last);
        }
        let error = match tokio::time::timeout(PATIENCE, self.renew()).await {
            Ok(Ok(given)) => return Ok(given),
            // That is an answer: nobody is to act for the tenant any more.
            Ok(Err(error)) if is_denied(&error) => return Err(error),
            Ok(Err(error)) => error,
            Err(_) => CredentialsError::provider_timed_out(PATIENCE),
        };
        tracing::warn!(
            tenant.id = %self.tenant,
            "STS does not answer; the session of before still serves: {error}"
        );
        self.rest();
        Ok(last)
    }

    /// The credentials of before, if they still serve, and whether STS is left alone for now.
    fn last(&self) -> Option<(Credentials, bool)> {
        let (now, last) = (self.now(), self.last.lock().unwrap_or_else(PoisonError::into_inner));
        let last = last.as_ref()?;
        let serves = last.credentials.expiry().is_some_and(|end| now + LEFT_IN_NEED <= end);
        serves.then(|| (last.credentials.clone(), last.rests_until.is_some_and(|until| now < until)))
    }

    fn now(&self) -> SystemTime {
        self.own.time_source().unwrap_or_default().now()
    }

    fn rest(&self) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_mut() {
            last.rests_until = Some(self.now() + REST);
        }
    }

    async fn renew(&self) -> Result<Credentials, CredentialsError> {
        let credentials = self.assume().await?;
        let last = Last { credentials: credentials.clone(), rests_until: None };
        self.last.lock().unwrap_or_else(PoisonError::into_inner).replace(last);
        Ok(credentials)
    }

    async fn assume(&self) -> Result<Credentials, CredentialsError> {
        let tag = Tag::builder().key(TENANT_TAG).value(self.tenant.as_str()).build();
        let call = self
            .sts
            .assume_role()
            .role_arn(&self.role)
            // It stands in CloudTrail beside every call of the session.
            .role_session_name(self.tenant.as_str())
            .duration_seconds(i32::try_from(LIFETIME.as_secs()).unwrap_or(i32::MAX))
            .tags(tag.map_err(CredentialsError::invalid_configuration)?);
        let answer = call.send().await.map_err(CredentialsError::provider_error)?;
        let given = answer.credentials.ok_or_else(|| CredentialsError::unhandled("no credentials"))?;
        let expires_at = given.expiration.try_into().map_err(CredentialsError::unhandled)?;
        let token = Some(given.session_token);
        Ok(Credentials::new(given.access_key_id, given.secret_access_key, token, Some(expires_at), "tenant"))
    }
}

/// Whether STS has answered that the session may not be had.
fn is_denied(error: &CredentialsError) -> bool {
    let source = std::error::Error::source(error);
    let refusal = source.and_then(|source| source.downcast_ref::<SdkError<AssumeRoleError>>());
    refusal.is_some_and(|refusal| refusal.code() == Some("AccessDenied"))
}

impl ProvideCredentials for TenantCredentials {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.provide())
    }

    fn fallback_on_interrupt(&self) -> Option<Credentials> {
        Some(self.last()?.0)
    }
}
