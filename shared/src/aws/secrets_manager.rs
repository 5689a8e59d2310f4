//! AWS Secrets Manager as its protocol has it, spoken with the runtime that all of AWS's clients share: signatures,
//! timeouts, retries and connections are theirs, the few calls that are made are written here.
//!
//! AWS's client for it puts a table of all regions of the world in order when it is made, with a pattern for each
//! part of it, and describes itself anew in each request. A function that has a secret reads it before its first
//! event, and does nothing else there that takes as long. Where the service is, a test asks that client.
//! <https://docs.aws.amazon.com/secretsmanager/latest/apireference/Welcome.html>

use aws_runtime::auth::SigV4OperationSigningConfig;
use aws_runtime::auth::sigv4::{SCHEME_ID, SigV4AuthScheme};
use aws_runtime::recursion_detection::RecursionDetectionInterceptor;
use aws_runtime::retries::classifiers::AwsErrorCodeClassifier;
use aws_runtime::service_clock_skew::{ServiceClockSkewClassifier, ServiceClockSkewInterceptor};
use aws_smithy_runtime::client::orchestrator::operation::Operation;
use aws_smithy_runtime::client::retries::classifiers::{HttpStatusCodeClassifier, TransientErrorClassifier};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::auth::static_resolver::StaticAuthSchemeOptionResolver;
use aws_smithy_runtime_api::client::auth::{
    AuthSchemeOptionResolverParams, SharedAuthScheme, SharedAuthSchemeOptionResolver,
};
use aws_smithy_runtime_api::client::identity::SharedIdentityResolver;
use aws_smithy_runtime_api::client::orchestrator::{
    HttpRequest, HttpResponse, OrchestratorError, SensitiveOutput,
};
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponentsBuilder;
use aws_smithy_runtime_api::client::runtime_plugin::StaticRuntimePlugin;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::config_bag::Layer;
use aws_smithy_types::error::ErrorMetadata;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use aws_smithy_types::retry::RetryConfig;
use aws_smithy_types::timeout::TimeoutConfig;
use aws_types::region::SigningRegion;
use aws_types::service_config::ServiceConfigKey;
use aws_types::{SdkConfig, SigningName};
use serde_json::Value;

use super::failure_code;

/// The code of the refusal when a secret is not there.
const NOT_FOUND: &str = "ResourceNotFoundException";

/// One identity's way to the service.
#[derive(Clone, Debug)]
pub(super) struct SecretsManager(Operation<Call, Value, Refused>);

/// Why a call brought no answer. What was answered is not kept: it may be a secret, or a part of one.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The service refuses it, by this code.
    #[error("Secrets Manager refuses {operation}: {code}")]
    Refused {
        /// What was asked for.
        operation: &'static str,
        /// The code.
        code: String,
    },
    /// There was no answer, or none that is one.
    #[error("Secrets Manager does not answer {operation}")]
    NoAnswer {
        /// What was asked for.
        operation: &'static str,
        /// Why.
        #[source]
        source: BoxError,
    },
}

impl Failure {
    fn of(operation: &'static str, error: SdkError<Refused, HttpResponse>) -> Self {
        if matches!(error, SdkError::ServiceError(_)) {
            return Self::Refused { operation, code: failure_code(&error) };
        }
        let source = error.into_source().unwrap_or_else(|_| "the call ended without a reason".into());
        Self::NoAnswer { operation, source }
    }

    /// Whether the secret that was asked for is not there.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if code == NOT_FOUND)
    }
}

/// What is asked. No call that is made here has a secret in it.
#[derive(Debug)]
struct Call {
    target: String,
    input: String,
}

/// A refusal as the runtime takes it, which repeats calls that are refused for the time being.
#[derive(Debug, thiserror::Error)]
#[error("refused")]
struct Refused(ErrorMetadata);

impl ProvideErrorMetadata for Refused {
    fn meta(&self) -> &ErrorMetadata {
        &self.0
    }
}

