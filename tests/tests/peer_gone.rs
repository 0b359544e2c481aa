//! Whoever takes part in a migration may vanish at any moment: engines, QEMUs, daemons, the network.
//!
//! Each time: one error of libvirt's that says what happened and where, the guest where it was with all of its memory, nothing of
//! ours left on either host, and the next migration works.

use anyhow::{ensure, Context, Result};
use ferry_tests::fault::Disturbed::{self, PreCopy, StopAndCopy};
use ferry_tests::fault::{engine, names, signal, Cut};
use ferry_tests::guest::{Guest, Rate};
use ferry_tests::host::{Host, Process};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::{usual, Scene, PATIENCE};
use ferry_tests::underway::Underway;
use ferry_tests::wait::wait_until;
use nix::sys::signal::Signal::{SIGKILL, SIGSTOP};

/// What the slow link lets through, Mbit a second: the first pass takes about six seconds, the last copy one or two.
const LINK: u32 = 80;

/// Where a migration is disturbed, and virsh's options for it.
type When = (Disturbed, &'static [&'static str]);

/// Each stage, managed and peer-to-peer.
const ALWAYS: [When; 4] = [
    (PreCopy, &[]),
    (PreCopy, &["--p2p"]),
    (StopAndCopy, &[]),
    (StopAndCopy, &["--p2p"]),
];

/// For faults that nobody is told of, which take half a minute to be noticed.
const TOGETHER: [When; 2] = [(PreCopy, &[]), (StopAndCopy, &["--p2p"])];

/// A guest that writes more than the slow link can carry, so that much is left for the last copy.
fn busy(name: &str) -> Guest {
    usual(name).filled(16).working_set(32).rate(Rate::mib(64))
}

/// Disturbs a migration from host1 to host2 in this stage and returns what virsh said. A cut lasts until then.
fn disturbed(
    scene: &Scene,
    stage: Disturbed,
    options: &[&str],
    fault: impl for<'a> FnOnce(&'a Lab) -> Result<Option<Cut<'a>>>,
) -> Result<String> {
    let (one, two) = (scene.lab.host(1), scene.lab.host(2));
    let slow = Slow::to(scene.lab, two, LINK)?;
    let mut underway = one.begin_migration(scene.name(), two, options)?;
    underway.reaches(stage)?;
    let cut = fault(scene.lab)?;
    drop(slow);
    let said = underway.fails()?;
    drop(cut);
    mended(scene.lab)?;
    println!("{stage:?} {options:?}: {said}");
    Ok(said)
}

fn mended(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    wait_until("the hosts to reach each other", PATIENCE, || {
        Ok(one.exec(&["ping", "-c1", "-W1", two.name()])?.status.success())
    })
}

/// The guest is as it was, and moves to and fro.
fn as_before(scene: &Scene) -> Result<()> {
    let (one, two) = (scene.lab.host(1), scene.lab.host(2));
    scene.is_unharmed(one)?;
    scene.move_to(one, two, &[]).context("the next migration")?;
    scene.move_to(two, one, &["--p2p"]).context("the one after")?;
    scene.lab.assert_clean(1)?;
    scene.lab.assert_clean(2)
}

/// Does to migrations what `fault` does, and judges how the guest comes out of it.
fn disturb(
    name: &str,
    fault: impl for<'a> Fn(&'a Lab) -> Result<Option<Cut<'a>>>,
    judge: impl Fn(&Scene, &str) -> Result<()>,
) -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::start(lab, lab.host(1), busy(name), 1)?;
        for (stage, options) in ALWAYS {
            let context = || format!("in {stage:?}, {options:?}");
            let said = disturbed(&scene, stage, options, &fault).with_context(context)?;
            judge(&scene, &said).with_context(context)?;
            as_before(&scene).with_context(context)?;
        }
        Ok(())
    })
}

/// Does to several migrations at once, each in a stage of its own, what `fault` does: the wait until it is noticed is one.
fn disturb_together(
    name: &str,
    fault: impl for<'a> FnOnce(&'a Lab) -> Result<Option<Cut<'a>>>,
    judge: impl Fn(&Scene, &str) -> Result<()>,
) -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let mut scenes = Vec::new();
        for number in 1..=TOGETHER.len() {
            let guest = busy(&format!("{name}-{number}"));
            scenes.push(Scene::start(lab, one, guest, u8::try_from(number)?)?);
        }
        let slow = Slow::to(lab, two, 2 * LINK)?;
        let mut underway = Vec::new();
        for (scene, (stage, options)) in scenes.iter().zip(TOGETHER) {
            let mut migration = one.begin_migration(scene.name(), two, options)?;
            migration
                .reaches(stage)
                .with_context(|| format!("{stage:?}, {options:?}"))?;
            underway.push(migration);
        }
        let cut = fault(lab)?;
        drop(slow);
        let said = underway
            .into_iter()
            .map(Underway::fails)
            .collect::<Result<Vec<_>>>()?;
        drop(cut);
        mended(lab)?;
        for ((scene, said), when) in scenes.iter().zip(said).zip(TOGETHER) {
            println!("{when:?}: {said}");
            judge(scene, &said)
                .and_then(|()| as_before(scene))
                .with_context(|| format!("in {when:?}"))?;
        }
        Ok(())
    })
}

/// Stops all engines of a host, as if their processors had been taken away.
fn hang(host: &Host) -> Result<Option<Cut<'static>>> {
    let engines = host.processes_named("virt-ferry-engine")?;
    ensure!(engines.len() == TOGETHER.len(), "{engines:?}");
    for engine in engines {
        signal(&engine, SIGSTOP)?;
    }
    Ok(None)
}

