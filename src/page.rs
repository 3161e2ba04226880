//! The vocabulary of pages: every other room speaks in these types.
//!
//! A guest's RAM is one or more regions (see [`crate::memory::MemoryLayout`]). Their pages are
//! numbered through, region after region, so that everything above `memory` deals with one flat
//! space `0..pages`.

mod set;

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use set::PageSet;

/// Bytes in a page: the unit in which guest memory is tracked, sent and faulted in.
pub const PAGE_SIZE_BYTES: usize = 4096;

/// The bytes of one page.
pub type PageBytes = [u8; PAGE_SIZE_BYTES];

/// A page of the guest, numbered through over all its RAM regions.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

impl fmt::Debug for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}", self.0)
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Which sending of a page: the number of the pre-copy round in which its content was read, from 1
/// on; [`Version::NONE`] for a page that was never sent. A page is sent at most once per round, so
/// page and version together name exact bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Version(pub u16);

impl Version {
    /// Never sent.
    pub const NONE: Version = Version(0);
    /// The largest version that the destination's page table can hold.
    pub const MAX: Version = Version(2047);

    /// The version after this one, or `None` beyond [`Version::MAX`].
    pub fn next(self) -> Option<Version> {
        (self < Self::MAX).then(|| Version(self.0 + 1))
    }
}

/// A half-open run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// First page of the run.
    pub start: PageIndex,
    /// The page behind the last one.
    pub end: PageIndex,
}

impl PageRange {
    /// The pages `start..end`; an `end` before `start` gives an empty run.
    pub fn new(start: u64, end: u64) -> Self {
        PageRange { start: PageIndex(start), end: PageIndex(end.max(start)) }
    }

    /// How many pages.
    pub fn len(&self) -> u64 {
        self.end.0 - self.start.0
    }

    /// True for a run of no pages.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when `page` is in the run.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.start <= page && page < self.end
    }

    /// The pages one by one.
    pub fn pages(&self) -> impl DoubleEndedIterator<Item = PageIndex> + use<> {
        (self.start.0..self.end.0).map(PageIndex)
    }
}

impl From<Range<u64>> for PageRange {
    fn from(range: Range<u64>) -> Self {
        PageRange::new(range.start, range.end)
    }
}
