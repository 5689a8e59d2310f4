//! What questions take, through the gateway of a whole stack, where the model and the embeddings cost no time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use local::template::Template;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tests::{Embeddings, Options, Stack, Tenant};

use crate::{services, setting};

/// The numbers of clients.
const CLIENTS: [usize; 3] = [1, 8, 32];
/// Tenants that ask. The stack keeps 32 processes of tenants at most, so that no more are started anew all
/// the time.
const ASKING: usize = 8;
/// Tenants that there are before others are added.
const FEW: usize = 10;
/// Questions of a conversation.
const TURNS: usize = 5;
/// Requests of one process that its memory is looked at after, and the most that it may have held.
const MEMORY: (usize, u64) = (1_000, 48_000);
/// A clock tick of `/proc/<pid>/stat`: Linux counts a hundred a second for programs, whatever the machine.
const TICK_MS: u64 = 10;
/// What a batch write takes.
const BATCH: usize = 25;

async fn stack(programs: &Path) -> Stack {
    let url = services::start().await;
    let (key, model) = ("some-key".to_owned(), "text-embedding-3-small".to_owned());
    Stack::start_with(Options {
        no_seed: true,
        functions: Some(programs.to_owned()),
        model_url: Some(url.clone()),
        embeddings: Some(Embeddings { url, key, model, dimensions: services::DIMENSIONS }),
        ..Options::default()
    })
    .await
}

/// A tenant whose limits do not bind, with a document.
async fn tenant(stack: &Stack, id: &str) -> Tenant {
    let limits = json!({
        "requests_per_minute": 20_000, "max_concurrent": 200,
        "tokens_per_day": 10_000_000_000_u64, "monthly_token_budget": 100_000_000_000_u64,
    });
    let body = json!({"tenant_id": id, "tier": "enterprise", "company_name": id, "limits": limits});
    let tenant = stack.provision(body).await;
    let page: String = (1..=40)
        .map(|n| format!("Section {n}. Staff of grade {n} have {} days of paid annual leave, and ask for them in writing.\n\n", 20 + n))
        .collect();
    tenant.store("handbook", "Staff handbook", &page).await;
    tenant
}

/// Peak memory of one process over many requests.
pub async fn memory(programs: &Path, template: &Template) {
    let (requests, limit) = MEMORY;
    let stack = stack(programs).await;
    let tenant = tenant(&stack, "memory").await;
    run(std::slice::from_ref(&tenant), 1, requests).await;
    let function = template.functions.iter().find(|function| function.binary == "chat").unwrap();
    let most = stack.most_memory(&function.binary);
    let (held, processes) = (most.iter().max().unwrap(), most.len());
    let verdict = if *held > limit { "over" } else { "" };
    println!(
        "\nMemory of chat at its peak (VmHWM), {requests} requests of {processes} process: {held} kB   limit {limit}   {verdict}"
    );
    stack.stop().await;
}

/// How long each request took, and all of them.
struct Run {
    took: Duration,
    each: Vec<Duration>,
}

impl Run {
    /// In milliseconds.
    fn quantile(&self, q: f64) -> f64 {
        let rank = (self.each.len() as f64 * q).ceil() as usize;
        self.each[rank.clamp(1, self.each.len()) - 1].as_secs_f64() * 1_000.0
    }
}

/// Asks so many questions in conversations, as fast as the clients can, each of one of the tenants.
async fn run(tenants: &[Tenant], clients: usize, requests: usize) -> Run {
    let next = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let (next, tenant) = (Arc::clone(&next), tenants[client % tenants.len()].clone());
            tokio::spawn(async move {
                let (mut each, mut conversation) = (Vec::new(), None);
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= requests {
                        return each;
                    }
                    if each.len() % TURNS == 0 {
                        conversation = None;
                    }
                    let mut body = json!({"message": format!("How much leave do staff of grade {} have?", number % 40 + 1)});
                    if let Some(id) = conversation.take() {
                        body["conversation_id"] = id;
                    }
                    let began = Instant::now();
                    let answer = tenant.chat(body).await;
                    each.push(began.elapsed());
                    conversation = Some(answer.expect_status(StatusCode::OK).json()["conversation_id"].take());
                }
            })
        })
        .collect();
    let mut each = Vec::new();
    for task in tasks {
        each.extend(task.await.unwrap());
    }
    each.sort_unstable();
    Run { took: began.elapsed(), each }
}

