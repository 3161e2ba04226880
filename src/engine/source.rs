//! The source's half of the handover.
//!
//! The machine has three kinds of methods: getters, [`SourceMachine::handle`] (an event comes in)
//! and [`SourceMachine::poll`] (the next action goes out). An action that takes time is answered by
//! an event of its own.
//!
//! What the guest's owner relies on: [`SourceAction::Send`] of `Commit` comes only after
//! [`SourceRecord::Decided`] is on disk, and once it may have been sent, [`SourceAction::ResumeGuest`]
//! is only given when the destination itself has said `Refused`, which it says only when the guest
//! has not run there and never will.
//!
//! A lost link ends nothing by itself. While the guest runs, and once the decision is made, the machine
//! waits for another link ([`SourceEvent::LinkDown`], [`SourceEvent::LinkUp`]); then both sides say where they stand, and whatever
//! was lost is sent again. Only between the freeze and the decision it does not wait, since the guest stands still: it
//! runs on here.

use std::collections::VecDeque;
use std::time::Duration;

use super::policy::{Next, RoundSummary};
use super::{Failure, MigrationPhase, Reach};
use crate::page::Version;
use crate::wire::message::{
    DestinationStage, HandoverForm, MAX_REJECTED_PAGES, RunWhen, SourceStage, Strategy,
    ToDestination, ToSource,
};

mod outage;
mod words;

pub use words::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Connecting,
    Preparing,
    /// Sending a round.
    Sending(Version),
    /// The round is sent; waiting for its acknowledgement.
    Draining(Version, RoundSummary),
    /// Waiting for the session to stop the guest and collect.
    Freezing(Version, RunWhen),
    /// The migration is over, but the guest can only be resumed when it has been stopped.
    Thawing,
    /// Offered, not decided.
    Offered,
    /// Writing the decision.
    Deciding,
    /// Decided and told.
    Committed,
    /// The destination runs the guest.
    Postcopy,
    Completing,
    /// The decision is being made void on disk, then the guest is resumed.
    Voiding,
    /// The guest is being resumed, then the migration ends.
    Resuming,
    Ended,
}

/// The source's half of the handover; see the module.
#[derive(Clone, Debug)]
pub struct SourceMachine {
    config: SourceConfig,
    state: State,
    link: Reach,
    /// What was said first.
    hello: Option<Box<ToDestination>>,
    /// What was offered.
    offer: Option<(Version, RunWhen)>,
    frozen: bool,
    ready: bool,
    remainder_sent: bool,
    failure: Option<Failure>,
    deadline: Option<Duration>,
    /// What the link is expected to take for the flight.
    flight: Duration,
    actions: VecDeque<SourceAction>,
    rounds: u16,
    /// Of these, ended by a lost link.
    broken_rounds: u16,
}

impl SourceMachine {
    /// A migration that has not begun.
    pub fn new(config: SourceConfig) -> Self {
        SourceMachine {
            config,
            state: State::Connecting,
            link: Reach::Up,
            hello: None,
            offer: None,
            frozen: false,
            ready: false,
            remainder_sent: false,
            failure: None,
            deadline: None,
            flight: Duration::ZERO,
            actions: VecDeque::new(),
            rounds: 0,
            broken_rounds: 0,
        }
    }

    /// One that takes the place of another, which was killed after its decision was written down;
    /// `running`: after the destination's word too that the guest runs there. The link is down, and the
    /// device state is lost: if the destination lacks it, the guest runs on here.
    pub fn resumed(config: SourceConfig, running: bool) -> Self {
        let state = if running { State::Postcopy } else { State::Committed };
        SourceMachine { state, link: Reach::Down, frozen: true, ..Self::new(config) }
    }

    /// Where the migration stands.
    pub fn phase(&self) -> MigrationPhase {
        match self.state {
            State::Connecting => MigrationPhase::Connect,
            State::Preparing => MigrationPhase::Prepare,
            State::Sending(_) | State::Draining(..) => MigrationPhase::Precopy,
            State::Freezing(..) => MigrationPhase::Freeze,
            State::Offered | State::Deciding => MigrationPhase::Offer,
            State::Committed => MigrationPhase::Commit,
            State::Postcopy | State::Completing => MigrationPhase::Postcopy,
            State::Thawing | State::Voiding | State::Resuming | State::Ended => {
                MigrationPhase::Done
            }
        }
    }

    /// Pre-copy rounds begun.
    pub fn rounds(&self) -> u16 {
        self.rounds
    }

    /// True while another link would be of use, should this one break.
    pub fn wants_link(&self) -> bool {
        matches!(
            self.state,
            State::Preparing
                | State::Sending(_)
                | State::Draining(..)
                | State::Committed
                | State::Postcopy
        )
    }

