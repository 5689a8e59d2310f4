//! The whole stack: every service on a port of its own, the functions as processes, the gateway in
//! front. What it runs, and with which settings, is read from the template.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::control::{self, Control};
use crate::gateway::{Gateway, Poison};
use crate::iam::{Caller, Callers};
use crate::identity::{AdminKey, Identity, SeededTenant};
use crate::lambda::{self, Lambda, Options as LambdaOptions};
use crate::queues::{self, Queues};
use crate::serving::{Traces, replace_file, system_clock, unique_id};
use crate::sigv4::Credentials;
use crate::template::{self, Function, Template, TemplateError};
use crate::{
    dynamodb, kms, offline_embeddings, offline_model, qdrant, s3, schedules, secrets, sigv4, streams, sts,
};

/// How long a service may take to end once it is asked to.
const GRACE: Duration = Duration::from_secs(4);
/// The model whose vectors the offline endpoint computes, and their length.
const OFFLINE_EMBEDDING: (&str, u32) = ("offline-embeddings", 512);

/// The tenants that a newcomer finds.
const SEEDED: [(&str, &str, &str); 2] =
    [("acme", "professional", "Acme Corporation"), ("globex", "enterprise", "Globex Corporation")];

/// How a stack is started.
#[derive(Clone, Debug)]
pub struct Config {
    /// The gateway's port on the loopback address; 0 for any.
    pub port: u16,
    /// Where everything is kept.
    pub data: PathBuf,
    /// Written once the stack answers.
    pub ready_file: Option<PathBuf>,
    /// Whether a fresh directory gets its two tenants.
    pub seed: bool,
    /// The folder with the functions' programs.
    pub functions: PathBuf,
    /// The template.
    pub template: PathBuf,
    /// The model's service; the offline model if there is none.
    pub model: Option<Endpoint>,
    /// The embeddings service and its model; the offline one if there is none.
    pub embeddings: Option<(Endpoint, String, u32)>,
    /// The reranker and its model, if there is one.
    pub reranker: Option<(Endpoint, String)>,
    /// Milliseconds between two words of the offline model.
    pub model_delay_ms: u64,
    /// Values of the template's parameters, in place of those that the stack itself gives.
    pub parameters: Vec<(String, String)>,
    /// The functions' log level.
    pub log_level: String,
}

/// A service elsewhere.
#[derive(Clone)]
pub struct Endpoint {
    /// Its base address.
    pub url: String,
    /// Its key.
    pub key: String,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Why a stack does not run. Each is one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    /// The port cannot be had.
    #[error("port {port} cannot be used ({source}); choose another with --port")]
    Port {
        /// The port.
        port: u16,
        /// What the system says.
        source: io::Error,
    },
    /// Another stack uses the directory.
    #[error("another stack is running on {0}; end it, or choose another directory with --data")]
    InUse(PathBuf),
    /// A file or directory cannot be used.
    #[error("{path} cannot be used: {source}")]
    File {
        /// The path.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The template cannot be used.
    #[error("the template cannot be used: {0}")]
    Template(#[from] TemplateError),
    /// A program of a function is missing.
    #[error("the program of function `{0}` is not in {1}; build it, or leave out --functions")]
    NoBinary(String, PathBuf),
    /// A service failed.
    #[error("{service} failed: {reason}")]
    Service {
        /// Which.
        service: &'static str,
        /// Why.
        reason: String,
    },
    /// A tenant could not be made.
    #[error("tenant `{tenant}` could not be made: {reason}")]
    Seed {
        /// The tenant.
        tenant: String,
        /// What was answered.
        reason: String,
    },
}

/// What a stack says of itself once it answers.
#[derive(Clone, Serialize)]
#[expect(missing_docs, reason = "the names are api.md's and say what they are")]
pub struct Ready {
    pub url: String,
    pub admin: AdminKey,
    pub tenants: Vec<SeededTenant>,
    pub dynamodb_url: String,
    pub s3_url: String,
    pub qdrant_url: String,
    pub secrets_url: String,
    pub sts_url: String,
    pub kms_url: String,
    pub lambda_url: String,
    pub audit_bucket: String,
    /// The model's service in use.
    pub model_url: String,
    /// The embeddings service in use.
    pub embeddings_url: String,
    /// What tests steer the stack with; [`control`] says how.
    pub control_url: String,
    /// What the functions print.
    pub log_directory: PathBuf,
    /// The queues that nobody reads: for each a file of messages, one to a line.
    pub queue_directory: PathBuf,
}

/// A running stack.
pub struct Stack {
    ready: Ready,
    lambda: Arc<Lambda>,
    front: Services,
    back: Services,
    _lock: File,
}

/// Servers that are asked to end together.
struct Services {
    tasks: JoinSet<StackError>,
    stop: watch::Sender<bool>,
}

impl Services {
    fn new() -> Self {
        Self { tasks: JoinSet::new(), stop: watch::Sender::new(false) }
    }

    /// Resolves once the services are asked to end.
    fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stop = self.stop.subscribe();
        async move {
            // An error means that the sender is gone, and with it the stack.
            let _ = stop.wait_for(|stop| *stop).await;
        }
    }

    fn run<E: std::fmt::Display + Send + 'static>(
        &mut self,
        service: &'static str,
        serving: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        self.tasks.spawn(async move {
            let reason = match serving.await {
                Ok(()) => "it ended".to_owned(),
                Err(error) => error.to_string(),
            };
            StackError::Service { service, reason }
        });
    }

