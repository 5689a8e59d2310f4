mod deployed;

use super::*;

fn real(overrides: &[(&str, &str)]) -> Result<Template, TemplateError> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml");
    let overrides = overrides.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Template::load(&path, &overrides)
}

fn stack() -> Template {
    real(&[("QdrantCells", "default=http://127.0.0.1:6334")]).unwrap()
}

fn small(yaml: &str) -> Result<Template, TemplateError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("template.yaml");
    let api = "
  Api:
    Type: AWS::Serverless::Api
    Properties:
      StageName: live
      DefinitionBody: {paths: {}, components: {securitySchemes: {}}}
";
    std::fs::write(&path, format!("{yaml}{api}")).unwrap();
    Template::load(&path, &BTreeMap::new())
}

#[test]
fn every_route_leads_to_a_function_with_a_binary() {
    let template = stack();
    let routes: Vec<String> = template
        .api
        .routes
        .iter()
        .map(|route| {
            let function = template.function(&route.function).unwrap();
            assert!(!function.binary.is_empty());
            assert!(route.timeout < function.timeout, "{}: the gateway gives up first", route.path);
            let auth = match &route.auth {
                RouteAuth::Open => "open",
                RouteAuth::Iam => "iam",
                RouteAuth::Authorizer(name) => name.as_str(),
            };
            let mode = if route.streaming { "stream" } else { "buffered" };
            format!("{} {} {} {auth} {mode}", route.method, route.path, function.binary)
        })
        .collect();
    let mut routes = routes;
    routes.sort();
    assert_eq!(
        routes,
        [
            "DELETE /admin/issuer-claim provisioning iam buffered",
            "DELETE /admin/tenants/{id} deprovisioning iam buffered",
            "DELETE /admin/tenants/{id}/keys/{key_id} provisioning iam buffered",
            "DELETE /v1/conversations/{id} chat tenant stream",
            "DELETE /v1/documents/{id} ingestion tenant buffered",
            "DELETE /v1/issuers/{id} keys tenant buffered",
            "DELETE /v1/keys/{id} keys tenant buffered",
            "GET /admin/audit/verify audit iam buffered",
            "GET /admin/deprovisionings/{id} deprovisioning iam buffered",
            "GET /admin/issuer-claim provisioning iam buffered",
            "GET /admin/tenants provisioning iam buffered",
            "GET /admin/tenants/{id} provisioning iam buffered",
            "GET /admin/tenants/{id}/keys provisioning iam buffered",
            "GET /admin/tenants/{id}/webhook-secret provisioning iam buffered",
            "GET /admin/usage usage iam buffered",
            "GET /v1/audit audit tenant buffered",
            "GET /v1/audit/exports/{id} audit tenant buffered",
            "GET /v1/conversations chat tenant stream",
            "GET /v1/conversations/{id} chat tenant stream",
            "GET /v1/documents ingestion tenant buffered",
            "GET /v1/documents/{id} ingestion tenant buffered",
            "GET /v1/issuers keys tenant buffered",
            "GET /v1/issuers/{id} keys tenant buffered",
            "GET /v1/keys keys tenant buffered",
            "GET /v1/models chat tenant stream",
            "GET /v1/usage usage tenant buffered",
            "PATCH /admin/tenants/{id} provisioning iam buffered",
            "POST /admin/tenants provisioning iam buffered",
            "POST /admin/tenants/{id}/keys provisioning iam buffered",
            "POST /v1/audit/exports audit tenant buffered",
            "POST /v1/chat chat tenant stream",
            "POST /v1/chat/completions chat tenant stream",
            "POST /v1/documents ingestion tenant buffered",
            "POST /v1/feedback chat tenant stream",
            "POST /v1/issuers keys tenant buffered",
            "POST /v1/keys keys tenant buffered",
            "POST /v1/keys/{id}/rotate keys tenant buffered",
            "POST /v1/search ingestion tenant buffered",
            "POST /v1/uploads ingestion tenant buffered",
        ]
    );
    let authorizer = &template.api.authorizers["tenant"];
    assert_eq!(authorizer.identity_header, "authorization");
    assert_eq!(authorizer.ttl, Duration::from_secs(300));
    assert_eq!(template.function(&authorizer.function).unwrap().binary, "authorizer");
}

