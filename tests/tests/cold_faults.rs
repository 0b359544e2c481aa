//! Whoever takes part in a cold migration may vanish in any step. Afterwards the guest is whole at exactly one host and starts
//! on no other, a second try succeeds, and no file is left that is not the guest's.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_contract::cold::journal::{self, Journal, State};
use ferry_contract::cold::REMAINS;
use ferry_tests::cold::{same_files, Content, Guest, IMAGES};
use ferry_tests::fault::{engine, names, signal, Cut, Held};
use ferry_tests::host::{Host, Process};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::phases::{Phases, COLD, PROTECTED};
use ferry_tests::wait::{wait_for, wait_until};
use nix::sys::signal::Signal::{SIGKILL, SIGSTOP};

/// What the slow link lets through, Mbit a second: the guest's 40 MiB take four seconds.
const LINK: u32 = 80;
/// For a migration that was interrupted to be brought to an end: the engines' time limits and some more.
const SETTLE: Duration = Duration::from_secs(150);

/// A guest at host1, and what both hosts looked like with it and without.
struct Scene<'a> {
    lab: &'a Lab,
    one: &'a Host,
    two: &'a Host,
    there: Vec<String>,
    nowhere: [Vec<String>; 2],
    digest: String,
}

fn is_journal(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "json")
}

fn disk() -> String {
    format!("{IMAGES}/g.img")
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
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
    fn with_a_snapshot(lab: &'a Lab) -> Result<Self> {
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
    fn is_complete(&self, host: &Host) -> Result<()> {
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
    fn is_at_the_source(&self) -> Result<()> {
        self.one.has_shut_off("g")?;
        ensure!(self.one.sha256(&disk())? == self.digest, "the disk has changed");
        ensure!(self.two.state("g")?.is_none(), "host2 knows the guest too");
        ensure!(!self.two.has(&disk()), "host2 has its disk");
        Ok(())
    }

    /// The guest is whole at host2, and host1 is as if it had never been there.
    fn is_at_the_destination(&self) -> Result<()> {
        self.two.has_shut_off("g")?;
        ensure!(self.two.sha256(&disk())? == self.digest, "the disk has changed");
        ensure!(self.one.state("g")?.is_none(), "host1 knows the guest too");
        same_files(&self.nowhere[0], &self.one.guests_files()?).context("host1")?;
        same_files(&self.there, &self.two.guests_files()?).context("host2")
    }

    /// Nothing of ours is left, also no engine that waits for another to ask.
    fn is_clean(&self) -> Result<()> {
        for number in [1, 2] {
            wait_until("a clean host", SETTLE, || {
                Ok(self.lab.assert_clean(number).is_ok())
            })?;
        }
        Ok(())
    }

    /// Tries again until it moves: the first tries may find what died not yet buried. Then it comes back.
    fn moves_again(&self) -> Result<()> {
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

    fn comes_back(&self) -> Result<()> {
        self.two.move_cold("g", self.one, &["--undefinesource"])?;
        same_files(&self.there, &self.one.guests_files()?).context("host1")?;
        same_files(&self.nowhere[1], &self.two.guests_files()?).context("host2")
    }

    /// Interrupts the pull, and returns what virsh said.
    fn interrupted(&self, options: &[&str], fault: impl FnOnce() -> Result<()>) -> Result<String> {
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

    fn kill(&self, host: &Host, name: &str) -> Result<()> {
        let process = host
            .processes_named(name)?
            .pop()
            .with_context(|| format!("no {name}"))?;
        signal(&process, SIGKILL)
    }

    /// What a host has written down of the guest's move.
    fn journal(&self, host: &Host) -> Result<Option<Journal>> {
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

    fn wait_for_state(&self, host: &Host, state: State) -> Result<()> {
        wait_until(&format!("{} to be {state:?}", host.name()), SETTLE, || {
            Ok(self.journal(host)?.is_some_and(|journal| journal.state == state))
        })
    }

    /// A client that has come as far as Finish.
    fn prepared(&self) -> Result<Phases<'a>> {
        let mut client = Phases::of(self.lab, "g", self.one, self.two, COLD | PROTECTED)?;
        let (xml, cookie) = client.begin()?;
        // While it is between two hosts, it starts on none.
        self.does_not_start(self.one, "it is being moved")?;
        client.prepare(&xml, &cookie)?.map_err(anyhow::Error::msg)?;
        Ok(client)
    }

    fn does_not_start(&self, host: &Host, why: &str) -> Result<()> {
        let said = host.exec(&["virsh", "start", "g"])?;
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        ensure!(said.contains(why), "{}: {said}", host.name());
        Ok(())
    }

    /// A host's engine and daemon are gone at once.
    fn crashes(&self, host: &Host) -> Result<()> {
        let daemon = host.processes_named("libvirtd")?.pop().context("no libvirtd")?;
        signal(&engine(host)?, SIGKILL)?;
        signal(&daemon, SIGKILL)
    }

    /// The destination dies in Finish, once a host's journal is in this state.
    fn dies_in_finish(&self, client: &mut Phases, host: &Host, state: State) -> Result<()> {
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
    fn gives_up(&self, host: &Host) -> Result<()> {
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
    fn settles(&self) -> Result<()> {
        for host in [self.one, self.two] {
            wait_for("migrations to be brought to an end", SETTLE, || {
                let output = host.exec(&["virt-ferry", "recover"])?;
                Ok(output.status.success().then_some(()))
            })?;
        }
        Ok(())
    }
}

#[test]
fn engines_die_while_files_are_on_their_way() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        // The destination looks for it for a minute.
        let said = scene.interrupted(&[], || signal(&engine(scene.one)?, SIGKILL))?;
        names(&said, &["host2"])?;
        scene.is_at_the_source()?;
        scene.moves_again().context("after the source's engine")?;
        let said = scene.interrupted(&["--p2p"], || signal(&engine(scene.two)?, SIGKILL))?;
        names(&said, &["engine", "host2"])?;
        scene.is_at_the_source()?;
        scene.moves_again().context("after the destination's engine")?;
        scene.is_clean()
    })
}

#[test]
fn daemons_die_while_files_are_on_their_way() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        scene.interrupted(&[], || scene.one.restart_libvirtd(true))?;
        scene.is_at_the_source()?;
        scene.moves_again().context("after the source's daemon")?;
        scene.interrupted(&["--p2p"], || scene.two.restart_libvirtd(true))?;
        scene.is_at_the_source()?;
        scene.moves_again().context("after the destination's daemon")?;
        scene.is_clean()
    })
}

