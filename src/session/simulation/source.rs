//! The source's session: what it does about its machine's actions, with the engine's own page sets.

use std::collections::VecDeque;
use std::time::Duration;

use super::guest::{Disk, Guest};
use super::mutation::Mutation;
use super::network::{FlightSent, Network, PageMessage, PageSent};
use super::plan::Plan;
use crate::engine::heat::Heat;
use crate::engine::policy::RoundSummary;
use crate::engine::precopy::{PrecopyPlan, Remainder};
use crate::engine::pusher::{Pusher, PusherKind, Wanted};
use crate::engine::source::*;
use crate::engine::{Failure, MigrationPhase};
use crate::page::{PageIndex, PageRange, PageSet, Version};
use crate::wire::message::{Lacking, PackedSet, ToDestination};

/// Pages that go along with the answer to a fault.
const BUNDLE_PAGES: usize = 3;

/// A step that takes time and then answers.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Journal(SourceRecord),
    Freeze(Version),
    Resume,
    Release,
}

/// A round that is being sent: the pages to read yet, and messages so far.
#[derive(Debug)]
pub(super) struct Round {
    version: Version,
    taken: Option<Vec<PageIndex>>,
    messages: u64,
}

/// The pages that do not change any more.
#[derive(Debug)]
pub(super) struct Frozen {
    pub(super) version: Version,
    pub(super) need: PageSet,
    pub(super) zero: PageSet,
    pub(super) pusher: Pusher,
}

#[derive(Debug)]
pub(super) struct Source {
    /// None when the process has crashed.
    pub(super) machine: Option<SourceMachine>,
    pub(super) memory: Vec<u32>,
    populated: PageSet,
    pub(super) runs: bool,
    tracked: PageSet,
    plan: PrecopyPlan,
    pub(super) bases: Vec<Option<(Version, u32)>>,
    pub(super) round: Option<Round>,
    pub(super) frozen: Option<Frozen>,
    /// The final version, for a process that takes over.
    pub(super) kept: Option<Version>,
    /// Has taken over, and has not found the destination yet.
    pub(super) looks_for_link: bool,
    pub(super) pushing: bool,
    /// Fault requests are heard.
    pub(super) answers: bool,
    /// On this link.
    answered: PageSet,
    pub(super) steps: Vec<Step>,
    /// Journal lines are written one after the other.
    pub(super) journal: Disk<SourceRecord>,
    pub(super) events: VecDeque<SourceEvent>,
    pub(super) end: Option<SourceOutcome>,
    pub(super) may_have_said_commit: bool,
    /// Since Commit was said: that the destination has refused, or has nothing that it could run.
    pub(super) heard_refusal: bool,
    pub(super) void_failed: bool,
    pub(super) resume_failed: bool,
    rounds_before_fit: u16,
    pusher: PusherKind,
}

impl Source {
    pub(super) fn new(plan: &Plan, guest: &Guest) -> Self {
        let pages = guest.memory.len() as u64;
        let mut populated = PageSet::empty(pages);
        for (page, content) in guest.memory.iter().enumerate() {
            if *content != 0 {
                populated.insert(PageIndex(page as u64));
            }
        }
        Source {
            machine: Some(SourceMachine::new(plan.source_config())),
            memory: guest.memory.clone(),
            populated,
            runs: true,
            tracked: PageSet::empty(pages),
            plan: PrecopyPlan::new(pages),
            bases: vec![None; pages as usize],
            round: None,
            frozen: None,
            kept: None,
            looks_for_link: false,
            pushing: false,
            answers: false,
            answered: PageSet::empty(pages),
            steps: Vec::new(),
            journal: Disk { lines: Vec::new() },
            events: VecDeque::new(),
            end: None,
            may_have_said_commit: false,
            heard_refusal: false,
            void_failed: false,
            resume_failed: false,
            rounds_before_fit: plan.rounds_before_fit,
            pusher: plan.pusher,
        }
    }

