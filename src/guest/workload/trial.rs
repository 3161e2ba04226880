//! What the tests of both built-in guests share: small guests, moves by hand, verdicts.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use super::{GuestPlan, GuestStatus, WorkingGuest};
use crate::guest::{DestinationGuest, SourceGuest};
use crate::memory::{FaultKind, GuestMemory, ReadWitness, TrackerKind, Userfault};
use crate::page::{PAGE_SIZE_BYTES, PageRange, PageSet};

/// Long enough for an emulated KVM on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn plan(workload: &str, workers: u32) -> GuestPlan {
    GuestPlan {
        memory_bytes: 4 << 20,
        used_percent: 60,
        workers: NonZeroU32::new(workers).unwrap(),
        workload: workload.parse().unwrap(),
    }
}

/// Waits until the guest's report satisfies `enough`.
pub(crate) fn wait_for(guest: &impl WorkingGuest, enough: impl Fn(&GuestStatus) -> bool) {
    let started = Instant::now();
    while !enough(&guest.status()) {
        assert_eq!(guest.failure(), None);
        assert!(started.elapsed() < PATIENCE, "the guest makes no progress: {:?}", guest.status());
        thread::sleep(Duration::from_millis(1));
    }
}

/// Lets the running guest check all its pages, and expects that none is wrong.
pub(crate) fn expect_right(guest: &impl WorkingGuest) {
    let before = guest.status();
    guest.verify_all();
    let pages = guest.still_to_verify();
    assert!(pages > 100, "nothing to verify");
    let started = Instant::now();
    while guest.still_to_verify() > 0 {
        assert_eq!(guest.failure(), None);
        assert!(started.elapsed() < PATIENCE, "the check does not end: {:?}", guest.status());
        thread::sleep(Duration::from_millis(1));
    }
    let after = guest.status();
    assert!(after.pages_verified >= before.pages_verified + pages, "{before:?} -> {after:?}");
    assert_eq!(after.wrong_pages, 0, "{after:?}");
}

fn copy(
    from: &GuestMemory,
    to: &GuestMemory,
    pages: &PageSet,
    witness: Option<&Arc<dyn ReadWitness>>,
) {
    let mut bytes = [0; PAGE_SIZE_BYTES];
    for page in pages.iter() {
        from.read_page(page, &mut bytes);
        if let Some(witness) = witness {
            witness.saw(page, &bytes);
        }
        to.write_page(page, &bytes).unwrap();
    }
}

/// Moves a running guest: two rounds while it runs, the rest while it stands still.
pub(crate) fn move_live<G: WorkingGuest>(source: &mut G, destination: &mut G, kind: TrackerKind) {
    assert_eq!(
        SourceGuest::shape(source).differences(DestinationGuest::shape(destination)),
        Vec::<String>::new()
    );
    let (from, to) = (SourceGuest::memory(source), DestinationGuest::memory(destination));
    let all = PageRange::new(0, from.pages());
    let mut tracker = source.track(kind).unwrap();
    tracker.arm().unwrap();
    let witness = tracker.witness();
    let copy = |pages: &PageSet| copy(&from, &to, pages, witness.as_ref());
    copy(&from.populated(all).unwrap());
    let ops = source.status().ops;
    if ops > 0 {
        wait_for(source, |status| status.ops >= ops + 50);
    }
    let mut dirty = PageSet::empty(all.len());
    tracker.collect(all, &mut dirty).unwrap();
    copy(&dirty);

    source.pause().unwrap();
    let mut rest = PageSet::empty(all.len());
    tracker.collect(all, &mut rest).unwrap();
    copy(&rest);
    let state = source.save_device_state().unwrap();
    destination.load_device_state(&state).unwrap();
    assert_eq!(destination.status(), source.status());
    tracker.disarm().unwrap();
    destination.run().unwrap();
}

/// Moves a paused guest with nothing but its device state: every page is faulted in from the source's
/// memory. Returns how many faults there were.
pub(crate) fn move_by_faults<G: WorkingGuest>(source: &mut G, destination: &mut G) -> u64 {
    source.pause().unwrap();
    let userfault = Arc::new(destination.userfault().unwrap());
    let (from, to) = (SourceGuest::memory(source), DestinationGuest::memory(destination));
    let populated = from.populated(PageRange::new(0, from.pages())).unwrap();
    let (done, ready) = (Arc::new(AtomicBool::new(false)), Arc::new(Barrier::new(2)));
    let server = {
        let (userfault, done, ready) = (userfault.clone(), done.clone(), ready.clone());
        thread::spawn(move || serve(&userfault, &from, &to, &populated, &done, &ready))
    };
    ready.wait();
    let state = source.save_device_state().unwrap();
    destination.load_device_state(&state).unwrap();
    destination.run().unwrap();
    expect_right(destination);
    destination.pause().unwrap();
    done.store(true, Relaxed);
    let faults = server.join().unwrap();
    userfault.release().unwrap();
    destination.resume().unwrap();
    faults
}

fn serve(
    userfault: &Userfault,
    from: &GuestMemory,
    to: &GuestMemory,
    populated: &PageSet,
    done: &AtomicBool,
    ready: &Barrier,
) -> u64 {
    let (mut faults, mut served, mut bytes) = (Vec::new(), 0, [0; PAGE_SIZE_BYTES]);
    let mut sent = PageSet::empty(from.pages());
    ready.wait();
    while !done.load(Relaxed) {
        userfault.wait(Duration::from_millis(20), &mut faults).unwrap();
        for fault in &faults {
            served += 1;
            if !populated.contains(fault.page) {
                userfault.map_zero(fault.page).unwrap();
                continue;
            }
            if sent.insert(fault.page) {
                assert_eq!(fault.kind, FaultKind::Missing);
                from.read_page(fault.page, &mut bytes);
                to.write_page(fault.page, &bytes).unwrap();
            }
            userfault.map(PageRange::new(fault.page.0, fault.page.0 + 1)).unwrap();
        }
    }
    served
}
