//! The stack as `infra/template.yaml` describes it.
//!
//! Reads the SAM template and the OpenAPI document it includes, evaluates CloudFormation's intrinsic
//! functions, and hands out what the local stack needs to know as plain types. What it does not know
//! how to evaluate is an error that names the place: nothing of the template is skipped in silence
//! that would change what runs.

mod events;
mod intrinsics;
mod yaml;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Method;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

pub use self::events::{Events, QueueEvent, ScheduleEvent, StartingPosition, StreamEvent, queue_arn};
use self::intrinsics::Evaluator;
use crate::iam::{Policy, Role, Trust};

/// Where the stack pretends to be.
pub const REGION: &str = "us-east-1";
/// Whose account it pretends to be in.
pub const ACCOUNT: &str = "000000000000";
/// What the stack is called; its resources' names begin with it.
pub const STACK: &str = "bulkhead";
/// The API's id in its ARNs.
const API_ID: &str = "local";
/// API Gateway's own limit where a route names none.
const DEFAULT_INTEGRATION_TIMEOUT: Duration = Duration::from_secs(29);
const METHODS: [&str; 7] = ["get", "put", "post", "delete", "options", "head", "patch"];

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not YAML.
    #[error("{path} is not valid YAML")]
    Yaml {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_yaml_ng::Error,
    },
    /// Something in it is wrong, or unknown to the local stack.
    #[error("{at}: {problem}")]
    Invalid {
        /// Where in the template, as `Resources.Chat.Properties.Timeout`.
        at: String,
        /// What is wrong.
        problem: String,
    },
}

fn invalid(at: impl Into<String>, problem: impl Into<String>) -> TemplateError {
    TemplateError::Invalid { at: at.into(), problem: problem.into() }
}

/// Everything the template declares that the local stack runs or creates.
#[derive(Clone, Debug)]
pub struct Template {
    /// The functions.
    pub functions: Vec<Function>,
    /// The tables.
    pub tables: Vec<Table>,
    /// The buckets.
    pub buckets: Vec<Bucket>,
    /// The secrets.
    pub secrets: Vec<Secret>,
    /// The queues.
    pub queues: Vec<Queue>,
    /// The roles that are declared by themselves. A function's own is part of the function.
    pub roles: Vec<Role>,
    /// The API in front of the functions.
    pub api: Api,
    /// The template's outputs. Addresses among them are those of AWS, not of the local stack.
    pub outputs: BTreeMap<String, String>,
}

/// A Lambda function.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    /// Its name in the template.
    pub logical_id: String,
    /// Its name in the account.
    pub name: String,
    /// The program that `sam build` would build for it.
    pub binary: String,
    /// Layers of the template that it has. Their programs stand beside the functions' here.
    pub layers: Vec<String>,
    /// Its own environment variables.
    pub environment: BTreeMap<String, String>,
    /// How long one invocation may take.
    pub timeout: Duration,
    /// Its memory. Not enforced; the function reads it.
    pub memory_mb: u32,
    /// How many invocations may run at once, if the template limits it.
    pub reserved_concurrency: Option<usize>,
    /// Whether a process of it serves one tenant alone.
    pub tenant_isolation: bool,
    /// What invokes it besides requests.
    pub events: Events,
    /// What its role may do.
    pub policies: Vec<Policy>,
}

/// A DynamoDB table, on demand. Its keys are what differs from table to table.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Its name in the template.
    pub logical_id: String,
    /// Its name in the account.
    pub name: String,
    /// The partition key.
    pub hash_key: KeyAttribute,
    /// The sort key.
    pub range_key: Option<KeyAttribute>,
    /// The attribute that says when an item expires.
    pub ttl_attribute: Option<String>,
    /// What the table's stream shows, if it has one: `NEW_IMAGE` and so on.
    pub stream_view: Option<String>,
    /// Its global secondary indexes.
    pub indexes: Vec<Index>,
}

/// A global secondary index, which holds whole items.
#[derive(Clone, Debug, PartialEq)]
pub struct Index {
    /// Its name.
    pub name: String,
    /// Its partition key.
    pub hash_key: KeyAttribute,
    /// Its sort key.
    pub range_key: Option<KeyAttribute>,
}

/// A key attribute of a table.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyAttribute {
    /// The attribute's name.
    pub name: String,
    /// `S`, `N` or `B`.
    pub kind: String,
}

/// An S3 bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct Bucket {
    /// Its name in the template.
    pub logical_id: String,
    /// Its name in the account.
    pub name: String,
    /// Whether it keeps old versions.
    pub versioned: bool,
    /// Whether objects in it can be locked.
    pub object_lock: bool,
    /// How long every new object is locked, if the bucket says so.
    pub default_retention: Option<Retention>,
    /// Who is told of what happens in it.
    pub notifications: Vec<Notification>,
    /// From which pages browsers may do what with it.
    pub cors: Vec<CorsRule>,
}

/// What pages of other origins may do with a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorsRule {
    /// Their origins.
    pub origins: Vec<String>,
    /// With these methods.
    pub methods: Vec<String>,
    /// With these headers, in lower case.
    pub headers: Vec<String>,
    /// For how long a browser need not ask again, in seconds.
    pub max_age_s: u32,
}

/// A queue that is told of what happens in a bucket.
#[derive(Clone, Debug, PartialEq)]
pub struct Notification {
    /// Its place among the bucket's.
    pub id: String,
    /// What it is told of, as `s3:ObjectCreated:Put`, or `s3:ObjectCreated:*`.
    pub event: String,
    /// The queue's name.
    pub queue: String,
}

