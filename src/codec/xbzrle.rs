//! XBZRLE, the delta coding of QEMU's pre-copy, for comparison in experiments.
//!
//! "Xor Based Zero Run Length Encoding" as QEMU's `migration/xbzrle.c` and its document
//! `docs/devel/migration` define it, after Svärd, Hudzia, Tordsson and Elmroth, "Evaluation of Delta
//! Compression Techniques for Efficient Live Migration of Large Virtual Machines", VEE 2011: runs of
//! equal bytes and runs of unequal bytes in turn, each with its length as one or two bytes of LEB128, the
//! unequal bytes with their new values; a run of equal bytes at the end is left out.
//!
//! QEMU sends each page by itself. Here up to 64 share a frame: first the length of each page's coding, in two
//! bytes, then the codings.

use super::DecodeError;
use crate::page::{PAGE_SIZE_BYTES, PageBytes};

/// Bytes that tell how long a page's coding is.
pub const LENGTH_BYTES: usize = 2;

/// Collects the codings of pages that share a frame.
#[derive(Default)]
pub struct RunPacker {
    lengths: Vec<u8>,
    codings: Vec<u8>,
    one: Vec<u8>,
}

impl RunPacker {
    /// Begins anew, keeping the buffers.
    pub fn clear(&mut self) {
        self.lengths.clear();
        self.codings.clear();
    }

    /// Adds a page. False, and nothing is added, when its coding would be longer than itself.
    pub fn push(&mut self, old: &PageBytes, new: &PageBytes) -> bool {
        if !encode(old, new, PAGE_SIZE_BYTES, &mut self.one) {
            return false;
        }
        self.lengths.extend_from_slice(&(self.one.len() as u16).to_le_bytes());
        self.codings.extend_from_slice(&self.one);
        true
    }

    /// Bytes of all codings.
    pub fn coded_bytes(&self) -> usize {
        self.codings.len()
    }

    /// Writes lengths and codings into `packed`, which is overwritten.
    pub fn finish(&self, packed: &mut Vec<u8>) {
        packed.clear();
        packed.extend_from_slice(&self.lengths);
        packed.extend_from_slice(&self.codings);
    }
}

/// The coding of each of `pages` pages, in the order in which they were packed.
///
/// # Errors
/// When the lengths are not exactly those of what follows them.
pub fn unpack(packed: &[u8], pages: usize) -> Result<impl Iterator<Item = &[u8]>, DecodeError> {
    let (lengths, codings) = packed.split_at(packed.len().min(pages * LENGTH_BYTES));
    let (lengths, _) = lengths.as_chunks::<LENGTH_BYTES>();
    let length = |bytes: &[u8; LENGTH_BYTES]| usize::from(u16::from_le_bytes(*bytes));
    let found = lengths.iter().map(length).sum();
    if lengths.len() != pages || found != codings.len() {
        return Err(DecodeError::Runs { found, expected: codings.len() });
    }
    Ok(lengths.iter().scan(codings, move |left, bytes| {
        let (coding, rest) = left.split_at(length(bytes));
        *left = rest;
        Some(coding)
    }))
}

/// Codes `new` against `old` into `coded`, which is overwritten: nothing for an unchanged page. False
/// when the result would be longer than `limit_bytes` (QEMU: a page); `coded` is then of no use.
pub fn encode(old: &PageBytes, new: &PageBytes, limit_bytes: usize, coded: &mut Vec<u8>) -> bool {
    coded.clear();
    let mut at = 0;
    loop {
        let equal = common_prefix_len(&old[at..], &new[at..]);
        at += equal;
        if at == PAGE_SIZE_BYTES {
            return true;
        }
        put_length(coded, equal);
        let run = unequal_prefix_len(&old[at..], &new[at..]);
        put_length(coded, run);
        coded.extend_from_slice(&new[at..at + run]);
        if coded.len() > limit_bytes {
            return false;
        }
        at += run;
        if at == PAGE_SIZE_BYTES {
            return true;
        }
    }
}

/// Turns the old page into the new one. `None` when `coded` is not the coding of a page; `page` may
/// then be half changed.
pub fn decode(mut coded: &[u8], page: &mut PageBytes) -> Option<()> {
    let mut at = 0;
    let mut first = true;
    while !coded.is_empty() {
        let equal = take_length(&mut coded)?;
        let run = take_length(&mut coded)?;
        if (equal == 0 && !first) || run == 0 {
            return None;
        }
        first = false;
        at += equal;
        page.get_mut(at..at + run)?.copy_from_slice(coded.split_off(..run)?);
        at += run;
    }
    Some(())
}

