//! A bottleneck in simulated time: rate, delay, queue and random loss, shared by bulk senders that always
//! have data. Deterministic: the same calls give the same figures.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::Controller;

use self::cubic::Cubic;
use super::{DelayTarget, DelayTargetConfig, Gauges};

mod alone;
mod cubic;
mod shared;

const PACKET_BYTES: u64 = 1452;
/// Of quinn's pacing.
const MIN_BURST_PACKETS: f64 = 10.0;
const BURST_S: f64 = 0.002;
/// QUIC acknowledges every other packet, and one that stays alone after this time (RFC 9000, 13.2).
const MAX_ACK_DELAY: Duration = Duration::from_millis(25);

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
    /// Of all flows together.
    mbit: f64,
    /// Of each.
    mbit_each: Vec<f64>,
    queue_p50_ms: f64,
    queue_p99_ms: f64,
    queue_max_ms: f64,
    dropped: u64,
}

/// Who decides how much of a flow is under way.
enum Control {
    Ours(Box<DelayTarget>),
    Cubic(Cubic),
}

impl Control {
    fn window(&self) -> u64 {
        match self {
            Control::Ours(controller) => controller.window(),
            Control::Cubic(cubic) => cubic.window_bytes() as u64,
        }
    }
}

struct Flow {
    control: Control,
    next_packet: u64,
    in_flight: BTreeMap<u64, Duration>,
    next_send: Duration,
    /// Packets that may go at once.
    tokens: f64,
    filled: Duration,
    smoothed_rtt: f64,
    largest_acked: u64,
    /// Arrived alone: when that is told at the latest, and the packet.
    alone: Option<(Duration, u64)>,
    /// Bytes per second that the application offers.
    offered: Option<f64>,
    is_over: bool,
    delivered: u64,
}

impl Flow {
    /// Notes a packet that leaves, and when the next one may. Both quinn and Linux pace a quarter faster than one
    /// window per round trip: Linux packet by packet, quinn by a bucket of 2 ms, and of ten packets at least,
    /// that is filled again when it is empty.
    fn pace(&mut self, now: Duration) {
        let window_per_s = self.control.window() as f64 / self.smoothed_rtt / PACKET_BYTES as f64;
        let pace = 1.25 * window_per_s;
        let offered = self.offered.map(|bytes_per_s| bytes_per_s / PACKET_BYTES as f64);
        let (pace, bucket) = match (&self.control, offered) {
            (_, Some(offered)) => (offered.min(pace), 1.0),
            (Control::Ours(_), None) => (pace, (window_per_s * BURST_S).max(MIN_BURST_PACKETS)),
            (Control::Cubic(_), None) => (pace, 1.0),
        };
        let fill = |tokens: f64, since: Duration| {
            (tokens + (now - since).as_secs_f64() * pace).min(bucket)
        };
        if self.tokens < 1.0 {
            (self.tokens, self.filled) = (fill(self.tokens, self.filled), now);
        }
        self.tokens -= 1.0;
        if self.tokens < 1.0 {
            (self.tokens, self.filled) = (fill(self.tokens, self.filled), now);
        }
        let empty = self.tokens < 1.0;
        let wait = if empty { (bucket - self.tokens) / pace } else { 0.0 };
        self.next_send = now + Duration::from_secs_f64(wait);
    }
}

struct Link {
    origin: Instant,
    now: Duration,
    path: Path,
    link_free_at: Duration,
    random: u64,
    arrivals: BinaryHeap<Reverse<(Duration, usize, u64)>>,
    flows: Vec<Flow>,
    /// The sending host is busy: of each period, its process is not run for this long.
    stall: Option<(Duration, Duration)>,
    /// The same of the receiving host.
    receiver_stall: Option<(Duration, Duration)>,
    /// Those are what periods have on average: each one's is random, up to twice as long.
    stalls_vary: bool,
    /// Network cards interrupt their hosts so often at most: what comes in between comes together.
    interrupts: Option<Duration>,
    queue_ms: Vec<f64>,
    dropped: u64,
}

