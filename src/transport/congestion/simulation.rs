//! A bottleneck in simulated time: rate, delay, queue and random loss, run against the controller
//! with a bulk sender that always has data. Deterministic: the same call gives the same figures.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};

use quinn::congestion::Controller;

use super::{DelayTarget, DelayTargetConfig};

const PACKET_BYTES: u64 = 1452;

/// The path as it is from some time on.
#[derive(Clone, Copy)]
struct Path {
    rate_bytes_per_s: f64,
    rtt: Duration,
    queue_bytes: f64,
    loss: f64,
}

fn path(mbit: f64, rtt_ms: u64, queue_bdp: f64, loss: f64) -> Path {
    let rate_bytes_per_s = mbit * 1e6 / 8.0;
    let rtt = Duration::from_millis(rtt_ms);
    let queue_bytes = (rate_bytes_per_s * rtt.as_secs_f64() * queue_bdp).max(15_000.0);
    Path { rate_bytes_per_s, rtt, queue_bytes, loss }
}

/// What the link carried between two moments.
#[derive(Debug)]
struct Measured {
    mbit: f64,
    queue_p50_ms: f64,
    queue_p99_ms: f64,
    queue_max_ms: f64,
    dropped: u64,
}

struct Link {
    controller: DelayTarget,
    origin: Instant,
    now: Duration,
    path: Path,
    link_free_at: Duration,
    random: u64,
    next_packet: u64,
    in_flight: BTreeMap<u64, Duration>,
    arrivals: BinaryHeap<Reverse<(Duration, u64)>>,
    next_send: Duration,
    smoothed_rtt: f64,
    largest_acked: u64,
    /// Bytes per second that the application offers.
    offered: Option<f64>,
    /// The sending host is busy: of each period, its process is not run for this long.
    stall: Option<(Duration, Duration)>,
    queue_ms: Vec<f64>,
    delivered: u64,
    dropped: u64,
}

impl Link {
    fn new(path: Path) -> Self {
        let origin = Instant::now();
        let config = std::sync::Arc::new(DelayTargetConfig::default());
        Link {
            controller: DelayTarget::new(config, origin, PACKET_BYTES as u16),
            origin,
            now: Duration::ZERO,
            path,
            link_free_at: Duration::ZERO,
            random: 0x9e37_79b9_7f4a_7c15,
            next_packet: 0,
            in_flight: BTreeMap::new(),
            arrivals: BinaryHeap::new(),
            next_send: Duration::ZERO,
            smoothed_rtt: path.rtt.as_secs_f64(),
            largest_acked: 0,
            offered: None,
            stall: None,
            queue_ms: Vec::new(),
            delivered: 0,
            dropped: 0,
        }
    }

    fn at(&self, time: Duration) -> Instant {
        self.origin + time
    }

