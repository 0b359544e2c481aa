//! How long the guest stood still, as far as it can tell itself.
//!
//! A stopped guest's own clocks stop with it: TSC, kvm-clock and timers continue where they were, so [`measure_stalls`] sees
//! only what delays a *running* guest (page faults, a busy host). The emulated real-time clock is the exception: with QEMU's
//! `-rtc clock=host` (its default, and libvirt's) it shows the host's time. It counts seconds only, but when one of them ends
//! is seen to a millisecond, so [`measure_lost_time`] sums up by how much it ran ahead of the guest's own clock.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::time::{clock_gettime, clock_nanosleep, ClockId, ClockNanosleepFlags};

use crate::report::{say, Report};

/// Real-time priorities (SCHED_FIFO), above all load.
pub const PRIORITY_BEAT: i32 = 50;
const PRIORITY_STALL: i32 = 60;
const PRIORITY_LOST: i32 = 70;

const TICK: Duration = Duration::from_millis(1);
/// How long before the expected end of a second the real-time clock is watched closely.
const WATCH: Duration = Duration::from_millis(20);

nix::ioctl_read!(rtc_rd_time, b'p', 0x09, RtcTime);

/// `struct rtc_time` of linux/rtc.h.
#[repr(C)]
#[derive(Default)]
pub struct RtcTime {
    second: libc::c_int,
    minute: libc::c_int,
    hour: libc::c_int,
    /// Day, month, year, day of week, of year, daylight saving: no test lasts that long.
    rest: [libc::c_int; 6],
}

/// Time since boot by the guest's own clock.
pub fn monotonic() -> Duration {
    // CLOCK_MONOTONIC always exists.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .unwrap_or_default()
}

/// Sleeps until the monotonic clock shows `due`.
pub fn sleep_until(due: Duration) {
    // A signal ends the sleep early; no signals are sent here.
    let _ = clock_nanosleep(
        ClockId::CLOCK_MONOTONIC,
        ClockNanosleepFlags::TIMER_ABSTIME,
        &due.into(),
    );
}

/// Lets this thread run before all the guest's load.
pub fn be_prompt(priority: i32) {
    let parameter = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the kernel reads one sched_param, which lives through the call.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &parameter) } != 0 {
        say(format_args!(
            "warning no real-time priority: {}",
            std::io::Error::last_os_error()
        ));
    }
}

/// Notes the longest gap between two turns of a loop that sleeps 1 ms, for ever.
pub fn measure_stalls(report: &Report) {
    be_prompt(PRIORITY_STALL);
    let mut before = monotonic();
    loop {
        sleep_until(before + TICK);
        let now = monotonic();
        let gap = (now - before).as_nanos() as u64;
        report.stall.fetch_max(gap, Ordering::Relaxed);
        report.worst.fetch_max(gap, Ordering::Relaxed);
        before = now;
    }
}

/// Sums up the time by which the real-time clock ran ahead of the guest's own, for ever.
pub fn measure_lost_time(report: &Report) {
    let Ok(clock) = File::open("/dev/rtc0") else {
        return say(format_args!("warning no /dev/rtc0: lost_ms stays 0"));
    };
    be_prompt(PRIORITY_LOST);
    let Some(first) = end_of_second(&clock, None) else {
        return say(format_args!("warning /dev/rtc0 cannot be read: lost_ms stays 0"));
    };
    let mut edge = first;
    let mut days = 0;
    while let Some(next) = end_of_second(&clock, Some(&edge)) {
        if next.real < edge.real {
            days += 1;
        }
        let real = (next.real + Duration::from_secs(days * 86_400)).saturating_sub(first.real);
        let lost = real.saturating_sub(next.own - first.own);
        report.lost.store(lost.as_micros() as u64, Ordering::Relaxed);
        edge = next;
    }
    say(format_args!(
        "warning /dev/rtc0 cannot be read any more: lost_ms is old"
    ));
}

/// The moment at which the real-time clock went from one second to the next.
#[derive(Clone, Copy)]
struct Edge {
    /// Time of day it shows since.
    real: Duration,
    /// The guest's own clock at that moment.
    own: Duration,
}

/// Waits for the next second to begin, watching closely from shortly before it is expected.
fn end_of_second(clock: &File, before: Option<&Edge>) -> Option<Edge> {
    if let Some(edge) = before {
        sleep_until(edge.own + Duration::from_secs(1) - WATCH);
    }
    let mut shown = time_of_day(clock)?;
    // Guest stopped meanwhile: the expected end is past, and the next one is watched for all the second long.
    loop {
        sleep_until(monotonic() + TICK);
        let real = time_of_day(clock)?;
        if real != shown {
            let own = monotonic();
            if real == shown + Duration::from_secs(1) || real.is_zero() {
                return Some(Edge { real, own });
            }
            // Stopped between two looks: where the second began is not known.
            shown = real;
        }
    }
}

fn time_of_day(clock: &File) -> Option<Duration> {
    let mut time = RtcTime::default();
    // SAFETY: RTC_RD_TIME writes one rtc_time, which `time` is laid out as.
    unsafe { rtc_rd_time(clock.as_raw_fd(), &mut time) }.ok()?;
    let seconds = time.second + 60 * (time.minute + 60 * time.hour);
    u64::try_from(seconds).ok().map(Duration::from_secs)
}
