//! Keeping a journal: each state is on the disk before anything is done that rests on it.

use super::Error;
use ferry_contract::cold::journal::{self, Journal, State, MAX_LENGTH};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A journal and where it is kept.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    journal: Journal,
}

impl std::ops::Deref for Kept {
    type Target = Journal;

    fn deref(&self) -> &Journal {
        &self.journal
    }
}

impl Kept {
    /// Writes a new journal; one of an earlier session is replaced.
    ///
    /// # Errors
    /// It cannot be kept; then nothing may be done that it would speak of.
    pub fn new(state_directory: &Path, journal: Journal) -> Result<Self, Error> {
        let path = journal::path(state_directory, journal.guest.uuid);
        let directory = path.parent().unwrap_or(state_directory);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(Error::file("make the directory", directory))?;
        let kept = Self { path, journal };
        kept.write()?;
        Ok(kept)
    }

    /// Reads the journal at `path`.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let journal =
            read(path)?.ok_or_else(|| Error::Other(format!("there is no journal {}", path.display())))?;
        Ok(Self {
            path: path.to_owned(),
            journal,
        })
    }

    /// Goes on to `state`, with what `change` notes: it has happened once this returns.
    ///
    /// # Errors
    /// It cannot be kept: then it has not happened.
    pub fn enter(&mut self, state: State, change: impl FnOnce(&mut Journal)) -> Result<(), Error> {
        let before = self.journal.clone();
        self.journal.state = state;
        change(&mut self.journal);
        tracing::info!(?state, "journal");
        self.write().inspect_err(|_| self.journal = before)
    }

    /// Notes something without going on.
    ///
    /// # Errors
    /// As with [`enter`](Self::enter).
    pub fn note(&mut self, change: impl FnOnce(&mut Journal)) -> Result<(), Error> {
        self.enter(self.journal.state, change)
    }

    /// Ends the journal: nothing of the session is left to be known.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(self) -> Result<(), Error> {
        let removed = fs::remove_file(&self.path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        });
        removed
            .and_then(|()| sync_parent(&self.path))
            .map_err(Error::file("remove the journal", &self.path))
    }

    fn write(&self) -> Result<(), Error> {
        let text = serde_json::to_vec(&self.journal)
            .map_err(|error| Error::Other(format!("the journal cannot be written: {error}")))?;
        replace(&self.path, &text).map_err(Error::file("write the journal", &self.path))
    }
}

/// The journal of a guest on this host, where there is one.
///
/// # Errors
/// It cannot be read, or is none.
pub fn find(state_directory: &Path, guest: Uuid) -> Result<Option<Journal>, Error> {
    read(&journal::path(state_directory, guest))
}

fn read(path: &Path) -> Result<Option<Journal>, Error> {
    let failed = Error::file("read the journal", path);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut text = Vec::new();
    file.take(MAX_LENGTH).read_to_end(&mut text).map_err(failed)?;
    let journal = Journal::parse(&text);
    journal
        .map(Some)
        .map_err(|error| Error::Other(format!("the journal {} cannot be used: {error}", path.display())))
}

/// Replaces a file by one of this content: whole, and on the disk.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&part)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&part, path)?;
    sync_parent(path)
}

/// Makes the entry of a file in its directory durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}
