//! IAM, as far as the template's policies use it: whose access key signed a call, whether the policies of
//! its role allow it, and who may assume which role.
//!
//! A policy is evaluated as AWS does it: what no statement allows is denied, and what one denies is denied
//! whatever the others say. An element or operator that is not known here is an error when the template is
//! read, so that no statement is ever half understood.
//! <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html>

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use http::{HeaderMap, Method};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use time::OffsetDateTime;

use crate::sigv4::{self, Credentials, Refusal};

/// How many deeds are remembered; the first ones.
const MOST_DEEDS: usize = 100_000;
/// The condition keys that the services here set, or would if a call were about them.
const KEYS: [&str; 5] = [
    "aws:TagKeys",
    "dynamodb:Attributes",
    "dynamodb:LeadingKeys",
    "kms:EncryptionContext:tenant_id",
    "s3:prefix",
];
const PRINCIPAL_TAG: &str = "aws:PrincipalTag/";
/// Those that end with the name of a tag.
const TAGS: [&str; 2] = [PRINCIPAL_TAG, "aws:RequestTag/"];

/// A policy document.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy(Vec<Statement>);

#[derive(Clone, Debug, PartialEq)]
struct Statement {
    allows: bool,
    actions: Vec<String>,
    resources: Vec<String>,
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug, PartialEq)]
struct Condition {
    /// How the values of a key that has several are taken together.
    set: Set,
    test: Test,
    /// Whether a key that is not there satisfies it.
    if_exists: bool,
    key: String,
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Set {
    /// One value is expected.
    One,
    /// All of them; none satisfies it.
    All,
    /// At least one of them.
    Any,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Test {
    Equals,
    NotEquals,
    Like,
    NotLike,
    Null,
}

/// The least that can be taken out of a policy: one action on one resource of one statement.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Grant {
    /// Which statement of the policy, from 0.
    pub statement: usize,
    /// The action, as the statement has it.
    pub action: String,
    /// The resource, as the statement has it.
    pub resource: String,
}

/// Something that a role was allowed; once for all calls alike.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Deed {
    /// The role's ARN.
    pub role: String,
    /// The tags of the session.
    pub tags: BTreeMap<String, String>,
    /// What it was.
    #[serde(flatten)]
    pub intent: Intent,
}

/// What somebody wants to do: one action on one resource.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Intent {
    /// Such as `dynamodb:GetItem`.
    pub action: String,
    /// The resource's ARN, or `*` where the action has none.
    pub resource: String,
    /// The condition keys of the request, each with its values.
    pub context: BTreeMap<String, Vec<String>>,
}

/// A role, as the template declares it.
#[derive(Clone, Debug, PartialEq)]
pub struct Role {
    /// Its ARN.
    pub arn: String,
    /// What its sessions may do.
    pub policies: Vec<Policy>,
    /// Who may assume it.
    pub trust: Trust,
}

/// A role's trust policy: for each statement, whom it speaks of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trust(Vec<(Vec<String>, Statement)>);

/// Somebody with an access key.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The key, and whose it is.
    pub credentials: Credentials,
    /// The role, as trust policies name it. Operators have none.
    pub role: Option<String>,
    /// The policies of a role. Operators are not bound by any.
    pub policies: Option<Vec<Policy>>,
    /// The tags of the session.
    pub tags: BTreeMap<String, String>,
    /// What goes with a key that was given for a while.
    pub session: Option<Session>,
}

/// What has to be sent along with a key that was given for a while, and until when it is good.
#[derive(Clone, Debug)]
pub struct Session {
    /// The token.
    pub token: String,
    /// From when on it is refused.
    pub expires_at: OffsetDateTime,
}

/// Everybody with an access key: those there are from the start, and sessions that came later.
#[derive(Debug, Default)]
pub struct Callers {
    fixed: Vec<Arc<Caller>>,
    sessions: RwLock<BTreeMap<String, Arc<Caller>>>,
    deeds: Mutex<BTreeSet<Deed>>,
}

impl Intent {
    /// An action on a resource, without anything that conditions look at.
    pub fn new(action: impl Into<String>, resource: impl Into<String>) -> Self {
        Self { action: action.into(), resource: resource.into(), context: BTreeMap::new() }
    }
}

