//! The end of a guest that has left: Confirm has QEMU end, and whatever belongs to it (swtpm), and libvirt then sleeps for
//! 200 ms before it looks whether that is gone (libvirt 9.0 and 11.3, `virProcessKillPainfullyDelay`). QEMU is gone after a
//! tenth of that, so such a signal returns when its process has ended, and says what libvirt would have found out later.
//!
//! Every other signal is as it was. The daemon sends some from signal handlers and in forked children, so nothing here
//! takes a lock or allocates.

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use std::cell::Cell;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::raw::c_int;

/// As long as libvirt would have slept, milliseconds; it holds the guest's lock meanwhile, as it does in its sleep.
const PATIENCE: u8 = 200;

thread_local! {
    /// Whether this thread is in a Confirm that ends a guest.
    static ENDING: Cell<bool> = const { Cell::new(false) };
}

/// Whoever `confirm` tells to end is waited for.
pub fn waited_for<T>(confirm: impl FnOnce() -> T) -> T {
    struct Over;
    impl Drop for Over {
        fn drop(&mut self) {
            ENDING.set(false);
        }
    }
    let _over = Over;
    ENDING.set(true);
    confirm()
}

/// kill(2), but that [`libc::ESRCH`] also says of who was told to end by a Confirm that it has.
pub fn kill(pid: libc::pid_t, signal: c_int) -> Result<(), Errno> {
    let process = match signal == libc::SIGTERM && pid > 1 && ENDING.get() {
        true => open(pid),
        false => None,
    };
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_kill, pid, signal) })?;
    match process.is_some_and(|process| has_ended(&process)) {
        true => Err(Errno::ESRCH),
        false => Ok(()),
    }
}

/// Opened before the signal, it is not another process that has got the number since.
fn open(pid: libc::pid_t) -> Option<OwnedFd> {
    // SAFETY: numbers only. The kernel closes it in programs that are started.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) as RawFd };
    // SAFETY: a descriptor that nobody else has.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn has_ended(process: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut polled, PollTimeout::from(PATIENCE)), Ok(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    /// A shell that has come to its `echo`.
    fn start(script: &str) -> (Child, libc::pid_t) {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let pid = child.id() as libc::pid_t;
        (child, pid)
    }

    #[test]
    fn who_is_told_to_end_by_confirm_is_said_to_be_gone() {
        let (mut child, pid) = start("echo; exec sleep 60");
        assert_eq!(waited_for(|| kill(pid, 0)), Ok(()));
        assert_eq!(waited_for(|| kill(pid, libc::SIGTERM)), Err(Errno::ESRCH));
        assert!(child.try_wait().unwrap().is_some(), "it has not ended");
        // Reaped, it is nobody.
        assert_eq!(waited_for(|| kill(pid, libc::SIGTERM)), Err(Errno::ESRCH));
    }

    #[test]
    fn who_does_not_end_is_left_to_libvirt() {
        let (mut deaf, pid) = start("trap '' TERM; echo; exec sleep 60");
        assert_eq!(waited_for(|| kill(pid, libc::SIGTERM)), Ok(()));
        assert!(deaf.try_wait().unwrap().is_none());
        let (mut child, pid) = start("echo; exec sleep 60");
        assert_eq!(kill(pid, libc::SIGTERM), Ok(()), "not by a Confirm");
        for child in [&mut deaf, &mut child] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
