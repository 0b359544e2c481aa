//! The userfaultfd is fetched by a process of its own, which outlives the engine:
//!
//! ```text
//!   engine ── starts ──▶ virt-ferry-engine inject PID ── ptrace ──▶ QEMU
//!      ◀──── the descriptor, or why not, on a socket ──┘
//! ```
//!
//! While QEMU's main thread is borrowed (some 100 µs, longer on a busy host), the end of its tracer would leave it with
//! registers that are not its own: QEMU dies of a general protection fault, and the guest with it. An engine may be
//! killed at any moment, by its daemon, by the kernel for its memory, or by an administrator; this process is nobody's
//! to kill: in a session of its own, deaf to signals, and the last that the kernel would take for its memory. It needs
//! next to none.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{sigprocmask, SigSet, SigmaskHow};
use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags};

use super::inject::{self, InjectError};
use super::process::Process;

/// The longest answer: an error's words.
const ANSWER: usize = 1024;

/// As [`inject::userfaultfd`], but the end of this process does not harm the other one, not even by SIGKILL.
///
/// # Errors
/// As [`InjectError`], in the other process's words. Returns at `deadline` at the latest.
pub fn userfaultfd(process: &Process, deadline: Instant) -> Result<OwnedFd, InjectError> {
    let pid = process.pid();
    let system = |what| move |source| InjectError::System { what, pid, source };
    let (ours, theirs) = UnixStream::pair().map_err(system("make a socket for the tracer"))?;
    let patience = deadline.saturating_duration_since(Instant::now());
    // The very program that runs, whatever was installed meanwhile.
    let mut tracer = Command::new("/proc/self/exe")
        .arg0("virt-ferry-engine")
        .args(["inject", &pid.to_string(), &patience.as_millis().to_string()])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .map_err(system("start the tracer"))?;
    // Not waited for here: without an answer in time it still has to put things right. Without a thread to bury it,
    // whoever buries the engine does.
    let _ = thread::Builder::new().spawn(move || tracer.wait());
    let uffd = receive(&ours, deadline).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => InjectError::Timeout { pid },
        _ => system("hear from the tracer")(error),
    })?;
    // The number meant this process then if it does now.
    process.check_alive()?;
    uffd.map_err(|said| InjectError::Said { said })
}

/// The other process: fetches the descriptor and hands it to whoever is at the other end of `engine`, if anybody is.
pub fn serve(pid: i32, patience: Duration, engine: &UnixStream) {
    let deadline = Instant::now() + patience;
    // Whatever cannot be had makes it less safe, not wrong.
    let _ = nix::unistd::setsid();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let fetched = Process::open(pid)
        .map_err(InjectError::from)
        .and_then(|process| inject::userfaultfd(&process, deadline));
    let _ = match fetched {
        Ok(uffd) => send(engine, &uffd),
        Err(error) => {
            let said = error.to_string();
            (&mut &*engine).write_all(&said.as_bytes()[..said.len().min(ANSWER)])
        }
    };
}

fn send(engine: &UnixStream, uffd: &OwnedFd) -> io::Result<()> {
    let fds = [uffd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let byte = [IoSlice::new(b"+")];
    sendmsg::<()>(engine.as_raw_fd(), &byte, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// The descriptor, or in the inner error why there is none.
fn receive(tracer: &UnixStream, deadline: Instant) -> io::Result<Result<OwnedFd, String>> {
    let patience = deadline.saturating_duration_since(Instant::now());
    tracer.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
    let mut answer = [0; ANSWER];
    let mut space = nix::cmsg_space!(RawFd);
    let (length, fd) = {
        let mut slice = [IoSliceMut::new(&mut answer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(tracer.as_raw_fd(), &mut slice, Some(&mut space), flags)?;
        let fd = message.cmsgs()?.find_map(|part| match part {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        (message.bytes, fd)
    };
    match fd {
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Some(fd) => Ok(Ok(unsafe { OwnedFd::from_raw_fd(fd) })),
        None if length == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
        None => Ok(Err(String::from_utf8_lossy(&answer[..length]).into_owned())),
    }
}
