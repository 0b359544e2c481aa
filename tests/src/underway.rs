//! A migration under way, to be watched and interfered with.

use std::collections::BTreeMap;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};

use crate::host::Host;
use crate::wait::wait_for;

/// A migration that takes longer hangs, in seconds.
const LIMIT: &str = "120";

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

    /// The guest's job now.
    ///
    /// # Errors
    /// What virsh said.
    pub fn job(&self, domain: &str) -> Result<Job> {
        let text = self.virsh(&["domjobinfo", domain, "--rawstats"])?;
        let words = text.lines().filter_map(|line| line.split_once(':'));
        Ok(Job(words
            .map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()))
            .collect()))
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
