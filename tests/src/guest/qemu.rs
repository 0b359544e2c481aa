//! A guest as a bare QEMU process, without libvirt: for tests of the guests themselves and of whatever needs two QEMUs at hand.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail, ensure, Context, Result};
use serde_json::{json, Value};

use super::console::Console;
use super::ram::RamFile;
use super::{Accel, Backing, Guest, Kind, Machine};

/// How long QEMU may take for anything that it does at once.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(5);

/// Where a QEMU runs.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Directory for its sockets and its RAM file, and for the serial log, which instances of a guest share.
    pub dir: &'a Path,
    /// Tells the QEMUs of one guest apart, such as `source` and `destination`.
    pub instance: &'a str,
    /// Network namespace (a name of `ip netns`) and tap device in it for the guest's NIC.
    pub tap: Option<(&'a str, &'a str)>,
    /// Whether to wait for a migration to come in.
    pub incoming: bool,
}

impl<'a> Place<'a> {
    /// A QEMU that boots, without a network.
    pub fn new(dir: &'a Path, instance: &'a str) -> Self {
        Place {
            dir,
            instance,
            tap: None,
            incoming: false,
        }
    }
}

/// A running QEMU; it is killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    qmp: BufReader<UnixStream>,
    serial: UnixStream,
    console: Console,
    ram: PathBuf,
}

impl Qemu {
    /// Starts `guest`, whose files are installed in `place.dir` first.
    ///
    /// # Errors
    /// If the images cannot be built or QEMU does not come up; the message has what it said.
    pub fn start(guest: &Guest, place: Place) -> Result<Self> {
        let guest = guest.clone().dir(place.dir);
        if !place.incoming {
            guest.install(place.dir)?;
        }
        let file = |kind: &str| {
            place
                .dir
                .join(format!("{}.{}.{kind}", guest.name, place.instance))
        };
        let (qmp, serial, ram, said) = (file("qmp"), file("serial"), file("ram"), file("stderr"));
        for socket in [&qmp, &serial] {
            if let Err(error) = fs::remove_file(socket) {
                ensure!(
                    error.kind() == std::io::ErrorKind::NotFound,
                    "cannot remove {}: {error}",
                    socket.display()
                );
            }
        }
        let arguments = arguments(&guest, &place, &qmp, &serial, &ram);
        let mut command = match place.tap {
            Some((namespace, _)) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, "qemu-system-x86_64"]);
                command
            }
            None => Command::new("qemu-system-x86_64"),
        };
        let mut child = command
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(File::create(&said).context("cannot make a file for QEMU's messages")?)
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let sockets = connect(&mut child, &qmp).and_then(|qmp| Ok((qmp, connect(&mut child, &serial)?)));
        let (qmp, serial) = match sockets {
            Ok(sockets) => sockets,
            Err(error) => {
                // It may have ended by itself.
                let _ = child.kill();
                let _ = child.wait();
                return Err(error.context(fs::read_to_string(&said).unwrap_or_default()));
            }
        };
        drain(&serial)?;
        qmp.set_read_timeout(Some(PATIENCE))
            .context("cannot set a time limit")?;
        let console = Console::new(guest.log_in(place.dir));
        let mut qemu = Qemu {
            child,
            qmp: BufReader::new(qmp),
            serial,
            console,
            ram,
        };
        qemu.receive()?; // the greeting
        qemu.execute("qmp_capabilities", json!({}))?;
        Ok(qemu)
    }

    /// The guest's serial log.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The guest's RAM file.
    ///
    /// # Errors
    /// If it has none.
    pub fn ram(&self) -> Result<RamFile> {
        RamFile::open(&self.ram)
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Types a line at the guest's serial console.
    ///
    /// # Errors
    /// If QEMU has ended.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.serial
            .write_all(format!("{line}\n").as_bytes())
            .context("cannot type at the guest's console")
    }

    /// Runs a monitor command and returns what it returns.
    ///
    /// # Errors
    /// If QEMU refuses or has ended.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.qmp
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot send {command} to QEMU"))?;
        loop {
            let mut answer = self.receive()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {line}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self
            .qmp
            .read_line(&mut line)
            .context("cannot read from QEMU's monitor")?;
        ensure!(length > 0, "QEMU closed its monitor");
        serde_json::from_str(&line).with_context(|| format!("QEMU's monitor said '{line}'"))
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub fn stop(&mut self) -> Result<()> {
        self.execute("stop", json!({})).map(drop)
    }

    /// Lets the vCPUs run on.
    ///
    /// # Errors
    /// If QEMU refuses.
    pub fn resume(&mut self) -> Result<()> {
        self.execute("cont", json!({})).map(drop)
    }

    /// Waits until QEMU has ended by itself.
    ///
    /// # Errors
    /// When `patience` is over.
    pub fn wait(mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while self.child.try_wait().context("cannot wait for QEMU")?.is_none() {
            ensure!(Instant::now() < deadline, "QEMU did not end within {patience:?}");
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Migrates to `destination`, QEMU's own way, and waits until the guest runs there.
    ///
    /// # Errors
    /// If it fails or takes longer than `patience`.
    pub fn migrate(&mut self, destination: &mut Qemu, socket: &Path, patience: Duration) -> Result<()> {
        let uri = format!("unix:{}", socket.display());
        destination.execute("migrate-incoming", json!({ "uri": uri }))?;
        self.execute("migrate", json!({ "uri": uri }))?;
        let deadline = Instant::now() + patience;
        loop {
            let state = self.execute("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => bail!("migration failed: {state}"),
                _ => ensure!(
                    Instant::now() < deadline,
                    "migration did not end within {patience:?}: {state}"
                ),
            }
            thread::sleep(LOOK);
        }
        while destination.execute("query-status", json!({}))?["status"] != "running" {
            ensure!(
                Instant::now() < deadline,
                "the guest did not run at the destination within {patience:?}"
            );
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Guest memory; anonymous memory has no file.
        let _ = fs::remove_file(&self.ram);
    }
}

/// Connects to one of QEMU's sockets as soon as it is there.
fn connect(child: &mut Child, path: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) => ensure!(
                Instant::now() < deadline,
                "cannot connect to {}: {error}",
                path.display()
            ),
        }
        if let Some(status) = child.try_wait().context("cannot wait for QEMU")? {
            bail!("QEMU ended at once ({status})");
        }
        thread::sleep(LOOK);
    }
}

