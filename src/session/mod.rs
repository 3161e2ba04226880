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
use crate::report::{Counters, Output, PhaseTimes, Progress, TraceFile};
use crate::transport::LinkError;

use links::Links;

mod answers;
mod arrivals;
pub mod control;
mod desk;
pub mod destination;
mod frozen;
pub mod journal;
mod ledger;
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

/// Locks what is looked at until the end of a migration, also after one of its threads has panicked: the others have
/// to tell of it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The failure that the end of a task is, if it has panicked: what it would have done does not come.
fn panic_of(ended: Result<(), tokio::task::JoinError>) -> Option<Failure> {
    let error = ended.err().filter(tokio::task::JoinError::is_panic)?;
    Some(Failure::plain(format!("a thread of farfault failed: {error}")))
}

/// Does `step`; its panic becomes a failure of the migration.
fn without_panic<T>(step: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(step));
    done.unwrap_or_else(|_| Err(Failure::plain("a thread of farfault failed")))
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
pub struct StopSignals {
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
    /// From now on these signals end nothing by themselves.
    pub fn listen() -> Result<Self, Failure> {
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

#[cfg(test)]
mod moves;
#[cfg(test)]
mod simulation;

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn only_a_task_that_panics_is_a_failure() {
        let mut tasks = JoinSet::new();
        tasks.spawn(async {});
        tasks.spawn(async { panic!("as a test") });
        tasks.spawn(std::future::pending()).abort();
        let mut failures = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            failures.extend(panic_of(ended));
        }
        let [failure] = &failures[..] else { panic!("{failures:?}") };
        assert!(failure.to_string().contains("a thread of farfault failed"), "{failure}");
    }
}
