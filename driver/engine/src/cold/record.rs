//! The record of one cold migration, as seen from one end: a JSON file beside the timelines of live ones, and a few lines
//! for the log and the terminal.

use crate::control::Meter;
use crate::report::{self, bytes_text, millis, rfc3339_now, time_text, Guest, Outcome, Role};
use ferry_contract::cold::journal::{self, Fate, Journal};
use ferry_contract::cold::{Deleted, Digest, Kept};
use ferry_contract::session::Encryption;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;
use uuid::Uuid;

/// The version of the file's format. Added fields do not raise it, changed meanings do.
pub const VERSION: u32 = 1;

/// One cold migration from one end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// What tells it from a live one's.
    pub cold: bool,
    /// The session both ends share.
    pub session: Uuid,
    /// This end.
    pub role: Role,
    /// The guest.
    pub guest: Guest,
    /// This host's name.
    pub local_host: String,
    /// The other host's.
    pub peer_host: String,
    /// How the connections were protected; absent if not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<String>,
    /// Wall-clock time of the start: RFC 3339, UTC.
    pub started: String,
    /// From the start to the end, milliseconds.
    pub total_ms: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// What it was at, in order.
    pub spans: Vec<Span>,
    /// The guest's files.
    pub files: Vec<FileRecord>,
    /// Bytes of files that had to be looked at: all but the holes.
    pub data_bytes: u64,
    /// Bytes of content sent, before they were packed.
    pub sent_bytes: u64,
    /// Bytes on the wire, but for what TLS adds.
    pub wire_bytes: u64,
}

/// Something that took its time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// What.
    pub what: String,
    /// Milliseconds since `started`.
    pub begin_ms: f64,
    /// Milliseconds since `started`.
    pub end_ms: f64,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileRecord {
    /// At the source.
    pub source: PathBuf,
    /// On this host.
    pub path: PathBuf,
    /// Its length, bytes.
    pub size: u64,
    /// What became of it.
    pub fate: Fate,
    /// What is in it, where both hosts have compared it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Why it is still where it was, at the source of a migration that has come to its good end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
}

/// Measures a migration while it runs.
pub struct Recorder {
    start: Instant,
    started: String,
    spans: Vec<Span>,
    current: Option<(&'static str, Instant)>,
    kept: Vec<Kept>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            started: rfc3339_now(),
            spans: Vec::new(),
            current: None,
            kept: Vec::new(),
        }
    }
}

impl Recorder {
    /// From now on it is at this.
    pub fn enter(&mut self, what: &'static str) {
        self.leave();
        tracing::info!("stage: {what}");
        self.current = Some((what, Instant::now()));
    }

    fn leave(&mut self) {
        if let Some((what, begin)) = self.current.take() {
            self.spans.push(Span {
                what: what.to_owned(),
                begin_ms: millis(begin.duration_since(self.start)),
                end_ms: millis(self.start.elapsed()),
            });
        }
    }

    /// What was not deleted at the end, and why.
    pub fn left(&mut self, deleted: &Deleted) {
        self.kept.clone_from(&deleted.kept);
    }