    pub(super) fn pages(&self) -> u64 {
        self.memory.len() as u64
    }

    pub(super) fn phase(&self) -> Option<MigrationPhase> {
        self.machine.as_ref().map(SourceMachine::phase)
    }

    pub(super) fn is_over(&self) -> bool {
        self.machine.is_none() || self.end.is_some()
    }

    /// The guest works here.
    pub(super) fn work(&mut self, guest: &mut Guest, rng: &mut fastrand::Rng) {
        let page = rng.usize(0..self.memory.len());
        assert_eq!(self.memory[page], guest.memory[page], "page {page} is wrong at the source");
        if rng.u8(0..3) != 0 {
            self.memory[page] = guest.write(page, rng);
            self.tracked.insert(PageIndex(page as u64));
            self.populated.insert(PageIndex(page as u64));
        }
    }

    /// Takes in an event and does what follows from it.
    pub(super) fn tell(
        &mut self,
        event: SourceEvent,
        network: &mut Network,
        now: Duration,
        mutation: Option<Mutation>,
    ) {
        if self.end.is_some() {
            return;
        }
        let Some(mut machine) = self.machine.take() else { return };
        machine.handle(now, event);
        let mut actions = 0;
        while let Some(action) = machine.poll() {
            self.act(action, network, mutation);
            actions += 1;
            assert!(actions < 10, "one event makes the source do without end");
        }
        self.machine = Some(machine);
    }

    fn act(&mut self, action: SourceAction, network: &mut Network, mutation: Option<Mutation>) {
        match action {
            SourceAction::Send(message) => {
                if matches!(message, ToDestination::Commit) {
                    let noted = self.journal.has(SourceRecord::Decided);
                    assert!(noted, "Commit is said before the decision is on disk");
                    assert!(!self.runs, "Commit is said while the guest runs here");
                    (self.may_have_said_commit, self.heard_refusal) = (true, false);
                }
                if network.carries {
                    network.to_destination.push_back(message);
                }
            }
            SourceAction::SendRound(version) => {
                self.plan.begin_round();
                self.round = Some(Round { version, taken: None, messages: 0 });
            }
            SourceAction::ForgetPages(pages) => {
                if mutation != Some(Mutation::ApplyToAnyBase) {
                    pages.iter().for_each(|page| self.bases[page.0 as usize] = None);
                }
                self.plan.mark_dirty(&pages);
            }
            SourceAction::EndRound { held } => self.end_round(&held, mutation),
            SourceAction::Freeze(version) => self.steps.push(Step::Freeze(version)),
            SourceAction::SendFlight => {
                let Frozen { version, need, zero, .. } = self.frozen.as_ref().expect("frozen");
                let (version, need, zero) = (*version, need.clone(), zero.clone());
                if network.carries {
                    network.flight = Some(FlightSent { version, need, zero });
                }
            }
            SourceAction::SendRemainder => {
                let Frozen { need, pusher, .. } = self.frozen.as_mut().expect("frozen");
                pusher.begin_again(need);
                (self.pushing, self.answers) = (true, true);
            }
            SourceAction::SendLacking(lacking) => self.send_lacking(&lacking, mutation),
            SourceAction::Journal(record) => {
                if (record, mutation) == (SourceRecord::Running, Some(Mutation::ForgetFrozenPages))
                {
                    self.memory.fill(0);
                }
                self.steps.push(Step::Journal(record));
                if mutation == Some(Mutation::AnswerBeforeTheDisk) {
                    self.events.push_back(SourceEvent::Journaled(record));
                }
            }
            SourceAction::ResumeGuest => self.steps.push(Step::Resume),
            SourceAction::ReleaseGuest => self.steps.push(Step::Release),
            SourceAction::End(outcome) => {
                let in_doubt = matches!(outcome, SourceOutcome::InDoubt(_));
                self.runs |= in_doubt && mutation == Some(Mutation::ResumeWhenInDoubt);
                self.end = Some(outcome);
            }
        }
    }

