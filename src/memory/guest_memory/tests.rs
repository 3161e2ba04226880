use super::*;

fn two_regions() -> MemoryLayout {
    let region = |name: &str, pages: u64| RegionLayout {
        name: name.to_owned(),
        size_bytes: pages * PAGE_SIZE_BYTES as u64,
    };
    MemoryLayout::new(vec![region("ram1", 8), region("ram0", 16)])
}

fn filled(byte: u8) -> PageBytes {
    [byte; PAGE_SIZE_BYTES]
}

#[test]
fn what_is_written_is_read_back_in_every_region() {
    let memory = GuestMemory::create(&two_regions()).unwrap();
    for page in (0..memory.pages()).map(PageIndex) {
        memory.write_page(page, &filled(page.0 as u8 + 1)).unwrap();
    }
    let mut copy = filled(0);
    for page in (0..memory.pages()).map(PageIndex) {
        memory.read_page(page, &mut copy);
        assert_eq!(copy, filled(page.0 as u8 + 1), "{page:?}");
    }
}

#[test]
fn holes_are_found_across_regions_and_made_again() {
    let memory = GuestMemory::create(&two_regions()).unwrap();
    assert!(memory.populated(PageRange::new(0, 24)).unwrap().is_empty());
    for page in [3, 4, 14, 15, 16, 17, 23] {
        memory.write_page(PageIndex(page), &filled(7)).unwrap();
    }
    memory.punch_hole(PageRange::new(15, 17)).unwrap();
    let found: Vec<_> =
        memory.populated(PageRange::new(0, 24)).unwrap().iter().map(|p| p.0).collect();
    assert_eq!(found, [3, 4, 14, 17, 23]);
    assert_eq!(memory.populated(PageRange::new(4, 15)).unwrap().len(), 2);
    let mut copy = filled(1);
    memory.read_page(PageIndex(16), &mut copy);
    assert_eq!(copy, filled(0));
}

#[test]
fn a_region_may_start_inside_its_file() {
    let memory = GuestMemory::create(&two_regions()).unwrap();
    memory.write_page(PageIndex(5), &filled(9)).unwrap();
    let mut backing = memory.region_files().unwrap().swap_remove(0);
    backing.file_offset_bytes = 4 * PAGE_SIZE_BYTES as u64;
    backing.layout.size_bytes = 4 * PAGE_SIZE_BYTES as u64;
    let part = GuestMemory::map(vec![backing], Access::ReadOnly).unwrap();
    let populated = part.populated(PageRange::new(0, 4)).unwrap();
    assert_eq!(populated.iter().collect::<Vec<_>>(), [PageIndex(1)]);
    let mut copy = filled(0);
    part.read_page(PageIndex(1), &mut copy);
    assert_eq!(copy, filled(9));
    let refused = part.write_page(PageIndex(1), &copy);
    assert!(matches!(refused, Err(MemoryError::ReadOnly { .. })), "{refused:?}");
}

#[test]
fn a_file_that_ends_too_early_is_refused() {
    let memory = GuestMemory::create(&two_regions()).unwrap();
    let mut backing = memory.region_files().unwrap().swap_remove(1);
    backing.layout.size_bytes *= 2;
    let refused = GuestMemory::map(vec![backing], Access::ReadOnly);
    assert!(matches!(refused, Err(MemoryError::BackingTooSmall { .. })), "{refused:?}");
}

#[test]
fn a_full_file_system_is_an_error_and_not_a_signal() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};

    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    mount(Some("tmpfs"), place.path(), Some("tmpfs"), MsFlags::empty(), Some("size=16k")).unwrap();
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let file = options.open(place.path().join("ram")).unwrap();
    file.set_len(64 * PAGE_SIZE_BYTES as u64).unwrap();
    let layout = RegionLayout { name: "ram".to_owned(), size_bytes: 64 * PAGE_SIZE_BYTES as u64 };
    let backing = RegionBacking { layout, file, file_offset_bytes: 0 };
    let memory = GuestMemory::map(vec![backing], Access::ReadWrite).unwrap();
    let written: Result<Vec<_>, _> =
        (0..64).map(|page| memory.write_page(PageIndex(page), &filled(1))).collect();
    assert!(matches!(written, Err(MemoryError::NoSpace { .. })), "{written:?}");
    let populated = memory.populated(PageRange::new(0, 64)).unwrap().len();
    assert!((1..=4).contains(&populated), "{populated} pages in 16 KiB");
    memory.write_page(PageIndex(0), &filled(2)).expect("a page that is there needs no room");
    drop(memory);
    umount2(place.path(), MntFlags::MNT_DETACH).unwrap();
}
