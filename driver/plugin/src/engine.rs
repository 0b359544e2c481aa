//! The engine process of one migration: started, asked, listened to, and buried.
//!
//! One thread a session reads what the engine says and ends with the process. Every wait here is bounded; an
//! engine that has said nothing for [`SILENCE`] is taken for stuck and killed, which closes its sockets and so
//! fails the migration on this host; QEMU and libvirt then do what they do when a network fails.

use crate::awake::{self, Awake};
use crate::mark;
use crate::turns::Moving;
use ferry_contract::config::Config;
use ferry_contract::control::{Failure, FailureKind, Message, Reply, Request, Statistics, LINGER, MAX_LINE};
use ferry_host::wait;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// An engine reports every second or so; one that is silent this long is stuck.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a request may take to be written: the engine reads all the time.
const WRITE: Duration = Duration::from_secs(5);
/// How long an engine may take to put things away after its plug-in let go of it, and a process to die that is killed.
/// Longer than the engine takes to clear QEMU's capability (20 s).
const BURIAL: Duration = Duration::from_secs(30);
/// How long the destination's may, once it has let go of its QEMU: longer than it stays to tell the source whether the
/// guest runs there. Nobody waits for it.
const LINGERING: Duration = Duration::from_secs(LINGER.as_secs() + 30);
/// How long the rescue of a guest from a dead engine may take.
const RESCUE: Duration = Duration::from_secs(10);

/// A running engine.
pub struct Engine {
    shared: Arc<Shared>,
    /// It works also for a client that has gone.
    _awake: Awake,
}

struct Shared {
    host: String,
    /// Whether it may stay on for its peer's questions.
    lingers: bool,
    program: PathBuf,
    /// Held while a request is under way: there is one answer at a time.
    asking: Mutex<()>,
    socket: Mutex<UnixStream>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    reply: Option<Reply>,
    statistics: Statistics,
    /// The QEMU the engine works on.
    hold: Option<Hold>,
    /// The failure the engine ended with: it has no more to say.
    failed: Option<Failure>,
    gone: Option<String>,
}

/// A QEMU in an engine's hands.
struct Hold {
    /// Its monitor: it is to be rescued if the engine dies.
    monitor: PathBuf,
    /// Until then nobody has it write its memory.
    _turn: Moving,
}

/// An engine that cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the engine {}: {source}; install virt-ferry-engine there, or set engine in {}", program.display(), ferry_contract::config::PATH)]
pub struct StartError {
    program: PathBuf,
    source: std::io::Error,
}

