//! Machines that take the place of others which were killed.

use std::time::Duration;

use super::destination::*;
use super::policy::SwitchoverPolicy;
use super::source::*;
use super::*;
use crate::page::PageSet;
use crate::wire::message::{
    DestinationStage, HandoverForm, Lacking, PackedSet, SourceStage, Strategy, ToDestination,
    ToSource,
};

fn source(running: bool) -> SourceMachine {
    let policy = SwitchoverPolicy { downtime_budget: Duration::ZERO, max_rounds: None };
    let (strategy, handover) = (Strategy::Hybrid, HandoverForm::OneFlight);
    let timeouts = SourceTimeouts::default();
    let config = SourceConfig { strategy, handover, policy, timeouts };
    let mut source = SourceMachine::resumed(config, running);
    source.handle(Duration::ZERO, SourceEvent::LinkUp);
    let asks = ToDestination::Resync { at: SourceStage::Decided };
    assert_eq!(source.poll(), Some(SourceAction::Send(asks)));
    source
}

fn hear(source: &mut SourceMachine, at: DestinationStage) -> Vec<SourceAction> {
    let message = ToSource::Resync { at, running_us: None };
    source.handle(Duration::ZERO, SourceEvent::Message(message));
    std::iter::from_fn(|| source.poll()).collect()
}

fn lacking() -> Lacking {
    let set = PackedSet::pack(&PageSet::full(3));
    Lacking { missing: set.clone(), without_base: set }
}

#[test]
fn a_source_that_lost_the_device_state_takes_the_guest_back_when_the_destination_lacks_it() {
    let mut source = source(false);
    let actions = hear(&mut source, DestinationStage::Receiving { held: None });
    assert!(matches!(actions[0], SourceAction::Send(ToDestination::Abort { .. })), "{actions:?}");
    assert_eq!(actions[1..], [SourceAction::Journal(SourceRecord::Void)]);
    source.handle(Duration::ZERO, SourceEvent::Journaled(SourceRecord::Void));
    assert_eq!(source.poll(), Some(SourceAction::ResumeGuest), "on disk first");
    source.handle(Duration::ZERO, SourceEvent::Resumed);
    let end = source.poll();
    assert!(matches!(end, Some(SourceAction::End(SourceOutcome::Stayed(_)))), "{end:?}");
}

#[test]
fn a_source_sends_what_the_running_guest_lacks() {
    for running in [false, true] {
        let mut source = source(running);
        let actions = hear(&mut source, DestinationStage::Running { lacking: lacking() });
        assert!(actions.contains(&SourceAction::SendLacking(lacking())), "{actions:?}");
        let resumes = |action: &SourceAction| matches!(action, SourceAction::ResumeGuest);
        assert!(source.decided() && !actions.iter().any(resumes));
    }
}

#[test]
fn a_source_that_knew_that_the_guest_runs_there_never_runs_it_again() {
    for at in [
        DestinationStage::Receiving { held: None },
        DestinationStage::Refused { reason: "no".to_owned(), hint: None },
    ] {
        let actions = hear(&mut source(true), at);
        let end = actions.last();
        assert!(matches!(end, Some(SourceAction::End(SourceOutcome::LostPages(_)))), "{end:?}");
    }
}

fn ask(destination: &mut DestinationMachine) -> Option<DestinationAction> {
    destination.handle(DestinationEvent::LinkUp);
    let asks = ToDestination::Resync { at: SourceStage::Decided };
    destination.handle(DestinationEvent::Message(asks));
    destination.poll()
}

#[test]
fn a_destination_says_what_its_running_guest_lacks() {
    let mut destination = DestinationMachine::resumed();
    let Some(DestinationAction::CollectPages { outage, of }) = ask(&mut destination) else {
        panic!("it looks its pages up");
    };
    assert_eq!(of, PagesOf::Remainder);
    let pages = PagesHere::Lacking(lacking());
    destination.handle(DestinationEvent::PagesCollected { outage, pages });
    let at = DestinationStage::Running { lacking: lacking() };
    let told = DestinationAction::Send(ToSource::Resync { at, running_us: None });
    assert_eq!(destination.poll(), Some(told));
    destination.handle(DestinationEvent::PagesComplete);
    assert_eq!(destination.poll(), None, "its guest has yet to be seen to run");
    destination.handle(DestinationEvent::Running);
    let complete = DestinationAction::Journal(DestinationRecord::Complete);
    assert_eq!(destination.poll(), Some(complete));
}

#[test]
fn a_destination_that_was_killed_with_all_pages_only_says_so() {
    let done = ToSource::Resync { at: DestinationStage::Done, running_us: None };
    let migrated = DestinationAction::End(DestinationOutcome::Migrated);
    let bye = DestinationEvent::Message(ToDestination::Bye { downtime_us: None });
    let lost = DestinationEvent::LinkLost(Failure::plain("late"));
    for last in [bye, lost] {
        let mut destination = DestinationMachine::resumed_complete();
        assert!(destination.is_committed() && destination.only_tells());
        for _ in 0..2 {
            assert_eq!(ask(&mut destination), Some(DestinationAction::Send(done.clone())));
            destination.handle(DestinationEvent::Cancelled);
            assert_eq!(destination.poll(), None, "the guest is let go of already");
            destination.handle(DestinationEvent::LinkDown);
            assert_eq!(destination.poll(), None, "the source has not said that it heard");
        }
        ask(&mut destination);
        destination.handle(last);
        assert_eq!(destination.poll(), Some(migrated.clone()));
    }
    let mut destination = DestinationMachine::resumed_complete();
    destination.handle(DestinationEvent::LinkLost(Failure::plain("it never came")));
    assert_eq!(destination.poll(), Some(migrated));
}

#[test]
fn only_a_destination_that_needs_nothing_of_its_source_may_leave_it_untold() {
    let mut destination = DestinationMachine::resumed();
    assert!(!destination.only_tells() && !DestinationMachine::new().only_tells());
    destination.handle(DestinationEvent::PagesComplete);
    assert!(!destination.only_tells(), "its guest has yet to be seen to run");
    destination.handle(DestinationEvent::Running);
    assert!(destination.only_tells());
    assert!(DestinationMachine::resumed_to_refuse(Failure::plain("killed")).only_tells());
}

#[test]
fn a_destination_that_was_killed_before_the_decision_only_refuses() {
    let failure = Failure::plain("killed");
    let mut destination = DestinationMachine::resumed_to_refuse(failure.clone());
    let told = ask(&mut destination);
    let Some(DestinationAction::Send(ToSource::Resync { at, .. })) = told else {
        panic!("{told:?}");
    };
    assert!(matches!(at, DestinationStage::Refused { .. }), "{at:?}");
    let end = DestinationAction::End(DestinationOutcome::Refused(failure));
    assert_eq!(destination.poll(), Some(end));
}
