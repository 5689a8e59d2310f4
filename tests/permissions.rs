//! Least privilege, from both sides (I1): every call that the functions make is allowed by their roles in
//! the template, as the stack sees to; and the roles allow nothing that no function ever does.
//!
//! A stack with everything in it is walked through. What each role was allowed is then held against the
//! template's own policies: taken out of them, each grant must be missed by some call.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use axum::Router;
use axum::routing::any;
use local::iam::{Deed, Grant, Intent, Policy, allow};
use local::template::{Template, function_arn, function_role_arn, secret_arn};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::api_key::ApiKey;
use shared::clock::{Clock, Timestamp};
use shared::meter::Lease;
use shared::random::entropy;
use shared::tenant::Tier;
use tests::reranker::Reranker;
use tests::tokens::Signer;
use tests::{Answer, Options, Stack, Tenant, next_event, put_file, until};
use tokio::net::TcpListener;
use tokio::time::sleep;

/// Grants that no call of the walk needs, each with the reason why it is there all the same.
const NOT_WALKED: [(&str, &str, &str, &str); 4] = [
    (
        "AuditExport",
        "sqs:SendMessage",
        "bulkhead-ledger-failures",
        "what Lambda does once a record has failed a hundred times: the local stack's own tests do it",
    ),
    (
        "Provisioning",
        "dynamodb:GetItem",
        "table/bulkhead-meters",
        "whether a tenant that moves to another cell is at rest: tests/tenants.rs",
    ),
    (
        "Provisioning",
        "dynamodb:Query",
        "table/bulkhead-audit",
        "whether records are kept once the log's objects are gone, after years: tests/deprovisioning.rs",
    ),
    (
        "Provisioning",
        "dynamodb:Query",
        "table/bulkhead-usage",
        "whether bills are kept once the log's objects are gone, after years: tests/deprovisioning.rs",
    ),
];

/// A role of the template.
struct Role {
    /// What the template calls it: the function, or the role itself.
    name: String,
    arn: String,
    policies: Vec<Policy>,
}

fn roles(template: &Template) -> Vec<Role> {
    let functions = template.functions.iter().map(|function| Role {
        name: function.logical_id.clone(),
        arn: function_role_arn(&function.logical_id),
        policies: function.policies.clone(),
    });
    let others = template.roles.iter().map(|role| Role {
        name: role.arn.rsplit('/').next().unwrap().trim_start_matches("bulkhead-").to_owned(),
        arn: role.arn.clone(),
        policies: role.policies.clone(),
    });
    functions.chain(others).collect()
}

fn template() -> Template {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../infra/template.yaml");
    // With everything that is optional and needs a permission.
    let given = [("QdrantCells", "default=https://x.example"), ("RerankUrl", "https://x.example")];
    let given = given.map(|(name, value)| (name.to_owned(), value.to_owned()));
    Template::load(&path, &given.into()).unwrap()
}

