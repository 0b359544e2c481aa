//! The job as an operator has it in hand: watch it, give it up, move a guest that is paused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Error, Result};
use ferry_tests::fault::{names, signal, Disturbed};
use ferry_tests::guest::Rate;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::phases::{Phases, LIVE, PROTECTED};
use ferry_tests::scene::{usual, Scene};
use ferry_tests::timeline::{Outcome, Role, Timeline};
use ferry_tests::underway::{Job, Underway};
use ferry_tests::wait::wait_until;
use nix::sys::signal::Signal;

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
fn abort(lab: &Lab, scene: &Scene, options: &[&str], ready: fn(&Job) -> bool) -> Result<()> {
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

            // VDSM takes these for granted (migration.py); virsh makes its percentage of them.
            for name in [
                "operation",
                "time_elapsed",
                "data_total",
                "data_processed",
                "data_remaining",
                "memory_dirty_rate",
                "memory_bps",
            ] {
                ensure!(seen.iter().all(|job| job.has(name)), "no {name} in {seen:?}");
            }
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
            // What the guest writes meanwhile has to be sent again, but it writes little.
            ensure!(
                percentages.windows(2).all(|pair| pair[1] > pair[0] - 5.0),
                "{percentages:?}"
            );
            scene.lives_on(to)?;
        }
        one.assert_moved_away(1)?;
        two.assert_moved_away(1)
    })
}

/// VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN and _OUT.
const IN: u64 = 4;
const OUT: u64 = 5;

/// A completed job's figures are those of the move that the source's timeline tells of.
fn tells(job: &Job, operation: u64, timeline: &Timeline) -> Result<()> {
    let pause = timeline
        .downtime
        .context("the timeline has no downtime")?
        .total_ms as u64;
    let [total, processed, remaining, bytes] = [
        "memory_total",
        "memory_processed",
        "memory_remaining",
        "memory_normal_bytes",
    ]
    .map(|name| job.figure(name));
    ensure!(
        job.figure("operation") == operation
            && (256 << 20..512 << 20).contains(&total)
            && (256 << 20..512 << 20).contains(&processed)
            && remaining == 0
            && [job.figure("data_total"), job.figure("data_processed")] == [total, processed],
        "{job:?}"
    );
    // A little is QEMU's own, in what was processed also device state.
    let engines = timeline.totals.data_bytes;
    ensure!(
        (engines..engines + (32 << 20)).contains(&bytes),
        "{engines} bytes of memory, but {job:?}"
    );
    let downtime = job.figure("downtime");
    ensure!(
        downtime > 0 && downtime <= pause + 2000 && job.figure("time_elapsed") > downtime,
        "the guest stood still for {pause} ms, but {job:?}"
    );
    ensure!(
        job.figure("memory_iteration") >= timeline.rounds.len() as u64
            && job.figure("memory_bps") > 0
            && job.figure("memory_page_size") == 4096
            && job.figure("memory_constant") > 0,
        "{job:?}"
    );
    Ok(())
}

