//! The destination's half of the handover. Methods as in [`super::source`].
//!
//! What the guest's owner relies on: [`DestinationAction::RunGuest`] comes only after the source has
//! said `Commit` and [`DestinationRecord::Committed`] is on disk; `Refused` is said only when the
//! guest has not run here and, since the refusal is on disk first, never will.
//!
//! A lost link ends nothing by itself: the machine waits for another one in every state, and then answers
//! the source's `Resync` by where it stands. Even a refusal, or that every page is there, waits to be
//! heard, until the session gives up ([`DestinationEvent::LinkLost`]).

use std::collections::VecDeque;

use super::{Failure, MigrationPhase, Reach};
use crate::page::Version;
use crate::wire::message::{
    DestinationStage, PROTOCOL, RunWhen, SourceStage, Strategy, ToDestination, ToSource,
};

mod outage;
mod words;

pub use words::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Preparing,
    /// Pre-copy.
    Receiving,
    /// The offer is here, the flight is not.
    Offered,
    Loading,
    /// Loaded: could run as far as we are concerned.
    Loaded,
    Committing,
    Starting,
    Postcopy,
    Completing,
    Discarding,
    Ended,
}

/// The destination's half of the handover; see the module.
#[derive(Clone, Debug)]
pub struct DestinationMachine {
    state: State,
    strategy: Strategy,
    run_when: RunWhen,
    /// Its end was told, and not all of it is applied.
    awaited_round: Option<Version>,
    committed: bool,
    complete: bool,
    ready_said: bool,
    link: Reach,
    /// Links lost so far.
    outages: u32,
    /// The source has asked where this side stands, and waits.
    asked: bool,
    /// The guest of an earlier process has yet to be seen to run.
    starts_again: bool,
    releasing: bool,
    released: bool,
    /// That every page is here is on disk.
    complete_noted: bool,
    /// The source has said its last word, Bye or Abort: it waits for nothing more.
    source_done: bool,
    /// That word was Bye: it knows that the guest runs here with all its pages.
    source_knows: bool,
    /// That the guest runs here is on disk, or may be.
    commit_begun: bool,
    /// The refusal is on disk.
    refused: bool,
    /// The source was told of it.
    refusal_told: bool,
    /// Discarding because of this.
    failure: Option<Failure>,
    actions: VecDeque<DestinationAction>,
}

impl Default for DestinationMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl DestinationMachine {
    /// A destination that has just been reached by an authenticated source.
    pub fn new() -> Self {
        DestinationMachine {
            state: State::Waiting,
            strategy: Strategy::Hybrid,
            run_when: RunWhen::Loaded,
            awaited_round: None,
            committed: false,
            complete: false,
            ready_said: false,
            link: Reach::Up,
            outages: 0,
            asked: false,
            starts_again: false,
            releasing: false,
            released: false,
            complete_noted: false,
            source_done: false,
            source_knows: false,
            commit_begun: false,
            refused: false,
            refusal_told: false,
            failure: None,
            actions: VecDeque::new(),
        }
    }

    /// One that takes the place of another, which was killed after the source's decision had come and was
    /// written down: the guest runs here, or will. It must be let run, harmless when it does, and
    /// [`DestinationEvent::Running`] be told: it is not let go of before. The link is down.
    pub fn resumed() -> Self {
        DestinationMachine {
            state: State::Postcopy,
            committed: true,
            commit_begun: true,
            starts_again: true,
            link: Reach::Down,
            ..Self::new()
        }
    }

    /// One that takes the place of another, which was killed before. The refusal is on disk and the
    /// guest discarded: only the source is still to be told. The link is down.
    pub fn resumed_to_refuse(failure: Failure) -> Self {
        DestinationMachine {
            state: State::Discarding,
            refused: true,
            released: true,
            failure: Some(failure),
            link: Reach::Down,
            ..Self::new()
        }
    }

    /// One that takes the place of another, which was killed when it had written down that every page is here. The
    /// guest runs here and is let go of: only the source is still to be told. The link is down.
    pub fn resumed_complete() -> Self {
        DestinationMachine {
            state: State::Completing,
            committed: true,
            commit_begun: true,
            complete: true,
            complete_noted: true,
            releasing: true,
            released: true,
            link: Reach::Down,
            ..Self::new()
        }
    }

    /// True when it is on disk, or may be, that the guest runs here: then the operator cannot end it any more.
    pub fn is_committed(&self) -> bool {
        self.commit_begun
    }