/// A role's policies without one grant of one of them.
fn without(role: &Role, policy: usize, grant: &Grant) -> Vec<Policy> {
    let mut policies = role.policies.clone();
    policies[policy] = policies[policy].without(grant);
    policies
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_allow_what_functions_do_and_nothing_that_none_does() {
    let template = template();
    let deeds = walked(&template).await;
    let roles = roles(&template);
    let mut by_role: BTreeMap<&str, Vec<&Deed>> = BTreeMap::new();
    for deed in &deeds {
        by_role.entry(deed.role.as_str()).or_default().push(deed);
    }
    // What is remembered is allowed by the template as it is read here: nothing was let through by mistake.
    let mut unused = BTreeSet::new();
    for role in &roles {
        let own = by_role.remove(role.arn.as_str()).unwrap_or_default();
        let (assuming, own): (Vec<_>, Vec<_>) =
            own.into_iter().partition(|d| d.intent.action.starts_with("sts:"));
        for deed in &own {
            assert!(allow(&role.policies, &deed.tags, &deed.intent), "{}: {deed:?}", role.name);
        }
        for (at, policy) in role.policies.iter().enumerate() {
            for grant in policy.grants() {
                let less = without(role, at, &grant);
                let missed = own.iter().any(|deed| !allow(&less, &deed.tags, &deed.intent));
                let resource = grant.resource.rsplit([':']).next().unwrap_or_default().to_owned();
                let known = NOT_WALKED.iter().any(|(name, action, on, _)| {
                    *name == role.name && *action == grant.action && *on == resource
                });
                if missed == known {
                    let what = if known { "is needed, and said not to be" } else { "is needed by nothing" };
                    unused.insert(format!("{}: {} on {resource} {what}", role.name, grant.action));
                }
            }
        }
        // A function assumes its own tenants' role alone.
        for deed in assuming {
            assert!(deed.intent.resource.ends_with(&format!("-{}TenantRole", role.name)), "{deed:?}");
        }
    }
    assert_eq!(by_role.keys().collect::<Vec<_>>(), Vec::<&&str>::new(), "roles of no template");
    assert_eq!(unused, BTreeSet::new(), "{unused:#?}");
    for role in &template.roles {
        let actions: BTreeSet<&str> = deeds
            .iter()
            .filter(|deed| deed.intent.resource == role.arn)
            .map(|deed| deed.intent.action.as_str())
            .collect();
        assert_eq!(actions, BTreeSet::from(["sts:AssumeRole", "sts:TagSession"]), "{}", role.arn);
    }
}

/// A file's data key is bound to the file, whose ARN S3 gives KMS. With a key for the whole bucket it would give the
/// bucket's, and a data key would go on opening files when its tenant's key is off.
#[test]
fn no_file_shares_its_data_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../infra/template.yaml");
    let template: serde_yaml_ng::Value =
        serde_yaml_ng::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let bucket = &template["Resources"]["DocumentsBucket"]["Properties"]["BucketEncryption"];
    let rules = bucket["ServerSideEncryptionConfiguration"].as_sequence().unwrap();
    assert!(!rules.is_empty() && rules.iter().all(|rule| rule["BucketKeyEnabled"] == false), "{rules:?}");
}

