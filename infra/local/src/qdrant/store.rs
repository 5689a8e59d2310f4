//! Collections on disk: one folder each, opened when first used.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use qdrant_edge::{EdgeConfig, EdgeShard};
use tonic::Status;

use crate::serving::unique_id;

/// Everything but letters, digits, `_` and `-` is escaped, so that two collections never share a
/// folder and none leaves the directory.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'_').remove(b'-');
/// Folders of collections half made or half removed; the next start clears them away.
const UNFINISHED: &str = ".unfinished-";
/// The longest name of a collection, as the real server has it.
const MOST_NAME_BYTES: usize = 255;

/// All collections.
pub(super) struct Store {
    directory: PathBuf,
    open: Mutex<HashMap<String, Arc<Collection>>>,
}

/// One collection. Searches share it; a write has it alone, because the engine's flush demands that
/// nothing else is going on. `None` once it has been dropped.
pub(super) struct Collection(RwLock<Option<EdgeShard>>);

impl Store {
    /// Opens the directory and clears away what a crash left half done.
    pub(super) fn open(directory: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(Self { directory, open: Mutex::default() })
    }

    /// Makes a collection; its folder appears in one step.
    pub(super) fn create(&self, name: &str, config: EdgeConfig) -> Result<(), Status> {
        let folder = self.folder(name)?;
        let _open = self.lock();
        if folder.exists() {
            return Err(Status::already_exists(format!("Wrong input: Collection `{name}` already exists!")));
        }
        let unfinished = self.unfinished();
        fs::create_dir(&unfinished).map_err(failed)?;
        drop(EdgeShard::new(&unfinished, config).map_err(super::convert::status)?);
        fs::rename(&unfinished, &folder).map_err(failed)
    }

    /// Drops a collection; says whether there was one.
    pub(super) fn delete(&self, name: &str) -> Result<bool, Status> {
        let folder = self.folder(name)?;
        let unfinished = self.unfinished();
        {
            let mut open = self.lock();
            if !folder.exists() {
                return Ok(false);
            }
            // Whoever is reading finishes first; whoever comes later finds it gone.
            if let Some(collection) = open.remove(name) {
                drop(collection.0.write().unwrap_or_else(PoisonError::into_inner).take());
            }
            fs::rename(&folder, &unfinished).map_err(failed)?;
        }
        fs::remove_dir_all(&unfinished).map_err(failed)?;
        Ok(true)
    }

    /// The collection of that name.
    pub(super) fn get(&self, name: &str) -> Result<Arc<Collection>, Status> {
        let folder = self.folder(name)?;
        let mut open = self.lock();
        if let Some(collection) = open.get(name) {
            return Ok(Arc::clone(collection));
        }
        if !folder.exists() {
            return Err(not_found(name));
        }
        let shard = EdgeShard::load(&folder, None).map_err(super::convert::status)?;
        let collection = Arc::new(Collection(RwLock::new(Some(shard))));
        open.insert(name.to_owned(), Arc::clone(&collection));
        Ok(collection)
    }

    /// Whether there is a collection of that name.
    pub(super) fn exists(&self, name: &str) -> Result<bool, Status> {
        Ok(self.folder(name)?.exists())
    }

    /// All names, in order.
    pub(super) fn names(&self) -> Result<Vec<String>, Status> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let folder = entry.map_err(failed)?.file_name();
            let folder = folder.to_string_lossy();
            if !folder.starts_with(UNFINISHED) {
                names.push(percent_decode_str(&folder).decode_utf8_lossy().into_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn folder(&self, name: &str) -> Result<PathBuf, Status> {
        let folder = utf8_percent_encode(name, ESCAPED).to_string();
        if name.is_empty() || folder.len() > MOST_NAME_BYTES {
            return Err(Status::invalid_argument("collection_name: must have 1 to 255 bytes"));
        }
        Ok(self.directory.join(Path::new(&folder)))
    }

    fn unfinished(&self) -> PathBuf {
        self.directory.join(format!("{UNFINISHED}{}", unique_id()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Collection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collection {
    /// Reads. Any number of readers at a time.
    pub(super) fn read<T>(
        &self,
        name: &str,
        read: impl FnOnce(&EdgeShard) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let shard = self.0.read().unwrap_or_else(PoisonError::into_inner);
        read(shard.as_ref().ok_or_else(|| not_found(name))?)
    }

    /// Writes, and puts it on disk before it returns: the engine does not replay its log by itself.
    pub(super) fn write<T>(
        &self,
        name: &str,
        write: impl FnOnce(&EdgeShard) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let shard = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let shard = shard.as_ref().ok_or_else(|| not_found(name))?;
        let outcome = write(shard);
        shard.flush();
        outcome
    }
}

fn not_found(name: &str) -> Status {
    Status::not_found(format!("Not found: Collection `{name}` doesn't exist!"))
}

fn failed(error: io::Error) -> Status {
    Status::internal(format!("Service internal error: {error}"))
}
