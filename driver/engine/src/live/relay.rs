//! QEMU's own stream, handed from one QEMU to the other, both ways.
//!
//! Two connections, one a direction: `DeviceState` from source to destination, `ReturnPath` back. What QEMU wrote
//! before its switch-over passes at once: from libvirt 11 on it waits for an answer of the destination's (12 bytes,
//! switchover-ack) and spins at full speed until it comes. What it wrote after, device state, is withheld from the
//! destination's QEMU until all memory is in place there: QEMU reads guest RAM while it loads (virtio rings).
//!
//! Device state is not even read before the last of the memory has been: QEMU then stands in its write, its big lock held,
//! and none of its devices can change memory that their state knows nothing of (see [`Narrow`](crate::qemu::Narrow)).

use super::queue::{queue, Receiver, Sender};
use super::signals::{End, Signals};
use super::watch::{deadline, Watch};
use super::Error;
use crate::qemu::{stands, Devices, Narrow, Process};
use crate::wire::chunk::{self, Kind};
use crate::wire::Connection;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes read from QEMU at a time.
const CHUNK: usize = 64 << 10;
/// Bytes withheld at most; then the source's QEMU waits, and with it the last copy. What QEMU writes of its own RAM after the
/// switch-over is among them: less than the largest video memory there is (512 MiB, see `LARGEST_STREAMED` in qemu/ram.rs).
const WITHHELD: usize = 640 << 20;
/// Chunks besides the first that one answer of QEMU's is for: what more of them would save is not worth their memory.
const BATCH: usize = 63;
/// How often, [`LOOK`] apart, a thread that has the monitor is given the time to note what QEMU has said on it.
const HEARING: u32 = 1000;
/// A QEMU that is to write device state and is silent for so long is asked whether it has written all of it, milliseconds.
const SILENCE: u16 = 500;
/// For an answer to that: the guest stands still, and one that has written all answers at once.
const ANSWER: Duration = Duration::from_millis(100);
/// A QEMU that may write device state, and neither comes to it nor answers for so long, is given up: the guest runs on here.
const UNWRITTEN: Duration = Duration::from_secs(60);
/// Between two looks whether QEMU writes device state: the guest stands still meanwhile.
const LOOK: Duration = Duration::from_micros(100);

