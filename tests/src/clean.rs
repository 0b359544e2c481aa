//! After a migration, however it ended, a host must be as before: nothing of virt-ferry's may be left.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::host::{Host, Process};
use crate::lab::Lab;
use crate::monitor::{self, IgnoreShared};
use crate::wait::wait_for;

/// What is given to an engine for ending, and to libvirtd for noticing.
const SETTLE: Duration = Duration::from_secs(10);

impl Lab {
    /// Makes sure that nothing of virt-ferry is left on host `number`, which gets a few seconds to settle:
    /// no engine process, no socket, no mount, no userfaultfd, tracer or stopped thread in a QEMU, no job on a guest, no
    /// capability x-ignore-shared that would make a later save lose the guest's memory, nor the mark of it, no memory file without its guest.
    ///
    /// # Errors
    /// All that is left, by name.
    pub fn assert_clean(&self, number: usize) -> Result<()> {
        let host = self.host(number);
        let mut last = Vec::new();
        let clean = wait_for("a clean host", SETTLE, || {
            last = leftovers(host)?;
            Ok(last.is_empty().then_some(()))
        });
        if last.is_empty() {
            return clean;
        }
        bail!("{} is not clean:\n  {}", host.name(), last.join("\n  "));
    }
}

fn leftovers(host: &Host) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for engine in host.processes_named("virt-ferry-engine")? {
        found.push(format!(
            "engine process {}: {}",
            engine.pid,
            engine.arguments.join(" ")
        ));
    }
    for directory in ["/run/libvirt/virt-ferry", "/run/libvirt/qemu/virt-ferry"] {
        let left = names_in(&host.path(directory));
        found.extend(left.iter().map(|name| format!("{directory}/{name}")));
    }
    found.extend(listeners(host)?);
    found.extend(host.new_mounts()?);
    for process in host.processes()? {
        if process
            .arguments
            .iter()
            .any(|argument| argument.starts_with("guest="))
        {
            found.extend(qemu_leftovers(&process));
        }
    }
    let running = host.running()?;
    for domain in &running {
        // A guest that is going away now does not count, one that stays and does not answer does.
        match (host.virsh(&["domjobinfo", domain]), ignores_shared(host, domain)) {
            (Ok(job), _) if job.split_whitespace().collect::<Vec<_>>() != ["Job", "type:", "None"] => {
                found.push(format!("{domain} still has a job: {job}"));
            }
            (Ok(_), Ok(IgnoreShared { on: true, .. })) => {
                found.push(format!("x-ignore-shared is left on in {domain}"));
            }
            (Ok(_), Ok(IgnoreShared { marked: true, .. })) => {
                found.push(format!("{domain} is still marked as in an engine's hands"));
            }
            (Ok(_), Ok(_)) => {}
            (Err(error), _) | (_, Err(error)) => found.push(format!("{domain} does not answer: {error:#}")),
        }
    }
    // libvirt names them <id>-<name>, the name possibly shortened.
    for directory in names_in(&host.path("/var/lib/libvirt/qemu/ram")) {
        let name = directory.split_once('-').map_or("", |(_, name)| name);
        if name.is_empty() || !running.iter().any(|domain| domain.starts_with(name)) {
            found.push(format!(
                "memory files of no running guest: /var/lib/libvirt/qemu/ram/{directory}"
            ));
        }
    }
    Ok(found)
}

fn qemu_leftovers(qemu: &Process) -> Vec<String> {
    let mut found = Vec::new();
    for fd in names_in(&qemu.proc().join("fd")) {
        let target = fs::read_link(qemu.proc().join("fd").join(&fd)).unwrap_or_default();
        if target.to_string_lossy().contains("[userfaultfd]") {
            found.push(format!("QEMU {} holds a userfaultfd, {fd}", qemu.pid));
        }
    }
    for thread in names_in(&qemu.proc().join("task")) {
        let stat =
            fs::read_to_string(qemu.proc().join("task").join(&thread).join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        if state.starts_with(['T', 't']) {
            found.push(format!("thread {thread} of QEMU {} is stopped", qemu.pid));
        }
    }
    let status = fs::read_to_string(qemu.proc().join("status")).unwrap_or_default();
    let tracer = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"))
        .unwrap_or("0")
        .trim();
    if tracer != "0" {
        found.push(format!("QEMU {} is traced by process {tracer}", qemu.pid));
    }
    found
}

/// Ports on which engines wait for guests.
const PORTS: std::ops::RangeInclusive<u16> = 49152..=49215;

/// Sockets that still listen on one of the engines' ports.
fn listeners(host: &Host) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/{}/net/{table}", host.init());
        for line in fs::read_to_string(&path).with_context(|| path.clone())?.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            // Local address and state, in hexadecimal digits; 0A listens.
            let [_, local, _, "0A", ..] = words[..] else {
                continue;
            };
            let port = local
                .rsplit_once(':')
                .map(|(_, port)| u16::from_str_radix(port, 16));
            if let Some(Ok(port)) = port.filter(|port| port.as_ref().is_ok_and(|port| PORTS.contains(port))) {
                found.push(format!("somebody listens on port {port}"));
            }
        }
    }
    Ok(found)
}

/// Asked on the private monitor, where there is one: see there.
fn ignores_shared(host: &Host, domain: &str) -> Result<IgnoreShared> {
    if let Some(found) = host.ignores_shared(domain)? {
        return Ok(found);
    }
    let answer = host.qmp(domain, r#"{"execute":"query-migrate-capabilities"}"#)?;
    Ok(IgnoreShared {
        on: monitor::ignores_shared(&answer["return"])?,
        marked: false,
    })
}

/// The names in a directory; none where it does not exist.
fn names_in(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
