//! Streams: threads that go through memory step by step, seen by their faults alone.
//!
//! What comes with a reply and is used shows nowhere, so the signal is the *next* fault of the same
//! thread. In the pages that were sent ahead (it came too early for them) or just behind them, it says
//! that they were wanted: the window doubles. Anywhere else, it says nothing of this stream, and the
//! thread's next guess is more modest.
//!
//! A first fault is answered with a guess that the thread goes on by one page at a time; a stride is found by a
//! majority vote over the last distances between faults, as in Leap (Maruf and Chowdhury,
//! "Effectively Prefetching Remote Memory with Leap", ATC 2020), but for each thread by itself.

use std::collections::{HashMap, VecDeque};

use super::{BundleStats, Left, Unsent, Wanted};
use crate::page::{PageIndex, PageRange};

/// Streams that are followed; the one that is used least lately goes.
const STREAMS: usize = 64;
/// Threads whose faults are remembered; beyond, all are forgotten at once.
const THREADS: usize = 1024;
/// Faults of a thread that vote.
const VOTERS: usize = 8;
/// A thread's first guess, and how far one may grow.
const FIRST_GUESS: usize = 8;
const MAX_GUESS: usize = 64;
/// A thread whose guesses are no use gets a small one so often all the same: it may change its ways.
const PROBE_EVERY: u32 = 8;
const PROBE: usize = 4;
/// The window of a stream that the vote has found.
const FIRST_WINDOW: usize = 16;
/// Pages sent along with one reply at most, whatever the link.
const MAX_WINDOW: usize = 512;
/// Pages that a thread may leave out where it is expected.
const SLACK: i64 = 4;
/// Pages pushed ahead of a stream before another fault must confirm it, at least.
const MIN_CREDIT: i64 = 256;
/// Pages of a run that is pushed for a stream.
const RUN_PAGES: i64 = 64;

/// A thread's way through memory.
#[derive(Debug)]
struct Stream {
    thread: u32,
    stride: i64,
    /// The last fault.
    last: i64,
    /// Where what was sent ahead ends.
    front: i64,
    window: usize,
    hits: u32,
    /// Pages that the thread has gone since the stream was found.
    length: i64,
    /// Pages that may still be pushed for it.
    credit: i64,
    used: u64,
}

#[derive(Debug)]
struct Thread {
    recent: VecDeque<i64>,
    guess: usize,
    idle: u32,
    /// Its last fault was answered with a bundle.
    bundled: bool,
}

/// The streams of all threads.
#[derive(Debug, Default)]
pub(super) struct Streams {
    streams: Vec<Stream>,
    threads: HashMap<u32, Thread>,
    clock: u64,
    turn: usize,
    stats: BundleStats,
}

impl Streams {
    /// Takes note of a fault and appends what is likely next; true when it lies on a known stream.
    pub(super) fn fault(
        &mut self,
        wanted: Wanted,
        left: &Left<'_>,
        room: usize,
        bundle: &mut Vec<PageIndex>,
    ) -> bool {
        self.clock += 1;
        if self.threads.len() >= THREADS && !self.threads.contains_key(&wanted.thread) {
            self.threads.clear();
        }
        let thread = self.threads.entry(wanted.thread).or_insert_with(|| Thread {
            recent: VecDeque::new(),
            guess: FIRST_GUESS,
            idle: 0,
            bundled: false,
        });
        let page = wanted.page.0 as i64;
        let mine = |stream: &Stream| stream.thread == wanted.thread;
        let known = |stream: &Stream| mine(stream) && stream.reaches(page, left.unsent);
        let hit = self.streams.iter().position(known);
        thread.judge(hit.is_some(), &mut self.stats);
        thread.recent.push_back(page);
        if thread.recent.len() > VOTERS {
            thread.recent.pop_front();
        }
        let stream = match hit {
            Some(index) => {
                let stream = &mut self.streams[index];
                stream.hit(page);
                stream
            }
            None => {
                let stream = thread.new_stream(wanted.thread, page);
                if self.streams.len() == STREAMS {
                    let oldest = self.streams.iter().enumerate().min_by_key(|(_, s)| s.used);
                    let oldest = oldest.map_or(0, |(index, _)| index);
                    self.streams.swap_remove(oldest);
                }
                self.streams.push(stream);
                self.streams.last_mut().expect("just pushed")
            }
        };
        stream.used = self.clock;
        let before = bundle.len();
        stream.look_ahead(left.unsent, stream.window.min(room), bundle);
        thread.bundled = bundle.len() > before;
        hit.is_some()
    }

