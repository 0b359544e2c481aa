//! Which calls the engine takes: pure, by flags and parameters. The guest itself is the engine's to judge.

use crate::libvirt::Params;
use std::ffi::CStr;
use virt_sys::*;

/// Flags under which the engine moves the memory.
const TAKEN: u32 = VIR_MIGRATE_LIVE
    | VIR_MIGRATE_PEER2PEER
    | VIR_MIGRATE_PERSIST_DEST
    | VIR_MIGRATE_UNDEFINE_SOURCE
    | VIR_MIGRATE_PAUSED
    | VIR_MIGRATE_CHANGE_PROTECTION
    | VIR_MIGRATE_UNSAFE
    | VIR_MIGRATE_ABORT_ON_ERROR;

/// Flags whose name tells an operator why libvirt's own way was taken.
const NAMES: &[(u32, &str)] = &[
    (VIR_MIGRATE_TUNNELLED, "tunnelled"),
    (VIR_MIGRATE_NON_SHARED_DISK, "copy-storage-all"),
    (VIR_MIGRATE_NON_SHARED_INC, "copy-storage-inc"),
    (VIR_MIGRATE_OFFLINE, "offline"),
    (VIR_MIGRATE_COMPRESSED, "compressed"),
    (VIR_MIGRATE_AUTO_CONVERGE, "auto-converge"),
    (VIR_MIGRATE_RDMA_PIN_ALL, "rdma-pin-all"),
    (VIR_MIGRATE_POSTCOPY, "postcopy"),
    (VIR_MIGRATE_TLS, "tls"),
    (VIR_MIGRATE_PARALLEL, "parallel"),
    (VIR_MIGRATE_POSTCOPY_RESUME, "postcopy-resume"),
    (VIR_MIGRATE_ZEROCOPY, "zerocopy"),
];

/// Parameters the engine's way honours.
const HONOURED: [&CStr; 6] = [
    VIR_MIGRATE_PARAM_URI,
    VIR_MIGRATE_PARAM_DEST_NAME,
    VIR_MIGRATE_PARAM_DEST_XML,
    VIR_MIGRATE_PARAM_PERSIST_XML,
    VIR_MIGRATE_PARAM_GRAPHICS_URI,
    VIR_MIGRATE_PARAM_LISTEN_ADDRESS,
];

/// Why a call is libvirt's own, or `None` where the engine takes it.
pub fn refusal(params: &Params, flags: u32) -> Option<String> {
    if flags & VIR_MIGRATE_LIVE == 0 {
        return Some("the guest is to be paused for its whole move (no --live)".into());
    }
    if let other @ 1.. = flags & !TAKEN {
        let named = NAMES
            .iter()
            .filter(|(flag, _)| other & flag != 0)
            .map(|(_, name)| *name);
        let names: Vec<_> = named.collect();
        return Some(format!(
            "the engine does not take these options: {} ({other:#x})",
            names.join(", ")
        ));
    }
    // OpenStack always says how much bandwidth the move may take: 0, which is no limit (libvirt 11.3, libvirt-domain.h).
    let unlimited = params.number(VIR_MIGRATE_PARAM_BANDWIDTH) == Some(0);
    let taken = |name: &CStr| HONOURED.contains(&name) || name == VIR_MIGRATE_PARAM_BANDWIDTH && unlimited;
    let other = params.names().find(|name| !taken(name))?;
    Some(format!(
        "the engine does not take the parameter {}",
        other.to_string_lossy()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_virsh_and_openstack_send_is_taken() {
        let virsh = VIR_MIGRATE_LIVE | VIR_MIGRATE_CHANGE_PROTECTION;
        let nova =
            VIR_MIGRATE_LIVE | VIR_MIGRATE_PEER2PEER | VIR_MIGRATE_PERSIST_DEST | VIR_MIGRATE_UNDEFINE_SOURCE;
        assert_eq!(refusal(&Params::none(), virsh), None);
        assert_eq!(
            refusal(&Params::none().with(c"migrate_uri", "tcp://host"), nova),
            None
        );
    }

    #[test]
    fn only_a_real_limit_of_bandwidth_is_not_taken() {
        let refused = |limit| {
            let (mut entries, mut count, mut room) = (std::ptr::null_mut(), 0, 0);
            let name = VIR_MIGRATE_PARAM_BANDWIDTH.as_ptr();
            // SAFETY: a list made here, read while it lives, and freed once.
            unsafe {
                assert_eq!(virInitialize(), 0);
                assert_eq!(
                    virTypedParamsAddULLong(&mut entries, &mut count, &mut room, name, limit),
                    0
                );
                let refused = refusal(&Params::borrow(entries, count), VIR_MIGRATE_LIVE);
                virTypedParamsFree(entries, count);
                refused
            }
        };
        assert_eq!(refused(0), None);
        assert!(refused(100).unwrap().contains("bandwidth"));
    }

    #[test]
    fn what_is_not_is_named() {
        assert!(refusal(&Params::none(), 0).unwrap().contains("--live"));
        let postcopy = VIR_MIGRATE_LIVE | VIR_MIGRATE_POSTCOPY | VIR_MIGRATE_TLS;
        assert!(refusal(&Params::none(), postcopy)
            .unwrap()
            .contains("postcopy, tls"));
        assert!(refusal(&Params::none(), VIR_MIGRATE_LIVE | 1 << 31).is_some());
        let disks = Params::none().with(c"migrate_disks", "vda");
        assert!(refusal(&disks, VIR_MIGRATE_LIVE)
            .unwrap()
            .contains("migrate_disks"));
    }
}
