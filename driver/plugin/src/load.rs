//! What happens when the daemon loads the plug-in: almost nothing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

const NAME: &[u8] = b"libvirt_driver_ferry.so";

/// Run by the dynamic linker before the daemon's `main`, while the process has one thread.
#[used]
#[link_section = ".init_array"]
static CONSTRUCTOR: extern "C" fn() = {
    extern "C" fn leave_the_environment() {
        // A panic must not cross the border, and an environment that stays as it is does little harm.
        let _ = std::panic::catch_unwind(|| {
            let Some(list) = std::env::var_os("LD_PRELOAD") else {
                return;
            };
            match without_us(list.as_bytes()) {
                rest if rest.is_empty() => std::env::remove_var("LD_PRELOAD"),
                rest => std::env::set_var("LD_PRELOAD", OsStr::from_bytes(&rest)),
            }
        });
    }
    leave_the_environment
};

/// A preload list without the plug-in: libvirt passes LD_PRELOAD on to QEMU, its probes and hooks, none of which
/// may load us (libvirt 11.3, `virCommandAddEnvPassCommon`).
fn without_us(list: &[u8]) -> Vec<u8> {
    let entries = list
        .split(|byte| matches!(byte, b':' | b' '))
        .filter(|entry| !entry.is_empty());
    let kept: Vec<&[u8]> = entries
        .filter(|entry| entry.rsplit(|byte| *byte == b'/').next() != Some(NAME))
        .collect();
    kept.join(&b':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_we_leave_the_list() {
        assert_eq!(without_us(b"/usr/lib/virt-ferry/libvirt_driver_ferry.so"), b"");
        assert_eq!(
            without_us(b"libjemalloc.so.2:/a/libvirt_driver_ferry.so /b/c.so"),
            b"libjemalloc.so.2:/b/c.so"
        );
        assert_eq!(
            without_us(b"/x/not_libvirt_driver_ferry.so.1"),
            b"/x/not_libvirt_driver_ferry.so.1"
        );
        assert_eq!(without_us(b""), b"");
    }
}