/// The operator may end it, by hand or with Ctrl-C.
#[test]
fn it_is_given_up() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        for (options, command) in [
            (&[][..], &["virsh", "domjobabort", "g"][..]),
            (&["--p2p"], &["virsh", "domjobabort", "g"]),
            (&[], &["virt-ferry", "recover", "--abort", "g"]),
        ] {
            let said = scene.interrupted(options, || scene.one.run(command).map(drop))?;
            names(&said, &["operation aborted", "canceled by client"])?;
            scene.is_at_the_source()?;
            scene.settles()?;
            scene.one.boots(lab, "g")?;
        }
        scene.moves_again()?;
        scene.is_clean()
    })
}

/// A connection that is cut goes on where it was.
#[test]
fn the_network_is_cut_for_a_moment() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let slow = Slow::to(lab, scene.two, LINK)?;
        let mut underway = scene.one.begin_cold("g", scene.two, &["--undefinesource"])?;
        underway.wait_for_job("files to be on their way", |job| {
            job.figure("disk_processed") > 4 << 20
        })?;
        let cut = Cut::reset(scene.one)?;
        std::thread::sleep(Duration::from_secs(2));
        drop(cut);
        drop(slow);
        underway.succeeds()?;
        scene.is_at_the_destination()?;
        scene.comes_back()?;
        scene.is_clean()
    })
}

/// libvirt's client says nothing for as long as files are on their way, so that its connection to the source may be cut.
#[test]
fn the_client_goes_before_it_confirms() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let mut client = scene.prepared()?;
        client.finish(None, false)?.map_err(anyhow::Error::msg)?;
        drop(client);
        wait_until("the source to bring it to an end", SETTLE, || {
            Ok(scene.journal(scene.one)?.is_none())
        })?;
        scene.settles()?;
        scene.is_at_the_destination()?;
        scene.comes_back()?;
        scene.is_clean()
    })
}

