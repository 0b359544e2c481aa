//! How the destination speaks to the source: where that is, and the connection on which all but data goes.

use super::messages::{Answer, Ask, Looked};
use super::{extents, Error};
use crate::live::signals::Signals;
use crate::wire::{self, connect, message, Connection, Identity, Protection, Purpose, Security};
use ferry_contract::cold::{Digest, MAX_SIZE};
use ferry_contract::control::Failure;
use ferry_contract::cookie::ColdOffer;
use ferry_contract::session::Encryption;
use std::net::{SocketAddr, ToSocketAddrs};
use std::ops::Range;
use std::time::{Duration, Instant};

/// How long a cut connection is tried again. The source waits a little longer.
pub const RECONNECT: Duration = Duration::from_secs(50);
/// Between two attempts.
pub const PAUSE: Duration = Duration::from_millis(200);
/// The longest attempt.
const ATTEMPT: Duration = Duration::from_secs(10);
/// How long the source is tried to be told what it must know; after that a recovery tells it.
pub const TELL: Duration = Duration::from_secs(30);
/// Bytes that a file's name may have, and a user's (NAME_MAX, LOGIN_NAME_MAX).
const LONGEST_NAME: usize = 255;
/// For one answer of the source's.
const ANSWER: Duration = Duration::from_secs(30);

/// Where the source is, and how to speak to it.
pub struct Peer {
    /// Its engine.
    pub addresses: Vec<SocketAddr>,
    /// The session.
    pub security: Security,
}

