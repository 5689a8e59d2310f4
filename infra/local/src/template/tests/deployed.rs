//! What the template promises of a deployment and nothing local rests on: no linter knows that it should.

use std::collections::BTreeSet;

use serde_json::Value;

use super::*;

/// Every resource of the template with its properties evaluated, and those of all functions merged in.
fn resources(overrides: &[(&str, &str)]) -> Vec<Resource> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml");
    let raw = yaml::read(&path).unwrap();
    let given = [("QdrantCells", "default=http://127.0.0.1:6334")].iter().chain(overrides);
    let given = given.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let evaluator = Evaluator::new(&raw, path.parent().unwrap(), &given).unwrap();
    let globals = evaluator.section("Globals.Function", raw.pointer("/Globals/Function")).unwrap();
    let mut resources = evaluator.resources().unwrap();
    for function in resources.iter_mut().filter(|r| r.kind == "AWS::Serverless::Function") {
        function.properties = merge(globals.clone(), function.properties.clone());
    }
    resources
}

fn kind<'a>(resources: &'a [Resource], kind: &str) -> Vec<&'a Resource> {
    let found: Vec<&Resource> = resources.iter().filter(|r| r.kind == kind).collect();
    assert!(!found.is_empty(), "no {kind}");
    found
}

fn named<'a>(resources: &'a [Resource], id: &str) -> &'a Resource {
    resources.iter().find(|r| r.id == id).unwrap_or_else(|| panic!("no {id}"))
}

#[test]
fn tables_are_kept_encrypted_and_paid_by_use() {
    for table in kind(&resources(&[]), "AWS::DynamoDB::Table") {
        let is = |pointer: &str| is_true(table.get(pointer));
        assert_eq!(table.text("/BillingMode").unwrap(), "PAY_PER_REQUEST", "{}", table.id);
        assert!(is("/SSESpecification/SSEEnabled"), "{}", table.id);
        // What instances noted in the last few seconds is worth nothing.
        let kept = table.id != "Accounts";
        let recovered = is("/PointInTimeRecoverySpecification/PointInTimeRecoveryEnabled");
        assert_eq!((is("/DeletionProtectionEnabled"), recovered), (kept, kept), "{}", table.id);
    }
}

#[test]
fn buckets_are_private_versioned_and_reached_by_tls_alone() {
    let resources = resources(&[]);
    for bucket in kind(&resources, "AWS::S3::Bucket") {
        let name = bucket.text("/BucketName").unwrap();
        for what in ["BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"] {
            assert!(
                is_true(bucket.get(&format!("/PublicAccessBlockConfiguration/{what}"))),
                "{name}: {what}"
            );
        }
        assert_eq!(bucket.text("/VersioningConfiguration/Status").unwrap(), "Enabled", "{name}");
        assert_eq!(bucket.text("/OwnershipControls/Rules/0/ObjectOwnership").unwrap(), "BucketOwnerEnforced");
        assert!(bucket.get("/BucketEncryption/ServerSideEncryptionConfiguration/0").is_some(), "{name}");
        assert!(bucket.get("/LifecycleConfiguration/Rules/0").is_some(), "{name}");
        let mut policies = kind(&resources, "AWS::S3::BucketPolicy").into_iter();
        let policy = policies.find(|p| p.text("/Bucket").unwrap() == name).unwrap();
        let statements = policy.get("/PolicyDocument/Statement").and_then(Value::as_array).unwrap();
        let denies = |action: &str, condition: Option<Value>| {
            statements.iter().any(|s| {
                let actions = s["Action"].to_string();
                s["Effect"] == "Deny"
                    && s["Principal"] == "*"
                    && actions.contains(&format!("\"{action}\""))
                    && s.get("Condition").cloned() == condition
            })
        };
        let insecure = serde_json::json!({"Bool": {"aws:SecureTransport": "false"}});
        assert!(denies("s3:*", Some(insecure)), "{name}: TLS");
        let locked = is_true(bucket.get("/ObjectLockEnabled"));
        for action in ["s3:DeleteObject", "s3:DeleteObjectVersion", "s3:BypassGovernanceRetention"] {
            assert_eq!(denies(action, None), locked, "{name}: {action}");
        }
    }
    let audit = named(&resources, "AuditBucket");
    // Nothing of the log goes by its age: the chain is verified from its beginning.
    let rules = audit.get("/LifecycleConfiguration/Rules").and_then(Value::as_array).unwrap();
    let expires = |rule: &Value| rule.as_object().unwrap().keys().any(|name| name.contains("Expiration"));
    assert!(!rules.iter().any(expires), "{rules:?}");
    let lock = "/ObjectLockConfiguration/Rule/DefaultRetention";
    assert_eq!(audit.text(&format!("{lock}/Mode")).unwrap(), "COMPLIANCE");
    assert_eq!(audit.text(&format!("{lock}/Days")).unwrap(), "2557");
}

