//! What an operator may ask of a migration, asked for: the engine moves the guest, and does as it is told.

use std::fs;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::Rate;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::{usual, Scene, PATIENCE};
use ferry_tests::timeline::Role;
use ferry_tests::wait::wait_until;

const MIB: u64 = 1 << 20;

/// A lab, and a usual guest on host1.
fn with_guest(name: &str, test: impl FnOnce(&Lab, &Scene) -> Result<()>) -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::start(lab, lab.host(1), usual(name), 1)?;
        test(lab, &scene)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

#[test]
fn without_live_the_guest_stands_still() -> Result<()> {
    with_guest("still", |lab, scene| {
        let (one, two) = (lab.host(1), lab.host(2));
        for (from, to, options) in [(one, two, &[][..]), (two, one, &["--p2p"])] {
            let slow = Slow::to(lab, to, 400)?;
            let uri = to.uri();
            let migrate = [&["migrate", "still", &uri], options].concat();
            let mut moving = from.command("virsh").args(migrate).spawn().context("virsh")?;
            wait_until("the guest to be paused", PATIENCE, || {
                Ok(from
                    .state("still")?
                    .is_some_and(|state| state.starts_with("paused")))
            })?;
            wait_until("memory to be on its way", PATIENCE, || {
                let job = from.job("still")?;
                ensure!(moving.try_wait()?.is_none(), "the pause came late: {job:?}");
                Ok(job.figure("memory_remaining") > 0 && job.figure("memory_processed") > 0)
            })?;
            ensure!(moving.wait()?.success(), "virsh migrate failed");
            drop(slow);
            scene.lives_on(to)?;
            from.assert_moved_away(1)?;
            let timeline = from.last_timeline(Role::Source)?;
            // Nothing is written while the guest stands still.
            ensure!(timeline.rounds.len() == 1, "{:?}", timeline.rounds);
        }
        Ok(())
    })
}

#[test]
fn bandwidth_is_kept_to_and_may_change_under_way() -> Result<()> {
    with_guest("slowly", |lab, scene| {
        let (one, two) = (lab.host(1), lab.host(2));
        let mut moving = one.begin_migration("slowly", two, &["--bandwidth", "4"])?;
        let job = moving.wait_for_job("20 MiB to be sent", |job| {
            job.figure("memory_normal_bytes") > 20 * MIB
        })?;
        let (bytes, ms) = (job.figure("memory_normal_bytes"), job.figure("time_elapsed"));
        // The first bytes of the elapsed time are spent on preparing the destination: that is not counted for much.
        ensure!(
            bytes <= 5 * MIB * ms / 1000,
            "{bytes} bytes in {ms} ms at 4 MiB/s"
        );
        one.virsh(&["migrate-setspeed", "slowly", "2000"])?;
        moving.succeeds()?;
        scene.lives_on(two)?;
        one.assert_moved_away(1)?;
        // What is set before holds as well.
        two.virsh(&["migrate-setspeed", "slowly", "4"])?;
        ensure!(two.virsh(&["migrate-getspeed", "slowly"])?.trim() == "4");
        let mut moving = two.begin_migration("slowly", one, &["--p2p"])?;
        let job = moving.wait_for_job("20 MiB to be sent", |job| {
            job.figure("memory_normal_bytes") > 20 * MIB
        })?;
        let (bytes, ms) = (job.figure("memory_normal_bytes"), job.figure("time_elapsed"));
        ensure!(
            bytes <= 5 * MIB * ms / 1000,
            "{bytes} bytes in {ms} ms at 4 MiB/s"
        );
        two.virsh(&["migrate-setspeed", "slowly", "2000"])?;
        moving.succeeds()?;
        scene.lives_on(one)?;
        two.assert_moved_away(1)
    })
}

/// The definition that a command prints, with a title in it.
fn titled(host: &Host, command: &[&str], title: &str) -> Result<String> {
    let xml = host.virsh(command)?;
    let file = format!("/run/{}.xml", title.replace(' ', "-"));
    let xml = xml.replacen("</name>", &format!("</name>\n  <title>{title}</title>"), 1);
    fs::write(host.path(&file), xml)?;
    Ok(file)
}

