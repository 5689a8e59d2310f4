//! The operations: S3's inputs and outputs around the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use s3s::dto::*;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use time::OffsetDateTime;
use tokio::sync::mpsc::UnboundedSender;

use super::ObjectEvent;
use super::access::Shown;
use super::body::{self, Algorithm, Checksum, Expected};
use super::rules::{self, DefaultRetention, Mode, Period, Retention};
use super::sse;
use super::store::{
    self, Attributes, Condition, Found, Missing, Object as StoredObject, RequestedLock, Store, Upload,
    Version, Versioning, Write,
};
use crate::iam::Caller;
use crate::kms::Kms;
use crate::serving::unique_id;

/// The smallest part that may stand before another, as in S3.
const MIN_PART: u64 = 5 * 1024 * 1024;
const MAX_METADATA: usize = 2 * 1024;
const MAX_PAGE: usize = 1000;
const MAX_DELETE: usize = 1000;

pub(super) struct Service {
    store: Arc<Store>,
    kms: Arc<Kms>,
    now: Arc<dyn Fn() -> OffsetDateTime + Send + Sync>,
    events: Option<UnboundedSender<ObjectEvent>>,
}

/// Refuses options that would change what is stored if they were understood.
macro_rules! refuse {
    ($input:expr; $($field:ident),+ $(,)?) => {
        $(if $input.$field.is_some() {
            return Err(s3_error!(NotImplemented, "{} is not implemented", stringify!($field)));
        })+
    };
}

/// Fills the checksum fields that several outputs share.
macro_rules! put_checksum {
    ($output:expr, $checksum:expr) => {{
        let Checksum { algorithm, value, .. } = $checksum.clone();
        match algorithm {
            Algorithm::Crc32 => $output.checksum_crc32 = Some(value),
            Algorithm::Crc32c => $output.checksum_crc32c = Some(value),
            Algorithm::Crc64nvme => $output.checksum_crc64nvme = Some(value),
            Algorithm::Sha1 => $output.checksum_sha1 = Some(value),
            Algorithm::Sha256 => $output.checksum_sha256 = Some(value),
        }
    }};
}

fn checksum_type(checksum: &Checksum) -> ChecksumType {
    ChecksumType::from_static(if checksum.composite {
        ChecksumType::COMPOSITE
    } else {
        ChecksumType::FULL_OBJECT
    })
}

/// Buckets do not have ACLs; these two names say what holds anyway.
fn check_acl(acl: Option<&ObjectCannedACL>) -> S3Result<()> {
    match acl.map(ObjectCannedACL::as_str) {
        None | Some("private" | "bucket-owner-full-control") => Ok(()),
        Some(_) => Err(s3_error!(AccessControlListNotSupported, "The bucket does not allow ACLs")),
    }
}

fn check_storage_class(class: Option<&StorageClass>) -> S3Result<()> {
    match class.map(StorageClass::as_str) {
        None | Some("STANDARD") => Ok(()),
        Some(class) => Err(s3_error!(NotImplemented, "Storage class {class} is not implemented")),
    }
}

fn requested_lock(
    mode: Option<ObjectLockMode>,
    until: Option<Timestamp>,
    hold: Option<ObjectLockLegalHoldStatus>,
) -> S3Result<RequestedLock> {
    let retention = match (mode, until) {
        (None, None) => None,
        (Some(mode), Some(until)) => Some(Retention {
            mode: Mode::parse(mode.as_str())
                .ok_or_else(|| s3_error!(InvalidArgument, "Unknown wormMode directive."))?,
            until: until.into(),
        }),
        _ => {
            return Err(s3_error!(
                InvalidArgument,
                "x-amz-object-lock-retain-until-date and x-amz-object-lock-mode must both be supplied"
            ));
        }
    };
    let legal_hold = hold.map(|hold| parse_hold(&hold)).transpose()?;
    Ok(RequestedLock { retention, legal_hold })
}

fn parse_hold(hold: &ObjectLockLegalHoldStatus) -> S3Result<bool> {
    match hold.as_str() {
        "ON" => Ok(true),
        "OFF" => Ok(false),
        _ => Err(s3_error!(InvalidArgument, "Legal Hold must be either of 'ON' or 'OFF'")),
    }
}

fn hold_status(on: bool) -> ObjectLockLegalHoldStatus {
    ObjectLockLegalHoldStatus::from_static(if on {
        ObjectLockLegalHoldStatus::ON
    } else {
        ObjectLockLegalHoldStatus::OFF
    })
}

fn user_metadata(metadata: Option<Metadata>) -> S3Result<BTreeMap<String, String>> {
    let metadata: BTreeMap<String, String> = metadata.unwrap_or_default().into_iter().collect();
    if metadata.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() > MAX_METADATA {
        return Err(s3_error!(
            MetadataTooLarge,
            "Your metadata headers exceed the maximum allowed metadata size"
        ));
    }
    Ok(metadata)
}

fn default_retention(rule: ObjectLockRule) -> S3Result<Option<DefaultRetention>> {
    let malformed =
        || s3_error!(MalformedXML, "The XML you provided was not well-formed or did not validate");
    let Some(given) = rule.default_retention else {
        return Err(malformed());
    };
    let mode = given.mode.and_then(|mode| Mode::parse(mode.as_str())).ok_or_else(malformed)?;
    let in_range = |number: i32, max: u16| {
        u16::try_from(number).ok().filter(|number| (1..=max).contains(number)).ok_or_else(|| {
            s3_error!(
                InvalidArgument,
                "Default retention period must be a positive integer value and at most 100 years."
            )
        })
    };
    let period = match (given.days, given.years) {
        (Some(days), None) => Period::Days(in_range(days, 36_500)?),
        (None, Some(years)) => Period::Years(in_range(years, 100)?),
        _ => return Err(malformed()),
    };
    Ok(Some(DefaultRetention { mode, period }))
}

fn timestamp(time: OffsetDateTime) -> Option<Timestamp> {
    Some(time.into())
}

fn etag(object: &StoredObject) -> Option<ETag> {
    Some(ETag::Strong(object.etag.clone()))
}

/// Sizes in S3's types; no file is longer than an `i64` can say.
fn size(size: u64) -> Option<i64> {
    i64::try_from(size).ok()
}