    async fn stop(mut self) {
        self.stop.send_replace(true);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        // Whoever does not end in time is dropped with the set.
        let _ = tokio::time::timeout(GRACE, all).await;
    }
}

/// A listener on the loopback address, and its URL.
async fn listen(port: u16) -> Result<(TcpListener, String), StackError> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = TcpListener::bind(address).await.map_err(|source| StackError::Port { port, source })?;
    let address = listener.local_addr().map_err(|source| StackError::Port { port, source })?;
    Ok((listener, format!("http://{address}")))
}

impl Stack {
    /// Starts everything and returns once it answers.
    ///
    /// # Errors
    /// [`StackError`]; what had been started is ended again.
    pub async fn start(config: Config) -> Result<Self, StackError> {
        let in_data = |name: &str| config.data.join(name);
        std::fs::create_dir_all(&config.data).map_err(|source| file(&config.data, source))?;
        let lock = lock(&config.data)?;
        let (gateway_listener, url) = listen(config.port).await?;
        let mut identity =
            Identity::open(&config.data).map_err(|source| file(&in_data("identity.json"), source))?;

        let mut back = Services::new();
        let (dynamodb_listener, dynamodb_url) = listen(0).await?;
        let (s3_listener, s3_url) = listen(0).await?;
        let (qdrant_listener, qdrant_url) = listen(0).await?;
        let (secrets_listener, secrets_url) = listen(0).await?;
        let (sts_listener, sts_url) = listen(0).await?;
        let (kms_listener, kms_url) = listen(0).await?;
        let (lambda_listener, lambda_url) = listen(0).await?;
        let (control_listener, control_url) = listen(0).await?;
        let (model_url, model_key) = match &config.model {
            Some(endpoint) => (endpoint.url.clone(), endpoint.key.clone()),
            None => {
                let (listener, url) = listen(0).await?;
                let options = offline_model::Options {
                    api_key: Some("offline".to_owned()),
                    delay_ms_per_delta: config.model_delay_ms,
                };
                let stopped = back.stopped();
                back.run("the offline model", offline_model::serve(listener, options, system_clock, stopped));
                (url, "offline".to_owned())
            }
        };
        let (embeddings_url, embeddings_key, (embedding, dimensions)) = match &config.embeddings {
            Some((endpoint, model, dimensions)) => {
                (endpoint.url.clone(), endpoint.key.clone(), (model.as_str(), *dimensions))
            }
            None => {
                let (listener, url) = listen(0).await?;
                let stopped = back.stopped();
                back.run("the offline embeddings", offline_embeddings::serve(listener, stopped));
                (url, "offline".to_owned(), OFFLINE_EMBEDDING)
            }
        };

        let mut parameters = BTreeMap::from(
            [
                ("QdrantCells", format!("default={qdrant_url}")),
                ("ModelUrl", model_url.clone()),
                ("EmbeddingsUrl", embeddings_url.clone()),
                ("EmbeddingsModel", embedding.to_owned()),
                ("EmbeddingsDimensions", dimensions.to_string()),
                ("LogLevel", config.log_level.clone()),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        // Without one its key is whatever a parameter's service takes.
        let mut rerank_key = "offline".to_owned();
        if let Some((endpoint, model)) = config.reranker {
            rerank_key = endpoint.key;
            parameters.insert("RerankUrl".to_owned(), endpoint.url);
            parameters.insert("RerankModel".to_owned(), model);
        }
        parameters.extend(config.parameters);
        let template = Template::load(&config.template, &parameters)?;
        for function in &template.functions {
            if !config.functions.join(&function.binary).is_file() {
                return Err(StackError::NoBinary(function.binary.clone(), config.functions));
            }
        }

        let failed = |service| {
            move |error: &dyn std::fmt::Display| StackError::Service { service, reason: error.to_string() }
        };
        let (logs, queue_directory) = (in_data("logs"), in_data("queues"));
        let roles = template.functions.iter().map(|function| (function.logical_id.clone(), role(function)));
        let roles: BTreeMap<String, Caller> = roles.collect();
        let keys = roles.iter().map(|(function, role)| (function.clone(), role.credentials.clone()));
        let mut options = LambdaOptions::new(config.functions.clone(), logs.clone(), keys.collect());
        let operator = Caller::operator(identity.admin.credentials());
        let callers = Arc::new(Callers::new(roles.into_values().chain([operator]).collect()));
        options.environment = BTreeMap::from(
            [
                ("AWS_ENDPOINT_URL_DYNAMODB", &dynamodb_url),
                ("AWS_ENDPOINT_URL_S3", &s3_url),
                ("AWS_ENDPOINT_URL_SECRETS_MANAGER", &secrets_url),
                ("AWS_ENDPOINT_URL_STS", &sts_url),
                ("AWS_ENDPOINT_URL_KMS", &kms_url),
                ("AWS_ENDPOINT_URL_LAMBDA", &lambda_url),
            ]
            .map(|(name, value)| (name.to_owned(), value.clone())),
        );
        let lambda = Lambda::start(template.functions.clone(), options)
            .await
            .map_err(|e| failed("the Lambda Runtime API")(&e))?;

        let database = dynamodb::open(&in_data("dynamodb.sqlite"), &template.tables)
            .map_err(|e| failed("DynamoDB")(&e))?;
        let functions = template.functions.iter().map(|function| function.binary.clone()).collect();
        let kill: dynamodb::Kill = {
            let lambda = Arc::clone(&lambda);
            Arc::new(move |function| {
                let lambda = Arc::clone(&lambda);
                async move { lambda.kill_and_wait(&function).await }.boxed()
            })
        };
        let dynamodb_front = dynamodb::Front::new(&template.tables, Arc::clone(&callers), functions, kill);
        let stopped = back.stopped();
        let serving =
            dynamodb::serve(dynamodb_listener, database.clone(), Arc::clone(&dynamodb_front), stopped);
        back.run("DynamoDB", serving);
        let stopped = back.stopped();
        let invoking =
            lambda::front::serve(lambda_listener, Arc::clone(&lambda), Arc::clone(&callers), stopped);
        back.run("Lambda", invoking);
        let read = template.functions.iter().flat_map(|function| &function.events.queues);
        let messages = Queues::open(&queue_directory, read.map(|event| event.queue.clone()))
            .map_err(|source| file(&queue_directory, source))?;
        let (events, told) = mpsc::unbounded_channel();
        let stopped = back.stopped();
        let telling = Arc::clone(&messages).tell(template.buckets.clone(), told, system_clock, stopped);
        back.run("S3's notifications", telling);
        let kms =
            kms::Kms::open(&in_data("kms.json"), Arc::clone(&callers)).map_err(|e| failed("KMS")(&e))?;
        let s3_options = s3::Options {
            directory: in_data("s3"),
            callers: Arc::clone(&callers),
            kms: Arc::clone(&kms),
            buckets: template.buckets.clone(),
            events: Some(events),
        };
        let stopped = back.stopped();
        back.run("S3", s3::serve(s3_listener, s3_options, system_clock, stopped));
        let stopped = back.stopped();
        let traces = Traces::default();
        let (root_key, webhook_key) = (identity.qdrant_root_key.clone(), identity.webhook_key.clone());
        back.run(
            "Qdrant",
            qdrant::serve(qdrant_listener, in_data("qdrant"), root_key.clone(), traces.clone(), stopped),
        );
        let sts = sts::Sts::new(template.roles.clone(), Arc::clone(&callers));
        let stopped = back.stopped();
        back.run("STS", sts::serve(sts_listener, Arc::clone(&sts), stopped));
        let stopped = back.stopped();
        back.run("KMS", kms::serve(kms_listener, Arc::clone(&kms), stopped));
        let store = secrets::Secrets::open(&in_data("secrets.json"), system_clock)
            .map_err(|e| failed("Secrets Manager")(&e))?;
        for secret in &template.secrets {
            let value = match secret.logical_id.as_str() {
                "QdrantRootKey" => &root_key,
                "ModelKey" => &model_key,
                "EmbeddingsKey" => &embeddings_key,
                "RerankKey" => &rerank_key,
                "WebhookKey" => &webhook_key,
                // An operator sets the others.
                _ => continue,
            };
            store.set(&secret.name, value).map_err(|e| failed("Secrets Manager")(&e))?;
        }
        let stopped = back.stopped();
        let serving = secrets::serve(secrets_listener, store, Arc::clone(&callers), stopped);
        back.run("Secrets Manager", serving);

        let mut front = Services::new();
        for function in &template.functions {
            let arn = template::function_arn(&function.name);
            for stream in &function.events.streams {
                let mapping = streams::Mapping {
                    stream: stream.clone(),
                    function_arn: arn.clone(),
                    invoke: lambda.invoker(&function.logical_id),
                    position: in_data("streams")
                        .join(format!("{}-{}.json", function.logical_id, stream.name)),
                    queues: queue_directory.clone(),
                    callers: Arc::clone(&callers),
                    caller: Arc::new(role(function)),
                };
                let (written, stopped) = (dynamodb_front.written(), front.stopped());
                let reading = streams::run(mapping, database.clone(), written, system_clock, stopped);
                front.run("a stream's mapping", reading);
            }
            for queue in &function.events.queues {
                let invoke = lambda.invoker(&function.logical_id);
                let stopped = front.stopped();
                let reader =
                    queues::Reader { caller: Arc::new(role(function)), callers: Arc::clone(&callers) };
                let delivering =
                    Arc::clone(&messages).deliver(queue.clone(), reader, invoke, system_clock, stopped);
                front.run("a queue's mapping", delivering);
            }
            for schedule in &function.events.schedules {
                let invoke = lambda.invoker(&function.logical_id);
                let stopped = front.stopped();
                front.run("a schedule", schedules::run(schedule.clone(), invoke, system_clock, stopped));
            }
        }
        let stopped = front.stopped();
        let operators = vec![identity.admin.credentials()];
        let (api, decisions) = (template.api.clone(), Poison::default());
        let gateway =
            Gateway::serve(gateway_listener, api, Arc::clone(&lambda), operators, decisions.clone(), stopped);
        front.run("the gateway", gateway);
        let stopped = front.stopped();
        let steered = Control {
            lambda: Arc::clone(&lambda),
            dynamodb: dynamodb_front,
            sts,
            kms,
            callers,
            decisions,
            traces,
            queues: messages,
        };
        front.run("the control address", control::serve(control_listener, steered, stopped));

        if config.seed && identity.tenants.is_empty() {
            for (tenant, tier, company) in SEEDED {
                let seeded = seed(&url, &identity.admin, tenant, tier, company).await?;
                identity.tenants.push(seeded);
            }
            identity.save(&config.data).map_err(|source| file(&in_data("identity.json"), source))?;
        }
        let ready = Ready {
            url,
            admin: identity.admin,
            tenants: identity.tenants,
            dynamodb_url,
            s3_url,
            qdrant_url,
            secrets_url,
            sts_url,
            kms_url,
            lambda_url,
            audit_bucket: template.bucket_name("AuditBucket").unwrap_or_default().to_owned(),
            model_url,
            embeddings_url,
            control_url: format!("{control_url}/_local"),
            log_directory: logs,
            queue_directory,
        };
        if let Some(path) = &config.ready_file {
            let text = serde_json::to_vec_pretty(&ready).map_err(|e| file(path, e.into()))?;
            replace_file(path, &text, 0o600).map_err(|source| file(path, source))?;
        }
        Ok(Self { ready, lambda, front, back, _lock: lock })
    }

    /// What the stack says of itself.
    pub fn ready(&self) -> &Ready {
        &self.ready
    }

    /// Resolves when a service fails, which none should.
    pub async fn failure(&mut self) -> StackError {
        let ended = tokio::select! {
            Some(ended) = self.front.tasks.join_next() => ended,
            Some(ended) = self.back.tasks.join_next() => ended,
            else => return StackError::Service { service: "the stack", reason: "nothing runs".into() },
        };
        ended.unwrap_or_else(|e| StackError::Service { service: "a server", reason: e.to_string() })
    }

    /// Ends everything, the doors first, so that what is under way can finish.
    pub async fn stop(self) {
        self.front.stop().await;
        self.lambda.shutdown().await;
        self.back.stop().await;
    }
}

/// The role that a function runs in, with an access key for this run of the stack.
fn role(function: &Function) -> Caller {
    let credentials = Credentials {
        access_key_id: format!("ASIA{}", unique_id().to_ascii_uppercase()),
        secret_access_key: format!("{}{}", unique_id(), unique_id()),
        region: template::REGION.to_owned(),
        user_arn: format!(
            "arn:aws:sts::{}:assumed-role/{}/{}",
            template::ACCOUNT,
            function.logical_id,
            function.name
        ),
    };
    let role = template::function_role_arn(&function.logical_id);
    Caller::in_role(credentials, role, function.policies.clone())
}

fn file(path: &Path, source: io::Error) -> StackError {
    StackError::File { path: path.to_owned(), source }
}

/// Takes the directory for this stack alone; the system lets go of it when the process ends.
fn lock(data: &Path) -> Result<File, StackError> {
    let path = data.join("lock");
    let lock = File::create(&path).map_err(|source| file(&path, source))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StackError::InUse(data.to_owned())),
        Err(TryLockError::Error(source)) => Err(file(&path, source)),
    }
}

