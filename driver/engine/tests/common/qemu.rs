//! A real QEMU with a tiny guest, set up as libvirt would.

use std::io::Read;
use std::process::{Command, Stdio};

use ferry_engine::memory::{PageSet, WriteTracker, PAGE};
use ferry_engine::qemu::{discover, inject, tracked_ranges, Monitor, Process, RamBlock};

use super::{await_some, deadline};

/// ```text
///        cli                     fa
/// again: mov ax, 0x1000          b8 00 10
/// page:  mov ds, ax              8e d8
///        inc byte [0]            fe 06 00 00
///        add ax, 0x100           05 00 01
///        cmp ax, 0x9000          3d 00 90
///        jne page                75 f2
///        jmp again               eb ed
/// ```
pub const WRITER: &[u8] = &[
    0xfa, 0xb8, 0x00, 0x10, 0x8e, 0xd8, 0xfe, 0x06, 0x00, 0x00, 0x05, 0x00, 0x01, 0x3d, 0x00, 0x90, 0x75,
    0xf2, 0xeb, 0xed,
];
/// The pages it writes.
pub const WRITTEN: std::ops::Range<u64> = 0x10..0x90;

/// Size of the guest's RAM, bytes.
pub const SIZE: u64 = 64 << 20;

pub struct Qemu {
    pub child: std::process::Child,
    pub directory: tempfile::TempDir,
}

impl Qemu {
    /// Starts a stopped QEMU with the sandbox as libvirt sets it; `None`, and a line to say so, where it does not run.
    /// In `arguments`, DIR is a directory on tmpfs that goes with the guest.
    pub fn start(accelerator: &str, arguments: &[&str]) -> Option<Qemu> {
        Qemu::boot(accelerator, WRITER, arguments)
    }

    /// As `start`, with a boot sector of your own.
    pub fn boot(accelerator: &str, sector: &[u8], arguments: &[&str]) -> Option<Qemu> {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory on tmpfs");
        let path = |name: &str| {
            directory
                .path()
                .join(name)
                .to_str()
                .expect("a UTF-8 path")
                .to_owned()
        };
        let mut disk = vec![0; 512];
        disk[..sector.len()].copy_from_slice(sector);
        disk[510..].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(path("disk"), disk).expect("a boot disk");
        let substitute = |argument: &&str| argument.replace("DIR", directory.path().to_str().expect("UTF-8"));
        let started = Command::new("qemu-system-x86_64")
            .args([
                "-S",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-accel",
                accelerator,
            ])
            .args([
                "-sandbox",
                "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            ])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))])
            .args([
                "-drive",
                &format!("file={},format=raw,if=none,id=boot", path("disk")),
            ])
            .args(["-device", "ide-hd,drive=boot,bootindex=0"])
            .args(arguments.iter().map(substitute))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                println!("SKIPPED: qemu-system-x86_64 cannot be started: {error}");
                return None;
            }
        };
        let socket = directory.path().join("qmp");
        let listening = await_some("QEMU's monitor", || {
            match child.try_wait().expect("QEMU's status") {
                Some(_) => Some(false),
                None => std::os::unix::net::UnixStream::connect(&socket)
                    .is_ok()
                    .then_some(true),
            }
        });
        if !listening {
            let mut message = String::new();
            child
                .stderr
                .take()
                .expect("piped")
                .read_to_string(&mut message)
                .expect("QEMU's message");
            assert_eq!(accelerator, "kvm", "QEMU did not start: {message}");
            println!("SKIPPED: no KVM here: {message}");
            return None;
        }
        Some(Qemu { child, directory })
    }

    /// A guest whose RAM is a shared file on tmpfs.
    pub fn with_shared_file(accelerator: &str) -> Option<Qemu> {
        Qemu::start(accelerator, &SHARED_FILE)
    }

    pub fn monitor(&self) -> Monitor {
        Monitor::connect(&self.directory.path().join("qmp"), deadline()).expect("QEMU's monitor")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub const SHARED_FILE: [&str; 6] = [
    "-object",
    "memory-backend-file,id=pc.ram,size=64M,mem-path=DIR/ram,share=on",
    "-machine",
    "pc,memory-backend=pc.ram",
    "-m",
    "64M",
];

pub fn find_ram(monitor: &mut Monitor) -> (Process, Vec<RamBlock>) {
    let process = Process::open(monitor.peer_pid().expect("the peer")).expect("QEMU");
    let blocks = discover(monitor, &process, deadline()).expect("an eligible guest");
    (process, blocks)
}

pub fn track(process: &Process, blocks: &[RamBlock]) -> WriteTracker {
    let uffd = inject::userfaultfd(process, deadline()).expect("injection");
    let mut tracker = WriteTracker::new(uffd, process, tracked_ranges(blocks)).expect("registration");
    tracker.arm().expect("arming");
    tracker
}

pub fn scan(tracker: &mut WriteTracker) -> PageSet {
    let mut sets = [PageSet::new(SIZE)];
    tracker.scan_into(&mut sets).expect("a scan");
    let [set] = sets;
    set
}

pub fn holds_all_written(set: &PageSet) -> bool {
    WRITTEN.into_iter().all(|page| set.contains(page * PAGE))
}
