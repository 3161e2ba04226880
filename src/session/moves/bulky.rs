//! A guest of threads whose device state is as large as that of a PC, most of it always the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::guest::workload::{GuestStatus, WorkingGuest};
use crate::guest::{DestinationGuest, GuestError, Shape};
use crate::memory::{DirtyTracker, GuestMemory, Userfault};
use crate::session::journal;

/// As much as QEMU's PC has of firmware and tables.
const BULK_BYTES: usize = 700 << 10;

struct Bulky {
    guest: ThreadsGuest,
    saved: AtomicU64,
    oddity: Oddity,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Oddity {
    None,
    /// What takes its state fails as nobody expects.
    Panics,
    /// Its owner pauses it when it is about to move.
    IsPausedByItsOwner,
    /// The same as the first, and then it is not let run on.
    PanicsAndDoesNotResume,
}

impl Bulky {
    fn boxed(guest: ThreadsGuest) -> Box<dyn WorkingGuest> {
        Box::new(Bulky { guest, saved: AtomicU64::new(0), oddity: Oddity::None })
    }

    fn bulk() -> Vec<u8> {
        let mut state = 7u64;
        let mut bulk = Vec::with_capacity(BULK_BYTES);
        while bulk.len() < BULK_BYTES {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            bulk.extend_from_slice(&(state >> 32).to_le_bytes());
        }
        bulk
    }
}

impl SourceGuest for Bulky {
    fn shape(&self) -> &Shape {
        SourceGuest::shape(&self.guest)
    }

    fn memory(&self) -> Arc<GuestMemory> {
        SourceGuest::memory(&self.guest)
    }

    fn track(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.guest.track(kind)
    }

    fn is_running(&mut self) -> Result<bool, GuestError> {
        Ok(self.oddity != Oddity::IsPausedByItsOwner)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.guest.pause()
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        let panics = [Oddity::Panics, Oddity::PanicsAndDoesNotResume].contains(&self.oddity);
        assert!(!panics, "as planned");
        // Something in front grows each time, so that all behind it moves.
        let times = self.saved.fetch_add(1, Ordering::Relaxed) + 1;
        let mut state = times.to_le_bytes().to_vec();
        state.extend((0..times).flat_map(|_| [0xee; 24]));
        state.extend(Self::bulk());
        state.extend(self.guest.save_device_state()?);
        Ok(state)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        match self.oddity {
            Oddity::PanicsAndDoesNotResume => Err(GuestError::new("as planned")),
            _ => self.guest.resume(),
        }
    }

    fn release(&mut self, quit: bool) -> Result<(), GuestError> {
        SourceGuest::release(&mut self.guest, quit)
    }
}

impl DestinationGuest for Bulky {
    fn shape(&self) -> &Shape {
        DestinationGuest::shape(&self.guest)
    }

    fn memory(&self) -> Arc<GuestMemory> {
        DestinationGuest::memory(&self.guest)
    }

    fn userfault(&mut self) -> Result<Userfault, GuestError> {
        self.guest.userfault()
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let (times, rest) = state.split_first_chunk().expect("a count in front");
        let rest = rest.strip_prefix(&[0xee].repeat(24 * u64::from_le_bytes(*times) as usize)[..]);
        let rest = rest.and_then(|rest| rest.strip_prefix(&Self::bulk()[..]));
        self.guest.load_device_state(rest.expect("the bulk as it was saved"))
    }

    fn run(&mut self) -> Result<(), GuestError> {
        self.guest.run()
    }

    fn release(&mut self) -> Result<(), GuestError> {
        DestinationGuest::release(&mut self.guest)
    }

    fn discard(&mut self) -> Result<(), GuestError> {
        self.guest.discard()
    }
}

impl WorkingGuest for Bulky {
    fn status(&self) -> GuestStatus {
        self.guest.status()
    }

    fn verify_all(&self) {
        self.guest.verify_all();
    }

    fn still_to_verify(&self) -> u64 {
        self.guest.still_to_verify()
    }

