//! The functions we stand in for, found behind us by plain name: their version tag changes with every libvirt
//! release (LIBVIRT_PRIVATE_11.3.0), their prototypes have not (libvirt 9.0 and 11.3).

use std::ffi::CStr;
use std::os::raw::{c_char, c_int, c_uint, c_ulong, c_void};
use std::sync::OnceLock;
use virt_sys::{
    virConnectAuthPtr, virConnectDomainEventGenericCallback, virConnectPtr, virDomainJobInfoPtr,
    virDomainPtr, virDomainSnapshotPtr, virErrorPtr, virFreeCallback, virTypedParameterPtr,
};

/// The next definition of a symbol after ours.
fn next(name: &CStr) -> *mut c_void {
    // SAFETY: a NUL-terminated name; RTLD_NEXT looks behind this object in the search order.
    unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) }
}

macro_rules! real {
    ($(#[doc = $doc:literal] $function:ident = $symbol:literal: $kind:ty;)*) => {$(
        #[doc = $doc]
        pub fn $function() -> Option<$kind> {
            static FOUND: OnceLock<Option<$kind>> = OnceLock::new();
            *FOUND.get_or_init(|| {
                let found = next($symbol);
                // SAFETY: the symbol's prototype is this type; a NULL pointer is None.
                unsafe { std::mem::transmute::<*mut c_void, Option<$kind>>(found) }
            })
        }
    )*};
}

type Bytes = *const c_char;
type CookieOut = *mut *mut c_char;
type Length = *mut c_int;

/// `virDomainMigrateBegin3Params`.
pub type Begin =
    unsafe extern "C" fn(virDomainPtr, virTypedParameterPtr, c_int, CookieOut, Length, c_uint) -> *mut c_char;
/// `virDomainMigratePrepare3Params`.
pub type Prepare = unsafe extern "C" fn(
    virConnectPtr,
    virTypedParameterPtr,
    c_int,
    Bytes,
    c_int,
    CookieOut,
    Length,
    *mut *mut c_char,
    c_uint,
) -> c_int;
/// `virDomainMigratePerform3Params`.
pub type Perform = unsafe extern "C" fn(
    virDomainPtr,
    *const c_char,
    virTypedParameterPtr,
    c_int,
    Bytes,
    c_int,
    CookieOut,
    Length,
    c_uint,
) -> c_int;
/// `virDomainMigrateFinish3Params`.
pub type Finish = unsafe extern "C" fn(
    virConnectPtr,
    virTypedParameterPtr,
    c_int,
    Bytes,
    c_int,
    CookieOut,
    Length,
    c_uint,
    c_int,
) -> virDomainPtr;
/// `virDomainMigrateConfirm3Params`.
pub type Confirm =
    unsafe extern "C" fn(virDomainPtr, virTypedParameterPtr, c_int, Bytes, c_int, c_uint, c_int) -> c_int;
/// `virDomainGetJobInfo`.
pub type GetJobInfo = unsafe extern "C" fn(virDomainPtr, virDomainJobInfoPtr) -> c_int;
/// `virDomainGetJobStats`.
pub type GetJobStats =
    unsafe extern "C" fn(virDomainPtr, *mut c_int, *mut virTypedParameterPtr, *mut c_int, c_uint) -> c_int;
/// `virDomainAbortJob`.
pub type AbortJob = unsafe extern "C" fn(virDomainPtr) -> c_int;
/// `virDomainAbortJobFlags`.
pub type AbortJobFlags = unsafe extern "C" fn(virDomainPtr, c_uint) -> c_int;
/// `virDomainMigrateSetMaxSpeed`.
pub type SetMaxSpeed = unsafe extern "C" fn(virDomainPtr, c_ulong, c_uint) -> c_int;
/// `virConnectDomainEventRegisterAny`.
pub type RegisterEvent = unsafe extern "C" fn(
    virConnectPtr,
    virDomainPtr,
    c_int,
    virConnectDomainEventGenericCallback,
    *mut c_void,
    virFreeCallback,
) -> c_int;
/// `virDomainSave`.
pub type Save = unsafe extern "C" fn(virDomainPtr, *const c_char) -> c_int;
/// `virDomainSaveFlags`.
pub type SaveFlags = unsafe extern "C" fn(virDomainPtr, *const c_char, *const c_char, c_uint) -> c_int;
/// `virDomainSaveParams`.
pub type SaveParams = unsafe extern "C" fn(virDomainPtr, virTypedParameterPtr, c_int, c_uint) -> c_int;
/// `virDomainManagedSave`.
pub type ManagedSave = unsafe extern "C" fn(virDomainPtr, c_uint) -> c_int;
/// `virDomainCoreDump`.
pub type CoreDump = unsafe extern "C" fn(virDomainPtr, *const c_char, c_uint) -> c_int;
/// `virDomainCoreDumpWithFormat`.
pub type CoreDumpWithFormat = unsafe extern "C" fn(virDomainPtr, *const c_char, c_uint, c_uint) -> c_int;
/// `virDomainSnapshotCreateXML`.
pub type SnapshotCreate = unsafe extern "C" fn(virDomainPtr, *const c_char, c_uint) -> virDomainSnapshotPtr;
/// `virDomainDefineXML`.
pub type Define = unsafe extern "C" fn(virConnectPtr, *const c_char) -> virDomainPtr;
/// `virDomainDefineXMLFlags` and `virDomainCreateXML`.
pub type DefineFlags = unsafe extern "C" fn(virConnectPtr, *const c_char, c_uint) -> virDomainPtr;
/// `virDomainCreateXMLWithFiles`.
pub type CreateWithFiles =
    unsafe extern "C" fn(virConnectPtr, *const c_char, c_uint, *mut c_int, c_uint) -> virDomainPtr;