#[test]
fn every_function_is_bounded_traced_and_logs_for_so_long() {
    let unreserved = resources(&[("ReservedConcurrency", "off")]);
    for function in kind(&unreserved, "AWS::Serverless::Function") {
        assert!(function.get("/ReservedConcurrentExecutions").is_none(), "{}", function.id);
    }
    let resources = resources(&[("LogRetentionDays", "14")]);
    let mut reserved = 0;
    for function in kind(&resources, "AWS::Serverless::Function") {
        let (id, text) = (&function.id, |pointer| function.text(pointer).unwrap());
        assert_eq!(function.get("/Architectures"), Some(&serde_json::json!(["arm64"])), "{id}");
        assert_eq!((text("/Tracing"), text("/Runtime")), ("Active".into(), "provided.al2023".into()), "{id}");
        assert_eq!(text("/Environment/Variables/METRICS_NAMESPACE"), STACK, "{id}");
        assert!(function.get("/Timeout").is_some() && function.get("/MemorySize").is_some(), "{id}");
        reserved += function.number::<u32>("/ReservedConcurrentExecutions").unwrap().unwrap();
        // Its log is the one that is declared, and whatever it raises an alarm with is counted there.
        let log = text("/LoggingConfig/LogGroup");
        let mut groups = kind(&resources, "AWS::Logs::LogGroup").into_iter();
        let group = groups.find(|group| physical_name(group) == log).unwrap();
        assert_eq!(log, format!("/aws/lambda/{}", physical_name(function)));
        assert_eq!(group.text("/RetentionInDays").unwrap(), "14", "{id}");
        let mut filters = kind(&resources, "AWS::Logs::MetricFilter").into_iter();
        let filter = filters.find(|filter| filter.text("/LogGroupName").unwrap() == log);
        assert!(filter.is_some_and(|f| f.text("/FilterPattern").unwrap().contains("$.alert")), "{id}");
        // Nothing that a schedule asked for ends nowhere.
        if function.get("/Events").is_some() {
            let queue = text("/EventInvokeConfig/DestinationConfig/OnFailure/Destination");
            assert_eq!(queue, queue_arn("bulkhead-schedule-failures"), "{id}");
        }
    }
    // Of an account's usual 1,000, 100 have to stay unreserved.
    assert_eq!(reserved, 720);
}

/// Whoever reads a queue knows how often a message of it comes, and is not turned away for want of concurrency.
#[test]
fn a_queues_reader_knows_when_it_is_the_last_time() {
    let resources = resources(&[]);
    let reader = named(&resources, "UploadIngestion");
    let attempts = reader.text("/Environment/Variables/UPLOAD_ATTEMPTS").unwrap();
    assert_eq!(named(&resources, "Uploads").text("/RedrivePolicy/maxReceiveCount").unwrap(), attempts);
    let mapping = named(&resources, "UploadIngestionMapping");
    let at_once = mapping.text("/ScalingConfig/MaximumConcurrency").unwrap();
    assert_eq!(reader.text("/ReservedConcurrentExecutions").unwrap(), at_once);
}

/// What no retry can do does not hold up what comes after it, and ends where somebody looks.
#[test]
fn a_streams_failures_are_bounded_and_kept() {
    let resources = resources(&[]);
    let mut streams = BTreeSet::new();
    for mapping in kind(&resources, "AWS::Lambda::EventSourceMapping") {
        let id = mapping.id.as_str();
        if !mapping.text("/EventSourceArn").unwrap().contains(":dynamodb:") {
            continue;
        }
        streams.insert(id);
        let retries = mapping.number::<i64>("/MaximumRetryAttempts").unwrap();
        assert!(retries.is_some_and(|most| (0..=1_000).contains(&most)), "{id}: {retries:?}");
        // The eraser's schedule goes on each minute with whatever is in its list. So nothing of this stream is ever
        // lost, nor is anything to be tried again, halved or told by it.
        if id == "EraserBegun" {
            assert_eq!(retries, Some(0));
            let schedules = named(&resources, "Eraser").get("/Events").unwrap();
            assert_eq!(schedules["Deprovision"]["Properties"]["ScheduleExpression"], "rate(1 minute)");
            continue;
        }
        assert!(is_true(mapping.get("/BisectBatchOnFunctionError")), "{id}");
        let reports = serde_json::json!(["ReportBatchItemFailures"]);
        assert_eq!(mapping.get("/FunctionResponseTypes"), Some(&reports), "{id}");
        let queue = mapping.text("/DestinationConfig/OnFailure/Destination").unwrap();
        assert_eq!(queue, queue_arn("bulkhead-ledger-failures"), "{id}");
    }
    assert_eq!(streams, BTreeSet::from(["AuditExportLedger", "EraserBegun"]));
}

