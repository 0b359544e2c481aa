//! What a call asks of the migration, in the engine's terms: pure, by flags and parameters. The guest itself is the
//! engine's to judge.
//!
//! Three things become of an option: libvirt's own phases see it and do it (names, definitions, disks), the engine does
//! it and the phases do not see it ([`for_libvirt`]), or the whole migration is libvirt's own.

use crate::libvirt::Params;
use ferry_contract::control::{AutoConverge, Options};
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
    | VIR_MIGRATE_ABORT_ON_ERROR
    | STORAGE
    | VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES
    | DONE_BY_ENGINE;

/// libvirt copies disks, over NBD.
pub const STORAGE: u32 = VIR_MIGRATE_NON_SHARED_DISK | VIR_MIGRATE_NON_SHARED_INC;

/// What the engine does in QEMU's place: QEMU's part of the move is too small for any of it.
/// TLS also protects QEMU's own stream, which the engine relays inside its connections.
const DONE_BY_ENGINE: u32 =
    VIR_MIGRATE_PARALLEL | VIR_MIGRATE_COMPRESSED | VIR_MIGRATE_AUTO_CONVERGE | VIR_MIGRATE_TLS;

/// Flags whose name tells an operator why libvirt's own way was taken.
const NAMES: &[(u32, &str)] = &[
    (VIR_MIGRATE_TUNNELLED, "tunnelled"),
    (VIR_MIGRATE_OFFLINE, "offline"),
    (VIR_MIGRATE_RDMA_PIN_ALL, "rdma-pin-all"),
    (VIR_MIGRATE_POSTCOPY, "postcopy"),
    (VIR_MIGRATE_POSTCOPY_RESUME, "postcopy-resume"),
    (VIR_MIGRATE_ZEROCOPY, "zerocopy"),
];

/// Parameters that libvirt's phases see and do.
const DONE_BY_LIBVIRT: [&CStr; 11] = [
    VIR_MIGRATE_PARAM_URI,
    VIR_MIGRATE_PARAM_DEST_NAME,
    VIR_MIGRATE_PARAM_DEST_XML,
    VIR_MIGRATE_PARAM_PERSIST_XML,
    VIR_MIGRATE_PARAM_GRAPHICS_URI,
    VIR_MIGRATE_PARAM_LISTEN_ADDRESS,
    VIR_MIGRATE_PARAM_BANDWIDTH,
    VIR_MIGRATE_PARAM_MIGRATE_DISKS,
    VIR_MIGRATE_PARAM_MIGRATE_DISKS_DETECT_ZEROES,
    VIR_MIGRATE_PARAM_DISKS_PORT,
    VIR_MIGRATE_PARAM_DISKS_URI,
];

/// Parameters of what the engine does: each with the flag it belongs to, without which libvirt refuses it.
const TUNING: [(&CStr, u32); 6] = [
    (VIR_MIGRATE_PARAM_TLS_DESTINATION, VIR_MIGRATE_TLS),
    (VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, VIR_MIGRATE_PARALLEL),
    (VIR_MIGRATE_PARAM_COMPRESSION, VIR_MIGRATE_COMPRESSED),
    (VIR_MIGRATE_PARAM_COMPRESSION_ZSTD_LEVEL, VIR_MIGRATE_COMPRESSED),
    (VIR_MIGRATE_PARAM_AUTO_CONVERGE_INITIAL, VIR_MIGRATE_AUTO_CONVERGE),
    (
        VIR_MIGRATE_PARAM_AUTO_CONVERGE_INCREMENT,
        VIR_MIGRATE_AUTO_CONVERGE,
    ),
];

/// QEMU's channels where nobody says how many (QEMU 10.0, `DEFAULT_MIGRATE_MULTIFD_CHANNELS`).
const PARALLEL: u16 = 2;
/// The most streams an engine serves.
const MOST_STREAMS: u16 = 16;
/// zstd's own default level is 3; QEMU's for migration is 1.
const ZSTD: i32 = 1;
/// The largest limit libvirt takes, in MiB/s.
const MOST_MIB: u64 = (i64::MAX as u64) >> 20;

