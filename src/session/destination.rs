//! The host that the guest goes to.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::asking::{AskReceiver, AskSender, Asked, ask_queue};
use super::arrivals::Arrivals;
use super::control::Verdict;
use super::journal::{About, Journal, Side};
use super::ledger::{Noted, RoundLedger, Unapplied};
use super::links::{Heard, Links, OnLink, until, until_quiet};
use super::rounds::ms;
use super::{
    PROGRESS_INTERVAL, ProgressMeter, Shared, StopSignals, Timeline, blocking, lock, panic_of,
};
use crate::engine::destination::*;
use crate::engine::{Failure, MigrationPhase};
use crate::guest::{DestinationGuest, Shape};
use crate::memory::adopt::HugePages;
use crate::memory::{
    AskedFor, FaultOptions, FaultServer, Mapper, MemoryError, PageTable, Touched, Userfault,
};
use crate::page::{PageIndex, Version};
use crate::report::{
    Counters, FaultFigures, FaultLatency, LinkState, MigrationResult, Output, Progress, Report,
    Role, TRACE_LIMIT, TraceFile, TraceRecord,
};
use crate::transport::{Lane, Link, LinkError, Listener, SavedReceiver, SessionKey};
use crate::wire::DecodeScratch;
use crate::wire::message::{
    DestinationStage, FaultRequest, Flight, Lacking, MAX_REQUEST_PAGES, PackedSet, Strategy,
    ToDestination, ToSource, Wanted, decode, encode,
};
use crate::wire::state::{PackedState, RehearsedState};

mod actions;
mod asking;
mod ending;
mod lanes;
mod resumed;

pub use resumed::resume_receive;

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    /// Where the journal is kept.
    pub state_dir: PathBuf,
    /// Leave the guest stopped, with all its pages, instead of letting it run.
    pub paused: bool,
    /// How long to wait for the source when the link is lost, before the migration is given up. Zero: not
    /// at all.
    pub reconnect_for: Duration,
    /// Filled with the table of page states once the guest's memory is registered, for someone who
    /// wants to watch it.
    pub page_table: Arc<OnceLock<Arc<PageTable>>>,
    /// Gather the guest's pages into huge pages when all of them are there.
    pub huge_pages: bool,
    /// Where to write which pages the guest touches; it runs slower then.
    pub trace: Option<PathBuf>,
}

/// Waits for a sender and receives its guest into `guest`. The report is there even when the
/// migration fails; an error means that no sender came.
pub async fn receive(
    guest: Box<dyn DestinationGuest>,
    listener: &Listener,
    migration: &str,
    options: ReceiveOptions,
    mut signals: StopSignals,
    output: Arc<Output>,
) -> Result<Report, Failure> {
    let guest = Shared::new(guest);
    let begin = || {
        let place = guest.with(|guest| guest.whereabouts());
        let pages = guest.with(|guest| guest.memory().pages());
        let trace = super::begin_trace(options.trace.as_deref(), pages)?;
        let about = About::begin(migration, Side::Destination, place)?;
        Ok((Journal::create(&options.state_dir, &about)?, trace))
    };
    let (journal, trace) = match begin() {
        Ok(begun) => begun,
        Err(failure) => {
            guest.call(|guest| guest.discard()).await?;
            return Err(failure);
        }
    };
    signals.listen_at(&journal, &output);
    let accepted = tokio::select! {
        link = listener.accept(None) => link.map_err(|error| Failure::plain(error.to_string())),
        asked = signals.wait() => {
            asked.answer(Verdict::accepted());
            Err(Failure::plain("cancelled at the destination"))
        }
    };
    match accepted {
        Ok(link) => {
            output.link(LinkState::Up);
            let keep = Keep {
                session: SavedReceiver::of(listener, &link),
                strategy: Strategy::Hybrid,
                paused: options.paused,
                final_version: None,
            };
            let session = Session::new(guest, link, options, (journal, trace, keep), output);
            Ok(session.run(signals, listener).await)
        }
        Err(failure) => {
            guest.call(|guest| guest.discard()).await?;
            journal.remove();
            Err(failure)
        }
    }
}

/// What the threads and tasks of a session tell its loop.
enum Happened {
    Event(DestinationEvent),
    /// On the link of this number.
    Heard(u32, Heard<ToDestination>),
    /// Nothing works on the lost link of this number any more.
    Quiet(u32),
}

