//! Domains and connections, borrowed from a call or opened by us.

use super::job::integer;
use super::{entries, Error};
use ferry_contract::session::Guest;
use std::ffi::{CStr, CString};
use std::os::raw::c_int;
use uuid::Uuid;
use virt_sys::{virConnectPtr, virDomainPtr};

/// A connection a call was made on.
#[derive(Debug, Clone, Copy)]
pub struct Connection(virConnectPtr);

impl Connection {
    /// # Safety
    /// `pointer` is NULL or a connection that stays open while this value is used.
    pub unsafe fn borrow(pointer: virConnectPtr) -> Self {
        Self(pointer)
    }

    /// For a call.
    pub fn pointer(self) -> virConnectPtr {
        self.0
    }

    /// Whether QEMU's driver serves it: the daemon may serve others too.
    pub fn is_qemu(self) -> bool {
        if self.0.is_null() {
            return false;
        }
        // SAFETY: an open connection; the type is a static string or NULL.
        let kind = unsafe { virt_sys::virConnectGetType(self.0) };
        // SAFETY: as above.
        !kind.is_null() && unsafe { CStr::from_ptr(kind) } == c"QEMU"
    }

    /// Whether its user may change anything on this host: libvirt checks that within the functions we stand in for,
    /// and we must not act before it has. Setting no memory parameters at all does nothing but be checked (connect:write
    /// in fine-grained access control; libvirt 9.0 and 11.3).
    pub fn may_write(self) -> bool {
        let mut none = virt_sys::virTypedParameter {
            field: [0; 80],
            type_: 0,
            value: virt_sys::_virTypedParameter__bindgen_ty_1 { ul: 0 },
        };
        // SAFETY: an open connection and a list of no parameters, which must not be NULL.
        unsafe { virt_sys::virNodeSetMemoryParameters(self.0, &mut none, 0, 0) == 0 }
    }

    /// Its URI.
    pub fn uri(self) -> Option<String> {
        // SAFETY: an open connection; the string is from malloc and ours.
        unsafe { taken(virt_sys::virConnectGetURI(self.0)) }
    }

    /// This host's name as libvirt has it, canonical where it can be.
    pub fn hostname(self) -> Option<String> {
        // SAFETY: an open connection; the string is from malloc and ours.
        unsafe { taken(virt_sys::virConnectGetHostname(self.0)) }
    }

    /// The domain of this UUID.
    pub fn domain(self, uuid: Uuid) -> Result<OwnedDomain, Error> {
        // SAFETY: an open connection and 16 bytes.
        let domain = unsafe { virt_sys::virDomainLookupByUUID(self.0, uuid.as_bytes().as_ptr()) };
        OwnedDomain::from(domain)
    }
}

/// A string that libvirt gave away.
///
/// # Safety
/// NULL, or a string from malloc that nobody else frees.
pub(super) unsafe fn taken(text: *mut std::os::raw::c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: as the caller says; copied before it is freed.
    unsafe {
        let copy = CStr::from_ptr(text).to_string_lossy().into_owned();
        libc::free(text.cast());
        Some(copy)
    }
}

/// A domain a call was made for.
#[derive(Debug, Clone, Copy)]
pub struct Domain(virDomainPtr);

impl Domain {
    /// # Safety
    /// `pointer` is NULL or a domain that stays valid while this value is used.
    pub unsafe fn borrow(pointer: virDomainPtr) -> Self {
        Self(pointer)
    }

    /// For a call.
    pub fn pointer(self) -> virDomainPtr {
        self.0
    }

    /// The connection it belongs to.
    pub fn connection(self) -> Connection {
        if self.0.is_null() {
            return Connection(std::ptr::null_mut());
        }
        // SAFETY: a valid domain.
        Connection(unsafe { virt_sys::virDomainGetConnect(self.0) })
    }

    /// Whether the call's user may migrate it: libvirt checks that within the functions we stand in for, and we must not
    /// act before it has. Asking for the maximum speed is checked the same (not read-only, domain:migrate) and takes
    /// no job (libvirt 9.0 and 11.3).
    pub fn may_migrate(self) -> bool {
        self.connection().is_qemu() && self.max_speed().is_some()
    }

