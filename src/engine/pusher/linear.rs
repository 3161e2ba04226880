//! In the order of addresses, whatever the guest does: what everything else is measured against.

use super::{Left, Policy, Wanted};
use crate::page::{PageIndex, PageRange};

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Linear;

impl Policy for Linear {
    fn fault(&mut self, _: Wanted, _: &Left<'_>, _: usize, _: &mut Vec<PageIndex>) {}

    fn next(&mut self, left: &Left<'_>) -> Option<PageRange> {
        let first = left.unsent.first_from(PageIndex(0))?;
        Some(PageRange::new(first.0, left.unsent.pages()))
    }
}
