//! The source's files: looked at once, fenced against writers, and read.

use super::acl::Acl;
use super::identity::Identity;
use super::messages::Looked;
use super::pinned;
use super::{extents, users, Error};
use ferry_contract::cold::{Digest, Directory, File as Owned, Item, Kind, Part, BLOCK, MAX_FILES};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg};
use std::collections::BTreeSet;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// QEMU's bytes (block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE): "I read", "nobody may write",
/// "nobody may resize". Whoever opens the image for writing is refused while somebody holds them.
const FENCE: [i64; 3] = [100, 201, 203];
/// "I write", "I write what is there already", "I resize".
const WRITERS: Range<i64> = 101..104;

/// All of QEMU's bytes on an image, whatever they say.
const ANY: Range<i64> = 100..300;

/// The alignment of direct I/O, bytes: enough for every device.
const ALIGN: usize = 4096;

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
        fence(&file, path)?;
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
        let sample = (self.kind == Kind::Block).then(|| sample(&self.reader, self.size));
        Ok(Looked {
            size: self.size,
            kind: self.kind,
            mode: self.mode,
            owner: users::user_name(self.owner.0),
            group: users::group_name(self.owner.1),
            attributes: attributes(&self.reader.buffered),
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
        Acl::of(&self.reader.buffered).map_err(failed)
    }

    /// Fills `buffer` from the file.
    pub fn read(&self, buffer: &mut Aligned, offset: u64, length: usize) -> Result<(), Error> {
        let read = self.reader.read(buffer, offset, length);
        read.map_err(Error::file("read", &self.path))
    }

    /// Lets go of the locks: the file is nobody's any more.
    pub fn lift(&self) {
        for byte in FENCE {
            // Where there are no locks there is nothing to let go of.
            let _ = fcntl(
                &self.reader.buffered,
                FcntlArg::F_OFD_SETLK(&lock(libc::F_UNLCK, byte, 1)),
            );
        }
    }

    /// Whether it is still what it was when it was opened.
    pub fn check(&self) -> Result<(), Error> {
        let metadata = self.reader.buffered.metadata();
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

fn lock(kind: libc::c_int, start: i64, length: i64) -> libc::flock {
    // SAFETY: plain numbers, for which zeros are a value; l_pid must be 0 for these locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = start;
    lock.l_len = length;
    lock
}

/// Takes QEMU's read locks on an image, and finds out whether somebody writes to it.
///
/// # Errors
/// Somebody does.
fn fence(file: &File, path: &Path) -> Result<(), Error> {
    let busy = || {
        Error::Other(format!(
            "{} is in use: another process has it open for writing (see \"fuser -v {}\"); end that first",
            path.display(),
            path.display()
        ))
    };
    for byte in FENCE {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte, 1))) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(busy()),
            Err(error) if has_no_locks(error) => {
                tracing::warn!(path = %path.display(), "this file system has no locks: nothing keeps writers away");
                return Ok(());
            }
            Err(error) => return Err(Error::file("lock", path)(error.into())),
        }
    }
    match is_locked(file, WRITERS) {
        true => Err(busy()),
        false => Ok(()),
    }
}

/// Whether another open of the file holds a lock on any of these bytes, or that cannot be found out.
pub fn is_locked(file: &File, bytes: Range<i64>) -> bool {
    let mut probe = lock(libc::F_WRLCK, bytes.start, bytes.end - bytes.start);
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)) {
        Ok(_) => probe.l_type != libc::F_UNLCK as libc::c_short,
        Err(error) => !has_no_locks(error),
    }
}

/// Whether it is the file system that has no locks.
fn has_no_locks(error: Errno) -> bool {
    matches!(
        error,
        Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS
    )
}

