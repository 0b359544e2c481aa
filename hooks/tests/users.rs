//! Each user's own daemon runs the hook, too, as that user.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Whether a guest whose definition says nothing may start, in the eyes of this user.
fn may_start(hook: &Path, user: u32) -> bool {
    let mut asked = Command::new(hook)
        .args(["g", "prepare", "begin", "-"])
        .uid(user)
        .current_dir("/")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have answered without reading.
    let _ = asked.stdin.take().unwrap().write_all(b"<domain/>");
    asked.wait().unwrap().success()
}

#[test]
fn only_the_systems_guests_are_fenced() {
    const NOBODY: u32 = 65534;
    if !nix::unistd::geteuid().is_root() {
        return println!("SKIPPED: only root can be another user");
    }
    // Where others may run it.
    let directory = tempfile::tempdir().unwrap();
    let hook = directory.path().join("hook");
    fs::copy(env!("CARGO_BIN_EXE_virt-ferry-hook"), &hook).unwrap();
    for path in [directory.path(), &hook] {
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(path, everybody).unwrap();
    }
    assert!(!may_start(&hook, 0));
    assert!(may_start(&hook, NOBODY));
}