    fn chance(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The first moment from `time` on at which the sending process runs.
    fn awake(&self, time: Duration) -> Duration {
        let Some((period, length)) = self.stall else { return time };
        let into = time.as_nanos() % period.as_nanos();
        time + length.saturating_sub(Duration::from_nanos(into as u64))
    }

    fn window_open(&self) -> bool {
        (self.in_flight.len() as u64 + 1) * PACKET_BYTES < self.controller.window()
    }

    fn send(&mut self) {
        let packet = self.next_packet;
        self.next_packet += 1;
        self.in_flight.insert(packet, self.now);
        self.controller.sent(PACKET_BYTES);
        // As quinn paces: a quarter faster than one window per RTT.
        let pace = self.controller.window() as f64 * 1.25 / self.smoothed_rtt;
        let pace = self.offered.map_or(pace, |offered| offered.min(pace));
        self.next_send =
            self.next_send.max(self.now) + Duration::from_secs_f64(PACKET_BYTES as f64 / pace);
        let waiting = self.link_free_at.saturating_sub(self.now).as_secs_f64();
        self.queue_ms.push(waiting * 1e3);
        let full =
            waiting * self.path.rate_bytes_per_s + PACKET_BYTES as f64 > self.path.queue_bytes;
        if full || self.chance() < self.path.loss {
            self.dropped += 1;
            return;
        }
        let transmission =
            Duration::from_secs_f64(PACKET_BYTES as f64 / self.path.rate_bytes_per_s);
        self.link_free_at = self.link_free_at.max(self.now) + transmission;
        self.arrivals.push(Reverse((self.link_free_at + self.path.rtt, packet)));
    }

    fn acknowledge(&mut self, packet: u64) {
        let now = self.at(self.now);
        self.delivered += PACKET_BYTES;
        self.largest_acked = self.largest_acked.max(packet);
        // Absent when it was declared lost because it came late, after its successors.
        if let Some(sent) = self.in_flight.remove(&packet) {
            let rtt = (self.now - sent).as_secs_f64();
            self.smoothed_rtt += (rtt - self.smoothed_rtt) / 8.0;
            self.controller.acked(now, self.origin + sent, PACKET_BYTES);
        }
        let in_flight = self.in_flight.len() as u64 * PACKET_BYTES;
        self.controller.acks_done(in_flight, self.offered.is_some());
        while let Some((&oldest, _)) = self.in_flight.first_key_value() {
            if oldest + 3 > self.largest_acked {
                break;
            }
            self.in_flight.remove(&oldest);
            self.controller.lost(now, false, PACKET_BYTES);
        }
    }

    /// Runs until `seconds` and tells what happened from now to then.
    fn run_until(&mut self, seconds: f64) -> Measured {
        let end = Duration::from_secs_f64(seconds);
        let (began, delivered, dropped) = (self.now, self.delivered, self.dropped);
        self.queue_ms.clear();
        while self.now < end {
            let arrival = self.arrivals.peek().map(|Reverse((time, _))| self.awake(*time));
            let departure = self.window_open().then(|| self.awake(self.next_send.max(self.now)));
            match (arrival, departure) {
                (Some(time), departure) if departure.is_none_or(|departure| time <= departure) => {
                    let Reverse((_, packet)) = self.arrivals.pop().expect("peeked");
                    self.now = time;
                    self.acknowledge(packet);
                }
                (_, Some(time)) => {
                    self.now = time;
                    self.send();
                }
                (None, None) => panic!("every packet in flight was lost at {:?}", self.now),
                (Some(_), None) => unreachable!("no departure means the arrival is next"),
            }
        }
        let mut queue = std::mem::take(&mut self.queue_ms);
        queue.sort_by(f64::total_cmp);
        let percentile = |share: f64| queue[(queue.len() as f64 * share) as usize];
        let seconds = (self.now - began).as_secs_f64();
        Measured {
            mbit: (self.delivered - delivered) as f64 * 8e-6 / seconds,
            queue_p50_ms: percentile(0.5),
            queue_p99_ms: percentile(0.99),
            queue_max_ms: queue[queue.len() - 1],
            dropped: self.dropped - dropped,
        }
    }
}

/// The bulk rate and the queue after `warm_up` seconds of a steady path.
fn steady(path: Path, warm_up: f64) -> Measured {
    let mut link = Link::new(path);
    link.run_until(warm_up);
    link.run_until(warm_up + 30.0)
}

#[test]
fn a_wan_link_is_full_with_a_few_milliseconds_of_queue_whatever_the_buffer_and_the_loss() {
    for queue_bdp in [1.0, 10.0] {
        for loss in [0.0, 0.001, 0.01] {
            let measured = steady(path(100.0, 40, queue_bdp, loss), 3.0);
            let case = format!("{queue_bdp} BDP, loss {loss}: {measured:?}");
            assert!(measured.mbit > 100.0 * (1.0 - loss) * 0.975, "{case}");
            assert!(measured.queue_p50_ms < 5.0, "{case}");
            assert!(measured.queue_p99_ms < 8.0, "{case}");
        }
    }
}

#[test]
fn a_slow_and_long_link_with_loss_is_full() {
    let measured = steady(path(20.0, 100, 2.0, 0.01), 3.0);
    assert!(measured.mbit > 19.0, "{measured:?}");
    assert!(measured.queue_p50_ms < 6.0, "{measured:?}");
}

#[test]
fn a_sender_on_a_busy_host_keeps_most_of_the_rate() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    link.stall = Some((Duration::from_millis(70), Duration::from_millis(25)));
    link.run_until(3.0);
    let measured = link.run_until(30.0);
    assert!(measured.mbit > 80.0, "{measured:?}");
}

