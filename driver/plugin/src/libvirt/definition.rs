//! A persistent guest: its definition, and what libvirt keeps beside it.

use super::domain::taken;
use super::{c_string, real, Domain, Error};
use std::os::raw::{c_char, c_int};
use virt_sys::*;

/// One snapshot or checkpoint as libvirt describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Its XML, secrets included.
    pub xml: String,
    /// Whether it is the current one.
    pub current: bool,
}

/// What is left of a definition when it goes: files that another host owns by then are not libvirt's to delete.
const UNDEFINE: u32 = VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | VIR_DOMAIN_UNDEFINE_KEEP_NVRAM;

/// The number of a call that returns -1 on failure.
fn counted(result: c_int) -> Result<usize, Error> {
    usize::try_from(result).map_err(|_| Error::libvirt())
}

fn done(result: c_int) -> Result<(), Error> {
    counted(result).map(drop)
}

/// The elements of a list that libvirt gave away; the list itself is freed.
///
/// # Safety
/// `list` is NULL or from malloc and has `count` elements.
pub(super) unsafe fn listed<T: Copy>(list: *mut T, count: usize) -> Vec<T> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: as the caller says; copied before it is freed.
    unsafe {
        let copy = std::slice::from_raw_parts(list, count).to_vec();
        libc::free(list.cast());
        copy
    }
}

impl Domain {
    /// Its definition, with secrets, as it is when it does not run.
    pub fn definition(self) -> Result<String, Error> {
        self.xml(VIR_DOMAIN_XML_INACTIVE | VIR_DOMAIN_XML_SECURE)
    }

    /// Its definition, with secrets, as it is now: what was attached to it while it runs is in no other.
    pub fn running(self) -> Result<String, Error> {
        self.xml(VIR_DOMAIN_XML_SECURE)
    }

    /// Its definition for another host.
    pub fn migratable(self) -> Result<String, Error> {
        self.xml(VIR_DOMAIN_XML_INACTIVE | VIR_DOMAIN_XML_SECURE | VIR_DOMAIN_XML_MIGRATABLE)
    }

    fn xml(self, flags: u32) -> Result<String, Error> {
        // SAFETY: a valid domain; the string is from malloc and ours.
        unsafe { taken(virDomainGetXMLDesc(self.pointer(), flags)) }.ok_or_else(Error::libvirt)
    }

    /// Whether it does not run.
    pub fn is_shut_off(self) -> Result<bool, Error> {
        // SAFETY: a valid domain.
        Ok(counted(unsafe { virDomainIsActive(self.pointer()) })? == 0)
    }

    /// Whether it is defined, and not only known for as long as it runs.
    pub fn is_persistent(self) -> Result<bool, Error> {
        // SAFETY: a valid domain.
        Ok(counted(unsafe { virDomainIsPersistent(self.pointer()) })? == 1)
    }

    /// Whether its next start goes on where `virsh managedsave` stopped it.
    pub fn has_managed_save(self) -> Result<bool, Error> {
        // SAFETY: a valid domain.
        Ok(counted(unsafe { virDomainHasManagedSaveImage(self.pointer(), 0) })? == 1)
    }

    /// Whether it starts with its host.
    pub fn autostart(self) -> Result<bool, Error> {
        let mut autostart = 0;
        // SAFETY: a valid domain and an integer to write.
        done(unsafe { virDomainGetAutostart(self.pointer(), &mut autostart) })?;
        Ok(autostart != 0)
    }

    /// Has it start with its host.
    pub fn set_autostart(self) -> Result<(), Error> {
        // SAFETY: a valid domain.
        done(unsafe { virDomainSetAutostart(self.pointer(), 1) })
    }

    /// Removes its definition, snapshots' and checkpoints' metadata included; no file of the guest's own.
    pub fn undefine(self) -> Result<(), Error> {
        self.forget_checkpoints()?;
        // SAFETY: a valid domain.
        let undefined =
            done(unsafe { virDomainUndefineFlags(self.pointer(), UNDEFINE | VIR_DOMAIN_UNDEFINE_KEEP_TPM) });
        // libvirt before 8.9 does not know the flag, and keeps what has persistent_state='yes'.
        undefined.or_else(|error| match error.is_invalid_argument() {
            // SAFETY: as above.
            true => done(unsafe { virDomainUndefineFlags(self.pointer(), UNDEFINE) }),
            false => Err(error),
        })
    }

