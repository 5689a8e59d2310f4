//! What the tenant roles of the template open, statement by statement: a session's own tenant, and
//! nothing of another's (I1).

use std::path::Path;

use serde_json::json;

use super::*;
use crate::template::{Template, function_role_arn};

const TENANT: &str = "${aws:PrincipalTag/tenant_id}";
/// Names that a careless pattern, or a person, takes for `acme`.
const OTHERS: [&str; 11] =
    ["globex", "acme1", "acme-1", "acm", "ACME", "acme#", "issuer#x", "*", "a?me", TENANT, ""];

fn template() -> Template {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml");
    let cells = ("QdrantCells".to_owned(), "default=http://x.example".to_owned());
    Template::load(&path, &[cells].into()).unwrap()
}

/// A caller in a role, with these tags.
fn session(role: &Role, tags: &[(&str, &str)]) -> Caller {
    let credentials = Credentials {
        access_key_id: "ASIA1".into(),
        secret_access_key: "s".into(),
        region: "us-east-1".into(),
        user_arn: "arn:aws:sts::0:assumed-role/x".into(),
    };
    let tags = tags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Caller { tags, ..Caller::in_role(credentials, role.arn.clone(), role.policies.clone()) }
}

fn name(role: &Role) -> &str {
    role.arn.rsplit("bulkhead-").next().unwrap()
}

/// A text that a pattern lets through, for a tenant.
fn example(pattern: &str, tenant: &str) -> String {
    let parts = pattern.split(TENANT).map(|part| part.replace(['*', '?'], "x"));
    parts.collect::<Vec<_>>().join(tenant)
}

/// The shortenings of a pattern's example that no longer name the tenant whole, what follows it included.
fn shortened(pattern: &str, tenant: &str) -> Vec<String> {
    let Some((before, _)) = pattern.split_once(TENANT) else { return Vec::new() };
    let whole = example(pattern, tenant);
    let end = before.len() + tenant.len();
    (0..=end.min(whole.len() - 1)).filter_map(|length| whole.get(..length).map(str::to_owned)).collect()
}

impl Statement {
    fn is_a_tenants(&self) -> bool {
        let values = self.conditions.iter().flat_map(|condition| &condition.values);
        self.resources.iter().chain(values).any(|text| text.contains(TENANT))
    }

    /// What it would let a tenant's session do, on each of its resources with each of its actions.
    fn intents(&self, tenant: &str) -> Vec<Intent> {
        let asked = self.conditions.iter().filter(|condition| condition.test != Test::Null);
        let context: BTreeMap<String, Vec<String>> = asked
            .map(|condition| {
                let values = condition.values.iter().map(|value| example(value, tenant));
                (condition.key.clone(), values.collect())
            })
            .collect();
        let resources = self.resources.iter().map(|resource| example(resource, tenant));
        resources
            .flat_map(|resource| {
                self.actions.iter().map({
                    let context = context.clone();
                    move |action| Intent { context: context.clone(), ..Intent::new(action, &resource) }
                })
            })
            .collect()
    }
}

#[test]
fn a_tenant_roles_session_opens_its_own_tenant_with_every_statement_and_no_other() {
    let template = template();
    let mut unbound = Vec::new();
    for role in &template.roles {
        let (acme, nobody) = (session(role, &[("tenant_id", "acme")]), session(role, &[]));
        for statement in role.policies.iter().flat_map(|policy| &policy.0) {
            assert!(statement.allows, "{}: {statement:?}", role.arn);
            assert!(!statement.actions.iter().any(|action| action.contains(['*', '?'])), "{statement:?}");
            if !statement.is_a_tenants() {
                unbound.push((name(role), statement.clone()));
                continue;
            }
            for own in statement.intents("acme") {
                assert!(acme.may(&own), "{}: {own:?}", role.arn);
                assert!(!nobody.may(&own), "without a tag, {}: {own:?}", role.arn);
                // Not with less said than the statement asks for, nor with another's beside it.
                for key in own.context.keys() {
                    let mut less = own.clone();
                    less.context.remove(key);
                    assert!(!acme.may(&less), "without {key}, {}: {own:?}", role.arn);
                    less.context.insert(key.clone(), Vec::new());
                    assert!(!acme.may(&less), "with no {key}, {}: {own:?}", role.arn);
                    let mut more = own.clone();
                    more.context.entry(key.clone()).or_default().push("globex".to_owned());
                    assert!(!acme.may(&more), "with more of {key}, {}: {own:?}", role.arn);
                }
            }
            for other in OTHERS {
                for foreign in statement.intents(other) {
                    assert!(!acme.may(&foreign), "{}: {foreign:?}", role.arn);
                    assert!(!nobody.may(&foreign), "without a tag, {}: {foreign:?}", role.arn);
                }
            }
            // Not the beginning of a name either, which may be another's, or of a folder that holds all.
            for resource in &statement.resources {
                for short in shortened(resource, "acme") {
                    for own in statement.intents("acme") {
                        let intent = Intent { resource: short.clone(), ..own };
                        assert!(!acme.may(&intent), "{}: {intent:?}", role.arn);
                    }
                }
            }
            for condition in &statement.conditions {
                for short in condition.values.iter().flat_map(|value| shortened(value, "acme")) {
                    for mut own in statement.intents("acme") {
                        own.context.insert(condition.key.clone(), vec![short.clone()]);
                        assert!(!acme.may(&own), "{}: {own:?}", role.arn);
                    }
                }
            }
        }
    }
    // The one exception: whose the tokens of which issuer are lies in partitions that are no tenant's, and the
    // function of the keys writes there that a tenant holds the name, and which issuer of its that is.
    let claims = json!({
        "Effect": "Allow",
        "Action": "dynamodb:UpdateItem",
        "Resource": "arn:aws:dynamodb:us-east-1:000000000000:table/bulkhead-tenants",
        "Condition": {
            "ForAllValues:StringLike": {"dynamodb:LeadingKeys": "issuer#*"},
            "ForAllValues:StringEquals": {"dynamodb:Attributes": [
                "tenant_id", "sk", "holder", "issuer_id", "since",
            ]},
            "Null": {"dynamodb:LeadingKeys": "false", "dynamodb:Attributes": "false"},
        },
    });
    let claims = Statement::parse(&claims).unwrap();
    let same = |other: &Statement| {
        let sorted = |statement: &Statement| {
            let mut conditions = statement.conditions.clone();
            conditions.sort_by_key(|condition| format!("{condition:?}"));
            Statement { conditions, ..statement.clone() }
        };
        sorted(other) == sorted(&claims)
    };
    let [("KeysTenantRole", found)] = unbound.as_slice() else { panic!("{unbound:?}") };
    assert!(same(found), "{found:?}");
}