impl Notification {
    /// Whether an event of that name, as `ObjectCreated:Put`, is told.
    #[must_use]
    pub fn tells(&self, event: &str) -> bool {
        let wanted = self.event.strip_prefix("s3:").unwrap_or(&self.event);
        wanted.strip_suffix('*').map_or(wanted == event, |prefix| event.starts_with(prefix))
    }
}

/// How long, and how strictly, an object is locked.
#[derive(Clone, Debug, PartialEq)]
pub struct Retention {
    /// `COMPLIANCE` or `GOVERNANCE`.
    pub mode: String,
    /// Days from the object's creation.
    pub days: u32,
}

/// A secret. Its value is not in the template.
#[derive(Clone, Debug, PartialEq)]
pub struct Secret {
    /// Its name in the template.
    pub logical_id: String,
    /// Its name in the account.
    pub name: String,
}

/// An SQS queue.
#[derive(Clone, Debug, PartialEq)]
pub struct Queue {
    /// Its name in the template.
    pub logical_id: String,
    /// Its name in the account.
    pub name: String,
    /// How long a message that was received is hidden from others.
    pub visibility: Duration,
    /// Where messages go that were received too often, and how often that is.
    pub redrive: Option<Redrive>,
}

/// Where messages of a queue end that nobody could do anything with.
#[derive(Clone, Debug, PartialEq)]
pub struct Redrive {
    /// The name of the other queue.
    pub queue: String,
    /// How often a message is received before that.
    pub max_receives: u32,
}

/// The REST API.
#[derive(Clone, Debug)]
pub struct Api {
    /// Its id, as ARNs name it.
    pub id: String,
    /// Its stage.
    pub stage: String,
    /// The region in its ARNs.
    pub region: String,
    /// The account in its ARNs.
    pub account: String,
    /// Its routes.
    pub routes: Vec<Route>,
    /// Its Lambda authorizers, by the name of their security scheme.
    pub authorizers: BTreeMap<String, Authorizer>,
    /// What it answers by itself, by response type, such as `UNAUTHORIZED`.
    pub gateway_responses: BTreeMap<String, GatewayResponse>,
    /// How many requests it takes, all callers together.
    pub throttle: Option<Throttle>,
}

/// One method of one path.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// The method.
    pub method: Method,
    /// The path as the template writes it, such as `/v1/documents/{id}`.
    pub path: String,
    /// The logical id of the function behind it.
    pub function: String,
    /// Whether the response is passed on as it comes.
    pub streaming: bool,
    /// How long the function may take.
    pub timeout: Duration,
    /// Who may call it.
    pub auth: RouteAuth,
    /// The value of the authorizer's context that tells Lambda whose request it is.
    pub tenant: Option<String>,
}

/// Who may call a route.
#[derive(Clone, Debug, PartialEq)]
pub enum RouteAuth {
    /// Anyone.
    Open,
    /// Whom the named Lambda authorizer allows.
    Authorizer(String),
    /// Who signs the request with an AWS credential.
    Iam,
}

/// A Lambda authorizer of type REQUEST.
#[derive(Clone, Debug, PartialEq)]
pub struct Authorizer {
    /// The logical id of the function that decides.
    pub function: String,
    /// The one request header that it decides by, and that its decision is cached under; lower case.
    pub identity_header: String,
    /// How long a decision is kept.
    pub ttl: Duration,
}

/// What the gateway answers by itself in one case.
#[derive(Clone, Debug, PartialEq)]
pub struct GatewayResponse {
    /// The status, where it differs from the gateway's own.
    pub status: Option<u16>,
    /// Headers: the name, and either `context.<path>` or a literal in single quotes.
    pub headers: BTreeMap<String, String>,
    /// The body template for JSON.
    pub body: Option<String>,
}

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Throttle {
    /// Requests per second.
    pub rate: f64,
    /// The bucket's size.
    pub burst: f64,
}

impl Template {
    /// Reads and evaluates the template at `path`. `overrides` are values of its parameters.
    ///
    /// # Errors
    /// [`TemplateError`], which names the file or the place in it.
    pub fn load(path: &Path, overrides: &BTreeMap<String, String>) -> Result<Self, TemplateError> {
        let raw = yaml::read(path)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        let evaluator = Evaluator::new(&raw, folder, overrides)?;
        let resources = evaluator.resources()?;
        let names = Names::new(&resources)?;

        let globals = evaluator.section("Globals.Function", raw.pointer("/Globals/Function"))?;
        let api = resources
            .iter()
            .filter(|r| r.kind == "AWS::Serverless::Api")
            .map(|r| api(r, &names))
            .collect::<Result<Vec<_>, _>>()?;
        let mut apis = api.into_iter();
        let (Some(api), None) = (apis.next(), apis.next()) else {
            return Err(invalid("Resources", "exactly one AWS::Serverless::Api is expected"));
        };
        let tables = of_kind(&resources, "AWS::DynamoDB::Table", table)?;
        let queues = of_kind(&resources, "AWS::SQS::Queue", |resource| queue(resource, &resources))?;
        let mut functions =
            of_kind(&resources, "AWS::Serverless::Function", |resource| function(resource, &globals))?;
        for mapping in resources.iter().filter(|r| r.kind == "AWS::Lambda::EventSourceMapping") {
            if events::is_of_stream(mapping)? {
                map_stream(mapping, &mut functions, &tables, &queues)?;
            } else {
                map_queue(mapping, &mut functions, &queues)?;
            }
        }
        let template = Self {
            functions,
            tables,
            queues,
            buckets: of_kind(&resources, "AWS::S3::Bucket", |resource| bucket(resource, &resources))?,
            secrets: of_kind(&resources, "AWS::SecretsManager::Secret", secret)?,
            roles: of_kind(&resources, "AWS::IAM::Role", role)?.into_iter().flatten().collect(),
            api,
            outputs: evaluator.outputs()?,
        };
        Ok(template)
    }

