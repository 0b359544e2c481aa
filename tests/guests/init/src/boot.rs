//! From the kernel's first process to a machine with devices.

use std::ffi::CString;
use std::fs::{self, File};

use ferry_guest::page::PAGE_SIZE;
use nix::kmod::{finit_module, ModuleInitFlags};
use nix::mount::{mount, MsFlags};
use nix::sys::reboot::{reboot, RebootMode};

/// Memory left to the kernel, to this program's threads and to packets under way.
const HEADROOM_MIB: u64 = 40;

/// Mounts /proc, /sys and /dev.
pub fn mount_all() -> Result<(), String> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
            .map_err(|errno| format!("cannot mount {target}: {errno}"))?;
    }
    Ok(())
}

/// The kernel's command line.
pub fn command_line() -> Result<String, String> {
    fs::read_to_string("/proc/cmdline").map_err(|error| format!("cannot read /proc/cmdline: {error}"))
}

/// Loads what lies in /modules, in the order of the names (`tests/guests/kernel` numbers them).
pub fn load_modules() -> Result<(), String> {
    let entries = fs::read_dir("/modules").map_err(|error| format!("cannot read /modules: {error}"))?;
    let mut modules: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    modules.sort();
    for module in modules {
        let failed = |what: &dyn std::fmt::Display| format!("cannot load {}: {what}", module.display());
        let file = File::open(&module).map_err(|error| failed(&error))?;
        finit_module(file, &CString::default(), ModuleInitFlags::empty()).map_err(|errno| failed(&errno))?;
    }
    Ok(())
}

/// Refuses an area that would end in the kernel killing its only process.
pub fn require_memory(pages: u64) -> Result<(), String> {
    let meminfo =
        fs::read_to_string("/proc/meminfo").map_err(|error| format!("cannot read meminfo: {error}"))?;
    let available_kib: u64 = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .ok_or("no MemAvailable in /proc/meminfo")?;
    let wanted_mib = pages.saturating_mul(PAGE_SIZE as u64) >> 20;
    let available_mib = available_kib >> 10;
    if wanted_mib.saturating_add(HEADROOM_MIB) > available_mib {
        return Err(format!(
            "{wanted_mib} MiB are asked for; of {available_mib} MiB free {HEADROOM_MIB} must be left"
        ));
    }
    Ok(())
}

/// Ends the machine.
pub fn power_off() -> ! {
    // The console's last words leave the UART before the machine does; a console that does not drain is nothing to wait for.
    let _ = nix::sys::termios::tcdrain(std::io::stdout());
    // Without ACPI the machine stays; an init that ends makes the kernel panic, and panic=-1 then resets it.
    let _ = reboot(RebootMode::RB_POWER_OFF);
    std::process::exit(1);
}
