//! The emulated link inside a process: UDP datagrams go through the model of each direction on their
//! way between two sockets on the loopback interface. One thread, one `ppoll`.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeSpec;

use super::link::{Link, LinkConfig, Totals};
use super::spec::{LinkSpec, QueueLimit};

/// Largest datagram that the link takes: Ethernet's 1500 bytes without the headers of IPv4 and UDP.
/// Larger ones are lost, so that a peer which probes for more finds the path that it would find
/// outside.
pub const MAX_DATAGRAM_BYTES: u16 = 1500 - HEADER_BYTES;
/// IPv4 and UDP, which use the line too.
const HEADER_BYTES: u16 = 28;
/// Datagrams taken from a socket before the other one and the clock are looked at again.
const BATCH: usize = 64;
/// What may come while the thread is kept from running: 50 ms of a gigabit.
const SOCKET_BUFFER_BYTES: usize = 6 << 20;

/// The totals of both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RelayTotals {
    /// Towards the address that the relay was made for.
    pub there: Totals,
    /// Back from it.
    pub back: Totals,
}

/// A link that carries datagrams until it is dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    totals: Arc<Mutex<RelayTotals>>,
    cut: Arc<AtomicBool>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// A link to `to`, the same in both directions, with one bandwidth-delay product of queue at each
    /// end. `seed` decides which packets are lost. Whoever sent to [`Self::address`] last is at the
    /// near end.
    ///
    /// # Errors
    /// No socket, event descriptor or thread.
    pub fn start(link: LinkSpec, to: SocketAddr, seed: u64) -> io::Result<Relay> {
        Self::with_queue(link, QueueLimit::Bdp(1), to, seed)
    }

    /// The same with another queue.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn with_queue(
        link: LinkSpec,
        queue: QueueLimit,
        to: SocketAddr,
        seed: u64,
    ) -> io::Result<Relay> {
        let near = socket()?;
        let far = socket()?;
        far.connect(to)?;
        let address = near.local_addr()?;
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let totals = Arc::<Mutex<RelayTotals>>::default();
        let cut = Arc::<AtomicBool>::default();
        let config = LinkConfig {
            rate: link.rate,
            delay: link.round_trip / 2,
            queue_bytes: queue.bytes(link.rate, link.round_trip),
            loss: link.loss,
        };
        let carrier = Carrier {
            near,
            far,
            sender: None,
            there: Link::new(config, seed),
            back: Link::new(config, seed ^ u64::MAX),
            origin: Instant::now(),
            spare: Vec::new(),
            totals: totals.clone(),
            cut: cut.clone(),
            stop: stop.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("emulated link".to_owned())
            .spawn(move || carrier.run())?;
        Ok(Relay { address, totals, cut, stop, thread: Some(thread) })
    }

    /// Where the near end sends to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on every datagram is lost, those on their way too, or no more.
    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }

    /// What has happened so far.
    pub fn totals(&self) -> RelayTotals {
        *self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The thread looks at nothing else for longer than a packet takes.
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

fn socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    // Best effort: only root may have more than the system's limit.
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_BYTES);
    }
    Ok(socket)
}

type Packet = Vec<u8>;

/// The thread's side.
struct Carrier {
    near: UdpSocket,
    far: UdpSocket,
    /// Where answers go.
    sender: Option<SocketAddr>,
    there: Link<Packet>,
    back: Link<Packet>,
    origin: Instant,
    /// Buffers to use again.
    spare: Vec<Packet>,
    totals: Arc<Mutex<RelayTotals>>,
    cut: Arc<AtomicBool>,
    stop: Arc<EventFd>,
}

