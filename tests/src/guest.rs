//! The test guests from outside: how they are built, started, asked and judged.
//!
//! | guest | runs | shows | judged by |
//! |---|---|---|---|
//! | Linux, `guests/init` | TCG (and KVM where Linux boots) | memory, disk, network, time | itself: [`console`], [`remote`] |
//! | boot sector, `guests/boot.S` | KVM, TCG | that KVM's own writes are seen | its RAM file: [`ram`] |
//!
//! [`Guest`] describes one; [`domain`] makes libvirt XML of it and [`qemu`] a bare QEMU process. [`image`] builds what they boot,
//! [`beat`] listens to the guest's heartbeat and measures how long it was silent. See `guests/README.md`.

pub mod beat;
pub mod console;
pub mod domain;
pub mod image;
pub mod netns;
pub mod qemu;
pub mod ram;
pub mod remote;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
pub use ferry_guest::config::{Address, Config, Disk, Order, Rate};

use image::Images;

/// What a guest boots.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Linux and our init, with this load.
    Linux(Config),
    /// The boot sector, over memory from 1 MiB up.
    Boot {
        /// End of the range in MiB, 2 or more and below the guest's memory size.
        end_mib: u32,
        /// PAUSE instructions after each page; 0: as fast as it goes.
        spins: u32,
    },
}

/// Who runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// QEMU itself.
    Tcg,
    /// The kernel.
    Kvm,
}

/// The guest's chipset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// i440FX.
    Pc,
    /// ICH9.
    Q35,
}

/// Where guest memory lies on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A shared named file: what virt-ferry can move.
    File,
    /// A private named file (no `<access mode='shared'/>`).
    PrivateFile,
    /// A shared file without a name.
    Memfd,
    /// Anonymous memory, by name.
    Anonymous,
    /// Huge pages, shared.
    HugePages,
    /// What the host chooses: the definition says nothing.
    Unsaid,
}

/// A virtio NIC.
#[derive(Clone, Debug)]
pub struct Nic {
    /// Host bridge.
    pub bridge: String,
    /// The guest's MAC address.
    pub mac: String,
}

/// A virtio disk image; guests see the first as vda.
#[derive(Clone, Debug)]
pub struct Image {
    /// Path as QEMU sees it.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
    /// QEMU's cache mode, such as `none`.
    pub cache: String,
}

/// A guest to be: built up by chained calls, then turned into [`Guest::xml`] or started as [`qemu::Qemu`].
#[derive(Clone, Debug)]
pub struct Guest {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) accel: Accel,
    pub(crate) machine: Machine,
    pub(crate) memory_mib: u64,
    pub(crate) vcpus: u32,
    pub(crate) backing: Backing,
    pub(crate) nic: Option<Nic>,
    pub(crate) disks: Vec<Image>,
    pub(crate) free_page_reporting: bool,
    pub(crate) cells: u32,
    pub(crate) room_mib: u64,
    pub(crate) immediate: bool,
    pub(crate) uefi: bool,
    pub(crate) devices: Vec<String>,
    pub(crate) dir: PathBuf,
}

impl Guest {
    /// Where the lab shows the guests' files to every host.
    pub const DIR: &'static str = "/lab/guests";

    fn new(name: &str, kind: Kind, accel: Accel) -> Self {
        Guest {
            name: name.to_owned(),
            kind,
            accel,
            machine: Machine::Pc,
            memory_mib: 256,
            vcpus: 1,
            backing: Backing::File,
            nic: None,
            disks: Vec::new(),
            free_page_reporting: false,
            cells: 0,
            room_mib: 0,
            immediate: false,
            uefi: false,
            devices: Vec::new(),
            dir: PathBuf::from(Self::DIR),
        }
    }

    /// The Linux guest under TCG: 256 MiB, 1 vCPU, 16 MiB of them changed at 1000 pages a second.
    pub fn linux(name: &str) -> Self {
        Self::new(name, Kind::Linux(Config::default()), Accel::Tcg)
    }

    /// The boot sector under KVM: 256 MiB, of which it changes 1 to 100 MiB at full speed.
    pub fn boot(name: &str) -> Self {
        Self::new(
            name,
            Kind::Boot {
                end_mib: 100,
                spins: 0,
            },
            Accel::Kvm,
        )
    }

