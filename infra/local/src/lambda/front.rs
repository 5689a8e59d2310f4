//! Lambda's own API, as far as functions call it: `Invoke`, for the result.
//! <https://docs.aws.amazon.com/lambda/latest/api/API_Invoke.html>

use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::json;
use tokio::net::TcpListener;

use super::{InvokeError, Lambda, MAX_PAYLOAD, WITHOUT_HURRY};
use crate::iam::{Callers, Intent};
use crate::serving::{self, system_clock};
use crate::template::function_arn;

/// The service in the credential scope of its calls.
const SERVICE: &str = "lambda";

#[derive(Clone)]
struct Front {
    lambda: Arc<Lambda>,
    callers: Arc<Callers>,
}

/// Serves the API until `shutdown` resolves.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    lambda: Arc<Lambda>,
    callers: Arc<Callers>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let routes = Router::new()
        .route("/2015-03-31/functions/{function}/invocations", post(invoke))
        .layer(DefaultBodyLimit::max(MAX_PAYLOAD * 2))
        .with_state(Front { lambda, callers });
    serving::serve(listener, routes, shutdown).await
}

async fn invoke(
    State(front): State<Front>,
    Path(function): Path<String>,
    uri: Uri,
    headers: HeaderMap,
    payload: Bytes,
) -> Response {
    let target = uri.path_and_query().map_or("/", |target| target.as_str());
    let now = system_clock();
    let signer = front.callers.signer(SERVICE, &Method::POST, target, &headers, &payload, now);
    let caller = match signer {
        Ok(caller) => caller,
        Err(refusal) => return refused(StatusCode::FORBIDDEN, refusal.code(), &refusal.to_string()),
    };
    // By its name, or by an ARN that ends with it.
    let name = function.rsplit(':').next().unwrap_or_default();
    let intent = Intent::new("lambda:InvokeFunction", function_arn(name));
    if let Some(message) = front.callers.refused(&caller, &[intent]) {
        tracing::warn!("Lambda refused Invoke: {message}");
        return refused(StatusCode::FORBIDDEN, "AccessDeniedException", &message);
    }
    let header = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    if header("x-amz-invocation-type").is_some_and(|kind| kind != "RequestResponse") {
        let message = "Only the invocation type RequestResponse is implemented by the local stack.";
        return refused(StatusCode::NOT_IMPLEMENTED, "NotImplemented", message);
    }
    let tenant = header("x-amz-tenant-id");
    let failure = match front.lambda.invoke(name, tenant, payload, WITHOUT_HURRY).await {
        Ok(result) => return result.payload.into_response(),
        Err(failure) => failure,
    };
    match failure {
        InvokeError::UnknownFunction(_) => {
            refused(StatusCode::NOT_FOUND, "ResourceNotFoundException", &failure.to_string())
        }
        InvokeError::RequestTooLarge => {
            refused(StatusCode::PAYLOAD_TOO_LARGE, "RequestTooLargeException", &failure.to_string())
        }
        InvokeError::TenantId(_) => {
            refused(StatusCode::BAD_REQUEST, "InvalidParameterValueException", &failure.to_string())
        }
        InvokeError::Closing => {
            refused(StatusCode::INTERNAL_SERVER_ERROR, "ServiceException", &failure.to_string())
        }
        // What goes wrong in a function is a result, too.
        InvokeError::Function { kind, message } => failed(&kind, &message),
        other => failed("Runtime.ExitError", &other.to_string()),
    }
}

fn failed(kind: &str, message: &str) -> Response {
    let body = Json(json!({ "errorType": kind, "errorMessage": message }));
    ([("x-amz-function-error", "Unhandled")], body).into_response()
}

fn refused(status: StatusCode, kind: &str, message: &str) -> Response {
    let body = Json(json!({ "Type": "User", "message": message, "Message": message }));
    (status, [("x-amzn-errortype", kind)], body).into_response()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::iam::{Caller, Policy};
    use crate::lambda::tests::{function, options, programs};
    use crate::sigv4::{self, Credentials};

    fn key(id: &str) -> Credentials {
        Credentials {
            access_key_id: id.to_owned(),
            secret_access_key: "secret".to_owned(),
            region: crate::template::REGION.to_owned(),
            user_arn: format!("arn:aws:sts::0:assumed-role/{id}"),
        }
    }

    #[tokio::test]
    async fn a_function_is_invoked_by_whom_its_policies_let() {
        let folder = tempfile::tempdir().unwrap();
        programs(folder.path(), &["fake"]);
        let lambda = Lambda::start(vec![function(20_000)], options(folder.path())).await.unwrap();
        let allow = json!({"Version": "2012-10-17", "Statement": [{"Effect": "Allow",
            "Action": "lambda:InvokeFunction", "Resource": function_arn("bulkhead-fake")}]});
        let policies = vec![Policy::parse(&allow).unwrap()];
        let callers = [
            Caller::in_role(key("MAY"), "may".into(), policies),
            Caller::in_role(key("NOT"), "not".into(), Vec::new()),
        ];
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let callers = Arc::new(Callers::new(callers.into()));
        tokio::spawn(serve(listener, Arc::clone(&lambda), callers, std::future::pending()));
        let invoke = async |who: Credentials, name: &str, body: &'static str, kind: &str| {
            let url = format!("{url}/2015-03-31/functions/{name}/invocations");
            let headers = [("x-amz-invocation-type", kind)];
            let now = system_clock();
            let signed = sigv4::sign(SERVICE, &who, &Method::POST, &url, &headers, body.as_bytes(), now);
            let request = reqwest::Client::new().post(&url).header(headers[0].0, kind).body(body);
            let signed = signed.unwrap().into_iter();
            let request = signed.fold(request, |request, (name, value)| request.header(name, value));
            let answer = request.send().await.unwrap();
            let of = |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
            let said = of("x-amzn-errortype").or_else(|| of("x-amz-function-error"));
            (answer.status().as_u16(), said, answer.json::<Value>().await.unwrap())
        };
        let (request, fine) = ("RequestResponse", r#"{"do":"raw {\"a\":1}"}"#);
        let by_arn = function_arn("bulkhead-fake").replace(':', "%3A");
        for name in ["bulkhead-fake", &by_arn] {
            assert_eq!(invoke(key("MAY"), name, fine, request).await, (200, None, json!({"a": 1})));
        }
        let (status, said, body) = invoke(key("MAY"), "bulkhead-fake", r#"{"do":"fail"}"#, request).await;
        assert_eq!((status, said.as_deref()), (200, Some("Unhandled")));
        assert_eq!(body, json!({"errorType": "Oops", "errorMessage": "bad"}));
        for (who, name, kind, status, says) in [
            (key("NOT"), "bulkhead-fake", request, 403, "AccessDeniedException"),
            (key("MAY"), "bulkhead-other", request, 403, "AccessDeniedException"),
            (key("NOBODY"), "bulkhead-fake", request, 403, "UnrecognizedClientException"),
            (key("MAY"), "bulkhead-fake", "Event", 501, "NotImplemented"),
        ] {
            let (answered, said, _) = invoke(who, name, fine, kind).await;
            assert_eq!((answered, said.as_deref()), (status, Some(says)));
        }
        lambda.shutdown().await;
    }
}
