//! The door: where one engine waits for the other's connections. Live, that is the destination; cold, the source.
//!
//! Each arriving connection is greeted in a short-lived thread of its own, bounded in time, so that a stranger who
//! says nothing keeps nobody out; of too many at once the longest waiting goes.
//!
//! ```text
//!   accept() ── poll ─┬─ a TCP connection ──> greeting thread (10 s at most) ──> queue ──┐
//!                     ├─ a byte: the queue has something  <──────────────────────────────┘
//!                     ├─ the stop socket's end: Stopped
//!                     └─ the deadline: NobodyCame
//! ```

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::{debug, info, warn};

use super::connection::{admit, Connection};
use super::error::{Error, Result};
use super::hello::Purpose;
use super::identity::Security;
use super::socket::poll_timeout;

/// Time for TLS and greeting together.
const GREETING: Duration = Duration::from_secs(10);

/// Connections that may be in their greeting at once.
const MAX_GREETINGS: usize = 32;

type Outcome = Result<(Purpose, Connection)>;

/// A listening socket of one session. One thread calls [`accept`](Self::accept).
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    queue: Mutex<Queue>,
    sender: Sender<Outcome>,
    bell: Arc<UnixStream>,
    stop: Arc<UnixStream>,
    stopped: UnixStream,
}

/// What the greeting threads bring back.
struct Queue {
    outcomes: Receiver<Outcome>,
    bell: UnixStream,
    greeting: VecDeque<Weak<TcpStream>>,
}

/// Ends a [`Listener::accept`], the present one or the next, from another thread.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<UnixStream>);

impl Stopper {
    /// Stops the listening for good.
    pub fn stop(&self) {
        // The other end then reads as ended, for ever. It fails only when it is shut down already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Listener {
    /// Listens at `ip` on a free port of `ports`: from the top, because libvirt hands its own out from the bottom
    /// (virportallocator.c, 11.3) some time before QEMU binds them. `::` listens for IPv4 too.
    ///
    /// # Errors
    /// [`Error::NoFreePort`] if all are taken; [`Error::Io`] if the address cannot be bound for another reason.
    pub fn bind(ip: IpAddr, ports: RangeInclusive<u16>) -> Result<Listener> {
        let (first, last) = (*ports.start(), *ports.end());
        for port in ports.rev() {
            let address = SocketAddr::new(ip, port);
            match listen(address).and_then(Listener::new) {
                Ok(listener) => {
                    info!(address = %listener.address, "listening for the other engine");
                    return Ok(listener);
                }
                Err(error) if error.kind() == ErrorKind::AddrInUse => {}
                Err(source) => {
                    return Err(Error::Io {
                        doing: "listening for migrations",
                        with: address,
                        source,
                    })
                }
            }
        }
        Err(Error::NoFreePort { ip, first, last })
    }

    fn new(socket: TcpListener) -> io::Result<Listener> {
        let (sender, outcomes) = mpsc::channel();
        let (ring, bell) = UnixStream::pair()?;
        let (stop, stopped) = UnixStream::pair()?;
        ring.set_nonblocking(true)?;
        bell.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        Ok(Listener {
            socket,
            address,
            queue: Mutex::new(Queue {
                outcomes,
                bell,
                greeting: VecDeque::new(),
            }),
            sender,
            bell: Arc::new(ring),
            stop: Arc::new(stop),
            stopped,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A handle to stop it from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Waits for the next connection that belongs to the session of `security`. Others are refused, logged, and do
    /// not end the waiting.
    ///
    /// # Errors
    /// [`Error::NobodyCame`] at the deadline, with the last refused connection; [`Error::Stopped`]; [`Error::Io`]
    /// when the system itself fails.
    pub fn accept(&self, security: &Security, deadline: Instant) -> Result<(Purpose, Connection)> {
        let began = Instant::now();
        let mut last = None;
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            while let Some(outcome) = queue.next() {
                match outcome {
                    Ok((purpose, connection)) => {
                        debug!(peer = %connection.peer(), %purpose, "connection accepted");
                        return Ok((purpose, connection));
                    }
                    Err(error) => {
                        warn!(%error, "connection turned away");
                        last = Some(Box::new(error));
                    }
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::NobodyCame {
                    address: self.address,
                    waited: began.elapsed(),
                    last,
                });
            }
            let (arrived, stopped) = self
                .wait(&queue, poll_timeout(left))
                .map_err(|source| self.failed(source))?;
            if stopped {
                return Err(Error::Stopped {
                    address: self.address,
                });
            }
            if arrived {
                match self.socket.accept() {
                    // People know IPv4 addresses as such.
                    Ok((stream, peer)) => self
                        .greet(
                            &mut queue,
                            stream,
                            SocketAddr::new(peer.ip().to_canonical(), peer.port()),
                            security,
                        )
                        .map_err(|source| self.failed(source))?,
                    // The peer was gone again, or it was the bell after all.
                    Err(error)
                        if matches!(
                            error.kind(),
                            ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                        ) => {}
                    Err(source) => return Err(self.failed(source)),
                }
            }
        }
    }

    /// Waits for anything to do: (a connection has arrived, the listener is stopped).
    fn wait(&self, queue: &Queue, timeout: PollTimeout) -> io::Result<(bool, bool)> {
        let mut fds = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(queue.bell.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) => Ok((fds[0].any() == Some(true), fds[1].any() == Some(true))),
            Err(nix::errno::Errno::EINTR) => Ok((false, false)),
            Err(error) => Err(error.into()),
        }
    }

    /// Starts a greeting thread.
    fn greet(
        &self,
        queue: &mut Queue,
        stream: TcpStream,
        peer: SocketAddr,
        security: &Security,
    ) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        queue.greeting.retain(|stream| stream.strong_count() > 0);
        if queue.greeting.len() >= MAX_GREETINGS {
            if let Some(oldest) = queue.greeting.pop_front().and_then(|stream| stream.upgrade()) {
                let _ = oldest.shutdown(Shutdown::Both);
            }
        }
        // Held by the thread as long as the greeting lasts, so that it can be broken off.
        let handle = Arc::new(stream.try_clone()?);
        queue.greeting.push_back(Arc::downgrade(&handle));
        let (security, sender, bell) = (security.clone(), self.sender.clone(), self.bell.clone());
        let greeting = move || {
            let outcome = admit(stream, peer, &security, Instant::now() + GREETING);
            drop(handle);
            // It fails when the listener is gone; then the connection goes too.
            if sender.send(outcome).is_ok() {
                // A bell that rings already (EAGAIN) is as good.
                let _ = (&*bell).write(&[1]);
            }
        };
        thread::Builder::new()
            .name("ferry-greeting".into())
            .spawn(greeting)
            .map(drop)
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Io {
            doing: "listening for the other engine",
            with: self.address,
            source,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let queue = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        for stream in queue.greeting.drain(..).filter_map(|stream| stream.upgrade()) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Queue {
    /// The next outcome, if there is one. The bell is silenced first and the queue looked at after, so that one that
    /// comes in between rings again.
    fn next(&mut self) -> Option<Outcome> {
        if let Ok(outcome) = self.outcomes.try_recv() {
            return Some(outcome);
        }
        let mut sink = [0; 64];
        while matches!(self.bell.read(&mut sink), Ok(count) if count > 0) {}
        self.outcomes.try_recv().ok()
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.cloexec(),
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    // Connections of an earlier migration in TIME_WAIT do not block a port; a listener still does.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}
