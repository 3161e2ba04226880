//! Network interfaces: an address, and up.

#![allow(unsafe_code)]

use std::mem::zeroed;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Ups the loopback interface, to which the kernel itself gives its address.
pub(crate) fn up_loopback() -> Result<(), String> {
    Interface::named("lo")?.up()
}

/// Gives an interface its address, with prefix 24, and ups it.
pub(crate) fn set_address(name: &str, address: Ipv4Addr) -> Result<(), String> {
    let mut interface = Interface::named(name)?;
    interface.request.ifr_ifru.ifru_addr = as_sockaddr(address);
    interface.ioctl(libc::SIOCSIFADDR, "set the address")?;
    interface.request.ifr_ifru.ifru_addr = as_sockaddr(Ipv4Addr::new(255, 255, 255, 0));
    interface.ioctl(libc::SIOCSIFNETMASK, "set the mask")?;
    interface.up()
}

struct Interface<'a> {
    name: &'a str,
    socket: OwnedFd,
    request: libc::ifreq,
}

impl<'a> Interface<'a> {
    fn named(name: &'a str) -> Result<Self, String> {
        // SAFETY: creates a descriptor, or fails.
        let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) };
        let socket = owned(raw, "socket")?;
        // SAFETY: all-zero bytes are a valid ifreq.
        let mut request: libc::ifreq = unsafe { zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        Ok(Interface { name, socket, request })
    }

    fn up(mut self) -> Result<(), String> {
        self.request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        self.ioctl(libc::SIOCSIFFLAGS, "up")
    }

    fn ioctl(&self, code: u64, what: &str) -> Result<(), String> {
        // SAFETY: the three requests take an ifreq with a name, which lives through the call.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), code as _, &self.request) };
        check(result, &format!("{what} of {}", self.name))
    }
}

pub(crate) fn as_sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all-zero bytes are a valid sockaddr.
    let mut raw: libc::sockaddr = unsafe { zeroed() };
    raw.sa_family = libc::AF_INET as u16;
    // sockaddr_in: two bytes of port, then the address in network order.
    for (to, from) in raw.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    raw
}

pub(crate) fn owned(raw: libc::c_int, what: &str) -> Result<OwnedFd, String> {
    check(raw.min(0), what)?;
    // SAFETY: the kernel has just given us this descriptor; no one else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

pub(crate) fn check(result: libc::c_int, what: &str) -> Result<(), String> {
    if result < 0 {
        return Err(format!("{what}: {}", std::io::Error::last_os_error()));
    }
    Ok(())
}
