//! Lambda authorizers of type REQUEST: asked once, their decisions kept for a while.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::event::Exchange;
use super::respond::{Failure, Kind};
use crate::lambda::{InvokeError, Lambda};
use crate::template::{Api, Authorizer, Route};

/// How long an authorizer may take.
const TIMEOUT: Duration = Duration::from_secs(29);
/// How many decisions are kept at most.
const CAPACITY: usize = 10_000;

/// The authorizers' decisions, by function and by what the client presented.
#[derive(Debug, Default)]
pub(super) struct Authorizers {
    decisions: Mutex<HashMap<(String, [u8; 32]), Kept>>,
}

#[derive(Debug)]
struct Kept {
    decision: Decision,
    until: Instant,
}

/// What an authorizer said: a policy, which is held against each request anew.
#[derive(Clone, Debug)]
struct Decision {
    statements: Vec<Statement>,
    context: Map<String, Value>,
}

impl Authorizers {
    /// What goes into `requestContext.authorizer`, if the caller is allowed in.
    pub(super) async fn decide(
        &self,
        lambda: &Lambda,
        api: &Api,
        authorizer: &Authorizer,
        exchange: &Exchange,
        route: &Route,
    ) -> Result<Map<String, Value>, Failure> {
        // Two values would let one decide and the other be cached under.
        let mut values = exchange.headers.get_all(&authorizer.identity_header).iter();
        let (Some(identity), None) = (values.next(), values.next()) else {
            return Err(Kind::Unauthorized.into());
        };
        if identity.as_bytes().trim_ascii().is_empty() {
            return Err(Kind::Unauthorized.into());
        }
        let key = (authorizer.function.clone(), Sha256::digest(identity.as_bytes()).into());
        let decision = match self.kept(&key) {
            Some(decision) => decision,
            None => {
                let event = Bytes::from(exchange.authorizer_event(api, route).to_string());
                let asked = Instant::now();
                let answer = lambda.invoke(&authorizer.function, None, event, TIMEOUT).await;
                let decision = parse(answer.map(|response| response.payload), asked.elapsed())?;
                self.keep(key, &decision, authorizer.ttl);
                decision
            }
        };
        if allows(&decision.statements, &exchange.method_arn(api)) {
            Ok(decision.context)
        } else {
            Err(Kind::AccessDenied.into())
        }
    }

    /// Keeps, for whoever presents `for_identity`, the decision that is kept for `as_identity`: the cache
    /// gone wrong. Says whether there was one.
    pub(super) fn poison(&self, for_identity: &[u8], as_identity: &[u8]) -> bool {
        let mut decisions = self.decisions.lock().unwrap_or_else(PoisonError::into_inner);
        let hash: [u8; 32] = Sha256::digest(as_identity).into();
        let kept = decisions.iter().find(|((_, identity), _)| *identity == hash);
        let kept = kept.map(|((function, _), kept)| {
            (function.clone(), Kept { decision: kept.decision.clone(), until: kept.until })
        });
        kept.map(|(function, kept)| decisions.insert((function, Sha256::digest(for_identity).into()), kept))
            .is_some()
    }

    fn kept(&self, key: &(String, [u8; 32])) -> Option<Decision> {
        let decisions = self.decisions.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = decisions.get(key)?;
        (Instant::now() < kept.until).then(|| kept.decision.clone())
    }

    fn keep(&self, key: (String, [u8; 32]), decision: &Decision, ttl: Duration) {
        if ttl.is_zero() {
            return;
        }
        let now = Instant::now();
        let mut decisions = self.decisions.lock().unwrap_or_else(PoisonError::into_inner);
        if decisions.len() >= CAPACITY {
            decisions.retain(|_, kept| now < kept.until);
        }
        if decisions.len() < CAPACITY {
            decisions.insert(key, Kept { decision: decision.clone(), until: now + ttl });
        }
    }
}

