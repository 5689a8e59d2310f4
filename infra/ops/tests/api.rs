//! The commands that ask the API, against a server that checks their signatures and answers as the
//! contract says: what they send, what they print, and how they exit.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use local::serving::system_clock;
use local::sigv4::{self, Credentials, GATEWAY};
use serde_json::{Value, json};

const SECRET: &str = "secret/of+an-operator";

/// A request as it came.
#[derive(Clone, Debug)]
struct Seen {
    line: String,
    body: Value,
    headers: HeaderMap,
}

/// A status, a text, and the cursor of the next page.
type Text = (u16, String, Option<&'static str>);

#[derive(Clone, Debug)]
struct Api {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    answers: Arc<Mutex<VecDeque<Text>>>,
}

impl Api {
    /// A server that gives these answers in their order.
    fn answering(answers: impl IntoIterator<Item = (u16, Value)>) -> Self {
        Self::with_texts(answers.into_iter().map(|(status, body)| (status, body.to_string(), None)))
    }

    fn with_texts(answers: impl IntoIterator<Item = Text>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let api = Self {
            // As API Gateway has it: the stage comes first, and is signed along.
            url: format!("http://{}/live", listener.local_addr().unwrap()),
            seen: Arc::default(),
            answers: Arc::new(Mutex::new(answers.into_iter().collect())),
        };
        let served = Router::new().fallback(answer).with_state(api.clone());
        std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, served).await.unwrap();
            });
        });
        api
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command
            .env_clear()
            .args(arguments)
            .env("BULKHEAD_ENDPOINT", &self.url)
            .env("AWS_ACCESS_KEY_ID", "operator")
            .env("AWS_SECRET_ACCESS_KEY", SECRET)
            .env("AWS_REGION", "eu-west-1");
        command
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        Ended::of(&mut self.command(arguments))
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn lines(&self) -> Vec<String> {
        self.seen().into_iter().map(|seen| seen.line).collect()
    }
}

async fn answer(
    State(api): State<Api>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let operator = Credentials {
        access_key_id: "operator".into(),
        secret_access_key: SECRET.into(),
        region: "eu-west-1".into(),
        user_arn: String::new(),
    };
    let path = uri.path_and_query().unwrap().as_str();
    let signer = sigv4::verify(GATEWAY, [&operator], &method, path, &headers, &body, system_clock());
    if let Err(refusal) = signer {
        return (StatusCode::IM_A_TEAPOT, refusal.to_string()).into_response();
    }
    let line = format!("{method} {path}");
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    api.seen.lock().unwrap().push(Seen { line, body, headers });
    let next = api.answers.lock().unwrap().pop_front();
    let (status, text, cursor) = next.unwrap_or((500, "nothing more to answer".into(), None));
    let mut response = (StatusCode::from_u16(status).unwrap(), text).into_response();
    if let Some(cursor) = cursor {
        response.headers_mut().insert("x-next-cursor", cursor.parse().unwrap());
    }
    response
}

/// How a run ended.
#[derive(Debug)]
struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Ended {
    fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }

    #[track_caller]
    fn well(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }
}

fn tenant(id: &str) -> Value {
    json!({
        "tenant_id": id, "tier": "professional", "status": "active", "company_name": "Acme\nCorporation",
        "cell": "default", "created_at": "2026-11-18T22:00:00.000Z",
        "limits": {"max_concurrent": 20, "allowed_models": ["a", "b"]}, "overrides": {},
    })
}

#[test]
fn all_pages_of_a_list_are_shown() {
    let pages = || {
        [
            (200, json!({"tenants": [tenant("acme")], "cursor": "ac+me=&"})),
            (200, json!({"tenants": [tenant("globex")]})),
        ]
    };
    let api = Api::answering(pages());
    let out = api.run(&["tenants", "list"]).well();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 3, "{out}");
    assert!(lines[0].starts_with("tenant  tier"), "{out}");
    assert!(lines[1].starts_with("acme    professional  active  default"), "{out}");
    assert!(lines[1].ends_with(r"Acme\nCorporation"), "{out}");
    assert_eq!(
        api.lines(),
        ["GET /live/admin/tenants?limit=100", "GET /live/admin/tenants?limit=100&cursor=ac%2Bme%3D%26"]
    );
    let out = Api::answering(pages()).run(&["--json"].map(|json| ["tenants", "list", json]).concat()).well();
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(shown, json!({"tenants": [tenant("acme"), tenant("globex")]}));
}