    fn end_round(&mut self, held: &PackedSet, mutation: Option<Mutation>) {
        assert!(self.round.is_none(), "the round is still being sent");
        let held = held.unpack(self.pages()).expect("a set of this guest");
        let lost = match mutation {
            Some(Mutation::BelieveTheRoundArrived) => {
                self.plan.end_round_early(&PageSet::full(self.pages()))
            }
            _ => self.plan.end_round_early(&held),
        };
        lost.iter().for_each(|page| self.bases[page.0 as usize] = None);
    }

    fn send_lacking(&mut self, lacking: &Lacking, mutation: Option<Mutation>) {
        let pages = self.pages();
        let without_base = lacking.without_base.unpack(pages).expect("a set of this guest");
        without_base.iter().for_each(|page| self.bases[page.0 as usize] = None);
        let missing = lacking.missing.unpack(pages).expect("a set of this guest");
        let Frozen { pusher, .. } = self.frozen.as_mut().expect("frozen");
        if mutation != Some(Mutation::DoNotSendAgain) {
            pusher.begin_again(&missing);
        }
        (self.pushing, self.answers) = (true, true);
    }

    /// A step is done, or has `failed`: gives what the machine is told of it.
    pub(super) fn finish_step(
        &mut self,
        at: usize,
        failed: bool,
        rng: &mut fastrand::Rng,
    ) -> Option<SourceEvent> {
        let failure = || Failure::plain("injected");
        Some(match self.steps.remove(at) {
            Step::Journal(record) => {
                // What failed to be written may be there all the same.
                if !failed || rng.bool() {
                    self.journal.lines.push(record);
                }
                self.void_failed |= failed && record == SourceRecord::Void;
                match failed {
                    true => SourceEvent::JournalFailed(record, failure()),
                    false => SourceEvent::Journaled(record),
                }
            }
            Step::Freeze(_) if failed => {
                self.runs &= rng.bool();
                SourceEvent::FreezeFailed(failure())
            }
            Step::Freeze(version) => {
                self.freeze(version);
                SourceEvent::Frozen { flight: Duration::ZERO }
            }
            Step::Resume if failed => {
                self.resume_failed = true;
                SourceEvent::ResumeFailed(failure())
            }
            Step::Resume => {
                self.run_again();
                SourceEvent::Resumed
            }
            Step::Release if failed => SourceEvent::Failed(failure()),
            Step::Release => SourceEvent::Released,
        })
    }

    pub(super) fn run_again(&mut self) {
        // Or the next process would take it for decided.
        let void = self.journal.has(SourceRecord::Void) || self.void_failed;
        assert!(void || !self.journal.has(SourceRecord::Decided), "resumed while decided");
        if self.may_have_said_commit {
            assert!(self.heard_refusal, "the guest is resumed after Commit was said");
        }
        self.runs = true;
    }

    fn freeze(&mut self, version: Version) {
        self.runs = false;
        self.collect();
        let remainder = Remainder::of(self.plan.unsent(), self.populated.clone());
        let pusher = Pusher::new(remainder.need.clone(), Heat::new(self.pages()), self.pusher);
        let (need, zero) = (remainder.need, remainder.zero);
        self.frozen = Some(Frozen { version, need, zero, pusher });
        self.kept = Some(version);
    }

    fn collect(&mut self) {
        let none = PageSet::empty(self.pages());
        let tracked = std::mem::replace(&mut self.tracked, none);
        self.plan.found_mut().union_with(&tracked);
    }

