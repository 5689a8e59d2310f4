//! One process of a function, and one invocation that it may be working on.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::process::Stdio;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;

use super::pool::Pool;
use super::{InvokeError, Reply, STOP_GRACE, Shared, lock};
use crate::serving::unique_id;

/// How many lines of a process's output go into the message about its end.
const TAIL: usize = 12;
/// How long output may still come after a process has ended.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How far an invocation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Waiting,
    Delivered,
    Responding,
    Done,
    /// Done, and its process waits for work again.
    Over,
}

/// One invocation.
#[derive(Debug)]
pub(super) struct Invocation {
    pub(super) id: String,
    /// The tenant whose it is, for a function whose processes are each a tenant's.
    pub(super) tenant: Option<String>,
    pub(super) payload: Bytes,
    reply: Mutex<Option<oneshot::Sender<Result<Reply, InvokeError>>>>,
    stage: watch::Sender<Stage>,
}

impl Invocation {
    pub(super) fn new(
        tenant: Option<&str>,
        payload: Bytes,
        reply: oneshot::Sender<Result<Reply, InvokeError>>,
    ) -> Self {
        let (stage, _) = watch::channel(Stage::Waiting);
        let tenant = tenant.map(str::to_owned);
        Self { id: invocation_id(), tenant, payload, reply: Mutex::new(Some(reply)), stage }
    }

    /// Whether nobody waits for the result any more.
    pub(super) fn abandoned(&self) -> bool {
        lock(&self.reply).as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Gives the caller its result; only the first counts.
    pub(super) fn reply(&self, result: Result<Reply, InvokeError>) {
        if let Some(reply) = lock(&self.reply).take() {
            // A caller that has gone away misses it.
            let _ = reply.send(result);
        }
    }

    pub(super) fn advance(&self, to: Stage) {
        self.stage.send_if_modified(|stage| {
            let forward = *stage < to;
            *stage = to.max(*stage);
            forward
        });
    }

    /// The process has done its work. Returns once it can get more: whoever hears of the end and asks
    /// again is not to find it busy.
    pub(super) async fn end(&self) {
        self.advance(Stage::Done);
        self.reached(Stage::Over).await;
    }

    pub(super) fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    pub(super) async fn reached(&self, stage: Stage) {
        // The sender lives as long as `self`.
        let _ = self.stage.subscribe().wait_for(|now| *now >= stage).await;
    }
}

/// An id in the form of those of Lambda: a UUID.
fn invocation_id() -> String {
    uuid(&unique_id())
}

/// 32 hexadecimal digits, grouped as a UUID.
pub(crate) fn uuid(digits: &str) -> String {
    let mut text = String::with_capacity(36);
    for (index, digit) in digits.chars().enumerate() {
        if matches!(index, 8 | 12 | 16 | 20) {
            text.push('-');
        }
        text.push(digit);
    }
    text
}

/// How a process is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It has not asked for an event yet.
    Starting,
    /// It has.
    Up,
    /// It has ended, and why.
    Gone(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Run,
    Terminate,
    Kill,
}

#[derive(Debug, Default)]
struct Slot {
    offered: Option<Arc<Invocation>>,
    current: Option<Arc<Invocation>>,
}

/// One process of a function.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) id: String,
    pub(super) pool: Arc<Pool>,
    /// The one tenant that it works for, if its function keeps tenants apart.
    pub(super) tenant: Option<String>,
    slot: Mutex<Slot>,
    offered: Notify,
    phase: watch::Sender<Phase>,
    stop: watch::Sender<Stop>,
    idle_since: Mutex<Instant>,
    init_error: Mutex<Option<String>>,
    tail: Mutex<VecDeque<String>>,
    /// Its process, and what that was given.
    process: OnceLock<(u32, BTreeMap<String, String>)>,
}

