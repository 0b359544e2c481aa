//! The last look before QEMU writes a guest's memory without us.
//!
//! x-ignore-shared is cleared by the engine that set it, and where that dies, by the daemon. Where both die (a crash of
//! libvirtd while its engines are killed, memory running out), it stays on in a QEMU that runs on, and libvirt knows
//! nothing of it: a save, a dump, a snapshot, a migration of libvirt's own or one by hand would have no memory in it. So
//!
//! - before any of them, an engine at work is waited for, and a QEMU that still bears the mark of one has it cleared
//!   once more ([`with_its_memory`]);
//! - as a daemon starts, so has every QEMU that an earlier one left ([`sweep`](super::sweep)).

use crate::engine;
use crate::libvirt::{Domain, Error};
use crate::mark;
use crate::turns::Writing;
use ferry_contract::session::Guest;
use ferry_host as host;
use std::path::Path;
use std::time::Duration;

/// How long an engine at work is waited for: as long as libvirt waits for another's job (libvirt 11.3,
/// `VIR_JOB_WAIT_TIME`).
const BUSY: Duration = Duration::from_secs(30);

/// Makes sure that what QEMU is about to write of this guest has its memory in it, for as long as the turn is held.
///
/// # Errors
/// If that cannot be known; then nothing must be written.
pub fn with_its_memory(domain: Domain) -> Result<Option<Writing>, Error> {
    guarded(domain, BUSY)
}

/// The same for what libvirt lets pass while a guest moves, and nobody expects to wait for: an engine at work is a reason
/// to refuse it.
///
/// # Errors
/// As above.
pub fn at_once(domain: Domain) -> Result<Option<Writing>, Error> {
    guarded(domain, Duration::ZERO)
}

fn guarded(domain: Domain, patience: Duration) -> Result<Option<Writing>, Error> {
    if !domain.connection().is_qemu() {
        return Ok(None);
    }
    let Some(Guest { uuid, name }) = domain.guest() else {
        return Ok(None);
    };
    // libvirt refuses it at once: it must not keep a migration from its turn. (Who may migrate is asked first, as the other
    // question is one that libvirt logs.)
    if !domain.may_migrate() && domain.is_read_only() {
        return Ok(None);
    }
    let writing = Writing::of(uuid);
    if !writing.alone(Duration::ZERO) {
        if !patience.is_zero() {
            tracing::info!(
                guest = name,
                "who would write its memory waits for its migration to end"
            );
        }
        if patience.is_zero() || !writing.alone(patience) {
            return Err(Error::busy(&name));
        }
    }
    let found = match domain.connection().domain(uuid) {
        Ok(found) => found,
        // libvirt says so itself.
        Err(error) if error.is_no_domain() => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(monitor) = super::monitor(found.get()).filter(|monitor| mark::is_set(monitor)) else {
        return Ok(Some(writing));
    };
    rescue(&monitor).map_err(|why| {
        Error::operation(format_args!(
            "host {}: QEMU may still leave out the memory of guest {name} (x-ignore-shared), so nothing is written of it: \
             {why}. Try again once virt-ferry-engine rescue {} succeeds",
            host::name(),
            monitor.display()
        ))
    })?;
    Ok(Some(writing))
}

/// Has it cleared on the QEMU of this monitor.
pub fn rescue(monitor: &Path) -> Result<(), String> {
    // A configuration that cannot be read must not keep anybody from saving.
    let config = host::config().unwrap_or_default();
    engine::rescue(&config.engine, monitor)
}
