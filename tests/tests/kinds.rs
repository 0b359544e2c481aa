//! All kinds of guests that the engine moves: their memory in several pieces, their firmware, their devices.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::{Guest, Machine, Rate};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{usual, Scene, PATIENCE};
use ferry_tests::timeline::Role;
use ferry_tests::wait::wait_until;

const MIB: u64 = 1 << 20;

/// There and back through the engine, which compares all memory byte for byte, too.
fn there_and_back(lab: &Lab, scene: &Scene, blocks: u32, mib: u64) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let before = [one.moved_away()?, two.moved_away()?];
    for host in [one, two] {
        host.configure("verify_memory = true\n")?;
    }
    scene.move_to(one, two, &[])?;
    scene.move_to(two, one, &["--p2p"])?;
    for (number, host) in [(1, one), (2, two)] {
        host.assert_moved_away(before[number - 1] + 1)?;
        let ram = host.last_timeline(Role::Source)?.ram;
        ensure!(
            (ram.blocks, ram.bytes) == (blocks, mib * MIB),
            "{} moved {ram:?}, not {mib} MiB in {blocks} blocks",
            host.name()
        );
        lab.assert_clean(number)?;
    }
    Ok(())
}

/// Bytes that a guest's memory file of this name holds.
fn resident(host: &Host, domain: &str, block: &str) -> Result<u64> {
    let directory = host.path("/var/lib/libvirt/qemu/ram");
    let guest = fs::read_dir(&directory)?.flatten().find(|entry| {
        entry
            .file_name()
            .to_string_lossy()
            .ends_with(&format!("-{domain}"))
    });
    let file = guest.context("the guest has no memory files")?.path().join(block);
    Ok(fs::metadata(&file)
        .with_context(|| file.display().to_string())?
        .blocks()
        * 512)
}

/// A disk that is only read, which both hosts have.
fn readable(lab: &Lab, name: &str) -> Result<()> {
    fs::create_dir_all(lab.share().join("guests"))?;
    Ok(File::create(lab.share().join("guests").join(name))?.set_len(4 * MIB)?)
}

const DIMM: &str = "<memory model='dimm'><target><size unit='MiB'>128</size><node>0</node></target></memory>";

/// Memory allocated at once; NUMA cells, a DIMM from the start and one plugged in later, several vCPUs, i440FX, and one of each virtio device.
#[test]
fn memory_in_pieces_and_many_devices() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let one = lab.host(1);
        readable(lab, "read.img")?;
        // More than the cells have: some of it is in the DIMM.
        let guest = usual("pieces").filled(180).vcpus(2).cells(2).room_mib(512);
        let guest = guest
            .device(DIMM)
            .device("<controller type='scsi' model='virtio-scsi'/>")
            .device(
                "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
                 <source file='/lab/guests/read.img'/><target dev='sda' bus='scsi'/><readonly/></disk>",
            )
            .device(
                "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
                 <source file='/lab/guests/read.img'/><target dev='vda' bus='virtio'/><readonly/></disk>",
            )
            .device("<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>")
            .device("<console type='pty'><target type='virtio'/></console>")
            .device("<graphics type='vnc' autoport='yes'/>")
            .device("<video><model type='vga'/></video>");
        let scene = Scene::start(lab, one, guest, 1)?;
        ensure!(
            resident(one, "pieces", "dimm0")? > 16 * MIB,
            "the guest does not use its DIMM"
        );
        fs::write(one.path("/run/dimm.xml"), DIMM)?;
        one.virsh(&["attach-device", "pieces", "/run/dimm.xml", "--live"])?;
        there_and_back(lab, &scene, 4, 512)?;
        one.remove("pieces")?;

        // Memory that is all there from the start, holes or not.
        let scene = Scene::start(lab, one, usual("whole").immediate(), 1)?;
        ensure!(
            resident(one, "whole", "pc.ram")? == 256 * MIB,
            "the memory is not all there"
        );
        there_and_back(lab, &scene, 1, 256)
    })
}

/// UEFI from flash memory, ICH9, and a virtio-mem device that grows and shrinks between the moves.
#[test]
fn uefi_and_memory_by_request() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let guest = Guest::linux("flash")
            .machine(Machine::Q35)
            .uefi()
            .memory_mib(256)
            .working_set(16)
            .filled(48)
            .rate(Rate::mib(8))
            .cells(1)
            .room_mib(512)
            .free_page_reporting()
            .device(
                "<memory model='virtio-mem'><target><size unit='MiB'>256</size><node>0</node>\
                 <block unit='MiB'>2</block><requested unit='MiB'>128</requested></target></memory>",
            );
        let scene = Scene::start(lab, one, guest, 1)?;
        let has = |host: &Host, mib: u64| {
            wait_until("virtio-mem to be of its size", PATIENCE, || {
                let xml = host.virsh(&["dumpxml", "flash"])?;
                Ok(xml.contains(&format!("<current unit='KiB'>{}</current>", mib * 1024)))
            })
        };
        let resize = |host: &Host, mib: u64| {
            let size = format!("{mib}MiB");
            let wanted = [
                "update-memory-device",
                "flash",
                "--live",
                "--requested-size",
                &size,
            ];
            host.virsh(&wanted)?;
            has(host, mib)
        };
        has(one, 128)?;
        there_and_back(lab, &scene, 2, 512)?;
        has(one, 128)?;
        resize(one, 192)?;
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(2)?;
        has(two, 192)?;
        resize(two, 64)?;
        scene.move_to(two, one, &[])?;
        two.assert_moved_away(2)?;
        has(one, 64)
    })
}
