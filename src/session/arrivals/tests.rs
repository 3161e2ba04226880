use proptest::prelude::*;

use super::*;
use crate::codec::test_pages::page_of;
use crate::codec::{BaseCache, CodecChoice, Kin, PageCodec};
use crate::memory::{MemoryLayout, RegionLayout};
use crate::page::{PAGE_SIZE_BYTES, PageBytes};
use crate::wire::{CopyToSend, FrameEncoder, PageToSend};

const PAGES: u64 = 64;

/// Both ends without a network between them.
struct World {
    /// What the guest has at the source.
    source: Vec<PageBytes>,
    bases: BaseCache,
    encoder: FrameEncoder,
    memory: Arc<GuestMemory>,
    table: Arc<PageTable>,
    arrivals: Arrivals,
    scratch: DecodeScratch,
}

impl World {
    fn new() -> Self {
        let region =
            RegionLayout { name: "ram0".to_owned(), size_bytes: PAGES * PAGE_SIZE_BYTES as u64 };
        let memory = Arc::new(GuestMemory::create(&MemoryLayout::new(vec![region])).unwrap());
        let table = Arc::new(PageTable::anonymous(PAGES).unwrap());
        World {
            source: vec![[0; PAGE_SIZE_BYTES]; PAGES as usize],
            bases: BaseCache::new(1 << 20, PAGES),
            encoder: FrameEncoder::default(),
            arrivals: Arrivals::new(memory.clone(), table.clone(), Arc::default()),
            memory,
            table,
            scratch: DecodeScratch::default(),
        }
    }

    fn message(&mut self, version: u16, pages: &[u64], whole: bool) -> Vec<u8> {
        let mut out = Vec::new();
        let mut sorted = pages.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let list: Vec<PageToSend<'_>> = sorted
            .iter()
            .map(|page| PageToSend {
                page: PageIndex(*page),
                bytes: &self.source[*page as usize],
                base: self.bases.get(PageIndex(*page)).filter(|_| !whole),
            })
            .collect();
        self.encoder.encode(Version(version), &list, &Kin::default(), &mut out);
        out
    }

    fn remember(&mut self, version: u16, pages: &[u64]) {
        for page in pages {
            let bytes = self.source[*page as usize];
            self.bases.insert(PageIndex(*page), Version(version), &bytes, |_, _, _| {});
        }
    }

    fn send(&mut self, version: u16, pages: &[u64]) -> Applied {
        let message = self.message(version, pages, false);
        self.remember(version, pages);
        self.apply(&message).unwrap()
    }

    fn apply(&mut self, message: &[u8]) -> Result<Applied, ApplyError> {
        self.arrivals.apply(message, true, &mut self.scratch)
    }

    fn at_destination(&self, page: u64) -> PageBytes {
        let mut bytes = [0; PAGE_SIZE_BYTES];
        self.memory.read_page(PageIndex(page), &mut bytes);
        bytes
    }

    fn set_of(pages: &[u64]) -> PageSet {
        let mut set = PageSet::empty(PAGES);
        for page in pages {
            set.insert(PageIndex(*page));
        }
        set
    }

    fn all() -> Vec<u64> {
        (0..PAGES).collect()
    }
}

#[test]
fn a_message_that_comes_twice_is_applied_once() {
    let mut world = World::new();
    world.source[3] = [3; PAGE_SIZE_BYTES];
    world.send(1, &World::all());
    world.arrivals.switch_over(Version(2), &World::set_of(&[3]), &World::set_of(&[])).unwrap();
    world.source[3][100] = 99;
    let message = world.message(2, &[3], false);
    world.apply(&message).unwrap();
    assert!(world.arrivals.is_complete());
    // Now the guest owns the page and changes it.
    world.memory.write_page(PageIndex(3), &[77; PAGE_SIZE_BYTES]).unwrap();
    world.apply(&message).unwrap();
    assert_eq!(world.at_destination(3), [77; PAGE_SIZE_BYTES], "a late duplicate is dropped");
}

#[test]
fn a_damaged_message_is_rejected_and_leaves_the_older_copy_in_place() {
    let mut world = World::new();
    world.source[5] = [5; PAGE_SIZE_BYTES];
    world.send(1, &[5]);
    world.source[5][8..16].copy_from_slice(&[9; 8]);
    let good = world.message(2, &[5], false);
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let applied = world.apply(&damaged).unwrap();
    assert_eq!(applied.rejected, vec![PageIndex(5)]);
    assert_eq!(world.at_destination(5), [5; PAGE_SIZE_BYTES]);
    assert_eq!(world.table.state(PageIndex(5)).version, Version(1));
    assert_eq!(world.apply(&good).unwrap().rejected, vec![]);
    assert_eq!(world.at_destination(5), world.source[5]);
}

