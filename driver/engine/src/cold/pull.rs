//! The destination's data connections: blocks are asked for, written, read back and compared.
//!
//! ```text
//!   queue of chunks ─▶ puller 0..n (a connection each): ask ▸ receive ▸ write ▸ start to write back ─▶ queue ─▶ verifier 0..1:
//!                                                                       wait until it is on the disk ▸ read back ▸ hash ▸ compare
//! ```
//! A puller keeps some requests on their way, so that neither a round trip nor the source's disk makes it wait. One whose
//! connection is cut makes a new one and asks again for what has not been answered, and for nothing else.

use super::extents;
use super::files::{Aligned, Reader};
use super::frame::{Frame, Invalid, Want, HEADER};
use super::hash::{self, BlockHash, Blocks};
use super::messages::Looked;
use super::place::Target;
use super::serve::bad;
use super::Error;
use crate::control::Meter;
use crate::live::signals::{End, Signals};
use crate::wire::{self, connect, Connection, Purpose, Security};
use ferry_contract::cold::{Kind, BLOCK};
use ferry_contract::control::FailureKind;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

/// Blocks that are asked for, written back and verified together.
const CHUNK: u64 = 16;
/// Requests of one connection that are on their way: 8 MiB, so that the source always knows what comes next.
const DEPTH: usize = 8;
/// Threads that read back.
const VERIFIERS: usize = 2;
/// How long a cut connection is tried again. The source waits a little longer.
pub const RECONNECT: Duration = Duration::from_secs(50);
/// How long a source may send nothing, however often it answers, and the disks here take nothing.
const STALLED: Duration = Duration::from_secs(120);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest attempt.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Where the source is, and how to speak to it.
pub struct Peer {
    /// Its engine.
    pub addresses: Vec<SocketAddr>,
    /// The session.
    pub security: Security,
}

