//! Entry points for fuzzing, shared by the tests here and the targets in `fuzz/`: anything that the
//! network can say as a page frame.

use super::limits::MAX_PAGES_PER_FRAME;
use super::{DecodeScratch, DecodedPage, Frame};
use crate::codec::delta::{PackedDeltas, WORDS_PER_PAGE, packed_len};
use crate::codec::{CodecId, block};
use crate::page::{PAGE_SIZE_BYTES, PageBytes};

/// Pages of the guest that the frames are read for.
pub const GUEST_PAGES: u64 = 10_000;

/// Reads `data` as frames that follow each other and decodes them, with made-up bases. Must not
/// panic, whatever the data.
///
/// # Panics
/// When a frame that was accepted names pages that do not ascend or that the guest does not have.
pub fn fuzz_frames(data: &[u8]) {
    let mut scratch = DecodeScratch::default();
    let mut rest = data;
    while let Ok((frame, left)) = Frame::parse(rest, GUEST_PAGES) {
        assert_eq!(frame.len_bytes(), rest.len() - left.len());
        rest = left;
        let pages: Vec<_> = frame.pages().collect();
        assert_eq!(pages.len() as u64, frame.page_count());
        assert!(pages.is_sorted_by(|a, b| a.page < b.page));
        assert!(pages.iter().all(|p| p.page.0 < GUEST_PAGES));
        assert!(pages.iter().all(|p| p.base.is_none_or(|base| base.version < frame.version())));
        let decoded = frame.decode(&mut scratch, |position, base, bytes: &mut PageBytes| {
            *bytes = [base.page.0 as u8; PAGE_SIZE_BYTES];
            position % 7 != 3
        });
        if let Ok(decoded) = decoded {
            for position in 0..pages.len() {
                let without_base = frame.codec().is_delta() && position % 7 == 3;
                assert_eq!(decoded.get(position) == DecodedPage::NoBase, without_base);
            }
        }
    }
}

/// Decodes `data` as the body of a frame, by each codec: the first three bytes choose the sizes that a header
/// would announce. A checksum keeps nearly all of this out of [`fuzz_frames`].
pub fn fuzz_bodies(data: &[u8]) {
    let Some((&[pages, low, high], body)) = data.split_first_chunk() else { return };
    let pages = usize::from(pages) % MAX_PAGES_PER_FRAME + 1;
    let words = usize::from(u16::from_le_bytes([low, high])) % (pages * WORDS_PER_PAGE + 1);
    let mut plain = vec![0; packed_len(pages, words)];
    let unpacked = block::decode_lz4(body, &mut plain, CodecId::DeltaLz4);
    for packed in [Some(body), unpacked.is_ok().then_some(&plain[..])].into_iter().flatten() {
        if let Ok(deltas) = PackedDeltas::parse(packed, pages) {
            let mut page = [0; PAGE_SIZE_BYTES];
            deltas.iter().for_each(|delta| delta.apply(&mut page));
        }
    }
}
