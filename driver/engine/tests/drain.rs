//! Scan, then drain, then copy: why the drain is not optional.
//!
//! The guest reads 32 KiB from a disk with cache=none, a loop device slowed down to a second for that. QEMU's worker
//! pins the pages and waits; the scan protects them; the kernel then writes to them, and no later scan tells.

mod common;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use common::qemu::{find_ram, scan, track, Qemu, SHARED_FILE, SIZE};
use common::{await_that, deadline};
use ferry_engine::memory::{PageSet, RamFile};
use serde_json::json;

/// ```text
/// 00:       cli                  fa
/// 01:       xor ax, ax           31 c0
/// 03:       mov ds, ax           8e d8
/// 05:       mov ss, ax           8e d0
/// 07:       mov sp, 0x7c00       bc 00 7c
/// 0a:       sti                  fb
/// 0b:       mov si, packet       be 22 7c
/// 0e:       mov ah, 0x42         b4 42     read by packet
/// 10:       mov dl, 0x81         b2 81     the second disk
/// 12:       int 0x13             cd 13
/// 14:       setc al              0f 92 c0
/// 17:       add al, 2            04 02     2: done, 3: failed
/// 19:       mov [0x500], al      a2 00 05
/// 1c: halt: hlt                  f4
/// 1d:       jmp halt             eb fd
/// 22: packet: 16 bytes, 64 sectors to 2000:0000 from sector 0
/// ```
const READER: &[u8] = &[
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0xbe, 0x22, 0x7c, 0xb4, 0x42, 0xb2,
    0x81, 0xcd, 0x13, 0x0f, 0x92, 0xc0, 0x04, 0x02, 0xa2, 0x00, 0x05, 0xf4, 0xeb, 0xfd, 0x90, 0x90, 0x90,
    0x10, 0x00, 0x40, 0x00, 0x00, 0x00, 0x00, 0x20, 0, 0, 0, 0, 0, 0, 0, 0,
];
const RESULT: u64 = 0x500;
const BUFFER: std::ops::Range<u64> = 0x20000..0x28000;

/// A disk of 1 MiB, full of ones, behind a loop device, and a cgroup that reads it at 32 KiB/s.
struct SlowDisk {
    device: String,
    group: PathBuf,
    _image: tempfile::NamedTempFile,
}

impl SlowDisk {
    /// `None`, and a line to say so, where the machine has no loop devices or no block I/O throttling.
    fn new() -> Option<SlowDisk> {
        let skip = |why: &str| println!("SKIPPED: no slow disk here: {why}");
        let mut image = tempfile::NamedTempFile::new_in("/var/tmp").expect("an image");
        image.write_all(&[1; 1 << 20]).expect("an image");
        image.as_file().sync_all().expect("an image");
        let set_up = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .arg(image.path())
            .output();
        let device = match set_up {
            Ok(output) if output.status.success() => {
                String::from_utf8_lossy(&output.stdout).trim().to_owned()
            }
            other => {
                skip(&format!("losetup: {other:?}"));
                return None;
            }
        };
        let group = tempfile::Builder::new()
            .prefix("ferry-test-")
            .tempdir_in("/sys/fs/cgroup/blkio");
        let Ok(group) = group.map(tempfile::TempDir::keep) else {
            skip("no cgroup v1 blkio hierarchy");
            let _ = Command::new("losetup").args(["--detach", &device]).status();
            return None;
        };
        let disk = SlowDisk {
            device,
            group,
            _image: image,
        };
        let name = disk.device.trim_start_matches("/dev/");
        let number = fs::read_to_string(format!("/sys/block/{name}/dev")).expect("the device's number");
        let rule = format!("{} 32768", number.trim());
        fs::write(disk.group.join("blkio.throttle.read_bps_device"), rule).expect("a throttle");
        Some(disk)
    }