/// A decision that API Gateway still hands out carries vector tokens that outlive whatever begins with it.
#[test]
fn decisions_are_kept_for_less_long_than_what_they_carry() {
    const CLOCKS: Duration = Duration::from_secs(2 * 30);
    let raw = yaml::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml")).unwrap();
    let kept_s = raw.pointer("/Parameters/AuthorizerCacheSeconds/MaxValue").unwrap().as_u64().unwrap();
    let template = stack();
    let of_tenants = template.api.routes.iter().filter(|route| route.auth != RouteAuth::Iam);
    let longest = of_tenants.map(|route| template.function(&route.function).unwrap().timeout).max().unwrap();
    let lifetime = Duration::from_secs(shared::vector_token::LIFETIME_SECONDS.try_into().unwrap());
    assert!(Duration::from_secs(kept_s) + longest + CLOCKS <= lifetime, "{kept_s} {longest:?} {lifetime:?}");
}

/// Every line with a field `alert` is an alarm, whichever function wrote it.
#[test]
fn every_functions_alerts_are_counted() {
    let raw = yaml::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml")).unwrap();
    let resources = raw["Resources"].as_object().unwrap();
    let of_kind = |kind: &'static str| {
        resources
            .iter()
            .filter(move |(_, resource)| resource["Type"] == kind)
            .map(|(id, it)| (id, &it["Properties"]))
    };
    let counts = serde_json::json!([{"MetricNamespace": {"Ref": "AWS::StackName"}, "MetricName": "Alerts",
        "MetricValue": "1", "DefaultValue": 0}]);
    let counted: Vec<&Value> = of_kind("AWS::Logs::MetricFilter")
        .filter(|(_, filter)| filter["FilterPattern"] == "{ $.alert = \"*\" }")
        .filter(|(_, filter)| filter["MetricTransformations"] == counts)
        .map(|(_, filter)| &filter["LogGroupName"])
        .collect();
    let mut functions = 0;
    for (id, function) in of_kind("AWS::Serverless::Function") {
        let logs = &function["LoggingConfig"]["LogGroup"];
        assert!(logs.is_object(), "{id} names no log group of the template");
        assert!(counted.contains(&logs), "{id}: nobody counts the alerts in its log");
        functions += 1;
    }
    assert_eq!(functions, stack().functions.len());
    let (_, alarm) =
        of_kind("AWS::CloudWatch::Alarm").find(|(_, alarm)| alarm["MetricName"] == "Alerts").unwrap();
    assert_eq!((&alarm["Namespace"], &alarm["Threshold"]), (&counts[0]["MetricNamespace"], &Value::from(0)));
}

#[test]
fn tenants_routes_lead_to_processes_of_their_own_and_no_other_does() {
    const CELLS: (&str, &str) = ("QdrantCells", "default=http://x:1");
    let on = real(&[CELLS]).unwrap();
    let off = real(&[CELLS, ("TenantIsolation", "off")]).unwrap();
    for (template, mode) in [(&on, "on"), (&off, "off")] {
        let apart = mode == "on";
        for route in &template.api.routes {
            let at = format!("{mode}: {} {}", route.method, route.path);
            let function = template.function(&route.function).unwrap();
            let says = function.environment.get("TENANT_ISOLATION").map(String::as_str);
            let of_a_tenant = route.auth == RouteAuth::Authorizer("tenant".to_owned());
            assert_eq!(of_a_tenant, route.path.starts_with("/v1/"), "{at}");
            let tenant = route.tenant.as_deref();
            if of_a_tenant {
                assert_eq!(tenant, apart.then_some("tenantId"), "{at}");
                assert_eq!((function.tenant_isolation, says), (apart, Some(mode)), "{at}");
            } else {
                assert_eq!((tenant, function.tenant_isolation), (None, false), "{at}");
                assert_ne!(says, Some("on"), "{at}");
            }
        }
        let isolated = template.functions.iter().filter(|function| function.tenant_isolation);
        let mut isolated: Vec<&str> = isolated.map(|function| function.logical_id.as_str()).collect();
        isolated.sort_unstable();
        let expected: &[&str] = if apart { &["AuditLog", "Chat", "Ingestion", "Keys", "Usage"] } else { &[] };
        assert_eq!(isolated, expected);
    }
    assert!(real(&[CELLS, ("TenantIsolation", "On")]).unwrap_err().to_string().contains("allowed values"));
}