/// What the engine is to do, or why a call is libvirt's own.
pub fn read(params: &Params, flags: u32) -> Result<Options, String> {
    if let other @ 1.. = flags & !TAKEN {
        let named = NAMES
            .iter()
            .filter(|(flag, _)| other & flag != 0)
            .map(|(_, name)| *name);
        let names: Vec<_> = named.collect();
        return Err(format!(
            "the engine does not take these options: {} ({other:#x})",
            names.join(", ")
        ));
    }
    for name in params.names() {
        let tunes = TUNING
            .iter()
            .any(|(tuning, flag)| *tuning == name && flags & flag != 0);
        if !tunes && !DONE_BY_LIBVIRT.contains(&name) {
            let name = name.to_string_lossy();
            return Err(format!("the engine does not take the parameter {name}"));
        }
    }
    let storage = flags & STORAGE != 0;
    if storage && flags & VIR_MIGRATE_TLS != 0 {
        return Err(
            "libvirt protects the disks it copies only where it protects all of the migration (tls)".into(),
        );
    }
    Ok(Options {
        // Disks are copied while the guest runs; libvirt stops it after that.
        paused: flags & VIR_MIGRATE_LIVE == 0 && !storage,
        bandwidth: bandwidth(params.number(VIR_MIGRATE_PARAM_BANDWIDTH).unwrap_or(0))?,
        streams: streams(params, flags)?,
        compression: compression(params, flags)?,
        auto_converge: auto_converge(params, flags)?,
        storage,
        tls_name: tls_name(params, flags),
    })
}

/// The name that the destination's certificate must bear, where the operator has said so; as for QEMU, an empty name is
/// none.
fn tls_name(params: &Params, flags: u32) -> Option<String> {
    let name = params.utf8(VIR_MIGRATE_PARAM_TLS_DESTINATION);
    name.filter(|name| flags & VIR_MIGRATE_TLS != 0 && !name.is_empty())
        .map(str::to_owned)
}

/// libvirt's MiB/s in bytes a second. OpenStack always says how much: 0, which is no limit, as is libvirt's largest
/// value, its default (libvirt 11.3, `QEMU_DOMAIN_MIG_BANDWIDTH_MAX`).
pub fn bandwidth(mib: u64) -> Result<u64, String> {
    match mib {
        MOST_MIB => Ok(0),
        0..MOST_MIB => Ok(mib << 20),
        _ => Err(format!("a bandwidth of {mib} MiB/s is out of range")),
    }
}

/// libvirt and QEMU know up to 255; more streams than the engine serves bring nothing.
pub fn streams(params: &Params, flags: u32) -> Result<Option<u16>, String> {
    if flags & VIR_MIGRATE_PARALLEL == 0 {
        return Ok(None);
    }
    match params.integer(VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS) {
        None => Ok(Some(PARALLEL)),
        Some(count @ 1..=255) => Ok(Some((count as u16).min(MOST_STREAMS))),
        Some(count) => Err(format!("{count} parallel connections are out of range")),
    }
}

/// The engine's compression is zstd; whoever asks for another method by name gets that one from QEMU.
pub fn compression(params: &Params, flags: u32) -> Result<Option<i32>, String> {
    if flags & VIR_MIGRATE_COMPRESSED == 0 {
        return Ok(None);
    }
    if let Some(method) = params
        .utf8(VIR_MIGRATE_PARAM_COMPRESSION)
        .filter(|method| *method != "zstd")
    {
        return Err(format!("the engine does not compress with {method}"));
    }
    match params.integer(VIR_MIGRATE_PARAM_COMPRESSION_ZSTD_LEVEL) {
        None => Ok(Some(ZSTD)),
        Some(level @ 1..=19) => Ok(Some(level)),
        Some(level) => Err(format!("the engine does not compress with zstd's level {level}")),
    }
}

fn auto_converge(params: &Params, flags: u32) -> Result<Option<AutoConverge>, String> {
    if flags & VIR_MIGRATE_AUTO_CONVERGE == 0 {
        return Ok(None);
    }
    let percent = |name, default| match params.integer(name) {
        None => Ok(default),
        Some(percent @ 1..=99) => Ok(percent as u8),
        Some(other) => Err(format!("slowing the vCPUs down by {other} % is out of range")),
    };
    let usual = AutoConverge::default();
    Ok(Some(AutoConverge {
        initial: percent(VIR_MIGRATE_PARAM_AUTO_CONVERGE_INITIAL, usual.initial)?,
        increment: percent(VIR_MIGRATE_PARAM_AUTO_CONVERGE_INCREMENT, usual.increment)?,
    }))
}