impl Callers {
    /// These.
    #[must_use]
    pub fn new(callers: Vec<Caller>) -> Self {
        Self { fixed: callers.into_iter().map(Arc::new).collect(), ..Self::default() }
    }

    /// Whose access key that is.
    #[must_use]
    pub fn by_key(&self, access_key_id: &str) -> Option<Arc<Caller>> {
        let fixed = self.fixed.iter().find(|caller| caller.credentials.access_key_id == access_key_id);
        let sessions = || self.sessions.read().unwrap_or_else(PoisonError::into_inner);
        fixed.cloned().or_else(|| sessions().get(access_key_id).cloned())
    }

    /// Lets somebody in whose key was given for a while. Those whose time is over are forgotten.
    pub fn add_session(&self, caller: Caller, now: OffsetDateTime) {
        let mut sessions = self.sessions.write().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|_, other| other.session.as_ref().is_none_or(|session| session.expires_at > now));
        sessions.insert(caller.credentials.access_key_id.clone(), Arc::new(caller));
    }

    /// Says why somebody may not do one of these, in AWS's words; nothing if all are allowed, which is
    /// remembered.
    pub fn refused(&self, caller: &Caller, intents: &[Intent]) -> Option<String> {
        let refused = caller.refused(intents);
        if refused.is_none() {
            self.remember(caller, intents);
        }
        refused
    }

    /// Remembers that somebody was allowed these. Operators, who have no role, may do everything.
    pub fn remember(&self, caller: &Caller, intents: &[Intent]) {
        let Some(role) = &caller.role else { return };
        let mut deeds = self.deeds.lock().unwrap_or_else(PoisonError::into_inner);
        for intent in intents {
            let deed = Deed { role: role.clone(), tags: caller.tags.clone(), intent: intent.clone() };
            if deeds.len() < MOST_DEEDS {
                deeds.insert(deed);
            }
        }
    }

    /// What roles were allowed so far.
    #[must_use]
    pub fn deeds(&self) -> Vec<Deed> {
        self.deeds.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Who signed a request to a service.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn signer(
        &self,
        service: &str,
        method: &Method,
        uri: &str,
        headers: &HeaderMap,
        body: &[u8],
        now: OffsetDateTime,
    ) -> Result<Arc<Caller>, Refusal> {
        let caller = sigv4::presented_key(headers).and_then(|key| self.by_key(key));
        let key = caller.as_ref().map(|caller| &caller.credentials);
        sigv4::verify(service, key, method, uri, headers, body, now)?;
        let caller = caller.ok_or(Refusal::UnknownKey)?;
        let token = headers.get(sigv4::SECURITY_TOKEN).and_then(|token| token.to_str().ok());
        caller.check_session(token, now)?;
        Ok(caller)
    }
}

impl Role {
    /// Says why somebody may not assume the role with these tags, in AWS's words; nothing if it is allowed.
    /// The trust policy alone decides: it names roles of the same account.
    /// <https://docs.aws.amazon.com/IAM/latest/UserGuide/id_session-tags.html#id_session-tags_permissions-required>
    #[must_use]
    pub fn refused(&self, caller: &Caller, tags: &BTreeMap<String, String>) -> Option<String> {
        let intents = self.assuming(tags);
        let refused = intents.iter().find(|intent| !self.trust.allows(caller, intent))?;
        Some(format!(
            "User: {} is not authorized to perform: {} on resource: {}",
            caller.credentials.user_arn, refused.action, self.arn
        ))
    }

    /// What assuming the role with these tags is to IAM.
    #[must_use]
    pub fn assuming(&self, tags: &BTreeMap<String, String>) -> Vec<Intent> {
        let mut context: BTreeMap<String, Vec<String>> =
            tags.iter().map(|(key, value)| (format!("aws:RequestTag/{key}"), vec![value.clone()])).collect();
        context.insert("aws:TagKeys".to_owned(), tags.keys().cloned().collect());
        let actions: &[&str] =
            if tags.is_empty() { &["sts:AssumeRole"] } else { &["sts:AssumeRole", "sts:TagSession"] };
        let intent = |action: &&str| Intent { context: context.clone(), ..Intent::new(*action, &*self.arn) };
        actions.iter().map(intent).collect()
    }
}