impl Carrier {
    fn run(mut self) {
        // A wake-up of 50 us too late, the kernel's usual slack, would be four packets at 1 Gbit/s.
        let _ = nix::sys::prctl::set_timerslack(1);
        loop {
            self.take_in();
            self.deliver();
            *self.totals.lock().unwrap_or_else(PoisonError::into_inner) =
                RelayTotals { there: self.there.totals(), back: self.back.totals() };
            let due = [&self.there, &self.back].into_iter().filter_map(Link::next_arrival).min();
            let timeout = due.map(|at| TimeSpec::from(at.saturating_sub(self.origin.elapsed())));
            let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut polled = [self.near.as_fd(), self.far.as_fd(), self.stop.as_fd()].map(readable);
            match ppoll(&mut polled, timeout, None) {
                Ok(_) if polled[2].any() == Some(true) => return,
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!("the emulated link has ended: {error}");
                    return;
                }
            }
        }
    }

    /// Takes what the sockets have.
    fn take_in(&mut self) {
        for _ in 0..BATCH {
            let mut packet = self.buffer();
            // An error is a packet of the past that found nobody: as good as lost.
            let Ok((bytes, from)) = self.near.recv_from(&mut packet) else {
                self.spare.push(packet);
                break;
            };
            self.sender = Some(from);
            offer(&mut self.there, &mut self.spare, self.origin, packet, bytes);
        }
        for _ in 0..BATCH {
            let mut packet = self.buffer();
            let Ok(bytes) = self.far.recv(&mut packet) else {
                self.spare.push(packet);
                break;
            };
            offer(&mut self.back, &mut self.spare, self.origin, packet, bytes);
        }
    }

    /// Hands over what is due. A socket that does not take it loses it, as a network card would.
    fn deliver(&mut self) {
        let now = self.origin.elapsed();
        let cut = self.cut.load(Ordering::Relaxed);
        while let Some(packet) = self.there.arrived(now) {
            if !cut {
                let _ = self.far.send(&packet);
            }
            self.spare.push(packet);
        }
        while let Some(packet) = self.back.arrived(now) {
            if let Some(sender) = self.sender.filter(|_| !cut) {
                let _ = self.near.send_to(&packet, sender);
            }
            self.spare.push(packet);
        }
    }

    /// A buffer in which a datagram that is too large shows.
    fn buffer(&mut self) -> Packet {
        let mut packet = self.spare.pop().unwrap_or_default();
        packet.resize(usize::from(MAX_DATAGRAM_BYTES) + 1, 0);
        packet
    }
}

fn offer(
    link: &mut Link<Packet>,
    spare: &mut Vec<Packet>,
    origin: Instant,
    mut packet: Packet,
    bytes: usize,
) {
    if bytes > usize::from(MAX_DATAGRAM_BYTES) {
        spare.push(packet);
        return;
    }
    packet.truncate(bytes);
    // Refused packets are in the totals; there is no one to tell.
    let _ = link.send(origin.elapsed(), packet, bytes as u32 + u32::from(HEADER_BYTES));
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn ends(link: &str) -> (UdpSocket, UdpSocket, Relay) {
        let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let relay = Relay::start(link.parse().unwrap(), far.local_addr().unwrap(), 1).unwrap();
        let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        near.connect(relay.address()).unwrap();
        for socket in [&near, &far] {
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        (near, far, relay)
    }

    #[test]
    fn a_datagram_takes_the_delay_in_each_direction() {
        let (near, far, relay) = ends("100Mbit,40ms");
        let mut buffer = [0; 100];
        let started = Instant::now();
        near.send(b"question").unwrap();
        let (bytes, from) = far.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..bytes], b"question");
        assert!(started.elapsed() >= Duration::from_millis(20), "{:?}", started.elapsed());
        far.send_to(b"answer", from).unwrap();
        let bytes = near.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..bytes], b"answer");
        assert!(started.elapsed() >= Duration::from_millis(40), "{:?}", started.elapsed());
        assert_eq!(relay.totals().there.delivered_bytes, 8 + 28);
    }

    #[test]
    fn the_rate_is_kept() {
        let (near, far, _relay) = ends("8Mbit,20ms");
        let (datagrams, payload) = (10, [7; 972]);
        let started = Instant::now();
        for _ in 0..datagrams {
            near.send(&payload).unwrap();
        }
        let mut buffer = [0; 2000];
        for _ in 0..datagrams {
            assert_eq!(far.recv(&mut buffer).unwrap(), payload.len());
        }
        // 1000 bytes with headers are a millisecond of 8 Mbit/s.
        assert!(started.elapsed() >= Duration::from_millis(10 + 10), "{:?}", started.elapsed());
    }

    #[test]
    fn a_cut_link_loses_everything_until_it_is_mended() {
        let (near, far, relay) = ends("100Mbit,1ms");
        relay.cut(true);
        near.send(b"lost").unwrap();
        while relay.totals().there.delivered_packets == 0 {
            std::thread::yield_now();
        }
        relay.cut(false);
        near.send(b"carried").unwrap();
        let mut buffer = [0; 100];
        let bytes = far.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..bytes], b"carried");
    }

    #[test]
    fn a_datagram_beyond_ethernet_is_lost_and_the_next_one_is_not() {
        let (near, far, _relay) = ends("100Mbit,1ms");
        near.send(&[1; MAX_DATAGRAM_BYTES as usize + 1]).unwrap();
        near.send(&[2; MAX_DATAGRAM_BYTES as usize]).unwrap();
        let mut buffer = [0; 2000];
        assert_eq!(far.recv(&mut buffer).unwrap(), usize::from(MAX_DATAGRAM_BYTES));
        assert_eq!(buffer[0], 2);
    }
}
