//! What an admission costs, beside a sliding log in a Redis sorted set: the limiter that most would build.
//!
//! `cargo bench --profile dev --bench admission`; rows of Redis are left out where there is no
//! `redis-server`. It measures and judges nothing: the limits themselves are tested elsewhere.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a measurement fails by panicking, and prints what it found"
)]

use std::collections::HashMap;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aws_lambda_events::apigw::ApiGatewayProxyRequestContext;
use redis::aio::MultiplexedConnection;
use serde_json::{Value, json};
use shared::api_key::{ApiKey, Permission, verify};
use shared::aws::ledger::{Along, Ledger};
use shared::aws::meters::MeterStore;
use shared::aws::tenants::TenantStore;
use shared::clock::{Clock, Timestamp};
use shared::error::{ApiError, Code};
use shared::gate::{Books, Gate, Need};
use shared::ledger::Entry;
use shared::limits::Limits;
use shared::meter::{Asker, Meter, Want, Work};
use shared::pricing::Usage;
use shared::scope::{Caller, Decision, Isolation, Presented, RequestNote, TenantScope, VectorToken};
use shared::tenant::{TenantStatus, Tier};
use shared::units::{NanoUsd, Tokens};
use tests::{Options, Stack};

/// Admissions of a row; fewer than the limit of a minute, so that none is refused.
const ADMISSIONS: usize = 4_000;
/// The limit where it must not bind: the highest that can be set.
const AMPLE: u32 = 20_000;
/// The numbers of clients.
const CLIENTS: [usize; 3] = [1, 8, 32];
/// The limit, the attempts and the clients of the bursts.
const BURST: (u32, usize, usize) = (600, 2_000, 64);
/// When the bursts come, in milliseconds.
const BURSTS_AT_MS: [i64; 4] = [0, 59_900, 60_100, 61_100];

/// A sliding log: members are the admissions of the last minute, scored by their time. Each is named
/// after its time and a random number.
const SLIDING_LOG: &str = r"
    local log, now, limit = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
    redis.call('ZREMRANGEBYSCORE', log, '-inf', now - 60)
    local passed = redis.call('ZCARD', log)
    if passed >= limit then return 0 end
    redis.call('ZADD', log, now, now .. math.random())
    redis.call('EXPIRE', log, 120)
    return 1
";

#[derive(Clone, Copy, PartialEq)]
enum Outcome {
    Passed,
    Refused { retry_after_ms: Option<u64> },
    Failed,
}

/// Somebody who asks to be admitted, as an instance of a function does: one request at a time.
enum Client {
    SlidingLog { connection: MultiplexedConnection, key: String, limit: u32, start: (f64, Instant) },
    Bulkhead { gate: Box<Gate>, decision: Arc<HashMap<String, Value>>, now: Clock, settles: bool },
}

impl Client {
    async fn attempt(&mut self, number: usize) -> Outcome {
        match self {
            Self::SlidingLog { connection, key, limit, start } => {
                let now = start.0 + start.1.elapsed().as_secs_f64();
                let script = redis::Script::new(SLIDING_LOG);
                let mut call = script.key(&*key);
                // Six decimals, as a clock of microseconds is written.
                let passed = call.arg(format!("{now:.6}")).arg(*limit).invoke_async::<u32>(connection).await;
                match passed {
                    Ok(1) => Outcome::Passed,
                    Ok(_) => Outcome::Refused { retry_after_ms: Some(60_000) },
                    Err(_) => Outcome::Failed,
                }
            }
            Self::Bulkhead { gate, decision, now, settles } => {
                let mut scope = scope(decision, number, now.now());
                let done = if *settles {
                    Box::pin(admit_and_settle(gate, &mut scope)).await
                } else {
                    gate.admit_read(&mut scope).await
                };
                match done {
                    Ok(()) => Outcome::Passed,
                    Err(error) if error.code == Code::RateLimitExceeded => {
                        Outcome::Refused { retry_after_ms: error.retry_after_ms }
                    }
                    Err(_) => Outcome::Failed,
                }
            }
        }
    }
}

