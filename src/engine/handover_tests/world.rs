//! Two machines, and what they act on: a guest, its pages, two journals and a link.

use std::collections::VecDeque;
use std::time::Duration;

use super::pages::{DestinationPages, PageMessage, SourcePages};
use crate::engine::destination::*;
use crate::engine::policy::{RoundSummary, SwitchoverPolicy};
use crate::engine::source::*;
use crate::engine::{Failure, MigrationPhase};
use crate::guest::Shape;
use crate::memory::MemoryLayout;
use crate::page::{PageSet, Version};
use crate::wire::message::{HandoverForm, PROTOCOL, RunWhen, Strategy, ToDestination, ToSource};

pub(super) fn shape() -> Box<Shape> {
    Box::new(Shape {
        monitor: "test".to_owned(),
        memory: MemoryLayout::new(Vec::new()),
        properties: Default::default(),
    })
}

/// Writes of the guest, so that it does not go on for ever.
const WRITES: u32 = 40;

pub(super) struct World {
    pub(super) source: SourceMachine,
    pub(super) destination: DestinationMachine,
    pub(super) runs_at_source: bool,
    pub(super) runs_at_destination: bool,
    pub(super) ran_at_destination: bool,
    discarded: bool,
    pub(super) source_journal: Vec<SourceRecord>,
    pub(super) destination_journal: Vec<DestinationRecord>,
    pub(super) source_answers: VecDeque<SourceEvent>,
    destination_answers: VecDeque<DestinationEvent>,
    source_pages: SourcePages,
    destination_pages: DestinationPages,
    complete_told: bool,
    writes_left: u32,
    /// The source's pusher works, and has yet to say that it is through.
    pushing: bool,
    remainder_told: bool,
    // The link, and what is on it.
    link_up: bool,
    source_noticed: bool,
    destination_noticed: bool,
    /// No other link comes.
    pub(super) cut_for_good: bool,
    to_destination: VecDeque<ToDestination>,
    to_source: VecDeque<ToSource>,
    messages: Vec<PageMessage>,
    flight: Option<(Version, PageSet)>,
    flight_awaited: bool,
    run_when: RunWhen,
    rounds_before_fit: u16,
    pub(super) source_end: Option<SourceOutcome>,
    pub(super) destination_end: Option<DestinationOutcome>,
}

impl World {
    pub(super) fn new(strategy: Strategy, handover: HandoverForm, rounds_before_fit: u16) -> Self {
        let policy =
            SwitchoverPolicy { downtime_budget: Duration::from_millis(300), max_rounds: Some(6) };
        let timeouts = SourceTimeouts::default();
        let source = SourceMachine::new(SourceConfig { strategy, handover, policy, timeouts });
        let mut world = World {
            source,
            destination: DestinationMachine::new(),
            runs_at_source: true,
            runs_at_destination: false,
            ran_at_destination: false,
            discarded: false,
            source_journal: Vec::new(),
            destination_journal: Vec::new(),
            source_answers: VecDeque::new(),
            destination_answers: VecDeque::new(),
            source_pages: SourcePages::new(),
            destination_pages: DestinationPages::new(),
            complete_told: false,
            writes_left: WRITES,
            pushing: false,
            remainder_told: false,
            link_up: true,
            source_noticed: false,
            destination_noticed: false,
            cut_for_good: false,
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            messages: Vec::new(),
            flight: None,
            flight_awaited: false,
            run_when: RunWhen::Loaded,
            rounds_before_fit,
            source_end: None,
            destination_end: None,
        };
        let hello =
            ToDestination::Hello { protocol: PROTOCOL, shape: shape(), strategy, runs: true };
        world.tell_source(SourceEvent::Connected(Box::new(hello)));
        world
    }

    pub(super) fn tell_source(&mut self, event: SourceEvent) {
        self.source.handle(Duration::ZERO, event);
        while let Some(action) = self.source.poll() {
            self.act_for_source(action);
        }
        self.check();
    }

    fn tell_destination(&mut self, event: DestinationEvent) {
        self.destination.handle(event);
        while let Some(action) = self.destination.poll() {
            self.act_for_destination(action);
        }
        self.check();
    }

