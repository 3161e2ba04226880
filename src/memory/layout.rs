//! Which RAM regions a guest has and how their pages are numbered.

use serde::{Deserialize, Serialize};

use crate::page::{PAGE_SIZE_BYTES, PageIndex, PageRange};

/// One block of guest RAM: a memory backend, a NUMA node's share, a DIMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionLayout {
    /// The monitor's stable name of the block (QEMU: the memory backend's id), the same on both hosts.
    pub name: String,
    /// Size in bytes, a multiple of the page size.
    pub size_bytes: u64,
}

impl RegionLayout {
    /// Size in pages.
    pub fn pages(&self) -> u64 {
        self.size_bytes / PAGE_SIZE_BYTES as u64
    }
}

/// All RAM of a guest. Pages are numbered through in the order of the regions, which is the order
/// of their names, so that both hosts number alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    regions: Vec<RegionLayout>,
}

impl MemoryLayout {
    /// The layout of these regions, sorted by name.
    ///
    /// # Panics
    /// When a size is not a multiple of the page size, or two regions have the same name: a monitor
    /// does not make such RAM.
    pub fn new(mut regions: Vec<RegionLayout>) -> Self {
        regions.sort_by(|a, b| a.name.cmp(&b.name));
        assert!(regions.windows(2).all(|w| w[0].name != w[1].name), "two regions of one name");
        assert!(regions.iter().all(|r| r.size_bytes.is_multiple_of(PAGE_SIZE_BYTES as u64)));
        MemoryLayout { regions }
    }

    /// The regions in page order.
    pub fn regions(&self) -> &[RegionLayout] {
        &self.regions
    }

    /// Pages of the whole guest.
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(RegionLayout::pages).sum()
    }

    /// Bytes of the whole guest.
    pub fn size_bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE_BYTES as u64
    }

    /// The pages of the region at place `index` in [`Self::regions`].
    pub fn range_of(&self, index: usize) -> PageRange {
        let start: u64 = self.regions[..index].iter().map(RegionLayout::pages).sum();
        PageRange::new(start, start + self.regions[index].pages())
    }

    /// Which region `page` is in, and its offset there in bytes; `None` beyond the guest.
    pub fn locate(&self, page: PageIndex) -> Option<(usize, u64)> {
        let mut first = 0;
        for (index, region) in self.regions.iter().enumerate() {
            if page.0 < first + region.pages() {
                return Some((index, (page.0 - first) * PAGE_SIZE_BYTES as u64));
            }
            first += region.pages();
        }
        None
    }

    /// Cuts `range` where regions meet: index of the region and the pages in it, never empty. Pages
    /// beyond the guest are left out.
    pub fn split(&self, range: PageRange) -> impl Iterator<Item = (usize, PageRange)> + '_ {
        let mut first = 0;
        self.regions.iter().enumerate().filter_map(move |(index, region)| {
            let (start, end) = (first, first + region.pages());
            first = end;
            let piece = PageRange::new(range.start.0.max(start), range.end.0.min(end));
            (!piece.is_empty()).then_some((index, piece))
        })
    }
}
