//! The difference of a page to an older version of itself: a mask of the units that changed, and
//! the new units. The unit is an 8-byte word where the sender has the older version, and a 64-byte line
//! where it only has its fingerprint ([`super::lines`]).
//!
//! New words, not old XOR new: applying them twice does no harm, and they keep the likeness between
//! pages that the compressor behind this lives on (481 against 299 bytes per changed page of real
//! guests, 64 pages together, zstd 1). For the same reason many pages are packed in columns, all masks
//! first and then all words.

use super::DecodeError;
use crate::page::{PAGE_SIZE_BYTES, PageBytes};

/// A page, and room for one unit more that does not count.
const GATHER_BYTES: usize = PAGE_SIZE_BYTES + 64;

/// Which units of `UNIT` bytes of a page changed, in `MASK` bytes: unit `i` is bit `i % 8` of byte `i / 8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitMask<const MASK: usize, const UNIT: usize>([u8; MASK]);

/// Changed words of 8 bytes.
pub type WordMask = UnitMask<64, 8>;
/// Changed lines of 64 bytes.
pub type LineMask = UnitMask<8, 64>;

impl<const MASK: usize, const UNIT: usize> UnitMask<MASK, UNIT> {
    /// Bytes of a mask.
    pub const BYTES: usize = MASK;
    /// Bytes of a unit.
    pub const UNIT_BYTES: usize = UNIT;
    /// Units in a page.
    pub const UNITS_PER_PAGE: usize = {
        assert!(MASK * 8 * UNIT == PAGE_SIZE_BYTES, "the mask has a bit for each unit of a page");
        MASK * 8
    };

    /// The units in which `new` differs from `old`.
    pub fn between(old: &PageBytes, new: &PageBytes) -> Self {
        let mut mask = [0; MASK];
        let groups = |page| units_of::<UNIT>(page).as_chunks::<8>().0;
        let (old, new) = (groups(old), groups(new));
        for ((bits, old), new) in mask.iter_mut().zip(old).zip(new) {
            // Most of most changed pages is equal, and that is found by wide comparisons, of a length that the
            // compiler knows.
            if old != new {
                let changed = old.iter().zip(new).map(|(old, new)| old != new);
                *bits = changed.enumerate().fold(0, |bits, (at, set)| bits | u8::from(set) << at);
            }
        }
        UnitMask(mask)
    }

    /// The mask with these bytes.
    pub fn from_bytes(mask: [u8; MASK]) -> Self {
        UnitMask(mask)
    }

    /// How many units changed.
    pub fn count(&self) -> usize {
        count_bits(&self.0)
    }

    /// Appends the units of `page` that the mask names.
    pub fn gather(&self, page: &PageBytes, units: &mut Vec<u8>) {
        // Every unit of a changed group is written, and the end only moves on behind those that count:
        // no branch on the single bits, which nothing can predict.
        let mut gathered = [0; GATHER_BYTES];
        let mut end = 0;
        for (&bits, of_bits) in self.0.iter().zip(units_of::<UNIT>(page).chunks(8)) {
            if bits != 0 {
                for (at, unit) in of_bits.iter().enumerate() {
                    gathered[end..end + UNIT].copy_from_slice(unit);
                    end += usize::from(bits >> at & 1) * UNIT;
                }
            }
        }
        units.extend_from_slice(&gathered[..end]);
    }
}

/// Collects the deltas of pages that are coded together.
#[derive(Default)]
pub struct DeltaPacker<const MASK: usize, const UNIT: usize> {
    masks: Vec<u8>,
    units: Vec<u8>,
}

impl<const MASK: usize, const UNIT: usize> DeltaPacker<MASK, UNIT> {
    /// Begins anew, keeping the buffers.
    pub fn clear(&mut self) {
        self.masks.clear();
        self.units.clear();
    }

    /// Adds a page, with the mask of what changed in it.
    pub fn push(&mut self, mask: &UnitMask<MASK, UNIT>, new: &PageBytes) {
        self.masks.extend_from_slice(&mask.0);
        mask.gather(new, &mut self.units);
    }

    /// Changed units of all pages.
    pub fn unit_count(&self) -> usize {
        self.units.len() / UNIT
    }

    /// Writes masks and units into `packed`, which is overwritten.
    pub fn finish(&self, packed: &mut Vec<u8>) {
        packed.clear();
        packed.extend_from_slice(&self.masks);
        packed.extend_from_slice(&self.units);
    }
}

/// Packed deltas, checked to be consistent.
#[derive(Clone, Copy, Debug)]
pub struct PackedDeltas<'a, const MASK: usize, const UNIT: usize> {
    masks: &'a [[u8; MASK]],
    units: &'a [[u8; UNIT]],
}

impl<'a, const MASK: usize, const UNIT: usize> PackedDeltas<'a, MASK, UNIT> {
    /// Bytes of the packed deltas of `pages` pages with `units` changed units in all.
    pub fn packed_len(pages: usize, units: usize) -> usize {
        pages * MASK + units * UNIT
    }

    /// The deltas of `pages` pages with the rest of `packed` as their units.
    ///
    /// # Errors
    /// When the masks do not name exactly the units that are there.
    pub fn parse(packed: &'a [u8], pages: usize) -> Result<Self, DecodeError> {
        let (masks, units) = packed.split_at(packed.len().min(pages * MASK));
        let (masks, _) = masks.as_chunks::<MASK>();
        let (units, odd_bytes) = units.as_chunks::<UNIT>();
        let found = count_bits(masks.as_flattened());
        if masks.len() != pages || found != units.len() || !odd_bytes.is_empty() {
            return Err(DecodeError::Units { found, expected: units.len() });
        }
        Ok(PackedDeltas { masks, units })
    }

