//! Child processes for the tests: forked, so that the thread under test is a main thread, and speaking system
//! calls only, as must be after a fork in a process with threads.

#![allow(dead_code, reason = "each test file uses its own part of this")]

pub mod cold;
pub mod files;
pub mod guest;
pub mod qemu;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ferry_engine::memory::{RamFile, TrackedRange, PAGE};
use ferry_engine::qemu::Process;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::{fork, ForkResult, Pid};

/// Long enough for a loaded machine; nothing waits for it to pass.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// Waits until `condition` gives something, looking again at short intervals.
pub fn await_some<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = deadline();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn await_that(what: &str, mut condition: impl FnMut() -> bool) {
    await_some(what, || condition().then_some(()));
}

/// A child process, killed and reaped at the end.
pub struct Child {
    pub process: Process,
    pub pipe: UnixStream,
}

impl Child {
    /// Forks a child that runs `body` with its end of a socket pair, then exits.
    ///
    /// `body` must stay with system calls and plain memory: no allocation, no locks.
    pub fn fork(body: impl FnOnce(&mut UnixStream)) -> Child {
        let (pipe, mut childs) = UnixStream::pair().expect("a socket pair");
        // SAFETY: the child runs `body` only, which keeps to async-signal-safe calls, and leaves by _exit.
        match unsafe { fork() }.expect("fork") {
            ForkResult::Child => {
                // SAFETY: plain system calls on numbers.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::close(pipe.as_raw_fd());
                }
                body(&mut childs);
                // SAFETY: ends the process without running anything of the parent's.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                pipe.set_read_timeout(Some(PATIENCE)).expect("a time limit");
                Child {
                    process: Process::open(child.as_raw()).expect("the child"),
                    pipe,
                }
            }
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.process.pid())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("kill");
    }

    /// Reads 16 bytes the child wrote with [`report`].
    pub fn answer(&mut self) -> (i64, i64) {
        let mut bytes = [0; 16];
        self.pipe.read_exact(&mut bytes).expect("the child's answer");
        let word = |at: usize| i64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        (word(0), word(8))
    }

    /// Sends a command to [`serve`] and waits until it is done.
    pub fn order(&mut self, order: Order) -> (i64, i64) {
        self.send(order);
        self.answer()
    }

    pub fn send(&mut self, Order(code, page, value): Order) {
        let mut bytes = [0; 24];
        for (slot, word) in bytes.chunks_exact_mut(8).zip([code, page, value]) {
            slot.copy_from_slice(&word.to_ne_bytes());
        }
        self.pipe.write_all(&bytes).expect("an order to the child");
    }

    /// Number of the system call the main thread is blocked in.
    pub fn blocked_in(&self) -> Option<i64> {
        let text = std::fs::read_to_string(self.process.proc_path("syscall")).ok()?;
        text.split(' ').next()?.parse().ok()
    }

    /// State letter of `/proc/PID/stat`.
    pub fn state(&self) -> char {
        let stat = std::fs::read_to_string(self.process.proc_path("stat")).expect("stat");
        stat.rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next())
            .expect("a state")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.pid(), Signal::SIGKILL);
        let _ = waitpid(self.pid(), None);
    }
}

/// Tells the parent two numbers.
pub fn report(pipe: &mut UnixStream, a: i64, b: i64) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&a.to_ne_bytes());
    bytes[8..].copy_from_slice(&b.to_ne_bytes());
    let _ = pipe.write_all(&bytes);
}

/// What a child that plays QEMU can be told to do with its RAM: code, page, value.
pub struct Order(u64, u64, u64);

impl Order {
    /// Stores the byte at the start of the page.
    pub fn store(page: u64, value: u8) -> Order {
        Order(0, page, value.into())
    }
    /// read(2)s a page of /dev/zero, or of a file of ones, into the page.
    pub fn read_into(page: u64) -> Order {
        Order(1, page, 0)
    }
    /// Loads from the page.
    pub fn load(page: u64) -> Order {
        Order(2, page, 0)
    }
    /// Gives the pages back as QEMU's ram_block_discard_range does: fallocate, then madvise.
    pub fn discard(page: u64, count: u64) -> Order {
        Order(3, page, count)
    }
    /// Writes to random pages, and discards one now and then, until the stop flag is set.
    pub fn race(seed: u64) -> Order {
        Order(4, seed, 0)
    }
    /// Unmaps the page.
    pub fn unmap(page: u64) -> Order {
        Order(5, page, 0)
    }
}

/// A RAM file and a place where forked children find it mapped.
pub struct Ram {
    pub file: RamFile,
    pub raw: File,
    pub address: *mut u8,
    pub len: u64,
    path: PathBuf,
    /// A page shared with children, outside of RAM: word 0 is the stop flag, word 1 counts a race's rounds.
    flags: *mut u64,
}

