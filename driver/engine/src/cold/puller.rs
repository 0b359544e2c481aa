//! One data connection of the destination: blocks are asked for, received and written. `serve` answers at the other end.
//!
//! Some requests are always on their way, so that neither a round trip nor the source's disk makes it wait. One that is cut
//! is made anew and asks again for what has not been answered, and for nothing else.

use super::chunks::Chunk;
use super::frame::{Frame, Invalid, Want, HEADER};
use super::hash::BlockHash;
use super::link::{is_cut, PAUSE, RECONNECT};
use super::pull::Pull;
use super::reader::Aligned;
use super::serve::bad;
use super::Error;
use crate::wire::{Connection, Purpose};
use ferry_contract::cold::BLOCK;
use ferry_contract::control::FailureKind;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// Requests that are on their way: 8 MiB, so that the source always knows what comes next.
const DEPTH: usize = 8;

/// A block to be had; the last one of its chunk brings that along.
struct Wanted {
    file: usize,
    block: u64,
    ends: Option<Chunk>,
}

/// A connection, made again where it is cut, and what is on its way over it.
pub struct Puller<'a> {
    pull: &'a Pull<'a>,
    number: u16,
    connection: Option<Connection>,
    /// Not answered yet, in the order of asking; the first `asked` of them are on their way.
    wanted: VecDeque<Wanted>,
    asked: usize,
    /// For what is here already.
    buffer: Aligned,
    /// The block that is being received, and where in it there is something, in ascending order.
    block: Aligned,
    spans: Vec<Range<usize>>,
    /// What has to be unpacked first.
    payload: Vec<u8>,
    unpacker: Option<zstd::bulk::Decompressor<'static>>,
}

impl<'a> Puller<'a> {
    /// The connection of this number; it is made with the first request.
    pub fn new(pull: &'a Pull<'a>, number: u16) -> Self {
        Self {
            pull,
            number,
            connection: None,
            wanted: VecDeque::new(),
            asked: 0,
            buffer: Aligned::default(),
            block: Aligned::default(),
            spans: Vec::new(),
            payload: vec![0; BLOCK as usize],
            unpacker: None,
        }
    }

