//! A copy of the log in a folder, as `aws s3 sync` makes it: of the bucket, or of one tenant's prefix.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use shared::audit_log::{self, HEAD, tenant_prefix};
use shared::audit_verify::position;
use shared::tenant::TenantId;

use crate::source::{Failure, Log, Name, tenant_of};

/// The folder.
#[derive(Debug)]
pub struct Files {
    root: PathBuf,
    only: Option<TenantId>,
}

impl Files {
    pub(crate) fn open(root: &Path) -> Result<Self, Failure> {
        let names = names(root)?;
        let mut files = Self { root: root.to_owned(), only: None };
        if names.iter().any(|name| name.starts_with("tenant=")) {
            return Ok(files);
        }
        if !names.iter().any(|name| name.starts_with("year=") || name == HEAD) {
            let place = root.display();
            return Err(Failure::Place(format!("{place} holds neither tenant=… folders nor a tenant's log")));
        }
        // A copy of one tenant's prefix: its name may say whose, and any of its records does.
        let path = root.canonicalize().map_err(read(root))?;
        let named = path.file_name().and_then(|name| tenant_of(&name.to_string_lossy()));
        files.only = match named {
            Some(tenant) => Some(tenant),
            None => Some(files.first_tenant()?),
        };
        Ok(files)
    }

    /// The tenant of the first record that can be read.
    fn first_tenant(&self) -> Result<TenantId, Failure> {
        let mut found = Vec::new();
        walk(&self.root, "", &mut found)?;
        found.sort_by_key(|key| position(key));
        for key in found.iter().filter(|key| position(key).is_some()) {
            let path = self.root.join(key);
            let file = File::open(&path).map_err(read(&path))?;
            if let Some(Ok(line)) = audit_log::lines(file).next() {
                return Ok(line.record.tenant_id);
            }
        }
        let place = self.root.display();
        Err(Failure::Place(format!("nothing in {place} says whose log it is: name the folder tenant=<id>")))
    }

    pub(crate) const fn only(&self) -> Option<&TenantId> {
        self.only.as_ref()
    }

    pub(crate) fn tenants(&self) -> Result<Vec<TenantId>, Failure> {
        let folders = names(&self.root)?.into_iter().filter(|name| name.starts_with("tenant="));
        folders
            .map(|name| {
                let stray = || Failure::Place(format!("{name:?} in {} is no tenant's", self.root.display()));
                tenant_of(&name).ok_or_else(stray)
            })
            .collect()
    }

    pub(crate) fn log(&self, tenant: &TenantId) -> Result<Log, Failure> {
        let folder = self.folder(tenant);
        let prefix = tenant_prefix(tenant);
        let head = match fs::read(folder.join(HEAD)) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(read(&folder.join(HEAD))(error)),
        };
        let mut keys = Vec::new();
        if folder.exists() {
            walk(&folder, "", &mut keys)?;
        }
        let names = keys.into_iter().filter(|key| key != HEAD);
        let names = names.map(|key| Name { key: format!("{prefix}{key}"), version: None });
        Ok(Log::new(head, names.collect()))
    }

    pub(crate) fn object(&self, name: &Name) -> Result<File, Failure> {
        let path = match (&self.only, name.key.split_once('/')) {
            (Some(_), Some((_, rest))) => self.root.join(rest),
            _ => self.root.join(&name.key),
        };
        File::open(&path).map_err(read(&path))
    }

    fn folder(&self, tenant: &TenantId) -> PathBuf {
        match self.only {
            Some(_) => self.root.clone(),
            None => self.root.join(tenant_prefix(tenant)),
        }
    }
}

fn read(path: &Path) -> impl FnOnce(io::Error) -> Failure {
    Failure::read(path.display().to_string())
}

fn names(folder: &Path) -> Result<Vec<String>, Failure> {
    let entries = fs::read_dir(folder).map_err(read(folder))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect::<io::Result<_>>().map_err(read(folder))
}

/// Collects the keys below a folder. Links to folders are not followed, so it ends.
fn walk(folder: &Path, prefix: &str, keys: &mut Vec<String>) -> Result<(), Failure> {
    for entry in fs::read_dir(folder).map_err(read(folder))? {
        let entry = entry.map_err(read(folder))?;
        let key = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type().map_err(read(folder))?.is_dir() {
            walk(&entry.path(), &format!("{key}/"), keys)?;
        } else {
            keys.push(key);
        }
    }
    Ok(())
}
