//! What a file is called, and which one that is.

use crate::cold::image::Layer;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

/// A path without `.`, `..` and doubled slashes, as headers may have them.
pub fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

/// A path as [`plain`] has it, where that is the same file: behind a symlink to a directory, the kernel and QEMU find
/// another by `..` than its text says.
///
/// # Errors
/// It is not, and nobody knows which of both would be copied or deleted.
pub fn certain(path: &Path) -> Result<PathBuf, String> {
    let plain = plain(path);
    // Neither is there: that is the engine's to name.
    match path.canonicalize().ok() == plain.canonicalize().ok() {
        true => Ok(plain),
        false => Err(format!(
            "{} leads through a symlink to another file than {}: name it without \"..\" (qemu-img rebase -u for a backing \
             file)",
            path.display(),
            plain.display()
        )),
    }
}

/// Whether every file of these layers is the one that its name says.
///
/// # Errors
/// See [`certain`].
pub fn all_certain(layers: &[Layer]) -> Result<(), String> {
    layers
        .iter()
        .flat_map(Layer::files)
        .try_for_each(|path| certain(&path).map(drop))
}

/// Whether it is known that nothing is there.
pub fn is_absent(path: &Path) -> bool {
    let found = path.metadata();
    found.is_err_and(|error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory))
}

#[cfg(test)]
mod tests {
    use super::super::{named, tests::layer};
    use super::*;

    #[test]
    fn behind_a_symlink_the_kernel_decides() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(at("far/images")).unwrap();
        std::fs::create_dir(at("far/base")).unwrap();
        std::fs::create_dir(at("base")).unwrap();
        std::os::unix::fs::symlink(at("far/images"), at("images")).unwrap();
        std::fs::write(at("far/base/raw"), "the guest's").unwrap();
        let header = at("images/../base/raw");
        // By its text it is another file: there is none, then there is one.
        assert!(certain(&header).unwrap_err().contains("symlink"));
        std::fs::write(at("base/raw"), "another's").unwrap();
        assert!(certain(&header).is_err());
        let overlay = layer(header.to_str().unwrap(), None, None);
        assert!(all_certain(&[overlay]).is_err());
        let data = at("images/top");
        let data = layer(data.to_str().unwrap(), None, Some("../base/raw"));
        assert!(all_certain(&[data]).is_err());
        // Without a symlink before it, and where nothing is.
        assert_eq!(certain(&at("far/images/../base/raw")), Ok(at("far/base/raw")));
        assert_eq!(certain(&at("no/../such")), Ok(at("such")));
        // What another guest refers to is what the kernel finds.
        let xml = format!("<disk><source file='{}'/></disk>", header.display());
        let real = |path: PathBuf| path.canonicalize().ok();
        let mut used = named(&xml).unwrap().into_iter().filter_map(real);
        assert!(used.any(|path| Some(path) == real(at("far/base/raw"))));
    }

    #[test]
    fn only_what_is_not_there_is_absent() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!is_absent(directory.path()));
        assert!(is_absent(&directory.path().join("x")));
    }
}
