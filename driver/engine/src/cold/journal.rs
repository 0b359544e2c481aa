//! Keeping a journal: each state is on the disk before anything is done that rests on it, by one engine at a time.

use super::Error;
use ferry_contract::cold::journal::{self, Journal, State, MAX_LENGTH};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long an engine whose work is over may still take to end.
const LEAVING: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// The right to work on a guest's journal: one engine has it at a time, and a dead one none.
#[derive(Debug)]
pub struct Claim {
    /// The journal.
    journal: PathBuf,
    /// Beside it: the journal itself is another file with every word.
    path: PathBuf,
    _locked: Flock<File>,
}

impl Claim {
    /// Takes the right to the journal of this guest; waits some seconds for an engine that is about to end.
    ///
    /// # Errors
    /// Another engine works on it.
    pub fn take(state_directory: &Path, guest: Uuid) -> Result<Self, Error> {
        let journal = journal::path(state_directory, guest);
        let directory = journal.parent().unwrap_or(state_directory);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            // Its own entry, too: it may be new.
            .and_then(|()| sync_parent(directory))
            .map_err(Error::file("make the directory", directory))?;
        Self::of(&journal, Holder::MayStay)
    }

    fn of(journal: &Path, holder: Holder) -> Result<Self, Error> {
        let path = journal.with_extension("lock");
        let end = Instant::now() + LEAVING;
        let mut told = holder == Holder::MayStay;
        loop {
            match try_lock(&path).map_err(Error::file("lock", &path))? {
                Some(locked) => {
                    return Ok(Self {
                        journal: journal.to_owned(),
                        path,
                        _locked: locked,
                    })
                }
                None if Instant::now() < end => {
                    told = told || end_holder(&path);
                    std::thread::sleep(LOOK);
                }
                None => {
                    let holder = fs::read_to_string(&path).unwrap_or_default();
                    return Err(Error::Other(format!(
                        "an engine (process {}) still works on the migration that {} speaks of: it ends within 10 minutes, \
                         or with \"virt-ferry recover --abort\" or \"--lost\"",
                        holder.trim(),
                        journal.display()
                    )));
                }
            }
        }
    }

    /// What is written there.
    ///
    /// # Errors
    /// It cannot be read, or is no journal.
    pub fn find(&self) -> Result<Option<Journal>, Error> {
        read(&self.journal)
    }

    /// Writes down how far this session of an earlier engine is.
    ///
    /// # Errors
    /// It cannot be kept.
    pub fn note(&self, journal: &Journal) -> Result<(), Error> {
        write(&self.journal, journal)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Still locked: whoever waits for it sees that it has gone, and makes its own.
        let _ = fs::remove_file(&self.path);
    }
}

/// What becomes of an engine that has the right already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    MayStay,
    /// The operator decides now, and not the other host that it waits for.
    Ends,
}

/// Ends the engine that has this lock, which the journal makes as safe as a crash; says whether it was told to.
fn end_holder(lock: &Path) -> bool {
    let program = |process: &str| {
        let program = fs::read_link(format!("/proc/{process}/exe")).ok()?;
        let name = program.file_name()?.to_string_lossy().into_owned();
        // One that was replaced by a newer release.
        Some(name.trim_end_matches(" (deleted)").to_owned())
    };
    let holder = fs::read_to_string(lock).ok();
    let holder = holder.and_then(|number| number.trim().parse::<i32>().ok());
    // Not written yet, or left by one that has died.
    let Some(holder) =
        holder.filter(|holder| program(&holder.to_string()).is_some_and(|it| program("self") == Some(it)))
    else {
        return false;
    };
    tracing::warn!(
        process = holder,
        "the operator decides: the engine that waits for the other host is ended"
    );
    kill(Pid::from_raw(holder), Signal::SIGTERM).is_ok()
}

/// The lock, with this process's number in it; `None` where another one has it.
fn try_lock(path: &Path) -> io::Result<Option<Flock<File>>> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    let mut locked = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(locked) => locked,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, error)) => return Err(error.into()),
    };
    let (ours, there) = (locked.metadata()?, fs::metadata(path));
    if !there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())) {
        // Its last holder has removed it meanwhile.
        return Ok(None);
    }
    locked.set_len(0)?;
    writeln!(locked, "{}", std::process::id())?;
    Ok(Some(locked))
}

