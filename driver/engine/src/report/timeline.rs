//! What happened in one migration, and when: the serde types of the file, and the recorder that fills them.
//!
//! All times are milliseconds with three decimals since the recorder was made, by the monotonic clock; only
//! `started` is wall-clock time. A part that this end could not see is 0 or absent.

use std::time::{Duration, Instant};

use ferry_contract::stage::Stage;
use nix::time::{clock_gettime, ClockId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::text;

/// The version of the file format this engine writes. Added fields do not raise it, changed meanings do.
pub const VERSION: u32 = 1;

/// Rounds and events kept: a guest that never converges must not fill the memory of the host.
const KEPT: usize = 4096;
/// Of those, how many from the beginning; the others are the newest.
const KEPT_FIRST: usize = 64;
/// The longest note or error kept, in characters: these can come from the peer.
const LONGEST_TEXT: usize = 2000;

/// Which end of the migration recorded this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The host the guest leaves.
    Source,
    /// The host the guest comes to.
    Destination,
}

impl Role {
    /// `source` or `destination`.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Destination => "destination",
        }
    }
}

/// The guest that moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// libvirt's domain name.
    pub name: String,
    /// libvirt's domain UUID.
    pub uuid: Uuid,
}

/// The guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ram {
    /// RAM blocks moved by the engine.
    pub blocks: u32,
    /// Their size in bytes.
    pub bytes: u64,
    /// Bytes of them that were not holes when the copy began.
    pub resident: u64,
}

/// What is known before anything happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// The session both ends share.
    pub session: Uuid,
    /// This end.
    pub role: Role,
    /// The guest.
    pub guest: Guest,
    /// This host's name.
    pub local_host: String,
    /// The other host's name.
    pub peer_host: String,
    /// Protocol and cipher suite of the streams; absent if they are not encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<String>,
    /// Connections that carry memory.
    pub streams: u32,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest has moved.
    Completed,
    /// It has not; it runs on at the source.
    Failed {
        /// Where it failed; absent before the first stage.
        stage: Option<Stage>,
        /// What to tell the administrator.
        error: String,
    },
    /// Somebody called it off.
    Cancelled,
}

/// One stage, from entering it to leaving it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageSpan {
    /// Which.
    pub stage: Stage,
    /// Milliseconds since `started`.
    pub begin_ms: f64,
    /// Milliseconds since `started`.
    pub end_ms: f64,
}

impl StageSpan {
    /// Its length in milliseconds.
    pub fn ms(&self) -> f64 {
        self.end_ms - self.begin_ms
    }
}

/// One round of pre-copy: scan, drain, send. Round 0 is the first pass over all data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Counted from 0.
    pub number: u32,
    /// Milliseconds since `started`.
    pub begin_ms: f64,
    /// The scan for written pages (in round 0: arming the tracker).
    pub scan_ms: f64,
    /// Waiting for block I/O in flight.
    pub drain_ms: f64,
    /// Reading and sending.
    pub send_ms: f64,
    /// Dirty pages taken by the scan (in round 0: pages of data extents).
    pub pages: u64,
    /// Bytes of page data sent.
    pub data_bytes: u64,
    /// Bytes of pages sent as "all zero".
    pub zero_bytes: u64,
    /// Bytes sent as holes: memory the guest gave back, or never had.
    #[serde(default)]
    pub hole_bytes: u64,
    /// Pages held back for the last round.
    #[serde(default)]
    pub deferred_pages: u64,
    /// Pages per second written by the guest since the scan before; 0 in round 0.
    pub dirty_rate: f64,
}

impl Round {
    /// Its length in milliseconds.
    pub fn ms(&self) -> f64 {
        self.scan_ms + self.drain_ms + self.send_ms
    }
}

/// How long the guest stood still, and why. The parts follow each other: each begins where the one before ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the STOP event at the source to the guest running at the destination, as far as this end can tell.
    pub total_ms: f64,
    /// From the stop (STOP event) to all block I/O drained (QEMU's pre-switchover).
    pub stop_ms: f64,
    /// The last scan and copy, until the destination has applied it.
    pub last_copy_ms: f64,
    /// What the device state took beyond the last copy: the two overlap.
    pub device_state_ms: f64,
    /// From the device state loaded to the guest running.
    pub resume_ms: f64,
    /// Pages of the last copy.
    pub last_copy_pages: u64,
    /// Bytes of page data of the last copy.
    pub last_copy_bytes: u64,
}

