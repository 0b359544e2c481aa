//! Whoever touches memory first is charged for it: an arriving guest's memory must be charged to that guest, whose limits
//! and NUMA binding would not hold for it otherwise, and not to the daemon, whose child the engine is. But the engine must
//! not end with the guest's group, for the source waits for its word.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Error, Result};
use ferry_tests::fault::Disturbed::PreCopy;
use ferry_tests::fault::{engine, names};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::phases::{Phases, LIVE, PROTECTED};
use ferry_tests::scene::{usual, Scene, PATIENCE};
use ferry_tests::skipped;
use ferry_tests::wait::wait_until;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

/// Where this machine has its controller of memory; cgroup v1.
const MEMORY: &str = "/sys/fs/cgroup/memory";
/// libvirt's own part of it, where no systemd is in charge (libvirt 11.3, `virCgroupNewMachineManual`).
const MACHINES: &str = "/sys/fs/cgroup/memory/machine";

/// Cgroups outlive the lab's processes: what its guests leave there is taken away.
struct Leftovers(String);

impl Drop for Leftovers {
    fn drop(&mut self) {
        for entry in Path::new(MACHINES).read_dir().into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(&self.0) {
                let _ = std::fs::remove_dir(entry.path());
            }
        }
        // Not empty where somebody else's guests run.
        let _ = std::fs::remove_dir(MACHINES);
    }
}

/// Lets this host's libvirt put guests into cgroups: it looks for them as it starts.
fn give_cgroups_to(host: &Host) -> Result<()> {
    let mount = format!(
        "mount -t tmpfs tmpfs /sys/fs/cgroup && mkdir {MEMORY} && mount -t cgroup -o memory cgroup {MEMORY}"
    );
    host.run(&["sh", "-c", &mount])?;
    host.restart_libvirtd(false)
}

/// The memory cgroup of a guest's QEMU.
fn group(host: &Host, guest: &str) -> Result<PathBuf> {
    let qemu = host.qemu(guest)?;
    let groups = std::fs::read_to_string(qemu.proc().join("cgroup"))?;
    let memory = groups
        .lines()
        .find_map(|line| line.split_once(":memory:/"))
        .with_context(|| format!("in no memory cgroup: {groups}"))?;
    Ok(Path::new(MEMORY).join(memory.1))
}

/// Who is in a cgroup.
fn members(group: &Path) -> Result<Vec<u32>> {
    let members = std::fs::read_to_string(group.join("cgroup.procs"))?;
    members.lines().map(|pid| Ok(pid.parse()?)).collect()
}

/// What systemd does to a guest's scope at libvirt's bidding (`virCgroupTerminateMachine`).
fn end_all_in(group: &Path) -> Result<()> {
    for member in members(group)? {
        kill(Pid::from_raw(member.try_into()?), Signal::SIGTERM)?;
    }
    Ok(())
}

/// A guest on host1, of two whose second one puts guests into cgroups.
fn with_cgroups(name: &str, test: impl FnOnce(&Lab, &Scene) -> Result<()>) -> Result<()> {
    if !Path::new(MEMORY).join("memory.stat").exists() {
        skipped("this machine has no cgroup v1 memory controller");
        return Ok(());
    }
    let guest = format!("{name}{}", std::process::id());
    let _leftovers = Leftovers(guest.clone());
    Lab::with(
        Options::default().qemu_conf("cgroup_controllers = [ \"memory\" ]"),
        |lab| {
            give_cgroups_to(lab.host(2))?;
            test(lab, &Scene::start(lab, lab.host(1), usual(&guest), 1)?)
        },
    )
}

#[test]
fn an_arriving_guests_memory_is_charged_to_it() -> Result<()> {
    with_cgroups("charged", |lab, scene| {
        let (one, two) = (lab.host(1), lab.host(2));
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)?;
        let group = group(two, scene.name())?;
        ensure!(
            group.starts_with(MACHINES),
            "{} is not the guest's own",
            group.display()
        );
        let stat = std::fs::read_to_string(group.join("memory.stat"))?;
        let charged = stat.lines().find_map(|line| line.strip_prefix("shmem "));
        let charged: u64 = charged.context("no shmem in memory.stat")?.parse()?;
        let resident = two.ram_file(scene.name())?.resident()?;
        // The kernel charges in batches; what the guest itself has touched since is among it either way.
        ensure!(
            charged >= resident / 10 * 9,
            "of {resident} bytes of memory, only {charged} are charged to the guest"
        );
        two.remove(scene.name())
    })
}

#[test]
fn who_ends_the_guests_group_does_not_end_who_must_tell() -> Result<()> {
    with_cgroups("ended", |lab, scene| {
        let (one, two) = (lab.host(1), lab.host(2));
        // While memory arrives, the engine is in the group.
        let slow = Slow::to(lab, two, 80)?;
        let mut underway = one.begin_migration(scene.name(), two, &[])?;
        underway.reaches(PreCopy)?;
        let filled = group(two, scene.name())?;
        ensure!(
            members(&filled)?.contains(&engine(two)?.pid),
            "the engine fills memory outside of {}",
            filled.display()
        );
        end_all_in(&filled)?;
        names(&underway.fails()?, &["QEMU", "host2"])?;
        drop(slow);
        scene.lives_on(one)?;

        // Once it has all arrived, it is not.
        let mut client = Phases::new(scene, one, two, LIVE | PROTECTED)?;
        let (xml, cookie) = client.begin()?;
        let (cookie, uri) = client.prepare(&xml, &cookie)?.map_err(Error::msg)?;
        let cookie = client.perform(&uri, &cookie)?.map_err(Error::msg)?;
        let (group, engine) = (group(two, scene.name())?, engine(two)?);
        wait_until("the engine to leave the guest's group", PATIENCE, || {
            Ok(!members(&group)?.contains(&engine.pid))
        })?;
        end_all_in(&group)?;
        let said = client.finish(Some(&cookie), false)?;
        let said = said.err().context("a guest that was ended has been resumed")?;
        ensure!(said.contains("QEMU") && said.contains("host2"), "{said}");
        client.confirm(None, true)?.map_err(Error::msg)?;
        scene.lives_on(one)
    })
}
