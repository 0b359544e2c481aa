//! The source's files: looked at once, fenced against writers, and read.

use super::acl::Acl;
use super::identity::Identity;
use super::locks;
use super::messages::Looked;
use super::pinned;
use super::reader::{self, Aligned, Reader};
use super::{extents, users, Error};
use ferry_contract::cold::{Directory, File as Owned, Item, Kind, Part, MAX_FILES};
use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A file of the source, open and fenced for as long as this lives.
#[derive(Debug)]
pub struct Source {
    /// As the guest's definition names it.
    pub path: PathBuf,
    /// As it is really called, symbolic links followed.
    pub real: PathBuf,
    /// What it is to the guest.
    pub part: Part,
    /// A file or a device.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Bytes it takes up.
    pub allocated: u64,
    /// Blocks that may hold data.
    pub runs: Vec<Range<u64>>,
    /// Which file it is.
    pub identity: Identity,
    /// See [`modified`].
    pub modified: i64,
    seen: Seen,
    mode: u32,
    owner: (u32, u32),
    reader: Reader,
}

/// When a file was last changed, nanoseconds since 1970.
pub fn modified(metadata: &Metadata) -> i64 {
    let seconds = metadata.mtime().saturating_mul(1_000_000_000);
    seconds.saturating_add(metadata.mtime_nsec())
}

