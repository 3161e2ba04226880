//! Entry point for fuzzing: a peer that says anything in any order to either machine, while the steps of this
//! side answer in any order, or fail, and links come and go.

use std::time::Duration;

use super::Failure;
use super::destination::*;
use super::policy::{RoundSummary, SwitchoverPolicy};
use super::source::*;
use crate::guest::Shape;
use crate::memory::MemoryLayout;
use crate::page::{PageIndex, PageSet, Version};
use crate::wire::message::{
    DestinationStage, HandoverForm, Lacking, PROTOCOL, PackedSet, RunWhen, SourceStage, Strategy,
    ToDestination, ToSource,
};
use crate::wire::state::PackedState;

/// Steps of this side under way at once: more would be a loop.
const MAX_DUE: usize = 64;

/// Reads `data` as what a peer says and what happens meanwhile, and plays it to the machine that the first
/// byte names. True when that has come to its end. A machine may end its migration as it likes.
///
/// # Panics
/// When a machine does what no peer may bring it to: the source says Commit before its decision is on disk, or runs the
/// guest again after that without the peer's word that it does not run there; the destination runs the
/// guest without the source's word, or before that is on disk, or gives a guest up that runs.
pub fn fuzz_peer(data: &[u8]) -> bool {
    let Some((first, script)) = data.split_first() else { return false };
    let script = Script(script);
    if first & 1 == 0 { lie_to_source(first >> 1, script) } else { lie_to_destination(script) }
}

/// What happens, byte by byte; ends with the data.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn version(&mut self) -> Option<Version> {
        Some(match self.byte()? {
            255 => Version(u16::MAX),
            small => Version(u16::from(small)),
        })
    }
}

fn failure() -> Failure {
    Failure::plain("so it happened")
}

fn set() -> PackedSet {
    PackedSet::pack(&PageSet::full(1))
}

fn hello(protocol: u16) -> ToDestination {
    let memory = MemoryLayout::new(Vec::new());
    let shape = Shape { monitor: "none".to_owned(), memory, properties: Default::default() };
    let (shape, strategy) = (Box::new(shape), Strategy::Hybrid);
    ToDestination::Hello { protocol, shape, strategy, runs: true }
}

fn config(choice: u8) -> SourceConfig {
    let strategies = [Strategy::Hybrid, Strategy::Precopy, Strategy::Postcopy];
    let form = if choice & 1 == 0 { HandoverForm::OneFlight } else { HandoverForm::Strict };
    SourceConfig {
        strategy: strategies[usize::from(choice >> 1) % 3],
        handover: form,
        policy: SwitchoverPolicy { downtime_budget: Duration::from_secs(1), max_rounds: Some(2) },
        timeouts: SourceTimeouts::default(),
    }
}

fn stage(script: &mut Script<'_>) -> Option<DestinationStage> {
    use DestinationStage as At;
    let lacking = || Lacking { missing: set(), without_base: set() };
    Some(match script.byte()? % 8 {
        0 => At::Waiting,
        1 => At::Preparing,
        2 => At::Receiving { held: None },
        3 => At::Receiving { held: Some(set()) },
        4 => At::Loading { committed: script.byte()? & 1 == 1, lacking: lacking() },
        5 => At::Running { lacking: lacking() },
        6 => At::Done,
        _ => At::Refused { reason: String::new(), hint: None },
    })
}

fn to_source(script: &mut Script<'_>) -> Option<ToSource> {
    Some(match script.byte()? % 8 {
        0 => ToSource::Prepared,
        1 => {
            let (round, count) = (script.version()?, script.byte()?);
            ToSource::RoundAck { round, rejected: vec![PageIndex(u64::MAX); count.into()] }
        }
        2 => ToSource::Ready,
        3 => ToSource::Running,
        4 => ToSource::Refused { reason: String::new(), hint: None },
        5 => ToSource::Done,
        6 => ToSource::Resync { at: stage(script)?, running_us: Some(u64::MAX) },
        _ => ToSource::Rehearsed { check: 0 },
    })
}

/// A source, and what its answers are due to.
struct Lied {
    machine: SourceMachine,
    due: Vec<SourceEvent>,
    decided: bool,
    said_commit: bool,
    /// Since then: the peer's word that the guest does not run there.
    given_back: bool,
    ended: bool,
}

