//! When the far end of a link is shown what has arrived: like a network card that holds back its interrupts.
//!
//! A card on a fast network does not interrupt its host for each packet: it waits a moment after each
//! interrupt, and hands over all that has come meanwhile. Without that, an emulated link of 1 Gbit/s would
//! wake up 83,000 times a second and cost more than the hosts that it joins.

use std::time::Duration;

use super::link::Link;
use super::spec::Rate;

/// Least time between two deliveries of a fast link: what Linux's drivers of common cards wait for under load
/// (`ethtool -c`, `rx-usecs`), and a twentieth of the shortest round trip that experiments use. At 1 Gbit/s it is
/// four full packets.
const GAP: Duration = Duration::from_micros(50);
/// Ethernet's largest packet. A link on which it takes no less than [`GAP`] is slow: each packet is handed over
/// on its own, when it arrives.
const FULL_PACKET_BITS: u128 = 1500 * 8;

/// The deliveries of one direction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moderation {
    last: Option<Duration>,
}

impl Moderation {
    /// When to look at the link again; `None` while nothing is waiting or on the way.
    pub fn next_delivery<P>(&self, link: &Link<P>) -> Option<Duration> {
        let arrival = link.next_arrival()?;
        let held = self.last.filter(|_| is_fast(link.config().rate)).map(|last| last + GAP);
        Some(held.map_or(arrival, |held| held.max(arrival)))
    }

    /// Whether all that has arrived by `now` is to be handed over now.
    pub fn delivers<P>(&mut self, link: &Link<P>, now: Duration) -> bool {
        let delivers = self.next_delivery(link).is_some_and(|at| at <= now);
        if delivers {
            self.last = Some(now);
        }
        delivers
    }
}

fn is_fast(rate: Rate) -> bool {
    FULL_PACKET_BITS * 1_000_000_000 < u128::from(rate.bits_per_s()) * GAP.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::link::LinkConfig;
    use crate::lab::spec::Loss;

    /// How many packets come at once, and when, of `packets` full ones that were sent at time zero.
    fn deliveries(mbit: u64, packets: u32) -> Vec<(Duration, u32)> {
        let rate = Rate::from_bits_per_s(mbit * 1_000_000).unwrap();
        let delay = Duration::from_millis(1);
        let config = LinkConfig { rate, delay, queue_bytes: u64::MAX, loss: Loss::NONE };
        let (mut link, mut moderation) = (Link::new(config, 0), Moderation::default());
        for _ in 0..packets {
            link.send(Duration::ZERO, (), 1500).unwrap();
        }
        let mut deliveries = Vec::new();
        while let Some(at) = moderation.next_delivery(&link) {
            assert!(!moderation.delivers(&link, at - Duration::from_nanos(1)));
            assert!(moderation.delivers(&link, at));
            let together = std::iter::from_fn(|| link.arrived(at)).count();
            deliveries.push((at, together as u32));
        }
        deliveries
    }

    #[test]
    fn on_a_slow_link_each_packet_is_handed_over_when_it_arrives() {
        for (mbit, each_us) in [(100, 120), (240, 50)] {
            let expected: Vec<_> =
                (1..=20).map(|n| (Duration::from_micros(1000 + n * each_us), 1)).collect();
            assert_eq!(deliveries(mbit, 20), expected);
        }
    }

    #[test]
    fn on_a_fast_link_the_first_comes_at_once_and_the_others_in_groups() {
        let deliveries = deliveries(1000, 21);
        assert_eq!(deliveries[0], (Duration::from_micros(1012), 1));
        assert_eq!(deliveries[1], (Duration::from_micros(1062), 4));
        assert!(deliveries.windows(2).all(|two| two[1].0 - two[0].0 >= GAP));
        assert_eq!(deliveries.iter().map(|(_, packets)| packets).sum::<u32>(), 21);
        // No later than the gap after it arrived: 21 packets take 252 us.
        assert!(deliveries.last().unwrap().0 <= Duration::from_micros(1252) + GAP);
    }
}
