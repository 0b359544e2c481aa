//! RAM files on tmpfs and hugetlbfs.

mod common;

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;

use common::{deadline, Order, Ram};
use ferry_engine::memory::{Backing, FileError, PageSet, RamFile, WriteTracker, PAGE};
use ferry_engine::qemu::inject;
use nix::sys::memfd::{memfd_create, MFdFlags};

fn extents(file: &RamFile, pages: Range<u64>) -> Vec<Range<u64>> {
    let found = file
        .extents(pages.start * PAGE..pages.end * PAGE)
        .expect("extents");
    found
        .map(|extent| extent.expect("an extent"))
        .map(|e| e.start / PAGE..e.end / PAGE)
        .collect()
}

#[test]
fn holes_are_not_read_and_not_made() {
    let ram = Ram::new("/dev/shm", 100);
    let file = &ram.file;
    assert_eq!(
        (file.len(), file.resident().expect("fstat"), file.backing()),
        (100 * PAGE, 0, Backing::Tmpfs)
    );
    assert!(extents(file, 0..100).is_empty());
    file.write_at(10 * PAGE, &[1; 3 * PAGE as usize])
        .expect("writing");
    file.write_at(99 * PAGE, &[1; PAGE as usize]).expect("writing");
    assert_eq!(extents(file, 0..100), [10..13, 99..100]);
    assert_eq!(extents(file, 11..99), [11..13; 1]);
    assert_eq!(extents(file, 12..100), [12..13, 99..100]);
    assert_eq!(extents(file, 20..20), []);

    let mut all = vec![7; 100 * PAGE as usize];
    file.read_at(0, &mut all).expect("reading");
    assert_eq!(all.iter().filter(|&&byte| byte == 1).count() as u64, 4 * PAGE);
    assert!(all.iter().all(|&byte| byte < 2));
    assert_eq!(
        file.resident().expect("fstat"),
        4 * PAGE,
        "reading holes made no pages"
    );

    file.punch(11 * PAGE..12 * PAGE).expect("punching");
    file.punch(0..0).expect("punching nothing");
    assert_eq!(extents(file, 0..100), [10..11, 12..13, 99..100]);
    assert_eq!(file.resident().expect("fstat"), 3 * PAGE);
}

#[test]
fn what_lies_outside_of_the_block_is_out_of_reach() {
    let ram = Ram::new("/dev/shm", 10);
    let raw = || ram.raw.try_clone().expect("a copy");
    let block = RamFile::from_file(raw(), PathBuf::from("block"), 2 * PAGE..5 * PAGE).expect("a block");
    assert_eq!(block.len(), 3 * PAGE);
    block.write_at(PAGE, b"ferry").expect("writing");
    let mut bytes = [0; 5];
    ram.file.read_at(3 * PAGE, &mut bytes).expect("reading");
    assert_eq!(&bytes, b"ferry", "offsets are those of the block");
    ram.file.write_at(6 * PAGE, b"x").expect("writing");
    assert_eq!(extents(&block, 0..3), [1..2; 1]);

    let outside = |result: Result<(), FileError>| {
        assert!(
            matches!(result, Err(FileError::OutOfBounds { size, .. }) if size == 3 * PAGE),
            "{result:?}"
        );
    };
    outside(block.write_at(3 * PAGE, b"x"));
    outside(block.write_at(u64::MAX, b"xx"));
    outside(block.read_at(3 * PAGE - 1, &mut bytes));
    outside(block.punch(0..3 * PAGE + 1));
    #[allow(clippy::reversed_empty_ranges, reason = "from a hostile peer it may come")]
    outside(block.punch(4 * PAGE..0));
    outside(block.extents(0..u64::MAX).map(drop));
    block.write_at(3 * PAGE, b"").expect("nothing, at the very end");

    let beyond = RamFile::from_file(raw(), PathBuf::from("beyond"), 5 * PAGE..11 * PAGE);
    assert!(matches!(beyond, Err(FileError::OutOfBounds { .. })), "{beyond:?}");
    ram.raw.set_len(2 * PAGE).expect("truncation");
    let cut = block.read_at(0, &mut bytes);
    assert!(matches!(cut, Err(FileError::System { .. })), "{cut:?}");
}

#[test]
fn a_file_that_is_not_memory_is_refused() {
    let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file on disk");
    let refused = RamFile::open(file.path());
    assert!(matches!(refused, Err(FileError::NotMemory { .. })), "{refused:?}");
}

#[test]
fn a_full_tmpfs_is_told_from_other_errors() {
    let directory = tempfile::tempdir().expect("a directory");
    let mount = |arguments: &[&str]| {
        let status = std::process::Command::new(arguments[0])
            .args(&arguments[1..])
            .arg(directory.path())
            .status();
        assert!(status.expect("mount").success());
    };
    mount(&["mount", "-t", "tmpfs", "-o", "size=64k", "ferry-test"]);
    let path = directory.path().join("ram");
    File::create(&path)
        .and_then(|file| file.set_len(1 << 20))
        .expect("a RAM file");
    let result = RamFile::open(&path)
        .expect("a RAM file")
        .write_at(0, &[1; 128 << 10]);
    mount(&["umount", "--lazy"]);
    assert!(result.as_ref().is_err_and(FileError::is_no_room), "{result:?}");
}

const HUGE: u64 = 2 << 20;

