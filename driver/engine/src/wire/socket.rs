//! A TCP socket tuned for migration, whose every call ends at a deadline or at the breaker.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use socket2::{SockRef, TcpKeepalive};

/// A silent connection is probed after this long ...
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
/// ... then as often ...
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// ... and given up after so many probes without an answer: 30 s in all, the same as [`PATIENCE`].
const KEEPALIVE_PROBES: u32 = 3;

/// How long data that was sent may stay without the peer's kernel taking it, before the connection is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The socket of one connection.
pub(super) struct Socket {
    stream: Arc<TcpStream>,
    broken: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

impl Socket {
    /// Tunes a connected socket.
    pub(super) fn new(stream: TcpStream) -> io::Result<Socket> {
        stream.set_nodelay(true)?;
        let options = SockRef::from(&stream);
        options.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(KEEPALIVE_IDLE)
                .with_interval(KEEPALIVE_INTERVAL)
                .with_retries(KEEPALIVE_PROBES),
        )?;
        options.set_tcp_user_timeout(Some(PATIENCE))?;
        Ok(Socket {
            stream: Arc::new(stream),
            broken: Arc::default(),
            deadline: None,
        })
    }

    /// Sets TCP_USER_TIMEOUT (tcp(7)).
    pub(super) fn set_patience(&self, patience: Duration) -> io::Result<()> {
        SockRef::from(&*self.stream).set_tcp_user_timeout(Some(patience))
    }

    /// From now on every call fails with `TimedOut` once `deadline` has passed; `None` waits without an end.
    pub(super) fn set_deadline(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        if deadline.is_none() && self.deadline.is_some() {
            self.stream.set_read_timeout(None)?;
            self.stream.set_write_timeout(None)?;
        }
        self.deadline = deadline;
        Ok(())
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub(super) fn breaker(&self) -> Breaker {
        Breaker {
            stream: Arc::downgrade(&self.stream),
            broken: self.broken.clone(),
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Whether a read would return at once: data, end or error.
    pub(super) fn readable_now(&self) -> io::Result<bool> {
        self.wait_readable(Some(Duration::ZERO))
    }

    /// Waits until a read would return at once; `false` when `limit` has passed first.
    pub(super) fn wait_readable(&self, limit: Option<Duration>) -> io::Result<bool> {
        let limit = limit.map(|limit| Instant::now() + limit);
        loop {
            let timeout = match limit {
                None => PollTimeout::NONE,
                Some(limit) => poll_timeout(limit.saturating_duration_since(Instant::now())),
            };
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(0) if limit.is_some_and(|limit| Instant::now() >= limit) => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(super) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream.shutdown(how)
    }

    /// What is left until the deadline, as a socket timeout (which must not be zero).
    fn remaining(&self) -> io::Result<Option<Duration>> {
        match self.deadline {
            None => Ok(None),
            Some(deadline) => match deadline.saturating_duration_since(Instant::now()) {
                Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
                left => Ok(Some(left.max(Duration::from_millis(1)))),
            },
        }
    }

    fn before_write(&self) -> io::Result<()> {
        match self.remaining()? {
            Some(left) => self.stream.set_write_timeout(Some(left)),
            None => Ok(()),
        }
    }
}

/// A poll(2) timeout that never ends early: rounded up to a millisecond.
pub(super) fn poll_timeout(left: Duration) -> PollTimeout {
    let milliseconds = left.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
    PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX)
}

/// SO_RCVTIMEO and SO_SNDTIMEO report EAGAIN: say what it means.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(left) = self.remaining()? {
            self.stream.set_read_timeout(Some(left))?;
        }
        loop {
            match (&*self.stream).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                answer => return answer.map_err(timed_out),
            }
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buffer)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.before_write()?;
        loop {
            match (&*self.stream).write_vectored(parts) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                answer => return answer.map_err(timed_out),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Breaks a connection off from another thread: a read or write that blocks in it ends at once with
/// [`Error::BrokenOff`](super::Error::BrokenOff), and so does every later one. It does not keep the connection open.
#[derive(Debug, Clone)]
pub struct Breaker {
    stream: Weak<TcpStream>,
    broken: Arc<AtomicBool>,
}

impl Breaker {
    /// Breaks the connection off; without effect when it is closed already.
    pub fn break_off(&self) {
        self.broken.store(true, Ordering::Release);
        if let Some(stream) = self.stream.upgrade() {
            // ENOTCONN: the peer was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
