//! The part of AWS KMS that the functions call, and what an operator makes keys with, on one file.
//!
//! The JSON protocol and its errors are KMS's, signatures are checked and policies asked, with the encryption
//! context among what their conditions see. Data keys are truly wrapped: what was wrapped for one context opens for
//! no other. Keys' own policies are not evaluated. A call or parameter that is not implemented is refused by name.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, Method};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::aws_json::{self, Input, Refusal, refuse};
use crate::iam::{Caller, Callers, Intent};
use crate::serving::{replace_file, system_clock, unique_id};
use crate::template::{ACCOUNT, REGION};

const FILE_MODE: u32 = 0o600;
/// The bytes of a key and of a data key.
const KEY_BYTES: usize = 32;
/// Calls remembered.
const MOST_CALLS: usize = 10_000;

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the KMS keys in {path}")]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// The service.
#[derive(Debug)]
pub struct Kms {
    path: PathBuf,
    callers: Arc<Callers>,
    state: Mutex<Inner>,
}

#[derive(Default, Debug)]
struct Inner {
    /// By ARN.
    keys: BTreeMap<String, Key>,
    steering: Steering,
}

#[derive(Clone, Serialize, Deserialize)]
struct Key {
    /// Its bytes, in base64.
    material: String,
    state: KeyState,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("state", &self.state).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
enum KeyState {
    Enabled,
    Disabled,
    PendingDeletion,
}

/// What tests steer the service with, and what they read of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Steering {
    /// Whether it answers that it is unavailable.
    pub outage: bool,
    /// The calls that it has had, oldest first. Read alone.
    #[serde(skip_deserializing)]
    pub calls: Vec<Call>,
}

/// A call as it is remembered.
#[derive(Clone, Debug, Serialize)]
pub struct Call {
    /// Such as `Decrypt`.
    pub operation: String,
    /// The key's ARN, as far as the call leads to one.
    pub key: String,
    /// The encryption context.
    pub context: BTreeMap<String, String>,
    /// Who called.
    pub caller: String,
    /// The error, if there was one.
    pub error: Option<&'static str>,
}

/// Serves keys until `shutdown` resolves.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    kms: Arc<Kms>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    crate::serving::serve(listener, Router::new().route("/", post(call)).with_state(kms), shutdown).await
}

async fn call(State(kms): State<Arc<Kms>>, headers: HeaderMap, body: Bytes) -> Response {
    // Writes a file, at times: not on a thread that serves connections.
    let work = move || kms.answer(&headers, &body);
    let answered = tokio::task::spawn_blocking(work).await;
    let answered = answered.unwrap_or_else(|_| Err(refuse("KMSInternalException", "The work was lost.")));
    aws_json::reply(answered, "KMSInternalException")
}

