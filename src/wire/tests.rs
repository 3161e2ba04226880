//! Frames as the encoder makes them and as a hostile network might.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::fuzz::{GUEST_PAGES, fuzz_bodies, fuzz_frames};
use super::limits::{MAX_BODY_BYTES, MAX_FRAME_BYTES, MAX_PAGES_PER_FRAME, MAX_RUNS_PER_FRAME};
use super::write::FrameParts;
use super::*;
use crate::codec::delta::{DeltaPacker, LineMask, UnitMask};
use crate::codec::pack::{Compression, Compressor};
use crate::codec::test_pages::{noise_of, page_and_change, page_of};
use crate::codec::xbzrle::{LENGTH_BYTES, RunPacker};
use crate::codec::{CodecId, Content, Kin, LineFingerprint, Packing};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, Version};

mod refusals;

const NOW: Version = Version(9);

/// A page to send, with its content at the other side if that holds one.
type Sent = (u64, PageBytes, Option<(Version, PageBytes)>);

fn encode(choice: CodecChoice, pages: &[Sent]) -> (Vec<u8>, CodecCounts) {
    let pages: Vec<_> = pages
        .iter()
        .map(|(page, bytes, base)| PageToSend {
            page: PageIndex(*page),
            bytes,
            base: base.as_ref().map(|(version, bytes)| (*version, bytes)),
        })
        .collect();
    let mut out = Vec::new();
    let counts = FrameEncoder::new(choice).encode(NOW, &pages, &kin(), &mut out);
    (out, counts)
}

/// What whole pages may build on: pages like them at the end of the guest.
const KIN: [(u64, u16); 3] = [(GUEST_PAGES - 9, 9), (GUEST_PAGES - 8, 3), (GUEST_PAGES - 1, 8)];

fn kin() -> Kin {
    Kin {
        pages: KIN.map(|(page, version)| (PageIndex(page), Version(version))).to_vec(),
        bytes: KIN.map(|(page, _)| page_of(page)).concat(),
    }
}

/// Of the page that builds on a base of its own.
fn position(used_by: BaseFor) -> usize {
    match used_by {
        BaseFor::Page(position) => position,
        BaseFor::Frame => panic!("no codec here builds on the same base with all pages"),
    }
}

/// Gives the bytes of one of them.
fn is_kin(base: Base, into: &mut PageBytes) -> bool {
    *into = page_of(base.page.0);
    KIN.contains(&(base.page.0, base.version.0))
}

/// Decodes all frames as a destination would that holds the bases of `pages`.
fn decode(wire: &[u8], pages: &[Sent]) -> (BTreeMap<u64, PageBytes>, CodecCounts) {
    let held: BTreeMap<u64, &(Version, PageBytes)> =
        pages.iter().filter_map(|(page, _, base)| Some((*page, base.as_ref()?))).collect();
    let mut scratch = DecodeScratch::default();
    let (mut got, mut counts) = (BTreeMap::new(), CodecCounts::default());
    let mut rest = wire;
    while !rest.is_empty() {
        let (frame, left) = Frame::parse(rest, GUEST_PAGES).unwrap();
        rest = left;
        assert_eq!(frame.version(), NOW);
        counts.add(frame.codec(), frame.page_count(), frame.len_bytes() as u64);
        let decoded = frame
            .decode(&mut scratch, |used_by, base, into| {
                if used_by == BaseFor::Frame {
                    return is_kin(base, into);
                }
                assert_eq!(held[&base.page.0].0, base.version);
                *into = held[&base.page.0].1;
                true
            })
            .unwrap();
        for (position, FramePage { page, base }) in frame.pages().enumerate() {
            let bytes = match decoded.get(position) {
                DecodedPage::Bytes(bytes) => *bytes,
                DecodedPage::Zero => [0; PAGE_SIZE_BYTES],
                DecodedPage::Unchanged => {
                    assert_eq!(base.unwrap().version, held[&page.0].0);
                    held[&page.0].1
                }
                other => panic!("{page:?}: {other:?}"),
            };
            assert!(got.insert(page.0, bytes).is_none(), "{page:?} is in two frames");
        }
    }
    (got, counts)
}

