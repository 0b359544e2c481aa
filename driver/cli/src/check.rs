//! Is this host ready, and are its guests eligible? The engine judges what only it can; the rest is in plain sight.

use anyhow::{ensure, Context, Result};
use ferry_contract::control::Verdict;
use std::fmt;
use std::path::Path;
use std::process::Command;
use virt::connect::Connect;

const PLUGIN: &str = "libvirt_driver_ferry.so";
const DAEMONS: [&str; 2] = ["libvirtd", "virtqemud"];

/// What was found out about one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// As it should be.
    Yes(String),
    /// Not so: why, and what to do.
    No(String),
    /// Neither: nothing runs that could be looked at.
    Open(String),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Yes(text) => write!(f, "yes  {text}"),
            Finding::No(text) => write!(f, "no   {text}"),
            Finding::Open(text) => write!(f, "-    {text}"),
        }
    }
}

/// What guests need of this host.
pub fn host() -> Vec<Finding> {
    vec![configuration(), plugin(), kernel(), memory(), hook(), journals()]
}

fn configuration() -> Finding {
    let path = ferry_contract::config::PATH;
    match ferry_host::config() {
        Ok(config) if config.enabled => Finding::Yes(format!("the configuration, {path}, lets guests move")),
        Ok(_) => Finding::No(format!(
            "{path} says enabled = false: all migrations are libvirt's own"
        )),
        Err(error) => Finding::No(error),
    }
}

fn plugin() -> Finding {
    let mut running = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        // Its helpers are forked from it and have its name for a moment, but not for long.
        if DAEMONS.contains(&name.trim()) {
            let maps = std::fs::read_to_string(entry.path().join("maps")).unwrap_or_default();
            running.push((loaded(&maps), name.trim().to_owned()));
        }
    }
    // Where both daemons run, the one that has got furthest counts.
    match running.iter().max() {
        Some((Loaded::Current, daemon)) => Finding::Yes(format!("{daemon} has loaded {PLUGIN}")),
        Some((Loaded::Replaced, daemon)) => Finding::No(format!(
            "{daemon} has loaded a {PLUGIN} that has been replaced since: systemctl restart {daemon}, when no migration is \
             under way"
        )),
        Some((Loaded::No, daemon)) => Finding::No(format!(
            "{daemon} has not loaded {PLUGIN}: restart it once virt-ferry is installed (systemctl restart {daemon})"
        )),
        None => Finding::No("neither libvirtd nor virtqemud runs: start it".into()),
    }
}

/// What a daemon has of the plug-in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Loaded {
    No,
    /// One whose file is not there any more: an upgrade has put another in its place, or it was uninstalled.
    Replaced,
    Current,
}

/// From its /proc/PID/maps (proc_pid_maps(5)).
fn loaded(maps: &str) -> Loaded {
    let mut files = maps.lines().filter_map(|line| Some(line.split_once(PLUGIN)?.1));
    files.next().map_or(Loaded::No, |rest| match rest {
        "" => Loaded::Current,
        _ => Loaded::Replaced,
    })
}

fn kernel() -> Finding {
    match ask(None) {
        Ok(Verdict::Eligible { .. }) => Finding::Yes("the kernel can track what guests write".into()),
        Ok(Verdict::NotEligible { reason }) => Finding::No(reason),
        Err(error) => Finding::No(format!("{error:#}")),
    }
}

fn memory() -> Finding {
    let directory = ferry_host::memory_directory();
    let shown = directory.display();
    match ferry_host::tmpfs(&directory) {
        Some(room) => Finding::Yes(format!(
            "guests' memory files, {shown}, are on a tmpfs with {} free",
            size(room.free)
        )),
        None => Finding::No(format!(
            "guests' memory files, {shown}, are not on a tmpfs: systemctl enable --now var-lib-libvirt-qemu-ram.mount, or \
             set memory_backing_dir in qemu.conf, before guests are started"
        )),
    }
}

fn hook() -> Finding {
    match ferry_host::hook() {
        Ok(()) => Finding::Yes(format!(
            "{} keeps guests from being started while they are between two hosts",
            ferry_host::HOOK
        )),
        Err(why) => Finding::No(why),
    }
}

