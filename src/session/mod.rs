//! One migration, driven: the engine's decisions carried out against a guest, its memory, a link and
//! the disk.
//!
//! * [`source`] and [`destination`] face each other: each runs its engine's machine on the events of
//!   the link, of its own threads and of the operator.
//! * `rounds` and `frozen` are the source's pages before and after the guest was stopped, `reader`
//!   copies and encodes them, `answers` is the source's end of the fault lane; `arrivals` are the
//!   destination's.
//! * `links`: a migration outlives its link; this is what both sides do when one is lost.
//! * `standstill` stops the guest for a moment in pre-copy;
//!   `rehearsal` takes the device state once in pre-copy, so that little of it crosses at the switchover.
//! * [`journal`] is what a side must not forget, [`control`] how others ask it and tell it to end,
//!   [`resolve`] what a person may decide by what it says.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use self::control::{CancelRequest, Control, Verdict};
use self::journal::Journal;

use crate::engine::{Failure, MigrationPhase};
use crate::guest::GuestError;
use crate::memory::MemoryError;
use crate::page::{PageIndex, Version};
use crate::report::{Counters, Output, PhaseTimes, Progress, TraceFile};
use crate::transport::LinkError;
use crate::wire::message::MAX_REJECTED_PAGES;

use links::Links;

mod answers;
mod arrivals;
pub mod control;
mod desk;
pub mod destination;
mod frozen;
pub mod journal;
mod links;
mod pace;
mod reader;
mod rehearsal;
mod remembering;
pub mod resolve;
mod rounds;
pub mod share;
pub mod source;
mod standstill;

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        Failure { reason: error.message, hint: error.hint }
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        Failure { hint: error.hint(), reason: error.to_string() }
    }
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        Failure::plain(error.to_string())
    }
}

impl From<crate::wire::message::MessageError> for Failure {
    fn from(error: crate::wire::message::MessageError) -> Self {
        Failure::plain(error.to_string())
    }
}

/// A guest shared between the session and the threads on which its blocking methods run.
struct Shared<G: ?Sized>(Arc<Mutex<Box<G>>>);

impl<G: ?Sized> Clone for Shared<G> {
    fn clone(&self) -> Self {
        Shared(self.0.clone())
    }
}

impl<G: ?Sized + Send + 'static> Shared<G> {
    fn new(guest: Box<G>) -> Self {
        Shared(Arc::new(Mutex::new(guest)))
    }

    /// Calls `f` here; blocks.
    fn with<T>(&self, f: impl FnOnce(&mut G) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// Calls `f` on a thread where it may block.
    async fn call<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut G) -> Result<T, GuestError> + Send + 'static,
    ) -> Result<T, Failure> {
        let guest = self.clone();
        blocking(move || guest.with(f).map_err(Failure::from)).await
    }
}

/// Runs `f` on a thread where it may block; its panic becomes a failure of the migration.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(f).await {
        Ok(result) => result,
        Err(error) => Err(Failure::plain(format!("a thread of farfault failed: {error}"))),
    }
}

/// When each phase began and how long single steps took.
#[derive(Debug)]
struct Timeline {
    begin: Instant,
    phase: Mutex<(MigrationPhase, Instant)>,
    parts_ms: Mutex<PhaseTimes>,
}

impl Timeline {
    fn new() -> Self {
        let now = Instant::now();
        Timeline {
            begin: now,
            phase: Mutex::new((MigrationPhase::Connect, now)),
            parts_ms: Mutex::default(),
        }
    }

    fn elapsed(&self) -> Duration {
        self.begin.elapsed()
    }

    fn enter(&self, phase: MigrationPhase, output: &Output) {
        let mut current = self.phase.lock().expect("no holder panics");
        if current.0 != phase {
            let (last, since) = std::mem::replace(&mut *current, (phase, Instant::now()));
            self.part(last.name(), since.elapsed());
            output.phase(phase);
        }
    }

    fn part(&self, name: &'static str, duration: Duration) {
        self.parts_ms.lock().expect("no holder panics").add(name, rounds::ms(duration));
    }

    fn parts_ms(&self) -> PhaseTimes {
        self.parts_ms.lock().expect("no holder panics").clone()
    }
}

/// Makes the file for a trace, where one is asked for.
fn begin_trace(path: Option<&Path>, pages: u64) -> Result<Option<TraceFile>, Failure> {
    let create = |path: &Path| {
        TraceFile::create(path, pages).map_err(|error| {
            let reason = format!("the trace {} cannot be made: {error}", path.display());
            Failure::new(reason, "choose another file with --trace")
        })
    };
    path.map(create).transpose()
}

/// Writes a trace down. That it cannot be written is no failure of the migration.
fn finish_trace(trace: TraceFile, output: &Output) {
    let path = trace.path().to_owned();
    if let Err(error) = trace.finish() {
        output.note(&format!("the trace {} could not be written: {error}", path.display()));
    }
}