impl Peer {
    /// Connects, again and again for some time where the network or the other engine does not answer.
    ///
    /// # Errors
    /// The session has ended, the other engine refuses, or the time is up.
    pub fn connect(
        &self,
        purpose: Purpose,
        signals: &Signals,
        patience: Duration,
    ) -> Result<Connection, Error> {
        let end = Instant::now() + patience;
        loop {
            signals.check()?;
            let deadline = end.min(Instant::now() + ATTEMPT);
            match connect(&self.addresses, &self.security, purpose, deadline) {
                Ok(connection) => {
                    signals.watch(connection.breaker());
                    return Ok(connection);
                }
                Err(error) if is_cut(&error) && Instant::now() + PAUSE < end => std::thread::sleep(PAUSE),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether trying again may help.
pub fn is_cut(error: &wire::Error) -> bool {
    use wire::Error::{Io, PeerGone, Timeout};
    matches!(error, PeerGone { .. } | Timeout { .. } | Io { .. })
}

/// A file that is pulled, or only compared.
pub struct Incoming {
    /// Its number in the inventory.
    pub number: u32,
    /// At the source.
    pub source: PathBuf,
    /// At the destination.
    pub path: PathBuf,
    /// What it is like at the source.
    pub looked: Looked,
    /// Where its content goes; none where what is here already is compared.
    pub target: Option<Target>,
    /// To read what is here.
    pub reader: Option<Reader>,
    /// Blocks that have to be asked for.
    pub runs: Vec<Range<u64>>,
    /// Blocks of which something is here already.
    pub have: Vec<Range<u64>>,
    /// What the source says of its blocks.
    pub blocks: Mutex<Blocks>,
}

impl Incoming {
    fn is_here(&self, block: u64) -> bool {
        let after = self.have.partition_point(|run| run.start <= block);
        after > 0 && self.have[after - 1].contains(&block)
    }

    fn length(&self, block: u64) -> usize {
        hash::length(self.looked.size, block)
    }

    /// What is here of a block, past the cache.
    fn hash_here(&self, buffer: &mut Aligned, block: u64) -> Result<BlockHash, Error> {
        let Some(reader) = self.target.as_ref().map(Target::reader).or(self.reader.as_ref()) else {
            return Ok(None);
        };
        let length = self.length(block);
        let read = reader.read_back(buffer, block * BLOCK, length);
        read.map_err(Error::file("read back", &self.path))?;
        Ok(hash::block(buffer.get(length)))
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Some blocks of a file.
#[derive(Debug, Clone)]
struct Chunk {
    file: usize,
    blocks: Range<u64>,
}

/// All files on their way.
pub struct Pull<'a> {
    /// The source.
    pub peer: &'a Peer,
    /// The files.
    pub files: Vec<Incoming>,
    /// The session's end.
    pub signals: &'a Signals,
    /// For the statistics.
    pub meter: &'a Arc<Meter>,
    /// Bytes answered, however they were.
    received: AtomicU64,
    /// Bytes read back and found the same.
    pub verified: AtomicU64,
    /// See [`STALLED`].
    patience: Duration,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    pull: Cursor,
    verify: VecDeque<Chunk>,
    /// Chunks that are not verified yet.
    open: usize,
    failure: Option<Error>,
}

impl<'a> Pull<'a> {
    /// Plans the transfer of these files.
    pub fn new(peer: &'a Peer, files: Vec<Incoming>, signals: &'a Signals, meter: &'a Arc<Meter>) -> Self {
        let mut queue = Queue::default();
        let (mut total, mut zeroed) = (0, 0);
        for (index, file) in files.iter().enumerate() {
            queue.open += file.runs.iter().map(count).sum::<usize>();
            total += extents::bytes(&file.runs, file.looked.size);
            // What a device held before must be gone, also where the source has nothing.
            if file
                .target
                .as_ref()
                .is_some_and(|target| target.kind() == Kind::Block)
            {
                let gaps = gaps(&file.runs, file.looked.size);
                zeroed += extents::bytes(&gaps, file.looked.size);
                queue.verify.extend(chunks(index, &gaps));
            }
        }
        queue.open += queue.verify.len();
        total += zeroed;
        meter.total.store(total, Relaxed);
        meter.remaining.store(total, Relaxed);
        Self {
            peer,
            files,
            signals,
            meter,
            received: AtomicU64::new(zeroed),
            verified: AtomicU64::new(0),
            patience: STALLED,
            queue: Mutex::new(queue),
            changed: Condvar::new(),
        }
    }

    /// Pulls and verifies everything over so many connections; `meanwhile` is called about twice a second.
    ///
    /// # Errors
    /// The first failure of any thread.
    pub fn run(
        &self,
        streams: u16,
        mut meanwhile: impl FnMut(u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        std::thread::scope(|scope| {
            for number in 0..streams {
                self.start(scope, "pull", move |pull| pull.pull(number))?;
            }
            for _ in 0..VERIFIERS {
                self.start(scope, "verify", Self::verify)?;
            }
            let (mut last, mut moved) = (0, Instant::now());
            loop {
                let (queue, _) = self
                    .changed
                    .wait_timeout_while(self.lock(), Duration::from_millis(500), |queue| {
                        queue.open > 0 && queue.failure.is_none()
                    })
                    .unwrap_or_else(PoisonError::into_inner);
                let done = queue.open == 0 || queue.failure.is_some();
                drop(queue);
                let verified = self.verified.load(Relaxed);
                let now = verified + self.received.load(Relaxed);
                if now != last {
                    (last, moved) = (now, Instant::now());
                }
                let going = match moved.elapsed() < self.patience {
                    true => Ok(()),
                    false => Err(Error::Other(format!(
                        "nothing was received or written for {} s: look at the network, at the disks of both hosts, and at \
                         the engine's log on the source",
                        self.patience.as_secs()
                    ))),
                };
                if let Err(error) = going
                    .and_then(|()| self.signals.check().map_err(Error::from))
                    .and_then(|()| meanwhile(verified))
                {
                    self.fail(error);
                }
                if done {
                    return Ok(());
                }
            }
        })
        .and_then(|()| match self.lock().failure.take() {
            Some(error) => Err(error),
            None => Ok(()),
        })
    }

    fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        name: &str,
        work: impl FnOnce(&'scope Self) -> Result<(), Error> + Send + 'scope,
    ) -> Result<(), Error> {
        let span = tracing::Span::current();
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn_scoped(scope, move || {
                let _entered = span.enter();
                if let Err(error) = work(self) {
                    self.fail(error);
                }
            });
        thread.map(drop).map_err(|error| {
            let error = Error::Other(format!("cannot start a thread: {error}"));
            self.fail(Error::Other(error.to_string()));
            error
        })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first failure counts, and ends everybody.
    fn fail(&self, error: Error) {
        let mut queue = self.lock();
        if queue.failure.is_none() {
            let end = match &error {
                Error::Ended(crate::live::Error::Cancelled) => End::Cancelled,
                Error::Ended(crate::live::Error::Abandoned) => End::Abandoned,
                error => End::Failed(error.to_string()),
            };
            queue.failure = Some(error);
            drop(queue);
            self.signals.end(end);
        }
        self.changed.notify_all();
    }

    fn pull(&self, number: u16) -> Result<(), Error> {
        let mut puller = Puller {
            pull: self,
            number,
            connection: None,
            wanted: VecDeque::new(),
            asked: 0,
            buffer: Aligned::default(),
            block: Aligned::default(),
            spans: Vec::new(),
            payload: vec![0; BLOCK as usize],
            unpacker: None,
        };
        puller.run()
    }

    fn next(&self) -> Option<Chunk> {
        let mut queue = self.lock();
        if queue.failure.is_some() {
            return None;
        }
        queue.pull.next(&self.files)
    }

    /// A chunk has been written.
    fn written(&self, chunk: Chunk) -> Result<(), Error> {
        let file = &self.files[chunk.file];
        if let Some(target) = &file.target {
            let length = extents::bytes(std::slice::from_ref(&chunk.blocks), file.looked.size);
            target.write_back(chunk.blocks.start * BLOCK, length, false)?;
        }
        self.lock().verify.push_back(chunk);
        self.changed.notify_all();
        Ok(())
    }

    fn verify(&self) -> Result<(), Error> {
        let mut buffer = Aligned::default();
        loop {
            let mut queue = self
                .changed
                .wait_while(self.lock(), |queue| {
                    queue.verify.is_empty() && queue.open > 0 && queue.failure.is_none()
                })
                .unwrap_or_else(PoisonError::into_inner);
            if queue.failure.is_some() {
                return Ok(());
            }
            let Some(chunk) = queue.verify.pop_front() else {
                return Ok(());
            };
            drop(queue);
            self.compare(&mut buffer, &chunk)?;
            let mut queue = self.lock();
            queue.open -= 1;
            if queue.open == 0 {
                self.changed.notify_all();
            }
        }
    }

    fn compare(&self, buffer: &mut Aligned, chunk: &Chunk) -> Result<(), Error> {
        let file = &self.files[chunk.file];
        let length = extents::bytes(std::slice::from_ref(&chunk.blocks), file.looked.size);
        if let Some(target) = &file.target {
            target.write_back(chunk.blocks.start * BLOCK, length, true)?;
            for block in chunk.blocks.clone() {
                if file.hash_here(buffer, block)? != file.lock().get(block) {
                    return Err(Error::Damaged {
                        path: file.path.clone(),
                        from: file.source.clone(),
                        offset: block * BLOCK,
                    });
                }
            }
        }
        self.verified.fetch_add(length, Relaxed);
        self.measure();
        Ok(())
    }

    /// Half of the work on a byte is to get it, the other half to find it verified.
    fn measure(&self) {
        let total = self.meter.total.load(Relaxed);
        let left = |done: &AtomicU64| total.saturating_sub(done.load(Relaxed));
        let remaining = (left(&self.received) + left(&self.verified)) / 2;
        self.meter.remaining.store(remaining, Relaxed);
    }
}

/// What is to be asked for next: a list of all chunks would be as long as the source wants.
#[derive(Debug, Default)]
struct Cursor {
    file: usize,
    run: usize,
    block: u64,
}

impl Cursor {
    fn next(&mut self, files: &[Incoming]) -> Option<Chunk> {
        loop {
            let file = files.get(self.file)?;
            let Some(run) = file.runs.get(self.run) else {
                *self = Self {
                    file: self.file + 1,
                    ..Self::default()
                };
                continue;
            };
            let start = run.start.max(self.block);
            let end = run.end.min(start + CHUNK);
            if start >= end {
                self.run += 1;
                continue;
            }
            self.block = end;
            let (file, blocks) = (self.file, start..end);
            return Some(Chunk { file, blocks });
        }
    }
}

/// Chunks of a run.
fn count(run: &Range<u64>) -> usize {
    (run.end - run.start).div_ceil(CHUNK) as usize
}

fn chunks(file: usize, runs: &[Range<u64>]) -> impl Iterator<Item = Chunk> + '_ {
    runs.iter().flat_map(move |run| {
        let end = run.end;
        run.clone().step_by(CHUNK as usize).map(move |start| Chunk {
            file,
            blocks: start..end.min(start + CHUNK),
        })
    })
}

/// What lies between runs, to the end of the file.
fn gaps(runs: &[Range<u64>], size: u64) -> Vec<Range<u64>> {
    let end = size.div_ceil(BLOCK);
    let mut at = 0;
    let mut gaps = Vec::new();
    for run in runs.iter().cloned().chain(std::iter::once(end..end)) {
        if run.start > at {
            gaps.push(at..run.start);
        }
        at = run.end;
    }
    gaps
}

/// Both, joined.
pub fn union(one: &[Range<u64>], two: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all: Vec<_> = one
        .iter()
        .chain(two)
        .filter(|run| !run.is_empty())
        .cloned()
        .collect();
    all.sort_by_key(|run| run.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for run in all {
        match joined.last_mut() {
            Some(last) if last.end >= run.start => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

/// A block to be had; the last one of its chunk brings that along.
struct Wanted {
    file: usize,
    block: u64,
    ends: Option<Chunk>,
}

struct Puller<'a> {
    pull: &'a Pull<'a>,
    number: u16,
    connection: Option<Connection>,
    /// Not answered yet, in the order of asking; the first `asked` of them are on their way.
    wanted: VecDeque<Wanted>,
    asked: usize,
    /// For what is here already.
    buffer: Aligned,
    /// The block that is being received, and where in it there is something, in ascending order.
    block: Aligned,
    spans: Vec<Range<usize>>,
    /// What has to be unpacked first.
    payload: Vec<u8>,
    unpacker: Option<zstd::bulk::Decompressor<'static>>,
}

impl Puller<'_> {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            match self.step() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(Error::Wire(error)) if is_cut(&error) => {
                    self.pull.signals.check()?;
                    tracing::warn!(%error, stream = self.number, "the connection was cut: connecting again");
                    // One that is taken and closed at once would be made again at once.
                    std::thread::sleep(PAUSE);
                    self.connection = None;
                    self.asked = 0;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks for what there is room for and takes one answer; false when there is nothing left to ask for.
    fn step(&mut self) -> Result<bool, Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self
                .pull
                .peer
                .connect(Purpose::Data(self.number), self.pull.signals, RECONNECT)?,
        };
        while self.asked < DEPTH {
            if self.asked == self.wanted.len() {
                let Some(chunk) = self.pull.next() else { break };
                let last = chunk.blocks.end - 1;
                let wanted = chunk.blocks.clone().map(|block| Wanted {
                    file: chunk.file,
                    block,
                    ends: (block == last).then(|| chunk.clone()),
                });
                self.wanted.extend(wanted);
            }
            let Wanted { file, block, .. } = self.wanted[self.asked];
            let file = &self.pull.files[file];
            let have = match file.is_here(block) || file.target.is_none() {
                true => Some(file.hash_here(&mut self.buffer, block)?),
                false => None,
            };
            let want = Want {
                file: file.number,
                block,
                have,
            };
            connection.send(&[&want.encode()], "asking for a block")?;
            self.asked += 1;
        }
        if self.wanted.is_empty() {
            return Ok(false);
        }
        self.take(&mut connection)?;
        self.connection = Some(connection);
        self.asked -= 1;
        let Some(answered) = self.wanted.pop_front() else {
            return Ok(false);
        };
        let length = self.pull.files[answered.file].length(answered.block);
        self.pull.received.fetch_add(length as u64, Relaxed);
        self.pull.measure();
        if let Some(chunk) = answered.ends {
            self.pull.written(chunk)?;
        }
        Ok(true)
    }

    /// Receives the answer for the first of the wanted blocks and writes it.
    fn take(&mut self, connection: &mut Connection) -> Result<(), Error> {
        let Wanted { file, block, .. } = self.wanted[0];
        let file = &self.pull.files[file];
        let (hash, same) = self.receive(connection, file.length(block))?;
        match &file.target {
            None if !same => {
                return Err(Error::Other(format!(
                    "{} is not the same as {} at the source: bases differ, move the whole chain with --copy-storage-all \
                     to other paths",
                    file.path.display(),
                    file.source.display()
                )))
            }
            Some(target) if !same => {
                // Spans leave zeros out, so what is here of the block has to go first.
                if file.is_here(block) {
                    target.zero(block * BLOCK, file.length(block) as u64)?;
                }
                for span in self.spans.drain(..) {
                    target.write(block * BLOCK, &self.block, span)?;
                }
            }
            _ => {}
        }
        match file.lock().note(block, hash) {
            true => Ok(()),
            false => Err(Error::Other(format!(
                "{} was changed while it was copied",
                file.source.display()
            ))),
        }
    }

    /// Receives an answer: into `block` what there is of it, into `spans` where. Returns what the source says of the
    /// block, and whether what is here is the same.
    fn receive(&mut self, connection: &mut Connection, length: usize) -> Result<(BlockHash, bool), Error> {
        let doing = "waiting for a block";
        let meter = self.pull.meter;
        self.spans.clear();
        loop {
            let mut header = [0; HEADER];
            connection.receive_exact(&mut header, doing)?;
            let frame = Frame::decode(&header).map_err(|what| bad(connection, what))?;
            meter.wire.fetch_add((HEADER + frame.payload()) as u64, Relaxed);
            match frame {
                Frame::Piece {
                    packed, offset, span, ..
                } => {
                    let place = offset as usize..(offset + span) as usize;
                    let end = self.spans.last().map_or(0, |last| last.end);
                    if place.start < end || place.end > length {
                        return Err(bad(connection, Invalid::Place { offset, span }));
                    }
                    let into = &mut self.block.get_mut(length)[place.clone()];
                    match packed {
                        false => connection.receive_exact(into, doing)?,
                        true => {
                            let payload = &mut self.payload[..frame.payload()];
                            connection.receive_exact(payload, doing)?;
                            if !unpack(&mut self.unpacker, payload, into) {
                                return Err(bad(connection, Invalid::Length(payload.len() as u32)));
                            }
                        }
                    }
                    meter.data.fetch_add(u64::from(span), Relaxed);
                    match self.spans.last_mut().filter(|last| last.end == place.start) {
                        Some(last) => last.end = place.end,
                        None => self.spans.push(place),
                    }
                }
                Frame::End { same } => {
                    let mut hash = [0; 32];
                    connection.receive_exact(&mut hash, doing)?;
                    return Ok((Some(hash), same));
                }
                Frame::Zeros { same } => return Ok((None, same)),
                Frame::Failed { .. } => {
                    let payload = &mut self.payload[..frame.payload()];
                    connection.receive_exact(payload, doing)?;
                    return Err(Error::Refused {
                        kind: FailureKind::Failed,
                        cause: String::from_utf8_lossy(payload).into_owned(),
                        host: connection.peer().ip().to_string(),
                    });
                }
            }
        }
    }
}

/// Whether the payload unpacks to exactly as many bytes as `into` takes; not more than that is unpacked.
fn unpack(unpacker: &mut Option<zstd::bulk::Decompressor<'static>>, payload: &[u8], into: &mut [u8]) -> bool {
    if unpacker.is_none() {
        *unpacker = zstd::bulk::Decompressor::new().ok();
    }
    let Some(zstd) = unpacker else { return false };
    let length = into.len();
    zstd.decompress_to_buffer(payload, into)
        .is_ok_and(|unpacked| unpacked == length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_and_their_gaps_known() {
        assert_eq!(union(&[0..2, 5..6], &[1..3, 6..7, 9..9]), [0..3, 5..7]);
        assert_eq!(gaps(&[1..2, 4..5], 6 * BLOCK + 1), [0..1, 2..4, 5..7]);
        assert_eq!(gaps(&[0..3, 3..7], 6 * BLOCK + 1), []);
        let chunks: Vec<_> = chunks(3, &[0..17, 20..21]).map(|chunk| chunk.blocks).collect();
        assert_eq!(chunks, [0..16, 16..17, 20..21]);
    }

    fn incoming(directory: &std::path::Path, runs: &[Range<u64>]) -> Incoming {
        let path = directory.join("disk");
        let size = runs.iter().map(|run| run.end).max().unwrap_or_default() * BLOCK;
        let looked = Looked {
            size,
            kind: Kind::File,
            mode: 0o600,
            owner: "0".into(),
            group: "0".into(),
            attributes: Vec::new(),
            acl: None,
            name: "disk".into(),
            has_nonce: false,
            sample: None,
        };
        Incoming {
            number: 0,
            source: "/disk".into(),
            target: Some(Target::file(&path, size, false).unwrap()),
            path,
            looked,
            reader: None,
            runs: runs.iter().filter(|run| !run.is_empty()).cloned().collect(),
            have: Vec::new(),
            blocks: Mutex::default(),
        }
    }

    #[test]
    fn every_block_is_asked_for_once() {
        let directory = tempfile::tempdir().unwrap();
        let (one, two) = (directory.path().join("one"), directory.path().join("two"));
        for path in [&one, &two] {
            std::fs::create_dir(path).unwrap();
        }
        let end = 1 << 22;
        let files = [
            incoming(&one, &[0..17, 20..21]),
            incoming(&two, &[5..end, end..end]),
        ];
        let open: usize = files.iter().flat_map(|file| &file.runs).map(count).sum();
        let mut cursor = Cursor::default();
        let found: Vec<_> = std::iter::from_fn(|| cursor.next(&files)).collect();
        assert_eq!(found.len(), open);
        let expected = files
            .iter()
            .enumerate()
            .flat_map(|(number, file)| chunks(number, &file.runs));
        let plain = |chunk: Chunk| (chunk.file, chunk.blocks);
        assert!(found.into_iter().map(plain).eq(expected.map(plain)));
    }

    #[test]
    fn a_source_that_sends_nothing_is_given_up() {
        let security = Security {
            session: uuid::Uuid::from_u128(1),
            token: [7; 32].into(),
            protection: wire::Protection::Plain,
        };
        for closes in [false, true] {
            let listener = wire::Listener::bind([127, 0, 0, 1].into(), 48960..=48990).unwrap();
            let peer = Peer {
                addresses: vec![listener.address()],
                security: security.clone(),
            };
            let (theirs, stop) = (security.clone(), listener.stopper());
            let source = std::thread::spawn(move || {
                let mut open = Vec::new();
                while let Ok(connection) = listener.accept(&theirs, Instant::now() + ATTEMPT) {
                    open.extend((!closes).then_some(connection));
                }
            });
            let directory = tempfile::tempdir().unwrap();
            let file = incoming(directory.path(), &[0..1, 1..1]);
            let (signals, meter) = (Signals::default(), Arc::default());
            let mut pull = Pull::new(&peer, vec![file], &signals, &meter);
            pull.patience = Duration::from_millis(700);
            // It does answer, meanwhile.
            let failed = pull.run(2, |_| Ok(())).unwrap_err();
            assert!(failed.to_string().contains("nothing was received"), "{failed}");
            stop.stop();
            source.join().unwrap();
        }
    }

    #[test]
    fn nothing_unpacks_to_more_than_it_says() {
        let packed = zstd::bulk::compress(&[0; 4096], 1).unwrap();
        let mut unpacker = None;
        let mut unpacks = |payload: &[u8], span| unpack(&mut unpacker, payload, &mut vec![1; span]);
        assert!(unpacks(&packed, 4096));
        for span in [4095, 4097, 1] {
            assert!(!unpacks(&packed, span));
        }
        assert!(!unpacks(b"not zstd", 4096));
    }
}
