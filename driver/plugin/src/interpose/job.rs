//! Job information, abort and speed: while the engine copies, libvirt's own figures know nothing of the memory, and
//! its QEMU nothing of the migration.

use super::border;
use crate::cold;
use crate::libvirt::{entries, real, Domain, Error};
use crate::live::job;
use std::os::raw::{c_int, c_uint, c_ulong};
use virt_sys::{
    virDomainJobInfoPtr, virDomainPtr, virTypedParameterPtr, VIR_DOMAIN_JOB_NONE,
    VIR_DOMAIN_JOB_STATS_COMPLETED, VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED,
    VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY,
};

fn missing(name: &str) -> Error {
    Error::failed(format!("this libvirt has no {name}"))
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainGetJobInfo(domain: virDomainPtr, info: virDomainJobInfoPtr) -> c_int {
    border(-1, || {
        let real = real::get_job_info().ok_or_else(|| missing("virDomainGetJobInfo"))?;
        // SAFETY: the dispatcher's arguments; info is filled by libvirt before it is read.
        unsafe {
            if !info.is_null() {
                if let Some(progress) = cold::job::progress(Domain::borrow(domain)) {
                    *info = progress.info();
                    return Ok(0);
                }
                if let Some(standstill) = job::standstill(Domain::borrow(domain)) {
                    *info = standstill.info();
                    return Ok(0);
                }
            }
            if real(domain, info) < 0 {
                return Err(Error::libvirt());
            }
            if info.is_null() || (*info).type_ == VIR_DOMAIN_JOB_NONE as c_int {
                return Ok(0);
            }
            if let Some(progress) = job::progress(Domain::borrow(domain)) {
                progress.complete_info(&mut *info);
            }
        }
        Ok(0)
    })
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainGetJobStats(
    domain: virDomainPtr,
    kind: *mut c_int,
    params: *mut virTypedParameterPtr,
    nparams: *mut c_int,
    flags: c_uint,
) -> c_int {
    border(-1, || {
        let real = real::get_job_stats().ok_or_else(|| missing("virDomainGetJobStats"))?;
        // SAFETY: the dispatcher's arguments; on success libvirt has filled the list, which is from malloc.
        unsafe {
            let outputs = [kind.is_null(), params.is_null(), nparams.is_null()];
            if flags & VIR_DOMAIN_JOB_STATS_COMPLETED == 0 && outputs == [false; 3] {
                if let Some(progress) = cold::job::progress(Domain::borrow(domain)) {
                    progress.stats(&mut *kind, &mut *params, &mut *nparams);
                    return Ok(0);
                }
                if let Some(standstill) = job::standstill(Domain::borrow(domain)) {
                    standstill.stats(&mut *kind, &mut *params, &mut *nparams);
                    return Ok(0);
                }
            }
            if real(domain, kind, params, nparams, flags) < 0 {
                return Err(Error::libvirt());
            }
            if kind.is_null()
                || params.is_null()
                || nparams.is_null()
                || *kind == VIR_DOMAIN_JOB_NONE as c_int
            {
                return Ok(0);
            }
            let domain = Domain::borrow(domain);
            let progress = match flags & VIR_DOMAIN_JOB_STATS_COMPLETED {
                0 => job::progress(domain),
                _ => job::completed(domain, entries(*params, *nparams)),
            };
            if let Some(progress) = progress {
                progress.complete_stats(&mut *params, &mut *nparams);
            }
            let kept = VIR_DOMAIN_JOB_STATS_COMPLETED | VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED;
            if flags & kept == VIR_DOMAIN_JOB_STATS_COMPLETED {
                job::forget(domain);
            }
        }
        Ok(0)
    })
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainAbortJob(domain: virDomainPtr) -> c_int {
    border(-1, || {
        let real = real::abort_job().ok_or_else(|| missing("virDomainAbortJob"))?;
        // SAFETY: the dispatcher's argument.
        unsafe { aborted(domain, 0, || real(domain)) }
    })
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainAbortJobFlags(domain: virDomainPtr, flags: c_uint) -> c_int {
    border(-1, || {
        let real = real::abort_job_flags().ok_or_else(|| missing("virDomainAbortJobFlags"))?;
        // SAFETY: the dispatcher's arguments.
        unsafe { aborted(domain, flags, || real(domain, flags)) }
    })
}

/// # Safety
/// As libvirt's dispatcher calls it.
#[no_mangle]
pub unsafe extern "C" fn virDomainMigrateSetMaxSpeed(
    domain: virDomainPtr,
    bandwidth: c_ulong,
    flags: c_uint,
) -> c_int {
    border(-1, || {
        let real = real::set_max_speed().ok_or_else(|| missing("virDomainMigrateSetMaxSpeed"))?;
        // SAFETY: the dispatcher's arguments.
        unsafe {
            if real(domain, bandwidth, flags) < 0 {
                return Err(Error::libvirt());
            }
            if flags & VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY == 0 {
                job::limit(Domain::borrow(domain), bandwidth);
            }
        }
        Ok(0)
    })
}

/// libvirt has noted the abort, then the engine hears of it: its failure must find libvirt's note. But while QEMU answers
/// nobody, libvirt would be told when there is nothing left to give up: then the engine alone is, for whoever may migrate the
/// guest, and libvirt's Perform fails with its stream.
///
/// # Safety
/// `domain` is the dispatcher's.
unsafe fn aborted(domain: virDomainPtr, flags: c_uint, real: impl FnOnce() -> c_int) -> Result<c_int, Error> {
    // SAFETY: as the caller says.
    let borrowed = unsafe { Domain::borrow(domain) };
    if cold::job::cancel(borrowed) {
        return Ok(0);
    }
    if flags == 0 && job::standstill(borrowed).is_some() && borrowed.may_migrate() {
        job::cancel(borrowed);
        return Ok(0);
    }
    let ours = job::is_ours(borrowed);
    let result = real();
    if result < 0 {
        return Err(Error::libvirt());
    }
    if ours {
        job::cancel(borrowed);
    }
    Ok(result)
}
