//! libvirt's own five phases as Rust functions: what they return is owned, what they fail with is in the thread.

use super::{real, Connection, Cookie, Domain, Error, OwnedDomain, Params};
use std::ffi::CStr;
use std::os::raw::{c_char, c_int};

/// The domain XML and the cookie of a Begin.
pub struct Begun {
    /// The XML for the destination; from malloc, freed by who receives it.
    pub xml: MallocString,
    /// For Prepare.
    pub cookie: Cookie,
}

/// The answer of a Prepare.
pub struct Prepared {
    /// For Perform.
    pub cookie: Cookie,
    /// Where the source shall send; `None` where the client's own URI stands.
    pub uri: Option<MallocString>,
}

/// A C string from malloc.
pub struct MallocString(*mut c_char);

impl MallocString {
    /// A copy of this text.
    pub fn copy_of(text: &str) -> Self {
        let text = super::domain::c_string(text);
        // SAFETY: strdup copies a valid string; NULL (out of memory) is kept as NULL.
        Self(unsafe { libc::strdup(text.as_ptr()) })
    }

    /// The text.
    pub fn text(&self) -> &CStr {
        if self.0.is_null() {
            return c"";
        }
        // SAFETY: a string that lives as long as self.
        unsafe { CStr::from_ptr(self.0) }
    }

    /// Gives it to a caller, who frees it.
    pub fn into_pointer(self) -> *mut c_char {
        std::mem::ManuallyDrop::new(self).0
    }
}

impl Drop for MallocString {
    fn drop(&mut self) {
        // SAFETY: from malloc, ours.
        unsafe { libc::free(self.0.cast()) }
    }
}

fn missing(name: &str) -> Error {
    Error::failed(format!(
        "this libvirt has no {name}; remove the plug-in or install a matching release"
    ))
}

fn cookie_in(cookie: &[u8]) -> (*const c_char, c_int) {
    if cookie.is_empty() {
        return (std::ptr::null(), 0);
    }
    (cookie.as_ptr().cast(), cookie.len() as c_int)
}

/// Source, pre-migration: checks the guest, takes the job, makes XML and cookie.
pub fn begin(domain: Domain, params: &Params, flags: u32) -> Result<Begun, Error> {
    let real = real::begin().ok_or_else(|| missing("virDomainMigrateBegin3Params"))?;
    let (mut data, mut length) = (std::ptr::null_mut(), 0);
    // SAFETY: the prototype's arguments; the two outputs are ours.
    let xml = unsafe {
        real(
            domain.pointer(),
            params.pointer(),
            params.count(),
            &mut data,
            &mut length,
            flags,
        )
    };
    // SAFETY: libvirt gives cookies from malloc away.
    let cookie = unsafe { Cookie::take(data, length) };
    if xml.is_null() {
        return Err(Error::libvirt());
    }
    Ok(Begun {
        xml: MallocString(xml),
        cookie,
    })
}

/// Destination, reservation: starts the incoming QEMU.
pub fn prepare(
    connection: Connection,
    params: &Params,
    cookie: &[u8],
    flags: u32,
) -> Result<Prepared, Error> {
    let real = real::prepare().ok_or_else(|| missing("virDomainMigratePrepare3Params"))?;
    let (mut data, mut length, mut uri) = (std::ptr::null_mut(), 0, std::ptr::null_mut());
    let (bytes, count) = cookie_in(cookie);
    // SAFETY: the prototype's arguments; the three outputs are ours.
    let result = unsafe {
        real(
            connection.pointer(),
            params.pointer(),
            params.count(),
            bytes,
            count,
            &mut data,
            &mut length,
            &mut uri,
            flags,
        )
    };
    // SAFETY: libvirt gives cookies and strings from malloc away.
    let cookie = unsafe { Cookie::take(data, length) };
    let uri = (!uri.is_null()).then_some(MallocString(uri));
    if result < 0 {
        return Err(Error::libvirt());
    }
    Ok(Prepared { cookie, uri })
}

/// Source: QEMU's own migration, to the URI among the parameters.
pub fn perform(
    domain: Domain,
    destination: Option<&CStr>,
    params: &Params,
    cookie: &[u8],
    flags: u32,
) -> Result<Cookie, Error> {
    let real = real::perform().ok_or_else(|| missing("virDomainMigratePerform3Params"))?;
    let (mut data, mut length) = (std::ptr::null_mut(), 0);
    let (bytes, count) = cookie_in(cookie);
    // SAFETY: the prototype's arguments; the two outputs are ours.
    let result = unsafe {
        real(
            domain.pointer(),
            destination.map_or(std::ptr::null(), CStr::as_ptr),
            params.pointer(),
            params.count(),
            bytes,
            count,
            &mut data,
            &mut length,
            flags,
        )
    };
    // SAFETY: libvirt gives cookies from malloc away.
    let cookie = unsafe { Cookie::take(data, length) };
    if result < 0 {
        return Err(Error::libvirt());
    }
    Ok(cookie)
}

/// Destination, activation: resumes the guest, or ends the incoming QEMU where `cancelled`.
pub fn finish(
    connection: Connection,
    params: &Params,
    cookie: &[u8],
    flags: u32,
    cancelled: bool,
) -> Result<(OwnedDomain, Cookie), Error> {
    let real = real::finish().ok_or_else(|| missing("virDomainMigrateFinish3Params"))?;
    let (mut data, mut length) = (std::ptr::null_mut(), 0);
    let (bytes, count) = cookie_in(cookie);
    // SAFETY: the prototype's arguments; the two outputs are ours.
    let domain = unsafe {
        real(
            connection.pointer(),
            params.pointer(),
            params.count(),
            bytes,
            count,
            &mut data,
            &mut length,
            flags,
            c_int::from(cancelled),
        )
    };
    // SAFETY: libvirt gives cookies from malloc away.
    let cookie = unsafe { Cookie::take(data, length) };
    Ok((OwnedDomain::from(domain)?, cookie))
}

/// Source: ends the guest here, or resumes it where `cancelled`; gives the job back.
pub fn confirm(
    domain: Domain,
    params: &Params,
    cookie: &[u8],
    flags: u32,
    cancelled: bool,
) -> Result<(), Error> {
    let real = real::confirm().ok_or_else(|| missing("virDomainMigrateConfirm3Params"))?;
    let (bytes, count) = cookie_in(cookie);
    // SAFETY: the prototype's arguments.
    let result = unsafe {
        real(
            domain.pointer(),
            params.pointer(),
            params.count(),
            bytes,
            count,
            flags,
            c_int::from(cancelled),
        )
    };
    if result < 0 {
        return Err(Error::libvirt());
    }
    Ok(())
}