fn page_size(max: Option<i32>) -> S3Result<usize> {
    match max {
        None => Ok(MAX_PAGE),
        Some(max) => usize::try_from(max).map(|max| max.min(MAX_PAGE)).map_err(|_| {
            s3_error!(InvalidArgument, "Argument max-keys must be an integer between 0 and 2147483647")
        }),
    }
}

/// The encoding that `encoding-type=url` asks for in listings.
fn encoder(encoding: Option<&EncodingType>) -> S3Result<fn(&str) -> String> {
    match encoding.map(EncodingType::as_str) {
        None => Ok(str::to_owned),
        Some("url") => Ok(url_encode),
        Some(_) => Err(s3_error!(InvalidArgument, "Invalid Encoding Method specified in Request")),
    }
}

fn url_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'*' | b'/' => {
                encoded.push(char::from(byte))
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

fn common_prefixes(prefixes: &[String], encode: fn(&str) -> String) -> Option<Vec<CommonPrefix>> {
    Some(prefixes.iter().map(|prefix| CommonPrefix { prefix: Some(encode(prefix)) }).collect())
}

fn missing(missing: Missing) -> S3Error {
    let marked = |mut error: S3Error, version_id: &str, created: Option<OffsetDateTime>| {
        let mut headers = HeaderMap::new();
        headers.insert("x-amz-delete-marker", HeaderValue::from_static("true"));
        if let Ok(value) = HeaderValue::from_str(version_id) {
            headers.insert("x-amz-version-id", value);
        }
        if let Some(created) = created {
            headers.insert(http::header::ALLOW, HeaderValue::from_static("DELETE"));
            let mut date = Vec::new();
            if Timestamp::from(created).format(TimestampFormat::HttpDate, &mut date).is_ok()
                && let Ok(value) = HeaderValue::from_bytes(&date)
            {
                headers.insert(http::header::LAST_MODIFIED, value);
            }
        }
        error.set_headers(headers);
        error
    };
    match missing {
        Missing::Deleted { version_id } => {
            marked(s3_error!(NoSuchKey, "The specified key does not exist."), &version_id, None)
        }
        Missing::Marker { version_id, created } => marked(
            s3_error!(MethodNotAllowed, "The specified method is not allowed against this resource."),
            &version_id,
            Some(created),
        ),
        Missing::Other(error) => error,
    }
}

/// The conditional headers of reads, in the order of RFC 9110.
fn check_read(
    found: &Found,
    if_match: Option<&ETagCondition>,
    if_none_match: Option<&ETagCondition>,
    if_modified_since: Option<&Timestamp>,
    if_unmodified_since: Option<&Timestamp>,
) -> S3Result<()> {
    let matches = |condition: &ETagCondition| match condition {
        ETagCondition::Any => true,
        ETagCondition::ETag(tag) => tag.value() == found.object.etag,
    };
    // HTTP dates are in whole seconds.
    let modified = Timestamp::from(found.created.replace_nanosecond(0).unwrap_or(found.created));
    let failed = match (if_match, if_unmodified_since) {
        (Some(condition), _) => !matches(condition),
        (None, Some(since)) => modified > *since,
        (None, None) => false,
    };
    if failed {
        return Err(s3_error!(
            PreconditionFailed,
            "At least one of the pre-conditions you specified did not hold"
        ));
    }
    let unchanged = match (if_none_match, if_modified_since) {
        (Some(condition), _) => matches(condition),
        (None, Some(since)) => modified <= *since,
        (None, None) => false,
    };
    if unchanged {
        return Err(S3Error::new(S3ErrorCode::NotModified));
    }
    Ok(())
}

impl Service {
    pub(super) fn new(
        store: Arc<Store>,
        kms: Arc<Kms>,
        now: Arc<dyn Fn() -> OffsetDateTime + Send + Sync>,
        events: Option<UnboundedSender<ObjectEvent>>,
    ) -> Self {
        Self { store, kms, now, events }
    }

    fn now(&self) -> OffsetDateTime {
        (self.now)().to_offset(time::UtcOffset::UTC)
    }

    /// The store works on files: its calls leave the threads that serve connections.
    async fn store<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> S3Result<T> + Send + 'static,
    ) -> S3Result<T> {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || call(&store)).await.map_err(S3Error::internal_error)?
    }

    fn announce(
        &self,
        name: &'static str,
        (bucket, key): (&str, &str),
        version_id: Option<&str>,
        object: Option<&StoredObject>,
        time: OffsetDateTime,
    ) {
        if let Some(events) = &self.events {
            // Nobody listening is not the writer's concern.
            let _ = events.send(ObjectEvent {
                name,
                bucket: bucket.to_owned(),
                key: key.to_owned(),
                version_id: version_id.map(str::to_owned),
                size: object.map_or(0, |object| object.size),
                etag: object.map(|object| object.etag.clone()).unwrap_or_default(),
                time,
            });
        }
    }

    async fn remove(
        &self,
        bucket: &str,
        key: &str,
        version_id: Option<String>,
        bypass: bool,
    ) -> S3Result<store::Outcome> {
        let now = self.now();
        let outcome = {
            let (bucket, key, version_id) = (bucket.to_owned(), key.to_owned(), version_id.clone());
            self.store(move |store| store.delete(&bucket, &key, version_id.as_deref(), bypass, now)).await?
        };
        if outcome.changed {
            let name = if version_id.is_none() && outcome.delete_marker {
                "ObjectRemoved:DeleteMarkerCreated"
            } else {
                "ObjectRemoved:Delete"
            };
            self.announce(name, (bucket, key), outcome.version_id.as_deref(), None, now);
        }
        Ok(outcome)
    }
}

#[async_trait::async_trait]
impl S3 for Service {
    async fn create_bucket(
        &self,
        req: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        let input = req.input;
        refuse!(input; acl, grant_full_control, grant_read, grant_read_acp, grant_write, grant_write_acp);
        let now = self.now();
        let location = format!("/{}", input.bucket);
        let lock = input.object_lock_enabled_for_bucket == Some(true);
        self.store(move |store| store.create_bucket(&input.bucket, lock, now)).await?;
        Ok(S3Response::new(CreateBucketOutput { location: Some(location) }))
    }

