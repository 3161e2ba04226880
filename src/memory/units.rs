//! Which pages the files of a guest's RAM can only be mapped together.

use super::MemoryLayout;
use crate::page::{PageIndex, PageRange};

/// The units of a guest's RAM: pages that are mapped together or not at all. On shared memory each page is one; on
/// hugetlbfs a unit has the 512 pages of a huge page.
#[derive(Clone, Debug)]
pub struct Units {
    layout: MemoryLayout,
    /// The pages of each region, and of a unit there.
    regions: Vec<(PageRange, u64)>,
    single: bool,
}

impl Units {
    /// `unit_pages`: pages of a unit in each region, of which the region has a whole number.
    pub(super) fn new(layout: &MemoryLayout, unit_pages: impl Iterator<Item = u64>) -> Self {
        let regions: Vec<_> =
            unit_pages.enumerate().map(|(at, pages)| (layout.range_of(at), pages)).collect();
        assert!(regions.iter().all(|(region, pages)| region.len().is_multiple_of(*pages)));
        let single = regions.iter().all(|(_, pages)| *pages == 1);
        Units { layout: layout.clone(), regions, single }
    }

    /// The regions and how their pages are numbered.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// True when every unit is a single page.
    pub fn are_single(&self) -> bool {
        self.single
    }

    /// The unit that `page` is in.
    ///
    /// # Panics
    /// When the page is beyond the guest.
    pub fn of(&self, page: PageIndex) -> PageRange {
        if self.single {
            return PageRange::new(page.0, page.0 + 1);
        }
        let (region, pages) = self.region_of(page);
        let start = page.0 - (page.0 - region.start.0) % pages;
        PageRange::new(start, start + pages)
    }

    /// Pages from `from` on that may be mapped together, at most `longest` of them if their units are single ones:
    /// else one unit, which `from` is to be the begin of.
    pub fn stretch(&self, from: PageIndex, longest: u64) -> PageRange {
        let (region, pages) = self.region_of(from);
        let length = if pages == 1 { longest } else { pages };
        PageRange { start: from, end: PageIndex((from.0 + length).min(region.end.0)) }
    }

    fn region_of(&self, page: PageIndex) -> (PageRange, u64) {
        let found = self.regions.iter().find(|(region, _)| region.contains(page));
        *found.unwrap_or_else(|| panic!("{page:?} beyond the guest"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RegionLayout;
    use crate::page::PAGE_SIZE_BYTES;

    #[test]
    fn units_are_counted_from_the_begin_of_their_region() {
        let region = |name: &str, pages: u64| RegionLayout {
            name: name.to_owned(),
            size_bytes: pages * PAGE_SIZE_BYTES as u64,
        };
        let layout = MemoryLayout::new(vec![region("a", 100), region("b", 1024)]);
        let units = Units::new(&layout, [1, 512].into_iter());
        assert!(!units.are_single());
        assert_eq!(units.of(PageIndex(99)), PageRange::new(99, 100));
        assert_eq!(units.of(PageIndex(100)), PageRange::new(100, 612));
        assert_eq!(units.of(PageIndex(611)), PageRange::new(100, 612));
        assert_eq!(units.of(PageIndex(612)), PageRange::new(612, 1124));
        assert_eq!(units.stretch(PageIndex(90), 64), PageRange::new(90, 100));
        assert_eq!(units.stretch(PageIndex(10), 64), PageRange::new(10, 74));
        assert_eq!(units.stretch(PageIndex(612), 64), PageRange::new(612, 1124));
        assert!(Units::new(&layout, [1, 1].into_iter()).are_single());
    }
}
