//! The host that the guest leaves.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::answers::{Answers, encode_bundles};
use super::control::Verdict;
use super::frozen::FrozenPages;
use super::journal::{self, About, Journal, Side};
use super::links::{Backoff, Heard, Links, OnLink, until, until_quiet};
use super::pace::Pace;
use super::reader::{PageReader, Purpose};
use super::rehearsal::{Rehearsal, Rehearsed, rehearse};
use super::rounds::{Encoding, RoundSender, ms};
use super::standstill::Standstill;
use super::{
    PROGRESS_INTERVAL, ProgressMeter, Shared, StopSignals, Timeline, blocking, panic_of,
    without_panic,
};
use crate::codec::SentLimits;
use crate::codec::ladder::CodecChoice;
use crate::engine::pusher::PusherKind;
use crate::engine::source::*;
use crate::engine::{Failure, MigrationPhase};
use crate::guest::{SourceGuest, Whereabouts};
use crate::memory::TrackerKind;
use crate::page::Version;
use crate::report::{
    AccountFigures, Counters, LinkState, MigrationResult, Output, Progress, PushFigures, Report,
    Role, TraceFile,
};
use crate::transport::{
    Lane, Link, LinkError, SavedSender, SessionKey, Ticket, TransportOptions, connect, reconnect,
};
use crate::wire::message::{
    DestinationStage, Flight, Lacking, PROTOCOL, PackedSet, RunWhen, Strategy, ToDestination,
    ToSource, encode,
};
use crate::wire::state::PackedState;

mod actions;
mod ending;
mod resumed;

pub use resumed::resume_send;

/// One attempt to connect again. Within it packets are repeated ever more rarely, so that a new attempt
/// finds a mended network sooner than a longer one.
const ATTEMPT: Duration = Duration::from_secs(5);

/// A guest that has moved is looked at so often: nobody may let it run here too.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct SendOptions {
    /// Strategy, handover, limits.
    pub engine: SourceConfig,
    /// How much of what is sent is remembered, so that changed pages go as deltas.
    pub limits: SentLimits,
    /// Threads that encode pages.
    pub encoders: usize,
    /// The codecs to use; by default those that suit the link.
    pub codecs: Option<CodecChoice>,
    /// How to follow the guest's writes.
    pub tracker: TrackerKind,
    /// In which order pages go after the switchover.
    pub pusher: PusherKind,
    /// Where to write which pages were dirty after each round.
    pub trace: Option<PathBuf>,
    /// Where the journal is kept.
    pub state_dir: PathBuf,
    /// End the monitor here when the guest runs at the destination with all its pages.
    pub quit_source: bool,
    /// How long to look for the destination when the link is lost, before the migration is given up.
    /// Zero: not at all.
    pub reconnect_for: Duration,
}

/// Moves `guest` to the receiver that made `ticket`. The report is there even when it fails.
pub async fn send(
    guest: Box<dyn SourceGuest>,
    ticket: &Ticket,
    transport: &TransportOptions,
    options: SendOptions,
    output: Arc<Output>,
) -> Result<Report, Failure> {
    let mut signals = StopSignals::listen()?;
    check_that_nobody_left_it(&options.state_dir, &guest.whereabouts(), guest.runs())?;
    // What may fail here comes before the ticket is used up.
    let trace = super::begin_trace(options.trace.as_deref(), guest.memory().pages())?;
    let about = About::begin(&ticket.migration.to_string(), Side::Source, guest.whereabouts())?;
    let journal = Journal::create(&options.state_dir, &about)?;
    signals.listen_at(&journal, &output);
    let connected = tokio::select! {
        link = connect(ticket, transport) => {
            link.map_err(|error| Failure::plain(error.to_string()))
        }
        asked = signals.wait() => {
            asked.answer(Verdict::accepted());
            Err(Failure::plain("cancelled by the operator"))
        }
    };
    let link = match connected {
        Ok(link) => link,
        Err(failure) => {
            journal.remove();
            return Err(failure);
        }
    };
    output.link(LinkState::Up);
    let keep = Keep {
        session: SavedSender::of(ticket, &link),
        strategy: options.engine.strategy,
        final_version: None,
    };
    let destination = Destination {
        ticket: ticket.clone(),
        key: link.session_key(),
        transport: TransportOptions {
            connect_timeout_ms: ATTEMPT.as_millis() as u64,
            ..transport.clone()
        },
    };
    let session = Session::new(guest, link, destination, options, (journal, trace, keep), output);
    Ok(session.run(signals).await)
}

