//! Two engines that move files from one directory to another over the loopback interface, driven as plug-ins drive them.

use super::files::noise;
use super::{await_some, PATIENCE};
use ferry_contract::cold::journal::{self, Journal, Role, State};
use ferry_contract::cold::storage::Relocate;
use ferry_contract::cold::{Deleted, Item, Kept, Options, Part, Plan, Pull, Recovered, Serve, Wish};
use ferry_contract::control::{Failure, Message, Reply, Request, Settings, Statistics};
use ferry_contract::cookie::ColdOffer;
use ferry_contract::session::{Encryption, Guest};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;
use uuid::Uuid;

pub const MIB: u64 = 1 << 20;

/// An engine process and the plug-in's end of its socket.
pub struct Engine {
    child: Child,
    socket: UnixStream,
    lines: BufReader<UnixStream>,
    pub statistics: Statistics,
    /// All that was reported of what remains.
    pub remaining: Vec<u64>,
}

impl Engine {
    pub fn start(role: &str) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_virt-ferry-engine"))
            .arg(role)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let reader = socket.try_clone().unwrap();
        reader.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            child,
            socket,
            lines: BufReader::new(reader),
            statistics: Statistics::default(),
            remaining: Vec::new(),
        }
    }

    pub fn tell(&mut self, request: &Request) {
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        self.socket.write_all(&line).unwrap();
    }

    /// The next message that is no report; `None` when the engine has ended.
    pub fn hear(&mut self) -> Option<Reply> {
        loop {
            let mut line = String::new();
            match self.lines.read_line(&mut line) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("the engine says nothing: {error}"),
            }
            match serde_json::from_str(&line).unwrap() {
                Message::Progress(statistics) => {
                    self.statistics = statistics;
                    self.remaining.push(statistics.remaining);
                }
                Message::Reply(reply) => return Some(reply),
            }
        }
    }

    pub fn ask(&mut self, request: &Request) -> Reply {
        self.tell(request);
        self.hear().expect("an answer")
    }

    pub fn refusal(&mut self, request: &Request) -> Failure {
        self.tell(request);
        self.failure()
    }

    /// The answer is a failure: this one.
    pub fn failure(&mut self) -> Failure {
        match self.hear() {
            Some(Reply::Failed(failure)) => failure,
            other => panic!("no failure, but {other:?}"),
        }
    }

    /// The guest has its new files, and a source hears that it has left.
    pub fn own(&mut self) {
        assert_eq!(self.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Ends it as a crash does.
    pub fn crash(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The source of a move that the destination gave up: it has the guest again.
    pub fn end_aborted(mut self) {
        assert_eq!(self.ask(&Request::ColdAbort), Reply::ColdAborted);
        self.end();
    }

    /// Closes the plug-in's end, as a daemon that dies does, and waits for the engine to end.
    pub fn hang_up(self) {
        self.let_go();
        self.end();
    }

    /// As a daemon that dies: what the engine still has to do, it does alone.
    pub fn let_go(&self) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
    }

    /// Waits until it has ended; by which signal.
    pub fn killed_by(mut self) -> Option<Signal> {
        let status = self.child.wait().unwrap();
        status.signal().and_then(|number| Signal::try_from(number).ok())
    }

    /// Waits until it has ended by itself.
    pub fn end(mut self) {
        while self.hear().is_some() {}
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest's files in one directory, and another one for them to go to.
pub struct Scene {
    pub directory: TempDir,
    pub items: Vec<Item>,
    pub guest: Guest,
    pub options: Options,
    pub encryption: Encryption,
    pub incremental: bool,
    pub media: Vec<ferry_contract::cold::Medium>,
    pub ports: Ports,
    /// The destination's path of a file, where it is not the one of the same name.
    pub elsewhere: Vec<(PathBuf, PathBuf)>,
}

impl Default for Scene {
    fn default() -> Self {
        // Not below /tmp, which may be a file system without direct I/O.
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for name in ["source", "destination", "journals-source", "journals-destination"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        Self {
            directory,
            items: Vec::new(),
            guest: Guest {
                name: "g".into(),
                uuid: Uuid::new_v4(),
            },
            options: Options::default(),
            encryption: Encryption::Always,
            incremental: false,
            media: Vec::new(),
            ports: Ports::take(),
            elsewhere: Vec::new(),
        }
    }
}

/// Ports of one scene's own: a recovery listens where the engine that died did, and nobody else must have come there. Not
/// those of a real host, whose engines may be at work, nor those that the kernel gives to connections (from 32768 on).
pub struct Ports {
    range: (u16, u16),
    /// An abstract name, which is taken for as long as this is open, in the namespace that the ports are of.
    _taken: UnixListener,
}

impl Ports {
    fn take() -> Self {
        let free = (24000..32000).step_by(8).find_map(|first| {
            let name = SocketAddr::from_abstract_name(format!("ferry-test-ports-{first}")).ok()?;
            let taken = UnixListener::bind_addr(&name).ok()?;
            let range = (first, first + 7);
            Some(Self { range, _taken: taken })
        });
        free.expect("ports that no other scene has")
    }
}

impl Scene {
    pub fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    pub fn destination(&self) -> PathBuf {
        self.directory.path().join("destination")
    }

    fn state(&self, role: Role) -> PathBuf {
        self.directory.path().join(match role {
            Role::Source | Role::Within => "journals-source",
            Role::Destination => "journals-destination",
        })
    }

    pub fn settings(&self, role: Role) -> Settings {
        Settings {
            certificates: None,
            encryption: self.encryption,
            streams: 1,
            ports: self.ports.range,
            auto_converge: true,
            verify_memory: false,
            runtime_directory: self.directory.path().into(),
            log_directory: self.directory.path().join("logs"),
            state_directory: self.state(role),
        }
    }

    /// A sparse image: `data` MiB of noise in the middle of `size` MiB, and a byte at its very end.
    pub fn image(&mut self, name: &str, size: u64, data: u64) -> PathBuf {
        let path = self.source().join(name);
        let file = File::create(&path).unwrap();
        let length = size * MIB - 77;
        file.set_len(length).unwrap();
        let start = (size - data) / 2 * MIB + 4096;
        for block in 0..data {
            file.write_all_at(&noise(block ^ size, MIB as usize), start + block * MIB)
                .unwrap();
        }
        file.write_all_at(b"!", length - 1).unwrap();
        self.own(&path, disk(self.items.len()));
        path
    }

    pub fn own(&mut self, path: &Path, part: Part) {
        self.items.push(Item {
            path: path.to_owned(),
            part,
        });
    }

    pub fn serve(&self) -> Request {
        Request::ColdServe(Box::new(Serve {
            guest: self.guest.clone(),
            host: "host1".into(),
            address: "127.0.0.1".into(),
            listen: Some("127.0.0.1".into()),
            items: self.items.clone(),
            media: Vec::new(),
            metadata: Vec::new(),
            autostart: false,
            definition: None,
            xml: "<domain/>".into(),
            options: self.options,
            settings: self.settings(Role::Source),
        }))
    }

    pub fn pull(&self, offer: &ColdOffer) -> Request {
        let place = |file: &ferry_contract::cold::File| {
            let other = self.elsewhere.iter().find(|(source, _)| *source == file.path);
            match (other, file.path.strip_prefix(self.source())) {
                (Some((_, path)), _) => path.clone(),
                (None, Ok(inside)) => self.destination().join(inside),
                (None, Err(_)) => file.path.clone(),
            }
        };
        Request::ColdPull(Box::new(Pull {
            guest: self.guest.clone(),
            host: "host2".into(),
            offer: offer.clone(),
            plan: Plan {
                places: offer.inventory.files.iter().map(place).collect(),
                media: self.media.clone(),
                incremental: self.incremental,
                definition: "<domain/>".into(),
            },
            streams: None,
            settings: self.settings(Role::Destination),
        }))
    }

    /// All files to the destination's directory, on one host.
    pub fn relocate(&self) -> Request {
        let place = |item: &Item| self.destination().join(item.path.file_name().unwrap());
        Request::ColdMove(Box::new(Relocate {
            guest: self.guest.clone(),
            host: "host1".into(),
            items: self.items.clone(),
            places: self.items.iter().map(place).collect(),
            renames: Vec::new(),
            metadata: Vec::new(),
            definition: None,
            keep: false,
            dry_run: false,
            settings: self.settings(Role::Within),
        }))
    }

    /// A scene whose source sends so many bytes a second.
    pub fn limited(bandwidth: u64) -> Self {
        let mut scene = Self::default();
        scene.options.bandwidth = bandwidth;
        scene
    }

    /// A source that serves, and what it offers.
    pub fn begin(&self) -> (Engine, ColdOffer) {
        let mut source = Engine::start("cold-source");
        match source.ask(&self.serve()) {
            Reply::ColdOffer(offer) => (source, *offer),
            other => panic!("{other:?}"),
        }
    }

    /// A source that serves, and a destination that pulls from it.
    pub fn pulling(&self) -> (Engine, Engine) {
        let (source, offer) = self.begin();
        let mut destination = Engine::start("cold-destination");
        destination.tell(&self.pull(&offer));
        (source, destination)
    }

    /// A destination that cannot pull says why, and the source has the guest again.
    pub fn refused(&self) -> Failure {
        let (source, mut destination) = self.pulling();
        let failure = destination.failure();
        source.end_aborted();
        failure
    }

    /// Both engines, and everything pulled.
    pub fn pulled(&self) -> (Engine, Engine) {
        let (source, mut destination) = self.pulling();
        assert_eq!(destination.hear(), Some(Reply::ColdPulled));
        (source, destination)
    }

    /// Both engines, and the destination's files in place.
    pub fn placed(&self) -> (Engine, Engine) {
        let (source, mut destination) = self.pulled();
        assert_eq!(destination.ask(&Request::ColdCommit), Reply::ColdPlaced);
        (source, destination)
    }

    pub fn journal(&self, role: Role) -> Option<Journal> {
        let text = fs::read(self.journal_path(role)).ok()?;
        Some(Journal::parse(&text).unwrap())
    }

    pub fn journal_path(&self, role: Role) -> PathBuf {
        journal::path(&self.state(role), self.guest.uuid)
    }

    /// What a crash left is changed.
    pub fn change_journal(&self, role: Role, change: impl FnOnce(&mut Journal)) {
        let mut journal = self.journal(role).unwrap();
        change(&mut journal);
        fs::write(self.journal_path(role), serde_json::to_vec(&journal).unwrap()).unwrap();
    }

    /// The host was started anew, and its file systems have other numbers; says whether its files can be known by more.
    pub fn reboot(&self, role: Role) -> bool {
        let mut lasting = true;
        self.change_journal(role, |journal| {
            let mut entries = journal.entries.iter_mut().chain(&mut journal.former);
            lasting = entries.all(|entry| entry.lasting.is_some());
            for entry in journal.entries.iter_mut().chain(&mut journal.former) {
                let (device, _) = entry.identity.as_mut().unwrap();
                *device += u64::from(lasting);
            }
        });
        if !lasting {
            println!("SKIPPED: this file system has no handles, a reboot may make its files others");
        }
        lasting
    }

    pub fn await_state(&self, role: Role, state: State) {
        await_some(&format!("{role:?} to be {state:?}"), || {
            self.journal(role).filter(|journal| journal.state == state)
        });
    }

    /// Whether something waits to be read from an open connection to a source, in /proc/net/tcp's words (proc_net_tcp(5)).
    pub fn is_asked(&self) -> bool {
        const ESTABLISHED: &str = "01";
        let hex = |text: Option<&str>| u64::from_str_radix(text.unwrap_or_default(), 16).unwrap_or(0);
        ["/proc/net/tcp", "/proc/net/tcp6"].into_iter().any(|table| {
            let table = fs::read_to_string(table).unwrap_or_default();
            table.lines().skip(1).any(|line| {
                let fields: Vec<_> = line.split_whitespace().collect();
                let [_, local, _, state, queues, ..] = fields[..] else {
                    return false;
                };
                let ports = u64::from(self.ports.range.0)..=u64::from(self.ports.range.1);
                state == ESTABLISHED
                    && ports.contains(&hex(local.rsplit(':').next()))
                    && hex(queues.rsplit(':').next()) > 0
            })
        })
    }

    pub fn recovery(&self, role: Role, wish: Wish) -> Engine {
        self.recovery_beside(role, wish, &[])
    }

    /// A recovery on a host whose other guests need these.
    pub fn recovery_beside(&self, role: Role, wish: Wish, in_use: &[Kept]) -> Engine {
        let mut engine = Engine::start("cold-recover");
        engine.tell(&Request::ColdRecover {
            journal: self.journal_path(role),
            wish,
            in_use: in_use.to_vec(),
            settings: self.settings(role),
        });
        engine
    }

    /// A whole recovery whose answer this is.
    pub fn recover(&self, role: Role) -> Recovered {
        let mut engine = self.recovery(role, Wish::Settle);
        recovered(&mut engine)
    }

    /// Nothing of ours is left but the files themselves.
    pub fn assert_clean(&self) {
        let mut open = vec![self.directory.path().to_owned()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                let ours =
                    name.contains(".ferry-") || name.ends_with(".json") || name.ends_with(".json.part");
                let log = path.starts_with(self.directory.path().join("logs"));
                assert!(log || !ours, "{} is left", path.display());
                if path.is_dir() {
                    open.push(path);
                }
            }
        }
    }

    /// The destination has nothing at all.
    pub fn assert_not_there(&self) {
        let left: Vec<_> = fs::read_dir(self.destination()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

pub fn recovered(engine: &mut Engine) -> Recovered {
    match engine.hear() {
        Some(Reply::ColdRecovered(recovered)) => recovered,
        other => panic!("{other:?}"),
    }
}

pub fn disk(number: usize) -> Part {
    Part::Disk {
        target: format!("vd{}", char::from(b'a' + number as u8)),
        layer: 0,
        format: "raw".into(),
        relative: false,
    }
}

/// Finish and Confirm, as the plug-ins do them with --undefinesource.
pub fn conclude(scene: &Scene, mut source: Engine, mut destination: Engine, in_use: &[Kept]) -> Deleted {
    assert_eq!(destination.ask(&Request::ColdCommit), Reply::ColdPlaced);
    assert_eq!(scene.journal(Role::Source).unwrap().state, State::Committed);
    destination.own();
    assert_eq!(source.ask(&Request::ColdConfirm), Reply::ColdOwnedThere);
    let deleted = source.ask(&Request::ColdDelete {
        keep: None,
        in_use: in_use.to_vec(),
    });
    source.end();
    destination.end();
    match deleted {
        Reply::ColdDeleted(deleted) => deleted,
        other => panic!("{other:?}"),
    }
}

/// What a person is told of a migration by its record.
pub fn report(record: &Path) -> String {
    let program = Command::new(env!("CARGO_BIN_EXE_virt-ferry-engine"))
        .arg("report")
        .arg(record)
        .output();
    String::from_utf8(program.unwrap().stdout).unwrap()
}
