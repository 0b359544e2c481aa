//! One host of the lab, seen from the test: run commands there, look after guests, read logs and processes.
//!
//! Files and processes are read from outside, through `/proc` of the host's init; commands go through `nsenter`.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};

use crate::guest::ram::RamFile;
use crate::wait::{wait_for, wait_until};

/// A command in a host that takes longer than this hangs.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// A host of the lab, or its switch.
pub struct Host {
    name: String,
    number: usize,
    /// The init of the host's namespaces, its number outside.
    init: u32,
    /// The lab's directory.
    lab: PathBuf,
    /// What was mounted when the lab came up.
    mounts: BTreeSet<String>,
}

/// A process of a host.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its number outside the lab.
    pub pid: u32,
    /// Its executable, as the host names it.
    pub executable: PathBuf,
    /// Its arguments, the command first.
    pub arguments: Vec<String>,
}

impl Process {
    /// Its directory in /proc.
    pub fn proc(&self) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string())
    }
}

impl Host {
    pub(crate) fn new(name: &str, number: usize, init: u32, lab: &Path) -> Self {
        Host {
            name: name.to_owned(),
            number,
            init,
            lab: lab.to_owned(),
            mounts: mounts(init),
        }
    }

    /// The init of the host's namespaces, its number outside. The host ends with it.
    pub fn init(&self) -> u32 {
        self.init
    }

    /// `host1`, `host2`, … or `switch`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address, which the other hosts and all guests reach.
    pub fn address(&self) -> String {
        match self.number {
            0 => "192.168.77.1".to_owned(),
            number => format!("192.168.77.1{number}"),
        }
    }

    /// The libvirt URI by which other hosts reach this one's libvirtd.
    pub fn uri(&self) -> String {
        format!("qemu+tcp://{}/system", self.name)
    }

    /// Where to find the host's file `path` from outside.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        let root = Path::new("/proc").join(self.init.to_string()).join("root");
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// What has been mounted since the lab came up, in words.
    ///
    /// # Errors
    /// If the host is gone.
    pub fn new_mounts(&self) -> Result<Vec<String>> {
        let now = mounts(self.init);
        ensure!(!now.is_empty(), "{} is gone", self.name);
        // What is below the share, a test has put there.
        let new = now
            .difference(&self.mounts)
            .filter(|place| !place.starts_with("/lab/"));
        Ok(new
            .map(|place| format!("something is mounted at {place}"))
            .collect())
    }

    /// The directory of its logs, outside: libvirtd.log, qemu/, virt-ferry/.
    pub fn logs(&self) -> PathBuf {
        self.lab.join("share").join(&self.name)
    }