    /// The function with this logical id.
    #[must_use]
    pub fn function(&self, logical_id: &str) -> Option<&Function> {
        self.functions.iter().find(|f| f.logical_id == logical_id)
    }

    /// The physical name of the table with this logical id.
    #[must_use]
    pub fn table_name(&self, logical_id: &str) -> Option<&str> {
        self.tables.iter().find(|t| t.logical_id == logical_id).map(|t| t.name.as_str())
    }

    /// The physical name of the bucket with this logical id.
    #[must_use]
    pub fn bucket_name(&self, logical_id: &str) -> Option<&str> {
        self.buckets.iter().find(|b| b.logical_id == logical_id).map(|b| b.name.as_str())
    }
}

/// The programs of the functions of the template at `path`, sorted: what has to be built to run it. Asks
/// for no parameters, since none of them decides what a function runs.
///
/// # Errors
/// If the file cannot be read.
pub fn binaries(path: &Path) -> Result<Vec<String>, TemplateError> {
    let raw = yaml::read(path)?;
    let resources = raw.get("Resources").and_then(Value::as_object).into_iter().flatten();
    let binaries: BTreeSet<String> = resources
        .filter(|(_, resource)| resource.get("Type").is_some_and(|kind| kind == "AWS::Serverless::Function"))
        .filter_map(|(_, function)| scalar(function.pointer("/Metadata/BuildProperties/Binary")?))
        .collect();
    Ok(binaries.into_iter().collect())
}

/// A resource whose properties are evaluated.
struct Resource {
    id: String,
    kind: String,
    properties: Value,
    metadata: Value,
}

impl Resource {
    fn at(&self, pointer: &str) -> String {
        format!("Resources.{}.Properties{}", self.id, pointer.replace('/', "."))
    }

    fn get(&self, pointer: &str) -> Option<&Value> {
        self.properties.pointer(pointer)
    }

    fn text(&self, pointer: &str) -> Result<String, TemplateError> {
        let value = self.get(pointer).ok_or_else(|| invalid(self.at(pointer), "is missing"))?;
        scalar(value).ok_or_else(|| invalid(self.at(pointer), "is not text"))
    }

    fn optional_text(&self, pointer: &str) -> Result<Option<String>, TemplateError> {
        self.get(pointer).map(|_| self.text(pointer)).transpose()
    }

    fn number<T: std::str::FromStr>(&self, pointer: &str) -> Result<Option<T>, TemplateError> {
        let Some(text) = self.optional_text(pointer)? else { return Ok(None) };
        text.parse()
            .map(Some)
            .map_err(|_| invalid(self.at(pointer), format!("`{text}` is not such a number")))
    }

    fn refuse(&self, properties: &[&str]) -> Result<(), TemplateError> {
        properties.iter().try_for_each(|name| match self.get(&format!("/{name}")) {
            None => Ok(()),
            Some(_) => Err(invalid(self.at(&format!("/{name}")), "is not known to the local stack")),
        })
    }
}

fn of_kind<T>(
    resources: &[Resource],
    kind: &str,
    make: impl Fn(&Resource) -> Result<T, TemplateError>,
) -> Result<Vec<T>, TemplateError> {
    resources.iter().filter(|r| r.kind == kind).map(make).collect()
}

/// A scalar as CloudFormation passes it on: as text.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn is_true(value: Option<&Value>) -> bool {
    value.and_then(scalar).is_some_and(|text| text == "true")
}

/// The layers of a function, each of which is to be of the template.
fn layers(function: &Resource) -> Result<Vec<String>, TemplateError> {
    let listed = function.get("/Layers").and_then(Value::as_array).into_iter().flatten();
    let own = listed.map(|layer| scalar(layer).filter(|arn| arn.starts_with(&layer_arn(""))));
    let own: Option<Vec<String>> = own.collect();
    own.ok_or_else(|| invalid(function.at("/Layers"), "a layer that is not the template's is not known here"))
}

/// The ARN of layers whose names begin so.
fn layer_arn(name: &str) -> String {
    format!("arn:aws:lambda:{REGION}:{ACCOUNT}:layer:{name}")
}

fn function(resource: &Resource, globals: &Value) -> Result<Function, TemplateError> {
    let local = &resource.properties;
    let merged = Resource {
        id: resource.id.clone(),
        kind: resource.kind.clone(),
        properties: merge(globals.clone(), local.clone()),
        metadata: resource.metadata.clone(),
    };
    merged.refuse(&["FunctionUrlConfig", "PackageType"])?;
    let binary = merged.metadata.pointer("/BuildProperties/Binary").and_then(scalar).ok_or_else(|| {
        invalid(format!("Resources.{}.Metadata.BuildProperties.Binary", merged.id), "is missing")
    })?;
    let mut environment = BTreeMap::new();
    if let Some(Value::Object(variables)) = merged.get("/Environment/Variables") {
        for name in variables.keys() {
            environment.insert(name.clone(), merged.text(&format!("/Environment/Variables/{name}"))?);
        }
    }
    let events = events::events(&merged)?;
    let policies = policies(&merged, Some)?;
    Ok(Function {
        name: physical_name(&merged),
        binary,
        layers: layers(&merged)?,
        environment,
        // SAM's own defaults.
        timeout: Duration::from_secs(merged.number("/Timeout")?.unwrap_or(3)),
        memory_mb: merged.number("/MemorySize")?.unwrap_or(128),
        reserved_concurrency: merged.number("/ReservedConcurrentExecutions")?,
        tenant_isolation: tenant_isolation(&merged, &events)?,
        events,
        policies,
        logical_id: merged.id,
    })
}