impl Trust {
    /// Reads the document of a trust policy.
    ///
    /// # Errors
    /// What of it is not known here.
    pub fn parse(document: &Value) -> Result<Self, String> {
        let one = |statement: &Value| {
            let mut statement = statement.clone();
            let fields = statement.as_object_mut().ok_or("has a Statement that is no object")?;
            let principal = fields.remove("Principal").ok_or("has a statement without Principal")?;
            if principal.as_object().is_none_or(|principal| principal.len() != 1) {
                return Err("has a Principal that is not known to the local stack".to_owned());
            }
            let who = texts(principal.get("AWS")).ok_or("has a Principal that is not known here")?;
            // A trust policy speaks of the role that it stands in.
            if fields.insert("Resource".to_owned(), "*".into()).is_some() {
                return Err("has a Resource in a trust policy".to_owned());
            }
            Ok((who, Statement::parse(&statement)?))
        };
        statements(document)?.into_iter().map(one).collect::<Result<_, String>>().map(Self)
    }

    fn allows(&self, caller: &Caller, intent: &Intent) -> bool {
        let mut allowed = false;
        for (who, statement) in &self.0 {
            let meant = caller.role.as_ref().is_some_and(|role| who.contains(role));
            if meant && statement.applies(intent, &caller.tags) {
                if !statement.allows {
                    return false;
                }
                allowed = true;
            }
        }
        allowed
    }
}

impl Caller {
    /// Somebody who may do everything.
    #[must_use]
    pub const fn operator(credentials: Credentials) -> Self {
        Self { credentials, role: None, policies: None, tags: BTreeMap::new(), session: None }
    }

    /// Somebody who acts in a role for as long as the stack runs.
    #[must_use]
    pub const fn in_role(credentials: Credentials, role: String, policies: Vec<Policy>) -> Self {
        let tags = BTreeMap::new();
        Self { credentials, role: Some(role), policies: Some(policies), tags, session: None }
    }

    /// Holds the token that came with a request against the caller's session.
    ///
    /// # Errors
    /// [`Refusal::Token`] and [`Refusal::Expired`].
    pub fn check_session(&self, token: Option<&str>, now: OffsetDateTime) -> Result<(), Refusal> {
        match &self.session {
            None => Ok(()),
            Some(session) if token != Some(&session.token) => Err(Refusal::Token),
            Some(session) if session.expires_at <= now => Err(Refusal::Expired),
            Some(_) => Ok(()),
        }
    }

    /// Says why the caller may not do one of these, in AWS's words; nothing if all are allowed.
    #[must_use]
    pub fn refused(&self, intents: &[Intent]) -> Option<String> {
        let refused = intents.iter().find(|intent| !self.may(intent))?;
        Some(format!(
            "User: {} is not authorized to perform: {} on resource: {} because no identity-based policy allows \
             the {} action",
            self.credentials.user_arn, refused.action, refused.resource, refused.action
        ))
    }

    /// Whether the caller's policies allow something.
    #[must_use]
    pub fn may(&self, intent: &Intent) -> bool {
        self.policies.as_ref().is_none_or(|policies| allow(policies, &self.tags, intent))
    }
}

/// Whether policies allow something, to a session with these tags.
#[must_use]
pub fn allow(policies: &[Policy], tags: &BTreeMap<String, String>, intent: &Intent) -> bool {
    let mut allowed = false;
    let statements = policies.iter().flat_map(|policy| &policy.0);
    for statement in statements.filter(|statement| statement.applies(intent, tags)) {
        if !statement.allows {
            return false;
        }
        allowed = true;
    }
    allowed
}

impl Policy {
    /// Reads a document.
    ///
    /// # Errors
    /// What of it is not known here.
    pub fn parse(document: &Value) -> Result<Self, String> {
        statements(document)?.into_iter().map(Statement::parse).collect::<Result<_, _>>().map(Self)
    }

    /// All that it allows, taken apart.
    #[must_use]
    pub fn grants(&self) -> Vec<Grant> {
        let of = |(statement, parts): (usize, &Statement)| {
            let pairs =
                parts.actions.iter().flat_map(|action| parts.resources.iter().map(move |r| (action, r)));
            let grant = |(action, resource): (&String, &String)| Grant {
                statement,
                action: action.clone(),
                resource: resource.clone(),
            };
            pairs.map(grant).collect::<Vec<_>>()
        };
        self.0.iter().enumerate().filter(|(_, statement)| statement.allows).flat_map(of).collect()
    }