/// `virConnectDomainXMLToNative`.
pub type XmlToNative =
    unsafe extern "C" fn(virConnectPtr, *const c_char, *const c_char, c_uint) -> *mut c_char;
/// `virDomainMigratePerform`, of the protocol's version 2.
pub type Perform2 =
    unsafe extern "C" fn(virDomainPtr, Bytes, c_int, *const c_char, c_ulong, *const c_char, c_ulong) -> c_int;
/// `virDomainMigratePerform3`, without typed parameters.
pub type Perform3 = unsafe extern "C" fn(
    virDomainPtr,
    *const c_char,
    Bytes,
    c_int,
    CookieOut,
    Length,
    *const c_char,
    *const c_char,
    c_ulong,
    *const c_char,
    c_ulong,
) -> c_int;
/// `virDomainQemuMonitorCommand`.
pub type MonitorCommand =
    unsafe extern "C" fn(virDomainPtr, *const c_char, *mut *mut c_char, c_uint) -> c_int;
/// `virDomainQemuMonitorCommandWithFiles`.
pub type MonitorCommandWithFiles = unsafe extern "C" fn(
    virDomainPtr,
    *const c_char,
    c_uint,
    *mut c_int,
    *mut c_uint,
    *mut *mut c_int,
    *mut *mut c_char,
    c_uint,
) -> c_int;
/// `virConnectOpenAuth`.
pub type Open = unsafe extern "C" fn(*const c_char, virConnectAuthPtr, c_uint) -> virConnectPtr;
/// `virInitialize`.
pub type Initialize = unsafe extern "C" fn() -> c_int;
/// `virSetError`, private to libvirt but in every release since 0.8: takes a public structure and copies it.
pub type SetError = unsafe extern "C" fn(virErrorPtr);

real! {
    #[doc = "libvirt's own opening of a connection."]
    open = c"virConnectOpenAuth": Open;
    #[doc = "libvirt's own definition of a guest."]
    define = c"virDomainDefineXML": Define;
    #[doc = "libvirt's own definition of a guest, with flags."]
    define_flags = c"virDomainDefineXMLFlags": DefineFlags;
    #[doc = "libvirt's own start of a transient guest."]
    create = c"virDomainCreateXML": DefineFlags;
    #[doc = "libvirt's own start of a transient guest with open files."]
    create_with_files = c"virDomainCreateXMLWithFiles": CreateWithFiles;
    #[doc = "libvirt's own conversion of a definition."]
    xml_to_native = c"virConnectDomainXMLToNative": XmlToNative;
    #[doc = "libvirt's own Begin."]
    begin = c"virDomainMigrateBegin3Params": Begin;
    #[doc = "libvirt's own Prepare."]
    prepare = c"virDomainMigratePrepare3Params": Prepare;
    #[doc = "libvirt's own Perform."]
    perform = c"virDomainMigratePerform3Params": Perform;
    #[doc = "libvirt's own Finish."]
    finish = c"virDomainMigrateFinish3Params": Finish;
    #[doc = "libvirt's own Confirm."]
    confirm = c"virDomainMigrateConfirm3Params": Confirm;
    #[doc = "libvirt's own job information."]
    get_job_info = c"virDomainGetJobInfo": GetJobInfo;
    #[doc = "libvirt's own job statistics."]
    get_job_stats = c"virDomainGetJobStats": GetJobStats;
    #[doc = "libvirt's own abort."]
    abort_job = c"virDomainAbortJob": AbortJob;
    #[doc = "libvirt's own abort with flags; absent before libvirt 8.5."]
    abort_job_flags = c"virDomainAbortJobFlags": AbortJobFlags;
    #[doc = "libvirt's own limit of migrations' bandwidth."]
    set_max_speed = c"virDomainMigrateSetMaxSpeed": SetMaxSpeed;
    #[doc = "libvirt's own registration for events."]
    register_event = c"virConnectDomainEventRegisterAny": RegisterEvent;
    #[doc = "libvirt's own save."]
    save = c"virDomainSave": Save;
    #[doc = "libvirt's own save with flags."]
    save_flags = c"virDomainSaveFlags": SaveFlags;
    #[doc = "libvirt's own save with parameters; absent before libvirt 8.4."]
    save_params = c"virDomainSaveParams": SaveParams;
    #[doc = "libvirt's own managed save."]
    managed_save = c"virDomainManagedSave": ManagedSave;
    #[doc = "libvirt's own dump."]
    core_dump = c"virDomainCoreDump": CoreDump;
    #[doc = "libvirt's own dump in a format."]
    core_dump_with_format = c"virDomainCoreDumpWithFormat": CoreDumpWithFormat;
    #[doc = "libvirt's own snapshot."]
    snapshot_create = c"virDomainSnapshotCreateXML": SnapshotCreate;
    #[doc = "libvirt's own Perform of version 2."]
    perform_2 = c"virDomainMigratePerform": Perform2;
    #[doc = "libvirt's own Perform without typed parameters."]
    perform_3 = c"virDomainMigratePerform3": Perform3;
    #[doc = "libvirt's own way to QEMU's monitor, in libvirt-qemu.so."]
    monitor_command = c"virDomainQemuMonitorCommand": MonitorCommand;
    #[doc = "libvirt's own way to QEMU's monitor with open files; absent before libvirt 8.2."]
    monitor_command_with_files = c"virDomainQemuMonitorCommandWithFiles": MonitorCommandWithFiles;
    #[doc = "libvirt's own initialization."]
    initialize = c"virInitialize": Initialize;
    #[doc = "Sets the thread's error."]
    set_error = c"virSetError": SetError;
}
