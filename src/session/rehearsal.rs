//! The rehearsal of the handover: in pre-copy the guest is stopped for some milliseconds, its device
//! state is taken and sent, and the guest runs on. Most of that state never changes, so at the switchover
//! only the difference has to cross.

use std::time::{Duration, Instant};

use super::Shared;
use super::standstill::Standstill;
use crate::engine::Failure;
use crate::engine::policy::rehearsal_pays;
use crate::guest::SourceGuest;
use crate::wire::message::ToDestination;
use crate::wire::state::{PackedState, RehearsedState};

/// A state that takes more than this does not fit a control message; it crosses at the switchover, on the
/// state lane.
const LARGEST_BYTES: u64 = 12 << 20;

/// So does one that the link takes longer for: the end of the round, which is behind it, is waited for a minute.
const LONGEST_S: u64 = 30;

/// What a rehearsal has given.
pub(super) struct Rehearsed {
    state: Vec<u8>,
    pause: Duration,
    /// What of it may be sent, coded.
    most_bytes: u64,
}

/// Stops the guest, takes its device state and lets it run on, where that pays on a link that takes
/// `link_bytes_per_s`.
///
/// # Errors
/// When the guest does not run on. That its state cannot be taken is left to the freeze to tell.
pub(super) fn rehearse(
    guest: &Shared<dyn SourceGuest>,
    standstill: &Standstill,
    link_bytes_per_s: u64,
) -> Result<Option<Rehearsed>, Failure> {
    let pays = guest.with(|guest| {
        // Of one that its owner has paused, since it was attached to perhaps, the state is taken once, at the freeze.
        let runs = guest.is_running().unwrap_or(false);
        runs && rehearsal_pays(guest.has_small_state(), link_bytes_per_s)
    });
    if !pays {
        return Ok(None);
    }
    let begin = Instant::now();
    let state = standstill.during(|guest| Ok(guest.with(|guest| guest.save_device_state())?))?;
    match state {
        Ok(state) => {
            let most_bytes = LARGEST_BYTES.min(link_bytes_per_s.saturating_mul(LONGEST_S));
            Ok(Some(Rehearsed { state, pause: begin.elapsed(), most_bytes }))
        }
        Err(error) => {
            tracing::warn!("no rehearsal of the handover: {error}");
            Ok(None)
        }
    }
}

/// What the source remembers of a rehearsal.
#[derive(Default)]
pub(super) struct Rehearsal {
    state: Option<RehearsedState>,
    is_kept: bool,
    pause: Option<Duration>,
}

impl Rehearsal {
    /// Takes note of a rehearsal; gives what to tell the destination.
    pub(super) fn note(&mut self, rehearsed: Rehearsed) -> Option<ToDestination> {
        self.pause = Some(rehearsed.pause);
        let packed = PackedState::pack(&rehearsed.state, None);
        if packed.coded_bytes() as u64 > rehearsed.most_bytes {
            return None;
        }
        self.state = Some(RehearsedState::new(rehearsed.state));
        Some(ToDestination::Rehearsal(packed))
    }

    /// The destination has said what it keeps.
    pub(super) fn acknowledged(&mut self, check: u64) {
        self.is_kept = self.state.as_ref().is_some_and(|state| state.check() == check);
    }

    /// The state that the destination is known to keep.
    pub(super) fn base(&self) -> Option<&RehearsedState> {
        self.state.as_ref().filter(|_| self.is_kept)
    }

    /// How long the guest stood still for it.
    pub(super) fn pause(&self) -> Option<Duration> {
        self.pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_a_base_only_when_the_destination_has_said_that_it_keeps_it() {
        let mut rehearsal = Rehearsal::default();
        let pause = Duration::from_millis(3);
        let rehearsed = Rehearsed { state: vec![7; 1000], pause, most_bytes: LARGEST_BYTES };
        let Some(ToDestination::Rehearsal(packed)) = rehearsal.note(rehearsed) else {
            panic!("a small state is sent");
        };
        let there = RehearsedState::new(packed.unpack(None).unwrap());
        assert_eq!(rehearsal.base(), None, "not told yet");
        rehearsal.acknowledged(there.check() ^ 1);
        assert_eq!(rehearsal.base(), None, "told of another");
        rehearsal.acknowledged(there.check());
        assert_eq!(rehearsal.base(), Some(&there));
        assert_eq!(rehearsal.pause(), Some(Duration::from_millis(3)));
    }

    #[test]
    fn a_state_that_is_too_large_for_the_link_crosses_at_the_switchover() {
        let mut noise = vec![0; 64 << 10];
        let mut state = 1u64;
        for word in noise.as_chunks_mut::<8>().0 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            *word = (state ^ state >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes();
        }
        let mut rehearsal = Rehearsal::default();
        let most_bytes = noise.len() as u64 / 2;
        let rehearsed = Rehearsed { state: noise, pause: Duration::ZERO, most_bytes };
        assert_eq!(rehearsal.note(rehearsed), None);
        assert_eq!(rehearsal.base(), None);
    }
}
