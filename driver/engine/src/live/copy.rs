//! Sending memory: pages of a set, read from the guest's RAM files and written to the streams.
//!
//! Each 2 MiB stripe of a block belongs to one stream for the whole migration, so a page's newer content never
//! overtakes an older one, and streams need not wait for each other within a round.

use super::signals::Signals;
use super::Error;
use crate::control::Meter;
use crate::memory::{split_zero, Backing, PageSet, RamFile, Run, PAGE};
use crate::wire::{DataSender, Totals};
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Bytes read and framed at a time: small enough to stay in the second-level cache between the read, the zero
/// test, the digest and the write.
const CHUNK: u64 = 256 << 10;
/// A stripe's bytes: a huge page, so that one stream fills it.
const STRIPE: u64 = 2 << 20;

/// What a pass over some pages sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of page data.
    pub data: u64,
    /// Bytes told to be zero.
    pub zero: u64,
    /// How long it took, the destination's acknowledgement included.
    pub elapsed: Duration,
}

/// The streams of one migration and what has gone over them.
pub struct Outgoing {
    lanes: Vec<Lane>,
    /// Pages that may hold something at the destination.
    told: Vec<PageSet>,
    rounds: u64,
}

struct Lane {
    sender: DataSender,
    buffer: Vec<u8>,
}

/// The pages of a file that are not holes.
pub fn present(file: &RamFile) -> Result<PageSet, Error> {
    let mut pages = PageSet::new(file.len());
    for extent in file.extents(0..file.len())? {
        pages.insert(extent?);
    }
    Ok(pages)
}

impl Outgoing {
    /// Streams for these files. What is huge pages here may be so there, and QEMU has filled them all before anything
    /// was sent.
    pub fn new(senders: Vec<DataSender>, files: &[&RamFile]) -> Self {
        let lanes = senders.into_iter().map(|sender| Lane {
            sender,
            buffer: vec![0; CHUNK as usize],
        });
        let told = |file: &&RamFile| {
            let mut pages = PageSet::new(file.len());
            if file.backing() != Backing::Tmpfs {
                pages.insert(0..file.len());
            }
            pages
        };
        Self {
            lanes: lanes.collect(),
            told: files.iter().map(told).collect(),
            rounds: 0,
        }
    }

    /// Sends these pages of each block, tells that these others are holes, and returns when the destination has applied
    /// it all.
    pub fn send(
        &mut self,
        files: &[&RamFile],
        pages: &[PageSet],
        holes: &[PageSet],
        meter: &Meter,
        signals: &Signals,
    ) -> Result<Sent, Error> {
        let began = Instant::now();
        let round = self.rounds;
        self.rounds += 1;
        let count = self.lanes.len() as u64;
        let mut sent = Sent::default();
        std::thread::scope(|scope| {
            let workers = (0..count)
                .zip(&mut self.lanes)
                .map(|(number, lane)| {
                    let share = Share {
                        number,
                        count,
                        files,
                        pages,
                        holes,
                        meter,
                        signals,
                    };
                    std::thread::Builder::new()
                        .spawn_scoped(scope, move || lane.send(&share, round))
                        .map_err(Error::system("start a thread"))
                })
                .collect::<Result<Vec<_>, _>>()?;
            for worker in workers {
                let part = worker
                    .join()
                    .map_err(|_| Error::Elsewhere("a sending thread panicked".into()))??;
                sent.data += part.data;
                sent.zero += part.zero;
            }
            Ok::<(), Error>(())
        })?;
        for (told, pages) in self.told.iter_mut().zip(pages) {
            told.union_with(pages);
        }
        for ((told, holes), file) in self.told.iter_mut().zip(holes).zip(files) {
            // What is less than a huge page stays there, as zeros.
            if file.backing() == Backing::Tmpfs {
                told.subtract(holes);
            }
        }
        meter.wire.store(
            self.lanes
                .iter()
                .map(|lane| lane.sender.progress().wire_bytes())
                .sum(),
            Relaxed,
        );
        sent.elapsed = began.elapsed();
        Ok(sent)
    }

    /// The pages the destination may hold and the source has given back since: what must end as holes. `present`
    /// are the pages of each block that are not holes now.
    pub fn given_back(&self, present: &[PageSet]) -> Vec<PageSet> {
        let mut gone = self.told.clone();
        for (gone, present) in gone.iter_mut().zip(present) {
            gone.subtract(present);
        }
        gone
    }

    /// Ends the streams; returns what each carried.
    pub fn finish(&mut self) -> Result<Vec<Totals>, Error> {
        self.lanes
            .drain(..)
            .map(|lane| lane.sender.finish().map_err(Error::from))
            .collect()
    }
}

