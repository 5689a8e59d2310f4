//! Buckets, keys and versions on disk.
//!
//! ```text
//! <root>/staging/                           bodies that belong to no object yet
//! <root>/buckets/<bucket>/bucket.json
//!                        /keys/<sha256>/versions.json   the key and its versions, newest first
//!                                      /<id>.body
//!                        /uploads/<id>/upload.json, <n>.json, <n>-<id>.body
//! ```
//! A key's directory is named by the hash of the key, so that any key is a safe file name and no
//! two keys share one; the key itself is in `versions.json`. That file is replaced as a whole and
//! is the moment a change happens: a body without an entry there is waste from a crash, and is
//! removed when the store opens. Everything but bodies is also held in memory, under one lock.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use s3s::dto::ETagCondition;
use s3s::{S3Error, S3Result, s3_error};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

use super::body::{self, Algorithm, Checksum, Staged};
use super::listing::{self, Page};
use super::rules::{self, DefaultRetention, Protection, Retention};
use super::sse::Encryption;
use crate::serving::{replace_file, unique_id};
use crate::template;

/// The id of the version that a bucket without versioning keeps.
const NULL: &str = "null";
const FILE_MODE: u32 = 0o644;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Versioning {
    Never,
    Enabled,
    Suspended,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct BucketConfig {
    #[serde(with = "time::serde::rfc3339")]
    pub(super) created: OffsetDateTime,
    pub(super) versioning: Versioning,
    pub(super) object_lock: bool,
    pub(super) default_retention: Option<DefaultRetention>,
}

/// What a sender may say about an object and gets back with it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Attributes {
    pub(super) content_type: Option<String>,
    pub(super) cache_control: Option<String>,
    pub(super) content_disposition: Option<String>,
    pub(super) content_encoding: Option<String>,
    pub(super) content_language: Option<String>,
    pub(super) metadata: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Object {
    body: String,
    pub(super) size: u64,
    pub(super) etag: String,
    pub(super) checksum: Checksum,
    pub(super) attributes: Attributes,
    pub(super) protection: Protection,
    /// What encrypts the body, if a key of KMS does.
    #[serde(default)]
    pub(super) encryption: Option<Encryption>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Version {
    pub(super) id: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) created: OffsetDateTime,
    /// A version without an object is a delete marker.
    pub(super) object: Option<Object>,
}

#[derive(Serialize, Deserialize)]
struct KeyFile {
    key: String,
    versions: Vec<Version>,
}

struct Bucket {
    config: BucketConfig,
    /// No key is without versions.
    keys: BTreeMap<String, Vec<Version>>,
}

/// The precondition of a write.
#[derive(Debug, Clone, Default)]
pub(super) struct Condition {
    pub(super) if_none_match: Option<ETagCondition>,
    pub(super) if_match: Option<ETagCondition>,
}

impl Condition {
    fn check(&self, current: Option<&Object>) -> S3Result<()> {
        let failed =
            || s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold");
        match &self.if_none_match {
            Some(ETagCondition::Any) if current.is_some() => return Err(failed()),
            Some(ETagCondition::ETag(_)) => {
                return Err(s3_error!(NotImplemented, "If-None-Match takes only * on writes."));
            }
            _ => {}
        }
        match (&self.if_match, current) {
            (None, _) | (Some(ETagCondition::Any), Some(_)) => Ok(()),
            (Some(_), None) => Err(no_such_key()),
            (Some(ETagCondition::ETag(tag)), Some(object)) if tag.value() == object.etag => Ok(()),
            (Some(ETagCondition::ETag(_)), Some(_)) => Err(failed()),
        }
    }
}

/// The protection a writer asks for; where it says nothing the bucket's default applies.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct RequestedLock {
    pub(super) retention: Option<Retention>,
    pub(super) legal_hold: Option<bool>,
}

impl RequestedLock {
    fn asks(&self) -> bool {
        self.retention.is_some() || self.legal_hold.is_some()
    }
}