/// Sums over all rounds and the last copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Frames on the wire.
    pub frames: u64,
    /// Bytes of page data.
    pub data_bytes: u64,
    /// Bytes of pages sent as "all zero".
    pub zero_bytes: u64,
    /// Bytes on the wire, headers included.
    pub wire_bytes: u64,
    /// The digest both ends compared, in hex; absent if it did not come to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Totals {
    /// The sums over all streams; their digests, in order, together are the digest.
    pub fn from_streams(streams: &[crate::wire::Totals]) -> Self {
        let digests: Vec<_> = streams
            .iter()
            .map(|stream| format!("{:032x}", stream.digest))
            .collect();
        Totals {
            frames: streams.iter().map(|stream| stream.frames).sum(),
            data_bytes: streams.iter().map(|stream| stream.data_bytes).sum(),
            zero_bytes: streams.iter().map(|stream| stream.zero_bytes).sum(),
            wire_bytes: streams.iter().map(|stream| stream.wire_bytes).sum(),
            digest: Some(digests.join("+")),
        }
    }
}

/// Something worth remembering that is neither a stage nor a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Milliseconds since `started`.
    pub at_ms: f64,
    /// What happened.
    pub text: String,
}

/// One migration from one end: the contents of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// [`VERSION`].
    pub version: u32,
    /// Who and where.
    #[serde(flatten)]
    pub migration: Migration,
    /// Wall-clock time of the start: RFC 3339, UTC, milliseconds.
    pub started: String,
    /// CLOCK_MONOTONIC at the start, in microseconds: two timelines recorded on one machine share it.
    pub monotonic_base_us: u64,
    /// From the start to the end.
    pub total_ms: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// The guest's memory.
    pub ram: Ram,
    /// In the order they were entered.
    pub stages: Vec<StageSpan>,
    /// In order; see `omitted`.
    pub rounds: Vec<Round>,
    /// Absent if the guest was never stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Downtime>,
    /// Sums.
    pub totals: Totals,
    /// In order; see `omitted`.
    #[serde(default)]
    pub events: Vec<Event>,
    /// Rounds and events left out: of very many, only the first and the newest are kept.
    #[serde(default)]
    pub omitted: u64,
}

/// Milliseconds since a recorder was made; copy it to wherever something is measured.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Now.
    pub fn ms(&self) -> f64 {
        millis(self.0.elapsed())
    }

    /// When `instant` was or will be; 0 for anything before the start.
    pub fn at(&self, instant: Instant) -> f64 {
        millis(instant.saturating_duration_since(self.0))
    }
}

/// Milliseconds with three decimals.
pub fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

/// Collects a [`Timeline`] while the migration runs. Does no I/O except logging.
#[derive(Clone, Debug)]
pub struct Recorder {
    clock: Clock,
    timeline: Timeline,
    current: Option<(Stage, f64)>,
}

impl Recorder {
    /// Starts the clock.
    pub fn new(migration: Migration) -> Self {
        let wall = since_epoch(ClockId::CLOCK_REALTIME);
        let monotonic = since_epoch(ClockId::CLOCK_MONOTONIC);
        let clock = Clock(Instant::now());
        Recorder {
            clock,
            current: None,
            timeline: Timeline {
                version: VERSION,
                migration,
                started: text::rfc3339(wall),
                monotonic_base_us: u64::try_from(monotonic.as_micros()).unwrap_or(u64::MAX),
                total_ms: 0.0,
                outcome: Outcome::Cancelled,
                ram: Ram::default(),
                stages: Vec::new(),
                rounds: Vec::new(),
                downtime: None,
                totals: Totals::default(),
                events: Vec::new(),
                omitted: 0,
            },
        }
    }

    /// The clock all times of this timeline are read from.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// The stage the migration is in; `None` before the first.
    pub fn stage(&self) -> Option<Stage> {
        self.current.map(|(stage, _)| stage)
    }