    /// The next run of a stream that faults have confirmed, in turn.
    pub(super) fn next(&mut self, unsent: &Unsent) -> Option<PageRange> {
        for _ in 0..self.streams.len() {
            self.turn = (self.turn + 1) % self.streams.len();
            let stream = &mut self.streams[self.turn];
            if stream.hits > 0 && stream.credit > 0 {
                match stream.advance(unsent) {
                    Some(run) => return Some(run),
                    None => stream.credit = 0,
                }
            }
        }
        None
    }

    pub(super) fn stats(&self) -> BundleStats {
        self.stats
    }
}

impl Thread {
    fn judge(&mut self, hit: bool, stats: &mut BundleStats) {
        if !std::mem::take(&mut self.bundled) {
            return;
        }
        if hit {
            stats.useful += 1;
            self.guess = (self.guess * 2).clamp(PROBE, MAX_GUESS);
        } else {
            stats.useless += 1;
            self.guess /= 2;
        }
    }

    fn new_stream(&mut self, thread: u32, page: i64) -> Stream {
        let recent = self.recent.make_contiguous();
        let (stride, window) = match majority(recent) {
            Some(stride) => (stride, FIRST_WINDOW),
            None => {
                let back = recent.len() >= 2 && {
                    let distance = page - recent[recent.len() - 2];
                    (-SLACK..0).contains(&distance)
                };
                self.idle = if self.guess == 0 { self.idle + 1 } else { 0 };
                let probes = self.guess == 0 && self.idle.is_multiple_of(PROBE_EVERY);
                let window = if probes { PROBE } else { self.guess };
                (if back { -1 } else { 1 }, window)
            }
        };
        let front = page + stride;
        Stream { thread, stride, last: page, front, window, hits: 0, length: 0, credit: 0, used: 0 }
    }
}

impl Stream {
    /// True when a fault at `page` is one that this stream leads to expect.
    fn reaches(&self, page: i64, unsent: &Unsent) -> bool {
        let steps = (page - self.last) / self.stride;
        if steps < 1 {
            return false;
        }
        match self.front_page(unsent) {
            // Behind what was sent anyway, the thread may have gone on without a fault.
            Some(front) if self.stride == 1 => page <= front.max(self.front) + SLACK,
            Some(front) if self.stride == -1 => page >= front.min(self.front) - SLACK,
            _ => {
                let ahead = (self.front - self.last) / self.stride;
                (page - self.last) % self.stride == 0 && steps <= ahead + SLACK
            }
        }
    }

    /// For streams without gaps: the next page that was not sent.
    fn front_page(&self, unsent: &Unsent) -> Option<i64> {
        let front = PageIndex(u64::try_from(self.front).ok()?);
        let page = match self.stride {
            1 => unsent.first_from(front),
            -1 => unsent.last_until(front),
            _ => None,
        };
        page.map(|page| page.0 as i64)
    }

    fn hit(&mut self, page: i64) {
        self.hits = self.hits.saturating_add(1);
        self.length += (page - self.last).abs();
        self.last = page;
        let beyond = (page - self.front) / self.stride >= 0;
        if beyond {
            self.front = page + self.stride;
        }
        self.window = (self.window * 2).clamp(FIRST_WINDOW, MAX_WINDOW);
        // A thread that has come so far goes as far again, as far as one knows.
        self.credit = self.length.max(4 * self.window as i64).max(MIN_CREDIT);
    }

    /// The next `count` unsent pages along the stream, near enough to be part of it.
    fn look_ahead(&mut self, unsent: &Unsent, count: usize, into: &mut Vec<PageIndex>) {
        let reach = (4 * count as i64).max(SLACK);
        let (start, full) = (self.front, into.len() + count);
        while into.len() < full && ((self.front - start) / self.stride) < reach {
            let next = match self.stride {
                1 | -1 => self.front_page(unsent),
                _ => Some(self.front),
            };
            let Some(page) = next.and_then(|page| u64::try_from(page).ok()) else { return };
            if page >= unsent.pages() || (page as i64 - start) / self.stride >= reach {
                return;
            }
            if unsent.contains(PageIndex(page)) {
                into.push(PageIndex(page));
            }
            self.front = page as i64 + self.stride;
        }
    }

