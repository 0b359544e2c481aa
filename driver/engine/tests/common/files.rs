//! Files and block devices of the scenes: what they hold, who may use them, and who has them open.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Locks a byte of an image as QEMU does, for as long as it is open.
pub fn ofd_read_lock(file: &File, byte: i64) {
    use nix::fcntl::{fcntl, FcntlArg};
    let lock = libc::flock {
        l_type: libc::F_RDLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
}

/// Somebody who has an image open for writing, until this is dropped.
pub fn writer(image: &Path) -> File {
    let file = File::options().read(true).write(true).open(image).unwrap();
    ofd_read_lock(&file, 101);
    file
}

/// Bytes without a pattern, always the same ones.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    words.flat_map(u64::to_le_bytes).take(length).collect()
}

/// The content of a file, by an independent tool.
pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ')
        .next()
        .unwrap()
        .trim_start_matches('\\')
        .to_owned()
}

/// An access control list as Linux has it, of (tag, permissions, number).
pub fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, may, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(may.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

/// Who has no number in a list.
pub const NO_ID: u32 = u32::MAX;

pub const ACCESS: &CStr = c"system.posix_acl_access";
/// Of a directory: what is made in it has this.
pub const DEFAULT: &CStr = c"system.posix_acl_default";

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

pub fn set_acl(path: &Path, kind: &CStr, list: &[u8]) {
    let path = c_path(path);
    // SAFETY: path and name end with NUL, the value is as long as said.
    let done = unsafe { libc::setxattr(path.as_ptr(), kind.as_ptr(), list.as_ptr().cast(), list.len(), 0) };
    assert_eq!(done, 0, "{:?}", std::io::Error::last_os_error());
}

/// The list that a file has; `None` where it has its mode alone.
pub fn acl(path: &Path) -> Option<Vec<u8>> {
    let (path, mut value) = (c_path(path), vec![0u8; 4096]);
    // SAFETY: path and name end with NUL, the buffer is as long as said.
    let length = unsafe {
        libc::getxattr(
            path.as_ptr(),
            ACCESS.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(usize::try_from(length).ok()?);
    Some(value)
}

pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A loop device over a file, detached at the end.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn over(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .ok()?;
        let device = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(device.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A directory that another one leads to as well, until this is dropped.
pub struct Mount(PathBuf);

impl Mount {
    /// `None` where nothing can be mounted.
    pub fn bind(directory: &Path, at: &Path) -> Option<Self> {
        fs::create_dir(at).unwrap();
        let mounted = Command::new("mount").arg("--bind").args([directory, at]).status();
        mounted
            .is_ok_and(|status| status.success())
            .then(|| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