impl Link {
    /// With one flow of ours.
    fn new(path: Path) -> Self {
        let mut link = Link {
            origin: Instant::now(),
            now: Duration::ZERO,
            path,
            link_free_at: Duration::ZERO,
            random: 0x9e37_79b9_7f4a_7c15,
            arrivals: BinaryHeap::new(),
            flows: Vec::new(),
            stall: None,
            receiver_stall: None,
            stalls_vary: false,
            interrupts: None,
            queue_ms: Vec::new(),
            dropped: 0,
        };
        link.join_ours();
        link
    }

    /// The same, and nobody waits for what is behind the bulk.
    fn new_while_nobody_waits(path: Path) -> Self {
        let mut link = Self::new(path);
        link.flows.clear();
        let gauges = Arc::new(Gauges::default());
        gauges.set_nobody_waits(true);
        link.join_ours_as(DelayTargetConfig { gauges, ..DelayTargetConfig::default() });
        link
    }

    /// Another flow of ours begins now.
    fn join_ours(&mut self) {
        self.join_ours_as(DelayTargetConfig::default());
    }

    fn join_ours_as(&mut self, config: DelayTargetConfig) {
        let config = Arc::new(config);
        let controller = DelayTarget::new(config, self.at(self.now), PACKET_BYTES as u16);
        self.join(Control::Ours(Box::new(controller)));
    }

    /// A TCP flow begins now.
    fn join_cubic(&mut self) {
        self.join(Control::Cubic(Cubic::new(PACKET_BYTES as f64)));
    }

    fn join(&mut self, control: Control) {
        self.flows.push(Flow {
            control,
            next_packet: 0,
            in_flight: BTreeMap::new(),
            next_send: self.now,
            tokens: MIN_BURST_PACKETS,
            filled: self.now,
            smoothed_rtt: self.path.rtt.as_secs_f64(),
            largest_acked: 0,
            alone: None,
            offered: None,
            is_over: false,
            delivered: 0,
        });
    }

    /// A flow has nothing more to send.
    fn leave(&mut self, index: usize) {
        self.flows[index].is_over = true;
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
        self.after_stall(time, self.stall, 1)
    }

    fn after_stall(
        &self,
        time: Duration,
        stall: Option<(Duration, Duration)>,
        host: u64,
    ) -> Duration {
        let Some((period, length)) = stall else { return time };
        let (number, into) =
            (time.as_nanos() / period.as_nanos(), time.as_nanos() % period.as_nanos());
        let length = if self.stalls_vary {
            let mut mixed = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ host << 32);
            mixed = (mixed ^ mixed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
            length.mul_f64(2.0 * (mixed >> 40) as f64 / (1u64 << 24) as f64).min(period)
        } else {
            length
        };
        time + length.saturating_sub(Duration::from_nanos(into as u64))
    }

    /// When the host is told of what arrives at `time`.
    fn told(&self, time: Duration) -> Duration {
        let Some(gap) = self.interrupts else { return time };
        let gaps = time.as_nanos().div_ceil(gap.as_nanos());
        Duration::from_nanos((gaps * gap.as_nanos()) as u64)
    }

    fn send(&mut self, index: usize) {
        let flow = &mut self.flows[index];
        let packet = flow.next_packet;
        flow.next_packet += 1;
        flow.in_flight.insert(packet, self.now);
        if let Control::Ours(controller) = &mut flow.control {
            controller.sent(PACKET_BYTES);
        }
        flow.pace(self.now);
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
        let arrived = self.link_free_at + self.path.rtt / 2;
        let read = self.after_stall(arrived, self.receiver_stall, 2);
        let told = self.told(read + self.path.rtt / 2);
        match self.flows[index].alone.take() {
            Some((latest, before)) => {
                self.arrivals.push(Reverse((told.min(latest), index, before)));
                self.arrivals.push(Reverse((told, index, packet)));
            }
            None => self.flows[index].alone = Some((told + MAX_ACK_DELAY, packet)),
        }
    }

