//! Reservation: would this guest fit on this host? Asked before libvirt starts anything.

use super::Error;
use ferry_contract::session::Block;
use std::collections::BTreeSet;
use std::path::Path;

/// What this host has, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Free on the file system that holds guests' RAM files; as good as endless where that has no limit.
    pub file_system: u64,
    /// Memory that can be had without swapping (MemAvailable).
    pub memory: u64,
}

/// A guest that does not fit; each cause names the numbers, in MiB.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest needs {needed} MiB of memory and {promised} MiB are promised to other guests on their way here, \
     but {place} has {room} MiB left; free memory there, or choose another host"
)]
pub struct NoRoom {
    needed: u64,
    promised: u64,
    room: u64,
    place: String,
}

/// Whether the resident part of these blocks fits beside what is promised already. The rest of a guest's memory is
/// as overcommitted as it was at the source.
pub fn check(blocks: &[Block], promised: u64, room: Room, directory: &Path) -> Result<(), NoRoom> {
    let needed = blocks
        .iter()
        .map(|block| block.resident)
        .fold(0, u64::saturating_add);
    let places = [
        (
            room.file_system,
            format!("the file system of {} (memory_backing_dir)", directory.display()),
        ),
        (room.memory, "the host's memory".to_owned()),
    ];
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    for (room, place) in places {
        if needed.saturating_add(promised) > room {
            return Err(NoRoom {
                needed: mib(needed),
                promised: mib(promised),
                room: mib(room),
                place,
            });
        }
    }
    Ok(())
}

/// Whether the blocks of huge pages fit into what the host has set aside: all of them, as QEMU takes them as it starts.
/// `promised` bytes are for guests whose QEMU has not.
pub fn check_huge(blocks: &[Block], promised: u64, free: impl Fn(u64) -> u64) -> Result<(), NoRoom> {
    let sizes: BTreeSet<u64> = blocks.iter().map(|block| block.page).collect();
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    for page in sizes {
        let these = blocks.iter().filter(|block| block.page == page);
        let needed = these.map(|block| block.size).fold(0, u64::saturating_add);
        let room = free(page);
        if needed.saturating_add(promised) > room {
            return Err(NoRoom {
                needed: mib(needed),
                promised: mib(promised),
                room: mib(room),
                place: format!(
                    "the host's pool of huge pages of {} KiB (/sys/kernel/mm/hugepages)",
                    page >> 10
                ),
            });
        }
    }
    Ok(())
}

/// Bytes of free huge pages of this size that nobody has a claim to, those the kernel may make when asked included.
pub fn free_huge(page: u64) -> u64 {
    let figure = |name: &str| -> u64 {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", page >> 10);
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let free = figure("free_hugepages").saturating_sub(figure("resv_hugepages"));
    let more = figure("nr_overcommit_hugepages").saturating_sub(figure("surplus_hugepages"));
    free.saturating_add(more).saturating_mul(page)
}

/// The kind of file system guests' RAM files lie on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Memory: tmpfs.
    Memory,
    /// Anything else would write a guest's memory to a disk.
    Other,
}

/// Looks at this host.
pub fn survey(directory: &Path) -> Result<(Room, Backing), Error> {
    let (file_system, backing) = match ferry_host::tmpfs(directory) {
        Some(room) => (room.free, Backing::Memory),
        None => (0, Backing::Other),
    };
    let text = std::fs::read_to_string("/proc/meminfo").map_err(Error::system("read /proc/meminfo"))?;
    let memory =
        available(&text).ok_or_else(|| Error::Elsewhere("/proc/meminfo has no MemAvailable".into()))?;
    Ok((Room { file_system, memory }, backing))
}

/// MemAvailable in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_contract::session::PAGE;

    fn blocks() -> Vec<Block> {
        vec![Block {
            name: "pc.ram".into(),
            size: 1 << 30,
            resident: 100 << 20,
            page: PAGE,
        }]
    }

    #[test]
    fn what_is_promised_counts() {
        let room = Room {
            file_system: 150 << 20,
            memory: 1 << 30,
        };
        let directory = Path::new("/ram");
        assert_eq!(check(&blocks(), 50 << 20, room, directory), Ok(()));
        let error = check(&blocks(), 51 << 20, room, directory)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("100 MiB") && error.contains("/ram") && error.contains("150 MiB left"),
            "{error}"
        );
    }

    #[test]
    fn the_hosts_memory_counts_too() {
        let room = Room {
            file_system: u64::MAX,
            memory: 99 << 20,
        };
        let error = check(&blocks(), 0, room, Path::new("/ram"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("the host's memory"), "{error}");
        assert!(check(&blocks(), u64::MAX, room, Path::new("/ram")).is_err());
    }

    #[test]
    fn huge_pages_are_taken_whole() {
        let huge = |name: &str, page| Block {
            name: name.into(),
            page,
            ..blocks()[0].clone()
        };
        let both = [huge("a", 2 << 20), huge("b", 2 << 20), huge("c", 1 << 30)];
        let free = |small: u64| move |page| if page == 1 << 30 { 2 << 30 } else { small };
        assert_eq!(check_huge(&both, 1 << 20, free((2 << 30) + (1 << 20))), Ok(()));
        let error = check_huge(&both, 1 << 20, free(2 << 30)).unwrap_err().to_string();
        assert!(
            error.contains("2048 MiB") && error.contains("huge pages of 2048 KiB"),
            "{error}"
        );
        assert_eq!(free_huge(12345 << 10), 0, "there are none of that size");
    }

    #[test]
    fn meminfo_is_read() {
        assert_eq!(
            available("MemTotal: 5 kB\nMemAvailable:   17 kB\n"),
            Some(17 * 1024)
        );
        assert_eq!(available("MemFree: 5 kB\n"), None);
        assert_eq!(available("MemAvailable: 99999999999999999999 kB\n"), None);
    }

    #[test]
    fn a_directory_still_to_be_made_is_surveyed_by_its_parent() {
        let (room, backing) = survey(Path::new("/dev/shm/virt-ferry/none")).unwrap();
        assert_eq!(backing, Backing::Memory);
        assert!(room.file_system > 0 && room.memory > 0);
        assert_eq!(survey(Path::new("/proc")).unwrap().1, Backing::Other);
    }

    /// A tmpfs of its own, as `mount` was told.
    struct Mounted(tempfile::TempDir);

    impl Mounted {
        fn new(options: &str) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let mut mount = std::process::Command::new("mount");
            let mount = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]);
            assert!(mount.arg(directory.path()).status().unwrap().success());
            Self(directory)
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg(self.0.path()).status();
        }
    }

    #[test]
    fn a_tmpfs_without_a_limit_is_never_full() {
        let endless = Mounted::new("size=0");
        let (room, backing) = survey(endless.0.path()).unwrap();
        assert_eq!((room.file_system, backing), (u64::MAX, Backing::Memory));
        assert_eq!(
            check(
                &blocks(),
                0,
                Room {
                    memory: u64::MAX,
                    ..room
                },
                endless.0.path()
            ),
            Ok(())
        );
        let small = Mounted::new("size=8m");
        assert_eq!(survey(small.0.path()).unwrap().0.file_system, 8 << 20);
    }
}