fn common_prefix_len(a: &[u8], b: &[u8]) -> usize {
    let (words_a, _) = a.as_chunks::<8>();
    let (words_b, _) = b.as_chunks::<8>();
    let equal_words = words_a.iter().zip(words_b).take_while(|(a, b)| a == b).count();
    let start = equal_words * 8;
    start + a[start..].iter().zip(&b[start..]).take_while(|(a, b)| a == b).count()
}

fn unequal_prefix_len(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a != b).count()
}

/// At most a page, so 14 bits do.
fn put_length(coded: &mut Vec<u8>, length: usize) {
    if length < 0x80 {
        coded.push(length as u8);
    } else {
        coded.extend_from_slice(&[length as u8 | 0x80, (length >> 7) as u8]);
    }
}

fn take_length(coded: &mut &[u8]) -> Option<usize> {
    let low = *coded.split_off_first()?;
    if low & 0x80 == 0 {
        return Some(usize::from(low));
    }
    let high = *coded.split_off_first()?;
    (high & 0x80 == 0).then(|| usize::from(low & 0x7f) | usize::from(high) << 7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::test_pages::page_and_change;
    use proptest::prelude::*;

    const ZERO: PageBytes = [0; PAGE_SIZE_BYTES];

    fn coded(old: &PageBytes, new: &PageBytes) -> Option<Vec<u8>> {
        let mut coded = Vec::new();
        encode(old, new, PAGE_SIZE_BYTES, &mut coded).then_some(coded)
    }

    // The cases of QEMU's own tests/unit/test-xbzrle.c.

    #[test]
    fn an_unchanged_page_is_nothing() {
        assert_eq!(coded(&ZERO, &ZERO), Some(vec![]));
    }

    #[test]
    fn a_changed_last_byte_is_four_bytes() {
        let mut new = ZERO;
        new[PAGE_SIZE_BYTES - 1] = 1;
        assert_eq!(coded(&ZERO, &new), Some(vec![0xff, 0x1f, 1, 1]));
    }

    #[test]
    fn every_other_byte_changed_is_too_long() {
        let mut new = ZERO;
        (0..PAGE_SIZE_BYTES / 2 - 1).for_each(|i| new[i * 2] = 1);
        assert_eq!(coded(&ZERO, &new), None);
    }

    #[test]
    fn lengths_that_qemu_would_not_write_are_refused() {
        for bad in [&[0][..], &[0, 0], &[1, 2, 7], &[0, 1, 7, 0, 1, 7], &[0x80, 0x80, 1, 7]] {
            assert_eq!(decode(bad, &mut ZERO.clone()), None, "{bad:?}");
        }
        assert_eq!(decode(&[0xff, 0x1f, 2, 1, 1], &mut ZERO.clone()), None, "beyond the page");
    }

    #[test]
    fn lengths_that_are_not_those_of_the_codings_are_refused() {
        for (packed, pages) in [(&[1, 0][..], 1), (&[0, 0, 7], 1), (&[0, 0], 2), (&[0], 1)] {
            assert!(unpack(packed, pages).is_err(), "{packed:?}");
        }
    }

    proptest! {
        #[test]
        fn pages_that_share_a_frame_come_back_in_order(
            pages in prop::collection::vec(page_and_change(), 0..6),
        ) {
            let (mut packer, mut packed) = (RunPacker::default(), Vec::new());
            let fit: Vec<_> = pages.iter().filter(|(old, new)| packer.push(old, new)).collect();
            packer.finish(&mut packed);
            prop_assert_eq!(packed.len(), fit.len() * LENGTH_BYTES + packer.coded_bytes());
            let codings: Vec<_> = unpack(&packed, fit.len()).unwrap().collect();
            prop_assert_eq!(codings.len(), fit.len());
            for (coding, (old, new)) in codings.into_iter().zip(fit) {
                let mut page = *old;
                prop_assert_eq!(decode(coding, &mut page), Some(()));
                prop_assert!(page == *new);
            }
        }

        #[test]
        fn pages_round_trip((old, new) in page_and_change()) {
            let mut bytes = Vec::new();
            prop_assert!(encode(&old, &new, 2 * PAGE_SIZE_BYTES, &mut bytes));
            let mut page = old;
            prop_assert_eq!(decode(&bytes, &mut page), Some(()));
            prop_assert!(page == new);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, &mut ZERO.clone());
        }
    }
}
