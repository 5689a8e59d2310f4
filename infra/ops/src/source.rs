//! Where a log is read from: a folder or a bucket.

use std::io::{self, Read};
use std::path::Path;

use shared::audit_log::tenant_prefix;
use shared::audit_verify::{Kept, in_order};
use shared::one_line::OneLine;
use shared::tenant::TenantId;

use crate::files::Files;
use crate::s3::Bucket;

/// Why something could not be read. It says nothing of the log.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The place is none of a log's.
    #[error("{0}")]
    Place(String),
    /// A file or an object cannot be read.
    #[error("{} cannot be read: {error}", OneLine(place))]
    Read {
        /// Which.
        place: String,
        /// Why.
        error: io::Error,
    },
    /// The store refuses or does not answer.
    #[error("{} cannot be read: {}", OneLine(place), OneLine(error))]
    Store {
        /// What was asked for.
        place: String,
        /// What the store said.
        error: String,
    },
    /// What was found cannot be written.
    #[error("the output cannot be written: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    /// The failure to read `place`.
    pub fn read(place: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let place = place.into();
        |error| Self::Read { place, error }
    }
}

/// What the store says of how long it keeps an object, and its bytes.
pub type Object<'a> = (Kept, Box<dyn Read + 'a>);

/// An object's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// Its key.
    pub key: String,
    /// Which of its versions counts, where there are versions.
    pub version: Option<String>,
}

/// What there is of a tenant's log: names alone.
#[derive(Debug, Default)]
pub struct Log {
    /// What its head holds.
    pub head: Option<Vec<u8>>,
    /// Its objects in the order of their positions, across days; what has none comes first.
    pub objects: Vec<Name>,
}

impl Log {
    pub(crate) fn new(head: Option<Vec<u8>>, mut objects: Vec<Name>) -> Self {
        objects.sort_by(|a, b| in_order(&a.key, &b.key));
        Self { head, objects }
    }
}

/// A place that holds logs.
#[derive(Debug)]
pub enum Source {
    /// A copy in a folder.
    Files(Files),
    /// The bucket itself.
    Bucket(Box<Bucket>),
}

impl Source {
    /// The place that `text` names: `s3://…`, or else a folder.
    ///
    /// # Errors
    /// If it is no place of logs.
    pub fn open(text: &str) -> Result<Self, Failure> {
        match text.strip_prefix("s3://") {
            Some(place) => Ok(Self::Bucket(Box::new(Bucket::open(place)?))),
            None => Ok(Self::Files(Files::open(Path::new(text))?)),
        }
    }

    /// The tenant whose log alone it holds, if it is one tenant's place.
    pub fn only(&self) -> Option<&TenantId> {
        match self {
            Self::Files(files) => files.only(),
            Self::Bucket(bucket) => bucket.only(),
        }
    }

    /// The tenants that it holds logs of, in order.
    ///
    /// # Errors
    /// [`Failure`]
    pub fn tenants(&self) -> Result<Vec<TenantId>, Failure> {
        if let Some(only) = self.only() {
            return Ok(vec![only.clone()]);
        }
        let mut tenants = match self {
            Self::Files(files) => files.tenants()?,
            Self::Bucket(bucket) => bucket.tenants()?,
        };
        tenants.sort();
        Ok(tenants)
    }

    /// What there is of a tenant's log.
    ///
    /// # Errors
    /// [`Failure`]
    pub fn log(&self, tenant: &TenantId) -> Result<Log, Failure> {
        match self {
            Self::Files(files) => files.log(tenant),
            Self::Bucket(bucket) => bucket.log(tenant),
        }
    }

    /// Objects of those names, in their order.
    pub fn objects<'a>(
        &'a self,
        names: impl Iterator<Item = &'a Name> + 'a,
    ) -> Box<dyn Iterator<Item = (&'a Name, Result<Object<'a>, Failure>)> + 'a> {
        match self {
            Self::Files(files) => Box::new(names.map(|name| {
                let file = files.object(name);
                (name, file.map(|file| (Kept::Unknown, Box::new(file) as Box<dyn Read>)))
            })),
            Self::Bucket(bucket) => Box::new(bucket.objects(names)),
        }
    }
}

/// The tenant of a folder's name, `tenant=<id>`.
pub(crate) fn tenant_of(folder: &str) -> Option<TenantId> {
    let tenant = folder.strip_prefix("tenant=")?.trim_end_matches('/').parse().ok()?;
    (tenant_prefix(&tenant).trim_end_matches('/') == folder.trim_end_matches('/')).then_some(tenant)
}
