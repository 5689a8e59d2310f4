//! The bucket itself, with all versions of what it holds.
//!
//! A delete marker may be put even on a locked object, and so may a newer version; neither takes away
//! what was there. So of an object of the log the oldest version counts, and of the head the latest,
//! whatever lies upon them.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_sdk_s3::Client;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::operation::list_object_versions::ListObjectVersionsOutput;
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{ObjectLockMode, ObjectLockRetentionMode};
use futures_util::StreamExt;
use shared::audit_log::{HEAD, Head, tenant_prefix};
use shared::audit_verify::{Kept, position};
use shared::cause;
use shared::clock::Timestamp;
use shared::tenant::TenantId;
use tokio::runtime::{Builder, Runtime};

use crate::source::{Failure, Log, Name, Object, tenant_of};

/// How often the head is read again if objects lie past it, and how long after.
const HEAD_READS: usize = 3;
const HEAD_PAUSE: Duration = Duration::from_secs(1);
/// Objects that are fetched at a time, and up to which length they are held until they are read. Those of
/// the exporter are far below.
const AHEAD: usize = 16;
const MOST_AHEAD_BYTES: i64 = 8 << 20;

/// A bucket, or one tenant's prefix in it.
#[derive(Debug)]
pub struct Bucket {
    runtime: Runtime,
    client: Client,
    bucket: String,
    only: Option<TenantId>,
}

impl Bucket {
    /// `<bucket>` or `<bucket>/tenant=<id>`, with the credentials, region and endpoint of the environment.
    pub(crate) fn open(place: &str) -> Result<Self, Failure> {
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        let wrong =
            || Failure::Place("a bucket is given as s3://<bucket> or s3://<bucket>/tenant=<id>".into());
        if bucket.is_empty() {
            return Err(wrong());
        }
        let only = if prefix.is_empty() { None } else { Some(tenant_of(prefix).ok_or_else(wrong)?) };
        let runtime = Builder::new_current_thread().enable_all().build().map_err(Failure::read(place))?;
        let config = runtime.block_on(aws_config::defaults(BehaviorVersion::latest()).load());
        // Of the two ways to name a bucket, the one that any endpoint understands.
        let config = aws_sdk_s3::config::Builder::from(&config).force_path_style(true).build();
        Ok(Self { runtime, client: Client::from_conf(config), bucket: bucket.to_owned(), only })
    }

    pub(crate) const fn only(&self) -> Option<&TenantId> {
        self.only.as_ref()
    }

    pub(crate) fn tenants(&self) -> Result<Vec<TenantId>, Failure> {
        let mut tenants = Vec::new();
        let mut stray = None;
        self.versions("tenant=", Some("/"), |page| {
            for prefix in page.common_prefixes().iter().filter_map(|prefix| prefix.prefix()) {
                match tenant_of(prefix) {
                    Some(tenant) => tenants.push(tenant),
                    None => stray = Some(prefix.to_owned()),
                }
            }
        })?;
        match stray {
            Some(prefix) => Err(Failure::Place(format!("{prefix:?} in {} is no tenant's", self.bucket))),
            None => Ok(tenants),
        }
    }

    pub(crate) fn log(&self, tenant: &TenantId) -> Result<Log, Failure> {
        // The head first: what is exported from now on lies past it.
        let head = self.head(tenant)?;
        let prefix = tenant_prefix(tenant);
        let head_key = format!("{prefix}{HEAD}");
        let mut oldest = BTreeMap::new();
        self.versions(&prefix, None, |page| {
            for version in page.versions() {
                // Versions of a key come newest first, so the last one stays.
                let key = version.key().filter(|key| *key != head_key);
                if let Some(key) = key {
                    oldest.insert(key.to_owned(), version.version_id().map(str::to_owned));
                }
            }
        })?;
        let names = oldest.into_iter().map(|(key, version)| Name { key, version });
        let mut log = Log::new(head, names.collect());
        self.leave_out_newer(tenant, &mut log)?;
        Ok(log)
    }

    /// Leaves out what was exported since the head was read, which a newer head vouches for. What none
    /// vouches for stays, and is found.
    fn leave_out_newer(&self, tenant: &TenantId, log: &mut Log) -> Result<(), Failure> {
        let Some(lines) = log.head.as_deref().and_then(lines) else { return Ok(()) };
        let newest = log.objects.last().and_then(|name| position(&name.key)).unwrap_or(0);
        for _ in 0..HEAD_READS {
            if newest <= lines {
                break;
            }
            let now = self.head(tenant)?.as_deref().and_then(self::lines).unwrap_or(0);
            if newest <= now {
                log.objects.retain(|name| position(&name.key).is_none_or(|position| position <= lines));
                break;
            }
            self.runtime.block_on(tokio::time::sleep(HEAD_PAUSE));
        }
        Ok(())
    }

