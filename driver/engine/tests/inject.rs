//! System call injection into processes that are busy with all kinds of things: none of them may notice.

mod common;

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{await_that, deadline, report, Child};
use ferry_engine::qemu::inject::{self, InjectError};
use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;

/// Injects a few times and checks that the process keeps no copy.
fn inject_some(child: &Child) {
    // A child forked while another test holds a userfaultfd has inherited that.
    let before = userfaultfds(child);
    for _ in 0..20 {
        let uffd = inject::userfaultfd(&child.process, deadline()).expect("injection");
        let name = std::fs::read_link(format!("/proc/self/fd/{}", uffd.as_raw_fd())).expect("our copy");
        assert_eq!(name.to_str(), Some("anon_inode:[userfaultfd]"));
    }
    assert_eq!(userfaultfds(child), before, "a copy stays open");
}

fn userfaultfds(child: &Child) -> usize {
    let fds = std::fs::read_dir(child.process.proc_path("fd")).expect("the child's descriptors");
    let targets = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    targets
        .filter(|name| name.to_string_lossy().contains("userfaultfd"))
        .count()
}

/// What a raw system call returned, and errno.
fn outcome(result: i64) -> (i64, i64) {
    let error = if result < 0 {
        std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
    } else {
        0
    };
    (result, error.into())
}

fn poll_in(pipe: &UnixStream) -> libc::pollfd {
    libc::pollfd {
        fd: pipe.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

/// A child blocks in `number`, gets injected into, and must get the very result it would have got.
fn undisturbed(number: i64, body: impl Fn(&UnixStream) -> i64, wake: bool, expected: i64) {
    let mut child = Child::fork(|pipe| {
        let (result, errno) = outcome(body(pipe));
        report(pipe, result, errno);
    });
    await_that("the child to block", || {
        child.blocked_in() == Some(number) && child.state() == 'S'
    });
    inject_some(&child);
    await_that("the child to block again", || {
        child.blocked_in() == Some(number) || !wake
    });
    if wake {
        child.pipe.write_all(b"x").expect("waking the child");
    }
    assert_eq!(child.answer(), (expected, 0), "system call {number}");
}

#[test]
fn ppoll_without_timeout() {
    let body = |pipe: &UnixStream| {
        let mut fd = poll_in(pipe);
        // SAFETY: one live pollfd, no timeout, no mask.
        unsafe { libc::ppoll(&mut fd, 1, std::ptr::null(), std::ptr::null()).into() }
    };
    undisturbed(libc::SYS_ppoll, body, true, 1);
}

#[test]
fn ppoll_with_a_timeout_that_passes() {
    let body = |_: &UnixStream| {
        let start = Instant::now();
        let time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 700_000_000,
        };
        // SAFETY: no descriptors, a live timeout, no mask.
        let result = unsafe { libc::ppoll(std::ptr::null_mut(), 0, &time, std::ptr::null()) };
        // Must not have returned early; 1000 stands for that.
        if start.elapsed() < Duration::from_millis(700) {
            1000
        } else {
            result.into()
        }
    };
    undisturbed(libc::SYS_ppoll, body, false, 0);
}

#[test]
fn poll_with_a_timeout_that_passes() {
    let body = |_: &UnixStream| {
        let start = Instant::now();
        // SAFETY: no descriptors. The raw call, as the C library may use another one.
        let result = unsafe { libc::syscall(libc::SYS_poll, 0_usize, 0, 700) };
        if start.elapsed() < Duration::from_millis(700) {
            1000
        } else {
            result
        }
    };
    undisturbed(libc::SYS_poll, body, false, 0);
}

#[test]
fn nanosleep() {
    let body = |_: &UnixStream| {
        let start = Instant::now();
        let time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 700_000_000,
        };
        // SAFETY: a live time to sleep, nowhere to put the rest.
        let result =
            unsafe { libc::syscall(libc::SYS_nanosleep, &time, std::ptr::null_mut::<libc::timespec>()) };
        if start.elapsed() < Duration::from_millis(700) {
            1000
        } else {
            result
        }
    };
    undisturbed(libc::SYS_nanosleep, body, false, 0);
}