/// Flags and parameters without what the engine does: for libvirt's phases of a migration that goes through it.
pub fn for_libvirt<'a>(params: &'a Params<'_>, flags: u32) -> (Params<'a>, u32) {
    let mut left = params.share();
    for (name, _) in TUNING {
        left = left.without(name);
    }
    (left, flags & !DONE_BY_ENGINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVE: u32 = VIR_MIGRATE_LIVE;

    #[test]
    fn what_virsh_and_openstack_send_is_taken() {
        let virsh = LIVE | VIR_MIGRATE_CHANGE_PROTECTION;
        let nova = LIVE | VIR_MIGRATE_PEER2PEER | VIR_MIGRATE_PERSIST_DEST | VIR_MIGRATE_UNDEFINE_SOURCE;
        assert_eq!(read(&Params::none(), virsh), Ok(Options::default()));
        assert_eq!(
            read(&Params::none().with(c"migrate_uri", "tcp://host"), nova),
            Ok(Options::default())
        );
    }

    #[test]
    fn a_guest_is_paused_unless_it_is_to_live_or_disks_come_first() {
        assert!(read(&Params::none(), 0).unwrap().paused);
        let disks = read(&Params::none(), VIR_MIGRATE_NON_SHARED_DISK).unwrap();
        assert!(disks.storage && !disks.paused);
    }

    #[test]
    fn bandwidth_is_in_mib() {
        let limited = |mib| Params::none().with_number(VIR_MIGRATE_PARAM_BANDWIDTH, mib);
        assert_eq!(read(&limited(0), LIVE).unwrap().bandwidth, 0);
        assert_eq!(read(&limited(100), LIVE).unwrap().bandwidth, 100 << 20);
        assert_eq!(read(&limited(MOST_MIB), LIVE).unwrap().bandwidth, 0);
        assert!(read(&limited(u64::MAX), LIVE).is_err());
    }

    #[test]
    fn the_engine_does_what_libvirt_then_does_not_see() {
        let params = Params::none()
            .with_integer(VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, 4)
            .with_integer(VIR_MIGRATE_PARAM_COMPRESSION_ZSTD_LEVEL, 5)
            .with(VIR_MIGRATE_PARAM_COMPRESSION, "zstd")
            .with_integer(VIR_MIGRATE_PARAM_AUTO_CONVERGE_INITIAL, 30)
            .with(VIR_MIGRATE_PARAM_DEST_NAME, "new");
        let asked = read(&params, LIVE | DONE_BY_ENGINE).unwrap();
        assert_eq!((asked.streams, asked.compression), (Some(4), Some(5)));
        let slower = AutoConverge {
            initial: 30,
            increment: 10,
        };
        assert_eq!(asked.auto_converge, Some(slower));
        let (left, flags) = for_libvirt(&params, LIVE | DONE_BY_ENGINE);
        assert_eq!(flags, LIVE);
        assert_eq!(left.names().collect::<Vec<_>>(), [VIR_MIGRATE_PARAM_DEST_NAME]);
    }

    #[test]
    fn defaults_are_qemus() {
        let asked = read(&Params::none(), LIVE | DONE_BY_ENGINE).unwrap();
        assert_eq!((asked.streams, asked.compression), (Some(2), Some(1)));
        assert_eq!(asked.auto_converge, Some(AutoConverge::default()));
    }

    #[test]
    fn tls_is_the_engines_but_for_disks() {
        let params = Params::none().with(VIR_MIGRATE_PARAM_TLS_DESTINATION, "host2");
        let asked = read(&params, LIVE | VIR_MIGRATE_TLS).unwrap();
        assert_eq!(asked.tls_name.as_deref(), Some("host2"));
        let (left, flags) = for_libvirt(&params, LIVE | VIR_MIGRATE_TLS);
        assert_eq!((flags, left.count()), (LIVE, 0));
        let disks = LIVE | VIR_MIGRATE_TLS | VIR_MIGRATE_NON_SHARED_DISK;
        assert!(read(&params, disks).unwrap_err().contains("disks"));
        let empty = Params::none().with(VIR_MIGRATE_PARAM_TLS_DESTINATION, "");
        assert_eq!(read(&empty, LIVE | VIR_MIGRATE_TLS).unwrap().tls_name, None);
    }

    #[test]
    fn libvirt_words_its_own_errors() {
        let parallel = Params::none().with_integer(VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, 4);
        // Turn parallel migration on to tune it.
        assert!(read(&parallel, LIVE).is_err());
        let none = Params::none().with_integer(VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, 0);
        assert!(read(&none, LIVE | VIR_MIGRATE_PARALLEL).is_err());
    }

    #[test]
    fn what_is_not_taken_is_named() {
        let postcopy = LIVE | VIR_MIGRATE_POSTCOPY | VIR_MIGRATE_ZEROCOPY;
        let refusal = |params: &Params, flags| read(params, flags).unwrap_err();
        assert!(refusal(&Params::none(), postcopy).contains("postcopy, zerocopy"));
        assert!(read(&Params::none(), LIVE | 1 << 31).is_err());
        let xbzrle = Params::none().with(VIR_MIGRATE_PARAM_COMPRESSION, "xbzrle");
        assert!(refusal(&xbzrle, LIVE | VIR_MIGRATE_COMPRESSED).contains("xbzrle"));
        let unknown = Params::none().with(c"new_in_libvirt_20", "x");
        assert!(refusal(&unknown, LIVE).contains("new_in_libvirt_20"));
    }
}
