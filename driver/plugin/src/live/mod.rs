//! Live migration: libvirt's five phases with the engine between them.
//!
//! ```text
//!            source                                        destination
//!  Begin     real Begin; engine: Inspect ── Offer ─────▶
//!  Prepare                                                 engine: Reserve; real Prepare (QEMU waits on a unix
//!                                    ◀───────── Answer ──  socket); engine: Attach, listens
//!  Perform   engine: Precopy ═══════ memory ═══════════▶
//!            real Perform into the engine's socket
//!            engine: last copy ═════ memory ═══════════▶   engine: applied, checked: commitment
//!                    relay ═════════ device state ═════▶   relay
//!  Finish                                                  engine: Finish; real Finish resumes the guest
//!  Confirm   real Confirm ends the source; engine: Conclude
//! ```
//!
//! A phase that finds no session, or a flag, parameter or guest that is not ours, is libvirt's own.

pub mod destination;
pub mod guard;
pub mod job;
mod moved;
pub mod options;
mod orphan;
pub mod p2p;
pub mod source;
pub mod sweep;
pub mod uri;

use crate::libvirt::{Domain, Error};
use ferry_contract::config::Config;
use ferry_contract::control::{Failure, FailureKind, Reply, Settings};
use ferry_host as host;
use std::path::PathBuf;
use std::time::Duration;
use virt_sys::VIR_MIGRATE_TLS;

/// For what an engine does without the network: looking at a QEMU, binding a socket.
const LOCAL: Duration = Duration::from_secs(30);
/// For the destination's QEMU to take in the last of its stream once libvirt is at Finish.
const LOADED: Duration = Duration::from_secs(60);

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure.kind {
            FailureKind::Cancelled => Self::cancelled(),
            FailureKind::Failed | FailureKind::Libvirt => Self::failed(failure),
        }
    }
}

/// Why a host goes libvirt's own way that is told to.
pub const DISABLED: &str = "virt-ferry is disabled in its configuration";

/// What the engine is told of this host, for a call with these flags; or why the migration is libvirt's own.
fn settings(config: &Config, flags: u32) -> Result<Settings, String> {
    let tls = flags & VIR_MIGRATE_TLS != 0;
    Ok(Settings {
        certificates: tls.then(host::certificates).transpose()?,
        ..config.settings()
    })
}

/// The private monitor of a guest that libvirt itself has looked up: name and number as a client sends them may be old,
/// or another guest's.
fn monitor(found: Domain) -> Option<PathBuf> {
    host::monitor(found.id()?, &found.guest()?.name)
}

/// An engine that answers something else than what it was asked.
fn unexpected(reply: &Reply) -> Error {
    Error::failed(format!(
        "the engine answered out of turn ({reply:?}): are plug-in and engine of one release?"
    ))
}
