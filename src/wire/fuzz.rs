//! Entry points for fuzzing, shared by the tests here and the targets in `fuzz/`: anything that the
//! network can say as a page frame.

use super::limits::MAX_PAGES_PER_FRAME;
use super::{DecodeScratch, DecodedPage, Frame};
use crate::codec::delta::{LineMask, PackedDeltas, WordMask};
use crate::codec::pack::Decompressor;
use crate::codec::{CodecId, Content, Packing, xbzrle};
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
        let content = frame.codec().content();
        assert_eq!(pages.len() as u64, frame.page_count());
        assert!(pages.is_sorted_by(|a, b| a.page < b.page));
        assert!(pages.iter().all(|p| p.page.0 < GUEST_PAGES));
        assert!(pages.iter().all(|p| p.base.is_some() == content.has_bases()));
        assert!(pages.iter().filter_map(|p| p.base).all(|b| b.page.0 < GUEST_PAGES));
        let decoded = frame.decode(&mut scratch, |position, base, bytes: &mut PageBytes| {
            *bytes = [base.page.0 as u8; PAGE_SIZE_BYTES];
            position % 7 != 3
        });
        if let Ok(decoded) = decoded {
            for position in 0..pages.len() {
                let without_base =
                    content.has_bases() && content != Content::Unchanged && position % 7 == 3;
                assert_eq!(decoded.get(position) == DecodedPage::NoBase, without_base);
            }
        }
    }
}

/// Decodes `data` as the body of a frame, by each codec: the first three bytes choose the sizes that a
/// header would announce. A checksum keeps nearly all of this out of [`fuzz_frames`].
pub fn fuzz_bodies(data: &[u8]) {
    let Some((&[pages, low, high], body)) = data.split_first_chunk() else { return };
    let pages = usize::from(pages) % MAX_PAGES_PER_FRAME + 1;
    let words =
        usize::from(u16::from_le_bytes([low, high])) % (pages * WordMask::UNITS_PER_PAGE + 1);
    let mut plain = vec![0; pages * WordMask::BYTES + words * WordMask::UNIT_BYTES];
    let mut decompressor = Decompressor::default();
    apply_deltas(body, pages);
    for codec in CodecId::ALL {
        let unpacked = match codec.packing() {
            Packing::Plain => continue,
            Packing::ZstdOld => {
                let (masks, words) = plain.split_at_mut(pages * WordMask::BYTES);
                let old = [b'o'; 1000];
                let coded = decompressor.unpack_masks(body, masks);
                coded.and_then(|coded| decompressor.unpack_words(coded, &old, words))
            }
            Packing::Lz4 | Packing::Zstd => decompressor.unpack(codec, body, &mut plain),
        };
        if unpacked.is_ok() {
            apply_deltas(&plain, pages);
        }
    }
    let _ = xbzrle::decode(body, &mut [0; PAGE_SIZE_BYTES]);
}

fn apply_deltas(packed: &[u8], pages: usize) {
    let mut page = [0; PAGE_SIZE_BYTES];
    if let Ok(deltas) =
        PackedDeltas::<{ WordMask::BYTES }, { WordMask::UNIT_BYTES }>::parse(packed, pages)
    {
        deltas.iter().for_each(|delta| delta.apply(&mut page));
    }
    if let Ok(deltas) =
        PackedDeltas::<{ LineMask::BYTES }, { LineMask::UNIT_BYTES }>::parse(packed, pages)
    {
        deltas.iter().for_each(|delta| delta.apply(&mut page));
    }
}