#[test]
fn read_of_a_socket() {
    let body = |pipe: &UnixStream| {
        let mut byte = 0_u8;
        // SAFETY: reads one byte into one byte.
        unsafe { libc::read(pipe.as_raw_fd(), std::ptr::from_mut(&mut byte).cast(), 1) as i64 }
    };
    undisturbed(libc::SYS_read, body, true, 1);
}

#[test]
fn epoll_wait() {
    let body = |pipe: &UnixStream| {
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: 0,
        };
        // SAFETY: one live event in, one out.
        unsafe {
            let epoll = libc::epoll_create1(0);
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, pipe.as_raw_fd(), &mut event);
            // The kernel itself answers any stop, even SIGSTOP's, with EINTR here (signal(7)); nothing else may come.
            loop {
                match libc::epoll_wait(epoll, &mut event, 1, -1) {
                    -1 if *libc::__errno_location() == libc::EINTR => {}
                    result => break result.into(),
                }
            }
        }
    };
    undisturbed(libc::SYS_epoll_wait, body, true, 1);
}

#[test]
fn a_computation_in_user_mode() {
    let mut child = Child::fork(|pipe| {
        let mut state = 1_u64;
        let mut ready = poll_in(pipe);
        let mut rounds = 0_u64;
        // SAFETY: one live pollfd, does not wait.
        while unsafe { libc::poll(&mut ready, 1, 0) } == 0 {
            for _ in 0..100_000 {
                state = std::hint::black_box(state.wrapping_mul(6364136223846793005).wrapping_add(1));
            }
            rounds += 1;
        }
        // The same again, undisturbed.
        let mut check = 1_u64;
        for _ in 0..rounds * 100_000 {
            check = std::hint::black_box(check.wrapping_mul(6364136223846793005).wrapping_add(1));
        }
        report(pipe, state as i64, check as i64);
    });
    inject_some(&child);
    child.pipe.write_all(b"x").expect("stopping the child");
    let (state, check) = child.answer();
    assert_eq!(state, check);
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);
static SUM: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands over a valid siginfo of a signal sent with sigqueue.
    let value = unsafe { (*info).si_value().sival_ptr } as u64;
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    SUM.fetch_add(value, Ordering::Relaxed);
}

