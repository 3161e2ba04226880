//! A state of the handover, and what can happen in it.

use std::collections::VecDeque;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use super::super::network::View;
use crate::engine::Failure;
use crate::engine::destination::*;
use crate::engine::policy::RoundSummary;
use crate::engine::source::*;
use crate::page::PageSet;
use crate::wire::message::{DestinationStage, Lacking, PackedSet, ToDestination, ToSource};

/// How many accidents of each kind may happen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accidents {
    pub(super) cuts: u8,
    pub(super) failures: u8,
    pub(super) crashes: u8,
    /// Another process takes the place of a killed one.
    pub(super) resumes: u8,
    pub(super) cancels: u8,
    /// A side gives up waiting for another link, or for an answer.
    pub(super) impatience: u8,
}

#[derive(Clone, Debug)]
pub(super) struct Handover {
    pub(super) source: Option<SourceMachine>,
    pub(super) destination: Option<DestinationMachine>,
    pub(super) source_end: Option<SourceOutcome>,
    pub(super) destination_end: Option<DestinationOutcome>,
    pub(super) to_destination: VecDeque<ToDestination>,
    pub(super) to_source: VecDeque<ToSource>,
    /// Answers that are due, each in its own time.
    pub(super) source_due: Vec<SourceEvent>,
    pub(super) destination_due: Vec<DestinationEvent>,
    pub(super) source_journal: Vec<SourceRecord>,
    pub(super) destination_journal: Vec<DestinationRecord>,
    pub(super) carries: bool,
    pub(super) at_source: View,
    pub(super) at_destination: View,
    /// The flight and the pages behind it are on their way; they have come.
    pub(super) flight_sent: bool,
    pub(super) flight_here: bool,
    pub(super) pages_sent: bool,
    pub(super) pages_here: bool,
    pub(super) awaits_flight: bool,
    pub(super) runs_at_source: bool,
    pub(super) runs_at_destination: bool,
    pub(super) left: Accidents,
    /// What was done against the rules.
    pub(super) wrong: Option<&'static str>,
}

// The machines are not made to be compared: by what they print, which is all of them.
/// Takes in text without keeping it.
struct Hashed<'a, H>(&'a mut H);

impl<H: Hasher> Write for Hashed<'_, H> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

impl Hash for Handover {
    fn hash<H: Hasher>(&self, state: &mut H) {
        write!(Hashed(state), "{self:?}").expect("it takes all");
    }
}

impl PartialEq for Handover {
    fn eq(&self, other: &Self) -> bool {
        format!("{self:?}") == format!("{other:?}")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Source { due: usize, fails: bool },
    Destination { due: usize, fails: bool },
    HearSource,
    HearDestination,
    Flight,
    Pages,
    Cut,
    SourceNotices,
    DestinationNotices,
    Reconnect,
    SourceLinks,
    DestinationLinks,
    SourceGivesUp,
    DestinationGivesUp,
    SourceCrashes,
    DestinationCrashes,
    SourceResumes,
    DestinationResumes,
    SourceCancels,
    DestinationCancels,
    Late,
}

fn failure() -> Failure {
    Failure::plain("injected")
}

impl Handover {
    /// Before the first word.
    pub(super) fn new(config: SourceConfig, accidents: Accidents) -> Self {
        Handover {
            source: Some(SourceMachine::new(config)),
            destination: Some(DestinationMachine::new()),
            source_end: None,
            destination_end: None,
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            source_due: Vec::new(),
            destination_due: Vec::new(),
            source_journal: Vec::new(),
            destination_journal: Vec::new(),
            carries: true,
            at_source: View::Up,
            at_destination: View::Up,
            flight_sent: false,
            flight_here: false,
            pages_sent: false,
            pages_here: false,
            awaits_flight: false,
            runs_at_source: true,
            runs_at_destination: false,
            left: accidents,
            wrong: None,
        }
    }