/// The socket libvirt's Perform connects to; its path goes with it.
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Makes the socket, for root only.
    pub fn open(directory: &Path, session: uuid::Uuid) -> Result<Self, Error> {
        let failed = |error: std::io::Error| {
            Error::Elsewhere(format!(
                "cannot make the socket for libvirt in {}: {error}; set another runtime_directory in {}",
                directory.display(),
                ferry_contract::config::PATH
            ))
        };
        std::fs::create_dir_all(directory).map_err(failed)?;
        let path = directory.join(format!("{}.out", &session.simple().to_string()[..8]));
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let door = Self { listener, path };
        std::fs::set_permissions(&door.path, PermissionsExt::from_mode(0o600)).map_err(failed)?;
        Ok(door)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for libvirt, for as long as the migration lives.
    fn accept(&self, signals: &Signals) -> Result<UnixStream, Error> {
        loop {
            signals.check()?;
            let mut polled = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            // Woken now and then to look whether the migration still lives.
            if let Ok(1..) = poll(&mut polled, PollTimeout::from(100u16)) {
                let (stream, _) = self
                    .listener
                    .accept()
                    .map_err(Error::system("accept QEMU's stream"))?;
                return Ok(stream);
            }
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Nobody else knows it; at worst a dead socket stays until the host restarts.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Runs a direction of the relay on its own thread; its failure ends the migration.
fn run(
    name: &str,
    signals: &Arc<Signals>,
    relay: impl FnOnce() -> Result<(), Error> + Send + 'static,
) -> Result<(), Error> {
    let signals = Arc::clone(signals);
    let body = move || {
        // A QEMU whose relay is gone without a word would stand still for ever.
        let outcome = catch_unwind(AssertUnwindSafe(relay));
        let outcome = outcome.unwrap_or_else(|_| Err(Error::Elsewhere("a relay thread panicked".into())));
        match outcome {
            Ok(()) => {}
            Err(Error::Wire(error)) => signals.end(End::Lost(error.to_string())),
            Err(error) => signals.end(End::Failed(error.to_string())),
        }
    };
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(Error::system("start a thread"))?;
    Ok(())
}

/// The source's relay: from libvirt's connection to the destination's engine and back.
pub fn from_source(
    door: Door,
    watch: Arc<Watch>,
    process: Arc<Process>,
    signals: &Arc<Signals>,
    out: Connection,
    back: Connection,
) -> Result<(), Error> {
    let inner = Arc::clone(signals);
    run("relay", signals, move || {
        let qemu = door.accept(&inner)?;
        let path = door.path().to_owned();
        drop(door);
        inner
            .watch_socket(&qemu)
            .map_err(Error::system("share QEMU's stream"))?;
        let other = qemu.try_clone().map_err(Error::system("share QEMU's stream"))?;
        run("return-path", &inner, move || to_qemu(back, &other))?;
        let gate = BeforeDevices {
            watch: Arc::clone(&watch),
            signals: Arc::clone(&inner),
            process,
            path,
            narrow: None,
            devices: Devices::default(),
            silences: 0,
            answered: false,
        };
        from_qemu(qemu, out, &inner, gate, |switched| {
            // Read first, asked then: while QEMU says setup or active, what has been read predates the switch-over.
            match switched || inner.seen().drained.is_some() || !watch.before_switchover()? {
                true => Ok(Kind::Held),
                false => Ok(Kind::Early),
            }
        })
    })
}

/// What may be read of a QEMU's stream, and when.
trait Gate: Send {
    /// There is something to be read, or was nothing for [`SILENCE`]: returns when it may be read.
    fn before(&mut self, qemu: &UnixStream, ready: bool) -> Result<(), Error>;
    /// This has been read.
    fn after(&mut self, bytes: &[u8]);
}

/// All, at any time.
struct Open;

impl Gate for Open {
    fn before(&mut self, _: &UnixStream, _: bool) -> Result<(), Error> {
        Ok(())
    }

    fn after(&mut self, _: &[u8]) {}
}

/// All up to the source's device state, and that when the last of its memory has been copied.
struct BeforeDevices {
    watch: Arc<Watch>,
    signals: Arc<Signals>,
    process: Arc<Process>,
    /// The door's name.
    path: PathBuf,
    narrow: Option<Narrow>,
    devices: Devices,
    /// How often in a row it was silent since it has been let go on.
    silences: u32,
    /// It answered at the last of them.
    answered: bool,
}

impl BeforeDevices {
    /// Whether libvirt has let QEMU go on. What QEMU has said on its monitor before it wrote what has been read has arrived
    /// there too, and is heard here or by a thread that has the monitor. A monitor that is gone is for others to notice.
    fn is_switched(&self) -> bool {
        for _ in 0..HEARING {
            if self.signals.seen().switched.is_some() || self.watch.hear().unwrap_or(true) {
                break;
            }
            std::thread::sleep(LOOK);
        }
        self.signals.seen().switched.is_some()
    }

    /// Waits until QEMU, which has begun with its devices, stands in its write; false where it has written all. One that does
    /// neither is still at a device: a TPM ends its command first, and completes other devices' requests meanwhile (QEMU 7.2
    /// and 10.0, `tpm_backend_finish_sync`).
    fn stands(&self, qemu: &UnixStream) -> Result<bool, Error> {
        let stands = || stands(qemu).map_err(Error::system("look at QEMU's stream"));
        let mut pause = Duration::from_millis(SILENCE.into());
        let mut asked = deadline(pause);
        while !stands()? {
            if Instant::now() >= asked {
                if self.watch.answers(ANSWER)? {
                    return stands();
                }
                self.in_time()?;
                pause *= 2;
                asked = deadline(pause);
            }
            self.signals.check()?;
            std::thread::sleep(LOOK);
        }
        Ok(true)
    }

    /// Whether QEMU, which has been silent for [`SILENCE`] once more, has written all. If it has not, its main loop waits for
    /// its lock, and may have written guest memory until it got that far: ending the block devices takes what their disks take.
    ///
    /// One answer is not enough: between what it writes of RAM and its first device QEMU 10.0 lets go of its lock, and answers
    /// what has waited since before. What it wrote by then is there to be read; the rest is a matter of milliseconds.
    fn has_ended(&mut self, qemu: &UnixStream) -> Result<bool, Error> {
        let Some(switched) = self.signals.seen().switched else {
            return Ok(false);
        };
        if switched.elapsed() < Duration::from_millis(SILENCE.into()) {
            return Ok(false);
        }
        self.in_time()?;
        self.silences += 1;
        // QEMU queues 8 commands of a monitor.
        if !self.answered && !self.silences.is_power_of_two() {
            return Ok(false);
        }
        let before = self.answered;
        self.answered = self.watch.answers(ANSWER)? && !is_readable(qemu, 0)?;
        Ok(before && self.answered)
    }

    /// Fails where QEMU has had more time than it needs.
    fn in_time(&self) -> Result<(), Error> {
        let switched = self.signals.seen().switched;
        match switched.is_some_and(|switched| switched.elapsed() > UNWRITTEN) {
            true => Err(Error::Elsewhere(format!(
                "QEMU did not write the state of the guest's devices within {} s; is its storage reachable?",
                UNWRITTEN.as_secs()
            ))),
            false => Ok(()),
        }
    }
}

impl Gate for BeforeDevices {
    fn before(&mut self, qemu: &UnixStream, ready: bool) -> Result<(), Error> {
        if self.signals.is_copied() {
            self.narrow = None;
            return Ok(());
        }
        if ready && self.narrow.is_none() {
            // QEMU itself writes by now: what it has of libvirt's is its own.
            self.signals.check()?;
            self.narrow = Some(Narrow::new(&self.process, &self.path)?);
            if self.is_switched() {
                return Err(Error::Elsewhere(
                    "QEMU was ready to end the migration before this engine was; try again".into(),
                ));
            }
        }
        let held = match (ready, self.devices.found()) {
            (true, false) => return Ok(()),
            (true, true) if !self.is_switched() => {
                self.devices.forget();
                return Ok(());
            }
            (true, true) => self.stands(qemu)?,
            (false, _) if self.has_ended(qemu)? => false,
            (false, _) => return Ok(()),
        };
        if !held {
            // A stream that is not as it is known, all written: a guest does not stand still for what does not come.
            tracing::warn!("QEMU's device state was not recognised: it was not held back for the last copy");
        }
        self.signals.saw(|seen| seen.frozen = true);
        self.signals.wait_until_copied()?;
        self.narrow = None;
        Ok(())
    }

    fn after(&mut self, bytes: &[u8]) {
        (self.silences, self.answered) = (0, false);
        if !self.devices.found() {
            self.devices.look(bytes);
        }
    }
}

/// The destination's relay: from the source's engine to the QEMU that waits at `incoming`, and back.
pub fn to_destination(
    incoming: PathBuf,
    signals: &Arc<Signals>,
    mut from: Connection,
    back: Connection,
) -> Result<(), Error> {
    // Read on while device state is withheld: a sender whose data stays in the socket would give us up for dead.
    let (queue, chunks) = queue(WITHHELD);
    run("relay", signals, move || loop {
        let mut bytes = Vec::new();
        let kind = chunk::receive(&mut from, &mut bytes)?;
        if !queue.send(Chunk { kind, bytes }) {
            return Ok(());
        }
        match kind {
            Kind::Early | Kind::Held => {}
            Kind::Eof => return Ok(from.end_receiving()?),
            Kind::Abort => return Err(Error::Elsewhere("the source ended its stream".into())),
        }
    })?;
    let inner = Arc::clone(signals);
    run("deliver", signals, move || {
        deliver(&incoming, &inner, &chunks, back)
    })
}

/// What has come from the source.
struct Chunk {
    kind: Kind,
    bytes: Vec<u8>,
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

fn deliver(
    incoming: &Path,
    signals: &Arc<Signals>,
    chunks: &Receiver<Chunk>,
    back: Connection,
) -> Result<(), Error> {
    let Some(mut next) = chunks.recv() else {
        return Ok(());
    };
    // QEMU begins to load with the first byte, so it is connected to no sooner.
    let qemu = UnixStream::connect(incoming).map_err(Error::system("connect to the incoming QEMU"))?;
    signals
        .watch_socket(&qemu)
        .map_err(Error::system("share QEMU's stream"))?;
    let other = qemu.try_clone().map_err(Error::system("share QEMU's stream"))?;
    let inner = Arc::clone(signals);
    run("return-path", signals, move || {
        from_qemu(other, back, &inner, Open, |_| Ok(Kind::Early))
    })?;
    loop {
        match next.kind {
            Kind::Held => signals.wait_for_commitment()?,
            Kind::Early => {}
            Kind::Eof | Kind::Abort => {
                end_writing(&qemu);
                return Ok(());
            }
        }
        if !write(&qemu, &next.bytes)? {
            return Ok(());
        }
        match chunks.recv() {
            Some(chunk) => next = chunk,
            None => return Ok(()),
        }
    }
}

/// From a QEMU to the other engine, until QEMU closes. `gate` says what may be read, `kind` is asked after a chunk has been
/// read, and told whether held chunks have begun.
///
/// One thread reads on while another asks: QEMU writes device state with its big lock held, under which it answers no
/// monitor, so a reader that waited for the monitor would wait for itself (QEMU 10.0, `migration_completion`).
fn from_qemu(
    qemu: UnixStream,
    mut to: Connection,
    signals: &Arc<Signals>,
    gate: impl Gate + 'static,
    kind: impl FnMut(bool) -> Result<Kind, Error>,
) -> Result<(), Error> {
    let (queue, chunks) = queue(WITHHELD);
    run("read-qemu", signals, move || read_all(qemu, gate, &queue))?;
    pass_on(&chunks, kind, |kind, chunk| {
        Ok(chunk::send(&mut to, kind, chunk)?)
    })?;
    chunk::send(&mut to, Kind::Eof, &[])?;
    Ok(to.end_sending()?)
}

/// Sends what is read until nothing more is. What has been read by the time of a question goes by its answer: QEMU's main
/// loop gives each, and a display's memory alone makes a thousand chunks.
fn pass_on(
    chunks: &Receiver<Vec<u8>>,
    mut kind: impl FnMut(bool) -> Result<Kind, Error>,
    mut send: impl FnMut(Kind, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut held = false;
    while let Some(first) = chunks.recv() {
        let more = std::iter::from_fn(|| chunks.try_recv()).take(BATCH);
        let read: Vec<_> = std::iter::once(first).chain(more).collect();
        let kind = kind(held)?;
        held |= kind == Kind::Held;
        read.iter().try_for_each(|chunk| send(kind, chunk))?;
    }
    Ok(())
}

/// Reads until QEMU closes.
fn read_all(mut qemu: UnixStream, mut gate: impl Gate, queue: &Sender<Vec<u8>>) -> Result<(), Error> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let ready = is_readable(&qemu, SILENCE)?;
        gate.before(&qemu, ready)?;
        if !ready {
            continue;
        }
        let count = match qemu.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            // QEMU closed with something unread: its end all the same; its monitor says whether it is well.
            Err(_) => 0,
        };
        let read = &buffer[..count];
        gate.after(read);
        // Whoever sends it and has gone has ended the migration. A narrow stream gives little at a time.
        if count == 0 || !queue.send(read.to_vec()) {
            return Ok(());
        }
    }
}

/// Whether QEMU has written something, or closed, within so many milliseconds.
fn is_readable(qemu: &UnixStream, limit: u16) -> Result<bool, Error> {
    let mut polled = [PollFd::new(qemu.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut polled, limit) {
            Err(Errno::EINTR) => {}
            other => {
                let ready = other.map_err(|error| Error::system("wait for QEMU's stream")(error.into()))?;
                return Ok(ready > 0);
            }
        }
    }
}

/// From the other engine to a QEMU, until the other QEMU has closed.
fn to_qemu(mut from: Connection, qemu: &UnixStream) -> Result<(), Error> {
    let mut bytes = Vec::new();
    loop {
        match chunk::receive(&mut from, &mut bytes)? {
            Kind::Early | Kind::Held => {
                // A QEMU that has closed needs no more; what follows is read and dropped.
                write(qemu, &bytes)?;
            }
            Kind::Eof => {
                end_writing(qemu);
                return Ok(from.end_receiving()?);
            }
            Kind::Abort => return Err(Error::Elsewhere("the other engine ended QEMU's stream".into())),
        }
    }
}

/// Writes to a QEMU; false where it has closed.
fn write(mut qemu: &UnixStream, bytes: &[u8]) -> Result<bool, Error> {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    match qemu.write_all(bytes) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), BrokenPipe | ConnectionReset) => Ok(false),
        Err(error) => Err(Error::system("write to QEMU's stream")(error)),
    }
}

