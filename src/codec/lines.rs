//! Line fingerprints: what is remembered of a sent page when there is no room for the page itself.
//!
//! Sixty-four hashes of 16 bits, one for each line of 64 bytes: 128 bytes a page, a thirty-second of the page. When it
//! is dirtied, the lines whose hash changed are sent. Two contents of a line have the
//! same hash once in 65,536 times, and such a change would be missed: so the check of the *whole* resulting
//! page travels with it, of 64 bits, and on a mismatch the other side asks for the page.

use xxhash_rust::xxh3::xxh3_64;

use super::delta::LineMask;
use crate::page::{PageBytes, PageIndex, Version};

const LINE_SIZE_BYTES: usize = LineMask::UNIT_BYTES;
const LINES_PER_PAGE: usize = LineMask::UNITS_PER_PAGE;

/// The truncated hashes of the lines of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineFingerprint([u16; LINES_PER_PAGE]);

impl LineFingerprint {
    /// The fingerprint of `page`.
    pub fn of(page: &PageBytes) -> Self {
        let (lines, _) = page.as_chunks::<LINE_SIZE_BYTES>();
        let mut hashes = [0; LINES_PER_PAGE];
        for (hash, line) in hashes.iter_mut().zip(lines) {
            *hash = xxh3_64(line) as u16;
        }
        LineFingerprint(hashes)
    }

    /// The lines that have another hash in `newer`. A line that is not among them may have changed
    /// all the same.
    pub fn changed(&self, newer: &LineFingerprint) -> LineMask {
        let mut mask = [0; LineMask::BYTES];
        for (at, (old, new)) in self.0.iter().zip(&newer.0).enumerate() {
            mask[at / 8] |= u8::from(old != new) << (at % 8);
        }
        LineMask::from_bytes(mask)
    }
}

/// Pages whose fingerprints are allocated together: 32.5 KiB.
const CHUNK_PAGES: usize = 256;

#[derive(Clone, Copy)]
struct Entry {
    /// [`Version::NONE`]: no fingerprint.
    version: Version,
    fingerprint: LineFingerprint,
}

const EMPTY: Entry =
    Entry { version: Version::NONE, fingerprint: LineFingerprint([0; LINES_PER_PAGE]) };

/// The fingerprints of sent pages, bounded: 130 bytes for each page of the parts of the guest that
/// hold any, so 32.5 MiB per GiB.
pub struct LineStore {
    chunks: Vec<Option<Box<[Entry]>>>,
    capacity_chunks: usize,
    chunks_left: usize,
    guest_pages: u64,
}

impl LineStore {
    /// A store of at most `capacity_bytes`. It fills in the order in which pages come; parts of the guest
    /// that come when it is full have no fingerprints.
    pub fn new(capacity_bytes: usize, guest_pages: u64) -> Self {
        let chunks = guest_pages.div_ceil(CHUNK_PAGES as u64) as usize;
        let capacity_chunks = capacity_bytes / (CHUNK_PAGES * size_of::<Entry>());
        LineStore {
            chunks: (0..chunks).map(|_| None).collect(),
            capacity_chunks,
            chunks_left: capacity_chunks,
            guest_pages,
        }
    }

    /// False when there is no room for any page.
    pub fn is_on(&self) -> bool {
        self.capacity_chunks > 0
    }

    /// What was sent last for `page`, and as which version.
    pub fn get(&self, page: PageIndex) -> Option<(Version, &LineFingerprint)> {
        let chunk = self.chunks.get(page.0 as usize / CHUNK_PAGES)?.as_ref()?;
        let entry = &chunk[page.0 as usize % CHUNK_PAGES];
        (entry.version != Version::NONE).then_some((entry.version, &entry.fingerprint))
    }

