//! The base cache: the exact bytes of pages that the other side holds, so that their next change
//! can travel as a delta.
//!
//! A huge guest cannot keep a second copy of itself, so the cache is bounded, and what to keep is
//! the question. Each page of the guest has a small counter of how often it was dirtied again
//! ([`BaseCache::touch`]), halved now and then, so that old heat fades. When the cache is full, a CLOCK-like hand looks at a
//! few slots, and a new page only takes the place of a *colder* one. That is the admission rule of TinyLFU
//! (Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", 2017) with exact
//! counters instead of a sketch. Two things follow: a first pass over a guest
//! larger than the cache displaces nothing that was ever dirtied, and a guest that dirties more than the
//! cache holds, over and over, still hits on the part that is kept, where LRU would miss every time.

use memmap2::{Advice, MmapMut};

use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, Version};

/// Slots of one allocation, as a power of two: 256 KiB of pages, so that a small guest costs little,
const SMALL_CHUNK_SHIFT: u32 = 6;
/// or a huge page, which the kernel clears and maps in a tenth of the time of its 512 small ones.
const HUGE_CHUNK_SHIFT: u32 = 9;
/// From so many chunks on, what a part of the last one wastes is nothing.
const MIN_HUGE_CHUNKS: usize = 32;
/// How many slots the hand looks at to find a colder page.
const HAND_STEPS: usize = 16;
/// All counters are halved after so many touches per slot.
const TOUCHES_PER_SLOT: u64 = 8;
/// What a slot costs: the page, who it is, and two entries of the index, which is kept at most half full.
const SLOT_COST_BYTES: usize =
    PAGE_SIZE_BYTES + size_of::<Slot>() + 2 * size_of::<u32>() * MAX_INDEX_ROUNDING;
/// The index is rounded up to a power of two.
const MAX_INDEX_ROUNDING: usize = 2;
/// An index entry that points nowhere.
const FREE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Slot {
    page: PageIndex,
    version: Version,
}

/// Sent pages by index, bounded. See the module's text for what is kept.
///
/// All lookups are `&self` and the cache is `Sync`: once the guest is frozen, several threads may
/// encode against it.
pub struct BaseCache {
    capacity_slots: usize,
    guest_pages: u64,
    /// Page bytes, slot after slot. Holds only as many chunks as were ever in use.
    chunks: Vec<MmapMut>,
    chunk_shift: u32,
    slots: Vec<Slot>,
    /// Open addressing with linear probing: hash of the page -> slot.
    index: Vec<u32>,
    heat: Heat,
    hand: usize,
}

impl BaseCache {
    /// A cache that takes at most `capacity_bytes`, its bookkeeping included, apart from the
    /// counters of 128 KiB per GiB of guest. Page memory is only taken when it is needed.
    pub fn new(capacity_bytes: usize, guest_pages: u64) -> Self {
        let affordable = (capacity_bytes / SLOT_COST_BYTES).min(FREE as usize - 1);
        let capacity_slots = affordable.min(usize::try_from(guest_pages).unwrap_or(usize::MAX));
        let index_len = (capacity_slots.max(1) * 2).next_power_of_two();
        BaseCache {
            capacity_slots,
            guest_pages,
            chunks: Vec::new(),
            chunk_shift: if capacity_slots >> HUGE_CHUNK_SHIFT >= MIN_HUGE_CHUNKS {
                HUGE_CHUNK_SHIFT
            } else {
                SMALL_CHUNK_SHIFT
            },
            slots: Vec::new(),
            index: vec![FREE; index_len],
            heat: Heat::new(guest_pages, capacity_slots as u64 * TOUCHES_PER_SLOT),
            hand: 0,
        }
    }

    /// How many pages fit.
    pub fn capacity(&self) -> usize {
        self.capacity_slots
    }

