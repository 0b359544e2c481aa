//! Live migration through the engine, end to end: libvirtd, QEMU and a guest that checks its own memory.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{ensure, Context, Result};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{said, usual, Scene};

/// What the source's engine says of a migration it completed.
const THROUGH_US: &str = "timeline kept";

/// A hook of libvirt's that writes down what it was started with.
const HOOK: &str = "#!/bin/sh\ncat /proc/self/maps /proc/self/environ >>/run/hook-saw\n";

#[test]
fn managed_there_and_back() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        for host in [one, two] {
            let hook = host.path("/etc/libvirt/hooks/qemu.d/saw");
            fs::write(&hook, HOOK)?;
            fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
        }
        let scene = Scene::start(lab, one, usual("managed"), 1)?;
        scene.lives_on(one)?;
        stays_in_the_daemon(one, "managed")?;
        scene.move_to(one, two, &[])?;
        stays_in_the_daemon(two, "managed")?;
        scene.move_to(two, one, &[])?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;
        ensure!(said(one, THROUGH_US) == 2, "the engine did not move the guest");
        Ok(())
    })
}

#[test]
fn peer_to_peer_there_and_back() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("p2p"), 1)?;
        scene.move_to(one, two, &["--p2p"])?;
        scene.move_to(two, one, &["--p2p"])?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;
        ensure!(said(one, THROUGH_US) == 2, "the engine did not move the guest");
        Ok(())
    })
}

/// The plug-in is loaded by the daemon, and neither by the QEMU it started nor by its hooks.
fn stays_in_the_daemon(host: &Host, guest: &str) -> Result<()> {
    const PLUGIN: &str = "libvirt_driver_ferry";
    let seen = |what: &std::path::Path| -> Result<String> {
        let bytes = fs::read(what).with_context(|| what.display().to_string())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let daemon = host.processes_named("libvirtd")?.pop().context("no libvirtd")?;
    ensure!(
        seen(&daemon.proc().join("maps"))?.contains(PLUGIN),
        "the daemon has not loaded it"
    );
    let qemu = host.qemu(guest)?.proc();
    for (who, what) in [
        ("QEMU", qemu.join("maps")),
        ("QEMU", qemu.join("environ")),
        ("a hook", host.path("/run/hook-saw")),
    ] {
        let seen = seen(&what)?;
        ensure!(
            seen.contains("/libc.so") || seen.contains("PATH="),
            "nothing is seen of {who}"
        );
        ensure!(
            !seen.contains(PLUGIN) && !seen.contains("LD_PRELOAD"),
            "{who} of {} has the plug-in, or is to load it:\n{seen}",
            host.name()
        );
    }
    Ok(())
}
