//! The host that the guest goes to.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::arrivals::Arrivals;
use super::control::Verdict;
use super::journal::{About, Journal, Side};
use super::links::{Links, OnLink, until, until_quiet};
use super::rounds::ms;
use super::{
    Noted, PROGRESS_INTERVAL, ProgressMeter, RoundLedger, Shared, StopSignals, Timeline, blocking,
};
use crate::engine::destination::*;
use crate::engine::{Failure, MigrationPhase};
use crate::guest::{DestinationGuest, Shape};
use crate::memory::adopt::HugePages;
use crate::memory::{
    FaultOptions, FaultServer, Mapper, MemoryError, PageTable, Touched, Userfault,
};
use crate::page::{PageIndex, Version};
use crate::report::{
    Counters, FaultFigures, FaultLatency, LinkState, MigrationResult, Output, Report, Role,
    TRACE_LIMIT, TraceFile, TraceRecord,
};
use crate::transport::{Lane, Link, LinkError, Listener, SavedReceiver, SessionKey};
use crate::wire::DecodeScratch;
use crate::wire::message::{
    DestinationStage, FaultRequest, Flight, Lacking, MAX_REQUEST_PAGES, MessageError, PackedSet,
    Strategy, ToDestination, ToSource, Wanted, decode, encode,
};
use crate::wire::state::{PackedState, RehearsedState};

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
    output: Arc<Output>,
) -> Result<Report, Failure> {
    let mut signals = StopSignals::listen()?;
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

/// A refusal gets so long to reach the source before the link is closed.
const REFUSAL_GRACE: Duration = Duration::from_secs(5);

/// What the threads and tasks of a session tell its loop.
enum Happened {
    Event(DestinationEvent),
    /// On the link of this number. The next one is only taken when this one was dealt with.
    Heard(u32, Result<ToDestination, MessageError>, OwnedSemaphorePermit),
    /// The link of this number is broken.
    LinkEnded(u32, LinkError),
    /// Nothing works on the lost link of this number any more.
    Quiet(u32),
}

/// A source that has proved who it is must say Hello within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(60);

/// A fault lane's request as it leaves the fault reader, and whether the page must come whole.
type Asked = (Wanted, bool);

/// What is there once the guest's memory is registered.
struct Prepared {
    arrivals: Arc<Arrivals>,
    userfault: Arc<Userfault>,
    faults: Arc<FaultServer>,
}

/// The table of page states, where another process finds it when this one is killed, unless the guest
/// ends with this process.
fn make_table(path: &Path, pages: u64, outlives: bool) -> Result<PageTable, MemoryError> {
    if !outlives {
        return PageTable::anonymous(pages);
    }
    PageTable::create(path, pages).or_else(|error| {
        tracing::warn!(%error, "no other process could take over");
        PageTable::anonymous(pages)
    })
}

/// Serves the guest's faults from here on; pages that must come are put into `asked`.
fn serve(
    arrivals: Arrivals,
    userfault: Arc<Userfault>,
    table: Arc<PageTable>,
    options: FaultOptions,
    asked: mpsc::UnboundedSender<Asked>,
) -> Result<Prepared, Failure> {
    let ask = move |page: PageIndex, thread: u32| {
        let _ = asked.send((Wanted { page, thread }, false));
    };
    let faults = FaultServer::start(userfault.clone(), table, options, ask)?;
    let (arrivals, faults) = (Arc::new(arrivals), Arc::new(faults));
    arrivals.serve_with(faults.clone());
    Ok(Prepared { arrivals, userfault, faults })
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
    /// Pages to be asked for, and the asking task's end of it. Bounded by the guest: a page is asked for
    /// once, and once more after an outage.
    asked: mpsc::UnboundedSender<Asked>,
    asking: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Asked>>>,
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
        let pages_total = guest.with(|guest| guest.memory().pages());
        // Events come from a handful of tasks that each wait for their answer: the queue is short.
        let (happened, happenings) = mpsc::unbounded_channel();
        let (asked, asking) = mpsc::unbounded_channel();
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
                () = until(give_up) => self.give_up().await,
                asked = signals.wait() => {
                    if self.links.is_down() && self.machine.phase() == MigrationPhase::Done {
                        // Only the source is to be told, and nobody wants to wait for it.
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
                    self.output.progress(progress);
                }
            }
        }
        self.finish().await
    }

    /// A source that says nothing would keep the receiver waiting for ever.
    fn silence(&self) -> Option<Failure> {
        let is_silent = self.machine.phase() == MigrationPhase::Connect && self.machine.is_linked();
        (is_silent && self.timeline.elapsed() > HELLO_WITHIN)
            .then(|| Failure::plain("the source has connected and does not begin"))
    }

    /// What keeps the fault reader from its work for good.
    fn fault_failure(&self) -> Option<Failure> {
        let prepared = self.prepared.lock().expect("no holder panics");
        let error = prepared.as_ref()?.faults.take_failure()?;
        matches!(error, MemoryError::ProcessGone).then(|| error.into())
    }

    /// Takes messages of the source.
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
                if self.links.is_current(number) {
                    self.handle(match message {
                        Ok(message) => DestinationEvent::Message(message),
                        Err(error) => DestinationEvent::Failed(error.into()),
                    })
                    .await;
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

    async fn send(&mut self, mut message: ToSource) {
        if let ToSource::Resync { running_us, .. } = &mut message {
            *running_us = self.runs_since.map(|since| since.elapsed().as_micros() as u64);
        }
        let Some(on_link) = self.links.on_link() else { return };
        let mut sent = on_link.link.control_send(encode(&message).into()).await;
        let refused = matches!(
            message,
            ToSource::Refused { .. }
                | ToSource::Resync { at: DestinationStage::Refused { .. }, .. }
        );
        if sent.is_ok() && refused {
            // The guest is discarded next, and the link closed: let it arrive first, or else try again.
            let idle_ms = REFUSAL_GRACE.as_millis() as u64;
            sent = tokio::time::timeout(REFUSAL_GRACE, on_link.link.finish())
                .await
                .unwrap_or(Err(LinkError::TimedOut { idle_ms }));
        }
        if let Err(error) = sent {
            let _ = self.happened.send(Happened::LinkEnded(on_link.number, error));
        }
    }

    fn fail(&self, failure: Failure) {
        let _ = self.happened.send(Happened::Event(DestinationEvent::Failed(failure)));
    }

    async fn act(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Send(message) => self.send(message).await,
            DestinationAction::Prepare { shape, strategy, runs } => {
                self.strategy = strategy;
                self.options.paused |= !runs;
                self.prepare(*shape);
            }
            DestinationAction::AwaitRound { round, messages } => {
                let noted = self.ledger.lock().expect("no holder panics").expect(round, messages);
                if let Err(failure) = tell_round(noted, &self.happened, &self.asked) {
                    self.fail(failure);
                }
            }
            DestinationAction::CollectPages { outage, of } => self.collect_pages(outage, of),
            DestinationAction::KeepRehearsal(state) => self.keep_rehearsal(state).await,
            DestinationAction::AwaitFlight(version) => self.await_flight(version),
            DestinationAction::LoadDeviceState => {
                let (guest, state) = (self.guest.clone(), self.device_state.clone());
                let timeline = self.timeline.clone();
                self.spawn_step(async move {
                    let state = state.lock().expect("no holder panics").take().unwrap_or_default();
                    let begin = Instant::now();
                    guest.call(move |guest| guest.load_device_state(&state)).await?;
                    timeline.part("offer.load", begin.elapsed());
                    Ok(DestinationEvent::Loaded)
                });
            }
            DestinationAction::Journal(record) => {
                let journal = self.journal.clone();
                self.spawn_step(async move {
                    let write = move || {
                        let mut journal = journal.lock().expect("no holder panics");
                        Ok(match journal.record(&record) {
                            Ok(()) => DestinationEvent::Journaled(record),
                            Err(failure) if journal.is_sound() => {
                                DestinationEvent::JournalFailed(record, failure)
                            }
                            Err(failure) => DestinationEvent::JournalUnknown(record, failure),
                        })
                    };
                    let unknown = |failure| DestinationEvent::JournalUnknown(record, failure);
                    Ok(blocking(write).await.unwrap_or_else(unknown))
                });
            }
            DestinationAction::RunGuest => self.run_guest(),
            DestinationAction::ReleaseGuest => {
                let (guest, prepared) = (self.guest.clone(), self.prepared.clone());
                let mapper = self.mapper.take();
                self.spawn_farewell(async move {
                    blocking(move || {
                        drop(mapper);
                        if let Some(prepared) = &*prepared.lock().expect("no holder panics") {
                            prepared.userfault.release()?;
                        }
                        Ok(())
                    })
                    .await?;
                    guest.call(|guest| guest.release()).await
                });
            }
            DestinationAction::DiscardGuest => {
                let (guest, prepared) = (self.guest.clone(), self.prepared.clone());
                self.spawn_farewell(async move {
                    // A monitor that waits for a page while it loads would neither return nor end. It
                    // goes on with wrong content, which does no harm: it never runs.
                    blocking(move || {
                        if let Some(prepared) = &*prepared.lock().expect("no holder panics") {
                            prepared.userfault.release()?;
                        }
                        Ok(())
                    })
                    .await?;
                    guest.call(|guest| guest.discard()).await
                });
            }
            DestinationAction::End(outcome) => self.outcome = Some(outcome),
        }
    }

    /// A step that lets go of the guest, whose failure changes nothing.
    fn spawn_farewell(&mut self, step: impl Future<Output = Result<(), Failure>> + Send + 'static) {
        self.spawn_step(async move {
            Ok(match step.await {
                Ok(()) => DestinationEvent::Released,
                Err(failure) => {
                    tracing::warn!("letting go of the guest: {failure}");
                    DestinationEvent::LetGoFailed
                }
            })
        });
    }

    fn spawn_step(
        &mut self,
        step: impl Future<Output = Result<DestinationEvent, Failure>> + Send + 'static,
    ) {
        let happened = self.happened.clone();
        self.tasks.spawn(async move {
            let event = step.await.unwrap_or_else(DestinationEvent::Failed);
            let _ = happened.send(Happened::Event(event));
        });
    }

    /// Starts to work on the lanes of the current link, once the guest's memory is registered.
    fn start_lanes(&mut self) {
        let Some(on_link) = self.links.on_link() else { return };
        let arrivals = match &*self.prepared.lock().expect("no holder panics") {
            Some(prepared) => prepared.arrivals.clone(),
            None => return,
        };
        if self.lanes_of.replace(on_link.number) == Some(on_link.number) {
            return;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let bulk = std::iter::repeat_n(Lane::Push, cores.min(MAX_BULK_APPLIERS));
        for lane in bulk.chain([Lane::FaultReply, Lane::Bundle]) {
            let applier = Applier {
                lane,
                on_link: on_link.clone(),
                arrivals: arrivals.clone(),
                ledger: self.ledger.clone(),
                asked: self.asked.clone(),
                happened: self.happened.clone(),
            };
            if let Err(failure) = applier.start(Handle::current()) {
                self.fail(failure);
            }
        }
        self.tasks.spawn(ask(on_link, self.asking.clone(), self.counters.clone()));
    }

    /// Compares shapes, registers the guest's memory, and serves its faults.
    fn prepare(&mut self, source: Shape) {
        let (guest, counters) = (self.guest.clone(), self.counters.clone());
        let (prepared, asked) = (self.prepared.clone(), self.asked.clone());
        let watched = self.options.page_table.clone();
        let pages_path = self.journal.lock().expect("no holder panics").pages_path();
        let touches_kept = if self.options.trace.is_some() { TRACE_LIMIT } else { 0 };
        let fault_options = FaultOptions { touches_kept, ..FaultOptions::default() };
        self.spawn_step(async move {
            blocking(move || {
                let differences = source.differences(&guest.with(|guest| guest.shape().clone()));
                if !differences.is_empty() {
                    return Err(Failure::new(
                        format!("the two guests are not of one shape: {}", differences.join("; ")),
                        "start the destination with the command line of the source",
                    ));
                }
                let memory = guest.with(|guest| guest.memory());
                let userfault = Arc::new(guest.with(|guest| guest.userfault())?);
                let outlives = guest.with(|guest| guest.whereabouts().process.is_some());
                let table = Arc::new(make_table(&pages_path, memory.pages(), outlives)?);
                let _ = watched.set(table.clone());
                let arrivals = Arrivals::new(memory, table.clone(), counters);
                let ready = serve(arrivals, userfault, table, fault_options, asked.clone())?;
                *prepared.lock().expect("no holder panics") = Some(ready);
                Ok(DestinationEvent::Prepared)
            })
            .await
        });
    }

    /// Looks up what the source must know of pages after an outage, when nothing is being applied.
    fn collect_pages(&mut self, outage: u32, of: PagesOf) {
        let (prepared, ledger) = (self.prepared.clone(), self.ledger.clone());
        let asked = self.asked.clone();
        self.spawn_step(async move {
            blocking(move || {
                let prepared = prepared.lock().expect("no holder panics");
                let table = prepared.as_ref().expect("prepared before pages").arrivals.table();
                let pages = match of {
                    PagesOf::Round(round) => {
                        if !ledger.lock().expect("no holder panics").end(round, outage) {
                            return Err(Failure::plain("the source names a round out of turn"));
                        }
                        PagesHere::Held(PackedSet::pack(&table.stale_at(round)))
                    }
                    PagesOf::Remainder => {
                        let missing = table.incomplete();
                        // What was asked for may be lost with the link.
                        let mut waiting = table.waiting_pages();
                        waiting.intersect_with(&missing);
                        for page in waiting.iter() {
                            let _ = asked.send((Wanted { page, thread: 0 }, false));
                        }
                        PagesHere::Lacking(Lacking {
                            missing: PackedSet::pack(&missing),
                            without_base: PackedSet::pack(&table.absent()),
                        })
                    }
                };
                Ok(DestinationEvent::PagesCollected { outage, pages })
            })
            .await
        });
    }

    /// Before anything else is taken in, so that the answer stands before that to the round.
    async fn keep_rehearsal(&mut self, state: PackedState) {
        let kept = blocking(move || Ok(RehearsedState::new(state.unpack(None)?))).await;
        match kept {
            Ok(state) => {
                let answer = ToSource::Rehearsed { check: state.check() };
                *self.rehearsed.lock().expect("no holder panics") = Some(state);
                self.send(answer).await;
            }
            Err(failure) => self.fail(failure),
        }
    }

    fn await_flight(&mut self, offered: Version) {
        let Some(on_link) = self.links.on_link() else { return };
        let prepared = self.prepared.clone();
        let (device_state, happened) = (self.device_state.clone(), self.happened.clone());
        let (state_bytes, remaining) =
            (self.device_state_bytes.clone(), self.remaining_at_freeze.clone());
        let (pages, timeline) = (self.pages_total, self.timeline.clone());
        let (ledger, asked) = (self.ledger.clone(), self.asked.clone());
        let journal = self.journal.clone();
        let (strategy, paused) = (self.strategy, self.options.paused);
        self.keep = Keep { strategy, paused, final_version: Some(offered), ..self.keep.clone() };
        let keep = self.keep.clone();
        let (trace, steps) = (self.trace.clone(), self.happened.clone());
        let rehearsed = self.rehearsed.clone();
        self.tasks.spawn(async move {
            let bytes = match on_link.link.recv(Lane::State).await {
                Ok(bytes) => bytes,
                // It is offered again on the next link.
                Err(error) => {
                    let _ = steps.send(Happened::LinkEnded(on_link.number, error));
                    return;
                }
            };
            let event = blocking(move || {
                let begin = Instant::now();
                let flight: Flight = decode(&bytes)?;
                if flight.final_version != offered {
                    return Err(Failure::plain("the flight is not the one that was offered"));
                }
                if !ledger.lock().expect("no holder panics").may_close_at(offered) {
                    return Err(Failure::plain("the source offers the guest out of turn"));
                }
                let (need, zero) = (flight.need.unpack(pages)?, flight.zero.unpack(pages)?);
                let rehearsed = rehearsed.lock().expect("no holder panics");
                let state = flight.device_state.unpack(rehearsed.as_ref())?;
                *device_state.lock().expect("no holder panics") = Some(state);
                *state_bytes.lock().expect("no holder panics") =
                    flight.device_state.coded_bytes() as u64;
                *remaining.lock().expect("no holder panics") = need.len();
                let prepared = prepared.lock().expect("no holder panics");
                let arrivals = &prepared.as_ref().expect("prepared before the offer").arrivals;
                let missing = arrivals.switch_over(offered, &need, &zero)?;
                if let Some(trace) = &mut *trace.lock().expect("no holder panics") {
                    trace.missing(&need);
                }
                for page in ledger.lock().expect("no holder panics").close() {
                    let _ = asked.send(again(page));
                }
                journal.lock().expect("no holder panics").keep(&keep);
                timeline.part("offer.switch_over", begin.elapsed());
                if missing == 0 {
                    let _ = happened.send(Happened::Event(DestinationEvent::PagesComplete));
                }
                Ok(DestinationEvent::FlightArrived)
            })
            .await;
            let event = event.unwrap_or_else(DestinationEvent::Failed);
            let _ = steps.send(Happened::Event(event));
        });
    }

    fn run_guest(&mut self) {
        let prepared = self.prepared.clone();
        // A page that is mapped beforehand would not be seen to be touched.
        if let Some(Prepared { faults, .. }) = &*prepared.lock().expect("no holder panics")
            && self.options.trace.is_none()
        {
            match Mapper::start(faults) {
                Ok(mapper) => self.mapper = Some(mapper),
                // The guest then faults for each page, slower but as right.
                Err(error) => tracing::warn!("pages are not mapped in the background: {error}"),
            }
        }
        let (guest, paused) = (self.guest.clone(), self.options.paused);
        let timeline = self.timeline.clone();
        self.spawn_step(async move {
            let begin = Instant::now();
            if !paused {
                guest.call(|guest| guest.run()).await?;
            }
            timeline.part("commit.run", begin.elapsed());
            Ok(DestinationEvent::Running)
        });
    }

    fn finish_trace(&self) {
        let Some(mut trace) = self.trace.lock().expect("no holder panics").take() else { return };
        if let Some(prepared) = &*self.prepared.lock().expect("no holder panics") {
            let (touches, cut) = prepared.faults.take_touches();
            let record = |touch: Touched| TraceRecord::Touch {
                at_us: touch.at.as_micros() as u64,
                waited_us: touch.waited.as_micros() as u64,
                thread: touch.thread,
                page: touch.page,
            };
            trace.touches(touches.into_iter().map(record), cut);
        }
        super::finish_trace(trace, &self.output);
    }

    /// The guest has all its pages, and runs: what is left is its comfort.
    async fn gather(&self) -> Option<HugePages> {
        let begin = Instant::now();
        let gathered = self.guest.call(|guest| guest.gather_huge_pages()).await;
        self.timeline.part("gather", begin.elapsed());
        gathered.unwrap_or_else(|failure| {
            self.output.note(&format!("the guest keeps its small pages: {failure}"));
            None
        })
    }

    async fn finish(mut self) -> Report {
        let outcome = self.outcome.take().expect("the loop ends with an outcome");
        self.timeline.enter(MigrationPhase::Done, &self.output);
        let total_ms = ms(self.timeline.elapsed());
        let stats = self.links.stats();
        let failure = match &outcome {
            DestinationOutcome::Migrated => None,
            DestinationOutcome::Refused(failure)
            | DestinationOutcome::InDoubt(failure)
            | DestinationOutcome::LostPages(failure) => Some(failure.clone()),
        };
        let goodbye = failure.as_ref().map_or("done", |failure| failure.reason.as_str());
        self.links.link().close(u32::from(failure.is_some()), goodbye).await;
        self.tasks.shutdown().await;
        if let Some(failure) = &failure {
            self.output.error(failure);
        }
        let path = self.journal.lock().expect("no holder panics").path().to_owned();
        match &outcome {
            DestinationOutcome::Migrated | DestinationOutcome::Refused(_) => {
                self.journal.lock().expect("no holder panics").remove();
            }
            _ => {
                self.output.note(&format!(
                    "what is known of this side is in {}; `farfault status` says what to type",
                    path.display()
                ));
                // The guest stays as it is: loaded, or running with some threads that wait. Its
                // memory stays registered, so that they do not go on with wrong bytes.
                if let Err(error) = self.guest.call(|guest| guest.leave()).await {
                    tracing::warn!("letting go of the guest: {error}");
                }
            }
        }
        let huge_pages = match &outcome {
            DestinationOutcome::Migrated if self.options.huge_pages => self.gather().await,
            _ => None,
        };
        self.finish_trace();
        self.counters.note_own_memory();
        let codecs = self.counters.codecs();
        let prepared = self.prepared.lock().expect("no holder panics");
        let faults = prepared.as_ref().map(|prepared| prepared.faults.stats());
        Report {
            role: Role::Destination,
            result: match outcome {
                DestinationOutcome::Migrated => MigrationResult::Migrated,
                DestinationOutcome::Refused(_) => MigrationResult::Refused,
                DestinationOutcome::InDoubt(_) => MigrationResult::InDoubt,
                DestinationOutcome::LostPages(_) => MigrationResult::LostPages,
            },
            strategy: self.strategy,
            total_ms,
            downtime_ms: self.downtime_us.map(|us| ms(Duration::from_micros(us))),
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
            precopy_rounds: self.rounds,
            remaining_pages_at_freeze: *self.remaining_at_freeze.lock().expect("no panics"),
            device_state_bytes: *self.device_state_bytes.lock().expect("no holder panics"),
            rehearsal_ms: None,
            huge_pages,
            remote_faults: faults.as_ref().map_or(0, |faults| faults.remote_faults),
            local_faults: faults.as_ref().map_or(0, |faults| faults.local_faults),
            duplicate_pages: self.counters.duplicate_pages.load(Ordering::Relaxed),
            fault_latency_us: faults
                .as_ref()
                .map(|faults| FaultLatency::of(&faults.remote_latency_us)),
            faults: faults.as_ref().map(FaultFigures::of),
            push: None,
            account: None,
            round_trip_ms: stats.min_rtt_us as f64 / 1e3,
            reconnects: self.links.reconnects(),
            peak_rss_bytes: self.counters.peak_rss_bytes.load(Ordering::Relaxed),
            tracker: None,
            phases_ms: self.timeline.parts_ms(),
        }
    }
}

