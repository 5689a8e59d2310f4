//! KMS: the data keys of tenants that have a key of their own. [`crate::sealing`] is what they are for.
//!
//! Each call names the tenant in its encryption context, and the policies of tenants' sessions compare that with
//! the session's tag: a session opens no data key of another tenant's, whatever the code believed.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::session::{Access, Session};
use crate::error::ApiError;
use crate::scope::{Operator, TenantScope};
use crate::sealing::{DataKey, KmsKeyArn, SealError, WrappedKey};
use crate::tenant::TenantId;

/// How long a data key is remembered. A key that is switched off in KMS is used until then.
const REMEMBERED: Duration = Duration::from_secs(300);
/// Data keys remembered for a tenant. What has been sealed with more of them takes calls of KMS again.
const MOST_REMEMBERED: usize = 256;
/// How long a process seals with one data key. Between, it is forgotten, and opened again when it is needed: so
/// that what is read together was sealed with few.
const SEALS_FOR: Duration = Duration::from_secs(86_400);
/// Data keys opened at the same time.
const AT_ONCE: usize = 8;

/// What KMS says of a key that cannot be used, or of what it has not wrapped for this tenant.
#[cfg(any(feature = "data-keys", feature = "objects"))]
pub(super) const REFUSALS: [&str; 12] = [
    "AccessDeniedException",
    "DisabledException",
    "IncorrectKeyException",
    "InvalidArnException",
    "InvalidCiphertextException",
    "InvalidGrantTokenException",
    "InvalidKeyUsageException",
    "KMSInvalidStateException",
    "NotFoundException",
    "OptInRequired",
    "UnsupportedOperationException",
    "ValidationException",
];

/// The data keys of tenants.
#[derive(Clone, Debug)]
pub struct DataKeys(Access);

/// Why there is no data key. Never holds one.
#[derive(Debug, thiserror::Error)]
pub enum DataKeyError {
    /// KMS refuses the tenant's key: it is switched off, gone, or not for us to use.
    #[error("KMS does not let the tenant's key be used: {code}")]
    Refused {
        /// AWS's error code.
        code: String,
        /// The failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// KMS did not answer.
    #[error("KMS did not answer for the tenant's key: {code}")]
    Unreachable {
        /// AWS's error code, or what kind of failure it was.
        code: String,
        /// The failure.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// KMS answered with something that is no data key.
    #[error("KMS answered with what is no data key")]
    Malformed(#[from] SealError),
}

impl From<DataKeyError> for ApiError {
    /// What the caller sees. The failure itself is logged here, once.
    fn from(error: DataKeyError) -> Self {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        tracing::error!(alert = "tenant_key_unusable", source, "{error}");
        Self::unavailable("the tenant's key service")
    }
}

impl DataKeys {
    /// Of the tenants that are acted for.
    pub fn new(access: &Access) -> Self {
        Self(access.clone())
    }

    /// The data key that what a request writes is sealed with; none for a tenant without a key of its own, at the
    /// price of nothing. To be asked for before anything is spent: without it nothing can be stored.
    ///
    /// # Errors
    /// [`DataKeyError`].
    pub async fn of(&self, scope: &TenantScope) -> Result<Option<Arc<DataKey>>, DataKeyError> {
        let Some(arn) = scope.kms_key() else { return Ok(None) };
        let (tenant, session) = (scope.tenant_id(), self.0.of(scope.tenant_id()));
        if let Some(wrapped) = session.data_keys.sealing(tenant, arn) {
            return Box::pin(opened(&session, tenant, &wrapped)).await.map(Some);
        }
        let key = Arc::new(Box::pin(kms::generate(&session, tenant, arn)).await?);
        session.data_keys.seal_with(tenant, &key);
        Ok(Some(key))
    }

    /// Tries a key that a tenant is to have. KMS makes a data key of it and shows nobody: what a description of
    /// the key would not tell is whether it may be used.
    ///
    /// # Errors
    /// [`DataKeyError::Refused`] if it cannot be used.
    pub async fn try_key(
        &self,
        _operator: &Operator,
        tenant: &TenantId,
        arn: &KmsKeyArn,
    ) -> Result<(), DataKeyError> {
        Box::pin(kms::try_key(&self.0.of(tenant), tenant, arn)).await
    }
}

/// A data key, opened by KMS or remembered.
async fn opened(
    session: &Session,
    tenant: &TenantId,
    wrapped: &WrappedKey,
) -> Result<Arc<DataKey>, DataKeyError> {
    if let Some(key) = session.data_keys.get(tenant, wrapped) {
        return Ok(key);
    }
    let key = Arc::new(Box::pin(kms::decrypt(session, tenant, wrapped)).await?);
    session.data_keys.remember(tenant, &key);
    Ok(key)
}

/// Data keys that lie beside what a tenant has stored, opened.
///
/// # Errors
/// [`DataKeyError`], if one does not open.
pub(super) async fn opened_all(
    access: &Access,
    tenant: &TenantId,
    wrapped: Vec<WrappedKey>,
) -> Result<HashMap<WrappedKey, Arc<DataKey>>, DataKeyError> {
    let session = access.of(tenant);
    let (mut all, mut opening) = (HashMap::new(), JoinSet::new());
    let mut left = wrapped.into_iter();
    loop {
        while opening.len() < AT_ONCE
            && let Some(wrapped) = left.next()
        {
            if let Some(key) = session.data_keys.get(tenant, &wrapped) {
                all.insert(wrapped, key);
                continue;
            }
            let (session, tenant) = (Arc::clone(&session), tenant.clone());
            opening.spawn(async move { opened(&session, &tenant, &wrapped).await });
        }
        match opening.join_next().await {
            None => return Ok(all),
            Some(Ok(key)) => {
                let key = key?;
                all.insert(key.wrapped().clone(), key);
            }
            Some(Err(error)) => {
                let code = "interrupted".to_owned();
                return Err(DataKeyError::Unreachable { code, source: Box::new(error) });
            }
        }
    }
}

/// What a session remembers of data keys: forgotten with the credentials that could open them.
#[derive(Default)]
pub(super) struct Remembered(Mutex<Known>);

#[derive(Default)]
struct Known {
    opened: HashMap<(TenantId, WrappedKey), (Arc<DataKey>, Instant)>,
    /// What is sealed with, and since when.
    sealing: HashMap<TenantId, (WrappedKey, Instant)>,
}

impl fmt::Debug for Remembered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Remembered(…)")
    }
}

impl Remembered {
    fn known(&self) -> MutexGuard<'_, Known> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.opened.retain(|_, (_, at)| at.elapsed() < REMEMBERED);
        known
    }

