//! The disks of the guest that is measured, and their copies.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_tests::cold::{Guest, IMAGES};
use ferry_tests::host::Host;
use ferry_tests::lab::Lab;
use nix::fcntl::{posix_fadvise, PosixFadviseAdvice};
use nix::sys::statvfs::statvfs;
use nix::unistd::syncfs;

use super::{Sizes, GUEST};
use crate::limited;

/// The disks' names and formats.
pub const DISKS: [(&str, &str); 2] = [("system.qcow2", "qcow2"), ("data.raw", "raw")];
/// Into so many pieces the image's data are spread.
const PIECES: u64 = 64;
/// Making the disks, and looking at them, may take this long.
const PATIENCE: Duration = Duration::from_secs(300);

/// Where a disk is, on whichever host.
pub fn path(name: &str) -> String {
    format!("{IMAGES}/{name}")
}

/// Bytes that must be free: for the disks, a copy that has lost its holes, and to spare.
pub fn room(sizes: Sizes) -> u64 {
    (sizes.data + sizes.raw + sizes.image + sizes.raw + (4 << 10)) << 20
}

/// The disks at host1, and what becomes of them at host2.
pub struct Disks<'a> {
    one: &'a Host,
    two: &'a Host,
}

impl<'a> Disks<'a> {
    /// Makes them, and the guest that has them.
    ///
    /// # Errors
    /// There is no room, or they cannot be made.
    pub fn make(lab: &'a Lab, sizes: Sizes) -> Result<Self> {
        let (one, two) = (lab.host(1), lab.host(2));
        let (images, needed) = (one.path(IMAGES), room(sizes));
        let free = statvfs(&images).with_context(|| images.display().to_string())?;
        let free = free.blocks_available() as u64 * free.fragment_size() as u64;
        ensure!(
            free >= needed,
            "/var/lib/virt-ferry-lab has {} GiB free, and this needs {} GiB",
            free >> 30,
            needed >> 30
        );
        let [system, data] = DISKS.map(|(name, _)| path(name));
        random(&one.path(&data), sizes.raw, sizes.raw, 1)?;
        // qcow2 with all its metadata there has a file as long as the disk, and as sparse.
        let template = path("template.raw");
        random(&one.path(&template), sizes.image, sizes.data, PIECES)?;
        let size = format!("{}M", sizes.image);
        let create = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata",
        ];
        let convert = [
            "qemu-img",
            "convert",
            "-n",
            "--target-is-zero",
            "-f",
            "raw",
            "-O",
            "qcow2",
        ];
        for command in [
            &[&create[..], &[&system, &size]].concat()[..],
            &[&convert[..], &[&template, &system]].concat(),
        ] {
            ensure!(
                limited::run(one, PATIENCE, command)?,
                "{} hangs",
                command.join(" ")
            );
        }
        fs::remove_file(one.path(&template))?;
        let guest = Guest::new(GUEST).disk("vda", "qcow2", &system);
        guest.disk("vdb", "raw", &data).define(one)?;
        let disks = Disks { one, two };
        for file in disks.of(one) {
            File::open(&file)?.sync_all()?;
        }
        Ok(disks)
    }

    fn of(&self, host: &Host) -> Vec<PathBuf> {
        let files = DISKS.map(|(name, _)| host.path(path(name)));
        files.into_iter().filter(|file| file.exists()).collect()
    }

    /// Nothing of the source's disks is in the page cache from now on, and nobody else's writing is under way.
    ///
    /// # Errors
    /// The system refuses.
    pub fn forget_cache(&self) -> Result<()> {
        syncfs(File::open(self.two.path(IMAGES))?)?;
        for disk in self.of(self.one) {
            posix_fadvise(File::open(&disk)?, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        Ok(())
    }

    /// Waits until the copies are on the disk.
    ///
    /// # Errors
    /// They are not all there, or the system refuses.
    pub fn sync_copies(&self) -> Result<()> {
        for (name, _) in DISKS {
            let copy = self.two.path(path(name));
            let synced = File::open(&copy).and_then(|file| file.sync_all());
            synced.with_context(|| copy.display().to_string())?;
        }
        Ok(())
    }

    /// Bytes that the disks take up.
    ///
    /// # Errors
    /// One cannot be looked at.
    pub fn allocated(&self) -> Result<u64> {
        self.allocated_at(self.one)
    }

    /// Bytes that the copies take up.
    ///
    /// # Errors
    /// One cannot be looked at.
    pub fn allocated_copies(&self) -> Result<u64> {
        self.allocated_at(self.two)
    }

    fn allocated_at(&self, host: &Host) -> Result<u64> {
        let files = self.of(host).into_iter();
        let sizes = files.map(|file| Ok(fs::metadata(file)?.blocks() * 512));
        sizes.sum()
    }

    /// The copies hold what the disks hold.
    ///
    /// # Errors
    /// They do not.
    pub fn compare(&self, limit: Duration) -> Result<()> {
        for (name, format) in DISKS {
            let [here, there] = [self.one, self.two].map(|host| host.path(path(name)).display().to_string());
            let compare = [
                "qemu-img", "compare", "-q", "-f", format, "-F", format, &here, &there,
            ];
            limited::outside(limit, &compare)?;
        }
        Ok(())
    }

    /// Host2 has nothing of the guest.
    ///
    /// # Errors
    /// Something stays.
    pub fn forget_copies(&self) -> Result<()> {
        if self.two.state(GUEST)?.is_some() {
            self.two.virsh(&["undefine", GUEST])?;
        }
        for copy in self.of(self.two) {
            fs::remove_file(&copy).with_context(|| copy.display().to_string())?;
        }
        Ok(())
    }
}

/// A file of `mib` MiB, `data` of them random, in so many pieces at equal distances.
fn random(file: &Path, mib: u64, data: u64, pieces: u64) -> Result<()> {
    let mut random = File::open("/dev/urandom")?;
    let mut made = File::create(file).with_context(|| file.display().to_string())?;
    made.set_len(mib << 20)?;
    for piece in 0..pieces {
        made.seek(SeekFrom::Start(((piece * mib) << 20) / pieces))?;
        io::copy(&mut random.by_ref().take((data << 20) / pieces), &mut made)?;
    }
    Ok(())
}
