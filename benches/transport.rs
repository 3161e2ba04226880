//! Goodput and fault latency of a link under bulk, over emulated paths on loopback.
//!
//! `cargo bench --bench transport` runs every case for 10 s after 3 s of warm-up;
//! `cargo bench --bench transport -- 100Mbit` runs the cases whose name contains the word.
//! The emulator is a user-space relay with rate, delay, queue and loss. It needs a core of its own.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use farfault::transport::{Lane, Link, Listener, TransportOptions, connect};
use hdrhistogram::Histogram;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{setsockopt, sockopt};

const WARM_UP: Duration = Duration::from_secs(3);
const MEASURED: Duration = Duration::from_secs(10);
const PUSH_BYTES: usize = 64 << 10;
const REQUEST_INTERVAL: Duration = Duration::from_millis(10);
const REPLY_BYTES: usize = 4 << 10;

#[derive(Clone, Copy)]
struct Path {
    name: &'static str,
    mbit: f64,
    one_way: Duration,
    queue_bdp: f64,
    loss: f64,
}

const fn path(name: &'static str, mbit: f64, rtt_us: u64, queue_bdp: f64, loss: f64) -> Path {
    Path { name, mbit, one_way: Duration::from_micros(rtt_us / 2), queue_bdp, loss }
}

const PATHS: [Path; 8] = [
    path("100Mbit 40ms 1BDP", 100.0, 40_000, 1.0, 0.0),
    path("100Mbit 40ms 1BDP 0.1%", 100.0, 40_000, 1.0, 0.001),
    path("100Mbit 40ms 1BDP 1%", 100.0, 40_000, 1.0, 0.01),
    path("100Mbit 40ms 10BDP", 100.0, 40_000, 10.0, 0.0),
    path("100Mbit 40ms 10BDP 1%", 100.0, 40_000, 10.0, 0.01),
    path("20Mbit 100ms 2BDP 1%", 20.0, 100_000, 2.0, 0.01),
    path("1Gbit 1ms 10BDP", 1_000.0, 1_000, 10.0, 0.0),
    path("1Gbit 20ms 1BDP", 1_000.0, 20_000, 1.0, 0.0),
];

fn main() {
    let word = std::env::args().skip(1).find(|word| !word.starts_with('-')).unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    println!(
        "{:<26} {:>8}  {:>7} {:>7} {:>7}  {:>6}",
        "path", "Mbit/s", "p50 ms", "p99", "max", "lost %"
    );
    for path in PATHS.iter().filter(|path| path.name.contains(&word)) {
        runtime.block_on(measure(
            path.name,
            Some(*path),
            &TransportOptions { mtu_limit_bytes: Some(1_452), ..TransportOptions::default() },
        ));
    }
    if "loopback".contains(&word) {
        let usual =
            TransportOptions { mtu_limit_bytes: Some(1_452), ..TransportOptions::default() };
        runtime.block_on(measure("loopback, MTU 1452", None, &usual));
        runtime.block_on(measure("loopback, its own MTU", None, &TransportOptions::default()));
    }
}

async fn measure(name: &str, path: Option<Path>, options: &TransportOptions) {
    let address: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let (listener, mut ticket) = Listener::bind(address, Vec::new(), options).unwrap();
    let relay = path.map(|path| Relay::start(path, ticket.addresses[0]));
    if let Some(relay) = &relay {
        ticket.addresses = vec![relay.address];
    }
    let (source, destination) = tokio::join!(connect(&ticket, options), listener.accept(None));
    let (source, destination) = (source.unwrap(), destination.unwrap());
    serve(&source);
    let received = consume(&destination);
    tokio::time::sleep(WARM_UP).await;

    let (bytes, begun, before) = (received.load(Relaxed), Instant::now(), source.stats());
    let latency = ask(&destination, begun + MEASURED).await;
    let seconds = begun.elapsed().as_secs_f64();
    let goodput = (received.load(Relaxed) - bytes) as f64 * 8e-6 / seconds;
    let after = source.stats();
    let lost = (after.lost_packets - before.lost_packets) as f64
        / (after.sent_packets - before.sent_packets) as f64;
    let ms = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    println!(
        "{name:<26} {goodput:>8.1}  {:>7.2} {:>7.2} {:>7.2}  {:>6.2}",
        ms(0.5),
        ms(0.99),
        latency.max() as f64 / 1e3,
        lost * 100.0
    );
    source.close(0, "measured").await;
}

