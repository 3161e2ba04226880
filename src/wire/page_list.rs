//! The list of pages of a frame, as ascending runs.
//!
//! The number of runs, then for each run its distance to the end of the one before (to page 0 for the
//! first), times two, plus one if it is longer than one page; then, if so, its length less two. Scattered neighbours
//! cost a byte a page, a whole block of adjacent pages three or four bytes, a million zero pages the same.

use super::error::FrameError;
use super::limits::MAX_RUNS_PER_FRAME;
use super::varint;
use crate::page::{PageIndex, PageRange};

/// Appends `runs`, which ascend, do not touch, and are not empty.
pub(super) fn put(out: &mut Vec<u8>, runs: &[PageRange]) {
    varint::put(out, runs.len() as u64);
    let mut end = 0;
    for run in runs {
        let distance = run.start.0 - end;
        if run.len() == 1 {
            varint::put(out, distance << 1);
        } else {
            varint::put(out, distance << 1 | 1);
            varint::put(out, run.len() - 2);
        }
        end = run.end.0;
    }
}

/// Collects ascending pages into runs.
pub(super) fn collect(pages: impl IntoIterator<Item = PageIndex>, runs: &mut Vec<PageRange>) {
    runs.clear();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end.0 += 1,
            _ => runs.push(PageRange::new(page.0, page.0 + 1)),
        }
    }
}

/// A page list that was checked: ascending, not empty, inside the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageList<'a> {
    coded: &'a [u8],
    pages: u64,
}

impl<'a> PageList<'a> {
    /// Takes the list off the front of `input`.
    pub(super) fn take(
        input: &mut &'a [u8],
        guest_pages: u64,
        max_pages: u64,
    ) -> Result<Self, FrameError> {
        let runs = varint::take(input).ok_or(FrameError::Number { field: "number of runs" })?;
        if runs == 0 || runs > MAX_RUNS_PER_FRAME as u64 {
            return Err(FrameError::Runs { runs });
        }
        let coded = *input;
        let (mut end, mut pages) = (0u64, 0u64);
        for _ in 0..runs {
            let (distance, length) =
                take_run(input).ok_or(FrameError::Number { field: "run of pages" })?;
            let beyond = FrameError::BeyondGuest { guest_pages };
            let start = end.checked_add(distance).ok_or(beyond)?;
            end = start.checked_add(length).filter(|&end| end <= guest_pages).ok_or(beyond)?;
            pages += length;
        }
        if pages > max_pages {
            return Err(FrameError::Pages { pages, max_pages });
        }
        Ok(PageList { coded: &coded[..coded.len() - input.len()], pages })
    }

    /// How many pages are listed.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn runs(&self) -> impl Iterator<Item = PageRange> + use<'a> {
        let (mut coded, mut end) = (self.coded, 0);
        std::iter::from_fn(move || {
            let (distance, length) = take_run(&mut coded)?;
            let start = end + distance;
            end = start + length;
            Some(PageRange::new(start, end))
        })
    }
}

/// Distance and length of the next run.
fn take_run(input: &mut &[u8]) -> Option<(u64, u64)> {
    let first = varint::take(input)?;
    let length = if first & 1 == 0 { 1 } else { varint::take(input)?.checked_add(2)? };
    Some((first >> 1, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GUEST_PAGES: u64 = 1 << 28;

    fn coded(runs: &[PageRange]) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, runs);
        out
    }

    #[test]
    fn a_terabyte_of_zero_pages_is_a_few_bytes() {
        assert!(coded(&[PageRange::new(0, GUEST_PAGES)]).len() <= 6);
    }

    #[test]
    fn pages_beyond_the_guest_are_refused() {
        let list = coded(&[PageRange::new(3, 11)]);
        assert!(PageList::take(&mut &list[..], 11, 64).is_ok());
        let refused = PageList::take(&mut &list[..], 10, 64).map(|_| ());
        assert_eq!(refused, Err(FrameError::BeyondGuest { guest_pages: 10 }));
        let mut overflowing = vec![2];
        varint::put(&mut overflowing, u64::MAX);
        varint::put(&mut overflowing, u64::MAX - 2);
        varint::put(&mut overflowing, u64::MAX);
        varint::put(&mut overflowing, u64::MAX - 2);
        let refused = PageList::take(&mut &overflowing[..], u64::MAX, u64::MAX).map(|_| ());
        assert!(matches!(refused, Err(FrameError::BeyondGuest { .. })), "{refused:?}");
    }

    #[test]
    fn too_many_pages_or_runs_or_none_are_refused() {
        let list = coded(&[PageRange::new(0, 65)]);
        let refused = PageList::take(&mut &list[..], GUEST_PAGES, 64).map(|_| ());
        assert_eq!(refused, Err(FrameError::Pages { pages: 65, max_pages: 64 }));
        let scattered: Vec<_> =
            (0..MAX_RUNS_PER_FRAME as u64 + 1).map(|i| PageRange::new(2 * i, 2 * i + 1)).collect();
        let list = coded(&scattered);
        let refused = PageList::take(&mut &list[..], GUEST_PAGES, u64::MAX).map(|_| ());
        assert_eq!(refused, Err(FrameError::Runs { runs: MAX_RUNS_PER_FRAME as u64 + 1 }));
        let refused = PageList::take(&mut &coded(&[])[..], GUEST_PAGES, 64).map(|_| ());
        assert_eq!(refused, Err(FrameError::Runs { runs: 0 }));
    }

    proptest! {
        #[test]
        fn lists_round_trip(pages in prop::collection::btree_set(0u64..200, 1..64)) {
            let mut runs = Vec::new();
            collect(pages.iter().copied().map(PageIndex), &mut runs);
            let mut bytes = coded(&runs);
            bytes.push(0x55);
            let mut input = &bytes[..];
            let list = PageList::take(&mut input, 200, 64).unwrap();
            prop_assert_eq!(input, &[0x55][..]);
            prop_assert_eq!(list.pages(), pages.len() as u64);
            prop_assert_eq!(list.runs().collect::<Vec<_>>(), runs);
            let back: Vec<u64> = list.runs().flat_map(|run| run.pages()).map(|p| p.0).collect();
            prop_assert_eq!(back, pages.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes_are_a_valid_list_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..40),
            guest_pages in 1u64..10_000,
        ) {
            if let Ok(list) = PageList::take(&mut &bytes[..], guest_pages, u64::MAX) {
                let mut end = 0;
                for run in list.runs() {
                    prop_assert!(run.start.0 >= end && !run.is_empty() && run.end.0 <= guest_pages);
                    end = run.end.0;
                }
            }
        }
    }
}
