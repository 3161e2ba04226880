//! One worker: its streams and counters, and what it tells the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use super::GuestStatus;
use super::page::{PageWords, Stream, write_sparse, write_whole};

/// Every which operation of a hot/cold workload falls on the cold pages.
pub(crate) const COLD_EVERY: u64 = 10;

/// What an operation does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mode {
    pub(crate) writes: bool,
    pub(crate) whole_pages: bool,
    pub(crate) scattered: bool,
}

impl Mode {
    pub(crate) const WRITES_BIT: u64 = 1;
    pub(crate) const WHOLE_PAGES_BIT: u64 = 2;
    pub(crate) const SCATTERED_BIT: u64 = 4;

    /// As the guest program reads it.
    pub(crate) fn bits(self) -> u64 {
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        bit(self.writes, Self::WRITES_BIT)
            | bit(self.whole_pages, Self::WHOLE_PAGES_BIT)
            | bit(self.scattered, Self::SCATTERED_BIT)
    }
}

/// A worker between two operations. The guest program keeps the same fields in guest memory; the
/// native threads keep this struct.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Worker {
    pub(crate) mode: Mode,
    /// 0, or every which operation falls on the second stream.
    pub(crate) cold_every: u64,
    /// Hot pages (or all), cold pages (or none).
    pub(crate) streams: [Stream; 2],
    pub(crate) ops: u64,
    pub(crate) sweeps: u64,
    pub(crate) verified: u64,
    pub(crate) wrong: u64,
    pub(crate) first_wrong: u64,
    /// The page that is verified next, counted from the worker's first.
    pub(crate) cursor: u64,
}

impl Worker {
    /// Pages of both streams.
    pub(crate) fn pages(&self) -> u64 {
        self.streams[0].count + self.streams[1].count
    }

    /// Whether a worker that came from elsewhere stays within a guest of `pages` pages.
    pub(crate) fn is_sound(&self, pages: u64) -> bool {
        let sound = |stream: &Stream| {
            let Stream { first_page, count, sequence, written, .. } = *stream;
            let fresh = count <= pages
                && *stream == Stream { sequence, written, ..Stream::new(first_page, count) };
            fresh && first_page.checked_add(count).is_some_and(|end| end <= pages)
        };
        let [hot, cold] = &self.streams;
        let used = hot.count > 0 && (cold.count > 0 || self.cold_every == 0);
        sound(hot) && sound(cold) && used && self.cursor < self.pages()
    }

    /// One operation of the workload; `page` gives access to a page by number.
    pub(crate) fn operate<'a>(&mut self, page: impl Fn(u64) -> &'a PageWords) {
        let cold = self.cold_every != 0 && self.ops.is_multiple_of(self.cold_every);
        let mut stream = self.streams[usize::from(cold)];
        let sequence = stream.sequence;
        let number = stream.page_of(sequence, self.mode.scattered);
        let words = page(number);
        if !self.mode.writes {
            self.verify(&stream, words, number);
        } else if self.mode.whole_pages {
            self.verify(&stream, words, number);
            write_whole(words, number, sequence);
        } else {
            if !stream.head_holds(words, number, sequence) {
                self.found_wrong(number);
            }
            write_sparse(words, number, sequence);
        }
        if self.mode.writes {
            stream.written = sequence + 1;
        }
        stream.sequence = sequence + 1;
        self.streams[usize::from(cold)] = stream;
        self.ops += 1;
    }

    /// Checks the next page of the sweep.
    pub(crate) fn verify_next<'a>(&mut self, page: impl Fn(u64) -> &'a PageWords) {
        let hot = self.streams[0].count;
        let (stream, place) = match self.cursor.checked_sub(hot) {
            None => (self.streams[0], self.cursor),
            Some(place) => (self.streams[1], place),
        };
        let number = stream.first_page + place;
        self.verify(&stream, page(number), number);
        self.cursor += 1;
        if self.cursor == self.pages() {
            self.cursor = 0;
            self.sweeps += 1;
        }
    }

    fn verify(&mut self, stream: &Stream, words: &PageWords, number: u64) {
        self.verified += 1;
        if !stream.holds(words, number, self.mode.scattered) {
            self.found_wrong(number);
        }
    }

    fn found_wrong(&mut self, number: u64) {
        self.wrong += 1;
        if self.first_wrong == 0 {
            self.first_wrong = number;
        }
    }

    pub(crate) fn status(&self) -> GuestStatus {
        GuestStatus {
            ops: self.ops,
            sweeps: self.sweeps,
            pages_verified: self.verified,
            wrong_pages: self.wrong,
            first_wrong_page: self.first_wrong,
        }
    }
}

/// What a worker last reported, readable by any thread, and how much of its memory it is asked to
/// verify.
#[derive(Debug, Default)]
pub(crate) struct Gauge {
    ops: AtomicU64,
    sweeps: AtomicU64,
    verified: AtomicU64,
    wrong: AtomicU64,
    first_wrong: AtomicU64,
    /// All pages of the worker.
    pages: AtomicU64,
    /// Pages still to verify because the host asked for it.
    pub(crate) verify_left: AtomicU64,
}

impl Gauge {
    /// The gauge of a worker with so many pages.
    pub(crate) fn of(pages: u64) -> Arc<Gauge> {
        Arc::new(Gauge { pages: pages.into(), ..Gauge::default() })
    }

    /// Another worker has taken the place of this one.
    pub(crate) fn replace(&self, pages: u64, status: GuestStatus) {
        self.pages.store(pages, Relaxed);
        self.report(status);
    }

    /// All pages are to be checked once more.
    pub(crate) fn ask_to_verify(&self) {
        self.verify_left.fetch_add(self.pages(), Relaxed);
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages.load(Relaxed)
    }

    pub(crate) fn report(&self, status: GuestStatus) {
        self.ops.store(status.ops, Relaxed);
        self.sweeps.store(status.sweeps, Relaxed);
        self.verified.store(status.pages_verified, Relaxed);
        self.wrong.store(status.wrong_pages, Relaxed);
        self.first_wrong.store(status.first_wrong_page, Relaxed);
    }

    pub(crate) fn status(&self) -> GuestStatus {
        GuestStatus {
            ops: self.ops.load(Relaxed),
            sweeps: self.sweeps.load(Relaxed),
            pages_verified: self.verified.load(Relaxed),
            wrong_pages: self.wrong.load(Relaxed),
            first_wrong_page: self.first_wrong.load(Relaxed),
        }
    }
}

/// The reports of all workers as one.
pub(crate) fn total_status(gauges: &[Arc<Gauge>]) -> GuestStatus {
    let all = gauges.iter().map(|gauge| gauge.status());
    let total = all.reduce(|a, b| GuestStatus {
        ops: a.ops + b.ops,
        sweeps: a.sweeps.min(b.sweeps),
        pages_verified: a.pages_verified + b.pages_verified,
        wrong_pages: a.wrong_pages + b.wrong_pages,
        first_wrong_page: if a.first_wrong_page != 0 {
            a.first_wrong_page
        } else {
            b.first_wrong_page
        },
    });
    total.unwrap_or_default()
}