/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Makes progress lines from counters.
struct ProgressMeter {
    pages_total: u64,
    last: (Instant, u64),
}

impl ProgressMeter {
    fn new(pages_total: u64) -> Self {
        ProgressMeter { pages_total, last: (Instant::now(), 0) }
    }

    fn read(&mut self, timeline: &Timeline, counters: &Counters, links: &Links) -> Progress {
        use std::sync::atomic::Ordering::Relaxed;
        let stats = links.stats();
        counters.note_own_memory();
        let wire_bytes = stats.sent_bytes + stats.received_bytes;
        let seconds = self.last.0.elapsed().as_secs_f64().max(1e-3);
        let rate = wire_bytes.saturating_sub(self.last.1) as f64 / seconds;
        self.last = (Instant::now(), wire_bytes);
        Progress {
            elapsed_ms: timeline.elapsed().as_millis() as u64,
            pages: counters.pages.load(Relaxed),
            pages_total: self.pages_total,
            remaining_pages: counters.remaining_pages.load(Relaxed),
            wire_sent_bytes: stats.sent_bytes,
            wire_received_bytes: stats.received_bytes,
            rate_bytes_per_s: rate as u64,
            remote_faults: counters.remote_faults.load(Relaxed),
            faults: None,
            push: None,
        }
    }
}

/// The operator's wish to end: Ctrl-C, SIGTERM, a terminal that is closed, or `farfault cancel`.
struct StopSignals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    cancels: mpsc::Receiver<CancelRequest>,
    cancel: mpsc::Sender<CancelRequest>,
    control: Option<Control>,
}

/// Somebody wants the migration to end.
#[must_use]
struct StopRequest(Option<CancelRequest>);

impl StopRequest {
    /// Tells who asked by `farfault cancel` what becomes of it.
    fn answer(self, verdict: Verdict) {
        if let Some(asked) = self.0 {
            // It may have gone away.
            let _ = asked.send(verdict);
        }
    }
}

impl StopSignals {
    fn listen() -> Result<Self, Failure> {
        let open = |kind| {
            signal(kind).map_err(|e| Failure::plain(format!("signals cannot be received: {e}")))
        };
        let (cancel, cancels) = mpsc::channel(1);
        Ok(StopSignals {
            interrupt: open(SignalKind::interrupt())?,
            terminate: open(SignalKind::terminate())?,
            hangup: open(SignalKind::hangup())?,
            cancels,
            cancel,
            control: None,
        })
    }

    /// From here on `farfault status` and `farfault cancel` are answered too.
    fn listen_at(&mut self, journal: &Journal, output: &Arc<Output>) {
        let directory = journal.directory();
        match Control::serve(directory, output.clone(), self.cancel.clone()) {
            Ok(control) => self.control = Some(control),
            // A migration does not need it.
            Err(error) => tracing::warn!("no control socket in {}: {error}", directory.display()),
        }
    }

    async fn wait(&mut self) -> StopRequest {
        let asked = tokio::select! {
            _ = self.interrupt.recv() => None,
            _ = self.terminate.recv() => None,
            _ = self.hangup.recv() => None,
            asked = self.cancels.recv() => asked,
        };
        StopRequest(asked)
    }
}

/// Most pages that are asked for again after pre-copy. A source that sends more of them spoilt is
/// broken or hostile, and must not fill the queue of requests.
const MAX_ASKED_AGAIN: usize = 1 << 20;

/// Counts the messages of pre-copy rounds at the destination: a round is done when as many have been
/// applied as the source says there are, in whatever order.
#[derive(Debug, Default)]
struct RoundLedger {
    acknowledged: Version,
    applied: u64,
    rejected: Vec<PageIndex>,
    awaited: Option<u64>,
    closed: bool,
    /// Pages asked for again since pre-copy is over.
    asked_again: usize,
    /// The last in which a round was ended.
    outage: u32,
}

/// What follows from a message.
#[derive(Debug, PartialEq, Eq)]
enum Noted {
    /// Nothing yet.
    Waiting,
    /// The round is done but for these pages.
    RoundDone(Version, Vec<PageIndex>),
    /// Pre-copy is over: these pages must be asked for again.
    AskAgain(Vec<PageIndex>),
    /// A message of a round that is over or has not begun.
    OutOfTurn,
    /// So many pages could not be applied that something must be broken, or hostile.
    Spoilt(usize),
}

impl RoundLedger {
    /// The round whose messages may come now; none after the last that there can be.
    fn current(&self) -> Option<Version> {
        self.acknowledged.next()
    }

    /// A message was applied, except for its rejected pages.
    fn note(&mut self, version: Version, rejected: Vec<PageIndex>) -> Noted {
        if self.closed {
            self.asked_again += rejected.len();
            if self.asked_again > MAX_ASKED_AGAIN {
                return Noted::Spoilt(self.asked_again);
            }
            return Noted::AskAgain(rejected);
        }
        if Some(version) != self.current() {
            return Noted::OutOfTurn;
        }
        self.applied += 1;
        self.rejected.extend(rejected);
        if self.rejected.len() > MAX_REJECTED_PAGES {
            return Noted::Spoilt(self.rejected.len());
        }
        self.done()
    }

