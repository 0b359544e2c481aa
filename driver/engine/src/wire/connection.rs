//! One authenticated connection between two engines.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use tracing::debug;

use super::certified;
use super::error::{Error, Party, Result};
use super::hello::{self, Purpose, Refusal};
use super::identity::{Protection, Security};
use super::socket::{Breaker, Socket, PATIENCE};
use super::tls;

/// What the receiving end of a finished stream says, so that the sending end knows all of it was read.
const FAREWELL: [u8; 8] = *b"FERRYEND";

/// How long a side that gives up keeps reading, so that its last words are not lost in a connection reset.
const LINGER: Duration = Duration::from_secs(2);

/// A connection that both engines have agreed on: TCP, encrypted or plain, owned by one thread.
///
/// [`Read`] and [`Write`] give plain `io` errors (a [`Breaker`] looks like the peer's end there); everything else is
/// typed. Dropping it closes it; a stream whose end matters is ended with [`end_sending`](Self::end_sending) on one
/// side and [`end_receiving`](Self::end_receiving) on the other.
pub struct Connection {
    socket: Socket,
    tls: Option<Box<tls::Session>>,
    peer: SocketAddr,
    patience: Duration,
}

/// Connects to the first of `addresses` where the engine of this session answers.
///
/// # Errors
/// The most telling one of all attempts: a refusal says more than an address that does not answer.
/// [`Error::Timeout`] once `deadline` has passed.
pub fn connect(
    addresses: &[SocketAddr],
    security: &Security,
    purpose: Purpose,
    deadline: Instant,
) -> Result<Connection> {
    let mut worst: Option<Error> = None;
    for (tried, &address) in addresses.iter().enumerate() {
        // An address that swallows packets must leave time for the others.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        match connect_one(address, security, purpose, Instant::now() + share) {
            Ok(connection) => return Ok(connection),
            Err(error) => {
                debug!(%address, %purpose, %error, "connection attempt failed");
                if worst.as_ref().is_none_or(|worst| error.rank() >= worst.rank()) {
                    worst = Some(error);
                }
            }
        }
    }
    Err(worst.unwrap_or(Error::NoAddress))
}

fn connect_one(
    peer: SocketAddr,
    security: &Security,
    purpose: Purpose,
    deadline: Instant,
) -> Result<Connection> {
    let doing = "connecting";
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::Timeout { peer, doing });
    }
    let began = Instant::now();
    let stream =
        TcpStream::connect_timeout(&peer, left).map_err(|error| Error::from_io(peer, doing, false, error))?;
    let round_trip = began.elapsed();
    let session = security.protection.client(peer.ip())?;
    let opened = Connection::open(stream, peer, session, deadline).and_then(|mut connection| {
        connection.greet(security, purpose)?;
        Ok(connection)
    });
    let mut connection = opened.map_err(|error| security.protection.explain(error))?;
    connection.socket.fit_to(round_trip);
    connection.set_deadline(None)?;
    Ok(connection)
}

/// Takes in a freshly accepted TCP connection: handshake and greeting, all before `deadline`.
pub(super) fn admit(
    stream: TcpStream,
    peer: SocketAddr,
    security: &Security,
    deadline: Instant,
) -> Result<(Purpose, Connection)> {
    let encrypted = match &security.protection {
        Protection::Learned { plain: true, .. } => begins_tls(&stream, peer, deadline)?,
        _ => true,
    };
    let session = match encrypted {
        true => security.protection.server()?,
        false => None,
    };
    let opened = Connection::open(stream, peer, session, deadline);
    let mut connection = opened.map_err(|error| security.protection.explain(error))?;
    let purpose = connection.be_greeted(security)?;
    connection.learn(security)?;
    connection.set_deadline(None)?;
    Ok((purpose, connection))
}

