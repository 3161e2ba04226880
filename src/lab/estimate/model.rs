//! What a migration of such a guest over such a link would be like: the engine's own policy, played
//! through with the sampled numbers.

use std::time::Duration;

use serde::Serialize;

use super::sample::Sample;
use crate::engine::policy::{Next, RoundSummary, SwitchoverPolicy};
use crate::lab::spec::LinkSpec;
use crate::page::PAGE_SIZE_BYTES;
use crate::wire::message::{RunWhen, Strategy};

/// Share of a link's rate that page frames get: the rest are headers, acknowledgements, and what
/// congestion control leaves free.
const GOODPUT: f64 = 0.925;
/// IP packets over page frames.
const PACKETS_PER_FRAME_BYTE: f64 = 1.045;
/// Device state of a `pc` with some virtio devices, compressed, and the handover's messages.
const DEVICE_STATE_BYTES: f64 = 150e3;
/// Connecting, the handshake, comparing shapes, and the farewells.
const ROUND_TRIPS: f64 = 5.0;
/// To stop, save, load and run a QEMU.
const FIXED_DOWNTIME_S: f64 = 0.040;
/// Beyond the round trip, a fault waits for both ends and a short queue.
const FAULT_S: f64 = 0.008;
/// To read a page, to remember it, and to hand it over, beside encoding it.
const PER_PAGE_S: f64 = 3e-6;
/// Steps of the integrals.
const STEPS: u32 = 200;

/// What is expected of one strategy.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Which.
    pub strategy: Strategy,
    /// False when pre-copy would not end within the downtime.
    pub converges: bool,
    /// The guest runs at the destination before all of its pages are there.
    pub post_copy: bool,
    /// Pre-copy rounds.
    pub rounds: u16,
    /// From the start to the end.
    pub total_s: f64,
    /// The guest stands still, or waits for the first page that it wants to touch.
    pub downtime_ms: f64,
    /// IP packets, both directions.
    pub link_bytes: f64,
    /// How long the guest waits for pages in post-copy, in all; reads of pages that it does not write are
    /// not known, so it may be more.
    pub stall_ms: f64,
    /// Left when the guest is stopped: how long that takes to send.
    pub remainder_ms: f64,
}

/// Plays a migration through.
pub fn predict(
    sample: &Sample,
    link: &LinkSpec,
    downtime: Duration,
    strategy: Strategy,
) -> Prediction {
    let play = Play::new(sample, link, downtime, strategy);
    play.run()
}

struct Play<'a> {
    sample: &'a Sample,
    policy: SwitchoverPolicy,
    bytes_per_s: f64,
    round_trip_s: f64,
    told: Prediction,
}

impl<'a> Play<'a> {
    fn new(sample: &'a Sample, link: &LinkSpec, downtime: Duration, strategy: Strategy) -> Self {
        let carried = link.rate.bits_per_s() as f64 / 8.0 * (1.0 - link.loss.probability());
        let round_trip_s = link.round_trip.as_secs_f64();
        Play {
            sample,
            policy: SwitchoverPolicy { downtime_budget: downtime, max_rounds: None },
            bytes_per_s: carried * GOODPUT,
            round_trip_s,
            told: Prediction {
                strategy,
                converges: true,
                post_copy: false,
                rounds: 0,
                total_s: ROUND_TRIPS * round_trip_s + FIXED_DOWNTIME_S,
                downtime_ms: 0.0,
                link_bytes: DEVICE_STATE_BYTES,
                stall_ms: 0.0,
                remainder_ms: 0.0,
            },
        }
    }

    fn run(mut self) -> Prediction {
        let mut pages = self.sample.populated_pages as f64 * (1.0 - self.sample.zero_share);
        let mut cost = self.first_pass_cost(pages);
        if self.told.strategy == Strategy::Postcopy {
            self.switch_over(pages, cost, true);
            return self.told;
        }
        loop {
            let time_s = self.send(pages, cost);
            self.told.rounds += 1;
            let seen = self.changed_in_round(time_s);
            let remembered = self.sample.delta_bytes_per_page(seen);
            let round = RoundSummary {
                messages: 1,
                sent_pages: pages as u64,
                sent_bytes: (pages * cost) as u64,
                duration: Duration::from_secs_f64(time_s),
                dirty_pages: seen as u64,
                held_back_pages: 0,
                bytes_per_dirty_page: Some(remembered as u64),
                link_bytes_per_s: self.bytes_per_s as u64,
                round_trip: Duration::from_secs_f64(self.round_trip_s),
            };
            // The decision waits for the acknowledgement of the round, and the guest does not.
            pages = self.changed_in_round(time_s + self.round_trip_s);
            cost = self.sample.delta_bytes_per_page(pages);
            match self.policy.after_round(self.told.strategy, self.told.rounds, &round) {
                Next::AnotherRound => {}
                Next::Switchover(when) => {
                    self.switch_over(pages, cost, when != RunWhen::Complete);
                    return self.told;
                }
                Next::GiveUp(_) => {
                    self.told.converges = false;
                    self.told.remainder_ms = self.time_s(pages, cost) * 1e3;
                    return self.told;
                }
            }
        }
    }

