//! The control address: what tests and scripts steer a running stack with. Never on the listener of
//! the API.
//!
//! | call, below `/_local` | does |
//! | --- | --- |
//! | `GET /health` | answers |
//! | `POST /functions/{function}/kill` | kills the function's processes in the middle of whatever they do |
//! | `GET /functions/{function}/processes` | the ids of its processes, each with its environment |
//! | `POST /functions/{function}/invoke` | invokes the function with the JSON in the body, for the tenant that the header `x-amz-tenant-id` names, if any; answers its result |
//! | `PUT /functions/{function}/timeout` | sets how many milliseconds the function's invocations may take, from the next one on |
//! | `PUT /decisions` | `{"for": …, "as": …}`, two `Authorization` headers: the gateway answers the first with the decision that it keeps about the second |
//! | `PUT /dynamodb/faults` | puts `{"seed": n, "rules": […]}` in the place of all rules, answers its seed |
//! | `DELETE /dynamodb/faults` | ends all faults |
//! | `GET /dynamodb/calls?after=n` | the calls numbered higher than `n`, oldest first |
//! | `DELETE /dynamodb/calls` | forgets them; numbers go on |
//! | `GET /permissions` | what roles were allowed so far: for each kind of call once its role, the tags of its session, its action, its resource, and what conditions look at |
//! | `GET /qdrant/traces` | where in traces the latest calls of the vector store say to be, oldest first |
//! | `PUT /sts` | steers STS: `{"outage": true}`, `{"lifetime_s": n}`; `{}` ends it |
//! | `GET /sts` | how it is steered, and how many sessions it has given |
//! | `PUT /kms` | steers KMS: `{"outage": true}`; `{}` ends it |
//! | `GET /kms` | how it is steered, and the calls that it has had |
//! | `DELETE /kms/calls` | forgets them |
//! | `GET /queues/{queue}` | what is in a queue that a function is invoked with: bodies, how often each was received, whether it is hidden |
//! | `POST /queues/{queue}` | sends it the body as a message |
//! | `POST /queues/{queue}/unhide` | lets its hidden messages be received at once, as if their time were over |
//!
//! A rule of the faults has a `mode` (`throttle`, `error`, `conflict`, `cancel_conflict`, `hang`,
//! `lost_answer`, `lost_answer_error`, `delay` with `delay_ms`, `kill_before` and `kill_after` with
//! `function`, `swap` with `partition`), and, as it likes, `operation`, `table` (with or without the stack's prefix), `contains`
//! (a part of the request's body), `skip`, `times` and `probability`. The first rule that applies counts.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;

use crate::dynamodb::Front;
use crate::gateway::Poison;
use crate::iam::Callers;
use crate::kms::{self, Kms};
use crate::lambda::{InvokeError, Lambda, MAX_PAYLOAD, WITHOUT_HURRY};
use crate::queues::Queues;
use crate::serving::{self, Traces, system_clock};
use crate::sts::{Steering, Sts};

/// Names the tenant that a function is invoked for.
const TENANT_ID: &str = "x-amz-tenant-id";

/// What is steered.
#[derive(Clone, Debug)]
pub struct Control {
    /// The functions.
    pub lambda: Arc<Lambda>,
    /// The front before the tables.
    pub dynamodb: Arc<Front>,
    /// The sessions of tenants.
    pub sts: Arc<Sts>,
    /// Who may do what, and did.
    pub callers: Arc<Callers>,
    /// The tenants' own keys.
    pub kms: Arc<Kms>,
    /// The decisions that the gateway keeps.
    pub decisions: Poison,
    /// Where in traces the vector store is called.
    pub traces: Traces,
    /// The queues that functions are invoked with.
    pub queues: Arc<Queues>,
}