#[test]
fn a_tenant_is_shown_for_a_person_and_as_it_is() {
    let api = Api::answering([(200, tenant("acme")), (200, tenant("acme"))]);
    let out = api.run(&["tenants", "show", "acme"]).well();
    assert!(out.starts_with("tenant_id              acme\nstatus                 active\n"), "{out}");
    assert!(out.contains("limits.allowed_models  a, b\n"), "{out}");
    let out = api.run(&["tenants", "show", "acme", "--json"]).well();
    assert_eq!(out, format!("{}\n", tenant("acme")));
    assert_eq!(api.lines(), ["GET /live/admin/tenants/acme"; 2]);
    let secret = Api::answering([(200, json!({"tenant_id": "acme", "webhook_secret": "whsec"}))]);
    let out = secret.run(&["tenants", "webhook-secret", "acme"]).well();
    assert_eq!(out, "tenant_id       acme\nwebhook_secret  whsec\n");
    assert_eq!(secret.lines(), ["GET /live/admin/tenants/acme/webhook-secret"]);
}

#[test]
fn a_new_key_is_shown_with_a_warning() {
    let api = Api::answering([
        (201, json!({"tenant_id": "acme", "status": "active", "key_id": "k1", "api_key": "bk_pro_1"})),
        (201, json!({"key_id": "k2", "api_key": "bk_pro_2", "scopes": ["chat"]})),
        (201, json!({"key_id": "k3", "api_key": "bk_pro_3", "scopes": ["chat"]})),
    ]);
    let created = api.run(&[
        "tenants",
        "create",
        "acme",
        "--tier",
        "professional",
        "--company-name",
        "Acme",
        "--limit",
        "max_concurrent=5",
        "--limit",
        "allowed_models=a,b",
        "--instructions",
        "Be kind.",
        "--cell",
        "one",
        "--injection-policy",
        "refuse",
        "--model-account",
        "own",
        "--webhook-url",
        "https://acme.example/",
    ]);
    assert!(created.out.contains("api_key    bk_pro_1\n"), "{created:?}");
    assert!(created.err.contains("shown this once"), "{created:?}");
    let made = api.run(&[
        "keys",
        "create",
        "acme",
        "--name",
        "web",
        "--scope",
        "chat,usage:read",
        "--scope",
        "audit:read",
        "--expires-at",
        "2027-01-01",
        "--cidr",
        "203.0.113.0/24",
        "--cidr",
        "2001:db8::/32",
        "--json",
    ]);
    assert!(made.out.contains("bk_pro_2"), "{made:?}");
    assert!(made.err.contains("shown this once") && !made.err.contains("bk_pro"), "{made:?}");
    api.run(&["keys", "create", "acme"]).well();
    let seen = api.seen();
    assert_eq!(seen[0].line, "POST /live/admin/tenants");
    assert_eq!(
        seen[0].body,
        json!({
            "tenant_id": "acme", "tier": "professional", "company_name": "Acme", "instructions": "Be kind.",
            "cell": "one", "injection_policy": "refuse", "model_account": "own",
            "webhook_url": "https://acme.example/",
            "limits": {"max_concurrent": 5, "allowed_models": ["a", "b"]},
        })
    );
    assert_eq!(seen[1].line, "POST /live/admin/tenants/acme/keys");
    assert_eq!(
        seen[1].body,
        json!({
            "name": "web", "scopes": ["chat", "usage:read", "audit:read"],
            "expires_at": "2027-01-01T00:00:00.000Z",
            "allowed_cidrs": ["203.0.113.0/24", "2001:db8::/32"],
        })
    );
    assert_eq!(seen[2].body, json!({}), "what is not said is the API's to choose");
}

