//! How the window grows while no queue shows.

/// After so many rounds without a queue the link may have become wider: the window grows by this share, and
/// after some such steps by as much more in each further round, up to `MAX_GROWTH`. A single leap would be a queue of
/// a quarter of the round trip where the link is as it was. Nor may the steps grow at once: what one does shows when
/// the next two have been made, and then all three stand in the queue.
const CALM_ROUNDS: u32 = 3;
const EQUAL_STEPS: u32 = 4;
const CALM_GROWTH: f64 = 0.04;
/// Steps count when the rate has grown by this share of what they should have added, but for two packets, which
/// may be acknowledged in this round or the next: on a full link it does not, which shows a round trip before the
/// queue is long enough to.
const STEPS_SHOW: f64 = 0.5;
/// Against the first of them, until the window has grown by this factor.
const COMPARED_UP_TO: f64 = 1.2;

/// Full rounds in a row without any queue: the link may have become wider.
#[derive(Clone, Copy, Debug)]
pub(super) struct Calm {
    rounds: u32,
    /// Of the first of them.
    window: f64,
    rate: f64,
    /// Window of the last one. Its packets are acknowledged in the next.
    last_window: f64,
}

impl Calm {
    pub(super) fn new(window: f64, rate: f64) -> Self {
        Calm { rounds: 1, window, rate, last_window: window }
    }

    /// After another round without a queue: nothing if the rate does not follow the window any more. `slack` is
    /// what two packets are of the rate.
    pub(super) fn go_on(self, window: f64, rate: f64, slack: f64) -> Option<Self> {
        let due = self.rate * (1.0 + STEPS_SHOW * (self.last_window / self.window - 1.0));
        if rate + slack < due {
            return None;
        }
        let next = Calm { rounds: self.rounds + 1, last_window: window, ..self };
        // What was reached counts from then on, or half of all growth would be given away at last.
        let reached = self.last_window >= COMPARED_UP_TO * self.window;
        Some(if reached { Calm { window: self.last_window, rate, ..next } } else { next })
    }

    /// By how much the window may grow now.
    pub(super) fn growth(self) -> Option<f64> {
        let steps = (self.rounds + 1).checked_sub(CALM_ROUNDS).filter(|steps| *steps > 0)?;
        Some(1.0 + CALM_GROWTH * f64::from(steps.saturating_sub(EQUAL_STEPS - 1).max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many rounds as the rate follows the window, up to `rounds`, on a link that is full at `full`.
    fn rounds(rounds: u32, full: f64) -> Calm {
        let mut calm = Calm::new(100.0, 100.0);
        let (mut window, mut before) = (100.0, 100.0);
        for _ in 1..rounds {
            window *= calm.growth().unwrap_or(1.0);
            // What is acknowledged left under the window before.
            let Some(next) = calm.go_on(window, f64::min(before, full), 0.0) else { break };
            (calm, before) = (next, window);
        }
        calm
    }

    #[test]
    fn steps_begin_after_some_rounds_are_equal_at_first_and_then_grow() {
        let growth = |count| rounds(count, f64::INFINITY).growth();
        assert_eq!([1, 2].map(growth), [None, None]);
        assert_eq!([3, 4, 5, 6].map(growth), [Some(1.04); 4]);
        assert_eq!([7, 8].map(growth), [Some(1.08), Some(1.12)]);
    }

    #[test]
    fn on_a_full_link_steps_end_before_they_have_grown_far() {
        for full in [100.0, 130.0, 400.0, 3000.0] {
            let window = rounds(200, full).last_window;
            assert!((full..1.7 * full).contains(&window), "full at {full}: {window}");
        }
    }
}