impl Engine {
    /// Starts the engine for one migration on this host.
    pub fn start(config: &Config, role: &str, host: &str) -> Result<Self, StartError> {
        let failed = |source| StartError {
            program: config.engine.clone(),
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        ours.set_write_timeout(Some(WRITE)).map_err(failed)?;
        let reader = ours.try_clone().map_err(failed)?;
        reader.set_read_timeout(Some(SILENCE)).map_err(failed)?;
        let child = Command::new(&config.engine)
            .arg(role)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let shared = Arc::new(Shared {
            host: host.to_owned(),
            lingers: role == "destination",
            program: config.engine.clone(),
            asking: Mutex::new(()),
            socket: Mutex::new(ours),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let listener = Arc::clone(&shared);
        let started = std::thread::Builder::new()
            .name("ferry-engine".into())
            .spawn(move || listen(&listener, BufReader::new(reader), child));
        // Without the thread the socket closes, and the engine ends by itself.
        started.map_err(failed)?;
        Ok(Self {
            shared,
            _awake: awake::stay(),
        })
    }

    /// Asks and waits for the answer. `limit` bounds the whole wait; without it the wait ends when the engine
    /// answers, dies or falls silent.
    pub fn ask(&self, request: &Request, limit: Option<Duration>) -> Result<Reply, Failure> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let Ok(_asking) = self.shared.asking.try_lock() else {
            return Err(self.failure("another phase of this migration is under way".into()));
        };
        self.shared.lock().reply = None;
        if self.tell(request).is_err() {
            // It has ended, or is as good as ended; why is still to be heard.
            self.release();
        }
        let mut state = self.shared.lock();
        loop {
            if let Some(reply) = state.reply.take() {
                return Ok(reply);
            }
            if let Some(failure) = &state.failed {
                return Err(failure.clone());
            }
            if let Some(gone) = &state.gone {
                return Err(self.failure(gone.clone()));
            }
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => SILENCE,
            };
            if left.is_zero() {
                drop(state);
                self.release();
                return Err(self.failure("the engine did not answer in time and was given up".into()));
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(|e| e.into_inner())
                .0;
        }
    }

    /// Tells the engine something that it need not answer.
    pub fn tell(&self, request: &Request) -> Result<(), Failure> {
        if let Some(gone) = &self.shared.lock().gone {
            return Err(self.failure(gone.clone()));
        }
        let mut line = serde_json::to_vec(request)
            .map_err(|error| self.failure(format!("a request cannot be written: {error}")))?;
        line.push(b'\n');
        let mut socket = self.shared.socket.lock().unwrap_or_else(|e| e.into_inner());
        socket
            .write_all(&line)
            .map_err(|error| self.failure(format!("the engine does not listen: {error}")))
    }

    /// From now on, should the engine die, this QEMU is told not to ignore shared memory any more: by this daemon, or
    /// where it dies too, by whoever finds the mark. The turn ends after that, too.
    ///
    /// # Errors
    /// The mark cannot be made: the engine must not touch this QEMU.
    pub fn guard(&self, monitor: &Path, turn: Moving) -> Result<(), Failure> {
        // What an earlier engine left must not go unseen: this one, ended in order, takes the mark with it.
        if mark::is_set(monitor) {
            rescue(&self.shared.program, monitor).map_err(|why| {
                self.failure(format!(
                    "an earlier engine may have left x-ignore-shared on: {why}"
                ))
            })?;
        }
        mark::set(monitor).map_err(|error| {
            let place = monitor.parent().unwrap_or(monitor).display();
            self.failure(format!(
                "cannot make a file in the guest's directory {place}: {error}"
            ))
        })?;
        self.shared.lock().hold = Some(Hold {
            monitor: monitor.to_owned(),
            _turn: turn,
        });
        Ok(())
    }

    /// The engine has said that its QEMU honours all memory again, and does not change that any more: whoever waits to
    /// write the memory need not wait for the engine's end.
    pub fn let_go_of_memory(&self) {
        let hold = self.shared.lock().hold.take();
        if let Some(hold) = &hold {
            mark::clear(&hold.monitor);
        }
    }

    /// How far the memory is.
    pub fn statistics(&self) -> Statistics {
        self.shared.lock().statistics
    }

    /// Whether the engine has ended with a failure, which every request is answered by.
    pub fn has_failed(&self) -> bool {
        self.shared.lock().failed.is_some()
    }

    /// Whether the process has ended.
    pub fn is_gone(&self) -> bool {
        self.shared.lock().gone.is_some()
    }

    /// Lets the engine go: it undoes what is not committed and exits.
    fn release(&self) {
        let socket = self.shared.socket.lock().unwrap_or_else(|e| e.into_inner());
        // An engine that is gone already has closed it.
        let _ = socket.shutdown(Shutdown::Both);
    }

    fn failure(&self, cause: String) -> Failure {
        Failure {
            kind: FailureKind::Failed,
            host: self.shared.host.clone(),
            cause,
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.release();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under this lock leaves whole values: each is written in one assignment.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The life of the session's thread: hear the engine out, bury it, and rescue its guest if it died at work.
fn listen(shared: &Shared, mut lines: BufReader<UnixStream>, mut child: Child) {
    let why = loop {
        let mut line = Vec::new();
        match lines.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line) {
            Ok(0) => break "the engine ended".to_owned(),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                // The kernel closes its sockets and mappings: the guest runs on, the migration fails.
                let _ = child.kill();
                break format!("the engine was silent for {} s and was killed", SILENCE.as_secs());
            }
            // Reset: it ended with a request unread.
            Err(_) => break "the engine ended".to_owned(),
        }
        match serde_json::from_slice::<Message>(&line) {
            Ok(Message::Progress(statistics)) => shared.lock().statistics = statistics,
            Ok(Message::Reply(Reply::Failed(failure))) => {
                shared.lock().failed = Some(failure);
                shared.changed.notify_all();
            }
            Ok(Message::Reply(reply)) => {
                shared.lock().reply = Some(reply);
                shared.changed.notify_all();
            }
            Err(error) => {
                let _ = child.kill();
                break format!("the engine said what the plug-in does not understand ({error}): are both of one release?");
            }
        }
    };
    let patience = match shared.lock().hold {
        None if shared.lingers => LINGERING,
        _ => BURIAL,
    };
    let status = wait(&mut child, patience).or_else(|| end(&mut child));
    let clean = status.is_some_and(|status| status.success());
    let how = status.map_or_else(|| "it cannot be killed".into(), |status| status.to_string());
    let hold = shared.lock().hold.take();
    match (clean, &hold) {
        (true, Some(Hold { monitor, .. })) => mark::clear(monitor),
        // Before anybody hears of the end: libvirt's next job on this guest may be a save.
        (false, Some(Hold { monitor, .. })) => match rescue(&shared.program, monitor) {
            Ok(()) => tracing::warn!(?monitor, "an engine died at work; x-ignore-shared is off"),
            // QEMU itself has gone, most likely; no save gets past the guard otherwise.
            Err(why) => {
                tracing::warn!(
                    ?monitor,
                    "an engine died at work; x-ignore-shared may be on: {why}"
                )
            }
        },
        (_, None) => {}
    }
    drop(hold);
    shared.lock().gone = Some(format!("{why} ({how}); see the daemon's log"));
    shared.changed.notify_all();
}

/// Kills a process that takes too long.
fn end(child: &mut Child) -> Option<ExitStatus> {
    let _ = child.kill();
    wait(child, BURIAL)
}

/// x-ignore-shared left on would cost the guest its memory at the next save: has it cleared.
///
/// # Errors
/// Why it may still be on.
pub fn rescue(program: &Path, monitor: &Path) -> Result<(), String> {
    let child = Command::new(program)
        .arg("rescue")
        .arg(monitor)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn();
    let mut child = child.map_err(|error| format!("cannot start {}: {error}", program.display()))?;
    let status = wait(&mut child, RESCUE).or_else(|| end(&mut child));
    match status {
        Some(status) if status.success() => {
            mark::clear(monitor);
            Ok(())
        }
        Some(status) => Err(format!("{status}; see the daemon's log")),
        None => Err("QEMU does not answer".into()),
    }
}
