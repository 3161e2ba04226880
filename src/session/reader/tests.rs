use super::*;
use crate::codec::SentLimits;
use crate::codec::ladder::PageCodec;
use crate::codec::{CodecId, Content};
use crate::memory::{MemoryLayout, RegionLayout};
use crate::wire::{BaseFor, DecodeScratch, DecodedPage, Frame};

fn reader(purpose: Purpose, link_bytes_per_s: u64) -> PageReader {
    PageReader::new(purpose, None, Arc::new(Pace::new(1, Some(link_bytes_per_s))))
}

#[test]
fn a_slow_link_gets_dense_codecs_and_a_fast_one_quick_ones() {
    let codec = |link_bytes_per_s| reader(Purpose::Round, link_bytes_per_s).choice(64).page;
    assert_eq!(codec(3_000_000), PageCodec::ZstdKin { level: 9 });
    assert_eq!(codec(10_000_000_000), PageCodec::Raw);
}

#[test]
fn more_encoders_afford_a_denser_codec_on_the_same_link() {
    let level = |encoders| {
        let pace = Arc::new(Pace::new(encoders, Some(60_000_000)));
        match PageReader::new(Purpose::Round, None, pace).choice(64).page {
            PageCodec::Zstd { level } | PageCodec::ZstdKin { level } => level,
            other => panic!("{other:?}"),
        }
    };
    assert!(level(8) > level(1), "{} and {}", level(8), level(1));
}

#[test]
fn after_the_switchover_no_frame_needs_the_bases_of_all_its_pages() {
    let old = |purpose, pages| {
        matches!(reader(purpose, 3_000_000).choice(pages).delta, DeltaCodec::ZstdOld { .. })
    };
    assert!(old(Purpose::Round, 64));
    assert!(!old(Purpose::Push, 64));
    assert!(!old(Purpose::Fault, 16));
    assert!(old(Purpose::Fault, 1));
}

const PAGES: u64 = 64;

/// A guest of text, a reader of it, and what the destination holds.
struct World {
    memory: GuestMemory,
    sent: SentPages,
    reader: PageReader,
    there: Vec<(Version, PageBytes)>,
    landed: Landed,
}

impl World {
    fn new(limits: SentLimits) -> Self {
        let region =
            RegionLayout { name: "ram0".to_owned(), size_bytes: PAGES * PAGE_SIZE_BYTES as u64 };
        let world = World {
            memory: GuestMemory::create(&MemoryLayout::new(vec![region])).unwrap(),
            sent: SentPages::new(limits, PAGES),
            reader: reader(Purpose::Round, 3_000_000),
            there: vec![(Version::NONE, [0; PAGE_SIZE_BYTES]); PAGES as usize],
            landed: Landed::none(PAGES),
        };
        for page in 0..PAGES {
            world.write(page, &text(page));
        }
        world
    }

    fn write(&self, page: u64, bytes: &PageBytes) {
        self.memory.write_page(PageIndex(page), bytes).unwrap();
    }

    fn here(&self, page: u64) -> PageBytes {
        let mut bytes = [0; PAGE_SIZE_BYTES];
        self.memory.read_page(PageIndex(page), &mut bytes);
        bytes
    }