/// Serves the control address until `shutdown` resolves.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    control: Control,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = Router::new()
        .route("/health", get(async || Json(json!({ "status": "ok" }))))
        .route("/functions/{function}/kill", post(kill))
        .route("/functions/{function}/processes", get(processes))
        .route("/functions/{function}/invoke", post(invoke))
        .route("/functions/{function}/timeout", put(set_timeout))
        .route("/decisions", put(poison))
        .route("/dynamodb/faults", put(set_faults).delete(clear_faults))
        .route("/dynamodb/calls", get(calls).delete(forget_calls))
        .route("/permissions", get(async |State(control): State<Control>| Json(control.callers.deeds())))
        .route("/qdrant/traces", get(traces))
        .route("/sts", get(sts).put(steer_sts))
        .route("/kms", get(kms).put(steer_kms))
        .route("/kms/calls", delete(forget_kms_calls))
        .route("/queues/{queue}", get(queue).post(send))
        .route("/queues/{queue}/unhide", post(unhide))
        // The function's own limit is the one that is to be seen.
        .layer(DefaultBodyLimit::max(MAX_PAYLOAD * 2))
        .with_state(control);
    serving::serve(listener, Router::new().nest("/_local", routes), shutdown).await
}

async fn kill(State(control): State<Control>, Path(function): Path<String>) -> Response {
    Json(json!({ "killed": control.lambda.kill_instances(&function) })).into_response()
}

async fn processes(State(control): State<Control>, Path(function): Path<String>) -> Response {
    Json(control.lambda.environments(&function)).into_response()
}

async fn invoke(
    State(control): State<Control>,
    Path(function): Path<String>,
    headers: HeaderMap,
    payload: Bytes,
) -> Response {
    // As in Lambda's own `Invoke`. What is not text is no tenant's id.
    let tenant = headers.get(TENANT_ID).map(|id| id.to_str().unwrap_or_default());
    match control.lambda.invoke(&function, tenant, payload, WITHOUT_HURRY).await {
        Ok(result) => ([(header::CONTENT_TYPE, "application/json")], result.payload).into_response(),
        Err(error) => {
            let status = match error {
                InvokeError::UnknownFunction(_) => StatusCode::NOT_FOUND,
                InvokeError::RequestTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
                InvokeError::TenantId(_) => StatusCode::BAD_REQUEST,
                _ => StatusCode::BAD_GATEWAY,
            };
            refused(status, &error)
        }
    }
}

