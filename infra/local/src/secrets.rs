//! The part of AWS Secrets Manager that the functions call, on one file.
//!
//! The JSON protocol and its errors are Secrets Manager's, signatures are checked and policies asked.
//! Nothing is encrypted: the server is for loopback, and the file is readable by its owner alone. A call
//! or parameter that is not implemented is refused by name.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use axum::routing::post;
use http::{HeaderMap, Method};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use time::{Duration, OffsetDateTime};
use tokio::net::TcpListener;

use crate::aws_json::{self, Input, Refusal, refuse};
use crate::iam::{Callers, Intent};
use crate::serving::{replace_file, system_clock, unique_id};
use crate::template::secret_arn;

/// How long a secret that is deleted without a window is still listed.
const LINGERS: Duration = Duration::seconds(1);
const CURRENT: &str = "AWSCURRENT";
const PREVIOUS: &str = "AWSPREVIOUS";
const MAX_VALUE: usize = 65_536;
const FILE_MODE: u32 = 0o600;

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the secrets in {path}")]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// The secrets, shared by the server and whoever seeds them.
#[derive(Clone)]
pub struct Secrets(Arc<Inner>);

struct Inner {
    path: PathBuf,
    /// `region:account`, as it stands in names of resources.
    now: Box<dyn Fn() -> OffsetDateTime + Send + Sync>,
    secrets: Mutex<BTreeMap<String, Secret>>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Secret {
    arn: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tags: Vec<Value>,
    #[serde(with = "time::serde::rfc3339")]
    created: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    changed: OffsetDateTime,
    /// Gone for good from this instant on.
    #[serde(default, with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    delete_at: Option<OffsetDateTime>,
    /// When its deletion was asked for.
    #[serde(default, with = "time::serde::rfc3339::option", skip_serializing_if = "Option::is_none")]
    deleted: Option<OffsetDateTime>,
    versions: BTreeMap<String, SecretVersion>,
}

impl Secret {
    /// Whether the current version is that text.
    fn holds(&self, text: &str) -> bool {
        let mut current =
            self.versions.values().filter(|version| version.stages.iter().any(|s| s == CURRENT));
        current.any(|version| matches!(&version.value, SecretValue::Text(value) if value == text))
    }
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct SecretVersion {
    #[serde(with = "time::serde::rfc3339")]
    created: OffsetDateTime,
    stages: Vec<String>,
    value: SecretValue,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
enum SecretValue {
    #[serde(rename = "string")]
    Text(String),
    /// In base64, as it travels.
    #[serde(rename = "binary")]
    Binary(String),
}

fn not_found() -> Refusal {
    refuse("ResourceNotFoundException", "Secrets Manager can't find the specified secret.")
}

fn invalid(message: impl Into<String>) -> Refusal {
    refuse("InvalidParameterException", message)
}

/// Serves the secrets to these callers until `shutdown` resolves.
pub async fn serve(
    listener: TcpListener,
    secrets: Secrets,
    callers: Arc<Callers>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let router = Router::new().route("/", post(call)).with_state((secrets, callers));
    crate::serving::serve(listener, router, shutdown).await
}

async fn call(
    State((secrets, callers)): State<(Secrets, Arc<Callers>)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let target = headers.get("x-amz-target").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let answered = match secrets.denied(&callers, &headers, target.as_deref(), &body) {
        Some(refusal) => Err(refusal),
        None => {
            // Writes a file: not on a thread that serves connections.
            let work = move || secrets.dispatch(target.as_deref(), &body);
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
                Err(refuse("InternalServiceError", "An error occurred on the server side."))
            })
        }
    };
    aws_json::reply(answered, "InternalServiceError")
}

fn required(input: &mut Input, name: &str) -> Result<String, Refusal> {
    let value = input.take::<String>(name)?.filter(|value| !value.is_empty());
    value.ok_or_else(|| {
        refuse(
            "ValidationException",
            format!("Value null at '{name}' failed to satisfy constraint: Member must not be null"),
        )
    })
}

fn value(input: &mut Input) -> Result<Option<SecretValue>, Refusal> {
    let value = match (input.take::<String>("SecretString")?, input.take::<String>("SecretBinary")?) {
        (Some(_), Some(_)) => {
            return Err(invalid(
                "You can't specify both a binary secret value and a string secret value in the same secret.",
            ));
        }
        (Some(text), None) => SecretValue::Text(text),
        (None, Some(binary)) => SecretValue::Binary(binary),
        (None, None) => return Ok(None),
    };
    let (SecretValue::Text(content) | SecretValue::Binary(content)) = &value;
    if content.is_empty() || content.len() > MAX_VALUE {
        return Err(invalid(format!("A secret value has between 1 and {MAX_VALUE} bytes.")));
    }
    Ok(Some(value))
}

impl Secrets {
    /// Opens the file, which need not exist.
    pub fn open(
        path: &Path,
        now: impl Fn() -> OffsetDateTime + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let failed = |source| Error { path: path.to_owned(), source };
        let secrets = match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(failed(error)),
        };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        Ok(Self(Arc::new(Inner { path: path.to_owned(), now: Box::new(now), secrets: Mutex::new(secrets) })))
    }