/// The figures of a completed job are the engine's, on either host and in the event, until they are read.
#[test]
fn a_completed_job_tells_what_was_moved() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("told"), 1)?;
        one.make_persistent("told")?;
        for (from, to, options) in [
            (one, two, &["--persistent"][..]),
            (two, one, &["--persistent", "--p2p"]),
        ] {
            let event = [
                "event",
                "--domain",
                "told",
                "--event",
                "job-completed",
                "--timeout",
                "90",
            ];
            let event = from
                .command("virsh")
                .args(event)
                .stdout(Stdio::piped())
                .spawn()
                .context("virsh event")?;
            scene.move_to(from, to, options)?;
            let timeline = from.last_timeline(Role::Source)?;
            let event = event.wait_with_output()?;
            tells(
                &Job::parse(&String::from_utf8_lossy(&event.stdout)),
                OUT,
                &timeline,
            )
            .context("the event")?;
            for (host, operation) in [(from, OUT), (to, IN)] {
                let kept = host.completed_job("told", true)?;
                tells(&kept, operation, &timeline).context(host.name().to_owned())?;
                tells(&host.completed_job("told", false)?, operation, &timeline)?;
                let left = host.completed_job("told", true)?;
                ensure!(left.is_none(), "it is still there: {left:?}");
            }
        }
        // One that is not the engine's has nothing of it.
        let native = [
            "--persistent",
            "--parallel",
            "--compressed",
            "--comp-methods",
            "zlib",
        ];
        scene.move_to(one, two, &native)?;
        one.assert_moved_away(1)?;
        let job = one.completed_job("told", false)?;
        ensure!(
            (256 << 20..512 << 20).contains(&job.figure("memory_total")),
            "{job:?}"
        );
        // While a guest arrives nothing can be told, as without us.
        let slow = Slow::to(lab, one, 100)?;
        let mut moving = two.begin_migration("told", one, &[])?;
        moving.wait_for_job("memory to be on its way", |job| {
            job.figure("memory_processed") > 0
        })?;
        let error = one.job("told").expect_err("a figure of an arriving guest");
        ensure!(
            format!("{error:#}").contains("available only on the source host"),
            "{error:#}"
        );
        drop(slow);
        moving.succeeds()?;
        scene.lives_on(one)
    })
}

/// A guest that never fits the pause, whose migration somebody gives up.
fn unwanted(lab: &Lab) -> Result<Scene<'_>> {
    let busy = usual("unwanted").working_set(48).rate(Rate::mib(36));
    Scene::start(lab, lab.host(1), busy, 1)
}

/// Whoever gives a migration up is heard in every stage: here before its first byte.
#[test]
fn given_up_before_anything_moves() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("unwanted"), 1)?;
        let abort = || one.virsh(&["domjobabort", scene.name()]);

        // Reservation: the destination has not been asked yet, or has just been asked.
        for prepared in [false, true] {
            let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
            let (xml, mut cookie) = client.begin()?;
            if !prepared {
                abort()?;
            }
            let (answer, uri) = client.prepare(&xml, &cookie)?.map_err(Error::msg)?;
            cookie = answer;
            if prepared {
                abort()?;
            }
            let error = client.perform(&uri, &cookie)?.err().context("it was performed")?;
            ensure!(error.contains("migration out: canceled by client"), "{error}");
            // An error tells that nothing was resumed.
            let _ = client.finish(None, true)?;
            scene.is_unharmed(one).context("reservation")?;
        }

        // Pre-migration: the engine has not looked at the guest yet.
        let engine = one.path("/run/late-engine");
        fs::write(
            &engine,
            "#!/bin/sh\nwhile [ ! -e /run/look ]; do sleep 0.02; done\n\
             exec /usr/lib/virt-ferry/virt-ferry-engine \"$@\"\n",
        )?;
        fs::set_permissions(&engine, fs::Permissions::from_mode(0o755))?;
        one.configure("engine = \"/run/late-engine\"\n")?;
        for options in [&[][..], &["--p2p"]] {
            let mut moving = one.begin_migration(scene.name(), two, options)?;
            moving.wait_for_job("the job to begin", |job| !job.is_none())?;
            abort()?;
            fs::write(one.path("/run/look"), "")?;
            let error = moving.fails()?;
            ensure!(error.contains(ABORTED), "{error}");
            scene.is_unharmed(one).context("pre-migration")?;
            fs::remove_file(one.path("/run/look"))?;
        }
        one.configure("")?;

        // Peer-to-peer, while the destination's daemon does not answer.
        let daemon = two.processes_named("libvirtd")?.pop().context("no libvirtd")?;
        signal(&daemon, Signal::SIGSTOP)?;
        let mut moving = one.begin_migration(scene.name(), two, &["--p2p"])?;
        moving.wait_for_job("the job to begin", |job| !job.is_none())?;
        let aborted = abort();
        signal(&daemon, Signal::SIGCONT)?;
        aborted?;
        let error = moving.fails()?;
        ensure!(error.contains(ABORTED), "{error}");
        scene.is_unharmed(one).context("peer-to-peer reservation")
    })
}

