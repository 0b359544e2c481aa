//! Iterative pre-copy on the source: scan, then drain, then copy, round after round; and the last copy.

use super::copy::{self, Outgoing, Sent};
use super::rounds::{Decision, Limits, Observation, Policy};
use super::signals::Signals;
use super::verify::{self, Digests};
use super::watch::{deadline, Watch, COMMAND};
use super::working_set::{Deferral, WorkingSet};
use super::Error;
use crate::control::Meter;
use crate::memory::{PageSet, PunchWatch, RamFile, WriteTracker, PAGE};
use crate::qemu::{injector, tracked_ranges, Process, RamBlock};
use crate::report::{millis, Recorder, Round};
use crate::wire::{DataSender, Totals};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Looking for memory given back, which walks all of the guest's files, rests for so many times as long as it took.
const SWEEP_REST: u32 = 4;

/// The guest's memory on its way.
pub struct Precopy {
    watch: Arc<Watch>,
    signals: Arc<Signals>,
    meter: Arc<Meter>,
    blocks: Vec<RamBlock>,
    tracker: WriteTracker,
    outgoing: Outgoing,
    working: Vec<WorkingSet>,
    policy: Policy,
    round: u32,
    scanned_at: Instant,
    sent: Sent,
    /// Watches for memory given back since the last [`sweep`](Precopy::sweep).
    swept: Option<PunchWatch>,
    /// When that was, and how long it took.
    swept_at: Instant,
    sweep_took: Duration,
    /// Pages and bytes of [`settle`](Precopy::settle).
    settled: (u64, u64),
}

/// What a scan found.
#[derive(Debug, Clone, Copy)]
pub struct Scan {
    began: Instant,
    took: Duration,
    /// Since the scan before.
    span: Duration,
    pages: u64,
}

/// What was copied while the guest stood still.
pub struct Last {
    /// What each stream carried, all rounds together.
    pub totals: Vec<Totals>,
    /// Pages.
    pub pages: u64,
    /// Bytes of page data.
    pub bytes: u64,
}

/// What takes long to let go of, which must not lengthen the pause.
pub struct Spent {
    /// Lifting the tracking: about 50 ms a GiB.
    _tracker: WriteTracker,
    /// Closing an inotify descriptor: 12 to 20 ms (Linux 6.18, `synchronize_srcu` in `fsnotify_destroy_group`).
    _swept: Option<PunchWatch>,
}

impl Precopy {
    /// Begins to track the guest's writes. QEMU's main thread is stopped for about 0.3 ms to make the userfaultfd
    /// in its process; the vCPUs run on.
    pub fn begin(
        process: &Process,
        watch: Arc<Watch>,
        signals: Arc<Signals>,
        meter: Arc<Meter>,
        blocks: Vec<RamBlock>,
        streams: Vec<DataSender>,
    ) -> Result<Self, Error> {
        let uffd = injector::userfaultfd(process, deadline(COMMAND))?;
        let tracker = WriteTracker::new(uffd, process, tracked_ranges(&blocks))?;
        let lengths: Vec<u64> = blocks.iter().map(|block| block.size).collect();
        Ok(Self {
            watch,
            signals,
            meter,
            tracker,
            outgoing: Outgoing::new(streams, &files(&blocks)),
            working: lengths
                .iter()
                .map(|length| WorkingSet::new((length / PAGE) as usize))
                .collect(),
            policy: Policy::new(Limits {
                page_size: PAGE,
                ..Limits::default()
            }),
            blocks,
            round: 0,
            scanned_at: Instant::now(),
            sent: Sent::default(),
            swept: None,
            swept_at: Instant::now(),
            sweep_took: Duration::ZERO,
            settled: (0, 0),
        })
    }

