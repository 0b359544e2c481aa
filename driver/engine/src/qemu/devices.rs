//! Devices that write guest RAM past QEMU's address space, or so that a drain does not wait for them.
//!
//! Write tracking sees what is written by way of QEMU's page tables: by the guest, by QEMU, and by the kernel on
//! QEMU's behalf. Other processes that map the RAM, and devices that reach it by DMA, are not seen. Types as in
//! QEMU 10.0; libvirt creates everything under `/machine/peripheral`, with one link of `qom-list` a device.

use std::time::Instant;

use serde_json::{json, Value};

use super::monitor::{Monitor, MonitorError};
use super::nested;

/// What makes a guest ineligible: a name and the reason.
pub(super) type Objection = (String, &'static str);

const OTHER_PROCESS: &str = "another process writes guest RAM";
const DMA: &str = "a physical device writes guest RAM";
const PINNED: &str = "the kernel writes guest RAM by pages it keeps pinned";
const CPU: &str = "the CPU writes guest RAM by host-physical address while they run";
const NOT_RAM: &str = "its contents are memory of the guest that is kept outside of guest RAM";
const ENCRYPTED: &str = "guest RAM is encrypted and unreadable to the host";

/// Device and object types that stand in the way, by the start of the name (`vfio-` also is `vfio-pci-nohotplug`).
const TYPES: &[(&str, &str)] = &[
    ("vhost-user", OTHER_PROCESS),
    ("cryptodev-vhost-user", OTHER_PROCESS),
    ("ivshmem", OTHER_PROCESS),
    ("x-pci-proxy", OTHER_PROCESS),
    ("x-remote", OTHER_PROCESS),
    ("x-vfio-user", OTHER_PROCESS),
    ("vfio", DMA),
    ("vhost-vdpa", DMA),
    ("pvrdma", DMA),
    ("vhost-scsi", PINNED),
    ("nvdimm", NOT_RAM),
    ("virtio-pmem", NOT_RAM),
    ("cxl-", NOT_RAM),
    ("memory-backend-epc", NOT_RAM),
    ("sgx-", NOT_RAM),
    ("sev-", ENCRYPTED),
    ("tdx-", ENCRYPTED),
    ("pef-guest", ENCRYPTED),
    ("s390-pv-guest", ENCRYPTED),
    ("arm-rme-guest", ENCRYPTED),
];

/// Network back ends, as `info network` names them. passt speaks vhost-user where it is told to (QEMU 10.1).
const NETWORKS: &[(&str, &str)] = &[
    ("vhost-user", OTHER_PROCESS),
    ("vhost-vdpa", DMA),
    ("passt", OTHER_PROCESS),
];

/// Block drivers that hand guest RAM to somebody else.
const BLOCK_DRIVERS: &[(&str, &str)] = &[
    ("nvme", DMA),
    ("virtio-blk-vfio-pci", DMA),
    ("virtio-blk-vhost-vdpa", DMA),
    ("virtio-blk-vhost-user", OTHER_PROCESS),
];

/// All that stands in the way of tracking this guest's writes.
pub(super) fn objections(monitor: &mut Monitor, deadline: Instant) -> Result<Vec<Objection>, MonitorError> {
    let mut found = Vec::new();
    for container in ["/machine/peripheral", "/machine/peripheral-anon", "/objects"] {
        for (name, kind) in children(monitor, container, deadline)? {
            let reason = TYPES.iter().find(|(prefix, _)| kind.starts_with(prefix));
            found.extend(reason.map(|(_, reason)| (format!("device {name} ({kind})"), *reason)));
        }
    }
    let question = json!({ "path": "/machine", "property": "confidential-guest-support" });
    // A machine type without the property has no such support.
    let guest = monitor
        .execute("qom-get", question, deadline)
        .unwrap_or(Value::Null);
    if guest.as_str().is_some_and(|path| !path.is_empty()) {
        found.push(("confidential guest".into(), ENCRYPTED));
    }
    if nested::in_the_way(monitor, deadline)? {
        found.push(("the guest's own guests".into(), CPU));
    }
    let networks = human(monitor, "info network", deadline)?;
    found.extend(networks.lines().filter_map(network_objection));
    let nodes = monitor.execute("query-named-block-nodes", json!({ "flat": true }), deadline)?;
    for node in nodes.as_array().into_iter().flatten() {
        let driver = node["drv"].as_str().unwrap_or_default();
        let reason = BLOCK_DRIVERS.iter().find(|(name, _)| *name == driver);
        let name = node["node-name"].as_str().unwrap_or("?");
        found.extend(reason.map(|(_, reason)| (format!("block node {name} ({driver})"), *reason)));
    }
    Ok(found)
}

/// Names and types of the child objects of the QOM object at `path`.
pub(super) fn children(
    monitor: &mut Monitor,
    path: &str,
    deadline: Instant,
) -> Result<Vec<(String, String)>, MonitorError> {
    let list = monitor.execute("qom-list", json!({ "path": path }), deadline)?;
    let child = |entry: &Value| {
        let kind = entry["type"]
            .as_str()?
            .strip_prefix("child<")?
            .strip_suffix('>')?;
        Some((entry["name"].as_str()?.to_owned(), kind.to_owned()))
    };
    Ok(list.as_array().into_iter().flatten().filter_map(child).collect())
}

/// Output of a command of the human monitor.
pub(super) fn human(monitor: &mut Monitor, command: &str, deadline: Instant) -> Result<String, MonitorError> {
    let text = monitor.execute(
        "human-monitor-command",
        json!({ "command-line": command }),
        deadline,
    )?;
    text.as_str()
        .map(str::to_owned)
        .ok_or_else(|| monitor.protocol("no text from the human monitor"))
}

/// From a line such as ` \ hostnet0: index=0,type=vhost-user,...`.
fn network_objection(line: &str) -> Option<Objection> {
    let (name, properties) = line.split_once(": ")?;
    let kind = properties
        .split(',')
        .find_map(|property| property.strip_prefix("type="))?;
    let (_, reason) = NETWORKS.iter().find(|(prefix, _)| kind == *prefix)?;
    Some((
        format!("network {} ({kind})", name.trim_start_matches([' ', '\\'])),
        reason,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_lines() {
        let found = network_objection(" \\ hostnet0: index=0,type=vhost-user,server=off");
        assert_eq!(
            found,
            Some(("network hostnet0 (vhost-user)".into(), OTHER_PROCESS))
        );
        for harmless in [
            "net0: index=0,type=nic,model=virtio-net-pci",
            " \\ host: index=0,type=tap,fd=3",
            "",
            "x",
        ] {
            assert_eq!(network_objection(harmless), None);
        }
    }
}
