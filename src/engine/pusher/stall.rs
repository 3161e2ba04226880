//! The default: each byte goes where it is expected to avoid most waiting.
//!
//! A page that is not there when it is touched costs its thread about a round trip, wherever it lies; so
//! what a page is worth is how likely it is touched soon, and what it costs is its encoded bytes. Three
//! sources tell the likelihood, the surest first:
//!
//! 1. A stream that faults have confirmed: its next pages are all but certain.
//! 2. Faults so far: pages are missed where the guest works. A fault in a region says that each of
//!    the region's missing pages is touched at a rate of one in so many missing pages; old faults
//!    count less and less. Regions are looked at in three sizes, from the largest down, so that few
//!    faults already tell something.
//! 3. Writes in pre-copy, for regions of which no fault tells.

use std::collections::BTreeMap;

use super::heat::Hottest;
use super::streams::Streams;
use super::{BundleStats, Left, Policy, Wanted};
use crate::page::{PageIndex, PageRange};

/// 64 MiB, in 16 parts of 4 MiB, each in 16 blocks of 256 KiB.
const REGION_PAGES: u64 = PART_PAGES * 16;
const PART_PAGES: u64 = BLOCK_PAGES * 16;
const BLOCK_PAGES: u64 = 64;
/// The weight of a fault beside the one before it: after 23 further ones it counts half.
const GROWTH: f32 = 1.03;
/// A region is left for one that is so much better. A thread works at its pace again when all that it touches
/// is there, so one region after the other helps more than each by a part.
const STAY: f32 = 2.0;
/// Weights are brought down when they have grown so much.
const RESCALE_AT: f32 = 1e12;
/// Pages whose cost stands for their region's.
const SAMPLE_PAGES: u64 = 4;

/// How often the missing pages of a region are touched, on a scale of its own.
#[derive(Debug)]
struct Region {
    score: f32,
    parts: [f32; 16],
    blocks: Box<[f32; 256]>,
    /// Of a page, on average.
    bytes: f32,
}

