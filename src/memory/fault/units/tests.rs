//! As the tests of single pages, with RAM that lies in huge pages, behind a region that does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};

use super::super::tests::{Destination, expected, move_while_it_works};
use super::super::{FaultServer, Mapper};
use super::*;
use crate::memory::PageTable;
use crate::memory::huge_file::HUGE_PAGE_BYTES;
use crate::memory::huge_pool::{HugePool, memory};
use crate::page::PageSet;

const UNIT: u64 = 512;
const SMALL: u64 = 200;
const SOON: Duration = Duration::from_secs(10);

fn destination() -> Option<(HugePool, Destination)> {
    destination_and(0)
}

/// And so many huge pages to spare.
fn destination_and(spare: u64) -> Option<(HugePool, Destination)> {
    let pool = HugePool::of(2 + spare)?;
    Some((pool, Destination::of(memory(SMALL, 2 * UNIT).unwrap())))
}

fn unit(number: u64) -> PageRange {
    PageRange::new(SMALL + number * UNIT, SMALL + (number + 1) * UNIT)
}

fn set_of(destination: &Destination, pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::empty(destination.memory.pages());
    for page in pages {
        set.insert(PageIndex(page));
    }
    set
}

/// Huge pages that the file has.
fn huge_pages(destination: &Destination) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = destination.memory.region_files().unwrap();
    files[1].file.metadata().unwrap().blocks() * 512 / HUGE_PAGE_BYTES
}

fn asking(destination: &Destination) -> (FaultServer, Receiver<(PageIndex, AskedFor)>) {
    let (asked, requests) = mpsc::channel();
    let server = destination.serve(move |page, whom| asked.send((page, whom)).unwrap());
    (server, requests)
}

#[test]
fn in_huge_pages_the_guest_never_sees_a_stale_byte() {
    let Some((_pool, destination)) = destination() else { return };
    move_while_it_works(destination);
}

#[test]
fn a_fault_asks_once_for_all_that_is_missing_and_waits_for_the_last() {
    let Some((_pool, mut destination)) = destination() else { return };
    for page in unit(0).pages().chain(unit(1).pages()) {
        destination.apply(page, 1, false);
    }
    let missing = [SMALL + 3, SMALL + 7, SMALL + 511];
    let (server, requests) = asking(&destination);
    destination.table.freeze(&set_of(&destination, (0..SMALL).chain(missing))).unwrap();
    let touched = PageIndex(SMALL + 100);
    let Destination { memory, guest, table, .. } = &mut destination;
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let one = guest.read_whole(touched);
            (one, guest.read_whole(PageIndex(missing[0])), guest.read(unit(1).start))
        });
        let asked: Vec<_> = missing.iter().map(|_| requests.recv_timeout(SOON).unwrap()).collect();
        assert_eq!(
            asked.iter().map(|asked| asked.0.0).collect::<Vec<_>>(),
            [missing[1], missing[2], missing[0]]
        );
        let whom: Vec<_> = asked.iter().map(|asked| asked.1).collect();
        assert_eq!(whom[..2], [AskedFor::Unit; 2]);
        assert!(matches!(whom[2], AskedFor::Thread(Some(_))), "{whom:?}");
        for page in missing.map(PageIndex) {
            std::thread::sleep(Duration::from_millis(30));
            assert!(!reader.is_finished(), "let through before {page:?} came");
            assert!(matches!(table.claim(page, Version(2)), crate::memory::Claim::Claimed { .. }));
            memory.write_page(page, &[page.0 as u8; 4096]).unwrap();
            assert!(table.finish(page, Version(2), false, true), "waited for");
            server.map_arrived(&[page]).unwrap();
        }
        let (touched_was, missing_was, other_unit) = reader.join().unwrap();
        assert_eq!(touched_was, expected(touched, 1));
        let filled = std::iter::repeat_n(u64::from_ne_bytes([missing[0] as u8; 8]), 512);
        assert_eq!(missing_was, crate::memory::testing::mixture(filled));
        assert_ne!(other_unit, 0);
    });
    assert_eq!(requests.try_recv(), Err(TryRecvError::Empty), "nothing is missing of the other");
    let stats = server.stats();
    assert_eq!((stats.remote_faults, stats.local_faults), (1, 1), "{stats:?}");
    assert_eq!((stats.remote_latency_us.len(), stats.stale_latency_us.len()), (1, 1));
}

#[test]
fn what_does_not_come_is_asked_for_again_when_that_may_be() {
    let Some((_pool, mut destination)) = destination() else { return };
    for page in unit(0).pages().skip(2) {
        destination.apply(page, 1, false);
    }
    let (asked, requests) = mpsc::channel();
    let (taken, may) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (takes, looked) = (taken.clone(), may.clone());
    let server = destination.serve_asking_again(
        move |page, whom| asked.send((page, whom)).unwrap(),
        move || {
            looked.fetch_add(1, Ordering::Relaxed);
            takes.load(Ordering::Relaxed)
        },
    );
    let mut need = PageSet::full(destination.memory.pages());
    need.remove_range(PageRange { start: PageIndex(SMALL + 2), end: unit(0).end });
    destination.table.freeze(&need).unwrap();
    let (first, second) = (PageIndex(SMALL), PageIndex(SMALL + 1));
    let Destination { guest, table, .. } = &mut destination;
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || guest.read(first));
        let next = || requests.recv_timeout(SOON).unwrap();
        let (mate, named) = (next(), next());
        assert_eq!((mate, named.0), ((second, AskedFor::Unit), first));
        assert!(matches!(named.1, AskedFor::Thread(Some(_))), "{named:?}");
        let settle = |page| {
            assert_eq!(table.settle_hole(page, Version(2), true), Some(true));
            server.map_arrived(&[page]).unwrap();
        };
        settle(first);
        let since = Instant::now();
        while may.load(Ordering::Relaxed) < 3 {
            assert!(since.elapsed() < SOON, "nobody looks whether it may be asked for");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(requests.try_recv(), Err(TryRecvError::Empty), "nobody takes it");
        taken.store(true, Ordering::Relaxed);
        let again: Vec<Instant> = std::iter::repeat_with(|| {
            assert_eq!(next(), (second, AskedFor::UnitAgain), "and only that");
            Instant::now()
        })
        .take(3)
        .collect();
        let gaps = [again[1] - again[0], again[2] - again[1]];
        assert!(gaps[1] > gaps[0] * 3 / 2, "{gaps:?}");
        settle(second);
        assert_eq!(reader.join().unwrap(), 0);
    });
    assert_eq!(server.stats().remote_faults, 1);
}

