//! Whether it pays to remember what is sent in the first round.

use std::time::Duration;

/// Pages written to again before the switchover, of those sent in the first round: a cautious guess, since nothing is
/// known of them then. Within 10 s real guests wrote to 3 to 17 % of their pages, within 200 s to 15 to 37 %.
const SENT_AGAIN: f64 = 0.25;
/// One batch of so many is remembered whatever was found before, to see what that takes now.
const TRIAL_EVERY: u32 = 64;
/// How much of what was found before counts, beside a new batch.
const KEEP: f64 = 0.75;
/// A batch that took more than so many times as long as those before counts for no more: the thread may have been
/// waiting for a processor.
const MOST_AT_ONCE: f64 = 4.0;

/// What a thread that sends has found a page of the first round to take, in seconds of that thread.
///
/// Where a page leaves as fast as it is copied, a copy for later rounds is the most expensive part of
/// sending it: its memory is fresh, and the kernel must find and clear it first. So pages are remembered only where
/// that takes less than what it is expected to save.
#[derive(Debug, Default)]
pub(super) struct Remembering {
    batches: u32,
    sending_s: f64,
    remembering_s: f64,
}

impl Remembering {
    /// Whether the next batch is to be remembered.
    pub(super) fn pays(&mut self) -> bool {
        let trial = self.batches.is_multiple_of(TRIAL_EVERY);
        self.batches = self.batches.wrapping_add(1);
        trial || self.remembering_s < SENT_AGAIN * self.sending_s
    }

    /// So many pages were encoded in this time, to so many bytes, for a link that takes so many.
    pub(super) fn sent(&mut self, pages: usize, time: Duration, bytes: u64, link_bytes_per_s: f64) {
        let whole_s = time.as_secs_f64() + bytes as f64 / link_bytes_per_s.max(1.0);
        average(&mut self.sending_s, pages, whole_s);
    }

    /// So many pages were remembered in this time.
    pub(super) fn remembered(&mut self, pages: usize, time: Duration) {
        average(&mut self.remembering_s, pages, time.as_secs_f64());
    }
}

fn average(value: &mut f64, pages: usize, whole_s: f64) {
    if pages > 0 {
        let found = whole_s / pages as f64;
        *value = match *value {
            0.0 => found,
            before => KEEP * before + (1.0 - KEEP) * found.min(MOST_AT_ONCE * before),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of 640 batches of 64 pages are remembered, each page in 2 us.
    fn remembered(encoding_us: u64, page_bytes: u64, link_bytes_per_s: f64) -> usize {
        let mut remembering = Remembering::default();
        let batch = |us: u64| Duration::from_micros(64 * us);
        (0..640)
            .filter(|_| {
                let pays = remembering.pays();
                remembering.sent(64, batch(encoding_us), 64 * page_bytes, link_bytes_per_s);
                if pays {
                    remembering.remembered(64, batch(2));
                }
                pays
            })
            .count()
    }

    #[test]
    fn pages_are_remembered_where_sending_them_again_would_take_longer() {
        assert_eq!(remembered(9, 1_400, 125e6), 640, "1 Gbit/s");
        assert_eq!(remembered(70, 1_300, 12.5e6), 640, "100 Mbit/s");
        assert_eq!(remembered(4, 2_000, 1.25e9), 10, "10 Gbit/s: those for trial");
    }

    #[test]
    fn a_thread_that_waits_for_a_processor_now_and_then_goes_on_remembering() {
        let mut remembering = Remembering::default();
        for batch in 0..100 {
            assert!(remembering.pays(), "batch {batch}");
            remembering.sent(64, Duration::from_millis(2), 64 * 1_300, 12.5e6);
            let ms = if batch % 10 == 9 { 20 } else { 0 };
            remembering.remembered(64, Duration::from_micros(1000 * ms + 64 * 3));
        }
    }

    #[test]
    fn a_slow_memory_that_has_become_quick_is_found_out() {
        let mut remembering = Remembering::default();
        for batch in 0..200 {
            if remembering.pays() {
                let us = if batch < 100 { 20 } else { 1 };
                remembering.remembered(1, Duration::from_micros(us));
            }
            remembering.sent(1, Duration::from_micros(40), 0, 1.0);
        }
        assert!(!remembering.pays(), "one batch in 64 tells a quarter of it");
        for _ in 0..10 * TRIAL_EVERY {
            if remembering.pays() {
                remembering.remembered(1, Duration::from_micros(1));
            }
        }
        assert!(remembering.pays());
    }
}
