//! Both hosts' RAM files, compared byte for byte at the commitment (`verify_memory`), while the guest writes, gives
//! memory back and takes it again; and what is no data at the source takes no memory at the destination.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{ensure, Context, Result};
use ferry_guest::page::Page;
use ferry_tests::guest::{Guest, Order, Rate};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::scene::{usual, Scene, PATIENCE};
use ferry_tests::timeline::{Outcome, Role};
use ferry_tests::wait::wait_until;

const MIB: u64 = 1 << 20;
/// What a guest that does nothing new may touch for the first time meanwhile: its kernel, and QEMU as it loads.
const SLACK: u64 = 4 * MIB;

/// A lab whose hosts compare.
fn lab(test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    Lab::with(Options::default(), |lab| {
        for host in lab.hosts() {
            host.configure("verify_memory = true\n")?;
        }
        test(lab)
    })
}

/// The last move away from `from` was the engine's, and all memory was compared.
fn assert_compared(from: &Host) -> Result<()> {
    let timeline = from.last_timeline(Role::Source)?;
    ensure!(
        timeline.outcome == Outcome::Completed && timeline.notes("every byte"),
        "the memory was not compared: {timeline:?}"
    );
    Ok(())
}

#[test]
fn under_write_load_and_with_all_holes() -> Result<()> {
    lab(|lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let guest = usual("written")
            .working_set(64)
            .rate(Rate::mib(64))
            .order(Order::Random);
        let scene = Scene::start(lab, one, guest, 1)?;
        for (from, to, options) in [
            (one, two, &[][..]),
            (two, one, &["--p2p"]),
            (one, two, &["--p2p"]),
            (two, one, &[]),
        ] {
            let before = from.ram_file(scene.name())?.resident()?;
            scene.move_to(from, to, options)?;
            assert_compared(from)?;
            let after = to.ram_file(scene.name())?.resident()?;
            ensure!(
                after <= before + SLACK,
                "the guest takes {after} bytes on {}, {before} on {}",
                to.name(),
                from.name()
            );
        }
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

#[test]
fn a_difference_is_found() -> Result<()> {
    lab(|lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("tampered"), 1)?;
        let slow = Slow::to(lab, two, 300)?;
        let mut moving = one.begin_migration(scene.name(), two, &[])?;
        moving.wait_for_job("memory to flow", |job| job.figure("memory_processed") > 0)?;
        // Memory the guest has never used is not sent, so nothing mends this.
        let untouched = one.ram_file(scene.name())?.hole(200 * MIB)?;
        let mut page = Page::ZEROED;
        page.bytes_mut()[77] = 1;
        two.ram_file(scene.name())?.overwrite(untouched, &page)?;
        let error = moving.fails()?;
        ensure!(
            error.contains("memory differs in block pc.ram") && error.contains("host2"),
            "the error does not say what differs: {error}"
        );
        drop(slow);
        scene.lives_on(one)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;
        scene.move_to(one, two, &[])?;
        assert_compared(one)
    })
}

/// Megabytes a program in the guest uses and frees.
const SPENT: u64 = 96;
/// Bytes of it, or of half of it, that may stay with the guest: it reports free memory in pieces of 2 MiB and more, and
/// others' pages lie in some.
const LEFT: u64 = 16 * MIB;