    /// The round's sender goes on: takes the round's pages, reads and sends one message of them, or is
    /// done.
    pub(super) fn go_on_with_round(
        &mut self,
        network: &mut Network,
        rng: &mut fastrand::Rng,
    ) -> Option<SourceEvent> {
        let mut round = self.round.take().expect("a round");
        let Some(mut left) = round.taken.take() else {
            let mut pages = Vec::new();
            if let Some(chunk) = self.plan.next_chunk() {
                self.collect();
                self.plan.take(PageRange::new(0, chunk.end.0), &mut pages);
            }
            round.taken = Some(pages);
            self.round = Some(round);
            return None;
        };
        if left.is_empty() {
            self.collect();
            let rounds = self.machine.as_ref().map_or(0, SourceMachine::rounds);
            return Some(SourceEvent::RoundSent(RoundSummary {
                messages: round.messages,
                sent_pages: 1,
                sent_bytes: 4096,
                duration: Duration::from_secs(100_000),
                dirty_pages: if rounds > self.rounds_before_fit { 0 } else { 1 << 20 },
                link_bytes_per_s: 1 << 20,
                ..Default::default()
            }));
        }
        let rest = left.split_off(rng.usize(1..=left.len()));
        let message = self.encode(round.version, &left, false);
        for sent in &message.pages {
            // The cache is full now and then.
            let kept = rng.u8(0..5) != 0 && sent.content != 0;
            self.bases[sent.page.0 as usize] = kept.then_some((round.version, sent.content));
        }
        if network.carries {
            network.pages.push(message);
        }
        round.messages += 1;
        round.taken = Some(rest);
        self.round = Some(round);
        None
    }

    fn encode(&self, version: Version, pages: &[PageIndex], whole: bool) -> PageMessage {
        let sent = |page: &PageIndex| PageSent {
            page: *page,
            base: self.bases[page.0 as usize].filter(|_| !whole),
            content: self.memory[page.0 as usize],
        };
        PageMessage { version, pages: pages.iter().map(sent).collect() }
    }

    /// The pusher sends its next message, or is done.
    pub(super) fn push(
        &mut self,
        network: &mut Network,
        rng: &mut fastrand::Rng,
        mutation: Option<Mutation>,
    ) -> Option<SourceEvent> {
        let Frozen { version, pusher, need, .. } = self.frozen.as_mut().expect("frozen");
        if mutation == Some(Mutation::PushWithoutEnd) {
            pusher.begin_again(need);
        }
        let (version, mut pages) = (*version, Vec::new());
        pusher.take(rng.usize(1..4), &|_| 1, &mut pages);
        if pages.is_empty() {
            self.pushing = false;
            return Some(SourceEvent::RemainderSent);
        }
        let message = self.encode(version, &pages, false);
        if network.carries {
            network.pages.push(message);
        }
        None
    }

    /// Answers a fault request, first the page itself, then its neighbours.
    pub(super) fn answer(&mut self, wanted: Wanted, whole: bool, network: &mut Network) {
        let Some(Frozen { version, pusher, .. }) = &mut self.frozen else { return };
        let (version, page, mut window) = (*version, wanted.page, Vec::new());
        let due = if wanted.names_thread() || whole {
            let is_first = self.answered.insert(page);
            (is_first || whole) && pusher.request(wanted, BUNDLE_PAGES, &|_| 1, &mut window)
        } else {
            let is_due = wanted.thread != Wanted::OVERDUE || self.answered.insert(page);
            is_due && pusher.give(wanted)
        };
        if !due {
            return;
        }
        self.answered.insert(page);
        for (pages, whole) in [(vec![page], whole), (window, false)] {
            if !pages.is_empty() && network.carries {
                let message = self.encode(version, &pages, whole);
                network.pages.push(message);
            }
        }
    }

    /// Everything of the old link ends.
    pub(super) fn stop_sending(&mut self) {
        self.round = None;
        (self.pushing, self.answers) = (false, false);
        self.answered = PageSet::empty(self.pages());
    }

    /// The process is killed: what it was about to do is done or not.
    pub(super) fn crash(&mut self, rng: &mut fastrand::Rng) {
        self.machine = None;
        for step in std::mem::take(&mut self.steps) {
            if rng.bool() {
                continue;
            }
            match step {
                Step::Journal(record) => self.journal.lines.push(record),
                Step::Freeze(_) => self.runs = false,
                Step::Resume => self.run_again(),
                Step::Release => {}
            }
        }
        self.stop_sending();
    }
}
