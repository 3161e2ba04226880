//! The UDP socket: wide buffers, and a hard cap on what leaves it.
//!
//! The cap sits below QUIC, so it holds for everything: retransmissions, acknowledgements and headers.
//! A connection that meets it keeps its data, and picks by priority what goes next when the cap opens.

use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn6, setsockopt, sockopt};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime, UdpPoller,
};

use super::TransportOptions;
use super::addresses::header_bytes;
use super::batches::{BatchingRuntime, BatchingSocket};
use super::quic::MAX_PAYLOAD_BYTES;

/// What may leave at once when the cap was not used up.
const BURST: Duration = Duration::from_millis(2);
const ETHERNET_BYTES: usize = 1_500;

/// A hard cap on what leaves by all sockets that have it; clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Cap {
    bytes_per_s: u64,
    bucket: Arc<Mutex<Bucket>>,
}

impl Cap {
    /// The one that the options ask for.
    pub(super) fn of(options: &TransportOptions) -> Option<Self> {
        let bytes_per_s = options.bandwidth_limit_bytes_per_s?;
        let bucket = Arc::new(Mutex::new(Bucket::new(bytes_per_s, Instant::now())));
        Some(Cap { bytes_per_s, bucket })
    }
}

/// A QUIC endpoint on `address`. Must be called within a tokio runtime.
pub(super) fn endpoint(
    address: SocketAddr,
    server: Option<ServerConfig>,
    options: &TransportOptions,
    cap: Option<Cap>,
) -> io::Result<Endpoint> {
    let socket = if server.is_some() { bind(address) } else { UdpSocket::bind(address) }?;
    widen(&socket, options.socket_buffer_bytes);
    let mut endpoint_config = EndpointConfig::default();
    endpoint_config.max_udp_payload_size(MAX_PAYLOAD_BYTES).expect("between 1200 and 65527");
    let batching = BatchingSocket::new(TokioRuntime.wrap_udp_socket(socket)?);
    let runtime = Arc::new(BatchingRuntime::new(batching.clone()));
    let socket: Arc<dyn AsyncUdpSocket> = match cap {
        Some(cap) => Arc::new(CappedSocket::new(batching, cap)),
        None => batching,
    };
    Endpoint::new_with_abstract_socket(endpoint_config, server, socket, runtime)
}

/// A listener's socket. One at the wildcard of IPv6 takes IPv4 too, whatever this host's default (`bindv6only`) is; on a host without
/// IPv6 it is one of IPv4 alone.
fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => {
            with_or_without_ipv6(bind_both(v6), v6.port())
        }
        _ => UdpSocket::bind(address),
    }
}

fn bind_both(address: SocketAddrV6) -> io::Result<UdpSocket> {
    let (family, flags) = (AddressFamily::Inet6, SockFlag::SOCK_CLOEXEC);
    let socket = nix::sys::socket::socket(family, SockType::Datagram, flags, None)?;
    setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &SockaddrIn6::from(address))?;
    Ok(socket.into())
}

fn with_or_without_ipv6(bound: io::Result<UdpSocket>, port: u16) -> io::Result<UdpSocket> {
    let lacks_ipv6 = |error: &io::Error| {
        [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL].map(Some).contains(&error.raw_os_error())
    };
    match bound {
        Err(error) if lacks_ipv6(&error) => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)),
        bound => bound,
    }
}

/// Best effort: root gets what it asks for, others what the system's limit lets them have.
fn widen(socket: &UdpSocket, bytes: usize) {
    let forced = setsockopt(socket, sockopt::RcvBufForce, &bytes)
        .and_then(|()| setsockopt(socket, sockopt::SndBufForce, &bytes));
    if forced.is_err() {
        let asked = setsockopt(socket, sockopt::RcvBuf, &bytes)
            .and_then(|()| setsockopt(socket, sockopt::SndBuf, &bytes));
        if let Err(error) = asked {
            tracing::warn!(%error, "the socket keeps its default buffers");
        }
    }
}

/// A token bucket whose level may become negative by one batch, which then is waited for.
#[derive(Debug)]
struct Bucket {
    rate_bytes_per_s: f64,
    burst_bytes: f64,
    level_bytes: f64,
    filled: Instant,
}

