//! The rig of the end-to-end tests: a whole stack of real binaries, spoken to as clients do.
//!
//! [`Stack::start`] runs the very program that a newcomer runs, on ports and a directory of its own,
//! and stops it at the end. Nothing here calls a handler.

#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a rig fails by panicking"
)]

pub mod contract;
pub mod reranker;
pub mod tokens;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use local::serving::system_clock;
use local::sigv4::{self, Credentials};
use local::template::Template;
use reqwest::{Client, Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::contract::{Asked, Asking};

/// How long a stack may take to answer. Generous: machines differ, and this is no measurement.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long something may take that comes about by itself; generous too.
const COMES_ABOUT: Duration = Duration::from_secs(90);

/// How a stack is started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Milliseconds between two words of the offline model.
    pub model_delay_ms: u64,
    /// Parameters of the template.
    pub parameters: Vec<(&'static str, String)>,
    /// Whether the two tenants that a newcomer gets are left out.
    pub no_seed: bool,
    /// A data directory to use; its own otherwise.
    pub data: Option<PathBuf>,
    /// The address of a model's service to call instead of the offline one.
    pub model_url: Option<String>,
    /// Embeddings to use instead of the offline ones.
    pub embeddings: Option<Embeddings>,
    /// A folder with the functions' programs; those that are built with the tests otherwise.
    pub functions: Option<PathBuf>,
}

/// An embeddings service of OpenAI's protocol, and what is asked of it.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// Its address.
    pub url: String,
    /// Its key.
    pub key: String,
    /// Its model, which must have a price.
    pub model: String,
    /// The length of its vectors.
    pub dimensions: u32,
}

/// A running stack.
pub struct Stack {
    child: Child,
    directory: tempfile::TempDir,
    ready: Value,
    http: Client,
}

/// A tenant and its key.
#[derive(Clone, Debug)]
pub struct Tenant {
    url: String,
    http: Client,
    /// The tenant's id.
    pub id: String,
    /// Its key.
    pub key: String,
    /// The user that its requests name.
    pub user: Option<String>,
    /// The groups that its requests name.
    pub groups: Option<String>,
}

/// An access key, with the token that goes with it if it is a session's.
#[derive(Clone, Debug)]
pub struct Key {
    /// The key.
    pub credentials: Credentials,
    /// The token.
    pub token: Option<String>,
}

/// An answer, read whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: reqwest::header::HeaderMap,
    /// The body as text.
    pub text: String,
}

/// A server-sent event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// Its data.
    pub data: Value,
}

/// Builds everything once per test binary and says where it is. `cargo test` builds the tests alone;
/// the same selection of packages and targets keeps cargo from compiling anything twice. A benchmark does
/// without the tests.
///
/// # Panics
/// If it does not build.
pub fn binaries() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root");
        let benchmark = std::env::args().any(|argument| argument == "--bench");
        let beside = if benchmark { "--benches" } else { "--tests" };
        let status = local::cargo::command()
            .args(["build", "--quiet", "--workspace", "--bins", beside])
            .current_dir(root)
            .status()
            .expect("cargo runs");
        assert!(status.success(), "the workspace does not build");
        let test = std::env::current_exe().expect("this test's own path");
        // target/debug/deps/<test>
        test.ancestors().nth(2).expect("the target directory").to_owned()
    })
}

/// The template that the stack runs from.
///
/// # Panics
/// If it does not evaluate.
pub fn template() -> Template {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../infra/template.yaml");
    let given = [
        ("QdrantCells", "default=https://x.example"),
        ("ModelUrl", "https://x.example"),
        ("EmbeddingsUrl", "https://x.example"),
        ("EmbeddingsModel", "x"),
        ("EmbeddingsDimensions", "512"),
    ];
    let parameters = given.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Template::load(&path, &parameters).expect("the template evaluates")
}

