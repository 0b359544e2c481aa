//! Guests that leave the choice of their memory to the host get some that virt-ferry can move; whoever has chosen keeps it.

use std::fs;

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::Backing;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{address, said, usual, Scene};

const SHARED: &str = "<source type='file'/>";

fn definition(host: &Host, domain: &str, options: &[&str]) -> Result<String> {
    host.virsh(&[&["dumpxml", domain], options].concat())
}

#[test]
fn a_guest_without_a_choice_is_eligible() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("unsaid").backing(Backing::Unsaid), 1)?;
        ensure!(
            definition(one, "unsaid", &[])?.contains(SHARED),
            "the guest's memory is not chosen"
        );
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)?;

        // An operator's own definition of it says no more than the guest's did.
        let given = definition(two, "unsaid", &["--migratable"])?;
        let (before, backing) = given.split_once("<memoryBacking>").context("no memoryBacking")?;
        let (_, after) = backing
            .split_once("</memoryBacking>")
            .context("no memoryBacking")?;
        fs::write(lab.share().join("own.xml"), [before, after].concat())?;
        let own = ["--xml", "/lab/own.xml"];
        scene.move_to(two, one, &own)?;
        scene.move_to(one, two, &[&own[..], &["--p2p"]].concat())?;
        one.assert_moved_away(2)?;
        let native = ["--p2p", "--compressed", "--comp-methods", "xbzrle"];
        scene.move_to(two, one, &[&own[..], &native].concat())?;
        for parameters in [&[][..], &["--image-format", "raw"]] {
            let save = ["save", "unsaid", "/lab/unsaid.save"];
            one.virsh(&[&save[..], &own, parameters].concat())?;
            one.virsh(&["restore", "/lab/unsaid.save"])?;
            scene.lives_on(one)?;
        }
        // Where such memory is on a disk, somebody is told.
        two.run(&["umount", "/var/lib/libvirt/qemu/ram"])?;
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(2)?;
        ensure!(
            said(two, "which is on a disk here") == 1 && said(one, "which is on a disk here") == 0,
            "nobody is told that the guest's memory is on a disk"
        );

        // Defined as well as created, and kept as it is where somebody has chosen.
        for (name, backing, given) in [
            ("defined", Backing::Unsaid, true),
            ("chosen", Backing::Anonymous, false),
        ] {
            let guest = usual(name).backing(backing).network("labbr0", address(2));
            guest.install(&lab.share().join("guests"))?;
            one.define(&guest.xml())?;
            ensure!(
                definition(one, name, &["--inactive"])?.contains(SHARED) == given,
                "{name}: {}",
                definition(one, name, &["--inactive"])?
            );
        }
        one.configure("guest_memory = \"as-defined\"\n")?;
        let guest = usual("left")
            .backing(Backing::Unsaid)
            .network("labbr0", address(2));
        one.define(&guest.xml())?;
        ensure!(
            !definition(one, "left", &["--inactive"])?.contains("memoryBacking"),
            "guest_memory = \"as-defined\" does not keep it so"
        );
        // As one that was defined before virt-ferry was installed: README's command.
        one.configure("")?;
        let anew = "virsh dumpxml --inactive --security-info left | virsh define /dev/stdin";
        one.run(&["sh", "-c", anew])?;
        ensure!(
            definition(one, "left", &["--inactive"])?.contains(SHARED),
            "a guest that is defined anew keeps its anonymous memory"
        );
        Ok(())
    })
}

/// A guest that started before virt-ferry cared for it needs one move of libvirt's own, not a restart.
#[test]
fn a_native_arrival_makes_it_eligible() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        one.configure("guest_memory = \"as-defined\"\n")?;
        let scene = Scene::start(lab, one, usual("elder").backing(Backing::Unsaid), 1)?;
        ensure!(
            !definition(one, "elder", &[])?.contains("memoryBacking"),
            "it is not anonymous"
        );
        scene.move_to(one, two, &["--p2p"])?;
        one.assert_moved_away(0)?;
        ensure!(
            definition(two, "elder", &[])?.contains(SHARED),
            "host2 has not chosen its memory"
        );
        scene.move_to(two, one, &[])?;
        two.assert_moved_away(1)?;
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

#[test]
fn no_guest_is_given_more_than_there_is() -> Result<()> {
    Lab::with(Options::default().ram_size("128m"), |lab| {
        let one = lab.host(1);
        let scene = Scene::start(lab, one, usual("large").backing(Backing::Unsaid), 1)?;
        ensure!(
            !definition(one, scene.name(), &[])?.contains("memoryBacking"),
            "256 MiB are to fit into a tmpfs of 128 MiB"
        );
        ensure!(said(one, "has room for") == 1, "host1's log does not say why");
        scene.lives_on(one)
    })
}

/// What README.md warns of: libvirt takes the definition as it is, and asks nobody where the file will be.
#[test]
fn without_the_tmpfs_memory_is_a_file_on_a_disk() -> Result<()> {
    const MEMORY: &str = "/var/lib/libvirt/qemu/ram";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        two.run(&["umount", MEMORY])?;
        let scene = Scene::start(lab, one, usual("given").backing(Backing::Unsaid), 1)?;
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(0)?;
        let file = two.run(&["sh", "-c", &format!("ls {MEMORY}/*-given/pc.ram")])?;
        let kind = two.run(&["findmnt", "-n", "-o", "FSTYPE", "-T", file.trim()])?;
        ensure!(kind.trim() != "tmpfs", "{file}: {kind}");
        let output = two.exec(&["virt-ferry", "check"])?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(said.contains("are not on a tmpfs"), "{said}");
        Ok(())
    })
}
