use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use lambda_runtime::streaming::{Body, channel};
use lambda_runtime::{
    Diagnostic, FunctionResponse, LambdaEvent, MetadataPrelude, StreamResponse, service_fn,
};
use serde_json::{Value, json};

use super::*;

const WAIT: Duration = Duration::from_secs(20);

/// Not a test: the program of the functions below, which the tests start this very binary for. It
/// runs on the real runtime client and does what the event says.
#[test]
#[ignore = "the program that other tests run as a function"]
fn fake_function() {
    let Some(_) = std::env::var_os("AWS_LAMBDA_RUNTIME_API") else { return };
    if std::env::var_os("FAIL").is_some() {
        eprintln!("no such secret");
        std::process::exit(3);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    // Without its Runtime API a function has nothing to do, and this returns.
    let ended = runtime.block_on(lambda_runtime::run(service_fn(fake)));
    std::process::exit(i32::from(ended.is_err()));
}

type Answer = Result<FunctionResponse<Value, Body>, Diagnostic>;

async fn fake(event: LambdaEvent<Value>) -> Answer {
    static CALLS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    static SERVED: Mutex<Vec<Option<String>>> = Mutex::new(Vec::new());
    let calls = CALLS.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
    let (event, context) = (event.payload, event.context);
    let served = {
        let mut served = lock(&SERVED);
        served.push(context.tenant_id.clone());
        served.clone()
    };
    if event["type"] == "REQUEST" {
        return authorize(&event, calls).await;
    }
    let command = event["do"].as_str().or(event["headers"]["x-do"].as_str()).unwrap_or("proxy").to_owned();
    let buffered = |value| Ok(FunctionResponse::BufferedResponse(value));
    let (name, argument) = command.split_once(' ').unwrap_or((&command, ""));
    match name {
        "proxy" => buffered(json!({
            "statusCode": 201,
            "headers": {"x-function": "yes", "x-tenant": context.tenant_id.unwrap_or_default(), "Content-Length": "1"},
            "multiValueHeaders": {"set-cookie": ["a=1", "b=2"]},
            "body": event.to_string(),
        })),
        "echo" => buffered(json!({
            "event": event,
            "pid": std::process::id(),
            "served": served,
            "left_ms": context.deadline().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64,
            "env": std::env::vars().collect::<BTreeMap<_, _>>(),
        })),
        "raw" => buffered(serde_json::from_str(argument).unwrap()),
        "large" => buffered(json!("x".repeat(MAX_PAYLOAD))),
        "fail" => Err(Diagnostic { error_type: "Oops".into(), error_message: "bad".into() }),
        "crash" => {
            eprintln!("last words");
            std::process::exit(7);
        }
        "sleep" => {
            tokio::time::sleep(Duration::from_millis(argument.parse().unwrap())).await;
            buffered(json!({"statusCode": 200, "pid": std::process::id()}))
        }
        "stream" => {
            let (mut sender, body) = channel();
            let marker = argument.to_owned();
            tokio::spawn(async move {
                for chunk in ["one", "two", "three"] {
                    sender.send_data(chunk.into()).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    if marker == "crash" {
                        std::process::exit(7);
                    }
                }
                if marker.starts_with('/') {
                    std::fs::write(marker, "drained").unwrap();
                }
            });
            let mut prelude = MetadataPrelude::default();
            prelude.headers.insert("content-type", "text/event-stream".parse().unwrap());
            prelude.headers.insert("x-tenant", context.tenant_id.unwrap_or_default().parse().unwrap());
            prelude.cookies.push("c=3".into());
            Ok(FunctionResponse::StreamingResponse(StreamResponse {
                metadata_prelude: prelude,
                stream: body,
            }))
        }
        other => Err(Diagnostic { error_type: "Unknown".into(), error_message: other.into() }),
    }
}

async fn authorize(event: &Value, calls: usize) -> Answer {
    let policy = |effect: &str, resource: &str, context: Value| {
        Ok(FunctionResponse::BufferedResponse(json!({
            "principalId": "someone",
            "policyDocument": {"Version": "2012-10-17", "Statement": [
                {"Action": ["execute-api:Invoke"], "Effect": effect, "Resource": [resource]}
            ]},
            "context": context,
        })))
    };
    match event["headers"]["authorization"].as_str().unwrap() {
        "Bearer good" => {
            let context =
                json!({"tenantId": "acme", "n": 1, "b": true, "calls": calls, "arn": event["methodArn"]});
            policy("Allow", "*/live/*/v1/*", context)
        }
        "Bearer narrow" => policy("Allow", "*/live/POST/v1/search", json!({"tenantId": "acme"})),
        "Bearer nameless" => policy("Allow", "*", json!({})),
        "Bearer denied" => policy("Deny", "*", json!({})),
        "Bearer object" => policy("Allow", "*", json!({"o": {}})),
        "Bearer crash" => std::process::exit(7),
        "Bearer broken" => Err(Diagnostic::from("the key could not be checked")),
        _ => Err(Diagnostic::from("Unauthorized")),
    }
}

/// A folder of programs that all are [`fake_function`].
pub(crate) fn programs(folder: &Path, names: &[&str]) {
    let this = std::env::current_exe().unwrap();
    for name in names {
        let path = folder.join(name);
        let script = format!(
            "#!/bin/sh\nexec '{}' --ignored --exact --nocapture lambda::tests::fake_function\n",
            this.display()
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}

pub(crate) fn options(folder: &Path) -> Options {
    let credentials = Credentials {
        access_key_id: "AKID".into(),
        secret_access_key: "secret".into(),
        region: "us-east-1".into(),
        user_arn: "arn:aws:sts::0:assumed-role/fake".into(),
    };
    Options::new(folder.to_owned(), folder.join("logs"), [("Fake".to_owned(), credentials)].into())
}

pub(crate) fn function(timeout_ms: u64) -> Function {
    Function {
        logical_id: "Fake".into(),
        name: "bulkhead-fake".into(),
        binary: "fake".into(),
        layers: Vec::new(),
        environment: BTreeMap::from([("TABLE".into(), "t".into())]),
        timeout: Duration::from_millis(timeout_ms),
        memory_mb: 128,
        reserved_concurrency: None,
        tenant_isolation: false,
        events: Default::default(),
        policies: Vec::new(),
    }
}

struct Stack {
    lambda: Arc<Lambda>,
    folder: tempfile::TempDir,
}

impl Stack {
    async fn new(function: Function) -> Self {
        let folder = tempfile::tempdir().unwrap();
        programs(folder.path(), &["fake"]);
        let mut options = options(folder.path());
        options.environment.insert("AWS_ENDPOINT_URL_DYNAMODB".into(), "http://127.0.0.1:1".into());
        Self { lambda: Lambda::start(vec![function], options).await.unwrap(), folder }
    }

    async fn call(&self, command: &str) -> Result<Value, InvokeError> {
        call(&self.lambda, "Fake", None, command).await
    }

    /// The process that serves a tenant now. It must have served no other.
    async fn process_of(&self, tenant: &str) -> Value {
        process_of(&self.lambda, "Fake", tenant).await
    }

    async fn stream(&self, command: &str) -> Result<StreamingResponse, InvokeError> {
        let event = Bytes::from(json!({"do": command}).to_string());
        self.lambda.invoke_streaming("Fake", None, event, WAIT).await
    }
}

async fn call(
    lambda: &Lambda,
    function: &str,
    tenant: Option<&str>,
    command: &str,
) -> Result<Value, InvokeError> {
    let event = Bytes::from(json!({"do": command}).to_string());
    let response = lambda.invoke(function, tenant, event, WAIT).await?;
    assert!(!response.streamed);
    Ok(serde_json::from_slice(&response.payload).unwrap())
}

async fn process_of(lambda: &Lambda, function: &str, tenant: &str) -> Value {
    let echo = call(lambda, function, Some(tenant), "echo").await.unwrap();
    let served = echo["served"].as_array().unwrap();
    assert!(served.iter().all(|of| of == tenant), "{tenant}'s process has served {served:?}");
    echo["pid"].clone()
}

fn isolated() -> Function {
    Function { tenant_isolation: true, ..function(10_000) }
}

fn alive(pid: &Value) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

async fn eventually(what: impl Fn() -> bool) {
    for _ in 0..500 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it did not happen");
}

#[tokio::test]
async fn a_function_gets_its_event_and_its_environment_and_no_other() {
    let stack = Stack::new(function(5_000)).await;
    let before = crate::serving::system_clock().unix_timestamp() as u64 * 1000;
    let first = stack.call("echo").await.unwrap();
    assert_eq!(first["event"], json!({"do": "echo"}));
    let deadline = first["left_ms"].as_u64().unwrap();
    assert!((before + 5_000..before + 15_000).contains(&deadline));

    let env = &first["env"];
    assert_eq!(env["TABLE"], "t");
    assert_eq!(env["AWS_ENDPOINT_URL_DYNAMODB"], "http://127.0.0.1:1");
    assert_eq!(env["AWS_LAMBDA_FUNCTION_NAME"], "bulkhead-fake");
    assert_eq!(env["AWS_SESSION_TOKEN"], "local");
    assert!(env.get("HOME").is_none() && env.get("CARGO_MANIFEST_DIR").is_none());

    // The same process serves the next invocation.
    assert_eq!(stack.call("echo").await.unwrap()["pid"], first["pid"]);
    stack.lambda.shutdown().await;
    assert!(!alive(&first["pid"]));
    assert_eq!(stack.call("echo").await, Err(InvokeError::Closing));
}

#[tokio::test]
async fn invocations_at_once_have_a_process_each_up_to_the_limit() {
    let stack = Stack::new(Function { reserved_concurrency: Some(2), ..function(10_000) }).await;
    let calls = (0..5).map(|_| stack.call("sleep 100"));
    let mut pids: Vec<Value> =
        futures_util::future::join_all(calls).await.into_iter().map(|r| r.unwrap()["pid"].clone()).collect();
    pids.sort_by_key(|pid| pid.as_u64());
    pids.dedup();
    assert_eq!(pids.len(), 2);
    assert_eq!(stack.lambda.instances("fake"), 2);
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn a_process_serves_one_tenant_alone() {
    let stack = Stack::new(isolated()).await;
    let (acme, globex) = (stack.process_of("acme").await, stack.process_of("globex").await);
    assert_ne!(acme, globex);
    // Each keeps its own, idle as the other's may be; and so does what comes in its place.
    assert_eq!((stack.process_of("globex").await, stack.process_of("acme").await), (globex.clone(), acme));
    let crashed = call(&stack.lambda, "Fake", Some("acme"), "crash").await;
    assert!(matches!(crashed, Err(InvokeError::Crashed(_))), "{crashed:?}");
    let next = stack.process_of("acme").await;
    assert_eq!(stack.process_of("globex").await, globex);
    assert_eq!(stack.process_of("acme").await, next);

    // Many at once, more than there may be processes.
    let all = (0..60).map(|n| ["acme", "globex", "acme1", "acme-1"][n % 4]);
    let all = all.map(async |tenant| (stack.process_of(tenant).await.to_string(), tenant));
    let mut owners = BTreeMap::new();
    for (pid, tenant) in futures_util::future::join_all(all).await {
        assert_eq!(*owners.entry(pid).or_insert(tenant), tenant);
    }
    assert!(owners.len() >= 4, "{owners:?}");
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn a_tenants_id_is_given_where_it_is_wanted_and_nowhere_else() {
    let stack = Stack::new(isolated()).await;
    let refused = async |tenant: Option<&str>| {
        matches!(call(&stack.lambda, "Fake", tenant, "echo").await, Err(InvokeError::TenantId(_)))
    };
    assert!(refused(None).await);
    for malformed in ["", "a#b", "a\nb", "é", "*", &"x".repeat(257)] {
        assert!(refused(Some(malformed)).await, "{malformed}");
    }
    assert_eq!(stack.lambda.instances("Fake"), 0, "none of them has reached a process");
    stack.process_of("A._:/=+-@ 9").await;
    stack.process_of(&"x".repeat(256)).await;
    stack.lambda.shutdown().await;

    let shared = Stack::new(function(5_000)).await;
    let named = call(&shared.lambda, "Fake", Some("acme"), "echo").await;
    assert!(matches!(named, Err(InvokeError::TenantId(_))), "{named:?}");
    assert_eq!(shared.call("echo").await.unwrap()["served"], json!([null]));
    shared.lambda.shutdown().await;
}

#[tokio::test]
async fn of_tenants_processes_so_many_are_idle_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    programs(folder.path(), &["fake"]);
    let options = Options { idle_tenant_processes: 2, ..options(folder.path()) };
    let second = Function { logical_id: "Second".into(), name: "bulkhead-second".into(), ..isolated() };
    let everybodys =
        Function { logical_id: "Third".into(), name: "bulkhead-third".into(), ..function(5_000) };
    let lambda = Lambda::start(vec![isolated(), second, everybodys], options).await.unwrap();
    let everybody = call(&lambda, "Third", None, "echo").await.unwrap()["pid"].clone();
    let first = process_of(&lambda, "Fake", "acme").await;
    let second = process_of(&lambda, "Second", "globex").await;
    eventually(|| lambda.shared.idle.len() == 3).await;
    assert!(alive(&first) && alive(&second));
    assert_eq!(process_of(&lambda, "Fake", "acme").await, first);
    eventually(|| lambda.shared.idle.len() == 3).await;

    // Who has waited longest goes, of whichever function; what works for everybody is not counted.
    let third = process_of(&lambda, "Fake", "globex").await;
    eventually(|| !alive(&second)).await;
    assert!(alive(&first) && alive(&third) && alive(&everybody));
    assert_eq!((lambda.instances("Second"), lambda.instances("fake")), (0, 3));

    for n in 0..12 {
        process_of(&lambda, "Second", &format!("tenant-{n}")).await;
    }
    eventually(|| lambda.instances("fake") == 3).await;
    assert!(alive(&everybody));
    lambda.shutdown().await;
}

#[tokio::test]
async fn a_crash_fails_its_invocation_at_once_and_only_that() {
    let stack = Stack::new(function(10_000)).await;
    let Err(InvokeError::Crashed(reason)) = stack.call("crash").await else { panic!("it did not crash") };
    assert!(reason.contains("exit status: 7") && reason.contains("last words"), "{reason}");
    assert!(stack.call("echo").await.is_ok());

    let running = stack.call("sleep 5000");
    let killed = async {
        eventually(|| stack.lambda.instances("Fake") == 1).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(stack.lambda.kill_instances("bulkhead-fake"), 1);
    };
    let started = std::time::Instant::now();
    let (result, ()) = tokio::join!(running, killed);
    assert!(matches!(result, Err(InvokeError::Crashed(_))), "{result:?}");
    assert!(started.elapsed() < Duration::from_secs(3));
    assert!(stack.call("echo").await.is_ok());
    assert!(stack.lambda.log_tail("fake").iter().any(|line| line.contains("last words")));
    let log = std::fs::read_to_string(stack.folder.path().join("logs/fake.log")).unwrap();
    assert!(log.contains("last words"));
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn a_function_is_ended_at_its_time_limit_but_not_at_the_callers() {
    let stack = Stack::new(function(600)).await;
    let pid = stack.call("echo").await.unwrap()["pid"].clone();
    assert_eq!(stack.call("sleep 60000").await, Err(InvokeError::TimedOut(Duration::from_millis(600))));
    eventually(|| !alive(&pid)).await;

    let pid = stack.call("echo").await.unwrap()["pid"].clone();
    let event = Bytes::from_static(br#"{"do":"sleep 300"}"#);
    let impatient = stack.lambda.invoke("Fake", None, event, Duration::from_millis(50)).await;
    assert_eq!(impatient, Err(InvokeError::Waited));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(stack.call("echo").await.unwrap()["pid"], pid);
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn a_function_that_does_not_start_says_why_and_is_not_started_in_a_loop() {
    let failing = BTreeMap::from([("FAIL".to_owned(), "1".to_owned())]);
    let stack = Stack::new(Function { environment: failing, ..function(1_000) }).await;
    let Err(InvokeError::Init(reason)) = stack.call("echo").await else { panic!("it started") };
    assert!(reason.contains("exit status: 3") && reason.contains("no such secret"), "{reason}");
    let started = std::time::Instant::now();
    for _ in 0..50 {
        assert!(matches!(stack.call("echo").await, Err(InvokeError::Init(_))));
    }
    assert!(started.elapsed() < Duration::from_millis(150), "no process is started in the meantime");

    let absent = Stack::new(Function { binary: "absent".into(), ..function(1_000) }).await;
    let Err(InvokeError::Init(reason)) = absent.call("echo").await else { panic!("it started") };
    assert!(reason.contains("/absent: No such file"), "{reason}");
}

#[tokio::test]
async fn errors_and_sizes_are_told() {
    let stack = Stack::new(function(5_000)).await;
    let failed = InvokeError::Function { kind: "Oops".into(), message: "bad".into() };
    assert_eq!(stack.call("fail").await, Err(failed));
    assert_eq!(stack.call("large").await, Err(InvokeError::ResponseTooLarge));
    assert_eq!(stack.call(&"x".repeat(MAX_PAYLOAD)).await, Err(InvokeError::RequestTooLarge));
    let unknown = stack.lambda.invoke("Nope", None, Bytes::new(), WAIT).await;
    assert_eq!(unknown, Err(InvokeError::UnknownFunction("Nope".into())));
    assert!(stack.call("echo").await.is_ok());
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn a_stream_arrives_as_it_is_written() {
    let stack = Stack::new(function(5_000)).await;
    let mut response = stack.stream("stream").await.unwrap();
    assert_eq!(response.prelude.status_code, 200);
    assert_eq!(response.prelude.headers["content-type"], "text/event-stream");
    assert_eq!(response.prelude.cookies, ["c=3"]);
    let started = std::time::Instant::now();
    assert_eq!(response.body.recv().await.unwrap().unwrap(), "one");
    assert!(started.elapsed() < Duration::from_millis(150));
    assert_eq!(response.body.recv().await.unwrap().unwrap(), "two");
    assert_eq!(response.body.recv().await.unwrap().unwrap(), "three");
    assert!(response.body.recv().await.is_none());

    assert!(matches!(stack.stream("echo").await, Err(InvokeError::Malformed(_))));
    let mut broken = stack.stream("stream crash").await.unwrap();
    assert_eq!(broken.body.recv().await.unwrap().unwrap(), "one");
    assert!(matches!(broken.body.recv().await, Some(Err(InvokeError::Crashed(_)))));
    assert!(broken.body.recv().await.is_none());

    // A buffered caller gets all of it in one piece.
    let event = Bytes::from_static(br#"{"do":"stream"}"#);
    let whole = stack.lambda.invoke("Fake", None, event, WAIT).await.unwrap();
    assert!(whole.streamed && whole.payload.ends_with(b"\0\0onetwothree"));
    assert_eq!(whole.prelude().unwrap().status_code, 200);
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn a_function_whose_reader_has_gone_runs_to_its_end() {
    let stack = Stack::new(function(5_000)).await;
    let marker = stack.folder.path().join("marker");
    let busy = stack.call("echo").await.unwrap()["pid"].clone();
    let response = stack.stream(&format!("stream {}", marker.display())).await.unwrap();
    drop(response);
    // Past the first chunk that nobody takes: it is still the same invocation's process.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_ne!(stack.call("echo").await.unwrap()["pid"], busy);
    eventually(|| marker.exists()).await;
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn an_answer_to_nothing_is_stale() {
    let stack = Stack::new(function(5_000)).await;
    let pid = stack.call("echo").await.unwrap();
    let base = pid["env"]["AWS_LAMBDA_RUNTIME_API"].as_str().unwrap();
    let client = reqwest::Client::new();
    for path in ["response", "error"] {
        let url = format!("{base}/2018-06-01/runtime/invocation/unknown/{path}");
        assert_eq!(client.post(url).body("{}").send().await.unwrap().status(), 410);
    }
    let url = format!("http://{}/nobody/2018-06-01/runtime/invocation/next", stack.lambda.shared.address);
    assert_eq!(client.get(url).send().await.unwrap().status(), 410);
    stack.lambda.shutdown().await;
}

#[tokio::test]
async fn idle_processes_are_ended() {
    let folder = tempfile::tempdir().unwrap();
    programs(folder.path(), &["fake"]);
    let options = Options { idle_timeout: Duration::ZERO, ..options(folder.path()) };
    let lambda = Lambda::start(vec![function(5_000)], options).await.unwrap();
    lambda.invoke("Fake", None, Bytes::from_static(br#"{"do":"echo"}"#), WAIT).await.unwrap();
    eventually(|| {
        lambda.shared.reap();
        lambda.instances("Fake") == 0
    })
    .await;
}

/// Children of a stack that is killed outright are nobody's to end: they see it and end themselves.
#[tokio::test]
async fn a_function_ends_when_its_runtime_api_is_gone() {
    use tokio::io::AsyncReadExt;

    let folder = tempfile::tempdir().unwrap();
    programs(folder.path(), &["fake"]);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let mut child = tokio::process::Command::new(folder.path().join("fake"))
        .env("AWS_LAMBDA_RUNTIME_API", format!("http://{}/x", listener.local_addr().unwrap()))
        .env("AWS_LAMBDA_FUNCTION_NAME", "f")
        .env("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "128")
        .env("AWS_LAMBDA_FUNCTION_VERSION", "1")
        .stdout(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let (mut connection, _) = listener.accept().await.unwrap();
    let mut request = [0; 64];
    assert!(connection.read(&mut request).await.unwrap() > 0);
    assert!(request.starts_with(b"GET /x/2018-06-01/runtime/invocation/next"));
    assert!(child.try_wait().unwrap().is_none());
    drop((connection, listener));
    let ended = tokio::time::timeout(Duration::from_secs(5), child.wait()).await.unwrap().unwrap();
    assert_eq!(ended.code(), Some(1));
}
