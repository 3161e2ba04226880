//! Which parts of guest RAM can have anything to be seen in a page table.
//!
//! Protecting what was never touched fills page tables with nothing but marks: 2 MiB for a GiB of guest, and the time to
//! look at them ever after; and so does a scan of it, on kernels that take it for written. So what is neither in the
//! file nor was ever found there is left out. It is looked for anew in each collection, as far as it may have come to be
//! since: that takes a time that grows with the number of gaps, and no time in a guest all of which was touched.

use super::huge::HUGE_PAGES;
use crate::memory::{GuestMemory, MemoryError};
use crate::page::{PAGE_SIZE_BYTES, PageIndex, PageRange, PageSet};

/// The 2 MiB of the guest's addresses in which any page was ever found, as far as they are looked at.
pub(super) struct Touched {
    regions: Vec<RegionUnits>,
    /// By number of the unit, over all regions.
    units: PageSet,
}

/// The units of a region. Asked for a part of a huge page, the kernel splits it, which leaves nothing mapped of shared
/// memory, and forgets what was written. So these are what it is asked for.
struct RegionUnits {
    pages: PageRange,
    /// Pages by which the region begins behind the begin of its first unit.
    lead_pages: u64,
    first_unit: u64,
}

impl RegionUnits {
    fn unit_of(&self, page: PageIndex) -> u64 {
        self.first_unit + (page.0 - self.pages.start.0 + self.lead_pages) / HUGE_PAGES
    }

    fn units_of(&self, piece: PageRange) -> PageRange {
        match piece.len() {
            0 => PageRange::new(self.first_unit, self.first_unit),
            _ => {
                let last = PageIndex(piece.end.0 - 1);
                PageRange::new(self.unit_of(piece.start), self.unit_of(last) + 1)
            }
        }
    }

    fn pages_of(&self, units: PageRange) -> PageRange {
        let page_at = |unit: PageIndex| {
            let behind = (unit.0 - self.first_unit) * HUGE_PAGES;
            self.pages.start.0 + behind.saturating_sub(self.lead_pages)
        };
        PageRange::new(page_at(units.start), page_at(units.end).min(self.pages.end.0))
    }
}

impl Touched {
    /// Nothing yet of `memory`, which the guest's process has mapped at `addresses`.
    pub(super) fn nothing_of(memory: &GuestMemory, addresses: &[u64]) -> Self {
        let mut first_unit = 0;
        let layout = memory.layout();
        let regions = addresses.iter().enumerate().map(|(number, address)| {
            let lead_pages = address / PAGE_SIZE_BYTES as u64 % HUGE_PAGES;
            let region = RegionUnits { pages: layout.range_of(number), lead_pages, first_unit };
            first_unit = region.units_of(region.pages).end.0;
            region
        });
        let regions = regions.collect();
        Touched { regions, units: PageSet::empty(first_unit) }
    }

    /// Takes in what has come to be there in `range`, or in the units at its ends, and gives the units that are new, as far
    /// as they are the guest's.
    pub(super) fn take_in(
        &mut self,
        memory: &GuestMemory,
        range: PageRange,
    ) -> Result<Vec<PageRange>, MemoryError> {
        let mut new = Vec::new();
        for (number, piece) in memory.layout().split(range) {
            let region = &self.regions[number];
            let gaps: Vec<PageRange> = self.units.gaps_in(region.units_of(piece)).collect();
            for mut gap in gaps {
                while let Some(page) = memory.first_populated(region.pages_of(gap))? {
                    let unit = region.unit_of(page);
                    self.units.insert(PageIndex(unit));
                    let pages = region.pages_of(PageRange::new(unit, unit + 1));
                    match new.last_mut() {
                        Some(PageRange { end, .. }) if *end == pages.start => *end = pages.end,
                        _ => new.push(pages),
                    }
                    gap.start = PageIndex(unit + 1);
                }
            }
        }
        Ok(new)
    }

    /// What of `range` was touched, and of the units at its ends: whole units as far as they are the guest's, each piece in
    /// one region.
    pub(super) fn within(&self, memory: &GuestMemory, range: PageRange) -> Vec<PageRange> {
        let mut pieces = Vec::new();
        for (number, piece) in memory.layout().split(range) {
            let region = &self.regions[number];
            let runs = self.units.runs_in(region.units_of(piece));
            pieces.extend(runs.map(|run| region.pages_of(run)));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{MemoryLayout, RegionLayout};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Wherever the regions lie, whatever is written in any order: all that is there is within, in whole units, and no
        /// unit of which nothing is there.
        #[test]
        fn what_is_there_is_within(
            sizes in prop::collection::vec(1u64..2000, 1..4),
            leads in prop::collection::vec(0u64..HUGE_PAGES, 4),
            writes in prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 0..6), 1..4),
            looks in prop::collection::vec((any::<prop::sample::Index>(), 0u64..3000), 4),
        ) {
            let region = |(number, pages): (usize, &u64)| RegionLayout {
                name: format!("r{number}"),
                size_bytes: pages * PAGE_SIZE_BYTES as u64,
            };
            let layout = MemoryLayout::new(sizes.iter().enumerate().map(region).collect());
            let memory = GuestMemory::create(&layout).unwrap();
            let pages = memory.pages();
            let addresses: Vec<u64> = (0..sizes.len())
                .map(|number| (1 << 40) + ((number as u64) << 30) + leads[number] * PAGE_SIZE_BYTES as u64)
                .collect();
            let unit_of = |page: u64| {
                let (number, _) = layout.split(PageRange::new(page, page + 1)).next().unwrap();
                let behind = page - layout.range_of(number).start.0;
                (number, (behind + leads[number]) / HUGE_PAGES)
            };
            let mut touched = Touched::nothing_of(&memory, &addresses);
            let mut there = std::collections::BTreeSet::new();
            for (written, (start, length)) in writes.iter().zip(&looks) {
                for page in written {
                    let page = page.index(pages as usize) as u64;
                    memory.write_page(PageIndex(page), &[1; PAGE_SIZE_BYTES]).unwrap();
                    there.insert(unit_of(page));
                }
                let start = start.index(pages as usize) as u64;
                let range = PageRange::new(start, (start + length).min(pages));
                let before: Vec<u64> =
                    touched.within(&memory, range).iter().flat_map(PageRange::pages).map(|page| page.0).collect();
                let new = touched.take_in(&memory, range).unwrap();
                let mut all: Vec<u64> =
                    new.iter().flat_map(PageRange::pages).map(|page| page.0).chain(before).collect();
                all.sort_unstable();
                let within: Vec<u64> =
                    touched.within(&memory, range).iter().flat_map(|run| run.start.0..run.end.0).collect();
                let units: std::collections::BTreeSet<_> = range.pages().map(|page| unit_of(page.0)).collect();
                let expected: Vec<u64> = (0..pages)
                    .filter(|page| units.contains(&unit_of(*page)) && there.contains(&unit_of(*page)))
                    .collect();
                prop_assert_eq!(&all, &expected);
                prop_assert_eq!(within, expected);
            }
        }
    }
}