/// The source: bulk without end, and replies.
fn serve(source: &Link) {
    let link = source.clone();
    tokio::spawn(async move {
        let bulk = Bytes::from(vec![0x5a; PUSH_BYTES]);
        while link.push(bulk.clone()).await.is_ok() {}
    });
    let link = source.clone();
    tokio::spawn(async move {
        while let Ok(request) = link.recv(Lane::FaultRequest).await {
            let mut reply = vec![0; REPLY_BYTES];
            reply[..8].copy_from_slice(&request);
            let _ = link.send(Lane::FaultReply, reply.into()).await;
        }
    });
}

/// The destination's consumer of bulk.
fn consume(destination: &Link) -> Arc<AtomicU64> {
    let received = Arc::new(AtomicU64::new(0));
    let (link, count) = (destination.clone(), received.clone());
    tokio::spawn(async move {
        while let Ok(message) = link.recv(Lane::Push).await {
            count.fetch_add(message.len() as u64, Relaxed);
        }
    });
    received
}

/// Requests at a steady interval until `end`; the time until each reply, in microseconds.
async fn ask(destination: &Link, end: Instant) -> Histogram<u64> {
    let epoch = Instant::now();
    let link = destination.clone();
    let replies = tokio::spawn(async move {
        let mut latency = Histogram::<u64>::new(3).unwrap();
        while Instant::now() < end + Duration::from_millis(500) {
            let Ok(Ok(reply)) =
                tokio::time::timeout(Duration::from_millis(500), link.recv(Lane::FaultReply)).await
            else {
                break;
            };
            let asked = u64::from_be_bytes(reply[..8].try_into().unwrap());
            latency.record(epoch.elapsed().as_micros() as u64 - asked).unwrap();
        }
        latency
    });
    let mut ticks = tokio::time::interval(REQUEST_INTERVAL);
    while Instant::now() < end {
        ticks.tick().await;
        let asked = (epoch.elapsed().as_micros() as u64).to_be_bytes();
        destination.send(Lane::FaultRequest, Bytes::copy_from_slice(&asked)).await.unwrap();
    }
    replies.await.unwrap()
}

/// Both directions of an emulated path, one thread each.
struct Relay {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
}

impl Relay {
    fn start(path: Path, target: SocketAddr) -> Self {
        let socket = || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let _ = setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20));
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let (front, back) = (Arc::new(socket()), Arc::new(socket()));
        back.connect(target).unwrap();
        let address = front.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (front_too, back_too, stopped) = (front.clone(), back.clone(), stop.clone());
        std::thread::spawn(move || forward(path, 1, &stopped, &front_too, &back_too));
        let stopped = stop.clone();
        std::thread::spawn(move || forward(path, 2, &stopped, &back, &front));
        Relay { address, stop }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

fn forward(path: Path, seed: u64, stop: &AtomicBool, from: &UdpSocket, to: &UdpSocket) {
    let rate = path.mbit * 1e6 / 8.0;
    let queue_bytes = (rate * path.one_way.as_secs_f64() * 2.0 * path.queue_bdp).max(30_000.0);
    let mut random = 0x9e37_79b9_7f4a_7c15 ^ seed;
    let mut on_the_way = VecDeque::<(Instant, Vec<u8>)>::new();
    let mut link_free = Instant::now();
    let mut buffer = vec![0; 65_536];
    while !stop.load(Relaxed) {
        let now = Instant::now();
        while on_the_way.front().is_some_and(|(due, _)| *due <= now) {
            let (_, datagram) = on_the_way.pop_front().unwrap();
            let _ = to.send(&datagram);
        }
        let wait = on_the_way.front().map_or(Duration::from_millis(100), |(due, _)| *due - now);
        let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        let _ = ppoll(&mut ready, Some(wait.into()), None);
        while let Ok((size, sender)) = from.recv_from(&mut buffer) {
            if seed == 1 && from.peer_addr().is_err() {
                from.connect(sender).unwrap();
            }
            let now = Instant::now();
            link_free = link_free.max(now);
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let lost = (random >> 11) as f64 / (1u64 << 53) as f64 <= path.loss;
            let waiting = (link_free - now).as_secs_f64() * rate;
            if lost && path.loss > 0.0 || waiting + size as f64 > queue_bytes {
                continue;
            }
            link_free += Duration::from_secs_f64((size + 28) as f64 / rate);
            on_the_way.push_back((link_free + path.one_way, buffer[..size].to_vec()));
        }
    }
}
