//! `virt-ferry check` says beforehand which way a guest would go, and what to do about it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{ensure, Result};
use ferry_tests::guest::Backing;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{usual, Scene};
use ferry_tests::wait::wait_until;

/// How long the daemon may take to come or go.
const LIMIT: Duration = Duration::from_secs(60);

/// What it says of all guests, or this one, and its exit status.
fn check(host: &Host, guests: &[&str]) -> Result<(String, Option<i32>)> {
    let output = host.exec(&[&["virt-ferry", "check"], guests].concat())?;
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    Ok((said.into_owned(), output.status.code()))
}

#[test]
fn each_guest_is_judged_as_its_migration_would_be() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("able"), 1)?;
        let (said, status) = check(one, &[])?;
        ensure!(
            status == Some(0) && said.contains("able  yes  256 MiB"),
            "{status:?}: {said}"
        );
        ensure!(said.matches("yes").count() == 7, "host1 is not ready: {said}");

        let unable = Scene::start(lab, one, usual("unable").backing(Backing::Anonymous), 2)?;
        let (said, status) = check(one, &[])?;
        ensure!(
            status == Some(1) && said.contains("unable  no   ") && said.contains("<source type='file'/>"),
            "{status:?}: {said}"
        );
        let (said, status) = check(one, &["able"])?;
        ensure!(
            status == Some(0) && !said.contains("unable"),
            "{status:?}: {said}"
        );
        let (said, status) = check(one, &["nobody"])?;
        ensure!(status == Some(2) && said.contains("nobody"), "{status:?}: {said}");

        // Its word holds, and looking has left nothing.
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)?;
        unable.move_to(one, two, &[])?;
        one.assert_moved_away(1)?;

        // What it needs is missed where it is missing: the hook, a disk for journals, the plug-in that is installed.
        let hook = one.path("/etc/libvirt/hooks/qemu.d/virt-ferry");
        fs::set_permissions(&hook, Permissions::from_mode(0o644))?;
        one.configure("state_directory = \"/run/virt-ferry\"\n")?;
        let plugin = "/usr/lib/virt-ferry/libvirt_driver_ferry.so";
        one.run(&["cp", plugin, &format!("{plugin}.new")])?;
        one.run(&["mv", &format!("{plugin}.new"), plugin])?;
        let (said, status) = check(one, &[])?;
        let missed = ["qemu.d/virt-ferry", "/run/virt-ferry", "has been replaced since"];
        ensure!(
            status == Some(1)
                && missed.iter().all(|what| said
                    .lines()
                    .any(|line| line.starts_with("  no ") && line.contains(what))),
            "{status:?}: {said}"
        );
        fs::set_permissions(&hook, Permissions::from_mode(0o755))?;
        one.configure("")?;
        one.restart_libvirtd(false)?;
        let (said, status) = check(one, &[])?;
        ensure!(
            status == Some(0) && said.matches("yes").count() == 6,
            "{status:?}: {said}"
        );

        // A daemon that has ended as it was idle is no fault: asking starts it, as systemd holds its socket.
        one.run(&["sh", "-c", "kill -KILL $(cat /run/libvirtd.pid)"])?;
        wait_until("libvirtd to end", LIMIT, || {
            Ok(one.processes_named("libvirtd")?.is_empty())
        })?;
        let activate = "exec systemd-socket-activate -E LD_PRELOAD=$0 --fdname=libvirtd.socket -l /run/libvirt/libvirt-sock libvirtd \
                        2>>/var/log/libvirt/libvirtd.log";
        let mut daemon = one.command("sh").args(["-c", activate, plugin]).spawn()?;
        wait_until("the socket", LIMIT, || {
            Ok(one
                .libvirtd_log()
                .contains("Listening on /run/libvirt/libvirt-sock"))
        })?;
        let (said, status) = check(one, &[])?;
        ensure!(
            status == Some(0) && said.contains("libvirtd has loaded"),
            "{status:?}: {said}"
        );
        one.restart_libvirtd(true)?;
        daemon.wait()?;

        one.configure("enabled = false\n")?;
        let (said, status) = check(one, &[])?;
        ensure!(
            status == Some(1) && said.contains("enabled = false"),
            "{status:?}: {said}"
        );
        // A guest with nothing to recover, mistyped or not, is named.
        let said = one.run(&["virt-ferry", "recover", "tpyo"])?;
        ensure!(said.contains("no migration of guest tpyo is open"), "{said}");
        for program in ["virt-ferry", "/usr/lib/virt-ferry/virt-ferry-engine"] {
            let said = one.run(&[program, "--version"])?;
            let name = program.rsplit('/').next().unwrap_or(program);
            ensure!(said.starts_with(&format!("{name} ")), "{said}");
        }
        lab.assert_clean(1)
    })
}