#[test]
fn signals_that_arrive_meanwhile_are_all_delivered_with_their_values() {
    const SENT: u64 = 3000;
    let mut child = Child::fork(|pipe| {
        // SAFETY: installs a handler that only touches atomics, for real-time signals and one plain one.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as extern "C" fn(_, _, _) as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut());
        }
        report(pipe, 0, 0);
        let mut fd = poll_in(pipe);
        // SAFETY: one live pollfd. Interrupted by each signal, as QEMU's main loop is.
        while unsafe { libc::ppoll(&mut fd, 1, std::ptr::null(), std::ptr::null()) } < 0 {
            let errno = std::io::Error::last_os_error().raw_os_error();
            if errno != Some(libc::EINTR) {
                report(pipe, -1, errno.unwrap_or(0).into());
                return;
            }
        }
        report(
            pipe,
            SIGNALS.load(Ordering::Relaxed) as i64,
            SUM.load(Ordering::Relaxed) as i64,
        );
    });
    assert_eq!(child.answer(), (0, 0));
    let pid = child.process.pid();
    let sender = std::thread::spawn(move || {
        for value in 1..=SENT {
            let value = libc::sigval {
                sival_ptr: value as *mut libc::c_void,
            };
            // SAFETY: sends a signal to our child. EAGAIN: its queue is full for the moment.
            while unsafe { libc::sigqueue(pid, libc::SIGRTMIN(), value) } != 0 {
                std::thread::yield_now();
            }
            if (value.sival_ptr as u64).is_multiple_of(10) {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    });
    let mut injections = 0;
    while !sender.is_finished() {
        inject::userfaultfd(&child.process, deadline()).expect("injection");
        injections += 1;
    }
    sender.join().expect("the sender");
    child.pipe.write_all(b"x").expect("stopping the child");
    assert_eq!(
        child.answer(),
        (SENT as i64, (SENT * (SENT + 1) / 2) as i64),
        "{injections} injections"
    );
    assert!(injections > 10, "signals and injections did meet");
}

#[test]
fn a_stopped_process_is_injected_into_and_stays_stopped() {
    let mut child = Child::fork(|pipe| {
        let mut fd = poll_in(pipe);
        // SAFETY: one live pollfd, no timeout, no mask.
        let result = unsafe { libc::ppoll(&mut fd, 1, std::ptr::null(), std::ptr::null()) };
        let (result, errno) = outcome(result.into());
        report(pipe, result, errno);
    });
    child.signal(Signal::SIGSTOP);
    await_that("the child to stop", || child.state() == 'T');
    inject_some(&child);
    await_that("the child to stop again", || child.state() == 'T');
    child.pipe.write_all(b"x").expect("waking the child");
    child.signal(Signal::SIGCONT);
    assert_eq!(child.answer(), (1, 0));
}

#[test]
fn a_process_that_is_gone_or_traced_is_an_error() {
    let child = Child::fork(|pipe| {
        // SAFETY: blocks until killed.
        unsafe { libc::ppoll(&mut poll_in(pipe), 1, std::ptr::null(), std::ptr::null()) };
    });
    nix::sys::ptrace::seize(child.pid(), nix::sys::ptrace::Options::empty()).expect("seizing");
    let refused = inject::userfaultfd(&child.process, deadline());
    assert!(matches!(refused, Err(InjectError::Attach { .. })), "{refused:?}");
    child.signal(Signal::SIGKILL);
    await_that("the child's end", || !child.process.is_alive());
    let gone = inject::userfaultfd(&child.process, deadline());
    assert!(matches!(gone, Err(InjectError::Gone { .. })), "{gone:?}");
}

/// A parent in vfork(2) waits in the kernel, deaf to anything but SIGKILL, until the child execs or ends: here when a
/// byte comes. Then it reports 7.
fn deaf_child() -> Child {
    let child = Child::fork(|pipe| {
        let (mut own, theirs) = (pipe.as_raw_fd(), poll_in(pipe));
        // SAFETY: the vfork child makes system calls only, on its own stack frame's copies, and leaves by _exit.
        #[allow(deprecated, reason = "the very state that is wanted")]
        unsafe {
            if libc::vfork() == 0 {
                let mut fd = theirs;
                libc::ppoll(&mut fd, 1, std::ptr::null(), std::ptr::null());
                libc::_exit(0);
            }
            own = std::hint::black_box(own);
        }
        report(pipe, own.into(), 7);
    });
    await_that("the child to be in vfork", || child.state() == 'D');
    child
}

#[test]
fn a_process_that_does_not_stop_is_given_up_and_not_harmed() {
    let mut child = deaf_child();
    let soon = Instant::now() + Duration::from_millis(100);
    let timeout = inject::userfaultfd(&child.process, soon);
    assert!(matches!(timeout, Err(InjectError::Timeout { .. })), "{timeout:?}");
    child.pipe.write_all(b"x").expect("ending the vfork");
    assert_eq!(child.answer().1, 7);
}

/// Whoever kills an engine, be it with all its process group, does not kill the process that traces for it.
#[test]
fn the_tracer_outlives_an_engine_that_is_killed() {
    let mut child = deaf_child();
    let pid = child.process.pid();
    let traced = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        !status.contains("TracerPid:\t0\n")
    };
    let mut engine = Command::new("bash")
        .args(["-c", r#""$0" inject "$1" 60000 <&0 & wait"#])
        .arg(env!("CARGO_BIN_EXE_virt-ferry-engine"))
        .arg(pid.to_string())
        .stdin(OwnedFd::from(UnixStream::pair().expect("a socket pair").0))
        .process_group(0)
        .spawn()
        .expect("an engine");
    await_that("the tracer", traced);
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let _ = killpg(Pid::from_raw(engine.id().cast_signed()), signal);
    }
    engine.wait().expect("the engine's end");
    // Time enough for its tracer to have gone with it.
    std::thread::sleep(Duration::from_millis(100));
    assert!(traced(), "the tracer went with the engine");
    child.pipe.write_all(b"x").expect("ending the vfork");
    assert_eq!(child.answer().1, 7);
    await_that("the tracer's end", || !child.process.is_alive() || !traced());
}