/// All that Bulkhead does for a question, but for asking the model: tokens and money are reserved, then
/// charged, and a record enters the ledger.
async fn admit_and_settle(gate: &Gate, scope: &mut TenantScope) -> Result<(), ApiError> {
    let needs = |_: &TenantScope| Ok(vec![Need { tokens: Tokens(3_000), cost: NanoUsd(20_000_000) }]);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    let (admission, _) = gate.admit(scope, Work::Chat, needs, deadline).await?;
    let usage = Usage { input_tokens: Tokens(1_200), output_tokens: Tokens(300), ..Usage::default() };
    let entry =
        Entry { model: Some(("claude-haiku-4-5".to_owned(), usage)), latency_ms: 900, ..Entry::default() };
    let record = gate.draft(scope, &admission, entry);
    gate.settle(scope, admission, record, Along::default()).await.map(drop)
}

/// What the decisions are about.
const PRESENTED: &str = "Bearer presented";

/// A request of its own, in the scope that API Gateway's context opens.
fn scope(decision: &HashMap<String, Value>, number: usize, now: Timestamp) -> TenantScope {
    let mut context = ApiGatewayProxyRequestContext::default();
    context.request_id = Some(format!("00000000-0000-4000-8000-{number:012}"));
    context.authorizer.fields = decision.clone();
    let headers = http::HeaderMap::from_iter([(http::header::AUTHORIZATION, PRESENTED.parse().unwrap())]);
    let caller = Caller::of(&context, &headers, None, RequestNote::default()).unwrap();
    TenantScope::open(caller, Permission::Chat, Isolation::Off, now).unwrap()
}

/// What was measured: how each attempt ended, and how long it took.
struct Run {
    took: Duration,
    attempts: Vec<(Outcome, Duration)>,
}

impl Run {
    fn count(&self, which: fn(&Outcome) -> bool) -> usize {
        self.attempts.iter().filter(|(outcome, _)| which(outcome)).count()
    }

    fn passed(&self) -> usize {
        self.count(|outcome| *outcome == Outcome::Passed)
    }

    /// In milliseconds.
    fn quantile(&self, q: f64) -> f64 {
        let mut all: Vec<Duration> = self.attempts.iter().map(|(_, took)| *took).collect();
        all.sort_unstable();
        let rank = (all.len() as f64 * q).ceil() as usize;
        all[rank.clamp(1, all.len()) - 1].as_secs_f64() * 1_000.0
    }

    fn print(&self, what: &str, clients: usize) {
        let refused = self.count(|outcome| matches!(outcome, Outcome::Refused { .. }));
        let failed = self.count(|outcome| *outcome == Outcome::Failed);
        println!(
            "{what:<44} {clients:>7} {:>9.0} {:>8.2} {:>8.2} {refused:>8} {failed:>7}",
            self.passed() as f64 / self.took.as_secs_f64(),
            self.quantile(0.5),
            self.quantile(0.99),
        );
    }
}

/// Makes the attempts, numbered from `first` on, as fast as the clients can.
async fn run(clients: Vec<Client>, first: usize, attempts: usize) -> Run {
    let next = Arc::new(AtomicUsize::new(0));
    let start = Arc::new(tokio::sync::Barrier::new(clients.len() + 1));
    let tasks: Vec<_> = (clients.into_iter())
        .map(|mut client| {
            let (next, start) = (Arc::clone(&next), Arc::clone(&start));
            tokio::spawn(async move {
                let mut done = Vec::new();
                start.wait().await;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= attempts {
                        return done;
                    }
                    let began = Instant::now();
                    done.push((client.attempt(first + number).await, began.elapsed()));
                }
            })
        })
        .collect();
    start.wait().await;
    let began = Instant::now();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.unwrap());
    }
    Run { took: began.elapsed(), attempts: all }
}

/// A Redis of its own, ended when it is dropped.
struct Redis {
    child: Child,
    port: u16,
    _directory: tempfile::TempDir,
}

