//! Keeps the daemon from ending itself while there is something left to do.
//!
//! libvirtd and virtqemud are started by their sockets and end after two minutes without a client and without a running
//! guest (`--timeout 120` in their units; libvirt 11.3, `virNetDaemonShutdownTimerUpdate`). A client may be gone while an
//! engine still works, and nobody need call while an interrupted migration is tried again. A guest that runs inhibits
//! that end inside libvirt, by functions no library has; what anybody can do is to be a client. So we are one: a
//! connection to the daemon's own socket on which nothing is ever said. The event loop takes it in, no worker is needed,
//! and it does not keep the daemon from ending when it is told to.

use nix::sys::socket::{connect, socket, AddressFamily, SockFlag, SockType, UnixAddr};
use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

/// The daemons' sockets for clients that may write.
const SOCKETS: [&str; 2] = ["libvirt-sock", "virtqemud-sock"];

/// The one connection, and who needs it.
#[derive(Default)]
struct Client {
    needed: usize,
    connection: Option<OwnedFd>,
}

static CLIENT: Mutex<Client> = Mutex::new(Client {
    needed: 0,
    connection: None,
});

fn client() -> MutexGuard<'static, Client> {
    // A count and what hangs on it, written in one step.
    CLIENT.lock().unwrap_or_else(|e| e.into_inner())
}

/// The daemon does not end by itself until this is dropped.
#[derive(Debug)]
pub struct Awake(());

/// Has the daemon stay; where that cannot be, it goes on as it always did, and the journal says what is left to do.
pub fn stay() -> Awake {
    let mut client = client();
    client.needed += 1;
    if client.connection.is_none() {
        client.connection = own_socket()
            .ok_or(nix::Error::ENOENT)
            .and_then(|path| client_of(&path))
            .inspect_err(|error| tracing::debug!("nothing keeps the daemon from ending itself: {error}"))
            .ok();
    }
    Awake(())
}

impl Drop for Awake {
    fn drop(&mut self) {
        let mut client = client();
        client.needed -= 1;
        if client.needed == 0 {
            client.connection = None;
        }
    }
}

/// Never waits: the daemon may be busy, or have all the clients it takes.
fn client_of(path: &Path) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connection = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(connection.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(connection)
}

/// The socket on which this process is called, wherever it was told to make it.
fn own_socket() -> Option<PathBuf> {
    let own: HashSet<String> = std::fs::read_dir("/proc/self/fd")
        .ok()?
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| {
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some(inode.to_owned())
        })
        .collect();
    // Anybody may give a socket a name that is no text.
    let sockets = std::fs::read("/proc/self/net/unix").ok()?;
    listening(&String::from_utf8_lossy(&sockets), |inode| own.contains(inode))
}

/// The first of our [`SOCKETS`] in the kernel's list (`Num RefCount Protocol Flags Type St Inode Path`).
fn listening(sockets: &str, is_own: impl Fn(&str) -> bool) -> Option<PathBuf> {
    sockets.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(6);
        let (inode, path) = (fields.next()?, Path::new(fields.next()?));
        let name = path.file_name()?.to_str()?;
        (SOCKETS.contains(&name) && is_own(inode)).then(|| path.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_socket_is_called() {
        let list = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 11 /run/libvirt/libvirt-sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12 /run/libvirt/libvirt-sock-ro\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 13\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 14 /srv/virtqemud-sock\n";
        let found = |inode: &str| listening(list, |own| own == inode);
        assert_eq!(found("11"), Some("/run/libvirt/libvirt-sock".into()));
        assert_eq!(found("14"), Some("/srv/virtqemud-sock".into()));
        for none in ["12", "13", "15"] {
            assert_eq!(found(none), None);
        }
    }

    /// In a process that is called on such a socket, as long as anybody needs it, and one connection for all.
    #[test]
    fn it_is_one_client_until_the_last_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let listener = std::os::unix::net::UnixListener::bind(directory.path().join(SOCKETS[0])).unwrap();
        listener.set_nonblocking(true).unwrap();
        let [first, second] = [stay(), stay()];
        let (mut called, _) = listener.accept().unwrap();
        assert!(listener.accept().is_err());
        let mut ended = || {
            called.set_nonblocking(true).unwrap();
            matches!(std::io::Read::read(&mut called, &mut [0]), Ok(0))
        };
        drop(first);
        assert!(!ended());
        drop(second);
        assert!(ended());
    }
}
