//! All files on their way: blocks are asked for, written, read back and compared.
//!
//! ```text
//!   queue of chunks ─▶ puller 0..n (a connection each): ask ▸ receive ▸ write ▸ start to write back ─▶ queue ─▶ verifier 0..1:
//!                                                                       wait until it is on the disk ▸ read back ▸ hash ▸ compare
//! ```

use super::chunks::{chunks, count, gaps, Chunk, Cursor};
use super::extents;
use super::hash::{self, BlockHash, Blocks};
use super::link::Peer;
use super::messages::Looked;
use super::place::Target;
use super::puller::Puller;
use super::reader::{Aligned, Reader};
use super::Error;
use crate::control::Meter;
use crate::live::signals::{End, Signals};
use ferry_contract::cold::{Kind, BLOCK};
use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

/// Threads that read back.
const VERIFIERS: usize = 2;
/// How long a source may send nothing, however often it answers, and the disks here take nothing.
const STALLED: Duration = Duration::from_secs(120);

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
    pub(super) fn is_here(&self, block: u64) -> bool {
        let after = self.have.partition_point(|run| run.start <= block);
        after > 0 && self.have[after - 1].contains(&block)
    }

    pub(super) fn length(&self, block: u64) -> usize {
        hash::length(self.looked.size, block)
    }

    /// What is here of a block, past the cache.
    pub(super) fn hash_here(&self, buffer: &mut Aligned, block: u64) -> Result<BlockHash, Error> {
        let Some(reader) = self.target.as_ref().map(Target::reader).or(self.reader.as_ref()) else {
            return Ok(None);
        };
        let length = self.length(block);
        let read = reader.read_back(buffer, block * BLOCK, length);
        read.map_err(Error::file("read back", &self.path))?;
        Ok(hash::block(buffer.get(length)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        Puller::new(self, number).run()
    }

    /// What is to be asked for next; none also after a failure.
    pub(super) fn next(&self) -> Option<Chunk> {
        let mut queue = self.lock();
        if queue.failure.is_some() {
            return None;
        }
        queue
            .pull
            .next(|file| self.files.get(file).map(|file| file.runs.as_slice()))
    }

    /// So many bytes of blocks have been answered.
    pub(super) fn answered(&self, length: usize) {
        self.received.fetch_add(length as u64, Relaxed);
        self.measure();
    }

    /// A chunk has been written.
    pub(super) fn written(&self, chunk: Chunk) -> Result<(), Error> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{self, Security};

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
            target: Some(Target::file(&path, size).unwrap()),
            path,
            looked,
            reader: None,
            runs: runs.iter().filter(|run| !run.is_empty()).cloned().collect(),
            have: Vec::new(),
            blocks: Mutex::default(),
        }
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
                while let Ok(connection) = listener.accept(&theirs, Instant::now() + STALLED) {
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
}
