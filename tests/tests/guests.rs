//! The guests themselves: that they run, survive QEMU's own migration undamaged, and notice every kind of damage.
//!
//! A checker that never says BAD would let every other test pass, so here memory is damaged from outside and each guest must say so.

use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Result};
use ferry_guest::line::Status;
use ferry_guest::page::Page;
use ferry_tests::guest::qemu::{kvm_works, wait_for_pass, Place, Qemu};
use ferry_tests::guest::ram::{RamFile, Stamped};
use ferry_tests::guest::{Accel, Guest, Kind, Rate};

/// For whatever a guest does at once, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory in memory, for RAM files; removed at the end.
fn work_dir() -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new()
        .prefix("ferry-guests-")
        .tempdir_in("/dev/shm")?)
}

fn booted(guest: &Guest, dir: &Path) -> Result<(Qemu, Status)> {
    let qemu = Qemu::start(guest, Place::new(dir, "source"))?;
    let status = qemu.console().next_status(PATIENCE, |_| true)?;
    Ok((qemu, status))
}

/// One check of all memory on demand; whether the guest calls it good.
fn verdict(qemu: &mut Qemu, id: &str) -> Result<bool> {
    qemu.type_line(&format!("check {id}"))?;
    Ok(qemu.console().verdict(id, PATIENCE)?.ok())
}

#[test]
fn linux_is_undamaged_by_qemus_own_migration() -> Result<()> {
    let dir = work_dir()?;
    let guest = Guest::linux("native")
        .working_set(32)
        .filled(32)
        .rate(Rate::mib(8));
    let (mut source, before) = booted(&guest, dir.path())?;
    ensure!(before.pages == 64 * 256 && before.errors == 0, "{before:?}");
    ensure!(verdict(&mut source, "before")?);

    let mut destination = Qemu::start(
        &guest,
        Place {
            incoming: true,
            ..Place::new(dir.path(), "destination")
        },
    )?;
    source.migrate(&mut destination, &dir.path().join("migration"), PATIENCE)?;
    drop(source);

    let after = destination.console().next_round(PATIENCE)?;
    ensure!(after.seq > before.seq && after.errors == 0, "{after:?}");
    ensure!(verdict(&mut destination, "after")?);
    Ok(())
}

/// Damages one page of a stopped guest by `damage`, which gets the page's place, an older version and another page, and has the
/// guest look: it must tell that page, and as `kind`.
fn notices(kind: &str, damage: impl FnOnce(&RamFile, Stamped, &Page, Stamped) -> Result<()>) -> Result<()> {
    let dir = work_dir()?;
    // No background check and no writer's look before this one, so that the answer is the command's own.
    let guest = Guest::linux("damaged")
        .working_set(4)
        .filled(4)
        .rate(Rate::mib(2))
        .check(Rate(0));
    let (mut qemu, _) = booted(&guest, dir.path())?;
    ensure!(verdict(&mut qemu, "before")?);
    let ram = qemu.ram()?;

    qemu.stop()?;
    let set = 4 * 256;
    let old = ram
        .stamped()?
        .into_iter()
        .find(|page| page.place == 17)
        .expect("page 17 of the working set");
    let version = ram.page(old.offset)?;
    qemu.resume()?;
    qemu.console().next_round(PATIENCE)?;
    qemu.type_line("rate 0")?;
    qemu.console().next_status(PATIENCE, |status| status.rate == 0)?;

    qemu.stop()?;
    let pages = ram.stamped()?;
    let newest = |place| {
        let versions = pages.iter().filter(move |page| page.place == place);
        *versions
            .max_by_key(|page| page.sequence)
            .expect("every page is in the file")
    };
    let (now, other) = (newest(17), newest(set + 1));
    ensure!(
        now.offset == old.offset && now.sequence > old.sequence,
        "page 17 was {old:?} and is {now:?}"
    );
    damage(&ram, now, &version, other)?;
    qemu.resume()?;

    ensure!(
        !verdict(&mut qemu, "after")?,
        "{kind}: the guest calls damaged memory good"
    );
    let errors = qemu.console().errors()?;
    let place = if kind == "misplaced" { set + 1 } else { 17 };
    let told =
        |line: &String| line.contains(&format!(" page={place} ")) && line.contains(&format!("kind={kind}"));
    ensure!(
        errors.len() == 1 && told(&errors[0]),
        "{kind}: the guest told {errors:?}"
    );
    ensure!(
        !verdict(&mut qemu, "still")?,
        "{kind}: damage once seen must not be forgotten"
    );
    Ok(())
}

