//! What a running guest's memory is like, found by looking at it for a few seconds.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::copies::{Copies, Costs};
use crate::codec::ladder::Ladder;
use crate::guest::{GuestError, SourceGuest};
use crate::memory::TrackerKind;
use crate::page::{PageIndex, PageRange, PageSet};

/// Pages that are copied and encoded, drawn evenly from all.
const SAMPLE_PAGES: usize = 4096;
/// And from those that are written at once.
const HOT_SAMPLE_PAGES: usize = 1024;
/// How often writes are collected, unless collecting takes longer.
const SCAN_EVERY: Duration = Duration::from_millis(100);
/// What is written in this time is looked at for being written again and again.
const HOT_WITHIN: Duration = Duration::from_millis(300);
/// How far a curve that does not flatten at all goes on as if all memory was written in the end.
const ENDLESS: f64 = 0.75;
/// Fewer changed pages do not tell what a change costs.
const FEW_PAGES: u64 = 8;

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
    /// And one that has just been written.
    pub written_bytes_per_page: f64,
    /// How many pages are written again and again.
    pub hot_pages: f64,
    /// What one of those costs that was sent before and has changed since.
    pub hot_delta_bytes_per_page: f64,
    /// And another changed one; as a whole one, where none was seen.
    pub cold_delta_bytes_per_page: f64,
    /// Pages of both kinds whose change was encoded.
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
        let populated = memory.populated(all)?;
        let before = Copies::of(&memory, evenly(&populated, SAMPLE_PAGES), &populated);
        tracker.arm()?;

        let mut written = PageSet::empty(memory.pages());
        let mut curve = Vec::new();
        // Pages that are written at once, copies of some, and what is written after these were made.
        let mut early = None;
        let mut later = PageSet::empty(memory.pages());
        let begin = Instant::now();
        while begin.elapsed() < time {
            let scan = Instant::now();
            let mut now = PageSet::empty(memory.pages());
            tracker.collect(all, &mut now)?;
            // Around a first page all is reported.
            let now = memory.populated_of(&now)?;
            written.union_with(&now);
            later.union_with(&now);
            curve.push((begin.elapsed().as_secs_f64(), written.len()));
            if early.is_none() && begin.elapsed() >= HOT_WITHIN {
                let populated = memory.populated(all)?;
                let hot = Copies::of(&memory, evenly(&written, HOT_SAMPLE_PAGES), &populated);
                early = Some((written.clone(), hot));
                // What was written before its copy was made is in it.
                let mut since = PageSet::empty(memory.pages());
                tracker.collect(all, &mut since)?;
                written.union_with(&memory.populated_of(&since)?);
                later = PageSet::empty(memory.pages());
            }
            let pause = SCAN_EVERY.max(scan.elapsed() * 4).saturating_sub(scan.elapsed());
            std::thread::sleep(pause);
        }
        let tracker_name = tracker.name().to_owned();
        tracker.disarm()?;

        let (early, hot) = early.unwrap_or_else(|| (written.clone(), Copies::default()));
        let populated_now = memory.populated(all)?;
        let changed = |copies: &Copies, of: &PageSet| {
            let pages = copies.pages().filter(|page| of.contains(*page)).collect();
            Copies::of(&memory, pages, &populated_now)
        };
        let hot_now = changed(&hot, &later);
        let hot_share = hot_now.len() as f64 / hot.len().max(1) as f64;
        let mut later_only = later;
        later_only.subtract(&early);
        let cold_now = changed(&before, &later_only);

        // As the engine does it; the first time tells how fast this core is, and which codecs that makes
        // the right ones.
        let mut ladder = Ladder::default();
        let mut encode = |now: &Copies, bases: Option<&Copies>| {
            now.encode(&mut ladder, link_bytes_per_s, bases);
            now.encode(&mut ladder, link_bytes_per_s, bases)
        };
        let whole = encode(&before, None);
        let (hot_cost, cold_cost) =
            (encode(&hot_now, Some(&hot)), encode(&cold_now, Some(&before)));
        let anew = encode(&hot_now, None) + encode(&cold_now, None);
        let known = |first: &Costs, second: &Costs| {
            let enough = [first, second].into_iter().find(|cost| cost.pages() >= FEW_PAGES);
            enough.map_or(whole.bytes_per_page(), Costs::bytes_per_changed_page)
        };
        let deltas = hot_cost + cold_cost;
        let populated_pages = populated.len();
        Ok(Sample {
            pages: memory.pages(),
            populated_pages,
            zero_share: whole.zero_share(),
            whole_bytes_per_page: whole.bytes_per_page(),
            written_bytes_per_page: match anew.pages() {
                ..FEW_PAGES => whole.bytes_per_page(),
                _ => anew.bytes_per_page(),
            },
            hot_pages: early.len() as f64 * hot_share,
            hot_delta_bytes_per_page: known(&hot_cost, &cold_cost),
            cold_delta_bytes_per_page: known(&cold_cost, &hot_cost),
            delta_sample_pages: deltas.pages(),
            encode_bytes_per_s: whole.input_bytes_per_s(),
            delta_encode_bytes_per_s: match deltas.pages() {
                0 => whole.input_bytes_per_s(),
                _ => deltas.input_bytes_per_s(),
            },
            working_set_pages: Tail::of(&curve, populated_pages).set() as u64,
            written: curve,
            tracker: tracker_name,
        })
    }

    /// How many different pages are written in `seconds`: as seen, and beyond that by how the curve ends.
    pub fn written_in(&self, seconds: f64) -> f64 {
        match self.written.last() {
            Some(last) if seconds > last.0 => {
                Tail::of(&self.written, self.populated_pages).at(seconds)
            }
            _ => seen(&self.written, seconds),
        }
    }

    /// What a changed page costs, on average over `pages` different ones.
    pub fn delta_bytes_per_page(&self, pages: f64) -> f64 {
        let hot = (self.hot_pages / pages.max(1.0)).min(1.0);
        hot * self.hot_delta_bytes_per_page + (1.0 - hot) * self.cold_delta_bytes_per_page
    }
}

