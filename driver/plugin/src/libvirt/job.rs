//! A job in libvirt's two forms: the structure of `virDomainGetJobInfo` and the typed list of `virDomainGetJobStats`.

use std::ffi::CStr;
use std::os::raw::c_int;
use std::time::Duration;
use virt_sys::*;

/// The structure, of a guest that has been leaving for so long.
pub fn leaving(elapsed: Duration) -> virDomainJobInfo {
    // SAFETY: a structure of integers, all of which may be 0.
    let mut info: virDomainJobInfo = unsafe { std::mem::zeroed() };
    info.type_ = VIR_DOMAIN_JOB_UNBOUNDED as c_int;
    info.timeElapsed = milliseconds(elapsed);
    info
}

fn milliseconds(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

/// An int parameter of a list.
pub fn integer(list: &[virTypedParameter], name: &CStr) -> Option<c_int> {
    let int = |entry: &&virTypedParameter| {
        // SAFETY: libvirt ends the name with NUL within its 80 bytes.
        let named = unsafe { CStr::from_ptr(entry.field.as_ptr()) };
        named == name && entry.type_ == VIR_TYPED_PARAM_INT as c_int
    };
    // SAFETY: the type says that the value is an int.
    list.iter().find(int).map(|entry| unsafe { entry.value.i })
}

/// libvirt's own list of job statistics, from malloc, to be extended in place.
pub struct List {
    entries: virTypedParameterPtr,
    count: c_int,
    room: c_int,
}

impl List {
    /// A new one, of a guest that has been leaving for so long.
    pub fn leaving(elapsed: Duration) -> Self {
        let mut list = Self {
            entries: std::ptr::null_mut(),
            count: 0,
            room: 0,
        };
        list.add_integer(
            VIR_DOMAIN_JOB_OPERATION,
            VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT as c_int,
        );
        list.add(VIR_DOMAIN_JOB_TIME_ELAPSED, milliseconds(elapsed));
        list
    }

    /// libvirt's, to be given back.
    pub fn take(params: &virTypedParameterPtr, count: &c_int) -> Self {
        Self {
            entries: *params,
            count: *count,
            room: *count,
        }
    }

    /// A parameter.
    pub fn find(&mut self, name: &CStr) -> Option<&mut virTypedParameter> {
        // SAFETY: libvirt's own look-up in its own list; NULL where the name is absent.
        unsafe { virTypedParamsGet(self.entries, self.count, name.as_ptr()).as_mut() }
    }

    /// The parameter's value.
    pub fn number(&mut self, name: &CStr) -> Option<u64> {
        match self.find(name) {
            // SAFETY: the type says that the value is an unsigned long long.
            Some(entry) if entry.type_ == VIR_TYPED_PARAM_ULLONG as c_int => Some(unsafe { entry.value.ul }),
            _ => None,
        }
    }

    /// Adds to the parameter's value, or the parameter to the list.
    pub fn add(&mut self, name: &CStr, value: u64) {
        match self.find(name) {
            Some(entry) if entry.type_ == VIR_TYPED_PARAM_ULLONG as c_int => {
                // SAFETY: the type says that the value is an unsigned long long.
                unsafe { entry.value.ul += value };
            }
            Some(_) => {}
            // SAFETY: libvirt's list from malloc, which it may move; out of memory leaves it as it is.
            None => unsafe {
                virTypedParamsAddULLong(
                    &mut self.entries,
                    &mut self.count,
                    &mut self.room,
                    name.as_ptr(),
                    value,
                );
            },
        }
    }

    /// Adds an int parameter to the list.
    pub fn add_integer(&mut self, name: &CStr, value: c_int) {
        // SAFETY: as with `add`.
        unsafe {
            virTypedParamsAddInt(
                &mut self.entries,
                &mut self.count,
                &mut self.room,
                name.as_ptr(),
                value,
            );
        }
    }

    /// Where libvirt, or its client, looks for it.
    pub fn give_back(self, params: &mut virTypedParameterPtr, count: &mut c_int) {
        *params = self.entries;
        *count = self.count;
    }
}
