//! Saves, dumps, snapshots, migrations by older clients and whatever is asked of QEMU directly: what may have QEMU write
//! the guest's memory. Left on, x-ignore-shared would keep it out.
//!
//! The daemon's own saves come this way too, when a host shuts down (libvirt 11.3, `virDomainDriverAutoShutdown`).

use super::border;
use crate::guest_memory::as_it_runs;
use crate::libvirt::{c_string, real, Domain, Error, Params};
use crate::live::guard;
use crate::turns::Writing;
use std::borrow::Cow;
use std::ffi::CStr;
use std::os::raw::{c_char, c_int, c_uint, c_ulong};
use virt_sys::{virDomainPtr, virDomainSnapshotPtr, virTypedParameterPtr, VIR_DOMAIN_SAVE_PARAM_DXML};

/// VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP of libvirt-qemu.h: the command is one for people.
const HMP: c_uint = 1;

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

/// libvirt's own, where the guard let it pass.
fn written<T: Outcome>(
    guarded: Result<Option<Writing>, Error>,
    real: impl FnOnce() -> T,
) -> Result<T, Error> {
    let _turn = guarded?;
    let written = real();
    (!written.failed()).then_some(written).ok_or_else(Error::libvirt)
}

/// One function that writes memory: first the guard, then libvirt's own.
macro_rules! writes_memory {
    ($name:ident($($argument:ident: $kind:ty),*) -> $returned:ty, $real:path) => {
        writes_memory!($name($($argument: $kind),*) -> $returned, $real, guard::with_its_memory);
    };
    ($name:ident($($argument:ident: $kind:ty),*) -> $returned:ty, $real:path, $guard:expr) => {
        /// # Safety
        /// As libvirt's dispatcher calls it.
        #[no_mangle]
        pub unsafe extern "C" fn $name(domain: virDomainPtr, $($argument: $kind),*) -> $returned {
            border(<$returned>::FAILURE, || {
                let missing = || Error::failed(concat!("this libvirt has no ", stringify!($name)));
                let real = $real().ok_or_else(missing)?;
                // SAFETY: the dispatcher's arguments.
                unsafe { written($guard(Domain::borrow(domain)), || real(domain, $($argument),*)) }
            })
        }
    };
}

writes_memory!(virDomainSave(to: *const c_char) -> c_int, real::save);

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainSaveFlags(
    domain: virDomainPtr,
    to: *const c_char,
    xml: *const c_char,
    flags: c_uint,
) -> c_int {
    border(c_int::FAILURE, || {
        let missing = || Error::failed("this libvirt has no virDomainSaveFlags");
        let real = real::save_flags().ok_or_else(missing)?;
        // SAFETY: the dispatcher's arguments; the other definition lives as long as the call.
        unsafe {
            let asked = Domain::borrow(domain);
            let given = (!xml.is_null()).then(|| CStr::from_ptr(xml).to_str().ok());
            let other = given.flatten().and_then(|xml| as_it_runs(xml, asked));
            let other = other.map(|xml| c_string(&xml));
            written(guard::with_its_memory(asked), || {
                real(domain, to, other.as_deref().map_or(xml, CStr::as_ptr), flags)
            })
        }
    })
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainSaveParams(
    domain: virDomainPtr,
    params: virTypedParameterPtr,
    nparams: c_int,
    flags: c_uint,
) -> c_int {
    border(c_int::FAILURE, || {
        let missing = || Error::failed("this libvirt has no virDomainSaveParams");
        let real = real::save_params().ok_or_else(missing)?;
        // SAFETY: the dispatcher's arguments, which live as long as the call.
        unsafe {
            let asked = Domain::borrow(domain);
            let mut params = Params::borrow(params, nparams);
            let given = params.utf8(VIR_DOMAIN_SAVE_PARAM_DXML);
            if let Some(other) = given.and_then(|xml| as_it_runs(xml, asked)) {
                params = params.with(VIR_DOMAIN_SAVE_PARAM_DXML, &other);
            }
            written(guard::with_its_memory(asked), || {
                real(domain, params.pointer(), params.count(), flags)
            })
        }
    })
}

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
    real::monitor_command,
    |domain| monitor_command(domain, cmd, flags)
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
    real::monitor_command_with_files,
    |domain| monitor_command(domain, cmd, flags)
);

/// The guard of a command for QEMU. libvirt passes those on while a guest moves (VIR_JOB_QUERY, libvirt 11.3), and whoever
/// watches guests asks every few seconds: a question writes nothing and passes, the rest is refused while an engine is at
/// work.
///
/// # Safety
/// `command` is NULL or a string that lives as long as the call.
unsafe fn monitor_command(
    domain: Domain,
    command: *const c_char,
    flags: c_uint,
) -> Result<Option<Writing>, Error> {
    let human = flags & HMP != 0;
    // SAFETY: as the caller says.
    let asks = !command.is_null() && only_asks(unsafe { CStr::from_ptr(command) }.to_bytes(), human);
    match asks {
        true => Ok(None),
        false => guard::at_once(domain),
    }
}

/// Whether a command of QEMU's monitor, for people or in QMP, is a question.
fn only_asks(command: &[u8], human: bool) -> bool {
    /// A command that is named twice is none: QEMU might take the other name.
    #[derive(serde::Deserialize)]
    struct Command<'a> {
        #[serde(borrow)]
        execute: Cow<'a, str>,
    }
    if human {
        return command.trim_ascii_start().starts_with(b"info ");
    }
    // A list would do for the structure as well.
    let object = command.trim_ascii_start().starts_with(b"{");
    let named = object
        .then(|| serde_json::from_slice::<Command>(command).ok())
        .flatten();
    named.is_some_and(|Command { execute }| {
        execute.starts_with("query-") || matches!(&*execute, "qom-get" | "qom-list")
    })
}

#[cfg(test)]
mod tests {
    use super::only_asks;

    #[test]
    fn a_question_is_known() {
        for asks in [
            r#"{"execute":"query-blockstats"}"#,
            r#" {"execute": "qom-get", "arguments": {"path": "/machine", "property": "type"}, "id": 1}"#,
        ] {
            assert!(only_asks(asks.as_bytes(), false), "{asks}");
        }
        assert!(only_asks(b" info block", true));
        let deep = "[".repeat(1 << 20);
        for other in [
            r#"{"execute":"migrate","arguments":{"uri":"file:/x"}}"#,
            r#"{"execute":"query-status","execute":"migrate"}"#,
            r#"{"execute":"query-status"} {"execute":"migrate"}"#,
            r#"{"exec-oob":"query-status"}"#,
            r#"["query-status"]"#,
            "info block",
            "",
            &deep,
        ] {
            assert!(!only_asks(other.as_bytes(), false), "{other}");
        }
        assert!(!only_asks(b"migrate file:/x", true) && !only_asks(b"infomercial", true));
    }
}
