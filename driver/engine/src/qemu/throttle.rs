//! Slowing vCPUs down from outside QEMU, for a guest that writes faster than its link (`virsh migrate --auto-converge`).
//!
//! QEMU's own throttle works within its own migration, which has not begun while we copy. So the vCPU threads are held
//! for a part of each period:
//!
//! ```text
//!   ┌── run, untraced ──┐┌─ SEIZE, INTERRUPT ─ held ─ DETACH ─┐┌── run ──┐ …
//! ```
//!
//! - Between two holds nothing is traced: signals to the vCPUs, by which QEMU kicks them, take their usual way. A signal
//!   that comes while a thread is held waits in the kernel until it goes on; one that it was about to receive as it was
//!   asked to stop is given to it before it is held. None is kept here: it would end with us, and a vCPU whose kick is
//!   lost is not kicked again.
//! - A thread may be held while it owns QEMU's big lock; its main loop, monitor and disks then wait for [`HOLD`] at most.
//! - The tracer is a thread of its own. However it ends, the engine's end by SIGKILL included, the kernel detaches what
//!   it held and lets it run (Linux 6.12, `exit_ptrace`): no guest stays slow.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::mpsc::{sync_channel, Receiver, RecvTimeoutError, SyncSender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Process;

/// How long the vCPUs run between two holds where that is enough: QEMU's slice (QEMU 10.0, `CPU_THROTTLE_TIMESLICE_NS`).
const RUN: Duration = Duration::from_millis(10);
/// The longest hold; to slow down further, the vCPUs run for less than [`RUN`].
const HOLD: Duration = Duration::from_millis(40);
/// For a thread to stop: one that sleeps in the kernel uninterruptibly is not waited for any longer.
const STOPPING: Duration = Duration::from_millis(500);
/// Between two looks whether it has.
const LOOK: Duration = Duration::from_micros(100);

/// vCPUs that are slowed down; they run freely again when this is dropped.
pub struct Throttle {
    percent: Arc<AtomicU8>,
    /// Dropped, it ends the thread.
    end: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// For these threads of the process; those that are not its own are left alone.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn new(process: &Process, threads: Vec<i32>) -> std::io::Result<Self> {
        let percent = Arc::new(AtomicU8::new(0));
        let (end, ended) = sync_channel(0);
        let (pid, set) = (process.pid(), Arc::clone(&percent));
        let thread = std::thread::Builder::new()
            .name("throttle".into())
            .spawn(move || hold_and_let_go(pid, &threads, &set, &ended))?;
        Ok(Self {
            percent,
            end: Some(end),
            thread: Some(thread),
        })
    }

    /// The vCPUs stand still for this part of their time, in percent, at most 99.
    pub fn set(&self, percent: u8) {
        self.percent.store(percent.min(99), Relaxed);
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic; had it, the kernel has let its threads go.
            let _ = thread.join();
        }
    }
}

/// How long the vCPUs run and are held in one period.
fn period(percent: u8) -> (Duration, Duration) {
    let share = f64::from(percent) / 100.0;
    let held = RUN.mul_f64(share / (1.0 - share));
    if held <= HOLD {
        return (RUN, held);
    }
    (HOLD.mul_f64((1.0 - share) / share), HOLD)
}

fn hold_and_let_go(pid: i32, threads: &[i32], percent: &AtomicU8, ended: &Receiver<()>) {
    let over = |wait| !matches!(ended.recv_timeout(wait), Err(RecvTimeoutError::Timeout));
    loop {
        let (run, hold) = period(percent.load(Relaxed));
        if over(run) {
            return;
        }
        if hold.is_zero() {
            continue;
        }
        let seized: Vec<i32> = threads
            .iter()
            .copied()
            .filter(|thread| seize(pid, *thread))
            .collect();
        let deadline = Instant::now() + STOPPING;
        let mut held = Vec::new();
        for thread in &seized {
            match stopped(*thread, deadline) {
                Stop::Held => held.push(*thread),
                Stop::Gone => {}
                Stop::Not => {
                    tracing::warn!(
                        thread,
                        "a vCPU does not stop: the vCPUs are no longer slowed down"
                    );
                    return;
                }
            }
        }
        let end = over(hold);
        held.into_iter().for_each(detach);
        if end {
            return;
        }
    }
}