/// A guest that has come here and lacks pages would be moved on without them: what reads its memory does not fault. And
/// one that stands still since the farfault that moved it was killed would be left standing at the destination too.
fn check_that_nobody_left_it(
    state_dir: &Path,
    guest: &Whereabouts,
    runs: bool,
) -> Result<(), Failure> {
    if guest.process.is_none() {
        return Ok(());
    }
    let (left, unreadable) = journal::list(state_dir)?;
    if let Some(failure) = unreadable.into_iter().next() {
        return Err(Failure::new(
            format!("whether this guest lacks pages is not known: {}", failure.reason),
            "remove what cannot be read if that migration is long over",
        ));
    }
    let is_it = |left: &&journal::Found| left.about.guest.process == guest.process;
    let lacks_pages = |left: &&journal::Found| {
        let has = |entry| left.records.has(entry);
        // Before it has started no source had come: the guest came by another migration.
        left.about.side == Side::Destination
            && has(journal::Entry::Started)
            && !has(journal::Entry::Complete)
            && !has(journal::Entry::Refused)
    };
    if let Some(left) = left.iter().filter(is_it).find(lacks_pages) {
        return Err(Failure::new(
            format!("the guest has come here by migration {} and may lack pages", left.name()),
            format!(
                "wait until it has all of them, or see `farfault status`; if that is long over, remove {}",
                left.directory.display()
            ),
        ));
    }
    let was_stopped = |left: &&journal::Found| {
        left.about.side == Side::Source && left.about.guest.runs && !left.is_owned()
    };
    match left.iter().filter(is_it).find(was_stopped).filter(|_| !runs) {
        None => Ok(()),
        Some(left) => Err(Failure::new(
            "the guest stands still since a farfault that moved it has ended without a word",
            format!(
                "{}; or, if its owner has paused it since, remove {}",
                super::resolve::advise(left).next,
                left.directory.display()
            ),
        )),
    }
}

/// How to find the destination again.
#[derive(Clone)]
struct Destination {
    ticket: Ticket,
    key: SessionKey,
    transport: TransportOptions,
}

impl Destination {
    /// Does not give up.
    async fn find(&self) -> Link {
        let mut backoff = Backoff::new();
        loop {
            let begun = tokio::time::Instant::now();
            match reconnect(&self.ticket, &self.key, &self.transport).await {
                Ok(link) => return link,
                Err(error) => tracing::info!("connecting again: {error}"),
            }
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let random = u64::from(now.map_or(0, |now| now.subsec_nanos()));
            tokio::time::sleep_until(begun + backoff.pause(random)).await;
        }
    }
}

/// What the threads and tasks of a session tell its loop.
enum Happened {
    Event(SourceEvent),
    /// On the link of this number.
    Heard(u32, Heard<ToSource>),
    /// Nothing works on the lost link of this number any more.
    Quiet(u32),
    /// Another link.
    Reconnected(Link),
    /// The guest's device state was taken in the middle of pre-copy, on the link of this number.
    Rehearsed(u32, Rehearsed),
    /// A round's sender comes back from its thread.
    /// `None`: the link broke before the round was sent.
    Round(Box<RoundSender>, Result<Option<crate::engine::policy::RoundSummary>, Failure>),
    /// The freeze is over.
    Frozen(Box<RoundSender>, Result<Box<(FrozenPages, Vec<u8>)>, Failure>),
}

/// What the source keeps for a process that has to take over.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Keep {
    session: SavedSender,
    strategy: Strategy,
    /// From the freeze on.
    final_version: Option<Version>,
}