    /// True when both sides know where the other one stands.
    pub fn is_linked(&self) -> bool {
        self.link == Reach::Up
    }

    /// When [`SourceEvent::Tick`] is wanted at the latest, on the clock of [`Self::handle`].
    pub fn deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// The next action; `None` until another event comes.
    pub fn poll(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// Takes in an event; `now` is any clock that does not go back.
    pub fn handle(&mut self, now: Duration, event: SourceEvent) {
        match event {
            SourceEvent::Connected(hello) => {
                if self.state == State::Connecting {
                    self.state = State::Preparing;
                    self.deadline = Some(now + self.config.timeouts.prepare);
                    self.hello = Some(hello.clone());
                    self.act(SourceAction::Journal(SourceRecord::Started));
                    self.say(*hello);
                }
            }
            SourceEvent::Message(message) => self.handle_message(now, message),
            SourceEvent::RoundSent(summary) => {
                if let State::Sending(round) = self.state {
                    let messages = summary.messages;
                    self.say(ToDestination::RoundEnd { round, messages });
                    self.state = State::Draining(round, summary);
                    self.wait(now, self.config.timeouts.round);
                }
            }
            SourceEvent::Frozen { .. } if self.state == State::Thawing => self.resume(),
            SourceEvent::Frozen { flight } => self.handle_frozen(now, flight),
            SourceEvent::FreezeFailed(failure) => match self.state {
                State::Freezing(..) => {
                    self.abort(&failure);
                    self.failure = Some(failure);
                    self.resume();
                }
                State::Thawing => self.resume(),
                _ => {}
            },
            SourceEvent::RemainderSent => {
                self.remainder_sent = true;
                // The flight may still be on its way.
                if self.state == State::Offered {
                    self.wait(now, self.config.timeouts.load.saturating_add(self.flight));
                }
                self.decide_when_due();
            }
            SourceEvent::Journaled(record) => self.handle_journaled(now, record),
            SourceEvent::JournalFailed(record, failure) => match record {
                // Nothing hangs on these but what a person would read later; a guest that runs at the
                // destination does not wait for them.
                SourceRecord::Running | SourceRecord::Complete => {
                    self.handle_journaled(now, record);
                }
                // That the journal could not be written does not keep the guest from running on.
                SourceRecord::Void if self.state == State::Voiding => self.resume(),
                SourceRecord::Started | SourceRecord::Decided | SourceRecord::Void => {
                    self.fail(failure, true);
                }
            },
            SourceEvent::Resumed => {
                if self.state == State::Resuming {
                    let failure = self.failure.take();
                    let failure = failure.unwrap_or_else(|| Failure::plain("cancelled"));
                    self.end(SourceOutcome::Stayed(failure));
                }
            }
            SourceEvent::ResumeFailed(failure) => {
                if self.state == State::Resuming {
                    let first =
                        self.failure.take().map_or(String::new(), |f| format!(" (after: {f})"));
                    let reason =
                        format!("the guest could not be let run on here: {failure}{first}");
                    let hint = "look at its monitor; then let it run by `farfault send --resume`";
                    self.end(SourceOutcome::Stayed(Failure::new(reason, hint)));
                }
            }
            SourceEvent::Released => {
                if self.state == State::Completing {
                    self.end(SourceOutcome::Migrated);
                }
            }
            SourceEvent::Failed(failure) => self.fail(failure, true),
            SourceEvent::LinkDown(failure) => self.link_down(failure),
            SourceEvent::LinkUp => self.link_up(),
            SourceEvent::LinkLost(failure) => {
                self.link = Reach::Lost;
                // Whoever has the last page needs nothing more of the other side.
                if self.state != State::Completing {
                    self.fail(failure, false);
                }
            }
            SourceEvent::Cancelled => {
                if !self.decided() {
                    self.fail(Failure::plain("cancelled by the operator"), true);
                }
            }
            SourceEvent::Tick => self.handle_tick(now),
        }
    }

    /// True from the moment the destination may know of the decision: the guest must not be resumed
    /// here any more unless the destination refuses it.
    pub fn decided(&self) -> bool {
        matches!(self.state, State::Committed | State::Postcopy | State::Completing)
    }

    fn handle_message(&mut self, now: Duration, message: ToSource) {
        match (message, self.link) {
            (ToSource::Resync { at, .. }, Reach::Resyncing) => self.resync(now, at),
            (message, Reach::Up) => self.handle_linked(message),
            (message, Reach::Resyncing) => {
                let kind = message_name(&message);
                let text = format!("the destination said {kind} instead of where it stands");
                self.fail(Failure::plain(text), true);
            }
            // From a link that is no more.
            (_, Reach::Down | Reach::Lost) => {}
        }
    }

    fn handle_linked(&mut self, message: ToSource) {
        match (message, self.state) {
            (ToSource::Prepared, State::Preparing) => self.prepared(),
            (ToSource::RoundAck { round, rejected }, State::Draining(sent, summary))
                if round == sent =>
            {
                if rejected.len() > MAX_REJECTED_PAGES {
                    let text = format!(
                        "the destination rejected {} pages of a round, more than damage explains",
                        rejected.len()
                    );
                    let hint = "the link, the memory or the farfault of one host is broken; the \
                                guest runs on here";
                    return self.fail(Failure::new(text, hint), true);
                }
                let rejected_pages = rejected.len() as u64;
                if !rejected.is_empty() {
                    self.act(SourceAction::ForgetPages(rejected));
                }
                let Some(next) = round.next() else {
                    return self.fail(Failure::plain("no more pre-copy rounds are possible"), true);
                };
                let summary =
                    RoundSummary { dirty_pages: summary.dirty_pages + rejected_pages, ..summary };
                let rounds = self.rounds - self.broken_rounds;
                match self.config.policy.after_round(self.config.strategy, rounds, &summary) {
                    Next::AnotherRound => self.start_round(next),
                    Next::Switchover(run_when) => self.freeze(next, run_when),
                    Next::GiveUp(failure) => self.fail(failure, true),
                }
            }
            (ToSource::Ready, State::Offered) => {
                self.ready = true;
                self.decide_when_due();
            }
            // The one-flight decision was on its way already.
            (ToSource::Ready, State::Deciding | State::Committed) => self.ready = true,
            (ToSource::Running, State::Committed) => self.running(),
            (ToSource::Done, State::Postcopy) => self.done(),
            // For the session, and nothing waits for it.
            (ToSource::Rehearsed { .. }, _) => {}
            (ToSource::Refused { reason, hint }, _) => self.handle_refused(reason, hint),
            (message, state) => {
                let kind = message_name(&message);
                self.fail(
                    Failure::plain(format!("the destination said {kind} while {state:?}")),
                    true,
                );
            }
        }
    }

    fn handle_refused(&mut self, reason: String, hint: Option<String>) {
        let failure = Failure { reason: format!("the destination refused: {reason}"), hint };
        match self.state {
            State::Deciding | State::Committed => self.void(failure),
            // A guest that has run there cannot be refused: do not believe it.
            State::Postcopy | State::Completing => self.end(SourceOutcome::LostPages(failure)),
            _ => self.fail(failure, false),
        }
    }

    fn prepared(&mut self) {
        match self.config.strategy {
            Strategy::Postcopy => self.freeze(Version(1), RunWhen::Loaded),
            Strategy::Hybrid | Strategy::Precopy => self.start_round(Version(1)),
        }
    }

    fn running(&mut self) {
        self.state = State::Postcopy;
        self.deadline = None;
        self.act(SourceAction::Journal(SourceRecord::Running));
    }

    fn done(&mut self) {
        self.state = State::Completing;
        self.act(SourceAction::Journal(SourceRecord::Complete));
    }

    /// Waits for the destination; not for one that cannot be heard, which the session bounds.
    fn wait(&mut self, now: Duration, timeout: Duration) {
        self.deadline = (self.link == Reach::Up).then_some(now.saturating_add(timeout));
    }

    /// Nothing is gained by giving up before the destination does.
    fn wait_for_running(&mut self, now: Duration) {
        self.wait(now, self.config.timeouts.commit.saturating_add(self.flight));
    }

    fn start_round(&mut self, round: Version) {
        self.state = State::Sending(round);
        self.rounds += 1;
        self.deadline = None;
        self.act(SourceAction::SendRound(round));
    }

    fn freeze(&mut self, final_version: Version, run_when: RunWhen) {
        self.state = State::Freezing(final_version, run_when);
        self.frozen = true;
        self.deadline = None;
        self.act(SourceAction::Freeze(final_version));
    }

    fn handle_frozen(&mut self, now: Duration, flight: Duration) {
        let State::Freezing(final_version, run_when) = self.state else { return };
        self.flight = flight;
        self.offer = Some((final_version, run_when));
        self.say(ToDestination::Offer { final_version, run_when });
        self.act(SourceAction::SendFlight);
        self.act(SourceAction::SendRemainder);
        self.state = State::Offered;
        let budget = match run_when {
            // Nothing more to wait for before a one-flight decision.
            RunWhen::Loaded => Duration::ZERO,
            // The guest stands still until the destination has taken all of it.
            RunWhen::Complete => self.config.policy.downtime_budget,
        };
        self.remainder_sent = run_when == RunWhen::Loaded;
        self.wait(now, self.config.timeouts.load.saturating_add(flight).saturating_add(budget));
        self.decide_when_due();
    }

    fn decide_when_due(&mut self) {
        let due = match self.config.handover {
            HandoverForm::OneFlight => self.remainder_sent,
            HandoverForm::Strict => self.ready,
        };
        if due && self.state == State::Offered {
            self.state = State::Deciding;
            self.act(SourceAction::Journal(SourceRecord::Decided));
        }
    }

    fn handle_journaled(&mut self, now: Duration, record: SourceRecord) {
        match (record, self.state) {
            (SourceRecord::Decided, State::Deciding) => {
                self.state = State::Committed;
                self.wait_for_running(now);
                self.say(ToDestination::Commit);
            }
            (SourceRecord::Void, State::Voiding) => self.resume(),
            (SourceRecord::Complete, State::Completing) => {
                self.say(ToDestination::Bye { downtime_us: None });
                self.act(SourceAction::ReleaseGuest);
            }
            _ => {}
        }
    }

    fn handle_tick(&mut self, now: Duration) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.deadline = None;
        if self.state == State::Deciding {
            let reason = "the decision could not be written down in time: the disk does not answer";
            return self.fail(Failure::plain(reason), true);
        }
        let what = match self.state {
            State::Preparing => "did not prepare its guest",
            State::Draining(..) => "did not acknowledge a pre-copy round",
            State::Offered if !self.remainder_sent => "did not take the guest's last pages",
            _ => "did not load the guest",
        };
        self.fail(Failure::plain(format!("the destination {what} in time")), true);
    }