    /// Sends `pages`, all or some of a round's; gives by which contents they went, and which of them the
    /// destination rejects: these are not trusted any more.
    fn round(&mut self, version: u16, pages: &[u64]) -> (Vec<(Content, u64)>, Vec<u64>) {
        let (version, mut message) = (Version(version), Vec::new());
        let pages: Vec<PageIndex> = pages.iter().copied().map(PageIndex).collect();
        let mut sending = PageSet::empty(PAGES);
        for page in (0..PAGES).map(PageIndex) {
            if pages.contains(&page) || self.there[page.0 as usize].0 == version {
                sending.insert(page);
            }
        }
        let World { memory, sent, reader, there, landed } = self;
        let against =
            Some(Against { sent, sending: &sending, landed: Some(landed), may_copy: true });
        let counts = reader.encode(memory, against, version, &pages, &mut message);
        reader.remember(sent, version, &pages, |_, _| {});
        let (mut rejected, mut rest) = (Vec::new(), &message[..]);
        let mut scratch = DecodeScratch::default();
        let before = there.clone();
        while !rest.is_empty() {
            let (frame, behind) = Frame::parse(rest, PAGES).unwrap();
            let base_of = |_: BaseFor, base: Base, into: &mut PageBytes| {
                let (held, bytes) = &before[base.page.0 as usize];
                *into = *bytes;
                *held == base.version
            };
            let decoded = frame.decode(&mut scratch, base_of).unwrap();
            for (position, entry) in frame.pages().enumerate() {
                let here = &mut there[entry.page.0 as usize];
                match decoded.get(position) {
                    DecodedPage::Bytes(bytes) => *here = (version, *bytes),
                    DecodedPage::Zero => *here = (version, [0; PAGE_SIZE_BYTES]),
                    DecodedPage::Unchanged => here.0 = version,
                    DecodedPage::NoBase | DecodedPage::WrongBase => {
                        sent.distrust(entry.page);
                        rejected.push(entry.page.0);
                    }
                }
            }
            rest = behind;
        }
        let by = |(codec, pages, _): (CodecId, u64, u64)| (codec.content(), pages);
        (counts.used().map(by).collect(), rejected)
    }

    fn is_there(&self, page: u64) -> bool {
        self.there[page as usize].1 == self.here(page)
    }
}

fn text(page: u64) -> PageBytes {
    crate::codec::test_pages::page_of(page + 1)
}

const LINES_ONLY: SentLimits = SentLimits { base_cache_bytes: 0, lines_bytes: 8 << 20 };
const CACHE_ONLY: SentLimits = SentLimits { base_cache_bytes: 8 << 20, lines_bytes: 0 };
const ALL: [u64; 4] = [0, 1, 2, 3];

#[test]
fn a_page_without_a_place_in_the_cache_goes_by_its_changed_lines() {
    let mut world = World::new(LINES_ONLY);
    assert_eq!(world.round(1, &ALL), (vec![(Content::Whole, 4)], vec![]));
    let mut changed = text(2);
    changed[1000] ^= 1;
    world.write(2, &changed);
    world.write(3, &text(77));
    assert_eq!(
        world.round(2, &[2, 3]),
        (vec![(Content::Whole, 1), (Content::Lines, 1)], vec![]),
        "one with most lines changed is better sent whole"
    );
    assert!(ALL.iter().all(|page| world.is_there(*page)));
}

/// Two lines with the same truncated hash.
fn colliding_lines() -> ([u8; 64], [u8; 64]) {
    let fingerprint = |line: [u8; 64]| {
        let mut page = [0; PAGE_SIZE_BYTES];
        page[..64].copy_from_slice(&line);
        LineFingerprint::of(&page)
    };
    let line = |number: u32| {
        let mut line = [7; 64];
        line[..4].copy_from_slice(&number.to_le_bytes());
        line
    };
    let same = |a, b| fingerprint(line(a)) == fingerprint(line(b));
    let second = (1..).find(|number| same(0, *number)).unwrap();
    (line(0), line(second))
}

#[test]
fn a_change_that_the_fingerprint_misses_is_rejected_and_goes_whole_once() {
    let (old, new) = colliding_lines();
    let mut world = World::new(LINES_ONLY);
    let mut page = text(1);
    page[640..704].copy_from_slice(&old);
    world.write(1, &page);
    world.round(1, &ALL);
    page[640..704].copy_from_slice(&new);
    page[0] ^= 1;
    world.write(1, &page);
    assert_eq!(world.round(2, &[1]), (vec![(Content::Lines, 1)], vec![1]));
    assert_eq!(world.round(3, &[1]), (vec![(Content::Whole, 1)], vec![]));
    assert!(world.is_there(1));
}

#[test]
fn a_duplicate_waits_for_the_second_round_and_goes_as_a_copy() {
    let mut world = World::new(CACHE_ONLY);
    // Pages are remembered then whatever that takes on a busy machine.
    world.reader.fixed = Some(world.reader.choice(2));
    world.write(2, &text(0));
    world.write(3, &text(0));
    world.round(1, &[0, 1]);
    assert_eq!(world.round(1, &[2, 3]), (vec![], vec![]));
    assert_eq!(world.reader.put_off(), [PageIndex(2), PageIndex(3)]);
    assert_eq!(world.round(2, &[2, 3]), (vec![(Content::Copy, 2)], vec![]));
    assert!(ALL.iter().all(|page| world.is_there(*page)));
    assert_eq!(world.reader.put_off(), []);
}

