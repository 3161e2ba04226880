//! Serves the guest's faults on the destination: what is here is mapped at once, what is not is
//! asked for.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::table::{PageTable, Stage, Want};
use super::userfault::{Fault, Userfault};
use super::{MemoryError, Units};
use crate::page::{PageIndex, PageRange, Version};

mod mapper;
mod units;

pub use mapper::Mapper;

/// How often the fault reader looks whether it shall stop, and retries what had no memory.
const TICK: Duration = Duration::from_millis(20);
/// Asked pages whose time is kept. Each stands for at least one waiting guest thread, so that more
/// means a guest of more than this many threads; what is beyond is served, but not timed.
const TIMED_LIMIT: usize = 4096;
/// Latencies above this count as this: 10 minutes, in microseconds.
const LATENCY_LIMIT_US: u64 = 600_000_000;
/// Pages that had no memory and are tried again.
const RETRY_LIMIT: usize = 4096;

/// How faults are served.
#[derive(Clone, Copy, Debug)]
pub struct FaultOptions {
    /// A local fault also maps the Current pages next to it, within an aligned window of this many
    /// pages. 16 brings the cost per page from 6 us to 0.7 us; 1 turns it off.
    pub around_pages: u64,
    /// Map each page only when it is touched, and keep so many first touches, for a trace. 0: pages are
    /// mapped as they arrive, and nothing is kept.
    pub touches_kept: usize,
}

impl Default for FaultOptions {
    fn default() -> Self {
        FaultOptions { around_pages: 16, touches_kept: 0 }
    }
}

/// For whom a page is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AskedFor {
    /// A thread of the guest that waits for it; its id, when the kernel tells.
    Thread(Option<u32>),
    /// A thread that waits for another page of the same unit, which is asked for in its name.
    Unit,
    /// It was asked for since its unit is waited for, and has not come for long.
    UnitAgain,
}

/// What the fault server has seen.
#[derive(Clone, Debug)]
pub struct FaultStats {
    /// Faults on pages whose content was here.
    pub local_faults: u64,
    /// Faults because of which a page was asked for, or all missing ones of a unit.
    pub remote_faults: u64,
    /// Faults on pages, or units, that had been asked for already.
    pub joined_faults: u64,
    /// From reading a remote fault to waking its threads, in microseconds.
    pub remote_latency_us: Histogram<u64>,
    /// Of these, pages of which nothing was here.
    pub absent_latency_us: Histogram<u64>,
    /// Of these, pages of which an older copy was here, or was just being replaced.
    pub stale_latency_us: Histogram<u64>,
    /// All of these added up.
    pub stall_sum_us: u64,
    /// Time in which any of them was waited for.
    pub stall_any_us: u64,
}

/// A first touch of a page by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Since the fault server was started.
    pub at: Duration,
    /// How long the thread waited.
    pub waited: Duration,
    /// The thread's id, 0 when the kernel does not tell.
    pub thread: u32,
    /// The page.
    pub page: PageIndex,
}

/// Reads a [`Userfault`] in a thread of its own and serves it from the [`PageTable`], from before
/// device state is loaded until [`FaultServer::stop`].
pub struct FaultServer {
    service: Arc<Service>,
    thread: Option<JoinHandle<()>>,
}

impl FaultServer {
    /// Starts to serve. `ask` is called, in the fault thread, with each page that a thread of the guest
    /// waits for and that is not here: once per page, until it has been mapped. What is missing of a unit of several
    /// pages for a second and more is asked for again, now and then, but only while `may_ask_again` says so, which
    /// is asked before each unit. Neither must block.
    pub fn start(
        userfault: Arc<Userfault>,
        table: Arc<PageTable>,
        options: FaultOptions,
        ask: impl Fn(PageIndex, AskedFor) + Send + 'static,
        may_ask_again: impl Fn() -> bool + Send + 'static,
    ) -> Result<Self, MemoryError> {
        let service = Arc::new(Service::new(userfault, table, options));
        let shared = Arc::clone(&service);
        let name = "fault-reader";
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(move || {
            let served = AssertUnwindSafe(|| shared.run(&ask, &may_ask_again));
            if catch_unwind(served).is_err() {
                *lock(&shared.failure) = Some(MemoryError::FaultReaderGone);
            }
        });
        let thread = Some(thread.map_err(|source| MemoryError::Thread { name, source })?);
        Ok(FaultServer { service, thread })
    }

