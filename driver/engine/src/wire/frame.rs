//! The frames of a data stream, and the checks on each before it is believed.
//!
//! ```text
//! header, 40 bytes, little-endian          Data    Packed  Zero    Barrier  End     Ack      Reject
//!  0  magic     2  0x4644 "DF"
//!  2  kind      1                          1       7       2       3        4       5        6
//!  3  zero      1
//!  4  block     2  RAM block number        block   block   block   0        0       0        reason
//!  6  zero      2
//!  8  length    4  payload bytes           bytes   bytes   0       0        48      0        0
//! 12  zero      4
//! 16  offset    8                          offset  offset  offset  round    0       0        errno
//! 24  span      8  bytes of guest memory   bytes   bytes   bytes   0        0       applied  0
//! 32  sequence  8  from 1, without gaps    ----------- of this frame -----------    -- last applied --
//! 40  payload                              pages   zstd                     totals
//! ```
//! Data, Packed, Zero, Barrier and End go from sender to receiver; Ack and Reject come back. Offsets and spans are multiples
//! of 4096. Every valid header has one encoding only. Parsing is total: any bytes give a frame or an [`Invalid`].

#[cfg(test)]
mod tests;

use super::data::Totals;

/// Bytes of a header.
pub const HEADER_LENGTH: usize = 40;

/// The most payload bytes in a frame.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// Payload bytes of an End frame.
pub const END_PAYLOAD: usize = Totals::LENGTH;

/// The unit of offsets and spans, bytes.
pub const PAGE: u64 = 4096;

const MAGIC: u16 = 0x4644;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// `length` bytes of guest memory follow, for `offset` in `block`.
    Data {
        /// RAM block number.
        block: u16,
        /// Where in the block, bytes.
        offset: u64,
        /// How many bytes, 4096 to [`MAX_PAYLOAD`].
        length: u32,
    },
    /// `length` bytes follow: one zstd frame that unpacks to `span` bytes of guest memory, for `offset` in `block`.
    Packed {
        /// RAM block number.
        block: u16,
        /// Where in the block, bytes.
        offset: u64,
        /// How many bytes follow, fewer than `span`.
        length: u32,
        /// How many bytes they unpack to, 4096 to [`MAX_PAYLOAD`].
        span: u32,
    },
    /// `span` bytes at `offset` of `block` are zeros.
    Zero {
        /// RAM block number.
        block: u16,
        /// Where in the block, bytes.
        offset: u64,
        /// How many bytes.
        span: u64,
    },
    /// All before this is to be applied and acknowledged.
    Barrier {
        /// A number of the caller's, for logs.
        round: u64,
    },
    /// The stream is complete; its [`Totals`] follow.
    End,
    /// Everything up to the header's sequence number is applied.
    Ack {
        /// Bytes of all frames applied.
        bytes: u64,
    },
    /// The receiver has given up.
    Reject(Rejection),
}

/// Why a receiver gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// A frame was invalid.
    #[error("it found a frame invalid; its log says which")]
    Protocol,
    /// The guest's memory there could not be written.
    #[error("it could not write the guest's memory: {}", std::io::Error::from_raw_os_error(*.errno))]
    Apply {
        /// The system's error number, 0 if there was none.
        errno: i32,
    },
    /// Totals or digest differ.
    #[error("what arrived there is not what was sent from here; the copy is unusable")]
    Mismatch,
    /// A reason of a later version.
    #[error("reason number {0}")]
    Other(u16),
}

/// What is wrong with bytes from a peer, or with arguments for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Invalid {
    /// Not a frame at all.
    #[error("magic number {0:#06x}")]
    Magic(u16),
    /// Unknown kind.
    #[error("kind {0} is unknown")]
    Kind(u8),
    /// A field that must be zero is not.
    #[error("a field that must be zero is not")]
    NotZero,
    /// A length that the kind does not allow.
    #[error("a length of {0} bytes is not allowed")]
    Length(u64),
    /// The span is not the length of the payload, or empty.
    #[error("a span of {0} bytes is not allowed")]
    Span(u64),
    /// What follows does not unpack to what the header says.
    #[error("{length} packed bytes do not unpack to {span}")]
    Packed {
        /// Payload bytes.
        length: u32,
        /// What they were to be.
        span: u32,
    },
    /// Not a multiple of 4096.
    #[error("{0:#x} is not a multiple of 4096")]
    Alignment(u64),
    /// No such RAM block.
    #[error("RAM block {0} does not exist")]
    Block(u16),
    /// Beyond the end of the block.
    #[error("offset {offset:#x} and span {span:#x} leave RAM block {block}")]
    Outside {
        /// RAM block number.
        block: u16,
        /// Offset, bytes.
        offset: u64,
        /// Span, bytes.
        span: u64,
    },
    /// A frame is missing, or came twice.
    #[error("sequence number {got} where {expected} is due")]
    Sequence {
        /// The next in order.
        expected: u64,
        /// The one that came.
        got: u64,
    },
    /// A frame of the other direction.
    #[error("the frame goes the other way")]
    Direction,
    /// An acknowledgement of what was not sent, or less than one before.
    #[error("sequence {sequence} with {bytes} bytes cannot be acknowledged now")]
    Acknowledgement {
        /// Its sequence number.
        sequence: u64,
        /// Its bytes.
        bytes: u64,
    },
    /// More after the end.
    #[error("data after the end of the stream")]
    AfterEnd,
    /// The end of a stream was confirmed with other words than ours.
    #[error("the confirmation of the stream's end is wrong")]
    Farewell,
}