/// A power failure must not bring a definition back once the files, or the journal that fences it, have gone: where that is not
/// certain they stay, and it is tried again.
#[test]
fn a_definition_goes_for_good_before_its_files() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let one = scene.one;
        let mut client = scene.prepared()?;
        client.finish(None, false)?.map_err(anyhow::Error::msg)?;
        // Nobody can bring to the disk what leads nowhere.
        let link = "/var/lib/libvirt/qemu/snapshot/g";
        one.run(&["ln", "-s", "g", link])?;
        let confirmed = client.confirm(None, false)?;
        println!("{confirmed:?}");
        let uncertain = "cannot be brought to the disk";
        ensure!(
            confirmed.is_err_and(|why| why.contains(uncertain)),
            "nobody was told"
        );
        ensure!(one.state("g")?.is_none(), "the guest is still defined");
        let journal = scene.journal(one)?.context("no journal")?;
        ensure!(journal.state == State::OwnedThere, "{:?}", journal.state);
        ensure!(
            one.sha256(&disk())? == scene.digest,
            "its disk has gone before its definition"
        );
        one.run(&["rm", link])?;
        scene.settles()?;
        scene.is_at_the_destination()?;
        scene.comes_back()?;
        scene.is_clean()
    })
}

/// Between two phases: by a client that stops there.
#[test]
fn they_die_between_the_phases() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let (one, two) = (scene.one, scene.two);
        for (what, fault) in [
            (
                "the source's engine",
                &(|| signal(&engine(one)?, SIGKILL)) as &dyn Fn() -> Result<()>,
            ),
            ("the destination's engine", &|| signal(&engine(two)?, SIGKILL)),
            ("the destination's daemon", &|| two.restart_libvirtd(true)),
        ] {
            let mut client = scene.prepared()?;
            fault()?;
            let finished = client.finish(None, false)?;
            println!("{what}: {finished:?}");
            ensure!(finished.is_err(), "Finish succeeded without {what}");
            let _ = client.confirm(None, true)?;
            scene.is_at_the_source().context(what)?;
            scene.moves_again().context(what)?;
        }

        // The guest is the destination's, and the source's daemon dies before it has heard of it from the client.
        let mut client = scene.prepared()?;
        client.finish(None, false)?.map_err(anyhow::Error::msg)?;
        let daemon = one.processes_named("libvirtd")?.pop().context("no libvirtd")?;
        signal(&daemon, SIGKILL)?;
        one.restart_libvirtd(true)?;
        let said = one.exec(&["virsh", "start", "g"])?;
        ensure!(!said.status.success(), "the guest starts on both hosts");
        // Nobody asks for it: a client has connected.
        wait_until("the source to bring it to an end", SETTLE, || {
            Ok(scene.journal(one)?.is_none())
        })?;
        scene.settles()?;
        scene
            .is_at_the_destination()
            .context("after the source's daemon")?;
        scene.comes_back()?;
        scene.is_clean()
    })
}

/// Nobody is left to go on with what was pulled: it is removed.
#[test]
fn the_client_is_killed() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        scene.interrupted(&[], || scene.kill(scene.one, "virsh"))?;
        wait_until("the destination to be as before", SETTLE, || {
            Ok(scene.two.state("g")?.is_none()
                && same_files(&scene.nowhere[1], &scene.two.guests_files()?).is_ok())
        })?;
        scene.is_at_the_source()?;
        scene.moves_again()?;
        scene.is_clean()
    })
}

