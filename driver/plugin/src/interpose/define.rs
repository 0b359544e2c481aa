//! Definitions of guests: where one leaves the choice of memory to the host, it gets memory that the engine can move.

use super::border;
use crate::cold;
use crate::guest_memory::{self, Start};
use crate::libvirt::{real, Connection, Error};
use ferry_contract::cold::Wish;
use ferry_contract::recover::Word;
use std::ffi::{CStr, CString};
use std::os::raw::{c_char, c_int, c_uint};
use virt_sys::{virConnectPtr, virDomainPtr};

/// The definition to use: the caller's, unless it is to be changed, or is a word for us, which libvirt then refuses.
///
/// # Errors
/// Why what the word asks cannot be done.
///
/// # Safety
/// `xml` is NULL or a string that lives as long as the call.
unsafe fn chosen(
    connection: virConnectPtr,
    xml: *const c_char,
    start: Start,
) -> Result<Option<CString>, Error> {
    // SAFETY: the dispatcher's connection.
    let connection = unsafe { Connection::borrow(connection) };
    if xml.is_null() || !connection.is_qemu() {
        return Ok(None);
    }
    // SAFETY: as the caller says.
    let Ok(text) = unsafe { CStr::from_ptr(xml) }.to_str() else {
        return Ok(None);
    };
    // libvirt refuses those who may not; where fine-grained access control lets them define and not write, a guest keeps the
    // memory that libvirt gives it.
    if !connection.may_write() {
        return Ok(None);
    }
    match Word::read(text) {
        Some(Word::Recover) => cold::recovery::watch(connection),
        Some(Word::Abort(guest)) => cold::recovery::by_hand(connection, guest, Wish::GiveUp)?,
        Some(Word::Own(guest)) => cold::recovery::by_hand(connection, guest, Wish::Own)?,
        None => return Ok(guest_memory::shared(text, start).and_then(|text| CString::new(text).ok())),
    }
    Ok(None)
}

/// One function that takes a definition.
macro_rules! takes_definition {
    ($name:ident($($argument:ident: $kind:ty),*), $start:expr, $real:path) => {
        /// # Safety
        /// As libvirt's dispatcher calls it.
        #[no_mangle]
        pub unsafe extern "C" fn $name(
            connection: virConnectPtr,
            xml: *const c_char,
            $($argument: $kind),*
        ) -> virDomainPtr {
            border(std::ptr::null_mut(), || {
                let missing = || Error::failed(concat!("this libvirt has no ", stringify!($name)));
                let real = $real().ok_or_else(missing)?;
                // SAFETY: the dispatcher's arguments; the other definition lives as long as the call.
                let domain = unsafe {
                    let other = chosen(connection, xml, $start)?;
                    real(connection, other.as_deref().map_or(xml, CStr::as_ptr), $($argument),*)
                };
                (!domain.is_null()).then_some(domain).ok_or_else(Error::libvirt)
            })
        }
    };
}

takes_definition!(virDomainDefineXML(), Start::Later, real::define);
takes_definition!(virDomainDefineXMLFlags(flags: c_uint), Start::Later, real::define_flags);
takes_definition!(virDomainCreateXML(flags: c_uint), Start::Now, real::create);
takes_definition!(
    virDomainCreateXMLWithFiles(nfiles: c_uint, files: *mut c_int, flags: c_uint),
    Start::Now,
    real::create_with_files
);