/// Where a seized thread is.
enum Stop {
    /// It stands still, with no signal to be delivered.
    Held,
    /// It has ended.
    Gone,
    /// It has not stopped.
    Not,
}

/// Attaches to a thread of the process and asks it to stop. One that is not the process's, or that somebody else traces,
/// is left alone.
fn seize(pid: i32, thread: i32) -> bool {
    const NULL: *mut libc::c_void = std::ptr::null_mut();
    // SAFETY: signal 0 asks whether the thread is one of the process; ptrace takes no pointers here.
    unsafe {
        libc::syscall(libc::SYS_tgkill, pid, thread, 0) == 0
            && libc::ptrace(libc::PTRACE_SEIZE, thread, NULL, NULL) == 0
            && libc::ptrace(libc::PTRACE_INTERRUPT, thread, NULL, NULL) == 0
    }
}

fn stopped(thread: i32, deadline: Instant) -> Stop {
    loop {
        let mut status = 0;
        // SAFETY: a status to write; of this thread's tracees only the one asked for.
        match unsafe { libc::waitpid(thread, &mut status, libc::__WALL | libc::WNOHANG) } {
            0 if Instant::now() < deadline => std::thread::sleep(LOOK),
            0 => return Stop::Not,
            _ if !libc::WIFSTOPPED(status) => return Stop::Gone,
            // The stop that was asked for, or that of all the process (SIGSTOP).
            _ if status >> 16 == libc::PTRACE_EVENT_STOP => return Stop::Held,
            // About to receive a signal: it does, and then stops as asked. One that is killed is seen the next time.
            _ => {
                go_on(libc::PTRACE_CONT, thread, libc::WSTOPSIG(status));
            }
        }
    }
}

fn detach(thread: i32) {
    // It fails for a thread that was killed.
    go_on(libc::PTRACE_DETACH, thread, 0);
}