#[test]
fn memory_freed_while_the_guest_moves() -> Result<()> {
    lab(|lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(
            lab,
            one,
            usual("freeing")
                .memory_mib(384)
                // Far below the slow link's pace, or the move would not end.
                .rate(ferry_tests::guest::Rate::mib(1))
                .free_page_reporting(),
            1,
        )?;
        for (from, to, options) in [(one, two, &[][..]), (two, one, &["--p2p"])] {
            let ram = from.ram_file(scene.name())?;
            let idle = settled(&ram, scene.name())?;
            // Slow enough that the guest reports its free pages, some seconds later, while memory still flows: 150 MiB
            // take 15 s.
            let slow = Slow::to(lab, to, 80)?;
            scene.remote().spend(SPENT, from.name(), PATIENCE)?;
            let mut moving = from.begin_migration(scene.name(), to, options)?;
            moving.wait_for_job("free pages to be given back while memory flows", |job| {
                job.figure("memory_processed") > 0 && ram.resident().is_ok_and(|now| now <= idle + LEFT)
            })?;
            moving.succeeds()?;
            drop(slow);
            scene.lives_on(to)?;
            assert_compared(from)?;
            let began = from.last_timeline(Role::Source)?.ram.resident;
            ensure!(
                began > idle + SPENT * MIB / 2,
                "the pages were given back too soon: {began} bytes resident, {idle} when idle"
            );
            let after = to.ram_file(scene.name())?.resident()?;
            ensure!(
                after <= idle + LEFT,
                "what the guest gave back under way takes memory on {}: {after} bytes, {idle} before",
                to.name()
            );
        }
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// libvirt copies disks for as long as it takes, after the memory has gone over once: what the guest gives back then is no
/// write that a scan would find.
#[test]
fn memory_freed_while_disks_are_copied() -> Result<()> {
    const DISK: &str = "/var/lib/libvirt/images/freeing.raw";
    const DISK_MIB: u64 = 400;
    lab(|lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        for host in lab.hosts() {
            let image = host.path(DISK);
            fs::create_dir_all(image.parent().context("a directory")?)?;
            // Nothing that NBD could leave out.
            fs::write(&image, vec![0xa5; (DISK_MIB * MIB) as usize])?;
            fs::set_permissions(&image, fs::Permissions::from_mode(0o666))?;
        }
        let guest = usual("keeper")
            .memory_mib(384)
            .rate(Rate::mib(1))
            .free_page_reporting()
            .disk(DISK, "raw");
        let scene = Scene::start(lab, one, guest, 1)?;
        let ram = one.ram_file(scene.name())?;
        let idle = settled(&ram, scene.name())?;
        let slow = Slow::to(lab, two, 160)?;
        let mut moving = one.begin_migration(scene.name(), two, &["--copy-storage-all"])?;
        moving.wait_for_job("libvirt to copy the disk", |job| job.figure("disk_processed") > 0)?;
        // The disk takes far longer than the guest needs to report what it has freed.
        slow.set(24)?;
        scene.remote().spend(SPENT / 2, "once", PATIENCE)?;
        ensure!(
            ram.resident()? > idle + SPENT / 4 * MIB,
            "it was given back at once"
        );
        moving.wait_for_job("free pages to be given back", |job| {
            job.figure("disk_processed") < DISK_MIB * MIB
                && ram.resident().is_ok_and(|now| now <= idle + LEFT)
        })?;
        drop(slow);
        moving.succeeds()?;
        scene.lives_on(two)?;
        assert_compared(one)?;
        let after = two.ram_file(scene.name())?.resident()?;
        ensure!(after <= idle + LEFT, "{after} bytes, {idle} before");
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// Waits until a guest that reports free pages has none left to report, and returns what it takes then, in bytes.
fn settled(ram: &ferry_tests::guest::ram::RamFile, name: &str) -> Result<u64> {
    let mut last = (u64::MAX, 0);
    wait_until(&format!("{name} to give back no more"), PATIENCE, || {
        let now = ram.resident()?;
        // A report is due every two seconds; looked at every 20 ms.
        last = if now + MIB > last.0 {
            (last.0.min(now), last.1 + 1)
        } else {
            (now, 0)
        };
        Ok(last.1 > 150)
    })?;
    Ok(last.0)
}

#[test]
fn a_balloon_that_grows_and_shrinks() -> Result<()> {
    const LARGE: u64 = 512;
    const SMALL: u64 = 256;
    lab(|lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let guest = Guest::linux("balloon")
            .memory_mib(LARGE)
            .working_set(24)
            .filled(64)
            .rate(Rate::mib(32));
        let scene = Scene::start(lab, one, guest, 1)?;
        // The guest has used all of its memory once: what is not resident in the end has been given back.
        scene.remote().spend(300, "once", PATIENCE)?;
        let moves = [
            (one, two, SMALL, &[][..]),
            (two, one, LARGE, &["--p2p"]),
            (one, two, SMALL, &["--p2p"]),
        ];
        for (from, to, target, options) in moves {
            // The guest does it in its own time, which is that of the move.
            let target_kib = (target << 10).to_string();
            from.virsh(&["setmem", scene.name(), &target_kib, "--live"])?;
            let before = balloon(from, scene.name())?;
            scene.move_to(from, to, options)?;
            assert_compared(from)?;
            println!(
                "{} to {}: {before} MiB at the start, {target} in the end",
                from.name(),
                to.name()
            );
            wait_until("the balloon to have its size", PATIENCE, || {
                Ok(balloon(to, scene.name())? == target)
            })?;
            let takes = to.ram_file(scene.name())?.resident()?;
            ensure!(
                takes <= target * MIB + SLACK,
                "the guest has {target} MiB and takes {takes} bytes on {}",
                to.name()
            );
            scene.lives_on(to)?;
        }
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// The memory the balloon leaves the guest now, MiB.
fn balloon(host: &Host, domain: &str) -> Result<u64> {
    let answer = host.qmp(domain, r#"{"execute":"query-balloon"}"#)?;
    let bytes = answer["return"]["actual"].as_u64();
    Ok(bytes.with_context(|| format!("query-balloon: {answer}"))? / MIB)
}
