//! Which actions of IAM an operation of S3 is.

use std::sync::Arc;

use s3s::access::{S3Access, S3AccessContext};
use s3s::{S3Result, s3_error};

use crate::iam::{Caller, Callers, Intent};
use crate::serving::system_clock;
use crate::sigv4::{self, Refusal};

/// The callers' policies.
pub(super) struct Policies(pub(super) Arc<Callers>);

/// What an answer with an object shows of its lock: what the caller might also ask for by itself.
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html>
#[derive(Clone, Copy, Default)]
pub(super) struct Shown {
    pub(super) retention: bool,
    pub(super) legal_hold: bool,
}

impl Policies {
    fn shown(&self, caller: &Caller, read: &Intent) -> Shown {
        let may = |action| self.0.refused(caller, &[Intent { action, ..read.clone() }]).is_none();
        Shown {
            retention: may("s3:GetObjectRetention".to_owned()),
            legal_hold: may("s3:GetObjectLegalHold".to_owned()),
        }
    }
}

#[async_trait::async_trait]
impl S3Access for Policies {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        let signer = cx.credentials().and_then(|credentials| self.0.by_key(&credentials.access_key));
        let Some(caller) = signer else { return Err(s3_error!(AccessDenied, "Access Denied")) };
        match caller.check_session(token(cx).as_deref(), system_clock()) {
            Ok(()) => {}
            Err(Refusal::Expired) => return Err(s3_error!(ExpiredToken, "The provided token has expired.")),
            Err(refusal) => return Err(s3_error!(InvalidToken, "{refusal}")),
        }
        check_signed(cx)?;
        let intents = intents(cx);
        if let Some(message) = self.0.refused(&caller, &intents) {
            tracing::warn!("S3 refused {}: {message}", cx.s3_op().name());
            return Err(s3_error!(AccessDenied, "{message}"));
        }
        if let ("GetObject" | "HeadObject", Some(read)) = (cx.s3_op().name(), intents.first()) {
            let shown = self.shown(&caller, read);
            cx.extensions_mut().insert(shown);
        }
        cx.extensions_mut().insert(caller);
        Ok(())
    }
}

/// The token of a session, from a header or from a link. The signature covers both.
fn token(cx: &S3AccessContext<'_>) -> Option<String> {
    let header = cx.headers().get(sigv4::SECURITY_TOKEN).and_then(|token| token.to_str().ok());
    header.map(str::to_owned).or_else(|| of_link(cx, "X-Amz-Security-Token="))
}

/// What a link's query says after that name.
fn of_link(cx: &S3AccessContext<'_>, name: &str) -> Option<String> {
    let value = cx.uri().query()?.split('&').find_map(|part| part.strip_prefix(name))?;
    Some(percent_encoding::percent_decode_str(value).decode_utf8().ok()?.into_owned())
}

/// Refuses headers of S3's own that the signature does not cover: whoever has a link adds nothing to it.
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html>
fn check_signed(cx: &S3AccessContext<'_>) -> S3Result<()> {
    let header = cx.headers().get(http::header::AUTHORIZATION).and_then(|header| header.to_str().ok());
    let linked = of_link(cx, "X-Amz-SignedHeaders=").unwrap_or_default();
    let signed = header.and_then(sigv4::signed_headers).unwrap_or_else(|| linked.split(';').collect());
    let mut own = cx.headers().keys().map(http::HeaderName::as_str).filter(|name| name.starts_with("x-amz-"));
    match own.find(|name| !signed.contains(name)) {
        None => Ok(()),
        Some(name) => Err(s3_error!(
            AccessDenied,
            "There were headers present in the request which were not signed: {name}"
        )),
    }
}

/// What a policy has to allow. An operation that is not known here is an action of its own name, which
/// no policy allows by mistake.
/// <https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html>
fn intents(cx: &S3AccessContext<'_>) -> Vec<Intent> {
    let path = cx.s3_path();
    let bucket = format!("arn:aws:s3:::{}", path.get_bucket_name().unwrap_or_default());
    let resource = match (path.as_object(), path.is_root()) {
        (Some((_, key)), _) => format!("{bucket}/{key}"),
        (None, true) => "*".to_owned(),
        (None, false) => bucket.clone(),
    };
    let query = cx.uri().query().unwrap_or_default();
    let version = query.split('&').any(|part| part.starts_with("versionId="));
    let versioned =
        |action: &'static str| if version { format!("{action}Version") } else { action.to_owned() };
    let mut actions = match cx.s3_op().name() {
        "GetObject" | "HeadObject" => vec![versioned("s3:GetObject")],
        "DeleteObject" => vec![versioned("s3:DeleteObject")],
        "PutObject" | "CreateMultipartUpload" | "UploadPart" | "CompleteMultipartUpload" => {
            vec!["s3:PutObject".to_owned()]
        }
        "HeadBucket" | "ListObjects" | "ListObjectsV2" => vec!["s3:ListBucket".to_owned()],
        "ListObjectVersions" => vec!["s3:ListBucketVersions".to_owned()],
        "ListBuckets" => vec!["s3:ListAllMyBuckets".to_owned()],
        other => vec![format!("s3:{other}")],
    };
    for (header, action) in [
        ("x-amz-object-lock-mode", "s3:PutObjectRetention"),
        ("x-amz-object-lock-legal-hold", "s3:PutObjectLegalHold"),
        ("x-amz-bypass-governance-retention", "s3:BypassGovernanceRetention"),
    ] {
        if cx.headers().contains_key(header) {
            actions.push(action.to_owned());
        }
    }
    let prefix = query.split('&').find_map(|part| part.strip_prefix("prefix="));
    let prefix =
        prefix.map(|prefix| percent_encoding::percent_decode_str(prefix).decode_utf8_lossy().into_owned());
    let intent = |action| {
        let mut intent = Intent::new(action, resource.clone());
        if let Some(prefix) = &prefix {
            intent.context.insert("s3:prefix".to_owned(), vec![prefix.clone()]);
        }
        intent
    };
    actions.into_iter().map(intent).collect()
}
