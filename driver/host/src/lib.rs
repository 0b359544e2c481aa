//! This host: its configuration, names, directories and programs.

mod certificates;
mod conf;
mod others;
mod program;

pub use certificates::{certificates, tls_is_forced};
pub use others::{real, Others};
pub use program::{run, wait};

use conf::Conf;
use ferry_contract::cold::journal::{self, Journal};
use ferry_contract::config::{Config, PATH};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where libvirt keeps each guest's private directory (system mode).
const QEMU_LIB: &str = "/var/lib/libvirt/qemu";
/// The private monitor's socket in the guest's private directory.
pub const MONITOR: &str = "virt-ferry-monitor.sock";
/// How much of a domain's name is in its directory's (libvirt 11.3, `VIR_DOMAIN_SHORT_NAME_MAX`).
const SHORT_NAME: usize = 20;
/// The most of a configuration file that is read.
const MAX_FILE: u64 = 1 << 20;

/// The configuration in force; read anew for each migration, so that a change needs no restart.
pub fn config() -> Result<Config, String> {
    match read(Path::new(PATH)) {
        Ok(text) => Config::parse(&text).map_err(|error| format!("{PATH}: {error}")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Config::default()),
        Err(error) => Err(format!("{PATH}: {error}")),
    }
}

/// Where the journals of cold migrations are, also under a configuration that [`config`] refuses.
///
/// # Errors
/// Why that cannot be known: then any guest may be between two hosts.
pub fn state_directory() -> Result<PathBuf, String> {
    let text = match read(Path::new(PATH)) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        Err(error) => return Err(format!("{PATH}: {error}")),
    };
    Config::state_directory_in(&text)
        .ok_or_else(|| format!("{PATH}: state_directory cannot be read: correct it"))
}

/// The journal at this path.
///
/// # Errors
/// The file's; of kind `InvalidData` where it is no journal that this release can use.
pub fn journal(path: &Path) -> io::Result<Journal> {
    let mut text = Vec::new();
    File::open(path)?
        .take(journal::MAX_LENGTH)
        .read_to_end(&mut text)?;
    Journal::parse(&text).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

/// Where libvirt runs our hook from before each start of a guest.
pub const HOOK: &str = "/etc/libvirt/hooks/qemu.d/virt-ferry";

/// Whether the hook is there that keeps a guest from being started while it is between two hosts: after a crash nothing
/// else does.
///
/// # Errors
/// What to do, in a sentence.
pub fn hook() -> Result<(), String> {
    is_program(Path::new(HOOK)).then_some(()).ok_or_else(|| {
        format!(
            "{HOOK}, which keeps a guest from being started on two hosts, is not there or not executable: run \
             packaging/install, then restart libvirtd or virtqemud, which looks for it when it starts"
        )
    })
}

fn is_program(path: &Path) -> bool {
    let found = path.metadata();
    found.is_ok_and(|found| found.is_file() && found.mode() & 0o111 != 0)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE).read_to_string(&mut text)?;
    Ok(text)
}

/// This host's name.
pub fn name() -> String {
    nix::unistd::gethostname().map_or_else(|_| "localhost".into(), |name| name.to_string_lossy().into_owned())
}

/// The address other hosts reach this one by, where qemu.conf names one (`migration_host`, brackets allowed).
pub fn migration_host() -> Option<String> {
    let conf = Conf::of_qemu();
    let host = conf.string("migration_host")?;
    Some(host.trim_start_matches('[').trim_end_matches(']').to_owned())
}

/// The address to listen on, where qemu.conf names one (`migration_address`).
pub fn migration_address() -> Option<String> {
    Conf::of_qemu().string("migration_address").map(str::to_owned)
}

/// The address that stands for all of this host's: as libvirt listens (libvirt 11.3, `qemuMigrationDstPrepareAny`).
pub fn any_address() -> String {
    let six = Path::new("/proc/net/if_inet6").exists();
    if six { "::" } else { "0.0.0.0" }.into()
}

/// The directory for guests' RAM files: `memory_backing_dir` in qemu.conf, with libvirt's own subdirectory where
/// it is set (libvirt 11.3, `virQEMUDriverConfigLoadMemoryEntry`: `<memory_backing_dir>/libvirt/qemu`).
pub fn memory_directory() -> PathBuf {
    match Conf::of_qemu().string("memory_backing_dir") {
        Some(directory) => Path::new(&directory).join("libvirt/qemu"),
        None => Path::new(QEMU_LIB).join("ram"),
    }
}

/// Room in a tmpfs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// All there is; as good as endless where the tmpfs has no limit.
    pub size: u64,
    /// What nobody has taken.
    pub free: u64,
}

