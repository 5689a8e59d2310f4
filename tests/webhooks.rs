//! Tenants are told of their budgets: at each threshold once, signed, and in the end, whatever the receiver
//! does or the function dies of.

#![expect(clippy::indexing_slicing, clippy::expect_used, reason = "a test fails by panicking")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::{Value, json};
use sha2::Sha256;
use tests::{Options, Stack, Tenant, plain_item};
use tokio::net::TcpListener;

/// What a receiver answers.
#[derive(Clone, Debug)]
enum Mood {
    Says(u16),
    Redirects(String),
    Hangs,
}

#[derive(Debug)]
struct Inbox {
    mood: Mood,
    /// Path, signature and body of each request that came.
    came: Vec<(String, String, String)>,
}

/// A tenant's own server.
#[derive(Clone)]
struct Receiver {
    inbox: Arc<Mutex<Inbox>>,
    url: String,
}

impl Receiver {
    async fn start() -> Self {
        let inbox = Arc::new(Mutex::new(Inbox { mood: Mood::Says(204), came: Vec::new() }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook?token=canary-of-the-receiver", listener.local_addr().unwrap());
        let routes = Router::new().fallback(any(take)).with_state(Arc::clone(&inbox));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self { inbox, url }
    }

    fn is(&self, mood: Mood) {
        self.inbox.lock().unwrap().mood = mood;
    }

    fn came(&self) -> Vec<(String, String, String)> {
        self.inbox.lock().unwrap().came.clone()
    }

    /// Period and threshold of each message that came, in order of their names.
    fn told(&self) -> Vec<String> {
        let of = |(_, _, body): &(String, String, String)| {
            let body: Value = serde_json::from_str(body).expect("JSON");
            format!("{} {}", body["period"].as_str().expect("a period"), body["threshold_percent"])
        };
        let mut told: Vec<String> = self.came().iter().map(of).collect();
        told.sort();
        told
    }
}

async fn take(
    State(inbox): State<Arc<Mutex<Inbox>>>,
    uri: Uri,
    headers: HeaderMap,
    body: String,
) -> Response {
    let signature = headers.get("x-bulkhead-signature").and_then(|v| v.to_str().ok()).unwrap_or_default();
    let mood = {
        let mut inbox = inbox.lock().unwrap();
        inbox.came.push((uri.path().to_owned(), signature.to_owned(), body));
        inbox.mood.clone()
    };
    match mood {
        Mood::Says(status) => StatusCode::from_u16(status).unwrap().into_response(),
        Mood::Redirects(to) => (StatusCode::TEMPORARY_REDIRECT, [("location", to)]).into_response(),
        Mood::Hangs => std::future::pending().await,
    }
}

async fn start() -> Stack {
    let parameters = vec![("WebhookReceivers", "loopback".to_owned())];
    Stack::start_with(Options { parameters, ..Options::default() }).await
}

async fn run(stack: &Stack) -> Value {
    stack.invoke("webhooks", json!({})).await
}

/// Runs the function, which may die of it.
async fn try_run(stack: &Stack) -> bool {
    let url = format!("{}/functions/webhooks/invoke", stack.ready()["control_url"].as_str().unwrap());
    let sent = tests::client().post(url).body("{}").send().await.expect("the control address answers");
    sent.status().is_success()
}

/// Names a tenant's receiver, past the route, which takes none of this machine.
async fn listens(stack: &Stack, tenant: &str, url: &str) {
    let key = json!({"tenant_id": {"S": tenant}, "sk": {"S": "CONFIG"}});
    stack.edit("tenants", key, &["webhook_url"], json!({"S": url})).await;
}

async fn set_meter(stack: &Stack, tenant: &str, field: &str, to: u64) {
    stack.edit("meters", json!({"tenant_id": {"S": tenant}}), &[field], json!({"N": to.to_string()})).await;
}

/// A tenant with budgets of 1000 tokens a day and 10,000 a month, of which it has used so many.
async fn with_use(stack: &Stack, id: &str, receiver: &str, day: u64, month: u64) -> Tenant {
    let limits = json!({"tokens_per_day": 1_000, "monthly_token_budget": 10_000});
    let tenant = stack
        .provision(json!({"tenant_id": id, "tier": "starter", "company_name": id, "limits": limits}))
        .await;
    listens(stack, id, receiver).await;
    set_meter(stack, id, "day_tokens", day).await;
    set_meter(stack, id, "month_tokens", month).await;
    tenant
}

async fn messages(stack: &Stack, tenant: &str) -> Vec<Value> {
    stack.items("webhooks", tenant, "HOOK#").await
}

/// As if the time of the next try had come; and, if `old`, that of the last.
async fn let_time_pass(stack: &Stack, tenant: &str, old: bool) {
    for message in messages(stack, tenant).await.iter().filter(|m| m.get("due_at").is_some()) {
        let key = json!({"tenant_id": {"S": tenant}, "sk": {"S": message["sk"]}});
        stack.edit("webhooks", key.clone(), &["due_at"], json!({"N": "1"})).await;
        if old {
            let time = message["time"].as_u64().unwrap() - 86_400_000;
            stack.edit("webhooks", key, &["time"], json!({"N": time.to_string()})).await;
        }
    }
}

/// The actions on record that are about messages.
async fn on_record(stack: &Stack, tenant: &str) -> Vec<String> {
    let events = stack.items("audit", tenant, "EVENT#").await;
    let actions = events.iter().map(|event| event["action"].as_str().unwrap().to_owned());
    actions.filter(|action| action.starts_with("webhook_")).collect()
}

async fn secret(stack: &Stack, tenant: &str) -> String {
    let path = format!("/admin/tenants/{tenant}/webhook-secret");
    let answer = stack.admin(Method::GET, &path, None).await.expect_status(StatusCode::OK).json();
    answer["webhook_secret"].as_str().unwrap().to_owned()
}

/// How many of a header's signatures are by this key over this body.
fn signed_by(key: &str, signature: &str, body: &str) -> usize {
    let (t, signatures) = signature.strip_prefix("t=").unwrap().split_once(',').expect("a signature");
    let mut mac = Hmac::<Sha256>::new_from_slice(key.as_bytes()).unwrap();
    mac.update(format!("{t}.{body}").as_bytes());
    let bytes = |text: &str| hex::decode(text.strip_prefix("v1=").unwrap()).unwrap();
    signatures.split(',').filter(|text| mac.clone().verify_slice(&bytes(text)).is_ok()).count()
}

#[tokio::test]
async fn each_threshold_of_a_day_is_told_once_and_signed() {
    let stack = start().await;
    let receiver = Receiver::start().await;
    let limits = json!({"tokens_per_day": 6_000, "requests_per_minute": 1_000});
    let body = json!({"tenant_id": "shop", "tier": "starter", "company_name": "Shop", "limits": limits});
    let shop = stack.provision(body).await;
    listens(&stack, "shop", &receiver.url).await;
    let key = secret(&stack, "shop").await;
    assert_ne!(key, secret(&stack, "acme").await);

    let mut refused = false;
    for n in 0..80 {
        let answer = shop.chat(json!({"message": format!("How many days? {n}"), "max_tokens": 100})).await;
        refused = answer.status == 429;
        let meter = plain_item(&stack.meter_item("shop").await);
        let used = meter["day_tokens"].as_u64().unwrap();
        run(&stack).await;
        let reached = |percent: u64| used * 100 >= 6_000 * percent || (percent == 100 && refused);
        let wanted: Vec<u64> = [50, 80, 100].into_iter().filter(|percent| reached(*percent)).collect();
        let mut told: Vec<u64> = Vec::new();
        for (path, signature, body) in receiver.came() {
            assert_eq!((path.as_str(), signed_by(&key, &signature, &body)), ("/hook", 1), "{signature}");
            let body: Value = serde_json::from_str(&body).unwrap();
            assert_eq!((&body["type"], &body["tenant_id"]), (&json!("budget.threshold"), &json!("shop")));
            assert_eq!((&body["period"], &body["limit_tokens"]), (&json!("day"), &json!(6_000)));
            told.push(body["threshold_percent"].as_u64().unwrap());
        }
        told.sort_unstable();
        assert_eq!(told, wanted, "at {used} tokens");
        if refused {
            break;
        }
    }
    assert!(refused, "the budget never ended");
    run(&stack).await;
    assert_eq!(receiver.came().len(), 3);
    assert_eq!(on_record(&stack, "shop").await.len(), 4, "the secret was shown, and three were delivered");

    // The operator replaces the deployment's secret: both keys hold, until it is replaced again.
    stack.replace_secret("bulkhead/webhooks/key", "another-root-of-the-keys").await;
    let new = secret(&stack, "shop").await;
    assert_ne!(new, key);
    set_meter(&stack, "shop", "month_tokens", 10_000_000_000).await;
    run(&stack).await;
    let came = receiver.came();
    assert_eq!(came.len(), 6);
    for (_, signature, body) in &came[3..] {
        assert_eq!((signed_by(&key, signature, body), signed_by(&new, signature, body)), (1, 1));
    }
    let logs = stack.logs();
    for word in [&*key, &new, "another-root-of-the-keys", "canary-of-the-receiver", "threshold_percent"] {
        assert!(!logs.contains(word), "{word}");
    }
    assert!(!logs.contains(r#""alert""#));
    stack.stop().await;
}

#[tokio::test]
async fn runs_at_once_and_runs_that_die_tell_each_threshold_once() {
    let stack = start().await;
    let receiver = Receiver::start().await;
    with_use(&stack, "shop", &receiver.url, 1_000, 8_000).await;
    let all = ["day 100", "day 50", "day 80", "month 50", "month 80"];
    tokio::join!(run(&stack), run(&stack), run(&stack), run(&stack));
    assert_eq!(receiver.told(), all);

    // Dead behind the first note, behind the last, behind a try's beginning, before it, and with answers lost.
    for (n, (mode, operation, skip)) in [
        ("kill_after", "PutItem", 0),
        ("kill_after", "PutItem", 4),
        ("kill_before", "UpdateItem", 0),
        ("kill_after", "UpdateItem", 0),
        ("kill_before", "Scan", 0),
        ("lost_answer", "PutItem", 2),
        ("lost_answer", "UpdateItem", 0),
    ]
    .into_iter()
    .enumerate()
    {
        let receiver = Receiver::start().await;
        let id = format!("shop{n}");
        let mut rule =
            json!({"mode": mode, "operation": operation, "table": "webhooks", "skip": skip, "times": 1});
        if mode.starts_with("kill") {
            rule["function"] = "webhooks".into();
        }
        with_use(&stack, &id, &receiver.url, 1_000, 8_000).await;
        stack.dynamodb_faults(json!({"seed": 1, "rules": [rule]})).await;
        let lived = try_run(&stack).await;
        assert_eq!(lived, !mode.starts_with("kill"), "{mode} {operation}");
        stack.clear_dynamodb_faults().await;
        run(&stack).await;
        let_time_pass(&stack, &id, false).await;
        run(&stack).await;
        assert_eq!(receiver.told(), all, "{mode} {operation}");
        let states: Vec<Value> = messages(&stack, &id).await.iter().map(|m| m["state"].clone()).collect();
        assert_eq!(states, vec![json!("delivered"); 5]);
    }

    // Dead between the delivery and writing that down: it comes again, as the same message.
    let receiver = Receiver::start().await;
    with_use(&stack, "twice", &receiver.url, 500, 500).await;
    let rule = json!({"mode": "kill_after", "operation": "PutItem", "table": "audit", "function": "webhooks",
        "times": 1});
    stack.dynamodb_faults(json!({"seed": 1, "rules": [rule]})).await;
    assert!(!try_run(&stack).await);
    stack.clear_dynamodb_faults().await;
    let_time_pass(&stack, "twice", false).await;
    run(&stack).await;
    let came = receiver.came();
    assert_eq!(came.len(), 2);
    assert_eq!(came[0].2, came[1].2);
    stack.stop().await;
}

#[tokio::test]
async fn a_receiver_that_fails_is_tried_again_until_it_answers_or_its_time_is_over() {
    let stack = start().await;
    let receiver = Receiver::start().await;
    with_use(&stack, "shop", &receiver.url, 500, 500).await;
    let only = async |tenant: &str| {
        let messages = messages(&stack, tenant).await;
        assert_eq!(messages.len(), 1);
        messages[0].clone()
    };
    for (n, mood, said) in [
        (1, Mood::Says(503), "HTTP 503"),
        (2, Mood::Says(404), "HTTP 404"),
        (3, Mood::Hangs, "no answer in time"),
        (4, Mood::Redirects("/elsewhere".to_owned()), "HTTP 307"),
        (5, Mood::Redirects("http://169.254.169.254/latest/meta-data".to_owned()), "HTTP 307"),
    ] {
        receiver.is(mood);
        let_time_pass(&stack, "shop", false).await;
        run(&stack).await;
        let message = only("shop").await;
        assert_eq!((&message["last_error"], &message["attempts"]), (&json!(said), &json!(n)));
        assert_eq!(message["state"], "pending");
        // It is not tried again before its time.
        run(&stack).await;
        assert_eq!(receiver.came().len(), n);
    }
    receiver.is(Mood::Says(200));
    let_time_pass(&stack, "shop", false).await;
    run(&stack).await;
    let_time_pass(&stack, "shop", false).await;
    run(&stack).await;
    let came = receiver.came();
    assert_eq!(came.len(), 6);
    assert!(came.iter().all(|(path, _, body)| path == "/hook" && *body == came[0].2), "{came:?}");
    assert_eq!(only("shop").await["state"], "delivered");
    assert_eq!(on_record(&stack, "shop").await, ["webhook_delivered"]);
    assert!(!stack.logs().contains("webhook_given_up"));

    // Gone is an answer.
    let receiver = Receiver::start().await;
    receiver.is(Mood::Says(410));
    with_use(&stack, "gone", &receiver.url, 500, 500).await;
    for _ in 0..2 {
        run(&stack).await;
        let_time_pass(&stack, "gone", false).await;
    }
    assert_eq!((receiver.came().len(), &only("gone").await["state"]), (1, &json!("unwanted")));
    assert_eq!(on_record(&stack, "gone").await, ["webhook_failed"]);

    // Where nobody is, and where nobody may go: given up after a day, which wakes nobody here.
    for (n, (url, said)) in [
        ("http://127.0.0.1:1/", "it cannot be reached"),
        ("http://169.254.169.254/latest/meta-data", "the address is none that may be spoken to"),
        ("https://10.0.0.1/", "the address is none that may be spoken to"),
        ("https://[fd00:ec2::254]/", "the address is none that may be spoken to"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("lost{n}");
        with_use(&stack, &id, url, 500, 500).await;
        run(&stack).await;
        assert_eq!(
            (&only(&id).await["last_error"], &only(&id).await["state"]),
            (&json!(said), &json!("pending"))
        );
        let_time_pass(&stack, &id, true).await;
        run(&stack).await;
        assert_eq!((&only(&id).await["state"], only(&id).await.get("due_at")), (&json!("given_up"), None));
        assert_eq!(on_record(&stack, &id).await, ["webhook_failed"]);
    }
    assert_eq!(stack.logs().matches("could not be told of its budget for a day").count(), 4);
    assert!(!stack.logs().contains("webhook_given_up"));

    // Its address is taken away meanwhile: nobody is told, and nothing is wrong.
    let receiver = Receiver::start().await;
    receiver.is(Mood::Says(500));
    with_use(&stack, "quiet", &receiver.url, 500, 500).await;
    run(&stack).await;
    let remove = json!({
        "Key": {"tenant_id": {"S": "quiet"}, "sk": {"S": "CONFIG"}}, "UpdateExpression": "REMOVE webhook_url",
    });
    stack.dynamodb("UpdateItem", "tenants", remove).await;
    let_time_pass(&stack, "quiet", false).await;
    run(&stack).await;
    assert_eq!((receiver.came().len(), &only("quiet").await["state"]), (1, &json!("dropped")));
    stack.stop().await;
}

#[tokio::test]
async fn a_receiver_that_hangs_holds_up_no_other() {
    let stack = start().await;
    let (slow, quick) = (Receiver::start().await, Receiver::start().await);
    slow.is(Mood::Hangs);
    // Among the slow ones, before and behind them.
    for n in 0..6 {
        with_use(&stack, &format!("shop{n}"), &slow.url, 1_000, 10_000).await;
        with_use(&stack, &format!("other{n}"), &quick.url, 500, 500).await;
    }
    let stack = Arc::new(stack);
    let running = tokio::spawn({
        let stack = Arc::clone(&stack);
        async move { run(&stack).await }
    });
    while quick.came().len() < 6 {
        assert!(!running.is_finished(), "the others waited");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let report = running.await.unwrap();
    assert_eq!((&report["delivered"], &report["failed"]), (&json!(6), &json!(36)), "{report}");
    Arc::into_inner(stack).unwrap().stop().await;
}

#[tokio::test]
async fn a_month_is_told_as_well_and_a_day_that_is_over_is_not() {
    let stack = start().await;
    let receiver = Receiver::start().await;
    // Its meter has not turned since yesterday.
    with_use(&stack, "shop", &receiver.url, 1_000, 4_999).await;
    let meter = plain_item(&stack.meter_item("shop").await);
    let (today, month) = (meter["day"].as_u64().unwrap(), meter["month"].as_u64().unwrap());
    set_meter(&stack, "shop", "day", today - 1).await;
    assert_eq!(run(&stack).await["noted"], 0);
    set_meter(&stack, "shop", "month_tokens", 8_000).await;
    assert_eq!(run(&stack).await["noted"], 2);
    assert_eq!(receiver.told(), ["month 50", "month 80"]);
    let body: Value = serde_json::from_str(&receiver.came()[0].2).unwrap();
    assert_eq!(body["month"].as_str().unwrap().replace('-', ""), month.to_string());
    // And now it turns.
    set_meter(&stack, "shop", "day", today).await;
    set_meter(&stack, "shop", "day_tokens", 500).await;
    run(&stack).await;
    assert_eq!(receiver.told(), ["day 50", "month 50", "month 80"]);
    // A month that is over says nothing either.
    with_use(&stack, "past", &receiver.url, 1_000, 10_000).await;
    set_meter(&stack, "past", "day", today - 1).await;
    set_meter(&stack, "past", "month", month - 1).await;
    assert_eq!(run(&stack).await["noted"], 0);

    // Who names no receiver, or is suspended, is told nothing; later, what is crossed from then on.
    with_use(&stack, "late", &receiver.url, 800, 800).await;
    let config = json!({"tenant_id": {"S": "late"}, "sk": {"S": "CONFIG"}});
    stack.edit("tenants", config.clone(), &["status"], json!({"S": "suspended"})).await;
    assert_eq!(run(&stack).await["noted"], 0);
    stack.edit("tenants", config.clone(), &["status"], json!({"S": "active"})).await;
    let remove = json!({"Key": config, "UpdateExpression": "REMOVE webhook_url"});
    stack.dynamodb("UpdateItem", "tenants", remove).await;
    assert_eq!(run(&stack).await["noted"], 0);
    assert_eq!(messages(&stack, "late").await, Vec::<Value>::new());

    // A meter that cannot be read hides no other.
    stack.edit("meters", json!({"tenant_id": {"S": "late"}}), &["seq"], json!({"S": "x"})).await;
    set_meter(&stack, "shop", "day_tokens", 800).await;
    let report = run(&stack).await;
    assert_eq!((&report["unread"], &report["delivered"]), (&json!(1), &json!(1)), "{report}");
    assert!(stack.logs().contains(r#""alert":"webhooks_unread""#));
    stack.stop().await;
}

#[tokio::test]
async fn only_operators_are_shown_a_tenants_key() {
    let stack = Stack::start().await;
    let acme = stack.tenant("acme");
    acme.get("/admin/tenants/acme/webhook-secret").await.expect_error(401, "invalid_key");
    let path = "/admin/tenants/nobody/webhook-secret";
    stack.admin(Method::GET, path, None).await.expect_error(404, "not_found");
    assert!(secret(&stack, "acme").await.starts_with("whsec_"));
    // Of this machine, a deployment speaks to nobody.
    let receiver = Receiver::start().await;
    with_use(&stack, "shop", &receiver.url, 500, 500).await;
    run(&stack).await;
    assert_eq!(receiver.came().len(), 0);
    let message = messages(&stack, "shop").await[0].clone();
    assert_eq!(message["last_error"], "the address is none that may be spoken to");
    stack.stop().await;
}
