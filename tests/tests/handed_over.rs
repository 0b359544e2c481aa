//! The moment in which a guest changes hands: the destination has all of it, the source has let go, and libvirt has not yet
//! resumed it. Whatever breaks now, the guest must not run twice, and nobody may throw away the only copy.
//!
//! The destination's daemon is made to stand still while the guest is handed over, so that its Finish comes late.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Error, Result};
use ferry_tests::fault::Disturbed::StopAndCopy;
use ferry_tests::fault::{engine, names, signal, Cut};
use ferry_tests::host::{Host, Process};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::phases::{Phases, LIVE, PEER_TO_PEER, PROTECTED};
use ferry_tests::scene::{said, usual, Scene, PATIENCE};
use ferry_tests::underway::Underway;
use ferry_tests::wait::wait_until;
use nix::sys::signal::Signal::{SIGCONT, SIGKILL, SIGSTOP};

/// Fast enough for the guest, slow enough for the test.
const LINK: u32 = 80;

/// What host1's engine says then.
const HANDED_OVER: &str = "stage: activation";

/// Where the lab's libvirtd listens for other hosts,
const LIBVIRTD: u16 = 16509;
/// and what a Finish with its cookie has at least, in bytes; a keepalive has 28 (libvirt 11.3, `virKeepAliveMessage`).
const FINISH: u64 = 400;

fn stand_still(host: &Host) -> Result<Process> {
    let daemon = host.processes_named("libvirtd")?.pop().context("no daemon")?;
    signal(&daemon, SIGSTOP)?;
    Ok(daemon)
}

/// A guest that has been handed over to host2, whose daemon stands still.
struct HandedOver<'a> {
    underway: Underway<'a>,
    daemon: Process,
}

impl<'a> HandedOver<'a> {
    fn new(scene: &Scene<'a>, options: &[&str]) -> Result<Self> {
        let (one, two) = (scene.lab.host(1), scene.lab.host(2));
        let before = said(one, HANDED_OVER);
        let slow = Slow::to(scene.lab, two, LINK)?;
        let mut underway = one.begin_migration(scene.name(), two, options)?;
        underway.reaches(StopAndCopy)?;
        let daemon = stand_still(two)?;
        drop(slow);
        wait_until("the guest to be handed over", PATIENCE, || {
            Ok(said(one, HANDED_OVER) > before)
        })?;
        Ok(HandedOver { underway, daemon })
    }

    /// Lets the daemon go on, and waits for the migration to fail.
    fn fails(self) -> Result<String> {
        signal(&self.daemon, SIGCONT)?;
        let said = self.underway.fails()?;
        println!("{said}");
        Ok(said)
    }
}

/// Judges what is told, managed and peer-to-peer.
fn both_ways(name: &str, test: impl Fn(&Scene, &[&str]) -> Result<()>) -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::start(lab, lab.host(1), usual(name), 1)?;
        for options in [&[][..], &["--p2p"]] {
            test(&scene, options).with_context(|| format!("{options:?}"))?;
            let (one, two) = (lab.host(1), lab.host(2));
            lab.assert_clean(1)?;
            lab.assert_clean(2)?;
            scene.move_to(one, two, &[]).context("the next migration")?;
            scene.move_to(two, one, &[])?;
        }
        Ok(())
    })
}

#[test]
fn a_late_finish_is_no_failure() -> Result<()> {
    both_ways("late", |scene, options| {
        let (one, two) = (scene.lab.host(1), scene.lab.host(2));
        let handed_over = HandedOver::new(scene, options)?;
        signal(&handed_over.daemon, SIGCONT)?;
        handed_over.underway.succeeds()?;
        scene.lives_on(two)?;
        scene.move_to(two, one, &[])
    })
}

#[test]
fn a_destination_that_dies_with_the_guest_gives_it_back() -> Result<()> {
    both_ways("given-back", |scene, options| {
        let handed_over = HandedOver::new(scene, options)?;
        signal(&scene.lab.host(2).qemu("given-back")?, SIGKILL)?;
        names(&handed_over.fails()?, &["QEMU", "host2"])?;
        scene.is_unharmed(scene.lab.host(1))
    })
}

/// Nobody knows any more whether the guest runs there: it stands still here, and the administrator is told to look.
#[test]
fn a_destination_that_cannot_say_leaves_the_guest_standing() -> Result<()> {
    both_ways("unsaid", |scene, options| {
        let (one, two) = (scene.lab.host(1), scene.lab.host(2));
        let handed_over = HandedOver::new(scene, options)?;
        signal(&engine(two)?, SIGKILL)?;
        names(&handed_over.fails()?, &["engine", "host2"])?;
        ensure!(
            two.state(scene.name())?.is_none(),
            "the guest is still known to host2"
        );
        let state = one.state(scene.name())?;
        ensure!(
            state.as_deref().is_some_and(|state| state.starts_with("paused")),
            "the guest is {state:?} on host1"
        );
        ensure!(
            said(one, "virsh resume") > 0,
            "host1's log does not say what to do"
        );
        one.virsh(&["resume", scene.name()])?;
        scene.is_unharmed(one)
    })
}

