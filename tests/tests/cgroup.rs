//! Whoever touches memory first is charged for it: an arriving guest's memory must be charged to that guest, whose limits
//! and NUMA binding would not hold for it otherwise, and not to the daemon, whose child the engine is.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{usual, Scene};
use ferry_tests::skipped;

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

#[test]
fn an_arriving_guests_memory_is_charged_to_it() -> Result<()> {
    if !Path::new(MEMORY).join("memory.stat").exists() {
        skipped("this machine has no cgroup v1 memory controller");
        return Ok(());
    }
    let guest = format!("charged{}", std::process::id());
    let _leftovers = Leftovers(guest.clone());
    Lab::with(
        Options::default().qemu_conf("cgroup_controllers = [ \"memory\" ]"),
        |lab| {
            let (one, two) = (lab.host(1), lab.host(2));
            give_cgroups_to(two)?;
            let scene = Scene::start(lab, one, usual(&guest), 1)?;
            scene.move_to(one, two, &[])?;
            one.assert_moved_away(1)?;
            let group = group(two, &guest)?;
            ensure!(
                group.starts_with(MACHINES),
                "{} is not the guest's own",
                group.display()
            );
            let stat = std::fs::read_to_string(group.join("memory.stat"))?;
            let charged = stat.lines().find_map(|line| line.strip_prefix("shmem "));
            let charged: u64 = charged.context("no shmem in memory.stat")?.parse()?;
            let resident = two.ram_file(&guest)?.resident()?;
            // The kernel charges in batches; what the guest itself has touched since is among it either way.
            ensure!(
                charged >= resident / 10 * 9,
                "of {resident} bytes of memory, only {charged} are charged to the guest"
            );
            two.remove(&guest)
        },
    )
}