async fn set_timeout(
    State(control): State<Control>,
    Path(function): Path<String>,
    Json(ms): Json<u64>,
) -> StatusCode {
    let there = control.lambda.set_timeout(&function, Duration::from_millis(ms));
    if there { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Poisoned {
    r#for: String,
    r#as: String,
}

async fn poison(State(control): State<Control>, Json(poisoned): Json<Poisoned>) -> StatusCode {
    let there = control.decisions.put(&poisoned.r#for, &poisoned.r#as);
    if there { StatusCode::NO_CONTENT } else { StatusCode::NOT_FOUND }
}

async fn set_faults(State(control): State<Control>, rules: Bytes) -> Response {
    match control.dynamodb.set_faults(&rules) {
        Ok(summary) => Json(summary).into_response(),
        Err(error) => refused(StatusCode::BAD_REQUEST, &error),
    }
}

async fn clear_faults(State(control): State<Control>) -> StatusCode {
    control.dynamodb.clear_faults();
    StatusCode::NO_CONTENT
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct After {
    #[serde(default)]
    after: u64,
}

async fn calls(State(control): State<Control>, Query(After { after }): Query<After>) -> Response {
    Json(control.dynamodb.calls_after(after)).into_response()
}

async fn forget_calls(State(control): State<Control>) -> StatusCode {
    control.dynamodb.forget_calls();
    StatusCode::NO_CONTENT
}

async fn traces(State(control): State<Control>) -> Response {
    Json(control.traces.all()).into_response()
}

async fn sts(State(control): State<Control>) -> Response {
    Json(control.sts.steering()).into_response()
}

async fn steer_sts(State(control): State<Control>, Json(steering): Json<Steering>) -> StatusCode {
    control.sts.steer(steering);
    StatusCode::NO_CONTENT
}

async fn kms(State(control): State<Control>) -> Response {
    Json(control.kms.steering()).into_response()
}

async fn steer_kms(State(control): State<Control>, Json(steering): Json<kms::Steering>) -> StatusCode {
    control.kms.steer(steering);
    StatusCode::NO_CONTENT
}

async fn forget_kms_calls(State(control): State<Control>) -> StatusCode {
    control.kms.forget_calls();
    StatusCode::NO_CONTENT
}

async fn queue(State(control): State<Control>, Path(queue): Path<String>) -> Response {
    match control.queues.show(&queue, system_clock()) {
        Ok(messages) => Json(messages).into_response(),
        Err(error) => refused(StatusCode::NOT_FOUND, &error),
    }
}

async fn send(State(control): State<Control>, Path(queue): Path<String>, body: String) -> Response {
    match control.queues.send(&queue, body, system_clock()) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => refused(StatusCode::INTERNAL_SERVER_ERROR, &error),
    }
}

async fn unhide(State(control): State<Control>, Path(queue): Path<String>) -> Response {
    match control.queues.unhide(&queue, system_clock()) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => refused(StatusCode::NOT_FOUND, &error),
    }
}

fn refused(status: StatusCode, error: &dyn std::error::Error) -> Response {
    (status, Json(json!({ "error": error.to_string() }))).into_response()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::dynamodb::Kill;
    use crate::lambda::tests::{function, options, programs};

    #[tokio::test]
    async fn functions_are_invoked_and_killed_and_rules_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        programs(folder.path(), &["fake"]);
        let lambda = Lambda::start(vec![function(20_000)], options(folder.path())).await.unwrap();
        let kill: Kill = Arc::new(|_| Box::pin(std::future::ready(())));
        let front = Front::new(&[], Arc::default(), vec!["fake".to_owned()], kill);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}/_local", listener.local_addr().unwrap());
        let control = Control {
            lambda: Arc::clone(&lambda),
            dynamodb: front,
            decisions: Poison::default(),
            sts: Sts::new(Vec::new(), Arc::default()),
            callers: Arc::default(),
            kms: Kms::open(&folder.path().join("kms.json"), Arc::default()).unwrap(),
            traces: Traces::default(),
            queues: Queues::open(&folder.path().join("queues"), []).unwrap(),
        };
        tokio::spawn(serve(listener, control, std::future::pending()));
        let client = reqwest::Client::new();
        let post = async |path: &str, body: &'static str| {
            let response = client.post(format!("{url}{path}")).body(body).send().await.unwrap();
            (response.status().as_u16(), response.json::<Value>().await.unwrap())
        };

        assert_eq!(client.get(format!("{url}/health")).send().await.unwrap().status(), 200);
        assert_eq!(post("/functions/fake/invoke", r#"{"do":"raw {\"a\":1}"}"#).await, (200, json!({"a": 1})));
        let (status, failure) = post("/functions/fake/invoke", r#"{"do":"fail"}"#).await;
        assert_eq!((status, &failure["error"]), (502, &json!("the function failed: Oops: bad")));
        assert_eq!(post("/functions/nobody/invoke", "{}").await.0, 404);
        let processes = client.get(format!("{url}/functions/fake/processes")).send().await.unwrap();
        let processes: Value = processes.json().await.unwrap();
        let given: Vec<_> = processes.as_object().unwrap().values().collect();
        assert!(given.len() == 1 && given[0]["AWS_LAMBDA_RUNTIME_API"].is_string(), "{processes}");
        let named = client.post(format!("{url}/functions/fake/invoke")).header(TENANT_ID, "acme");
        assert_eq!(named.body("{}").send().await.unwrap().status(), 400);
        assert_eq!(post("/functions/fake/kill", "").await, (200, json!({"killed": 1})));
        assert_eq!(post("/functions/fake/invoke", r#"{"do":"raw 2"}"#).await, (200, json!(2)));

        let put = async |body: &'static str| {
            let response = client.put(format!("{url}/dynamodb/faults")).body(body).send().await.unwrap();
            (response.status().as_u16(), response.json::<Value>().await.unwrap())
        };
        assert_eq!(
            put(r#"{"seed":9,"rules":[{"mode":"hang"}]}"#).await,
            (200, json!({"seed": 9, "rules": 1}))
        );
        let (status, why) = put(r#"{"rules":[{"mode":"hang","table":"nowhere"}]}"#).await;
        assert_eq!((status, &why["error"]), (400, &json!("rules[0]: there is no table `nowhere`")));
        let cleared = client.delete(format!("{url}/dynamodb/faults")).send().await.unwrap();
        assert_eq!(cleared.status(), 204);
        lambda.shutdown().await;
    }
}
