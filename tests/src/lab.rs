//! A lab for a test: brought up by the script `tests/lab`, gone when dropped.
//!
//! The lab lives only as long as a pipe of this process is open (`tests/lab up --while-stdin`), so the kernel
//! ends it even when the test is killed. If a test panics or returns an error through [`Lab::with`], the hosts'
//! logs stay behind in `target/test-logs/<test>/`, or in `$FERRY_TEST_LOGS` where that is set.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{ensure, Context, Result};

use crate::guest::beat::Listener;
use crate::host::Host;

/// The hosts whose libvirtd is given virt-ferry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Plugin {
    /// No host: libvirt as its makers ship it.
    None,
    /// host1 only.
    Source,
    /// host2 only.
    Destination,
    /// All hosts.
    #[default]
    Both,
}

impl Plugin {
    fn as_str(self) -> &'static str {
        match self {
            Plugin::None => "none",
            Plugin::Source => "source",
            Plugin::Destination => "destination",
            Plugin::Both => "both",
        }
    }
}

/// What a lab is to be like. The default: two hosts with virt-ferry, QEMU without privileges.
#[derive(Clone, Debug, Default)]
pub struct Options {
    plugin: Plugin,
    arguments: Vec<String>,
}

impl Options {
    /// Which hosts get virt-ferry.
    #[must_use]
    pub fn plugin(mut self, plugin: Plugin) -> Self {
        self.plugin = plugin;
        self
    }

    /// How many hosts: 2 to 9.
    #[must_use]
    pub fn hosts(self, number: usize) -> Self {
        self.argument("--hosts", &number.to_string())
    }

    /// Room for the guests' memory files on each host, in tmpfs's words: `64m`, `8g`.
    #[must_use]
    pub fn ram_size(self, size: &str) -> Self {
        self.argument("--ram-size", size)
    }

    /// Huge pages of that tmpfs: `always`, `within_size`, `advise` or `never`.
    #[must_use]
    pub fn ram_huge(self, policy: &str) -> Self {
        self.argument("--ram-huge", policy)
    }

    /// QEMU runs as this user instead of `libvirt-qemu`.
    #[must_use]
    pub fn qemu_user(self, user: &str) -> Self {
        self.argument("--qemu-user", user)
    }

    /// A line for every host's qemu.conf; it wins over the lab's own.
    #[must_use]
    pub fn qemu_conf(self, line: &str) -> Self {
        self.argument("--qemu-conf", line)
    }

    /// A line for every host's libvirtd.conf; it wins over the lab's own.
    #[must_use]
    pub fn libvirtd_conf(self, line: &str) -> Self {
        self.argument("--libvirtd-conf", line)
    }

    /// A variable in every libvirtd's environment, thus also the plug-in's and its engine's.
    #[must_use]
    pub fn libvirtd_env(self, variable: &str, value: &str) -> Self {
        self.argument("--libvirtd-env", &format!("{variable}={value}"))
    }

    /// libvirtd's `log_filters`, for instance `1:qemu.qemu_migration`.
    #[must_use]
    pub fn log_filters(self, filters: &str) -> Self {
        self.argument("--log-filters", filters)
    }

    /// Brings the lab up.
    ///
    /// # Errors
    /// What `tests/lab up` said, the end of the logs included.
    pub fn up(self) -> Result<Lab> {
        Lab::up(self)
    }

    fn argument(mut self, option: &str, value: &str) -> Self {
        self.arguments.extend([option.to_owned(), value.to_owned()]);
        self
    }
}

/// Several libvirt hosts, the first of them `host(1)`, and the switch between them.
pub struct Lab {
    name: String,
    directory: PathBuf,
    hosts: Vec<Host>,
    switch: Host,
    witness: OnceLock<Listener>,
    /// Held while that is made.
    listening: Mutex<()>,
    /// The lab lives while this is open.
    alive: Option<ChildStdin>,
}