/// Between two points of the curve it is straight.
fn seen(curve: &[(f64, u64)], seconds: f64) -> f64 {
    let mut before = (0.0, 0);
    for &(at, pages) in curve {
        if at >= seconds {
            let share = (seconds - before.0) / (at - before.0).max(1e-9);
            return before.1 as f64 + share * (pages - before.1) as f64;
        }
        before = (at, pages);
    }
    before.1 as f64
}

/// How a curve of different written pages goes on after its end.
#[derive(Clone, Copy, Debug)]
struct Tail {
    end_s: f64,
    pages: f64,
    /// New pages in the last third of the time.
    new: f64,
    /// Over those in the third before: below 1 when few are left that were not written yet.
    shrinks: f64,
    most: f64,
}

impl Tail {
    fn of(curve: &[(f64, u64)], most_pages: u64) -> Self {
        let (end_s, pages) = curve.last().copied().unwrap_or((1.0, 0));
        let pages = pages as f64;
        let [first, second] = [1.0, 2.0].map(|thirds| seen(curve, end_s * thirds / 3.0));
        let (new, before) = (pages - second, second - first);
        let shrinks = if before > 0.0 { (new / before).min(1.0) } else { 1.0 };
        Tail { end_s, pages, new, shrinks, most: (most_pages as f64).max(pages) }
    }

    /// All pages that are ever written, if each of them is as likely as any other.
    fn set(self) -> f64 {
        let more = match self.shrinks {
            1.0 if self.new > 0.0 => self.most,
            1.0 => 0.0,
            shrinks => self.new * shrinks / (1.0 - shrinks),
        };
        (self.pages + more).min(self.most)
    }

    /// Pages after `seconds`. Some pages are likelier than others, so the curve flattens later than it
    /// would for such a [`Self::set`], but earlier than if all memory was written in the end. The less it
    /// flattens now, the nearer it is to that; how near was found by made-up guests.
    fn at(self, seconds: f64) -> f64 {
        let thirds = (seconds - self.end_s) / (self.end_s / 3.0).max(1e-3);
        let towards = |all: f64| {
            let rest = all - self.pages;
            if rest < 1.0 { 0.0 } else { rest * (1.0 - (-self.new * thirds / rest).exp()) }
        };
        let (even, endless) = (towards(self.set()), towards(self.most));
        self.pages + even + (endless - even) * self.shrinks * ENDLESS
    }
}

/// At most about `count` of the pages, evenly drawn.
fn evenly(set: &PageSet, count: usize) -> Vec<PageIndex> {
    let step = (set.len() as usize).div_ceil(count).max(1);
    set.iter().step_by(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A curve of a guest that writes `rate` pages a second, drawn from each set with its share of the rate.
    fn curve(rate: f64, sets: &[(f64, f64)], seconds: f64) -> f64 {
        let of_set =
            |(set, share): &(f64, f64)| set * (1.0 - (-rate * share * seconds / set).exp());
        sets.iter().map(of_set).sum()
    }

    #[test]
    fn a_curve_goes_on_as_the_guest_does() {
        let even = [(49_152.0, 1.0)];
        let small = [(3000.0, 1.0)];
        let hot_and_cold = [(4915.0, 0.9), (44_237.0, 0.1)];
        let cases: [(&[(f64, f64)], f64); 4] =
            [(&even, 1000.0), (&small, 2000.0), (&hot_and_cold, 5000.0), (&even, 20_000.0)];
        for (sets, rate) in cases {
            let points = (1..=50).map(|tick| f64::from(tick) * 0.1);
            let points: Vec<(f64, u64)> =
                points.map(|at| (at, curve(rate, sets, at) as u64)).collect();
            let tail = Tail::of(&points, 70_000);
            for seconds in [7.0, 10.0, 30.0] {
                let (told, is) = (tail.at(seconds), curve(rate, sets, seconds));
                assert!((0.75..1.35).contains(&(told / is)), "{sets:?} {seconds} s: {told} {is}");
            }
        }
    }

    #[test]
    fn a_guest_that_writes_nothing_or_the_same_for_ever_has_no_other_pages() {
        for pages in [0, 70] {
            let tail = Tail::of(&[(0.1, pages), (1.7, pages), (3.4, pages), (5.0, pages)], 1000);
            assert_eq!((tail.set(), tail.at(60.0)), (pages as f64, pages as f64));
        }
        assert_eq!(Tail::of(&[], 1000).at(10.0), 0.0);
    }

    #[test]
    fn between_two_looks_the_curve_is_straight() {
        let points = [(1.0, 100), (2.0, 150)];
        assert_eq!([0.5, 1.0, 1.5, 9.0].map(|at| seen(&points, at)), [50.0, 100.0, 125.0, 150.0]);
    }
}