    /// Tells how it ended: in the log, and as a file in this directory.
    pub fn publish(&mut self, journal: &Journal, meter: &Meter, outcome: Outcome, directory: &Path) {
        self.leave();
        let entry = |entry: &journal::Entry| FileRecord {
            source: entry.source.clone(),
            path: entry.path.clone(),
            size: entry.size,
            fate: entry.fate,
            digest: entry.digest,
            kept: self
                .kept
                .iter()
                .find(|kept| kept.path == entry.source)
                .map(|kept| kept.reason.clone()),
        };
        let record = Record {
            version: VERSION,
            cold: true,
            session: journal.session,
            role: match journal.role {
                journal::Role::Source | journal::Role::Within => Role::Source,
                journal::Role::Destination => Role::Destination,
            },
            guest: Guest {
                name: journal.guest.name.clone(),
                uuid: journal.guest.uuid,
            },
            local_host: journal.host.clone(),
            peer_host: journal.peer.clone(),
            encryption: (journal.encryption == Encryption::Always).then(|| "TLS 1.3".into()),
            started: self.started.clone(),
            total_ms: millis(self.start.elapsed()),
            outcome,
            spans: std::mem::take(&mut self.spans),
            files: journal.entries.iter().map(entry).collect(),
            data_bytes: meter.total.load(Relaxed),
            sent_bytes: meter.data.load(Relaxed),
            wire_bytes: meter.wire.load(Relaxed),
        };
        for line in record.lines() {
            tracing::info!("{line}");
        }
        let picture = report::svg::render_cold(&record);
        let kept = report::keep(
            directory,
            (&record.guest.name, record.session, record.role),
            &record,
            &picture,
        );
        match kept {
            Ok(path) => tracing::info!(timeline = %path.display(), "timeline kept"),
            Err(error) => tracing::warn!("{error}"),
        }
    }
}

impl Record {
    /// Where the guest came from and where it went, fit to be shown.
    pub fn hosts(&self) -> (String, String) {
        let text = |host: &str| report::printable(host, 200);
        let (here, there) = (text(&self.local_host), text(&self.peer_host));
        match self.role {
            Role::Source => (here, there),
            Role::Destination => (there, here),
        }
    }

    /// How the data went.
    fn way(&self) -> String {
        // Within one host, the other place is one of this host's.
        if self
            .peer_host
            .strip_prefix(&self.local_host)
            .is_some_and(|place| place.starts_with(":/"))
        {
            return format!("{} of it copied", bytes_text(self.sent_bytes as f64));
        }
        format!(
            "{} of it sent in {} on the wire, {}",
            bytes_text(self.sent_bytes as f64),
            bytes_text(self.wire_bytes as f64),
            self.encryption
                .as_deref()
                .map_or_else(|| "not encrypted".to_owned(), |text| report::printable(text, 200)),
        )
    }

    /// A few lines for people.
    pub fn lines(&self) -> Vec<String> {
        let text = |text: &str| report::printable(text, 200);
        let ((from, to), name) = (self.hosts(), text(&self.guest.name));
        let total = time_text(self.total_ms);
        let headline = match &self.outcome {
            Outcome::Completed => format!("{name}, shut off, moved from {from} to {to} in {total}"),
            Outcome::Failed { error, .. } => {
                format!(
                    "{name}, shut off, did not move from {from} to {to}: failed after {total}: {}",
                    text(error)
                )
            }
            Outcome::Cancelled => {
                format!("{name}, shut off, did not move from {from} to {to}: cancelled after {total}")
            }
        };
        let spans = self.spans.iter().take(16);
        let spans: Vec<_> = spans
            .map(|span| format!("{} {}", text(&span.what), time_text(span.end_ms - span.begin_ms)))
            .collect();
        let moved = self.files.iter().filter(|file| file.fate == Fate::Moves).count();
        let mut lines = vec![
            headline,
            format!("stages: {}", spans.join(", ")),
            format!(
                "{moved} of {} files moved; {} of data, {}",
                self.files.len(),
                bytes_text(self.data_bytes as f64),
                self.way()
            ),
        ];
        lines.extend(self.files.iter().take(16).map(|file| {
            let digest = file
                .digest
                .map_or_else(|| "not compared".to_owned(), |digest| digest.to_string());
            let fate = match file.fate {
                Fate::Moves => "moves",
                Fate::Shared => "shared by both hosts",
                Fate::Present => "was there already",
            };
            let kept = file.kept.as_ref();
            format!(
                "{} ({}, {fate}) {digest}{}",
                text(&file.source.to_string_lossy()),
                bytes_text(file.size as f64),
                kept.map_or_else(String::new, |why| format!(", not deleted: {}", text(why)))
            )
        }));
        lines
    }
}
