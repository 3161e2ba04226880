use super::*;
use crate::codec::Kin;
use crate::codec::LineFingerprint;
use crate::codec::delta::{DeltaPacker, UnitMask};
use crate::codec::pack::{Compression, Compressor};
use crate::codec::test_pages::page_of;
use crate::codec::xbzrle::RunPacker;
use crate::memory::RegionLayout;
use crate::page::{PageIndex, PageRange, PageSet, Version};
use crate::wire::message::{PROTOCOL, RunWhen, Strategy, Wanted};
use crate::wire::state::PackedState;
use crate::wire::{
    Base, CodecChoice, CopyToSend, DeltaCodec, FrameEncoder, LinesToSend, PageCodec, PageToSend,
};

const NOW: Version = Version(9);

/// What [`fuzz_frames`] takes for the base of a page.
fn base_of(page: u64) -> PageBytes {
    [page as u8; PAGE_SIZE_BYTES]
}

fn changed(page: u64) -> PageBytes {
    let mut bytes = base_of(page);
    bytes[8 * page as usize..][..20].copy_from_slice(b"changed at the host.");
    bytes
}

/// A frame of whole pages, of deltas, of zeros and of unchanged pages in each packing.
fn frames() -> Vec<Vec<u8>> {
    let packings = [
        (PageCodec::Raw, DeltaCodec::Plain),
        (PageCodec::Lz4, DeltaCodec::Lz4),
        (PageCodec::Zstd { level: 1 }, DeltaCodec::Zstd { level: 1 }),
        (PageCodec::Lz4, DeltaCodec::ZstdOld { level: 1 }),
        (PageCodec::Raw, DeltaCodec::Xbzrle),
        (PageCodec::ZstdKin { level: 1 }, DeltaCodec::Plain),
    ];
    let kin = Kin {
        pages: vec![(PageIndex(200), NOW), (PageIndex(300), Version(2))],
        bytes: [base_of(200), base_of(300)].concat(),
    };
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    for (page, delta) in packings {
        let mut encoder = FrameEncoder::new(CodecChoice { page, delta });
        let contents: Vec<(u64, PageBytes)> =
            vec![(1, page_of(1)), (2, [0; PAGE_SIZE_BYTES]), (4, changed(4)), (5, changed(5))];
        let bases = [base_of(4), base_of(5), base_of(6)];
        let mut pages: Vec<PageToSend<'_>> = contents
            .iter()
            .map(|(page, bytes)| PageToSend { page: PageIndex(*page), bytes, base: None })
            .collect();
        pages[2].base = Some((Version(8), &bases[0]));
        pages[3].base = Some((Version(3), &bases[1]));
        let unchanged = Some((Version(8), &bases[2]));
        pages.push(PageToSend { page: PageIndex(6), bytes: &bases[2], base: unchanged });
        let mut frames = Vec::new();
        encoder.encode(NOW, &pages, &kin, &mut frames);
        seeds.push(frames);
    }
    let mut encoder = FrameEncoder::default();
    let mut others = Vec::new();
    let runs = [PageRange::new(0, 1), PageRange::new(70, GUEST_PAGES)];
    encoder.encode_zero_runs(NOW, &runs, &mut others);
    let (old, new) = (base_of(7), changed(7));
    let changed = LineFingerprint::of(&old).changed(&LineFingerprint::of(&new));
    let lines = LinesToSend { page: PageIndex(7), bytes: &new, base: Version(3), changed };
    encoder.encode_lines(NOW, &[lines], &mut others);
    let original = Base { page: PageIndex(9_000), version: NOW };
    let copy = base_of(9_000);
    let copies = [3, 4].map(|i| CopyToSend { page: PageIndex(i), bytes: &copy, original });
    encoder.encode_copies(NOW, &copies, &mut others);
    seeds.push(others);
    seeds
}