impl Instance {
    /// Starts a process and registers it.
    pub(super) fn start(
        pool: &Arc<Pool>,
        tenant: Option<&str>,
        shared: &Arc<Shared>,
    ) -> io::Result<Arc<Self>> {
        let instance = Arc::new(Self {
            id: unique_id(),
            pool: Arc::clone(pool),
            tenant: tenant.map(str::to_owned),
            slot: Mutex::default(),
            offered: Notify::new(),
            phase: watch::channel(Phase::Starting).0,
            stop: watch::channel(Stop::Run).0,
            idle_since: Mutex::new(Instant::now()),
            init_error: Mutex::default(),
            tail: Mutex::default(),
            process: OnceLock::new(),
        });
        lock(&shared.instances).insert(instance.id.clone(), Arc::clone(&instance));
        let mut command = command(pool, shared, &instance.id);
        match command.spawn() {
            Ok(child) => {
                let text = |text: &OsStr| text.to_string_lossy().into_owned();
                let given = command.as_std().get_envs();
                let given = given.filter_map(|(name, value)| Some((text(name), text(value?)))).collect();
                if let Some(pid) = child.id() {
                    let _ = instance.process.set((pid, given));
                }
                tokio::spawn(Arc::clone(&instance).supervise(child, Arc::clone(shared)));
                Ok(instance)
            }
            Err(error) => {
                lock(&shared.instances).remove(&instance.id);
                Err(error)
            }
        }
    }

    async fn supervise(self: Arc<Self>, mut child: Child, shared: Arc<Shared>) {
        let readers = [
            child.stdout.take().map(|out| tokio::spawn(Arc::clone(&self).read_lines(out))),
            child.stderr.take().map(|out| tokio::spawn(Arc::clone(&self).read_lines(out))),
        ];
        let mut stop = self.stop.subscribe();
        // It may have been told to stop before this task ran.
        stop.mark_changed();
        let mut kill_at = None;
        let ended = loop {
            let patience = async {
                match kill_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = child.wait() => break ended,
                // The sender lives as long as `self`.
                _ = stop.changed() => match *stop.borrow_and_update() {
                    Stop::Run => {}
                    Stop::Terminate => {
                        terminate(&child);
                        kill_at = Some(Instant::now() + STOP_GRACE);
                    }
                    Stop::Kill => kill(&mut child),
                },
                () = patience => {
                    kill_at = None;
                    kill(&mut child);
                }
            }
        };
        for reader in readers.into_iter().flatten() {
            // A grandchild may hold the pipe open; its words are not waited for.
            let _ = tokio::time::timeout(LAST_WORDS, reader).await;
        }
        let how = match ended {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let mut reason = lock(&self.init_error).take().unwrap_or(how);
        for line in lock(&self.tail).iter() {
            reason.push_str("\n  ");
            reason.push_str(line);
        }
        lock(&shared.instances).remove(&self.id);
        self.pool.gone(&self);
        self.phase.send_replace(Phase::Gone(reason));
    }

    async fn read_lines(self: Arc<Self>, output: impl AsyncRead + Unpin) {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line).await, Ok(read) if read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            self.pool.log(&text);
            let mut tail = lock(&self.tail);
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(text);
            line.clear();
        }
    }

    /// Gives the process its next invocation, for when it asks.
    pub(super) fn offer(&self, invocation: Arc<Invocation>) {
        lock(&self.slot).offered = Some(invocation);
        self.offered.notify_one();
    }

    /// Takes an offer back. False if the process has it already.
    pub(super) fn withdraw(&self) -> bool {
        lock(&self.slot).offered.take().is_some()
    }

    /// The process asks for its next invocation.
    pub(super) async fn next(&self) -> Arc<Invocation> {
        self.phase.send_if_modified(|phase| {
            let first = *phase == Phase::Starting;
            if first {
                *phase = Phase::Up;
            }
            first
        });
        loop {
            {
                let mut slot = lock(&self.slot);
                if let Some(invocation) = slot.offered.take() {
                    slot.current = Some(Arc::clone(&invocation));
                    invocation.advance(Stage::Delivered);
                    return invocation;
                }
            }
            self.offered.notified().await;
        }
    }

    /// The invocation that the process is to answer, if this is its id and it has no answer yet.
    /// From then on it is being answered.
    pub(super) fn answer(&self, id: &str) -> Option<Arc<Invocation>> {
        let slot = lock(&self.slot);
        let current = slot.current.as_ref().filter(|current| current.id == id)?;
        if current.stage() >= Stage::Responding {
            return None;
        }
        current.advance(Stage::Responding);
        Some(Arc::clone(current))
    }

    /// The process owes nothing any more.
    pub(super) fn clear(&self) {
        lock(&self.slot).current = None;
        *lock(&self.idle_since) = Instant::now();
    }

    pub(super) fn idle_for(&self) -> Duration {
        lock(&self.idle_since).elapsed()
    }

    /// The process says why it cannot start.
    pub(super) fn init_failed(&self, message: String) {
        *lock(&self.init_error) = Some(message);
        self.terminate();
    }

    pub(super) fn terminate(&self) {
        self.stop.send_if_modified(|stop| {
            let change = *stop == Stop::Run;
            if change {
                *stop = Stop::Terminate;
            }
            change
        });
    }

    pub(super) fn kill(&self) {
        self.stop.send_replace(Stop::Kill);
    }

    pub(super) fn is_up(&self) -> bool {
        *self.phase.borrow() == Phase::Up && *self.stop.borrow() == Stop::Run
    }

    /// Waits until the process asks for its first event, or has ended.
    pub(super) async fn started(&self) -> Phase {
        let mut phase = self.phase.subscribe();
        let reached = phase.wait_for(|phase| *phase != Phase::Starting).await;
        // The sender lives as long as `self`.
        reached.map_or_else(|_| Phase::Gone(String::new()), |phase| phase.clone())
    }

    /// The process's id, and the environment that it was given.
    pub(super) fn process(&self) -> Option<(u32, BTreeMap<String, String>)> {
        self.process.get().cloned()
    }

    /// Waits until the process has ended, and says why.
    pub(super) async fn gone(&self) -> String {
        let mut phase = self.phase.subscribe();
        match phase.wait_for(|phase| matches!(phase, Phase::Gone(_))).await.as_deref() {
            Ok(Phase::Gone(reason)) => reason.clone(),
            _ => String::new(),
        }
    }
}