#[test]
fn a_delta_against_a_version_that_is_not_here_is_rejected() {
    let mut world = World::new();
    world.source[5] = [5; PAGE_SIZE_BYTES];
    // Remembered as sent, but lost.
    world.remember(1, &[5]);
    world.source[5][0] = 6;
    let delta = world.message(2, &[5], false);
    assert_eq!(world.apply(&delta).unwrap().rejected, vec![PageIndex(5)]);
    let whole = world.message(2, &[5], true);
    assert_eq!(world.apply(&whole).unwrap().rejected, vec![]);
    assert_eq!(world.at_destination(5), world.source[5]);
}

#[test]
fn a_page_that_the_switchover_leaves_without_content_is_an_error() {
    let mut world = World::new();
    world.send(1, &[0, 1, 2]);
    let nothing = World::set_of(&[]);
    let error = world.arrivals.switch_over(Version(2), &nothing, &nothing).unwrap_err();
    assert!(matches!(error, ApplyError::Memory(MemoryError::UnknownContent { .. })), "{error}");
}

#[test]
fn after_the_switchover_an_older_version_is_refused() {
    let mut world = World::new();
    world.send(1, &World::all());
    let late = world.message(1, &[4], true);
    world.arrivals.switch_over(Version(2), &World::set_of(&[4]), &World::set_of(&[])).unwrap();
    assert!(matches!(world.apply(&late), Err(ApplyError::Version(Version(1)))));
}

#[test]
fn a_page_that_became_a_hole_is_zero_at_the_destination() {
    let mut world = World::new();
    world.source[9] = [9; PAGE_SIZE_BYTES];
    world.send(1, &World::all());
    world.arrivals.switch_over(Version(2), &World::set_of(&[]), &World::set_of(&[9])).unwrap();
    assert!(world.arrivals.is_complete());
    let runs = world.memory.populated_runs(PageRange::new(9, 10)).unwrap();
    assert!(runs.is_empty(), "and takes no memory there");
}

#[test]
fn what_a_killed_process_left_of_a_page_does_not_shine_through_its_zeros() {
    let mut world = World::new();
    world.source[9] = [9; PAGE_SIZE_BYTES];
    world.send(1, &World::all());
    let need = World::set_of(&[9]);
    world.arrivals.switch_over(Version(2), &need, &World::set_of(&[])).unwrap();
    world.table.claim(PageIndex(9), Version(2));
    assert_eq!(world.table.recover(), 1, "killed while it wrote the page");
    world.source[9].fill(0);
    let message = world.message(2, &[9], true);
    world.apply(&message).unwrap();
    assert!(world.arrivals.is_complete());
    assert_eq!(world.at_destination(9), world.source[9]);
}

#[test]
fn zeros_come_over_holes_content_and_pages_of_others_alike() {
    let mut world = World::new();
    for page in [3, 4, 5, 30, 63] {
        world.source[page] = [page as u8; PAGE_SIZE_BYTES];
    }
    world.send(1, &[3, 4, 5, 7, 30, 63]);
    world.source.iter_mut().for_each(|page| page.fill(0));
    // Another thread works on this one.
    world.table.claim(PageIndex(4), Version(2));
    let mut message = Vec::new();
    world.encoder.encode_zero_runs(Version(2), &[PageRange::new(0, PAGES)], &mut message);
    assert_eq!(world.apply(&message).unwrap().rejected, vec![]);
    let holes = world.memory.populated(PageRange::new(0, PAGES)).unwrap();
    assert_eq!(holes.iter().collect::<Vec<_>>(), [PageIndex(4)]);
    for page in (0..PAGES).filter(|page| *page != 4) {
        let state = world.table.state(PageIndex(page));
        assert_eq!((state.stage, state.version, state.zero), (Stage::Stale, Version(2), true));
    }
}

/// A message by which `page` is a copy of what `original` was at version 1.
fn copy_of(world: &mut World, original: u64, page: u64) -> Vec<u8> {
    let copy = CopyToSend {
        page: PageIndex(page),
        bytes: &world.source[original as usize],
        original: Base { page: PageIndex(original), version: Version(1) },
    };
    let mut out = Vec::new();
    world.encoder.encode_copies(Version(2), &[copy], &mut out);
    out
}

