//! Kin: pages that the other side holds and that share stretches of bytes with those at hand, at any offset.
//!
//! A guest has the same bytes at several places without having the same pages: a file in its page cache and, not aligned to
//! pages, in a program's buffers; records that were copied, packages of one library. Such pages are found by *anchors*:
//! places that are chosen by the 64 bytes before them alone, so that the same stretch has the same anchors
//! wherever it lies, as in Muthitacharoen, Chen and Mazières, "A Low-bandwidth Network File System" (2001). The rolling
//! hash is the gear hash of Xia et al., "Ddelta: A deduplication-inspired fast delta compression approach" (2014).
//! What is found is the compressor's prefix ([`super::pack::Compressor::pack_with_kin`]). The pages that were sent
//! shortly before are kin too: with them 64 pages compress like a longer block.
//!
//! An anchor only proposes: the prefix is made of the exact bytes that were sent.

use std::collections::VecDeque;

use super::SentPages;
use crate::page::{PageBytes, PageIndex, Version};

/// Kin of a block of pages, at most: as many as the block may have pages.
pub const MAX_KIN_PAGES: usize = 64;
/// As many of them as that are filled up with pages that were sent just before. Twice as many save half a percent
/// more, and take a tenth more of the time.
const RECENT_PAGES: usize = 32;
/// So many of those sent last are looked at for them: what is on its way is not at the other side yet.
const RECENT_LOOKED_AT: usize = 1024;
/// One place of so many is an anchor, on average.
const ANCHOR_EVERY: u64 = 256;
/// Anchors of a page, at most.
const MAX_ANCHORS: usize = 64;
/// Bytes that decide about an anchor: the gear hash forgets what is older.
const WINDOW_BYTES: usize = 64;

/// The bits of the rolling hash that are zero at an anchor: the highest, which all bytes of the window reach.
const ANCHOR_MASK: u64 = !(u64::MAX / ANCHOR_EVERY);

/// A random number for each byte.
const GEAR: [u64; 256] = gear();

const fn gear() -> [u64; 256] {
    let (mut table, mut state, mut at) = ([0; 256], 0x9e37_79b9_7f4a_7c15_u64, 0);
    while at < table.len() {
        // Xorshift64*.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        table[at] = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        at += 1;
    }
    table
}

/// The hash of a stretch of 64 bytes that ends at an anchor; all of its bits are of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anchor(pub(super) u64);

/// Appends the anchors of `page`.
pub fn find_anchors(page: &PageBytes, into: &mut Vec<Anchor>) {
    let (start, mut hash, mut last) = (into.len(), 0u64, 0);
    for (at, byte) in page.iter().enumerate() {
        hash = (hash << 1).wrapping_add(GEAR[usize::from(*byte)]);
        // Of a byte that repeats itself one is enough.
        if hash & ANCHOR_MASK == 0 && at + 1 >= WINDOW_BYTES && hash != last {
            last = hash;
            let mixed = (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            into.push(Anchor(mixed ^ mixed >> 29));
            if into.len() - start == MAX_ANCHORS {
                return;
            }
        }
    }
}

/// Pages that the other side holds, ascending, and their bytes there, page after page.
#[derive(Clone, Debug, Default)]
pub struct Kin {
    /// Which, and in which version: at most [`MAX_KIN_PAGES`].
    pub pages: Vec<(PageIndex, Version)>,
    /// Their bytes.
    pub bytes: Vec<u8>,
}

impl Kin {
    /// None.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.bytes.clear();
    }
}

/// Finds kin. Keeps its buffers: one for each thread that encodes.
#[derive(Default)]
pub struct KinFinder {
    anchors: Vec<Anchor>,
    /// Where the anchors of each page of the block end.
    ends: Vec<usize>,
    proposed: Vec<PageIndex>,
    ranked: Vec<(usize, PageIndex)>,
    recent: VecDeque<PageIndex>,
    kin: Kin,
}

impl KinFinder {
    /// Begins a new block of pages.
    pub fn begin(&mut self) {
        self.anchors.clear();
        self.ends.clear();
        self.kin.clear();
    }

    /// The next page of the block, of which no kin is wanted.
    pub fn pass_over(&mut self) {
        self.ends.push(self.anchors.len());
    }

    /// The next page of the block, for which kin is wanted.
    pub fn look_at(&mut self, bytes: &PageBytes) {
        find_anchors(bytes, &mut self.anchors);
        self.ends.push(self.anchors.len());
    }

    /// The kin of the block, out of what was `sent`: those that share most anchors with it, then those
    /// that were sent last; of pages that `may_be` and whose version there `is_certain`.
    pub fn find(
        &mut self,
        sent: &SentPages,
        may_be: impl Fn(PageIndex) -> bool,
        is_certain: impl Fn(PageIndex, Version) -> bool,
    ) -> &Kin {
        let KinFinder { anchors, proposed, ranked, recent, kin, .. } = self;
        proposed.clear();
        proposed.extend(anchors.iter().flat_map(|anchor| sent.pages_with(*anchor)));
        proposed.sort_unstable();
        ranked.clear();
        let same = proposed.chunk_by(|a, b| a == b).filter(|same| may_be(same[0]));
        ranked.extend(same.map(|same| (same.len(), same[0])));
        ranked.sort_unstable_by(|a, b| b.cmp(a));
        ranked.truncate(MAX_KIN_PAGES);
        if !anchors.is_empty() {
            for page in recent.iter().rev() {
                if ranked.len() >= RECENT_PAGES {
                    break;
                }
                if may_be(*page) && !ranked.iter().any(|(_, other)| other == page) {
                    ranked.push((0, *page));
                }
            }
        }
        ranked.sort_unstable_by_key(|(_, page)| *page);
        kin.clear();
        for (_, page) in &*ranked {
            let wanted = |version| is_certain(*page, version);
            if let Some(version) = sent.append_bytes(*page, wanted, &mut kin.bytes) {
                kin.pages.push((*page, version));
            }
        }
        kin
    }

    /// The anchors of the page at `position` of the block.
    pub fn anchors_of(&self, position: usize) -> &[Anchor] {
        let start = position.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.anchors[start..self.ends[position]]
    }

    /// `page` was sent: it is kin of what comes next.
    pub fn sent(&mut self, page: PageIndex) {
        if self.recent.len() == RECENT_LOOKED_AT {
            self.recent.pop_front();
        }
        self.recent.push_back(page);
    }
}

#[cfg(test)]
mod tests;
