//! The alias: farfault's own mapping of all RAM of a guest that runs in another process.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::Advice;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use self::region::{Alias, Region, no_huge_pages};
use super::{MemoryError, MemoryLayout, RegionLayout, Units};
use crate::page::{PAGE_SIZE_BYTES, PageBytes, PageIndex, PageRange, PageSet};

mod region;

/// Pages among which holes are looked for at a time: 4 MiB.
const STRETCH_PAGES: u64 = 1024;
/// So many pages of a stretch are looked up one by one.
const FEW_PAGES: u64 = 32;

/// Whether an alias may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The source's alias.
    ReadOnly,
    /// The destination's alias.
    ReadWrite,
}

/// A region of guest RAM and the file that it lies in.
#[derive(Debug)]
pub struct RegionBacking {
    /// Name and size.
    pub layout: RegionLayout,
    /// The shared-memory file, open for what the alias is to do. Should be an open file of
    /// farfault's own (not a duplicate of the monitor's descriptor), since holes are found by seeking.
    pub file: File,
    /// Where in the file the region starts, a multiple of the page size.
    pub file_offset_bytes: u64,
}

/// farfault's mapping of all RAM regions of a guest.
///
/// The guest's threads, in this process or in another, read and write the same memory at any time,
/// so no Rust reference to it is ever formed. Reads go word by word through relaxed atomics: that
/// is a plain copy which the compiler may not assume to be free of races. Writes go through
/// `pwrite(2)`: on a full tmpfs it gives `ENOSPC`, where a store through the mapping would kill the
/// process with SIGBUS. It also is the faster way for pages that are new: of 64 together one takes 4 us
/// (alone 6 us), against 10 us, most of which is the fault of the alias. (For pages that are there it is 1.8 us
/// against 0.9 us.) RAM on hugetlbfs is read and written by other system calls: see `huge_file.rs`.
#[derive(Debug)]
pub struct GuestMemory {
    layout: MemoryLayout,
    regions: Vec<Region>,
    access: Access,
    /// See [`Self::claim`].
    claims: Vec<Flock<File>>,
}

impl GuestMemory {
    /// Maps these regions.
    ///
    /// # Errors
    /// [`MemoryError::BackingTooSmall`] when a file ends before its region does, [`MemoryError::Backing`] when
    /// mapping fails. For a region on hugetlbfs that is to be written, [`MemoryError::HugePages`] when its pages
    /// are not of 2 MiB or it is not a whole number of them.
    pub fn map(mut regions: Vec<RegionBacking>, access: Access) -> Result<Self, MemoryError> {
        let layout = MemoryLayout::new(regions.iter().map(|r| r.layout.clone()).collect());
        regions.sort_by(|a, b| a.layout.name.cmp(&b.layout.name));
        let regions = regions.into_iter().enumerate();
        let regions = regions.map(|(index, r)| Region::map(r, layout.range_of(index), access));
        let regions = regions.collect::<Result<_, _>>()?;
        Ok(GuestMemory { layout, regions, access, claims: Vec::new() })
    }

    /// Keeps every other farfault that claims this guest away from it while this value lives, at most until the process
    /// ends. Two that follow the writes of one guest would take each other's marks away, and neither would notice.
    ///
    /// The locks (`flock(2)`) belong to the open files of the regions, so these must be this process's own.
    ///
    /// # Errors
    /// [`MemoryError::Claimed`] when another has claimed it.
    pub fn claim(&mut self) -> Result<(), MemoryError> {
        let mut files = BTreeSet::new();
        for region in &self.regions {
            let file = region.file.metadata();
            let file = file.map_err(|source| region.error("inspect its file", source))?;
            // Of two regions in one file each has opened it for itself, and would be locked out by the other.
            if !files.insert((file.dev(), file.ino())) {
                continue;
            }
            let fail = |source| region.error("lock its file", source);
            let duplicate = region.file.try_clone().map_err(fail)?;
            let lock = Flock::lock(duplicate, FlockArg::LockExclusiveNonblock);
            self.claims.push(lock.map_err(|(_, errno)| match errno {
                Errno::EWOULDBLOCK => MemoryError::Claimed,
                errno => fail(errno.into()),
            })?);
        }
        Ok(())
    }