#[test]
fn the_function_of_the_keys_writes_issuers_claims_and_nothing_else_that_is_no_tenants() {
    let template = template();
    let role = template.roles.iter().find(|role| name(role) == "KeysTenantRole").unwrap();
    let keys = session(role, &[("tenant_id", "acme")]);
    let table = "arn:aws:dynamodb:us-east-1:000000000000:table/bulkhead-tenants";
    let may = |action: &str, partitions: &[&str], attributes: &[&str]| {
        let mut intent = Intent::new(format!("dynamodb:{action}"), table);
        let all = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        intent.context.insert("dynamodb:LeadingKeys".to_owned(), all(partitions));
        intent.context.insert("dynamodb:Attributes".to_owned(), all(attributes));
        keys.may(&intent)
    };
    let claim = ["tenant_id", "sk", "holder", "issuer_id", "since"];
    assert!(may("UpdateItem", &["issuer#x"], &claim));
    for action in
        ["PutItem", "DeleteItem", "GetItem", "Query", "Scan", "BatchWriteItem", "ConditionCheckItem"]
    {
        assert!(!may(action, &["issuer#x"], &claim), "{action}");
    }
    for action in ["PutItem", "UpdateItem"] {
        for partitions in [&["globex"][..], &["issuer#x", "globex"], &["issuer"], &["xissuer#x"], &[]] {
            assert!(!may(action, partitions, &claim), "{action} {partitions:?}");
        }
        // Of its own tenant it writes keys and issuers; what a claim says is no part of those.
        assert!(!may(action, &["acme"], &claim), "{action}");
        for more in ["limits", "status", "epoch", "secret_hash", "permissions"] {
            assert!(!may(action, &["issuer#x"], &["tenant_id", "sk", more]), "{action} {more}");
        }
        assert!(!may(action, &["issuer#x"], &[]), "{action}");
    }
}

#[test]
fn a_tenant_role_is_assumed_by_its_own_function_with_the_one_tag() {
    let template = template();
    let mut trusted = Vec::new();
    for role in &template.roles {
        let own = format!("{}Role", name(role).strip_suffix("TenantRole").unwrap());
        let arn = role.arn.replace(name(role), &own);
        let trust = json!({"Version": "2012-10-17", "Statement": {
            "Effect": "Allow", "Principal": {"AWS": arn}, "Action": ["sts:AssumeRole", "sts:TagSession"],
            "Condition": {
                "Null": {"aws:RequestTag/tenant_id": "false"},
                "ForAllValues:StringEquals": {"aws:TagKeys": "tenant_id"},
            },
        }});
        let trust = Trust::parse(&trust).unwrap();
        let tags = |tags: &[(&str, &str)]| {
            tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        for function in &template.functions {
            let caller = Caller { role: Some(function_role_arn(&function.logical_id)), ..session(role, &[]) };
            let meant = caller.role.as_deref() == Some(arn.as_str());
            let acme = ("tenant_id", "acme");
            assert_eq!(
                role.refused(&caller, &tags(&[acme])).is_none(),
                meant,
                "{} {arn}",
                function.logical_id
            );
            for other in [&[][..], &[acme, ("more", "x")], &[("tenant", "acme")], &[("TENANT_ID", "acme")]] {
                assert!(role.refused(&caller, &tags(other)).is_some(), "{} {other:?}", function.logical_id);
            }
            // Who may assume it is who is told of it.
            let told = function.environment.get("TENANT_ROLE_ARN") == Some(&role.arn);
            assert_eq!(told, meant, "{}", function.logical_id);
            trusted.extend(meant.then_some(function.logical_id.as_str()));
        }
        let sorted = |trust: &Trust| {
            let mut text: Vec<String> = trust
                .0
                .iter()
                .map(|(who, statement)| {
                    let mut conditions: Vec<String> =
                        statement.conditions.iter().map(|c| format!("{c:?}")).collect();
                    conditions.sort();
                    format!("{who:?} {} {:?} {conditions:?}", statement.allows, statement.actions)
                })
                .collect();
            text.sort();
            text
        };
        assert_eq!(sorted(&role.trust), sorted(&trust), "{}", role.arn);
    }
    trusted.sort_unstable();
    let isolated = template.functions.iter().filter(|function| function.tenant_isolation);
    let mut isolated: Vec<&str> = isolated.map(|function| function.logical_id.as_str()).collect();
    // What a queue drives cannot be in the mode, and acts for one tenant at a time all the same.
    isolated.push("UploadIngestion");
    isolated.sort_unstable();
    assert_eq!(trusted, isolated, "whoever serves tenants acts with their sessions");
}
