//! The front before DynamoDB: every call of a function or a test passes it on its way to the tables.
//!
//! It reads the call ([`Call`]), lets a rule put a fault upon it, passes it on over kept connections,
//! and remembers what came of it. A call that has come in whole is carried to its end and remembered
//! whether or not its client still waits, as the real service would do it.

use std::future::Future;
use std::io;
use std::net::Ipv4Addr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header, request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::call::{self, Call, PartitionKeys};
use super::faults::{BadRules, Fault, Faults, Known, RuleSet};
use super::journal::{Entry, Journal};
use crate::iam::Callers;
use crate::serving::{PromptStream, system_clock, unique_id};
use crate::template::{STACK, Table};

/// How long a call that hangs gets no answer.
const HANG: Duration = Duration::from_secs(30);
/// How long calls that are still running may go on after the stop signal.
const GRACE: Duration = Duration::from_secs(2);
/// How long to wait where no connection can be accepted, as with too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What concerns one connection and not the call.
const HOP: [HeaderName; 5] =
    [header::CONNECTION, header::CONTENT_LENGTH, header::EXPECT, header::HOST, header::TRANSFER_ENCODING];

/// Kills a function's processes, whatever they do, and returns once they are gone.
pub type Kill = Arc<dyn Fn(String) -> BoxFuture<'static, ()> + Send + Sync>;

/// What the front knows and remembers. The control address steers it.
pub struct Front {
    callers: Arc<Callers>,
    known: Known,
    partition_keys: PartitionKeys,
    kill: Kill,
    faults: Faults,
    journal: Journal,
    written: watch::Sender<u64>,
}

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front").field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl Front {
    /// A front before these tables, without faults. `functions` are the binaries that `kill` knows.
    #[must_use]
    pub fn new(tables: &[Table], callers: Arc<Callers>, functions: Vec<String>, kill: Kill) -> Arc<Self> {
        let partition_keys = tables.iter().map(|t| (t.name.clone(), t.hash_key.name.clone())).collect();
        let tables = tables.iter().map(|table| table.name.clone()).collect();
        Arc::new(Self {
            callers,
            known: Known { tables, functions, prefix: format!("{STACK}-") },
            partition_keys,
            kill,
            faults: Faults::default(),
            journal: Journal::default(),
            written: watch::Sender::new(0),
        })
    }

    /// Puts a rule set in the place of the one in force; answers its seed and how many rules it has.
    ///
    /// # Errors
    /// [`BadRules`], with the old set still in force.
    pub fn set_faults(&self, text: &[u8]) -> Result<Value, BadRules> {
        let rules = RuleSet::parse(text, &self.known)?;
        let summary = json!({ "seed": rules.seed, "rules": rules.len() });
        self.faults.replace(rules);
        Ok(summary)
    }

    /// Ends all faults. A call that hangs already goes on hanging.
    pub fn clear_faults(&self) {
        self.faults.replace(RuleSet::default());
    }

    /// The calls numbered higher than `n`, of the last 100,000.
    #[must_use]
    pub fn calls_after(&self, n: u64) -> Vec<Entry> {
        self.journal.after(n)
    }

    /// Forgets all calls; numbers go on.
    pub fn forget_calls(&self) {
        self.journal.clear();
    }

    /// Changes with every call that may have written something.
    #[must_use]
    pub fn written(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }
}

/// Serves the front until `shutdown` resolves; `behind` is the port of the tables on the loopback address.
///
/// # Errors
/// If no client for the tables can be made.
pub(super) async fn serve(
    listener: TcpListener,
    front: Arc<Front>,
    behind: u16,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    // No proxy: an environment's must not come between the stack and itself.
    let client = reqwest::Client::builder().no_proxy().build().map_err(io::Error::other)?;
    let behind = format!("http://{}:{behind}", Ipv4Addr::LOCALHOST);
    let desk = Arc::new(Desk { front, client, behind });
    let stop = watch::Sender::new(false);
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, Arc::clone(&desk), stop.subscribe()));
                }
                Err(error) => {
                    tracing::warn!("A connection to DynamoDB could not be accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = &mut shutdown => break,
        }
    }
    stop.send_replace(true);
    let all = async { while connections.join_next().await.is_some() {} };
    // Whoever does not end in time is dropped with the set.
    let _ = tokio::time::timeout(GRACE, all).await;
    Ok(())
}

