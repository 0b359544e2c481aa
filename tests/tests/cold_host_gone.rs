//! A host is lost in the middle of a cold migration, for a while or for good: the guest is whole at the other one, which the
//! operator says, and starts on no two.

use std::fs;

use anyhow::{ensure, Context, Result};
use ferry_contract::cold::journal::State;
use ferry_contract::cold::REMAINS;
use ferry_tests::cold::same_files;
use ferry_tests::cold_scene::{disk, is_journal, Scene, SETTLE};
use ferry_tests::fault::{engine, signal, Held};
use ferry_tests::host::Process;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::phases::{Phases, COLD, PROTECTED};
use ferry_tests::wait::wait_until;
use nix::sys::signal::Signal::{SIGKILL, SIGSTOP};

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