    fn act_for_source(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(message) => {
                if matches!(message, ToDestination::Commit) {
                    assert!(self.source_journal.contains(&SourceRecord::Decided));
                }
                assert!(!self.source_noticed, "the source speaks on a link that it knows is lost");
                if self.link_up {
                    self.to_destination.push_back(message);
                }
            }
            SourceAction::SendRound(round) => self.source_pages.begin_round(round),
            SourceAction::ForgetPages(pages) => self.source_pages.forget(&pages),
            SourceAction::EndRound { held } => self.source_pages.end_round(&held),
            SourceAction::Freeze(version) => {
                self.runs_at_source = false;
                self.source_pages.freeze(version);
                self.source_answers.push_back(SourceEvent::Frozen { flight: Duration::ZERO });
            }
            SourceAction::SendFlight => {
                self.flight = self.link_up.then(|| self.source_pages.flight());
            }
            SourceAction::SendRemainder => {
                self.source_pages.send_all();
                self.pushing = true;
            }
            SourceAction::SendLacking(lacking) => {
                self.source_pages.send_lacking(&lacking);
                self.pushing = true;
            }
            SourceAction::Journal(record) => {
                self.source_answers.push_back(SourceEvent::Journaled(record));
            }
            SourceAction::ResumeGuest => {
                assert!(
                    !self.source_answers.iter().any(|e| matches!(e, SourceEvent::Frozen { .. })),
                    "resumed before it was stopped"
                );
                self.runs_at_source = true;
                self.source_pages.thaw();
                self.source_answers.push_back(SourceEvent::Resumed);
            }
            SourceAction::ReleaseGuest => self.source_answers.push_back(SourceEvent::Released),
            SourceAction::End(outcome) => {
                assert!(self.source_end.replace(outcome).is_none(), "ended twice");
            }
        }
    }

    fn act_for_destination(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(message) => {
                assert!(!self.destination_noticed, "says {message:?} on a link known to be lost");
                if self.link_up {
                    self.to_source.push_back(message);
                }
            }
            DestinationAction::Prepare { .. } => {
                self.destination_answers.push_back(DestinationEvent::Prepared);
            }
            DestinationAction::AwaitRound { round, messages } => {
                self.destination_pages.expect(round, messages);
                self.tell_round();
            }
            DestinationAction::CollectPages { outage, of } => {
                let pages = match of {
                    PagesOf::Round(round) => PagesHere::Held(self.destination_pages.held_of(round)),
                    PagesOf::Remainder => PagesHere::Lacking(self.destination_pages.lacking()),
                };
                let event = DestinationEvent::PagesCollected { outage, pages };
                self.destination_answers.push_back(event);
            }
            DestinationAction::KeepRehearsal(_) => unreachable!("the source here has none"),
            DestinationAction::AwaitFlight(_) => self.flight_awaited = true,
            DestinationAction::LoadDeviceState => {
                self.destination_answers.push_back(DestinationEvent::Loaded);
            }
            DestinationAction::Journal(record) => {
                self.destination_answers.push_back(DestinationEvent::Journaled(record));
            }
            DestinationAction::RunGuest => {
                assert!(self.destination_journal.contains(&DestinationRecord::Committed));
                assert!(!self.destination_journal.contains(&DestinationRecord::Refused));
                if self.run_when == RunWhen::Complete {
                    assert!(self.destination_pages.is_complete(), "runs before it is complete");
                }
                self.runs_at_destination = true;
                self.ran_at_destination = true;
                self.destination_answers.push_back(DestinationEvent::Running);
            }
            DestinationAction::ReleaseGuest | DestinationAction::DiscardGuest => {
                if action == DestinationAction::DiscardGuest {
                    assert!(!self.ran_at_destination, "a guest that has run was discarded");
                    self.discarded = true;
                }
                self.destination_answers.push_back(DestinationEvent::Released);
            }
            DestinationAction::End(outcome) => {
                assert!(self.destination_end.replace(outcome).is_none(), "ended twice");
            }
        }
    }

    fn check(&self) {
        assert!(!(self.runs_at_source && self.runs_at_destination), "the guest runs twice");
        if self.discarded {
            assert!(!self.runs_at_destination, "a discarded guest runs");
        }
    }

    /// One step, drawn by `choice`; false when nothing is left to do.
    pub(super) fn step(&mut self, choice: u8, fails: bool) -> bool {
        let ended = (self.source_end.is_some(), self.destination_end.is_some());
        let carries = self.link_up;
        let reconnects = !self.link_up
            && !self.cut_for_good
            && self.source_noticed
            && self.destination_noticed
            && self.source.wants_link()
            && self.destination.wants_link()
            // What a broken round has left comes before the next link.
            && !self.source_answers.iter().any(|e| matches!(e, SourceEvent::RoundSent(_)));
        let ways: Vec<Way> = [
            (Way::AnswerSource, !self.source_answers.is_empty() && !ended.0),
            (Way::AnswerDestination, !self.destination_answers.is_empty() && !ended.1),
            (Way::ToDestination, carries && !self.to_destination.is_empty() && !ended.1),
            (Way::ToSource, carries && !self.to_source.is_empty() && !ended.0),
            (Way::Flight, carries && self.flight.is_some() && self.flight_awaited && !ended.1),
            (Way::Pages, carries && !self.messages.is_empty() && !ended.1),
            (Way::SendOfRound, self.source_pages.is_sending_round() && !ended.0),
            (Way::Push, self.pushing && !ended.0),
            (Way::Write, self.runs_at_source && self.writes_left > 0 && !ended.0),
            (Way::SourceNotices, !self.link_up && !self.source_noticed && !ended.0),
            (Way::DestinationNotices, !self.link_up && !self.destination_noticed && !ended.1),
            (Way::Reconnect, reconnects),
        ]
        .into_iter()
        .filter_map(|(way, can)| can.then_some(way))
        .collect();
        let Some(way) = ways.get(choice as usize % ways.len().max(1)) else { return false };
        self.go(*way, choice, fails);
        true
    }

    fn go(&mut self, way: Way, choice: u8, fails: bool) {
        let failure = || Failure::plain("injected");
        match way {
            Way::AnswerSource => {
                let mut event = self.source_answers.pop_front().unwrap();
                if let SourceEvent::Journaled(record) = &event {
                    // A write that fails may all the same be on disk.
                    self.source_journal.push(*record);
                }
                if fails && !matches!(event, SourceEvent::Resumed) {
                    event = match event {
                        SourceEvent::Frozen { .. } => SourceEvent::FreezeFailed(failure()),
                        SourceEvent::Journaled(record) => {
                            SourceEvent::JournalFailed(record, failure())
                        }
                        _ => SourceEvent::Failed(failure()),
                    };
                }
                self.tell_source(event);
            }
            Way::AnswerDestination => {
                let mut event = self.destination_answers.pop_front().unwrap();
                if let DestinationEvent::Journaled(record) = &event {
                    self.destination_journal.push(*record);
                }
                if fails {
                    event = match event {
                        DestinationEvent::Journaled(record) => {
                            DestinationEvent::JournalUnknown(record, failure())
                        }
                        DestinationEvent::Released => DestinationEvent::LetGoFailed,
                        DestinationEvent::Running if choice & 1 == 0 => {
                            self.runs_at_destination = false;
                            self.ran_at_destination = false;
                            DestinationEvent::NotStarted(failure())
                        }
                        _ => DestinationEvent::Failed(failure()),
                    };
                }
                self.tell_destination(event);
            }
            Way::ToDestination => {
                let message = self.to_destination.pop_front().unwrap();
                if let ToDestination::Offer { run_when, .. } = message {
                    self.run_when = run_when;
                }
                self.tell_destination(DestinationEvent::Message(message));
            }
            Way::ToSource => {
                let message = self.to_source.pop_front().unwrap();
                self.tell_source(SourceEvent::Message(message));
            }
            Way::Flight => {
                let (version, need) = self.flight.take().unwrap();
                self.flight_awaited = false;
                self.destination_pages.switch_over(version, need);
                self.tell_complete();
                self.tell_destination(DestinationEvent::FlightArrived);
            }
            Way::Pages => {
                let at = choice as usize * 7 % self.messages.len();
                let message = self.messages.swap_remove(at);
                let in_rounds = self.source.phase() == MigrationPhase::Precopy;
                self.destination_pages.apply(&message, in_rounds && choice % 11 == 3);
                self.tell_round();
                self.tell_complete();
            }
            Way::SendOfRound => match self.source_pages.next_of_round() {
                Ok(message) => self.carry(message),
                Err(messages) => self.source_answers.push_back(self.summary(messages)),
            },
            Way::Push => match self.source_pages.next_push() {
                Some(message) => self.carry(message),
                None => {
                    self.pushing = false;
                    if !std::mem::replace(&mut self.remainder_told, true) {
                        self.source_answers.push_back(SourceEvent::RemainderSent);
                    }
                }
            },
            Way::Write => {
                self.writes_left -= 1;
                self.source_pages.write(u64::from(choice) * 5 / 3);
            }
            Way::SourceNotices => {
                self.source_noticed = true;
                // Whatever was being sent ends.
                self.source_pages.break_round();
                self.pushing = false;
                self.tell_source(SourceEvent::LinkDown(Failure::plain("cut")));
            }
            Way::DestinationNotices => {
                self.destination_noticed = true;
                self.flight_awaited = false;
                self.tell_destination(DestinationEvent::LinkDown);
            }
            Way::Reconnect => {
                self.link_up = true;
                (self.source_noticed, self.destination_noticed) = (false, false);
                self.tell_destination(DestinationEvent::LinkUp);
                self.tell_source(SourceEvent::LinkUp);
            }
        }
    }

    fn summary(&self, messages: u64) -> SourceEvent {
        let fits = self.source.rounds() > self.rounds_before_fit;
        SourceEvent::RoundSent(RoundSummary {
            messages,
            sent_pages: 1,
            sent_bytes: 4096,
            duration: Duration::from_secs(100_000),
            dirty_pages: if fits { 0 } else { 1 << 20 },
            link_bytes_per_s: 1 << 20,
            ..Default::default()
        })
    }

    fn carry(&mut self, message: PageMessage) {
        if self.link_up {
            self.messages.push(message);
        }
    }

    fn tell_round(&mut self) {
        if let Some((round, rejected)) = self.destination_pages.round_done() {
            let event = DestinationEvent::RoundApplied { round, rejected };
            self.destination_answers.push_back(event);
        }
    }

    fn tell_complete(&mut self) {
        if self.destination_pages.is_complete() && !self.complete_told {
            self.complete_told = true;
            self.destination_answers.push_back(DestinationEvent::PagesComplete);
        }
    }

    /// Whatever is on its way is lost. The two sides notice in their own time.
    pub(super) fn cut(&mut self) {
        self.link_up = false;
        self.to_destination.clear();
        self.to_source.clear();
        self.messages.clear();
        self.flight = None;
    }

    /// There will be no other link, and both sides know.
    pub(super) fn cut_for_good(&mut self) {
        self.cut();
        self.cut_for_good = true;
        let failure = || Failure::plain("link lost");
        if self.source_end.is_none() {
            self.source_noticed = true;
            self.source_pages.break_round();
            self.pushing = false;
            self.tell_source(SourceEvent::LinkLost(failure()));
        }
        if self.destination_end.is_none() {
            self.destination_noticed = true;
            self.tell_destination(DestinationEvent::LinkLost(failure()));
        }
    }

    /// What must hold when nothing moves any more.
    pub(super) fn check_end(&self) {
        let source = self.source_end.as_ref().expect("the source has ended");
        match source {
            SourceOutcome::Migrated => assert!(self.ran_at_destination && !self.runs_at_source),
            SourceOutcome::Stayed(_) => {
                assert!(self.runs_at_source && !self.ran_at_destination, "{self:?}");
            }
            SourceOutcome::LostPages(_) => assert!(self.ran_at_destination),
            SourceOutcome::InDoubt(_) => assert!(!self.runs_at_source),
        }
        let destination = self.destination_end.as_ref().expect("the destination has ended");
        if matches!(destination, DestinationOutcome::Refused(_)) {
            assert!(!self.ran_at_destination);
        }
        let migrated =
            *source == SourceOutcome::Migrated || *destination == DestinationOutcome::Migrated;
        if migrated {
            let held: Vec<_> =
                self.destination_pages.held.iter().map(|held| held.map(|held| held.1)).collect();
            let now: Vec<_> = self.source_pages.now.iter().copied().map(Some).collect();
            assert_eq!(held, now, "a page is not as the guest left it");
        }
    }
}

/// What can happen next.
#[derive(Clone, Copy, Debug)]
enum Way {
    AnswerSource,
    AnswerDestination,
    ToDestination,
    ToSource,
    Flight,
    Pages,
    SendOfRound,
    Push,
    Write,
    SourceNotices,
    DestinationNotices,
    Reconnect,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} {:?} journals {:?} {:?} ends {:?} {:?}",
            self.source,
            self.destination,
            self.source_journal,
            self.destination_journal,
            self.source_end,
            self.destination_end
        )
    }
}