    /// Whether the call's connection only reads. A save to nowhere is refused for that first, and then because it says
    /// nowhere (libvirt 9.0 and 11.3, `virDomainSave`).
    pub fn is_read_only(self) -> bool {
        let Some(save) = super::real::save() else {
            return false;
        };
        // SAFETY: a valid domain; NULL is checked for.
        let saved = unsafe { save(self.0, std::ptr::null()) };
        saved < 0 && Error::libvirt().is_read_only()
    }

    /// The most its migrations may take, in MiB/s (`virsh migrate-getspeed`).
    pub fn max_speed(self) -> Option<u64> {
        let mut speed = 0;
        // SAFETY: a domain and a number to write.
        (unsafe { virt_sys::virDomainMigrateGetMaxSpeed(self.0, &mut speed, 0) } == 0).then_some(speed)
    }

    /// Its name and UUID; `None` for a pointer that is no domain. Of a call's domain only the UUID counts: the rest is what
    /// the client has sent, while libvirt's QEMU driver goes by the UUID alone (libvirt 11.3, `qemuDomainObjFromDomain`).
    /// What is to be relied on, [`Connection::domain`] finds.
    pub fn guest(self) -> Option<Guest> {
        if self.0.is_null() {
            return None;
        }
        let mut uuid = [0; 16];
        // SAFETY: a valid domain; the name lives as long as it; uuid has room for VIR_UUID_BUFLEN (16) bytes.
        let (name, got) = unsafe {
            (
                virt_sys::virDomainGetName(self.0),
                virt_sys::virDomainGetUUID(self.0, uuid.as_mut_ptr()),
            )
        };
        if name.is_null() || got != 0 {
            return None;
        }
        // SAFETY: as above.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        Some(Guest {
            name,
            uuid: Uuid::from_bytes(uuid),
        })
    }

    /// libvirt's number of the running domain; `None` for one that does not run. As with [`Self::guest`], a call's domain
    /// does not tell.
    pub fn id(self) -> Option<u32> {
        // SAFETY: a valid domain; (unsigned)-1 means not running.
        let id = unsafe { virt_sys::virDomainGetID(self.0) };
        (id != u32::MAX).then_some(id)
    }

    /// Whether libvirt has a job under way for it; a domain that cannot be asked has one.
    pub fn has_job(self) -> bool {
        let Some(ask) = super::real::get_job_info() else {
            return true;
        };
        // SAFETY: a structure of integers, all of which may be 0.
        let mut info: virt_sys::virDomainJobInfo = unsafe { std::mem::zeroed() };
        // SAFETY: a valid domain and a structure to write.
        let asked = unsafe { ask(self.0, &mut info) };
        asked < 0 || info.type_ != virt_sys::VIR_DOMAIN_JOB_NONE as c_int
    }

    /// What its job is, a `virDomainJobOperation`; `None` where it has none, or cannot be asked.
    pub fn job_operation(self) -> Option<c_int> {
        let ask = super::real::get_job_stats()?;
        let (mut kind, mut list, mut count) = (0, std::ptr::null_mut(), 0);
        // SAFETY: a valid domain, and values to write; the list is ours then, and freed.
        unsafe {
            if ask(self.0, &mut kind, &mut list, &mut count, 0) < 0 {
                return None;
            }
            let operation = integer(entries(list, count), virt_sys::VIR_DOMAIN_JOB_OPERATION);
            virt_sys::virTypedParamsFree(list, count);
            operation
        }
    }

    /// Lets its vCPUs go on.
    pub fn resume(self) -> Result<(), Error> {
        // SAFETY: a valid domain.
        match unsafe { virt_sys::virDomainResume(self.0) } {
            0 => Ok(()),
            _ => Err(Error::libvirt()),
        }
    }

    /// Ends it.
    pub fn destroy(self) -> Result<(), Error> {
        // SAFETY: a valid domain.
        match unsafe { virt_sys::virDomainDestroy(self.0) } {
            0 => Ok(()),
            _ => Err(Error::libvirt()),
        }
    }

    /// Whether it is known not to run; one that is not defined is not even known then.
    pub fn is_over(self) -> bool {
        // SAFETY: a valid domain; the error is the thread's own, and read before anything else can change it.
        unsafe {
            match virt_sys::virDomainIsActive(self.0) {
                0 => true,
                1 => false,
                _ => virt_sys::virGetLastError()
                    .as_ref()
                    .is_some_and(|error| error.code == virt_sys::VIR_ERR_NO_DOMAIN as c_int),
            }
        }
    }

    /// Whether its vCPUs are stopped.
    pub fn is_paused(self) -> Result<bool, Error> {
        Ok(self.state()?.0 == virt_sys::VIR_DOMAIN_PAUSED as c_int)
    }

    /// Whether they are stopped because it could not read or write a disk.
    pub fn failed_at_io(self) -> bool {
        let failed = (
            virt_sys::VIR_DOMAIN_PAUSED as c_int,
            virt_sys::VIR_DOMAIN_PAUSED_IOERROR as c_int,
        );
        self.state().is_ok_and(|state| state == failed)
    }

    /// Its state and the reason.
    fn state(self) -> Result<(c_int, c_int), Error> {
        let (mut state, mut reason): (c_int, c_int) = (0, 0);
        // SAFETY: a valid domain and two integers to write.
        match unsafe { virt_sys::virDomainGetState(self.0, &mut state, &mut reason, 0) } {
            0 => Ok((state, reason)),
            _ => Err(Error::libvirt()),
        }
    }
}