#[test]
fn a_tenant_is_changed_in_what_is_named() {
    for (arguments, body) in [
        (vec!["suspend", "acme"], json!({"status": "suspended"})),
        (vec!["restore", "acme"], json!({"status": "active"})),
        (vec!["set", "acme", "--tier", "enterprise"], json!({"tier": "enterprise"})),
        (
            vec!["set", "acme", "--limit", "tokens_per_day=tier", "--limit", "max_concurrent=0"],
            json!({"limits": {"tokens_per_day": null, "max_concurrent": 0}}),
        ),
        (vec!["set", "acme", "--no-webhook"], json!({"webhook_url": null})),
        (
            vec!["set", "acme", "--kms-key-arn", "arn:aws:kms:r:0:key/k"],
            json!({"kms_key_arn": "arn:aws:kms:r:0:key/k"}),
        ),
        (vec!["set", "acme", "--no-kms-key"], json!({"kms_key_arn": null})),
        (
            vec!["set", "acme", "--company-name", "A", "--assistant-name", "B", "--cell", "two"],
            json!({"company_name": "A", "assistant_name": "B", "cell": "two"}),
        ),
    ] {
        let api = Api::answering([(200, tenant("acme"))]);
        let out = api.run(&[&["tenants"], arguments.as_slice()].concat()).well();
        assert!(out.starts_with("tenant_id"), "{out}");
        let seen = api.seen();
        assert_eq!((seen[0].line.as_str(), &seen[0].body), ("PATCH /live/admin/tenants/acme", &body));
    }
}

#[test]
fn what_is_misspelt_is_never_sent() {
    let api = Api::answering([]);
    for wrong in [
        vec!["tenants", "set", "acme"],
        vec!["tenants", "set", "acme", "--limit", "max_concurent=5"],
        vec!["tenants", "set", "acme", "--limit", "max_concurrent=many"],
        vec!["tenants", "set", "acme", "--no-webhook", "--webhook-url", "https://a.example"],
        vec!["tenants", "set", "acme", "--no-kms-key", "--kms-key-arn", "arn:aws:kms:r:0:key/k"],
        vec!["tenants", "show", "Acme"],
        vec!["tenants", "show", "../usage"],
        vec!["tenants", "create", "acme", "--company-name", "Acme"],
        vec!["tenants", "create", "acme", "--company-name", "Acme", "--tier", "gold"],
        vec!["keys", "create", "acme", "--scope", "everything"],
        vec!["keys", "create", "acme", "--expires-at", "soon"],
        vec!["usage", "--month", "2026-13"],
        vec!["usage", "--csv", "--json"],
        vec!["deprovisioning", "show", "acme"],
    ] {
        let ended = api.run(&wrong);
        assert_eq!((ended.code, ended.out.as_str()), (2, ""), "{wrong:?}: {ended:?}");
        assert!(ended.err.starts_with("error: "), "{ended:?}");
    }
    assert!(api.seen().is_empty());
}

#[test]
fn usage_is_a_table_json_or_csv() {
    let usage = |id: &str| {
        json!({
            "tenant_id": id, "month": "2026-11", "requests": 3, "input_tokens": 100, "output_tokens": 10,
            "cache_read_input_tokens": 1, "cache_creation_input_tokens": 2, "embedding_tokens": 5,
            "unreported_tokens": 0, "cost_nano_usd": 18_446_744_073_709_551_615_u64,
            "remaining": {"monthly_token_budget": 77}, "in_flight": 1,
        })
    };
    let pages = || {
        [(200, json!({"usage": [usage("acme")], "cursor": "acme"})), (200, json!({"usage": [usage("b-b")]}))]
    };
    let api = Api::answering(pages());
    let out = api.run(&["usage", "--month", "2026-11"]).well();
    assert_eq!(out.lines().count(), 3, "{out}");
    assert!(out.lines().nth(1).unwrap().contains("18446744073.709551615"), "money is exact: {out}");
    assert_eq!(api.lines()[0], "GET /live/admin/usage?month=2026-11&limit=100");
    let out = Api::answering(pages()).run(&["usage", "--json"]).well();
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(shown, json!({"usage": [usage("acme"), usage("b-b")]}));

    let api = Api::with_texts([
        (200, "tenant_id,month\r\nacme,2026-11\r\n".into(), Some("acme")),
        (200, "tenant_id,month\r\n".into(), Some("idle")),
        (200, "tenant_id,month\r\nzeta,2026-11\r\n".into(), None),
    ]);
    let out = api.run(&["usage", "--csv"]).well();
    assert_eq!(out, "tenant_id,month\r\nacme,2026-11\r\nzeta,2026-11\r\n");
    assert!(api.seen().iter().all(|seen| seen.headers["accept"] == "text/csv"));
    assert_eq!(api.lines()[2], "GET /live/admin/usage?limit=100&cursor=idle");
}