    /// The source says how many messages a round has.
    fn expect(&mut self, round: Version, messages: u64) -> Noted {
        if self.closed || Some(round) != self.current() {
            return Noted::OutOfTurn;
        }
        self.awaited = Some(messages);
        self.done()
    }

    /// The round ends without its last messages, which were lost with the link, in this outage. An
    /// acknowledgement that was lost may make the source name a round that is over: that is as well. False
    /// when it is neither of the two. What is done late, for an outage before the last, changes nothing.
    fn end(&mut self, round: Version, outage: u32) -> bool {
        if outage < self.outage {
            return true;
        }
        if self.closed || (round != self.acknowledged && Some(round) != self.current()) {
            return false;
        }
        *self = RoundLedger { acknowledged: round, outage, ..RoundLedger::default() };
        true
    }

    /// Whether a switchover to `version` may come now, or again: it is what would be the next round.
    fn may_close_at(&self, version: Version) -> bool {
        self.current() == Some(version)
    }

    /// The switchover has come. Messages of the last version that were faster than the flight have been
    /// counted as those of a round; the pages they could not bring must be asked for again.
    fn close(&mut self) -> Vec<PageIndex> {
        self.closed = true;
        std::mem::take(&mut self.rejected)
    }

    fn done(&mut self) -> Noted {
        let Some(round) = self.current().filter(|_| self.awaited == Some(self.applied)) else {
            return Noted::Waiting;
        };
        let rejected = std::mem::take(&mut self.rejected);
        let outage = self.outage;
        *self = RoundLedger { acknowledged: round, outage, ..RoundLedger::default() };
        Noted::RoundDone(round, rejected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_done_when_its_last_message_is_applied_in_whatever_order() {
        let mut ledger = RoundLedger::default();
        let page = PageIndex(7);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::Waiting);
        assert_eq!(ledger.expect(Version(1), 2), Noted::Waiting);
        let done = ledger.note(Version(1), vec![page]);
        assert_eq!(done, Noted::RoundDone(Version(1), vec![page]));
        assert_eq!(ledger.note(Version(2), vec![]), Noted::Waiting);
        assert_eq!(ledger.note(Version(1), vec![]), Noted::OutOfTurn);
        assert_eq!(ledger.expect(Version(2), 1), Noted::RoundDone(Version(2), vec![]));
        let empty = ledger.expect(Version(3), 0);
        assert_eq!(empty, Noted::RoundDone(Version(3), vec![]), "a round may be empty");
    }

    #[test]
    fn a_round_that_is_cut_short_counts_as_over() {
        let mut ledger = RoundLedger::default();
        ledger.note(Version(1), vec![PageIndex(3)]);
        assert!(!ledger.end(Version(2), 1), "a round that has not begun");
        assert!(ledger.end(Version(1), 1));
        assert!(ledger.end(Version(1), 2), "asked again after another outage");
        ledger.note(Version(2), vec![]);
        assert!(ledger.end(Version(1), 1), "a late answer to the first outage");
        let second = ledger.expect(Version(2), 1);
        assert_eq!(second, Noted::RoundDone(Version(2), vec![]), "nothing is left of the first");
        ledger.close();
        assert!(!ledger.end(Version(2), 3), "pre-copy is over");
    }

    #[test]
    fn more_spoilt_pages_than_damage_explains_end_the_migration() {
        let pages = |count| vec![PageIndex(1); count];
        let mut ledger = RoundLedger::default();
        assert_eq!(ledger.note(Version(1), pages(MAX_REJECTED_PAGES)), Noted::Waiting);
        let count = MAX_REJECTED_PAGES + 1;
        assert_eq!(ledger.note(Version(1), pages(1)), Noted::Spoilt(count));
        ledger.close();
        let most = ledger.note(Version(1), pages(MAX_ASKED_AGAIN));
        assert_eq!(most, Noted::AskAgain(pages(MAX_ASKED_AGAIN)));
        assert_eq!(ledger.note(Version(1), pages(1)), Noted::Spoilt(MAX_ASKED_AGAIN + 1));
    }

    #[test]
    fn a_page_rejected_around_the_switchover_is_asked_for_again() {
        let mut ledger = RoundLedger::default();
        ledger.note(Version(1), vec![PageIndex(1)]);
        assert_eq!(ledger.close(), vec![PageIndex(1)]);
        let late = ledger.note(Version(1), vec![PageIndex(2)]);
        assert_eq!(late, Noted::AskAgain(vec![PageIndex(2)]));
        assert_eq!(ledger.expect(Version(1), 0), Noted::OutOfTurn);
    }
}

#[cfg(test)]
mod moves;
#[cfg(test)]
mod simulation;