impl Rejection {
    fn fields(self) -> (u16, u64) {
        match self {
            Rejection::Protocol => (1, 0),
            Rejection::Apply { errno } => (2, u64::from(errno.unsigned_abs())),
            Rejection::Mismatch => (3, 0),
            Rejection::Other(code) => (code, 0),
        }
    }

    fn from_fields(code: u16, errno: u64) -> Result<Rejection, Invalid> {
        match (code, i32::try_from(errno)) {
            (2, Ok(errno)) => Ok(Rejection::Apply { errno }),
            (_, Ok(0)) => Ok(match code {
                1 => Rejection::Protocol,
                3 => Rejection::Mismatch,
                other => Rejection::Other(other),
            }),
            _ => Err(Invalid::NotZero),
        }
    }
}

impl Frame {
    /// Payload bytes that follow the header.
    pub fn payload_length(&self) -> usize {
        match *self {
            Frame::Data { length, .. } | Frame::Packed { length, .. } => length as usize,
            Frame::End => END_PAYLOAD,
            Frame::Zero { .. } | Frame::Barrier { .. } | Frame::Ack { .. } | Frame::Reject(_) => 0,
        }
    }

    /// The header of this frame with its number.
    pub fn encode(&self, sequence: u64) -> [u8; HEADER_LENGTH] {
        let (kind, block, offset, span) = match *self {
            Frame::Data {
                block,
                offset,
                length,
            } => (1, block, offset, u64::from(length)),
            Frame::Zero { block, offset, span } => (2, block, offset, span),
            Frame::Packed {
                block, offset, span, ..
            } => (7, block, offset, span.into()),
            Frame::Barrier { round } => (3, 0, round, 0),
            Frame::End => (4, 0, 0, 0),
            Frame::Ack { bytes } => (5, 0, 0, bytes),
            Frame::Reject(reason) => {
                let (code, errno) = reason.fields();
                (6, code, errno, 0)
            }
        };
        let mut header = [0; HEADER_LENGTH];
        header[..2].copy_from_slice(&MAGIC.to_le_bytes());
        header[2] = kind;
        header[4..6].copy_from_slice(&block.to_le_bytes());
        header[8..12].copy_from_slice(&(self.payload_length() as u32).to_le_bytes());
        header[16..24].copy_from_slice(&offset.to_le_bytes());
        header[24..32].copy_from_slice(&span.to_le_bytes());
        header[32..].copy_from_slice(&sequence.to_le_bytes());
        header
    }