    /// The next run to push, or `None` when the stream has come to an end.
    fn advance(&mut self, unsent: &Unsent) -> Option<PageRange> {
        let start = self.front;
        if self.stride.abs() == 1 {
            self.front = self.front_page(unsent)?;
            if (self.front - start).abs() > MIN_CREDIT {
                return None;
            }
            self.credit -= RUN_PAGES;
            let (from, to) = match self.stride {
                1 => (self.front, self.front + RUN_PAGES),
                _ => ((self.front + 1 - RUN_PAGES).max(0), self.front + 1),
            };
            return Some(PageRange::new(from as u64, to as u64));
        }
        for _ in 0..MIN_CREDIT {
            let page = u64::try_from(self.front).ok().filter(|page| *page < unsent.pages())?;
            if unsent.contains(PageIndex(page)) {
                self.credit -= 1;
                return Some(PageRange::new(page, page + 1));
            }
            self.front += self.stride;
        }
        None
    }
}

/// The distance that more than half of the last faults have to the one before: first of the last four,
/// then of all (a window that grows, as in Leap).
fn majority(recent: &[i64]) -> Option<i64> {
    let distances: Vec<i64> = recent.windows(2).rev().map(|pair| pair[1] - pair[0]).collect();
    for size in [4, VOTERS] {
        let voters = &distances[..distances.len().min(size)];
        // Boyer and Moore's vote, and a count, since the vote finds a majority only if there is one.
        let (mut candidate, mut lead) = (0, 0);
        for distance in voters {
            if lead == 0 {
                candidate = *distance;
            }
            lead += if *distance == candidate { 1 } else { -1 };
        }
        let votes = voters.iter().filter(|distance| **distance == candidate).count();
        if candidate != 0 && votes >= 2 && votes * 2 > voters.len() {
            return Some(candidate);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::heat::Heat;
    use crate::page::PageSet;

    const PAGES: u64 = 100_000;

    /// Faults on `touched`, in order, wherever a page was not sent before: how many there are.
    fn faults(streams: &mut Streams, unsent: &mut Unsent, touched: &[u64]) -> u64 {
        let heat = Heat::new(PAGES);
        let mut faults = 0;
        for page in touched.iter().copied().map(PageIndex) {
            if !unsent.remove(page) {
                continue;
            }
            faults += 1;
            let mut bundle = Vec::new();
            let left = Left { unsent, heat: &heat, encoded_bytes: &|_| 1 };
            streams.fault(Wanted { page, thread: 1 }, &left, 250, &mut bundle);
            bundle.into_iter().for_each(|page| assert!(unsent.remove(page), "{page:?} twice"));
        }
        faults
    }

    fn all() -> Unsent {
        Unsent::new(&PageSet::full(PAGES))
    }

    #[test]
    fn a_sequential_reader_faults_for_few_of_its_pages_in_either_direction() {
        let up: Vec<u64> = (1000..21_000).collect();
        let down: Vec<u64> = up.iter().rev().copied().collect();
        for touched in [up, down] {
            let count = faults(&mut Streams::default(), &mut all(), &touched);
            assert!(count < 20_000 / 200 + 10, "{count} faults");
        }
    }

    #[test]
    fn a_stride_is_found_by_majority_and_followed() {
        let touched: Vec<u64> = (0..2000).map(|step| 500 + step * 37).collect();
        let count = faults(&mut Streams::default(), &mut all(), &touched);
        assert!(count < 2000 / 100, "{count} faults");
        assert_eq!(majority(&[0, 37, 74, 9000, 9037]), Some(37));
        assert_eq!(majority(&[0, 37, 50, 9000, 9100]), None);
    }

    #[test]
    fn two_streams_of_one_thread_are_told_apart() {
        let touched: Vec<u64> = (0..4000).flat_map(|step| [step, 50_000 + step]).collect();
        let count = faults(&mut Streams::default(), &mut all(), &touched);
        assert!(count < 8000 / 100, "{count} faults");
    }

    #[test]
    fn bundles_shrink_to_nothing_where_they_are_no_use_and_come_back() {
        let (mut streams, mut unsent) = (Streams::default(), all());
        // A walk that never comes near to where it was.
        let scattered: Vec<u64> = (0..200).map(|i| (i * i * 7919 + 13 * i) % PAGES).collect();
        faults(&mut streams, &mut unsent, &scattered);
        let left = unsent.len();
        let more: Vec<u64> = (200..264).map(|i| (i * i * 7919 + 13 * i) % PAGES).collect();
        let count = faults(&mut streams, &mut unsent, &more);
        let bundled = left - unsent.len() - count;
        assert!(bundled <= 2 * count, "{bundled} pages came with {count} faults");
        let stats = streams.stats();
        assert!(stats.useless > stats.useful, "{stats:?}");
        let sequential: Vec<u64> = (30_000..40_000).collect();
        let count = faults(&mut streams, &mut unsent, &sequential);
        assert!(count < 10_000 / 100, "{count} faults");
    }
}
