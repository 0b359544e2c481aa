//! Membership in a guest's cgroups, for as long as its memory is filled.
//!
//! Memory is charged to whoever touches it first. The engine that fills an arriving guest's RAM must be in that
//! guest's cgroups, or the host's limits and NUMA bindings (cpuset) for the guest would not apply to its memory.
//!
//! But what befalls the guest's group befalls who is in it: where systemd is in charge, libvirt ends a guest by its
//! scope, of which every process then gets SIGTERM (libvirt 11.3, `virCgroupTerminateMachine`), and elsewhere a group
//! that is not empty cannot be removed. So the engine goes back to where it was once the memory is there; what it has
//! filled stays charged to the guest.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::process::{Process, ProcessError};

/// How long after it has left a process may still be sent what was meant for the group: whoever ends one reads its
/// members first and signals them then, and may have to wait for a CPU in between.
const READ_BEFORE: Duration = Duration::from_secs(10);

/// This process in a guest's cgroups; it leaves them when this is dropped.
#[derive(Debug)]
pub struct Membership(Mutex<Groups>);

#[derive(Debug)]
struct Groups {
    /// The directory of each group that was joined, and of the one in the same hierarchy that was left for it.
    joined: Vec<(PathBuf, Option<PathBuf>)>,
    /// When the last of them was left.
    left: Option<Instant>,
}

impl Membership {
    /// Puts this process into each cgroup that `process` is in: the v1 hierarchies and v2. Best effort: those that
    /// could not be joined are logged.
    pub fn join(process: &Process) -> Self {
        let pid = process.pid();
        let mut joined = Vec::new();
        match changes(process) {
            Ok(changes) => {
                for (theirs, ours) in changes {
                    match enter(&theirs) {
                        Ok(()) => joined.push((theirs, ours)),
                        Err(error) => {
                            tracing::warn!(pid, directory = %theirs.display(), %error, "cannot join the guest's cgroup")
                        }
                    }
                }
            }
            Err(error) => tracing::warn!(pid, %error, "memory will not be charged to the guest"),
        }
        Self(Mutex::new(Groups { joined, left: None }))
    }

    /// Goes back to where this process was; returns once it is there, also where another thread is at it. Says whether
    /// a signal that comes now may be the group's: this process was in it within the last 10 s. Takes some 10 ms: the
    /// kernel waits for a grace period (Linux 6.18, `cgroup_threadgroup_rwsem`).
    pub fn leave(&self) -> bool {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let any = !groups.joined.is_empty();
        for (theirs, ours) in groups.joined.drain(..) {
            // A group that has lost its last process may have been removed: the nearest above it that takes us.
            let above = ours.iter().flat_map(|ours| ours.ancestors());
            match above.map(enter).find(Result::is_ok) {
                Some(_) => tracing::debug!(directory = %theirs.display(), "left the guest's cgroup"),
                None => {
                    tracing::warn!(directory = %theirs.display(), "cannot leave the guest's cgroup, and ends with it")
                }
            }
        }
        if any {
            groups.left = Some(Instant::now());
        }
        groups.left.is_some_and(|left| left.elapsed() < READ_BEFORE)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The directories of the groups that `process` is in and this process is not, each with ours in its hierarchy.
fn changes(process: &Process) -> Result<Vec<(PathBuf, Option<PathBuf>)>, ProcessError> {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let own = Process::open(std::process::id() as i32)?;
    let mounts = text(own.read("mountinfo", "read the mounts")?);
    let mounts: Vec<Mount> = mounts.lines().filter_map(Mount::parse).collect();
    let groups = text(process.read("cgroup", "read the cgroups")?);
    let ours = text(own.read("cgroup", "read the cgroups")?);
    let ours: Vec<Group> = ours.lines().filter_map(Group::parse).collect();
    let mut changes: Vec<(PathBuf, Option<PathBuf>)> = Vec::new();
    for group in groups.lines().filter_map(Group::parse) {
        let Some(directory) = group.directory(&mounts) else {
            continue;
        };
        let same = ours.iter().find(|own| own.controllers == group.controllers);
        let left = same.and_then(|own| own.directory(&mounts));
        if left.as_ref() != Some(&directory) && !changes.iter().any(|(known, _)| *known == directory) {
            changes.push((directory, left));
        }
    }
    Ok(changes)
}

/// Writes our number to `cgroup.procs`. libvirt makes a v2 guest's groups threaded; such a group is entered by way of
/// the threaded domain it belongs to.
fn enter(directory: &Path) -> io::Result<()> {
    let own = std::process::id().to_string();
    let enter = |directory: &Path| {
        let mut members = OpenOptions::new()
            .write(true)
            .open(directory.join("cgroup.procs"))?;
        members.write_all(own.as_bytes())
    };
    let is_threaded = |directory: &Path| {
        fs::read_to_string(directory.join("cgroup.type")).is_ok_and(|kind| kind.trim_end() == "threaded")
    };
    if is_threaded(directory) {
        let domain = directory
            .ancestors()
            .skip(1)
            .find(|ancestor| !is_threaded(ancestor));
        enter(domain.unwrap_or(directory))?;
    }
    enter(directory)
}

/// A mounted cgroup file system, a line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq)]
struct Mount {
    /// What part of the hierarchy is mounted.
    root: PathBuf,
    /// Where.
    point: PathBuf,
    /// Super block options, which name a v1 hierarchy's controllers; `None` for v2.
    controllers: Option<Vec<String>>,
}

impl Mount {
    fn parse(line: &str) -> Option<Mount> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (unescape(mount.next()?), unescape(mount.next()?));
        let mut file_system = file_system.split(' ');
        let controllers = match file_system.next()? {
            "cgroup2" => None,
            "cgroup" => Some(file_system.nth(1)?.split(',').map(str::to_owned).collect()),
            _ => return None,
        };
        Some(Mount {
            root,
            point,
            controllers,
        })
    }
}

/// mountinfo writes space, tab, newline and backslash as octal.
fn unescape(field: &str) -> PathBuf {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |field, (escaped, plain)| {
            field.replace(escaped, plain)
        })
        .into()
}

