//! The lost write: a device that writes guest memory behind the tracker's back.
//!
//! A page that is pinned for direct I/O before a scan is write-protected by it, and what the disk puts there after it sets no
//! bit: copied between scan and arrival, the page stays stale at the destination for good. So the engine drains block I/O
//! between each scan and its copy (driver/engine/src/live, mechanism). Here a disk takes up to one and a half seconds to
//! answer, so that at every scan reads are in flight, and the guest compares what it read with what it wrote, at once and again
//! for as long as it lives. With the drain taken out of the engine (`Watch::drain` returning at once) this test fails.
//!
//! And a write that no disk makes: between the end of block I/O and the moment libvirt lets QEMU go on, QEMU's main loop
//! still completes what the guest asked of virtio-gpu, pvscsi or USB. With the last copy taken at pre-switchover (no
//! `Precopy::settle`, no wait for the event "device") it is lost.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use ferry_guest::page::Page;
use ferry_tests::fault::{engine, signal};
use ferry_tests::guest::Rate;
use ferry_tests::host::{Host, Process};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{usual, Scene, PATIENCE};
use ferry_tests::timeline::Role;
use ferry_tests::wait::{wait_for, wait_until};
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};

/// The disk and the part of it that the guest reads and writes.
const DISK_MIB: u64 = 8;
/// How long a read takes, ms.
const SLOW: (u64, u64) = (100, 1500);
/// Moves, to and fro.
const MOVES: usize = 6;
/// Moves in which libvirt's daemon is stopped before it lets QEMU go on: a machine that is busy may be too slow in one.
const ATTEMPTS: usize = 8;
/// For how long QEMU waits for the daemon, at least.
const HELD: Duration = Duration::from_millis(300);
/// Where the guest has memory that it has not used.
const UNTOUCHED: u64 = 200 << 20;

/// A server of the slow disk on one host; it ends with the lab.
struct SlowDisk(Child);

impl SlowDisk {
    /// Shows `/lab/IMAGE` as `/lab/slow/IMAGE`.
    fn serve(host: &Host, image: &str) -> Result<Self> {
        let server = host
            .command("/lab/slow_disk")
            .args([&format!("/lab/{image}"), "/lab/slow"])
            .args([SLOW.0.to_string(), SLOW.1.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .context("slow_disk")?;
        let disk = SlowDisk(server);
        let shown = host.path(format!("/lab/slow/{image}"));
        wait_until("the slow disk", PATIENCE, || Ok(shown.exists()))?;
        Ok(disk)
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // It has ended with the lab, if that was faster.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The longest drain of all migrations away from the host, ms.
fn longest_drain(host: &Host) -> Result<f64> {
    let timelines = host.timelines(Role::Source)?;
    let rounds = timelines.iter().flat_map(|timeline| &timeline.rounds);
    Ok(rounds.map(|round| round.drain_ms).fold(0.0, f64::max))
}

#[test]
fn no_write_of_a_slow_disk_is_lost() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let image = lab.share().join("slow.img");
        File::create(&image)?.set_len(DISK_MIB << 20)?;
        fs::set_permissions(&image, Permissions::from_mode(0o666))?;
        fs::create_dir(lab.share().join("slow"))?;
        fs::copy(env!("CARGO_BIN_EXE_slow_disk"), lab.share().join("slow_disk"))?;
        let _servers = [
            SlowDisk::serve(one, "slow.img")?,
            SlowDisk::serve(two, "slow.img")?,
        ];

        // As fast as four readers go: there is always a read in flight.
        let guest = usual("slow-disk")
            .disk(Path::new("/lab/slow/slow.img"), "raw")
            .disk_load(DISK_MIB, Rate(4000));
        let scene = Scene::start(lab, one, guest, 1)?;
        let before = scene.remote().status(PATIENCE)?.disk;
        wait_until("the guest's first reads", PATIENCE, || {
            Ok(scene.remote().status(PATIENCE)?.disk > before + 20)
        })?;

        for number in 0..MOVES {
            let (from, to) = if number % 2 == 0 { (one, two) } else { (two, one) };
            let options: &[&str] = if number % 3 == 2 { &["--p2p"] } else { &[] };
            scene.move_to(from, to, options)?;
        }
        one.assert_moved_away(MOVES / 2)?;
        two.assert_moved_away(MOVES / 2)?;
        let drain = longest_drain(one)?.max(longest_drain(two)?);
        ensure!(
            drain > SLOW.0 as f64,
            "no drain took longer than {drain} ms: no read was in flight, and nothing was tested"
        );
        a_write_before_qemu_goes_on(&scene, one, two).context("a write that no disk makes")?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// QEMU changes memory while it waits for libvirt to let it go on.
fn a_write_before_qemu_goes_on(scene: &Scene, one: &Host, two: &Host) -> Result<()> {
    for (from, to) in [(one, two), (two, one)].iter().cycle().take(ATTEMPTS) {
        let (moves, daemon) = (from.moved_away()?, from.processes_named("libvirtd")?.pop());
        let daemon = daemon.context("no daemon")?;
        let moving = from.begin_migration(scene.name(), to, &[])?;
        let leaving = wait_for("the engine", PATIENCE, || Ok(engine(from).ok()))?;
        // QEMU migrates, but cannot stop the guest before its slow reads are done: as a rule that takes its time.
        wait_until("QEMU to migrate", PATIENCE, || {
            Ok(has_thread(&leaving, "read-qemu") || from.moved_away()? > moves)
        })?;
        signal(&daemon, SIGSTOP)?;
        // The daemon cannot say now what QEMU and the engine do.
        sleep(Duration::from_millis(SLOW.1) + HELD * 3);
        let mut page = Page::ZEROED;
        page.bytes_mut()[77] = 1;
        let wrote = from.ram_file(scene.name()).and_then(|ram| {
            let untouched = ram.hole(UNTOUCHED)?;
            ram.overwrite_as(&from.qemu(scene.name())?, untouched, &page)?;
            Ok(untouched)
        });
        signal(&daemon, SIGCONT)?;
        moving.succeeds()?;
        scene.lives_on(to)?;
        // It was quicker than the signal.
        let Ok(untouched) = wrote else { continue };
        let stages = from.last_timeline(Role::Source)?.stages;
        let last = stages.iter().find(|stage| stage.stage == "stop-and-copy");
        if last.is_some_and(|stage| stage.end_ms - stage.begin_ms >= HELD.as_secs_f64() * 1000.0) {
            let there = to.ram_file(scene.name())?.page(untouched)?;
            ensure!(
                there.bytes() == page.bytes(),
                "what QEMU wrote is not at the destination"
            );
            return Ok(());
        }
    }
    bail!("in {ATTEMPTS} moves the engine never waited for libvirt to let QEMU go on")
}

/// Whether a process has a thread of this name.
fn has_thread(process: &Process, name: &str) -> bool {
    let threads = fs::read_dir(process.proc().join("task"));
    let mut threads = threads.into_iter().flatten().flatten();
    threads.any(|thread| {
        let found = fs::read_to_string(thread.path().join("comm"));
        found.is_ok_and(|found| found.trim_end() == name)
    })
}
