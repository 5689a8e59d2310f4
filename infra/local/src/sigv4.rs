//! AWS Signature Version 4: signing requests to the gateway and to services, and checking them as they do.

use std::time::Duration;

use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign as signature_of};
use aws_sigv4::sign::v4;
use http::{HeaderMap, Method};
use subtle::ConstantTimeEq;
use time::macros::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};

/// The service in the credential scope of a request to an API.
pub const GATEWAY: &str = "execute-api";
/// The header that carries a session's token.
pub const SECURITY_TOKEN: &str = "x-amz-security-token";
const ALGORITHM: &str = "AWS4-HMAC-SHA256";
/// How far the signer's clock may be off.
const MAX_SKEW: Duration = Duration::from_secs(300);

/// An access key.
#[derive(Clone)]
pub struct Credentials {
    /// The part that is sent.
    pub access_key_id: String,
    /// The part that is not.
    pub secret_access_key: String,
    /// The region that requests are signed for.
    pub region: String,
    /// Whom the key belongs to, as functions are told.
    pub user_arn: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

/// A request could not be signed: its address or a header of it is malformed.
#[derive(Debug, thiserror::Error)]
#[error("the request cannot be signed: {0}")]
pub struct SigningError(String);

/// Why a signature is refused. The text is for the caller; it names no secret and no expected value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no `Authorization` header.
    #[error("Missing Authentication Token")]
    Missing,
    /// It is not one of this algorithm, or a part of it is missing.
    #[error("The Authorization header is not a complete AWS4-HMAC-SHA256 signature.")]
    Incomplete,
    /// `host` and `x-amz-date` must be signed, and every signed header be there.
    #[error("The signature must cover host and x-amz-date, and each header that it names.")]
    Headers,
    /// It was made for another region, service or day.
    #[error("The credential is scoped to another region, service or date.")]
    Scope,
    /// It is too old, or from the future.
    #[error("The signature has expired or is not yet valid: its time is more than 5 minutes off.")]
    Time,
    /// Nobody has such an access key.
    #[error("The access key is not known.")]
    UnknownKey,
    /// The request is not the one that was signed, or the secret is another.
    #[error("The signature does not match the request.")]
    Mismatch,
    /// A session's key came without the session's token, or with another.
    #[error("The security token included in the request is invalid.")]
    Token,
    /// The session is over.
    #[error("The security token included in the request is expired")]
    Expired,
}

impl Refusal {
    /// What the services that speak JSON call it.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Missing => "MissingAuthenticationTokenException",
            Self::Incomplete | Self::Headers | Self::Scope => "IncompleteSignatureException",
            Self::UnknownKey | Self::Token => "UnrecognizedClientException",
            Self::Expired => "ExpiredTokenException",
            Self::Time | Self::Mismatch => "InvalidSignatureException",
        }
    }
}

