//! What the path holds, told by packets that left at once: the narrowest link spreads them, and their
//! acknowledgements come as far apart as it takes for each. (Packet trains: Dovrolis, Ramanathan and Moore,
//! "What do packet dispersion techniques measure?", INFOCOM 2001.)

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Packets that leave within this were sent at once: a pacer's burst.
const SENT_WITHIN: Duration = Duration::from_micros(300);
/// A train whose acknowledgements come within less shows the clocks and schedulers of both hosts, and not the
/// path: on a fast path only long trains count.
const MIN_SPREAD: Duration = Duration::from_micros(800);
/// A train must be spread so much beyond what lay between its packets when they left.
const MIN_WIDENING: u32 = 3;
/// Shorter ones are told apart from a chance meeting of packets no better than from noise.
const MIN_PACKETS: u32 = 6;
/// What comes so much later than the others, in gaps between those, waited at the other side: it acknowledges every
/// other packet, and one that stays alone with the next one, or after a while (RFC 9000, 13.2).
const ALONE: u32 = 2;
/// A link spreads a train evenly. Where more than this share of it is one gap, a host was not run meanwhile.
const LONGEST_GAP: f64 = 0.5;
/// Trains that count, and how many it takes.
const TRAINS: usize = 9;
const MIN_TRAINS: usize = 5;
/// The middle half of them must agree so well: on a host that is too busy to tell, each says something else.
const AGREEMENT: f64 = 1.25;

#[derive(Clone, Copy, Debug)]
struct Train {
    first_sent: Instant,
    last_sent: Instant,
    first_acked: Instant,
    packets: u32,
    /// How often acknowledgements came after the first.
    groups: u32,
    acked: Acked,
    /// Without those that came last.
    acked_before: Acked,
}

/// What was acknowledged of a train.
#[derive(Clone, Copy, Debug)]
struct Acked {
    last: Instant,
    /// Without what was acknowledged with the first packet.
    bytes: u64,
    longest_gap: Duration,
}

impl Train {
    fn bytes_per_s(&self) -> Option<f64> {
        let Acked { last, bytes, longest_gap } = self.acked_in_time();
        let spread = last - self.first_acked;
        let sent = self.last_sent.saturating_duration_since(self.first_sent);
        let tells = self.packets >= MIN_PACKETS
            && spread >= MIN_SPREAD
            && spread >= sent * MIN_WIDENING
            && longest_gap <= spread.mul_f64(LONGEST_GAP)
            && bytes > 0;
        tells.then(|| bytes as f64 / spread.as_secs_f64())
    }

    /// All but a last packet that stayed alone at the other side.
    fn acked_in_time(&self) -> Acked {
        if self.groups < 2 {
            return self.acked;
        }
        let usual = (self.acked_before.last - self.first_acked) / (self.groups - 1);
        let was_alone = self.acked.last - self.acked_before.last > ALONE * usual;
        if was_alone { self.acked_before } else { self.acked }
    }
}

/// The last trains of a connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Trains {
    current: Option<Train>,
    rates: VecDeque<f64>,
}

impl Trains {
    /// A packet was acknowledged.
    pub(super) fn acked(&mut self, now: Instant, sent: Instant, bytes: u64) {
        if let Some(train) = &mut self.current
            && sent.saturating_duration_since(train.first_sent) <= SENT_WITHIN
        {
            train.last_sent = train.last_sent.max(sent);
            train.packets += 1;
            let acked = &mut train.acked;
            if now > acked.last {
                train.acked_before = *acked;
                acked.longest_gap = acked.longest_gap.max(now - acked.last);
                acked.last = now;
                train.groups += 1;
            }
            if train.groups > 0 {
                acked.bytes += bytes;
            }
            return;
        }
        let acked = Acked { last: now, bytes: 0, longest_gap: Duration::ZERO };
        let begun = Train {
            first_sent: sent,
            last_sent: sent,
            first_acked: now,
            packets: 1,
            groups: 0,
            acked,
            acked_before: acked,
        };
        if let Some(rate) = self.current.replace(begun).and_then(|train| train.bytes_per_s()) {
            self.rates.push_back(rate);
            if self.rates.len() > TRAINS {
                self.rates.pop_front();
            }
        }
    }

