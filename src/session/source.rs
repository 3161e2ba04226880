//! The host that the guest leaves.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::answers::{Answers, encode_bundles};
use super::control::Verdict;
use super::frozen::FrozenPages;
use super::journal::{About, Journal, Side};
use super::links::{Backoff, Links, OnLink, until, until_quiet};
use super::pace::Pace;
use super::reader::{PageReader, Purpose};
use super::rehearsal::{Rehearsal, Rehearsed, rehearse};
use super::rounds::{Encoding, RoundSender, ms};
use super::{PROGRESS_INTERVAL, ProgressMeter, Shared, StopSignals, Timeline, blocking};
use crate::codec::SentLimits;
use crate::codec::ladder::CodecChoice;
use crate::engine::pusher::PusherKind;
use crate::engine::source::*;
use crate::engine::{Failure, MigrationPhase};
use crate::guest::SourceGuest;
use crate::memory::TrackerKind;
use crate::page::Version;
use crate::report::{
    AccountFigures, Counters, LinkState, MigrationResult, Output, Report, Role, TraceFile,
};
use crate::transport::{
    Lane, Link, LinkError, SavedSender, SessionKey, Ticket, TransportOptions, connect, reconnect,
};
use crate::wire::message::{
    DestinationStage, Flight, Lacking, MessageError, PROTOCOL, PackedSet, Strategy, ToDestination,
    ToSource, decode, encode,
};
use crate::wire::state::PackedState;

mod resumed;

pub use resumed::resume_send;

/// A round gets so long to notice that the link is closed.
const ROUND_GRACE: Duration = Duration::from_secs(10);

/// The last message gets so long to reach the destination.
const FAREWELL_GRACE: Duration = Duration::from_secs(2);

/// One attempt to connect again. Within it packets are repeated ever more rarely, so that a new attempt
/// finds a mended network sooner than a longer one.
const ATTEMPT: Duration = Duration::from_secs(5);