/// Whether the connecting side speaks TLS, told by its first byte.
fn begins_tls(stream: &TcpStream, peer: SocketAddr, deadline: Instant) -> Result<bool> {
    let doing = "waiting for its greeting";
    let failed = |error| Error::from_io(peer, doing, false, error);
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(Error::Timeout { peer, doing });
    }
    stream.set_read_timeout(Some(left)).map_err(failed)?;
    let mut first = [0; 1];
    match stream.peek(&mut first).map_err(failed)? {
        0 => Err(Error::PeerGone { peer, doing }),
        _ => Ok(hello::MAGIC[0] != first[0]),
    }
}

impl Connection {
    /// The peer has shown the token: its certificate is the session's from now on, or is that already.
    fn learn(&mut self, security: &Security) -> Result<()> {
        let (Protection::Learned { peer, .. }, Some(tls)) = (&security.protection, &self.tls) else {
            return Ok(());
        };
        let shown = tls.shown().map(AsRef::as_ref).unwrap_or_default();
        match peer.get_or_init(|| shown.to_vec()) == shown {
            true => Ok(()),
            false => Err(Error::WrongCertificate {
                shown_by: Party::Peer(self.peer),
                checked_by: Party::ThisHost,
            }),
        }
    }

    fn open(
        stream: TcpStream,
        peer: SocketAddr,
        session: Option<tls::Session>,
        deadline: Instant,
    ) -> Result<Connection> {
        let socket = Socket::new(stream).map_err(|source| Error::Io {
            doing: "setting up a socket",
            with: peer,
            source,
        })?;
        let tls = session.map(Box::new);
        let mut connection = Connection {
            socket,
            tls,
            peer,
            patience: PATIENCE,
        };
        connection.set_deadline(Some(deadline))?;
        if let Some(tls) = &mut connection.tls {
            if let Err(error) = tls.handshake(&mut connection.socket) {
                let error = connection.error("opening the encrypted connection", error);
                connection.linger();
                return Err(error);
            }
        }
        Ok(connection)
    }

    /// The connecting side's part of the greeting.
    fn greet(&mut self, security: &Security, purpose: Purpose) -> Result<()> {
        let doing = "greeting";
        // A peer that refuses our certificate may have closed already: its alert, still to be read, says more.
        let sent = self.send(&[&hello::hello(security, purpose)], doing);
        let mut bytes = [0; hello::ANSWER_LENGTH];
        let mut filled = 0;
        while filled < bytes.len() {
            match self.read(&mut bytes[filled..]) {
                Ok(0) if self.tls.is_none() && hello::looks_like_tls(&bytes[..filled]) => {
                    return Err(Error::Protection {
                        peer: self.peer,
                        ours: "plain",
                    });
                }
                Ok(0) => return sent.and(Err(self.gone(doing))),
                Ok(count) => filled += count,
                Err(error) => return Err(self.error(doing, error)),
            }
        }
        let peer = self.peer;
        match hello::read_answer(&bytes) {
            Some(Ok(())) => sent,
            Some(Err(Refusal::Version { theirs })) => Err(Error::Version {
                peer,
                ours: hello::VERSION,
                theirs,
            }),
            Some(Err(reason)) => Err(Error::Refused { peer, reason }),
            None if self.tls.is_none() && hello::looks_like_tls(&bytes) => {
                Err(Error::Protection { peer, ours: "plain" })
            }
            None => Err(Error::Refused {
                peer,
                reason: Refusal::Greeting,
            }),
        }
    }

    /// The accepting side's part of the greeting.
    fn be_greeted(&mut self, security: &Security) -> Result<Purpose> {
        let doing = "waiting for its greeting";
        let mut bytes = [0; hello::HELLO_LENGTH];
        self.receive_exact(&mut bytes, doing)?;
        let peer = self.peer;
        let verdict = hello::judge(&bytes, security);
        self.send(&[&hello::answer(verdict.map(|_| ()))], "answering its greeting")?;
        verdict.map_err(|reason| {
            self.linger();
            match reason {
                Refusal::Version { theirs } => Error::Version {
                    peer,
                    ours: hello::VERSION,
                    theirs,
                },
                Refusal::Greeting if self.tls.is_none() && hello::looks_like_tls(&bytes) => {
                    Error::Protection { peer, ours: "plain" }
                }
                reason => Error::Turned { peer, reason },
            }
        })
    }