impl SecretsManager {
    pub(super) fn new(config: &SdkConfig) -> Self {
        let region = config.region().cloned();
        let mut layer = Layer::new("secretsmanager");
        layer.store_put(SensitiveOutput);
        layer.store_put(SigningName::from_static("secretsmanager"));
        layer.store_put(SigV4OperationSigningConfig::default());
        layer.store_put(AuthSchemeOptionResolverParams::new(()));
        let url = configured(config).unwrap_or_else(|| {
            let region = region.as_ref().map_or("", |region| region.as_ref());
            url(region, config.use_fips() == Some(true), config.use_dual_stack() == Some(true))
        });
        if let Some(region) = region {
            layer.store_put(SigningRegion::from(region));
        }
        let mut components = RuntimeComponentsBuilder::new("secretsmanager")
            .with_auth_scheme(SharedAuthScheme::new(SigV4AuthScheme::new()))
            .with_auth_scheme_option_resolver(Some(SharedAuthSchemeOptionResolver::new(
                StaticAuthSchemeOptionResolver::new(vec![SCHEME_ID]),
            )))
            .with_identity_cache(config.identity_cache());
        if let Some(credentials) = config.credentials_provider() {
            components.set_identity_resolver(SCHEME_ID, SharedIdentityResolver::new(credentials));
        }
        let mut operation = Operation::builder()
            .service_name("Secrets Manager")
            .operation_name("Call")
            .endpoint_url(&url)
            .standard_retry(config.retry_config().unwrap_or(&RetryConfig::standard()))
            .timeout_config(config.timeout_config().cloned().unwrap_or_else(TimeoutConfig::disabled))
            .with_connection_poisoning()
            // The trace of the request that a call is made for goes on to the service.
            .interceptor(RecursionDetectionInterceptor::new())
            .interceptor(ServiceClockSkewInterceptor::new())
            .retry_classifier(TransientErrorClassifier::<Refused>::new())
            .retry_classifier(AwsErrorCodeClassifier::<Refused>::new())
            .retry_classifier(ServiceClockSkewClassifier::<Refused>::new())
            .retry_classifier(HttpStatusCodeClassifier::default())
            .runtime_plugin(
                StaticRuntimePlugin::new().with_config(layer.freeze()).with_runtime_components(components),
            );
        if let Some(version) = config.behavior_version() {
            operation = operation.behavior_version(version);
        }
        if let Some(client) = config.http_client() {
            operation = operation.http_client(client);
        }
        if let Some(time) = config.time_source() {
            operation = operation.time_source(time);
        }
        if let Some(sleep) = config.sleep_impl() {
            operation = operation.sleep_impl(sleep);
        }
        Self(operation.serializer(request).deserializer(answer).build())
    }

    /// The answer to a call.
    ///
    /// # Errors
    /// [`Failure`].
    pub(super) async fn call(&self, operation: &'static str, input: &Value) -> Result<Value, Failure> {
        let call = Call { target: format!("secretsmanager.{operation}"), input: input.to_string() };
        Box::pin(self.0.invoke(call)).await.map_err(|error| Failure::of(operation, error))
    }
}

fn request(call: Call) -> Result<HttpRequest, BoxError> {
    let length = call.input.len().to_string();
    let mut request = HttpRequest::new(SdkBody::from(call.input));
    request.set_method("POST")?;
    let headers = request.headers_mut();
    headers.try_insert("content-type", "application/x-amz-json-1.1")?;
    headers.try_insert("content-length", length)?;
    headers.try_insert("x-amz-target", call.target)?;
    headers.try_insert("user-agent", "bulkhead")?;
    Ok(request)
}

/// <https://smithy.io/2.0/aws/protocols/aws-json-1_1-protocol.html>
fn answer(response: &HttpResponse) -> Result<Value, OrchestratorError<Refused>> {
    let body: Option<Value> = response.body().bytes().and_then(|body| serde_json::from_slice(body).ok());
    if response.status().is_success() {
        return body.ok_or_else(|| OrchestratorError::other("the answer is no JSON"));
    }
    let body = body.unwrap_or_default();
    let kind = response.headers().get("x-amzn-errortype").or_else(|| body.get("__type")?.as_str());
    // It may have a namespace before it and an address behind it.
    let code = kind.and_then(|kind| kind.rsplit('#').next()?.split(':').next());
    let mut metadata = ErrorMetadata::builder();
    if let Some(code) = code {
        metadata = metadata.code(code);
    }
    Err(OrchestratorError::operation(Refused(metadata.build())))
}

/// The address that the configuration names.
fn configured(config: &SdkConfig) -> Option<String> {
    let key = ServiceConfigKey::builder().service_id("Secrets Manager").env("AWS_ENDPOINT_URL");
    let key = key.profile("endpoint_url").build().ok()?;
    let own = config.service_config().and_then(|settings| settings.load_config(key));
    own.or_else(|| config.endpoint_url().map(str::to_owned))
}

/// What a region's name begins with, of those that are not AWS's commercial ones; the ending of its services' names,
/// and that of those that are reached by IPv6 too, where that is another.
/// <https://docs.aws.amazon.com/whitepapers/latest/aws-fault-isolation-boundaries/partitions.html>
const PARTITIONS: [(&str, &str, &str); 6] = [
    ("cn-", "amazonaws.com.cn", "amazonaws.com.cn"),
    ("eusc-", "amazonaws.eu", "api.amazonwebservices.eu"),
    ("us-iso-", "c2s.ic.gov", "api.aws.ic.gov"),
    ("us-isob-", "sc2s.sgov.gov", "api.aws.scloud"),
    ("eu-isoe-", "cloud.adc-e.uk", "api.cloud-aws.adc-e.uk"),
    ("us-isof-", "csp.hci.ic.gov", "api.aws.hci.ic.gov"),
];