/// A journal and where it is kept.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    journal: Journal,
    /// None once nothing is to be written any more.
    claim: Option<Claim>,
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
    pub fn new(claim: Claim, journal: Journal) -> Result<Self, Error> {
        let kept = Self {
            path: claim.journal.clone(),
            journal,
            claim: Some(claim),
        };
        // No longer than is read, with room for what is noted later.
        let length = serde_json::to_vec(&kept.journal).map_or(0, |text| text.len() as u64);
        if length > MAX_LENGTH / 2 {
            return Err(Error::Other(format!(
                "guest {} has too much to be moved in one go: its journal would have {} MiB of at most {}; it may have hundreds \
                 of snapshots (virsh snapshot-list)",
                kept.guest.name,
                length >> 20,
                MAX_LENGTH >> 21
            )));
        }
        write(&kept.path, &kept.journal)?;
        Ok(kept)
    }

    /// Reads the journal at `path`, once no other engine works on it.
    ///
    /// # Errors
    /// It cannot be read, or is none; another engine works on it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::claimed(path, Holder::MayStay)
    }

    /// As [`open`](Self::open), and an engine that works on it is ended: the operator decides.
    ///
    /// # Errors
    /// As with [`open`](Self::open), if that engine does not end.
    pub fn take_over(path: &Path) -> Result<Self, Error> {
        Self::claimed(path, Holder::Ends)
    }

    /// What is written at `path`, whoever works on it.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn look(path: &Path) -> Result<Journal, Error> {
        read(path)?.ok_or_else(|| none(path))
    }

    fn claimed(path: &Path, holder: Holder) -> Result<Self, Error> {
        let claim = Claim::of(path, holder)?;
        let journal = claim.find()?.ok_or_else(|| none(path))?;
        Ok(Self {
            path: path.to_owned(),
            journal,
            claim: Some(claim),
        })
    }

    /// Lets others at it: this journal is only kept to be removed one day, and a new session may replace it before.
    pub fn loosen(&mut self) {
        self.claim = None;
    }

    /// Goes on to `state`, with what `change` notes: it has happened once this returns.
    ///
    /// # Errors
    /// It cannot be kept, or others have been let at it: then it has not happened.
    pub fn enter(&mut self, state: State, change: impl FnOnce(&mut Journal)) -> Result<(), Error> {
        if self.claim.is_none() {
            let path = self.path.display();
            return Err(Error::Other(format!(
                "the journal {path} may be a later session's by now"
            )));
        }
        let before = self.journal.clone();
        self.journal.state = state;
        change(&mut self.journal);
        tracing::info!(?state, "journal");
        write(&self.path, &self.journal).inspect_err(|_| self.journal = before)
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
        let session = self.journal.session;
        let claim = match self.claim {
            Some(claim) => claim,
            // A later session's engine may work on it for long.
            None if read(&self.path)?.is_none_or(|found| found.session != session) => return Ok(()),
            None => Claim::of(&self.path, Holder::MayStay)?,
        };
        if claim.find()?.is_some_and(|found| found.session != session) {
            return Ok(());
        }
        // What a crash has left of writing it.
        let _ = fs::remove_file(part(&self.path));
        let removed = fs::remove_file(&self.path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        });
        removed
            .and_then(|()| sync_parent(&self.path))
            .map_err(Error::file("remove the journal", &self.path))
    }
}

fn write(path: &Path, journal: &Journal) -> Result<(), Error> {
    let text = serde_json::to_vec(journal)
        .map_err(|error| Error::Other(format!("the journal cannot be written: {error}")))?;
    replace(path, &text).map_err(Error::file("write the journal", path))
}

fn none(path: &Path) -> Error {
    Error::Other(format!("there is no journal {}", path.display()))
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

/// Where a journal is written before it takes its place.
fn part(path: &Path) -> PathBuf {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    part.into()
}

/// Replaces a file by one of this content: whole, and on the disk.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let part = part(path);
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