/// What no role may do, whatever it is for; and what each may not that others may.
#[test]
fn what_no_role_allows() {
    let template = template();
    let roles = roles(&template);
    let acme = BTreeMap::from([("tenant_id".to_owned(), "acme".to_owned())]);
    let table = |name: &str| format!("arn:aws:dynamodb:us-east-1:000000000000:table/bulkhead-{name}");
    let secret = |name: &str| secret_arn(&format!("bulkhead/{name}"));
    let bucket = |name: &str, key: &str| format!("arn:aws:s3:::bulkhead-{name}-000000000000{key}");
    let may = |role: &Role, action: &str, resource: &str, keys: &[(&str, &str)]| {
        let mut intent = Intent::new(action, resource);
        intent.context = keys.iter().map(|(k, v)| ((*k).to_owned(), vec![(*v).to_owned()])).collect();
        allow(&role.policies, &acme, &intent)
    };
    let tables = template.tables.iter().map(|t| t.name.trim_start_matches("bulkhead-").to_owned());
    let tables: Vec<String> = tables.collect();
    let nobodys: [(&[&str], Vec<String>); 6] = [
        (
            &[
                "dynamodb:DeleteTable",
                "dynamodb:UpdateTable",
                "dynamodb:UpdateContinuousBackups",
                "dynamodb:UpdateTimeToLive",
                "dynamodb:PartiQLSelect",
                "dynamodb:ExportTableToPointInTime",
            ],
            tables.iter().map(|name| table(name)).collect(),
        ),
        // Of what the law keeps, nothing is deleted, and nothing of it unlocked (I4).
        (&["dynamodb:DeleteItem", "dynamodb:BatchWriteItem"], ["audit", "usage"].map(table).into()),
        (
            &[
                "s3:DeleteObject",
                "s3:DeleteObjectVersion",
                "s3:BypassGovernanceRetention",
                "s3:PutObjectLegalHold",
            ],
            vec![bucket("audit", "/tenant=acme/1")],
        ),
        (
            &[
                "s3:PutBucketPolicy",
                "s3:PutBucketObjectLockConfiguration",
                "s3:PutLifecycleConfiguration",
                "s3:DeleteBucket",
            ],
            vec![bucket("audit", ""), bucket("documents", "")],
        ),
        (
            &["secretsmanager:PutSecretValue", "secretsmanager:CreateSecret", "secretsmanager:DeleteSecret"],
            ["qdrant/root-key", "model/api-key", "embeddings/api-key", "rerank/api-key", "webhooks/key"]
                .map(secret)
                .into(),
        ),
        (
            &["iam:PassRole", "iam:CreateRole", "sts:AssumeRole", "lambda:InvokeFunction", "kms:Decrypt"],
            vec!["*".to_owned(), "arn:aws:iam::000000000000:role/bulkhead-ChatTenantRole".to_owned()],
        ),
    ];
    for role in &roles {
        let name = &role.name;
        for (actions, resources) in &nobodys {
            for (action, resource) in actions.iter().flat_map(|a| resources.iter().map(move |r| (a, r))) {
                assert!(!may(role, action, resource, &[]), "{name}: {action} on {resource}");
            }
        }

        // Tenants' own keys: for data keys of the one tenant, and for nothing else.
        let key = "arn:aws:kms:us-east-1:111122223333:key/8d7e3b1c";
        for action in [
            "kms:CreateGrant",
            "kms:DescribeKey",
            "kms:DisableKey",
            "kms:Encrypt",
            "kms:PutKeyPolicy",
            "kms:ReEncryptFrom",
            "kms:ScheduleKeyDeletion",
        ] {
            assert!(
                !may(role, action, key, &[("kms:EncryptionContext:tenant_id", "acme")]),
                "{name}: {action}"
            );
        }
        for action in ["kms:Decrypt", "kms:GenerateDataKey", "kms:GenerateDataKeyWithoutPlaintext"] {
            assert!(!may(role, action, key, &[]), "{name}: {action} for nobody");
            let opens = |tenant| may(role, action, key, &[("kms:EncryptionContext:tenant_id", tenant)]);
            let shown = ["ChatTenantRole", "IngestionTenantRole", "UploadIngestionTenantRole"]
                .contains(&&**name)
                && !action.ends_with("Plaintext");
            assert_eq!(
                opens("acme"),
                shown || *name == "Provisioning" && action.ends_with("Plaintext"),
                "{name}: {action}"
            );
            assert!(!opens("globex") || *name == "Provisioning", "{name}: {action} of another");
        }

        // The vector store's own key: those who make tokens and collections.
        let roots = may(role, "secretsmanager:GetSecretValue", &secret("qdrant/root-key"), &[]);
        assert_eq!(
            roots,
            ["Authorizer", "UploadAuthorizer", "Provisioning", "Eraser"].contains(&&**name),
            "{name}"
        );
        // The reranker's key: those who search. Its calls cost money, and see passages.
        let reranks = may(role, "secretsmanager:GetSecretValue", &secret("rerank/api-key"), &[]);
        assert_eq!(reranks, ["Chat", "Ingestion"].contains(&&**name), "{name}");
        // A stream holds every tenant's changes, and is read for the one function that it drives.
        for (table_name, reader) in [("audit", "AuditExport"), ("tenants", "Eraser")] {
            let stream = format!("{}/stream/2026-01-01T00:00:00.000", table(table_name));
            for action in ["dynamodb:DescribeStream", "dynamodb:GetRecords", "dynamodb:GetShardIterator"] {
                assert_eq!(may(role, action, &stream, &[]), name == reader, "{name}: {action} {table_name}");
            }
        }
        // Passages and turns are read by those alone who answer from them; scans are nobody's who acts for tenants.
        for t in &tables {
            let scans = may(role, "dynamodb:Scan", &table(t), &[("dynamodb:LeadingKeys", "acme")]);
            assert!(!scans || !name.ends_with("TenantRole"), "{name} scans {t}");
        }
        let reads = |table_name: &str| {
            ["dynamodb:GetItem", "dynamodb:Query", "dynamodb:Scan", "dynamodb:BatchGetItem"]
                .iter()
                .any(|action| may(role, action, &table(table_name), &[("dynamodb:LeadingKeys", "acme")]))
        };
        assert_eq!(reads("conversations"), ["ChatTenantRole", "Eraser"].contains(&&**name), "{name}");
        let readers = [
            // In which edition a document is found that is just changing.
            "ChatTenantRole",
            "IngestionTenantRole",
            "UploadIngestionTenantRole",
            "UploadAuthorizer",
            "Eraser",
        ];
        assert_eq!(reads("documents"), readers.contains(&&**name), "{name}");
        // Files are read by the one function that is made for it, and the authorizer of uploads is asked by it alone.
        let file = bucket("documents", "/tenant=acme/uploads/upl_x");
        let reads = may(role, "s3:GetObject", &file, &[]) || may(role, "s3:GetObjectVersion", &file, &[]);
        assert_eq!(reads, name == "UploadIngestionTenantRole", "{name}");
        let asks = may(role, "lambda:InvokeFunction", &function_arn("bulkhead-upload-authorizer"), &[]);
        assert_eq!(asks, name == "UploadIngestion", "{name}");
        // A session is its tenant's.
        if name.ends_with("TenantRole") {
            for t in &tables {
                for action in [
                    "dynamodb:GetItem",
                    "dynamodb:PutItem",
                    "dynamodb:UpdateItem",
                    "dynamodb:DeleteItem",
                    "dynamodb:Query",
                ] {
                    for other in ["globex", "acme1", "*", ""] {
                        let keys = [("dynamodb:LeadingKeys", other)];
                        assert!(!may(role, action, &table(t), &keys), "{name}: {action} {t} of {other}");
                    }
                    assert!(!may(role, action, &table(t), &[]), "{name}: {action} {t} of nobody");
                }
            }
        }
    }
}

