//! Random sequences of operations by several tenants at once, held against a reference model of what
//! each of them owns: what it must be shown, and what nobody may (I1).
//!
//! A tenant does one thing after another, so its model is exact; the tenants do so at the same time. Each
//! text that one of them hands in holds a word that nobody else ever sends, and no byte of an answer to
//! anybody else may hold it. `SEED=` repeats a run, `STEPS=` makes it longer: hours, if asked.

#![expect(
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, and prints its seed"
)]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use local::serving::system_clock;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::clock::Timestamp;
use shared::env;
use shared::random::entropy;
use tests::{Answer, Options, Stack, Tenant};

/// Steps of each tenant in a run that names no other number.
const STEPS: usize = 120;
/// Names that a careless comparison, or a person, takes for one another.
const TENANTS: [&str; 4] = ["acme1", "acme-1", "acme", "globex"];
/// Ids of documents, the same for every tenant.
const DOCUMENTS: [&str; 5] = ["handbook", "Handbook", "handbook-1", "handbook1", "policy"];
/// What the documents are about: each names its subject, whoever wrote it.
const SUBJECTS: [&str; 5] = ["zanzibar", "quokka", "obelisk", "marzipan", "trombone"];
/// Users; the last speaks for none.
const USERS: [Option<&str>; 4] = [Some("ada"), Some("bob"), Some("ADA"), None];
/// How much of what a tenant did is printed where it fails.
const TAIL: usize = 20;
/// How many requests are looked for in the audit log, and how far back.
const DONE: usize = 200;
const BACK_MS: i64 = 60_000;
/// What each word that is somebody's begins with; 16 digits follow.
const CANARY: &str = "canary";

fn now() -> Timestamp {
    Timestamp::from_millis((system_clock().unix_timestamp_nanos() / 1_000_000) as i64)
}

/// The words in a text that are somebody's.
fn canaries(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices(CANARY).filter_map(|(at, _)| text.get(at..at + CANARY.len() + 16))
}

/// What tenants know of each other: everything but what is in their documents.
#[derive(Default)]
struct Board {
    /// Words and whose they are: no other may see them.
    words: HashMap<String, usize>,
    conversations: Vec<Vec<String>>,
    exports: Vec<Vec<String>>,
}

impl Board {
    /// Something of another tenant's.
    fn foreign(of: &[Vec<String>], me: usize, rng: &mut StdRng) -> Option<String> {
        let others: Vec<&String> =
            of.iter().enumerate().filter(|(n, _)| *n != me).flat_map(|(_, all)| all).collect();
        others.choose(rng).map(|id| (*id).clone())
    }
}

/// A document as the model has it.
#[derive(Clone)]
struct Owned {
    version: u64,
    title: String,
    word: String,
    content: String,
}

/// What a tenant owns and has done.
#[derive(Default)]
struct Model {
    documents: BTreeMap<usize, Owned>,
    /// Words of documents that are gone or were replaced.
    gone: HashSet<String>,
    /// Whose each conversation is.
    conversations: Vec<(String, usize)>,
    exports: Vec<String>,
    /// The latest admitted requests: when, which, and the action that the audit log must show.
    done: VecDeque<(Timestamp, String, &'static str)>,
    /// Requests that are on the bill.
    metered: u64,
}

/// One tenant at work.
struct Actor {
    me: usize,
    tenant: Tenant,
    rng: StdRng,
    board: Arc<Mutex<Board>>,
    model: Model,
    trace: VecDeque<String>,
}

impl Actor {
    /// Sends a request; whatever it answers, nothing of another is in it, and it is no fault.
    async fn send(&mut self, user: usize, method: Method, path: &str, body: &Value) -> Answer {
        self.trace.push_back(format!("{:?} {method} {path} {body}", USERS[user]));
        if self.trace.len() > TAIL {
            self.trace.pop_front();
        }
        let tenant = USERS[user].map_or_else(|| self.tenant.clone(), |user| self.tenant.as_user(user));
        let mut request = tenant.request(method, path);
        if !body.is_null() {
            request = request.json(body);
        }
        let answer = Answer::read(request.send().await.unwrap()).await;
        let shown = format!("{:?}{}", answer.headers, answer.text);
        let board = self.board.lock().unwrap();
        for word in canaries(&shown) {
            let whose = board.words.get(word).copied();
            assert_eq!(whose, Some(self.me), "{} was shown {word}: {shown}", TENANTS[self.me]);
        }
        drop(board);
        assert!(!answer.status.is_server_error(), "{shown}");
        answer
    }