    /// What the latest version of the head holds, whatever lies upon it.
    fn head(&self, tenant: &TenantId) -> Result<Option<Vec<u8>>, Failure> {
        let key = format!("{}{HEAD}", tenant_prefix(tenant));
        let mut latest = None;
        self.versions(&key, None, |page| {
            let version = page.versions().iter().find(|version| version.key() == Some(&key));
            if let (None, Some(version)) = (&latest, version) {
                latest = Some(version.version_id().map(str::to_owned));
            }
        })?;
        let Some(version) = latest else { return Ok(None) };
        let (_, mut body) = self.runtime.block_on(self.get(&Name { key: key.clone(), version }))?;
        let mut bytes = Vec::new();
        body.read_to_end(&mut bytes).map_err(Failure::read(key))?;
        Ok(Some(bytes))
    }

    /// Objects in their order, several fetched at a time: a bucket takes tens of milliseconds for each.
    pub(crate) fn objects<'a>(
        &'a self,
        names: impl Iterator<Item = &'a Name> + 'a,
    ) -> impl Iterator<Item = (&'a Name, Result<Object<'a>, Failure>)> {
        let fetch = async move |name: &'a Name| (name, self.object(name).await);
        let mut fetched = Box::pin(futures_util::stream::iter(names).map(fetch).buffered(AHEAD));
        std::iter::from_fn(move || self.runtime.block_on(fetched.next()))
    }

    async fn object<'a>(&'a self, name: &'a Name) -> Result<Object<'a>, Failure> {
        let (kept, body) = Box::pin(self.get(name)).await?;
        let kept = match kept {
            Some(kept) => kept,
            None => Box::pin(self.kept(name)).await?,
        };
        Ok((kept, Box::new(body)))
    }

    async fn get<'a>(&'a self, name: &Name) -> Result<(Option<Kept>, Body<'a>), Failure> {
        let get = self.client.get_object().bucket(&self.bucket).key(&name.key);
        let got = get.set_version_id(name.version.clone()).send().await;
        let got = got.map_err(|e| self.failed(&name.key, &e))?;
        let compliance = got.object_lock_mode().map(|mode| *mode == ObjectLockMode::Compliance);
        let kept = compliance.map(|locked| kept(locked, got.object_lock_retain_until_date()));
        let short = got.content_length().is_some_and(|length| (0..=MOST_AHEAD_BYTES).contains(&length));
        let mut body = Body { runtime: &self.runtime, stream: got.body, chunk: VecDeque::new() };
        if short {
            while let Some(chunk) = body.stream.next().await {
                let chunk = chunk.map_err(io::Error::other).map_err(Failure::read(&name.key))?;
                body.chunk.extend(chunk.as_ref());
            }
        }
        Ok((kept, body))
    }

    /// What the store says of an object's retention when asked for that alone. Without the permission to
    /// know, it leaves it out of its other answers.
    async fn kept(&self, name: &Name) -> Result<Kept, Failure> {
        let get = self.client.get_object_retention().bucket(&self.bucket).key(&name.key);
        match get.set_version_id(name.version.clone()).send().await {
            Ok(got) => Ok(got.retention().map_or(Kept::Unlocked, |retention| {
                let compliance = retention.mode() == Some(&ObjectLockRetentionMode::Compliance);
                kept(compliance, retention.retain_until_date())
            })),
            Err(error) => match error.code() {
                // The object has no retention; the bucket has no locks.
                Some("NoSuchObjectLockConfiguration" | "InvalidRequest") => Ok(Kept::Unlocked),
                _ => Err(self.failed(&format!("the retention of {}", name.key), &error)),
            },
        }
    }

    /// Every page of what there is and was below a prefix.
    fn versions(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
        mut page: impl FnMut(&ListObjectVersionsOutput),
    ) -> Result<(), Failure> {
        let (mut key, mut version) = (None, None);
        loop {
            let list = self.client.list_object_versions().bucket(&self.bucket).prefix(prefix);
            let list = list.set_delimiter(delimiter.map(str::to_owned));
            let send = Box::pin(list.set_key_marker(key).set_version_id_marker(version).send());
            let got = self.runtime.block_on(send).map_err(|e| self.failed(prefix, &e))?;
            page(&got);
            if got.is_truncated() != Some(true) {
                return Ok(());
            }
            key = got.next_key_marker().map(str::to_owned);
            version = got.next_version_id_marker().map(str::to_owned);
        }
    }

    fn failed<E>(&self, what: &str, error: &E) -> Failure
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let error = match (error.code(), error.message()) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            (Some(code), None) => code.to_owned(),
            // Without the answer that it came from, which may be an object of the log.
            _ => cause::told(error),
        };
        Failure::Store { place: format!("s3://{}/{what}", self.bucket), error }
    }
}

fn lines(head: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Head>(head).ok().map(|head| head.lines)
}

fn kept(compliance: bool, until: Option<&DateTime>) -> Kept {
    let until = until.filter(|_| compliance).and_then(|until| until.to_millis().ok());
    until.map_or(Kept::Unlocked, |ms| Kept::Until(Timestamp::from_millis(ms)))
}

/// An object's bytes as they arrive.
struct Body<'a> {
    runtime: &'a Runtime,
    stream: ByteStream,
    chunk: VecDeque<u8>,
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.runtime.block_on(self.stream.next()) {
                Some(chunk) => self.chunk.extend(chunk.map_err(io::Error::other)?.as_ref()),
                None => return Ok(0),
            }
        }
        self.chunk.read(buffer)
    }
}