    /// The first pass: arm, drain, then copy everything that is not a hole.
    pub fn first(&mut self, recorder: &mut Recorder) -> Result<(), Error> {
        let began = Instant::now();
        self.tracker.arm()?;
        self.scanned_at = Instant::now();
        let scan = Scan {
            began,
            took: began.elapsed(),
            span: Duration::ZERO,
            pages: 0,
        };
        let drained = self.watch.drain()?;
        let present = self.present()?;
        let scan = Scan {
            pages: copy::bytes(&present) / PAGE,
            ..scan
        };
        self.round(recorder, scan, drained, &present)
    }

    /// Finds what the guest has written since the last scan, and protects it again.
    pub fn scan(&mut self) -> Result<Scan, Error> {
        self.signals.check()?;
        let began = Instant::now();
        let mut written: Vec<PageSet> = self.blocks.iter().map(|block| PageSet::new(block.size)).collect();
        let report = self.tracker.scan_into(&mut written)?;
        for (working, written) in self.working.iter_mut().zip(&written) {
            working
                .absorb(written.words())
                .map_err(|error| Error::Elsewhere(error.to_string()))?;
        }
        let span = began - self.scanned_at;
        self.scanned_at = began;
        let scan = Scan {
            began,
            took: began.elapsed(),
            span,
            pages: report.pages,
        };
        self.meter.dirty_rate.store(scan.dirty_rate() as u64, Relaxed);
        Ok(scan)
    }

    /// Whether to go on, by what the scan found.
    pub fn decide(&mut self, scan: &Scan) -> Result<Decision, Error> {
        let target = self
            .watch
            .command(|monitor| monitor.downtime_limit_ms(deadline(COMMAND)))?;
        self.policy.set_downtime_target(Duration::from_millis(target));
        Ok(self.policy.decide(&Observation {
            dirty_pages: scan.pages,
            pending_pages: self.pending(),
            sent_bytes: self.sent.data,
            elapsed: scan.span,
            bandwidth: None,
        }))
    }

    /// A round: drain, then copy what is pending, but for what is written again in every round.
    pub fn send(&mut self, recorder: &mut Recorder, scan: Scan) -> Result<(), Error> {
        let drained = self.watch.drain()?;
        let deferral = Deferral::choose(&self.working, self.policy.deferral_budget());
        let pages = self.take(deferral);
        self.round(recorder, scan, drained, &pages)
    }

    /// Tells what the guest has given back since it was sent, so that the last copy need not look for it: walking a
    /// big guest's files takes milliseconds. A page written again meanwhile is in a later scan, and is sent again.
    pub fn sweep(&mut self) -> Result<(), Error> {
        let began = Instant::now();
        let watch = PunchWatch::new(files(&self.blocks));
        let gone = self.outgoing.given_back(&self.present()?);
        // Without a watch the last copy looks for itself.
        self.swept = watch.ok();
        (self.swept_at, self.sweep_took) = (Instant::now(), began.elapsed());
        if copy::bytes(&gone) > 0 {
            self.meter.remaining.fetch_add(copy::bytes(&gone), Relaxed);
            self.outgoing
                .send(&files(&self.blocks), &[], &gone, &self.meter, &self.signals)?;
        }
        Ok(())
    }

    /// [`sweep`](Precopy::sweep), where anything has been given back since the last one; but not all the time.
    pub fn sweep_again(&mut self) -> Result<(), Error> {
        let rested = self.swept_at.elapsed() > self.sweep_took * SWEEP_REST;
        match &self.swept {
            Some(watch) if rested && watch.punched() => self.sweep(),
            _ => Ok(()),
        }
    }

    /// The last copy but one, of a guest that stands still and whose block I/O has drained: what is pending, and what has
    /// been given back since the sweep. It is no round, nor is the last: the timeline has them in the downtime.
    pub fn settle(&mut self) -> Result<(), Error> {
        let (pages, bytes) = self.rest()?;
        self.settled = (pages, bytes);
        Ok(())
    }