fn journals() -> Finding {
    match ferry_host::state_directory() {
        Ok(directory) if ferry_host::tmpfs(&directory).is_some() => Finding::No(format!(
            "the journals of guests that move while they are shut off, {}, are on a tmpfs, which no crash of the host leaves: set \
             state_directory in {} to a directory on a disk",
            directory.display(),
            ferry_contract::config::PATH
        )),
        Ok(directory) => Finding::Yes(format!(
            "the journals of guests that move while they are shut off, {}, are on no tmpfs",
            directory.display()
        )),
        Err(why) => Finding::No(why),
    }
}

/// Reaches libvirt; where systemd holds its socket, that starts the daemon.
///
/// # Errors
/// If libvirt cannot be asked.
pub fn connect(uri: &str) -> Result<Connect> {
    Connect::open(Some(uri)).with_context(|| format!("cannot ask libvirt at {uri}"))
}

/// Looks at guests, or all of them where none is named.
///
/// # Errors
/// If libvirt knows no guest of that name, or says no more.
pub fn guests(libvirt: &Connect, names: &[String]) -> Result<Vec<(String, Finding)>> {
    let domains = match names {
        [] => libvirt.list_all_domains(0).context("cannot list the guests")?,
        names => names
            .iter()
            .map(|name| {
                libvirt
                    .lookup_domain_by_name(name)
                    .with_context(|| format!("guest {name}"))
            })
            .collect::<Result<_>>()?,
    };
    let mut found = Vec::new();
    for domain in &domains {
        let name = domain.name().context("a guest's name")?;
        let finding = guest(domain.id(), &name)?;
        found.push((name, finding));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

fn guest(id: Option<u32>, name: &str) -> Result<Finding> {
    let Some(id) = id else {
        return Ok(Finding::Open("does not run".into()));
    };
    let Some(monitor) = ferry_host::monitor(id, name) else {
        return Ok(Finding::No(
            "its QEMU was started without the plug-in's monitor: migrate it once, or define it anew, shut it off and start it \
             (see virt-ferry(1))"
                .into(),
        ));
    };
    Ok(match ask(Some(&monitor))? {
        Verdict::Eligible { bytes, resident } => {
            Finding::Yes(format!("{} of memory, {} in use", size(bytes), size(resident)))
        }
        Verdict::NotEligible { reason } => Finding::No(reason),
    })
}

/// The engine's verdict about a guest, or about this kernel.
fn ask(monitor: Option<&Path>) -> Result<Verdict> {
    // Where the configuration cannot be read, that is told elsewhere.
    let engine = ferry_host::config().unwrap_or_default().engine;
    let output = Command::new(&engine)
        .arg("check")
        .args(monitor)
        .output()
        .with_context(|| {
            format!(
                "cannot start the engine, {}: is virt-ferry installed?",
                engine.display()
            )
        })?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", engine.display(), said.trim());
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{} is of another release", engine.display()))
}

/// Bytes for a person.
pub fn size(bytes: u64) -> String {
    match bytes {
        large if large >= 10 << 30 => format!("{} GiB", large >> 30),
        large if large >= 1 << 30 => format!("{:.1} GiB", large as f64 / (1u64 << 30) as f64),
        small => format!("{} MiB", small >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(size(300 << 20), "300 MiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(64 << 30), "64 GiB");
    }

    #[test]
    fn a_plugin_that_has_been_replaced_is_not_the_one_that_is_there() {
        let line =
            "7f0a4c000000-7f0a4c100000 r-xp 00000000 fe:00 77  /usr/lib/virt-ferry/libvirt_driver_ferry.so";
        let other = "7f0a4d000000-7f0a4d100000 r-xp 00000000 fe:00 78  /usr/lib/libvirt.so.0\n";
        assert_eq!(loaded(&format!("{other}{line}\n{other}")), Loaded::Current);
        assert_eq!(loaded(&format!("{other}{line} (deleted)\n")), Loaded::Replaced);
        assert_eq!(loaded(other), Loaded::No);
        assert!(Loaded::Current > Loaded::Replaced && Loaded::Replaced > Loaded::No);
    }

    #[test]
    fn a_guest_that_does_not_run_is_neither() {
        assert_eq!(guest(None, "g").unwrap(), Finding::Open("does not run".into()));
        assert!(
            matches!(guest(Some(4_000_000), "no-such-guest").unwrap(), Finding::No(why) if why.contains("monitor"))
        );
    }
}
