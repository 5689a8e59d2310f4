//! STS, as far as functions use it: `AssumeRole` with session tags.
//!
//! Whoever may assume a role is what the role's trust policy in the template says, and what a session may
//! do is what the role's policies say, with the session's tags in their variables: [`crate::iam`].
//! <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html>

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};
use tokio::net::TcpListener;

use crate::iam::{Caller, Callers, Role, Session};
use crate::serving::{self, system_clock, unique_id};
use crate::sigv4::Credentials;
use crate::template::{ACCOUNT, REGION};

/// The longest session of a role that is assumed by a role, in seconds, and the shortest of any.
const LIFETIMES_S: std::ops::RangeInclusive<i64> = 900..=3_600;
/// Tags of a session at most, and the characters of a tag's key and value.
const MOST_TAGS: usize = 50;
const MOST_KEY: usize = 128;
const MOST_VALUE: usize = 256;
const NAMESPACE: &str = "https://sts.amazonaws.com/doc/2011-06-15/";

/// The service.
#[derive(Debug)]
pub struct Sts {
    roles: Vec<Role>,
    callers: Arc<Callers>,
    state: Mutex<Steering>,
}

/// What tests steer the service with, and what they read of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Steering {
    /// Whether it answers that it is unavailable.
    pub outage: bool,
    /// How long sessions last, in seconds, whatever is asked for.
    pub lifetime_s: Option<i64>,
    /// Sessions given so far. Read alone.
    #[serde(skip_deserializing)]
    pub given: u64,
}

impl Sts {
    /// A service that gives sessions of these roles to these callers, and lets them in among them.
    #[must_use]
    pub fn new(roles: Vec<Role>, callers: Arc<Callers>) -> Arc<Self> {
        Arc::new(Self { roles, callers, state: Mutex::default() })
    }

    /// Steers the service. The count goes on.
    pub fn steer(&self, steering: Steering) {
        let mut state = self.state();
        *state = Steering { given: state.given, ..steering };
    }

    /// How it is steered, and what it has given.
    #[must_use]
    pub fn steering(&self) -> Steering {
        self.state().clone()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, Steering> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assume(&self, headers: &HeaderMap, body: &[u8], now: OffsetDateTime) -> Result<String, Refusal> {
        let caller = self.callers.signer("sts", &Method::POST, "/", headers, body, now);
        let caller = caller.map_err(|refusal| Refusal::new(refusal.code(), refusal.to_string()))?;
        let wanted = Wanted::parse(body)?;
        let Steering { outage, lifetime_s, .. } = self.steering();
        if outage {
            return Err(Refusal::new("ServiceUnavailable", "The service is steered to be unavailable."));
        }
        // As AWS does: whether there is such a role is not said.
        let role = self.roles.iter().find(|role| role.arn == wanted.role_arn);
        let denied = role.map_or_else(
            || Some("User is not authorized to perform: sts:AssumeRole".to_owned()),
            |role| role.refused(&caller, &wanted.tags),
        );
        if let Some(message) = denied {
            tracing::warn!("STS refused AssumeRole: {message}");
            return Err(Refusal::new("AccessDenied", message));
        }
        self.callers.remember(&caller, &role.map(|role| role.assuming(&wanted.tags)).unwrap_or_default());
        let name = wanted.role_arn.rsplit('/').next().unwrap_or_default();
        let arn = format!("arn:aws:sts::{ACCOUNT}:assumed-role/{name}/{}", wanted.session);
        let credentials = Credentials {
            access_key_id: format!("ASIA{}", unique_id().to_ascii_uppercase()),
            secret_access_key: format!("{}{}", unique_id(), unique_id()),
            region: REGION.to_owned(),
            user_arn: arn.clone(),
        };
        let expires_at = now + Duration::seconds(lifetime_s.unwrap_or(wanted.lifetime_s));
        let token = format!("{}{}", unique_id(), unique_id());
        let answer = format!(
            "<AssumeRoleResponse xmlns=\"{NAMESPACE}\"><AssumeRoleResult><AssumedRoleUser>\
             <AssumedRoleId>AROA{name}:{session}</AssumedRoleId><Arn>{arn}</Arn></AssumedRoleUser>\
             <Credentials><AccessKeyId>{id}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>\
             <SessionToken>{token}</SessionToken><Expiration>{expiration}</Expiration></Credentials>\
             </AssumeRoleResult><ResponseMetadata><RequestId>{request}</RequestId></ResponseMetadata>\
             </AssumeRoleResponse>",
            session = wanted.session,
            id = credentials.access_key_id,
            secret = credentials.secret_access_key,
            expiration = expires_at.format(&Rfc3339).unwrap_or_default(),
            request = unique_id(),
        );
        let policies = role.map(|role| role.policies.clone()).unwrap_or_default();
        let session = Session { token, expires_at };
        let caller = Caller {
            tags: wanted.tags,
            session: Some(session),
            ..Caller::in_role(credentials, wanted.role_arn, policies)
        };
        self.callers.add_session(caller, now);
        self.state().given += 1;
        Ok(answer)
    }
}

/// Serves STS until `shutdown` resolves.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    sts: Arc<Sts>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    serving::serve(listener, Router::new().route("/", post(call)).with_state(sts), shutdown).await
}

