//! What virt-ferry does not take goes libvirt's own way, exactly as without it, and a log line says why.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::process::Child;

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::Backing;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options, Plugin};
use ferry_tests::scene::{said, usual, Scene, PATIENCE};
use ferry_tests::wait::wait_until;

/// What the plug-in's log line has in it, whatever the reason.
const OWN_WAY: &str = "libvirt's own migration";

/// One move that is not virt-ferry's, and the words in the source's log that say why.
fn moves_natively(scene: &Scene, from: &Host, to: &Host, options: &[&str], why: &str) -> Result<()> {
    let before = (said(from, OWN_WAY), said(from, why));
    scene.move_to(from, to, options)?;
    ensure!(
        said(from, OWN_WAY) > before.0 && said(from, why) > before.1,
        "{}'s log does not say '{OWN_WAY}: … {why}' of migrate {}",
        from.name(),
        options.join(" ")
    );
    Ok(())
}

fn nothing_of_ours(lab: &Lab) -> Result<()> {
    for number in [1, 2] {
        lab.host(number).assert_moved_away(0)?;
        lab.assert_clean(number)?;
    }
    Ok(())
}

/// The guest starts on host1 and goes there and back, managed and peer-to-peer; only `with` has the plug-in.
fn one_sided(plugin: Plugin, with: usize) -> Result<()> {
    Lab::with(Options::default().plugin(plugin), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("one-sided"), 1)?;
        for (options, why) in [
            (&[][..], "the destination did not answer"),
            (&["--p2p"], "the destination has no plug-in"),
        ] {
            for (from, to) in [(one, two), (two, one)] {
                if from.name() == lab.host(with).name() {
                    moves_natively(&scene, from, to, options, why)?;
                } else {
                    scene.move_to(from, to, options)?;
                }
            }
        }
        nothing_of_ours(lab)
    })
}

#[test]
fn plugin_on_the_source_only() -> Result<()> {
    one_sided(Plugin::Source, 1)
}

#[test]
fn plugin_on_the_destination_only() -> Result<()> {
    one_sided(Plugin::Destination, 2)
}

#[test]
fn guests_whose_memory_is_no_shared_file() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let kinds = [
            ("memfd", Backing::Memfd),
            ("anonymous", Backing::Anonymous),
            ("private", Backing::PrivateFile),
        ];
        for (number, (name, backing)) in (1..).zip(kinds) {
            let scene = Scene::start(lab, one, usual(name).backing(backing), number)?;
            let why = "pc.ram";
            moves_natively(&scene, one, two, &[], why).context(name)?;
            moves_natively(&scene, two, one, &["--p2p"], why).context(name)?;
            one.remove(name)?;
        }
        nothing_of_ours(lab)
    })
}

/// Devices and memory that somebody else writes, or that QEMU does not leave out: all that stands in the way is named.
#[test]
fn guests_with_memory_of_another_kind() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        for host in [one, two] {
            let file = host.path("/var/lib/libvirt/images/nvdimm.img");
            fs::create_dir_all(file.parent().context("a directory")?)?;
            File::create(&file)?.set_len(128 << 20)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?;
        }
        let guest = usual("strange").cells(1).room_mib(512);
        let guest = guest
            .device(
                "<shmem name='strange' role='master'><model type='ivshmem-plain'/>\
                 <size unit='M'>1</size></shmem>",
            )
            .device(
                "<memory model='nvdimm' access='shared'><source>\
                 <path>/var/lib/libvirt/images/nvdimm.img</path></source>\
                 <target><size unit='MiB'>128</size><node>0</node></target></memory>",
            );
        let scene = Scene::start(lab, one, guest, 1)?;
        moves_natively(&scene, one, two, &[], "ivshmem")?;
        moves_natively(&scene, two, one, &["--p2p"], "nvdimm")?;
        one.remove("strange")?;

        // Its disk is another process.
        let disk = "/run/libvirt/vhost.sock";
        let export = format!("vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={disk}");
        let mut served = Vec::new();
        for host in [one, two] {
            let mut server = host.command("qemu-storage-daemon");
            server.args([
                "--blockdev",
                "null-co,node-name=n,size=4194304",
                "--export",
                &export,
            ]);
            served.push(Served(server.spawn().context("qemu-storage-daemon")?));
            wait_until("the disk to be served", PATIENCE, || Ok(host.path(disk).exists()))?;
            host.run(&["chmod", "666", disk])?;
        }
        let guest = usual("served").device(&format!(
            "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>\
             <source type='unix' path='{disk}'/><target dev='vda' bus='virtio'/></disk>"
        ));
        let scene = Scene::start(lab, one, guest, 1)?;
        moves_natively(&scene, one, two, &[], "vhost-user-blk")?;
        nothing_of_ours(lab)
    })
}

/// Ended with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        // What it started in the host ends with the lab.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn options_that_are_not_taken() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("options"), 1)?;
        // Not --postcopy: QEMU's own needs vm.unprivileged_userfaultfd, which is off where it runs as libvirt's user.
        let cases: [(&[&str], &str); 4] = [
            (&["--p2p", "--tunnelled"], "tunnelled"),
            (&["--parallel", "--compressed", "--comp-methods", "zlib"], "zlib"),
            (&["--p2p", "--compressed", "--comp-methods", "xbzrle"], "xbzrle"),
            (&["--rdma-pin-all"], "rdma-pin-all"),
        ];
        let mut places = [(one, two), (two, one)].into_iter().cycle();
        for (options, why) in cases {
            let (from, to) = places.next().context("cycle")?;
            moves_natively(&scene, from, to, options, why)?;
        }
        nothing_of_ours(lab)?;

        // None of it has left anything that keeps virt-ferry from the next move.
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)
    })
}