struct Session {
    guest: Shared<dyn SourceGuest>,
    pages_total: u64,
    links: Links,
    destination: Destination,
    /// Looks for the destination.
    search: Option<tokio::task::AbortHandle>,
    machine: SourceMachine,
    options: SendOptions,
    output: Arc<Output>,
    timeline: Arc<Timeline>,
    counters: Arc<Counters>,
    /// Away while a round or the freeze goes on.
    sender: Option<Box<RoundSender>>,
    frozen: Option<Arc<FrozenPages>>,
    flight: Option<Bytes>,
    journal: Arc<Mutex<Journal>>,
    keep: Keep,
    trace: Option<TraceFile>,
    happened: mpsc::UnboundedSender<Happened>,
    happenings: mpsc::UnboundedReceiver<Happened>,
    tasks: JoinSet<()>,
    /// False once the guest may run here again.
    is_to_stand: Arc<AtomicBool>,
    /// When the order to stop the guest was given, and when it ran again.
    stopped_at: Arc<Mutex<Option<Instant>>>,
    downtime: Option<Duration>,
    standstill: Standstill,
    rehearsal: Rehearsal,
    device_state_bytes: u64,
    remaining_at_freeze: u64,
    tracker: Option<&'static str>,
    outcome: Option<SourceOutcome>,
}

impl Session {
    fn new(
        guest: Box<dyn SourceGuest>,
        link: Link,
        destination: Destination,
        options: SendOptions,
        (journal, trace, keep): (Journal, Option<TraceFile>, Keep),
        output: Arc<Output>,
    ) -> Self {
        journal.keep(&keep);
        let counters = Arc::new(Counters::default());
        let memory = guest.memory();
        let pages_total = memory.pages();
        // Events come from a handful of tasks that each wait for their answer: the queue is short.
        let (happened, happenings) = mpsc::unbounded_channel();
        let guest = Shared::new(guest);
        let timeline = Arc::new(Timeline::new());
        Session {
            sender: Some(Box::new(RoundSender::new(
                memory,
                Encoding {
                    encoders: options.encoders,
                    codecs: options.codecs,
                    limits: options.limits,
                },
                counters.clone(),
                options.pusher,
            ))),
            standstill: Standstill::new(guest.clone(), timeline.clone()),
            guest,
            pages_total,
            links: Links::new(link, options.reconnect_for),
            destination,
            search: None,
            machine: SourceMachine::new(options.engine.clone()),
            options,
            output,
            timeline,
            counters,
            frozen: None,
            flight: None,
            journal: Arc::new(Mutex::new(journal)),
            keep,
            trace,
            happened,
            happenings,
            tasks: JoinSet::new(),
            is_to_stand: Arc::new(AtomicBool::new(true)),
            stopped_at: Arc::default(),
            downtime: None,
            rehearsal: Rehearsal::default(),
            device_state_bytes: 0,
            remaining_at_freeze: 0,
            tracker: None,
            outcome: None,
        }
    }

    async fn run(mut self, mut signals: StopSignals) -> Report {
        self.listen();
        let hello = ToDestination::Hello {
            protocol: PROTOCOL,
            shape: Box::new(self.guest.with(|guest| guest.shape().clone())),
            strategy: self.options.engine.strategy,
            runs: self.guest.with(|guest| guest.runs()),
        };
        self.handle(SourceEvent::Connected(Box::new(hello))).await;
        let mut meter = ProgressMeter::new(self.pages_total);
        let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
        while self.outcome.is_none() {
            let deadline = self.machine.deadline().unwrap_or(Duration::from_secs(1 << 30));
            let wait = deadline.saturating_sub(self.timeline.elapsed());
            let give_up = self.links.deadline();
            tokio::select! {
                Some(happened) = self.happenings.recv() => self.take_in(happened).await,
                Some(ended) = self.tasks.join_next() => {
                    if let Some(failure) = panic_of(ended) {
                        self.handle(SourceEvent::Failed(failure)).await;
                    }
                }
                () = tokio::time::sleep(wait) => self.handle(SourceEvent::Tick).await,
                () = until(give_up) => self.give_up().await,
                asked = signals.wait() => {
                    if self.machine.decided() {
                        let reason = "the guest is already at the destination: finishing";
                        self.output.note(reason);
                        asked.answer(Verdict::refused(reason));
                    } else {
                        asked.answer(Verdict::accepted());
                    }
                    self.handle(SourceEvent::Cancelled).await;
                }
                _ = ticks.tick() => {
                    let progress = meter.read(&self.timeline, &self.counters, &self.links);
                    self.output.progress(Progress { push: self.push_figures(), ..progress });
                }
            }
        }
        self.finish().await
    }

