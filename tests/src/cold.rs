//! Guests that move while they are shut off: made of files of all kinds, compared by other people's tools.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::guest::image::Images;
use crate::guest::{Config, Guest as LiveGuest};
use crate::host::Host;
use crate::lab::Lab;
use crate::scene::PATIENCE;
use crate::underway::Underway;
use crate::wait::{wait_for, wait_until};

/// Where most files of these guests are: a real file system, each host's own.
pub const IMAGES: &str = "/var/lib/libvirt/images";
/// Where files of guests may be left, and whose content must be as before in the end.
const PLACES: [&str; 8] = [
    IMAGES,
    "/etc/libvirt/qemu",
    "/var/lib/libvirt/qemu/nvram",
    "/var/lib/libvirt/qemu/snapshot",
    "/var/lib/libvirt/qemu/checkpoint",
    "/var/lib/libvirt/swtpm",
    "/var/lib/virt-ferry",
    "/srv",
];
/// For a guest to boot, on a machine that has other things to do.
const BOOT: Duration = Duration::from_secs(90);

/// How `virsh migrate` is asked for a cold migration.
pub const COLD: [&str; 3] = ["--offline", "--persistent", "--copy-storage-all"];

/// A guest whose boot sector says over the serial line that it runs.
#[derive(Clone)]
pub struct Guest {
    name: String,
    memory_mib: u32,
    os: String,
    devices: String,
}

impl Guest {
    /// A guest with a BIOS and no disk yet.
    pub fn new(name: &str) -> Self {
        Guest {
            name: name.to_owned(),
            memory_mib: 64,
            os: String::new(),
            devices: String::new(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A UEFI guest, whose variables are in this file.
    pub fn uefi(mut self, nvram: &str) -> Self {
        self.os = format!(
            "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>\
             <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{nvram}</nvram>"
        );
        self
    }

    /// Linux, which says what it finds in its disk's file system and in its TPM.
    ///
    /// # Errors
    /// If it cannot be built or installed.
    pub fn linux(mut self, lab: &Lab, config: &Config) -> Result<Self> {
        let directory = lab.share().join("guests");
        fs::create_dir_all(&directory)?;
        Images::build()?.install(&directory)?;
        let (place, words) = (LiveGuest::DIR, LiveGuest::command_line(config));
        let _ = write!(
            self.os,
            "<kernel>{place}/vmlinuz</kernel><initrd>{place}/initrd</initrd><cmdline>{words}</cmdline>"
        );
        self.memory_mib = 256;
        Ok(self)
    }

    /// One more device.
    pub fn device(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self
    }

    /// A disk in a file.
    pub fn disk(self, target: &str, format: &str, path: &str) -> Self {
        self.device(&format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path}'/>\
             <target dev='{target}' bus='virtio'/></disk>"
        ))
    }

    /// A disk on a block device.
    pub fn block(self, target: &str, path: &str) -> Self {
        self.device(&format!(
            "<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{path}'/>\
             <target dev='{target}' bus='virtio'/></disk>"
        ))
    }

    /// A disk in a storage pool's volume.
    pub fn volume(self, target: &str, pool: &str, volume: &str) -> Self {
        self.device(&format!(
            "<disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='{pool}' volume='{volume}'/>\
             <target dev='{target}' bus='virtio'/></disk>"
        ))
    }

    /// The domain XML.
    pub fn xml(&self) -> String {
        let Guest {
            name,
            memory_mib,
            os,
            devices,
        } = self;
        format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type>{os}<boot dev='hd'/></os><features><acpi/></features>\
             <devices>{devices}<controller type='usb' model='none'/>\
             <serial type='file'><source path='{}' append='on'><seclabel model='dac' relabel='no'/></source></serial>\
             </devices></domain>",
            log(name)
        )
    }

    /// Defines it on a host.
    ///
    /// # Errors
    /// What virsh said.
    pub fn define(&self, host: &Host) -> Result<()> {
        host.define(&self.xml()).map(drop)
    }
}

fn log(name: &str) -> String {
    format!("/lab/{name}.serial")
}

/// What makes a disk more than zeros: a boot sector where it begins, and random bytes in some places.
pub struct Content {
    mib: u64,
    random: Vec<(u64, usize)>,
}

impl Content {
    /// A disk of `mib` MiB of which the first few are random after the boot sector, one more in the middle and the last.
    pub fn sparse(mib: u64) -> Self {
        Content {
            mib,
            random: vec![(1, 3), (mib / 2, 1), (mib - 1, 1)],
        }
    }

    /// A disk of `mib` MiB of which `dense` in the middle are random.
    pub fn dense(mib: u64, dense: usize) -> Self {
        Content {
            mib,
            random: vec![(1, dense)],
        }
    }

    /// Writes it to a file or device of a host.
    ///
    /// # Errors
    /// If that cannot be written.
    pub fn write(&self, host: &Host, path: &str) -> Result<()> {
        let inside = host.path(path);
        let device = fs::symlink_metadata(&inside).is_ok_and(|found| !found.is_file());
        // Device names are the host's own, and may be links: by a tool there.
        let target = match device {
            true => host.path("/run/content.img"),
            false => inside.clone(),
        };
        if let Some(directory) = target.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut open = OpenOptions::new();
        let file = open
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&target);
        let file = file.with_context(|| target.display().to_string())?;
        file.set_len(self.mib << 20)?;
        file.write_all_at(&Images::build()?.boot_disk(2, 0)?, 0)?;
        let mut random = File::open("/dev/urandom")?;
        for (at, count) in &self.random {
            let mut bytes = vec![0; count << 20];
            random.read_exact(&mut bytes)?;
            file.write_all_at(&bytes, at << 20)?;
        }
        drop(file);
        if device {
            host.run(&[
                "dd",
                "if=/run/content.img",
                &format!("of={path}"),
                "bs=1M",
                "conv=fsync",
            ])?;
            fs::remove_file(target)?;
        }
        Ok(())
    }
}

