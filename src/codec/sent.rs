//! What the other side holds of each page, as far as this side remembers it.
//!
//! Three stores, one account, so that what is said of a page in one of them is true in the others:
//!
//! * the [`BaseCache`] has the exact bytes of some pages, those that change most;
//! * the [`LineStore`] has fingerprints of the others, also of a page that lost its place in the cache;
//! * a [`CopyIndex`] finds a page of the cache by its content, and another one pages that share stretches
//!   of bytes with it ([`super::kin`]).
//!
//! The account is in shards, each with its own lock, and neighbouring runs of pages are in different ones:
//! threads that encode different parts of the guest hardly ever meet.

use std::sync::{OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

use xxhash_rust::xxh3::xxh3_64;

use super::copies::CopyIndex;
use super::kin::Anchor;
use super::{BaseCache, LineFingerprint, LineStore};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, PageSet, Version};

const SHARDS: u64 = 16;
/// Neighbours that share a shard: as many as a chunk of the line store has.
const RUN_PAGES: u64 = 256;

/// How much may be remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentLimits {
    /// Exact bytes of sent pages, and the index of their contents.
    pub base_cache_bytes: usize,
    /// Line fingerprints.
    pub lines_bytes: usize,
}

/// What is known of a page at the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Nothing, or that it is zero.
    Nothing,
    /// What was made of its base, or of another page, was rejected: send it whole.
    Distrusted,
    /// All of its bytes at this version.
    Bytes(Version),
    /// The hashes of its lines at this version.
    Lines(Version, LineFingerprint),
}

/// What the account occupies, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SentMemory {
    /// The base cache.
    pub base_cache_bytes: u64,
    /// The line fingerprints.
    pub lines_bytes: u64,
    /// The index of contents.
    pub copies_bytes: u64,
    /// The index of stretches.
    pub kin_bytes: u64,
}

/// The account of what was sent; see the module.
pub struct SentPages {
    shards: Vec<RwLock<Shard>>,
    copies: CopyIndex,
    /// Made when it is first used: on a fast link nobody looks for kin.
    kin: OnceLock<CopyIndex>,
    anchors: usize,
    guest_pages: u64,
}

struct Shard {
    bases: BaseCache,
    lines: LineStore,
    /// See [`Known::Distrusted`].
    distrusted: PageSet,
    /// All pages of which any of these may know: of most of a large guest, none does.
    known: PageSet,
}

/// Of the base cache's memory, one part in so many is for the index of its contents,
const COPIES_SHARE: usize = 500;
/// and one in so many for that of its anchors, eight for each page, half of what a page has;
const KIN_SHARE: usize = 64;
/// but no more than those of 4 GiB: of a larger cache the pages sent last are found.
const MAX_KIN_BYTES: usize = 64 << 20;

impl SentPages {
    /// The account of a guest of which nothing was sent. Memory is taken as it is needed, apart from that
    /// of the indexes.
    pub fn new(limits: SentLimits, guest_pages: u64) -> Self {
        let shard_pages = guest_pages.div_ceil(RUN_PAGES * SHARDS) * RUN_PAGES;
        let copies_bytes = limits.base_cache_bytes / COPIES_SHARE;
        let kin_bytes = (limits.base_cache_bytes / KIN_SHARE).min(MAX_KIN_BYTES);
        let cached_bytes = limits.base_cache_bytes - copies_bytes - kin_bytes;
        let cached_bytes = cached_bytes / SHARDS as usize;
        let lines_bytes = limits.lines_bytes / SHARDS as usize;
        let shard = || Shard {
            bases: BaseCache::new(cached_bytes, shard_pages),
            lines: LineStore::new(lines_bytes, shard_pages),
            distrusted: PageSet::empty(shard_pages),
            known: PageSet::empty(shard_pages),
        };
        let shards: Vec<_> = (0..SHARDS).map(|_| shard()).collect();
        let cached: usize = shards.iter().map(|shard| shard.bases.capacity()).sum();
        let anchor_bytes = (cached * PAGE_SIZE_BYTES / KIN_SHARE).min(kin_bytes);
        SentPages {
            shards: shards.into_iter().map(RwLock::new).collect(),
            copies: CopyIndex::new(cached.min(copies_bytes / size_of::<u64>())),
            kin: OnceLock::new(),
            anchors: anchor_bytes / size_of::<u64>(),
            guest_pages,
        }
    }

    /// What is known of `page`; its bytes are put into `into` when they are.
    ///
    /// # Panics
    /// When the page is beyond the guest; so for all methods.
    pub fn recall(&self, page: PageIndex, into: &mut PageBytes) -> Known {
        let (shard, at) = self.read(page);
        if !shard.known.contains(at) {
            return Known::Nothing;
        }
        if shard.distrusted.contains(at) {
            return Known::Distrusted;
        }
        if let Some((version, bytes)) = shard.bases.get(at) {
            *into = *bytes;
            return Known::Bytes(version);
        }
        match shard.lines.get(at) {
            Some((version, lines)) => Known::Lines(version, *lines),
            None => Known::Nothing,
        }
    }

    /// True when `page` can go as a delta.
    pub fn knows(&self, page: PageIndex) -> bool {
        let (shard, at) = self.read(page);
        shard.known.contains(at)
            && !shard.distrusted.contains(at)
            && (shard.bases.get(at).is_some() || shard.lines.get(at).is_some())
    }

    /// True when a page may be found by its content.
    pub fn finds_copies(&self) -> bool {
        self.copies.memory_bytes() > 0
    }

