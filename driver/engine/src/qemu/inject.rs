//! One system call inside QEMU: creating a userfaultfd that belongs to its address space.
//!
//! ```text
//!   SEIZE, INTERRUPT ─▶ stopped ─▶ signals blocked ─▶ userfaultfd() ─▶ pidfd_getfd ─▶ close() ─┐
//!                                                                                              │
//!   DETACH ◀─ signal mask and registers as they were ◀─ INTERRUPT, stopped as in the beginning ◀┘
//! ```
//!
//! What makes this safe for a guest in production (Linux 6.12, `kernel/signal.c`, `arch/x86/kernel/signal.c`):
//!
//! - The stop of PTRACE_INTERRUPT is inside of the kernel's signal delivery. An interrupted system call shows there
//!   as `rax = -ERESTART*` with its number in `orig_rax`, and is restarted after that stop. So the registers are put
//!   back in a stop of the same kind. At a system call's exit nobody need restart anything, and QEMU could see an errno
//!   of 512 (that PTRACE_DETACH wakes the thread as if for a signal is nothing to rely on).
//!   The few calls that answer any stop with EINTR (epoll_wait; signal(7)) do so here as with SIGSTOP; QEMU's main loop
//!   waits in ppoll.
//! - All signals are blocked meanwhile, so none is delivered on borrowed registers, and none is lost: they stay queued.
//! - Nothing is written to QEMU's memory; the `syscall` instruction is one of its vDSO's.
//! - The tracer is a thread of its own. Whatever happens to it before the registers are touched, the kernel detaches
//!   when it ends. After that it waits as long as it takes to put things right, past any deadline.
//! - SIGKILL to this whole process in the some 100 µs between would crash QEMU: a process of its own does this
//!   ([`super::injector`]), which outlives an engine that is killed.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::process::{Process, ProcessError};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("system call injection knows the registers of x86-64 only; live migration needs it");

/// Why no userfaultfd could be made inside the process.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process ended.
    #[error("process {pid} is gone")]
    Gone {
        /// Its number.
        pid: i32,
    },
    /// Somebody else traces it, or we may not.
    #[error(
        "cannot attach to process {pid}: {source}; is a debugger or strace attached to the guest's QEMU?"
    )]
    Attach {
        /// Its number.
        pid: i32,
        /// The kernel's answer.
        source: Errno,
    },
    /// It did not stop, or did not get through its system calls, in time: frozen, or stuck in the kernel.
    #[error("process {pid} did not react in time; is the guest's QEMU frozen, or stuck in an I/O?")]
    Timeout {
        /// Its number.
        pid: i32,
    },
    /// It is not a 64-bit process with a vDSO.
    #[error("cannot run a system call inside of process {pid}: {what}")]
    Unsuitable {
        /// Its number.
        pid: i32,
        /// What is missing.
        what: &'static str,
    },
    /// The kernel, or a seccomp filter, refused `userfaultfd(2)` to it.
    #[error("process {pid} may not create a userfaultfd: {source}")]
    Refused {
        /// Its number.
        pid: i32,
        /// The kernel's answer.
        source: Errno,
    },
    /// What the process that does it said ([`super::injector`]).
    #[error("{said}")]
    Said {
        /// One of the others, in words.
        said: String,
    },
    /// A system call of ours failed.
    #[error("cannot {what} of process {pid}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Its number.
        pid: i32,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl From<ProcessError> for InjectError {
    fn from(error: ProcessError) -> Self {
        match error {
            ProcessError::Gone { pid } => InjectError::Gone { pid },
            ProcessError::System { what, pid, source } => InjectError::System { what, pid, source },
        }
    }
}