    /// When something is told next, if nothing leaves before `departure`.
    fn next_arrival(&mut self, departure: Option<Duration>) -> Option<Duration> {
        let first = self.arrivals.peek().map(|Reverse((time, ..))| *time);
        let first = first.into_iter().chain(departure).min();
        for (index, flow) in self.flows.iter_mut().enumerate() {
            if let Some((latest, packet)) =
                flow.alone.take_if(|(latest, _)| first.is_none_or(|first| *latest <= first))
            {
                self.arrivals.push(Reverse((latest, index, packet)));
            }
        }
        self.arrivals.peek().map(|Reverse((time, ..))| self.awake(*time))
    }

    fn acknowledge(&mut self, index: usize, packet: u64) {
        let (elapsed, origin) = (self.now, self.origin);
        let now = origin + elapsed;
        let flow = &mut self.flows[index];
        flow.delivered += PACKET_BYTES;
        flow.largest_acked = flow.largest_acked.max(packet);
        // Absent when it was declared lost because it came late, after its successors.
        if let Some(sent) = flow.in_flight.remove(&packet) {
            let rtt = (elapsed - sent).as_secs_f64();
            flow.smoothed_rtt += (rtt - flow.smoothed_rtt) / 8.0;
            match &mut flow.control {
                Control::Ours(controller) => controller.acked(now, origin + sent, PACKET_BYTES),
                Control::Cubic(cubic) => cubic.acked(elapsed.as_secs_f64(), rtt),
            }
        }
        let in_flight = flow.in_flight.len() as u64 * PACKET_BYTES;
        if let Control::Ours(controller) = &mut flow.control {
            controller.acks_done(in_flight, flow.offered.is_some());
        }
        while let Some((&oldest, &sent)) = flow.in_flight.first_key_value() {
            if oldest + 3 > flow.largest_acked {
                break;
            }
            flow.in_flight.remove(&oldest);
            match &mut flow.control {
                Control::Ours(controller) => controller.lost(now, false, PACKET_BYTES),
                Control::Cubic(cubic) => cubic.lost(elapsed.as_secs_f64(), sent.as_secs_f64()),
            }
        }
    }

    /// The next packet of any flow whose window is open: when, and whose.
    fn next_departure(&self) -> Option<(Duration, usize)> {
        let open = |flow: &Flow| {
            let next = (flow.in_flight.len() as u64 + 1) * PACKET_BYTES;
            !flow.is_over && next < flow.control.window()
        };
        let flows = self.flows.iter().enumerate().filter(|(_, flow)| open(flow));
        flows.map(|(index, flow)| (self.awake(flow.next_send.max(self.now)), index)).min()
    }

    /// Runs until `seconds` and tells what happened from now to then.
    fn run_until(&mut self, seconds: f64) -> Measured {
        let end = Duration::from_secs_f64(seconds);
        let (began, dropped) = (self.now, self.dropped);
        let delivered: Vec<u64> = self.flows.iter().map(|flow| flow.delivered).collect();
        self.queue_ms.clear();
        while self.now < end {
            let departure = self.next_departure();
            let arrival = self.next_arrival(departure.map(|(time, _)| time));
            match (arrival, departure) {
                (Some(time), departure) if departure.is_none_or(|(at, _)| time <= at) => {
                    let Reverse((_, flow, packet)) = self.arrivals.pop().expect("peeked");
                    self.now = time;
                    self.acknowledge(flow, packet);
                }
                (_, Some((time, flow))) => {
                    self.now = time;
                    self.send(flow);
                }
                (None, None) => panic!("every packet in flight was lost at {:?}", self.now),
                (Some(_), None) => unreachable!("no departure means the arrival is next"),
            }
        }
        let mut queue = std::mem::take(&mut self.queue_ms);
        queue.sort_by(f64::total_cmp);
        let percentile = |share: f64| queue[(queue.len() as f64 * share) as usize];
        let seconds = (self.now - began).as_secs_f64();
        let rate =
            |(flow, before): (&Flow, &u64)| (flow.delivered - before) as f64 * 8e-6 / seconds;
        let mbit_each: Vec<f64> = self.flows.iter().zip(&delivered).map(rate).collect();
        Measured {
            mbit: mbit_each.iter().sum(),
            mbit_each,
            queue_p50_ms: percentile(0.5),
            queue_p99_ms: percentile(0.99),
            queue_max_ms: queue[queue.len() - 1],
            dropped: self.dropped - dropped,
        }
    }
}