/// The guest stands still, and would for a minute; QEMU does not answer, but what is asked of its job is answered.
fn stands_for_long(moving: &mut Underway<'_>, slow: &Slow<'_>) -> Result<()> {
    moving.reaches(Disturbed::StopAndCopy)?;
    slow.set(8)?;
    let left = moving.wait_for_job("the last of the memory", |job| job.figure("memory_remaining") > 0)?;
    let total = left.figure("data_processed") + left.figure("data_remaining");
    ensure!(
        total == left.figure("data_total") && left.figure("time_elapsed") > 0,
        "{left:?}"
    );
    Ok(())
}

/// The newest migration from there was given up, in this stage.
fn given_up_at(host: &Host, stage: &str) -> Result<()> {
    let timeline = host.last_timeline(Role::Source)?;
    let last = timeline.stages.last().context("no stages")?;
    ensure!(
        timeline.outcome == Outcome::Cancelled && last.stage == stage,
        "{timeline:?}"
    );
    Ok(())
}

/// And here while the guest runs, stands still, or is the destination's: then it is too late.
#[test]
fn given_up_in_later_stages() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = unwanted(lab)?;
        let abort = || one.virsh(&["domjobabort", scene.name()]);
        let slow = Slow::to(lab, two, 100)?;
        let mut moving = one.begin_migration(scene.name(), two, &["--p2p"])?;
        stands_for_long(&mut moving, &slow)?;
        abort()?;
        let error = moving.fails()?;
        ensure!(error.contains("canceled by client"), "{error}");
        given_up_at(one, "stop-and-copy")?;
        scene.is_unharmed(one).context("stop-and-copy")?;
        for stage in ["pre-copy", "stop-and-copy"] {
            slow.set(100)?;
            let mut moving = one.begin_migration_by_hand(scene.name(), two, &[])?;
            match stage {
                "pre-copy" => moving.reaches(Disturbed::PreCopy)?,
                _ => stands_for_long(&mut moving, &slow)?,
            }
            let shown = moving.interrupt()?;
            ensure!(shown.contains("canceled by client"), "{shown}");
            given_up_at(one, stage)?;
            scene
                .is_unharmed(one)
                .with_context(|| format!("Ctrl-C in {stage}"))?;
        }
        drop(slow);

        // QEMU has nothing left to cancel, libvirt says nothing, and the guest moves.
        let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
        let (xml, cookie) = client.begin()?;
        let (cookie, uri) = client.prepare(&xml, &cookie)?.map_err(Error::msg)?;
        let cookie = client.perform(&uri, &cookie)?.map_err(Error::msg)?;
        abort()?;
        let cookie = client.finish(Some(&cookie), false)?.map_err(Error::msg)?;
        client.confirm(cookie.as_deref(), false)?.map_err(Error::msg)?;
        scene.lives_on(two)?;
        one.assert_moved_away(1)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// A migration to host2 that has begun and takes a while.
fn begun<'a>(
    lab: &'a Lab,
    domain: &str,
    options: &[&str],
    stage: Disturbed,
) -> Result<(Slow<'a>, Underway<'a>)> {
    let slow = Slow::to(lab, lab.host(2), 100)?;
    let mut moving = lab.host(1).begin_migration(domain, lab.host(2), options)?;
    moving.reaches(stage)?;
    Ok((slow, moving))
}

/// How many of the daemon's workers have something to do.
fn busy_workers(host: &Host) -> Result<u64> {
    let info = host.run(&["virt-admin", "server-threadpool-info", "libvirtd"])?;
    let info = Job::parse(&info);
    Ok(info.figure("nWorkers") - info.figure("freeWorkers"))
}

/// libvirt's virDomainJobOperation of a dump.
const DUMP: u64 = 8;