impl Ram {
    /// A fresh file of `pages` pages in `directory`.
    pub fn new(directory: &str, pages: u64) -> Ram {
        let file = tempfile::Builder::new()
            .prefix("ferry-test-")
            .tempfile_in(directory)
            .expect("a RAM file");
        let path = file.path().to_owned();
        let raw = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .expect("the RAM file");
        raw.set_len(pages * PAGE).expect("room");
        Ram::map(raw, path, pages * PAGE)
    }

    pub fn map(raw: File, path: PathBuf, len: u64) -> Ram {
        let file =
            RamFile::from_file(raw.try_clone().expect("a copy"), path.clone(), 0..len).expect("a RAM file");
        let map = |len, flags, fd| {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    flags,
                    fd,
                    0,
                )
            };
            assert_ne!(address, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            address
        };
        let address = map(len as usize, libc::MAP_SHARED, raw.as_raw_fd()).cast();
        let flags = map(PAGE as usize, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).cast();
        Ram {
            file,
            raw,
            address,
            len,
            path,
            flags,
        }
    }

    /// A child that has this RAM mapped and obeys [`Order`]s.
    pub fn serve(&self) -> Child {
        let random = File::open("/dev/urandom").expect("/dev/urandom");
        let (source, ram) = (
            random.as_raw_fd(),
            Shared {
                address: self.address,
                len: self.len,
                flags: self.flags,
            },
        );
        let fd = self.raw.as_raw_fd();
        Child::fork(move |pipe| serve(pipe, &ram, fd, source))
    }

    pub fn range(&self) -> TrackedRange {
        TrackedRange {
            block: 0,
            address: self.address as u64,
            len: self.len,
            offset: 0,
            file_offset: 0,
            page: self.file.backing().page(),
            file: self.file.identity().expect("fstat"),
        }
    }

    pub fn set_stop_flag(&self, stop: bool) {
        // SAFETY: our own page; volatile, as a child polls it.
        unsafe { self.flags.write_volatile(stop.into()) };
    }

    /// How many writes a race has made so far.
    pub fn race_progress(&self) -> u64 {
        // SAFETY: our own page; volatile, as a child writes it.
        unsafe { self.flags.add(1).read_volatile() }
    }

    pub fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_at(0, &mut bytes).expect("reading RAM");
        bytes
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the ranges mapped in `map`; the tests keep no reference into them.
        unsafe {
            libc::munmap(self.address.cast(), self.len as usize);
            libc::munmap(self.flags.cast(), PAGE as usize);
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Shared {
    address: *mut u8,
    len: u64,
    flags: *mut u64,
}

fn serve(pipe: &mut UnixStream, ram: &Shared, fd: i32, source: i32) {
    let at = |page: u64| ram.address.wrapping_add((page * PAGE) as usize);
    let discard = |page: u64, count: u64| {
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: gives back pages of a mapping that is only accessed through raw pointers.
        unsafe {
            i64::from(libc::fallocate(
                fd,
                flags,
                (page * PAGE) as i64,
                (count * PAGE) as i64,
            )) + i64::from(libc::madvise(
                at(page).cast(),
                (count * PAGE) as usize,
                libc::MADV_DONTNEED,
            ))
        }
    };
    let mut order = [0; 24];
    while pipe.read_exact(&mut order).is_ok() {
        let word = |index: usize| {
            let bytes = [0, 1, 2, 3, 4, 5, 6, 7].map(|byte| order[index * 8 + byte]);
            u64::from_ne_bytes(bytes)
        };
        let (page, value) = (word(1), word(2));
        // SAFETY: pages come from tests and lie in the mapping, which nobody has a reference into.
        let answer = unsafe {
            match word(0) {
                0 => {
                    at(page).write_volatile(value as u8);
                    0
                }
                1 => libc::read(source, at(page).cast(), PAGE as usize) as i64,
                2 => i64::from(at(page).read_volatile()),
                3 => discard(page, value),
                4 => race(ram, page, discard),
                _ => i64::from(libc::munmap(at(page).cast(), PAGE as usize)),
            }
        };
        report(pipe, answer, 0);
    }
}

/// Writes until told to stop: mostly one byte of a random page, now and then a run, now and then a discard.
///
/// # Safety
/// `ram` is mapped and nobody has references into it.
unsafe fn race(ram: &Shared, seed: u64, discard: impl Fn(u64, u64) -> i64) -> i64 {
    let pages = ram.len / PAGE;
    let mut random = seed;
    let mut next = |limit: u64| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) % limit
    };
    let mut round = 0;
    // SAFETY: see above; page numbers are taken modulo the size.
    unsafe {
        while ram.flags.read_volatile() == 0 {
            round += 1;
            match next(100) {
                0 => {
                    discard(next(pages), 1);
                }
                1 => {
                    let start = next(pages);
                    for page in start..(start + 40).min(pages) {
                        ram.address
                            .add((page * PAGE + next(PAGE)) as usize)
                            .write_volatile(round as u8);
                    }
                }
                _ => ram
                    .address
                    .add((next(pages) * PAGE + next(PAGE)) as usize)
                    .write_volatile(round as u8),
            }
            ram.flags.add(1).write_volatile(round);
        }
    }
    round as i64
}
