//! KVM's own record of the pages that the guest wrote.
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` (Linux 5.0) reading the log changes nothing, and pages
//! are write-protected again where they are cleared: exactly in the range that is collected.

use std::io;
use std::sync::Arc;

use super::ioctl;
use super::vm::{Slot, Vm};
use crate::guest::GuestError;
use crate::memory::{DirtyTracker, MemoryError};
use crate::page::{PAGE_SIZE_BYTES, PageRange, PageSet};

/// Follows the guest's writes by KVM's dirty log. The built-in guest has no balloon and no device
/// that writes to RAM from outside, so the log is all there is.
pub(super) struct DirtyLog {
    vm: Arc<Vm>,
    armed: bool,
}

impl DirtyLog {
    /// Follows nothing until it is armed.
    pub(super) fn new(vm: Arc<Vm>) -> Result<Self, GuestError> {
        if !vm.abilities.manual_dirty_log {
            return Err(GuestError::new("KVM here lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
                .hint("use Linux 5.0 or newer, or track by write protection"));
        }
        Ok(DirtyLog { vm, armed: false })
    }

    fn switch(&mut self, on: bool, action: &'static str) -> Result<(), MemoryError> {
        self.vm.log_dirty_pages(on).map_err(|error| failed(action, io::Error::other(error)))?;
        self.armed = on;
        Ok(())
    }

    /// Collects `range`, which lies in `slot`.
    fn collect_in(
        &self,
        slot: &Slot,
        range: PageRange,
        into: &mut PageSet,
    ) -> Result<(), MemoryError> {
        let size_bytes = slot.pages.len() as usize * PAGE_SIZE_BYTES;
        let mut log =
            self.vm.fd.get_dirty_log(slot.id, size_bytes).map_err(|error| {
                failed("read the log", io::Error::from_raw_os_error(error.errno()))
            })?;
        let base = slot.pages.start.0;
        // KVM clears whole words of its bitmap, or up to the end of the slot. Only these are looked at: the slot may
        // be large, and is collected in many small ranges.
        let first = (range.start.0 - base) / 64;
        let last = (range.end.0 - base).div_ceil(64);
        let window = &mut log[first as usize..last as usize];
        let [from, to] = [range.start, range.end].map(|page| page.0 - base - first * 64);
        let mut wanted = PageSet::empty((last - first) * 64);
        wanted.insert_range(PageRange::new(from, to));
        for (index, word) in window.iter_mut().enumerate() {
            *word &= wanted.word(index);
        }
        let pages = (last * 64).min(slot.pages.len()) - first * 64;
        ioctl::clear_dirty_log(&self.vm.fd, slot.id, first * 64, pages as u32, window)
            .map_err(|errno| failed("clear the log", errno.into()))?;
        // Only now: where clearing fails, the pages are still in KVM's log.
        let Some(dirty) = PageSet::from_words(window.iter().copied(), wanted.pages()) else {
            return Ok(());
        };
        let start = base + first * 64;
        for run in dirty.runs() {
            into.insert_range(PageRange::new(start + run.start.0, start + run.end.0));
        }
        Ok(())
    }
}

impl DirtyTracker for DirtyLog {
    fn name(&self) -> &'static str {
        "kvm-dirty-log"
    }

    fn arm(&mut self) -> Result<(), MemoryError> {
        self.switch(true, "switch the log on")
    }

    fn collect(&mut self, range: PageRange, into: &mut PageSet) -> Result<(), MemoryError> {
        for slot in &self.vm.slots {
            let start = range.start.max(slot.pages.start);
            let end = range.end.min(slot.pages.end);
            if start < end {
                self.collect_in(slot, PageRange { start, end }, into)?;
            }
        }
        Ok(())
    }

    fn disarm(&mut self) -> Result<(), MemoryError> {
        if self.armed { self.switch(false, "switch the log off") } else { Ok(()) }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        if let Err(error) = self.disarm() {
            tracing::warn!(%error, "the dirty log stays on");
        }
    }
}

fn failed(action: &'static str, source: io::Error) -> MemoryError {
    MemoryError::Tracker { tracker: "KVM's dirty log", action, source }
}
