//! Joining a guest's cgroups.
//!
//! Memory is charged to whoever touches it first. The engine that fills an arriving guest's RAM must be in that
//! guest's cgroups, or the host's limits and NUMA bindings (cpuset) for the guest would not apply to its memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::process::Process;

/// Puts this process into each cgroup that `process` is in: the v1 hierarchies and v2. Best effort: returns the
/// directories that were joined, and logs those that could not be.
///
/// The process then also is subject to what befalls the guest's cgroup: when its systemd scope is stopped, so is it.
pub fn join_cgroups_of(process: &Process) -> Vec<PathBuf> {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let pid = process.pid();
    let (groups, mounts) = match (
        process.read("cgroup", "read the cgroups"),
        fs::read("/proc/self/mountinfo"),
    ) {
        (Ok(groups), Ok(mounts)) => (text(groups), text(mounts)),
        (Err(error), _) => {
            tracing::warn!(pid, %error, "memory will not be charged to the guest");
            return Vec::new();
        }
        (_, Err(error)) => {
            tracing::warn!(pid, %error, "cannot read /proc/self/mountinfo; memory will not be charged to the guest");
            return Vec::new();
        }
    };
    let mounts: Vec<Mount> = mounts.lines().filter_map(Mount::parse).collect();
    let directories = groups
        .lines()
        .filter_map(Group::parse)
        .filter_map(|group| group.directory(&mounts));
    let mut joined: Vec<PathBuf> = Vec::new();
    for directory in directories {
        if joined.contains(&directory) {
            continue;
        }
        match join(&directory) {
            Ok(()) => joined.push(directory),
            Err(error) => {
                tracing::warn!(pid, directory = %directory.display(), %error, "cannot join the guest's cgroup")
            }
        }
    }
    joined
}

/// Writes our number to `cgroup.procs`. libvirt makes a v2 guest's groups threaded; such a group is entered by way of
/// the threaded domain it belongs to.
fn join(directory: &Path) -> io::Result<()> {
    let own = std::process::id().to_string();
    let enter = |directory: &Path| fs::write(directory.join("cgroup.procs"), &own);
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

    #[test]
    fn joins_where_this_process_is_already() {
        let own = Process::open(std::process::id() as i32).expect("this process");
        for directory in join_cgroups_of(&own) {
            let members = fs::read_to_string(directory.join("cgroup.procs")).expect("a cgroup's members");
            assert!(
                members.lines().any(|pid| pid == own.pid().to_string()),
                "{}",
                directory.display()
            );
        }
    }
}
