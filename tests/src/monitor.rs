//! The private monitor of a guest's QEMU, in the engine's place: while an engine has it, nobody else is served.
//!
//! Asked through libvirt, QEMU would have x-ignore-shared cleared first.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Value};

use crate::host::Host;

/// For an answer of QEMU's.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to it.
pub struct Monitor {
    stream: BufReader<UnixStream>,
}

/// Whether and where a guest's QEMU may leave out its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IgnoreShared {
    /// The capability.
    pub on: bool,
    /// The plug-in's mark that it may be on.
    pub marked: bool,
}

/// The private directory of a guest that runs on `host`.
///
/// # Errors
/// If it does not run there.
fn directory(host: &Host, domain: &str) -> Result<PathBuf> {
    let id = host.virsh(&["domid", domain])?;
    let prefix = format!("domain-{id}-");
    let all = host.path("/var/lib/libvirt/qemu");
    for entry in fs::read_dir(&all).with_context(|| all.display().to_string())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            return Ok(entry.path());
        }
    }
    bail!("{}: {domain} has no private directory", host.name())
}

impl Monitor {
    /// Connects to the monitor of a guest that runs on `host`; `None` where its QEMU has none.
    ///
    /// # Errors
    /// If it does not run there, or an engine does not let go of the monitor.
    pub fn of(host: &Host, domain: &str) -> Result<Option<Self>> {
        let path = directory(host, domain)?.join("virt-ferry-monitor.sock");
        let stream = match UnixStream::connect(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            stream => stream.with_context(|| path.display().to_string())?,
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Monitor {
            stream: BufReader::new(stream),
        };
        monitor.receive().context("the private monitor is taken")?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(Some(monitor))
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        ensure!(!line.is_empty(), "QEMU closed its private monitor");
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line}"))
    }

    /// Runs a command and returns what it returned.
    ///
    /// # Errors
    /// What QEMU said.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{line}")?;
        loop {
            let mut answer = self.receive()?;
            if answer.get("event").is_some() {
                continue;
            }
            ensure!(answer.get("error").is_none(), "{command}: {answer}");
            return Ok(answer["return"].take());
        }
    }

    /// Whether QEMU leaves shared memory out of what it writes.
    ///
    /// # Errors
    /// If it does not know of that.
    pub fn ignores_shared(&mut self) -> Result<bool> {
        let answer = self.execute("query-migrate-capabilities", json!({}))?;
        ignores_shared(&answer)
    }
}

/// What an answer to query-migrate-capabilities says of x-ignore-shared.
///
/// # Errors
/// If it says nothing.
pub fn ignores_shared(capabilities: &Value) -> Result<bool> {
    let all = capabilities.as_array().map(Vec::as_slice).unwrap_or_default();
    let ours = all.iter().find(|entry| entry["capability"] == "x-ignore-shared");
    let ours = ours.with_context(|| format!("no capability x-ignore-shared: {capabilities}"))?;
    Ok(ours["state"] == true)
}

impl Host {
    fn mark(&self, domain: &str) -> Result<PathBuf> {
        Ok(directory(self, domain)?.join("virt-ferry-ignore-shared"))
    }

    /// Leaves a guest as a migration leaves it whose engine and daemon died at once: x-ignore-shared on, and the mark of it.
    ///
    /// # Errors
    /// If it has no private monitor.
    pub fn leave_ignoring_shared(&self, domain: &str) -> Result<()> {
        fs::write(self.mark(domain)?, "")?;
        let mut monitor = Monitor::of(self, domain)?.context("no private monitor")?;
        let on = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
        monitor.execute("migrate-set-capabilities", on)?;
        ensure!(monitor.ignores_shared()?, "QEMU did not take x-ignore-shared");
        Ok(())
    }

    /// Whether a guest's QEMU leaves its memory out, and bears the mark of it; `None` where it has no private monitor.
    ///
    /// # Errors
    /// If it does not run here, or an engine does not let go of it.
    pub fn ignores_shared(&self, domain: &str) -> Result<Option<IgnoreShared>> {
        let Some(mut monitor) = Monitor::of(self, domain)? else {
            return Ok(None);
        };
        let on = monitor.ignores_shared()?;
        let marked = self.mark(domain)?.exists();
        Ok(Some(IgnoreShared { on, marked }))
    }
}