    fn get(&self, tenant: &TenantId, wrapped: &WrappedKey) -> Option<Arc<DataKey>> {
        let known = self.known();
        known.opened.get(&(tenant.clone(), wrapped.clone())).map(|(key, _)| Arc::clone(key))
    }

    fn remember(&self, tenant: &TenantId, key: &Arc<DataKey>) {
        let mut known = self.known();
        if known.opened.len() >= MOST_REMEMBERED {
            known.opened.clear();
        }
        known.opened.insert((tenant.clone(), key.wrapped().clone()), (Arc::clone(key), Instant::now()));
    }

    /// The data key that is sealed with, as it is wrapped, if it is of that key and not too old.
    fn sealing(&self, tenant: &TenantId, arn: &KmsKeyArn) -> Option<WrappedKey> {
        let known = self.known();
        let (wrapped, since) = known.sealing.get(tenant)?;
        (wrapped.arn == *arn && since.elapsed() < SEALS_FOR).then(|| wrapped.clone())
    }

    fn seal_with(&self, tenant: &TenantId, key: &Arc<DataKey>) {
        self.remember(tenant, key);
        self.known().sealing.insert(tenant.clone(), (key.wrapped().clone(), Instant::now()));
    }
}

#[cfg(feature = "data-keys")]
mod kms {
    use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
    use aws_sdk_kms::primitives::Blob;
    use aws_sdk_kms::types::DataKeySpec;
    use zeroize::Zeroizing;

    use super::super::failure_code;
    use super::super::session::{Session, TENANT_TAG};
    use super::{DataKeyError, REFUSALS};
    use crate::sealing::{DataKey, KmsKeyArn, SealError, WrappedKey};
    use crate::tenant::TenantId;

    pub(super) async fn generate(
        session: &Session,
        tenant: &TenantId,
        arn: &KmsKeyArn,
    ) -> Result<DataKey, DataKeyError> {
        let call = session.kms().generate_data_key().key_id(arn.as_str()).key_spec(DataKeySpec::Aes256);
        let call = call.encryption_context(TENANT_TAG, tenant.as_str());
        let answer = call.send().await.map_err(failed)?;
        let (Some(plain), Some(wrapped)) = (answer.plaintext, answer.ciphertext_blob) else {
            return Err(SealError::Key.into());
        };
        let wrapped = WrappedKey { arn: arn.clone(), bytes: wrapped.into_inner() };
        Ok(DataKey::new(Zeroizing::new(plain.into_inner()), wrapped)?)
    }

