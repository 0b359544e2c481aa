//! A guest that is shut off and on its way between two hosts, while something goes wrong.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_contract::cold::journal::{self, Journal, State};
use nix::sys::signal::Signal::SIGKILL;

use crate::cold::{same_files, Content, Guest, IMAGES};
use crate::fault::{engine, signal};
use crate::host::Host;
use crate::lab::Lab;
use crate::link::Slow;
use crate::phases::{Phases, COLD, PROTECTED};
use crate::wait::{wait_for, wait_until};

/// What the slow link lets through, Mbit a second: the guest's 40 MiB take four seconds.
pub const LINK: u32 = 80;
/// For a migration that was interrupted to be brought to an end: the engines' time limits and some more.
pub const SETTLE: Duration = Duration::from_secs(150);

/// A guest at host1, and what both hosts looked like with it and without.
pub struct Scene<'a> {
    /// Where.
    pub lab: &'a Lab,
    /// Its source,
    pub one: &'a Host,
    /// and its destination.
    pub two: &'a Host,
    /// The files of a host that has it.
    pub there: Vec<String>,
    /// Those of each host without it.
    pub nowhere: [Vec<String>; 2],
    /// Of its disk.
    pub digest: String,
}

/// Whether a file of a host's state directory is a journal.
pub fn is_journal(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "json")
}

/// Its disk, on either host.
pub fn disk() -> String {
    format!("{IMAGES}/g.img")
}