fn choices() -> impl Strategy<Value = CodecChoice> {
    let page = [
        PageCodec::Raw,
        PageCodec::Lz4,
        PageCodec::Zstd { level: 1 },
        PageCodec::ZstdKin { level: 3 },
    ];
    let delta = [
        DeltaCodec::Off,
        DeltaCodec::Plain,
        DeltaCodec::Lz4,
        DeltaCodec::Zstd { level: 1 },
        DeltaCodec::ZstdOld { level: 3 },
        DeltaCodec::Xbzrle,
    ];
    (prop::sample::select(page.to_vec()), prop::sample::select(delta.to_vec()))
        .prop_map(|(page, delta)| CodecChoice { page, delta })
}

fn batches() -> impl Strategy<Value = Vec<Sent>> {
    let base = prop::option::of(prop_oneof![3 => Just(8u16), 1 => 1u16..9].prop_map(Version));
    prop::collection::btree_map(0..GUEST_PAGES, (page_and_change(), base), 0..20).prop_map(
        |pages| {
            let pages = pages.into_iter();
            pages.map(|(page, ((old, new), base))| (page, new, base.map(|v| (v, old)))).collect()
        },
    )
}

/// One delta of a page whose word 5 changed.
fn one_delta() -> (Vec<u8>, PageBytes, PageBytes) {
    let (old, mut new) = (page_of(1), page_of(1));
    new[40] ^= 1;
    (encode(CodecChoice::default(), &[(3, new, Some((Version(2), old)))]).0, old, new)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_page_arrives_once_by_every_choice(choice in choices(), pages in batches()) {
        let (wire, sent) = encode(choice, &pages);
        let (got, counted) = decode(&wire, &pages);
        let expected: BTreeMap<_, _> = pages.iter().map(|(page, bytes, _)| (*page, *bytes)).collect();
        prop_assert!(got == expected);
        prop_assert_eq!(sent, counted);
        prop_assert_eq!(sent.total_bytes(), wire.len() as u64);
        prop_assert_eq!(sent.total_pages(), pages.len() as u64);
    }

    #[test]
    fn a_damaged_frame_never_gives_wrong_bytes(
        pages in batches(),
        choice in choices(),
        damage in any::<prop::sample::Index>(),
        flip in 1u8..=255,
    ) {
        let (mut wire, _) = encode(choice, &pages);
        prop_assume!(!wire.is_empty());
        let at = damage.index(wire.len());
        wire[at] ^= flip;
        fuzz_frames(&wire);
        let expected: BTreeMap<_, _> = pages.iter().map(|(page, bytes, _)| (*page, bytes)).collect();
        let held: BTreeMap<_, _> =
            pages.iter().filter_map(|(page, _, base)| Some((*page, base.as_ref()?.1))).collect();
        let mut scratch = DecodeScratch::default();
        let mut rest = &wire[..];
        while let Ok((frame, left)) = Frame::parse(rest, GUEST_PAGES) {
            rest = left;
            let decoded = frame.decode(&mut scratch, |_, base, into| {
                *into = held.get(&base.page.0).copied().unwrap_or([0; PAGE_SIZE_BYTES]);
                true
            });
            let Ok(decoded) = decoded else { continue };
            for (position, entry) in frame.pages().enumerate() {
                if let DecodedPage::Bytes(bytes) = decoded.get(position) {
                    prop_assert!(Some(&bytes) == expected.get(&entry.page.0));
                }
            }
        }
    }

    #[test]
    fn a_frame_cut_short_is_refused(pages in batches(), cut in any::<prop::sample::Index>()) {
        let (wire, counts) = encode(CodecChoice::default(), &pages);
        prop_assume!(counts.used().count() == 1);
        prop_assert!(Frame::parse(&wire[..cut.index(wire.len())], GUEST_PAGES).is_err());
    }

    #[test]
    fn random_bytes_are_refused_quietly(data in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz_frames(&data);
        fuzz_frames(&[&[0xfa, 1][..], &data].concat());
        fuzz_bodies(&data);
    }
}