impl Kms {
    /// Opens the file, which need not exist, for these callers.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn open(path: &Path, callers: Arc<Callers>) -> Result<Arc<Self>, Error> {
        let failed = |source| Error { path: path.to_owned(), source };
        let keys = match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(failed(error)),
        };
        let state = Mutex::new(Inner { keys, steering: Steering::default() });
        Ok(Arc::new(Self { path: path.to_owned(), callers, state }))
    }

    /// Steers the service. What is remembered of calls stays.
    pub fn steer(&self, steering: Steering) {
        let mut inner = self.inner();
        let calls = std::mem::take(&mut inner.steering.calls);
        inner.steering = Steering { calls, ..steering };
    }

    /// How it is steered, and the calls that it has had.
    #[must_use]
    pub fn steering(&self) -> Steering {
        self.inner().steering.clone()
    }

    /// Forgets the calls.
    pub fn forget_calls(&self) {
        self.inner().steering.calls.clear();
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, headers: &HeaderMap, body: &[u8]) -> Result<Value, Refusal> {
        let caller = self.callers.signer("kms", &Method::POST, "/", headers, body, system_clock());
        let caller = caller.map_err(|refusal| refuse(refusal.code(), refusal.to_string()))?;
        let target = headers.get("x-amz-target").and_then(|value| value.to_str().ok());
        let operation = target.and_then(|target| target.strip_prefix("TrentService.")).unwrap_or_default();
        self.ask(&caller, operation, body)
    }

    /// Answers a call of somebody who is known: its own, or that of a service that acts for it.
    pub(crate) fn ask(&self, caller: &Caller, operation: &str, body: &[u8]) -> Result<Value, Refusal> {
        let mut input = Input::parse(body)?;
        let context: BTreeMap<String, String> = input.take("EncryptionContext")?.unwrap_or_default();
        let blob = input.take::<String>("CiphertextBlob")?;
        let blob = blob.map(|text| STANDARD.decode(text)).transpose();
        let blob = blob.map_err(|_| refuse("SerializationException", "CiphertextBlob is no base64."))?;
        let named = input.take::<String>("KeyId")?;
        // What was wrapped says with which key; what the call says besides has to agree.
        let wrapped = blob.as_deref().and_then(Wrapped::parse);
        let key = wrapped.as_ref().map(|wrapped| wrapped.key.clone()).or_else(|| named.clone().map(arn));
        let resource = key.clone().unwrap_or_else(|| "*".to_owned());

        let mut intent = Intent::new(format!("kms:{operation}"), resource.clone());
        for (name, value) in &context {
            intent.context.insert(format!("kms:EncryptionContext:{name}"), vec![value.clone()]);
        }
        if !context.is_empty() {
            intent.context.insert("kms:EncryptionContextKeys".to_owned(), context.keys().cloned().collect());
        }
        let mut inner = self.inner();
        let answered = if inner.steering.outage {
            Err(refuse("KMSInternalException", "The service is steered to be unavailable."))
        } else if let Some(message) = self.callers.refused(caller, &[intent]) {
            tracing::warn!("KMS refused {operation}: {message}");
            Err(refuse("AccessDeniedException", message))
        } else {
            let asked = Asked { operation, named, key: resource.clone(), wrapped, context: &context };
            self.dispatch(&mut inner.keys, asked, input)
        };
        let calls = &mut inner.steering.calls;
        if calls.len() >= MOST_CALLS {
            calls.remove(0);
        }
        calls.push(Call {
            operation: operation.to_owned(),
            key: resource,
            context,
            caller: caller.credentials.user_arn.clone(),
            error: answered.as_ref().err().map(|refusal| refusal.kind),
        });
        answered
    }

    fn dispatch(
        &self,
        keys: &mut BTreeMap<String, Key>,
        asked: Asked<'_>,
        mut input: Input,
    ) -> Result<Value, Refusal> {
        let Asked { operation, named, key: arn_, wrapped, context } = asked;
        let at = |keys: &BTreeMap<String, Key>| {
            let missing = || refuse("NotFoundException", format!("Key '{arn_}' does not exist"));
            keys.get(&arn_).cloned().ok_or_else(missing)
        };
        match operation {
            "CreateKey" => {
                let _: Option<String> = input.take("Description")?;
                input.end("ValidationException", "KMS")?;
                let id = unique_id();
                let parts = [id.get(..8), id.get(8..12), id.get(12..16), id.get(16..20), id.get(20..)];
                let new = arn(parts.map(Option::unwrap_or_default).join("-"));
                let material = STANDARD.encode(random::<KEY_BYTES>()?);
                keys.insert(new.clone(), Key { material, state: KeyState::Enabled });
                self.save(keys)?;
                Ok(json!({"KeyMetadata": described(&new, KeyState::Enabled)}))
            }
            "DescribeKey" => {
                input.end("ValidationException", "KMS")?;
                Ok(json!({"KeyMetadata": described(&arn_, at(keys)?.state)}))
            }
            "EnableKey" | "DisableKey" | "ScheduleKeyDeletion" | "CancelKeyDeletion" => {
                let _: Option<u32> = input.take("PendingWindowInDays")?;
                input.end("ValidationException", "KMS")?;
                let mut key = at(keys)?;
                key.state = match (operation, key.state) {
                    ("EnableKey", KeyState::Disabled | KeyState::Enabled) => KeyState::Enabled,
                    ("DisableKey", KeyState::Disabled | KeyState::Enabled) => KeyState::Disabled,
                    ("ScheduleKeyDeletion", KeyState::Disabled | KeyState::Enabled) => {
                        KeyState::PendingDeletion
                    }
                    ("CancelKeyDeletion", KeyState::PendingDeletion) => KeyState::Disabled,
                    _ => return Err(unusable(&arn_, key.state)),
                };
                keys.insert(arn_.clone(), key);
                self.save(keys)?;
                Ok(json!({"KeyId": arn_}))
            }
            "GenerateDataKey" | "GenerateDataKeyWithoutPlaintext" => {
                let spec: Option<String> = input.take("KeySpec")?;
                input.end("ValidationException", "KMS")?;
                if spec.as_deref() != Some("AES_256") {
                    return Err(refuse("ValidationException", "Only KeySpec AES_256 is known here."));
                }
                let key = at(keys)?;
                if key.state != KeyState::Enabled {
                    return Err(unusable(&arn_, key.state));
                }
                let plain = random::<KEY_BYTES>()?;
                let blob = Wrapped::wrap(&arn_, &key, context, &plain)?;
                let mut answer = json!({"KeyId": arn_, "CiphertextBlob": STANDARD.encode(blob)});
                if operation == "GenerateDataKey"
                    && let Value::Object(fields) = &mut answer
                {
                    fields.insert("Plaintext".to_owned(), STANDARD.encode(plain).into());
                }
                Ok(answer)
            }
            "Decrypt" => {
                input.end("ValidationException", "KMS")?;
                let wrapped = wrapped.ok_or_else(|| refuse("InvalidCiphertextException", ""))?;
                if named.is_some_and(|named| arn(named) != arn_) {
                    let message =
                        "The key ID in the request does not identify a CMK that can perform this operation.";
                    return Err(refuse("IncorrectKeyException", message));
                }
                let key = at(keys)?;
                if key.state != KeyState::Enabled {
                    return Err(unusable(&arn_, key.state));
                }
                let plain = wrapped.open(&key, context)?;
                let algorithm = "SYMMETRIC_DEFAULT";
                Ok(
                    json!({"KeyId": arn_, "Plaintext": STANDARD.encode(plain), "EncryptionAlgorithm": algorithm}),
                )
            }
            _ => {
                let message = format!("{operation} is not implemented by the local KMS.");
                Err(refuse("UnknownOperationException", message))
            }
        }
    }

    fn save(&self, keys: &BTreeMap<String, Key>) -> Result<(), Refusal> {
        let saved = serde_json::to_vec_pretty(keys).map_err(io::Error::from);
        let saved = saved.and_then(|bytes| replace_file(&self.path, &bytes, FILE_MODE));
        saved.map_err(|error| {
            tracing::error!(path = %self.path.display(), error = %error, "KMS keys could not be saved");
            refuse("KMSInternalException", "The keys could not be saved.")
        })
    }
}

