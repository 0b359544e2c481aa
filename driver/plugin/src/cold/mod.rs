//! Cold migration: a guest that is shut off moves with every file it owns (`virsh migrate --offline --persistent
//! --copy-storage-all`), which libvirt itself refuses.
//!
//! ```text
//!            source                                        destination
//!  Begin     real Begin, without storage (no job is held)
//!            inventory; engine: ColdServe ── ColdOffer ──▶
//!  Prepare                                                 plan; engine: ColdPull ═══ files ═══, verified
//!                                                          real Prepare
//!  Finish                                                  engine: ColdCommit: the source lets go, files placed
//!                                                          real Finish registers the guest; snapshots; ColdOwned
//!  Confirm   engine: ColdConfirm; undefine; ColdDelete
//! ```
//!
//! The real Prepare, Finish and Confirm know nothing of storage: the files are there before the first, in their places
//! before the second, and the third, which would delete what it never copied, is not called at all. Who owns the guest
//! at which moment says [`ferry_contract::cold::journal`]; what a crash leaves, [`recovery`] brings to an end. Within one
//! host, [`storage`] moves a guest's disks to another place.

mod definition;
pub mod destination;
mod durable;
mod ghost;
mod image;
mod inventory;
pub mod job;
mod machine;
mod options;
pub mod p2p;
mod plan;
mod pools;
pub mod recovery;
mod sessions;
pub mod source;
pub mod storage;

use crate::libvirt::{Error, Params};
use ferry_contract::config::Config;
use ferry_contract::control::Reply;
use ferry_host as host;
use std::time::Duration;
use virt_sys::*;

/// What makes a migration ours.
const STORAGE: u32 = VIR_MIGRATE_NON_SHARED_DISK | VIR_MIGRATE_NON_SHARED_INC;
/// Parameters about disks, which the real phases refuse without [`STORAGE`].
const DISKS: [&std::ffi::CStr; 4] = [
    VIR_MIGRATE_PARAM_MIGRATE_DISKS,
    VIR_MIGRATE_PARAM_MIGRATE_DISKS_DETECT_ZEROES,
    VIR_MIGRATE_PARAM_DISKS_PORT,
    VIR_MIGRATE_PARAM_DISKS_URI,
];

/// For what an engine does without the network or big files.
const LOCAL: Duration = Duration::from_secs(60);
/// For an engine to delete what has moved: file systems take their time over files of many TiB.
const DELETED: Duration = Duration::from_secs(60 * 60);
/// For what the two engines settle between them, an interrupted connection included.
const SETTLED: Duration = Duration::from_secs(120);

/// Whether a call asks for a cold migration with storage.
pub fn asked(flags: u32) -> bool {
    flags & VIR_MIGRATE_OFFLINE != 0 && flags & STORAGE != 0
}

/// The configuration, where this host takes part; otherwise libvirt's own error stands, and the log says why.
fn configuration() -> Option<Config> {
    let reason = match host::config() {
        Ok(config) if config.enabled => return Some(config),
        Ok(_) => crate::live::DISABLED.to_owned(),
        Err(reason) => reason,
    };
    tracing::info!("libvirt's own offline migration: {reason}");
    None
}

/// The call for the real phases: storage is ours, and no job outlives a phase.
fn for_libvirt<'a>(params: &'a Params<'_>, flags: u32) -> (Params<'a>, u32) {
    let ours = STORAGE
        | VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES
        | VIR_MIGRATE_CHANGE_PROTECTION
        | VIR_MIGRATE_COMPRESSED
        | VIR_MIGRATE_PARALLEL;
    let mut params = params.share();
    for name in DISKS.into_iter().chain([
        VIR_MIGRATE_PARAM_BANDWIDTH,
        VIR_MIGRATE_PARAM_COMPRESSION,
        VIR_MIGRATE_PARAM_COMPRESSION_ZSTD_LEVEL,
        VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS,
    ]) {
        params = params.without(name);
    }
    (params, flags & !ours)
}

/// An error of this host.
fn here(cause: impl std::fmt::Display) -> Error {
    Error::failed(format!("{cause} (on host {})", host::name()))
}

/// An engine that answers something else than what it was asked.
fn unexpected(reply: &Reply) -> Error {
    here(format!(
        "the engine answered out of turn ({reply:?}): are plug-in and engine of one release?"
    ))
}