#[test]
fn nothing_is_a_copy_of_a_page_that_is_sent_in_the_same_round() {
    let mut world = World::new(CACHE_ONLY);
    world.round(1, &ALL);
    world.write(2, &text(0));
    world.write(0, &text(9));
    let (contents, rejected) = world.round(2, &[0, 2]);
    assert_eq!((contents, rejected), (vec![(Content::Whole, 2)], vec![]));
    assert!(ALL.iter().all(|page| world.is_there(*page)));
}

#[test]
fn a_copy_that_is_rejected_goes_whole() {
    let mut world = World::new(CACHE_ONLY);
    world.round(1, &ALL);
    world.write(2, &text(0));
    world.there[0].1[5] ^= 1;
    assert_eq!(world.round(2, &[2]), (vec![(Content::Copy, 1)], vec![2]));
    assert_eq!(world.round(3, &[2]), (vec![(Content::Whole, 1)], vec![]));
    assert!(world.is_there(2));
}

/// The pages that the frames of a message build on as a whole.
fn kin_of(message: &[u8]) -> Vec<u64> {
    let (mut kin, mut rest) = (Vec::new(), message);
    while !rest.is_empty() {
        let (frame, behind) = Frame::parse(rest, PAGES).unwrap();
        kin.extend(frame.kin().map(|base| base.page.0));
        rest = behind;
    }
    kin
}

#[test]
fn kin_are_what_has_arrived_and_is_not_sent_again() {
    let mut world = World::new(SentLimits { base_cache_bytes: 16 << 20, lines_bytes: 0 });
    let World { memory, sent, reader, landed, .. } = &mut world;
    let mut send = |version: u16, pages: std::ops::Range<u64>, sending: &PageSet| {
        let pages: Vec<PageIndex> = pages.map(PageIndex).collect();
        let landed = (version == 1).then_some(&*landed);
        let against = Some(Against { sent, sending, landed, may_copy: true });
        let mut message = Vec::new();
        reader.encode(memory, against, Version(version), &pages, &mut message);
        reader.remember(sent, Version(version), &pages, |_, _| {});
        (kin_of(&message), reader.end_message())
    };
    let all = PageSet::full(PAGES);
    let (kin, first) = send(1, 0..16, &all);
    assert_eq!((kin.len(), first.len()), (0, 16));
    assert!(send(1, 16..32, &all).0.is_empty(), "the others are on their way");
    landed.add(&first);
    assert_eq!(send(1, 40..64, &all).0, (0..16).collect::<Vec<_>>(), "what has arrived");
    let mut sending = PageSet::empty(PAGES);
    for page in [2, 3, 50].map(PageIndex) {
        sent.forget(PageRange::new(page.0, page.0 + 1));
        sending.insert(page);
    }
    let (kin, _) = send(2, 2..4, &sending);
    assert!(!kin.is_empty() && kin.iter().all(|page| ![2, 3, 50].contains(page)), "{kin:?}");
    sent.distrust(PageIndex(3));
    assert!(send(3, 2..4, &sending).0.is_empty(), "what was rejected goes by itself");
}

#[test]
fn nothing_goes_as_a_copy_once_copies_have_come_spoilt() {
    let mut world = World::new(SentLimits { base_cache_bytes: 16 << 20, lines_bytes: 0 });
    world.round(1, &[0]);
    world.write(5, &world.here(0));
    let World { memory, sent, .. } = &world;
    let sending = PageSet::empty(PAGES);
    for may_copy in [true, false] {
        let against = Some(Against { sent, sending: &sending, landed: None, may_copy });
        let mut message = Vec::new();
        let mut reader = reader(Purpose::Push, 3_000_000);
        let counts = reader.encode(memory, against, Version(2), &[PageIndex(5)], &mut message);
        let contents: Vec<Content> = counts.used().map(|(codec, _, _)| codec.content()).collect();
        assert_eq!(contents == [Content::Copy], may_copy, "{contents:?}");
    }
}