// ---- the walk

async fn with_key(tenant: &Tenant, path: &str, key: &str, body: Value) -> Answer {
    let request = tenant.request(Method::POST, path).header("idempotency-key", key).json(&body);
    Answer::read(request.send().await.unwrap()).await
}

/// A server that takes webhooks.
async fn receiver() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let routes = Router::new().fallback(any(async || StatusCode::NO_CONTENT.as_u16().to_string()));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    url
}

/// Everything that a tenant's application does, once.
async fn application(stack: &Stack, tenant: &Tenant) {
    for document in ["handbook", "lease"] {
        tenant.store(document, document, &format!("The {document} says 25 days.")).await;
    }
    tenant.store("handbook", "handbook", "The handbook says 26 days.").await;
    tenant.get("/v1/documents").await.expect_status(StatusCode::OK);
    tenant.get("/v1/documents/handbook").await.expect_status(StatusCode::OK);
    tenant.delete("/v1/documents/lease").await.expect_status(StatusCode::NO_CONTENT);
    tenant.upload("uploaded", "text/plain", b"The file says 27 days.".to_vec()).await;
    tenant.delete("/v1/documents/uploaded").await.expect_status(StatusCode::NO_CONTENT);
    let (question, search) = (json!({"message": "How many days?"}), json!({"query": "days"}));
    with_key(tenant, "/v1/search", "search", search.clone()).await.expect_status(StatusCode::OK);
    let first =
        with_key(tenant, "/v1/chat", "chat", question.clone()).await.expect_status(StatusCode::OK).json();
    with_key(tenant, "/v1/chat", "chat", question.clone()).await.expect_status(StatusCode::OK);
    let goes_on = json!({"message": "And of leave?", "conversation_id": first["conversation_id"]});
    tenant.chat(goes_on).await.expect_status(StatusCode::OK);
    let mut stream = tenant.open_stream(question.clone()).await;
    let mut buffer = Vec::new();
    while next_event(&mut stream, &mut buffer).await.is_some() {}
    let completion = json!({"messages": [{"role": "user", "content": "How many days?"}]});
    with_key(tenant, "/v1/chat/completions", "completion", completion).await.expect_status(StatusCode::OK);
    tenant.get("/v1/models").await.expect_status(StatusCode::OK);
    tenant.get("/v1/conversations").await.expect_status(StatusCode::OK);
    let conversation = format!("/v1/conversations/{}", first["conversation_id"].as_str().unwrap());
    tenant.get(&conversation).await.expect_status(StatusCode::OK);
    let rated =
        with_key(tenant, "/v1/feedback", "feedback", json!({"id": first["id"], "rating": "up"})).await;
    rated.expect_status(StatusCode::CREATED);
    tenant.delete(&conversation).await.expect_status(StatusCode::NO_CONTENT);
    tenant.get("/v1/usage").await.expect_status(StatusCode::OK);
    until("the export", async || exported(stack, tenant).await.then_some(())).await;
    tenant.get("/v1/audit").await.expect_status(StatusCode::OK);
    let export = with_key(tenant, "/v1/audit/exports", "export", json!({})).await;
    let export = export.expect_status(StatusCode::CREATED).json();
    let export = format!("/v1/audit/exports/{}", export["export_id"].as_str().unwrap());
    let export = tenant.get(&export).await.expect_status(StatusCode::OK).json();
    // A link is opened with the session that signed it.
    for object in export["manifest"]["objects"].as_array().unwrap() {
        let link = tests::client().get(object["url"].as_str().unwrap()).send().await.unwrap();
        assert_eq!(link.status(), StatusCode::OK);
    }

    tenant.get("/v1/keys").await.expect_status(StatusCode::OK);
    let made = with_key(tenant, "/v1/keys", "key", json!({"scopes": ["chat"]})).await;
    let made = made.expect_status(StatusCode::CREATED).json();
    let made = format!("/v1/keys/{}", made["key_id"].as_str().unwrap());
    let turned = tenant.post(&format!("{made}/rotate"), &json!({"grace_seconds": 60})).await;
    turned.expect_status(StatusCode::CREATED);
    with_key(tenant, &format!("{made}/rotate"), "again", json!({})).await.expect_error(409, "conflict");
    tenant.delete(&made).await.expect_status(StatusCode::NO_CONTENT);
    let issuer = json!({"issuer": format!("https://login.{}.example", tenant.id), "audience": tenant.id,
        "keys": [Signer::ed25519("k").public()]});
    let issuer = tenant.post("/v1/issuers", &issuer).await.expect_status(StatusCode::CREATED).json();
    let issuer = format!("/v1/issuers/{}", issuer["issuer_id"].as_str().unwrap());
    tenant.get("/v1/issuers").await.expect_status(StatusCode::OK);
    tenant.get(&issuer).await.expect_status(StatusCode::OK);
    tenant.delete(&issuer).await.expect_status(StatusCode::NO_CONTENT);

    // With a key of an idempotent request that ends badly, the key is given back.
    let unread = json!({"mode": "error", "operation": "GetItem", "table": "usage"});
    stack.dynamodb_faults(json!({"rules": [unread]})).await;
    with_key(tenant, "/v1/audit/exports", "unread", json!({})).await.expect_error(503, "unavailable");
    stack.clear_dynamodb_faults().await;
    stack.model_fault(json!({"mode": "status", "status": 400, "count": 1})).await;
    let failed = with_key(tenant, "/v1/chat", "failing", question).await;
    assert!(!failed.status.is_success(), "{}", failed.text);
}