/// The function that a mapping names.
fn mapped<'a>(
    mapping: &Resource,
    name: &str,
    functions: &'a mut [Function],
) -> Result<&'a mut Function, TemplateError> {
    const FUNCTION: &str = "/FunctionName";
    let function = functions.iter_mut().find(|function| function.name == name);
    let function = function
        .ok_or_else(|| invalid(mapping.at(FUNCTION), format!("`{name}` is no function of the template")))?;
    if function.tenant_isolation {
        return Err(invalid(mapping.at(FUNCTION), "does not go together with TenancyConfig"));
    }
    Ok(function)
}

/// Lets a function be invoked with the changes of a table.
fn map_stream(
    mapping: &Resource,
    functions: &mut [Function],
    tables: &[Table],
    queues: &[Queue],
) -> Result<(), TemplateError> {
    if let Some((name, event)) = events::stream_mapping(mapping, tables, queues)? {
        mapped(mapping, &name, functions)?.events.streams.push(event);
    }
    Ok(())
}

/// Lets a function be invoked with the messages of a queue.
fn map_queue(mapping: &Resource, functions: &mut [Function], queues: &[Queue]) -> Result<(), TemplateError> {
    let Some((name, event)) = events::queue_mapping(mapping, queues)? else { return Ok(()) };
    let function = mapped(mapping, &name, functions)?;
    // AWS refuses the mapping otherwise: a message would come again while the function is at work on it.
    if event.queue.visibility < function.timeout {
        let problem =
            format!("hides messages for {:?}, less than the function may take", event.queue.visibility);
        return Err(invalid(mapping.at("/EventSourceArn"), problem));
    }
    function.events.queues.push(event);
    Ok(())
}

/// Whether the function keeps tenants apart. Such a function is invoked by requests alone: AWS takes no
/// mapping or schedule for it.
fn tenant_isolation(function: &Resource, events: &Events) -> Result<bool, TemplateError> {
    const MODE: &str = "/TenancyConfig/TenantIsolationMode";
    if function.get("/TenancyConfig").is_none() {
        return Ok(false);
    }
    match function.text(MODE)?.as_str() {
        "PER_TENANT" if *events == Events::default() => Ok(true),
        "PER_TENANT" => Err(invalid(function.at("/Events"), "do not go together with TenancyConfig")),
        other => Err(invalid(function.at(MODE), format!("`{other}` does not exist"))),
    }
}

/// The documents under `Policies`, each found in its entry by `document`. SAM's named policies and
/// templates are not known here.
fn policies<'a>(
    resource: &'a Resource,
    document: fn(&'a Value) -> Option<&'a Value>,
) -> Result<Vec<Policy>, TemplateError> {
    let entries = match resource.get("/Policies") {
        None => return Ok(Vec::new()),
        Some(Value::Array(entries)) => entries.iter().collect(),
        Some(one) => vec![one],
    };
    let parse = |entry| {
        let document = document(entry).ok_or("has an entry without PolicyDocument".to_owned());
        document.and_then(Policy::parse).map_err(|problem| invalid(resource.at("/Policies"), problem))
    };
    entries.into_iter().map(parse).collect()
}

/// A role that callers may assume; none if it is for services of AWS, which nothing here does.
fn role(resource: &Resource) -> Result<Option<Role>, TemplateError> {
    let services = |statement: &Value| statement.pointer("/Principal/Service").is_some();
    let statements = resource.get("/AssumeRolePolicyDocument/Statement").and_then(Value::as_array);
    if statements.is_some_and(|statements| statements.iter().all(services)) {
        return Ok(None);
    }
    resource.refuse(&["ManagedPolicyArns", "Path", "PermissionsBoundary"])?;
    let at = "/AssumeRolePolicyDocument";
    let trust = resource.get(at).ok_or_else(|| invalid(resource.at(at), "is missing"))?;
    Ok(Some(Role {
        arn: role_arn(&physical_name(resource)),
        policies: policies(resource, |entry| entry.get("PolicyDocument"))?,
        trust: Trust::parse(trust).map_err(|problem| invalid(resource.at(at), problem))?,
    }))
}

/// A role's ARN.
fn role_arn(name: &str) -> String {
    format!("arn:aws:iam::{ACCOUNT}:role/{name}")
}

/// A function's ARN.
pub fn function_arn(name: &str) -> String {
    format!("arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}")
}

/// The ARN of the role that SAM makes for a function.
pub fn function_role_arn(logical_id: &str) -> String {
    role_arn(&format!("{STACK}-{logical_id}Role"))
}

/// A secret's ARN. Secrets Manager ends it with a hyphen and six random characters; here they are drawn from
/// the name, so that policies that name the secret whole can be held against it.
pub fn secret_arn(name: &str) -> String {
    let tail = hex::encode(Sha256::digest(name));
    format!("arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:{name}-{}", tail.get(..6).unwrap_or_default())
}

/// SAM's rule for Globals: maps are merged, anything else is replaced.
fn merge(base: Value, over: Value) -> Value {
    match (base, over) {
        (Value::Object(mut base), Value::Object(over)) => {
            for (key, value) in over {
                let merged = match base.remove(&key) {
                    Some(old) => merge(old, value),
                    None => value,
                };
                base.insert(key, merged);
            }
            Value::Object(base)
        }
        (Value::Null, over) => over,
        (_, over) => over,
    }
}