    /// What it did, if it was let in, for the audit log to show.
    fn did(&mut self, answer: &Answer, action: &'static str) {
        let id = answer.headers["x-request-id"].to_str().unwrap().to_owned();
        self.model.done.push_back((now(), id, action));
        if self.model.done.len() > DONE {
            self.model.done.pop_front();
        }
    }

    /// A word of its own. Others watch out for it before it is sent.
    fn word(&self) -> String {
        let word = format!("{CANARY}{:016x}", entropy().random::<u64>());
        self.board.lock().unwrap().words.insert(word.clone(), self.me);
        word
    }

    async fn step(&mut self) {
        let (document, user) =
            (self.rng.random_range(0..DOCUMENTS.len()), self.rng.random_range(0..USERS.len()));
        match self.rng.random_range(0..112) {
            0..18 => self.store(document).await,
            18..24 => self.store_again(document).await,
            24..32 => self.delete(document).await,
            32..40 => self.read(document).await,
            40..48 => self.list().await,
            48..60 => self.search(document).await,
            60..74 => self.ask(document, user).await,
            74..82 => self.go_on(user).await,
            82..88 => self.intrude(user).await,
            88..92 => self.usage().await,
            92..97 => self.audit().await,
            97..100 => self.export().await,
            100..107 => self.conversations(user).await,
            _ => self.forget(user).await,
        }
    }

    async fn store(&mut self, n: usize) {
        let word = self.word();
        let (title, subject) = (format!("Note {}", self.word()), SUBJECTS[n]);
        let content = format!("The {subject} of the vault is {word}.");
        let body = json!({"id": DOCUMENTS[n], "title": title, "content": content});
        let answer =
            self.send(3, Method::POST, "/v1/documents", &body).await.expect_status(StatusCode::CREATED);
        let was = self.model.documents.remove(&n);
        let version = was.as_ref().map_or(1, |was| was.version + 1);
        let stored = &answer.json()["documents"][0];
        assert_eq!((&stored["id"], &stored["version"]), (&json!(DOCUMENTS[n]), &json!(version)), "{stored}");
        assert_eq!((&stored["status"], &stored["chunks"]), (&json!("ready"), &json!(1)), "{stored}");
        self.model.gone.extend(was.map(|was| was.word));
        self.model.documents.insert(n, Owned { version, title, word, content });
        self.model.metered += 1;
        self.did(&answer, "document_ingested");
    }

    /// The same again is the same version.
    async fn store_again(&mut self, n: usize) {
        let Some(owned) = self.model.documents.get(&n).cloned() else { return self.read(n).await };
        let body = json!({"id": DOCUMENTS[n], "title": owned.title, "content": owned.content});
        let answer =
            self.send(3, Method::POST, "/v1/documents", &body).await.expect_status(StatusCode::CREATED);
        assert_eq!(answer.json()["documents"][0]["version"], owned.version, "{}", answer.text);
        self.model.metered += 1;
        self.did(&answer, "document_ingested");
    }

    async fn delete(&mut self, n: usize) {
        let path = format!("/v1/documents/{}", DOCUMENTS[n]);
        let answer = self.send(3, Method::DELETE, &path, &Value::Null).await;
        match self.model.documents.remove(&n) {
            Some(was) => {
                let answer = answer.expect_status(StatusCode::NO_CONTENT);
                self.model.gone.insert(was.word);
                self.did(&answer, "document_deleted");
            }
            None => drop(answer.expect_error(404, "not_found")),
        }
    }

