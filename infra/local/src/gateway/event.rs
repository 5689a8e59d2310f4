//! Requests as the events that functions get: REST API, payload version 1.0.

use std::collections::BTreeMap;
use std::net::IpAddr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderMap, Method, Uri, header, request::Parts};
use percent_encoding::percent_decode;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::macros::format_description;

use crate::lambda::uuid;
use crate::serving::{system_clock, unique_id};
use crate::sigv4::Credentials;
use crate::template::{Api, Route};

/// Headers that concern one connection only.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "expect",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
/// Headers that the gateway sets, whatever the client sent.
const FORWARDED: [&str; 3] = ["x-forwarded-for", "x-forwarded-port", "x-forwarded-proto"];

/// One request on its way through the gateway.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) request_id: String,
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) path_parameters: BTreeMap<String, String>,
    source_ip: IpAddr,
    received_at: OffsetDateTime,
}

/// Who calls, as far as the gateway found out.
#[derive(Debug)]
pub(super) enum Caller<'a> {
    Anyone,
    /// What the authorizer said, for `requestContext.authorizer`.
    Tenant(Map<String, Value>),
    Operator(&'a Credentials),
}

impl Caller<'_> {
    /// A value of the authorizer's context.
    pub(super) fn says(&self, name: &str) -> Option<&str> {
        match self {
            Caller::Tenant(context) => context.get(name)?.as_str(),
            Caller::Anyone | Caller::Operator(_) => None,
        }
    }
}

impl Exchange {
    pub(super) fn new(parts: Parts, source_ip: IpAddr) -> Self {
        Self {
            request_id: uuid(&unique_id()),
            method: parts.method,
            uri: parts.uri,
            headers: parts.headers,
            body: Bytes::new(),
            path_parameters: BTreeMap::new(),
            source_ip,
            received_at: system_clock(),
        }
    }

    /// Where the client thinks it is. Real addresses have a valid one, so functions may rely on it.
    pub(super) fn host(&self) -> Option<&str> {
        let text = self.headers.get(header::HOST)?.to_str().ok()?;
        let authority: Authority = text.parse().ok()?;
        (!authority.host().is_empty() && !text.contains('@')).then_some(text)
    }

    /// The event for an integration.
    pub(super) fn proxy_event(&self, api: &Api, route: &Route, caller: &Caller<'_>) -> Value {
        let mut event = self.request(route);
        let (body, encoded) = match std::str::from_utf8(&self.body) {
            Ok("") => (Value::Null, false),
            Ok(text) => (Value::from(text), false),
            // API Gateway would replace what is not UTF-8. So that a function can refuse it rather
            // than take it for what was sent, it gets the bytes.
            Err(_) => (Value::from(BASE64_STANDARD.encode(&self.body)), true),
        };
        event.insert("body".to_owned(), body);
        event.insert("isBase64Encoded".to_owned(), Value::Bool(encoded));
        event.insert("requestContext".to_owned(), self.context(api, route, caller));
        Value::Object(event)
    }

    /// The event for an authorizer of type REQUEST.
    pub(super) fn authorizer_event(&self, api: &Api, route: &Route) -> Value {
        let mut event = self.request(route);
        event.insert("type".to_owned(), Value::from("REQUEST"));
        event.insert("methodArn".to_owned(), Value::from(self.method_arn(api)));
        event.insert("requestContext".to_owned(), self.context(api, route, &Caller::Anyone));
        Value::Object(event)
    }

    /// What policies name this request by.
    pub(super) fn method_arn(&self, api: &Api) -> String {
        let path = self.uri.path().trim_start_matches('/');
        format!(
            "arn:aws:execute-api:{}:{}:{}/{}/{}/{path}",
            api.region, api.account, api.id, api.stage, self.method
        )
    }

    fn request(&self, route: &Route) -> Map<String, Value> {
        let headers = self.forwarded_headers();
        let query = self.query();
        let parameters =
            if self.path_parameters.is_empty() { Value::Null } else { json!(self.path_parameters) };
        Map::from_iter([
            ("resource".to_owned(), Value::from(route.path.as_str())),
            ("path".to_owned(), Value::from(self.uri.path())),
            ("httpMethod".to_owned(), Value::from(self.method.as_str())),
            ("headers".to_owned(), last_of(&headers)),
            ("multiValueHeaders".to_owned(), json!(headers)),
            ("queryStringParameters".to_owned(), last_of(&query)),
            (
                "multiValueQueryStringParameters".to_owned(),
                if query.is_empty() { Value::Null } else { json!(query) },
            ),
            ("pathParameters".to_owned(), parameters),
            ("stageVariables".to_owned(), Value::Null),
        ])
    }

    fn context(&self, api: &Api, route: &Route, caller: &Caller<'_>) -> Value {
        let host = self.host().unwrap_or_default();
        let time = self
            .received_at
            .format(format_description!("[day]/[month repr:short]/[year]:[hour]:[minute]:[second] +0000"))
            .unwrap_or_default();
        let mut context = json!({
            "accountId": api.account,
            "apiId": api.id,
            "domainName": host.split(':').next(),
            "domainPrefix": host.split(['.', ':']).next(),
            "extendedRequestId": self.request_id,
            "httpMethod": self.method.as_str(),
            "identity": self.identity(api, caller),
            "path": self.uri.path(),
            "protocol": "HTTP/1.1",
            "requestId": self.request_id,
            "requestTime": time,
            "requestTimeEpoch": i64::try_from(self.received_at.unix_timestamp_nanos() / 1_000_000).unwrap_or_default(),
            "resourceId": "local",
            "resourcePath": route.path,
            "stage": api.stage,
        });
        if let (Caller::Tenant(authorizer), Some(context)) = (caller, context.as_object_mut()) {
            context.insert("authorizer".to_owned(), Value::Object(authorizer.clone()));
        }
        context
    }

