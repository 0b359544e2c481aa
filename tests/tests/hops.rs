//! Many moves of one guest: nothing is lost on the way, and nothing piles up on the hosts.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{usual, Scene};
use ferry_tests::wait::wait_for;

/// Pairs of moves, there and back.
const PAIRS: usize = 10;

/// For libvirtd to close what it opened for the last clients.
const SETTLE: Duration = Duration::from_secs(20);

/// What libvirtd holds: open files by what they are, and threads by their names.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    files: BTreeMap<String, usize>,
    threads: BTreeMap<String, usize>,
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
        Ok(Holdings { files, threads })
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
    flat.with_context(|| format!("{}: {now:#?}, before {before:#?}", host.name()))
}

fn exceeds(now: &BTreeMap<String, usize>, before: &BTreeMap<String, usize>) -> bool {
    now.iter()
        .any(|(name, count)| *count > before.get(name).copied().unwrap_or(0))
}

#[test]
fn twenty_hops_under_load() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("hops"), 1)?;
        let mut before = None;
        for pair in 0..PAIRS {
            // Managed there and peer-to-peer back, then the other way about.
            let (there, back): (&[&str], &[&str]) = match pair % 2 {
                0 => (&[], &["--p2p"]),
                _ => (&["--p2p"], &[]),
            };
            scene
                .move_to(one, two, there)
                .with_context(|| format!("pair {pair}"))?;
            scene
                .move_to(two, one, back)
                .with_context(|| format!("pair {pair}"))?;
            // Every kind of move has been made on either host: what is opened once is open.
            if pair == 1 {
                lab.assert_clean(1)?;
                lab.assert_clean(2)?;
                before = Some([Holdings::of(one)?, Holdings::of(two)?]);
            }
        }
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;
        one.assert_moved_away(PAIRS)?;
        two.assert_moved_away(PAIRS)?;
        let before = before.context("too few hops")?;
        ensure!(before[0].files.len() > 3, "no files found: {before:?}");
        assert_flat(one, &before[0])?;
        assert_flat(two, &before[1])
    })
}