    /// How many pages are held.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True when no page is held.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// What the cache occupies now, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len()).sum::<usize>()
            + self.slots.capacity() * size_of::<Slot>()
            + self.index.len() * size_of::<u32>()
            + self.heat.counters.len() * size_of::<u64>()
    }

    /// The bytes that were sent last for `page`, and as which version.
    pub fn get(&self, page: PageIndex) -> Option<(Version, &PageBytes)> {
        let slot = self.slot_of(page)?;
        Some((self.slots[slot].version, self.bytes(slot)))
    }

    /// Notes that `page` was dirtied again: it is worth more than one that was not.
    ///
    /// # Panics
    /// When the page is beyond the guest.
    pub fn touch(&mut self, page: PageIndex) {
        assert!(page.0 < self.guest_pages, "{page:?} beyond {} pages", self.guest_pages);
        // What can hold nothing need not know what to hold.
        if self.capacity_slots > 0 {
            self.heat.touch(page);
        }
    }

    /// Takes the bytes that were just sent for `page`. When the cache holds an older version, that
    /// is replaced. Otherwise, in a full cache, the page is kept only if it is hotter than one that
    /// can go, which is shown to `evicted` then. True when the page is held now.
    ///
    /// # Panics
    /// When the page is beyond the guest.
    pub fn insert(
        &mut self,
        page: PageIndex,
        version: Version,
        bytes: &PageBytes,
        evicted: impl FnOnce(PageIndex, Version, &PageBytes),
    ) -> bool {
        assert!(page.0 < self.guest_pages, "{page:?} beyond {} pages", self.guest_pages);
        let slot = match self.slot_of(page) {
            Some(slot) => slot,
            None if self.slots.len() < self.capacity_slots => match self.grow(page) {
                Some(slot) => slot,
                None => return false,
            },
            None => match self.colder_than(self.heat.of(page)) {
                Some(slot) => {
                    let Slot { page: colder, version } = self.slots[slot];
                    evicted(colder, version, self.bytes(slot));
                    self.unlink(colder);
                    self.slots[slot].page = page;
                    self.link(page, slot);
                    slot
                }
                None => return false,
            },
        };
        self.slots[slot].version = version;
        *self.bytes_mut(slot) = *bytes;
        true
    }

    /// Drops `page`: the other side no longer holds what was sent. True when it was held.
    pub fn forget(&mut self, page: PageIndex) -> bool {
        let Some(slot) = self.slot_of(page) else { return false };
        self.unlink(page);
        // The last slot moves into the gap, so that the used slots stay together.
        let last = self.slots.len() - 1;
        if slot != last {
            let moved = self.slots[last].page;
            self.unlink(moved);
            self.slots[slot] = self.slots[last];
            *self.bytes_mut(slot) = *self.bytes(last);
            self.link(moved, slot);
        }
        self.slots.pop();
        true
    }

    fn bytes(&self, slot: usize) -> &PageBytes {
        let (pages, _) = self.chunks[slot >> self.chunk_shift].as_chunks();
        &pages[slot & ((1 << self.chunk_shift) - 1)]
    }

    fn bytes_mut(&mut self, slot: usize) -> &mut PageBytes {
        let (pages, _) = self.chunks[slot >> self.chunk_shift].as_chunks_mut();
        &mut pages[slot & ((1 << self.chunk_shift) - 1)]
    }

    /// A new slot for `page`, whose bytes the caller fills in; `None` when the host has no memory for it,
    /// now and for good.
    fn grow(&mut self, page: PageIndex) -> Option<usize> {
        let slot = self.slots.len();
        if slot == self.chunks.len() << self.chunk_shift {
            // Exact, chunk by chunk: doubling would take more than the capacity allows.
            let slots = (1 << self.chunk_shift).min(self.capacity_slots - slot);
            let Ok(chunk) = MmapMut::map_anon(slots * PAGE_SIZE_BYTES) else {
                self.capacity_slots = slot;
                return None;
            };
            if self.chunk_shift == HUGE_CHUNK_SHIFT {
                // A kernel without huge pages refuses; then they are small.
                let _ = chunk.advise(Advice::HugePage);
            }
            self.slots.reserve_exact(slots);
            self.chunks.push(chunk);
        }
        self.slots.push(Slot { page, version: Version::NONE });
        self.link(page, slot);
        Some(slot)
    }

    /// The slot of the coldest of the next few pages, if that is colder than `heat`.
    fn colder_than(&mut self, heat: u8) -> Option<usize> {
        // Nothing is colder than a page that was never dirtied again: most inserts of a first pass end here.
        if heat == 0 || self.slots.is_empty() {
            return None;
        }
        let mut coldest = None;
        for _ in 0..HAND_STEPS.min(self.slots.len()) {
            self.hand = (self.hand + 1) % self.slots.len();
            let found = self.heat.of(self.slots[self.hand].page);
            if found < coldest.map_or(heat, |(_, coldest)| coldest) {
                coldest = Some((self.hand, found));
            }
            if found == 0 {
                break;
            }
        }
        coldest.map(|(slot, _)| slot)
    }

    fn slot_of(&self, page: PageIndex) -> Option<usize> {
        self.probe(page).map(|at| self.index[at] as usize)
    }

    /// Where in the index `page` is.
    fn probe(&self, page: PageIndex) -> Option<usize> {
        let mask = self.index.len() - 1;
        let mut at = self.home(page);
        // The index is at most half full, so a free entry always ends this.
        while self.index[at] != FREE {
            if self.slots[self.index[at] as usize].page == page {
                return Some(at);
            }
            at = (at + 1) & mask;
        }
        None
    }

    fn home(&self, page: PageIndex) -> usize {
        // Fibonacci hashing: neighbours spread, and the high bits are the good ones.
        let hash = page.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> 32) as usize & (self.index.len() - 1)
    }

    fn link(&mut self, page: PageIndex, slot: usize) {
        let mask = self.index.len() - 1;
        let mut at = self.home(page);
        while self.index[at] != FREE {
            at = (at + 1) & mask;
        }
        self.index[at] = slot as u32;
    }

    /// Takes `page` out of the index and closes the gap (Knuth, TAOCP 3, 6.4, algorithm R).
    fn unlink(&mut self, page: PageIndex) {
        let Some(mut gap) = self.probe(page) else { return };
        let mask = self.index.len() - 1;
        let mut at = gap;
        loop {
            at = (at + 1) & mask;
            if self.index[at] == FREE {
                break;
            }
            let home = self.home(self.slots[self.index[at] as usize].page);
            // An entry may move back to the gap unless its home lies behind the gap.
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(gap) & mask {
                self.index[gap] = self.index[at];
                gap = at;
            }
        }
        self.index[gap] = FREE;
    }
}

