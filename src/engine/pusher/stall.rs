//! The default: each byte goes where it is expected to avoid most waiting.
//!
//! A page that is not there when it is touched costs its thread about a round trip, wherever it lies; so
//! what a page is worth is how likely it is touched soon, and what it costs is its encoded bytes. Three
//! sources tell the likelihood, the surest first:
//!
//! 1. A stream that faults have confirmed: its next pages are all but certain.
//! 2. Faults so far: pages are missed where the guest works. A fault in a piece of memory says that each of
//!    the piece's missing pages is touched at a rate of one in so many missing pages; old faults
//!    count less and less. Pieces are looked at in three sizes. A fault is taken to come from a mixture of
//!    the three, whose shares are learnt from the faults: those of a kernel come in clusters, so that the
//!    block around one is worth much, and those of a workload that goes all over its memory do not.
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
/// What the last fault changes of the shares of the three sizes.
const LEARNING: f32 = 0.03;
/// Where nothing was expected, a page is taken to be touched so often, as a share of one in all pages: one fault in a
/// new place is no proof against the small pieces.
const UNEXPECTED: f32 = 0.1;
/// A region is left for one that is so much better. A thread works at its pace again when all that it touches
/// is there, so one region after the other helps more than each by a part.
const STAY: f32 = 2.0;
/// A region without faults is forgotten when a new one has so much more weight: some 300 faults later. What is left
/// of it goes with the rest.
const FORGET: f32 = 1e4;
/// Weights are brought down when they have grown so much.
const RESCALE_AT: f32 = 1e12;
/// Pages whose cost stands for their region's.
const SAMPLE_PAGES: u64 = 4;

/// How often the missing pages of a region are touched, on a scale of its own: of the region as a whole, and of its
/// pieces.
#[derive(Debug)]
struct Region {
    whole: f32,
    parts: [f32; 16],
    blocks: Box<[f32; 256]>,
    /// The weight of its last fault.
    newest: f32,
    /// Of a page, on average.
    bytes: f32,
    /// Of its best block, at most.
    worth: f32,
}

/// The mixture: which share of the faults the rates of regions, parts and blocks have foretold.
#[derive(Debug)]
struct Sizes([f32; 3]);

impl Sizes {
    /// A fault came at a page for which the sizes had these probabilities: a step of expectation
    /// maximisation.
    fn learn(&mut self, probabilities: [f32; 3]) {
        let all = self.weigh(probabilities);
        for (share, probability) in self.0.iter_mut().zip(probabilities) {
            *share += (*share * probability / all - *share) * LEARNING;
        }
    }

