//! libvirt's errors: one a thread, set before a phase returns failure.

use super::real;
use std::ffi::{CStr, CString};
use std::os::raw::c_int;

/// How libvirt words VIR_ERR_OPERATION_FAILED.
const FAILED: &str = "operation failed: ";
/// What our own errors begin with.
const OURS: &str = "migration through virt-ferry: ";

/// Why a phase fails. libvirt's own error is taken out of the thread at once: any later call of libvirt's, the freeing
/// of a domain among them, resets the thread's error.
#[derive(Debug)]
pub enum Error {
    /// We failed, with this error to set.
    Ours {
        /// A `virErrorNumber`.
        code: c_int,
        /// The whole message, libvirt's prefix included.
        message: String,
    },
    /// libvirt itself failed, with this error.
    Libvirt(SavedError),
}

impl Error {
    /// The error libvirt has just set.
    pub fn libvirt() -> Self {
        Self::Libvirt(SavedError::save())
    }

    /// The error of everything that can go wrong in a migration: "operation failed: …".
    pub fn failed(cause: impl std::fmt::Display) -> Self {
        Self::operation(format_args!("{OURS}{cause}"))
    }

    /// This error, and what followed from it.
    pub fn and(self, further: &Self) -> Self {
        let further = further.to_string();
        let bare = further.strip_prefix(FAILED).unwrap_or(&further);
        let bare = bare.strip_prefix(OURS).unwrap_or(bare);
        let code = match &self {
            Self::Ours { code, .. } => *code,
            Self::Libvirt(saved) => saved.code(),
        };
        let message = format!("{self}; {bare}");
        Self::Ours { code, message }
    }

    /// The error of what is no migration: "operation failed: …".
    pub fn operation(cause: impl std::fmt::Display) -> Self {
        Self::Ours {
            code: virt_sys::VIR_ERR_OPERATION_FAILED as c_int,
            message: format!("{FAILED}{cause}"),
        }
    }

    /// The error of a cancelled job, worded as libvirt 11.3 words it.
    pub fn cancelled() -> Self {
        Self::aborted("migration out: canceled by client")
    }

    /// The error of what the operator has ended: "operation aborted: …".
    pub fn aborted(what: impl std::fmt::Display) -> Self {
        Self::Ours {
            code: virt_sys::VIR_ERR_OPERATION_ABORTED as c_int,
            message: format!("operation aborted: {what}"),
        }
    }

    /// The error of a guest that an engine has, worded as libvirt 11.3 words that of a guest that has a job.
    pub fn busy(guest: &str) -> Self {
        let message = format!(
            "Timed out during operation: cannot acquire state change lock (held by a migration of {guest} through virt-ferry)"
        );
        Self::Ours {
            code: virt_sys::VIR_ERR_OPERATION_TIMEOUT as c_int,
            message,
        }
    }

    /// Whether libvirt refused because the connection only reads.
    pub fn is_read_only(&self) -> bool {
        self.is_libvirts(virt_sys::VIR_ERR_OPERATION_DENIED as c_int)
    }

    /// Whether libvirt did not know what it was asked for: an older one does not know newer flags.
    pub fn is_invalid_argument(&self) -> bool {
        self.is_libvirts(virt_sys::VIR_ERR_INVALID_ARG as c_int)
    }

    /// Whether there is no such guest.
    pub fn is_no_domain(&self) -> bool {
        self.is_libvirts(virt_sys::VIR_ERR_NO_DOMAIN as c_int)
    }

    fn is_libvirts(&self, code: c_int) -> bool {
        match self {
            Self::Libvirt(saved) => saved.code() == code,
            Self::Ours { .. } => false,
        }
    }

    /// Makes this the thread's libvirt error, which the dispatcher sends to the client.
    pub fn raise(self) {
        match self {
            Self::Ours { code, message } => {
                tracing::error!("{message}");
                set(code, &message);
            }
            Self::Libvirt(saved) => saved.restore(),
        }
    }
}

fn set(code: c_int, message: &str) {
    let Ok(message) = CString::new(message.replace('\0', " ")) else {
        return;
    };
    let null = std::ptr::null_mut();
    let mut error = virt_sys::virError {
        code,
        domain: virt_sys::VIR_FROM_QEMU as c_int,
        message: message.as_ptr().cast_mut(),
        level: virt_sys::VIR_ERR_ERROR,
        conn: std::ptr::null_mut(),
        dom: std::ptr::null_mut(),
        str1: message.as_ptr().cast_mut(),
        str2: null,
        str3: null,
        int1: -1,
        int2: -1,
        net: std::ptr::null_mut(),
    };
    if let Some(set_error) = real::set_error() {
        // SAFETY: virSetError copies the error and its strings (libvirt 9.0 and 11.3, virerror.c).
        unsafe { set_error(&mut error) };
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ours { message, .. } => f.write_str(message),
            Self::Libvirt(saved) => f.write_str(&saved.message()),
        }
    }
}

/// An error of libvirt's.
#[derive(Debug)]
pub struct SavedError(virt_sys::virErrorPtr);

impl SavedError {
    /// The thread's error as it is now.
    fn save() -> Self {
        // SAFETY: returns a copy that is ours, or NULL.
        Self(unsafe { virt_sys::virSaveLastError() })
    }

    /// Makes it the thread's error again.
    fn restore(self) {
        if let (false, Some(set_error)) = (self.0.is_null(), real::set_error()) {
            // SAFETY: the error is valid until self is dropped; virSetError copies it.
            unsafe { set_error(self.0) };
        }
    }

    /// Its `virErrorNumber`.
    fn code(&self) -> c_int {
        // SAFETY: a saved error is valid until self is dropped.
        unsafe { self.0.as_ref() }.map_or(0, |error| error.code)
    }

    /// What it says.
    fn message(&self) -> String {
        if self.0.is_null() {
            return "no error was given".into();
        }
        // SAFETY: a saved error's message is NULL or a string that lives as long as the error.
        let message = unsafe { (*self.0).message };
        if message.is_null() {
            return "no message was given".into();
        }
        // SAFETY: as above.
        unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
    }
}

impl Drop for SavedError {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it came from virSaveLastError and is freed once.
            unsafe { virt_sys::virFreeError(self.0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_is_told_once() {
        let told = Error::cancelled().and(&Error::failed("guest g stays paused"));
        assert_eq!(
            told.to_string(),
            "operation aborted: migration out: canceled by client; guest g stays paused"
        );
        assert!(
            matches!(told, Error::Ours { code, .. } if code == virt_sys::VIR_ERR_OPERATION_ABORTED as c_int)
        );
    }
}