impl Stack {
    /// Starts a stack with the two tenants that a newcomer gets, `acme` and `globex`.
    pub async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    /// Starts a stack.
    ///
    /// # Panics
    /// If it does not answer in time; its log is printed.
    pub async fn start_with(options: Options) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let ready_file = directory.path().join("ready.json");
        let log = directory.path().join("stack.log");
        let output = std::fs::File::create(&log).expect("a log");
        let binaries = binaries();
        let mut command = Command::new(binaries.join("local"));
        command
            .args(["--port", "0", "--functions"])
            .arg(options.functions.as_deref().unwrap_or(binaries))
            .arg("--data")
            .arg(options.data.clone().unwrap_or_else(|| directory.path().join("data")))
            .arg("--ready-file")
            .arg(&ready_file)
            .args(["--model-delay-ms", &options.model_delay_ms.to_string()])
            // Real keys in the environment must not make a test call real services.
            .env_remove("ANTHROPIC_API_KEY")
            .env_remove("EMBEDDINGS_API_KEY")
            .env_remove("EMBEDDINGS_URL")
            .env_remove("MODEL_URL")
            .env_remove("RERANK_URL")
            .env_remove("RERANK_API_KEY")
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle"))
            .stderr(output)
            .kill_on_drop(true);
        for (name, value) in &options.parameters {
            command.args(["--parameter", &format!("{name}={value}")]);
        }
        if options.no_seed {
            command.arg("--no-seed");
        }
        if let Some(url) = &options.model_url {
            command.args(["--model-url", url]).env("ANTHROPIC_API_KEY", "offline");
        }
        if let Some(Embeddings { url, key, model, dimensions }) = &options.embeddings {
            command.args(["--embeddings-url", url, "--embeddings-model", model]);
            command.args(["--embeddings-dimensions", &dimensions.to_string()]);
            command.env("EMBEDDINGS_API_KEY", key);
        }
        let mut child = command.spawn().expect("the stack starts");
        let waiting = async {
            loop {
                if let Ok(text) = std::fs::read_to_string(&ready_file) {
                    break serde_json::from_str(&text).expect("the ready file is JSON");
                }
                if let Some(status) = child.try_wait().expect("the stack's state") {
                    panic!("the stack ended with {status}:\n{}", std::fs::read_to_string(&log).unwrap());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let ready = tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| {
            panic!("the stack does not answer:\n{}", std::fs::read_to_string(&log).unwrap())
        });
        Self { child, directory, ready, http: client() }
    }

    /// An operator's access to the stack's tables.
    pub async fn tables_access(&self) -> shared::aws::Access {
        let admin = &self.ready["admin"];
        let (id, secret) = (text(admin, "access_key_id"), text(admin, "secret_access_key"));
        let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .region(aws_config::Region::new(text(admin, "region").to_owned()))
            .endpoint_url(text(&self.ready, "dynamodb_url"))
            .credentials_provider(aws_sdk_s3::config::Credentials::new(id, secret, None, None, "rig"))
            .load()
            .await;
        shared::aws::Access::own(&config)
    }

    /// The name of a table, given without the stack's prefix.
    pub fn table(table: &str) -> String {
        format!("bulkhead-{table}")
    }

    /// A client of the stack's buckets, as an operator.
    pub fn s3(&self) -> aws_sdk_s3::Client {
        self.s3_as(&self.operator())
    }

    /// A client of the stack's buckets with somebody's key.
    pub fn s3_as(&self, key: &Key) -> aws_sdk_s3::Client {
        let Key { credentials: Credentials { access_key_id, secret_access_key, region, .. }, token } =
            key.clone();
        let credentials =
            aws_sdk_s3::config::Credentials::new(access_key_id, secret_access_key, token, None, "rig");
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(aws_sdk_s3::config::BehaviorVersion::latest())
            .region(aws_sdk_s3::config::Region::new(region))
            .endpoint_url(text(&self.ready, "s3_url"))
            .credentials_provider(credentials)
            .force_path_style(true)
            .build();
        aws_sdk_s3::Client::from_conf(config)
    }

    /// The bucket of the audit log.
    pub fn audit_bucket(&self) -> &str {
        text(&self.ready, "audit_bucket")
    }

    /// Runs the operators' program against the stack's API and buckets.
    ///
    /// # Panics
    /// If it does not run.
    pub async fn bulkhead(&self, arguments: &[&str]) -> std::process::Output {
        let admin = &self.ready["admin"];
        let mut command = Command::new(binaries().join("bulkhead"));
        command
            .args(arguments)
            .env("BULKHEAD_ENDPOINT", self.url())
            .env("AWS_ENDPOINT_URL_S3", text(&self.ready, "s3_url"))
            .env("AWS_ACCESS_KEY_ID", text(admin, "access_key_id"))
            .env("AWS_SECRET_ACCESS_KEY", text(admin, "secret_access_key"))
            .env("AWS_REGION", text(admin, "region"))
            .kill_on_drop(true);
        command.output().await.expect("the program runs")
    }

    /// The most memory that each process of a function has held so far, in kilobytes.
    ///
    /// # Panics
    /// If the machine does not tell: it takes Linux.
    pub fn most_memory(&self, function: &str) -> Vec<u64> {
        let number = |status: &str, name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let parent = self.child.id().map(u64::from);
        let processes = std::fs::read_dir("/proc").expect("processes");
        let statuses =
            processes.flatten().filter_map(|p| std::fs::read_to_string(p.path().join("status")).ok());
        statuses
            .filter(|status| {
                status.lines().next().is_some_and(|name| name.ends_with(&format!("\t{function}")))
            })
            .filter(|status| number(status, "PPid") == parent)
            .filter_map(|status| number(&status, "VmHWM"))
            .collect()
    }

    /// What the stack says of itself once it answers.
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    /// The gateway's base address.
    pub fn url(&self) -> &str {
        text(&self.ready, "url")
    }

    /// One of the tenants that the stack made by itself.
    pub fn tenant(&self, id: &str) -> Tenant {
        let tenants = self.ready["tenants"].as_array().expect("tenants");
        let tenant = tenants.iter().find(|t| t["tenant_id"] == id).expect("a seeded tenant");
        self.tenant_with_key(id, text(tenant, "api_key"))
    }

    /// A tenant whose key is known.
    pub fn tenant_with_key(&self, id: &str, key: &str) -> Tenant {
        Tenant {
            url: self.url().to_owned(),
            http: self.http.clone(),
            id: id.to_owned(),
            key: key.to_owned(),
            user: None,
            groups: None,
        }
    }

    /// Provisions a tenant as an operator does.
    pub async fn provision(&self, body: Value) -> Tenant {
        let answer = self.admin(Method::POST, "/admin/tenants", Some(&body)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text);
        let created = answer.json();
        self.tenant_with_key(text(&created, "tenant_id"), text(&created, "api_key"))
    }

    /// Sends an operator's request, signed.
    pub async fn admin(&self, method: Method, path: &str, body: Option<&Value>) -> Answer {
        let body = body.map(|b| b.to_string()).unwrap_or_default();
        self.admin_raw(method, path, body.into_bytes()).await
    }

    /// An operator's change of a tenant, which must be made.
    pub async fn change_tenant(&self, id: &str, change: Value) {
        self.patch_tenant(id, change).await.expect_status(StatusCode::OK);
    }

    /// An operator's change of a tenant.
    pub async fn patch_tenant(&self, id: &str, change: Value) -> Answer {
        self.admin(Method::PATCH, &format!("/admin/tenants/{id}"), Some(&change)).await
    }

    /// Sends an operator's request, signed, with any bytes as its body.
    pub async fn admin_raw(&self, method: Method, path: &str, body: Vec<u8>) -> Answer {
        let url = format!("{}{path}", self.url());
        let headers = [("content-type", "application/json")];
        let request = self.signed(&self.operator(), sigv4::GATEWAY, method, &url, &headers, body);
        Answer::read(request.send().await.expect("the gateway answers")).await
    }

    /// An operator's request as it was signed with some key, so long ago, ready to be sent, and sent again.
    pub fn signed_before(
        &self,
        key: &Key,
        ago: Duration,
        method: Method,
        path: &str,
        body: &Value,
    ) -> Asking {
        let (url, headers) = (format!("{}{path}", self.url()), [("content-type", "application/json")]);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let at = system_clock() - ago;
        let signed =
            sigv4::sign(sigv4::GATEWAY, &key.credentials, &method, &url, &headers, body.as_bytes(), at);
        let request = Asking::new(&self.http, method, &url).header(headers[0].0, headers[0].1).body(body);
        let signed = signed.expect("a signature").into_iter();
        signed.fold(request, |request, (name, value)| request.header(name, value))
    }

    /// The operator's key.
    pub fn operator(&self) -> Key {
        let admin = &self.ready["admin"];
        let credentials = Credentials {
            access_key_id: text(admin, "access_key_id").to_owned(),
            secret_access_key: text(admin, "secret_access_key").to_owned(),
            region: text(admin, "region").to_owned(),
            user_arn: String::new(),
        };
        Key { credentials, token: None }
    }

    /// A function's own key, as whoever broke into it would use it.
    ///
    /// # Panics
    /// If no process of the function runs.
    pub fn own_key(&self, function: &str) -> Key {
        let processes = self.processes(function);
        let environment = processes.values().next().expect("a process of the function");
        let credentials = Credentials {
            access_key_id: environment["AWS_ACCESS_KEY_ID"].clone(),
            secret_access_key: environment["AWS_SECRET_ACCESS_KEY"].clone(),
            region: environment["AWS_REGION"].clone(),
            user_arn: String::new(),
        };
        Key { credentials, token: None }
    }

    /// Assumes a role with somebody's key, for a session with these tags.
    ///
    /// # Errors
    /// STS's error code.
    pub async fn assume(&self, key: &Key, role: &str, tags: &[(&str, &str)]) -> Result<Key, String> {
        let role = format!("arn:aws:iam::000000000000:role/bulkhead-{role}");
        let mut form = format!(
            "Action=AssumeRole&Version=2011-06-15&RoleSessionName=rig&RoleArn={}",
            role.replace(':', "%3A").replace('/', "%2F")
        );
        for (n, (name, value)) in tags.iter().enumerate() {
            form.push_str(&format!("&Tags.member.{}.Key={name}&Tags.member.{0}.Value={value}", n + 1));
        }
        let url = format!("{}/", text(&self.ready, "sts_url"));
        let headers = [("content-type", "application/x-www-form-urlencoded")];
        let request = self.signed(key, "sts", Method::POST, &url, &headers, form.into_bytes());
        let answer = Answer::read(request.send().await.expect("STS answers")).await;
        let part = |name: &str| {
            let (_, rest) = answer.text.split_once(&format!("<{name}>"))?;
            Some(rest.split_once('<')?.0.to_owned())
        };
        if !answer.status.is_success() {
            return Err(part("Code").expect("an error code"));
        }
        let credentials = Credentials {
            access_key_id: part("AccessKeyId").expect("a key"),
            secret_access_key: part("SecretAccessKey").expect("a secret"),
            ..key.credentials.clone()
        };
        Ok(Key { credentials, token: part("SessionToken") })
    }

    /// Steers STS: `{"outage": true}`, `{"lifetime_s": n}`; `{}` ends it.
    ///
    /// # Panics
    /// If it is malformed.
    pub async fn steer_sts(&self, steering: Value) {
        let path = format!("{}/sts", text(&self.ready, "control_url"));
        let sent = self.http.put(path).json(&steering).send().await.expect("the control address answers");
        assert!(sent.status().is_success(), "{steering}");
    }

    /// What the roles of functions and sessions were allowed so far; for each kind of call once.
    pub async fn deeds(&self) -> Vec<local::iam::Deed> {
        let deeds = self.control(Method::GET, "permissions", String::new()).await.json();
        serde_json::from_value(deeds).expect("deeds")
    }

    /// How many sessions STS has given.
    pub async fn sessions_given(&self) -> u64 {
        let state = self.control(Method::GET, "sts", String::new()).await.json();
        state["given"].as_u64().expect("a number")
    }

    /// Makes a KMS key, as an operator does, and returns its ARN.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn create_kms_key(&self) -> String {
        let made = self.kms("CreateKey", json!({})).await;
        text(&made["KeyMetadata"], "Arn").to_owned()
    }