    fn push_figures(&self) -> Option<PushFigures> {
        self.frozen.as_ref().map(|frozen| frozen.figures(self.options.pusher))
    }

    /// Takes messages of the destination.
    fn listen(&mut self) {
        let Some(on_link) = self.links.on_link() else { return };
        let happened = self.happened.clone();
        self.tasks
            .spawn(on_link.listen(move |number, heard| {
                happened.send(Happened::Heard(number, heard)).is_ok()
            }));
    }

    async fn take_in(&mut self, happened: Happened) {
        match happened {
            Happened::Event(event) => self.handle(event).await,
            Happened::Heard(number, _) if !self.links.is_current(number) => {}
            Happened::Heard(_, Heard::Message(Ok(message), _turn)) => {
                self.note_running(&message);
                if let ToSource::Rehearsed { check } = &message {
                    self.rehearsal.acknowledged(*check);
                }
                self.handle(SourceEvent::Message(message)).await;
            }
            Happened::Heard(_, Heard::Message(Err(error), _turn)) => {
                self.handle(SourceEvent::Failed(error.into())).await;
            }
            Happened::Heard(_, Heard::End(error)) => self.lose_link(error).await,
            Happened::Quiet(number) => {
                self.links.quiet(number);
                self.take_next_link().await;
            }
            Happened::Reconnected(link) => {
                self.search = None;
                self.links.offer(link);
                self.take_next_link().await;
            }
            Happened::Rehearsed(number, rehearsed) => {
                // On another link the two sides have to find each other first.
                let message = self.rehearsal.note(rehearsed);
                if let Some(message) = message.filter(|_| self.links.is_current(number)) {
                    self.act(SourceAction::Send(message)).await;
                }
            }
            Happened::Round(sender, result) => {
                self.tracker = sender.tracker_name();
                if let Some(trace) = &mut self.trace {
                    trace.dirty(self.timeline.elapsed(), sender.dirty());
                }
                self.sender = Some(sender);
                let event = match result {
                    Ok(None) => return,
                    Ok(Some(mut summary)) => {
                        let stats = self.links.stats();
                        summary.round_trip = Duration::from_micros(stats.min_rtt_us);
                        summary.link_bytes_per_s = stats.delivery_rate_bytes_per_s.max(1);
                        SourceEvent::RoundSent(summary)
                    }
                    Err(failure) => SourceEvent::Failed(failure),
                };
                self.handle(event).await;
            }
            Happened::Frozen(sender, result) => {
                self.sender = Some(sender);
                let event = match result {
                    Ok(collected) => {
                        let (frozen, device_state) = *collected;
                        let flight = self.pack_flight(frozen, &device_state);
                        SourceEvent::Frozen { flight }
                    }
                    Err(failure) => SourceEvent::FreezeFailed(failure),
                };
                self.handle(event).await;
            }
        }
    }

    async fn handle(&mut self, event: SourceEvent) {
        if matches!(event, SourceEvent::Journaled(SourceRecord::Decided)) {
            self.watch_guest();
        }
        self.machine.handle(self.timeline.elapsed(), event);
        self.timeline.enter(self.machine.phase(), &self.output);
        while let Some(action) = self.machine.poll() {
            self.act(action).await;
        }
        if self.machine.is_linked()
            && let Some(outage) = self.links.mended()
        {
            self.output.link_up(outage);
        }
    }

    /// The destination says that the guest runs there: how long it stood still.
    fn note_running(&mut self, message: &ToSource) {
        let ago = match message {
            ToSource::Running => Duration::ZERO,
            ToSource::Resync {
                at: DestinationStage::Running { .. } | DestinationStage::Done,
                running_us: Some(running_us),
            } => Duration::from_micros(*running_us),
            _ => return,
        };
        let back = Duration::from_micros(self.links.stats().min_rtt_us / 2);
        let stopped_at = *self.stopped_at.lock().expect("no holder panics");
        let downtime = stopped_at.map(|at| at.elapsed().saturating_sub(ago).saturating_sub(back));
        self.downtime = self.downtime.or(downtime);
    }

