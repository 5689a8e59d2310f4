//! Lambda: the Runtime API that the functions' processes poll, and the pools of those processes.
//!
//! A function's program is the very one that is deployed. It runs as a process per concurrent
//! invocation, with the environment it would have and nothing else, asks for its next event, answers,
//! and is asked no more until it asks again. It ends at its time limit, and what it left unanswered
//! fails at once when it ends by itself.
//!
//! A function whose processes are each a tenant's (`TenancyConfig`) is invoked with a tenant's id, any
//! other without one. A process that waits for its tenant's next request is of no use to others, so the
//! stack keeps so many of them and no more, and ends the one that has waited longest.
//!
//! A process does not outlive the stack: it is told to stop, then made to; and if the stack itself is
//! killed, its request for the next event fails, upon which `lambda_runtime` returns from `run` with
//! an error and the program ends.

mod api;
pub mod front;
mod idle;
mod instance;
mod pool;
mod prelude;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot};

pub(crate) use self::instance::uuid;
pub use self::prelude::Prelude;

use self::idle::Idle;
use self::instance::{Instance, Invocation};
use self::pool::Pool;
use crate::sigv4::Credentials;
use crate::template::Function;

/// The most that a request may carry into a function, or a buffered response out of it.
pub const MAX_PAYLOAD: usize = 6 * 1024 * 1024;
/// How long a program may take until it asks for its first event.
const INIT_TIMEOUT: Duration = Duration::from_secs(20);
/// Longer than any function may take: for callers that wait as long as it takes.
pub(crate) const WITHOUT_HURRY: Duration = Duration::from_secs(1_000);
/// How long a process may take to end once it is told to.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// How often idle processes are looked at.
const REAP_EVERY: Duration = Duration::from_secs(10);

/// How functions are run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder with the functions' programs, each named as the template names its binary.
    pub binaries: PathBuf,
    /// The folder for what the functions print, one file for each.
    pub logs: PathBuf,
    /// Variables for every function beyond the template's and Lambda's own: the addresses of the
    /// services, as `AWS_ENDPOINT_URL_DYNAMODB`.
    pub environment: BTreeMap<String, String>,
    /// The access key that each function signs its own calls with, by its logical id.
    pub credentials: BTreeMap<String, Credentials>,
    /// The region that functions are told they run in.
    pub region: String,
    /// How many processes a function may have at most, also where the template reserves more concurrency.
    pub default_concurrency: usize,
    /// How long a process may wait for work before it is ended.
    pub idle_timeout: Duration,
    /// How many processes that are tenants' own may wait for work at once, those of all functions together.
    pub idle_tenant_processes: usize,
}

impl Options {
    /// The usual options: 16 processes at most, ended after five idle minutes; of those that are tenants'
    /// own, 128 may be idle. A few tenants that are busy with all functions at once fit, at about 20 MB
    /// a process; more tenants than that meet cold starts, as they do on AWS.
    #[must_use]
    pub fn new(binaries: PathBuf, logs: PathBuf, credentials: BTreeMap<String, Credentials>) -> Self {
        Self {
            binaries,
            logs,
            environment: BTreeMap::new(),
            credentials,
            region: crate::template::REGION.to_owned(),
            default_concurrency: 16,
            idle_timeout: Duration::from_secs(300),
            idle_tenant_processes: 128,
        }
    }
}

/// Why an invocation has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvokeError {
    /// There is no such function.
    #[error("there is no function {0}")]
    UnknownFunction(String),
    /// A tenant's id is missing, malformed, or not expected.
    #[error("InvalidParameterValueException: {0}")]
    TenantId(&'static str),
    /// The event is larger than [`MAX_PAYLOAD`].
    #[error("the event is larger than {MAX_PAYLOAD} bytes")]
    RequestTooLarge,
    /// The buffered response is larger than [`MAX_PAYLOAD`].
    #[error("the response is larger than {MAX_PAYLOAD} bytes")]
    ResponseTooLarge,
    /// The caller's own patience is over. The function goes on.
    #[error("no answer within the caller's time")]
    Waited,
    /// The function's time limit is over, and its process was ended.
    #[error("the function did not end within its {0:?}")]
    TimedOut(Duration),
    /// The function's process did not come up. With what it printed last.
    #[error("the function did not start: {0}")]
    Init(String),
    /// The process ended during the invocation. With what it printed last.
    #[error("the function's process ended: {0}")]
    Crashed(String),
    /// The function answered with an error.
    #[error("the function failed: {kind}: {message}")]
    Function {
        /// `errorType`.
        kind: String,
        /// `errorMessage`.
        message: String,
    },
    /// A streamed response does not begin as it has to.
    #[error("the streamed response is malformed: {0}")]
    Malformed(&'static str),
    /// The stack is ending.
    #[error("the stack is ending")]
    Closing,
}

/// The result of a buffered invocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// What the function returned.
    pub payload: Bytes,
    /// Whether the function streamed it: then it begins with a prelude.
    pub streamed: bool,
}