/// What the guest is called, how it is defined, and where its memory goes.
#[test]
fn names_definitions_and_addresses_are_as_asked() -> Result<()> {
    with_guest("asked", |lab, scene| {
        let (one, two) = (lab.host(1), lab.host(2));
        one.make_persistent("asked")?;
        two.run(&["ip", "address", "add", "192.168.77.212/24", "dev", "labbr0"])?;
        let slow = Slow::to(lab, two, 200)?;
        let mut moving = one.begin_migration(
            "asked",
            two,
            &[
                "--persistent",
                "--undefinesource",
                "--dname",
                "renamed",
                "--migrateuri",
                "tcp://192.168.77.212",
                "--listen-address",
                "192.168.77.212",
                "--graphicsuri",
                "vnc://192.168.77.212:5900",
            ],
        )?;
        moving.wait_for_job("memory to be on its way", |job| {
            job.figure("memory_processed") > 0
        })?;
        let engines = "( sport >= :49152 and sport <= :49215 )";
        let arriving = two.run(&["ss", "-Htn", "state", "established", engines])?;
        ensure!(
            !arriving.is_empty() && arriving.lines().all(|line| line.contains("192.168.77.212:")),
            "the memory does not come to the address that was asked for: {arriving}"
        );
        drop(slow);
        moving.succeeds()?;
        one.assert_moved_away(1)?;
        two.wait_for_state("renamed", "running")?;
        scene.check()?;
        ensure!(one.state("asked")?.is_none(), "host1 still defines the guest");
        ensure!(two.is_persistent("renamed")?, "host2 does not define the guest");

        let there = titled(two, &["dumpxml", "--migratable", "renamed"], "in transit")?;
        let rest = titled(
            two,
            &["dumpxml", "--inactive", "--migratable", "renamed"],
            "at rest",
        )?;
        let definitions = ["--xml", &there, "--persistent-xml", &rest];
        let options = [
            &["--p2p", "--persistent", "--dname", "asked", "--suspend"],
            &definitions[..],
        ]
        .concat();
        two.migrate("renamed", one, &options)?;
        two.assert_moved_away(1)?;
        one.wait_for_state("asked", "paused")?;
        one.virsh(&["resume", "asked"])?;
        scene.lives_on(one)?;
        let title = |config: &[&str]| one.virsh(&[&["desc", "asked", "--title"], config].concat());
        ensure!(title(&[])? == "in transit", "{}", title(&[])?);
        ensure!(title(&["--config"])? == "at rest", "{}", title(&["--config"])?);
        // Not to be undefined, it is still defined where it came from.
        ensure!(two
            .state("renamed")?
            .is_some_and(|state| state.starts_with("shut off")));
        two.remove("renamed")
    })
}

