//! What a host's libvirt knows besides one guest: the other guests, secrets, itself.

use super::definition::{listed, text};
use super::{c_string, real, Connection, Error, OwnedDomain};
use std::ffi::CString;
use uuid::Uuid;
use virt_sys::*;

impl Connection {
    /// All guests, running or not.
    pub fn domains(self) -> Result<Vec<OwnedDomain>, Error> {
        let mut list = std::ptr::null_mut();
        // SAFETY: an open connection and a pointer to write.
        let count = unsafe { virConnectListAllDomains(self.pointer(), &mut list, 0) };
        let count = usize::try_from(count).map_err(|_| Error::libvirt())?;
        // SAFETY: a list of that many domains, each of which is ours.
        let domains = unsafe { listed(list, count) };
        domains.into_iter().map(OwnedDomain::from).collect()
    }

    /// The guest of this name.
    pub fn domain_named(self, name: &str) -> Option<OwnedDomain> {
        let name = c_string(name);
        // SAFETY: an open connection and a string.
        OwnedDomain::from(unsafe { virDomainLookupByName(self.pointer(), name.as_ptr()) }).ok()
    }

    /// Defines a guest as libvirt itself does.
    pub fn define(self, xml: &str) -> Result<OwnedDomain, Error> {
        let define = real::define().ok_or_else(|| Error::failed("this libvirt has no virDomainDefineXML"))?;
        let xml: CString = c_string(xml);
        // SAFETY: an open connection and a string.
        OwnedDomain::from(unsafe { define(self.pointer(), xml.as_ptr()) })
    }

    /// What libvirt says of this host.
    pub fn capabilities(self) -> Result<String, Error> {
        // SAFETY: an open connection; the string is from malloc and ours.
        unsafe { text(virConnectGetCapabilities(self.pointer())) }
    }

    /// What QEMU here can do as this kind of machine; an error where it cannot be one.
    pub fn domain_capabilities(
        self,
        emulator: Option<&str>,
        arch: &str,
        machine: &str,
        kind: &str,
    ) -> Result<String, Error> {
        let emulator = emulator.map(c_string);
        let (arch, machine, kind) = (c_string(arch), c_string(machine), c_string(kind));
        // SAFETY: an open connection and strings, of which the first may be NULL; what is returned is ours.
        unsafe {
            text(virConnectGetDomainCapabilities(
                self.pointer(),
                emulator
                    .as_ref()
                    .map_or(std::ptr::null(), |emulator| emulator.as_ptr()),
                arch.as_ptr(),
                machine.as_ptr(),
                kind.as_ptr(),
                0,
            ))
        }
    }

    /// Whether libvirt keeps a secret of this UUID here.
    pub fn has_secret(self, uuid: Uuid) -> bool {
        let uuid = c_string(&uuid.to_string());
        // SAFETY: an open connection and a string; the secret is ours to free.
        unsafe {
            let secret = virSecretLookupByUUIDString(self.pointer(), uuid.as_ptr());
            !secret.is_null() && virSecretFree(secret) == 0
        }
    }
}