/// Where the service is in a region.
fn url(region: &str, fips: bool, dual_stack: bool) -> String {
    let partition = PARTITIONS.into_iter().find(|(prefix, ..)| region.starts_with(prefix));
    let (_, plain, dual) = partition.unwrap_or(("", "amazonaws.com", "amazonaws.com"));
    let (fips, ending) = (if fips { "-fips" } else { "" }, if dual_stack { dual } else { plain });
    format!("https://secretsmanager{fips}.{region}.{ending}")
}

#[cfg(test)]
mod tests {
    use aws_credential_types::Credentials;
    use aws_credential_types::provider::SharedCredentialsProvider;
    use aws_sdk_secretsmanager::config::endpoint::{DefaultResolver, Params, ResolveEndpoint};
    use aws_sdk_secretsmanager::config::{BehaviorVersion, IdentityCache, Region};

    use super::*;
    use crate::answering;
    use crate::aws::connections::Connections;

    #[tokio::test]
    async fn the_service_is_where_its_own_client_looks_for_it() {
        let regions = [
            "us-east-1",
            "eu-central-1",
            "il-central-1",
            "mx-central-1",
            "us-gov-west-1",
            "cn-north-1",
            "eusc-de-east-1",
            "us-iso-east-1",
            "us-isob-east-1",
            "eu-isoe-west-1",
            "us-isof-south-1",
        ];
        let kinds = [(false, false), (false, true), (true, false), (true, true)];
        for (region, (fips, dual_stack)) in
            regions.iter().flat_map(|region| kinds.map(|kind| (*region, kind)))
        {
            // China has no FIPS, and its address for it no one answer.
            if region.starts_with("cn-") && fips {
                continue;
            }
            let asked = Params::builder().region(region).use_fips(fips).use_dual_stack(dual_stack).build();
            let found = DefaultResolver::new().resolve_endpoint(&asked.unwrap()).await.unwrap();
            assert_eq!(url(region, fips, dual_stack), found.url(), "{region} {fips} {dual_stack}");
        }
    }

    #[test]
    fn a_refusal_is_named_without_what_stands_around_its_code() {
        let refused = |header: Option<&str>, body: &'static str| {
            let mut response = HttpResponse::new(400.try_into().unwrap(), SdkBody::from(body));
            if let Some(header) = header {
                response.headers_mut().insert("x-amzn-errortype", header.to_owned());
            }
            let Err(error) = answer(&response) else { panic!("{body}") };
            error.as_operation_error().unwrap().code().map(str::to_owned)
        };
        let named = Some("ThrottlingException".to_owned());
        assert_eq!(refused(None, r#"{"__type":"ThrottlingException","Message":"slow"}"#), named);
        assert_eq!(refused(None, r#"{"__type":"com.amazonaws.secretsmanager#ThrottlingException"}"#), named);
        assert_eq!(refused(Some("ThrottlingException:http://internal.amazon.com/"), ""), named);
        assert_eq!(refused(None, "<html>"), None);
    }
    /// The service, answering this and nothing else: first lines with headers, and bodies.
    async fn service(answers: Vec<(&'static str, &'static str)>) -> SecretsManager {
        let whole = |(head, body): (&str, &str)| {
            let length = body.len();
            format!("HTTP/1.1 {head}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}")
        };
        let (address, _) =
            answering::service(answers.into_iter().map(|one| Some(whole(one))).collect()).await;
        let credentials = Credentials::new("id", "key", None, None, "test");
        let config = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .http_client(Connections::new().unwrap())
            .credentials_provider(SharedCredentialsProvider::new(credentials))
            .identity_cache(IdentityCache::lazy().build())
            .region(Region::new("us-east-1"))
            .endpoint_url(address)
            .build();
        SecretsManager::new(&config)
    }

    #[tokio::test]
    async fn what_was_answered_is_in_no_error() {
        for answer in [
            ("200 OK", r#"{"SecretString":"hunter2""#),
            ("400 Bad Request", r#"{"Message":"hunter2"}"#),
            ("500 Internal Server Error", "hunter2"),
        ] {
            let call = service(vec![answer; 3]).await.call("GetSecretValue", &Value::Null).await;
            let error = printed(&call.unwrap_err());
            assert!(!error.contains("hunter2") && error.contains("GetSecretValue"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_clock_that_is_wrong_is_set_by_the_answer() {
        let skewed = "400 Bad Request\r\ndate: Thu, 01 Jan 2099 00:00:00 GMT";
        let skewed = (skewed, r#"{"__type":"InvalidSignatureException"}"#);
        let there = service(vec![skewed, ("200 OK", r#"{"Name":"s"}"#)]).await;
        assert_eq!(there.call("GetSecretValue", &Value::Null).await.unwrap()["Name"], "s");
    }

    /// An error as it may be printed, with all that it comes from.
    fn printed(error: &Failure) -> String {
        let mut all = format!("{error:?} {error}");
        let mut source = std::error::Error::source(error);
        while let Some(next) = source {
            all.push_str(&format!(" {next:?} {next}"));
            source = next.source();
        }
        all
    }
}
