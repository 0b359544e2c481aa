//! The engine's end of the socket to its plug-in: requests in, replies and a steady report out.

use crate::live::signals::{End, Signals};
use ferry_contract::control::{Message, Reply, Request, Statistics, MAX_LINE};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How often the engine reports, which is also its sign of life.
const REPORT: Duration = Duration::from_millis(200);
/// A daemon that does not read for this long is as good as gone.
const WRITE: Duration = Duration::from_secs(30);

/// The figures of the migration, written by who moves the memory and read by who reports.
#[derive(Debug, Default)]
pub struct Meter {
    /// See [`Statistics::total`]; so for the others.
    pub total: AtomicU64,
    /// Bytes whose newest content still has to be sent.
    pub remaining: AtomicU64,
    /// Bytes of page data.
    pub data: AtomicU64,
    /// Bytes of zeros told.
    pub zero: AtomicU64,
    /// Bytes on the wire.
    pub wire: AtomicU64,
    /// The round.
    pub iteration: AtomicU64,
    /// Pages a second.
    pub dirty_rate: AtomicU64,
    /// Bytes a second.
    pub bandwidth: AtomicU64,
    /// Percent.
    pub throttle: AtomicU64,
}

impl Meter {
    fn read(&self, silent: bool) -> Statistics {
        let of = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        Statistics {
            total: of(&self.total),
            remaining: of(&self.remaining),
            data: of(&self.data),
            zero: of(&self.zero),
            wire: of(&self.wire),
            iteration: of(&self.iteration),
            dirty_rate: of(&self.dirty_rate),
            bandwidth: of(&self.bandwidth),
            throttle: of(&self.throttle),
            silent,
        }
    }
}

/// Answers the plug-in.
#[derive(Clone)]
pub struct Control {
    socket: Arc<Mutex<UnixStream>>,
    meter: Arc<Meter>,
    signals: Arc<Signals>,
}

impl Control {
    /// Starts to listen to the plug-in on this socket: its requests and its end go to `signals`. Reports for as
    /// long as the process lives.
    pub fn open(socket: UnixStream, meter: Arc<Meter>, signals: Arc<Signals>) -> std::io::Result<Self> {
        socket.set_write_timeout(Some(WRITE))?;
        let reader = BufReader::new(socket.try_clone()?);
        std::thread::Builder::new().name("control".into()).spawn({
            let signals = Arc::clone(&signals);
            move || listen(reader, &signals)
        })?;
        let control = Self {
            socket: Arc::new(Mutex::new(socket)),
            meter,
            signals,
        };
        let reporter = control.clone();
        std::thread::Builder::new().name("report".into()).spawn(move || {
            let mut silent = false;
            loop {
                silent = reporter.signals.wait_for_silence(!silent, REPORT);
                reporter.report();
            }
        })?;
        Ok(control)
    }

    /// Answers the request under way; the figures go first, so that what follows finds them true.
    pub fn reply(&self, reply: Reply) {
        self.report();
        self.say(&Message::Reply(reply));
    }

    /// Tells how far the memory is, out of turn.
    pub fn report(&self) {
        let silent = self.signals.is_silent();
        self.say(&Message::Progress(self.meter.read(silent)));
    }

    fn say(&self, message: &Message) {
        let Ok(mut line) = serde_json::to_vec(message) else {
            return;
        };
        line.push(b'\n');
        let mut socket = self.socket.lock().unwrap_or_else(|e| e.into_inner());
        // A plug-in that has gone is noticed by who listens to it.
        let _ = socket.write_all(&line);
    }
}

fn listen(mut lines: impl BufRead, signals: &Signals) {
    let end = loop {
        let mut line = Vec::new();
        match lines.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line) {
            Ok(0) => break End::Abandoned,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break End::Abandoned,
        }
        match serde_json::from_slice(&line) {
            Ok(Request::Cancel) => signals.end(End::Cancelled),
            Ok(Request::Limit { bandwidth }) => signals.pace.set(bandwidth),
            Ok(request) => signals.request(request),
            Err(error) => {
                let cause = format!("the plug-in asked what this engine does not understand ({error})");
                break End::Failed(format!("{cause}: are both of one release?"));
            }
        }
    };
    signals.end(end);
}
