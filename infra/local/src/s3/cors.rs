//! What browsers ask before a page puts a file, and are told with what is answered to it.
//! <https://docs.aws.amazon.com/AmazonS3/latest/userguide/cors.html>

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderName, Method, StatusCode};

use crate::template::CorsRule;

/// The rules of each bucket that has any.
#[derive(Clone)]
pub(super) struct Rules(pub(super) Arc<BTreeMap<String, Vec<CorsRule>>>);

/// Answers what browsers ask, and tells them of other answers whether the page may see them.
pub(super) async fn answer(State(Rules(rules)): State<Rules>, request: Request, next: Next) -> Response {
    let (method, headers) = (request.method().clone(), request.headers().clone());
    // Buckets are named by the path here.
    let bucket = request.uri().path().split('/').nth(1).unwrap_or_default();
    let rules = rules.get(bucket).map(Vec::as_slice).unwrap_or_default();
    if method == Method::OPTIONS {
        let asked = text(&headers, &ACCESS_CONTROL_REQUEST_METHOD).unwrap_or_default();
        return match allowed(rules, &headers, asked) {
            Some(told) => (StatusCode::OK, told).into_response(),
            None => {
                let refused = "<Error><Code>AccessForbidden</Code><Message>CORSResponse: This CORS request is not \
                               allowed.</Message></Error>";
                (StatusCode::FORBIDDEN, refused).into_response()
            }
        };
    }
    let told = allowed(rules, &headers, method.as_str());
    let mut response = next.run(request).await;
    response.headers_mut().extend(told.unwrap_or_default());
    response
}

/// What a browser is told of a request that a rule allows.
fn allowed(rules: &[CorsRule], headers: &HeaderMap, method: &str) -> Option<HeaderMap> {
    let origin = text(headers, &ORIGIN)?;
    let asked = text(headers, &ACCESS_CONTROL_REQUEST_HEADERS).unwrap_or_default().to_ascii_lowercase();
    let asked: Vec<&str> = asked.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    let rule = rules.iter().find(|rule| {
        rule.origins.iter().any(|allowed| allowed == origin)
            && rule.methods.iter().any(|allowed| allowed == method)
            && asked.iter().all(|name| rule.headers.iter().any(|allowed| allowed == name))
    })?;
    let told = [
        (ACCESS_CONTROL_ALLOW_ORIGIN, origin.to_owned()),
        (ACCESS_CONTROL_ALLOW_METHODS, rule.methods.join(", ")),
        (ACCESS_CONTROL_ALLOW_HEADERS, asked.join(", ")),
        (ACCESS_CONTROL_MAX_AGE, rule.max_age_s.to_string()),
        (VARY, "Origin, Access-Control-Request-Headers, Access-Control-Request-Method".to_owned()),
    ];
    told.into_iter().map(|(name, value)| Some((name, value.parse().ok()?))).collect()
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}
