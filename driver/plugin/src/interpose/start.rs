//! The daemon's start: `main` initializes libvirt before it does anything else, with one thread and before it becomes a
//! daemon (libvirt 9.0 and 11.3, `remote_daemon.c`). Nothing of libvirt's has looked at the guests that run yet.

use super::border;
use crate::libvirt::{real, Error};
use crate::live::sweep::sweep;
use std::os::raw::c_int;
use std::sync::Once;

/// # Safety
/// As libvirt's: none.
#[no_mangle]
pub unsafe extern "C" fn virInitialize() -> c_int {
    static FIRST: Once = Once::new();
    border(-1, || {
        // Called again with every connection.
        FIRST.call_once(sweep);
        let real = real::initialize().ok_or_else(|| Error::failed("this libvirt has no virInitialize"))?;
        // SAFETY: it takes nothing, and may be called again.
        match unsafe { real() } {
            0 => Ok(0),
            _ => Err(Error::libvirt()),
        }
    })
}
