//! The kernel's edge: every `mmap`, `ioctl` and `fallocate` of this room, behind safe functions.
//!
//! References: `include/uapi/linux/userfaultfd.h` and `include/uapi/linux/fs.h` (PAGEMAP_SCAN), Linux 6.12.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// `_IOC` of `asm-generic/ioctl.h`, which x86, Arm and RISC-V share.
const fn ioc<T>(direction: u64, group: u8, number: u8) -> u64 {
    direction << 30 | (size_of::<T>() as u64) << 16 | (group as u64) << 8 | number as u64
}
const READ: u64 = 2;
const READ_WRITE: u64 = 3;

const UFFD: u8 = 0xaa;
const UFFDIO_API: u64 = ioc::<UffdApi>(READ_WRITE, UFFD, 0x3f);
const UFFDIO_REGISTER: u64 = ioc::<UffdRegister>(READ_WRITE, UFFD, 0x00);
const UFFDIO_UNREGISTER: u64 = ioc::<UffdRange>(READ, UFFD, 0x01);
const UFFDIO_CONTINUE: u64 = ioc::<UffdContinue>(READ_WRITE, UFFD, 0x07);
const UFFDIO_POISON: u64 = ioc::<UffdPoison>(READ_WRITE, UFFD, 0x08);
const UFFDIO_WRITEPROTECT: u64 = ioc::<UffdWriteProtect>(READ_WRITE, UFFD, 0x06);

/// `userfaultfd(2)` flag: faults of user mode only; what an unprivileged process may ask for.
pub const UFFD_USER_MODE_ONLY: libc::c_int = 1;

const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
/// What write tracking needs of the kernel, all of it there since Linux 6.7.
pub const TRACKING_FEATURES: u64 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC;

/// What [`uffd_poison`] needs, there since Linux 6.6.
pub const POISON_FEATURE: u64 = 1 << 14;

/// What looking for huge pages needs, there since Linux 5.13.
pub const PRESENCE_FEATURES: u64 = 1 << 9; // MINOR_HUGETLBFS

/// `UFFDIO_REGISTER` for write protection.
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// `UFFDIO_REGISTER` for pages that are in a file but not in a mapping of it.
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const PAGEMAP_SCAN: u64 = ioc::<PagemapScan>(READ_WRITE, b'f', 16);
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdContinue {
    range: UffdRange,
    mode: u64,
    mapped: i64,
}

#[repr(C)]
struct UffdPoison {
    range: UffdRange,
    mode: u64,
    updated: i64,
}

#[repr(C)]
struct UffdRegister {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdWriteProtect {
    range: UffdRange,
    mode: u64,
}

#[repr(C)]
struct PagemapScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: addresses that share their categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `PAGE_IS_*`; always `PAGE_IS_WRITTEN` here.
    pub categories: u64,
}

fn ioctl<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<usize> {
    // SAFETY: `argument` is a live, exclusively borrowed `T`, and every request above encodes the size of the
    // structure it is paired with in this file, so the kernel reads and writes inside it. Requests that hold
    // pointers (PAGEMAP_SCAN) get them from live borrows in their own function.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Creates a userfaultfd for *this* process (the probe's; a guest's is made inside QEMU).
pub fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: userfaultfd(2) takes a flags word and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = i32::try_from(fd)
        .ok()
        .filter(|&fd| fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// UFFDIO_API: asks for `features`; EINVAL where the kernel lacks one of them.
pub fn uffd_api(uffd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    ioctl(
        uffd,
        UFFDIO_API,
        &mut UffdApi {
            api: 0xaa,
            features,
            ioctls: 0,
        },
    )
    .map(drop)
}

/// UFFDIO_REGISTER of `addresses` in the descriptor's address space, in one of the modes above.
pub fn uffd_register(uffd: BorrowedFd<'_>, addresses: Range<u64>, mode: u64) -> io::Result<()> {
    let mut register = UffdRegister {
        range: addresses.into(),
        mode,
        ioctls: 0,
    };
    ioctl(uffd, UFFDIO_REGISTER, &mut register).map(drop)
}

/// UFFDIO_CONTINUE: whether the file has the one page that belongs at `addresses`, a mapping of it; nothing is made
/// where it has not (`hugetlb_mfill_atomic_pte`: EFAULT; EEXIST where it is mapped already).
pub fn uffd_continue(uffd: BorrowedFd<'_>, addresses: Range<u64>) -> io::Result<bool> {
    loop {
        let mut wanted = UffdContinue {
            range: addresses.clone().into(),
            mode: 0,
            mapped: 0,
        };
        match ioctl(uffd, UFFDIO_CONTINUE, &mut wanted) {
            Ok(_) => return Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST) => return Ok(true),
                Some(libc::EFAULT) => return Ok(false),
                Some(libc::EAGAIN | libc::EINTR) => {}
                _ => return Err(error),
            },
        }
    }
}