#[test]
fn zero_runs_cover_a_guest_in_few_bytes() {
    let mut encoder = FrameEncoder::default();
    let mut out = Vec::new();
    let counts = encoder.encode_zero_runs(NOW, &[PageRange::new(5, GUEST_PAGES)], &mut out);
    assert!(out.len() < 24, "{} bytes", out.len());
    assert_eq!(counts.pages(CodecId::Zero), GUEST_PAGES - 5);
    let (frame, _) = Frame::parse(&out, GUEST_PAGES).unwrap();
    let runs: Vec<_> = frame.zero_runs().unwrap().collect();
    assert_eq!(runs, [PageRange::new(5, GUEST_PAGES)]);
}

#[test]
fn many_zero_runs_go_in_several_frames() {
    let runs: Vec<_> = (0..3000).map(|i| PageRange::new(3 * i, 3 * i + i % 3)).collect();
    let mut out = Vec::new();
    let counts = FrameEncoder::default().encode_zero_runs(NOW, &runs, &mut out);
    let (mut rest, mut back, mut frames) = (&out[..], Vec::new(), 0);
    while !rest.is_empty() {
        let (frame, left) = Frame::parse(rest, GUEST_PAGES).unwrap();
        back.extend(frame.zero_runs().unwrap());
        (rest, frames) = (left, frames + 1);
    }
    assert_eq!(frames, 2000usize.div_ceil(MAX_RUNS_PER_FRAME));
    assert_eq!(back, runs.into_iter().filter(|run| !run.is_empty()).collect::<Vec<_>>());
    assert_eq!(counts.pages(CodecId::Zero), 3000);
}

#[test]
fn unchanged_pages_cost_a_few_bits() {
    let page = noise_of(1);
    let pages: Vec<Sent> = (0..64).map(|i| (i * 30, page, Some((Version(8), page)))).collect();
    let (wire, counts) = encode(CodecChoice::default(), &pages);
    assert_eq!(counts.pages(CodecId::Unchanged), 64);
    assert!(wire.len() < 64 + 24, "{} bytes", wire.len());
}

#[test]
fn incompressible_pages_cost_no_more_than_a_header() {
    let pages: Vec<Sent> = (0..64).map(|i| (i, noise_of(i), None)).collect();
    let (wire, counts) = encode(CodecChoice::default(), &pages);
    assert_eq!(counts.pages(CodecId::Raw), 64);
    assert!(wire.len() < 64 * PAGE_SIZE_BYTES + 24, "{} bytes", wire.len());
    assert!(wire.len() <= MAX_FRAME_BYTES);
}

#[test]
fn a_page_that_changed_nearly_everywhere_goes_whole() {
    let pages = [(0, noise_of(1), Some((Version(1), noise_of(2))))];
    assert_eq!(encode(CodecChoice::default(), &pages).1.pages(CodecId::Raw), 1);
}

#[test]
fn a_page_that_became_zero_needs_no_base() {
    let pages = [(0, [0; PAGE_SIZE_BYTES], Some((Version(1), page_of(2))))];
    assert_eq!(encode(CodecChoice::default(), &pages).1.pages(CodecId::Zero), 1);
}

#[test]
fn a_delta_can_be_decoded_without_some_of_its_pages() {
    let (wire, pages) = ten_deltas(DeltaCodec::Lz4);
    let (frame, _) = Frame::parse(&wire, GUEST_PAGES).unwrap();
    assert_eq!(frame.codec(), CodecId::DeltaLz4);
    let mut scratch = DecodeScratch::default();
    let decoded = frame
        .decode(&mut scratch, |used_by, base, into| {
            *into = pages[base.page.0 as usize].2.unwrap().1;
            position(used_by).is_multiple_of(2)
        })
        .unwrap();
    for (position, (_, new, _)) in pages.iter().enumerate() {
        match decoded.get(position) {
            DecodedPage::Bytes(bytes) if position % 2 == 0 => assert_eq!(bytes, new),
            DecodedPage::NoBase if position % 2 == 1 => (),
            other => panic!("position {position}: {other:?}"),
        }
    }
}

