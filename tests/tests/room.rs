//! Reservation: a guest that would not fit is refused before anything is started for it.

use anyhow::{ensure, Context, Result};
use ferry_tests::fault::Hog;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::{usual, Scene};

/// Room for guests' memory on each host, MiB.
const ROOM: u64 = 512;
/// The room that the usual guest, with about 120 MiB resident, does not fit into.
const TOO_LITTLE: u64 = 60;

fn lab() -> Options {
    Options::default().ram_size(&format!("{ROOM}m"))
}

/// The error names the host, the place and what to do, in words an administrator can use.
fn assert_refusal(error: &str) -> Result<()> {
    for words in ["host2", "/var/lib/libvirt/qemu/ram", "MiB", "choose another host"] {
        ensure!(error.contains(words), "the error does not say '{words}': {error}");
    }
    Ok(())
}

#[test]
fn a_guest_that_does_not_fit_stays() -> Result<()> {
    Lab::with(lab(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("big"), 1)?;
        let hog = Hog::leaving(two, TOO_LITTLE)?;
        for options in [&[][..], &["--p2p"]] {
            assert_refusal(&one.begin_migration(scene.name(), two, options)?.fails()?)
                .with_context(|| format!("{options:?}"))?;
            scene.lives_on(one)?;
            ensure!(
                two.state(scene.name())?.is_none() && two.qemu_log(scene.name()).is_empty(),
                "host2 has started something for a guest that does not fit"
            );
            lab.assert_clean(1)?;
            lab.assert_clean(2)?;
        }
        drop(hog);
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)
    })
}

#[test]
fn what_is_promised_to_one_guest_is_not_had_by_another() -> Result<()> {
    Lab::with(lab(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let first = Scene::start(lab, one, usual("first"), 1)?;
        let second = Scene::start(lab, one, usual("second"), 2)?;
        // Room for one of them and a half.
        let hog = Hog::leaving(two, 180)?;
        let slow = Slow::to(lab, two, 100)?;
        let mut first_move = one.begin_migration(first.name(), two, &[])?;
        first_move.wait_for_job("the first guest to be under way", |job| {
            job.figure("memory_total") > 0
        })?;
        let refusal = one.begin_migration(second.name(), two, &[])?.fails()?;
        assert_refusal(&refusal)?;
        ensure!(
            refusal.contains("promised to other guests") && !refusal.contains("and 0 MiB"),
            "the error does not say what is promised: {refusal}"
        );
        drop(slow);
        first_move.succeeds()?;
        first.lives_on(two)?;
        second.lives_on(one)?;

        drop(hog);
        second.move_to(one, two, &[])?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;
        one.assert_moved_away(2)
    })
}
