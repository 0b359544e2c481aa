//! The lines a guest says, on its serial console and in answer to commands.
//!
//! ```text
//!   ferry: filling pages=16384                                once, as soon as there are devices
//!   ferry: up pages=16384 set=4096 …                          once, when the load begins
//!   ferry: t=12.003 seq=123456 pages=65536 … errors=0 …       every second: Status
//!   ferry: error area=memory page=17 expected=90 kind=stale seen=89      at once, the first few
//!   ferry: verdict ok id=4 pages=65536 seq=123456 …           in answer to "check 4": Verdict
//!   ferry: verdict BAD id=5 pages=65536 seq=123999 …
//!   ferry: fatal …                                            the guest cannot do what it was told
//! ```
//!
//! The order of words in a line is free and unknown words are skipped, so either side may learn new ones.

use std::fmt;

/// What every line begins with.
pub const PREFIX: &str = "ferry: ";

/// The words `key=value` of a line.
fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

fn number<T: std::str::FromStr>(line: &str, key: &str) -> Option<T> {
    value(line, key)?.parse().ok()
}

/// What the guest says every second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Seconds since boot by the guest's own monotonic clock, which stands still while the guest is stopped.
    pub t: f64,
    /// Sequence number of the last page write: how many there were, the first filling included.
    pub seq: u64,
    /// Pages in the area, working set and filled memory together.
    pub pages: u64,
    /// Pages the writer goes through.
    pub set: u64,
    /// Complete passes of the background checker.
    pub checked: u64,
    /// Damage seen since the start; never goes down.
    pub errors: u64,
    /// Longest gap between two turns of a 1 ms loop since the last line, in ms of guest time.
    pub stall_ms: f64,
    /// The longest such gap since the start or the last `reset`, in ms.
    pub worst_ms: f64,
    /// Time the real-time clock went on while the guest's own stood still, since the start or the last `reset`, in ms.
    pub lost_ms: f64,
    /// Pages written since the last line, by the guest's second.
    pub rate: u64,
    /// Blocks read and written by the disk load.
    pub disk: u64,
    /// Heartbeats sent.
    pub beats: u64,
}

impl Status {
    /// Reads a line; `None` if it is another one or cut short.
    pub fn parse(line: &str) -> Option<Self> {
        let words = line.trim_end().strip_prefix(PREFIX)?;
        if !words.starts_with("t=") {
            return None;
        }
        Some(Status {
            t: number(words, "t")?,
            seq: number(words, "seq")?,
            pages: number(words, "pages")?,
            set: number(words, "set")?,
            checked: number(words, "checked")?,
            errors: number(words, "errors")?,
            stall_ms: number(words, "stall_ms")?,
            worst_ms: number(words, "worst_ms")?,
            lost_ms: number(words, "lost_ms")?,
            rate: number(words, "rate")?,
            disk: number(words, "disk")?,
            beats: number(words, "beats")?,
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status {
            t,
            seq,
            pages,
            set,
            checked,
            errors,
            ..
        } = self;
        let Status {
            stall_ms,
            worst_ms,
            lost_ms,
            rate,
            disk,
            beats,
            ..
        } = self;
        write!(
            f,
            "{PREFIX}t={t:.3} seq={seq} pages={pages} set={set} checked={checked} errors={errors} "
        )?;
        write!(
            f,
            "stall_ms={stall_ms:.1} worst_ms={worst_ms:.1} lost_ms={lost_ms:.1} rate={rate} "
        )?;
        write!(f, "disk={disk} beats={beats}")
    }
}

/// The answer to `check`: what one complete pass over all memory found, and whether anything was ever found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The word that came with the command, to tell one answer from another.
    pub id: String,
    /// Pages checked.
    pub pages: u64,
    /// Sequence number when the pass ended.
    pub seq: u64,
    /// Damage seen since the start, this pass included; 0 is the only good answer.
    pub errors: u64,
    /// How long the pass took, in ms of guest time.
    pub ms: u64,
}

impl Verdict {
    /// Whether no damage was ever seen.
    pub fn ok(&self) -> bool {
        self.errors == 0
    }

    /// Reads a line; `None` if it is another one, or its two ways of saying ok disagree.
    pub fn parse(line: &str) -> Option<Self> {
        let words = line.trim_end().strip_prefix(PREFIX)?.strip_prefix("verdict ")?;
        let verdict = Verdict {
            id: value(words, "id")?.to_owned(),
            pages: number(words, "pages")?,
            seq: number(words, "seq")?,
            errors: number(words, "errors")?,
            ms: number(words, "ms")?,
        };
        let said = if verdict.ok() { "ok " } else { "BAD " };
        words.starts_with(said).then_some(verdict)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict {
            id,
            pages,
            seq,
            errors,
            ms,
        } = self;
        let word = if self.ok() { "ok" } else { "BAD" };
        write!(
            f,
            "{PREFIX}verdict {word} id={id} pages={pages} seq={seq} errors={errors} ms={ms}"
        )
    }
}

/// One heartbeat: the datagram's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Number of this heartbeat, from 1; a number not received was lost on the way.
    pub number: u64,
    /// Nanoseconds of the guest's monotonic clock when it was sent.
    pub sent_ns: u64,
}

impl Beat {
    /// Reads a datagram; `None` if it is no heartbeat.
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        let words = std::str::from_utf8(datagram).ok()?.strip_prefix("ferry-beat ")?;
        Some(Beat {
            number: number(words, "n")?,
            sent_ns: number(words, "ns")?,
        })
    }
}

impl fmt::Display for Beat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ferry-beat n={} ns={}", self.number, self.sent_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_round_trip() {
        let status = Status {
            t: 12.5,
            seq: 9,
            pages: 4,
            lost_ms: 31.5,
            beats: 7,
            ..Status::default()
        };
        assert_eq!(Status::parse(&format!("{status}\r\n")), Some(status));
        for errors in [0, 3] {
            let verdict = Verdict {
                id: "a1".to_owned(),
                pages: 4,
                seq: 9,
                errors,
                ms: 20,
            };
            assert_eq!(Verdict::parse(&verdict.to_string()), Some(verdict));
        }
        let beat = Beat {
            number: 3,
            sent_ns: 1_000_000,
        };
        assert_eq!(Beat::parse(beat.to_string().as_bytes()), Some(beat));
    }

    #[test]
    fn a_cut_or_contradictory_line_is_none() {
        let whole = Status::default().to_string();
        assert_eq!(Status::parse(&whole[..whole.len() - 3]), None);
        assert_eq!(
            Verdict::parse("ferry: verdict ok id=1 pages=4 seq=9 errors=3 ms=20"),
            None
        );
        assert_eq!(
            Verdict::parse("ferry: verdict BAD id=1 pages=4 seq=9 errors=0 ms=20"),
            None
        );
    }
}