/// UFFDIO_POISON: whoever touches `addresses`, of which no page is mapped, gets SIGBUS. It takes no memory.
pub fn uffd_poison(uffd: BorrowedFd<'_>, addresses: Range<u64>) -> io::Result<()> {
    let mut poison = UffdPoison {
        range: addresses.into(),
        mode: 0,
        updated: 0,
    };
    ioctl(uffd, UFFDIO_POISON, &mut poison).map(drop)
}

/// UFFDIO_UNREGISTER.
pub fn uffd_unregister(uffd: BorrowedFd<'_>, addresses: Range<u64>) -> io::Result<()> {
    ioctl(uffd, UFFDIO_UNREGISTER, &mut UffdRange::from(addresses)).map(drop)
}

/// UFFDIO_WRITEPROTECT: protects `addresses`, splitting huge mappings of a file into base pages.
pub fn uffd_write_protect(uffd: BorrowedFd<'_>, addresses: Range<u64>) -> io::Result<()> {
    let mut protect = UffdWriteProtect {
        range: addresses.into(),
        mode: UFFDIO_WRITEPROTECT_MODE_WP,
    };
    ioctl(uffd, UFFDIO_WRITEPROTECT, &mut protect).map(drop)
}

impl From<Range<u64>> for UffdRange {
    fn from(addresses: Range<u64>) -> Self {
        UffdRange {
            start: addresses.start,
            len: addresses.end - addresses.start,
        }
    }
}

/// PAGEMAP_SCAN: reports the pages of `addresses` written since they were last protected, and protects them
/// again, atomically. Returns how many entries of `found` were filled and where the walk ended, which is
/// before the end of `addresses` only when `found` is full.
///
/// The masks are exactly `PAGE_IS_WRITTEN`: with any other, the kernel's general path is taken, which does not
/// count a zapped page as written (`fs/proc/task_mmu.c`, `pagemap_scan_pmd_entry`).
pub fn scan_written(
    pagemap: BorrowedFd<'_>,
    addresses: Range<u64>,
    found: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut scan = PagemapScan {
        size: size_of::<PagemapScan>() as u64,
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start: addresses.start,
        end: addresses.end,
        walk_end: 0,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_WRITTEN,
        category_anyof_mask: 0,
        return_mask: PAGE_IS_WRITTEN,
    };
    let filled = ioctl(pagemap, PAGEMAP_SCAN, &mut scan)?;
    Ok((filled.min(found.len()), scan.walk_end))
}

/// `fallocate(PUNCH_HOLE | KEEP_SIZE)`: gives the pages of `range` back; they read as zeros afterwards.
pub fn punch_hole(file: &File, range: Range<u64>) -> io::Result<()> {
    fallocate(
        file,
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        range,
    )
}

/// `fallocate(KEEP_SIZE)`: makes pages for `range`, so that a store into a mapping of it cannot fail.
pub fn allocate(file: &File, range: Range<u64>) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_KEEP_SIZE, range)
}

fn fallocate(file: &File, mode: libc::c_int, range: Range<u64>) -> io::Result<()> {
    let (offset, len) = (
        range.start as libc::off_t,
        (range.end - range.start) as libc::off_t,
    );
    loop {
        // SAFETY: a plain system call on a descriptor we own; it takes no pointer.
        match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
            0 => return Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        }
    }
}

/// `lseek(SEEK_DATA or SEEK_HOLE)`; `None` where the kernel says ENXIO: no data at or after `offset`.
pub fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: a plain system call on a descriptor we own; it takes no pointer. Nothing in this room reads or
    // writes by the file position it moves.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// A shared, writable mapping of a file, only ever touched by copies in and out: no reference to the bytes is
/// handed out, since other processes change them at any time.
#[derive(Debug)]
pub struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is not tied to a thread, and every access is a raw copy that tolerates other writers.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared reference only permits copies through raw pointers.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `range` of `file`, readable and writable, shared. The offset is a multiple of the file's page.
    pub fn new(file: &File, range: Range<u64>) -> io::Result<Self> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(range.start).map_err(io::Error::other)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: asks for a new mapping at an address of the kernel's choice; no existing memory is affected.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                // On hugetlbfs, a mapping would else claim pages for the holes of the file.
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(address.cast::<u8>()) {
            Some(address) if address.as_ptr().cast() != libc::MAP_FAILED => Ok(Mapping { address, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Where the mapping lies in this process.
    pub fn addresses(&self) -> Range<u64> {
        let start = self.address.as_ptr() as u64;
        start..start + self.len as u64
    }

    /// Copies `bytes` into the mapping at `offset`.
    ///
    /// The pages must exist in the file ([`allocate`]): a store to one the kernel cannot provide is SIGBUS.
    ///
    /// # Panics
    /// When the copy would leave the mapping.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let end = offset.checked_add(bytes.len());
        assert!(
            end.is_some_and(|end| end <= self.len),
            "a copy past the end of a mapping"
        );
        // SAFETY: destination range checked to lie in the live mapping; `bytes` is a private buffer, so the two
        // do not overlap; racing writers can only mix bytes of plain data, no Rust reference sees them.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.as_ptr().add(offset), bytes.len());
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range mmap gave us, unmapped once; no reference into it was ever handed out.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}
