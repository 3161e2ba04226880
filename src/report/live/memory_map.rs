//! A guest's memory at the destination as a small grid: each cell stands for a run of pages and shows
//! the stage that most of them have reached.

use serde::{Deserialize, Serialize};

use crate::memory::{PageTable, Stage};
use crate::page::PageIndex;

/// The grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapShape {
    /// Cells in a row.
    pub columns: usize,
    /// Rows.
    pub rows: usize,
}

impl MapShape {
    /// Cells in all.
    pub fn cells(self) -> usize {
        self.columns * self.rows
    }
}

/// The memory at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// Nothing is known of the page.
    pub absent: u64,
    /// An older version is in place.
    pub stale: u64,
    /// The content is right and not yet the guest's.
    pub current: u64,
    /// The same, and it is zero: nothing has to be done before it is touched.
    pub zero: u64,
    /// The guest has it.
    pub mapped: u64,
    /// A letter a cell: `a`, `s`, `c`, `z` or `m`, as above.
    pub cells: String,
}

/// The letters of the stages, in the order of [`MemoryMap`]'s counts.
const LETTERS: [char; 5] = ['a', 's', 'c', 'z', 'm'];

impl MemoryMap {
    /// What the table shows now, page by page: a moving picture.
    pub fn of(table: &PageTable, cells: usize) -> Self {
        let mut total = [0u64; 5];
        let mut letters = String::with_capacity(cells);
        for count in stages_by_cell(table, cells) {
            // Of two that are equal, the later stage.
            let most = (0..5).max_by_key(|stage| count[*stage]).unwrap_or(0);
            letters.push(LETTERS[most]);
            total.iter_mut().zip(count).for_each(|(total, pages)| *total += pages);
        }
        let [absent, stale, current, zero, mapped] = total;
        MemoryMap { absent, stale, current, zero, mapped, cells: letters }
    }

    /// Pages in all.
    pub fn pages(&self) -> u64 {
        self.absent + self.stale + self.current + self.zero + self.mapped
    }
}

/// How many pages of each of `cells` equal parts of the memory are at each stage now, in the order of
/// [`MemoryMap`]'s counts.
pub fn stages_by_cell(table: &PageTable, cells: usize) -> impl Iterator<Item = [u64; 5]> {
    let pages = u128::from(table.pages());
    let edge = move |cell: usize| (cell as u128 * pages / cells as u128) as u64;
    (0..cells).map(move |cell| {
        let mut count = [0u64; 5];
        for page in edge(cell)..edge(cell + 1) {
            let state = table.state(PageIndex(page));
            let stage = match state.stage {
                Stage::Absent => 0,
                // Being written: until that is done, as good as what it was.
                Stage::Stale | Stage::Applying => 1,
                Stage::Current if state.zero => 3,
                Stage::Current => 2,
                Stage::Mapped => 4,
            };
            count[stage] += 1;
        }
        count
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageRange, PageSet, Version};

    #[test]
    fn cells_show_what_most_of_their_pages_are() {
        let table = PageTable::anonymous(50).unwrap();
        let arrive = |page: u64, zero, last| {
            let _ = table.claim(PageIndex(page), Version(1));
            table.finish(PageIndex(page), Version(1), zero, last);
        };
        (10..18).for_each(|page| arrive(page, false, false));
        (20..30).for_each(|page| arrive(page, false, true));
        (30..40).for_each(|page| arrive(page, true, true));
        (40..50).for_each(|page| arrive(page, false, true));
        table.mark_mapped(PageRange::new(40, 50));
        let map = MemoryMap::of(&table, 5);
        assert_eq!(map.cells, "asczm");
        assert_eq!((map.absent, map.stale, map.current, map.zero, map.mapped), (12, 8, 10, 10, 10));
        assert_eq!(map.pages(), 50);
    }

    #[test]
    fn more_cells_than_pages_are_no_trouble() {
        let table = PageTable::anonymous(3).unwrap();
        assert_eq!(table.incomplete(), PageSet::full(3));
        assert_eq!(MemoryMap::of(&table, 7).cells.len(), 7);
    }
}