impl Redis {
    /// Starts one; none where there is no `redis-server`.
    async fn start(on_disk: bool) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--dir"]);
        command.arg(directory.path()).stdin(Stdio::null()).stdout(Stdio::null());
        if on_disk {
            command.args(["--appendonly", "yes", "--appendfsync", "always"]);
        }
        let redis = Self { child: command.spawn().ok()?, port, _directory: directory };
        let patience = Instant::now() + Duration::from_secs(10);
        while redis.try_connect().await.is_err() {
            assert!(Instant::now() < patience, "redis-server does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Some(redis)
    }

    async fn try_connect(&self) -> redis::RedisResult<MultiplexedConnection> {
        let client = redis::Client::open(format!("redis://127.0.0.1:{}", self.port))?;
        client.get_multiplexed_async_connection().await
    }

    async fn clients(&self, keys: &[String], limit: u32, start: (f64, Instant)) -> Vec<Client> {
        let mut clients = Vec::new();
        for key in keys {
            let connection = self.try_connect().await.unwrap();
            clients.push(Client::SlidingLog { connection, key: key.clone(), limit, start });
        }
        clients
    }

    async fn memory(&self, key: &str) -> u64 {
        let mut connection = self.try_connect().await.unwrap();
        redis::cmd("MEMORY").arg("USAGE").arg(key).query_async(&mut connection).await.unwrap()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The stack, and where its tables are.
struct Tables {
    stack: Stack,
    access: shared::aws::Access,
    tenants: usize,
}

impl Tables {
    /// A new tenant with that limit: what the authorizer says of it.
    async fn tenant(&mut self, requests_per_minute: u32) -> (String, Arc<HashMap<String, Value>>) {
        self.tenants += 1;
        let tenant_id = format!("tenant-{}", self.tenants);
        let limits = json!({
            "requests_per_minute": requests_per_minute,
            "max_concurrent": 200,
            "tokens_per_day": 1_000_000_000_u64,
            "monthly_token_budget": 10_000_000_000_u64,
        });
        let body = json!({
            "tenant_id": tenant_id, "tier": "enterprise", "company_name": tenant_id, "limits": limits,
        });
        let key: ApiKey = self.stack.provision(body).await.key.parse().unwrap();
        let store = TenantStore::new(&self.access, Stack::table("tenants"));
        let claimed = store.claimed_by(&key).await.unwrap();
        let status = claimed.tenant.as_ref().map(|tenant| tenant.status);
        let verified = verify(&key, claimed.key, status, Clock::system().now()).unwrap();
        let token = VectorToken::new(String::new());
        let decision =
            Decision::new(&verified, Presented::by(PRESENTED), claimed.tenant.unwrap(), token, None).unwrap();
        (tenant_id, Arc::new(decision.to_context().unwrap()))
    }

    fn client(&self, decision: &Arc<HashMap<String, Value>>, now: &Clock, settles: bool) -> Client {
        let meters = MeterStore::new(&self.access, Stack::table("meters"));
        let ledger = Ledger::new(&self.access, Stack::table("audit"));
        let tenants = TenantStore::new(&self.access, Stack::table("tenants"));
        let gate = Box::new(Gate::new(Books::new(meters, ledger, now.clone()), tenants, Isolation::Off));
        Client::Bulkhead { gate, decision: Arc::clone(decision), now: now.clone(), settles }
    }

    /// As many clients, of one tenant or of one each.
    async fn clients(&mut self, clients: usize, one_tenant: bool, settles: bool) -> Vec<Client> {
        let mut made: Vec<Client> = Vec::new();
        let mut decision = self.tenant(AMPLE).await.1;
        for n in 0..clients {
            if n > 0 && !one_tenant {
                decision = self.tenant(AMPLE).await.1;
            }
            made.push(self.client(&decision, &Clock::system(), settles));
        }
        made
    }
}

/// What an item counts for in DynamoDB, in bytes.
/// <https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/CapacityUnitCalculations.html>
fn item_size(attributes: &Value) -> usize {
    let value = |value: &Value| match value.as_object().unwrap().iter().next().unwrap() {
        (kind, map) if kind == "M" => 3 + map.as_object().unwrap().len() + item_size(map),
        (kind, number) if kind == "N" => number.as_str().unwrap().len().div_ceil(2) + 1,
        (_, text) => text.as_str().unwrap().len(),
    };
    attributes.as_object().unwrap().iter().map(|(name, v)| name.len() + value(v)).sum()
}

async fn throughput(tables: &mut Tables, redis: Option<&Redis>, on_disk: Option<&Redis>) {
    println!(
        "{:<44} {:>7} {:>9} {:>8} {:>8} {:>8} {:>7}",
        "", "clients", "passed/s", "p50 ms", "p99 ms", "refused", "failed"
    );
    for one_tenant in [true, false] {
        let whose = if one_tenant { "one tenant" } else { "a tenant each" };
        for clients in CLIENTS {
            for (redis, kind) in [(redis, "in memory"), (on_disk, "each write on disk")] {
                let Some(redis) = redis else { continue };
                let key = |n| format!("{whose}:{clients}:{}", if one_tenant { 0 } else { n });
                let keys: Vec<String> = (0..clients).map(key).collect();
                let start = (Clock::system().now().as_millis() as f64 / 1_000.0, Instant::now());
                let made = redis.clients(&keys, AMPLE, start).await;
                run(made, 0, ADMISSIONS).await.print(&format!("Redis, {kind}; {whose}"), clients);
            }
            for (settles, what) in [(false, "counted"), (true, "admitted and settled")] {
                let made = tables.clients(clients, one_tenant, settles).await;
                run(made, 0, ADMISSIONS).await.print(&format!("Bulkhead, {what}; {whose}"), clients);
            }
        }
    }
}

/// The decision and its effect, without a table.
fn arithmetic() {
    let now = Clock::system().now();
    let limits = Limits { requests_per_minute: u32::MAX, ..Limits::of_tier(Tier::Enterprise) };
    let mut meter = Meter::new(TenantStatus::Active, 1, now);
    let rounds: i64 = 200_000;
    let began = Instant::now();
    for n in 0..rounds {
        let asker = Asker { limits: &limits, epoch: 1, now: now.plus_millis(n) };
        meter.admit(asker, &Want::Read, &[]).unwrap().apply(&mut meter).unwrap();
    }
    let each = began.elapsed().as_secs_f64() * 1e6 / rounds as f64;
    println!("Bulkhead's decision alone, without a table: {each:.2} µs");
}

async fn bursts(tables: &mut Tables, redis: Option<&Redis>) {
    let (limit, attempts, clients) = BURST;
    println!(
        "\n{attempts} attempts by {clients} clients against {limit} a minute, at each of these seconds:"
    );
    let (tenant, decision) = tables.tenant(limit).await;
    let start = Clock::system().now().as_seconds() + 2;
    let mut passed = [Vec::new(), Vec::new()];
    let mut told = None;
    for (n, at_ms) in BURSTS_AT_MS.into_iter().enumerate() {
        let now = Timestamp::from_millis(start * 1_000 + at_ms);
        if let Some(redis) = redis {
            let keys = vec!["burst".to_owned(); clients];
            let start = (now.as_millis() as f64 / 1_000.0, Instant::now());
            let made = redis.clients(&keys, limit, start).await;
            passed[0].push(run(made, n * attempts, attempts).await.passed());
        }
        let clock = Clock::fixed(now);
        let made = (0..clients).map(|_| tables.client(&decision, &clock, false)).collect();
        let done = run(made, n * attempts, attempts).await;
        passed[1].push(done.passed());
        told = told.or(done.attempts.iter().find_map(|(outcome, _)| match outcome {
            Outcome::Refused { retry_after_ms } => *retry_after_ms,
            _ => None,
        }));
    }
    let times = BURSTS_AT_MS.map(|ms| format!("{:>8.1}", ms as f64 / 1_000.0)).concat();
    println!("{:<20}{times}   retry-after of the first refused", "");
    let row = |who: &str, passed: &[usize], told: f64| {
        let counts: String = passed.iter().map(|n| format!("{n:>8}")).collect();
        println!("{who:<20}{counts}   {told:.1} s");
    };
    if redis.is_some() {
        row("Redis", &passed[0], 60.0);
    }
    row("Bulkhead", &passed[1], told.unwrap_or(0) as f64 / 1_000.0);
    println!("\nOne tenant's minute of {limit} admissions takes:");
    if let Some(redis) = redis {
        println!("{:<20}{:>8} bytes of memory", "Redis", redis.memory("burst").await);
    }
    let size = item_size(&tables.stack.meter_item(&tenant).await);
    println!("{:<20}{size:>8} bytes of an item, which holds 61 counts at most", "Bulkhead");
}

#[tokio::main]
async fn main() {
    // `cargo test --benches` passes no `--bench`: nothing is measured then.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let stack = Stack::start_with(Options { no_seed: true, ..Options::default() }).await;
    let access = stack.tables_access().await;
    let mut tables = Tables { stack, access, tenants: 0 };
    let (redis, on_disk) = (Redis::start(false).await, Redis::start(true).await);
    if redis.is_none() {
        println!("There is no `redis-server` here: its rows are left out.");
    }
    Box::pin(throughput(&mut tables, redis.as_ref(), on_disk.as_ref())).await;
    arithmetic();
    Box::pin(bursts(&mut tables, redis.as_ref())).await;
    println!(
        "
Both run on this machine. Redis is asked directly. Bulkhead's tables are the local emulator, over HTTP
and SQLite: its rows show what is done per admission and how it behaves under contention, not how fast
DynamoDB is. `counted` is what the Redis limiter does; `admitted and settled` also holds the limits of
tokens, concurrency and money, and leaves a record in the ledger."
    );
    tables.stack.stop().await;
}
