//! What goes wrong on purpose, when, and what must be true afterwards.
//!
//! ```text
//!   link::Slow ──> Host::begin_migration ──> Underway::reaches(stage) ──> the fault ──> Underway::fails ──> Scene::is_unharmed
//! ```

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};

use anyhow::{bail, ensure, Context, Result};
use nix::fcntl::{fallocate, FallocateFlags};
use nix::sys::signal::{kill, Signal};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::Pid;

use crate::host::{Host, Process};
use crate::lab::Lab;
use crate::scene::{Scene, PATIENCE};
use crate::underway::Underway;
use crate::wait::wait_until;

/// The stages in which a migration is disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disturbed {
    /// The guest runs, its memory is on its way.
    PreCopy,
    /// The guest stands still, the last of its memory is on its way.
    StopAndCopy,
}

/// The reset itself must pass, also to this host's own end.
const RESET: [&str; 7] = [
    "--tcp-flags",
    "RST",
    "NONE",
    "-j",
    "REJECT",
    "--reject-with",
    "tcp-reset",
];

/// A network that does not work, until this is dropped.
#[must_use]
pub struct Cut<'a> {
    host: &'a Host,
    mends: Vec<Vec<&'a str>>,
}

impl<'a> Cut<'a> {
    /// Nothing of the engines' leaves or enters the host any more, and nobody is told.
    ///
    /// # Errors
    /// What iptables said.
    pub fn silent(host: &'a Host) -> Result<Self> {
        Self::filter(host, &["-j", "DROP"])
    }

    /// Whatever an engine on this host sends or hears is answered by a reset.
    ///
    /// # Errors
    /// What iptables said.
    pub fn reset(host: &'a Host) -> Result<Self> {
        Self::filter(host, &RESET)
    }

    /// So is every connection between engines that has carried so many bytes, both ways together.
    ///
    /// # Errors
    /// What iptables said.
    pub fn reset_after(host: &'a Host, bytes: &'a str) -> Result<Self> {
        let counted = [
            "-m",
            "connbytes",
            "--connbytes-dir",
            "both",
            "--connbytes-mode",
            "bytes",
            "--connbytes",
            bytes,
        ];
        Self::filter(host, &[&counted, &RESET[..]].concat())
    }

    fn filter(host: &'a Host, target: &[&'a str]) -> Result<Self> {
        let mut cut = Cut {
            host,
            mends: Vec::new(),
        };
        for chain in ["OUTPUT", "INPUT"] {
            for port in ["--dport", "--sport"] {
                let rule = [&[chain, "-p", "tcp", port, "49152:49215"], target].concat();
                host.run(&[&["iptables", "-w", "-A"], &rule[..]].concat())?;
                cut.mends.push([&["iptables", "-w", "-D"], &rule[..]].concat());
            }
        }
        Ok(cut)
    }

    /// Nothing at all reaches the host any more, libvirt's own connections neither.
    ///
    /// # Errors
    /// What ip said.
    pub fn off(lab: &'a Lab, host: &'a Host) -> Result<Self> {
        let link = |state| vec!["ip", "link", "set", "dev", host.name(), state];
        lab.switch().run(&link("down"))?;
        Ok(Cut {
            host: lab.switch(),
            mends: vec![link("up")],
        })
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        for mend in &self.mends {
            // The lab may be gone.
            let _ = self.host.exec(mend);
        }
    }
}

/// Takes room away from the guests of a host until dropped; the file has no name, as it is nobody's leftover.
#[must_use]
pub struct Hog {
    _file: File,
}

impl Hog {
    /// Leaves so many MiB of what is free now.
    ///
    /// # Errors
    /// If less is free already.
    pub fn leaving(host: &Host, mib: u64) -> Result<Self> {
        let path = host.path("/var/lib/libvirt/qemu/ram/hog");
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        fs::remove_file(&path)?;
        let room = fstatvfs(&file)?;
        let free = room.blocks_available() * room.fragment_size();
        let length = free.checked_sub(mib << 20).context("less is free")?;
        // Pages that others take meanwhile are not to be had.
        let mut taken = 0;
        for step in [64 << 20, 1 << 20, 1 << 16] {
            while taken + step <= length
                && fallocate(
                    &file,
                    FallocateFlags::empty(),
                    taken.try_into()?,
                    step.try_into()?,
                )
                .is_ok()
            {
                taken += step;
            }
        }
        Ok(Hog { _file: file })
    }
}

