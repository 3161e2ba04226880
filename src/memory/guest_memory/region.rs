//! A region of guest RAM: its file, and how that is read, written and looked through.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::{Access, RegionBacking};
use crate::memory::huge_file::{HUGE_PAGE_BYTES, HugeFile};
use crate::memory::{MemoryError, RegionLayout, sys};
use crate::page::{PAGE_SIZE_BYTES, PageIndex, PageRange};

const LOOKING_FOR_HOLES: &str = "look for holes in its file";

#[derive(Debug)]
pub(super) struct Region {
    pub(super) name: String,
    pub(super) pages: PageRange,
    pub(super) file: File,
    pub(super) file_offset_bytes: u64,
    pub(super) alias: Alias,
    /// How large the pages of the file are.
    pub(super) unit_bytes: u64,
}

#[derive(Debug)]
pub(super) enum Alias {
    /// Of shared memory.
    Mapped(MmapRaw),
    /// Of a file on hugetlbfs, which is read by `pread(2)`: reading a hole of that through a mapping would take a
    /// huge page. With what it takes to write it, where it may be written.
    Huge(Option<HugeFile>),
}

impl Region {
    pub(super) fn map(
        backing: RegionBacking,
        pages: PageRange,
        access: Access,
    ) -> Result<Self, MemoryError> {
        let RegionBacking { layout: RegionLayout { name, size_bytes }, file, file_offset_bytes } =
            backing;
        let fail = |action, source| MemoryError::Backing { region: name.clone(), action, source };
        let have_bytes = file.metadata().map_err(|e| fail("inspect its file", e))?.len();
        let need_bytes = file_offset_bytes.saturating_add(size_bytes);
        if have_bytes < need_bytes {
            return Err(MemoryError::BackingTooSmall { region: name, need_bytes, have_bytes });
        }
        let system = fstatfs(&file).map_err(|e| fail("inspect its file system", e.into()))?;
        if system.filesystem_type() == HUGETLBFS_MAGIC {
            let unit_bytes = system.block_size() as u64;
            let huge = match access {
                Access::ReadOnly => None,
                Access::ReadWrite => {
                    let is_whole = |bytes: u64| bytes.is_multiple_of(HUGE_PAGE_BYTES);
                    let fits = is_whole(size_bytes) && is_whole(file_offset_bytes);
                    if unit_bytes != HUGE_PAGE_BYTES || !fits {
                        return Err(MemoryError::HugePages {
                            region: name,
                            size_bytes,
                            unit_bytes,
                        });
                    }
                    let huge = HugeFile::map(&file, file_offset_bytes, size_bytes);
                    Some(huge.map_err(|e| fail("map its file", e))?)
                }
            };
            let alias = Alias::Huge(huge);
            return Ok(Region { name, pages, file, file_offset_bytes, alias, unit_bytes });
        }
        let mut options = MmapOptions::new();
        options.offset(file_offset_bytes).len(size_bytes as usize);
        let map = match access {
            // A private mapping that is never written shows the pages of the file, as a shared one does.
            // But where the file is open for reading only, a userfaultfd can watch no shared one.
            // SAFETY: the mapping is used through its raw pointer alone.
            Access::ReadOnly => unsafe { options.map_copy_read_only(&file) }.map(MmapRaw::from),
            Access::ReadWrite => options.map_raw(&file),
        };
        let map = map.map_err(|e| fail("map its file", e))?;
        // A crash of farfault must not write the guest's memory to disk.
        map.advise(Advice::DontDump).map_err(|e| fail("keep it out of core dumps", e))?;
        let unit_bytes = PAGE_SIZE_BYTES as u64;
        let alias = Alias::Mapped(map);
        Ok(Region { name, pages, file, file_offset_bytes, alias, unit_bytes })
    }

    pub(super) fn mapped(&self) -> Option<&MmapRaw> {
        match &self.alias {
            Alias::Mapped(map) => Some(map),
            Alias::Huge(_) => None,
        }
    }