/// Nova keeps one connection open for as long as it runs: what is left of a migration is not tied to that.
#[test]
fn a_client_that_stays_holds_nothing_up() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("staying"), 1)?;
        let mut client = Phases::new(&scene, one, two, LIVE | PEER_TO_PEER)?;
        let slow = Slow::to(lab, two, LINK)?;
        let left = thread::scope(|scope| {
            let moving = scope.spawn(|| client.peer_to_peer());
            wait_until("memory to be on its way", PATIENCE, || {
                Ok(one.job(scene.name())?.figure("memory_processed") > 0)
            })?;
            one.stop_while_it_moves(scene.name())?;
            let daemon = stand_still(two)?;
            drop(slow);
            wait_until("the guest to be handed over", PATIENCE, || {
                Ok(said(one, HANDED_OVER) > 0)
            })?;
            signal(&engine(two)?, SIGKILL)?;
            signal(&daemon, SIGCONT)?;
            moving.join().map_err(|_| Error::msg("the client panicked"))?
        })?;
        let said = format!("error: {}", left.err().unwrap_or_default());
        println!("{said}");
        names(
            &said,
            &[
                "engine",
                "on host host2",
                "stays paused on host host1",
                "virsh resume",
            ],
        )?;
        one.wait_for_state(scene.name(), "paused")?;
        one.virsh(&["resume", scene.name()])?;
        scene.is_unharmed(one)?;
        drop(client);
        scene.move_to(one, two, &[])
    })
}

/// The destination resumes the guest and cannot tell anybody.
#[test]
fn a_guest_that_arrived_unseen_runs_once() -> Result<()> {
    both_ways("unseen", |scene, options| {
        let (one, two) = (scene.lab.host(1), scene.lab.host(2));
        let handed_over = HandedOver::new(scene, options)?;
        wait_until("its Finish to wait for the daemon", PATIENCE, || {
            Ok(two.unread(LIBVIRTD)? >= FINISH)
        })?;
        let cut = Cut::off(scene.lab, two)?;
        let said = handed_over.fails()?;
        two.wait_for_state(scene.name(), "running")?;
        let state = one.state(scene.name())?;
        ensure!(
            state.as_deref().is_some_and(|state| state.starts_with("paused")),
            "the guest runs on host2 and is {state:?} on host1: {said}"
        );
        drop(cut);
        // Peer-to-peer, by hand; else host1 may have asked again once its client had gone.
        one.remove(scene.name())?;
        scene.lives_on(two)?;
        wait_until("the hosts to reach each other", PATIENCE, || {
            Ok(two.exec(&["ping", "-c1", "-W1", one.name()])?.status.success())
        })?;
        scene.move_to(two, one, &[])
    })
}

/// Whoever runs the phases dies between two of them: nobody will confirm, and the guest runs in one place all the same.
#[test]
fn a_client_that_goes_leaves_no_guest_standing() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("abandoned"), 1)?;
        for finished in [false, true] {
            let context = || format!("after {}", if finished { "Finish" } else { "Perform" });
            let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
            let (xml, cookie) = client.begin()?;
            let (cookie, uri) = client.prepare(&xml, &cookie)?.map_err(Error::msg)?;
            let cookie = client.perform(&uri, &cookie)?.map_err(Error::msg)?;
            if finished {
                client.finish(Some(&cookie), false)?.map_err(Error::msg)?;
            }
            drop(client);
            let (here, there) = if finished { (two, one) } else { (one, two) };
            here.wait_for_state(scene.name(), "running")
                .with_context(context)?;
            wait_until("the other host to forget the guest", PATIENCE, || {
                Ok(there.state(scene.name())?.is_none())
            })
            .with_context(context)?;
            scene.is_unharmed(here).with_context(context)?;
        }
        scene.move_to(two, one, &[])
    })
}

/// A client that has lost its connection to the destination notices late. By then the engine may have died, other guests
/// have left, and half a minute have passed: the guest runs once all the same.
#[test]
fn a_late_confirm_finds_what_is_known() -> Result<()> {
    const NOTICED: Duration = Duration::from_secs(33);
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let begin = |name: &str, number| -> Result<_> {
            let scene = Scene::start(lab, one, usual(name), number)?;
            let client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
            Ok((scene, client))
        };
        let finish = |client: &mut Phases| -> Result<()> {
            let (xml, cookie) = client.begin()?;
            let (cookie, uri) = client.prepare(&xml, &cookie)?.map_err(Error::msg)?;
            let cookie = client.perform(&uri, &cookie)?.map_err(Error::msg)?;
            client.finish(Some(&cookie), false)?.map_err(Error::msg)?;
            Ok(())
        };
        let (first, mut ours) = begin("first", 1)?;
        let (second, mut others) = begin("second", 2)?;
        finish(&mut ours)?;
        signal(&engine(one)?, SIGKILL)?;
        wait_until("host1 to notice its engine's death", PATIENCE, || {
            Ok(said(one, "an engine died at work") > 0)
        })?;
        finish(&mut others)?;
        let finished = Instant::now();

        let refused = ours.confirm(None, true)?.err().unwrap_or_default();
        println!("{refused}");
        ensure!(
            refused.contains("does not say whether it runs there"),
            "Confirm said '{refused}'"
        );
        one.wait_for_state("first", "paused")?;
        drop(ours);
        one.remove("first")?;
        first.lives_on(two)?;

        // This one's engine lives, and asks.
        thread::sleep(NOTICED.saturating_sub(finished.elapsed()));
        others.confirm(None, true)?.map_err(Error::msg)?;
        wait_until("host1 to forget the guest", PATIENCE, || {
            Ok(one.state("second")?.is_none())
        })?;
        second.lives_on(two)
    })
}

/// Before Perform, nothing has been promised to anybody.
#[test]
fn a_client_that_goes_early_leaves_nothing() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("early"), 1)?;
        let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
        let (xml, cookie) = client.begin()?;
        client.prepare(&xml, &cookie)?.map_err(Error::msg)?;
        drop(client);
        wait_until("host2 to forget the guest", PATIENCE, || {
            Ok(two.state(scene.name())?.is_none())
        })?;
        scene.is_unharmed(one)?;
        scene.move_to(one, two, &[])
    })
}
