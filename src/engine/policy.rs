//! When to stop pre-copy: decided on the *encoded* remainder, since a page that was changed in a few
//! words costs a few bytes, however many such pages there are.

use std::time::Duration;

use super::Failure;
use crate::wire::message::{RunWhen, Strategy};

/// What a pre-copy round has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundSummary {
    /// Push messages of the round.
    pub messages: u64,
    /// Pages sent in the round that were not holes.
    pub sent_pages: u64,
    /// Their size on the wire.
    pub sent_bytes: u64,
    /// From the round's begin until all was handed to the transport.
    pub duration: Duration,
    /// Pages that the guest has changed since their last sending.
    pub dirty_pages: u64,
    /// How many of these are not sent before the freeze, since the guest writes to them all the time.
    pub held_back_pages: u64,
    /// How many bytes a changed page costs, as far as this is known: from deltas sent so far.
    pub bytes_per_dirty_page: Option<u64>,
    /// What the link carries.
    pub link_bytes_per_s: u64,
    /// The link's round trip.
    pub round_trip: Duration,
}

impl RoundSummary {
    /// How long the changed pages would take to send. Before the first delta is known, a changed page
    /// counts as a whole one of average size.
    pub fn remainder(&self) -> Duration {
        self.time_of(self.dirty_pages)
    }

    /// How long those of them would take that another round would send.
    pub fn next_round(&self) -> Duration {
        self.time_of(self.dirty_pages.saturating_sub(self.held_back_pages))
    }

    fn time_of(&self, dirty_pages: u64) -> Duration {
        let whole = self.sent_bytes.checked_div(self.sent_pages).unwrap_or(4096);
        let bytes = dirty_pages.saturating_mul(self.bytes_per_dirty_page.unwrap_or(whole));
        Duration::from_secs_f64(bytes as f64 / self.link_bytes_per_s.max(1) as f64)
    }
}

/// The operator's limits.
#[derive(Clone, Copy, Debug)]
pub struct SwitchoverPolicy {
    /// How long the guest may stand still at the switchover.
    pub downtime_budget: Duration,
    /// Most pre-copy rounds; `None` leaves it to the trend.
    pub max_rounds: Option<u16>,
}

/// Rounds after which a pre-copy that may only end by fitting the budget gives up.
pub const PRECOPY_ROUNDS: u16 = 60;

/// Rounds after which a hybrid migration switches over whatever the trend.
pub const HYBRID_ROUNDS: u16 = 8;

/// What comes after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send the pages that have changed.
    AnotherRound,
    /// Stop the guest.
    Switchover(RunWhen),
    /// Pre-copy alone will not end.
    GiveUp(Failure),
}

/// Of the downtime budget, the part for stopping, saving and loading the guest rather than for pages.
const FIXED_DOWNTIME: Duration = Duration::from_millis(40);

/// A remainder that takes no longer than this to send is not worth another round.
const SMALL_REMAINDER: Duration = Duration::from_millis(15);

/// A round that leaves more than this share of the remainder before it does not converge.
const SHRINK: f64 = 0.75;

/// On a link that takes more than this, a device state that QEMU saves in milliseconds also crosses in
/// milliseconds.
const REHEARSAL_BYTES_PER_S: u64 = 50_000_000;

/// Whether to stop the guest for a moment in pre-copy and send its device state, so that at the
/// switchover only what has changed in it crosses.
pub fn rehearsal_pays(state_is_small: bool, link_bytes_per_s: u64) -> bool {
    !state_is_small && link_bytes_per_s <= REHEARSAL_BYTES_PER_S
}

impl SwitchoverPolicy {
    /// How much fits the downtime budget: what crosses right behind the flight while the destination loads.
    pub fn downtime_bytes(&self, link_bytes_per_s: u64, round_trip: Duration) -> u64 {
        let room = self.downtime_budget.saturating_sub(FIXED_DOWNTIME + round_trip / 2);
        (room.as_secs_f64() * link_bytes_per_s as f64) as u64
    }

