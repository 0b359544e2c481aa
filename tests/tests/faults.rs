//! What breaks slowly, halfway or by bytes: memory, disks and networks that give out. As in [`peer_gone`]: wherever it breaks,
//! the guest runs on one host with all of its memory, nothing of ours is left, and the next migration works.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{ensure, Context, Error, Result};
use ferry_tests::fault::Disturbed::{PreCopy, StopAndCopy};
use ferry_tests::fault::{engine, names, signal, Cut, Full, Hog};
use ferry_tests::guest::Rate;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::phases::{Phases, LIVE, PROTECTED};
use ferry_tests::scene::{said, usual, Scene, PATIENCE};
use ferry_tests::wait::wait_until;
use nix::sys::signal::Signal::SIGKILL;

/// What the slow link lets through, Mbit a second.
const LINK: u32 = 80;

/// Moves the guest from host1 to host2, judges that it is on the right one whichever way it went, and leaves it on host1.
/// Returns virsh's error.
fn moved_or_not(scene: &Scene, options: &[&str]) -> Result<Option<String>> {
    let (one, two) = (scene.lab.host(1), scene.lab.host(2));
    let output = one.begin_migration(scene.name(), two, options)?.end()?;
    if output.status.success() {
        scene.is_unharmed(two)?;
        return Ok(None);
    }
    let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    println!("{error}");
    scene.is_unharmed(one)?;
    Ok(Some(error))
}

/// An engine on `host` that may not have more than so much address space.
fn thin_engine(host: &Host, mib: u64) -> Result<()> {
    let script = format!(
        "#!/bin/sh\ncase $1 in source | destination) ulimit -v $(({mib} << 10)) ;; esac\n\
         exec /usr/lib/virt-ferry/virt-ferry-engine \"$@\"\n"
    );
    let path = host.path("/usr/lib/virt-ferry/thin-engine");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let engine = "engine = \"/usr/lib/virt-ferry/thin-engine\"\n";
    Ok(fs::write(host.path("/etc/virt-ferry/virt-ferry.toml"), engine)?)
}

/// Memory runs out at the engine's start, as it makes its threads, as it maps the guest, as it copies.
#[test]
fn an_engine_out_of_memory() -> Result<()> {
    // From less than its program needs to just less than all it needs.
    const ROOM_MIB: [u64; 6] = [12, 16, 20, 24, 28, 36];
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("hungry").filled(16), 1)?;
        for host in [one, two] {
            let mut ours = 0;
            for (turn, mib) in ROOM_MIB.into_iter().enumerate() {
                let context = || format!("{mib} MiB for the engine of {}", host.name());
                thin_engine(host, mib)?;
                let options: &[&str] = if turn % 2 == 0 { &[] } else { &["--p2p"] };
                let before = said(one, "moved from host1 to host2");
                let failed = moved_or_not(&scene, options).with_context(context)?;
                fs::remove_file(host.path("/etc/virt-ferry/virt-ferry.toml"))?;
                ours += usize::from(said(one, "moved from host1 to host2") > before);
                if failed.is_none() {
                    scene.move_to(two, one, &[]).with_context(context)?;
                }
            }
            ensure!(
                ours <= 4,
                "the engine of {} ran out of memory {} times only",
                host.name(),
                6 - ours
            );
        }
        scene.move_to(one, two, &[])
    })
}

/// In the greeting, in the first pass, near its end.
#[test]
fn connections_that_are_reset_after_so_many_bytes() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("counted"), 1)?;
        for (bytes, options) in [
            ("300:", &[][..]),
            ("3000:", &["--p2p"][..]),
            ("1000000:", &[][..]),
            ("60000000:", &["--p2p"][..]),
        ] {
            let cut = Cut::reset_after(one, bytes)?;
            let error = moved_or_not(&scene, options).context(bytes)?;
            drop(cut);
            names(
                &error.with_context(|| format!("{bytes} passed"))?,
                &["on host host", "192.168.77.1"],
            )?;
        }
        scene.move_to(one, two, &[])?;
        scene.move_to(two, one, &["--p2p"])
    })
}

