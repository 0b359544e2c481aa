//! The lab keeps its promises: hosts are apart, links can be cut, what is left over is noticed, and whatever ends
//! a lab ends all of it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{ensure, Result};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options, Plugin};
use ferry_tests::wait::wait_until;

const GUEST: &str = "
<domain type='qemu'>
  <name>idle</name>
  <memory unit='MiB'>64</memory>
  <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><memballoon model='none'/></devices>
</domain>";

fn plain() -> Options {
    Options::default().plugin(Plugin::None)
}

fn ping(from: &Host, address: &str) -> Result<bool> {
    Ok(from
        .exec(&["ping", "-c", "1", "-W", "1", address])?
        .status
        .success())
}

#[test]
fn hosts_are_apart_but_for_their_link_and_the_share() -> Result<()> {
    Lab::with(plain().hosts(3), |lab| {
        let (one, three) = (lab.host(1), lab.host(3));
        ensure!(one.run(&["hostname"])? == "host1" && three.run(&["hostname"])? == "host3");
        ensure!(ping(one, "host3")? && ping(lab.switch(), &three.address())?);

        one.create(GUEST)?;
        ensure!(one.running()? == ["idle"] && three.running()?.is_empty());
        ensure!(three.processes_named("qemu-system-x86_64")?.is_empty());

        one.run(&[
            "touch",
            "/etc/private",
            "/var/lib/libvirt/images/private",
            "/lab/shared",
        ])?;
        for private in ["/etc/private", "/var/lib/libvirt/images/private"] {
            ensure!(
                !three.path(private).exists() && !Path::new(private).exists(),
                "{private} is not private"
            );
        }
        ensure!(three.path("/lab/shared").exists() && lab.share().join("shared").exists());
        Ok(())
    })
}

#[test]
fn qemu_has_no_privileges_unless_asked_for() -> Result<()> {
    for (options, user) in [(plain(), "libvirt-qemu"), (plain().qemu_user("root"), "root")] {
        Lab::with(options, |lab| {
            let host = lab.host(1);
            host.create(GUEST)?;
            let status = fs::read_to_string(host.qemu("idle")?.proc().join("status"))?;
            let uid = host.run(&["id", "-u", user])?;
            ensure!(
                status.contains(&format!("\nUid:\t{uid}\t")),
                "QEMU does not run as {user}: {status}"
            );
            ensure!(status.contains("\nSeccomp:\t2\n"), "no seccomp sandbox: {status}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_link_can_be_cut_and_shaped() -> Result<()> {
    Lab::with(plain(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        lab.switch().run(&["ip", "link", "set", "host2", "down"])?;
        ensure!(
            !ping(one, "host2")?,
            "the link is cut, and yet there is an answer"
        );
        lab.switch().run(&["ip", "link", "set", "host2", "up"])?;
        wait_until("the link to be back", Duration::from_secs(20), || {
            ping(one, "host2")
        })?;

        two.run(&["iptables", "-A", "INPUT", "-s", &one.address(), "-j", "DROP"])?;
        ensure!(!ping(one, "host2")?, "a dropped packet was answered");
        two.run(&["iptables", "-F", "INPUT"])?;

        let shaper = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf"];
        one.run(
            &[
                &shaper[..],
                &["rate", "100mbit", "burst", "64k", "latency", "50ms"],
            ]
            .concat(),
        )?;
        ensure!(one.run(&["tc", "qdisc", "show", "dev", "eth0"])?.contains("tbf"));
        ensure!(ping(one, "host2")?);
        Ok(())
    })
}

#[test]
fn memory_files_have_the_room_they_are_given() -> Result<()> {
    Lab::with(plain().ram_size("32m"), |lab| {
        let host = lab.host(1);
        let file = host.path("/var/lib/libvirt/qemu/ram/filler");
        let error = fs::write(&file, vec![1; 33 << 20]).expect_err("33 MiB fit into 32 MiB");
        ensure!(error.raw_os_error() == Some(libc::ENOSPC), "{error}");
        Ok(fs::remove_file(file)?)
    })
}

#[test]
fn what_a_migration_leaves_is_noticed() -> Result<()> {
    Lab::with(plain(), |lab| {
        let host = lab.host(1);
        let guest = host.create(GUEST)?;
        lab.assert_clean(1)?;

        let engine = host.path("/usr/lib/virt-ferry/virt-ferry-engine");
        fs::copy("/bin/sleep", &engine)?;
        fs::set_permissions(&engine, fs::Permissions::from_mode(0o755))?;
        let mut engine = host
            .command("/usr/lib/virt-ferry/virt-ferry-engine")
            .arg("infinity")
            .spawn()?;
        fs::create_dir_all(host.path("/run/libvirt/virt-ferry"))?;
        fs::write(host.path("/run/libvirt/virt-ferry/session"), "")?;
        fs::create_dir(host.path("/var/lib/libvirt/qemu/ram/9-gone"))?;
        host.qmp(
            &guest,
            r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"x-ignore-shared","state":true}]}}"#,
        )?;

        let error = lab
            .assert_clean(1)
            .expect_err("leftovers were not noticed")
            .to_string();
        for leftover in [
            "engine process",
            "/run/libvirt/virt-ferry/session",
            "ram/9-gone",
            "x-ignore-shared",
        ] {
            ensure!(error.contains(leftover), "{leftover} was not noticed: {error}");
        }
        engine.kill()?;
        engine.wait()?;
        Ok(())
    })
}

