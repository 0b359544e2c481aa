//! What goes over a data connection of a cold migration. The destination asks for blocks, the source answers in order.
//!
//! ```text
//! Want, 48 bytes                            Piece or End, 16 bytes and a payload
//!  0  magic   2  0x4643 "CF"                 0  kind     1  1 data, 2 zstd, 3 end
//!  2  have    2  0 nothing, 1 a hash, 2 zeros    1  verdict  1  of an end: 0 sent, 1 the same as you have, 2 all zeros, 3 failed
//!  4  file    4  its number                  2  zero     2
//!  8  block   8  its number                  4  offset   4  in the block, bytes; ascending
//! 16  hash   32  of what the destination     8  length   4  of the payload, bytes
//!                has of the block already   12  span     4  bytes of the block it stands for
//! ```
//! Numbers are little-endian. What of a block no piece brings is zeros. An end's payload is the block's hash, or the
//! reason of a failure. Parsing is total: any bytes give a frame or an [`Invalid`].

use super::hash::BlockHash;
use ferry_contract::cold::BLOCK;

/// Bytes of a want.
pub const WANT: usize = 48;
/// Bytes of an answer's header.
pub const HEADER: usize = 16;
/// The longest reason of a failure, bytes.
pub const MAX_REASON: usize = 1024;

const MAGIC: u16 = 0x4643;

/// What is wrong with bytes from the other engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// No request at all.
    #[error("a request begins with {0:#06x}")]
    Magic(u16),
    /// A number that no release uses, or one where there must be none.
    #[error("a field says {0}, which means nothing")]
    Field(u64),
    /// A file or block that does not exist, or must not be asked for.
    #[error("block {block} of file {file} is not to be had")]
    NoSuchBlock {
        /// The file's number.
        file: u32,
        /// The block's.
        block: u64,
    },
    /// A piece that leaves its block, or comes out of order.
    #[error("a piece of {span} bytes at {offset} of a block does not fit there")]
    Place {
        /// Where, bytes.
        offset: u32,
        /// How many.
        span: u32,
    },
    /// A payload of an impossible length, or one that does not unpack to what it should.
    #[error("a payload of {0} bytes is not allowed")]
    Length(u32),
}

/// A block the destination asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// The file's number.
    pub file: u32,
    /// The block's.
    pub block: u64,
    /// What the destination has of it, where it has something: then the content is sent only if it differs.
    pub have: Option<BlockHash>,
}

impl Want {
    /// As bytes.
    pub fn encode(&self) -> [u8; WANT] {
        let mut bytes = [0; WANT];
        let have: u16 = match self.have {
            None => 0,
            Some(Some(_)) => 1,
            Some(None) => 2,
        };
        bytes[..2].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[2..4].copy_from_slice(&have.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.file.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.block.to_le_bytes());
        bytes[16..].copy_from_slice(&self.have.flatten().unwrap_or_default());
        bytes
    }

    /// Parses one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8; WANT]) -> Result<Self, Invalid> {
        let magic = number(bytes, 0, 2) as u16;
        if magic != MAGIC {
            return Err(Invalid::Magic(magic));
        }
        let mut hash = [0; 32];
        hash.copy_from_slice(&bytes[16..]);
        let have = match (number(bytes, 2, 2), hash) {
            (1, hash) => Some(Some(hash)),
            (0, [0, ..]) if hash == [0; 32] => None,
            (2, [0, ..]) if hash == [0; 32] => Some(None),
            (other, _) => return Err(Invalid::Field(other)),
        };
        Ok(Self {
            file: number(bytes, 4, 4) as u32,
            block: number(bytes, 8, 8),
            have,
        })
    }
}

/// A part of the answer to a want; `length` bytes follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// Bytes of the block, packed or not.
    Piece {
        /// They are a zstd frame.
        packed: bool,
        /// Where in the block.
        offset: u32,
        /// How many bytes follow.
        length: u32,
        /// How many bytes of the block they are.
        span: u32,
    },
    /// All of the block has been sent, or is what the destination has; its hash follows.
    End {
        /// It is what the destination has.
        same: bool,
    },
    /// The block is all zeros.
    Zeros {
        /// So is what the destination has.
        same: bool,
    },
    /// The source cannot read it; the reason follows.
    Failed {
        /// Its bytes.
        length: u32,
    },
}

impl Frame {
    /// Bytes that follow.
    pub fn payload(&self) -> usize {
        match *self {
            Self::Piece { length, .. } | Self::Failed { length } => length as usize,
            Self::End { .. } => 32,
            Self::Zeros { .. } => 0,
        }
    }

