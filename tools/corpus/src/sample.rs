//! Which pages of a guest's memory are taken.

use std::collections::HashSet;

use farfault::codec::is_zero;
use farfault::page::{PAGE_SIZE_BYTES, PageBytes};

/// What is coded together, and so is taken together.
const BLOCK_PAGES: usize = 64;

fn pages(memory: &[u8]) -> &[PageBytes] {
    memory.as_chunks::<PAGE_SIZE_BYTES>().0
}

/// The pages that are not zero and have a content that no page before has, in order.
pub(crate) fn distinct(memory: &[u8]) -> Vec<usize> {
    let mut seen = HashSet::new();
    let numbered = pages(memory).iter().enumerate();
    numbered.filter(|(_, page)| !is_zero(page) && seen.insert(*page)).map(|(at, _)| at).collect()
}

/// The pages that are another content in `new` than in `old`, and not zero, in order.
pub(crate) fn changed(old: &[u8], new: &[u8]) -> Vec<usize> {
    let pairs = pages(old).iter().zip(pages(new)).enumerate();
    pairs.filter(|(_, (old, new))| old != new && !is_zero(new)).map(|(at, _)| at).collect()
}

/// At most `max_pages` of `numbers`: whole blocks that follow each other there, spread evenly over all.
pub(crate) fn blocks(numbers: &[usize], max_pages: usize) -> Vec<usize> {
    let blocks: Vec<&[usize]> = numbers.chunks(BLOCK_PAGES).collect();
    let wanted = blocks.len().min(max_pages / BLOCK_PAGES);
    (0..wanted).flat_map(|at| blocks[at * blocks.len() / wanted]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(first_bytes: &[u8]) -> Vec<u8> {
        let page = |&byte: &u8| {
            let mut page = [0; PAGE_SIZE_BYTES];
            page[0] = byte;
            page
        };
        first_bytes.iter().flat_map(page).collect()
    }

    #[test]
    fn zero_pages_and_second_copies_are_left_out() {
        assert_eq!(distinct(&memory(&[0, 7, 0, 8, 7, 9])), [1, 3, 5]);
    }

    #[test]
    fn changes_are_found_but_for_those_to_zero() {
        assert_eq!(changed(&memory(&[0, 1, 2, 3]), &memory(&[5, 1, 0, 4])), [0, 3]);
    }

    #[test]
    fn whole_blocks_are_taken_from_everywhere() {
        let numbers: Vec<usize> = (0..1000).map(|number| number * 3).collect();
        let taken = blocks(&numbers, 256);
        assert_eq!(taken.len(), 256);
        for block in taken.chunks(BLOCK_PAGES) {
            let start = block[0] / 3;
            assert_eq!(block, &numbers[start..start + BLOCK_PAGES]);
        }
        assert!(taken[0] == 0 && taken[255] > 2000);
        assert_eq!(blocks(&numbers[..10], 256), numbers[..10]);
        assert_eq!(blocks(&[], 256), [0; 0]);
    }
}