/// Not axum: a handler of it always answers, and here a connection must be able to end without.
async fn connection(stream: TcpStream, desk: Arc<Desk>, mut stop: watch::Receiver<bool>) {
    let stream = PromptStream::new(stream);
    let service = service_fn(|request| Arc::clone(&desk).answer(request));
    let mut serving = pin!(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    let stopped = async {
        // An error means that the sender is gone, and with it the stack.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let served = tokio::select! {
        served = serving.as_mut() => Some(served),
        () = stopped => None,
    };
    let served = match served {
        Some(served) => served,
        None => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        // A client that has gone, or a fault that hung up on it.
        tracing::debug!("A connection to DynamoDB broke off: {error}");
    }
}

/// The connection is to end without an answer.
#[derive(Debug, thiserror::Error)]
#[error("no answer is given")]
struct HangUp;

type Answer = Response<Bytes>;

/// What the client gets to see of a call.
enum Shown {
    Answer(Answer),
    HangUp,
    Hang,
}

struct Desk {
    front: Arc<Front>,
    client: reqwest::Client,
    behind: String,
}

impl Desk {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, HangUp> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| HangUp)?.to_bytes();
        // On its own: this future is dropped when the client goes, but what has begun must end.
        let call = tokio::spawn(async move { self.carry(parts, body).await });
        match call.await {
            Ok(Shown::Answer(answer)) => Ok(answer.map(Full::new)),
            Ok(Shown::Hang) => {
                tokio::time::sleep(HANG).await;
                Err(HangUp)
            }
            Ok(Shown::HangUp) | Err(_) => Err(HangUp),
        }
    }

    /// Carries one call to its end.
    async fn carry(&self, parts: request::Parts, body: Bytes) -> Shown {
        let call = Call::read(&parts.headers, body.clone(), &self.front.partition_keys);
        let caller = match self.caller(&parts, &body, &call) {
            Ok(caller) => caller,
            Err(refused) => {
                let (code, answer) = *refused;
                let Call { operation, tables, keys, .. } = call;
                let entry = Entry { operation, tables, keys, error: Some(code), ..Entry::default() };
                self.front.journal.push(entry);
                return Shown::Answer(answer);
            }
        };
        let fault = self.front.faults.decide(&call);
        let mut entry = Entry { caller, fault: fault.as_ref().map(Fault::name), ..Entry::default() };
        let done = match &fault {
            Some(fault) if refusal(fault, &call).is_some() => None,
            Some(Fault::Hang) => None,
            Some(Fault::KillBefore(function)) => {
                (self.front.kill)(function.clone()).await;
                None
            }
            Some(Fault::Delay(delay)) => {
                tokio::time::sleep(*delay).await;
                Some(self.pass(&parts, &call).await)
            }
            Some(Fault::Swap(partition)) if call.writes() => {
                let (own, answer) = (call.keys.first(), self.pass(&parts, &call).await);
                Some(own.map_or_else(|| answer.clone(), |own| relabelled(&answer, own, partition)))
            }
            Some(Fault::Swap(partition)) => {
                let body = call.keys.first().map(|own| relabel(&call.body, own, partition));
                let elsewhere = Call { body: body.unwrap_or_else(|| call.body.clone()), ..call.clone() };
                Some(self.pass(&parts, &elsewhere).await)
            }
            _ => Some(self.pass(&parts, &call).await),
        };
        if let Some(done) = &done {
            let said: Value = serde_json::from_slice(done.body()).unwrap_or_default();
            entry.consumed = call::consumed(&said);
            entry.error = failed(done).then(|| call::error_code(&said)).flatten();
        }
        let shown = match (&fault, done) {
            (Some(Fault::KillAfter(function)), _) => {
                (self.front.kill)(function.clone()).await;
                Shown::HangUp
            }
            (Some(Fault::LostAnswer | Fault::KillBefore(_)), _) => Shown::HangUp,
            (Some(Fault::LostAnswerError), _) => Shown::Answer(internal_error()),
            (Some(fault), None) => match refusal(fault, &call) {
                Some((code, answer)) => {
                    entry.error = Some(code.to_owned());
                    Shown::Answer(answer)
                }
                None => Shown::Hang,
            },
            (_, Some(done)) => Shown::Answer(done),
            (None, None) => Shown::Hang,
        };
        let Call { operation, tables, keys, .. } = call;
        self.front.journal.push(Entry { operation, tables, keys, ..entry });
        shown
    }

    /// Who makes a call, as IAM names them; or its refusal, if it is not signed or its signer's policies do
    /// not allow it.
    fn caller(
        &self,
        parts: &request::Parts,
        body: &[u8],
        call: &Call,
    ) -> Result<String, Box<(String, Answer)>> {
        let uri = parts.uri.path_and_query().map_or("/", |uri| uri.as_str());
        let (method, headers) = (&parts.method, &parts.headers);
        let signer = self.front.callers.signer("dynamodb", method, uri, headers, body, system_clock());
        let (code, message) = match signer {
            Ok(caller) => match self.front.callers.refused(&caller, &call.intents) {
                Some(message) => ("AccessDeniedException", message),
                None => return Ok(caller.credentials.user_arn.clone()),
            },
            Err(refusal) => (refusal.code(), refusal.to_string()),
        };
        tracing::warn!("DynamoDB refused {}: {message}", call.operation);
        let answer = refused(StatusCode::BAD_REQUEST, code, json!({ "message": message }));
        Err(Box::new((code.to_owned(), answer)))
    }

    /// Passes a call on to the tables.
    async fn pass(&self, parts: &request::Parts, call: &Call) -> Answer {
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut headers = parts.headers.clone();
        HOP.iter().for_each(|name| drop(headers.remove(name)));
        let request = self.client.request(parts.method.clone(), format!("{}{path}", self.behind));
        let answered = async {
            let response = request.headers(headers).body(call.body.clone()).send().await?;
            let (status, mut headers) = (response.status(), response.headers().clone());
            HOP.iter().for_each(|name| drop(headers.remove(name)));
            let mut answer = Response::new(response.bytes().await?);
            *answer.status_mut() = status;
            *answer.headers_mut() = headers;
            Ok::<_, reqwest::Error>(answer)
        };
        let answer = answered.await.unwrap_or_else(|error| {
            tracing::error!("A call could not be passed on to DynamoDB: {error}");
            internal_error()
        });
        if call.writes() {
            self.front.written.send_modify(|calls| *calls = calls.wrapping_add(1));
        }
        answer
    }
}