/// Somebody else takes what the reservation has found.
#[test]
fn memory_that_fills_up_under_way() -> Result<()> {
    Lab::with(Options::default().ram_size("512m"), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let busy = usual("crowded").working_set(32).rate(Rate::mib(64));
        let scene = Scene::start(lab, one, busy, 1)?;
        for (stage, options) in [(PreCopy, &[][..]), (StopAndCopy, &["--p2p"][..])] {
            let context = || format!("{stage:?}");
            let slow = Slow::to(lab, two, LINK)?;
            let mut underway = one.begin_migration(scene.name(), two, options)?;
            underway.reaches(stage)?;
            // A guest that does arrive runs there at once, and touches pages that it has not had before.
            let hog = Hog::leaving(two, if stage == PreCopy { 0 } else { 16 })?;
            drop(slow);
            let output = underway.end()?;
            drop(hog);
            let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            println!("{stage:?}: {error}");
            if output.status.success() {
                // The last copy went where earlier ones had found room.
                ensure!(stage == StopAndCopy, "the guest moved to where there is no room");
                scene.is_unharmed(two).with_context(context)?;
                scene.move_to(two, one, &[]).with_context(context)?;
                continue;
            }
            if stage == PreCopy {
                names(&error, &["host2", "No space left"]).with_context(context)?;
            }
            scene.is_unharmed(one).with_context(context)?;
        }
        scene.move_to(one, two, &[])
    })
}

/// A timeline that cannot be kept is no reason to keep a guest.
#[test]
fn a_full_disk_costs_the_timeline_alone() -> Result<()> {
    const LOGS: &str = "/var/log/virt-ferry";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("unlogged"), 1)?;
        let full = [Full::at(one, LOGS)?, Full::at(two, LOGS)?];
        one.migrate(scene.name(), two, &[])?;
        two.migrate(scene.name(), one, &["--p2p"])?;
        scene.lives_on(one)?;
        for host in [one, two] {
            ensure!(
                said(host, "No space left") > 0,
                "{} says nothing of its disk",
                host.name()
            );
            let left = fs::read_dir(host.path(LOGS))?.count();
            ensure!(left == 1, "{left} files on a full disk");
        }
        drop(full);
        scene.is_unharmed(one)?;
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)
    })
}

/// The guest has a place at the destination, and nothing has been sent yet.
#[test]
fn whoever_goes_before_perform() -> Result<()> {
    type Fault = fn(&Lab) -> Result<Option<Cut<'_>>>;
    const FAULTS: [(&str, Fault); 5] = [
        ("the source's engine", |lab| {
            signal(&engine(lab.host(1))?, SIGKILL).map(|()| None)
        }),
        ("the destination's engine", |lab| {
            signal(&engine(lab.host(2))?, SIGKILL).map(|()| None)
        }),
        ("the destination's QEMU", |lab| {
            signal(&lab.host(2).qemu("early")?, SIGKILL).map(|()| None)
        }),
        ("the destination's daemon", |lab| {
            lab.host(2).restart_libvirtd(true).map(|()| None)
        }),
        ("the connections", |lab| Cut::reset(lab.host(2)).map(Some)),
    ];
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("early"), 1)?;
        for (name, fault) in FAULTS {
            let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
            let (xml, cookie) = client.begin()?;
            let (cookie, uri) = client.prepare(&xml, &cookie)?.map_err(Error::msg)?;
            let cut = fault(lab)?;
            let performed = client.perform(&uri, &cookie)?;
            drop(cut);
            println!("{name}: {performed:?}");
            ensure!(performed.is_err(), "{name} was not missed");
            // It may be refused: its daemon has another one's connections now.
            let _ = client.finish(None, true)?;
            drop(client);
            wait_until("host2 to forget the guest", PATIENCE, || {
                Ok(two.state(scene.name())?.is_none())
            })
            .context(name)?;
            scene.is_unharmed(one).context(name)?;
        }
        scene.move_to(one, two, &[])
    })
}
