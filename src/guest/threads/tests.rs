use proptest::prelude::*;

use super::*;
use crate::guest::workload::Pattern;
use crate::guest::workload::trial::{expect_right, move_by_faults, move_live, plan, wait_for};

fn running(workload: &str, threads: u32) -> ThreadsGuest {
    let mut guest = ThreadsGuest::boot(&plan(workload, threads)).unwrap();
    guest.resume().unwrap();
    guest
}

#[test]
fn every_workload_survives_a_move() {
    for pattern in Pattern::ALL {
        for kind in [TrackerKind::WriteProtect, TrackerKind::HashScan] {
            let workload = pattern.name();
            let mut source = running(workload, 2);
            if pattern != Pattern::Idle {
                wait_for(&source, |status| status.ops > 2000);
            }
            let mut destination = ThreadsGuest::await_arrival(&plan("idle", 2)).unwrap();
            move_live(&mut source, &mut destination, kind);
            let ops = destination.status().ops;
            if pattern != Pattern::Idle {
                wait_for(&destination, |status| status.ops > ops + 2000);
            }
            expect_right(&destination);
        }
    }
}

#[test]
fn all_memory_can_be_faulted_in() {
    let mut source = running("sparse:5000/s", 2);
    wait_for(&source, |status| status.ops > 100);
    let mut destination = ThreadsGuest::await_arrival(&plan("idle", 2)).unwrap();
    assert!(move_by_faults(&mut source, &mut destination) > 500);
    expect_right(&destination);
}

#[test]
fn a_changed_word_does_not_pass() {
    let mut guest = running("idle", 1);
    expect_right(&guest);
    guest.pause().unwrap();
    let page = plan("idle", 1).first_used_page() + 7;
    guest.ram.page(PageIndex(page))[100].fetch_add(1, Relaxed);
    guest.resume().unwrap();
    guest.verify_all();
    wait_for(&guest, |status| status.wrong_pages > 0);
    assert_eq!(guest.status().first_wrong_page, page);
}

#[test]
fn a_guest_that_stopped_too_late_runs_on_all_the_same() {
    let mut guest = running("sparse", 2);
    wait_for(&guest, |status| status.ops > 100);
    guest.crew.ask_to_stop();
    guest.resume().unwrap();
    let ops = guest.status().ops;
    wait_for(&guest, |status| status.ops > ops + 2000);
    expect_right(&guest);
}

#[test]
fn a_paused_guest_writes_nothing() {
    let mut guest = running("whole", 2);
    wait_for(&guest, |status| status.ops > 100);
    guest.pause().unwrap();
    let mut tracker = guest.track(TrackerKind::HashScan).unwrap();
    tracker.arm().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let mut dirty = crate::page::PageSet::empty(guest.ram.pages());
    tracker.collect(crate::page::PageRange::new(0, dirty.pages()), &mut dirty).unwrap();
    assert!(dirty.is_empty(), "{dirty:?}");
}

proptest! {
    #[test]
    fn whatever_arrives_as_state_is_refused_or_stays_within_memory(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        place in any::<prop::sample::Index>(), byte: u8,
    ) {
        let mut guest = ThreadsGuest::await_arrival(&plan("sparse", 1)).unwrap();
        let mut state = guest.save_device_state().unwrap();
        prop_assert!(guest.load_device_state(&bytes).is_err());
        *place.get_mut(&mut state) = byte;
        if guest.load_device_state(&state).is_ok() {
            let workers = guest.crew.at_rest().unwrap().1;
            prop_assert!(workers.iter().all(|worker| worker.is_sound(guest.ram.pages())));
        }
    }
}