/// A call that its caller may make.
struct Asked<'a> {
    operation: &'a str,
    named: Option<String>,
    key: String,
    wrapped: Option<Wrapped>,
    context: &'a BTreeMap<String, String>,
}

/// A key's ARN, where it may be named by its id alone.
fn arn(id: String) -> String {
    if id.starts_with("arn:") { id } else { format!("arn:aws:kms:{REGION}:{ACCOUNT}:key/{id}") }
}

fn described(arn: &str, state: KeyState) -> Value {
    let id = arn.rsplit('/').next().unwrap_or_default();
    json!({
        "KeyId": id, "Arn": arn, "AWSAccountId": ACCOUNT, "Enabled": state == KeyState::Enabled,
        "KeyState": state, "KeyUsage": "ENCRYPT_DECRYPT", "KeySpec": "SYMMETRIC_DEFAULT",
    })
}

fn unusable(arn: &str, state: KeyState) -> Refusal {
    match state {
        KeyState::Disabled => refuse("DisabledException", format!("{arn} is disabled.")),
        KeyState::Enabled => refuse("KMSInvalidStateException", format!("{arn} is enabled.")),
        KeyState::PendingDeletion => {
            refuse("KMSInvalidStateException", format!("{arn} is pending deletion."))
        }
    }
}