/// How often each page was dirtied again: 4 bits per page of the guest.
struct Heat {
    counters: Vec<u64>,
    touches: u64,
    touches_until_halved: u64,
}

impl Heat {
    const MAX: u64 = 15;

    fn new(guest_pages: u64, touches_until_halved: u64) -> Self {
        let words = usize::try_from(guest_pages.div_ceil(16)).expect("a guest fits the host");
        Heat {
            counters: vec![0; words],
            touches: 0,
            // Halving walks over all counters: never more often than once for each of them.
            touches_until_halved: touches_until_halved.max(words as u64).max(1),
        }
    }

    fn of(&self, page: PageIndex) -> u8 {
        (self.counters[(page.0 / 16) as usize] >> (page.0 % 16 * 4) & Self::MAX) as u8
    }

    fn touch(&mut self, page: PageIndex) {
        if u64::from(self.of(page)) < Self::MAX {
            self.counters[(page.0 / 16) as usize] += 1 << (page.0 % 16 * 4);
        }
        self.touches += 1;
        if self.touches >= self.touches_until_halved {
            self.touches = 0;
            self.halve();
        }
    }

    fn halve(&mut self) {
        for counters in &mut self.counters {
            // All sixteen at once; the mask keeps each one's lowest bit out of its neighbour.
            *counters = *counters >> 1 & 0x7777_7777_7777_7777;
        }
    }
}

#[cfg(test)]
mod tests;