    /// The rounds so far.
    pub fn rounds(&self) -> &[Round] {
        &self.timeline.rounds
    }

    /// Leaves the current stage for `stage`. Entering the current stage again changes nothing.
    pub fn enter(&mut self, stage: Stage) {
        self.enter_at(stage, Instant::now());
    }

    /// As [`Recorder::enter`], of what was noticed only later: `at` may be past, but not before the current stage began.
    pub fn enter_at(&mut self, stage: Stage, at: Instant) {
        if self.stage() == Some(stage) {
            return;
        }
        let since = self.current.map_or(0.0, |(_, begin_ms)| begin_ms);
        let at_ms = self.clock.at(at).max(since);
        self.leave(at_ms);
        self.current = Some((stage, at_ms));
        tracing::info!(
            guest = %text::printable(&self.timeline.migration.guest.name, 64),
            session = %self.timeline.migration.session,
            role = self.timeline.migration.role.name(),
            at_ms,
            "stage: {stage}"
        );
    }

    /// Adds a round that is over.
    pub fn round(&mut self, round: Round) {
        push(&mut self.timeline.rounds, round, &mut self.timeline.omitted);
    }

    /// Remembers that something happened now.
    pub fn note(&mut self, event: impl AsRef<str>) {
        let event = Event {
            at_ms: self.clock.ms(),
            text: text::cut(event.as_ref(), LONGEST_TEXT),
        };
        push(&mut self.timeline.events, event, &mut self.timeline.omitted);
    }

    /// The other host's name, once it is known.
    pub fn peer(&mut self, host: impl Into<String>) {
        self.timeline.migration.peer_host = host.into();
    }

    /// The guest's memory, once it is known.
    pub fn ram(&mut self, ram: Ram) {
        self.timeline.ram = ram;
    }

    /// The number of streams, once it is agreed on.
    pub fn streams(&mut self, streams: u32) {
        self.timeline.migration.streams = streams;
    }

    /// The encryption, once it is agreed on.
    pub fn encryption(&mut self, encryption: Option<String>) {
        self.timeline.migration.encryption = encryption;
    }

    /// The pause of the guest, as far as it is known; a later call replaces it.
    pub fn downtime(&mut self, downtime: Downtime) {
        self.timeline.downtime = Some(downtime);
    }

    /// The sums; a later call replaces them.
    pub fn totals(&mut self, totals: Totals) {
        self.timeline.totals = totals;
    }

    /// Ends the recording. A failure is put down to the stage given in `outcome`; see [`Recorder::stage`].
    pub fn finish(mut self, outcome: Outcome) -> Timeline {
        let now = self.clock.ms();
        self.leave(now);
        self.timeline.total_ms = now;
        self.timeline.outcome = match outcome {
            Outcome::Failed { stage, error } => Outcome::Failed {
                stage,
                error: text::cut(&error, LONGEST_TEXT),
            },
            other => other,
        };
        self.timeline
    }

    /// Ends the recording of a migration that failed in the stage it is in.
    pub fn fail(self, error: impl Into<String>) -> Timeline {
        let stage = self.stage();
        self.finish(Outcome::Failed {
            stage,
            error: error.into(),
        })
    }

    fn leave(&mut self, now: f64) {
        if let Some((stage, begin_ms)) = self.current.take() {
            push(
                &mut self.timeline.stages,
                StageSpan {
                    stage,
                    begin_ms,
                    end_ms: now,
                },
                &mut self.timeline.omitted,
            );
        }
    }
}

/// Appends; of too many, drops the oldest but the very first.
fn push<T>(list: &mut Vec<T>, item: T, omitted: &mut u64) {
    if list.len() >= KEPT {
        list.remove(KEPT_FIRST);
        *omitted += 1;
    }
    list.push(item);
}