/// The bodies of a delta of two pages in each packing, and of device state, with the sizes that a header
/// would tell.
fn bodies() -> Vec<Vec<u8>> {
    let mut packer = DeltaPacker::<{ WordMask::BYTES }, { WordMask::UNIT_BYTES }>::default();
    for page in [4, 5] {
        packer.push(&UnitMask::between(&base_of(page), &changed(page)), &changed(page));
    }
    let (mut packed, mut compressor) = (Vec::new(), Compressor::default());
    packer.finish(&mut packed);
    let words = packer.unit_count();
    let mut bodies = vec![packed.clone()];
    for how in [Compression::Lz4, Compression::Zstd { level: 1 }] {
        let mut coded = Vec::new();
        compressor.pack(&packed, how, &mut coded);
        bodies.push(coded);
    }
    let (masks, new) = packed.split_at(2 * WordMask::BYTES);
    let (old, mut coded) = ([b'o'; 1000], Vec::new());
    compressor.pack_with_old(masks, new, &old, 1, &mut coded);
    bodies.push(coded);
    let (mut runs, mut coded) = (RunPacker::default(), Vec::new());
    for page in [4, 5] {
        assert!(runs.push(&base_of(page), &changed(page)));
    }
    runs.finish(&mut coded);
    bodies.push(coded);
    let sizes = [1, words as u8, (words >> 8) as u8];
    let mut bodies: Vec<_> = bodies.iter().map(|body| [&sizes[..], body].concat()).collect();
    // Device state, whose length stands where the number of words does.
    let state = [&[b'o'; 500][..], b"changed"].concat();
    let coded = blob::encode(&state, &[b'o'; 100_000], 1);
    bodies.push([&[0, state.len() as u8, (state.len() >> 8) as u8], &coded[..]].concat());
    bodies
}

fn messages() -> Vec<Vec<u8>> {
    let shape = Box::new(Shape {
        monitor: "qemu".to_owned(),
        memory: MemoryLayout::new(vec![RegionLayout {
            name: "ram0".to_owned(),
            size_bytes: 1 << 30,
        }]),
        properties: [("machine".to_owned(), "pc-i440fx-7.2".to_owned())].into(),
    });
    let strategy = Strategy::Hybrid;
    let (round, final_version) = (Version(2), Version(3));
    let to_destination = [
        ToDestination::Hello { protocol: PROTOCOL, shape, strategy, runs: true },
        ToDestination::RoundEnd { round, messages: 300 },
        ToDestination::Offer { final_version, run_when: RunWhen::Complete },
        ToDestination::Commit,
        ToDestination::Abort { reason: "cancelled by the operator".to_owned() },
        ToDestination::Bye { downtime_us: Some(31_100) },
        ToDestination::Rehearsal(PackedState::pack(&[7; 3000], None)),
    ];
    let to_source = [
        ToSource::Prepared,
        ToSource::RoundAck { round, rejected: vec![PageIndex(7), PageIndex(1 << 40)] },
        ToSource::Ready,
        ToSource::Running,
        ToSource::Refused { reason: "no".to_owned(), hint: Some("do".to_owned()) },
        ToSource::Done,
        ToSource::Rehearsed { check: 7 },
    ];
    let wanted = |page, thread| Wanted { page: PageIndex(page), thread };
    let request = FaultRequest { pages: vec![wanted(300, 0), wanted(2, 70_000)], whole: true };
    let mut need = PageSet::empty(1000);
    need.insert_range(PageRange::new(30, 600));
    let flight = Flight {
        final_version,
        need: PackedSet::pack(&need),
        zero: PackedSet::pack(&PageSet::empty(1000)),
        device_state: PackedState::pack(&[7; 3000], None),
    };
    let mut seeds: Vec<Vec<u8>> = to_destination.iter().map(encode).collect();
    seeds.extend(to_source.iter().map(encode));
    seeds.extend([encode(&request), encode(&flight)]);
    seeds
}

#[test]
fn any_bytes_as_page_frames() {
    crate::fuzz_cases::run("frames", fuzz_frames, &frames());
}

#[test]
fn any_bytes_as_the_body_of_a_frame() {
    crate::fuzz_cases::run("bodies", fuzz_bodies, &bodies());
}

#[test]
fn any_bytes_as_messages() {
    crate::fuzz_cases::run("messages", fuzz_messages, &messages());
}
