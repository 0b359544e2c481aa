//! The last look before QEMU writes a guest's memory without us.
//!
//! x-ignore-shared is cleared by the engine that set it, and where that dies, by the daemon. Where both die (a crash of
//! libvirtd while its engines are killed, memory running out), it stays on in a QEMU that runs on, and libvirt knows
//! nothing of it: a save, a dump, a snapshot or a migration of libvirt's own would have no memory in it. So before any
//! of them, a QEMU that still bears the mark of an engine at work has it cleared once more.

use crate::engine;
use crate::libvirt::{Domain, Error};
use crate::mark;
use crate::sessions::{self, Role};
use ferry_host as host;

/// Makes sure that what QEMU is about to write of this guest has its memory in it.
///
/// # Errors
/// If that cannot be known; then nothing must be written.
pub fn with_its_memory(domain: Domain) -> Result<(), Error> {
    if !domain.connection().is_qemu() {
        return Ok(());
    }
    let (Some(guest), Some(id)) = (domain.guest(), domain.id()) else {
        return Ok(());
    };
    let Some(monitor) = host::monitor(id, &guest.name).filter(|monitor| mark::is_set(monitor)) else {
        return Ok(());
    };
    let under_way =
        |role| sessions::by_uuid(role, guest.uuid).is_some_and(|session| !session.engine.is_gone());
    if under_way(Role::Source) || under_way(Role::Destination) {
        // libvirt holds a job, and refuses whatever would come between.
        return Ok(());
    }
    // A configuration that cannot be read must not keep anybody from saving.
    let config = host::config().unwrap_or_default();
    engine::rescue(&config.engine, &monitor).map_err(|why| {
        Error::failed(format!(
            "host {}: QEMU may still leave out the memory of guest {} (x-ignore-shared), so nothing is written of it: {why}. \
             Try again once virt-ferry-engine rescue {} succeeds",
            host::name(),
            guest.name,
            monitor.display()
        ))
    })
}
