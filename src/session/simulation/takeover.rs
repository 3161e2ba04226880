//! Another process takes the place of a killed one: what `source/resumed.rs` and
//! `destination/resumed.rs` do, with what outlives a process. That is the journal, the guest, and at the
//! destination the page table.

use super::destination::{self, Destination};
use super::mutation::Mutation;
use super::plan::Plan;
use super::source::{Frozen, Source};
use super::world::World;
use crate::engine::Failure;
use crate::engine::destination::{
    DestinationEvent, DestinationMachine, DestinationOutcome, DestinationRecord,
};
use crate::engine::heat::Heat;
use crate::engine::pusher::Pusher;
use crate::engine::source::{SourceMachine, SourceOutcome, SourceRecord};
use crate::memory::{Claim, Stage};
use crate::page::{PageIndex, PageSet};
use crate::session::ledger::RoundLedger;

fn killed() -> Failure {
    Failure::plain("killed")
}

impl Source {
    /// Takes the place of the process that was killed.
    pub(super) fn resume(&mut self, plan: &Plan, mutation: Option<Mutation>) {
        assert!(self.machine.is_none() && self.end.is_none() && self.steps.is_empty());
        self.events.clear();
        let complete = match mutation {
            Some(Mutation::TakeRunningForComplete) => self.journal.has(SourceRecord::Running),
            _ => self.journal.has(SourceRecord::Complete),
        };
        if complete {
            self.end = Some(SourceOutcome::Migrated);
            return;
        }
        let void = self.journal.has(SourceRecord::Void);
        let decided = self.journal.has(SourceRecord::Decided) && !void;
        // A decision that was taken back although that could not be written down: a person must look.
        if decided && self.runs {
            self.runs = false;
            self.end = Some(SourceOutcome::InDoubt(killed()));
            return;
        }
        if !decided || mutation == Some(Mutation::ForgetTheDecision) {
            self.run_again();
            self.end = Some(SourceOutcome::Stayed(killed()));
            return;
        }
        let version = self.kept.expect("kept before the decision");
        let pages = self.pages();
        let (need, zero) = (PageSet::full(pages), PageSet::empty(pages));
        let pusher = Pusher::new(need.clone(), Heat::new(pages), plan.pusher);
        self.frozen = Some(Frozen { version, need, zero, pusher });
        self.bases = vec![None; pages as usize];
        let running = self.journal.has(SourceRecord::Running);
        self.machine = Some(SourceMachine::resumed(plan.source_config(), running));
        self.looks_for_link = true;
    }
}

impl Destination {
    /// Takes the place of the process that was killed. `fails`: it cannot write that it refuses the guest,
    /// and ends.
    pub(super) fn resume(&mut self, fails: bool, mutation: Option<Mutation>) {
        assert!(self.machine.is_none() && self.end.is_none() && self.steps.is_empty());
        self.events.clear();
        self.ledger = RoundLedger::default();
        let refused = self.journal.has(DestinationRecord::Refused);
        let committed = self.journal.has(DestinationRecord::Committed)
            || (mutation == Some(Mutation::RunWhatIsLoaded)
                && self.journal.has(DestinationRecord::Loaded));
        self.looks_for_link = true;
        if committed && !refused && self.journal.has(DestinationRecord::Complete) {
            self.machine = Some(DestinationMachine::resumed_complete());
            return;
        }
        if committed && !refused {
            return self.serve_again(mutation);
        }
        if !refused {
            if fails {
                return;
            }
            self.journal.lines.push(DestinationRecord::Refused);
        }
        self.discard();
        self.machine = Some(DestinationMachine::resumed_to_refuse(killed()));
    }

    /// The guest runs here, or will.
    fn serve_again(&mut self, mutation: Option<Mutation>) {
        let version = self.kept.expect("kept before the decision was written down");
        if mutation == Some(Mutation::TrustTornPages) {
            for page in self.torn_pages() {
                self.table.finish(page, version, false, true);
            }
        }
        self.table.recover();
        self.ledger.close();
        self.switchover = Some(version);
        self.remaining = self.table.incomplete().len();
        self.machine = Some(DestinationMachine::resumed());
        // Harmless when it runs.
        self.steps.push(destination::Step::Run);
        if self.remaining == 0 {
            self.events.push_back(DestinationEvent::PagesComplete);
        }
    }

    /// The process is killed while its threads write pages: what of these has come to be there is unknown.
    pub(super) fn tear(&mut self, rng: &mut fastrand::Rng) {
        let Some(version) = self.switchover.filter(|_| rng.bool()) else { return };
        for page in self.table.incomplete().iter().filter(|_| rng.u8(0..3) == 0) {
            if let Claim::Claimed { .. } = self.table.claim(page, version) {
                self.write(page, TORN);
            }
        }
    }

    fn torn_pages(&self) -> Vec<PageIndex> {
        let pages = (0..self.table.pages()).map(PageIndex);
        pages.filter(|page| self.table.state(*page).stage == Stage::Applying).collect()
    }
}

/// The content of a page that was not written to its end. No guest writes it.
const TORN: u32 = u32::MAX;

impl World {
    pub(super) fn source_can_resume(&self) -> bool {
        let source = &self.source;
        self.plan.resumes > 0 && source.machine.is_none() && source.end.is_none()
    }

    pub(super) fn destination_can_resume(&self) -> bool {
        let destination = &self.destination;
        // Before the first word nothing was kept that another process could go on with.
        let begun = destination.journal.has(DestinationRecord::Started);
        let dead = destination.machine.is_none() && destination.end.is_none();
        self.plan.resumes > 0 && dead && begun
    }

    pub(super) fn source_resumes(&mut self) {
        self.plan.resumes -= 1;
        self.network.lose_source();
        let lacks = self.destination.ran && !self.destination.lacking().is_empty();
        self.tally.source_takeovers_in_postcopy += u64::from(lacks);
        let plan = self.planned.clone();
        self.source.resume(&plan, self.mutation);
    }

    pub(super) fn destination_resumes(&mut self) {
        self.plan.resumes -= 1;
        self.network.lose_destination();
        if self.destination.ran && !self.destination.lacking().is_empty() {
            self.tally.destination_takeovers_in_postcopy += 1;
            self.tally.of_these_with_torn_pages +=
                u64::from(!self.destination.torn_pages().is_empty());
        }
        let fails = self.step_fails();
        self.destination.resume(fails, self.mutation);
    }

    /// A process that took over has not found the other side: it ends, and can be started again.
    pub(super) fn source_searched_in_vain(&mut self) -> bool {
        let in_vain = std::mem::take(&mut self.source.looks_for_link);
        if in_vain {
            self.source.crash(&mut self.rng);
        }
        in_vain
    }

    /// The same. Where the other side is not needed any more, it is as well.
    pub(super) fn destination_searched_in_vain(&mut self) -> bool {
        let in_vain = std::mem::take(&mut self.destination.looks_for_link);
        if !in_vain {
            return false;
        }
        let destination = &mut self.destination;
        if destination.discarded {
            destination.end = Some(DestinationOutcome::Refused(killed()));
        } else if destination.is_complete() {
            destination.finish_starting();
            destination.end = Some(DestinationOutcome::Migrated);
        } else {
            destination.crash(&mut self.rng);
        }
        true
    }
}