    /// Removes the metadata of its checkpoints, children first: libvirt 11.3 takes KEEP_TPM for a flag of its list of
    /// checkpoints, and then leaves them when it undefines a guest.
    fn forget_checkpoints(self) -> Result<(), Error> {
        for checkpoint in self.list_checkpoints()?.into_iter().rev() {
            // SAFETY: a checkpoint of the list, ours to free.
            unsafe {
                let deleted = done(virDomainCheckpointDelete(
                    checkpoint,
                    VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY,
                ));
                virDomainCheckpointFree(checkpoint);
                deleted?;
            }
        }
        Ok(())
    }

    /// Its checkpoints, parents before children, each the caller's to free.
    fn list_checkpoints(self) -> Result<Vec<virDomainCheckpointPtr>, Error> {
        let mut list = std::ptr::null_mut();
        // SAFETY: a valid domain and a pointer to write.
        let count = counted(unsafe {
            virDomainListAllCheckpoints(self.pointer(), &mut list, VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
        })?;
        // SAFETY: a list of that many checkpoints.
        Ok(unsafe { listed(list, count) })
    }

    /// Its snapshots, parents before children.
    pub fn snapshots(self) -> Result<Vec<Metadata>, Error> {
        let mut list = std::ptr::null_mut();
        // SAFETY: a valid domain and a pointer to write.
        let count = counted(unsafe {
            virDomainListAllSnapshots(self.pointer(), &mut list, VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL)
        })?;
        // SAFETY: a list of that many snapshots, each of which is ours to free.
        unsafe {
            let described = |snapshot| {
                let xml = taken(virDomainSnapshotGetXMLDesc(
                    snapshot,
                    VIR_DOMAIN_SNAPSHOT_XML_SECURE,
                ));
                let read = xml.ok_or_else(Error::libvirt).and_then(|xml| {
                    let current = counted(virDomainSnapshotIsCurrent(snapshot, 0))? == 1;
                    Ok(Metadata { xml, current })
                });
                virDomainSnapshotFree(snapshot);
                read
            };
            // All of them are freed, also after a failure.
            let all: Vec<_> = listed(list, count).into_iter().map(described).collect();
            all.into_iter().collect()
        }
    }

    /// Its checkpoints, parents before children; the last is the current one.
    pub fn checkpoints(self) -> Result<Vec<Metadata>, Error> {
        let described = |checkpoint| {
            // SAFETY: a checkpoint of the list, ours to free; the string is from malloc and ours.
            unsafe {
                let xml = text(virDomainCheckpointGetXMLDesc(
                    checkpoint,
                    VIR_DOMAIN_CHECKPOINT_XML_SECURE,
                ));
                virDomainCheckpointFree(checkpoint);
                xml.map(|xml| Metadata { xml, current: false })
            }
        };
        // All of them are freed, also after a failure.
        let all: Vec<_> = self.list_checkpoints()?.into_iter().map(described).collect();
        all.into_iter().collect()
    }

    /// Tells libvirt of a snapshot that is in the images already.
    pub fn redefine_snapshot(self, snapshot: &Metadata) -> Result<(), Error> {
        let current = match snapshot.current {
            true => VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT,
            false => 0,
        };
        let create = real::snapshot_create()
            .ok_or_else(|| Error::failed("this libvirt has no virDomainSnapshotCreateXML"))?;
        let xml = c_string(&snapshot.xml);
        // SAFETY: a valid domain and a string; the snapshot is ours to free.
        unsafe {
            let made = create(
                self.pointer(),
                xml.as_ptr(),
                VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE | current,
            );
            if made.is_null() {
                return Err(Error::libvirt());
            }
            virDomainSnapshotFree(made);
        }
        Ok(())
    }

    /// Tells libvirt of a checkpoint whose bitmaps are in the images already.
    pub fn redefine_checkpoint(self, checkpoint: &Metadata) -> Result<(), Error> {
        let xml = c_string(&checkpoint.xml);
        // SAFETY: a valid domain and a string; the checkpoint is ours to free.
        unsafe {
            let made = virDomainCheckpointCreateXML(
                self.pointer(),
                xml.as_ptr(),
                VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE,
            );
            if made.is_null() {
                return Err(Error::libvirt());
            }
            virDomainCheckpointFree(made);
        }
        Ok(())
    }
}

/// The text of a call that returns one from malloc.
///
/// # Safety
/// As [`taken`].
pub(super) unsafe fn text(pointer: *mut c_char) -> Result<String, Error> {
    // SAFETY: as the caller says.
    unsafe { taken(pointer) }.ok_or_else(Error::libvirt)
}