#[test]
fn a_wrong_base_is_found_for_its_page_alone() {
    let pages: Vec<Sent> = (0..4)
        .map(|i| {
            let (old, mut new) = (page_of(i), page_of(i));
            new[8] ^= 1;
            (i, new, Some((Version(4), old)))
        })
        .collect();
    let (wire, _) = encode(CodecChoice::default(), &pages);
    let (frame, _) = Frame::parse(&wire, GUEST_PAGES).unwrap();
    let mut scratch = DecodeScratch::default();
    let decoded = frame
        .decode(&mut scratch, |used_by, base, into| {
            *into = pages[base.page.0 as usize].2.unwrap().1;
            into[4000] ^= u8::from(position(used_by) == 2);
            true
        })
        .unwrap();
    assert_eq!(decoded.get(2), DecodedPage::WrongBase);
    assert_eq!(decoded.get(3), DecodedPage::Bytes(&pages[3].1));
}

#[test]
fn a_changed_header_field_fails_the_checksum() {
    let (mut wire, old, _) = one_delta();
    // The page list: one run, distance 3 << 1.
    assert_eq!(wire[4..6], [1, 6]);
    wire[5] = 8;
    let (frame, _) = Frame::parse(&wire, GUEST_PAGES).unwrap();
    let mut scratch = DecodeScratch::default();
    let refused = frame.decode(&mut scratch, |_, _, into| {
        *into = old;
        true
    });
    assert_eq!(refused.map(|_| ()), Err(FrameError::Checksum));
    let zero = {
        let mut out = Vec::new();
        FrameEncoder::default().encode_zero_runs(NOW, &[PageRange::new(3, 4)], &mut out);
        out[5] = 8;
        out
    };
    assert_eq!(Frame::parse(&zero, GUEST_PAGES).map(|_| ()), Err(FrameError::Checksum));
}

#[test]
fn the_first_bytes_are_told_apart() {
    let (wire, ..) = one_delta();
    let parse_with = |at: usize, value: u8| {
        let mut wire = wire.clone();
        wire[at] = value;
        Frame::parse(&wire, GUEST_PAGES).map(|_| ())
    };
    assert_eq!(parse_with(0, 0), Err(FrameError::Magic { found: 0 }));
    assert_eq!(parse_with(1, 2), Err(FrameError::Format { found: 2 }));
    assert_eq!(parse_with(2, 200), Err(FrameError::Codec { found: 200 }));
    let version_zero = Err(FrameError::Version { field: "content version", found: 0 });
    assert_eq!(parse_with(3, 0), version_zero);
    assert_eq!(
        Frame::parse(&[], GUEST_PAGES).map(|_| ()),
        Err(FrameError::Truncated { field: "first bytes" })
    );
}

/// Ten pages with a changed word each.
fn ten_deltas(delta: DeltaCodec) -> (Vec<u8>, Vec<Sent>) {
    let pages: Vec<Sent> = (0..10)
        .map(|i| {
            let (old, mut new) = (page_of(i), page_of(i));
            new[i as usize * 100] ^= 1;
            (i, new, Some((Version(4), old)))
        })
        .collect();
    (encode(CodecChoice { page: PageCodec::Raw, delta }, &pages).0, pages)
}