impl Peer {
    /// Connects, again and again for some time where the network or the other engine does not answer.
    ///
    /// # Errors
    /// The session has ended, the other engine refuses, or the time is up.
    pub fn connect(
        &self,
        purpose: Purpose,
        signals: &Signals,
        patience: Duration,
    ) -> Result<Connection, Error> {
        let end = Instant::now() + patience;
        loop {
            signals.check()?;
            let deadline = end.min(Instant::now() + ATTEMPT);
            match connect(&self.addresses, &self.security, purpose, deadline) {
                Ok(connection) => {
                    signals.watch(connection.breaker());
                    return Ok(connection);
                }
                Err(error) if is_cut(&error) && Instant::now() + PAUSE < end => std::thread::sleep(PAUSE),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether trying again may help.
pub fn is_cut(error: &wire::Error) -> bool {
    use wire::Error::{Io, PeerGone, Timeout};
    matches!(error, PeerGone { .. } | Timeout { .. } | Io { .. })
}

/// Who the source says it is.
pub struct Opened {
    /// Its host's name.
    pub host: String,
    /// What its file beside the guest's says.
    pub nonce: String,
    /// Which machine it is.
    pub machine: Option<Digest>,
}

/// The control connection, made again when it is cut: every request may be asked twice.
pub struct Link {
    peer: Peer,
    host: String,
    connection: Option<Connection>,
    /// What the source may still take for its answers, all together; none where each has its own time.
    left: Option<Duration>,
}

impl Link {
    /// To the source of this session; connects with the first request.
    pub fn new(peer: Peer, host: &str) -> Self {
        Self {
            peer,
            host: host.to_owned(),
            connection: None,
            left: None,
        }
    }

    /// What the source may take for all answers from here on, so that one that is slow with each does not hold the guest for
    /// ever; `None` ends that.
    pub fn limit(&mut self, left: Option<Duration>) {
        self.left = left;
    }

    /// Where the source is.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Asks, also over a new connection where the old one is cut, for as long as `patience`.
    ///
    /// # Errors
    /// The source refuses, or cannot be reached for so long, or the session has ended.
    pub fn ask(&mut self, ask: &Ask, signals: &Signals, patience: Duration) -> Result<Answer, Error> {
        let began = Instant::now();
        let answer = self.ask_for(ask, signals, patience)?;
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(Error::Other(
                    "the source takes too long to say what the guest's files are like".into(),
                ));
            }
        }
        Ok(answer)
    }

    fn ask_for(&mut self, ask: &Ask, signals: &Signals, patience: Duration) -> Result<Answer, Error> {
        let end = Instant::now() + patience;
        loop {
            let connected = self.connection.is_some();
            match self.ask_once(ask, signals, end) {
                Err(Error::Wire(error)) if is_cut(&error) && Instant::now() < end => {
                    if connected {
                        tracing::warn!(%error, "the control connection was cut: connecting again");
                    }
                    self.connection = None;
                    std::thread::sleep(Duration::from_millis(100));
                }
                Ok(Answer::Refused { kind, cause, host }) => {
                    return Err(Error::Refused { kind, cause, host })
                }
                outcome => return outcome,
            }
        }
    }

    fn ask_once(&mut self, ask: &Ask, signals: &Signals, end: Instant) -> Result<Answer, Error> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let left = end.saturating_duration_since(Instant::now());
                self.peer.connect(Purpose::Control, signals, left)?
            }
        };
        connection.set_deadline(Some(Instant::now() + ANSWER))?;
        let answer = message::ask(&mut connection, ask)?;
        self.connection = Some(connection);
        Ok(answer)
    }

    /// Says who is here; who the source is.
    ///
    /// # Errors
    /// As with [`ask`](Self::ask).
    pub fn open(&mut self, signals: &Signals) -> Result<Opened, Error> {
        let host = self.host.clone();
        match self.ask(&Ask::Open { host }, signals, RECONNECT)? {
            Answer::Opened { host, nonce, machine } => Ok(Opened { host, nonce, machine }),
            other => Err(out_of_turn(&other)),
        }
    }

    /// What a file is like.
    ///
    /// # Errors
    /// As with [`ask`](Self::ask), or it is impossible.
    pub fn look(&mut self, file: u32, signals: &Signals) -> Result<Looked, Error> {
        match self.ask(&Ask::Look { file }, signals, RECONNECT)? {
            Answer::Looked(looked) if is_possible(&looked) => Ok(looked),
            Answer::Looked(_) => Err(Error::Other(format!(
                "what the source says of file {file} cannot be"
            ))),
            other => Err(out_of_turn(&other)),
        }
    }

    /// Blocks of a file of this size that may hold data, as `most` runs, ascending and apart.
    ///
    /// # Errors
    /// As with [`ask`](Self::ask), or there are no such blocks.
    pub fn runs(
        &mut self,
        file: u32,
        size: u64,
        most: usize,
        signals: &Signals,
    ) -> Result<Vec<Range<u64>>, Error> {
        let (mut runs, mut from) = (Vec::<Range<u64>>::new(), 0);
        let end = size.div_ceil(ferry_contract::cold::BLOCK);
        loop {
            let (found, next) = match self.ask(&Ask::Runs { file, from }, signals, RECONNECT)? {
                Answer::Runs { runs, next } => (runs, next),
                other => return Err(out_of_turn(&other)),
            };
            let nothing = found.is_empty();
            for run in found {
                let after = runs.last().map_or(0, |last| last.end);
                if run.start < after || run.start >= run.end || run.end > end {
                    return Err(Error::Other(format!(
                        "the source says that file {file} has data where there is none"
                    )));
                }
                extents::push(&mut runs, run, most);
            }
            match next {
                None => return Ok(runs),
                Some(next) if next > from && !nothing => from = next,
                Some(_) => return Err(Error::Other("the source repeats itself".into())),
            }
        }
    }

    /// Tells the source something that it notes.
    ///
    /// # Errors
    /// As with [`ask`](Self::ask).
    pub fn note(&mut self, ask: &Ask, signals: &Signals) -> Result<(), Error> {
        match self.ask(ask, signals, RECONNECT)? {
            Answer::Noted => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    /// Asks the source to let go.
    ///
    /// # Errors
    /// As with [`ask`](Self::ask); [`Error::Refused`] is final.
    pub fn commit(&mut self, manifest: Digest, signals: &Signals, patience: Duration) -> Result<(), Error> {
        match self.ask(&Ask::Commit { manifest }, signals, patience)? {
            Answer::Committed => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    /// Tells the source that the guest is registered here.
    ///
    /// # Errors
    /// As with [`ask`](Self::ask).
    pub fn owned(&mut self, signals: &Signals) -> Result<(), Error> {
        match self.ask(&Ask::Owned, signals, TELL)? {
            Answer::OwnedThere => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    /// Asks the source to keep the guest, in a session that has ended for this host.
    ///
    /// # Errors
    /// As with [`ask`](Self::ask): the source may be lost.
    pub fn keep(&mut self, cause: &Error, patience: Duration) -> Result<(), Error> {
        self.connection = None;
        let Failure { kind, cause, .. } = cause.failure(&self.host);
        match self.ask(&Ask::Keep { kind, cause }, &Signals::default(), patience)? {
            Answer::Keeps => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    /// Tells the source that the guest stays there, in a session that has ended for this host.
    ///
    /// # Errors
    /// As with [`ask`](Self::ask).
    pub fn abort(&mut self, cause: &Error, patience: Duration) -> Result<(), Error> {
        // What ended the session has broken its connections.
        self.connection = None;
        let Failure { kind, cause, .. } = cause.failure(&self.host);
        match self.ask(&Ask::Abort { kind, cause }, &Signals::default(), patience)? {
            Answer::Aborted => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }
}

/// Whether there can be such a file.
fn is_possible(looked: &Looked) -> bool {
    let names = [&looked.owner, &looked.group, &looked.name];
    looked.size <= MAX_SIZE && names.iter().all(|name| name.len() <= LONGEST_NAME)
}

fn out_of_turn(answer: &Answer) -> Error {
    Error::Other(format!("the source answered out of turn ({answer:?})"))
}

/// How to speak to the source that made this offer.
pub fn peer(offer: &ColdOffer, encryption: Encryption, identity: Identity) -> Result<Peer, Error> {
    let protection = match encryption {
        // libvirt's own certificates are not asked for here: whatever is not plain is pinned.
        Encryption::Always | Encryption::Certificates => Protection::Encrypted {
            identity,
            peer: offer.certificate.clone(),
        },
        Encryption::Never => Protection::Plain,
    };
    Ok(Peer {
        addresses: addresses(&offer.host, offer.port)?,
        security: Security {
            session: offer.session,
            token: (*offer.token.bytes()).into(),
            protection,
        },
    })
}

fn addresses(host: &str, port: u16) -> Result<Vec<SocketAddr>, Error> {
    let found = (host, port).to_socket_addrs().map_err(|error| {
        Error::Other(format!(
            "cannot find the address of the source's engine, {host}: {error}; set migration_host in qemu.conf there to a \
             name that resolves here"
        ))
    })?;
    Ok(found.collect())
}

#[cfg(test)]
mod tests {
    use super::super::door::listen;
    use super::*;
    use crate::wire::{Listener, Token};
    use ferry_contract::cold::Kind;
    use std::net::Ipv4Addr;
    use uuid::Uuid;

    /// To a source that answers as none of ours does.
    fn to(answer: impl Fn(&Ask) -> Answer + Send + Sync + 'static) -> Link {
        let listener = Listener::bind(Ipv4Addr::LOCALHOST.into(), 0..=0).unwrap();
        let security = Security {
            session: Uuid::new_v4(),
            token: Token::generate().unwrap(),
            protection: Protection::Plain,
        };
        let peer = Peer {
            addresses: vec![listener.address()],
            security: security.clone(),
        };
        let answers = move |_, mut connection: Connection| {
            while let Ok(ask) = message::receive::<Ask>(&mut connection) {
                if message::send(&mut connection, &answer(&ask)).is_err() {
                    break;
                }
            }
        };
        listen(listener, security, answers).unwrap();
        Link::new(peer, "host2")
    }

    #[test]
    fn a_source_that_is_slow_with_each_answer_comes_to_an_end() {
        let slow = Duration::from_millis(20);
        let mut link = to(move |_| {
            std::thread::sleep(slow);
            Answer::Noted
        });
        let ask = Ask::Verified { bytes: 0 };
        link.limit(Some(10 * slow));
        let mut answers = (0..100).map(|_| link.note(&ask, &Signals::default()));
        let refused = answers.find_map(Result::err).expect("an end").to_string();
        assert!(refused.contains("too long"), "{refused}");
        drop(answers);
        link.limit(None);
        link.note(&ask, &Signals::default()).unwrap();
    }

    #[test]
    fn nobody_has_a_name_without_end() {
        let mut link = to(|ask| {
            let length = match ask {
                Ask::Look { file } => *file as usize,
                _ => 0,
            };
            Answer::Looked(Looked {
                size: 1,
                kind: Kind::File,
                mode: 0o600,
                owner: "0".into(),
                group: "x".repeat(length),
                attributes: Vec::new(),
                acl: None,
                name: "disk".into(),
                has_nonce: false,
                sample: None,
            })
        });
        let mut look = |length| link.look(length, &Signals::default());
        assert_eq!(look(255).unwrap().group.len(), 255);
        assert!(look(256).is_err());
    }
}