/// A source that may have let go keeps the guest only where the operator says that the other host is lost.
#[test]
fn the_other_host_is_lost() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let (one, two) = (scene.one, scene.two);
        let mut client = Phases::of(lab, "g", one, two, COLD | PROTECTED)?;
        let (xml, cookie) = client.begin()?;
        client.prepare(&xml, &cookie)?.map_err(anyhow::Error::msg)?;
        for host in [two, one] {
            let daemon = host.processes_named("libvirtd")?.pop().context("no libvirtd")?;
            let engine = engine(host)?;
            // Or the engine would put things in order as its daemon ends.
            signal(&engine, SIGSTOP)?;
            signal(&daemon, SIGKILL)?;
            signal(&engine, SIGKILL)?;
        }
        // As if that had been a moment later: the destination had asked for the guest, and was told yes.
        let directory = one.path("/var/lib/virt-ferry/cold");
        let mut journals = fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.path()));
        let journal = journals.find(|path| is_journal(path)).context("no journal")?;
        let mut written: serde_json::Value = serde_json::from_slice(&fs::read(&journal)?)?;
        ensure!(written["state"] == "prepared", "{written}");
        written["state"] = "committed".into();
        fs::write(&journal, written.to_string())?;
        one.restart_libvirtd(true)?;

        let said = one.exec(&["virsh", "start", "g"])?;
        ensure!(
            !said.status.success(),
            "the guest starts, and may be the other host's"
        );
        let said = one.exec(&["virt-ferry", "recover", "--lost", "host3", "g"])?;
        let error = String::from_utf8_lossy(&said.stderr).into_owned();
        ensure!(error.contains("is host2, not host3"), "{error}");
        ensure!(journal.exists(), "another host was lost");
        one.run(&["virt-ferry", "recover", "--lost", "host2", "g"])?;
        ensure!(!journal.exists(), "the guest is still between two hosts");
        one.has_shut_off("g")?;
        ensure!(one.sha256(&disk())? == scene.digest, "the disk has changed");
        one.boots(lab, "g")
    })
}

/// The source has let go, and the destination is lost before it has said that it has the guest: the operator takes the guest
/// back, and not before saying that it is lost. Should the destination come back, it does not have it, and keeps nobody from
/// moving it there.
#[test]
fn the_destination_is_lost_for_good() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let (one, two) = (scene.one, scene.two);
        let mut client = scene.prepared()?;
        let held = Held::at(&engine(two)?, "renameat2")?;
        scene.dies_in_finish(&mut client, one, State::Committed)?;
        drop(held);
        let confirmed = client.confirm(None, true)?;
        println!("{confirmed:?}");
        scene.does_not_start(one, "may belong to that host already")?;
        // The source's engine waits for the destination, which may still say that it has the guest.
        let waits = |engine: &Process| engine.arguments.iter().any(|argument| argument == "cold-source");
        ensure!(
            one.processes_named("virt-ferry-engine")?.iter().any(waits),
            "no engine"
        );
        let refused = one.exec(&["virt-ferry", "recover", "--abort", "g"])?;
        let said = String::from_utf8_lossy(&refused.stdout).into_owned();
        ensure!(said.contains("only host host2 knows whether it has it"), "{said}");
        scene.does_not_start(one, "may belong to that host already")?;
        one.run(&["virt-ferry", "recover", "--lost", "host2", "g"])?;
        ensure!(
            !one.processes_named("virt-ferry-engine")?.iter().any(waits),
            "its engine still waits"
        );
        one.has_shut_off("g")?;
        one.boots(lab, "g")?;

        two.restart_libvirtd(true)?;
        let waiting = scene.journal(two)?.context("no journal")?;
        ensure!(waiting.state == State::Committing, "{:?}", waiting.state);
        scene.moves_again()?;
        scene.is_clean()
    })
}

/// The guest is the destination's, which is lost before the source has deleted it, though it has undefined it: the operator
/// takes it back, with all that libvirt had of it.
#[test]
fn the_destination_is_lost_with_the_guest() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::with_a_snapshot(lab)?;
        let (one, two) = (scene.one, scene.two);
        let mut client = scene.prepared()?;
        client.finish(None, false)?.map_err(anyhow::Error::msg)?;
        scene.wait_for_state(one, State::OwnedThere)?;
        let daemon = two.processes_named("libvirtd")?.pop().context("no libvirtd")?;
        signal(&daemon, SIGKILL)?;
        // As the client's Confirm would, had it come so far.
        one.virsh(&["undefine", "g", "--snapshots-metadata"])?;
        one.run(&["virt-ferry", "recover", "--lost", "host2", "g"])?;
        ensure!(scene.journal(one)?.is_none(), "it is still open");
        scene.is_complete(one)
    })
}

