//! What the guests boot: kernel, initramfs, boot sector. Built once into `target/guests`.
//!
//! ```text
//!   guests/kernel (script) ──> vmlinuz, modules/NN-*.ko ─┐
//!   guests/init (crate, static) ─────────────────────────┴─> initrd     cpio "newc", written here
//!   guests/boot.S ──> boot.img
//! ```

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{bail, ensure, Context, Result};
use nix::fcntl::{Flock, FlockArg};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Mark in the boot sector before the two numbers that may be changed (`guests/boot.S`).
const SECTOR_MARK: &[u8] = b"FERRY:)\n";
const SECTOR_SIZE: usize = 512;
/// Size of the disk it is on: SeaBIOS does not boot a virtio disk of less than a cylinder.
const BOOT_DISK_SIZE: usize = 1 << 20;

/// The built files.
#[derive(Clone, Debug)]
pub struct Images {
    /// Linux, as QEMU's `-kernel` takes it.
    pub kernel: PathBuf,
    /// The initramfs with our init.
    pub initrd: PathBuf,
    /// The boot sector.
    pub boot: PathBuf,
}

impl Images {
    /// Builds what is missing or out of date; later calls in this process return at once.
    ///
    /// # Errors
    /// If the kernel cannot be fetched, or cargo, as or ld fail.
    pub fn build() -> Result<&'static Images> {
        static BUILT: OnceLock<Result<Images, String>> = OnceLock::new();
        match BUILT.get_or_init(|| build().map_err(|error| format!("{error:#}"))) {
            Ok(images) => Ok(images),
            Err(reason) => bail!("cannot build the test guests: {reason}"),
        }
    }

    /// Copies kernel and initramfs into `dir`, readable to any user.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn install(&self, dir: &Path) -> Result<()> {
        for (from, name) in [(&self.kernel, "vmlinuz"), (&self.initrd, "initrd")] {
            let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
            put(&dir.join(name), &content)?;
        }
        Ok(())
    }

    /// The disk with the boot sector for a range from 1 MiB to `end_mib`, with `spins` PAUSE instructions after each page.
    ///
    /// # Errors
    /// If the range is empty or beyond 2 GiB, or the built sector is not one of ours.
    pub fn boot_disk(&self, end_mib: u32, spins: u32) -> Result<Vec<u8>> {
        ensure!(
            (2..=2048).contains(&end_mib),
            "a boot sector's range ends between 2 and 2048 MiB, not at {end_mib}"
        );
        let mut sector =
            fs::read(&self.boot).with_context(|| format!("cannot read {}", self.boot.display()))?;
        ensure!(
            sector.len() == SECTOR_SIZE,
            "{} has {} bytes",
            self.boot.display(),
            sector.len()
        );
        let mark = sector
            .windows(SECTOR_MARK.len())
            .position(|window| window == SECTOR_MARK);
        let numbers = mark.context("the boot sector has no mark")? + SECTOR_MARK.len();
        sector[numbers..numbers + 4].copy_from_slice(&(end_mib << 20).to_le_bytes());
        sector[numbers + 4..numbers + 8].copy_from_slice(&spins.to_le_bytes());
        sector.resize(BOOT_DISK_SIZE, 0);
        Ok(sector)
    }
}

/// Writes a file whole or not at all, readable to any user, and leaves an equal one alone: a running QEMU may have it open.
pub(super) fn put(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let part = path.with_extension(format!("{}.part", std::process::id()));
    fs::write(&part, content)
        .and_then(|()| fs::set_permissions(&part, fs::Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&part, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn build() -> Result<Images> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guests");
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    // Tests run in parallel processes.
    let lock = File::create(cache.join("lock")).context("cannot make the lock file")?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .context("flock")?;

    run(Command::new(sources.join("kernel")).arg(&cache))?;
    let init = build_init(&sources, &cache)?;
    let images = Images {
        kernel: cache.join("vmlinuz"),
        initrd: cache.join("initrd"),
        boot: cache.join("boot.img"),
    };
    put(&images.initrd, &initramfs(&init, &cache.join("modules"))?)?;

    let object = cache.join("boot.o");
    run(Command::new("as")
        .arg("--32")
        .arg(sources.join("boot.S"))
        .arg("-o")
        .arg(&object))?;
    let flags = ["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"];
    run(Command::new("ld")
        .args(flags)
        .arg(&object)
        .arg("-o")
        .arg(&images.boot))?;
    Ok(images)
}

/// Builds our init without any shared library, since the initramfs has none.
fn build_init(sources: &Path, cache: &Path) -> Result<PathBuf> {
    let target_dir = cache.join("cargo");
    let flags = r#"rustflags=["-Ctarget-feature=+crt-static","-Cstrip=symbols"]"#;
    run(Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "ferry-guest",
            "--target",
            TARGET,
        ])
        .arg("--config")
        .arg(format!("target.{TARGET}.{flags}"))
        .arg("--target-dir")
        .arg(&target_dir)
        // Set for the whole workspace they would take the place of those above.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(sources))?;
    Ok(target_dir.join(TARGET).join("release/ferry-guest-init"))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{:?} failed ({}): {}",
        command.get_program(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// The initramfs: init, modules, mount points, and the console that the kernel opens for init.
fn initramfs(init: &Path, modules: &Path) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for dir in ["dev", "proc", "sys", "modules"] {
        archive.add(dir, 0o040_755, (0, 0), &[])?;
    }
    archive.add("dev/console", 0o020_600, (5, 1), &[])?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    archive.add("init", 0o100_755, (0, 0), &read(init)?)?;
    let mut paths = fs::read_dir(modules)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .context("a module's name is not UTF-8")?;
        archive.add(&format!("modules/{name}"), 0o100_644, (0, 0), &read(&path)?)?;
    }
    archive.end()
}

/// A cpio archive of the "newc" kind, as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst has it.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    /// Adds one entry; `device` is major and minor number.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).context("too large for cpio")?;
        let name_size = u32::try_from(name.len() + 1).context("name too long for cpio")?;
        // inode, mode, uid, gid, links, mtime, size, device of the file system (2), device (2), name's size, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        write!(self.bytes, "070701")?;
        for field in fields {
            write!(self.bytes, "{field:08X}")?;
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.bytes)
    }
}
