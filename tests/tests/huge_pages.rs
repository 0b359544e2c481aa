//! Guests in huge pages move as others do, and take as many of them at the destination.

use anyhow::{ensure, Context, Result};
use ferry_tests::fault::names;
use ferry_tests::guest::{Backing, Guest, Rate};
use ferry_tests::huge_pages::HugePages;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{Scene, PATIENCE};
use ferry_tests::timeline::Role;
use ferry_tests::wait::wait_until;

/// Memory of the guest, MiB, and huge pages of it.
const MEMORY: u64 = 160;
const PAGES: u64 = MEMORY / 2;

fn guest(name: &str) -> Guest {
    Guest::linux(name)
        .memory_mib(MEMORY)
        .working_set(8)
        .filled(24)
        .rate(Rate::mib(4))
        .backing(Backing::HugePages)
}

#[test]
fn huge_pages_move_and_are_counted() -> Result<()> {
    // Both hosts' at once, and some for a test beside this one.
    let Some(pool) = HugePages::add(2 * PAGES + 8)? else {
        return Ok(());
    };
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        for host in [one, two] {
            host.configure("verify_memory = true\n")?;
        }
        let before = pool.used()?;
        let scene = Scene::start(lab, one, guest("huge"), 1)?;
        ensure!(pool.used()? == before + PAGES, "{} pages", pool.used()? - before);
        for (from, to, options) in [(one, two, &[][..]), (two, one, &["--p2p", "--parallel"])] {
            scene.move_to(from, to, options)?;
            wait_until("the source's pages to be free", PATIENCE, || {
                Ok(pool.used()? <= before + PAGES)
            })?;
            ensure!(pool.used()? == before + PAGES, "{} pages", pool.used()? - before);
            let timeline = from.last_timeline(Role::Source)?;
            ensure!(timeline.ram.resident == MEMORY << 20, "{:?}", timeline.ram);
            ensure!(timeline.totals.data_bytes > 24 << 20, "{:?}", timeline.totals);
        }
        one.assert_moved_away(1)?;
        two.assert_moved_away(1)?;

        // Fewer than it needs are refused before anything is started for it.
        pool.leave(PAGES - 1)?;
        for options in [&[][..], &["--p2p"]] {
            let said = one.begin_migration("huge", two, options)?.fails()?;
            names(
                &said,
                &["host2", "160 MiB", "huge pages of 2048 KiB", "158 MiB left"],
            )?;
            scene.is_unharmed(one)?;
        }
        ensure!(pool.used()? == before + PAGES, "{} pages", pool.used()? - before);
        Ok(())
    })
}

/// The tmpfs of the guests' memory makes huge pages by itself: tracked, copied and landed they are small ones.
#[test]
fn huge_pages_of_tmpfs_move() -> Result<()> {
    for policy in ["within_size", "always"] {
        Lab::with(Options::default().ram_huge(policy), |lab| {
            let (one, two) = (lab.host(1), lab.host(2));
            for host in [one, two] {
                host.configure("verify_memory = true\n")?;
            }
            let guest = guest("thp").backing(Backing::File);
            let scene = Scene::start(lab, one, guest, 1)?;
            for (from, to, options) in [(one, two, &[][..]), (two, one, &["--p2p"])] {
                scene.move_to(from, to, options)?;
                let timeline = from.last_timeline(Role::Source)?;
                let resident = to.ram_file("thp")?.resident()?;
                ensure!(
                    resident <= timeline.ram.resident + timeline.ram.resident / 20,
                    "{policy}: {resident} bytes at {}, {} at {}",
                    to.name(),
                    timeline.ram.resident,
                    from.name()
                );
            }
            one.assert_moved_away(1)?;
            two.assert_moved_away(1)
        })
        .with_context(|| format!("huge={policy}"))?;
    }
    Ok(())
}
