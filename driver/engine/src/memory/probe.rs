//! Does write tracking work on this kernel?
//!
//! Version numbers do not tell: features are backported, disabled and broken. So the whole of it is tried once, on
//! a small file of our own: populate, write, punch, scan. For huge pages, of which the host may have none to spare,
//! what differs between kernels is tried on a page that is not there.

use std::ffi::CStr;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;

use nix::sys::memfd::{memfd_create, MFdFlags};

use super::sys::{self, Mapping, PageRegion};
use super::PAGE;

/// Why this kernel cannot track writes; the text is for an administrator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host's kernel cannot track writes to guest RAM from outside of QEMU (Linux 6.7 or later can): {0}"
)]
pub struct Unsupported(pub String);

/// Pages of the probe's file. Spans two page tables wherever it lands.
const PAGES: u64 = 1024;

/// Tries write tracking on a file of this process's own. Takes about a millisecond; call it once, at the start.
///
/// # Errors
/// Says which step the kernel refused, or got wrong.
pub fn probe() -> Result<(), Unsupported> {
    let step = |what: &'static str| move |error: std::io::Error| Unsupported(format!("{what}: {error}"));

    let name: &CStr = c"virt-ferry-probe";
    let file =
        memfd_create(name, MFdFlags::MFD_CLOEXEC).map_err(|errno| step("memfd_create")(errno.into()))?;
    let file = File::from(file);
    file.set_len(PAGES * PAGE)
        .map_err(step("making a small file in memory"))?;
    let mapping = Mapping::new(&file, 0..PAGES * PAGE).map_err(step("mapping it"))?;
    let write = |pages: Range<u64>| pages.for_each(|page| mapping.write((page * PAGE) as usize, &[1]));
    // Populated before it is protected; the last page stays a hole until later.
    write(0..8);

    let uffd = sys::userfaultfd().map_err(step("userfaultfd"))?;
    sys::uffd_api(uffd.as_fd(), sys::TRACKING_FEATURES).map_err(step(
        "userfaultfd with asynchronous write protection of shared memory",
    ))?;
    let addresses = mapping.addresses();
    sys::uffd_register(uffd.as_fd(), addresses.clone(), sys::UFFDIO_REGISTER_MODE_WP)
        .map_err(step("UFFDIO_REGISTER"))?;
    sys::uffd_write_protect(uffd.as_fd(), addresses.clone()).map_err(step("UFFDIO_WRITEPROTECT"))?;
    let pagemap = File::open("/proc/self/pagemap").map_err(step("opening /proc/self/pagemap"))?;

    let written = || -> Result<Vec<Range<u64>>, Unsupported> {
        let mut found = [PageRegion::default(); 16];
        let (filled, end) = sys::scan_written(pagemap.as_fd(), addresses.clone(), &mut found)
            .map_err(step("PAGEMAP_SCAN"))?;
        if end != addresses.end {
            return Err(Unsupported(format!(
                "PAGEMAP_SCAN stopped early, with {filled} results"
            )));
        }
        let page = |address| (address - addresses.start) / PAGE;
        Ok(found[..filled]
            .iter()
            .map(|region| page(region.start)..page(region.end))
            .collect())
    };
    let expect = |what: &str, expected: &[Range<u64>]| {
        let seen = written()?;
        if seen == expected {
            return Ok(());
        }
        Err(Unsupported(format!(
            "{what}: pages {expected:?} were written, but a scan reports {seen:?}"
        )))
    };

    expect("before any write", &[])?;
    write(2..3);
    write(4..6);
    write(PAGES - 1..PAGES);
    expect("after writes", &[2..3, 4..6, PAGES - 1..PAGES])?;
    expect("after a scan", &[])?;
    // A page that is given back and written again is the case kernels have got wrong.
    sys::punch_hole(&file, 4 * PAGE..6 * PAGE).map_err(step("punching a hole"))?;
    write(5..6);
    let seen = written()?;
    if !seen.iter().any(|run| run.contains(&5)) {
        return Err(Unsupported(format!(
            "a page punched and written again is missed; a scan reports {seen:?}"
        )));
    }
    Ok(())
}

/// Why this kernel cannot track writes to huge pages of a size; the text is for an administrator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host's kernel cannot track writes to huge pages of {} KiB (those of 2048 KiB it can; newer kernels, whose \
     PAGEMAP_SCAN does not stop at larger ones, can all): {why}",
    page >> 10
)]
pub struct UnsupportedPages {
    page: u64,
    why: String,
}