#[test]
fn a_page_may_be_a_copy_of_one_that_is_here_at_that_version() {
    let mut world = World::new();
    world.source[3] = [3; PAGE_SIZE_BYTES];
    world.send(1, &World::all());
    let copy = copy_of(&mut world, 3, 9);
    assert_eq!(world.apply(&copy).unwrap().rejected, vec![]);
    assert_eq!(world.at_destination(9), [3; PAGE_SIZE_BYTES]);
    // The original has been replaced since.
    let late = copy_of(&mut world, 3, 10);
    world.source[3][0] = 99;
    world.send(2, &[3]);
    assert_eq!(world.apply(&late).unwrap().rejected, vec![PageIndex(10)]);
    assert_eq!(world.at_destination(10), [0; PAGE_SIZE_BYTES]);
}

#[test]
fn after_the_switchover_a_copy_of_what_the_guest_has_changed_is_rejected() {
    let mut world = World::new();
    world.source[3] = [3; PAGE_SIZE_BYTES];
    world.send(1, &World::all());
    let need = World::set_of(&[9, 10]);
    world.arrivals.switch_over(Version(2), &need, &World::set_of(&[])).unwrap();
    world.table.mark_mapped(PageRange::new(3, 4));
    let (early, late) = (copy_of(&mut world, 3, 9), copy_of(&mut world, 3, 10));
    assert_eq!(world.apply(&early).unwrap().rejected, vec![]);
    assert_eq!(world.at_destination(9), [3; PAGE_SIZE_BYTES]);
    let mut written = [3; PAGE_SIZE_BYTES];
    written[4095] = 4;
    world.memory.write_page(PageIndex(3), &written).unwrap();
    assert_eq!(world.apply(&late).unwrap().rejected, vec![PageIndex(10)]);
    assert!(!world.table.state(PageIndex(10)).is_complete());
}

/// What a guest does to a page between two rounds.
fn write_to(page: &mut PageBytes, kind: u8, seed: u8) {
    match kind {
        0 => page[usize::from(seed) * 8..][..8].copy_from_slice(&[seed; 8]),
        1 => page.iter_mut().enumerate().for_each(|(i, b)| *b = (i as u8).wrapping_mul(seed | 1)),
        2 => page.fill(0),
        _ => page[..2048].fill(seed),
    }
}

proptest! {
    /// Rounds with writes between them, the last one cut by the switchover; the remainder comes in any
    /// order, some of it twice, some before the switchover, some damaged and asked for again.
    #[test]
    fn whatever_the_order_every_page_ends_as_it_is_at_the_source(
        rounds in prop::collection::vec(
            prop::collection::vec((0..PAGES, 0u8..4, any::<u8>()), 0..40), 1..5),
        order in prop::collection::vec(any::<prop::sample::Index>(), 60),
        early in 0usize..4,
        damage in prop::collection::vec(any::<bool>(), 60),
    ) {
        let mut world = World::new();
        let mut due = World::all();
        let mut version = 1;
        for writes in &rounds {
            for batch in due.chunks(32) {
                let applied = world.send(version, batch);
                prop_assert_eq!(applied.rejected, vec![]);
            }
            version += 1;
            due.clear();
            for (page, kind, seed) in writes {
                write_to(&mut world.source[*page as usize], *kind, *seed);
                due.push(*page);
            }
            due.sort_unstable();
            due.dedup();
        }
        let messages: Vec<Vec<u8>> =
            due.chunks(5).map(|pages| world.message(version, pages, false)).collect();
        for message in messages.iter().take(early) {
            prop_assert_eq!(world.apply(message).unwrap().rejected, vec![]);
        }
        let (need, none) = (World::set_of(&due), World::set_of(&[]));
        world.arrivals.switch_over(Version(version), &need, &none).unwrap();
        for (index, damage) in order.iter().zip(damage) {
            if messages.is_empty() {
                break;
            }
            let mut message = index.get(&messages).clone();
            if damage {
                *message.last_mut().unwrap() ^= 0x40;
            }
            if let Ok(applied) = world.apply(&message) {
                let again: Vec<u64> = applied.rejected.iter().map(|page| page.0).collect();
                if !again.is_empty() {
                    let whole = world.message(version, &again, true);
                    prop_assert_eq!(world.apply(&whole).unwrap().rejected, vec![]);
                }
            }
        }
        for message in &messages {
            world.apply(message).unwrap();
        }
        prop_assert!(world.arrivals.is_complete());
        for page in 0..PAGES {
            prop_assert!(world.at_destination(page) == world.source[page as usize], "page {page}");
            prop_assert!(world.table.state(PageIndex(page)).is_complete());
        }
    }
}