/// The room of the tmpfs a directory is on, or would be made on; `None` on any other file system.
pub fn tmpfs(directory: &Path) -> Option<Room> {
    let there = directory.ancestors().find(|ancestor| ancestor.exists())?;
    let found = nix::sys::statfs::statfs(there).ok()?;
    let block = u64::try_from(found.block_size()).ok()?;
    let room = Room {
        size: found.blocks().saturating_mul(block),
        free: found.blocks_available().saturating_mul(block),
    };
    let endless = Room {
        size: u64::MAX,
        free: u64::MAX,
    };
    (found.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC).then_some(if room.size == 0 {
        endless
    } else {
        room
    })
}

/// Whether what is in a directory is in memory alone: a tmpfs, or huge pages.
pub fn is_in_memory(directory: &Path) -> bool {
    use nix::sys::statfs::{statfs, HUGETLBFS_MAGIC, TMPFS_MAGIC};
    let there = directory.ancestors().find(|ancestor| ancestor.exists());
    there
        .and_then(|there| statfs(there).ok())
        .is_some_and(|found| [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&found.filesystem_type()))
}

/// The socket of the private monitor of a running domain; `None` where its QEMU was started without one.
pub fn monitor(id: u32, name: &str) -> Option<PathBuf> {
    let sockets = private_directories(id, name).map(|directory| directory.join(MONITOR));
    sockets.into_iter().find(|socket| socket.exists())
}

/// Where a running domain's private directory can be: it is named by number and the first 20 characters of the name, or
/// bytes where the daemon's locale knows no such characters (libvirt 11.3, `virDomainDefGetShortName`). A guest of that
/// number from before a crash may have left one, too: its name must not do for another's that begins with it.
fn private_directories(id: u32, name: &str) -> [PathBuf; 2] {
    let characters = name
        .char_indices()
        .nth(SHORT_NAME)
        .map_or(name, |(end, _)| &name[..end]);
    let bytes = &name.as_bytes()[..name.len().min(SHORT_NAME)];
    [characters.as_bytes(), bytes].map(|short| {
        let directory = [format!("domain-{id}-").as_bytes(), short].concat();
        Path::new(QEMU_LIB).join(OsStr::from_bytes(&directory))
    })
}

/// The sockets of all private monitors on this host, those that nobody serves any more among them.
pub fn monitors() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(QEMU_LIB) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"domain-"))
        .map(|entry| entry.path().join(MONITOR))
        .filter(|socket| socket.exists())
        .collect()
}

/// Where incoming QEMUs bind the sockets the engine connects to. Below libvirt's own directory of QEMU's: SELinux's policy
/// lets guests make sockets only there (`qemu_var_run_t`), and libvirt's AppArmor profiles let them anywhere below
/// /run/libvirt (virt-aa-helper.c).
pub const INCOMING: &str = "/run/libvirt/qemu/virt-ferry";

/// Makes that directory: QEMU's alone, as the user that libvirt runs QEMU as.
pub fn make_incoming_directory() -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(INCOMING)?;
    let user = std::fs::metadata(QEMU_LIB)?;
    std::os::unix::fs::chown(INCOMING, Some(user.uid()), Some(user.gid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tmpfs_has_room() {
        assert_eq!(tmpfs(Path::new("/proc/self")), None);
        let room = tmpfs(Path::new("/dev/shm/not/there")).unwrap();
        assert!(room.size >= room.free && room.size > 0);
    }

    #[test]
    fn a_directory_is_its_own_guests() {
        let named = |name| private_directories(3, name).map(|path| path.to_string_lossy().into_owned());
        let place = |short: &str| format!("/var/lib/libvirt/qemu/domain-3-{short}");
        assert_eq!(named("web2"), [place("web2"), place("web2")]);
        let long = "a-name-of-more-than-20-characters";
        assert_eq!(named(long), [place(&long[..20]), place(&long[..20])]);
        let umlauts = "ü".repeat(30);
        assert_eq!(named(&umlauts), [place(&"ü".repeat(20)), place(&"ü".repeat(10))]);
        // Cut within a character.
        let cut = private_directories(3, &format!("x{umlauts}"));
        assert_eq!(cut[1].as_os_str().len(), place("").len() + 20);
    }

    #[test]
    fn a_hook_is_a_program() {
        assert!(is_program(&std::env::current_exe().unwrap()));
        assert!(!is_program(Path::new("/etc/passwd")) && !is_program(Path::new("/")));
        assert!(!is_program(Path::new("/no/such/hook")));
    }
}
