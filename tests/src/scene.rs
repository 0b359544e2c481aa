//! A lab with one Linux guest in it: what most end-to-end tests begin with, and how they judge a move.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{ensure, Context, Result};

use crate::guest::console::Console;
use crate::guest::remote::Remote;
use crate::guest::{Address, Guest, Rate};
use crate::host::Host;
use crate::lab::Lab;

/// For whatever a guest does at once, on a machine that has other things to do.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A guest that runs in a lab and is reached from the lab's switch.
pub struct Scene<'a> {
    /// The lab.
    pub lab: &'a Lab,
    name: String,
    ip: Ipv4Addr,
    console: Console,
    remote: Remote,
    checks: std::cell::Cell<u32>,
}

/// The address of the test guest of this number.
pub fn address(number: u8) -> Address {
    Address {
        ip: Ipv4Addr::new(192, 168, 77, 100 + number),
        prefix: 24,
    }
}

/// The usual guest: 256 MiB under TCG, part of it filled, part of it written at a steady rate.
pub fn usual(name: &str) -> Guest {
    Guest::linux(name)
        .memory_mib(256)
        .working_set(24)
        .filled(64)
        .rate(Rate::mib(16))
}

impl<'a> Scene<'a> {
    /// Starts `guest` on `host`, with a NIC at the address of `number`, and waits until it serves its commands.
    ///
    /// # Errors
    /// If it cannot be built or started, or does not come up.
    pub fn start(lab: &'a Lab, host: &Host, guest: Guest, number: u8) -> Result<Self> {
        let address = address(number);
        let guest = guest.network("labbr0", address);
        let directory = lab.share().join("guests");
        guest.install(&directory)?;
        lab.witness()?.forget(address.ip);
        host.create(&guest.xml())?;
        let namespace = PathBuf::from(format!("/proc/{}/ns/net", lab.switch().init()));
        let scene = Scene {
            lab,
            name: guest.name().to_owned(),
            ip: address.ip,
            console: Console::new(guest.log_in(&directory)),
            remote: Remote::new(Some(&namespace), address.ip)?,
            checks: std::cell::Cell::new(0),
        };
        scene.console.next_status(PATIENCE, |_| true)?;
        scene.remote.status(PATIENCE)?;
        Ok(scene)
    }

    /// The guest's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The guest's commands.
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Has the guest check all of its memory now.
    ///
    /// # Errors
    /// If a page is damaged, or the guest does not answer.
    pub fn check(&self) -> Result<()> {
        let number = self.checks.get() + 1;
        self.checks.set(number);
        let verdict = self.remote.check(&number.to_string(), PATIENCE)?;
        ensure!(
            verdict.ok(),
            "the guest finds its memory damaged: {verdict:?}; {:?}",
            self.console.errors()?
        );
        Ok(())
    }

    /// The guest has gone back in time just now: what it says a second time is no other copy of it.
    ///
    /// # Errors
    /// If nobody listens.
    pub fn goes_back(&self) -> Result<()> {
        self.lab.witness()?.forget(self.ip);
        Ok(())
    }

    /// Nobody has heard the guest say anything twice, as two copies of it would.
    ///
    /// # Errors
    /// If somebody has.
    pub fn ran_once(&self) -> Result<()> {
        let heard = self.lab.witness()?.heard(self.ip);
        ensure!(
            heard.repeated == 0,
            "the guest ran twice: of {} heartbeats {} were no newer than one before",
            heard.received,
            heard.repeated
        );
        Ok(())
    }

    /// The guest runs on `host`, on no other, its memory is good, it makes progress, and has run nowhere else meanwhile.
    ///
    /// # Errors
    /// If not.
    pub fn lives_on(&self, host: &Host) -> Result<()> {
        self.judge_on(host).with_context(|| self.last_seen())
    }

    /// What is known of a guest besides its answers.
    fn last_seen(&self) -> String {
        let console = self.console.text().unwrap_or_default();
        let heard = self.lab.witness().map(|witness| witness.heard(self.ip).received);
        format!(
            "{} beats were heard, and the console's last line is '{}'",
            heard.unwrap_or_default(),
            console.lines().last().unwrap_or_default()
        )
    }

    fn judge_on(&self, host: &Host) -> Result<()> {
        host.wait_for_state(&self.name, "running")?;
        for other in self
            .lab
            .hosts()
            .iter()
            .filter(|other| other.name() != host.name())
        {
            let state = other.state(&self.name)?;
            ensure!(
                state.as_deref().is_none_or(|state| state.starts_with("shut off")),
                "the guest is {state:?} on {} too",
                other.name()
            );
        }
        let before = self.remote.status(PATIENCE)?;
        self.check()?;
        let after = self.remote.status(PATIENCE)?;
        ensure!(
            after.t >= before.t && after.errors == 0,
            "{before:?}, then {after:?}"
        );
        self.ran_once()
    }

    /// Moves the guest with virsh and judges the arrival.
    ///
    /// # Errors
    /// If it does not arrive whole.
    pub fn move_to(&self, from: &Host, to: &Host, options: &[&str]) -> Result<()> {
        from.migrate(&self.name, to, options)
            .with_context(|| format!("{} to {}", from.name(), to.name()))?;
        self.lives_on(to)
            .with_context(|| format!("after the move to {}", to.name()))
    }
}

/// How often the log of a host's libvirtd says this.
///
/// # Errors
/// If it cannot be read.
pub fn said(host: &Host, what: &str) -> usize {
    host.libvirtd_log().matches(what).count()
}