#[test]
fn a_delta_with_old_words_needs_every_base_as_it_was() {
    // Noise whose first half moves by a word: only the old words make it small.
    let old = noise_of(1);
    let mut new = old;
    new[8..2048].copy_from_slice(&old[..2040]);
    let pages: Vec<Sent> =
        vec![(0, new, Some((Version(4), old))), (1, new, Some((Version(4), old)))];
    let choice = CodecChoice { page: PageCodec::Raw, delta: DeltaCodec::ZstdOld { level: 1 } };
    let (wire, counts) = encode(choice, &pages);
    assert_eq!(counts.pages(CodecId::DeltaZstdOld), 2);
    assert!(wire.len() < 200, "{} bytes", wire.len());
    let (frame, _) = Frame::parse(&wire, GUEST_PAGES).unwrap();
    let mut scratch = DecodeScratch::default();
    let mut decode_with = |change: fn(usize, &mut PageBytes) -> bool| {
        let base_of = |used_by: BaseFor, _: Base, into: &mut PageBytes| {
            *into = old;
            change(position(used_by), into)
        };
        let decoded = frame.decode(&mut scratch, base_of)?;
        Ok([decoded.get(0), decoded.get(1)].map(|page| page == DecodedPage::Bytes(&new)))
    };
    assert_eq!(decode_with(|_, _| true), Ok([true, true]));
    let missing = decode_with(|position, _| position == 0);
    assert_eq!(missing, Err(FrameError::BaseMissing { page: PageIndex(1) }));
    // A difference where nothing was changed shows in the page, one in an old word in the frame.
    let elsewhere = decode_with(|position, bytes| {
        bytes[4000] ^= position as u8;
        true
    });
    assert_eq!(elsewhere, Ok([true, false]));
    let in_old_words = decode_with(|_, bytes| {
        bytes[500] ^= 8;
        true
    });
    assert_eq!(in_old_words, Err(FrameError::Checksum));
}

#[test]
fn changed_lines_are_enough_where_no_hash_collides() {
    let (old, mut new) = (page_of(1), page_of(1));
    new[70] ^= 1;
    new[4000] ^= 1;
    let changed = LineFingerprint::of(&old).changed(&LineFingerprint::of(&new));
    for delta in [DeltaCodec::Plain, DeltaCodec::Lz4, DeltaCodec::ZstdOld { level: 1 }] {
        let mut encoder = FrameEncoder::new(CodecChoice { page: PageCodec::Raw, delta });
        let mut wire = Vec::new();
        let lines = LinesToSend { page: PageIndex(7), bytes: &new, base: Version(3), changed };
        let counts = encoder.encode_lines(NOW, &[lines], &mut wire);
        assert!(wire.len() < 200, "{} bytes", wire.len());
        assert_eq!(counts.total_pages(), 1);
        let (got, counted) = decode(&wire, &[(7, new, Some((Version(3), old)))]);
        assert!(got[&7] == new);
        assert_eq!(counted, counts);
    }
}

#[test]
fn a_collision_of_line_hashes_is_found_at_the_destination() {
    let (old, mut new) = (page_of(1), page_of(1));
    new[70] ^= 1;
    new[4000] ^= 1;
    // As if the hashes of the first changed line were the same.
    let mut seen = [0; LineMask::BYTES];
    seen[4000 / 64 / 8] = 1 << (4000 / 64 % 8);
    let changed = LineMask::from_bytes(seen);
    let mut wire = Vec::new();
    let lines = LinesToSend { page: PageIndex(7), bytes: &new, base: Version(3), changed };
    FrameEncoder::default().encode_lines(NOW, &[lines], &mut wire);
    let (frame, _) = Frame::parse(&wire, GUEST_PAGES).unwrap();
    let mut scratch = DecodeScratch::default();
    let decoded = frame.decode(&mut scratch, |_, _, into| {
        *into = old;
        true
    });
    assert_eq!(decoded.unwrap().get(0), DecodedPage::WrongBase);
}

