//! The five phases of libvirt's version 3 migration protocol with typed parameters.

use super::border;
use crate::cold;
use crate::libvirt::phase;
use crate::libvirt::{Connection, Cookie, Domain, Params};
use crate::live::{destination, p2p, source, DISABLED};
use ferry_contract::cookie;
use ferry_host as host;
use std::ffi::CStr;
use std::os::raw::{c_char, c_int, c_uint};
use virt_sys::{virConnectPtr, virDomainPtr, virTypedParameterPtr, VIR_MIGRATE_PEER2PEER};

/// A cookie as a caller passes it.
///
/// # Safety
/// `data` is NULL or points to `length` bytes that stay while the slice is used.
unsafe fn cookie_in<'a>(data: *const c_char, length: c_int) -> &'a [u8] {
    match usize::try_from(length) {
        // SAFETY: as the caller says.
        Ok(length) if length > 0 && !data.is_null() => unsafe {
            std::slice::from_raw_parts(data.cast(), length)
        },
        _ => &[],
    }
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainMigrateBegin3Params(
    domain: virDomainPtr,
    params: virTypedParameterPtr,
    nparams: c_int,
    cookieout: *mut *mut c_char,
    cookieoutlen: *mut c_int,
    flags: c_uint,
) -> *mut c_char {
    border(std::ptr::null_mut(), || {
        // SAFETY: the dispatcher's arguments live as long as the call; outputs are its own variables.
        unsafe {
            let (domain, params) = (Domain::borrow(domain), Params::borrow(params, nparams));
            let begun = match cold::asked(flags) {
                true => cold::source::begin(domain, &params, flags)?,
                false => source::begin(domain, &params, flags)?,
            };
            begun.cookie.hand_over(cookieout, cookieoutlen);
            Ok(begun.xml.into_pointer())
        }
    })
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainMigratePrepare3Params(
    dconn: virConnectPtr,
    params: virTypedParameterPtr,
    nparams: c_int,
    cookiein: *const c_char,
    cookieinlen: c_int,
    cookieout: *mut *mut c_char,
    cookieoutlen: *mut c_int,
    uri_out: *mut *mut c_char,
    flags: c_uint,
) -> c_int {
    border(-1, || {
        // SAFETY: the dispatcher's arguments live as long as the call; outputs are its own variables.
        unsafe {
            let connection = Connection::borrow(dconn);
            let cookie = cookie_in(cookiein, cookieinlen);
            if nparams == 0
                && cookie::is_probe(cookie)
                && connection.is_qemu()
                && connection.may_write()
                && takes_part()
            {
                Cookie::copy_of(cookie).hand_over(cookieout, cookieoutlen);
                return Ok(0);
            }
            let params = Params::borrow(params, nparams);
            let prepared = match cold::asked(flags) {
                true => cold::destination::prepare(connection, &params, cookie, flags)?,
                false => destination::prepare(connection, &params, cookie, flags)?,
            };
            prepared.cookie.hand_over(cookieout, cookieoutlen);
            if let (Some(uri), false) = (prepared.uri, uri_out.is_null()) {
                *uri_out = uri.into_pointer();
            }
            Ok(0)
        }
    })
}

/// Whether this host takes part. Where it does not, its log says why: the source does not learn it.
fn takes_part() -> bool {
    let reason = match host::config() {
        Ok(config) if config.enabled => return true,
        Ok(_) => DISABLED.to_owned(),
        Err(reason) => reason,
    };
    tracing::info!("libvirt's own migration to this host: {reason}");
    false
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainMigratePerform3Params(
    domain: virDomainPtr,
    dconnuri: *const c_char,
    params: virTypedParameterPtr,
    nparams: c_int,
    cookiein: *const c_char,
    cookieinlen: c_int,
    cookieout: *mut *mut c_char,
    cookieoutlen: *mut c_int,
    flags: c_uint,
) -> c_int {
    border(-1, || {
        // SAFETY: the dispatcher's arguments live as long as the call; outputs are its own variables.
        unsafe {
            let domain = Domain::borrow(domain);
            let params = Params::borrow(params, nparams);
            let cookie = cookie_in(cookiein, cookieinlen);
            let destination = (!dconnuri.is_null()).then(|| CStr::from_ptr(dconnuri));
            let performed = match (flags & VIR_MIGRATE_PEER2PEER != 0, destination) {
                (true, _) if cold::asked(flags) => {
                    cold::p2p::perform(domain, destination, &params, cookie, flags)?
                }
                (true, _) => p2p::perform(domain, destination, &params, cookie, flags)?,
                (false, None) => source::perform(domain, &params, cookie, flags)?,
                // "Direct" migration, which QEMU's driver refuses.
                (false, Some(_)) => phase::perform(domain, destination, &params, cookie, flags)?,
            };
            performed.hand_over(cookieout, cookieoutlen);
            Ok(0)
        }
    })
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainMigrateFinish3Params(
    dconn: virConnectPtr,
    params: virTypedParameterPtr,
    nparams: c_int,
    cookiein: *const c_char,
    cookieinlen: c_int,
    cookieout: *mut *mut c_char,
    cookieoutlen: *mut c_int,
    flags: c_uint,
    cancelled: c_int,
) -> virDomainPtr {
    border(std::ptr::null_mut(), || {
        // SAFETY: the dispatcher's arguments live as long as the call; outputs are its own variables.
        unsafe {
            let (connection, params) = (Connection::borrow(dconn), Params::borrow(params, nparams));
            let (cookie, cancelled) = (cookie_in(cookiein, cookieinlen), cancelled != 0);
            let (domain, cookie) = match cold::asked(flags) {
                true => cold::destination::finish(connection, &params, cookie, flags, cancelled)?,
                false => destination::finish(connection, &params, cookie, flags, cancelled)?,
            };
            cookie.hand_over(cookieout, cookieoutlen);
            Ok(domain.into_pointer())
        }
    })
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainMigrateConfirm3Params(
    domain: virDomainPtr,
    params: virTypedParameterPtr,
    nparams: c_int,
    cookiein: *const c_char,
    cookieinlen: c_int,
    flags: c_uint,
    cancelled: c_int,
) -> c_int {
    border(-1, || {
        // SAFETY: the dispatcher's arguments live as long as the call.
        unsafe {
            let (domain, params) = (Domain::borrow(domain), Params::borrow(params, nparams));
            let (cookie, cancelled) = (cookie_in(cookiein, cookieinlen), cancelled != 0);
            match cold::asked(flags) {
                true => cold::source::confirm(domain, &params, cookie, flags, cancelled)?,
                false => source::confirm(domain, &params, cookie, flags, cancelled)?,
            }
        }
        Ok(0)
    })
}