/// A guest that fails to write its disk stops; whoever asked for it wants it to stay then, and go on once it can.
#[test]
fn an_io_error_ends_the_migration_where_asked() -> Result<()> {
    const DISK: &str = "/lab/small/disk.raw";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        for host in [one, two] {
            host.run(&["mkdir", "-p", "-m", "755", "/lab/small"])?;
            host.run(&["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", "/lab/small"])?;
            host.image(DISK, 32)?;
        }
        let guest = usual("writer").disk(DISK, "raw").disk_load(32, Rate(60));
        let _scene = Scene::start(lab, one, guest, 1)?;
        for options in [
            &["--unsafe", "--abort-on-error"][..],
            &["--p2p", "--unsafe", "--abort-on-error"],
        ] {
            let slow = Slow::to(lab, two, 200)?;
            let mut moving = one.begin_migration("writer", two, options)?;
            moving.wait_for_job("memory to be on its way", |job| {
                job.figure("memory_processed") > 0
            })?;
            wait_until("the guest to fail at its disk", PATIENCE, || {
                // No room, and blocks that were written once need some again.
                let _ = one.exec(&[
                    "dd",
                    "if=/dev/zero",
                    "of=/lab/small/full",
                    "bs=64k",
                    "oflag=append",
                    "conv=notrunc",
                ])?;
                one.run(&[
                    "fallocate",
                    "--punch-hole",
                    "--offset",
                    "0",
                    "--length",
                    "32M",
                    DISK,
                ])?;
                let _ = one.exec(&[
                    "dd",
                    "if=/dev/zero",
                    "of=/lab/small/full",
                    "bs=64k",
                    "oflag=append",
                    "conv=notrunc",
                ])?;
                Ok(one
                    .state("writer")?
                    .is_some_and(|state| state.starts_with("paused")))
            })?;
            drop(slow);
            // QEMU tells of the stop and of its reason in two events. Where the stop is heard first, libvirt takes it for the
            // migration's own, and has no error to end it for (libvirt 11.3, `qemuProcessHandleStop`).
            if one.state("writer")?.as_deref() != Some("paused (I/O error)") {
                println!("{options:?}: libvirt did not hear of the error in time");
                moving.end()?;
                return Ok(());
            }
            let error = moving.fails()?;
            ensure!(error.contains("I/O error"), "{error}");
            let state = one.state("writer")?;
            ensure!(state.as_deref() == Some("paused (I/O error)"), "{state:?}");
            one.run(&["rm", "/lab/small/full"])?;
            one.virsh(&["resume", "writer"])?;
            one.wait_for_state("writer", "running")?;
        }
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// Waiting for too long ends in post-copy only where that was asked for, which virsh and libvirt see to.
#[test]
fn a_timeout_into_postcopy_needs_postcopy() -> Result<()> {
    with_guest("patience", |lab, scene| {
        let (one, two) = (lab.host(1), lab.host(2));
        let refused = one.begin_migration("patience", two, &["--timeout", "5", "--timeout-postcopy"])?;
        let error = refused.fails()?;
        ensure!(error.contains("postcopy"), "{error}");
        scene.lives_on(one)
    })
}

#[test]
fn parallel_streams_are_as_many_as_asked() -> Result<()> {
    with_guest("wide", |lab, scene| {
        let (one, two) = (lab.host(1), lab.host(2));
        let streams = |host: &Host| {
            host.last_timeline(Role::Source)
                .map(|timeline| timeline.streams())
        };
        scene.move_to(one, two, &["--parallel"])?;
        ensure!(streams(one)? == 2, "{} streams", streams(one)?);
        scene.move_to(two, one, &["--p2p", "--parallel", "--parallel-connections", "5"])?;
        ensure!(streams(two)? == 5, "{} streams", streams(two)?);
        one.assert_moved_away(1)?;
        two.assert_moved_away(1)
    })
}

#[test]
fn compressed_memory_takes_less_of_the_link() -> Result<()> {
    with_guest("packed", |lab, scene| {
        let (one, two) = (lab.host(1), lab.host(2));
        scene.move_to(one, two, &["--compressed"])?;
        let timeline = one.last_timeline(Role::Source)?;
        ensure!(timeline.notes("zstd, level 1"), "{timeline:?}");
        let level = [
            "--p2p",
            "--compressed",
            "--comp-methods",
            "zstd",
            "--comp-zstd-level",
            "9",
        ];
        scene.move_to(two, one, &level)?;
        ensure!(two.last_timeline(Role::Source)?.notes("zstd, level 9"));
        for timeline in [timeline, two.last_timeline(Role::Source)?] {
            let (data, wire) = (timeline.totals.data_bytes, timeline.totals.wire_bytes);
            ensure!(wire < data, "{wire} bytes on the wire for {data} of memory");
        }
        one.assert_moved_away(1)?;
        two.assert_moved_away(1)
    })
}

/// libvirt copies the disk, which the guest reads, writes and compares all the while; the engine the memory.
#[test]
fn disks_go_along() -> Result<()> {
    const DISK: &str = "/var/lib/libvirt/images/along.raw";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        one.image(DISK, 64)?;
        two.image(DISK, 64)?;
        let guest = usual("along").disk(DISK, "raw").disk_load(16, Rate(40));
        let scene = Scene::start(lab, one, guest, 1)?;
        let blocks = scene.remote().status(PATIENCE)?.disk;
        let options: [&[&str]; 3] = [
            &["--copy-storage-all", "--copy-storage-synchronous-writes"],
            &[
                "--p2p",
                "--copy-storage-all",
                "--migrate-disks",
                "vda",
                "--disks-uri",
                "tcp://192.168.77.11:49301",
            ],
            &["--copy-storage-all", "--disks-port", "49300"],
        ];
        for (turn, options) in options.into_iter().enumerate() {
            let (from, to) = if turn % 2 == 0 { (one, two) } else { (two, one) };
            // What an earlier turn left must not be taken for what this one copied.
            to.image(DISK, 64)?;
            scene
                .move_to(from, to, options)
                .with_context(|| format!("{options:?}"))?;
            from.assert_moved_away(turn / 2 + 1)?;
            wait_until("the guest to use its disk", Duration::from_secs(60), || {
                Ok(scene.remote().status(PATIENCE)?.disk > blocks)
            })?;
            scene.check()?;
        }
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}