    /// Parses a header: the frame and its number. Whether the frame fits the guest is [`Checker`]'s question.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(header: &[u8; HEADER_LENGTH]) -> Result<(Frame, u64), Invalid> {
        let field = |at: usize, length: usize| {
            let mut bytes = [0; 8];
            bytes[..length].copy_from_slice(&header[at..at + length]);
            u64::from_le_bytes(bytes)
        };
        let magic = field(0, 2) as u16;
        if magic != MAGIC {
            return Err(Invalid::Magic(magic));
        }
        if field(3, 1) != 0 || field(6, 2) != 0 || field(12, 4) != 0 {
            return Err(Invalid::NotZero);
        }
        let (kind, block, length) = (header[2], field(4, 2) as u16, field(8, 4) as u32);
        let (offset, span, sequence) = (field(16, 8), field(24, 8), field(32, 8));
        let frame = match kind {
            1 => Frame::Data {
                block,
                offset,
                length,
            },
            2 => Frame::Zero { block, offset, span },
            3 => Frame::Barrier { round: offset },
            4 => Frame::End,
            5 => Frame::Ack { bytes: span },
            7 => Frame::Packed {
                block,
                offset,
                length,
                span: u32::try_from(span).map_err(|_| Invalid::Span(span))?,
            },
            6 => Frame::Reject(Rejection::from_fields(block, offset)?),
            other => return Err(Invalid::Kind(other)),
        };
        frame.check(length, span)?;
        // Whatever the kind does not use must be zero: what encodes to other bytes has something in such a field.
        if frame.encode(sequence) != *header {
            return Err(Invalid::NotZero);
        }
        Ok((frame, sequence))
    }

    /// The rules of each kind that need no layout.
    fn check(&self, length: u32, span: u64) -> Result<(), Invalid> {
        if length as usize != self.payload_length() {
            return Err(Invalid::Length(length.into()));
        }
        if let Frame::Data { offset, .. } | Frame::Packed { offset, .. } | Frame::Zero { offset, .. } = *self
        {
            for value in [offset, span] {
                if value % PAGE != 0 {
                    return Err(Invalid::Alignment(value));
                }
            }
            if span == 0 {
                return Err(Invalid::Span(span));
            }
        }
        if matches!(self, Frame::Data { .. }) {
            if length as usize > MAX_PAYLOAD {
                return Err(Invalid::Length(length.into()));
            }
            if span != u64::from(length) {
                return Err(Invalid::Span(span));
            }
        }
        if matches!(self, Frame::Packed { .. }) {
            if span > MAX_PAYLOAD as u64 {
                return Err(Invalid::Span(span));
            }
            if length == 0 || u64::from(length) >= span {
                return Err(Invalid::Length(length.into()));
            }
        }
        Ok(())
    }

    /// Checks a frame before it is sent.
    ///
    /// # Errors
    /// What a receiver would find wrong with it, its layout aside.
    pub(super) fn check_own(&self) -> Result<(), Invalid> {
        match *self {
            Frame::Data { length, .. } => self.check(length, length.into()),
            Frame::Packed { length, span, .. } => self.check(length, span.into()),
            Frame::Zero { span, .. } => self.check(0, span),
            _ => Ok(()),
        }
    }
}

/// Checks the frames of one stream in their order, on the receiving side.
#[derive(Debug, Clone)]
pub struct Checker {
    /// Length of each RAM block, bytes.
    layout: Box<[u64]>,
    last: u64,
    ended: bool,
}

impl Checker {
    /// For a guest whose RAM blocks have these lengths (bytes; the index is the block's number).
    pub fn new(layout: &[u64]) -> Checker {
        Checker {
            layout: layout.into(),
            last: 0,
            ended: false,
        }
    }

    /// The number of the last frame admitted, 0 at first.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Parses the next header and checks it against the guest and the frames before it.
    ///
    /// # Errors
    /// What is wrong with it; the stream cannot be used any further then.
    pub fn admit(&mut self, header: &[u8; HEADER_LENGTH]) -> Result<Frame, Invalid> {
        let (frame, sequence) = Frame::decode(header)?;
        if self.ended {
            return Err(Invalid::AfterEnd);
        }
        let (block, offset, span) = match frame {
            Frame::Data {
                block,
                offset,
                length,
            } => (block, offset, u64::from(length)),
            Frame::Packed {
                block, offset, span, ..
            } => (block, offset, u64::from(span)),
            Frame::Zero { block, offset, span } => (block, offset, span),
            Frame::Barrier { .. } | Frame::End => (0, 0, 0),
            Frame::Ack { .. } | Frame::Reject(_) => return Err(Invalid::Direction),
        };
        let expected = self.last + 1;
        if sequence != expected {
            return Err(Invalid::Sequence {
                expected,
                got: sequence,
            });
        }
        if span > 0 {
            let length = *self.layout.get(usize::from(block)).ok_or(Invalid::Block(block))?;
            if offset.checked_add(span).is_none_or(|end| end > length) {
                return Err(Invalid::Outside { block, offset, span });
            }
        }
        self.ended = matches!(frame, Frame::End);
        self.last = sequence;
        Ok(frame)
    }
}

/// Parses `bytes` as a whole stream to a guest of `layout`, as a receiver would, whatever they are. Says how many
/// frames are whole and good; an incomplete one at the end is left out.
///
/// # Errors
/// What is wrong with the first bad one.
pub fn walk(mut bytes: &[u8], layout: &[u64]) -> Result<u64, Invalid> {
    let mut checker = Checker::new(layout);
    let mut whole = 0;
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LENGTH>() {
        let frame = checker.admit(header)?;
        let Some((payload, rest)) = rest.split_at_checked(frame.payload_length()) else {
            break;
        };
        if let (Frame::End, Ok(payload)) = (frame, payload.try_into()) {
            // Any 48 bytes are totals; whether they are the right ones only the receiver knows.
            Totals::decode(payload);
        }
        whole += 1;
        bytes = rest;
    }
    Ok(whole)
}