impl Response {
    /// The prelude of a streamed response, without which a buffered caller cannot read it.
    ///
    /// # Errors
    /// [`InvokeError::Malformed`].
    pub fn prelude(&self) -> Result<Prelude, InvokeError> {
        let mut bytes = BytesMut::from(self.payload.as_ref());
        prelude::split(&mut bytes)?.ok_or(InvokeError::Malformed(prelude::NO_DELIMITER))
    }
}

/// The result of a streaming invocation: how the response begins, and the rest as it comes.
#[derive(Debug)]
pub struct StreamingResponse {
    /// Status and headers.
    pub prelude: Prelude,
    /// The body. An error is the last item, and means that the response is incomplete. Dropping the
    /// receiver does not end the function.
    pub body: mpsc::Receiver<Result<Bytes, InvokeError>>,
}

/// Invokes one function and answers its result.
pub type Invoke = Arc<dyn Fn(Bytes) -> BoxFuture<'static, Result<Bytes, InvokeError>> + Send + Sync>;

/// All functions of the stack.
#[derive(Debug)]
pub struct Lambda {
    pools: Vec<Arc<Pool>>,
    shared: Arc<Shared>,
}

/// What pools and the Runtime API have in common.
#[derive(Debug)]
struct Shared {
    options: Options,
    address: SocketAddr,
    instances: Mutex<HashMap<String, Arc<Instance>>>,
    idle: Idle,
    stopped: Notify,
}

impl Shared {
    /// Ends processes that have waited too long.
    fn reap(&self) {
        let old = self.idle.take_older(self.options.idle_timeout);
        old.iter().for_each(|instance| instance.terminate());
    }
}

/// What a process posted.
#[derive(Debug)]
enum Reply {
    Buffered(Bytes),
    Streaming { http: bool, body: mpsc::Receiver<Result<Bytes, InvokeError>> },
}

