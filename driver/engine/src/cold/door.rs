//! Where a source listens: for its destination, and in a recovery.

use super::messages::Answer;
use super::Error;
use crate::wire::{Connection, Listener, Purpose, Security};
use ferry_contract::control::Failure;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long one connection is waited for before the next is.
const COMES: Duration = Duration::from_secs(15 * 60);
/// How long a session that was given up can still be asked about.
const LINGER: Duration = Duration::from_secs(5);
/// Connections at once. A destination has up to 17, and those that were cut stay until that is noticed.
const MOST: usize = 64;

/// Opens the door: each connection that comes gets a thread of its own.
pub fn listen(
    listener: Listener,
    security: Security,
    welcome: impl Fn(Purpose, Connection) + Send + Sync + 'static,
) -> Result<(), Error> {
    let span = tracing::Span::current();
    let welcome = Arc::new(welcome);
    // Each connection has one of these.
    let open = Arc::new(());
    let door = move || {
        let _entered = span.enter();
        loop {
            match listener.accept(&security, Instant::now() + COMES) {
                // As it closes, it is tried again.
                Ok((purpose, _)) if Arc::strong_count(&open) > MOST => {
                    tracing::warn!(%purpose, "{MOST} connections are open: one more is closed");
                }
                Ok((purpose, connection)) => {
                    let (welcome, span, open) = (Arc::clone(&welcome), span.clone(), Arc::clone(&open));
                    let thread = std::thread::Builder::new().name(purpose.to_string().replace(' ', "-"));
                    // Without a thread the connection closes, and is tried again.
                    let _ = thread.spawn(move || {
                        let _open = open;
                        span.in_scope(|| welcome(purpose, connection));
                    });
                }
                Err(crate::wire::Error::NobodyCame { .. }) => {}
                Err(error) => return tracing::error!("{error}"),
            }
        }
    };
    let started = std::thread::Builder::new().name("door".into()).spawn(door);
    started
        .map(drop)
        .map_err(|error| Error::Other(format!("cannot start a thread: {error}")))
}

/// A session that is over: who still asks is told, for a short time, and an answer under way gets there.
pub fn linger(connected: &AtomicUsize) {
    let end = Instant::now() + LINGER;
    while Instant::now() < end && connected.load(Relaxed) > 0 {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// No, and why.
pub fn refusal(error: &Error, host: &str) -> Answer {
    let Failure { kind, host, cause } = error.failure(host);
    Answer::Refused { kind, cause, host }
}

#[cfg(test)]
mod tests {
    use super::super::messages::Ask;
    use super::*;
    use crate::wire::{self, message, Protection, Token};
    use std::net::Ipv4Addr;
    use uuid::Uuid;

    #[test]
    fn not_everybody_comes_in() {
        let listener = Listener::bind(Ipv4Addr::LOCALHOST.into(), 0..=0).unwrap();
        let address = listener.address();
        let security = Security {
            session: Uuid::new_v4(),
            token: Token::generate().unwrap(),
            protection: Protection::Plain,
        };
        let stay = |_, mut connection: Connection| {
            while let Ok(Ask::Owned) = message::receive(&mut connection) {
                let _ = message::send(&mut connection, &Answer::OwnedThere);
            }
        };
        listen(listener, security.clone(), stay).unwrap();
        let soon = || Instant::now() + Duration::from_secs(60);
        let come = || {
            let mut connection = wire::connect(&[address], &security, Purpose::Control, soon()).unwrap();
            connection.set_deadline(Some(soon())).unwrap();
            let answer: Result<Answer, _> = message::ask(&mut connection, &Ask::Owned);
            answer.map(|_| connection)
        };
        let mut inside: Vec<_> = (0..MOST).map(|_| come().unwrap()).collect();
        assert!(come().is_err());
        // Whoever leaves makes room.
        inside.pop();
        assert!((0..1000).any(|_| come().is_ok() || {
            std::thread::sleep(Duration::from_millis(10));
            false
        }));
    }
}