    pub(super) fn tell_source(&mut self, event: SourceEvent) {
        if self.source_end.is_some() {
            return;
        }
        let Some(mut machine) = self.source.take() else { return };
        // At the deadline, when it is that which has come.
        let now = machine.deadline().filter(|_| matches!(event, SourceEvent::Tick));
        machine.handle(now.unwrap_or_default(), event);
        while let Some(action) = machine.poll() {
            self.act_for_source(action);
        }
        self.source = Some(machine);
    }

    fn act_for_source(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(message) => {
                if matches!(message, ToDestination::Commit) {
                    if !self.source_journal.contains(&SourceRecord::Decided) {
                        self.wrong = Some("Commit before the decision is on disk");
                    }
                    if self.runs_at_source {
                        self.wrong = Some("Commit while the guest runs here");
                    }
                }
                if self.carries {
                    self.to_destination.push_back(message);
                }
            }
            SourceAction::SendRound(_) => {
                self.source_due.push(SourceEvent::RoundSent(RoundSummary {
                    messages: 1,
                    sent_pages: 1,
                    sent_bytes: 4096,
                    duration: Duration::from_secs(1),
                    link_bytes_per_s: 1 << 20,
                    ..Default::default()
                }));
            }
            SourceAction::ForgetPages(_) | SourceAction::EndRound { .. } => {}
            SourceAction::Freeze(_) => {
                self.source_due.push(SourceEvent::Frozen { flight: Duration::ZERO })
            }
            SourceAction::SendFlight => self.flight_sent = self.carries,
            SourceAction::SendRemainder | SourceAction::SendLacking(_) => {
                self.pages_sent = self.carries;
                self.source_due.push(SourceEvent::RemainderSent);
            }
            SourceAction::Journal(record) => self.source_due.push(SourceEvent::Journaled(record)),
            SourceAction::ResumeGuest => self.source_due.push(SourceEvent::Resumed),
            SourceAction::ReleaseGuest => self.source_due.push(SourceEvent::Released),
            SourceAction::End(outcome) => self.source_end = Some(outcome),
        }
    }

    fn tell_destination(&mut self, event: DestinationEvent) {
        if self.destination_end.is_some() {
            return;
        }
        let Some(mut machine) = self.destination.take() else { return };
        machine.handle(event);
        while let Some(action) = machine.poll() {
            self.act_for_destination(action);
        }
        self.destination = Some(machine);
    }

    fn act_for_destination(&mut self, action: DestinationAction) {
        let due = &mut self.destination_due;
        match action {
            DestinationAction::Send(message) => {
                if self.carries {
                    self.to_source.push_back(message);
                }
            }
            DestinationAction::Prepare { .. } => due.push(DestinationEvent::Prepared),
            DestinationAction::AwaitRound { round, .. } => {
                due.push(DestinationEvent::RoundApplied { round, rejected: Vec::new() });
            }
            DestinationAction::CollectPages { outage, of } => {
                let set = || PackedSet::pack(&PageSet::empty(1));
                let pages = match of {
                    PagesOf::Round(_) => PagesHere::Held(set()),
                    PagesOf::Remainder => {
                        PagesHere::Lacking(Lacking { missing: set(), without_base: set() })
                    }
                };
                due.push(DestinationEvent::PagesCollected { outage, pages });
            }
            DestinationAction::AwaitFlight(_) => self.awaits_flight = true,
            DestinationAction::LoadDeviceState => due.push(DestinationEvent::Loaded),
            DestinationAction::Journal(record) => due.push(DestinationEvent::Journaled(record)),
            DestinationAction::RunGuest => due.push(DestinationEvent::Running),
            DestinationAction::ReleaseGuest | DestinationAction::DiscardGuest => {
                due.push(DestinationEvent::Released);
            }
            DestinationAction::KeepRehearsal(_) => {}
            DestinationAction::End(outcome) => self.destination_end = Some(outcome),
        }
    }