/// A source that has proved who it is must say Hello within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(60);

/// What is there once the guest's memory is registered.
struct Prepared {
    arrivals: Arc<Arrivals>,
    userfault: Arc<Userfault>,
    faults: Arc<FaultServer>,
}

/// What the destination keeps for a process that has to take over.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Keep {
    session: SavedReceiver,
    strategy: Strategy,
    /// The guest is to be left stopped.
    paused: bool,
    /// From the switchover on.
    final_version: Option<Version>,
}

struct Session {
    guest: Shared<dyn DestinationGuest>,
    pages_total: u64,
    links: Links,
    /// Who proves this is the source.
    key: SessionKey,
    /// The threads and the task of the lanes work on the link of this number.
    lanes_of: Option<u32>,
    machine: DestinationMachine,
    options: ReceiveOptions,
    output: Arc<Output>,
    timeline: Arc<Timeline>,
    counters: Arc<Counters>,
    prepared: Arc<Mutex<Option<Prepared>>>,
    ledger: Arc<Mutex<RoundLedger>>,
    /// Pages to be asked for, and the asking task's end of it.
    asked: AskSender,
    asking: Arc<tokio::sync::Mutex<AskReceiver>>,
    mapper: Option<Mapper>,
    device_state: Arc<Mutex<Option<Vec<u8>>>>,
    /// That of a rehearsal, kept for the flight.
    rehearsed: Arc<Mutex<Option<RehearsedState>>>,
    journal: Arc<Mutex<Journal>>,
    keep: Keep,
    trace: Arc<Mutex<Option<TraceFile>>>,
    happened: mpsc::UnboundedSender<Happened>,
    happenings: mpsc::UnboundedReceiver<Happened>,
    tasks: JoinSet<()>,
    strategy: Strategy,
    rounds: u16,
    downtime_us: Option<u64>,
    /// When the guest began to run here.
    runs_since: Option<Instant>,
    device_state_bytes: Arc<Mutex<u64>>,
    remaining_at_freeze: Arc<Mutex<u64>>,
    outcome: Option<DestinationOutcome>,
}

impl Session {
    fn new(
        guest: Shared<dyn DestinationGuest>,
        link: Link,
        options: ReceiveOptions,
        (journal, trace, keep): (Journal, Option<TraceFile>, Keep),
        output: Arc<Output>,
    ) -> Self {
        journal.keep(&keep);
        // By its shape: the memory of a guest that is settled is not mapped.
        let pages_total = guest.with(|guest| guest.shape().memory.pages());
        // Events come from a handful of tasks that each wait for their answer: the queue is short.
        let (happened, happenings) = mpsc::unbounded_channel();
        let (asked, asking) = ask_queue();
        Session {
            asked,
            asking: Arc::new(tokio::sync::Mutex::new(asking)),
            guest,
            pages_total,
            key: link.session_key(),
            links: Links::new(link, options.reconnect_for),
            lanes_of: None,
            machine: DestinationMachine::new(),
            options,
            output,
            timeline: Arc::new(Timeline::new()),
            counters: Arc::new(Counters::default()),
            prepared: Arc::default(),
            ledger: Arc::default(),
            mapper: None,
            device_state: Arc::default(),
            rehearsed: Arc::default(),
            journal: Arc::new(Mutex::new(journal)),
            trace: Arc::new(Mutex::new(trace)),
            keep,
            happened,
            happenings,
            tasks: JoinSet::new(),
            strategy: Strategy::Hybrid,
            rounds: 0,
            downtime_us: None,
            runs_since: None,
            device_state_bytes: Arc::default(),
            remaining_at_freeze: Arc::default(),
            outcome: None,
        }
    }

