//! A counter over time, and what it was per second.

use std::time::Duration;

/// Points kept; beyond, every other one is given up, so that a long run costs no more than a short one.
const POINTS_LIMIT: usize = 4096;

/// The values that a growing counter had.
#[derive(Clone, Debug, Default)]
pub struct History {
    points: Vec<(Duration, u64)>,
}

impl History {
    /// The counter stood at `value`. What comes late, or from a side that knows less, is dropped: so
    /// a guest's counter may be told by both hosts.
    pub fn add(&mut self, at: Duration, value: u64) {
        if self.points.last().is_some_and(|last| at <= last.0 || value < last.1) {
            return;
        }
        if self.points.len() >= POINTS_LIMIT {
            let mut keep = false;
            self.points.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.points.push((at, value));
    }

    /// The last value, 0 at first.
    pub fn last(&self) -> u64 {
        self.points.last().map_or(0, |last| last.1)
    }

    /// Growth per second over the last `window`, or since the point before when points are further apart.
    pub fn rate_lately(&self, window: Duration) -> f64 {
        let Some(last) = self.points.last() else { return 0.0 };
        let since = last.0.saturating_sub(window);
        let within = self.points.partition_point(|point| point.0 <= since);
        let first = self.points[within.saturating_sub(1)];
        let seconds = (last.0 - first.0).as_secs_f64();
        if seconds > 0.0 { (last.1 - first.1) as f64 / seconds } else { 0.0 }
    }

    /// Growth per second in each of `columns` equal parts of the time from 0 to `until`.
    pub fn rates(&self, columns: usize, until: Duration) -> Vec<f64> {
        let step = until.as_secs_f64() / columns.max(1) as f64;
        if step <= 0.0 {
            return vec![0.0; columns];
        }
        let values: Vec<f64> =
            (0..=columns).map(|column| self.value_at(step * column as f64)).collect();
        values.windows(2).map(|pair| (pair[1] - pair[0]) / step).collect()
    }

    /// Between two points the counter is taken to have grown evenly; before the first and after the
    /// last it stood still.
    fn value_at(&self, seconds: f64) -> f64 {
        let after = self.points.partition_point(|point| point.0.as_secs_f64() <= seconds);
        let Some(next) = self.points.get(after) else { return self.last() as f64 };
        let Some(before) = after.checked_sub(1).map(|index| self.points[index]) else {
            return next.1 as f64;
        };
        let (from, to) = (before.0.as_secs_f64(), next.0.as_secs_f64());
        let share = (seconds - from) / (to - from);
        before.1 as f64 + share * (next.1 - before.1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_pause_shows_as_columns_of_nothing() {
        let mut history = History::default();
        for (ms, value) in [(0, 0), (1000, 100), (2000, 100), (4000, 300)] {
            history.add(at(ms), value);
        }
        assert_eq!(history.rates(4, at(4000)), [100.0, 0.0, 100.0, 100.0]);
        assert_eq!(history.rate_lately(at(2000)), 100.0);
    }

    #[test]
    fn what_is_late_or_less_is_dropped() {
        let mut history = History::default();
        history.add(at(10), 5);
        history.add(at(20), 4);
        history.add(at(5), 9);
        assert_eq!(history.last(), 5);
        history.add(at(30), 5);
        assert_eq!(history.rate_lately(at(15)), 0.0);
        history.add(at(1030), 7);
        assert_eq!(history.rate_lately(at(15)), 2.0);
    }

    #[test]
    fn a_long_history_is_thinned_and_keeps_its_rates() {
        let mut history = History::default();
        for ms in 0..3 * POINTS_LIMIT as u64 {
            history.add(at(ms), ms * 7);
        }
        assert!(history.points.len() <= POINTS_LIMIT);
        let rates = history.rates(10, at(3 * POINTS_LIMIT as u64 - 1));
        assert!(rates.iter().all(|rate| (rate - 7000.0).abs() < 1.0), "{rates:?}");
    }
}
