//! The invariants: what must hold at every step, and what in the end.

use super::fences;
use super::world::World;
use crate::engine::destination::{DestinationOutcome, DestinationRecord};
use crate::engine::source::{SourceOutcome, SourceRecord};
use crate::page::PageIndex;

/// More messages than this on their way at once grow without bound: a round of the largest guest here, a push of
/// it, and a request with its answers for every page.
const MAX_MESSAGES: usize = 64;

/// More steps than this under way at once grow without bound.
const MAX_STEPS_AT_ONCE: usize = 16;

impl World {
    /// What must hold at every step.
    pub(super) fn check(&mut self) {
        if self.source.machine.is_none() || self.destination.machine.is_none() {
            self.network.carries = false;
        }
        let both = self.source.runs && self.destination.runs;
        assert!(!both, "the guest runs at two places");
        let waiting = self.network.len();
        assert!(waiting <= MAX_MESSAGES, "{waiting} messages on their way: no bound holds them");
        let pending = self.source.steps.len() + self.destination.steps.len();
        assert!(pending < MAX_STEPS_AT_ONCE, "{pending} steps under way at once");
    }

    /// What must hold when nothing moves any more.
    pub(super) fn check_end(&self) {
        let (source, destination) = (&self.source, &self.destination);
        assert!(source.is_over(), "the source waits for ever: {:?}", source.phase());
        assert!(destination.is_over(), "the destination waits for ever: {:?}", destination.phase());
        self.check_outcomes();
        self.check_nothing_is_lost();
        fences::check(source, destination);
        if self.planned.is_only_about_links() {
            let moved = source.end == Some(SourceOutcome::Migrated)
                && destination.end == Some(DestinationOutcome::Migrated);
            let stayed = matches!(source.end, Some(SourceOutcome::Stayed(_)));
            let broke = self.planned.cuts > 0;
            let ends = (&source.end, &destination.end);
            assert!(moved || (stayed && broke), "only the link broke, and it ended so: {ends:?}");
        }
        // Whatever was killed was taken over, and nobody lost patience.
        let over = source.end.is_some() && destination.end.is_some();
        if self.planned.is_only_about_links_and_kills() && over && !self.gave_up {
            assert!(source.runs || destination.runs, "killed, taken over, and the guest stands");
        }
    }

    /// What a side says at its end is true.
    fn check_outcomes(&self) {
        let (source, destination) = (&self.source, &self.destination);
        match source.end {
            Some(SourceOutcome::Migrated | SourceOutcome::LostPages(_)) => {
                assert!(destination.ran && !source.runs);
            }
            Some(SourceOutcome::Stayed(_)) => {
                assert!((source.runs || source.resume_failed) && !destination.ran);
            }
            Some(SourceOutcome::InDoubt(_)) => assert!(!source.runs),
            None => {}
        }
        match destination.end {
            Some(DestinationOutcome::Migrated) => {
                assert!(destination.runs);
                assert!(destination.lacking().is_empty(), "migrated, and pages are missing");
            }
            Some(DestinationOutcome::Refused(_)) => assert!(!destination.ran),
            Some(DestinationOutcome::InDoubt(_) | DestinationOutcome::LostPages(_)) | None => {}
        }
    }

    /// It runs at one place, or the journals tell at which it can be made to; and there, or at both together, is
    /// every page.
    fn check_nothing_is_lost(&self) {
        let (source, destination) = (&self.source, &self.destination);
        if destination.ran {
            assert!(destination.journal.has(DestinationRecord::Committed));
            assert!(source.journal.has(SourceRecord::Decided) && !source.runs);
            let missing = destination.lacking();
            let let_go = source.end == Some(SourceOutcome::Migrated);
            assert!(!let_go || missing.is_empty(), "the source lets go of pages that are missing");
            for (at, content) in self.guest.memory.iter().enumerate() {
                let there = !missing.contains(PageIndex(at as u64));
                let memory = if there { &destination.memory } else { &source.memory };
                assert_eq!(memory[at], *content, "page {at} is lost");
            }
        } else {
            assert_eq!(source.memory, self.guest.memory, "the source's copy is not the guest's");
            // By hand, or by itself: nobody has run it elsewhere, and nobody will.
            assert!(destination.is_over());
        }
    }
}
