//! The one error that callers see, as `api.md` fixes it.

use serde::{Deserialize, Serialize, Serializer};

use crate::scope::RequestId;

/// What went wrong, as a caller's program tells it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names are the documentation: api.md's error codes")]
pub enum Code {
    InvalidRequest,
    InvalidKey,
    InsufficientScope,
    IpNotAllowed,
    TenantSuspended,
    ModelNotAllowed,
    NotFound,
    Conflict,
    TooLarge,
    UnsupportedContentType,
    InjectionRefused,
    RateLimitExceeded,
    TokenBudgetExceeded,
    ConcurrencyLimitExceeded,
    ModelUnavailable,
    Unavailable,
    DeadlineExceeded,
}

impl Code {
    /// The HTTP status that goes with the code.
    pub const fn status(self) -> http::StatusCode {
        use http::StatusCode as S;
        match self {
            Self::InvalidRequest => S::BAD_REQUEST,
            Self::InvalidKey => S::UNAUTHORIZED,
            Self::InsufficientScope | Self::IpNotAllowed | Self::TenantSuspended | Self::ModelNotAllowed => {
                S::FORBIDDEN
            }
            Self::NotFound => S::NOT_FOUND,
            Self::Conflict => S::CONFLICT,
            Self::TooLarge => S::PAYLOAD_TOO_LARGE,
            Self::UnsupportedContentType => S::UNSUPPORTED_MEDIA_TYPE,
            Self::InjectionRefused => S::UNPROCESSABLE_ENTITY,
            Self::RateLimitExceeded | Self::TokenBudgetExceeded | Self::ConcurrencyLimitExceeded => {
                S::TOO_MANY_REQUESTS
            }
            Self::ModelUnavailable => S::BAD_GATEWAY,
            Self::Unavailable => S::SERVICE_UNAVAILABLE,
            Self::DeadlineExceeded => S::GATEWAY_TIMEOUT,
        }
    }
}

impl Code {
    /// The family of the code, by the names that OpenAI's clients know.
    ///
    /// <https://platform.openai.com/docs/guides/error-codes>
    pub const fn family(self) -> &'static str {
        match self {
            Self::InvalidRequest
            | Self::NotFound
            | Self::Conflict
            | Self::TooLarge
            | Self::UnsupportedContentType
            | Self::InjectionRefused => "invalid_request_error",
            Self::InvalidKey => "authentication_error",
            Self::InsufficientScope | Self::IpNotAllowed | Self::TenantSuspended | Self::ModelNotAllowed => {
                "permission_error"
            }
            Self::RateLimitExceeded | Self::ConcurrencyLimitExceeded => "rate_limit_error",
            Self::TokenBudgetExceeded => "insufficient_quota",
            Self::ModelUnavailable | Self::Unavailable | Self::DeadlineExceeded => "server_error",
        }
    }
}

/// An error as a caller sees it. The message is for the caller's developer: it names the field or the
/// limit, and never holds what another tenant or an internal service said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The kind.
    pub code: Code,
    /// One sentence.
    pub message: String,
    /// Which limit refused.
    pub limit: Option<&'static str>,
    /// When to come again, in milliseconds.
    pub retry_after_ms: Option<u64>,
    /// Which part of the request is at fault.
    pub param: Option<String>,
}

/// With its family, wherever it is shown.
impl Serialize for ApiError {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown<'a> {
            code: Code,
            message: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            limit: Option<&'static str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            retry_after_ms: Option<u64>,
            #[serde(skip_serializing_if = "Option::is_none")]
            param: Option<&'a str>,
            r#type: &'static str,
        }
        let shown = Shown {
            code: self.code,
            r#type: self.code.family(),
            message: &self.message,
            limit: self.limit,
            retry_after_ms: self.retry_after_ms,
            param: self.param.as_deref(),
        };
        shown.serialize(serializer)
    }
}

impl ApiError {
    /// An error of `code` with that message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), limit: None, retry_after_ms: None, param: None }
    }

    /// 400: `param` is at fault.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(Code::InvalidRequest, message) }
    }

    /// Another request has the idempotency key by now, which this one had: what that says holds.
    pub fn superseded() -> Self {
        let message = "another request with this Idempotency-Key has taken over";
        Self::new(Code::Conflict, message).with_param("Idempotency-Key")
    }

    /// 404, always in the same words, whether the thing is another's or nobody's.
    pub fn not_found() -> Self {
        Self::new(Code::NotFound, "no such thing, or it is not yours")
    }

    /// 503: something behind us failed. What it was goes to the log, not to the caller.
    pub fn unavailable(what: &'static str) -> Self {
        Self::new(
            Code::Unavailable,
            format!("{what} cannot be reached right now; nothing was changed, try again"),
        )
    }

    /// The same error, said of `param`.
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The error object of `api.md`.
    pub fn body(&self, request_id: &RequestId) -> serde_json::Value {
        serde_json::json!({ "error": self, "request_id": request_id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_shape() {
        let error = ApiError::invalid("message", "message is empty");
        assert_eq!(
            error.body(&RequestId::from("r-1".to_owned())).to_string(),
            r#"{"error":{"code":"invalid_request","message":"message is empty","param":"message","type":"invalid_request_error"},"request_id":"r-1"}"#
        );
    }
}