/// Walks through everything that functions do, and says what their roles were allowed on the way.
async fn walked(template: &Template) -> Vec<Deed> {
    let (_reranker, rerank_url) = Reranker::start().await;
    let parameters = vec![
        ("RerankUrl", rerank_url),
        ("AuthorizerCacheSeconds", "1".to_owned()),
        ("WebhookReceivers", "loopback".to_owned()),
        ("ModelMaxInFlight", "100".to_owned()),
    ];
    let stack = Stack::start_with(Options { parameters, no_seed: true, ..Options::default() }).await;
    let limits = json!({"requests_per_minute": 20_000, "max_concurrent": 200,
        "tokens_per_day": 1_000_000_000_u64, "monthly_token_budget": 10_000_000_000_u64});
    let new = |id: &str| json!({"tenant_id": id, "tier": "enterprise", "company_name": id, "limits": limits});
    let acme = stack.provision(new("acme")).await;
    stack.provision(new("globex")).await;
    let initech = stack.provision(new("initech")).await;
    application(&stack, &acme).await;

    // A key that is well formed and nobody's is written down.
    let forged = ApiKey::issue(Tier::Enterprise, "acme".parse().unwrap(), &mut entropy());
    acme.with_key(&forged.expose()).get("/v1/usage").await.expect_error(401, "invalid_key");

    // Decisions from before a change are made anew, by each function.
    stack.change_tenant("acme", json!({"assistant_name": "Ada"})).await;
    application_again(&acme).await;

    // Limits that refuse, with keys that are given back.
    stack.change_tenant("acme", json!({"limits": {"tokens_per_day": 0}})).await;
    for (path, body) in [
        ("/v1/chat", json!({"message": "How many?"})),
        ("/v1/search", json!({"query": "days"})),
        ("/v1/documents", json!({"title": "t", "content": "More than nothing."})),
    ] {
        with_key(&acme, path, "refused", body).await.expect_error(429, "token_budget_exceeded");
    }
    stack.change_tenant("acme", json!({"limits": {"tokens_per_day": 1_000_000_000_u64}})).await;

    // A tenant with an account of its own.
    stack.create_secret("bulkhead/model/tenants/acme", "offline").await;
    stack.change_tenant("acme", json!({"model_account": "own"})).await;
    acme.chat(json!({"message": "How many?"})).await.expect_status(StatusCode::OK);

    operators(&stack, &acme).await;
    expired_keys(&stack, &acme).await;
    torn(&stack, &acme).await;
    sealed(&stack, &acme).await;
    stack.change_tenant("acme", json!({"status": "suspended"})).await;
    stack.change_tenant("acme", json!({"status": "active"})).await;

    // Budgets.
    let url = receiver().await;
    let config = json!({"tenant_id": {"S": "globex"}, "sk": {"S": "CONFIG"}});
    stack.edit("tenants", config, &["webhook_url"], json!({"S": url})).await;
    let meter = json!({"tenant_id": {"S": "globex"}});
    for budget in ["day_tokens", "month_tokens"] {
        stack.edit("meters", meter.clone(), &[budget], json!({"N": "990000000"})).await;
    }
    stack.invoke("webhooks", json!({})).await;
    stack.invoke("webhooks", json!({})).await;

    // The books: a ticket that nobody settles, and the comparison.
    lose_a_ticket(&stack, &initech).await;
    stack.invoke("reconciler", json!({"job": "collect"})).await;
    stack.invoke("reconciler", json!({"job": "verify"})).await;
    unread(&stack, &acme).await;
    stopped_exports(&stack, &acme).await;
    retention(&stack).await;

    // A tenant's end.
    acme.store("menu", "menu", "The menu says soup.").await;
    with_key(&acme, "/v1/chat", "last", json!({"message": "Soup?"})).await.expect_status(StatusCode::OK);
    let bucket = stack.audit_bucket().replace("-audit-", "-documents-");
    for n in 0..2 {
        let put = stack.s3().put_object().bucket(&bucket).key("tenant=acme/one.txt");
        put.body(ByteStream::from(vec![n; 10])).send().await.unwrap();
    }
    stack.create_secret("bulkhead/tenant/acme/hook", "s").await;
    for tenant in ["acme", "globex"] {
        let begun = stack.admin(Method::DELETE, &format!("/admin/tenants/{tenant}"), None).await;
        let begun = begun.expect_status(StatusCode::ACCEPTED).json();
        let path = format!("/admin/deprovisionings/{}", begun["deprovisioning_id"].as_str().unwrap());
        until("the receipt", async || {
            let view = stack.admin(Method::GET, &path, None).await.expect_status(StatusCode::OK).json();
            (view["status"] == "completed").then_some(())
        })
        .await;
    }
    let mut again = new("acme");
    again["reuse_deleted_id"] = true.into();
    stack.admin(Method::POST, "/admin/tenants", Some(&again)).await.expect_error(409, "conflict");
    stack.invoke("eraser", json!({"job": "deprovision"})).await;
    let deeds = stack.deeds().await;
    // Every function was there.
    for function in &template.functions {
        let role = function_role_arn(&function.logical_id);
        assert!(
            function.policies.is_empty() || deeds.iter().any(|d| d.role == role),
            "{}",
            function.logical_id
        );
    }
    stack.stop().await;
    deeds
}

