//! Both machines against each other, with failures at random moments.
//!
//! The world here carries out actions in any order that real threads, disks and links could: each
//! side's pending answers and the messages on the way are drawn at random, a step may fail instead of
//! succeeding, and the link may break for good. After every step: the guest runs at most at one place.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::Strategy as Draw;

use super::destination::*;
use super::policy::{RoundSummary, SwitchoverPolicy};
use super::source::*;
use super::*;
use crate::guest::Shape;
use crate::memory::MemoryLayout;
use crate::page::{PageIndex, Version};
use crate::wire::message::{
    HandoverForm, MAX_REJECTED_PAGES, PROTOCOL, Strategy, ToDestination, ToSource,
};

fn shape() -> Box<Shape> {
    Box::new(Shape {
        monitor: "test".to_owned(),
        memory: MemoryLayout::new(Vec::new()),
        properties: Default::default(),
    })
}

struct World {
    source: SourceMachine,
    destination: DestinationMachine,
    runs_at_source: bool,
    runs_at_destination: bool,
    ran_at_destination: bool,
    discarded: bool,
    source_journal: Vec<SourceRecord>,
    destination_journal: Vec<DestinationRecord>,
    to_destination: VecDeque<ToDestination>,
    to_source: VecDeque<ToSource>,
    source_answers: VecDeque<SourceEvent>,
    destination_answers: VecDeque<DestinationEvent>,
    flight_on_its_way: bool,
    pages_on_their_way: bool,
    flight_awaited: bool,
    flight_here: bool,
    pages_here: bool,
    link_up: bool,
    rounds_before_fit: u16,
    source_end: Option<SourceOutcome>,
    destination_end: Option<DestinationOutcome>,
}

impl World {
    fn new(strategy: Strategy, handover: HandoverForm, rounds_before_fit: u16) -> Self {
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
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            source_answers: VecDeque::new(),
            destination_answers: VecDeque::new(),
            flight_on_its_way: false,
            pages_on_their_way: false,
            flight_awaited: false,
            flight_here: false,
            pages_here: false,
            link_up: true,
            rounds_before_fit,
            source_end: None,
            destination_end: None,
        };
        let hello =
            ToDestination::Hello { protocol: PROTOCOL, shape: shape(), strategy, runs: true };
        world.tell_source(SourceEvent::Connected(Box::new(hello)));
        world
    }

    fn tell_source(&mut self, event: SourceEvent) {
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
                self.to_destination.push_back(message);
            }
            SourceAction::SendRound(round) => {
                let dirty_pages = if round.0 > self.rounds_before_fit { 0 } else { 1 << 20 };
                let summary = RoundSummary {
                    messages: 3,
                    sent_pages: 1,
                    sent_bytes: 4096,
                    duration: Duration::from_secs(100_000),
                    dirty_pages,
                    link_bytes_per_s: 1 << 20,
                    ..Default::default()
                };
                self.source_answers.push_back(SourceEvent::RoundSent(summary));
            }
            SourceAction::ForgetPages(_) => {}
            SourceAction::Freeze(_) => {
                self.runs_at_source = false;
                self.source_answers.push_back(SourceEvent::Frozen);
            }
            SourceAction::SendFlight => self.flight_on_its_way = true,
            SourceAction::SendRemainder => {
                self.pages_on_their_way = true;
                self.source_answers.push_back(SourceEvent::RemainderSent);
            }
            SourceAction::Journal(record) => {
                self.source_answers.push_back(SourceEvent::Journaled(record));
            }
            SourceAction::ResumeGuest => {
                self.runs_at_source = true;
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
            DestinationAction::Send(message) => self.to_source.push_back(message),
            DestinationAction::Prepare { .. } => {
                self.destination_answers.push_back(DestinationEvent::Prepared);
            }
            DestinationAction::AwaitRound { round, .. } => {
                let event = DestinationEvent::RoundApplied { round, rejected: Vec::new() };
                self.destination_answers.push_back(event);
            }
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
    fn step(&mut self, choice: u8, fails: bool) -> bool {
        let failure = || Failure::plain("injected");
        let ended = (self.source_end.is_some(), self.destination_end.is_some());
        let mut ways: Vec<u8> = Vec::new();
        ways.extend((!self.source_answers.is_empty() && !ended.0).then_some(0));
        ways.extend((!self.destination_answers.is_empty() && !ended.1).then_some(1));
        ways.extend((self.link_up && !self.to_destination.is_empty() && !ended.1).then_some(2));
        ways.extend((self.link_up && !self.to_source.is_empty() && !ended.0).then_some(3));
        ways.extend((self.link_up && self.flight_on_its_way && self.flight_awaited).then_some(4));
        ways.extend(
            (self.link_up && self.pages_on_their_way && self.flight_here && !self.pages_here)
                .then_some(5),
        );
        let Some(way) = ways.get(choice as usize % ways.len().max(1)) else { return false };
        match way {
            0 => {
                let mut event = self.source_answers.pop_front().unwrap();
                if let SourceEvent::Journaled(record) = &event {
                    // A write that fails may all the same be on disk.
                    self.source_journal.push(*record);
                }
                if fails && !matches!(event, SourceEvent::Resumed) {
                    event = SourceEvent::Failed(failure());
                }
                self.tell_source(event);
            }
            1 => {
                let mut event = self.destination_answers.pop_front().unwrap();
                if let DestinationEvent::Journaled(record) = &event {
                    self.destination_journal.push(*record);
                }
                if fails {
                    event = DestinationEvent::Failed(failure());
                }
                self.tell_destination(event);
            }
            2 => {
                let message = self.to_destination.pop_front().unwrap();
                self.tell_destination(DestinationEvent::Message(message));
            }
            3 => {
                let message = self.to_source.pop_front().unwrap();
                self.tell_source(SourceEvent::Message(message));
            }
            4 => {
                self.flight_on_its_way = false;
                self.flight_here = true;
                self.tell_destination(DestinationEvent::FlightArrived);
            }
            _ => {
                self.pages_here = true;
                self.tell_destination(DestinationEvent::PagesComplete);
            }
        }
        true
    }

    fn break_link(&mut self) {
        if self.link_up {
            self.link_up = false;
            let failure = || Failure::plain("link lost");
            self.tell_source(SourceEvent::LinkLost(failure()));
            self.tell_destination(DestinationEvent::LinkLost(failure()));
        }
    }

    /// What must hold when nothing moves any more.
    fn check_end(&self) {
        let source = self.source_end.as_ref().expect("the source has ended");
        match source {
            SourceOutcome::Migrated => assert!(self.ran_at_destination && !self.runs_at_source),
            SourceOutcome::Stayed(_) => {
                assert!(self.runs_at_source && !self.ran_at_destination, "{self:?}");
            }
            SourceOutcome::LostPages(_) => assert!(self.ran_at_destination),
            SourceOutcome::InDoubt(_) => assert!(!self.runs_at_source),
        }
        if matches!(self.destination_end, Some(DestinationOutcome::Refused(_))) {
            assert!(!self.ran_at_destination);
        }
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} {:?} journals {:?} {:?}",
            self.source, self.destination, self.source_journal, self.destination_journal
        )
    }
}

