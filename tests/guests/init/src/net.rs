//! One NIC, one static address.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use ferry_guest::config::Address;

/// The driver finds its device in a thread of the kernel's: how long that may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Gives `interface` its address and sets it up, waiting for the interface to appear.
pub fn bring_up(interface: &str, address: Address) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    while fs::metadata(format!("/sys/class/net/{interface}")).is_err() {
        if Instant::now() > deadline {
            return Err(format!("ferry.ip is set, but there is no {interface}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|error| format!("cannot open a socket: {error}"))?;
    let fd = socket.as_raw_fd();
    let failed = |what: &str, error: std::io::Error| format!("cannot set {interface}'s {what}: {error}");
    set_address(fd, interface, libc::SIOCSIFADDR, address.ip).map_err(|error| failed("address", error))?;
    set_address(fd, interface, libc::SIOCSIFNETMASK, address.mask())
        .map_err(|error| failed("netmask", error))?;
    set_address(fd, interface, libc::SIOCSIFBRDADDR, address.broadcast())
        .map_err(|error| failed("broadcast address", error))?;
    set_up(fd, interface).map_err(|error| failed("flags", error))
}

/// An empty request about `interface`; netdevice(7).
fn request(interface: &str) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid ifreq, a C structure of integers and arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte less than there is room for: the name ends with a zero.
    let room = request.ifr_name.len() - 1;
    for (target, byte) in request.ifr_name[..room].iter_mut().zip(interface.bytes()) {
        *target = byte as libc::c_char;
    }
    request
}

fn set_address(fd: RawFd, interface: &str, code: libc::Ioctl, ip: Ipv4Addr) -> std::io::Result<()> {
    let mut request = request(interface);
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from(ip).to_be(),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: sockaddr and sockaddr_in have the same size, and both are plain data.
    request.ifr_ifru.ifru_addr = unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) };
    control(fd, code, &mut request)
}

fn set_up(fd: RawFd, interface: &str) -> std::io::Result<()> {
    let mut request = request(interface);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    control(fd, libc::SIOCSIFFLAGS, &mut request)
}

fn control(fd: RawFd, code: libc::Ioctl, request: &mut libc::ifreq) -> std::io::Result<()> {
    // SAFETY: each of the SIOCSIF* codes used here reads one ifreq, which lives through the call.
    match unsafe { libc::ioctl(fd, code, request) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
