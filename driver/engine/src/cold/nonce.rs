//! Proof that two hosts see one and the same directory: a file with random content that one made and the other finds.

use super::Error;
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The files of one session.
#[derive(Debug)]
pub struct Nonces {
    /// What is in them.
    pub text: String,
    session: Uuid,
    made: BTreeSet<PathBuf>,
}

fn path(directory: &Path, session: Uuid) -> PathBuf {
    directory.join(format!(".ferry-{session}.nonce"))
}

impl Nonces {
    /// Makes one in each of these directories. One that cannot be written to proves nothing: its files count as not shared.
    pub fn make(directories: impl IntoIterator<Item = PathBuf>, session: Uuid) -> Result<Self, Error> {
        let secret = crate::wire::Token::generate()?;
        let text = blake3::hash(secret.expose()).to_hex().to_string();
        let mut nonces = Self {
            text,
            session,
            made: BTreeSet::new(),
        };
        for directory in directories {
            if nonces.made.contains(&directory) {
                continue;
            }
            let path = path(&directory, session);
            let written = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .and_then(|mut file| file.write_all(nonces.text.as_bytes()));
            match written {
                Ok(()) => drop(nonces.made.insert(directory)),
                Err(error) => {
                    tracing::debug!(path = %path.display(), %error, "no proof of shared storage here")
                }
            }
        }
        Ok(nonces)
    }

    /// Whether there is one in this directory.
    pub fn is_in(&self, directory: &Path) -> bool {
        self.made.contains(directory)
    }

    /// Removes them all.
    pub fn remove(&self) {
        for directory in &self.made {
            remove(directory, self.session);
        }
    }
}

impl Drop for Nonces {
    /// Also where the session does not come about.
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes the one that a session before a crash made here.
pub fn remove(directory: &Path, session: Uuid) {
    // Gone already, or the directory is.
    let _ = fs::remove_file(path(directory, session));
}

/// Whether the other host's file is to be seen in this directory.
pub fn is_seen(directory: &Path, session: Uuid, text: &str) -> bool {
    let mut found = Vec::new();
    let read = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path(directory, session))
        .and_then(|file| file.take(text.len() as u64 + 1).read_to_end(&mut found));
    read.is_ok() && !text.is_empty() && found == text.as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_outlives_its_session() {
        let directory = tempfile::tempdir().unwrap();
        let session = Uuid::from_u128(3);
        let nonces = Nonces::make([directory.path().to_owned()], session).unwrap();
        assert!(nonces.is_in(directory.path()) && is_seen(directory.path(), session, &nonces.text));
        drop(nonces);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