    fn failure(&self) -> Option<String> {
        self.guest.failure()
    }
}

/// Moves such a guest over a link of this rate, that is so slow that a rehearsal pays.
fn moved_by(strategy: Strategy) -> Moved {
    let boot = |plan: &GuestPlan| Bulky::boxed(ThreadsGuest::boot(plan).unwrap());
    let arrive = |plan: &GuestPlan| Bulky::boxed(ThreadsGuest::await_arrival(plan).unwrap());
    let plan = plan(Pattern::Sparse, 5_000, 16, 2);
    let bandwidth_bytes_per_s = Some(8 << 20);
    moves_whole(
        boot,
        arrive,
        &plan,
        Method { strategy, bandwidth_bytes_per_s, ..Method::default() },
    )
}

#[test]
fn after_a_rehearsal_only_what_changed_of_the_device_state_crosses_at_the_switchover() {
    if !can_serve_faults("a rehearsal of the handover") {
        return;
    }
    for strategy in [Strategy::Hybrid, Strategy::Precopy] {
        let Moved { sent, received, .. } = moved_by(strategy);
        assert!(sent.rehearsal_ms.is_some_and(|ms| ms > 0.0));
        assert!(sent.device_state_bytes < 32 << 10, "{} bytes", sent.device_state_bytes);
        assert_eq!(received.device_state_bytes, sent.device_state_bytes);
    }
}

#[test]
fn without_pre_copy_there_is_no_rehearsal_and_the_whole_state_crosses() {
    if !can_serve_faults("a switchover without a rehearsal") {
        return;
    }
    let sent = moved_by(Strategy::Postcopy).sent;
    assert_eq!(sent.rehearsal_ms, None);
    assert!(sent.device_state_bytes > 256 << 10, "{} bytes", sent.device_state_bytes);
}

#[test]
fn a_guest_that_cannot_be_frozen_runs_on() {
    if !can_serve_faults("freezes that fail") {
        return;
    }
    // That the one which its owner is said to pause runs all the same is the test's doing: it is not touched.
    for oddity in [Oddity::Panics, Oddity::IsPausedByItsOwner] {
        let plan = plan(Pattern::Sparse, 5_000, 16, 2);
        let boot = ThreadsGuest::boot(&plan).unwrap();
        let boot = Bulky { guest: boot, saved: AtomicU64::new(0), oddity };
        let mut source = SharedGuest::new(Box::new(boot));
        source.resume().unwrap();
        let destination = SharedGuest::new(waiting_threads(&plan));
        let method = Method { strategy: Strategy::Postcopy, ..Method::default() };
        let Moved { sent, received, .. } = run_both(&source, &destination, method);
        assert_eq!(sent.result, MigrationResult::Stayed);
        assert_eq!(received.result, MigrationResult::Refused);
        work_for_a_while(&source);
        expect_whole(&source);
    }
}

#[test]
fn a_guest_that_is_left_standing_after_a_freeze_leaves_what_lets_it_run() {
    if !can_serve_faults("freezes that fail") {
        return;
    }
    let plan = plan(Pattern::Sparse, 5_000, 16, 2);
    let mut boot = ThreadsGuest::boot(&plan).unwrap();
    SourceGuest::resume(&mut boot).unwrap();
    let oddity = Oddity::PanicsAndDoesNotResume;
    let source =
        SharedGuest::new(Box::new(Bulky { guest: boot, saved: AtomicU64::new(0), oddity }));
    let destination = SharedGuest::new(waiting_threads(&plan));
    let method = Method { strategy: Strategy::Postcopy, ..Method::default() };
    let directory = tempfile::tempdir().unwrap();
    let Moved { sent, received, .. } = run_both_in(directory.path(), &source, &destination, method);
    assert_eq!(sent.result, MigrationResult::Stayed);
    assert_eq!(received.result, MigrationResult::Refused);
    let (left, unreadable) = journal::list(&directory.path().join("state")).unwrap();
    assert!(unreadable.is_empty(), "{unreadable:?}");
    let [left] = &left[..] else { panic!("{left:?}") };
    assert_eq!(left.about.side, journal::Side::Source);
    // `send --resume` lets such a one run.
    assert!(!left.records.has(journal::Entry::Decided), "{left:?}");
}