#[test]
fn a_data_centre_link_is_full_with_half_a_millisecond_of_queue() {
    let measured = steady(path(1000.0, 1, 10.0, 0.0), 1.0);
    assert!(measured.mbit > 970.0, "{measured:?}");
    assert!(measured.queue_p50_ms < 1.0, "{measured:?}");
}

#[test]
fn the_start_fills_the_link_within_a_second_and_never_a_deep_buffer() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    let start = link.run_until(1.0);
    assert!(start.queue_max_ms < 60.0, "{start:?}");
    assert_eq!(start.dropped, 0);
    let then = link.run_until(2.0);
    assert!(then.mbit > 92.0, "{then:?}");
}

#[test]
fn a_start_on_one_bdp_of_buffer_loses_nothing() {
    let start = Link::new(path(100.0, 40, 1.0, 0.0)).run_until(2.0);
    assert_eq!(start.dropped, 0, "{start:?}");
}

#[test]
fn a_link_that_becomes_ten_times_slower_has_a_short_queue_again_soon() {
    let mut link = Link::new(path(100.0, 40, 1.0, 0.0));
    link.run_until(5.0);
    link.path.rate_bytes_per_s /= 10.0;
    link.run_until(8.0);
    let after = link.run_until(20.0);
    assert!(after.mbit > 9.4, "{after:?}");
    assert!(after.queue_p50_ms < 8.0, "{after:?}");
}

#[test]
fn a_link_that_becomes_ten_times_faster_is_filled_soon() {
    let mut link = Link::new(path(10.0, 40, 10.0, 0.0));
    link.run_until(5.0);
    link.path.rate_bytes_per_s *= 10.0;
    let change = link.run_until(6.5);
    assert!(change.queue_max_ms < 60.0, "{change:?}");
    let after = link.run_until(12.0);
    assert!(after.mbit > 95.0 && after.queue_p50_ms < 6.0, "{after:?}");
}

#[test]
fn a_longer_route_is_taken_for_what_it_is() {
    let mut link = Link::new(path(100.0, 40, 1.0, 0.0));
    link.run_until(5.0);
    link.path.rtt = Duration::from_millis(80);
    link.run_until(8.0);
    let after = link.run_until(16.0);
    assert!(after.mbit > 93.0, "{after:?}");
    assert!(after.queue_p50_ms < 8.0, "{after:?}");
}

#[test]
fn the_base_rtt_does_not_creep_up_in_minutes_of_bulk() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    link.run_until(300.0);
    let late = link.run_until(330.0);
    assert!(late.mbit > 97.0 && late.queue_p50_ms < 6.0, "{late:?}");
}

#[test]
fn a_buffer_shorter_than_the_target_costs_no_more_loss_than_is_tolerated() {
    let shallow = Path { queue_bytes: 20_000.0, ..path(100.0, 40, 1.0, 0.0) };
    let measured = steady(shallow, 3.0);
    let sent = measured.mbit * 1e6 / 8.0 * 30.0 / PACKET_BYTES as f64;
    assert!(measured.mbit > 92.0, "{measured:?}");
    assert!((measured.dropped as f64) < sent * 0.06, "{measured:?}");
}

#[test]
fn a_sender_with_little_to_say_does_not_inflate_its_window() {
    let mut link = Link::new(path(100.0, 40, 10.0, 0.0));
    link.offered = Some(250_000.0);
    link.run_until(20.0);
    assert!(link.controller.window() < 100_000, "{}", link.controller.window());
}
