//! Frames that are well-formed but for one thing.

use super::*;
use crate::codec::kin::MAX_KIN_PAGES;

/// What parsing says about a frame that is well-formed but for what `change` did to it. Buffers are
/// leaked, so that a change may bring its own.
fn refusal_of(codec: CodecId, change: impl FnOnce(&mut FrameParts<'static>)) -> FrameError {
    let content = codec.content();
    let old = page_of(1);
    let mut new = old;
    new[0] ^= 1;
    let (plain, coded) = match content {
        Content::Words => packed_twice::<64, 8>(&old, &new, codec),
        Content::Lines => packed_twice::<8, 64>(&old, &new, codec),
        Content::Whole => coded_as(codec, [new, new].concat()),
        Content::Runs => {
            let (mut packer, mut packed) = (RunPacker::default(), Vec::new());
            assert!(packer.push(&old, &new) && packer.push(&old, &new));
            packer.finish(&mut packed);
            (packed.clone(), packed)
        }
        _ => Default::default(),
    };
    // Of runs the bytes of the codings.
    let units = if content == Content::Runs { plain.len() - 2 * LENGTH_BYTES } else { 2 };
    let has_checks = !matches!(content, Content::Whole | Content::Zero | Content::Unchanged);
    let mut parts = FrameParts {
        bases: if content.has_bases() { base_list([1, 2]) } else { &[] },
        kin: match codec.packing() {
            Packing::ZstdKin => (base_list([1, 9]), KIN_RUNS),
            _ => (&[], &[]),
        },
        units,
        checks: if has_checks { &[0; 2] } else { &[] },
        decoded: plain.leak(),
        body: coded.leak(),
        ..FrameParts::new(
            codec,
            NOW,
            const { &[PageRange { start: PageIndex(10), end: PageIndex(12) }] },
        )
    };
    let verdict = |parts: &FrameParts<'_>| {
        let mut wire = Vec::new();
        parts.write(&mut wire);
        let (frame, _) = Frame::parse(&wire, GUEST_PAGES)?;
        let base = |_: BaseFor, _: Base, into: &mut PageBytes| {
            *into = old;
            true
        };
        frame.decode(&mut DecodeScratch::default(), base).map(|_| ())
    };
    assert_eq!(verdict(&parts), Ok(()), "{codec} before the change");
    change(&mut parts);
    verdict(&parts).expect_err("the changed frame was accepted")
}

/// The pages of [`base_list`].
const KIN_RUNS: &[PageRange] = &[PageRange { start: PageIndex(11), end: PageIndex(13) }];

/// Bases of pages 10 and 11: for copies these are 11 and 12.
fn base_list(versions: [u16; 2]) -> &'static [Base] {
    let base = |(page, version)| Base { page: PageIndex(page), version: Version(version) };
    [11, 12].into_iter().zip(versions).map(base).collect::<Vec<_>>().leak()
}

/// The delta twice over, plain and coded.
fn packed_twice<const MASK: usize, const UNIT: usize>(
    old: &PageBytes,
    new: &PageBytes,
    codec: CodecId,
) -> (Vec<u8>, Vec<u8>) {
    let mut packer = DeltaPacker::<MASK, UNIT>::default();
    let mask = UnitMask::between(old, new);
    let mut old_units = Vec::new();
    for _ in 0..2 {
        packer.push(&mask, new);
        mask.gather(old, &mut old_units);
    }
    let mut packed = Vec::new();
    packer.finish(&mut packed);
    if codec.packing() != Packing::ZstdOld {
        return coded_as(codec, packed);
    }
    let (masks, units) = packed.split_at(2 * MASK);
    let mut coded = Vec::new();
    assert!(Compressor::default().pack_with_old(masks, units, &old_units, 1, &mut coded));
    (packed, coded)
}

fn coded_as(codec: CodecId, plain: Vec<u8>) -> (Vec<u8>, Vec<u8>) {
    let how = match codec.packing() {
        Packing::Plain => return (plain.clone(), plain),
        Packing::Lz4 => Compression::Lz4,
        Packing::Zstd | Packing::ZstdOld => Compression::Zstd { level: 1 },
        Packing::ZstdKin => {
            let (kin, mut coded) = ([page_of(1); 2].concat(), Vec::new());
            let block = [&kin[..], &plain].concat();
            let packing = Compressor::default().pack_with_kin(&block, kin.len(), 1, &mut coded);
            assert_eq!(packing, Packing::ZstdKin);
            return (plain, coded);
        }
    };
    let mut coded = Vec::new();
    assert_eq!(Compressor::default().pack(&plain, how, &mut coded), codec.packing());
    (plain, coded)
}