/// An authorizer's answer. Fields beyond these exist (`usageIdentifierKey`) and do not matter here.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    principal_id: String,
    policy_document: Policy,
    #[serde(default)]
    context: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Policy {
    statement: OneOrMany<Statement>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct Statement {
    #[serde(default, rename = "Sid")]
    _sid: Option<String>,
    effect: Effect,
    action: OneOrMany<String>,
    resource: OneOrMany<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
enum Effect {
    Allow,
    Deny,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

fn parse(answer: Result<Bytes, InvokeError>, took: Duration) -> Result<Decision, Failure> {
    let payload = match answer {
        Ok(payload) => payload,
        Err(InvokeError::Function { message, .. }) if message == "Unauthorized" => {
            return Err(Kind::Unauthorized.into());
        }
        Err(error) => {
            tracing::error!("Authorizer failed: {error}");
            return Err(Kind::AuthorizerFailure.into());
        }
    };
    let misconfigured = |problem: String| {
        tracing::error!("Authorizer's answer cannot be used: {problem}");
        Failure::from(Kind::AuthorizerConfigurationError)
    };
    let answer: Answer =
        serde_json::from_slice(&payload).map_err(|error| misconfigured(error.to_string()))?;
    let mut context = Map::new();
    for (name, value) in answer.context.unwrap_or_default() {
        let text = match value {
            Value::String(text) => text,
            Value::Number(number) => number.to_string(),
            Value::Bool(flag) => flag.to_string(),
            Value::Null | Value::Array(_) | Value::Object(_) => {
                return Err(misconfigured(format!(
                    "context `{name}` is not text, a number or a truth value"
                )));
            }
        };
        context.insert(name, Value::String(text));
    }
    context.insert("principalId".to_owned(), Value::String(answer.principal_id));
    let latency_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    context.insert("integrationLatency".to_owned(), Value::from(latency_ms));
    Ok(Decision { statements: answer.policy_document.statement.as_slice().to_vec(), context })
}

/// Whether the policy lets this method be called: allowed by one statement, denied by none.
fn allows(statements: &[Statement], method_arn: &str) -> bool {
    let applies = |statement: &&Statement| {
        statement.action.as_slice().iter().any(|action| wildcard(action, "execute-api:Invoke"))
            && statement.resource.as_slice().iter().any(|resource| wildcard(resource, method_arn))
    };
    let mut allowed = false;
    for statement in statements.iter().filter(applies) {
        match statement.effect {
            Effect::Deny => return false,
            Effect::Allow => allowed = true,
        }
    }
    allowed
}

/// IAM's patterns: `*` is any text, `?` any one character.
fn wildcard(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || text.get(t) == Some(&c) => {
                p += 1;
                t += 1;
            }
            // Back to the last star, which takes one more character.
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    t = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARN: &str = "arn:aws:execute-api:us-east-1:000000000000:local/live/POST/v1/chat";

    fn statements(json: Value) -> Vec<Statement> {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn patterns_are_those_of_iam() {
        for (pattern, text, matches) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abbd", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*/v1/*", "x/v1/chat", true),
            ("*/v1/*", "x/v2/chat", false),
            ("*a*b", "aXbXaXb", true),
            ("", "a", false),
        ] {
            assert_eq!(wildcard(pattern, text), matches, "{pattern} {text}");
        }
    }

    #[test]
    fn a_denial_wins_and_silence_denies() {
        let allow =
            serde_json::json!({"Effect":"Allow","Action":"execute-api:Invoke","Resource":"*/live/*/v1/*"});
        let deny = serde_json::json!({"Effect":"Deny","Action":["execute-api:*"],"Resource":["*/POST/*"]});
        assert!(allows(&statements(serde_json::json!([allow])), ARN));
        assert!(!allows(&statements(serde_json::json!([allow, deny])), ARN));
        assert!(allows(&statements(serde_json::json!([allow, deny])), &ARN.replace("POST", "GET")));
        assert!(!allows(&statements(serde_json::json!([allow])), &ARN.replace("/v1/", "/admin/")));
        assert!(!allows(&[], ARN));
    }
}
