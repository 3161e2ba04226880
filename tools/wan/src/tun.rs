//! A TUN device: IP packets of one network namespace, read and written as a file.

#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use crate::netns::Netns;
use crate::offload::OFFLOAD_HEADER_BYTES;

/// The largest packet, without any link-layer header: Ethernet's.
const MTU_BYTES: usize = 1500;

/// The most that one read brings: the longest row of packets that IP has a length for, with the offload header.
pub const MAX_READ_BYTES: usize = OFFLOAD_HEADER_BYTES + (64 << 10);

/// What the kernel is told that we can do: packets without checksums, and rows of packets of TCP and UDP. Linux
/// before 6.2 does not know rows of UDP. What it does not know, it does itself, a packet at a time.
const OFFLOADS: [libc::c_uint; 2] = [TCP_ROWS | libc::TUN_F_USO4 | libc::TUN_F_USO6, TCP_ROWS];
const TCP_ROWS: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

/// Packets that the kernel keeps for us while we do not read: for a scheduling delay of some
/// milliseconds at 1 Gbit/s. In the long run the emulator's own queue is the only one.
const KERNEL_QUEUE_PACKETS: &str = "2000";

nix::ioctl_write_ptr_bad!(
    /// Gives a descriptor of `/dev/net/tun` its device.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);

nix::ioctl_write_int_bad!(
    /// Tells the kernel what may be left to us.
    tun_set_offload,
    libc::TUNSETOFFLOAD
);

/// One open TUN device; it disappears with this value.
#[derive(Debug)]
pub struct Tun {
    file: OwnedFd,
}

impl Tun {
    /// Makes the device `name` in a namespace, with an address like `10.0.0.1/30`, and ups it.
    pub fn open(netns: &Netns, name: &str, address: &str) -> Result<Self> {
        ensure!(
            !name.is_empty() && name.len() < libc::IFNAMSIZ && name.is_ascii(),
            "{name:?} is no name for a network device: at most 15 ASCII characters"
        );
        let owned_name = name.to_owned();
        let file = netns.open_inside(move || open_device(&owned_name))?;
        netns.ip(&["link", "set", name, "mtu", &MTU_BYTES.to_string()])?;
        netns.ip(&["link", "set", name, "txqueuelen", KERNEL_QUEUE_PACKETS])?;
        netns.ip(&["address", "add", address, "dev", name])?;
        netns.ip(&["link", "set", name, "up"])?;
        Ok(Tun { file })
    }

    /// Takes the next packet or row of packets that the namespace sends, with an offload header; `None` when
    /// there is none now.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        match nix::unistd::read(&self.file, buffer) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(error) => Err(error).context("read from the TUN device"),
        }
    }

    /// Hands a packet or a row of packets to the namespace: an offload header, and the rest. False when the kernel
    /// refused it: as good as lost.
    pub fn deliver(&self, headers: &[u8], rest: &[u8]) -> bool {
        nix::sys::uio::writev(&self.file, &[IoSlice::new(headers), IoSlice::new(rest)]).is_ok()
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open_device(name: &str) -> Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .context("open /dev/net/tun; is the kernel module `tun` loaded, and are you root?")?;
    // SAFETY: all-zero bytes are a valid ifreq: it has only integers and addresses of integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open, and the request, whose name ends with a zero byte since it was
    // checked to be shorter than the field, outlives the call.
    unsafe { tun_set_iff(file.as_raw_fd(), &request) }
        .with_context(|| format!("make the TUN device {name}"))?;
    for offloads in OFFLOADS {
        // SAFETY: the descriptor is open, and the call takes no pointer.
        if unsafe { tun_set_offload(file.as_raw_fd(), offloads as libc::c_int) }.is_ok() {
            break;
        }
    }
    Ok(file.into())
}