#[test]
fn versions_that_cannot_be_are_refused() {
    let too_new = refusal_of(CodecId::Raw, |parts| parts.version = Version(2048));
    assert_eq!(too_new, FrameError::Version { field: "content version", found: 2048 });
    for codec in CodecId::ALL.into_iter().filter(|codec| codec.content().has_bases()) {
        // A copy may be of a page of the same version.
        let too_new = if codec == CodecId::Copy { NOW.0 + 1 } else { NOW.0 };
        for (versions, found) in
            [([too_new, too_new], too_new), ([1, too_new], too_new), ([1, 0], 0)]
        {
            let refused = refusal_of(codec, |parts| parts.bases = base_list(versions));
            let expected = FrameError::Version { field: "base version", found: found.into() };
            assert_eq!(refused, expected, "{codec}: {versions:?}");
        }
    }
}

#[test]
fn kin_that_cannot_be_are_refused() {
    let refused =
        |versions| refusal_of(CodecId::ZstdKin, |parts| parts.kin.0 = base_list(versions));
    for (versions, found) in [([1, 10], 10), ([10, 10], 10), ([1, 0], 0)] {
        assert_eq!(refused(versions), FrameError::Version { field: "base version", found });
    }
    let many: &[_] = vec![PageRange::new(0, MAX_KIN_PAGES as u64 + 1)].leak();
    let found = refusal_of(CodecId::ZstdKin, |parts| parts.kin.1 = many);
    assert_eq!(found, FrameError::Pages { pages: 65, max_pages: 64 });
    let outside: &[_] = vec![PageRange::new(GUEST_PAGES - 1, GUEST_PAGES + 1)].leak();
    let found = refusal_of(CodecId::ZstdKin, |parts| parts.kin.1 = outside);
    assert_eq!(found, FrameError::BeyondGuest { guest_pages: GUEST_PAGES });
}

#[test]
fn copies_of_nothing_or_of_itself_are_refused() {
    for from in [10, GUEST_PAGES] {
        let mut bases = base_list([1, 2]).to_vec();
        bases[0].page = PageIndex(from);
        let refused = refusal_of(CodecId::Copy, |parts| parts.bases = bases.leak());
        assert_eq!(refused, FrameError::CopyFrom { page: PageIndex(10), from });
    }
}

#[test]
fn page_lists_that_cannot_be_are_refused() {
    let many = vec![PageRange::new(0, MAX_PAGES_PER_FRAME as u64 + 1)].leak();
    let found = refusal_of(CodecId::Lz4, |parts| parts.runs = many);
    assert_eq!(found, FrameError::Pages { pages: 65, max_pages: 64 });
    let outside: &[_] = vec![PageRange::new(GUEST_PAGES - 1, GUEST_PAGES + 1)].leak();
    for codec in CodecId::ALL {
        let found = refusal_of(codec, |parts| parts.runs = outside);
        assert_eq!(found, FrameError::BeyondGuest { guest_pages: GUEST_PAGES });
        assert_eq!(refusal_of(codec, |parts| parts.runs = &[]), FrameError::Runs { runs: 0 });
    }
}

#[test]
fn bodies_of_impossible_length_are_refused_before_they_are_read() {
    let long: &[u8] = vec![0; MAX_BODY_BYTES + 1].leak();
    for codec in CodecId::ALL.into_iter().filter(|codec| codec.content().has_body()) {
        let found = refusal_of(codec, |parts| parts.body = long);
        assert!(matches!(found, FrameError::BodyLength { .. }), "{codec}: {found}");
        let found = refusal_of(codec, |parts| parts.body = &[]);
        assert!(matches!(found, FrameError::BodyLength { .. }), "{codec}: {found}");
    }
    for codec in [CodecId::Raw, CodecId::Delta, CodecId::Lines] {
        let found = refusal_of(codec, |parts| parts.body = &parts.body[1..]);
        assert!(matches!(found, FrameError::BodyLength { .. }), "{codec}: {found}");
    }
}

#[test]
fn unit_counts_that_cannot_be_are_refused() {
    for (codec, units_per_page) in
        [(CodecId::DeltaLz4, 512), (CodecId::DeltaZstdOld, 512), (CodecId::LinesZstd, 64)]
    {
        let found = refusal_of(codec, |parts| parts.units = 2 * units_per_page + 1);
        assert_eq!(found, FrameError::Units { units: 2 * units_per_page as u64 + 1, pages: 2 });
        let found = refusal_of(codec, |parts| parts.units = 3);
        assert!(matches!(found, FrameError::Body(_)), "{codec}: {found}");
    }
    let found = refusal_of(CodecId::Delta, |parts| {
        let wrong_mask = parts.body.to_vec().leak();
        wrong_mask[1] = 0xff;
        parts.decoded = wrong_mask;
        parts.body = wrong_mask;
    });
    assert!(matches!(found, FrameError::Body(_)), "{found}");
}