/// Tries whether a scan gets over huge pages of this size, in bytes. Takes no huge page, so none need be free.
///
/// A kernel whose `pagemap_scan_hugetlb_entry` takes every huge page for one of 2 MiB stops for good at the first larger
/// one that was written (Linux 6.12, and 6.18 before July 2026). A poisoned page looks written to it as well as one that
/// is there: both are entries that are not protected.
///
/// # Errors
/// Says which step the kernel refused, or got wrong.
pub fn probe_huge(page: u64) -> Result<(), UnsupportedPages> {
    scan_poisoned(page)
        .and_then(|(filled, found, walked)| judge_huge(page, filled, &found, walked))
        .map_err(|why| UnsupportedPages { page, why })
}

/// A scan of one huge page that looks written: results, the first of them, and how far it came; in bytes from the start.
fn scan_poisoned(page: u64) -> Result<(usize, Range<u64>, u64), String> {
    let step = |what: &'static str| move |error: std::io::Error| format!("{what}: {error}");
    let size = MFdFlags::from_bits_retain(page.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | size;
    let file =
        memfd_create(c"virt-ferry-probe", flags).map_err(|errno| step("memfd_create")(errno.into()))?;
    let file = File::from(file);
    file.set_len(page).map_err(step("making a file of huge pages"))?;
    let mapping = Mapping::new(&file, 0..page).map_err(step("mapping it"))?;
    let addresses = mapping.addresses();
    let uffd = sys::userfaultfd().map_err(step("userfaultfd"))?;
    sys::uffd_api(uffd.as_fd(), sys::TRACKING_FEATURES | sys::POISON_FEATURE)
        .map_err(step("userfaultfd with UFFDIO_POISON"))?;
    sys::uffd_register(uffd.as_fd(), addresses.clone(), sys::UFFDIO_REGISTER_MODE_WP)
        .map_err(step("UFFDIO_REGISTER"))?;
    sys::uffd_poison(uffd.as_fd(), addresses.clone()).map_err(step("UFFDIO_POISON"))?;
    let pagemap = File::open("/proc/self/pagemap").map_err(step("opening /proc/self/pagemap"))?;
    let mut found = [PageRegion::default(); 2];
    let (filled, walked) =
        sys::scan_written(pagemap.as_fd(), addresses.clone(), &mut found).map_err(step("PAGEMAP_SCAN"))?;
    let offset = |address: u64| address.saturating_sub(addresses.start);
    Ok((
        filled,
        offset(found[0].start)..offset(found[0].end),
        offset(walked),
    ))
}

fn judge_huge(page: u64, filled: usize, found: &Range<u64>, walked: u64) -> Result<(), String> {
    match (filled, walked) {
        (1, walked) if walked == page && *found == (0..page) => Ok(()),
        (_, 0) => Err("PAGEMAP_SCAN does not get over one that was written".into()),
        _ => Err(format!(
            "PAGEMAP_SCAN of one that was written stops at {walked:#x}, with {filled} results"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_huge_page_is_scanned_whole_or_not_at_all() {
        const HUGE: u64 = 1 << 30;
        // Linux 6.18.44, then what Linux 6.12's source does: it backs out of the first entry.
        assert_eq!(judge_huge(HUGE, 1, &(0..HUGE), HUGE), Ok(()));
        assert!(judge_huge(HUGE, 0, &(0..0), 0).is_err());
        assert!(
            judge_huge(HUGE, 0, &(0..0), HUGE).is_err(),
            "a write that is missed"
        );
        assert!(judge_huge(HUGE, 1, &(0..2 << 20), 2 << 20).is_err());
    }

    #[test]
    fn this_kernel_tracks_huge_pages_it_has_none_of() {
        if !std::path::Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
            println!("SKIPPED: this kernel has no huge pages of 2 MiB");
            return;
        }
        assert_eq!(probe_huge(2 << 20), Ok(()));
        // Larger ones: as the kernel is.
        match probe_huge(1 << 30) {
            Ok(()) => {}
            Err(unsupported) => assert!(unsupported.to_string().contains("1048576 KiB"), "{unsupported}"),
        }
        assert!(probe_huge(1 << 40).is_err(), "no kernel has such pages");
    }

    #[test]
    fn this_kernel_tracks() {
        super::probe().expect("the tests of this package need Linux 6.7 or later, and root");
    }
}
