//! Many moves of one guest: nothing is lost on the way, and nothing piles up on the hosts.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::{Guest, Rate};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{usual, Scene, PATIENCE};
use ferry_tests::wait::wait_for;

/// Pairs of moves, there and back, of a guest under load whose memory is checked each time.
const PAIRS: usize = 10;

/// Pairs of moves in the long run,
const LONG: usize = 100;
/// the first of which make the hosts warm: what is opened once is open, and what is kept once is kept.
const WARM: usize = 50;
/// All memory is checked after so many pairs; on each host.
const CHECKED: usize = 25;

/// How much memory libvirtd may have gained in the rest of them, KiB: less than 3 a move.
const GAIN: u64 = 256;

/// For libvirtd to close what it opened for the last clients.
const SETTLE: Duration = Duration::from_secs(20);

/// What libvirtd holds: open files by what they are, and threads by their names.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    files: BTreeMap<String, usize>,
    threads: BTreeMap<String, usize>,
    /// Resident anonymous memory, KiB.
    memory: u64,
}

impl Holdings {
    fn of(host: &Host) -> Result<Self> {
        let libvirtd = host.processes_named("libvirtd")?;
        let proc = libvirtd.first().context("libvirtd does not run")?.proc();
        let (mut files, mut threads) = (BTreeMap::new(), BTreeMap::new());
        for file in fs::read_dir(proc.join("fd"))? {
            // One that is closed meanwhile is not there any more.
            let Ok(target) = fs::read_link(file?.path()) else {
                continue;
            };
            *files.entry(kind_of_file(&target.to_string_lossy())).or_default() += 1;
        }
        for thread in fs::read_dir(proc.join("task"))? {
            let Ok(name) = fs::read_to_string(thread?.path().join("comm")) else {
                continue;
            };
            // libvirtd adds workers as calls come in, up to max_workers.
            if !name.contains("rpc-") {
                *threads.entry(name.trim().to_owned()).or_default() += 1;
            }
        }
        let status = fs::read_to_string(proc.join("status"))?;
        let memory = status
            .lines()
            .find_map(|line| {
                line.strip_prefix("RssAnon:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            })
            .context("no RssAnon")?;
        Ok(Holdings {
            files,
            threads,
            memory,
        })
    }
}

/// `socket:[1234]` and `/a/b-17/c` without their numbers, which change.
fn kind_of_file(target: &str) -> String {
    target.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// The guest is on host1 as it was then: libvirtd holds what it held then.
fn assert_flat(host: &Host, before: &Holdings) -> Result<()> {
    let mut now = None;
    let flat = wait_for("libvirtd to hold no more than before", SETTLE, || {
        let holdings = Holdings::of(host)?;
        let more = exceeds(&holdings.files, &before.files) || exceeds(&holdings.threads, &before.threads);
        now = Some(holdings);
        Ok((!more).then_some(()))
    });
    flat.with_context(|| format!("{}: {now:#?}, before {before:#?}", host.name()))?;
    let now = now.context("no holdings")?;
    println!(
        "{}: {} KiB, {} files, {} threads",
        host.name(),
        now.memory,
        now.files.values().sum::<usize>(),
        now.threads.values().sum::<usize>()
    );
    ensure!(
        now.memory <= before.memory + GAIN,
        "{}: libvirtd has grown from {} to {} KiB",
        host.name(),
        before.memory,
        now.memory
    );
    Ok(())
}

fn exceeds(now: &BTreeMap<String, usize>, before: &BTreeMap<String, usize>) -> bool {
    now.iter()
        .any(|(name, count)| *count > before.get(name).copied().unwrap_or(0))
}

/// Managed there and peer-to-peer back, then the other way about.
fn options(pair: usize) -> (&'static [&'static str], &'static [&'static str]) {
    match pair % 2 {
        0 => (&[], &["--p2p"]),
        _ => (&["--p2p"], &[]),
    }
}

#[test]
fn twenty_hops_under_load() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("hops"), 1)?;
        for pair in 0..PAIRS {
            let (there, back) = options(pair);
            for (from, to, options) in [(one, two, there), (two, one, back)] {
                scene
                    .move_to(from, to, options)
                    .with_context(|| format!("pair {pair}"))?;
            }
        }
        for host in [one, two] {
            lab.assert_clean(if host.name() == one.name() { 1 } else { 2 })?;
            host.assert_moved_away(PAIRS)?;
        }
        Ok(())
    })
}

/// The guest's own look at its memory goes on all the time, and each move waits until it has said so.
#[test]
fn two_hundred_hops() -> Result<()> {
    // One heap for all threads: else each of the daemon's workers has one that grows when its turn comes.
    Lab::with(Options::default().libvirtd_env("MALLOC_ARENA_MAX", "1"), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let small = Guest::linux("marathon")
            .memory_mib(128)
            .working_set(4)
            .filled(4)
            .rate(Rate(500));
        let scene = Scene::start(lab, one, small, 1)?;
        let mut before = Vec::new();
        for pair in 0..LONG {
            let context = || format!("pair {pair}");
            let (there, back) = options(pair);
            for (from, to, options) in [(one, two, there), (two, one, back)] {
                from.migrate(scene.name(), to, options).with_context(context)?;
                let status = scene.remote().status(PATIENCE).with_context(context)?;
                ensure!(status.errors == 0, "pair {pair}: {status:?}");
                if pair % CHECKED == CHECKED - 1 {
                    scene.lives_on(to).with_context(context)?;
                }
            }
            scene.ran_once().with_context(context)?;
            if pair % 10 == 9 {
                println!(
                    "pair {pair}: {} and {} KiB",
                    Holdings::of(one)?.memory,
                    Holdings::of(two)?.memory
                );
            }
            if pair + 1 == WARM {
                lab.assert_clean(1)?;
                lab.assert_clean(2)?;
                before = vec![Holdings::of(one)?, Holdings::of(two)?];
                ensure!(before[0].files.len() > 3, "no files found: {before:?}");
            }
        }
        for (host, before) in lab.hosts().iter().zip(&before) {
            assert_flat(host, before)?;
        }
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;
        // Its logs keep the newest hundred timelines.
        for host in [one, two] {
            let moved = ferry_tests::scene::said(host, "moved from");
            ensure!(moved == 2 * LONG, "{moved} moves are told by {}", host.name());
        }
        Ok(())
    })
}
