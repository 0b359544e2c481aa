//! Does write tracking work on this kernel?
//!
//! Version numbers do not tell: features are backported, disabled and broken. So the whole of it is tried once, on
//! a small file of our own: populate, write, punch, scan.

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

#[cfg(test)]
mod tests {
    #[test]
    fn this_kernel_tracks() {
        super::probe().expect("the tests of this package need Linux 6.7 or later, and root");
    }
}
