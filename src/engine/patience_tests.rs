//! Nobody waits for ever for the other side, and nobody is kept from ending it in time.

use std::time::Duration;

use super::destination::*;
use super::policy::{RoundSummary, SwitchoverPolicy};
use super::source::*;
use crate::guest::Shape;
use crate::memory::MemoryLayout;
use crate::page::Version;
use crate::wire::message::{HandoverForm, PROTOCOL, RunWhen, Strategy, ToDestination, ToSource};

const BUDGET: Duration = Duration::from_secs(2);
/// For the flight on a slow link.
const FLIGHT: Duration = Duration::from_secs(100);

fn hello() -> ToDestination {
    let memory = MemoryLayout::new(Vec::new());
    let shape = Shape { monitor: "none".to_owned(), memory, properties: Default::default() };
    let (shape, strategy) = (Box::new(shape), Strategy::Precopy);
    ToDestination::Hello { protocol: PROTOCOL, shape, strategy, runs: true }
}

/// A source whose guest is stopped, and whose last pages are on their way.
fn frozen(handover: HandoverForm) -> SourceMachine {
    let policy = SwitchoverPolicy { downtime_budget: BUDGET, max_rounds: None };
    let (strategy, timeouts) = (Strategy::Precopy, SourceTimeouts::default());
    let mut source = SourceMachine::new(SourceConfig { strategy, handover, policy, timeouts });
    let round = Version(1);
    let little = RoundSummary { messages: 1, link_bytes_per_s: 1 << 20, ..Default::default() };
    for event in [
        SourceEvent::Connected(Box::new(hello())),
        SourceEvent::Message(ToSource::Prepared),
        SourceEvent::RoundSent(little),
        SourceEvent::Message(ToSource::RoundAck { round, rejected: Vec::new() }),
        SourceEvent::Frozen { flight: FLIGHT },
    ] {
        source.handle(Duration::ZERO, event);
    }
    let actions: Vec<_> = std::iter::from_fn(|| source.poll()).collect();
    assert!(actions.contains(&SourceAction::SendRemainder), "{actions:?}");
    source
}

#[test]
fn a_destination_that_takes_no_more_pages_does_not_keep_the_guest_stopped() {
    for handover in [HandoverForm::OneFlight, HandoverForm::Strict] {
        let mut source = frozen(handover);
        let deadline = source.deadline().expect("the guest stands still");
        assert_eq!(deadline, SourceTimeouts::default().load + FLIGHT + BUDGET);
        source.handle(deadline, SourceEvent::Tick);
        let Some(SourceAction::Send(ToDestination::Abort { reason })) = source.poll() else {
            panic!("the destination is told");
        };
        assert!(reason.contains("did not take the guest's last pages"), "{reason}");
        assert_eq!(source.poll(), Some(SourceAction::ResumeGuest));
    }
}

#[test]
fn a_disk_that_does_not_answer_is_named_and_the_guest_stands_until_the_decision_is_taken_back() {
    let mut source = frozen(HandoverForm::OneFlight);
    source.handle(BUDGET, SourceEvent::RemainderSent);
    let decides = SourceAction::Journal(SourceRecord::Decided);
    assert!(std::iter::from_fn(|| source.poll()).any(|action| action == decides));
    let deadline = source.deadline().expect("the guest stands still");
    source.handle(deadline, SourceEvent::Tick);
    let Some(SourceAction::Send(ToDestination::Abort { reason })) = source.poll() else {
        panic!("the destination is told");
    };
    assert!(reason.contains("the disk does not answer"), "{reason}");
    assert_eq!(source.poll(), Some(SourceAction::Journal(SourceRecord::Void)));
    source.handle(deadline, SourceEvent::Journaled(SourceRecord::Decided));
    assert_eq!((source.poll(), source.deadline()), (None, None));
    source.handle(deadline, SourceEvent::Journaled(SourceRecord::Void));
    assert_eq!(source.poll(), Some(SourceAction::ResumeGuest));
}

#[test]
fn a_destination_that_waits_for_a_long_flight_is_given_the_time_for_it() {
    let mut source = frozen(HandoverForm::Strict);
    source.handle(BUDGET, SourceEvent::RemainderSent);
    let deadline = source.deadline().expect("the guest stands still");
    assert_eq!(deadline, BUDGET + SourceTimeouts::default().load + FLIGHT);
}

#[test]
fn after_the_decision_a_destination_that_is_silent_is_given_up_at_last() {
    let mut source = frozen(HandoverForm::OneFlight);
    source.handle(BUDGET, SourceEvent::RemainderSent);
    source.handle(BUDGET, SourceEvent::Journaled(SourceRecord::Decided));
    let deadline = source.deadline().expect("the guest stands still");
    assert_eq!(deadline, BUDGET + SourceTimeouts::default().commit + FLIGHT);
    source.handle(deadline, SourceEvent::Tick);
    let ended = std::iter::from_fn(|| source.poll())
        .any(|action| matches!(action, SourceAction::End(SourceOutcome::InDoubt(_))));
    assert!(ended, "nobody waits for ever");
}

/// A destination that was told of the decision before it had what it needs for it.
fn decided_too_early() -> DestinationMachine {
    let mut destination = DestinationMachine::new();
    let (final_version, run_when) = (Version(1), RunWhen::Complete);
    for event in [
        DestinationEvent::Message(hello()),
        DestinationEvent::Prepared,
        DestinationEvent::Message(ToDestination::Offer { final_version, run_when }),
        DestinationEvent::Message(ToDestination::Commit),
    ] {
        destination.handle(event);
    }
    destination
}

#[test]
fn a_decision_can_be_refused_until_it_is_written_down_and_not_later() {
    let needed = [
        DestinationEvent::FlightArrived,
        DestinationEvent::Loaded,
        // From here on it is being written down.
        DestinationEvent::PagesComplete,
        DestinationEvent::Journaled(DestinationRecord::Committed),
        DestinationEvent::Running,
    ];
    for come in 0..=needed.len() {
        let mut destination = decided_too_early();
        needed[..come].iter().for_each(|event| destination.handle(event.clone()));
        while destination.poll().is_some() {}
        assert_eq!(destination.is_committed(), come >= 3, "{come}");
        destination.handle(DestinationEvent::Cancelled);
        let refusal = (come < 3).then_some(DestinationAction::Journal(DestinationRecord::Refused));
        assert_eq!(destination.poll(), refusal, "{come}");
    }
}