/// A migration waits for a dump's turn; whoever gives the dump up has not given up the migration.
#[test]
fn another_job_that_is_given_up_is_not_the_migration() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("dumped"), 1)?;
        for options in [&[][..], &["--p2p"]] {
            // A dump to somebody who does not read it.
            one.run(&["mkfifo", "/run/dump"])?;
            let mut reader = one
                .command("sh")
                .args(["-c", "exec sleep 180 </run/dump"])
                .spawn()?;
            let mut virsh = one.command("virsh");
            let dump = virsh.args(["dump", "--live", scene.name(), "/run/dump"]);
            let mut dump = dump.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
            wait_until("the dump to begin", Duration::from_secs(30), || {
                Ok(one.job(scene.name())?.figure("operation") == DUMP)
            })?;
            let moving = one.begin_migration(scene.name(), two, options)?;
            // Besides the dump, a worker of libvirtd's is at it for longer than any other of the client's calls takes.
            let mut looks = 0;
            wait_until(
                "the migration to wait for its turn",
                Duration::from_secs(30),
                || {
                    looks = if busy_workers(one)? > 1 { looks + 1 } else { 0 };
                    Ok(looks == 5)
                },
            )?;
            one.virsh(&["domjobabort", scene.name()])?;
            signal(
                &one.processes_named("sleep")?.pop().context("nobody reads")?,
                Signal::SIGKILL,
            )?;
            reader.wait()?;
            ensure!(!dump.wait()?.success(), "the dump was not given up");
            moving.succeeds()?;
            scene.lives_on(two)?;
            two.migrate(scene.name(), one, &[])?;
            fs::remove_file(one.path("/run/dump"))?;
        }
        one.assert_moved_away(2)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// As with libvirt's own migration, a guest that is paused while it moves goes on: where it arrives, or where it stays.
#[test]
fn paused_under_way() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("handled"), 1)?;
        let (slow, moving) = begun(lab, "handled", &[], Disturbed::PreCopy)?;
        // Whoever asks QEMU something is answered, and who might have it write the guest is told at once.
        let asked = Instant::now();
        one.qmp("handled", r#"{"execute":"query-status"}"#)?;
        let refused = one.qmp("handled", r#"{"execute":"cont"}"#);
        let held = refused.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(held.contains("held by a migration of handled"), "{held}");
        ensure!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
        one.virsh(&["suspend", "handled"])?;
        one.wait_for_state("handled", "paused")?;
        one.virsh(&["domjobabort", "handled"])?;
        moving.fails()?;
        drop(slow);
        scene.is_unharmed(one)?;
        let (slow, moving) = begun(lab, "handled", &["--p2p"], Disturbed::PreCopy)?;
        one.virsh(&["suspend", "handled"])?;
        drop(slow);
        moving.succeeds()?;
        scene.lives_on(two)?;
        one.assert_moved_away(1)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// Ended where it was to arrive, a guest stays; ended where it is, it is gone.
#[test]
fn ended_under_way() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        for (name, options, stage) in [
            ("ended1", &["--p2p"][..], Disturbed::PreCopy),
            ("ended2", &[], Disturbed::StopAndCopy),
        ] {
            let busy = usual(name).working_set(48).rate(Rate::mib(36));
            let scene = Scene::start(lab, one, busy, 1)?;
            let (slow, moving) = begun(lab, name, options, Disturbed::PreCopy)?;
            two.virsh(&["destroy", name])?;
            names(&moving.fails()?, &["host2"])?;
            scene.is_unharmed(one)?;
            drop(slow);

            let (_slow, moving) = begun(lab, name, options, stage)?;
            one.virsh(&["destroy", name])?;
            names(&moving.fails()?, &[name, "host1"])?;
            for (number, host) in [(1, one), (2, two)] {
                ensure!(host.state(name)?.is_none(), "{} still knows {name}", host.name());
                lab.assert_clean(number)?;
            }
        }
        Ok(())
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