/// Whoever crashes, runs out of time or is turned away is seen, also the function that is added next.
#[test]
fn every_function_is_in_the_alarms() {
    let resources = resources(&[]);
    let mut watched: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for alarm in kind(&resources, "AWS::CloudWatch::Alarm") {
        let queries = alarm.get("/Metrics").and_then(Value::as_array).into_iter().flatten();
        let nested: Vec<&Value> = queries.filter_map(|query| query.pointer("/MetricStat/Metric")).collect();
        // CloudWatch takes no more in one alarm.
        assert!(nested.len() <= 10, "{}", alarm.id);
        for metric in nested.into_iter().chain([&alarm.properties]) {
            let name = match (metric["Namespace"].as_str(), metric["MetricName"].as_str()) {
                (Some("AWS/Lambda"), Some(name)) => name,
                _ => continue,
            };
            let function = scalar(&metric["Dimensions"][0]["Value"]).unwrap();
            watched.entry(name).or_default().insert(function);
        }
    }
    let all: BTreeSet<String> =
        kind(&resources, "AWS::Serverless::Function").into_iter().map(physical_name).collect();
    assert_eq!(watched["Throttles"], all);
    // It says "no" by failing. What it fails at otherwise is answered 503, and counted among the API's errors.
    let mut but_one = all;
    assert!(but_one.remove("bulkhead-authorizer"));
    assert_eq!(watched["Errors"], but_one);
}

#[test]
fn no_resource_is_a_star_where_one_can_be_named() {
    let mut stars = BTreeSet::new();
    fn visit(value: &Value, stars: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                if fields.get("Effect").is_some_and(|effect| effect == "Allow")
                    && fields.get("Resource").is_some_and(|r| texts(r).iter().any(|r| r == "*"))
                {
                    stars.extend(texts(&fields["Action"]));
                }
                fields.values().for_each(|value| visit(value, stars));
            }
            Value::Array(items) => items.iter().for_each(|value| visit(value, stars)),
            _ => {}
        }
    }
    fn texts(value: &Value) -> Vec<String> {
        match value {
            Value::Array(items) => items.iter().filter_map(scalar).collect(),
            other => scalar(other).into_iter().collect(),
        }
    }
    resources(&[]).iter().for_each(|resource| visit(&resource.properties, &mut stars));
    // AWS takes no resource for it.
    assert_eq!(stars.into_iter().collect::<Vec<_>>(), ["secretsmanager:ListSecrets"]);
}

#[test]
fn access_logs_name_a_request_and_quote_nothing_of_it() {
    let resources = resources(&[]);
    let api = named(&resources, "Api");
    assert_eq!(api.text("/MethodSettings/0/DataTraceEnabled").unwrap(), "false");
    assert_eq!(api.text("/TracingEnabled").unwrap(), "true");
    let format = api.text("/AccessLogSetting/Format").unwrap();
    assert!(!format.contains('\n'));
    let fields: BTreeMap<String, String> = serde_json::from_str(&format).unwrap();
    let variables: BTreeSet<&str> = fields.values().map(String::as_str).collect();
    let known = [
        "$context.authorizer.latency",
        "$context.authorizer.tenantId",
        "$context.error.responseType",
        "$context.httpMethod",
        "$context.identity.sourceIp",
        "$context.identity.userArn",
        "$context.integration.latency",
        "$context.requestId",
        "$context.requestTime",
        "$context.resourcePath",
        "$context.responseLatency",
        "$context.responseLength",
        "$context.status",
        "$context.waf.status",
        "$context.xrayTraceId",
    ];
    assert_eq!(variables, BTreeSet::from(known));
}