/// The guest runs on here, and the destination, which cannot be reached, is to be told so within this.
const LAST_WORD: Duration = Duration::from_secs(10);
/// Tasks that answer faults: while one encodes a page, another takes the next request. As many as there are
/// processors, within these.
const ANSWERERS: std::ops::RangeInclusive<usize> = 2..=8;

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
    let link = tokio::select! {
        link = connect(ticket, transport) => {
            link.map_err(|error| Failure::plain(error.to_string()))?
        }
        asked = signals.wait() => {
            asked.answer(Verdict::accepted());
            return Err(Failure::plain("cancelled by the operator"));
        }
    };
    let trace = super::begin_trace(options.trace.as_deref(), guest.memory().pages())?;
    let about = About::begin(&ticket.migration.to_string(), Side::Source, guest.whereabouts())?;
    let journal = Journal::create(&options.state_dir, &about)?;
    signals.listen_at(&journal, &output);
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
    /// On the link of this number. The next one is only taken when this one was dealt with.
    Heard(u32, Result<ToSource, MessageError>, OwnedSemaphorePermit),
    /// The link of this number is broken.
    LinkEnded(u32, LinkError),
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
    /// When the order to stop the guest was given, and when it ran again.
    stopped_at: Arc<Mutex<Option<Instant>>>,
    downtime: Option<Duration>,
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
            guest: Shared::new(guest),
            pages_total,
            links: Links::new(link, options.reconnect_for),
            destination,
            search: None,
            machine: SourceMachine::new(options.engine.clone()),
            options,
            output,
            timeline: Arc::new(Timeline::new()),
            counters,
            frozen: None,
            flight: None,
            journal: Arc::new(Mutex::new(journal)),
            keep,
            trace,
            happened,
            happenings,
            tasks: JoinSet::new(),
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
                    self.output.progress(progress);
                }
            }
        }
        self.finish().await
    }

    /// Takes messages of the destination.
    fn listen(&mut self) {
        let Some(on_link) = self.links.on_link() else { return };
        let happened = self.happened.clone();
        let turn = Arc::new(Semaphore::new(1));
        self.tasks.spawn(async move {
            loop {
                let Ok(permit) = turn.clone().acquire_owned().await else { return };
                let said = match on_link.link.control_recv().await {
                    Ok(bytes) => Happened::Heard(on_link.number, decode(&bytes), permit),
                    Err(error) => {
                        let _ = happened.send(Happened::LinkEnded(on_link.number, error));
                        return;
                    }
                };
                if happened.send(said).is_err() {
                    return;
                }
            }
        });
    }

    async fn take_in(&mut self, happened: Happened) {
        match happened {
            Happened::Event(event) => self.handle(event).await,
            Happened::Heard(number, message, _turn) => {
                if !self.links.is_current(number) {
                    return;
                }
                match message {
                    Ok(message) => {
                        self.note_running(&message);
                        if let ToSource::Rehearsed { check } = &message {
                            self.rehearsal.acknowledged(*check);
                        }
                        self.handle(SourceEvent::Message(message)).await;
                    }
                    Err(error) => self.handle(SourceEvent::Failed(error.into())).await,
                }
            }
            Happened::LinkEnded(number, error) => {
                if self.links.is_current(number) {
                    self.lose_link(error).await;
                }
            }
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
                        self.pack_flight(frozen, &device_state);
                        SourceEvent::Frozen
                    }
                    Err(failure) => SourceEvent::FreezeFailed(failure),
                };
                self.handle(event).await;
            }
        }
    }

    async fn handle(&mut self, event: SourceEvent) {
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

    async fn act(&mut self, action: SourceAction) {
        match action {
            SourceAction::Send(mut message) => {
                if let ToDestination::Bye { downtime_us } = &mut message {
                    *downtime_us = self.downtime.map(|downtime| downtime.as_micros() as u64);
                }
                let Some(on_link) = self.links.on_link() else { return };
                if let Err(error) = on_link.link.control_send(encode(&message).into()).await {
                    // The receiving task finds the same; this one may be first.
                    link_ended(&self.happened, &on_link, error);
                }
            }
            SourceAction::SendRound(version) => self.send_round(version),
            SourceAction::ForgetPages(pages) => {
                if let Some(sender) = &mut self.sender {
                    sender.forget(&pages);
                }
            }
            SourceAction::EndRound { held } => self.end_round(&held),
            SourceAction::Freeze(version) => self.freeze(version),
            SourceAction::SendFlight => self.send_flight(),
            SourceAction::SendRemainder => {
                if let Some(frozen) = &self.frozen {
                    frozen.begin_again();
                }
                self.send_remainder();
            }
            SourceAction::SendLacking(lacking) => self.send_lacking(&lacking),
            SourceAction::Journal(record) => {
                let journal = self.journal.clone();
                self.spawn_step(async move {
                    let write = move || journal.lock().expect("no holder panics").record(&record);
                    Ok(match blocking(write).await {
                        Ok(()) => SourceEvent::Journaled(record),
                        Err(failure) => SourceEvent::JournalFailed(record, failure),
                    })
                });
            }
            SourceAction::ResumeGuest => {
                let guest = self.guest.clone();
                self.spawn_step(async move {
                    let resumed = guest.call(|guest| guest.resume()).await;
                    Ok(resumed.map_or_else(SourceEvent::ResumeFailed, |()| SourceEvent::Resumed))
                });
            }
            SourceAction::ReleaseGuest => {
                let (guest, quit) = (self.guest.clone(), self.options.quit_source);
                self.spawn_step(async move {
                    guest
                        .call(move |guest| guest.release(quit))
                        .await
                        .map(|()| SourceEvent::Released)
                });
            }
            SourceAction::End(outcome) => self.outcome = Some(outcome),
        }
    }

    /// Carries out a step whose result is an event.
    fn spawn_step(
        &mut self,
        step: impl Future<Output = Result<SourceEvent, Failure>> + Send + 'static,
    ) {
        let happened = self.happened.clone();
        self.tasks.spawn(async move {
            let event = step.await.unwrap_or_else(SourceEvent::Failed);
            let _ = happened.send(Happened::Event(event));
        });
    }

    fn send_round(&mut self, version: Version) {
        let Some(on_link) = self.links.on_link() else { return };
        let Some(mut sender) = self.sender.take() else { return };
        let (guest, kind) = (self.guest.clone(), self.options.tracker);
        let (happened, link) = (self.happened.clone(), on_link.link.clone());
        let (messages, queue) = mpsc::channel(4);
        let (rehearsed, measured) = (happened.clone(), link.clone());
        let number = on_link.number;
        self.tasks.spawn(async move {
            let forward = tokio::spawn(forward(link, queue, |link, message| async move {
                link.push(message).await
            }));
            let round = tokio::task::spawn_blocking(move || {
                let result = (|| {
                    if !sender.is_tracking() {
                        let tracker = guest.with(|guest| guest.track(kind))?;
                        sender.track(tracker)?;
                    }
                    let summary = sender.send_round(version, &messages)?;
                    if version == Version(1) && summary.is_some() {
                        let rate = measured.stats().delivery_rate_bytes_per_s;
                        if let Some(state) = rehearse(&guest, rate)? {
                            let _ = rehearsed.send(Happened::Rehearsed(number, state));
                        }
                    }
                    Ok(summary)
                })();
                drop(messages);
                (sender, result)
            });
            let (sender, result) = match round.await {
                Ok(done) => done,
                Err(error) => {
                    let failure = Failure::plain(format!("the sending thread failed: {error}"));
                    let _ = happened.send(Happened::Event(SourceEvent::Failed(failure)));
                    return;
                }
            };
            // What the link still holds is waited for by the destination's acknowledgement.
            if let Ok(Err(error)) = forward.await {
                link_ended(&happened, &on_link, error);
            }
            let _ = happened.send(Happened::Round(sender, result));
        });
    }

    fn freeze(&mut self, version: Version) {
        let Some(mut sender) = self.sender.take() else { return };
        let (guest, happened) = (self.guest.clone(), self.happened.clone());
        let (timeline, stopped_at) = (self.timeline.clone(), self.stopped_at.clone());
        let stats = self.links.stats();
        let budget_bytes = self.options.engine.policy.downtime_bytes(
            stats.delivery_rate_bytes_per_s,
            Duration::from_micros(stats.min_rtt_us),
        );
        self.tasks.spawn_blocking(move || {
            let freeze = |sender: &mut RoundSender| {
                let begin = Instant::now();
                *stopped_at.lock().expect("no holder panics") = Some(begin);
                guest.with(|guest| guest.pause())?;
                timeline.part("freeze.stop", begin.elapsed());
                let saving = Instant::now();
                // Before the last look at the dirty pages: what the monitor writes while it saves
                // its state is then found too.
                let device_state = guest.with(|guest| guest.save_device_state())?;
                timeline.part("freeze.device_state", saving.elapsed());
                let scanning = Instant::now();
                let frozen = sender.freeze(version)?;
                frozen.push_hottest_first(budget_bytes);
                timeline.part("freeze.last_scan", scanning.elapsed());
                Ok(Box::new((frozen, device_state)))
            };
            let result = freeze(&mut sender);
            let _ = happened.send(Happened::Frozen(sender, result));
        });
    }

    fn pack_flight(&mut self, frozen: FrozenPages, device_state: &[u8]) {
        let packing = Instant::now();
        let device_state = PackedState::pack(device_state, self.rehearsal.base());
        self.device_state_bytes = device_state.coded_bytes() as u64;
        let flight = encode(&Flight {
            final_version: frozen.version(),
            need: PackedSet::pack(frozen.need()),
            zero: PackedSet::pack(frozen.zero()),
            device_state,
        });
        self.keep.final_version = Some(frozen.version());
        self.journal.lock().expect("no holder panics").keep(&self.keep);
        self.remaining_at_freeze = frozen.need().len();
        self.flight = Some(flight.into());
        self.frozen = Some(Arc::new(frozen));
        self.timeline.part("freeze.pack", packing.elapsed());
    }

    fn send_flight(&mut self) {
        let Some(flight) = self.flight.clone() else { return };
        let Some(on_link) = self.links.on_link() else { return };
        let happened = self.happened.clone();
        self.tasks.spawn(async move {
            if let Err(error) = on_link.link.send(Lane::State, flight).await {
                link_ended(&happened, &on_link, error);
            }
        });
    }

    fn end_round(&mut self, held: &PackedSet) {
        match held.unpack(self.pages_total) {
            Ok(held) => {
                if let Some(sender) = &mut self.sender {
                    sender.end_round_early(&held);
                }
            }
            Err(error) => self.fail(error.into()),
        }
    }

    fn send_lacking(&mut self, lacking: &Lacking) {
        let pages = self.pages_total;
        let sets = lacking.missing.unpack(pages).and_then(|missing| {
            let without_base = lacking.without_base.unpack(pages)?;
            Ok((missing, without_base))
        });
        match sets {
            Ok((missing, without_base)) => {
                if let Some(frozen) = &self.frozen {
                    frozen.resend(&missing, &without_base);
                }
                self.send_remainder();
            }
            Err(error) => self.fail(error.into()),
        }
    }

    fn fail(&self, failure: Failure) {
        let _ = self.happened.send(Happened::Event(SourceEvent::Failed(failure)));
    }

    /// Starts the pusher and the fault lane.
    fn send_remainder(&mut self) {
        let Some(on_link) = self.links.on_link() else { return };
        let Some(frozen) = self.frozen.clone() else { return };
        let (messages, queue) = mpsc::channel(2);
        let (codecs, rate) = (self.options.codecs, self.links.stats().delivery_rate_bytes_per_s);
        // Each thread takes the pages that are due and encodes ahead of the link by a message; the
        // remainder is sent when the last of them lets go of the channel.
        let encoders = self.options.encoders.max(1);
        let pace = Arc::new(Pace::new(encoders, Some(rate)));
        for _ in 0..encoders {
            let (frozen, on_link, messages) = (frozen.clone(), on_link.clone(), messages.clone());
            let mut reader = PageReader::new(Purpose::Push, codecs, pace.clone());
            self.tasks.spawn_blocking(move || {
                let _on_link = on_link;
                let mut begun = Vec::new();
                while let Some(message) = frozen.next_push(&mut reader, &mut begun) {
                    let (bytes, waiting) = (message.len(), Instant::now());
                    if messages.blocking_send(message).is_err() {
                        return;
                    }
                    reader.sent(bytes, waiting.elapsed());
                }
            });
        }
        drop(messages);
        let (pushing, happened) = (on_link.clone(), self.happened.clone());
        self.tasks.spawn(async move {
            let link = pushing.link.clone();
            match forward(link, queue, |link, message| async move { link.push(message).await })
                .await
            {
                Ok(()) => {
                    let _ = happened.send(Happened::Event(SourceEvent::RemainderSent));
                }
                Err(error) => link_ended(&happened, &pushing, error),
            }
        });
        let fault_pace = Arc::new(Pace::new(1, Some(rate)));
        let reader = move || PageReader::new(Purpose::Fault, codecs, fault_pace.clone());
        let (answers, bundles) = Answers::new(on_link.link.clone(), frozen.clone());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..cores.clamp(*ANSWERERS.start(), *ANSWERERS.end()) {
            let (answers, happened) = (answers.clone(), self.happened.clone());
            let (on_link, reader) = (on_link.clone(), reader());
            self.tasks.spawn(async move {
                match answers.serve(reader).await {
                    Ok(error) => link_ended(&happened, &on_link, error),
                    Err(failure) => {
                        let _ = happened.send(Happened::Event(SourceEvent::Failed(failure)));
                    }
                }
            });
        }
        // Only those who serve keep the bundler going.
        drop(answers);
        let (messages, encoded) = mpsc::channel(2);
        let bundler = on_link.clone();
        self.tasks.spawn_blocking(move || {
            let _on_link = bundler;
            encode_bundles(&frozen, bundles, &messages, reader());
        });
        let happened = self.happened.clone();
        self.tasks.spawn(async move {
            let send = |link: Link, message| async move { link.send(Lane::Bundle, message).await };
            if let Err(error) = forward(on_link.link.clone(), encoded, send).await {
                link_ended(&happened, &on_link, error);
            }
        });
    }

    /// A round that still goes on ends with the link; then its sender comes back.
    async fn take_sender_back(&mut self) {
        while self.sender.is_none() {
            match self.happenings.recv().await {
                Some(Happened::Round(sender, _) | Happened::Frozen(sender, _)) => {
                    self.sender = Some(sender);
                }
                Some(_) => {}
                None => return,
            }
        }
    }

    /// The migration has ended in an outage, with the guest running here. The destination would wait.
    async fn tell_of_stay(&self, failure: &Failure, limit: Duration) {
        let tell = async {
            let link = self.destination.find().await;
            let abort = ToDestination::Abort { reason: failure.reason.clone() };
            if link.control_send(encode(&abort).into()).await.is_ok() {
                let _ = link.finish().await;
            }
            link.close(1, &failure.reason).await;
        };
        if tokio::time::timeout(limit, tell).await.is_err() {
            tracing::warn!("the destination was not told that the guest stays here");
        }
    }

    fn account_of(&self, sender: &RoundSender) -> AccountFigures {
        AccountFigures {
            encoders: self.options.encoders.max(1) as u64,
            put_off_pages: self.counters.put_off_pages.load(Ordering::Relaxed),
            held_back_pages: self.counters.held_back_pages.load(Ordering::Relaxed),
            ..AccountFigures::default()
        }
        .occupying(sender.sent().memory())
    }

    async fn finish(mut self) -> Report {
        let outcome = self.outcome.take().expect("the loop ends with an outcome");
        self.timeline.enter(MigrationPhase::Done, &self.output);
        let total_ms = ms(self.timeline.elapsed());
        let stats = self.links.stats();
        let failure = match &outcome {
            SourceOutcome::Migrated => None,
            SourceOutcome::Stayed(f) | SourceOutcome::InDoubt(f) | SourceOutcome::LostPages(f) => {
                Some(f.clone())
            }
        };
        let goodbye = failure.as_ref().map_or("done", |failure| failure.reason.as_str());
        if let (SourceOutcome::Stayed(failure), Some(deadline)) = (&outcome, self.links.deadline())
        {
            let limit = deadline.saturating_duration_since(Instant::now()).min(LAST_WORD);
            self.tell_of_stay(failure, limit).await;
        }
        // What was said last must arrive before the link is closed.
        let link = self.links.link();
        let _ = tokio::time::timeout(FAREWELL_GRACE, link.finish()).await;
        link.close(u32::from(failure.is_some()), goodbye).await;
        // Ends the tracking of the guest's writes, which must not outlive the migration.
        if tokio::time::timeout(ROUND_GRACE, self.take_sender_back()).await.is_err() {
            tracing::warn!("a pre-copy round did not end: the guest's writes are still followed");
        }
        let account = self.sender.take().map(|sender| self.account_of(&sender));
        self.tasks.shutdown().await;
        if let Some(failure) = &failure {
            self.output.error(failure);
        }
        let path = self.journal.lock().expect("no holder panics").path().to_owned();
        match &outcome {
            SourceOutcome::Migrated | SourceOutcome::Stayed(_) => {
                self.journal.lock().expect("no holder panics").remove();
            }
            _ => self.output.note(&format!(
                "what is known of this side is in {}; `farfault status` says what to type",
                path.display()
            )),
        }
        if let Some(trace) = self.trace.take() {
            super::finish_trace(trace, &self.output);
        }
        self.counters.note_own_memory();
        let codecs = self.counters.codecs();
        Report {
            role: Role::Source,
            result: match outcome {
                SourceOutcome::Migrated => MigrationResult::Migrated,
                SourceOutcome::Stayed(_) => MigrationResult::Stayed,
                SourceOutcome::InDoubt(_) => MigrationResult::InDoubt,
                SourceOutcome::LostPages(_) => MigrationResult::LostPages,
            },
            strategy: self.options.engine.strategy,
            total_ms,
            downtime_ms: self.downtime.map(ms),
            wire_sent_bytes: stats.sent_bytes,
            wire_received_bytes: stats.received_bytes,
            pages_total: self.pages_total,
            pages_by_codec: codecs
                .used()
                .map(|(codec, pages, _)| (codec.name().into(), pages))
                .collect(),
            bytes_by_codec: codecs
                .used()
                .map(|(codec, _, bytes)| (codec.name().into(), bytes))
                .collect(),
            precopy_rounds: self.machine.rounds(),
            remaining_pages_at_freeze: self.remaining_at_freeze,
            device_state_bytes: self.device_state_bytes,
            rehearsal_ms: self.rehearsal.pause().map(ms),
            remote_faults: self.counters.remote_faults.load(Ordering::Relaxed),
            local_faults: 0,
            duplicate_pages: 0,
            fault_latency_us: None,
            faults: None,
            push: self.frozen.as_ref().map(|frozen| frozen.figures(self.options.pusher)),
            account,
            round_trip_ms: stats.min_rtt_us as f64 / 1e3,
            reconnects: self.links.reconnects(),
            huge_pages: None,
            peak_rss_bytes: self.counters.peak_rss_bytes.load(Ordering::Relaxed),
            tracker: self.tracker.map(Into::into),
            phases_ms: self.timeline.parts_ms(),
        }
    }
}

/// Tells the session's loop that work on a link has ended with the link.
fn link_ended(happened: &mpsc::UnboundedSender<Happened>, on_link: &OnLink, error: LinkError) {
    let _ = happened.send(Happened::LinkEnded(on_link.number, error));
}

/// Takes messages out of the queue until it ends and hands each to the link.
async fn forward<F: Future<Output = Result<(), LinkError>>>(
    link: Link,
    mut queue: mpsc::Receiver<Bytes>,
    send: impl Fn(Link, Bytes) -> F,
) -> Result<(), LinkError> {
    while let Some(message) = queue.recv().await {
        send(link.clone(), message).await?;
    }
    Ok(())
}