fn terminate(child: &Child) {
    // Not reaped yet, so the id cannot be another process's.
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended in the meantime, which is what was wanted.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

fn kill(child: &mut Child) {
    // It may have ended in the meantime, which is what was wanted.
    let _ = child.start_kill();
}

/// The process with the environment that Lambda gives it; nothing is inherited but `PATH`, and which
/// certificates this machine trusts beyond the usual: it may be behind a proxy that signs with its own.
fn command(pool: &Pool, shared: &Shared, instance: &str) -> Command {
    let options = &shared.options;
    let function = pool.function();
    let mut command = Command::new(options.binaries.join(&function.binary));
    command.env_clear();
    for name in ["PATH", "SSL_CERT_FILE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
        .envs(&function.environment)
        .envs(&options.environment)
        // With its scheme: host, port and path alone are no address to the runtime client.
        .env("AWS_LAMBDA_RUNTIME_API", format!("http://{}/{instance}", shared.address))
        .env("AWS_LAMBDA_FUNCTION_NAME", &function.name)
        .env("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", function.memory_mb.to_string())
        .env("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST")
        .env("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand")
        .env("AWS_LAMBDA_LOG_GROUP_NAME", format!("/aws/lambda/{}", function.name))
        .env("AWS_LAMBDA_LOG_STREAM_NAME", format!("[$LATEST]{instance}"))
        .env("AWS_REGION", &options.region)
        .env("AWS_DEFAULT_REGION", &options.region)
        .env("LAMBDA_TASK_ROOT", &options.binaries)
        .env("_HANDLER", "bootstrap")
        .env("TZ", ":UTC")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Of its own, so that a Ctrl-C in the terminal reaches the stack alone, which ends in order.
        .process_group(0)
        .kill_on_drop(true);
    if let Some(key) = options.credentials.get(&function.logical_id) {
        command
            .env("AWS_ACCESS_KEY_ID", &key.access_key_id)
            .env("AWS_SECRET_ACCESS_KEY", &key.secret_access_key)
            // A role's keys are temporary and come with one.
            .env("AWS_SESSION_TOKEN", "local");
    }
    command
}