fn strategies() -> impl Draw<Value = Strategy> {
    prop_oneof![Just(Strategy::Hybrid), Just(Strategy::Precopy), Just(Strategy::Postcopy)]
}

fn forms() -> impl Draw<Value = HandoverForm> {
    prop_oneof![Just(HandoverForm::OneFlight), Just(HandoverForm::Strict)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn without_failures_every_order_ends_with_the_guest_at_the_destination(
        strategy in strategies(),
        form in forms(),
        rounds in 0u16..4,
        choices in prop::collection::vec(any::<u8>(), 200),
    ) {
        let mut world = World::new(strategy, form, rounds);
        for choice in choices {
            if !world.step(choice, false) {
                break;
            }
        }
        prop_assert_eq!(&world.source_end, &Some(SourceOutcome::Migrated));
        prop_assert_eq!(&world.destination_end, &Some(DestinationOutcome::Migrated));
        world.check_end();
    }

    #[test]
    fn a_failed_step_never_makes_the_guest_run_twice_or_nowhere_undoubted(
        strategy in strategies(),
        form in forms(),
        choices in prop::collection::vec(any::<u8>(), 200),
        fail_at in 0usize..60,
    ) {
        let mut world = World::new(strategy, form, 1);
        for (i, choice) in choices.into_iter().enumerate() {
            if !world.step(choice, i == fail_at) {
                break;
            }
        }
        // What a process that has ended leaves to the other side is a lost link.
        world.break_link();
        while world.step(0, false) {}
        world.check_end();
    }

    #[test]
    fn a_lost_link_never_makes_the_guest_run_twice(
        strategy in strategies(),
        form in forms(),
        choices in prop::collection::vec(any::<u8>(), 200),
        break_at in 0usize..60,
    ) {
        let mut world = World::new(strategy, form, 1);
        for (i, choice) in choices.into_iter().enumerate() {
            if i == break_at {
                world.break_link();
            }
            if !world.step(choice, false) {
                break;
            }
        }
        world.break_link();
        while world.step(0, false) {}
        world.check_end();
        let decided = world.source_journal.contains(&SourceRecord::Decided);
        if !decided {
            prop_assert!(world.runs_at_source, "before the decision the guest stays");
        }
    }
}

#[test]
fn a_destination_that_falls_silent_is_given_up_at_the_deadline() {
    let mut world = World::new(Strategy::Postcopy, HandoverForm::Strict, 0);
    world.tell_source(SourceEvent::Message(ToSource::Prepared));
    let frozen = world.source_answers.pop_back().unwrap();
    world.tell_source(frozen);
    let deadline = world.source.deadline().expect("waiting for Ready is bounded");
    world.source.handle(deadline, SourceEvent::Tick);
    assert!(matches!(world.source.poll(), Some(SourceAction::Send(ToDestination::Abort { .. }))));
    assert_eq!(world.source.poll(), Some(SourceAction::ResumeGuest));
}

#[test]
fn a_destination_that_rejects_more_than_damage_explains_does_not_get_the_guest() {
    let mut world = World::new(Strategy::Hybrid, HandoverForm::OneFlight, 0);
    world.tell_source(SourceEvent::Message(ToSource::Prepared));
    let sent = world.source_answers.pop_back().unwrap();
    world.tell_source(sent);
    let rejected = (0..=MAX_REJECTED_PAGES as u64).map(PageIndex).collect();
    let ack = ToSource::RoundAck { round: Version(1), rejected };
    world.tell_source(SourceEvent::Message(ack));
    assert!(matches!(world.source_end, Some(SourceOutcome::Stayed(_))));
    assert!(world.runs_at_source);
}

#[test]
fn a_version_that_is_not_ours_is_refused() {
    let mut destination = DestinationMachine::new();
    let hello = ToDestination::Hello {
        protocol: 99,
        shape: shape(),
        strategy: Strategy::Hybrid,
        runs: true,
    };
    destination.handle(DestinationEvent::Message(hello));
    let refused = DestinationAction::Journal(DestinationRecord::Refused);
    assert_eq!(destination.poll(), Some(refused));
}

#[test]
fn versions_end_before_the_page_table_cannot_hold_them() {
    assert_eq!(Version::MAX.next(), None);
}
