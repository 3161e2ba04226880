//! The whole life of a destination: another process is the guest, its userfaultfd is made inside it.

use std::sync::mpsc;

use super::*;
use crate::memory::adopt::Adopted;
use crate::memory::table::Claim;
use crate::memory::testing::{TestGuest, mixture};
use crate::memory::{FAULT_FEATURES, GuestMemory, MemoryLayout, RegionLayout};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageSet, Version};

const PAGES: u64 = 512;

pub(super) struct Destination {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) guest: TestGuest,
    pub(super) table: Arc<PageTable>,
    pub(super) userfault: Arc<Userfault>,
}

impl Destination {
    fn prepare() -> Self {
        let region = |name: &str, pages: u64| RegionLayout {
            name: name.to_owned(),
            size_bytes: pages * PAGE_SIZE_BYTES as u64,
        };
        let layout = MemoryLayout::new(vec![region("a", 200), region("b", PAGES - 200)]);
        Self::of(GuestMemory::create(&layout).unwrap())
    }

    pub(super) fn of(memory: GuestMemory) -> Self {
        let memory = Arc::new(memory);
        let guest = TestGuest::start(&memory);
        let adopted = Adopted::attach(guest.pid()).unwrap();
        let uffd = adopted.userfaultfd(None, &[], FAULT_FEATURES).unwrap();
        let registered = Userfault::register(uffd, &memory.units(), guest.addresses());
        let userfault = Arc::new(registered.unwrap());
        let table = Arc::new(PageTable::anonymous(memory.pages()).unwrap());
        Destination { memory, guest, table, userfault }
    }

    pub(super) fn apply(&self, page: PageIndex, version: u16, last: bool) -> bool {
        let claim = self.table.claim(page, Version(version));
        assert!(matches!(claim, Claim::Claimed { .. }), "{page:?}: {claim:?}");
        let zero = is_zero(page);
        if !zero {
            self.memory.write_page(page, &content(page, version)).unwrap();
        }
        self.table.finish(page, Version(version), zero, last)
    }

    pub(super) fn serve(&self, ask: impl Fn(PageIndex, AskedFor) + Send + 'static) -> FaultServer {
        self.serve_asking_again(ask, || true)
    }

    pub(super) fn serve_asking_again(
        &self,
        ask: impl Fn(PageIndex, AskedFor) + Send + 'static,
        may_ask_again: impl Fn() -> bool + Send + 'static,
    ) -> FaultServer {
        let (userfault, table) = (Arc::clone(&self.userfault), Arc::clone(&self.table));
        let options = FaultOptions::default();
        FaultServer::start(userfault, table, options, ask, may_ask_again).unwrap()
    }
}

fn is_zero(page: PageIndex) -> bool {
    page.0.is_multiple_of(5)
}

fn content(page: PageIndex, version: u16) -> PageBytes {
    let mut bytes = [0; PAGE_SIZE_BYTES];
    if !is_zero(page) {
        for (n, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(
                &(page.0 << 32 | u64::from(version) << 16 | n as u64).to_ne_bytes(),
            );
        }
    }
    bytes
}

pub(super) fn expected(page: PageIndex, version: u16) -> u64 {
    let bytes = content(page, version);
    mixture(bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())))
}

/// A page order that visits every page once and jumps about.
fn shuffled() -> impl Iterator<Item = PageIndex> {
    shuffled_of(PAGES)
}

fn shuffled_of(pages: u64) -> impl Iterator<Item = PageIndex> {
    (0..pages).map(move |n| PageIndex(n * 167 % pages))
}

#[test]
fn the_guest_never_sees_a_stale_byte() {
    move_while_it_works(Destination::prepare());
}

/// The guest reads and writes all pages while they arrive, pushed and as asked for.
pub(super) fn move_while_it_works(mut destination: Destination) {
    let pages = destination.memory.pages();
    let shuffled = || shuffled_of(pages);
    // A third was never sent, a third was sent and dirtied since, a third is clean.
    let mut need = PageSet::empty(pages);
    for page in shuffled() {
        match page.0 % 3 {
            0 => drop(need.insert(page)),
            1 => {
                destination.apply(page, 1, false);
                need.insert(page);
            }
            _ => drop(destination.apply(page, 2, false)),
        }
    }
    let (asked, requests) = mpsc::channel();
    let server = destination.serve(move |page, _| asked.send(page).unwrap());
    assert!(destination.table.freeze(&need).unwrap().is_empty());

    let guest = &mut destination.guest;
    let (table, memory) = (&destination.table, &destination.memory);
    let (server, need) = (&server, &need);
    let applied = std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            for page in shuffled() {
                assert_eq!(guest.read_whole(page), expected(page, 2), "{page:?}");
                // What is mapped is the guest's: it writes, and nothing that comes late may undo it.
                guest.write(page, page.0 + 7);
            }
            for page in shuffled() {
                assert_eq!(guest.read(page), page.0 + 7, "{page:?}");
            }
        });
        let apply = move |page: PageIndex| {
            let Claim::Claimed { .. } = table.claim(page, Version(2)) else { return false };
            let zero = is_zero(page);
            if !zero {
                memory.write_page(page, &content(page, 2)).unwrap();
            }
            table.finish(page, Version(2), zero, true);
            server.map_arrived(&[page]).unwrap();
            true
        };
        let by_request = scope.spawn(move || {
            let wait = Duration::from_millis(300);
            std::iter::from_fn(|| requests.recv_timeout(wait).ok()).filter(|p| apply(*p)).count()
        });
        // The pusher comes along slowly, and repeats what was sent for a request.
        let by_push = scope.spawn(move || {
            let pushed = need.iter().filter(|page| {
                std::thread::sleep(Duration::from_micros(300));
                apply(*page)
            });
            pushed.count()
        });
        let mapper = Mapper::start(server).unwrap();
        reader.join().unwrap();
        mapper.finish().unwrap();
        by_request.join().unwrap() + by_push.join().unwrap()
    });
    assert_eq!(applied as u64, pages.div_ceil(3) + (pages + 1) / 3, "every needed page once");
    assert!(table.incomplete().is_empty());
    assert!(table.waiting_pages().is_empty());
    let stats = server.stats();
    assert!(stats.remote_faults > 0, "{stats:?}");
    assert_eq!(stats.remote_latency_us.len(), stats.remote_faults);
    // A third of the pages was never sent, a third was sent and dirtied since.
    let by_cause = [&stats.absent_latency_us, &stats.stale_latency_us].map(|of| of.len());
    assert!(by_cause.iter().all(|pages| *pages > 0), "{by_cause:?}");
    assert_eq!(by_cause.iter().sum::<u64>(), stats.remote_faults);
    assert!(stats.stall_any_us <= stats.stall_sum_us + 1, "{stats:?}");
}

