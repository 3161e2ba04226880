//! How fast the link takes what the encoders make.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Taken for the link's rate before anything is known: in the middle of the ladder.
const UNKNOWN_LINK_BYTES_PER_S: f64 = 60e6;
/// How often the rate is judged.
const WINDOW: Duration = Duration::from_millis(200);
/// Waiting for less than this share of the time, the encoders are the bottleneck.
const LINK_BOUND: f64 = 0.15;
/// No link is faster than this, as far as codecs go.
const FASTEST_BYTES_PER_S: f64 = 20e9;

/// What all threads that encode for the same lane have seen of the link.
///
/// While they wait for the link, the link's rate is what leaves; while they do not, encoding is
/// the bottleneck and the link is faster than anything seen: then more is assumed, so that a quicker
/// codec gets its turn.
#[derive(Debug)]
pub(super) struct Pace {
    encoders: usize,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    link_bytes_per_s: f64,
    window: Instant,
    bytes: u64,
    waited: Duration,
}

impl Pace {
    /// Of so many threads. The link's rate is taken to be `link_bytes_per_s` until their sending tells
    /// better.
    pub(super) fn new(encoders: usize, link_bytes_per_s: Option<u64>) -> Self {
        let rate = link_bytes_per_s.filter(|rate| *rate > 0);
        let seen = Seen {
            link_bytes_per_s: rate.map_or(UNKNOWN_LINK_BYTES_PER_S, |rate| rate as f64),
            window: Instant::now(),
            bytes: 0,
            waited: Duration::ZERO,
        };
        Pace { encoders, seen: Mutex::new(seen) }
    }

    /// The link's rate is taken to be this, until their sending tells better.
    pub(super) fn expect(&self, link_bytes_per_s: f64) {
        self.seen.lock().expect("no holder panics").link_bytes_per_s = link_bytes_per_s;
    }

    /// How many threads share the link.
    pub(super) fn encoders(&self) -> usize {
        self.encoders
    }

    /// What the link is taken to carry.
    pub(super) fn link_bytes_per_s(&self) -> f64 {
        self.seen.lock().expect("no holder panics").link_bytes_per_s
    }

    /// One of the threads has handed over so many bytes, after waiting so long for the link.
    pub(super) fn sent(&self, bytes: usize, waited: Duration) {
        let mut seen = self.seen.lock().expect("no holder panics");
        seen.bytes += bytes as u64;
        seen.waited += waited;
        let elapsed = seen.window.elapsed();
        if elapsed >= WINDOW {
            seen.judge(elapsed, self.encoders);
            (seen.window, seen.bytes, seen.waited) = (Instant::now(), 0, Duration::ZERO);
        }
    }
}

impl Seen {
    fn judge(&mut self, elapsed: Duration, encoders: usize) {
        let rate = self.bytes as f64 / elapsed.as_secs_f64();
        let at_work_s = elapsed.as_secs_f64() * encoders as f64;
        self.link_bytes_per_s = if self.waited.as_secs_f64() >= LINK_BOUND * at_work_s {
            rate
        } else {
            (rate.max(self.link_bytes_per_s) * 1.5).min(FASTEST_BYTES_PER_S)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(encoders: usize, waited_ms: u64) -> f64 {
        let pace = Pace::new(encoders, Some(100));
        let mut seen = pace.seen.lock().unwrap();
        (seen.bytes, seen.waited) = (3_000_000, Duration::from_millis(waited_ms));
        seen.judge(Duration::from_secs(1), encoders);
        seen.link_bytes_per_s
    }

    #[test]
    fn a_link_is_as_fast_as_what_leaves_while_its_encoders_wait() {
        assert_eq!(judged(1, 900), 3_000_000.0);
        assert_eq!(judged(1, 0), 4_500_000.0);
        assert_eq!(judged(8, 900), 4_500_000.0, "one of eight waits: encoding is the bottleneck");
    }
}