    fn identity(&self, api: &Api, caller: &Caller<'_>) -> Value {
        let operator = match caller {
            Caller::Operator(credentials) => Some(*credentials),
            Caller::Anyone | Caller::Tenant(_) => None,
        };
        json!({
            "accessKey": operator.map(|o| o.access_key_id.as_str()),
            "accountId": operator.map(|_| api.account.as_str()),
            "apiKey": null,
            "apiKeyId": null,
            "caller": operator.map(|o| o.access_key_id.as_str()),
            "clientCert": null,
            "cognitoAuthenticationProvider": null,
            "cognitoAuthenticationType": null,
            "cognitoIdentityId": null,
            "cognitoIdentityPoolId": null,
            "principalOrgId": null,
            "sourceIp": self.source_ip.to_string(),
            "user": operator.map(|o| o.access_key_id.as_str()),
            "userAgent": self.headers.get(header::USER_AGENT).map(|v| String::from_utf8_lossy(v.as_bytes())),
            "userArn": operator.map(|o| o.user_arn.as_str()),
        })
    }

    /// The client's headers as they are, but for those of the connection and of the gateway.
    fn forwarded_headers(&self) -> BTreeMap<String, Vec<String>> {
        let mut headers: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, value) in &self.headers {
            if !HOP_BY_HOP.contains(&name.as_str()) && !FORWARDED.contains(&name.as_str()) {
                let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
                headers.entry(name.as_str().to_owned()).or_default().push(value);
            }
        }
        // What the client says about earlier hops stays in front of what the gateway knows.
        let earlier = self.headers.get_all("x-forwarded-for").iter();
        let mut hops: Vec<String> =
            earlier.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect();
        hops.push(self.source_ip.to_string());
        headers.insert("x-forwarded-for".to_owned(), vec![hops.join(", ")]);
        let port = self.host().and_then(|host| host.parse::<Authority>().ok()?.port_u16()).unwrap_or(80);
        headers.insert("x-forwarded-port".to_owned(), vec![port.to_string()]);
        headers.insert("x-forwarded-proto".to_owned(), vec!["http".to_owned()]);
        headers
    }

    fn query(&self) -> BTreeMap<String, Vec<String>> {
        let mut query: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for pair in self.uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            query.entry(decode_lossy(name)).or_default().push(decode_lossy(value));
        }
        query
    }
}

/// The single-valued form of a map: the last value.
fn last_of(values: &BTreeMap<String, Vec<String>>) -> Value {
    if values.is_empty() {
        return Value::Null;
    }
    values
        .iter()
        .filter_map(|(name, values)| Some((name.clone(), Value::from(values.last()?.as_str()))))
        .collect()
}

/// Matches a path against a template such as `/v1/documents/{id}`: the parameters, still encoded.
pub(super) fn match_path<'a>(template: &str, path: &'a str) -> Option<BTreeMap<String, &'a str>> {
    let mut parameters = BTreeMap::new();
    let mut segments = path.split('/');
    for expected in template.split('/') {
        let segment = segments.next()?;
        match expected.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
            Some(_) if segment.is_empty() => return None,
            Some(name) => {
                parameters.insert(name.to_owned(), segment);
            }
            None if expected == segment => {}
            None => return None,
        }
    }
    segments.next().is_none().then_some(parameters)
}

/// A path parameter's value, if it is text.
pub(super) fn decode(raw: &str) -> Option<String> {
    percent_decode(raw.as_bytes()).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

/// A part of a query: `+` is a space there.
fn decode_lossy(raw: &str) -> String {
    let spaced = raw.replace('+', " ");
    percent_decode(spaced.as_bytes()).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_match_by_segment() {
        let matched =
            |template, path| match_path(template, path).map(|p| p.into_values().collect::<Vec<_>>());
        assert_eq!(matched("/v1/documents/{id}", "/v1/documents/a%2Fb"), Some(vec!["a%2Fb"]));
        assert_eq!(matched("/v1/documents", "/v1/documents"), Some(vec![]));
        for path in
            ["/v1/documents/", "/v1/documents/a/b", "/v1/documents", "/V1/documents/a", "v1/documents/a"]
        {
            assert_eq!(matched("/v1/documents/{id}", path), None, "{path}");
        }
        assert_eq!(decode("a%2Fb%20c+d").as_deref(), Some("a/b c+d"));
        assert_eq!(decode("%ff"), None);
    }

    #[test]
    fn a_query_keeps_every_value() {
        let (parts, ()) =
            http::Request::builder().uri("/x?a=1&b=%2F+c&a=2&flag").body(()).unwrap().into_parts();
        let exchange = Exchange::new(parts, IpAddr::from([127, 0, 0, 1]));
        let query = exchange.query();
        assert_eq!(query["a"], ["1", "2"]);
        assert_eq!(query["b"], ["/ c"]);
        assert_eq!(query["flag"], [""]);
        assert_eq!(last_of(&query)["a"], "2");
    }
}
