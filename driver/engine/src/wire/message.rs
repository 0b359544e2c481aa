//! Control messages: JSON with its length in front, strictly one request and one response at a time.
//!
//! ```text
//!   0  length  4  little-endian, at most 1 MiB
//!   4  JSON
//! ```

use serde::de::DeserializeOwned;
use serde::Serialize;

use super::{Connection, Error, Result};

/// The longest message, bytes.
pub const MAX_LENGTH: usize = 1 << 20;

/// Sends one message.
///
/// # Errors
/// [`Error::BadMessage`] if it is longer than [`MAX_LENGTH`]; those of the connection.
pub fn send<T: Serialize>(connection: &mut Connection, message: &T) -> Result<()> {
    let bad = |what: String| Error::BadMessage {
        peer: connection.peer(),
        what,
    };
    let body = serde_json::to_vec(message).map_err(|error| bad(error.to_string()))?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= MAX_LENGTH)
        .ok_or_else(|| {
            bad(format!(
                "{} bytes to send are more than the {MAX_LENGTH} allowed",
                body.len()
            ))
        })?;
    connection.send(&[&length.to_le_bytes(), &body], "sending a control message")
}

/// Receives one message.
///
/// # Errors
/// [`Error::BadMessage`] if it is too long or not a `T`; those of the connection.
pub fn receive<T: DeserializeOwned>(connection: &mut Connection) -> Result<T> {
    let doing = "waiting for a control message";
    let mut length = [0; 4];
    connection.receive_exact(&mut length, doing)?;
    let peer = connection.peer();
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_LENGTH {
        let what = format!("{length} bytes announced are more than the {MAX_LENGTH} allowed");
        return Err(Error::BadMessage { peer, what });
    }
    let mut body = vec![0; length];
    connection.receive_exact(&mut body, doing)?;
    serde_json::from_slice(&body).map_err(|error| Error::BadMessage {
        peer,
        what: error.to_string(),
    })
}

/// Sends a request and receives its response.
///
/// # Errors
/// Those of [`send`] and [`receive`].
pub fn ask<Q: Serialize, A: DeserializeOwned>(connection: &mut Connection, request: &Q) -> Result<A> {
    send(connection, request)?;
    receive(connection)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use serde::Deserialize;

    use super::*;
    use crate::wire::testing::pair;
    use crate::wire::Purpose;

    #[test]
    fn messages_come_as_they_went_and_bad_ones_are_named() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        enum Word {
            Ping { round: u64 },
            Pong(String),
        }
        for encrypted in [false, true] {
            let (mut source, mut destination) = pair(encrypted, Purpose::Control);
            thread::scope(|scope| {
                scope.spawn(|| {
                    assert_eq!(
                        receive::<Word>(&mut destination).unwrap(),
                        Word::Ping { round: 3 }
                    );
                    send(&mut destination, &Word::Pong("ä".repeat(400_000))).unwrap();
                });
                let answer: Word = ask(&mut source, &Word::Ping { round: 3 }).unwrap();
                assert_eq!(answer, Word::Pong("ä".repeat(400_000)));
            });
            let too_long = send(&mut source, &Word::Pong("x".repeat(MAX_LENGTH))).unwrap_err();
            assert!(matches!(too_long, Error::BadMessage { .. }), "{too_long:?}");
            // Nothing of it has gone out; the next one arrives.
            send(&mut source, &"no such word").unwrap();
            let unknown = receive::<Word>(&mut destination).unwrap_err();
            assert!(matches!(unknown, Error::BadMessage { .. }), "{unknown:?}");
            source.send(&[&u32::MAX.to_le_bytes()], "testing").unwrap();
            let oversized = receive::<Word>(&mut destination).unwrap_err();
            assert!(matches!(oversized, Error::BadMessage { .. }), "{oversized:?}");
            source.send(&[&8u32.to_le_bytes(), b"\"cut"], "testing").unwrap();
            drop(source);
            let cut = receive::<Word>(&mut destination).unwrap_err();
            assert!(matches!(cut, Error::PeerGone { .. }), "{cut:?}");
        }
    }
}