    /// Makes a secret hold `value`, as an operator does who sets up an account. One that holds it
    /// already stays as it is.
    pub fn set(&self, name: &str, value: &str) -> Result<(), Error> {
        let mut secrets = self.lock();
        if secrets.get(name).is_some_and(|secret| secret.holds(value)) {
            return Ok(());
        }
        let mut changed = secrets.clone();
        changed.insert(
            name.to_owned(),
            self.new_secret(name, Some((unique_id(), SecretValue::Text(value.to_owned())))),
        );
        self.save(&changed).map_err(|source| Error { path: self.0.path.clone(), source })?;
        *secrets = changed;
        Ok(())
    }

    fn now(&self) -> OffsetDateTime {
        (self.0.now)().to_offset(time::UtcOffset::UTC)
    }

    /// The secrets, without those whose recovery window is over.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Secret>> {
        let now = self.now();
        let mut secrets = self.0.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        secrets.retain(|_, secret| secret.delete_at.is_none_or(|at| at > now));
        secrets
    }

    fn save(&self, secrets: &BTreeMap<String, Secret>) -> io::Result<()> {
        replace_file(&self.0.path, &serde_json::to_vec_pretty(secrets)?, FILE_MODE)
    }

    fn new_secret(&self, name: &str, version: Option<(String, SecretValue)>) -> Secret {
        let now = self.now();
        let versions = version
            .map(|(id, value)| (id, SecretVersion { created: now, stages: vec![CURRENT.to_owned()], value }))
            .into_iter()
            .collect();
        Secret {
            arn: secret_arn(name),
            description: None,
            tags: Vec::new(),
            created: now,
            changed: now,
            delete_at: None,
            deleted: None,
            versions,
        }
    }

    /// The refusal of a call that is not signed, or that its signer's policies do not allow.
    fn denied(
        &self,
        callers: &Callers,
        headers: &HeaderMap,
        target: Option<&str>,
        body: &[u8],
    ) -> Option<Refusal> {
        let signer = callers.signer("secretsmanager", &Method::POST, "/", headers, body, system_clock());
        let caller = match signer {
            Ok(caller) => caller,
            Err(refusal) => return Some(refuse(refusal.code(), refusal.to_string())),
        };
        let operation = target.and_then(|target| target.strip_prefix("secretsmanager.")).unwrap_or_default();
        let input: Value = serde_json::from_slice(body).unwrap_or_default();
        let named = ["SecretId", "Name"].iter().find_map(|name| input.get(*name)?.as_str());
        let resource = match named {
            Some(arn) if arn.starts_with("arn:") => arn.to_owned(),
            Some(name) => secret_arn(name),
            None => "*".to_owned(),
        };
        let intent = Intent::new(format!("secretsmanager:{operation}"), resource);
        let message = callers.refused(&caller, &[intent])?;
        tracing::warn!("Secrets Manager refused {operation}: {message}");
        Some(refuse("AccessDeniedException", message))
    }

    fn dispatch(&self, target: Option<&str>, body: &[u8]) -> Result<Value, Refusal> {
        let operation = target.and_then(|target| target.strip_prefix("secretsmanager."));
        let mut input = Input::parse(body)?;
        let mut secrets = self.lock();
        // Changes are made on a copy: what could not be saved did not happen.
        let mut changed = secrets.clone();
        let (answer, writes) = match operation {
            Some("CreateSecret") => (self.create(&mut changed, &mut input)?, true),
            Some("PutSecretValue") => (self.put(&mut changed, &mut input)?, true),
            Some("DeleteSecret") => (self.delete(&mut changed, &mut input)?, true),
            Some("RestoreSecret") => (restore(&mut changed, &mut input)?, true),
            Some("GetSecretValue") => (get(&changed, &mut input)?, false),
            Some("DescribeSecret") => (describe(&changed, &mut input)?, false),
            Some("ListSecrets") => (list(&changed, &mut input)?, false),
            Some(operation) => {
                return Err(refuse(
                    "UnknownOperationException",
                    format!("{operation} is not implemented by the local Secrets Manager."),
                ));
            }
            None => {
                return Err(refuse(
                    "UnknownOperationException",
                    "X-Amz-Target names no Secrets Manager operation.",
                ));
            }
        };
        input.end("InvalidParameterException", "Secrets Manager")?;
        if writes {
            self.save(&changed).map_err(|error| {
                tracing::error!(path = %self.0.path.display(), error = %error, "secrets could not be saved");
                refuse("InternalServiceError", "An error occurred on the server side.")
            })?;
            *secrets = changed;
        }
        Ok(answer)
    }

    fn create(&self, secrets: &mut BTreeMap<String, Secret>, input: &mut Input) -> Result<Value, Refusal> {
        let name = required(input, "Name")?;
        let token = input.take::<String>("ClientRequestToken")?.unwrap_or_else(unique_id);
        let value = value(input)?;
        let description = input.take::<String>("Description")?;
        let tags = input.take::<Vec<Value>>("Tags")?.unwrap_or_default();
        if name.len() > 512
            || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/_+=.@-".contains(&byte))
        {
            return Err(refuse(
                "ValidationException",
                "Invalid name. Must be a valid name containing alphanumeric characters, or any of the following: -/_+=.@!",
            ));
        }
        if let Some(existing) = secrets.get(&name) {
            if existing.delete_at.is_some() {
                return Err(refuse(
                    "InvalidRequestException",
                    "You can't create this secret because a secret with this name is already scheduled for deletion.",
                ));
            }
            // A repeated request, not a second secret.
            let repeated =
                existing.versions.get(&token).is_some_and(|version| Some(&version.value) == value.as_ref());
            if !repeated {
                return Err(refuse(
                    "ResourceExistsException",
                    format!("The operation failed because the secret {name} already exists."),
                ));
            }
            return Ok(json!({"ARN": existing.arn, "Name": name, "VersionId": token}));
        }
        let with_value = value.is_some();
        let mut secret = self.new_secret(&name, value.map(|value| (token.clone(), value)));
        secret.description = description;
        secret.tags = tags;
        let mut answer = json!({"ARN": secret.arn, "Name": name});
        if with_value {
            put_field(&mut answer, "VersionId", json!(token));
        }
        secrets.insert(name, secret);
        Ok(answer)
    }

    fn put(&self, secrets: &mut BTreeMap<String, Secret>, input: &mut Input) -> Result<Value, Refusal> {
        let id = required(input, "SecretId")?;
        let token = input.take::<String>("ClientRequestToken")?.unwrap_or_else(unique_id);
        let value =
            value(input)?.ok_or_else(|| invalid("You must provide either SecretString or SecretBinary."))?;
        let stages = input.take::<Vec<String>>("VersionStages")?.unwrap_or_else(|| vec![CURRENT.to_owned()]);
        let now = self.now();
        let name = resolve(secrets, &id)?;
        let secret = secrets.get_mut(&name).ok_or_else(not_found)?;
        not_deleted(secret)?;
        if let Some(existing) = secret.versions.get(&token) {
            if existing.value != value {
                return Err(refuse(
                    "ResourceExistsException",
                    "You can't use ClientRequestToken of a version that already exists with a different value.",
                ));
            }
            return Ok(
                json!({"ARN": secret.arn, "Name": name, "VersionId": token, "VersionStages": existing.stages}),
            );
        }
        let mut before = None;
        for (id, version) in &mut secret.versions {
            if stages.iter().any(|stage| stage == CURRENT)
                && version.stages.iter().any(|stage| stage == CURRENT)
            {
                before = Some(id.clone());
            }
            version.stages.retain(|stage| !stages.contains(stage));
        }
        if let Some(before) = before {
            for (id, version) in &mut secret.versions {
                version.stages.retain(|stage| stage != PREVIOUS);
                if *id == before {
                    version.stages.push(PREVIOUS.to_owned());
                }
            }
        }
        secret.versions.insert(token.clone(), SecretVersion { created: now, stages: stages.clone(), value });
        // Versions that no stage names are deprecated, and deleted by the service in time.
        secret.versions.retain(|_, version| !version.stages.is_empty());
        secret.changed = now;
        Ok(json!({"ARN": secret.arn, "Name": name, "VersionId": token, "VersionStages": stages}))
    }

    fn delete(&self, secrets: &mut BTreeMap<String, Secret>, input: &mut Input) -> Result<Value, Refusal> {
        let id = required(input, "SecretId")?;
        let force = input.take::<bool>("ForceDeleteWithoutRecovery")?.unwrap_or(false);
        let window = input.take::<i64>("RecoveryWindowInDays")?;
        if force && window.is_some() {
            return Err(invalid(
                "You can't use ForceDeleteWithoutRecovery in conjunction with RecoveryWindowInDays.",
            ));
        }
        let days = window.unwrap_or(30);
        if !(7..=30).contains(&days) {
            return Err(invalid("The RecoveryWindowInDays value must be between 7 and 30 days (inclusive)."));
        }
        let now = self.now();
        if force {
            // Asked for by name, what is not there is answered like what was.
            let name = resolve(secrets, &id).unwrap_or(id);
            let arn = match secrets.get_mut(&name) {
                None => secret_arn(&name),
                Some(secret) => {
                    // The service deletes in the background: its values are gone, its name is for a moment.
                    secret.versions.clear();
                    let gone = now.saturating_add(LINGERS);
                    secret.delete_at = Some(secret.delete_at.filter(|at| *at < gone).unwrap_or(gone));
                    secret.deleted = Some(now);
                    secret.arn.clone()
                }
            };
            return Ok(json!({"ARN": arn, "Name": name, "DeletionDate": seconds(now)}));
        }
        let name = resolve(secrets, &id)?;
        let secret = secrets.get_mut(&name).ok_or_else(not_found)?;
        not_deleted(secret)?;
        let at = now.saturating_add(Duration::days(days));
        secret.delete_at = Some(at);
        secret.deleted = Some(now);
        Ok(json!({"ARN": secret.arn, "Name": name, "DeletionDate": seconds(at)}))
    }
}

