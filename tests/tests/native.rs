//! The lab itself: libvirt's own migration between hosts without virt-ferry. What fails here is not virt-ferry's
//! fault, and what virt-ferry is compared with.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options, Plugin};

/// A guest that boots nothing: its memory is what the test writes into it.
const GUEST: &str = "
<domain type='qemu'>
  <name>idle</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <interface type='bridge'><source bridge='labbr0'/><model type='virtio'/></interface>
    <memballoon model='none'/>
  </devices>
</domain>";

/// Where no firmware writes: well above the first megabytes, below the tables at the end of memory.
const UNTOUCHED: u64 = 32 << 20;

fn memory_file(host: &Host) -> Result<PathBuf> {
    let ram = host.path("/var/lib/libvirt/qemu/ram");
    let guest = fs::read_dir(&ram)?
        .next()
        .context("no guest has a memory file")??
        .path();
    Ok(guest.join("pc.ram"))
}

fn pattern() -> Vec<u8> {
    (0..1u32 << 20)
        .flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect()
}

fn put_pattern(host: &Host) -> Result<()> {
    let file = fs::OpenOptions::new().write(true).open(memory_file(host)?)?;
    Ok(file.write_all_at(&pattern(), UNTOUCHED)?)
}

fn check_pattern(host: &Host) -> Result<()> {
    let mut memory = vec![0; pattern().len()];
    fs::File::open(memory_file(host)?)?.read_exact_at(&mut memory, UNTOUCHED)?;
    ensure!(
        memory == pattern(),
        "the guest's memory changed on its way to {}",
        host.name()
    );
    Ok(())
}

/// There and back again, the guest's memory with it, and both hosts clean.
fn there_and_back(options: &[&str]) -> Result<()> {
    Lab::with(Options::default().plugin(Plugin::None), |lab| {
        let (source, destination) = (lab.host(1), lab.host(2));
        let guest = source.create(GUEST)?;
        put_pattern(source)?;
        for (from, to) in [(source, destination), (destination, source)] {
            from.migrate(&guest, to, options)?;
            to.wait_for_state(&guest, "running")?;
            ensure!(
                from.state(&guest)?.is_none(),
                "{guest} is still known to {}",
                from.name()
            );
            check_pattern(to)?;
            lab.assert_clean(1)?;
            lab.assert_clean(2)?;
        }
        Ok(())
    })
}

#[test]
fn managed_migration() -> Result<()> {
    there_and_back(&[])
}

#[test]
fn peer_to_peer_migration() -> Result<()> {
    there_and_back(&["--p2p"])
}

#[test]
fn a_guest_survives_a_restart_of_libvirtd() -> Result<()> {
    Lab::with(Options::default().plugin(Plugin::None), |lab| {
        let host = lab.host(1);
        let guest = host.create(GUEST)?;
        let qemu = host.qemu(&guest)?;
        for kill in [false, true] {
            host.restart_libvirtd(kill)?;
            host.wait_for_state(&guest, "running")?;
            ensure!(host.qemu(&guest)?.pid == qemu.pid, "QEMU was started anew");
        }
        host.remove(&guest)?;
        lab.assert_clean(1)
    })
}