#[test]
fn a_copy_is_checked_against_its_original() {
    let page = noise_of(1);
    let original = Base { page: PageIndex(9_000), version: NOW };
    let copies = [3u64, 4, 5].map(|i| CopyToSend { page: PageIndex(i), bytes: &page, original });
    let mut wire = Vec::new();
    let counts = FrameEncoder::default().encode_copies(NOW, &copies, &mut wire);
    assert!(wire.len() < 50, "{} bytes", wire.len());
    assert_eq!(counts.pages(CodecId::Copy), 3);
    let (frame, _) = Frame::parse(&wire, GUEST_PAGES).unwrap();
    let mut scratch = DecodeScratch::default();
    let decoded = frame
        .decode(&mut scratch, |used_by, base, into| {
            assert_eq!(base, original);
            *into = page;
            into[1] ^= u8::from(position(used_by) == 1);
            position(used_by) != 2
        })
        .unwrap();
    assert_eq!(decoded.get(0), DecodedPage::Bytes(&page));
    assert_eq!(decoded.get(1), DecodedPage::WrongBase);
    assert_eq!(decoded.get(2), DecodedPage::NoBase);
}

#[test]
fn frames_of_the_largest_kind_fit_the_limit() {
    let runs: Vec<_> = (0..MAX_RUNS_PER_FRAME as u64)
        .map(|i| PageRange::new(i << 53, (i << 53) + (1 << 52)))
        .collect();
    let mut wire = Vec::new();
    FrameParts::new(CodecId::Zero, NOW, &runs).write(&mut wire);
    assert!(wire.len() <= MAX_FRAME_BYTES, "{}", wire.len());
    let pages: Vec<Sent> = (0..64)
        .map(|i| {
            let old = noise_of(i);
            let mut new = noise_of(i + 100);
            new[3072..].copy_from_slice(&old[3072..]);
            (i * 156, new, Some((Version(1 + i as u16 % 8), old)))
        })
        .collect();
    let choice = CodecChoice { page: PageCodec::Raw, delta: DeltaCodec::Plain };
    let (wire, counts) = encode(choice, &pages);
    assert_eq!(counts.pages(CodecId::Delta), 64);
    assert!(wire.len() <= MAX_FRAME_BYTES, "{}", wire.len());
}

#[test]
fn pages_that_are_like_others_are_told_by_them() {
    let pages: Vec<Sent> =
        (0..4).map(|page| (page, page_of(GUEST_PAGES - 9 + page), None)).collect();
    let coded = |page| encode(CodecChoice { page, delta: DeltaCodec::Off }, &pages);
    let (alone, _) = coded(PageCodec::Zstd { level: 3 });
    let (wire, counts) = coded(PageCodec::ZstdKin { level: 3 });
    assert_eq!(counts.pages(CodecId::ZstdKin), 4);
    assert!(wire.len() < alone.len(), "{} and {} bytes", wire.len(), alone.len());
    assert_eq!(decode(&wire, &pages).0.len(), 4);
    let (frame, _) = Frame::parse(&wire, GUEST_PAGES).unwrap();
    let named: Vec<_> = frame.kin().map(|base| (base.page.0, base.version.0)).collect();
    assert_eq!(named, KIN);
}

#[test]
fn without_its_kin_or_with_another_page_in_place_of_it_a_frame_is_refused() {
    let pages = [(5, page_of(GUEST_PAGES - 8), None)];
    let choice = CodecChoice { page: PageCodec::ZstdKin { level: 3 }, delta: DeltaCodec::Off };
    let (wire, _) = encode(choice, &pages);
    let (frame, _) = Frame::parse(&wire, GUEST_PAGES).unwrap();
    let mut scratch = DecodeScratch::default();
    let missing = PageIndex(GUEST_PAGES - 8);
    let without =
        frame.decode(&mut scratch, |_, base, into| is_kin(base, into) && base.page != missing);
    assert_eq!(without.err(), Some(FrameError::BaseMissing { page: missing }));
    let other = frame.decode(&mut scratch, |_, base, into| {
        let known = is_kin(base, into);
        into[2000..].fill(b'?');
        known
    });
    assert!(matches!(other, Err(FrameError::Checksum | FrameError::Body(_))));
}
