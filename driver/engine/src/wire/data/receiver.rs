//! The receiving side of a data stream.

use std::io;
use std::sync::Arc;

use tracing::{debug, warn};
use xxhash_rust::xxh3::Xxh3;

use super::{Apply, Progress, Totals, ACK_INTERVAL};
use crate::wire::frame::{Checker, Frame, Invalid, Rejection, HEADER_LENGTH, MAX_PAYLOAD};
use crate::wire::{Breaker, Connection, Error, Result};

/// Small frames are read together, up to this many bytes: it stays in a processor's cache.
const READ_AHEAD: usize = 256 << 10;

/// From this on, what a frame still lacks is read alone, bytes: reading ahead would mean moving it afterwards.
const ALONE: usize = 64 << 10;

/// An incomplete frame of up to this many bytes is moved to the buffer's start: the buffer stays small and hot.
const MOVABLE: usize = 8 << 10;

const CAPACITY: usize = HEADER_LENGTH + MAX_PAYLOAD + READ_AHEAD;

/// Receives guest memory.
pub struct DataReceiver {
    connection: Connection,
    checker: Checker,
    buffer: Box<[u8]>,
    /// What of the buffer is filled and not yet applied.
    start: usize,
    end: usize,
    totals: Totals,
    digest: Box<Xxh3>,
    acknowledged: u64,
    progress: Arc<Progress>,
    unpacker: Unpacker,
}

/// Unpacks payloads, made when the first one comes.
#[derive(Default)]
struct Unpacker {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    pages: Vec<u8>,
}

impl Unpacker {
    /// Exactly `span` bytes, or nothing: a payload that unpacks to more is not unpacked further.
    fn unpack(&mut self, payload: &[u8], span: usize) -> Option<&[u8]> {
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(zstd::bulk::Decompressor::new().ok()?),
        };
        self.pages.resize(span, 0);
        let length = zstd.decompress_to_buffer(payload, &mut self.pages[..]).ok()?;
        (length == span).then_some(&self.pages[..])
    }
}

impl DataReceiver {
    /// Takes over a [`Purpose::Data`](crate::wire::Purpose::Data) connection to a guest whose RAM blocks have the
    /// lengths `layout` (bytes; the index is the block's number).
    pub fn new(connection: Connection, layout: &[u64]) -> DataReceiver {
        DataReceiver {
            connection,
            checker: Checker::new(layout),
            buffer: vec![0; CAPACITY].into_boxed_slice(),
            start: 0,
            end: 0,
            totals: Totals::default(),
            digest: Box::new(Xxh3::new()),
            acknowledged: 0,
            progress: Arc::default(),
            unpacker: Unpacker::default(),
        }
    }

    /// How far it is, for other threads.
    pub fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    /// A handle to break the stream off from another thread.
    pub fn breaker(&self) -> Breaker {
        self.connection.breaker()
    }

    /// Applies the stream to its end and returns what came, which is then what the sender sent.
    ///
    /// # Errors
    /// [`Error::BadFrame`], [`Error::Apply`], [`Error::Mismatch`], of which the sender is told too; those of the
    /// connection.
    pub fn run(mut self, apply: &mut impl Apply) -> Result<Totals> {
        let outcome = self.receive(apply);
        if let Some(reason) = outcome.as_ref().err().and_then(rejection) {
            if let Err(error) = &outcome {
                warn!(%error, "memory stream rejected");
            }
            let header = Frame::Reject(reason).encode(self.checker.last());
            if self
                .connection
                .send(&[&header], "rejecting the memory stream")
                .is_ok()
            {
                self.connection.linger();
            }
        }
        outcome
    }