    /// Remembers what was just sent for `page`. False when there is no room.
    ///
    /// # Panics
    /// When the page is beyond the guest.
    pub fn insert(
        &mut self,
        page: PageIndex,
        version: Version,
        fingerprint: &LineFingerprint,
    ) -> bool {
        assert!(page.0 < self.guest_pages, "{page:?} beyond {} pages", self.guest_pages);
        let chunk = &mut self.chunks[page.0 as usize / CHUNK_PAGES];
        if chunk.is_none() {
            if self.chunks_left == 0 {
                return false;
            }
            self.chunks_left -= 1;
        }
        let entries = chunk.get_or_insert_with(|| vec![EMPTY; CHUNK_PAGES].into_boxed_slice());
        entries[page.0 as usize % CHUNK_PAGES] = Entry { version, fingerprint: *fingerprint };
        true
    }

    /// Drops `page`: the other side no longer holds what was sent.
    pub fn forget(&mut self, page: PageIndex) {
        if let Some(Some(chunk)) = self.chunks.get_mut(page.0 as usize / CHUNK_PAGES) {
            chunk[page.0 as usize % CHUNK_PAGES] = EMPTY;
        }
    }

    /// What the store occupies now, in bytes.
    pub fn memory_bytes(&self) -> usize {
        let used = self.chunks.iter().flatten().count();
        used * CHUNK_PAGES * size_of::<Entry>()
            + self.chunks.len() * size_of::<Option<Box<[Entry]>>>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::test_pages::{noise_of, page_and_change, page_of};
    use crate::page::PAGE_SIZE_BYTES;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_line_named_as_changed_did_change((old, new) in page_and_change()) {
            let found = LineFingerprint::of(&old).changed(&LineFingerprint::of(&new));
            let truth = LineMask::between(&old, &new);
            let mut found_lines = Vec::new();
            found.gather(&new, &mut found_lines);
            let mut both = Vec::new();
            truth.gather(&new, &mut both);
            // Collisions aside, which 64 lines in 65,536 may have, they are the same.
            prop_assert!(found.count() <= truth.count());
            prop_assert!(found.count() + 2 >= truth.count());
            if found.count() == truth.count() {
                prop_assert_eq!(found_lines, both);
            }
        }
    }

    #[test]
    fn different_lines_may_collide() {
        // The reason for the check of the whole page: this must be possible, and rare.
        let first = LineFingerprint::of(&noise_of(0)).0;
        let others = (1..20_000).map(|seed| LineFingerprint::of(&noise_of(seed)).0);
        let collisions: usize =
            others.map(|other| other.iter().zip(&first).filter(|(a, b)| a == b).count()).sum();
        // 20,000 * 64 pairs of lines, each equal with probability 1 / 65,536: about 20.
        assert!((5..60).contains(&collisions), "{collisions}");
    }

    #[test]
    fn remembers_what_was_sent_last_within_its_bounds() {
        let chunk_bytes = CHUNK_PAGES * size_of::<Entry>();
        let mut store = LineStore::new(2 * chunk_bytes, 10_000);
        let index_bytes = store.memory_bytes();
        let fingerprint = LineFingerprint::of(&page_of(1));
        let at = |i: usize| PageIndex((i * CHUNK_PAGES) as u64 + 3);
        assert!(store.insert(at(0), Version(1), &LineFingerprint::of(&page_of(0))));
        assert!(store.insert(at(0), Version(2), &fingerprint));
        assert!(store.insert(at(5), Version(1), &fingerprint));
        assert!(!store.insert(at(6), Version(1), &fingerprint));
        assert!(store.insert(PageIndex(at(5).0 + 1), Version(1), &fingerprint));
        assert_eq!(store.get(at(0)), Some((Version(2), &fingerprint)));
        assert_eq!(store.get(at(6)), None);
        assert_eq!(store.memory_bytes(), index_bytes + 2 * chunk_bytes);
        store.forget(at(0));
        assert_eq!(store.get(at(0)), None);
        assert_eq!(size_of::<Entry>() * (1 << 30) / PAGE_SIZE_BYTES, 65 << 19, "32.5 MiB per GiB");
    }
}