/// Reads away what the guest says, which is in its log: a socket that fills up would stop the guest's console.
fn drain(serial: &UnixStream) -> Result<()> {
    let mut said = serial.try_clone().context("cannot read the serial socket")?;
    // Ends with QEMU.
    thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    Ok(())
}

/// QEMU's command line. A comma in a path is not cared for: the tests choose the paths.
fn arguments(guest: &Guest, place: &Place, qmp: &Path, serial: &Path, ram: &Path) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.into(), value.into()]);
    let size = guest.memory_mib;
    let accel = match guest.accel {
        Accel::Tcg => "tcg",
        Accel::Kvm => "kvm",
    };
    let machine = match guest.machine {
        Machine::Pc => "pc",
        Machine::Q35 => "q35",
    };
    add("-name", format!("guest={}", guest.name));
    add(
        "-machine",
        format!("{machine},accel={accel},memory-backend=pc.ram,hpet=off"),
    );
    add("-m", format!("{size}M"));
    add("-smp", guest.vcpus.to_string());
    add("-display", "none".to_owned());
    add("-qmp", format!("unix:{},server=on,wait=off", qmp.display()));
    add("-rtc", "base=utc".to_owned());
    let backend = |share: &str| format!("memory-backend-file,mem-path={},share={share}", ram.display());
    let backend = match guest.backing {
        Backing::File => backend("on"),
        Backing::PrivateFile => backend("off"),
        Backing::Memfd => "memory-backend-memfd,share=on".to_owned(),
        Backing::HugePages => "memory-backend-file,mem-path=/dev/hugepages,share=on,prealloc=on".to_owned(),
        Backing::Anonymous | Backing::Unsaid => "memory-backend-ram".to_owned(),
    };
    add("-object", format!("{backend},id=pc.ram,size={size}M"));
    let log = guest.log_in(place.dir);
    let (serial, log) = (serial.display(), log.display());
    add(
        "-chardev",
        format!("socket,id=s,path={serial},server=on,wait=off,logfile={log},logappend=on"),
    );
    add("-serial", "chardev:s".to_owned());
    match &guest.kind {
        Kind::Linux(config) => {
            add("-kernel", place.dir.join("vmlinuz").display().to_string());
            add("-initrd", place.dir.join("initrd").display().to_string());
            add("-append", Guest::command_line(config));
        }
        Kind::Boot { .. } => {
            let disk = guest.boot_disk_in(place.dir);
            add(
                "-drive",
                format!("file={},format=raw,if=virtio,readonly=on", disk.display()),
            );
        }
    }
    for (index, image) in guest.disks.iter().enumerate() {
        let (path, format, cache) = (image.path.display(), &image.format, &image.cache);
        add(
            "-drive",
            format!("id=d{index},file={path},format={format},cache={cache},if=none"),
        );
        add("-device", format!("virtio-blk-pci,drive=d{index}"));
    }
    if let (Some(nic), Some((_, tap))) = (&guest.nic, place.tap) {
        add(
            "-netdev",
            format!("tap,id=n,ifname={tap},script=no,downscript=no"),
        );
        add("-device", format!("virtio-net-pci,netdev=n,mac={}", nic.mac));
    }
    let reporting = if guest.free_page_reporting {
        ",free-page-reporting=on"
    } else {
        ""
    };
    add("-device", format!("virtio-balloon-pci{reporting}"));
    if place.incoming {
        add("-incoming", "defer".to_owned());
    }
    arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    arguments
}

/// Whether KVM runs a guest here, tried once with a real one: /dev/kvm that opens is not enough.
///
/// # Errors
/// What went wrong; a test that needs KVM prints it and is skipped.
pub fn kvm_works() -> Result<()> {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    let tried = TRIED.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("ferry-kvm-{}", std::process::id()));
        let tried = fs::create_dir_all(&dir)
            .map_err(anyhow::Error::from)
            .and_then(|()| try_kvm(&dir));
        // Left behind it would only take room.
        let _ = fs::remove_dir_all(&dir);
        tried.map_err(|error| format!("{error:#}"))
    });
    tried
        .clone()
        .map_err(|reason| anyhow!("KVM does not run guests here: {reason}"))
}

fn try_kvm(dir: &Path) -> Result<()> {
    File::open("/dev/kvm").context("/dev/kvm")?;
    let qemu = Qemu::start(
        &Guest::boot("kvm").memory_mib(32).range(4, 0),
        Place::new(dir, "only"),
    )?;
    wait_for_pass(qemu.console(), 1, PATIENCE)
}

/// Waits until the boot sector has been through its memory `passes` times since its start.
///
/// # Errors
/// When `patience` is over, or as soon as the guest says that its memory is damaged.
pub fn wait_for_pass(console: &Console, passes: usize, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        let said = console.text().unwrap_or_default();
        ensure!(
            !said.contains('E'),
            "{}: the guest found its memory damaged",
            console.path().display()
        );
        if said.bytes().filter(|byte| *byte == b'B').count() >= passes {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{}: no pass {passes} within {patience:?}",
            console.path().display()
        );
        thread::sleep(LOOK);
    }
}