/// Whether any process uses the image, as a disk or as another one's base, or that cannot be found out: who may not read a
/// file may delete it all the same.
pub fn is_held(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => is_locked(&file, ANY),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
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

/// Memory that direct I/O takes, a block long.
#[derive(Debug)]
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Default for Aligned {
    fn default() -> Self {
        let bytes = vec![0; ferry_contract::cold::BLOCK as usize + 2 * ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start }
    }
}

impl Aligned {
    /// The first `length` bytes.
    pub fn get(&self, length: usize) -> &[u8] {
        &self.bytes[self.start..self.start + length]
    }

    /// The first `length` bytes, to fill.
    pub fn get_mut(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

/// Reads a file past the page cache, but for what is in it already: on this project's machine cold data came at 0.5 GB/s
/// through the cache and at 2.6 GB/s past it with two readers, and what the cache holds at 8 GB/s.
#[derive(Debug)]
pub struct Reader {
    buffered: File,
    direct: Option<File>,
}

impl Reader {
    /// Of an open file, whose path is this.
    pub fn new(buffered: File, path: &Path) -> Self {
        // tmpfs and some others know no direct I/O.
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .ok()
            .filter(|direct| same(direct, &buffered));
        Self { buffered, direct }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.buffered
    }

    /// Fills the first `length` bytes of `buffer`; `offset` is a multiple of the block's length.
    pub fn read(&self, buffer: &mut Aligned, offset: u64, length: usize) -> io::Result<()> {
        if let Some(direct) = &self.direct {
            if !is_cached(&self.buffered, offset, length)
                && self.past_cache(direct, buffer, offset, length)?
            {
                return Ok(());
            }
        }
        self.buffered.read_exact_at(buffer.get_mut(length), offset)
    }

    /// As [`read`](Self::read), but never what only the cache holds.
    pub fn read_back(&self, buffer: &mut Aligned, offset: u64, length: usize) -> io::Result<()> {
        if let Some(direct) = &self.direct {
            if self.past_cache(direct, buffer, offset, length)? {
                return Ok(());
            }
        }
        self.buffered.read_exact_at(buffer.get_mut(length), offset)
    }

    /// Whether direct I/O has filled the buffer. Where it cannot, the cache still can.
    fn past_cache(
        &self,
        direct: &File,
        buffer: &mut Aligned,
        offset: u64,
        length: usize,
    ) -> io::Result<bool> {
        let whole = length.next_multiple_of(ALIGN);
        match direct.read_at(buffer.get_mut(whole), offset) {
            Ok(count) => Ok(count >= length),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Blocks of a device that are looked at.
const SAMPLES: u64 = 16;

/// What the first `size` bytes of a device hold in some of their blocks, the first and the last among them, on the storage
/// itself. Two hosts that find the same may have one and the same device: nothing else tells (a file beside it cannot be
/// made, and its names are each host's own).
pub fn sample(reader: &Reader, size: u64) -> io::Result<Digest> {
    let blocks = size.div_ceil(BLOCK);
    let mut hash = blake3::Hasher::new();
    let mut buffer = Aligned::default();
    for number in 0..SAMPLES.min(blocks) {
        let block = match blocks {
            ..=SAMPLES => number,
            more => number * (more - 1) / (SAMPLES - 1),
        };
        let offset = block * BLOCK;
        let length = (size - offset).min(BLOCK) as usize;
        reader.read_back(&mut buffer, offset, length)?;
        hash.update(buffer.get(length));
    }
    Ok(Digest(*hash.finalize().as_bytes()))
}

fn same(one: &File, two: &File) -> bool {
    let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino())).ok();
    identity(one).is_some_and(|found| Some(found) == identity(two))
}

/// Whether the page cache holds all of this range: cachestat(2), Linux 6.5; before it, no.
fn is_cached(file: &File, offset: u64, length: usize) -> bool {
    use std::os::fd::AsRawFd;
    const CACHESTAT: libc::c_long = 451;
    let range = [offset, length as u64];
    let mut found = [0u64; 5];
    // SAFETY: both arrays have the layout of the kernel's structures, two and five 64-bit numbers.
    let answer = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0) };
    answer == 0 && found[0].saturating_mul(4096) >= length as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_contract::cold::BLOCK;

    #[test]
    fn both_ways_of_reading_give_the_same() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("file");
        let content: Vec<u8> = (0..BLOCK as usize + 777)
            .map(|index| (index % 251) as u8)
            .collect();
        fs::write(&path, &content).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        let reader = Reader::new(file, &path);
        let mut buffer = Aligned::default();
        for _ in 0..2 {
            for (offset, length) in [(0, BLOCK as usize), (BLOCK, 777)] {
                let expected = &content[offset as usize..offset as usize + length];
                reader.read(&mut buffer, offset, length).unwrap();
                assert_eq!(buffer.get(length), expected);
                reader.read_back(&mut buffer, offset, length).unwrap();
                assert_eq!(buffer.get(length), expected);
            }
            // The second time from the cache.
            fs::read(&path).unwrap();
        }
        assert!(reader.read(&mut buffer, BLOCK, 778).is_err());
    }

    #[test]
    fn a_writer_is_noticed_and_kept_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        fs::write(&path, b"x").unwrap();
        let item = Item {
            path: path.clone(),
            part: Part::Other,
        };
        let writer = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let writes = lock(libc::F_RDLCK, 101, 1);
        fcntl(&writer, FcntlArg::F_OFD_SETLK(&writes)).unwrap();
        let refused = open(std::slice::from_ref(&item)).unwrap_err().to_string();
        assert!(refused.contains("open for writing"), "{refused}");
        drop(writer);
        let served = open(std::slice::from_ref(&item)).unwrap();
        // As QEMU would: "nobody else may write" is somebody's word.
        let late = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        assert!(is_locked(&late, 201..202));
        drop(served);
        assert!(!is_locked(&late, 201..202));
    }

    #[test]
    fn what_cannot_be_looked_at_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("image"), b"x").unwrap();
        std::os::unix::fs::symlink(at("loop"), at("loop")).unwrap();
        assert!(!is_held(&at("image")) && !is_held(&at("none")));
        assert!(is_held(&at("loop")));
    }

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
