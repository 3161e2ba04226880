use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::super::huge_pool::{HugePool, backing, memory, unreserved};
use super::*;
use crate::memory::{Access, GuestMemory, MemoryError, RegionBacking, RegionLayout};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange};

/// Pages of a huge page.
const UNIT: u64 = HUGE_PAGE_BYTES / PAGE_SIZE_BYTES as u64;
/// Pages of the region before.
const SMALL: u64 = 10;

fn filled(byte: u8) -> PageBytes {
    [byte; PAGE_SIZE_BYTES]
}

fn read(memory: &GuestMemory, page: u64) -> PageBytes {
    let mut copy = filled(0xee);
    memory.read_page(PageIndex(page), &mut copy);
    copy
}

#[test]
fn pages_of_4_kib_are_written_and_cleared_one_by_one() {
    let Some(_pool) = HugePool::of(3) else { return };
    let memory = memory(SMALL, 3 * UNIT).unwrap();
    let all = PageRange::new(0, memory.pages());
    assert!(memory.populated(all).unwrap().is_empty());
    // From the region before into the first huge page, and from the first into the second.
    let (across, between) = (SMALL - 1, SMALL + UNIT - 1);
    for first in [across, between] {
        memory.write_pages(PageIndex(first), &[filled(1), filled(2)]).unwrap();
    }
    for (first, behind) in [(across, SMALL), (between, between + 1)] {
        assert_eq!([read(&memory, first), read(&memory, behind)], [filled(1), filled(2)]);
        assert_eq!(read(&memory, behind + 1), filled(0));
    }
    let held = PageRange::new(SMALL, SMALL + 2 * UNIT);
    assert_eq!(memory.populated_runs(all).unwrap(), [PageRange::new(across, SMALL), held]);
    assert_eq!(memory.first_populated(PageRange::new(0, across)).unwrap(), None);
    assert_eq!(
        memory.first_populated(PageRange::new(SMALL + 7, SMALL + 9)).unwrap(),
        Some(PageIndex(SMALL + 7))
    );
    assert_eq!(memory.first_populated(PageRange { start: held.end, end: all.end }).unwrap(), None);
    memory.clear(PageRange::new(across, SMALL + UNIT)).unwrap();
    for page in across..SMALL + UNIT {
        assert_eq!(read(&memory, page), filled(0), "{page}");
    }
    assert_eq!(read(&memory, SMALL + UNIT), filled(2), "another page of a huge page stays");
    memory.punch_hole(PageRange { start: PageIndex(SMALL), end: all.end }).unwrap();
    assert!(memory.populated(memory.layout().range_of(1)).unwrap().is_empty());
    assert_eq!(read(&memory, SMALL + UNIT), filled(0));
    let part = memory.punch_hole(PageRange::new(SMALL, SMALL + 1));
    assert!(matches!(part, Err(MemoryError::Backing { .. })), "{part:?}");
}

#[test]
fn after_a_takeover_everything_may_hold_something() {
    let Some(_pool) = HugePool::of(2) else { return };
    let memory = memory(SMALL, 2 * UNIT).unwrap();
    let range = memory.layout().range_of(1);
    let again = GuestMemory::map(memory.region_files().unwrap(), Access::ReadWrite).unwrap();
    assert_eq!(again.populated_runs(range).unwrap(), [range]);
}

#[test]
fn what_others_put_there_is_seen() {
    let Some(_pool) = HugePool::of(2) else { return };
    let memory = memory(SMALL, 2 * UNIT).unwrap();
    let other = GuestMemory::map(memory.region_files().unwrap(), Access::ReadWrite).unwrap();
    other.write_page(PageIndex(SMALL + 3), &filled(1)).unwrap();
    assert!(memory.populated(memory.layout().range_of(1)).unwrap().is_empty());
    assert_eq!(memory.pages_in_huge_files().unwrap(), UNIT);
    memory.punch_hole(memory.layout().range_of(1)).unwrap();
    assert_eq!(memory.pages_in_huge_files().unwrap(), 0);
}

#[test]
fn what_cannot_be_read_is_an_error_where_one_can_do_without() {
    let Some(_pool) = HugePool::of(2) else { return };
    let memory = memory(SMALL, 2 * UNIT).unwrap();
    memory.write_page(PageIndex(SMALL), &filled(1)).unwrap();
    memory.region_files().unwrap()[1].file.set_len(0).unwrap();
    let read = memory.try_read_page(PageIndex(SMALL), &mut filled(0));
    assert!(matches!(read, Err(MemoryError::Backing { .. })), "{read:?}");
    let cleared = memory.clear(PageRange::new(SMALL, SMALL + 1));
    assert!(matches!(cleared, Err(MemoryError::Backing { .. })), "{cleared:?}");
}

