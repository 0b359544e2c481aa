//! Saves, dumps, snapshots, migrations by older clients and whatever is asked of QEMU directly: what may have QEMU write
//! the guest's memory. Left on, x-ignore-shared would keep it out.
//!
//! The daemon's own saves come this way too, when a host shuts down (libvirt 11.3, `virDomainDriverAutoShutdown`).

use super::border;
use crate::libvirt::{real, Domain, Error};
use crate::live::guard;
use std::os::raw::{c_char, c_int, c_uint, c_ulong};
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
                    let _turn = guard::with_its_memory(Domain::borrow(domain))?;
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
writes_memory!(
    virDomainMigratePerform(
        cookie: *const c_char,
        cookielen: c_int,
        uri: *const c_char,
        flags: c_ulong,
        dname: *const c_char,
        bandwidth: c_ulong
    ) -> c_int,
    real::perform_2
);
writes_memory!(
    virDomainMigratePerform3(
        xmlin: *const c_char,
        cookiein: *const c_char,
        cookieinlen: c_int,
        cookieout: *mut *mut c_char,
        cookieoutlen: *mut c_int,
        dconnuri: *const c_char,
        uri: *const c_char,
        flags: c_ulong,
        dname: *const c_char,
        bandwidth: c_ulong
    ) -> c_int,
    real::perform_3
);
writes_memory!(
    virDomainQemuMonitorCommand(cmd: *const c_char, result: *mut *mut c_char, flags: c_uint) -> c_int,
    real::monitor_command
);
writes_memory!(
    virDomainQemuMonitorCommandWithFiles(
        cmd: *const c_char,
        ninfiles: c_uint,
        infiles: *mut c_int,
        noutfiles: *mut c_uint,
        outfiles: *mut *mut c_int,
        result: *mut *mut c_char,
        flags: c_uint
    ) -> c_int,
    real::monitor_command_with_files
);
