//! Use of the virtio devices, all the time: a migration must not lose what is in their queues.
//!
//! Each device has a thread, that stops at nothing but says what failed:
//! * network: an ICMP echo request each 20 ms, and its answer;
//! * disk (`/dev/vda`, overwritten): a 4 KiB block with new content is written, and read back, past
//!   the page cache;
//! * random numbers (`/dev/hwrng`): 64 bytes each 10 ms.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::boot::wait_for_device;
use crate::console::say;
use crate::interface::{as_sockaddr, check, owned, set_address};
use crate::params::Params;
use crate::random::Random;

/// What the devices have done so far.
#[derive(Default)]
pub(crate) struct Activity {
    pings_sent: AtomicU64,
    pings_answered: AtomicU64,
    blocks: AtomicU64,
    random_bytes: AtomicU64,
    errors: AtomicU64,
}

impl fmt::Display for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sent, answered) = (self.pings_sent.load(Relaxed), self.pings_answered.load(Relaxed));
        let (blocks, bytes) = (self.blocks.load(Relaxed), self.random_bytes.load(Relaxed));
        let errors = self.errors.load(Relaxed);
        write!(f, "net {sent} {answered} blk {blocks} rng {bytes} errors {errors}")
    }
}

/// Waits for the devices and starts the threads.
pub(crate) fn start(params: &Params) -> Result<Arc<Activity>, String> {
    for path in ["/sys/class/net/eth0", "/dev/vda", "/dev/hwrng"] {
        wait_for_device(path)?;
    }
    let activity = Arc::new(Activity::default());
    let (address, host, seed) = (params.address, params.host, params.seed);
    spawn(&activity, "net", move |activity| use_network(address, host, activity));
    spawn(&activity, "blk", move |activity| use_disk(seed, activity));
    spawn(&activity, "rng", use_random_numbers);
    Ok(activity)
}

fn spawn(
    activity: &Arc<Activity>,
    name: &'static str,
    run: impl FnOnce(&Activity) -> Result<(), String> + Send + 'static,
) {
    let activity = Arc::clone(activity);
    std::thread::spawn(move || {
        if let Err(error) = run(&activity) {
            activity.errors.fetch_add(1, Relaxed);
            say!("io {name} failed: {error}");
        }
    });
}

fn use_disk(seed: u64, activity: &Activity) -> Result<(), String> {
    const BLOCK: usize = 4096;
    #[repr(align(4096))]
    struct Aligned([u8; BLOCK]);

    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open("/dev/vda")
        .map_err(|e| format!("/dev/vda: {e}"))?;
    let sectors = std::fs::read_to_string("/sys/class/block/vda/size").unwrap_or_default();
    let blocks = sectors.trim().parse::<u64>().unwrap_or(0) / 8;
    if blocks == 0 {
        return Err("/dev/vda is empty".to_owned());
    }
    let mut random = Random::new(seed);
    let (mut written, mut read) = (Aligned([0; BLOCK]), Aligned([0; BLOCK]));
    loop {
        written.0.fill_with(|| random.next() as u8);
        let at = random.below(blocks) * BLOCK as u64;
        disk.write_all_at(&written.0, at).map_err(|e| format!("write at {at}: {e}"))?;
        disk.read_exact_at(&mut read.0, at).map_err(|e| format!("read at {at}: {e}"))?;
        if read.0 != written.0 {
            activity.errors.fetch_add(1, Relaxed);
            say!("CORRUPT disk block at {at}");
        }
        activity.blocks.fetch_add(1, Relaxed);
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn use_random_numbers(activity: &Activity) -> Result<(), String> {
    let mut device = File::open("/dev/hwrng").map_err(|e| format!("/dev/hwrng: {e}"))?;
    let mut bytes = [0; 64];
    loop {
        device.read_exact(&mut bytes).map_err(|e| format!("/dev/hwrng: {e}"))?;
        activity.random_bytes.fetch_add(bytes.len() as u64, Relaxed);
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn use_network(address: Ipv4Addr, host: Ipv4Addr, activity: &Activity) -> Result<(), String> {
    set_address("eth0", address)?;
    let socket = ping_socket(host)?;
    let mut sequence = 0u16;
    loop {
        sequence = sequence.wrapping_add(1);
        let request = echo_request(sequence);
        // The neighbour may be unknown for a moment; what counts is that answers go on.
        // SAFETY: a buffer and its length.
        let sent =
            unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
        activity.pings_sent.fetch_add(u64::from(sent > 0), Relaxed);
        let mut buffer = [0u8; 256];
        // SAFETY: a buffer and its length.
        let got =
            unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        activity.pings_answered.fetch_add(u64::from(got > 0), Relaxed);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A raw ICMP socket to one host, which waits 100 ms for an answer.
fn ping_socket(to: Ipv4Addr) -> Result<OwnedFd, String> {
    // SAFETY: creates a descriptor, or fails.
    let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP) };
    let socket = owned(raw, "raw socket")?;
    let address = as_sockaddr(to);
    let timeout = libc::timeval { tv_sec: 0, tv_usec: 100_000 };
    // SAFETY: addresses of values that live through the calls, with their sizes.
    let (connected, timed) = unsafe {
        (
            libc::connect(socket.as_raw_fd(), &address, size_of::<libc::sockaddr>() as u32),
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const timeout).cast(),
                size_of::<libc::timeval>() as u32,
            ),
        )
    };
    check(connected, "connect")?;
    check(timed, "set the timeout")?;
    Ok(socket)
}

/// RFC 792: type 8, code 0, checksum, identifier, sequence number, data.
fn echo_request(sequence: u16) -> [u8; 16] {
    let mut packet = [8, 0, 0, 0, 0xfa, 0x41, 0, 0, b'f', b'a', b'r', b'f', b'a', b'u', b'l', b't'];
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    let sum: u32 = packet.chunks_exact(2).map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_request_sums_up_to_ones() {
        for sequence in [0, 1, 0xff, 0xffff] {
            let words = echo_request(sequence);
            let sum: u32 =
                words.chunks_exact(2).map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        }
    }
}