/// The processor time of each process of a function so far, in milliseconds.
fn cpu(stack: &Stack) -> BTreeMap<(String, u32), u64> {
    let one = |pid: u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        let mut variables = environment.split(|byte| *byte == 0);
        let name = variables.find_map(|pair| pair.strip_prefix(b"AWS_LAMBDA_FUNCTION_NAME="))?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // After the name, which may hold anything: state is the third field, utime and stime the 14th and 15th.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
        Some(((String::from_utf8_lossy(name).into_owned(), pid), ticks * TICK_MS))
    };
    stack.children().into_iter().filter_map(one).collect()
}

/// Waits until the records of what was done are exported, so that what that takes is counted.
async fn quiet(stack: &Stack) {
    let (mut calls, mut still) = (usize::MAX, 0);
    while still < 3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = stack.dynamodb_calls().await.len();
        still = if now == calls { still + 1 } else { 0 };
        calls = now;
    }
}

/// What the tables had to do, per request.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    calls: f64,
    write_units: f64,
    read_units: f64,
}

impl Work {
    fn add(&mut self, call: &Value, requests: usize) {
        let units: f64 = call["consumed"].as_object().unwrap().values().filter_map(Value::as_f64).sum();
        self.calls += 1.0 / requests as f64;
        let operation = call["operation"].as_str().unwrap();
        let writes = operation.contains("Write")
            || operation.contains("Update")
            || operation.contains("Put")
            || operation.contains("Delete");
        *(if writes { &mut self.write_units } else { &mut self.read_units }) += units / requests as f64;
    }
}

/// The role that a call was made in: a function's own, or the one that it assumes for a tenant.
fn role(call: &Value) -> &str {
    call["caller"].as_str().unwrap().split('/').nth(1).unwrap_or("an operator")
}

/// Whether a role is of the function that answers.
fn is_chat(role: &str) -> bool {
    role.to_ascii_lowercase().contains("chat")
}

