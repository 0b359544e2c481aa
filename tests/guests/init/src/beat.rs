//! The heartbeat: a datagram every millisecond, for somebody outside to measure the silence between them.

use std::net::UdpSocket;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ferry_guest::config::Config;
use ferry_guest::line::Beat;

use crate::clock;
use crate::report::{say, Report};

/// Sends without end. One that cannot be sent is missing outside and seen there.
pub fn send(config: &Config, report: &Report) {
    let Some(target) = config.beat_target() else {
        return;
    };
    let socket = match UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.set_broadcast(true)?;
        Ok(socket)
    }) {
        Ok(socket) => socket,
        Err(error) => return say(format_args!("fatal no socket for the heartbeat: {error}")),
    };
    clock::be_prompt(clock::PRIORITY_BEAT);
    let interval = Duration::from_micros(config.beat_us);
    let mut due = clock::monotonic();
    for number in 1.. {
        let now = clock::monotonic();
        let beat = Beat {
            number,
            sent_ns: now.as_nanos() as u64,
        };
        if socket.send_to(beat.to_string().as_bytes(), target).is_ok() {
            report.beats.fetch_add(1, Ordering::Relaxed);
        }
        // After a stall go on from now: the missed ones are not sent in a burst.
        due = (due + interval).max(now);
        clock::sleep_until(due);
    }
}