fn end_writing(qemu: &UnixStream) {
    // ENOTCONN: QEMU has closed already.
    let _ = qemu.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    //! What no QEMU does on demand. The rest is tested on a real one (tests/qemu.rs, tests/tests/lost_write.rs).

    use super::*;
    use crate::live::signals::Seen;
    use std::io::{BufRead, BufReader};

    /// A monitor that answers every command, or none once it has greeted; and the source's gate for a QEMU with it that was let
    /// go on `ago`.
    fn gate(answers: bool, ago: Duration) -> BeforeDevices {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            for (number, _) in (1..).zip(lines) {
                if answers || number == 1 {
                    let answer = format!("{{\"return\": {{\"status\": \"device\"}}, \"id\": {number}}}\n");
                    let _ = stream.write_all(answer.as_bytes());
                }
            }
        });
        let signals = Arc::<Signals>::default();
        let switched = Instant::now().checked_sub(ago);
        signals.saw(|seen: &mut Seen| seen.switched = switched);
        BeforeDevices {
            watch: Watch::open(&path, Arc::clone(&signals)).unwrap(),
            signals,
            process: Arc::new(Process::open(nix::unistd::getpid().as_raw()).unwrap()),
            path,
            narrow: None,
            devices: Devices::default(),
            silences: 0,
            answered: false,
        }
    }

    #[test]
    fn a_qemu_that_answers_twice_and_writes_nothing_has_written_all() {
        let (qemu, mut theirs) = UnixStream::pair().unwrap();
        let second = Duration::from_secs(1);
        let mut gate = gate(true, second);
        assert!(!gate.has_ended(&qemu).unwrap(), "it may be between two pieces");
        assert!(gate.has_ended(&qemu).unwrap());
        // It let go of its lock for a moment, after it had written something.
        let mut gate = self::gate(true, second);
        assert!(!gate.has_ended(&qemu).unwrap());
        theirs.write_all(b"the end of its memory").unwrap();
        assert!((0..4).all(|_| !gate.has_ended(&qemu).unwrap()));
        gate.after(b"the end of its memory");
        assert_eq!((gate.silences, gate.answered), (0, false));
    }

    #[test]
    fn a_qemu_that_does_not_answer_is_waited_for_and_then_given_up() {
        let (qemu, _theirs) = UnixStream::pair().unwrap();
        let mut waited_for = gate(false, Duration::from_secs(1));
        assert!((0..4).all(|_| !waited_for.has_ended(&qemu).unwrap()));
        let mut silent = gate(false, UNWRITTEN + Duration::from_secs(1));
        assert!(matches!(silent.has_ended(&qemu), Err(Error::Elsewhere(_))));
        // One that has only just been let go on is not even asked.
        let mut new = gate(true, Duration::ZERO);
        assert!((0..4).all(|_| !new.has_ended(&qemu).unwrap()));
    }

    #[test]
    fn qemu_is_asked_once_for_all_that_has_been_read() {
        let (queue, chunks) = queue(WITHHELD);
        assert!((0..200).all(|number| queue.send(vec![number])));
        drop(queue);
        let (mut asked, mut sent) = (Vec::new(), Vec::new());
        let kind = |held| {
            asked.push(held);
            Ok(if asked.len() < 3 { Kind::Early } else { Kind::Held })
        };
        let send = |kind, chunk: &[u8]| {
            sent.push((kind, chunk[0]));
            Ok(())
        };
        pass_on(&chunks, kind, send).unwrap();
        assert_eq!(asked, [false, false, false, true]);
        let early = |number| if number < 128 { Kind::Early } else { Kind::Held };
        let expected: Vec<_> = (0..200).map(|number| (early(number), number)).collect();
        assert_eq!(sent, expected);
    }
}
