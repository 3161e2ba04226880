use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsRawFd;

use proptest::prelude::*;

use super::*;
use crate::memory::adopt::Adopted;
use crate::memory::huge_pool::{self, HugePool};
use crate::memory::testing::TestGuest;
use crate::memory::{Access, MemoryLayout, RegionBacking, RegionLayout};
use crate::page::{PAGE_SIZE_BYTES, PageIndex};

const PAGES: u64 = 300;

fn guest() -> (Arc<GuestMemory>, TestGuest) {
    let region = |name: &str, pages: u64| RegionLayout {
        name: name.to_owned(),
        size_bytes: pages * PAGE_SIZE_BYTES as u64,
    };
    let layout = MemoryLayout::new(vec![region("a", 100), region("b", PAGES - 100)]);
    let memory = Arc::new(GuestMemory::create(&layout).unwrap());
    let guest = TestGuest::start(&memory);
    (memory, guest)
}

/// The same memory as farfault has it at the source, which may open files for reading only.
fn read_only(memory: &GuestMemory) -> Arc<GuestMemory> {
    let mut regions = memory.region_files().unwrap();
    for region in &mut regions {
        let path = format!("/proc/self/fd/{}", region.file.as_raw_fd());
        region.file = File::open(path).unwrap();
    }
    Arc::new(GuestMemory::map(regions, Access::ReadOnly).unwrap())
}

fn tracker(
    kind: TrackerKind,
    memory: &Arc<GuestMemory>,
    guest: &TestGuest,
) -> Box<dyn DirtyTracker> {
    let adopted = Adopted::attach(guest.pid()).unwrap();
    let uffd = |features| adopted.userfaultfd(None, &[], features);
    let memory = Arc::clone(memory);
    let mut tracker = open_tracker(kind, memory, guest.pid(), guest.addresses(), uffd).unwrap();
    tracker.arm().unwrap();
    tracker
}

fn collect(tracker: &mut dyn DirtyTracker) -> Vec<u64> {
    let mut dirty = PageSet::empty(PAGES);
    tracker.collect(PageRange::new(0, PAGES), &mut dirty).unwrap();
    dirty.iter().map(|page| page.0).collect()
}

#[test]
fn a_look_at_part_of_a_huge_page_takes_all_of_it_in() {
    if !HostCapabilities::can_write_protect() {
        eprintln!("*** SKIPPED: no asynchronous write protection ***");
        return;
    }
    let (memory, mut guest) = guest();
    let mut tracker = tracker(TrackerKind::WriteProtect, &memory, &guest);
    (100..PAGES).map(PageIndex).for_each(|page| guest.write(page, 7));
    let (looked_at, address) = (200, guest.addresses()[1]);
    let mut found = PageSet::empty(PAGES);
    tracker.collect(PageRange::new(looked_at, looked_at + 1), &mut found).unwrap();
    // Of the second region, which begins with page 100.
    let huge_page = |page: u64| (address + (page - 100) * PAGE_SIZE_BYTES as u64) >> 21;
    let beside = |page: &u64| huge_page(*page) == huge_page(looked_at);
    let expected: Vec<u64> = (100..PAGES).filter(beside).collect();
    assert_eq!(found.iter().map(|page| page.0).collect::<Vec<_>>(), expected);
    let others: Vec<u64> = (100..PAGES).filter(|page| !beside(page)).collect();
    assert_eq!(collect(&mut *tracker), others, "each write is told once");
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Write(u64),
    WriteByKernel(u64),
    Read(u64),
    /// madvise by the guest's process.
    Remove(u64),
    /// fallocate by another.
    Punch(u64),
}

fn act() -> impl Strategy<Value = Act> {
    // Few pages, so that acts meet.
    let page = || prop_oneof![0..12u64, 95..105u64];
    prop_oneof![
        3 => page().prop_map(Act::Write),
        2 => page().prop_map(Act::WriteByKernel),
        2 => page().prop_map(Act::Read),
        1 => page().prop_map(Act::Remove),
        1 => page().prop_map(Act::Punch),
    ]
}

/// What happens while a page is sent.
#[derive(Clone, Copy, Debug)]
enum Between {
    Nothing,
    Act(Act),
    /// Another encoder has the dirty pages looked for, as in the second pass over a chunk.
    Look,
}

fn between() -> impl Strategy<Value = Between> {
    prop_oneof![
        6 => Just(Between::Nothing),
        3 => act().prop_map(Between::Act),
        1 => Just(Between::Look),
    ]
}

