//! What whoever started the engine had open is not held open by it. Alone in its file: no other test's child may hold it.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

#[test]
fn nothing_inherited_stays_open() {
    let (plugin, theirs) = UnixStream::pair().expect("a socket");
    // Without O_CLOEXEC, as libvirt opens a guest's network devices.
    let (held, given) = nix::unistd::pipe().expect("a pipe");
    let mut engine = Command::new(env!("CARGO_BIN_EXE_virt-ferry-engine"))
        .arg("source")
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .expect("the engine");
    drop(given);
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let end = std::fs::File::from(held).read(&mut [0]).expect("the pipe");
        let _ = tell.send(end);
    });
    let end = told.recv_timeout(Duration::from_secs(30));
    let lives = engine.try_wait().expect("the engine's state").is_none();
    drop(plugin);
    engine.wait().expect("the engine's end");
    assert_eq!(end, Ok(0), "the engine holds what its parent had open");
    assert!(lives, "the engine ended before it was asked anything");
}