fn restore(secrets: &mut BTreeMap<String, Secret>, input: &mut Input) -> Result<Value, Refusal> {
    let name = resolve(secrets, &required(input, "SecretId")?)?;
    let secret = secrets.get_mut(&name).ok_or_else(not_found)?;
    secret.delete_at = None;
    secret.deleted = None;
    Ok(json!({"ARN": secret.arn, "Name": name}))
}

fn get(secrets: &BTreeMap<String, Secret>, input: &mut Input) -> Result<Value, Refusal> {
    let id = required(input, "SecretId")?;
    let version_id = input.take::<String>("VersionId")?;
    let stage = input.take::<String>("VersionStage")?;
    let name = resolve(secrets, &id)?;
    let secret = secrets.get(&name).ok_or_else(not_found)?;
    not_deleted(secret)?;
    let wanted = stage.as_deref().or_else(|| version_id.is_none().then_some(CURRENT));
    let found = secret.versions.iter().find(|(id, version)| {
        version_id.as_ref().is_none_or(|wanted| wanted == *id)
            && wanted.is_none_or(|wanted| version.stages.iter().any(|stage| stage == wanted))
    });
    let Some((id, version)) = found else {
        let what = match (&version_id, wanted) {
            (Some(id), _) => format!("VersionId: {id}"),
            (None, stage) => format!("staging label: {}", stage.unwrap_or(CURRENT)),
        };
        return Err(refuse(
            "ResourceNotFoundException",
            format!("Secrets Manager can't find the specified secret value for {what}"),
        ));
    };
    let (field, value) = match &version.value {
        SecretValue::Text(text) => ("SecretString", text),
        SecretValue::Binary(binary) => ("SecretBinary", binary),
    };
    let mut answer = json!({
        "ARN": secret.arn,
        "Name": name,
        "VersionId": id,
        "VersionStages": version.stages,
        "CreatedDate": seconds(version.created),
    });
    put_field(&mut answer, field, json!(value));
    Ok(answer)
}