impl Region {
    fn worth(&self) -> f32 {
        self.score / self.bytes
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Stall {
    streams: Streams,
    /// Where there were faults and are missing pages; at most one for each 64 MiB.
    regions: BTreeMap<u64, Region>,
    /// The best region, until a fault or its end.
    chosen: Option<u64>,
    weight: f32,
    last: PageIndex,
    rest: Hottest,
}

impl Default for Stall {
    fn default() -> Self {
        Stall {
            streams: Streams::default(),
            regions: BTreeMap::new(),
            chosen: None,
            weight: 1.0,
            last: PageIndex(0),
            rest: Hottest::default(),
        }
    }
}

impl Policy for Stall {
    fn fault(&mut self, wanted: Wanted, left: &Left<'_>, room: usize, bundle: &mut Vec<PageIndex>) {
        self.last = wanted.page;
        // What a stream touches tells of the stream, and not of what lies around it.
        if !self.streams.fault(wanted, left, room, bundle) {
            self.note(wanted.page, left);
        }
        if let (Some(chosen), Some(best)) = (self.chosen, self.best_region()) {
            let worth = |number| self.regions.get(&number).map_or(0.0, Region::worth);
            if worth(best) > STAY * worth(chosen) {
                self.chosen = None;
            }
        }
    }

    fn next(&mut self, left: &Left<'_>) -> Option<PageRange> {
        if let Some(run) = self.streams.next(left.unsent) {
            return Some(run);
        }
        loop {
            let Some(number) = self.chosen.or_else(|| self.best_region()) else {
                return self.rest.next(left);
            };
            self.chosen = Some(number);
            let start = number * REGION_PAGES;
            let region = PageRange::new(start, start + REGION_PAGES);
            if let Some(block) = self.best_block(number, region, left) {
                return Some(block);
            }
            self.regions.remove(&number);
            self.chosen = None;
        }
    }

    fn bundles(&self) -> BundleStats {
        self.streams.stats()
    }
}

impl Stall {
    fn note(&mut self, page: PageIndex, left: &Left<'_>) {
        self.weight *= GROWTH;
        if self.weight > RESCALE_AT {
            for region in self.regions.values_mut() {
                let scores = region.parts.iter_mut().chain(region.blocks.iter_mut());
                scores.chain([&mut region.score]).for_each(|score| *score /= self.weight);
            }
            self.weight = 1.0;
        }
        let rate = |pages: u64| {
            let start = page.0 / pages * pages;
            let missing = left.unsent.count_in(PageRange::new(start, start + pages));
            self.weight / missing.max(1) as f32
        };
        let number = page.0 / REGION_PAGES;
        let region = self.regions.entry(number).or_insert_with(|| {
            let start = PageIndex(number * REGION_PAGES);
            Region {
                score: 0.0,
                parts: [0.0; 16],
                blocks: Box::new([0.0; 256]),
                bytes: sample_bytes(start, left),
            }
        });
        region.score += rate(REGION_PAGES);
        region.parts[(page.0 / PART_PAGES % 16) as usize] += rate(PART_PAGES);
        region.blocks[(page.0 / BLOCK_PAGES % 256) as usize] += rate(BLOCK_PAGES);
    }

    fn best_region(&self) -> Option<u64> {
        let regions = self.regions.iter();
        regions.max_by(|a, b| a.1.worth().total_cmp(&b.1.worth())).map(|(number, _)| *number)
    }

    /// The best part, and in it the best block; among equals the next after the last fault.
    fn best_block(&self, number: u64, region: PageRange, left: &Left<'_>) -> Option<PageRange> {
        let scores = self.regions.get(&number)?;
        let from = if region.contains(self.last) { self.last.0 - region.start.0 } else { 0 };
        let part = best(&scores.parts, from / PART_PAGES, |part| {
            piece(region.start, part, PART_PAGES, left).is_some()
        })?;
        let blocks = &scores.blocks[part as usize * 16..][..16];
        let part = PageIndex(region.start.0 + part * PART_PAGES);
        let from = self.last.0.saturating_sub(part.0) / BLOCK_PAGES;
        let block = best(blocks, if from < 16 { from } else { 0 }, |block| {
            piece(part, block, BLOCK_PAGES, left).is_some()
        })?;
        piece(part, block, BLOCK_PAGES, left)
    }
}

/// The piece of so many pages, where it has unsent ones.
fn piece(start: PageIndex, number: u64, pages: u64, left: &Left<'_>) -> Option<PageRange> {
    let start = start.0 + number * pages;
    let first = left.unsent.first_from(PageIndex(start))?;
    (first.0 < start + pages).then(|| PageRange::new(start, start + pages))
}

/// The highest of 16 scores, among equals the first from `from` on, around.
fn best(scores: &[f32], from: u64, is_left: impl Fn(u64) -> bool) -> Option<u64> {
    let order = (from..16).chain(0..from).filter(|index| is_left(*index));
    order.reduce(
        |best, index| {
            if scores[index as usize] > scores[best as usize] { index } else { best }
        },
    )
}

fn sample_bytes(start: PageIndex, left: &Left<'_>) -> f32 {
    let (mut bytes, mut sampled, mut at) = (0, 0, start);
    while sampled < SAMPLE_PAGES {
        let Some(page) = left.unsent.first_from(at) else { break };
        bytes += (left.encoded_bytes)(page);
        sampled += 1;
        at = PageIndex(page.0 + REGION_PAGES / SAMPLE_PAGES);
    }
    bytes.max(1) as f32 / sampled.max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::super::{Pusher, PusherKind};
    use super::*;
    use crate::engine::heat::Heat;
    use crate::page::PageSet;

    const PAGES: u64 = 1 << 18;

    fn taken(pusher: &mut Pusher, count: usize) -> Vec<PageIndex> {
        let mut pages = Vec::new();
        pusher.take(count, &|_| 1000, &mut pages);
        pages
    }

    fn fault(pusher: &mut Pusher, page: u64) {
        let wanted = Wanted { page: PageIndex(page), thread: 1 };
        pusher.request(wanted, 0, &|_| 1000, &mut Vec::new());
    }

    #[test]
    fn what_is_pushed_follows_where_the_faults_are() {
        let mut pusher = Pusher::new(PageSet::full(PAGES), Heat::new(PAGES), PusherKind::Stall);
        // Nine of ten faults in one small part of memory.
        let hot = |page: u64| (100_000..104_000).contains(&page);
        for i in 0..50u64 {
            let scattered = i * i * 7919;
            fault(&mut pusher, if i % 10 == 0 { scattered } else { 100_000 + scattered % 4000 });
        }
        let pages = taken(&mut pusher, 2000);
        let hits = pages.iter().filter(|page| hot(page.0)).count();
        assert!(hits > 1800, "{hits} of {}", pages.len());
    }

    #[test]
    fn of_two_regions_the_one_whose_pages_cost_less_goes_first() {
        let mut pusher = Pusher::new(PageSet::full(PAGES), Heat::new(PAGES), PusherKind::Stall);
        let (whole, delta) = (5 * REGION_PAGES, 9 * REGION_PAGES);
        let cost = move |page: PageIndex| if page.0 >= delta { 200 } else { 2000 };
        for page in [delta + 7000, whole + 7000] {
            let wanted = Wanted { page: PageIndex(page), thread: 1 };
            pusher.request(wanted, 0, &cost, &mut Vec::new());
        }
        let mut pages = Vec::new();
        pusher.take(64, &cost, &mut pages);
        assert!(pages.iter().all(|page| page.0 >= delta), "{pages:?}");
    }

    #[test]
    fn old_faults_count_less() {
        let mut pusher = Pusher::new(PageSet::full(PAGES), Heat::new(PAGES), PusherKind::Stall);
        for i in 0..20 {
            fault(&mut pusher, 7 * i * i);
        }
        for i in 0..1000 {
            fault(&mut pusher, 200_000 + (7 * i * i) % 10_000);
        }
        assert!(taken(&mut pusher, 64).iter().all(|page| page.0 >= 3 * REGION_PAGES));
    }
}