/// A domain reference of ours.
#[derive(Debug)]
pub struct OwnedDomain(virDomainPtr);

impl OwnedDomain {
    /// Takes over a reference; NULL is libvirt's failure.
    pub fn from(pointer: virDomainPtr) -> Result<Self, Error> {
        if pointer.is_null() {
            return Err(Error::libvirt());
        }
        Ok(Self(pointer))
    }

    /// The domain.
    pub fn get(&self) -> Domain {
        Domain(self.0)
    }

    /// Gives the reference to a caller, who frees it.
    pub fn into_pointer(self) -> virDomainPtr {
        std::mem::ManuallyDrop::new(self).0
    }
}

impl Drop for OwnedDomain {
    fn drop(&mut self) {
        // SAFETY: our own reference, freed once.
        unsafe { virt_sys::virDomainFree(self.0) };
    }
}

/// A connection of ours, to another host's daemon as a rule.
#[derive(Debug)]
pub struct OwnedConnection(virConnectPtr);

impl OwnedConnection {
    /// To a peer, as libvirt's own peer-to-peer code opens it: a keepalive notices a dead one (5 s, 5 times: libvirt's
    /// defaults in qemu.conf).
    pub fn to_peer(uri: &CStr) -> Result<Self, Error> {
        let connection = Self::open(uri)?;
        // SAFETY: an open connection. A peer that has no keepalive is no failure.
        unsafe { virt_sys::virConnectSetKeepAlive(connection.0, 5, 5) };
        Ok(connection)
    }

    /// To a URI: credentials come from auth.conf, nobody is asked.
    pub fn open(uri: &CStr) -> Result<Self, Error> {
        // What a daemon can be given by auth.conf (libvirt 11.3, qemuMigrationSrcPeer2Peer).
        let mut kinds = [
            virt_sys::VIR_CRED_AUTHNAME as c_int,
            virt_sys::VIR_CRED_PASSPHRASE as c_int,
        ];
        let mut auth = virt_sys::virConnectAuth {
            credtype: kinds.as_mut_ptr(),
            ncredtype: kinds.len() as u32,
            cb: None,
            cbdata: std::ptr::null_mut(),
        };
        // SAFETY: a string and an auth structure that outlive the call.
        let connection = unsafe { virt_sys::virConnectOpenAuth(uri.as_ptr(), &mut auth, 0) };
        if connection.is_null() {
            return Err(Error::libvirt());
        }
        Ok(Self(connection))
    }

    /// Opens a URI of this daemon's own, which has no keepalive and logs an error when asked for one.
    pub fn here(uri: &CStr) -> Result<Self, Error> {
        // SAFETY: a string that outlives the call.
        let connection = unsafe { virt_sys::virConnectOpen(uri.as_ptr()) };
        (!connection.is_null())
            .then_some(Self(connection))
            .ok_or_else(Error::libvirt)
    }

    /// The connection.
    pub fn get(&self) -> Connection {
        Connection(self.0)
    }
}

impl Drop for OwnedConnection {
    fn drop(&mut self) {
        // SAFETY: our own reference, closed once.
        unsafe { virt_sys::virConnectClose(self.0) };
    }
}

/// A C string of ours; NULs, which no name of libvirt's has, are left out.
pub fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}