    fn slow_down(&self, qemu: &Qemu) {
        fs::write(self.group.join("cgroup.procs"), qemu.child.id().to_string()).expect("joining the cgroup");
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
        let _ = fs::remove_dir(&self.group);
    }
}

/// Whether a thread of QEMU waits for the disk, uninterruptibly, in a read.
fn is_reading(qemu: &Qemu) -> bool {
    let threads = fs::read_dir(format!("/proc/{}/task", qemu.child.id())).expect("QEMU's threads");
    threads.filter_map(Result::ok).any(|thread| {
        let read = |name| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let call: i64 = read("syscall")
            .split(' ')
            .next()
            .and_then(|word| word.parse().ok())
            .unwrap_or(-1);
        let waits = read("stat")
            .rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('D'));
        waits && matches!(call, libc::SYS_pread64 | libc::SYS_preadv | libc::SYS_preadv2)
    })
}

/// Copies RAM by rounds while the read is in flight; whether the copy of the buffer is right in the end.
fn copies_the_buffer(drain: bool) -> Option<bool> {
    let disk = SlowDisk::new()?;
    let drive = format!(
        "file={},format=raw,if=none,id=slow,cache=none,aio=threads",
        disk.device
    );
    let more = [
        "-drive",
        &drive,
        "-device",
        "virtio-blk-pci,drive=slow,bootindex=1",
    ];
    let qemu = Qemu::boot("tcg", READER, &[&SHARED_FILE[..], &more].concat())?;
    disk.slow_down(&qemu);
    let mut monitor = qemu.monitor();
    let (process, blocks) = find_ram(&mut monitor);
    let ram: &RamFile = &blocks[0].file;
    let mut tracker = track(&process, &blocks);
    let mut copy = vec![0; SIZE as usize];
    let fetch = |set: &PageSet, copy: &mut [u8]| {
        for run in set.runs() {
            ram.read_at(run.start, &mut copy[run.start as usize..run.end as usize])
                .expect("reading RAM");
        }
    };
    fetch(&PageSet::full(SIZE), &mut copy);
    let buffer = || {
        let mut bytes = vec![0; (BUFFER.end - BUFFER.start) as usize];
        ram.read_at(BUFFER.start, &mut bytes).expect("reading RAM");
        bytes
    };

    monitor.execute("cont", json!({}), deadline()).expect("cont");
    await_that("the guest's read", || is_reading(&qemu));
    let dirty = scan(&mut tracker);
    assert!(is_reading(&qemu), "the read is in flight during the scan");
    assert!(
        dirty.contains(BUFFER.start),
        "pinning the pages counted as a write, before the scan"
    );
    assert!(buffer().iter().all(|&byte| byte == 0), "nothing has arrived yet");
    if drain {
        monitor.drain(deadline(), || false).expect("a drain");
        assert!(!is_reading(&qemu));
    }
    fetch(&dirty, &mut copy);

    let result = || {
        let mut byte = [0];
        ram.read_at(RESULT, &mut byte).expect("reading RAM");
        byte[0]
    };
    await_that("the guest to be told", || matches!(result(), 2 | 3));
    assert_eq!(result(), 2, "the guest's read succeeded");
    monitor.execute("stop", json!({}), deadline()).expect("stop");
    fetch(&scan(&mut tracker), &mut copy);
    assert!(
        buffer().iter().all(|&byte| byte == 1),
        "the disk's contents have arrived"
    );
    Some(copy[BUFFER.start as usize..BUFFER.end as usize] == buffer())
}

#[test]
fn with_the_drain_direct_io_in_flight_is_copied() {
    if let Some(right) = copies_the_buffer(true) {
        assert!(right, "a write by direct I/O is lost in spite of the drain");
    }
}

/// Not a wish but a fact to build on. When it fails, the kernel has learned to track pinned pages; the drain may go.
#[test]
fn without_the_drain_direct_io_in_flight_is_lost() {
    if let Some(right) = copies_the_buffer(false) {
        assert!(!right, "the hazard is gone");
    }
}