fn table(resource: &Resource) -> Result<Table, TemplateError> {
    resource.refuse(&["LocalSecondaryIndexes"])?;
    let field = |item: &Value, name: &str| item.get(name).and_then(scalar).unwrap_or_default();
    let list = |value: Option<&Value>, at: &str| match value {
        Some(Value::Array(items)) => Ok(items.clone()),
        _ => Err(invalid(resource.at(at), "is not a list")),
    };
    let kinds: BTreeMap<String, String> =
        list(resource.get("/AttributeDefinitions"), "/AttributeDefinitions")?
            .iter()
            .map(|item| (field(item, "AttributeName"), field(item, "AttributeType")))
            .collect();
    let keys = |schema: Option<&Value>, at: &str| {
        let schema = list(schema, at)?;
        let key = |role: &str| {
            let item = schema.iter().find(|item| field(item, "KeyType") == role)?;
            let name = field(item, "AttributeName");
            Some(match kinds.get(&name) {
                Some(kind) => Ok(KeyAttribute { name, kind: kind.clone() }),
                None => Err(invalid(resource.at(at), format!("`{name}` is not defined"))),
            })
        };
        let hash = key("HASH").ok_or_else(|| invalid(resource.at(at), "has no HASH key"))??;
        Ok((hash, key("RANGE").transpose()?))
    };
    let (hash_key, range_key) = keys(resource.get("/KeySchema"), "/KeySchema")?;
    const INDEXES: &str = "/GlobalSecondaryIndexes";
    let mut indexes = Vec::new();
    for index in
        resource.get(INDEXES).map(|_| list(resource.get(INDEXES), INDEXES)).transpose()?.unwrap_or_default()
    {
        if index.pointer("/Projection/ProjectionType").and_then(Value::as_str) != Some("ALL") {
            return Err(invalid(resource.at(INDEXES), "has an index that does not project ALL"));
        }
        let (hash_key, range_key) = keys(index.get("KeySchema"), INDEXES)?;
        indexes.push(Index { name: field(&index, "IndexName"), hash_key, range_key });
    }
    let ttl = is_true(resource.get("/TimeToLiveSpecification/Enabled"));
    Ok(Table {
        logical_id: resource.id.clone(),
        name: physical_name(resource),
        hash_key,
        range_key,
        indexes,
        ttl_attribute: if ttl {
            Some(resource.text("/TimeToLiveSpecification/AttributeName")?)
        } else {
            None
        },
        stream_view: resource.optional_text("/StreamSpecification/StreamViewType")?,
    })
}

fn bucket(resource: &Resource, all: &[Resource]) -> Result<Bucket, TemplateError> {
    const DEFAULT: &str = "/ObjectLockConfiguration/Rule/DefaultRetention";
    let default_retention = match resource.get(DEFAULT) {
        None => None,
        Some(_) => {
            let years: Option<u32> = resource.number(&format!("{DEFAULT}/Years"))?;
            let days = match years {
                Some(years) => Some(years.saturating_mul(365)),
                None => resource.number(&format!("{DEFAULT}/Days"))?,
            };
            let days = days.ok_or_else(|| invalid(resource.at(DEFAULT), "has neither Days nor Years"))?;
            Some(Retention { mode: resource.text(&format!("{DEFAULT}/Mode"))?, days })
        }
    };
    Ok(Bucket {
        logical_id: resource.id.clone(),
        name: physical_name(resource),
        versioned: resource.optional_text("/VersioningConfiguration/Status")?.as_deref() == Some("Enabled"),
        object_lock: is_true(resource.get("/ObjectLockEnabled")),
        default_retention,
        notifications: notifications(resource, all)?,
        cors: cors(resource)?,
    })
}

/// What a bucket lets browsers do. A wildcard is not known here.
fn cors(bucket: &Resource) -> Result<Vec<CorsRule>, TemplateError> {
    const RULES: &str = "/CorsConfiguration/CorsRules";
    let rules = bucket.get(RULES).and_then(Value::as_array).map_or(0, Vec::len);
    let one = |n: usize| {
        let list = |name: &str| {
            let at = format!("{RULES}/{n}/{name}");
            let texts = bucket.get(&at).and_then(Value::as_array).into_iter().flatten();
            let texts: Option<Vec<String>> = texts.map(|text| text.as_str().map(str::to_owned)).collect();
            let known = texts.filter(|texts| !texts.iter().any(|text| text.contains('*')));
            known.ok_or_else(|| invalid(bucket.at(&at), "is no list of texts without wildcards"))
        };
        Ok(CorsRule {
            origins: list("AllowedOrigins")?,
            methods: list("AllowedMethods")?,
            headers: list("AllowedHeaders")?.iter().map(|name| name.to_ascii_lowercase()).collect(),
            max_age_s: bucket.number(&format!("{RULES}/{n}/MaxAge"))?.unwrap_or_default(),
        })
    };
    (0..rules).map(one).collect()
}