/// What is in a file or folder, in bytes.
fn bytes(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

async fn row(stack: &Stack, tenants: &[Tenant], all: usize, clients: usize, requests: usize, details: bool) {
    // Processes and decisions are there before anything is counted.
    run(tenants, clients, clients * TURNS).await;
    quiet(stack).await;
    stack.forget_dynamodb_calls().await;
    let logs = stack.data().join("logs");
    let log = |program: &str| bytes(&logs.join(format!("{program}.log")));
    let (before, logged) = (cpu(stack), [log("chat"), log("audit_export")]);
    let done = run(tenants, clients, requests).await;
    quiet(stack).await;
    let mut per_function: BTreeMap<String, f64> = BTreeMap::new();
    for ((name, pid), after) in cpu(stack) {
        let spent = after - before.get(&(name.clone(), pid)).copied().unwrap_or_default();
        *per_function.entry(name).or_default() += spent as f64 / requests as f64;
    }
    let calls = stack.dynamodb_calls().await;
    let (mut chat, mut together) = (Work::default(), Work::default());
    for call in &calls {
        together.add(call, requests);
        if is_chat(role(call)) {
            chat.add(call, requests);
        }
    }
    let spent = |name: &str| per_function.get(&format!("bulkhead-{name}")).copied().unwrap_or_default();
    let others: f64 = per_function.values().sum::<f64>() - spent("chat") - spent("audit-export");
    println!(
        "{all:>7} {clients:>7} {:>9.0} {:>7.1} {:>7.1}  {:>7.2} {:>7.2} {others:>7.2}  {:>7.2} {:>6.2} {:>6.2}  {:>7.2} {:>6.2} {:>6.2}",
        requests as f64 / done.took.as_secs_f64(),
        done.quantile(0.5),
        done.quantile(0.99),
        spent("chat"),
        spent("audit-export"),
        chat.calls,
        chat.write_units,
        chat.read_units,
        together.calls,
        together.write_units,
        together.read_units,
    );
    if details {
        explain(&calls, requests);
        let [chat, export] = [(log("chat"), logged[0]), (log("audit_export"), logged[1])]
            .map(|(after, before)| (after - before) as f64 / requests as f64);
        println!("Logs, in bytes of a request: {chat:.0} of chat, {export:.0} of the export\n");
    }
}

/// Which calls a request makes.
fn explain(calls: &[Value], requests: usize) {
    let mut kinds: BTreeMap<(&str, &str, String), Work> = BTreeMap::new();
    for call in calls {
        let tables = call["tables"].as_array().unwrap().iter().filter_map(Value::as_str);
        let tables: Vec<&str> = tables.map(|table| table.trim_start_matches("bulkhead-")).collect();
        let kind = (role(call), call["operation"].as_str().unwrap(), tables.join(", "));
        kinds.entry(kind).or_default().add(call, requests);
    }
    println!("\n  {:<28} {:<20} {:<22} {:>7} {:>7} {:>7}", "of a request", "", "", "calls", "WRU", "RRU");
    for ((role, operation, tables), work) in kinds.into_iter().filter(|(_, work)| work.calls >= 0.005) {
        println!(
            "  {role:<28} {operation:<20} {tables:<22} {:>7.2} {:>7.2} {:>7.2}",
            work.calls, work.write_units, work.read_units
        );
    }
    println!();
}

/// Adds tenants to the tables: what the tables hold of the first one, under other names. Their records in the
/// ledger are left out, which the export would take for new ones, and collections, which are the vector store's.
async fn fill(stack: &Stack, template: &Template, like: &str, from: usize, to: usize) {
    let mut known: Vec<(&str, Value)> = Vec::new();
    let tables = template.tables.iter().filter(|table| table.hash_key.name == "tenant_id");
    for table in tables.filter(|table| table.name != Stack::table("audit")) {
        let query = json!({
            "KeyConditionExpression": "tenant_id = :t", "ExpressionAttributeValues": {":t": {"S": like}},
            "ConsistentRead": true, "Limit": 20,
        });
        let name = table.name.trim_start_matches("bulkhead-");
        let items = stack.dynamodb("Query", name, query).await["Items"].take();
        known.extend(items.as_array().unwrap().iter().map(|item| (&*table.name, item.clone())));
    }
    let mut puts = Vec::new();
    for n in from..to {
        for (table, item) in &known {
            let mut item = item.clone();
            item["tenant_id"] = json!({"S": format!("filler-{n}")});
            puts.push((*table, json!({"PutRequest": {"Item": item}})));
        }
    }
    for batch in puts.chunks(BATCH) {
        let mut requests: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
        batch.iter().for_each(|(table, put)| requests.entry(table).or_default().push(put));
        let target = "DynamoDB_20120810.BatchWriteItem";
        let written =
            stack.signed_by(&stack.operator(), "dynamodb", target, &json!({"RequestItems": requests})).await;
        assert!(written.status.is_success(), "{}", written.text);
    }
    println!("{} items of {} more tenants are in the tables now", puts.len(), to - from);
}

pub async fn measure(programs: &Path, template: &Template) {
    let (requests, many) = (setting("REQUESTS", 2_000), setting("TENANTS", 10_000));
    let stack = stack(programs).await;
    let mut tenants = Vec::new();
    for n in 0..FEW {
        tenants.push(tenant(&stack, &format!("tenant-{n}")).await);
    }
    let asking = &tenants[..ASKING];
    println!(
        "\nQuestions in conversations of {TURNS}, {requests} a row, of {ASKING} tenants; the model and the embeddings answer at once.
CPU is of all the processes of a function, the calls are of DynamoDB; both per request, with the export of its records.
{:>7} {:>7} {:>9} {:>7} {:>7}  {:>23}  {:>21}  {:>21}
{:>7} {:>7} {:>9} {:>7} {:>7}  {:>7} {:>7} {:>7}  {:>7} {:>6} {:>6}  {:>7} {:>6} {:>6}",
        "", "", "", "", "", "CPU ms", "of chat", "of all",
        "tenants", "clients", "requests/s", "p50 ms", "p99 ms", "chat", "export", "others", "calls", "WRU", "RRU", "calls", "WRU", "RRU"
    );
    for all in [FEW, many] {
        if all > FEW {
            fill(&stack, template, &tenants[0].id, FEW, all).await;
            quiet(&stack).await;
        }
        for clients in CLIENTS {
            row(&stack, asking, all, clients, requests, all == FEW && clients == 1).await;
        }
    }
    println!(
        "The stack runs on this machine beside the functions: its gateway, tables and vector store take most of the time,
and 16 processes of a function at most answer at once."
    );
    stack.stop().await;
}