/// Makes a tenant as an operator does: through the gateway, with a signed request.
async fn seed(
    url: &str,
    admin: &AdminKey,
    tenant: &str,
    tier: &str,
    company: &str,
) -> Result<SeededTenant, StackError> {
    let failed = |reason: String| StackError::Seed { tenant: tenant.to_owned(), reason };
    let url = format!("{url}/admin/tenants");
    let body = json!({ "tenant_id": tenant, "tier": tier, "company_name": company }).to_string();
    let headers = [("content-type", "application/json")];
    let signed = sigv4::sign(
        sigv4::GATEWAY,
        &admin.credentials(),
        &http::Method::POST,
        &url,
        &headers,
        body.as_bytes(),
        system_clock(),
    )
    .map_err(|e| failed(e.to_string()))?;
    let mut request = reqwest::Client::new().post(&url).timeout(Duration::from_secs(30));
    for (name, value) in headers.map(|(n, v)| (n.to_owned(), v.to_owned())).into_iter().chain(signed) {
        request = request.header(name, value);
    }
    let response = request.body(body).send().await.map_err(|e| failed(e.to_string()))?;
    let text = response.text().await.map_err(|e| failed(e.to_string()))?;
    let answer: Value = serde_json::from_str(&text).unwrap_or_default();
    match answer.get("api_key").and_then(Value::as_str) {
        Some(api_key) => Ok(SeededTenant { tenant_id: tenant.to_owned(), api_key: api_key.to_owned() }),
        None => Err(failed(text)),
    }
}