    /// What the narrowest link carries, where trains agree on it: their median, so that neither those that a
    /// busy host spread nor those that it closed up decide.
    pub(super) fn bytes_per_s(&self) -> Option<f64> {
        if self.rates.len() < MIN_TRAINS {
            return None;
        }
        let mut rates: Vec<f64> = self.rates.iter().copied().collect();
        rates.sort_by(f64::total_cmp);
        let [lower, median, upper] = [1, 2, 3].map(|quarter| rates[rates.len() * quarter / 4]);
        (upper <= AGREEMENT * lower).then_some(median)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET_BYTES: u64 = 1452;

    /// The acknowledgements of bursts of `packets` each 10 ms, through a link on which a packet takes `each`.
    fn bursts(count: u32, packets: u32, each: Duration) -> Trains {
        let (mut trains, begin) = (Trains::default(), Instant::now());
        for burst in 0..count {
            let sent = begin + burst * Duration::from_millis(10);
            for packet in 1..=packets {
                let left = sent + packet * Duration::from_micros(2);
                trains.acked(sent + Duration::from_millis(40) + packet * each, left, PACKET_BYTES);
            }
        }
        trains
    }

    #[test]
    fn bursts_that_a_link_spreads_tell_its_rate() {
        let trains = bursts(6, 10, Duration::from_micros(116));
        let mbit = trains.bytes_per_s().unwrap() * 8e-6;
        assert!((99.0..101.5).contains(&mbit), "{mbit} Mbit/s");
    }

    #[test]
    fn acknowledgements_that_a_network_card_hands_over_together_tell_the_rate_of_the_link() {
        let (mut trains, begin, gap_us) = (Trains::default(), Instant::now(), 50.0);
        for burst in 0..8 {
            let sent = begin + burst * Duration::from_millis(10);
            for packet in 1..=100 {
                let came_us = 1000.0 + f64::from(packet) * 11.6;
                let told_us = (came_us / gap_us).ceil() * gap_us;
                let left = sent + packet * Duration::from_micros(2);
                trains.acked(sent + Duration::from_secs_f64(told_us * 1e-6), left, PACKET_BYTES);
            }
        }
        let mbit = trains.bytes_per_s().unwrap() * 8e-6;
        assert!((930.0..1070.0).contains(&mbit), "{mbit} Mbit/s");
    }

    #[test]
    fn a_last_packet_that_waits_for_the_next_burst_is_not_a_slow_link() {
        for late in [Duration::from_millis(10), Duration::from_millis(25)] {
            let (mut trains, begin, each) =
                (Trains::default(), Instant::now(), Duration::from_micros(116));
            for burst in 0..8 {
                let sent = begin + burst * Duration::from_millis(10);
                for packet in 1..=15_u32 {
                    let together = packet.next_multiple_of(2);
                    let came = if together > 15 { late } else { together * each };
                    let acked = sent + Duration::from_millis(40) + came;
                    trains.acked(acked, sent + packet * Duration::from_micros(2), PACKET_BYTES);
                }
            }
            let mbit = trains.bytes_per_s().unwrap() * 8e-6;
            assert!((95.0..105.0).contains(&mbit), "{mbit} Mbit/s");
        }
    }

    #[test]
    fn few_bursts_and_bursts_that_are_not_spread_tell_nothing() {
        assert_eq!(bursts(5, 10, Duration::from_micros(116)).bytes_per_s(), None);
        assert_eq!(bursts(20, 10, Duration::from_micros(12)).bytes_per_s(), None);
        assert_eq!(bursts(20, 4, Duration::from_micros(500)).bytes_per_s(), None);
    }

    #[test]
    fn a_burst_that_a_busy_host_spread_does_not_decide() {
        let mut trains = bursts(8, 10, Duration::from_micros(116));
        let sent = Instant::now() + Duration::from_secs(1);
        for packet in 0..10 {
            trains.acked(sent + packet * Duration::from_millis(5), sent, PACKET_BYTES);
        }
        trains.acked(sent + Duration::from_secs(1), sent + Duration::from_secs(1), PACKET_BYTES);
        assert!(trains.bytes_per_s().unwrap() * 8e-6 > 99.0);
    }

    #[test]
    fn bursts_with_a_gap_in_which_a_host_was_not_run_tell_nothing() {
        let (mut trains, begin) = (Trains::default(), Instant::now());
        for burst in 0..8 {
            let sent = begin + burst * Duration::from_millis(40);
            for packet in 1..=10 {
                let stalled = Duration::from_millis(if packet > 5 { 5 } else { 0 });
                let came = sent + packet * Duration::from_micros(116) + stalled;
                trains.acked(came, sent, PACKET_BYTES);
            }
        }
        assert_eq!(trains.bytes_per_s(), None);
    }

    #[test]
    fn bursts_that_do_not_agree_tell_nothing() {
        let (mut trains, begin) = (Trains::default(), Instant::now());
        for burst in 1..20 {
            let sent = begin + burst * Duration::from_millis(40);
            for packet in 1..=10 {
                let each = Duration::from_micros(116) * (1 + burst % 5);
                trains.acked(sent + packet * each, sent, PACKET_BYTES);
            }
        }
        assert_eq!(trains.bytes_per_s(), None);
    }
}