    /// What a page costs on average in a pass over all `pages`. Until its turn comes it may be written, and then it
    /// costs what written pages do: a guest may fill its memory with what compresses less, or more.
    fn first_pass_cost(&self, pages: f64) -> f64 {
        let Sample { whole_bytes_per_page: asleep, written_bytes_per_page: written, .. } =
            *self.sample;
        if self.told.strategy == Strategy::Postcopy {
            return asleep;
        }
        let mut cost = asleep;
        // The pass lasts the longer the more its pages cost: that settles after a few times.
        for _ in 0..8 {
            let share = self.average_written(self.time_s(pages, cost)) / pages.max(1.0);
            cost = asleep + (written - asleep) * share.min(1.0);
        }
        cost
    }

    /// Pages that are changed since they were sent, `time_s` after the begin of the round that is just over.
    /// The first one sends all pages in their order: one that is sent late has little time to change again.
    fn changed_in_round(&self, time_s: f64) -> f64 {
        if self.told.rounds > 1 {
            return self.sample.written_in(time_s);
        }
        self.average_written(time_s)
    }

    /// Of all times up to `time_s`.
    fn average_written(&self, time_s: f64) -> f64 {
        let steps = (0..STEPS).map(|step| (f64::from(step) + 0.5) / f64::from(STEPS));
        steps.map(|share| self.sample.written_in(time_s * share)).sum::<f64>() / f64::from(STEPS)
    }

    /// The link or one core, whichever is slower.
    fn time_s(&self, pages: f64, cost: f64) -> f64 {
        let speed = match self.told.rounds {
            0 => self.sample.encode_bytes_per_s,
            _ => self.sample.delta_encode_bytes_per_s,
        };
        let encode_s = pages * (PAGE_SIZE_BYTES as f64 / speed + PER_PAGE_S);
        (pages * cost / self.bytes_per_s).max(encode_s).max(1e-3)
    }

    fn send(&mut self, pages: f64, cost: f64) -> f64 {
        let time_s = self.time_s(pages, cost);
        self.told.total_s += time_s + self.round_trip_s;
        self.told.link_bytes += pages * cost * PACKETS_PER_FRAME_BYTE;
        time_s
    }

    fn switch_over(&mut self, pages: f64, cost: f64, post_copy: bool) {
        let time_s = self.send(pages, cost);
        self.told.post_copy = post_copy;
        self.told.remainder_ms = time_s * 1e3;
        let still_s = FIXED_DOWNTIME_S + self.round_trip_s / 2.0;
        // The first page that the guest touches may be missing.
        let first_page_s = self.missing_share(pages) * self.fault_s();
        self.told.downtime_ms =
            1e3 * if post_copy { still_s + first_page_s } else { still_s + time_s };
        if post_copy {
            self.told.stall_ms = self.stall_s(pages, time_s) * 1e3;
        }
    }

    /// The guest touches pages at the rate at which it was seen to write to new ones. While a share of them
    /// is missing it waits for those, one after the other.
    fn stall_s(&self, missing_pages: f64, time_s: f64) -> f64 {
        let touched_per_s = self.sample.written_in(0.1) / 0.1;
        let share = self.missing_share(missing_pages);
        let step_s = time_s / f64::from(STEPS);
        let waits = |step: u32| {
            let missing = share * (1.0 - (f64::from(step) + 0.5) / f64::from(STEPS));
            let wanted = touched_per_s * missing * self.fault_s();
            step_s * wanted / (1.0 + wanted)
        };
        (0..STEPS).map(waits).sum()
    }

    /// How much of what the guest works on is missing.
    fn missing_share(&self, missing_pages: f64) -> f64 {
        (missing_pages / (self.sample.working_set_pages as f64).max(1.0)).min(1.0)
    }

    fn fault_s(&self) -> f64 {
        self.round_trip_s + FAULT_S
    }
}