#[test]
fn what_is_optional_is_there_when_it_is_asked_for() {
    let without = resources(&[]);
    let ids: BTreeSet<&str> = without.iter().map(|r| r.id.as_str()).collect();
    assert!(!ids.contains("WebAclAssociation") && ids.contains("ApiGatewayAccount"));
    let without = kind(&without, "AWS::CloudWatch::Alarm");
    assert!(without.iter().all(|alarm| alarm.get("/AlarmActions").is_none()));

    let topic = "arn:aws:sns:eu-west-1:123456789012:alarms";
    let with =
        resources(&[("AlarmTopicArn", topic), ("ApiLogsRole", "existing"), ("RunbookUrl", "https://x/ops")]);
    assert!(with.iter().all(|resource| resource.id != "ApiGatewayAccount"));
    for alarm in kind(&with, "AWS::CloudWatch::Alarm") {
        assert_eq!(alarm.text("/AlarmActions/0").unwrap(), topic, "{}", alarm.id);
        assert!(
            alarm.get("/Threshold").is_some() && alarm.get("/TreatMissingData").is_some(),
            "{}",
            alarm.id
        );
        let link = format!(" https://x/ops#{}", alarm.id);
        assert!(alarm.text("/AlarmDescription").unwrap().ends_with(&link), "{}", alarm.id);
    }
    for (parameter, value) in [
        ("WebAclArn", "acl"),
        ("AlarmTopicArn", "alarms"),
        ("RunbookUrl", "https://x/#ops"),
        ("RunbookUrl", "docs/operations.md"),
        ("RunbookUrl", "http://x/ops"),
        ("VpcSubnetIds", "subnet-12345678, subnet-12345679"),
        ("VpcSecurityGroupIds", "sg-1"),
        ("ReservedConcurrency", "yes"),
        ("RequestsPerSecond", "0"),
        ("HourlyCostAlarmUsd", "-1"),
    ] {
        let refused =
            real(&[("QdrantCells", "default=http://x:1"), (parameter, value)]).unwrap_err().to_string();
        assert!(refused.starts_with(&format!("Parameters.{parameter}: ")), "{refused}");
    }
}

/// Metrics that alarms and the dashboard look at are metrics that somebody reports, under those names.
#[test]
fn what_is_looked_at_is_reported() {
    let resources = resources(&[]);
    let mut looked_at = BTreeSet::new();
    for alarm in kind(&resources, "AWS::CloudWatch::Alarm") {
        let stats = alarm.get("/Metrics").and_then(Value::as_array).into_iter().flatten();
        let nested = stats.filter_map(|metric| metric.pointer("/MetricStat/Metric"));
        for metric in nested.chain([&alarm.properties]).filter(|metric| metric["Namespace"] == STACK) {
            let dimensions = metric["Dimensions"].as_array().into_iter().flatten();
            let dimensions: Vec<String> = dimensions.filter_map(|d| scalar(&d["Name"])).collect();
            looked_at.insert((scalar(&metric["MetricName"]).unwrap(), dimensions));
        }
    }
    let body = named(&resources, "Dashboard").text("/DashboardBody").unwrap();
    let body: Value = serde_json::from_str(&body).unwrap();
    let alarms = kind(&resources, "AWS::CloudWatch::Alarm").len();
    assert_eq!(body.pointer("/widgets/0/properties/alarms").and_then(Value::as_array).unwrap().len(), alarms);
    for metric in body["widgets"].as_array().unwrap().iter().flat_map(|widget| {
        widget.pointer("/properties/metrics").and_then(Value::as_array).cloned().unwrap_or_default()
    }) {
        let parts: Vec<&Value> = metric.as_array().unwrap().iter().filter(|part| part.is_string()).collect();
        if parts.first().is_some_and(|namespace| **namespace == STACK) {
            let dimensions = parts[2..].iter().step_by(2).filter_map(|name| scalar(name)).collect();
            looked_at.insert((scalar(parts[1]).unwrap(), dimensions));
        }
        let expression = metric.pointer("/0/expression").and_then(Value::as_str).unwrap_or_default();
        if let Some((_, search)) = expression.split_once(&format!("SEARCH('{{\"{STACK}\",")) {
            let (dimension, rest) = search.split_once('}').unwrap();
            let name = rest.split('"').nth(1).unwrap();
            looked_at.insert((name.to_owned(), vec![dimension.to_owned()]));
        }
    }
    // Counted by filters, of lines with `alert`.
    assert!(looked_at.remove(&("Alerts".to_owned(), Vec::new())));
    let mut reported = BTreeSet::new();
    for metric in shared::metrics::Metric::ALL {
        for set in metric.dimensions() {
            let names = set.iter().map(|dimension| dimension.name().to_owned()).collect::<Vec<_>>();
            reported.insert((metric.name().to_owned(), names));
        }
    }
    assert!(looked_at.is_subset(&reported), "{:?}", looked_at.difference(&reported));
    // And nothing is paid for that nobody looks at.
    let unseen: Vec<_> = reported.difference(&looked_at).collect();
    assert!(unseen.is_empty(), "{unseen:?}");
}