    /// The same without one of its grants.
    #[must_use]
    pub fn without(&self, grant: &Grant) -> Self {
        let mut statements = self.0.clone();
        if let Some(statement) = statements.get_mut(grant.statement) {
            let mut others = Statement { actions: vec![grant.action.clone()], ..statement.clone() };
            others.resources.retain(|resource| *resource != grant.resource);
            statement.actions.retain(|action| *action != grant.action);
            statements.push(others);
        }
        Self(statements)
    }
}

/// The statements of a document, whose other fields are understood.
fn statements(document: &Value) -> Result<Vec<&Value>, String> {
    const KNOWN: [&str; 3] = ["Version", "Id", "Statement"];
    let fields = document.as_object().ok_or("is not a policy document")?;
    if fields.get("Version").and_then(Value::as_str) != Some("2012-10-17") {
        return Err("has another Version than 2012-10-17".to_owned());
    }
    if let Some(other) = fields.keys().find(|name| !KNOWN.contains(&name.as_str())) {
        return Err(format!("has `{other}`, which is not known to the local stack"));
    }
    match fields.get("Statement") {
        Some(Value::Array(statements)) => Ok(statements.iter().collect()),
        Some(one) => Ok(vec![one]),
        None => Err("has no Statement".to_owned()),
    }
}

impl Statement {
    fn parse(statement: &Value) -> Result<Self, String> {
        const KNOWN: [&str; 5] = ["Sid", "Effect", "Action", "Resource", "Condition"];
        let fields = statement.as_object().ok_or("has a Statement that is no object")?;
        if let Some(other) = fields.keys().find(|name| !KNOWN.contains(&name.as_str())) {
            return Err(format!("has `{other}` in a statement, which is not known to the local stack"));
        }
        let list = |name: &str| texts(fields.get(name)).ok_or(format!("has a statement without {name}"));
        let mut conditions = Vec::new();
        if let Some(condition) = fields.get("Condition") {
            for (operator, keys) in condition.as_object().ok_or("has a Condition that is no object")? {
                let keys = keys.as_object().ok_or("has a Condition that is no object")?;
                conditions.extend(Condition::parse(operator, keys)?);
            }
        }
        let resources = list("Resource")?;
        resources.iter().try_for_each(|resource| known_variables(resource))?;
        Ok(Self {
            allows: match fields.get("Effect").and_then(Value::as_str) {
                Some("Allow") => true,
                Some("Deny") => false,
                _ => return Err("has a statement without Effect".to_owned()),
            },
            actions: list("Action")?,
            resources,
            conditions,
        })
    }

    fn applies(&self, intent: &Intent, tags: &BTreeMap<String, String>) -> bool {
        let action = intent.action.to_ascii_lowercase();
        self.actions.iter().any(|pattern| matches(&pattern.to_ascii_lowercase(), &action))
            && self
                .resources
                .iter()
                .any(|pattern| filled(pattern, tags).is_some_and(|p| matches(&p, &intent.resource)))
            && self.conditions.iter().all(|condition| condition.holds(intent, tags))
    }
}

impl Condition {
    fn parse(operator: &str, keys: &Map<String, Value>) -> Result<Vec<Self>, String> {
        let (set, test) = match operator.split_once(':') {
            None => (Set::One, operator),
            Some(("ForAllValues", test)) => (Set::All, test),
            Some(("ForAnyValue", test)) => (Set::Any, test),
            Some(_) => return Err(format!("has the condition operator {operator}, which is not known")),
        };
        let (test, if_exists) = match test.strip_suffix("IfExists") {
            Some(test) => (test, true),
            None => (test, false),
        };
        let test = match test {
            "StringEquals" => Test::Equals,
            "StringNotEquals" => Test::NotEquals,
            "StringLike" => Test::Like,
            "StringNotLike" => Test::NotLike,
            "Null" if set == Set::One && !if_exists => Test::Null,
            _ => return Err(format!("has the condition operator {operator}, which is not known")),
        };
        let one = |(key, values): (&String, &Value)| {
            // A key that no call here sets would count as absent, and that satisfies some operators.
            if !KEYS.contains(&key.as_str()) && !TAGS.iter().any(|tag| key.starts_with(tag)) {
                return Err(format!("has the condition key {key}, which is not known to the local stack"));
            }
            let values = texts(Some(values)).ok_or(format!("has no values for the condition key {key}"))?;
            values.iter().try_for_each(|value| known_variables(value))?;
            Ok(Self { set, test, if_exists, key: key.clone(), values })
        };
        keys.iter().map(one).collect()
    }