/// The part of a pass that one stream takes.
#[derive(Clone, Copy)]
struct Share<'a> {
    number: u64,
    count: u64,
    files: &'a [&'a RamFile],
    pages: &'a [PageSet],
    holes: &'a [PageSet],
    meter: &'a Meter,
    signals: &'a Signals,
}

impl Lane {
    fn send(&mut self, share: &Share<'_>, round: u64) -> Result<Sent, Error> {
        let mut sent = Sent::default();
        for (block, (file, pages)) in share.files.iter().zip(share.pages).enumerate() {
            let block = u16::try_from(block).map_err(|_| Error::Elsewhere("too many RAM blocks".into()))?;
            for run in pages.runs() {
                for piece in pieces(run, share.number, share.count, CHUNK) {
                    share.signals.check()?;
                    let part = self.send_piece(block, file, piece.clone())?;
                    sent.data += part.data;
                    sent.zero += part.zero;
                    share.meter.data.fetch_add(part.data, Relaxed);
                    share.meter.zero.fetch_add(part.zero, Relaxed);
                    // Rounds set it, lanes lower it: it never goes below zero.
                    share.meter.remaining.fetch_sub(piece.end - piece.start, Relaxed);
                    share.signals.pace.spend(part.data, share.signals)?;
                }
            }
        }
        for (block, holes) in share.holes.iter().enumerate() {
            let block = u16::try_from(block).map_err(|_| Error::Elsewhere("too many RAM blocks".into()))?;
            for run in holes.runs() {
                for piece in pieces(run, share.number, share.count, STRIPE) {
                    // By whole huge pages, as far as they go: less of one would be zeros that are there.
                    let span = piece.end - piece.start;
                    self.sender.zero(block, piece.start, span)?;
                    sent.zero += span;
                    share.meter.zero.fetch_add(span, Relaxed);
                    share.meter.remaining.fetch_sub(span, Relaxed);
                }
            }
        }
        self.sender.barrier(round)?;
        Ok(sent)
    }

    /// A hole reads as zeros, without being filled (tmpfs, `shmem_file_read_iter`), and is told as such.
    fn send_piece(&mut self, block: u16, file: &RamFile, piece: Range<u64>) -> Result<Sent, Error> {
        let chunk = &mut self.buffer[..(piece.end - piece.start) as usize];
        file.read_at(piece.start, chunk)?;
        let mut sent = Sent::default();
        for run in split_zero(chunk) {
            match run {
                Run::Zero(range) => {
                    self.sender
                        .zero(block, piece.start + range.start as u64, range.len() as u64)?;
                    sent.zero += range.len() as u64;
                }
                Run::Data(range) => {
                    self.sender
                        .data(block, piece.start + range.start as u64, &chunk[range.clone()])?;
                    sent.data += range.len() as u64;
                }
            }
        }
        Ok(sent)
    }
}

/// The pieces of a run that belong to one of `count` streams, each within a stripe and a chunk.
fn pieces(run: Range<u64>, number: u64, count: u64, chunk: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = run.start;
    std::iter::from_fn(move || {
        while at < run.end {
            let start = at;
            let stripe = start / STRIPE;
            if stripe % count != number {
                at = (stripe + 1) * STRIPE;
                continue;
            }
            at = run.end.min((start / chunk + 1) * chunk);
            return Some(start..at);
        }
        None
    })
}

/// The bytes of all sets together.
pub fn bytes(pages: &[PageSet]) -> u64 {
    pages.iter().map(|pages| pages.count() * PAGE).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_share_a_run_without_gap_or_overlap() {
        let run = STRIPE - 3 * PAGE..5 * STRIPE + 7 * PAGE;
        for count in 1..5 {
            let mut all: Vec<_> = (0..count)
                .flat_map(|number| pieces(run.clone(), number, count, CHUNK))
                .collect();
            all.sort_by_key(|piece| piece.start);
            assert!(all
                .iter()
                .all(|piece| piece.end - piece.start <= CHUNK && piece.start < piece.end));
            assert_eq!(all.first().unwrap().start, run.start);
            assert_eq!(all.last().unwrap().end, run.end);
            assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start), "{count}");
        }
    }

    #[test]
    fn a_page_always_takes_the_same_stream() {
        let page = 9 * STRIPE + 5 * PAGE..9 * STRIPE + 6 * PAGE;
        let alone: Vec<_> = (0..4)
            .filter(|n| pieces(page.clone(), *n, 4, CHUNK).next().is_some())
            .collect();
        let within: Vec<_> = (0..4)
            .filter(|n| pieces(0..20 * STRIPE, *n, 4, CHUNK).any(|piece| piece.contains(&page.start)))
            .collect();
        assert_eq!(alone, within);
        assert_eq!(alone.len(), 1);
    }
}
