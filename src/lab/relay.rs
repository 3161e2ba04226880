//! The emulated link inside a process: UDP datagrams go through the model of each direction on their
//! way between two sockets on the loopback interface. One thread, one `ppoll`.
//!
//! In the model each datagram is a packet of its own. The sockets take and give those that come together in one
//! call, so that the link costs little beside the two ends that it joins.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use quinn::udp::EcnCodepoint;

pub(super) use self::end::hold_received;
use self::end::{Datagram, End, Row, Rows};
use super::link::{Link, LinkConfig, Totals};
use super::moderation::Moderation;
use super::spec::{LinkSpec, QueueLimit};

mod end;

/// Largest datagram that the link takes: Ethernet's 1500 bytes without the headers of IPv4 and UDP.
/// Larger ones are lost, so that a peer which probes for more finds the path that it would find
/// outside.
pub const MAX_DATAGRAM_BYTES: u16 = 1500 - HEADER_BYTES;
/// IPv4 and UDP, which use the line too.
const HEADER_BYTES: u16 = 28;

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
        let near = End::bind()?;
        let far = End::bind()?;
        let address = near.address()?;
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
            to,
            there: Direction::new(config, seed),
            back: Direction::new(config, seed ^ u64::MAX),
            origin: Instant::now(),
            rows: Rows::new(),
            row: Row::default(),
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

/// One direction of the link, and when its far end is shown what has arrived.
struct Direction {
    link: Link<Datagram>,
    moderation: Moderation,
}

impl Direction {
    fn new(config: LinkConfig, seed: u64) -> Self {
        Direction { link: Link::new(config, seed), moderation: Moderation::default() }
    }

    fn next_delivery(&self) -> Option<Duration> {
        self.moderation.next_delivery(&self.link)
    }

    fn offer(
        &mut self,
        now: Duration,
        payload: &[u8],
        ecn: Option<EcnCodepoint>,
        spare: &mut Vec<Datagram>,
    ) {
        if payload.len() > usize::from(MAX_DATAGRAM_BYTES) {
            return;
        }
        let mut datagram = spare.pop().unwrap_or_default();
        datagram.payload.clear();
        datagram.payload.extend_from_slice(payload);
        datagram.ecn = ecn;
        // Refused datagrams are in the totals; there is no one to tell.
        let _ = self.link.send(now, datagram, payload.len() as u32 + u32::from(HEADER_BYTES));
    }

    /// Hands over what is due, in rows of at most `max_row`.
    fn deliver(
        &mut self,
        now: Duration,
        max_row: usize,
        row: &mut Row,
        spare: &mut Vec<Datagram>,
        send: impl Fn(&Row),
    ) {
        if !self.moderation.delivers(&self.link, now) {
            return;
        }
        while let Some(datagram) = self.link.arrived(now) {
            if !row.has_room_for(&datagram, max_row) {
                send(row);
                row.clear();
            }
            row.push(&datagram);
            spare.push(datagram);
        }
        if !row.is_empty() {
            send(row);
            row.clear();
        }
    }
}

/// The thread's side.
struct Carrier {
    near: End,
    far: End,
    /// Where answers go.
    sender: Option<SocketAddr>,
    /// Where all else goes.
    to: SocketAddr,
    there: Direction,
    back: Direction,
    origin: Instant,
    rows: Rows,
    row: Row,
    /// Datagrams whose memory is used again.
    spare: Vec<Datagram>,
    totals: Arc<Mutex<RelayTotals>>,
    cut: Arc<AtomicBool>,
    stop: Arc<EventFd>,
}

impl Carrier {
    fn run(mut self) {
        // A wake-up of 50 us too late, the kernel's usual slack, would be four packets at 1 Gbit/s.
        let _ = nix::sys::prctl::set_timerslack(1);
        loop {
            self.deliver();
            *self.totals.lock().unwrap_or_else(PoisonError::into_inner) =
                RelayTotals { there: self.there.link.totals(), back: self.back.link.totals() };
            let due = [&self.there, &self.back].into_iter().filter_map(Direction::next_delivery);
            let timeout =
                due.min().map(|at| TimeSpec::from(at.saturating_sub(self.origin.elapsed())));
            let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut polled = [self.near.as_fd(), self.far.as_fd(), self.stop.as_fd()].map(readable);
            match ppoll(&mut polled, timeout, None) {
                Ok(_) if polled[2].any() == Some(true) => return,
                Ok(_) => {
                    let has = polled.map(|polled| polled.any() == Some(true));
                    self.take_in(has[0], has[1]);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!("the emulated link has ended: {error}");
                    return;
                }
            }
        }
    }

    /// Takes what those sockets have that have something.
    fn take_in(&mut self, near_has: bool, far_has: bool) {
        let Carrier { near, far, sender, to, there, back, origin, rows, spare, .. } = self;
        if near_has {
            near.receive(rows, |payload, ecn, from| {
                *sender = Some(from);
                there.offer(origin.elapsed(), payload, ecn, spare);
            });
        }
        if far_has {
            far.receive(rows, |payload, ecn, from| {
                if from == *to {
                    back.offer(origin.elapsed(), payload, ecn, spare);
                }
            });
        }
    }

    /// Hands over what is due.
    fn deliver(&mut self) {
        let now = self.origin.elapsed();
        let cut = self.cut.load(Ordering::Relaxed);
        let Carrier { near, far, sender, to, there, back, row, spare, .. } = self;
        there.deliver(now, far.max_row(), row, spare, |row| {
            if !cut {
                far.send(row, *to);
            }
        });
        back.deliver(now, near.max_row(), row, spare, |row| {
            if let Some(sender) = sender.filter(|_| !cut) {
                near.send(row, sender);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};

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