/// Whom a bucket tells of what happens in it: queues that S3 may send to, as their policies say.
fn notifications(bucket: &Resource, all: &[Resource]) -> Result<Vec<Notification>, TemplateError> {
    const AT: &str = "/NotificationConfiguration";
    const QUEUES: &str = "/NotificationConfiguration/QueueConfigurations";
    let Some(configuration) = bucket.get(AT) else { return Ok(Vec::new()) };
    let known = configuration.as_object().is_some_and(|c| c.keys().all(|name| name == "QueueConfigurations"));
    let told = bucket.get(QUEUES).and_then(Value::as_array).filter(|_| known);
    let told = told.ok_or_else(|| invalid(bucket.at(AT), "is known here as QueueConfigurations alone"))?;
    let source = format!("arn:aws:s3:::{}", physical_name(bucket));
    let one = |n: usize| {
        let at = format!("{QUEUES}/{n}");
        if bucket.get(&format!("{at}/Filter")).is_some() {
            return Err(invalid(bucket.at(&at), "has a Filter, which is not known to the local stack"));
        }
        let arn = bucket.text(&format!("{at}/Queue"))?;
        let queue = all.iter().find(|r| r.kind == "AWS::SQS::Queue" && queue_arn(&physical_name(r)) == arn);
        let queue =
            queue.ok_or_else(|| invalid(bucket.at(&at), format!("`{arn}` is no queue of the template")))?;
        if !all.iter().filter(|r| r.kind == "AWS::SQS::QueuePolicy").any(|r| lets_send(r, &arn, &source)) {
            let problem = format!("no policy of {} lets S3 send to it for this bucket alone", queue.id);
            return Err(invalid(bucket.at(&at), problem));
        }
        let event = bucket.text(&format!("{at}/Event"))?;
        Ok(Notification { id: format!("{}-{n}", bucket.id), event, queue: physical_name(queue) })
    };
    (0..told.len()).map(one).collect()
}

/// Whether the policy of a queue lets S3 send to it, and for that bucket alone. Without the condition whoever
/// has any bucket could have S3 send.
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/grant-destinations-permissions-to-s3.html>
fn lets_send(policy: &Resource, queue_arn: &str, bucket_arn: &str) -> bool {
    let statements = policy.get("/PolicyDocument/Statement").and_then(Value::as_array);
    statements.into_iter().flatten().any(|statement| {
        let is = |pointer: &str, wanted: &str| {
            statement.pointer(pointer).and_then(scalar).is_some_and(|value| value == wanted)
        };
        is("/Effect", "Allow")
            && is("/Principal/Service", "s3.amazonaws.com")
            && is("/Action", "sqs:SendMessage")
            && is("/Resource", queue_arn)
            && is("/Condition/ArnEquals/aws:SourceArn", bucket_arn)
    })
}

fn secret(resource: &Resource) -> Result<Secret, TemplateError> {
    Ok(Secret { logical_id: resource.id.clone(), name: physical_name(resource) })
}

fn queue(resource: &Resource, all: &[Resource]) -> Result<Queue, TemplateError> {
    /// What SQS takes where the template says nothing.
    const VISIBILITY_S: u64 = 30;
    const TARGET: &str = "/RedrivePolicy/deadLetterTargetArn";
    resource.refuse(&["DelaySeconds", "FifoQueue", "ReceiveMessageWaitTimeSeconds", "RedriveAllowPolicy"])?;
    let redrive = match resource.get("/RedrivePolicy") {
        None => None,
        Some(_) => {
            let arn = resource.text(TARGET)?;
            let other = all.iter().filter(|other| other.kind == "AWS::SQS::Queue").map(physical_name);
            let queue = other.into_iter().find(|name| queue_arn(name) == arn);
            let queue = queue.ok_or_else(|| {
                invalid(resource.at(TARGET), format!("`{arn}` is no queue of the template"))
            })?;
            let most = "/RedrivePolicy/maxReceiveCount";
            let max_receives =
                resource.number(most)?.ok_or_else(|| invalid(resource.at(most), "is missing"))?;
            Some(Redrive { queue, max_receives })
        }
    };
    Ok(Queue {
        logical_id: resource.id.clone(),
        name: physical_name(resource),
        visibility: Duration::from_secs(resource.number("/VisibilityTimeout")?.unwrap_or(VISIBILITY_S)),
        redrive,
    })
}

/// The property that names a resource of this kind, for the kinds whose name is also their `Ref`.
fn name_property(kind: &str) -> Option<&'static str> {
    match kind {
        "AWS::Serverless::Function" => Some("FunctionName"),
        "AWS::Serverless::LayerVersion" => Some("LayerName"),
        "AWS::DynamoDB::Table" => Some("TableName"),
        "AWS::S3::Bucket" => Some("BucketName"),
        "AWS::SecretsManager::Secret" => Some("Name"),
        "AWS::SQS::Queue" => Some("QueueName"),
        "AWS::Logs::LogGroup" => Some("LogGroupName"),
        "AWS::IAM::Role" => Some("RoleName"),
        _ => None,
    }
}

fn physical_name(resource: &Resource) -> String {
    name_property(&resource.kind)
        .and_then(|property| resource.properties.get(property).and_then(scalar))
        .unwrap_or_else(|| format!("{STACK}-{}", resource.id))
}

/// Which function an ARN names.
struct Names(BTreeMap<String, String>);

impl Names {
    fn new(resources: &[Resource]) -> Result<Self, TemplateError> {
        let mut names = BTreeMap::new();
        for resource in resources.iter().filter(|r| r.kind == "AWS::Serverless::Function") {
            let name = physical_name(resource);
            if let Some(other) = names.insert(name.clone(), resource.id.clone()) {
                let problem = format!("{} has the same name, {name}", other);
                return Err(invalid(resource.at("/FunctionName"), problem));
            }
        }
        Ok(Self(names))
    }