    /// True when the source has only to be told how it ended here, for which nobody needs to wait.
    pub fn only_tells(&self) -> bool {
        matches!(self.state, State::Completing | State::Discarding | State::Ended)
    }

    /// True when the guest runs here with all its pages, and only the source's farewell is waited for.
    pub fn is_completing(&self) -> bool {
        self.state == State::Completing
    }

    /// True when the source has said that it knows of the migration's success. Until then what is on disk here is the
    /// only evidence of where the guest runs.
    pub fn source_knows(&self) -> bool {
        self.source_knows
    }

    /// True when the source needs no word of a refusal: it was told, or has said itself that it runs the guest.
    pub fn source_knows_of_refusal(&self) -> bool {
        self.refusal_told || self.source_done
    }

    /// True while another link would be of use, should this one break.
    pub fn wants_link(&self) -> bool {
        self.state != State::Ended
    }

    /// True when both sides know where the other one stands.
    pub fn is_linked(&self) -> bool {
        self.link == Reach::Up
    }

    /// Where the migration stands.
    pub fn phase(&self) -> MigrationPhase {
        match self.state {
            State::Waiting => MigrationPhase::Connect,
            State::Preparing => MigrationPhase::Prepare,
            // Nothing comes before the offer.
            State::Receiving if self.strategy == Strategy::Postcopy => MigrationPhase::Prepare,
            State::Receiving => MigrationPhase::Precopy,
            State::Offered | State::Loading | State::Loaded => MigrationPhase::Offer,
            State::Committing | State::Starting => MigrationPhase::Commit,
            State::Postcopy | State::Completing => MigrationPhase::Postcopy,
            State::Discarding | State::Ended => MigrationPhase::Done,
        }
    }