    /// Pulls until nothing is left to be asked for.
    ///
    /// # Errors
    /// The source refuses or cannot be reached, the disk does not take what comes, or the session has ended.
    pub fn run(&mut self) -> Result<(), Error> {
        loop {
            match self.step() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(Error::Wire(error)) if is_cut(&error) => {
                    self.pull.signals.check()?;
                    tracing::warn!(%error, stream = self.number, "the connection was cut: connecting again");
                    // One that is taken and closed at once would be made again at once.
                    std::thread::sleep(PAUSE);
                    self.connection = None;
                    self.asked = 0;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks for what there is room for and takes one answer; false when there is nothing left to ask for.
    fn step(&mut self) -> Result<bool, Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self
                .pull
                .peer
                .connect(Purpose::Data(self.number), self.pull.signals, RECONNECT)?,
        };
        while self.asked < DEPTH {
            if self.asked == self.wanted.len() {
                let Some(chunk) = self.pull.next() else { break };
                let last = chunk.blocks.end - 1;
                let wanted = chunk.blocks.clone().map(|block| Wanted {
                    file: chunk.file,
                    block,
                    ends: (block == last).then(|| chunk.clone()),
                });
                self.wanted.extend(wanted);
            }
            let Wanted { file, block, .. } = self.wanted[self.asked];
            let file = &self.pull.files[file];
            let have = match file.is_here(block) || file.target.is_none() {
                true => Some(file.hash_here(&mut self.buffer, block)?),
                false => None,
            };
            let want = Want {
                file: file.number,
                block,
                have,
            };
            connection.send(&[&want.encode()], "asking for a block")?;
            self.asked += 1;
        }
        if self.wanted.is_empty() {
            return Ok(false);
        }
        self.take(&mut connection)?;
        self.connection = Some(connection);
        self.asked -= 1;
        let Some(answered) = self.wanted.pop_front() else {
            return Ok(false);
        };
        let length = self.pull.files[answered.file].length(answered.block);
        self.pull.answered(length);
        if let Some(chunk) = answered.ends {
            self.pull.written(chunk)?;
        }
        Ok(true)
    }

    /// Receives the answer for the first of the wanted blocks and writes it.
    fn take(&mut self, connection: &mut Connection) -> Result<(), Error> {
        let Wanted { file, block, .. } = self.wanted[0];
        let file = &self.pull.files[file];
        let (hash, same) = self.receive(connection, file.length(block))?;
        match &file.target {
            None if !same => {
                return Err(Error::Other(format!(
                    "{} is not the same as {} at the source: bases differ, move the whole chain with --copy-storage-all \
                     to other paths",
                    file.path.display(),
                    file.source.display()
                )))
            }
            Some(target) if !same => {
                // Spans leave zeros out, so what is here of the block has to go first.
                if file.is_here(block) {
                    target.zero(block * BLOCK, file.length(block) as u64)?;
                }
                for span in self.spans.drain(..) {
                    target.write(block * BLOCK, &self.block, span)?;
                }
            }
            _ => {}
        }
        let mut blocks = file.lock();
        let as_before = match hash {
            // What is not noted is zeros. A source may send as many as it likes.
            None => blocks.get(block).is_none(),
            Some(_) => blocks.note(block, hash),
        };
        match as_before {
            true => Ok(()),
            false => Err(Error::Other(format!(
                "{} was changed while it was copied",
                file.source.display()
            ))),
        }
    }

    /// Receives an answer: into `block` what there is of it, into `spans` where. Returns what the source says of the
    /// block, and whether what is here is the same.
    fn receive(&mut self, connection: &mut Connection, length: usize) -> Result<(BlockHash, bool), Error> {
        let doing = "waiting for a block";
        let meter = self.pull.meter;
        self.spans.clear();
        loop {
            let mut header = [0; HEADER];
            connection.receive_exact(&mut header, doing)?;
            let frame = Frame::decode(&header).map_err(|what| bad(connection, what))?;
            meter.wire.fetch_add((HEADER + frame.payload()) as u64, Relaxed);
            match frame {
                Frame::Piece {
                    packed, offset, span, ..
                } => {
                    let place = offset as usize..(offset + span) as usize;
                    let end = self.spans.last().map_or(0, |last| last.end);
                    if place.start < end || place.end > length {
                        return Err(bad(connection, Invalid::Place { offset, span }));
                    }
                    let into = &mut self.block.get_mut(length)[place.clone()];
                    match packed {
                        false => connection.receive_exact(into, doing)?,
                        true => {
                            let payload = &mut self.payload[..frame.payload()];
                            connection.receive_exact(payload, doing)?;
                            if !unpack(&mut self.unpacker, payload, into) {
                                return Err(bad(connection, Invalid::Length(payload.len() as u32)));
                            }
                        }
                    }
                    meter.data.fetch_add(u64::from(span), Relaxed);
                    match self.spans.last_mut().filter(|last| last.end == place.start) {
                        Some(last) => last.end = place.end,
                        None => self.spans.push(place),
                    }
                }
                Frame::End { same } => {
                    let mut hash = [0; 32];
                    connection.receive_exact(&mut hash, doing)?;
                    return Ok((Some(hash), same));
                }
                Frame::Zeros { same } => return Ok((None, same)),
                Frame::Failed { .. } => {
                    let payload = &mut self.payload[..frame.payload()];
                    connection.receive_exact(payload, doing)?;
                    return Err(Error::Refused {
                        kind: FailureKind::Failed,
                        cause: String::from_utf8_lossy(payload).into_owned(),
                        host: connection.peer().ip().to_string(),
                    });
                }
            }
        }
    }
}

/// Whether the payload unpacks to exactly as many bytes as `into` takes; not more than that is unpacked.
fn unpack(unpacker: &mut Option<zstd::bulk::Decompressor<'static>>, payload: &[u8], into: &mut [u8]) -> bool {
    if unpacker.is_none() {
        *unpacker = zstd::bulk::Decompressor::new().ok();
    }
    let Some(zstd) = unpacker else { return false };
    let length = into.len();
    zstd.decompress_to_buffer(payload, into)
        .is_ok_and(|unpacked| unpacked == length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_unpacks_to_more_than_it_says() {
        let packed = zstd::bulk::compress(&[0; 4096], 1).unwrap();
        let mut unpacker = None;
        let mut unpacks = |payload: &[u8], span| unpack(&mut unpacker, payload, &mut vec![1; span]);
        assert!(unpacks(&packed, 4096));
        for span in [4095, 4097, 1] {
            assert!(!unpacks(&packed, span));
        }
        assert!(!unpacks(b"not zstd", 4096));
    }
}