    /// Writes `bytes`, whole pages, from `first` on.
    pub(super) fn write(&self, first: PageIndex, bytes: &[u8]) -> Result<(), MemoryError> {
        let position = self.file_position(first) as u64;
        let fail = |page, source: io::Error| match source.kind() {
            io::ErrorKind::StorageFull => MemoryError::NoSpace { page },
            _ => self.error("write to its file", source),
        };
        let Alias::Huge(Some(huge)) = &self.alias else {
            let written = self.file.write_all_at(bytes, position);
            return written.map_err(|source| fail(first, source));
        };
        let mut done = 0;
        while done < bytes.len() {
            let at = position + done as u64;
            done += huge
                .write_at(&bytes[done..], at)
                .map_err(|errno| fail(self.page_at(at as i64), errno.into()))?;
        }
        Ok(())
    }

    pub(super) fn file_position(&self, page: PageIndex) -> i64 {
        let in_region = (page.0 - self.pages.start.0) * PAGE_SIZE_BYTES as u64;
        (self.file_offset_bytes + in_region) as i64
    }

    pub(super) fn page_at(&self, position: i64) -> PageIndex {
        let in_region = position as u64 - self.file_offset_bytes;
        PageIndex(self.pages.start.0 + in_region / PAGE_SIZE_BYTES as u64)
    }

    /// Where in the file there is content, from position `at` on; what is behind `end` is of no interest. hugetlbfs
    /// does not tell: where we have not made holes ourselves.
    pub(super) fn next_data(&self, at: i64, end: i64) -> Result<Option<i64>, MemoryError> {
        if let Alias::Huge(huge) = &self.alias {
            let held = |huge: &HugeFile| huge.next_held(at as u64, end as u64).map(|at| at as i64);
            return Ok(huge.as_ref().map_or(Some(at), held));
        }
        match lseek(&self.file, at, Whence::SeekData) {
            Ok(data) => Ok(Some(data)),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(self.error(LOOKING_FOR_HOLES, errno.into())),
        }
    }

    /// Calls `visit` with the runs of pages in `stretch` that are not holes.
    ///
    /// The kernel looks for the next hole page by page, up to the end of the file when there is none: in
    /// each of many stretches of a guest that is full that takes a time which grows with the square of its
    /// size. So a stretch that is full is found to be so by the number of its pages in the page cache, and
    /// the next hole is looked for only where one is near.
    pub(super) fn populated_in(
        &self,
        stretch: PageRange,
        mut visit: impl FnMut(PageRange),
    ) -> Result<(), MemoryError> {
        let (mut at, end) = (self.file_position(stretch.start), self.file_position(stretch.end));
        if let Alias::Huge(huge) = &self.alias {
            while let Some(data) = self.next_data(at, end)?.filter(|data| *data < end) {
                let hole = huge.as_ref().and_then(|huge| huge.next_hole(data as u64, end as u64));
                at = hole.map_or(end, |hole| hole as i64);
                visit(PageRange { start: self.page_at(data), end: self.page_at(at) });
            }
            return Ok(());
        }
        let cached = sys::cached_pages(self.file.as_fd(), at as u64, (end - at) as u64);
        if cached == Ok(stretch.len()) {
            visit(stretch);
            return Ok(());
        }
        while let Some(data) = self.next_data(at, end)?.filter(|data| *data < end) {
            let hole = match cached {
                Ok(_) => lseek(&self.file, data, Whence::SeekHole)
                    .map_err(|errno| self.error(LOOKING_FOR_HOLES, errno.into()))?
                    .min(end),
                // An older kernel does not tell: page by page then.
                Err(_) => data - data % PAGE_SIZE_BYTES as i64 + PAGE_SIZE_BYTES as i64,
            };
            visit(PageRange {
                start: self.page_at(data),
                end: self.page_at(hole - 1 + PAGE_SIZE_BYTES as i64),
            });
            at = hole;
        }
        Ok(())
    }

    pub(super) fn error(&self, action: &'static str, source: io::Error) -> MemoryError {
        MemoryError::Backing { region: self.name.clone(), action, source }
    }
}

pub(super) fn no_huge_pages(region: &str, source: io::Error) -> MemoryError {
    MemoryError::NoHugePages { region: region.to_owned(), source }
}