/// Signs a request to a service, and returns the headers to add to it. `url` is the whole address;
/// `headers` are signed along with it and must be sent as they are.
///
/// # Errors
/// If the address or a header is malformed.
pub fn sign(
    service: &str,
    credentials: &Credentials,
    method: &Method,
    url: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    now: OffsetDateTime,
) -> Result<Vec<(String, String)>, SigningError> {
    let (instructions, _) = compute(service, credentials, method, url, headers, body, now)?.into_parts();
    Ok(instructions.headers().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

/// The access key that a request says it is signed with. Nothing is proven by it.
#[must_use]
pub fn presented_key(headers: &HeaderMap) -> Option<&str> {
    let authorization = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?;
    Parts::parse(authorization)?.credential.first().copied()
}

/// Checks the signature of a request to a service, and says whose it is. `uri` is the path and query as
/// sent.
///
/// # Errors
/// [`Refusal`].
pub fn verify<'a>(
    service: &str,
    known: impl IntoIterator<Item = &'a Credentials>,
    method: &Method,
    uri: &str,
    headers: &HeaderMap,
    body: &[u8],
    now: OffsetDateTime,
) -> Result<&'a Credentials, Refusal> {
    let mut presented = headers.get_all(http::header::AUTHORIZATION).iter();
    let authorization = match (presented.next(), presented.next()) {
        (None, _) => return Err(Refusal::Missing),
        (Some(one), None) => one.to_str().map_err(|_| Refusal::Incomplete)?,
        (Some(_), Some(_)) => return Err(Refusal::Incomplete),
    };
    let parts = Parts::parse(authorization).ok_or(Refusal::Incomplete)?;
    let date_text = headers.get("x-amz-date").and_then(|v| v.to_str().ok()).ok_or(Refusal::Headers)?;
    let signed_at = parse_date(date_text).ok_or(Refusal::Headers)?;

    let [access_key_id, day, region, scope, "aws4_request"] = parts.credential.as_slice() else {
        return Err(Refusal::Incomplete);
    };
    let credentials =
        known.into_iter().find(|c| c.access_key_id == *access_key_id).ok_or(Refusal::UnknownKey)?;
    if *region != credentials.region || *scope != service || !date_text.starts_with(*day) || day.len() != 8 {
        return Err(Refusal::Scope);
    }
    if (now - signed_at).unsigned_abs() > MAX_SKEW {
        return Err(Refusal::Time);
    }

    if !["host", "x-amz-date"].iter().all(|name| parts.signed_headers.contains(name)) {
        return Err(Refusal::Headers);
    }
    let mut signed = Vec::with_capacity(parts.signed_headers.len());
    for name in &parts.signed_headers {
        let mut values = headers.get_all(*name).iter();
        // A header sent twice could be read differently from how it was signed.
        let (Some(value), None) = (values.next(), values.next()) else { return Err(Refusal::Headers) };
        signed.push((*name, value.to_str().map_err(|_| Refusal::Headers)?));
    }
    let computed = compute(service, credentials, method, uri, &signed, body, signed_at)
        .map_err(|_| Refusal::Mismatch)?
        .into_parts()
        .1;
    let equal: bool = computed.as_bytes().ct_eq(parts.signature.as_bytes()).into();
    if equal { Ok(credentials) } else { Err(Refusal::Mismatch) }
}

fn compute(
    service: &str,
    credentials: &Credentials,
    method: &Method,
    uri: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    time: OffsetDateTime,
) -> Result<aws_sigv4::SigningOutput<aws_sigv4::http_request::SigningInstructions>, SigningError> {
    let identity = aws_credential_types::Credentials::new(
        &credentials.access_key_id,
        &credentials.secret_access_key,
        None,
        None,
        "local",
    )
    .into();
    // Nothing is left out of what the client signs, or says that it signed.
    let mut settings = SigningSettings::default();
    settings.excluded_headers = None;
    let params = v4::SigningParams::builder()
        .identity(&identity)
        .region(&credentials.region)
        .name(service)
        .time(time.into())
        .settings(settings)
        .build()
        .map_err(|error| SigningError(error.to_string()))?
        .into();
    let request =
        SignableRequest::new(method.as_str(), uri, headers.iter().copied(), SignableBody::Bytes(body))
            .map_err(|error| SigningError(error.to_string()))?;
    signature_of(request, &params).map_err(|error| SigningError(error.to_string()))
}

/// The headers that an `Authorization` header's signature covers.
pub(crate) fn signed_headers(authorization: &str) -> Option<Vec<&str>> {
    Some(Parts::parse(authorization)?.signed_headers)
}

/// The parts of an `Authorization` header.
struct Parts<'a> {
    credential: Vec<&'a str>,
    signed_headers: Vec<&'a str>,
    signature: &'a str,
}

impl<'a> Parts<'a> {
    fn parse(header: &'a str) -> Option<Self> {
        let rest = header.strip_prefix(ALGORITHM)?.strip_prefix(' ')?;
        let (mut credential, mut signed_headers, mut signature) = (None, None, None);
        for part in rest.split(',') {
            let (name, value) = part.trim().split_once('=')?;
            let slot = match name {
                "Credential" => &mut credential,
                "SignedHeaders" => &mut signed_headers,
                "Signature" => &mut signature,
                _ => return None,
            };
            if slot.replace(value).is_some() {
                return None;
            }
        }
        Some(Self {
            credential: credential?.split('/').collect(),
            signed_headers: signed_headers?.split(';').collect(),
            signature: signature?,
        })
    }
}