    /// Fresh RAM of this layout, all holes, in memory files of this process (close-on-exec): for
    /// guests that run inside farfault.
    pub fn create(layout: &MemoryLayout) -> Result<Self, MemoryError> {
        let backing = |layout: &RegionLayout| {
            let fail = |source: io::Error| MemoryError::Backing {
                region: layout.name.clone(),
                action: "create its memory file",
                source,
            };
            let fd = memfd_create(c"farfault-ram", MFdFlags::MFD_CLOEXEC);
            let file = File::from(fd.map_err(|errno| fail(errno.into()))?);
            file.set_len(layout.size_bytes).map_err(fail)?;
            Ok(RegionBacking { layout: layout.clone(), file, file_offset_bytes: 0 })
        };
        let regions = layout.regions().iter().map(backing).collect::<Result<_, MemoryError>>()?;
        Self::map(regions, Access::ReadWrite)
    }

    /// Makes sure that the pool of huge pages has room for all of the regions on hugetlbfs that are to be written: for
    /// a guest that is yet to come.
    ///
    /// # Errors
    /// [`MemoryError::NoHugePages`] when it has not.
    pub fn reserve_huge_pages(&self) -> Result<(), MemoryError> {
        for region in &self.regions {
            if let Alias::Huge(Some(huge)) = &region.alias {
                huge.reserve(&region.file).map_err(|source| no_huge_pages(&region.name, source))?;
            }
        }
        Ok(())
    }

    /// The regions and how their pages are numbered.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// Pages of the whole guest.
    pub fn pages(&self) -> u64 {
        self.layout.pages()
    }

    /// Copies a page once.
    ///
    /// The guest may be writing meanwhile: then the copy is torn, a mixture of old and new 8-byte
    /// words. That is harmless to a caller who hashes, codes and sends this one copy, since the
    /// write that tore it also marks the page dirty. Reading a hole allocates its page: ask
    /// [`Self::populated`] first.
    ///
    /// RAM that cannot be read (a page of memory that is broken, a file that was cut) ends the process: of shared
    /// memory by SIGBUS, and on hugetlbfs by an abort. A thread that only panicked would leave the others waiting for
    /// what it was to send; a process that is gone is known how to go on without, by the other side and by the
    /// guest, which lives elsewhere. See [`Self::try_read_page`].
    ///
    /// # Panics
    /// When the page is beyond the guest.
    pub fn read_page(&self, page: PageIndex, into: &mut PageBytes) {
        if let Err(error) = self.try_read_page(page, into) {
            tracing::error!(%error, "page {page}: the guest's memory cannot be read");
            std::process::abort();
        }
    }

