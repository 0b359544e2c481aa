//! Whoever takes part in a cold migration may vanish in any step. Afterwards the guest is whole at exactly one host and starts
//! on no other, a second try succeeds, and no file is left that is not the guest's.

use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_contract::cold::journal::State;
use ferry_tests::cold::same_files;
use ferry_tests::cold_scene::{disk, Scene, LINK, SETTLE};
use ferry_tests::fault::{engine, names, signal, Cut};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::wait::wait_until;
use nix::sys::signal::Signal::SIGKILL;

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