/// Lets a stopped thread go on, with this signal, 0 for none.
fn go_on(request: libc::c_uint, thread: i32, signal: i32) {
    // SAFETY: the data of these requests is a signal's number in a pointer's place.
    unsafe {
        libc::ptrace(
            request,
            thread,
            std::ptr::null_mut::<libc::c_void>(),
            signal as usize as *mut libc::c_void,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::process::{Child, Command, Stdio};

    /// A process that is always busy, and says when it gets SIGUSR1.
    struct Busy(Child);

    impl Drop for Busy {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    impl Busy {
        fn start() -> Self {
            let script = "trap 'echo USR1' USR1; echo; while :; do :; done";
            let mut child = Command::new("bash")
                .args(["-c", script])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // Its trap is set once it has said something.
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            Self(child)
        }

        fn pid(&self) -> i32 {
            self.0.id() as i32
        }

        /// Clock ticks of processor time it has had.
        fn ticks(&self) -> u64 {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        }

        /// The next line it says.
        fn heard(&mut self) -> String {
            let mut line = String::new();
            let said = self.0.stdout.as_mut().unwrap();
            while !line.ends_with('\n') {
                let mut polled = [PollFd::new(said.as_fd(), PollFlags::POLLIN)];
                let patience = PollTimeout::from(60_000u16);
                assert_eq!(poll(&mut polled, patience), Ok(1), "it says nothing");
                let mut byte = [0];
                said.read_exact(&mut byte).unwrap();
                line.push(char::from(byte[0]));
            }
            line
        }

        fn tracer(&self) -> String {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
            let line = status
                .lines()
                .find(|line| line.starts_with("TracerPid:"))
                .unwrap();
            line["TracerPid:".len()..].trim().to_owned()
        }

        /// The share of processor time it gets within a second; ticks are 10 ms for all programs (proc_pid_stat(5)).
        fn share(&self) -> f64 {
            let (before, began) = (self.ticks(), Instant::now());
            std::thread::sleep(Duration::from_secs(1));
            (self.ticks() - before) as f64 * 0.01 / began.elapsed().as_secs_f64()
        }
    }

    #[test]
    fn periods_are_qemus_until_holds_would_be_long() {
        assert_eq!(period(0), (RUN, Duration::ZERO));
        assert_eq!(period(50), (RUN, RUN));
        assert_eq!(period(80).1.as_millis(), 40);
        for percent in 1..=99 {
            let (run, held) = period(percent);
            let share = held.as_secs_f64() / (run + held).as_secs_f64();
            assert!(
                (share * 100.0 - f64::from(percent)).abs() < 0.1,
                "{percent}: {run:?} {held:?}"
            );
            assert!(held <= HOLD && run <= RUN);
        }
    }

    #[test]
    fn a_held_process_is_slow_then_free_and_gets_its_signals() {
        let mut child = Busy::start();
        let process = Process::open(child.pid()).unwrap();
        // A thread that is not the process's: this one.
        let throttle = Throttle::new(&process, vec![child.pid(), std::process::id() as i32]).unwrap();
        throttle.set(95);
        // SAFETY: a signal to a child of ours.
        (0..20).for_each(|_| unsafe {
            libc::kill(child.pid(), libc::SIGUSR1);
        });
        // 5 %, and more where who holds it has to wait for a processor himself.
        let slow = child.share();
        assert!(slow < 0.4, "{slow}");
        drop(throttle);
        assert_eq!(child.heard(), "USR1\n");
        assert_eq!(child.tracer(), "0");
        // On a busy machine less than 100 %, but at some moment more than before.
        let deadline = Instant::now() + Duration::from_secs(60);
        while child.share() < slow * 2.0 {
            assert!(Instant::now() < deadline, "it is slow for ever");
        }
    }

    /// The end of the tracing thread is what the end of the engine is: the kernel detaches what it held.
    #[test]
    fn a_signal_on_its_way_outlives_who_holds() {
        let mut child = Busy::start();
        let thread = child.pid();
        let hold = move || {
            const NULL: *mut libc::c_void = std::ptr::null_mut();
            // SAFETY: ptrace takes no pointers here, and the signal is to a child of ours.
            unsafe {
                assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, thread, NULL, NULL), 0);
                libc::kill(thread, libc::SIGUSR1);
            }
            // It is about to receive the signal, and is asked to stop only then.
            let stat = || std::fs::read_to_string(format!("/proc/{thread}/stat")).unwrap();
            while !stat().contains(") t ") {
                std::thread::sleep(LOOK);
            }
            // SAFETY: as above.
            unsafe { assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, thread, NULL, NULL), 0) };
            let deadline = Instant::now() + Duration::from_secs(60);
            assert!(matches!(stopped(thread, deadline), Stop::Held));
        };
        std::thread::spawn(hold).join().unwrap();
        assert_eq!(child.heard(), "USR1\n");
        assert_eq!(child.tracer(), "0");
    }

    #[test]
    fn a_process_that_ends_meanwhile_is_let_go() {
        let mut child = Busy::start();
        let process = Process::open(child.pid()).unwrap();
        let throttle = Throttle::new(&process, vec![child.pid()]).unwrap();
        throttle.set(90);
        std::thread::sleep(Duration::from_millis(100));
        child.0.kill().unwrap();
        // Unlike QEMU it is a child of ours, so that whoever holds it may be the one who hears of its end.
        if let Ok(status) = child.0.wait() {
            assert!(!status.success());
        }
        drop(throttle);
        // Its number may be another's.
        std::mem::forget(child);
    }
}
