//! A client connects: the first one after the daemon's start wakes what attends to interrupted moves, whatever it wants.

use super::border;
use crate::libvirt::{real, Error};
use std::os::raw::{c_char, c_uint};
use virt_sys::{virConnectAuthPtr, virConnectPtr};

/// # Safety
/// As libvirt's dispatcher calls it, and as we do.
#[no_mangle]
pub unsafe extern "C" fn virConnectOpenAuth(
    name: *const c_char,
    auth: virConnectAuthPtr,
    flags: c_uint,
) -> virConnectPtr {
    border(std::ptr::null_mut(), || {
        let missing = || Error::failed("this libvirt has no virConnectOpenAuth");
        let real = real::open().ok_or_else(missing)?;
        // SAFETY: the caller's arguments.
        let connection = unsafe { real(name, auth, flags) };
        (!connection.is_null())
            .then_some(connection)
            .ok_or_else(Error::libvirt)
    })
}