/// Frames of one page each that build on version 1 of others; page and those that it builds on.
fn kin_frames(world: &World, version: u16, frames: &[(u64, Vec<u64>)]) -> Vec<Vec<u8>> {
    let page = PageCodec::ZstdKin { level: 3 };
    let mut encoder = FrameEncoder::new(CodecChoice { page, ..CodecChoice::default() });
    let frame = |(page, kin): &(u64, Vec<u64>)| {
        let kin = Kin {
            pages: kin.iter().map(|page| (PageIndex(*page), Version(1))).collect(),
            bytes: kin.iter().flat_map(|page| world.source[*page as usize]).collect(),
        };
        let bytes = &world.source[*page as usize];
        let (page, mut out) = (PageIndex(*page), Vec::new());
        let page = PageToSend { page, bytes, base: None };
        encoder.encode(Version(version), &[page], &kin, &mut out);
        out
    };
    frames.iter().map(frame).collect()
}

#[test]
fn a_frame_waits_for_its_kin_and_what_stands_before_it_does_not() {
    let mut world = World::new();
    for page in 0..4 {
        world.source[page as usize] = page_of(page + 1);
    }
    let frames = kin_frames(&world, 1, &[(0, vec![]), (1, vec![0, 3]), (3, vec![])]);
    let message = [&frames[0][..], &frames[1]].concat();
    let applied = world.apply(&message).unwrap();
    assert_eq!((applied.waits_from, applied.rejected), (Some(frames[0].len()), vec![]));
    assert_eq!(world.at_destination(0), world.source[0]);
    assert_eq!(world.table.state(PageIndex(1)).stage, Stage::Absent);
    assert!(!world.arrivals.is_ready(&frames[1]));
    world.apply(&frames[2]).unwrap();
    assert!(world.arrivals.is_ready(&frames[1]));
    assert_eq!(world.apply(&frames[1]).unwrap().waits_from, None);
    assert_eq!(world.at_destination(1), world.source[1]);
}

#[test]
fn a_frame_that_may_not_wait_for_its_kin_is_rejected() {
    let mut world = World::new();
    world.source[0] = page_of(1);
    world.source[1] = page_of(2);
    let frame = &kin_frames(&world, 1, &[(1, vec![0])])[0];
    let applied = world.arrivals.apply(frame, false, &mut world.scratch).unwrap();
    assert_eq!((applied.waits_from, applied.rejected), (None, vec![PageIndex(1)]));
    let others: Vec<u64> = (2..PAGES).collect();
    world.send(1, &others);
    world.arrivals.switch_over(Version(2), &World::set_of(&[0, 1]), &World::set_of(&[])).unwrap();
    let frame = &kin_frames(&world, 2, &[(1, vec![0])])[0];
    let applied = world.apply(frame).unwrap();
    assert_eq!((applied.waits_from, applied.rejected), (None, vec![PageIndex(1)]));
}

#[test]
fn kin_that_the_guest_has_written_to_since_gives_no_wrong_page() {
    let mut world = World::new();
    world.source[0] = page_of(1);
    world.source[1] = page_of(1);
    world.source[1][7] = b'!';
    world.send(1, &World::all());
    world.arrivals.switch_over(Version(2), &World::set_of(&[1]), &World::set_of(&[])).unwrap();
    let frame = &kin_frames(&world, 2, &[(1, vec![0])])[0];
    world.memory.write_page(PageIndex(0), &page_of(2)).unwrap();
    assert_eq!(world.apply(frame).unwrap().rejected, vec![PageIndex(1)]);
    assert_eq!(world.table.state(PageIndex(1)).stage, Stage::Stale);
}

#[test]
fn a_message_that_makes_more_pages_zero_than_there_are_is_refused() {
    let mut world = World::new();
    let all = [PageRange::new(0, PAGES)];
    let mut message = Vec::new();
    world.encoder.encode_zero_runs(Version(1), &all, &mut message);
    let World { arrivals, scratch, .. } = &mut world;
    arrivals.apply(&message, true, scratch).unwrap();
    let twice = message.repeat(2);
    let error = arrivals.apply(&twice, true, scratch).unwrap_err();
    assert!(matches!(error, ApplyError::TooManyPages), "{error}");
}
