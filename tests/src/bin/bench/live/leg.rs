//! One migration, watched from all sides.

use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use ferry_tests::guest::beat::Listener;
use ferry_tests::host::Host;
use ferry_tests::scene::{address, Scene, PATIENCE};
use ferry_tests::timeline::Role;

use super::case::Route;
use super::NUMBER;
use crate::usage::{cpu_seconds, link_bytes};
use crate::way::Leg;

/// How long the guest's pace is looked at before and after.
const PACE: Duration = Duration::from_secs(2);
/// Heartbeats, one a millisecond, between a move's end and the last look at the longest silence.
const BEATS: u64 = 500;

/// What was seen of one migration.
#[derive(Default)]
pub struct Seen {
    /// False where it was called off at the limit; the figures are those up to then.
    pub finished: bool,
    /// Wall time of `virsh migrate`.
    pub total_ms: f64,
    /// Of it, virt-ferry's: pre-copy to commitment. The rest is libvirt's own phases, as on any path: the destination's
    /// QEMU starts in Prepare, the source's is ended in Confirm.
    pub memory_ms: Option<f64>,
    /// The longest silence of the guest's heartbeat.
    pub stall_ms: f64,
    /// Both ways.
    pub wire_bytes: u64,
    /// CPU seconds of all processes of the source while it lasted, the guest's own included.
    pub source_cpu_s: f64,
    /// The same of the destination.
    pub destination_cpu_s: f64,
    /// Guest memory resident at the source before.
    pub resident_source_kib: u64,
    /// Guest memory resident at the destination after.
    pub resident_destination_kib: u64,
    /// The guest's work a second before, while it lasted, and after: pages written, or heartbeats where it writes none.
    pub work: [f64; 3],
}

impl Seen {
    /// By the figures' keys.
    pub fn into_leg(self) -> Leg {
        let [before, during, after] = self.work;
        let mut figures = vec![
            ("total_ms", self.total_ms),
            ("stall_ms", self.stall_ms),
            ("wire_bytes", self.wire_bytes as f64),
            ("source_cpu_s", self.source_cpu_s),
            ("destination_cpu_s", self.destination_cpu_s),
            ("resident_source_kib", self.resident_source_kib as f64),
            ("resident_destination_kib", self.resident_destination_kib as f64),
            ("work_ratio", during / before),
            ("work_before_per_s", before),
            ("work_while_per_s", during),
            ("work_after_per_s", after),
        ];
        figures.extend(self.memory_ms.map(|ms| ("memory_ms", ms)));
        Leg {
            finished: self.finished,
            figures,
        }
    }
}

/// The guest's work so far.
fn work(scene: &Scene<'_>) -> Result<(Instant, u64, u64)> {
    let status = scene.remote().status(PATIENCE)?;
    Ok((Instant::now(), status.seq, status.beats))
}

fn pace(from: (Instant, u64, u64), to: (Instant, u64, u64)) -> f64 {
    let done = match to.1 - from.1 {
        0 => to.2 - from.2,
        pages => pages,
    };
    done as f64 / (to.0 - from.0).as_secs_f64()
}

/// Moves the guest.
///
/// # Errors
/// If it does not arrive whole, goes another way than told, or cannot be watched.
pub fn run(
    scene: &Scene<'_>,
    listener: &Listener,
    from: &Host,
    to: &Host,
    route: Route,
    limit: Duration,
) -> Result<Leg> {
    for host in [from, to] {
        host.configure(route.configuration())?;
    }
    let moved = from.moved_away()?;
    let ip = address(NUMBER).ip;
    let first = work(scene)?;
    std::thread::sleep(PACE);
    let resident_source_kib = from.ram_file(scene.name())?.resident()? >> 10;
    listener.reset();
    listener.wait(ip, 1, PATIENCE)?;
    let bytes = link_bytes(scene.lab, to)?;
    let (source, destination) = (cpu_seconds(from)?, cpu_seconds(to)?);
    let before = work(scene)?;

    let start = Instant::now();
    let finished = migrate(scene, from, to, route, limit)?;
    let total_ms = start.elapsed().as_secs_f64() * 1000.0;

    let (source, destination) = (cpu_seconds(from)? - source, cpu_seconds(to)? - destination);
    let wire_bytes = link_bytes(scene.lab, to)? - bytes;
    let after = work(scene)?;
    let place = if finished { to } else { from };
    let resident = place.ram_file(scene.name())?.resident()? >> 10;
    let heard = listener.heard(ip).received;
    let heard = listener.wait(ip, heard + BEATS, PATIENCE)?;
    std::thread::sleep(PACE);
    let last = work(scene)?;

    ensure!(
        heard.repeated == 0,
        "heartbeats came twice: the guest ran in two places"
    );
    scene.lives_on(place)?;
    if finished {
        from.assert_moved_away(moved + usize::from(route == Route::Ferry))?;
    }
    let mut memory_ms = None;
    if route == Route::Ferry && finished {
        let timeline = from.last_timeline(Role::Source)?;
        ensure!(timeline.encryption.is_some(), "virt-ferry did not encrypt");
        memory_ms = Some(timeline.memory_ms());
    }
    let seen = Seen {
        finished,
        total_ms,
        memory_ms,
        stall_ms: heard.longest.length.as_secs_f64() * 1000.0,
        wire_bytes,
        source_cpu_s: source,
        destination_cpu_s: destination,
        resident_source_kib,
        resident_destination_kib: resident,
        work: [pace(first, before), pace(before, after), pace(after, last)],
    };
    Ok(seen.into_leg())
}

/// `virsh migrate --live`, given up at the limit. Whether it came to its end by itself.
fn migrate(scene: &Scene<'_>, from: &Host, to: &Host, route: Route, limit: Duration) -> Result<bool> {
    let mut moving = from.begin_migration(scene.name(), to, route.options())?;
    // Not by Ctrl-C, which virsh may miss.
    let given_up = !moving.ends_within(limit)?;
    if given_up {
        from.virsh(&["domjobabort", scene.name()])?;
    }
    let output = moving.end()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() != given_up,
        "{}: {}",
        output.status,
        said.trim()
    );
    Ok(!given_up)
}
