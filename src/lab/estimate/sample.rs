//! What a running guest's memory is like, found by looking at it for a few seconds.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::codec::ladder::Ladder;
use crate::codec::{CodecChoice, CodecId, is_zero};
use crate::guest::{GuestError, SourceGuest};
use crate::memory::{GuestMemory, TrackerKind};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, PageSet, Version};
use crate::wire::limits::MAX_PAGES_PER_FRAME;
use crate::wire::{FrameEncoder, PageToSend};

/// Pages that are copied and encoded: of all, and of those that were written in the first second.
const SAMPLE_PAGES: usize = 2048;
/// How often writes are collected, unless collecting takes longer.
const SCAN_EVERY: Duration = Duration::from_millis(100);
/// The rate of writes is taken over this time from the begin.
const RATE_OVER_S: f64 = 0.1;
/// Written pages are copied after this time, to see what changes in them later.
const COPY_AFTER: Duration = Duration::from_secs(1);

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Pages of guest RAM.
    pub pages: u64,
    /// Those that are not holes.
    pub populated_pages: u64,
    /// Share of those that are zero, from 0 to 1.
    pub zero_share: f64,
    /// What another page costs, sent whole.
    pub whole_bytes_per_page: f64,
    /// What a page costs that was sent before and has changed since; as a whole one, where none was seen.
    pub delta_bytes_per_page: f64,
    /// Pages whose change was encoded.
    pub delta_sample_pages: u64,
    /// How fast one core of this host encodes whole pages.
    pub encode_bytes_per_s: f64,
    /// And changed ones.
    pub delta_encode_bytes_per_s: f64,
    /// Seconds since the begin, and how many different pages had been written by then.
    pub written: Vec<(f64, u64)>,
    /// How many different pages are written in the long run, by the shape of that curve.
    pub working_set_pages: u64,
    /// How the writes were followed.
    pub tracker: String,
}

impl Sample {
    /// Looks at `guest` for `time`. Changes nothing in it, but the first write to each page after each
    /// look is slower.
    ///
    /// # Errors
    /// Where writes cannot be followed.
    pub fn take(
        guest: &mut dyn SourceGuest,
        link_bytes_per_s: f64,
        time: Duration,
    ) -> Result<Self, GuestError> {
        let memory = guest.memory();
        let all = PageRange::new(0, memory.pages());
        let mut tracker = guest.track(TrackerKind::Auto)?;
        tracker.arm()?;
        let populated = memory.populated(all)?;
        let mut copies = Copies::of(&memory, evenly(&populated, SAMPLE_PAGES / 2));
        let whole = copies.clone();

        let mut written = PageSet::empty(memory.pages());
        let mut since_copied = PageSet::empty(memory.pages());
        let mut curve = Vec::new();
        let begin = Instant::now();
        let mut are_hot_copied = false;
        // What was written while the first pages were copied.
        tracker.collect(all, &mut since_copied)?;
        while begin.elapsed() < time {
            let scan = Instant::now();
            let mut now = PageSet::empty(memory.pages());
            tracker.collect(all, &mut now)?;
            written.union_with(&now);
            since_copied.union_with(&now);
            curve.push((begin.elapsed().as_secs_f64(), written.len()));
            if !are_hot_copied && begin.elapsed() >= COPY_AFTER {
                are_hot_copied = true;
                let hot: Vec<PageIndex> = evenly(&written, SAMPLE_PAGES / 2);
                for page in &hot {
                    since_copied.remove(*page);
                }
                copies.add(&memory, hot);
            }
            let pause = SCAN_EVERY.max(scan.elapsed() * 4).saturating_sub(scan.elapsed());
            std::thread::sleep(pause);
        }
        let tracker_name = tracker.name().to_owned();
        tracker.disarm()?;

        let choice = Ladder::default().choose(link_bytes_per_s, 1);
        let costs = whole.encode(choice, None);
        let changed: Vec<PageIndex> =
            copies.0.keys().copied().filter(|page| since_copied.contains(*page)).collect();
        let changed = Copies::of(&memory, changed);
        let delta = changed.encode(choice, Some(&copies));
        let populated_pages = populated.len();
        Ok(Sample {
            pages: memory.pages(),
            populated_pages,
            zero_share: costs.zero_pages as f64 / (whole.0.len().max(1)) as f64,
            whole_bytes_per_page: costs.bytes_per_page(),
            delta_bytes_per_page: match delta.pages {
                0 => costs.bytes_per_page(),
                pages => delta.bytes as f64 / pages as f64,
            },
            delta_sample_pages: delta.pages,
            encode_bytes_per_s: costs.input_bytes_per_s(),
            delta_encode_bytes_per_s: match delta.pages {
                0 => costs.input_bytes_per_s(),
                _ => delta.input_bytes_per_s(),
            },
            working_set_pages: long_run(&curve, populated_pages),
            written: curve,
            tracker: tracker_name,
        })
    }