    fn holds(&self, intent: &Intent, tags: &BTreeMap<String, String>) -> bool {
        let tag = |key: &str| tags.get(key.strip_prefix(PRINCIPAL_TAG)?).map(|tag| vec![tag.clone()]);
        let present = intent.context.get(&self.key).cloned().or_else(|| tag(&self.key));
        // No value at all is no key.
        let present = present.filter(|values| !values.is_empty());
        if self.test == Test::Null {
            return self.values.iter().any(|value| (value == "true") == present.is_none());
        }
        let Some(present) = present else {
            let negated = matches!(self.test, Test::NotEquals | Test::NotLike);
            return self.if_exists || self.set == Set::All || (negated && self.set == Set::One);
        };
        // A variable without a value makes its pattern match nothing.
        let wanted: Vec<String> = self.values.iter().filter_map(|value| filled(value, tags)).collect();
        let one = |value: &String| match self.test {
            Test::Equals => wanted.contains(value),
            Test::NotEquals => !wanted.contains(value),
            Test::Like => wanted.iter().any(|pattern| matches(pattern, value)),
            Test::NotLike => !wanted.iter().any(|pattern| matches(pattern, value)),
            Test::Null => false,
        };
        match self.set {
            Set::One => matches!(&present[..], [value] if one(value)),
            Set::All => present.iter().all(one),
            Set::Any => present.iter().any(one),
        }
    }
}

/// One text or a list of them.
fn texts(value: Option<&Value>) -> Option<Vec<String>> {
    match value? {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Bool(flag) => Some(vec![flag.to_string()]),
        Value::Array(all) => all.iter().map(|one| one.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// Refuses a pattern with a variable that has no value here: what it stands in would apply to nothing, and
/// that opens where the statement denies or the operator is a negated one.
fn known_variables(pattern: &str) -> Result<(), String> {
    let known = |part: &str| {
        let variable = part.split_once('}').map(|(variable, _)| variable);
        variable
            .is_some_and(|variable| variable.strip_prefix(PRINCIPAL_TAG).is_some_and(|tag| !tag.is_empty()))
    };
    if pattern.split("${").skip(1).all(known) {
        return Ok(());
    }
    Err(format!("has `{pattern}`, with a variable that is not known to the local stack"))
}

/// A pattern with the values of its variables; none if one has no value.
fn filled(pattern: &str, tags: &BTreeMap<String, String>) -> Option<String> {
    let mut parts = pattern.split("${");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (variable, rest) = part.split_once('}')?;
        text.push_str(tags.get(variable.strip_prefix(PRINCIPAL_TAG)?)?);
        text.push_str(rest);
    }
    Some(text)
}

/// Whether a text matches a pattern, in which `*` stands for any characters and `?` for any one.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t, mut star) = (0, 0, None);
    while let Some(c) = text.get(t) {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(wanted) if wanted == c || *wanted == '?' => (p, t) = (p + 1, t + 1),
            _ => match &mut star {
                // The last `*` takes one character more.
                Some((at, from)) => {
                    *from += 1;
                    (p, t) = (*at + 1, *from);
                }
                None => return false,
            },
        }
    }
    pattern.iter().skip(p).all(|c| *c == '*')
}