async fn call(State(sts): State<Arc<Sts>>, headers: HeaderMap, body: Bytes) -> Response {
    let (status, text) = match sts.assume(&headers, &body, system_clock()) {
        Ok(text) => (StatusCode::OK, text),
        Err(Refusal { code, message }) => {
            let (status, whose) = match code {
                "ServiceUnavailable" => (StatusCode::SERVICE_UNAVAILABLE, "Receiver"),
                "AccessDenied" => (StatusCode::FORBIDDEN, "Sender"),
                _ => (StatusCode::BAD_REQUEST, "Sender"),
            };
            let message = message.replace('&', "&amp;").replace('<', "&lt;");
            let text = format!(
                "<ErrorResponse xmlns=\"{NAMESPACE}\"><Error><Type>{whose}</Type><Code>{code}</Code>\
                 <Message>{message}</Message></Error><RequestId>{}</RequestId></ErrorResponse>",
                unique_id()
            );
            (status, text)
        }
    };
    (status, [(header::CONTENT_TYPE, "text/xml")], text).into_response()
}

#[derive(Debug)]
struct Refusal {
    code: &'static str,
    message: String,
}

impl Refusal {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self::new("ValidationError", message)
    }
}

/// A well-formed `AssumeRole`.
#[derive(Debug, PartialEq)]
struct Wanted {
    role_arn: String,
    session: String,
    lifetime_s: i64,
    tags: BTreeMap<String, String>,
}

impl Wanted {
    /// Reads a form. A parameter that is not known here is refused by name.
    fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let text = std::str::from_utf8(body).map_err(|_| Refusal::invalid("the form is not UTF-8"))?;
        let form = Url::parse(&format!("http://form/?{text}"));
        let form = form.map_err(|_| Refusal::invalid("the form is malformed"))?;
        let (mut fields, mut tags) = (BTreeMap::new(), BTreeMap::<u32, [Option<String>; 2]>::new());
        for (name, value) in form.query_pairs() {
            let value = value.into_owned();
            let tag = name.strip_prefix("Tags.member.").and_then(|rest| rest.split_once('.'));
            let twice = match tag {
                Some((number, part @ ("Key" | "Value"))) => {
                    let number = number.parse().map_err(|_| Refusal::invalid(format!("{name} is no tag")))?;
                    let [key, text] = tags.entry(number).or_default();
                    if part == "Key" { key.replace(value) } else { text.replace(value) }
                }
                _ => fields.insert(name.to_string(), value),
            };
            if twice.is_some() {
                return Err(Refusal::invalid(format!("{name} is there twice")));
            }
        }
        let mut field = |name: &str| fields.remove(name);
        match (field("Action").as_deref(), field("Version").as_deref()) {
            (Some("AssumeRole"), Some("2011-06-15")) => {}
            _ => return Err(Refusal::new("InvalidAction", "Only AssumeRole is known here.")),
        }
        let required =
            |value: Option<String>, name| value.ok_or_else(|| Refusal::invalid(format!("{name} is missing")));
        let role_arn = required(field("RoleArn"), "RoleArn")?;
        let session = required(field("RoleSessionName"), "RoleSessionName")?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "_+=,.@-".contains(c);
        if !(2..=64).contains(&session.len()) || !session.chars().all(plain) {
            return Err(Refusal::invalid("RoleSessionName is malformed"));
        }
        let lifetime_s = field("DurationSeconds").map_or(Ok(*LIFETIMES_S.end()), |text| text.parse());
        let lifetime_s = lifetime_s.ok().filter(|s| LIFETIMES_S.contains(s));
        let lifetime_s = lifetime_s.ok_or_else(|| {
            Refusal::invalid(
                "DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining",
            )
        })?;
        if let Some(name) = fields.keys().next() {
            return Err(Refusal::invalid(format!("{name} is not known to the local stack")));
        }
        Ok(Self { role_arn, session, lifetime_s, tags: session_tags(tags)? })
    }
}