#[test]
fn room_in_the_pool_stays_reserved_behind_a_hole() {
    let Some(_pool) = HugePool::of(3) else { return };
    let before = unreserved();
    let memory = memory(SMALL, 2 * UNIT).unwrap();
    assert_eq!(unreserved(), before - 2);
    for page in [SMALL, SMALL + UNIT] {
        memory.write_page(PageIndex(page), &filled(1)).unwrap();
    }
    assert_eq!(unreserved(), before - 2);
    memory.punch_hole(memory.layout().range_of(1)).unwrap();
    assert_eq!(unreserved(), before - 2);
    drop(memory);
    assert_eq!(unreserved(), before);
}

#[test]
fn an_empty_pool_is_an_error_and_not_a_signal() {
    let Some(pool) = HugePool::of(2) else { return };
    if unreserved() != 2 {
        eprintln!("*** SKIPPED: others have huge pages too ***");
        return;
    }
    let refused = memory(SMALL, 3 * UNIT);
    assert!(matches!(refused, Err(MemoryError::NoHugePages { .. })), "{refused:?}");
    let memory = memory(SMALL, 2 * UNIT).unwrap();
    memory.write_page(PageIndex(SMALL), &filled(1)).unwrap();
    // As the guest's balloon does it, behind our back.
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let file = &memory.region_files().unwrap()[1].file;
    fallocate(file, punch, 0, HUGE_PAGE_BYTES as i64).unwrap();
    pool.shrink(1);
    let written = memory.write_page(PageIndex(SMALL), &filled(2));
    assert!(matches!(written, Err(MemoryError::NoSpace { page: PageIndex(SMALL) })), "{written:?}");
    memory.write_page(PageIndex(SMALL + UNIT), &filled(3)).expect("that room was reserved");
    // The guest runs on with what it has, and so it can be taken over.
    let files = memory.region_files().unwrap();
    let again = GuestMemory::map(files, Access::ReadWrite).unwrap();
    assert_eq!(read(&again, SMALL + UNIT), filled(3));
    again.write_page(PageIndex(SMALL + UNIT), &filled(4)).unwrap();
    let refused = again.reserve_huge_pages();
    assert!(matches!(refused, Err(MemoryError::NoHugePages { .. })), "{refused:?}");
}

#[test]
fn who_takes_over_writes_into_what_was_reserved_before() {
    let Some(_pool) = HugePool::of(2) else { return };
    let memory = memory(SMALL, 2 * UNIT).unwrap();
    let again = GuestMemory::map(memory.region_files().unwrap(), Access::ReadWrite).unwrap();
    drop(memory);
    let free = unreserved();
    again.write_page(PageIndex(SMALL), &filled(1)).unwrap();
    assert_eq!(unreserved(), free, "no page but a reserved one");
}

#[test]
fn what_is_not_whole_huge_pages_is_refused() {
    let Some(_pool) = HugePool::of(2) else { return };
    let map = |access| GuestMemory::map(vec![backing("ram", UNIT + 1, true)], access).map(drop);
    let refused = map(Access::ReadWrite).unwrap_err();
    assert!(matches!(refused, MemoryError::HugePages { .. }), "{refused}");
    assert!(refused.hint().is_some());
    map(Access::ReadOnly).unwrap();
}

#[test]
fn huge_pages_of_1_gib_are_refused() {
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB | MFdFlags::MFD_CLOEXEC;
    let Ok(file) = memfd_create("ram", flags) else {
        eprintln!("*** SKIPPED: no huge pages of 1 GiB here ***");
        return;
    };
    let file = File::from(file);
    file.set_len(1 << 30).unwrap();
    let layout = RegionLayout { name: "ram".to_owned(), size_bytes: 1 << 30 };
    let backing = RegionBacking { layout, file, file_offset_bytes: 0 };
    let refused = GuestMemory::map(vec![backing], Access::ReadWrite).unwrap_err();
    assert!(refused.to_string().contains("1048576 KiB"), "{refused}");
    assert!(refused.hint().is_some_and(|hint| hint.contains("pagesize=2M")));
}

#[test]
fn what_is_only_read_may_hold_something_everywhere() {
    let Some(_pool) = HugePool::of(2) else { return };
    let memory = memory(SMALL, 2 * UNIT).unwrap();
    let alias = GuestMemory::map(memory.region_files().unwrap(), Access::ReadOnly).unwrap();
    let range = memory.layout().range_of(1);
    let part = PageRange::new(range.start.0 + 5, range.end.0 - 5);
    assert_eq!(alias.populated_runs(part).unwrap(), [part]);
    assert_eq!(alias.first_populated(part).unwrap(), Some(part.start));
}
