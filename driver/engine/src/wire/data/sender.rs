//! The sending side of a data stream.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use super::{Progress, Totals};
use crate::wire::frame::{Frame, Invalid, HEADER_LENGTH, MAX_PAYLOAD};
use crate::wire::{Breaker, Connection, Error, Result};

/// The usual window, bytes: what 10 Gbit/s carry in 50 ms.
pub const WINDOW: u64 = 64 << 20;

/// The smallest window, bytes: a sender always has room for what a receiver holds before it acknowledges.
pub const MIN_WINDOW: u64 = 2 * super::ACK_INTERVAL;

/// Small frames are collected up to this before they are written, bytes.
const COALESCE: usize = 256 << 10;

/// A payload from this on is written from where it is, bytes: copying it costs more than a system call saves.
const DIRECT: usize = 64 << 10;

/// Sends guest memory. After an error it is of no more use.
pub struct DataSender {
    connection: Connection,
    /// Frames not yet written.
    pending: Vec<u8>,
    window: u64,
    sequence: u64,
    acknowledged_sequence: u64,
    acknowledged: u64,
    totals: Totals,
    digest: Box<Xxh3>,
    /// An answer of the receiver, as far as it has arrived.
    answer: [u8; HEADER_LENGTH],
    answered: usize,
    progress: Arc<Progress>,
    packer: Option<Packer>,
}

/// Packs payloads, for links that are slower than zstd.
struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    packed: Vec<u8>,
}

impl Packer {
    /// The packed payload, where that saves an eighth: less is not worth the unpacking.
    fn pack(&mut self, payload: &[u8]) -> Option<&[u8]> {
        self.packed.resize(payload.len() - payload.len() / 8, 0);
        // The only error left is that it does not fit.
        let length = self.zstd.compress_to_buffer(payload, &mut self.packed[..]).ok()?;
        Some(&self.packed[..length])
    }
}

impl DataSender {
    /// Takes over a [`Purpose::Data`](crate::wire::Purpose::Data) connection. `window` is how many bytes may be
    /// unacknowledged, [`WINDOW`] usually, [`MIN_WINDOW`] at least.
    pub fn new(connection: Connection, window: u64) -> DataSender {
        DataSender {
            connection,
            pending: Vec::with_capacity(COALESCE + HEADER_LENGTH + DIRECT),
            window: window.max(MIN_WINDOW),
            sequence: 0,
            acknowledged_sequence: 0,
            acknowledged: 0,
            totals: Totals::default(),
            digest: Box::new(Xxh3::new()),
            answer: [0; HEADER_LENGTH],
            answered: 0,
            progress: Arc::default(),
            packer: None,
        }
    }

    /// From now on, packs what can be packed with zstd at this level, 1 to 19.
    ///
    /// # Errors
    /// Memory for zstd's tables.
    pub fn pack(&mut self, level: i32) -> std::io::Result<()> {
        self.packer = Some(Packer {
            zstd: zstd::bulk::Compressor::new(level)?,
            packed: Vec::new(),
        });
        Ok(())
    }

    /// How far it is, for other threads.
    pub fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    /// A handle to break the stream off from another thread.
    pub fn breaker(&self) -> Breaker {
        self.connection.breaker()
    }

    /// Sends `payload`, the content of `block` at `offset`; more than 1 MiB goes in several frames.
    ///
    /// The bytes must not change before this returns: a copy, not the running guest's memory itself. What is
    /// sent and what is summed up would otherwise differ, and the stream be refused at its end.
    ///
    /// # Errors
    /// [`Error::Unsendable`] if offset or length are no multiples of 4096 or nothing is sent; [`Error::Rejected`] with
    /// the receiver's reason; those of the connection.
    pub fn data(&mut self, block: u16, offset: u64, payload: &[u8]) -> Result<()> {
        if payload.is_empty() {
            return Err(Error::Unsendable {
                what: Invalid::Length(0),
            });
        }
        for (index, piece) in payload.chunks(MAX_PAYLOAD).enumerate() {
            let offset = offset.saturating_add((index * MAX_PAYLOAD) as u64);
            let mut packer = self.packer.take();
            let packed = packer.as_mut().and_then(|packer| packer.pack(piece));
            let sent = self.piece(block, offset, piece, packed);
            self.packer = packer;
            sent?;
        }
        Ok(())
    }

    /// Sends one frame's worth of memory, packed where that is given.
    fn piece(&mut self, block: u16, offset: u64, piece: &[u8], packed: Option<&[u8]>) -> Result<()> {
        let span = piece.len() as u32;
        let (frame, payload) = match packed {
            Some(packed) => {
                let length = packed.len() as u32;
                let frame = Frame::Packed {
                    block,
                    offset,
                    length,
                    span,
                };
                (frame, packed)
            }
            None => {
                let frame = Frame::Data {
                    block,
                    offset,
                    length: span,
                };
                (frame, piece)
            }
        };
        self.queue(frame)?;
        self.totals.data_bytes += piece.len() as u64;
        if payload.len() >= DIRECT {
            return self.write(payload);
        }
        self.pending.extend_from_slice(payload);
        Ok(())
    }

