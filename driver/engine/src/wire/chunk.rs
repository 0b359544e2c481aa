//! QEMU's own migration stream, relayed in chunks.
//!
//! ```text
//!   0  magic   2  0x4643 "CF"
//!   2  kind    1  1 early, 2 held, 3 end of stream, 4 abort
//!   3  zero    1
//!   4  length  4  little-endian, at most 256 KiB; 0 for end and abort
//!   8  bytes
//! ```
//! The chunks have no number: one connection carries them in order, or breaks.

use super::frame::Invalid;
use super::{Connection, Error, Result};

/// The most bytes in one chunk.
pub const MAX_LENGTH: usize = 256 << 10;

const MAGIC: u16 = 0x4643;
const HEADER_LENGTH: usize = 8;

/// What a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Written by QEMU before the switch-over: to be passed on at once.
    Early,
    /// Written after it: to be passed on only when all guest memory is in place.
    Held,
    /// QEMU's stream is complete.
    Eof,
    /// The sender gives up; what came before must not be used.
    Abort,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Kind::Early => 1,
            Kind::Held => 2,
            Kind::Eof => 3,
            Kind::Abort => 4,
        }
    }

    fn carries_bytes(self) -> bool {
        matches!(self, Kind::Early | Kind::Held)
    }
}

/// Sends `bytes` of any length as chunks of `kind`; [`Kind::Eof`] and [`Kind::Abort`] carry none.
///
/// # Errors
/// Those of the connection; [`Error::Unsendable`] for bytes with an end or abort.
pub fn send(connection: &mut Connection, kind: Kind, bytes: &[u8]) -> Result<()> {
    let doing = "relaying QEMU's stream";
    if !kind.carries_bytes() {
        if !bytes.is_empty() {
            return Err(Error::Unsendable {
                what: Invalid::Length(bytes.len() as u64),
            });
        }
        return connection.send(&[&encode(kind, 0)], doing);
    }
    for piece in bytes.chunks(MAX_LENGTH) {
        connection.send(&[&encode(kind, piece.len() as u32), piece], doing)?;
    }
    Ok(())
}

/// Receives one chunk; `buffer` then holds its bytes. It is cleared first and keeps its capacity.
///
/// # Errors
/// [`Error::BadFrame`] for what is no chunk; those of the connection. An abort is not an error here.
pub fn receive(connection: &mut Connection, buffer: &mut Vec<u8>) -> Result<Kind> {
    let doing = "waiting for QEMU's stream";
    buffer.clear();
    let mut header = [0; HEADER_LENGTH];
    connection.receive_exact(&mut header, doing)?;
    let (kind, length) = decode(&header).map_err(|what| Error::BadFrame {
        peer: connection.peer(),
        what,
    })?;
    buffer.resize(length, 0);
    connection.receive_exact(buffer, doing)?;
    Ok(kind)
}

fn encode(kind: Kind, length: u32) -> [u8; HEADER_LENGTH] {
    let mut header = [0; HEADER_LENGTH];
    header[..2].copy_from_slice(&MAGIC.to_le_bytes());
    header[2] = kind.code();
    header[4..].copy_from_slice(&length.to_le_bytes());
    header
}

/// Parses a chunk's header: kind and length. Total: any bytes give an answer.
///
/// # Errors
/// What is wrong with it.
pub fn decode(header: &[u8; HEADER_LENGTH]) -> Result<(Kind, usize), Invalid> {
    let [m0, m1, kind, zero, l0, l1, l2, l3] = *header;
    let magic = u16::from_le_bytes([m0, m1]);
    if magic != MAGIC {
        return Err(Invalid::Magic(magic));
    }
    let kind = match kind {
        1 => Kind::Early,
        2 => Kind::Held,
        3 => Kind::Eof,
        4 => Kind::Abort,
        other => return Err(Invalid::Kind(other)),
    };
    if zero != 0 {
        return Err(Invalid::NotZero);
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    match usize::try_from(length) {
        Ok(bytes) if bytes <= MAX_LENGTH && kind.carries_bytes() == (bytes > 0) => Ok((kind, bytes)),
        _ => Err(Invalid::Length(length.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::wire::testing::pair;
    use crate::wire::Purpose;

    #[test]
    fn chunks_come_as_they_went_and_bad_ones_are_named() {
        for encrypted in [false, true] {
            let (mut source, mut destination) = pair(encrypted, Purpose::DeviceState);
            let state: Vec<u8> = (0..600_000u32).map(|i| (i * 7) as u8).collect();
            thread::scope(|scope| {
                scope.spawn(|| {
                    send(&mut source, Kind::Early, &state[..10]).unwrap();
                    send(&mut source, Kind::Held, &state[10..]).unwrap();
                    send(&mut source, Kind::Eof, &[]).unwrap();
                    source.end_sending().unwrap();
                });
                let (mut got, mut buffer, mut kinds) = (Vec::new(), Vec::new(), Vec::new());
                while kinds.last() != Some(&Kind::Eof) {
                    kinds.push(receive(&mut destination, &mut buffer).unwrap());
                    got.extend_from_slice(&buffer);
                }
                assert_eq!(kinds[..2], [Kind::Early, Kind::Held]);
                assert_eq!(kinds.len(), 5); // 10 bytes, 3 times at most 256 KiB, the end
                assert!(got == state);
                destination.end_receiving().unwrap();
            });
        }
        let (mut source, mut destination) = pair(false, Purpose::DeviceState);
        let with_bytes = send(&mut source, Kind::Abort, b"why").unwrap_err();
        assert!(matches!(with_bytes, Error::Unsendable { .. }), "{with_bytes:?}");
        source.send(&[b"CF\x02\0\x01\0\x04\0"], "testing").unwrap(); // 256 KiB and one byte
        let error = receive(&mut destination, &mut Vec::new()).unwrap_err();
        assert!(
            matches!(
                error,
                Error::BadFrame {
                    what: Invalid::Length(262_145),
                    ..
                }
            ),
            "{error:?}"
        );
    }
}