#[test]
fn a_fault_before_the_switchover_is_served_by_it() {
    let mut destination = Destination::prepare();
    let (page, other) = (PageIndex(3), PageIndex(4));
    for page in shuffled() {
        destination.apply(page, 1, false);
    }
    let (asked, requests) = mpsc::channel();
    let server = destination.serve(move |page, _| asked.send(page).unwrap());
    let (guest, table) = (&mut destination.guest, &destination.table);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || [guest.read_whole(page), guest.read_whole(other)]);
        assert_eq!(requests.recv_timeout(Duration::from_secs(5)), Ok(page));
        assert!(!reader.is_finished(), "a stale page was let through");
        let waiting = table.freeze(&PageSet::empty(PAGES)).unwrap();
        assert_eq!(waiting, [page]);
        server.map_arrived(&waiting).unwrap();
        assert_eq!(reader.join().unwrap(), [expected(page, 1), expected(other, 1)]);
    });
}

#[test]
fn a_page_that_the_balloon_took_reads_as_zero() {
    let mut destination = Destination::prepare();
    for page in shuffled() {
        destination.apply(page, 1, true);
    }
    let server = destination.serve(|page, _| panic!("{page:?} is here"));
    let page = PageIndex(203);
    assert_eq!(destination.guest.read_whole(page), expected(page, 1));
    destination.guest.remove(page);
    assert_eq!(destination.guest.read(page), 0, "taken after it was mapped");
    let unmapped = PageIndex(403);
    destination.memory.punch_hole(PageRange::new(unmapped.0, unmapped.0 + 1)).unwrap();
    let mapped = Mapper::start(&server).unwrap().finish().unwrap();
    // All but those of zeros, the four that the first fault mapped, and the one that was taken.
    assert_eq!(mapped, PAGES - PAGES.div_ceil(5) - 4 - 1);
    assert_eq!(destination.guest.read(unmapped), 0, "taken before it was mapped");
    assert!(server.take_failure().is_none());
}

#[test]
fn zero_pages_stay_holes_until_they_are_touched() {
    let mut destination = Destination::prepare();
    for page in shuffled() {
        destination.apply(page, 1, true);
    }
    let server = destination.serve(|page, _| panic!("{page:?} is here"));
    Mapper::start(&server).unwrap().finish().unwrap();
    let all = PageRange::new(0, PAGES);
    let zeros = PAGES.div_ceil(5);
    assert_eq!(destination.memory.populated(all).unwrap().len(), PAGES - zeros);
    assert_eq!(destination.guest.read(PageIndex(5)), 0);
    assert_eq!(destination.memory.populated(all).unwrap().len(), PAGES - zeros + 1);
    drop(server);
    destination.userfault.release().unwrap();
    for page in shuffled() {
        assert_eq!(destination.guest.read_whole(page), expected(page, 1), "{page:?}");
    }
}

#[test]
fn a_fault_reader_that_panics_is_noticed() {
    let mut destination = Destination::prepare();
    let server = destination.serve(|page, _| panic!("as a test: {page:?}"));
    let page = PageIndex(7);
    let Destination { guest, memory, table, .. } = &mut destination;
    let failure = std::thread::scope(|scope| {
        let reader = scope.spawn(|| guest.read_whole(page));
        let failure = loop {
            match server.take_failure() {
                Some(failure) => break failure,
                None => std::thread::sleep(TICK),
            }
        };
        // What comes is mapped all the same, and wakes who waits.
        let _ = table.claim(page, Version(1));
        memory.write_page(page, &content(page, 1)).unwrap();
        assert!(table.finish(page, Version(1), false, true));
        server.map_arrived(&[page]).unwrap();
        assert_eq!(reader.join().unwrap(), expected(page, 1));
        failure
    });
    assert!(matches!(failure, MemoryError::FaultReaderGone), "{failure}");
}

#[test]
fn a_guest_that_ends_is_noticed() {
    let destination = Destination::prepare();
    destination.apply(PageIndex(1), 1, true);
    let Destination { guest, userfault, memory, .. } = destination;
    drop(guest);
    let mapped = userfault.map(PageRange::new(1, 2));
    assert!(matches!(mapped, Err(MemoryError::ProcessGone)), "{mapped:?}");
    userfault.release().unwrap();
    assert_eq!(memory.pages(), PAGES);
}