#[test]
fn two_labs_live_side_by_side() -> Result<()> {
    Lab::with(plain(), |first| {
        Lab::with(plain(), |second| {
            first.host(1).create(GUEST)?;
            ensure!(second.host(1).running()?.is_empty());
            Ok(())
        })?;
        ensure!(
            first.host(1).running()? == ["idle"],
            "the second lab took a guest of the first with it"
        );
        Ok(())
    })
}

/// All processes that live in the lab, by their PID namespaces.
fn all_gone(processes: &[u32]) -> bool {
    processes.iter().all(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.is_empty() || status.contains("State:\tZ")
    })
}

fn everything_ends(end: impl FnOnce(&mut Lab)) -> Result<()> {
    let mut lab = plain().up()?;
    lab.host(1).create(GUEST)?;
    let mut processes = Vec::new();
    for host in lab.hosts().iter().chain([lab.switch()]) {
        processes.extend(host.processes()?.into_iter().map(|process| process.pid));
    }
    // Two inits, two libvirtds, one QEMU, the lab's init.
    ensure!(processes.len() >= 6, "only {} processes", processes.len());
    end(&mut lab);
    wait_until("all processes of the lab to end", Duration::from_secs(20), || {
        Ok(all_gone(&processes))
    })?;
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    ensure!(
        !mounts.contains(&*lab.share().to_string_lossy()),
        "a mount is left: {mounts}"
    );
    Ok(())
}

#[test]
fn killing_its_init_ends_a_lab() -> Result<()> {
    everything_ends(|lab| {
        let pid = i32::try_from(lab.switch().init()).expect("a process number");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).expect("kill");
    })
}

/// Ctrl-C goes to all of the terminal's foreground processes, here a group of their own, while the lab comes up.
#[test]
fn ctrl_c_ends_all_of_a_lab() -> Result<()> {
    let name = format!("ctrl-c-{}", std::process::id());
    let directory = Path::new("/var/lib/virt-ferry-lab").join(&name);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab");
    let mut holder = Command::new("bash")
        .args(["-c", "sleep infinity | \"$0\" up --while-stdin --plugin none"])
        .arg(&script)
        .env("FERRY_LAB", &name)
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()?;
    let group = i32::try_from(holder.id())?;
    let up = wait_until("the lab to be up", Duration::from_secs(90), || {
        let inits = ["host1.init", "host2.init"].map(|init| directory.join(init));
        Ok(inits
            .iter()
            .all(|init| init.metadata().is_ok_and(|found| found.len() > 0)))
    });
    let inits = ["init", "host1.init", "host2.init"].map(|init| fs::read_to_string(directory.join(init)));
    nix::sys::signal::killpg(nix::unistd::Pid::from_raw(group), nix::sys::signal::SIGINT)?;
    holder.wait()?;
    up?;
    // The kernel ends whatever lives below an init with it.
    let inits: Vec<u32> = inits
        .into_iter()
        .map(|init| {
            let init = init?;
            Ok(init.split_whitespace().next().unwrap_or_default().parse()?)
        })
        .collect::<Result<_>>()?;
    wait_until("all of the lab to end", Duration::from_secs(20), || {
        Ok(all_gone(&inits))
    })?;
    Ok(fs::remove_dir_all(&directory)?)
}

#[test]
fn a_lab_ends_with_the_process_that_holds_it() -> Result<()> {
    everything_ends(Lab::let_go)
}
