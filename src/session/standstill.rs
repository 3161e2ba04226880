//! Moments of pre-copy in which the guest stands still: for its device state to be rehearsed, and for its
//! writes to be collected where devices write past the page tables.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{Shared, Timeline};
use crate::engine::Failure;
use crate::guest::SourceGuest;

/// How often the guest is asked to run on: it ran a moment ago, so nothing should keep it from that.
const RESUME_ATTEMPTS: usize = 3;

/// Stops the guest for a moment.
#[derive(Clone)]
pub(super) struct Standstill {
    guest: Shared<dyn SourceGuest>,
    timeline: Arc<Timeline>,
    stands: Arc<AtomicBool>,
}

impl Standstill {
    pub(super) fn new(guest: Shared<dyn SourceGuest>, timeline: Arc<Timeline>) -> Self {
        Standstill { guest, timeline, stands: Arc::default() }
    }

    /// True from the order to stop for a moment until the guest is known to run again, and when it is left standing. Who
    /// ends the migration meanwhile waits for that, and leaves the evidence: nobody else lets it run.
    pub(super) fn is_on(&self) -> bool {
        self.stands.load(Ordering::SeqCst)
    }

    /// The guest was stopped to move, and could not be let run on.
    pub(super) fn leave_standing(&self) {
        self.stands.store(true, Ordering::SeqCst);
    }

    /// Does `step` with the guest stopped. One that its owner has paused stays so. Gives what has come of the
    /// step, for which the guest may not have stopped.
    ///
    /// # Errors
    /// When the guest does not run on.
    ///
    /// # Panics
    /// When the step does; the guest runs on then.
    pub(super) fn during<T>(
        &self,
        step: impl FnOnce(&Shared<dyn SourceGuest>) -> Result<T, Failure>,
    ) -> Result<Result<T, Failure>, Failure> {
        match self.guest.with(|guest| guest.is_running()) {
            Ok(true) => {}
            Ok(false) => return Ok(step(&self.guest)),
            Err(error) => return Ok(Err(error.into())),
        }
        let begin = Instant::now();
        self.stands.store(true, Ordering::SeqCst);
        let stopped = self.guest.with(|guest| guest.pause());
        let step = || stopped.map_err(Failure::from).and_then(|()| step(&self.guest));
        let done = catch_unwind(AssertUnwindSafe(step));
        let mut resumed = self.guest.with(|guest| guest.resume());
        for _ in 1..RESUME_ATTEMPTS {
            if resumed.is_err() {
                resumed = self.guest.with(|guest| guest.resume());
            }
        }
        resumed.map_err(|error| {
            Failure::new(
                format!("the guest does not run on after it was stopped for a moment: {error}"),
                "the guest is stopped here: `farfault send --resume`, with the migration's ID, lets it run on when its \
                 QEMU answers",
            )
        })?;
        self.stands.store(false, Ordering::SeqCst);
        self.timeline.part("precopy.standstill", begin.elapsed());
        Ok(done.unwrap_or_else(|panic| resume_unwind(panic)))
    }
}