    /// The next action; `None` until another event comes.
    pub fn poll(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// Takes in an event.
    pub fn handle(&mut self, event: DestinationEvent) {
        match event {
            DestinationEvent::Message(message) => self.handle_message(message),
            DestinationEvent::Prepared => {
                if self.state == State::Preparing {
                    self.state = State::Receiving;
                    self.say(ToSource::Prepared);
                }
            }
            DestinationEvent::RoundApplied { round, rejected } => {
                // Not when the link was lost meanwhile: the source was told of the round's pages then.
                if self.state == State::Receiving && self.awaited_round == Some(round) {
                    self.awaited_round = None;
                    self.say(ToSource::RoundAck { round, rejected });
                }
            }
            DestinationEvent::FlightArrived => {
                if self.state == State::Offered {
                    self.state = State::Loading;
                    self.act(DestinationAction::LoadDeviceState);
                }
            }
            DestinationEvent::PagesComplete => {
                self.complete = true;
                match self.state {
                    State::Postcopy if !self.starts_again => self.finish(),
                    _ => self.run_when_due(),
                }
            }
            DestinationEvent::Loaded => {
                if self.state == State::Loading {
                    self.state = State::Loaded;
                    self.run_when_due();
                    // For who has to decide by hand. Nobody waits for it, and a guest that runs at once
                    // goes without: what is committed was loaded.
                    if self.state == State::Loaded {
                        self.act(DestinationAction::Journal(DestinationRecord::Loaded));
                    }
                }
            }
            DestinationEvent::Journaled(record) => self.handle_journaled(record),
            DestinationEvent::JournalFailed(record, failure) => {
                if record == DestinationRecord::Committed {
                    self.commit_begun = false;
                }
                self.journal_failed(record, failure);
            }
            DestinationEvent::JournalUnknown(record, failure) => {
                self.journal_failed(record, failure);
            }
            DestinationEvent::Running => {
                let started_again = std::mem::take(&mut self.starts_again);
                if started_again && self.complete && self.state == State::Postcopy {
                    self.finish();
                } else if self.state == State::Starting {
                    self.state = State::Postcopy;
                    self.say(ToSource::Running);
                    if self.complete {
                        self.finish();
                    }
                }
            }
            // A guest that runs here runs on, and one that never ran here never will.
            DestinationEvent::Released | DestinationEvent::LetGoFailed => {
                self.released = true;
                self.end_when_due();
            }
            DestinationEvent::PagesCollected { outage, pages } => {
                if outage == self.outages && self.asked {
                    self.answer(Some(pages));
                }
            }
            DestinationEvent::NotStarted(failure) => match self.state {
                State::Starting => self.discard(failure),
                _ => self.fail(failure),
            },
            DestinationEvent::Failed(failure) => self.fail(failure),
            DestinationEvent::LinkDown => self.link_down(),
            DestinationEvent::LinkUp => {
                if self.link == Reach::Down {
                    self.link = Reach::Resyncing;
                }
            }
            DestinationEvent::LinkLost(failure) => self.lose_link(failure),
            // Also when the decision has come and what it needs has not: it is refused then, and the source,
            // which waits for one or the other, takes it back.
            DestinationEvent::Cancelled => {
                if !self.commit_begun {
                    self.fail(Failure::plain("cancelled at the destination"));
                }
            }
        }
    }

    fn handle_message(&mut self, message: ToDestination) {
        match (message, self.link) {
            (ToDestination::Resync { at }, Reach::Resyncing) if !self.asked => self.resync(at),
            // A source that has given up may say so without more ado.
            (message @ ToDestination::Abort { .. }, Reach::Up | Reach::Resyncing)
            | (message, Reach::Up) => self.handle_linked(message),
            (message, Reach::Resyncing) => {
                let kind = message_name(&message);
                let text = format!("the source said {kind} before it was told how things stand");
                self.fail(Failure::plain(text));
            }
            // From a link that is no more.
            (_, Reach::Down | Reach::Lost) => {}
        }
    }

    fn handle_linked(&mut self, message: ToDestination) {
        match (message, self.state) {
            (ToDestination::Hello { protocol, shape, strategy, runs }, State::Waiting) => {
                self.state = State::Preparing;
                self.strategy = strategy;
                if protocol == PROTOCOL {
                    self.act(DestinationAction::Journal(DestinationRecord::Started));
                    self.act(DestinationAction::Prepare { shape, strategy, runs });
                } else {
                    let reason = format!(
                        "the source speaks protocol {protocol}, the destination {PROTOCOL}"
                    );
                    self.fail(Failure::new(reason, "install the same farfault on both hosts"));
                }
            }
            (ToDestination::RoundEnd { round, messages }, State::Receiving) => {
                self.awaited_round = Some(round);
                self.act(DestinationAction::AwaitRound { round, messages });
            }
            (ToDestination::Rehearsal(state), State::Receiving) => {
                self.act(DestinationAction::KeepRehearsal(state));
            }
            (ToDestination::Offer { final_version, run_when }, State::Receiving) => {
                self.state = State::Offered;
                self.run_when = run_when;
                self.act(DestinationAction::AwaitFlight(final_version));
            }
            (ToDestination::Commit, State::Offered | State::Loading | State::Loaded) => {
                self.committed = true;
                self.run_when_due();
            }
            // Said again on a new link, where the flight was lost and this was not.
            (ToDestination::Commit, _) if self.committed => {}
            // A source that has said Commit does not take it back; one that tries is not believed.
            (ToDestination::Abort { reason }, _) if !self.committed => {
                self.source_done = true;
                self.discard(Failure::plain(format!("the source gave up: {reason}")));
                self.end_when_due();
            }
            (ToDestination::Bye { .. }, State::Completing) => {
                self.source_done = true;
                self.source_knows = true;
                self.release();
            }
            (_, State::Discarding | State::Ended) => {}
            (message, state) => {
                let kind = message_name(&message);
                self.fail(Failure::plain(format!("the source said {kind} while {state:?}")));
            }
        }
    }

    fn run_when_due(&mut self) {
        let due = match self.run_when {
            RunWhen::Loaded => true,
            RunWhen::Complete => self.complete,
        };
        if self.state != State::Loaded || !due {
            return;
        }
        if self.committed {
            self.state = State::Committing;
            self.commit_begun = true;
            self.act(DestinationAction::Journal(DestinationRecord::Committed));
        } else if !self.ready_said {
            self.ready_said = true;
            self.say(ToSource::Ready);
        }
    }

    fn handle_journaled(&mut self, record: DestinationRecord) {
        match (record, self.state) {
            (DestinationRecord::Committed, State::Committing) => {
                self.state = State::Starting;
                self.act(DestinationAction::RunGuest);
            }
            (DestinationRecord::Refused, State::Discarding) => {
                self.refused = true;
                if self.link == Reach::Up {
                    let Failure { reason, hint } = self.reason_to_discard();
                    self.refusal_told = true;
                    self.say(ToSource::Refused { reason, hint });
                } else if self.asked {
                    self.answer(None);
                }
                self.act(DestinationAction::DiscardGuest);
            }
            (DestinationRecord::Complete, State::Completing) => {
                self.complete_noted = true;
                self.say(ToSource::Done);
                if self.link != Reach::Up {
                    self.release();
                }
            }
            _ => {}
        }
    }

    fn journal_failed(&mut self, record: DestinationRecord, failure: Failure) {
        match record {
            // The disk may say that the guest runs here, and cannot be made to say otherwise: whoever
            // reads it next would believe it, so the source must not be told.
            DestinationRecord::Refused if self.commit_begun => {
                if self.state == State::Discarding {
                    let reason = format!("the guest did not run here: {failure}");
                    let hint = "end the guest's monitor here, remove the journal, and let the \
                                guest run on at the source";
                    self.end(DestinationOutcome::InDoubt(Failure::new(reason, hint)));
                }
            }
            // A refusal holds without its record too: the guest is about to be discarded. And a
            // guest that runs here with all its pages does not wait for a record of that.
            DestinationRecord::Refused
            | DestinationRecord::Complete
            | DestinationRecord::Loaded => {
                self.handle_journaled(record);
            }
            DestinationRecord::Started | DestinationRecord::Committed => self.fail(failure),
        }
    }

    fn finish(&mut self) {
        self.state = State::Completing;
        self.act(DestinationAction::Journal(DestinationRecord::Complete));
    }

    fn release(&mut self) {
        if !std::mem::replace(&mut self.releasing, true) {
            self.act(DestinationAction::ReleaseGuest);
        }
        self.end_when_due();
    }

    /// The guest is let go of; it is over when the source knows, or cannot be told.
    fn end_when_due(&mut self) {
        let done = self.source_done || self.link == Reach::Lost;
        match self.state {
            State::Completing if self.released && done => {
                self.end(DestinationOutcome::Migrated);
            }
            State::Discarding if self.released && (self.refusal_told || done) => {
                let failure = self.reason_to_discard();
                self.end(DestinationOutcome::Refused(failure));
            }
            _ => {}
        }
    }

    fn reason_to_discard(&self) -> Failure {
        self.failure.clone().unwrap_or_else(|| Failure::plain("given up"))
    }

    fn fail(&mut self, failure: Failure) {
        match self.state {
            State::Ended => {}
            // It is over already; the source must still be told, and the guest ended.
            State::Discarding => {}
            // The guest is complete and runs: nothing more is needed of the source.
            State::Completing => {
                self.source_done = true;
                self.release();
            }
            State::Starting => {
                let reason = format!("the guest is loaded and may not have started: {failure}");
                // Not `cont` by hand: nobody would give it the pages that it waits for.
                let hint = "let `farfault receive --resume` here and `farfault send --resume` on the source \
                            go on with it; the source will not run it by itself any more";
                self.end(DestinationOutcome::InDoubt(Failure::new(reason, hint)));
            }
            State::Postcopy => self.end(DestinationOutcome::LostPages(failure)),
            _ => self.discard(failure),
        }
    }

    fn discard(&mut self, failure: Failure) {
        if matches!(self.state, State::Discarding | State::Ended) {
            return;
        }
        self.failure = Some(failure);
        self.state = State::Discarding;
        self.act(DestinationAction::Journal(DestinationRecord::Refused));
    }

    fn end(&mut self, outcome: DestinationOutcome) {
        self.state = State::Ended;
        self.act(DestinationAction::End(outcome));
    }

    /// Says it, unless nobody hears: then the resync tells what must be known.
    fn say(&mut self, message: ToSource) {
        if self.link == Reach::Up {
            self.act(DestinationAction::Send(message));
        }
    }

    fn act(&mut self, action: DestinationAction) {
        self.actions.push_back(action);
    }
}

fn message_name(message: &ToDestination) -> &'static str {
    match message {
        ToDestination::Hello { .. } => "Hello",
        ToDestination::RoundEnd { .. } => "RoundEnd",
        ToDestination::Offer { .. } => "Offer",
        ToDestination::Commit => "Commit",
        ToDestination::Abort { .. } => "Abort",
        ToDestination::Bye { .. } => "Bye",
        ToDestination::Resync { .. } => "Resync",
        ToDestination::Rehearsal(_) => "Rehearsal",
    }
}
