//! One direction of a link, as a pure model: packets go in, and come out later, or never.
//!
//! ```text
//! send -> [ tail-drop queue ] -> serialised at `rate` -> lost at random? -> `delay` -> arrived
//! ```
//!
//! The caller brings the clock: every method takes the time since an origin of the caller's choice,
//! which must not go backwards. Serialisation is exact: packet after packet without gaps and
//! without rounding that adds up, whatever the times at which the model is asked. So 95 % of the
//! rate arrives as payload when 95 % of the bytes are payload, however late the caller wakes up.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

use super::spec::{Loss, Rate};

/// Work is counted in bit-nanoseconds-per-second: a bit is this much, and a link of rate `r` does
/// `r` of it in a nanosecond. So a whole second of any rate is an integer.
const WORK_PER_BIT: u64 = 1_000_000_000;

/// The properties of one direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkConfig {
    /// Serialisation rate.
    pub rate: Rate,
    /// From the last bit sent to the last bit received: one way.
    pub delay: Duration,
    /// Bytes that may wait, with those of the packet on the line. An idle link takes any packet.
    pub queue_bytes: u64,
    /// Applied to packets that were serialised, so a lost packet has used the line.
    pub loss: Loss,
}

/// What has happened to the packets of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Offered to the link.
    pub offered_packets: u64,
    /// Bytes of those.
    pub offered_bytes: u64,
    /// Serialised: what has used the link, with those lost behind it.
    pub carried_packets: u64,
    /// Bytes of those.
    pub carried_bytes: u64,
    /// Arrived at the far end.
    pub delivered_packets: u64,
    /// Bytes of those.
    pub delivered_bytes: u64,
    /// Refused, since the queue was full.
    pub dropped_queue_packets: u64,
    /// Lost at random.
    pub dropped_loss_packets: u64,
    /// Lost in a cut: offered, waiting or on the way.
    pub dropped_cut_packets: u64,
}

/// Why a packet was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The queue is full.
    QueueFull,
    /// The link is cut.
    Cut,
}

struct Waiting<P> {
    packet: P,
    bytes: u32,
}

struct Flying<P> {
    arrives_at: Duration,
    packet: P,
    bytes: u32,
}

/// One direction of a link; `P` is whatever the caller calls a packet.
pub struct Link<P> {
    config: LinkConfig,
    cut: bool,
    random: SplitMix64,
    waiting: VecDeque<Waiting<P>>,
    waiting_bytes: u64,
    /// In order of arrival.
    flying: VecDeque<Flying<P>>,
    /// Up to here serialisation has been computed.
    line_at: Duration,
    /// Work already done on the first waiting packet at `line_at`.
    line_work_done: u64,
    totals: Totals,
}

impl<P> Link<P> {
    /// An idle link at time zero. The same seed and the same packets give the same losses.
    pub fn new(config: LinkConfig, seed: u64) -> Self {
        Link {
            config,
            cut: false,
            random: SplitMix64(seed),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            flying: VecDeque::new(),
            line_at: Duration::ZERO,
            line_work_done: 0,
            totals: Totals::default(),
        }
    }

    /// The properties now.
    pub fn config(&self) -> &LinkConfig {
        &self.config
    }

    /// Totals since the start, or the last [`Link::reset_totals`]. Ask [`Link::advance`] first for
    /// those of a given moment.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Counts from zero again.
    pub fn reset_totals(&mut self) {
        self.totals = Totals::default();
    }

    /// Bytes waiting, with the packet on the line.
    pub fn backlog_bytes(&self) -> u64 {
        self.waiting_bytes
    }

    /// Offers a packet of `bytes` to the link.
    pub fn send(&mut self, now: Duration, packet: P, bytes: u32) -> Result<(), Refused> {
        self.advance(now);
        self.totals.offered_packets += 1;
        self.totals.offered_bytes += u64::from(bytes);
        if self.cut {
            self.totals.dropped_cut_packets += 1;
            return Err(Refused::Cut);
        }
        let fits = self.waiting_bytes + u64::from(bytes) <= self.config.queue_bytes;
        if !fits && !self.waiting.is_empty() {
            self.totals.dropped_queue_packets += 1;
            return Err(Refused::QueueFull);
        }
        self.waiting.push_back(Waiting { packet, bytes });
        self.waiting_bytes += u64::from(bytes);
        Ok(())
    }

