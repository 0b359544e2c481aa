//! Sockets inside another network namespace.

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::thread;

use anyhow::{anyhow, Context, Result};
use nix::sched::{setns, CloneFlags};

/// A UDP socket bound to `address` in the network namespace `namespace` (such as /run/netns/NAME or /proc/PID/ns/net), or in
/// the caller's own. A socket stays in the namespace it was made in, so only a passing thread of ours has to go there.
///
/// # Errors
/// If the namespace cannot be entered (needs root) or the address is taken.
pub fn udp_socket(namespace: Option<&Path>, address: SocketAddr) -> Result<UdpSocket> {
    let bind = move || UdpSocket::bind(address).with_context(|| format!("cannot bind {address}"));
    let Some(path) = namespace else {
        return bind();
    };
    let path = path.to_owned();
    let visit = thread::spawn(move || {
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {}", path.display()))?;
        bind()
    });
    visit
        .join()
        .map_err(|_| anyhow!("the thread in the other namespace panicked"))?
}