fn lie_to_source(choice: u8, mut script: Script<'_>) -> bool {
    let mut lied = Lied {
        machine: SourceMachine::new(config(choice)),
        due: Vec::new(),
        decided: false,
        said_commit: false,
        given_back: false,
        ended: false,
    };
    lied.tell(SourceEvent::Connected(Box::new(hello(PROTOCOL))));
    while let Some(what) = script.byte() {
        let event = match what % 8 {
            0..=2 => {
                let Some(message) = to_source(&mut script) else { break };
                lied.given_back |= matches!(
                    message,
                    ToSource::Refused { .. }
                        | ToSource::Resync {
                            at: DestinationStage::Refused { .. }
                                | DestinationStage::Receiving { .. },
                            ..
                        }
                );
                SourceEvent::Message(message)
            }
            3 | 4 if lied.due.is_empty() => continue,
            3 => lied.due.remove(usize::from(what >> 3) % lied.due.len()),
            4 => fails(lied.due.remove(usize::from(what >> 3) % lied.due.len())),
            5 => SourceEvent::LinkDown(failure()),
            6 => SourceEvent::LinkUp,
            _ => match what >> 3 & 3 {
                0 => SourceEvent::Cancelled,
                1 => SourceEvent::LinkLost(failure()),
                2 => SourceEvent::Failed(failure()),
                _ => SourceEvent::Tick,
            },
        };
        lied.tell(event);
    }
    lied.ended
}

fn fails(event: SourceEvent) -> SourceEvent {
    match event {
        SourceEvent::Journaled(record) => SourceEvent::JournalFailed(record, failure()),
        SourceEvent::Frozen { .. } => SourceEvent::FreezeFailed(failure()),
        SourceEvent::Resumed => SourceEvent::ResumeFailed(failure()),
        _ => SourceEvent::Failed(failure()),
    }
}

impl Lied {
    fn tell(&mut self, event: SourceEvent) {
        self.decided |= matches!(event, SourceEvent::Journaled(SourceRecord::Decided));
        let now = self.machine.deadline().filter(|_| matches!(event, SourceEvent::Tick));
        self.machine.handle(now.unwrap_or_default(), event);
        while let Some(action) = self.machine.poll() {
            assert!(!self.ended, "after its end: {action:?}");
            self.act(action);
        }
        assert!(self.due.len() < MAX_DUE, "without end: {:?}", self.due);
    }

    fn act(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(ToDestination::Commit) => {
                assert!(self.decided, "Commit before the decision is on disk");
                (self.said_commit, self.given_back) = (true, false);
            }
            SourceAction::ResumeGuest => {
                assert!(!self.said_commit || self.given_back, "run again after Commit");
                self.due.push(SourceEvent::Resumed);
            }
            SourceAction::SendRound(_) => {
                let link_bytes_per_s = 1 << 20;
                let sent = RoundSummary { messages: 1, link_bytes_per_s, ..Default::default() };
                // A round that broke with its link is over before there is another.
                self.due.retain(|due| !matches!(due, SourceEvent::RoundSent(_)));
                self.due.push(SourceEvent::RoundSent(sent));
            }
            SourceAction::Freeze(_) => {
                self.due.push(SourceEvent::Frozen { flight: Duration::ZERO })
            }
            SourceAction::SendRemainder | SourceAction::SendLacking(_) => {
                self.due.retain(|due| !matches!(due, SourceEvent::RemainderSent));
                self.due.push(SourceEvent::RemainderSent);
            }
            SourceAction::Journal(record) => self.due.push(SourceEvent::Journaled(record)),
            SourceAction::ReleaseGuest => self.due.push(SourceEvent::Released),
            SourceAction::End(_) => self.ended = true,
            SourceAction::Send(_)
            | SourceAction::ForgetPages(_)
            | SourceAction::EndRound { .. }
            | SourceAction::SendFlight => {}
        }
    }
}

fn to_destination(script: &mut Script<'_>) -> Option<ToDestination> {
    Some(match script.byte()? % 8 {
        0 => hello(u16::from(script.byte()?)),
        1 => ToDestination::RoundEnd { round: script.version()?, messages: 1 },
        2 => {
            let run_when =
                if script.byte()? & 1 == 0 { RunWhen::Loaded } else { RunWhen::Complete };
            ToDestination::Offer { final_version: script.version()?, run_when }
        }
        3 => ToDestination::Commit,
        4 => ToDestination::Abort { reason: String::new() },
        5 => ToDestination::Bye { downtime_us: Some(u64::MAX) },
        6 => ToDestination::Resync {
            at: match script.byte()? % 3 {
                0 => SourceStage::Preparing,
                1 => SourceStage::Round(script.version()?),
                _ => SourceStage::Decided,
            },
        },
        _ => ToDestination::Rehearsal(PackedState::pack(&[], None)),
    })
}

/// The same for a destination.
struct LiedTo {
    machine: DestinationMachine,
    due: Vec<DestinationEvent>,
    heard_commit: bool,
    committed: bool,
    runs: bool,
    ended: bool,
}

