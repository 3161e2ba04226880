//! A streaming server: 25 frames a second to a client outside of the guest, out of a media library in memory, which new
//! recordings overwrite all the time.
//!
//! The library is the working set. Frame N is its pages `N * 8` to `N * 8 + 7`, from the first again after the last:
//! 32 KiB, so 6.6 Mbit/s. It leaves by UDP as [`PARTS`] datagrams to port [`PORT`] of the host, each with this header,
//! little endian, and then its part of the frame:
//!
//! | bytes | content |
//! |---|---|
//! | 0..4 | number of the frame |
//! | 4..6 | which part |
//! | 6..8 | how many there are |
//!
//! Each page has its index and a checksum ([`crate::memory`]), so the client can tell whether it has got the right frame,
//! and a whole one. Meanwhile half pages at random places are written anew, as of [`crate::work::Pattern::Half`].
//!
//! The thread of the work sends too, so a page that it waits for holds the stream up. What is overdue is sent at once.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use crate::boot::wait_for_device;
use crate::interface::set_address;
use crate::memory::WorkingSet;
use crate::params::{PAGE_BYTES, Params};
use crate::work::{PageWork, Progress, Work, timed};

/// RTP's, by custom.
const PORT: u16 = 5004;
const FRAME_EVERY: Duration = Duration::from_millis(40);
const PAGES: usize = 8;
/// Fits into an Ethernet frame, with its headers.
const PART_BYTES: usize = 1024;
const FRAME_BYTES: usize = PAGES * PAGE_BYTES as usize;
const PARTS: usize = FRAME_BYTES / PART_BYTES;
/// How often it is looked whether a part can leave: a frame that is late is later by no more than that.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Frames that are overdue by more are left out.
const MAX_LATE: Duration = Duration::from_secs(1);

/// Work on a media library, and a server that streams from it.
pub(crate) struct StreamWork {
    library: PageWork,
    server: Server,
}

impl StreamWork {
    /// With an open socket.
    pub(crate) fn start(params: &Params, library: PageWork) -> Result<Self, String> {
        wait_for_device("/sys/class/net/eth0")?;
        set_address("eth0", params.address)?;
        let socket = UdpSocket::bind((params.address, 0)).map_err(|e| format!("UDP: {e}"))?;
        socket.set_nonblocking(true).map_err(|e| format!("UDP: {e}"))?;
        Ok(StreamWork { library, server: Server::new(socket, params.host, Instant::now()) })
    }
}

impl Work for StreamWork {
    fn operate(&mut self, count: u64) -> Result<(), String> {
        self.library.operate(count)
    }

    fn verify_next(&mut self, count: u64) -> Result<(), String> {
        self.library.verify_next(count)
    }

    fn keep_up(&mut self, now: Instant) -> Duration {
        self.server.keep_up(now, self.library.set());
        LOOK_EVERY
    }

    fn verify_anew(&mut self) {
        self.library.verify_anew();
    }

    fn progress(&self) -> &Progress {
        self.library.progress()
    }
}

/// What is sent, and when.
struct Server {
    socket: UdpSocket,
    client: Ipv4Addr,
    begin: Instant,
    /// The frame that is not sent yet, or not all of it.
    number: u32,
    /// Its next part; [`PARTS`] when it is not due yet.
    part: usize,
    frame: Vec<u8>,
}

impl Server {
    fn new(socket: UdpSocket, client: Ipv4Addr, begin: Instant) -> Self {
        let frame = Vec::with_capacity(FRAME_BYTES);
        Server { socket, client, begin, number: 0, part: PARTS, frame }
    }

    /// Sends what is due, one frame at most, as far as the socket takes it.
    fn keep_up(&mut self, now: Instant, library: &WorkingSet) {
        if self.part == PARTS {
            let latest = (now - self.begin).as_nanos() / FRAME_EVERY.as_nanos();
            let latest = u32::try_from(latest).unwrap_or(u32::MAX);
            let max_late = (MAX_LATE.as_nanos() / FRAME_EVERY.as_nanos()) as u32;
            self.number = self.number.max(latest.saturating_sub(max_late));
            if self.number > latest {
                return;
            }
            self.take_frame(library);
        }
        while self.part < PARTS {
            let sent = self.socket.send_to(&self.datagram(), (self.client, PORT));
            if sent.is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
                return;
            }
            // Any other error loses a part, as a network does.
            self.part += 1;
        }
        self.number += 1;
    }

    /// All of it at once: what is written until the last part is sent belongs to later frames.
    fn take_frame(&mut self, library: &WorkingSet) {
        self.frame.clear();
        let mut index = self.number as usize * PAGES;
        timed(PAGES as u64, || {
            library.read(index % library.len(), &mut self.frame);
            index += 1;
        });
        self.part = 0;
    }

    fn datagram(&self) -> Vec<u8> {
        let mut datagram = Vec::with_capacity(8 + PART_BYTES);
        datagram.extend(self.number.to_le_bytes());
        datagram.extend((self.part as u16).to_le_bytes());
        datagram.extend((PARTS as u16).to_le_bytes());
        datagram.extend_from_slice(&self.frame[self.part * PART_BYTES..][..PART_BYTES]);
        datagram
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Fill;

    #[test]
    fn a_frame_leaves_when_it_is_due_and_is_the_pages_of_its_number() {
        let library = WorkingSet::filled(20, Fill::Text, 1).unwrap();
        let socket = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let begin = Instant::now();
        let mut server = Server::new(socket(), Ipv4Addr::LOCALHOST, begin);
        let sent = |server: &mut Server, ms| {
            server.keep_up(begin + Duration::from_millis(ms), &library);
            (server.number, server.frame.clone())
        };
        let pages = |indices: &[usize]| {
            let mut bytes = Vec::new();
            indices.iter().for_each(|index| library.read(*index, &mut bytes));
            bytes
        };
        assert_eq!(sent(&mut server, 0), (1, pages(&[0, 1, 2, 3, 4, 5, 6, 7])));
        assert_eq!(sent(&mut server, 39).0, 1);
        assert_eq!(sent(&mut server, 80).0, 2);
        assert_eq!(sent(&mut server, 80), (3, pages(&[16, 17, 18, 19, 0, 1, 2, 3])));
        assert_eq!(sent(&mut server, 80).0, 3);
        // What is a second late and less.
        assert_eq!(sent(&mut server, 4000).0, 100 - 25 + 1);
    }

    #[test]
    fn a_datagram_says_what_it_is_a_part_of() {
        let library = WorkingSet::filled(16, Fill::Text, 1).unwrap();
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut server = Server::new(socket, Ipv4Addr::LOCALHOST, Instant::now());
        (server.number, server.part) = (0x0102_0301, 5);
        server.take_frame(&library);
        server.part = 5;
        let datagram = server.datagram();
        assert_eq!(datagram[..8], [1, 3, 2, 1, 5, 0, 32, 0]);
        let mut page = Vec::new();
        // Frame 0x01020301 begins with page 8 of 16.
        library.read(9, &mut page);
        assert_eq!(datagram[8..], page[1024..2048]);
    }
}
