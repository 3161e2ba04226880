//! Faults of RAM that is mapped by units of many pages (hugetlbfs): a unit is the guest's when all its pages are
//! there, so a fault asks for all that are not.
//!
//! Nobody sees that more than one page is complete in one look. So whoever has completed a page, or has marked pages as
//! waited for, looks at the whole unit after that: the last one of them sees all that the others did, and maps it.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::{
    AskedFor, Fault, MemoryError, PageIndex, PageRange, Service, Stage, Version, Waiting, Want,
    lock,
};

/// What is still missing after so long is asked for again. It was pushed, and not sent again for a fault, but lies behind
/// the replies to other faults perhaps, which may go on for as long as there are any.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Asked for again and again, it waits twice as long each time, up to this.
const AGAIN_AFTER_MOST: Duration = Duration::from_secs(30);

impl Service {
    /// Asks for the pages of a unit that are not here, each once; true when all of them are. The one that the thread is
    /// said to wait for comes last: whoever looks for what it may want next knows of the others by then.
    pub(super) fn request_unit(
        &self,
        fault: Fault,
        unit: PageRange,
        ask: &impl Fn(PageIndex, AskedFor),
    ) -> bool {
        let (mut missing, mut absent, mut waits) = (Vec::new(), false, false);
        for page in unit.pages() {
            let unknown = self.table.state(page).version == Version::NONE;
            if let Want::Ask { first } = self.table.want(page) {
                waits = true;
                if first {
                    missing.push(page);
                    absent |= unknown;
                }
            }
        }
        if !waits || self.is_unit_complete(unit) {
            self.local.fetch_add(1, Ordering::Relaxed);
            self.keep(fault);
            return true;
        }
        let Some((one, others)) = missing.split_first() else {
            self.joined.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        self.remote.fetch_add(1, Ordering::Relaxed);
        let since = Instant::now();
        others.iter().for_each(|page| ask(*page, AskedFor::Unit));
        ask(*one, AskedFor::Thread(fault.thread));
        let touch = self.keep(fault);
        let again = Some(since + AGAIN_AFTER);
        self.start_clock(unit.start, Waiting { since, absent, touch, again });
        false
    }

    /// Asks again for what is missing of the units that are waited for since long, the one that is due longest first.
    /// Not in the name of the thread: its fault was told before.
    pub(super) fn ask_again(
        &self,
        ask: &impl Fn(PageIndex, AskedFor),
        may_ask_again: &impl Fn() -> bool,
    ) {
        let now = Instant::now();
        while let Some(first) = self.next_overdue(now, may_ask_again) {
            let missing = |page: &PageIndex| !self.table.state(*page).is_complete();
            let pages = self.units().of(first).pages().filter(missing);
            pages.for_each(|page| ask(page, AskedFor::UnitAgain));
        }
    }

    fn next_overdue(&self, now: Instant, may_ask_again: &impl Fn() -> bool) -> Option<PageIndex> {
        let mut asked = lock(&self.asked);
        let due = |(page, waiting): (&PageIndex, &Waiting)| {
            Some((waiting.again.filter(|due| *due <= now)?, *page))
        };
        let (_, first) = asked.since.iter().filter_map(due).min()?;
        if !may_ask_again() {
            return None;
        }
        let waiting = asked.since.get_mut(&first)?;
        let waited = now.saturating_duration_since(waiting.since);
        waiting.again = Some(now + waited.clamp(AGAIN_AFTER, AGAIN_AFTER_MOST));
        Some(first)
    }

    /// Maps those units of `pages`, which have just become Current, that have all their pages now and that hold
    /// something or are waited for.
    pub(super) fn map_arrived_units(&self, pages: &[PageIndex]) -> Result<(), MemoryError> {
        let mut done = PageRange::new(0, 0);
        for page in pages.iter().filter(|page| self.table.state(**page).is_complete()) {
            if done.contains(*page) {
                continue;
            }
            let unit = self.units().of(*page);
            done = unit;
            if self.is_unit_complete(unit) && self.is_unit_wanted(unit) {
                self.map_unit(unit)?;
            }
        }
        Ok(())
    }

    /// Maps a unit in the background: true when it is one that is due.
    pub(super) fn map_unit_ahead(&self, unit: PageRange) -> Result<bool, MemoryError> {
        let is_due = self.is_unit_complete(unit)
            && unit.pages().any(|page| {
                let state = self.table.state(page);
                state.stage == Stage::Current && !state.zero
            });
        if is_due {
            self.map_unit(unit)?;
        }
        Ok(is_due)
    }

    /// Maps a unit of which all pages are complete.
    pub(super) fn map_unit(&self, unit: PageRange) -> Result<(), MemoryError> {
        match self.userfault.map(unit) {
            // All its pages are of zeros, or the guest's balloon took it away.
            Err(MemoryError::Hole(_)) => self.userfault.map_zero(unit.start)?,
            other => drop(other?),
        }
        self.mapped(unit);
        Ok(())
    }

    fn is_unit_complete(&self, unit: PageRange) -> bool {
        // After the caller's change to the table: see the module's text.
        fence(Ordering::SeqCst);
        unit.pages().all(|page| self.table.state(page).is_complete())
    }

    /// With pages of zeros alone it stays a hole until it is touched.
    fn is_unit_wanted(&self, unit: PageRange) -> bool {
        let maps_ahead = self.options.touches_kept == 0;
        unit.pages().any(|page| {
            let state = self.table.state(page);
            state.waiting || (maps_ahead && !state.zero)
        })
    }
}

#[cfg(test)]
mod tests;
