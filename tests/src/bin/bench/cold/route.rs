//! The ways to copy disks, and the servers that they need at the source.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use ferry_tests::cold::{COLD, IMAGES};
use ferry_tests::host::Host;
use ferry_tests::lab::Lab;
use ferry_tests::wait::wait_until;

use super::disks::{path, DISKS};
use super::GUEST;
use crate::limited;
use crate::way::Way;

/// Where the servers have their settings, on each host.
const RUN: &str = "/run/bench";
/// sshd's port.
const SSH: &str = "2222";
/// The first disk's NBD port; the others' follow.
const NBD: usize = 10809;
/// For a server to listen.
const STARTED: Duration = Duration::from_secs(20);

/// A way to copy the disks of a guest that is shut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `rsync --sparse` from rsync's own server, which does not encrypt.
    Rsync,
    /// `qemu-img convert` from `qemu-nbd`: what the guest sees, in new images; not encrypted.
    Nbd,
    /// scp.
    Scp,
    /// virt-ferry, as installed: TLS 1.3, verified.
    Ferry,
}

impl Route {
    /// All of them, the ones to compare with first.
    pub const ALL: [Route; 4] = [Route::Rsync, Route::Nbd, Route::Scp, Route::Ferry];

    /// How it is told.
    pub const fn way(self) -> Way {
        let (key, name) = match self {
            Route::Rsync => ("rsync", "rsync -S"),
            Route::Nbd => ("nbd", "qemu-img"),
            Route::Scp => ("scp", "scp"),
            Route::Ferry => ("ferry", "virt-ferry"),
        };
        Way { key, name }
    }
}

/// The servers at host1.
pub struct Servers<'a> {
    one: &'a Host,
    two: &'a Host,
}

impl<'a> Servers<'a> {
    /// Starts those that serve all turns.
    ///
    /// # Errors
    /// One is not installed, or does not start.
    pub fn start(lab: &'a Lab) -> Result<Self> {
        let servers = Servers {
            one: lab.host(1),
            two: lab.host(2),
        };
        for (host, program) in [
            (servers.one, "rsync"),
            (servers.two, "scp"),
            (servers.one, "qemu-nbd"),
        ] {
            let found = host.run(&["sh", "-c", &format!("command -v {program}")]);
            found.with_context(|| format!("{program} is not installed: run tests/install"))?;
        }
        for host in [servers.one, servers.two] {
            fs::create_dir_all(host.path(RUN))?;
        }
        servers.rsyncd()?;
        servers.sshd()?;
        Ok(servers)
    }

    fn rsyncd(&self) -> Result<()> {
        let settings = format!("{RUN}/rsyncd.conf");
        let text =
            format!("use chroot = no\nuid = root\ngid = root\n[images]\npath = {IMAGES}\nread only = yes\n");
        fs::write(self.one.path(&settings), text)?;
        let address = format!("--address={}", self.one.address());
        let settings = format!("--config={settings}");
        self.one.run(&["rsync", "--daemon", &address, &settings])?;
        self.listens(873)
    }

    /// A server of the lab's own: its keys are new, and nothing of it is this machine's.
    fn sshd(&self) -> Result<()> {
        let program = "/usr/sbin/sshd";
        if !self.one.path(program).exists() {
            let unpacked = unpacked();
            ensure!(
                unpacked.join("sbin/sshd").exists(),
                "there is no sshd, neither installed nor in {}: run tests/install",
                unpacked.display()
            );
            let usr = self.one.path("/usr").display().to_string();
            limited::outside(STARTED, &["cp", "-rT", &unpacked.display().to_string(), &usr])?;
        }
        let key = |name: &str| format!("{RUN}/{name}");
        for name in ["host", "client"] {
            self.one
                .run(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &key(name)])?;
        }
        let client = fs::read(self.one.path(key("client")))?;
        let there = self.two.path(key("client"));
        fs::write(&there, client)?;
        fs::set_permissions(&there, fs::Permissions::from_mode(0o600))?;
        let text = format!(
            "Port {SSH}\nListenAddress {}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile {RUN}/sshd.pid\n\
             PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nSubsystem sftp internal-sftp\n",
            self.one.address(),
            key("host"),
            key("client.pub"),
        );
        fs::write(self.one.path(key("sshd_config")), text)?;
        // A user that its unprivileged part runs as, a directory for it, and a root that may log in with a key: in this
        // host of the lab only.
        self.one.run(&[
            "sh",
            "-ec",
            "mkdir -p /run/sshd
             getent passwd sshd >/dev/null || echo 'sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin' >>/etc/passwd
             usermod --password '*' root",
        ])?;
        self.one.run(&[program, "-f", &key("sshd_config")])?;
        self.listens(SSH.parse()?)
    }

    fn listens(&self, port: u16) -> Result<()> {
        let filter = format!("sport = :{port}");
        wait_until(&format!("a server at port {port}"), STARTED, || {
            let said = self.one.run(&["ss", "--no-header", "-ltn", &filter])?;
            Ok(!said.is_empty())
        })
    }

    /// Starts what serves one turn only.
    ///
    /// # Errors
    /// It does not start.
    pub fn ready(&self, route: Route) -> Result<()> {
        if route != Route::Nbd {
            return Ok(());
        }
        for (port, (name, format)) in (NBD..).zip(DISKS) {
            // It ends with its client.
            self.one.run(&[
                "qemu-nbd",
                "--fork",
                "--read-only",
                "--bind",
                &self.one.address(),
                "--port",
                &port.to_string(),
                "--format",
                format,
                &path(name),
            ])?;
        }
        Ok(())
    }

    /// Copies the disks; whether that came to its end within the limit.
    ///
    /// # Errors
    /// What the command said.
    pub fn copy(&self, route: Route, limit: Duration) -> Result<bool> {
        let source = self.one.name();
        match route {
            Route::Rsync => {
                let disks = DISKS.map(|(name, _)| format!("rsync://{source}/images/{name}"));
                let [system, data] = disks.each_ref().map(String::as_str);
                limited::run(self.two, limit, &["rsync", "--sparse", system, data, IMAGES])
            }
            Route::Nbd => {
                let convert = (NBD..).zip(DISKS).map(|(port, (name, format))| {
                    let copy = path(name);
                    format!("qemu-img convert -f raw -O {format} nbd://{source}:{port} {copy}")
                });
                let script = convert.collect::<Vec<_>>().join("\n");
                limited::run(self.two, limit, &["sh", "-ec", &script])
            }
            Route::Scp => {
                let key = format!("{RUN}/client");
                let options = [
                    "StrictHostKeyChecking=no",
                    "UserKnownHostsFile=/dev/null",
                    "LogLevel=ERROR",
                ];
                let options = options.iter().flat_map(|option| ["-o", *option]);
                let mut command = vec!["scp", "-q", "-F", "/dev/null", "-P", SSH, "-i", &key];
                command.extend(options);
                let disks = DISKS.map(|(name, _)| format!("root@{source}:{}", path(name)));
                command.extend(disks.iter().map(String::as_str).chain([IMAGES]));
                limited::run(self.two, limit, &command)
            }
            Route::Ferry => {
                let uri = self.two.uri();
                let virsh = ["virsh", "--connect", "qemu:///system", "migrate"];
                limited::run(self.one, limit, &[&virsh, &COLD[..], &[GUEST, &uri]].concat())
            }
        }
    }
}

/// Where tests/install unpacks sshd on a machine that has none: what is below /usr.
fn unpacked() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/sshd/usr")
}