    /// A failure that is not the destination's refusal. `tell`: the destination does not know of it.
    fn fail(&mut self, failure: Failure, tell: bool) {
        match self.state {
            State::Ended => {}
            // It is over already, and what else fails must not keep the guest from running on.
            State::Voiding | State::Thawing | State::Resuming => {}
            // The destination has not been told, so it cannot run the guest.
            State::Deciding => {
                if tell {
                    self.abort(&failure);
                }
                self.void(failure);
            }
            State::Committed => {
                let hint = "the guest is stopped here and may run at the destination: look there \
                            first; only if it neither runs nor will run there, let it run on here";
                self.end(SourceOutcome::InDoubt(Failure::new(failure.reason, hint)));
            }
            State::Postcopy => self.end(SourceOutcome::LostPages(failure)),
            // Every page is there and the guest runs there: what failed here is only our own exit.
            State::Completing => self.end(SourceOutcome::Migrated),
            State::Freezing(..) => {
                if tell {
                    self.abort(&failure);
                }
                self.failure = Some(failure);
                self.state = State::Thawing;
                self.deadline = None;
            }
            _ => {
                if tell {
                    self.abort(&failure);
                }
                if self.frozen {
                    self.failure = Some(failure);
                    self.resume();
                } else {
                    self.end(SourceOutcome::Stayed(failure));
                }
            }
        }
    }

