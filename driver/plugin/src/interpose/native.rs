//! Conversion of a definition into another format: one of these is no format, but how `virt-ferry move-storage` asks for
//! something and gets an answer.

use super::border;
use crate::cold;
use crate::libvirt::phase::MallocString;
use crate::libvirt::{real, Connection, Error};
use ferry_contract::cold::storage::FORMAT;
use std::ffi::CStr;
use std::os::raw::{c_char, c_uint};
use virt_sys::virConnectPtr;

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virConnectDomainXMLToNative(
    connection: virConnectPtr,
    format: *const c_char,
    xml: *const c_char,
    flags: c_uint,
) -> *mut c_char {
    border(std::ptr::null_mut(), || {
        // SAFETY: the dispatcher's connection and strings, which live as long as the call.
        unsafe {
            if let Some(order) = order(Connection::borrow(connection), format, xml) {
                let report = cold::storage::answer(Connection::borrow(connection), order)?;
                return Ok(MallocString::copy_of(&report).into_pointer());
            }
            let missing = || Error::failed("this libvirt has no virConnectDomainXMLToNative");
            let native = real::xml_to_native().ok_or_else(missing)?(connection, format, xml, flags);
            (!native.is_null()).then_some(native).ok_or_else(Error::libvirt)
        }
    })
}

/// What we are asked to do; `None` where libvirt is to convert something, or to refuse it.
///
/// # Safety
/// `format` and `xml` are NULL or strings that live as long as the result.
unsafe fn order<'a>(connection: Connection, format: *const c_char, xml: *const c_char) -> Option<&'a str> {
    if format.is_null() || xml.is_null() {
        return None;
    }
    // SAFETY: as the caller says.
    let (format, xml) = unsafe { (CStr::from_ptr(format), CStr::from_ptr(xml)) };
    let ours = format.to_bytes() == FORMAT.as_bytes() && connection.is_qemu() && connection.may_write();
    ours.then(|| xml.to_str().ok()).flatten()
}
