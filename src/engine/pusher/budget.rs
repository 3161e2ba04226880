//! How much of the link bundles may take.

use std::time::Duration;

/// Bundles share the link: together they get what the link carries, and at most a round trip of it is on
/// the way at a time. So the bundle of a single thread may fill a round trip, and many threads
/// that fault at once get little each, and none waits long for the bundles of others.
#[derive(Debug)]
pub struct BundleBudget {
    left_bytes: f64,
    since: Duration,
}

/// Before the link is measured, and on links that hold little: bundles may have so much.
const MIN_BUDGET_BYTES: f64 = 64.0 * 1024.0;

impl BundleBudget {
    /// `now` counts from any moment on.
    pub fn new(now: Duration) -> Self {
        BundleBudget { left_bytes: MIN_BUDGET_BYTES, since: now }
    }

    /// How much the next bundle may take, in bytes.
    pub fn room(&mut self, now: Duration, rate_bytes_per_s: u64, round_trip: Duration) -> u64 {
        let rate = rate_bytes_per_s as f64;
        let full = (rate * round_trip.as_secs_f64()).max(MIN_BUDGET_BYTES);
        let passed = now.saturating_sub(self.since).as_secs_f64();
        self.since = now;
        self.left_bytes = (self.left_bytes + passed * rate.max(MIN_BUDGET_BYTES)).min(full);
        self.left_bytes.max(0.0) as u64
    }

    /// A bundle takes so much.
    pub fn spend(&mut self, bytes: u64) {
        self.left_bytes -= bytes as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundles_get_a_round_trip_of_the_link_and_then_wait_for_more() {
        let (rate, round_trip) = (12_500_000, Duration::from_millis(40));
        let mut budget = BundleBudget::new(Duration::ZERO);
        let later = Duration::from_secs(1);
        assert_eq!(budget.room(later, rate, round_trip), 500_000);
        budget.spend(500_000);
        assert_eq!(budget.room(later, rate, round_trip), 0);
        let room = budget.room(later + Duration::from_millis(10), rate, round_trip);
        assert!((124_000..126_000).contains(&room), "{room}");
        let unknown = BundleBudget::new(later).room(later, 0, Duration::ZERO);
        assert_eq!(unknown, 64 * 1024, "a link that is not measured yet");
    }
}