    /// The last copy: what has been written since, by QEMU for its devices. Then the streams end.
    pub fn last(&mut self) -> Result<Last, Error> {
        let (pages, bytes) = self.rest()?;
        Ok(Last {
            totals: self.outgoing.finish()?,
            pages: pages + self.settled.0,
            bytes: bytes + self.settled.1,
        })
    }

    /// Copies what has been written or given back since the scan before; how many pages, and bytes of page data.
    fn rest(&mut self) -> Result<(u64, u64), Error> {
        self.scan()?;
        let pages = self.take(Deferral::Nothing);
        let count = copy::bytes(&pages) / PAGE;
        let gone = match self.swept.as_ref().is_none_or(PunchWatch::punched) {
            true => self.outgoing.given_back(&self.present()?),
            false => Vec::new(),
        };
        self.copy(&pages, &gone)?;
        Ok((count, self.sent.data))
    }

    /// Of all the guest's memory.
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.size).sum()
    }

    /// The digests of all memory as it is now.
    pub fn digest(&self) -> Result<Digests, Error> {
        verify::digest(files(&self.blocks))
    }

    /// What is left of it when it is done, whichever way.
    pub fn spent(self) -> Spent {
        Spent {
            _tracker: self.tracker,
            _swept: self.swept,
        }
    }

    /// Bytes of page data the last round sent.
    pub fn sent_bytes(&self) -> u64 {
        self.sent.data
    }

    /// Pages that would have to be sent if the guest stopped now.
    pub fn pending(&self) -> u64 {
        self.working.iter().map(WorkingSet::pending_pages).sum()
    }

    fn present(&self) -> Result<Vec<PageSet>, Error> {
        self.blocks
            .iter()
            .map(|block| copy::present(&block.file))
            .collect()
    }

    fn take(&mut self, deferral: Deferral) -> Vec<PageSet> {
        let mut words = Vec::new();
        let sets = self.working.iter_mut().zip(&self.blocks).map(|(working, block)| {
            working.take(deferral, &mut words);
            PageSet::from_words(block.size, &words)
        });
        sets.collect()
    }

    fn round(
        &mut self,
        recorder: &mut Recorder,
        scan: Scan,
        drained: Duration,
        pages: &[PageSet],
    ) -> Result<(), Error> {
        self.copy(pages, &[])?;
        recorder.round(Round {
            number: self.round,
            begin_ms: recorder.clock().at(scan.began),
            scan_ms: millis(scan.took),
            drain_ms: millis(drained),
            send_ms: millis(self.sent.elapsed),
            pages: scan.pages,
            data_bytes: self.sent.data,
            zero_bytes: self.sent.zero,
            hole_bytes: 0,
            deferred_pages: self.pending(),
            dirty_rate: scan.dirty_rate(),
        });
        self.round += 1;
        Ok(())
    }

    fn copy(&mut self, pages: &[PageSet], holes: &[PageSet]) -> Result<(), Error> {
        let deferred = self.pending();
        self.meter.iteration.store(u64::from(self.round) + 1, Relaxed);
        self.meter
            .remaining
            .store(copy::bytes(pages) + copy::bytes(holes), Relaxed);
        self.sent = self
            .outgoing
            .send(&files(&self.blocks), pages, holes, &self.meter, &self.signals)?;
        self.meter.remaining.store(deferred * PAGE, Relaxed);
        let bandwidth = self.sent.data as f64 / self.sent.elapsed.as_secs_f64().max(1e-6);
        self.meter.bandwidth.store(bandwidth as u64, Relaxed);
        Ok(())
    }
}

fn files(blocks: &[RamBlock]) -> Vec<&RamFile> {
    blocks.iter().map(|block| &block.file).collect()
}

impl Scan {
    /// Bytes of memory the guest has written since the scan before.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE
    }

    /// Pages a second.
    fn dirty_rate(&self) -> f64 {
        match self.span.as_secs_f64() {
            0.0 => 0.0,
            span => self.pages as f64 / span,
        }
    }
}
