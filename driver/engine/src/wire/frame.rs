//! The frames of a data stream, and the checks on each before it is believed.
//!
//! ```text
//! header, 40 bytes, little-endian          Data    Zero    Barrier  End     Ack      Reject
//!  0  magic     2  0x4644 "DF"
//!  2  kind      1                          1       2       3        4       5        6
//!  3  zero      1
//!  4  block     2  RAM block number        block   block   0        0       0        reason
//!  6  zero      2
//!  8  length    4  payload bytes           bytes   0       0        48      0        0
//! 12  zero      4
//! 16  offset    8                          offset  offset  round    0       0        errno
//! 24  span      8                          bytes   bytes   0        0       applied  0
//! 32  sequence  8  from 1, without gaps    ------- of this frame -------    -- last applied --
//! 40  payload                              pages                    totals
//! ```
//! Data, Zero, Barrier and End go from sender to receiver; Ack and Reject come back. Offsets and spans are multiples
//! of 4096. Every valid header has one encoding only. Parsing is total: any bytes give a frame or an [`Invalid`].

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
            Frame::Data { length, .. } => length as usize,
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
        if let Frame::Data { offset, .. } | Frame::Zero { offset, .. } = *self {
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
        Ok(())
    }

    /// Checks a frame before it is sent.
    ///
    /// # Errors
    /// What a receiver would find wrong with it, its layout aside.
    pub(super) fn check_own(&self) -> Result<(), Invalid> {
        match *self {
            Frame::Data { length, .. } => self.check(length, length.into()),
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

/// Parses `bytes` as a whole stream to a guest of `layout`, as a receiver would: the fuzz target. Says how many frames
/// are whole and good; an incomplete one at the end is left out.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAYOUT: [u64; 3] = [1 << 30, 64 << 10, 2 << 20];

    fn any_frame() -> impl Strategy<Value = Frame> {
        let pages = 1..=(MAX_PAYLOAD as u64 / PAGE);
        let offset = (0..=u64::MAX / PAGE).prop_map(|page| page * PAGE);
        prop_oneof![
            (any::<u16>(), offset.clone(), pages).prop_map(|(block, offset, pages)| Frame::Data {
                block,
                offset,
                length: (pages * PAGE) as u32,
            }),
            (any::<u16>(), offset, 1..=u64::MAX / PAGE).prop_map(|(block, offset, pages)| Frame::Zero {
                block,
                offset,
                span: pages * PAGE,
            }),
            any::<u64>().prop_map(|round| Frame::Barrier { round }),
            Just(Frame::End),
            any::<u64>().prop_map(|bytes| Frame::Ack { bytes }),
            (0..=i32::MAX).prop_map(|errno| Frame::Reject(Rejection::Apply { errno })),
            prop_oneof![Just(0u16), 4..=u16::MAX].prop_map(|code| Frame::Reject(Rejection::Other(code))),
            Just(Frame::Reject(Rejection::Protocol)),
            Just(Frame::Reject(Rejection::Mismatch)),
        ]
    }

    /// Headers that come far into the parser: good ones with a few bytes changed.
    fn mutated() -> impl Strategy<Value = [u8; HEADER_LENGTH]> {
        let changes = prop::collection::vec((0..HEADER_LENGTH, any::<u8>()), 0..4);
        (any_frame(), 0..4u64, changes).prop_map(|(frame, sequence, changes)| {
            let mut header = frame.encode(sequence);
            for (at, value) in changes {
                header[at] = value;
            }
            header
        })
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(frame in any_frame(), sequence: u64) {
            prop_assert_eq!(Frame::decode(&frame.encode(sequence)), Ok((frame, sequence)));
        }

        #[test]
        fn every_header_has_one_encoding(header in mutated()) {
            if let Ok((frame, sequence)) = Frame::decode(&header) {
                prop_assert_eq!(frame.encode(sequence), header);
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            let _ = walk(&bytes, &LAYOUT);
            if let Some((header, _)) = bytes.split_first_chunk() {
                let _ = crate::wire::chunk::decode(header);
            }
        }

        #[test]
        fn mutated_streams_never_panic_nor_leave_the_guest(headers in prop::collection::vec(mutated(), 0..8)) {
            let mut checker = Checker::new(&LAYOUT);
            for header in &headers {
                let (block, offset, span) = match checker.admit(header) {
                    Ok(Frame::Data { block, offset, length }) => (block, offset, u64::from(length)),
                    Ok(Frame::Zero { block, offset, span }) => (block, offset, span),
                    _ => continue,
                };
                prop_assert!(u128::from(offset) + u128::from(span) <= u128::from(LAYOUT[usize::from(block)]));
                prop_assert!(offset % PAGE == 0 && span % PAGE == 0 && span > 0);
            }
            let _ = walk(&headers.concat(), &LAYOUT);
        }
    }

    fn admit(frame: Frame) -> Result<Frame, Invalid> {
        Checker::new(&LAYOUT).admit(&frame.encode(1))
    }

    #[test]
    fn the_edges_of_a_block_are_exact() {
        let last = Frame::Data {
            block: 1,
            offset: 60 << 10,
            length: 4096,
        };
        assert_eq!(admit(last), Ok(last));
        let outside = |block, offset, span| Err(Invalid::Outside { block, offset, span });
        assert_eq!(
            admit(Frame::Data {
                block: 1,
                offset: 60 << 10,
                length: 8192
            }),
            outside(1, 60 << 10, 8192)
        );
        assert_eq!(
            admit(Frame::Zero {
                block: 1,
                offset: 64 << 10,
                span: 4096
            }),
            outside(1, 64 << 10, 4096)
        );
        let far = u64::MAX - 4095;
        assert_eq!(
            admit(Frame::Zero {
                block: 0,
                offset: far,
                span: far
            }),
            outside(0, far, far)
        );
        assert_eq!(
            admit(Frame::Zero {
                block: 3,
                offset: 0,
                span: 4096
            }),
            Err(Invalid::Block(3))
        );
        let whole = Frame::Zero {
            block: 0,
            offset: 0,
            span: 1 << 30,
        };
        assert_eq!(admit(whole), Ok(whole));
    }

    #[test]
    fn lengths_spans_and_alignment_are_checked() {
        let data = |offset, length| {
            admit(Frame::Data {
                block: 0,
                offset,
                length,
            })
        };
        assert_eq!(data(0, (1 << 20) + 4096), Err(Invalid::Length((1 << 20) + 4096)));
        assert_eq!(
            data(0, u32::MAX - 4095),
            Err(Invalid::Length(u64::from(u32::MAX - 4095)))
        );
        assert_eq!(data(0, 0), Err(Invalid::Span(0)));
        assert_eq!(data(0, 4095), Err(Invalid::Alignment(4095)));
        assert_eq!(data(512, 4096), Err(Invalid::Alignment(512)));
        assert_eq!(
            admit(Frame::Zero {
                block: 0,
                offset: 0,
                span: 0
            }),
            Err(Invalid::Span(0))
        );
        let mut header = Frame::Data {
            block: 0,
            offset: 0,
            length: 4096,
        }
        .encode(1);
        header[25] = 0x20; // a span of 8192
        assert_eq!(Checker::new(&LAYOUT).admit(&header), Err(Invalid::Span(8192)));
    }

    #[test]
    fn order_and_direction_are_checked() {
        let mut checker = Checker::new(&LAYOUT);
        let barrier = Frame::Barrier { round: 9 };
        assert_eq!(checker.admit(&barrier.encode(1)), Ok(barrier));
        assert_eq!(
            checker.admit(&barrier.encode(1)),
            Err(Invalid::Sequence { expected: 2, got: 1 })
        );
        assert_eq!(
            checker.admit(&barrier.encode(3)),
            Err(Invalid::Sequence { expected: 2, got: 3 })
        );
        assert_eq!(
            checker.admit(&Frame::Ack { bytes: 0 }.encode(2)),
            Err(Invalid::Direction)
        );
        assert_eq!(checker.admit(&Frame::End.encode(2)), Ok(Frame::End));
        assert_eq!(checker.admit(&barrier.encode(3)), Err(Invalid::AfterEnd));
        assert_eq!(checker.last(), 2);
    }

    #[test]
    fn a_whole_stream_walks() {
        let mut stream = Vec::new();
        stream.extend_from_slice(
            &Frame::Data {
                block: 2,
                offset: 4096,
                length: 8192,
            }
            .encode(1),
        );
        stream.extend_from_slice(&[1; 8192]);
        stream.extend_from_slice(
            &Frame::Zero {
                block: 0,
                offset: 0,
                span: 1 << 20,
            }
            .encode(2),
        );
        stream.extend_from_slice(&Frame::End.encode(3));
        stream.extend_from_slice(&[0; END_PAYLOAD]);
        assert_eq!(walk(&stream, &LAYOUT), Ok(3));
        assert_eq!(walk(&stream[..stream.len() - 1], &LAYOUT), Ok(2));
        assert_eq!(walk(&stream[..100], &LAYOUT), Ok(0));
        assert_eq!(walk(&stream[1..], &LAYOUT), Err(Invalid::Magic(0x0146)));
    }
}