    /// How many different pages are written in `seconds`: as seen, and beyond that on the way to the
    /// working set.
    pub fn written_in(&self, seconds: f64) -> f64 {
        let Some(&(last_s, _)) = self.written.last() else { return 0.0 };
        if seconds >= last_s {
            return saturating(first_rate(&self.written), self.working_set_pages as f64, seconds)
                .max(self.written[self.written.len() - 1].1 as f64);
        }
        let mut before = (0.0, 0);
        for &(at, pages) in &self.written {
            if at >= seconds {
                let share = (seconds - before.0) / (at - before.0).max(1e-9);
                return before.1 as f64 + share * (pages - before.1) as f64;
            }
            before = (at, pages);
        }
        before.1 as f64
    }
}

/// How many new pages a second the curve begins with. Its very first points are too short to tell.
fn first_rate(curve: &[(f64, u64)]) -> f64 {
    let point = curve.iter().find(|(at, _)| *at >= RATE_OVER_S).or(curve.last());
    point.map_or(0.0, |(at, pages)| *pages as f64 / at.max(1e-3))
}

/// Different pages after `seconds`, when writes begin with `rate` new pages a second and fall evenly on
/// `set` pages.
fn saturating(rate: f64, set: f64, seconds: f64) -> f64 {
    if set < 1.0 { 0.0 } else { set * (1.0 - (-rate * seconds / set).exp()) }
}

/// The set of which [`saturating`] fits the curve's begin and end; at most `most` pages.
fn long_run(curve: &[(f64, u64)], most: u64) -> u64 {
    let Some(&last) = curve.last() else { return 0 };
    if last.1 == 0 {
        return 0;
    }
    let rate = first_rate(curve);
    let (mut low, mut high) = (last.1 as f64, (most.max(last.1)) as f64);
    if saturating(rate, high, last.0) <= last.1 as f64 {
        return high as u64;
    }
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if saturating(rate, middle, last.0) < last.1 as f64 {
            low = middle;
        } else {
            high = middle;
        }
    }
    high as u64
}

/// At most about `count` of the pages, evenly drawn.
fn evenly(set: &PageSet, count: usize) -> Vec<PageIndex> {
    let step = (set.len() as usize).div_ceil(count).max(1);
    set.iter().step_by(step).collect()
}

/// What encoding has shown.
struct Costs {
    pages: u64,
    zero_pages: u64,
    bytes: u64,
    time: Duration,
}

impl Costs {
    fn bytes_per_page(&self) -> f64 {
        match self.pages - self.zero_pages {
            0 => PAGE_SIZE_BYTES as f64,
            pages => self.bytes as f64 / pages as f64,
        }
    }

    fn input_bytes_per_s(&self) -> f64 {
        let input = (self.pages - self.zero_pages) as f64 * PAGE_SIZE_BYTES as f64;
        if input == 0.0 { f64::INFINITY } else { input / self.time.as_secs_f64().max(1e-6) }
    }
}

/// Contents of pages.
#[derive(Clone, Default)]
struct Copies(BTreeMap<PageIndex, Box<PageBytes>>);

impl Copies {
    fn of(memory: &GuestMemory, pages: Vec<PageIndex>) -> Self {
        let mut copies = Copies::default();
        copies.add(memory, pages);
        copies
    }