    /// Takes the decision back. On disk before the guest runs here again, so that the journal does not
    /// forbid what has happened.
    fn void(&mut self, failure: Failure) {
        self.failure = Some(failure);
        self.state = State::Voiding;
        self.deadline = None;
        self.act(SourceAction::Journal(SourceRecord::Void));
    }

    fn resume(&mut self) {
        self.state = State::Resuming;
        self.deadline = None;
        self.act(SourceAction::ResumeGuest);
    }

    fn end(&mut self, outcome: SourceOutcome) {
        self.state = State::Ended;
        self.deadline = None;
        self.act(SourceAction::End(outcome));
    }

    /// Says it, unless nobody hears: then the resync tells what must be known.
    fn say(&mut self, message: ToDestination) {
        if self.link == Reach::Up {
            self.act(SourceAction::Send(message));
        }
    }

    /// Needs no resync, since nothing follows.
    fn abort(&mut self, failure: &Failure) {
        if matches!(self.link, Reach::Up | Reach::Resyncing) {
            let reason = failure.reason.clone();
            self.act(SourceAction::Send(ToDestination::Abort { reason }));
        }
    }

    fn act(&mut self, action: SourceAction) {
        self.actions.push_back(action);
    }
}

/// Not the message itself, which may be long and is the other side's choice.
fn message_name(message: &ToSource) -> &'static str {
    match message {
        ToSource::Prepared => "Prepared",
        ToSource::RoundAck { .. } => "RoundAck",
        ToSource::Rehearsed { .. } => "Rehearsed",
        ToSource::Ready => "Ready",
        ToSource::Running => "Running",
        ToSource::Refused { .. } => "Refused",
        ToSource::Done => "Done",
        ToSource::Resync { .. } => "Resync",
    }
}