    /// Makes a call of KMS as an operator: `DisableKey`, `EnableKey`, `ScheduleKeyDeletion`.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn kms(&self, operation: &str, input: Value) -> Value {
        let answer =
            self.signed_by(&self.operator(), "kms", &format!("TrentService.{operation}"), &input).await;
        assert!(answer.status.is_success(), "{operation}: {}", answer.text);
        answer.json()
    }

    /// Makes KMS unavailable, or available again.
    pub async fn kms_outage(&self, outage: bool) {
        self.control(Method::PUT, "kms", json!({"outage": outage}).to_string()).await;
    }

    /// The calls of functions that KMS has had since they were last forgotten, and forgets them.
    pub async fn take_kms_calls(&self) -> Vec<Value> {
        let state = self.control(Method::GET, "kms", String::new()).await.json();
        self.control(Method::DELETE, "kms/calls", String::new()).await;
        let calls = state["calls"].as_array().expect("calls").iter();
        let of_functions = |call: &&Value| text(call, "caller").contains("assumed-role");
        calls.filter(of_functions).cloned().collect()
    }

    /// Makes a call of a service that speaks JSON, DynamoDB, KMS or Secrets Manager, with somebody's key.
    pub async fn signed_by(&self, key: &Key, service: &str, target: &str, input: &Value) -> Answer {
        let (url, version) = match service {
            "dynamodb" => ("dynamodb_url", "1.0"),
            "kms" => ("kms_url", "1.1"),
            _ => ("secrets_url", "1.1"),
        };
        let url = format!("{}/", text(&self.ready, url));
        let kind = format!("application/x-amz-json-{version}");
        let headers = [("x-amz-target", target), ("content-type", &*kind)];
        let body = input.to_string().into_bytes();
        let request = self.signed(key, service, Method::POST, &url, &headers, body);
        Answer::read(request.send().await.expect("the service answers")).await
    }

    fn signed(
        &self,
        key: &Key,
        service: &str,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: Vec<u8>,
    ) -> Asking {
        let token = key.token.as_deref().map(|token| (sigv4::SECURITY_TOKEN, token));
        let headers: Vec<(&str, &str)> = headers.iter().copied().chain(token).collect();
        let signed = sigv4::sign(service, &key.credentials, &method, url, &headers, &body, system_clock());
        let asking = if service == sigv4::GATEWAY { Asking::new } else { Asking::elsewhere };
        let mut request = asking(&self.http, method, url).body(body);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        for (name, value) in signed.expect("a signature") {
            request = request.header(name, value);
        }
        request
    }

    /// Writes an item into a table, past the functions: for states that no route makes.
    pub async fn put_item(&self, table: &str, item: Value) {
        self.dynamodb("PutItem", table, json!({"Item": item})).await;
    }

    /// Makes a call on a table, past the functions, and returns its answer; `table` is its name without
    /// the stack's prefix. Faults strike it as they do a function's, and the journal remembers it.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn dynamodb(&self, operation: &str, table: &str, mut call: Value) -> Value {
        call["TableName"] = Self::table(table).into();
        let target = format!("DynamoDB_20120810.{operation}");
        let answer = self.signed_by(&self.operator(), "dynamodb", &target, &call).await;
        assert!(answer.status.is_success(), "{operation}: {}", answer.text);
        answer.json()
    }

    /// Sets what stands at `path` in the item with this key, or takes it away where `value` is null.
    pub async fn edit(&self, table: &str, key: Value, path: &[&str], value: Value) {
        let names: Vec<String> = (0..path.len()).map(|n| format!("#p{n}")).collect();
        let place = names.join(".");
        let mut call = json!({
            "Key": key,
            "ExpressionAttributeNames": names.iter().cloned().zip(path.iter().map(|p| json!(p)))
                .collect::<serde_json::Map<_, _>>(),
        });
        if value.is_null() {
            call["UpdateExpression"] = format!("REMOVE {place}").into();
        } else {
            call["UpdateExpression"] = format!("SET {place} = :v").into();
            call["ExpressionAttributeValues"] = json!({":v": value});
        }
        self.dynamodb("UpdateItem", table, call).await;
    }

    /// A tenant's items whose sort keys start with `prefix`, in their order, as plain JSON.
    pub async fn items(&self, table: &str, tenant: &str, prefix: &str) -> Vec<Value> {
        let (mut items, mut start) = (Vec::new(), None);
        loop {
            let mut query = json!({
                "KeyConditionExpression": "tenant_id = :t AND begins_with(sk, :p)",
                "ExpressionAttributeValues": {":t": {"S": tenant}, ":p": {"S": prefix}},
                "ConsistentRead": true,
            });
            if let Some(start) = start {
                query["ExclusiveStartKey"] = start;
            }
            let page = self.dynamodb("Query", table, query).await;
            items.extend(page["Items"].as_array().expect("items").iter().map(plain_item));
            start = page.get("LastEvaluatedKey").cloned();
            if start.is_none() {
                return items;
            }
        }
    }

    /// A tenant's meter as it is in its table.
    pub async fn meter_item(&self, tenant: &str) -> Value {
        let get = json!({"Key": {"tenant_id": {"S": tenant}}, "ConsistentRead": true});
        self.dynamodb("GetItem", "meters", get).await["Item"].clone()
    }

    /// Kills the processes of a function, whatever they are doing.
    pub async fn kill(&self, function: &str) {
        self.control(Method::POST, &format!("functions/{function}/kill"), String::new()).await;
    }

    /// Sets how long a function's invocations may take, from the next one on.
    ///
    /// # Panics
    /// If there is no such function.
    pub async fn limit_time(&self, function: &str, ms: u64) {
        self.control(Method::PUT, &format!("functions/{function}/timeout"), ms.to_string()).await;
    }

    /// Makes the gateway answer one tenant's key with the decision that it keeps about another's.
    ///
    /// # Panics
    /// If it keeps none.
    pub async fn poison_decision(&self, of: &Tenant, with: &Tenant) {
        let header = |tenant: &Tenant| format!("Bearer {}", tenant.key);
        let body = json!({"for": header(of), "as": header(with)}).to_string();
        self.control(Method::PUT, "decisions", body).await;
    }

    /// A client of the vector store with its own key.
    ///
    /// # Panics
    /// If there is none.
    pub fn qdrant(&self) -> qdrant_client::Qdrant {
        qdrant_client::Qdrant::from_url(text(&self.ready, "qdrant_url"))
            .api_key(self.qdrant_root_key())
            .skip_compatibility_check()
            .build()
            .expect("a client")
    }

    /// Invokes a function with this event, as a schedule does, and returns its result.
    ///
    /// # Panics
    /// If it fails.
    pub async fn invoke(&self, function: &str, payload: Value) -> Value {
        let answer = self.invoke_for(None, function, payload).await;
        assert!(answer.status.is_success(), "{function}: {} {}", answer.status, answer.text);
        answer.json()
    }

    /// Invokes a function with this event past the gateway, in a tenant's process if one is named, and
    /// returns its result or why it has none.
    pub async fn invoke_for(&self, tenant: Option<&str>, function: &str, payload: Value) -> Answer {
        let url = format!("{}/functions/{function}/invoke", text(&self.ready, "control_url"));
        let mut request = self.http.post(url).body(payload.to_string());
        if let Some(tenant) = tenant {
            request = request.header("x-amz-tenant-id", tenant);
        }
        Answer::read(request.send().await.expect("the control address answers")).await
    }

    /// Puts faults between the functions and their tables: `{"seed": n, "rules": […]}`, in the place of
    /// those before. `local::control` says what a rule may say.
    ///
    /// # Panics
    /// If a rule is malformed, or names what does not exist.
    pub async fn dynamodb_faults(&self, rules: Value) {
        self.control(Method::PUT, "dynamodb/faults", rules.to_string()).await;
    }

    /// Ends all faults between the functions and their tables.
    pub async fn clear_dynamodb_faults(&self) {
        self.control(Method::DELETE, "dynamodb/faults", String::new()).await;
    }

    /// The calls that the tables have had of late, in the order in which they ended.
    pub async fn dynamodb_calls(&self) -> Vec<Value> {
        let calls = self.control(Method::GET, "dynamodb/calls", String::new()).await.json();
        calls.as_array().expect("calls").clone()
    }

    /// Forgets the calls that the tables have had.
    pub async fn forget_dynamodb_calls(&self) {
        self.control(Method::DELETE, "dynamodb/calls", String::new()).await;
    }

    async fn control(&self, method: Method, path: &str, body: String) -> Answer {
        let url = format!("{}/{path}", text(&self.ready, "control_url"));
        let request = self.http.request(method, url).header("content-type", "application/json");
        let sent = request.body(body).send().await;
        let answer = Answer::read(sent.expect("the control address answers")).await;
        assert!(answer.status.is_success(), "{path}: {} {}", answer.status, answer.text);
        answer
    }

    /// Tells the offline model to misbehave.
    pub async fn model_fault(&self, fault: Value) {
        let url = format!("{}/_faults", text(&self.ready, "model_url"));
        let answer = self.http.post(url).json(&fault).send().await.expect("the model answers");
        assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    }

    /// How many calls the offline model has had, of the latest that it remembers.
    pub async fn model_calls(&self) -> usize {
        let url = format!("{}/_requests", text(&self.ready, "model_url"));
        let all: Value = self.http.get(url).send().await.unwrap().json().await.unwrap();
        all.as_array().expect("requests").len()
    }

    /// What the offline model was last sent.
    pub async fn last_model_request(&self) -> Value {
        let url = format!("{}/_requests?last=1", text(&self.ready, "model_url"));
        let all: Value = self.http.get(url).send().await.unwrap().json().await.unwrap();
        all[0]["body"].clone()
    }

    /// The key that the model's service was last asked with.
    pub async fn last_model_key(&self) -> String {
        let url = format!("{}/_requests?last=1", text(&self.ready, "model_url"));
        let all: Value = self.http.get(url).send().await.unwrap().json().await.unwrap();
        text(&all[0], "api_key").to_owned()
    }

    /// Makes a secret, as an operator does.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn create_secret(&self, name: &str, value: &str) {
        let secret = json!({"Name": name, "SecretString": value});
        let target = "secretsmanager.CreateSecret";
        let answer = self.signed_by(&self.operator(), "secretsmanager", target, &secret).await;
        assert!(answer.status.is_success(), "{}", answer.text);
    }

    /// Gives a secret another value, as an operator does; the one before is kept as such.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn replace_secret(&self, name: &str, value: &str) {
        let secret = json!({"SecretId": name, "SecretString": value});
        let target = "secretsmanager.PutSecretValue";
        let answer = self.signed_by(&self.operator(), "secretsmanager", target, &secret).await;
        assert!(answer.status.is_success(), "{}", answer.text);
    }

    /// Everything that the stack and its functions have logged so far.
    pub fn logs(&self) -> String {
        let mut all = std::fs::read_to_string(self.directory.path().join("stack.log")).unwrap_or_default();
        let logs = PathBuf::from(text(&self.ready, "log_directory"));
        for entry in std::fs::read_dir(logs).into_iter().flatten().flatten() {
            all.push_str(&std::fs::read_to_string(entry.path()).unwrap_or_default());
        }
        all
    }

    /// The messages that a queue has been sent; `queue` is its name without the stack's prefix.
    pub fn queue_messages(&self, queue: &str) -> Vec<Value> {
        let path = Path::new(text(&self.ready, "queue_directory")).join(format!("bulkhead-{queue}.jsonl"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("a message is JSON")).collect()
    }

    /// What waits in a queue that a function is invoked with, or is being worked on: each message with how often it
    /// was received, whether it is hidden and whether it is worked on. `queue` is its name without the stack's prefix.
    pub async fn queue(&self, queue: &str) -> Vec<Value> {
        let path = format!("queues/bulkhead-{queue}");
        let messages = self.control(Method::GET, &path, String::new()).await.json();
        messages.as_array().expect("messages").clone()
    }

    /// Waits until a message of the uploads' queue was received so often, and is left there by whoever has received it.
    pub async fn upload_attempts(&self, times: u64) {
        until("the attempt", async || {
            let messages = self.queue("uploads").await;
            let left = |m: &Value| m["receives"].as_u64() >= Some(times) && m["at_work"] == false;
            messages.iter().any(left).then_some(())
        })
        .await;
    }

    /// Waits until no upload of a tenant is under way.
    pub async fn uploads_end(&self, tenant: &str) {
        let under_way = async || self.items("documents", tenant, "UPLOAD#").await;
        until("the end of the uploads", async || under_way().await.is_empty().then_some(())).await;
    }

    /// A tenant's files in the documents' bucket: the sizes of all versions, the smallest first.
    pub async fn file_sizes(&self, tenant: &str) -> Vec<i64> {
        let listed = self.s3().list_object_versions().bucket(self.documents_bucket());
        let listed = listed.prefix(format!("tenant={tenant}/")).send().await.expect("the bucket answers");
        assert!(listed.delete_markers().is_empty(), "{listed:?}");
        let size = |version: &aws_sdk_s3::types::ObjectVersion| version.size().expect("a version has a size");
        let mut sizes: Vec<i64> = listed.versions().iter().map(size).collect();
        sizes.sort_unstable();
        sizes
    }

    /// Sends a message to a queue that a function is invoked with.
    pub async fn send_message(&self, queue: &str, body: &str) {
        self.control(Method::POST, &format!("queues/bulkhead-{queue}"), body.to_owned()).await;
    }

    /// Lets the hidden messages of a queue come again at once, as if their time were over.
    pub async fn unhide_messages(&self, queue: &str) {
        self.control(Method::POST, &format!("queues/bulkhead-{queue}/unhide"), String::new()).await;
    }

    /// The bucket that files are uploaded to.
    pub fn documents_bucket(&self) -> String {
        self.audit_bucket().replace("-audit-", "-documents-")
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        Path::new(text(&self.ready, "log_directory")).parent().expect("the data directory").to_owned()
    }

    /// The vector store's own key, which no function on a request's path but the authorizer holds.
    pub fn qdrant_root_key(&self) -> String {
        let identity = std::fs::read(self.data().join("identity.json")).expect("the stack's identity");
        let identity: Value = serde_json::from_slice(&identity).expect("JSON");
        text(&identity, "qdrant_root_key").to_owned()
    }

    /// The processes that the stack has started.
    pub fn children(&self) -> Vec<u32> {
        let pid = self.child.id().expect("a running stack");
        let children = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the stack's threads").flatten();
        children
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
            .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>())
            .collect()
    }

    /// The processes of a function, each with its environment, as the stack says: the system does not, of functions
    /// that close themselves to others of their user. `function` is its name without the stack's prefix.
    ///
    /// # Panics
    /// If the control address does not answer.
    pub fn processes(&self, function: &str) -> BTreeMap<u32, BTreeMap<String, String>> {
        let url: reqwest::Url = text(&self.ready, "control_url").parse().expect("an address");
        let address = (url.host_str().expect("a host"), url.port().expect("a port"));
        let mut connection = TcpStream::connect(address).expect("the control address");
        let path = format!("{}/functions/bulkhead-{function}/processes", url.path());
        write!(connection, "GET {path} HTTP/1.0\r\n\r\n").expect("a request");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).expect("an answer");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        serde_json::from_str(body).expect("processes")
    }

    /// Asks the stack to end, and waits until it has.
    ///
    /// # Panics
    /// If a function has tried what its role does not allow.
    pub async fn stop(mut self) -> std::process::ExitStatus {
        let logs = self.logs();
        let denied = logs.lines().find(|line| line.contains("is not authorized to perform"));
        assert_eq!(denied, None);
        let pid = self.child.id().expect("a running stack").to_string();
        let kill = std::process::Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs");
        assert!(kill.success());
        tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("the stack ends").expect("its status")
    }
}