/// Everything has come, and the source is lost: the destination keeps it, and it is the guest once the operator says so, with
/// all that belongs to it.
fn is_owned_by_the_destination(
    lab: &Lab,
    ends: impl FnOnce(&Scene, &mut Phases) -> Result<()>,
) -> Result<()> {
    let scene = Scene::with_a_snapshot(lab)?;
    let (one, two) = (scene.one, scene.two);
    let mut client = scene.prepared()?;
    scene.wait_for_state(two, State::Ready)?;
    scene.crashes(one)?;
    ends(&scene, &mut client)?;
    let said = two.exec(&["virt-ferry", "recover", "--lost", "host3", "g"])?;
    let error = String::from_utf8_lossy(&said.stderr).into_owned();
    ensure!(error.contains("is host1, not host3"), "{error}");
    two.run(&["virt-ferry", "recover", "--lost", "host1", "g"])?;
    scene.is_complete(two)
}

/// And the destination's daemon, with libvirt's half of the guest: its engine gives up, and the next daemon recovers.
#[test]
fn the_source_is_lost_and_its_guest_is_not() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        is_owned_by_the_destination(lab, |scene, _| scene.two.restart_libvirtd(true))
    })
}

/// And Finish fails for it.
#[test]
fn the_source_is_lost_when_it_is_asked() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        is_owned_by_the_destination(lab, |scene, client| {
            let finished = client.finish(None, false)?;
            println!("{finished:?}");
            ensure!(finished.is_err(), "Finish succeeded without the source");
            // libvirt gives it up, and it stays all the same.
            scene.wait_for_state(scene.two, State::Returning)?;
            ensure!(scene.two.state("g")?.is_none(), "host2 knows the guest");
            Ok(())
        })
    })
}

/// What the operator defines while the guest waits is his, and nobody else undefines it; what a crash has left of taking the
/// guest back goes.
#[test]
fn a_guest_that_waits_is_defined_by_hand() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let (one, two) = (scene.one, scene.two);
        let xml = one.virsh(&["dumpxml", "--inactive", "g"])?;
        let left = xml.replace("</name>", &format!("</name><metadata>{REMAINS}</metadata>"));
        let client = scene.prepared()?;
        scene.wait_for_state(two, State::Ready)?;
        scene.crashes(one)?;
        two.restart_libvirtd(true)?;
        drop(client);
        scene.wait_for_state(two, State::Returning)?;
        two.define(&left)?;
        wait_until("what a crash has left to go", SETTLE, || {
            Ok(two.state("g")?.is_none())
        })?;
        two.define(&xml)?;
        // It says how that stands when its time is up.
        two.exec(&["timeout", "1", "virt-ferry", "recover", "g"])?;
        for way in [
            "virsh undefine g",
            "virt-ferry recover --lost host1 g",
            "virt-ferry recover --abort g",
        ] {
            wait_until(way, SETTLE, || {
                let log = two.libvirtd_log();
                let mut lines = log.lines();
                Ok(lines.any(|line| line.contains("is defined here") && line.contains(way)))
            })?;
        }
        two.has_shut_off("g")?;
        scene.does_not_start(two, "which has not said yet whose it is")?;
        two.run(&["virt-ferry", "recover", "--lost", "host1", "g"])?;
        two.has_shut_off("g")?;
        ensure!(two.sha256(&disk())? == scene.digest, "the disk has changed");
        two.boots(lab, "g")
    })
}

/// The destination has asked, and the source is lost before it answers: the operator gives up there what may have become its
/// guest. The source, back again, has it.
#[test]
fn the_source_is_lost_for_good() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let (one, two) = (scene.one, scene.two);
        let mut client = scene.prepared()?;
        signal(&engine(one)?, SIGSTOP)?;
        scene.dies_in_finish(&mut client, two, State::Committing)?;
        scene.crashes(one)?;
        two.restart_libvirtd(true)?;
        scene.gives_up(two)?;
        // But for what the source is still to hear.
        let mut files = two.guests_files()?;
        files.retain(|file| !file.starts_with("/var/lib/virt-ferry/"));
        same_files(&scene.nowhere[1], &files).context("host2")?;
        // With that to be told, its daemon does not end itself; then it does.
        two.libvirtd_ends_when_idle()?;
        two.libvirtd_stays()?;

        one.restart_libvirtd(true)?;
        scene.settles()?;
        two.libvirtd_has_ended()?;
        scene.is_at_the_source()?;
        one.boots(lab, "g")?;
        scene.moves_again()?;
        scene.is_clean()
    })
}