    /// What comes after round number `rounds` (from 1 on).
    ///
    /// A remainder that fits the downtime budget ends the migration without post-copy, in either
    /// strategy: it is the safer end. It ends at once when the remainder is small beside the rest of
    /// the downtime, else only when another short round would not shrink it much further. A
    /// remainder that does not fit: hybrid goes on while rounds pay, that is while the changes made
    /// during the next round are expected to be less than what that round sends. Pages that are held back are
    /// part of the remainder, but no reason for a round.
    pub fn after_round(&self, strategy: Strategy, rounds: u16, round: &RoundSummary) -> Next {
        let remainder = round.remainder();
        let fixed = FIXED_DOWNTIME + round.round_trip / 2;
        // Changes come at the rate of the last round; the next one takes as long as what it sends plus
        // the round trip of its acknowledgement.
        let next = round.next_round();
        let last_s = round.duration.as_secs_f64().max(0.001);
        let shrinks = (next + round.round_trip).as_secs_f64() / last_s < SHRINK;
        if remainder + fixed <= self.downtime_budget || round.dirty_pages == 0 {
            let limit = self.max_rounds.unwrap_or(HYBRID_ROUNDS);
            return if next > SMALL_REMAINDER && shrinks && rounds < limit {
                Next::AnotherRound
            } else {
                Next::Switchover(RunWhen::Complete)
            };
        }
        match strategy {
            Strategy::Precopy => {
                if rounds >= self.max_rounds.unwrap_or(PRECOPY_ROUNDS) {
                    return Next::GiveUp(Failure::new(
                        format!(
                            "pre-copy does not converge: after {rounds} rounds {} pages are still \
                             changed, {} ms of sending, and the guest may stand still for {} ms, \
                             of which {} ms are for stopping and loading",
                            round.dirty_pages,
                            remainder.as_millis(),
                            self.downtime_budget.as_millis(),
                            fixed.as_millis(),
                        ),
                        "use --strategy hybrid, or allow more with --downtime",
                    ));
                }
                Next::AnotherRound
            }
            Strategy::Hybrid => {
                let limit = self.max_rounds.unwrap_or(HYBRID_ROUNDS);
                if rounds < limit && shrinks && !next.is_zero() {
                    Next::AnotherRound
                } else {
                    Next::Switchover(RunWhen::Loaded)
                }
            }
            Strategy::Postcopy => Next::Switchover(RunWhen::Loaded),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: SwitchoverPolicy =
        SwitchoverPolicy { downtime_budget: Duration::from_millis(300), max_rounds: None };

    fn round(dirty_pages: u64, bytes_per_dirty_page: u64, duration_ms: u64) -> RoundSummary {
        RoundSummary {
            messages: 1,
            sent_pages: 100_000,
            sent_bytes: 100_000_000,
            duration: Duration::from_millis(duration_ms),
            dirty_pages,
            held_back_pages: 0,
            bytes_per_dirty_page: Some(bytes_per_dirty_page),
            link_bytes_per_s: 12_500_000,
            round_trip: Duration::from_millis(40),
        }
    }

    #[test]
    fn a_remainder_that_fits_the_budget_ends_without_post_copy() {
        let small = round(500, 300, 10_000);
        for strategy in [Strategy::Hybrid, Strategy::Precopy] {
            let next = POLICY.after_round(strategy, 1, &small);
            assert_eq!(next, Next::Switchover(RunWhen::Complete));
        }
    }

    #[test]
    fn a_remainder_that_fits_is_shrunk_while_that_is_cheap() {
        let fits = round(5000, 300, 10_000);
        assert_eq!(POLICY.after_round(Strategy::Hybrid, 1, &fits), Next::AnotherRound);
        let stuck = round(5000, 300, 150);
        let next = POLICY.after_round(Strategy::Hybrid, 2, &stuck);
        assert_eq!(next, Next::Switchover(RunWhen::Complete));
    }

    #[test]
    fn hybrid_goes_on_while_rounds_shrink_and_then_switches_over() {
        let shrinking = round(100_000, 300, 10_000);
        assert_eq!(POLICY.after_round(Strategy::Hybrid, 1, &shrinking), Next::AnotherRound);
        let stuck = round(100_000, 300, 2_500);
        let next = POLICY.after_round(Strategy::Hybrid, 2, &stuck);
        assert_eq!(next, Next::Switchover(RunWhen::Loaded));
        let next = POLICY.after_round(Strategy::Hybrid, HYBRID_ROUNDS, &shrinking);
        assert_eq!(next, Next::Switchover(RunWhen::Loaded));
    }

    #[test]
    fn what_goes_along_with_the_flight_fits_the_downtime_budget() {
        let bytes = POLICY.downtime_bytes(10_000_000, Duration::from_millis(40));
        assert_eq!(bytes, 2_400_000, "300 ms less 40 and half a round trip");
        assert_eq!(POLICY.downtime_bytes(10_000_000, Duration::from_secs(1)), 0);
    }

    #[test]
    fn no_round_is_for_pages_that_are_held_back() {
        let held = |held_back_pages| RoundSummary { held_back_pages, ..round(5000, 300, 10_000) };
        let next = |round| POLICY.after_round(Strategy::Hybrid, 2, &round);
        assert_eq!(next(held(0)), Next::AnotherRound);
        assert_eq!(next(held(4900)), Next::Switchover(RunWhen::Complete));
        let all_of_many = RoundSummary { held_back_pages: 100_000, ..round(100_000, 300, 10_000) };
        assert_eq!(next(all_of_many), Next::Switchover(RunWhen::Loaded));
    }

    #[test]
    fn pre_copy_that_does_not_converge_gives_up_and_says_what_to_do() {
        let stuck = round(100_000, 300, 2_500);
        assert_eq!(POLICY.after_round(Strategy::Precopy, 5, &stuck), Next::AnotherRound);
        let Next::GiveUp(failure) = POLICY.after_round(Strategy::Precopy, PRECOPY_ROUNDS, &stuck)
        else {
            panic!("must give up");
        };
        assert!(failure.hint.unwrap().contains("hybrid"));
    }

    #[test]
    fn a_rehearsal_pays_where_a_device_state_takes_long_to_cross() {
        assert!(rehearsal_pays(false, 12_500_000));
        assert!(!rehearsal_pays(true, 12_500_000));
        assert!(!rehearsal_pays(false, 1_250_000_000));
    }

    #[test]
    fn an_idle_guest_needs_no_more_rounds_on_any_link() {
        let idle = RoundSummary { link_bytes_per_s: 0, ..round(0, 0, 1000) };
        let next = POLICY.after_round(Strategy::Hybrid, 1, &idle);
        assert_eq!(next, Next::Switchover(RunWhen::Complete));
    }
}