/// What compares the content of what the kernel reports, as of RAM on hugetlbfs.
fn comparing_tracker(memory: &Arc<GuestMemory>, guest: &TestGuest) -> Box<dyn DirtyTracker> {
    let adopted = Adopted::attach(guest.pid()).unwrap();
    let uffd = adopted.userfaultfd(None, &[], TRACK_FEATURES).unwrap();
    let (memory, addresses) = (Arc::clone(memory), guest.addresses());
    let mut tracker = HugeWriteProtect::new(memory, guest.pid(), addresses, uffd).unwrap();
    tracker.arm().unwrap();
    Box::new(tracker)
}

/// The guest, and what was sent of it: a word stands for a page.
struct Model {
    memory: Arc<GuestMemory>,
    guest: TestGuest,
    content: BTreeMap<u64, u64>,
    sent: BTreeMap<u64, u64>,
    touched: BTreeSet<u64>,
    acts: u64,
}

impl Model {
    fn new() -> Self {
        let (memory, guest) = guest();
        let (content, sent, touched) = Default::default();
        Model { memory, guest, content, sent, touched, acts: 0 }
    }

    fn perform(&mut self, act: Act) {
        self.acts += 1;
        // Few words, so that a page becomes again what it was.
        let word = 0x0101_0101_0101_0101 * (self.acts % 3 + 1);
        let (page, content) = match act {
            Act::Write(page) => {
                self.guest.write(PageIndex(page), word);
                (page, word)
            }
            Act::WriteByKernel(page) => {
                self.guest.write_by_kernel(PageIndex(page), word as u8);
                (page, word)
            }
            Act::Read(page) => {
                let content = self.content.get(&page).copied().unwrap_or_default();
                assert_eq!(self.guest.read(PageIndex(page)), content);
                // Reading a hole allocates it.
                (page, content)
            }
            Act::Remove(page) => {
                self.guest.remove(PageIndex(page));
                (page, 0)
            }
            Act::Punch(page) => {
                self.memory.punch_hole(PageRange::new(page, page + 1)).unwrap();
                (page, 0)
            }
        };
        self.content.insert(page, content);
        self.touched.insert(page);
    }

    /// Pages that are not as they were sent. At first all are zero and are taken to be sent.
    fn changed(&self) -> Vec<u64> {
        let differs = |(page, content): (&u64, &u64)| {
            (self.sent.get(page).copied().unwrap_or_default() != *content).then_some(*page)
        };
        self.content.iter().filter_map(differs).collect()
    }