    fn add(&mut self, memory: &GuestMemory, pages: Vec<PageIndex>) {
        for page in pages {
            let is_hole = memory
                .populated_runs(PageRange::new(page.0, page.0 + 1))
                .map_or(true, |runs| runs.is_empty());
            if !is_hole {
                let mut bytes = Box::new([0; PAGE_SIZE_BYTES]);
                memory.read_page(page, &mut bytes);
                self.0.insert(page, bytes);
            }
        }
    }

    /// Encodes all of them as they would be sent, against `bases` where there are such.
    fn encode(&self, choice: CodecChoice, bases: Option<&Copies>) -> Costs {
        let mut encoder = FrameEncoder::new(choice);
        let mut costs = Costs { pages: 0, zero_pages: 0, bytes: 0, time: Duration::ZERO };
        let pages: Vec<(&PageIndex, &Box<PageBytes>)> = self.0.iter().collect();
        for batch in pages.chunks(MAX_PAGES_PER_FRAME) {
            let base = |page: &PageIndex| {
                let bytes = bases?.0.get(page)?;
                Some((Version(1), &**bytes))
            };
            let to_send: Vec<PageToSend<'_>> = batch
                .iter()
                .map(|(page, bytes)| PageToSend { page: **page, bytes, base: base(page) })
                .collect();
            let mut frames = Vec::new();
            let begin = Instant::now();
            let counts = encoder.encode(Version(2), &to_send, &mut frames);
            costs.time += begin.elapsed();
            costs.pages += batch.len() as u64;
            costs.zero_pages += counts.pages(CodecId::Zero);
            costs.bytes += counts.total_bytes();
        }
        debug_assert_eq!(
            costs.zero_pages,
            self.0.values().filter(|bytes| is_zero(bytes)).count() as u64
        );
        costs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_that_flattens_tells_its_working_set_and_a_straight_one_does_not() {
        let curve = |set: f64| -> Vec<(f64, u64)> {
            let at = |tick: u32| f64::from(tick) * 0.1;
            (1..=50).map(|tick| (at(tick), saturating(2000.0, set, at(tick)) as u64)).collect()
        };
        let found = long_run(&curve(3000.0), 1_000_000) as f64;
        assert!((2700.0..3300.0).contains(&found), "{found}");
        assert!(long_run(&curve(1e9), 60_000) > 50_000);
        let early: Vec<(f64, u64)> = [(0.003, 1)].into_iter().chain(curve(3000.0)).collect();
        assert_eq!(long_run(&early, 1_000_000), long_run(&curve(3000.0), 1_000_000));
        assert_eq!(long_run(&[], 100), 0);
    }

    #[test]
    fn a_guest_that_writes_nothing_has_no_working_set() {
        let nothing = [(0.1, 0), (5.0, 0)];
        assert_eq!(long_run(&nothing, 100), 0);
        assert_eq!(saturating(0.0, 0.0, 7.0), 0.0);
    }

    #[test]
    fn the_cost_of_a_page_is_that_of_its_frames() {
        let mut old = Copies::default();
        let mut new = Copies::default();
        for page in 0..100u64 {
            let mut bytes = Box::new([0u8; PAGE_SIZE_BYTES]);
            if page % 2 == 0 {
                let noise = |i: usize| {
                    (xxhash_rust::xxh3::xxh3_64(&[page as u8, i as u8, (i >> 8) as u8])) as u8
                };
                bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = noise(i));
            }
            old.0.insert(PageIndex(page), bytes.clone());
            bytes[100] ^= 1;
            new.0.insert(PageIndex(page), bytes);
        }
        let choice = Ladder::default().choose(12e6, 1);
        let whole = old.encode(choice, None);
        assert_eq!((whole.pages, whole.zero_pages), (100, 50));
        assert!((4000.0..4300.0).contains(&whole.bytes_per_page()), "{}", whole.bytes_per_page());
        let delta = new.encode(choice, Some(&old));
        assert!(delta.bytes / delta.pages < 100, "{}", delta.bytes);
    }
}
