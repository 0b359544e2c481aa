//! What becomes of each option of a call, by flags and parameters: pure.
//!
//! The engine does it, libvirt's own phases see it and do or refuse it, or it is about a guest that runs and has nothing
//! to mean here ([`RUNNING`]). Whatever else is asked is refused: nothing that protects the data, or says which way it
//! is to go, is passed over in silence.

use super::STORAGE;
use crate::libvirt::Params;
use std::ffi::CStr;
use virt_sys::*;

/// What libvirt's own phases see; it refuses a tunnel.
const LIBVIRTS: u32 = VIR_MIGRATE_OFFLINE
    | VIR_MIGRATE_LIVE
    | VIR_MIGRATE_PEER2PEER
    | VIR_MIGRATE_TUNNELLED
    | VIR_MIGRATE_PERSIST_DEST
    | VIR_MIGRATE_UNDEFINE_SOURCE
    | VIR_MIGRATE_CHANGE_PROTECTION
    | VIR_MIGRATE_UNSAFE;
/// What the engine does.
const OURS: u32 = STORAGE | VIR_MIGRATE_COMPRESSED | VIR_MIGRATE_PARALLEL;
/// What is said of memory, vCPUs, or writes that go on: there are none.
const RUNNING: u32 = VIR_MIGRATE_PAUSED
    | VIR_MIGRATE_ABORT_ON_ERROR
    | VIR_MIGRATE_AUTO_CONVERGE
    | VIR_MIGRATE_POSTCOPY
    | VIR_MIGRATE_RDMA_PIN_ALL
    | VIR_MIGRATE_ZEROCOPY
    | VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES;

/// The parameters of all these.
const TAKEN: [&CStr; 13] = [
    VIR_MIGRATE_PARAM_DEST_NAME,
    VIR_MIGRATE_PARAM_DEST_XML,
    VIR_MIGRATE_PARAM_PERSIST_XML,
    VIR_MIGRATE_PARAM_MIGRATE_DISKS,
    // Zeros are always looked for.
    VIR_MIGRATE_PARAM_MIGRATE_DISKS_DETECT_ZEROES,
    VIR_MIGRATE_PARAM_BANDWIDTH,
    VIR_MIGRATE_PARAM_COMPRESSION,
    VIR_MIGRATE_PARAM_COMPRESSION_ZSTD_LEVEL,
    VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS,
    VIR_MIGRATE_PARAM_GRAPHICS_URI,
    VIR_MIGRATE_PARAM_AUTO_CONVERGE_INITIAL,
    VIR_MIGRATE_PARAM_AUTO_CONVERGE_INCREMENT,
    VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY,
];

/// Parameters that say which way the data is to go.
const WAYS: [&CStr; 4] = [
    VIR_MIGRATE_PARAM_URI,
    VIR_MIGRATE_PARAM_LISTEN_ADDRESS,
    VIR_MIGRATE_PARAM_DISKS_PORT,
    VIR_MIGRATE_PARAM_DISKS_URI,
];

/// Whether a call can be done as it is asked; `tls_is_forced` is this host's `migrate_tls_force`.
///
/// # Errors
/// What cannot be done, and what to do.
pub fn check(params: &Params, flags: u32, tls_is_forced: bool) -> Result<(), String> {
    if flags & VIR_MIGRATE_TLS != 0 {
        return Err(
            "libvirt's own certificates (--tls) are not used for a guest that is shut off: leave --tls out. The move is \
             encrypted all the same, by TLS 1.3 with certificates made for it, unless virt-ferry.toml says encryption = \
             \"never\" on both hosts"
                .into(),
        );
    }
    if tls_is_forced {
        return Err(
            "a guest that is shut off cannot be moved with libvirt's own certificates, and this host allows nothing else \
             (migrate_tls_force in qemu.conf)"
                .into(),
        );
    }
    if let other @ 1.. = flags & !(LIBVIRTS | OURS | RUNNING) {
        return Err(format!("an option of this call is not known ({other:#x})"));
    }
    for name in params.names() {
        let shown = name.to_string_lossy();
        if WAYS.contains(&name) {
            return Err(format!(
                "{shown} is not heeded for a guest that is shut off: leave it out. The destination connects to the source, \
                 by migration_host of the source's qemu.conf, to a port in ports of its virt-ferry.toml"
            ));
        }
        if !TAKEN.contains(&name) {
            return Err(format!(
                "the parameter {shown} is not known for a guest that is shut off"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = VIR_MIGRATE_OFFLINE | VIR_MIGRATE_PERSIST_DEST | VIR_MIGRATE_NON_SHARED_DISK;

    fn refused(params: &Params, flags: u32) -> String {
        check(params, flags, false).unwrap_err()
    }

    #[test]
    fn what_means_nothing_here_is_no_obstacle() {
        let given = Params::none()
            .with(VIR_MIGRATE_PARAM_DEST_NAME, "new")
            .with_number(VIR_MIGRATE_PARAM_BANDWIDTH, 5)
            .with_integer(VIR_MIGRATE_PARAM_AUTO_CONVERGE_INITIAL, 30);
        assert_eq!(check(&given, ALL | OURS | LIBVIRTS | RUNNING, false), Ok(()));
    }

    #[test]
    fn what_protects_the_data_is_not_passed_over() {
        assert!(refused(&Params::none(), ALL | VIR_MIGRATE_TLS).contains("--tls"));
        for flags in [ALL, ALL | VIR_MIGRATE_TLS] {
            assert!(check(&Params::none(), flags, true).is_err());
        }
    }

    #[test]
    fn nor_is_the_way_it_is_to_go_or_what_is_not_known() {
        for way in WAYS {
            let refusal = refused(&Params::none().with(way, "tcp://10.0.0.1"), ALL);
            let name = way.to_string_lossy();
            assert!(
                refusal.contains(&*name) && refusal.contains("migration_host"),
                "{refusal}"
            );
        }
        let unknown = Params::none().with(c"new_in_libvirt_20", "x");
        assert!(refused(&unknown, ALL).contains("new_in_libvirt_20"));
        assert!(refused(&Params::none(), ALL | 1 << 31).contains("0x80000000"));
    }
}