    /// The function and the API version in the URI of an integration or an authorizer.
    fn of_uri(&self, at: &str, uri: &str) -> Result<(String, Invocation), TemplateError> {
        let problem = |why: &str| invalid(at, format!("`{uri}` {why}"));
        let (_, path) = uri.split_once(":lambda:path/").ok_or_else(|| problem("names no Lambda function"))?;
        let (invocation, path) = if let Some(rest) = path.strip_prefix("2021-11-15/functions/") {
            (Invocation::Streaming, rest.strip_suffix("/response-streaming-invocations"))
        } else if let Some(rest) = path.strip_prefix("2015-03-31/functions/") {
            (Invocation::Buffered, rest.strip_suffix("/invocations"))
        } else {
            (Invocation::Buffered, None)
        };
        let arn = path.ok_or_else(|| problem("is neither of the two forms of a Lambda invocation"))?;
        let name = arn.rsplit(':').next().unwrap_or_default();
        let id = self.0.get(name).ok_or_else(|| problem("names a function that is not in the template"))?;
        Ok((id.clone(), invocation))
    }
}

#[derive(PartialEq, Eq)]
enum Invocation {
    Buffered,
    Streaming,
}

fn api(resource: &Resource, names: &Names) -> Result<Api, TemplateError> {
    let body = resource.get("/DefinitionBody").ok_or_else(|| {
        invalid(resource.at("/DefinitionBody"), "is missing: routes are not made from events")
    })?;
    let document = Document { at: resource.at("/DefinitionBody"), body };
    let schemes = document.schemes(names)?;
    let mut routes = Vec::new();
    for (path, item) in document.object("/paths")? {
        for (method, operation) in item.as_object().into_iter().flatten() {
            if METHODS.contains(&method.as_str()) {
                routes.push(document.route(path, method, operation, &schemes, names)?);
            } else if method.starts_with("x-amazon-apigateway") {
                return Err(invalid(document.path(path, method), "is not known to the local stack"));
            }
        }
    }
    let authorizers = schemes
        .into_iter()
        .filter_map(|(name, scheme)| match scheme {
            Scheme::Authorizer(authorizer) => Some((name, authorizer)),
            Scheme::Iam => None,
        })
        .collect();
    Ok(Api {
        id: API_ID.to_owned(),
        stage: resource.text("/StageName")?,
        region: REGION.to_owned(),
        account: ACCOUNT.to_owned(),
        routes,
        authorizers,
        gateway_responses: document.gateway_responses()?,
        throttle: throttle(resource)?,
    })
}

fn throttle(resource: &Resource) -> Result<Option<Throttle>, TemplateError> {
    let Some(Value::Array(settings)) = resource.get("/MethodSettings") else { return Ok(None) };
    let everywhere = settings.iter().position(|setting| {
        setting.get("ResourcePath").and_then(Value::as_str) == Some("/*")
            && setting.get("HttpMethod").and_then(Value::as_str) == Some("*")
    });
    let Some(index) = everywhere else { return Ok(None) };
    let rate = resource.number(&format!("/MethodSettings/{index}/ThrottlingRateLimit"))?;
    let burst = resource.number(&format!("/MethodSettings/{index}/ThrottlingBurstLimit"))?;
    Ok(rate.zip(burst).map(|(rate, burst)| Throttle { rate, burst }))
}

/// What a security scheme demands.
enum Scheme {
    Authorizer(Authorizer),
    Iam,
}

/// The OpenAPI document, evaluated.
struct Document<'a> {
    at: String,
    body: &'a Value,
}

