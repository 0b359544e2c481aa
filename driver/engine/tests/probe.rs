//! A kernel that cannot track writes is found out by trying, and named: here this machine's own, which is made to refuse
//! one step to the engine, as older kernels do, by a filter of its system calls.

use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::Value;

/// `_IOWR('f', 16, struct pm_scan_arg)` and `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const UFFDIO_API: u32 = 0xc018_aa3f;

/// `struct seccomp_data`: the call's number, and its second argument's lower half.
const NUMBER: u32 = 0;
const SECOND: u32 = 24;

/// What `virt-ferry-engine check` says where this call, with this second argument, ends in an error.
fn verdict(call: libc::c_long, second: u32, errno: i32) -> Value {
    let word = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let end = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let filter = [
        step(word, 0, 0, NUMBER),
        step(equal, 0, 3, call as u32),
        step(word, 0, 0, SECOND),
        step(equal, 0, 1, second),
        step(end, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(end, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let mut engine = Command::new(env!("CARGO_BIN_EXE_virt-ferry-engine"));
    engine.arg("check");
    // SAFETY: between fork and exec, one system call that reads a list which the closure owns.
    unsafe {
        engine.pre_exec(move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_ptr().cast_mut(),
            };
            match libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    let output = engine.output().expect("the engine, and root");
    serde_json::from_slice(&output.stdout).expect("a verdict")
}

#[test]
fn a_kernel_that_cannot_track_is_named_with_the_step() {
    for (second, errno, step) in [
        // As before Linux 6.7.
        (PAGEMAP_SCAN, libc::ENOTTY, "PAGEMAP_SCAN"),
        (UFFDIO_API, libc::EINVAL, "asynchronous write protection"),
    ] {
        let said = verdict(libc::SYS_ioctl, second, errno);
        let reason = said["reason"].as_str().unwrap_or_default();
        assert!(
            said["verdict"] == "not-eligible"
                && reason.contains("this host's kernel cannot track writes")
                && reason.contains("6.7")
                && reason.contains(step),
            "{said}"
        );
    }
    // The filter itself is no obstacle.
    assert_eq!(verdict(libc::SYS_ioctl, 1, libc::ENOTTY)["verdict"], "eligible");
}
