//! A guest that writes faster than the link takes it away never fits the agreed pause; what an operator does then.

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::{Guest, Rate};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::{usual, Scene, PATIENCE};
use ferry_tests::timeline::Role;
use ferry_tests::underway::Job;
use ferry_tests::wait::wait_until;

/// 25 MB/s: less than half of what the guest writes, and 2 s for its working set.
const MBIT: u32 = 200;

fn busy(name: &str) -> Guest {
    usual(name).filled(16).working_set(48).rate(Rate::mib(60))
}

/// The engine has moved the guest, and not within the default pause: it was too busy for that.
fn assert_long_pause(lab: &Lab) -> Result<()> {
    lab.host(1).assert_moved_away(1)?;
    let downtime = lab.host(1).last_timeline(Role::Source)?.downtime;
    let ms = downtime.context("the timeline has no downtime")?.total_ms;
    ensure!(ms > 300.0, "the guest stood still for {ms} ms only");
    Ok(())
}

#[test]
fn a_longer_pause_is_allowed_under_way() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, busy("patient"), 1)?;
        let slow = Slow::to(lab, two, MBIT)?;
        let mut moving = one.begin_migration(scene.name(), two, &[])?;
        let job = moving.wait_for_job("the guest not to converge", |job| {
            job.figure("memory_iteration") >= 3
        })?;
        ensure!(job.figure("memory_dirty_rate") > 0, "{job:?}");
        one.virsh(&["migrate-setmaxdowntime", scene.name(), "30000"])?;
        moving.succeeds()?;
        drop(slow);
        scene.lives_on(two)?;
        assert_long_pause(lab)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// Auto-converge slows it down until it fits, and lets it go: where it arrives, and where it stays.
#[test]
fn the_guest_is_slowed_down() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, busy("braked"), 1)?;
        let slow = Slow::to(lab, two, MBIT)?;
        let options = [
            "--auto-converge",
            "--auto-converge-initial",
            "40",
            "--auto-converge-increment",
            "20",
        ];
        let braked = |job: &Job| job.figure("auto_converge_throttle") >= 40;
        let mut moving = one.begin_migration(scene.name(), two, &options)?;
        moving.wait_for_job("the guest to be slowed down", braked)?;
        one.virsh(&["domjobabort", scene.name()])?;
        moving.fails()?;
        scene.lives_on(one)?;
        lab.assert_clean(1)?;

        let moving = one.begin_migration(scene.name(), two, &options)?;
        moving.succeeds()?;
        drop(slow);
        scene.lives_on(two)?;
        one.assert_moved_away(1)?;
        let timeline = one.last_timeline(Role::Source)?;
        ensure!(
            timeline.notes("of their time"),
            "it was never slowed down: {timeline:?}"
        );
        let ms = timeline
            .downtime
            .context("the timeline has no downtime")?
            .total_ms;
        ensure!(
            ms < 2000.0,
            "the guest stood still for {ms} ms: it was not slowed down enough"
        );
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// Nobody asked for it, but nothing else would end it; unless the host's configuration says not to.
#[test]
fn a_guest_that_never_fits_is_slowed_down_in_the_end() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        // Short rounds, of which many fit a test.
        let scene = Scene::start(lab, one, busy("restless").working_set(8), 1)?;
        let begin = || -> Result<_> {
            let moving = one.begin_migration(scene.name(), two, &[])?;
            wait_until("a shorter pause to be asked for", PATIENCE, || {
                Ok(one.virsh(&["migrate-setmaxdowntime", scene.name(), "50"]).is_ok())
            })?;
            Ok(moving)
        };
        one.configure("auto_converge = false\n")?;
        let slow = Slow::to(lab, two, MBIT)?;
        let mut moving = begin()?;
        // 30 rounds of the working set, and some.
        moving.wait_for_job("more rounds than that", |job| job.figure("memory_iteration") > 36)?;
        ensure!(
            one.job(scene.name())?.figure("auto_converge_throttle") == 0,
            "the guest is slowed down though it is not to be"
        );
        one.virsh(&["domjobabort", scene.name()])?;
        moving.fails()?;
        scene.lives_on(one)?;

        one.configure("")?;
        begin()?.succeeds()?;
        drop(slow);
        scene.lives_on(two)?;
        let timeline = one.last_timeline(Role::Source)?;
        ensure!(
            timeline.notes("of their time") && timeline.rounds.len() > 30,
            "it was slowed down too soon, or not at all: {timeline:?}"
        );
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// `virsh migrate --timeout` suspends the guest where it is; libvirt resumes it where it arrives.
#[test]
fn a_timeout_suspends_the_guest() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, busy("hasty"), 1)?;
        let slow = Slow::to(lab, two, MBIT)?;
        let moving = one.begin_migration(scene.name(), two, &["--timeout", "8"])?;
        moving.succeeds()?;
        drop(slow);
        scene.lives_on(two)?;
        assert_long_pause(lab)?;
        two.migrate(scene.name(), one, &["--p2p"])?;
        scene.lives_on(one)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}