fn random<const N: usize>() -> Result<[u8; N], Refusal> {
    let mut bytes = [0; N];
    let failed = |_| refuse("KMSInternalException", "There is no randomness.");
    aws_lc_rs::rand::fill(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// What KMS makes of a data key: the key's ARN, a nonce, and the data key under both.
struct Wrapped {
    key: String,
    nonce: [u8; NONCE_LEN],
    sealed: Vec<u8>,
}

impl Wrapped {
    fn parse(blob: &[u8]) -> Option<Self> {
        let (length, rest) = blob.split_first_chunk::<2>()?;
        let (key, rest) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
        Some(Self { key: String::from_utf8(key.to_vec()).ok()?, nonce: *nonce, sealed: sealed.to_vec() })
    }

    fn wrap(
        arn: &str,
        key: &Key,
        context: &BTreeMap<String, String>,
        plain: &[u8],
    ) -> Result<Vec<u8>, Refusal> {
        let (nonce, mut sealed) = (random::<NONCE_LEN>()?, plain.to_vec());
        let failed = |_| refuse("KMSInternalException", "The data key could not be wrapped.");
        cipher(key)?
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), bound(arn, context), &mut sealed)
            .map_err(failed)?;
        let length = u16::try_from(arn.len()).unwrap_or(u16::MAX).to_be_bytes();
        Ok([&length[..], arn.as_bytes(), &nonce, &sealed].concat())
    }

    fn open(mut self, key: &Key, context: &BTreeMap<String, String>) -> Result<Vec<u8>, Refusal> {
        let nonce = Nonce::assume_unique_for_key(self.nonce);
        let opened = cipher(key)?.open_in_place(nonce, bound(&self.key, context), &mut self.sealed);
        opened.map(|plain| plain.to_vec()).map_err(|_| refuse("InvalidCiphertextException", ""))
    }
}

fn cipher(key: &Key) -> Result<LessSafeKey, Refusal> {
    let material = STANDARD.decode(&key.material).ok();
    let key = material.and_then(|bytes| UnboundKey::new(&AES_256_GCM, &bytes).ok());
    key.map(LessSafeKey::new).ok_or_else(|| refuse("KMSInternalException", "The key's material is lost."))
}