    async fn delete_bucket(
        &self,
        req: S3Request<DeleteBucketInput>,
    ) -> S3Result<S3Response<DeleteBucketOutput>> {
        self.store(move |store| store.delete_bucket(&req.input.bucket)).await?;
        Ok(S3Response::new(DeleteBucketOutput {}))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.store.bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn list_buckets(
        &self,
        req: S3Request<ListBucketsInput>,
    ) -> S3Result<S3Response<ListBucketsOutput>> {
        refuse!(req.input; bucket_region, continuation_token, max_buckets);
        let prefix = req.input.prefix;
        let buckets = self
            .store
            .buckets()
            .into_iter()
            .filter(|(name, _)| prefix.as_ref().is_none_or(|prefix| name.starts_with(prefix)))
            .map(|(name, created)| Bucket {
                name: Some(name),
                creation_date: timestamp(created),
                bucket_region: None,
            })
            .collect();
        Ok(S3Response::new(ListBucketsOutput { buckets: Some(buckets), prefix, ..Default::default() }))
    }

    async fn put_bucket_versioning(
        &self,
        req: S3Request<PutBucketVersioningInput>,
    ) -> S3Result<S3Response<PutBucketVersioningOutput>> {
        let input = req.input;
        refuse!(input; mfa);
        refuse!(input.versioning_configuration; mfa_delete);
        let versioning =
            match input.versioning_configuration.status.as_ref().map(BucketVersioningStatus::as_str) {
                Some("Enabled") => Versioning::Enabled,
                Some("Suspended") => Versioning::Suspended,
                _ => {
                    return Err(s3_error!(
                        MalformedXML,
                        "The versioning status must be Enabled or Suspended"
                    ));
                }
            };
        self.store(move |store| {
            store.configure(&input.bucket, |bucket| {
                if bucket.object_lock && versioning != Versioning::Enabled {
                    return Err(s3_error!(
                        InvalidBucketState,
                        "An Object Lock configuration is present on this bucket, so the versioning state cannot be changed."
                    ));
                }
                bucket.versioning = versioning;
                Ok(())
            })
        })
        .await?;
        Ok(S3Response::new(PutBucketVersioningOutput {}))
    }

    async fn get_bucket_versioning(
        &self,
        req: S3Request<GetBucketVersioningInput>,
    ) -> S3Result<S3Response<GetBucketVersioningOutput>> {
        let status = match self.store.bucket(&req.input.bucket)?.versioning {
            Versioning::Never => None,
            Versioning::Enabled => Some(BucketVersioningStatus::from_static(BucketVersioningStatus::ENABLED)),
            Versioning::Suspended => {
                Some(BucketVersioningStatus::from_static(BucketVersioningStatus::SUSPENDED))
            }
        };
        Ok(S3Response::new(GetBucketVersioningOutput { status, ..Default::default() }))
    }

    async fn put_object_lock_configuration(
        &self,
        req: S3Request<PutObjectLockConfigurationInput>,
    ) -> S3Result<S3Response<PutObjectLockConfigurationOutput>> {
        let input = req.input;
        refuse!(input; token);
        let malformed =
            || s3_error!(MalformedXML, "The XML you provided was not well-formed or did not validate");
        let configuration = input.object_lock_configuration.ok_or_else(malformed)?;
        if configuration.object_lock_enabled.as_ref().map(ObjectLockEnabled::as_str) != Some("Enabled") {
            return Err(malformed());
        }
        let retention = configuration.rule.map(default_retention).transpose()?.flatten();
        self.store(move |store| {
            store.configure(&input.bucket, |bucket| {
                if bucket.versioning != Versioning::Enabled {
                    return Err(s3_error!(
                        InvalidBucketState,
                        "Versioning must be 'Enabled' on the bucket to apply a Object Lock configuration"
                    ));
                }
                bucket.object_lock = true;
                bucket.default_retention = retention;
                Ok(())
            })
        })
        .await?;
        Ok(S3Response::new(PutObjectLockConfigurationOutput::default()))
    }

    async fn get_object_lock_configuration(
        &self,
        req: S3Request<GetObjectLockConfigurationInput>,
    ) -> S3Result<S3Response<GetObjectLockConfigurationOutput>> {
        let bucket = self.store.bucket(&req.input.bucket)?;
        if !bucket.object_lock {
            return Err(s3_error!(
                ObjectLockConfigurationNotFoundError,
                "Object Lock configuration does not exist for this bucket"
            ));
        }
        let rule = bucket.default_retention.map(|retention| {
            let (days, years) = match retention.period {
                Period::Days(days) => (Some(i32::from(days)), None),
                Period::Years(years) => (None, Some(i32::from(years))),
            };
            let mode = Some(ObjectLockRetentionMode::from_static(retention.mode.as_str()));
            ObjectLockRule { default_retention: Some(s3s::dto::DefaultRetention { days, mode, years }) }
        });
        Ok(S3Response::new(GetObjectLockConfigurationOutput {
            object_lock_configuration: Some(ObjectLockConfiguration {
                object_lock_enabled: Some(ObjectLockEnabled::from_static(ObjectLockEnabled::ENABLED)),
                rule,
            }),
        }))
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let expected = Expected::from_headers(&req.headers)?;
        let caller = caller(&req)?;
        let trailers = req.trailing_headers;
        let input = req.input;
        refuse!(input; expires, grant_full_control, grant_read, grant_read_acp, grant_write_acp, sse_customer_algorithm,
            sse_customer_key, sse_customer_key_md5, tagging, website_redirect_location, write_offset_bytes);
        check_acl(input.acl.as_ref())?;
        check_storage_class(input.storage_class.as_ref())?;
        let encrypted = sse::Asked::of(&input)?;
        let mut write = Write {
            bucket: input.bucket,
            key: input.key,
            attributes: Attributes {
                content_type: input.content_type,
                cache_control: input.cache_control,
                content_disposition: input.content_disposition,
                content_encoding: input.content_encoding.and_then(without_chunking),
                content_language: input.content_language,
                metadata: user_metadata(input.metadata)?,
            },
            lock: requested_lock(
                input.object_lock_mode,
                input.object_lock_retain_until_date,
                input.object_lock_legal_hold_status,
            )?,
            condition: Condition { if_none_match: input.if_none_match, if_match: input.if_match },
            etag: None,
            checksum: None,
            vouched: expected.vouched(),
            encryption: None,
        };
        self.store.precheck(&write, self.now())?;
        let data_key = match encrypted {
            Some(asked) => {
                let (key, with) = sse::generate(&self.kms, &caller, asked, (&write.bucket, &write.key))?;
                // The tag of what is encrypted is no digest of it.
                (write.encryption, write.etag) = (Some(with), Some(unique_id()));
                Some(key)
            }
            None => None,
        };
        let staged = body::receive(
            self.store.staging_path(),
            input.body,
            input.content_length,
            &expected,
            trailers.as_ref(),
        )
        .await?;
        // The moment of the write is the end of the body.
        let now = self.now();
        let place = (write.bucket.clone(), write.key.clone());
        let put = move |store: &Store| {
            data_key.map_or(Ok(()), |key| key.seal(&staged.path))?;
            store.put(write, &staged, now)
        };
        let (outcome, object) = self.store(put).await?;
        let version_id = outcome.version_id;
        self.announce("ObjectCreated:Put", (&place.0, &place.1), version_id.as_deref(), Some(&object), now);
        let mut output = PutObjectOutput {
            e_tag: etag(&object),
            version_id,
            checksum_type: Some(checksum_type(&object.checksum)),
            server_side_encryption: encryption(&object),
            ssekms_key_id: object.encryption.as_ref().map(|with| with.key.clone()),
            ..Default::default()
        };
        put_checksum!(output, object.checksum);
        Ok(S3Response::new(output))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let caller = caller(&req)?;
        let shown = req.extensions.get::<Shown>().copied().unwrap_or_default();
        let input = req.input;
        refuse!(input; part_number, sse_customer_algorithm, sse_customer_key, sse_customer_key_md5);
        let found =
            self.store.find(&input.bucket, &input.key, input.version_id.as_deref()).map_err(missing)?;
        check_read(
            &found,
            input.if_match.as_ref(),
            input.if_none_match.as_ref(),
            input.if_modified_since.as_ref(),
            input.if_unmodified_since.as_ref(),
        )?;
        let range = match input.range {
            Some(range) => Some(range.check(found.object.size)?),
            None => None,
        };
        let (start, length) = match &range {
            Some(range) => (range.start, range.end - range.start),
            None => (0, found.object.size),
        };
        let body = match &found.object.encryption {
            Some(with) => {
                let (key, path) = (sse::decrypt(&self.kms, &caller, with)?, found.path.clone());
                let bytes = Bytes::from(self.store(move |_| key.open(&path)).await?);
                let end = usize::try_from(start + length).unwrap_or(usize::MAX).min(bytes.len());
                let start = usize::try_from(start).unwrap_or(usize::MAX).min(end);
                StreamingBlob::from(s3s::Body::from(bytes.slice(start..end)))
            }
            None => body::send(&found.path, start, length).await.map_err(|error| match error.kind() {
                // Deleted between the look-up and now.
                std::io::ErrorKind::NotFound => s3_error!(NoSuchKey, "The specified key does not exist."),
                _ => S3Error::internal_error(error),
            })?,
        };
        let object = found.object;
        let retention = object.protection.retention.filter(|_| shown.retention);
        let legal_hold = object.protection.legal_hold.filter(|_| shown.legal_hold);
        let with_checksum = input.checksum_mode.is_some() && range.is_none();
        let mut output = GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            body: Some(body),
            cache_control: object.attributes.cache_control.clone(),
            content_disposition: object.attributes.content_disposition.clone(),
            content_encoding: object.attributes.content_encoding.clone(),
            content_language: object.attributes.content_language.clone(),
            content_length: size(length),
            content_range: range
                .map(|range| format!("bytes {}-{}/{}", range.start, range.end - 1, object.size)),
            content_type: content_type(&object),
            e_tag: etag(&object),
            last_modified: timestamp(found.created),
            metadata: Some(object.attributes.metadata.clone().into_iter().collect()),
            object_lock_legal_hold_status: legal_hold.map(hold_status),
            object_lock_mode: retention.map(|r| ObjectLockMode::from_static(r.mode.as_str())),
            object_lock_retain_until_date: retention.map(|r| r.until.into()),
            server_side_encryption: encryption(&object),
            ssekms_key_id: object.encryption.as_ref().map(|with| with.key.clone()),
            version_id: found.version_id,
            ..Default::default()
        };
        if with_checksum {
            output.checksum_type = Some(checksum_type(&object.checksum));
            put_checksum!(output, object.checksum);
        }
        Ok(S3Response::new(output))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let shown = req.extensions.get::<Shown>().copied().unwrap_or_default();
        let input = req.input;
        refuse!(input; part_number, range, sse_customer_algorithm, sse_customer_key, sse_customer_key_md5);
        let found =
            self.store.find(&input.bucket, &input.key, input.version_id.as_deref()).map_err(missing)?;
        check_read(
            &found,
            input.if_match.as_ref(),
            input.if_none_match.as_ref(),
            input.if_modified_since.as_ref(),
            input.if_unmodified_since.as_ref(),
        )?;
        let object = found.object;
        let retention = object.protection.retention.filter(|_| shown.retention);
        let legal_hold = object.protection.legal_hold.filter(|_| shown.legal_hold);
        let mut output = HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            cache_control: object.attributes.cache_control.clone(),
            content_disposition: object.attributes.content_disposition.clone(),
            content_encoding: object.attributes.content_encoding.clone(),
            content_language: object.attributes.content_language.clone(),
            content_length: size(object.size),
            content_type: content_type(&object),
            e_tag: etag(&object),
            last_modified: timestamp(found.created),
            metadata: Some(object.attributes.metadata.clone().into_iter().collect()),
            object_lock_legal_hold_status: legal_hold.map(hold_status),
            object_lock_mode: retention.map(|r| ObjectLockMode::from_static(r.mode.as_str())),
            object_lock_retain_until_date: retention.map(|r| r.until.into()),
            server_side_encryption: encryption(&object),
            ssekms_key_id: object.encryption.as_ref().map(|with| with.key.clone()),
            version_id: found.version_id,
            ..Default::default()
        };
        if input.checksum_mode.is_some() {
            output.checksum_type = Some(checksum_type(&object.checksum));
            put_checksum!(output, object.checksum);
        }
        Ok(S3Response::new(output))
    }

    async fn copy_object(&self, req: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        let input = req.input;
        refuse!(input; expires, grant_full_control, grant_read, grant_read_acp, grant_write_acp, sse_customer_algorithm,
            sse_customer_key, sse_customer_key_md5, ssekms_encryption_context, ssekms_key_id, server_side_encryption,
            tagging, tagging_directive, website_redirect_location, copy_source_sse_customer_algorithm,
            copy_source_sse_customer_key, copy_source_sse_customer_key_md5, copy_source_if_match,
            copy_source_if_none_match, copy_source_if_modified_since, copy_source_if_unmodified_since);
        check_acl(input.acl.as_ref())?;
        check_storage_class(input.storage_class.as_ref())?;
        let CopySource::Bucket { bucket, key, version_id } = input.copy_source else {
            return Err(s3_error!(NotImplemented, "Copying from access points is not implemented"));
        };
        let replace = match input.metadata_directive.as_ref().map(MetadataDirective::as_str) {
            None | Some("COPY") => false,
            Some("REPLACE") => true,
            Some(_) => return Err(s3_error!(InvalidArgument, "Unknown metadata directive.")),
        };
        if !replace && *bucket == input.bucket && *key == input.key && version_id.is_none() {
            return Err(s3_error!(
                InvalidRequest,
                "This copy request is illegal because it is trying to copy an object to itself without changing the object's metadata."
            ));
        }
        let algorithm =
            match &input.checksum_algorithm {
                Some(name) => Some(Algorithm::parse(name.as_str()).ok_or_else(|| {
                    s3_error!(InvalidRequest, "Checksum algorithm provided is unsupported.")
                })?),
                None => None,
            };
        let source = self.store.find(&bucket, &key, version_id.as_deref()).map_err(|reason| match reason {
            Missing::Marker { .. } => {
                s3_error!(InvalidRequest, "The source of a copy request may not specifically refer to a delete marker by version id.")
            }
            other => missing(other),
        })?;
        if source.object.encryption.is_some() {
            return Err(s3_error!(NotImplemented, "Copying what a key of KMS encrypts is not implemented"));
        }
        let attributes = if replace {
            Attributes {
                content_type: input.content_type,
                cache_control: input.cache_control,
                content_disposition: input.content_disposition,
                content_encoding: input.content_encoding,
                content_language: input.content_language,
                metadata: user_metadata(input.metadata)?,
            }
        } else {
            source.object.attributes.clone()
        };
        let write = Write {
            bucket: input.bucket,
            key: input.key,
            attributes,
            lock: requested_lock(
                input.object_lock_mode,
                input.object_lock_retain_until_date,
                input.object_lock_legal_hold_status,
            )?,
            condition: Condition::default(),
            etag: None,
            checksum: None,
            // The bytes do not leave the store.
            vouched: true,
            encryption: None,
        };
        let now = self.now();
        let place = (write.bucket.clone(), write.key.clone());
        let algorithm = algorithm.unwrap_or(source.object.checksum.algorithm);
        let path = source.path;
        let (outcome, object) = self
            .store(move |store| {
                store.precheck(&write, now)?;
                let staged = body::concatenate(store.staging_path(), &[path], algorithm)
                    .map_err(S3Error::internal_error)?;
                store.put(write, &staged, now)
            })
            .await?;
        let version_id = outcome.version_id;
        self.announce("ObjectCreated:Copy", (&place.0, &place.1), version_id.as_deref(), Some(&object), now);
        let mut result = CopyObjectResult {
            e_tag: etag(&object),
            last_modified: timestamp(now),
            checksum_type: Some(checksum_type(&object.checksum)),
            ..Default::default()
        };
        put_checksum!(result, object.checksum);
        Ok(S3Response::new(CopyObjectOutput {
            copy_object_result: Some(result),
            copy_source_version_id: source.version_id,
            version_id,
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = req.input;
        refuse!(input; if_match, if_match_last_modified_time, if_match_size, mfa);
        let bypass = input.bypass_governance_retention == Some(true);
        let outcome = self.remove(&input.bucket, &input.key, input.version_id, bypass).await?;
        Ok(S3Response::new(DeleteObjectOutput {
            delete_marker: outcome.delete_marker.then_some(true),
            version_id: outcome.version_id,
            ..Default::default()
        }))
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let input = req.input;
        refuse!(input; mfa);
        self.store.bucket(&input.bucket)?;
        if input.delete.objects.is_empty() || input.delete.objects.len() > MAX_DELETE {
            return Err(s3_error!(
                MalformedXML,
                "The XML you provided was not well-formed or did not validate"
            ));
        }
        for object in &input.delete.objects {
            refuse!(object; e_tag, last_modified_time, size);
        }
        let bypass = input.bypass_governance_retention == Some(true);
        let quiet = input.delete.quiet == Some(true);
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        for object in input.delete.objects {
            match self.remove(&input.bucket, &object.key, object.version_id.clone(), bypass).await {
                Ok(_) if quiet => {}
                Ok(outcome) => deleted.push(DeletedObject {
                    delete_marker: outcome.delete_marker.then_some(true),
                    delete_marker_version_id: outcome.version_id.filter(|_| outcome.delete_marker),
                    key: Some(object.key),
                    version_id: object.version_id,
                }),
                Err(error) => errors.push(Error {
                    code: Some(error.code().as_str().to_owned()),
                    key: Some(object.key),
                    message: error.message().map(str::to_owned),
                    version_id: object.version_id,
                }),
            }
        }
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: Some(deleted),
            errors: Some(errors),
            ..Default::default()
        }))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        refuse!(input; optional_object_attributes);
        let max = page_size(input.max_keys)?;
        let encode = encoder(input.encoding_type.as_ref())?;
        let after = match &input.continuation_token {
            Some(token) => Some(
                URL_SAFE_NO_PAD
                    .decode(token)
                    .ok()
                    .and_then(|bytes| String::from_utf8(bytes).ok())
                    .ok_or_else(|| {
                        s3_error!(InvalidArgument, "The continuation token provided is incorrect")
                    })?,
            ),
            None => input.start_after.clone(),
        };
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone();
        let bucket = input.bucket.clone();
        let page = self
            .store(move |store| store.list(&bucket, &prefix, delimiter.as_deref(), after.as_deref(), max))
            .await?;
        let count = page.rows.len() + page.prefixes.len();
        let contents = page
            .rows
            .iter()
            .filter_map(|(key, Version { created, object, .. })| {
                let object = object.as_ref()?;
                Some(Object {
                    checksum_algorithm: Some(vec![ChecksumAlgorithm::from_static(
                        object.checksum.algorithm.as_str(),
                    )]),
                    checksum_type: Some(checksum_type(&object.checksum)),
                    e_tag: etag(object),
                    key: Some(encode(key)),
                    last_modified: timestamp(*created),
                    size: size(object.size),
                    storage_class: Some(ObjectStorageClass::from_static(ObjectStorageClass::STANDARD)),
                    ..Default::default()
                })
            })
            .collect();
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(encode(&input.prefix.unwrap_or_default())),
            max_keys: i32::try_from(max).ok(),
            key_count: i32::try_from(count).ok(),
            continuation_token: input.continuation_token,
            is_truncated: Some(page.truncated),
            next_continuation_token: page
                .last
                .filter(|_| page.truncated)
                .map(|last| URL_SAFE_NO_PAD.encode(last)),
            contents: Some(contents),
            common_prefixes: common_prefixes(&page.prefixes, encode),
            delimiter: input.delimiter.as_deref().map(encode),
            encoding_type: input.encoding_type,
            start_after: input.start_after.as_deref().map(encode),
            request_charged: None,
        }))
    }

    async fn list_object_versions(
        &self,
        req: S3Request<ListObjectVersionsInput>,
    ) -> S3Result<S3Response<ListObjectVersionsOutput>> {
        let input = req.input;
        refuse!(input; optional_object_attributes);
        let max = page_size(input.max_keys)?;
        let encode = encoder(input.encoding_type.as_ref())?;
        let key_marker = input.key_marker.clone().filter(|marker| !marker.is_empty());
        let version_marker = input.version_id_marker.clone().filter(|marker| !marker.is_empty());
        if version_marker.is_some() && key_marker.is_none() {
            return Err(s3_error!(
                InvalidArgument,
                "A version-id marker cannot be specified without a key marker."
            ));
        }
        let prefix = input.prefix.clone().unwrap_or_default();
        let delimiter = input.delimiter.clone();
        let bucket = input.bucket.clone();
        let page = self
            .store(move |store| {
                let after = key_marker.as_deref().map(|key| (key, version_marker.as_deref()));
                store.list_versions(&bucket, &prefix, delimiter.as_deref(), after, max)
            })
            .await?;
        let next_key_marker = page.last.clone().filter(|_| page.truncated).map(|key| encode(&key));
        let next_version_id_marker = match page.rows.last() {
            Some((_, (version, _))) if page.truncated && page.last_is_row => Some(version.id.clone()),
            _ => None,
        };
        let (mut versions, mut delete_markers) = (Vec::new(), Vec::new());
        for (key, (version, latest)) in &page.rows {
            match &version.object {
                Some(object) => versions.push(ObjectVersion {
                    checksum_algorithm: Some(vec![ChecksumAlgorithm::from_static(
                        object.checksum.algorithm.as_str(),
                    )]),
                    checksum_type: Some(checksum_type(&object.checksum)),
                    e_tag: etag(object),
                    is_latest: Some(*latest),
                    key: Some(encode(key)),
                    last_modified: timestamp(version.created),
                    size: size(object.size),
                    storage_class: Some(ObjectVersionStorageClass::from_static(
                        ObjectVersionStorageClass::STANDARD,
                    )),
                    version_id: Some(version.id.clone()),
                    ..Default::default()
                }),
                None => delete_markers.push(DeleteMarkerEntry {
                    is_latest: Some(*latest),
                    key: Some(encode(key)),
                    last_modified: timestamp(version.created),
                    owner: None,
                    version_id: Some(version.id.clone()),
                }),
            }
        }
        Ok(S3Response::new(ListObjectVersionsOutput {
            common_prefixes: common_prefixes(&page.prefixes, encode),
            delete_markers: Some(delete_markers),
            delimiter: input.delimiter.as_deref().map(encode),
            encoding_type: input.encoding_type,
            is_truncated: Some(page.truncated),
            key_marker: Some(encode(&input.key_marker.unwrap_or_default())),
            max_keys: i32::try_from(max).ok(),
            name: Some(input.bucket),
            next_key_marker,
            next_version_id_marker,
            prefix: Some(encode(&input.prefix.unwrap_or_default())),
            request_charged: None,
            version_id_marker: Some(input.version_id_marker.unwrap_or_default()),
            versions: Some(versions),
        }))
    }

    async fn get_object_retention(
        &self,
        req: S3Request<GetObjectRetentionInput>,
    ) -> S3Result<S3Response<GetObjectRetentionOutput>> {
        let input = req.input;
        if !self.store.bucket(&input.bucket)?.object_lock {
            return Err(store::no_lock());
        }
        let found =
            self.store.find(&input.bucket, &input.key, input.version_id.as_deref()).map_err(missing)?;
        let Some(retention) = found.object.protection.retention else {
            return Err(no_protection());
        };
        Ok(S3Response::new(GetObjectRetentionOutput {
            retention: Some(ObjectLockRetention {
                mode: Some(ObjectLockRetentionMode::from_static(retention.mode.as_str())),
                retain_until_date: timestamp(retention.until),
            }),
        }))
    }

    async fn put_object_retention(
        &self,
        req: S3Request<PutObjectRetentionInput>,
    ) -> S3Result<S3Response<PutObjectRetentionOutput>> {
        let input = req.input;
        let malformed =
            || s3_error!(MalformedXML, "The XML you provided was not well-formed or did not validate");
        let asked = input.retention.ok_or_else(malformed)?;
        let now = self.now();
        let retention = match (asked.mode, asked.retain_until_date) {
            (None, None) => None,
            (Some(mode), Some(until)) => {
                let until = OffsetDateTime::from(until);
                store::in_the_future(until, now)?;
                Some(Retention { mode: Mode::parse(mode.as_str()).ok_or_else(malformed)?, until })
            }
            _ => return Err(malformed()),
        };
        let bypass = input.bypass_governance_retention == Some(true);
        self.store(move |store| {
            store.protect(&input.bucket, &input.key, input.version_id.as_deref(), |protection| {
                rules::replace(protection.retention, retention, bypass, now)?;
                protection.retention = retention;
                Ok(())
            })
        })
        .await?;
        Ok(S3Response::new(PutObjectRetentionOutput::default()))
    }

    async fn get_object_legal_hold(
        &self,
        req: S3Request<GetObjectLegalHoldInput>,
    ) -> S3Result<S3Response<GetObjectLegalHoldOutput>> {
        let input = req.input;
        if !self.store.bucket(&input.bucket)?.object_lock {
            return Err(store::no_lock());
        }
        let found =
            self.store.find(&input.bucket, &input.key, input.version_id.as_deref()).map_err(missing)?;
        let Some(on) = found.object.protection.legal_hold else {
            return Err(no_protection());
        };
        Ok(S3Response::new(GetObjectLegalHoldOutput {
            legal_hold: Some(ObjectLockLegalHold { status: Some(hold_status(on)) }),
        }))
    }

    async fn put_object_legal_hold(
        &self,
        req: S3Request<PutObjectLegalHoldInput>,
    ) -> S3Result<S3Response<PutObjectLegalHoldOutput>> {
        let input = req.input;
        let status = input.legal_hold.and_then(|hold| hold.status);
        let Some(status) = status else {
            return Err(s3_error!(
                MalformedXML,
                "The XML you provided was not well-formed or did not validate"
            ));
        };
        let on = parse_hold(&status)?;
        self.store(move |store| {
            store.protect(&input.bucket, &input.key, input.version_id.as_deref(), |protection| {
                protection.legal_hold = Some(on);
                Ok(())
            })
        })
        .await?;
        Ok(S3Response::new(PutObjectLegalHoldOutput::default()))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = req.input;
        refuse!(input; expires, grant_full_control, grant_read, grant_read_acp, grant_write_acp, sse_customer_algorithm,
            sse_customer_key, sse_customer_key_md5, ssekms_encryption_context, ssekms_key_id, server_side_encryption,
            tagging, website_redirect_location);
        check_acl(input.acl.as_ref())?;
        check_storage_class(input.storage_class.as_ref())?;
        let algorithm =
            match &input.checksum_algorithm {
                Some(name) => Some(Algorithm::parse(name.as_str()).ok_or_else(|| {
                    s3_error!(InvalidRequest, "Checksum algorithm provided is unsupported.")
                })?),
                None => None,
            };
        let composite = match (input.checksum_type.as_ref().map(ChecksumType::as_str), algorithm) {
            (_, None) => false,
            (None, Some(algorithm)) => algorithm != Algorithm::Crc64nvme,
            (Some("COMPOSITE"), Some(algorithm)) if algorithm != Algorithm::Crc64nvme => true,
            (Some("FULL_OBJECT"), Some(Algorithm::Crc32 | Algorithm::Crc32c | Algorithm::Crc64nvme)) => false,
            (Some(_), Some(algorithm)) => {
                return Err(s3_error!(
                    InvalidRequest,
                    "The checksum type cannot be used with the {} checksum algorithm.",
                    algorithm.as_str()
                ));
            }
        };
        let now = self.now();
        let upload = Upload {
            key: input.key.clone(),
            started: now,
            attributes: Attributes {
                content_type: input.content_type,
                cache_control: input.cache_control,
                content_disposition: input.content_disposition,
                content_encoding: input.content_encoding,
                content_language: input.content_language,
                metadata: user_metadata(input.metadata)?,
            },
            lock: requested_lock(
                input.object_lock_mode,
                input.object_lock_retain_until_date,
                input.object_lock_legal_hold_status,
            )?,
            algorithm,
            composite,
        };
        let bucket = input.bucket.clone();
        let id = self.store(move |store| store.begin_upload(&bucket, &upload, now)).await?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            checksum_algorithm: input.checksum_algorithm,
            checksum_type: algorithm.map(|_| {
                ChecksumType::from_static(if composite {
                    ChecksumType::COMPOSITE
                } else {
                    ChecksumType::FULL_OBJECT
                })
            }),
            ..Default::default()
        }))
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let mut expected = Expected::from_headers(&req.headers)?;
        let trailers = req.trailing_headers;
        let input = req.input;
        refuse!(input; sse_customer_algorithm, sse_customer_key, sse_customer_key_md5);
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(
                InvalidArgument,
                "Part number must be an integer between 1 and 10000, inclusive"
            ));
        }
        let upload = {
            let (bucket, key, id) = (input.bucket.clone(), input.key, input.upload_id.clone());
            self.store(move |store| store.upload(&bucket, &key, &id)).await?
        };
        expected.compute(upload.algorithm)?;
        let staged = body::receive(
            self.store.staging_path(),
            input.body,
            input.content_length,
            &expected,
            trailers.as_ref(),
        )
        .await?;
        let now = self.now();
        let part = self
            .store(move |store| {
                store.put_part(&input.bucket, &input.upload_id, input.part_number, &staged, now)
            })
            .await?;
        let mut output = UploadPartOutput { e_tag: Some(ETag::Strong(part.etag)), ..Default::default() };
        put_checksum!(output, part.checksum);
        Ok(S3Response::new(output))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        refuse!(input; sse_customer_algorithm, sse_customer_key, sse_customer_key_md5, mpu_object_size);
        let asked = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        if asked.is_empty() {
            return Err(s3_error!(MalformedXML, "You must specify at least one part"));
        }
        let given = [
            (Algorithm::Crc32, input.checksum_crc32),
            (Algorithm::Crc32c, input.checksum_crc32c),
            (Algorithm::Crc64nvme, input.checksum_crc64nvme),
            (Algorithm::Sha1, input.checksum_sha1),
            (Algorithm::Sha256, input.checksum_sha256),
        ];
        let condition = Condition { if_none_match: input.if_none_match, if_match: input.if_match };
        let now = self.now();
        let (bucket, key, id) = (input.bucket.clone(), input.key.clone(), input.upload_id);
        let (outcome, object) = self
            .store(move |store| {
                let upload = store.upload(&bucket, &key, &id)?;
                let arrived = store.parts(&bucket, &id)?;
                let parts = chosen_parts(&asked, &arrived)?;
                let algorithm = upload.algorithm.unwrap_or(Algorithm::Crc64nvme);
                let checksum = if upload.composite {
                    let sums: Vec<Checksum> = parts.iter().map(|part| part.checksum.clone()).collect();
                    let checksum = body::composite(algorithm, &sums);
                    Some(
                        checksum
                            .ok_or_else(|| s3_error!(InvalidPart, "A part lacks the upload's checksum."))?,
                    )
                } else {
                    None
                };
                let write = Write {
                    bucket: bucket.clone(),
                    key,
                    attributes: upload.attributes,
                    lock: upload.lock,
                    condition,
                    etag: body::multipart_etag(parts.iter().map(|part| part.etag.as_str())),
                    checksum,
                    // Each part was checked, and the whole is made of them here.
                    vouched: true,
                    encryption: None,
                };
                store.precheck(&write, now)?;
                let staged = store.join(&bucket, &id, &parts, algorithm)?;
                let whole = write.checksum.as_ref().unwrap_or(&staged.checksum);
                for (algorithm, value) in given {
                    if let Some(value) = value
                        && (algorithm != whole.algorithm || value != whole.value)
                    {
                        return Err(s3_error!(
                            BadDigest,
                            "The {} you specified did not match the calculated checksum.",
                            algorithm.as_str()
                        ));
                    }
                }
                let done = store.put(write, &staged, now)?;
                store.end_upload(&bucket, &id)?;
                Ok(done)
            })
            .await?;
        let version_id = outcome.version_id;
        self.announce(
            "ObjectCreated:CompleteMultipartUpload",
            (&input.bucket, &input.key),
            version_id.as_deref(),
            Some(&object),
            now,
        );
        let mut output = CompleteMultipartUploadOutput {
            location: Some(format!("/{}/{}", input.bucket, url_encode(&input.key))),
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: etag(&object),
            version_id,
            checksum_type: Some(checksum_type(&object.checksum)),
            ..Default::default()
        };
        put_checksum!(output, object.checksum);
        Ok(S3Response::new(output))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = req.input;
        refuse!(input; if_match_initiated_time);
        self.store(move |store| {
            store.upload(&input.bucket, &input.key, &input.upload_id)?;
            store.end_upload(&input.bucket, &input.upload_id)
        })
        .await?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = req.input;
        refuse!(input; delimiter, key_marker, upload_id_marker);
        let max = page_size(input.max_uploads)?;
        let encode = encoder(input.encoding_type.as_ref())?;
        let bucket = input.bucket.clone();
        let prefix = input.prefix.clone().unwrap_or_default();
        let mut uploads = self.store(move |store| store.uploads(&bucket)).await?;
        uploads.retain(|(_, upload)| upload.key.starts_with(&prefix));
        if uploads.len() > max {
            return Err(s3_error!(NotImplemented, "Paging of multipart uploads is not implemented"));
        }
        let uploads = uploads
            .into_iter()
            .map(|(id, upload)| MultipartUpload {
                key: Some(encode(&upload.key)),
                upload_id: Some(id),
                initiated: timestamp(upload.started),
                ..Default::default()
            })
            .collect();
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(input.bucket),
            prefix: Some(encode(&prefix)),
            encoding_type: input.encoding_type,
            is_truncated: Some(false),
            max_uploads: i32::try_from(max).ok(),
            uploads: Some(uploads),
            ..Default::default()
        }))
    }
}

