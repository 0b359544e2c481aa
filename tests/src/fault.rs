//! What goes wrong on purpose, when, and what must be true afterwards.
//!
//! ```text
//!   SlowLink ──> Attempt::start ──> Attempt::reaches(stage) ──> the fault ──> Attempt::fails ──> Scene::is_unharmed
//! ```

use std::io::Read;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::host::{Host, Process};
use crate::scene::{Scene, PATIENCE};
use crate::wait::{wait_for, wait_until};

/// A migration that takes longer than this hangs: the longest wait of ours is 60 s, libvirt's own is 30 s.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(150);

/// The stages in which a migration is disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disturbed {
    /// The guest runs, its memory is on its way.
    PreCopy,
    /// The guest stands still, the last of its memory is on its way.
    StopAndCopy,
}

/// A host's uplink, slowed down until this is dropped.
#[must_use]
pub struct SlowLink<'a>(&'a Host);

impl<'a> SlowLink<'a> {
    /// Lets `host` send `mbit` Mbit a second and no more.
    ///
    /// # Errors
    /// What tc said.
    pub fn new(host: &'a Host, mbit: u32) -> Result<Self> {
        let rate = format!("{mbit}mbit");
        let shape = ["rate", &rate, "burst", "64kb", "latency", "50ms"];
        let replace = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf"];
        host.run(&[&replace[..], &shape].concat())?;
        Ok(SlowLink(host))
    }
}

impl Drop for SlowLink<'_> {
    fn drop(&mut self) {
        // The lab may be gone.
        let _ = self.0.exec(&["tc", "qdisc", "delete", "dev", "eth0", "root"]);
    }
}

/// A firewall rule on a host's side of all engine connections, in force until this is dropped.
#[must_use]
pub struct Cut<'a> {
    host: &'a Host,
    rules: Vec<Vec<&'static str>>,
}

impl<'a> Cut<'a> {
    /// Nothing of the engines' leaves or enters the host any more, and nobody is told.
    ///
    /// # Errors
    /// What iptables said.
    pub fn silent(host: &'a Host) -> Result<Self> {
        Self::new(host, &["DROP"])
    }

    /// Whatever an engine on this host sends is answered by a reset.
    ///
    /// # Errors
    /// What iptables said.
    pub fn reset(host: &'a Host) -> Result<Self> {
        Self::new(host, &["REJECT", "--reject-with", "tcp-reset"])
    }

    fn new(host: &'a Host, target: &[&'static str]) -> Result<Self> {
        let mut cut = Cut {
            host,
            rules: Vec::new(),
        };
        for chain in ["OUTPUT", "INPUT"] {
            for port in ["--dport", "--sport"] {
                let rule = [&[chain, "-p", "tcp", port, "49152:49215", "-j"], target].concat();
                cut.host.run(&[&["iptables", "-w", "-A"], &rule[..]].concat())?;
                cut.rules.push(rule);
            }
        }
        Ok(cut)
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        for rule in &self.rules {
            // The lab may be gone.
            let _ = self.host.exec(&[&["iptables", "-w", "-D"], &rule[..]].concat());
        }
    }
}

/// Sends a signal to a process of a host.
///
/// # Errors
/// If it is gone already.
pub fn signal(process: &Process, signal: Signal) -> Result<()> {
    let name = process.executable.display();
    kill(Pid::from_raw(process.pid.try_into()?), signal).with_context(|| format!("{signal} to {name}"))
}

/// The engine that works on a host now.
///
/// # Errors
/// If there is none, or more than one.
pub fn engine(host: &Host) -> Result<Process> {
    let mut engines = host.processes_named("virt-ferry-engine")?;
    match (engines.pop(), engines.len()) {
        (Some(engine), 0) => Ok(engine),
        (None, _) => bail!("no engine runs on {}", host.name()),
        (Some(_), more) => bail!("{} engines run on {}", more + 1, host.name()),
    }
}

/// A `virsh migrate` under way.
pub struct Attempt<'a> {
    from: &'a Host,
    domain: String,
    virsh: Child,
}