/// One request to each function, with a decision that is of yesterday.
async fn application_again(tenant: &Tenant) {
    tenant.search("days", 3).await;
    tenant.ask("How many days?").await;
    for path in ["/v1/usage", "/v1/audit", "/v1/keys", "/v1/documents"] {
        tenant.get(path).await.expect_status(StatusCode::OK);
    }
}

/// Whether all records of a tenant are in the audit log.
async fn exported(stack: &Stack, tenant: &Tenant) -> bool {
    let query = json!({"IndexName": "pending", "KeyConditionExpression": "tenant_id = :t",
        "ExpressionAttributeValues": {":t": {"S": tenant.id}}});
    stack.dynamodb("Query", "audit", query).await["Items"].as_array().unwrap().is_empty()
}

/// An export that dies between its intention and its object, and between its object and the log's growth:
/// the next one takes up what is there.
async fn stopped_exports(stack: &Stack, tenant: &Tenant) {
    for operation in ["UpdateItem", "TransactWriteItems"] {
        let mode = if operation == "UpdateItem" { "kill_after" } else { "kill_before" };
        let rule = json!({"mode": mode, "function": "audit_export", "operation": operation, "table": "usage",
            "times": 1});
        stack.dynamodb_faults(json!({"rules": [rule]})).await;
        tenant.search("days", 3).await;
        until("the export", async || {
            stack.invoke_for(None, "audit_export", json!({"job": "catch_up"})).await;
            exported(stack, tenant).await.then_some(())
        })
        .await;
        stack.clear_dynamodb_faults().await;
    }
    stack.invoke("audit_export", json!({"job": "catch_up"})).await;
}