    fn receive(&mut self, apply: &mut impl Apply) -> Result<Totals> {
        let peer = self.connection.peer();
        loop {
            let frame = self.next_frame()?;
            let length = HEADER_LENGTH + frame.payload_length();
            self.need(length)?;
            let bytes = &self.buffer[self.start..self.start + length];
            let payload = &bytes[HEADER_LENGTH..];
            let applied = |block, offset, outcome: io::Result<()>| {
                outcome.map_err(|source| Error::Apply {
                    peer,
                    block,
                    offset,
                    source,
                })
            };
            match frame {
                Frame::Data { block, offset, .. } => {
                    applied(block, offset, apply.data(block, offset, payload))?;
                    self.totals.data_bytes += payload.len() as u64;
                }
                Frame::Packed {
                    block,
                    offset,
                    length,
                    span,
                } => {
                    let bad = || Error::BadFrame {
                        peer,
                        what: Invalid::Packed { length, span },
                    };
                    let pages = self.unpacker.unpack(payload, span as usize).ok_or_else(bad)?;
                    applied(block, offset, apply.data(block, offset, pages))?;
                    self.totals.data_bytes += pages.len() as u64;
                }
                Frame::Zero { block, offset, span } => {
                    applied(block, offset, apply.zero(block, offset, span))?;
                    // A hostile sender could announce the same zeros until this wraps.
                    self.totals.zero_bytes = self.totals.zero_bytes.saturating_add(span);
                }
                Frame::Barrier { round } => {
                    applied(0, 0, apply.barrier(round))?;
                    debug!(%peer, round, "barrier reached");
                }
                // The checker lets nothing else through.
                Frame::End | Frame::Ack { .. } | Frame::Reject(_) => return self.end(peer),
            }
            self.digest.update(bytes);
            self.start += length;
            self.totals.frames += 1;
            self.totals.wire_bytes += length as u64;
            self.progress.show(&self.totals);
            let due = self.totals.wire_bytes - self.acknowledged >= ACK_INTERVAL;
            if due || matches!(frame, Frame::Barrier { .. }) {
                self.acknowledge()?;
            }
        }
    }

    /// The End frame is in the buffer: compares its totals with ours.
    fn end(&mut self, peer: std::net::SocketAddr) -> Result<Totals> {
        self.totals.digest = self.digest.digest128();
        let mut payload = [0; Totals::LENGTH];
        let at = self.start + HEADER_LENGTH;
        payload.copy_from_slice(&self.buffer[at..at + Totals::LENGTH]);
        let theirs = Totals::decode(&payload);
        if theirs != self.totals {
            return Err(Error::Mismatch {
                peer,
                ours: Box::new(self.totals),
                theirs: Box::new(theirs),
            });
        }
        self.acknowledge()?;
        Ok(self.totals)
    }

    /// Reads and checks the next header, and leaves it in the buffer.
    fn next_frame(&mut self) -> Result<Frame> {
        self.need(HEADER_LENGTH)?;
        let mut header = [0; HEADER_LENGTH];
        header.copy_from_slice(&self.buffer[self.start..self.start + HEADER_LENGTH]);
        self.checker.admit(&header).map_err(|what| Error::BadFrame {
            peer: self.connection.peer(),
            what,
        })
    }

    /// Reads until the buffer holds `length` bytes.
    fn need(&mut self, length: usize) -> Result<()> {
        while self.end - self.start < length {
            let have = self.end - self.start;
            if have <= MOVABLE || self.start + length > CAPACITY {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, have);
            }
            let lacking = length - have;
            let limit = if lacking >= ALONE {
                lacking + HEADER_LENGTH
            } else {
                READ_AHEAD
            };
            let until = CAPACITY.min(self.end + limit);
            self.end += self
                .connection
                .receive_some(&mut self.buffer[self.end..until], "waiting for guest memory")?;
        }
        Ok(())
    }

    fn acknowledge(&mut self) -> Result<()> {
        self.acknowledged = self.totals.wire_bytes;
        self.progress.show_acknowledged(self.acknowledged);
        let header = Frame::Ack {
            bytes: self.acknowledged,
        }
        .encode(self.checker.last());
        self.connection.send(&[&header], "acknowledging guest memory")
    }
}

/// What the sender is to be told of an error; nothing where the connection itself has failed.
fn rejection(error: &Error) -> Option<Rejection> {
    match error {
        Error::BadFrame { .. } => Some(Rejection::Protocol),
        Error::Apply { source, .. } => Some(Rejection::Apply {
            errno: source.raw_os_error().unwrap_or(0),
        }),
        Error::Mismatch { .. } => Some(Rejection::Mismatch),
        _ => None,
    }
}
