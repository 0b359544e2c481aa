//! What a host's processes and its link have used so far.

use std::fs;

use anyhow::{Context, Result};
use ferry_tests::host::Host;
use ferry_tests::lab::Lab;
use nix::sys::resource::{getrusage, UsageWho};
use nix::sys::time::TimeValLike;
use nix::unistd::{sysconf, SysconfVar};

/// CPU seconds of all processes a host has or had: those that ended are counted by whoever waited for them, in the end
/// the host's init. virsh itself, started from outside, is not among them.
///
/// # Errors
/// If /proc cannot be read.
pub fn cpu_seconds(host: &Host) -> Result<f64> {
    let hertz = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
    let mut ticks = 0;
    for process in host.processes()? {
        // One that has ended since is in its parent's sum.
        let Ok(stat) = fs::read_to_string(process.proc().join("stat")) else {
            continue;
        };
        ticks += stat_ticks(&stat).with_context(|| format!("{}: {stat}", process.proc().display()))?;
    }
    Ok(ticks as f64 / hertz as f64)
}

/// CPU seconds of all commands that this process has run and waited for, with what they have waited for.
///
/// # Errors
/// If the kernel does not say.
pub fn children_cpu_seconds() -> Result<f64> {
    let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let microseconds = used.user_time().num_microseconds() + used.system_time().num_microseconds();
    Ok(microseconds as f64 / 1e6)
}

/// utime, stime, cutime and cstime: fields 14 to 17 of proc_pid_stat(5).
fn stat_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<_> = fields.split_whitespace().skip(11).take(4).collect();
    fields
        .iter()
        .try_fold(0, |sum, field| Some(sum + field.parse::<u64>().ok()?))
}

/// Bytes that have passed a host's link, both ways.
///
/// # Errors
/// If the switch cannot be asked.
pub fn link_bytes(lab: &Lab, host: &Host) -> Result<u64> {
    let answer = lab
        .switch()
        .run(&["ip", "-json", "-statistics", "link", "show", "dev", host.name()])?;
    let links: serde_json::Value = serde_json::from_str(&answer).context("ip -json")?;
    let counted = |way: &str| links[0]["stats64"][way]["bytes"].as_u64();
    let both = counted("rx")
        .zip(counted("tx"))
        .with_context(|| format!("ip says {answer}"))?;
    Ok(both.0 + both.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_times_of_a_process_are_added() {
        let stat = "77 (a) b) S 1 77 77 0 -1 4194560 1 2 3 4 100 20 3 1 20 0 1 0 5 6 7";
        assert_eq!(stat_ticks(stat), Some(124));
        assert_eq!(stat_ticks("77 (a"), None);
    }
}
