//! A TCP socket tuned for migration, whose every call ends at a deadline or at the breaker.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::sockopt::SndBufForce;
use nix::sys::socket::SetSockOpt;
use socket2::{SockRef, TcpKeepalive};
use tracing::debug;

/// A silent connection is probed after this long ...
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
/// ... then as often ...
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// ... and given up after so many probes without an answer: 30 s in all, the same as [`PATIENCE`].
const KEEPALIVE_PROBES: u32 = 3;

/// How long data that was sent may stay without the peer's kernel taking it, before the connection is given up.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// From this round trip on a path is long: one stream then needs more in flight than the kernel's own send buffer holds
/// (tcp_wmem, 4 MiB by default: about 2.7 MB, so 2.7 GB/s at 1 ms).
const LONG_PATH: Duration = Duration::from_millis(1);

/// Send buffer for a long path, bytes. At 40 ms one stream went from 69 to 390 MB/s with it (Linux 6.18, a delay line
/// of two TUN devices). On a short path it only costs: about a tenth more processor time, its pages being cold. The
/// receive buffer is left alone: setting it would end the kernel's own tuning, which goes further.
const LONG_PATH_SEND_BUFFER: usize = 32 << 20;

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

    /// Makes room for what a path with this round-trip time holds.
    pub(super) fn fit_to(&self, round_trip: Duration) {
        if round_trip < LONG_PATH {
            return;
        }
        // SO_SNDBUF instead would be capped at wmem_max, often below what the kernel's tuning reaches.
        if let Err(error) = SndBufForce.set(&*self.stream, &LONG_PATH_SEND_BUFFER) {
            debug!(%error, ?round_trip, "send buffer left to the kernel (CAP_NET_ADMIN is needed)");
        }
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
        loop {
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::ZERO) {
                Err(nix::errno::Errno::EINTR) => {}
                answer => return Ok(answer? > 0),
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

    /// Ends a read that blocks in the connection, and every later one, as if the peer had ended it; what is still to be
    /// said can be said.
    pub fn stop_reading(&self) {
        if let Some(stream) = self.stream.upgrade() {
            let _ = stream.shutdown(Shutdown::Read);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn only_a_long_path_gets_a_large_send_buffer() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = Socket::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
        let size = || SockRef::from(&*socket.stream).send_buffer_size().unwrap();
        let own = size();
        socket.fit_to(Duration::from_micros(200));
        assert_eq!(size(), own);
        socket.fit_to(Duration::from_millis(40));
        // The kernel counts its overhead in: twice what was asked for. Without the privilege nothing changes.
        let privileged = SndBufForce.set(&*socket.stream, &LONG_PATH_SEND_BUFFER).is_ok();
        assert_eq!(
            size(),
            if privileged {
                2 * LONG_PATH_SEND_BUFFER
            } else {
                own
            }
        );
    }

    #[test]
    fn a_poll_never_ends_early() {
        let milliseconds = |left| poll_timeout(left).as_millis().map_or(-1, |ms| ms as i32);
        assert_eq!(milliseconds(Duration::ZERO), 0);
        assert_eq!(milliseconds(Duration::from_micros(1)), 1);
        assert_eq!(milliseconds(Duration::from_micros(1001)), 2);
        assert!(milliseconds(Duration::MAX) > 1_000_000_000);
    }
}