/// What a data key is bound to: its key and the whole encryption context.
fn bound(arn: &str, context: &BTreeMap<String, String>) -> Aad<Vec<u8>> {
    Aad::from(json!([arn, context]).to_string().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iam::{Caller, Policy};
    use crate::sigv4::{self, Credentials};

    fn credentials(id: &str) -> Credentials {
        Credentials {
            access_key_id: id.into(),
            secret_access_key: "secret".into(),
            region: REGION.into(),
            user_arn: format!("arn:aws:iam::0:{id}"),
        }
    }

    /// Keys for an operator and for a session of acme's.
    fn kms(path: &Path) -> Arc<Kms> {
        let policy = json!({"Version": "2012-10-17", "Statement": {
            "Effect": "Allow", "Action": ["kms:Decrypt", "kms:GenerateDataKey"], "Resource": "arn:aws:kms:*:*:key/*",
            "Condition": {
                "StringEquals": {"kms:EncryptionContext:tenant_id": "${aws:PrincipalTag/tenant_id}"},
                "Null": {"kms:EncryptionContext:tenant_id": "false"},
            },
        }});
        let role = Caller::in_role(
            credentials("ACME"),
            "arn:aws:iam::0:role/chat".into(),
            vec![Policy::parse(&policy).unwrap()],
        );
        let tags = BTreeMap::from([("tenant_id".to_owned(), "acme".to_owned())]);
        let acme = Caller { tags, ..role };
        let callers = Callers::new(vec![Caller::operator(credentials("OPERATOR")), acme]);
        Kms::open(path, Arc::new(callers)).unwrap()
    }

    fn ask(kms: &Kms, by: &str, operation: &str, input: Value) -> Result<Value, &'static str> {
        let (target, body) = (format!("TrentService.{operation}"), input.to_string());
        let headers = [("host", "kms"), ("x-amz-target", &*target)];
        let now = system_clock();
        let signed = sigv4::sign(
            "kms",
            &credentials(by),
            &Method::POST,
            "http://kms/",
            &headers,
            body.as_bytes(),
            now,
        );
        let mut map = HeaderMap::new();
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
        for (name, value) in headers.into_iter().chain(signed.unwrap()) {
            map.insert(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        }
        kms.answer(&map, body.as_bytes()).map_err(|refusal| refusal.kind)
    }

    fn new_key(kms: &Kms) -> String {
        let made = ask(kms, "OPERATOR", "CreateKey", json!({})).unwrap();
        made["KeyMetadata"]["Arn"].as_str().unwrap().to_owned()
    }

    fn of(tenant: &str, rest: Value) -> Value {
        let mut input = json!({"EncryptionContext": {"tenant_id": tenant}});
        input.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        input
    }

    #[test]
    fn a_data_key_opens_for_its_context_with_its_key_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kms.json");
        let kms_ = kms(&path);
        let (key, other) = (new_key(&kms_), new_key(&kms_));
        let made =
            ask(&kms_, "ACME", "GenerateDataKey", of("acme", json!({"KeyId": key, "KeySpec": "AES_256"})));
        let made = made.unwrap();
        let blob = &made["CiphertextBlob"];
        let open = |kms: &Kms, by, tenant, input| {
            Ok(ask(kms, by, "Decrypt", of(tenant, input))?["Plaintext"].clone())
        };
        let opened: Result<Value, &str> = open(&kms_, "ACME", "acme", json!({"CiphertextBlob": blob}));
        assert_eq!(opened.unwrap(), made["Plaintext"]);
        for (by, tenant, input, error) in [
            ("ACME", "globex", json!({"CiphertextBlob": blob}), "AccessDeniedException"),
            ("OPERATOR", "globex", json!({"CiphertextBlob": blob}), "InvalidCiphertextException"),
            ("ACME", "acme", json!({"CiphertextBlob": blob, "KeyId": other}), "IncorrectKeyException"),
            ("OPERATOR", "acme", json!({"CiphertextBlob": "AAAA"}), "InvalidCiphertextException"),
            ("ACME", "acme", json!({"CiphertextBlob": blob, "DryRun": true}), "ValidationException"),
        ] {
            assert_eq!(open(&kms_, by, tenant, input.clone()), Err(error), "{by} {tenant} {input}");
        }
        let without = ask(&kms_, "ACME", "Decrypt", json!({"CiphertextBlob": blob}));
        assert_eq!(without, Err("AccessDeniedException"));
        // As long as the key lives, and beyond a restart.
        ask(&kms_, "OPERATOR", "DisableKey", json!({"KeyId": key})).unwrap();
        let kms_ = kms(&path);
        let disabled = open(&kms_, "ACME", "acme", json!({"CiphertextBlob": blob}));
        assert_eq!(disabled, Err("DisabledException"));
        ask(&kms_, "OPERATOR", "EnableKey", json!({"KeyId": key})).unwrap();
        assert!(open(&kms_, "ACME", "acme", json!({"CiphertextBlob": blob})).is_ok());
        let calls = kms_.steering().calls;
        assert_eq!((&*calls[0].operation, calls[0].error), ("Decrypt", Some("DisabledException")));
    }

    #[test]
    fn keys_are_found_shown_and_end() {
        let directory = tempfile::tempdir().unwrap();
        let kms = kms(&directory.path().join("kms.json"));
        let key = new_key(&kms);
        let describe = |key: &str| ask(&kms, "OPERATOR", "DescribeKey", json!({"KeyId": key}));
        assert_eq!(describe(&key).unwrap()["KeyMetadata"]["KeyState"], "Enabled");
        assert_eq!(describe(key.rsplit('/').next().unwrap()).unwrap()["KeyMetadata"]["Arn"], *key);
        assert_eq!(describe("nothing"), Err("NotFoundException"));
        assert_eq!(ask(&kms, "ACME", "DescribeKey", json!({"KeyId": key})), Err("AccessDeniedException"));
        ask(&kms, "OPERATOR", "ScheduleKeyDeletion", json!({"KeyId": key})).unwrap();
        let input = of("acme", json!({"KeyId": key, "KeySpec": "AES_256"}));
        let refused = ask(&kms, "OPERATOR", "GenerateDataKeyWithoutPlaintext", input);
        assert_eq!(refused, Err("KMSInvalidStateException"));
        assert_eq!(ask(&kms, "OPERATOR", "Encrypt", json!({})), Err("UnknownOperationException"));
        assert_eq!(ask(&kms, "NOBODY", "CreateKey", json!({})), Err("UnrecognizedClientException"));
        kms.steer(Steering { outage: true, ..Steering::default() });
        assert_eq!(describe(&key), Err("KMSInternalException"));
    }
}
