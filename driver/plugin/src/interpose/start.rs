//! The daemon's start: `main` initializes libvirt before it does anything else, with one thread and before it becomes a
//! daemon (libvirt 9.0 and 11.3, `remote_daemon.c`). Nothing of libvirt's has looked at the guests that run yet.

use super::guarded;
use crate::libvirt::{real, Error};
use crate::live::sweep::sweep;
use std::os::raw::c_int;
use std::panic::catch_unwind;
use std::sync::Once;

/// # Safety
/// As libvirt's: none.
#[no_mangle]
pub unsafe extern "C" fn virInitialize() -> c_int {
    static FIRST: Once = Once::new();
    guarded(-1, || {
        // First: without it, libvirt's errors have no place of a thread's own.
        let real = real::initialize().ok_or_else(|| Error::failed("this libvirt has no virInitialize"))?;
        // SAFETY: it takes nothing, and may be called again.
        if unsafe { real() } != 0 {
            return Err(Error::libvirt());
        }
        // Called again with every connection. A daemon that cannot sweep must start all the same.
        FIRST.call_once(|| drop(catch_unwind(sweep)));
        Ok(0)
    })
}