fn session_tags(given: BTreeMap<u32, [Option<String>; 2]>) -> Result<BTreeMap<String, String>, Refusal> {
    if given.len() > MOST_TAGS {
        return Err(Refusal::invalid(format!("Tags has more than {MOST_TAGS} members")));
    }
    let mut tags = BTreeMap::new();
    for [key, value] in given.into_values() {
        let (Some(key), Some(value)) = (key, value) else {
            return Err(Refusal::invalid("Tags has a member without key or value"));
        };
        let plain = |c: char| c.is_alphanumeric() || c == ' ' || "_.:/=+-@".contains(c);
        let fits = |text: &str, most| text.chars().count() <= most && text.chars().all(plain);
        if key.is_empty() || !fits(&key, MOST_KEY) || !fits(&value, MOST_VALUE) {
            return Err(Refusal::invalid("Tags has a malformed member"));
        }
        // Keys are compared without regard to case.
        if tags.keys().any(|other: &String| other.eq_ignore_ascii_case(&key)) {
            return Err(Refusal::invalid("Tags has a key twice"));
        }
        tags.insert(key, value);
    }
    Ok(tags)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::iam::{Intent, Policy, Trust};
    use crate::sigv4;

    const CHAT: &str = "arn:aws:iam::0:role/chat";
    const FORM: &str = "Action=AssumeRole&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A0%3Arole%2Ftenant&RoleSessionName=acme";

    fn key(id: &str) -> Credentials {
        Credentials {
            access_key_id: id.into(),
            secret_access_key: "s".into(),
            region: REGION.into(),
            user_arn: format!("arn:aws:sts::0:assumed-role/{id}"),
        }
    }

    fn sts() -> Arc<Sts> {
        let trust = json!({"Version": "2012-10-17", "Statement": {
            "Effect": "Allow", "Principal": {"AWS": CHAT}, "Action": ["sts:AssumeRole", "sts:TagSession"],
            "Condition": {
                "Null": {"aws:RequestTag/tenant_id": "false"},
                "ForAllValues:StringEquals": {"aws:TagKeys": "tenant_id"},
            },
        }});
        let policy = json!({"Version": "2012-10-17", "Statement": {
            "Effect": "Allow", "Action": "s3:GetObject", "Resource": "b/tenant=${aws:PrincipalTag/tenant_id}/*",
        }});
        let role = Role {
            arn: "arn:aws:iam::0:role/tenant".into(),
            policies: vec![Policy::parse(&policy).unwrap()],
            trust: Trust::parse(&trust).unwrap(),
        };
        let callers = [
            Caller::in_role(key("CHAT"), CHAT.into(), Vec::new()),
            Caller::in_role(key("USAGE"), "arn:aws:iam::0:role/usage".into(), Vec::new()),
            Caller::operator(key("OPERATOR")),
        ];
        Sts::new(vec![role], Arc::new(Callers::new(callers.into())))
    }

    fn ask(sts: &Sts, by: &str, form: &str) -> Result<String, &'static str> {
        let now = system_clock();
        let headers = [("host", "sts"), ("content-type", "application/x-www-form-urlencoded")];
        let url = "http://sts/";
        let signed =
            sigv4::sign("sts", &key(by), &Method::POST, url, &headers, form.as_bytes(), now).unwrap();
        let mut map = HeaderMap::new();
        for (name, value) in headers.map(|(n, v)| (n.to_owned(), v.to_owned())).into_iter().chain(signed) {
            map.insert(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        }
        sts.assume(&map, form.as_bytes(), now).map_err(|refusal| refusal.code)
    }

    fn with_tags(tags: &[(&str, &str)]) -> String {
        let tags = tags.iter().enumerate().map(|(n, (key, value))| {
            format!("&Tags.member.{}.Key={key}&Tags.member.{0}.Value={value}", n + 1,)
        });
        FORM.to_owned() + &tags.collect::<String>()
    }

    #[test]
    fn a_session_is_one_tenants_and_ends() {
        let sts = sts();
        let answer = ask(&sts, "CHAT", &with_tags(&[("tenant_id", "acme")])).unwrap();
        let part = |name: &str| {
            let (_, rest) = answer.split_once(&format!("<{name}>")).unwrap();
            rest.split_once('<').unwrap().0.to_owned()
        };
        let session = sts.callers.by_key(&part("AccessKeyId")).unwrap();
        let get = |key: &str| Intent::new("s3:GetObject", format!("b/tenant={key}/x"));
        assert!(session.may(&get("acme")) && !session.may(&get("globex")) && !session.may(&get("acme1")));
        let (token, now) = (part("SessionToken"), system_clock());
        assert!(session.check_session(Some(&token), now).is_ok());
        assert_eq!(session.check_session(None, now), Err(sigv4::Refusal::Token));
        assert_eq!(session.check_session(Some("another"), now), Err(sigv4::Refusal::Token));
        let later = now + Duration::seconds(3_601);
        assert_eq!(session.check_session(Some(&token), later), Err(sigv4::Refusal::Expired));
        // Forgotten, once somebody else has come in after its time.
        sts.callers.add_session(Caller::operator(key("LATER")), later);
        assert!(sts.callers.by_key(&part("AccessKeyId")).is_none());
        assert_eq!(sts.steering().given, 1);
    }

    #[test]
    fn only_whom_the_role_trusts_assumes_it_and_only_for_a_tenant() {
        let sts = sts();
        let refused = |by: &str, form: &str| ask(&sts, by, form).unwrap_err();
        let acme = with_tags(&[("tenant_id", "acme")]);
        assert!(ask(&sts, "CHAT", &acme).is_ok());
        assert_eq!(refused("USAGE", &acme), "AccessDenied");
        assert_eq!(refused("OPERATOR", &acme), "AccessDenied");
        assert_eq!(refused("CHAT", FORM), "AccessDenied", "no tag");
        assert_eq!(refused("CHAT", &with_tags(&[("tenant_id", "acme"), ("admin", "1")])), "AccessDenied");
        assert_eq!(refused("CHAT", &with_tags(&[("other", "acme")])), "AccessDenied");
        assert_eq!(refused("CHAT", &acme.replace("tenant&", "nobody&")), "AccessDenied");
        assert_eq!(refused("NOBODY", &acme), "UnrecognizedClientException");
    }

    #[test]
    fn what_is_malformed_is_refused_by_name() {
        for (form, named) in [
            (FORM.replace("&RoleSessionName=acme", ""), "RoleSessionName"),
            (FORM.replace("=acme", "=a%20b"), "RoleSessionName"),
            (format!("{FORM}&DurationSeconds=3601"), "DurationSeconds"),
            (format!("{FORM}&DurationSeconds=899"), "DurationSeconds"),
            (format!("{FORM}&Policy=x"), "Policy"),
            (format!("{FORM}&RoleArn=x"), "RoleArn"),
            (with_tags(&[("a", "1"), ("A", "2")]), "Tags"),
            (with_tags(&[("a", "*")]), "Tags"),
            (format!("{FORM}&Tags.member.1.Key=a"), "Tags"),
            (FORM.replace("AssumeRole", "GetFederationToken"), "AssumeRole"),
        ] {
            let refusal = Wanted::parse(form.as_bytes()).unwrap_err();
            assert!(refusal.message.contains(named), "{form}: {refusal:?}");
        }
    }

    #[test]
    fn trust_policies_are_understood_whole() {
        let parse =
            |statement: Value| Trust::parse(&json!({"Version": "2012-10-17", "Statement": statement}));
        let sound = json!({"Effect": "Allow", "Principal": {"AWS": CHAT}, "Action": "sts:AssumeRole"});
        assert!(parse(sound.clone()).is_ok());
        for (name, value) in [
            ("Principal", json!("*")),
            ("Principal", json!({"Service": "lambda.amazonaws.com"})),
            ("Principal", json!({"AWS": CHAT, "Service": "x"})),
            ("NotAction", json!("x")),
            ("Resource", json!("x")),
        ] {
            let mut statement = sound.clone();
            statement[name] = value;
            assert!(parse(statement.clone()).is_err(), "{statement}");
        }
        for (name, value) in [("Version", json!("2008-10-17")), ("Statements", json!([]))] {
            let mut document = json!({"Version": "2012-10-17", "Statement": sound});
            document[name] = value;
            assert!(Trust::parse(&document).is_err(), "{document}");
        }
    }
}
