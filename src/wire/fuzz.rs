//! Entry points for fuzzing, shared by the tests here and the targets in `fuzz/`: anything that the
//! network can say as a page frame or a message. Each tells whether it was accepted.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::limits::MAX_PAGES_PER_FRAME;
use super::message::{FaultRequest, Flight, PackedSet, ToDestination, ToSource, decode, encode};
use super::{BaseFor, DecodeScratch, DecodedPage, Frame};
use crate::codec::delta::{LineMask, PackedDeltas, WordMask};
use crate::codec::kin::MAX_KIN_PAGES;
use crate::codec::pack::Decompressor;
use crate::codec::{CodecId, Content, Packing, blob, xbzrle};
use crate::guest::Shape;
use crate::memory::MemoryLayout;
use crate::page::{PAGE_SIZE_BYTES, PageBytes};

/// Pages of the guest that the frames are read for.
pub const GUEST_PAGES: u64 = 10_000;

/// Reads `data` as frames that follow each other and decodes them, with made-up bases. Must not
/// panic, whatever the data.
///
/// # Panics
/// When a frame that was accepted names pages that do not ascend or that the guest does not have.
pub fn fuzz_frames(data: &[u8]) -> bool {
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
        let kin: Vec<_> = frame.kin().collect();
        assert!(kin.len() <= MAX_KIN_PAGES && kin.is_sorted_by(|a, b| a.page < b.page));
        assert!(kin.iter().all(|kin| kin.page.0 < GUEST_PAGES && kin.version <= frame.version()));
        let decoded = frame.decode(&mut scratch, |used_by, base, bytes: &mut PageBytes| {
            *bytes = [base.page.0 as u8; PAGE_SIZE_BYTES];
            used_by == BaseFor::Frame
                || matches!(used_by, BaseFor::Page(position) if position % 7 != 3)
        });
        if let Ok(decoded) = decoded {
            for position in 0..pages.len() {
                let without_base =
                    content.has_bases() && content != Content::Unchanged && position % 7 == 3;
                assert_eq!(decoded.get(position) == DecodedPage::NoBase, without_base);
            }
        }
    }
    rest.is_empty() && !data.is_empty()
}

/// Decodes `data` as the body of a frame, by each codec: the first three bytes choose the sizes that a
/// header would announce. A checksum keeps nearly all of this out of [`fuzz_frames`].
pub fn fuzz_bodies(data: &[u8]) -> bool {
    let Some((&[pages, low, high], body)) = data.split_first_chunk() else { return false };
    let pages = usize::from(pages) % MAX_PAGES_PER_FRAME + 1;
    let words =
        usize::from(u16::from_le_bytes([low, high])) % (pages * WordMask::UNITS_PER_PAGE + 1);
    let mut plain = vec![0; pages * WordMask::BYTES + words * WordMask::UNIT_BYTES];
    let mut decompressor = Decompressor::default();
    let mut accepted = apply_deltas(body, pages);
    for codec in CodecId::ALL {
        let unpacked = match codec.packing() {
            Packing::Plain => continue,
            Packing::ZstdOld => {
                let (masks, words) = plain.split_at_mut(pages * WordMask::BYTES);
                let old = [b'o'; 1000];
                let coded = decompressor.unpack_masks(body, masks);
                coded.and_then(|coded| decompressor.unpack_words(coded, &old, words))
            }
            Packing::ZstdKin => decompressor.unpack_with_kin(body, &[b'k'; 10_000], &mut plain),
            Packing::Lz4 | Packing::Zstd => decompressor.unpack(codec, body, &mut plain),
        };
        if unpacked.is_ok() {
            accepted |= apply_deltas(&plain, pages);
        }
    }
    accepted | apply_runs(body, pages) | blob::decode(body, &[b'o'; 100_000], words).is_ok()
}

fn apply_runs(packed: &[u8], pages: usize) -> bool {
    let Ok(mut codings) = xbzrle::unpack(packed, pages) else { return false };
    codings.all(|coding| xbzrle::decode(coding, &mut [0; PAGE_SIZE_BYTES]).is_some())
}

fn apply_deltas(packed: &[u8], pages: usize) -> bool {
    let mut page = [0; PAGE_SIZE_BYTES];
    let mut accepted = false;
    if let Ok(deltas) =
        PackedDeltas::<{ WordMask::BYTES }, { WordMask::UNIT_BYTES }>::parse(packed, pages)
    {
        deltas.iter().for_each(|delta| delta.apply(&mut page));
        accepted = true;
    }
    if let Ok(deltas) =
        PackedDeltas::<{ LineMask::BYTES }, { LineMask::UNIT_BYTES }>::parse(packed, pages)
    {
        deltas.iter().for_each(|delta| delta.apply(&mut page));
        accepted = true;
    }
    accepted
}

/// Reads `data` as each kind of message, and takes out of it what a session would.
///
/// # Panics
/// When a message that was accepted is another one after it was written and read again, or when more
/// comes out of it than the guest has.
pub fn fuzz_messages(data: &[u8]) -> bool {
    let to_destination: Option<ToDestination> = accepted(data);
    let to_source: Option<ToSource> = accepted(data);
    let request: Option<FaultRequest> = accepted(data);
    let flight: Option<Flight> = accepted(data);
    if let Some(ToDestination::Hello { shape, .. }) = &to_destination {
        let here = Shape {
            monitor: "here".to_owned(),
            memory: MemoryLayout::new(Vec::new()),
            properties: Default::default(),
        };
        assert!(!shape.differences(&here).is_empty() || **shape == here);
    }
    if let Some(flight) = &flight {
        let sets = [&flight.need, &flight.zero];
        sets.into_iter().for_each(unpack);
        let _ = flight.device_state.unpack(None);
    }
    to_destination.is_some() || to_source.is_some() || request.is_some() || flight.is_some()
}

fn unpack(set: &PackedSet) {
    for guest_pages in [1, 64, 1000, GUEST_PAGES] {
        if let Ok(pages) = set.unpack(guest_pages) {
            assert!(pages.len() <= guest_pages);
            assert!(pages.iter().all(|page| page.0 < guest_pages));
        }
    }
}

fn accepted<M: DeserializeOwned + Serialize + PartialEq>(data: &[u8]) -> Option<M> {
    let message: M = decode(data).ok()?;
    let again: M = decode(&encode(&message)).expect("what was encoded here is a message");
    assert!(again == message, "a message is another one after it was written and read again");
    Some(message)
}

#[cfg(test)]
mod tests;