    /// Maps pages that have just become Current for the guest: all that hold content, and those of
    /// zeros that a thread waits for (the others stay holes until they are touched). Called by the
    /// applier after [`PageTable::finish`], and for what [`PageTable::freeze`] gave; ascending
    /// neighbours are mapped together.
    pub fn map_arrived(&self, pages: &[PageIndex]) -> Result<(), MemoryError> {
        let units = self.service.units();
        if units.are_single() {
            return self.map_arrived_singly(pages);
        }
        let is_single = |page: &PageIndex| units.of(*page).len() == 1;
        let (singly, in_units): (Vec<_>, Vec<_>) = pages.iter().copied().partition(is_single);
        self.map_arrived_singly(&singly)?;
        self.service.map_arrived_units(&in_units)
    }

    fn map_arrived_singly(&self, pages: &[PageIndex]) -> Result<(), MemoryError> {
        let mut run = PageRange::new(0, 0);
        for page in pages {
            let state = self.service.table.state(*page);
            if self.service.options.touches_kept > 0 && !state.waiting {
                continue;
            }
            if state.zero || !state.is_complete() {
                if state.is_complete() && state.waiting {
                    self.service.map_one(*page)?;
                }
                continue;
            }
            if run.end != *page || run.is_empty() {
                self.service.map_content(run, None)?;
                run = PageRange { start: *page, end: *page };
            }
            run.end.0 += 1;
        }
        self.service.map_content(run, None).map(drop)
    }

    /// What was seen so far.
    pub fn stats(&self) -> FaultStats {
        let asked = lock(&self.service.asked);
        let mut remote_latency_us = asked.absent_us.clone();
        remote_latency_us.add(&asked.stale_us).expect("histograms of the same bounds");
        FaultStats {
            local_faults: self.service.local.load(Ordering::Relaxed),
            remote_faults: self.service.remote.load(Ordering::Relaxed),
            joined_faults: self.service.joined.load(Ordering::Relaxed),
            remote_latency_us,
            absent_latency_us: asked.absent_us.clone(),
            stale_latency_us: asked.stale_us.clone(),
            stall_sum_us: asked.stall_sum.as_micros() as u64,
            stall_any_us: asked.stall_any(Instant::now()).as_micros() as u64,
        }
    }

    /// The touches that were kept, once, and whether there were more.
    pub fn take_touches(&self) -> (Vec<Touched>, bool) {
        let mut asked = lock(&self.service.asked);
        let touches = std::mem::take(&mut asked.touches);
        // Indices into it are worth nothing any more.
        asked.since.values_mut().for_each(|waiting| waiting.touch = None);
        (touches, asked.touches_cut)
    }

    /// What went wrong, once: the guest's process has ended or the fault reader has panicked (then no fault is
    /// served any more), or there is no memory for a page (then it is tried again until there is).
    pub fn take_failure(&self) -> Option<MemoryError> {
        lock(&self.service.failure).take()
    }

    /// Ends the fault reader. The guest's faults wait from then on, until
    /// [`Userfault::release`] or another server.
    pub fn stop(self) -> FaultStats {
        self.stats()
    }

    fn service(&self) -> Arc<Service> {
        Arc::clone(&self.service)
    }
}