    fn weigh(&self, rates: [f32; 3]) -> f32 {
        self.0.iter().zip(rates).map(|(share, rate)| share * rate).sum()
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Stall {
    streams: Streams,
    /// Where there were faults and are missing pages: those of the last faults only.
    regions: BTreeMap<u64, Region>,
    sizes: Sizes,
    /// The region that the last block was of.
    chosen: Option<u64>,
    weight: f32,
    /// The weights of all faults.
    total: f32,
    last: PageIndex,
    rest: Hottest,
}

impl Default for Stall {
    fn default() -> Self {
        Stall {
            streams: Streams::default(),
            regions: BTreeMap::new(),
            sizes: Sizes([1.0 / 3.0; 3]),
            chosen: None,
            weight: 1.0,
            total: 0.0,
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
    }

    fn next(&mut self, left: &Left<'_>) -> Option<PageRange> {
        if let Some(run) = self.streams.next(left.unsent) {
            return Some(run);
        }
        // What a region is taken to be worth is too much, if anything: it is looked at when it is the best one.
        while let Some((mut number, most)) = self.best_region() {
            let worth = |number| self.regions.get(&number).map_or(0.0, |region| region.worth);
            if let Some(chosen) = self.chosen.filter(|chosen| worth(*chosen) * STAY >= most) {
                number = chosen;
            }
            let region = self.regions.get_mut(&number)?;
            let start = PageIndex(number * REGION_PAGES);
            match region.best_block(start, self.last, &self.sizes, left) {
                Some((worth, block)) if worth >= region.worth => {
                    self.chosen = Some(number);
                    return Some(block);
                }
                Some((worth, _)) => region.worth = worth,
                None => drop(self.regions.remove(&number)),
            }
        }
        self.rest.next(left)
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
                let scores = scores.chain([&mut region.whole, &mut region.newest]);
                scores.for_each(|score| *score /= self.weight);
            }
            self.total /= self.weight;
            self.weight = 1.0;
        }
        let number = page.0 / REGION_PAGES;
        let region = self.regions.entry(number).or_insert_with(|| {
            let start = PageIndex(number * REGION_PAGES);
            Region {
                whole: 0.0,
                parts: [0.0; 16],
                blocks: Box::new([0.0; 256]),
                newest: 0.0,
                bytes: sample_bytes(start, left),
                worth: 0.0,
            }
        });
        let rates = region.rates(page.0 / BLOCK_PAGES % 256);
        let (total, least) = (self.total.max(1.0), UNEXPECTED / left.unsent.pages() as f32);
        self.sizes.learn(rates.map(|rate| rate / total + least));
        self.total += self.weight;
        let rate = |pages: u64| {
            let start = page.0 / pages * pages;
            let missing = left.unsent.count_in(PageRange::new(start, start + pages));
            self.weight / missing.max(1) as f32
        };
        region.whole += rate(REGION_PAGES);
        region.parts[(page.0 / PART_PAGES % 16) as usize] += rate(PART_PAGES);
        region.blocks[(page.0 / BLOCK_PAGES % 256) as usize] += rate(BLOCK_PAGES);
        region.newest = self.weight;
        let forgotten = self.weight / FORGET;
        self.regions.retain(|_, region| region.newest > forgotten);
        for region in self.regions.values_mut() {
            region.worth = region.most(&self.sizes);
        }
    }

    fn best_region(&self) -> Option<(u64, f32)> {
        let regions = self.regions.iter().map(|(number, region)| (*number, region.worth));
        regions.max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

impl Region {
    /// Of the region, and of the part and the block.
    fn rates(&self, block: u64) -> [f32; 3] {
        [self.whole, self.parts[block as usize / 16], self.blocks[block as usize]]
    }

    /// What its best block is worth at most.
    fn most(&self, sizes: &Sizes) -> f32 {
        let most = |rates: &[f32]| rates.iter().copied().fold(0.0, f32::max);
        sizes.weigh([self.whole, most(&self.parts), most(&self.blocks[..])]) / self.bytes
    }

    /// The block with unsent pages that is worth most, and how much; among equals the next after the last fault.
    fn best_block(
        &mut self,
        start: PageIndex,
        last: PageIndex,
        sizes: &Sizes,
        left: &Left<'_>,
    ) -> Option<(f32, PageRange)> {
        let from = last.0.checked_sub(start.0).map_or(0, |pages| pages / BLOCK_PAGES % 256);
        let mut best: Option<(f32, PageRange)> = None;
        for block in (from..256).chain(0..from) {
            let worth = sizes.weigh(self.rates(block)) / self.bytes;
            if best.as_ref().is_some_and(|(most, _)| worth <= *most) {
                continue;
            }
            match piece(start, block, BLOCK_PAGES, left) {
                Some(run) => best = Some((worth, run)),
                None => self.blocks[block as usize] = 0.0,
            }
        }
        best
    }
}

/// The piece of so many pages, where it has unsent ones.
fn piece(start: PageIndex, number: u64, pages: u64, left: &Left<'_>) -> Option<PageRange> {
    let start = start.0 + number * pages;
    let first = left.unsent.first_from(PageIndex(start))?;
    (first.0 < start + pages).then(|| PageRange::new(start, start + pages))
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
    fn a_workload_all_over_memory_does_not_hide_where_a_kernel_works() {
        let mut pusher = Pusher::new(PageSet::full(PAGES), Heat::new(PAGES), PusherKind::Stall);
        // Two of three faults all over 128 MiB, one in clusters of a few pages in a part of another region.
        let cluster = |i: u64| 3 * REGION_PAGES + i % 5 * 700;
        for i in 0..90u64 {
            fault(
                &mut pusher,
                if i % 3 == 0 { cluster(i / 3) + i / 15 * 7 } else { i * i * 7919 % 32_768 },
            );
        }
        let pages = taken(&mut pusher, 5 * 64);
        let near = |page: &PageIndex| (0..5).any(|i| page.0.abs_diff(cluster(i)) < 128);
        assert!(pages.iter().filter(|page| near(page)).count() > 4 * 64, "{pages:?}");
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
