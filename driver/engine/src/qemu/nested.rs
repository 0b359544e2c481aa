//! Guests within the guest: on Intel, writes of the CPU itself that no page table sees.
//!
//! While such a guest runs, the CPU is given two pages of the guest's RAM by host-physical address: the virtual-APIC page
//! and the descriptor of posted interrupts. KVM notes what is written there in its own dirty log and nowhere else (Linux
//! 6.12, `nested_mark_vmcs12_pages_dirty`), so a guest could arrive with an interrupt that stays in service for ever. AMD's
//! CPUs get no such page for longer than KVM is at work on it.

use std::path::Path;
use std::time::Instant;

use serde_json::{json, Value};

use super::monitor::{Monitor, MonitorError};

/// The module of KVM that gives pages away like this.
const INTEL: &str = "/sys/module/kvm_intel";

/// Whether the guest has run guests of its own since it was started, on a host where that stands in the way.
///
/// # Errors
/// As [`Monitor::execute`].
pub fn in_the_way(monitor: &mut Monitor, deadline: Instant) -> Result<bool, MonitorError> {
    if !Path::new(INTEL).exists() {
        return Ok(false);
    }
    // QEMU 7.1 and later; each vCPU answers for itself.
    let figures = json!([{ "provider": "kvm", "names": ["nested_run", "guest_mode"] }]);
    let question = json!({ "target": "vcpu", "providers": figures });
    Ok(runs_guests(&monitor.execute(
        "query-stats",
        question,
        deadline,
    )?))
}

/// Whether any vCPU has entered a guest within the guest, or is in one, by KVM's figures.
fn runs_guests(answer: &Value) -> bool {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut figures = list(answer).into_iter().flat_map(|vcpu| list(&vcpu["stats"]));
    figures.any(|figure| match figure["name"].as_str() {
        Some("nested_run") => figure["value"].as_u64() != Some(0),
        Some("guest_mode") => figure["value"].as_bool() != Some(false),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What QEMU 10.0.2 says of a guest of two vCPUs; the figures of the first.
    fn answer(guest_mode: Value, nested_run: Value) -> Value {
        json!([
            {
                "provider": "kvm",
                "stats": [{ "name": "guest_mode", "value": false }, { "name": "nested_run", "value": 0 }],
                "qom-path": "/machine/unattached/device[2]"
            },
            {
                "provider": "kvm",
                "stats": [
                    { "name": "guest_mode", "value": guest_mode },
                    { "name": "nested_run", "value": nested_run }
                ],
                "qom-path": "/machine/unattached/device[0]"
            }
        ])
    }

    #[test]
    fn one_vcpu_is_enough() {
        assert!(!runs_guests(&answer(json!(false), json!(0))));
        assert!(runs_guests(&answer(json!(false), json!(1))), "it has");
        assert!(runs_guests(&answer(json!(true), json!(0))), "it is about to");
        assert!(
            runs_guests(&answer(json!(false), json!("many"))),
            "what is not understood"
        );
    }

    #[test]
    fn a_guest_without_kvm_runs_none() {
        assert!(!runs_guests(&json!([])));
        assert!(!runs_guests(&json!({})));
    }
}