const ID: &str = "dep_acme_4QlpSq9SaJqwRCNWzOX9xw";

fn view(states: [&str; 3], receipt: bool) -> Value {
    let step = |(step, state): (&str, &str)| match state {
        "pending" => json!({"step": step, "state": state}),
        _ => json!({"step": step, "state": state, "deleted": {"passages": 120, "collections": 1}}),
    };
    let steps: Vec<Value> = ["disable", "drain", "vectors"].into_iter().zip(states).map(step).collect();
    let mut view = json!({
        "deprovisioning_id": ID, "tenant_id": "acme", "status": "running",
        "started_at": "2026-11-18T22:00:00.000Z", "steps": steps,
    });
    if receipt {
        view["status"] = "completed".into();
        view["completed_at"] = "2026-11-18T22:00:09.000Z".into();
        view["receipt"] = json!({
            "deprovisioning_id": ID, "started_at": "2026-11-18T22:00:00.000Z",
            "verified_at": "2026-11-18T22:00:09.000Z",
            "stores": [{"store": "passages", "deleted": 120, "found": 0}],
            "kept": [{"what": "audit_records", "count": 9, "until": "2033-11-18T00:00:00.000Z"},
                     {"what": "tombstone", "count": 1}],
        });
    }
    view
}

#[test]
fn nothing_is_deleted_until_the_id_is_typed_again() {
    let typed = |api: &Api, text: &str| {
        let mut command = api.command(&["tenants", "delete", "acme"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let api = Api::answering([]);
    for wrong in ["", "\n", "acm\n", "ACME\n", "y\n", "acme \n"] {
        assert_eq!(typed(&api, wrong), (2, String::new()), "{wrong:?}");
    }
    assert!(api.seen().is_empty());
    let begun = || [(202, json!({"deprovisioning_id": ID}))];
    let api = Api::answering(begun());
    assert_eq!(typed(&api, "acme\n"), (0, format!("deprovisioning_id  {ID}\n")));
    assert_eq!(api.lines(), ["DELETE /live/admin/tenants/acme"]);
    let out = Api::answering(begun()).run(&["tenants", "delete", "acme", "--yes", "--json"]).well();
    assert_eq!(out, format!("{{\"deprovisioning_id\":\"{ID}\"}}\n"));
}

#[test]
fn a_deletion_is_followed_to_its_receipt() {
    let answers = || {
        [
            (202, json!({"deprovisioning_id": ID})),
            (200, view(["done", "running", "pending"], false)),
            (503, json!({"error": {"code": "unavailable", "message": "later"}, "request_id": "r"})),
            (200, view(["done", "running", "pending"], false)),
            (200, view(["done", "done", "done"], true)),
        ]
    };
    let api = Api::answering(answers());
    let ended = api.run(&["tenants", "delete", "acme", "--yes", "--watch"]);
    assert!(ended.err.contains(ID) && ended.err.contains("503 unavailable: later"), "{ended:?}");
    let out = ended.well();
    let expected = "\
disable        done     collections 1, passages 120
drain          running  collections 1, passages 120
drain          done     collections 1, passages 120
vectors        done     collections 1, passages 120

receipt of 2026-11-18T22:00:09.000Z
store     deleted  found since
passages      120            0

kept           count  until
audit_records      9  2033-11-18T00:00:00.000Z
tombstone          1  the id is used again
";
    assert_eq!(out, expected);
    assert_eq!(api.lines()[1], format!("GET /live/admin/deprovisionings/{ID}"));
    let out = Api::answering(answers().into_iter().skip(1)).run(&["deprovisioning", "watch", ID, "--json"]);
    assert_eq!(out.well(), format!("{}\n", view(["done", "done", "done"], true)));
}

#[test]
fn a_deletion_is_shown_as_it_stands() {
    let api = Api::answering([(200, view(["done", "running", "pending"], false))]);
    let out = api.run(&["deprovisioning", "show", ID]).well();
    assert!(out.starts_with(&format!("deprovisioning_id  {ID}\ntenant_id          acme\n")), "{out}");
    assert!(out.contains("\nvectors  pending\n") && !out.contains("receipt"), "{out}");
    let gone = Api::answering([(404, json!({"error": {"code": "not_found", "message": "no"}}))]);
    let ended = gone.run(&["deprovisioning", "watch", ID]);
    assert_eq!(ended.code, 1, "no watch waits for what does not exist: {ended:?}");
}

#[test]
fn an_error_is_one_line_and_an_exit_code() {
    let error = |code: &str| json!({"error": {"code": code, "message": "because\nof this", "param": "cell"}, "request_id": "r-7"});
    for (status, code, exit) in [
        (400, "invalid_request", 1),
        (409, "conflict", 1),
        (429, "rate_limit_exceeded", 3),
        (503, "unavailable", 3),
    ] {
        let ended = Api::answering([(status, error(code))]).run(&["tenants", "show", "acme", "--json"]);
        assert_eq!((ended.code, ended.out.as_str()), (exit, ""), "{ended:?}");
        assert_eq!(ended.err, format!("error: {status} {code}: because\\nof this [cell] (request r-7)\n"));
    }
    for odd in ["", "[]", "{\"tenants\": 1}"] {
        let ended = Api::with_texts([(200, odd.into(), None)]).run(&["tenants", "list"]);
        assert_eq!((ended.code, ended.err.lines().count()), (3, 1), "{ended:?}");
    }
    let elsewhere = Api::answering([]);
    let nobody = elsewhere.run(&["tenants", "list", "--endpoint", "http://127.0.0.1:9"]);
    assert_eq!((nobody.code, nobody.err.lines().count()), (3, 1), "{nobody:?}");
    let openly = elsewhere.run(&["tenants", "list", "--endpoint", "http://example.com"]);
    assert_eq!(openly.code, 2, "{openly:?}");
    let nowhere = Ended::of(elsewhere.command(&["tenants", "list"]).env_remove("BULKHEAD_ENDPOINT"));
    assert!(nowhere.code == 2 && nowhere.err.contains("--endpoint"), "{nowhere:?}");
    assert!(elsewhere.seen().is_empty());
}

#[test]
fn keys_come_from_where_aws_tools_have_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let keys = file(
        "credentials",
        &format!("[work]\naws_access_key_id = operator\naws_secret_access_key = {SECRET}\n"),
    );
    let process = format!(
        r#"{{"Version": 1, "AccessKeyId": "operator", "SecretAccessKey": "{SECRET}", "SessionToken": "t"}}"#
    );
    let process = file("process.json", &process);
    let config = file(
        "config",
        &format!(
            "[profile work]\nregion = eu-west-1\n\n[profile helped]\nregion = eu-west-1\n\
             credential_process = /bin/cat {}\n",
            process.display()
        ),
    );
    for (profile, token) in [("work", None), ("helped", Some("t"))] {
        let api = Api::answering([(200, tenant("acme"))]);
        let mut command = api.command(&["tenants", "show", "acme"]);
        for variable in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"] {
            command.env_remove(variable);
        }
        command
            .env("AWS_PROFILE", profile)
            .env("PATH", "/usr/bin:/bin")
            .env("AWS_CONFIG_FILE", &config)
            .env("AWS_SHARED_CREDENTIALS_FILE", &keys);
        Ended::of(&mut command).well();
        let sent = api.seen()[0].headers.get("x-amz-security-token").cloned();
        assert_eq!(sent.as_ref().map(|token| token.to_str().unwrap()), token, "{profile}");
    }
    let api = Api::answering([(200, tenant("acme"))]);
    Ended::of(api.command(&["tenants", "show", "acme"]).env("AWS_SESSION_TOKEN", "session")).well();
    assert_eq!(api.seen()[0].headers["x-amz-security-token"], "session");
    let wrong = api.command(&["tenants", "show", "acme"]).env("AWS_SECRET_ACCESS_KEY", "x").output().unwrap();
    assert_eq!(wrong.status.code(), Some(1), "the server does check signatures");
}