    /// Sends `dirty` as the source does; between any two steps the guest goes on.
    fn send(
        &mut self,
        dirty: &[u64],
        from: &GuestMemory,
        witness: &dyn ReadWitness,
        mut go_on: impl FnMut(&mut Model),
    ) {
        let mut copy = [0; PAGE_SIZE_BYTES];
        for page in dirty {
            let one = PageRange::new(*page, page + 1);
            go_on(self);
            if from.populated(one).unwrap().is_empty() {
                go_on(self);
                witness.saw_holes(one);
                self.sent.insert(*page, 0);
            } else {
                go_on(self);
                from.read_page(one.start, &mut copy);
                go_on(self);
                witness.saw(one.start, &copy);
                self.sent.insert(*page, u64::from_ne_bytes(copy[..8].try_into().unwrap()));
            }
            go_on(self);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_tracker_misses_a_change(
        rounds in prop::collection::vec(
            (
                prop::collection::vec(act(), 0..12),
                prop::collection::vec(between(), 60),
            ),
            1..6,
        )
    ) {
        type Open = fn(&Arc<GuestMemory>, &TestGuest) -> Box<dyn DirtyTracker>;
        let write_protect: Open = |memory, guest| tracker(TrackerKind::WriteProtect, memory, guest);
        let hash_scan: Open = |memory, guest| tracker(TrackerKind::HashScan, memory, guest);
        let opened =
            [("write-protect", write_protect), ("hash-scan", hash_scan), ("both", comparing_tracker)];
        for (kind, open) in opened {
            let mut model = Model::new();
            let alias = read_only(&model.memory);
            let mut tracker = open(&alias, &model.guest);
            let witness = tracker.witness().unwrap();
            let (mut made_up, mut early) = (BTreeSet::new(), BTreeSet::new());
            for (acts, between) in &rounds {
                acts.iter().for_each(|act| model.perform(*act));
                let is_exact = kind == "hash-scan" && early.is_empty();
                early.extend(collect(tracker.as_mut()));
                let dirty: Vec<u64> = std::mem::take(&mut early).into_iter().collect();
                let changed = model.changed();
                for page in &changed {
                    prop_assert!(dirty.contains(page), "{kind} missed {page}: {dirty:?}");
                }
                // Where a first page came to be, write protection reports all around it, once.
                for page in dirty.iter().filter(|page| !model.touched.contains(page)) {
                    let may = kind == "write-protect" && made_up.insert(*page);
                    prop_assert!(may, "{kind} made up {page}");
                }
                if is_exact {
                    prop_assert_eq!(&dirty, &changed, "the hash scan is exact");
                }
                model.touched.clear();
                let mut between = between.iter();
                model.send(&dirty, &alias, witness.as_ref(), |model| match between.next() {
                    None | Some(Between::Nothing) => {}
                    Some(Between::Act(act)) => model.perform(*act),
                    Some(Between::Look) => early.extend(collect(tracker.as_mut())),
                });
            }
            early.extend(collect(tracker.as_mut()));
            let dirty: Vec<u64> = early.into_iter().collect();
            model.send(&dirty, &alias, witness.as_ref(), |_| {});
            prop_assert!(model.changed().is_empty(), "{kind} missed {:?}", model.changed());
            // What was sent with another content than was found is looked at once more.
            let again = collect(tracker.as_mut());
            prop_assert!(again.is_empty(), "{kind} reported twice {again:?}");
        }
    }
}

#[test]
fn write_protection_reports_the_written_pages_and_no_others() {
    let (memory, mut guest) = guest();
    (0..PAGES).for_each(|page| guest.write(PageIndex(page), 1));
    let mut tracker = tracker(TrackerKind::WriteProtect, &memory, &guest);
    assert!(collect(tracker.as_mut()).is_empty());
    for page in [3, 99, 100, 299] {
        guest.write(PageIndex(page), 2);
    }
    guest.write_by_kernel(PageIndex(49), 3);
    guest.read(PageIndex(7));
    assert_eq!(collect(tracker.as_mut()), [3, 49, 99, 100, 299]);
    let mut part = PageSet::empty(PAGES);
    guest.write(PageIndex(10), 4);
    guest.write(PageIndex(110), 4);
    tracker.collect(PageRange::new(50, 200), &mut part).unwrap();
    assert!(part.contains(PageIndex(110)));
    // Beside what was asked for, unless that is in another huge page.
    let told_early = part.contains(PageIndex(10));
    let later: &[u64] = if told_early { &[] } else { &[10] };
    assert_eq!(collect(tracker.as_mut()), later, "what was not asked for is not forgotten");
}

#[test]
fn what_was_never_touched_is_left_alone_until_it_is() {
    let size_bytes = 1 << 30;
    let layout = MemoryLayout::new(vec![RegionLayout { name: "ram".to_owned(), size_bytes }]);
    let memory = Arc::new(GuestMemory::create(&layout).unwrap());
    let mut guest = TestGuest::start(&memory);
    let mut tracker = tracker(TrackerKind::WriteProtect, &memory, &guest);
    let mut collect = || {
        let mut dirty = PageSet::empty(memory.pages());
        tracker.collect(PageRange::new(0, memory.pages()), &mut dirty).unwrap();
        dirty
    };
    let page_tables_kib = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", guest.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    assert!(collect().is_empty());
    // Eight bytes a page would be two thousand.
    assert!(page_tables_kib() < 500, "{} KiB", page_tables_kib());
    let page = PageIndex(memory.pages() / 2);
    guest.write(page, 1);
    let first = collect();
    assert!(first.contains(page) && first.len() <= 512, "{first:?}");
    assert!(collect().is_empty());
    guest.write(page, 2);
    assert_eq!(collect().iter().collect::<Vec<_>>(), [page]);
}

#[test]
fn a_hole_that_the_guest_filled_by_reading_it_is_reported() {
    let (memory, mut guest) = guest();
    for alias in [Arc::clone(&memory), read_only(&memory)] {
        for page in 0..32 {
            guest.write(PageIndex(page), 1);
        }
        let mut tracker = tracker(TrackerKind::WriteProtect, &alias, &guest);
        let witness = tracker.witness().unwrap();
        let send = |page| {
            let mut copy = [0; PAGE_SIZE_BYTES];
            alias.read_page(PageIndex(page), &mut copy);
            witness.saw(PageIndex(page), &copy);
        };
        (0..20).for_each(send);
        assert!(collect(tracker.as_mut()).is_empty());
        for page in [7, 25] {
            guest.remove(PageIndex(page));
            assert_eq!(guest.read(PageIndex(page)), 0);
        }
        // Reading a neighbour that has to be mapped must not bring it back. Page 25 was never sent.
        guest.remove(PageIndex(9));
        guest.write(PageIndex(9), 2);
        send(9);
        assert_eq!(collect(tracker.as_mut()), [7, 9]);
        assert!(collect(tracker.as_mut()).is_empty());
        guest.write(PageIndex(7), 2);
        assert_eq!(collect(tracker.as_mut()), [7]);
    }
}

/// 4 MiB of memory that the kernel fills in huge pages. Needs root.
fn huge_memory() -> Arc<GuestMemory> {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};

    let place = tempfile::tempdir().unwrap();
    let options = Some("size=16m,huge=always");
    mount(Some("tmpfs"), place.path(), Some("tmpfs"), MsFlags::empty(), options).unwrap();
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(place.path().join("ram"));
    umount2(place.path(), MntFlags::MNT_DETACH).unwrap();
    let (file, size_bytes) = (file.unwrap(), 1024 * PAGE_SIZE_BYTES as u64);
    file.set_len(size_bytes).unwrap();
    let layout = RegionLayout { name: "ram".to_owned(), size_bytes };
    let backing = RegionBacking { layout, file, file_offset_bytes: 0 };
    Arc::new(GuestMemory::map(vec![backing], Access::ReadWrite).unwrap())
}

#[test]
fn huge_pages_do_not_hide_a_hole() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("*** SKIPPED: not root ***");
        return;
    }
    // A page that was read before the tracker came stays mapped by way of a huge page, which tells
    // nothing of its parts: it is never taken to be unchanged.
    for (read_before, unchanged) in [(false, &[][..]), (true, &[3])] {
        let memory = huge_memory();
        let mut guest = TestGuest::start(&memory);
        guest.write(PageIndex(3), 1);
        assert_eq!(memory.populated(PageRange::new(0, 1024)).unwrap().len(), 512, "a huge page");
        let alias = read_only(&memory);
        let mut copy = [0; PAGE_SIZE_BYTES];
        if read_before {
            alias.read_page(PageIndex(3), &mut copy);
        }
        let mut tracker = tracker(TrackerKind::WriteProtect, &alias, &guest);
        let witness = tracker.witness().unwrap();
        let mut collect = || {
            let mut dirty = PageSet::empty(1024);
            tracker.collect(PageRange::new(0, 1024), &mut dirty).unwrap();
            dirty.iter().map(|page| page.0).collect::<Vec<_>>()
        };
        alias.read_page(PageIndex(3), &mut copy);
        witness.saw(PageIndex(3), &copy);
        assert_eq!(collect(), unchanged);
        witness.saw(PageIndex(3), &copy);
        guest.remove(PageIndex(3));
        assert_eq!(guest.read(PageIndex(3)), 0);
        alias.read_page(PageIndex(4), &mut copy);
        assert!(collect().contains(&3));
    }
}