/// Huge pages of 2 MiB for a test, given back at the end.
struct HugePages {
    before: String,
    /// Locked: there is one pool, and who gives his pages back would take another one's along.
    _pool: File,
}

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn reserve(count: u64) -> Option<HugePages> {
        let pool = File::open(HUGE_PAGES).ok()?;
        pool.lock().ok()?;
        let read = || std::fs::read_to_string(HUGE_PAGES).ok();
        let before = read()?;
        let had: u64 = before.trim().parse().ok()?;
        let wanted = had + count;
        let _ = std::fs::write(HUGE_PAGES, wanted.to_string());
        let pages = HugePages { before, _pool: pool };
        if read()?.trim().parse() == Ok(wanted) {
            return Some(pages);
        }
        println!("SKIPPED: the kernel has no {count} huge pages for this test");
        None
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(HUGE_PAGES, &self.before);
    }
}

#[test]
fn hugetlbfs_is_written_tracked_and_punched() {
    let Some(_pages) = HugePages::reserve(6) else {
        return;
    };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let raw = File::from(memfd_create(c"ferry-test", flags).expect("a file of huge pages"));
    raw.set_len(4 * HUGE).expect("a size");
    let ram = Ram::map(raw, PathBuf::from("huge"), 4 * HUGE);
    assert_eq!(ram.file.backing(), Backing::Hugetlbfs { page: HUGE });
    assert_eq!(
        extents(&ram.file, 0..2048),
        [],
        "a mapping claims and makes nothing"
    );

    let bytes: Vec<u8> = (0..HUGE as usize + 5).map(|index| index as u8 | 1).collect();
    ram.file.write_at(HUGE - 3, &bytes).expect("writing");
    let mut read = vec![0; bytes.len()];
    ram.file.read_at(HUGE - 3, &mut read).expect("reading");
    assert!(read == bytes);
    assert_eq!(ram.file.resident().expect("fstat"), 3 * HUGE);
    let mut hole = [7; 16];
    ram.file.read_at(3 * HUGE, &mut hole).expect("reading a hole");
    assert_eq!((hole, ram.file.resident().expect("fstat")), ([0; 16], 3 * HUGE));
    assert_eq!(extents(&ram.file, 0..2048), [0..1536; 1]);
    assert_eq!(
        extents(&ram.file, 700..1600),
        [700..1536; 1],
        "the ends need not be those of pages"
    );

    let mut child = ram.serve();
    for page in [0, 512, 1024] {
        child.order(Order::store(page, 9));
    }
    let uffd = inject::userfaultfd(&child.process, deadline()).expect("injection");
    let mut tracker = WriteTracker::new(uffd, &child.process, vec![ram.range()]).expect("registration");
    tracker.arm().expect("arming");
    let mut scan = || {
        let mut sets = [PageSet::new(ram.len)];
        tracker.scan_into(&mut sets).expect("a scan");
        sets[0]
            .runs_up_to(HUGE)
            .map(|run| run.start / PAGE..run.end / PAGE)
            .collect::<Vec<_>>()
    };
    assert_eq!(scan(), []);
    child.order(Order::store(600, 1));
    child.order(Order::store(1600, 1)); // a hole until now
    assert_eq!(scan(), [512..1024, 1536..2048]);
    assert_eq!(scan(), []);
    child.order(Order::store(601, 1));
    assert_eq!(scan(), [512..1024; 1]);

    ram.file.punch(HUGE..2 * HUGE).expect("punching");
    assert_eq!(ram.file.resident().expect("fstat"), 3 * HUGE);
    // What has been looked at before is gone from the looker's mapping, too.
    assert_eq!(extents(&ram.file, 0..2048), [0..512, 1024..2048]);
    child.order(Order::store(700, 1));
    assert!(scan().contains(&(512..1024)), "a write to a punched huge page");
    // All huge pages are taken by now; the one that is missing is an error, not a signal.
    drop(child);
    let more = File::from(memfd_create(c"ferry-test", flags).expect("a file of huge pages"));
    more.set_len(64 * HUGE).expect("a size");
    let more = RamFile::from_file(more, PathBuf::from("more"), 0..64 * HUGE).expect("a RAM file");
    let full = (0..64)
        .map(|page| more.write_at(page * HUGE, b"x"))
        .find_map(Result::err);
    assert!(full.as_ref().is_some_and(FileError::is_no_room), "{full:?}");
}

#[test]
fn cleared_huge_pages_stay_and_are_made() {
    let Some(_pages) = HugePages::reserve(4) else {
        return;
    };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let raw = File::from(memfd_create(c"ferry-test", flags).expect("a file of huge pages"));
    raw.set_len(4 * HUGE).expect("a size");
    let file = RamFile::from_file(raw, PathBuf::from("huge"), 0..4 * HUGE).expect("a RAM file");
    let content = vec![7; 2 * HUGE as usize];
    file.write_at(0, &content).expect("writing");

    // From within the first page to within the third, which is a hole.
    file.clear(HUGE - 3 * PAGE..2 * HUGE + PAGE).expect("clearing");
    assert_eq!(file.resident().expect("fstat"), 3 * HUGE);
    assert_eq!(extents(&file, 0..2048), [0..1536; 1]);
    let mut read = vec![1; 3 * HUGE as usize];
    file.read_at(0, &mut read).expect("reading");
    let first_zero = (HUGE - 3 * PAGE) as usize;
    assert!(
        read[..first_zero].iter().all(|byte| *byte == 7),
        "what is before is not touched"
    );
    assert!(read[first_zero..].iter().all(|byte| *byte == 0));

    // As much of a tmpfs is a hole.
    let ram = Ram::new("/dev/shm", 4);
    ram.file.write_at(0, &[7; 4 * PAGE as usize]).expect("writing");
    ram.file.clear(PAGE..3 * PAGE).expect("clearing");
    assert_eq!(extents(&ram.file, 0..4), [0..1, 3..4]);
}