impl Bucket {
    fn new(rate_bytes_per_s: u64, now: Instant) -> Self {
        let rate = rate_bytes_per_s.max(1) as f64;
        let burst_bytes = (rate * BURST.as_secs_f64()).max(ETHERNET_BYTES as f64);
        Bucket { rate_bytes_per_s: rate, burst_bytes, level_bytes: burst_bytes, filled: now }
    }

    /// How long until something may be sent; `None` means now.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.level_bytes =
            (self.level_bytes + elapsed * self.rate_bytes_per_s).min(self.burst_bytes);
        let missing = -self.level_bytes;
        (missing > 0.0).then(|| Duration::from_secs_f64(missing / self.rate_bytes_per_s))
    }

    fn take(&mut self, bytes: u64) {
        self.level_bytes -= bytes as f64;
    }
}

#[derive(Debug)]
struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    bucket: Arc<Mutex<Bucket>>,
    burst_bytes: usize,
    /// The largest datagram that was sent.
    datagram_bytes: AtomicUsize,
}

impl CappedSocket {
    fn new(inner: Arc<dyn AsyncUdpSocket>, cap: Cap) -> Self {
        let burst_bytes = (cap.bytes_per_s as f64 * BURST.as_secs_f64()) as usize;
        CappedSocket {
            inner,
            bucket: cap.bucket,
            burst_bytes,
            datagram_bytes: ETHERNET_BYTES.into(),
        }
    }
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(CappedPoller {
            bucket: self.bucket.clone(),
            inner: self.inner.clone().create_io_poller(),
            sleep: None,
        })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        if bucket.wait(Instant::now()).is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.inner.try_send(transmit)?;
        let size = transmit.contents.len();
        let datagram_bytes = transmit.segment_size.unwrap_or(size).max(1);
        self.datagram_bytes.fetch_max(datagram_bytes, Ordering::Relaxed);
        let segments = size.div_ceil(datagram_bytes);
        bucket.take(size as u64 + segments as u64 * header_bytes(transmit.destination.ip()));
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        // A batch must be short in time as well, or a fault reply would wait behind it.
        let in_time = self.burst_bytes / self.datagram_bytes.load(Ordering::Relaxed);
        in_time.clamp(1, self.inner.max_transmit_segments())
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

struct CappedPoller {
    bucket: Arc<Mutex<Bucket>>,
    inner: Pin<Box<dyn UdpPoller>>,
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl fmt::Debug for CappedPoller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CappedPoller").finish_non_exhaustive()
    }
}

impl UdpPoller for CappedPoller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(sleep) = &mut self.sleep {
                ready!(sleep.as_mut().poll(cx));
                self.sleep = None;
            }
            let wait = {
                let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
                bucket.wait(Instant::now())
            };
            match wait {
                Some(wait) => self.sleep = Some(Box::pin(tokio::time::sleep(wait))),
                None => return self.inner.as_mut().poll_writable(cx),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wildcard_takes_ipv4_with_and_without_ipv6() {
        let without = io::Error::from_raw_os_error(libc::EAFNOSUPPORT);
        let sockets = [bind("[::]:0".parse().unwrap()), with_or_without_ipv6(Err(without), 0)];
        for socket in sockets.map(Result::unwrap) {
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let port = socket.local_addr().unwrap().port();
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            sender.send_to(b"hello", ("127.0.0.1", port)).unwrap();
            let mut bytes = [0; 8];
            assert_eq!(socket.recv(&mut bytes).unwrap(), 5);
        }
        let taken = io::Error::from_raw_os_error(libc::EADDRINUSE);
        assert!(with_or_without_ipv6(Err(taken), 0).is_err());
    }

    #[test]
    fn the_bucket_lets_through_its_rate_and_one_burst() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1_000_000, start);
        let (mut sent, mut now) = (0, start);
        while now < start + Duration::from_secs(10) {
            match bucket.wait(now) {
                Some(wait) => now += wait.max(Duration::from_micros(100)),
                None => {
                    bucket.take(1_480);
                    sent += 1_480;
                }
            }
        }
        assert!((9_990_000..10_010_000).contains(&sent), "{sent} bytes in 10 s");
    }
}
