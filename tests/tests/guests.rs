//! The guests themselves: that they run, survive QEMU's own migration undamaged, and notice every kind of damage.
//!
//! A checker that never says BAD would let every other test pass, so here memory is damaged from outside and each guest must say so.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use ferry_guest::line::Status;
use ferry_guest::page::Page;
use ferry_tests::guest::beat::Listener;
use ferry_tests::guest::qemu::{kvm_works, wait_for_pass, Place, Qemu};
use ferry_tests::guest::ram::{RamFile, Stamped};
use ferry_tests::guest::remote::Remote;
use ferry_tests::guest::{Accel, Address, Guest, Rate};

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

/// Zeroes a page of the working set under a running load that has only one way of finding out.
fn noticed_unasked(guest: Guest) -> Result<()> {
    let dir = work_dir()?;
    let (mut qemu, _) = booted(&guest.working_set(4), dir.path())?;
    qemu.stop()?;
    let ram = qemu.ram()?;
    let page = ram
        .stamped()?
        .into_iter()
        .find(|page| page.place == 500)
        .context("page 500 is not in the file")?;
    ram.overwrite(page.offset, &Page::ZEROED)?;
    qemu.resume()?;
    let told = |line: &String| line.contains("error area=memory page=500 ") && line.contains("kind=zeroed");
    qemu.console()
        .wait("error", PATIENCE, |lines| lines.iter().any(told).then_some(()))?;
    qemu.console().next_status(PATIENCE, |status| status.errors > 0)?;
    Ok(())
}

#[test]
fn the_writer_notices_before_it_writes() -> Result<()> {
    noticed_unasked(Guest::linux("writer").check(Rate(0)).rate(Rate::mib(2)))
}

#[test]
fn the_background_check_notices() -> Result<()> {
    noticed_unasked(Guest::linux("checker").check(Rate::mib(2)).rate(Rate(0)))
}

/// A raw disk on a file system that does O_DIRECT.
fn disk(mib: u64) -> Result<tempfile::NamedTempFile> {
    let file = tempfile::NamedTempFile::new()?;
    file.as_file().set_len(mib << 20)?;
    Ok(file)
}

#[test]
fn disk_load_is_undamaged_by_qemus_own_migration() -> Result<()> {
    let (dir, image) = (work_dir()?, disk(16)?);
    let guest = Guest::linux("disk")
        .disk(image.path(), "raw")
        .disk_load(16, Rate(400));
    let (mut source, _) = booted(&guest, dir.path())?;
    let before = source
        .console()
        .next_status(PATIENCE, |status| status.disk > 500)?;
    let mut destination = Qemu::start(
        &guest,
        Place {
            incoming: true,
            ..Place::new(dir.path(), "destination")
        },
    )?;
    source.migrate(&mut destination, &dir.path().join("migration"), PATIENCE)?;
    drop(source);
    // Each of the 1024 landing pages has been read into, and looked at before, since.
    destination
        .console()
        .next_status(PATIENCE, |status| status.disk > before.disk + 2 * 1024)?;
    ensure!(verdict(&mut destination, "after")?);
    Ok(())
}

#[test]
fn linux_notices_a_lost_disk_read() -> Result<()> {
    let (dir, image) = (work_dir()?, disk(16)?);
    // Only the disk's pages are stamped here.
    let guest = Guest::linux("landed")
        .working_set(0)
        .disk(image.path(), "raw")
        .disk_load(16, Rate(20));
    let (mut qemu, _) = booted(&guest, dir.path())?;
    qemu.console().next_status(PATIENCE, |status| status.disk > 20)?;
    ensure!(verdict(&mut qemu, "before")?);
    qemu.stop()?;
    let ram = qemu.ram()?;
    for page in ram.stamped()? {
        ram.overwrite(page.offset, &Page::ZEROED)?;
    }
    qemu.resume()?;
    ensure!(
        !verdict(&mut qemu, "after")?,
        "the guest calls lost disk reads good"
    );
    let errors = qemu.console().errors()?;
    ensure!(
        errors
            .iter()
            .any(|line| line.contains("area=landed") && line.contains("kind=zeroed")),
        "{errors:?}"
    );
    Ok(())
}

/// A network namespace with a bridge and a tap device on it; ends with the value.
struct Network {
    name: String,
}

impl Network {
    const HOST: &str = "192.168.77.1/24";
    const TAP: &str = "tap0";

    fn new() -> Result<Self> {
        let network = Network {
            name: format!("ferry-guests-{}", std::process::id()),
        };
        ip(&["netns", "add", &network.name])?;
        for arguments in [
            "link add labbr0 type bridge".to_owned(),
            format!("addr add {} dev labbr0", Self::HOST),
            "link set labbr0 up".to_owned(),
            format!("tuntap add dev {} mode tap", Self::TAP),
            format!("link set {} master labbr0 up", Self::TAP),
        ] {
            let words: Vec<&str> = ["-n", &network.name]
                .into_iter()
                .chain(arguments.split(' '))
                .collect();
            ip(&words)?;
        }
        Ok(network)
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "delete", &self.name]) {
            eprintln!("{error:#}");
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("cannot run ip")?;
    ensure!(
        output.status.success(),
        "ip {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
fn a_stop_is_measured_from_outside_and_by_the_real_time_clock() -> Result<()> {
    let (dir, network) = (work_dir()?, Network::new()?);
    let address: Address = "192.168.77.101/24".parse().expect("an address");
    let guest = Guest::linux("beat").network("labbr0", address);
    let place = Place {
        tap: Some((&network.name, Network::TAP)),
        ..Place::new(dir.path(), "only")
    };
    let listener = Listener::start(Some(&network.path()))?;
    let mut qemu = Qemu::start(&guest, place)?;
    let remote = Remote::new(Some(&network.path()), address.ip)?;
    ensure!(remote.check("udp", PATIENCE)?.ok());
    listener.wait(address.ip, 500, PATIENCE)?;
    // The clock of lost time needs a whole second to find where seconds begin.
    let from = qemu.console().next_status(PATIENCE, |_| true)?;
    qemu.console()
        .next_status(PATIENCE, |status| status.t > from.t + 2.5)?;
    remote.order("reset", PATIENCE)?;
    listener.reset();
    listener.wait(address.ip, 500, PATIENCE)?;

    qemu.stop()?;
    let stopped = Instant::now();
    std::thread::sleep(Duration::from_millis(300)); // what is measured, not waited for
    let stop = stopped.elapsed();
    qemu.resume()?;

    let numbers = listener.heard(address.ip).newest;
    listener.wait(address.ip, 1000, PATIENCE)?;
    let heard = listener.heard(address.ip);
    ensure!(
        heard.longest.length >= stop,
        "stopped for {stop:?}, heard {heard:?}"
    );
    ensure!(heard.repeated == 0 && heard.newest > numbers, "{heard:?}");
    // A real-time clock's second that began in the stop is not seen: allow for the loop's own 1 ms turns.
    let lost = stop.as_secs_f64() * 1e3 - 20.0;
    qemu.console()
        .next_status(PATIENCE, |status| status.lost_ms >= lost)?;

    ensure!(
        remote.order("set 1000", PATIENCE).is_err(),
        "more working set than memory must be refused"
    );
    remote.order("rate 0", PATIENCE)?;
    qemu.console().next_status(PATIENCE, |status| status.rate == 0)?;
    remote.order("quit", PATIENCE)?;
    qemu.wait(PATIENCE)
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