    /// Says that `span` bytes of `block` at `offset` are zeros.
    ///
    /// # Errors
    /// As with [`data`](Self::data).
    pub fn zero(&mut self, block: u16, offset: u64, span: u64) -> Result<()> {
        self.queue(Frame::Zero { block, offset, span })?;
        self.totals.zero_bytes = self.totals.zero_bytes.saturating_add(span);
        Ok(())
    }

    /// Writes the frames still collected, without waiting for their acknowledgement.
    ///
    /// # Errors
    /// As with [`data`](Self::data).
    pub fn flush(&mut self) -> Result<()> {
        self.write(&[])
    }

    /// Returns when the receiver has applied and acknowledged everything sent so far. `round` appears in its log.
    ///
    /// # Errors
    /// As with [`data`](Self::data); [`Error::Timeout`] if no acknowledgement comes within the connection's patience.
    pub fn barrier(&mut self, round: u64) -> Result<()> {
        self.queue(Frame::Barrier { round })?;
        self.flush()?;
        self.wait_for(self.sequence)
    }

    /// Ends the stream: returns what went over it once the receiver has found the same.
    ///
    /// # Errors
    /// As with [`barrier`](Self::barrier); [`Error::Rejected`] if it found something else.
    pub fn finish(mut self) -> Result<Totals> {
        self.flush()?;
        self.totals.digest = self.digest.digest128();
        self.sequence += 1;
        let parts: [&[u8]; 2] = [&Frame::End.encode(self.sequence), &self.totals.encode()];
        let sent = self.connection.send(&parts, "ending the memory stream");
        self.explain(sent)?;
        self.wait_for(self.sequence)?;
        Ok(self.totals)
    }

    /// Puts a frame's header in line, when its frame fits into the window.
    fn queue(&mut self, frame: Frame) -> Result<()> {
        frame.check_own().map_err(|what| Error::Unsendable { what })?;
        let length = (HEADER_LENGTH + frame.payload_length()) as u64;
        if self.unacknowledged() + length > self.window {
            self.flush()?;
            while self.unacknowledged() + length > self.window {
                self.await_answer()?;
            }
        }
        if self.pending.len() >= COALESCE {
            self.flush()?;
        }
        self.sequence += 1;
        self.pending.extend_from_slice(&frame.encode(self.sequence));
        self.totals.frames += 1;
        self.totals.wire_bytes += length;
        Ok(())
    }

    /// Writes what is pending and then `payload`, and looks at the answers that have come meanwhile.
    fn write(&mut self, payload: &[u8]) -> Result<()> {
        self.digest.update(&self.pending);
        self.digest.update(payload);
        let sent = self
            .connection
            .send(&[&self.pending, payload], "sending guest memory");
        self.pending.clear();
        self.explain(sent)?;
        self.progress.show(&self.totals);
        self.read_answers()
    }

    /// Of a failed write, the receiver's own reason says more than the broken connection, if it is still to be had.
    fn explain(&mut self, sent: Result<()>) -> Result<()> {
        match sent {
            Err(error @ (Error::PeerGone { .. } | Error::Timeout { .. })) => match self.read_answers() {
                Err(rejected @ Error::Rejected { .. }) => Err(rejected),
                _ => Err(error),
            },
            other => other,
        }
    }

    fn unacknowledged(&self) -> u64 {
        self.totals.wire_bytes - self.acknowledged
    }

    fn wait_for(&mut self, sequence: u64) -> Result<()> {
        while self.acknowledged_sequence < sequence {
            self.await_answer()?;
        }
        Ok(())
    }

    /// Takes the answers that are there.
    fn read_answers(&mut self) -> Result<()> {
        let doing = "reading acknowledgements";
        while let Some(count) = self
            .connection
            .receive_ready(&mut self.answer[self.answered..], doing)?
        {
            self.take(count)?;
        }
        Ok(())
    }

    /// Waits for some of the next answer.
    fn await_answer(&mut self) -> Result<()> {
        let doing = "waiting for it to acknowledge guest memory";
        let count = self
            .connection
            .receive_patiently(&mut self.answer[self.answered..], doing)?;
        self.take(count)
    }

    /// `count` more bytes of an answer are there.
    fn take(&mut self, count: usize) -> Result<()> {
        self.answered += count;
        if self.answered < HEADER_LENGTH {
            return Ok(());
        }
        self.answered = 0;
        let peer = self.connection.peer();
        let bad = |what| Error::BadFrame { peer, what };
        match Frame::decode(&self.answer).map_err(bad)? {
            (Frame::Ack { bytes }, sequence) => {
                let possible = (self.acknowledged_sequence..=self.sequence).contains(&sequence)
                    && (self.acknowledged..=self.totals.wire_bytes).contains(&bytes);
                if !possible {
                    return Err(bad(Invalid::Acknowledgement { sequence, bytes }));
                }
                self.acknowledged_sequence = sequence;
                self.acknowledged = bytes;
                self.progress.show_acknowledged(bytes);
                Ok(())
            }
            (Frame::Reject(reason), _) => Err(Error::Rejected { peer, reason }),
            _ => Err(bad(Invalid::Direction)),
        }
    }
}
