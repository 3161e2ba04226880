use proptest::prelude::*;

use super::*;
use crate::memory::adopt::Adopted;
use crate::memory::testing::TestGuest;
use crate::memory::{MemoryLayout, RegionLayout};
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

/// What a tracker must report at least, and may at most.
#[derive(Default)]
struct Model {
    content: std::collections::BTreeMap<u64, u64>,
    reported: std::collections::BTreeMap<u64, u64>,
    touched: std::collections::BTreeSet<u64>,
}

impl Model {
    fn perform(&mut self, act: Act, number: u64, memory: &GuestMemory, guest: &mut TestGuest) {
        let word = 0x0101_0101_0101_0101 * (number % 250 + 1);
        let (page, content) = match act {
            Act::Write(page) => {
                guest.write(PageIndex(page), word);
                (page, word)
            }
            Act::WriteByKernel(page) => {
                guest.write_by_kernel(PageIndex(page), word as u8);
                (page, word)
            }
            Act::Read(page) => {
                let content = self.content.get(&page).copied().unwrap_or_default();
                assert_eq!(guest.read(PageIndex(page)), content);
                // Reading a hole allocates it.
                (page, content)
            }
            Act::Remove(page) => {
                guest.remove(PageIndex(page));
                (page, 0)
            }
            Act::Punch(page) => {
                memory.punch_hole(PageRange::new(page, page + 1)).unwrap();
                (page, 0)
            }
        };
        self.content.insert(page, content);
        self.touched.insert(page);
    }

    /// What write protection is blind to: data became a hole and, by reading, data again between two
    /// collections.
    fn hides_a_hole(&self, act: Act) -> bool {
        let Act::Read(page) = act else { return false };
        self.changed().contains(&page) && self.content[&page] == 0
    }

    fn changed(&self) -> Vec<u64> {
        let differs = |(page, content): (&u64, &u64)| {
            let before = self.reported.get(page).copied().unwrap_or_default();
            (before != *content).then_some(*page)
        };
        self.content.iter().filter_map(differs).collect()
    }

    fn check(&mut self, dirty: &[u64], name: &str) {
        for page in self.changed() {
            assert!(dirty.contains(&page), "{name} missed {page}: {dirty:?}");
        }
        for page in dirty {
            assert!(self.touched.contains(page), "{name} made up {page}");
        }
        self.reported.clone_from(&self.content);
        self.touched.clear();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn no_tracker_misses_a_change(
        rounds in prop::collection::vec(prop::collection::vec(act(), 0..12), 1..6)
    ) {
        for kind in [TrackerKind::WriteProtect, TrackerKind::HashScan] {
            let (memory, mut guest) = guest();
            let mut tracker = tracker(kind, &memory, &guest);
            let mut model = Model::default();
            let mut number = 0;
            for round in &rounds {
                for act in round {
                    if kind == TrackerKind::WriteProtect && model.hides_a_hole(*act) {
                        continue;
                    }
                    number += 1;
                    model.perform(*act, number, &memory, &mut guest);
                }
                let changed = model.changed();
                let dirty = collect(tracker.as_mut());
                if kind == TrackerKind::HashScan {
                    prop_assert_eq!(&dirty, &changed, "the hash scan is exact");
                }
                model.check(&dirty, tracker.name());
            }
            prop_assert!(collect(tracker.as_mut()).is_empty(), "nothing is reported twice");
        }
    }
}

#[test]
fn write_protection_reports_the_written_pages_and_no_others() {
    let (memory, mut guest) = guest();
    for page in 0..50 {
        guest.write(PageIndex(page), 1);
    }
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
    assert_eq!(part.iter().collect::<Vec<_>>(), [PageIndex(110)]);
    assert_eq!(collect(tracker.as_mut()), [10], "what was not asked for is not forgotten");
}

#[test]
fn write_tracking_can_be_taken_up_again() {
    let (memory, mut guest) = guest();
    for _ in 0..2 {
        let mut tracker = tracker(TrackerKind::WriteProtect, &memory, &guest);
        guest.write(PageIndex(3), 2);
        assert_eq!(collect(tracker.as_mut()), [3]);
        tracker.disarm().unwrap();
    }
    // One that was never disarmed, as after a crash.
    std::mem::forget(tracker(TrackerKind::WriteProtect, &memory, &guest));
    let mut successor = tracker(TrackerKind::Auto, &memory, &guest);
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