#[test]
fn a_fault_before_the_switchover_is_served_by_it() {
    let Some((_pool, mut destination)) = destination() else { return };
    for page in unit(0).pages() {
        destination.apply(page, 1, false);
    }
    let (server, requests) = asking(&destination);
    let mut need = PageSet::full(destination.memory.pages());
    need.remove_range(unit(0));
    let touched = PageIndex(SMALL + 8);
    let (guest, table) = (&mut destination.guest, &destination.table);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || guest.read_whole(touched));
        for _ in 0..UNIT {
            requests.recv_timeout(SOON).unwrap();
        }
        assert!(!reader.is_finished(), "a stale page was let through");
        let waiting = table.freeze(&need).unwrap();
        assert_eq!(waiting, unit(0).pages().collect::<Vec<_>>());
        server.map_arrived(&waiting).unwrap();
        assert_eq!(reader.join().unwrap(), expected(touched, 1));
    });
}

#[test]
fn units_of_zeros_stay_holes_until_they_are_touched() {
    let Some((_pool, mut destination)) = destination() else { return };
    for page in (0..SMALL).map(PageIndex).chain(unit(0).pages()) {
        destination.apply(page, 1, true);
    }
    for page in unit(1).pages() {
        destination.table.settle_hole(page, Version(1), true).unwrap();
    }
    let (server, _requests) = asking(&destination);
    let zeros = SMALL.div_ceil(5);
    assert_eq!(Mapper::start(&server).unwrap().finish().unwrap(), SMALL - zeros + UNIT);
    assert_eq!(huge_pages(&destination), 1);
    assert_eq!(destination.guest.read(PageIndex(unit(1).start.0 + 9)), 0);
    assert_eq!(huge_pages(&destination), 2);
    assert_eq!(server.stats().local_faults, 1, "the others were mapped");
    drop(server);
    destination.userfault.release().unwrap();
    for page in unit(0).pages() {
        assert_eq!(destination.guest.read_whole(page), expected(page, 1), "{page:?}");
    }
}

#[test]
fn a_unit_that_the_balloon_took_reads_as_zero() {
    // What is punched has lost its room in the pool.
    let Some((_pool, mut destination)) = destination_and(1) else { return };
    for page in unit(0).pages() {
        destination.apply(page, 1, true);
    }
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let files = destination.memory.region_files().unwrap();
    let (server, _requests) = asking(&destination);
    let page = PageIndex(SMALL + 1);
    for mapped_before in [false, true] {
        if mapped_before {
            destination.guest.write(page, 7);
        }
        fallocate(&files[1].file, punch, 0, HUGE_PAGE_BYTES as i64).unwrap();
        assert_eq!(destination.guest.read(page), 0);
    }
    let failure = server.take_failure();
    assert!(failure.is_none(), "{failure:?}");
}

/// Two threads complete the last pages of a unit, and the guest touches it meanwhile. Were one of them to miss what
/// the others did, it would wait for ever.
#[test]
fn of_those_who_complete_a_unit_one_maps_it() {
    let Some((_pool, mut destination)) = destination() else { return };
    const RACED: u64 = 8;
    for round in 0..60u64 {
        destination.memory.punch_hole(unit(0)).unwrap();
        let table = Arc::new(PageTable::anonymous(destination.memory.pages()).unwrap());
        destination.table = table.clone();
        destination.table.freeze(&PageSet::full(table.pages())).unwrap();
        let split = unit(0).end.0 - RACED;
        for page in (unit(0).start.0..split).map(PageIndex) {
            table.settle_hole(page, Version(1), true).unwrap();
        }
        let (server, _requests) = asking(&destination);
        let complete = |half: u64| {
            for page in (split..unit(0).end.0).filter(|page| page % 2 == half).map(PageIndex) {
                // As the appliers do it: of a page of zeros only who waits for it is told.
                if table.settle_hole(page, Version(1), true).unwrap() {
                    server.map_arrived(&[page]).unwrap();
                }
            }
        };
        let guest = &mut destination.guest;
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || guest.read(PageIndex(SMALL)));
            std::thread::sleep(Duration::from_micros(20 * (round % 20)));
            let other = scope.spawn(|| complete(0));
            complete(1);
            other.join().unwrap();
            let since = Instant::now();
            while !reader.is_finished() {
                // The process would not end with a thread that waits in it.
                if since.elapsed() > SOON {
                    let _ = destination.userfault.release();
                    panic!("nobody has mapped it in round {round}");
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            assert_eq!(reader.join().unwrap(), 0);
        });
    }
}