impl Drop for FaultServer {
    fn drop(&mut self) {
        self.service.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the fault reader, the appliers and the background mapper share.
struct Service {
    table: Arc<PageTable>,
    userfault: Arc<Userfault>,
    options: FaultOptions,
    stop: AtomicBool,
    local: AtomicU64,
    remote: AtomicU64,
    joined: AtomicU64,
    asked: Mutex<Asked>,
    begin: Instant,
    failure: Mutex<Option<MemoryError>>,
}

/// When pages were asked for.
struct Asked {
    since: HashMap<PageIndex, Waiting>,
    absent_us: Histogram<u64>,
    stale_us: Histogram<u64>,
    stall_sum: Duration,
    /// Up to the last time that nobody waited.
    stall_any: Duration,
    /// Since when somebody waits.
    stalled_since: Option<Instant>,
    touches: Vec<Touched>,
    touches_cut: bool,
}

#[derive(Clone, Copy)]
struct Waiting {
    since: Instant,
    /// Nothing was here of it.
    absent: bool,
    /// Its place among the touches.
    touch: Option<usize>,
    /// Of a unit: when what is missing of it is asked for again.
    again: Option<Instant>,
}

impl Service {
    fn new(userfault: Arc<Userfault>, table: Arc<PageTable>, options: FaultOptions) -> Self {
        assert!(options.around_pages >= 1, "a fault maps at least its own page");
        Service {
            table,
            userfault,
            options,
            stop: AtomicBool::new(false),
            local: AtomicU64::new(0),
            remote: AtomicU64::new(0),
            joined: AtomicU64::new(0),
            asked: Mutex::new(Asked::new()),
            begin: Instant::now(),
            failure: Mutex::new(None),
        }
    }

    fn run(&self, ask: &impl Fn(PageIndex, AskedFor), may_ask_again: &impl Fn() -> bool) {
        let (mut faults, mut here, mut retry) = (Vec::new(), Vec::new(), Vec::new());
        while !self.stop.load(Ordering::Relaxed) {
            if let Err(error) = self.userfault.wait(TICK, &mut faults) {
                self.fail(error);
                std::thread::sleep(TICK);
            }
            // Requests leave first: they have a long way, and mapping what is here takes its time.
            for fault in retry.drain(..).chain(faults.drain(..)) {
                if let Some(zero) = self.request(fault, ask) {
                    here.push((fault, zero));
                }
            }
            for (fault, zero) in here.drain(..) {
                match self.serve(fault.page, zero) {
                    Ok(()) => {}
                    Err(MemoryError::ProcessGone) => return self.fail(MemoryError::ProcessGone),
                    Err(error) => {
                        self.fail(error);
                        if retry.len() < RETRY_LIMIT {
                            retry.push(fault);
                        }
                    }
                }
            }
            if !self.units().are_single() {
                self.ask_again(ask, may_ask_again);
            }
            if !retry.is_empty() {
                std::thread::sleep(TICK);
            }
        }
    }

    fn fail(&self, error: MemoryError) {
        let mut failure = lock(&self.failure);
        if failure.is_none() {
            tracing::warn!(%error, "serving the guest's faults");
            *failure = Some(error);
        }
    }

    /// Asks for the page of a fault if it is not here; else tells whether it is of zeros.
    fn request(&self, fault: Fault, ask: &impl Fn(PageIndex, AskedFor)) -> Option<bool> {
        let page = fault.page;
        let unit = self.units().of(page);
        if unit.len() > 1 {
            return self.request_unit(fault, unit, ask).then_some(false);
        }
        // While it is being replaced, the version is still that of the older copy.
        let absent = self.table.state(page).version == Version::NONE;
        match self.table.want(page) {
            Want::Serve { zero } => {
                self.local.fetch_add(1, Ordering::Relaxed);
                self.keep(fault);
                Some(zero)
            }
            Want::Ask { first: true } => {
                self.remote.fetch_add(1, Ordering::Relaxed);
                let asked_at = Instant::now();
                ask(page, AskedFor::Thread(fault.thread));
                let touch = self.keep(fault);
                self.start_clock(page, Waiting { since: asked_at, absent, touch, again: None });
                None
            }
            Want::Ask { first: false } => {
                self.joined.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// Maps a page that is here, and its neighbours.
    fn serve(&self, page: PageIndex, zero: bool) -> Result<(), MemoryError> {
        let unit = self.units().of(page);
        if unit.len() > 1 {
            return self.map_unit(unit);
        }
        if zero {
            return self.map_one(page);
        }
        self.map_content(self.around(page), Some(page)).map(drop)
    }

    /// Notes a touch for the trace, and gives its place there.
    fn keep(&self, fault: Fault) -> Option<usize> {
        if self.options.touches_kept == 0 {
            return None;
        }
        let mut asked = lock(&self.asked);
        if asked.touches.len() >= self.options.touches_kept {
            asked.touches_cut = true;
            return None;
        }
        let (thread, at) = (fault.thread.unwrap_or(0), self.begin.elapsed());
        asked.touches.push(Touched { at, waited: Duration::ZERO, thread, page: fault.page });
        Some(asked.touches.len() - 1)
    }

    /// The maximal run of Current pages with content around `page`, within the window. A page that was
    /// mapped before, and then taken away by the guest's balloon, comes alone.
    fn around(&self, page: PageIndex) -> PageRange {
        let alone = PageRange::new(page.0, page.0 + 1);
        if self.options.around_pages == 1
            || self.options.touches_kept > 0
            || self.table.state(page).stage == Stage::Mapped
        {
            return alone;
        }
        let window = page.0 - page.0 % self.options.around_pages;
        let end = (window + self.options.around_pages).min(self.table.pages());
        let units = self.units();
        let joins = |page: &u64| {
            let page = PageIndex(*page);
            let state = self.table.state(page);
            state.stage == Stage::Current && !state.zero && units.of(page).len() == 1
        };
        let before = (window..page.0).rev().take_while(joins).count() as u64;
        let after = (page.0 + 1..end).take_while(joins).count() as u64;
        PageRange::new(page.0 - before, page.0 + 1 + after)
    }

    /// Maps a run of complete pages, and gives how many. One that the guest's balloon has made a hole
    /// again stays a hole, of zeros, unless it is the `touched` one or a thread waits for it.
    fn map_content(&self, run: PageRange, touched: Option<PageIndex>) -> Result<u64, MemoryError> {
        let mut left = run;
        let mut skipped = 0;
        while !left.is_empty() {
            let mapped_to = match self.userfault.map(left) {
                Ok(_) => left.end,
                Err(MemoryError::Hole(hole)) => hole,
                Err(other) => return Err(other),
            };
            self.mapped(PageRange { start: left.start, end: mapped_to });
            left.start = mapped_to;
            if !left.is_empty() {
                self.table.note_hole(mapped_to);
                if touched == Some(mapped_to) || self.table.state(mapped_to).waiting {
                    self.map_one(mapped_to)?;
                } else {
                    skipped += 1;
                }
                left.start.0 += 1;
            }
        }
        Ok(run.len() - skipped)
    }

    /// Maps a page of zeros, or whatever lies in its place by now.
    fn map_one(&self, page: PageIndex) -> Result<(), MemoryError> {
        self.userfault.map_zero(page)?;
        self.mapped(PageRange::new(page.0, page.0 + 1));
        Ok(())
    }

    fn units(&self) -> &Units {
        self.userfault.units()
    }

    fn mapped(&self, run: PageRange) {
        self.table.mark_mapped(run);
        let mut asked = lock(&self.asked);
        if !asked.since.is_empty() {
            run.pages().for_each(|page| asked.stop_clock(page));
        }
    }

    /// The page may have been mapped between asking and this: then the time is taken at once.
    fn start_clock(&self, page: PageIndex, waiting: Waiting) {
        let mut asked = lock(&self.asked);
        if asked.since.len() < TIMED_LIMIT {
            asked.stalled_since.get_or_insert(waiting.since);
            asked.since.insert(page, waiting);
            if self.table.state(page).stage == Stage::Mapped {
                asked.stop_clock(page);
            }
        }
    }
}

impl Asked {
    fn new() -> Self {
        let histogram = || {
            let histogram = Histogram::new_with_max(LATENCY_LIMIT_US, 3);
            histogram.expect("constant bounds of a histogram")
        };
        Asked {
            since: HashMap::new(),
            absent_us: histogram(),
            stale_us: histogram(),
            stall_sum: Duration::ZERO,
            stall_any: Duration::ZERO,
            stalled_since: None,
            touches: Vec::new(),
            touches_cut: false,
        }
    }

    fn stop_clock(&mut self, page: PageIndex) {
        let Some(Waiting { since, absent, touch, .. }) = self.since.remove(&page) else { return };
        let now = Instant::now();
        let waited = now.saturating_duration_since(since);
        let histogram = if absent { &mut self.absent_us } else { &mut self.stale_us };
        histogram.saturating_record(waited.as_micros() as u64);
        if let Some(touched) = touch.and_then(|index| self.touches.get_mut(index)) {
            touched.waited = waited;
        }
        self.stall_sum += waited;
        if self.since.is_empty() {
            self.stall_any = self.stall_any(now);
            self.stalled_since = None;
        }
    }

    fn stall_any(&self, now: Instant) -> Duration {
        let going_on = self.stalled_since.map(|since| now.saturating_duration_since(since));
        self.stall_any + going_on.unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
