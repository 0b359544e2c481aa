//! A disk that answers late: a FUSE file system of one file, whose reads arrive in the reader's memory long after they began.
//!
//! ```text
//!   QEMU ── read(O_DIRECT) ──> kernel: pins the guest's pages ──> this server: sleeps, then reads the image, then answers
//!                              the answer is copied into the pinned pages: no page fault, nothing that a tracker sees
//! ```
//!
//! That is what a congested storage network does to a guest, only slower: for as long as a read sleeps, a page of the guest's
//! is about to change behind everybody's back. Writes, opens and all the rest are answered at once.
//!
//! Usage: `slow_disk IMAGE DIRECTORY MIN_MS MAX_MS`. Shows IMAGE in DIRECTORY under its own name, until it is killed. Each
//! read takes between MIN_MS and MAX_MS. Served on several hosts at once, the image is shared storage.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::os::unix::fs::{fchown, FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{bail, Context, Result};
use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    SessionACL, TimeOrNow, WriteFlags,
};

const IMAGE: INodeNo = INodeNo(2);
/// Another host may change owner and mode at any time.
const UNCACHED: Duration = Duration::ZERO;

struct SlowDisk {
    name: OsString,
    image: Arc<File>,
    delay: std::ops::RangeInclusive<u64>,
    reads: AtomicU64,
}

impl SlowDisk {
    /// How long the next read takes, in ms: spread evenly over the range by the golden ratio.
    fn next_delay(&self) -> Duration {
        let number = self.reads.fetch_add(1, Ordering::Relaxed);
        let width = self.delay.end() - self.delay.start() + 1;
        let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        Duration::from_millis(self.delay.start() + spread % width)
    }

    fn attributes(&self) -> std::io::Result<FileAttr> {
        let metadata = self.image.metadata()?;
        Ok(FileAttr {
            size: metadata.len(),
            blocks: metadata.blocks(),
            kind: FileType::RegularFile,
            perm: (metadata.mode() & 0o7777) as u16,
            uid: metadata.uid(),
            gid: metadata.gid(),
            ..directory(IMAGE)
        })
    }
}

fn directory(ino: INodeNo) -> FileAttr {
    FileAttr {
        ino,
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::Directory,
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for SlowDisk {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes() {
            Ok(attributes) if name == self.name => reply.entry(&UNCACHED, &attributes, Generation(0)),
            Ok(_) => reply.error(Errno::ENOENT),
            Err(error) => reply.error(error.into()),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes() {
            Ok(attributes) if ino == IMAGE => reply.attr(&UNCACHED, &attributes),
            Ok(_) => reply.attr(&UNCACHED, &directory(ino)),
            Err(error) => reply.error(error.into()),
        }
    }

    /// libvirt gives the image to QEMU's user.
    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if ino != IMAGE || size.is_some() {
            return reply.error(Errno::EPERM);
        }
        let owned = fchown(&*self.image, uid, gid);
        let changed = owned.and_then(|()| match mode {
            Some(mode) => self.image.set_permissions(Permissions::from_mode(mode)),
            None => Ok(()),
        });
        match changed.and_then(|()| self.attributes()) {
            Ok(attributes) => reply.attr(&UNCACHED, &attributes),
            Err(error) => reply.error(error.into()),
        }
    }

    /// Past the page cache, whether the opener asks for it or not: this host must see what another one wrote.
    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (image, delay) = (Arc::clone(&self.image), self.next_delay());
        thread::spawn(move || {
            thread::sleep(delay);
            let mut data = vec![0; size as usize];
            match read_up_to(&image, &mut data, offset) {
                Ok(count) => reply.data(&data[..count]),
                Err(error) => reply.error(error.into()),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.image.write_all_at(data, offset) {
            // A write fits a request of the kernel's, thus 32 bits.
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<usize> {
    let mut total = 0;
    while !buffer.is_empty() {
        match file.read_at(buffer, offset)? {
            0 => break,
            count => {
                total += count;
                offset += count as u64;
                buffer = &mut buffer[count..];
            }
        }
    }
    Ok(total)
}

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [image, mount_point, min, max] = arguments.as_slice() else {
        bail!("usage: slow_disk IMAGE DIRECTORY MIN_MS MAX_MS");
    };
    let number = |text: &OsStr| -> Result<u64> { Ok(text.to_string_lossy().parse()?) };
    let delay = number(min)?..=number(max)?;
    if delay.is_empty() {
        bail!("MIN_MS must not be greater than MAX_MS");
    }
    let image = Path::new(image);
    let file = File::options().read(true).write(true).open(image);
    let disk = SlowDisk {
        name: image.file_name().context("IMAGE has no name")?.to_owned(),
        image: Arc::new(file.with_context(|| image.display().to_string())?),
        delay,
        reads: AtomicU64::new(0),
    };
    let mut config = Config::default();
    // QEMU runs as another user.
    config.acl = SessionACL::All;
    fuser::mount(disk, mount_point, &config).context("cannot serve the image")
}