impl<'a> Attempt<'a> {
    /// Begins to move the guest.
    ///
    /// # Errors
    /// If virsh cannot be started.
    pub fn start(domain: &str, from: &'a Host, to: &Host, options: &[&str]) -> Result<Self> {
        let virsh = from
            .command("timeout")
            .args(["--kill-after=5", &ATTEMPT_LIMIT.as_secs().to_string()])
            .args([
                "virsh",
                "--connect",
                "qemu:///system",
                "migrate",
                "--live",
                domain,
            ])
            .arg(to.uri())
            .args(options)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("virsh migrate")?;
        Ok(Attempt {
            from,
            domain: domain.to_owned(),
            virsh,
        })
    }

    /// Waits until it is in this stage.
    ///
    /// # Errors
    /// If it ends before.
    pub fn reaches(&mut self, stage: Disturbed) -> Result<()> {
        wait_until(&format!("{stage:?} of {}", self.domain), PATIENCE, || {
            if self.virsh.try_wait()?.is_some() {
                bail!("virsh migrate ended first: {}", self.said()?);
            }
            match stage {
                Disturbed::PreCopy => self.has_sent_something(),
                Disturbed::StopAndCopy => {
                    let state = self.from.state(&self.domain)?;
                    Ok(state.is_some_and(|state| state.starts_with("paused")))
                }
            }
        })
    }

    fn has_sent_something(&self) -> Result<bool> {
        let job = self.from.virsh(&["domjobinfo", &self.domain])?;
        let processed = job.lines().find_map(|line| line.strip_prefix("Data processed:"));
        Ok(processed.is_some_and(|value| !value.trim().starts_with("0.000")))
    }

    /// Waits for its end, which must be a failure, and returns what virsh said.
    ///
    /// # Errors
    /// If the guest has moved, or virsh hangs.
    pub fn fails(mut self) -> Result<String> {
        let status = wait_for("virsh migrate to end", ATTEMPT_LIMIT, || {
            Ok(self.virsh.try_wait()?)
        })?;
        ensure!(status.code() != Some(124), "virsh migrate hangs");
        ensure!(!status.success(), "the guest moved, though it should not");
        self.said()
    }

    fn said(&mut self) -> Result<String> {
        let mut said = String::new();
        if let Some(stderr) = &mut self.virsh.stderr {
            stderr.read_to_string(&mut said)?;
        }
        Ok(said.trim().to_owned())
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        // Ended already where the test went well.
        let _ = self.virsh.kill();
        let _ = self.virsh.wait();
    }
}

impl Scene<'_> {
    /// After a migration from `here` that failed: the guest runs here and nowhere else, its memory is good, and both hosts
    /// are clean.
    ///
    /// # Errors
    /// Whatever of it is not so.
    pub fn is_unharmed(&self, here: &Host) -> Result<()> {
        for (number, host) in self.lab.hosts().iter().enumerate() {
            self.lab.assert_clean(number + 1)?;
            let state = host.state(self.name())?;
            ensure!(
                state.is_none() || host.name() == here.name(),
                "{} still knows {}: {state:?}",
                host.name(),
                self.name()
            );
        }
        self.lives_on(here)
    }

    /// `virsh save` and `virsh restore` keep the guest's memory: a save while QEMU still ignores shared memory has none in it.
    ///
    /// # Errors
    /// If the guest does not come back whole.
    pub fn survives_save_and_restore(&self, host: &Host) -> Result<()> {
        let file = format!("/lab/{}.save", self.name());
        host.virsh(&["save", self.name(), &file])?;
        host.virsh(&["restore", &file])?;
        self.lives_on(host).context("after save and restore")
    }
}

/// What an administrator is told must name each of these.
///
/// # Errors
/// If it does not.
pub fn names(error: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(
            error.contains(word),
            "'{word}' is not in what virsh said: {error}"
        );
    }
    ensure!(
        error.lines().filter(|line| line.starts_with("error:")).count() == 1,
        "more than one error: {error}"
    );
    Ok(())
}