#[test]
fn what_lambda_would_not_take_of_tenant_isolation_is_refused() {
    let problem = |rest: &str| {
        let properties = format!("{{{rest}}}");
        let function = format!(
            "Resources:\n  F:\n    Type: AWS::Serverless::Function\n    \
             Metadata: {{BuildProperties: {{Binary: b}}}}\n    Properties: {properties}\n"
        );
        small(&function).map(|template| template.functions[0].tenant_isolation).map_err(|e| e.to_string())
    };
    const MODE: &str = "TenancyConfig: {TenantIsolationMode: PER_TENANT}";
    assert_eq!(problem(MODE), Ok(true));
    assert_eq!(problem("Timeout: 3"), Ok(false));
    let at = "Resources.F.Properties.";
    let other = problem("TenancyConfig: {TenantIsolationMode: PER_USER}");
    assert_eq!(other, Err(format!("{at}TenancyConfig.TenantIsolationMode: `PER_USER` does not exist")));
    let scheduled = "{S: {Type: ScheduleV2, Properties: {ScheduleExpression: rate(1 day)}}}";
    let driven = problem(&format!("{MODE}, Events: {scheduled}"));
    assert_eq!(driven, Err(format!("{at}Events: do not go together with TenancyConfig")));

    let source = |parameters: &str| {
        let integration = serde_json::from_str(&format!("{{\"requestParameters\": {parameters}}}")).unwrap();
        tenant_source(&integration, "at").map_err(|e| e.to_string())
    };
    const HEADER: &str = "integration.request.header.X-Amz-Tenant-Id";
    let of = |value: &str| source(&format!(r#"{{"{HEADER}": "{value}"}}"#));
    assert_eq!(of("context.authorizer.tenantId"), Ok(Some("tenantId".to_owned())));
    assert_eq!(source("{}"), Ok(None));
    for a_clients in ["method.request.header.X-Amz-Tenant-Id", "'acme'", "context.identity.user", ""] {
        assert!(of(a_clients).unwrap_err().contains("is not what the authorizer said"), "{a_clients}");
    }
    let other = source(r#"{"integration.request.header.X-Other": "context.authorizer.x"}"#);
    assert!(other.unwrap_err().contains("is not known to the local stack"));
}

#[test]
fn functions_get_their_environment_and_secrets_by_name_alone() {
    let template = stack();
    let keys = |id: &str| template.function(id).unwrap().environment.keys().cloned().collect::<Vec<_>>();
    assert_eq!(
        keys("Authorizer"),
        [
            "AUDIT_TABLE",
            "ISSUER_REACH",
            "LOG_LEVEL",
            "METRICS_NAMESPACE",
            "QDRANT_ROOT_KEY_SECRET",
            "TENANTS_TABLE"
        ]
    );
    let chat = template.function("Chat").unwrap();
    assert_eq!(chat.name, "bulkhead-chat");
    assert_eq!(chat.timeout, Duration::from_secs(120));
    assert_eq!(chat.memory_mb, 512);
    assert_eq!(chat.environment["CONVERSATIONS_TABLE"], "bulkhead-conversations");
    assert_eq!(chat.environment["QDRANT_CELLS"], "default=http://127.0.0.1:6334");
    assert_eq!(chat.environment["EMBEDDINGS_DIMENSIONS"], "1536");
    assert_eq!(chat.environment["AWS_LAMBDA_HTTP_IGNORE_STAGE_IN_PATH"], "true");

    // A function that names a secret names one that the template creates.
    let secrets: Vec<&str> = template.secrets.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(secrets.len(), 4);
    for function in &template.functions {
        for (name, value) in function.environment.iter().filter(|(name, _)| name.ends_with("_SECRET")) {
            assert!(secrets.contains(&value.as_str()), "{}: {name}={value}", function.logical_id);
        }
    }
}

#[test]
fn tables_and_buckets_are_as_declared() {
    let template = stack();
    let audit = template.tables.iter().find(|t| t.logical_id == "Audit").unwrap();
    assert_eq!(audit.name, "bulkhead-audit");
    assert_eq!(audit.hash_key, KeyAttribute { name: "tenant_id".into(), kind: "S".into() });
    assert_eq!(audit.range_key, Some(KeyAttribute { name: "sk".into(), kind: "S".into() }));
    assert_eq!(audit.ttl_attribute.as_deref(), Some("expires_at_s"));
    assert_eq!(audit.stream_view.as_deref(), Some("KEYS_ONLY"));
    let pending = KeyAttribute { name: "pending".into(), kind: "S".into() };
    let [index] = audit.indexes.as_slice() else { panic!("{:?}", audit.indexes) };
    assert_eq!((index.name.as_str(), index.range_key.as_ref()), ("pending", Some(&pending)));
    assert_eq!(index.hash_key, audit.hash_key);
    let meters = template.tables.iter().find(|t| t.logical_id == "Meters").unwrap();
    assert_eq!((&meters.range_key, &meters.ttl_attribute), (&None, &None));
    assert_eq!(template.tables.len(), 8);

    let bucket = template.buckets.iter().find(|b| b.logical_id == "AuditBucket").unwrap();
    assert_eq!(bucket.name, "bulkhead-audit-000000000000");
    assert!(bucket.versioned && bucket.object_lock);
    assert_eq!(bucket.default_retention, Some(Retention { mode: "COMPLIANCE".into(), days: 2557 }));
    assert_eq!(template.outputs["AuditBucketName"], bucket.name);
}

#[test]
fn what_the_gateway_says_by_itself_has_the_shape_of_every_error() {
    let codes = include_str!("../../../openapi.yaml");
    for (kind, response) in &stack().api.gateway_responses {
        let body = response.body.as_ref().unwrap();
        let body = body.replace("$context.error.messageString", "\"text\"");
        let body: Value = serde_json::from_str(&body).unwrap();
        let code = body["error"]["code"].as_str().unwrap();
        assert!(codes.lines().any(|line| line.trim_start() == format!("- {code}")), "{kind}: {code}");
        assert!(body["error"]["message"].is_string());
        assert_eq!(body["request_id"], "$context.requestId");
        assert_eq!(response.headers["x-request-id"], "context.requestId");
    }
}

#[test]
fn parameters_are_checked() {
    let problem = |overrides: &[(&str, &str)]| real(overrides).unwrap_err().to_string();
    assert_eq!(problem(&[]), "Parameters.QdrantCells: has no default, and no value is given");
    for bad in ["", "default", "default=ftp://x", "a=http://x,", "a=http://x b=http://y", "A=http://x"] {
        assert!(problem(&[("QdrantCells", bad)]).starts_with("Parameters.QdrantCells: `"), "{bad}");
    }
    let cells = ("QdrantCells", "a=http://x:1,b=https://y:2");
    assert!(real(&[cells]).is_ok());
    assert!(problem(&[cells, ("LogLevel", "loud")]).contains("not one of the allowed values"));
    assert!(problem(&[cells, ("AuthorizerCacheSeconds", "301")]).contains("out of range"));
    assert!(problem(&[cells, ("Typo", "1")]).contains("is not declared"));
    let template = real(&[cells, ("AuthorizerCacheSeconds", "0")]).unwrap();
    assert_eq!(template.api.authorizers["tenant"].ttl, Duration::ZERO);
}

#[test]
fn intrinsics_are_evaluated() {
    let template = small(
        r#"
Parameters:
  Size: {Type: Number, Default: 2}
Conditions:
  Small: !Equals [!Ref Size, "2"]
  Big: !Not [!Condition Small]
Resources:
  Gone:
    Type: AWS::S3::Bucket
    Condition: Big
  Bucket:
    Type: AWS::S3::Bucket
    Properties:
      BucketName: !Join ["-", [!Sub "${AWS::StackName}", !Sub ["${x}${!y}", {x: !Ref Size}]]]
      ObjectLockEnabled: !If [Big, true, !Ref AWS::NoValue]
  Function:
    Type: AWS::Serverless::Function
    Metadata: {BuildProperties: {Binary: b}}
    Properties:
      Environment: {Variables: {ARN: !GetAtt Bucket.Arn, LONG: {"Fn::GetAtt": [Bucket, Arn]}, SIZE: 7}}
"#,
    )
    .unwrap();
    assert_eq!(template.buckets.len(), 1);
    assert_eq!(template.buckets[0].name, "bulkhead-2${y}");
    assert!(!template.buckets[0].object_lock);
    let function = &template.functions[0];
    assert_eq!(function.name, "bulkhead-Function");
    assert_eq!(function.environment["ARN"], "arn:aws:s3:::bulkhead-2${y}");
    assert_eq!(function.environment["ARN"], function.environment["LONG"]);
    assert_eq!(function.environment["SIZE"], "7");
}

#[test]
fn what_cannot_be_evaluated_is_named() {
    let problem = |value: &str| {
        let yaml = format!(
            "Resources:\n  B:\n    Type: AWS::S3::Bucket\n    Properties:\n      BucketName: {value}\n"
        );
        small(&yaml).unwrap_err().to_string()
    };
    const AT: &str = "Resources.B.Properties.BucketName: ";
    assert_eq!(
        problem("!Ref Nope"),
        format!("{AT}`Nope` is neither a parameter nor a resource of the template")
    );
    assert_eq!(problem("!ImportValue x"), format!("{AT}`Fn::ImportValue` is not known to the local stack"));
    assert!(problem("!GetAtt B.Colour").contains("too deeply, or refers to itself"));
    assert!(problem("!Ref B").contains("too deeply, or refers to itself"));
    assert!(problem("!Sub '${open'").contains("without its `}`"));
}

/// A function with one event, and what it may refer to.
fn with_event(event: &str) -> Result<Events, TemplateError> {
    let yaml = format!(
        r#"
Resources:
  Failed: {{Type: AWS::SQS::Queue, Properties: {{QueueName: !Sub "${{AWS::StackName}}-failed"}}}}
  Logs: {{Type: AWS::Logs::LogGroup, Properties: {{LogGroupName: /x}}}}
  Metric:
    Type: AWS::Logs::MetricFilter
    Properties: {{LogGroupName: !Ref Logs, FilterPattern: "", MetricTransformations: []}}
  Alarm:
    Type: AWS::CloudWatch::Alarm
    Properties: {{Dimensions: [{{Name: QueueName, Value: !GetAtt Failed.QueueName}}]}}
  Function:
    Type: AWS::Serverless::Function
    Metadata: {{BuildProperties: {{Binary: b}}}}
    Properties:
      Environment: {{Variables: {{QUEUE: !Ref Failed}}}}
      Events:
        It: {event}
"#
    );
    Ok(small(&yaml)?.functions[0].events.clone())
}

/// A function and a mapping with these properties, and what they may refer to.
fn with_mapping(function: &str, properties: &str) -> Result<Events, TemplateError> {
    let template = small(&format!(
        r#"
Resources:
  Failed: {{Type: AWS::SQS::Queue, Properties: {{QueueName: failed}}}}
  Work: {{Type: AWS::SQS::Queue, Properties: {{QueueName: work}}}}
  Plain: {{Type: AWS::DynamoDB::Table, Properties: {{AttributeDefinitions: [{{AttributeName: pk, AttributeType: S}}], KeySchema: [{{AttributeName: pk, KeyType: HASH}}]}}}}
  Notes:
    Type: AWS::DynamoDB::Table
    Properties:
      AttributeDefinitions: [{{AttributeName: pk, AttributeType: S}}]
      KeySchema: [{{AttributeName: pk, KeyType: HASH}}]
      StreamSpecification: {{StreamViewType: NEW_IMAGE}}
  Function:
    Type: AWS::Serverless::Function
    Metadata: {{BuildProperties: {{Binary: b}}}}
    Properties: {{{function}}}
  Mapping:
    Type: AWS::Lambda::EventSourceMapping
    Properties: {{FunctionName: !Ref Function, {properties}}}
"#
    ))?;
    Ok(template.functions[0].events.clone())
}

#[test]
fn a_functions_stream_is_read_as_declared() {
    let declared = "EventSourceArn: !GetAtt Notes.StreamArn, StartingPosition: LATEST, BatchSize: 10, \
        MaximumBatchingWindowInSeconds: 5, MaximumRetryAttempts: 3, MaximumRecordAgeInSeconds: 60, \
        BisectBatchOnFunctionError: true, ParallelizationFactor: 1, \
        FunctionResponseTypes: [ReportBatchItemFailures], \
        DestinationConfig: {OnFailure: {Destination: !GetAtt Failed.Arn}}, \
        FilterCriteria: {Filters: [{Pattern: '{\"eventName\":[\"INSERT\"]}'}]}";
    let filter = crate::event_pattern::Pattern::parse(&serde_json::json!({"eventName": ["INSERT"]})).unwrap();
    let stream = StreamEvent {
        name: "Mapping".into(),
        table: "bulkhead-Notes".into(),
        stream_arn:
            "arn:aws:dynamodb:us-east-1:000000000000:table/bulkhead-Notes/stream/2026-01-01T00:00:00.000"
                .into(),
        starting_position: StartingPosition::Latest,
        batch_size: 10,
        window: Duration::from_secs(5),
        max_retries: Some(3),
        max_age: Some(Duration::from_secs(60)),
        bisect: true,
        reports_item_failures: true,
        on_failure: Some("failed".into()),
        filters: vec![filter],
    };
    assert_eq!(with_mapping("", declared).unwrap(), Events { streams: vec![stream], ..Events::default() });

    let short = "EventSourceArn: !GetAtt Notes.StreamArn, StartingPosition: TRIM_HORIZON";
    let stream = &with_mapping("", short).unwrap().streams[0];
    assert_eq!((stream.batch_size, stream.max_retries, stream.max_age), (100, None, None));
    assert!(stream.on_failure.is_none() && stream.filters.is_empty() && !stream.reports_item_failures);
    assert_eq!(stream.starting_position, StartingPosition::TrimHorizon);
    assert_eq!(with_mapping("", &format!("{short}, Enabled: false")).unwrap(), Events::default());
}

#[test]
fn a_stream_that_cannot_be_read_is_named() {
    for (function, properties, says) in [
        ("", "TumblingWindowInSeconds: 9", "TumblingWindowInSeconds: is not known"),
        ("", "EventSourceArn: !GetAtt Plain.StreamArn", "EventSourceArn: `arn:"),
        ("", "BatchSize: 0", "BatchSize: `0` is not between"),
        ("", "MaximumRetryAttempts: -2", "MaximumRetryAttempts: `-2` is out of range"),
        ("", "ParallelizationFactor: 2", "ParallelizationFactor: is known"),
        ("", "FunctionResponseTypes: [Other]", "FunctionResponseTypes: is known"),
        (
            "",
            "DestinationConfig: {OnFailure: {Destination: 'arn:aws:sqs:x:0:other'}}",
            "DestinationConfig.OnFailure.Destination: `arn:aws:sqs:x:0:other` is no queue",
        ),
        (
            "",
            "FilterCriteria: {Filters: [{Pattern: '{}'}, {Pattern: '{\"eventName\":[{\"suffix\":\"T\"}]}'}]}",
            "FilterCriteria.Filters.1.Pattern: `eventName`: the rule",
        ),
        ("", "FilterCriteria: {Filters: [{Pattern: 'x'}]}", "FilterCriteria.Filters.0.Pattern: is not JSON"),
        (
            "TenancyConfig: {TenantIsolationMode: PER_TENANT}",
            "BatchSize: 1",
            "FunctionName: does not go together",
        ),
    ] {
        let own = if properties.contains("EventSourceArn") {
            ""
        } else {
            "EventSourceArn: !GetAtt Notes.StreamArn, "
        };
        let properties = format!("StartingPosition: LATEST, {own}{properties}");
        let problem = with_mapping(function, &properties).unwrap_err().to_string();
        let problem = problem.strip_prefix("Resources.Mapping.Properties.").unwrap_or(&problem);
        assert!(problem.starts_with(says), "{problem}");
    }
}

/// A function, and a mapping of a queue to it with these properties besides.
fn with_queue(function: &str, properties: &str) -> Result<Events, TemplateError> {
    with_mapping(function, &format!("EventSourceArn: !GetAtt Work.Arn, {properties}"))
}

#[test]
fn a_functions_queue_is_read_as_declared() {
    let declared = "BatchSize: 2, FunctionResponseTypes: [ReportBatchItemFailures], \
        ScalingConfig: {MaximumConcurrency: 5}";
    let events = with_queue("Timeout: 30", declared).unwrap();
    let queue = &events.queues[0];
    assert_eq!((queue.queue.name.as_str(), queue.batch_size, queue.concurrency), ("work", 2, 5));
    assert!(queue.reports_item_failures);
    assert_eq!((queue.queue.visibility, queue.queue.redrive.is_none()), (Duration::from_secs(30), true));
    assert_eq!(with_queue("Timeout: 30", "Enabled: false").unwrap(), Events::default());
    for (function, properties, says) in [
        ("Timeout: 30", "BatchSize: 11", "BatchSize: `11` is not between 1 and 10"),
        (
            "Timeout: 30",
            "ScalingConfig: {MaximumConcurrency: 1}",
            "MaximumConcurrency: `1` is not between 2 and 1000",
        ),
        ("Timeout: 30", "MaximumBatchingWindowInSeconds: 1", "is not known"),
        ("Timeout: 31", "", "EventSourceArn: hides messages for 30s, less than the function may take"),
        (
            "Timeout: 30, TenancyConfig: {TenantIsolationMode: PER_TENANT}",
            "",
            "FunctionName: does not go together with TenancyConfig",
        ),
    ] {
        let problem = with_queue(function, properties).unwrap_err().to_string();
        assert!(problem.contains(says), "{problem}");
    }
}

/// A bucket that tells a queue of what happens in it, where the queue's policy has these statements.
fn with_notifications(statements: &str, configuration: &str) -> Result<Template, TemplateError> {
    small(&format!(
        r#"
Resources:
  Files:
    Type: AWS::S3::Bucket
    Properties: {{BucketName: files, NotificationConfiguration: {configuration}}}
  Dead: {{Type: AWS::SQS::Queue, Properties: {{QueueName: dead}}}}
  Work:
    Type: AWS::SQS::Queue
    Properties:
      QueueName: work
      VisibilityTimeout: 60
      RedrivePolicy: {{deadLetterTargetArn: !GetAtt Dead.Arn, maxReceiveCount: 4}}
  WorkPolicy:
    Type: AWS::SQS::QueuePolicy
    Properties: {{Queues: [!Ref Work], PolicyDocument: {{Version: "2012-10-17", Statement: {statements}}}}}
"#
    ))
}

#[test]
fn a_bucket_tells_queues_that_take_it_from_that_bucket_alone() {
    const TOLD: &str = "{QueueConfigurations: [{Event: 's3:ObjectCreated:Put', Queue: !GetAtt Work.Arn}]}";
    let statement = |source: &str| {
        format!(
            "[{{Effect: Allow, Principal: {{Service: s3.amazonaws.com}}, Action: 'sqs:SendMessage', \
             Resource: !GetAtt Work.Arn, Condition: {{ArnEquals: {{'aws:SourceArn': '{source}'}}}}}}]"
        )
    };
    let template = with_notifications(&statement("arn:aws:s3:::files"), TOLD).unwrap();
    let notification = &template.buckets[0].notifications[0];
    assert_eq!(notification.queue, "work");
    assert!(notification.tells("ObjectCreated:Put") && !notification.tells("ObjectCreated:Copy"));
    let all = Notification { event: "s3:ObjectCreated:*".into(), ..notification.clone() };
    assert!(all.tells("ObjectCreated:Copy") && !all.tells("ObjectRemoved:Delete"));
    let work = template.queues.iter().find(|queue| queue.name == "work").unwrap();
    assert_eq!(work.visibility, Duration::from_secs(60));
    assert_eq!(work.redrive, Some(Redrive { queue: "dead".into(), max_receives: 4 }));

    let problem =
        |statements: &str, told: &str| with_notifications(statements, told).unwrap_err().to_string();
    for lacking in [statement("arn:aws:s3:::others"), "[]".to_owned()] {
        assert!(problem(&lacking, TOLD).contains("no policy of Work lets S3 send to it"));
    }
    let filtered = TOLD.replace("{Event", "{Filter: {}, Event");
    assert!(problem(&statement("arn:aws:s3:::files"), &filtered).contains("has a Filter"));
    let topic = "{TopicConfigurations: []}";
    assert!(problem("[]", topic).contains("is known here as QueueConfigurations alone"));
}

#[test]
fn a_functions_schedule_is_read_as_declared() {
    let every = |rate: &str| {
        let event = format!("{{Type: ScheduleV2, Properties: {{ScheduleExpression: {rate}}}}}");
        with_event(&event).map(|events| events.schedules[0].every.as_secs())
    };
    assert_eq!(every("rate(1 minute)").unwrap(), 60);
    assert_eq!(every("rate(2 hours)").unwrap(), 7_200);
    assert_eq!(every("rate(30 days)").unwrap(), 2_592_000);
    for bad in ["rate(0 minutes)", "rate(1 minutes)", "rate(5 minute)", "rate(5)", "cron(0 * * * ? *)"] {
        let at = "Resources.Function.Properties.Events.It.Properties.ScheduleExpression: `";
        assert!(every(bad).unwrap_err().to_string().starts_with(at), "{bad}");
    }
    let event = r#"{Type: Schedule, Properties: {Schedule: rate(5 minutes), Input: '{"a":1}', RetryPolicy: {MaximumRetryAttempts: 4}}}"#;
    let schedule = &with_event(event).unwrap().schedules[0];
    assert_eq!((&schedule.input, schedule.max_retries), (&Some(serde_json::json!({"a": 1})), 4));
    assert_eq!(
        schedule.source,
        ("aws.events", "arn:aws:events:us-east-1:000000000000:rule/FunctionIt".into())
    );
    let off = "{Type: ScheduleV2, Properties: {ScheduleExpression: rate(1 day), State: DISABLED}}";
    assert_eq!(with_event(off).unwrap(), Events::default());
}

#[test]
fn an_event_that_cannot_be_run_is_named() {
    const AT: &str = "Resources.Function.Properties.Events.It.";
    let problem = |event: &str| {
        let problem = with_event(event).unwrap_err().to_string();
        problem.strip_prefix(AT).unwrap_or_else(|| panic!("{problem}")).to_owned()
    };
    for kind in ["SQS", "DynamoDB"] {
        let says = format!("Type: events of type `{kind}` are not known to the local stack");
        assert_eq!(problem(&format!("{{Type: {kind}}}")), says);
    }
}

#[test]
fn the_functions_binaries_are_known_without_parameters() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml");
    let mut declared: Vec<String> = stack().functions.into_iter().map(|function| function.binary).collect();
    declared.sort();
    declared.dedup();
    assert_eq!(binaries(&path).unwrap(), declared);
}
