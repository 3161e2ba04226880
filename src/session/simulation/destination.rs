//! The destination's session: what it does about its machine's actions, with the real page table and round
//! ledger, and pages whose content is a number.

use std::collections::VecDeque;

use super::super::ledger::{Noted, RoundLedger};
use super::guest::{Disk, Guest};
use super::mutation::Mutation;
use super::network::{FlightSent, Network, PageMessage};
use crate::engine::destination::*;
use crate::engine::{Failure, MigrationPhase};
use crate::memory::{Claim, PageTable, Stage, Want};
use crate::page::{PageIndex, PageRange, PageSet, Version};
use crate::wire::message::{Lacking, PackedSet, ToSource};

/// A step that takes time and then answers.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Journal(DestinationRecord),
    Prepare,
    /// Touches of this many pages are left, and the load waits for this one.
    Load(u8, Option<PageIndex>),
    Run,
    Release,
    Discard,
    Collect(u32, PagesOf),
}

#[derive(Debug)]
pub(super) struct Destination {
    /// None when the process has crashed.
    pub(super) machine: Option<DestinationMachine>,
    pub(super) memory: Vec<u32>,
    pub(super) table: PageTable,
    pub(super) ledger: RoundLedger,
    pub(super) switchover: Option<Version>,
    pub(super) remaining: u64,
    /// The final version, for a process that takes over.
    pub(super) kept: Option<Version>,
    /// Has taken over, and has not found the source yet.
    pub(super) looks_for_link: bool,
    pub(super) awaits_flight: Option<Version>,
    pub(super) steps: Vec<Step>,
    pub(super) journal: Disk<DestinationRecord>,
    pub(super) events: VecDeque<DestinationEvent>,
    /// Pages that are to be asked for.
    pub(super) asked: Vec<(PageIndex, bool)>,
    pub(super) runs: bool,
    pub(super) ran: bool,
    pub(super) discarded: bool,
    pub(super) end: Option<DestinationOutcome>,
    /// What the guest's two processors wait for.
    waits: [Option<PageIndex>; 2],
}

impl Destination {
    pub(super) fn new(pages: usize) -> Self {
        Destination {
            machine: Some(DestinationMachine::new()),
            memory: vec![0; pages],
            table: PageTable::anonymous(pages as u64).expect("a table of a few pages"),
            ledger: RoundLedger::default(),
            switchover: None,
            remaining: 0,
            kept: None,
            looks_for_link: false,
            awaits_flight: None,
            steps: Vec::new(),
            journal: Disk { lines: Vec::new() },
            events: VecDeque::new(),
            asked: Vec::new(),
            runs: false,
            ran: false,
            discarded: false,
            end: None,
            waits: [None; 2],
        }
    }

    pub(super) fn phase(&self) -> Option<MigrationPhase> {
        self.machine.as_ref().map(DestinationMachine::phase)
    }

    pub(super) fn is_over(&self) -> bool {
        self.machine.is_none() || self.end.is_some()
    }

    pub(super) fn tell(
        &mut self,
        event: DestinationEvent,
        network: &mut Network,
        mutation: Option<Mutation>,
    ) {
        if self.end.is_some() {
            return;
        }
        let Some(mut machine) = self.machine.take() else { return };
        let loaded = matches!(event, DestinationEvent::Loaded);
        machine.handle(event);
        if loaded && mutation == Some(Mutation::RunBeforeCommit) {
            self.steps.push(Step::Run);
        }
        let mut actions = 0;
        while let Some(action) = machine.poll() {
            self.act(action, network, mutation);
            actions += 1;
            assert!(actions < 10, "one event makes the destination do without end");
        }
        self.machine = Some(machine);
    }

