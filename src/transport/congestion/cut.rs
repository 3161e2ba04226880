//! What came of a cut that was made for delay.

/// A queue stands in a round when it is longer on average than at its shortest by this share at most.
const STANDING: f64 = 0.15;
/// A cut that leaves more than this share of the delay did not shorten it.
const NOT_SHORTER: f64 = 0.6;
/// So many that did not in a row are enough.
const IN_VAIN: u32 = 2;

/// One cut, or several in a row, kept until a round tells whether they have helped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// Window per RTT just before the first of them, in bytes per second.
    pub(super) rate: f64,
    /// Before the first of them, in bytes.
    pub(super) window: f64,
    /// The least that was delivered before any of them, in bytes per second: a link that has become slower does not
    /// count as what it was.
    delivered: f64,
    /// Before any of them all round trips of a round were about as long as the shortest: a queue that stands makes
    /// them so, and busy hosts do not.
    stands: bool,
    /// For which the first one was made, or the first after one that had shortened it; in seconds.
    queue: f64,
    in_vain: u32,
}

impl Cut {
    /// Rates in bytes per second, the window in bytes, queues in seconds.
    pub(super) fn new(rate: f64, window: f64, delivered: f64, queue: f64, mean_queue: f64) -> Self {
        let stands = mean_queue <= (1.0 + STANDING) * queue;
        Cut { rate, window, delivered, stands, queue, in_vain: 0 }
    }

    /// With the one that follows.
    pub(super) fn and_then(self, next: Cut) -> Cut {
        let is_as_long = next.queue > NOT_SHORTER * self.queue;
        let (queue, in_vain) =
            if is_as_long { (self.queue, self.in_vain + 1) } else { (next.queue, 0) };
        let delivered = self.delivered.min(next.delivered);
        Cut { delivered, stands: self.stands || next.stands, queue, in_vain, ..self }
    }

    /// Whether cutting does not shorten the delay.
    pub(super) fn were_in_vain(&self) -> bool {
        self.in_vain >= IN_VAIN
    }

    /// Whether the rate went with the window, which is `window` bytes now. It does not when what was cut is a queue of
    /// ours; or only for one round trip, since pacing still follows the longer ones before. So a queue that was seen to
    /// stand counts as ours in any case.
    pub(super) fn was_for_nothing(&self, window: f64, delivered: f64) -> bool {
        !self.stands && delivered < self.delivered * (1.0 + window / self.window) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(queue: f64, mean_queue: f64) -> Cut {
        Cut::new(1e6, 1e5, 1e6, queue, mean_queue)
    }

    #[test]
    fn two_that_leave_the_delay_as_it_was_are_in_vain() {
        let twice = cut(0.02, 0.03).and_then(cut(0.019, 0.03));
        assert!(!twice.were_in_vain());
        assert!(twice.and_then(cut(0.013, 0.02)).were_in_vain());
        assert!(!twice.and_then(cut(0.01, 0.02)).were_in_vain());
    }

    #[test]
    fn one_was_for_nothing_when_the_rate_went_with_the_window() {
        let spread = cut(0.02, 0.03);
        assert!(spread.was_for_nothing(0.5e5, 0.6e6));
        assert!(!spread.was_for_nothing(0.5e5, 0.9e6));
        let slower = spread.and_then(Cut::new(1e6, 0.8e5, 0.6e6, 0.01, 0.02));
        assert!(!slower.was_for_nothing(0.5e5, 0.6e6), "the link had become slower");
    }

    #[test]
    fn a_queue_that_stood_was_ours() {
        assert!(!cut(0.02, 0.021).was_for_nothing(0.5e5, 0.5e6));
        assert!(!cut(0.02, 0.021).and_then(cut(0.01, 0.02)).was_for_nothing(0.5e5, 0.5e6));
    }
}