    /// An answer of the source's host comes, or the step has failed.
    fn answer_source(&mut self, due: usize, fails: bool) {
        let event = self.source_due.remove(due);
        let event = match (event, fails) {
            (SourceEvent::Journaled(record), true) => SourceEvent::JournalFailed(record, failure()),
            (SourceEvent::Frozen { .. }, true) => SourceEvent::FreezeFailed(failure()),
            (SourceEvent::Resumed, true) => SourceEvent::ResumeFailed(failure()),
            (_, true) => SourceEvent::Failed(failure()),
            (event, false) => {
                match &event {
                    SourceEvent::Journaled(record) => self.source_journal.push(*record),
                    SourceEvent::Frozen { .. } => self.runs_at_source = false,
                    SourceEvent::Resumed => self.runs_at_source = true,
                    _ => {}
                }
                event
            }
        };
        self.tell_source(event);
    }

    fn answer_destination(&mut self, due: usize, fails: bool) {
        let event = self.destination_due.remove(due);
        let event = match (event, fails) {
            (DestinationEvent::Journaled(record), true) => {
                DestinationEvent::JournalFailed(record, failure())
            }
            (DestinationEvent::Released, true) => DestinationEvent::LetGoFailed,
            (DestinationEvent::Running, true) => DestinationEvent::NotStarted(failure()),
            (_, true) => DestinationEvent::Failed(failure()),
            (event, false) => {
                match &event {
                    DestinationEvent::Journaled(record) => self.destination_journal.push(*record),
                    DestinationEvent::Running => {
                        self.runs_at_destination = true;
                        if !self.destination_journal.contains(&DestinationRecord::Committed) {
                            self.wrong = Some("the guest runs before that is on disk");
                        }
                    }
                    _ => {}
                }
                event
            }
        };
        self.tell_destination(event);
    }

    pub(super) fn source_lives(&self) -> bool {
        self.source.is_some() && self.source_end.is_none()
    }

    pub(super) fn destination_lives(&self) -> bool {
        self.destination.is_some() && self.destination_end.is_none()
    }

    fn source_can_resume(&self) -> bool {
        self.left.resumes > 0 && self.source.is_none() && self.source_end.is_none()
    }

    fn destination_can_resume(&self) -> bool {
        let begun = self.destination_journal.contains(&DestinationRecord::Started);
        let dead = self.destination.is_none() && self.destination_end.is_none();
        self.left.resumes > 0 && dead && begun
    }

    /// As `session/source/resumed.rs`.
    fn source_resumes(&mut self, config: SourceConfig) {
        let has = |record| self.source_journal.contains(&record);
        (self.carries, self.at_source, self.to_source) = (false, View::Down, VecDeque::new());
        if has(SourceRecord::Complete) {
            self.source_end = Some(SourceOutcome::Migrated);
        } else if has(SourceRecord::Void) || !has(SourceRecord::Decided) {
            self.runs_at_source = true;
            self.source_end = Some(SourceOutcome::Stayed(failure()));
        } else if self.runs_at_source {
            self.runs_at_source = false;
            self.source_end = Some(SourceOutcome::InDoubt(failure()));
        } else {
            self.source = Some(SourceMachine::resumed(config, has(SourceRecord::Running)));
        }
    }

    /// As `session/destination/resumed.rs`.
    fn destination_resumes(&mut self) {
        let has = |record| self.destination_journal.contains(&record);
        (self.carries, self.at_destination) = (false, View::Down);
        self.to_destination.clear();
        (self.awaits_flight, self.flight_sent, self.pages_sent) = (false, false, false);
        if has(DestinationRecord::Committed) && !has(DestinationRecord::Refused) {
            if has(DestinationRecord::Complete) {
                self.destination = Some(DestinationMachine::resumed_complete());
                return;
            }
            self.destination = Some(DestinationMachine::resumed());
            self.flight_here = true;
            let due = &mut self.destination_due;
            due.push(DestinationEvent::Running);
            due.extend(self.pages_here.then_some(DestinationEvent::PagesComplete));
        } else {
            if self.runs_at_destination {
                self.wrong = Some("a guest that runs is given up");
            }
            if !has(DestinationRecord::Refused) {
                self.destination_journal.push(DestinationRecord::Refused);
            }
            self.destination = Some(DestinationMachine::resumed_to_refuse(failure()));
        }
    }

