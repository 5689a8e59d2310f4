//! The processes of one function.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::instance::{Instance, Invocation, Phase, Stage};
use super::{INIT_TIMEOUT, InvokeError, Shared, lock};
use crate::template::Function;

/// How many lines of a function's output are kept in memory.
const TAIL: usize = 200;
/// After a failed start, the next waits this long, doubled each time.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// How long the last bytes of a response may take to arrive after their process has ended.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// The processes of one function: as many as there are invocations at once, up to a maximum.
#[derive(Debug)]
pub(super) struct Pool {
    function: Function,
    shared: Arc<Shared>,
    /// One for each invocation that may run; the others wait here in order.
    permits: Arc<Semaphore>,
    state: Mutex<State>,
    log: Mutex<Log>,
    /// How long an invocation may take.
    timeout: Mutex<Duration>,
}

#[derive(Debug, Default)]
struct State {
    all: Vec<Arc<Instance>>,
    closed: bool,
    /// How often starting has failed in a row, when it may be tried again, and how it failed.
    failures: u32,
    retry_at: Option<Instant>,
    failure: String,
}

#[derive(Debug)]
struct Log {
    file: File,
    tail: VecDeque<String>,
}

impl Pool {
    pub(super) fn new(function: Function, shared: Arc<Shared>) -> io::Result<Self> {
        let path = shared.options.logs.join(format!("{}.log", function.binary));
        let file = File::options().create(true).append(true).open(path)?;
        // A machine bears fewer processes than an account does.
        let bearable = shared.options.default_concurrency;
        let most = function.reserved_concurrency.map_or(bearable, |reserved| reserved.min(bearable));
        Ok(Self {
            timeout: Mutex::new(function.timeout),
            function,
            shared,
            permits: Arc::new(Semaphore::new(most)),
            state: Mutex::default(),
            log: Mutex::new(Log { file, tail: VecDeque::new() }),
        })
    }

    pub(super) fn function(&self) -> &Function {
        &self.function
    }

    /// How long an invocation may take: what the template says, unless it was set to something else.
    pub(super) fn timeout(&self) -> Duration {
        *lock(&self.timeout)
    }

    /// Sets how long invocations may take that begin from now on.
    pub(super) fn set_timeout(&self, timeout: Duration) {
        *lock(&self.timeout) = timeout;
    }

    /// Takes one invocation from the queue to its end.
    pub(super) async fn run(self: Arc<Self>, invocation: Arc<Invocation>) {
        let Ok(_permit) = Arc::clone(&self.permits).acquire_owned().await else {
            return invocation.reply(Err(InvokeError::Closing));
        };
        loop {
            if invocation.abandoned() {
                return;
            }
            let instance = match self.instance(invocation.tenant.as_deref()).await {
                Ok(instance) => instance,
                Err(error) => return invocation.reply(Err(error)),
            };
            instance.offer(Arc::clone(&invocation));
            tokio::select! {
                () = invocation.reached(Stage::Delivered) => {}
                // It ended before it had the invocation: another takes it.
                _ = instance.gone() => if instance.withdraw() { continue },
                // It has answered its last invocation but does not ask for the next.
                () = tokio::time::sleep(self.timeout()) => if instance.withdraw() {
                    self.shared.idle.remove(&instance);
                    instance.kill();
                    continue;
                },
            }
            self.watch(&instance, &invocation).await;
            invocation.advance(Stage::Over);
            return;
        }
    }

