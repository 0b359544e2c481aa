//! What an earlier daemon left, whose engines died with it or are about to end: found as a daemon starts, before libvirt
//! looks at any guest.

use super::guard::rescue;
use crate::mark;
use ferry_host as host;
use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Clears it up.
pub fn sweep() {
    let config = host::config().unwrap_or_default();
    sockets(&config.runtime_directory);
    sockets(Path::new(host::INCOMING));
    guests();
}

/// Has every QEMU that bears the mark of an engine honour its memory again: the dump that libvirt makes when a guest's
/// watchdog fires passes no function of ours, and so no guard (libvirt 11.3, `processWatchdogEvent`). An engine that is
/// still at work has its QEMU's monitor for itself.
fn guests() {
    let marked: Vec<_> = host::monitors()
        .into_iter()
        .filter(|monitor| mark::is_set(monitor))
        .collect();
    std::thread::scope(|scope| {
        for monitor in &marked {
            let run = move || match rescue(monitor) {
                Ok(()) => tracing::warn!(
                    ?monitor,
                    "an earlier daemon left a migration; x-ignore-shared is off"
                ),
                // Its QEMU has ended, most likely.
                Err(why) => tracing::warn!(
                    ?monitor,
                    "an earlier daemon left a migration; x-ignore-shared may be on: {why}"
                ),
            };
            // Without a thread there is still the guard.
            let _ = std::thread::Builder::new()
                .name("ferry-sweep".into())
                .spawn_scoped(scope, run);
        }
    });
}

/// Removes the sockets that nobody has open any more. They are not connected to: an incoming QEMU would take that for its
/// migration, should another daemon be at work here.
fn sockets(directory: &Path) {
    let (Ok(entries), Ok(open)) = (std::fs::read_dir(directory), std::fs::read("/proc/self/net/unix")) else {
        return;
    };
    let open: HashSet<&[u8]> = open.split(|byte| *byte == b'\n').filter_map(path).collect();
    for entry in entries.flatten() {
        let path = entry.path();
        let dead = !open.contains(path.as_os_str().as_bytes());
        if dead && entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            // One that stays is in nobody's way.
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// The path in a line of `/proc/net/unix`, behind seven other columns.
fn path(line: &[u8]) -> Option<&[u8]> {
    let start = line.iter().position(|byte| *byte == b'/')?;
    Some(&line[start..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_dead_sockets_go() {
        let directory = std::env::temp_dir().join(format!("ferry-sweep-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (dead, alive, file) = (
            directory.join("dead"),
            directory.join("alive"),
            directory.join("file"),
        );
        drop(UnixListener::bind(&dead).unwrap());
        let _listener = UnixListener::bind(&alive).unwrap();
        std::fs::write(&file, "").unwrap();
        sockets(&directory);
        assert!(!dead.exists() && alive.exists() && file.exists());
        std::fs::remove_dir_all(&directory).unwrap();
        sockets(&directory);
    }
}