fn describe(secrets: &BTreeMap<String, Secret>, input: &mut Input) -> Result<Value, Refusal> {
    let name = resolve(secrets, &required(input, "SecretId")?)?;
    let secret = secrets.get(&name).ok_or_else(not_found)?;
    let mut answer = summary(&name, secret);
    put_field(&mut answer, "VersionIdsToStages", stages(secret));
    Ok(answer)
}

fn list(secrets: &BTreeMap<String, Secret>, input: &mut Input) -> Result<Value, Refusal> {
    let max = input.take::<usize>("MaxResults")?.unwrap_or(100);
    if !(1..=100).contains(&max) {
        return Err(invalid("MaxResults must be between 1 and 100."));
    }
    let planned = input.take::<bool>("IncludePlannedDeletion")?.unwrap_or(false);
    let token = input.take::<String>("NextToken")?;
    let mut prefixes: Vec<String> = Vec::new();
    for filter in input.take::<Vec<Filter>>("Filters")?.unwrap_or_default() {
        if filter.key != "name"
            || !prefixes.is_empty()
            || filter.values.iter().any(|value| value.starts_with('!'))
        {
            return Err(invalid(
                "Only one filter, of names by prefix, is implemented by the local Secrets Manager.",
            ));
        }
        prefixes = filter.values;
    }
    let mut matching = secrets
        .iter()
        .filter(|(name, _)| token.as_ref().is_none_or(|token| *name > token))
        .filter(|(_, secret)| planned || secret.delete_at.is_none())
        .filter(|(name, _)| prefixes.is_empty() || prefixes.iter().any(|prefix| name.starts_with(prefix)))
        .peekable();
    let (mut entries, mut last) = (Vec::new(), None);
    for (name, secret) in matching.by_ref().take(max) {
        let mut entry = summary(name, secret);
        put_field(&mut entry, "SecretVersionsToStages", stages(secret));
        entries.push(entry);
        last = Some(name.clone());
    }
    let mut answer = json!({"SecretList": entries});
    if matching.peek().is_some() {
        put_field(&mut answer, "NextToken", json!(last));
    }
    Ok(answer)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct Filter {
    key: String,
    values: Vec<String>,
}

/// A secret is named by its name or by its ARN.
fn resolve(secrets: &BTreeMap<String, Secret>, id: &str) -> Result<String, Refusal> {
    if secrets.contains_key(id) {
        return Ok(id.to_owned());
    }
    let by_arn = secrets.iter().find(|(_, secret)| {
        // An ARN without the service's random ending is understood too.
        secret.arn == id || secret.arn.rsplit_once('-').is_some_and(|(partial, _)| partial == id)
    });
    by_arn.map(|(name, _)| name.clone()).ok_or_else(not_found)
}

fn not_deleted(secret: &Secret) -> Result<(), Refusal> {
    if secret.delete_at.is_none() {
        return Ok(());
    }
    Err(refuse(
        "InvalidRequestException",
        "You can't perform this operation on the secret because it was marked for deletion.",
    ))
}

fn summary(name: &str, secret: &Secret) -> Value {
    let mut summary = json!({
        "ARN": secret.arn,
        "Name": name,
        "CreatedDate": seconds(secret.created),
        "LastChangedDate": seconds(secret.changed),
        "Tags": secret.tags,
    });
    if let Some(description) = &secret.description {
        put_field(&mut summary, "Description", json!(description));
    }
    if let Some(deleted) = secret.deleted {
        put_field(&mut summary, "DeletedDate", seconds(deleted));
    }
    summary
}

fn stages(secret: &Secret) -> Value {
    secret
        .versions
        .iter()
        .map(|(id, version)| (id.clone(), json!(version.stages)))
        .collect::<Map<_, _>>()
        .into()
}

/// Times are seconds since 1970 with their fraction in this protocol.
fn seconds(time: OffsetDateTime) -> Value {
    json!((time.unix_timestamp_nanos() / 1_000_000) as f64 / 1000.0)
}

fn put_field(object: &mut Value, name: &str, value: Value) {
    if let Value::Object(fields) = object {
        fields.insert(name.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;
    use crate::iam::{Caller, Policy};
    use crate::sigv4::{self, Credentials};

    fn key(id: &str) -> Credentials {
        Credentials {
            access_key_id: id.into(),
            secret_access_key: "secret".into(),
            region: "eu-central-1".into(),
            user_arn: format!("arn:aws:iam::0:{id}"),
        }
    }

    struct Server {
        url: String,
        secrets: Secrets,
        seconds: Arc<AtomicI64>,
    }

    impl Server {
        async fn start(path: &Path) -> Self {
            let seconds = Arc::new(AtomicI64::new(1_790_000_000));
            let clock = Arc::clone(&seconds);
            let now = move || OffsetDateTime::from_unix_timestamp(clock.load(Ordering::SeqCst)).unwrap();
            let secrets = Secrets::open(path, now).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/", listener.local_addr().unwrap());
            let (operator, function) = (key("AKID"), key("ROLE"));
            let policy = json!({"Version": "2012-10-17", "Statement": {
                "Effect": "Allow", "Action": "secretsmanager:GetSecretValue",
                "Resource": "arn:aws:secretsmanager:us-east-1:000000000000:secret:mine/*"}});
            let policies = vec![Policy::parse(&policy).unwrap()];
            let function = Caller::in_role(function, "arn:aws:iam::0:role/function".into(), policies);
            let callers = Arc::new(Callers::new(vec![Caller::operator(operator), function]));
            tokio::spawn(serve(listener, secrets.clone(), callers, std::future::pending()));
            Self { url, secrets, seconds }
        }

        async fn call(&self, operation: &str, input: Value) -> Value {
            self.call_as(&key("AKID"), operation, input).await
        }

        async fn call_as(&self, caller: &Credentials, operation: &str, input: Value) -> Value {
            let (target, body) = (format!("secretsmanager.{operation}"), input.to_string());
            let headers = [("x-amz-target", &*target), ("content-type", "application/x-amz-json-1.1")];
            let (now, bytes) = (system_clock(), body.as_bytes());
            let signed =
                sigv4::sign("secretsmanager", caller, &Method::POST, &self.url, &headers, bytes, now);
            let mut request = reqwest::Client::new().post(&self.url).body(body.clone());
            for (name, value) in headers {
                request = request.header(name, value);
            }
            for (name, value) in signed.unwrap() {
                request = request.header(name, value);
            }
            let response = request.send().await.unwrap();
            let status = response.status();
            let answer: Value = response.json().await.unwrap();
            assert_eq!(status.is_success(), answer.get("__type").is_none());
            answer
        }

        async fn value(&self, id: &str) -> Value {
            self.call("GetSecretValue", json!({"SecretId": id})).await["SecretString"].clone()
        }
    }

    #[tokio::test]
    async fn policies_decide_and_a_signature_is_needed() {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::start(&directory.path().join("secrets.json")).await;
        for name in ["mine/one", "other"] {
            server.call("CreateSecret", json!({"Name": name, "SecretString": "x"})).await;
        }
        let role = key("ROLE");
        let read = async |name| server.call_as(&role, "GetSecretValue", json!({"SecretId": name})).await;
        assert_eq!(read("mine/one").await["SecretString"], "x");
        for name in ["other", "none"] {
            assert_eq!(read(name).await["__type"], "AccessDeniedException", "{name}");
        }
        let put = json!({"SecretId": "mine/one", "SecretString": "y"});
        assert_eq!(server.call_as(&role, "PutSecretValue", put).await["__type"], "AccessDeniedException");
        assert_eq!(server.call_as(&role, "ListSecrets", json!({})).await["__type"], "AccessDeniedException");
        let stranger = Credentials { access_key_id: "NOBODY".into(), ..key("ROLE") };
        let refused = server.call_as(&stranger, "ListSecrets", json!({})).await;
        assert_eq!(refused["__type"], "UnrecognizedClientException");
        let forged = Credentials { secret_access_key: "guessed".into(), ..key("AKID") };
        let refused = server.call_as(&forged, "ListSecrets", json!({})).await;
        assert_eq!(refused["__type"], "InvalidSignatureException");
        assert_eq!(server.value("mine/one").await, "x");
    }

    #[tokio::test]
    async fn a_secret_lives_and_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::start(&directory.path().join("secrets.json")).await;
        let token = "11111111-2222-3333-4444-555555555555";
        let create =
            json!({"Name": "bulkhead/tenant/acme/llm", "SecretString": "one", "ClientRequestToken": token});
        let created = server.call("CreateSecret", create.clone()).await;
        assert_eq!(created["VersionId"], token);
        assert_eq!(server.call("CreateSecret", create).await, created);
        let again = server
            .call("CreateSecret", json!({"Name": "bulkhead/tenant/acme/llm", "SecretString": "two"}))
            .await;
        assert_eq!(again["__type"], "ResourceExistsException");

        let id = "bulkhead/tenant/acme/llm";
        let put = server.call("PutSecretValue", json!({"SecretId": id, "SecretString": "two"})).await;
        assert_eq!(put["VersionStages"], json!(["AWSCURRENT"]));
        assert_eq!(server.value(id).await, "two");
        assert_eq!(server.value(created["ARN"].as_str().unwrap()).await, "two");
        let old = server.call("GetSecretValue", json!({"SecretId": id, "VersionStage": "AWSPREVIOUS"})).await;
        assert_eq!((&old["SecretString"], &old["VersionId"]), (&json!("one"), &json!(token)));
        let described = server.call("DescribeSecret", json!({"SecretId": id})).await;
        assert_eq!(described["VersionIdsToStages"][token], json!(["AWSPREVIOUS"]));
        assert_eq!(described["CreatedDate"], json!(1_790_000_000.0));

        let missing = server.call("GetSecretValue", json!({"SecretId": "none"})).await;
        assert_eq!(missing["__type"], "ResourceNotFoundException");
        assert_eq!(server.call("RotateSecret", json!({})).await["__type"], "UnknownOperationException");
        let unknown = server.call("CreateSecret", json!({"Name": "x", "KmsKeyId": "k"})).await;
        assert_eq!(unknown["__type"], "InvalidParameterException");
        assert_eq!(
            server.call("DescribeSecret", json!({"SecretId": "x"})).await["__type"],
            "ResourceNotFoundException"
        );
    }

    #[tokio::test]
    async fn deletion_waits_for_its_window_or_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::start(&directory.path().join("secrets.json")).await;
        for name in ["a", "b"] {
            server.call("CreateSecret", json!({"Name": name, "SecretString": "s"})).await;
        }
        let both = json!({"SecretId": "a", "RecoveryWindowInDays": 7, "ForceDeleteWithoutRecovery": true});
        assert_eq!(server.call("DeleteSecret", both).await["__type"], "InvalidParameterException");
        let deleted = server.call("DeleteSecret", json!({"SecretId": "a", "RecoveryWindowInDays": 7})).await;
        assert_eq!(deleted["DeletionDate"], json!(1_790_000_000.0 + 7.0 * 86_400.0));
        let get = server.call("GetSecretValue", json!({"SecretId": "a"})).await;
        assert_eq!(get["__type"], "InvalidRequestException");
        let create = server.call("CreateSecret", json!({"Name": "a", "SecretString": "s"})).await;
        assert_eq!(create["__type"], "InvalidRequestException");
        server.seconds.fetch_add(7 * 86_400, Ordering::SeqCst);
        let get = server.call("GetSecretValue", json!({"SecretId": "a"})).await;
        assert_eq!(get["__type"], "ResourceNotFoundException");

        let force = json!({"SecretId": "b", "ForceDeleteWithoutRecovery": true});
        assert!(server.call("DeleteSecret", force.clone()).await.get("__type").is_none());
        assert!(server.call("DeleteSecret", force).await.get("__type").is_none());
        let listed = server.call("ListSecrets", json!({"IncludePlannedDeletion": true})).await;
        assert_eq!(listed["SecretList"][0]["Name"], "b", "it goes in the background");
        let get = server.call("GetSecretValue", json!({"SecretId": "b"})).await;
        assert_eq!(get["__type"], "InvalidRequestException");
        server.seconds.fetch_add(1, Ordering::SeqCst);
        assert_eq!(
            server.call("DescribeSecret", json!({"SecretId": "b"})).await["__type"],
            "ResourceNotFoundException"
        );
    }

    #[tokio::test]
    async fn lists_page_by_prefix_and_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secrets.json");
        let server = Server::start(&path).await;
        server.secrets.set("bulkhead/vector", "root").unwrap();
        server.secrets.set("bulkhead/vector", "root").unwrap();
        for n in 0..3 {
            server.secrets.set(&format!("bulkhead/tenant/acme/{n}"), "s").unwrap();
        }
        drop(server);
        let server = Server::start(&path).await;
        assert_eq!(server.value("bulkhead/vector").await, "root");
        let mut names = Vec::new();
        let mut input =
            json!({"MaxResults": 2, "Filters": [{"Key": "name", "Values": ["bulkhead/tenant/acme/"]}]});
        loop {
            let page = server.call("ListSecrets", input.clone()).await;
            names.extend(page["SecretList"].as_array().unwrap().iter().map(|entry| entry["Name"].clone()));
            match page.get("NextToken") {
                Some(token) => input["NextToken"] = token.clone(),
                None => break,
            }
        }
        assert_eq!(names, ["bulkhead/tenant/acme/0", "bulkhead/tenant/acme/1", "bulkhead/tenant/acme/2"]);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
}