/// A write, up to its body.
#[derive(Debug)]
pub(super) struct Write {
    pub(super) bucket: String,
    pub(super) key: String,
    pub(super) attributes: Attributes,
    pub(super) lock: RequestedLock,
    pub(super) condition: Condition,
    /// The entity tag, where it is not the MD5 of the body.
    pub(super) etag: Option<String>,
    /// The checksum, where it is not the body's own.
    pub(super) checksum: Option<Checksum>,
    /// Whether the sender gave a digest of the body.
    pub(super) vouched: bool,
    /// What encrypts the body as it is staged.
    pub(super) encryption: Option<Encryption>,
}

/// What became of a write or a deletion: the version, named where the bucket keeps versions.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) version_id: Option<String>,
    pub(super) delete_marker: bool,
    /// Whether anything changed at all.
    pub(super) changed: bool,
}

/// A version found, with the file of its body.
#[derive(Debug)]
pub(super) struct Found {
    /// Named where the bucket keeps versions.
    pub(super) version_id: Option<String>,
    pub(super) created: OffsetDateTime,
    pub(super) object: Object,
    pub(super) path: PathBuf,
}

/// Why a version cannot be read.
#[derive(Debug)]
pub(super) enum Missing {
    /// The newest version is a delete marker.
    Deleted {
        version_id: String,
    },
    /// The version asked for is a delete marker.
    Marker {
        version_id: String,
        created: OffsetDateTime,
    },
    Other(S3Error),
}

impl From<S3Error> for Missing {
    fn from(error: S3Error) -> Self {
        Self::Other(error)
    }
}

/// A multipart upload that has begun.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Upload {
    pub(super) key: String,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) started: OffsetDateTime,
    pub(super) attributes: Attributes,
    pub(super) lock: RequestedLock,
    pub(super) algorithm: Option<Algorithm>,
    pub(super) composite: bool,
}

/// A part that has arrived.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) number: i32,
    pub(super) size: u64,
    pub(super) etag: String,
    pub(super) checksum: Checksum,
    #[serde(with = "time::serde::rfc3339")]
    pub(super) modified: OffsetDateTime,
    body: String,
}

pub(super) struct Store {
    root: PathBuf,
    buckets: Mutex<BTreeMap<String, Bucket>>,
}

fn no_such_bucket() -> S3Error {
    s3_error!(NoSuchBucket, "The specified bucket does not exist")
}

fn no_such_key() -> S3Error {
    s3_error!(NoSuchKey, "The specified key does not exist.")
}

fn no_such_upload() -> S3Error {
    s3_error!(NoSuchUpload, "The specified multipart upload does not exist.")
}

fn locked() -> S3Error {
    s3_error!(AccessDenied, "Access Denied because object protected by object lock.")
}

pub(super) fn no_lock() -> S3Error {
    s3_error!(InvalidRequest, "Bucket is missing Object Lock Configuration")
}

fn current(versions: &[Version]) -> Option<&Object> {
    versions.first()?.object.as_ref()
}

fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let bytes = std::fs::read(path)?;
    serde_json::from_slice(&bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> S3Result<()> {
    let bytes = serde_json::to_vec(value).map_err(S3Error::internal_error)?;
    replace_file(path, &bytes, FILE_MODE).map_err(S3Error::internal_error)
}

impl Store {
    /// Opens the store, creating the directory and clearing what a crash left behind.
    pub(super) fn open(root: PathBuf) -> io::Result<Self> {
        let staging = root.join("staging");
        if staging.exists() {
            std::fs::remove_dir_all(&staging)?;
        }
        std::fs::create_dir_all(&staging)?;
        let mut buckets = BTreeMap::new();
        std::fs::create_dir_all(root.join("buckets"))?;
        for entry in std::fs::read_dir(root.join("buckets"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let directory = entry.path();
            let config = match read_json(&directory.join("bucket.json")) {
                Ok(config) => config,
                // The process ended between creating the directory and the bucket.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            buckets.insert(name, Bucket { config, keys: load_keys(&directory.join("keys"))? });
        }
        Ok(Self { root, buckets: Mutex::new(buckets) })
    }

    /// A new name for a body that is about to arrive.
    pub(super) fn staging_path(&self) -> PathBuf {
        self.root.join("staging").join(unique_id())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Bucket>> {
        // Memory is changed only after the disk, in one assignment: a panic leaves nothing halfway.
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_bucket<T>(&self, name: &str, act: impl FnOnce(&mut Bucket) -> S3Result<T>) -> S3Result<T> {
        match self.lock().get_mut(name) {
            Some(bucket) => act(bucket),
            None => Err(no_such_bucket()),
        }
    }

    /// Only for names of buckets that exist: those were validated when they were created.
    fn bucket_directory(&self, bucket: &str) -> PathBuf {
        self.root.join("buckets").join(bucket)
    }

    fn key_directory(&self, bucket: &str, key: &str) -> PathBuf {
        let name = hex::encode(Sha256::digest(key.as_bytes()));
        self.bucket_directory(bucket).join("keys").join(name)
    }

    // --- buckets

    pub(super) fn create_bucket(&self, name: &str, object_lock: bool, now: OffsetDateTime) -> S3Result<()> {
        if !s3s::path::check_bucket_name(name) {
            return Err(s3_error!(InvalidBucketName, "The specified bucket is not valid."));
        }
        let mut buckets = self.lock();
        if buckets.contains_key(name) {
            return Err(s3_error!(
                BucketAlreadyOwnedByYou,
                "Your previous request to create the named bucket succeeded and you already own it."
            ));
        }
        let config = BucketConfig {
            created: now,
            versioning: if object_lock { Versioning::Enabled } else { Versioning::Never },
            object_lock,
            default_retention: None,
        };
        let directory = self.bucket_directory(name);
        std::fs::create_dir_all(directory.join("keys")).map_err(S3Error::internal_error)?;
        std::fs::create_dir_all(directory.join("uploads")).map_err(S3Error::internal_error)?;
        write_json(&directory.join("bucket.json"), &config)?;
        buckets.insert(name.to_owned(), Bucket { config, keys: BTreeMap::new() });
        Ok(())
    }

    /// Makes a bucket unless it is there, and gives it the template's configuration.
    pub(super) fn set_up(&self, wanted: &template::Bucket, now: OffsetDateTime) -> S3Result<()> {
        if !self.lock().contains_key(&wanted.name) {
            self.create_bucket(&wanted.name, wanted.object_lock, now)?;
        }
        let default_retention = match &wanted.default_retention {
            Some(retention) => {
                let mode = rules::Mode::parse(&retention.mode).ok_or_else(no_lock)?;
                let days = u16::try_from(retention.days).unwrap_or(u16::MAX);
                Some(DefaultRetention { mode, period: rules::Period::Days(days) })
            }
            None => None,
        };
        self.configure(&wanted.name, |config| {
            if wanted.versioned {
                config.versioning = Versioning::Enabled;
            }
            config.default_retention = default_retention;
            Ok(())
        })
    }

    pub(super) fn delete_bucket(&self, name: &str) -> S3Result<()> {
        let mut buckets = self.lock();
        let Some(bucket) = buckets.get(name) else {
            return Err(no_such_bucket());
        };
        if !bucket.keys.is_empty() {
            return Err(s3_error!(BucketNotEmpty, "The bucket you tried to delete is not empty"));
        }
        std::fs::remove_dir_all(self.bucket_directory(name)).map_err(S3Error::internal_error)?;
        buckets.remove(name);
        Ok(())
    }

    pub(super) fn buckets(&self) -> Vec<(String, OffsetDateTime)> {
        self.lock().iter().map(|(name, bucket)| (name.clone(), bucket.config.created)).collect()
    }

    pub(super) fn bucket(&self, name: &str) -> S3Result<BucketConfig> {
        self.with_bucket(name, |bucket| Ok(bucket.config.clone()))
    }

    /// Changes a bucket's configuration; `change` sees it as it is and may refuse.
    pub(super) fn configure(
        &self,
        name: &str,
        change: impl FnOnce(&mut BucketConfig) -> S3Result<()>,
    ) -> S3Result<()> {
        self.with_bucket(name, |bucket| {
            let mut config = bucket.config.clone();
            change(&mut config)?;
            write_json(&self.bucket_directory(name).join("bucket.json"), &config)?;
            bucket.config = config;
            Ok(())
        })
    }

    // --- objects

    /// Saves a key's versions, on disk and then in memory, and removes the bodies that are no
    /// longer named.
    fn save(&self, bucket: &mut Bucket, name: &str, key: &str, versions: Vec<Version>) -> S3Result<()> {
        let directory = self.key_directory(name, key);
        if versions.is_empty() {
            std::fs::remove_file(directory.join("versions.json")).map_err(S3Error::internal_error)?;
            bucket.keys.remove(key);
            let _ = std::fs::remove_dir_all(&directory);
            return Ok(());
        }
        let file = KeyFile { key: key.to_owned(), versions };
        std::fs::create_dir_all(&directory).map_err(S3Error::internal_error)?;
        write_json(&directory.join("versions.json"), &file)?;
        let kept: Vec<String> = bodies(&file.versions).map(str::to_owned).collect();
        let old = bucket.keys.insert(key.to_owned(), file.versions).unwrap_or_default();
        for body in bodies(&old).filter(|body| !kept.iter().any(|kept| kept == body)) {
            // A leftover is waste, not damage; it goes when the store opens.
            let _ = std::fs::remove_file(directory.join(body));
        }
        Ok(())
    }

    /// Refuses early what would be refused late, before a body is read.
    pub(super) fn precheck(&self, write: &Write, now: OffsetDateTime) -> S3Result<()> {
        self.with_bucket(&write.bucket, |bucket| {
            admit(bucket, write, now)?;
            Ok(())
        })
    }

    /// Makes a staged body the newest version of its key.
    pub(super) fn put(
        &self,
        write: Write,
        staged: &Staged,
        now: OffsetDateTime,
    ) -> S3Result<(Outcome, Object)> {
        let name = write.bucket.clone();
        self.with_bucket(&name, |bucket| {
            let protection = admit(bucket, &write, now)?;
            let directory = self.key_directory(&name, &write.key);
            let body = format!("{}.body", unique_id());
            std::fs::create_dir_all(&directory).map_err(S3Error::internal_error)?;
            std::fs::rename(&staged.path, directory.join(&body)).map_err(S3Error::internal_error)?;
            let object = Object {
                body,
                size: staged.size,
                etag: write.etag.unwrap_or_else(|| hex::encode(staged.md5)),
                checksum: write.checksum.unwrap_or_else(|| staged.checksum.clone()),
                attributes: write.attributes,
                protection,
                encryption: write.encryption,
            };
            let outcome = self.push(bucket, &name, &write.key, Some(object.clone()), now)?;
            Ok((outcome, object))
        })
    }

    /// Adds a version in front; where the bucket does not keep versions it replaces the null one.
    fn push(
        &self,
        bucket: &mut Bucket,
        name: &str,
        key: &str,
        object: Option<Object>,
        now: OffsetDateTime,
    ) -> S3Result<Outcome> {
        let mut versions = bucket.keys.get(key).cloned().unwrap_or_default();
        let id = match bucket.config.versioning {
            Versioning::Enabled => unique_id(),
            Versioning::Never | Versioning::Suspended => {
                versions.retain(|version| version.id != NULL);
                NULL.to_owned()
            }
        };
        let delete_marker = object.is_none();
        versions.insert(0, Version { id: id.clone(), created: now, object });
        self.save(bucket, name, key, versions)?;
        let version_id = (bucket.config.versioning != Versioning::Never).then_some(id);
        Ok(Outcome { version_id, delete_marker, changed: true })
    }

    /// Deletes: without a version it adds a marker, or removes the object of an unversioned bucket.
    pub(super) fn delete(
        &self,
        name: &str,
        key: &str,
        version_id: Option<&str>,
        bypass: bool,
        now: OffsetDateTime,
    ) -> S3Result<Outcome> {
        self.with_bucket(name, |bucket| {
            let versions = bucket.keys.get(key).cloned().unwrap_or_default();
            let target = match (version_id, bucket.config.versioning) {
                (None, Versioning::Enabled | Versioning::Suspended) => {
                    // A suspended bucket's marker takes the place of the null version, which has
                    // no protection: Object Lock cannot be combined with suspension.
                    return self.push(bucket, name, key, None, now);
                }
                (None, Versioning::Never) => NULL,
                (Some(id), _) => id,
            };
            let Some(version) = versions.iter().find(|version| version.id == target) else {
                return Ok(Outcome {
                    version_id: version_id.map(str::to_owned),
                    delete_marker: false,
                    changed: false,
                });
            };
            if let Some(object) = &version.object {
                rules::delete(object.protection, bypass, now).map_err(|rules::Protected| locked())?;
            }
            let outcome = Outcome {
                version_id: version_id.map(str::to_owned),
                delete_marker: version.object.is_none(),
                changed: true,
            };
            let rest = versions.iter().filter(|version| version.id != target).cloned().collect();
            self.save(bucket, name, key, rest)?;
            Ok(outcome)
        })
    }

    /// Finds a version to read.
    pub(super) fn find(&self, name: &str, key: &str, version_id: Option<&str>) -> Result<Found, Missing> {
        let (version, versioning) = self.with_bucket(name, |bucket| {
            let versions = bucket.keys.get(key).map(Vec::as_slice).unwrap_or_default();
            let version = match version_id {
                None => versions.first().ok_or_else(no_such_key)?,
                Some(id) => versions
                    .iter()
                    .find(|version| version.id == id)
                    .ok_or_else(|| s3_error!(NoSuchVersion, "The specified version does not exist."))?,
            };
            Ok((version.clone(), bucket.config.versioning))
        })?;
        match version.object {
            Some(object) => Ok(Found {
                version_id: (versioning != Versioning::Never).then_some(version.id),
                created: version.created,
                path: self.key_directory(name, key).join(&object.body),
                object,
            }),
            None if version_id.is_none() => Err(Missing::Deleted { version_id: version.id }),
            None => Err(Missing::Marker { version_id: version.id, created: version.created }),
        }
    }

    /// Changes one version's protection; `change` sees it as it is and may refuse.
    pub(super) fn protect(
        &self,
        name: &str,
        key: &str,
        version_id: Option<&str>,
        change: impl FnOnce(&mut Protection) -> Result<(), rules::Protected>,
    ) -> S3Result<()> {
        self.with_bucket(name, |bucket| {
            if !bucket.config.object_lock {
                return Err(no_lock());
            }
            let mut versions = bucket.keys.get(key).cloned().unwrap_or_default();
            let version = match version_id {
                None => versions.first_mut().ok_or_else(no_such_key)?,
                Some(id) => versions
                    .iter_mut()
                    .find(|version| version.id == id)
                    .ok_or_else(|| s3_error!(NoSuchVersion, "The specified version does not exist."))?,
            };
            let Some(object) = &mut version.object else {
                return Err(s3_error!(
                    MethodNotAllowed,
                    "The specified method is not allowed against this resource."
                ));
            };
            change(&mut object.protection).map_err(|rules::Protected| locked())?;
            self.save(bucket, name, key, versions)
        })
    }

    // --- listings

    /// Current objects after `after`, without deleted ones.
    pub(super) fn list(
        &self,
        name: &str,
        prefix: &str,
        delimiter: Option<&str>,
        after: Option<&str>,
        max: usize,
    ) -> S3Result<Page<String, Version>> {
        self.with_bucket(name, |bucket| {
            let rows = keys_after(&bucket.keys, prefix, delimiter, after).filter_map(|(key, versions)| {
                let version = versions.first().filter(|version| version.object.is_some())?;
                Some((key, version))
            });
            Ok(owned(listing::page(rows, prefix, delimiter, max)))
        })
    }

    /// All versions behind a marker, each with whether it is its key's newest.
    pub(super) fn list_versions(
        &self,
        name: &str,
        prefix: &str,
        delimiter: Option<&str>,
        after: Option<(&str, Option<&str>)>,
        max: usize,
    ) -> S3Result<Page<String, (Version, bool)>> {
        self.with_bucket(name, |bucket| {
            let newest_first = |versions: &Vec<Version>| {
                versions.iter().enumerate().map(|(n, v)| (v.clone(), n == 0)).collect::<Vec<_>>()
            };
            let started = match after {
                Some((key, Some(marker))) if key.starts_with(prefix) => {
                    bucket.keys.get(key).map(|versions| {
                        let rest = newest_first(versions)
                            .into_iter()
                            .skip_while(|(version, _)| version.id != marker)
                            .skip(1);
                        rest.map(|row| (key.to_owned(), row)).collect::<Vec<_>>()
                    })
                }
                _ => None,
            };
            let rest = keys_after(&bucket.keys, prefix, delimiter, after.map(|(key, _)| key)).flat_map(
                |(key, versions)| newest_first(versions).into_iter().map(|row| (key.to_owned(), row)),
            );
            Ok(listing::page(started.unwrap_or_default().into_iter().chain(rest), prefix, delimiter, max))
        })
    }

    // --- multipart uploads

    fn upload_directory(&self, bucket: &str, id: &str) -> S3Result<PathBuf> {
        // Ids are ours; anything else must not become a path.
        if id.len() != 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(no_such_upload());
        }
        Ok(self.bucket_directory(bucket).join("uploads").join(id))
    }

    pub(super) fn begin_upload(
        &self,
        bucket: &str,
        upload: &Upload,
        now: OffsetDateTime,
    ) -> S3Result<String> {
        let config = self.bucket(bucket)?;
        check_lock(&config, &upload.lock, now)?;
        let id = unique_id();
        let directory = self.upload_directory(bucket, &id)?;
        std::fs::create_dir_all(&directory).map_err(S3Error::internal_error)?;
        write_json(&directory.join("upload.json"), upload)?;
        Ok(id)
    }

    pub(super) fn upload(&self, bucket: &str, key: &str, id: &str) -> S3Result<Upload> {
        self.bucket(bucket)?;
        match read_json::<Upload>(&self.upload_directory(bucket, id)?.join("upload.json")) {
            Ok(upload) if upload.key == key => Ok(upload),
            Ok(_) => Err(no_such_upload()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(no_such_upload()),
            Err(error) => Err(S3Error::internal_error(error)),
        }
    }

    pub(super) fn uploads(&self, bucket: &str) -> S3Result<Vec<(String, Upload)>> {
        self.bucket(bucket)?;
        let mut uploads = Vec::new();
        let directory = self.bucket_directory(bucket).join("uploads");
        for entry in std::fs::read_dir(directory).map_err(S3Error::internal_error)? {
            let entry = entry.map_err(S3Error::internal_error)?;
            match read_json::<Upload>(&entry.path().join("upload.json")) {
                Ok(upload) => uploads.push((entry.file_name().to_string_lossy().into_owned(), upload)),
                // Just beginning, or just ended.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(S3Error::internal_error(error)),
            }
        }
        uploads
            .sort_by(|(left_id, left), (right_id, right)| (&left.key, left_id).cmp(&(&right.key, right_id)));
        Ok(uploads)
    }

    pub(super) fn put_part(
        &self,
        bucket: &str,
        id: &str,
        number: i32,
        staged: &Staged,
        now: OffsetDateTime,
    ) -> S3Result<Part> {
        let directory = self.upload_directory(bucket, id)?;
        let body = format!("{number}-{}.body", unique_id());
        // The upload may have ended meanwhile.
        std::fs::rename(&staged.path, directory.join(&body)).map_err(|_| no_such_upload())?;
        let part = Part {
            number,
            size: staged.size,
            etag: hex::encode(staged.md5),
            checksum: staged.checksum.clone(),
            modified: now,
            body,
        };
        write_json(&directory.join(format!("{number}.json")), &part)?;
        Ok(part)
    }

    /// The parts that have arrived, by number.
    pub(super) fn parts(&self, bucket: &str, id: &str) -> S3Result<BTreeMap<i32, Part>> {
        let directory = self.upload_directory(bucket, id)?;
        let mut parts = BTreeMap::new();
        for entry in std::fs::read_dir(&directory).map_err(|_| no_such_upload())? {
            let path = entry.map_err(S3Error::internal_error)?.path();
            let number =
                path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".json"));
            if let Some(number) = number.and_then(|number| number.parse::<i32>().ok()) {
                parts.insert(number, read_json(&path).map_err(S3Error::internal_error)?);
            }
        }
        Ok(parts)
    }

    /// Joins parts into a staged body.
    pub(super) fn join(
        &self,
        bucket: &str,
        id: &str,
        parts: &[&Part],
        algorithm: Algorithm,
    ) -> S3Result<Staged> {
        let directory = self.upload_directory(bucket, id)?;
        let sources: Vec<PathBuf> = parts.iter().map(|part| directory.join(&part.body)).collect();
        body::concatenate(self.staging_path(), &sources, algorithm).map_err(S3Error::internal_error)
    }

    pub(super) fn end_upload(&self, bucket: &str, id: &str) -> S3Result<()> {
        std::fs::remove_dir_all(self.upload_directory(bucket, id)?).map_err(|_| no_such_upload())
    }
}

/// Checks a write against the bucket as it is, and says how the version will be protected.
fn admit(bucket: &Bucket, write: &Write, now: OffsetDateTime) -> S3Result<Protection> {
    check_lock(&bucket.config, &write.lock, now)?;
    let current = bucket.keys.get(&write.key).and_then(|versions| current(versions));
    write.condition.check(current)?;
    let default = bucket.config.default_retention;
    if !write.vouched && (write.lock.asks() || default.is_some()) {
        return Err(s3_error!(
            InvalidRequest,
            "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock parameters"
        ));
    }
    Ok(Protection {
        retention: write.lock.retention.or_else(|| default.map(|default| default.starting(now))),
        legal_hold: write.lock.legal_hold,
    })
}

fn check_lock(config: &BucketConfig, lock: &RequestedLock, now: OffsetDateTime) -> S3Result<()> {
    if lock.asks() && !config.object_lock {
        return Err(no_lock());
    }
    match lock.retention {
        Some(retention) => in_the_future(retention.until, now),
        None => Ok(()),
    }
}

pub(super) fn in_the_future(until: OffsetDateTime, now: OffsetDateTime) -> S3Result<()> {
    if until > now {
        return Ok(());
    }
    Err(s3_error!(InvalidArgument, "The retain until date must be in the future!"))
}

fn bodies(versions: &[Version]) -> impl Iterator<Item = &str> {
    versions.iter().filter_map(|version| version.object.as_ref()).map(|object| object.body.as_str())
}

/// Keys with a prefix behind a marker. A marker that is itself a common prefix stands for all keys
/// rolled up in it.
fn keys_after<'a>(
    keys: &'a BTreeMap<String, Vec<Version>>,
    prefix: &'a str,
    delimiter: Option<&str>,
    after: Option<&'a str>,
) -> impl Iterator<Item = (&'a str, &'a Vec<Version>)> {
    let start = match after {
        Some(after) if after >= prefix => Bound::Excluded(after),
        _ => Bound::Included(prefix),
    };
    let rolled_up = after.filter(|after| listing::group(after, prefix, delimiter).as_deref() == Some(after));
    keys.range::<str, _>((start, Bound::Unbounded))
        .map(|(key, versions)| (key.as_str(), versions))
        .take_while(move |(key, _)| key.starts_with(prefix))
        .filter(move |(key, _)| !rolled_up.is_some_and(|group| key.starts_with(group)))
}

fn owned(page: Page<&str, &Version>) -> Page<String, Version> {
    Page {
        rows: page.rows.into_iter().map(|(key, version)| (key.to_owned(), version.clone())).collect(),
        prefixes: page.prefixes,
        truncated: page.truncated,
        last: page.last,
        last_is_row: page.last_is_row,
    }
}

fn load_keys(directory: &Path) -> io::Result<BTreeMap<String, Vec<Version>>> {
    let mut keys = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let directory = entry?.path();
        let file: KeyFile = match read_json(&directory.join("versions.json")) {
            Ok(file) => file,
            // Created for a first version that never came to be, or on its way out.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::fs::remove_dir_all(&directory)?;
                continue;
            }
            Err(error) => return Err(error),
        };
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name != "versions.json" && !bodies(&file.versions).any(|body| body == name) {
                std::fs::remove_file(&path)?;
            }
        }
        keys.insert(file.key, file.versions);
    }
    Ok(keys)
}