    /// The domain's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Memory in MiB.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Number of virtual CPUs.
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Who runs it.
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = accel;
        self
    }

    /// Its chipset.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = machine;
        self
    }

    /// NUMA cells, which share memory and vCPUs evenly: no more than there are vCPUs.
    pub fn cells(mut self, cells: u32) -> Self {
        self.cells = cells;
        self
    }

    /// Room for memory devices, in MiB; they need a NUMA cell.
    pub fn room_mib(mut self, mib: u64) -> Self {
        self.room_mib = mib;
        self
    }

    /// Memory that is all there from the start (`<allocation mode='immediate'/>`).
    pub fn immediate(mut self) -> Self {
        self.immediate = true;
        self
    }

    /// UEFI in flash memory instead of a BIOS.
    pub fn uefi(mut self) -> Self {
        self.uefi = true;
        self
    }

    /// A further device, as libvirt's XML has it.
    pub fn device(mut self, xml: &str) -> Self {
        self.devices.push(xml.to_owned());
        self
    }

    /// Where its memory lies.
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Directory, as QEMU sees it, that holds kernel, initrd, boot sector and serial log.
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = dir.into();
        self
    }

    /// The boot sector's range, from 1 MiB to `end_mib`, and how many PAUSE instructions it waits after each page.
    pub fn range(mut self, end_mib: u32, spins: u32) -> Self {
        if let Kind::Boot { .. } = self.kind {
            self.kind = Kind::Boot { end_mib, spins };
        }
        self
    }

    fn load(mut self, change: impl FnOnce(&mut Config)) -> Self {
        if let Kind::Linux(config) = &mut self.kind {
            change(config);
        }
        self
    }

    /// MiB that the writer keeps changing. This and the following loads are the Linux guest's; the boot sector has none.
    pub fn working_set(self, mib: u64) -> Self {
        self.load(|config| config.set = mib)
    }

    /// MiB filled once and only checked.
    pub fn filled(self, mib: u64) -> Self {
        self.load(|config| config.ram = mib)
    }

    /// Pace of the writer.
    pub fn rate(self, rate: Rate) -> Self {
        self.load(|config| config.rate = rate)
    }

    /// Order of the writer.
    pub fn order(self, order: Order) -> Self {
        self.load(|config| config.order = order)
    }

    /// Pace of the background check; `Rate(0)`: on demand only.
    pub fn check(self, rate: Rate) -> Self {
        self.load(|config| config.check = rate)
    }

    /// µs between two heartbeats; 0: none.
    pub fn beat_us(self, interval: u64) -> Self {
        self.load(|config| config.beat_us = interval)
    }

    /// A NIC on `bridge`, with this address in the guest (the boot sector uses neither). The MAC address follows from the IP address.
    pub fn network(self, bridge: &str, address: Address) -> Self {
        let [_, b, c, d] = address.ip.octets();
        let mac = format!("52:54:00:{b:02x}:{c:02x}:{d:02x}");
        let mut guest = self.load(|config| config.ip = Some(address));
        guest.nic = Some(Nic {
            bridge: bridge.to_owned(),
            mac,
        });
        guest
    }

    /// A further virtio disk, `cache=none`.
    pub fn disk(mut self, path: impl Into<PathBuf>, format: &str) -> Self {
        self.disks.push(Image {
            path: path.into(),
            format: format.to_owned(),
            cache: "none".to_owned(),
        });
        self
    }

    /// O_DIRECT load on vda: over its first `mib` MiB, `rate` blocks written a second and as many read.
    pub fn disk_load(self, mib: u64, rate: Rate) -> Self {
        self.load(|config| {
            config.disk = Some(Disk {
                name: "vda".to_owned(),
                mib,
                rate,
            })
        })
    }

    /// Lets the balloon device give free pages back to the host as they become free.
    pub fn free_page_reporting(mut self) -> Self {
        self.free_page_reporting = true;
        self
    }

    /// The serial log's path inside `dir`.
    pub fn log_in(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.log", self.name))
    }

    pub(crate) fn boot_disk_in(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.img", self.name))
    }

    /// The kernel's command line.
    ///
    /// - `clocksource=acpi_pm`: counted by QEMU in host nanoseconds. A TSC is calibrated at boot, on a busy host by some ppm wrong,
    ///   and then drifts against the real-time clock, which would pass for lost time.
    /// - `init_on_alloc=0`: the guest would spend its time on zeroing what it fills anyway.
    /// - `no_timer_check`: on a busy host the kernel may find QEMU's timer too slow and give up.
    /// - `loglevel=3`: kernel messages would cut our lines in two; a panic is said all the same.
    /// - `panic=-1`: a guest whose kernel was damaged resets, which ends it, and does not hang.
    pub fn command_line(config: &Config) -> String {
        format!(
            "console=ttyS0 quiet loglevel=3 panic=-1 no_timer_check nokaslr mitigations=off clocksource=acpi_pm \
             init_on_alloc=0 nowatchdog ipv6.disable=1 memhp_default_state=online {config}"
        )
    }

    /// Puts everything the guest boots into `host_dir`, readable to any user, and an empty serial log that any user may
    /// append to: QEMU runs without privileges. `host_dir` is the same directory as [`Guest::dir`], seen from here.
    ///
    /// # Errors
    /// If an image cannot be built or a file cannot be written.
    pub fn install(&self, host_dir: &Path) -> Result<()> {
        let images = Images::build()?;
        fs::create_dir_all(host_dir).with_context(|| format!("cannot make {}", host_dir.display()))?;
        match &self.kind {
            Kind::Linux(_) => images.install(host_dir)?,
            Kind::Boot { end_mib, spins } => {
                let disk = images.boot_disk(*end_mib, *spins)?;
                image::put(&self.boot_disk_in(host_dir), &disk)?;
            }
        }
        let log = self.log_in(host_dir);
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .open(&log);
        file.and_then(|file| file.set_permissions(fs::Permissions::from_mode(0o666)))
            .with_context(|| format!("cannot make the serial log {}", log.display()))
    }
}