/// A clock's reading. The two clocks asked for exist on every Linux; a failure would read as 0.
fn since_epoch(clock: ClockId) -> Duration {
    clock_gettime(clock).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn migration(name: &str) -> Migration {
        Migration {
            session: Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            role: Role::Source,
            guest: Guest {
                name: name.into(),
                uuid: Uuid::from_u128(0xfeed),
            },
            local_host: "kvm-a".into(),
            peer_host: "kvm-b".into(),
            encryption: Some("TLS 1.3 AES_128_GCM".into()),
            streams: 4,
        }
    }

    #[test]
    fn stages_follow_each_other_without_gaps() {
        let mut recorder = Recorder::new(migration("web"));
        assert_eq!(recorder.stage(), None);
        for stage in Stage::ALL {
            recorder.enter(stage);
            recorder.enter(stage);
            assert_eq!(recorder.stage(), Some(stage));
        }
        let timeline = recorder.finish(Outcome::Completed);
        assert_eq!(
            timeline.stages.iter().map(|span| span.stage).collect::<Vec<_>>(),
            Stage::ALL
        );
        for pair in timeline.stages.windows(2) {
            assert_eq!(pair[0].end_ms, pair[1].begin_ms);
        }
        assert_eq!(timeline.stages.last().unwrap().end_ms, timeline.total_ms);
    }

    #[test]
    fn a_stage_noticed_later_begins_when_it_began() {
        let mut recorder = Recorder::new(migration("web"));
        let long_ago = Instant::now();
        recorder.enter(Stage::PreCopy);
        let committed = Instant::now();
        recorder.enter_at(Stage::Commitment, committed);
        let expected = recorder.clock().at(committed);
        // Not before the stage it follows.
        recorder.enter_at(Stage::Activation, long_ago);
        let timeline = recorder.finish(Outcome::Completed);
        assert_eq!(timeline.stages[0].end_ms, expected);
        assert_eq!(timeline.stages[1].begin_ms, expected);
        assert_eq!(timeline.stages[1].end_ms, expected);
    }

    #[test]
    fn failure_before_any_stage() {
        let timeline = Recorder::new(migration("web")).fail("no tmpfs on kvm-b");
        assert!(timeline.stages.is_empty());
        assert_eq!(
            timeline.outcome,
            Outcome::Failed {
                stage: None,
                error: "no tmpfs on kvm-b".into()
            }
        );
    }

    #[test]
    fn failure_names_the_stage() {
        let mut recorder = Recorder::new(migration("web"));
        recorder.enter(Stage::PreCopy);
        let timeline = recorder.fail("x".repeat(100_000));
        let Outcome::Failed {
            stage: Some(Stage::PreCopy),
            error,
        } = timeline.outcome
        else {
            panic!("{:?}", timeline.outcome)
        };
        assert!(error.chars().count() <= LONGEST_TEXT);
        assert_eq!(timeline.stages.len(), 1);
    }

    #[test]
    fn endless_rounds_stay_bounded_and_keep_both_ends() {
        let mut recorder = Recorder::new(migration("web"));
        for number in 0..10_000 {
            recorder.round(Round {
                number,
                ..Round::default()
            });
        }
        let timeline = recorder.finish(Outcome::Cancelled);
        assert_eq!(timeline.rounds.len(), KEPT);
        assert_eq!(timeline.omitted, 10_000 - KEPT as u64);
        assert_eq!(timeline.rounds[KEPT_FIRST - 1].number, KEPT_FIRST as u32 - 1);
        assert_eq!(timeline.rounds.last().unwrap().number, 9_999);
        assert!(timeline.rounds.is_sorted_by_key(|round| round.number));
    }

    #[test]
    fn the_file_has_the_agreed_names() {
        let mut recorder = Recorder::new(migration("web"));
        recorder.enter(Stage::StopAndCopy);
        recorder.round(Round::default());
        recorder.downtime(Downtime::default());
        recorder.note("throttled");
        let json = serde_json::to_value(recorder.fail("gone")).unwrap();
        assert_eq!(json["version"], 1);
        assert_eq!(json["role"], "source");
        assert_eq!(json["guest"]["name"], "web");
        assert_eq!(json["peer_host"], "kvm-b");
        assert_eq!(json["stages"][0]["stage"], "stop-and-copy");
        assert_eq!(
            json["outcome"],
            serde_json::json!({"result": "failed", "stage": "stop-and-copy", "error": "gone"})
        );
        assert!(json["downtime"]["last_copy_ms"].is_number());
        assert!(json["started"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn milliseconds_have_three_decimals() {
        assert_eq!(millis(Duration::from_nanos(9_123_987)), 9.123);
    }
}
