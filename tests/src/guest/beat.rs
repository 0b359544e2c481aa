//! Listening to a guest's heartbeat: how long its users heard nothing of it.
//!
//! The guest broadcasts a datagram every millisecond. The longest silence between two of them, by the kernel's receive time
//! stamps on one clock, is what somebody on the network sees of a migration: vCPUs stopped, device state moved, the network
//! learning the new place.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use ferry_guest::config::BEAT_PORT;
use ferry_guest::line::Beat;
use nix::errno::Errno;
use nix::sys::socket::{recvmsg, setsockopt, sockopt, ControlMessageOwned, MsgFlags, SockaddrIn};
use nix::sys::time::TimeSpec;

/// How often the listener looks whether it shall stop.
const LOOK: Duration = Duration::from_millis(50);
/// Silences longer than this are kept one by one.
const NOTED: Duration = Duration::from_millis(5);
/// So many of them at most.
const NOTED_AT_MOST: usize = 10_000;

/// A silence between two heartbeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Silence {
    /// How long.
    pub length: Duration,
    /// How far the guest's own clock went on between sending the two. About as long, if the guest ran and did not send; next to
    /// nothing, if it was stopped or what it sent was held up.
    pub guest: Duration,
    /// When it ended, by the realtime clock, since the epoch.
    pub end: Duration,
    /// Number of the heartbeat that ended it.
    pub number: u64,
}

/// What was heard of one guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Heartbeats received.
    pub received: u64,
    /// Number of the newest one.
    pub newest: u64,
    /// Numbers that never came, of those before the newest.
    pub missing: u64,
    /// Heartbeats that were no newer than one already received. A guest that runs in two places, or that was set back to an
    /// earlier state, says its numbers twice.
    pub repeated: u64,
    /// The longest silence.
    pub longest: Silence,
    /// Every silence of more than 5 ms, in order of time; the first 10 000.
    pub silences: Vec<Silence>,
    /// When the last one was received, and when it was sent by the guest's clock.
    last: Option<(Duration, Duration)>,
}

impl Heard {
    fn hear(&mut self, beat: Beat, now: Duration) {
        self.received += 1;
        if beat.number <= self.newest {
            self.repeated += 1;
        } else {
            if self.last.is_some() {
                self.missing += beat.number - self.newest - 1;
            }
            self.newest = beat.number;
        }
        let sent = Duration::from_nanos(beat.sent_ns);
        if let Some((last, last_sent)) = self.last.replace((now, sent)) {
            let silence = Silence {
                length: now.saturating_sub(last),
                guest: sent.saturating_sub(last_sent),
                end: now,
                number: beat.number,
            };
            if silence.length > self.longest.length {
                self.longest = silence;
            }
            if silence.length > NOTED && self.silences.len() < NOTED_AT_MOST {
                self.silences.push(silence);
            }
        }
    }
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Listener {
    heard: Arc<Mutex<BTreeMap<Ipv4Addr, Heard>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens for every guest that is heard in the network namespace `namespace`, or the caller's own, which must have an address
    /// in the guests' network.
    ///
    /// # Errors
    /// If the namespace cannot be entered or the port is taken.
    pub fn start(namespace: Option<&Path>) -> Result<Self> {
        let socket = super::netns::udp_socket(namespace, (Ipv4Addr::UNSPECIFIED, BEAT_PORT).into())?;
        socket
            .set_read_timeout(Some(LOOK))
            .context("cannot set a time limit")?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true).context("no time stamps on a socket")?;
        let heard = Arc::new(Mutex::new(BTreeMap::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (heard, stop) = (Arc::clone(&heard), Arc::clone(&stop));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Some((from, beat, now)) = receive(&socket) {
                        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                        heard.entry(from).or_insert_with(Heard::default).hear(beat, now);
                    }
                }
            }
        });
        Ok(Listener {
            heard,
            stop,
            thread: Some(thread),
        })
    }

    /// What was heard so far of the guest at `ip`.
    pub fn heard(&self, ip: Ipv4Addr) -> Heard {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get(&ip).cloned().unwrap_or_default()
    }

    /// Forgets what was heard of all guests: measure anew from the next heartbeat on.
    pub fn reset(&self) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Forgets what was heard of the guest at `ip`: it begins anew, or goes back in time.
    pub fn forget(&self, ip: Ipv4Addr) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.remove(&ip);
    }

    /// Waits until `count` heartbeats of the guest at `ip` were heard since the start or the last reset.
    ///
    /// # Errors
    /// When `patience` is over.
    pub fn wait(&self, ip: Ipv4Addr, count: u64, patience: Duration) -> Result<Heard> {
        let deadline = Instant::now() + patience;
        loop {
            let heard = self.heard(ip);
            if heard.received >= count {
                return Ok(heard);
            }
            if Instant::now() > deadline {
                bail!(
                    "{} of {count} heartbeats of {ip} heard within {patience:?}",
                    heard.received
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It holds nothing but the socket.
            let _ = thread.join();
        }
    }
}

/// One heartbeat, its sender and when the kernel received it; `None` for anything else, and when the time limit is over.
fn receive(socket: &UdpSocket) -> Option<(Ipv4Addr, Beat, Duration)> {
    let mut buffer = [0; 128];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let mut space = nix::cmsg_space!(TimeSpec);
    let message = match recvmsg::<SockaddrIn>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::empty(),
    ) {
        Ok(message) => message,
        Err(Errno::EAGAIN | Errno::EINTR) => return None,
        // Nothing else happens to a bound UDP socket; do not spin if it does.
        Err(_) => {
            thread::sleep(LOOK);
            return None;
        }
    };
    let from = message.address?.ip();
    let time = message.cmsgs().ok()?.find_map(|control| match control {
        ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
        _ => None,
    })?;
    let length = message.bytes;
    Some((from, Beat::parse(&buffer[..length])?, time))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(beats: &[(u64, u64)]) -> Heard {
        let mut heard = Heard::default();
        for (number, ms) in beats {
            heard.hear(
                Beat {
                    number: *number,
                    sent_ns: 0,
                },
                Duration::from_millis(*ms),
            );
        }
        heard
    }

    #[test]
    fn the_longest_silence_and_the_lost_beats_are_told() {
        let heard = heard(&[(10, 1000), (11, 1001), (15, 1041), (16, 1042)]);
        assert_eq!(heard.longest.length, Duration::from_millis(40));
        assert_eq!(
            (
                heard.received,
                heard.missing,
                heard.repeated,
                heard.silences.len()
            ),
            (4, 3, 0, 1)
        );
    }

    #[test]
    fn a_guest_in_two_places_repeats_itself() {
        assert_eq!(
            heard(&[(1, 1), (2, 2), (3, 3), (2, 3), (4, 4), (3, 4)]).repeated,
            2
        );
    }
}
