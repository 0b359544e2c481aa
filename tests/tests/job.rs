//! The job as an operator has it in hand: watch it, give it up, move a guest that is paused.

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::Rate;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::{usual, Scene};
use ferry_tests::timeline::{Outcome, Role};

/// libvirt's own words for a job that was given up (VIR_ERR_OPERATION_ABORTED).
const ABORTED: &str = "operation aborted: migration out: canceled by client";

/// Saves the guest to a file and restores it from there: its memory must be in the file.
fn save_and_restore(scene: &Scene, host: &Host) -> Result<()> {
    let file = format!("/run/{}.save", scene.name());
    host.virsh(&["save", scene.name(), &file])?;
    ensure!(
        host.state(scene.name())?.is_none(),
        "the saved guest is still there"
    );
    host.virsh(&["restore", &file])?;
    scene.lives_on(host)
}

/// Gives up a migration that cannot end by itself once `ready` is true of its figures; nothing has happened then.
fn abort(
    lab: &Lab,
    scene: &Scene,
    options: &[&str],
    ready: fn(&ferry_tests::underway::Job) -> bool,
) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let mut moving = one.begin_migration(scene.name(), two, options)?;
    moving.wait_for_job("the job to come to where it is given up", ready)?;
    one.virsh(&["domjobabort", scene.name()])?;
    let error = moving.fails()?;
    ensure!(
        error.contains(ABORTED),
        "not libvirt's error for an aborted job: {error}"
    );
    scene.lives_on(one)?;
    lab.assert_clean(1)?;
    lab.assert_clean(2)?;
    let outcome = one.last_timeline(Role::Source)?.outcome;
    ensure!(outcome == Outcome::Cancelled, "the timeline says {outcome:?}");
    Ok(())
}

#[test]
fn given_up_while_memory_is_copied() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        // It writes three times as fast as the link takes it away.
        let guest = usual("aborted").working_set(48).rate(Rate::mib(36));
        let scene = Scene::start(lab, one, guest, 1)?;
        let slow = Slow::to(lab, two, 100)?;
        for options in [&[][..], &["--p2p"]] {
            // In the first pass, and in a later round.
            abort(lab, &scene, options, |job| job.figure("memory_processed") > 0).context("first pass")?;
        }
        abort(lab, &scene, &[], |job| job.figure("memory_iteration") >= 3).context("third round")?;
        drop(slow);
        save_and_restore(&scene, one)?;
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)?;
        save_and_restore(&scene, two)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// The percentages that `virsh migrate --verbose` has shown, one over the other.
fn percentages(shown: &str) -> Vec<f64> {
    let percentage = |text: &str| {
        let inner = text.split_once('[')?.1.split_once('%')?.0;
        inner.trim().parse().ok()
    };
    shown.split(['\r', '\n']).filter_map(percentage).collect()
}

#[test]
fn progress_is_shown() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("watched").rate(Rate::mib(2)), 1)?;
        for (from, to, options) in [
            (one, two, &["--verbose"][..]),
            (two, one, &["--verbose", "--p2p"]),
        ] {
            let slow = Slow::to(lab, to, 200)?;
            let mut moving = from.begin_migration(scene.name(), to, options)?;
            let mut seen = Vec::new();
            moving.wait_for_job("half of it to be done", |job| {
                if job.figure("memory_total") > 0 {
                    seen.push(job.clone());
                }
                job.figure("memory_processed") > 200 << 20
            })?;
            let output = moving.end()?;
            drop(slow);
            let shown = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "{shown}");

            for job in &seen {
                let [total, processed, remaining] =
                    ["memory_total", "memory_processed", "memory_remaining"].map(|name| job.figure(name));
                ensure!(
                    total >= 256 << 20 && processed <= total && remaining <= total,
                    "{job:?}"
                );
            }
            let bytes: Vec<u64> = seen.iter().map(|job| job.figure("memory_normal_bytes")).collect();
            ensure!(
                bytes.is_sorted() && bytes.first() < bytes.last(),
                "the bytes sent do not grow: {bytes:?}"
            );

            let percentages = percentages(&shown);
            let mut different = percentages.clone();
            different.dedup();
            ensure!(
                different.len() >= 3 && percentages.first() < percentages.last(),
                "virsh shows no progress: {percentages:?}"
            );
            ensure!(percentages.last() == Some(&100.0), "{percentages:?}");
            scene.lives_on(to)?;
        }
        one.assert_moved_away(1)?;
        two.assert_moved_away(1)
    })
}

#[test]
fn a_paused_guest_arrives_paused() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("paused"), 1)?;
        for (from, to, options) in [(one, two, &[][..]), (two, one, &["--p2p"])] {
            from.virsh(&["suspend", scene.name()])?;
            from.migrate(scene.name(), to, options)?;
            to.wait_for_state(scene.name(), "paused")?;
            lab.assert_clean(1)?;
            lab.assert_clean(2)?;
            to.virsh(&["resume", scene.name()])?;
            scene.lives_on(to)?;
        }
        // A running guest that is to be paused when it has arrived.
        one.migrate(scene.name(), two, &["--suspend"])?;
        two.wait_for_state(scene.name(), "paused")?;
        two.virsh(&["resume", scene.name()])?;
        scene.lives_on(two)?;
        one.assert_moved_away(2)?;
        two.assert_moved_away(1)
    })
}
