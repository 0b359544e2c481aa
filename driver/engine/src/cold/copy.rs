//! Files that are copied on one host: each block is read, hashed, written, read back from the disk and compared.
//!
//! ```text
//!   chunks ─▶ worker 0..n: read ▸ hash ▸ write ▸ start to write back, then of the chunk before: wait until it is on the
//!                          disk ▸ read back ▸ hash ▸ compare
//! ```

use super::chunks::{chunks, Chunk};
use super::files::Source;
use super::hash::{self, Blocks};
use super::place::Target;
use super::reader::Aligned;
use super::{extents, Error};
use crate::control::Meter;
use crate::live::signals::Signals;
use crate::memory::{split_zero, Run};
use ferry_contract::cold::{Digest, BLOCK};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The fewest and the most threads: two keep a disk busy, more than four none busier.
const WORKERS: (usize, usize) = (2, 4);

/// One file, and what becomes of it.
#[derive(Debug)]
pub struct Pair {
    /// Where it is.
    pub from: Source,
    /// Where its copy goes: new, all holes.
    pub to: Target,
    /// What was read.
    blocks: Mutex<Blocks>,
}

impl Pair {
    /// To be copied.
    pub fn new(from: Source, to: Target) -> Self {
        Self {
            from,
            to,
            blocks: Mutex::default(),
        }
    }

    /// The digest of what was read, and is in the copy.
    pub fn digest(&self) -> Digest {
        self.lock().digest(self.from.size)
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        // A block is noted in one step.
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, buffer: &mut Aligned, block: u64) -> Result<(), Error> {
        let (offset, length) = (block * BLOCK, hash::length(self.from.size, block));
        self.from.read(buffer, offset, length)?;
        let bytes = buffer.get(length);
        self.lock().note(block, hash::block(bytes));
        for run in split_zero(bytes) {
            // What is not written stays a hole.
            if let Run::Data(range) = run {
                self.to.write(offset, buffer, range)?;
            }
        }
        Ok(())
    }

    fn compare(&self, buffer: &mut Aligned, block: u64) -> Result<(), Error> {
        let (offset, length) = (block * BLOCK, hash::length(self.from.size, block));
        let read = self.to.reader().read_back(buffer, offset, length);
        read.map_err(Error::file("read back", &self.to.path))?;
        match hash::block(buffer.get(length)) == self.lock().get(block) {
            true => Ok(()),
            false => Err(Error::Damaged {
                path: self.to.path.clone(),
                from: self.from.path.clone(),
                offset,
            }),
        }
    }
}

/// A copy under way.
struct Copying<'a> {
    pairs: &'a [Pair],
    chunks: Vec<Chunk>,
    next: AtomicUsize,
    signals: &'a Signals,
    meter: &'a Meter,
    written: AtomicU64,
    verified: AtomicU64,
    failed: AtomicBool,
}

/// Copies and verifies all of it; how much that is, the meter says already.
///
/// # Errors
/// The first failure, or the end of the session.
pub fn all(pairs: &[Pair], signals: &Signals, meter: &Meter) -> Result<(), Error> {
    let pieces = pairs.iter().enumerate();
    let pieces = pieces.flat_map(|(file, pair)| chunks(file, &pair.from.runs));
    let copy = Copying {
        pairs,
        chunks: pieces.collect(),
        next: AtomicUsize::new(0),
        signals,
        meter,
        written: AtomicU64::new(0),
        verified: AtomicU64::new(0),
        failed: AtomicBool::new(false),
    };
    copy.measure();
    let workers = std::thread::available_parallelism().map_or(WORKERS.0, usize::from);
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..workers.clamp(WORKERS.0, WORKERS.1))
            .map(|_| scope.spawn(|| copy.work()))
            .collect();
        let panicked = |_| Err(Error::Other("a thread of the copy was lost".into()));
        // After a failure the others stop, too, and the scope waits for them.
        let mut ended = started
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(panicked));
        ended.try_for_each(|outcome| outcome)
    })
}