fn lie_to_destination(mut script: Script<'_>) -> bool {
    let mut lied = LiedTo {
        machine: DestinationMachine::new(),
        due: Vec::new(),
        heard_commit: false,
        committed: false,
        runs: false,
        ended: false,
    };
    while let Some(what) = script.byte() {
        let event = match what % 8 {
            0..=2 => {
                let Some(message) = to_destination(&mut script) else { break };
                lied.heard_commit |= matches!(message, ToDestination::Commit);
                DestinationEvent::Message(message)
            }
            3 | 4 if lied.due.is_empty() => continue,
            3 => lied.due.remove(usize::from(what >> 3) % lied.due.len()),
            4 => match lied.due.remove(usize::from(what >> 3) % lied.due.len()) {
                DestinationEvent::Journaled(record) if what >> 7 == 0 => {
                    DestinationEvent::JournalFailed(record, failure())
                }
                DestinationEvent::Journaled(record) => {
                    DestinationEvent::JournalUnknown(record, failure())
                }
                DestinationEvent::Released => DestinationEvent::LetGoFailed,
                _ => DestinationEvent::Failed(failure()),
            },
            5 => DestinationEvent::LinkDown,
            6 => DestinationEvent::LinkUp,
            _ => match what >> 3 & 3 {
                0 => DestinationEvent::Cancelled,
                1 => DestinationEvent::LinkLost(failure()),
                2 => DestinationEvent::Failed(failure()),
                _ => DestinationEvent::PagesComplete,
            },
        };
        lied.tell(event);
    }
    lied.ended
}

impl LiedTo {
    fn tell(&mut self, event: DestinationEvent) {
        self.committed |=
            matches!(event, DestinationEvent::Journaled(DestinationRecord::Committed));
        self.machine.handle(event);
        while let Some(action) = self.machine.poll() {
            assert!(!self.ended, "after its end: {action:?}");
            self.act(action);
        }
        assert!(self.due.len() < MAX_DUE, "without end: {:?}", self.due);
    }

    fn act(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::RunGuest => {
                assert!(self.heard_commit, "run without the source's word");
                assert!(self.committed, "run before that is on disk");
                self.runs = true;
                self.due.push(DestinationEvent::Running);
            }
            DestinationAction::DiscardGuest => {
                assert!(!self.runs, "a guest that runs is given up");
                self.due.push(DestinationEvent::Released);
            }
            DestinationAction::Send(
                ToSource::Refused { .. }
                | ToSource::Resync { at: DestinationStage::Refused { .. }, .. },
            ) => assert!(!self.runs, "a guest that runs is refused"),
            DestinationAction::Prepare { .. } => self.due.push(DestinationEvent::Prepared),
            DestinationAction::AwaitRound { round, .. } => {
                let rejected = Vec::new();
                self.due.retain(|due| !matches!(due, DestinationEvent::RoundApplied { .. }));
                self.due.push(DestinationEvent::RoundApplied { round, rejected });
            }
            DestinationAction::CollectPages { outage, of } => {
                let pages = match of {
                    PagesOf::Round(_) => PagesHere::Held(set()),
                    PagesOf::Remainder => {
                        PagesHere::Lacking(Lacking { missing: set(), without_base: set() })
                    }
                };
                self.due.retain(|due| !matches!(due, DestinationEvent::PagesCollected { .. }));
                self.due.push(DestinationEvent::PagesCollected { outage, pages });
            }
            DestinationAction::AwaitFlight(_) => {
                self.due.retain(|due| !matches!(due, DestinationEvent::FlightArrived));
                self.due.push(DestinationEvent::FlightArrived);
            }
            DestinationAction::LoadDeviceState => self.due.push(DestinationEvent::Loaded),
            DestinationAction::Journal(record) => {
                self.due.push(DestinationEvent::Journaled(record));
            }
            DestinationAction::ReleaseGuest => self.due.push(DestinationEvent::Released),
            DestinationAction::End(_) => self.ended = true,
            DestinationAction::Send(_) | DestinationAction::KeepRehearsal(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_peer_says_no_machine_breaks_the_rules() {
        let answer = |nth: u8| nth << 3 | 3;
        // Started, then round by round as an honest peer, by the first of the answers that are due.
        let source = [
            // Post-copy, one flight: Started, Prepared, Frozen, Decided, Running, Done, Complete, Released.
            vec![8, 3, 0, 0, 3, answer(1), 0, 3, 3, 3, 0, 5, 3, 3, 3],
            // It refuses after the decision.
            vec![8, 3, 0, 0, 3, answer(1), 0, 4, 3, 3, 3],
            vec![0, 7],
        ];
        let destination = [
            // Hello, Started, Prepared, an offer, its flight, the load, Commit, Committed, Running, all pages, Complete,
            // Bye, Released.
            vec![1, 0, 0, 2, 3, 3, 0, 2, 0, 1, 3, 3, 0, 3, answer(1), 3, 31, 3, 3, 0, 5, 3],
            // The source gives up.
            vec![1, 0, 0, 2, 0, 4, 3, 3, 3, 3],
        ];
        crate::fuzz_cases::run(
            "peers",
            fuzz_peer,
            &[source.to_vec(), destination.to_vec()].concat(),
        );
    }
}