    /// The header.
    pub fn encode(&self) -> [u8; HEADER] {
        let (kind, verdict, offset, span) = match *self {
            Self::Piece {
                packed, offset, span, ..
            } => (1 + u8::from(packed), 0, offset, span),
            Self::End { same } => (3, u8::from(same), 0, 0),
            Self::Zeros { same } => (3, 2 + 2 * u8::from(same), 0, 0),
            Self::Failed { .. } => (3, 3, 0, 0),
        };
        let mut bytes = [0; HEADER];
        (bytes[0], bytes[1]) = (kind, verdict);
        bytes[4..8].copy_from_slice(&offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&(self.payload() as u32).to_le_bytes());
        bytes[12..].copy_from_slice(&span.to_le_bytes());
        bytes
    }

    /// Parses a header.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, Invalid> {
        let (offset, length, span) = (
            number(bytes, 4, 4) as u32,
            number(bytes, 8, 4) as u32,
            number(bytes, 12, 4) as u32,
        );
        let frame = match (bytes[0], bytes[1]) {
            (kind @ (1 | 2), 0) => Self::Piece {
                packed: kind == 2,
                offset,
                length,
                span,
            },
            (3, verdict @ (0 | 1)) => Self::End { same: verdict == 1 },
            (3, verdict @ (2 | 4)) => Self::Zeros { same: verdict == 4 },
            (3, 3) => Self::Failed { length },
            (kind, verdict) => return Err(Invalid::Field(u64::from(kind) << 8 | u64::from(verdict))),
        };
        match frame {
            Self::Piece { packed, .. } => {
                let inside = offset
                    .checked_add(span)
                    .is_some_and(|end| u64::from(end) <= BLOCK);
                if span == 0 || !inside {
                    return Err(Invalid::Place { offset, span });
                }
                if length == 0 || (packed && length >= span) || (!packed && length != span) {
                    return Err(Invalid::Length(length));
                }
            }
            Self::Failed { .. } if length as usize > MAX_REASON => return Err(Invalid::Length(length)),
            _ => {}
        }
        // Whatever the kind does not use must be zero: what encodes to other bytes has something in such a field.
        match frame.encode() == *bytes {
            true => Ok(frame),
            false => Err(Invalid::Field(u64::from(length))),
        }
    }
}

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..length].copy_from_slice(&bytes[at..at + length]);
    u64::from_le_bytes(wide)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_frame_survives_its_bytes() {
        for have in [None, Some(None), Some(Some([7; 32])), Some(Some([0; 32]))] {
            let want = Want {
                file: 4095,
                block: u64::MAX,
                have,
            };
            assert_eq!(Want::decode(&want.encode()), Ok(want));
        }
        for frame in [
            Frame::Piece {
                packed: false,
                offset: 0,
                length: 1 << 20,
                span: 1 << 20,
            },
            Frame::Piece {
                packed: true,
                offset: 4096,
                length: 17,
                span: 4096,
            },
            Frame::End { same: false },
            Frame::End { same: true },
            Frame::Zeros { same: false },
            Frame::Zeros { same: true },
            Frame::Failed { length: 1024 },
        ] {
            assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let piece = |packed, offset, length, span| {
            Frame::decode(
                &Frame::Piece {
                    packed,
                    offset,
                    length,
                    span,
                }
                .encode(),
            )
        };
        assert!(matches!(
            piece(false, 1, 1 << 20, 1 << 20),
            Err(Invalid::Place { .. })
        ));
        assert!(matches!(
            piece(false, u32::MAX, 4096, 4096),
            Err(Invalid::Place { .. })
        ));
        assert!(matches!(piece(false, 0, 4095, 4096), Err(Invalid::Length(4095))));
        assert!(matches!(piece(true, 0, 4096, 4096), Err(Invalid::Length(4096))));
        assert!(matches!(piece(true, 0, 0, 4096), Err(Invalid::Length(0))));
        assert!(Frame::decode(&Frame::Failed { length: 1025 }.encode()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(header in any::<[u8; HEADER]>(), want in any::<[u8; WANT]>(), first in 0u8..5, second in 0u8..5) {
            let mut likely = header;
            (likely[0], likely[1], likely[2], likely[3]) = (first, second, 0, 0);
            for header in [header, likely] {
                if let Ok(frame) = Frame::decode(&header) {
                    prop_assert_eq!(frame.encode(), header);
                    prop_assert!(frame.payload() <= BLOCK as usize);
                }
            }
            let mut near = want;
            near[..2].copy_from_slice(&MAGIC.to_le_bytes());
            for want in [want, near] {
                if let Ok(decoded) = Want::decode(&want) {
                    prop_assert_eq!(decoded.encode(), want);
                }
            }
        }
    }
}