impl Copying<'_> {
    fn work(&self) -> Result<(), Error> {
        let outcome = self.run();
        if outcome.is_err() {
            self.failed.store(true, Relaxed);
        }
        outcome
    }

    fn run(&self) -> Result<(), Error> {
        let mut buffer = Aligned::default();
        let mut before: Option<&Chunk> = None;
        loop {
            self.signals.check()?;
            if self.failed.load(Relaxed) {
                return Ok(());
            }
            let chunk = self.chunks.get(self.next.fetch_add(1, Relaxed));
            if let Some(chunk) = chunk {
                self.write(&mut buffer, chunk)?;
            }
            match (before.take(), chunk) {
                (Some(before), _) => self.verify(&mut buffer, before)?,
                (None, None) => return Ok(()),
                (None, Some(_)) => {}
            }
            before = chunk;
        }
    }

    fn write(&self, buffer: &mut Aligned, chunk: &Chunk) -> Result<(), Error> {
        let pair = &self.pairs[chunk.file];
        chunk
            .blocks
            .clone()
            .try_for_each(|block| pair.write(buffer, block))?;
        pair.to
            .write_back(chunk.blocks.start * BLOCK, self.length(chunk), false)?;
        self.written.fetch_add(self.length(chunk), Relaxed);
        self.measure();
        Ok(())
    }

    fn verify(&self, buffer: &mut Aligned, chunk: &Chunk) -> Result<(), Error> {
        let pair = &self.pairs[chunk.file];
        pair.to
            .write_back(chunk.blocks.start * BLOCK, self.length(chunk), true)?;
        chunk
            .blocks
            .clone()
            .try_for_each(|block| pair.compare(buffer, block))?;
        self.verified.fetch_add(self.length(chunk), Relaxed);
        self.measure();
        Ok(())
    }

    fn length(&self, chunk: &Chunk) -> u64 {
        extents::bytes(
            std::slice::from_ref(&chunk.blocks),
            self.pairs[chunk.file].from.size,
        )
    }

    /// Half of the work on a byte is to write it, the other half to find it verified.
    fn measure(&self) {
        let total = self.meter.total.load(Relaxed);
        let left = |done: &AtomicU64| total.saturating_sub(done.load(Relaxed));
        self.meter.data.store(self.written.load(Relaxed), Relaxed);
        let remaining = (left(&self.written) + left(&self.verified)) / 2;
        self.meter.remaining.store(remaining, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cold::files;
    use crate::live::signals::End;
    use ferry_contract::cold::{Item, Part};
    use std::fs::{self, File};
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::path::Path;

    /// A file of 40 blocks and a bit, with data here and there.
    fn pair(directory: &Path) -> Pair {
        let (from, to) = (directory.join("from"), directory.join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(40 * BLOCK + 77).unwrap();
        for (at, length) in [
            (0, 100),
            (17 * BLOCK - 3, 9),
            (20 * BLOCK, 3 << 20),
            (40 * BLOCK, 77),
        ] {
            file.write_all_at(&vec![7; length], at).unwrap();
        }
        let item = Item {
            path: from,
            part: Part::Other,
        };
        let (mut sources, _) = files::open(&[item]).unwrap();
        let source = sources.remove(0);
        let target = Target::file(&to, source.size).unwrap();
        Pair::new(source, target)
    }

    #[test]
    fn a_copy_is_the_same_and_as_sparse() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let pair = pair(directory.path());
        let meter = Meter::default();
        meter
            .total
            .store(extents::bytes(&pair.from.runs, pair.from.size), Relaxed);
        all(std::slice::from_ref(&pair), &Signals::default(), &meter).unwrap();
        assert!(fs::read(&pair.from.path).unwrap() == fs::read(&pair.to.path).unwrap());
        let blocks = |path: &Path| fs::metadata(path).unwrap().blocks();
        assert!(blocks(&pair.to.path) <= blocks(&pair.from.path));
        assert_eq!(meter.remaining.load(Relaxed), 0);
        assert!(meter.total.load(Relaxed) >= 3 << 20);
    }

    #[test]
    fn damage_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let pair = pair(directory.path());
        let mut buffer = Aligned::default();
        pair.write(&mut buffer, 20).unwrap();
        pair.compare(&mut buffer, 20).unwrap();
        let mut other = Aligned::default();
        other.get_mut(6)[5] = b'!';
        pair.to.write(20 * BLOCK, &other, 5..6).unwrap();
        assert!(matches!(
            pair.compare(&mut buffer, 20),
            Err(Error::Damaged { offset, .. }) if offset == 20 * BLOCK
        ));
    }

    #[test]
    fn it_can_be_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let signals = Signals::default();
        signals.end(End::Cancelled);
        let ended = all(&[pair(directory.path())], &signals, &Meter::default());
        assert!(matches!(ended, Err(Error::Ended(crate::live::Error::Cancelled))));
    }
}