#[test]
fn a_huge_page_that_came_and_was_split_between_two_looks_is_reported() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("*** SKIPPED: not root ***");
        return;
    }
    let memory = huge_memory();
    let mut guest = TestGuest::start(&memory);
    let mut tracker = tracker(TrackerKind::WriteProtect, &memory, &guest);
    tracker.witness().unwrap().saw_holes(PageRange::new(0, 1024));
    guest.write(PageIndex(3), 1);
    assert_eq!(memory.populated(PageRange::new(0, 1024)).unwrap().len(), 512, "a huge page");
    // The kernel splits it, and leaves nothing of it in the guest's page table; some kernels take that for unwritten.
    memory.punch_hole(PageRange::new(4, 5)).unwrap();
    let mut collect = || {
        let mut dirty = PageSet::empty(1024);
        tracker.collect(PageRange::new(0, 1024), &mut dirty).unwrap();
        dirty
    };
    assert!(collect().contains(PageIndex(3)));
    assert!(collect().is_empty());
    guest.write(PageIndex(3), 2);
    assert_eq!(collect().iter().collect::<Vec<_>>(), [PageIndex(3)]);
}

#[test]
fn write_tracking_can_be_taken_up_again() {
    let (memory, mut guest) = guest();
    (0..10).for_each(|page| guest.write(PageIndex(page), 1));
    for _ in 0..2 {
        let mut tracker = tracker(TrackerKind::WriteProtect, &memory, &guest);
        guest.write(PageIndex(3), 2);
        assert_eq!(collect(tracker.as_mut()), [3]);
        tracker.disarm().unwrap();
    }
    // One that was never disarmed, as after a crash.
    std::mem::forget(tracker(TrackerKind::WriteProtect, &memory, &guest));
    let mut successor = tracker(TrackerKind::Auto, &read_only(&memory), &guest);
    assert_eq!(successor.name(), "write-protect");
    guest.write(PageIndex(4), 2);
    assert_eq!(collect(successor.as_mut()), [4]);
}