    /// A page other than `page` that was sent with exactly these bytes, which hash to `hash`, as
    /// which version; of those that `is_wanted` would have.
    pub fn original_of(
        &self,
        page: PageIndex,
        bytes: &PageBytes,
        hash: ContentHash,
        is_wanted: impl Fn(PageIndex) -> bool,
    ) -> Option<(PageIndex, Version)> {
        self.copies.find(hash.0).filter(|other| *other != page && is_wanted(*other)).find_map(
            |other| {
                let (shard, at) = self.read(other);
                let (version, sent) = shard.bases.get(at)?;
                (sent == bytes).then_some((other, version))
            },
        )
    }

    /// True when pages may be found by their stretches.
    pub fn finds_kin(&self) -> bool {
        self.anchors > 0
    }

    /// Pages that may have this anchor.
    pub fn pages_with(&self, anchor: Anchor) -> impl Iterator<Item = PageIndex> {
        self.kin.get().into_iter().flat_map(move |kin| kin.find(anchor.0))
    }

    /// Appends the bytes of `page` to `into`, if they are known and wanted in their version, which is given.
    pub fn append_bytes(
        &self,
        page: PageIndex,
        is_wanted: impl Fn(Version) -> bool,
        into: &mut Vec<u8>,
    ) -> Option<Version> {
        let (shard, at) = self.read(page);
        let (version, bytes) = shard.bases.get(at).filter(|(version, _)| is_wanted(*version))?;
        into.extend_from_slice(bytes);
        Some(version)
    }

    /// `page` was just sent with these bytes, which are not all zero, as this version. With a hash it
    /// may be the original of copies from now on, with anchors the kin of others.
    pub fn remember(
        &self,
        page: PageIndex,
        version: Version,
        bytes: &PageBytes,
        hash: Option<ContentHash>,
        anchors: &[Anchor],
    ) {
        let (mut shard, at) = self.write(page);
        let Shard { bases, lines, distrusted, known } = &mut *shard;
        distrusted.remove(at);
        known.insert(at);
        let evicted = |colder, version, bytes: &PageBytes| {
            if lines.is_on() {
                lines.insert(colder, version, &LineFingerprint::of(bytes));
            }
        };
        if bases.insert(at, version, bytes, evicted) {
            lines.forget(at);
            if let Some(ContentHash(hash)) = hash {
                self.copies.insert(hash, page);
            }
            for Anchor(hash) in anchors {
                self.kin.get_or_init(|| CopyIndex::new(self.anchors)).insert(*hash, page);
            }
        } else if lines.is_on() {
            lines.insert(at, version, &LineFingerprint::of(bytes));
        }
    }

    /// `page` was written to by the guest: it is worth more than one that was not.
    pub fn touch(&self, page: PageIndex) {
        let (mut shard, at) = self.write(page);
        shard.bases.touch(at);
    }

    /// The other side no longer holds what was sent of these pages, or it is zero.
    pub fn forget(&self, pages: PageRange) {
        let mut at = pages.start;
        while at < pages.end {
            let run_end = (at.0 / RUN_PAGES + 1) * RUN_PAGES;
            let run = PageRange::new(at.0, run_end.min(pages.end.0));
            let (mut shard, first) = self.write(at);
            let local = PageRange::new(first.0, first.0 + run.len());
            let Shard { bases, lines, distrusted, known } = &mut *shard;
            for page in known.iter_in(local) {
                bases.forget(page);
                lines.forget(page);
                distrusted.remove(page);
            }
            known.remove_range(local);
            at = run.end;
        }
    }

    /// The other side has rejected what came of `page`: the next time it goes whole.
    pub fn distrust(&self, page: PageIndex) {
        let (mut shard, at) = self.write(page);
        shard.bases.forget(at);
        shard.lines.forget(at);
        shard.distrusted.insert(at);
        shard.known.insert(at);
    }

    /// What is occupied now.
    pub fn memory(&self) -> SentMemory {
        let mut memory = SentMemory {
            copies_bytes: self.copies.memory_bytes() as u64,
            kin_bytes: self.kin.get().map_or(0, CopyIndex::memory_bytes) as u64,
            ..SentMemory::default()
        };
        for shard in &self.shards {
            let shard = shard.read().expect("no holder panics");
            memory.base_cache_bytes += shard.bases.memory_bytes() as u64;
            memory.lines_bytes += shard.lines.memory_bytes() as u64;
        }
        memory
    }

    fn read(&self, page: PageIndex) -> (RwLockReadGuard<'_, Shard>, PageIndex) {
        let (shard, at) = self.place_of(page);
        (shard.read().expect("no holder panics"), at)
    }

    fn write(&self, page: PageIndex) -> (RwLockWriteGuard<'_, Shard>, PageIndex) {
        let (shard, at) = self.place_of(page);
        (shard.write().expect("no holder panics"), at)
    }

    /// The shard of `page`, and the page's number there.
    fn place_of(&self, page: PageIndex) -> (&RwLock<Shard>, PageIndex) {
        assert!(page.0 < self.guest_pages, "{page:?} beyond {} pages", self.guest_pages);
        let (run, within) = (page.0 / RUN_PAGES, page.0 % RUN_PAGES);
        let at = PageIndex(run / SHARDS * RUN_PAGES + within);
        (&self.shards[(run % SHARDS) as usize], at)
    }
}

/// The hash by which equal contents are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentHash(u64);

impl ContentHash {
    /// The hash of `bytes`.
    pub fn of(bytes: &PageBytes) -> Self {
        ContentHash(xxh3_64(bytes))
    }
}

#[cfg(test)]
mod tests;