impl<'a> Scene<'a> {
    /// A raw disk of 64 MiB, 40 of them data.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn new(lab: &'a Lab) -> Result<Self> {
        let (one, two) = (lab.host(1), lab.host(2));
        let nowhere = [one.guests_files()?, two.guests_files()?];
        Content::dense(64, 40).write(one, &disk())?;
        Guest::new("g").disk("vda", "raw", &disk()).define(one)?;
        Ok(Scene {
            lab,
            one,
            two,
            there: one.guests_files()?,
            nowhere,
            digest: one.sha256(&disk())?,
        })
    }

    /// A guest that has more than a disk: a snapshot in it, and it starts with its host.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn with_a_snapshot(lab: &'a Lab) -> Result<Self> {
        let mut scene = Self::new(lab)?;
        let one = scene.one;
        one.virsh(&["undefine", "g"])?;
        let raw = format!("{IMAGES}/raw");
        one.run(&["mv", &disk(), &raw])?;
        one.run(&["qemu-img", "convert", "-O", "qcow2", &raw, &disk()])?;
        one.run(&["rm", &raw])?;
        Guest::new("g").disk("vda", "qcow2", &disk()).define(one)?;
        one.virsh(&["snapshot-create-as", "g", "first"])?;
        one.virsh(&["autostart", "g"])?;
        (scene.there, scene.digest) = (one.guests_files()?, one.sha256(&disk())?);
        Ok(scene)
    }

    /// All of that is here.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn is_complete(&self, host: &Host) -> Result<()> {
        host.has_shut_off("g")?;
        ensure!(host.sha256(&disk())? == self.digest, "the disk has changed");
        same_files(&self.there, &host.guests_files()?).with_context(|| host.name().to_owned())?;
        let snapshots = host.virsh(&["snapshot-list", "g", "--name"])?;
        ensure!(snapshots.trim() == "first", "{snapshots}");
        let about = host.virsh(&["dominfo", "g"])?;
        let autostart = about.lines().find(|line| line.starts_with("Autostart:"));
        ensure!(autostart.is_some_and(|line| line.ends_with("enable")), "{about}");
        host.boots(self.lab, "g")
    }

    /// The guest is whole at host1 and not at host2, which keeps nothing but what a second try takes up.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn is_at_the_source(&self) -> Result<()> {
        self.one.has_shut_off("g")?;
        ensure!(self.one.sha256(&disk())? == self.digest, "the disk has changed");
        ensure!(self.two.state("g")?.is_none(), "host2 knows the guest too");
        ensure!(!self.two.has(&disk()), "host2 has its disk");
        Ok(())
    }

    /// The guest is whole at host2, and host1 is as if it had never been there.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn is_at_the_destination(&self) -> Result<()> {
        self.two.has_shut_off("g")?;
        ensure!(self.two.sha256(&disk())? == self.digest, "the disk has changed");
        ensure!(self.one.state("g")?.is_none(), "host1 knows the guest too");
        same_files(&self.nowhere[0], &self.one.guests_files()?).context("host1")?;
        same_files(&self.there, &self.two.guests_files()?).context("host2")
    }

    /// Nothing of ours is left, also no engine that waits for another to ask.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn is_clean(&self) -> Result<()> {
        for number in [1, 2] {
            wait_until("a clean host", SETTLE, || {
                Ok(self.lab.assert_clean(number).is_ok())
            })?;
        }
        Ok(())
    }

    /// Tries again until it moves: the first tries may find what died not yet buried. Then it comes back.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn moves_again(&self) -> Result<()> {
        let mut last = String::new();
        let moved = wait_until("a second try to succeed", SETTLE, || {
            match self.one.move_cold("g", self.two, &["--undefinesource"]) {
                Ok(()) => Ok(true),
                Err(error) => {
                    last = format!("{error:#}");
                    println!("not yet: {last}");
                    self.is_at_the_source()?;
                    std::thread::sleep(Duration::from_secs(1));
                    Ok(false)
                }
            }
        });
        moved.with_context(|| last)?;
        self.is_at_the_destination()?;
        self.comes_back()
    }

    /// The guest moves back, and both hosts are as they were.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn comes_back(&self) -> Result<()> {
        self.two.move_cold("g", self.one, &["--undefinesource"])?;
        same_files(&self.there, &self.one.guests_files()?).context("host1")?;
        same_files(&self.nowhere[1], &self.two.guests_files()?).context("host2")
    }

    /// Interrupts the pull, and returns what virsh said.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn interrupted(&self, options: &[&str], fault: impl FnOnce() -> Result<()>) -> Result<String> {
        let slow = Slow::to(self.lab, self.two, LINK)?;
        let mut underway = self
            .one
            .begin_cold("g", self.two, &[&["--undefinesource"], options].concat())?;
        underway.wait_for_job("files to be on their way", |job| {
            job.figure("disk_processed") > 4 << 20
        })?;
        fault()?;
        drop(slow);
        let said = underway.fails()?;
        println!("{said}");
        Ok(said)
    }

    /// Kills a process of this name.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn kill(&self, host: &Host, name: &str) -> Result<()> {
        let process = host
            .processes_named(name)?
            .pop()
            .with_context(|| format!("no {name}"))?;
        signal(&process, SIGKILL)
    }

    /// What a host has written down of the guest's move.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn journal(&self, host: &Host) -> Result<Option<Journal>> {
        // Its daemon, whom one could ask for the guest's UUID, may be dead.
        let directory = host.path("/var/lib/virt-ferry").join(journal::DIRECTORY);
        let files = fs::read_dir(directory).into_iter().flatten().flatten();
        let mut journals = files.map(|file| file.path()).filter(|path| is_journal(path));
        let Some(path) = journals.next() else {
            return Ok(None);
        };
        let Ok(text) = fs::read(&path) else {
            return Ok(None);
        };
        Ok(Some(
            Journal::parse(&text).map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))?,
        ))
    }

    /// Waits until what a host has written down is in this state.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn wait_for_state(&self, host: &Host, state: State) -> Result<()> {
        wait_until(&format!("{} to be {state:?}", host.name()), SETTLE, || {
            Ok(self.journal(host)?.is_some_and(|journal| journal.state == state))
        })
    }

    /// A client that has come as far as Finish.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn prepared(&self) -> Result<Phases<'a>> {
        let mut client = Phases::of(self.lab, "g", self.one, self.two, COLD | PROTECTED)?;
        let (xml, cookie) = client.begin()?;
        // While it is between two hosts, it starts on none.
        self.does_not_start(self.one, "it is being moved")?;
        client.prepare(&xml, &cookie)?.map_err(anyhow::Error::msg)?;
        Ok(client)
    }

    /// The guest is refused to be started, for this reason.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn does_not_start(&self, host: &Host, why: &str) -> Result<()> {
        let said = host.exec(&["virsh", "start", "g"])?;
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        ensure!(said.contains(why), "{}: {said}", host.name());
        Ok(())
    }

    /// A host's engine and daemon are gone at once.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn crashes(&self, host: &Host) -> Result<()> {
        let daemon = host.processes_named("libvirtd")?.pop().context("no libvirtd")?;
        signal(&engine(host)?, SIGKILL)?;
        signal(&daemon, SIGKILL)
    }

    /// The destination dies in Finish, once a host's journal is in this state.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn dies_in_finish(&self, client: &mut Phases, host: &Host, state: State) -> Result<()> {
        std::thread::scope(|scope| {
            let finishing = scope.spawn(|| client.finish(None, false));
            let there = self.wait_for_state(host, state);
            // In any case: it ends Finish.
            self.crashes(self.two)?;
            let finished = finishing.join().map_err(|_| anyhow::anyhow!("a panic"))??;
            ensure!(finished.is_err(), "Finish succeeded");
            there
        })
    }

    /// The operator gives the guest's move up here, where the other host cannot be asked.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn gives_up(&self, host: &Host) -> Result<()> {
        // It waits for an attempt of the daemon's own to end.
        let output = host
            .command("timeout")
            .args([
                &SETTLE.as_secs().to_string(),
                "virt-ferry",
                "recover",
                "--abort",
                "g",
            ])
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        println!(
            "{}: {said}{}",
            host.name(),
            String::from_utf8_lossy(&output.stderr)
        );
        ensure!(
            said.contains("the other host has not heard it yet"),
            "{}",
            output.status
        );
        Ok(())
    }

    /// The journals are gone: nothing is open.
    ///
    /// # Errors
    /// If not, or where that cannot be found out.
    pub fn settles(&self) -> Result<()> {
        for host in [self.one, self.two] {
            wait_for("migrations to be brought to an end", SETTLE, || {
                let output = host.exec(&["virt-ferry", "recover"])?;
                Ok(output.status.success().then_some(()))
            })?;
        }
        Ok(())
    }
}
