//! The private monitor: each guest's QEMU is given a second QMP socket when libvirt starts it.
//!
//! libvirt refuses its own monitor passthrough for a guest that arrives, and lets it pass for one that leaves only as its
//! job's mask happens to allow (libvirt 11.3, `VIR_JOB_QUERY`), so the engine needs a monitor of its own. We are called in a
//! forked child, already as QEMU's user and confined as QEMU will be (libvirt 9.0 and 11.3, virCommandExec), so this does
//! nothing but read arguments and make new ones.

use ferry_host::MONITOR;
use std::ffi::{CStr, CString};
use std::os::raw::{c_char, c_int};
use std::panic::catch_unwind;

/// The most arguments looked at; a QEMU with hundreds of devices has some thousands.
const MAX_ARGUMENTS: usize = 1 << 16;

/// # Safety
/// As execve(2).
#[no_mangle]
pub unsafe extern "C" fn execve(
    path: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> c_int {
    // SAFETY: the caller's list, valid for the call; a panic means that QEMU starts as libvirt meant it.
    let more = catch_unwind(|| unsafe { with_monitor(argv) }).ok().flatten();
    let pointers: Vec<*const c_char>;
    let argv = match &more {
        Some(arguments) => {
            pointers = arguments
                .iter()
                .map(|argument| argument.as_ptr())
                .chain([std::ptr::null()])
                .collect();
            pointers.as_ptr()
        }
        None => argv,
    };
    // SAFETY: the caller's arguments or a NUL-terminated list of ours. The system call itself: looking up libc's
    // function could wait for a lock that another thread held when this child was forked.
    unsafe { libc::syscall(libc::SYS_execve, path, argv, envp) as c_int }
}

/// A guest's arguments with the private monitor's; `None` for everything else libvirt starts.
///
/// # Safety
/// `argv` is NULL or a NULL-terminated list of strings.
unsafe fn with_monitor(argv: *const *const c_char) -> Option<Vec<CString>> {
    if argv.is_null() {
        return None;
    }
    let mut arguments = Vec::new();
    for index in 0..MAX_ARGUMENTS {
        // SAFETY: the list goes on until its NULL.
        let argument = unsafe { *argv.add(index) };
        if argument.is_null() {
            let directory = private_directory(&arguments)?;
            // Read as QEMU's user, who may not be allowed to: only a clear no is one.
            if ferry_host::config().is_ok_and(|config| !config.enabled) {
                return None;
            }
            arguments.extend(monitor(&directory)?);
            return Some(arguments);
        }
        // SAFETY: a string of the list.
        arguments.push(unsafe { CStr::from_ptr(argument) }.to_owned());
    }
    None
}

/// The guest's private directory, from its master key secret; `None` for what is not a guest of libvirt's, the
/// capability probe among them.
fn private_directory(arguments: &[CString]) -> Option<String> {
    let mut pairs = arguments.windows(2).map(|pair| (pair[0].to_bytes(), &pair[1]));
    let named = pairs
        .clone()
        .any(|(option, value)| option == b"-name" && value.to_bytes().starts_with(b"guest="));
    if !named {
        return None;
    }
    pairs.find_map(|(option, value)| {
        let value = (option == b"-object").then(|| value.to_str().ok()).flatten()?;
        let secret: serde_json::Value = serde_json::from_str(value).ok()?;
        let ours = secret.get("qom-type")? == "secret" && secret.get("id")? == "masterKey0";
        let file = secret.get("file")?.as_str().filter(|_| ours)?;
        Some(file.rsplit_once('/')?.0.to_owned())
    })
}

fn monitor(directory: &str) -> Option<[CString; 4]> {
    let path = format!("{directory}/{MONITOR}");
    // QEMU reads a doubled comma as one; a socket's path has room for 107 bytes.
    if path.len() > 107 {
        return None;
    }
    let path = path.replace(',', ",,");
    Some([
        c"-chardev".to_owned(),
        CString::new(format!("socket,id=virt-ferry,path={path},server=on,wait=off")).ok()?,
        c"-mon".to_owned(),
        c"chardev=virt-ferry,id=virt-ferry-monitor,mode=control".to_owned(),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(arguments: &[&str]) -> Vec<CString> {
        arguments
            .iter()
            .map(|argument| CString::new(*argument).unwrap())
            .collect()
    }

    const SECRET: &str = r#"{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-g/master-key.aes"}"#;

    #[test]
    fn a_guest_is_known_by_its_arguments() {
        let guest = list(&[
            "qemu",
            "-name",
            "guest=g,debug-threads=on",
            "-S",
            "-object",
            SECRET,
        ]);
        let directory = private_directory(&guest).unwrap();
        assert_eq!(directory, "/var/lib/libvirt/qemu/domain-1-g");
        let monitor = monitor(&directory).unwrap();
        assert!(monitor[1]
            .to_str()
            .unwrap()
            .contains("path=/var/lib/libvirt/qemu/domain-1-g/virt-ferry-monitor.sock"));
    }

    #[test]
    fn probes_and_others_are_left_alone() {
        assert_eq!(
            private_directory(&list(&["qemu", "-S", "-machine", "none"])),
            None
        );
        assert_eq!(private_directory(&list(&["swtpm", "-object", SECRET])), None);
        assert_eq!(
            private_directory(&list(&["qemu", "-name", "guest=g", "-object", "{"])),
            None
        );
        assert_eq!(private_directory(&list(&[])), None);
        assert!(monitor(&"d".repeat(120)).is_none());
    }
}
