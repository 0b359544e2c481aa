//! One data connection of the source: blocks are asked for, read, hashed and sent.

use super::files::Source;
use super::frame::{Frame, Invalid, Want, HEADER, MAX_REASON, WANT};
use super::hash::{self, Blocks};
use super::reader::Aligned;
use super::Error;
use crate::control::Meter;
use crate::live::signals::Signals;
use crate::memory::{split_zero, Run};
use crate::wire::{self, Connection};
use ferry_contract::cold::BLOCK;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// Small pieces are collected up to this before they are written, bytes.
const COALESCE: usize = 256 << 10;
/// A piece from this on is written from where it is, bytes.
const DIRECT: usize = 64 << 10;

/// What all data connections of a source share.
pub struct Shelf {
    /// The guest's files.
    pub files: Vec<Source>,
    /// What has been read of each.
    pub blocks: Vec<Mutex<Blocks>>,
    /// zstd's level, where the operator wants it.
    pub compression: Option<i32>,
    /// Bytes of blocks answered, however they were.
    pub answered: AtomicU64,
    /// The operator's bandwidth, and the end of the session.
    pub signals: Arc<Signals>,
    /// For the statistics.
    pub meter: Arc<Meter>,
}

impl Shelf {
    /// Answers what is asked for until the other end has enough.
    ///
    /// # Errors
    /// Of the connection; what cannot be read is told to the destination.
    pub fn serve(&self, mut connection: Connection) -> Result<(), Error> {
        let mut reader = Answering {
            shelf: self,
            block: Aligned::default(),
            out: Vec::with_capacity(COALESCE + DIRECT + 2 * HEADER),
            packer: self.compression.and_then(Packer::new),
        };
        loop {
            let mut bytes = [0; WANT];
            match connection.receive_exact(&mut bytes, "waiting for a request for blocks") {
                Ok(()) => {}
                Err(wire::Error::PeerGone { .. }) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            let want = Want::decode(&bytes).and_then(|want| self.check(want));
            let (want, length) = want.map_err(|what| bad(&connection, what))?;
            reader.answer(&mut connection, want, length)?;
            self.answered.fetch_add(length as u64, Relaxed);
        }
    }

    /// How long the block is, if there is such a one.
    fn check(&self, want: Want) -> Result<(Want, usize), Invalid> {
        let file = usize::try_from(want.file)
            .ok()
            .and_then(|file| self.files.get(file));
        match file.map_or(0, |file| hash::length(file.size, want.block)) {
            0 => Err(Invalid::NoSuchBlock {
                file: want.file,
                block: want.block,
            }),
            length => Ok((want, length)),
        }
    }
}

/// An error of what came over this connection.
pub fn bad(connection: &Connection, what: Invalid) -> Error {
    wire::Error::BadMessage {
        peer: connection.peer(),
        what: what.to_string(),
    }
    .into()
}

struct Answering<'a> {
    shelf: &'a Shelf,
    block: Aligned,
    out: Vec<u8>,
    packer: Option<Packer>,
}

impl Answering<'_> {
    fn answer(&mut self, connection: &mut Connection, want: Want, length: usize) -> Result<(), Error> {
        let index = want.file as usize;
        let file = &self.shelf.files[index];
        let read = file.read(&mut self.block, want.block * BLOCK, length);
        let hash = read.map(|()| hash::block(self.block.get(length)));
        let noted = hash.and_then(|hash| {
            let mut blocks = self.shelf.blocks[index]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            match blocks.note(want.block, hash) {
                true => Ok(hash),
                false => Err(Error::Other(format!(
                    "{} was changed while it was copied",
                    file.path.display()
                ))),
            }
        });
        let same = |hash| want.have == Some(hash);
        match noted {
            Err(error) => {
                let reason = error.to_string();
                let reason = &reason.as_bytes()[..reason.len().min(MAX_REASON)];
                self.end(
                    connection,
                    Frame::Failed {
                        length: reason.len() as u32,
                    },
                    reason,
                )
            }
            Ok(None) => {
                self.shelf.meter.zero.fetch_add(length as u64, Relaxed);
                self.end(connection, Frame::Zeros { same: same(None) }, &[])
            }
            Ok(Some(hash)) if same(Some(hash)) => self.end(connection, Frame::End { same: true }, &hash),
            Ok(Some(hash)) => {
                self.pieces(connection, length)?;
                self.end(connection, Frame::End { same: false }, &hash)
            }
        }
    }

    fn pieces(&mut self, connection: &mut Connection, length: usize) -> Result<(), Error> {
        for run in split_zero(self.block.get(length)) {
            let range = match run {
                Run::Data(range) => range,
                Run::Zero(range) => {
                    self.shelf.meter.zero.fetch_add(range.len() as u64, Relaxed);
                    continue;
                }
            };
            let bytes = &self.block.get(length)[range.clone()];
            let packed = self.packer.as_mut().and_then(|packer| packer.pack(bytes));
            let payload = packed.unwrap_or(bytes);
            let frame = Frame::Piece {
                packed: packed.is_some(),
                offset: range.start as u32,
                length: payload.len() as u32,
                span: range.len() as u32,
            };
            self.out.extend_from_slice(&frame.encode());
            let sent = (HEADER + payload.len()) as u64;
            if payload.len() >= DIRECT {
                connection.send(&[&self.out, payload], "sending a block")?;
                self.out.clear();
            } else {
                self.out.extend_from_slice(payload);
                if self.out.len() >= COALESCE {
                    connection.send(&[&self.out], "sending a block")?;
                    self.out.clear();
                }
            }
            self.shelf.meter.data.fetch_add(range.len() as u64, Relaxed);
            self.shelf.meter.wire.fetch_add(sent, Relaxed);
            self.shelf.signals.pace.spend(sent, &self.shelf.signals)?;
        }
        Ok(())
    }

    fn end(&mut self, connection: &mut Connection, frame: Frame, payload: &[u8]) -> Result<(), Error> {
        self.out.extend_from_slice(&frame.encode());
        self.out.extend_from_slice(payload);
        let sent = connection.send(&[&self.out], "sending a block");
        self.shelf
            .meter
            .wire
            .fetch_add((HEADER + payload.len()) as u64, Relaxed);
        self.out.clear();
        Ok(sent?)
    }
}

/// Packs pieces, where that makes them shorter.
struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
    packed: Vec<u8>,
}

impl Packer {
    fn new(level: i32) -> Option<Self> {
        let zstd = zstd::bulk::Compressor::new(level).ok()?;
        Some(Self {
            zstd,
            packed: vec![0; BLOCK as usize],
        })
    }

    fn pack(&mut self, bytes: &[u8]) -> Option<&[u8]> {
        // One byte less than it was: what does not shrink does not fit.
        let room = bytes.len().checked_sub(1)?.min(self.packed.len());
        let length = self
            .zstd
            .compress_to_buffer(bytes, &mut self.packed[..room])
            .ok()?;
        (length > 0).then(|| &self.packed[..length])
    }
}
