//! What virt-ferry is told on a host, and what it tells there: its configuration file and the timelines it keeps.

use std::fs;

use anyhow::{ensure, Context, Result};
use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::Value;

use crate::host::Host;

/// Where a host's virt-ferry looks for its configuration.
const CONFIGURATION: &str = "/etc/virt-ferry/virt-ferry.toml";

/// The end of a migration that a timeline was recorded at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The host the guest left.
    Source,
    /// The host the guest came to.
    Destination,
}

/// What one end recorded of one migration; of its fields, those that tests look at.
#[derive(Clone, Debug, Deserialize)]
pub struct Timeline {
    /// The session both ends share.
    pub session: String,
    /// Which end.
    pub role: Role,
    /// Date and time; later ones are greater.
    pub started: String,
    /// Protocol of the streams; none where they were not encrypted.
    pub encryption: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// The guest's memory.
    pub ram: Ram,
    /// One after the other.
    pub stages: Vec<Stage>,
    /// In order.
    pub rounds: Vec<Round>,
    /// How long the guest stood still, where it did.
    pub downtime: Option<Downtime>,
    /// Sums over all rounds.
    pub totals: Totals,
    /// What else was worth a note.
    pub events: Vec<Event>,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "result", rename_all = "lowercase")]
pub enum Outcome {
    /// The guest moved.
    Completed,
    /// It did not.
    Failed {
        /// What the administrator was told.
        error: String,
    },
    /// Somebody called it off.
    Cancelled,
}

/// The guest's memory, in bytes.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Ram {
    /// Pieces it is in.
    pub blocks: u32,
    /// All of it.
    pub bytes: u64,
    /// What was no hole.
    pub resident: u64,
}

/// A stage, in ms from the migration's beginning.
#[derive(Clone, Debug, Deserialize)]
pub struct Stage {
    /// "pre-migration", "reservation", …
    pub stage: String,
    /// Its first moment.
    pub begin_ms: f64,
    /// Its last.
    pub end_ms: f64,
}

/// One round of pre-copy.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Round {
    /// Pages found dirty; in round 0 all that were no holes.
    pub pages: u64,
    /// Bytes of page data sent.
    pub data_bytes: u64,
    /// Bytes told to be zero.
    pub zero_bytes: u64,
    /// Waiting for block I/O in flight, in ms.
    pub drain_ms: f64,
}

/// How long the guest stood still, in ms.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Downtime {
    /// All in all.
    pub total_ms: f64,
}

/// Sums over all rounds.
#[derive(Clone, Debug, Deserialize)]
pub struct Totals {
    /// Bytes of page data.
    pub data_bytes: u64,
    /// Bytes of the frames that carried them.
    pub wire_bytes: u64,
    /// What both ends compared: one digest a stream, joined by `+`.
    pub digest: Option<String>,
}

/// Something worth a note.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// What happened.
    pub text: String,
}

/// What one end recorded of one cold migration; of its fields, those that tests look at.
#[derive(Clone, Debug, Deserialize)]
pub struct ColdRecord {
    /// Which end.
    pub role: Role,
    /// Date and time; later ones are greater.
    pub started: String,
    /// Protocol of the connections; none where they were not encrypted.
    pub encryption: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// What it was at, in order.
    pub spans: Vec<Span>,
    /// Bytes of files that had to be looked at: all but the holes.
    pub data_bytes: u64,
    /// Bytes of content sent, before they were packed.
    pub sent_bytes: u64,
    /// Bytes on the wire, but for what TLS adds.
    pub wire_bytes: u64,
}

/// Something that took its time.
#[derive(Clone, Debug, Deserialize)]
pub struct Span {
    /// What.
    pub what: String,
    /// Milliseconds since the beginning.
    pub begin_ms: f64,
    /// Milliseconds since the beginning.
    pub end_ms: f64,
}

impl ColdRecord {
    /// How long it was at this, milliseconds.
    pub fn spent_at(&self, what: &str) -> f64 {
        let spans = self.spans.iter().filter(|span| span.what == what);
        spans.map(|span| span.end_ms - span.begin_ms).sum()
    }
}

impl Timeline {
    /// Streams that carried memory.
    pub fn streams(&self) -> usize {
        self.totals
            .digest
            .as_deref()
            .map_or(0, |digest| digest.split('+').count())
    }

    /// From the first look at the memory until the destination holds all of it and the device state, in ms.
    pub fn memory_ms(&self) -> f64 {
        let moving = ["pre-copy", "stop-and-copy", "commitment"];
        let stages = self.stages.iter();
        stages
            .filter(|stage| moving.contains(&stage.stage.as_str()))
            .map(|stage| stage.end_ms - stage.begin_ms)
            .sum()
    }

    /// Whether a note has these words.
    pub fn notes(&self, words: &str) -> bool {
        self.events.iter().any(|event| event.text.contains(words))
    }
}

impl Host {
    /// Writes virt-ferry's configuration, which it reads anew for each migration.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn configure(&self, toml: &str) -> Result<()> {
        fs::write(self.path(CONFIGURATION), toml)
            .with_context(|| format!("{}: cannot write {CONFIGURATION}", self.name()))
    }

    /// The timelines of live migrations kept on this host by the ends of this role, the oldest first.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn timelines(&self, role: Role) -> Result<Vec<Timeline>> {
        let mut found: Vec<Timeline> = self.records(false)?;
        found.retain(|timeline| timeline.role == role);
        found.sort_by(|a, b| a.started.cmp(&b.started));
        Ok(found)
    }

    /// The newest record of a cold migration kept on this host by an end of this role.
    ///
    /// # Errors
    /// If there is none, or one cannot be read.
    pub fn last_cold_record(&self, role: Role) -> Result<ColdRecord> {
        let found = self.records::<ColdRecord>(true)?.into_iter();
        let ours = found.filter(|record| record.role == role);
        ours.max_by(|a, b| a.started.cmp(&b.started))
            .with_context(|| format!("{} has no record of a {role:?}", self.name()))
    }

    /// What is kept of live or cold migrations.
    fn records<T: DeserializeOwned>(&self, cold: bool) -> Result<Vec<T>> {
        let directory = self.logs().join("virt-ferry");
        let mut found = Vec::new();
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = fs::read(&path).with_context(|| path.display().to_string())?;
            let record: Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
            if record.get("cold").is_some() == cold {
                found.push(serde_json::from_value(record).with_context(|| path.display().to_string())?);
            }
        }
        Ok(found)
    }

    /// The newest of [`Host::timelines`].
    ///
    /// # Errors
    /// If there is none.
    pub fn last_timeline(&self, role: Role) -> Result<Timeline> {
        self.timelines(role)?
            .pop()
            .with_context(|| format!("{} has no timeline of a {role:?}", self.name()))
    }

    /// How many guests virt-ferry has moved away from this host.
    ///
    /// # Errors
    /// If a timeline cannot be read.
    pub fn moved_away(&self) -> Result<usize> {
        let all = self.timelines(Role::Source)?;
        Ok(all
            .iter()
            .filter(|timeline| timeline.outcome == Outcome::Completed)
            .count())
    }

    /// Makes sure that virt-ferry has moved exactly so many guests away from this host; whatever else left it went
    /// libvirt's own way.
    ///
    /// # Errors
    /// If not.
    pub fn assert_moved_away(&self, expected: usize) -> Result<()> {
        let moved = self.moved_away()?;
        ensure!(
            moved == expected,
            "virt-ferry moved {moved} guests away from {}, not {expected}",
            self.name()
        );
        Ok(())
    }
}