/// Which strategy to take, and why.
pub fn recommend(predictions: &[Prediction]) -> (Strategy, String) {
    let of = |strategy| predictions.iter().find(|told| told.strategy == strategy);
    let hybrid = of(Strategy::Hybrid);
    match (hybrid, of(Strategy::Precopy)) {
        (Some(hybrid), _) if !hybrid.post_copy => (
            Strategy::Hybrid,
            format!(
                "after {} rounds what is left takes {:.0} ms to send, so it ends before the guest \
                 resumes, as precopy would; if the guest gets busier it goes over to post-copy",
                hybrid.rounds, hybrid.remainder_ms
            ),
        ),
        (Some(hybrid), Some(precopy))
            if precopy.converges && precopy.total_s < 1.5 * hybrid.total_s =>
        {
            (
                Strategy::Precopy,
                format!(
                    "it ends within the downtime after {} rounds and never depends on the link once \
                     the guest has moved; hybrid would let the guest wait for pages for about {:.0} ms",
                    precopy.rounds, hybrid.stall_ms
                ),
            )
        }
        (Some(hybrid), _) => (
            Strategy::Hybrid,
            format!(
                "precopy does not end within the downtime, or much later; after {} rounds {:.0} ms of \
                 sending are left for post-copy, in which the guest waits for about {:.0} ms",
                hybrid.rounds, hybrid.remainder_ms, hybrid.stall_ms
            ),
        ),
        (None, _) => (Strategy::Hybrid, "nothing else was looked at".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Strategy; 3] = [Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy];

    /// 256 MiB that compress to a third, of which `per_s` different pages are written a second.
    fn sample(per_s: u64, delta_bytes_per_page: f64) -> Sample {
        Sample {
            pages: 131_072,
            populated_pages: 65_536,
            zero_share: 0.0,
            whole_bytes_per_page: 1365.0,
            written_bytes_per_page: 1365.0,
            hot_pages: 0.0,
            hot_delta_bytes_per_page: delta_bytes_per_page,
            cold_delta_bytes_per_page: delta_bytes_per_page,
            delta_sample_pages: 100,
            encode_bytes_per_s: 400e6,
            delta_encode_bytes_per_s: 1000e6,
            written: (1..=50)
                .map(|tick| (f64::from(tick) * 0.1, per_s * tick as u64 / 10))
                .collect(),
            working_set_pages: 65_536,
            tracker: "write-protect".to_owned(),
        }
    }

    fn all(sample: &Sample) -> Vec<Prediction> {
        let link: LinkSpec = "100Mbit,40ms".parse().unwrap();
        ALL.map(|strategy| predict(sample, &link, Duration::from_millis(300), strategy)).into()
    }

    #[test]
    fn a_quiet_guest_takes_the_time_of_its_bytes() {
        let told = all(&sample(10, 100.0));
        for prediction in &told {
            assert!(prediction.converges, "{prediction:?}");
            // 89 MB at 11.6 MB/s.
            assert!((7.5..9.0).contains(&prediction.total_s), "{prediction:?}");
            assert!((90e6..100e6).contains(&prediction.link_bytes), "{prediction:?}");
            assert!((50.0..300.0).contains(&prediction.downtime_ms), "{prediction:?}");
        }
        assert!(!told[0].post_copy && told[2].post_copy);
        assert_eq!(told[0].stall_ms, 0.0);
        let (strategy, why) = recommend(&told);
        assert_eq!(strategy, Strategy::Hybrid, "{why}");
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_needs_post_copy() {
        let told = all(&sample(50_000, 4000.0));
        assert!(!told[1].converges, "{:?}", told[1]);
        assert!(told[0].post_copy && told[0].stall_ms > 100.0, "{:?}", told[0]);
        // To stop and to run on, half a round trip, and then a page of which the guest has no copy.
        assert!((100.0..110.0).contains(&told[2].downtime_ms), "{:?}", told[2]);
        let (strategy, why) = recommend(&told);
        assert_eq!(strategy, Strategy::Hybrid);
        assert!(why.contains("post-copy"), "{why}");
    }

    #[test]
    fn a_guest_that_writes_what_compresses_less_takes_longer() {
        let mut noisy = sample(3000, 4100.0);
        let before = all(&noisy);
        noisy.written_bytes_per_page = 4100.0;
        let told = all(&noisy);
        let (longer, shorter) = (&told[0], &before[0]);
        assert!(longer.link_bytes > 1.15 * shorter.link_bytes, "{longer:?} {shorter:?}");
        // The guest stands still before its pages are sent.
        assert_eq!(told[2].link_bytes, before[2].link_bytes);
    }

    #[test]
    fn deltas_make_the_difference() {
        let rounds = |delta| all(&sample(2000, delta)).remove(1);
        let (small, large) = (rounds(100.0), rounds(4000.0));
        assert!(small.converges && small.link_bytes < large.link_bytes, "{small:?} {large:?}");
    }
}