    fn can_reconnect(&self) -> bool {
        let wanted = self.source.as_ref().is_some_and(SourceMachine::wants_link)
            && self.destination.as_ref().is_some_and(DestinationMachine::wants_link);
        let waits = matches!(self.at_destination, View::Up | View::Down);
        let lives = self.source_lives() && self.destination_lives();
        !self.carries && self.at_source == View::Down && waits && wanted && lives
    }

    /// What both sides have to do.
    fn work(&self, steps: &mut Vec<Step>) {
        if self.source_lives() {
            let fails = false;
            steps.extend((0..self.source_due.len()).map(|due| Step::Source { due, fails }));
            let hears = self.at_source == View::Up;
            steps.extend((hears && !self.to_source.is_empty()).then_some(Step::HearDestination));
            steps.extend((hears && !self.carries).then_some(Step::SourceNotices));
            steps.extend((self.at_source == View::Coming).then_some(Step::SourceLinks));
        }
        if self.destination_lives() {
            let fails = false;
            let due = 0..self.destination_due.len();
            steps.extend(due.map(|due| Step::Destination { due, fails }));
            let hears = self.at_destination == View::Up;
            let flight = self.flight_sent && self.awaits_flight;
            let pages = self.pages_sent && self.flight_here && !self.pages_here;
            steps.extend((hears && !self.to_destination.is_empty()).then_some(Step::HearSource));
            steps.extend((hears && flight).then_some(Step::Flight));
            steps.extend((hears && pages).then_some(Step::Pages));
            steps.extend((hears && !self.carries).then_some(Step::DestinationNotices));
            steps.extend((self.at_destination == View::Coming).then_some(Step::DestinationLinks));
        }
        steps.extend(self.can_reconnect().then_some(Step::Reconnect));
        steps.extend(self.source_can_resume().then_some(Step::SourceResumes));
        steps.extend(self.destination_can_resume().then_some(Step::DestinationResumes));
    }