    /// The delta of each page, in the order in which they were packed.
    pub fn iter(&self) -> impl Iterator<Item = Delta<'a, MASK, UNIT>> + use<'a, MASK, UNIT> {
        let PackedDeltas { masks, units } = *self;
        masks.iter().scan(units, |left, mask| {
            let (units, rest) = left.split_at(count_bits(mask));
            *left = rest;
            Some(Delta { mask, units })
        })
    }
}

/// The changed units of one page.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a, const MASK: usize, const UNIT: usize> {
    mask: &'a [u8; MASK],
    units: &'a [[u8; UNIT]],
}

impl<const MASK: usize, const UNIT: usize> Delta<'_, MASK, UNIT> {
    /// Turns the base into the new page.
    pub fn apply(&self, page: &mut PageBytes) {
        let mut units = self.units;
        let (old, _) = page.as_chunks_mut::<UNIT>();
        for (&bits, old) in self.mask.iter().zip(old.chunks_mut(8)) {
            if bits == 0 {
                continue;
            }
            let (now, rest) = units.split_at(bits.count_ones() as usize);
            units = rest;
            for (at, new) in set_bits(bits).zip(now) {
                old[at] = *new;
            }
        }
    }
}

fn units_of<const UNIT: usize>(page: &PageBytes) -> &[[u8; UNIT]] {
    page.as_chunks::<UNIT>().0
}

fn set_bits(mut bits: u8) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = bits.trailing_zeros() as usize;
        bits &= bits.wrapping_sub(1);
        (lowest < 8).then_some(lowest)
    })
}

/// How many bits are set.
pub(crate) fn count_bits(mask: &[u8]) -> usize {
    let (words, rest) = mask.as_chunks::<8>();
    let whole: u32 = words.iter().map(|word| u64::from_le_bytes(*word).count_ones()).sum();
    (whole + rest.iter().map(|byte| byte.count_ones()).sum::<u32>()) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::test_pages::{page_and_change, page_of};
    use proptest::prelude::*;

    type WordDeltas<'a> = PackedDeltas<'a, 64, 8>;

    fn pack<const MASK: usize, const UNIT: usize>(
        pages: &[(PageBytes, PageBytes)],
    ) -> (Vec<u8>, usize) {
        let mut packer = DeltaPacker::<MASK, UNIT>::default();
        for (old, new) in pages {
            packer.push(&UnitMask::between(old, new), new);
        }
        let mut packed = Vec::new();
        packer.finish(&mut packed);
        (packed, packer.unit_count())
    }

    fn deltas_apply<const MASK: usize, const UNIT: usize>(pages: &[(PageBytes, PageBytes)]) {
        let (packed, units) = pack::<MASK, UNIT>(pages);
        assert_eq!(packed.len(), PackedDeltas::<MASK, UNIT>::packed_len(pages.len(), units));
        let deltas = PackedDeltas::<MASK, UNIT>::parse(&packed, pages.len()).unwrap();
        assert_eq!(deltas.iter().count(), pages.len());
        for (delta, (old, new)) in deltas.iter().zip(pages) {
            let mut page = *old;
            delta.apply(&mut page);
            assert_eq!(&page, new);
            delta.apply(&mut page);
            assert_eq!(&page, new, "a second application must do no harm");
        }
    }

    #[test]
    fn a_changed_bit_marks_its_word_and_no_other() {
        let old = page_of(1);
        for at in (0..PAGE_SIZE_BYTES).step_by(61) {
            let mut new = old;
            new[at] ^= 0x10;
            let mask = WordMask::between(&old, &new);
            let word = at / WordMask::UNIT_BYTES;
            assert_eq!(mask.count(), 1);
            assert_eq!(mask.0[word / 8], 1 << (word % 8));
        }
    }

    #[test]
    fn an_unchanged_page_has_an_empty_mask() {
        assert_eq!(WordMask::between(&page_of(3), &page_of(3)).count(), 0);
    }

    #[test]
    fn masks_that_name_other_words_than_there_are_get_refused() {
        let (old, mut new) = (page_of(1), page_of(1));
        new[17] ^= 1;
        let (packed, words) = pack::<64, 8>(&[(old, new)]);
        assert_eq!(packed.len(), WordDeltas::packed_len(1, words));
        assert!(WordDeltas::parse(&packed, 1).is_ok());
        assert!(WordDeltas::parse(&packed, 2).is_err());
        assert!(WordDeltas::parse(&packed[..packed.len() - 1], 1).is_err());
        assert!(WordDeltas::parse(&packed[..30], 1).is_err());
        let mut one_more = packed.clone();
        one_more[0] |= 1;
        assert_eq!(
            WordDeltas::parse(&one_more, 1).map(|_| ()),
            Err(DecodeError::Units { found: 2, expected: 1 })
        );
    }

    proptest! {
        #[test]
        fn deltas_turn_each_base_into_its_new_page(
            pages in prop::collection::vec(page_and_change(), 1..6),
        ) {
            deltas_apply::<64, 8>(&pages);
            deltas_apply::<8, 64>(&pages);
        }

        #[test]
        fn any_bytes_parse_or_are_refused(
            packed in prop::collection::vec(any::<u8>(), 0..400),
            pages in 0usize..6,
        ) {
            let mut page = page_of(0);
            if let Ok(deltas) = WordDeltas::parse(&packed, pages) {
                deltas.iter().for_each(|delta| delta.apply(&mut page));
            }
            if let Ok(deltas) = PackedDeltas::<8, 64>::parse(&packed, pages) {
                deltas.iter().for_each(|delta| delta.apply(&mut page));
            }
        }
    }
}
