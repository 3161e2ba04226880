//! XBZRLE, the delta coding of QEMU's pre-copy, for comparison in experiments.
//!
//! "Xor Based Zero Run Length Encoding" as QEMU's `migration/xbzrle.c` and its document
//! `docs/devel/migration` define it, after Svärd, Hudzia, Tordsson and Elmroth, "Evaluation of Delta
//! Compression Techniques for Efficient Live Migration of Large Virtual Machines", VEE 2011: runs of
//! equal bytes and runs of unequal bytes in turn, each with its length as one or two bytes of LEB128, the
//! unequal bytes with their new values; a run of equal bytes at the end is left out.

use crate::page::{PAGE_SIZE_BYTES, PageBytes};

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

    proptest! {
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