fn failed(answer: &Answer) -> bool {
    !answer.status().is_success()
}

/// The answer to a call that a fault has kept from being done, with its code; none if there is none.
fn refusal(fault: &Fault, call: &Call) -> Option<(&'static str, Answer)> {
    const BUSY: &str = "Transaction is ongoing for the item";
    let bad_request = |code, fields| Some((code, refused(StatusCode::BAD_REQUEST, code, fields)));
    match fault {
        Fault::Throttle => bad_request(
            "ThrottlingException",
            json!({ "message": "Throughput exceeds the current capacity of your table or index." }),
        ),
        Fault::Error => Some(("InternalServerError", internal_error())),
        Fault::Conflict => bad_request("TransactionConflictException", json!({ "message": BUSY })),
        Fault::CancelConflict => {
            let codes: Vec<&str> =
                (0..call.actions).map(|i| if i == 0 { "TransactionConflict" } else { "None" }).collect();
            let reasons: Vec<Value> = codes
                .iter()
                .map(|code| match *code {
                    "None" => json!({ "Code": code }),
                    code => json!({ "Code": code, "Message": BUSY }),
                })
                .collect();
            let message = format!(
                "Transaction cancelled, please refer cancellation reasons for specific reasons [{}]",
                codes.join(", ")
            );
            // Of all errors the one whose message begins with a capital.
            let fields = json!({ "Message": message, "CancellationReasons": reasons });
            bad_request("TransactionCanceledException", fields)
        }
        Fault::Hang
        | Fault::LostAnswer
        | Fault::LostAnswerError
        | Fault::Delay(_)
        | Fault::KillBefore(_)
        | Fault::KillAfter(_)
        | Fault::Swap(_) => None,
    }
}

/// A body in which `other` stands wherever `own` is the text of an attribute.
fn relabel(body: &[u8], own: &str, other: &str) -> Bytes {
    fn walk(value: &mut Value, own: &str, other: &str) {
        match value {
            Value::Object(fields) => {
                if fields.len() == 1 && fields.get("S").is_some_and(|text| text == own) {
                    fields.insert("S".to_owned(), other.into());
                }
                fields.values_mut().for_each(|value| walk(value, own, other));
            }
            Value::Array(values) => values.iter_mut().for_each(|value| walk(value, own, other)),
            _ => {}
        }
    }
    let mut value: Value = serde_json::from_slice(body).unwrap_or_default();
    walk(&mut value, own, other);
    value.to_string().into()
}

fn relabelled(answer: &Answer, own: &str, other: &str) -> Answer {
    let mut swapped = Response::new(relabel(answer.body(), own, other));
    *swapped.status_mut() = answer.status();
    *swapped.headers_mut() = answer.headers().clone();
    // It is that of the body before.
    swapped.headers_mut().remove("x-amz-crc32");
    swapped
}

fn internal_error() -> Answer {
    let fields = json!({ "message": "The request processing has failed because of an unknown error." });
    refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", fields)
}

/// An error in the form of DynamoDB's own.
fn refused(status: StatusCode, code: &str, fields: Value) -> Answer {
    let mut body = Map::new();
    body.insert("__type".to_owned(), format!("com.amazonaws.dynamodb.v20120810#{code}").into());
    body.extend(fields.as_object().cloned().unwrap_or_default());
    let mut answer = Response::new(Bytes::from(Value::Object(body).to_string()));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-amz-json-1.0"));
    if let Ok(id) = HeaderValue::from_str(&unique_id().to_ascii_uppercase()) {
        headers.insert(HeaderName::from_static("x-amzn-requestid"), id);
    }
    answer
}