/// Threads that apply bulk, at most: one takes up what some Gbit/s bring.
const MAX_BULK_APPLIERS: usize = 8;

/// A thread that applies what comes on one lane. Messages of bulk come in any order, so several threads may
/// work on them.
struct Applier {
    lane: Lane,
    on_link: OnLink,
    arrivals: Arc<Arrivals>,
    ledger: Arc<Mutex<RoundLedger>>,
    asked: mpsc::UnboundedSender<Asked>,
    happened: mpsc::UnboundedSender<Happened>,
}

impl Applier {
    fn start(self, handle: Handle) -> Result<(), Failure> {
        let thread = std::thread::Builder::new().name(format!("apply-{:?}", self.lane));
        thread
            .spawn(move || {
                let mut scratch = DecodeScratch::default();
                // The link's end is told by the control lane.
                while let Ok(message) = handle.block_on(self.on_link.link.recv(self.lane)) {
                    if let Err(failure) = self.apply(message, &mut scratch) {
                        let event = DestinationEvent::Failed(failure);
                        let _ = self.happened.send(Happened::Event(event));
                        return;
                    }
                }
            })
            .map(drop)
            .map_err(|error| Failure::plain(format!("no thread could be started: {error}")))
    }

    fn apply(&self, message: Bytes, scratch: &mut DecodeScratch) -> Result<(), Failure> {
        let was_complete = self.arrivals.is_complete();
        let applied = self.arrivals.apply(&message, scratch)?;
        let mut ledger = self.ledger.lock().expect("no holder panics");
        let noted = ledger.note(applied.version, applied.rejected);
        drop(ledger);
        tell_round(noted, &self.happened, &self.asked)?;
        if !was_complete && self.arrivals.is_complete() {
            let _ = self.happened.send(Happened::Event(DestinationEvent::PagesComplete));
        }
        Ok(())
    }
}