#[test]
fn a_page_that_changes_back_after_it_was_read_is_reported() {
    let (memory, mut guest) = guest();
    let mut tracker = tracker(TrackerKind::HashScan, &memory, &guest);
    let page = PageIndex(5);
    guest.write(page, 1);
    assert_eq!(collect(tracker.as_mut()), [5]);
    guest.write(page, 2);
    let mut copy = [0; PAGE_SIZE_BYTES];
    memory.read_page(page, &mut copy);
    tracker.witness().unwrap().saw(page, &copy);
    guest.write(page, 1);
    assert_eq!(collect(tracker.as_mut()), [5]);
}

#[test]
fn trackers_are_called_by_name() {
    for (kind, name) in NAMES {
        assert_eq!(kind.to_string(), name);
        assert_eq!(name.parse(), Ok(kind));
    }
    assert!("wp".parse::<TrackerKind>().is_err());
}

#[test]
fn of_a_huge_page_that_is_written_to_only_what_has_changed_is_reported() {
    // The pages here are small; what the tracker does with a report of the kernel is the same.
    let (memory, mut guest) = guest();
    let alias = read_only(&memory);
    let mut tracker = comparing_tracker(&alias, &guest);
    let witness = tracker.witness().unwrap();
    let mut copy = [0; PAGE_SIZE_BYTES];
    for page in [3, 4, 5, 250] {
        guest.write(PageIndex(page), 1);
        alias.read_page(PageIndex(page), &mut copy);
        witness.saw(PageIndex(page), &copy);
    }
    assert!(collect(tracker.as_mut()).is_empty(), "all is as it was sent");
    guest.write(PageIndex(3), 2);
    guest.write(PageIndex(4), 2);
    guest.write(PageIndex(4), 1);
    // A balloon, and then it reads as zero.
    guest.remove(PageIndex(250));
    assert_eq!(collect(tracker.as_mut()), [3, 250]);
    assert!(collect(tracker.as_mut()).is_empty());
    tracker.disarm().unwrap();
}

#[test]
fn a_page_that_is_compared_while_it_is_under_way_is_compared_again() {
    let (memory, mut guest) = guest();
    let alias = read_only(&memory);
    let mut tracker = comparing_tracker(&alias, &guest);
    let (page, mut copy) = (PageIndex(5), [0; PAGE_SIZE_BYTES]);
    guest.write(page, 1);
    assert_eq!(collect(tracker.as_mut()), [5]);
    guest.write(page, 2);
    alias.read_page(page, &mut copy);
    guest.write(page, 1);
    assert!(collect(tracker.as_mut()).is_empty(), "it is as it was at the last look");
    tracker.witness().unwrap().saw(page, &copy);
    assert_eq!(collect(tracker.as_mut()), [5]);
}

#[test]
fn a_hole_on_hugetlbfs_that_the_guest_filled_by_reading_it_is_reported() {
    const SMALL: u64 = 10;
    let Some(_pool) = HugePool::of(2) else { return };
    let memory = huge_pool::memory(SMALL, 2 * huge::HUGE_PAGES).unwrap();
    let mut guest = TestGuest::start(&memory);
    let alias = read_only(&memory);
    let all = PageRange::new(0, memory.pages());
    let mut tracker = comparing_tracker(&alias, &guest);
    let witness = tracker.witness().unwrap();
    let look = |tracker: &mut dyn DirtyTracker| {
        let mut dirty = PageSet::empty(all.end.0);
        tracker.collect(all, &mut dirty).unwrap();
        dirty.iter().map(|page| page.0).collect::<Vec<_>>()
    };
    let (first, second) = (SMALL + 7, SMALL + huge::HUGE_PAGES);
    let mut copy = [0; PAGE_SIZE_BYTES];
    for page in [3, first, first + 1, second].map(PageIndex) {
        guest.write(page, 1);
        alias.read_page(page, &mut copy);
        witness.saw(page, &copy);
    }
    // The others of the huge pages are looked at for the first time.
    look(tracker.as_mut());
    assert!(look(tracker.as_mut()).is_empty());
    for hole in [PageRange::new(3, 4), PageRange::new(SMALL, second)] {
        memory.punch_hole(hole).unwrap();
        assert_eq!(guest.read(PageIndex(hole.end.0 - 1)), 0);
    }
    assert_eq!(look(tracker.as_mut()), [3, first, first + 1]);
    assert!(look(tracker.as_mut()).is_empty());
}
