//! Figures, not judgements: `cargo bench -p ferry-engine --bench speed`.

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::time::Instant;

use common::{deadline, Order, Ram};
use ferry_engine::memory::{is_zero, split_zero, PageSet, WriteTracker, PAGE};
use ferry_engine::qemu::inject;

/// GB/s of `body`, which moves `bytes`: median and best of seven, after one to warm up.
fn measure(what: &str, bytes: u64, mut body: impl FnMut()) {
    body();
    let mut rates: Vec<f64> = (0..7)
        .map(|_| {
            let start = Instant::now();
            body();
            bytes as f64 / start.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    println!("{what:64} median {:6.2} GB/s, best {:6.2}", rates[3], rates[6]);
}

const PAGES: u64 = 128 << 10; // 512 MiB

fn filled() -> Ram {
    let ram = Ram::new("/dev/shm", PAGES);
    let chunk = vec![0x5a_u8; 1 << 20];
    for offset in (0..ram.len).step_by(chunk.len()) {
        ram.file.write_at(offset, &chunk).expect("filling RAM");
    }
    ram
}

fn main() {
    copy_speed();
    zero_speed();
    scan_speed();
}

fn copy_speed() {
    const CHUNK: usize = 256 << 10;
    let ram = filled();
    let mut buffer = vec![0_u8; CHUNK];
    let from_mapping = |address: *const u8, offset: u64, buffer: &mut [u8]| {
        // SAFETY: inside of a mapping of this length; nobody writes to it during a measurement.
        unsafe {
            std::ptr::copy_nonoverlapping(address.add(offset as usize), buffer.as_mut_ptr(), buffer.len());
        }
        black_box(buffer);
    };
    let cold = || {
        let file = ram.raw.try_clone().expect("a copy");
        Ram::map(file, std::path::PathBuf::new(), ram.len)
    };
    let chunks = || (0..ram.len).step_by(CHUNK);
    let pages: Vec<u64> = (0..16384_u64).map(|index| index * 40503 % PAGES * PAGE).collect();

    measure("256 KiB chunks, pread", ram.len, || {
        chunks().for_each(|offset| ram.file.read_at(offset, &mut buffer).expect("reading"));
    });
    measure("256 KiB chunks, warm mapping", ram.len, || {
        chunks().for_each(|offset| from_mapping(ram.address, offset, &mut buffer));
    });
    measure(
        "256 KiB chunks, cold mapping (mmap and munmap included)",
        ram.len,
        || {
            let cold = cold();
            chunks().for_each(|offset| from_mapping(cold.address, offset, &mut buffer));
        },
    );
    let page = &mut buffer[..PAGE as usize];
    let scattered = pages.len() as u64 * PAGE;
    measure("scattered 4 KiB pages, pread", scattered, || {
        pages
            .iter()
            .for_each(|&offset| ram.file.read_at(offset, page).expect("reading"));
    });
    measure("scattered 4 KiB pages, warm mapping", scattered, || {
        pages
            .iter()
            .for_each(|&offset| from_mapping(ram.address, offset, page));
    });
    measure("scattered 4 KiB pages, cold mapping", scattered, || {
        let cold = cold();
        pages
            .iter()
            .for_each(|&offset| from_mapping(cold.address, offset, page));
    });
}

fn zero_speed() {
    // Written to, or all of it would be the one zero page, in the cache.
    let mut bytes = vec![1_u8; 64 << 20];
    black_box(&mut bytes).fill(0);
    let len = bytes.len() as u64;
    measure("zero test on zeros", len, || {
        assert_eq!(split_zero(black_box(&bytes)).count(), 1)
    });
    bytes.fill(0x5a);
    measure("zero test on data", len, || {
        assert_eq!(split_zero(black_box(&bytes)).count(), 1)
    });
    bytes.fill(0);
    bytes
        .chunks_mut(2 * PAGE as usize)
        .for_each(|pages| pages[100] = 1);
    measure("zero test, every other page data at byte 100", len, || {
        assert_eq!(split_zero(black_box(&bytes)).count(), bytes.len() / PAGE as usize);
    });
    let page = vec![0_u8; PAGE as usize];
    measure("zero test of one page in the cache", 100_000 * PAGE, || {
        (0..100_000).for_each(|_| assert!(is_zero(black_box(&page))));
    });
}

fn scan_speed() {
    let ram = filled();
    let mut child = ram.serve();
    for page in 0..PAGES {
        child.order(Order::load(page));
    }
    let timed = |what: &str, body: &mut dyn FnMut()| {
        let start = Instant::now();
        body();
        println!("{what:64} {:8.3} ms", start.elapsed().as_secs_f64() * 1e3);
    };
    let mut uffd = None;
    for _ in 0..5 {
        timed("injection", &mut || {
            uffd = Some(inject::userfaultfd(&child.process, deadline()).expect("injection"));
        });
    }
    let uffd = uffd.expect("an injection");
    let mut tracker = None;
    timed("register 512 MiB", &mut || {
        let uffd = uffd.try_clone().expect("a copy");
        tracker = Some(WriteTracker::new(uffd, &child.process, vec![ram.range()]).expect("registration"));
    });
    let mut tracker = tracker.expect("a tracker");
    timed("arm 512 MiB", &mut || tracker.arm().expect("arming"));
    let mut sets = [PageSet::new(ram.len)];
    for _ in 0..5 {
        timed("scan 512 MiB, nothing written", &mut || {
            assert_eq!(tracker.scan_into(&mut sets).expect("a scan").pages, 0);
        });
    }
    for step in [64, 8, 2] {
        for page in (0..PAGES).step_by(step) {
            child.order(Order::store(page, 1));
        }
        timed(&format!("scan 512 MiB, every {step}th page written"), &mut || {
            assert_eq!(
                tracker.scan_into(&mut sets).expect("a scan").pages,
                PAGES / step as u64
            );
        });
    }
    timed("un-register 512 MiB, piece by piece", &mut || {
        // An empty tracker takes the place of the one that is dropped.
        let other = inject::userfaultfd(&child.process, deadline()).expect("injection");
        tracker = WriteTracker::new(other, &child.process, vec![]).expect("an empty tracker");
    });
    drop(uffd);
    let uffd = inject::userfaultfd(&child.process, deadline()).expect("injection");
    let raw = uffd.as_raw_fd();
    let mut tracker = WriteTracker::new(uffd, &child.process, vec![ram.range()]).expect("registration");
    timed("arm 512 MiB again", &mut || tracker.arm().expect("arming"));
    // SAFETY: the number is the tracker's, which is leaked below and so does not use or close it again.
    timed(
        "un-register 512 MiB by closing, as at the engine's death",
        &mut || unsafe {
            libc::close(raw);
        },
    );
    std::mem::forget(tracker);
}
