//! Write tracking from outside, on a child process that plays QEMU.

mod common;

use std::process::Command;

use common::{await_that, deadline, Child, Order, Ram};
use ferry_engine::memory::{PageSet, TrackError, WriteTracker, PAGE};
use ferry_engine::qemu::inject;
use nix::sys::signal::Signal;
use nix::sys::wait::{waitid, Id, WaitPidFlag};

fn track(ram: &Ram, child: &Child) -> WriteTracker {
    let uffd = inject::userfaultfd(&child.process, deadline()).expect("injection");
    WriteTracker::new(uffd, &child.process, vec![ram.range()]).expect("registration")
}

const NONE: [u64; 0] = [];

/// Pages that one scan reports.
fn scan(tracker: &mut WriteTracker, ram: &Ram) -> Vec<u64> {
    let mut sets = [PageSet::new(ram.len)];
    let report = tracker.scan_into(&mut sets).expect("a scan");
    assert_eq!(report.pages, sets[0].count(), "no page is reported twice");
    sets[0].runs_up_to(PAGE).map(|run| run.start / PAGE).collect()
}

#[test]
fn every_write_is_seen_exactly_once() {
    let ram = Ram::new("/dev/shm", 2048);
    let mut child = ram.serve();
    for page in 0..8 {
        child.order(Order::store(page, 1));
    }
    let mut tracker = track(&ram, &child);
    tracker.arm().expect("arming");
    assert_eq!(scan(&mut tracker, &ram), NONE, "nothing was written since");

    child.order(Order::store(3, 2)); // populated
    child.order(Order::store(1000, 2)); // a hole until now
    assert_eq!(
        child.order(Order::read_into(5)).0,
        PAGE as i64,
        "read(2) into tracked memory"
    );
    assert_eq!(
        child.order(Order::read_into(2047)).0,
        PAGE as i64,
        "read(2) into a tracked hole"
    );
    child.order(Order::load(6));
    child.order(Order::load(1500)); // reads a hole, which allocates it
    assert_eq!(scan(&mut tracker, &ram), [3, 5, 1000, 2047]);
    assert_eq!(scan(&mut tracker, &ram), NONE);

    child.order(Order::store(3, 2)); // the same value: a write all the same
    child.order(Order::store(1500, 1));
    assert_eq!(scan(&mut tracker, &ram), [3, 1500]);
}

#[test]
fn a_discarded_page_is_a_hole_and_writes_to_it_are_seen() {
    let ram = Ram::new("/dev/shm", 2048);
    let mut child = ram.serve();
    for page in 0..2048 {
        child.order(Order::store(page, 1));
    }
    let mut tracker = track(&ram, &child);
    tracker.arm().expect("arming");

    // One page, and a whole page table (2 MiB): the kernel takes different ways.
    assert_eq!(child.order(Order::discard(7, 1)).0, 0);
    assert_eq!(child.order(Order::discard(1024, 512)).0, 0);
    let mut data = PageSet::new(ram.len);
    for extent in ram.file.extents(0..ram.len).expect("extents") {
        data.insert(extent.expect("an extent"));
    }
    let mut holes = PageSet::full(ram.len);
    holes.subtract(&data);
    let holes: Vec<_> = holes.runs().map(|run| run.start / PAGE..run.end / PAGE).collect();
    assert_eq!(holes, [7..8, 1024..1536]);
    // The kernel need not report these (6.18 reports none), which is why the last scan alone is not enough.
    let reported = scan(&mut tracker, &ram);
    assert!(
        reported
            .iter()
            .all(|page| *page == 7 || (1024..1536).contains(page)),
        "{reported:?}"
    );

    child.order(Order::store(7, 9));
    child.order(Order::store(1024, 9));
    child.order(Order::store(1535, 9));
    let reported = scan(&mut tracker, &ram);
    for page in [7, 1024, 1535] {
        assert!(
            reported.contains(&page),
            "a write to discarded page {page} is missed"
        );
    }
    // Written, then discarded before the scan: must not be lost as a hole either.
    child.order(Order::store(9, 9));
    child.order(Order::discard(9, 1));
    child.order(Order::store(9, 8));
    assert!(scan(&mut tracker, &ram).contains(&9));
}