#[cfg(test)]
mod sessions;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn caller(statements: Value, tags: &[(&str, &str)]) -> Caller {
        let policy = Policy::parse(&json!({"Version": "2012-10-17", "Statement": statements})).unwrap();
        let credentials = Credentials {
            access_key_id: "ASIA1".into(),
            secret_access_key: "s".into(),
            region: "us-east-1".into(),
            user_arn: "arn:aws:sts::0:assumed-role/chat".into(),
        };
        let tags = tags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Caller { tags, ..Caller::in_role(credentials, "arn:aws:iam::0:role/chat".into(), vec![policy]) }
    }

    fn on(action: &str, resource: &str) -> Intent {
        Intent::new(action, resource)
    }

    fn keys(values: &[&str]) -> Intent {
        let mut intent = on("dynamodb:GetItem", "table/notes");
        let values = values.iter().map(|value| (*value).to_owned()).collect();
        intent.context.insert("dynamodb:LeadingKeys".to_owned(), values);
        intent
    }

    #[test]
    fn what_nothing_allows_is_denied_and_a_denial_beats_all() {
        let chat = caller(
            json!([
                {"Effect": "Allow", "Action": ["dynamodb:Get*", "s3:GetObject"], "Resource": ["table/a", "table/b/*"]},
                {"Effect": "Deny", "Action": "*", "Resource": "table/b/secret-?"},
            ]),
            &[],
        );
        for (action, resource, may) in [
            ("dynamodb:GetItem", "table/a", true),
            ("DynamoDB:getitem", "table/a", true),
            ("dynamodb:PutItem", "table/a", false),
            ("dynamodb:GetItem", "table/ab", false),
            ("dynamodb:GetItem", "TABLE/A", false),
            ("s3:GetObject", "table/b/x/y", true),
            ("s3:GetObject", "table/b/secret-1", false),
            ("s3:GetObject", "table/b/secret-12", true),
        ] {
            assert_eq!(chat.may(&on(action, resource)), may, "{action} on {resource}");
        }
        let two = [on("s3:GetObject", "table/a"), on("s3:PutObject", "table/a")];
        assert!(chat.refused(&two[..1]).is_none());
        assert!(chat.refused(&two).unwrap().contains("s3:PutObject on resource: table/a"));
        assert!(Caller::operator(chat.credentials).may(&two[1]));
    }

    #[test]
    fn a_tenants_session_reaches_its_own_keys_and_no_others() {
        let statement = json!({
            "Effect": "Allow", "Action": "dynamodb:GetItem", "Resource": "table/notes",
            "Condition": {
                "ForAllValues:StringEquals": {"dynamodb:LeadingKeys": ["${aws:PrincipalTag/tenant_id}"]},
                "Null": {"dynamodb:LeadingKeys": "false", "aws:PrincipalTag/tenant_id": "false"},
            },
        });
        let acme = caller(statement.clone(), &[("tenant_id", "acme")]);
        assert!(acme.may(&keys(&["acme"])) && acme.may(&keys(&["acme", "acme"])));
        assert!(!acme.may(&keys(&["globex"])) && !acme.may(&keys(&["acme", "globex"])));
        assert!(!acme.may(&on("dynamodb:GetItem", "table/notes")), "no key at all");
        let nobody = caller(statement, &[]);
        assert!(!nobody.may(&keys(&["acme"])) && !nobody.may(&keys(&[""])));
        // Without the guard, the absent key passes: this is why it is there.
        let careless = json!({
            "Effect": "Allow", "Action": "dynamodb:GetItem", "Resource": "table/notes",
            "Condition": {"ForAllValues:StringEquals": {"dynamodb:LeadingKeys": "${aws:PrincipalTag/tenant_id}"}},
        });
        assert!(caller(careless, &[("tenant_id", "acme")]).may(&on("dynamodb:GetItem", "table/notes")));
        let bucket = json!({"Effect": "Allow", "Action": "s3:GetObject",
            "Resource": "arn:aws:s3:::docs/tenant=${aws:PrincipalTag/tenant_id}/*"});
        let acme = caller(bucket.clone(), &[("tenant_id", "acme")]);
        assert!(acme.may(&on("s3:GetObject", "arn:aws:s3:::docs/tenant=acme/x")));
        assert!(!acme.may(&on("s3:GetObject", "arn:aws:s3:::docs/tenant=acme1/x")));
        assert!(!caller(bucket, &[]).may(&on("s3:GetObject", "arn:aws:s3:::docs/tenant=/x")));
    }

    #[test]
    fn operators_are_told_apart() {
        let with = |condition: Value| {
            caller(json!({"Effect": "Allow", "Action": "*", "Resource": "*", "Condition": condition}), &[])
        };
        let holds = |condition: Value, values: &[&str]| with(condition).may(&keys(values));
        let key = "dynamodb:LeadingKeys";
        assert!(holds(json!({"StringEquals": {key: ["a", "b"]}}), &["b"]));
        assert!(!holds(json!({"StringEquals": {key: "a*"}}), &["ab"]));
        assert!(holds(json!({"StringLike": {key: "a*"}}), &["ab"]));
        assert!(!holds(json!({"StringNotLike": {key: "a*"}}), &["ab"]));
        assert!(holds(json!({"ForAnyValue:StringEquals": {key: "a"}}), &["b", "a"]));
        assert!(!holds(json!({"StringEquals": {"s3:prefix": "a"}}), &["a"]));
        assert!(holds(json!({"StringEqualsIfExists": {"s3:prefix": "a"}}), &["a"]));
        assert!(holds(json!({"StringNotEquals": {"s3:prefix": "a"}}), &["a"]));
        assert!(holds(json!({"Null": {"s3:prefix": true}}), &["a"]));
    }

    #[test]
    fn a_policy_without_a_grant_lacks_that_alone() {
        let statement =
            |actions: Value| json!({"Effect": "Allow", "Action": actions, "Resource": ["a", "b"]});
        let document = json!({"Version": "2012-10-17", "Statement": [statement(json!(["x", "y"])), statement(json!("z"))]});
        let policy = Policy::parse(&document).unwrap();
        let grants = policy.grants();
        assert_eq!(grants.len(), 6);
        for taken in &grants {
            let less = [policy.without(taken)];
            for other in &grants {
                let intent = on(&other.action, &other.resource);
                assert_eq!(allow(&less, &BTreeMap::new(), &intent), other != taken, "{taken:?} {other:?}");
            }
        }
    }

    #[test]
    fn what_roles_were_allowed_is_remembered_once() {
        let chat = caller(json!({"Effect": "Allow", "Action": "x", "Resource": "a"}), &[("t", "acme")]);
        let operator = Caller::operator(chat.credentials.clone());
        let callers = Callers::default();
        for who in [&chat, &chat, &operator] {
            assert_eq!(callers.refused(who, &[on("x", "a")]), None);
        }
        assert!(callers.refused(&chat, &[on("x", "a"), on("x", "b")]).is_some());
        let tags = BTreeMap::from([("t".to_owned(), "acme".to_owned())]);
        let role = chat.role.clone().unwrap();
        assert_eq!(callers.deeds(), [Deed { role, tags, intent: on("x", "a") }]);
    }

    #[test]
    fn what_is_not_known_is_no_policy() {
        let statement = |name: &str, value: Value| {
            let mut statement = json!({"Effect": "Allow", "Action": "a", "Resource": "b"});
            statement[name] = value;
            Policy::parse(&json!({"Version": "2012-10-17", "Statement": [statement]}))
        };
        for (name, value) in [
            ("NotAction", json!("x")),
            ("Principal", json!("*")),
            ("Effect", json!("Maybe")),
            ("Action", json!(7)),
            ("Condition", json!({"DateLessThan": {"aws:CurrentTime": "x"}})),
            ("Condition", json!({"ForSomeValues:StringEquals": {"s3:prefix": "x"}})),
            ("Condition", json!({"NullIfExists": {"s3:prefix": "x"}})),
            ("Condition", json!("none")),
            ("Condition", json!([{"StringEquals": {"s3:prefix": "x"}}])),
            ("Condition", json!({"StringNotEquals": {"aws:SourceVpc": "x"}})),
            ("Condition", json!({"StringEquals": {"S3:Prefix": "x"}})),
            ("Condition", json!({"StringNotEquals": {"s3:prefix": "${aws:username}"}})),
            ("Resource", json!("table/${aws:userid}")),
            ("Resource", json!("table/${aws:PrincipalTag/tenant_id")),
        ] {
            assert!(statement(name, value.clone()).is_err(), "{name}: {value}");
        }
        assert!(statement("Sid", json!("x")).is_ok());
        assert!(statement("Condition", json!({"StringEquals": {"s3:prefix": "x"}})).is_ok());
        assert!(Policy::parse(&json!({"Statement": []})).is_err(), "an old language");
    }

    #[test]
    fn patterns() {
        for (pattern, text, matched) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abbd", false),
            ("a*b*c", "axbybzc", true),
            ("?", "ä", true),
            ("", "a", false),
            ("a**", "a", true),
        ] {
            assert_eq!(matches(pattern, text), matched, "{pattern} {text}");
        }
    }
}