    /// Waits until the process has answered, has ended, or has used up its time.
    async fn watch(&self, instance: &Arc<Instance>, invocation: &Arc<Invocation>) {
        let limit = self.timeout();
        tokio::select! {
            biased;
            () = invocation.reached(Stage::Done) => {}
            reason = instance.gone() => {
                // It may have ended right after it had answered.
                if invocation.stage() == Stage::Responding {
                    let last = invocation.reached(Stage::Done);
                    let _ = tokio::time::timeout(LAST_BYTES, last).await;
                }
                tracing::warn!(function.name = %self.function.name, "Function process ended: {reason}");
                if invocation.stage() < Stage::Done {
                    invocation.reply(Err(InvokeError::Crashed(reason)));
                }
            }
            () = tokio::time::sleep(limit) => {
                tracing::warn!(function.name = %self.function.name, "Function timed out");
                self.shared.idle.remove(instance);
                instance.clear();
                instance.kill();
                invocation.reply(Err(InvokeError::TimedOut(limit)));
                return;
            }
        }
        instance.clear();
        let state = lock(&self.state);
        if instance.is_up() && !state.closed {
            let most = self.shared.options.idle_tenant_processes;
            if let Some(longest) = self.shared.idle.put(Arc::clone(instance), most) {
                longest.terminate();
            }
        }
    }

    /// A process that waits for work, or a new one; of this tenant, if there is one.
    async fn instance(self: &Arc<Self>, tenant: Option<&str>) -> Result<Arc<Instance>, InvokeError> {
        let instance = {
            let mut state = lock(&self.state);
            if state.closed {
                return Err(InvokeError::Closing);
            }
            if let Some(instance) = self.shared.idle.take(self, tenant) {
                return Ok(instance);
            }
            if state.retry_at.is_some_and(|at| Instant::now() < at) {
                return Err(InvokeError::Init(state.failure.clone()));
            }
            match Instance::start(self, tenant, &self.shared) {
                Ok(instance) => {
                    state.all.push(Arc::clone(&instance));
                    instance
                }
                Err(error) => {
                    let path = self.shared.options.binaries.join(&self.function.binary);
                    return Err(state.failed(format!("{}: {error}", path.display())));
                }
            }
        };
        let reason = match tokio::time::timeout(INIT_TIMEOUT, instance.started()).await {
            Ok(Phase::Gone(reason)) => reason,
            Ok(_) => {
                let mut state = lock(&self.state);
                state.failures = 0;
                state.retry_at = None;
                return Ok(instance);
            }
            Err(_) => {
                instance.kill();
                format!("it asked for no event within {INIT_TIMEOUT:?}")
            }
        };
        let mut state = lock(&self.state);
        if state.closed {
            return Err(InvokeError::Closing);
        }
        tracing::error!(function.name = %self.function.name, "Function did not start: {reason}");
        Err(state.failed(reason))
    }

    /// A process has ended.
    pub(super) fn gone(&self, instance: &Arc<Instance>) {
        let mut state = lock(&self.state);
        state.all.retain(|other| !Arc::ptr_eq(other, instance));
        self.shared.idle.remove(instance);
    }

    pub(super) fn kill_all(&self) -> usize {
        let state = lock(&self.state);
        self.shared.idle.remove_all_of(self);
        state.all.iter().for_each(|instance| instance.kill());
        state.all.len()
    }

    pub(super) fn processes(&self) -> Vec<Arc<Instance>> {
        lock(&self.state).all.clone()
    }

    pub(super) fn close(&self) {
        self.permits.close();
        let mut state = lock(&self.state);
        state.closed = true;
        self.shared.idle.remove_all_of(self);
        state.all.iter().for_each(|instance| instance.terminate());
    }

    pub(super) fn size(&self) -> usize {
        lock(&self.state).all.len()
    }

    pub(super) fn log(&self, line: &str) {
        let mut log = lock(&self.log);
        if let Err(error) = writeln!(log.file, "{line}") {
            tracing::warn!(function.name = %self.function.name, "Function output could not be written: {error}");
        }
        if log.tail.len() == TAIL {
            log.tail.pop_front();
        }
        log.tail.push_back(line.to_owned());
    }

    pub(super) fn tail(&self) -> Vec<String> {
        lock(&self.log).tail.iter().cloned().collect()
    }
}

impl State {
    fn failed(&mut self, reason: String) -> InvokeError {
        let backoff = FIRST_BACKOFF.saturating_mul(1 << self.failures.min(10)).min(MAX_BACKOFF);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(Instant::now() + backoff);
        self.failure.clone_from(&reason);
        InvokeError::Init(reason)
    }
}