    /// A command to be run in the host; it is not bounded in time.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args([
                "--target",
                &self.init.to_string(),
                "--mount",
                "--uts",
                "--ipc",
                "--net",
                "--pid",
                "--",
            ])
            .arg(program)
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .stdin(Stdio::null());
        command
    }

    /// Runs a command in the host, for a minute at most.
    ///
    /// # Errors
    /// If it cannot be started. How it ended is in the result.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        self.command("timeout")
            .args(["--kill-after=5", &COMMAND_LIMIT.as_secs().to_string()])
            .args(command)
            .output()
            .with_context(|| format!("{}: cannot run {}", self.name, command.join(" ")))
    }

    /// Runs a command in the host that must succeed, and returns what it printed, trimmed.
    ///
    /// # Errors
    /// What the command said on standard error, or that it took longer than a minute.
    pub fn run(&self, command: &[&str]) -> Result<String> {
        let output = self.exec(command)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{}: {} failed ({}): {}",
            self.name,
            command.join(" "),
            output.status,
            said.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Runs `virsh` on the host's own libvirtd; as [`Host::run`].
    ///
    /// # Errors
    /// As [`Host::run`].
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        self.run(&[&["virsh", "--connect", "qemu:///system"], arguments].concat())
    }

    /// Starts a transient guest from its XML and returns its name.
    ///
    /// # Errors
    /// What virsh said.
    pub fn create(&self, xml: &str) -> Result<String> {
        let file = self.xml_file(xml)?;
        self.virsh(&["create", &file])?;
        domain_name(xml)
    }

    /// Defines a persistent guest from its XML and returns its name.
    ///
    /// # Errors
    /// What virsh said.
    pub fn define(&self, xml: &str) -> Result<String> {
        let file = self.xml_file(xml)?;
        self.virsh(&["define", &file])?;
        domain_name(xml)
    }

    /// Bytes that have come on connections to this port and that nobody has read yet.
    ///
    /// # Errors
    /// What ss said.
    pub fn unread(&self, port: u16) -> Result<u64> {
        let shown = self.run(&[
            "ss",
            "-Htn",
            "state",
            "established",
            "sport",
            "=",
            &format!(":{port}"),
        ])?;
        let queues = shown
            .lines()
            .map(|line| line.split_whitespace().next().unwrap_or_default());
        queues
            .map(|bytes| bytes.parse::<u64>().with_context(|| shown.clone()))
            .sum()
    }

    /// The guest's state and its reason as `virsh domstate --reason` puts it, e.g. `running (migrated)`;
    /// None where the host does not know the guest.
    ///
    /// # Errors
    /// Any answer but that.
    pub fn state(&self, domain: &str) -> Result<Option<String>> {
        let output = self.exec(&[
            "virsh",
            "--connect",
            "qemu:///system",
            "domstate",
            domain,
            "--reason",
        ])?;
        if output.status.success() {
            return Ok(Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()));
        }
        let said = String::from_utf8_lossy(&output.stderr);
        // The second where it goes between virsh's two questions.
        if said.contains("failed to get domain") || said.contains("Domain not found") {
            return Ok(None);
        }
        bail!("{}: domstate {domain}: {}", self.name, said.trim());
    }

    /// Waits until the guest's state starts with `state`, e.g. `running`.
    ///
    /// # Errors
    /// When it does not come to that within 20 seconds.
    pub fn wait_for_state(&self, domain: &str, state: &str) -> Result<()> {
        wait_until(
            &format!("{domain} to be {state} on {}", self.name),
            Duration::from_secs(20),
            || Ok(self.state(domain)?.is_some_and(|now| now.starts_with(state))),
        )
    }

    /// Migrates a guest to another host, live: `virsh migrate --live`, with more options after it.
    ///
    /// # Errors
    /// What virsh said.
    pub fn migrate(&self, domain: &str, to: &Host, options: &[&str]) -> Result<String> {
        self.virsh(&[&["migrate", "--live", domain, &to.uri()], options].concat())
    }

    /// Defines a running guest, so that it outlives its end.
    ///
    /// # Errors
    /// What virsh said.
    pub fn make_persistent(&self, domain: &str) -> Result<()> {
        let xml = self.virsh(&["dumpxml", "--inactive", "--security-info", domain])?;
        let file = self.xml_file(&xml)?;
        self.virsh(&["define", &file])?;
        Ok(())
    }

    /// Whether the guest is defined here.
    ///
    /// # Errors
    /// What virsh said, also where it does not know the guest.
    pub fn is_persistent(&self, domain: &str) -> Result<bool> {
        let information = self.virsh(&["dominfo", domain])?;
        Ok(information
            .lines()
            .any(|line| line.split_whitespace().eq(["Persistent:", "yes"])))
    }

    /// Sends a QMP command to a guest's QEMU and returns the answer.
    ///
    /// # Errors
    /// What virsh said, or that the answer is not JSON.
    pub fn qmp(&self, domain: &str, command: &str) -> Result<serde_json::Value> {
        let answer = self.virsh(&["qemu-monitor-command", domain, command])?;
        serde_json::from_str(&answer).with_context(|| format!("{}: QMP answer {answer}", self.name))
    }

    /// Ends the guest, if it runs here, and forgets its definition.
    ///
    /// # Errors
    /// If it is still there afterwards.
    pub fn remove(&self, domain: &str) -> Result<()> {
        // Either may be impossible; what counts is that the guest is gone in the end.
        let _ = self.virsh(&["destroy", domain]);
        let _ = self.virsh(&["undefine", domain, "--nvram"]);
        ensure!(
            self.state(domain)?.is_none(),
            "{}: {domain} cannot be removed",
            self.name
        );
        Ok(())
    }

    /// Names of the guests that run here.
    ///
    /// # Errors
    /// What virsh said.
    pub fn running(&self) -> Result<Vec<String>> {
        Ok(self
            .virsh(&["list", "--name"])?
            .split_whitespace()
            .map(str::to_owned)
            .collect())
    }

    /// libvirtd's log, its standard error included.
    pub fn libvirtd_log(&self) -> String {
        read_log(&self.logs().join("libvirtd.log"))
    }

    /// The log libvirt keeps for a guest's QEMU.
    pub fn qemu_log(&self, domain: &str) -> String {
        read_log(&self.logs().join("qemu").join(format!("{domain}.log")))
    }

    /// All the host's processes.
    ///
    /// # Errors
    /// If /proc cannot be read; processes that end meanwhile are left out.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let ours = namespace(&self.init.to_string()).with_context(|| format!("{} is gone", self.name))?;
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").context("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
                continue;
            };
            let pid_text = pid.to_string();
            if namespace(&pid_text).as_ref() != Some(&ours) {
                continue;
            }
            let Ok(executable) = fs::read_link(format!("/proc/{pid}/exe")) else {
                continue;
            };
            let Ok(arguments) = fs::read(format!("/proc/{pid}/cmdline")) else {
                continue;
            };
            let arguments = String::from_utf8_lossy(&arguments)
                .split_terminator('\0')
                .map(str::to_owned)
                .collect();
            found.push(Process {
                pid,
                executable,
                arguments,
            });
        }
        Ok(found)
    }

    /// The processes whose executable's file name is `name`.
    ///
    /// # Errors
    /// As [`Host::processes`].
    pub fn processes_named(&self, name: &str) -> Result<Vec<Process>> {
        let mut processes = self.processes()?;
        processes.retain(|process| process.executable.file_name().is_some_and(|file| file == name));
        Ok(processes)
    }

    /// The QEMU process of a guest, waited for.
    ///
    /// # Errors
    /// When there is none within 20 seconds.
    pub fn qemu(&self, domain: &str) -> Result<Process> {
        let guest = format!("guest={domain},");
        wait_for(
            &format!("the QEMU of {domain} on {}", self.name),
            Duration::from_secs(20),
            || {
                Ok(self.processes()?.into_iter().find(|process| {
                    process
                        .arguments
                        .iter()
                        .any(|argument| argument.starts_with(&guest))
                }))
            },
        )
    }

    /// The memory of a guest that runs here.
    ///
    /// # Errors
    /// If it has no memory file.
    pub fn ram_file(&self, domain: &str) -> Result<RamFile> {
        let directory = self.path("/var/lib/libvirt/qemu/ram");
        // libvirt names each guest's directory <id>-<name>.
        let ending = format!("-{domain}");
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().ends_with(&ending) {
                return RamFile::open(entry.path().join("pc.ram"));
            }
        }
        bail!("{}: {domain} has no memory file", self.name)
    }

    /// An empty disk image of this size, for QEMU to use.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn image(&self, path: &str, mib: u64) -> Result<()> {
        let file = self.path(path);
        fs::create_dir_all(file.parent().context("a directory")?)?;
        File::create(&file)?.set_len(mib << 20)?;
        Ok(fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?)
    }

    /// Ends libvirtd (`kill`: by SIGKILL, else by SIGTERM), starts it anew and waits until it answers.
    ///
    /// # Errors
    /// What `tests/lab restart-libvirtd` said.
    pub fn restart_libvirtd(&self, kill: bool) -> Result<()> {
        let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("lab"))
            .env("FERRY_LAB_DIR", &self.lab)
            .args(["restart-libvirtd", &self.name])
            .args(kill.then_some("--kill"))
            .output()
            .context("tests/lab")?;
        ensure!(
            output.status.success(),
            "restart-libvirtd: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    /// From now on libvirtd ends itself after a second without a client and without a running guest, as its unit has it do
    /// after two minutes (`--timeout 120`).
    ///
    /// # Errors
    /// What virt-admin said.
    pub fn libvirtd_ends_when_idle(&self) -> Result<()> {
        self.run(&["virt-admin", "daemon-timeout", "1"]).map(drop)
    }

    /// Nobody calls libvirtd for some times as long as that, and it still answers: one that ends itself first closes its
    /// sockets, and waits half a minute for its workers.
    ///
    /// # Errors
    /// If it does not.
    pub fn libvirtd_stays(&self) -> Result<()> {
        std::thread::sleep(Duration::from_secs(4));
        let answered = self.virsh(&["list"]);
        answered.context("libvirtd has ended itself, with work left to do")?;
        Ok(())
    }

    /// libvirtd ends itself: nothing of ours keeps it. It is started anew.
    ///
    /// # Errors
    /// If it does not.
    pub fn libvirtd_has_ended(&self) -> Result<()> {
        wait_for("libvirtd to end itself", Duration::from_secs(60), || {
            Ok(self.processes_named("libvirtd")?.is_empty().then_some(()))
        })?;
        self.restart_libvirtd(true)
    }

    /// Puts XML where the host can read it.
    fn xml_file(&self, xml: &str) -> Result<String> {
        let file = format!("/run/{}.xml", domain_name(xml)?);
        fs::write(self.path(&file), xml).with_context(|| format!("{}: {file}", self.name))?;
        Ok(file)
    }
}

/// Where anything is mounted, as the process of this number sees it.
fn mounts(process: u32) -> BTreeSet<String> {
    let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    let places = table.lines().filter_map(|line| line.split(' ').nth(4));
    places.map(str::to_owned).collect()
}

fn domain_name(xml: &str) -> Result<String> {
    xml.split_once("<name>")
        .and_then(|(_, rest)| rest.split_once("</name>"))
        .map(|(name, _)| name.to_owned())
        .context("the guest's XML has no <name>")
}

/// A log as text; one that does not exist is empty.
fn read_log(path: &Path) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}
