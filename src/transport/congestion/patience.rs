//! How long a delay must last before it is cut for.

use std::time::{Duration, Instant};

/// Cuts that were made in vain are forgotten by half in this time.
const HALF_LIFE: Duration = Duration::from_secs(2);
/// Less than this is none.
const LEAST: Duration = Duration::from_millis(10);
/// A queue of our own stands so much longer at most, for nothing.
const MOST: Duration = Duration::from_millis(200);

/// Learnt from cuts that did not help: none at first, after each of them twice what is left of it, and less from then on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    at_first: Duration,
    since: Instant,
}

impl Patience {
    pub(super) fn none(now: Instant) -> Self {
        Patience { at_first: Duration::ZERO, since: now }
    }

    pub(super) fn at(&self, now: Instant) -> Duration {
        let half_lives = (now - self.since).as_secs_f64() / HALF_LIFE.as_secs_f64();
        let left = self.at_first.mul_f64(0.5f64.powf(half_lives));
        if left < LEAST { Duration::ZERO } else { left }
    }

    /// A cut was made for a delay that was not of our making.
    pub(super) fn grow(&mut self, now: Instant) {
        let at_first = (2 * self.at(now)).clamp(2 * LEAST, MOST);
        *self = Patience { at_first, since: now };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_a_limit_and_is_forgotten() {
        let began = Instant::now();
        let mut patience = Patience::none(began);
        assert_eq!(patience.at(began), Duration::ZERO);
        let grown = [20, 40, 80, 160, 200, 200].map(Duration::from_millis);
        for expected in grown {
            patience.grow(began);
            assert_eq!(patience.at(began), expected);
        }
        assert_eq!(patience.at(began + HALF_LIFE), MOST / 2);
        assert_eq!(patience.at(began + 6 * HALF_LIFE), Duration::ZERO);
    }
}
