//! A migration under way, to be watched and interfered with.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};

use crate::host::Host;
use crate::wait::wait_for;

/// A migration that takes longer hangs, in seconds.
const LIMIT: &str = "180";

/// `virsh migrate` as it runs; ended when dropped.
pub struct Underway<'a> {
    pub(crate) from: &'a Host,
    pub(crate) domain: String,
    offline: bool,
    child: Option<Child>,
}

/// A guest's job as `virsh domjobinfo --rawstats` puts it.
#[derive(Clone, Debug, Default)]
pub struct Job(BTreeMap<String, String>);

impl Job {
    /// From lines of a name, a colon and a value.
    pub fn parse(text: &str) -> Self {
        let words = text.lines().filter_map(|line| line.split_once(':'));
        Job(words
            .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
            .collect())
    }

    /// Whether it has this figure.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Whether there was no job.
    pub fn is_none(&self) -> bool {
        self.0.get("Job type").is_some_and(|kind| kind == "0")
    }

    /// A figure, 0 where the job does not have it.
    pub fn figure(&self, name: &str) -> u64 {
        self.0.get(name).and_then(|text| text.parse().ok()).unwrap_or(0)
    }
}

impl Host {
    /// Starts what [`Host::migrate`] waits for.
    ///
    /// # Errors
    /// If virsh cannot be started.
    pub fn begin_migration(&self, domain: &str, to: &Host, options: &[&str]) -> Result<Underway<'_>> {
        self.underway(domain, to, &["--live"], options)
    }

    /// Starts `virsh migrate` of this mode.
    ///
    /// # Errors
    /// If virsh cannot be started.
    pub fn underway(&self, domain: &str, to: &Host, mode: &[&str], options: &[&str]) -> Result<Underway<'_>> {
        let child = self
            .command("timeout")
            .args([LIMIT, "virsh", "--connect", "qemu:///system", "migrate"])
            .args(mode)
            .args([domain, &to.uri()])
            .args(options)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}: cannot start virsh", self.name()))?;
        Ok(Underway {
            from: self,
            domain: domain.to_owned(),
            offline: mode.contains(&"--offline"),
            child: Some(child),
        })
    }

    /// The same by somebody who sits at a terminal, with a percentage to look at.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn begin_migration_by_hand(&self, domain: &str, to: &Host, options: &[&str]) -> Result<Underway<'_>> {
        let virsh = format!(
            "timeout --foreground {LIMIT} virsh --connect qemu:///system migrate --live --verbose {domain} {} {}",
            to.uri(),
            options.join(" ")
        );
        let child = self
            .command("script")
            .args(["--quiet", "--return", "--command", &virsh, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}: cannot start script", self.name()))?;
        Ok(Underway {
            from: self,
            domain: domain.to_owned(),
            offline: false,
            child: Some(child),
        })
    }

    /// The guest's job now.
    ///
    /// # Errors
    /// What virsh said.
    pub fn job(&self, domain: &str) -> Result<Job> {
        Ok(Job::parse(&self.virsh(&["domjobinfo", domain, "--rawstats"])?))
    }

    /// The guest's last job, which libvirt forgets once somebody has asked, unless it is to `keep` it.
    ///
    /// # Errors
    /// What virsh said.
    pub fn completed_job(&self, domain: &str, keep: bool) -> Result<Job> {
        let options = ["--rawstats", "--completed", "--keep-completed"];
        let options = &options[..2 + usize::from(keep)];
        Ok(Job::parse(
            &self.virsh(&[&["domjobinfo", domain], options].concat())?,
        ))
    }
}

impl Underway<'_> {
    /// Waits until the job's figures please `wanted`, and returns them.
    ///
    /// # Errors
    /// If the migration ends before, or nothing pleases within a minute.
    pub fn wait_for_job(&mut self, what: &str, mut wanted: impl FnMut(&Job) -> bool) -> Result<Job> {
        wait_for(what, Duration::from_secs(60), || {
            if let Some(child) = &mut self.child {
                if child.try_wait().context("virsh migrate")?.is_some() {
                    let output = self.take()?;
                    bail!(
                        "the migration was over: {}",
                        String::from_utf8_lossy(&output.stderr)
                    );
                }
            }
            // A guest that does not run has a job only once its files are served.
            let job = self.from.job(&self.domain);
            let job = job.or_else(|error| match self.offline {
                true => Ok(Job::default()),
                false => Err(error),
            })?;
            Ok(wanted(&job).then_some(job))
        })
    }

    /// Presses Ctrl-C at the terminal, and returns what virsh has shown there. virsh heeds the key, once, from when it has
    /// shown how far the migration is.
    ///
    /// # Errors
    /// If nobody sits at a terminal, or virsh had to be ended.
    pub fn interrupt(mut self) -> Result<String> {
        let child = self
            .child
            .as_mut()
            .context("virsh migrate was waited for already")?;
        let mut keys = child.stdin.take().context("there is no terminal")?;
        let screen = child.stdout.as_mut().context("there is no terminal")?;
        let (mut shown, mut part) = (String::new(), [0; 4096]);
        while shown.matches("Migration: [").count() < 2 {
            let count = screen.read(&mut part)?;
            ensure!(count > 0, "virsh has ended: {shown}");
            shown += &String::from_utf8_lossy(&part[..count]);
        }
        keys.write_all(b"\x03")?;
        let output = self.end()?;
        Ok(shown + &String::from_utf8_lossy(&output.stdout))
    }

    /// Waits so long for its end, whatever that is: whether it came.
    ///
    /// # Errors
    /// If virsh was waited for already.
    pub fn ends_within(&mut self, limit: Duration) -> Result<bool> {
        let child = self
            .child
            .as_mut()
            .context("virsh migrate was waited for already")?;
        let end = Instant::now() + limit;
        while child.try_wait().context("virsh migrate")?.is_none() {
            if Instant::now() >= end {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(true)
    }

    fn take(&mut self) -> Result<Output> {
        let child = self
            .child
            .take()
            .context("virsh migrate was waited for already")?;
        child.wait_with_output().context("virsh migrate")
    }

    /// Waits for the end, whatever it is.
    ///
    /// # Errors
    /// If virsh had to be ended.
    pub fn end(mut self) -> Result<Output> {
        let output = self.take()?;
        ensure!(
            output.status.code() != Some(124),
            "virsh migrate hung for {LIMIT} s"
        );
        Ok(output)
    }

    /// Waits for the migration to fail, and returns virsh's error.
    ///
    /// # Errors
    /// If it succeeds.
    pub fn fails(self) -> Result<String> {
        let output = self.end()?;
        ensure!(!output.status.success(), "the migration succeeded");
        Ok(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }

    /// Waits for the migration to succeed.
    ///
    /// # Errors
    /// What virsh said.
    pub fn succeeds(self) -> Result<()> {
        let output = self.end()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the migration failed: {}", said.trim());
        Ok(())
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // What it asked libvirtd for ends with the lab.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
