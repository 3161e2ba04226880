//! Pages for the tests of codecs and frames.

use proptest::prelude::*;

use crate::page::{PAGE_SIZE_BYTES, PageBytes};

/// A page of text-like content that depends on `seed`.
pub(crate) fn page_of(seed: u64) -> PageBytes {
    const WORDS: [&[u8]; 6] =
        [b"page ", b"fault ", b"guest=", b"0000", b"\0\0\0\0\0\0\0\0", b"{}; "];
    let mut page = [0; PAGE_SIZE_BYTES];
    let (mut at, mut state) = (0, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    while at < page.len() {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = WORDS[(state >> 33) as usize % WORDS.len()];
        let length = word.len().min(page.len() - at);
        page[at..at + length].copy_from_slice(&word[..length]);
        at += length;
    }
    page
}

/// A page that no codec can make smaller.
pub(crate) fn noise_of(seed: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE_BYTES];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
    }
    page
}

/// Zeros, text, or noise.
pub(crate) fn any_page() -> impl Strategy<Value = PageBytes> {
    prop_oneof![
        1 => Just([0; PAGE_SIZE_BYTES]),
        4 => any::<u64>().prop_map(page_of),
        2 => any::<u64>().prop_map(noise_of),
    ]
}

/// An old page and a new one: unchanged, a few bytes changed, a stretch, or all of it.
pub(crate) fn page_and_change() -> impl Strategy<Value = (PageBytes, PageBytes)> {
    let change = prop_oneof![
        prop::collection::vec((0..PAGE_SIZE_BYTES, any::<u8>()), 0..20).prop_map(Change::Bytes),
        (0..PAGE_SIZE_BYTES, 0..PAGE_SIZE_BYTES).prop_map(|(a, b)| Change::Stretch(a, b)),
        any::<u64>().prop_map(Change::Whole),
    ];
    (any_page(), change).prop_map(|(old, change)| {
        let mut new = old;
        match change {
            Change::Bytes(bytes) => bytes.into_iter().for_each(|(at, value)| new[at] = value),
            Change::Stretch(a, b) => new[a.min(b)..a.max(b)].iter_mut().for_each(|v| *v = !*v),
            Change::Whole(seed) => new = page_of(seed),
        }
        (old, new)
    })
}

#[derive(Clone, Debug)]
enum Change {
    Bytes(Vec<(usize, u8)>),
    Stretch(usize, usize),
    Whole(u64),
}
