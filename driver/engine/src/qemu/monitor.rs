//! A QMP client: one connection to a QEMU's private monitor.
//!
//! Blocking, with a deadline on every wait. Replies are matched to commands by id, so the late answer of a command
//! that was given up is not taken for the next one's. Events that arrive meanwhile are queued, or told to a listener at
//! once.
//!
//! Reference: docs/interop/qmp-spec.rst of QEMU.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::{json, Value};

/// Longest line accepted from QEMU, bytes. A reply that lists a thousand devices is far below a MiB.
const MAX_LINE: usize = 16 << 20;
/// How often a command that may become moot is looked after.
const LOOK: Duration = Duration::from_millis(100);
/// Events kept while nobody fetches them. A migration that goes well sends about ten.
const MAX_EVENTS: usize = 1024;

/// An event of QEMU's.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Such as "STOP" or "MIGRATION".
    pub name: String,
    /// Its data; null if it has none.
    pub data: Value,
    /// When QEMU sent it: time since the epoch by QEMU's host clock.
    pub at: Duration,
}

/// What can go wrong on a monitor.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The socket cannot be connected to.
    #[error("cannot connect to QEMU's monitor {path}: {source}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// QEMU closed the connection; it mostly has ended then.
    #[error("QEMU closed its monitor {path}", path = path.display())]
    Closed {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("QEMU's monitor {path} failed: {source}", path = path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No answer in time.
    #[error("QEMU did not answer {command} in time on its monitor {path}", path = path.display())]
    Timeout {
        /// The command that waits, or what else was awaited.
        command: String,
        /// The socket.
        path: PathBuf,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// Error class, such as "GenericError" or "CommandNotFound".
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// What was received is not QMP, or not what the command is specified to return.
    #[error("QEMU's monitor {path} does not speak as expected: {what}", path = path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What was wrong.
        what: String,
    },
}

/// Who hears of each event the moment it is read.
struct Listener(Box<dyn FnMut(&Event) + Send>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

/// A connection to a QMP monitor, ready for commands.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    path: PathBuf,
    /// Received, not yet a whole line.
    input: Vec<u8>,
    /// How much of `input` has been searched for the end of the line.
    searched: usize,
    events: VecDeque<Event>,
    listener: Option<Listener>,
    lost_events: u64,
    last_id: u64,
    greeting: Value,
}

impl Monitor {
    /// Connects to the monitor at `path` and leaves its negotiation mode; events come from then on.
    ///
    /// # Errors
    /// When nobody listens, the listener is not a QMP monitor, or `deadline` passes. QEMU serves one client a
    /// monitor at a time: a second one waits for the greeting until the first is gone.
    pub fn connect(path: &Path, deadline: Instant) -> Result<Self, MonitorError> {
        let wrap = |source| MonitorError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(wrap)?;
        stream.set_nonblocking(true).map_err(wrap)?;
        let mut monitor = Monitor {
            stream,
            path: path.to_owned(),
            input: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            listener: None,
            lost_events: 0,
            last_id: 0,
            greeting: Value::Null,
        };
        let hello = monitor.receive("the connection", deadline)?;
        monitor.greeting = match hello.get("QMP") {
            Some(greeting) => greeting.clone(),
            None => return Err(monitor.protocol("no QMP greeting")),
        };
        monitor.execute("qmp_capabilities", json!({}), deadline)?;
        Ok(monitor)
    }

    /// The greeting's contents: version and capabilities.
    pub(crate) fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Number of the process that listens on the socket: QEMU, where it opened the socket itself.
    ///
    /// # Errors
    /// When the kernel does not say, or the process is outside of our PID namespace.
    pub fn peer_pid(&self) -> Result<i32, MonitorError> {
        let peer = getsockopt(&self.stream, PeerCredentials).map_err(|errno| self.io(errno.into()))?;
        match peer.pid() {
            pid @ 1.. => Ok(pid),
            _ => Err(self.protocol("its process is outside of our PID namespace")),
        }
    }

    /// Runs a command and returns what it returned.
    ///
    /// # Errors
    /// When QEMU refuses it, ends, or does not answer before `deadline`. In the last case the command may still be
    /// carried out.
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Value,
        deadline: Instant,
    ) -> Result<Value, MonitorError> {
        self.execute_unless(command, arguments, deadline, || false)
    }

    /// As [`execute`](Self::execute), but times out soon after `moot` is so.
    pub(super) fn execute_unless(
        &mut self,
        command: &str,
        arguments: Value,
        deadline: Instant,
        moot: impl Fn() -> bool,
    ) -> Result<Value, MonitorError> {
        let timeout = |path: &Path| MonitorError::Timeout {
            command: command.to_owned(),
            path: path.to_owned(),
        };
        if moot() {
            return Err(timeout(&self.path));
        }
        self.last_id += 1;
        let id = self.last_id;
        let mut line = json!({ "execute": command, "id": id });
        if arguments
            .as_object()
            .is_some_and(|arguments| !arguments.is_empty())
        {
            line["arguments"] = arguments;
        }
        tracing::trace!(command, "to QEMU");
        self.send(command, format!("{line}\n").as_bytes(), deadline)?;
        loop {
            let mut reply = match self.receive(command, deadline.min(Instant::now() + LOOK)) {
                Err(MonitorError::Timeout { .. }) if Instant::now() < deadline && !moot() => continue,
                received => received?,
            };
            let is_ours = reply.get("id").is_none_or(|answered| answered == id);
            if reply.get("event").is_some() || !is_ours {
                self.set_aside(reply);
                // A flood of events must not outlast the deadline.
                if moot() || Instant::now() >= deadline {
                    return Err(timeout(&self.path));
                }
            } else if let Some(result) = reply.get_mut("return") {
                return Ok(result.take());
            } else if let Some(error) = reply.get("error") {
                let text = |key| {
                    error
                        .get(key)
                        .and_then(Value::as_str)
                        .unwrap_or("no reason given")
                        .to_owned()
                };
                let (class, description) = (text("class"), text("desc"));
                return Err(MonitorError::Refused {
                    command: command.to_owned(),
                    class,
                    description,
                });
            } else {
                return Err(self.protocol("neither a reply nor an event"));
            }
        }
    }

    /// The next event, in the order QEMU sent them; `None` when `deadline` passes without one.
    ///
    /// # Errors
    /// When QEMU ends or talks nonsense.
    pub fn next_event(&mut self, deadline: Instant) -> Result<Option<Event>, MonitorError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.receive("an event", deadline) {
                Ok(message) => self.set_aside(message),
                Err(MonitorError::Timeout { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// An event that has arrived already; does not wait. Call it until `None` after poll(2) says readable, and
    /// before going to sleep in poll(2): events may have come with the reply to a command.
    ///
    /// # Errors
    /// When QEMU ended or talks nonsense.
    pub fn poll_event(&mut self) -> Result<Option<Event>, MonitorError> {
        self.next_event(Instant::now())
    }

    /// From now on events are told to `listener` as soon as they are read, also while a command waits for its answer,
    /// and are not queued.
    pub fn listen(&mut self, listener: impl FnMut(&Event) + Send + 'static) {
        self.listener = Some(Listener(Box::new(listener)));
        while let Some(event) = self.events.pop_front() {
            self.tell(event);
        }
    }

    /// Reads what has arrived already, at most so many messages; does not wait.
    ///
    /// # Errors
    /// As [`poll_event`](Self::poll_event).
    pub fn hear(&mut self, most: usize) -> Result<(), MonitorError> {
        for _ in 0..most {
            match self.receive("an event", Instant::now()) {
                Ok(message) => self.set_aside(message),
                Err(MonitorError::Timeout { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn tell(&mut self, event: Event) {
        match &mut self.listener {
            Some(Listener(listener)) => listener(&event),
            None => self.queue(event),
        }
    }

    /// Events thrown away because nobody fetched them: repetitions of the most frequent first.
    pub fn lost_events(&self) -> u64 {
        self.lost_events
    }

    /// Tells or queues an event; drops what is not one.
    fn set_aside(&mut self, mut message: Value) {
        let Some(name) = message.get("event").and_then(Value::as_str).map(str::to_owned) else {
            tracing::debug!("dropped QEMU's late answer to an earlier command");
            return;
        };
        let stamp = |key| message["timestamp"].get(key).and_then(Value::as_u64).unwrap_or(0);
        let at = Duration::from_secs(stamp("seconds")) + Duration::from_micros(stamp("microseconds"));
        let data = message["data"].take();
        self.tell(Event { name, data, at });
    }

    /// When the queue is full, an older event of the same name goes, so that a flood of one kind does not wash out the one
    /// STOP that matters; else the oldest.
    fn queue(&mut self, event: Event) {
        if self.events.len() >= MAX_EVENTS {
            let victim = self.events.iter().position(|old| old.name == event.name);
            self.events.remove(victim.unwrap_or(0));
            self.lost_events += 1;
        }
        self.events.push_back(event);
    }

    fn send(&mut self, command: &str, mut bytes: &[u8], deadline: Instant) -> Result<(), MonitorError> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => {
                    return Err(MonitorError::Closed {
                        path: self.path.clone(),
                    })
                }
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) => self.wait_or(error, PollFlags::POLLOUT, command, deadline)?,
            }
        }
        Ok(())
    }

    /// The next message, of whatever kind.
    fn receive(&mut self, awaited: &str, deadline: Instant) -> Result<Value, MonitorError> {
        let mut buffer = [0; 16 << 10];
        loop {
            if let Some(found) = self.input[self.searched..].iter().position(|&byte| byte == b'\n') {
                let end = self.searched + found;
                let message = serde_json::from_slice(&self.input[..end]);
                self.input.drain(..=end);
                self.searched = 0;
                return match message {
                    Ok(message @ Value::Object(_)) => Ok(message),
                    Ok(_) => Err(self.protocol("a message that is not an object")),
                    Err(error) => Err(self.protocol(&error.to_string())),
                };
            }
            self.searched = self.input.len();
            if self.input.len() > MAX_LINE {
                return Err(self.protocol("a line longer than 16 MiB"));
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Err(MonitorError::Closed {
                        path: self.path.clone(),
                    })
                }
                Ok(got) => self.input.extend_from_slice(&buffer[..got]),
                Err(error) => self.wait_or(error, PollFlags::POLLIN, awaited, deadline)?,
            }
        }
    }

    /// After a read or write that failed: waits where it only would have blocked.
    fn wait_or(
        &self,
        error: io::Error,
        flags: PollFlags,
        awaited: &str,
        deadline: Instant,
    ) -> Result<(), MonitorError> {
        match error.kind() {
            io::ErrorKind::WouldBlock => {}
            io::ErrorKind::Interrupted => return Ok(()),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                return Err(MonitorError::Closed {
                    path: self.path.clone(),
                })
            }
            _ => return Err(self.io(error)),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a wait for less than a millisecond must not become a busy loop.
        let millis = left.as_micros().div_ceil(1000).try_into().unwrap_or(i32::MAX);
        let mut fds = [PollFd::new(self.stream.as_fd(), flags)];
        match poll(
            &mut fds,
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(0) if left.is_zero() || Instant::now() >= deadline => Err(MonitorError::Timeout {
                command: awaited.to_owned(),
                path: self.path.clone(),
            }),
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(self.io(errno.into())),
        }
    }

    fn io(&self, source: io::Error) -> MonitorError {
        MonitorError::Io {
            path: self.path.clone(),
            source,
        }
    }

    pub(crate) fn protocol(&self, what: &str) -> MonitorError {
        MonitorError::Protocol {
            path: self.path.clone(),
            what: what.to_owned(),
        }
    }
}

impl AsFd for Monitor {
    /// For poll(2); do not read from it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    //! What no QEMU does on demand: floods and nonsense. The rest is tested on a real one (tests/qemu.rs).

    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// Connects to a peer that greets, accepts the negotiation, then sends `answer` to the next command and hangs up.
    fn ask(answer: Vec<u8>) -> (Monitor, Result<Value, MonitorError>) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).expect("a socket");
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut lines = BufReader::new(stream.try_clone().expect("a copy")).lines();
            stream.write_all(b"{\"QMP\": {}}\n").expect("greeting");
            lines.next();
            stream
                .write_all(b"{\"return\": {}, \"id\": 1}\n")
                .expect("accepting");
            lines.next();
            let _ = stream.write_all(&answer);
        });
        let mut monitor = Monitor::connect(&path, soon()).expect("a connection");
        let answer = monitor.execute("query-status", json!({}), soon());
        (monitor, answer)
    }

    #[test]
    fn a_flood_of_one_event_does_not_wash_out_another() {
        let mut answer = b"{\"event\": \"STOP\"}\n".to_vec();
        let flood = b"{\"event\": \"MIGRATION\", \"data\": {\"n\": 1}, \"timestamp\": {\"seconds\": 7}}\n";
        (0..5 * MAX_EVENTS).for_each(|_| answer.extend_from_slice(flood));
        answer.extend_from_slice(b"{\"return\": 99, \"id\": 77}\n{\"return\": 5, \"id\": 2}\n");
        let (mut monitor, answer) = ask(answer);
        assert_eq!(answer.expect("the answer with our id"), 5);
        let first = monitor.next_event(soon()).expect("an event").expect("in time");
        assert_eq!((first.name.as_str(), first.at), ("STOP", Duration::ZERO));
        let second = monitor.next_event(soon()).expect("an event").expect("in time");
        assert_eq!(
            (second.name.as_str(), second.at),
            ("MIGRATION", Duration::from_secs(7))
        );
        assert_eq!(second.data, json!({ "n": 1 }));
        assert_eq!(monitor.lost_events(), 4 * MAX_EVENTS as u64 + 1);
    }

    #[test]
    fn nonsense_is_an_error() {
        let endless = vec![b'x'; MAX_LINE + 100_000];
        for nonsense in [
            &b"nonsense\n"[..],
            b"[]\n",
            b"{}\n",
            b"\xff\xfe\n",
            b"{\"return\": \n",
            &endless,
        ] {
            let (_, answer) = ask(nonsense.to_vec());
            assert!(matches!(answer, Err(MonitorError::Protocol { .. })), "{answer:?}");
        }
        let (_, cut) = ask(b"{\"return\": {}, \"id\"".to_vec());
        assert!(matches!(cut, Err(MonitorError::Closed { .. })), "{cut:?}");
        let (_, error) = ask(b"{\"error\": {\"class\": \"X\", \"desc\": \"why\"}, \"id\": 2}\n".to_vec());
        let Err(MonitorError::Refused {
            class, description, ..
        }) = error
        else {
            panic!("{error:?}")
        };
        assert_eq!((class.as_str(), description.as_str()), ("X", "why"));
    }
}