    /// The other end.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Whether TLS protects it.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Whose certificate the other end has shown, for people; `None` where it has shown none.
    pub fn peer_certificate(&self) -> Option<String> {
        self.tls.as_ref()?.shown().map(certified::owner)
    }

    /// A handle to break this connection off from another thread.
    pub fn breaker(&self) -> Breaker {
        self.socket.breaker()
    }

    /// Every later call fails with [`Error::Timeout`] once `deadline` has passed. `None`, the state after connect and
    /// accept, waits as long as the peer's kernel answers (keepalive: 30 s of silence end it).
    ///
    /// # Errors
    /// [`Error::Io`] where the socket refuses.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) -> Result<()> {
        let peer = self.peer;
        self.socket.set_deadline(deadline).map_err(|source| Error::Io {
            doing: "setting a socket's time limit",
            with: peer,
            source,
        })
    }

    /// How long sent data may stay untaken before the connection is given up (TCP_USER_TIMEOUT, 30 s unless set).
    ///
    /// This holds for a peer whose kernel answers but whose engine does not read, too: Linux gives up a connection
    /// whose window stays closed for so long (tcp_timer.c, tcp_probe_timer; 6.18). A receiver must therefore not leave
    /// data in the socket to make its sender wait.
    ///
    /// # Errors
    /// [`Error::Io`] where the socket refuses.
    pub fn set_patience(&mut self, patience: Duration) -> Result<()> {
        let peer = self.peer;
        self.patience = patience;
        self.socket.set_patience(patience).map_err(|source| Error::Io {
            doing: "setting a socket's user timeout",
            with: peer,
            source,
        })
    }

    /// Sends all of `parts`, one after the other, with as few system calls as will do.
    ///
    /// # Errors
    /// Typed, in the words of `doing` (“sending the dirty map”).
    pub fn send(&mut self, parts: &[&[u8]], doing: &'static str) -> Result<()> {
        // The few parts a frame has; more of them just take another round.
        let mut slices = [IoSlice::new(&[]); 4];
        for chunk in parts.chunks(slices.len()) {
            for (slice, part) in slices.iter_mut().zip(chunk) {
                *slice = IoSlice::new(part);
            }
            let mut left = &mut slices[..chunk.len()];
            IoSlice::advance_slices(&mut left, 0); // drops leading empty parts
            while !left.is_empty() {
                match self.write_vectored(left) {
                    Ok(0) => return Err(self.gone(doing)),
                    Ok(count) => IoSlice::advance_slices(&mut left, count),
                    Err(error) => return Err(self.error(doing, error)),
                }
            }
        }
        Ok(())
    }

    /// Fills `buffer`.
    ///
    /// # Errors
    /// Typed, in the words of `doing`.
    pub fn receive_exact(&mut self, buffer: &mut [u8], doing: &'static str) -> Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            filled += self.receive_some(&mut buffer[filled..], doing)?;
        }
        Ok(())
    }

    /// Reads at least one byte; the peer's end is [`Error::PeerGone`].
    pub(super) fn receive_some(&mut self, buffer: &mut [u8], doing: &'static str) -> Result<usize> {
        match self.read(buffer) {
            Ok(0) => Err(self.gone(doing)),
            Ok(count) => Ok(count),
            Err(error) => Err(self.error(doing, error)),
        }
    }

    /// Reads what has already arrived, without waiting; `None` if that is nothing.
    pub(super) fn receive_ready(&mut self, buffer: &mut [u8], doing: &'static str) -> Result<Option<usize>> {
        let ready = match &mut self.tls {
            Some(tls) => tls.read_ready(&mut self.socket, buffer),
            None => match self.socket.readable_now() {
                Ok(true) => self.socket.read(buffer).map(Some),
                Ok(false) => Ok(None),
                Err(error) => Err(error),
            },
        };
        match ready {
            Ok(Some(0)) => Err(self.gone(doing)),
            Ok(count) => Ok(count),
            Err(error) => Err(self.error(doing, error)),
        }
    }

    /// Reads at least one byte within the connection's patience (and its deadline).
    pub(super) fn receive_patiently(&mut self, buffer: &mut [u8], doing: &'static str) -> Result<usize> {
        if let Some(count) = self.receive_ready(buffer, doing)? {
            return Ok(count);
        }
        let deadline = self.socket.deadline();
        let own = Instant::now().checked_add(self.patience);
        self.set_deadline([deadline, own].into_iter().flatten().min())?;
        let answer = self.receive_some(buffer, doing);
        self.set_deadline(deadline)?;
        answer
    }

    /// Ends a stream cleanly on the side that sent it: returns once the receiver has read all of it and said so.
    ///
    /// # Errors
    /// Any; then the receiver may not have it all.
    pub fn end_sending(mut self) -> Result<()> {
        let doing = "waiting for it to confirm the end of a stream";
        self.end_writing().map_err(|error| self.error(doing, error))?;
        let mut farewell = [0; FAREWELL.len()];
        let mut filled = 0;
        while filled < farewell.len() {
            filled += self.receive_patiently(&mut farewell[filled..], doing)?;
        }
        if farewell == FAREWELL {
            Ok(())
        } else {
            Err(Error::BadFrame {
                peer: self.peer,
                what: super::frame::Invalid::Farewell,
            })
        }
    }

    /// Ends a stream cleanly on the side that received it: waits for the sender's end and confirms it.
    ///
    /// # Errors
    /// [`Error::BadFrame`] if more data comes instead, and any other.
    pub fn end_receiving(mut self) -> Result<()> {
        let doing = "waiting for the end of a stream";
        match self.read(&mut [0; 1]) {
            Ok(0) if self.socket.is_broken() => return Err(self.gone(doing)),
            Ok(0) => {}
            Ok(_) => {
                return Err(Error::BadFrame {
                    peer: self.peer,
                    what: super::frame::Invalid::AfterEnd,
                })
            }
            Err(error) => return Err(self.error(doing, error)),
        }
        self.send(&[&FAREWELL], "confirming the end of a stream")?;
        // Failing here takes nothing back: the farewell is on its way.
        let _ = self.end_writing();
        Ok(())
    }

    /// Reads and forgets what still comes, for a short time: closing a socket with unread data would reset the
    /// connection, and the peer could lose the last thing it was told.
    pub(super) fn linger(&mut self) {
        let _ = self.end_writing();
        if self.socket.set_deadline(Some(Instant::now() + LINGER)).is_err() {
            return;
        }
        let mut sink = [0; 16 * 1024];
        // From the socket itself: after a TLS error there is nothing left to decrypt with.
        while matches!(self.socket.read(&mut sink), Ok(count) if count > 0) {}
    }

    fn end_writing(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            tls.end_writing(&mut self.socket)?;
        }
        self.socket.shutdown(Shutdown::Write)
    }

    fn gone(&self, doing: &'static str) -> Error {
        match self.socket.is_broken() {
            true => Error::BrokenOff {
                peer: self.peer,
                doing,
            },
            false => Error::PeerGone {
                peer: self.peer,
                doing,
            },
        }
    }

    fn error(&self, doing: &'static str, error: io::Error) -> Error {
        match self.socket.is_broken() {
            true => Error::BrokenOff {
                peer: self.peer,
                doing,
            },
            false => Error::from_io(self.peer, doing, self.tls.is_some(), error),
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => tls.read(&mut self.socket, buffer),
            None => self.socket.read(buffer),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buffer)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => tls.write_vectored(&mut self.socket, parts),
            None => self.socket.write_vectored(parts),
        }
    }

    /// Nothing is held back: every write is on its way when it returns.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer)
            .field("encrypted", &self.is_encrypted())
            .finish()
    }
}
