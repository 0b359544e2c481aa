//! Storage pools: where a volume's file is, and that a pool looks again after files came or went.

use super::definition::{listed, text};
use super::{c_string, Connection, Error, OwnedConnection};
use std::path::{Path, PathBuf};
use virt_sys::*;

/// A connection to the host's storage driver: in libvirtd the guest's own, in virtqemud that of another daemon.
pub struct Storage {
    connection: Connection,
    _ours: Option<OwnedConnection>,
}

/// One active pool.
pub struct Pool(virStoragePoolPtr);

impl Storage {
    /// The storage driver of this connection's host.
    pub fn of(connection: Connection) -> Result<Self, Error> {
        // SAFETY: an open connection.
        if unsafe { virConnectNumOfStoragePools(connection.pointer()) } >= 0 {
            return Ok(Self {
                connection,
                _ours: None,
            });
        }
        let ours = OwnedConnection::open(c"storage:///system")?;
        Ok(Self {
            connection: ours.get(),
            _ours: Some(ours),
        })
    }

    /// The active pools.
    pub fn pools(&self) -> Result<Vec<Pool>, Error> {
        let mut list = std::ptr::null_mut();
        // SAFETY: an open connection and a pointer to write.
        let count = unsafe {
            virConnectListAllStoragePools(
                self.connection.pointer(),
                &mut list,
                VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE,
            )
        };
        let count = usize::try_from(count).map_err(|_| Error::libvirt())?;
        // SAFETY: a list of that many pools, each of which is ours.
        Ok(unsafe { listed(list, count) }.into_iter().map(Pool).collect())
    }

    /// The pool of this name; libvirt's error says that there is none, or why not.
    pub fn pool(&self, name: &str) -> Result<Pool, Error> {
        let name = c_string(name);
        // SAFETY: an open connection and a string.
        let pool = unsafe { virStoragePoolLookupByName(self.connection.pointer(), name.as_ptr()) };
        match pool.is_null() {
            true => Err(Error::libvirt()),
            false => Ok(Pool(pool)),
        }
    }
}

impl Pool {
    /// Its XML: what kind it is and where.
    pub fn xml(&self) -> Result<String, Error> {
        // SAFETY: our own pool; the string is from malloc and ours.
        unsafe { text(virStoragePoolGetXMLDesc(self.0, 0)) }
    }

    /// Whether it can be used.
    pub fn is_active(&self) -> bool {
        // SAFETY: our own pool.
        unsafe { virStoragePoolIsActive(self.0) == 1 }
    }

    /// Where a volume of it is.
    pub fn volume_path(&self, volume: &str) -> Result<PathBuf, Error> {
        let volume = c_string(volume);
        // SAFETY: our own pool and a string; the volume is ours to free, its path from malloc.
        unsafe {
            let volume = virStorageVolLookupByName(self.0, volume.as_ptr());
            if volume.is_null() {
                return Err(Error::libvirt());
            }
            let path = text(virStorageVolGetPath(volume));
            virStorageVolFree(volume);
            Ok(Path::new(&path?).to_owned())
        }
    }

    /// Has it look what is there.
    pub fn refresh(&self) -> Result<(), Error> {
        // SAFETY: our own pool.
        match unsafe { virStoragePoolRefresh(self.0, 0) } {
            0 => Ok(()),
            _ => Err(Error::libvirt()),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: our own reference, freed once.
        unsafe { virStoragePoolFree(self.0) };
    }
}
