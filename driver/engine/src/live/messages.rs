//! What the two engines say on their control connection: the source asks, the destination answers.

use crate::wire::Totals;
use serde::{Deserialize, Serialize};

/// From the source.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// The connections of this session are made.
    Open {
        /// How many of them carry memory.
        streams: u16,
        /// The source host's name, for the destination's timeline.
        host: String,
    },
    /// The guest stands still and everything has been sent.
    Commit {
        /// What each stream carried, in order.
        totals: Vec<Totals>,
        /// Digests of all memory, where the configuration asks for the comparison.
        memory: Option<super::verify::Digests>,
    },
    /// Does the guest run there? Answered once libvirt has concluded.
    Resumed {
        /// The source's part of the pause.
        pause: SourcePause,
    },
}

/// From the destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// All streams are there.
    Ready {
        /// The destination host's name.
        host: String,
    },
    /// All of the memory is in place, exactly as sent. From here on the destination may own the guest.
    Committed,
    /// It is not, for this reason; the guest stays.
    Refused {
        /// What differs, or what ended the migration.
        cause: String,
        /// The destination host's name.
        host: String,
    },
    /// The guest runs, or stands where it was sent paused.
    Resumed {
        /// The destination's part of the pause.
        pause: DestinationPause,
    },
    /// The guest does not run here and never will.
    NotResumed,
}

/// The pause as the source knows it, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SourcePause {
    /// vCPUs stopped until block I/O drained.
    pub stop_ms: f64,
    /// The last copy, until the destination had applied it.
    pub last_copy_ms: f64,
    /// Its pages.
    pub pages: u64,
    /// Its bytes of page data.
    pub bytes: u64,
}

/// The pause as the destination knows it, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DestinationPause {
    /// Commitment until QEMU had loaded the device state.
    pub device_state_ms: f64,
    /// Device state loaded until the vCPUs ran.
    pub resume_ms: f64,
}

/// Both parts together. The two hosts' clocks need not agree: only spans of one clock are added, and half a round
/// trip of the network, in which the commitment travels, is left out.
pub fn downtime(source: SourcePause, destination: DestinationPause) -> crate::report::Downtime {
    crate::report::Downtime {
        total_ms: source.stop_ms + source.last_copy_ms + destination.device_state_ms + destination.resume_ms,
        stop_ms: source.stop_ms,
        last_copy_ms: source.last_copy_ms,
        device_state_ms: destination.device_state_ms,
        resume_ms: destination.resume_ms,
        last_copy_pages: source.pages,
        last_copy_bytes: source.bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commitment_survives_its_text() {
        let totals = Totals {
            frames: 3,
            data_bytes: 8192,
            zero_bytes: 4096,
            wire_bytes: 9000,
            digest: u128::MAX - 5,
        };
        let ask = Ask::Commit {
            totals: vec![totals],
            memory: None,
        };
        let text = serde_json::to_string(&ask).unwrap();
        let Ok(Ask::Commit {
            totals: back,
            memory: None,
        }) = serde_json::from_str(&text)
        else {
            panic!("{text}")
        };
        assert_eq!(back, [totals]);
    }
}