    async fn read(&mut self, n: usize) {
        let path = format!("/v1/documents/{}", DOCUMENTS[n]);
        let answer = self.send(3, Method::GET, &path, &Value::Null).await;
        match self.model.documents.get(&n) {
            Some(owned) => {
                let answer = answer.expect_status(StatusCode::OK);
                let shown = answer.json();
                assert_eq!(
                    (&shown["title"], &shown["version"]),
                    (&json!(owned.title), &json!(owned.version))
                );
                self.did(&answer, "document_read");
            }
            None => drop(answer.expect_error(404, "not_found")),
        }
    }

    /// All of its documents and no other, in pages.
    async fn list(&mut self) {
        let limit = self.rng.random_range(1..=6);
        let (mut shown, mut cursor) = (Vec::new(), String::new());
        loop {
            let path = format!("/v1/documents?limit={limit}{cursor}");
            let answer = self.send(3, Method::GET, &path, &Value::Null).await.expect_status(StatusCode::OK);
            self.did(&answer, "documents_listed");
            let page = answer.json();
            for document in page["documents"].as_array().unwrap() {
                shown.push((
                    document["id"].as_str().unwrap().to_owned(),
                    document["version"].as_u64().unwrap(),
                    document["title"].as_str().unwrap().to_owned(),
                ));
            }
            match page["cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        let mut owned: Vec<_> = self
            .model
            .documents
            .iter()
            .map(|(n, owned)| (DOCUMENTS[*n].to_owned(), owned.version, owned.title.clone()))
            .collect();
        owned.sort();
        assert_eq!(shown, owned);
    }

    /// Every document is found, as it is now; nothing of what is gone.
    async fn search(&mut self, n: usize) {
        let query = json!({"query": format!("the {} of the vault", SUBJECTS[n]), "top_k": 50});
        let answer = self.send(3, Method::POST, "/v1/search", &query).await.expect_status(StatusCode::OK);
        self.model.metered += 1;
        self.did(&answer, "document_access");
        let hits = answer.json()["hits"].as_array().unwrap().clone();
        let found: BTreeSet<&str> = hits.iter().map(|hit| hit["document_id"].as_str().unwrap()).collect();
        let owned: BTreeSet<&str> = self.model.documents.keys().map(|n| DOCUMENTS[*n]).collect();
        assert_eq!(found, owned);
        assert_eq!(hits.len(), owned.len(), "{hits:?}");
        for (n, owned) in &self.model.documents {
            let hit = hits.iter().find(|hit| hit["document_id"] == DOCUMENTS[*n]).unwrap();
            assert_eq!((&hit["text"], &hit["title"]), (&json!(owned.content), &json!(owned.title)));
        }
        let stale = canaries(&answer.text).find(|word| self.model.gone.contains(*word));
        assert_eq!(stale, None, "what is gone is found");
    }

    async fn ask(&mut self, n: usize, user: usize) {
        let message = json!({"message": format!("What is the {} of the vault?", SUBJECTS[n])});
        let answer = self.send(user, Method::POST, "/v1/chat", &message).await.expect_status(StatusCode::OK);
        self.model.metered += 1;
        self.did(&answer, "llm_call");
        let said = answer.json();
        let owned = self.model.documents.get(&n);
        if let Some(owned) = owned {
            assert!(said["response"].as_str().unwrap().contains(&owned.word), "{said}");
        }
        let stale = canaries(&answer.text).find(|word| self.model.gone.contains(*word));
        assert_eq!(stale, None, "what is gone is told: {said}");
        let id = said["conversation_id"].as_str().unwrap().to_owned();
        assert!(self.model.conversations.iter().all(|(known, _)| *known != id), "{id} is not new");
        self.board.lock().unwrap().conversations[self.me].push(id.clone());
        self.model.conversations.push((id, user));
    }

    /// A conversation goes on for its own user alone.
    async fn go_on(&mut self, user: usize) {
        let Some((id, owner)) = self.model.conversations.choose(&mut self.rng).cloned() else { return };
        let body = json!({"message": "And what else?", "conversation_id": id});
        let answer = self.send(user, Method::POST, "/v1/chat", &body).await;
        if user == owner {
            let answer = answer.expect_status(StatusCode::OK);
            assert_eq!(answer.json()["conversation_id"], id.as_str());
            self.model.metered += 1;
            self.did(&answer, "llm_call");
        } else {
            // It was admitted, and its question's vector computed, beside the look for the conversation.
            answer.expect_error(404, "not_found");
            self.model.metered += 1;
        }
    }

    /// All of a user's conversations and no other, the last begun first, in pages; and one of them as it went.
    async fn conversations(&mut self, user: usize) {
        let limit = self.rng.random_range(1..=6);
        let (mut shown, mut cursor) = (Vec::new(), String::new());
        loop {
            let path = format!("/v1/conversations?limit={limit}{cursor}");
            let answer =
                self.send(user, Method::GET, &path, &Value::Null).await.expect_status(StatusCode::OK);
            self.did(&answer, "conversations_listed");
            let page = answer.json();
            let ids = page["conversations"].as_array().unwrap().iter();
            shown.extend(ids.map(|listed| listed["id"].as_str().unwrap().to_owned()));
            match page["cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        let own = self.model.conversations.iter().rev().filter(|(_, owner)| *owner == user);
        let own: Vec<String> = own.map(|(id, _)| id.clone()).collect();
        assert_eq!(shown, own);
        let Some((id, owner)) = self.model.conversations.choose(&mut self.rng).cloned() else { return };
        let answer = self.send(user, Method::GET, &format!("/v1/conversations/{id}"), &Value::Null).await;
        if user == owner {
            let answer = answer.expect_status(StatusCode::OK);
            assert_eq!(answer.json()["id"], id.as_str());
            self.did(&answer, "conversation_read");
        } else {
            answer.expect_error(404, "not_found");
        }
    }

    /// A conversation is deleted by its own user alone.
    async fn forget(&mut self, user: usize) {
        let Some((id, owner)) = self.model.conversations.choose(&mut self.rng).cloned() else { return };
        let answer = self.send(user, Method::DELETE, &format!("/v1/conversations/{id}"), &Value::Null).await;
        if user == owner {
            let answer = answer.expect_status(StatusCode::NO_CONTENT);
            self.model.conversations.retain(|(known, _)| *known != id);
            self.did(&answer, "conversation_deleted");
        } else {
            answer.expect_error(404, "not_found");
        }
    }

    /// What is another tenant's is not there.
    async fn intrude(&mut self, user: usize) {
        let (conversation, export) = {
            let board = self.board.lock().unwrap();
            let conversation = Board::foreign(&board.conversations, self.me, &mut self.rng);
            (conversation, Board::foreign(&board.exports, self.me, &mut self.rng))
        };
        if let Some(id) = conversation {
            let body = json!({"message": "And what else?", "conversation_id": id});
            self.send(user, Method::POST, "/v1/chat", &body).await.expect_error(404, "not_found");
            self.model.metered += 1;
        }
        if let Some(id) = export {
            let path = format!("/v1/audit/exports/{id}");
            self.send(user, Method::GET, &path, &Value::Null).await.expect_error(404, "not_found");
        }
    }

    async fn usage(&mut self) {
        let answer = self.send(3, Method::GET, "/v1/usage", &Value::Null).await.expect_status(StatusCode::OK);
        self.did(&answer, "usage_read");
        let usage = answer.json();
        assert_eq!(usage["tenant_id"], TENANTS[self.me]);
        assert!(usage["requests"].as_u64().unwrap() <= self.model.metered, "{usage}");
    }

    /// Everything that it did is there, under what it did; nothing of another is.
    async fn audit(&mut self) {
        let mut shown = BTreeMap::new();
        let mut cursor = String::new();
        let done = self.model.done.clone();
        let from = now().plus_millis(-BACK_MS);
        loop {
            let path = format!("/v1/audit?limit=100&from={from}{cursor}");
            let answer = self.send(3, Method::GET, &path, &Value::Null).await.expect_status(StatusCode::OK);
            self.did(&answer, "audit_read");
            let page = answer.json();
            for record in page["records"].as_array().unwrap() {
                assert_eq!(record["tenant_id"], TENANTS[self.me], "{record}");
                let (id, action) =
                    (record["request_id"].as_str().unwrap(), record["action"].as_str().unwrap());
                shown.insert((id.to_owned(), action.to_owned()), record.clone());
            }
            match page["cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        // The index of those that wait follows its table; what is older than a few steps is there.
        for (at, id, action) in done.iter().rev().skip(3) {
            let recent = *at >= from.plus_millis(5_000);
            let there = shown.contains_key(&(id.clone(), (*action).to_owned()));
            assert!(!recent || there, "{action} {id} is not on record");
        }
    }

    async fn export(&mut self) {
        let answer = self.send(3, Method::POST, "/v1/audit/exports", &json!({})).await;
        let answer = answer.expect_status(StatusCode::CREATED);
        self.did(&answer, "audit_exported");
        let bundle = answer.json();
        let prefix = format!("tenant={}/", TENANTS[self.me]);
        for object in bundle["manifest"]["objects"].as_array().unwrap() {
            assert!(object["key"].as_str().unwrap().starts_with(&prefix), "{object}");
        }
        for record in bundle["manifest"]["pending"].as_array().unwrap() {
            assert_eq!(record["tenant_id"], TENANTS[self.me], "{record}");
        }
        let id = bundle["export_id"].as_str().unwrap().to_owned();
        self.board.lock().unwrap().exports[self.me].push(id.clone());
        self.model.exports.push(id);
    }

    /// The bill catches up with what was done, exactly.
    async fn settle(&mut self) {
        let began = Instant::now();
        loop {
            let answer =
                self.send(3, Method::GET, "/v1/usage", &Value::Null).await.expect_status(StatusCode::OK);
            let requests = answer.json()["requests"].as_u64().unwrap();
            if requests == self.model.metered {
                break;
            }
            assert!(requests < self.model.metered, "{requests} of {}", self.model.metered);
            assert!(began.elapsed() < Duration::from_secs(60), "{requests} of {}", self.model.metered);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.list().await;
        self.search(0).await;
        self.audit().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_tenant_sees_its_own_and_nothing_else() {
    let seed: u64 = env::parsed("SEED").unwrap_or_else(|_| entropy().random());
    let steps: usize = env::parsed("STEPS").unwrap_or(STEPS);
    eprintln!("SEED={seed} STEPS={steps}");
    let stack = Stack::start_with(Options { no_seed: true, ..Options::default() }).await;
    let limits = json!({"requests_per_minute": 20_000, "max_concurrent": 200,
        "tokens_per_day": 1_000_000_000_u64, "monthly_token_budget": 10_000_000_000_u64});
    let none = || TENANTS.map(|_| Vec::new()).to_vec();
    let board = Board { words: HashMap::new(), conversations: none(), exports: none() };
    let board = Arc::new(Mutex::new(board));
    let mut running = tokio::task::JoinSet::new();
    for (me, id) in TENANTS.into_iter().enumerate() {
        let tenant = stack
            .provision(json!({"tenant_id": id, "tier": "enterprise", "company_name": id, "limits": limits}))
            .await;
        // Each tenant does the same in every run of a seed, however the others interleave.
        let rng = StdRng::seed_from_u64(seed.wrapping_add(me as u64));
        let board = Arc::clone(&board);
        let actor = Actor { me, tenant, rng, board, model: Model::default(), trace: VecDeque::new() };
        running.spawn(run(actor, steps));
    }
    let mut metered = 0;
    while let Some(actor) = running.join_next().await {
        metered += actor.unwrap().model.metered;
    }
    eprintln!("{} steps, {metered} requests billed; every tenant saw its own", steps * TENANTS.len());
    let logs = stack.logs();
    assert_eq!(canaries(&logs).next(), None, "a log holds what a tenant wrote");
    assert!(!logs.contains("isolation_alert"));
    stack.stop().await;
}

async fn run(mut actor: Actor, steps: usize) -> Actor {
    for step in 0..steps {
        let doing = std::panic::AssertUnwindSafe(actor.step());
        if let Err(panic) = futures_util::FutureExt::catch_unwind(doing).await {
            for line in &actor.trace {
                eprintln!("{}: {line}", TENANTS[actor.me]);
            }
            eprintln!("{} failed in step {step}", TENANTS[actor.me]);
            std::panic::resume_unwind(panic);
        }
    }
    actor.settle().await;
    actor
}