fn tell_round(
    noted: Noted,
    happened: &mpsc::UnboundedSender<Happened>,
    asked: &mpsc::UnboundedSender<Asked>,
) -> Result<(), Failure> {
    match noted {
        Noted::Waiting => {}
        Noted::RoundDone(round, rejected) => {
            let event = DestinationEvent::RoundApplied { round, rejected };
            let _ = happened.send(Happened::Event(event));
        }
        Noted::AskAgain(pages) => {
            for page in pages {
                let _ = asked.send(again(page));
            }
        }
        Noted::OutOfTurn => {
            return Err(Failure::plain("the source sent pages or ended a round out of turn"));
        }
        Noted::Spoilt(pages) => {
            return Err(Failure::plain(format!(
                "{pages} pages came spoilt, or without their base"
            )));
        }
    }
    Ok(())
}

/// A page that came spoilt.
fn again(page: PageIndex) -> Asked {
    (Wanted { page, thread: 0 }, true)
}

/// A request goes a second time after so long, in a packet of its own. On a lossy link one of a hundred would
/// else take twice the round trip and more: nothing behind it on its way tells that it was lost.
const REPEAT_AFTER: Duration = Duration::from_millis(2);

/// Sends fault requests, those that have gathered while the last was sent together, until the link ends.
async fn ask(
    on_link: OnLink,
    asking: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Asked>>>,
    counters: Arc<Counters>,
) {
    let link = &on_link.link;
    let (mut asking, mut gathered) = (asking.lock().await, Vec::new());
    // As many as are asked for within some milliseconds.
    let mut repeats: VecDeque<(tokio::time::Instant, Bytes)> = VecDeque::new();
    loop {
        let repeat_at = repeats.front().map(|(due, _)| *due);
        let repeat = async {
            match repeat_at {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            count = asking.recv_many(&mut gathered, MAX_REQUEST_PAGES) => {
                if count == 0 {
                    return;
                }
            }
            () = repeat => {
                if let Some((_, request)) = repeats.pop_front()
                    && link.send(Lane::FaultRequest, request).await.is_err()
                {
                    return;
                }
                continue;
            }
            _ = link.ended() => return,
        }
        counters.remote_faults.fetch_add(gathered.len() as u64, Ordering::Relaxed);
        for whole in [false, true] {
            let pages: Vec<Wanted> =
                gathered.iter().filter(|asked| asked.1 == whole).map(|asked| asked.0).collect();
            if pages.is_empty() {
                continue;
            }
            let request = Bytes::from(encode(&FaultRequest { pages, whole }));
            // The link's end is told by the control lane.
            if link.send(Lane::FaultRequest, request.clone()).await.is_err() {
                return;
            }
            if !whole {
                repeats.push_back((tokio::time::Instant::now() + REPEAT_AFTER, request));
            }
        }
        gathered.clear();
    }
}