fn kill(process: Result<Process>) -> Result<Option<Cut<'static>>> {
    signal(&process?, SIGKILL)?;
    Ok(None)
}

#[test]
fn the_sources_engine_is_killed() -> Result<()> {
    disturb(
        "source-engine",
        |lab| kill(engine(lab.host(1))),
        |scene, said| {
            names(said, &["engine", "host1", "SIGKILL"])?;
            // At once: had the engine died with x-ignore-shared on, this would lose all memory.
            scene.survives_save_and_restore(scene.lab.host(1))
        },
    )
}

#[test]
fn the_destinations_engine_is_killed() -> Result<()> {
    disturb(
        "dest-engine",
        |lab| kill(engine(lab.host(2))),
        |_, said| names(said, &["192.168.77.12", "host1"]),
    )
}

#[test]
fn the_destinations_qemu_is_killed() -> Result<()> {
    disturb(
        "dest-qemu",
        |lab| kill(lab.host(2).qemu("dest-qemu")),
        // While the guest stands still, the source's QEMU may notice its broken stream first, and libvirt has its words.
        |_, said| {
            names(said, &["QEMU", "host2"]).or_else(|_| names(said, &["migration out", "Channel error"]))
        },
    )
}

#[test]
fn the_connections_are_reset() -> Result<()> {
    disturb(
        "reset",
        |lab| Cut::reset(lab.host(1)).map(Some),
        // Both ends are told at once: either may be the first to say so.
        |_, said| names(said, &["192.168.77.1", "on host host"]),
    )
}

#[test]
fn the_network_swallows_all_packets() -> Result<()> {
    disturb_together(
        "silence",
        |lab| Cut::silent(lab.host(1)).map(Some),
        |_, said| names(said, &["192.168.77.12", "host1", "network"]),
    )
}

#[test]
fn the_hosts_are_parted() -> Result<()> {
    disturb_together(
        "parted",
        |lab| Cut::off(lab, lab.host(2)).map(Some),
        |_, said| names(said, &["192.168.77.12", "host1"]),
    )
}

#[test]
fn the_destinations_engine_hangs() -> Result<()> {
    disturb_together(
        "hung-engine",
        |lab| hang(lab.host(2)),
        |_, said| names(said, &["192.168.77.12", "host1"]),
    )
}

#[test]
fn the_sources_engine_hangs() -> Result<()> {
    disturb_together(
        "hung-engine",
        |lab| hang(lab.host(1)),
        |scene, said| {
            names(said, &["engine", "host1", "silent"])?;
            scene.survives_save_and_restore(scene.lab.host(1))
        },
    )
}

#[test]
fn the_destinations_daemon_is_killed() -> Result<()> {
    disturb(
        "dest-daemon",
        |lab| {
            lab.host(2).restart_libvirtd(true)?;
            Ok(None)
        },
        |_, said| {
            ensure!(said.contains("error:"), "virsh said nothing: {said}");
            Ok(())
        },
    )
}

/// Nobody is left to clear x-ignore-shared but the daemon that is started anew.
#[test]
fn the_sources_daemon_and_engine_are_killed() -> Result<()> {
    disturb(
        "source-both",
        |lab| {
            let one = lab.host(1);
            let engine = engine(one)?;
            let daemon = one.processes_named("libvirtd")?.pop().context("no daemon")?;
            // Or it would clear it as its daemon ends.
            signal(&engine, SIGSTOP)?;
            signal(&daemon, SIGKILL)?;
            signal(&engine, SIGKILL)?;
            one.restart_libvirtd(true)?;
            Ok(None)
        },
        |scene, _| scene.survives_save_and_restore(scene.lab.host(1)),
    )
}

#[test]
fn the_sources_daemon_is_killed() -> Result<()> {
    disturb(
        "source-daemon",
        |lab| {
            lab.host(1).restart_libvirtd(true)?;
            Ok(None)
        },
        // What virsh says of its daemon's end is its own.
        |scene, _| scene.survives_save_and_restore(scene.lab.host(1)),
    )
}

/// Peer-to-peer, the daemon goes on without its client, as libvirt's own does.
#[test]
fn the_client_is_killed() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::start(lab, lab.host(1), busy("clientless"), 1)?;
        for stage in [PreCopy, StopAndCopy] {
            let context = || format!("in {stage:?}");
            let virsh = |lab: &Lab| {
                let mut clients = lab.host(1).processes_named("virsh")?;
                clients.retain(|client| client.arguments.iter().any(|argument| argument == "migrate"));
                clients.pop().context("no client")
            };
            disturbed(&scene, stage, &[], |lab| kill(virsh(lab))).with_context(context)?;
            as_before(&scene).with_context(context)?;
        }
        Ok(())
    })
}

#[test]
fn the_guest_itself_dies() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        for stage in [PreCopy, StopAndCopy] {
            let scene = Scene::start(lab, one, busy("mortal"), 1)?;
            let said = disturbed(&scene, stage, &[], |lab| kill(lab.host(1).qemu("mortal")))?;
            names(&said, &["QEMU", "host1"])?;
            for host in [one, two] {
                wait_until("the guest to be gone", PATIENCE, || {
                    Ok(host.state("mortal")?.is_none())
                })?;
            }
            lab.assert_clean(1)?;
            lab.assert_clean(2)?;
        }
        // A new guest of the same name moves.
        let scene = Scene::start(lab, one, busy("mortal"), 1)?;
        scene.move_to(one, two, &[])
    })
}