/// A file system so full that nothing more can be written to it, over a directory of a host, until dropped.
#[must_use]
pub struct Full<'a> {
    host: &'a Host,
    directory: &'a str,
}

impl<'a> Full<'a> {
    /// Lays it over `directory`.
    ///
    /// # Errors
    /// What mount or dd said, if it is not full.
    pub fn at(host: &'a Host, directory: &'a str) -> Result<Self> {
        host.run(&["mount", "-t", "tmpfs", "-o", "size=64k", "full", directory])?;
        let full = Full { host, directory };
        let filled = host.exec(&["dd", "if=/dev/zero", &format!("of={directory}/filler"), "bs=4k"])?;
        ensure!(!filled.status.success(), "{directory} does not fill up");
        Ok(full)
    }
}

impl Drop for Full<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.host.run(&["umount", "-l", self.directory]) {
            eprintln!("{} stays full: {error:#}", self.directory);
        }
    }
}

/// A process that goes no further than a system call, which it is about to make, until this is dropped or it is killed.
#[must_use]
pub struct Held(Child);

impl Held {
    /// Holds a process at its next call of this name.
    ///
    /// # Errors
    /// What strace said.
    pub fn at(process: &Process, call: &str) -> Result<Self> {
        let mut strace = Command::new("strace")
            .args(["-f", "-qq", "-e", &format!("trace={call}")])
            .args(["-e", &format!("inject={call}:delay_enter=3600s")])
            .args(["-p", &process.pid.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("strace")?;
        let tracer = process.proc().join("status");
        let traced = wait_until("strace to hold a process", PATIENCE, || {
            ensure!(strace.try_wait()?.is_none(), "strace has ended");
            let status = fs::read_to_string(&tracer)?;
            Ok(status.contains(&format!("TracerPid:\t{}", strace.id())))
        });
        let held = Held(strace);
        traced.map(|()| held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // With its tracer gone, the process goes on.
        let _ = self.0.kill();
        let _ = self.0.wait();
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
    engines.retain(|engine| !is_tracer(engine));
    match (engines.pop(), engines.len()) {
        (Some(engine), 0) => Ok(engine),
        (None, _) => bail!("no engine runs on {}", host.name()),
        (Some(_), more) => bail!("{} engines run on {}", more + 1, host.name()),
    }
}

/// Whether this is the process that an engine starts for the moment in which it traces QEMU.
pub fn is_tracer(process: &Process) -> bool {
    process
        .arguments
        .get(1)
        .is_some_and(|command| command == "inject")
}

impl Underway<'_> {
    /// Waits until the migration is in this stage: before it stops the guest, the engine waits for leave to.
    ///
    /// # Errors
    /// If it ends before.
    pub fn reaches(&mut self, stage: Disturbed) -> Result<()> {
        self.wait_for_job("memory to be on its way", |job| {
            job.figure("memory_processed") > 0
        })?;
        match stage {
            Disturbed::PreCopy => Ok(()),
            Disturbed::StopAndCopy => self.from.stop_while_it_moves(&self.domain),
        }
    }
}

impl Host {
    /// Has the engine stop a guest whose memory is on its way.
    ///
    /// # Errors
    /// If it does not.
    pub fn stop_while_it_moves(&self, domain: &str) -> Result<()> {
        // The longest pause that libvirt lets anybody ask for.
        self.virsh(&["migrate-setmaxdowntime", domain, "2000000"])?;
        wait_until("the guest to stand still", PATIENCE, || {
            let state = self.state(domain)?;
            Ok(state.is_some_and(|state| state.starts_with("paused")))
        })
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