/// Membership of a process in one hierarchy, a line of `/proc/PID/cgroup` such as `4:memory:/machine/guest`.
#[derive(Debug, PartialEq)]
struct Group<'a> {
    /// Comma-separated; empty for v2.
    controllers: &'a str,
    path: &'a Path,
}

impl Group<'_> {
    fn parse(line: &str) -> Option<Group<'_>> {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, Path::new(fields.next()?));
        // "/.." is a group outside of our cgroup namespace: no way to name it.
        (path.is_absolute() && !path.starts_with("/..")).then_some(Group { controllers, path })
    }

    /// Where the group is in our file system, if anywhere.
    fn directory(&self, mounts: &[Mount]) -> Option<PathBuf> {
        mounts.iter().find_map(|mount| {
            let same = match &mount.controllers {
                None => self.controllers.is_empty(),
                // "name=systemd" is one word in both.
                Some(options) => {
                    !self.controllers.is_empty()
                        && self
                            .controllers
                            .split(',')
                            .all(|wanted| options.iter().any(|option| option == wanted))
                }
            };
            let below = same.then(|| self.path.strip_prefix(&mount.root).ok()).flatten()?;
            Some(mount.point.join(below))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_directories_of_both_versions() {
        let mounts: Vec<_> = [
            "30 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            "31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:1 - cgroup cgroup rw,cpu,cpuacct",
            "32 25 0:28 /docker/x /sys/fs/cgroup/my\\040memory rw - cgroup cgroup rw,memory",
            "33 25 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd",
            "34 25 0:30 / /tmp rw - tmpfs tmpfs rw",
        ]
        .iter()
        .filter_map(|line| Mount::parse(line))
        .collect();
        assert_eq!(mounts.len(), 4);
        let directory = |line| Group::parse(line).and_then(|group| group.directory(&mounts));
        let is = |line, path: &str| assert_eq!(directory(line), Some(PathBuf::from(path)), "{line}");
        is("0::/machine/guest:1", "/sys/fs/cgroup/unified/machine/guest:1");
        is("4:cpu,cpuacct:/machine", "/sys/fs/cgroup/cpu,cpuacct/machine");
        is("5:memory:/docker/x/guest", "/sys/fs/cgroup/my memory/guest");
        is("6:name=systemd:/a", "/sys/fs/cgroup/systemd/a");
        for unreachable in ["5:memory:/elsewhere", "0::/../x", "7:pids:/a", "nonsense", ""] {
            assert_eq!(directory(unreachable), None, "{unreachable:?}");
        }
    }

    /// A process in a cgroup of its own.
    struct Guest {
        child: std::process::Child,
        group: PathBuf,
    }

    impl Guest {
        /// `None` where there is no hierarchy to make a group in.
        fn start() -> Option<Self> {
            let group = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"]
                .map(|hierarchy| Path::new(hierarchy).join(format!("virt-ferry-{}", std::process::id())))
                .into_iter()
                .find(|group| fs::create_dir(group).is_ok_and(|()| group.join("cgroup.procs").exists()))?;
            let mut sleep = std::process::Command::new("sleep");
            let child = sleep.arg("600").spawn().expect("a process");
            fs::write(group.join("cgroup.procs"), child.id().to_string()).expect("its group");
            Some(Self { child, group })
        }

        fn members(&self) -> Vec<u32> {
            let members = fs::read_to_string(self.group.join("cgroup.procs")).expect("a cgroup's members");
            members.lines().filter_map(|pid| pid.parse().ok()).collect()
        }
    }

    impl Drop for Guest {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = fs::remove_dir(&self.group);
        }
    }

    #[test]
    fn a_process_is_a_member_until_it_leaves() {
        let Some(guest) = Guest::start() else {
            println!("SKIPPED: no cgroup can be made here");
            return;
        };
        let own = || fs::read_to_string("/proc/self/cgroup").expect("own cgroups");
        let (before, this, other) = (own(), std::process::id(), guest.child.id());
        let process = Process::open(other as i32).expect("the process");
        let membership = Membership::join(&process);
        assert_eq!(
            {
                let mut members = guest.members();
                members.sort_unstable();
                members
            },
            {
                let mut both = [this, other];
                both.sort_unstable();
                both
            }
        );
        assert!(membership.leave());
        assert_eq!((guest.members(), own()), (vec![other], before.clone()));
        drop(Membership::join(&process));
        assert_eq!((guest.members(), own()), (vec![other], before));
    }

    #[test]
    fn what_is_sent_to_a_group_may_come_after_it_was_left() {
        let of = |joined| Membership(Mutex::new(Groups { joined, left: None }));
        assert!(!of(vec![]).leave(), "it was in none");
        // With nothing to go back to, its leaving is only noted.
        let membership = of(vec![(PathBuf::from("/nowhere"), None)]);
        assert!(membership.leave(), "it was in one");
        assert!(membership.leave(), "its members may have been read before");
        let longer_ago = Instant::now().checked_sub(READ_BEFORE);
        membership.0.lock().expect("its groups").left = Some(longer_ago.expect("an earlier time"));
        assert!(!membership.leave(), "whoever ended the group is done");
    }

    #[test]
    fn whoever_shares_our_groups_is_joined_already() {
        let own = Process::open(std::process::id() as i32).expect("this process");
        assert_eq!(changes(&own).expect("own cgroups"), []);
    }
}
