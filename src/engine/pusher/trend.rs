//! Along the streams that faults show; without one, on from the last fault.

use super::streams::Streams;
use super::{BundleStats, Left, Policy, Wanted};
use crate::page::{PageIndex, PageRange};

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Trend {
    streams: Streams,
    last: PageIndex,
}

impl Policy for Trend {
    fn fault(&mut self, wanted: Wanted, left: &Left<'_>, room: usize, bundle: &mut Vec<PageIndex>) {
        self.streams.fault(wanted, left, room, bundle);
        self.last = wanted.page;
    }

    fn next(&mut self, left: &Left<'_>) -> Option<PageRange> {
        self.streams.next(left.unsent).or_else(|| {
            let first = left.unsent.first_from(self.last)?;
            Some(PageRange::new(first.0, left.unsent.pages()))
        })
    }

    fn bundles(&self) -> BundleStats {
        self.streams.stats()
    }
}