impl Host {
    /// Starts `virsh migrate --offline --persistent --copy-storage-all` of a guest.
    ///
    /// # Errors
    /// If virsh cannot be started.
    pub fn begin_cold(&self, domain: &str, to: &Host, options: &[&str]) -> Result<Underway<'_>> {
        self.underway(domain, to, &COLD, options)
    }

    /// Moves a guest that is shut off, with all its files.
    ///
    /// # Errors
    /// What virsh said.
    pub fn move_cold(&self, domain: &str, to: &Host, options: &[&str]) -> Result<()> {
        let moved = self.begin_cold(domain, to, options)?.succeeds();
        moved.with_context(|| format!("{domain} from {} to {}, {options:?}", self.name(), to.name()))
    }

    /// The digest of a file's or device's bytes.
    ///
    /// # Errors
    /// What sha256sum said.
    pub fn sha256(&self, path: &str) -> Result<String> {
        let said = self.run(&["sha256sum", path])?;
        Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
    }

    /// Bytes that a file takes up.
    ///
    /// # Errors
    /// If there is none.
    pub fn allocated(&self, path: &str) -> Result<u64> {
        Ok(self.run(&["stat", "--format=%b", path])?.parse::<u64>()? * 512)
    }

    /// Whether a file is there.
    pub fn has(&self, path: &str) -> bool {
        fs::symlink_metadata(self.path(path)).is_ok()
    }

    /// All files where guests' files can be.
    ///
    /// # Errors
    /// What find said.
    pub fn guests_files(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for place in PLACES.iter().filter(|place| self.has(place)) {
            let said = self.run(&["find", place, "-not", "-type", "d"])?;
            found.extend(said.lines().map(str::to_owned));
        }
        found.sort();
        Ok(found)
    }

    /// The guest is here, shut off.
    ///
    /// # Errors
    /// If not.
    pub fn has_shut_off(&self, domain: &str) -> Result<()> {
        let state = self.state(domain)?;
        let shut_off = state
            .as_deref()
            .is_some_and(|state| state.starts_with("shut off"));
        ensure!(
            shut_off && self.is_persistent(domain)?,
            "{domain} on {}: {state:?}",
            self.name()
        );
        Ok(())
    }

    /// Starts the guest, waits until it says on its serial line that it runs from its disk, and ends it.
    ///
    /// # Errors
    /// If it does not.
    pub fn boots(&self, lab: &Lab, domain: &str) -> Result<()> {
        self.boots_until(lab, domain, |said| said.contains('B').then_some(()))
    }

    /// Starts the guest, waits until `heard` has found something in what it says on its serial line, and ends it at once.
    ///
    /// # Errors
    /// If it does not say that.
    pub fn boots_until<T>(&self, lab: &Lab, domain: &str, heard: impl Fn(&str) -> Option<T>) -> Result<T> {
        let log = lab.share().join(format!("{domain}.serial"));
        serial(&log)?;
        self.virsh(&["start", domain])?;
        let said = || -> Result<String> { Ok(String::from_utf8_lossy(&fs::read(&log)?).into_owned()) };
        let found = wait_for(&format!("{domain} to boot on {}", self.name()), BOOT, || {
            Ok(heard(&said()?))
        });
        let found = found.with_context(|| said().unwrap_or_default())?;
        self.ends(domain)?;
        Ok(found)
    }

    /// Ends a guest at once.
    ///
    /// # Errors
    /// What virsh said.
    pub fn ends(&self, domain: &str) -> Result<()> {
        self.virsh(&["destroy", domain]).map(drop)
    }
}

/// Runs a script in a host; it ends at its first failure.
///
/// # Errors
/// What it said.
pub fn shell(host: &Host, script: &str) -> Result<String> {
    host.run(&["sh", "-ec", script])
}

/// An empty serial log that QEMU's user may write to.
///
/// # Errors
/// If it cannot be made.
pub fn serial(log: &Path) -> Result<()> {
    File::create(log)?;
    fs::set_permissions(log, fs::Permissions::from_mode(0o666))?;
    Ok(())
}

/// Somebody who has a disk open for writing, until this is dropped.
pub struct Writer(Child);

impl Writer {
    /// Opens it, as bytes.
    ///
    /// # Errors
    /// If that cannot be done.
    pub fn of(host: &Host, disk: &str) -> Result<Self> {
        let writer = host
            .command("qemu-io")
            .args(["-f", "raw", disk])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let writer = Writer(writer);
        wait_until("the disk to be open", PATIENCE, || {
            let mut writers = host.processes_named("qemu-io")?.into_iter();
            Ok(writers.any(|writer| {
                let open = fs::read_dir(writer.proc().join("fd"))
                    .into_iter()
                    .flatten()
                    .flatten();
                let mut files = open.filter_map(|entry| fs::read_link(entry.path()).ok());
                files.any(|file| file == Path::new(disk))
            }))
        })?;
        Ok(writer)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // It ends with its standard input.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// What changed between two lists of files, for an error.
///
/// # Errors
/// If anything did.
pub fn same_files(before: &[String], after: &[String]) -> Result<()> {
    let mut said = String::new();
    for (sign, some, others) in [('-', before, after), ('+', after, before)] {
        for file in some.iter().filter(|file| !others.contains(file)) {
            // Writing into a String does not fail.
            let _ = writeln!(said, "{sign} {file}");
        }
    }
    ensure!(said.is_empty(), "files came or went:\n{said}");
    Ok(())
}