impl Lab {
    /// Brings up a lab; all of its hosts answer when this returns.
    ///
    /// # Errors
    /// What `tests/lab up` said, the end of the logs included.
    pub fn up(options: Options) -> Result<Self> {
        let name = next_name();
        let mut child = script(&name)
            .args(["up", "--while-stdin", "--plugin", options.plugin.as_str()])
            .args(&options.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start tests/lab")?;
        // Taken first: waiting for a child closes its standard input.
        let alive = child.stdin.take();
        let output = child.wait_with_output().context("tests/lab up")?;
        check(&output).context("tests/lab up")?;

        let directory = Path::new(LABS).join(&name);
        let mut hosts = Vec::new();
        for number in 1.. {
            let host_name = format!("host{number}");
            let init = directory.join(format!("{host_name}.init"));
            if !init.exists() {
                break;
            }
            hosts.push(Host::new(&host_name, number, read_number(&init)?, &directory));
        }
        let switch = Host::new("switch", 0, read_number(&directory.join("init"))?, &directory);
        Ok(Lab {
            name,
            directory,
            hosts,
            switch,
            witness: OnceLock::new(),
            listening: Mutex::new(()),
            alive,
        })
    }

    /// Brings up a lab and runs `test` in it; when that fails, keeps the logs.
    ///
    /// # Errors
    /// Those of [`Lab::up`] and of `test`.
    pub fn with<T>(options: Options, test: impl FnOnce(&Lab) -> Result<T>) -> Result<T> {
        let lab = Lab::up(options)?;
        let result = test(&lab);
        if result.is_err() {
            lab.save_logs();
        }
        result
    }

    /// Host `number`, counted from 1: the source of most tests is 1, the destination 2.
    ///
    /// # Panics
    /// If the lab has no such host.
    pub fn host(&self, number: usize) -> &Host {
        &self.hosts[number.checked_sub(1).expect("hosts are counted from 1")]
    }

    /// All hosts, host1 first.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The place where the hosts' links meet: for pinging guests from outside, and for shaping or cutting links.
    pub fn switch(&self) -> &Host {
        &self.switch
    }

    /// Who hears the heartbeats of all guests, at the switch, from the first call on.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn witness(&self) -> Result<&Listener> {
        // Of several guests that begin at once, one makes it.
        let _one = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(witness) = self.witness.get() {
            return Ok(witness);
        }
        let namespace = PathBuf::from(format!("/proc/{}/ns/net", self.switch.init()));
        let listener = Listener::start(Some(&namespace))?;
        Ok(self.witness.get_or_init(|| listener))
    }

    /// The directory all hosts see as `/lab`.
    pub fn share(&self) -> PathBuf {
        self.directory.join("share")
    }

    /// Ends the lab as this process' death would: the kernel sees that nobody holds it any more.
    pub fn let_go(&mut self) {
        self.alive = None;
    }

    /// Keeps the hosts' logs beyond the lab's end, and says where.
    pub fn save_logs(&self) {
        let target = logs_directory();
        for host in &self.hosts {
            if let Err(error) = copy_directory(&host.logs(), &target.join(host.name())) {
                eprintln!("cannot keep the logs of {}: {error}", host.name());
            }
        }
        eprintln!("the hosts' logs are in {}", target.display());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.save_logs();
        }
        self.let_go();
        match script(&self.name)
            .arg("down")
            .output()
            .map(|output| check(&output))
        {
            Ok(Ok(())) => {}
            Ok(Err(error)) => eprintln!("tests/lab down: {error}"),
            Err(error) => eprintln!("tests/lab down: {error}"),
        }
    }
}

/// Where the script keeps its labs, one directory each.
const LABS: &str = "/var/lib/virt-ferry-lab";

/// This package's directory.
const TESTS: &str = env!("CARGO_MANIFEST_DIR");

fn script(name: &str) -> Command {
    let mut command = Command::new(Path::new(TESTS).join("lab"));
    command.env("FERRY_LAB", name).env_remove("FERRY_LAB_DIR");
    command
}

/// No two labs that live at the same time have the same name, in this process or others.
fn next_name() -> String {
    static LABS_SO_FAR: AtomicUsize = AtomicUsize::new(0);
    let prefix = std::env::var("FERRY_LAB").unwrap_or_else(|_| format!("test-{}", std::process::id()));
    format!("{prefix}-{}", LABS_SO_FAR.fetch_add(1, Ordering::Relaxed))
}

/// `tests/run` says where; a test run by hand has its thread's name (or `main` with --test-threads=1).
fn logs_directory() -> PathBuf {
    if let Some(directory) = std::env::var_os("FERRY_TEST_LOGS") {
        return directory.into();
    }
    let test = std::thread::current()
        .name()
        .unwrap_or("unnamed")
        .replace("::", "-");
    Path::new(TESTS).join("../target/test-logs").join(test)
}

fn check(output: &Output) -> Result<()> {
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// The first number in a file.
fn read_number(path: &Path) -> Result<u32> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .with_context(|| format!("{} holds no number", path.display()))
}

fn copy_directory(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy_directory(&entry.path(), &target)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