    /// The link is broken: looks for another one, where that helps.
    async fn lose_link(&mut self, error: LinkError) {
        let failure = Failure::plain(error.to_string());
        let mendable = error.is_mendable() && !self.links.reconnect_for().is_zero();
        if let Some((number, quiet)) = self.links.lose(error) {
            let happened = self.happened.clone();
            self.tasks.spawn(async move {
                until_quiet(quiet).await;
                let _ = happened.send(Happened::Quiet(number));
            });
        }
        if !mendable {
            self.links.give_up();
            return self.handle(SourceEvent::LinkLost(failure)).await;
        }
        if self.machine.wants_link() {
            self.output.link_down(&failure.reason, self.links.reconnect_for());
            let (destination, happened) = (self.destination.clone(), self.happened.clone());
            let search = self.tasks.spawn(async move {
                let _ = happened.send(Happened::Reconnected(destination.find().await));
            });
            self.search = Some(search);
        }
        self.handle(SourceEvent::LinkDown(failure)).await;
    }

    async fn take_next_link(&mut self) {
        if self.machine.wants_link() && self.links.take_next() {
            self.listen();
            self.handle(SourceEvent::LinkUp).await;
        }
    }

    /// The outage has lasted too long.
    async fn give_up(&mut self) {
        if let Some(search) = self.search.take() {
            search.abort();
        }
        let failure = Failure::new(
            self.links.give_up(),
            "look at the network and at the other host; --reconnect-for allows more time",
        );
        self.handle(SourceEvent::LinkLost(failure)).await;
    }

    fn fail(&self, failure: Failure) {
        let _ = self.happened.send(Happened::Event(SourceEvent::Failed(failure)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::destination::DestinationRecord;
    use crate::memory::adopt::ProcessIdentity;

    #[test]
    fn a_guest_that_a_killed_farfault_has_stopped_is_not_taken_for_paused_by_its_owner() {
        let state = tempfile::tempdir().unwrap();
        let me = ProcessIdentity::own().unwrap();
        let guest = Whereabouts { process: Some(me), runs: true, ..Whereabouts::default() };
        let other = Whereabouts {
            process: Some(ProcessIdentity { start_ticks: me.start_ticks + 1, ..me }),
            ..guest.clone()
        };
        let check = |guest| check_that_nobody_left_it(state.path(), guest, false);
        let about = About::begin("0123456789abcdef", Side::Source, guest.clone()).unwrap();
        let dead = ProcessIdentity { start_ticks: me.start_ticks + 1, ..me };
        let left = About { owner: dead, ..about.clone() };
        let journal = Journal::create(state.path(), &left).unwrap();
        let hint = check(&guest).unwrap_err().hint.unwrap();
        assert!(hint.contains("farfault resolve 0123456789abcdef.source --run-source"), "{hint}");
        check(&other).expect("another guest");
        journal.own(&about).unwrap();
        check(&guest).expect("somebody works on it, and that is found out elsewhere");
        journal.remove();
        check(&guest).expect("nothing is left of it");
    }

    #[test]
    fn a_guest_that_has_come_here_is_not_moved_on_before_it_has_all_its_pages() {
        let state = tempfile::tempdir().unwrap();
        let me = ProcessIdentity::own().unwrap();
        let guest = Whereabouts { process: Some(me), runs: true, ..Whereabouts::default() };
        let about = About::begin("0123456789abcdef", Side::Destination, guest.clone()).unwrap();
        let mut journal = Journal::create(state.path(), &about).unwrap();
        check_that_nobody_left_it(state.path(), &guest, true).expect("nothing came by that one");
        let damaged = state.path().join("fedcba9876543210.destination");
        std::fs::create_dir(&damaged).unwrap();
        let refused = check_that_nobody_left_it(state.path(), &guest, true).unwrap_err();
        assert!(refused.reason.contains("fedcba9876543210"), "{refused}");
        std::fs::remove_dir(&damaged).unwrap();
        for record in [DestinationRecord::Started, DestinationRecord::Committed] {
            journal.record(&record).unwrap();
            for runs in [true, false] {
                let refused = check_that_nobody_left_it(state.path(), &guest, runs).unwrap_err();
                assert!(refused.reason.contains("may lack pages"), "{refused}");
            }
        }
        journal.record(&DestinationRecord::Complete).unwrap();
        check_that_nobody_left_it(state.path(), &guest, true).expect("it has all of them");
    }
}
