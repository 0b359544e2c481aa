//! kill(2), which the daemon calls from signal handlers and in forked children, too: no lock, no memory, no log.

use crate::libvirt::ending;
use std::os::raw::c_int;
use std::panic::catch_unwind;

/// # Safety
/// As libc's: none.
#[no_mangle]
pub unsafe extern "C" fn kill(pid: libc::pid_t, signal: c_int) -> c_int {
    match catch_unwind(|| ending::kill(pid, signal)) {
        Ok(Ok(())) => 0,
        Ok(Err(errno)) => {
            errno.set();
            -1
        }
        // It was sent, or could not be: libvirt looks itself.
        Err(_) => 0,
    }
}
