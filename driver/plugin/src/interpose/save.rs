//! Saves, dumps and snapshots: what QEMU writes with the same code as a migration. Left on, x-ignore-shared would
//! keep the guest's memory out of it.

use super::border;
use crate::libvirt::{real, Domain, Error};
use crate::live::guard;
use std::os::raw::{c_char, c_int, c_uint};
use virt_sys::{virDomainPtr, virDomainSnapshotPtr, virTypedParameterPtr};

/// What these functions return.
trait Outcome {
    const FAILURE: Self;
    fn failed(&self) -> bool;
}

impl Outcome for c_int {
    const FAILURE: Self = -1;
    fn failed(&self) -> bool {
        *self < 0
    }
}

impl Outcome for virDomainSnapshotPtr {
    const FAILURE: Self = std::ptr::null_mut();
    fn failed(&self) -> bool {
        self.is_null()
    }
}

/// One function that writes memory: first the guard, then libvirt's own.
macro_rules! writes_memory {
    ($name:ident($($argument:ident: $kind:ty),*) -> $returned:ty, $real:path) => {
        /// # Safety
        /// As libvirt's dispatcher calls it.
        #[no_mangle]
        pub unsafe extern "C" fn $name(domain: virDomainPtr, $($argument: $kind),*) -> $returned {
            border(<$returned>::FAILURE, || {
                let missing = || Error::failed(concat!("this libvirt has no ", stringify!($name)));
                let real = $real().ok_or_else(missing)?;
                // SAFETY: the dispatcher's arguments.
                unsafe {
                    guard::with_its_memory(Domain::borrow(domain))?;
                    let written = real(domain, $($argument),*);
                    (!written.failed()).then_some(written).ok_or_else(Error::libvirt)
                }
            })
        }
    };
}

writes_memory!(virDomainSave(to: *const c_char) -> c_int, real::save);
writes_memory!(
    virDomainSaveFlags(to: *const c_char, xml: *const c_char, flags: c_uint) -> c_int,
    real::save_flags
);
writes_memory!(
    virDomainSaveParams(params: virTypedParameterPtr, nparams: c_int, flags: c_uint) -> c_int,
    real::save_params
);
writes_memory!(virDomainManagedSave(flags: c_uint) -> c_int, real::managed_save);
writes_memory!(virDomainCoreDump(to: *const c_char, flags: c_uint) -> c_int, real::core_dump);
writes_memory!(
    virDomainCoreDumpWithFormat(to: *const c_char, format: c_uint, flags: c_uint) -> c_int,
    real::core_dump_with_format
);
writes_memory!(
    virDomainSnapshotCreateXML(xml: *const c_char, flags: c_uint) -> virDomainSnapshotPtr,
    real::snapshot_create
);