    async fn run(mut self, mut signals: StopSignals, listener: &Listener) -> Report {
        self.listen();
        let mut meter = ProgressMeter::new(self.pages_total);
        let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
        while self.outcome.is_none() {
            let give_up = self.links.deadline();
            tokio::select! {
                Some(happened) = self.happenings.recv() => self.take_in(happened).await,
                Ok(link) = listener.accept_resumed(&self.key, None) => self.found(link).await,
                Some(ended) = self.tasks.join_next() => {
                    if let Some(failure) = panic_of(ended) {
                        self.handle(DestinationEvent::Failed(failure)).await;
                    }
                }
                () = until(give_up) => self.give_up().await,
                asked = signals.wait() => {
                    let unheard = self.links.is_down() && self.machine.only_tells();
                    if unheard || self.machine.is_completing() {
                        // Who asks does not want to wait for the source.
                        self.give_up().await;
                    }
                    if self.machine.is_committed() {
                        let reason = "the guest is already decided to run here: finishing";
                        self.output.note(reason);
                        asked.answer(Verdict::refused(reason));
                    } else {
                        asked.answer(Verdict::accepted());
                    }
                    self.handle(DestinationEvent::Cancelled).await;
                }
                _ = ticks.tick() => {
                    if let Some(failure) = self.fault_failure().or_else(|| self.silence()) {
                        self.handle(DestinationEvent::Failed(failure)).await;
                    }
                    let progress = meter.read(&self.timeline, &self.counters, &self.links);
                    self.output.progress(Progress { faults: self.fault_figures(), ..progress });
                }
            }
        }
        self.finish().await
    }

    /// How the guest waits for its pages, once it runs here.
    fn fault_figures(&self) -> Option<FaultFigures> {
        self.runs_since?;
        let prepared = lock(&self.prepared);
        prepared.as_ref().map(|prepared| FaultFigures::of(&prepared.faults.stats()))
    }

    /// A source that says nothing on the link would keep the receiver waiting for ever.
    fn silence(&self) -> Option<Failure> {
        let is_silent = self.machine.phase() == MigrationPhase::Connect && self.machine.is_linked();
        (is_silent && self.links.in_use_for() > HELLO_WITHIN)
            .then(|| Failure::plain("the source has connected and does not begin"))
    }

    /// What keeps the fault reader from its work for good.
    fn fault_failure(&self) -> Option<Failure> {
        let prepared = lock(&self.prepared);
        let error = prepared.as_ref()?.faults.take_failure()?;
        matches!(error, MemoryError::ProcessGone | MemoryError::FaultReaderGone)
            .then(|| error.into())
    }

    /// Takes messages of the source.
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
            Happened::Heard(_, Heard::Message(message, _turn)) => {
                self.handle(match message {
                    Ok(message) => DestinationEvent::Message(message),
                    Err(error) => DestinationEvent::Failed(error.into()),
                })
                .await;
            }
            Happened::Heard(_, Heard::End(error)) => self.lose_link(error).await,
            Happened::Quiet(number) => {
                self.links.quiet(number);
                self.take_next_link().await;
            }
        }
    }

    /// The link is broken: waits for another one, where that helps.
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
            return self.handle(DestinationEvent::LinkLost(failure)).await;
        }
        self.output.link_down(&failure.reason, self.links.reconnect_for());
        self.handle(DestinationEvent::LinkDown).await;
    }

    /// The source has come back, perhaps before it was missed here.
    async fn found(&mut self, link: Link) {
        if self.links.reconnect_for().is_zero() {
            return;
        }
        if !self.links.is_down() {
            self.lose_link(LinkError::Closed).await;
        }
        self.links.offer(link);
        self.take_next_link().await;
    }

    async fn take_next_link(&mut self) {
        if self.machine.wants_link() && self.links.take_next() {
            self.listen();
            self.start_lanes();
            self.handle(DestinationEvent::LinkUp).await;
        }
    }

    /// The outage has lasted too long.
    async fn give_up(&mut self) {
        let failure = Failure::plain(self.links.give_up());
        self.handle(DestinationEvent::LinkLost(failure)).await;
    }

    async fn handle(&mut self, event: DestinationEvent) {
        match &event {
            DestinationEvent::Message(ToDestination::Bye { downtime_us }) => {
                self.downtime_us = *downtime_us;
            }
            DestinationEvent::Message(ToDestination::RoundEnd { round, .. }) => {
                self.rounds = round.0;
            }
            DestinationEvent::Prepared => self.start_lanes(),
            DestinationEvent::Running => self.runs_since = Some(Instant::now()),
            _ => {}
        }
        self.machine.handle(event);
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

    fn fail(&self, failure: Failure) {
        let _ = self.happened.send(Happened::Event(DestinationEvent::Failed(failure)));
    }
}