    fn act(
        &mut self,
        action: DestinationAction,
        network: &mut Network,
        mutation: Option<Mutation>,
    ) {
        match action {
            DestinationAction::Send(message) => {
                let refusal = matches!(message, ToSource::Refused { .. });
                assert!(!refusal || !self.ran, "a guest that has run here is refused");
                let forgotten = mutation == Some(Mutation::ForgetRunning)
                    && matches!(message, ToSource::Running);
                if network.carries && !forgotten {
                    network.to_source.push_back(message);
                }
            }
            DestinationAction::Prepare { .. } => self.steps.push(Step::Prepare),
            DestinationAction::AwaitRound { round, messages } => {
                let noted = self.ledger.expect(round, messages);
                self.note(noted);
            }
            DestinationAction::CollectPages { outage, of } => {
                self.steps.push(Step::Collect(outage, of));
            }
            DestinationAction::AwaitFlight(version) => self.awaits_flight = Some(version),
            DestinationAction::LoadDeviceState => self.steps.push(Step::Load(3, None)),
            DestinationAction::Journal(record) => {
                self.steps.push(Step::Journal(record));
                if mutation == Some(Mutation::AnswerBeforeTheDisk) {
                    self.events.push_back(DestinationEvent::Journaled(record));
                }
            }
            DestinationAction::RunGuest => self.steps.push(Step::Run),
            DestinationAction::ReleaseGuest if mutation == Some(Mutation::DiscardWhatRan) => {
                self.steps.push(Step::Discard);
            }
            DestinationAction::ReleaseGuest => self.steps.push(Step::Release),
            DestinationAction::DiscardGuest => self.steps.push(Step::Discard),
            // Only how many bytes the device state takes hangs on it.
            DestinationAction::KeepRehearsal(_) => {}
            DestinationAction::End(outcome) => self.end = Some(outcome),
        }
    }

    fn note(&mut self, noted: Noted) {
        match noted {
            // Its frames have no kin.
            Noted::Waiting | Noted::Apply(_) | Noted::Full(_) => {}
            Noted::RoundDone(round, rejected) => {
                self.events.push_back(DestinationEvent::RoundApplied { round, rejected });
            }
            Noted::AskAgain(pages) => self.asked.extend(pages.into_iter().map(|page| (page, true))),
            Noted::OutOfTurn => {
                panic!("pages or a round's end out of turn, between two honest sides")
            }
            Noted::Spoilt(pages) => panic!("{pages} pages came spoilt, between two honest sides"),
        }
    }

    /// The steps that get on by themselves. A load gets on when the page that it waits for is here, or when
    /// the guest is discarded, which waits for it.
    pub(super) fn steps_that_get_on(&self) -> impl Iterator<Item = usize> {
        let loads = self.steps.iter().any(|step| matches!(step, Step::Load(..)));
        self.steps.iter().enumerate().filter_map(move |(at, step)| {
            let gets_on = match step {
                Step::Load(_, Some(page)) => {
                    self.table.state(*page).is_complete() || self.is_discarding()
                }
                Step::Discard => !loads,
                _ => true,
            };
            gets_on.then_some(at)
        })
    }