impl Lambda {
    /// Starts the Runtime API. Processes start when they are needed.
    ///
    /// # Errors
    /// If no port can be had, or the folder for the logs cannot be made.
    pub async fn start(functions: Vec<Function>, options: Options) -> io::Result<Arc<Self>> {
        tokio::fs::create_dir_all(&options.logs).await?;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let shared = Arc::new(Shared {
            address: listener.local_addr()?,
            options,
            instances: Mutex::new(HashMap::new()),
            idle: Idle::default(),
            stopped: Notify::new(),
        });
        let pools = functions
            .into_iter()
            .map(|function| Pool::new(function, Arc::clone(&shared)).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        tokio::spawn(api::serve(listener, Arc::clone(&shared)));
        let lambda = Arc::new(Self { pools, shared });
        let reaped = Arc::downgrade(&lambda);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(REAP_EVERY).await;
                let Some(lambda) = reaped.upgrade() else { break };
                lambda.shared.reap();
            }
        });
        Ok(lambda)
    }

    /// Invokes a function, for `tenant` if its processes are each a tenant's, and waits for the whole
    /// result, no longer than `wait`. The function is named by its logical id, its name or its binary.
    ///
    /// # Errors
    /// [`InvokeError`].
    pub async fn invoke(
        &self,
        function: &str,
        tenant: Option<&str>,
        payload: Bytes,
        wait: Duration,
    ) -> Result<Response, InvokeError> {
        let complete = async {
            match self.begin(function, tenant, payload).await? {
                Reply::Buffered(payload) => Ok(Response { payload, streamed: false }),
                Reply::Streaming { mut body, .. } => {
                    let mut payload = BytesMut::new();
                    while let Some(chunk) = body.recv().await {
                        payload.extend_from_slice(&chunk?);
                        if payload.len() > MAX_PAYLOAD {
                            return Err(InvokeError::ResponseTooLarge);
                        }
                    }
                    Ok(Response { payload: payload.freeze(), streamed: true })
                }
            }
        };
        tokio::time::timeout(wait, complete).await.unwrap_or(Err(InvokeError::Waited))
    }

    /// What invokes this function, for no tenant in particular, however long it takes.
    #[must_use]
    pub fn invoker(self: &Arc<Self>, function: &str) -> Invoke {
        let (lambda, function) = (Arc::clone(self), function.to_owned());
        Arc::new(move |payload| {
            let (lambda, function) = (Arc::clone(&lambda), function.clone());
            Box::pin(async move {
                let response = lambda.invoke(&function, None, payload, WITHOUT_HURRY).await?;
                Ok(response.payload)
            })
        })
    }

    /// Invokes a function, as [`Lambda::invoke`] does, and waits until its response has begun, no longer
    /// than `wait`.
    ///
    /// # Errors
    /// [`InvokeError`]. A function that does not stream has no prelude: its response is malformed.
    pub async fn invoke_streaming(
        &self,
        function: &str,
        tenant: Option<&str>,
        payload: Bytes,
        wait: Duration,
    ) -> Result<StreamingResponse, InvokeError> {
        let begun = async {
            match self.begin(function, tenant, payload).await? {
                Reply::Buffered(_) => Err(InvokeError::Malformed("it is not streamed")),
                Reply::Streaming { http: false, .. } => {
                    Err(InvokeError::Malformed("its content type is another"))
                }
                Reply::Streaming { http: true, body } => prelude::read(body).await,
            }
        };
        tokio::time::timeout(wait, begun).await.unwrap_or(Err(InvokeError::Waited))
    }

    async fn begin(
        &self,
        function: &str,
        tenant: Option<&str>,
        payload: Bytes,
    ) -> Result<Reply, InvokeError> {
        let pool = self.pool(function).ok_or_else(|| InvokeError::UnknownFunction(function.to_owned()))?;
        match (pool.function().tenant_isolation, tenant) {
            (true, None) => return Err(InvokeError::TenantId("the function is invoked with a tenant's id")),
            (false, Some(_)) => return Err(InvokeError::TenantId("the function takes no tenant's id")),
            (true, Some(id)) if !is_tenant_id(id) => {
                return Err(InvokeError::TenantId("the tenant's id is malformed"));
            }
            (true, Some(_)) | (false, None) => {}
        }
        if payload.len() > MAX_PAYLOAD {
            return Err(InvokeError::RequestTooLarge);
        }
        let (reply, result) = oneshot::channel();
        // On its own: what has begun goes on, whether or not the caller still waits for it.
        tokio::spawn(Arc::clone(pool).run(Arc::new(Invocation::new(tenant, payload, reply))));
        result.await.unwrap_or(Err(InvokeError::Closing))
    }

    /// Kills every process of a function, whatever it is doing, and says how many there were.
    #[must_use = "a function that is not there has no processes either"]
    pub fn kill_instances(&self, function: &str) -> usize {
        self.pools(function).map(|pool| pool.kill_all()).sum()
    }

    /// Kills every process that a function has now, and returns once they are gone.
    pub async fn kill_and_wait(&self, function: &str) {
        for pool in self.pools(function) {
            let processes = pool.processes();
            let _ = pool.kill_all();
            for process in processes {
                process.gone().await;
            }
        }
    }

    /// Sets how long invocations of a function may take that begin from now on, and says whether there is one.
    #[must_use = "a function that is not there has no limit either"]
    pub fn set_timeout(&self, function: &str, timeout: Duration) -> bool {
        self.pools(function).map(|pool| pool.set_timeout(timeout)).count() > 0
    }

    /// How many processes a function has.
    #[must_use]
    pub fn instances(&self, function: &str) -> usize {
        self.pools(function).map(|pool| pool.size()).sum()
    }

    /// The ids of a function's processes, each with the environment that it was given. The system does not say: some
    /// functions close themselves to others of their user.
    #[must_use]
    pub fn environments(&self, function: &str) -> BTreeMap<u32, BTreeMap<String, String>> {
        self.pools(function)
            .flat_map(|pool| pool.processes())
            .filter_map(|process| process.process())
            .collect()
    }

    /// What a function printed last.
    #[must_use]
    pub fn log_tail(&self, function: &str) -> Vec<String> {
        self.pools(function).flat_map(|pool| pool.tail()).collect()
    }

    /// Ends all processes: asks, waits a little, kills. Invocations that are still running fail.
    pub async fn shutdown(&self) {
        self.pools.iter().for_each(|pool| pool.close());
        let all_gone = async {
            while self.pools.iter().any(|pool| pool.size() > 0) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(STOP_GRACE * 2, all_gone).await.is_err() {
            tracing::warn!("Some function processes did not end in time");
        }
        self.shared.stopped.notify_one();
    }

    /// The functions of that name. A binary may be that of several, which is then no name to invoke by.
    fn pools(&self, function: &str) -> impl Iterator<Item = &Arc<Pool>> {
        self.pools.iter().filter(move |pool| {
            let f = pool.function();
            f.logical_id == function || f.name == function || f.binary == function
        })
    }

    fn pool(&self, function: &str) -> Option<&Arc<Pool>> {
        let mut named = self.pools(function);
        named.next().filter(|_| named.next().is_none())
    }
}

/// What Lambda takes for a tenant's id.
fn is_tenant_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:/=+-@ ".contains(&byte);
    (1..=256).contains(&text.len()) && text.bytes().all(allowed)
}

/// Locks, even if another thread has panicked with the lock held: every use leaves whole values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests;