    pub(super) async fn decrypt(
        session: &Session,
        tenant: &TenantId,
        wrapped: &WrappedKey,
    ) -> Result<DataKey, DataKeyError> {
        // With the key that is named beside it, and no other that the blob might name.
        let call = session.kms().decrypt().key_id(wrapped.arn.as_str());
        let call = call.ciphertext_blob(Blob::new(wrapped.bytes.clone()));
        let answer = call.encryption_context(TENANT_TAG, tenant.as_str()).send().await.map_err(failed)?;
        let plain = Zeroizing::new(answer.plaintext.map(Blob::into_inner).unwrap_or_default());
        Ok(DataKey::new(plain, wrapped.clone())?)
    }

    pub(super) async fn try_key(
        session: &Session,
        tenant: &TenantId,
        arn: &KmsKeyArn,
    ) -> Result<(), DataKeyError> {
        let call = session.kms().generate_data_key_without_plaintext().key_id(arn.as_str());
        let call = call.key_spec(DataKeySpec::Aes256).encryption_context(TENANT_TAG, tenant.as_str());
        call.send().await.map(drop).map_err(failed)
    }

    fn failed<E, R>(error: SdkError<E, R>) -> DataKeyError
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
        R: std::fmt::Debug + Send + Sync + 'static,
    {
        let code = failure_code(&error);
        let source = Box::new(error);
        if REFUSALS.contains(&code.as_str()) {
            return DataKeyError::Refused { code, source };
        }
        DataKeyError::Unreachable { code, source }
    }
}

/// A function that has nothing of tenants to seal does without the SDK of KMS: it neither writes what is sealed nor
/// reads it.
#[cfg(not(feature = "data-keys"))]
mod kms {
    use super::super::session::Session;
    use super::DataKeyError;
    use crate::sealing::{DataKey, KmsKeyArn, WrappedKey};
    use crate::tenant::TenantId;

    pub(super) async fn generate(_: &Session, _: &TenantId, _: &KmsKeyArn) -> Result<DataKey, DataKeyError> {
        Err(none())
    }

    pub(super) async fn decrypt(_: &Session, _: &TenantId, _: &WrappedKey) -> Result<DataKey, DataKeyError> {
        Err(none())
    }

    pub(super) async fn try_key(_: &Session, _: &TenantId, _: &KmsKeyArn) -> Result<(), DataKeyError> {
        Err(none())
    }

    fn none() -> DataKeyError {
        let source = "this function speaks to no KMS".into();
        DataKeyError::Unreachable { code: "none".to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use zeroize::Zeroizing;

    use super::*;

    fn arn(id: &str) -> KmsKeyArn {
        format!("arn:aws:kms:us-east-1:000000000000:key/{id}").parse().unwrap()
    }

    fn key(number: u16) -> Arc<DataKey> {
        let wrapped = WrappedKey { arn: arn("one"), bytes: number.to_be_bytes().to_vec() };
        Arc::new(DataKey::new(Zeroizing::new(vec![0; 32]), wrapped).unwrap())
    }

    #[test]
    fn what_is_remembered_is_one_tenants_of_one_key_and_bounded() {
        let (acme, globex): (TenantId, TenantId) = ("acme".parse().unwrap(), "globex".parse().unwrap());
        let (remembered, first) = (Remembered::default(), key(0));
        remembered.seal_with(&acme, &first);
        assert!(remembered.get(&acme, first.wrapped()).is_some());
        assert!(remembered.get(&globex, first.wrapped()).is_none());
        assert_eq!(remembered.sealing(&acme, &arn("one")).as_ref(), Some(first.wrapped()));
        assert_eq!(remembered.sealing(&acme, &arn("two")), None, "the tenant has another key now");
        assert_eq!(remembered.sealing(&globex, &arn("one")), None);
        for number in 1..=600 {
            remembered.remember(&acme, &key(number));
            assert!(remembered.known().opened.len() <= MOST_REMEMBERED);
        }
        // What is sealed with is only forgotten in its open form.
        assert!(remembered.get(&acme, first.wrapped()).is_none());
        assert_eq!(remembered.sealing(&acme, &arn("one")).as_ref(), Some(first.wrapped()));
    }
}
