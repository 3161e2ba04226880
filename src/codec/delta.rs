//! The difference of a page to an older version of itself: a mask of the 8-byte words that changed,
//! and the new words.
//!
//! New words, not old XOR new: applying them twice does no harm, and they keep the likeness between
//! pages that the compressor behind this lives on (481 against 299 bytes per changed page of real
//! guests, 64 pages together, zstd 1). For the same reason many pages are packed in columns, all masks first
//! and then all words.

use super::DecodeError;
use crate::page::{PAGE_SIZE_BYTES, PageBytes};

/// The unit of change.
pub const WORD_SIZE_BYTES: usize = 8;
/// Words in a page.
pub const WORDS_PER_PAGE: usize = PAGE_SIZE_BYTES / WORD_SIZE_BYTES;
/// Bytes of a mask with one bit per word.
pub const MASK_SIZE_BYTES: usize = WORDS_PER_PAGE / 8;

/// Bytes that one bit-mask byte stands for.
const LINE_SIZE_BYTES: usize = WORD_SIZE_BYTES * 8;

type Line = [u8; LINE_SIZE_BYTES];
type Word = [u8; WORD_SIZE_BYTES];

/// Which words of a page changed: word `i` is bit `i % 8` of byte `i / 8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WordMask([u8; MASK_SIZE_BYTES]);

impl WordMask {
    /// The words in which `new` differs from `old`.
    pub fn between(old: &PageBytes, new: &PageBytes) -> WordMask {
        let mut mask = [0; MASK_SIZE_BYTES];
        let lines = lines_of(old).iter().zip(lines_of(new));
        for (bits, (old, new)) in mask.iter_mut().zip(lines) {
            // Most lines of most changed pages are equal, and that is one wide comparison.
            if old != new {
                *bits = changed_words(old, new);
            }
        }
        WordMask(mask)
    }

    /// How many words changed.
    pub fn count(&self) -> usize {
        count_bits(&self.0)
    }

    /// Appends the words of `page` that the mask names.
    pub fn gather(&self, page: &PageBytes, words: &mut Vec<u8>) {
        for (&bits, line) in self.0.iter().zip(lines_of(page)) {
            if bits == u8::MAX {
                words.extend_from_slice(line);
            } else {
                for word in set_bits(bits) {
                    words.extend_from_slice(&line.as_chunks::<WORD_SIZE_BYTES>().0[word]);
                }
            }
        }
    }
}

/// Collects the deltas of pages that are coded together.
#[derive(Default)]
pub struct DeltaPacker {
    masks: Vec<u8>,
    words: Vec<u8>,
}

impl DeltaPacker {
    /// Begins anew, keeping the buffers.
    pub fn clear(&mut self) {
        self.masks.clear();
        self.words.clear();
    }

    /// Adds a page: `mask` as made by [`WordMask::between`] its base and `new`.
    pub fn push(&mut self, mask: &WordMask, new: &PageBytes) {
        self.masks.extend_from_slice(&mask.0);
        mask.gather(new, &mut self.words);
    }

    /// Changed words of all pages.
    pub fn word_count(&self) -> usize {
        self.words.len() / WORD_SIZE_BYTES
    }

    /// Writes masks and words into `packed`, which is overwritten.
    pub fn finish(&self, packed: &mut Vec<u8>) {
        packed.clear();
        packed.extend_from_slice(&self.masks);
        packed.extend_from_slice(&self.words);
    }
}

/// Bytes of the packed deltas of `pages` pages with `words` changed words in all.
pub fn packed_len(pages: usize, words: usize) -> usize {
    pages * MASK_SIZE_BYTES + words * WORD_SIZE_BYTES
}

/// Packed deltas, checked to be consistent.
#[derive(Clone, Copy, Debug)]
pub struct PackedDeltas<'a> {
    masks: &'a [[u8; MASK_SIZE_BYTES]],
    words: &'a [Word],
}

impl<'a> PackedDeltas<'a> {
    /// The deltas of `pages` pages with the rest of `packed` as their words.
    ///
    /// # Errors
    /// When the masks do not name exactly the words that are there.
    pub fn parse(packed: &'a [u8], pages: usize) -> Result<Self, DecodeError> {
        let (masks, words) = packed.split_at(packed.len().min(pages * MASK_SIZE_BYTES));
        let (masks, _) = masks.as_chunks::<MASK_SIZE_BYTES>();
        let (words, odd_bytes) = words.as_chunks::<WORD_SIZE_BYTES>();
        let found = count_bits(masks.as_flattened());
        if masks.len() != pages || found != words.len() || !odd_bytes.is_empty() {
            return Err(DecodeError::Words { found, expected: words.len() });
        }
        Ok(PackedDeltas { masks, words })
    }

