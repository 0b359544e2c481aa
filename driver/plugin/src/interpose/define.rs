//! Definitions of guests: where one leaves the choice of memory to the host, it gets memory that the engine can move.

use super::border;
use crate::cold;
use crate::guest_memory::{self, Start};
use crate::libvirt::{real, Connection, Error};
use std::ffi::{CStr, CString};
use std::os::raw::{c_char, c_int, c_uint};
use virt_sys::{virConnectPtr, virDomainPtr};

/// The definition to use: the caller's, unless it is to be changed.
///
/// # Safety
/// `xml` is NULL or a string that lives as long as the call.
unsafe fn chosen(connection: virConnectPtr, xml: *const c_char, start: Start) -> Option<CString> {
    // SAFETY: the dispatcher's connection.
    if xml.is_null() || !unsafe { Connection::borrow(connection) }.is_qemu() {
        return None;
    }
    // SAFETY: as the caller says.
    let text = unsafe { CStr::from_ptr(xml) }.to_str().ok()?;
    if text == ferry_contract::cold::RECOVER {
        // SAFETY: the dispatcher's connection.
        cold::recovery::watch(unsafe { Connection::borrow(connection) });
        return None;
    }
    CString::new(guest_memory::shared(text, start)?).ok()
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
                    let other = chosen(connection, xml, $start);
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
