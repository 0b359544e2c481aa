//! Guest memory on the wire.
//!
//! ```text
//!   DataSender                                          DataReceiver
//!     data, zero  ──frames──────────────────────────>   Apply::data, Apply::zero
//!                 <──Ack every 4 MiB, what is applied──
//!     barrier     ──Barrier────────────────────────>    (all before it is applied)
//!                 <──Ack──────────────────────────────
//!     finish      ──End { totals, digest }──────────>   compares with its own
//!                 <──Ack, or Reject─────────────────────
//! ```
//! The sender has at most a window of bytes unacknowledged, and the acknowledgements of a window fit into any socket
//! buffer: the receiver never blocks on writing while the sender blocks on writing, so neither waits for the other.

mod receiver;
mod sender;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

pub use receiver::DataReceiver;
pub use sender::{DataSender, MIN_WINDOW, WINDOW};

/// The receiver acknowledges whenever this much has been applied, bytes.
const ACK_INTERVAL: u64 = 4 << 20;

/// Where received memory goes.
pub trait Apply {
    /// Writes `bytes` (a multiple of 4096, at most 1 MiB) at `offset` of RAM block `block`. The place lies in the
    /// block; an earlier frame may have written it already.
    ///
    /// # Errors
    /// Any ends the stream; the sender is told the system's error number.
    fn data(&mut self, block: u16, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes `span` bytes (a multiple of 4096) at `offset` of `block` read as zeros.
    ///
    /// # Errors
    /// As with [`data`](Self::data).
    fn zero(&mut self, block: u16, offset: u64, span: u64) -> io::Result<()>;

    /// All frames before barrier `round` have been handed over; it is acknowledged when this returns.
    ///
    /// # Errors
    /// As with [`data`](Self::data).
    fn barrier(&mut self, round: u64) -> io::Result<()> {
        let _ = round;
        Ok(())
    }
}

/// What went over one data stream. Sender and receiver count on their own and must agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Totals {
    /// Frames, barriers included, the End frame not.
    pub frames: u64,
    /// Bytes of guest memory carried.
    pub data_bytes: u64,
    /// Bytes of guest memory announced as zeros.
    pub zero_bytes: u64,
    /// Bytes of these frames, headers included; what TLS adds not.
    pub wire_bytes: u64,
    /// xxh3-128 of these bytes. It finds mistakes of ours and of the hardware, not an attacker's changes.
    #[serde(with = "hexadecimal")]
    pub digest: u128,
}

/// A digest as text: not every form of serde carries 128 bits.
mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(digest: &u128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{digest:032x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u128, D::Error> {
        let text = String::deserialize(deserializer)?;
        u128::from_str_radix(&text, 16).map_err(serde::de::Error::custom)
    }
}

impl Totals {
    /// Bytes of the encoded form.
    pub(super) const LENGTH: usize = 48;

    fn encode(&self) -> [u8; Totals::LENGTH] {
        let mut bytes = [0; Totals::LENGTH];
        let counts = [self.frames, self.data_bytes, self.zero_bytes, self.wire_bytes];
        for (place, count) in bytes.chunks_exact_mut(8).zip(counts) {
            place.copy_from_slice(&count.to_le_bytes());
        }
        bytes[32..].copy_from_slice(&self.digest.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Totals::LENGTH]) -> Totals {
        let count = |at: usize| {
            let mut count = [0; 8];
            count.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(count)
        };
        let mut digest = [0; 16];
        digest.copy_from_slice(&bytes[32..]);
        Totals {
            frames: count(0),
            data_bytes: count(8),
            zero_bytes: count(16),
            wire_bytes: count(24),
            digest: u128::from_le_bytes(digest),
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} frames with {} bytes of data and {} of zeros in {} bytes, digest {:032x}",
            self.frames, self.data_bytes, self.zero_bytes, self.wire_bytes, self.digest
        )
    }
}

/// How far a stream is, readable from other threads while it runs. The counts may be a moment apart.
#[derive(Debug, Default)]
pub struct Progress {
    frames: AtomicU64,
    data_bytes: AtomicU64,
    zero_bytes: AtomicU64,
    wire_bytes: AtomicU64,
    acknowledged: AtomicU64,
}

impl Progress {
    /// Frames taken by the sender, or applied by the receiver.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Bytes of guest memory in them.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of guest memory they announce as zeros.
    pub fn zero_bytes(&self) -> u64 {
        self.zero_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of the frames themselves.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }

    /// Of [`wire_bytes`](Self::wire_bytes), those that the receiver has applied and acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    fn show(&self, totals: &Totals) {
        self.frames.store(totals.frames, Ordering::Relaxed);
        self.data_bytes.store(totals.data_bytes, Ordering::Relaxed);
        self.zero_bytes.store(totals.zero_bytes, Ordering::Relaxed);
        self.wire_bytes.store(totals.wire_bytes, Ordering::Relaxed);
    }

    fn show_acknowledged(&self, bytes: u64) {
        self.acknowledged.store(bytes, Ordering::Relaxed);
    }
}