/// Creates a userfaultfd (close-on-exec, non-blocking, user mode faults only) inside `process` and returns it; the
/// process itself keeps no copy. Its main thread stands still for about 0.3 ms, its other threads (vCPUs) run on.
///
/// # Errors
/// As in [`InjectError`]; the process then runs on as if nothing had happened. Returns at `deadline`, unless its thread is
/// borrowed then: once it has been put right.
pub fn userfaultfd(process: &Process, deadline: Instant) -> Result<OwnedFd, InjectError> {
    thread::scope(|scope| {
        // With this thread's end, the kernel detaches whatever it still traces.
        let tracer = thread::Builder::new().name("inject".into());
        let tracer = tracer
            .spawn_scoped(scope, || run(process, deadline))
            .map_err(|source| InjectError::System {
                what: "start a thread to trace the main thread",
                pid: process.pid(),
                source,
            })?;
        tracer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn run(process: &Process, deadline: Instant) -> Result<OwnedFd, InjectError> {
    let gate = find_syscall_instruction(process)?;
    loop {
        let tracee = Tracee::seize(process, deadline)?;
        let registers = tracee.registers()?;
        if registers.cs != USER_CS_64 {
            tracee.detach();
            return Err(InjectError::Unsuitable {
                pid: process.pid(),
                what: "it is not in 64-bit mode",
            });
        }
        if !tracee.in_restartable_sequence(process, &registers) {
            return tracee.borrow_thread(process, registers, gate);
        }
        // The kernel would not abort the sequence if it did not see it on the way out. A few instructions later.
        tracee.detach();
        if Instant::now() >= deadline {
            return Err(InjectError::Timeout { pid: process.pid() });
        }
    }
}

type Registers = libc::user_regs_struct;

/// `cs` of 64-bit user mode.
const USER_CS_64: u64 = 0x33;
/// The two bytes of `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Address of a `syscall` instruction in the vDSO of the process.
fn find_syscall_instruction(process: &Process) -> Result<u64, InjectError> {
    let pid = process.pid();
    let unsuitable = |what| InjectError::Unsuitable { pid, what };
    let maps = process.maps()?;
    let vdso = maps
        .iter()
        .find(|vma| vma.name == "[vdso]" && vma.is_executable());
    let addresses = &vdso.ok_or(unsuitable("it has no vDSO"))?.addresses;
    // 4 or 8 KiB in fact; bounded in case /proc says otherwise.
    let mut code = vec![0; (addresses.end - addresses.start).min(1 << 20) as usize];
    let mem = File::open(process.proc_path("mem")).map_err(|e| process.error("open the memory", e))?;
    mem.read_exact_at(&mut code, addresses.start)
        .map_err(|e| process.error("read the vDSO", e))?;
    process.check_alive()?;
    let found = code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL);
    Ok(addresses.start + found.ok_or(unsuitable("its vDSO has no syscall instruction"))? as u64)
}

/// `PTRACE_EVENT_STOP` of `linux/ptrace.h`: the stop that PTRACE_INTERRUPT makes, and group stops of seized threads.
const PTRACE_EVENT_STOP: libc::c_int = 128;

/// Why a traced thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// PTRACE_INTERRUPT, or the process is stopped by job control: inside of signal delivery, where registers may be
    /// replaced.
    Interrupt,
    /// Entry or exit of a system call.
    Syscall,
    /// About to receive this signal.
    Signal(libc::c_int),
    /// Another event; none was asked for.
    Other,
}

/// The main thread of a process, seized by the current thread and stopped.
struct Tracee {
    pid: Pid,
    /// A SIGSTOP came while the thread was borrowed. It is the one signal that cannot be blocked but must be kept.
    stop_requested: bool,
}

impl Tracee {
    /// Attaches and waits for the thread to stop.
    fn seize(process: &Process, deadline: Instant) -> Result<Self, InjectError> {
        let pid = Pid::from_raw(process.pid());
        let attach = |source| InjectError::Attach {
            pid: pid.as_raw(),
            source,
        };
        ptrace::seize(pid, ptrace::Options::PTRACE_O_TRACESYSGOOD).map_err(|errno| match errno {
            Errno::ESRCH => InjectError::Gone { pid: pid.as_raw() },
            errno => attach(errno),
        })?;
        // The number named the right process when it was seized if it does now: a seized one cannot be reaped
        // by its parent before us.
        process.check_alive()?;
        ptrace::interrupt(pid).map_err(attach)?;
        let tracee = Tracee {
            pid,
            stop_requested: false,
        };
        loop {
            match tracee.wait(Some(deadline))? {
                Stop::Interrupt => return Ok(tracee),
                // Not borrowed yet: signals take their usual way.
                Stop::Signal(signal) => tracee.proceed(libc::PTRACE_CONT, signal)?,
                Stop::Syscall | Stop::Other => tracee.proceed(libc::PTRACE_CONT, 0)?,
            }
        }
    }

    /// Runs the system calls and puts everything back, whatever came of them.
    fn borrow_thread(
        mut self,
        process: &Process,
        registers: Registers,
        gate: u64,
    ) -> Result<OwnedFd, InjectError> {
        let mask = self.signal_mask()?;
        self.set_signal_mask(u64::MAX)?;
        let result = self.create_and_fetch(process, &registers, gate);
        let restored = self.restore(&registers, mask);
        let uffd = result?;
        restored.map(|()| uffd)
    }

    fn create_and_fetch(
        &mut self,
        process: &Process,
        registers: &Registers,
        gate: u64,
    ) -> Result<OwnedFd, InjectError> {
        let pid = self.pid.as_raw();
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | crate::memory::sys::UFFD_USER_MODE_ONLY;
        let fd = self.call(registers, gate, libc::SYS_userfaultfd, flags as u64)?;
        let fd = fd.map_err(|source| InjectError::Refused { pid, source })?;
        let ours = process.get_fd(fd as i32);
        // A copy that stays open in QEMU would make every later registration fail with EBUSY.
        let closed = self.call(registers, gate, libc::SYS_close, fd)?;
        closed.map_err(|errno| InjectError::System {
            what: "close the userfaultfd",
            pid,
            source: errno.into(),
        })?;
        Ok(ours?)
    }

    /// Runs one system call in the thread. The outer error is ours, the inner one the system call's.
    fn call(
        &mut self,
        registers: &Registers,
        gate: u64,
        number: libc::c_long,
        argument: u64,
    ) -> Result<Result<u64, Errno>, InjectError> {
        // orig_rax = -1: whatever was interrupted is not to be restarted on the way out.
        let borrowed = Registers {
            rip: gate,
            rax: number as u64,
            orig_rax: u64::MAX,
            rdi: argument,
            ..*registers
        };
        self.traced(ptrace::setregs(self.pid, borrowed))?;
        self.run_to(libc::PTRACE_SYSCALL, Stop::Syscall)?; // entry
        self.run_to(libc::PTRACE_SYSCALL, Stop::Syscall)?; // exit
        let after = self.registers()?;
        if after.rip != gate + SYSCALL.len() as u64 || after.orig_rax != number as u64 {
            return Err(self.unsuitable("it did not run the system call it was given"));
        }
        Ok(match after.rax as i64 {
            error @ -4095..=-1 => Err(Errno::from_raw(-error as i32)),
            value => Ok(value as u64),
        })
    }

    /// Lets the thread run until it stops as `expected`.
    fn run_to(&mut self, request: libc::c_uint, expected: Stop) -> Result<(), InjectError> {
        loop {
            self.proceed(request, 0)?;
            match self.wait(None)? {
                stop if stop == expected => return Ok(()),
                Stop::Signal(libc::SIGSTOP) => self.stop_requested = true,
                _ => {}
            }
        }
    }

    /// Brings the thread to a stop inside of signal delivery again, restores it there, and lets it go.
    fn restore(mut self, registers: &Registers, mask: u64) -> Result<(), InjectError> {
        // From a system call's exit, and from any other stop, the next thing the thread meets is the interrupt: it
        // runs nothing of its own before.
        self.traced(ptrace::interrupt(self.pid))?;
        self.run_to(libc::PTRACE_CONT, Stop::Interrupt)?;
        self.traced(ptrace::setregs(self.pid, *registers))?;
        self.set_signal_mask(mask)?;
        self.detach();
        Ok(())
    }

    fn detach(self) {
        // Fails only if the process was killed meanwhile.
        if let Err(errno) = ptrace::detach(self.pid, None) {
            tracing::debug!(pid = self.pid.as_raw(), %errno, "could not detach");
        }
        if self.stop_requested {
            let _ = kill(self.pid, Signal::SIGSTOP);
        }
    }

    /// Waits for the thread's next stop. There is no wait with a time limit for tracees, and a stop is due within
    /// microseconds: looks again and again, at growing intervals.
    fn wait(&self, deadline: Option<Instant>) -> Result<Stop, InjectError> {
        let pid = self.pid.as_raw();
        let mut pause = Duration::from_micros(10);
        loop {
            let mut status = 0;
            // SAFETY: waitpid(2) writes one int, which is ours.
            let waited = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG | libc::__WALL) };
            match Errno::result(waited) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) if libc::WIFSTOPPED(status) => return Ok(Stop::of(status)),
                Ok(_) | Err(_) => return Err(InjectError::Gone { pid }),
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(InjectError::Timeout { pid });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }

    /// Lets the thread run on, delivering `signal` if it is stopped by one and `signal` is not 0.
    fn proceed(&self, request: libc::c_uint, signal: libc::c_int) -> Result<(), InjectError> {
        self.ptrace(request, 0, signal as usize)
    }

    fn registers(&self) -> Result<Registers, InjectError> {
        self.traced(ptrace::getregs(self.pid))
    }

    /// A ptrace request on a stopped tracee fails only when it was killed.
    fn traced<T>(&self, result: nix::Result<T>) -> Result<T, InjectError> {
        result.map_err(|errno| match errno {
            Errno::ESRCH => InjectError::Gone {
                pid: self.pid.as_raw(),
            },
            errno => InjectError::System {
                what: "trace",
                pid: self.pid.as_raw(),
                source: errno.into(),
            },
        })
    }

    fn unsuitable(&self, what: &'static str) -> InjectError {
        InjectError::Unsuitable {
            pid: self.pid.as_raw(),
            what,
        }
    }

    fn signal_mask(&self) -> Result<u64, InjectError> {
        let mut mask = 0_u64;
        self.request(libc::PTRACE_GETSIGMASK, &mut mask)?;
        Ok(mask)
    }

    fn set_signal_mask(&self, mut mask: u64) -> Result<(), InjectError> {
        self.request(libc::PTRACE_SETSIGMASK, &mut mask)
    }

    /// Whether the thread stopped inside of a restartable sequence (rseq(2)), which must not be left and entered
    /// again behind the kernel's back. A system call is never part of one.
    fn in_restartable_sequence(&self, process: &Process, registers: &Registers) -> bool {
        let mut config = RseqConfiguration::default();
        let known = self.request(PTRACE_GET_RSEQ_CONFIGURATION, &mut config).is_ok();
        if !known || config.abi_pointer == 0 || registers.orig_rax != u64::MAX {
            return false;
        }
        let Ok(mem) = File::open(process.proc_path("mem")) else {
            return false;
        };
        let word = |address: u64| {
            let mut bytes = [0; 8];
            mem.read_exact_at(&mut bytes, address)
                .ok()
                .map(|()| u64::from_ne_bytes(bytes))
        };
        // struct rseq: the descriptor's address at 8; struct rseq_cs: start at 8, length at 16.
        let descriptor = word(config.abi_pointer.wrapping_add(8)).filter(|&address| address != 0);
        descriptor
            .and_then(|cs| Some((word(cs.wrapping_add(8))?, word(cs.wrapping_add(16))?)))
            .is_some_and(|(start, length)| registers.rip.wrapping_sub(start) < length)
    }

    /// A request that fills or reads `data`, and takes its size as the address.
    fn request<T>(&self, request: libc::c_uint, data: &mut T) -> Result<(), InjectError> {
        self.ptrace(request, size_of::<T>(), std::ptr::from_mut(data) as usize)
    }

    /// The ptrace(2) requests that nix has no function for, or takes a typed signal for.
    fn ptrace(&self, request: libc::c_uint, address: usize, data: usize) -> Result<(), InjectError> {
        // SAFETY: PTRACE_CONT and PTRACE_SYSCALL take numbers only; the others, all by way of `request`, transfer at
        // most the size given in `address` to or from `data`, an exclusively borrowed plain integer structure of
        // that size. The thread is traced by this one, and stopped.
        let result = unsafe {
            libc::ptrace(
                request,
                self.pid.as_raw(),
                address as *mut libc::c_void,
                data as *mut libc::c_void,
            )
        };
        self.traced(Errno::result(result).map(drop))
    }
}

impl Stop {
    /// From the status waitpid(2) gave for a seized thread that stopped.
    fn of(status: libc::c_int) -> Stop {
        match (libc::WSTOPSIG(status), status >> 16) {
            (_, PTRACE_EVENT_STOP) => Stop::Interrupt,
            (signal, 0) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            (signal, 0) => Stop::Signal(signal),
            _ => Stop::Other,
        }
    }
}

/// `PTRACE_GET_RSEQ_CONFIGURATION` of `linux/ptrace.h`, since Linux 5.13.
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;

#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    abi_pointer: u64,
    abi_size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}
