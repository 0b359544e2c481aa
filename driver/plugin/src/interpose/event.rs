//! The event of a completed job: libvirt's figures in it know nothing of the memory. Whoever waits for it is told through
//! us.

use super::border;
use crate::libvirt::{entries, real, Domain, Error};
use crate::live::job;
use std::os::raw::{c_int, c_void};
use virt_sys::{
    virConnectDomainEventGenericCallback, virConnectDomainEventJobCompletedCallback, virConnectPtr,
    virDomainPtr, virFreeCallback, virTypedParameter, virTypedParameterPtr,
    VIR_DOMAIN_EVENT_ID_JOB_COMPLETED,
};

/// Who waits for the event.
struct Waiting {
    callback: virConnectDomainEventJobCompletedCallback,
    opaque: *mut c_void,
    free: virFreeCallback,
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virConnectDomainEventRegisterAny(
    connection: virConnectPtr,
    domain: virDomainPtr,
    event: c_int,
    callback: virConnectDomainEventGenericCallback,
    opaque: *mut c_void,
    free: virFreeCallback,
) -> c_int {
    border(-1, || {
        let missing = || Error::failed("this libvirt has no virConnectDomainEventRegisterAny");
        let real = real::register_event().ok_or_else(missing)?;
        if event != VIR_DOMAIN_EVENT_ID_JOB_COMPLETED as c_int || callback.is_none() {
            // SAFETY: the caller's arguments.
            let id = unsafe { real(connection, domain, event, callback, opaque, free) };
            return (id >= 0).then_some(id).ok_or_else(Error::libvirt);
        }
        // SAFETY: libvirt's callbacks are passed as one generic type; this event's is of this one.
        let callback = unsafe {
            std::mem::transmute::<
                virConnectDomainEventGenericCallback,
                virConnectDomainEventJobCompletedCallback,
            >(callback)
        };
        let waiting = Box::into_raw(Box::new(Waiting {
            callback,
            opaque,
            free,
        }));
        // SAFETY: the caller's arguments, and a callback of this event's type that is given what it expects; libvirt
        // frees it once, unless it refuses.
        unsafe {
            let ours: virConnectDomainEventJobCompletedCallback = Some(completed);
            let ours = std::mem::transmute::<
                virConnectDomainEventJobCompletedCallback,
                virConnectDomainEventGenericCallback,
            >(ours);
            let id = real(connection, domain, event, ours, waiting.cast(), Some(freed));
            if id < 0 {
                let error = Error::libvirt();
                drop(Box::from_raw(waiting));
                return Err(error);
            }
            Ok(id)
        }
    })
}

/// A job is complete.
///
/// # Safety
/// As libvirt tells of events; `opaque` is a `Waiting`.
unsafe extern "C" fn completed(
    connection: virConnectPtr,
    domain: virDomainPtr,
    params: virTypedParameterPtr,
    count: c_int,
    opaque: *mut c_void,
) {
    border((), || {
        // SAFETY: libvirt's arguments live as long as the call, and ours until `freed`.
        unsafe {
            let waiting = &*opaque.cast::<Waiting>();
            let Some(tell) = waiting.callback else {
                return Ok(());
            };
            let known = entries(params, count);
            let (Some(progress), Some(mut copy)) =
                (job::completed(Domain::borrow(domain), known), copy(known))
            else {
                tell(connection, domain, params, count, waiting.opaque);
                return Ok(());
            };
            let mut longer = count;
            progress.complete_stats(&mut copy, &mut longer);
            tell(connection, domain, copy, longer, waiting.opaque);
            // The list only: strings in it are the event's own.
            libc::free(copy.cast());
        }
        Ok(())
    });
}

/// A list from malloc that libvirt can make longer; the event's own is told to others, too.
fn copy(list: &[virTypedParameter]) -> Option<virTypedParameterPtr> {
    // SAFETY: calloc returns NULL or room for as many entries, at least one, which do not overlap the list.
    unsafe {
        let copy: virTypedParameterPtr =
            libc::calloc(list.len().max(1), size_of::<virTypedParameter>()).cast();
        if copy.is_null() {
            return None;
        }
        std::ptr::copy_nonoverlapping(list.as_ptr(), copy, list.len());
        Some(copy)
    }
}

/// Nobody waits any more.
///
/// # Safety
/// `opaque` is a `Waiting` that nobody else will use.
unsafe extern "C" fn freed(opaque: *mut c_void) {
    border((), || {
        // SAFETY: as the caller says.
        unsafe {
            let waiting = Box::from_raw(opaque.cast::<Waiting>());
            if let Some(free) = waiting.free {
                free(waiting.opaque);
            }
        }
        Ok(())
    });
}
