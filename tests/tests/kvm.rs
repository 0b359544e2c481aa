//! KVM's own writes are tracked: a boot-sector guest under real KVM, moved while it writes without pause.
//!
//! At any moment each page's byte equals its predecessor's, or is one less after the one edge where the guest stopped. The guest
//! only ever adds one, so a page that arrived stale stays wrong for good, and both the guest and the judge find it.

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::console::Console;
use ferry_tests::guest::qemu::{kvm_works, wait_for_pass};
use ferry_tests::guest::ram::RamFile;
use ferry_tests::guest::Guest;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::PATIENCE;
use ferry_tests::skipped;
use ferry_tests::timeline::Role;

/// End of what the guest writes, MiB.
const END: u32 = 24;
/// Hops, to and fro, managed and peer-to-peer in turn.
const HOPS: usize = 6;

/// The guest's RAM file on a host.
fn ram(host: &Host, domain: &str) -> Result<RamFile> {
    let directory = host.path("/var/lib/libvirt/qemu/ram");
    let mut guests = std::fs::read_dir(&directory)?.flatten();
    let guest = guests
        .find(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .ends_with(&format!("-{domain}"))
        })
        .with_context(|| format!("{domain} has no RAM on {}", host.name()))?;
    RamFile::open(guest.path().join("pc.ram"))
}

/// Stops the guest, judges its memory, and lets it go on.
fn judge(host: &Host, domain: &str) -> Result<()> {
    host.virsh(&["suspend", domain])?;
    ram(host, domain)?.judge_boot(END)?;
    host.virsh(&["resume", domain])?;
    Ok(())
}

#[test]
fn every_write_of_a_kvm_guest_arrives() -> Result<()> {
    if let Err(reason) = kvm_works() {
        skipped(&format!("{reason:#}"));
        return Ok(());
    }
    Lab::with(Options::default(), |lab| {
        let guest = Guest::boot("kvm").range(END, 0);
        let share = lab.share().join("guests");
        guest.install(&share)?;
        let console = Console::new(guest.log_in(&share));
        let domain = lab.host(1).create(&guest.xml())?;
        wait_for_pass(&console, 2, PATIENCE)?;
        judge(lab.host(1), &domain)?;
        for hop in 0..HOPS {
            let (from, to) = match hop % 2 {
                0 => (lab.host(1), lab.host(2)),
                _ => (lab.host(2), lab.host(1)),
            };
            let options: &[&str] = if hop % 4 < 2 { &[] } else { &["--p2p"] };
            from.migrate(&domain, to, options)
                .with_context(|| format!("hop {hop}"))?;
            to.wait_for_state(&domain, "running")?;
            let passes = console.text()?.matches('B').count();
            // Two more: the first of them began before the guest had arrived.
            wait_for_pass(&console, passes + 2, PATIENCE).with_context(|| format!("hop {hop}"))?;
            judge(to, &domain).with_context(|| format!("hop {hop}"))?;

            let ours = from.last_timeline(Role::Source)?;
            // Written since the first pass: sent again in a round, or by the last copy.
            let first = ours.rounds.first().map_or(0, |round| round.data_bytes);
            ensure!(
                ours.totals.data_bytes > first,
                "the tracker saw no write of a guest that only writes: {ours:?}"
            );
        }
        lab.host(1).assert_moved_away(HOPS / 2)?;
        lab.host(2).assert_moved_away(HOPS / 2)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}