    /// As [`Self::read_page`], for a caller who can do without.
    ///
    /// # Errors
    /// [`MemoryError::Backing`] for a page on hugetlbfs that cannot be read.
    pub fn try_read_page(&self, page: PageIndex, into: &mut PageBytes) -> Result<(), MemoryError> {
        let (region, offset) = self.locate(page);
        let Alias::Mapped(map) = &region.alias else {
            let read = region.file.read_exact_at(into, region.file_position(page) as u64);
            return read.map_err(|source| region.error("read its file", source));
        };
        // SAFETY: `offset` is within the mapping, which covers the whole region and lives as long as
        // `self`; see `locate`.
        let words = unsafe { map.as_ptr().add(offset as usize) }.cast::<u64>();
        for (index, bytes) in into.chunks_exact_mut(8).enumerate() {
            // SAFETY: within the page (512 words), 8-byte aligned since pages are. All other access
            // in this process is atomic too or made by the kernel; relaxed loads of a word are allowed
            // on memory that is mapped for reading only.
            let word = unsafe { AtomicU64::from_ptr(words.add(index).cast_mut()) };
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        Ok(())
    }

    /// These pages, which are not holes, are about to be read: maps them in one go, in a third of the time of
    /// the faults of their reads.
    pub fn will_read(&self, pages: PageRange) {
        for (index, piece) in self.layout.split(pages) {
            let region = &self.regions[index];
            let Alias::Mapped(map) = &region.alias else { continue };
            let offset = (piece.start.0 - region.pages.start.0) as usize * PAGE_SIZE_BYTES;
            // A kernel before 5.14 does not know it; then each read has its fault.
            let _ = map.advise_range(
                Advice::PopulateRead,
                offset,
                piece.len() as usize * PAGE_SIZE_BYTES,
            );
        }
    }

    /// Writes a page, as [`Self::write_pages`] does.
    pub fn write_page(&self, page: PageIndex, bytes: &PageBytes) -> Result<(), MemoryError> {
        self.write_pages(page, std::slice::from_ref(bytes))
    }

    /// Writes pages that follow each other, `first` and those behind it: a page of 64 together takes half
    /// the time of one alone. On the destination the caller holds the pages' claims in the
    /// [`super::PageTable`], so that nobody else writes them and the guest cannot reach them.
    ///
    /// # Errors
    /// [`MemoryError::NoSpace`] when a page is new and the file system is full,
    /// [`MemoryError::ReadOnly`], [`MemoryError::Backing`]. Some of several pages may have been written then;
    /// a single one was not.
    ///
    /// # Panics
    /// When a page is beyond the guest.
    pub fn write_pages(&self, first: PageIndex, pages: &[PageBytes]) -> Result<(), MemoryError> {
        let run = PageRange::new(first.0, first.0 + pages.len() as u64);
        assert!(run.end.0 <= self.pages(), "{run:?} beyond {} pages", self.pages());
        let mut rest = pages;
        for (index, piece) in self.layout.split(run) {
            let region = &self.regions[index];
            self.must_be_writable(region)?;
            let (now, behind) = rest.split_at(piece.len() as usize);
            rest = behind;
            region.write(piece.start, now.as_flattened())?;
        }
        Ok(())
    }

    /// Which pages of `range` are not holes. Allocates nothing.
    pub fn populated(&self, range: PageRange) -> Result<PageSet, MemoryError> {
        let mut set = PageSet::empty(self.pages());
        self.for_each_populated_run(range, |run| set.insert_range(run))?;
        Ok(set)
    }

    /// The maximal runs of pages in `range` that are not holes, in ascending order within each region.
    pub fn populated_runs(&self, range: PageRange) -> Result<Vec<PageRange>, MemoryError> {
        let mut runs = Vec::new();
        self.for_each_populated_run(range, |run| runs.push(run))?;
        Ok(runs)
    }

    /// The first page of `range` that is not a hole. A hole of many GiB takes no longer than a small one.
    pub fn first_populated(&self, range: PageRange) -> Result<Option<PageIndex>, MemoryError> {
        for (index, piece) in self.layout.split(range) {
            let region = &self.regions[index];
            let (at, end) = (region.file_position(piece.start), region.file_position(piece.end));
            if let Some(data) = region.next_data(at, end)?
                && data < end
            {
                return Ok(Some(region.page_at(data)));
            }
        }
        Ok(None)
    }

    /// Those of `pages` that are not holes. Takes a time that grows with their number, not with the
    /// guest's.
    pub fn populated_of(&self, pages: &PageSet) -> Result<PageSet, MemoryError> {
        let mut found = PageSet::empty(self.pages());
        let mut at = PageIndex(0);
        while let Some(first) = pages.first_from(at) {
            let start = first.0 / STRETCH_PAGES * STRETCH_PAGES;
            let stretch = PageRange::new(start, (start + STRETCH_PAGES).min(self.pages()));
            at = stretch.end;
            if pages.len_in(stretch) > FEW_PAGES {
                self.for_each_populated_run(stretch, |run| found.insert_range(run))?;
                found.intersect_in(stretch, pages);
                continue;
            }
            let mut next = first;
            loop {
                if self.is_populated(next)? {
                    found.insert(next);
                }
                match pages.first_from(PageIndex(next.0 + 1)).filter(|page| *page < at) {
                    Some(page) => next = page,
                    None => break,
                }
            }
        }
        Ok(found)
    }

    fn is_populated(&self, page: PageIndex) -> Result<bool, MemoryError> {
        let (region, _) = self.locate(page);
        let at = region.file_position(page);
        Ok(region.next_data(at, at + PAGE_SIZE_BYTES as i64)? == Some(at))
    }

    /// Calls `visit` with the maximal runs of pages in `range` that are not holes, in ascending order
    /// within each region.
    pub(super) fn for_each_populated_run(
        &self,
        range: PageRange,
        mut visit: impl FnMut(PageRange),
    ) -> Result<(), MemoryError> {
        for (index, piece) in self.layout.split(range) {
            let region = &self.regions[index];
            // A run that goes on in the next stretch.
            let mut open: Option<PageRange> = None;
            let mut stretch = piece.start;
            while stretch < piece.end {
                let end = (stretch.0 + STRETCH_PAGES).min(piece.end.0);
                region.populated_in(PageRange::new(stretch.0, end), |run| match &mut open {
                    Some(before) if before.end == run.start => before.end = run.end,
                    _ => open.replace(run).into_iter().for_each(&mut visit),
                })?;
                if end == piece.end.0 {
                    break;
                }
                // From here on there may be nothing for many GiB.
                let rest = (region.file_position(PageIndex(end)), region.file_position(piece.end));
                stretch = match region.next_data(rest.0, rest.1)? {
                    Some(data) => region.page_at(data),
                    None => break,
                };
            }
            open.into_iter().for_each(&mut visit);
        }
        Ok(())
    }

    /// Makes `range` a hole again: its content is gone, reads as zero and takes no memory, and the
    /// guest's mapping of it is taken away too. On hugetlbfs its room in the pool stays reserved.
    ///
    /// # Errors
    /// [`MemoryError::Backing`], also for a part of a huge page, [`MemoryError::NoHugePages`] when the pool has given
    /// that room to others meanwhile, [`MemoryError::ReadOnly`].
    pub fn punch_hole(&self, range: PageRange) -> Result<(), MemoryError> {
        for (index, piece) in self.layout.split(range) {
            let region = &self.regions[index];
            self.must_be_writable(region)?;
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let start = region.file_position(piece.start);
            let length_bytes = region.file_position(piece.end) - start;
            let fail = |errno: Errno| region.error("punch a hole into its file", errno.into());
            let Alias::Huge(huge) = &region.alias else {
                fallocate(&region.file, mode, start, length_bytes).map_err(fail)?;
                continue;
            };
            // The kernel would make the whole huge pages of it holes, and only clear the rest.
            let is_whole = |bytes: i64| (bytes as u64).is_multiple_of(region.unit_bytes);
            if !is_whole(start) || !is_whole(length_bytes) {
                return Err(fail(Errno::EINVAL));
            }
            fallocate(&region.file, mode, start, length_bytes).map_err(fail)?;
            if let Some(huge) = huge {
                huge.punched(&region.file, start as u64, length_bytes as u64)
                    .map_err(|source| no_huge_pages(&region.name, source))?;
            }
        }
        Ok(())
    }

    /// Makes `range` read as zero: by holes where each page can be one, on hugetlbfs by writing zeros over what is
    /// not zero, since the guest's other pages may lie in the same huge page. The caller holds the claims as for
    /// [`Self::write_pages`].
    ///
    /// # Errors
    /// As of [`Self::punch_hole`] and [`Self::write_pages`].
    pub fn clear(&self, range: PageRange) -> Result<(), MemoryError> {
        for (index, piece) in self.layout.split(range) {
            match &self.regions[index].alias {
                Alias::Mapped(_) => self.punch_hole(piece)?,
                Alias::Huge(_) => {
                    let (mut copy, zeros) = ([0; PAGE_SIZE_BYTES], [0; PAGE_SIZE_BYTES]);
                    for page in piece.pages() {
                        self.try_read_page(page, &mut copy)?;
                        if copy != zeros {
                            self.write_page(page, &zeros)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Where the regions are in this process, in layout order; `None` of one that is not mapped, since it lies on
    /// hugetlbfs.
    pub(super) fn addresses(&self) -> Vec<Option<u64>> {
        let address = |region: &Region| Some(region.mapped()?.as_ptr() as u64);
        self.regions.iter().map(address).collect()
    }

    /// Pages of 4 KiB that are there of those regions on hugetlbfs that are the whole of their file. What others put
    /// there counts too, of which [`Self::populated`] does not know.
    pub fn pages_in_huge_files(&self) -> Result<u64, MemoryError> {
        let mut pages = 0;
        for region in self.regions.iter().filter(|region| region.mapped().is_none()) {
            let file = region.file.metadata();
            let file = file.map_err(|source| region.error("inspect its file", source))?;
            let size_bytes = region.pages.len() * PAGE_SIZE_BYTES as u64;
            if region.file_offset_bytes == 0 && file.len() == size_bytes {
                pages += file.blocks() * 512 / PAGE_SIZE_BYTES as u64;
            }
        }
        Ok(pages)
    }

    /// Which pages can only be mapped together.
    pub fn units(&self) -> Units {
        Units::new(&self.layout, self.unit_pages())
    }

    /// Pages of 4 KiB that a page of each region's file has: more than one on hugetlbfs.
    pub(super) fn unit_pages(&self) -> impl Iterator<Item = u64> {
        self.regions.iter().map(|region| region.unit_bytes / PAGE_SIZE_BYTES as u64)
    }

    /// Asks the kernel to map the alias in small pages only (before Linux 6.12 it may do otherwise).
    pub(super) fn avoid_huge_pages(&self) {
        for map in self.regions.iter().filter_map(Region::mapped) {
            // A kernel that refuses this advice has no huge pages.
            let _ = map.advise(Advice::NoHugePage);
        }
    }

    /// The regions' files, duplicated, in layout order: for a guest inside this process to make its
    /// own mapping of them.
    pub fn region_files(&self) -> Result<Vec<RegionBacking>, MemoryError> {
        let duplicate = |(region, layout): (&Region, &RegionLayout)| {
            let file = region.file.try_clone();
            Ok(RegionBacking {
                layout: layout.clone(),
                file: file.map_err(|source| region.error("duplicate its descriptor", source))?,
                file_offset_bytes: region.file_offset_bytes,
            })
        };
        self.regions.iter().zip(self.layout.regions()).map(duplicate).collect()
    }

    /// The region of a page, and the page's offset in the region's mapping in bytes: a multiple of the
    /// page size, with the whole page inside the mapping.
    fn locate(&self, page: PageIndex) -> (&Region, u64) {
        let index = self.regions.partition_point(|region| region.pages.end <= page);
        let region = self.regions.get(index).filter(|region| region.pages.contains(page));
        let region = region.unwrap_or_else(|| panic!("{page:?} beyond {} pages", self.pages()));
        (region, (page.0 - region.pages.start.0) * PAGE_SIZE_BYTES as u64)
    }

    fn must_be_writable(&self, region: &Region) -> Result<(), MemoryError> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(MemoryError::ReadOnly { region: region.name.clone() }),
        }
    }
}

#[cfg(test)]
mod tests;