/// The parts that a completion names: ascending, arrived, unchanged, and large enough.
fn chosen_parts<'a>(
    asked: &[CompletedPart],
    arrived: &'a BTreeMap<i32, store::Part>,
) -> S3Result<Vec<&'a store::Part>> {
    let invalid = || {
        s3_error!(
            InvalidPart,
            "One or more of the specified parts could not be found. The part may not have been uploaded, or the specified entity tag may not match the part's entity tag."
        )
    };
    let mut chosen: Vec<&store::Part> = Vec::with_capacity(asked.len());
    for asked in asked {
        let part = asked.part_number.and_then(|number| arrived.get(&number)).ok_or_else(invalid)?;
        if asked.e_tag.as_ref().map(ETag::value) != Some(part.etag.as_str()) {
            return Err(invalid());
        }
        if chosen.last().is_some_and(|last| last.number >= part.number) {
            return Err(s3_error!(InvalidPartOrder, "The list of parts was not in ascending order."));
        }
        chosen.push(part);
    }
    let (_, before_last) = chosen.split_last().ok_or_else(invalid)?;
    if before_last.iter().any(|part| part.size < MIN_PART) {
        return Err(s3_error!(
            EntityTooSmall,
            "Your proposed upload is smaller than the minimum allowed size"
        ));
    }
    Ok(chosen)
}

fn no_protection() -> S3Error {
    s3_error!(NoSuchObjectLockConfiguration, "The specified object does not have a ObjectLock configuration")
}

/// Who makes a request: the policies have let it in.
fn caller<T>(req: &S3Request<T>) -> S3Result<Arc<Caller>> {
    let caller = req.extensions.get::<Arc<Caller>>().cloned();
    caller.ok_or_else(|| s3_error!(AccessDenied, "Access Denied"))
}

/// What is said of an object's encryption, where it is not the bucket's default.
fn encryption(object: &StoredObject) -> Option<ServerSideEncryption> {
    let kms = || ServerSideEncryption::from_static(ServerSideEncryption::AWS_KMS);
    object.encryption.as_ref().map(|_| kms())
}

fn content_type(object: &StoredObject) -> Option<String> {
    Some(object.attributes.content_type.clone().unwrap_or_else(|| "binary/octet-stream".to_owned()))
}

/// `aws-chunked` is how the body travelled, not how it is encoded.
fn without_chunking(encoding: String) -> Option<String> {
    let rest: Vec<&str> =
        encoding.split(',').map(str::trim).filter(|coding| *coding != "aws-chunked").collect();
    (!rest.is_empty()).then(|| rest.join(","))
}