/// Waits for what comes about by itself.
///
/// # Panics
/// If it does not, in a time that is no measurement; `what` says what.
pub async fn until<T>(what: &str, look: impl AsyncFn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < COMES_ABOUT, "{what} does not come about");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Runs the stack's program with these arguments, expects it to fail, and returns what it says.
pub async fn run_local(arguments: &[&str]) -> String {
    let output = Command::new(binaries().join("local"))
        .arg("--functions")
        .arg(binaries())
        .args(arguments)
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PATIENCE, output).await.expect("it ends").expect("it runs");
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Puts a file where a begun upload says, as it says: the status and what S3 answered.
pub async fn put_file(begun: &Value, file: impl Into<reqwest::Body>) -> (StatusCode, String) {
    let headers = begun["headers"].as_object().expect("headers").iter();
    let put = client().put(text(begun, "url")).body(file);
    let put = headers.fold(put, |put, (name, value)| put.header(name, value.as_str().expect("a header")));
    let answer = put.send().await.expect("the bucket answers");
    (answer.status(), answer.text().await.expect("a whole body"))
}

/// An item as plain JSON: `{"n": {"N": "1"}}` is `{"n": 1}`.
pub fn plain_item(item: &Value) -> Value {
    let fields = item.as_object().expect("an item").iter();
    fields.map(|(name, value)| (name.clone(), plain(value))).collect::<serde_json::Map<_, _>>().into()
}

