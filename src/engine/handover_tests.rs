//! Both machines against each other, with failures at random moments.
//!
//! The world here carries out actions in any order that real threads, disks and links could: each
//! side's pending answers and the messages on the way are drawn at random, a step may fail instead of
//! succeeding, and the link may break, for a while or for good, with all that is on its way. After every
//! step: the guest runs at most at one place, and no delta meets another base than its own. At the end of a
//! migration: every page is as the guest left it.

use proptest::prelude::*;
use proptest::strategy::Strategy as Draw;

use super::destination::*;
use super::policy::RoundSummary;
use super::source::*;
use crate::page::{PageIndex, Version};
use crate::wire::message::{HandoverForm, MAX_REJECTED_PAGES, Strategy, ToDestination, ToSource};

mod pages;
mod world;

use world::{World, shape};

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
        choices in prop::collection::vec(any::<u8>(), 400),
    ) {
        let mut world = World::new(strategy, form, rounds);
        for choice in choices {
            if !world.step(choice, false) {
                break;
            }
        }
        settle(&mut world);
        prop_assert_eq!(&world.source_end, &Some(SourceOutcome::Migrated));
        prop_assert_eq!(&world.destination_end, &Some(DestinationOutcome::Migrated));
        world.check_end();
    }

    #[test]
    fn a_failed_step_never_makes_the_guest_run_twice_or_nowhere_undoubted(
        strategy in strategies(),
        form in forms(),
        choices in prop::collection::vec(any::<u8>(), 400),
        fail_at in 0usize..120,
        cut_at in prop::option::of(0usize..120),
    ) {
        let mut world = World::new(strategy, form, 1);
        for (i, choice) in choices.into_iter().enumerate() {
            if cut_at == Some(i) {
                world.cut();
            }
            if !world.step(choice, i == fail_at) {
                break;
            }
        }
        settle(&mut world);
        // What a process that has ended leaves to the other side is a lost link.
        world.cut_for_good();
        settle(&mut world);
        world.check_end();
    }

    #[test]
    fn a_link_that_is_lost_for_good_never_makes_the_guest_run_twice(
        strategy in strategies(),
        form in forms(),
        choices in prop::collection::vec(any::<u8>(), 400),
        cut_at in prop::option::of(0usize..120),
        lost_at in 0usize..120,
    ) {
        let mut world = World::new(strategy, form, 1);
        for (i, choice) in choices.into_iter().enumerate() {
            if cut_at == Some(i) {
                world.cut();
            }
            if i == lost_at {
                world.cut_for_good();
            }
            if !world.step(choice, false) {
                break;
            }
        }
        settle(&mut world);
        world.cut_for_good();
        settle(&mut world);
        world.check_end();
        let decided = world.source_journal.contains(&SourceRecord::Decided);
        if !decided {
            prop_assert!(world.runs_at_source, "before the decision the guest stays");
        }
    }

    /// Whatever is cut and whenever, only a cut between freeze and decision keeps the guest from moving,
    /// and then it runs on at the source.
    #[test]
    fn any_number_of_outages_loses_nothing(
        strategy in strategies(),
        form in forms(),
        rounds in 0u16..3,
        choices in prop::collection::vec(any::<u8>(), 700),
        mut cuts in prop::collection::vec(0usize..300, 1..6),
    ) {
        cuts.sort_unstable();
        let mut world = World::new(strategy, form, rounds);
        for (i, choice) in choices.into_iter().enumerate() {
            if cuts.first() == Some(&i) {
                cuts.remove(0);
                world.cut();
            }
            if !world.step(choice, false) {
                break;
            }
        }
        settle(&mut world);
        if matches!(world.source_end, Some(SourceOutcome::Stayed(_))) {
            let frozen = world.source_journal.last() == Some(&SourceRecord::Void)
                || !world.source_journal.contains(&SourceRecord::Decided);
            prop_assert!(frozen && world.runs_at_source, "{:?}", world);
        } else {
            prop_assert_eq!(&world.source_end, &Some(SourceOutcome::Migrated), "{:?}", world);
        }
        // Of a Bye or an Abort that was lost the destination learns in this way only.
        world.cut_for_good();
        settle(&mut world);
        world.check_end();
        if world.source_end == Some(SourceOutcome::Migrated) {
            prop_assert_eq!(&world.destination_end, &Some(DestinationOutcome::Migrated));
        }
    }
}

/// Goes on until nothing moves any more.
fn settle(world: &mut World) {
    for choice in 0..100_000u32 {
        // Not always the first way, nor the same order.
        if !world.step((choice.wrapping_mul(2_654_435_761) >> 24) as u8, false) {
            return;
        }
    }
    panic!("no end: {world:?}");
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
    world.tell_source(SourceEvent::RoundSent(RoundSummary::default()));
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