    fn is_discarding(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Discard))
    }

    /// A step is done, or goes on, or has `failed`.
    pub(super) fn finish_step(
        &mut self,
        at: usize,
        failed: bool,
        rng: &mut fastrand::Rng,
    ) -> Option<DestinationEvent> {
        let failure = || Failure::plain("injected");
        if let Step::Load(touches @ 1.., waits) = self.steps[at]
            && !failed
            && !self.is_discarding()
        {
            // A monitor touches RAM while it loads, and waits for what it touches.
            let any = PageIndex(rng.u64(0..self.memory.len() as u64));
            let page = waits.unwrap_or(any);
            self.steps[at] = match self.touch(page) {
                true => Step::Load(touches - 1, None),
                false => Step::Load(touches, Some(page)),
            };
            return None;
        }
        let step = self.steps.remove(at);
        Some(match (step, failed) {
            (Step::Journal(record), false) => {
                self.journal.lines.push(record);
                DestinationEvent::Journaled(record)
            }
            // Taken back, or there or not.
            (Step::Journal(record), true) => match rng.u8(0..3) {
                0 => DestinationEvent::JournalFailed(record, failure()),
                1 => DestinationEvent::JournalUnknown(record, failure()),
                _ => {
                    self.journal.lines.push(record);
                    DestinationEvent::JournalUnknown(record, failure())
                }
            },
            (Step::Run, true) if rng.bool() => DestinationEvent::NotStarted(failure()),
            (Step::Run, failed) => {
                // A monitor that fails to say that it runs may run all the same.
                if !failed || rng.bool() {
                    self.run();
                }
                if failed { DestinationEvent::Failed(failure()) } else { DestinationEvent::Running }
            }
            (Step::Collect(outage, of), false) => {
                DestinationEvent::PagesCollected { outage, pages: self.collect(outage, of) }
            }
            (Step::Release | Step::Discard, true) => DestinationEvent::LetGoFailed,
            (_, true) => DestinationEvent::Failed(failure()),
            (Step::Prepare, false) => DestinationEvent::Prepared,
            (Step::Load(..), false) => DestinationEvent::Loaded,
            (Step::Release, false) => DestinationEvent::Released,
            (Step::Discard, false) => {
                self.discard();
                DestinationEvent::Released
            }
        })
    }

    fn run(&mut self) {
        assert!(self.journal.has(DestinationRecord::Committed), "it runs before that is on disk");
        assert!(!self.journal.has(DestinationRecord::Refused), "a guest that was refused runs");
        assert!(!self.discarded, "a guest that was discarded runs");
        (self.runs, self.ran) = (true, true);
    }

    pub(super) fn discard(&mut self) {
        assert!(!self.ran, "a guest that has run is discarded");
        self.discarded = true;
    }

    fn collect(&mut self, outage: u32, of: PagesOf) -> PagesHere {
        match of {
            PagesOf::Round(round) => {
                assert!(self.ledger.end(round, outage), "the source names a round out of turn");
                PagesHere::Held(PackedSet::pack(&self.table.stale_at(round)))
            }
            PagesOf::Remainder => PagesHere::Lacking(Lacking {
                missing: PackedSet::pack(&self.table.incomplete()),
                without_base: PackedSet::pack(&self.table.absent()),
            }),
        }
    }

    /// A push message or a fault reply has come. Some of its first page's bytes are `damaged`.
    pub(super) fn apply(
        &mut self,
        message: &PageMessage,
        damaged: bool,
        mutation: Option<Mutation>,
    ) {
        let was_complete = self.is_complete();
        let last = self.switchover.is_some();
        if let Some(version) = self.switchover {
            assert_eq!(message.version, version, "pages of a version that is over");
        }
        let mut rejected = Vec::new();
        for (position, sent) in message.pages.iter().enumerate() {
            let at = sent.page.0 as usize;
            let mapped = self.table.state(sent.page).stage == Stage::Mapped;
            if mapped && mutation == Some(Mutation::OverwriteMapped) {
                self.write(sent.page, sent.content);
            }
            let Claim::Claimed { previous } = self.table.claim(sent.page, message.version) else {
                continue;
            };
            let fits = sent.base.is_none_or(|(version, _)| {
                previous.stage == Stage::Stale && previous.version == version
            });
            let apply_anyway = mutation == Some(Mutation::ApplyToAnyBase);
            if (!fits && !apply_anyway) || (damaged && position == 0) {
                self.table.abandon(sent.page, previous);
                rejected.push(sent.page);
                continue;
            }
            if let Some((_, content)) = sent.base {
                assert_eq!(self.memory[at], content, "a delta is applied to another version");
            }
            self.write(sent.page, sent.content);
            self.table.finish(sent.page, message.version, sent.content == 0, last);
            if last {
                self.remaining =
                    self.remaining.checked_sub(1).expect("more pages than were missing");
                self.map_if_awaited(sent.page);
            }
        }
        if mutation == Some(Mutation::ForgetRejectedPages) {
            rejected.clear();
        }
        let noted = self.ledger.note(message.version, rejected);
        self.note(noted);
        if !was_complete && self.is_complete() {
            self.events.push_back(DestinationEvent::PagesComplete);
        }
    }

    pub(super) fn write(&mut self, page: PageIndex, content: u32) {
        let stage = self.table.state(page).stage;
        assert_ne!(stage, Stage::Mapped, "{page:?} belongs to the guest and is overwritten");
        self.memory[page.0 as usize] = content;
    }

    pub(super) fn is_complete(&self) -> bool {
        self.switchover.is_some() && self.remaining == 0
    }

    /// As `Arrivals::switch_over`.
    pub(super) fn flight_arrives(&mut self, flight: &FlightSent) {
        let FlightSent { version, need, zero } = flight;
        assert_eq!(self.awaits_flight.take(), Some(*version), "a flight that was not offered");
        assert!(self.ledger.may_close_at(*version), "a switchover that is out of turn");
        assert!(need.iter().all(|page| !zero.contains(page)), "needed and zero");
        let missing = self.table.missing_of(need, *version);
        for page in zero.iter() {
            if let Claim::Claimed { .. } = self.table.claim(page, *version) {
                self.write(page, 0);
                self.table.finish(page, *version, true, false);
            }
        }
        let waiting = self.table.freeze(&missing).expect("what is not needed is here");
        self.remaining = missing.len();
        (self.switchover, self.kept) = (Some(*version), Some(*version));
        waiting.into_iter().for_each(|page| self.map_if_awaited(page));
        let again = self.ledger.close();
        self.note(Noted::AskAgain(again));
        if missing.is_empty() {
            self.events.push_back(DestinationEvent::PagesComplete);
        }
        self.events.push_back(DestinationEvent::FlightArrived);
    }

    fn map_if_awaited(&mut self, page: PageIndex) {
        let state = self.table.state(page);
        if state.is_complete() && state.waiting {
            self.table.mark_mapped(PageRange::new(page.0, page.0 + 1));
        }
    }

    /// True when the page is the guest's now; else it waits for it.
    fn touch(&mut self, page: PageIndex) -> bool {
        match self.table.want(page) {
            Want::Serve { .. } => {
                self.table.mark_mapped(PageRange::new(page.0, page.0 + 1));
                true
            }
            Want::Ask { first } => {
                if first {
                    self.asked.push((page, false));
                }
                false
            }
        }
    }

    /// One of the guest's processors works, or goes on waiting. True when it got on.
    pub(super) fn work(
        &mut self,
        guest: &mut Guest,
        rng: &mut fastrand::Rng,
        mutation: Option<Mutation>,
    ) -> bool {
        let cpu = rng.usize(0..2);
        let page = self.waits[cpu]
            .take()
            .unwrap_or_else(|| PageIndex(rng.u64(0..self.memory.len() as u64)));
        if mutation != Some(Mutation::MapStale) && !self.touch(page) {
            self.waits[cpu] = Some(page);
            return false;
        }
        let at = page.0 as usize;
        assert_eq!(
            self.memory[at], guest.memory[at],
            "the guest sees {page:?} stale, torn or absent"
        );
        if rng.u8(0..3) != 0 {
            self.memory[at] = guest.write(at, rng);
        }
        true
    }

    /// A page that is here is mapped before it is touched.
    pub(super) fn map_one(&mut self, page: PageIndex) {
        self.table.mark_mapped(PageRange::new(page.0, page.0 + 1));
    }

    pub(super) fn lacking(&self) -> PageSet {
        self.table.incomplete()
    }

    /// A process that leaves a guest with all its pages sees to it that it runs.
    pub(super) fn finish_starting(&mut self) {
        if self.steps.drain(..).any(|step| matches!(step, Step::Run)) {
            self.run();
        }
    }

    /// The process is killed: what it was about to do is done or not.
    pub(super) fn crash(&mut self, rng: &mut fastrand::Rng) {
        self.machine = None;
        self.looks_for_link = false;
        self.tear(rng);
        for step in std::mem::take(&mut self.steps) {
            match step {
                _ if rng.bool() => {}
                Step::Journal(record) => self.journal.lines.push(record),
                Step::Run => self.run(),
                Step::Discard => self.discard(),
                _ => {}
            }
        }
        self.asked.clear();
    }
}
