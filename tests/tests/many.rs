//! Many guests on their way at once, over and across: each arrives whole, and can be looked after as if it were alone.

use std::thread;
use std::time::Duration;

use anyhow::{anyhow, ensure, Context, Result};
use ferry_tests::guest::{Guest, Rate};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::{usual, Scene};
use ferry_tests::underway::{Job, Underway};
use ferry_tests::wait::wait_for;

/// A guest of which two cores carry twenty.
fn small(name: &str) -> Guest {
    Guest::linux(name)
        .memory_mib(128)
        .working_set(2)
        .filled(16)
        .rate(Rate(100))
        .check(Rate(0))
        .beat_us(0)
}

/// Starts guests of this kind on `host`, all at once; the first has the address of `first`.
fn crowd<'a>(
    lab: &'a Lab,
    host: &Host,
    count: u8,
    first: u8,
    kind: fn(&str) -> Guest,
) -> Result<Vec<Scene<'a>>> {
    // What they boot is the same: put there once, not by all at the same time.
    kind(&format!("guest{first}")).install(&lab.share().join("guests"))?;
    thread::scope(|scope| {
        let starting: Vec<_> = (first..first + count)
            .map(|number| {
                scope.spawn(move || Scene::start(lab, host, kind(&format!("guest{number}")), number))
            })
            .collect();
        starting
            .into_iter()
            .map(|started| {
                started
                    .join()
                    .map_err(|_| anyhow!("a starting thread panicked"))?
            })
            .collect()
    })
}

/// A guest's move.
struct Move<'a> {
    scene: &'a Scene<'a>,
    from: &'a Host,
    to: &'a Host,
}

impl<'a> Move<'a> {
    /// Of all of these guests.
    fn all(scenes: &'a [Scene<'a>], from: &'a Host, to: &'a Host) -> impl Iterator<Item = Self> {
        scenes.iter().map(move |scene| Move { scene, from, to })
    }
}

/// Makes all these moves at once, every second of them peer-to-peer, and judges the arrivals.
fn at_once<'a>(moves: impl IntoIterator<Item = Move<'a>>) -> Result<()> {
    let moves: Vec<_> = moves.into_iter().collect();
    let kinds: [&[&str]; 2] = [&[], &["--p2p"]];
    let begun: Vec<_> = moves
        .iter()
        .zip(kinds.into_iter().cycle())
        .map(|(Move { scene, from, to }, options)| from.begin_migration(scene.name(), to, options))
        .collect::<Result<_>>()?;
    // All of them end before one that failed is told of.
    let ended: Vec<_> = begun.into_iter().map(Underway::succeeds).collect();
    for (Move { scene, from, to }, ended) in moves.iter().zip(ended) {
        let who = || format!("{} from {} to {}", scene.name(), from.name(), to.name());
        ended.with_context(who)?;
        scene.lives_on(to).with_context(who)?;
    }
    Ok(())
}

fn clean(lab: &Lab) -> Result<()> {
    (1..=lab.hosts().len()).try_for_each(|number| lab.assert_clean(number))
}

#[test]
fn three_hosts_in_a_ring() -> Result<()> {
    Lab::with(Options::default().hosts(3), |lab| {
        let hosts = [lab.host(1), lab.host(2), lab.host(3)];
        let mut guests = Vec::new();
        for (number, host) in (1..).zip(hosts) {
            guests.extend(crowd(lab, host, 1, number, usual)?);
        }
        // Each goes on to the next host while another arrives, until all are home again.
        for turn in 0..3 {
            at_once(guests.iter().enumerate().map(|(number, scene)| Move {
                scene,
                from: hosts[(number + turn) % 3],
                to: hosts[(number + turn + 1) % 3],
            }))
            .with_context(|| format!("turn {turn}"))?;
        }
        // Two change places.
        at_once([(0, 1), (1, 0)].map(|(number, other)| Move {
            scene: &guests[number],
            from: hosts[number],
            to: hosts[other],
        }))?;
        for (host, moved) in hosts.into_iter().zip([4, 4, 3]) {
            host.assert_moved_away(moved)?;
        }
        clean(lab)
    })
}

#[test]
fn ten_to_and_fro() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let guests = crowd(lab, one, 10, 1, small)?;
        let (first, second) = guests.split_at(5);
        at_once(Move::all(&guests, one, two))?;
        at_once(Move::all(first, two, one))?;
        at_once(Move::all(first, one, two).chain(Move::all(second, two, one)))?;
        one.assert_moved_away(15)?;
        two.assert_moved_away(10)?;
        clean(lab)
    })
}

/// The daemon's answer to somebody who looks after a guest: not only that it comes, but at once.
fn job_at_once(host: &Host, domain: &str) -> Result<Job> {
    let virsh = [
        "timeout",
        "20",
        "virsh",
        "--connect",
        "qemu:///system",
        "domjobinfo",
        domain,
        "--rawstats",
    ];
    let said = host.run(&virsh).context("libvirtd has no worker left")?;
    Ok(Job::parse(&said))
}

/// As many as libvirtd has workers: each is watched and one given up while all are under way.
#[test]
fn twenty_are_looked_after() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let guests = crowd(lab, one, 20, 1, small)?;
        let slow = Slow::to(lab, two, 40)?;
        let kinds: [&[&str]; 2] = [&[], &["--p2p"]];
        let mut moving = guests
            .iter()
            .zip(kinds.into_iter().cycle())
            .map(|(scene, options)| one.begin_migration(scene.name(), two, options))
            .collect::<Result<Vec<_>>>()?;
        wait_for("all to be on their way", Duration::from_secs(120), || {
            for scene in &guests {
                let job = job_at_once(one, scene.name())?;
                let [total, processed, remaining] =
                    ["memory_total", "memory_processed", "memory_remaining"].map(|name| job.figure(name));
                ensure!(
                    processed <= total && remaining <= total,
                    "{}: {job:?}",
                    scene.name()
                );
                if job.figure("memory_normal_bytes") == 0 {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })?;
        one.run(&["timeout", "20", "virsh", "domjobabort", guests[19].name()])?;
        let stays = moving.pop().context("twenty")?.fails()?;
        ensure!(stays.contains("canceled by client"), "{stays}");
        guests[19].lives_on(one)?;
        for scene in &guests[..19] {
            ensure!(
                job_at_once(one, scene.name())?.figure("memory_total") >= 128 << 20,
                "{} had gone: the link is too fast for this test",
                scene.name()
            );
        }
        drop(slow);
        for (scene, moving) in guests[..19].iter().zip(moving) {
            moving.succeeds().with_context(|| scene.name().to_owned())?;
            scene.lives_on(two)?;
        }
        one.assert_moved_away(19)?;
        guests[19].move_to(one, two, &[])?;
        clean(lab)?;
        // What the daemon was lent it has given back.
        wait_for(
            "libvirtd to have its own workers only",
            Duration::from_secs(10),
            || {
                let workers = one.run(&["virt-admin", "server-threadpool-info", "libvirtd"])?;
                let limit = workers.lines().find(|line| line.starts_with("maxWorkers"));
                let limit = limit.and_then(|line| line.split_whitespace().last());
                Ok((limit == Some("20")).then_some(()))
            },
        )
    })
}