fn plain(value: &Value) -> Value {
    let (kind, value) = value.as_object().and_then(|v| v.iter().next()).expect("an attribute's value");
    match kind.as_str() {
        // Bytes as they travel, in base64.
        "S" | "B" | "BOOL" => value.clone(),
        "N" => value.as_str().expect("a number").parse::<serde_json::Number>().expect("a number").into(),
        "L" => value.as_array().expect("a list").iter().map(plain).collect(),
        "M" => plain_item(value),
        "NULL" => Value::Null,
        other => panic!("an attribute of type {other}"),
    }
}

/// A client that waits as long as a person would.
pub fn client() -> Client {
    Client::builder().timeout(Duration::from_secs(120)).build().expect("a client")
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no text `{name}` in {value}"))
}

impl Tenant {
    /// The same tenant, speaking for one of its users.
    pub fn as_user(&self, user: &str) -> Self {
        Self { user: Some(user.to_owned()), ..self.clone() }
    }

    /// The same tenant, speaking for a user of these groups, separated by commas.
    pub fn in_groups(&self, groups: &str) -> Self {
        Self { groups: Some(groups.to_owned()), ..self.clone() }
    }

    /// The same tenant with another of its keys.
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: key.to_owned(), ..self.clone() }
    }

    /// The same tenant at another address of this machine, such as 127.0.0.2.
    pub fn at(&self, address: std::net::IpAddr) -> Self {
        let http = Client::builder().local_address(address).timeout(Duration::from_secs(120)).build();
        Self { http: http.expect("a client"), ..self.clone() }
    }

    /// The id of this tenant's key.
    ///
    /// # Panics
    /// If the key is none.
    pub fn key_id(&self) -> &str {
        self.key.split('_').nth(3).expect("a key")
    }

    /// A request with this tenant's key.
    pub fn request(&self, method: Method, path: &str) -> Asking {
        let request = Asking::new(&self.http, method, &format!("{}{path}", self.url)).bearer_auth(&self.key);
        let names = [("x-user-id", &self.user), ("x-user-groups", &self.groups)];
        names.into_iter().fold(request, |request, (name, value)| match value {
            Some(value) => request.header(name, value),
            None => request,
        })
    }

    /// Posts JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::read(self.request(Method::POST, path).json(body).send().await.expect("an answer")).await
    }

    /// Gets a path.
    pub async fn get(&self, path: &str) -> Answer {
        Answer::read(self.request(Method::GET, path).send().await.expect("an answer")).await
    }

    /// Deletes a path.
    pub async fn delete(&self, path: &str) -> Answer {
        Answer::read(self.request(Method::DELETE, path).send().await.expect("an answer")).await
    }

    /// Stores a plain-text document and expects it to be ready.
    pub async fn store(&self, id: &str, title: &str, content: &str) -> Value {
        let answer = self.post("/v1/documents", &json!({"id": id, "title": title, "content": content})).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text);
        let document = answer.json()["documents"][0].clone();
        assert_eq!(document["status"], "ready", "{document}");
        document
    }

    /// Begins the upload of a file, and expects where to put it.
    pub async fn begin_upload(&self, body: &Value) -> Value {
        self.post("/v1/uploads", body).await.expect_status(StatusCode::CREATED).json()
    }

    /// Uploads a file as the content of a document, and waits until it is read.
    pub async fn upload(&self, id: &str, content_type: &str, file: Vec<u8>) -> Value {
        let body = json!({"id": id, "title": id, "content_type": content_type, "size_bytes": file.len()});
        let begun = self.begin_upload(&body).await;
        let (status, answer) = put_file(&begun, file).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        self.read_upload(id).await
    }

    /// Waits until a document's upload is read, or has failed.
    ///
    /// # Panics
    /// If that does not come about.
    pub async fn read_upload(&self, id: &str) -> Value {
        for _ in 0..1_200 {
            let document =
                self.get(&format!("/v1/documents/{id}")).await.expect_status(StatusCode::OK).json();
            if document["status"] == "ready" || document["status"] == "failed" {
                return document;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the upload of {id} is not read");
    }

    /// Asks, and expects an answer.
    pub async fn ask(&self, message: &str) -> Value {
        self.chat(json!({"message": message})).await.expect_status(StatusCode::OK).json()
    }

    /// Posts to the chat route.
    pub async fn chat(&self, body: Value) -> Answer {
        self.post("/v1/chat", &body).await
    }

    /// Asks for a streamed answer; the response is unread.
    pub async fn open_stream(&self, mut body: Value) -> Response {
        body["stream"] = true.into();
        self.request(Method::POST, "/v1/chat").json(&body).send().await.expect("an answer")
    }

    /// Searches, and expects an answer.
    pub async fn search(&self, query: &str, top_k: u32) -> Vec<Value> {
        let answer = self.post("/v1/search", &json!({"query": query, "top_k": top_k})).await;
        answer.expect_status(StatusCode::OK).json()["hits"].as_array().expect("hits").clone()
    }
}

impl Answer {
    /// Reads a response to its end, and holds it to the contract.
    ///
    /// # Panics
    /// If the contract does not describe it.
    pub async fn read(response: Response) -> Self {
        let (status, headers, asked) = (response.status(), response.headers().clone(), Asked::by(&response));
        let text = response.text().await.expect("a whole body");
        if let Some(asked) = asked {
            asked.check(status, &headers, &text);
        }
        Self { status, headers, text }
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {} {}", self.status, self.text))
    }

    /// This answer, which must have that status.
    #[track_caller]
    pub fn expect_status(self, status: StatusCode) -> Self {
        assert_eq!(self.status, status, "{}", self.text);
        self
    }

    /// This answer must be the error object with that status and code; returns its `error`.
    #[track_caller]
    pub fn expect_error(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let body = self.json();
        assert_eq!(body["error"]["code"], code, "{body}");
        assert!(body["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{body}");
        assert!(body["request_id"].as_str().is_some_and(|id| !id.is_empty()), "{body}");
        assert!(self.headers.contains_key("x-request-id"), "{:?}", self.headers);
        assert_eq!(body.as_object().map(|o| o.len()), Some(2), "{body}");
        body["error"].clone()
    }
}

/// Reads the next event of a stream; `None` at its end. `buffer` holds what came of the one after.
pub async fn next_event(response: &mut Response, buffer: &mut Vec<u8>) -> Option<Event> {
    loop {
        if let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
            let frame: Vec<u8> = buffer.drain(..end + 2).collect();
            let (mut name, mut data) = (String::new(), String::new());
            for line in std::str::from_utf8(&frame).expect("events are UTF-8").lines() {
                if let Some(value) = line.strip_prefix("event: ") {
                    name = value.to_owned();
                } else if let Some(value) = line.strip_prefix("data: ") {
                    data.push_str(value);
                }
            }
            let data = serde_json::from_str(&data).expect("data is JSON");
            if let Some(asked) = Asked::by(response) {
                asked.check_event(&name, &data);
            }
            return Some(Event { name, data });
        }
        buffer.extend(response.chunk().await.expect("the stream goes on")?);
    }
}

/// Reads all events of a stream.
pub async fn all_events(mut response: Response) -> Vec<Event> {
    let (mut buffer, mut events) = (Vec::new(), Vec::new());
    while let Some(event) = next_event(&mut response, &mut buffer).await {
        events.push(event);
    }
    assert!(buffer.is_empty(), "an unfinished event: {}", String::from_utf8_lossy(&buffer));
    events
}

/// Reads the data of all events of a stream, whatever they are called.
pub async fn all_lines(response: Response) -> Vec<String> {
    let asked = Asked::by(&response);
    let text = response.text().await.expect("a whole body");
    let lines: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    if let Some(asked) = asked {
        lines.iter().for_each(|data| asked.check_line(data));
    }
    lines.into_iter().map(str::to_owned).collect()
}