fn parse_date(text: &str) -> Option<OffsetDateTime> {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    Some(PrimitiveDateTime::parse(text, format).ok()?.assume_utc())
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    const NOW: OffsetDateTime = datetime!(2026-11-23 10:00:00 UTC);
    const URI: &str = "/admin/tenants?limit=2&cursor=a%2Fb";

    fn operator() -> Credentials {
        Credentials {
            access_key_id: "AKIDLOCAL".into(),
            secret_access_key: "secret".into(),
            region: "us-east-1".into(),
            user_arn: "arn:aws:iam::000000000000:user/operator".into(),
        }
    }

    fn signed(method: &Method, body: &[u8], at: OffsetDateTime) -> HeaderMap {
        let extra = [("content-type", "application/json")];
        let url = format!("http://127.0.0.1:9000{URI}");
        let mut headers = HeaderMap::new();
        headers.insert("host", "127.0.0.1:9000".parse().unwrap());
        headers.insert("content-type", "application/json".parse().unwrap());
        for (name, value) in sign(GATEWAY, &operator(), method, &url, &extra, body, at).unwrap() {
            let name: http::HeaderName = name.parse().unwrap();
            headers.insert(name, value.parse().unwrap());
        }
        headers
    }

    fn check(method: &Method, uri: &str, headers: &HeaderMap, body: &[u8]) -> Result<String, Refusal> {
        verify(GATEWAY, &[operator()], method, uri, headers, body, NOW).map(|c| c.access_key_id.clone())
    }

    #[test]
    fn what_was_signed_is_accepted_and_nothing_else() {
        let headers = signed(&Method::POST, b"{}", NOW);
        assert_eq!(check(&Method::POST, URI, &headers, b"{}").unwrap(), "AKIDLOCAL");

        assert_eq!(check(&Method::GET, URI, &headers, b"{}"), Err(Refusal::Mismatch));
        assert_eq!(check(&Method::POST, "/admin/tenants", &headers, b"{}"), Err(Refusal::Mismatch));
        assert_eq!(check(&Method::POST, URI, &headers, b"{ }"), Err(Refusal::Mismatch));
        let mut changed = headers.clone();
        changed.insert("content-type", "text/plain".parse().unwrap());
        assert_eq!(check(&Method::POST, URI, &changed, b"{}"), Err(Refusal::Mismatch));
        let mut elsewhere = headers.clone();
        elsewhere.insert("host", "example.com".parse().unwrap());
        assert_eq!(check(&Method::POST, URI, &elsewhere, b"{}"), Err(Refusal::Mismatch));
        let mut twice = headers.clone();
        twice.append("content-type", "text/plain".parse().unwrap());
        assert_eq!(check(&Method::POST, URI, &twice, b"{}"), Err(Refusal::Headers));
        let mut stranger = operator();
        stranger.access_key_id = "AKIDOTHER".into();
        assert_eq!(
            verify(GATEWAY, &[stranger], &Method::POST, URI, &headers, b"{}", NOW).unwrap_err(),
            Refusal::UnknownKey
        );
        let mut other_secret = operator();
        other_secret.secret_access_key = "Secret".into();
        assert_eq!(
            verify(GATEWAY, &[other_secret], &Method::POST, URI, &headers, b"{}", NOW).unwrap_err(),
            Refusal::Mismatch
        );
    }

    #[test]
    fn a_signature_is_good_for_five_minutes() {
        for (seconds, good) in [(0, true), (299, true), (-299, true), (301, false), (-301, false)] {
            let headers = signed(&Method::GET, b"", NOW + time::Duration::seconds(seconds));
            let result = check(&Method::GET, URI, &headers, b"");
            assert_eq!(result.is_ok(), good, "{seconds}: {result:?}");
            if !good {
                assert_eq!(result, Err(Refusal::Time));
            }
        }
    }

    #[test]
    fn what_is_no_signature_is_told_apart() {
        let with = |text: &str| {
            let mut headers = signed(&Method::GET, b"", NOW);
            headers.insert("authorization", text.parse().unwrap());
            check(&Method::GET, URI, &headers, b"").unwrap_err()
        };
        let good = signed(&Method::GET, b"", NOW)["authorization"].to_str().unwrap().to_owned();
        assert_eq!(check(&Method::GET, URI, &HeaderMap::new(), b""), Err(Refusal::Missing));
        assert_eq!(with("Bearer ten_pro_acme_x_y"), Refusal::Incomplete);
        assert_eq!(with("AWS4-HMAC-SHA256 Credential=a/b"), Refusal::Incomplete);
        assert_eq!(with(&good.replace("us-east-1", "eu-west-1")), Refusal::Scope);
        assert_eq!(with(&good.replace(GATEWAY, "s3")), Refusal::Scope);
        assert_eq!(with(&good.replace("20261123", "20261122")), Refusal::Scope);
        assert_eq!(with(&good.replace("content-type;host;", "content-type;")), Refusal::Headers);
        assert_eq!(with(&good.replace("content-type;host", "content-type;host;x-absent")), Refusal::Headers);
    }
}