/// What changes when somebody writes to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Seen {
    fn of(metadata: &Metadata) -> Self {
        Self {
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl Source {
    fn open(Found { path, real }: Found, part: &Part) -> Result<Self, Error> {
        let path = path.as_path();
        let failed = Error::file("open", path);
        // A device that is mounted, or part of another one, is written to by nobody who knows of QEMU's locks.
        let alone = match super::place::is_device(&real) {
            true => libc::O_EXCL,
            false => 0,
        };
        let file =
            pinned::open(&real, libc::O_NONBLOCK | libc::O_NOCTTY | alone).map_err(|error| {
                match error.raw_os_error() {
                    Some(libc::EBUSY) => Error::Other(format!(
                        "{} is in use on this host (mounted, or part of another device)",
                        path.display()
                    )),
                    _ => failed(error),
                }
            })?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = kind(&metadata).ok_or_else(|| {
            Error::Other(format!("{} is neither a file nor a block device", path.display()))
        })?;
        locks::fence(&file, path)?;
        let size = length(&file, &metadata, kind).map_err(failed)?;
        let runs = extents::data_blocks(&file, size).map_err(failed)?;
        let allocated = match kind {
            Kind::File => metadata.blocks().saturating_mul(512),
            Kind::Block => size,
        };
        Ok(Self {
            path: path.to_owned(),
            part: part.clone(),
            kind,
            size,
            allocated,
            runs,
            identity: Identity::of(&file).map_err(failed)?,
            modified: modified(&metadata),
            seen: Seen::of(&metadata),
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            reader: Reader::new(file, &real),
            real,
        })
    }

    /// For the inventory.
    pub fn owned(&self) -> Owned {
        Owned {
            path: self.path.clone(),
            part: self.part.clone(),
            kind: self.kind,
            size: self.size,
            allocated: self.allocated,
        }
    }

    /// For the destination.
    pub fn looked(&self, has_nonce: bool) -> Result<Looked, Error> {
        let sample = (self.kind == Kind::Block).then(|| reader::sample(&self.reader, self.size));
        Ok(Looked {
            size: self.size,
            kind: self.kind,
            mode: self.mode,
            owner: users::user_name(self.owner.0),
            group: users::group_name(self.owner.1),
            attributes: attributes(self.reader.file()),
            acl: self.acl()?.map(Acl::named),
            name: self
                .real
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            has_nonce,
            sample: sample.transpose().map_err(Error::file("read", &self.path))?,
        })
    }

    /// Its access control list, where it has one; a device's is of its node, not of what is in it.
    pub fn acl(&self) -> Result<Option<Acl<u32>>, Error> {
        if self.kind == Kind::Block {
            return Ok(None);
        }
        let failed = Error::file("read the access control list of", &self.path);
        Acl::of(self.reader.file()).map_err(failed)
    }

    /// Fills `buffer` from the file.
    pub fn read(&self, buffer: &mut Aligned, offset: u64, length: usize) -> Result<(), Error> {
        let read = self.reader.read(buffer, offset, length);
        read.map_err(Error::file("read", &self.path))
    }

    /// Lets go of the locks: the file is nobody's any more.
    pub fn lift(&self) {
        locks::lift(self.reader.file());
    }

    /// Whether it is still what it was when it was opened.
    pub fn check(&self) -> Result<(), Error> {
        let metadata = self.reader.file().metadata();
        let metadata = metadata.map_err(Error::file("look at", &self.path))?;
        // An access to a device's node is no change of its content, nor has it a length.
        let same = match self.kind {
            Kind::File => Seen::of(&metadata) == self.seen,
            Kind::Block => true,
        };
        let there = fs::metadata(&self.path).map_err(Error::file("look at", &self.path))?;
        match same && (there.dev(), there.ino()) == self.identity.number {
            true => Ok(()),
            false => Err(Error::Other(format!(
                "{} was changed while it was copied; try again when nothing writes to it",
                self.path.display()
            ))),
        }
    }
}

/// Opens and fences all of a guest's files. Directories stand for the files in them.
///
/// # Errors
/// All that is wrong with any of them, at once.
pub fn open(items: &[Item]) -> Result<(Vec<Source>, Vec<Directory>), Error> {
    let (mut files, mut directories, mut problems) = (Vec::new(), Vec::new(), Vec::new());
    let mut known = BTreeSet::new();
    for item in items {
        let found = expand(item, &mut directories);
        let paths = found.unwrap_or_else(|error| {
            problems.push(error.to_string());
            Vec::new()
        });
        for found in paths {
            if files.len() == MAX_FILES {
                return Err(Error::Other(format!("the guest has more than {MAX_FILES} files")));
            }
            match Source::open(found, &item.part) {
                Ok(source) if known.insert(source.identity.number) => files.push(source),
                // One file under two names, or of two disks: it moves once, and the other name would be lost.
                Ok(source) => problems.push(format!("{} belongs to the guest twice", source.path.display())),
                Err(error) => problems.push(error.to_string()),
            }
        }
    }
    match problems.is_empty() {
        true => Ok((files, directories)),
        false => Err(Error::Problems(problems)),
    }
}

/// A file of an item.
#[derive(Debug)]
struct Found {
    /// As the item names it, or names its directory.
    path: PathBuf,
    /// As it is really called. Below a directory no symbolic link is followed: whoever the directory belongs to, a guest's
    /// TPM to swtpm's user, does not choose files of the host.
    real: PathBuf,
}

/// The files of an item, and into `directories` what holds them.
fn expand(item: &Item, directories: &mut Vec<Directory>) -> Result<Vec<Found>, Error> {
    let failed = Error::file("look at", &item.path);
    let real = fs::canonicalize(&item.path).map_err(failed)?;
    let metadata = fs::metadata(&real).map_err(failed)?;
    if !metadata.is_dir() {
        let path = item.path.clone();
        return Ok(vec![Found { path, real }]);
    }
    let (mut files, mut open) = (Vec::new(), vec![item.path.clone()]);
    while let Some(directory) = open.pop() {
        let failed = Error::file("look at", &directory);
        let metadata = fs::metadata(&directory).map_err(failed)?;
        directories.push(Directory {
            path: directory.clone(),
            mode: without_acl(&directory, metadata.mode() & 0o7777).map_err(failed)?,
            owner: users::user_name(metadata.uid()),
            group: users::group_name(metadata.gid()),
        });
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let kind = entry.file_type().map_err(failed)?;
            match (kind.is_dir(), kind.is_file()) {
                (true, _) => open.push(entry.path()),
                // A lock is of one host, and our own nonce too.
                (_, true) if is_state(&entry.file_name()) => files.push(entry.path()),
                _ => {}
            }
            if files.len() + directories.len() + open.len() > MAX_FILES {
                return Err(Error::Other(format!(
                    "{} has more than {MAX_FILES} files",
                    item.path.display()
                )));
            }
        }
    }
    files.sort();
    let found = |path: PathBuf| Found {
        real: real.join(path.strip_prefix(&item.path).unwrap_or(&path)),
        path,
    };
    Ok(files.into_iter().map(found).collect())
}

/// A directory's mode, without the access control list, which stays behind.
fn without_acl(path: &Path, mode: u32) -> io::Result<u32> {
    Ok(match Acl::of(&File::open(path)?)? {
        Some(acl) => {
            tracing::warn!(path = %path.display(), "the access control list of a directory is not copied: give it one there, if needed");
            mode & !0o777 | acl.mode()
        }
        None => mode,
    })
}

fn is_state(name: &std::ffi::OsStr) -> bool {
    let name = name.to_string_lossy();
    name != ".lock" && !name.starts_with(".ferry-")
}

fn kind(metadata: &Metadata) -> Option<Kind> {
    let of = metadata.file_type();
    match (of.is_file(), of.is_block_device()) {
        (true, _) => Some(Kind::File),
        (_, true) => Some(Kind::Block),
        _ => None,
    }
}

/// The length of a file or a device.
pub fn length(file: &File, metadata: &Metadata, kind: Kind) -> io::Result<u64> {
    match kind {
        Kind::File => Ok(metadata.len()),
        // A device's length is where its end is.
        Kind::Block => Ok(nix::unistd::lseek(file, 0, nix::unistd::Whence::SeekEnd)?.unsigned_abs()),
    }
}

/// `user.*` attributes: libvirt's own (`trusted.libvirt.*`) count this host's users, and labels are this host's too.
pub fn attributes(file: &File) -> Vec<(String, Vec<u8>)> {
    use std::os::fd::AsRawFd;
    let fd = file.as_raw_fd();
    let mut names = vec![0u8; 64 << 10];
    // SAFETY: the buffer is as long as said.
    let length = unsafe { libc::flistxattr(fd, names.as_mut_ptr().cast(), names.len()) };
    let Ok(length) = usize::try_from(length) else {
        return Vec::new();
    };
    let names = names[..length].split(|byte| *byte == 0);
    let ours = names.filter(|name| name.starts_with(b"user."));
    ours.filter_map(|name| {
        let text = String::from_utf8(name.to_vec()).ok()?;
        let name = std::ffi::CString::new(name).ok()?;
        let mut value = vec![0u8; 64 << 10];
        // SAFETY: the name ends with NUL, the buffer is as long as said.
        let length = unsafe { libc::fgetxattr(fd, name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        value.truncate(usize::try_from(length).ok()?);
        Some((text, value))
    })
    .take(64)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_directory_does_not_lead_to_others_files() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["tpm/tpm2", "others"] {
            fs::create_dir_all(at(name)).unwrap();
            fs::write(at(name).join("state"), name).unwrap();
        }
        let item = Item {
            path: at("tpm"),
            part: Part::Tpm,
        };
        let expanded = || expand(&item, &mut Vec::new()).unwrap().remove(0);
        assert!(Source::open(expanded(), &item.part).is_ok());
        // Between the look into it and the opening.
        let found = expanded();
        fs::rename(at("tpm/tpm2"), at("tpm/away")).unwrap();
        std::os::unix::fs::symlink(at("others"), at("tpm/tpm2")).unwrap();
        assert!(Source::open(found, &item.part).is_err());
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let item = |path: &str| Item {
            path: path.into(),
            part: Part::Other,
        };
        let Err(Error::Problems(problems)) =
            open(&[item("/no/such/file"), item("/dev/null"), item("/nor/this")])
        else {
            panic!("opened")
        };
        assert_eq!(problems.len(), 3, "{problems:?}");
    }
}
