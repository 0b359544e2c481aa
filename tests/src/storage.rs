//! `virt-ferry move-storage`, watched, held up and disturbed.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::sys::signal::Signal;

use crate::fault::signal;
use crate::host::Host;
use crate::wait::{wait_for, wait_until};

/// A move that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// Where journals are.
const JOURNALS: &str = "/var/lib/virt-ferry/cold";
/// The tool of QEMU's that is asked between the steps.
const TOOL: &str = "/usr/bin/qemu-img";

/// The command as it runs.
pub struct Moving<'a> {
    host: &'a Host,
    child: Child,
}

impl Host {
    /// Starts `virt-ferry move-storage`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn begin_storage(&self, arguments: &[&str]) -> Result<Moving<'_>> {
        let child = self
            .command("virt-ferry")
            .arg("move-storage")
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("virt-ferry")?;
        Ok(Moving { host: self, child })
    }

    /// The same by somebody who sits at a terminal.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn begin_storage_by_hand(&self, arguments: &[&str]) -> Result<Moving<'_>> {
        let command = format!("virt-ferry move-storage {}", arguments.join(" "));
        let child = self
            .command("script")
            .args(["--quiet", "--return", "--command", &command, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("script")?;
        Ok(Moving { host: self, child })
    }

    /// Moves disks within this host; what the command said.
    ///
    /// # Errors
    /// What it said, if it failed.
    pub fn move_storage(&self, arguments: &[&str]) -> Result<String> {
        let output = self.begin_storage(arguments)?.ended()?;
        let said = said(&output);
        ensure!(
            output.status.code() == Some(0),
            "{arguments:?}, {}: {said}",
            output.status
        );
        Ok(said)
    }

    /// The same, which must be refused; what it said.
    ///
    /// # Errors
    /// If it is not.
    pub fn move_storage_refused(&self, arguments: &[&str]) -> Result<String> {
        let output = self.begin_storage(arguments)?.ended()?;
        let said = said(&output);
        ensure!(
            output.status.code() == Some(2),
            "{arguments:?}, {}: {said}",
            output.status
        );
        Ok(said)
    }

    /// How far this host's journal of the guest is; `None` where there is none.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn journal_state(&self, uuid: &str) -> Result<Option<String>> {
        let path = self.path(format!("{JOURNALS}/{uuid}.json"));
        let Ok(text) = fs::read(&path) else {
            return Ok(None);
        };
        let journal: serde_json::Value = serde_json::from_slice(&text)?;
        Ok(journal["state"].as_str().map(str::to_owned))
    }
}

/// All that it said.
fn said(output: &Output) -> String {
    let text = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    text.concat()
}

impl Moving<'_> {
    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn ended(mut self) -> Result<Output> {
        wait_for("virt-ferry move-storage", PATIENCE, || {
            Ok(self.child.try_wait()?.map(drop))
        })?;
        Ok(self.child.wait_with_output()?)
    }

    /// Waits for its end, which must be a failure; what it said.
    ///
    /// # Errors
    /// If it succeeds, or does not end.
    pub fn fails(self) -> Result<String> {
        let output = self.ended()?;
        let said = said(&output);
        ensure!(!output.status.success(), "it succeeded: {said}");
        println!("{said}");
        Ok(said)
    }

    /// Stops the engine while it copies, and does not let it go on.
    ///
    /// # Errors
    /// If it is done before.
    pub fn stops_while_copying(&self, uuid: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            let Some(engine) = self.host.processes_named("virt-ferry-engine")?.pop() else {
                continue;
            };
            // In small steps, however slow this machine looks.
            signal(&engine, Signal::SIGSTOP)?;
            match self.host.journal_state(uuid)?.as_deref() {
                Some("pulling") => return Ok(()),
                None => signal(&engine, Signal::SIGCONT)?,
                state => bail!("too late: it is {state:?}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        bail!("nothing is copied")
    }

    /// Presses Ctrl-C at the terminal once a bar is to be seen there, and waits until the command says that it has heard.
    ///
    /// # Errors
    /// If nobody sits at a terminal, or it says something else.
    pub fn interrupted(mut self) -> Result<Self> {
        let mut keys = self.child.stdin.take().context("there is no terminal")?;
        let screen = self.child.stdout.as_mut().context("there is no terminal")?;
        let mut shown = String::new();
        for (awaited, key) in [(" % of ", "\x03"), ("what was copied is removed", "")] {
            let mut part = [0; 4096];
            while !shown.contains(awaited) {
                let count = screen.read(&mut part)?;
                ensure!(count > 0, "no '{awaited}' in {shown}");
                shown += &String::from_utf8_lossy(&part[..count]);
            }
            keys.write_all(key.as_bytes())?;
        }
        println!("{shown}");
        // The terminal is there until the command ends.
        self.child.stdin = Some(keys);
        Ok(self)
    }

    /// Sends the command itself a signal.
    ///
    /// # Errors
    /// If it has gone.
    pub fn signal(&self, what: Signal) -> Result<()> {
        let mut commands = self.host.processes_named("virt-ferry")?;
        signal(&commands.pop().context("no virt-ferry")?, what)
    }
}

/// Holds a host's moves up at one state of their journals, where `qemu-img` is asked, until this is dropped.
pub struct Held<'a> {
    host: &'a Host,
}

impl<'a> Held<'a> {
    /// At this state: `committing`, `placed` or `owned`.
    ///
    /// # Errors
    /// If the tool cannot be put away.
    pub fn at(host: &'a Host, state: &str) -> Result<Self> {
        let script = format!(
            "#!/bin/sh\n\
             while [ -e /run/held ] && grep -q '\"state\":\"{state}\"' {JOURNALS}/*.json; do sleep 0.02; done 2>/dev/null\n\
             exec {TOOL}.real \"$@\"\n"
        );
        // The host's root is its own.
        if !host.path(format!("{TOOL}.real")).exists() {
            host.run(&["cp", "-a", TOOL, &format!("{TOOL}.real")])?;
        }
        let wrapper = host.path(format!("{TOOL}.new"));
        fs::write(&wrapper, script)?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
        host.run(&["mv", &format!("{TOOL}.new"), TOOL])?;
        fs::write(host.path("/run/held"), "")?;
        Ok(Self { host })
    }

    /// Waits until a move of this guest is there.
    ///
    /// # Errors
    /// If none comes.
    pub fn has_come(&self, uuid: &str, state: &str) -> Result<()> {
        wait_until(&format!("a move that is {state}"), PATIENCE, || {
            Ok(self.host.journal_state(uuid)?.as_deref() == Some(state))
        })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // The host may be gone.
        let _ = fs::remove_file(self.host.path("/run/held"));
    }
}
