//! Where files are at home: with the guest, with this host, or with others too.

use crate::cold::definition::Definition;
use crate::cold::image::Layer;
use crate::cold::pools;
use crate::libvirt::Connection;
use nix::errno::Errno;
use nix::sys::statfs::statfs;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// File systems that other hosts may have, too, by what statfs(2) says of their kind (Linux 6.12, `linux/magic.h` and each
/// file system's own): NFS, SMB/CIFS (three), Ceph, GFS2, OCFS2, FUSE (GlusterFS), Lustre, 9p, AFS (two).
const NETWORK: [u32; 12] = [
    0x6969,
    0xff53_4d42,
    0xfe53_4d42,
    0x517b,
    0x00c3_6400,
    0x0116_1970,
    0x7461_636f,
    0x6573_5546,
    0x0bd0_0bd0,
    0x0102_1997,
    0x5346_414f,
    0x6b41_4653,
];

/// What is a guest's to take along: the files that its definition names, and what is in their directories or in those of
/// active storage pools. A header may name any other file of the host, and the guest's owner may have written it.
#[derive(Default)]
pub struct Homes {
    named: HashSet<PathBuf>,
    directories: Vec<PathBuf>,
}

impl Homes {
    /// Those of this guest.
    pub fn of(connection: Connection, guest: &Definition) -> Self {
        let mut homes = Self::default();
        for target in pools::targets(connection) {
            homes.directory(&target);
        }
        for disk in guest.disks.iter().filter(|disk| !disk.media) {
            let sources = std::iter::once(&disk.source)
                .chain(&disk.layers)
                .chain(&disk.data);
            for path in sources.filter_map(|source| pools::path_of(connection, source).ok()?) {
                homes.add(&path);
            }
        }
        homes
    }

    /// A file that the definition names.
    pub fn add(&mut self, path: &Path) {
        let real = path.canonicalize();
        for name in [path].into_iter().chain(real.as_deref().ok()) {
            name.parent()
                .into_iter()
                .for_each(|parent| self.directory(parent));
        }
        self.named.extend(real);
    }

    fn directory(&mut self, path: &Path) {
        let real = path.canonicalize().ok();
        // Everything is below the root, and every disk of the host's in the other.
        let real = real.filter(|real| real.parent().is_some() && real != Path::new("/dev"));
        self.directories.extend(real);
    }

    /// Whether all of these layers' files are.
    ///
    /// # Errors
    /// Which is not, and what to do.
    pub fn have(&self, layers: &[Layer]) -> Result<(), String> {
        for path in layers.iter().flat_map(Layer::files) {
            // What is not there is the engine's to name.
            let Ok(real) = path.canonicalize() else { continue };
            let is_home = self.directories.iter().any(|home| real.starts_with(home));
            if !is_home && !self.named.contains(&real) {
                return Err(format!(
                    "only an image's header names {}, which is neither in a directory of the guest's disks nor in a storage \
                     pool: if it is the guest's, name it in the definition (<backingStore>, <dataStore>), or make its directory \
                     a pool (virsh pool-create-as NAME dir --target DIRECTORY)",
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

/// Whether guests of other hosts may stand on this file, of which this host knows nothing: it is on a network or cluster
/// file system.
pub fn is_shared(path: &Path) -> bool {
    match statfs(path) {
        Ok(found) => NETWORK.contains(&(found.filesystem_type().0 as u32)),
        // What is not there is nobody's; of the rest, nobody knows.
        Err(error) => !matches!(error, Errno::ENOENT | Errno::ENOTDIR),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::layer;
    use super::*;

    #[test]
    fn a_header_alone_makes_no_file_the_guests() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        for (parent, name) in [
            ("images", "top"),
            ("images/a", "base"),
            ("etc", "shadow"),
            ("pool", "base"),
        ] {
            std::fs::create_dir_all(at(parent)).unwrap();
            std::fs::write(at(&format!("{parent}/{name}")), name).unwrap();
        }
        std::os::unix::fs::symlink(at("etc/shadow"), at("images/link")).unwrap();
        let mut homes = Homes::default();
        homes.add(Path::new(&at("images/top")));
        let on = |homes: &Homes, base: &str, data: Option<&str>| {
            let layers = [
                layer(&at("images/top"), Some(&at(base)), data),
                layer(&at(base), None, None),
            ];
            homes.have(&layers)
        };
        assert_eq!(on(&homes, "images/a/base", Some("a/base")), Ok(()));
        for base in ["etc/shadow", "images/link", "pool/base"] {
            assert!(
                on(&homes, base, None).unwrap_err().contains("<backingStore>"),
                "{base}"
            );
        }
        assert!(on(&homes, "images/a/base", Some("../etc/shadow")).is_err());
        homes.directory(Path::new(&at("pool")));
        assert_eq!(on(&homes, "pool/base", None), Ok(()));
        homes.directory(Path::new("/"));
        homes.directory(Path::new("/dev"));
        assert!(on(&homes, "etc/shadow", None).is_err());
        // The definition names it.
        homes.add(Path::new(&at("etc/shadow")));
        assert_eq!(on(&homes, "images/link", None), Ok(()));
    }

    #[test]
    fn a_disk_of_this_host_is_not_shared() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!is_shared(directory.path()) && !is_shared(Path::new("/no/such/file")));
    }
}