    /// The delta of each page, in the order in which they were packed.
    pub fn iter(&self) -> impl Iterator<Item = Delta<'a>> + use<'a> {
        let PackedDeltas { masks, words } = *self;
        masks.iter().scan(words, |left, mask| {
            let (words, rest) = left.split_at(count_bits(mask));
            *left = rest;
            Some(Delta { mask, words })
        })
    }
}

/// The changed words of one page.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a> {
    mask: &'a [u8; MASK_SIZE_BYTES],
    words: &'a [Word],
}

impl Delta<'_> {
    /// Turns the base into the new page.
    pub fn apply(&self, page: &mut PageBytes) {
        let mut words = self.words;
        let (lines, _) = page.as_chunks_mut::<LINE_SIZE_BYTES>();
        for (&bits, line) in self.mask.iter().zip(lines) {
            if bits == 0 {
                continue;
            }
            let (now, rest) = words.split_at(bits.count_ones() as usize);
            words = rest;
            let (old, _) = line.as_chunks_mut::<WORD_SIZE_BYTES>();
            for (word, new) in set_bits(bits).zip(now) {
                old[word] = *new;
            }
        }
    }
}

fn lines_of(page: &PageBytes) -> &[Line] {
    page.as_chunks::<LINE_SIZE_BYTES>().0
}

fn changed_words(old: &Line, new: &Line) -> u8 {
    let old = old.as_chunks::<WORD_SIZE_BYTES>().0;
    let new = new.as_chunks::<WORD_SIZE_BYTES>().0;
    let changed = old.iter().zip(new).enumerate();
    changed.fold(0, |bits, (word, (old, new))| bits | u8::from(old != new) << word)
}

fn set_bits(mut bits: u8) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = bits.trailing_zeros() as usize;
        bits &= bits.wrapping_sub(1);
        (lowest < 8).then_some(lowest)
    })
}

fn count_bits(mask: &[u8]) -> usize {
    let (words, rest) = mask.as_chunks::<8>();
    let whole: u32 = words.iter().map(|word| u64::from_le_bytes(*word).count_ones()).sum();
    (whole + rest.iter().map(|byte| byte.count_ones()).sum::<u32>()) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::test_pages::{page_and_change, page_of};
    use proptest::prelude::*;

    fn pack(pages: &[(PageBytes, PageBytes)]) -> (Vec<u8>, usize) {
        let mut packer = DeltaPacker::default();
        for (old, new) in pages {
            packer.push(&WordMask::between(old, new), new);
        }
        let mut packed = Vec::new();
        packer.finish(&mut packed);
        (packed, packer.word_count())
    }

    #[test]
    fn a_changed_bit_marks_its_word_and_no_other() {
        let old = page_of(1);
        for at in (0..PAGE_SIZE_BYTES).step_by(61) {
            let mut new = old;
            new[at] ^= 0x10;
            let mask = WordMask::between(&old, &new);
            let word = at / WORD_SIZE_BYTES;
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
        let (packed, words) = pack(&[(old, new)]);
        assert_eq!(packed.len(), packed_len(1, words));
        assert!(PackedDeltas::parse(&packed, 1).is_ok());
        assert!(PackedDeltas::parse(&packed, 2).is_err());
        assert!(PackedDeltas::parse(&packed[..packed.len() - 1], 1).is_err());
        assert!(PackedDeltas::parse(&packed[..30], 1).is_err());
        let mut one_more = packed.clone();
        one_more[0] |= 1;
        assert_eq!(
            PackedDeltas::parse(&one_more, 1).map(|_| ()),
            Err(DecodeError::Words { found: 2, expected: 1 })
        );
    }

    proptest! {
        #[test]
        fn deltas_turn_each_base_into_its_new_page(
            pages in prop::collection::vec(page_and_change(), 1..6),
        ) {
            let (packed, words) = pack(&pages);
            prop_assert_eq!(packed.len(), packed_len(pages.len(), words));
            let deltas = PackedDeltas::parse(&packed, pages.len()).unwrap();
            prop_assert_eq!(deltas.iter().count(), pages.len());
            for (delta, (old, new)) in deltas.iter().zip(&pages) {
                let mut page = *old;
                delta.apply(&mut page);
                prop_assert_eq!(&page, new);
                delta.apply(&mut page);
                prop_assert_eq!(&page, new, "a second application must do no harm");
            }
        }

        #[test]
        fn any_bytes_parse_or_are_refused(
            packed in prop::collection::vec(any::<u8>(), 0..400),
            pages in 0usize..6,
        ) {
            if let Ok(deltas) = PackedDeltas::parse(&packed, pages) {
                let mut page = page_of(0);
                deltas.iter().for_each(|delta| delta.apply(&mut page));
            }
        }
    }
}