/// A question whose process is killed, so long ago that its time is over.
async fn lose_a_ticket(stack: &Stack, tenant: &Tenant) {
    stack.model_fault(json!({"mode": "hang", "n": 0, "count": 1})).await;
    let lost = {
        let tenant = tenant.clone();
        tokio::spawn(async move { tenant.chat(json!({"message": "Lost."})).await })
    };
    let held = async || stack.meter_item(&tenant.id).await["leases"]["M"].as_object().cloned();
    until("the lease", async || held().await.filter(|leases| !leases.is_empty())).await;
    stack.kill("chat").await;
    lost.await.unwrap();
    if let Some(leases) = held().await {
        let over = |lease: String| Lease { life_s: 0, ..lease.parse().unwrap() }.to_string();
        let expired: Value = leases.into_iter().map(|(lease, ticket)| (over(lease), ticket)).collect();
        let meter = json!({"tenant_id": {"S": tenant.id}});
        stack.edit("meters", meter, &["leases"], json!({"M": expired})).await;
    }
}

/// What operators look at and take away.
async fn operators(stack: &Stack, tenant: &Tenant) {
    for path in [
        "/admin/tenants",
        "/admin/tenants/acme",
        "/admin/tenants/acme/keys",
        "/admin/tenants/acme/webhook-secret",
        "/admin/usage",
        "/admin/audit/verify?tenant_id=acme",
    ] {
        stack.admin(Method::GET, path, None).await.expect_status(StatusCode::OK);
    }
    let verify = "/admin/audit/verify?tenant_id=nobody";
    stack.admin(Method::GET, verify, None).await.expect_error(404, "not_found");
    let made = stack.admin(Method::POST, "/admin/tenants/acme/keys", Some(&json!({}))).await;
    let made = made.expect_status(StatusCode::CREATED).json();
    let made = format!("/admin/tenants/acme/keys/{}", made["key_id"].as_str().unwrap());
    stack.admin(Method::DELETE, &made, None).await.expect_status(StatusCode::NO_CONTENT);
    let issuer = json!({"issuer": "https://login.example", "audience": "acme", "keys": [Signer::ed25519("k").public()]});
    tenant.post("/v1/issuers", &issuer).await.expect_status(StatusCode::CREATED);
    let claim = "/admin/issuer-claim?issuer=https%3A%2F%2Flogin.example&audience=acme";
    stack.admin(Method::GET, claim, None).await.expect_status(StatusCode::OK);
    let release = format!("{claim}&tenant_id=acme");
    stack.admin(Method::DELETE, &release, None).await.expect_status(StatusCode::OK);
}