/// The real use: rounds of scan and copy against a writer that never rests, then a last scan after it stopped. The copy
/// must equal the original, byte for byte.
fn race_in(directory: &str, rounds: u64) {
    let ram = Ram::new(directory, 4096);
    let mut child = ram.serve();
    let mut tracker = track(&ram, &child);
    tracker.arm().expect("arming");
    let mut copy = ram.contents();
    child.send(Order::race(42));

    let mut dirty = [PageSet::new(ram.len)];
    let mut reported = 0;
    for round in 0..rounds {
        // Some rounds back to back, some with a crowd of writes between them.
        if round % 16 == 0 {
            let seen = ram.race_progress();
            await_that("the writer", || ram.race_progress() > seen + round % 500);
        }
        dirty[0].clear();
        reported += tracker.scan_into(&mut dirty).expect("a scan").pages;
        fetch(&ram, &dirty[0], &mut copy);
    }
    ram.set_stop_flag(true);
    let written = child.answer().0;
    dirty[0].clear();
    tracker.scan_into(&mut dirty).expect("the last scan");
    fetch(&ram, &dirty[0], &mut copy);
    // What was discarded behind the scans is a hole now.
    let mut holes = PageSet::full(ram.len);
    for extent in ram.file.extents(0..ram.len).expect("extents") {
        holes.remove(extent.expect("an extent"));
    }
    for hole in holes.runs() {
        copy[hole.start as usize..hole.end as usize].fill(0);
    }
    println!("{directory}: {written} writes, {reported} pages reported in {rounds} rounds");
    assert!(reported > rounds, "the writer did race");
    let original = ram.contents();
    let wrong = (0..4096).find(|page| {
        let bytes = page * PAGE as usize..(page + 1) * PAGE as usize;
        original[bytes.clone()] != copy[bytes]
    });
    assert_eq!(wrong, None, "a page differs after the last scan");
}

fn fetch(ram: &Ram, pages: &PageSet, copy: &mut [u8]) {
    for run in pages.runs_up_to(256 << 10) {
        ram.file
            .read_at(run.start, &mut copy[run.start as usize..run.end as usize])
            .expect("reading RAM");
    }
}

#[test]
fn nothing_is_missed_in_a_race() {
    race_in("/dev/shm", 1_500);
}

/// A tmpfs that uses huge pages wherever it can, as hosts often mount it for guests; unmounted at the end.
struct HugeTmpfs(tempfile::TempDir);

impl HugeTmpfs {
    fn mount() -> HugeTmpfs {
        let directory = tempfile::tempdir().expect("a directory");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "huge=always,size=256m", "ferry-test"])
            .arg(directory.path())
            .status();
        assert!(done.expect("mount").success(), "mounting a tmpfs with huge pages");
        HugeTmpfs(directory)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().expect("a UTF-8 path")
    }
}

impl Drop for HugeTmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn nothing_is_missed_in_a_race_on_huge_pages() {
    let tmpfs = HugeTmpfs::mount();
    race_in(tmpfs.path(), 1_500);
}

#[test]
fn writes_to_huge_pages_are_seen_by_the_4_kib() {
    let tmpfs = HugeTmpfs::mount();
    let ram = Ram::new(tmpfs.path(), 2048);
    let mut child = ram.serve();
    for page in [0, 512, 1024, 1536] {
        child.order(Order::store(page, 1));
    }
    assert_eq!(
        ram.file.resident().expect("fstat"),
        ram.len,
        "the file is in huge pages"
    );
    let mut tracker = track(&ram, &child);
    tracker.arm().expect("arming");
    child.order(Order::store(700, 1));
    child.order(Order::store(1023, 1));
    assert_eq!(scan(&mut tracker, &ram), [700, 1023]);
}

#[test]
fn a_second_tracker_is_refused_and_the_end_of_the_first_frees_the_memory() {
    // Large enough to be registered and freed in several pieces.
    let ram = Ram::new("/dev/shm", 20_000);
    let mut child = ram.serve();
    let before = child.process.maps().expect("mappings");
    child.order(Order::store(1, 1));
    let mut first = track(&ram, &child);
    first.arm().expect("arming");
    let uffd = inject::userfaultfd(&child.process, deadline()).expect("a second injection");
    let second = WriteTracker::new(uffd, &child.process, vec![ram.range()]);
    assert!(matches!(second, Err(TrackError::Busy { .. })), "{second:?}");
    child.order(Order::store(2, 1));
    assert_eq!(
        scan(&mut first, &ram),
        [2],
        "the attempt did not disturb the first"
    );

    drop(first);
    assert_eq!(
        child.process.maps().expect("mappings"),
        before,
        "the mappings are as they were"
    );
    let mut third = track(&ram, &child);
    third.arm().expect("arming");
    child.order(Order::store(1, 1));
    assert_eq!(scan(&mut third, &ram), [1]);
}

#[test]
fn a_process_that_is_gone_is_an_error_not_an_empty_scan() {
    let ram = Ram::new("/dev/shm", 64);
    let child = ram.serve();
    let mut tracker = track(&ram, &child);
    tracker.arm().expect("arming");
    child.signal(Signal::SIGKILL);
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(child.pid()), flags).expect("the child's end");
    let scanned = tracker.scan(&mut |_, _| {});
    assert!(
        matches!(scanned, Err(TrackError::QemuGone { pid }) if pid == child.process.pid()),
        "{scanned:?}"
    );
}

#[test]
fn memory_that_is_unmapped_is_an_error_not_an_empty_scan() {
    let ram = Ram::new("/dev/shm", 64);
    let mut child = ram.serve();
    let mut tracker = track(&ram, &child);
    tracker.arm().expect("arming");
    assert_eq!(child.order(Order::unmap(10)).0, 0);
    let scanned = tracker.scan(&mut |_, _| {});
    let gap = ram.range().address + 10 * PAGE;
    assert!(
        matches!(scanned, Err(TrackError::Changed { address, .. }) if address == gap),
        "{scanned:?}"
    );
}
