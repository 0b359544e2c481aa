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