/// A document whose replacement has failed half way: whoever finds passages of it asks in which edition it is.
async fn torn(stack: &Stack, tenant: &Tenant) {
    tenant.store("torn", "torn", "The torn page says 3 days.").await;
    // Its record is written once; that its new passages count is refused as often as it is tried.
    let rule = json!({"mode": "error", "operation": "PutItem",
        "table": "documents", "skip": 1, "times": 3});
    stack.dynamodb_faults(json!({"rules": [rule]})).await;
    let again = json!({"id": "torn", "title": "torn", "content": "The torn page says 4 days."});
    let again = tenant.post("/v1/documents", &again).await;
    assert!(!again.status.is_success(), "{}", again.text);
    stack.clear_dynamodb_faults().await;
    tenant.ask("How many days does the torn page say?").await;
    tenant.search("torn page", 3).await;
}

/// A tenant with a KMS key of its own: what is written is sealed, and another process opens it.
async fn sealed(stack: &Stack, tenant: &Tenant) {
    let file = json!({"id": "late", "title": "late", "content_type": "text/plain", "size_bytes": 5});
    let begun = tenant.begin_upload(&file).await;
    stack.change_tenant(&tenant.id, json!({"kms_key_arn": stack.create_kms_key().await})).await;
    // Begun before there was a key, its file is stored with one.
    assert_eq!(put_file(&begun, "Late.").await.0, StatusCode::OK);
    tenant.read_upload("late").await;
    // With one, S3 asks for the file's data key, and opens it, in the sessions' names.
    tenant.upload("encrypted", "text/plain", b"Encrypted.".to_vec()).await;
    tenant.store("sealed", "sealed", "The sealed says 7 days.").await;
    let asked = tenant.ask("How many days?").await;
    let rated = json!({"id": asked["id"], "rating": "up", "comment": "Yes."});
    tenant.post("/v1/feedback", &rated).await.expect_status(StatusCode::CREATED);
    for function in ["chat", "ingestion"] {
        stack.kill(function).await;
    }
    let conversation = format!("/v1/conversations/{}", asked["conversation_id"].as_str().unwrap());
    tenant.get(&conversation).await.expect_status(StatusCode::OK);
    tenant.get("/v1/documents/sealed").await.expect_status(StatusCode::OK);
    stack.change_tenant(&tenant.id, json!({"kms_key_arn": null})).await;
    // What was sealed before is opened to be replaced.
    tenant.upload("sealed", "text/plain", b"The sealed says 8 days.".to_vec()).await;
}

/// An upload that somebody has begun to read, so long ago that nobody awaits it any more.
async fn unread(stack: &Stack, tenant: &Tenant) {
    let file = json!({"id": "unread", "title": "unread", "content_type": "text/plain", "size_bytes": 5});
    tenant.begin_upload(&file).await;
    let uploads = stack.items("documents", &tenant.id, "UPLOAD#").await;
    let key = json!({"tenant_id": {"S": tenant.id}, "sk": {"S": uploads[0]["sk"]}});
    for (field, value) in [("attempts", "1"), ("expires_at", "1")] {
        stack.edit("documents", key.clone(), &[field], json!({"N": value})).await;
    }
    assert_eq!(stack.invoke("eraser", json!({"job": "uploads"})).await["unread"], 1);
}

/// Keys that have expired give way to new ones, a tenant's and an operator's.
async fn expired_keys(stack: &Stack, tenant: &Tenant) {
    let end = Timestamp::from_millis(Clock::system().now().as_millis() + 8_000).to_string();
    for _ in 0..2 {
        let body = json!({"scopes": ["chat"], "expires_at": end});
        tenant.post("/v1/keys", &body).await.expect_status(StatusCode::CREATED);
    }
    let body = json!({"scopes": ["chat"]});
    while tenant.post("/v1/keys", &body).await.status != StatusCode::CONFLICT {}
    sleep(Duration::from_millis(8_500)).await;
    tenant.post("/v1/keys", &body).await.expect_status(StatusCode::CREATED);
    let path = format!("/admin/tenants/{}/keys", tenant.id);
    stack.admin(Method::POST, &path, Some(&body)).await.expect_status(StatusCode::CREATED);
}

/// What is past its retention goes.
async fn retention(stack: &Stack) {
    stack.change_tenant("acme", json!({"limits": {"data_retention_days": 0}})).await;
    stack.invoke("eraser", json!({"job": "retain"})).await;
    stack.change_tenant("acme", json!({"limits": {"data_retention_days": null}})).await;
}