#[test]
fn linux_notices_a_lost_write() -> Result<()> {
    notices("stale", |ram, page, version, _| {
        ram.overwrite(page.offset, version)
    })
}

#[test]
fn linux_notices_a_lost_page() -> Result<()> {
    notices("zeroed", |ram, page, _, _| {
        ram.overwrite(page.offset, &Page::ZEROED)
    })
}

#[test]
fn linux_notices_a_page_in_anothers_place() -> Result<()> {
    notices("misplaced", |ram, page, _, other| {
        ram.overwrite(other.offset, &ram.page(page.offset)?)
    })
}

#[test]
fn linux_notices_a_page_of_two_versions() -> Result<()> {
    notices("torn", |ram, page, version, _| {
        let mut torn = ram.page(page.offset)?;
        torn.bytes_mut()[2048..].copy_from_slice(&version.bytes()[2048..]);
        ram.overwrite(page.offset, &torn)
    })
}

/// The boot sector's range in these tests, MiB.
const END: u32 = 16;

fn boot(name: &str, accel: Accel) -> Guest {
    Guest::boot(name).accel(accel).memory_mib(64).range(END, 0)
}

/// Whoever has no KVM tests the boot sector under TCG and hears that it was not KVM.
fn accels() -> Vec<Accel> {
    match kvm_works() {
        Ok(()) => vec![Accel::Tcg, Accel::Kvm],
        Err(reason) => {
            eprintln!("SKIPPED for KVM, done for TCG: {reason:#}");
            vec![Accel::Tcg]
        }
    }
}

#[test]
fn boot_sector_leaves_one_edge_and_survives_qemus_own_migration() -> Result<()> {
    for accel in accels() {
        let dir = work_dir()?;
        let guest = boot("edge", accel);
        let mut source = Qemu::start(&guest, Place::new(dir.path(), "source"))?;
        wait_for_pass(source.console(), 2, PATIENCE)?;
        source.stop()?;
        source.ram()?.judge_boot(END)?;
        source.resume()?;

        let mut destination = Qemu::start(
            &guest,
            Place {
                incoming: true,
                ..Place::new(dir.path(), "destination")
            },
        )?;
        source.migrate(&mut destination, &dir.path().join("migration"), PATIENCE)?;
        let passes = source.console().text()?.matches('B').count();
        drop(source);
        // Two more: the first of them began before the migration ended.
        wait_for_pass(destination.console(), passes + 2, PATIENCE)?;
        destination.stop()?;
        destination.ram()?.judge_boot(END)?;
    }
    Ok(())
}

#[test]
fn a_lost_write_of_the_boot_sector_is_noticed_from_outside_and_inside() -> Result<()> {
    for accel in accels() {
        let dir = work_dir()?;
        let mut qemu = Qemu::start(&boot("lost", accel), Place::new(dir.path(), "only"))?;
        wait_for_pass(qemu.console(), 3, PATIENCE)?;
        qemu.stop()?;
        let ram = qemu.ram()?;
        ram.judge_boot(END)?;
        let offset = 9 << 20;
        let mut page = ram.page(offset)?;
        page.bytes_mut()[0] = page.bytes()[0].wrapping_sub(2);
        ram.overwrite(offset, &page)?;
        ensure!(
            ram.judge_boot(END).is_err(),
            "{accel:?}: the judge calls a lost write good"
        );
        qemu.resume()?;
        qemu.console().wait("E", PATIENCE, |_| {
            qemu.console().text().ok()?.contains('E').then_some(())
        })?;
        ensure!(
            wait_for_pass(qemu.console(), 1, PATIENCE).is_err(),
            "{accel:?}: E must not be overlooked"
        );
    }
    Ok(())
}