    /// What may happen besides; `idle`: nothing else does.
    fn accidents(&self, idle: bool, steps: &mut Vec<Step>) {
        let (source, destination) = (self.source_lives(), self.destination_lives());
        let left = self.left;
        let mut add = |step, can: bool| steps.extend(can.then_some(step));
        add(Step::Cut, left.cuts > 0 && self.carries);
        add(Step::SourceCrashes, left.crashes > 0 && source);
        add(Step::DestinationCrashes, left.crashes > 0 && destination);
        add(Step::SourceCancels, left.cancels > 0 && source);
        add(Step::DestinationCancels, left.cancels > 0 && destination);
        let impatient = idle || left.impatience > 0;
        let deadline = self.source.as_ref().and_then(SourceMachine::deadline).is_some();
        add(Step::Late, impatient && source && deadline);
        add(Step::SourceGivesUp, impatient && source && self.at_source == View::Down);
        let down = self.at_destination == View::Down;
        add(Step::DestinationGivesUp, impatient && destination && down);
        if left.failures > 0 && source {
            let due = 0..self.source_due.len();
            steps.extend(due.map(|due| Step::Source { due, fails: true }));
        }
        if left.failures > 0 && destination {
            let due = 0..self.destination_due.len();
            steps.extend(due.map(|due| Step::Destination { due, fails: true }));
        }
    }

    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        self.work(&mut steps);
        let idle = steps.is_empty();
        self.accidents(idle, &mut steps);
        steps
    }

    pub(super) fn take(&mut self, step: Step, config: &SourceConfig) {
        match step {
            Step::Source { due, fails } => {
                self.left.failures -= u8::from(fails);
                self.answer_source(due, fails);
            }
            Step::Destination { due, fails } => {
                self.left.failures -= u8::from(fails);
                self.answer_destination(due, fails);
            }
            Step::HearSource => {
                let message = self.to_destination.pop_front().expect("listed");
                self.tell_destination(DestinationEvent::Message(message));
            }
            Step::HearDestination => {
                let message = self.to_source.pop_front().expect("listed");
                let refusal = matches!(
                    message,
                    ToSource::Refused { .. }
                        | ToSource::Resync { at: DestinationStage::Refused { .. }, .. }
                );
                if refusal && self.runs_at_destination {
                    self.wrong = Some("a guest that has run is refused");
                }
                self.tell_source(SourceEvent::Message(message));
            }
            Step::Flight => {
                (self.flight_sent, self.awaits_flight, self.flight_here) = (false, false, true);
                self.destination_due.push(DestinationEvent::FlightArrived);
            }
            Step::Pages => {
                (self.pages_sent, self.pages_here) = (false, true);
                self.destination_due.push(DestinationEvent::PagesComplete);
            }
            Step::Cut => {
                self.left.cuts -= 1;
                self.lose_link();
            }
            Step::SourceNotices => self.source_notices(),
            Step::DestinationNotices => self.destination_notices(),
            Step::Reconnect => {
                if self.at_destination == View::Up {
                    self.destination_notices();
                }
                self.carries = self.destination_lives();
                if self.carries {
                    (self.at_source, self.at_destination) = (View::Coming, View::Coming);
                }
            }
            Step::SourceLinks => {
                self.at_source = View::Up;
                self.tell_source(SourceEvent::LinkUp);
            }
            Step::DestinationLinks => {
                self.at_destination = View::Up;
                self.tell_destination(DestinationEvent::LinkUp);
            }
            Step::SourceGivesUp => {
                self.left.impatience = self.left.impatience.saturating_sub(1);
                self.at_source = View::Over;
                self.tell_source(SourceEvent::LinkLost(failure()));
            }
            Step::DestinationGivesUp => {
                self.left.impatience = self.left.impatience.saturating_sub(1);
                self.at_destination = View::Over;
                self.tell_destination(DestinationEvent::LinkLost(failure()));
            }
            Step::SourceCrashes => {
                self.left.crashes -= 1;
                (self.source, self.source_due) = (None, Vec::new());
            }
            Step::DestinationCrashes => {
                self.left.crashes -= 1;
                (self.destination, self.destination_due) = (None, Vec::new());
            }
            Step::SourceResumes => {
                self.left.resumes -= 1;
                self.source_resumes(config.clone());
            }
            Step::DestinationResumes => {
                self.left.resumes -= 1;
                self.destination_resumes();
            }
            Step::SourceCancels => {
                self.left.cancels -= 1;
                self.tell_source(SourceEvent::Cancelled);
            }
            Step::DestinationCancels => {
                self.left.cancels -= 1;
                self.tell_destination(DestinationEvent::Cancelled);
            }
            Step::Late => {
                self.left.impatience = self.left.impatience.saturating_sub(1);
                self.tell_source(SourceEvent::Tick);
            }
        }
        if !self.source_lives() || !self.destination_lives() {
            // What was said last may still be heard.
            self.carries = false;
        }
    }

    /// Nothing that is on its way arrives any more. That it had arrived before is another schedule.
    fn lose_link(&mut self) {
        self.carries = false;
        (self.to_source, self.to_destination) = (VecDeque::new(), VecDeque::new());
        (self.flight_sent, self.pages_sent) = (false, false);
    }

    fn source_notices(&mut self) {
        self.at_source = View::Down;
        self.to_source.clear();
        // A round that was being sent ends with the link.
        self.source_due.retain(|due| !matches!(due, SourceEvent::RoundSent(_)));
        self.tell_source(SourceEvent::LinkDown(failure()));
    }

    fn destination_notices(&mut self) {
        self.at_destination = View::Down;
        self.to_destination.clear();
        (self.awaits_flight, self.flight_sent, self.pages_sent) = (false, false, false);
        self.tell_destination(DestinationEvent::LinkDown);
    }
}