impl Document<'_> {
    fn path(&self, path: &str, method: &str) -> String {
        format!("{}.paths.{path}.{method}", self.at)
    }

    fn object(&self, pointer: &str) -> Result<&Map<String, Value>, TemplateError> {
        self.body.pointer(pointer).and_then(Value::as_object).ok_or_else(|| {
            invalid(format!("{}{}", self.at, pointer.replace('/', ".")), "is missing or not a map")
        })
    }

    fn schemes(&self, names: &Names) -> Result<BTreeMap<String, Scheme>, TemplateError> {
        let mut schemes = BTreeMap::new();
        for (name, scheme) in self.object("/components/securitySchemes")? {
            let at = format!("{}.components.securitySchemes.{name}", self.at);
            let text = |pointer: &str| scheme.pointer(pointer).and_then(scalar).unwrap_or_default();
            let parsed = match text("/x-amazon-apigateway-authtype").as_str() {
                "awsSigv4" => Scheme::Iam,
                "custom" => Scheme::Authorizer(authorizer(&at, &text, names)?),
                other => {
                    return Err(invalid(at, format!("authtype `{other}` is not known to the local stack")));
                }
            };
            schemes.insert(name.clone(), parsed);
        }
        Ok(schemes)
    }

    fn route(
        &self,
        path: &str,
        method: &str,
        operation: &Value,
        schemes: &BTreeMap<String, Scheme>,
        names: &Names,
    ) -> Result<Route, TemplateError> {
        let at = self.path(path, method);
        if path.contains("+}") {
            return Err(invalid(at, "greedy path parameters are not known to the local stack"));
        }
        let integration = operation
            .get("x-amazon-apigateway-integration")
            .ok_or_else(|| invalid(&at, "has no x-amazon-apigateway-integration"))?;
        let at = format!("{at}.x-amazon-apigateway-integration");
        let text = |name: &str| integration.get(name).and_then(scalar);
        if text("type").as_deref() != Some("aws_proxy") {
            return Err(invalid(at, "only the type aws_proxy is known to the local stack"));
        }
        if text("httpMethod").as_deref() != Some("POST") {
            return Err(invalid(at, "Lambda is invoked by POST, whatever the route's own method"));
        }
        let uri = text("uri").ok_or_else(|| invalid(&at, "has no uri"))?;
        let (function, invocation) = names.of_uri(&at, &uri)?;
        let streaming = match text("responseTransferMode").as_deref() {
            None | Some("BUFFERED") => false,
            Some("STREAM") => true,
            Some(other) => return Err(invalid(at, format!("responseTransferMode `{other}` does not exist"))),
        };
        if streaming != (invocation == Invocation::Streaming) {
            return Err(invalid(at, "responseTransferMode and the form of the uri do not go together"));
        }
        let timeout = match text("timeoutInMillis") {
            None => DEFAULT_INTEGRATION_TIMEOUT,
            Some(ms) => Duration::from_millis(
                ms.parse().map_err(|_| invalid(&at, format!("timeoutInMillis `{ms}` is not a number")))?,
            ),
        };
        let method = Method::from_bytes(method.to_ascii_uppercase().as_bytes())
            .map_err(|_| invalid(&at, "is not an HTTP method"))?;
        let auth = self.auth(operation, schemes, &at)?;
        let tenant = tenant_source(integration, &at)?;
        Ok(Route { method, path: path.to_owned(), function, streaming, timeout, auth, tenant })
    }

    fn auth(
        &self,
        operation: &Value,
        schemes: &BTreeMap<String, Scheme>,
        at: &str,
    ) -> Result<RouteAuth, TemplateError> {
        let security = operation.get("security").or_else(|| self.body.get("security"));
        let required: BTreeSet<&String> = security
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_object)
            .flat_map(Map::keys)
            .collect();
        let mut required = required.into_iter();
        match (required.next(), required.next()) {
            (None, _) => Ok(RouteAuth::Open),
            (Some(name), None) => match schemes.get(name) {
                Some(Scheme::Iam) => Ok(RouteAuth::Iam),
                Some(Scheme::Authorizer(_)) => Ok(RouteAuth::Authorizer(name.clone())),
                None => Err(invalid(at, format!("security scheme `{name}` is not defined"))),
            },
            (Some(_), Some(_)) => Err(invalid(at, "API Gateway takes one security scheme for a route")),
        }
    }

    fn gateway_responses(&self) -> Result<BTreeMap<String, GatewayResponse>, TemplateError> {
        const KEY: &str = "x-amazon-apigateway-gateway-responses";
        const HEADER: &str = "gatewayresponse.header.";
        let mut responses = BTreeMap::new();
        let declared = self.body.get(KEY).and_then(Value::as_object);
        for (kind, response) in declared.into_iter().flatten() {
            let at = format!("{}.{KEY}.{kind}", self.at);
            let status = match response.get("statusCode").and_then(scalar) {
                None => None,
                Some(text) => Some(
                    text.parse().map_err(|_| invalid(&at, format!("statusCode `{text}` is not a status")))?,
                ),
            };
            let mut headers = BTreeMap::new();
            let parameters = response.get("responseParameters").and_then(Value::as_object);
            for (name, value) in parameters.into_iter().flatten() {
                let header = name.strip_prefix(HEADER).ok_or_else(|| {
                    invalid(&at, format!("`{name}` is not a header of the gateway response"))
                })?;
                headers.insert(header.to_owned(), scalar(value).unwrap_or_default());
            }
            let body = response.pointer("/responseTemplates/application~1json").and_then(scalar);
            responses.insert(kind.clone(), GatewayResponse { status, headers, body });
        }
        Ok(responses)
    }
}

/// What an integration's parameters say: of which value of the authorizer's context Lambda learns the
/// tenant. One that a client has a part in is refused, and so is any other parameter.
fn tenant_source(integration: &Value, at: &str) -> Result<Option<String>, TemplateError> {
    const TENANT_ID: &str = "integration.request.header.X-Amz-Tenant-Id";
    const SOURCE: &str = "context.authorizer.";
    let at = format!("{at}.requestParameters");
    let parameters = match integration.get("requestParameters") {
        None => return Ok(None),
        Some(parameters) => parameters.as_object().ok_or_else(|| invalid(&at, "is not a map"))?,
    };
    let mut source = None;
    for (name, value) in parameters {
        if !name.eq_ignore_ascii_case(TENANT_ID) {
            return Err(invalid(at, format!("`{name}` is not known to the local stack")));
        }
        let value = scalar(value).unwrap_or_default();
        let named = value.strip_prefix(SOURCE).filter(|name| !name.is_empty());
        let named =
            named.ok_or_else(|| invalid(&at, format!("`{value}` is not what the authorizer said")))?;
        source = Some(named.to_owned());
    }
    Ok(source)
}

fn authorizer(at: &str, text: &dyn Fn(&str) -> String, names: &Names) -> Result<Authorizer, TemplateError> {
    let part = |name: &str| text(&format!("/x-amazon-apigateway-authorizer/{name}"));
    if part("type") != "request" {
        return Err(invalid(at, "only authorizers of type request are known to the local stack"));
    }
    let source = part("identitySource");
    let identity_header = source
        .strip_prefix("method.request.header.")
        .filter(|header| !header.contains(','))
        .ok_or_else(|| invalid(at, format!("identitySource `{source}` is not one header")))?;
    let ttl = part("authorizerResultTtlInSeconds");
    let ttl = if ttl.is_empty() { "300".to_owned() } else { ttl };
    let seconds = ttl.parse().map_err(|_| invalid(at, format!("`{ttl}` is not a number of seconds")))?;
    let (function, invocation) = names.of_uri(at, &part("authorizerUri"))?;
    if invocation != Invocation::Buffered {
        return Err(invalid(at, "an authorizer is not invoked for streaming"));
    }
    Ok(Authorizer {
        function,
        identity_header: identity_header.to_ascii_lowercase(),
        ttl: Duration::from_secs(seconds),
    })
}

#[cfg(test)]
mod tests;