    /// The next packet that has arrived by `now`, in order. Call until `None`.
    pub fn arrived(&mut self, now: Duration) -> Option<P> {
        self.advance(now);
        if self.flying.front()?.arrives_at > now {
            return None;
        }
        let Flying { packet, bytes, .. } = self.flying.pop_front()?;
        self.totals.delivered_packets += 1;
        self.totals.delivered_bytes += u64::from(bytes);
        Some(packet)
    }

    /// When to ask [`Link::arrived`] again; `None` while nothing is waiting or on the way.
    ///
    /// While packets wait but none flies, this is the moment at which the first will arrive if the
    /// link does not change, and is not lost.
    pub fn next_arrival(&self) -> Option<Duration> {
        if let Some(first) = self.flying.front() {
            return Some(first.arrives_at);
        }
        Some(self.head_done_at()? + self.config.delay)
    }

    /// Brings serialisation up to `now`.
    pub fn advance(&mut self, now: Duration) {
        while let Some(done_at) = self.head_done_at().filter(|at| *at <= now) {
            let Some(Waiting { packet, bytes }) = self.waiting.pop_front() else { break };
            // Nanoseconds are whole, work is not: what the line did beyond this packet in its last
            // nanosecond belongs to the next one.
            let surplus = self.work_until(done_at) + self.line_work_done - work(bytes);
            self.line_work_done = if self.waiting.is_empty() { 0 } else { surplus };
            self.line_at = done_at;
            self.waiting_bytes -= u64::from(bytes);
            self.totals.carried_packets += 1;
            self.totals.carried_bytes += u64::from(bytes);
            if self.random.chance() < self.config.loss.probability() {
                self.totals.dropped_loss_packets += 1;
                continue;
            }
            // A delay that was shortened must not reorder packets.
            let last = self.flying.back().map_or(Duration::ZERO, |f| f.arrives_at);
            let arrives_at = last.max(done_at + self.config.delay);
            self.flying.push_back(Flying { arrives_at, packet, bytes });
        }
        if self.waiting.is_empty() {
            self.line_at = self.line_at.max(now);
        }
    }

    /// From `now` on another rate; what is left of the packet on the line goes at the new one.
    pub fn set_rate(&mut self, now: Duration, rate: Rate) {
        self.advance(now);
        if !self.waiting.is_empty() {
            self.line_work_done += self.work_until(now);
            self.line_at = now;
        }
        self.config.rate = rate;
    }

    /// Packets serialised from `now` on take another time to arrive; order is kept.
    pub fn set_delay(&mut self, now: Duration, delay: Duration) {
        self.advance(now);
        self.config.delay = delay;
    }

    /// Packets serialised from `now` on are lost with this probability.
    pub fn set_loss(&mut self, now: Duration, loss: Loss) {
        self.advance(now);
        self.config.loss = loss;
    }

    /// Another limit for packets offered from `now` on; what waits already stays.
    pub fn set_queue_bytes(&mut self, now: Duration, queue_bytes: u64) {
        self.advance(now);
        self.config.queue_bytes = queue_bytes;
    }

    /// Cuts the link: everything waiting, on the way, or offered until [`Link::restore`], is lost.
    pub fn cut(&mut self, now: Duration) {
        self.advance(now);
        self.totals.dropped_cut_packets += (self.waiting.len() + self.flying.len()) as u64;
        self.waiting.clear();
        self.flying.clear();
        self.waiting_bytes = 0;
        self.line_work_done = 0;
        self.line_at = now;
        self.cut = true;
    }

    /// Ends a cut.
    pub fn restore(&mut self, now: Duration) {
        self.advance(now);
        self.cut = false;
    }

    /// True between [`Link::cut`] and [`Link::restore`].
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// When the last bit of the packet on the line is out.
    fn head_done_at(&self) -> Option<Duration> {
        let left = work(self.waiting.front()?.bytes).saturating_sub(self.line_work_done);
        let ns = left.div_ceil(self.config.rate.bits_per_s());
        Some(self.line_at + Duration::from_nanos(ns))
    }

    /// What the line does from `line_at` until `until`.
    fn work_until(&self, until: Duration) -> u64 {
        let ns = until.saturating_sub(self.line_at).as_nanos();
        u64::try_from(ns * u128::from(self.config.rate.bits_per_s())).unwrap_or(u64::MAX)
    }
}

fn work(bytes: u32) -> u64 {
    // Saturates above 2 GiB, which no packet reaches.
    u64::from(bytes).saturating_mul(8 * WORK_PER_BIT)
}

/// The generator of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0.0..1.0`.
    fn chance(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests;
